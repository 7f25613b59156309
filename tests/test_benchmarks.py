"""The benchmarks compute what they claim to, stop when they must, and lose nothing."""

import importlib
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import moelora.forward.shared_input
import moelora.ops
from benchmarks import __main__ as everything
from benchmarks import (
    correctness,
    decode,
    generate,
    growth,
    layer,
    model,
    models,
    monitor,
    native,
    peers,
    plot,
    pool,
    table,
)
from benchmarks.arms import Mixture, adapt, shared_copy
from benchmarks.grouped import grouped_linear, make_plan
from benchmarks.kits import kit_of
from benchmarks.record import Recorder, Row, read
from benchmarks.timing import attempt, take_turns

pytestmark = pytest.mark.slow

ROW = Row("layer", "4 -> 4", tokens=10, experts=2, rank=1, top_k=1, dtype="float32")
TINY_LAYER = (
    "--device cpu --dtype float32 --tokens 8 --hidden 32 --intermediate 64 --kv 16 --min-time 0.001 --repeats 2"
)


class FeedForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(8, 20, bias=False), nn.Linear(8, 20, bias=False)
        self.down_proj, self.act_fn = nn.Linear(20, 8, bias=False), nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def with_noise(module):
    for name, parameter in module.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return module.double()


def softmax_of(module, x):
    return torch.softmax(x @ module.router.weight.T, dim=-1)


@pytest.mark.parametrize("tokens", [1, 63])
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_mixlora_equals_its_formula(tokens, top_k):
    torch.manual_seed(0)
    mixlora = with_noise(peers.MixLoRAFeedForward(FeedForward(), num_experts=5, rank=2, top_k=top_k))
    frozen, x = mixlora.feed_forward, torch.randn(1, tokens, 8).double()
    expected = torch.zeros_like(x)
    for t in range(tokens):
        p = softmax_of(mixlora, x[0, t])
        chosen = p.topk(top_k).indices
        for e in chosen.tolist():
            effective = {
                name: frozen.get_submodule(name).weight + 2 * factors.lora_B @ factors.lora_A
                for name, factors in mixlora.experts[e].items()
            }
            inner = F.silu(effective["gate_proj"] @ x[0, t]) * (effective["up_proj"] @ x[0, t])
            expected[0, t] += p[e] / p[chosen].sum() * (effective["down_proj"] @ inner)
    torch.testing.assert_close(mixlora(x), expected, rtol=1e-5, atol=1e-5)  # routing is in float32


def test_loramoe_equals_its_formula():
    torch.manual_seed(0)
    module = with_noise(peers.LoRAMoELinear(nn.Linear(8, 6), num_experts=3, rank=2))
    x = torch.randn(2, 7, 8).double()
    p = softmax_of(module, x)
    expected = module.base_layer(x)
    for e, expert in enumerate(module.experts):
        expected = expected + p[..., e : e + 1] * (2 * x @ (expert.lora_B @ expert.lora_A).T)
    torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-5)


def test_hydralora_equals_its_formula():
    torch.manual_seed(0)
    module = with_noise(peers.HydraLoRALinear(nn.Linear(8, 6), num_experts=3, rank=2))
    x = torch.randn(2, 7, 8).double()
    heads = torch.einsum("bse,eor->bsor", softmax_of(module, x), torch.stack(list(module.lora_B)))
    expected = module.base_layer(x) + 2 * torch.einsum("bsor,rd,bsd->bso", heads, module.lora_A, x)
    torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-5)


def gradients_of_embeddings(llama):
    """A list that every backward adds the gradient of what the embeddings gave out to."""
    gradients = []
    embeddings = llama.get_input_embeddings()
    embeddings.register_forward_hook(lambda module, inputs, output: output.register_hook(gradients.append) and None)
    return gradients


@pytest.mark.parametrize("arm", [arm for arm in model.ARM_NAMES if not kit_of(arm)])
def test_every_arm_trains_around_the_same_weights(arm, monkeypatch):
    args = model.parse(["--preset", "tiny", "--device", "cpu", "--layers", "1", "--arms", arm, "--length", "8"])
    base = model.build_base(args)
    monkeypatch.setattr(model, "build_base", lambda args: base)
    bench = model.Bench(args)
    step = bench.steps[arm]
    gradients = gradients_of_embeddings(step.model)
    before = {name: weight.clone() for name, weight in base.named_parameters()}
    shared = {id(parameter) for parameter in step.model.parameters()}
    assert all(id(parameter) in shared for parameter in base.parameters())
    for is_checkpointed in (False, True):
        bench.use(2, 8, is_checkpointed)
        bench.call(arm)()
        assert step.model.is_gradient_checkpointing is is_checkpointed
    assert len(gradients) == 2 and all(gradient.shape[:2] == (2, 8) and gradient.any() for gradient in gradients)
    assert all(torch.equal(weight, before[name]) for name, weight in base.named_parameters())
    idle = [name for name, p in step.model.named_parameters() if p.requires_grad and p.grad is None]
    assert not idle
    assert bool(step.trainable) == (arm != "frozen")


