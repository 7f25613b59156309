"""`moelora generate`: continue a prompt with a trained adapter."""

import sys

import torch
from peft import PeftModel, get_peft_model_state_dict
from transformers import PreTrainedTokenizerBase, TextStreamer, set_seed

from ..console import naming_output, printable
from ..data.chat import apply_template
from ..files.opening import expand_user
from ..schema import UserError, refuse
from ..storage.base_model import load_tokenizer
from ..storage.finding import find_base, load_mixture, tell_loading
from .option_fields import check_options
from .options import GenerateOptions


def generate(options: GenerateOptions) -> str:
    """Print the continuation of a prompt to standard output as it is made, and return the whole text."""
    refuse(check_options(options))
    adapter = expand_user(options.adapter)
    base = find_base(adapter, options.base)
    tell_loading(base, adapter)
    tokenizer = load_tokenizer(base)
    inputs = _encode(tokenizer, options)
    model = load_mixture(base, adapter)
    if bad := _not_finite(model):
        raise UserError(f"the adapter {adapter}: {bad} is not finite: its training diverged; give another adapter")
    set_seed(options.seed)
    sampling = {"do_sample": True, "temperature": options.temperature} if options.temperature else {"do_sample": False}
    with torch.no_grad():
        output = model.generate(
            **inputs.to(model.device),
            **sampling,
            max_new_tokens=options.max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            streamer=_Printer(tokenizer, skip_prompt=options.chat, skip_special_tokens=True),
        )
    return tokenizer.decode(output[0], skip_special_tokens=True)


class _Printer(TextStreamer):
    """Prints text as the model makes it: exactly, unless a terminal would obey some of it."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """See TextStreamer."""
        at_terminal = sys.stdout is not None and sys.stdout.isatty()
        with naming_output("standard output"):
            super().on_finalized_text(printable(text, lines=True) if at_terminal else text, stream_end)


def _not_finite(model: PeftModel) -> str | None:
    """The first tensor of the adapters that holds what is no finite number."""
    for name in model.peft_config:
        # Left to itself PEFT asks the hub whether the embeddings were changed.
        tensors = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
        if bad := next((key for key, tensor in tensors.items() if not tensor.isfinite().all()), None):
            return f"{bad} of {name}"
    return None


def _encode(tokenizer: PreTrainedTokenizerBase, options: GenerateOptions):
    if not options.chat:
        if not tokenizer(options.prompt)["input_ids"]:
            raise UserError(f"--prompt = {options.prompt!r}\n    has no token to continue from; give some text")
        return tokenizer(options.prompt, return_tensors="pt")
    if not tokenizer.chat_template:
        raise UserError("--chat: the model has no chat template; leave the flag out")
    turns = [{"role": "user", "content": options.prompt}]
    return apply_template(tokenizer, turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
