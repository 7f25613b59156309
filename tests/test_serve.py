"""`moelora serve`: what it checks, the command line of vLLM that it becomes, options of transformers' server."""

import inspect
import json
import os
import shlex
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from loras import save_lora
from tiny import save_tiny_model
from transformers import AutoModelForCausalLM

from moelora.cli.commands import build_parser, main
from moelora.schema import UserError
from moelora.serving.vllm_command import vllm_command

FAKE = """#!{python}
import json, sys
open("called.json", "w").write(json.dumps(sys.argv[1:]))
"""


@pytest.fixture
def folder(adapter_folder, monkeypatch):
    """A base model, a mixture of 4 experts of rank 2 on it, and no vLLM."""
    made = adapter_folder()
    monkeypatch.setenv("PATH", str(made / "bin"))
    monkeypatch.setattr("sys.executable", str(made / "nothing" / "python"))
    return made


@pytest.fixture
def port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def fake_vllm(folder):
    program = folder / "bin" / "vllm"
    program.parent.mkdir()
    program.write_text(FAKE.format(python=os.path.realpath(f"/proc/{os.getpid()}/exe")))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)


def command_of(folder, *words):
    """What vLLM is called with, by a process of its own, for that is replaced."""
    code = "import sys; from moelora.cli.commands import main; sys.exit(main(sys.argv[1:]))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [os.path.realpath(f"/proc/{os.getpid()}/exe"), "-c", code, "serve", *words],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    called = json.loads((folder / "called.json").read_text())
    assert shlex.join(["vllm", *called]) in done.stdout
    return called


def refusal(capsys, *words):
    assert main(["serve", *words]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""  # nothing was begun
    return printed.err


def test_the_command_line_of_vllm(folder, port):
    fake_vllm(folder)
    save_lora(folder / "lora", 0, AutoModelForCausalLM.from_pretrained("model"), r=3, target_modules=["q_proj"])
    words = ["mix=adapter", "lora", "--base", "model", "--port", str(port), "--", "--max-model-len", "64"]
    assert command_of(folder, *words) == [
        "serve", f"{folder}/model", "--enable-lora", "--lora-modules", f"mix={folder}/adapter", f"lora={folder}/lora",
        "--max-lora-rank", "8", "--host", "127.0.0.1", "--port", str(port),
        *(["--dtype", "float32"] if not torch.accelerator.is_available() else []),
        "--max-model-len", "64",
    ]  # fmt: skip


def served(rank, linears=("q_proj",), name="a"):
    from moelora.serving.adapters import ServedAdapter

    return ServedAdapter(name, Path("/adapters") / name, rank, frozenset(linears))


def built(adapters, arguments=(), **options):
    from moelora.recipe import ModelOptions

    model = ModelOptions(name="base", gguf_file=options.pop("gguf_file", None))
    return vllm_command("vllm", model, adapters, host="::", port=9, arguments=arguments, **options)


@pytest.mark.parametrize(("rank", "allowed"), [(1, 1), (2, 8), (9, 16), (129, 256), (257, 320), (321, 512), (512, 512)])
def test_the_smallest_rank_that_vllm_allows(rank, allowed):
    command = built([served(rank), served(1, name="b")])
    assert command[command.index("--max-lora-rank") + 1] == str(allowed)


def test_a_mixture_that_is_too_large_for_vllm():
    with pytest.raises(UserError, match=r"/adapters/a has ranks of 513 in all.*at most 512: prune or merge"):
        built([served(513)])


def test_what_is_given_is_not_set_twice():
    command = built([served(8)], ["--max-lora-rank=64", "--dtype", "float16"], cpu_dtype="float32")
    assert "--max-lora-rank" not in command and command.count("--dtype") == 1
    assert command[-3:] == ["--max-lora-rank=64", "--dtype", "float16"]


@pytest.mark.parametrize("name", ["a,b", "a=b"])
def test_names_that_vllm_would_part_elsewhere(name):
    command = built([served(8, name=name)])
    given = json.loads(command[command.index("--lora-modules") + 1])
    assert given == {"name": name, "path": f"/adapters/{name}"}


def test_a_head_is_refused_on_a_cpu_alone():
    with pytest.raises(UserError, match="adapts lm_head: on a CPU vLLM's engine ends when a client asks"):
        built([served(8, ["lm_head"])], cpu_dtype="float32")
    assert "--lora-modules" in built([served(8, ["lm_head"])])


def test_a_gguf_file_is_not_given_to_vllm():
    with pytest.raises(UserError, match=r"GGUF files such as m\.gguf"):
        built([served(8)], gguf_file="m.gguf")


def test_experts_of_several_adapters_count_together(folder):
    from helpers import mixture_of

    from moelora.recipe import ModelOptions
    from moelora.serving.adapters import read_served_adapter

    model = mixture_of("llama", experts=True, rank_pattern={"q_proj": 5})
    model.get_base_model().save_pretrained("other")
    model.save_pretrained("several")
    found = read_served_adapter("x", Path("several"), ModelOptions(name=str(folder / "other")))
    assert found.rank == 4 * 5 and "q_proj" in found.linears


def test_a_mixture_that_is_switched_off_is_a_plain_lora(folder):
    from helpers import mixture_of

    from moelora.recipe import ModelOptions
    from moelora.serving.adapters import read_served_adapter

    with pytest.warns(UserWarning, match="is plain LoRA"):
        mixture_of("llama", r=3, use_moe_routing=False).save_pretrained("off")
    found = read_served_adapter("x", Path("off"), ModelOptions(name="model"))
    assert found.rank == 3 and "q_proj" in found.linears


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_a_folder_that_is_no_adapter(folder, capsys):
    assert "no adapter_config.json in this folder" in refusal(capsys, "model")
    assert "no such folder" in refusal(capsys, "nowhere")


def test_an_adapter_of_another_kind(folder, capsys):
    path = folder / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"peft_type": "IA3"}))
    assert "`peft_type` is 'IA3'; only mixtures and plain LoRAs can be served" in refusal(capsys, "adapter")


