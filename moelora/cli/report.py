"""`moelora report`: check everything, then load the model, measure, and write the page whole or not at all."""

from __future__ import annotations

import codecs
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..console import console, printable
from ..data.preparation import split_documents
from ..data.sources import check_domain, load_documents, paths_read, resolve_path
from ..data.texts import Domain, read_domain
from ..files.opening import expand_user, real_path
from ..recipe import DomainOptions, ModelOptions, plain_name
from ..report.analysis import longest_block, run
from ..report.history import read_history
from ..report.page import About, render
from ..schema import Problem, refuse, telling_user
from ..storage.base_model import load_config, load_tokenizer
from ..storage.finding import find_base, load_mixture, tell_loading
from ..storage.mixture_files import check_fit, read_mixture
from ..storage.run_record import learned_domains, may_write, record_of, replacing
from .option_fields import check_options, read_pairs
from .options import ReportOptions

PERMUTATIONS = 500
HEAD_BYTES = 1024  # by which a page is known: space may stand before its first tag


def report(options: ReportOptions) -> Path:
    """Write a report and return where it is."""
    out = expand_user(options.out)
    domains = _check(options, out)
    adapter = expand_user(options.adapter)
    stored = read_mixture(adapter)
    base = find_base(adapter, options.base)
    check_fit(stored, base, adapter)
    tell_loading(base, adapter)
    tokenizer = load_tokenizer(base)
    model = load_mixture(base, adapter)
    texts = read_texts(domains, learned_domains(adapter), tokenizer, options.max_tokens)
    size = block_size_of(adapter, base)
    with telling_user():
        found = run(model, texts, tokenizer, size, options.worth_tokens, PERMUTATIONS, read_history(adapter))
    config = stored[0].config
    routing = f"{config.router_type}, per {config.router_scope}"
    page = render(found, About(_shown(adapter), _shown(Path(base.name)), routing), PERMUTATIONS)
    with replacing(out) as stream:
        stream.write(page)
    console.print(f"Report: {printable(out)} ({len(page) / 1e6:.1f} MB)", soft_wrap=True)
    return out


def _shown(path: Path) -> str:
    """A place as the page names it, to be shared: without what is above the folder one works in."""
    if not path.is_absolute():
        return str(path)
    inside = path.is_relative_to(Path.cwd())
    return str(path.relative_to(Path.cwd())) if inside else path.name


# ---- checks ----------------------------------------------------------------------------------------------------------


def _check(options: ReportOptions, out: Path) -> list[DomainOptions]:
    """The domains asked for, once all options are in order; every problem is told at once."""
    problems = check_options(options) + _check_out(out)
    domains, found = check_data(options.data)
    problems += found
    if real_path(out) in (real_path(path) for path in paths_read(domains)):
        problems.append(Problem("--out", str(out), "is one of the texts, which are only read; give another file"))
    refuse(problems)
    return domains


def _check_out(out: Path) -> list[Problem]:
    if out.is_dir():
        return [Problem("--out", str(out), "is a folder; give a file, such as report.html")]
    if not out.parent.is_dir():
        return [Problem("--out", str(out), f"the folder {out.parent} does not exist; make it first")]
    if not may_write(out.parent) or (out.exists() and not os.access(out, os.W_OK)):
        return [Problem("--out", str(out), "may not be written to; give another place")]
    if out.exists() and not _is_page(out):
        fix = "exists and is no HTML page, such as a report is; give another file, or move this one away"
        return [Problem("--out", str(out), fix)]
    return []


def _is_page(path: Path) -> bool:
    """Whether replacing a file loses a page at most: an empty file is nobody's work, a pipe or a device no file."""
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        start = stream.read(HEAD_BYTES)
    return not start or start.removeprefix(codecs.BOM_UTF8).lstrip().lower().startswith((b"<!doctype html", b"<html"))


def check_data(data: list[str], flag: str = "--data") -> tuple[list[DomainOptions], list[Problem]]:
    """[`read_domains`] where there has to be one."""
    domains, problems = read_domains(data, flag)
    return domains, problems if data else [Problem(flag, data, f"give texts: {flag} NAME=FILE, once per domain")]


def read_domains(given: list[str], flag: str = "--data") -> tuple[list[DomainOptions], list[Problem]]:
    """Options of the form NAME=FILE. Every file is read once, so that a bad one is told before a model is loaded."""
    pairs, problems = read_pairs(given, flag, "NAME=FILE, such as code=code.jsonl", "domains")
    domains = []
    for name, path in pairs.items():
        if fix := plain_name(name):
            problems.append(Problem(flag, f"{name}={path}", fix))
            continue
        domain = DomainOptions(name=name, path=resolve_path(path, Path.cwd()))
        found = check_domain(domain, f"{flag} {name}")
        problems += [replace(problem, key=problem.key.removesuffix(".path")) for problem in found]
        domains.append(domain)
    return domains, problems


# ---- texts -----------------------------------------------------------------------------------------------------------


def block_size_of(adapter: Path, base: ModelOptions) -> int:
    """Most tokens to read at once: as many as in training, if that is known."""
    record = record_of(adapter)
    return record["recipe"]["block_size"] if record else longest_block(load_config(base))


def read_texts(
    domains: Sequence[DomainOptions],
    learned: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
) -> list[Domain]:
    """Every domain's documents as tokens, at most max_tokens of each; see [`documents_of`]."""
    documents = ((domain.name, *documents_of(domain, learned)) for domain in domains)
    return [read_domain(name, found, tokenizer, max_tokens, held_out) for name, found, held_out in documents]


def documents_of(domain: DomainOptions, learned: Sequence[Mapping[str, Any]]) -> tuple[list[Any], bool]:
    """A domain's documents, and whether they are known not to have been trained on.

    Of a file that the adapter learned from, only what was held out: the loss on the rest would flatter the experts.

    Args:
        learned: what the adapter was trained on, from `learned_domains`.
    """
    for settings in (DomainOptions(**each) for each in learned):
        if settings.path == domain.path:
            return split_documents(settings)[1]["document"][:], True
        if settings.eval_path == domain.path:
            return load_documents(settings, domain.path, domain.split)["document"][:], True
    return load_documents(domain, domain.path, domain.split)["document"][:], False
