"""What the commands can be told: one dataclass for each; the command line and the tables of the docs follow from it.

Nothing is imported here that takes time, so that `--help` and a mistyped option are answered at once.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..files.opening import expand_user
from ..schema import (
    Problem,
    a_seed,
    at_least,
    between_0_and_1,
    check_values,
    not_empty,
    not_negative,
    one_of,
    option,
    positive,
    settable_fields,
)

ROUTERS = ("arrow", "prototype", "uniform", "train")
CRITERIA = ("load", "worth", "similarity")
METHODS = ("average", "svd", "ties", "dare")

ADAPTER_HELP = "folder that holds the adapter; it is only read"
BASE_HELP = "folder, .gguf file or hub id of the base model; by default the one the adapter was made for"
BACKUP_HELP = "the old one stays beside it as NAME.backup-N until you remove it, and `moelora undo` brings it back"
DATA_HELP = (
    "texts of a domain: a name of your choice and a .jsonl file, a text file, a pattern or a folder that `datasets` "
    "reads; once per domain"
)


def check_options(options: Any) -> list[Problem]:
    """What is out of range, each under the name by which the command line knows it."""
    fields = settable_fields(type(options))

    def shown(name: str) -> str:
        return name.upper() if fields[name].metadata.get("positional") else f"--{name.replace('_', '-')}"

    return [replace(problem, key=shown(problem.key)) for problem in check_values(type(options), vars(options), "")]


def whole_path(folder: str | Path) -> Path:
    """A folder by its whole path, without `..`: what is renamed needs a name."""
    return Path(os.path.abspath(expand_user(folder)))


def _is_folder(value: str) -> str | None:
    return None if expand_user(value).is_dir() else "no such folder; give the `output_dir` of a finished run"


def _is_file(value: str) -> str | None:
    return None if Path(value).is_file() else "no such file; give the path of a recipe"


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Fine-tune a causal language model with a mixture of LoRA experts, as a recipe says."""

    recipe: str = option(
        "the recipe, a YAML file; docs/training.md lists what it may say", check=_is_file, positional=True
    )
    set: list[str] = option(
        "replace a setting of the recipe, as if written there; may be repeated",
        default_factory=list,
        metavar="KEY=VALUE",
    )
    resume: bool = option("continue from the last checkpoint in the recipe's output folder", default=False)
    overwrite: bool = option(f"replace the recipe's output folder; {BACKUP_HELP}", default=False)
    grow: str | None = option(
        "folder of a trained mixture, to which new experts for the recipe's data are added; it is only read. "
        "`auto`: add them only if the data are new to the mixture that --adapter names, else train its own experts",
        default=None,
        check=lambda value: None if value == "auto" else _is_folder(value),
    )
    adapter: str | None = option("with --grow auto: folder of the trained mixture", default=None, check=_is_folder)
    dry_run: bool = option("with --grow: print what would be done and write nothing", default=False)


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """Continue a prompt with a trained adapter."""

    adapter: str = option("folder that holds the trained adapter", check=_is_folder)
    prompt: str = option("text to continue")
    base: str | None = option(BASE_HELP, default=None)
    max_new_tokens: int = option("most tokens to add", default=64, check=at_least(1))
    temperature: float = option("0 takes the likeliest token; higher is more random", default=0.0, check=not_negative)
    seed: int = option("seed of the random choices", default=42, check=a_seed)
    chat: bool = option("ask the prompt as a user's turn in the model's chat template", default=False)


