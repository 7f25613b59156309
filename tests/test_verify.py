"""`moelora verify`: what it says of adapters that do what they did, and of those that do not."""

import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import save_tiny_adapter, save_tiny_model
from transformers import AutoModelForCausalLM

from moelora.cli.commands import main
from moelora.files.atomic_save import checksum
from moelora.forward.log_probs import log_probs
from moelora.serving.verify.verdict import Computed, Status, compare, judge
from moelora.storage.references import References, pair_up

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A routed mixture, a fixed one and a plain LoRA of one base model, with references of what they do."""
    folder = tmp_path_factory.mktemp("made")
    save_tiny_adapter(folder)
    shutil.move(folder / "adapter", folder / "routed")
    save_tiny_adapter(folder, router_type="fixed")
    shutil.move(folder / "adapter", folder / "fixed")
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    plain = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=3))
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    plain.save_pretrained(folder / "plain")
    for name in ("routed", "fixed", "plain"):
        assert main(["verify", str(folder / name), "--write"]) == 0
    return folder


@pytest.fixture
def adapter(made, tmp_path):
    return lambda name: shutil.copytree(made / name, tmp_path / name)


def change_weights(folder, change):
    """Alter B as if the adapter had been saved so, under the id of its save."""
    path = folder / WEIGHTS
    with safe_open(path, "pt") as stream:
        metadata = stream.metadata()
    tensors = {key: change(tensor) if "lora_B" in key else tensor for key, tensor in load_file(path).items()}
    save_file(tensors, path, metadata=metadata)
    config = json.loads((folder / CONFIG).read_text())
    if config.get("checkpoint"):
        config["checkpoint"]["files"][WEIGHTS] = checksum(tensors)
        (folder / CONFIG).write_text(json.dumps(config))
    else:
        references = json.loads((folder / "references.json").read_text())
        references["save"] = checksum(tensors)
        (folder / "references.json").write_text(json.dumps(references))


def verify(capsys, *arguments):
    """The exit status of the command, and its verdict."""
    capsys.readouterr()
    status = main(["verify", *map(str, arguments)])
    printed = capsys.readouterr()
    return status, (printed.err if status else printed.out).splitlines()[-1]


@pytest.mark.parametrize("name", ["routed", "fixed", "plain"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_an_adapter_does_what_it_did(adapter, capsys, name, precision):
    status, said = verify(capsys, adapter(name), "--dtype", precision, "--device", "cpu")
    assert status == 0 and "does what it did in training: mean |Δ|" in said


@pytest.mark.parametrize("name", ["routed", "plain"])
def test_an_adapter_that_does_nothing_is_told(adapter, capsys, name):
    folder = adapter(name)
    change_weights(folder, torch.zeros_like)
    status, said = verify(capsys, folder)
    assert status == 1 and "changes nothing: log-probabilities are the base's" in said


@pytest.mark.parametrize("name", ["routed", "plain"])
@pytest.mark.parametrize(
    ("factor", "precision"),
    [(0.5, "float32"), (0.9, "float32"), (1.1, "float32"), (0.5, "bfloat16"), (2.0, "bfloat16")],
)
def test_an_adapter_of_another_strength_differs(adapter, capsys, name, factor, precision):
    folder = adapter(name)
    change_weights(folder, lambda tensor: tensor * factor)
    status, said = verify(capsys, folder, "--dtype", precision)
    assert status == 1 and "is loaded, but differs: mean |Δ|" in said


def test_a_configuration_that_was_edited_differs(adapter, capsys):
    folder = adapter("plain")
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"lora_alpha": 2 * config["lora_alpha"]}))
    status, said = verify(capsys, folder)
    assert status == 1 and "differs" in said


def test_a_lora_whose_weights_peft_passes_over_changes_nothing(adapter, capsys):
    """PEFT warns of names that it does not find in the model, and leaves B at zero."""
    folder = adapter("plain")
    (folder / "references.json").unlink()
    tensors = {key.replace("model.layers", "model.blocks"): value for key, value in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    status, said = verify(capsys, folder)
    assert status == 1 and "changes nothing" in said
    assert main(["verify", str(folder), "--write"]) == 2
    assert not (folder / "references.json").exists()


def test_another_base_model_is_named(adapter, tmp_path, capsys):
    other = AutoModelForCausalLM.from_pretrained(save_tiny_model(tmp_path / "other"))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    other.save_pretrained(tmp_path / "other")
    status, said = verify(capsys, adapter("routed"), "--base", tmp_path / "other")
    assert status == 1 and "the base model alone differs by" in said


def test_without_references_nothing_says_what_it_did(adapter, tmp_path, capsys):
    folder = adapter("plain")
    (folder / "references.json").unlink()
    (tmp_path / "texts.txt").write_text("some words to read")
    status, said = verify(capsys, folder, "--prompts", tmp_path / "texts.txt")
    assert status == 3 and "changes the base model's log-probabilities" in said and "--write" in said


def test_references_are_not_written_over(adapter, capsys):
    folder = adapter("plain")
    before = (folder / "references.json").read_bytes()
    status, said = verify(capsys, folder, "--write")
    assert status == 2 and "move it away" in said
    assert (folder / "references.json").read_bytes() == before


def test_a_fixed_mixture_merges(adapter, capsys):
    status, said = verify(capsys, adapter("fixed"), "--runtime", "merged")
    assert status == 0 and "does what it did" in said
    status, said = verify(capsys, adapter("plain"), "--runtime", "merged")
    assert status == 0 and "does what it did" in said


def test_a_routed_mixture_does_not_merge(adapter, capsys):
    status, said = verify(capsys, adapter("routed"), "--runtime", "merged")
    assert status == 2 and "weighs experts differently for each token, so it cannot be merged" in said


def test_a_merged_model_is_compared_in_the_adapters_place(adapter, made, tmp_path, capsys):
    base = AutoModelForCausalLM.from_pretrained(made / "model")
    merged = PeftModel.from_pretrained(base, made / "fixed").merge_and_unload()
    shutil.copytree(made / "model", tmp_path / "merged")
    merged.save_pretrained(tmp_path / "merged")
    folder, options = adapter("fixed"), ("--runtime", "merged", "--model")
    status, said = verify(capsys, folder, *options, tmp_path / "merged")
    assert status == 0 and "does what it did" in said
    status, said = verify(capsys, folder, *options, made / "model")
    assert status == 1 and "changes nothing" in said


def test_an_export_of_a_fixed_mixture_is_exact(adapter, tmp_path, capsys):
    assert main(["export", str(adapter("fixed")), "--mixture", "--out", str(tmp_path / "lora")]) == 0
    status, said = verify(capsys, tmp_path / "lora")
    assert status == 0 and "does what it did" in said


def test_an_export_that_only_comes_near_keeps_a_share(adapter, tmp_path, capsys):
    assert main(["export", str(adapter("routed")), "--expert", "0", "--out", str(tmp_path / "lora")]) == 0
    status, said = verify(capsys, tmp_path / "lora", "--keep", "0")
    assert status == 0 and "does nearly what it did in training: keeps" in said
    status, said = verify(capsys, tmp_path / "lora", "--keep", "1")
    assert status == 1 and "100% would be enough" in said


def test_tokens_that_the_base_model_does_not_know_are_refused(adapter, capsys):
    folder = adapter("plain")
    content = json.loads((folder / "references.json").read_text())
    content["prompts"][0]["token_ids"][0] = 10**6
    (folder / "references.json").write_text(json.dumps(content))
    status, said = verify(capsys, folder)
    assert status == 2 and "token 1000000 is none of the" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--runtime", "vlm"], "did you mean `vllm`?"),
        (["--model", "."], "goes with --runtime merged"),
        (["--write", "--runtime", "merged"], "leave it out with --write"),
        (["--runtime", "vllm", "--device", "cpu"], "vLLM takes the GPU"),
        (["--device", "meta"], "no device of this machine's"),
        (["--device", "warp"], "no device of this machine's"),
        (["--keep", "2"], "must be 0 to 1"),
        (["--prompts", "gone.txt"], "no such file"),
        (["--dtype", "int8"], "must be one of auto"),
    ],
)
def test_options_are_checked_first(made, capsys, options, message):
    assert main(["verify", str(made / "plain"), *options]) == 2
    error = capsys.readouterr().err
    assert message in error and "Loading" not in error


def test_vllm_that_is_not_installed_is_told(made, capsys, monkeypatch):
    monkeypatch.setattr("moelora.serving.verify.in_vllm.find_spec", lambda name: None)
    status, said = verify(capsys, made / "plain", "--runtime", "vllm")
    assert status == 2 and 'pip install "moelora[vllm]"' in said


class Engine:
    """Stands for vLLM's: answers each prompt with what transformers computes, or the base where it drops the LoRA."""

    asked: dict

    def __init__(self, **options):
        Engine.asked = options
        self.base = AutoModelForCausalLM.from_pretrained(options["model"]).eval()

    def generate(self, prompts, sampling, lora_request=None, use_tqdm=True):
        model = self.base
        if lora_request is not None and not Engine.drops:
            model = PeftModel.from_pretrained(
                AutoModelForCausalLM.from_pretrained(self.base.name_or_path), lora_request
            )
        return [SimpleNamespace(prompt_logprobs=self.row(model, prompt["prompt_token_ids"])) for prompt in prompts]

    @staticmethod
    def row(model, ids):
        found = log_probs(model.eval(), ids)
        return [None, *({token: SimpleNamespace(logprob=value)} for token, value in zip(ids[1:], found, strict=True))]


