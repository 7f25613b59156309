"""Find the base model that an adapter was made for, and load both."""

from pathlib import Path

import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftModel
from transformers import PreTrainedModel

from ..console import console, printable
from ..files.adapter_files import Place, read_config
from ..files.opening import real_path_or_hub_id
from ..recipe import ModelOptions
from ..schema import UserError
from .base_model import check_model, load_model
from .run_record import noted_base


def find_base(adapter: Path, base: str | None) -> ModelOptions:
    """The base model of an adapter: the one asked for, else the one its run used, else the one PEFT noted.

    Raises:
        UserError: there is no adapter in the folder, its configuration is damaged, or it has no usable base model.
    """
    if not (adapter / "adapter_config.json").is_file():
        raise UserError(missing_adapter(adapter))
    if base is not None:
        model = base_options(base)
    else:
        noted = noted_base(adapter)
        try:
            name = read_config(Place(str(adapter))).get("base_model_name_or_path")
        except ValueError as error:
            raise UserError(str(error)) from error
        model = ModelOptions(**noted) if noted else ModelOptions(name=name if isinstance(name, str) else "")
    problems = check_model(model, None, None)
    if problems:
        raise UserError(
            "\n".join([f"no base model for the adapter {adapter}; give one with --base", *map(str, problems)])
        )
    return model


def base_options(base: str) -> ModelOptions:
    """What --base names: a folder, a .gguf file or a hub id."""
    path = Path(real_path_or_hub_id(base, Path.cwd()))
    is_file = path.suffix == ".gguf"
    return ModelOptions(name=str(path.parent if is_file else path), gguf_file=path.name if is_file else None)


def missing_adapter(adapter: Path) -> str:
    """What to say of a folder without an adapter."""
    if not adapter.is_dir():
        return f"the adapter {adapter}: no such folder; give the `output_dir` of a finished run"
    inside = sorted(path.parent for path in adapter.glob("*/adapter_config.json"))
    hint = f"try {inside[-1]}" if inside else "give the `output_dir` of a finished run"
    return f"the adapter {adapter}: no adapter_config.json in this folder; {hint}"


def tell_loading(base: ModelOptions, adapter: Path) -> None:
    """Say what takes a while now."""
    console.print(f"Loading {printable(base.name)} with the adapter {printable(adapter)}", soft_wrap=True)


def load_mixture(base: ModelOptions, adapter: Path, device: torch.device | None = None) -> PeftModel:
    """The base model with its adapter, in evaluation mode.

    Args:
        device: by default the GPU if there is one.

    Raises:
        UserError: the adapter is damaged or belongs to another model.
    """
    _check_kind(adapter)
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return put_adapter(load_model(base, device).to(device), base, adapter)


def put_adapter(model: PreTrainedModel, base: ModelOptions, adapter: Path) -> PeftModel:
    """The model with an adapter, in evaluation mode.

    Raises:
        UserError: as of [`load_mixture`].
    """
    _check_kind(adapter)
    try:
        adapted = PeftModel.from_pretrained(model, str(adapter))
    except (ValueError, RuntimeError, OSError) as error:
        raise UserError(f"the adapter {adapter} does not load onto {base.name}: {error}") from error
    adapted.to(model.device).eval()
    _try_attached_router(adapted, adapter)
    return adapted


def _check_kind(adapter: Path) -> None:
    if (kind := read_config(Place(str(adapter))).get("peft_type")) not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise UserError(f"the adapter {adapter}: `peft_type` is {kind!r}, which PEFT does not know; give another one")


def _try_attached_router(model: PeftModel, adapter: Path) -> None:
    """Run one token through an attached router: only a forward tells whether it fits this base model.

    Raises:
        UserError: it does not, or it is the user's code, which a command does not have.
    """
    routing = getattr(model.base_model, "routing_or_none", None)  # LoRA has neither, native experts alone no routing
    if routing is None or routing.attached is None:
        return
    try:
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device))
    except Exception as error:  # whatever its layers raise
        raise UserError(f"the attached router of the adapter {adapter} does not route: {error}") from error
