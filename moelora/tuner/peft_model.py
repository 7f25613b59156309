"""What a PeftModel does differently around a mixture: several active adapters, saved and loaded as one."""

from __future__ import annotations

import copy
import copyreg
import sys
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.auto import MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from safetensors.torch import save_file
from transformers import GenerationConfig

from ..config import MoELoraConfig, count_experts
from ..files.atomic_save import CARD_NAME
from ..storage import hub, loading, saving
from ..storage.model_card import begin_card, complete_card
from . import reference
from ._peft import DiskOffload
from .batching import ContinuousBatching

# By name, not through super(): torch before 2.13 cannot trace a property of super().
_has_active_enabled_adapter = PeftModel.has_active_enabled_adapter.fget


class MixturePeftModel(ContinuousBatching, DiskOffload, PeftModel):
    """Mixed into the PeftModel that wraps a mixture; see [`adopt_peft_model`]."""

    base_model: Any  # MoELoraModel, whose file imports this one

    def add_adapter(self, adapter_name: str, peft_config: MoELoraConfig, *args: Any, **kwargs: Any) -> None:
        """Add an adapter: an expert joins the mixture, a whole mixture stands aside until `set_adapter` chooses it.

        An expert (`expert_<i>`, or `single_expert`) is active and trainable at once, beside the others. So is a whole
        mixture where no adapter is active; else it is inactive and frozen, and all others stay as they are, as in PEFT.
        A trainer's copy of `default` as `ref` takes the place of an earlier one, and has its maturity.

        Raises:
            ValueError: the adapter exists, cannot be routed, disagrees with the mixture that it would join, or is a
                reference where the mixture is more than `default`; nothing has changed then.
        """
        is_reference = reference.is_reference(self, adapter_name, peft_config)
        if is_reference:
            reference.make_way(self)
        self._add_inactive_adapter(adapter_name, peft_config, *args, **kwargs)
        if is_reference:
            reference.make_equal(self)
        elif count_experts(adapter_name, self.peft_config[adapter_name]) == 1 or not self.active_adapters:
            self._join(adapter_name)

    def add_to_mixture(self, adapter_name: str, peft_config: MoELoraConfig) -> None:
        """Add an adapter of however many experts to the mixture: active and trainable at once, beside the others.

        Raises:
            ValueError: as of `add_adapter`.
        """
        self._add_inactive_adapter(adapter_name, peft_config)
        self._join(adapter_name)

    def _join(self, adapter_name: str) -> None:
        try:
            self.base_model.activate_adapter(adapter_name)
        except ValueError:
            self.delete_adapter(adapter_name)
            raise
        self._follow_active_adapter()

    def _add_inactive_adapter(self, adapter_name: str, peft_config: MoELoraConfig, *args: Any, **kwargs: Any) -> None:
        # Each adapter needs a configuration of its own: PEFT fills in targets and flags on the object it is given.
        config = copy.deepcopy(peft_config)
        config.__dict__.pop("read_from", None)  # whoever it was read for, this adapter was not
        super().add_adapter(adapter_name, config, *args, **kwargs)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make exactly this adapter, or these, the mixture, and trainable unless inference_mode.

        Raises:
            ValueError: an adapter does not exist, or the adapters cannot form one mixture.
        """
        self.base_model.set_adapter(adapter_name, inference_mode=inference_mode)
        self._follow_active_adapter()

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; the others of the mixture stay active."""
        super().delete_adapter(adapter_name)
        self._follow_active_adapter()

    def _follow_active_adapter(self) -> None:
        # PEFT keeps one name beside the tuner's list and looks its configuration up on every forward.
        if self.active_adapters:
            self.active_adapter = self.active_adapters[0]

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """See PEFT; `routing_weights` [B, S, E] covers the prompt and as much of the answer as S allows, then holds its
        last row; [B, E] holds throughout. All beams and answers of a prompt share its rows, unless they are given as
        [B * num_beams, ...] or [B * num_return_sequences, ...], one for each row that is generated (decoders alone).
        """
        with self.base_model.generating(copies=self._copies_of_prompts(args, kwargs)):
            return super().generate(*args, **kwargs)

    def _copies_of_prompts(self, args: tuple, kwargs: dict[str, Any]) -> int:
        """Rows that generate makes of each prompt: its arguments come before its configuration, the model's last."""
        positional = [value for value in args if isinstance(value, GenerationConfig)]
        configs = [kwargs.get("generation_config"), *positional, getattr(self, "generation_config", None)]
        counts = [1]
        for name in ("num_beams", "num_return_sequences"):
            given = (kwargs.get(name), *(getattr(config, name, None) for config in configs))
            counts += [count for count in given if count is not None][:1]
        return max(counts)

    @property
    def active_peft_config(self) -> MoELoraConfig:
        """The mixture's governing configuration; a default one when every adapter has been deleted."""
        return self.peft_config.get(self.active_adapter) or MoELoraConfig()

    @property
    def has_active_enabled_adapter(self) -> bool:
        """See PEFT; False when every adapter has been deleted."""
        return self.active_adapter in self.peft_config and _has_active_enabled_adapter(self)

    def save_pretrained(self, save_directory: str, *args: Any, **kwargs: Any) -> None:
        """See PEFT; all files are written out of sight, and take the place of an earlier save's in one moment.

        Whoever is killed before that moment leaves the earlier save, whoever is killed after it leaves this one, and a
        process that loads meanwhile gets one of the two.

        A lone adapter "default", and adapters named by `selected_adapters`, are saved as PEFT lays them out. Otherwise
        the directory holds one file with every adapter of the mixture, which `from_pretrained` restores in one call. An
        attached router's weights are saved with all active adapters; a stack of torch.nn's own layers comes back by
        itself, any other module has to be given when it is loaded.

        Raises:
            ValueError: save_directory is a file, an adapter does not exist, several adapters are to be pickled, or what
                was gathered of an adapter is not all of it; nothing has been written then.
        """
        saving.save(self, save_directory, *args, **kwargs)

    def create_or_update_model_card(self, output_dir: str) -> None:
        """See PEFT; the card says what the mixture is, what it learned, and how to load and serve it, too."""
        path = Path(output_dir) / CARD_NAME
        before = begin_card(path)
        super().create_or_update_model_card(output_dir)
        complete_card(self, path, before)

    def push_to_hub(self, repo_id: str, **options: Any) -> Any:
        """See PEFT and transformers, whose options it takes; others go to `save_pretrained`. All adapters, the attached
        router and the model card are one commit. A card that the repository has is kept but for what moelora wrote.

        The card has no `license`: that is the author's to choose, in the repository's README.md.

        Returns:
            huggingface_hub's CommitInfo.

        Raises:
            HfHubHTTPError: the hub refuses; nothing has been committed then.
            ValueError: as of `save_pretrained`.
        """
        return hub.push(self, repo_id, **options)

    def load_adapter(self, model_id: str, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        """See PEFT; a directory that holds a mixture restores all its adapters, whatever adapter_name says.

        A new adapter is not activated. Loading over existing adapters changes neither activity nor trainability.
        `PeftModel.from_pretrained` takes the same keyword arguments.

        Args:
            router: the module that was attached when the mixture was saved; its saved weights are loaded into it.
            allow_pickled_router: load a `router.pt` of November 2026 or before, which can run any code.
            load_embedding_layers: let the file's input and output embeddings replace the base model's, for good.

        Raises:
            ValueError: the checkpoint is damaged, holds files of different saves, or does not fit the model; nothing
                has changed then.
        """
        return loading.load(self, super().load_adapter, str(model_id), adapter_name, *args, **kwargs)

    def keep_routers_on_disk(self, offload_index: dict[str, dict[str, str]]) -> None:
        """See [`DiskOffload`]; the file is beside those that PEFT writes."""
        routers = {name: value for name, value in self.state_dict().items() if ".moe_router." in name}
        file = Path(next(iter(offload_index.values()))["safetensors_file"]).with_name("moe_routers.safetensors")
        save_file(routers, file)
        offload_index.update({name: {"safetensors_file": str(file), "weight_name": name} for name in routers})


def _mixture_class(cls: type[PeftModel], *bases: type) -> type[PeftModel]:
    doc = f"A {cls.__name__} around a mixture; see [`MixturePeftModel`]."
    return type(f"MoELora{cls.__name__}", bases, {"__module__": __name__, "__doc__": doc})


_CLASSES = {
    cls: _mixture_class(cls, MixturePeftModel, cls) for cls in (PeftModel, *MODEL_TYPE_TO_PEFT_MODEL_MAPPING.values())
}
globals().update({cls.__name__: cls for cls in _CLASSES.values()})  # importable, so that models can be pickled


def _class_around(cls: type[PeftModel]) -> type[PeftModel]:
    """The class that a wrapper of this class gets around a mixture; somebody's own keeps what it overrides."""
    if issubclass(cls, MixturePeftModel):
        return cls
    if cls not in _CLASSES:
        nearest = next(base for base in cls.__mro__ if base in _CLASSES)
        around = _mixture_class(cls, cls, _CLASSES[nearest])
        copyreg.pickle(around, lambda model: (_blank, (cls,), model.__dict__))  # no module holds the class
        _CLASSES.setdefault(cls, around)  # another thread may have been first
    return _CLASSES[cls]


def _blank(cls: type[PeftModel]) -> PeftModel:
    """What a pickle of somebody's own wrapper is filled into."""
    return object.__new__(_class_around(cls))


def adopt_peft_model(tuner: Any) -> None:
    """Give the PeftModel that is making tuner, if one is, the methods of [`MixturePeftModel`].

    PEFT builds the wrapper around the tuner and offers no way to choose its class. The wrapper's constructor calls the
    tuner's, so it is found among the callers; a tuner that somebody makes by itself has none.
    """
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_locals.get("self") is tuner:
        frame = frame.f_back
    wrapper: Any = frame.f_locals.get("self")
    # By where it stands, not by its code: other libraries wrap PEFT's constructor.
    is_peft = frame.f_globals.get("__name__") == PeftModel.__module__ and frame.f_code.co_name == "__init__"
    if is_peft and isinstance(wrapper, PeftModel):
        wrapper.__class__ = _class_around(type(wrapper))
        wrapper.special_peft_forward_args = wrapper.special_peft_forward_args | {"routing_weights"}
        wrapper.active_adapter = tuner.active_adapters[0]
