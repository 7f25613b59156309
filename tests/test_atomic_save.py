"""A save takes effect at once: killed, mixed up or read meanwhile, a folder is never two saves in one."""

import contextlib
import json
import os
import shutil
import threading
import time

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from test_persistence import EXPERTS, assert_same_state, base_model, logits, trained

from moelora import MoELoraConfig
from moelora.files import atomic_save
from moelora.files.atomic_save import PENDING
from moelora.schema import UserError
from moelora.storage.mixture_files import read_mixture

WAYS = pytest.mark.parametrize("names", [("default",), EXPERTS[:2]], ids=["default", "experts"])


def variant(number, names=("default",)):
    """A mixture that differs from other numbers' in its weights, and in its scaling by the configuration alone."""
    model = trained(names, lora_alpha=4 * (number + 1))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1 * number)
    return model


def loaded_logits(folder):
    return logits(PeftModel.from_pretrained(base_model(), folder))


def test_all_parts_carry_one_id_and_their_checksums(tmp_path):
    model = trained()
    model.attach_router(torch.nn.Linear(16, 3))
    model.save_pretrained(tmp_path)
    record = json.loads((tmp_path / "adapter_config.json").read_text())["checkpoint"]
    assert record["files"].keys() == {"adapter_model.safetensors", "router.safetensors"}
    for name, expected in record["files"].items():
        assert atomic_save.checksum(load_file(tmp_path / name)) == expected
        with safe_open(tmp_path / name, "pt") as stream:
            assert stream.metadata()["moelora_save"] == record["id"]
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["checkpoint"]["id"] != record["id"]


@WAYS
@pytest.mark.parametrize("part", ["adapter_config.json", "adapter_model.safetensors"])
def test_parts_of_two_saves_are_refused_by_name(tmp_path, names, part):
    variant(0, names).save_pretrained(tmp_path / "a")
    variant(1, names).save_pretrained(tmp_path / "b")
    shutil.copy(tmp_path / "b" / part, tmp_path / "a" / part)
    words = r"adapter_model\.safetensors and adapter_config\.json in .* are of different saves"
    with pytest.raises(ValueError, match=words):
        PeftModel.from_pretrained(base_model(), tmp_path / "a")
    with pytest.raises(UserError, match=words):
        read_mixture(tmp_path / "a")


def test_a_configuration_that_knows_of_no_save_is_refused_beside_weights_that_do(tmp_path):
    trained().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"checkpoint": None}))
    with pytest.raises(ValueError, match=r"is of a save that adapter_config\.json does not know"):
        PeftModel.from_pretrained(base_model(), tmp_path)


def test_a_flipped_bit_is_found(tmp_path):
    trained().save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors in .* is damaged"):
        PeftModel.from_pretrained(base_model(), tmp_path)
    with pytest.raises(UserError, match=r"adapter_model\.safetensors in .* is damaged"):
        read_mixture(tmp_path)


def test_a_configuration_may_be_edited(tmp_path):
    """What a user notes or sets in it is no mix-up."""
    trained().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "elsewhere", "revision": "x"})
    )
    assert PeftModel.from_pretrained(base_model(), tmp_path).peft_config["default"].revision == "x"


# ---- killed ----------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


STEPS = ("rename", "replace", "unlink", "rmdir", "fsync", "mkdir")


def count_and_kill(monkeypatch, at):
    """Let the at-th change of the file system, counted from here, be the last; the number so far."""
    calls = [0]

    def watch(real):
        def call(*args, **kwargs):
            calls[0] += 1
            if calls[0] == at:
                raise Killed
            return real(*args, **kwargs)

        return call

    for name in STEPS:
        monkeypatch.setattr(os, name, watch(getattr(os, name)))
    return calls


