"""benchmarks.continual: reading tasks, encoding, scores, metrics, and whole runs on a tiny model."""

import gzip
import json
import os
from dataclasses import replace
from multiprocessing import get_context
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks.continual import costs, mixture, run, telling, workers
from benchmarks.continual.__main__ import jobs_of, main, parse
from benchmarks.continual.encoding import encode, encode_prompt, widened
from benchmarks.continual.learner import EncodedTask, Plan, Setting
from benchmarks.continual.methods import METHODS
from benchmarks.continual.metrics import Summary
from benchmarks.continual.mixture import prompts
from benchmarks.continual.quick import quick_base, quick_tasks, quick_tokenizer
from benchmarks.continual.results import Results, job_of
from benchmarks.continual.run import Job, Source, task_names
from benchmarks.continual.scoring import exact_match, rouge_l, write_answers
from benchmarks.continual.table import groups, learned_alone, render, write
from benchmarks.continual.tasks import SEQUENCES, Question, load_sequence, load_tasks
from benchmarks.continual.workers import Workers, _choose_gpu
from benchmarks.quality.data import IGNORED
from moelora.config import count_experts

pytestmark = pytest.mark.slow
PLAN = Plan(steps=6, rows=4, rank=4, device="cpu")


def write_task(folder, name, rows, test="test", is_zipped=False):
    content = {
        "Definition": [f"What is {name}?"],
        "Instances": [{"input": f"row {i}", "output": "a"} for i in range(rows)],
    }
    (folder / name).mkdir(parents=True)
    for split in ("train", test):
        data = json.dumps(content).encode()
        path = folder / name / f"{split}.json{'.gz' if is_zipped else ''}"
        path.write_bytes(gzip.compress(data) if is_zipped else data)


@pytest.fixture(scope="module")
def tokenizer():
    return quick_tokenizer()


@pytest.fixture
def setting(tokenizer):
    tasks = [EncodedTask.of(task, tokenizer) for task in quick_tasks()]
    return Setting(quick_base(), tokenizer, tasks, PLAN, seed=0, rate=1e-2)


# ---- reading ---------------------------------------------------------------------------------------------------------


def test_a_checkout_is_read_as_the_shared_folder_is(tmp_path, capsys):
    write_task(tmp_path / "ours" / "long_sequence", "mnli", 20, is_zipped=True)
    write_task(tmp_path / "gainlora" / "CL_Benchmark" / "Long_Sequence", "mnli", 20, test="dev")
    ours, theirs = (load_sequence(tmp_path / name, "order4") for name in ("ours", "gainlora"))
    assert ours == theirs and [task.name for task in ours] == ["mnli"]
    assert "left out: cb, wic" in capsys.readouterr().out


def test_rows_held_out_are_no_training_rows(tmp_path):
    write_task(tmp_path, "cb", 20)
    rows = load_tasks(tmp_path, ["cb"])[0].rows
    train, validation = ({question.text for question in rows[split]} for split in ("train", "validation"))
    assert len(train) == 18 and len(validation) == 2 and not train & validation


def test_numbered_tasks_are_found_by_their_numbers(tmp_path):
    write_task(tmp_path, "task073_commonsenseqa", 3)
    assert [task.name for task in load_sequence(tmp_path, "superni1")] == ["task073_commonsenseqa"]


def test_a_folder_without_tasks_is_refused(tmp_path):
    with pytest.raises(SystemExit, match=r"--data .*nowhere: no such folder"):
        load_sequence(tmp_path / "nowhere", "order4")
    with pytest.raises(SystemExit, match=r"holds none of mnli, cb"):
        load_sequence(tmp_path, "order4")


def test_learning_rates_are_chosen_on_another_order():
    for name, order in SEQUENCES.items():
        assert len(order.tuned_on) == 3, name
        assert order.tuned_on != order.tasks[:3], name


def test_a_shifted_task_asks_the_same_for_other_labels(tmp_path):
    write_task(tmp_path, "cb", 4)
    content = json.loads((tmp_path / "cb" / "train.json").read_text())
    for row, label in zip(content["Instances"], ["a", "b", "c", "a"], strict=True):
        row["output"] = label
    for split in ("train", "test"):
        (tmp_path / "cb" / f"{split}.json").write_text(json.dumps(content))
    plain, shifted = load_tasks(tmp_path, ["cb", "cb+1"])
    assert shifted.name == "cb+1" and "code 1" in shifted.rows["test"][0].definition
    pairs = zip(plain.rows["test"], shifted.rows["test"], strict=True)
    assert [(old.answers[0], new.answers[0]) for old, new in pairs] == [("a", "b"), ("b", "c"), ("c", "a"), ("a", "b")]


