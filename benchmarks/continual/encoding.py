"""Questions as tokens: definition, text and "Output:", then the answer, padded on the left.

Letters: N rows, S tokens of a row, K tokens at its end that hold the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..quality.data import IGNORED, Examples
from .tasks import Question

LENGTHS = range(32, 257, 32)  # S is the first of these that holds FITTING of the training rows, or the last
FITTING = 0.95
MAX_ANSWER = 64
END = "\nOutput:"


def encode_prompt(question: Question, tokenizer: Any, length: int) -> list[int]:
    """The prompt's tokens. Only the text is cut, in its middle, where all would be longer than `length`: the question
    may come last, as may what a reviewer thinks."""
    start = f"{question.definition}\n" if question.definition else ""
    before, text, after = (
        tokenizer(part, add_special_tokens=False)["input_ids"] for part in (start, question.text, END)
    )
    before = tokenizer("")["input_ids"] + before  # what the tokenizer begins every text with
    room = max(0, length - len(before) - len(after))
    if len(text) > room:
        text = text[: room - room // 2] + text[len(text) - room // 2 :]
    return before + text + after


def encode_answer(question: Question, tokenizer: Any) -> list[int]:
    """The tokens of the answer that is learned, the end included."""
    ids = tokenizer(f" {question.answers[0]}", add_special_tokens=False)["input_ids"]
    return [*ids[: MAX_ANSWER - 1], tokenizer.eos_token_id]


def length_for(questions: Sequence[Question], tokenizer: Any) -> int:
    """S for a task: prompts and answers of nearly all rows fit without a cut."""
    lengths = sorted(
        len(encode_prompt(question, tokenizer, LENGTHS[-1])) + len(encode_answer(question, tokenizer))
        for question in questions
    )
    needed = lengths[min(len(lengths) - 1, int(FITTING * len(lengths)))]
    return next((length for length in LENGTHS if length >= needed), LENGTHS[-1])


def encode(questions: Sequence[Question], tokenizer: Any, length: int) -> Examples:
    """Rows of ids and mask [N, S]; labels [N, K] are those of the last K tokens, -100 before the answer.

    Labels are shorter than rows, so that logits are computed where answers are, and nowhere else.
    """
    answers = [encode_answer(question, tokenizer) for question in questions]
    kept = max(map(len, answers)) + 1  # the token before the answer predicts its first one
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ids = np.full((len(questions), length), pad, dtype=np.int64)
    mask = np.zeros(ids.shape, dtype=bool)
    labels = np.full((len(questions), kept), IGNORED, dtype=np.int64)
    for row, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        tokens = encode_prompt(question, tokenizer, length - len(answer)) + answer
        tokens = tokens[-length:]
        ids[row, length - len(tokens) :] = tokens
        mask[row, length - len(tokens) :] = True
        labels[row, kept - len(answer) :] = answer
    return Examples(ids, labels, mask)


def widened(examples: Examples, length: int, kept: int, pad: int) -> Examples:
    """The same rows [N, length] with labels [N, kept], filled up on the left."""

    def fill(array: Any, width: int, value: int | bool) -> Any:
        return np.pad(array, ((0, 0), (width - array.shape[1], 0)), constant_values=value)

    return Examples(
        fill(examples.ids, length, pad), fill(examples.labels, kept, IGNORED), fill(examples.mask, length, False)
    )
