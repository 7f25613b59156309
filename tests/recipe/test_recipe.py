"""What a recipe may say, and what is told about one that is wrong."""

import json

import pytest
import yaml
from tiny import problems, save_tiny_model, write_jsonl, write_recipe
from transformers import PreTrainedModel

from moelora.presets import PRESETS
from moelora.recipe import MIXTURE_DEFAULTS, Recipe
from moelora.training import RecipeError, load_recipe


def test_a_valid_recipe_resolves_paths_and_defaults(folder, recipe):
    loaded = load_recipe(write_recipe(folder, recipe))
    assert loaded.model.name == str(folder / "model")
    assert loaded.data[0].path == str(folder / "counting.jsonl")
    assert loaded.output_dir == folder / "out"
    assert loaded.mixture["target_modules"] == "all-linear"
    assert loaded.training["seed"] == loaded.seed == 42
    assert json.loads(json.dumps(loaded.as_dict()))["block_size"] == 32


def test_a_preset_stands_for_its_fields_below_those_given(folder, recipe):
    recipe["mixture"] = {"preset": "multi-domain", "r": 2}
    mixture = load_recipe(write_recipe(folder, recipe)).mixture
    assert mixture == MIXTURE_DEFAULTS | PRESETS["multi-domain"] | {"r": 2}


def test_a_preset_leaves_a_mixture_that_grows_what_its_experts_share(folder, recipe):
    inherited = MIXTURE_DEFAULTS | {"routing_scale": 1.0, "top_k_experts": 1, "domain_window": None, "r": 2}
    recipe["mixture"] = {"preset": "continual"}
    mixture = load_recipe(write_recipe(folder, recipe), inherited=inherited).mixture
    assert mixture == inherited | {"r": 4, "lora_alpha": 8, "num_experts": 4}


def test_every_mistake_is_reported_at_once(folder, recipe):
    recipe["model"]["nmae"] = "x"
    recipe["data"][0]["path"] = "gone.jsonl"
    recipe["data"][1]["weight"] = 0
    recipe["blocksize"] = 12
    recipe["mixture"] |= {"num_expert": 8, "top_k_experts": 5, "router_temperature": -1.0}
    recipe["training"] |= {"max_step": 3, "learning_rate": -1, "lr_scheduler_type": "cosinus"}
    found = problems(folder, recipe)
    assert found["model.nmae"] == "unknown key; did you mean `name`?"
    assert "no such file" in found["data.counting.path"]
    assert found["data.shouting.weight"] == "must be greater than 0"
    assert found["blocksize"] == "unknown key; did you mean `block_size`?"
    assert found["mixture.num_expert"] == "unknown key; did you mean `num_experts`?"
    assert "num_experts" in found["mixture.top_k_experts"]
    assert "greater than 0" in found["mixture.router_temperature"]
    assert found["training.max_step"] == "unknown key; did you mean `max_steps`?"
    assert found["training.learning_rate"] == "must be greater than 0"
    assert "cosine" in found["training.lr_scheduler_type"]
    assert len(found) == 10