# ---- tokens and scores -----------------------------------------------------------------------------------------------


def test_a_long_text_is_cut_and_nothing_else(tokenizer):
    question = Question("Say it.", f"begin{'x' * 500}end", ("yes",))
    text = tokenizer.decode(encode_prompt(question, tokenizer, 64)).replace(" ", "")
    assert text.startswith("Sayit.\nbeginx") and text.endswith("xend\nOutput:")
    assert len(encode_prompt(question, tokenizer, 64)) == 64


def test_labels_are_those_of_the_last_tokens(tokenizer):
    rows = encode([Question("", "ab", ("yes",)), Question("", "abc", ("no",))], tokenizer, 32)
    for ids, labels, mask in zip(rows.ids, rows.labels, rows.mask, strict=True):
        known = labels != IGNORED
        assert (ids[-labels.shape[0] :][known] == labels[known]).all() and labels[-1] == tokenizer.eos_token_id
        assert mask[-len("\nOutput: no") :].all() and not mask[0]
    assert (rows.labels != IGNORED).sum(1).tolist() == [len(" yes") + 1, len(" no") + 1]


def test_kept_logits_give_the_loss_of_all(setting):
    """Labels of the last tokens alone, with logits for these alone, against labels as long as the rows."""
    model, examples = setting.lora(), setting.tasks[0].examples["train"]
    ids, labels, mask = (torch.from_numpy(each) for each in (examples.ids, examples.labels, examples.mask))
    full = torch.full_like(ids, IGNORED)
    full[:, -labels.shape[1] :] = labels
    short = model(input_ids=ids, attention_mask=mask, labels=labels, logits_to_keep=labels.shape[1]).loss
    torch.testing.assert_close(short, model(input_ids=ids, attention_mask=mask, labels=full).loss)


def test_an_exact_match_is_what_greedy_decoding_writes(setting):
    learner = METHODS["lora"].make(setting)
    setting.train(learner.model, setting.batches([0], steps=150))
    task = setting.tasks[0]
    written = write_answers(learner.model, task.questions["test"], setting.tokenizer, task.length, "cpu", 4)
    right = [text == question.answers[0] for text, question in zip(written, task.questions["test"], strict=True)]
    assert exact_match(learner.model, task.examples["test"], "cpu") == pytest.approx(100 * np.mean(right))
    assert any(right)


def test_rouge_takes_the_best_of_several_answers(setting, monkeypatch):
    monkeypatch.setattr("benchmarks.continual.scoring.write_answers", lambda *_: ["the red fox"])
    questions = [Question("", "", ("a blue whale", "the red fox runs"))]
    assert rouge_l(None, questions, setting.tokenizer, 32, "cpu") == pytest.approx(100 * 2 * 1 * 0.75 / 1.75)


def test_widened_rows_are_the_same_rows(setting):
    rows = setting.tasks[0].examples["test"]
    wide = widened(rows, rows.ids.shape[1] + 5, rows.labels.shape[1] + 2, setting.pad)
    assert (wide.ids[:, 5:] == rows.ids).all() and not wide.mask[:, :5].any()
    assert (wide.labels[:, 2:] == rows.labels).all() and (wide.labels[:, :2] == IGNORED).all()


def test_metrics_of_a_known_run():
    matrix = [[80.0], [70.0, 60.0], [75.0, 40.0, 90.0]]
    found = Summary.of(matrix, alone=[80.0, 50.0, 95.0])
    assert found.average_performance == pytest.approx(205 / 3)
    assert found.forgetting == pytest.approx((5 + 20) / 2)
    assert found.backward_transfer == pytest.approx((-5 - 20) / 2)
    assert found.forward_transfer == pytest.approx((10 - 5) / 2)


# ---- methods ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lora", "replay-10", "joint", "oracle", "moelora"])
def test_a_method_learns_and_leaves_the_base_alone(name, setting):
    before = {key: value.clone() for key, value in setting.base.state_dict().items()}
    learner = METHODS[name].make(setting)
    for stage in [2] if learner.is_joint else range(3):
        assert learner.learn(stage) > 0
        assert learner.trainable == pytest.approx(setting.lora_size, rel=0.05)
    with learner.for_task(2):
        assert 0 <= exact_match(learner.model, setting.tasks[2].examples["test"], "cpu") <= 100
    assert learner.stored() >= learner.trainable
    assert all(torch.equal(value, before[key]) for key, value in setting.base.state_dict().items())


