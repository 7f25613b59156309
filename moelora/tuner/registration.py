"""Importing this module registers the method with PEFT; whoever loads or makes an adapter needs that."""

from ..config import MoELoraConfig
from ._peft import register
from .model import MoELoraModel

register(MoELoraConfig, MoELoraModel)
