"""`moelora inspect` reads an adapter's two files and nothing else."""

import json

import pytest
import torch
from helpers import mixture_of, routers_of
from test_domain_classifier import mixture_of_domains

from moelora.cli.commands import main
from moelora.cli.inspect import inspect_adapter
from moelora.training import UserError


def saved(tmp_path, **options):
    model = mixture_of("llama", **options)
    with torch.no_grad():
        for index, router in enumerate(routers_of(model).values()):
            for number, adapter in enumerate(router.lora_router.values()):
                adapter.maturity.fill_(min(0.25 * (index + 1), 1.0))
                adapter.tokens_per_expert.copy_(torch.arange(adapter.num_experts) + 10 * number + 1)
    model.save_pretrained(tmp_path / "adapter")
    return model, tmp_path / "adapter"


@pytest.mark.parametrize("options", [{}, {"experts": True}], ids=["whole", "single"])
def test_it_says_what_the_model_says(tmp_path, options):
    model, folder = saved(tmp_path, **options)
    found = inspect_adapter(folder)
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    assert len(found.experts) == 4
    assert [adapter.num_experts for adapter in found.adapters] == ([1] * 4 if options else [4])
    assert [adapter.position for adapter in found.adapters] == (list(range(4)) if options else [0])
    trainable = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    assert sum(adapter.num_parameters for adapter in found.adapters) == trainable
    assert [router.router for router in found.routers] == list(routers_of(model))
    assert found.routers[1].maturity == pytest.approx([0.5] * 4)
    assert [expert.maturity for expert in found.experts] == pytest.approx([0.375] * 4)
    assert sum(expert.training_share for expert in found.experts) == pytest.approx(1)
    pools = layer.expert_pools()
    assert found.adapters[0].ranks == [pools[0].rank]
    expected = 0.0
    for module in model.modules():
        if hasattr(module, "expert_pools"):
            pool = module.expert_pools()[0]
            expected += (pool.scaling * pool.lora_B[:, : pool.rank] @ pool.lora_A[: pool.rank]).square().sum().item()
    assert found.experts[0].norm == pytest.approx(expected**0.5, rel=1e-5)


@pytest.mark.parametrize("scope", ["model", "module"])
def test_every_scope_has_its_routers(tmp_path, scope):
    model, folder = saved(tmp_path, router_scope=scope)
    found = inspect_adapter(folder)
    assert [router.router for router in found.routers] == [
        name or "model" for name in routers_of(model)
    ] or scope == "module"
    assert {router.router for router in found.routers} == {name or "model" for name in routers_of(model)}
    assert all(len(router.norm) == 4 and min(router.norm) > 0 for router in found.routers)


@pytest.mark.parametrize(("window", "words"), [(64, "by domain (64 tokens)"), (None, "by domain (whole text)")])
def test_it_says_how_much_text_decides_between_adapters(tmp_path, capsys, monkeypatch, window, words):
    monkeypatch.setenv("COLUMNS", "200")
    mixture_of_domains(domain_window=window).save_pretrained(tmp_path)
    assert {adapter.domain_window for adapter in inspect_adapter(tmp_path).adapters} == {window}
    assert main(["inspect", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count(words) == 2


def test_without_domain_statistics_it_says_nothing_of_them(tmp_path, capsys):
    _, folder = saved(tmp_path)
    assert not inspect_adapter(folder).adapters[0].knows_domain
    assert main(["inspect", str(folder)]) == 0
    assert "domain" not in capsys.readouterr().out.replace(str(folder), "")


def test_fixed_routers_have_no_sharpness(tmp_path):
    _, folder = saved(tmp_path, router_type="fixed")
    assert {router.sharpness for router in inspect_adapter(folder).routers} == {None}


def test_fresh_experts_are_zero_and_alike_to_none(tmp_path, capsys):
    _, folder = saved(tmp_path, fresh=True)
    assert {expert.norm for expert in inspect_adapter(folder).experts} == {0.0}
    assert main(["inspect", str(folder)]) == 0
    assert "0.000" in capsys.readouterr().out


def test_the_tables_show_everything(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    _, folder = saved(tmp_path)
    assert main(["inspect", str(folder)]) == 0
    printed = capsys.readouterr().out
    for words in ("experts", "parameters", "norm of BA", "effective rank", "Similarity", "maturity", "sharpness",
                  "model.layers.1", "most alike"):  # fmt: skip
        assert words in printed


def test_json_is_the_same_and_strictly_json(tmp_path, capsys):
    _, folder = saved(tmp_path)
    assert main(["inspect", str(folder), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(name))
    assert printed["similarity"][0][0] == pytest.approx(1)
    assert len(printed["routers"]) == 2


def test_it_loads_no_model(tmp_path, monkeypatch):
    _, folder = saved(tmp_path)
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", lambda *_, **__: pytest.fail("a model"))
    assert main(["inspect", str(folder)]) == 0


def test_bad_folders_are_refused_by_name(tmp_path, capsys):
    _, folder = saved(tmp_path)
    assert main(["inspect", str(tmp_path / "gone")]) == 2
    assert "no such folder" in capsys.readouterr().err
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    good = json.loads(config.read_text())
    for content, words in (("{", "not readable as JSON"), ('{"peft_type": "LORA"}', "'LORA', not 'MOELORA'"),
                           (json.dumps(good | {"use_moe_routing": False}), "plain LoRA")):  # fmt: skip
        config.write_text(content)
        with pytest.raises(UserError, match=words):
            inspect_adapter(folder)
    config.write_text(json.dumps(good))
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="damaged or truncated"):
        inspect_adapter(folder)
    weights.unlink()
    with pytest.raises(UserError, match=r"no adapter_model\.safetensors"):
        inspect_adapter(folder)


def test_weights_of_a_diverged_training_are_named(tmp_path):
    model, folder = saved(tmp_path)
    name = next(name for name, _ in model.named_parameters() if "lora_B" in name)
    model.get_parameter(name).data.fill_(torch.nan)
    model.save_pretrained(folder)
    with pytest.raises(UserError, match=r"lora_B.* is not finite: its training diverged"):
        inspect_adapter(folder)
