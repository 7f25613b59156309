"""What the commands can be told: one dataclass for each; the command line and the tables of the docs follow from it.

Nothing is imported here that takes time, so that `--help` and a mistyped option are answered at once.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ..files.opening import expand_user
from ..schema import a_seed, at_least, between_0_and_1, not_empty, not_negative, one_of, positive
from .option_fields import (
    DATA_HELP,
    KEPT_HELP,
    TRAINED_BASE_HELP,
    adapter_folder,
    base_model,
    choice,
    flag,
    is_file,
    is_folder,
    is_port,
    many,
    may_be_on_hub,
    optional,
    required,
    rest,
    whole_path,
)

# ruff: noqa: RUF009 (each call makes a field)

T = TypeVar("T")

ROUTERS = ("arrow", "prototype", "uniform", "train")
CRITERIA = ("load", "worth", "similarity")
ENGINES = ("auto", "vllm", "transformers")
METHODS = ("average", "svd", "ties", "dare")
RUNTIMES = ("transformers", "vllm", "merged")
DTYPES = ("auto", "float32", "bfloat16", "float16")

COMMANDS: dict[str, tuple[type, str, str]] = {}
"""Subcommand: the dataclass of its options, where the function is that it calls, a call to paste."""


def _command(function: str, example: str) -> Callable[[type[T]], type[T]]:
    """Make a dataclass of options a subcommand, whose function lies in a module of this package."""

    def register(options: type[T]) -> type[T]:
        name = options.__name__.removesuffix("Options").lower()
        COMMANDS[name] = options, f"{__package__}.{function}", example
        return options

    return register


@_command("commands:train_command", "moelora train examples/quickstart.yaml --set training.max_steps=20")
@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Fine-tune a causal language model with a mixture of LoRA experts, as a recipe says."""

    recipe: str = required(
        "the recipe, a YAML file; docs/training.md lists what it may say", check=is_file, positional=True
    )
    set: list[str] = many("replace a setting of the recipe, as if written there; may be repeated", "KEY=VALUE")
    resume: bool = flag("continue from the last checkpoint in the recipe's output folder")
    overwrite: bool = flag(f"replace the recipe's output folder; {KEPT_HELP}")
    grow: str | None = optional(
        "folder of a trained mixture, or a plain LoRA (a folder or hub id), to which new experts for the recipe's data "
        "are added; it is only read. `auto`: add them only if the data are new to the mixture that --adapter names, "
        "else train its own experts",
        check=lambda value: None if value == "auto" or may_be_on_hub(value) else is_folder(value),
    )
    adapter: str | None = optional("with --grow auto: folder of the trained mixture", check=is_folder)
    max_experts: int | None = optional(
        "with --grow: most experts that the mixture may have; old ones are merged, least loss first, to make room",
        check=at_least(2),
    )
    dry_run: bool = flag("with --grow: print what would be done and write nothing")


@_command("generate:generate", 'moelora generate --adapter runs/quickstart/adapter --prompt "def read_lines(path):"')
@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """Continue a prompt with a trained adapter."""

    adapter: str = required("folder that holds the trained adapter", check=is_folder)
    prompt: str = required("text to continue")
    base: str | None = base_model(TRAINED_BASE_HELP)
    max_new_tokens: int = choice(64, "most tokens to add", check=at_least(1))
    temperature: float = choice(0.0, "0 takes the likeliest token; higher is more random", check=not_negative)
    seed: int = choice(42, "seed of the random choices", check=a_seed)
    chat: bool = flag("ask the prompt as a user's turn in the model's chat template")


@_command("inspect:inspect", "moelora inspect runs/quickstart/adapter")
@dataclass(frozen=True, kw_only=True)
class InspectOptions:
    """Show what an adapter holds: experts, their sizes and likeness, routers. Needs no base model."""

    adapter: str = adapter_folder("folder that holds the adapter")
    json: bool = flag("print everything as JSON in place of tables")


