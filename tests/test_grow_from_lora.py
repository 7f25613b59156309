"""`moelora train --grow` from a plain LoRA: it becomes the first adapter of a mixture, as it is."""

import json

import pytest
import torch
from helpers import ARCHITECTURES, LLAMA_TARGETS
from loras import BATCH, KINDS, plain_output, save_kinds, save_lora
from peft import PeftModel
from safetensors.torch import load_file
from test_domain_classifier import HIGH, LOW, texts
from tiny import counting, save_tiny_model, shouting, tiny_recipe, write_jsonl, write_recipe
from transformers import AutoModelForCausalLM

from moelora.cli.commands import main
from moelora.experts import LoraError, grow, knows_domain, learn_domain, mixture_from_lora, to_lora
from moelora.storage.run_record import learned_domains


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=BATCH).logits


@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("kind", KINDS)
def test_a_lora_alone_is_what_it_was_bit_for_bit(tmp_path, kind, scale):
    folder = next(iter(save_kinds(tmp_path, [kind]).values()))
    model = mixture_from_lora(ARCHITECTURES["llama"].build(), folder, routing_scale=scale)
    expected = plain_output(folder)
    assert torch.equal(logits(model), expected)
    grow(model, 3, r=2, lora_alpha=4, rank_pattern={}, alpha_pattern={}, target_modules=LLAMA_TARGETS)
    model.set_adapter("default")
    assert torch.equal(logits(model), expected)
    assert to_lora(model, "default").config.lora_alpha == KINDS[kind]["lora_alpha"]


def test_a_scale_that_is_no_power_of_two_leaves_a_rounding(tmp_path):
    folder = save_lora(tmp_path, **KINDS["patterns"])
    model = mixture_from_lora(ARCHITECTURES["llama"].build(), folder, routing_scale=3.0)
    torch.testing.assert_close(logits(model), plain_output(folder), rtol=1e-5, atol=1e-5)


def test_the_domain_of_the_lora_is_told_from_the_new_one(tmp_path):
    folder = save_lora(tmp_path, **KINDS["plain"])
    model = mixture_from_lora(ARCHITECTURES["llama"].build(), folder, top_k_experts=1, routing_scale=4.0)
    learn_domain(model, "default", [texts(LOW, seed=5)])
    name = grow(model, 4, r=2)
    learn_domain(model, name, [texts(HIGH, seed=6)])
    assert knows_domain(model, "default") and model.base_model.routing.num_experts == 5
    for domain, own in ((LOW, [0]), (HIGH, [1, 2, 3, 4])):
        model.routing_stats(reset=True)
        with torch.no_grad():
            model(**texts(domain, seed=7))
        loads = [stats.expert_load for stats in model.routing_stats(reset=True).values()]
        assert loads and all(sum(load[e] for e in own) > 0.7 for load in loads), domain


def test_what_is_no_shared_field_is_refused(tmp_path):
    folder = save_lora(tmp_path, **KINDS["plain"])
    with pytest.raises(LoraError, match="`r` is no field that all adapters of a mixture share"):
        mixture_from_lora(ARCHITECTURES["llama"].build(), folder, r=3)


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, a plain LoRA of PEFT's on it, and a recipe that shouts and names texts that count as old."""
    folder = tmp_path_factory.mktemp("front")
    recipe = tiny_recipe(folder)
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    save_lora(folder / "lora", base=base, r=4, lora_alpha=6, target_modules=["q_proj", "v_proj", "down_proj"])
    recipe["data"] = [{"name": "shouting", "path": "shouting.jsonl"}]
    recipe["old_data"] = [{"name": "counting", "path": "counting.jsonl"}]
    recipe["mixture"] = {"r": 2, "num_experts": 3, "top_k_experts": 1, "routing_scale": 2.0}
    write_recipe(folder, recipe)
    return folder


def command(folder, *more, out="grown", lora="lora"):
    arguments = ["train", str(folder / "recipe.yaml"), "--grow", str(folder / lora)]
    return [*arguments, "--set", f"training.output_dir={out}", *more]


@pytest.fixture(scope="module")
def grown(folder):
    assert main(command(folder)) == 0
    return folder / "grown"


def test_the_lora_is_the_first_adapter_and_the_new_experts_learned(folder, grown):
    saved, lora = load_file(grown / "adapter_model.safetensors"), load_file(folder / "lora/adapter_model.safetensors")
    assert lora and all(torch.equal(saved[f"default/{key}"], tensor) for key, tensor in lora.items())
    config = json.loads((grown / "adapter_config.json").read_text())
    assert [(entry["name"], entry["config"]["single_expert"]) for entry in config["adapters"]] == [
        ("default", True),
        ("grown_1", False),
    ]
    assert set(config["adapters"][1]["config"]["target_modules"]) == {"q_proj", "v_proj", "down_proj"}
    assert all(tensor.any() for key, tensor in saved.items() if key.startswith("grown_1/") and "lora_B" in key)
    assert all(entry["config"]["router_memory"] for entry in config["adapters"])


def test_the_saved_mixture_still_has_the_lora_in_it(folder, grown):
    ids = torch.randint(1, 200, (2, 9), generator=torch.Generator().manual_seed(0))
    base = [AutoModelForCausalLM.from_pretrained(folder / "model") for _ in range(2)]
    model = PeftModel.from_pretrained(base[0], str(grown)).eval()
    model.set_adapter("default")
    with torch.no_grad():
        alone = model(input_ids=ids).logits
        expected = PeftModel.from_pretrained(base[1], str(folder / "lora")).eval()(input_ids=ids).logits
    assert torch.equal(alone, expected)


