"""Every architecture beside plain LoRA: what LoRA adapts, a mixture adapts, with the same call and `"all-linear"`.

The models are tiny and made from configurations (tests/wide.py).
"""

import re
from pathlib import Path

import pytest
import torch
from helpers import awaken, routers_of
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from wide import CASES, MARKED, table

from moelora import MoELoraConfig

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def tensors(output) -> list[Tensor]:
    """The floating tensors of a model's output, but for its cache."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, dict):
        output = [value for name, value in output.items() if name not in ("past_key_values", "cache_params")]
    return [found for value in output for found in tensors(value)] if isinstance(output, list | tuple) else []


def outputs(model, inputs) -> list[Tensor]:
    """In evaluation mode; some models draw at random all the same."""
    torch.manual_seed(5)
    with torch.no_grad():
        return tensors(model.eval()(**inputs))


def learning(model, inputs) -> set[str]:
    """Names of the parameters that get a gradient in training."""
    torch.manual_seed(5)
    model.train().zero_grad()
    sum(tensor.float().pow(2).mean() for tensor in tensors(model(**inputs)) if tensor.requires_grad).backward()
    return {name.removeprefix("base_model.model.") for name, p in model.named_parameters() if p.grad is not None}


def adapted(parameters: set[str]) -> set[str]:
    """The linears that factors are of."""
    return {name.rpartition(".lora_")[0] for name in parameters if ".lora_A." in name or ".lora_B." in name}


def assert_same(actual: list[Tensor], expected: list[Tensor], message: str) -> None:
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=lambda text: f"{message}: {text}")


def change(actual: list[Tensor], expected: list[Tensor]) -> float:
    """The largest one, relative to the largest value."""
    pairs = zip(actual, expected, strict=True)
    return max(float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-6)) for ours, theirs in pairs)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_does_what_lora_does(case, tmp_path):
    inputs = case.inputs()
    by_lora = adapted(learning(get_peft_model(case.build(), LoraConfig(r=2, target_modules=case.targets)), inputs))
    base = case.build()
    expected = outputs(base, inputs)
    model = get_peft_model(base, MoELoraConfig(r=2, num_experts=3, target_modules=case.targets))
    assert_same(outputs(model, inputs), expected, "a fresh mixture changes the output")
    awaken(model)
    with model.disable_adapter():
        assert_same(outputs(model, inputs), expected, "disabling leaves something")
    before = outputs(model, inputs)
    assert change(before, expected) > 1e-3, "the experts change nothing"
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(case.build(), tmp_path)
    assert_same(outputs(loaded, inputs), before, "loaded, it is another")
    by_ours = learning(model, inputs)
    left = by_lora - adapted(by_ours)
    assert not [name for name in left if not (case.native and re.search(r"\.(experts|gate|router)\b", name))], left
    routers = {f"{name}.".lstrip(".") for name, router in routers_of(model).items() if is_used(name, by_lora)}
    assert routers <= {name.partition("moe_router.")[0] for name in by_ours if "moe_router." in name}


def is_used(router: str, linears: set[str]) -> bool:
    """Whether a router serves linears that run: some are there for their weight alone, which LoRA does not train."""
    return any(linear == router or linear.startswith(f"{router}.") for linear in linears)


GENERATING = [case for case in CASES if "CausalLM" in case.name and case.family != "vision-language"]


@pytest.mark.parametrize("case", GENERATING, ids=lambda case: case.name)
def test_generates_with_a_cache_as_without(case):
    """What a linear reads of a cache has the weights that it had when it came first."""
    model = get_peft_model(case.build(), MoELoraConfig(r=2, num_experts=3, target_modules=case.targets)).eval()
    awaken(model)
    arguments = {name: value for name, value in case.inputs().items() if name != "use_cache"}
    arguments |= {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    arguments |= {"return_dict_in_generate": True, "output_logits": True}
    cached, anew = (torch.stack(model.generate(**arguments, use_cache=it).logits) for it in (True, False))
    assert change([cached], [anew]) < 1e-4


def test_the_table_of_architectures_is_current():
    page = (Path(__file__).parents[1] / "docs" / "support.md").read_text(encoding="utf-8")
    assert MARKED.search(page)[0] == f"<!-- architectures -->\n{table()}\n<!-- end of architectures -->", (
        "run `python tests/wide.py docs/support.md`"
    )
