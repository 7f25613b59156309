"""`moelora verify`: whether an adapter does, in the runtime that serves it, what it did in training."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.table import Table

from ..console import make_stdout, make_table, printable
from ..data.sources import check_domain, load_documents, resolve_path
from ..data.tokens import token_ids
from ..files.adapter_files import Place, read_config
from ..files.opening import expand_user
from ..recipe import DomainOptions, ModelOptions
from ..schema import Problem, UserError, refuse, telling_user
from ..serving.verify.in_transformers import run_beside, run_merged, run_model
from ..serving.verify.in_vllm import check_installed, run_in_vllm
from ..serving.verify.verdict import Computed, Prompts, Status, Verdict, compare, judge
from ..storage.base_model import check_model, load_config, load_tokenizer
from ..storage.finding import base_options, find_base, tell_loading
from ..storage.mixture_files import read_mixture
from ..storage.references import (
    MOST_PROMPTS,
    MOST_TOKENS,
    REFERENCES_FILE,
    References,
    pair_up,
    read_references,
    write_references,
)
from ..storage.run_record import may_write
from .operation import shown
from .option_fields import check_options
from .options import VerifyOptions

TEXTS = (
    "The quick brown fox jumps over the lazy dog, and nobody in the village took any notice of it.",
    "def read_lines(path):\n    with open(path) as stream:\n        return [line.strip() for line in stream]\n",
    "Dear Sir or Madam, thank you for your letter of 3 March. We are sorry for the delay in answering it.",
    "1 + 1 = 2, 2 + 2 = 4, 4 + 4 = 8, 8 + 8 = 16, 16 + 16 = 32",
)
"""Prompts where neither references nor the user name any."""


class VerdictError(UserError):
    """The adapter does not do what it did, or nothing says what that was."""

    def __init__(self, verdict: Verdict, adapter: str) -> None:
        super().__init__(f"{adapter} {verdict.text}")
        self.status = verdict.status.value


@dataclass(frozen=True)
class _Job:
    """What is to be run, once all is in order. is_exact: whether it is to compute just what the references say."""

    adapter: Path
    base: ModelOptions
    prompts: Prompts
    references: References | None
    is_exact: bool


def verify(options: VerifyOptions) -> Computed:
    """Check everything, run the prompts, and print a table and the verdict, or write what was computed.

    Raises:
        UserError: something is wrong with the options or a file.
        VerdictError: the adapter does not do what it did in training, or that is not known.
    """
    job = _prepare(options)
    tell_loading(job.base, job.adapter)
    computed = _run(options, job)
    stdout = make_stdout()
    stdout.print(_table(computed, job.references))
    if options.write:
        _write(computed, job)
        return computed
    verdict = judge(computed, job.references, options.keep, is_exact=job.is_exact)
    if verdict.status is not Status.SAME:
        raise VerdictError(verdict, options.adapter)
    stdout.print(f"{printable(options.adapter)} {verdict.text}", soft_wrap=True)
    return computed


# ---- checks ----------------------------------------------------------------------------------------------------------


def _prepare(options: VerifyOptions) -> _Job:
    domain = _check(options)
    adapter = expand_user(options.adapter)
    base = find_base(adapter, options.base)
    is_routed = _routes_by_token(adapter)
    if is_routed and options.runtime == "merged" and options.model is None:
        raise UserError(
            f"--runtime merged: {adapter} weighs experts differently for each token, so it cannot be merged; serve it "
            "as a mixture, or give a model that comes near to it with --model"
        )
    references = _known(options, adapter)
    base = replace(base, dtype=_dtype(options, base, references))
    prompts = _prompts(base, domain) if references is None else references.token_ids
    _check_prompts(prompts, base, adapter)
    is_exact = references is None or (references.is_exact and not (is_routed and options.model))
    return _Job(adapter, base, prompts, references, is_exact)


def _check(options: VerifyOptions) -> DomainOptions | None:
    """The texts asked for, once all options are in order."""
    problems = check_options(options)
    if options.model is not None and options.runtime != "merged":
        problems.append(Problem("--model", options.model, "goes with --runtime merged"))
    elif options.model is not None:
        problems += [replace(found, key="--model") for found in check_model(base_options(options.model), None, None)]
    if options.write and options.runtime != "transformers":
        fix = "leave it out with --write: references say what transformers computes"
        problems.append(Problem("--runtime", options.runtime, fix))
    if options.runtime == "vllm" and options.device is not None:
        problems.append(Problem("--device", options.device, "leave it out: vLLM takes the GPU if there is one"))
    problems += _device_problems(options.device)
    domain = None
    if options.prompts is not None:
        domain = DomainOptions(name="prompts", path=resolve_path(options.prompts, Path.cwd()))
        problems += [replace(found, key="--prompts") for found in check_domain(domain, "--prompts")]
    refuse(problems)
    if options.runtime == "vllm":
        check_installed()
    return domain


def _device_problems(name: str | None) -> list[Problem]:
    try:
        is_good = torch.empty(0, device=name).device.type != "meta"
    except (RuntimeError, AssertionError):  # torch asserts that it was built for it
        is_good = False
    return [] if is_good else [Problem("--device", name, "no device of this machine's; give cpu or cuda")]


def _known(options: VerifyOptions, adapter: Path) -> References | None:
    """What lies beside the adapter to compare with; None where there is nothing, or it is to be written."""
    if options.write:
        if not may_write(adapter):
            raise UserError(f"--write: {adapter} may not be written to")
        if (adapter / REFERENCES_FILE).exists():
            raise UserError(f"--write: {adapter / REFERENCES_FILE} is there; move it away to have it written anew")
        return None
    references = read_references(adapter)
    if references is not None and options.prompts is not None:
        fix = f"leave it out: {REFERENCES_FILE} in {adapter} names the prompts"
        raise UserError(str(Problem("--prompts", options.prompts, fix)))
    if references is None and options.model is not None:
        raise UserError(f"--model: there is no {REFERENCES_FILE} in {adapter} to compare it with; --write makes one")
    return references


def _dtype(options: VerifyOptions, base: ModelOptions, references: References | None) -> str:
    """The precision asked for, else that of the references, else what the adapter's run had."""
    if options.dtype != "auto" or references is None:
        return base.dtype if options.dtype == "auto" else options.dtype
    return references.dtype


