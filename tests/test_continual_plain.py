"""LoRA with replay, jointly, and one for each task in the continual benchmark: what each of them reads and keeps."""

from collections import Counter

import pytest
import torch

from benchmarks.continual.learner import EncodedTask, Plan, Setting, lora_factors
from benchmarks.continual.plain import Joint, Lora, PerTask
from benchmarks.continual.quick import quick_base, quick_tasks, quick_tokenizer

pytestmark = pytest.mark.slow
PAD = 2


@pytest.fixture(scope="module")
def tasks():
    return [EncodedTask.of(task, quick_tokenizer()) for task in quick_tasks()]


def make(make_learner, tasks, **plan):
    plan = {"steps": 10, "rows": 4, "rank": 4, "device": "cpu", **plan}
    torch.manual_seed(0)
    return make_learner(Setting(quick_base(), quick_tokenizer(), tasks, Plan(**plan), 0, 1e-2))


@torch.no_grad()
def logits(model, task):
    examples = task.examples["test"]
    model.eval()
    ids, mask = torch.from_numpy(examples.ids), torch.from_numpy(examples.mask)
    return model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=4).logits


def rows_of(examples, count=None):
    return {tuple(row[row != PAD].tolist()) for row in examples.ids[:count]}


def test_replay_draws_from_the_rows_that_are_kept_and_no_others(tasks):
    learner = make(lambda setting: Lora(setting, replayed=0.1), tasks, steps=40, rows=10)
    train = [task.examples["train"] for task in tasks]
    kept = set().union(*(rows_of(each, round(0.1 * len(each))) for each in train[:2]))
    new = rows_of(train[2])
    batches = learner.batches(2)
    assert batches.ids.shape[1] == 10
    drawn = [[tuple(row[row != PAD].tolist()) for row in batch] for batch in batches.ids]
    assert all(row in new for batch in drawn for row in batch[:9])
    replayed = {batch[9] for batch in drawn}
    assert replayed == kept and not kept & new
    assert learner.batches(0).ids.shape[1] == 10


def test_joint_training_sees_all_tasks_in_equal_shares(tasks):
    learner = make(Joint, tasks, steps=6, rows=6)
    batches = learner.batches(2)
    assert len(batches) == 3 * 6
    owners = {row: number for number, task in enumerate(tasks) for row in rows_of(task.examples["train"])}
    drawn = Counter(owners[tuple(row[row != PAD].tolist())] for row in batches.ids.flatten(0, 1))
    assert drawn == {0: 36, 1: 36, 2: 36}


def test_the_oracles_other_loras_stay_bit_for_bit(tasks):
    learner = make(PerTask, tasks)
    learner.learn(0)
    first = [each.clone() for pair in lora_factors(learner.model).values() for each in pair]
    with learner.for_task(0):
        before = logits(learner.model, tasks[0])
    learner.learn(1)
    assert all(map(torch.equal, first, [each for pair in lora_factors(learner.model).values() for each in pair]))
    with learner.for_task(0):
        assert torch.equal(logits(learner.model, tasks[0]), before)
    with learner.for_task(1):
        assert not torch.equal(logits(learner.model, tasks[0]), before)
    with learner.for_task(2):  # not learned
        assert torch.allclose(logits(learner.model, tasks[0]), logits(quick_base(), tasks[0]), atol=1e-6)
