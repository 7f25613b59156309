"""axolotl trains a mixture from its own YAML. `make tools-test` installs the release that the plug-in knows."""

import inspect
import json

import pytest
import torch
import yaml
from peft import PeftModel
from tool import logits, start
from transformers import AutoModelForCausalLM

from moelora.schema import RecipeError

axolotl = pytest.importorskip("axolotl")
pytestmark = pytest.mark.tools

from axolotl.cli.config import load_cfg  # noqa: E402
from axolotl.cli.merge_lora import do_cli as merge_lora  # noqa: E402
from axolotl.integrations import base  # noqa: E402
from axolotl.loaders import adapter as loading  # noqa: E402
from axolotl.utils.schemas.config import AxolotlInputConfig  # noqa: E402

from moelora.integrations.axolotl import LORA_OPTIONS, REFUSED, VERSIONS, MoELoraPlugin  # noqa: E402

PARAMETERS = {
    "register": ["self", "cfg"],
    "get_input_args": ["self"],
    "get_adapter_capabilities": ["self"],
    "load_adapter": ["self", "model", "cfg", "inference", "config_only"],
    "add_callbacks_pre_trainer": ["self", "cfg", "model"],
}


def recipe(place, out, **changes):
    settings = {
        "base_model": str(place / "model"),
        "plugins": ["moelora.integrations.axolotl.MoELoraPlugin"],
        "adapter": "moelora",
        "moelora": {"num_experts": 3, "top_k_experts": 2},
        "lora_r": 4,
        "lora_alpha": 8,
        "lora_target_linear": True,
        "datasets": [{"path": str(place / "data.jsonl"), "ds_type": "json", "type": "completion"}],
        "output_dir": str(out),
        "dataset_prepared_path": str(place / "prepared"),
        "sequence_len": 64,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "max_steps": 2,
        "optimizer": "adamw_torch",
        "learning_rate": 0.01,
        "bf16": False,
        "tf32": False,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "special_tokens": {"pad_token": "<end>"},
    }
    kept = {key: value for key, value in (settings | changes).items() if value is not None}
    out.mkdir(exist_ok=True)
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(kept), encoding="utf-8")
    return str(path)  # axolotl takes no Path


@pytest.fixture(scope="module")
def trained(place):
    """The folder that `axolotl train` filled, by router type."""
    made = {}

    def train(router_type):
        if router_type not in made:
            out = place / router_type
            section = {"num_experts": 3, "top_k_experts": 2, "router_type": router_type}
            path = recipe(place, out, moelora=section)
            made[router_type] = path, out, start("axolotl.cli.train", path, cwd=place)
        return made[router_type]

    return train


def base_model(place):
    return AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32)


