"""Training in every precision that users choose learns what float32 learns."""

from functools import cache

import pytest
import torch
from helpers import ARCHITECTURES, SCOPES, mixture_of

STEPS, LR = 12, 5e-3
BATCH = ARCHITECTURES["llama"].batch(4, 9) | {"use_cache": False}


def mixture(scope, dtype=torch.float32):
    model = mixture_of("llama", router_scope=scope, router_type="learned_with_maturity", maturity_tokens=300)
    for name, parameter in model.named_parameters():
        if "lora_" not in name:  # PEFT keeps the adapters in float32 above a low-precision base
            parameter.data = parameter.data.to(dtype)
    return model.train()


def train(model, autocast=None, scaler=None):
    """Losses of STEPS steps, and the gradients of the first."""
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=LR)
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    losses, first = [], {}
    for _ in range(STEPS):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
            loss = model(**BATCH).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        first = first or {n: p.grad.clone() for n, p in parameters.items()}
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    return losses, first


@cache
def in_float32(scope):
    return train(mixture(scope))


# How the base is stored and how it computes.
PRECISIONS = {
    "float32": ({}, {}),
    "bfloat16 base": ({"dtype": torch.bfloat16}, {}),
    "float16 base": ({"dtype": torch.float16}, {}),
    "bfloat16 autocast": ({}, {"autocast": torch.bfloat16}),
    "float16 autocast": ({}, {"autocast": torch.float16}),
}


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_learns_what_float32_learns(precision, scope):
    base, run = PRECISIONS[precision]
    # Relative error of all gradients together: two blocks of some eight roundings each, twice that where every linear
    # has a router. It is rounding: float16's is an eighth of bfloat16's.
    roundings = 32 if scope == "module" else 16
    tolerance = roundings * torch.finfo(getattr(torch, precision.split()[0])).eps if base or run else 0.0
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12) if "float16" in precision.split() else None
    expected, expected_grads = in_float32(scope)
    losses, grads = train(mixture(scope, **base), **run, scaler=scaler)
    actual, reference = (torch.cat([g[n].flatten() for n in expected_grads]) for g in (grads, expected_grads))
    assert (actual - reference).norm() <= tolerance * reference.norm()
    assert losses[0] == pytest.approx(expected[0], rel=tolerance)
    assert losses[-1] < 0.8 * losses[0]
    assert losses[-1] == pytest.approx(expected[-1], abs=tolerance * losses[0])


def test_a_step_that_overflows_is_skipped_and_training_goes_on():
    model = mixture("block")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
    losses, grads = train(model, autocast=torch.float16, scaler=scaler)
    assert not all(g.isfinite().all() for g in grads.values()), "nothing overflowed"
    assert scaler.get_scale() < 2.0**20 and losses[-1] < losses[0]
    assert all(p.isfinite().all() for p in model.parameters())
    assert model.expert_maturity.isfinite().all()
