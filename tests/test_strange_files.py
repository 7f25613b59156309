"""What only a file by a stranger holds: pickles of tensors that are none, routers that do not route, huge numbers."""

import json

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_persistence import base_model, trained
from tiny import DATA, save_tiny_adapter
from torch import nn

from moelora.cli.commands import main
from moelora.files import adapter_files
from moelora.files.atomic_save import checksum

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"

STRANGE_TENSORS = {
    "without numbers": lambda tensor: tensor.to("meta"),
    "sparse": lambda tensor: tensor.to_sparse(),
    "rows": lambda tensor: tensor.to_sparse_csr(),
    "nested": lambda tensor: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
    # One number in the file, more in memory than there are in the file. (A trillion would be summed for hours.)
    "repeated": lambda tensor: torch.zeros(1).expand(tensor.shape),
}


@pytest.mark.parametrize("make", STRANGE_TENSORS.values(), ids=STRANGE_TENSORS)
@pytest.mark.filterwarnings("ignore:.*beta state", "ignore:.*prototype stage")
def test_a_pickle_holds_plain_tensors(tmp_path, make):
    trained().save_pretrained(tmp_path, safe_serialization=False)
    tensors = torch.load(tmp_path / PICKLE)
    key = next(key for key in tensors if "lora_A" in key)
    torch.save(tensors | {key: make(tensors[key])}, tmp_path / PICKLE)
    settings = json.loads((tmp_path / CONFIG).read_text()) | {"checkpoint": None}
    (tmp_path / CONFIG).write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="holds no plain tensors by name"):
        PeftModel.from_pretrained(base_model(), tmp_path)
    model = trained()
    with pytest.raises(ValueError, match="holds no plain tensors by name"):
        model.load_adapter(tmp_path, "another")
    assert list(model.peft_config) == ["default"]


# ---- attached routers ------------------------------------------------------------------------------------------------


def layers(*described, width=16):
    linear = {"type": "Linear", "in_features": width, "out_features": 3, "bias": False}
    return {"type": "Sequential", "layers": [linear, *described]}


def describe_router(folder, described, weight=None):
    """Give an adapter a router whose description and weights agree."""
    settings = json.loads((folder / CONFIG).read_text())
    record = settings["checkpoint"]
    weight = torch.ones(3, 16) if weight is None else weight
    path = folder / "router.safetensors"
    save_file({"0.weight": weight}, path, metadata={"moelora_save": record["id"]})
    record["files"][path.name] = checksum(load_file(path))
    record["router"] = {"class": "Gate", "num_experts": len(weight), "layers": described}
    (folder / CONFIG).write_text(json.dumps(settings))


@pytest.mark.parametrize(
    "described",
    [
        layers({"type": "Softmax", "dim": 9}),
        layers({"type": "Softmax", "dim": "x"}),
        layers({"type": "GELU", "approximate": "x"}),
        layers({"type": "ELU", "alpha": [1]}),
        layers({"type": "LeakyReLU", "negative_slope": "x"}),
        layers({"type": "Softplus", "beta": 0, "threshold": 20}),
        layers({"type": "LayerNorm", "normalized_shape": [5], "eps": 1, "elementwise_affine": False, "bias": False}),
        layers({"type": "RMSNorm", "normalized_shape": [], "eps": 1, "elementwise_affine": False}),
        layers({"type": "RMSNorm", "normalized_shape": [3], "eps": -1e9, "elementwise_affine": False}),
    ],
    ids=str,
)
def test_a_router_whose_layers_do_not_compute_is_refused(tmp_path, described):
    trained().save_pretrained(tmp_path)
    describe_router(tmp_path, described)
    with pytest.raises(ValueError, match="is not what it is described as"):
        PeftModel.from_pretrained(base_model(), tmp_path)


def test_transformers_own_loader_cannot_drop_an_attached_router(tmp_path):
    model = trained()
    model.attach_router(nn.Linear(16, 3))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="saved with an attached router, which only PeftModel"):
        base_model().load_adapter(str(tmp_path))


def test_an_old_adapter_whose_router_cannot_be_asked_for_says_so(tmp_path, monkeypatch):
    trained().save_pretrained(tmp_path)
    save_file(load_file(tmp_path / WEIGHTS), tmp_path / WEIGHTS)
    settings = json.loads((tmp_path / CONFIG).read_text()) | {"checkpoint": None}
    (tmp_path / CONFIG).write_text(json.dumps(settings))

    def download(repository, name, **options):
        if name == "router.pt":
            raise LocalEntryNotFoundError("no network")
        return str(tmp_path / name)

    monkeypatch.setattr(adapter_files, "hf_hub_download", download)
    with pytest.warns(UserWarning, match="the hub could not be asked whether 'some/adapter'"):
        assert adapter_files.read_adapter("some/adapter").pickled_router is None


@pytest.fixture
def folder(tmp_path, monkeypatch):
    save_tiny_adapter(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


COMMANDS = (
    ["generate", "--adapter", "adapter", "--prompt", "a"],
    ["distil", "adapter", "--r", "2", *DATA, "--out", "lora", "--steps", "0"],
    ["report", "--adapter", "adapter", *DATA, "--out", "report.html"],
)


@pytest.mark.parametrize(
    ("described", "weight", "reason"),
    [
        (None, torch.ones(4, 32), "which is code of yours"),
        (layers(width=31), torch.ones(4, 31), "does not route"),
        (layers(width=32), torch.ones(4, 32).double(), "does not route"),
    ],
    ids=["the user's code", "another width", "another dtype"],
)
def test_commands_tell_a_router_that_does_not_route_here(folder, capsys, described, weight, reason):
    if described is not None:
        described["layers"][0]["out_features"] = 4
    describe_router(folder / "adapter", described, weight)
    for command in COMMANDS:
        assert main(command) == 2, command
        assert reason in capsys.readouterr().err


# ---- huge numbers ----------------------------------------------------------------------------------------------------


def test_experts_too_large_to_compute_with_are_told(folder, capsys):
    tensors = load_file(folder / "adapter" / WEIGHTS)
    for key, tensor in tensors.items():
        if "lora_A" in key or "lora_B" in key:
            tensor.fill_(3e38)
    save_file(tensors, folder / "adapter" / WEIGHTS)
    settings = json.loads((folder / "adapter" / CONFIG).read_text())
    settings["checkpoint"]["files"][WEIGHTS] = checksum(load_file(folder / "adapter" / WEIGHTS))
    (folder / "adapter" / CONFIG).write_text(json.dumps(settings))
    assert main(["distil", "adapter", "--r", "2", *DATA, "--out", "lora", "--steps", "0"]) == 2
    assert "too large to be fitted" in capsys.readouterr().err
    weights = "0.25,0.25,0.25,0.25"
    assert main(["export", "adapter", "--mixture", "--weights", weights, "--merge", "--out", "merged"]) == 2
    assert "--merge: NaNs detected in the merged weights" in capsys.readouterr().err
    assert not (folder / "lora").exists() and not (folder / "merged").exists()
