"""An attached router on disk: weights and a name, never code."""

import json
import pickle

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_persistence import EXPERTS, base_model, config, logits, trained
from torch import nn

from moelora.storage.attached_router import AwaitedRouter, describe

WAYS = pytest.mark.parametrize("names", [("default",), EXPERTS[:3]], ids=["default", "experts"])


class Gate(nn.Module):
    def __init__(self, num_experts=3):
        super().__init__()
        self.score = nn.Linear(16, num_experts)

    def forward(self, hidden):
        return self.score(hidden).softmax(-1)


class OtherGate(Gate):
    pass


def stack(num_experts=3):
    return nn.Sequential(
        nn.LayerNorm(16, eps=1e-3),
        nn.Sequential(nn.Linear(16, 7, bias=False), nn.GELU(approximate="tanh"), nn.Dropout(0.25)),
        nn.Linear(7, num_experts),
        nn.Softmax(dim=-1),
    )


def saved_with(folder, router, names=("default",)):
    model = trained(names)
    model.attach_router(router)
    model.save_pretrained(folder)
    return model


@WAYS
def test_a_stack_of_torchs_layers_comes_back_by_itself(tmp_path, names):
    model = trained(names)
    built_in = logits(model)
    model.save_pretrained(tmp_path)  # an old checkpoint without one
    assert torch.equal(logits(PeftModel.from_pretrained(base_model(), tmp_path)), built_in)
    model.attach_router(stack().eval())
    routed = logits(model)
    assert not torch.equal(routed, built_in)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_model(), tmp_path)
    assert torch.equal(logits(loaded), routed)
    assert [type(layer) for layer in loaded.base_model.router.modules()] == [type(m) for m in stack().modules()]
    assert loaded.base_model.router[1][2].p == 0.25 and loaded.base_model.router[0].eps == 1e-3
    loaded.detach_router()
    assert torch.equal(logits(loaded), built_in)
    loaded.save_pretrained(tmp_path)  # without one: the old file must not return
    assert not (tmp_path / "router.safetensors").exists()
    assert torch.equal(logits(PeftModel.from_pretrained(base_model(), tmp_path)), built_in)


@WAYS
def test_a_module_of_the_users_is_given_with_the_call(tmp_path, names):
    model = saved_with(tmp_path, Gate(), names)
    gate = Gate()
    loaded = PeftModel.from_pretrained(base_model(), tmp_path, router=gate)
    assert loaded.base_model.router is gate
    assert torch.equal(logits(loaded), logits(model))


@WAYS
def test_a_module_of_the_users_is_attached_after_loading(tmp_path, names):
    model = saved_with(tmp_path, Gate(), names)
    with pytest.warns(UserWarning, match=r"attached router, test_attached_router_files\.Gate, which is code of yours"):
        loaded = PeftModel.from_pretrained(base_model(), tmp_path)
    with pytest.raises(ValueError, match=r"attached router, test_attached_router_files\.Gate.*attach_router\(module\)"):
        logits(loaded)
    with pytest.raises(ValueError, match=r"score.weight \[3, 16\].*the module's score.weight \[4, 16\]"):
        loaded.attach_router(Gate(4))
    loaded.attach_router(Gate())
    assert torch.equal(logits(loaded), logits(model))


def test_a_module_that_is_attached_before_takes_the_weights(tmp_path):
    model = saved_with(tmp_path, Gate())
    other = get_peft_model(base_model(), config())
    gate = Gate()
    other.attach_router(gate)
    other.load_adapter(tmp_path, "default")
    assert other.base_model.router is gate
    assert torch.equal(logits(other), logits(model))


def test_the_built_in_routers_go_on_where_the_user_says_so(tmp_path):
    model = saved_with(tmp_path, Gate())
    model.detach_router()
    with pytest.warns(UserWarning, match="attached router"):
        loaded = PeftModel.from_pretrained(base_model(), tmp_path)
    loaded.detach_router()
    assert torch.equal(logits(loaded), logits(model))


