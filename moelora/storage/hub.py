"""Pushing a mixture to the hub: its files and its model card in one commit."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitInfo, HfApi, ModelCard, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RevisionNotFoundError
from peft import PeftModel

from ..files.atomic_save import CARD_NAME, DATA_NAMES
from .model_card import name_repository


def push(
    model: PeftModel,
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tags: list[str] | None = None,
    **save_options: Any,
) -> CommitInfo:
    """Save model to a repository; see [`MixturePeftModel.push_to_hub`]."""
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    with TemporaryDirectory() as made:
        folder = Path(made)
        _fetch_card(repo_id, revision, token, folder)
        model.save_pretrained(str(folder), **save_options)
        name_repository(folder / CARD_NAME, repo_id)
        _finish_card(folder / CARD_NAME, tags or [])
        if revision is not None and not revision.startswith("refs/pr"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message or "Upload a mixture of LoRA experts",
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
            delete_patterns=list(DATA_NAMES),  # a router of the save before would not belong to this one
        )


def _fetch_card(repo_id: str, revision: str | None, token: bool | str | None, folder: Path) -> None:
    """Begin with the card that the repository has, which its owner may have written in."""
    try:
        shutil.copy(hf_hub_download(repo_id, CARD_NAME, revision=revision, token=token), folder)
    except LocalEntryNotFoundError:  # the hub could not be asked; it is an EntryNotFoundError too
        raise
    except (EntryNotFoundError, RevisionNotFoundError):
        return


def _finish_card(path: Path, tags: list[str]) -> None:
    card = ModelCard.load(path)
    if tags:
        card.data["tags"] = sorted({*card.data["tags"], *tags})
        card.save(path)
    if not card.data.get("base_model"):
        warnings.warn(
            "the card names no `base_model`, for that is a folder of this machine: write the name that it has on the "
            "hub into the repository's README.md, where later pushes keep it",
            stacklevel=4,
        )
