"""`moelora export --each`: a plain LoRA for every adapter of a mixture that grew."""

import json
import subprocess
import sys

import pytest
import torch
from helpers import ARCHITECTURES, awaken, mixture_of
from loras import BATCH, KINDS, plain_output, save_lora
from safetensors.torch import load_file
from test_domain_classifier import HIGH, LOW, texts

from moelora.cli.commands import main
from moelora.experts import grow, learn_domain, mixture_from_lora, to_loras
from moelora.experts.remembered import drawn_inputs, products, remembered_weights
from moelora.storage.mixture_files import read_mixture


def grown(folder, router_scale=0.5, **shared):
    """A LoRA that knows low tokens, and three experts for high ones."""
    lora = save_lora(folder / "lora", **KINDS["plain"])
    shared = {"router_type": "learned", "top_k_experts": 3, "routing_scale": 2.0} | shared
    model = mixture_from_lora(ARCHITECTURES["llama"].build(), lora, **shared)
    learn_domain(model, "default", [texts(LOW, rows=32)])
    name = grow(model, 3, r=2, lora_alpha=4)
    before = {key: value.clone() for key, value in model.state_dict().items() if "default" in key}
    awaken(model)
    model.load_state_dict(before, strict=False)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_router" in key and name in key.split("."):
                parameter.mul_(router_scale)
    learn_domain(model, name, [texts(HIGH, rows=32)])
    return model.eval()


@torch.no_grad()
def logits(model, names, ids=BATCH):
    model.set_adapter(names)
    return model(input_ids=ids).logits


def save_each(model, folder, capsys):
    model.set_adapter(["default", "grown_1"])
    model.save_pretrained(folder / "mixture")
    assert main(["export", str(folder / "mixture"), "--each", "--out", str(folder / "each")]) == 0
    return capsys.readouterr().out


def test_one_expert_comes_back_as_it_was_and_several_at_equal_weights_too(tmp_path, capsys):
    model = grown(tmp_path, router_scale=0.0)  # scores of zero: weights are equal whatever is read
    said = save_each(model, tmp_path, capsys)
    assert "nothing: exact" in said
    for name, tensor in load_file(tmp_path / "lora" / "adapter_model.safetensors").items():
        assert torch.equal(load_file(tmp_path / "each" / "default" / "adapter_model.safetensors")[name], tensor)
    for name in ("default", "grown_1"):
        exported = plain_output(tmp_path / "each" / name)
        torch.testing.assert_close(exported, logits(model, [name]), rtol=2e-4, atol=2e-4)
    left_out = json.loads((tmp_path / "each" / "operation.json").read_text())["outcome"]["left_out"]
    assert left_out["default"] == 0 and left_out["grown_1"] < 1e-9


def test_what_routing_makes_inexact_is_told(tmp_path, capsys):
    model = grown(tmp_path)
    said = save_each(model, tmp_path, capsys)
    error = json.loads((tmp_path / "each" / "operation.json").read_text())["outcome"]["left_out"]["grown_1"]
    assert 0 < error < 1 and f"{error:.2%}" in said and "estimated from domain statistics" in said
    ids = texts(HIGH, seed=9)["input_ids"]
    ours = logits(model, ["grown_1"], ids)
    plain = plain_output(tmp_path / "each" / "grown_1", inputs=ids)
    with torch.no_grad():
        base = ARCHITECTURES["llama"].build()(input_ids=ids).logits
    assert (plain - ours).norm() < 0.5 * (base - ours).norm()
    assert to_loras(read_mixture(tmp_path / "mixture"))["grown_1"].error == pytest.approx(error)


def test_peft_alone_loads_them(tmp_path, capsys):
    save_each(grown(tmp_path), tmp_path, capsys)
    code = (
        "import sys; from peft import PeftConfig; c = PeftConfig.from_pretrained(sys.argv[1]);"
        "assert c.peft_type == 'LORA' and 'moelora' not in sys.modules; print(c.r)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "each/grown_1")], capture_output=True, text=True)
    assert done.stdout.strip() == "6", done.stderr


def test_without_domain_statistics_the_error_is_unknown(tmp_path, capsys):
    mixture_of("llama").save_pretrained(tmp_path / "mixture")
    assert main(["export", str(tmp_path / "mixture"), "--each", "--out", str(tmp_path / "each"), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "unknown" in said and "nothing tells the error" in said and not (tmp_path / "each").exists()


@pytest.mark.parametrize("more", [["--expert", "0"], ["--mixture"], ["--merge"]])
def test_it_goes_alone(tmp_path, capsys, more):
    mixture_of("llama").save_pretrained(tmp_path / "mixture")
    assert main(["export", str(tmp_path / "mixture"), "--each", *more, "--out", str(tmp_path / "each")]) == 2
    assert "--each" in capsys.readouterr().err


def test_what_is_remembered_is_what_was_read(tmp_path):
    model = grown(tmp_path)
    model.save_pretrained(tmp_path / "mixture")
    adapter = read_mixture(tmp_path / "mixture")[1]
    name, router = next((name, adapter.router(name)) for name in adapter.routers)
    drawn = drawn_inputs(router.domain, 4000)
    torch.testing.assert_close(drawn.mean(0), router.domain.mean, rtol=0, atol=0.1)
    torch.testing.assert_close(drawn.t().cov(correction=0), router.domain.covariance(), rtol=0, atol=0.2)
    weights = remembered_weights(adapter)[name]
    torch.testing.assert_close(weights.sum(-1), torch.full((len(weights),), 2.0, dtype=torch.float64))
    pool = next(iter(adapter.pools.values()))
    halves = zip(pool.lora_A.split(2), pool.lora_B.split(2, dim=1), strict=True)
    exact = torch.stack([pool.scaling * (B @ A).flatten() for A, B in halves]).double()
    torch.testing.assert_close(products(pool), exact @ exact.t(), rtol=1e-5, atol=1e-6)
