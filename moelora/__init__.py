"""moelora: mixture-of-LoRA-experts fine-tuning as a PEFT tuner. Importing it registers the method with PEFT."""

from ._peft import register
from .config import MoELoraConfig
from .model import MoELoraModel
from .version import __version__

__all__ = ["MoELoraConfig", "MoELoraModel", "__version__"]

register(MoELoraConfig, MoELoraModel)
