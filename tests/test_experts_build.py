"""`moelora build`, and experts taken from other mixtures."""

import json
import shutil

import pytest
import torch
from helpers import ARCHITECTURES, mixture_of
from loras import BATCH, KINDS, plain_output, save_lora
from peft import LoraConfig, PeftModel, XLoraConfig, get_peft_model
from tiny import counting, save_tiny_model, shouting, write_jsonl
from tokenizers import Regex, normalizers
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from moelora import MoELoraConfig
from moelora.cli import build as building
from moelora.cli.commands import main
from moelora.experts import LoraError, build, experts_of, from_lora


@pytest.fixture
def loras(tmp_path):
    """Two LoRAs on a base model on disk, as --expert arguments."""
    base = save_tiny_model(tmp_path / "base")
    folders = {
        name: save_lora(tmp_path / name, i, AutoModelForCausalLM.from_pretrained(base), **KINDS[kind])
        for i, (name, kind) in enumerate((("count", "plain"), ("shout", "rslora")))
    }
    write_jsonl(tmp_path / "count.jsonl", counting(40))
    write_jsonl(tmp_path / "shout.jsonl", shouting(40))
    return base, [f"--expert={name}={folder}" for name, folder in folders.items()]


@torch.no_grad()
def logits(model, **options):
    return model(input_ids=BATCH, **options).logits


@pytest.mark.parametrize("router", ["arrow", "uniform", "prototype", "train"])
def test_a_mixture_is_built_from_loras_alone(tmp_path, loras, router, capsys):
    base, experts = loras
    pairs = [f"count={tmp_path / 'count.jsonl'}", f"shout={tmp_path / 'shout.jsonl'}"]
    more = {
        "prototype": [f"--examples={pair}" for pair in pairs],
        "train": [*(f"--data={pair}" for pair in pairs), "--steps", "3"],
    }.get(router, [])
    assert main(["build", *experts, "--router", router, *more, "--out", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    assert "count" in text and "rslora" in text and "Written" in text
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "out")).eval()
    for expert, name in enumerate(("count", "shout")):
        expected = plain_output(tmp_path / name, AutoModelForCausalLM.from_pretrained(base))
        weights = torch.eye(2)[[expert]].expand(3, 2)
        assert torch.equal(logits(model, routing_weights=weights), expected), name
    record = json.loads((tmp_path / "out" / "operation.json").read_text())
    assert record["operation"] == "build" and record["base"]["name"] == str(base)
    assert len(record["inputs"]) == 2 and all(record["inputs"].values())
    if router == "train":
        assert record["outcome"]["count"].keys() == {"loss_before", "loss_after"}
        assert torch.equal(model.expert_maturity, torch.ones(2))
        assert {config.maturity_tokens for config in model.peft_config.values()} == {MoELoraConfig.maturity_tokens}
        routers = [p for name, p in model.named_parameters() if "lora_router" in name]
        assert routers and all(p.abs().max() > 0 for p in routers)


