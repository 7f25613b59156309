"""The continual-learning benchmark on a tiny model."""

import json

import pytest

from benchmarks.growing import novelty
from benchmarks.growing.__main__ import main
from benchmarks.growing.learners import LEARNERS, Grown, Plan, Setting
from benchmarks.growing.table import chosen_runs, forgetting
from benchmarks.quality.quick import quick_base
from moelora.presets import PRESETS

pytestmark = pytest.mark.slow


def test_the_preset_is_what_was_measured():
    setting = Setting(quick_base(), {}, Plan(("a",), 1, 1, "cpu"), 0, 1e-3)
    measured = setting.mixture_config(routing_scale=Grown(setting).scale)
    assert PRESETS["continual"].items() <= vars(measured).items()


def test_every_method_runs_and_what_is_there_is_not_run_again(tmp_path, capsys):
    arguments = ["--quick", "--device", "cpu", "--out", str(tmp_path), "--rates", "1e-2", "--seeds", "1"]
    main([*arguments, "--methods", *LEARNERS])
    table = capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert {row["method"] for row in rows} == set(LEARNERS) and all(f"| {name} |" in table for name in LEARNERS)
    chosen = chosen_runs(rows)
    assert sorted(chosen["lora"][0]) == [0, 1, 2] and sorted(chosen["joint"][0]) == [2]
    assert forgetting(chosen["joint"][0]) is None and isinstance(forgetting(chosen["grown"][0]), float)
    sizes = {name: chosen[name][0][2]["parameters"] for name in ("lora", "grown")}
    assert abs(sizes["lora"] / sizes["grown"] - 1) < 0.1
    main([*arguments, "--methods", *LEARNERS])
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == len(rows)


def test_a_budget_ends_before_it_is_overrun(tmp_path, capsys):
    main(["--quick", "--device", "cpu", "--out", str(tmp_path), "--budget", "0"])
    assert "budget is spent" in capsys.readouterr().out and not (tmp_path / "rows.jsonl").exists()


def test_the_roc_is_of_domains_that_were_not_learned(tmp_path, capsys):
    novelty.main(["--quick", "--device", "cpu", "--out", str(tmp_path), "--domains", "by-1", "by-2"])
    table = capsys.readouterr().out
    assert "| by-1 | yes |" in table and "| by-3 | no |" in table
    assert (tmp_path / "novelty.svg").stat().st_size > 1000
    assert json.loads((tmp_path / "novelty.json").read_text())["learned"] == ["by-1", "by-2"]
