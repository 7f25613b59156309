"""Adding experts to a trained mixture, before training and in the middle of it."""

import pytest
import torch
from helpers import ARCHITECTURES, mixture_of, train_step
from loras import save_kinds
from test_domain_classifier import LOW, texts
from transformers import Trainer, TrainingArguments

from moelora.experts import GrowthCallback, build, grow


class Rows(torch.utils.data.Dataset):
    def __init__(self):
        self.ids = texts(LOW, rows=64, length=8)["input_ids"]

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def own(model, name):
    return {key: p for key, p in model.named_parameters() if name in key.split(".") and "lora_" in key}


def state_of(model, name):
    return {key: value.clone() for key, value in model.state_dict().items() if name in key.split(".")}


def trainer_of(model, folder, **options):
    defaults = {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "save_steps": 4,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    torch.manual_seed(0)
    return Trainer(model=model, args=TrainingArguments(**(defaults | options)), train_dataset=Rows())


def test_new_experts_are_new_and_the_others_stay():
    model = mixture_of("llama")
    model.set_expert_maturity("default", 1.0)
    before = state_of(model, "default")
    assert grow(model, 3) == "grown_1"
    assert model.active_adapters == ["default", "grown_1"]
    assert model.expert_maturity.tolist() == [1.0] * 4 + [0.0] * 3
    assert all(torch.equal(value, before[key]) for key, value in state_of(model, "default").items())
    assert not any(p.requires_grad for p in own(model, "default").values())
    assert all(p.requires_grad for p in own(model, "grown_1").values())


@pytest.mark.parametrize("experts", [True, False])
@pytest.mark.parametrize("scores", [True, False])
def test_what_is_frozen_stays_and_the_rest_learns(experts, scores):
    model = mixture_of("llama", router_type="learned_with_maturity")
    grow(model, freeze_experts=experts, freeze_scores=scores)
    before = state_of(model, "default")
    ids = texts(LOW)["input_ids"]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):  # the new experts' first step is of B alone
        train_step(model, {"input_ids": ids, "labels": ids})
        optimizer.step()
    changed = {key for key, value in state_of(model, "default").items() if not torch.equal(value, before[key])}
    assert any("lora_A" in key for key in changed) != experts
    assert any("lora_router" in key for key in changed) != scores


def test_a_change_may_concern_the_new_experts_alone():
    model = mixture_of("llama")
    grow(model, 2, name="small", r=1, lora_alpha=3)
    assert model.peft_config["small"].r == 1 and model.peft_config["default"].r == 2
    with pytest.raises(ValueError, match=r"`router_scope` \('module'\) is 'block'"):
        grow(model, router_scope="module")
    with pytest.raises(ValueError, match=r"`name` \('small'\) is taken"):
        grow(model, name="small")
    assert list(model.peft_config) == ["default", "small"]


def test_a_mixture_of_imported_loras_grows_by_as_many_experts_as_asked(tmp_path):
    loras = save_kinds(tmp_path, ["plain", "rslora"])
    model = build(ARCHITECTURES["llama"].build(), loras, "train")
    grow(model, 3)
    assert model.base_model.routing.num_experts == 2 + 3
    grow(model)  # as the first adapter, which holds one
    grow(model, 1)
    assert model.base_model.routing.num_experts == 2 + 3 + 1 + 1


def test_a_name_that_holds_one_expert_takes_no_more():
    model = mixture_of("llama", experts=True)
    with pytest.raises(ValueError, match=r"`name` \('expert_9'\) holds one expert, and `num_experts` is 3"):
        grow(model, 3, name="expert_9")
    assert "expert_9" not in model.peft_config
    before = model.base_model.routing.num_experts
    grow(model, name="expert_9")
    grow(model)
    assert model.base_model.routing.num_experts == before + 2
    with pytest.raises(ValueError, match=r"`num_experts` \(0\) is not valid"):
        grow(model, 0)


def test_in_the_middle_of_training_the_optimizer_learns_of_it_and_forgets_nothing(tmp_path):
    model = mixture_of("llama")
    trainer = trainer_of(model, tmp_path, lr_scheduler_type="linear", weight_decay=0.1)
    GrowthCallback(trainer, step=3, num_experts=3, freeze_experts=False, freeze_scores=False)
    trainer.train()
    groups = trainer.optimizer.param_groups
    assert len(groups) == 2 and groups[0]["lr"] == groups[1]["lr"]
    state = trainer.optimizer.state
    assert {int(state[p]["step"]) for p in own(model, "default").values()} == {6}
    assert {int(state[p]["step"]) for p in own(model, "grown_1").values()} == {3}
    assert all(p.abs().max() > 0 for key, p in own(model, "grown_1").items() if "lora_B" in key)


def test_a_new_parameter_joins_the_group_of_its_counterpart():
    model = mixture_of("llama")
    kinds = ("lora_A", "lora_B", "lora_router")
    groups = [{"params": [p for key, p in own(model, "default").items() if kind in key], "lr": lr}
              for kind, lr in zip(kinds, (1e-3, 4e-3, 1e-2), strict=True)]  # fmt: skip
    optimizer = torch.optim.AdamW(groups)
    grow(model, optimizer=optimizer)
    for kind, group in zip(kinds, optimizer.param_groups, strict=True):
        members = {id(p) for p in group["params"]}
        assert members == {id(p) for key, p in model.named_parameters() if kind in key}


@pytest.mark.parametrize("grown_at", [3, 5], ids=["resumed after growing", "resumed before growing"])
def test_a_run_that_grows_resumes_as_if_never_stopped(tmp_path, grown_at):
    def run(folder, steps, resume=None):
        trainer = trainer_of(mixture_of("llama"), folder, max_steps=8, save_steps=steps, data_seed=1)
        GrowthCallback(trainer, step=grown_at, num_experts=3, freeze_experts=False)
        trainer.train(resume_from_checkpoint=resume)
        return trainer.model

    torch.manual_seed(0)
    straight = run(tmp_path / "a", 4)
    resumed = run(tmp_path / "b", 8, resume=str(tmp_path / "a" / "checkpoint-4"))
    assert resumed.active_adapters == ["default", "grown_1"]
    for name in resumed.active_adapters:
        mine, theirs = state_of(straight, name), state_of(resumed, name)
        assert mine.keys() == theirs.keys()
        for key, value in theirs.items():
            torch.testing.assert_close(value, mine[key], rtol=1e-5, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")


def test_resuming_without_the_callback_is_an_error(tmp_path):
    trainer = trainer_of(mixture_of("llama"), tmp_path)
    GrowthCallback(trainer, step=3)
    trainer.train()
    with pytest.raises(ValueError, match="group"):
        trainer_of(mixture_of("llama"), tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_an_optimizer_of_something_else_is_refused():
    model = mixture_of("llama")
    stranger = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(ValueError, match="trains no parameter of this model"):
        grow(model, optimizer=stranger)
    assert model.active_adapters == ["default"]
