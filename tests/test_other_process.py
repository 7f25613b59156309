"""A process that never imported moelora: PEFT has no plug-in, so the adapter's folder says what to import."""

import json
import re
import subprocess
import sys

import pytest
import torch
from peft import PeftModel
from test_persistence import IDS, base_model, trained

LOAD = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base_model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
try:
    PeftModel.from_pretrained(base_model, sys.argv[2])
except KeyError as error:
    print(error)
{code}
model = PeftModel.from_pretrained(base_model, sys.argv[2]).eval()
torch.save(model(input_ids=torch.load(sys.argv[3])).logits.detach(), sys.argv[4])
"""


def run(*command):
    return subprocess.run([sys.executable, *map(str, command)], check=False, capture_output=True, text=True)


@pytest.fixture
def folder(tmp_path):
    base_model().save_pretrained(tmp_path / "base")
    model = trained(("expert_0", "expert_1"))
    model.get_base_model().name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    torch.save(IDS, tmp_path / "ids.pt")
    return tmp_path


def test_the_folder_says_what_to_import(folder):
    settings = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    (example,) = re.findall(r"```python\n(.*?)\nmodel =", (folder / "adapter" / "README.md").read_text(), re.DOTALL)
    assert f"import {settings['requires_import']}" in [line.partition("  #")[0] for line in example.splitlines()]
    (folder / "load.py").write_text(LOAD.format(code=example))
    done = run(folder / "load.py", *(folder / name for name in ("base", "adapter", "ids.pt", "logits.pt")))
    assert (done.returncode, done.stdout) == (0, "'MOELORA'\n"), done.stderr
    expected = PeftModel.from_pretrained(base_model(), folder / "adapter").eval()(input_ids=IDS).logits
    torch.testing.assert_close(torch.load(folder / "logits.pt"), expected)


def test_the_card_says_it_once_and_keeps_what_was_there(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n\n# My model\n")
    model = trained()
    for _ in range(2):
        model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert card.count("import moelora\n") == 1 and card.count("- moelora\n") == 1
    assert "license: mit" in card and "# My model" in card


CHILD = """
import multiprocessing, sys

def kind(folder):
    import moelora
    from peft import PeftConfig
    return type(PeftConfig.from_pretrained(folder)).__name__

if __name__ == "__main__":
    import moelora
    assert "peft" not in sys.modules, "the command registers when it has something to do"
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(pool.apply(kind, [sys.argv[1]]))
"""


def test_a_process_that_the_command_starts_knows_the_method(folder):
    """It has the command's own command line, by which moelora tells that it need not register yet."""
    command = folder / "moelora"
    command.write_text(CHILD)
    done = run(command, folder / "adapter")
    assert done.stdout == "MoELoraConfig\n", done.stderr
