"""moelora: mixture-of-LoRA-experts fine-tuning as a PEFT tuner. Importing it registers the method with PEFT."""

import signal
import sys
from importlib import import_module
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from .moved import MOVED, keep_old_names
from .version import __version__

if TYPE_CHECKING:
    from . import experts
    from .config import MoELoraConfig
    from .report.analysis import analyze
    from .training.callback import MoELoraCallback
    from .tuner.diffusion import load_lora_adapter
    from .tuner.model import MoELoraModel

__all__ = ["MoELoraCallback", "MoELoraConfig", "MoELoraModel", "__version__", "analyze", "experts", "load_lora_adapter"]

_LAZY = {
    "MoELoraCallback": ".training.callback",
    "MoELoraConfig": ".config",
    "MoELoraModel": ".tuner.model",
    "analyze": ".report.analysis",
    "load_lora_adapter": ".tuner.diffusion",
}
"""Where the public names are, imported when somebody asks: `import moelora` must stay quick."""


def __getattr__(name: str) -> Any:
    if name == "experts":
        return import_module(".experts", __name__)
    if name in _LAZY:
        return getattr(import_module(_LAZY[name], __name__), name)
    if name in MOVED:
        return sys.modules[f"{__name__}.{name}"]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _is_command() -> bool:
    """Whether this process is the `moelora` command: `.../moelora` or `python -m moelora`."""
    processes = sys.modules.get("multiprocessing.process")
    if processes is not None and processes.current_process().name != "MainProcess":
        return False  # one that the command has started, with its command line, and that may load adapters
    program = getattr(sys, "argv", None) or [""]
    if program[0] == "-m":  # what stands there while Python looks for the module
        return ("-m", "moelora") in zip(sys.orig_argv, sys.orig_argv[1:], strict=False)
    return PurePath(program[0]).stem == "moelora"


keep_old_names()

# The command registers when it has something to do (`cli.main`): PEFT and PyTorch take seconds, and `--help` needs
# neither. Until then Ctrl-C may end it there and then: there is nothing to clean up, and nothing to say.
if not _is_command():
    import_module(".tuner.registration", __name__)
elif signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
