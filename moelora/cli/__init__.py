"""The `moelora` command: [`moelora.cli.commands`]."""

from .commands import main

__all__ = ["main"]
