"""An engine that is told no linears, as `moelora serve` and `moelora verify` start it: vLLM wraps the head then too."""

import pytest
from adapters import Workshop, mixture, plain
from harness import BASE, Reference, assert_greedy, for_all, prompts
from vllm import SamplingParams
from vllm.lora.request import LoRARequest

HEAD = ["q_proj", "lm_head"]
TEXTS = prompts()


@pytest.fixture
def engine(llama):
    return llama.engine(lora_target_modules=None)


@pytest.fixture
def shop(llama, tmp_path):
    return Workshop(llama.model, llama.linears, tmp_path)


def test_log_probabilities_of_prompts(llama, engine):
    requests = for_all([BASE, "plain", "sparse"], TEXTS)
    outputs = llama.ask(engine, requests)
    llama.assert_same(requests, outputs)
    assert_greedy(llama, requests, outputs)


def test_a_mixture_of_the_head_is_refused(engine, shop):
    folder = shop.scratch / "mixture"
    made = mixture(shop, target_modules=HEAD, router_scope="module")
    made.save_pretrained(str(folder), save_embedding_layers=False)
    with pytest.raises(ValueError, match="`lm_head` is computed where nothing weighs ranks"):
        engine.llm_engine.add_lora(LoRARequest("head", 800, str(folder)))


def test_a_plain_lora_of_the_head(engine, shop):
    folder = shop.scratch / "plain"
    plain(shop, target_modules=HEAD).save_pretrained(str(folder))
    asked = {"temperature": 0, "max_tokens": 8, "ignore_eos": True}
    inputs = [{"prompt_token_ids": list(text)} for text in TEXTS]
    lora = LoRARequest("head", 801, str(folder))
    outputs = engine.generate(inputs, SamplingParams(**asked), lora_request=lora, use_tqdm=False)
    reference = Reference(shop.model, folder)
    for text, output in zip(TEXTS, outputs, strict=True):
        found = output.outputs[0].token_ids
        assert reference.logprobs([*text, *found]).argmax(-1)[len(text) - 1 : -1].tolist() == list(found)
    engine.llm_engine.remove_lora(801)
