"""The console that progress and messages go to: standard error, so that standard output holds results only."""

from rich.console import Console

console = Console(stderr=True, highlight=False)