def test_names_that_cannot_be(folder, capsys):
    assert "two adapters are named 'adapter'" in refusal(capsys, "adapter", "./adapter")
    assert "--name 'x' goes with one adapter" in refusal(capsys, "adapter", "b=adapter", "--name", "x")
    assert "has the name of the base model" in refusal(capsys, "adapter", "--name", str(folder / "model"))


@pytest.mark.parametrize("flag", ["--lora-modules", "--lora_modules=b=adapter"])
def test_adapters_that_would_take_the_place_of_others(folder, capsys, flag):
    error = refusal(capsys, "adapter", "--", flag, "b=adapter")
    assert "would take the place of the adapters: give NAME=FOLDER before the `--`" in " ".join(error.split())


def test_adapters_of_two_base_models(folder, capsys):
    other = AutoModelForCausalLM.from_pretrained(save_tiny_model(folder / "other"))
    save_lora(folder / "lora", 0, other, r=2, target_modules=["q_proj"])
    error = refusal(capsys, "adapter", "lora")
    assert "the adapters have two base models" in error and "--base" in error


def test_an_engine_that_is_not_there(folder, capsys):
    assert "--engine vllm: there is no `vllm` command; pip install" in refusal(capsys, "adapter", "--engine", "vllm")
    assert "--engine = 'sglang'" in refusal(capsys, "adapter", "--engine", "sglang")


def test_packages_that_are_not_there(folder, capsys, monkeypatch):
    monkeypatch.setattr("moelora.serving.transformers_server.is_serve_available", lambda: False)
    assert 'pip install "moelora[serve]"' in refusal(capsys, "adapter")


def test_a_port_in_use(folder, capsys, monkeypatch):
    monkeypatch.setattr("moelora.serving.transformers_server.is_serve_available", lambda: True)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = str(other.getsockname()[1])
        assert f"cannot listen on 127.0.0.1, port {taken}: Address already in use" in refusal(
            capsys, "adapter", "--port", taken
        )
    assert "--port = 0" in refusal(capsys, "adapter", "--port", "0")


def test_options_of_transformers_server_are_checked_first(folder, capsys, port):
    pytest.importorskip("uvicorn")
    words = ["adapter", "--engine", "transformers", "--port", str(port), "--"]
    assert "No such option: --max-model-len" in refusal(capsys, *words, "--max-model-len", "8")
    assert "--port" in refusal(capsys, *words, "--port", "8")
    assert "`model_timeout` is set by `moelora serve`" in refusal(capsys, *words, "--model-timeout", "8")


def test_what_is_relied_on_in_transformers_server_is_there():
    pytest.importorskip("uvicorn")
    from transformers.cli.serve import Serve
    from transformers.cli.serving.model_manager import ModelManager
    from transformers.cli.serving.utils import GenerateManager, GenerationState

    from moelora.serving.transformers_server import OURS

    assert set(OURS) <= inspect.signature(Serve).parameters.keys()
    wanted = {
        "_load_model": ["self", "model_id_and_revision", "tqdm_class", "progress_callback", "gguf_file"],
        "_load_processor": ["self", "model_id_and_revision", "gguf_file"],
        "load_model_and_processor": ["self", "model_id_and_revision", "progress_callback", "tqdm_class", "gguf_file"],
        "process_model_name": ["model_id"],
    }
    lists = "list_models" if hasattr(ModelManager, "list_models") else "get_gen_models"  # from transformers 5.24 on
    assert "cache_dir" in inspect.signature(getattr(ModelManager, lists)).parameters
    assert {name: list(inspect.signature(getattr(ModelManager, name)).parameters) for name in wanted} == wanted
    assert GenerationState()._generate_managers == {}
    assert GenerateManager().submit(lambda: 3).result(10) == 3
    source = inspect.getsource(Serve)
    for name in ("self._model_manager", "self._generation_state", "self._thread", "self.server", "def kill_server"):
        assert name in source


def test_the_servers_names_in_transformers_stay_what_they_were(folder):
    pytest.importorskip("uvicorn")
    from transformers.cli.serving import model_manager

    from moelora.recipe import ModelOptions
    from moelora.serving.transformers_server import _loading

    before = model_manager.ModelManager
    with _loading(ModelOptions(name="model"), {}):
        assert issubclass(model_manager.ModelManager, before) and model_manager.ModelManager is not before
    assert model_manager.ModelManager is before


def test_what_stands_after_the_dashes_is_passed_on():
    parsed = build_parser().parse_args(["serve", "a", "b=c", "--port", "1", "--", "--x", "--", "y"])
    assert parsed.adapters == ["a", "b=c"] and parsed.engine_arguments == ["--x", "--", "y"]
    assert build_parser().parse_args(["undo", "--", "-folder"]).folder == "-folder"  # of other commands' as ever
