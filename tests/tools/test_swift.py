"""ms-swift trains a mixture with its own command. `make tools-test` installs the release that the plug-in knows."""

import inspect
import json
from importlib.metadata import version
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from tool import logits, start
from transformers import AutoModelForCausalLM

from moelora import MoELoraCallback, MoELoraConfig
from moelora.schema import RecipeError

swift = pytest.importorskip("swift")
pytestmark = pytest.mark.tools

from swift.arguments import SftArguments  # noqa: E402
from swift.callbacks.base import TrainerCallback  # noqa: E402
from swift.pipelines.train import tuner as swift_tuner  # noqa: E402
from swift.trainers.mixin import SwiftMixin  # noqa: E402
from swift.tuner_plugin import Tuner, tuners_map  # noqa: E402
from tiny import write_jsonl  # noqa: E402

from moelora.integrations.swift import (  # noqa: E402
    LORA_OPTIONS,
    REFUSED,
    VERSIONS,
    Callback,
    MoELoraTuner,
    _config,
    _defaults,
    register,
)

PLUG_IN = """from moelora.integrations import swift

swift.register(num_experts=3, top_k_experts=2)
"""


@pytest.fixture(scope="module")
def train(place):
    """A function that runs `swift sft` for two steps, with more options; its checkpoint, and its output."""
    (place / "plug_in.py").write_text(PLUG_IN, encoding="utf-8")
    rows = [("user", "{0}+1"), ("assistant", "{0}")]
    chats = [{"messages": [{"role": role, "content": text.format(n)} for role, text in rows]} for n in range(32)]
    write_jsonl(place / "chat.jsonl", chats)

    def run(out, **options):
        given = {
            "model": place / "model",
            "model_type": "llama",
            "template": "dummy",
            "external_plugins": place / "plug_in.py",
            "tuner_type": "moelora",
            "lora_rank": 4,
            "dataset": place / "chat.jsonl",
            "max_steps": 2,
            "save_steps": 2,
            "logging_steps": 1,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "learning_rate": 0.01,
            "max_length": 64,
            "torch_dtype": "float32",
            "output_dir": place / out,
            "add_version": "false",
        }
        words = [str(word) for key, value in (given | options).items() for word in (f"--{key}", value)]
        return place / out / "checkpoint-2", start("swift.cli.sft", *words, cwd=place)

    return run


@pytest.fixture(scope="module")
def trained(train):
    return train("first")


def base_model(place):
    return AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32)


def test_two_steps_with_its_command(trained, place):
    folder, _ = trained
    model = PeftModel.from_pretrained(base_model(place), folder)
    config = model.peft_config["default"]
    assert (config.num_experts, config.r, config.lora_alpha) == (3, 4, 32)
    assert (logits(model) - logits(base_model(place))).abs().max() > 1e-4


def test_its_log_has_the_routers(trained):
    folder, _ = trained
    state = json.loads((folder / "trainer_state.json").read_text())
    assert state["global_step"] == 2
    assert set(state["log_history"][0]["routers"]) == {"model.layers.0", "model.layers.1"}


def test_a_grown_mixture_is_saved_whole(train, place):
    grown = PeftModel.from_pretrained(base_model(place), grow(place), is_trainable=True)
    folder, _ = train("more", adapters=place / "grown")
    model = PeftModel.from_pretrained(base_model(place), folder)
    assert list(model.peft_config) == ["default", "mail"]
    assert sorted(model.active_adapters) == ["default", "mail"]
    assert (logits(model) - logits(grown)).abs().max() > 1e-4


def grow(place):
    from peft import get_peft_model

    config = MoELoraConfig(r=4, num_experts=2, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base_model(place), config)
    model.add_to_mixture("mail", config)
    model.save_pretrained(place / "grown")
    return place / "grown"


def test_a_checkpoint_is_resumed(trained, train, place):
    folder, _ = trained
    train("first", resume_from_checkpoint=folder, max_steps=3, save_steps=3)
    state = json.loads((place / "first" / "checkpoint-3" / "trainer_state.json").read_text())
    assert state["global_step"] == 3


def test_a_learned_router_is_not_merged(trained, place):
    folder, _ = trained
    with pytest.raises(AssertionError, match="cannot merge: router_type="):
        start("swift.cli.export", "--adapters", folder, "--merge_lora", "true", "--model", place / "model", cwd=place)
    assert not (folder.parent / "checkpoint-2-merged").exists()


