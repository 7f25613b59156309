"""An attached router on disk: its weights as safetensors, and in the configuration what it is.

A stack of torch.nn's own layers describes itself there and comes back by itself. Any other module is the user's code,
which no file may name to be run: the user gives the module, and the weights are loaded into it. Until then
[`AwaitedRouter`] stands in its place.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..files.atomic_save import ID_KEY, PICKLED_ROUTER_NAME, ROUTER_NAME, SaveError

LAYERS: dict[str, tuple[type[nn.Module], tuple[str, ...]]] = {
    "Linear": (nn.Linear, ("in_features", "out_features", "bias")),
    "LayerNorm": (nn.LayerNorm, ("normalized_shape", "eps", "elementwise_affine", "bias")),
    "RMSNorm": (nn.RMSNorm, ("normalized_shape", "eps", "elementwise_affine")),
    "Softmax": (nn.Softmax, ("dim",)),
    "Softplus": (nn.Softplus, ("beta", "threshold")),
    "LeakyReLU": (nn.LeakyReLU, ("negative_slope",)),
    "ELU": (nn.ELU, ("alpha",)),
    "GELU": (nn.GELU, ("approximate",)),
    "ReLU": (nn.ReLU, ()),
    "SiLU": (nn.SiLU, ()),
    "Sigmoid": (nn.Sigmoid, ()),
    "Tanh": (nn.Tanh, ()),
    "Identity": (nn.Identity, ()),
    "Dropout": (nn.Dropout, ("p",)),
}
"""Layers that may describe themselves: their class, and the arguments that make them, which are attributes too."""
_MOST_LAYERS = 64
_WIDEST = 1 << 20


class AwaitedRouter(nn.Module):
    """Stands in for a saved router until the user attaches the module whose weights these are; routes nothing."""

    def __init__(self, class_name: str, source: str, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.class_name = class_name
        self.source = source
        self.weights = weights

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Refused.

        Raises:
            ValueError: always: the built-in routers are not what the mixture was saved with.
        """
        raise ValueError(
            f"{self.source!r} was saved with an attached router, {self.class_name}, which is code of yours: give it by "
            "`attach_router(module)`, or `from_pretrained(..., router=module)`, and its weights are loaded into it; "
            "`detach_router()` goes on with the built-in routers"
        )

    def fill(self, module: nn.Module) -> None:
        """Load the saved weights into the user's module.

        Raises:
            ValueError: they do not fit; the module has not changed then.
        """
        load_into(module, self.class_name, self.weights, self.source)


# ---- describing ------------------------------------------------------------------------------------------------------


def describe(router: nn.Module, num_experts: int) -> dict[str, Any]:
    """What the configuration says of an attached router."""
    if isinstance(router, AwaitedRouter):
        return {"class": router.class_name, "num_experts": num_experts, "layers": None}
    layers = _described(router)
    if layers is not None and not _is_same(_built(layers), router):  # parametrised, say, or with other parts set on it
        layers = None
    return {"class": class_name(router), "num_experts": num_experts, "layers": layers}


def class_name(router: nn.Module) -> str:
    """A module's class, for people: nothing is looked up by it."""
    return f"{type(router).__module__}.{type(router).__qualname__}"


def _described(module: nn.Module) -> dict[str, Any] | None:
    """A stack of known layers as JSON values; None for anything else."""
    if type(module) is nn.Sequential:
        inner = [_described(layer) for layer in module]
        return None if None in inner else {"type": "Sequential", "layers": inner}
    name = type(module).__name__
    if LAYERS.get(name, (None,))[0] is not type(module):
        return None
    described: dict[str, Any] = {"type": name}
    for argument in LAYERS[name][1]:
        value = getattr(module, argument)
        described[argument] = list(value) if isinstance(value, tuple) else value
    if "bias" in described:
        described["bias"] = described["bias"] is not None
    return described


def _is_same(built: nn.Module, router: nn.Module) -> bool:
    mine, theirs = built.state_dict(), router.state_dict()
    is_changed = any(
        module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module) for module in router.modules()
    )
    return not is_changed and {k: v.shape for k, v in mine.items()} == {k: v.shape for k, v in theirs.items()}


def _built(layers: Any, budget: list[int] | None = None) -> nn.Module:
    """The stack of layers that a description stands for, without memory for its weights.

    Raises:
        ValueError: it describes none.
    """
    budget = [_MOST_LAYERS] if budget is None else budget
    budget[0] -= 1
    kind = layers.get("type") if isinstance(layers, dict) else None
    if budget[0] < 0 or not isinstance(kind, str):
        raise ValueError(f"no description of at most {_MOST_LAYERS} layers")
    if kind == "Sequential":
        inner = layers.get("layers")
        if not isinstance(inner, list):
            raise ValueError("a Sequential without `layers`")
        return nn.Sequential(*(_built(layer, budget) for layer in inner))
    if kind not in LAYERS:
        raise ValueError(f"a layer {kind!r}; known are {', '.join(LAYERS)}")
    cls, names = LAYERS[kind]
    given = {name: value for name, value in layers.items() if name != "type"}
    if set(given) != set(names):
        raise ValueError(f"a {kind} with {', '.join(given) or 'nothing'}; it takes {', '.join(names) or 'nothing'}")
    with torch.device("meta"):
        return cls(**given)


# ---- files -----------------------------------------------------------------------------------------------------------


