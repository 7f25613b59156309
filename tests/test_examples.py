"""The scripts in examples/, run as a user runs them, on tiny models."""

import ast
import json
import math
import os
import re
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from loras import save_lora
from peft import PeftModel
from safetensors.torch import load_file
from tiny import save_tiny_model, tiny_tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
ENGINES = Path(sys.prefix) / "engines"  # the quantisation packages; see the Makefile
NUMBER = r"\d+\.\d+"

pytestmark = [
    pytest.mark.usefixtures("alone_in_accelerate"),
    pytest.mark.filterwarnings("ignore:`expert_capacity_factor`"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"), max_length=256)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """A function that runs an example with a command line, in an empty folder, and returns what it printed."""
    monkeypatch.chdir(tmp_path)

    def call(name, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return call


def fall(printed, what):
    """The two losses of the line that begins with `what`, once it has been seen that they fell."""
    before, after = map(float, re.search(rf"^{what}: ({NUMBER}) -> ({NUMBER})", printed, re.MULTILINE).groups())
    assert after < before - 0.01
    return before, after


@torch.no_grad()
def loss_of(folder, text, adapter=None):
    model = AutoModelForCausalLM.from_pretrained(folder)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    batch = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")
    return model.eval()(**batch, labels=batch["input_ids"]).loss.item()


def test_first_steps(run, tmp_path):
    save_tiny_model(tmp_path / "runs" / "quickstart" / "model")
    printed = run("first_steps")
    loss = float(re.search(rf"loss before training: ({NUMBER})", printed).group(1))
    assert loss == pytest.approx(math.log(len(tiny_tokenizer())), abs=0.2)


def test_sft_chat(run, model):
    fall(run("sft_chat", "--model", model, "--steps", 5, "--out", "sft"), "loss of the answers")
    learned = "assistant: Ahoy! It lies under `Billing`, one file a month."
    assert loss_of(model, learned, "sft") < loss_of(model, learned) - 0.01


@pytest.mark.slow
def test_dpo_after_sft_chat(run, model):
    run("sft_chat", "--model", model, "--steps", 5, "--out", "sft")
    before, _ = fall(run("dpo", "--adapter", "sft", "--steps", 3, "--out", "dpo"), "loss")
    assert before == pytest.approx(math.log(2), abs=1e-3)  # the reference is the adapter, not the base
    assert loss_of(model, "assistant: 4.", "dpo") != pytest.approx(loss_of(model, "assistant: 4.", "sft"), abs=1e-5)


def test_dpo_of_a_new_mixture(run, model):
    printed = run("dpo", "--model", model, "--steps", 3, "--out", "dpo")
    before, _ = fall(printed, "loss")
    assert before == pytest.approx(math.log(2), abs=1e-3) and "pairs told right: 100%" in printed
    assert PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), "dpo").active_adapters == ["default"]


def table(printed):
    """The rows of numbers that an example printed, by what stands before them."""
    rows = re.findall(rf"^(\S.*?) +((?:{NUMBER} *)+)$", printed, re.MULTILINE)
    return {name: [float(number) for number in numbers.split()] for name, numbers in rows}


def two_skills(rows, folder, lora):
    """The first skill is as it was, and its expert the LoRA bit for bit; the second was learned."""
    old, new = zip(rows["base model"], rows["the LoRA"], rows["both skills"], strict=True)
    assert old[1] != old[0] and old[2] == pytest.approx(old[1], abs=0.005)
    assert new[2] < new[1] - 0.02
    before, after = (load_file(f"{place}/adapter_model.safetensors") for place in (lora, folder))
    assert before and all(torch.equal(tensor, after[f"first/{key}"]) for key, tensor in before.items())
    return old


def test_continual(run, model, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(model)
    save_lora(tmp_path / "lora", base=base, r=4, lora_alpha=4, target_modules="all-linear")
    two_skills(table(run("continual", "--lora", "lora", "--steps", 8, "--out", "both")), "both", "lora")


@pytest.mark.slow
def test_continual_from_nothing(run, model):
    rows = table(run("continual", "--model", model, "--steps", 8, "--out", "both"))
    old = two_skills(rows, "both", "both/lora")
    assert old[1] < old[0] - 0.02, "the LoRA that it made has learned"


def test_import_and_arrow(run, model, tmp_path):
    options = {"r": 1, "lora_alpha": 1, "target_modules": ["q_proj", "down_proj"]}  # r=1: PEFT finds its direction
    words = []
    for seed, name in enumerate(("sql", "rooms")):
        save_lora(tmp_path / name, seed, AutoModelForCausalLM.from_pretrained(model), **options)
        words += ["--lora", f"{name}={name}"]
    printed = run("import_and_arrow", *words, "--out", "both")
    rows = table(printed)
    assert rows["moelora's Arrow"] == pytest.approx(rows["PEFT's Arrow"], abs=0.0011)
    assert len({tuple(rows[name]) for name in ("base model", "sql alone", "rooms alone", "moelora's Arrow")}) == 4
    shares = [int(share) for share in re.findall(r"has (\d+)% of the choices", printed)]
    assert sum(shares) in range(99, 102) and min(shares) > 5
    text = "SELECT name, age FROM users WHERE age > 7 ORDER BY age LIMIT 3;"
    for adapter, row in (("both", "moelora's Arrow"), ("sql", "sql alone")):
        assert loss_of(model, text, adapter) == pytest.approx(rows[row][0], abs=0.0006)
    assert table(run("import_and_arrow", *words, "--top-k", 2, "--out", "two"))["sql alone"] == rows["sql alone"]
    assert json.loads(Path("two/adapter_config.json").read_text())["top_k_experts"] == 2
    with pytest.raises(SystemExit, match="2"):
        run("import_and_arrow", "--lora", "sql")


SEEING = (
    "{% for m in messages %}{{ m['role'] }}: {% for c in m['content'] %}"
    "{{ '<image>' if c['type'] == 'image' else c['text'] }}{% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture
def seeing_model(tmp_path):
    """A tiny LLaVA with its processor; pictures are 4 x 4 patches."""
    processing = pytest.importorskip("transformers.models.clip.image_processing_pil_clip", reason="needs pillow")
    from transformers import LlavaProcessor

    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.pad_token = tokenizer.eos_token
    size = {"height": 32, "width": 32}
    pictures = processing.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=size)
    options = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    folder = tmp_path / "seeing"
    LlavaProcessor(pictures, tokenizer, chat_template=SEEING, **options).save_pretrained(folder)
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**small, image_size=32, patch_size=8),
        text_config=LlamaConfig(**small, vocab_size=len(tokenizer), max_position_embeddings=128),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
    )
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    return folder


def test_vision_language(run, seeing_model):
    printed = run("vision_language", "--model", seeing_model, "--epochs", 2, "--out", "all")
    fall(printed, "loss of the answers")
    assert "routers of their own: model.multi_modal_projector.linear_1" in printed
    loaded = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(seeing_model), "all")
    learned = [name for name, tensor in loaded.state_dict().items() if "lora_B" in name and tensor.abs().max() > 0]
    assert any("vision_tower" in name for name in learned) and any("language_model" in name for name in learned)
    words = ["--epochs", 1, "--language-model-only", "--out", "text"]
    assert "routers of their own: none" in run("vision_language", "--model", seeing_model, *words)
    kept = load_file("text/adapter_model.safetensors")
    assert kept and all("language_model" in name for name in kept)


def test_quantised_without_its_package(run, model, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(SystemExit, match="need bitsandbytes, which is not installed: pip install bitsandbytes"):
        run("quantised", "--model", model)


@pytest.mark.engines
def test_quantised(model, tmp_path):
    if not (ENGINES / "bitsandbytes").is_dir() and find_spec("bitsandbytes") is None:
        pytest.skip("`make engines` installs the quantisation packages")
    path = os.pathsep.join([str(ROOT), str(ENGINES), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(EXAMPLES / "quantised.py"), "--model", str(model), "--steps", "8", "--out", "out"]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    fall(done.stdout, "loss of a step")
    text = "SELECT name, age FROM users WHERE age > 3 ORDER BY age LIMIT 4;"
    assert loss_of(model, text, tmp_path / "out") < loss_of(model, text) - 0.05, "on the base as it was"


@pytest.mark.slow
def test_serving(run, tmp_path):
    from test_serve_transformers import running
    from tiny import save_tiny_adapter

    save_tiny_adapter(tmp_path)
    with running(tmp_path, "mix=adapter") as client:
        words = ["--url", client.base_url, "--prompt", "one plus one", "--max-tokens", 8]
        printed = run("serving", *words)
        answers = {
            name: client.completions.create(model=name, prompt="one plus one", max_tokens=8, temperature=0)
            for name in (str(tmp_path / "model"), "mix")
        }
    for name, answer in answers.items():
        assert f"{name}:\none plus one{answer.choices[0].text}\n" in printed
    assert len(printed.split("mix, in a chat:\n")[1].strip()) > 3


def test_serving_where_nobody_answers(run):
    pytest.importorskip("openai")
    with pytest.raises(SystemExit, match=r"nobody answers at http://127\.0\.0\.1:9/v1; start `moelora serve"):
        run("serving", "--url", "http://127.0.0.1:9/v1")


# ---- the page --------------------------------------------------------------------------------------------------------


def first_line(script):
    """What a script does, by its docstring; first_steps.py, whose lines README shows, has none."""
    text = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8")))
    return text.splitlines()[0] if text else "The lines that README begins with."


def test_the_page_has_all_examples():
    scripts = sorted(EXAMPLES.glob("*.py"))
    lines = ["| script | what it does |", "|---|---|"]
    lines += [f"| [`{script.name}`](../examples/{script.name}) | {first_line(script)} |" for script in scripts]
    page = (ROOT / "docs" / "examples.md").read_text(encoding="utf-8")
    assert "\n".join(lines) + "\n" in page, "put this table into docs/examples.md:\n" + "\n".join(lines)
    assert all(len(script.read_text(encoding="utf-8").splitlines()) < 80 for script in scripts if is_task(script))


def is_task(script):
    return script.stem != "prepare_quickstart"


def test_each_example_is_run_by_a_test():
    tests = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "tests").rglob("test_*.py"))
    missing = [
        script.stem
        for script in EXAMPLES.glob("*.py")
        if is_task(script) and not re.search(rf"^def test_\w*{script.stem}", tests, re.MULTILINE)
    ]
    assert not missing, f"no test is called after {missing}"