# key, value, words of the fix
MISTAKES = [
    ("block_size", "long", "must be a whole number, not text"),
    ("block_size", 1, "2 or greater"),
    ("block_size", 65, "at most 64 tokens"),
    ("seed", -1, "must be 0 to 4294967295"),
    ("seed", 2**32, "must be 0 to 4294967295"),
    ("seed", True, "must be a whole number, not true or false"),
    ("max_eval_blocks", 0, "1 or greater"),
    ("data", [], "at least one domain"),
    ("data", {"name": "x"}, "must be a list of a mapping"),
    ("mixture", [1], "must be a mapping"),
    ("model.name", "missing/model/folder", "no such folder"),
    ("model.name", "no such hub id", "neither a folder next to the recipe nor a hub id"),
    ("model.name", "nobody/nothing", "no folder of that name, and from the hub not a causal language model"),
    ("model.name", ".", "lacks config.json, weights, tokenizer"),
    ("model.gguf_file", "x.gguf", "no such file"),
    ("model.dtype", "float23", "must be one of auto, float32, bfloat16, float16; did you mean `float32`?"),
    ("model.name", "", "must not be empty"),
    ("data.counting.path", "", "must not be empty"),
    ("data.counting.eval_path", "", "must not be empty"),
    ("data.counting.eval_fraction", 1.0, "less than 1"),
    ("data.counting.weight", float("inf"), "finite"),
    ("training.learning_rate", float("inf"), "finite"),
    ("training.num_train_epochs", 10**310, "finite"),
    ("mixture.target_modules", ["no_proj"], "no_proj"),
    ("mixture.modules_to_save", ["lm_heda"], "no module of that name; did you mean `lm_head`?"),
    ("mixture.lora_dropout", 3, "pass a number in [0, 1)"),
    ("mixture.task_type", "SEQ_CLS", "CAUSAL_LM"),
    ("mixture.router_scope", "layer", "block, model, module"),
    ("mixture.use_dora", True, "use_dora"),
    ("mixture.inference_mode", True, "drop it"),
    ("mixture.adapters", [], "drop it: save_pretrained"),
    ("mixture.checkpoint", {"id": "x", "files": {}}, "drop it: save_pretrained"),
    (
        "mixture.preset",
        "multi-domian",
        "must be one of multi-domain, mergeable, continual; did you mean `multi-domain`?",
    ),
    ("mixture.preset", ["continual"], "must be one of"),
    ("mixture.presett", "continual", "unknown key; did you mean `preset`?"),
    ("mixture.num_experts", 2.5, "must be a whole number, not a number"),
    ("training.seed", 3, "set `seed` at the top"),
    ("training.resume_from_checkpoint", "x", "--resume"),
    ("training.output_dir", "recipe.yaml", "is a file"),
    ("training.output_dir", None, "missing"),
    ("training.max_steps", 0, "1 or greater"),
    ("training.label_smoothing_factor", 5, "must be 0 or greater and less than 1"),
    ("training.dataloader_num_workers", -1, "0 or greater"),
    ("training.optim", "sgdd", "sgd"),
    ("training.optim", "lomo", "install `lomo_optim`"),
    ("training.optim", "grokadamw", "install grokadamw"),
    ("training.optim_args", "alpha", "must be KEY=VALUE"),
    ("training.adam_beta1", 1, "must be 0 or greater and less than 1"),
    ("training.adam_epsilon", -1, "must be 0 or greater"),
    ("training.neftune_noise_alpha", -1, "must be 0 or greater"),
    ("training.report_to", "wandbb", "wandbb is not supported, only"),
    ("training.report_to", ["swanlab"], "pip install swanlab"),
    ("training.lr_scheduler_type", "cosine_with_min_lr", "`lr_scheduler_kwargs`"),
    ("training.lr_scheduler_kwargs", {"powr": 2}, "unexpected keyword argument 'powr'"),
    ("training.per_device_train_batch_size", "4", "must be a whole number, not text"),
]


@pytest.mark.parametrize(("key", "value", "expected"), MISTAKES, ids=[f"{key}={value}" for key, value, _ in MISTAKES])
def test_a_mistake_is_reported_with_key_and_fix(folder, recipe, key, value, expected):
    found = problems(folder, recipe, f"{key}={yaml.safe_dump(value, default_flow_style=True)}")
    assert expected in found[key]
    assert len(found) == 1


@pytest.mark.parametrize(
    ("options", "error"),
    [("{use_reentrnt: false}", "use_reentrnt"), ("{determinism_check: x}", "['default', 'none']"), ("x", "dictionary"),
     ("{use_reentrant: false}", None), ("{use_reentrant: true, preserve_rng_state: false}", None)],
)  # fmt: skip
def test_options_of_gradient_checkpoints_are_tried(folder, recipe, options, error):
    given = ["training.gradient_checkpointing=true", f"training.gradient_checkpointing_kwargs={options}"]
    if error is None:
        assert load_recipe(write_recipe(folder, recipe), given)
    else:
        assert error in problems(folder, recipe, *given)["training.gradient_checkpointing_kwargs"]


@pytest.mark.skipif(not hasattr(PreTrainedModel, "activation_checkpointing_enable"), reason="needs transformers 5.23")
def test_options_that_transformers_keeps_to_itself_are_not_refused(folder, recipe):
    recipe["training"] |= {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"every_n_layers": 2}}
    assert load_recipe(write_recipe(folder, recipe))
    key = "training.activation_checkpointing_kwargs"
    assert "use_reentrnt" in problems(folder, recipe, f"{key}.use_reentrnt=true")[key]


def test_a_tracker_that_is_not_installed_leaves_no_traceback(folder, recipe, monkeypatch):
    monkeypatch.setattr("sys.unraisablehook", lambda error: left.append(error.exc_value))
    left = []
    assert "pip install mlflow" in problems(folder, recipe, "training.report_to=mlflow")["training.report_to"]
    assert not left


def test_an_optimizer_that_wants_to_see_the_model_is_not_refused(folder, recipe, monkeypatch):
    def wants_model(arguments, model=None):
        raise ValueError("You need to pass a model")

    monkeypatch.setattr("transformers.Trainer.get_optimizer_cls_and_kwargs", staticmethod(wants_model))
    for settings in (
        ["training.optim=lomo"],
        ["training.optim=galore_adamw", "training.optim_target_modules=all-linear"],
    ):
        assert load_recipe(write_recipe(folder, recipe), settings)


