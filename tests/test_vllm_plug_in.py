"""The plug-in for vLLM as far as it does without vLLM; the rest is in tests/serving."""

import json
import os
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from helpers import mixture_of
from test_served_mixture import MODELS
from torch import nn

from moelora.ops.slot_tables import SlotTables
from moelora.serving.mixture import ServedMixture, read_served_mixture
from moelora.serving.vllm.blocks import BlockInput, adapted_blocks
from moelora.serving.vllm.contract import is_known, least_rank
from moelora.serving.vllm.fit import check_base, check_targets
from moelora.serving.vllm.refusal import is_mixture, refusal, refusing_manager
from moelora.serving.vllm.tables import BlockTables


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.experts = nn.ModuleList([nn.ModuleDict({"up": nn.Linear(4, 4)})])

    def forward(self, positions, hidden_states, residual=None):
        return hidden_states


def test_blocks_are_the_outermost_that_hold_an_adapted_linear():
    model = nn.ModuleDict({"layers": nn.ModuleList([Block(), Block(), nn.Identity()]), "head": nn.Linear(4, 4)})
    linears = ["layers.0.linear", "layers.1.experts.0.up", "head"]
    assert list(adapted_blocks(model, linears)) == ["layers.0", "layers.1"]
    assert list(adapted_blocks(model, linears[:1])) == ["layers.0"]


@pytest.mark.parametrize("is_split", [True, False])
def test_what_enters_a_block_is_found_by_place_and_by_name(is_split):
    hidden, residual = torch.zeros(1, 3, 4), torch.ones(3, 4)
    find = BlockInput.of(Block(), is_split).find
    for args, kwargs in (((0, hidden, residual), {}), ((0, hidden), {"residual": residual})):
        first, second = find(args, kwargs)
        assert first.shape == (3, 4)
        assert second is (residual if is_split else None)
    first, second = find((0,), {"hidden_states": residual})
    assert first is residual
    assert second is None


def test_a_block_of_another_version_is_refused():
    with pytest.raises(ValueError, match="has no such arguments among input"):
        BlockInput.of(nn.Identity(), False)


def manager_of(applied, blocks=("model.layers.0", "model.layers.1"), pipeline=1, packed=None):
    """What of vLLM's manager says which linears get a LoRA, and in which blocks."""
    parallel = SimpleNamespace(pipeline_parallel_size=pipeline)
    routing = SimpleNamespace(blocks=list(blocks), config=SimpleNamespace(parallel_config=parallel))
    return SimpleNamespace(modules=dict.fromkeys(applied), packed_modules=packed or {}, routing=routing)


def served_with(*linears, scope="block", routers=("model.layers.0",)):
    factors = {name: (torch.zeros(4, 3), torch.zeros(5, 4)) for name in linears}
    return ServedMixture(2, 2, scope, factors, dict.fromkeys(routers), {})


UP, GATE, LATER = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.gate_proj", "model.layers.7.mlp.up_proj"


@pytest.mark.parametrize(
    ("served", "manager"),
    [
        (served_with(UP), manager_of([UP])),
        (
            served_with(UP, GATE),
            manager_of(["model.layers.0.mlp.gate_up_proj"], packed={"model.layers.0.mlp.gate_up_proj": [GATE, UP]}),
        ),
        (served_with(UP, LATER), manager_of([UP], pipeline=2)),  # in the blocks of another worker
        (served_with("connector", scope="module"), manager_of(["connector"])),
        (served_with("lm_head", routers=()), manager_of(["lm_head"])),
    ],
)
def test_linears_that_have_their_lora_layer(served, manager):
    check_targets(served, manager, str)


@pytest.mark.parametrize(
    ("served", "manager", "message"),
    [
        (served_with(UP, GATE), manager_of([UP]), "no LoRA layer for `.*gate_proj`; serve with .* include `gate_proj`"),
        (served_with(UP, LATER), manager_of([UP]), "no LoRA layer for `model.layers.7"),
        (served_with(UP, GATE), manager_of([UP], pipeline=2), "no LoRA layer for `.*gate_proj`"),
        (served_with("lm_head", scope="module"), manager_of(["lm_head"]), "`lm_head` is computed where nothing weighs"),
        (served_with("connector"), manager_of(["connector"]), "`connector` is in no block, where nothing routes"),
    ],
)
def test_linears_that_would_be_passed_over_are_refused(served, manager, message):
    with pytest.raises(ValueError, match=message):
        check_targets(served, manager, str)


