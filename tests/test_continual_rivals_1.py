"""O-LoRA, InfLoRA, EWC and SLAO do what their papers claim, and nothing to the base."""

from functools import partial

import pytest
import torch

from benchmarks.continual.ewc import Ewc, fisher
from benchmarks.continual.inflora import InfLora
from benchmarks.continual.learner import EncodedTask, Plan, Setting, lora_factors, numbers
from benchmarks.continual.methods import METHODS
from benchmarks.continual.o_lora import OLora
from benchmarks.continual.once import input_covariances, reader, some_rows
from benchmarks.continual.quick import quick_base, quick_tasks, quick_tokenizer
from benchmarks.continual.scoring import write_answers
from benchmarks.continual.slao import Slao
from benchmarks.continual.subspace import extended, leading
from benchmarks.continual.summed import NEW, OLD
from benchmarks.quality.methods import num_trainable
from benchmarks.quality.scoring import score

NAMES = ("o-lora", "inflora", "ewc", "slao")
RANK = 4


@pytest.fixture(scope="module")
def tokenizer():
    return quick_tokenizer()


@pytest.fixture(scope="module")
def tasks(tokenizer):
    return [EncodedTask.of(task, tokenizer) for task in quick_tasks()]


def make(method, tokenizer, tasks, steps=8, device="cpu", base=None):
    torch.manual_seed(0)
    plan = Plan(steps=steps, rows=8, rank=RANK, device=device)
    return method(Setting(base or quick_base(), tokenizer, tasks, plan, seed=0, rate=1e-2))


def factors_of(learner, adapter=NEW):
    return {
        name: tuple(each.detach().clone() for each in pair)
        for name, pair in lora_factors(learner.model, adapter).items()
    }


def flat(learner):
    return torch.cat([each.detach().flatten() for each in learner.parameters])


def loss_of(learner, task, device="cpu"):
    return score(learner.model, task.examples["train"], device).loss


def answers_of(learner, tokenizer, task):
    return write_answers(learner.model, task.questions["test"], tokenizer, task.length, "cpu", new_tokens=3)


@pytest.mark.parametrize("name", NAMES)
def test_three_tasks_are_learned_and_leave_the_base_as_it_was(name, tokenizer, tasks):
    base = quick_base()
    before = [parameter.clone() for parameter in base.parameters()]
    learner = make(METHODS[name].make, tokenizer, tasks, base=base)
    plan = num_trainable(learner.setting.lora())
    said = answers_of(learner, tokenizer, tasks[2])
    for stage, task in enumerate(tasks):
        loss = loss_of(learner, task)
        assert learner.learn(stage) > 0
        assert loss_of(learner, task) < loss
        assert abs(learner.trainable - plan) <= 0.06 * plan
    assert all(map(torch.equal, before, base.parameters()))
    others = [each for key, each in learner.model.named_parameters() if "lora_" not in key]
    assert {each.data_ptr() for each in others} == {each.data_ptr() for each in base.parameters()}
    assert answers_of(learner, tokenizer, tasks[2]) != said


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_steps_are_captured_on_a_gpu(name, tokenizer, tasks):
    learner = make(METHODS[name].make, tokenizer, tasks, device="cuda", base=quick_base().to("cuda", torch.bfloat16))
    for stage, task in enumerate(tasks):
        loss = loss_of(learner, task, "cuda")
        learner.learn(stage)
        assert loss_of(learner, task, "cuda") < loss


# ---- O-LoRA ----------------------------------------------------------------------------------------------------------


def overlap(learner):
    """Mean |cosine| between rows of the first and the second task's A."""
    cosines = []
    for A, _ in lora_factors(learner.model, OLD).values():
        rows = torch.nn.functional.normalize(A.detach(), dim=1)
        cosines.append((rows[:RANK] @ rows[RANK : 2 * RANK].T).abs().mean())
    return torch.stack(cosines).mean().item()


def test_o_lora_learns_in_directions_of_its_own(tokenizer, tasks):
    overlaps = {}
    for weight in (0.0, 0.5):
        learner = make(partial(OLora, lambda_1=weight), tokenizer, tasks, steps=30)
        learner.learn(0)
        learner.learn(1)
        overlaps[weight] = overlap(learner)
    assert overlaps[0.5] < 0.1 * overlaps[0.0], overlaps


