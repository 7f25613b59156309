"""What TRL's trainers do with a mixture that is ready: they add a copy of `default` that stands still, `ref`.

They call `add_adapter("ref", model.peft_config["default"])`, copy the parameters that have `.default.` in their names,
and switch to `ref` and back around each forward of the reference.
"""

from __future__ import annotations

from typing import Any

REFERENCE, POLICY = "ref", "default"


def is_reference(model: Any, adapter_name: str, config: Any) -> bool:
    """Whether an adapter that is about to be added is a trainer's copy, told by the very configuration."""
    return adapter_name == REFERENCE and config is model.peft_config.get(POLICY)


def make_way(model: Any) -> None:
    """Remove the reference of an earlier training, which a save of it holds.

    Raises:
        ValueError: the mixture is more than `default`, of which alone the trainer makes a copy.
    """
    if model.active_adapters != [POLICY]:
        raise ValueError(
            f"an adapter cannot be added as {REFERENCE!r} with the configuration of {POLICY!r}: TRL's trainers do "
            f"that for a reference, and would go on with {POLICY!r} alone, but this mixture is "
            f"{', '.join(model.active_adapters)}. Give DPOTrainer or KTOTrainer "
            "`ref_model=copy.deepcopy(model).get_base_model()`, train GRPO and RLOO with `beta=0`, or call "
            f"`model.set_adapter({POLICY!r})` first"
        )
    if REFERENCE in model.peft_config:
        model.delete_adapter(REFERENCE)


def make_equal(model: Any) -> None:
    """Let the copy and what it is of compute the same, whatever the batch.

    It gets what its trainer does not copy, for it is no parameter: maturity, and whatever else decides. Both lose their
    capacity, by which a text's log-probabilities depend on the texts beside it. Pairs of native experts alone have
    parameters and nothing else.
    """
    if model.base_model.routing_or_none is None:
        return
    for router in model.base_model.routing.routers.values():
        if POLICY in router.lora_router:
            router[REFERENCE].load_state_dict(router[POLICY].state_dict())
    model.base_model.give_up_capacity(
        "log-probabilities are compared with those of a reference, perhaps of other batches, and by a capacity those "
        "of a text depend on the texts beside it"
    )