def test_a_router_that_is_awaited_is_saved_on(tmp_path):
    model = saved_with(tmp_path / "one", Gate())
    with pytest.warns(UserWarning, match="attached router"):
        waiting = PeftModel.from_pretrained(base_model(), tmp_path / "one")
    assert isinstance(waiting.base_model.router, AwaitedRouter)
    waiting.save_pretrained(tmp_path / "two")
    loaded = PeftModel.from_pretrained(base_model(), tmp_path / "two", router=Gate())
    assert torch.equal(logits(loaded), logits(model))


def test_another_class_is_told(tmp_path):
    saved_with(tmp_path, Gate())
    with pytest.warns(UserWarning, match="was a test_attached_router_files.Gate, and a test_attached_router_files.Oth"):
        PeftModel.from_pretrained(base_model(), tmp_path, router=OtherGate())


def test_a_router_is_refused_where_none_was_saved(tmp_path):
    trained().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"`router` \(Gate\) was given.*saved without an attached router"):
        PeftModel.from_pretrained(base_model(), tmp_path, router=Gate())


def test_only_what_torch_builds_alike_describes_itself():
    assert describe(stack(), 3)["layers"]["type"] == "Sequential"
    changed = stack()
    changed[2].forward = lambda hidden: hidden
    hooked = stack()
    hooked.register_forward_hook(lambda *_: None)
    parametrised = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(16, 3)))
    for router in (Gate(), changed, hooked, parametrised):
        assert describe(router, 3)["layers"] is None