# ---- options ---------------------------------------------------------------------------------------------------------


def settings(**changes):
    """Options as ms-swift has read them."""
    values = {**_defaults(), **dict.fromkeys(REFUSED), "task_type": "causal_lm", "tuner_backend": "peft"} | changes
    return SimpleNamespace(**values, training_args=SimpleNamespace(callbacks=[]))


@pytest.fixture
def model(place):
    model = base_model(place)
    model.model_meta = SimpleNamespace(is_multimodal=False, model_arch=None)
    model.model_info = SimpleNamespace(quant_method=None, task_type="causal_lm")
    return model


def test_its_defaults_hold_and_give_way_to_ours(model):
    swifts = _config(settings(), model, {"num_experts": 3})
    ours = _config(settings(), model, {"r": 2, "lora_alpha": 3})
    preset = _config(settings(lora_rank=5), model, {"preset": "mergeable"})
    assert (swifts.r, swifts.lora_alpha, swifts.lora_dropout) == (8, 32, 0.05)
    assert (ours.r, ours.lora_alpha, ours.lora_dropout) == (2, 3, 0.05)
    assert (preset.r, preset.lora_alpha, preset.lora_dropout, preset.num_experts) == (5, 16, 0.0, 8)


def test_targets_are_what_it_resolves(model):
    assert _config(settings(), model, {}).target_modules == set(swift_tuner.find_all_linears(model))
    assert _config(settings(), model, {"target_modules": ["q_proj"]}).target_modules == {"q_proj"}


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {"num_expert": 3}, "moelora.num_expert = 3\n.*did you mean `num_experts`"),
        ({"lora_rank": 0}, {}, "lora_rank = 0"),
        ({"lora_rank": 4}, {"r": 2}, "lora_rank = 4\n.*`moelora.r` says it too"),
        ({"tuner_backend": "unsloth"}, {}, "tuner_backend = 'unsloth'\n.*must be peft"),
        ({"use_dora": True}, {}, "use_dora = True"),
        ({"init_weights": "lora-ga"}, {}, "init_weights = 'lora-ga'"),
        *(({key: "x"}, {}, f"{key} = 'x'\n.*drop it") for key in REFUSED),
    ],
    ids=str,
)
def test_refused_before_the_model_is_touched(model, changes, options, message):
    register(**options)
    with pytest.raises(RecipeError, match=message):
        tuners_map["moelora"].prepare_model(settings(**changes), model)
    assert not hasattr(model, "peft_config")


def test_a_plain_lora_is_no_mixture(model, tmp_path):
    from peft import LoraConfig, get_peft_model

    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match=r"`adapters` .* holds a LoraConfig and no mixture"):
        MoELoraTuner.from_pretrained(model, str(tmp_path / "lora"))


# ---- contract --------------------------------------------------------------------------------------------------------


def test_the_version_is_known():
    assert version("ms-swift").startswith(f"{VERSIONS}.")


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (Tuner.prepare_model, ["args", "model"]),
        (Tuner.from_pretrained, ["model", "model_id", "kwargs"]),
        (Tuner.save_pretrained, ["model", "save_directory", "state_dict", "safe_serialization", "kwargs"]),
        (TrainerCallback.__init__, ["self", "args", "trainer"]),
        (swift_tuner.get_target_modules, ["args", "model"]),
        (swift_tuner.get_modules_to_save, ["args", "model", "task_type"]),
    ],
    ids=lambda value: getattr(value, "__qualname__", ""),
)
def test_what_is_used_takes_what_it_did(function, parameters):
    assert list(inspect.signature(function).parameters) == parameters


def test_every_option_is_one_of_its():
    known = set(SftArguments.__dataclass_fields__) | {"ref_adapters"}
    assert {*LORA_OPTIONS, *REFUSED, "tuner_backend", "task_type"} - known == set()


def test_callbacks_are_made_by_name_after_the_model():
    """[`MoELoraTuner.prepare_model`] adds ours to the list that the trainer reads when it is made."""
    assert "callbacks_map[callback](args, self)" in inspect.getsource(SwiftMixin._get_callbacks)
    assert isinstance(Callback(None, None), MoELoraCallback)
