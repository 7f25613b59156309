"""The quality benchmark: data, batches, scores, rivals, the sweep and its tables, on a tiny model and made-up data."""

import json
import math

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import peers
from benchmarks.arms import shared_copy
from benchmarks.peers import SCALING
from benchmarks.quality import data as data_module
from benchmarks.quality import table
from benchmarks.quality.__main__ import main
from benchmarks.quality.batches import make_batches
from benchmarks.quality.data import IGNORED, Examples, build_task, build_text, load_suite, split_of
from benchmarks.quality.experiment import Bench, Plan, put_state, state_of
from benchmarks.quality.methods import LINEARS, METHODS, Size, groups_by_name, method_of, num_trainable
from benchmarks.quality.questions import Question
from benchmarks.quality.quick import quick_base, quick_data
from benchmarks.quality.rivals import SoftMixtureLinear, TopKFeedForward
from benchmarks.quality.scoring import score
from benchmarks.quality.sweep import Rows, Sweep
from benchmarks.quality.texts import without_repeats
from benchmarks.quality.trainer import Training
from benchmarks.quality.variants import UnnormalisedRouter, variant_of
from moelora.presets import PRESETS
from moelora.tuner.router import MoELoraRouter

pytestmark = pytest.mark.slow

SIZE = Size(experts=4, rank=2, top_k=2)
ORIGIN = {"commit": "here", "hardware": "this"}


def encode(texts):
    return [list(text.encode()) for text in texts]


def plan(suite="lm", steps=6):
    return Plan(suite, steps, 4, SIZE, "cpu")


# ---- data ------------------------------------------------------------------------------------------------------------


def test_a_document_lies_in_one_split_and_ends_with_the_end_token():
    documents = [(f"file-{number}", f"{number} " * 30) for number in range(100)]
    arrays = build_text(documents, encode, end=0)
    found = {split: bytes(array.astype("uint8")).split(b"\0")[:-1] for split, array in arrays.items()}
    assert {split: len(texts) for split, texts in found.items()} == {
        split: sum(split_of(key) == split for key, _ in documents) for split in found
    }
    texts = [text for texts in found.values() for text in texts]
    assert sorted(texts) == sorted(text.strip().encode() for _, text in documents)


def test_repeated_paragraphs_are_dropped():
    licence = "This licence text stands at the top of every file."
    found = dict(without_repeats([("a", f"{licence}\n\n{'first ' * 10}"), ("b", f"{licence}\n\n{'second ' * 10}")]))
    assert found == {"a": f"{licence}\n\n{('first ' * 10).strip()}", "b": ("second " * 10).strip()}


