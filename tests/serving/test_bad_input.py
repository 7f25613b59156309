"""What cannot be served is refused in one clear line, and the engine goes on for the others."""

import itertools
import json
import shutil

import pytest
import torch
from adapters import Workshop, mixture
from bases import save_base
from harness import BASE, Bench, assert_greedy, for_all, prompts
from safetensors.torch import load_file, save_file
from vllm.lora.request import LoRARequest

NUMBERS = itertools.count(900)
"""Of adapters that are refused: each its own, for an engine takes one number as one adapter."""
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture
def engine(llama):
    return llama.engine(max_lora_rank=16, max_loras=2)


@pytest.fixture
def copied(llama, tmp_path):
    """A copy of a sound mixture, to be damaged."""
    return shutil.copytree(llama.adapter("sparse"), tmp_path / "damaged")


def too_many_experts(folder, shop):
    mixture(shop, r=8, num_experts=4).save_pretrained(str(folder))
    return [r"\b32\b", r"--max-lora-rank|max_lora_rank"]


def of_another_width(folder, shop):
    other = save_base(folder.parent / "wide", hidden_size=96)
    mixture(Workshop(other, shop.linears, folder)).save_pretrained(str(folder))
    return [r"\b96\b|\b64\b"]


def of_more_blocks(folder, shop):
    other = save_base(folder.parent / "deep", num_hidden_layers=5)
    mixture(Workshop(other, shop.linears, folder)).save_pretrained(str(folder))
    return [r"layers\.[34]"]


def cut_short(folder, shop):
    weights = folder / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-100])
    return [WEIGHTS]


def without_weights(folder, shop):
    (folder / WEIGHTS).unlink()
    return [WEIGHTS]


def configuration_that_is_no_json(folder, shop):
    (folder / CONFIG).write_text('{"peft_type": "MOELORA", "num_experts"')
    return [CONFIG]


def configuration_out_of_range(folder, shop):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"top_k_experts": 9}))
    return ["top_k_experts", r"\b9\b"]


def _changed(folder, find, change):
    tensors = load_file(folder / WEIGHTS)
    name = next(name for name in tensors if find in name)
    tensors[name] = change(tensors[name])
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    # as one who writes such a file would: the checksum is of what is there
    config = json.loads((folder / CONFIG).read_text())
    config.pop("checkpoint", None)
    (folder / CONFIG).write_text(json.dumps(config))
    return name


def nan_in_a_factor(folder, shop):
    _changed(folder, "lora_B", lambda tensor: tensor.index_fill(0, torch.tensor([1]), float("nan")))
    return ["lora_B", "(?i)nan|not finite|finite"]


def nan_in_a_router(folder, shop):
    _changed(folder, "lora_router.weight", lambda tensor: tensor.index_fill(0, torch.tensor([1]), float("nan")))
    return ["lora_router|router", "(?i)nan|not finite|finite"]


def router_of_other_experts(folder, shop):
    _changed(folder, "lora_router.weight", lambda tensor: tensor[:3].clone())
    return ["router", r"\b3\b|\b4\b"]


@pytest.mark.parametrize(
    "damage",
    [
        too_many_experts,
        of_another_width,
        of_more_blocks,
        cut_short,
        without_weights,
        configuration_that_is_no_json,
        configuration_out_of_range,
        nan_in_a_factor,
        nan_in_a_router,
        router_of_other_experts,
    ],
)
def test_is_refused_in_one_line_and_the_others_are_served(llama, engine, copied, damage):
    number = next(NUMBERS)
    expected = damage(copied, Workshop(llama.model, llama.linears, copied.parent))
    with pytest.raises(Exception) as caught:
        engine.llm_engine.add_lora(LoRARequest("damaged", number, str(copied)))
    message = str(caught.value)
    assert len(message.splitlines()) == 1, message
    for part in expected:
        assert caught.match(part)
    assert number not in engine.llm_engine.list_loras()
    requests = for_all([BASE, "sparse", "plain"], prompts((17, 40)))
    outputs = llama.ask(engine, requests)
    llama.assert_same(requests, outputs)
    assert_greedy(llama, requests, outputs)


def test_an_architecture_that_nobody_has_tried_is_refused_by_name(tmp_path):
    bench = Bench(tmp_path, "cohere")
    engine = bench.engine()
    requests = for_all([BASE, "plain"], prompts((17, 40)))
    with pytest.raises(ValueError, match=r"CohereDecoderLayer|CohereForCausalLM|Cohere") as caught:
        engine.llm_engine.add_lora(bench.lora("sparse"))
    assert len(str(caught.value).splitlines()) == 1
    outputs = bench.ask(engine, requests)
    bench.assert_same(requests, outputs)


def test_a_domain_classifier_behind_short_windows_is_refused(tmp_path):
    """The KV cache lets go of what the classifier would read."""
    bench = Bench(tmp_path, "mistral")
    file = bench.model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"sliding_window": 16}))
    engine = bench.engine()
    with pytest.raises(ValueError, match=r"reads 64 tokens back \(`domain_window`\), further than any attention"):
        engine.llm_engine.add_lora(bench.lora("domains"))
    requests = for_all([BASE, "sparse", "domains_whole_text"], prompts((17, 40)))  # a sum goes on from the last token
    bench.assert_same(requests, bench.ask(engine, requests))


def test_a_domain_classifier_beside_a_kv_cache_that_is_sent_elsewhere_is_refused(llama, monkeypatch):
    engine = llama.engine()
    routing = engine.llm_engine.model_executor.driver_worker.worker.model_runner.lora_manager._adapter_manager.routing
    monkeypatch.setattr(routing.config, "kv_transfer_config", object())
    with pytest.raises(ValueError, match="needs what stood beside the KV cache; do without --kv-transfer-config"):
        engine.llm_engine.add_lora(LoRARequest("classified", next(NUMBERS), str(llama.adapter("domains"))))
