"""What the fuzzers share: how many inputs, the same every time, and values that somebody may write anywhere."""

import os
import signal
from contextlib import contextmanager

from hypothesis import settings
from hypothesis import strategies as st

FUZZ = int(os.environ.get("MOELORA_FUZZ", "200"))
"""Inputs of each file; `make fuzz` gives tens of thousands."""


def examples(share: float = 1.0, *, in_make_test: float | None = None) -> settings:
    """The settings of a test that takes a share of its file's inputs: seeded, and as slow as it is.

    Args:
        in_make_test: the share where nobody asked for a number of inputs, for tests that make models for each.
    """
    if in_make_test is not None and "MOELORA_FUZZ" not in os.environ:
        share = in_make_test
    return settings(max_examples=max(1, round(FUZZ * share)), derandomize=True, deadline=None, database=None)


NUMBERS = ["0", "-1", "1", "2", "0.5", "1e-400", "1e308", "1e999", "nan", "-inf", "9" * 30, "9" * 5000, "0x1F", "1_0"]
TEXTS = [
    *("", " ", "x", "é", "-", "--", "=", "a=b", "a=b=c", "None", "true", "null", "default", "auto", "{{ x }}", "%s"),
    *("[v2]", "[/b]", "\x1b[2J", "a\nb", "\0", "\udcff", "\u202e", "x" * 300),
]
PATHS = [
    *(".", "..", "~nobodyoftheirs", "gone", "gone/deep", "file", "folder", "bad.jsonl", "x/" * 3000, "x.gguf"),
    *("/dev/null", "/dev/zero", "/proc/self/mem", "pipe", "loop", "loop/x", "link", "*", "**/*", "[", "owner/name"),
]

numbers = st.sampled_from(NUMBERS)
texts = st.sampled_from(TEXTS) | st.text(max_size=12)
paths = st.sampled_from(PATHS)
words = numbers | texts | paths


def lay_out(folder):
    """A folder's hostile inhabitants, which `PATHS` names."""
    (folder / "file").write_text("text")
    (folder / "folder").mkdir()
    (folder / "bad.jsonl").write_text("{")
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to("loop")
    (folder / "link").symlink_to("/dev/zero")


@contextmanager
def at_most(seconds):
    """Fail where the block takes longer, wherever it hangs. Not the timer of pytest-timeout, which watches the test."""

    def fail(*_):
        raise AssertionError(f"takes more than {seconds} seconds")

    before = signal.signal(signal.SIGALRM, fail)
    rest, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, rest)
        signal.signal(signal.SIGALRM, before)
