"""`moelora report` from the command line: what it writes, what it refuses, and that it never writes half a page."""

import base64
import json
import os
import re
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import save_tiny_model, shouting, tiny_recipe, write_jsonl, write_recipe

import moelora.cli.report
from moelora.cli.commands import main
from moelora.report.history import History
from moelora.report.measurements import short_names
from moelora.report.page import payload
from moelora.training import load_recipe, train

HOSTILE = '</script><script>document.title="owned"</script><img src=x onerror=alert(1)>&amp;"\'\u2028🙂'


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A finished run of two domains, and other texts beside it."""
    folder = tmp_path_factory.mktemp("report")
    recipe = tiny_recipe(folder)
    recipe["mixture"] |= {"num_experts": 3, "top_k_experts": 2}
    train(load_recipe(write_recipe(folder, recipe)))
    write_jsonl(folder / "other.jsonl", [{"text": f"{HOSTILE} {i}"} for i in range(6)])
    return folder


def run(folder, *more, data=("counting=counting.jsonl", "shouting=shouting.jsonl"), adapter="out", out="report.html"):
    arguments = [part for given in data for part in ("--data", _absolute(folder, given))]
    return main(["report", "--adapter", str(folder / adapter), *arguments, "--out", str(folder / out), *map(str, more)])


def _absolute(folder, given):
    name, equals, path = given.partition("=")
    return f"{name}{equals}{folder / path}" if path else given


def data_of(path):
    text = path.read_text(encoding="utf-8")
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])


def unpack(packed, dtype=np.uint8):
    return np.frombuffer(zlib.decompress(base64.b64decode(packed)), dtype=dtype)


@pytest.fixture(scope="module")
def page(folder):
    assert run(folder) == 0
    return folder / "report.html"


# What it writes


def test_the_page_holds_every_token_with_its_weights(page):
    data = data_of(page)
    assert [domain["name"] for domain in data["domains"]] == ["counting", "shouting"]
    for domain, view in zip(data["domains"], data["view"], strict=True):
        ids = unpack(view["ids"], "<u4")
        assert len(ids) == domain["tokens"] > 20
        weights = np.stack([unpack(packed).reshape(-1, 3) for packed in view["weights"]])
        assert weights.shape == (2, len(ids), 3)
        assert (abs(weights.sum(-1).astype(int) - 255) <= 2).all()
        text = "".join(view["pieces"][number] for number in ids)
        assert text.count("<end>") == len(view["starts"])
    assert "plus one is" in "".join(data["view"][0]["pieces"][n] for n in unpack(data["view"][0]["ids"], "<u4"))
    assert len(data["history"]["steps"]) == 4
    assert set(data["history"]["routers"]) == set(data["routers"]) == {"model.layers.0", "model.layers.1"}
    assert np.array(data["worth"]).shape == (2, 3)
    assert len(data["specialisation"]["observed"]) == 3


def test_of_what_the_run_learned_only_the_held_out_documents_are_read(page, folder):
    record = json.loads((folder / "out" / "run.json").read_text())
    for domain in data_of(page)["domains"]:
        assert domain["heldOut"]
        assert domain["loss"] == pytest.approx(record["domains"][domain["name"]]["loss_after"], abs=2e-4)


def test_other_texts_are_said_to_be_unknown(folder):
    assert run(folder, data=("other=other.jsonl", "counting=counting.jsonl"), out="other.html") == 0
    assert [domain["heldOut"] for domain in data_of(folder / "other.html")["domains"]] == [False, True]
    assert "other may have been trained on" in (folder / "other.html").read_text(encoding="utf-8")


def test_the_page_needs_no_network(page):
    text = page.read_text(encoding="utf-8")
    assert "default-src 'none'" in text
    assert not re.findall(r"""(?:src|href)=["'](?!#)""", text)
    assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)", text)


def test_hostile_text_stays_text(folder):
    name = "a-domain"
    assert run(folder, data=(f"{name}=other.jsonl",), out="hostile.html") == 0
    text = (folder / "hostile.html").read_text(encoding="utf-8")
    assert text.count("<script") == 2 and "<img" not in text and "owned" not in text.split('id="data"')[0]
    view = data_of(folder / "hostile.html")["view"][0]
    whole = "".join(view["pieces"][number] for number in unpack(view["ids"], "<u4"))
    assert whole.startswith(f"{HOSTILE} 0<end>")
    assert data_of(folder / "hostile.html")["specialisation"] is None


def test_limits_are_honoured_and_told(folder):
    assert run(folder, "--max-tokens", 20, "--worth-tokens", 0, out="short.html") == 0
    data = data_of(folder / "short.html")
    assert [domain["tokens"] for domain in data["domains"]] == [20, 20]
    assert data["worth"] is None
    assert "raise --max-tokens" in (folder / "short.html").read_text(encoding="utf-8")