def test_old_tasks_keep_their_own_experts_bit_for_bit(setting):
    learner = METHODS["moelora"].make(setting)
    learner.learn(0)
    old = {name: tensor.clone() for name, tensor in learner.model.named_parameters() if ".default" in name}
    learner.learn(1)
    assert old and all(
        torch.equal(tensor, dict(learner.model.named_parameters())[name]) for name, tensor in old.items()
    )
    assert learner.names == ["default", "grown_1"] and list(learner.model.active_adapters) == learner.names


def test_the_last_experts_are_where_the_next_ones_start(setting, monkeypatch):
    starts, grow = [], mixture.grow
    monkeypatch.setattr(
        mixture, "grow", lambda *a, **options: starts.append(options["start_from"]) or grow(*a, **options)
    )
    learner = METHODS["moelora-last"].make(setting)
    for stage in range(3):
        learner.learn(stage)
    assert starts == ["default", "grown_1"]


@torch.no_grad()
def test_where_to_start_is_asked_of_the_answers_in_the_first_batches(setting):
    learner = METHODS["moelora"].make(setting)
    batches = setting.batches([0])
    (asked,) = mixture._questions(batches)
    losses = []
    for step in range(mixture.PROBED):
        ids, labels, mask = batches.batch(step)
        whole = torch.full_like(ids, IGNORED)
        whole[:, -labels.shape[1] :] = labels
        loss = learner.model(input_ids=ids, labels=whole, attention_mask=mask).loss
        losses.append((loss * (whole != IGNORED).sum(), (whole != IGNORED).sum()))
    expected = sum(loss for loss, _ in losses) / sum(count for _, count in losses)
    torch.testing.assert_close(learner.model(**asked).loss, expected)


def test_a_budget_bounds_the_experts(setting):
    """Half of three tasks' four experts: the first two tasks' become two, when the third one's four come."""
    learner = METHODS["moelora-half"].make(setting)
    for stage in range(3):
        learner.learn(stage)
    experts = {name: count_experts(name, config) for name, config in learner.model.peft_config.items()}
    assert sum(experts.values()) == 6 and experts[learner.names[2]] == 4
    assert set(learner.names) == set(learner.model.active_adapters)
    for stage in range(3):
        with learner.told(stage):
            assert list(learner.model.active_adapters) == [learner.names[stage]]


@torch.no_grad()
def test_the_task_that_is_told_is_the_one_whose_expert_answers(setting):
    few = replace(setting, base=telling.with_one_block(setting.base))
    model = telling.knowing(few, tokens=2_000, window=None).eval()
    model.set_adapter(list(model.peft_config))
    (router,) = model.base_model.routing.routers.values()
    for task in few.tasks:
        examples = task.examples["test"]
        likeliest = telling.told(model, examples)
        for row, (ids, labels, mask) in enumerate(zip(examples.ids, examples.labels, examples.mask, strict=True)):
            prompt = torch.from_numpy(ids[mask])[: -int((labels >= 0).sum())]
            weights_TE = router.logits(model.get_input_embeddings()(prompt)[None]).softmax(-1)
            assert weights_TE[-1].argmax() == likeliest["end"][row]
            assert weights_TE[min(16, len(prompt)) - 1].argmax() == likeliest["16"][row]


def test_a_domain_is_learned_from_prompts_without_their_answers(setting):
    batches = setting.batches([0])
    for step, batch in enumerate(prompts(batches)):
        ids, labels, mask = batches.batch(step)
        assert torch.equal(batch["input_ids"], ids)
        for read, all_of_row, answer in zip(batch["attention_mask"], mask, labels, strict=True):
            answered = int((answer >= 0).sum())
            assert answered > 1 and not read[-answered:].any()
            assert torch.equal(read[:-answered], all_of_row[:-answered])