def test_a_mixture_whose_router_diverged_is_not_written(tmp_path, loras, capsys):
    texts = ["--router", "train", f"--data=count={tmp_path / 'count.jsonl'}", "--steps", "3", "--learning-rate", "1e38"]
    assert main(["build", *loras[1], *texts, "--out", str(tmp_path / "out")]) == 2
    assert "training diverged" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_dry_run_says_what_would_be_built(tmp_path, loras, capsys):
    _, experts = loras
    assert main(["build", *experts, "--out", str(tmp_path / "out"), "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "A mixture of 2 LoRAs" in text and "Router: arrow, one for each linear; 2 of 2 experts" in text
    assert not (tmp_path / "out").exists()


def test_build_tells_every_mistake(tmp_path, loras, capsys):
    _, experts = loras
    out = ["--out", str(tmp_path / "out")]
    other = save_tiny_model(tmp_path / "other", hidden_size=16)
    for arguments, messages in (
        ([], ["give the LoRAs: --expert NAME=PATH"]),
        ([*experts, "--top-k", "3"], ["there are only 2 experts"]),
        ([*experts, "--top-k", "0", "--temperature", "0"], ["--top-k = 0", "--temperature = 0.0"]),
        ([*experts, experts[0]], ["two experts are named 'count'"]),
        (["--expert", "alone"], ["must be NAME=PATH"]),
        (["--expert", f"x={tmp_path}"], ["no readable adapter_config.json"]),
        ([*experts, "--router", "sage"], ["must be one of arrow"]),
        ([*experts, "--router", "prototype"], ["--examples", "--router prototype needs it"]),
        ([*experts, "--router", "train"], ["--data", "--router train needs it"]),
        ([*experts, "--data", f"x={tmp_path / 'count.jsonl'}"], ["nothing else does"]),
        (
            [*experts, "--router", "prototype", "--examples", f"count={tmp_path / 'count.jsonl'}"],
            ["give texts for every expert"],
        ),
        ([*experts, "--base", str(other)], ["was not trained on this model", "is 32 to"]),
        ([*experts, "--base", str(tmp_path / "gone")], ["no base model"]),
    ):
        assert main(["build", *arguments, *out]) == 2, arguments
        error = capsys.readouterr().err
        assert all(message in error for message in messages), error
        assert not (tmp_path / "out").exists()
    read = experts[0].rpartition("=")[2]
    assert main(["build", *experts, "--out", read, "--overwrite"]) == 2
    assert f"is {read}, which is only read" in capsys.readouterr().err
    (tmp_path / "texts").mkdir()
    text = write_jsonl(tmp_path / "texts" / "one.jsonl", [{"text": "one"}])
    for texts in (["train", f"--data=x={text}"], ["prototype", f"--examples=count={text}", f"--examples=shout={text}"]):
        folder = ["--out", str(tmp_path / "texts"), "--overwrite"]
        assert main(["build", *experts, "--router", *texts, *folder]) == 2
        assert f"holds {text}, which is only read" in capsys.readouterr().err
    moved = save_lora(tmp_path / "elsewhere", 0, ARCHITECTURES["llama"].build(), **KINDS["plain"])
    assert main(["build", *experts, "--expert", f"x={moved}", *out]) == 2
    assert "note different base models" in capsys.readouterr().err
    assert main(["build", "--expert", f"x={moved}", *out]) == 2
    assert "the LoRAs note no base model" in capsys.readouterr().err


def save_lora_on_the_head(folder, base):
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["lm_head", "q_proj"], task_type="CAUSAL_LM"))
    model.save_pretrained(str(folder), save_embedding_layers=False)  # True adds the base model's own head
    return folder


def test_a_lora_outside_every_block_has_a_router_of_its_own(tmp_path):
    """In a mixture that routes by block; alone it is still the LoRA, bit for bit."""
    base = ARCHITECTURES["llama"].build()
    folder = save_lora_on_the_head(tmp_path / "head", base)
    inputs = ARCHITECTURES["llama"].batch(labels=False)
    expected = PeftModel.from_pretrained(ARCHITECTURES["llama"].build(), folder).eval()(**inputs).logits
    model = mixture_of("llama")
    from_lora(model, folder, "head")
    assert model.peft_config["head"].own_routers == ["lm_head"]
    model.set_adapter("head")
    assert torch.equal(model.eval()(**inputs).logits, expected)


def test_example_texts_without_a_token_are_refused_before_the_model_is_loaded(tmp_path, loras, monkeypatch, capsys):
    base, experts = loras
    mute = AutoTokenizer.from_pretrained(base)
    mute.eos_token = None
    mute.backend_tokenizer.normalizer = normalizers.Replace(Regex("."), "")  # it knows none of these characters
    monkeypatch.setattr(building, "load_tokenizer", lambda _: mute)
    monkeypatch.setattr(building, "load_model", None)
    texts = [f"--examples={name}={tmp_path / name}.jsonl" for name in ("count", "shout")]
    assert main(["build", *experts, "--router", "prototype", *texts, "--out", str(tmp_path / "out")]) == 2
    assert "the texts of 'count' hold no token" in capsys.readouterr().err


