"""References on their way from an adapter to what an operation makes of it."""

from __future__ import annotations

from pathlib import Path

from peft import PeftModel

from ..console import console
from ..forward.log_probs import with_and_without
from ..schema import UserError
from ..storage.references import References, pair_up, read_references, write_or_tell, write_references


def references_of(adapter: Path) -> References | None:
    """The references beside an adapter; what is wrong with them is printed, for an operation can do without."""
    try:
        return read_references(adapter)
    except UserError as error:
        console.print(f"References are left out of the result: {error}", soft_wrap=True)
        return None


def carry(references: References | None, folder: Path, *, is_exact: bool) -> None:
    """Let a LoRA be judged by what the adapter did that it was made of.

    Args:
        folder: holds the LoRA.
        is_exact: whether it is to compute the same.
    """
    if references is not None:
        both = is_exact and references.is_exact
        write_references(folder, references.base_model, references.dtype, references.prompts, is_exact=both)


def renew(references: References | None, model: PeftModel, folder: Path) -> None:
    """Keep what a changed mixture makes of the same prompts, beside its files in a folder."""
    if references is None:
        return
    adapted, base = with_and_without(model, references.token_ids)
    dtype = str(model.get_base_model().dtype).removeprefix("torch.")
    prompts = pair_up(references.token_ids, adapted, base)
    write_or_tell(folder, references.base_model, dtype, prompts)
