"""Commands that are killed while they write, and two that write to one place: a whole folder or none, no rubbish."""

import hashlib
import json
import multiprocessing
import os
import random
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save
from tiny import DATA, tiny_recipe, write_recipe

from moelora.cli.commands import main

pytestmark = pytest.mark.slow

KILLS = 4
SPARED = {"operation.json", "run.json", "README.md", "training_args.bin"}  # hold times, places or what is no weight
WRITING = {
    "build": ["build", "--expert", "a=lora", "--expert", "b=lora", "--out", "out"],
    "export": ["export", "adapter", "--expert", "0", "--out", "out"],
    "merge-into-base": ["export", "adapter", "--expert", "0", "--merge", "--out", "out"],
    "prune": ["prune", "adapter", "--drop", "0", *DATA, "--out", "out"],
    "merge": ["merge", "adapter", "--experts", "0,1", *DATA, "--out", "out"],
    "distil": ["distil", "adapter", "--r", "2", "--max-tokens", "200", *DATA, "--out", "out"],
    "grow": ["train", "recipe.yaml", "--grow", "adapter"],
}


@pytest.fixture(scope="module")
def server():
    """Starts processes that have imported everything, in milliseconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["moelora.cli.commands", "moelora.experts", "moelora.cli.auto_grow", "datasets"])
    return context


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An adapter, the LoRA of one of its experts, and a recipe by which it grows."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)
    recipe = tiny_recipe(tmp_path)
    recipe["training"] |= {"output_dir": "adapter", "max_steps": 2}
    assert main(["train", str(write_recipe(tmp_path, recipe))]) == 0
    assert main(["export", "adapter", "--expert", "0", "--out", "lora"]) == 0
    recipe["mixture"] = {"num_experts": 2}
    recipe["training"]["output_dir"] = "out"
    write_recipe(tmp_path, recipe)
    return tmp_path


def work(folder, arguments):
    """What a process does: a command, in a folder."""
    torch.set_num_threads(1)
    os.chdir(folder)
    raise SystemExit(main(arguments))


def start(server, folder, arguments):
    process = server.Process(target=work, args=(folder, arguments))
    process.start()
    return process


def finish(server, folder, arguments):
    process = start(server, folder, arguments)
    process.join()
    assert process.exitcode == 0


def content(folder):
    """Checksums of what an adapter or model computes with, whichever save it is; None where there is no folder."""
    if not folder.is_dir():
        return None
    files = [path for path in folder.glob("*") if path.is_file() and path.name not in SPARED]
    return {path.name: hashlib.sha256(_without_id(path)).hexdigest() for path in files}


def _without_id(path):
    """A file's bytes, but for the id that every save has of its own."""
    if path.suffix == ".safetensors":
        return save(load_file(path))
    ids = {"adapter_config.json": {"checkpoint": None}, "references.json": {"save": None}}
    if path.name in ids:
        return json.dumps(json.loads(path.read_text()) | ids[path.name]).encode()
    return path.read_bytes()


def rubbish(folder):
    """Half-written files; a backup is the old folder as it was."""

    def pass_over(error):  # a folder that was renamed meanwhile, and no other error
        if not isinstance(error, FileNotFoundError):
            raise error

    found = []
    for parent, folders, files in os.walk(folder, onerror=pass_over):
        found += [Path(parent, name) for name in folders + files if name.startswith(".") and name.endswith(".tmp")]
    return [path for path in found if ".backup-" not in path.parent.name]


def wait_until(ready, process):
    while not ready() and process.is_alive():
        time.sleep(0.0005)


@pytest.mark.parametrize("name", WRITING)
def test_killed_while_it_writes(server, folder, name):
    out, before = folder / "out", content(folder / "adapter")
    begun = (lambda: (out / "run.json").exists()) if name == "grow" else (lambda: rubbish(folder))
    process = start(server, folder, WRITING[name])
    wait_until(begun, process)
    began = time.perf_counter()
    process.join()
    assert process.exitcode == 0
    duration, expected = time.perf_counter() - began, content(out)
    dice = random.Random(0)
    for _ in range(KILLS):
        shutil.rmtree(out)
        process = start(server, folder, WRITING[name])
        wait_until(begun, process)
        time.sleep(dice.uniform(0, duration))
        process.kill()
        process.join()
        assert content(folder / "adapter") == before
        assert len(rubbish(folder)) <= 2  # of this run, inside the folder and beside it
        if name != "grow":
            assert content(out) in (None, expected)
        elif (out / "adapter_config.json").exists():
            # The Trainer then writes the tokenizer, in place; references are computed last.
            found = content(out)
            assert all(found[file] == expected[file] for file in ("adapter_config.json", "adapter_model.safetensors"))
        finish(server, folder, [*WRITING[name], "--overwrite"])
        assert content(out) == expected and content(folder / "adapter") == before
        assert rubbish(folder) == []


@pytest.mark.parametrize("arguments", [[*WRITING["prune"], "--overwrite"], ["undo", "out"]], ids=["overwrite", "undo"])
def test_killed_while_it_replaces(server, folder, arguments):
    """What was there is there, under its name or another."""
    finish(server, folder, [*WRITING["export"]])
    finish(server, folder, [*WRITING["prune"], "--overwrite"])
    kept = [content(folder / name) for name in ("out", "out.backup-1")]
    for name in ("out", "out.backup-1"):
        shutil.copytree(name, folder / "saved" / name)
    began = time.perf_counter()
    finish(server, folder, arguments)
    duration = time.perf_counter() - began
    dice = random.Random(0)
    for _ in range(KILLS):
        for path in folder.glob("out*"):
            shutil.rmtree(path)
        shutil.copytree("saved", folder, dirs_exist_ok=True)
        process = start(server, folder, arguments)
        time.sleep(dice.uniform(0.8, 1) * duration)
        process.kill()
        process.join()
        found = [content(path) for path in folder.glob("out*")]
        assert all(old in found for old in kept)
        assert content(folder / "out") in (None, *kept)
        finish(server, folder, [*WRITING["prune"], "--overwrite"])
        assert content(folder / "out") == kept[0] and rubbish(folder) == []


@pytest.mark.parametrize("more", [[], ["--overwrite"]], ids=["new", "overwrite"])
@pytest.mark.parametrize("name", ["prune", "grow"])
def test_two_at_once(server, folder, name, more):
    """One wins, or one after the other; never a part of each."""
    calls = [[word.replace("0", number) for word in WRITING[name]] + more for number in "01"]
    if name == "grow":
        calls[1] += ["--set", "mixture.num_experts=3"]
    expected = []
    for call in calls:
        finish(server, folder, call)
        expected.append(content(folder / "out"))
        shutil.rmtree(folder / "out")
    assert expected[0] != expected[1]
    for _ in range(KILLS):
        both = [start(server, folder, call) for call in calls]
        for process in both:
            process.join()
        codes = [process.exitcode for process in both]
        assert 0 in codes and set(codes) <= {0, 2}
        assert more or codes.count(0) == 1
        assert content(folder / "out") in [result for result, code in zip(expected, codes, strict=True) if code == 0]
        assert rubbish(folder) == []
        for path in folder.glob("out*"):
            shutil.rmtree(path)
