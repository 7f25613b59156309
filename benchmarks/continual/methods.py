"""All methods by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from .ewc import Ewc
from .gainlora import GainLora
from .inflora import InfLora
from .learner import Learner, Setting
from .mixture import LAST, Grown, Recipe
from .o_lora import OLora
from .osf import Osf
from .plain import Joint, Lora, PerTask
from .prog_prompt import ProgressivePrompts
from .slao import Slao

RATES = (2.5e-4, 5e-4, 1e-3, 2e-3)


@dataclass(frozen=True)
class Method:
    """How a method is shown and made.

    Args:
        about: what it does, in a line; "re-implementation" where it is ours from a paper's formulas.
        is_told: whether it is told the task when it answers.
        rates: learning rates to choose from.
        is_main: whether it runs where no methods are named.
    """

    about: str
    make: Callable[[Setting], Learner]
    is_told: bool = False
    rates: tuple[float, ...] = RATES
    is_main: bool = True


METHODS: dict[str, Method] = {
    "lora": Method("one LoRA, trained on one task after the other", Lora),
    "replay-2": Method("the same; 2% of each earlier task's rows are kept and replayed", partial(Lora, replayed=0.02)),
    "replay-10": Method("the same with 10%", partial(Lora, replayed=0.1)),
    "joint": Method("one LoRA, trained on all tasks at once, for as many steps", Joint),
    "oracle": Method("a LoRA for each task; told the task", PerTask, is_told=True),
    "moelora": Method("a mixture that grows by an expert for each task; never told the task", Grown),
    **{
        f"moelora-{name}": Method(f"the same{about}", partial(Grown, recipe=recipe), is_main=False)
        for name, (about, recipe) in {
            "new": (", each expert starting from nothing", Recipe(start="new")),
            "last": (", each expert starting from the last one", Recipe(start=LAST)),
            "block": (", each block deciding for itself", Recipe(scope="block")),
            "64": (", the last 64 tokens deciding", Recipe(window=64)),
            "four": (" by four experts of a quarter of the rank, two a token", Recipe(experts=4, top_k=2)),
            "dense": (" by four experts of a quarter of the rank, all four a token", Recipe(experts=4, top_k=4)),
            "loud": (", each expert twice as loud", Recipe(loudness=4.0)),
            "half": (", at most half as many experts, merged without text", Recipe(experts=4, top_k=2, budget=0.5)),
        }.items()
    },
    "o-lora": Method("O-LoRA: a LoRA for each task, its A orthogonal to those before; re-implementation", OLora),
    "inflora": Method("InfLoRA: a LoRA for each task, blind to the inputs of those before; re-implementation", InfLora),
    "ewc": Method("one LoRA in sequence, anchored by its Fisher information (EWC); re-implementation", Ewc),
    **{
        f"ewc-{strength:g}": Method(f"EWC with lambda = {strength:g}", partial(Ewc, strength=strength), is_main=False)
        for strength in (1e2, 1e3, 1e5, 1e6)
    },
    "slao": Method("SLAO: one LoRA in sequence, orthogonal at its start, its B averaged; re-implementation", Slao),
    "gainlora": Method("GainLoRA on InfLoRA, re-implementation: a gated branch for each task", GainLora),
    "osf": Method(
        "PEFT's own OSF: the r smallest singular directions of each weight, split anew for each task",
        Osf,
        rates=(1e-4, 5e-4, 2e-3),
    ),
    "prog-prompt": Method(
        "Progressive Prompts, re-implementation: 20 virtual tokens more for each task; told the task",
        ProgressivePrompts,
        is_told=True,
        rates=(1e-3, 4e-3, 1.6e-2),
    ),
}
