"""The `moelora` command: [`moelora.cli.commands`].

A command raises UserError, which names value and fix, for every mistake that a user can make: before a model is loaded
where files tell, and before anything is written.
"""

from .commands import main

__all__ = ["main"]