def test_mixlora_needs_a_feed_forward_network():
    with pytest.raises(ValueError, match="mixlora"):
        adapt(layer.linear_shape(8, 8).build("cpu", torch.float32), "mixlora", Mixture(2, 2, 1))


def test_arms_that_hold_one_expert_or_all_have_the_ranks_they_claim():
    base = layer.linear_shape(8, 6).build("cpu", torch.float32)
    ranks = {}
    for arm in ("lora", "lora-equal", "ours", "ours-e1"):
        parameters = dict(adapt(base, arm, Mixture(experts=4, rank=3, top_k=2)).named_parameters())
        (ranks[arm],) = {p.shape[0] for name, p in parameters.items() if "lora_A" in name}
    assert ranks == {"lora": 6, "lora-equal": 12, "ours": 12, "ours-e1": 6}


def test_shared_copies_keep_their_own_modules():
    original = nn.Sequential(nn.Linear(2, 2))
    twin = shared_copy(original)
    assert twin[0] is not original[0] and twin[0].weight is original[0].weight


@pytest.mark.parametrize("ids", [[[2, 0]], [[1, 2], [2, 1], [1, 2]]], ids=["one-token", "expert-without-tokens"])
def test_grouped_equals_the_reference(ids):
    torch.manual_seed(0)
    ids = torch.tensor(ids)
    x, weights = torch.randn(len(ids), 16), torch.rand(ids.shape)
    A, B = torch.randn(3, 8, 16), torch.randn(3, 24, 8)
    base = nn.Linear(16, 24, bias=False).requires_grad_(False)
    with torch.no_grad():
        result = grouped_linear(base, x, A, B, weights, make_plan(ids, 3), scaling=0.5)
    expected = base(x)
    for t, row in enumerate(ids.tolist()):
        for slot, e in enumerate(row):
            expected[t] += 0.5 * weights[t, slot] * (B[e] @ A[e] @ x[t])
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-4)


