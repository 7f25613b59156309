"""What the pages show can be done: every command parses, and the Python of the pages on experts runs."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from loras import save_lora
from peft import PeftModel
from tiny import counting, save_tiny_adapter, shouting
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import moelora
from moelora.cli.commands import COMMANDS, build_parser
from moelora.cli.option_fields import check_options
from moelora.recipe import ModelOptions
from moelora.storage.base_model import load_tokenizer

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXPERTS = [page for page in PAGES if page.name.startswith("experts-")]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page, language):
    return [body for found, body in BLOCK.findall(page.read_text(encoding="utf-8")) if found == language]


def commands(page):
    lines = "\n".join(blocks(page, "")).replace("\\\n", " ").splitlines()
    return [match[1] for line in lines if (match := re.match(r"(?:\$ )?moelora (\w+ .*)", line))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_have_the_options_they_are_shown_with(page):
    for command in commands(page):
        given = vars(build_parser().parse_args(shlex.split(command, comments=True)))
        problems = check_options(COMMANDS[given.pop("command")][0](**given))
        assert [problem for problem in problems if "no such" not in problem.fix] == [], command


@pytest.fixture
def names(tmp_path, monkeypatch):
    """What the pages' Python takes for granted, on a tiny model."""
    monkeypatch.chdir(tmp_path)
    save_tiny_adapter(tmp_path)
    base, tokenizer = AutoModelForCausalLM.from_pretrained("model"), load_tokenizer(ModelOptions(name="model"))
    for seed, name in enumerate(("code", "docs", "sql")):
        fresh = AutoModelForCausalLM.from_pretrained("model")
        save_lora(Path("loras") / name, seed, fresh, r=2, target_modules="all-linear")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("model"), "adapter", is_trainable=True)
    texts = [[row["text"] for row in rows] for rows in (counting(16), shouting(16))]
    batches = [[dict(tokenizer(text, return_tensors="pt")) for text in domain] for domain in texts]
    token_ids = [[tokenizer(text)["input_ids"] for text in domain] for domain in texts]
    rows = [{"input_ids": ids, "labels": ids} for ids in token_ids[1]]
    arguments = TrainingArguments(
        "trained", max_steps=1, per_device_train_batch_size=1, report_to="none", use_cpu=True, disable_tqdm=True
    )
    return {
        "AutoModelForCausalLM": AutoModelForCausalLM,
        "PeftModel": PeftModel,
        "base": base,
        "batches": batches[0],
        "batches_of_its_domain": batches[0],
        "batches_of_the_new_domain": batches[1],
        "calibration_token_ids": token_ids[0],
        "code_texts": texts[0],
        "docs_texts": texts[1],
        "model": model,
        "token_ids": token_ids[1],
        "tokenizer": tokenizer,
        "trainer": Trainer(model, arguments, train_dataset=rows),
    }


@pytest.mark.parametrize("page", EXPERTS, ids=lambda page: page.name)
def test_the_python_of_a_page_runs(page, names):
    if page.name == "experts-export.md":
        names["model"] = moelora.experts.build(
            AutoModelForCausalLM.from_pretrained("model"), {name: f"loras/{name}" for name in ("code", "docs", "sql")}
        )
    if page.name == "experts-distil.md":
        names["base"] = "model"
        shutil.copytree("loras/code", "runs/quickstart/lora")
    snippets = blocks(page, "python")
    assert snippets
    for snippet in snippets:
        torch.manual_seed(0)
        exec(compile(snippet, page.name, "exec"), names)
