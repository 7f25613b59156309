"""transformers' own server (`transformers serve`) with our models: only what it loads is different.

Base model and adapters are served under their names, each by a model of its own; all share the base's weights.
Names of transformers that are relied on: `cli.serve.Serve`, `cli.serving.model_manager.ModelManager`, its methods that
are overridden here, and where `Serve` keeps that manager, its threads and uvicorn's server.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers.utils.import_utils import is_serve_available

from ..recipe import ModelOptions
from ..schema import UserError
from ..storage.base_model import load_tokenizer
from ..storage.finding import put_adapter

OURS = ("force_model", "host", "port", "model_timeout", "non_blocking")
"""Options of `transformers serve` that are set here."""
_LONGEST_STOP = 10.0  # seconds that a token under way is given to end


def check_packages() -> None:
    """Raise UserError where packages are missing that the server needs."""
    if not is_serve_available():
        raise UserError(
            "transformers' server needs packages that are not installed (fastapi, uvicorn, openai, pydantic): "
            'pip install "moelora[serve]"'
        )


def server_options(arguments: Sequence[str]) -> dict[str, Any]:
    """Options of `transformers serve` by their names, all of them.

    Raises:
        UserError: there is no such option, its value cannot be, or it is one that `moelora serve` sets itself.
    """
    import typer
    from transformers.cli.serve import Serve
    from typer.core import TyperCommand
    from typer.main import get_command

    app = typer.Typer(add_completion=False)
    app.command()(Serve)
    command = get_command(app)
    assert isinstance(command, TyperCommand)
    try:
        context = command.make_context("transformers serve", list(arguments))
    except Exception as error:  # typer has a click of its own, whose errors have no public name
        if not hasattr(error, "format_message"):
            raise
        raise UserError(f"transformers serve: {error.format_message()}") from error
    for name in OURS:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise UserError(f"`{name}` is set by `moelora serve`: give it before the `--`, or leave it out")
    return dict(context.params)


class Server:
    """The server, which runs in threads until it is closed.

    Args:
        base: the base model, and the name that clients ask for it by.
        adapters: folders by the names that clients ask for.
        options: of `transformers serve`.

    Raises:
        UserError: an adapter does not load onto the base model.
    """

    def __init__(
        self, base: ModelOptions, adapters: Mapping[str, Path], host: str, port: int, options: Mapping[str, Any]
    ) -> None:
        from transformers.cli.serve import Serve

        ours = {"host": host, "port": port, "model_timeout": -1, "non_blocking": True}
        with _loading(base, adapters):
            self._serve: Any = Serve(**(dict(options) | ours))

    def wait(self) -> None:
        """Return when the server has ended by itself."""
        while self._serve._thread.is_alive():  # a join that Ctrl-C interrupts takes the thread for ended (bpo-45274)
            time.sleep(0.2)

    def close(self) -> None:
        """End it; requests under way are answered that it ends, before their next token."""
        for timed in self._serve._model_manager.loaded_models.values():
            _innermost(timed.model).register_forward_pre_hook(_refuse)
        # A thread that computes while Python ends would abort the process.
        for manager in self._serve._generation_state._generate_managers.values():
            with suppress(TimeoutError):
                manager.submit(lambda: None).result(_LONGEST_STOP)
        self._serve.kill_server()
        self._serve.server.force_exit = True
        self._serve._thread.join(_LONGEST_STOP)


def _innermost(model: Any) -> Any:
    """The model of transformers, whose forward `generate` calls."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _refuse(model: Any, arguments: tuple) -> None:
    from fastapi import HTTPException

    raise HTTPException(503, detail="the server ends")


@contextmanager
def _loading(base: ModelOptions, adapters: Mapping[str, Path]) -> Iterator[None]:
    """Within, a server that is made loads these models and knows no others: it makes its manager by that name."""
    from transformers.cli.serving import model_manager

    before: Any = model_manager.ModelManager
    vars(model_manager)["ModelManager"] = _manager_of(base, adapters)
    try:
        yield
    finally:
        vars(model_manager)["ModelManager"] = before


def _manager_of(base: ModelOptions, adapters: Mapping[str, Path]) -> type:
    from fastapi import HTTPException
    from transformers.cli.serving import model_manager

    class Models(model_manager.ModelManager):
        """Loads all models at once, keeps them, and refuses names that are none of theirs."""

        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self.names = {self.process_model_name(name): name for name in (base.name, *adapters)}
            name = self.process_model_name(base.name)
            self._base: Any = super()._load_model(name, gguf_file=base.gguf_file).eval()
            self._tokenizer = load_tokenizer(base)
            for key in self.names:
                self.load_model_and_processor(key)
            self._base = None  # its copies hold the weights

        def load_model_and_processor(self, model_id_and_revision: str, *arguments: Any, **options: Any) -> Any:
            """See transformers; HTTP status 404 for a model that is not served."""
            if model_id_and_revision not in self.names:
                asked = model_id_and_revision.removesuffix("@main")
                there = ", ".join(self.names.values())
                raise HTTPException(404, detail=f"no model {asked!r} is served here; there are {there}")
            return super().load_model_and_processor(model_id_and_revision, *arguments, **options)

        def _load_model(self, model_id_and_revision: str, *arguments: Any, **options: Any) -> Any:
            model = sharing_weights(self._base)
            folder = adapters.get(self.names[model_id_and_revision])
            return model if folder is None else put_adapter(model, base, folder)

        def _load_processor(self, *arguments: Any, **options: Any) -> Any:
            return self._tokenizer

        def list_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:
            """The models that are served, as OpenAI's API lists them."""
            return [
                {"id": name, "object": "model", "owned_by": "moelora", "created": 0} for name in self.names.values()
            ]

        get_gen_models = list_models  # its name before transformers 5.24

    return Models


def sharing_weights(model: Any) -> Any:
    """A copy of a model's modules with the same weights, not copies of them."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