def test_a_base_of_other_linears_is_refused():
    base = nn.ModuleDict({"up": nn.Linear(3, 5), "down": nn.Linear(3, 7)})
    check_base(served_with("up"), base, "models/base")
    for linears, message in (
        (["up", "down"], "`down` is 3 to 7 wide, the adapter's 3 to 5"),
        (["out"], "no linear `out`"),
    ):
        with pytest.raises(ValueError, match=f"not trained on models/base: .*{message}"):
            check_base(served_with(*linears), base, "models/base")


@pytest.mark.parametrize(
    ("version", "known"), [("0.32.0", True), ("0.32", True), ("0.32.1+cpu", True), ("0.320", False), ("0.33.0", False)]
)
def test_versions(version, known):
    assert is_known(version) is known


@pytest.mark.parametrize(("rank", "served"), [(1, 1), (2, 8), (64, 64), (65, 128), (400, 512), (513, None)])
def test_the_least_rank_that_vllm_serves(rank, served):
    assert least_rank(rank) == served


def test_mixtures_are_told_from_plain_loras(tmp_path):
    assert not is_mixture(str(tmp_path))
    file = tmp_path / "adapter_config.json"
    for config, expected in (
        ({"peft_type": "LORA"}, False),
        ({"peft_type": "MOELORA"}, True),
        ({"peft_type": "MOELORA", "use_moe_routing": False}, False),
    ):
        file.write_text(json.dumps(config))
        assert is_mixture(str(tmp_path)) is expected
    for text in ("{", "[]"):
        file.write_text(text)
        with pytest.raises(ValueError, match=r"adapter_config.json.*restore it from a copy"):
            is_mixture(str(tmp_path))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes")
def test_a_pipe_in_place_of_a_configuration_does_not_hold_up_the_engine(tmp_path):
    """A client names the folder: what never ends would stop the server for all."""
    os.mkfifo(tmp_path / "adapter_config.json")
    with pytest.raises(ValueError, match=r"adapter_config.json.*no regular file"):
        is_mixture(str(tmp_path))


def test_another_version_of_vllm_refuses_mixtures_and_takes_plain_loras(tmp_path, monkeypatch, caplog):
    class Stock:
        def _load_adapter(self, request):
            return "a plain LoRA"

    vllm, runner = ModuleType("vllm"), ModuleType("vllm.v1.worker.lora_model_runner_mixin")
    vllm.__version__, runner.LRUCacheWorkerLoRAManager = "0.45.0", Stock
    worker = ModuleType("vllm.v1.worker")
    worker.lora_model_runner_mixin = runner
    for name, module in {"vllm": vllm, "vllm.v1": ModuleType("vllm.v1"), "vllm.v1.worker": worker}.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, runner.__name__, runner)

    from moelora.serving.vllm import register

    register()
    register()
    assert "this is 0.45.0" in caplog.text
    manager = runner.LRUCacheWorkerLoRAManager()
    assert manager.takes_mixtures is False
    request = type("Request", (), {"lora_path": str(tmp_path), "lora_name": "mix"})
    assert manager._load_adapter(request) == "a plain LoRA"
    mixture_of("llama").save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match=r"'mix' is a mixture of LoRA experts: .*pip install 'vllm==0.32"):
        manager._load_adapter(request)


def test_the_refusing_manager_is_of_the_stock_class():
    class Stock:
        pass

    assert issubclass(refusing_manager(Stock, refusal("0.1")), Stock)


# ---- what CUDA graphs route ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "rows", "message"),
    [
        ("sparse", 8, None),
        ("two layers", 12, None),
        ("two layers", 8, "its routers have 12 hidden units, and CUDA graphs keep --max-lora-rank of them"),
        ("in other blocks", 16, "its adapters are in different blocks, which is not routed in CUDA graphs"),
        ("per model", 16, 'router_scope="model" is not routed in CUDA graphs'),
        ("domains", 16, "its domain classifier does not run in CUDA graphs"),
        ("sigmoid", 16, 'router_type="sigmoid", or its biases, have no kernel'),
    ],
)
def test_what_the_kernels_cannot_route_is_named(kind, rows, message, tmp_path):
    MODELS[kind]().save_pretrained(str(tmp_path))
    tables = SlotTables.empty(num_blocks=2, num_slots=1, rows=rows, hidden_size=32, max_rank=32)
    assert BlockTables(tables, None).refusal(read_served_mixture(tmp_path)) == message