def test_a_wrong_result_stops_everything_before_it_is_timed(monkeypatch, tmp_path):
    right = moelora.ops.BACKENDS["reference"]
    monkeypatch.setitem(moelora.ops.BACKENDS, "reference", lambda *args: right(*args) * 1.1)
    with pytest.raises(
        SystemExit, match=r"the check of correctness failed: moelora on cpu in torch.float64: .* differs"
    ):
        everything.main(["--device", "cpu", "--quick", "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_a_missing_gradient_stops_everything():
    with pytest.raises(correctness.CorrectnessError, match="b"):
        one = {"a": torch.ones(1)}
        correctness._compare("x", one, one | {"b": torch.ones(1)}, "cpu", torch.float32, 1e-3)


def test_the_check_sees_nan():
    with pytest.raises(correctness.CorrectnessError, match="output"):
        correctness._compare(
            "x", {"output": torch.tensor(math.nan)}, {"output": torch.ones(1)}, "cpu", torch.float32, 1e-3
        )


def test_everything_writes_a_table_with_its_command(tmp_path, capsys):
    everything.main(["--device", "cpu", "--quick", "--only", "decode", "--repeats", "2", "--out", str(tmp_path)])
    text = (tmp_path / "results.md").read_text()
    assert "command: python -m benchmarks.decode --device cpu --repeats 2" in text and "torch " in text
    assert "### decode: tiny, 2 blocks, batch 8" in text
    assert "checked on cpu" in capsys.readouterr().out
    _, rows = read([tmp_path / "results.csv"])
    assert {row.arm for row in rows} == set(decode.ARM_NAMES)
    assert all(row.value > 0 for row in rows)


def test_layers_are_measured(tmp_path):
    layer.main([*TINY_LAYER.split(), "--out", str(tmp_path)])
    _, rows = read([tmp_path / "results.csv"])
    cases = {"block of seven linears", "32 -> 32", "32 -> 64", "64 -> 32", "32 -> 16"}
    assert {(row.case, row.arm, row.repeat) for row in rows} == {
        (case, arm, repeat) for case in cases for arm in layer.ARM_NAMES for repeat in range(2)
    }


def test_the_callbacks_cost_is_measured(tmp_path, capsys):
    arguments = "--preset tiny --device cpu --repeats 1 --min-time 0.01 --logging-steps 2 --out"
    monitor.main([*arguments.split(), str(tmp_path)])
    assert "watched / unwatched: " in capsys.readouterr().out
    table.main([str(tmp_path / "results.csv")])
    assert "x unwatched" in capsys.readouterr().out


def test_growth_is_measured_and_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    points = "--num-experts 2 4 --ranks 4 --num-tokens 1 8"
    growth.main([*TINY_LAYER.split(), *points.split(), "--out", str(tmp_path)])
    plot.main([str(tmp_path / "results.csv"), str(tmp_path / "growth.png")])
    assert (tmp_path / "growth.png").stat().st_size > 1000
    assert "| 8 | 4 | 16 | 64 | 2 |" in table.render(*read([tmp_path / "results.csv"]))


def test_both_forms_of_a_pool_are_measured(tmp_path, capsys, monkeypatch):
    asked, form = [], moelora.forward.shared_input.mixture_sparse
    monkeypatch.setattr(moelora.forward.shared_input, "mixture_sparse", lambda *args: asked.append(args) or form(*args))
    sizes = "--device cpu --dtype float32 --hidden 32 --intermediate 64 --kv 16 --rank 2 --num-experts 4 --num-tokens 8"
    arguments = [*sizes.split(), "--min-time", "0.001", "--repeats", "1", "--out", str(tmp_path), "--arms"]
    pool.main([*arguments, "frozen", "lora", "dense"])
    assert not asked and "E=4 r=2 top-2: dense is chosen by itself" in capsys.readouterr().out
    pool.main([*arguments, "sparse"])
    assert asked
    _, rows = read([tmp_path / "results.csv"])
    assert {(row.arm, row.tokens, row.experts) for row in rows} == {(arm, 8, 4) for arm in pool.ARM_NAMES}


def test_native_mixtures_are_measured(tmp_path):
    native.main(["--device", "cpu", "--quick", "--tokens", "8", "--repeats", "1", "--out", str(tmp_path)])
    _, rows = read([tmp_path / "results.csv"])
    assert {(row.arm, row.metric, row.rank) for row in rows} == {(arm, "seconds", 4) for arm in native.ARM_NAMES}
    assert "x native-lora" in table.render(*read([tmp_path / "results.csv"]))


def test_a_plot_of_nothing_says_what_to_run(tmp_path):
    Recorder(tmp_path, "cpu", "command")
    with pytest.raises(SystemExit, match=r"python -m benchmarks\.growth"):
        plot.main([str(tmp_path / "results.csv"), str(tmp_path / "growth.png")])


@pytest.mark.parametrize(
    ("words", "is_eager"), [("--device cuda", False), ("--device cuda --eager", True), ("--device cpu", True)]
)
def test_decoding_is_a_graph_only_on_a_gpu_that_is_not_told_otherwise(words, is_eager):
    assert decode.parse(words.split()).eager is is_eager


def test_decoding_equals_full_forwards():
    args = decode.parse(["--preset", "tiny", "--device", "cpu"])
    base = decode.build_base(args).eval()
    torch.manual_seed(0)
    prompt = decode.Prompt(base, batch=2, length=5, size=16)
    torch.manual_seed(0)
    ids = torch.randint(base.config.vocab_size, (2, 5))  # the prompt's own, drawn again
    first = prompt.ids.clone()
    for _ in range(4):
        ids = torch.cat([ids, base(input_ids=ids).logits[:, -1:].argmax(dim=-1)], dim=1)
    assert torch.equal(first, ids[:, 5:6])
    for _ in range(2):
        prompt.ids.copy_(first)
        decode.make_call(base, prompt, steps=3, is_graph=False)()
        assert torch.equal(prompt.ids, ids[:, -1:])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("arm", decode.ARM_NAMES)
def test_a_captured_step_decodes_what_an_eager_one_does(arm):
    args = decode.parse(["--preset", "tiny", "--device", "cuda"])
    base = decode.build_base(args).eval()
    step_model = adapt(base, arm, Mixture(experts=4, rank=8, top_k=2)).eval()
    prompt = decode.Prompt(base, batch=3, length=5, size=16)
    first, decoded = prompt.ids.clone(), []
    for is_graph in (False, True):
        call = decode.make_call(step_model, prompt, steps=4, is_graph=is_graph)
        prompt.ids.copy_(first)
        call()
        decoded.append(prompt.ids.clone())
    assert torch.equal(*decoded)


def test_a_cache_without_room_is_refused(capsys):
    with pytest.raises(SystemExit):
        decode.parse(["--preset", "tiny", "--device", "cpu", "--steps", "99"])
    assert "--cache (32) has no room for --prompt (16) and --steps (99)" in capsys.readouterr().err


def test_an_arm_that_runs_out_of_memory_leaves_and_the_others_go_on(tmp_path):
    def greedy():
        raise torch.OutOfMemoryError("no room\nfor this")

    take_turns({"frozen": lambda: None, "lora": greedy}, Recorder(tmp_path, "cpu", "x"), ROW, "cpu", 2, 0.0)
    comments, rows = read([tmp_path / "results.csv"])
    assert [(row.arm, row.metric) for row in rows].count(("lora", "failed")) == 1
    assert [row.repeat for row in rows if row.arm == "frozen"] == [0, 1]
    assert "lora failed: OutOfMemoryError: no room for this" in table.render(comments, rows)


def test_the_first_of_several_errors_is_recorded(tmp_path):
    def fail():
        try:
            raise RuntimeError("a synchronisation while capturing")
        finally:
            raise RuntimeError("capture ended badly")

    assert attempt(fail, Recorder(tmp_path, "cpu", "x"), ROW, "ours", RuntimeError) is None
    _, (row,) = read([tmp_path / "results.csv"])
    assert (row.metric, row.note) == ("failed", "RuntimeError: a synchronisation while capturing")


def test_results_add_up_over_runs_and_files(tmp_path):
    for folder in ("a", "b"):
        for command in ("first", "second"):
            recorder = Recorder(tmp_path / folder, "cpu", command, commit="abc")
            recorder.add(ROW, arm="frozen", value=1.0, case=folder)
    comments, rows = read([tmp_path / "a" / "results.csv", tmp_path / "b" / "results.csv"])
    assert [comment for comment in comments if comment.startswith("command")] == ["command: first", "command: second"]
    assert "commit abc" in comments[0]
    assert [row.case for row in rows] == ["a", "a", "b", "b"]


def test_the_clocks_of_two_gpus_are_one_comment(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.record.hardware", lambda device: "NVIDIA H100")
    monkeypatch.setattr("benchmarks.record._output", lambda *command: "1980 MHz, 700.00 W\n1965 MHz, 700.00 W")
    Recorder(tmp_path, "cuda", "x", commit="abc").add(ROW, arm="frozen", value=1.0)
    comments, (row,) = read([tmp_path / "results.csv"])
    assert len(comments) == 3 and comments[1].endswith(": 1980 MHz, 700.00 W; 1965 MHz, 700.00 W")
    assert row.arm == "frozen"


def test_ratios_are_taken_repeat_by_repeat():
    times = {"frozen": [1.0, 2.0, 1.0], "ours": [1.1, 2.4, 1.3], "lora": [2.0, 2.0, 2.0]}
    rows = [
        Row(**{**vars(ROW), "arm": a, "repeat": i, "value": v}) for a, vs in times.items() for i, v in enumerate(vs)
    ]
    memory = {"frozen": 1, "ours": 3, "lora": 5}
    rows += [Row(**{**vars(ROW), "arm": a, "metric": "peak_bytes", "value": v * 2**20}) for a, v in memory.items()]
    rows.append(Row(**{**vars(ROW), "metric": "clock_mhz", "value": 1755.0}))
    (comparison,) = table.comparisons(rows)
    assert "SM clock 1755 MHz under load" in table.arm_table(comparison)[2]
    assert comparison.ratio("ours", "frozen") == pytest.approx((1.2, 0.1))
    assert comparison.ratio("ours", "loop") is None
    line = next(line for line in table.arm_table(comparison) if line.startswith("| ours"))
    assert line == "| ours | 1300.000 ± 650.000 | 8 | 1.200 ± 0.100 | 0.650 ± 0.325 | 3 | 2 | 0.50 |"


@pytest.mark.parametrize(
    "name",
    [
        *(
            "__main__",
            "layer",
            "model",
            "decode",
            "generate",
            "growth",
            "crossover",
            "pool",
            "native",
            "monitor",
            "correctness",
            "parallel",
            "table",
            "plot",
        ),
        *("continual.__main__", "continual.bases", "continual.decoding", "continual.table", "continual.telling"),
        *("growing.__main__", "growing.novelty", "quality.__main__"),
    ],
)
def test_help_shows_real_calls(name, capsys):
    module = importlib.import_module(f"benchmarks.{name}")
    with pytest.raises(SystemExit):
        module.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert f"-m {module.__name__.removesuffix('.__main__')}" in text
    for example in getattr(module, "EXAMPLES", ()):
        assert " ".join(example.split()) in text


@pytest.mark.parametrize("name", ["layer", "model", "decode", "generate", "growth", "crossover", "pool", "native"])
def test_examples_and_plans_parse(name):
    module = importlib.import_module(f"benchmarks.{name}")
    plans = [plan[name] for plan in everything.PLANS.values()]
    for options in (*module.EXAMPLES, *plans):
        assert module.parse(options.split()).arms


def test_presets_yield_to_options():
    args = model.parse(["--preset", "quickstart", "--device", "cpu", "--experts", "2", "--arms", "ours"])
    chosen = SimpleNamespace(experts=2, rank=8, batch=4, length=128, dtype="float32", arms=["ours"])
    assert vars(chosen).items() <= vars(args).items()


def test_labels_on_the_last_tokens_give_their_loss_alone():
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    frozen = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=40)).requires_grad_(False)
    llama = adapt(frozen, "ours", Mixture(experts=3, rank=2, top_k=1)).eval()
    ids = torch.randint(40, (2, 9))
    llama.enable_input_require_grads()
    gradients = gradients_of_embeddings(llama)
    F.cross_entropy(llama(input_ids=ids).logits[:, 4:-1].flatten(0, 1), ids[:, 5:].flatten()).backward()
    model.TrainingStep(llama, ids, answer=5)()
    expected, answered = gradients
    torch.testing.assert_close(answered, expected, rtol=1e-5, atol=1e-7)
    assert expected[:, 0].abs().max() > 0  # tokens without a label are read all the same


@pytest.mark.parametrize("answer", ["-5", "1", "129"])
def test_an_answer_without_a_target_is_refused(answer, capsys):
    with pytest.raises(SystemExit):
        model.parse(["--preset", "tiny", "--device", "cpu", "--length", "128", "--answer", answer])
    assert f"--answer {answer}: give 2 to 128" in capsys.readouterr().err


def test_sizes_are_measured_without_checkpointing_first():
    words = "--device cpu --sizes 1x512 2x4096 --recompute 2x4096"
    assert model.settings(model.parse(words.split())) == [(1, 512, False), (2, 4096, False), (2, 4096, True)]
    words = "--preset tiny --device cpu --checkpointing on"
    assert model.settings(model.parse(words.split())) == [(2, 64, True)]


@pytest.mark.parametrize("size", ["2", "x8", "0x8", "2x-8", "2xmany"])
def test_a_size_that_is_none_is_refused(size, capsys):
    with pytest.raises(SystemExit):
        model.parse(["--preset", "tiny", "--device", "cpu", "--sizes", size])
    assert f"'{size}': give sequences and tokens of each, such as 2x4096" in capsys.readouterr().err


@pytest.mark.parametrize("preset", models.PRESETS)
def test_every_preset_is_a_model_of_its_family(preset):
    args = model.parse(["--preset", preset, "--device", "cpu", "--layers", "1"])
    with torch.device("meta"):
        args.device = "meta"
        base = models.build_base(args)
    assert base.config.model_type == models.PRESETS[preset].family and base.config.num_hidden_layers == 1
    assert (base.model.layers[0].self_attn.q_proj.bias is not None) == (preset == "qwen-0.5b")


def test_the_forward_is_under_autocast_where_it_is_asked_for():
    words = "--preset tiny --device cpu --layers 1 --length 8 --arms ours-default"
    seen = []
    for options in (words, f"{words} --autocast"):
        step = model.Bench(model.parse(options.split())).steps["ours-default"]
        step.model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
        step()
    assert seen == [torch.float32, torch.bfloat16]
    assert all(parameter.dtype == torch.float32 for parameter in step.trainable)


def test_generating_gives_what_a_user_gets():
    words = "--preset tiny --device cpu --layers 1 --steps 5 --arms frozen ours-fixed"
    bench = generate.Bench(generate.parse(words.split()))
    for cache in ("dynamic", "static"):
        bench.use(2, cache)
        for arm, llama in bench.models.items():
            ids = bench.inputs["input_ids"]
            for _ in range(5):
                ids = torch.cat([ids, llama(input_ids=ids).logits[:, -1:].argmax(dim=-1)], dim=1)
            assert torch.equal(bench.call(arm)(), ids)
