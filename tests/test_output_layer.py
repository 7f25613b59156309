"""`lm_head` as a target, whose input may be the last token alone: its router decides for what it reads."""

import pytest
import torch
from helpers import VOCAB, awaken, llama
from peft import LoraConfig, PeftModel, get_peft_model

from moelora import MoELoraConfig
from moelora.experts import save_lora, to_lora
from moelora.storage.mixture_files import read_mixture

IDS = torch.arange(14).view(2, 7) % VOCAB
MASK = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
OPTIONS = {"r": 2, "target_modules": ["q_proj", "lm_head"], "task_type": "CAUSAL_LM"}


def adapted(kind, tied=False):
    base = llama(tie_word_embeddings=tied)
    torch.manual_seed(1)
    if kind == "lora":
        model = get_peft_model(base, LoraConfig(**OPTIONS))
    else:
        model = get_peft_model(base, MoELoraConfig(router_scope="module", router_type="learned", **OPTIONS))
    awaken(model)
    return model.eval()


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings:UserWarning")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["lora", "module"])
def test_lm_head(tmp_path, kind, tied):
    model = adapted(kind, tied)
    logits = model(IDS, attention_mask=MASK).logits
    last = model(IDS, attention_mask=MASK, logits_to_keep=1).logits
    torch.testing.assert_close(last, logits[:, -1:], rtol=1e-4, atol=1e-5)
    options = {"max_new_tokens": 5, "do_sample": False}
    answers = [
        model.generate(input_ids=IDS, attention_mask=MASK, use_cache=cached, **options) for cached in (True, False)
    ]
    assert torch.equal(*answers)
    model.train()
    loss = model(IDS, attention_mask=MASK, labels=IDS.masked_fill(MASK == 0, -100)).loss
    loss.backward()
    learned = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert any("lm_head.lora_B" in name for name in learned)
    assert kind == "lora" or any("lm_head.moe_router" in name for name in learned)
    model.eval().save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(tie_word_embeddings=tied), tmp_path).eval()
    torch.testing.assert_close(again(IDS, attention_mask=MASK).logits, logits, rtol=0, atol=0)


def test_an_adapted_output_layer_replaces_no_weights_of_another_base(tmp_path):
    """PEFT saves such a layer's own weights along, and puts them into whatever base it loads the adapter on."""
    model = adapted("module")
    with torch.no_grad():
        model.get_base_model().lm_head.base_layer.weight += 1
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lm_head.base_layer.weight' would replace the base model's own"):
        PeftModel.from_pretrained(llama(), tmp_path)
    again = PeftModel.from_pretrained(llama(), tmp_path, load_embedding_layers=True).eval()
    assert torch.equal(again(IDS).logits, model(IDS).logits)


@torch.no_grad()
def test_an_adapted_output_layer_is_exported_from_a_folder_without_the_bases_weights(tmp_path):
    model = adapted("module")
    model.save_pretrained(tmp_path / "with")
    with pytest.raises(ValueError, match=r"lm_head.base_layer.weight`.*`save_embedding_layers=False`"):
        to_lora(read_mixture(tmp_path / "with"), 0)
    model.save_pretrained(tmp_path / "without", save_embedding_layers=False)
    again = PeftModel.from_pretrained(llama(), tmp_path / "without").eval()
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    save_lora(to_lora(read_mixture(tmp_path / "without"), 0), tmp_path / "lora")
    alone = PeftModel.from_pretrained(llama(), tmp_path / "lora").eval()
    weights = torch.tensor([1.0, 0.0, 0.0, 0.0]).expand(2, 7, 4)
    torch.testing.assert_close(alone(IDS).logits, model(IDS, routing_weights=weights).logits, rtol=1e-4, atol=1e-4)
