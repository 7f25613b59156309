"""Router types and balancing losses are plug-ins: one registered here works like those that come along."""

import math

import pytest
import torch
from helpers import (
    ARCHITECTURES,
    HIDDEN,
    SCOPES,
    awaken,
    config_for,
    llama,
    mixture_of,
    routers_of,
    train_step,
)
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny import tiny_recipe, tiny_tokenizer, write_recipe

import moelora
from moelora import MoELoraConfig
from moelora.cli import main
from moelora.experts import grow
from moelora.experts.parts import put_together, select, take_apart
from moelora.routing import (
    BALANCING_LOSSES,
    ROUTER_KINDS,
    BalancingLoss,
    Router,
    RouterKind,
    register_balancing_loss,
    register_router_kind,
    rms_norm,
    route,
)
from moelora.routing.decision import top_k_mask

IDS = torch.randint(2, 64, (3, 7), generator=torch.Generator().manual_seed(1))
BATCH = {"input_ids": IDS, "labels": IDS}


@pytest.fixture
def _registered():
    """A router that prefers the experts its scores are lowest for, and a loss that wants probabilities alike."""

    class Contrary(Router):
        def logits(self, first):
            return -super().logits(first)

    register_router_kind(RouterKind("contrary", "the last come first", "w of -z", make=Contrary))
    register_balancing_loss(
        BalancingLoss(
            "even", "even sums", "Σ P²", "here", of=lambda s: (s.probs / s.num_tokens[..., None]).square().sum(-1)
        )
    )
    yield
    del ROUTER_KINDS["contrary"], BALANCING_LOSSES["even"]


@pytest.mark.usefixtures("_registered")
@pytest.mark.parametrize("scope", SCOPES)
def test_a_registered_router_and_loss_work_throughout(scope, tmp_path):
    model = mixture_of("llama", router_type="contrary", load_balance_loss_type="even", router_scope=scope)
    plain = mixture_of("llama", router_type="learned", router_scope=scope)
    hidden = torch.randn(2, 5, next(iter(routers_of(model).values())).hidden_size)
    router, other = (next(iter(routers_of(each).values())) for each in (model, plain))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.neg_()
    assert torch.equal(router.decide(hidden), other.decide(hidden))
    _, gradients = train_step(model, BATCH)
    assert any("lora_router" in name and grad.any() for name, grad in gradients.items())
    assert 0.25 <= model.base_model.balancing_loss <= 1  # of four experts' probabilities
    model.eval().save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(mixture_of("llama").unload(), str(tmp_path))
    assert torch.equal(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_an_unknown_router_type_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match=r"`router_type` \('contrary'\).*maturity, fixed, sigmoid"):
        MoELoraConfig(router_type="contrary")
    with pytest.raises(ValueError, match=r"`load_balance_loss_type` \(.*z_loss, switch, loss_free"):
        MoELoraConfig(load_balance_loss_type=["aux_loss"])


@pytest.mark.parametrize(
    ("field", "was", "becomes"),
    [
        ("load_balance_loss_type", "aux_loss", "loss_free"),
        ("load_balance_loss_type", "loss_free", "aux_loss"),
        ("router_type", "learned", "sigmoid"),
        ("router_type", "sigmoid", "learned"),
    ],
)
def test_a_configuration_that_no_longer_fits_its_routers_is_refused(field, was, becomes):
    """It would do nothing, and be saved as what cannot be loaded, or as what loads and routes in another way."""
    model = mixture_of("llama", **({"router_type": "learned"} | {field: was}))
    model(**BATCH)
    setattr(model.peft_config["default"], field, becomes)
    for call in (lambda: model(**BATCH), lambda: next(iter(routers_of(model).values())).decide(torch.randn(2, HIDDEN))):
        with pytest.raises(ValueError, match=rf"`{field}` was set to '{becomes}' after .*set it back, or make"):
            call()
    setattr(model.peft_config["default"], field, was)
    assert model(**BATCH).loss.isfinite()


