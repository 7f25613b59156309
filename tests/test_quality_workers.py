"""How the quality benchmark shares its methods among processes."""

import json
import time

import pytest

from benchmarks.quality.__main__ import AGAIN, claimed, data_line, jobs_of, parse, supervise
from benchmarks.quality.methods import MAIN, SETTINGS, method_of, names_of

pytestmark = pytest.mark.slow


def test_methods_over_the_oracle_follow_it():
    assert jobs_of(["xlora", "lora", "oracle", "arrow"]) == [["lora"], ["oracle", "xlora", "arrow"]]
    assert jobs_of(["arrow", "lora"]) == [["arrow"], ["lora"]]


def test_the_record_of_a_run_tells_its_data(tmp_path):
    (tmp_path / "manifest.json").write_text("{}")
    known = parse(["--device", "cpu", "--data", str(tmp_path)])
    sha256 = "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"  # of {}, by sha256sum
    assert data_line(known) == [f"data: manifest.json of sha256 {sha256}"]
    assert data_line(parse(["--device", "cpu", "--data", str(tmp_path / "none")])) == []


def test_a_group_stands_for_its_methods():
    names = names_of(parse(["--device", "cpu", "--methods", "ours", "main", "settings"]).methods)
    assert len(names) == len(set(names)) and set(names) == {*MAIN, *SETTINGS} and names[0] == "ours"
    assert all(method_of(name) for name in names)


def test_workers_share_the_jobs(tmp_path):
    jobs = [["lora"], ["oracle", "arrow"], ["ours"]]
    first, second = (claimed(jobs, tmp_path, worker) for worker in (0, 1))
    assert [next(first), next(second), next(second), list(first)] == [jobs[0], jobs[1], jobs[2], []]
    assert list(claimed(jobs, tmp_path, 1)) == jobs[1:]  # started anew


def test_a_run_of_two_workers_is_whole_and_has_nothing_twice(tmp_path):
    names = ["frozen", "lora", "ours"]
    arguments = ["--device", "cpu", "--quick", "--seeds", "1", "--workers", "2", "--out", str(tmp_path)]
    assert supervise(parse([*arguments, "--methods", *names]), [*arguments, "--methods", *names], time.monotonic()) == 0
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert {row["method"] for row in rows if row["split"] == "test"} == set(names)
    assert len({(row["method"], row["split"], row["lr"], row["seed"]) for row in rows}) == len(rows)


def test_a_worker_that_lost_its_device_is_started_anew(monkeypatch):
    commands, statuses = [], [AGAIN, 3]

    class Process:
        def __init__(self, command, env):
            commands.append(command)
            self.returncode = statuses.pop(0)

        def poll(self):
            return self.returncode

    monkeypatch.setattr("subprocess.Popen", Process)
    arguments = ["--device", "cpu", "--quick", "--retry", "--budget", "60"]
    assert supervise(parse([*arguments, "--workers", "1"]), arguments, time.monotonic()) == 3
    assert ["--retry" in command for command in commands] == [True, False]
    first, second = (parse(command[3:]) for command in commands)
    assert (
        first.claims == second.claims and first.worker == second.worker == 0 and 0 < second.budget < first.budget < 60
    )
