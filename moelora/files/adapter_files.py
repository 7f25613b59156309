"""The one reader of adapters, for the API and for all commands: what lies in a folder or on the hub, checked.

Nothing that is read here is run, and nothing is returned before all of it belongs together.
Shapes: E experts of an adapter.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import safe_open
from torch import Tensor

from .atomic_save import (
    ID_KEY,
    PICKLED_ROUTER_NAME,
    ROUTER_NAME,
    SaveError,
    check_record,
    check_save,
    checksum,
    part,
    read_at_once,
)
from .opening import NotReadableError, read_json

MOST_CONFIG_BYTES = 64 << 20
_PROBLEMS_SHOWN = 5


@dataclass(frozen=True)
class AdapterFiles:
    """One save of an adapter or a mixture.

    Attributes:
        source: where it lies, for messages.
        config: adapter_config.json.
        weights: by the names in the file: PEFT's, in a mixture of several adapters after "<adapter>/".
        router: the attached router's weights; None where there is none.
        pickled_router: where an attached router of an old save lies, which was not read.
        fault: what is damaged; whoever uses the tensors looks at them and then calls [`AdapterFiles.refuse_damage`].
    """

    source: str
    config: dict[str, Any]
    weights: dict[str, Tensor]
    router: dict[str, Tensor] | None = None
    pickled_router: Path | None = None
    fault: str | None = None

    def refuse_damage(self) -> None:
        """Raise SaveError where a file is not what was saved."""
        if self.fault is not None:
            raise SaveError(self.fault)

    @property
    def save_id(self) -> str | None:
        """The id of the save; None in those that have none yet."""
        record = self.config.get("checkpoint")
        return record["id"] if record else None

    def by_adapter(self, names: Collection[str]) -> dict[str, dict[str, Tensor]]:
        """The weights of each adapter of a mixture of several.

        Raises:
            ValueError: there are weights of an adapter that is not among the names.
        """
        found: dict[str, dict[str, Tensor]] = {name: {} for name in names}
        for key, tensor in self.weights.items():
            name, _, rest = key.partition("/")
            if name not in found:
                listed = ", ".join(map(repr, names))
                raise ValueError(f"{self.source!r} holds weights {key!r} of no adapter it lists ({listed})")
            found[name][rest] = tensor
        return found


@dataclass(frozen=True)
class Place:
    """Where an adapter is looked for: a folder, or a repository of the hub with where to look in it."""

    source: str
    hub: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> Path | None:
        """The folder; None for a repository of the hub."""
        path = Path(self.source, self.hub.get("subfolder") or "")
        return path if path.is_dir() else None

    def find(self, name: str) -> Path | None:
        """Where a file lies, fetched from the hub if need be; None where there is none."""
        if (folder := self.folder) is not None:
            path = part(folder, name)
            return path if path.is_file() else None
        arguments = {"token" if key == "use_auth_token" else key: value for key, value in self.hub.items()}
        try:
            return Path(hf_hub_download(self.source, name, **arguments))
        except LocalEntryNotFoundError:  # the hub could not be asked
            if name == PICKLED_ROUTER_NAME:
                warnings.warn(
                    f"the hub could not be asked whether {self.source!r}, an adapter of November 2026 or before, has "
                    f"an attached router ({name}); its built-in routers decide",
                    stacklevel=2,
                )
            return None
        except EntryNotFoundError:
            return None


# ---- the configuration -----------------------------------------------------------------------------------------------


def read_config(place: Place) -> dict[str, Any]:
    """adapter_config.json, whatever kind of adapter it describes.

    Raises:
        ValueError: there is none, or it is no JSON object.
    """
    try:
        path = place.find(CONFIG_NAME)
    except Exception as error:  # the hub's many ways to fail
        raise ValueError(f"{place.source!r} is no folder, and not to be had from the hub: {error}") from error
    if path is None:
        raise ValueError(f"can't find {CONFIG_NAME} in {place.source!r}; give a folder or a repository with an adapter")
    return parse_config(path)


def parse_config(path: Path) -> dict[str, Any]:
    """A configuration file as a mapping.

    Raises:
        ValueError: it is no JSON object, or a record of its save is not what `save_pretrained` writes.
    """
    try:
        config = read_json(path, MOST_CONFIG_BYTES)
    except NotReadableError as error:
        raise ValueError(f"{path}: not readable as JSON: {error}; restore it from a copy") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path}: must be a JSON object, not {type(config).__name__}; restore it from a copy")
    if not isinstance(config.get("peft_type", ""), str):
        raise ValueError(f"{path}: `peft_type` ({config['peft_type']!r}) is no text; restore it from a copy")
    if config.get("checkpoint") is not None:
        check_record(config["checkpoint"])
    return config


def checkpoint_in(folder: Path) -> dict[str, Any]:
    """What the save that a folder holds says of itself: its id, and checksums of its files. Empty where there is none.

    Raises:
        ValueError: as of [`read_config`].
    """
    place = Place(str(folder))
    if place.folder is None or place.find(CONFIG_NAME) is None:
        return {}
    return read_config(place).get("checkpoint") or {}


# ---- all of it -------------------------------------------------------------------------------------------------------


def read_adapter(source: str | Path, hub: Mapping[str, Any] | None = None) -> AdapterFiles:
    """All files of one save.

    Args:
        source: a folder or a hub id.
        hub: where on the hub to look, as `hf_hub_download` takes it.

    Raises:
        ValueError: there is no adapter; a file is unreadable, missing or of another save; a tensor is not finite.
    """
    place = Place(str(source), dict(hub or {}))
    names = (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, ROUTER_NAME, PICKLED_ROUTER_NAME)
    folder = place.folder
    return _read(place) if folder is None else read_at_once(folder, names, lambda: _read(place))


def _read(place: Place) -> AdapterFiles:
    config = read_config(place)
    record = config.get("checkpoint")
    path = place.find(SAFETENSORS_WEIGHTS_NAME) or place.find(WEIGHTS_NAME)
    if path is None:
        raise SaveError(
            f"can't find weights in {place.source!r}: no {SAFETENSORS_WEIGHTS_NAME} beside {CONFIG_NAME}; restore it "
            "from a copy"
        )
    expects_router = record is not None and ROUTER_NAME in record["files"]
    router_path = place.find(ROUTER_NAME) if expects_router or place.folder is not None else None
    found, tensors = {}, {}
    with ThreadPoolExecutor(1) as other:  # checksums take a processor while the tensors' pages come from the disk
        for at in filter(None, (path, router_path)):
            save_id, tensors[at] = _read_tensors(place.source, at)
            summed = other.submit(checksum, tensors[at]) if record is not None else None
            _check_finite(place.source, at.name, tensors[at])
            found[at.name] = save_id, "" if summed is None else summed.result()
    pickled = place.find(PICKLED_ROUTER_NAME) if place.folder is not None or record is None else None
    if pickled is not None and record is not None:
        found[PICKLED_ROUTER_NAME] = None, ""
    fault = check_save(place.source, record, found)
    router = None if router_path is None else tensors[router_path]
    return AdapterFiles(place.source, config, tensors[path], router, pickled, fault)


def _read_tensors(source: str, path: Path) -> tuple[str | None, dict[str, Tensor]]:
    """The id in a file's metadata, and its tensors, from one opening of the file."""
    try:
        if path.name == WEIGHTS_NAME:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
            if not isinstance(tensors, dict) or not all(map(_is_plain, tensors.items())):
                raise SaveError(f"{path.name} in {source!r} holds no plain tensors by name; restore it from a copy")
            return None, tensors
        with safe_open(path, framework="pt", device="cpu") as stream:
            return (stream.metadata() or {}).get(ID_KEY), {key: stream.get_tensor(key) for key in stream.keys()}  # noqa: SIM118
    except (SaveError, PermissionError):
        raise
    except Exception as error:  # safetensors' own, and whatever unpickling a damaged file raises
        if isinstance(error, OSError) and not path.exists():
            raise
        raise SaveError(
            f"the weights {path.name} in {source!r} are damaged or truncated ({error}); restore them from a copy or an "
            "earlier checkpoint"
        ) from error