# ---- sigmoid ----


@pytest.mark.parametrize("router_hidden_size", [None, 5])
def test_sigmoid_scores_are_normalised_over_the_chosen(router_hidden_size):
    model = mixture_of("llama", router_type="sigmoid", router_hidden_size=router_hidden_size, router_temperature=1.0)
    router = next(iter(routers_of(model).values()))
    hidden = torch.randn(2, 5, HIDDEN)
    scorer = router["default"]
    raw = Router.logits(scorer, rms_norm(hidden) @ scorer.first_weight.T)
    scores = torch.sigmoid(raw)
    chosen = scores * top_k_mask(scores, 2)
    torch.testing.assert_close(router.decide(hidden), chosen / chosen.sum(-1, keepdim=True))


def test_sigmoid_gradients_are_those_of_the_formula():
    model = mixture_of("llama", router_type="sigmoid", router_temperature=1.0, expert_capacity_factor=None)
    router = next(iter(routers_of(model).values()))
    hidden, wanted = torch.randn(1, 5, HIDDEN), torch.randn(1, 5, 4)
    weight = router["default"].weight
    scores = torch.sigmoid(rms_norm(hidden) @ weight.T)
    chosen = scores * top_k_mask(scores, 2)
    (expected,) = torch.autograd.grad((chosen / chosen.sum(-1, keepdim=True) * wanted).sum(), weight)
    (actual,) = torch.autograd.grad((router.decide(hidden) * wanted).sum(), weight)
    torch.testing.assert_close(actual, expected)


# ---- balancing without a loss ----


def loss_free(speed=0.25, **options):
    defaults = {"router_type": "learned", "load_balance_loss_type": "loss_free", "bias_update_speed": speed}
    return mixture_of("llama", **(defaults | {"expert_capacity_factor": None} | options))


def biases_of(model):
    return {name: router.selection_bias() for name, router in routers_of(model).items()}


def test_a_bias_chooses_and_weighs_nothing():
    logits = torch.randn(6, 4)
    bias = torch.tensor([0.0, 0.9, 0.0, -0.9])
    probs = logits.softmax(-1)
    routed = route(logits, top_k=2, bias_E=bias)
    assert torch.equal(routed.selected, top_k_mask(probs + bias, 2))
    assert not torch.equal(routed.selected, top_k_mask(probs, 2)), "the bias changed nothing"
    chosen = probs * routed.selected
    torch.testing.assert_close(routed.weights, chosen / chosen.sum(-1, keepdim=True))


def test_a_bias_is_added_to_the_scores_as_they_are():
    """Sigmoid scores do not add up to 1, and their softmax does: the bias meets the former."""
    logits = torch.nn.functional.logsigmoid(torch.randn(50, 4) * 3)
    bias = torch.tensor([0.2, -0.3, 0.1, 0.0])
    routed = route(logits, top_k=2, bias_E=bias, log_scores_TE=logits)
    assert torch.equal(routed.selected, top_k_mask(logits.exp() + bias, 2))
    far = torch.full((1, 4), -200.0)  # scores that float32 takes for zero
    assert route(far, top_k=1, bias_E=bias, log_scores_TE=far).weights.isfinite().all()


@pytest.mark.parametrize("router_type", ["learned", "learned_with_maturity", "sigmoid"])
def test_biases_move_against_the_load_once_a_step(router_type):
    model = loss_free(router_type=router_type, maturity_tokens=10).train()
    before = biases_of(model)
    counts = {name: router["default"].tokens_per_expert.clone() for name, router in routers_of(model).items()}
    train_step(model, BATCH)
    for name, router in routers_of(model).items():
        taken = (router["default"].tokens_per_expert - counts[name]).float()
        assert taken.sum() == 2 * IDS.numel()
        assert torch.equal(biases_of(model)[name] - before[name], 0.25 * torch.sign(taken.mean() - taken))
    model.eval()(**BATCH)
    with torch.no_grad():
        model.train()(**BATCH)
    after = biases_of(model)
    assert all(torch.equal(after[name], biases_of(model)[name]) for name in after)


