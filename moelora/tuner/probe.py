"""What each linear of a transformers model reads, compared with what enters its block: found without weights or data.

A twin of the model is made from its configuration on torch's meta device, where tensors have shapes and nothing else.
It runs once on made-up inputs: a fraction of a second for 80 layers. The model itself is neither run nor touched, so
quantised, sharded, offloaded and not yet loaded ones are all the same, and so are the processes of one job.
"""

from __future__ import annotations

import copy
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.utils import logging

from ..forward.alignment import lines_up
from ..forward.caches import kv_cache
from ..forward.hooks import encoder_argument_position, encoder_states_of, hidden_states_of
from . import blocks

_ONE_AT_A_TIME = Lock()  # what is quiet while a twin runs is so for the whole process

# Sizes that tell dimensions apart: two texts of seven tokens, whose answers have five, and go on by three; frames.
_BATCH, _LENGTH, _ANSWER, _MORE, _FRAMES = 2, 7, 5, 3, 128


@dataclass
class Readings:
    """What was seen of a model.

    Attributes:
        leads: of each block that ran, what comes before H in its hidden states, [B, S] as a rule.
        widths: H of each block that ran.
        alike: of each linear that ran, whether it always read its block's tokens (in cross-attention: the encoder's).
        cached: the linears that read tokens of an earlier forward too, from a cache of what precedes them.
        complete: the blocks that ran to their end, whose other linears were not called.
    """

    leads: dict[str, tuple[int, ...]] = field(default_factory=dict)
    widths: dict[str, int] = field(default_factory=dict)
    alike: dict[str, bool] = field(default_factory=dict)
    cached: set[str] = field(default_factory=set)
    complete: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class _Kind:
    """Models that are alike."""

    model_class: type[PreTrainedModel]
    settings: str
    config: Any = field(compare=False)


def readings_of(model: nn.Module) -> Readings:
    """What was seen of a model's twin; nothing of models that are not transformers', or cannot run so."""
    if not isinstance(model, PreTrainedModel):
        return Readings()
    return _readings_of(_Kind(type(model), model.config.to_json_string(use_diff=False), model.config))


@lru_cache(maxsize=16)
def _readings_of(kind: _Kind) -> Readings:
    readings = Readings()
    # What a model cannot do without weights and data, it is not seen doing.
    with _ONE_AT_A_TIME, _quietly(), suppress(Exception):
        twin = _twin(kind)
        watch = _Watch(twin, readings)
        for name, part in twin.named_modules():
            if isinstance(part, PreTrainedModel) and watch.has_not_run(name):
                with suppress(Exception):
                    if (cache := kv_cache(part(**_made_up(part)))) is not None:
                        watch.is_going_on = True
                        part(**_made_up(part, _MORE), **{_cache_argument(part): cache})
                watch.is_going_on = False
    return readings


@contextmanager
def _quietly() -> Iterator[None]:
    """Without what transformers says of models that run for real, and without a trace in the random numbers."""
    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            with torch.device("meta"), torch.no_grad(), _WithoutData(), _without_kernels():
                yield
    finally:
        logging.set_verbosity(level)


@contextmanager
def _without_kernels() -> Iterator[None]:
    """Triton's kernels, which Liger and others patch into transformers' modules, are not started on tensors without
    data: they would write to address 0, after which the GPU answers this process no more. What they write to is there,
    in its shape."""
    triton = sys.modules.get("triton.runtime.jit")
    if triton is None:
        yield
        return
    run = triton.JITFunction.run

    def run_on_data(kernel: Any, *args: Any, **options: Any) -> Any:
        if any(isinstance(arg, Tensor) and arg.is_meta for arg in (*args, *options.values())):
            return None
        return run(kernel, *args, **options)

    triton.JITFunction.run = run_on_data
    try:
        yield
    finally:
        triton.JITFunction.run = run