def test_tasks_predict_answers_alone_and_come_back_as_written(tmp_path):
    questions = [Question(f"key {n % 40}", f"what is {n}?", f" {n % 3}") for n in range(200)] * 2
    arrays, counts = build_task(questions, encode, end=0)
    assert sum(counts[split]["examples"] for split in counts) == 200
    data_module._save(tmp_path / "tasks.npz", {f"numbers/{key}": array for key, array in arrays.items()})
    manifest = {"tasks": {"numbers": {"choices": [48, 49, 50]}}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    examples = load_suite(tmp_path, "tasks")["numbers"]["train"]
    for ids, labels, mask in zip(examples.ids, examples.labels, examples.mask, strict=True):
        text = bytes(ids[mask].astype("uint8"))
        question, answer = text[:-1].split(b"?")
        assert bytes(labels[labels != IGNORED].astype("uint8")) == answer + b"\0"
        assert int(answer) == int(question.split()[-1]) % 3
    assert 1 / 3 <= examples.majority() < 0.5


def test_missing_data_name_the_command(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"run: python -m benchmarks\.quality\.data --out"):
        load_suite(tmp_path, "lm")


def test_batches_give_every_domain_its_share_and_repeat_with_the_seed():
    sources = [Examples(np.full((5, 3), n), np.full((5, 3), n)) for n in range(3)]
    batches = make_batches(sources, steps=6, rows=4, seed=1, device="cpu")
    assert batches.ids.shape == (6, 4, 3) and batches.mask is None
    assert [(batches.ids[..., 0] == n).sum().item() for n in range(3)] == [8, 8, 8]
    rows = [source["train"] for source in quick_data("lm").values()]
    one, same, other = (make_batches(rows, 6, 4, seed, "cpu").ids for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)


# ---- training and scoring --------------------------------------------------------------------------------------------


def test_training_starts_anew_after_reset():
    bench = Bench(quick_base(), quick_data("lm"), plan())
    torch.manual_seed(0)
    model = METHODS["ours"].build(bench.base, SIZE)
    batches = bench._batches(list(bench.data), 6, seed=0)
    training = Training(model, batches, "cpu", groups_by_name(model, {"lora_B": 4.0}))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    training.run(batches, 1e-2)
    first = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    changed = {name for name in before if not torch.equal(before[name], first[name])}
    trained = {name for name in before if any(part in name for part in ("lora_A", "lora_B", "lora_router"))}
    assert changed <= trained and {name for name in trained if name.endswith("weight")} <= changed
    training.reset()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    training.run(batches, 1e-2)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, first[name], rtol=1e-6, atol=1e-7, msg=name)


def test_constant_weights_train_to_what_the_lora_of_equal_parameters_does():
    """In float32; what differs in the tables comes from other initial values and from rounding."""
    base, data = quick_base().requires_grad_(False), quick_data("lm")
    uniform = method_of("uniform-8").build(base, Size(experts=8, rank=1, top_k=2))
    lora = get_peft_model(shared_copy(base), LoraConfig(r=8, lora_alpha=8 * SCALING, target_modules=list(LINEARS)))
    ours, its = ([p for p in model.parameters() if p.requires_grad] for model in (uniform, lora))
    assert [p.shape for p in ours] == [p.shape for p in its]
    put_state(lora, ours)
    before = state_of(lora)
    batches = make_batches([data[domain]["train"] for domain in data], 20, 4, 0, "cpu")
    for model in (uniform, lora):
        Training(model, batches, "cpu").run(batches, 1e-2)
    assert all((now - then).abs().max() > 0.01 for now, then in zip(its, before, strict=True))
    for actual, expected in zip(ours, its, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


def test_groups_hold_every_trainable_parameter_once():
    model = METHODS["ours"].build(quick_base().requires_grad_(False), SIZE)
    groups = {factor: members for members, factor in groups_by_name(model, {"lora_B": 4.0})}
    assert set(groups) == {1.0, 4.0}
    assert sum(p.numel() for members in groups.values() for p in members) == num_trainable(model)
    b_factors = [p for name, p in model.named_parameters() if "lora_B" in name]
    assert {id(p) for p in groups[4.0]} == {id(p) for p in b_factors}


class Fixed(nn.Module):
    """Predicts given next tokens."""

    def __init__(self, predicted):
        super().__init__()
        self.logits = 10 * nn.functional.one_hot(predicted, 8).float()

    def forward(self, input_ids, **_):
        return type("Output", (), {"logits": self.logits[: len(input_ids)]})


@pytest.mark.parametrize(("choices", "accuracy"), [((), 0.5), ((3, 4), 1.0)])
def test_answers_are_right_as_a_whole_or_among_choices(choices, accuracy):
    ids = np.array([[1, 2, 3, 0], [1, 2, 4, 0]])
    labels = np.where(np.arange(4) >= 2, ids, IGNORED)
    predicted = torch.tensor([[7, 3, 0, 7], [7, 4, 5, 7]])  # the second answer does not end
    examples = Examples(ids, labels, np.ones_like(ids, dtype=bool), choices)
    found = score(Fixed(predicted), examples, "cpu")
    assert found.accuracy == accuracy
    right = math.log1p(7 * math.exp(-10))
    assert found.loss == pytest.approx((3 * right + right + 10) / 4, rel=1e-5)


# ---- methods ---------------------------------------------------------------------------------------------------------


def test_rivals_have_nearly_as_many_parameters_as_the_mixture():
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=32)).requires_grad_(False)
    size = Size(experts=8, rank=8, top_k=2)
    target = num_trainable(METHODS["ours"].build(base, size))
    for name in ("lora", "dora", "mixlora", "loramoe", "hydralora"):
        assert num_trainable(METHODS[name].build(base, size)) == pytest.approx(target, rel=0.07), name