@pytest.fixture
def vllm(monkeypatch):
    """A module of that name, whose engine may be told to drop LoRAs."""
    lora = SimpleNamespace(LoRARequest=lambda name, number, path: path)
    module = SimpleNamespace(LLM=Engine, SamplingParams=lambda **options: options)
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setitem(sys.modules, "vllm.lora", SimpleNamespace(request=lora))
    monkeypatch.setitem(sys.modules, "vllm.lora.request", lora)
    monkeypatch.setattr("moelora.serving.verify.in_vllm.find_spec", lambda name: name)
    monkeypatch.setattr(Engine, "drops", False, raising=False)
    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_LOGGING_STREAM"):
        monkeypatch.setenv(name, "as the user has it")
    return module


def test_an_engine_is_told_what_the_adapter_needs(adapter, capsys, vllm):
    status, said = verify(capsys, adapter("plain"), "--runtime", "vllm")
    assert status == 0 and "does what it did" in said
    assert Engine.asked["max_lora_rank"] == 8 and Engine.asked["dtype"] == "float32"
    assert "lora_target_modules" not in Engine.asked  # vLLM would drop the others without an error
    status, said = verify(capsys, adapter("routed"), "--runtime", "vllm")
    assert status == 0 and Engine.asked["max_lora_rank"] == 8  # four experts of rank 2