def _is_plain(item: tuple[Any, Any]) -> bool:
    """Whether it is a name and a tensor of which every number lies in the file, as in safetensors.

    A pickle may hold sparse tensors, some without numbers, and views that show one number a trillion times.
    """
    name, tensor = item
    if not isinstance(name, str) or not isinstance(tensor, Tensor):
        return False
    is_dense = tensor.layout == torch.strided and not (tensor.is_meta or tensor.is_nested or tensor.is_quantized)
    return is_dense and tensor.numel() * tensor.itemsize <= tensor.untyped_storage().nbytes()


def _check_finite(source: str, name: str, tensors: Mapping[str, Tensor]) -> None:
    if bad := next((key for key, tensor in tensors.items() if not is_finite(tensor)), None):
        raise SaveError(
            f"`{bad}` of {name} in {source!r} is not finite: its training diverged; train again at a lower learning "
            "rate, or take an earlier checkpoint"
        )


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinities; quick where it does not."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    if tensor.itemsize < 2:  # float8 knows no sum
        tensor = tensor.float()
    # A finite sum has finite terms. Where it is not, the sum alone may have overflowed.
    return bool(tensor.sum(dtype=torch.float32 if tensor.itemsize < 4 else None).isfinite()) or bool(
        tensor.isfinite().all()
    )


