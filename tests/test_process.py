"""How the command ends when its output has nowhere to go, its folder is gone or somebody presses Ctrl-C."""

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from moelora.cli.commands import main
from moelora.console import OutputClosedError
from moelora.storage.run_record import write_json

FULL = Path("/dev/full")
needs_dev_full = pytest.mark.skipif(not FULL.exists(), reason="the system has no /dev/full")


class Pipe(io.StringIO):
    """A pipe that nobody reads."""

    def write(self, text):
        raise BrokenPipeError(32, "Broken pipe")


@needs_dev_full
@pytest.mark.parametrize("more", [[], ["--json"]])
def test_output_that_cannot_be_written_is_told(adapter_folder, capsys, monkeypatch, more):
    adapter_folder()
    capsys.readouterr()
    with FULL.open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(["inspect", "adapter", *more]) == 2
    assert capsys.readouterr().err.lstrip() == "moelora: standard output: No space left on device\n"


@needs_dev_full
@pytest.mark.parametrize("arguments", [["--help"], ["undo", "--help"]])
def test_help_that_cannot_be_written_is_told(arguments):
    with FULL.open("w") as full:
        command = [sys.executable, "-m", "moelora", *arguments]
        done = subprocess.run(command, check=False, text=True, stdout=full, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (2, "moelora: standard output: No space left on device\n")


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_output_that_nobody_reads_ends_the_command_quietly(adapter_folder, capsys, monkeypatch, more):
    adapter_folder()
    capsys.readouterr()
    monkeypatch.setattr(sys, "stdout", Pipe())
    assert main(["inspect", "adapter", *more]) == 141
    assert capsys.readouterr().err.strip() == ""


def test_a_pipe_of_something_else_is_told(monkeypatch, capsys):
    def fail(options):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("moelora.cli.operation.undo", fail)
    assert main(["undo", "x"]) == 2
    assert capsys.readouterr().err == "moelora: Broken pipe\n"


@pytest.mark.slow
def test_closed_streams_are_no_files_that_are_opened_later(tmp_path):
    program = "\n".join(
        [
            "import os, sys",
            "from moelora.cli.process import replace_closed_streams",
            "replace_closed_streams()",
            "stream = open('file', 'w')",
            "print('lost')",
            "os.write(1, b'lost too')",
            "raise SystemExit(stream.fileno() < 3)",
        ]
    )
    command = f'exec "{sys.executable}" -c "{program}" >&- 2>&-'
    assert subprocess.run(["sh", "-c", command], cwd=tmp_path, check=False).returncode == 0
    assert (tmp_path / "file").read_text() == ""


@pytest.mark.parametrize("columns", ["0", "1", "5", "1000000000"])
def test_a_terminal_of_any_width_shows_tables(adapter_folder, capsys, monkeypatch, columns):
    adapter_folder()
    monkeypatch.setenv("COLUMNS", columns)
    assert main(["inspect", "adapter"]) == 0
    printed = capsys.readouterr().out
    assert "Adapters" in printed and len(printed) < 100_000


def test_names_that_the_terminal_cannot_write_are_shown_by_their_numbers(adapter_folder, monkeypatch):
    folder = adapter_folder()
    (folder / "adapter").rename(folder / "é→")
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict", write_through=True)
    monkeypatch.setattr(sys, "stdout", ascii_only)
    assert main(["inspect", "é→"]) == 0
    assert rb"Adapters in \xe9\u2192" in ascii_only.buffer.getvalue()


def test_a_working_folder_that_is_gone_is_told(tmp_path, monkeypatch, capsys):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert main(["undo", "x"]) == 2
    assert "the folder that you work in is gone" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(28, "No space left on device", "/data/out"), "/data/out: No space left on device"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (OSError("cannot reach the hub"), "cannot reach the hub"),
        (MemoryError(), "out of memory"),
        (
            SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
            "a file cannot be written; is the disk full? "
            "(Error while serializing: I/O error: No space left on device (os error 28))",
        ),
        (
            RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 14916 vs 14800"),
            "a file cannot be written; is the disk full? "
            "([enforce fail at inline_container.cc:672] . unexpected pos 14916 vs 14800)",
        ),
    ],
)
def test_errors_of_the_system_are_told_in_one_line(monkeypatch, capsys, error, said):
    def fail(options):
        raise error

    monkeypatch.setattr("moelora.cli.operation.undo", fail)
    assert main(["undo", "x"]) == 2
    assert capsys.readouterr().err == f"moelora: {said}\n"


def test_a_mistake_of_ours_is_not_hidden(monkeypatch):
    def fail(options):
        raise RuntimeError("ours")

    monkeypatch.setattr("moelora.cli.operation.undo", fail)
    with pytest.raises(RuntimeError, match="ours"):
        main(["undo", "x"])


def test_a_record_that_the_disk_has_no_room_for_is_named(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*run\.json'"):
        write_json(tmp_path / "run.json", {})
    assert list(tmp_path.iterdir()) == []


def test_names_that_are_no_utf_8_are_written_as_json_has_them(tmp_path):
    write_json(tmp_path / "run.json", {"command": "a\udcff"})
    assert json.loads((tmp_path / "run.json").read_text()) == {"command": "a\udcff"}


def test_an_output_that_closes_is_no_error_of_the_system():
    assert not issubclass(OutputClosedError, OSError)


# Ctrl-C


@pytest.mark.parametrize(
    "module",
    [
        "moelora.cli.options",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("argparse", "torch._C", "transformers", "peft")),
    ],
)
def test_interrupting_while_modules_are_imported_ends_quietly(tmp_path, module):
    """Python tells of an import once it is done; whatever comes next is interrupted."""
    command = [sys.executable, "-X", "importtime", "-m", "moelora", "undo", str(tmp_path / "x")]
    with subprocess.Popen(command, text=True, stderr=subprocess.PIPE, bufsize=1) as process:
        for line in process.stderr:
            if line.rpartition("|")[2].strip() == module:
                break
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
    assert process.returncode == -signal.SIGINT  # a shell's 130
    assert [line for line in rest.splitlines() if not line.startswith("import time:")] == []


INTERRUPTED = """
import os, signal, sys
sys.argv = ["moelora", "undo", "x"]
import moelora.cli.commands
import moelora.cli.operation

def interrupted(options):
    try:
        os.kill(os.getpid(), signal.SIGINT)
    finally:
        print("cleaned up")

moelora.cli.operation.undo = interrupted
status = moelora.cli.commands.main()
sys.stdout.flush()
if status == 130 and sys.argv[0] == "moelora":
    os.kill(os.getpid(), signal.SIGINT)  # a second time, while Python ends
"""


def test_interrupting_the_work_cleans_up_and_again_ends_at_once():
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("cleaned up\n", "moelora: stopped\n")
    assert done.returncode == -signal.SIGINT


@pytest.mark.slow
def test_an_ignored_interrupt_stays_ignored():
    program = "import signal, os\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n" + INTERRUPTED
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "cleaned up\n", "")


def test_calling_main_from_python_leaves_interrupts_alone(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    assert main(["undo", str(tmp_path / "x")]) == 2
    assert signal.getsignal(signal.SIGINT) is before is signal.default_int_handler
    assert os.getcwd()