@pytest.mark.parametrize("shared_A", [False, True])
def test_soft_mixtures_equal_the_loops(shared_A):
    torch.manual_seed(0)
    base, x = nn.Linear(6, 5), torch.randn(2, 3, 6)
    loop = (peers.HydraLoRALinear if shared_A else peers.LoRAMoELinear)(base, 4, 2)
    ours = SoftMixtureLinear(base, 4, 2, shared_A)
    with torch.no_grad():
        ours.router.weight.copy_(loop.router.weight)
        heads = torch.randn(4, 5, 2)
        ours.lora_B.copy_(torch.cat(list(heads), dim=1))
        if shared_A:
            ours.lora_A.copy_(loop.lora_A)
        else:
            ours.lora_A.copy_(torch.cat([expert.lora_A for expert in loop.experts]))
        for number, head in enumerate(heads):
            (loop.lora_B[number] if shared_A else loop.experts[number].lora_B).copy_(head)
    torch.testing.assert_close(ours(x), loop(x), rtol=1e-5, atol=1e-6)


def test_mixlora_equals_the_loop():
    torch.manual_seed(0)
    feed_forward = quick_base().model.layers[0].mlp
    loop = peers.MixLoRAFeedForward(feed_forward, 4, 2, 2)
    ours = TopKFeedForward(feed_forward, 4, 2, 2)
    with torch.no_grad():
        ours.router.weight.copy_(loop.router.weight)
        for name in ours.NAMES:
            for expert in loop.experts:
                expert[name].lora_B.normal_()
            ours.lora_A[name].copy_(torch.cat([expert[name].lora_A for expert in loop.experts]))
            ours.lora_B[name].copy_(torch.cat([expert[name].lora_B for expert in loop.experts], dim=1))
    x = torch.randn(2, 3, 32)
    torch.testing.assert_close(ours(x), loop(x), rtol=1e-5, atol=1e-5)
    assert ours.balance.item() == pytest.approx(1.0, abs=0.5)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("frozen", "xlora", "arrow", "oracle")])
