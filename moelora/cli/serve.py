"""`moelora serve`: adapters over OpenAI's API, by vLLM or by transformers' own server."""

from __future__ import annotations

import os
import shlex
import socket
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import torch

from ..console import make_stdout, printable
from ..files.opening import expand_user
from ..recipe import ModelOptions
from ..schema import Problem, UserError, refuse
from ..serving import transformers_server
from ..serving.adapters import ServedAdapter, read_served_adapter
from ..serving.vllm_command import find_vllm, vllm_command
from ..storage.base_model import load_config, resolve_dtype
from ..storage.finding import find_base
from .option_fields import check_options, whole_path
from .options import ServeOptions
from .process import flush_output

_CONTINUOUS = (
    "With continuous batching, transformers ignores `stop`, takes temperature and the like from the first request for "
    "all that follow, and serves one model at a time."
)


def serve(options: ServeOptions) -> None:
    """Check everything, say what runs, and serve until the process is told to end."""
    refuse([*check_options(options), *_check_arguments(options.engine_arguments)])
    folders = _names(options)
    vllm = _engine(options.engine)
    if vllm is None:
        transformers_server.check_packages()
    base = _common_base(list(folders.values()), options.base)
    if base.name in folders:
        raise UserError(f"an adapter has the name of the base model, {base.name!r}: give it another, as NAME=FOLDER")
    adapters = [read_served_adapter(name, folder, base) for name, folder in folders.items()]
    _check_port(options.host, options.port)
    if vllm is None:
        _serve_with_transformers(options, base, folders)
    else:
        _become_vllm(vllm, options, base, adapters)


def _names(options: ServeOptions) -> dict[str, Path]:
    """The adapters' folders by the names that clients ask for."""
    folders: dict[str, Path] = {}
    if options.name is not None and len(options.adapters) > 1:
        raise UserError(f"--name {options.name!r} goes with one adapter; name several as NAME=FOLDER")
    for text in options.adapters:
        given, _, path = text.partition("=")
        if not path or expand_user(text).is_dir():
            given, path = "", text
        folder = whole_path(path)
        name = options.name or given or folder.name
        if name in folders:
            raise UserError(f"two adapters are named {name!r}; name them as NAME=FOLDER")
        folders[name] = folder
    return folders


def _engine(wanted: str) -> str | None:
    """vLLM's program, or None for transformers."""
    vllm = None if wanted == "transformers" else find_vllm()
    if wanted == "vllm" and vllm is None:
        raise UserError(
            '--engine vllm: there is no `vllm` command; pip install "moelora[vllm]", or give `--engine transformers`'
        )
    return vllm


def _common_base(folders: Sequence[Path], given: str | None) -> ModelOptions:
    bases = [find_base(folder, given) for folder in folders]
    for folder, base in zip(folders, bases, strict=True):
        if (base.name, base.gguf_file) != (bases[0].name, bases[0].gguf_file):
            raise UserError(
                f"the adapters have two base models: {folders[0]} was made for {bases[0].name}, {folder} for "
                f"{base.name}; serve them apart, or give the base model of all with --base"
            )
    return bases[0]


_OURS = {
    "--host": "is an option of `moelora serve` itself: give it before the `--`",
    "--port": "is an option of `moelora serve` itself: give it before the `--`",
    "--lora-modules": "would take the place of the adapters: give NAME=FOLDER before the `--`",  # vLLM takes the last
}


def _check_arguments(arguments: Sequence[str]) -> list[Problem]:
    flags = [(argument, argument.partition("=")[0].replace("_", "-")) for argument in arguments]
    return [Problem("--", argument, _OURS[flag]) for argument, flag in flags if flag in _OURS]


def _check_port(host: str, port: int) -> None:
    """Refuse an address that cannot be listened on, before anything takes time."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with closing(socket.socket(family, kind)) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do
            probe.bind(address)
    except OSError as error:
        raise UserError(f"cannot listen on {host}, port {port}: {error.strerror}; give --host or --port") from error


def _become_vllm(vllm: str, options: ServeOptions, base: ModelOptions, adapters: Sequence[ServedAdapter]) -> None:
    """Replace this process, so that signals and the exit status are vLLM's own."""
    command = vllm_command(
        vllm,
        base,
        adapters,
        host=options.host,
        port=options.port,
        arguments=options.engine_arguments,
        cpu_dtype=None if torch.accelerator.is_available() else _dtype_of(base),
    )
    make_stdout().print(printable(shlex.join(["vllm", *command[1:]])), soft_wrap=True)
    flush_output()
    os.execv(vllm, command)


def _dtype_of(base: ModelOptions) -> str:
    return str(getattr(load_config(base), "dtype", None) or torch.float32).removeprefix("torch.")


def _serve_with_transformers(options: ServeOptions, base: ModelOptions, folders: dict[str, Path]) -> None:
    if "@" in base.name:
        raise UserError(f"transformers' server takes what follows the @ of {base.name!r} for a revision: rename it")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ours = ["--device", str(device), "--dtype", str(resolve_dtype(base, device)).removeprefix("torch.")]
    settings = transformers_server.server_options([*ours, *options.engine_arguments])
    names = ", ".join(printable(name) for name in (base.name, *folders))
    stdout = make_stdout()
    if settings["continuous_batching"]:
        stdout.print(_CONTINUOUS, soft_wrap=True)
    stdout.print(f"Loading for transformers' server: {names}", soft_wrap=True)
    server = transformers_server.Server(base, folders, options.host, options.port, settings)
    try:
        stdout.print(f"Serving on http://{printable(options.host)}:{options.port}/v1; Ctrl-C ends it", soft_wrap=True)
        flush_output()
        server.wait()
    finally:
        server.close()
    raise UserError(f"the server on port {options.port} has ended by itself; what it printed says why")