# ---- what tensors may be ---------------------------------------------------------------------------------------------


def check_tensors(
    name: str, weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], any_size: bool = False
) -> list[str]:
    """What is wrong with an adapter's weights, compared with the tensors that a model has for them.

    Args:
        name: the adapter's.
        expected: tensors of the right names, shapes and dtypes, which may be on the meta device.
        any_size: sizes are not compared.
    """
    if not weights:
        return [f"adapter {name!r} is missing"]
    problems = [f"{key!r} of adapter {name!r} is missing" for key in expected if key not in weights]
    for key, tensor in weights.items():
        if key not in expected:
            problems.append(f"{key!r} of adapter {name!r} has no place in the model")
            continue
        there = expected[key]
        if not any_size and tensor.shape != there.shape:
            problems.append(
                f"{key!r} of adapter {name!r} has shape {list(tensor.shape)}, the model {list(there.shape)}"
            )
        elif fix := wrong_kind(key, tensor, there.dtype):
            problems.append(f"{key!r} of adapter {name!r} {fix}")
    return problems


def wrong_kind(key: str, tensor: Tensor, dtype: torch.dtype | None = None) -> str | None:
    """What is wrong with the numbers of a tensor: their dtype, or values that its name rules out.

    Args:
        key: the tensor's name; the last part says what it is.
        dtype: what it is to be loaded into; by default what its name tells.
    """
    what = key.rpartition(".")[2]
    integers = {"tokens_per_expert": torch.int64, "is_set": torch.bool}
    dtype = dtype or integers.get(what, torch.float32)
    good = tensor.is_floating_point() and tensor.itemsize >= 2 if dtype.is_floating_point else tensor.dtype == dtype
    if not good:
        return f"holds {str(tensor.dtype).removeprefix('torch.')}, not {str(dtype).removeprefix('torch.')}"
    if tensor.itemsize > dtype.itemsize and not is_finite(tensor.to(dtype)):
        return f"has numbers beyond {str(dtype).removeprefix('torch.')}"
    if "lora_router" not in key.split("."):
        return None
    if what == "maturity" and not bool(((tensor >= 0) & (tensor <= 1)).all()):
        return f"is {tensor.tolist()}, and a maturity lies in [0, 1]"
    if what in ("tokens_per_expert", "memory_variance") and bool((tensor < 0).any()):
        return "has negative numbers, which it cannot have"
    return None


def refuse(source: str, problems: list[str]) -> None:
    """Raise ValueError with the first problems, if there are any."""
    if not problems:
        return
    more = f"; and {len(problems) - _PROBLEMS_SHOWN} more" if len(problems) > _PROBLEMS_SHOWN else ""
    raise ValueError(
        f"the checkpoint {source!r} does not fit the model: {'; '.join(problems[:_PROBLEMS_SHOWN])}{more}. Load it "
        "into the base model it was trained on, with the configuration it was saved with"
    )
