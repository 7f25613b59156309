from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from moelora import MoELoraConfig

path = "runs/quickstart/model"  # any causal language model; `make quickstart` puts SmolLM2-135M here
base, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
config = MoELoraConfig.preset("multi-domain", target_modules="all-linear", task_type="CAUSAL_LM")
model = get_peft_model(base, config)  # a PeftModel, ready for Trainer, SFTTrainer and generate
model.print_trainable_parameters()
batch = tokenizer("The router decides for every token.", return_tensors="pt")
print(f"loss before training: {model(**batch, labels=batch['input_ids']).loss:.3f}")
