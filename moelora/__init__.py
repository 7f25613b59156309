"""moelora: mixture-of-LoRA-experts fine-tuning as a PEFT tuner. Importing it registers the method with PEFT."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._peft import register
from .config import MoELoraConfig
from .model import MoELoraModel
from .version import __version__

if TYPE_CHECKING:
    from . import experts
    from .report.analysis import analyze
    from .training.callback import MoELoraCallback

__all__ = ["MoELoraCallback", "MoELoraConfig", "MoELoraModel", "__version__", "analyze", "experts"]

register(MoELoraConfig, MoELoraModel)

_LAZY = {"MoELoraCallback": ".training.callback", "analyze": ".report.analysis"}
"""What needs the Trainer's libraries, imported when somebody asks: `import moelora` must stay quick."""


def __getattr__(name: str) -> Any:
    if name == "experts":
        return import_module(".experts", __name__)
    if name in _LAZY:
        return getattr(import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