def test_the_load_becomes_even():
    """All tokens want the same two experts; without a loss in the gradients, the biases bring in the others."""
    model = loss_free(speed=0.002)
    with torch.no_grad():
        for router in routers_of(model).values():
            router["default"].weight[2:] = router["default"].weight[:2].mean(0) / 4
    ids = torch.randint(2, 64, (8, 32))

    def unevenness():
        model.base_model.routing_stats(reset=True)
        model.eval()(input_ids=ids)
        return max(max(stats.expert_load) for stats in model.base_model.routing_stats(reset=True).values())

    first = unevenness()
    for _ in range(60):
        model.train()(input_ids=ids, labels=ids)
    assert first > 0.28
    assert unevenness() - 0.25 < (first - 0.25) / 2


def test_it_adds_nothing_to_the_loss_and_reports_the_load():
    quiet = mixture_of("llama", router_type="learned", router_aux_loss_coef=0.0, expert_capacity_factor=None)
    model = loss_free(router_aux_loss_coef=5.0)
    loss, gradients = train_step(model, BATCH)
    expected, theirs = train_step(quiet, BATCH)
    assert torch.equal(loss, expected)
    assert all(torch.equal(gradients[name], grad) for name, grad in theirs.items())
    assert not model.base_model.balancing_loss.requires_grad
    torch.testing.assert_close(model.base_model.balancing_loss, quiet.base_model.balancing_loss.detach())


def test_a_recomputed_block_chooses_as_it_did():
    """Biases have moved by the time backward runs a block again."""
    plain = loss_free(router_scope="module", speed=3.0)
    again = loss_free(router_scope="module", speed=3.0)
    again.enable_input_require_grads()
    again.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    _, expected = train_step(plain, BATCH)
    _, actual = train_step(again, BATCH)
    assert all(torch.equal(actual[name], grad) for name, grad in expected.items())
    assert any(bias.any() for bias in biases_of(again).values())


def test_biases_are_saved_and_go_on_exactly(tmp_path):
    model = loss_free(router_type="sigmoid")
    train_step(model, BATCH)
    assert any(bias.any() for bias in biases_of(model).values())
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(mixture_of("llama").unload(), str(tmp_path), is_trainable=True)
    for each in (model, loaded):
        train_step(each, BATCH)
    ours, theirs = biases_of(model), biases_of(loaded)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert torch.equal(model.eval()(input_ids=IDS).logits, loaded.eval()(input_ids=IDS).logits)


def test_frozen_biases_stand_still_while_a_new_adapter_learns():
    model = loss_free(experts=True)
    model.set_adapter([f"expert_{i}" for i in range(4)])
    for router in routers_of(model).values():
        router["expert_0"].requires_grad_(False)
    train_step(model, BATCH)
    for router in routers_of(model).values():
        assert not router["expert_0"].selection_bias.any()
    assert any(router["expert_1"].selection_bias.any() for router in routers_of(model).values())


@pytest.mark.parametrize("router_type", ["learned", "sigmoid"])
def test_an_adapter_that_is_sure_of_its_domain_routes_as_if_alone(router_type):
    """The domain classifier multiplies scores and biases alike."""
    model = loss_free(router_type=router_type, router_temperature=1.0)
    model.add_adapter("other", model.peft_config["default"])
    model.set_adapter(["default", "other"])
    train_step(model, BATCH)
    texts = {"default": torch.tensor([[3, 4, 5, 6] * 6]), "other": torch.tensor([[40, 41, 42, 43] * 6])}
    for name, ids in texts.items():
        moelora.experts.learn_domain(model, name, [{"input_ids": ids}], rank=2)
    hidden = torch.randn(1, 5, HIDDEN)
    router = next(iter(routers_of(model).values()))
    with torch.no_grad():
        for name in texts:
            router[name].selection_bias.copy_(torch.tensor([0.3, -0.3, 0.1, 0.0]))
    model.set_adapter("default")
    alone = router.decide(hidden)
    model.set_adapter(["default", "other"])
    assert router.routes_by_domain
    with torch.no_grad():
        router["default"].gate_bias.fill_(1e4)  # sure of every token
    torch.testing.assert_close(router.decide(hidden)[..., :4], alone)