def test_run_json_says_what_became_of_the_old_skill(folder, grown, capsys):
    record = json.loads((grown / "run.json").read_text())
    assert record["grown_from"] == str(folder / "lora") and record["grown_adapter"] == "grown_1"
    old = record["old_domains"]["counting"]
    assert old["held_out_tokens"] > 0 and abs(old["loss_after"] - old["loss_before"]) < 0.5
    assert [domain["name"] for domain in learned_domains(grown)] == ["shouting", "counting"]


def test_a_dry_run_says_what_will_become_of_the_lora(folder, capsys):
    assert main(command(folder, "--dry-run", out="nowhere")) == 0
    said = capsys.readouterr().out
    assert "is a plain LoRA; it becomes default, one expert, as it is" in said and "will be computed" in said
    assert not (folder / "nowhere").exists()


def test_a_run_from_a_lora_resumes_and_is_put_aside(folder, capsys):
    assert main(command(folder, "--set", "training.max_steps=2", out="resumed")) == 0
    file = folder / "resumed" / "run.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"status": "training"}))
    assert main(command(folder, "--resume", out="resumed")) == 0
    record = json.loads(file.read_text())
    assert record["steps"] == 4 and record["old_domains"]["counting"].keys() >= {"loss_before", "loss_after"}
    assert "What was learned before" in capsys.readouterr().out
    assert main(command(folder, "--overwrite", "--set", "training.max_steps=1", out="resumed")) == 0
    assert main(["undo", str(folder / "resumed")]) == 0
    assert json.loads(file.read_text())["steps"] == 4


def test_a_mixture_from_a_lora_grows_again(folder, grown):
    write_jsonl(folder / "third.jsonl", [{"text": row["text"].lower()} for row in shouting(40)])
    third = ["--set", "data=[{name: third, path: third.jsonl}]", "--set", "mixture={num_experts: 2}"]
    assert main(command(folder, *third, "--set", "training.max_steps=1", out="third", lora="grown")) == 0
    config = json.loads((folder / "third" / "adapter_config.json").read_text())
    assert [entry["name"] for entry in config["adapters"]] == ["default", "grown_1", "grown_2"]
    own = config["adapters"][2]["config"]  # like grown_1, not like the LoRA, whose alpha is divided by the scale
    assert (own["r"], own["lora_alpha"]) == (2, 6)
    # an adapter that `build` made of a LoRA says one expert, and the recipe two
    assert config["adapters"][2]["config"]["num_experts"] == 2 and not config["adapters"][2]["config"]["single_expert"]


def test_old_texts_are_asked_for(folder, capsys):
    assert main(command(folder, "--set", "old_data=[]", out="none")) == 2
    said = capsys.readouterr().err
    assert "name them in the recipe as `old_data`" in said and "- {name: first, path: first.jsonl}" in said


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("mixture.router_type=fixed", "a mixture that grows has to route"),
        ("old_data=[{name: shouting, path: counting.jsonl}]", "`data` has a domain of this name too"),
        ("old_data=[{name: counting, path: nothing.jsonl}]", "old_data.counting.path"),
        ("old_data=7", "must be a list"),
        ("training.output_dir=lora", "holds an adapter"),
    ],
)
def test_what_cannot_work_is_refused_before_work(folder, capsys, setting, expected):
    assert main(command(folder, "--set", setting, out="refused")) == 2
    assert expected in capsys.readouterr().err


def test_old_texts_without_growing_are_refused(folder, capsys):
    assert main(["train", str(folder / "recipe.yaml"), "--set", "training.output_dir=plain"]) == 2
    assert "goes with `moelora train --grow`; drop it" in capsys.readouterr().err


def test_a_lora_that_cannot_be_an_expert_is_refused_by_name(folder, capsys):
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    save_lora(folder / "dora", base=base, use_dora=True, target_modules=["q_proj"])
    assert main(command(folder, lora="dora", out="none")) == 2
    assert "`use_dora` (True)" in capsys.readouterr().err
    save_tiny_model(folder / "wide", hidden_size=64)
    assert main(command(folder, "--set", "model.name=wide", out="none")) == 2
    assert "was not trained on this model" in capsys.readouterr().err
    assert main(["train", str(folder / "recipe.yaml"), "--grow", "auto", "--adapter", str(folder / "lora")]) == 2
    assert "is a plain LoRA, whose texts nobody knows" in capsys.readouterr().err


def test_what_is_neither_here_nor_on_the_hub_is_told(folder, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["train", str(folder / "recipe.yaml"), "--grow", "nobody/nothing"]) == 2
    assert "nobody/nothing: no readable adapter_config.json" in capsys.readouterr().err


def test_a_plain_lora_of_ours_knows_its_texts(folder, capsys):
    alone = ["--set", "mixture={use_moe_routing: false, r: 2}", "--set", "training.output_dir=ours"]
    first = ["--set", "old_data=[]", "--set", "data=[{name: counting, path: counting.jsonl}]"]
    assert main(["train", str(folder / "recipe.yaml"), *alone, *first]) == 0
    assert main(command(folder, "--set", "old_data=[]", out="from_ours", lora="ours")) == 0
    assert [domain["name"] for domain in learned_domains(folder / "from_ours")] == ["shouting", "counting"]
    assert counting(1)[0]["text"].startswith("0 plus")
