"""What leaves a mixture is read, and reproduced, by a PEFT that knows nothing of moelora."""

import json
import subprocess
import sys

import pytest
import torch
from helpers import ARCHITECTURES, awaken, mixture_of
from loras import BATCH, plain_output, save_kinds
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny import save_tiny_model
from transformers import AutoModelForCausalLM

from moelora import MoELoraConfig
from moelora.cli.commands import main
from moelora.experts import build, save_lora, to_lora, to_lora_mixture

STOCK = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, ids, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base)
if adapter != "-":
    model = PeftModel.from_pretrained(model, adapter)
with torch.no_grad():
    torch.save(model.eval()(input_ids=torch.load(ids)).logits, out)
assert not [name for name in sys.modules if name.startswith("moelora")]
"""

# Weights and scaling move from the routing to B, and products are summed in another order: a few roundings of float32.
ROUNDING = {"rtol": 2e-5, "atol": 2e-5}


def llama():
    return ARCHITECTURES["llama"].build()


@torch.no_grad()
def logits(model, **options):
    return model(input_ids=BATCH, **options).logits


def stock_logits(tmp_path, base, adapter="-", ids=BATCH):
    """What another process, with PEFT alone, computes."""
    torch.save(ids, tmp_path / "ids.pt")
    arguments = [str(base), str(adapter), str(tmp_path / "ids.pt"), str(tmp_path / "logits.pt")]
    done = subprocess.run([sys.executable, "-c", STOCK, *arguments], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    return torch.load(tmp_path / "logits.pt")


def test_import_and_export_are_inverse(tmp_path):
    folders = save_kinds(tmp_path)
    model = build(llama(), folders)
    for name, folder in folders.items():
        save_lora(to_lora(model, name), tmp_path / "again" / name)
        before = load_file(folder / "adapter_model.safetensors")
        after = load_file(tmp_path / "again" / name / "adapter_model.safetensors")
        assert before.keys() == after.keys()
        assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())
        old, new = (PeftConfig.from_pretrained(str(where)) for where in (folder, tmp_path / "again" / name))
        assert {**old.to_dict(), "peft_version": 0} == {**new.to_dict(), "peft_version": 0}
        assert torch.equal(plain_output(tmp_path / "again" / name), plain_output(folder))


def test_an_expert_of_a_trained_mixture_is_a_plain_lora(tmp_path):
    """use_rslora and patterns, too: the stored rank is that of all experts."""
    model = mixture_of("llama", use_rslora=True, rank_pattern={"q_proj": 3}, alpha_pattern={"up_proj": 5})
    for expert in (0, 3):
        save_lora(to_lora(model, expert), tmp_path / str(expert))
        weights = torch.zeros(3, 4)
        weights[:, expert] = 1
        expected = logits(model, routing_weights=weights)
        torch.testing.assert_close(plain_output(tmp_path / str(expert)), expected, **ROUNDING)
    assert (plain_output(tmp_path / "0") - plain_output(tmp_path / "3")).abs().max() > 0.1


def test_a_lone_experts_routing_scale_is_in_its_alpha(tmp_path):
    model = mixture_of("llama", experts=True, num_experts=2, top_k_experts=1, routing_scale=1.5)
    model.set_adapter("expert_1")
    save_lora(to_lora(model, "expert_1"), tmp_path)
    torch.testing.assert_close(plain_output(tmp_path), logits(model), **ROUNDING)


def test_a_fixed_weight_is_the_mixtures_and_not_the_experts(tmp_path):
    folders = save_kinds(tmp_path, ["plain", "rslora"])
    model = build(llama(), folders, "uniform")
    model.set_routing_weights([0.3, 0.7])
    save_lora(to_lora(model, "rslora"), tmp_path / "expert")
    assert torch.equal(plain_output(tmp_path / "expert"), plain_output(folders["rslora"]))
    save_lora(to_lora_mixture(model), tmp_path / "mixture")
    torch.testing.assert_close(plain_output(tmp_path / "mixture"), logits(model), **ROUNDING)


@pytest.mark.parametrize("kind", ["one adapter", "imports"])
def test_the_mixture_under_fixed_weights_is_one_lora(tmp_path, kind):
    model = mixture_of("llama") if kind == "one adapter" else build(llama(), save_kinds(tmp_path))
    weights = [0.5, 0.125, -0.25, 1.0]
    lora = to_lora_mixture(model, weights)
    save_lora(lora, tmp_path / "out")
    expected = logits(model, routing_weights=torch.tensor([weights]).expand(3, 4))
    torch.testing.assert_close(plain_output(tmp_path / "out"), expected, **ROUNDING)
    if kind == "one adapter":
        assert lora.ranks == [8]


@pytest.mark.parametrize("scope", ["model", "block", "module"])
def test_a_fixed_mixture_exports_as_it_routes(tmp_path, scope):
    base = llama()
    options = {"r": 2, "num_experts": 2, "router_type": "fixed", "router_scope": scope, "routing_scale": 1.5}
    model = get_peft_model(base, MoELoraConfig(target_modules=["q_proj", "up_proj"], **options), adapter_name="x")
    model.add_adapter("y", MoELoraConfig(target_modules=r".*\.1\..*down_proj|.*\.1\..*up_proj", **options))
    model.set_adapter(["x", "y"])
    awaken(model.eval())
    save_lora(to_lora_mixture(model), tmp_path / "even")
    torch.testing.assert_close(plain_output(tmp_path / "even"), logits(model), **ROUNDING)
    model.set_routing_weights([0.1, 0.2, 0.3, 0.4])
    save_lora(to_lora_mixture(model), tmp_path / "set")
    torch.testing.assert_close(plain_output(tmp_path / "set"), logits(model), **ROUNDING)


def test_what_is_no_single_lora_is_refused():
    model = mixture_of("llama")
    with pytest.raises(ValueError, match="weighs experts differently for each token"):
        to_lora_mixture(model)
    with pytest.raises(ValueError, match="4 finite numbers"):
        to_lora_mixture(model, [1.0])
    for expert, message in ((4, "from 0 to 3"), ("default", "holds 4 experts.*: 0 to 3"), ("gone", "no expert 'gone'")):
        with pytest.raises(ValueError, match=message):
            to_lora(model, expert)
    with pytest.raises(ValueError, match="holds no mixture"):
        to_lora(mixture_of("llama", use_moe_routing=False), 0)


@pytest.mark.parametrize(
    ("options", "named"), [({"modules_to_save": ["lm_head"]}, "modules_to_save"), ({"bias": "all"}, "bias")]
)
def test_what_an_adapter_trained_beside_its_experts_is_not_lost_silently(options, named):
    model = mixture_of("llama", **options)
    for export in (lambda: to_lora(model, 0), lambda: to_lora_mixture(model, [0.25] * 4)):
        with pytest.raises(ValueError, match=f"`{named}` .* is no part of its experts' factors"):
            export()


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(tmp_path):
    """A base model and a mixture on it, as files; and the mixture in memory."""
    base = save_tiny_model(tmp_path / "base")
    config = MoELoraConfig(
        r=2, lora_alpha=3, num_experts=3, top_k_experts=2, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    awaken(model.eval())
    model.save_pretrained(str(tmp_path / "adapter"))
    return base, tmp_path / "adapter", model


def test_stock_peft_reproduces_an_exported_expert(tmp_path, trained, capsys):
    base, adapter, model = trained
    assert main(["export", str(adapter), "--expert", "1", "--out", str(tmp_path / "out")]) == 0
    assert "Expert 1" in capsys.readouterr().out
    expected = logits(model, routing_weights=torch.tensor([[0.0, 1.0, 0.0]]).expand(3, 3))
    torch.testing.assert_close(stock_logits(tmp_path, base, tmp_path / "out"), expected, **ROUNDING)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)


@pytest.mark.slow
def test_stock_transformers_reads_a_merged_mixture(tmp_path, trained):
    _, adapter, model = trained
    weights = "0.5,0.25,0.25"
    assert (
        main(["export", str(adapter), "--mixture", "--weights", weights, "--merge", "--out", str(tmp_path / "m")]) == 0
    )
    expected = logits(model, routing_weights=torch.tensor([[0.5, 0.25, 0.25]]).expand(3, 3))
    torch.testing.assert_close(stock_logits(tmp_path, tmp_path / "m"), expected, rtol=1e-4, atol=1e-4)
    assert (tmp_path / "m" / "tokenizer.json").is_file()
    assert not (tmp_path / "m" / "adapter_config.json").exists()


def test_export_tells_every_mistake(tmp_path, trained, capsys):
    base, adapter, _ = trained
    out = ["--out", str(tmp_path / "out")]
    for arguments, message in (
        ([], "give one of --expert with a number or a name, --mixture, and --each"),
        (["--expert", "0", "--mixture"], "--mixture, and --each"),
        (["--expert", "9"], "from 0 to 2"),
        (["--expert", "0", "--weights", "1,0,0"], "goes with --mixture"),
        (["--mixture", "--weights", "1,a"], "must be numbers"),
        (["--mixture", "--weights", "1,0"], "3 finite numbers"),
        (["--mixture"], "weighs experts differently for each token"),
        (["--expert", "0", "--base", str(save_tiny_model(tmp_path / "other", hidden_size=16))], "was not trained on"),
    ):
        assert main(["export", str(adapter), *arguments, *out]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "bitsandbytes"}}))
    assert main(["export", str(adapter), "--expert", "0", "--merge", *out]) == 2
    assert "are quantised" in capsys.readouterr().err


def test_what_an_export_reads_is_not_replaced(trained, capsys):
    base, adapter, _ = trained
    calls = [["--expert", "0", "--out", str(adapter)], ["--expert", "0", "--merge", "--out", str(base)]]
    for arguments in calls:
        assert main(["export", str(adapter), *arguments, "--overwrite"]) == 2
        assert f"is {arguments[-1]}, which is only read" in capsys.readouterr().err
    assert list(adapter.parent.glob("*.backup-*")) == list(base.parent.glob("*.backup-*")) == []


def test_a_dry_run_of_an_export_writes_nothing(tmp_path, trained, capsys):
    _, adapter, _ = trained
    assert main(["export", str(adapter), "--expert", "0", "--out", str(tmp_path / "out"), "--dry-run"]) == 0
    assert "nothing was written" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_an_exported_expert_is_imported_again(tmp_path, trained):
    base, adapter, _ = trained
    for expert in ("0", "2"):
        main(["export", str(adapter), "--expert", expert, "--out", str(tmp_path / expert)])
    experts = [f"--expert=e{n}={tmp_path / n}" for n in ("0", "2")]
    assert main(["build", *experts, "--router", "uniform", "--out", str(tmp_path / "built")]) == 0
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "built")).eval()
    assert model.active_adapters == ["e0", "e2"]
    model.set_adapter("e2")
    alone = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "2")).eval()
    assert torch.equal(logits(model), logits(alone))


def test_a_lora_is_saved_whole_or_not_at_all_and_over_nothing(tmp_path, monkeypatch):
    lora = to_lora(mixture_of("llama"), 0)
    folder = tmp_path / "loras" / "one"
    monkeypatch.setattr(lora.config, "save_pretrained", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_lora(lora, folder)
    assert not list(folder.parent.iterdir())
    monkeypatch.undo()
    folder.mkdir()
    save_lora(lora, folder)
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    before = (folder / "adapter_model.safetensors").read_bytes()
    for taken in (folder, folder / "adapter_config.json"):
        with pytest.raises(FileExistsError, match="give another folder"):
            save_lora(to_lora(mixture_of("llama"), 1), taken)
    assert (folder / "adapter_model.safetensors").read_bytes() == before