def _prompts(base: ModelOptions, domain: DomainOptions | None) -> list[list[int]]:
    """The starts of texts, from a file or built in, as token ids."""
    texts = TEXTS if domain is None else load_documents(domain, domain.path, domain.split)["document"][:MOST_PROMPTS]
    tokenizer = load_tokenizer(base)
    found = [token_ids(text, tokenizer)[:MOST_TOKENS] for text in texts]
    if not (long_enough := [ids for ids in found if len(ids) > 1]):
        raise UserError("--prompts: no text of two tokens, so there is nothing to predict; give longer texts")
    return long_enough


def _check_prompts(prompts: Prompts, base: ModelOptions, adapter: Path) -> None:
    """Refuse tokens that the base model does not know: looking them up would end the process, or the GPU's work."""
    known = load_config(base).get_text_config().vocab_size
    if strange := [token for ids in prompts for token in ids if token >= known]:
        raise UserError(
            f"{adapter / REFERENCES_FILE}: token {strange[0]} is none of the {known:,} of {base.name}; give the base "
            "model that the adapter was trained on with --base"
        )


def _routes_by_token(adapter: Path) -> bool:
    """Whether it is a mixture that weighs experts differently for each token, which no merged model does."""
    with telling_user():
        config = read_config(Place(str(adapter)))
    if config.get("peft_type") != "MOELORA":
        return False
    return not read_mixture(adapter)[0].config.router_kind.is_constant


# ---- work ------------------------------------------------------------------------------------------------------------


def _run(options: VerifyOptions, job: _Job) -> Computed:
    if options.runtime == "vllm":
        return run_in_vllm(job.base, job.adapter, job.prompts)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if options.model is not None:
        return run_model(job.base, base_options(options.model).name, job.prompts, device)
    run = run_merged if options.runtime == "merged" else run_beside
    return run(job.base, job.adapter, job.prompts, device)


def _table(computed: Computed, references: References | None) -> Table:
    rows = []
    found = compare(computed, references)
    for number, one in enumerate(found):
        is_total = number == len(found) - 1
        tokens = sum(map(len, computed.adapted)) if is_total else len(computed.adapted[number])
        numbers = (one.difference, one.effect, one.trained_effect)
        rows.append(("all" if is_total else str(number), str(tokens), *map(_number, numbers)))
    right = ("tokens", "mean |Δ|", "mean effect", "in training")
    return make_table("Log-probabilities of prompts (nats)", ("prompt",), right, rows, title_justify="left")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"


def _write(computed: Computed, job: _Job) -> None:
    """Keep what the adapter does now as what it should do, unless that is nothing."""
    verdict = judge(computed, None, 0.0)
    if verdict.status is not Status.UNKNOWN:
        raise UserError(f"{job.adapter} {verdict.text}; nothing was written")
    found = pair_up(job.prompts, computed.adapted, computed.base)
    with telling_user():
        write_references(job.adapter, job.base.name, computed.dtype, found)
    place = printable(shown(job.adapter / REFERENCES_FILE))
    make_stdout().print(f"Written: {place}: what the adapter does now is what it should do", soft_wrap=True)
