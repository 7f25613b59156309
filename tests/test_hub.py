"""Mixtures on the hub: pushed whole, loaded by id, revision and subfolder. A stand-in takes the hub's place."""

import re

import pytest
import torch
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM, PeftModel
from stand_in_hub import problems_of_metadata, stand_in_hub
from test_attached_router_files import Gate, stack
from test_persistence import EXPERTS, adapter_state, assert_same_state, base_model, config, logits, trained

REPO = "me/mixture"
MIXTURES = {"default": ("default",), "experts": EXPERTS[:3]}
WAYS = pytest.mark.parametrize("names", MIXTURES.values(), ids=MIXTURES)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with stand_in_hub(monkeypatch, tmp_path / "cache") as repositories:
        yield repositories


def named(model, name="org/base"):
    """The mixture of a base model that has a name on the hub."""
    model.get_base_model().name_or_path = name
    return model


def from_hub(**options):
    return PeftModel.from_pretrained(base_model(), REPO, **options).eval()


def card_of(hub, revision="main"):
    return hub.files(REPO, revision)["README.md"].decode()


# ---- loading what was pushed ----


@WAYS
@pytest.mark.parametrize("router", [None, stack], ids=["built-in", "attached"])
def test_what_is_pushed_comes_back(hub, names, router):
    model = named(trained(names))
    if router is not None:
        model.attach_router(router().eval())
    info = model.push_to_hub("mixture", commit_message="First", private=True)
    assert info.oid == hub.commit_id(REPO, "main") and info.commit_message == "First"
    loaded = from_hub()
    assert loaded.active_adapters == list(names)
    assert_same_state(adapter_state(loaded), adapter_state(model))
    assert torch.equal(logits(loaded), logits(model))


def test_a_router_of_ones_own_is_given_when_it_is_loaded(hub):
    model = named(trained(EXPERTS[:3]))
    model.attach_router(Gate().eval())
    model.push_to_hub(REPO)
    assert torch.equal(logits(from_hub(router=Gate().eval())), logits(model))


@WAYS
def test_revisions_stay_apart(hub, names):
    first, second = named(trained(names)), named(trained(names, num_experts=4))
    second.attach_router(stack(4 if names == ("default",) else 3).eval())
    commit = first.push_to_hub(REPO).oid
    second.push_to_hub(REPO, revision="more-experts")
    for revision, expected in {"main": first, commit: first, "more-experts": second}.items():
        assert torch.equal(logits(from_hub(revision=revision)), logits(expected)), revision
    with pytest.raises(ValueError, match=r"Can't find 'adapter_config\.json'"):
        from_hub(revision="nowhere")


@WAYS
@pytest.mark.parametrize("router", [None, stack], ids=["built-in", "attached"])
def test_subfolders(hub, tmp_path, names, router):
    models = {"plain": trained(), "deep/down": trained(names, r=3)}
    if router is not None:
        models["deep/down"].attach_router(router().eval())
    for under, model in models.items():
        model.save_pretrained(tmp_path / "saved" / under)
        hub.put_folder(REPO, tmp_path / "saved" / under, under)
    commit = hub.commit_id(REPO, "main")
    hub.commit(REPO, "main", {}, deleted={"deep/down/adapter_model.safetensors"})
    for under, model in models.items():
        assert torch.equal(logits(from_hub(subfolder=under, revision=commit)), logits(model)), under
    with pytest.raises(ValueError, match=r"can't find weights in 'me/mixture'"):
        from_hub(subfolder="deep/down")


def test_one_more_adapter_from_the_hub(hub):
    other = named(trained(num_experts=3))
    other.push_to_hub(REPO, revision="other")
    model = trained(("first",))
    model.load_adapter(REPO, "second", revision="other")
    assert model.active_adapters == ["first"]
    model.set_adapter("second")
    assert torch.equal(logits(model), logits(other))


def test_auto_class_loads_the_base_too(hub, tmp_path):
    base_model().save_pretrained(tmp_path / "base")
    model = named(trained(EXPERTS[:2]), str(tmp_path / "base"))
    with pytest.warns(UserWarning, match=r"no `base_model`, for that is a folder"):
        model.push_to_hub(REPO)
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(REPO).eval()), logits(model))


def test_a_second_push_leaves_nothing_of_the_first(hub, tmp_path):
    """A router of an earlier save would not belong to the files beside it."""
    model = named(trained())
    model.attach_router(stack().eval())
    model.push_to_hub(REPO)
    assert "router.safetensors" in hub.files(REPO)
    model.detach_router()
    model.push_to_hub(REPO)
    assert sorted(hub.files(REPO)) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    downloaded = tmp_path / "downloaded"
    downloaded.mkdir()
    for path, data in hub.files(REPO).items():
        (downloaded / path).write_bytes(data)
    for place in (REPO, downloaded):
        assert torch.equal(logits(PeftModel.from_pretrained(base_model(), place).eval()), logits(model))


