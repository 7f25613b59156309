"""What a stranger's tensors must not do: to the API and to the commands that read adapters."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_persistence import EXPERTS, base_model, logits, trained

from moelora.cli import main
from moelora.files.atomic_save import checksum
from moelora.schema import UserError
from moelora.storage.mixture_files import read_mixture

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LINEAR = "base_model.model.model.layers.0.self_attn.q_proj"
ROUTER = "base_model.model.model.layers.1.moe_router.lora_router"


def with_tensors(folder, change, *, seal):
    """Change the tensors; seal: as if they had been saved so, else as a save of old, which has no checksums."""
    settings = json.loads((folder / CONFIG).read_text())
    tensors = load_file(folder / WEIGHTS)
    prefix = "" if LINEAR + ".lora_A.weight" in tensors else "expert_1/"
    change(tensors, prefix)
    metadata = {"format": "pt"} | ({"moelora_save": settings["checkpoint"]["id"]} if seal else {})
    save_file(tensors, folder / WEIGHTS, metadata=metadata)
    if seal:
        settings["checkpoint"]["files"][WEIGHTS] = checksum(load_file(folder / WEIGHTS))
    else:
        settings["checkpoint"] = None
    (folder / CONFIG).write_text(json.dumps(settings))


def integers(tensors, prefix):
    tensors[f"{prefix}{LINEAR}.lora_A.weight"] = torch.full_like(
        tensors[f"{prefix}{LINEAR}.lora_A.weight"], 10**9, dtype=torch.int32
    )


def float8(tensors, prefix):
    key = f"{prefix}{LINEAR}.lora_B.weight"
    tensors[key] = tensors[key].to(torch.float8_e4m3fn)


def booleans(tensors, prefix):
    tensors[f"{prefix}{ROUTER}.weight"] = tensors[f"{prefix}{ROUTER}.weight"] > 0


def float_counters(tensors, prefix):
    tensors[f"{prefix}{ROUTER}.tokens_per_expert"] = tensors[f"{prefix}{ROUTER}.tokens_per_expert"].float()


def negative_counters(tensors, prefix):
    tensors[f"{prefix}{ROUTER}.tokens_per_expert"] -= 10**6


def too_mature(tensors, prefix):
    tensors[f"{prefix}{ROUTER}.maturity"].fill_(5)


def less_than_new(tensors, prefix):
    tensors[f"{prefix}{ROUTER}.maturity"].fill_(-3)


def beyond_float32(tensors, prefix):
    key = f"{prefix}{LINEAR}.lora_A.weight"
    tensors[key] = torch.full_like(tensors[key], 1e300, dtype=torch.float64)


def nan(tensors, prefix):
    tensors[f"{prefix}{LINEAR}.lora_B.weight"][0, 0] = torch.nan


def infinite(tensors, prefix):
    tensors[f"{prefix}{ROUTER}.weight"][0, 0] = -torch.inf


def two_infinities(tensors, prefix):
    tensors[f"{prefix}{ROUTER}.weight"][0, :2] = torch.tensor([torch.inf, -torch.inf])


def half(tensors, prefix):
    for key in [key for key in tensors if "layers.1" in key]:
        del tensors[key]


def half_a_linear(tensors, prefix):
    del tensors[f"{prefix}{LINEAR}.lora_B.weight"]


def no_router(tensors, prefix):
    for key in [key for key in tensors if key.startswith(prefix + ROUTER)]:
        del tensors[key]


def router_only(tensors, prefix):
    for key in [key for key in tensors if "lora_A" in key or "lora_B" in key]:
        del tensors[key]


def empty_factors(tensors, prefix):
    for side, shape in (("A", (0, 16)), ("B", (16, 0))):
        tensors[f"{prefix}{LINEAR}.lora_{side}.weight"] = torch.zeros(shape)


def empty_input(tensors, prefix):
    key = f"{prefix}{LINEAR}.lora_A.weight"
    tensors[key] = torch.zeros(tensors[key].shape[0], 0)


def flat(tensors, prefix):
    key = f"{prefix}{LINEAR}.lora_A.weight"
    tensors[key] = tensors[key].flatten()


def other_rank(tensors, prefix):
    for side in "AB":
        key = f"{prefix}{LINEAR}.lora_{side}.weight"
        tensors[key] = torch.cat([tensors[key]] * 2, dim="AB".index(side))


def other_experts(tensors, prefix):
    key = f"{prefix}{ROUTER}.weight"
    tensors[key] = torch.cat([tensors[key]] * 2)


def of_the_base(name):
    def change(tensors, prefix):
        tensors[f"{prefix}base_model.model.{name}"] = torch.zeros(16)

    change.__name__ = name
    return change


def embeddings(name):
    def change(tensors, prefix):
        tensors[f"{prefix}base_model.model.{name}"] = torch.zeros(40, 16)

    change.__name__ = name
    return change


TENSORS = [
    (integers, "holds int32, not float32"),
    (float8, "holds float8_e4m3fn, not float32"),
    (booleans, "holds bool, not float32"),
    (float_counters, "holds float32, not int64"),
    (negative_counters, "has negative numbers"),
    (too_mature, r"a maturity lies in \[0, 1\]"),
    (less_than_new, r"a maturity lies in \[0, 1\]"),
    (beyond_float32, "has numbers beyond float32"),
    (nan, "lora_B.weight` of .* is not finite"),
    (infinite, "weight` of .* is not finite"),
    (two_infinities, "weight` of .* is not finite"),
    (half_a_linear, "lacks half of|lora_B.weight' of adapter .* is missing"),
    (no_router, "no router|is missing"),
    (router_only, "lacks experts or routers|is missing"),
    (empty_factors, r"\[0, 16\] and|has shape \[0, 16\]"),
    (empty_input, r", 0\] and|has shape \[\d, 0\]"),
    (flat, r"the factors of|has shape"),
    (other_rank, r"not \[\d, in\] and|has shape"),
    (other_experts, r"has shape \[\d, 16\], the model \[\d, 16\]"),
    (of_the_base("model.norm.weight"), "is no part of a mixture|has no place in the model"),
    (of_the_base("model.layers.0.self_attn.q_proj.base_layer.weight"), "is no part of a mixture|has no place"),
    (of_the_base("model.layers.0.input_layernorm.weight"), "is no part of a mixture|has no place"),
]
WAYS = pytest.mark.parametrize(("kind", "seal"), [("default", True), ("experts", False)])


@pytest.fixture(scope="module")
def saves(tmp_path_factory):
    """A function that puts a save of a kind into a folder: one adapter of three experts, or two expert by expert."""
    root = tmp_path_factory.mktemp("saves")
    for kind, names in (("default", ("default",)), ("experts", EXPERTS[:2])):
        trained(names).save_pretrained(root / kind)
    return lambda kind, folder: shutil.copytree(root / kind, folder, dirs_exist_ok=True)


@pytest.fixture(scope="module")
def model():
    """A mixture that no strange tensor may change."""
    return trained()


def assert_refused_and_unchanged(model, folder, reason):
    with pytest.raises(ValueError, match=reason):
        PeftModel.from_pretrained(base_model(), folder)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    for name in ("default", "another"):
        with pytest.raises(ValueError, match=reason):
            model.load_adapter(folder, name)
    assert list(model.peft_config) == ["default"]
    after = model.state_dict()
    assert after.keys() == state.keys() and all(torch.equal(after[key], state[key]) for key in state)


WAYS_OF_TENSORS = [("default", True, *case) for case in TENSORS] + [("experts", False, *case) for case in TENSORS[::4]]
"""The other way of saving has other names, for which a few cases are enough."""


@pytest.mark.parametrize(
    ("kind", "seal", "change", "reason"),
    WAYS_OF_TENSORS,
    ids=[f"{kind}-{change.__name__}" for kind, _, change, _ in WAYS_OF_TENSORS],
)
def test_tensors_that_are_none_of_a_mixtures_are_refused(saves, model, tmp_path, capsys, kind, seal, change, reason):
    saves(kind, tmp_path)
    with_tensors(tmp_path, change, seal=seal)
    assert_refused_and_unchanged(model, tmp_path, reason)
    with pytest.raises(UserError, match=reason):
        read_mixture(tmp_path)
    for command in (["inspect", str(tmp_path)], ["export", str(tmp_path), "--expert", "0", "--out", "out"]):
        assert main(command) == 2
        assert "Traceback" not in capsys.readouterr().err


@WAYS
@pytest.mark.parametrize("layer", ["lm_head.weight", "model.embed_tokens.weight"])
def test_embeddings_replace_the_bases_only_where_the_user_says_so(saves, model, tmp_path, kind, seal, layer):
    saves(kind, tmp_path)
    with_tensors(tmp_path, embeddings(layer), seal=seal)
    assert_refused_and_unchanged(model, tmp_path, f"{layer}' would replace the base model's own embeddings, for good")
    loaded = PeftModel.from_pretrained(base_model(), tmp_path, load_embedding_layers=True)
    assert loaded.get_base_model().get_parameter(layer).count_nonzero() == 0
    with pytest.raises(UserError, match="no part of its experts' factors"):
        raise_of_export(tmp_path)


def raise_of_export(folder):
    from moelora.experts.exporting import to_lora_mixture

    adapters = read_mixture(folder)
    try:
        to_lora_mixture(adapters, [1.0] * sum(adapter.num_experts for adapter in adapters))
    except ValueError as error:
        raise UserError(str(error)) from error


def test_embeddings_that_are_the_bases_own_load(tmp_path):
    model = trained()
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    assert any("lm_head" in key for key in load_file(tmp_path / WEIGHTS))
    assert torch.equal(logits(PeftModel.from_pretrained(base_model(), tmp_path)), logits(model))


def test_an_old_save_that_lacks_blocks_is_found_out_where_the_base_is_at_hand(tmp_path, capsys):
    """The files alone do not tell: a save of old says nothing of how much was saved."""
    base_model().save_pretrained(tmp_path / "base")
    folder = tmp_path / "adapter"
    trained().save_pretrained(folder)
    settings = json.loads((folder / CONFIG).read_text()) | {"base_model_name_or_path": str(tmp_path / "base")}
    (folder / CONFIG).write_text(json.dumps(settings))
    shutil.copytree(folder, tmp_path / "sealed")
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    with_tensors(folder, half, seal=False)
    assert main(["inspect", str(folder)]) == 2
    assert "is missing" in capsys.readouterr().err
    assert main(["export", str(folder), "--expert", "0", "--out", str(tmp_path / "out")]) == 2
    assert "is missing" in capsys.readouterr().err
    save_file(load_file(folder / WEIGHTS), tmp_path / "sealed" / WEIGHTS, metadata={"format": "pt"})
    assert main(["inspect", str(tmp_path / "sealed")]) == 2
    assert "is damaged" in capsys.readouterr().err
