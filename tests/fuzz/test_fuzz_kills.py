"""Savers that are killed at any moment, and readers beside them: the folder is always one whole save."""

import os
import random
import signal
import time

import pytest
import torch
from peft import PeftModel
from strategies import FUZZ
from test_atomic_save import variant
from test_persistence import base_model, logits

from moelora.storage.mixture_files import read_mixture

LONGEST = 0.2  # seconds until the kill, in which a few saves may end


def saving_process(models, folder, first):
    """A child that saves one model after the other until it is killed: its id."""
    if child := os.fork():
        return child
    try:
        torch.set_num_threads(1)
        turn = first
        while True:
            models[turn % len(models)].save_pretrained(folder, save_embedding_layers=False)
            turn += 1
    finally:
        os._exit(1)  # it was not killed: it failed


def loaded_logits(folder):
    return logits(PeftModel.from_pretrained(base_model(), folder))


def kill(children):
    for child in children:
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status)


WRITERS = pytest.mark.parametrize("writers", [1, 2])
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(0),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
]


@WRITERS
def test_kills_at_random_leave_one_of_the_saves(tmp_path, writers):
    models = [variant(0), variant(1)]
    expected = [logits(model) for model in models]
    folder, chance, found = tmp_path / "adapter", random.Random(writers), set()
    models[0].save_pretrained(folder)
    for _ in range(max(10, FUZZ // 16)):
        children = [saving_process(models, folder, chance.randrange(2)) for _ in range(writers)]
        time.sleep(chance.random() * LONGEST)
        kill(children)
        outputs = loaded_logits(folder)
        which = [number for number, each in enumerate(expected) if torch.equal(outputs, each)]
        assert which, "neither of the saves"
        read_mixture(folder)
        found |= set(which)
    assert found == {0, 1}, "the kills came all too early"


@WRITERS
def test_a_reader_beside_writers_gets_one_of_the_saves(tmp_path, writers):
    """Or is told: from_pretrained reads the configuration first, and the writers here never pause."""
    models = [variant(0), variant(1)]
    expected = [logits(model) for model in models]
    folder, wanted, found, refused = tmp_path / "adapter", max(10, FUZZ // 16), 0, 0
    models[0].save_pretrained(folder)
    children = [saving_process(models, folder, number) for number in range(writers)]
    try:
        while found < wanted and refused < 100 * wanted:
            try:
                outputs = loaded_logits(folder)
            except ValueError as error:
                assert "while it was being read" in str(error) or "without a pause" in str(error), error
                refused += 1
                continue
            assert any(torch.equal(outputs, each) for each in expected)
            found += 1
    finally:
        kill(children)
    assert found == wanted
