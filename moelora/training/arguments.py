"""The Trainer's arguments, with one GPU for a process."""

from typing import Any

from transformers import TrainingArguments

from .progress import console


def training_arguments(**fields: Any) -> TrainingArguments:
    """TrainingArguments with these fields; of several visible GPUs a process that was not launched takes the first.

    The Trainer would copy the model to all of them in threads (nn.DataParallel), which a mixture refuses.
    """
    arguments = TrainingArguments(**fields)
    if arguments.n_gpu > 1:
        console.print(f"Training on one of {arguments.n_gpu} GPUs; `accelerate launch -m moelora …` uses them all")
        arguments._n_gpu = 1
    return arguments