@dataclass(frozen=True, kw_only=True)
class InspectOptions:
    """Show what an adapter holds: experts, their sizes and likeness, routers. Needs no base model."""

    adapter: str = option("folder that holds the adapter", check=_is_folder, positional=True)
    json: bool = option("print everything as JSON in place of tables", default=False)


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Write one HTML page that shows what the experts of an adapter do with texts."""

    adapter: str = option("folder that holds the trained adapter", check=_is_folder)
    data: list[str] = option(
        f"{DATA_HELP}. Of a file that the adapter was trained on, the documents held out then",
        default_factory=list,
        metavar="DOMAIN=FILE",
    )
    out: str = option(
        "file to write; an HTML page there is replaced as a whole, any other file refused", default="report.html"
    )
    base: str | None = option(BASE_HELP, default=None)
    max_tokens: int = option("most tokens to read per domain", default=50_000, check=at_least(1))
    worth_tokens: int = option(
        "tokens per domain on which the loss without each expert is measured, once per expert; 0 leaves it out",
        default=4096,
        check=not_negative,
    )


@dataclass(frozen=True, kw_only=True)
class OperationOptions:
    """What every operation that writes a folder lets one choose."""

    out: str = option("folder to write", check=not_empty)
    overwrite: bool = option(f"replace the folder if it exists; {BACKUP_HELP}", default=False)
    dry_run: bool = option("print what would be done and write nothing", default=False)

    @property
    def out_folder(self) -> Path:
        return whole_path(self.out)

    @property
    def in_place(self) -> bool:
        """Whether the result may take the place of the adapter that is read."""
        return False


@dataclass(frozen=True, kw_only=True)
class BuildOptions(OperationOptions):
    """Make a mixture of plain LoRAs that you have; they stay what they are, bit for bit."""

    expert: list[str] = option(
        "a plain LoRA, a folder or hub id, by the name it is to have; once each",
        default_factory=list,
        metavar="NAME=PATH",
    )
    migrate: str | None = option(
        "X-LoRA or MixLoRA checkpoint whose experts to take in place of --expert", default=None
    )
    base: str | None = option(BASE_HELP, default=None)
    router: str = option(
        "who decides: arrow (from the LoRAs' own factors), prototype (from --examples), uniform (equal weights, "
        "mergeable) or train (on --data, experts frozen)",
        default="arrow",
        check=one_of(*ROUTERS),
    )
    top_k: int | None = option("experts per token; 2 by default", default=None, check=at_least(1))
    temperature: float = option("temperature of the routers' softmax", default=1.0, check=positive)
    examples: list[str] = option(
        "texts of an expert's kind, for --router prototype; once per expert", default_factory=list, metavar="NAME=FILE"
    )
    data: list[str] = option(
        "texts of a domain to train the router on; once per domain", default_factory=list, metavar="DOMAIN=FILE"
    )
    steps: int = option("steps of router training", default=100, check=at_least(1))
    learning_rate: float = option("learning rate of router training", default=1e-3, check=positive)
    seed: int = option("seed of router training", default=42, check=a_seed)


@dataclass(frozen=True, kw_only=True)
class ExportOptions(OperationOptions):
    """Write an expert, or the mixture under fixed weights, as a plain PEFT LoRA or merged into the base model."""

    adapter: str = option(ADAPTER_HELP, check=_is_folder, positional=True)
    expert: str | None = option(
        "the expert to export: its number in the mixture, or the name of an adapter that is one", default=None
    )
    mixture: bool = option("export all experts as one LoRA of concatenated rank: exact", default=False)
    weights: str | None = option(
        "for --mixture: a weight for every expert, such as 0.5,0.5; by default those of a mixture whose router is "
        "fixed",
        default=None,
    )
    merge: bool = option("merge it into the base model and write that model", default=False)
    base: str | None = option(BASE_HELP, default=None)


@dataclass(frozen=True, kw_only=True)
class NoveltyOptions:
    """Say whether texts are new to an adapter: no expert of it knows their kind."""

    adapter: str = option(ADAPTER_HELP, check=_is_folder, positional=True)
    calibration: list[str] = option(
        "texts of a kind that the adapter knows: a name and a .jsonl file, a text file, a pattern or a folder; of "
        "a file it was trained on, the documents held out then; may be repeated",
        default_factory=list,
        metavar="NAME=FILE",
    )
    data: list[str] = option("texts to judge, likewise; may be repeated", default_factory=list, metavar="NAME=FILE")
    base: str | None = option(BASE_HELP, default=None)
    max_texts: int = option("most texts to read of each file", default=64, check=at_least(8))
    length: int = option("tokens to read of each text, from its start", default=256, check=at_least(2))


@dataclass(frozen=True, kw_only=True)
class JudgedOptions(OperationOptions):
    """What an operation that measures the loss before and after lets one choose."""

    adapter: str = option(ADAPTER_HELP, check=_is_folder, positional=True)
    data: list[str] = option(
        f"{DATA_HELP}. The loss before and after is measured on them; of a file that the adapter was trained on, "
        "on the documents held out then",
        default_factory=list,
        metavar="DOMAIN=FILE",
    )
    max_tokens: int = option("most tokens to read per domain", default=8192, check=at_least(1))
    base: str | None = option(BASE_HELP, default=None)


@dataclass(frozen=True, kw_only=True)
class PruneOptions(JudgedOptions):
    """Remove experts from a mixture, and say what that costs."""

    adapter: str = option(
        "folder that holds the adapter; it is only read, or kept beside the result where --out is the same folder",
        check=_is_folder,
        positional=True,
    )
    keep: int | None = option("experts to keep; --by chooses them", default=None, check=at_least(1))
    by: str = option(
        "what goes first: the expert that is used least (load), without which the loss rises least (worth), or of "
        "the two most alike the one used less (similarity); measured anew after each",
        default="load",
        check=one_of(*CRITERIA),
    )
    drop: list[str] = option(
        "experts to remove, by number or by the name of their adapter, in place of --keep; may be repeated",
        default_factory=list,
        metavar="EXPERT",
    )

    @property
    def in_place(self) -> bool:
        return True


@dataclass(frozen=True, kw_only=True)
class MergeOptions(JudgedOptions):
    """Make one expert of several, and say what that costs."""

    experts: list[str] = option(
        "experts to merge, by number or by the name of their adapter, joined by commas; the first one's adapter "
        "takes the result",
        default_factory=list,
        metavar="EXPERTS",
    )
    method: str = option(
        "how the products BA are combined: their mean, exactly (average); the mean's best approximation of the "
        "experts' rank (svd); TIES or DARE, then the same (ties, dare)",
        default="svd",
        check=one_of(*METHODS),
    )
    rank: int | None = option(
        "rank of the merged expert; by default that of the first one (not for average)", default=None, check=at_least(1)
    )
    density: float = option("share of entries that ties and dare keep", default=0.5, check=between_0_and_1)
    seed: int = option("seed of the entries that dare drops", default=42, check=a_seed)


@dataclass(frozen=True, kw_only=True)
class DistilOptions(OperationOptions):
    """Fit a single plain LoRA, which any LoRA server knows, to a mixture on given data."""

    adapter: str = option(ADAPTER_HELP, check=_is_folder, positional=True)
    to: str = option("what to make of the mixture", default="lora", check=one_of("lora"))
    r: int | None = option(
        "rank of the LoRA; by default 16, or that of all experts together if lower", default=None, check=at_least(1)
    )
    data: list[str] = option(
        f"{DATA_HELP}. It is fitted on a domain's training documents and measured on those held out: the same ones "
        "as in training where the adapter was trained on the file, else a tenth",
        default_factory=list,
        metavar="DOMAIN=FILE",
    )
    max_tokens: int = option(
        "most tokens that the fit reads, of all domains together", default=32_768, check=at_least(1)
    )
    steps: int = option(
        "training steps towards the mixture's predictions (KL), after the fit", default=0, check=not_negative
    )
    learning_rate: float = option("of these steps", default=1e-4, check=positive)
    batch_size: int = option("blocks read at once", default=4, check=at_least(1))
    compare_scratch: bool = option(
        "also train a LoRA of that rank from scratch, on the same blocks for as many steps, to compare", default=False
    )
    scratch_learning_rate: float = option("of the LoRA from scratch", default=1e-3, check=positive)
    max_eval_blocks: int = option("most held-out blocks per domain", default=64, check=at_least(1))
    ridge: float = option("weight of the experts' mean, relative to the data, in the fit", default=1e-3, check=positive)
    memory: float = option(
        "GiB that the fit's sums may take; less makes more passes over the data", default=4.0, check=positive
    )
    seed: int = option("seed of the order of the blocks", default=42, check=a_seed)
    base: str | None = option(BASE_HELP, default=None)


@dataclass(frozen=True, kw_only=True)
class UndoOptions:
    """Bring back the folder that the latest operation with --overwrite replaced."""

    folder: str = option("folder that an operation wrote", check=not_empty, positional=True)
    dry_run: bool = option("print what would be done and change nothing", default=False)