def test_damage_on_the_hub_is_told(hub):
    named(trained()).push_to_hub(REPO)
    named(trained(num_experts=4)).push_to_hub("me/other")
    foreign = hub.files("me/other")["adapter_model.safetensors"]
    hub.commit(REPO, "main", {"adapter_model.safetensors": foreign})
    with pytest.raises(ValueError, match="are of different saves"):
        from_hub()


# ---- the card ----


def test_the_card_that_is_pushed(hub):
    named(trained(EXPERTS[:3])).push_to_hub(REPO, tags=["german"])
    card = ModelCard(card_of(hub))
    assert hub.cards == [str(card)]  # the hub was asked before the commit
    card.validate()
    assert card.data.base_model == "org/base" and card.data.library_name == "peft" and card.data.license is None
    assert card.data.pipeline_tag == "text-generation"
    expected = ["base_model:adapter:org/base", "german", "mixture-of-experts", "moelora", "transformers"]
    assert card.data.tags == expected
    assert "| expert_2 | 1 | 2 | yes |" in card.text and "[org/base](https://huggingface.co/org/base)" in card.text
    assert f'from_pretrained(base_model, "{REPO}")' in card.text and f'hf download "{REPO}"' in card.text
    assert "More Information Needed" not in card.text


def test_what_the_owner_wrote_on_the_hub_stays(hub):
    model = named(trained())
    model.push_to_hub(REPO)
    owned = (
        card_of(hub)
        .replace("library_name: peft", "library_name: peft\nlicense: mit")
        .replace("- moelora\n", "- moelora\n- ours\n")
    )
    owned = owned.replace("# A mixture of LoRA experts", "# Our model\n\nIt speaks German.")
    hub.commit(REPO, "main", {"README.md": owned.encode()})
    model.add_adapter("expert_3", config())
    for _ in range(2):
        model.push_to_hub(REPO)
    card = ModelCard(card_of(hub))
    assert card.data.license == "mit" and "ours" in card.data.tags
    assert card.text.startswith("# Our model\n\nIt speaks German.")
    assert card.text.count("| expert_3 | 1 | 2 | yes |") == 1 and card.text.count("import moelora\n") == 1


def test_a_local_base_is_not_named_but_what_the_owner_named_stays(hub, tmp_path):
    base_model().save_pretrained(tmp_path / "base")
    model = named(trained(), str(tmp_path / "base"))
    with pytest.warns(UserWarning, match=r"no `base_model`"):
        model.push_to_hub(REPO)
    card = ModelCard(card_of(hub))
    assert card.data.base_model is None and not [tag for tag in card.data.tags if tag.startswith("base_model")]
    hub.commit(
        REPO, "main", {"README.md": card_of(hub).replace("library_name", "base_model: org/base\nlibrary_name").encode()}
    )
    model.push_to_hub(REPO)
    card = ModelCard(card_of(hub))
    assert card.data.base_model == "org/base" and problems_of_metadata(str(card)) == []


@pytest.mark.parametrize(
    "metadata", ["base_model: /home/me/model", "base_model: ''", "tags: one", "tags:\n- 1", "[]", "license: 2"]
)
def test_the_stand_in_refuses_what_the_hub_refuses(hub, metadata):
    assert len(problems_of_metadata(f"---\n{metadata}\n---\n")) == 1


def test_validation_asks_the_stand_in(hub):
    with pytest.raises(ValueError, match="Use a model id from"):
        ModelCard("---\nbase_model: /home/me/model\n---\n").validate()


def test_an_attached_router_is_told_and_no_server_promised(hub):
    model = named(trained())
    model.push_to_hub(REPO)
    assert "## Serving" in card_of(hub) and "router=module" not in card_of(hub)
    model.attach_router(stack().eval())
    model.push_to_hub(REPO)
    assert "## Serving" not in card_of(hub) and "router=module" in card_of(hub)


def test_nothing_is_committed_where_the_hub_refuses_the_card(hub, monkeypatch):
    model = named(trained())
    monkeypatch.setattr("moelora.storage.model_card.is_on_hub", lambda name: True)
    model.get_base_model().name_or_path = "/home/me/model"
    with pytest.raises(ValueError, match=r'"base_model" with value "/home/me/model" is not valid'):
        model.push_to_hub(REPO)
    assert hub.files(REPO) == {}


def test_the_numbers_of_a_card_are_escaped(hub):
    model = named(trained(("a|b<br>",)))
    model.push_to_hub(REPO)
    assert re.search(r"\| a\\\|b&lt;br> \| 3 \| 2 \| yes \|", card_of(hub))