# ---- X-LoRA ----------------------------------------------------------------------------------------------------------


def save_xlora(folder, **options):
    parts = {str(i): save_lora(folder / f"part{i}", i, **KINDS["plain"]) for i in range(2)}
    base = ARCHITECTURES["llama"].build()
    base.config.use_cache = False
    adapters = {name: str(path) for name, path in parts.items()}
    config = XLoraConfig(task_type="CAUSAL_LM", hidden_size=32, xlora_depth=1, adapters=adapters, **options)
    get_peft_model(base, config).save_pretrained(str(folder / "x"))
    return folder / "x", parts


def test_experts_of_an_xlora_carry_over_and_its_classifier_does_not(tmp_path):
    folder, parts = save_xlora(tmp_path)
    found = experts_of(folder)
    assert list(found.experts) == ["expert_0", "expert_1"]
    assert "internal_xlora_classifier" in found.lost[0]
    model = build(ARCHITECTURES["llama"].build(), found.experts, "uniform")
    for name, part in parts.items():
        model.set_adapter(f"expert_{name}")
        assert torch.equal(logits(model), plain_output(part))


def test_an_xlora_whose_trained_experts_peft_lost_is_refused(tmp_path):
    """PEFT 0.21 writes base weights and half the layers into the experts' folders."""
    folder, _ = save_xlora(tmp_path, use_trainable_adapters=True)
    with pytest.raises(LoraError, match="no expert of the X-LoRA is whole"):
        experts_of(folder)


def test_an_xlora_that_brings_its_experts_along_is_read(tmp_path):
    folder, parts = save_xlora(tmp_path)
    for name, part in parts.items():
        shutil.rmtree(folder / name)
        part.rename(folder / name)
    assert [lora.source for lora in experts_of(folder).experts.values()] == [str(folder / "0"), str(folder / "1")]


def test_an_xlora_that_scales_its_experts_is_refused(tmp_path):
    folder, _ = save_xlora(tmp_path, global_scaling_weight=2.0)
    with pytest.raises(LoraError, match="`global_scaling_weight`"):
        experts_of(folder)


# ---- MixLoRA ---------------------------------------------------------------------------------------------------------

ATTENTION, FFN = ("q_proj", "v_proj"), ("gate_proj", "up_proj", "down_proj")
FFN_RANK, RANK, ALPHA = 3, 2, 5


def save_mixlora(folder, base, old_names=False, **options):
    """Written as TUDB-Labs/MixLoRA writes it, today or before its keys were renamed."""
    generator = torch.Generator().manual_seed(5)
    tensors = {}

    def add(key, linear, rank):
        tensors[f"{key}.lora_A.weight"] = torch.randn(rank, linear.in_features, generator=generator) * 0.3
        tensors[f"{key}.lora_B.weight"] = torch.randn(linear.out_features, rank, generator=generator) * 0.3

    for n, layer in enumerate(base.model.layers):
        prefix = f"mixlora.layers.{n}"
        gate = "gate" if old_names else "mlp.moe_gate"
        tensors[f"{prefix}.{gate}.weight"] = torch.randn(2, 32, generator=generator)
        for name in ATTENTION:
            add(f"{prefix}.self_attn.{name}", getattr(layer.self_attn, name), RANK)
        for expert in range(2):
            for name in FFN:
                old = {"gate_proj": "w1_proj", "up_proj": "w3_proj", "down_proj": "w2_proj"}[name]
                key = f"experts.{expert}.{old}" if old_names else f"mlp.{name}.experts.{expert}"
                add(f"{prefix}.{key}", getattr(layer.mlp, name), FFN_RANK)
    settings = {
        "bias": "none",
        "peft_type": "MIXLORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "none",
        "r": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.05,
        "target_modules": [*ATTENTION, *FFN],
        "expert_lora": {"r": FFN_RANK, "lora_alpha": ALPHA, "lora_dropout": 0.05},
        "routing_strategy": "mixlora",
        "num_experts": 2,
        "act_fn": "silu",
        "top_k": 2,
    }
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(settings | options))
    torch.save(tensors, folder / "adapter_model.bin")
    return tensors


