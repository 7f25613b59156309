import datetime
import json
import os
import re
import signal
from concurrent.futures import ThreadPoolExecutor

import datasets
import pytest
from tiny import CHAT_TEMPLATE, counting, shouting, tiny_tokenizer, write_jsonl

from moelora.data.preparation import (
    DomainBlocks,
    choose_held_out,
    load_domains,
    mix,
    split_documents,
    to_blocks,
)
from moelora.data.sources import check_domain, resolve_path
from moelora.data.tokens import plain_text, token_ids
from moelora.training import DomainOptions, ModelOptions, Recipe, UserError


def domain(path, **options):
    return DomainOptions(name="d", path=str(path), **options)


def fixes(path, **options):
    return [problem.fix for problem in check_domain(domain(path, **options), "data.d")]


def texts(dataset):
    return list(dataset["document"])


def documents(*texts):
    return datasets.Dataset.from_dict({"document": list(texts)})


@pytest.fixture
def jsonl(tmp_path):
    return write_jsonl(tmp_path / "texts.jsonl", counting(200))


# Splitting


def test_split_holds_out_about_the_asked_share_and_never_a_document_twice(jsonl):
    train, held_out = split_documents(domain(jsonl, eval_fraction=0.2))
    assert not set(texts(train)) & set(texts(held_out))
    assert len(train) + len(held_out) == 200
    assert 20 <= len(held_out) <= 60


def test_a_document_keeps_its_side_when_others_are_added(tmp_path, jsonl):
    more = write_jsonl(tmp_path / "more.jsonl", counting(200) + shouting(100))
    _, before = split_documents(domain(jsonl))
    _, after = split_documents(domain(more))
    assert set(texts(before)) == {text for text in texts(after) if "plus" in text}


def test_equal_documents_stand_on_one_side(tmp_path):
    path = write_jsonl(tmp_path / "twice.jsonl", counting(50) * 2)
    train, held_out = split_documents(domain(path, eval_fraction=0.3))
    assert not set(texts(train)) & set(texts(held_out))
    assert len(train) + len(held_out) == 100


def test_documents_of_eval_path_leave_the_training_side(tmp_path, jsonl):
    held = write_jsonl(tmp_path / "held.jsonl", counting(5) + shouting(5))
    train, held_out = split_documents(domain(jsonl, eval_path=str(held)))
    assert len(held_out) == 10
    assert len(train) == 195


@pytest.mark.parametrize("count", [2, 3, 5])
def test_few_documents_still_fill_both_sides(count):
    hashes = list(range(count))  # all in the lowest part: chance alone would hold out every one
    chosen = choose_held_out(hashes, 0.5)
    assert 0 < len(chosen) < count


# Blocks


def test_blocks_hold_every_token_of_one_document_each():
    tokenizer = tiny_tokenizer()
    long, short = "a" * 70, "b" * 5
    blocks = to_blocks(documents(long, short), tokenizer, 32, "test")
    assert [len(ids) for ids in blocks["input_ids"]] == [32, 32, 7, 6]
    assert [token for ids in blocks["input_ids"][:3] for token in ids] == [
        *tokenizer(long)["input_ids"],
        tokenizer.eos_token_id,
    ]
    assert blocks["labels"][:] == blocks["input_ids"][:]
    assert [sum(mask) for mask in blocks["attention_mask"]] == [32, 32, 7, 6]


def test_a_last_block_of_one_token_is_dropped():
    blocks = to_blocks(documents("a" * 32), tiny_tokenizer(), 32, "test")
    assert [len(ids) for ids in blocks["input_ids"]] == [32]


def test_padding_is_masked_and_not_learned():
    from transformers import DataCollatorForSeq2Seq

    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    blocks = to_blocks(documents("a" * 9, "b" * 3), tokenizer, 32, "test")
    batch = DataCollatorForSeq2Seq(tokenizer)(list(blocks))
    assert batch["attention_mask"].sum(dim=1).tolist() == [10, 4]
    assert (batch["labels"] != -100).sum(dim=1).tolist() == [10, 4]