@pytest.mark.parametrize("section", ["model", "data", "training"])
def test_missing_sections_are_named(folder, recipe, section):
    del recipe[section]
    assert problems(folder, recipe)[section].startswith("missing; ")


def test_two_domains_need_two_names(folder, recipe):
    recipe["data"][1]["name"] = "counting"
    assert "two domains of this name" in problems(folder, recipe)["data"]


def test_domain_names_are_plain(folder, recipe):
    recipe["data"][0]["name"] = "a b"
    assert "letters, digits" in problems(folder, recipe)["data.a b.name"]


def test_an_empty_model_folder_with_a_gguf_file_says_so(folder, recipe):
    (folder / "packed").mkdir(exist_ok=True)
    (folder / "packed" / "weights.gguf").touch()
    assert "model.gguf_file" in problems(folder, recipe, "model.name=packed")["model.name"]


# The file itself


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model: [", "line"),
        ("- a list", "must be a mapping"),
        ("", "must be a mapping"),
        ("seed: 1\nseed: 2\n", "`seed` is given 2 times"),
        ("model: !!python/object:os.system x", "not readable as YAML"),
    ],
)
def test_unreadable_recipes_are_reported(tmp_path, text, expected):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match="1 problem") as caught:
        load_recipe(path)
    assert expected in str(caught.value)


def test_a_missing_recipe_is_reported(tmp_path):
    with pytest.raises(RecipeError, match="no such file"):
        load_recipe(tmp_path / "gone.yaml")


def test_numbers_like_2e_4_are_numbers(folder, recipe):
    path = write_recipe(folder, recipe)
    path.write_text(path.read_text().replace("learning_rate: 0.01", "learning_rate: 2e-4"))
    assert load_recipe(path).training["learning_rate"] == 2e-4


# --set


def test_settings_replace_what_the_recipe_says(folder, recipe):
    loaded = load_recipe(
        write_recipe(folder, recipe),
        ["seed=7", "data.shouting.weight=3", "training.learning_rate=1e-3", "mixture.expert_dropout=0.1"],
    )
    assert (loaded.seed, loaded.training["seed"]) == (7, 7)
    assert loaded.data[1].weight == 3
    assert loaded.training["learning_rate"] == 1e-3
    assert loaded.mixture["expert_dropout"] == 0.1


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seed", "KEY=VALUE"),
        ("=3", "KEY=VALUE"),
        ("data.nobody.weight=2", "no section `data.nobody`"),
        ("data.counting=5", "key by key, as in data.counting.weight=2"),
        ("a=[", "YAML"),
    ],
)
def test_bad_settings_are_reported(folder, recipe, override, expected):
    assert expected in problems(folder, recipe, override)["--set"]


@pytest.mark.parametrize("wants", ["training.load_best_model_at_end=true", "training.save_strategy=best"])
def test_the_best_model_is_told_by_a_domains_loss(folder, recipe, wants):
    settings = [wants, "training.eval_strategy=steps", "training.eval_steps=2", "training.save_steps=2"]
    for metric in ([], ["training.metric_for_best_model=loss"]):
        found = problems(folder, recipe, *settings, *metric)
        assert "eval_counting_loss or eval_shouting_loss" in found["training.metric_for_best_model"]
    for metric in ("eval_shouting_loss", "counting_loss"):
        assert load_recipe(write_recipe(folder, recipe), [*settings, f"training.metric_for_best_model={metric}"])


def test_help_stands_on_every_field():
    import dataclasses

    from moelora import MoELoraConfig
    from moelora.cli.options import GenerateOptions, TrainOptions
    from moelora.recipe import DomainOptions, ModelOptions

    for cls in (Recipe, ModelOptions, DomainOptions, TrainOptions, GenerateOptions, MoELoraConfig):
        for field in dataclasses.fields(cls):
            assert not field.init or field.metadata.get("help"), f"{cls.__name__}.{field.name}"


def test_the_quickstart_recipe_is_valid(tmp_path):
    from pathlib import Path

    source = Path(__file__).parents[2] / "examples" / "quickstart.yaml"
    assert source.read_text().startswith("# moelora train examples/quickstart.yaml\n")
    names = [domain["name"] for domain in yaml.safe_load(source.read_text())["data"]]
    (tmp_path / "examples").mkdir()
    (tmp_path / "runs" / "quickstart" / "data").mkdir(parents=True)
    for name in names:
        write_jsonl(tmp_path / "runs" / "quickstart" / "data" / f"{name}.jsonl", [{"text": "a"}, {"text": "b"}])
    save_tiny_model(tmp_path / "runs" / "quickstart" / "model", max_length=128)
    recipe = tmp_path / "examples" / source.name
    recipe.write_text(source.read_text())
    assert [domain.name for domain in load_recipe(recipe).data] == names
