"""The console that progress and messages go to: standard error, so that standard output holds results only."""

import os

from rich.console import Console

# Launchers number the processes of a run. All of them compute, one writes and talks.
is_main_process = int(os.environ.get("RANK", "0")) == 0
console = Console(stderr=True, highlight=False, quiet=not is_main_process)
