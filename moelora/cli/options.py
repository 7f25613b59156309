"""What the commands can be told: one dataclass for each; the command line and the tables of the docs follow from it.

Nothing is imported here that takes time, so that `--help` and a mistyped option are answered at once.
"""

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..files.opening import expand_user
from ..schema import (
    Problem,
    a_seed,
    about,
    at_least,
    between_0_and_1,
    check_values,
    not_empty,
    not_negative,
    one_of,
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

    recipe: str = field(
        metadata=about(
            "the recipe, a YAML file; docs/training.md lists what it may say", check=_is_file, positional=True
        )
    )
    set: list[str] = field(
        default_factory=list,
        metadata=about("replace a setting of the recipe, as if written there; may be repeated", metavar="KEY=VALUE"),
    )
    resume: bool = field(
        default=False, metadata=about("continue from the last checkpoint in the recipe's output folder")
    )
    overwrite: bool = field(default=False, metadata=about(f"replace the recipe's output folder; {BACKUP_HELP}"))
    grow: str | None = field(
        default=None,
        metadata=about(
            "folder of a trained mixture, to which new experts for the recipe's data are added; it is only read. "
            "`auto`: add them only if the data are new to the mixture that --adapter names, else train its own experts",
            check=lambda value: None if value == "auto" else _is_folder(value),
        ),
    )
    adapter: str | None = field(
        default=None, metadata=about("with --grow auto: folder of the trained mixture", check=_is_folder)
    )
    dry_run: bool = field(default=False, metadata=about("with --grow: print what would be done and write nothing"))


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """Continue a prompt with a trained adapter."""

    adapter: str = field(metadata=about("folder that holds the trained adapter", check=_is_folder))
    prompt: str = field(metadata=about("text to continue"))
    base: str | None = field(default=None, metadata=about(BASE_HELP))
    max_new_tokens: int = field(default=64, metadata=about("most tokens to add", check=at_least(1)))
    temperature: float = field(
        default=0.0, metadata=about("0 takes the likeliest token; higher is more random", check=not_negative)
    )
    seed: int = field(default=42, metadata=about("seed of the random choices", check=a_seed))
    chat: bool = field(default=False, metadata=about("ask the prompt as a user's turn in the model's chat template"))


@dataclass(frozen=True, kw_only=True)
class InspectOptions:
    """Show what an adapter holds: experts, their sizes and likeness, routers. Needs no base model."""

    adapter: str = field(metadata=about("folder that holds the adapter", check=_is_folder, positional=True))
    json: bool = field(default=False, metadata=about("print everything as JSON in place of tables"))


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Write one HTML page that shows what the experts of an adapter do with texts."""

    adapter: str = field(metadata=about("folder that holds the trained adapter", check=_is_folder))
    data: list[str] = field(
        default_factory=list,
        metadata=about(
            f"{DATA_HELP}. Of a file that the adapter was trained on, the documents held out then",
            metavar="DOMAIN=FILE",
        ),
    )
    out: str = field(
        default="report.html",
        metadata=about("file to write; an HTML page there is replaced as a whole, any other file refused"),
    )
    base: str | None = field(default=None, metadata=about(BASE_HELP))
    max_tokens: int = field(default=50_000, metadata=about("most tokens to read per domain", check=at_least(1)))
    worth_tokens: int = field(
        default=4096,
        metadata=about(
            "tokens per domain on which the loss without each expert is measured, once per expert; 0 leaves it out",
            check=not_negative,
        ),
    )


@dataclass(frozen=True, kw_only=True)
class OperationOptions:
    """What every operation that writes a folder lets one choose."""

    out: str = field(metadata=about("folder to write", check=not_empty))
    overwrite: bool = field(default=False, metadata=about(f"replace the folder if it exists; {BACKUP_HELP}"))
    dry_run: bool = field(default=False, metadata=about("print what would be done and write nothing"))

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

    expert: list[str] = field(
        default_factory=list,
        metadata=about("a plain LoRA, a folder or hub id, by the name it is to have; once each", metavar="NAME=PATH"),
    )
    migrate: str | None = field(
        default=None, metadata=about("X-LoRA or MixLoRA checkpoint whose experts to take in place of --expert")
    )
    base: str | None = field(default=None, metadata=about(BASE_HELP))
    router: str = field(
        default="arrow",
        metadata=about(
            "who decides: arrow (from the LoRAs' own factors), prototype (from --examples), uniform (equal weights, "
            "mergeable) or train (on --data, experts frozen)",
            check=one_of(*ROUTERS),
        ),
    )
    top_k: int | None = field(default=None, metadata=about("experts per token; 2 by default", check=at_least(1)))
    temperature: float = field(default=1.0, metadata=about("temperature of the routers' softmax", check=positive))
    examples: list[str] = field(
        default_factory=list,
        metadata=about("texts of an expert's kind, for --router prototype; once per expert", metavar="NAME=FILE"),
    )
    data: list[str] = field(
        default_factory=list,
        metadata=about("texts of a domain to train the router on; once per domain", metavar="DOMAIN=FILE"),
    )
    steps: int = field(default=100, metadata=about("steps of router training", check=at_least(1)))
    learning_rate: float = field(default=1e-3, metadata=about("learning rate of router training", check=positive))
    seed: int = field(default=42, metadata=about("seed of router training", check=a_seed))


@dataclass(frozen=True, kw_only=True)
class ExportOptions(OperationOptions):
    """Write an expert, or the mixture under fixed weights, as a plain PEFT LoRA or merged into the base model."""

    adapter: str = field(metadata=about(ADAPTER_HELP, check=_is_folder, positional=True))
    expert: str | None = field(
        default=None,
        metadata=about("the expert to export: its number in the mixture, or the name of an adapter that is one"),
    )
    mixture: bool = field(default=False, metadata=about("export all experts as one LoRA of concatenated rank: exact"))
    weights: str | None = field(
        default=None,
        metadata=about(
            "for --mixture: a weight for every expert, such as 0.5,0.5; by default those of a mixture whose router is "
            "fixed"
        ),
    )
    merge: bool = field(default=False, metadata=about("merge it into the base model and write that model"))
    base: str | None = field(default=None, metadata=about(BASE_HELP))


@dataclass(frozen=True, kw_only=True)
class NoveltyOptions:
    """Say whether texts are new to an adapter: no expert of it knows their kind."""

    adapter: str = field(metadata=about(ADAPTER_HELP, check=_is_folder, positional=True))
    calibration: list[str] = field(
        default_factory=list,
        metadata=about(
            "texts of a kind that the adapter knows: a name and a .jsonl file, a text file, a pattern or a folder; of "
            "a file it was trained on, the documents held out then; may be repeated",
            metavar="NAME=FILE",
        ),
    )
    data: list[str] = field(
        default_factory=list, metadata=about("texts to judge, likewise; may be repeated", metavar="NAME=FILE")
    )
    base: str | None = field(default=None, metadata=about(BASE_HELP))
    max_texts: int = field(default=64, metadata=about("most texts to read of each file", check=at_least(8)))
    length: int = field(default=256, metadata=about("tokens to read of each text, from its start", check=at_least(2)))


@dataclass(frozen=True, kw_only=True)
class JudgedOptions(OperationOptions):
    """What an operation that measures the loss before and after lets one choose."""

    adapter: str = field(metadata=about(ADAPTER_HELP, check=_is_folder, positional=True))
    data: list[str] = field(
        default_factory=list,
        metadata=about(
            f"{DATA_HELP}. The loss before and after is measured on them; of a file that the adapter was trained on, "
            "on the documents held out then",
            metavar="DOMAIN=FILE",
        ),
    )
    max_tokens: int = field(default=8192, metadata=about("most tokens to read per domain", check=at_least(1)))
    base: str | None = field(default=None, metadata=about(BASE_HELP))


@dataclass(frozen=True, kw_only=True)
class PruneOptions(JudgedOptions):
    """Remove experts from a mixture, and say what that costs."""

    adapter: str = field(
        metadata=about(
            "folder that holds the adapter; it is only read, or kept beside the result where --out is the same folder",
            check=_is_folder,
            positional=True,
        )
    )
    keep: int | None = field(default=None, metadata=about("experts to keep; --by chooses them", check=at_least(1)))
    by: str = field(
        default="load",
        metadata=about(
            "what goes first: the expert that is used least (load), without which the loss rises least (worth), or of "
            "the two most alike the one used less (similarity); measured anew after each",
            check=one_of(*CRITERIA),
        ),
    )
    drop: list[str] = field(
        default_factory=list,
        metadata=about(
            "experts to remove, by number or by the name of their adapter, in place of --keep; may be repeated",
            metavar="EXPERT",
        ),
    )

    @property
    def in_place(self) -> bool:
        return True


@dataclass(frozen=True, kw_only=True)
class MergeOptions(JudgedOptions):
    """Make one expert of several, and say what that costs."""

    experts: list[str] = field(
        default_factory=list,
        metadata=about(
            "experts to merge, by number or by the name of their adapter, joined by commas; the first one's adapter "
            "takes the result",
            metavar="EXPERTS",
        ),
    )
    method: str = field(
        default="svd",
        metadata=about(
            "how the products BA are combined: their mean, exactly (average); the mean's best approximation of the "
            "experts' rank (svd); TIES or DARE, then the same (ties, dare)",
            check=one_of(*METHODS),
        ),
    )
    rank: int | None = field(
        default=None,
        metadata=about(
            "rank of the merged expert; by default that of the first one (not for average)", check=at_least(1)
        ),
    )
    density: float = field(
        default=0.5, metadata=about("share of entries that ties and dare keep", check=between_0_and_1)
    )
    seed: int = field(default=42, metadata=about("seed of the entries that dare drops", check=a_seed))


@dataclass(frozen=True, kw_only=True)
class DistilOptions(OperationOptions):
    """Fit a single plain LoRA, which any LoRA server knows, to a mixture on given data."""

    adapter: str = field(metadata=about(ADAPTER_HELP, check=_is_folder, positional=True))
    to: str = field(default="lora", metadata=about("what to make of the mixture", check=one_of("lora")))
    r: int | None = field(
        default=None,
        metadata=about("rank of the LoRA; by default 16, or that of all experts together if lower", check=at_least(1)),
    )
    data: list[str] = field(
        default_factory=list,
        metadata=about(
            f"{DATA_HELP}. It is fitted on a domain's training documents and measured on those held out: the same ones "
            "as in training where the adapter was trained on the file, else a tenth",
            metavar="DOMAIN=FILE",
        ),
    )
    max_tokens: int = field(
        default=32_768, metadata=about("most tokens that the fit reads, of all domains together", check=at_least(1))
    )
    steps: int = field(
        default=0,
        metadata=about("training steps towards the mixture's predictions (KL), after the fit", check=not_negative),
    )
    learning_rate: float = field(default=1e-4, metadata=about("of these steps", check=positive))
    batch_size: int = field(default=4, metadata=about("blocks read at once", check=at_least(1)))
    compare_scratch: bool = field(
        default=False,
        metadata=about("also train a LoRA of that rank from scratch, on the same blocks for as many steps, to compare"),
    )
    scratch_learning_rate: float = field(default=1e-3, metadata=about("of the LoRA from scratch", check=positive))
    max_eval_blocks: int = field(default=64, metadata=about("most held-out blocks per domain", check=at_least(1)))
    ridge: float = field(
        default=1e-3,
        metadata=about("weight of the experts' mean, relative to the data, in the fit", check=positive),
    )
    memory: float = field(
        default=4.0,
        metadata=about("GiB that the fit's sums may take; less makes more passes over the data", check=positive),
    )
    seed: int = field(default=42, metadata=about("seed of the order of the blocks", check=a_seed))
    base: str | None = field(default=None, metadata=about(BASE_HELP))


@dataclass(frozen=True, kw_only=True)
class UndoOptions:
    """Bring back the folder that the latest operation with --overwrite replaced."""

    folder: str = field(metadata=about("folder that an operation wrote", check=not_empty, positional=True))
    dry_run: bool = field(default=False, metadata=about("print what would be done and change nothing"))