def save_router(router: nn.Module, folder: Path, save_id: str) -> dict[str, Tensor]:
    """Write a router's weights, and return them.

    Raises:
        ValueError: it keeps state that is no tensor.
    """
    state = router.weights if isinstance(router, AwaitedRouter) else router.state_dict()
    if strange := [name for name, value in state.items() if not isinstance(value, Tensor)]:
        raise ValueError(
            f"the attached router {type(router).__name__} cannot be saved: `{strange[0]}` of its state_dict is a "
            f"{type(state[strange[0]]).__name__}; only tensors are saved, so keep it in a buffer or out of the state"
        )
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
    save_file(tensors, folder / ROUTER_NAME, metadata={"format": "pt", ID_KEY: save_id})
    return tensors


def router_for(
    source: str, described: dict[str, Any], weights: dict[str, Tensor], num_experts: int, given: nn.Module | None
) -> nn.Module:
    """The router to attach: the one given, the one that is described, or one that waits for the user's.

    Args:
        described: from [`describe`].
        num_experts: E of the mixture as it was saved.
        given: the user's module; its weights are not loaded yet.

    Raises:
        SaveError: the router is of another number of experts, or not what it is described as.
        ValueError: the weights do not fit the module given.
    """
    name = str(described.get("class"))
    if described.get("num_experts") != num_experts:
        raise SaveError(
            f"the attached router of {source!r} is for {described.get('num_experts')!r} experts, and the mixture has "
            f"{num_experts}; restore the adapter from a copy"
        )
    if given is not None:
        check_loads_into(given, name, weights, source)
        return given
    layers = described.get("layers")
    if layers is None:
        warnings.warn(
            f"{source!r} was saved with an attached router, {name}, which is code of yours: attach it by "
            "`attach_router(module)` before the first forward, or pass `router=module` to from_pretrained",
            stacklevel=4,
        )
        return AwaitedRouter(name, source, weights)
    try:
        built = _built(layers)
        expected = {key: tensor.shape for key, tensor in built.state_dict().items()}
        if expected != {key: tensor.shape for key, tensor in weights.items()}:
            raise ValueError(f"its weights are {_shapes(weights)}, its layers' {_shapes(built.state_dict())}")
        if any(not tensor.is_floating_point() for tensor in weights.values()):
            raise ValueError("its weights are no floating-point numbers")
        built.load_state_dict(weights, assign=True)
        _check_routes(built, num_experts)
    except (ValueError, TypeError, RuntimeError, RecursionError, OverflowError, LookupError) as error:
        raise SaveError(f"the attached router of {source!r} is not what it is described as: {error}") from error
    return built.requires_grad_(True)


def _check_routes(router: nn.Module, num_experts: int) -> None:
    """Try a described router on one token: layers take their arguments as they come, and fail where they compute.

    Raises:
        ValueError: it gives no finite weight for every expert; layers raise errors of other kinds too.
    """
    wide = (nn.Linear, nn.LayerNorm, nn.RMSNorm)
    first = next((layer for layer in router.modules() if isinstance(layer, wide)), None)
    if first is None:
        width = num_experts
    else:
        width = first.in_features if isinstance(first, nn.Linear) else first.normalized_shape[-1]
    if width > _WIDEST:
        raise ValueError(f"it reads {width} numbers")
    dtype = next((parameter.dtype for parameter in router.parameters()), torch.float32)
    with torch.no_grad():
        routed = router.eval()(torch.linspace(-1, 1, width, dtype=torch.float64).to(dtype).view(1, 1, width))
    router.train()
    if routed.shape != (1, 1, num_experts) or not bool(routed.isfinite().all()):
        raise ValueError(
            f"it gives {list(routed.shape[2:])} numbers, or none that are finite, for {num_experts} experts"
        )


def check_loads_into(module: nn.Module, name: str, weights: dict[str, Tensor], source: str) -> None:
    """Raise ValueError where saved weights do not fit the user's module; warn where it is of another class."""
    expected = dict(module.state_dict())
    if {key: tensor.shape for key, tensor in expected.items()} != {key: w.shape for key, w in weights.items()}:
        raise ValueError(
            f"the router saved in {source!r} ({name}) does not fit {class_name(module)}: its weights are "
            f"{_shapes(weights)}, the module's {_shapes(expected)}"
        )
    if mixed := [key for key, w in weights.items() if w.is_floating_point() != expected[key].is_floating_point()]:
        raise ValueError(f"`{mixed[0]}` of the router saved in {source!r} is {weights[mixed[0]].dtype}; restore it")
    if name.rpartition(".")[2] != type(module).__name__:
        warnings.warn(
            f"the router saved in {source!r} was a {name}, and a {class_name(module)} takes its weights", stacklevel=5
        )


def load_into(module: nn.Module, name: str, weights: dict[str, Tensor], source: str) -> None:
    """Load saved weights into the user's module; see [`check_loads_into`]."""
    check_loads_into(module, name, weights, source)
    module.load_state_dict(weights)


def _shapes(tensors: dict[str, Tensor]) -> str:
    return ", ".join(f"{key} {list(tensor.shape)}" for key, tensor in tensors.items()) or "none"


def unpickle_router(path: Path, allow: bool) -> nn.Module:
    """The router of a file that was saved before December 2026, which loading may run code from.

    Raises:
        ValueError: that was not allowed.
    """
    if not allow:
        raise ValueError(
            f"{str(path)!r} is a pickled router, as moelora saved one until November 2026: loading it can run any "
            "code. If you trust whoever made it, pass `allow_pickled_router=True` to from_pretrained or load_adapter, "
            f"and save the mixture again; or remove {PICKLED_ROUTER_NAME} to load it with its built-in routers"
        )
    warnings.warn(f"loading {str(path)!r} runs the code in it; save the mixture again to be rid of it", stacklevel=4)
    router = torch.load(path, map_location="cpu", weights_only=False)
    if not isinstance(router, nn.Module):
        raise ValueError(f"{str(path)!r} holds a {type(router).__name__}, no router")
    return router