def test_conversations_are_written_with_the_chat_template(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    path = write_jsonl(tmp_path / "chat.jsonl", [{"turns": turns, "n": n} for n in range(3)])
    recipe_domain = domain(path, messages_field="turns")
    assert check_domain(recipe_domain, "data.d") == []
    blocks = to_blocks(documents(turns), tokenizer, 64, "test")
    assert tokenizer.decode(blocks["input_ids"][0]) == "user: hi\nassistant: yes\n<end>"


def load(tmp_path, tokenizer, *domains, **options):
    recipe = Recipe(model=ModelOptions(name="m"), data=domains, training={"output_dir": str(tmp_path)}, **options)
    return load_domains(recipe, tokenizer)


def test_loading_limits_held_out_blocks_and_counts_tokens(tmp_path, jsonl):
    (loaded,) = load(tmp_path, tiny_tokenizer(), domain(jsonl), block_size=16, max_eval_blocks=3)
    sizes = loaded.sizes()
    assert sizes["held_out_blocks"] == 3
    assert sizes["train_tokens"] == sum(map(len, loaded.train["input_ids"]))
    assert sizes["held_out_tokens"] == sum(map(len, loaded.held_out["input_ids"]))


def test_a_single_document_cannot_be_split(tmp_path):
    (tmp_path / "one.txt").write_text("only one document")
    with pytest.raises(UserError, match="separator"):
        load(tmp_path, tiny_tokenizer(), domain(tmp_path / "one.txt"))


def test_conversations_need_a_chat_template(tmp_path):
    path = write_jsonl(tmp_path / "chat.jsonl", [{"turns": []}])
    with pytest.raises(UserError, match="chat template"):
        load(tmp_path, tiny_tokenizer(), domain(path, messages_field="turns"))


# Mixing


def as_blocks(name, weight, count):
    blocks = datasets.Dataset.from_dict({"input_ids": [[ord(name), row] for row in range(count)]})
    return DomainBlocks(name, weight, blocks, blocks)


def test_mixing_follows_the_weights_and_leaves_no_block_out():
    mixed = mix([as_blocks("a", 3.0, 300), as_blocks("b", 1.0, 300)], seed=0)
    ids = mixed["input_ids"][:]
    share = sum(row[0] == ord("a") for row in ids) / len(ids)
    assert 0.7 < share < 0.8
    assert len({tuple(row) for row in ids}) == 600


def test_mixing_is_a_function_of_the_seed():
    domains = [as_blocks("a", 1.0, 20), as_blocks("b", 1.0, 20)]
    assert mix(domains, 1)["input_ids"][:] == mix(domains, 1)["input_ids"][:]
    assert mix(domains, 1)["input_ids"][:] != mix(domains, 2)["input_ids"][:]


# Sources


def test_text_files_are_documents_by_pattern_and_by_separator(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(f"{name} one\n\n{name} two\n\n")
    train, held_out = split_documents(domain(tmp_path / "*.txt"))
    assert len(train) + len(held_out) == 3
    train, held_out = split_documents(domain(tmp_path / "*.txt", separator="\n\n"))
    assert sorted(texts(train) + texts(held_out)) == ["a one", "a two", "b one", "b two", "c one", "c two"]


def test_a_saved_dataset_is_read_by_split(tmp_path):
    splits = {"train": datasets.Dataset.from_list(counting(30)), "test": datasets.Dataset.from_list(shouting(7))}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    saved = domain(tmp_path / "saved", eval_split="test")
    assert check_domain(saved, "data.d") == []
    train, held_out = split_documents(saved)
    assert (len(train), len(held_out)) == (30, 7)


@pytest.mark.parametrize(
    "options, expected",
    [({"text_field": "txt"}, "did you mean `text`"), ({"split": "valid"}, "no split `valid`")],
)
def test_a_saved_dataset_with_the_wrong_name_is_reported(tmp_path, options, expected):
    datasets.DatasetDict({"train": datasets.Dataset.from_list(counting(3))}).save_to_disk(tmp_path / "saved")
    (fix,) = fixes(tmp_path / "saved", **options)
    assert expected in fix


BAD_ROWS = {
    "null": (["a", None], {}, "row 1 (the first is 0): `text` must be text, not null"),
    "date": ([datetime.date(2024, 1, 2)], {}, 'row 0 (the first is 0): `text` must be text, not "2024-01-02"'),
    "conversation": (
        [[{"role": "user", "content": "a"}], None],
        {"messages_field": "text"},
        "row 1 (the first is 0): `text` must be a list of {role, content}, not null",
    ),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows_of_a_dataset_are_reported_with_domain_field_and_row(tmp_path, name):
    values, options, expected = BAD_ROWS[name]
    datasets.Dataset.from_dict({"text": values}).save_to_disk(tmp_path / "saved")
    (fix,) = fixes(tmp_path / "saved", **options)
    assert expected in fix
    bad = domain(tmp_path / "saved", **options)
    with pytest.raises(UserError, match=re.escape(f"data.{bad.name}: {bad.path}: {expected}")):
        split_documents(bad)


def test_empty_rows_are_left_out_and_counted(tmp_path, capsys):
    rows = {"text": ["a", "", "b", ""]}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "saved")
    write_jsonl(tmp_path / "rows.jsonl", [{"text": text} for text in rows["text"]])
    for path in (tmp_path / "saved", tmp_path / "rows.jsonl"):
        train, held_out = split_documents(domain(path))
        assert sorted(texts(train) + texts(held_out)) == ["a", "b"]
        assert f"`text` is empty: 2 of {path}" in " ".join(capsys.readouterr().err.split())


def test_what_datasets_cannot_read_says_why(tmp_path):
    (tmp_path / "rows.json").write_text('{"text": "a"')
    (fix,) = fixes(tmp_path)
    assert fix.startswith("`datasets` cannot read it: JSON parse error")


BAD_FILES = {
    "empty": (b"", "holds no text"),
    "blank": (b"\n  \n", "holds no text"),
    "not_json": (b'{"text": "a"}\n{"text": \n', "line 2: not JSON"),
    "not_an_object": (b'["a"]\n', "line 1: must be a JSON object"),
    "no_field": (b'{"text": "a"}\n\n{"content": "b"}\n', "line 3: no field `text`, only content"),
    "wrong_type": (b'{"text": 3}\n', "line 1: `text` must be text, not 3"),
    "latin_1": ('{"text": "é"}\n'.encode("latin-1"), "line 1: byte 0xe9 is not UTF-8"),
    "binary": (b'{"text": "a"}\n\0\0\0\n', "line 2: holds a zero byte"),
    "surrogate": (b'{"text": "\\ud800"}\n', "line 1: `text` holds half a character"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_reported_with_line_and_fix(tmp_path, name):
    content, expected = BAD_FILES[name]
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    (fix,) = fixes(path)
    assert expected in fix


def test_many_bad_lines_are_counted_not_listed(tmp_path):
    found = fixes(write_jsonl(tmp_path / "bad.jsonl", [{"txt": "a"}] * 40))
    assert len(found) == 6
    assert found[-1] == "and 35 more such lines"


def test_bad_conversations_are_reported(tmp_path):
    path = write_jsonl(tmp_path / "chat.jsonl", [{"turns": [{"role": "user"}]}])
    (fix,) = fixes(path, messages_field="turns")
    assert "must be a list of {role, content}" in fix


@pytest.mark.parametrize(
    "path, expected",
    [("gone.jsonl", "no such file"), ("*.txt", "no file matches"), ("table.csv", "folder of its own")],
)
def test_unusable_paths_are_reported(tmp_path, path, expected):
    (tmp_path / "table.csv").write_text("text\na\n")
    (fix,) = fixes(resolve_path(path, tmp_path))
    assert expected in fix


def test_an_unknown_hub_id_is_reported(tmp_path):
    assert resolve_path("nobody/nothing", tmp_path) == "nobody/nothing"
    (fix,) = fixes("nobody/nothing")
    assert "`datasets` cannot read it" in fix


def test_a_byte_order_mark_is_not_text(tmp_path):
    path = tmp_path / "bom.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"text": "a"}).encode())
    assert fixes(path) == []


def test_eval_split_is_refused_where_it_has_no_meaning(jsonl):
    assert "only `datasets` have splits" in fixes(jsonl, eval_split="test")[0]
    assert "`eval_path` is set" in fixes(jsonl, eval_split="test", eval_path=str(jsonl))[0]


# Files that strangers wrote


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"text": "a", "n": ' + "9" * 5000 + "}", "line 2: not JSON that can be read"),
        ('{"text": "a", "n": ' + "[" * 90_000 + "]" * 90_000 + "}", "line 2: lists and mappings lie in each other"),
        ('{"text": ' + '{"a": ' * 300 + "1" + "}" * 300 + "}", "line 2: lists and mappings lie in each other"),
        ("9" * 5000, "line 2: not JSON that can be read"),
        ('{"text": NaN}', "line 2: `text` must be text, not NaN"),
        ('{"text": 1e999}', "line 2: `text` must be text, not Infinity"),
        ('{"\\u001b[2J": 1}', r"no field `text`, only \x1b[2J; set"),
    ],
)
def test_a_line_that_json_readers_fail_on_is_told(tmp_path, line, said):
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n", encoding="utf-8")
    (fix,) = fixes(path)
    assert said in fix


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", ["texts.jsonl", "texts.txt"])
@pytest.mark.parametrize("kind", ["pipe", "device", "loop"])
def test_a_file_that_never_ends_is_not_read(tmp_path, name, kind):
    path = tmp_path / name
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero" if kind == "device" else path)
    (fix,) = fixes(resolve_path(str(path), tmp_path))
    assert ("no such file" if kind == "loop" else "no regular file, but a folder, a pipe or a device") in fix


@pytest.mark.timeout(20)
def test_a_folder_that_holds_a_pipe_is_not_read(tmp_path):
    write_jsonl(tmp_path / "texts.jsonl", counting(5))
    os.mkfifo(tmp_path / "more.jsonl")
    (fix,) = fixes(tmp_path)
    assert "more.jsonl is no regular file" in fix


@pytest.mark.parametrize("extra", [10**25, [[1], {"a": 2}], {"": 1}])
def test_conversations_that_no_table_holds_are_told(tmp_path, extra):
    turns = [{"role": "user", "content": "hi", "extra": 1}]
    path = write_jsonl(tmp_path / "chat.jsonl", [{"turns": turns}, {"turns": [turns[0] | {"extra": extra}]}] * 3)
    chat = domain(path, messages_field="turns")
    assert check_domain(chat, "data.d") == []
    with pytest.raises(UserError, match=r"data\.d: .*chat\.jsonl: conversations differ in their fields"):
        split_documents(chat)


LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}"
LOOPS += "{% endfor %}{% endfor %}"


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("template", "said"),
    [
        (LOOPS, "takes more than 0.2 seconds"),
        ("{{ 7 ** (10 ** 9) }}", "takes more than 0.2 seconds"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "fails (RecursionError"),
        ("{% for a in range(10 ** 12) %}{% endfor %}", "fails (OverflowError: Range too big"),
        ("{{ raise_exception('no system turn') }}", "fails (TemplateError: no system turn)"),
        ("{{ messages[0].nothing.more }}", "fails (UndefinedError"),
        ("{% for %}", "fails (TemplateSyntaxError"),
        ("{{ 1 / 0 }}", "fails (ZeroDivisionError"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "fails (SecurityError"),
    ],
)
def test_a_chat_template_that_does_not_end_or_fails_is_told(monkeypatch, template, said):
    monkeypatch.setattr("moelora.data.chat.SECONDS", 0.2)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    before = signal.getsignal(signal.SIGVTALRM)
    with pytest.raises(UserError, match="the model's chat template " + re.escape(said)):
        token_ids([{"role": "user", "content": "hi"}], tokenizer)
    assert signal.getsignal(signal.SIGVTALRM) is before
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0)


def test_a_chat_template_works_in_other_threads_too():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    with ThreadPoolExecutor(1) as threads:
        text = threads.submit(plain_text, [{"role": "user", "content": "hi"}], tokenizer).result()
    assert text == ("user: hi\n", False)