@_command(
    "report:report",
    "moelora report --adapter runs/quickstart/adapter --data code=runs/quickstart/data/code.jsonl --out code.html",
)
@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Write one HTML page that shows what the experts of an adapter do with texts."""

    adapter: str = required("folder that holds the trained adapter", check=is_folder)
    data: list[str] = many(f"{DATA_HELP}. Of a file that the adapter was trained on, the documents held out then")
    out: str = choice("report.html", "file to write; an HTML page there is replaced as a whole, any other file refused")
    base: str | None = base_model(TRAINED_BASE_HELP)
    max_tokens: int = choice(50_000, "most tokens to read per domain", check=at_least(1))
    worth_tokens: int = choice(
        4096,
        "tokens per domain on which the loss without each expert is measured, once per expert; 0 leaves it out",
        check=not_negative,
    )


@dataclass(frozen=True, kw_only=True)
class OperationOptions:
    """What every operation that writes a folder lets one choose."""

    out: str = required("folder to write", check=not_empty)
    overwrite: bool = flag(f"replace the folder if it exists; {KEPT_HELP}")
    dry_run: bool = flag("print what would be done and write nothing")

    @property
    def out_folder(self) -> Path:
        return whole_path(self.out)

    @property
    def in_place(self) -> bool:
        """Whether the result may take the place of the adapter that is read."""
        return False


@_command(
    "build:build_command",
    "moelora build --expert code=loras/code --expert docs=loras/docs --router arrow --out loras/mixture",
)
@dataclass(frozen=True, kw_only=True)
class BuildOptions(OperationOptions):
    """Make a mixture of plain LoRAs that you have; they stay what they are, bit for bit."""

    expert: list[str] = many("a plain LoRA, a folder or hub id, by the name it is to have; once each", "NAME=PATH")
    migrate: str | None = optional("X-LoRA or MixLoRA checkpoint whose experts to take in place of --expert")
    base: str | None = base_model()
    router: str = choice(
        "arrow",
        "who decides: arrow (from the LoRAs' own factors), prototype (from --examples), uniform (equal weights, "
        "mergeable) or train (on --data, experts frozen)",
        check=one_of(*ROUTERS),
    )
    top_k: int | None = optional("experts per token; 2 by default", check=at_least(1))
    temperature: float = choice(1.0, "temperature of the routers' softmax", check=positive)
    examples: list[str] = many("texts of an expert's kind, for --router prototype; once per expert", "NAME=FILE")
    data: list[str] = many("texts of a domain to train the router on; once per domain")
    steps: int = choice(100, "steps of router training", check=at_least(1))
    learning_rate: float = choice(1e-3, "learning rate of router training", check=positive)
    seed: int = choice(42, "seed of router training", check=a_seed)


@_command("export:export", "moelora export runs/quickstart/adapter --expert 0 --out loras/expert-0")
@dataclass(frozen=True, kw_only=True)
class ExportOptions(OperationOptions):
    """Write an expert, or the mixture under fixed weights, as a plain PEFT LoRA or merged into the base model."""

    adapter: str = adapter_folder()
    expert: str | None = optional(
        "the expert to export: its number in the mixture, or the name of an adapter that is one"
    )
    mixture: bool = flag("export all experts as one LoRA of concatenated rank: exact")
    weights: str | None = optional(
        "for --mixture: a weight for every expert, such as 0.5,0.5; by default those of a mixture whose router is fixed"
    )
    each: bool = flag(
        "export every adapter of a mixture that grew, one per task, each to a folder of its own in --out; exact for an "
        "adapter of one expert, else with the experts at their mean routing weights"
    )
    merge: bool = flag("merge it into the base model and write that model")
    base: str | None = base_model()


@_command(
    "novelty:novelty_command",
    "moelora novelty runs/quickstart/adapter --calibration code=runs/quickstart/data/code.jsonl --data mail=mail.jsonl",
)
@dataclass(frozen=True, kw_only=True)
class NoveltyOptions:
    """Say whether texts are new to an adapter: no expert of it knows their kind."""

    adapter: str = adapter_folder()
    calibration: list[str] = many(
        "texts of a kind that the adapter knows: a name and a .jsonl file, a text file, a pattern or a folder; of "
        "a file it was trained on, the documents held out then; may be repeated",
        "NAME=FILE",
    )
    data: list[str] = many("texts to judge, likewise; may be repeated", "NAME=FILE")
    base: str | None = base_model()
    max_texts: int = choice(64, "most texts to read of each file", check=at_least(8))
    length: int = choice(256, "tokens to read of each text, from its start", check=at_least(2))


@dataclass(frozen=True, kw_only=True)
class EvaluatedOptions(OperationOptions):
    """What an operation that measures the loss before and after lets one choose."""

    adapter: str = adapter_folder()
    data: list[str] = many(
        f"{DATA_HELP}. The loss before and after is measured on them; of a file that the adapter was trained on, "
        "on the documents held out then"
    )
    max_tokens: int = choice(8192, "most tokens to read per domain", check=at_least(1))
    base: str | None = base_model()


@_command(
    "prune:prune_command",
    "moelora prune runs/quickstart/adapter --keep 3 --by worth --data code=runs/quickstart/data/code.jsonl "
    "--out runs/quickstart/pruned",
)
@dataclass(frozen=True, kw_only=True)
class PruneOptions(EvaluatedOptions):
    """Remove experts from a mixture, and say what that costs."""

    adapter: str = adapter_folder(
        "folder that holds the adapter; it is only read, or kept beside the result where --out is the same folder"
    )
    keep: int | None = optional("experts to keep; --by chooses them", check=at_least(1))
    by: str = choice(
        "load",
        "what goes first: the expert that is used least (load), without which the loss rises least (worth), or of "
        "the two most alike the one used less (similarity); measured anew after each",
        check=one_of(*CRITERIA),
    )
    drop: list[str] = many(
        "experts to remove, by number or by the name of their adapter, in place of --keep; may be repeated", "EXPERT"
    )

    @property
    def in_place(self) -> bool:
        return True


@_command(
    "merge:merge_command",
    "moelora merge runs/quickstart/adapter --experts 0,1 --data code=runs/quickstart/data/code.jsonl "
    "--out runs/quickstart/merged",
)
@dataclass(frozen=True, kw_only=True)
class MergeOptions(EvaluatedOptions):
    """Make one expert of several, and say what that costs."""

    experts: list[str] = many(
        "experts to merge, by number or by the name of their adapter, joined by commas; the first one's adapter "
        "takes the result",
        "EXPERTS",
    )
    method: str = choice(
        "svd",
        "how the products BA are combined: their mean, exactly (average); the mean's best approximation of the "
        "experts' rank (svd); TIES or DARE, then the same (ties, dare)",
        check=one_of(*METHODS),
    )
    rank: int | None = optional(
        "rank of the merged expert; by default that of the first one (not for average)", check=at_least(1)
    )
    density: float = choice(0.5, "share of entries that ties and dare keep", check=between_0_and_1)
    seed: int = choice(42, "seed of the entries that dare drops", check=a_seed)


@_command(
    "distil:distil_command",
    "moelora distil runs/quickstart/adapter --r 16 --data code=runs/quickstart/data/code.jsonl "
    "--out runs/quickstart/lora",
)
@dataclass(frozen=True, kw_only=True)
class DistilOptions(OperationOptions):
    """Fit a single plain LoRA, which any LoRA server knows, to a mixture on given data."""

    adapter: str = adapter_folder()
    to: str = choice("lora", "what to make of the mixture", check=one_of("lora"))
    r: int | None = optional(
        "rank of the LoRA; by default 16, or that of all experts together if lower", check=at_least(1)
    )
    data: list[str] = many(
        f"{DATA_HELP}. It is fitted on a domain's training documents and measured on those held out: the same ones "
        "as in training where the adapter was trained on the file, else a tenth"
    )
    max_tokens: int = choice(32_768, "most tokens that the fit reads, of all domains together", check=at_least(1))
    steps: int = choice(0, "training steps towards the mixture's predictions (KL), after the fit", check=not_negative)
    learning_rate: float = choice(1e-4, "of these steps", check=positive)
    batch_size: int = choice(4, "blocks read at once", check=at_least(1))
    compare_scratch: bool = flag(
        "also train a LoRA of that rank from scratch, on the same blocks for as many steps, to compare"
    )
    scratch_learning_rate: float = choice(1e-3, "of the LoRA from scratch", check=positive)
    max_eval_blocks: int = choice(64, "most held-out blocks per domain", check=at_least(1))
    ridge: float = choice(1e-3, "weight of the experts' mean, relative to the data, in the fit", check=positive)
    memory: float = choice(
        4.0, "GiB that the fit's sums may take; less makes more passes over the data", check=positive
    )
    seed: int = choice(42, "seed of the order of the blocks", check=a_seed)
    base: str | None = base_model()


@_command("verify:verify", "moelora verify runs/quickstart/adapter --runtime vllm")
@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """Say whether an adapter or an exported LoRA does, in the runtime that serves it, what it did in training.

    The exit status is 0 where it does, 1 where it does not, and 3 where nothing says what it did.
    """

    adapter: str = adapter_folder("folder that holds the adapter; only --write writes there")
    base: str | None = base_model(TRAINED_BASE_HELP)
    runtime: str = choice(
        "transformers",
        "what loads it: transformers, vllm, or merged (transformers, with the adapter merged into the base model)",
        check=one_of(*RUNTIMES),
    )
    model: str | None = optional(
        "with --runtime merged: folder of a whole model that has the adapter in its weights, to be run in its place",
        check=lambda value: None if expand_user(value).is_dir() else "no such folder; give the folder of a model",
    )
    device: str | None = optional("where it runs, such as cpu or cuda; by default the GPU if there is one")
    dtype: str = choice(
        "auto", f"precision to run in: {', '.join(DTYPES)}; auto is that of the references", check=one_of(*DTYPES)
    )
    keep: float = choice(
        0.5,
        "share of the effect in training that is enough for what only comes near to the mixture, such as one expert "
        "exported as a LoRA",
        check=lambda value: None if 0 <= value <= 1 else "must be 0 to 1",
    )
    prompts: str | None = optional(
        "without references, or for --write: a .jsonl or text file of texts to run; a few built-in ones by default",
        check=not_empty,
    )
    write: bool = flag(
        "write references.json beside an adapter that has none: what it does now in transformers is what it should do"
    )


@_command("serve:serve", "moelora serve runs/quickstart/adapter --port 8000")
@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """Serve adapters and their base model over OpenAI's API, with vLLM or transformers' own server."""

    adapters: list[str] = required(
        "folders of mixtures or plain LoRAs made for one base model, each as FOLDER or as NAME=FOLDER; clients ask "
        "for a model by that name, or by the folder's own",
        positional=True,
    )
    base: str | None = base_model()
    name: str | None = optional("name of the adapter, where there is one", check=not_empty)
    host: str = choice("127.0.0.1", "address to listen on; 0.0.0.0 is all of this machine's", check=not_empty)
    port: int = choice(8000, "port to listen on", check=is_port)
    engine: str = choice(
        "auto",
        "what serves: vllm, transformers, or (auto) vLLM where its command is found and transformers elsewhere",
        check=one_of(*ENGINES),
    )
    engine_arguments: list[str] = rest(
        "all that follows goes to `vllm serve` or `transformers serve` as it is, such as `-- --max-model-len 4096`"
    )


@_command("operation:undo", "moelora undo runs/quickstart/smaller")
@dataclass(frozen=True, kw_only=True)
class UndoOptions:
    """Bring back the folder that the latest operation with --overwrite replaced."""

    folder: str = required("folder that an operation wrote", check=not_empty, positional=True)
    dry_run: bool = flag("print what would be done and change nothing")