def test_two_steps_from_its_yaml(trained, place):
    _, out, printed = trained("learned")
    model = PeftModel.from_pretrained(base_model(place), out)
    assert model.peft_config["default"].num_experts == 3
    assert (logits(model) - logits(base_model(place))).abs().max() > 1e-4
    assert "balancing_loss" in printed
    state = json.loads((out / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["global_step"] == 2
    assert set(state["log_history"][0]["routers"]) == {"model.layers.0", "model.layers.1"}


def test_a_checkpoint_holds_what_the_end_does(trained, place):
    _, out, _ = trained("learned")
    last, end = (PeftModel.from_pretrained(base_model(place), folder) for folder in (out / "checkpoint-2", out))
    assert torch.equal(logits(last), logits(end))


def test_training_goes_on_from_a_saved_mixture(trained, place):
    _, out, _ = trained("learned")
    path = recipe(place, place / "more", lora_model_dir=str(out), max_steps=1, save_strategy="no", save_steps=None)
    start("axolotl.cli.train", path, cwd=place)
    before, after = (PeftModel.from_pretrained(base_model(place), folder) for folder in (out, place / "more"))
    assert (logits(before) - logits(after)).abs().max() > 1e-5


def test_a_merge_that_would_add_all_experts_is_refused(trained):
    path, out, _ = trained("learned")
    with pytest.raises(RecipeError, match=r"merge_method.*\n.*must be legacy"):
        merge_lora(path, lora_model_dir=str(out))
    assert not (out / "merged").exists()


def test_a_learned_router_is_not_merged(trained):
    path, out, _ = trained("learned")
    with pytest.raises(ValueError, match="cannot merge: router_type='learned'"):
        merge_lora(path, lora_model_dir=str(out), merge_method="legacy")
    assert not (out / "merged").exists()


def test_constant_weights_merge_as_ours_do(trained, place):
    path, out, _ = trained("fixed")
    merge_lora(path, lora_model_dir=str(out), merge_method="legacy")
    merged = AutoModelForCausalLM.from_pretrained(out / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(merged), logits(PeftModel.from_pretrained(base_model(place), out)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"moelora": {"num_expert": 3}}, "moelora.num_expert = 3\n.*did you mean `num_experts`"),
        ({"moelora": {"num_experts": 2, "top_k_experts": 5}}, r"`top_k_experts` \(5\) exceeds"),
        ({"lora_r": -1}, "lora_r = -1"),
        ({"moelora": {"r": 8}}, "lora_r = 4\n.*`moelora.r` says it too"),
        ({"moelora": {"preset": "fast"}}, "moelora.preset = 'fast'"),
        ({"moelora": [1]}, "must be a mapping"),
        ({"peft_use_dora": True}, "peft_use_dora = True"),
        ({"lora_target_modules": ["q_proj"]}, "lora_target_linear = True\n.*names what is adapted"),
        ({"adapter": "lora"}, "moelora = .*\n.*needs `adapter: moelora`"),
        *(({key: True}, f"{key} = True\n") for key in REFUSED),
    ],
    ids=str,
)
def test_refused_before_anything_is_done(place, changes, message):
    path = recipe(place, place / "refused", **changes)
    with pytest.raises(RecipeError, match=message):
        load_cfg(path)


def test_everything_wrong_is_told_at_once(place):
    path = recipe(place, place / "refused", load_in_4bit=True, lora_r=0, moelora={"num_experts": 1})
    with pytest.raises(RecipeError) as caught:
        load_cfg(path)
    assert {problem.key for problem in caught.value.problems} == {"load_in_4bit", "lora_r", "moelora.num_experts"}


def test_a_lora_beside_the_plug_in_is_a_lora(place):
    assert load_cfg(recipe(place, place / "lora", adapter="lora", moelora=None)).adapter == "lora"


def test_a_preset_and_targets(place):
    cfg = load_cfg(
        recipe(
            place,
            place / "preset",
            moelora={"preset": "mergeable"},
            lora_r=None,
            lora_alpha=None,
            lora_target_linear=None,
            lora_target_modules=["q_proj", "v_proj"],
        )
    )
    _, config = MoELoraPlugin().load_adapter(base_model(place), cfg, config_only=True)
    assert (config.r, config.num_experts, config.target_modules) == (8, 8, {"q_proj", "v_proj"})


# ---- contract --------------------------------------------------------------------------------------------------------


def test_the_version_is_known():
    from importlib.metadata import version

    assert version("axolotl").startswith(f"{VERSIONS}.")


@pytest.mark.parametrize("method", PARAMETERS)
def test_what_is_overridden_is_there(method):
    assert list(inspect.signature(getattr(base.BasePlugin, method)).parameters) == PARAMETERS[method]


def test_every_option_is_one_of_axolotls():
    known = set(AxolotlInputConfig.model_fields)
    used = {
        "adapter",
        "merge_lora",
        "merge_method",
        "lora_model_dir",
        "lora_target_linear",
        "peft_autocast_adapter_dtype",
    }
    assert {*LORA_OPTIONS, *REFUSED, *used} - known == {"lora_exclude_modules"}  # which is why that one is refused


def test_every_lora_option_that_axolotl_reads_is_passed_on_or_refused():
    """Read from its source: an option that we do not know would be dropped without a word."""
    source = inspect.getsource(loading._build_lora_config_kwargs) + inspect.getsource(loading._build_peft_lora_config)
    read = {name for name in AxolotlInputConfig.model_fields if f"cfg.{name}" in source or f'"{name}"' in source}
    assert len(read) > 12
    assert read - {*LORA_OPTIONS, *REFUSED, "lora_target_linear", "adapter"} == set()