def test_every_joint_method_trains(name):
    bench = Bench(quick_base(), quick_data("lm"), plan(steps=2))
    before = bench.train("frozen", 0.0, 0).scores("validation")
    after = bench.train(name, 5e-3, 0).scores("validation")
    assert sum(s.loss for s in after.values()) < sum(s.loss for s in before.values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("suite", ["lm", "tasks"])
@pytest.mark.parametrize("name", ["lora", "dora", "ours", "scope-module", "mixlora", "loramoe", "hydralora"])
def test_a_captured_step_computes_what_an_eager_one_does(name, suite):
    bench = Bench(quick_base().to("cuda", torch.bfloat16), quick_data(suite), Plan(suite, 8, 4, SIZE, "cuda"))
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = METHODS[name].build(bench.base, SIZE)
    batches = bench._batches(list(bench.data), 8, seed=0)
    initial, states = state_of(model), []
    for capture in (True, False):
        training = Training(model, batches, "cuda", capture=capture)
        assert training.run(batches, 1e-2).captured == capture
        states.append(torch.cat([tensor.flatten() for tensor in state_of(model)]))
        training.reset()
    moved = (states[1] - torch.cat([tensor.flatten() for tensor in initial])).norm()
    assert moved > 0.1
    assert (states[0] - states[1]).norm() < 0.05 * moved  # kernels differ where a mask is built, and round otherwise


# ---- sweep and tables ------------------------------------------------------------------------------------------------


def test_the_sweep_goes_on_beyond_its_ends_fails_by_row_and_resumes(tmp_path, monkeypatch):
    rows = Rows(tmp_path / "rows.jsonl", plan(), ORIGIN)
    bench = Bench(quick_base(), quick_data("lm"), plan())
    train, calls = bench.train, []

    def counted(name, lr, seed):
        calls.append((name, lr, seed))
        if name == "dora":
            raise RuntimeError("does not fit")
        return train(name, lr, seed)

    monkeypatch.setattr(bench, "train", counted)
    sweep = Sweep(bench, rows, seeds=2, test=True, deadline=math.inf)
    sweep.run("lora")
    assert calls[:5] == [("lora", lr, 0) for lr in (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)]  # the largest was best
    best = rows.best_rate("lora")
    assert [call[2] for call in calls if call[1] == best] == [0, 1]  # seed 0's model is tested without training again
    sweep.run("dora")
    assert all("does not fit" in row["error"] for row in rows.found.values() if row["method"] == "dora")
    assert {(r["split"], r["seed"]) for r in rows.found.values() if r["method"] == "lora" and r["lr"] == best} == {
        (split, seed) for split in ("validation", "test") for seed in (0, 1)
    }

    done = len(calls)
    again = Rows(tmp_path / "rows.jsonl", plan(), ORIGIN)
    for name in ("lora", "dora"):
        Sweep(bench, again, seeds=2, test=True, deadline=math.inf).run(name)
    assert len(calls) == done
    assert not any("error" in row for row in Rows(tmp_path / "rows.jsonl", plan(), ORIGIN, retry=True).found.values())


def test_given_rates_are_the_only_ones(tmp_path, monkeypatch):
    bench = Bench(quick_base(), quick_data("lm"), plan())
    calls = []
    train = bench.train
    monkeypatch.setattr(bench, "train", lambda *call: (calls.append(call), train(*call))[1])
    sweep = Sweep(bench, Rows(tmp_path / "rows.jsonl", plan(), ORIGIN), 1, False, math.inf, rates=(4e-3,))
    for name in ("frozen", "scale-2+plus-4"):
        sweep.run(name)
    assert calls == [("frozen", 0.0, 0), ("scale-2+plus-4", 4e-3, 0)]


def test_rows_of_another_batch_do_not_count(tmp_path):
    row = {"suite": "lm", "method": "lora", "split": "validation", "lr": 1e-3, "seed": 0, "steps": 6, "loss": 2.0}
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row | more) + "\n" for more in ({"rows": 4, "loss": 3.0}, {}, {"rows": 8})))
    assert [found["loss"] for found in Rows(path, plan(), ORIGIN).found.values()] == [3.0]


