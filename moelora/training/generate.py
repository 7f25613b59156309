"""Continue a prompt with a trained adapter."""

import sys
from pathlib import Path

import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftModel, get_peft_model_state_dict
from transformers import PreTrainedTokenizerBase, TextStreamer, set_seed

from ..files import expand_user
from ..options import GenerateOptions, check_options
from ..storage.adapter_files import Place, read_config
from .base import check_model, load_model, load_tokenizer
from .chat import apply_template
from .progress import console, naming_output, printable
from .recipe import ModelOptions
from .record import noted_base
from .schema import UserError
from .sources import resolve_path


def generate(options: GenerateOptions) -> str:
    """Print the continuation of a prompt to standard output as it is made, and return the whole text.

    Raises:
        UserError: an option is out of range, there is no adapter, no base model, or the two do not fit each other.
    """
    if problems := check_options(options):
        raise UserError("\n".join(map(str, problems)))
    adapter = expand_user(options.adapter)
    base = find_base(adapter, options.base)
    tell_loading(base, adapter)
    tokenizer = load_tokenizer(base)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    inputs = _encode(tokenizer, options).to(device)
    model = load_mixture(base, adapter, device)
    if bad := _not_finite(model):
        raise UserError(f"the adapter {adapter}: {bad} is not finite: its training diverged; give another adapter")
    set_seed(options.seed)
    sampling = {"do_sample": True, "temperature": options.temperature} if options.temperature else {"do_sample": False}
    with torch.no_grad():
        output = model.generate(
            **inputs,
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


def find_base(adapter: Path, base: str | None) -> ModelOptions:
    """The base model of an adapter: the one asked for, else the one its run used, else the one PEFT noted.

    Raises:
        UserError: there is no adapter in the folder, its configuration is damaged, or it has no usable base model.
    """
    if not (adapter / "adapter_config.json").is_file():
        raise UserError(missing_adapter(adapter))
    if base is not None:
        model = base_options(base)
    else:
        noted = noted_base(adapter)
        try:
            name = read_config(Place(str(adapter))).get("base_model_name_or_path")
        except ValueError as error:
            raise UserError(str(error)) from error
        model = ModelOptions(**noted) if noted else ModelOptions(name=name if isinstance(name, str) else "")
    problems = check_model(model, None, None)
    if problems:
        raise UserError(
            "\n".join([f"no base model for the adapter {adapter}; give one with --base", *map(str, problems)])
        )
    return model


def base_options(base: str) -> ModelOptions:
    """What --base names: a folder, a .gguf file or a hub id."""
    path = Path(resolve_path(base, Path.cwd()))
    is_file = path.suffix == ".gguf"
    return ModelOptions(name=str(path.parent if is_file else path), gguf_file=path.name if is_file else None)


def missing_adapter(adapter: Path) -> str:
    """What to say of a folder without an adapter."""
    if not adapter.is_dir():
        return f"the adapter {adapter}: no such folder; give the `output_dir` of a finished run"
    inside = sorted(path.parent for path in adapter.glob("*/adapter_config.json"))
    hint = f"try {inside[-1]}" if inside else "give the `output_dir` of a finished run"
    return f"the adapter {adapter}: no adapter_config.json in this folder; {hint}"


def tell_loading(base: ModelOptions, adapter: Path) -> None:
    """Say what takes a while now."""
    console.print(f"Loading {printable(base.name)} with the adapter {printable(adapter)}", soft_wrap=True)


def load_mixture(base: ModelOptions, adapter: Path, device: torch.device) -> PeftModel:
    """The base model with its adapter, on the device, in evaluation mode.

    Raises:
        UserError: the adapter is damaged or belongs to another model.
    """
    if (kind := read_config(Place(str(adapter))).get("peft_type")) not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise UserError(f"the adapter {adapter}: `peft_type` is {kind!r}, which PEFT does not know; give another one")
    try:
        model = PeftModel.from_pretrained(load_model(base, device), str(adapter))
    except (ValueError, RuntimeError, OSError) as error:
        raise UserError(f"the adapter {adapter} does not load onto {base.name}: {error}") from error
    model.to(device).eval()
    _try_attached_router(model, adapter)
    return model


def _try_attached_router(model: PeftModel, adapter: Path) -> None:
    """Run one token through an attached router: only a forward tells whether it fits this base model.

    Raises:
        UserError: it does not, or it is the user's code, which a command does not have.
    """
    routing = getattr(model.base_model, "routing", None)  # plain LoRA has none
    if routing is None or routing.attached is None:
        return
    try:
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device))
    except Exception as error:  # whatever its layers raise
        raise UserError(f"the attached router of the adapter {adapter} does not route: {error}") from error


def _encode(tokenizer: PreTrainedTokenizerBase, options: GenerateOptions):
    if not options.chat:
        if not tokenizer(options.prompt)["input_ids"]:
            raise UserError(f"--prompt = {options.prompt!r}\n    has no token to continue from; give some text")
        return tokenizer(options.prompt, return_tensors="pt")
    if not tokenizer.chat_template:
        raise UserError("--chat: the model has no chat template; leave the flag out")
    turns = [{"role": "user", "content": options.prompt}]
    return apply_template(tokenizer, turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
