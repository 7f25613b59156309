"""GainLoRA, OSF and Progressive Prompts of the continual benchmark, by what their papers claim."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import MistralConfig, MistralForCausalLM

from benchmarks.continual.encoding import END, encode_prompt
from benchmarks.continual.gainlora import NEW, OLD, GainLora, Gates, prompt_tokens
from benchmarks.continual.learner import EncodedTask, Plan, Setting, lora_factors
from benchmarks.continual.methods import METHODS
from benchmarks.continual.osf import Osf
from benchmarks.continual.plain import Lora
from benchmarks.continual.prog_prompt import TOKENS, ProgressivePrompts, Prompted
from benchmarks.continual.quick import quick_base, quick_tasks, quick_tokenizer
from benchmarks.continual.scoring import exact_match, write_answers
from benchmarks.continual.subspace import extended, leading, outside

pytestmark = pytest.mark.slow

RIVALS = ("gainlora", "osf", "prog-prompt")
PAD = 2


@pytest.fixture(scope="module")
def tasks():
    return [EncodedTask.of(task, quick_tokenizer()) for task in quick_tasks()]


def make(make_learner, tasks, base=None, rate=1e-2, **plan):
    plan = {"steps": 10, "rows": 4, "rank": 4, "device": "cpu", **plan}
    torch.manual_seed(0)
    return make_learner(Setting(base or quick_base(), quick_tokenizer(), tasks, Plan(**plan), 0, rate))


@torch.no_grad()
def logits(model, task, **options):
    examples = task.examples["test"]
    model.eval()
    ids, mask = torch.from_numpy(examples.ids), torch.from_numpy(examples.mask)
    return model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=4, **options).logits


def rows(task):
    examples = task.examples["test"]
    return torch.from_numpy(examples.ids), torch.from_numpy(examples.mask)


# ---- all -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RIVALS)
def test_three_tasks_are_learned_and_the_base_stays(name, tasks):
    base = quick_base()
    before = {key: value.clone() for key, value in base.state_dict().items()}
    learner = make(METHODS[name].make, tasks, base)
    wanted = sum(each.numel() for each in learner.setting.lora().parameters() if each.requires_grad)
    for stage in range(3):
        untrained = torch.cat([logits(learner.model, task) for task in tasks]) if stage else None
        assert learner.learn(stage) > 0
        assert abs(learner.trainable / wanted - 1) < 0.1
        for task in range(stage + 1):
            with learner.for_task(task):
                assert 0 <= exact_match(learner.model, tasks[task].examples["test"], "cpu") <= 100
        if untrained is not None:
            assert not torch.equal(untrained, torch.cat([logits(learner.model, task) for task in tasks]))
    assert all(torch.equal(before[key], value) for key, value in base.state_dict().items())
    assert not any(parameter.requires_grad for parameter in base.parameters())


@pytest.mark.parametrize("name", RIVALS)
def test_training_lowers_the_loss_of_a_task(name, tasks):
    learner = make(METHODS[name].make, tasks, steps=30)
    batches = learner.setting.batches([0])
    labels = batches.labels.flatten(0, 1)

    def loss():
        learner.model.eval()
        with torch.no_grad():
            ids, mask = batches.ids.flatten(0, 1), batches.mask.flatten(0, 1)
            return learner.model(
                input_ids=ids, attention_mask=mask, labels=labels, logits_to_keep=labels.shape[1]
            ).loss.item()

    before = loss()
    learner.learn(0)
    assert loss() < before - 0.05


@pytest.mark.parametrize("name", RIVALS)
def test_decoding_writes_what_one_forward_says_with_and_without_a_cache(name, tasks):
    learner = make(METHODS[name].make, tasks)
    for stage in range(2):
        learner.learn(stage)
    model, tokenizer = learner.model.eval(), quick_tokenizer()
    options = {"do_sample": False, "max_new_tokens": 4, "pad_token_id": PAD, "eos_token_id": None}
    for question in tasks[1].questions["test"]:
        ids = torch.tensor([encode_prompt(question, tokenizer, 64)])
        with torch.no_grad():
            written = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
            again = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **options)
            wide = torch.nn.functional.pad(ids, (7, 0), value=PAD)
            padded = model.generate(input_ids=wide, attention_mask=(wide != PAD).long(), **options)[:, 7:]
            said = model(
                input_ids=written, attention_mask=torch.ones_like(written), use_cache=False, logits_to_keep=5
            ).logits[:, :-1]
        assert written.shape[1] == ids.shape[1] + 4
        assert torch.equal(written, again) and torch.equal(written, padded)
        assert torch.equal(said.argmax(dim=-1), written[:, -4:])


@pytest.mark.parametrize("name", RIVALS)
def test_answers_to_rows_of_unlike_length_are_written_together(name, tasks):
    learner = make(METHODS[name].make, tasks)
    learner.learn(0)
    questions = [*tasks[0].questions["test"], *tasks[2].questions["test"]]
    together = write_answers(learner.model, questions, quick_tokenizer(), 64, "cpu", 3)
    alone = [write_answers(learner.model, [each], quick_tokenizer(), 64, "cpu", 3)[0] for each in questions]
    assert together == alone


class HostReads(TorchDispatchMode):
    """Counts operations for which a GPU would have to wait: none can be captured in a CUDA graph."""

    NAMES = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "unique", "_unique2", "equal")

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        self.found[name] += name in self.NAMES or by_mask
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", RIVALS)
def test_a_step_waits_for_the_host_no_more_often_than_loras(name, tasks, monkeypatch):
    found = {}
    for each in ("lora", name):
        learner = make(METHODS[each].make, tasks, steps=1)
        learner.learn(0)
        captured = []

        def step(model, batches, found=captured, **_):
            with HostReads() as reads:
                ids, labels, mask = batches.batch(0)
                model.train()
                model(
                    input_ids=ids, labels=labels, attention_mask=mask, use_cache=False, logits_to_keep=labels.shape[1]
                ).loss.backward()
            found.append(+reads.found)
            return 0.0

        monkeypatch.setattr(learner.setting, "train", step)
        learner.learn(1)
        found[each] = captured[0]
    assert found[name] <= found["lora"]


# ---- subspaces -------------------------------------------------------------------------------------------------------


def test_the_memory_grows_by_the_fewest_directions_that_hold_the_share():
    C = torch.diag(torch.tensor([10.0, 5.0, 2.0, 1.0, 0.1], dtype=torch.float64))  # squares: 100, 25, 4, 1, 0.01

    def grown(memory, epsilon):
        known = {} if memory is None else {"": memory}
        return extended(memory, leading({"": C}, known)[""], epsilon)

    memory = grown(None, 0.95)  # 125 of 130.01 are 0.961
    assert memory.shape == (5, 2) and torch.allclose(memory.abs(), torch.eye(5, dtype=C.dtype)[:, :2], atol=1e-6)
    assert grown(memory, 0.95).shape == (5, 2)
    assert grown(memory, 0.99).shape == (5, 3)
    assert grown(None, 1.0).shape == (5, 5)


def test_directions_are_outside_of_the_memory_the_largest_first():
    C = torch.diag(torch.tensor([10.0, 5.0, 2.0, 0.0], dtype=torch.float64))
    memory = torch.eye(4, dtype=C.dtype)[:, :1]
    found = leading({"": C}, {"": memory})[""]
    assert torch.allclose(found.directions[:, :2].abs(), torch.eye(4, dtype=C.dtype)[:, 1:3], atol=1e-6)
    assert found.total.item() == pytest.approx(29 / 129)
    assert not outside(memory, memory).any()


# ---- GainLoRA --------------------------------------------------------------------------------------------------------


def test_a_new_gate_is_zero_on_what_is_remembered_whatever_it_learns():
    torch.manual_seed(0)
    gates = Gates(width=16, hidden=4)
    old = torch.randn(3, 16)  # all prompts of an old task
    with torch.no_grad():
        moments = [each.t() @ each for each in gates.inputs(old)]
        gates.aim(moments[2])
        before = gates(old)
        gates.remember(moments, share=1 - 1e-5)
        gates.begin()
        assert [memory.shape[1] for memory in gates.memory] == [3, 3, 3]
        new = gates.inputs(torch.randn(64, 16))[2]
        gates.aim(new.t() @ new)
        for change in gates.change:
            change.normal_()
        after = gates(old)
    assert after.shape == (3, 2) and torch.equal(after[:, :1], before)
    assert after[:, 1].max() < 1e-3
    other = gates(torch.randn(64, 16))
    assert other[:, 1].mean() > 0.1 and (other >= 0).all() and (other <= 1).all()


@pytest.fixture(scope="module")
def two_tasks(tasks):
    """GainLoRA and LoRA after two tasks, and both their logits on the first one after each."""
    found = {}
    for name, learner in (("gainlora", make(GainLora, tasks, steps=20)), ("lora", make(Lora, tasks, steps=20))):
        learner.learn(0)
        before = logits(learner.model, tasks[0])
        learner.learn(1)
        found[name] = learner, before, logits(learner.model, tasks[0])
    return found


def test_the_new_gate_is_small_on_old_tasks_and_open_on_its_own(two_tasks, tasks):
    learner = two_tasks["gainlora"][0]
    on_old, on_new = (learner.coefficients(*rows(tasks[stage]))[:, -1] for stage in (0, 1))
    assert on_old.max() < 0.2 and on_new.min() > 0.5  # half a percent of the inputs is not remembered


def test_gates_keep_old_answers_better_than_lora_does(two_tasks):
    moved = {name: (after - before).abs().mean() for name, (_, before, after) in two_tasks.items()}
    assert moved["gainlora"] < 0.3 * moved["lora"]


def test_what_a_branch_reads_is_orthogonal_to_old_inputs_and_is_not_trained(tasks, monkeypatch):
    learner = make(GainLora, tasks)
    learner.learn(0)
    memory = dict(learner.memory)
    designed = {}
    train = learner.setting.train

    def watch(model, batches):
        designed.update({name: A.detach().clone() for name, (A, _) in lora_factors(model, NEW).items()})
        return train(model, batches)

    monkeypatch.setattr(learner.setting, "train", watch)
    learner.learn(1)
    assert len(memory) == 8  # of two blocks: into q, k and v; o; gate and up; down
    for name, (A, B) in lora_factors(learner.model, NEW).items():
        assert torch.equal(A, designed[name]) and B.abs().max() > 0
        source = name.replace("k_proj", "q_proj").replace("v_proj", "q_proj").replace("up_proj", "gate_proj")
        assert memory[source].shape[1] > 0
        assert (A @ memory[source].float()).abs().max() < 1e-5
        lengths = A.norm(dim=1)
        assert ((lengths - 3**-0.5).abs() < 1e-5).logical_or(lengths == 0).all() and lengths[0] > 0


def test_adding_a_branch_changes_no_answer(tasks):
    learner = make(GainLora, tasks)
    for stage in range(2):
        learner.learn(stage)
    before = logits(learner.model, tasks[0])
    learner._add_branch()
    assert torch.allclose(logits(learner.model, tasks[0]), before, atol=1e-6)
    shapes = {(A.shape[0], B.shape[1]) for A, B in lora_factors(learner.model, OLD).values()}
    assert shapes == {(2 * learner.rank, 2 * learner.rank)}


def test_gates_read_the_prompt_and_not_the_answer(tasks):
    tokenizer = quick_tokenizer()
    end = torch.tensor(tokenizer(END)["input_ids"])
    prompt = torch.tensor(tokenizer("ab\nOutput: c\nOutput:")["input_ids"])
    answer = torch.tensor(tokenizer(" x")["input_ids"])
    row = torch.cat([torch.full((3,), PAD), prompt, answer])[None]
    mask = row != PAD
    expected = torch.cat([torch.zeros(3), torch.ones(len(prompt)), torch.zeros(2)]).bool()
    assert torch.equal(prompt_tokens(row, mask, end)[0], expected)
    other = torch.full((1, 12), 30)
    assert prompt_tokens(other, torch.ones_like(other), end).all()  # it says no END: all of it is the prompt

    learner = make(GainLora, tasks)
    learner.learn(0)
    ids, mask = rows(tasks[0])
    without = torch.tensor([encode_prompt(tasks[0].questions["test"][0], tokenizer, 64)])
    kept = learner.coefficients(without, torch.ones_like(without))
    assert torch.allclose(learner.coefficients(ids[:1], mask[:1]), kept, atol=1e-6)


def test_what_gainlora_keeps_is_counted(tasks):
    learner = make(GainLora, tasks)
    sizes = []
    for stage in range(3):
        learner.learn(stage)
        sizes.append(learner.stored())
    linears = [module for module in learner.model.modules() if hasattr(module, "lora_A")]
    branch = learner.rank * sum(each.in_features + each.out_features for each in linears)
    gate = 2 * 32 * 8 + 32
    memories = sum(min(m.shape[1], len(m) - m.shape[1]) * len(m) for m in learner.memory.values())
    memories += sum(memory.numel() for memory in learner.gates.memory)
    assert sizes[2] == 3 * (branch + gate) + memories
    assert learner.trainable == learner.rank * sum(each.out_features for each in linears) + gate


def test_gainlora_has_float32_factors_on_a_bfloat16_base(tasks):
    base = quick_base().bfloat16()
    learner = make(GainLora, tasks, base)
    for stage in range(2):
        learner.learn(stage)
    factors = [each for name in (OLD, NEW) for pair in lora_factors(learner.model, name).values() for each in pair]
    assert len(factors) == 56 and {each.dtype for each in (*factors, *learner.gates.parameters())} == {torch.float32}
    assert base.get_input_embeddings().weight.dtype == torch.bfloat16


# ---- OSF -------------------------------------------------------------------------------------------------------------


def test_osf_trains_the_smallest_directions_and_keeps_the_others(tasks):
    learner = make(Osf, tasks)
    learner.learn(0)
    for name in learner.linears:
        layer = learner.model.get_submodule(f"base_model.model.{name}")
        weight, change = layer.base_layer.weight, layer.get_delta_weight("default").detach()
        U, _, V = torch.linalg.svd(weight, full_matrices=False)
        kept = min(weight.shape) - 4
        inside = U[:, :kept].t() @ change @ V[:kept].t()
        assert change.norm() > 1e-3 and inside.norm() < 0.2 * change.norm()  # a random change has 0.7 or more there


def test_osf_goes_on_from_what_it_learned(tasks, monkeypatch):
    learner = make(Osf, tasks)
    untrained = logits(learner.model, tasks[0])
    learner.learn(0)
    before = logits(learner.model, tasks[0])
    monkeypatch.setattr(learner.setting, "train", lambda model, batches: 0.0)
    learner.learn(1)
    after = logits(learner.model, tasks[0])
    assert torch.allclose(after, before, atol=1e-5) and not torch.allclose(after, untrained, atol=1e-3)
    weights = [learner.model.get_submodule(f"base_model.model.{name}").base_layer.weight for name in learner.linears]
    assert learner.stored() == sum(weight.numel() for weight in weights)


# ---- Progressive Prompts ---------------------------------------------------------------------------------------------


def test_progressive_prompts_told_the_task_forget_nothing(tasks):
    learner = make(ProgressivePrompts, tasks)
    answers = []
    for stage in range(3):
        learner.learn(stage)
        with learner.for_task(stage):
            answers.append(logits(learner.model, tasks[stage]))
        for earlier in range(stage + 1):
            with learner.for_task(earlier):
                assert torch.equal(logits(learner.model, tasks[earlier]), answers[earlier])
        assert learner.stored() == (stage + 1) * TOKENS * 32
    with learner.for_task(2):
        assert not torch.equal(logits(learner.model, tasks[0]), answers[0])
    assert learner.model.used == 3


@pytest.mark.parametrize("window", [None, 8])
def test_new_virtual_tokens_come_before_the_old_ones_and_padding_counts_for_nothing(window):
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    base = MistralForCausalLM(MistralConfig(**shape, num_key_value_heads=2, vocab_size=128, sliding_window=window))
    model = Prompted(base).eval()
    for value in (0.5, -0.5):
        model.kept.append(torch.nn.Parameter(value * torch.randn(3, 32)))
    model.used = 2
    ids = torch.randint(3, 100, (2, 9))
    with torch.no_grad():
        virtual = torch.cat([model.kept[1], model.kept[0]]).expand(2, 6, 32)
        expected = base(inputs_embeds=torch.cat([virtual, base.get_input_embeddings()(ids)], dim=1)).logits
        assert torch.allclose(model(input_ids=ids).logits, expected[:, 6:], atol=1e-5)
        rows = torch.nn.functional.pad(ids, (4, 0), value=PAD)
        mask = torch.arange(13).expand(2, 13) >= 4
        longer = torch.cat([rows, torch.randint(3, 100, (1, 13))])  # beside a row without padding
        padded = model(
            input_ids=longer, attention_mask=torch.cat([mask, torch.ones(1, 13, dtype=torch.bool)]), logits_to_keep=2
        )
    assert torch.allclose(padded.logits[:2], expected[:, -2:], atol=1e-5)
