from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import moelora  # registers the method: from here on `from peft import MoELoraConfig` works too

path = "runs/quickstart/model"  # any causal language model; `make quickstart` puts SmolLM2-135M here
base, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
config = moelora.MoELoraConfig(r=8, lora_alpha=16, target_modules="all-linear", num_experts=4, task_type="CAUSAL_LM")
model = get_peft_model(base, config).train()  # ready for Trainer, SFTTrainer, generate
model.print_trainable_parameters()
batch = tokenizer("The router decides for every token.", return_tensors="pt")
output = model(**batch, labels=batch["input_ids"])
print(f"loss {output.loss:.3f} = task + 0.01 x balancing loss {output.balancing_loss:.3f}; {model.expert_maturity = }")
