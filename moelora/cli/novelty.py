"""`moelora novelty`: whether an adapter knows some texts, and how well that can be told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from ..console import make_stdout, make_table
from ..data.texts import tokenise
from ..experts.novelty_score import FEWEST, Novelty, auc, judge, measure
from ..recipe import DomainOptions
from ..schema import Problem, UserError, refuse, telling_user
from ..storage.base_model import load_tokenizer
from ..storage.finding import tell_loading
from ..storage.run_record import learned_domains
from .operation import read_source
from .option_fields import check_options
from .options import NoveltyOptions
from .report import check_data, documents_of

SEED = 0


def novelty_command(options: NoveltyOptions) -> dict[str, Novelty]:
    """Print a table of how new each file's texts are; return the scores by name.

    Half of the calibration texts calibrate; the other half is known texts, against which the others' area under the ROC
    curve is measured.
    """
    known, others = _check(options)
    source = read_source(options.adapter, options.base)
    if source.stored[0].config.router_kind.is_constant:
        raise UserError(f"{options.adapter}: router_type='fixed' weighs experts alike for every text: it knows nothing")
    learned = learned_domains(source.folder)
    tokenizer = load_tokenizer(source.base)
    read = {
        domain.name: sample(documents_of(domain, learned)[0], tokenizer, options.max_texts, options.length)
        for domain in (*known, *others)
    }
    if (known_texts := sum(len(read[domain.name]) for domain in known)) < 2 * FEWEST:
        raise UserError(
            f"--calibration: {known_texts} texts of two tokens or more say too little; give {2 * FEWEST} or more: half "
            "of them calibrate, and the other half is what the others are compared with"
        )
    if silent := [domain.name for domain in others if not read[domain.name]]:
        raise UserError(f"--data {silent[0]}: no text of two tokens, so there is no loss; give longer texts")
    tell_loading(source.base, source.folder)
    model = source.load()
    pad = int(tokenizer.pad_token_id or 0)
    with telling_user("--calibration: "):
        found = judge_all(model, [read[d.name] for d in known], {d.name: read[d.name] for d in others}, pad)
    make_stdout().print(_table(found))
    return found


KNOWN = "(known)"


def judge_all(
    model: PeftModel, known: Sequence[list[list[int]]], others: dict[str, list[list[int]]], pad: int
) -> dict[str, Novelty]:
    """Scores by name; those of the calibration texts that did not calibrate are under "(known)"."""
    halves = [[text for texts in known for text in texts[start::2]] for start in (0, 1)]
    number, calibration = measure(model, halves[0], pad=pad)
    groups = {KNOWN: halves[1], **others}
    return {name: judge(number, calibration, measure(model, texts, pad=pad)[1]) for name, texts in groups.items()}


def sample(documents: Sequence[Any], tokenizer: PreTrainedTokenizerBase, count: int, length: int) -> list[list[int]]:
    """Token ids of the starts of some documents, drawn at random but the same every time."""
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(SEED))[:count]
    texts = [tokenise(documents[number], tokenizer).token_ids[:length] for number in order.tolist()]
    return [text for text in texts if len(text) > 1]


def _check(options: NoveltyOptions) -> tuple[list[DomainOptions], list[DomainOptions]]:
    known, problems = check_data(options.calibration, "--calibration")
    others, more = check_data(options.data)
    names = [domain.name for domain in known]
    same = [
        Problem("--data", d.name, "calibration texts have this name; rename one") for d in others if d.name in names
    ]
    refuse([*check_options(options), *problems, *more, *same])
    return known, others


def _table(found: dict[str, Novelty]) -> Table:
    first = found[KNOWN]
    title = f"Novelty: z-scores of the {first.number} over known texts; new above {first.threshold:.2f}"
    rows = []
    for name, novelty in found.items():
        area = "" if name == KNOWN else f"{auc(first.scores, novelty.scores):.3f}"
        score = f"{novelty.scores.mean():.2f}"
        rows.append((name, str(len(novelty.scores)), score, f"{novelty.share_new:.0%}", area))
    return make_table(title, ("texts",), ("number", "score", "new", "AUC against known"), rows)