def test_o_lora_keeps_old_factors_and_adds_up(tokenizer, tasks):
    learner = make(OLora, tokenizer, tasks)
    learner.learn(0)
    first = factors_of(learner, OLD)
    learner._begin()
    learner.learn_new(1)
    ids = torch.from_numpy(tasks[1].examples["test"].ids)
    with torch.no_grad():
        apart = learner.model(ids).logits
        learner._join()
        joined = learner.model(ids).logits
    torch.testing.assert_close(joined, apart)
    assert learner.model.active_adapters == [OLD]  # one adapter, whatever the number of tasks
    new = factors_of(learner, NEW)
    for name, (A, B) in factors_of(learner, OLD).items():
        assert torch.equal(A, torch.cat([first[name][0], new[name][0]]))
        assert torch.equal(B, torch.cat([first[name][1], new[name][1]], dim=1))
    assert learner.stored() == 2 * learner.trainable


def test_o_lora_sums_absolute_products_of_rows(tokenizer, tasks):
    learner = make(OLora, tokenizer, tasks, steps=2)
    learner.learn(0)
    learner._begin()
    old, new = factors_of(learner, OLD), factors_of(learner, NEW)
    expected = sum((old[name][0] @ A.T).abs().sum() for name, (A, _) in new.items())
    torch.testing.assert_close(learner._penalty()(), 0.5 * expected)


# ---- InfLoRA ---------------------------------------------------------------------------------------------------------


def test_inflora_changes_nothing_for_inputs_of_old_tasks(tokenizer, tasks):
    learner = make(InfLora, tokenizer, tasks)
    learner.learn(0)
    learner.learn(1)
    memory = dict(learner.memory)
    learner.learn(2)
    rank = learner.model.peft_config[NEW].r
    for name, (A, B) in factors_of(learner, OLD).items():
        inputs = memory[reader(name)].float()
        new = B[:, -rank:] @ A[-rank:]
        assert inputs.shape[1] > 0 and (new @ inputs).norm() < 1e-5 * new.norm()


def test_inflora_trains_b_alone_and_remembers_what_it_read(tokenizer, tasks):
    learner = make(InfLora, tokenizer, tasks)
    assert learner.model.peft_config[NEW].r == 8  # B alone, 288 r a block, against 544 * 4 of the plan's LoRA
    designed = leading(input_covariances(learner.model, some_rows(learner.setting, 0), "cpu"), {})
    learner.learn(0)
    for name, (A, B) in factors_of(learner, OLD).items():
        expected = designed[reader(name)].directions[:, :8].T.float() / 3**0.5
        torch.testing.assert_close(A.T @ A, expected.T @ expected)  # up to signs
        assert B.abs().max() > 0
    covariances = input_covariances(learner.model, some_rows(learner.setting, 0), "cpu")
    for name, C in covariances.items():
        base = learner.memory[name]
        torch.testing.assert_close(base.T @ base, torch.eye(base.shape[1], dtype=base.dtype))
        outside = torch.linalg.matrix_norm(C - base @ base.T @ C).square() / torch.linalg.matrix_norm(C).square()
        assert outside <= 0.005 + 1e-9
        shorter = base[:, :-1]
        assert torch.linalg.matrix_norm(C - shorter @ shorter.T @ C).square() > 0.005 * C.square().sum()
    bases = sum(len(each) * min(each.shape[1], len(each) - each.shape[1]) for each in learner.memory.values())
    factors = numbers([each for pair in factors_of(learner, OLD).values() for each in pair])
    assert learner.stored() == factors + bases


def test_inflora_memory_is_a_singular_value_decomposition():
    torch.manual_seed(0)
    x = torch.randn(40, 6, dtype=torch.float64) * torch.tensor([9.0, 5.0, 3.0, 1.0, 0.5, 0.1])
    C, memory = x.T @ x, torch.eye(6, dtype=torch.float64)[:, :2]
    found = leading({"q_proj": C}, {"q_proj": memory})["q_proj"]
    U, S, _ = torch.linalg.svd(C - memory @ memory.T @ C)
    torch.testing.assert_close(found.shares, S.square() / C.square().sum())
    torch.testing.assert_close(found.total, found.shares.sum())
    torch.testing.assert_close((U[:, 0] @ found.directions[:, 0]).abs(), torch.ones((), dtype=torch.float64))
    assert extended(memory, found, 0.5).shape == (6, 2)
    assert extended(memory, found, 1.0).shape == (6, 6)  # not more than there are