def test_state_that_is_no_tensor_is_refused_and_nothing_is_written(tmp_path):
    class Odd(Gate):
        def get_extra_state(self):
            return {"a": 1}

        def set_extra_state(self, state):
            pass

    model = trained()
    model.attach_router(Odd())
    with pytest.raises(ValueError, match="Odd cannot be saved: `_extra_state`"):
        model.save_pretrained(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_router_is_not_saved_with_some_of_its_experts(tmp_path):
    model = trained(EXPERTS[:3])
    model.attach_router(Gate())
    with pytest.warns(UserWarning, match="serves expert_0, expert_1, expert_2 together and is not saved with expert_2"):
        model.save_pretrained(tmp_path, selected_adapters=["expert_2"])
    assert not list(tmp_path.rglob("router*"))


# ---- what strangers make of it ---------------------------------------------------------------------------------------


class Evil:
    """Runs code when it is unpickled."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return exec, (f"open({str(self.target)!r}, 'w').close()",)


class EvilByTorchAlone:
    """The attack of issue 18: nothing but classes that torch itself imports."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        from torch.fx import GraphModule

        return GraphModule.recompile, (self.target,)


def as_old_save(folder):
    """The folder as moelora saved it until November 2026."""
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings.pop("checkpoint")
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    weights = folder / "adapter_model.safetensors"
    save_file(load_file(weights), weights, metadata={"format": "pt"})
    (folder / "router.safetensors").unlink(missing_ok=True)


@pytest.mark.parametrize("in_record", [False, True], ids=["old save", "new save"])
@pytest.mark.parametrize("payload", [Evil, EvilByTorchAlone])
def test_a_pickled_router_runs_nothing(tmp_path, payload, in_record):
    folder, target = tmp_path / "adapter", tmp_path / "owned"
    model = trained()
    model.save_pretrained(folder)
    if not in_record:
        as_old_save(folder)
    (folder / "router.pt").write_bytes(pickle.dumps(payload(target)))
    match = "can run any code" if not in_record else "was not saved with its adapter_config.json"
    with pytest.raises(ValueError, match=match):
        PeftModel.from_pretrained(base_model(), folder)
    other = trained()
    before = logits(other)
    with pytest.raises(ValueError, match=match):
        other.load_adapter(folder, "default")
    with pytest.raises(ValueError, match=match):
        PeftModel.from_pretrained(base_model(), folder, router=Gate())
    assert torch.equal(logits(other), before)
    assert not target.exists()


def test_a_pickled_router_of_old_loads_where_it_is_trusted(tmp_path):
    model = trained()
    model.save_pretrained(tmp_path)
    as_old_save(tmp_path)
    gate = Gate()
    torch.save(gate, tmp_path / "router.pt")
    model.attach_router(gate)
    with pytest.warns(UserWarning, match="runs the code in it"):
        loaded = PeftModel.from_pretrained(base_model(), tmp_path, allow_pickled_router=True)
    assert torch.equal(logits(loaded), logits(model))
    loaded.save_pretrained(tmp_path)
    assert not (tmp_path / "router.pt").exists()
    assert torch.equal(logits(PeftModel.from_pretrained(base_model(), tmp_path, router=Gate())), logits(model))


def with_router_file(folder, change):
    tensors = load_file(folder / "router.safetensors")
    change(tensors)
    save_file(tensors, folder / "router.safetensors", metadata={"format": "pt"})


def with_record(folder, change):
    settings = json.loads((folder / "adapter_config.json").read_text())
    change(settings["checkpoint"])
    (folder / "adapter_config.json").write_text(json.dumps(settings))


def remove(folder):
    (folder / "router.safetensors").unlink()


def redirect(folder):
    (folder / "router.safetensors").rename(folder / "aside")
    save_file({"2.weight": torch.zeros(3, 7)}, folder / "elsewhere")
    (folder / "router.safetensors").symlink_to(folder / "elsewhere")


def replace(folder):
    with_router_file(folder, lambda tensors: tensors["2.weight"].mul_(2))


def truncate(folder):
    path = folder / "router.safetensors"
    path.write_bytes(path.read_bytes()[:-4])


def not_known(folder):
    with_record(folder, lambda record: record["files"].pop("router.safetensors"))


def other_experts(folder):
    with_record(folder, lambda record: record["router"].update(num_experts=4))


def other_layers(folder):
    with_record(folder, lambda record: record["router"]["layers"]["layers"].pop())


def endless_layers(folder):
    layers = {"type": "Sequential", "layers": [{"type": "ReLU"}] * 100}
    with_record(folder, lambda record: record["router"].update(layers=layers))


def huge_layers(folder):
    layers = {"type": "Linear", "in_features": 10**9, "out_features": 10**9, "bias": False}
    with_record(folder, lambda record: record["router"].update(layers=layers))


def foreign_layer(folder):
    with_record(folder, lambda record: record["router"].update(layers={"type": "Bilinear", "in1_features": 1}))


def layers_of_text(folder):
    with_record(folder, lambda record: record["router"].update(layers="Linear"))


def no_description(folder):
    with_record(folder, lambda record: record.pop("router"))


def strange_description(folder):
    with_record(folder, lambda record: record.update(router=[1]))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (remove, "lacks router.safetensors, which was saved with its adapter_config.json"),
        (redirect, "is not what it is described as: its weights are"),
        (replace, "router.safetensors in .* is damaged, or not the one"),
        (truncate, "router.safetensors in .* damaged or truncated"),
        (not_known, "router.safetensors in .* was not saved with its adapter_config.json"),
        (other_experts, "is for 4 experts, and the mixture has 3"),
        (other_layers, "is not what it is described as: its weights are"),
        (endless_layers, "no description of at most 64 layers"),
        (huge_layers, "is not what it is described as"),
        (foreign_layer, "a layer 'Bilinear'; known are Linear"),
        (layers_of_text, "no description of at most 64 layers"),
        (no_description, "is for None experts"),
        (strange_description, "`checkpoint` is not what save_pretrained writes"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_router_that_is_not_the_saved_one_is_refused(tmp_path, damage, reason):
    saved_with(tmp_path, nn.Sequential(nn.LayerNorm(16), nn.SiLU(), nn.Linear(16, 3)))
    (tmp_path / "elsewhere").unlink(missing_ok=True)
    if damage is replace:
        saved_with(tmp_path, stack())
    damage(tmp_path)
    with pytest.raises(ValueError, match=reason):
        PeftModel.from_pretrained(base_model(), tmp_path)
    model = trained()
    before, names = logits(model), list(model.peft_config)
    with pytest.raises(ValueError, match=reason):
        model.load_adapter(tmp_path, "default")
    with pytest.raises(ValueError, match=reason):
        model.load_adapter(tmp_path, "another")
    assert list(model.peft_config) == names
    assert torch.equal(logits(model), before)
    assert model.routing.attached is None
