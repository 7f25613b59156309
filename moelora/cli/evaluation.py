"""What prune and merge share: they open a mixture with texts to evaluate it on, and write what they have made of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel

from ..experts.evaluation import Evaluation, Texts
from ..experts.parts import find_experts
from ..recipe import DomainOptions
from ..schema import Problem, telling_user
from ..storage.base_model import load_tokenizer
from ..storage.finding import tell_loading
from ..storage.run_record import learned_domains
from .operation import Plan, Source, carry_out, check_only_read, check_output, read_source
from .options import EvaluatedOptions
from .references import references_of, renew
from .report import block_size_of, check_data, read_texts


@dataclass(frozen=True)
class EvaluatedJob:
    """An adapter on disk whose options are in order, and the texts it is evaluated on; nothing is loaded yet."""

    options: EvaluatedOptions
    source: Source
    domains: list[DomainOptions]

    def find(self, wanted: Sequence[str], flag: str) -> list[int]:
        """Numbers of the experts that an option names, by number or adapter, apart or joined by commas."""
        with telling_user(f"{flag}: "):
            found = find_experts([name.strip() for item in wanted for name in item.split(",")], self.source.experts)
        return found

    def load(self) -> tuple[PeftModel, Texts]:
        """The model with its mixture, and the texts."""
        tell_loading(self.source.base, self.source.folder)
        tokenizer = load_tokenizer(self.source.base)
        domains = read_texts(self.domains, learned_domains(self.source.folder), tokenizer, self.options.max_tokens)
        with telling_user("--data: "):
            texts = Texts(domains, block_size_of(self.source.folder, self.source.base), tokenizer.pad_token_id)
        return self.source.load(), texts

    def write(self, model: PeftModel, plan: Plan, outcome: dict[str, Any]) -> Path | None:
        """Print the plan and save the mixture, unless this is a dry run."""

        def save(folder: Path) -> dict[str, Any]:
            model.save_pretrained(str(folder))
            renew(references_of(self.source.folder), model, folder)
            return outcome

        return carry_out(self.options, plan, save, inputs=[self.options.adapter], base=self.source.base)


def open_adapter(options: EvaluatedOptions, problems: Sequence[Problem]) -> EvaluatedJob:
    """Check the options and the adapter's files.

    Args:
        problems: what the operation found wrong with its own options.
    """
    domains, more = check_data(options.data)
    check_output(options, [*problems, *more])
    source = read_source(options.adapter, options.base)
    check_only_read(options, [options.adapter], source.base, domains)
    return EvaluatedJob(options, source, domains)


def loss_notes(texts: Texts, before: Evaluation, after: Evaluation) -> list[str]:
    """The loss of every domain before and after, for a plan."""
    rows = zip(texts.domains, before.loss, after.loss, strict=True)
    return [
        "Loss in nats per token, before -> after:",
        *(
            f"  {domain.name}: {old:.4f} -> {new:.4f} ({new - old:+.4f}; {domain.num_tokens:,} "
            f"{'held-out ' if domain.is_held_out else ''}tokens)"
            for domain, old, new in rows
        ),
    ]


def loss_record(texts: Texts, before: Evaluation, after: Evaluation) -> dict[str, dict[str, float]]:
    """The same for operation.json."""
    pairs = zip(texts.names, before.loss, after.loss, strict=True)
    return {name: {"loss_before": float(old), "loss_after": float(new)} for name, old, new in pairs}