@pytest.mark.parametrize("router_type", ["learned", "sigmoid"])
def test_parts_keep_their_biases(router_type):
    model = loss_free(router_type=router_type)
    train_step(model, BATCH)
    before = model.eval()(input_ids=IDS).logits.detach().clone()
    assert torch.equal(put_together(model, take_apart(model)).eval()(input_ids=IDS).logits, before)


def test_each_expert_takes_its_bias_along():
    model = loss_free()
    train_step(model, BATCH)
    before = biases_of(model)
    assert any(len(set(bias.tolist())) > 1 for bias in before.values()), "all biases are alike"
    smaller = put_together(model, select(take_apart(model), [3, 1]))
    for name, bias in biases_of(smaller).items():
        assert torch.equal(bias, before[name][[1, 3]])


@pytest.mark.parametrize("router_type", ["learned", "sigmoid"])
def test_the_report_looks_at_them(router_type):
    tokenizer = tiny_tokenizer()
    config = config_for(
        ARCHITECTURES["llama"], router_type=router_type, load_balance_loss_type="loss_free", bias_update_speed=0.25
    )
    model = get_peft_model(llama(vocab_size=len(tokenizer)), config)
    awaken(model)
    train_step(model, BATCH)
    found = moelora.analyze(model, {"one": ["some text", "more of it"], "two": ["other words"]}, tokenizer)
    assert found.load.shape == (2, 2, 4)
    assert all(1 / 4 <= value <= 1 for value in found.sharpness)
    assert math.isclose(found.load[0, 0].sum(), 1.0, rel_tol=1e-6)


@pytest.mark.parametrize("router_type", ["learned_with_maturity", "sigmoid"])
def test_a_mixture_grows_with_biases_of_its_own(router_type):
    model = loss_free(router_type=router_type, maturity_tokens=10)
    train_step(model, BATCH)
    before = {name: router["default"].selection_bias.clone() for name, router in routers_of(model).items()}
    name = grow(model, 2)
    train_step(model, BATCH)
    for router_name, router in routers_of(model).items():
        assert torch.equal(router["default"].selection_bias, before[router_name]), "its scores are frozen"
    assert any(router[name].selection_bias.any() for router in routers_of(model).values())


@pytest.mark.slow
def test_a_job_learns_one_domain_after_another_with_them(tmp_path):
    recipe = tiny_recipe(tmp_path)
    recipe["mixture"] |= {"router_type": "sigmoid", "load_balance_loss_type": "loss_free", "num_experts": 2}
    second = {**recipe, "data": recipe["data"][1:], "training": {**recipe["training"], "output_dir": "grown"}}
    recipe["data"] = recipe["data"][:1]
    assert main(["train", str(write_recipe(tmp_path, recipe))]) == 0
    del second["mixture"]["router_type"], second["mixture"]["load_balance_loss_type"]
    assert main(["train", str(write_recipe(tmp_path, second)), "--grow", str(tmp_path / "out")]) == 0
    grown = load_file(tmp_path / "grown" / "adapter_model.safetensors")
    biases = [value for key, value in grown.items() if key.endswith("selection_bias")]
    assert len(biases) == 4 and all(value.any() for value in biases)
    report = ["report", "--adapter", str(tmp_path / "grown"), "--out", str(tmp_path / "page.html")]
    assert main([*report, "--data", f"counting={tmp_path / recipe['data'][0]['path']}"]) == 0
    assert main(["inspect", str(tmp_path / "grown")]) == 0
