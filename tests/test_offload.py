"""accelerate keeps weights on the CPU or on disk and brings them when they are needed; routers and experts come too."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from helpers import ARCHITECTURES, LLAMA_TARGETS, SCOPES, VOCAB, awaken, llama, mixture_of
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaForCausalLM

from moelora import MoELoraConfig

IDS = torch.arange(14).view(2, 7) % VOCAB
CPU = torch.device("cpu")
KINDS = ["lora", *SCOPES]


def adapted(kind, base=None):
    options = {"r": 2, "target_modules": LLAMA_TARGETS, "init_lora_weights": False}
    scope = {} if kind == "lora" else {"router_scope": kind, "router_type": "learned"}
    config = (LoraConfig if kind == "lora" else MoELoraConfig)(**options, **scope)
    model = get_peft_model(llama() if base is None else base, config)
    awaken(model)
    return model.eval()


def dispatched(model, folder):
    where = {"embed_tokens": "cpu", "layers.0": "disk", "layers.1": "cpu", "norm": "cpu", "rotary_emb": "cpu"}
    where = {f"base_model.model.model.{name}": device for name, device in where.items()}
    where["base_model.model.lm_head"] = "cpu"
    if "moe_router" in model.base_model.model._modules:
        where["base_model.model.moe_router"] = "disk"
    dispatch_model(model, where, main_device="cpu", offload_dir=folder, force_hooks=True)


WAYS = {
    "cpu": lambda model, folder: cpu_offload(model, CPU),
    "cpu-with-buffers": lambda model, folder: cpu_offload(model, CPU, offload_buffers=True),
    "cpu-base": lambda model, folder: cpu_offload(model.base_model.model, CPU),
    "disk": lambda model, folder: disk_offload(model, folder, CPU),
    "dispatch": dispatched,
}


def assert_nothing_stays(model):
    """Outside a forward, whatever accelerate keeps elsewhere is not in memory."""
    factors = [parameter for name, parameter in model.named_parameters() if "layers.0" in name and "lora_" in name]
    assert factors and all(factor.is_meta for factor in factors)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_an_offloaded_model_computes_the_same(tmp_path, kind, way):
    model = adapted(kind)
    expected, answer = model(IDS).logits, model.generate(input_ids=IDS, max_new_tokens=5)
    WAYS[way](model, tmp_path)
    assert_nothing_stays(model)
    for _ in range(2):
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(model.generate(input_ids=IDS, max_new_tokens=5), answer)
    assert_nothing_stays(model)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_on_a_base_that_was_offloaded(tmp_path, kind, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where PEFT leaves files
    llama().save_pretrained(tmp_path / "base")
    model = adapted(kind, LlamaForCausalLM.from_pretrained(tmp_path / "base"))
    model.save_pretrained(tmp_path / "adapter")
    where = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu", "model.norm": "cpu"}
    where |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base", device_map=where, offload_folder=tmp_path / "off")
    where = {f"base_model.model.{name}": device for name, device in where.items()}
    if kind == "model":
        where["base_model.model.moe_router"] = "cpu"
    options = {"device_map": where, "offload_dir": str(tmp_path / "off")}
    again = PeftModel.from_pretrained(base, tmp_path / "adapter", **options).eval()
    assert again.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight.is_meta
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    "options", [{"router_type": "fixed"}, {"router_hidden_size": 5}, {"load_balance_loss_type": "loss_free"}]
)
@pytest.mark.parametrize("name", ["t5", "gpt2"])
def test_routers_of_every_kind(name, options):
    model = mixture_of(name, **options)
    inputs = ARCHITECTURES[name].batch(labels=False)
    expected = model(**inputs).logits
    cpu_offload(model, CPU, offload_buffers=True)
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_several_adapters_and_one_for_each_sample():
    model = mixture_of("llama", experts=True)
    expected = model(IDS).logits
    mixed = model(IDS, adapter_names=["expert_1", "__base__"]).logits
    weights = model.get_routing_weights(torch.ones(1, 2, 32), block=0)
    cpu_offload(model, CPU)
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(IDS, adapter_names=["expert_1", "__base__"]).logits, mixed, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.get_routing_weights(torch.ones(1, 2, 32), block=0), weights)