class _WithoutData(TorchDispatchMode):
    """Answers what models ask of data that is not there (is any token padded, is any global): nothing is."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return torch.zeros((), dtype=args[0].dtype, device="cpu").item()
        return func(*args, **(kwargs or {}))


def _twin(kind: _Kind) -> PreTrainedModel:
    config = copy.deepcopy(kind.config)
    config._attn_implementation = "eager"
    with no_init_weights():
        twin = kind.model_class(config).eval()
    for name, module in twin.named_modules():
        if name.rpartition(".")[2] == "experts":  # which tokens go to which depends on the data
            module.forward = _pass_on
    return twin


def _pass_on(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return hidden


class _Watch:
    """Hooks that write down what blocks and linears read."""

    def __init__(self, twin: nn.Module, readings: Readings) -> None:
        self.readings = readings
        self.is_going_on = False  # from a cache
        self.running: dict[str, list[tuple[int, ...]]] = {}  # what the tokens of blocks that run may be
        linears = {name: module for name, module in twin.named_modules() if blocks.is_linear(module)}
        self.block_of = {name: blocks.find_block(twin, name) for name in linears}
        self._blocks = list(dict.fromkeys(block for block in self.block_of.values() if block))
        for name in self._blocks:
            block = twin.get_submodule(name)
            block.register_forward_pre_hook(self._entering(name), with_kwargs=True)
            block.register_forward_hook(self._leaving(name), always_call=True)
        for name, linear in linears.items():
            linear.register_forward_pre_hook(self._reading(name))

    def has_not_run(self, owner: str) -> bool:
        """Whether a block of this part of the model has not."""
        prefix = f"{owner}." if owner else ""
        return any(block not in self.readings.leads for block in self._blocks if block.startswith(prefix))

    def _entering(self, name: str) -> Callable:
        def enter(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            hidden = hidden_states_of(args, kwargs)
            encoder = encoder_states_of(args, kwargs, encoder_argument_position(block))
            self.readings.leads.setdefault(name, tuple(hidden.shape[:-1]))
            self.readings.widths.setdefault(name, hidden.shape[-1])
            self.running[name] = [tuple(each.shape[:-1]) for each in (hidden, encoder) if each is not None]

        return enter

    def _leaving(self, name: str) -> Callable:
        def leave(block: nn.Module, args: tuple, output: Any) -> None:
            self.running.pop(name, None)
            if output is not None:
                self.readings.complete.add(name)

        return leave

    def _reading(self, name: str) -> Callable:
        def read(linear: nn.Module, args: tuple) -> None:
            tokens = self.running.get(self.block_of[name] or "", [])
            is_alike = any(lines_up(args[0].shape[:-1], lead) for lead in tokens)
            if not self.is_going_on:
                self.readings.alike[name] = is_alike and self.readings.alike.get(name, True)
            elif not is_alike:
                self.readings.cached.add(name)

        return read


# ---- made-up inputs --------------------------------------------------------------------------------------------------


def _made_up(model: Any, more: int | None = None) -> dict[str, Tensor]:
    """What a model's forward needs, text alone where it takes text; if given, only so many tokens more."""
    config, made = model.config, {}
    for name, parameter in inspect.signature(type(model).forward).parameters.items():
        is_needed = name in (model.main_input_name, *_ALWAYS) or parameter.default is parameter.empty
        if is_needed and name in _MAKERS:
            made[name] = _MAKERS[name](config)
    if more is not None:
        growing = "decoder_input_ids" if "decoder_input_ids" in made else "input_ids"
        made[growing] = made[growing][:, :more]
    return made


def _cache_argument(model: nn.Module) -> str:
    return "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"


def _ids(config: Any) -> Tensor:
    return torch.zeros(_BATCH, _LENGTH, dtype=torch.long)


def _image(config: Any) -> Tensor:
    config = config if hasattr(config, "image_size") else getattr(config, "vision_config", config)
    size = getattr(config, "image_size", None) or 224
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    return torch.zeros(_BATCH, getattr(config, "num_channels", 3), height, width)


def _sound(config: Any) -> Tensor:
    """A wave, or for the audio spectrogram transformer its frequencies."""
    if hasattr(config, "num_mel_bins") and hasattr(config, "max_length"):
        return torch.zeros(_BATCH, config.max_length, config.num_mel_bins)
    return torch.zeros(_BATCH, 16_000)


def _spectrogram(config: Any) -> Tensor:
    if hasattr(config, "max_source_positions") and hasattr(config, "num_mel_bins"):  # Whisper takes one length alone
        return torch.zeros(_BATCH, config.num_mel_bins, 2 * config.max_source_positions)
    width = getattr(config, "feature_projection_input_dim", getattr(config, "num_mel_bins", 80))
    return torch.zeros(_BATCH, _FRAMES, width)


def _series(config: Any) -> Tensor:
    return torch.zeros(_BATCH, config.context_length, config.num_input_channels)


def _grids(config: Any) -> Tensor:
    """Frames, rows and columns of patches of each image; real numbers, for models loop over them."""
    side = 2 * getattr(config, "spatial_merge_size", 2)
    return torch.tensor([[1, side, side]] * _BATCH, device="cpu")


def _patches(config: Any) -> Tensor:
    size = getattr(config, "in_channels", 3) * getattr(config, "temporal_patch_size", 1) * config.patch_size**2
    return torch.zeros(int(_grids(config).prod(-1).sum()), size)


# Of what has a default, the inputs without which parts do not run.
_ALWAYS = ("decoder_input_ids", "cross_attention_states")
_MAKERS: dict[str, Callable[[Any], Tensor]] = {
    "input_ids": _ids,
    "decoder_input_ids": lambda config: torch.zeros(_BATCH, _ANSWER, dtype=torch.long),
    "pixel_values": _image,
    "input_values": _sound,
    "input_features": _spectrogram,
    "past_values": _series,
    "hidden_states": _patches,
    "grid_thw": _grids,
    "cross_attention_states": lambda config: torch.zeros(_BATCH, _ANSWER, config.get_text_config().hidden_size),
}
