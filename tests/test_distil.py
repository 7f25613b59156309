"""A single LoRA in place of a mixture: exact where it can be, and the best of its rank on the data where it cannot."""

import json
import math
import subprocess
import sys

import pytest
import torch
from helpers import VOCAB, assert_clean, mixture_of
from peft import LoraConfig, PeftModel
from test_experts_merging import products
from tiny import DATA, save_tiny_adapter, write_jsonl
from transformers import AutoModelForCausalLM, TrainingArguments

from moelora.cli.commands import main
from moelora.experts.covariance import gather, in_passes, linears_of, readers
from moelora.experts.distil import base_of, closed_form, fit, fresh_lora, lora_of
from moelora.experts.low_rank import truncated_product
from moelora.training.student import train_student


def batches(count=4, length=9, seed=3):
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number in range(count):
        ids = torch.randint(2, VOCAB, (2, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[1, length - number :] = 0
        found.append({"input_ids": ids, "attention_mask": mask})
    return found


def logits_of(model, batch):
    with torch.no_grad():
        return model.eval()(**batch).logits[batch["attention_mask"].bool()]


def recorded(model, data):
    """Every linear's inputs [T, D] and deltas [T, O], padding left out, by the model's own forward."""
    inputs, deltas = {}, {}
    handles = []
    for name, layer in linears_of(model).items():

        def keep(module, args, output, name=name):
            keep_T = mask.flatten().bool()
            inputs.setdefault(name, []).append(args[0].flatten(0, -2)[keep_T].double())
            delta = (output - module.base_layer(args[0])).flatten(0, -2)[keep_T]
            deltas.setdefault(name, []).append(delta.double())

        handles.append(layer.register_forward_hook(keep))
    for batch in data:
        mask = batch["attention_mask"]
        with torch.no_grad():
            model(**batch)
    for handle in handles:
        handle.remove()
    return {name: (torch.cat(inputs[name]), torch.cat(deltas[name])) for name in inputs}


OPTIONS = {
    "block": {},
    "maturity": {"router_type": "learned_with_maturity", "routing_scale": 2.0, "rank_pattern": {"q_proj": 3}},
    "model": {"router_scope": "model", "use_rslora": True},
    "module": {"router_scope": "module"},
    "single": {"experts": True},
}


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_moments_are_those_of_the_tokens(name, options):
    if name != "llama":
        options = {key: value for key, value in options.items() if key != "rank_pattern"}
    model = mixture_of(name, **options)
    expected = recorded(model, batches())
    found = gather(model, batches(), readers(model, batches()[0]))
    assert found.keys() == expected.keys() == linears_of(model).keys()
    for linear, (x, y) in expected.items():
        covariance = found[linear]
        assert covariance.tokens == len(x) == sum(int(batch["attention_mask"].sum()) for batch in batches())
        torch.testing.assert_close(covariance.second, x.T @ x, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(covariance.left @ covariance.cross, y.T @ x, rtol=1e-4, atol=1e-3)
        lora_A, lora_B = truncated_product(covariance.lora_A, covariance.left, 2)
        error = (y - x @ (lora_B @ lora_A).T).square().sum() / y.square().sum()
        assert covariance.error(lora_A, lora_B) == pytest.approx(float(error), rel=1e-4, abs=1e-6)


def test_linears_that_read_one_tensor_share_its_moment():
    model = mixture_of("llama")
    groups = readers(model, batches()[0])
    assert sorted(map(len, groups)) == [1, 1, 1, 1, 2, 2, 3, 3]
    found = gather(model, batches(), groups)
    assert len({id(covariance.second) for covariance in found.values()}) == 8


def test_passes_keep_to_the_memory():
    model = mixture_of("llama")
    groups = readers(model, batches()[0])
    limit = 2 * 8 * 32**2
    passes = in_passes(model, groups, limit)
    assert [group for some in passes for group in some] == groups
    sizes = [sum(8 * linears_of(model)[group[0]].in_features ** 2 for group in some) for some in passes]
    assert len(passes) > 2 and all(size <= limit or len(some) == 1 for size, some in zip(sizes, passes, strict=True))
    whole = closed_form(model, batches, 2)
    small = closed_form(model, batches, 2, memory=1)
    for name, (lora_A, lora_B) in whole.factors.items():
        other_A, other_B = small.factors[name]
        torch.testing.assert_close(other_B @ other_A, lora_B @ lora_A, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    "options", [{}, {"rank_pattern": {"q_proj": 3}, "use_rslora": True}], ids=["plain", "patterns"]
)
def test_constant_weights_are_reproduced(options):
    """All ranks fit into N: the LoRA is the mixture, on texts that it was not fitted to and however few it was."""
    model = mixture_of("llama", router_type="fixed", **options)
    model.set_routing_weights([0.1, 0.2, 0.3, 0.9])
    student = lora_of(model, closed_form(model, lambda: batches(1), rank=12).factors)
    for batch in batches(seed=11):
        torch.testing.assert_close(logits_of(student, batch), logits_of(model, batch), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_no_map_of_its_rank_does_better(rank):
    """Against the truncated mean delta, and against small steps in any direction."""
    model = mixture_of("llama")
    ridge = 1e-6
    for covariance in gather(model, batches(8), readers(model, batches()[0])).values():
        mean = (covariance.lora_A, covariance.left * (covariance.weight / covariance.tokens))
        strength = ridge * float(covariance.second.diagonal().mean())
        energy = ((covariance.left.T @ covariance.left) * covariance.energy).sum()

        def objective(lora_A, lora_B, covariance=covariance, mean=mean, strength=strength, energy=energy):
            away = (lora_B @ lora_A - mean[1] @ mean[0]).square().sum()
            return float(covariance.error(lora_A, lora_B) * energy + strength * away)

        best = fit(covariance, rank, ridge)
        value = objective(*best)
        assert value < objective(*truncated_product(*mean, rank)) * (1 - 1e-6)
        generator = torch.Generator().manual_seed(rank)
        for _ in range(20):
            steps = [1e-3 * torch.randn(each.shape, generator=generator, dtype=torch.float64) for each in best]
            assert value <= objective(best[0] + steps[0], best[1] + steps[1]) * (1 + 1e-9)


def test_the_error_falls_with_the_rank():
    model = mixture_of("llama")
    errors = [sum(closed_form(model, batches, rank).error.values()) for rank in (1, 2, 4, 8)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < errors[0] / 2


def test_the_bases_of_students_share_weights_and_nothing_else():
    model = mixture_of("llama")
    before = logits_of(model, batches()[0])
    base = base_of(model)
    assert_clean(base)
    ours = {parameter.data_ptr() for parameter in model.parameters()}
    assert all(parameter.data_ptr() in ours for parameter in base.parameters())
    student = fresh_lora(model, 2, scaling=2.0)
    assert student.peft_config["default"].lora_alpha == 4
    with model.disable_adapter():
        expected = logits_of(model, batches()[0])
    torch.testing.assert_close(logits_of(student, batches()[0]), expected)
    torch.testing.assert_close(logits_of(model, batches()[0]), before, rtol=0, atol=0)


def test_training_brings_the_student_nearer_to_the_teacher(tmp_path):
    import datasets

    torch.manual_seed(0)
    teacher = mixture_of("llama")
    student = lora_of(teacher, closed_form(teacher, batches, 2).factors)
    rows = torch.randint(2, VOCAB, (16, 9)).tolist()
    blocks = datasets.Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * 9] * 16, "labels": rows})
    arguments = TrainingArguments(output_dir=str(tmp_path), max_steps=30, learning_rate=1e-2, use_cpu=True,
                                  per_device_train_batch_size=8, report_to="none", save_strategy="no")  # fmt: skip

    def distance():
        batch = {"input_ids": torch.tensor(rows), "attention_mask": torch.ones(16, 9, dtype=torch.long)}
        log_p, log_q = logits_of(teacher, batch).log_softmax(-1), logits_of(student, batch).log_softmax(-1)
        return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())

    def collate(rows):
        return {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}

    before, weights = distance(), {name: p.clone() for name, p in teacher.named_parameters()}
    train_student(student, arguments, blocks, collate, teacher)
    assert distance() < 0.7 * before and math.isfinite(distance())
    for name, parameter in teacher.named_parameters():
        assert torch.equal(parameter, weights[name]), name


def test_more_than_factors_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_tiny_adapter(tmp_path, modules_to_save=["lm_head"])
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", lambda *_, **__: pytest.fail("a model"))
    assert main(["distil", "adapter", *DATA, "--out", "lora"]) == 2
    assert "`modules_to_save` (['lm_head']) of adapter 'default'" in capsys.readouterr().err
    assert not (tmp_path / "lora").exists()


def test_the_factors_are_a_mixtures_own_where_there_is_one_expert():
    model = mixture_of("llama", experts=True)
    model.set_adapter("expert_2")
    product = {name: each[0].detach() for name, each in products(model).items()}
    factors = closed_form(model, batches, 2).factors
    assert factors.keys() == product.keys()
    for name, (lora_A, lora_B) in factors.items():
        torch.testing.assert_close(lora_B @ lora_A, product[name], rtol=1e-4, atol=1e-5)


# The command

PROMPT = torch.tensor([[5, 9, 30, 77]])
LOAD_WITHOUT_US = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sys.argv[1]), sys.argv[2]).eval()
torch.save(model(torch.tensor([[5, 9, 30, 77]])).logits.detach(), sys.argv[3])
assert not [name for name in sys.modules if name.startswith("moelora")]
print(type(model.peft_config["default"]).__name__, sum("lora_A" in name for name, _ in model.named_parameters()))
"""


def in_another_process(folder):
    command = [sys.executable, "-c", LOAD_WITHOUT_US, folder / "model", folder / "lora", folder / "logits.pt"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["LoraConfig", "14"]
    return torch.load(folder / "logits.pt")


def in_this_process(folder):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "model"), folder / "lora").eval()
    assert type(model.peft_config["default"]) is LoraConfig
    assert sum("lora_A" in name for name, _ in model.named_parameters()) == 14
    assert not [module for module in model.modules() if type(module).__module__.startswith("moelora")]
    return model(PROMPT).logits.detach()


@pytest.mark.parametrize(
    ("router_type", "stock_logits"),
    [pytest.param("fixed", in_another_process, marks=pytest.mark.slow), ("learned", in_this_process)],
)
def test_a_mixture_becomes_a_plain_lora_that_stock_peft_loads(adapter_folder, capsys, router_type, stock_logits):
    folder = adapter_folder(router_type=router_type)
    assert main(["distil", "adapter", "--r", "8", *DATA, "--out", "lora", "--max-tokens", "300"]) == 0
    printed = capsys.readouterr().out
    outcome = json.loads((folder / "lora" / "operation.json").read_text())["outcome"]
    losses = {row["name"]: row["losses"] for row in outcome["models"]}
    assert list(losses) == ["base model", "mixture", "LoRA, closed form"]
    for row in losses.values():
        assert all(f"{loss:.4f}" in printed for loss in row)
    found = stock_logits(folder)
    mixture = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder / "model"), folder / "adapter"
    ).eval()
    with torch.no_grad():
        expected = mixture(PROMPT).logits
    if router_type == "fixed":  # four experts of rank 2: nothing is lost
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
        assert losses["LoRA, closed form"] == pytest.approx(losses["mixture"], abs=1e-4)
        assert outcome["unexplained"] < 1e-5
    else:
        assert not torch.allclose(found, expected, atol=1e-2)
        assert 0 < outcome["unexplained"] < 1


def test_training_and_a_lora_from_scratch_are_compared(adapter_folder, capsys):
    folder = adapter_folder()
    options = ["--steps", "3", "--compare-scratch", "--max-tokens", "200", "--max-eval-blocks", "2"]
    assert main(["distil", "adapter", "--r", "2", *DATA, "--out", "lora", *options]) == 0
    printed = capsys.readouterr().out
    rows = json.loads((folder / "lora" / "operation.json").read_text())["outcome"]["models"]
    assert [row["name"] for row in rows][2:] == [
        "LoRA, closed form", "LoRA, then 3 steps of KL", "LoRA from scratch, 3 steps"
    ]  # fmt: skip
    assert rows[2]["losses"] != rows[3]["losses"] and rows[3]["seconds"] > rows[2]["seconds"] > 0
    assert "above the mixture" in printed and "seconds to make" in printed
    config = json.loads((folder / "lora" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 2, 2)


def test_a_lora_whose_training_diverged_is_not_written(adapter_folder, capsys):
    folder = adapter_folder()
    options = ["--steps", "3", "--learning-rate", "1e30", "--max-tokens", "200", "--max-eval-blocks", "2"]
    assert main(["distil", "adapter", "--r", "2", *DATA, "--out", "lora", *options]) == 2
    assert "lower --learning-rate (1e+30)" in capsys.readouterr().err
    assert not (folder / "lora").exists()


INSIDE = ["--data", "kept=kept/one.jsonl"]


def test_a_dry_run_and_mistakes_load_no_model(adapter_folder, capsys, monkeypatch):
    folder = adapter_folder()
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", lambda *_, **__: pytest.fail("a model"))
    assert main(["distil", "adapter", *DATA, "--out", "lora", "--dry-run"]) == 0
    printed = capsys.readouterr().out  # 4 experts of rank 2 have no 16
    assert "rank 8 on 14 linears" in printed and "4 experts" in printed and "Dry run" in printed
    cases = {
        ("distil", "adapter", "--out", "o"): "give texts",
        ("distil", "adapter", *DATA, "--out", "adapter", "--r", "2", "--overwrite"): "is adapter, which is only read",
        ("distil", "adapter", *INSIDE, "--out", "kept", "--overwrite"): "one.jsonl, which is only read",
        ("distil", "adapter", *DATA, "--out", "o", "--to", "dora"): "--to = 'dora'",
        ("distil", "adapter", *DATA, "--out", "o", "--r", "0"): "--r = 0",
        ("distil", "adapter", *DATA, "--out", "o", "--r", "9"): "exceeds 8, the highest rank",
        ("distil", "adapter", *DATA, "--out", "o", "--compare-scratch"): "needs --steps",
        ("distil", "gone", *DATA, "--out", "o"): "gone",
        ("distil", "adapter", "--data", "one=one.jsonl", "--out", "o", "--r", "8"): "0 training and 0 held-out blocks",
    }
    write_jsonl(folder / "one.jsonl", [{"text": "<end>"}] * 3)  # of one token each
    (folder / "kept").mkdir()
    write_jsonl(folder / "kept" / "one.jsonl", [{"text": "one"}])
    for arguments, words in cases.items():
        assert main(list(arguments)) == 2, arguments
        assert words in capsys.readouterr().err
    assert not (folder / "o").exists() and not (folder / "lora").exists()
