"""Any adapter folder is loaded whole and exactly, or refused with what is wrong; it never touches the base model."""

import json
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file, save_file
from strategies import at_most, examples
from test_persistence import EXPERTS, adapter_state, base_model, logits, trained
from torch import nn

from moelora.cli.commands import main
from moelora.files.atomic_save import checksum

SECONDS = 10
CONFIG, WEIGHTS, ROUTER = "adapter_config.json", "adapter_model.safetensors", "router.safetensors"
KINDS = {"default": {}, "experts": {"names": EXPERTS[:2]}, "module": {"router_scope": "module"},
         "fixed": {"router_type": "fixed"}, "two layers": {"router_hidden_size": 3}}  # fmt: skip
DTYPES = (torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.int64, torch.bool, torch.uint8)
VALUES = (float("nan"), float("inf"), -float("inf"), -3.0, 5.0, 1e30, 0.0)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6)
    | st.sampled_from(["(", "(a+)+$", "all-linear", "MOELORA", "LORA", 10**400, "x" * 1000, "../x", "\x1b[2J"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Of each kind two saves, and what the first computes."""
    place, outputs = tmp_path_factory.mktemp("saved"), {}
    for kind, options in KINDS.items():
        for number in range(2):
            model = trained(**options, lora_alpha=4 + number)
            model.attach_router(nn.Sequential(nn.Linear(16, model.base_model.routing.num_experts), nn.Softmax(-1)))
            model.save_pretrained(place / kind / str(number))
            if number == 0:
                outputs[kind] = logits(model)
    return place, outputs


# ---- mutations -------------------------------------------------------------------------------------------------------


def change_bytes(draw, folder):
    path = folder / draw(st.sampled_from([CONFIG, WEIGHTS, ROUTER]))
    content = bytearray(path.read_bytes())
    start = draw(st.integers(0, len(content)))
    content[start : start + draw(st.integers(0, 40))] = draw(st.binary(max_size=40))
    path.write_bytes(content)


def change_files(draw, folder, other):
    name = draw(st.sampled_from([CONFIG, WEIGHTS, ROUTER]))
    match draw(st.sampled_from(["remove", "swap", "link", "folder", "empty", "add"])):
        case "remove":
            (folder / name).unlink()
        case "swap":
            shutil.copy(other / name, folder / name)
        case "link":
            (folder / name).unlink()
            (folder / name).symlink_to(other / name)
        case "folder":
            (folder / name).unlink()
            (folder / name).mkdir()
        case "empty":
            (folder / name).write_bytes(b"")
        case "add":
            added = draw(st.sampled_from(["router.pt", "adapter_model.bin", ".moelora-save", "run.json"]))
            (folder / added).write_bytes(draw(st.binary(max_size=20)))


def change_tensors(draw, folder):
    """As somebody would who writes the checksums too."""
    settings = json.loads((folder / CONFIG).read_text())
    name = draw(st.sampled_from([WEIGHTS, WEIGHTS, ROUTER]))
    tensors = load_file(folder / name)
    for _ in range(draw(st.integers(1, 3))):
        key = draw(st.sampled_from(sorted(tensors)))
        tensor = tensors[key]
        match draw(st.sampled_from(["drop", "rename", "dtype", "shape", "value", "add"])):
            case "drop" if len(tensors) > 1:
                del tensors[key]
            case "rename":
                old, new = draw(st.sampled_from([("lora_", "lora_x"), ("0", "1"), ("q_proj", "v_proj"), ("A", "B")]))
                tensors[key.replace(old, new)] = tensors.pop(key)
            case "dtype":
                tensors[key] = tensor.to(draw(st.sampled_from(DTYPES)))
            case "shape":
                shapes = [tensor.flatten(), tensor[:0], torch.cat([tensor, tensor]), tensor[..., None]]
                tensors[key] = draw(st.sampled_from(shapes)).contiguous()
            case "value" if tensor.is_floating_point() and tensor.numel():
                tensor.view(-1)[draw(st.integers(0, tensor.numel() - 1))] = draw(st.sampled_from(VALUES))
            case "add":
                base = draw(st.sampled_from(["model.norm.weight", "lm_head.weight", "model.embed_tokens.weight", "x"]))
                prefix = key.partition("/")[0] + "/" if "/" in key else ""
                tensors[f"{prefix}base_model.model.{base}"] = torch.zeros(16)
    save_file(tensors, folder / name, metadata={"format": "pt", "moelora_save": settings["checkpoint"]["id"]})
    settings["checkpoint"]["files"][name] = checksum(load_file(folder / name))
    (folder / CONFIG).write_text(json.dumps(settings))


def change_settings(draw, folder):
    settings = json.loads((folder / CONFIG).read_text())
    for _ in range(draw(st.integers(1, 3))):
        place = settings
        for _ in range(draw(st.integers(0, 3))):
            inner = [v for v in (place.values() if isinstance(place, dict) else place) if isinstance(v, (dict, list))]
            place = draw(st.sampled_from(inner)) if inner else place
        keys = sorted(place) if isinstance(place, dict) else list(range(len(place)))
        if keys:
            place[draw(st.sampled_from(keys))] = draw(ANYTHING)
    (folder / CONFIG).write_text(json.dumps(settings))


# ---- what must hold --------------------------------------------------------------------------------------------------


def load(folder):
    """The model with the adapter, or None where it is refused; the base model is as it was in either case."""
    model = trained()
    base = {key: tensor.clone() for key, tensor in model.state_dict().items() if "lora_" not in key}
    mine = adapter_state(model)
    try:
        model.load_adapter(folder, "loaded")
    except ValueError:
        assert list(model.peft_config) == ["default"]
        state = model.state_dict()
        assert all(torch.equal(state[key], tensor) for key, tensor in (base | mine).items())
        model = None
    if model is not None:
        state = model.state_dict()
        assert all(torch.equal(state[key], tensor) for key, tensor in base.items())
    try:
        loaded = PeftModel.from_pretrained(base_model(), folder)
    except (ValueError, KeyError, TypeError, RecursionError, OSError) as error:  # PEFT reads the type of adapter itself
        assert isinstance(error, ValueError) or "peft" in str(error.__traceback__.tb_next.tb_frame.f_code.co_filename)
        return None
    return loaded


def try_all(folder, out):
    """Load the folder and call the commands that read it; the model, where it loads."""
    with at_most(SECONDS):
        loaded = load(folder)
    for command in (["inspect", folder], ["export", folder, "--expert", "0", "--out", out, "--overwrite"]):
        with at_most(SECONDS):
            assert main(list(map(str, command))) in (0, 2)
    return loaded


@given(st.data())
@examples(0.3, in_make_test=0.1)
def test_files_that_were_changed_are_refused_or_the_same(saved, tmp_path_factory, data):
    place, outputs = saved
    folder = tmp_path_factory.mktemp("changed") / "adapter"
    kind = data.draw(st.sampled_from(sorted(KINDS)))
    shutil.copytree(place / kind / "0", folder)
    changes_bytes = data.draw(st.booleans())
    settings = (folder / CONFIG).read_bytes()
    if changes_bytes:
        change_bytes(data.draw, folder)
    else:
        change_files(data.draw, folder, place / kind / "1")
    loaded = try_all(folder, folder.parent / "out")
    if loaded is not None and (folder / CONFIG).read_bytes() == settings:
        assert torch.equal(logits(loaded), outputs[kind])
    shutil.rmtree(folder.parent)


@given(st.data())
@examples(0.3, in_make_test=0.1)
def test_what_was_written_with_its_checksums_is_refused_or_exactly_that(saved, tmp_path_factory, data):
    place, _ = saved
    folder = tmp_path_factory.mktemp("changed") / "adapter"
    kind = data.draw(st.sampled_from(sorted(KINDS)))
    shutil.copytree(place / kind / "0", folder)
    change = data.draw(st.sampled_from([change_tensors, change_settings]))
    change(data.draw, folder)
    loaded = try_all(folder, folder.parent / "out")
    if loaded is not None:
        held = {key: tensor for key, tensor in loaded.state_dict().items() if "lora_" in key}
        assert len(held) == len(load_file(folder / WEIGHTS))
        assert all(tensor.isfinite().all() for tensor in held.values())
    shutil.rmtree(folder.parent)