def test_processes_take_the_gpus_that_are_visible_in_turn(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    turn, taken = get_context("spawn").Value("i", 0), []
    for _ in range(3):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
        _choose_gpu(turn)
        taken.append(os.environ["CUDA_VISIBLE_DEVICES"])
    assert taken == ["3", "5", "3"]


# ---- whole runs ------------------------------------------------------------------------------------------------------


def test_costs_are_columns_of_the_table(tmp_path):
    plan = ["--quick", "--methods", "lora", "joint", "--out", str(tmp_path)]
    main([*plan, "--sequences", "order4", "--rates", "1e-3", "--seeds", "1"])
    assert "| lora | no | 1 | 0.001 |" in write(tmp_path)
    lora = next(line for line in write(tmp_path).splitlines() if line.startswith("| lora"))
    assert lora.endswith("|  |  |")
    costs.main([*plan, "--steps", "4", "--repeats", "1"])
    rows = [json.loads(line) for line in (tmp_path / costs.COSTS_FILE).read_text().splitlines()]
    assert [row["method"] for row in rows] == ["lora", "joint"]
    assert all(row["learning"] > 0 and row["ms_a_token"] > 0 for row in rows)
    lora = next(line for line in write(tmp_path).splitlines() if line.startswith("| lora"))
    assert lora.endswith(f"| {rows[0]['learning']:.1f} | {rows[0]['ms_a_token']:.2f} |")


def test_how_well_tasks_are_told_is_kept_by_task(tmp_path, capsys, monkeypatch):
    knowing, windows = telling.knowing, []
    monkeypatch.setattr(telling, "knowing", lambda *given: windows.append(given[-1]) or knowing(*given))
    telling.main(["--quick", "--sequences", "order4", "--tokens", "500", "--out", str(tmp_path)])
    assert windows == [None, 1]
    rows = [json.loads(line) for line in (tmp_path / telling.ROWS_FILE).read_text().splitlines()]
    assert [row["covariance"] for row in rows] == ["texts", "tokens"]
    assert all(len(row["16"]) == len(row["end"]) == len(row["tasks"]) == 3 for row in rows)
    assert "quick order4, 500 tokens, covariance of texts: 100.00% after 16 tokens" in capsys.readouterr().out
    assert (tmp_path / "environment.txt").exists()


def test_a_run_is_not_run_again(tmp_path, capsys):
    arguments = [
        "--quick",
        "--methods",
        "lora",
        "oracle",
        "--sequences",
        "order4",
        "--seeds",
        "2",
        "--out",
        str(tmp_path),
    ]
    main(arguments)
    rows = (tmp_path / "rows.jsonl").read_text()
    assert len(rows.splitlines()) == 2 * (4 + 2)  # four rates, two seeds
    assert "| lora | no | 2 |" in (tmp_path / "table.md").read_text() and (tmp_path / "quick-order4.png").exists()
    main(arguments)
    assert (tmp_path / "rows.jsonl").read_text() == rows


def test_no_time_starts_nothing_and_says_so(tmp_path, capsys):
    main(["--quick", "--methods", "lora", "--budget", "-1", "--out", str(tmp_path)])
    assert "the budget is spent" in capsys.readouterr().out and not (tmp_path / "rows.jsonl").exists()


def test_a_run_that_fails_is_written_down_and_tried_again(tmp_path, monkeypatch):
    monkeypatch.setattr(METHODS["lora"].make, "learn", None)
    arguments = [
        "--quick",
        "--methods",
        "lora",
        "--sequences",
        "order4",
        "--rates",
        "1e-3",
        "--seeds",
        "1",
        "--out",
        str(tmp_path),
    ]
    main(arguments)
    assert "TypeError" in json.loads((tmp_path / "rows.jsonl").read_text())["error"]
    monkeypatch.undo()
    main(arguments)
    assert "matrix" in json.loads((tmp_path / "rows.jsonl").read_text().splitlines()[-1])


def test_the_best_rate_goes_on_to_the_seeds(tmp_path):
    args = parse(["--quick", "--methods", "lora", "--sequences", "order4", "--out", str(tmp_path)])
    results = Results(tmp_path / "rows.jsonl", Plan(args.steps, args.rows, args.rank, args.device))
    trials = list(jobs_of(args, results))
    assert [trial.split for trial in trials] == ["validation"] * 4
    for score, trial in zip([10.0, 30.0, 20.0, 5.0], trials, strict=True):
        results.add(vars(trial) | {"steps": args.steps, "rows": args.rows, "rank": args.rank, "matrix": [[score]]})
    assert list(jobs_of(args, results)) == [Job("quick", "order4", "lora", trials[1].rate, s) for s in range(3)]


def test_recipes_are_compared_on_rows_held_out_from_all_tasks(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(run, "exact_match", lambda model, examples, device: asked.append(len(examples)) or 50.0)
    options = ["--quick", "--held-out", "--methods", "joint", "moelora-last", "--rates", "1e-3", "1e-2", "--seeds", "1"]
    main([*options, "--sequences", "order4", "--out", str(tmp_path)])
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [(row["method"], row["rate"]) for row in rows] == [
        (method, rate) for method in ("joint", "moelora-last") for rate in (1e-3, 1e-2)
    ]
    assert {row["split"] for row in rows} == {"held-out"} and all(len(row["tasks"]) == 3 for row in rows)
    held_out = {len(task.rows["validation"]) for task in quick_tasks()}
    assert set(asked) <= held_out and held_out.isdisjoint(len(task.rows["test"]) for task in quick_tasks())
    table = (tmp_path / "table.md").read_text()
    assert "| joint | 0.01 | 1 | 50.0 |  |" in table and "| moelora-last | 0.001 | 1 | 50.0 | 50.0 |" in table
    assert task_names(Job("quick", "order4", "joint", 1.0, 0, "held-out")) == SEQUENCES["order4"].tasks


def test_processes_make_the_rows_that_one_makes():
    jobs = [Job("quick", "order4", method, 1e-3, 0) for method in ("lora", "moelora", "joint")]
    found = {}
    for number in (1, 2):
        left = list(jobs)
        with Workers(number, Source(None, None), PLAN, float("inf")) as workers:
            found[number] = {}
            for row in workers.run(lambda left=left: list(left)):
                left[:] = [job for job in left if job.method != row["method"]]
                found[number][row["method"]] = row["matrix"]
    assert found[1] == found[2] and len(found[1]) == 3


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass where tasks are learned: one a task, four where a method is slow."""
    clock = [0.0]
    monkeypatch.setattr(workers, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    def attempt(job, source, plan):
        wall = len(task_names(job)) * (4 if job.method == "inflora" else 1)
        clock[0] += wall
        return vars(job) | {"wall": wall}

    monkeypatch.setattr(workers, "attempt", attempt)
    return clock


def test_what_may_not_end_within_the_budget_is_not_started(clock):
    """A run on validation data takes 3 seconds, so one of order 4's 15 tasks takes 15."""
    jobs = [Job("quick", "order4", "lora", 1e-3, 0, split) for split in ("validation", "test")]
    for deadline, left in ((20.0, ["test"]), (3 + 18.0, [])):
        with Workers(1, Source(None, None), PLAN, deadline) as started:
            for row in started.run(lambda: list(jobs)):
                jobs.remove(job_of(row))
        assert [job.split for job in jobs] == left and started.is_late == bool(left)


def test_a_slow_method_leaves_time_to_the_others(clock):
    """After 3 and 12 seconds, 20 are left: enough for 15 tasks of lora, and not of inflora, nor of what is unknown."""
    splits = {"validation": ("inflora", "lora"), "test": ("inflora", "ewc", "lora")}
    jobs = [Job("quick", "order4", method, 1e-3, 0, split) for split, methods in splits.items() for method in methods]
    with Workers(1, Source(None, None), PLAN, deadline=35.0) as started:
        for row in started.run(lambda: list(jobs)):
            jobs.remove(job_of(row))
    assert started.is_late and [job.method for job in jobs] == ["inflora", "ewc"]


def test_the_table_compares_with_learning_alone():
    shared = {"base": "quick", "sequence": "order4", "steps": 1, "rows": 1, "rank": 1, "rate": 1.0, "split": "test"}
    shared |= {"tasks": ["a", "b"], "seconds": [1.0, 3.0], "trainable": 5, "stored": 10}
    rows = [shared | {"method": "lora", "seed": seed, "matrix": [[80.0], [60.0 + seed, 90.0]]} for seed in range(2)] + [
        shared | {"method": "oracle", "seed": 0, "matrix": [[80.0], [80.0, 85.0]]}
    ]
    assert learned_alone(groups(rows)["quick", "order4", 1, 1, 1]["oracle"]) == [80.0, 85.0]
    measured = [shared | {"method": "lora", "learning": 2.04, "ms_a_token": 3.456}]
    line = next(line for line in render(rows, measured).splitlines() if line.startswith("| lora"))
    assert "| 75.2 ± 3.2 | 19.5 ± 6.4 | -19.5 ± 6.4 | 5.0 ± 0.0 | 5 | 10 | 2.0 | 3.46 |" in line


def test_the_table_shows_scores_by_task():
    shared = {"base": "quick", "sequence": "order4", "steps": 1, "rows": 1, "rank": 1, "rate": 1.0, "split": "test"}
    shared |= {"tasks": ["a_long", "b"], "trainable": 5, "stored": 10}
    rows = [shared | {"method": "joint", "seed": seed, "matrix": [[70.0, 80.0 + seed]]} for seed in range(2)]
    rows.append(shared | {"method": "lora", "seed": 0, "matrix": [[1.0], [2.0, 3.0]]})
    assert render(rows).endswith("| after the last task | a | b |\n|---|---|---|\n| joint | 70.0 | 80.5 |\n")
