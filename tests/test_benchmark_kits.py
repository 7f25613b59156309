"""Arms in processes of their own: the real protocol and real processes, with small stand-ins for Liger and Unsloth."""

import pytest
from transformers.models.llama import modeling_llama

from benchmarks import generate, model, table
from benchmarks.kits import kit_of
from benchmarks.record import read
from benchmarks.worker import Remote, RemoteError

pytestmark = pytest.mark.slow

TINY = "--preset tiny --device cpu --layers 1 --repeats 2 --min-time 0.001"

# They stand where the real ones would be imported from; Liger's changes what everybody in its process computes with.
LIGER = {
    "__init__.py": "__version__ = '0.8.5'",
    "transformers.py": """
from transformers.models.llama import modeling_llama

def _apply_liger_kernel_to_instance(model):
    print("patched", model.config.model_type)
    modeling_llama.apply_rotary_pos_emb = lambda q, k, cos, sin: (q, k)
""",
}
UNSLOTH = {
    "__init__.py": """
import sys
assert not {"transformers", "peft", "torch"} & set(sys.modules), "imported too late"
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
print("a banner, which must not stand among the answers")

class FastLanguageModel:
    @staticmethod
    def from_pretrained(folder, max_seq_length, dtype, load_in_4bit):
        assert not load_in_4bit and max_seq_length >= 8
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), AutoTokenizer.from_pretrained(folder)

    @staticmethod
    def get_peft_model(model, use_gradient_checkpointing, **config):
        assert use_gradient_checkpointing == "unsloth"
        return get_peft_model(model, LoraConfig(**config))

    @staticmethod
    def for_training(model, use_gradient_checkpointing):
        model.train()
        if use_gradient_checkpointing:
            model.gradient_checkpointing_enable()

    @staticmethod
    def for_inference(model):
        model.eval()
"""
}


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Put a stand-in of a package where this process and its children find it."""

    def put(package, files):
        folder = tmp_path / "kits" / package
        folder.mkdir(parents=True)
        for name, text in files.items():
            (folder / name).write_text(text)
        monkeypatch.syspath_prepend(folder.parent)
        monkeypatch.setenv("PYTHONPATH", str(folder.parent), prepend=":")

    return put


@pytest.fixture
def hide(monkeypatch):
    """Make this process find no kit, whatever is installed."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)


def seconds_by_arm(folder):
    _, rows = read([folder / "results.csv"])
    found = {}
    for row in rows:
        assert row.metric == "seconds" and row.value > 0
        found.setdefault((row.case, row.arm), []).append(row.repeat)
    return found


def test_arms_of_three_processes_take_turns(install, tmp_path, capfd):
    install("liger_kernel", LIGER)
    install("unsloth", UNSLOTH)
    arms = ["frozen", "frozen-liger", "lora-liger", "unsloth"]
    words = f"{TINY} --sizes 1x8 2x4 --recompute 2x4 --out {tmp_path} --arms {' '.join(arms)}"
    model.main(words.split())
    cases = [
        f"tiny, 1 blocks, {size}, gradient checkpointing {on}"
        for size, on in [("1 x 8", "off"), ("2 x 4", "off"), ("2 x 4", "on")]
    ]
    assert seconds_by_arm(tmp_path) == {(case, arm): [0, 1] for case in cases for arm in arms}
    _, rows = read([tmp_path / "results.csv"])
    assert [row.arm for row in rows[:8]] == arms * 2
    assert "`unsloth`: Unsloth's LoRA" in table.render(*read([tmp_path / "results.csv"]))
    assert modeling_llama.apply_rotary_pos_emb.__module__ == modeling_llama.__name__  # nothing was patched here
    assert "patched llama" in capfd.readouterr().err


def test_unsloth_generates_from_its_own_cache_alone(install, tmp_path, capsys):
    install("unsloth", UNSLOTH)
    words = f"{TINY} --steps 3 --batches 2 --cache dynamic static --out {tmp_path} --arms frozen unsloth"
    generate.main(words.split())
    case = "tiny, 1 blocks, batch 2, 3 tokens after 16, {} cache"
    expected = [
        (case.format("dynamic"), "frozen"),
        (case.format("dynamic"), "unsloth"),
        (case.format("static"), "frozen"),
    ]
    assert list(seconds_by_arm(tmp_path)) == expected
    assert "left out with a static cache: unsloth" in capsys.readouterr().out


def test_a_missing_kit_leaves_its_arms_out_by_name(hide, tmp_path, capsys):
    model.main(f"{TINY} --length 8 --checkpointing off --out {tmp_path} --arms frozen lora-liger unsloth".split())
    assert {arm for _, arm in seconds_by_arm(tmp_path)} == {"frozen"}
    printed = capsys.readouterr().out
    assert "left out: lora-liger. pip install liger-kernel\n" in printed
    assert "left out: unsloth. pip install unsloth\n" in printed


def test_a_kit_that_cannot_start_leaves_the_others_to_go_on(install, tmp_path, capsys):
    install("unsloth", {"__init__.py": "raise ImportError('no GPU')"})
    model.main(f"{TINY} --length 8 --checkpointing off --out {tmp_path} --arms unsloth frozen".split())
    assert {arm for _, arm in seconds_by_arm(tmp_path)} == {"frozen"}
    assert "left out: unsloth. the process with unsloth ended with status 1" in capsys.readouterr().out


def test_an_arm_that_fails_elsewhere_is_recorded_and_the_others_go_on(install, tmp_path):
    broken = UNSLOTH["__init__.py"].replace("model.eval()", "model.eval(); model.generate = None")
    install("unsloth", {"__init__.py": broken})
    generate.main(f"{TINY} --steps 2 --batches 1 --out {tmp_path} --arms frozen unsloth".split())
    _, rows = read([tmp_path / "results.csv"])
    assert [(row.arm, row.metric) for row in rows] == [
        ("frozen", "seconds"),
        ("unsloth", "failed"),
        ("frozen", "seconds"),
    ]
    assert rows[1].note == "RemoteError: TypeError: the first argument must be callable"


def test_a_process_that_ends_fails_every_question(install):
    install("liger_kernel", LIGER)
    remote = Remote("liger_kernel", "benchmarks.model", [*TINY.split(), "--length", "8"], ["frozen-liger"])
    remote.wait()
    remote.use(1, 8, False)
    assert remote.seconds("frozen-liger") > 0 and remote.peak_bytes("frozen-liger") == 0
    with pytest.raises(RemoteError, match="KeyError: 'lora'"):
        remote.seconds("lora")
    assert remote.seconds("frozen-liger") > 0  # it goes on after an error
    remote.process.kill()
    for _ in range(2):
        with pytest.raises(RemoteError, match="the process with liger_kernel ended with status -9"):
            remote.seconds("frozen-liger")
    remote.close()


def test_a_process_ends_when_nobody_asks(install):
    install("liger_kernel", LIGER)
    remote = Remote("liger_kernel", "benchmarks.model", [*TINY.split(), "--length", "8"], ["frozen-liger"])
    remote.close()
    assert remote.process.returncode == 0


@pytest.mark.parametrize("arm", sorted({*model.ARM_NAMES, *generate.ARM_NAMES}))
def test_arms_of_kits_are_named_after_them(arm):
    assert kit_of(arm) == ("liger" if "liger" in arm else "unsloth" if "unsloth" in arm else None)
