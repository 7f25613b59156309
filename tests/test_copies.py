"""deepcopy and pickle of a mixture: the copy is whole, and changing it does not change the original."""

import copy
import pickle

import torch
from helpers import ARCHITECTURES, SCOPES, assert_clean, awaken, every_pair, llama, mixture_of, train_step

INPUTS = ARCHITECTURES["llama"].batch(3, 7)
E = 4


def logits(model, **kwargs):
    with torch.no_grad():
        return model.eval()(input_ids=INPUTS["input_ids"], **kwargs).logits


@every_pair(how=["deepcopy", "pickle"], trained=[False, True], scope=SCOPES)
def test_copies_are_whole_and_separate(how, trained, scope):
    model = mixture_of("llama", router_scope=scope, router_type="learned_with_maturity", maturity_tokens=50)
    if trained:
        train_step(model, INPUTS)
    twin = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    expected = logits(model)
    torch.testing.assert_close(logits(twin), expected, rtol=0, atol=0)
    torch.testing.assert_close(logits(twin, routing_weights=torch.zeros(3, E)), logits(llama()))
    _, grads = train_step(twin, INPUTS)
    assert set(grads) == {n for n, p in twin.named_parameters() if p.requires_grad}
    assert twin.expert_maturity.sum() > model.expert_maturity.sum(), "the copy grows"
    awaken(twin, seed=9)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=0)
    assert twin.base_model.routing is not model.base_model.routing
    assert_clean(twin.unload())
