"""What a training recipe says: one dataclass per section, each field with its help text and the rule its value obeys.

Reading a recipe file and checking it is `load.py`.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .schema import a_seed, about, at_least, between_0_and_1, not_empty, one_of, positive

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

    name: str = field(
        metadata=about(
            "folder of a pretrained causal language model, or its id on the Hugging Face hub", check=not_empty
        )
    )
    gguf_file: str | None = field(
        default=None, metadata=about("name of the GGUF file to read inside that folder or repository")
    )
    dtype: str = field(
        default="auto",
        metadata=about(
            "precision of the frozen weights: float32, bfloat16, float16, or auto (bfloat16 on a GPU, else float32)",
            check=one_of("auto", "float32", "bfloat16", "float16"),
        ),
    )


@dataclass(frozen=True, kw_only=True)
class DomainOptions:
    """One named kind of text. Held-out documents are chosen by a hash of their content, never within a document."""

    name: str = field(metadata=about("name of the domain in tables and in run.json", check=plain_name))
    path: str = field(
        metadata=about(
            "a .jsonl file, a text file (one document), a pattern such as books/*.txt, "
            "or what `datasets` reads: a folder or a hub id",
            check=not_empty,
        )
    )
    subset: str | None = field(
        default=None, metadata=about("configuration of a `datasets` hub id, where it has several")
    )
    split: str = field(default="train", metadata=about("split of a `datasets` path to train on"))
    text_field: str = field(default="text", metadata=about("field of a JSONL line or dataset row that holds the text"))
    messages_field: str | None = field(
        default=None,
        metadata=about(
            "field that holds a conversation (a list of {role, content}) to be written out with the model's chat "
            "template; used in place of `text_field`, and every token of it is learned"
        ),
    )
    separator: str | None = field(
        default=None,
        metadata=about(
            'text between the documents of a text file, such as "\\n\\n"; by default a file is one document'
        ),
    )
    eval_path: str | None = field(
        default=None,
        metadata=about("held-out documents in place of a share of `path`; same forms as `path`", check=not_empty),
    )
    eval_split: str | None = field(
        default=None, metadata=about("held-out split of a `datasets` path in place of a share of `split`")
    )
    eval_fraction: float = field(
        default=0.1, metadata=about("share of the documents to hold out", check=between_0_and_1)
    )
    weight: float = field(
        default=1.0,
        metadata=about(
            "how often training draws a block from this domain, relative to the other domains' weights",
            check=positive,
        ),
    )


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole training job. Relative paths are relative to the recipe file."""

    model: ModelOptions = field(metadata=about("the pretrained model (section below)"))
    data: tuple[DomainOptions, ...] = field(metadata=about("the domains to learn, a list (fields of one domain below)"))
    block_size: int = field(
        default=512,
        metadata=about("longest piece of a document, in tokens, that is learned at once", check=at_least(2)),
    )
    max_eval_blocks: int | None = field(
        default=None,
        metadata=about("most held-out blocks per domain to measure the loss on; all by default", check=at_least(1)),
    )
    mixture: dict[str, Any] = field(
        default_factory=dict, metadata=about("any field of `MoELoraConfig` (section below)")
    )
    training: dict[str, Any] = field(
        metadata=about(
            "any field of transformers' `TrainingArguments`; `output_dir` is required and receives the adapter, "
            "run.json and the checkpoints"
        )
    )
    seed: int = field(
        default=42,
        metadata=about("seed of the initial weights, the mixing and the order of the blocks", check=a_seed),
    )

    @property
    def output_dir(self) -> Path:
        return Path(self.training["output_dir"])

    def as_dict(self) -> dict[str, Any]:
        """The recipe with every default filled in and every path absolute, as run.json keeps it."""
        return dataclasses.asdict(self)