def test_a_lora_of_the_head_is_refused_before_an_engine_starts(made, tmp_path, capsys, vllm, monkeypatch):
    monkeypatch.setattr(Engine, "__init__", None)
    base = AutoModelForCausalLM.from_pretrained(made / "model")
    get_peft_model(base, LoraConfig(target_modules=["q_proj", "lm_head"])).save_pretrained(tmp_path / "head")
    status, said = verify(capsys, tmp_path / "head", "--runtime", "vllm")
    assert status == 2 and "adapts lm_head, which vLLM leaves out of the log-probabilities of prompts" in said


def test_an_engine_that_drops_the_adapter_is_told(adapter, capsys, vllm, monkeypatch):
    monkeypatch.setattr(Engine, "drops", True)
    status, said = verify(capsys, adapter("plain"), "--runtime", "vllm")
    assert status == 1 and "changes nothing: log-probabilities are the base's" in said


def test_what_an_engine_says_is_told_in_one_line(adapter, capsys, vllm, monkeypatch):
    def refuse(self, **options):
        raise ValueError("a reason\n  over two lines")

    monkeypatch.setattr(Engine, "__init__", refuse)
    status, said = verify(capsys, adapter("plain"), "--runtime", "vllm")
    assert status == 2 and said.startswith("moelora: --runtime vllm: ") and said.endswith("a reason over two lines")