def test_a_run_without_a_log_of_routers_says_so(folder, monkeypatch):
    monkeypatch.setattr(moelora.cli.report, "read_history", lambda folder: None)
    assert run(folder, "--worth-tokens", 0, out="unlogged.html") == 0
    assert data_of(folder / "unlogged.html")["history"] is None


def test_too_large_a_view_is_cut_but_everything_is_counted(page, monkeypatch, folder):
    kept = []
    monkeypatch.setattr("moelora.report.page.MOST_WEIGHTS", 2 * 3 * 2 * 30)
    original = moelora.cli.report.render
    monkeypatch.setattr(moelora.cli.report, "render", lambda *a: kept.append(a[0]) or original(*a))
    assert run(folder, "--worth-tokens", 0, out="cut.html") == 0
    data = data_of(folder / "cut.html")
    assert [len(unpack(view["losses"])) for view in data["view"]] == [30, 30]
    assert [domain["tokens"] for domain in data["domains"]] == kept[0].num_tokens
    json.dumps(payload(kept[0], 1), allow_nan=False)
    diverged = replace(kept[0], history=History([1], {"model": {"entropy": [float("nan")]}}))
    json.dumps(payload(diverged, 1), allow_nan=False)


def test_short_names_lose_what_all_share():
    assert short_names(["a.0.q", "a.0.k"]) == ["q", "k"]
    assert short_names(["a.0", "a"]) == ["a.0", "a"]
    assert short_names(["only.one"]) == ["only.one"]


# What it refuses, before it loads a model


@pytest.fixture
def no_model(monkeypatch):
    monkeypatch.setattr(moelora.cli.report, "load_mixture", lambda *_: pytest.fail("a model was loaded"))


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("data", "words"),
    [
        ((), "give texts: --data NAME=FILE"),
        (("counting.jsonl",), "must be NAME=FILE"),
        (("two words=counting.jsonl",), "must be letters"),
        (("a=gone.jsonl",), "no such file"),
        (("a=empty.txt",), "holds no text"),
        (("a=blank.jsonl",), "holds no text"),
        (("a=binary.txt",), "not UTF-8"),
        (("a=zero.txt",), "zero byte"),
        (("a=broken.jsonl",), "not JSON"),
        (("a=counting.jsonl", "a=shouting.jsonl"), "two domains are named"),
    ],
)  # fmt: skip
def test_bad_data_is_refused(folder, capsys, data, words):
    (folder / "empty.txt").write_text("")
    (folder / "blank.jsonl").write_text('{"text": ""}\n')
    (folder / "binary.txt").write_bytes(bytes([0x89, 0x50, 0x4E, 0x47, 0xFF]))
    (folder / "zero.txt").write_bytes(b"a\0b")
    (folder / "broken.jsonl").write_text("{text\n")
    before = files(folder)
    assert run(folder, data=data, out="refused.html") == 2
    assert words in capsys.readouterr().err
    assert files(folder) == before


@pytest.mark.usefixtures("no_model")
def test_every_mistake_is_told_at_once(folder, capsys):
    assert run(folder, "--max-tokens", 0, data=(), adapter="nowhere") == 2
    error = capsys.readouterr().err
    assert "--max-tokens = 0" in error and "nowhere" in error
    assert run(folder, data=("a=gone.jsonl",), out="no/such/report.html") == 2
    error = capsys.readouterr().err
    for words in ("no such file", "the folder", "does not exist"):
        assert words in error


@pytest.mark.usefixtures("no_model")
def test_bad_places_are_refused(folder, capsys):
    assert run(folder, out="out") == 2
    assert "is a folder; give a file" in capsys.readouterr().err
    assert run(folder, adapter="model") == 2
    assert "no adapter_config.json" in capsys.readouterr().err
    assert run(folder, "--base", folder / "gone") == 2
    assert "no base model" in capsys.readouterr().err


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("name", ["out/adapter_model.safetensors", "counting.jsonl", "out/run.json", "notes.txt"])
def test_a_file_that_is_no_page_is_not_replaced(folder, capsys, name):
    (folder / "notes.txt").write_text("About <html> pages.")
    before = files(folder)
    assert run(folder, out=name) == 2
    error = capsys.readouterr().err
    assert str(folder / name) in error and "is no HTML page" in error and "give another file" in error
    assert files(folder) == before