def test_inputs_are_those_of_tokens_alone(tokenizer, tasks):
    setting = make(InfLora, tokenizer, tasks).setting
    batches = some_rows(setting, 0)
    assert len(batches) == 3
    found = input_covariances(setting.lora(), batches, "cpu")
    reads = {}
    base = setting.base.model.layers[0].self_attn.q_proj
    hook = base.register_forward_pre_hook(lambda _, inputs: reads.setdefault("x", []).append(inputs[0]))
    for step in range(len(batches)):
        ids, _, mask = batches.batch(step)
        setting.base(ids, attention_mask=mask)
    hook.remove()
    kept = torch.cat([x[mask] for x, mask in zip(reads["x"], batches.mask, strict=True)]).double()
    name = next(name for name in found if name.endswith("layers.0.self_attn.q_proj"))
    torch.testing.assert_close(found[name], kept.T @ kept, rtol=1e-4, atol=1e-4)
    assert {name.rpartition(".")[2] for name in found} == {"q_proj", "o_proj", "gate_proj", "down_proj"}


# ---- EWC -------------------------------------------------------------------------------------------------------------


def test_ewc_moves_less_where_fisher_information_is_large(tokenizer, tasks):
    moved = {}
    for strength in (0.0, 1e6):
        learner = make(partial(Ewc, strength=strength), tokenizer, tasks, steps=20)
        learner.learn(0)
        anchor, order = flat(learner), learner.fisher.argsort()
        learner.learn(1)
        sizes = (flat(learner) - anchor).abs()[order]
        moved[strength] = [quarter.mean().item() for quarter in sizes.chunk(4)]
    kept = [with_it / without for with_it, without in zip(moved[1e6], moved[0.0], strict=True)]
    assert kept[-1] < 0.3 and kept[-1] < 0.5 * kept[0], kept


def test_ewc_finds_the_mean_of_rows_squared_gradients(tokenizer, tasks):
    learner = make(Ewc, tokenizer, tasks)
    learner.learn(0)
    for rows in (1, 2):
        batches = learner.setting.batches([0], steps=4, rows=rows)
        expected = torch.zeros_like(learner.fisher)
        for step in range(4):
            ids, labels, mask = batches.batch(step)
            learner.model.zero_grad()
            learner.model(ids, labels=labels, attention_mask=mask, logits_to_keep=labels.shape[1]).loss.backward()
            expected += rows * torch.cat([each.grad.flatten() for each in learner.parameters]).square() / 4
        torch.testing.assert_close(fisher(learner.model, learner.parameters, batches, "cpu"), expected)
    assert learner.stored() == 2 * learner.fisher.numel() == 2 * learner.trainable


def test_ewc_adds_up_what_tasks_say(tokenizer, tasks):
    learner = make(Ewc, tokenizer, tasks)
    learner.learn(0)
    first = learner.fisher.clone()
    learner.learn(1)
    again = fisher(learner.model, learner.parameters, some_rows(learner.setting, 1), "cpu")
    torch.testing.assert_close(learner.fisher, first + again)


# ---- SLAO ------------------------------------------------------------------------------------------------------------


def test_slao_begins_orthogonally_and_merges_by_its_formula(tokenizer, tasks, monkeypatch):
    learner = make(Slao, tokenizer, tasks)
    train, starts, ends = Setting.train, [], []

    def spy(self, model, *arguments, **options):
        starts.append(factors_of(learner))
        seconds = train(self, model, *arguments, **options)
        ends.append(factors_of(learner))
        return seconds

    monkeypatch.setattr(Setting, "train", spy)
    merged = {name: B for name, (_, B) in factors_of(learner).items()}
    for stage in range(3):
        learner.learn(stage)
        for name, (A, B) in factors_of(learner).items():
            tuned_A, tuned_B = ends[stage][name]
            merged[name] = merged[name] + (tuned_B - merged[name]) / (stage + 1) ** 0.5
            assert torch.equal(A, tuned_A)
            torch.testing.assert_close(B, merged[name])
            if stage:
                first_A, first_B = starts[stage][name]
                last_A, last_B = ends[stage - 1][name]
                torch.testing.assert_close(first_A @ first_A.T, torch.eye(RANK), atol=1e-5, rtol=0)
                torch.testing.assert_close(first_A.T @ first_A @ last_A.T, last_A.T, atol=1e-5, rtol=1e-4)
                assert ((first_A * last_A).sum(dim=1) > 0).all()  # rows keep their sides
                assert torch.equal(first_B, last_B)
    every_B = numbers(list(merged.values()))
    assert learner.stored() == learner.trainable + every_B