def test_ranks_beyond_vllms_are_refused(tmp_path, capsys, vllm):
    save_tiny_adapter(tmp_path, r=130)
    assert main(["verify", str(tmp_path / "adapter"), "--write"]) == 0
    status, said = verify(capsys, tmp_path / "adapter", "--runtime", "vllm")
    assert status == 2 and "has ranks of 520 in all (experts times rank), and vLLM takes at most 512" in said


# ---- verdicts --------------------------------------------------------------------------------------------------------

BASE = [-1.0, -2.0, -3.0, -4.0]


def shifted(row, *by):
    return [value - by[i % len(by)] for i, value in enumerate(row)]


def verdict(adapted, base=BASE, *, effect=1.0, dtype="float32", of="float32", keep=0.5, is_exact=True):
    references = References("x", "base", of, pair_up([[1] * 5], [shifted(BASE, effect)], [BASE]))
    return judge(Computed([adapted], [base], dtype), references, keep, is_exact=is_exact)


@pytest.mark.parametrize(
    ("off", "dtype", "status"),
    [(0.009, "float32", Status.SAME), (0.011, "float32", Status.DIFFERS), (0.09, "bfloat16", Status.SAME),
     (0.11, "bfloat16", Status.DIFFERS)],
)  # fmt: skip
@pytest.mark.parametrize("effect", [1.0, 0.05])
def test_rounding_is_a_share_of_the_effect(off, dtype, status, effect):
    found = verdict(shifted(BASE, effect * (1 + off)), effect=effect, dtype=dtype)
    assert found.status is status
    assert verdict(shifted(BASE, effect * (1 + off)), effect=effect, of=dtype).status is status


def test_what_the_base_alone_differs_by_is_rounding_too():
    noisy = shifted(BASE, 0.04, -0.04)
    assert verdict(shifted(BASE, 1.07), noisy).status is Status.SAME
    assert verdict(shifted(BASE, 1.09), noisy).status is Status.DIFFERS
    assert verdict(shifted(BASE, 1.07), BASE).status is Status.DIFFERS


def test_too_coarse_a_base_does_not_let_all_pass():
    coarse = shifted(BASE, 0.4, -0.4)
    found = verdict(shifted(BASE, 1.6), coarse)
    assert found.status is Status.DIFFERS and "the base model alone differs by 0.4" in found.text


def test_an_adapter_that_learned_nothing_is_told_so():
    found = verdict(BASE, effect=0.0)
    assert found.status is Status.DIFFERS and "it learned nothing" in found.text


def test_less_than_a_hundredth_of_the_effect_is_nothing():
    assert "changes nothing" in verdict(shifted(BASE, 0.009)).text
    assert "changes nothing" not in verdict(shifted(BASE, 0.011)).text


def test_numbers_that_are_none_are_told():
    found = verdict(shifted(BASE, float("inf")))
    assert found.status is Status.DIFFERS and "not finite" in found.text


@pytest.mark.parametrize(("kept", "status"), [(0.49, Status.DIFFERS), (0.51, Status.SAME)])
def test_what_comes_near_has_to_keep_a_share(kept, status):
    found = verdict(shifted(BASE, kept), is_exact=False)
    assert found.status is status and f"keeps {kept:.0%}" in found.text


def test_prompts_count_by_their_tokens():
    computed = Computed([[-1.0], [-2.0] * 3], [[0.0], [0.0] * 3], "float32")
    assert [row.effect for row in compare(computed, None)] == [1.0, 2.0, 1.75]