class OneExpertFFN(nn.Module):
    """MixLoRA's FFN when every token goes to one expert (its routing weight is then 1)."""

    def __init__(self, mlp, tensors, layer, expert):
        super().__init__()
        self.mlp, self.tensors, self.prefix, self.expert = mlp, tensors, f"mixlora.layers.{layer}.mlp", expert

    def part(self, name, x):
        A, B = (self.tensors[f"{self.prefix}.{name}.experts.{self.expert}.lora_{s}.weight"] for s in "AB")
        return getattr(self.mlp, name)(x) + x @ A.T @ B.T * (ALPHA / FFN_RANK)

    def forward(self, x):
        return self.part("down_proj", nn.functional.silu(self.part("gate_proj", x)) * self.part("up_proj", x))


@pytest.mark.parametrize("old_names", [False, True], ids=["names of today", "old names"])
def test_each_mixlora_expert_by_itself_carries_over(tmp_path, old_names):
    base = ARCHITECTURES["llama"].build()
    tensors = save_mixlora(tmp_path / "mix", base, old_names)
    if old_names:
        tensors = save_mixlora(tmp_path / "today", base)  # the same numbers
    found = experts_of(tmp_path / "mix")
    assert list(found.experts) == ["expert_0", "expert_1"] and found.activation == "silu"
    assert "moe_gate" in found.lost[0] and "before the activation" in found.lost[1]
    model = build(ARCHITECTURES["llama"].build(), found.experts, "uniform")
    outputs = []
    for expert in range(2):
        reference = ARCHITECTURES["llama"].build()
        for n, layer in enumerate(reference.model.layers):
            layer.mlp = OneExpertFFN(layer.mlp, tensors, n, expert)
            for name in ATTENTION:
                A, B = (tensors[f"mixlora.layers.{n}.self_attn.{name}.lora_{s}.weight"] for s in "AB")
                getattr(layer.self_attn, name).weight.data += B @ A * (ALPHA / RANK)
        model.set_adapter(f"expert_{expert}")
        outputs.append(logits(model))
        torch.testing.assert_close(outputs[-1], logits(reference), rtol=1e-4, atol=1e-4)
    assert (outputs[0] - outputs[1]).abs().max() > 0.1


def test_what_of_a_mixlora_means_something_else_is_refused(tmp_path):
    base = ARCHITECTURES["llama"].build()
    save_mixlora(tmp_path / "act", base, act_fn="gelu_new")
    with pytest.raises(LoraError, match=r"activation `act_fn` \('gelu_new'\), the base model's 'silu'"):
        experts_of(tmp_path / "act").check_base(base.config)
    save_mixlora(tmp_path / "dora", base, use_dora=True)
    with pytest.raises(LoraError, match="`use_dora`"):
        experts_of(tmp_path / "dora")
    save_mixlora(tmp_path / "few", base, num_experts=1)
    with pytest.raises(LoraError, match="no place in a MixLoRA of 1 experts"):
        experts_of(tmp_path / "few")
    save_mixlora(tmp_path / "rs", base, expert_lora={"use_rslora": True})
    with pytest.raises(LoraError, match="`use_rslora` differs"):
        experts_of(tmp_path / "rs")
    save_lora(tmp_path / "plain", **KINDS["plain"])
    with pytest.raises(LoraError, match="neither 'XLORA' nor 'MIXLORA'"):
        experts_of(tmp_path / "plain")


def test_migrate_from_the_command_line_says_what_is_lost(tmp_path, capsys):
    base = save_tiny_model(tmp_path / "base")
    save_mixlora(tmp_path / "mix", AutoModelForCausalLM.from_pretrained(base))
    arguments = ["--migrate", str(tmp_path / "mix"), "--base", str(base), "--out", str(tmp_path / "out")]
    assert main(["build", *arguments]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Does not carry over: the routers (moe_gate)" in text
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "out"))
    assert model.active_adapters == ["expert_0", "expert_1"]