@pytest.mark.parametrize(
    ("option", "value"),
    [("--rates", "0"), ("--rates", "-1e-3"), ("--rates", "nan"), ("--rates", "inf"), ("--steps", "0"), ("--seeds", "0"),
     ("--workers", "0"), ("--workers", "-1")],
)  # fmt: skip
def test_a_number_that_nothing_can_be_run_with_is_refused(option, value, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--quick", "--device", "cpu", "--out", str(tmp_path / "out"), option, value])
    assert f"{option} " in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_joined_variants_are_both():
    both = variant_of("router-raw+sparse+top-1+plus-4")
    assert both.options["router_type"] == "learned" and both.options["top_k_experts"] == 1
    assert both.rates == {"lora_B": 4.0} and both.router is UnnormalisedRouter
    with pytest.raises(SystemExit):
        main(["--quick", "--device", "cpu", "--methods", "sparse+plus-5"])


@pytest.mark.parametrize(("name", "variant"), [("multi-domain", "dense-16+temperature-1"), ("mergeable", "uniform-8")])
def test_a_preset_is_what_was_measured(name, variant):
    size = Size()
    options = {"num_experts": size.experts} | variant_of(variant).options
    rank = size.experts * size.rank // options["num_experts"]
    assert PRESETS[name] == {"r": rank, "lora_alpha": SCALING * rank} | options


def test_a_router_without_normalisation_sees_how_large_its_input_is():
    base = quick_base().requires_grad_(False)
    hidden = torch.randn(2, 5, base.config.hidden_size)
    for name, is_blind in (("dense-8", True), ("dense-8+router-raw", False), ("dense-8+router-raw+router-64", False)):
        torch.manual_seed(0)
        model = method_of(name).build(base, Size(experts=8, rank=2, top_k=2))
        router = next(module for module in model.modules() if isinstance(module, MoELoraRouter))
        weights = [router.logits(hidden * size) for size in (1, 3)]
        assert weights[0].shape == (10, 8)
        assert torch.allclose(*weights, atol=1e-4) == is_blind, name


def test_a_method_without_a_lora_of_as_many_steps_meets_the_one_of_nearest_time_on_the_same_hardware():
    def entry(method, steps, **seconds):
        row = {"split": "test", "lr": 1e-3, "loss": 2.0}
        runs = [row | {"seed": s, "hardware": name, "seconds": seconds[name]} for s, name in enumerate(seconds)]
        return table.Entry(method, steps, [*runs, runs[0] | {"split": "validation"}], "test")

    done = [entry("lora", 6, old=10.0), entry("lora", 12, new=5.0, old=20.0), entry("ours", 6, old=18.0)]
    done += [entry("ours", 14, old=19.0), entry("ours", 15, new=9.0)]
    assert [table.baseline_of(each, done) for each in done] == [None, None, done[0], done[1], done[1]]
    assert [table.baseline_of(each, done, "ours@14") for each in done] == [done[3], done[3], done[3], None, done[3]]


@pytest.mark.parametrize(
    ("suite", "names"), [("lm", ["frozen", "oracle", "xlora", "arrow"]), ("tasks", ["frozen", "lora", "ours"])]
)
def test_the_command_and_its_tables(suite, names, tmp_path, capsys):
    arguments = ["--device", "cpu", "--quick", "--suite", suite, "--seeds", "1", "--out", str(tmp_path)]
    main([*arguments, "--methods", *names, "--budget", "0"])
    assert "the budget is spent" in capsys.readouterr().out
    main([*arguments, "--methods", *names])
    table.main([str(tmp_path / "rows.jsonl")])
    text = (tmp_path / "test.md").read_text()
    assert all(f"| **{name}**: " in text for name in names) and "Failures" not in text
    assert ("Accuracy by task" in text) == (suite == "tasks")
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    tested = [row for row in rows if row["split"] == "test"]
    assert {row["method"] for row in tested} == set(names)
    assert (tmp_path / f"{suite}-test.png").stat().st_size > 0
    assert len((tmp_path / "test.csv").read_text().splitlines()) == 1 + 3 * len(tested)
    table.main([str(tmp_path / "rows.jsonl"), "--baseline", "frozen@6"])
    assert "| minus frozen@6 |" in (tmp_path / "test-minus-frozen@6.md").read_text()
    assert (tmp_path / "test.md").read_text() == text
    with pytest.raises(SystemExit):
        table.main([str(tmp_path / "rows.json")])
    assert "rows.json: no such file; give rows.jsonl" in capsys.readouterr().err
    with pytest.raises(SystemExit, match=r"--baseline frosen: the rows hold none of that name; they hold .*frozen"):
        table.main([str(tmp_path / "rows.jsonl"), "--baseline", "frosen"])


def test_intervals_are_students():
    assert table.Interval.of([1.0, 2.0, 3.0]).half == pytest.approx(4.302653 / 3**0.5, rel=1e-6)
    assert str(table.Interval.of([1.0])) == "1.0000"
