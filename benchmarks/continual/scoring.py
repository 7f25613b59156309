"""Scores of a model on tasks, in percent: exact match or ROUGE-L of what greedy decoding writes."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..quality.data import Examples
from ..quality.scoring import score
from ..quality.trainer import autocast
from .encoding import encode_prompt
from .tasks import Question

NEW_TOKENS = 50
ROWS = 128  # of one generation
TOKENS = 2**15  # of one forward, padding included


def exact_match(model: nn.Module, examples: Examples, device: str) -> float:
    """Share of rows whose whole answer greedy decoding writes: found in one forward, as every token of it, the end
    included, has to be the likeliest after those before it."""
    right = 0.0
    for chunk in _of_like_length(examples):
        accuracy = score(model, chunk, device, rows=len(chunk)).accuracy
        assert accuracy is not None
        right += accuracy * len(chunk)
    return 100 * right / len(examples)


def _of_like_length(examples: Examples) -> Iterator[Examples]:
    """The same rows, the shortest first, without the padding that all rows of a piece have on their left."""
    assert examples.mask is not None
    lengths = examples.mask.sum(axis=1)
    order = np.argsort(lengths, kind="stable")
    while len(order):
        rows = order[: max(1, TOKENS // int(lengths[order[0]]))]
        rows = rows[: max(1, TOKENS // int(lengths[rows[-1]]))]
        start = examples.ids.shape[1] - max(int(lengths[rows[-1]]), examples.labels.shape[1])
        yield Examples(examples.ids[rows, start:], examples.labels[rows], examples.mask[rows, start:])
        order = order[len(rows) :]


def rouge_l(
    model: Any, questions: Sequence[Question], tokenizer: Any, length: int, device: str, new_tokens: int = NEW_TOKENS
) -> float:
    """Mean over rows of ROUGE-L's F-measure of the written answer, the best of a row's right answers."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    written = write_answers(model, questions, tokenizer, length, device, new_tokens)
    return 100 * statistics.fmean(
        max(scorer.score(answer, text)["rougeL"].fmeasure for answer in question.answers)
        for question, text in zip(questions, written, strict=True)
    )


@torch.no_grad()
def write_answers(
    model: Any,
    questions: Sequence[Question],
    tokenizer: Any,
    length: int,
    device: str,
    new_tokens: int = NEW_TOKENS,
    min_new_tokens: int = 0,
) -> list[str]:
    """Greedy answers. Rows of like length are read together, to pad little."""
    model.eval()
    prompts = [encode_prompt(question, tokenizer, length) for question in questions]
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    answers = [""] * len(prompts)
    for start in range(0, len(order), ROWS):
        rows = order[start : start + ROWS]
        ids, mask = _padded([prompts[row] for row in rows], tokenizer, device)
        with autocast(device):
            output = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=new_tokens,
                min_new_tokens=min_new_tokens,
                do_sample=False,
                pad_token_id=_pad(tokenizer),
                eos_token_id=tokenizer.eos_token_id,
            )
        for row, tokens in zip(rows, output[:, ids.shape[1] :], strict=True):
            answers[row] = tokenizer.decode(tokens, skip_special_tokens=True).strip()
    return answers


def _pad(tokenizer: Any) -> int:
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def _padded(prompts: Sequence[Sequence[int]], tokenizer: Any, device: str) -> tuple[Tensor, Tensor]:
    """ids and mask [B, S], padded on the left."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), _pad(tokenizer))
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = True
    return ids.to(device), mask.to(device)
