"""Write conversations out with a model's chat template: a program in Jinja's sandbox, from whoever made the model."""

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..schema import UserError, shorten

SECONDS = 5.0
"""Processor time that a template may take for one conversation; they take milliseconds."""


class _TakesTooLongError(BaseException):
    """A template that may never end. No Exception, for Jinja catches these all while it computes constants."""


def apply_template(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Any], **options: Any) -> Any:
    """What the tokenizer makes of a conversation.

    Args:
        turns: mappings of role and content.
        options: of `apply_chat_template`.

    Raises:
        UserError: the template refuses the conversation, fails, or takes longer than [`SECONDS`].
    """
    try:
        with _at_most(SECONDS):
            return tokenizer.apply_chat_template(turns, **options)
    except _TakesTooLongError:
        fix = f"takes more than {SECONDS:g} seconds for one conversation"
    except MemoryError:
        fix = "writes more than there is memory for"
    except Exception as error:  # it is a program: it may raise whatever it likes
        fix = f"fails ({type(error).__name__}: {shorten(' '.join(str(error).split()), 200)})"
    raise UserError(f"the model's chat template {fix}; use texts, or a model whose template works") from None


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Stop the block once it has taken that much processor time; in other threads than the first there is no clock."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise _TakesTooLongError

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