@pytest.mark.usefixtures("no_model")
def test_what_is_no_regular_file_is_not_replaced(folder, capsys):
    os.mkfifo(folder / "pipe")
    assert run(folder, out="pipe") == 2
    assert "is no HTML page" in capsys.readouterr().err
    (folder / "pipe").unlink()


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("read", ["text.html", "*.html"])
def test_a_page_that_is_read_is_not_replaced(folder, capsys, read):
    (folder / "text.html").write_text("<html>a text</html>")
    assert run(folder, data=(f"a={read}",), out="text.html") == 2
    assert "is one of the texts, which are only read" in capsys.readouterr().err
    assert (folder / "text.html").read_text() == "<html>a text</html>"
    (folder / "text.html").unlink()


@pytest.mark.parametrize("start", [b"", b"<!doctype html>", b"\xef\xbb\xbf\n<!DOCTYPE HTML>", b"<HTML lang=en>"])
def test_a_page_is_replaced(folder, start):
    (folder / "old.html").write_bytes(start)
    assert run(folder, "--worth-tokens", 0, "--max-tokens", 20, out="old.html") == 0
    assert data_of(folder / "old.html")


@pytest.mark.usefixtures("no_model")
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder in which nobody can make a file")
def test_an_unwritable_place_is_refused(folder, capsys):
    assert run(folder, out="/proc/report.html") == 2
    assert "may not be written to" in capsys.readouterr().err


@pytest.mark.usefixtures("no_model")
def test_the_wrong_base_is_refused(folder, capsys, tmp_path):
    wider = save_tiny_model(tmp_path / "wider", hidden_size=48)
    assert run(folder, "--base", wider) == 2
    error = capsys.readouterr().err
    assert "was not trained on" in error and "wide, the adapter's 32 to 64" in error and "with --base" in error
    shallow = save_tiny_model(tmp_path / "shallow")
    config = json.loads((shallow / "config.json").read_text())
    (shallow / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1, "layer_types": None}))
    assert run(folder, "--base", shallow) == 2
    assert "has no linear `model.layers.1" in capsys.readouterr().err


@pytest.mark.usefixtures("no_model")
def test_a_damaged_adapter_is_refused(folder, capsys, tmp_path):
    for name in ("adapter_config.json", "run.json"):
        (tmp_path / name).write_bytes((folder / "out" / name).read_bytes())
    weights = load_file(folder / "out" / "adapter_model.safetensors")
    half = next(key for key in weights if "lora_B" in key)
    save_file({key: tensor for key, tensor in weights.items() if key != half}, tmp_path / "adapter_model.safetensors")
    assert main(["report", "--adapter", str(tmp_path), "--data", f"a={folder / 'counting.jsonl'}"]) == 2
    assert "lacks half of" in capsys.readouterr().err


def test_a_failure_leaves_the_old_page_and_nothing_else(folder, page, monkeypatch):
    monkeypatch.setattr(moelora.cli.report, "render", lambda *_: "half a page" + "\ud800")  # cannot be encoded
    before = files(folder)
    with pytest.raises(UnicodeEncodeError):
        run(folder, "--worth-tokens", 0)
    assert files(folder) == before


def test_padding_changes_nothing(folder, monkeypatch):
    """A page of texts read together, padded, is that of texts read one by one."""
    write_jsonl(folder / "uneven.jsonl", [{"text": "A" * (1 + 7 * i % 23)} for i in range(8)] + shouting(2))
    found = []
    original = moelora.cli.report.render
    monkeypatch.setattr(moelora.cli.report, "render", lambda *a: found.append(a[0]) or original(*a))
    assert run(folder, data=("a=uneven.jsonl",), out="a.html") == 0
    monkeypatch.setattr("moelora.report.measure.TOKENS_AT_ONCE", {"cpu": 1})
    assert run(folder, data=("a=uneven.jsonl",), out="a.html") == 0
    together, alone = found
    assert together.num_tokens == alone.num_tokens
    for name in ("weight", "load", "entropy", "loss", "worth"):
        np.testing.assert_allclose(getattr(together, name), getattr(alone, name), rtol=1e-4, atol=1e-6, err_msg=name)
    assert torch.equal(torch.tensor(together.tokens[0].documents), torch.tensor(alone.tokens[0].documents))


@pytest.mark.slow
def test_a_hundred_thousand_tokens(folder):
    write_jsonl(folder / "long.jsonl", [{"text": f"{i} words of a long text. " * 20} for i in range(250)])
    write_jsonl(folder / "loud.jsonl", [{"text": f"{i} WORDS OF A LOUD TEXT! " * 20} for i in range(250)])
    data = ("long=long.jsonl", "loud=loud.jsonl")
    assert run(folder, "--max-tokens", 100_000, "--worth-tokens", 2000, data=data, out="long.html") == 0
    domains = data_of(folder / "long.html")["domains"]
    assert [domain["tokens"] for domain in domains] == [100_000, 100_000]
    assert (folder / "long.html").stat().st_size < 5e6
