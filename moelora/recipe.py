"""What a training recipe says: one dataclass per section, each field with its help text and the rule its value obeys.

Reading a recipe file and checking it is `load.py`.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .schema import a_seed, at_least, between_0_and_1, not_empty, one_of, option, positive

MIXTURE_DEFAULTS: dict[str, Any] = {"task_type": "CAUSAL_LM", "target_modules": "all-linear"}
"""What the job sets in `MoELoraConfig` unless the recipe says otherwise."""

TRAINING_DEFAULTS: dict[str, Any] = {"logging_steps": 10, "report_to": "none", "ddp_find_unused_parameters": False}
"""What the job sets in `TrainingArguments` unless the recipe says otherwise."""


def plain_name(value: str) -> str | None:
    """The rule for a domain's name."""
    plain = value.replace("-", "_").isidentifier()
    return None if plain else "must be letters, digits, `-` and `_`, not starting with a digit: it names a table row"


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The pretrained causal language model to adapt."""

    name: str = option(
        "folder of a pretrained causal language model, or its id on the Hugging Face hub", check=not_empty
    )
    gguf_file: str | None = option("name of the GGUF file to read inside that folder or repository", default=None)
    dtype: str = option(
        "precision of the frozen weights: float32, bfloat16, float16, or auto (bfloat16 on a GPU, else float32)",
        default="auto",
        check=one_of("auto", "float32", "bfloat16", "float16"),
    )


@dataclass(frozen=True, kw_only=True)
class DomainOptions:
    """One named kind of text. Held-out documents are chosen by a hash of their content, never within a document."""

    name: str = option("name of the domain in tables and in run.json", check=plain_name)
    path: str = option(
        "a .jsonl file, a text file (one document), a pattern such as books/*.txt, "
        "or what `datasets` reads: a folder or a hub id",
        check=not_empty,
    )
    subset: str | None = option("configuration of a `datasets` hub id, where it has several", default=None)
    split: str = option("split of a `datasets` path to train on", default="train")
    text_field: str = option("field of a JSONL line or dataset row that holds the text", default="text")
    messages_field: str | None = option(
        "field that holds a conversation (a list of {role, content}) to be written out with the model's chat "
        "template; used in place of `text_field`, and every token of it is learned",
        default=None,
    )
    separator: str | None = option(
        'text between the documents of a text file, such as "\\n\\n"; by default a file is one document', default=None
    )
    eval_path: str | None = option(
        "held-out documents in place of a share of `path`; same forms as `path`", default=None, check=not_empty
    )
    eval_split: str | None = option("held-out split of a `datasets` path in place of a share of `split`", default=None)
    eval_fraction: float = option("share of the documents to hold out", default=0.1, check=between_0_and_1)
    weight: float = option(
        "how often training draws a block from this domain, relative to the other domains' weights",
        default=1.0,
        check=positive,
    )


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole training job. Relative paths are relative to the recipe file."""

    model: ModelOptions = option("the pretrained model (section below)")
    data: tuple[DomainOptions, ...] = option("the domains to learn, a list (fields of one domain below)")
    old_data: tuple[DomainOptions, ...] = option(
        "with --grow: texts of what was learned before, a list like `data`. None of them is learned: an old adapter "
        "without domain statistics gets them from these texts, and the loss on the held-out ones is measured before "
        "and after",
        default_factory=tuple,
    )
    start_from: str = option(
        "with --grow, where new experts begin: new (they contribute nothing yet), nearest (as copies of the experts of "
        "the adapter that alone has the least loss on the first new texts, new where the base model has less), or the "
        "name of an adapter",
        default="new",
        check=not_empty,
    )
    block_size: int = option(
        "longest piece of a document, in tokens, that is learned at once", default=512, check=at_least(2)
    )
    max_eval_blocks: int | None = option(
        "most held-out blocks per domain to measure the loss on; all by default", default=None, check=at_least(1)
    )
    mixture: dict[str, Any] = option("any field of `MoELoraConfig` (section below)", default_factory=dict)
    training: dict[str, Any] = option(
        "any field of transformers' `TrainingArguments`; `output_dir` is required and receives the adapter, "
        "run.json and the checkpoints"
    )
    seed: int = option("seed of the initial weights, the mixing and the order of the blocks", default=42, check=a_seed)
    references: bool = option(
        "write references.json beside the adapter: token ids of a few held-out texts, by which `moelora verify` tells "
        "whether the adapter does elsewhere what it did here",
        default=True,
    )

    @property
    def output_dir(self) -> Path:
        return Path(self.training["output_dir"])

    def as_dict(self) -> dict[str, Any]:
        """The recipe with every default filled in and every path absolute, as run.json keeps it."""
        return dataclasses.asdict(self)
