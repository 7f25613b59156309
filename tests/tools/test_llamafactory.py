"""LLaMA-Factory's v1 trains a mixture from its YAML, started by our command. `make tools-test` installs the release."""

import inspect
from importlib.metadata import version

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import write_jsonl
from tool import logits, start
from transformers import AutoModelForCausalLM

from moelora.schema import RecipeError, UserError

llamafactory = pytest.importorskip("llamafactory")
pytestmark = pytest.mark.tools

from llamafactory.v1.core.model_engine import ModelEngine  # noqa: E402
from llamafactory.v1.launcher import main as launch  # noqa: E402
from llamafactory.v1.plugins.model_plugins.peft import PeftPlugin, get_lora_model  # noqa: E402

from moelora.integrations.llamafactory import VERSIONS, main  # noqa: E402


@pytest.fixture(scope="module")
def train(place):
    """A function that trains two steps with more of `peft_config`; the folder that it fills."""
    rows = [{"instruction": f"{number}+1", "input": "", "output": str(number + 1)} for number in range(32)]
    data = {"path": str(write_jsonl(place / "alpaca.jsonl", rows)), "source": "local", "converter": "alpaca"}
    (place / "data.yaml").write_text(yaml.safe_dump({"counting": data}), encoding="utf-8")

    def run(out, **mixture):
        recipe = {
            "model": str(place / "model"),
            "template": "chatml",
            "peft_config": {"name": "moelora", "num_experts": 3, "target_modules": "all"} | mixture,
            "train_dataset": str(place / "data.yaml"),
            "output_dir": str(place / out),
            "micro_batch_size": 2,
            "batching_workers": 0,
            "cutoff_len": 64,
            "max_steps": 2,
            "learning_rate": 0.01,
            "bf16": False,
        }
        path = place / f"{out}.yaml"
        path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
        start("moelora.integrations.llamafactory", "sft", path, cwd=place)
        return place / out

    return run


def base_model(place):
    return AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32)


def test_two_steps_from_its_yaml_and_on_from_there(train, place):
    first = train("first", r=4)
    more = train("more", adapter_name_or_path=str(first))
    base, *mixtures = base_model(place), *(PeftModel.from_pretrained(base_model(place), out) for out in (first, more))
    assert [model.peft_config["default"].num_experts for model in mixtures] == [3, 3]
    assert (logits(mixtures[0]) - logits(base)).abs().max() > 1e-4
    assert (logits(mixtures[1]) - logits(mixtures[0])).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_expert": 3}, "moelora.num_expert = 3\n.*did you mean `num_experts`"),
        ({"r": 0}, "moelora.r = 0"),
        ({"use_dora": True}, "moelora.use_dora = True"),
    ],
    ids=str,
)
def test_refused_before_the_model_is_touched(place, config, message):
    model = base_model(place)
    with pytest.raises(RecipeError, match=message):
        PeftPlugin("moelora")(model, {"name": "moelora", **config}, True)
    assert not hasattr(model, "peft_config")


def test_weights_that_are_not_there_yet_are_refused(place):
    model = base_model(place)
    model._init_mode = "init_on_meta"
    with pytest.raises(RecipeError, match=r"init_config.name = 'init_on_meta'"):
        PeftPlugin("moelora")(model, {"name": "moelora"}, True)


def test_a_plain_lora_is_no_mixture(place, tmp_path):
    get_peft_model(base_model(place), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a LoraConfig and no mixture"):
        PeftPlugin("moelora")(base_model(place), {"name": "moelora", "adapter_name_or_path": str(tmp_path)}, True)


@pytest.mark.parametrize("command", ["merge", "chat", "help"])
def test_commands_that_merge_are_refused(monkeypatch, command):
    monkeypatch.setattr("sys.argv", ["llamafactory", command])
    with pytest.raises(UserError, match=f"`{command}` does not train"):
        main()


# ---- contract --------------------------------------------------------------------------------------------------------


def test_the_version_is_known():
    assert version("llamafactory") == VERSIONS


def test_a_plug_in_is_called_as_ours_expects():
    assert list(inspect.signature(PeftPlugin.__call__).parameters) == ["self", "model", "config", "is_train"]
    assert list(inspect.signature(get_lora_model).parameters) == ["model", "config", "is_train"]
    called = inspect.getsource(ModelEngine)
    assert "PeftPlugin(self.args.peft_config.name)(model, self.args.peft_config, self.is_train)" in called
    assert "_init_mode" in called


def test_the_launcher_takes_the_command_from_the_command_line():
    source = inspect.getsource(launch)
    assert "sys.argv[1]" in source
    assert 'command in ("train", "sft")' in source and 'command == "rm"' in source
