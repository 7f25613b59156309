"""`moelora build`: a mixture from nothing but LoRAs that exist already."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from ..data.sources import load_documents
from ..experts.importing import MIXTURES, build, check_examples, check_fits, check_names
from ..experts.migration import Migration, experts_of
from ..recipe import DomainOptions, ModelOptions
from ..schema import Problem, UserError, refuse, telling_user
from ..storage.base_model import check_model, empty_model, load_config, load_model, load_tokenizer
from ..storage.finding import base_options
from ..storage.lora_file import LoraFile, read_lora
from ..training.router_training import RouterTraining, train_router
from .operation import Plan, carry_out, check_only_read, check_output, shown
from .option_fields import read_pairs
from .options import BuildOptions
from .report import read_domains


def build_command(options: BuildOptions) -> Path | None:
    """Check everything, print the plan, build the mixture and write it."""
    given, texts, data = _check(options)
    taken = _experts(options, given)
    loras = taken.experts
    base = _base(options, loras)
    config = load_config(base)
    taken.check_base(config)
    _check_fit(loras, config, options)
    check_only_read(options, [], None, [*texts.values(), *data])
    plan = _plan(options, loras, base, taken.lost)

    def work(folder: Path) -> dict[str, Any] | None:
        with telling_user():
            losses = _build(options, loras, base, texts, data, folder)
        return losses

    read = [options.migrate] if options.migrate is not None else [lora.source for lora in loras.values()]
    return carry_out(options, plan, work, inputs=read, base=base)


def _build(
    options: BuildOptions,
    loras: Mapping[str, LoraFile],
    base: ModelOptions,
    texts: Mapping[str, DomainOptions],
    data: list[DomainOptions],
    folder: Path,
) -> dict[str, Any] | None:
    """Build the mixture and write it; the losses by domain where its routers were trained."""
    tokenizer = load_tokenizer(base)
    examples = {name: load_documents(found, found.path, found.split)["document"][:] for name, found in texts.items()}
    check_examples(tokenizer, examples)  # before the model is loaded
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build(
        load_model(base, device).to(device),
        loras,
        options.router,
        top_k=options.top_k,
        temperature=options.temperature,
        examples=examples,
        tokenizer=tokenizer,
    )
    training = RouterTraining(steps=options.steps, learning_rate=options.learning_rate, seed=options.seed)
    losses = train_router(model, tokenizer, data, training) if options.router == "train" else None
    model.save_pretrained(str(folder))
    return losses


# ---- checks ----------------------------------------------------------------------------------------------------------


def _check(options: BuildOptions) -> tuple[dict[str, str], dict[str, DomainOptions], list[DomainOptions]]:
    """The experts, the example texts and the training data as given, once all options are in order."""
    given, problems = read_pairs(options.expert, "--expert", "NAME=PATH, such as code=loras/code", "experts")
    if bool(options.expert) == (options.migrate is not None):
        fix = "give the LoRAs: --expert NAME=PATH, once each; or one checkpoint with --migrate"
        problems.append(Problem("--expert", options.expert, fix))
    texts, found = read_domains(options.examples, "--examples")
    data, more = read_domains(options.data, "--data")
    problems += [*found, *more]
    for flag, router, files in (("--examples", "prototype", options.examples), ("--data", "train", options.data)):
        if bool(files) != (options.router == router):
            fix = f"--router {router} needs it, and nothing else does"
            problems.append(Problem(flag, files, fix))
    check_output(options, problems)
    return given, {domain.name: domain for domain in texts}, data


def _experts(options: BuildOptions, given: Mapping[str, str]) -> Migration:
    if options.migrate is not None:
        return experts_of(options.migrate)
    check_names(given)
    return Migration({name: read_lora(path) for name, path in given.items()}, [])


def _base(options: BuildOptions, loras: Mapping[str, LoraFile]) -> ModelOptions:
    """The base model asked for, else the one that all LoRAs note."""
    if options.base is not None:
        base = base_options(options.base)
    else:
        noted = {name: lora.config.base_model_name_or_path or "" for name, lora in loras.items()}
        if len(set(noted.values())) > 1:
            listed = "; ".join(f"{name}: {base or 'none'}" for name, base in noted.items())
            raise UserError(f"the LoRAs note different base models ({listed}); say with --base which it is")
        base = ModelOptions(name=next(iter(noted.values())))
        if not base.name:
            raise UserError("the LoRAs note no base model; give the one they were trained on with --base")
    refuse(check_model(base, None, None), "no base model; give one with --base")
    return base


def _check_fit(loras: Mapping[str, LoraFile], config: PretrainedConfig, options: BuildOptions) -> None:
    empty = empty_model(config)
    check_names(loras, empty)
    for lora in loras.values():
        check_fits(lora, empty)
    if options.top_k is not None and options.top_k > len(loras):
        raise UserError(f"--top-k {options.top_k}: there are only {len(loras)} experts; lower it")
    wanted = {text.partition("=")[0] for text in options.examples}
    if options.router == "prototype" and wanted != set(loras):
        raise UserError(
            f"--examples: the experts are {', '.join(loras)}, and there are texts for {', '.join(sorted(wanted))}; "
            "give texts for every expert, by its name"
        )


# ---- plan ------------------------------------------------------------------------------------------------------------


def _plan(options: BuildOptions, loras: Mapping[str, LoraFile], base: ModelOptions, lost: list[str]) -> Plan:
    rows = []
    for name, lora in loras.items():
        size = sum(A.numel() + B.numel() for A, B in lora.factors.values())
        ranks = " ".join(map(str, lora.ranks))
        alpha = f"{lora.config.lora_alpha}" + (" rslora" if lora.config.use_rslora else "")
        rows.append((name, ranks, alpha, str(len(lora.factors)), f"{size:,}", lora.source))
    mixture = MIXTURES[options.router]
    top_k = len(loras) if options.router == "uniform" else options.top_k or min(2, len(loras))
    notes = [f"Base model: {shown(Path(base.name))}"]
    for name, lora in loras.items():
        noted = lora.config.base_model_name_or_path
        if noted and Path(noted).name != Path(base.name).name:
            notes.append(f"{name} notes another base model, {noted}; its linears fit this one.")
    scope = {"module": "each linear", "block": "each block", "model": "the whole model"}[mixture["router_scope"]]
    notes.append(f"Router: {options.router}, one for {scope}; {top_k} of {len(loras)} experts per token.")
    head = ("expert", "r", "alpha", "linears", "parameters", "from")
    return Plan(f"A mixture of {len(loras)} LoRAs in {shown(options.out_folder)}", head, rows, notes + lost)
