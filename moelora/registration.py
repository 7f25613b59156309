"""Importing this module registers the method with PEFT; whoever loads or makes an adapter needs that."""

from ._peft import register
from .config import MoELoraConfig
from .model import MoELoraModel

register(MoELoraConfig, MoELoraModel)