@WAYS
def test_a_save_killed_at_any_step_leaves_one_of_the_two(tmp_path, monkeypatch, names):
    old, new = variant(0, names), variant(1, names)
    old.attach_router(torch.nn.Sequential(torch.nn.Linear(16, len(names) if len(names) > 1 else 3)))
    before, after = logits(old), logits(new)
    old.save_pretrained(tmp_path / "old")
    new.save_pretrained(tmp_path / "new")
    news = load_file(tmp_path / "new" / "adapter_model.safetensors")
    outcomes = []
    for at in range(1, 100):
        folder = tmp_path / str(at)
        shutil.copytree(tmp_path / "old", folder)
        # What is left behind after a kill -9 is what an exception leaves when nothing is tidied up.
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
            calls = count_and_kill(patch, at)
            with contextlib.suppress(Killed):
                new.save_pretrained(folder)
        found = loaded_logits(folder)
        assert torch.equal(found, before) or torch.equal(found, after), at
        outcomes.append(torch.equal(found, after))
        read_mixture(folder)
        new.save_pretrained(folder)  # and whoever saves next is not hindered
        read_mixture(folder)
        assert_same_state(load_file(folder / "adapter_model.safetensors"), news)
        assert not (folder / PENDING).exists() and not (folder / "router.safetensors").exists()
        if calls[0] < at:
            break
    assert calls[0] < at, "more steps than were tried"
    assert torch.equal(loaded_logits(folder), after)
    assert outcomes == sorted(outcomes) and outcomes[0] is False and outcomes[-1] is True
    assert outcomes.count(True) > 3, "no kill came after the moment of the switch"


def test_a_pending_folder_that_leads_elsewhere_moves_nothing(tmp_path):
    """A stranger's folder that is saved over."""
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "README.md").write_text("keep")
    folder = tmp_path / "adapter"
    trained().save_pretrained(folder)
    (folder / PENDING).symlink_to(mine)
    trained().save_pretrained(folder)
    assert (mine / "README.md").read_text() == "keep"
    assert not (folder / PENDING).exists()


def no_folder(pending):
    pending.write_text("x")


def folders_for_files(pending):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (pending / name).mkdir(parents=True)


@pytest.mark.parametrize("make", [no_folder, folders_for_files])
def test_a_pending_folder_that_no_save_left_is_in_no_ones_way(tmp_path, make):
    trained().save_pretrained(tmp_path)
    make(tmp_path / PENDING)
    expected = logits(PeftModel.from_pretrained(base_model(), tmp_path))
    model = variant(1)
    model.save_pretrained(tmp_path)
    assert not (tmp_path / PENDING).exists()
    loaded = logits(PeftModel.from_pretrained(base_model(), tmp_path))
    assert torch.equal(loaded, logits(model)) and not torch.equal(loaded, expected)


def test_a_pipe_in_a_pending_folder_is_not_waited_for(tmp_path):
    trained().save_pretrained(tmp_path)
    (tmp_path / PENDING).mkdir()
    pipe = tmp_path / PENDING / "adapter_config.json"
    os.mkfifo(pipe)
    opened = []

    def write():  # opening waits for a reader
        while True:
            with pipe.open("w") as stream:
                opened.append(stream.write("[]"))
            time.sleep(0.05)  # the reader sees the end

    threading.Thread(target=write, daemon=True).start()
    PeftModel.from_pretrained(base_model(), tmp_path)
    trained().save_pretrained(tmp_path)
    assert not opened


# ---- read meanwhile --------------------------------------------------------------------------------------------------


def test_a_configuration_of_the_save_before_is_noticed(tmp_path, monkeypatch):
    """from_pretrained reads the configuration, and a moment later all the rest."""
    variant(0).save_pretrained(tmp_path)
    read, new = MoELoraConfig.from_pretrained.__func__, variant(1)

    def then_save(cls, *args, **kwargs):
        found = read(cls, *args, **kwargs)
        new.save_pretrained(tmp_path)
        return found

    monkeypatch.setattr(MoELoraConfig, "from_pretrained", classmethod(then_save))
    with pytest.raises(ValueError, match="saved anew, with another configuration, while it was being read"):
        PeftModel.from_pretrained(base_model(), tmp_path)
    monkeypatch.undo()
    assert torch.equal(loaded_logits(tmp_path), logits(new))


def test_a_model_made_from_a_saved_configuration_loads_later_saves(tmp_path):
    variant(0).save_pretrained(tmp_path)
    model = get_peft_model(base_model(), MoELoraConfig.from_pretrained(tmp_path))
    model.save_pretrained(tmp_path)
    expected = logits(model.eval())
    model.set_expert_maturity(0, 1.0)
    model.load_adapter(tmp_path, "default")
    assert torch.equal(logits(model), expected)


def test_threads_that_save_into_one_folder_leave_one_save(tmp_path):
    models = [variant(0), variant(1)]
    expected = [logits(model) for model in models]
    failures = []

    def save(model):
        try:
            for _ in range(5):
                model.save_pretrained(tmp_path / "adapter")
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=save, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    found = loaded_logits(tmp_path / "adapter")
    assert any(torch.equal(found, each) for each in expected)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    assert not (tmp_path / "adapter" / PENDING).exists()
