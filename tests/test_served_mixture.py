"""A mixture as servers take it: one LoRA, routers beside it, and the weights of a batch in which slots are mixed."""

import copy

import pytest
import torch
from helpers import ARCHITECTURES, VOCAB, awaken, mixture_of
from loras import save_kinds
from native import native_model
from peft import get_peft_model
from test_domain_classifier import mixture_of_domains
from torch import nn

from moelora import MoELoraConfig
from moelora.experts import build, grow
from moelora.files.atomic_save import PENDING, ROUTER_NAME
from moelora.routing import route
from moelora.routing.domain_classifier import over_context
from moelora.routing.pooled import score
from moelora.schema import UserError
from moelora.serving.mixture import read_served_mixture
from moelora.serving.slots import Slots, groups_of, write_gates

TEXT = torch.randint(2, VOCAB, (1, 21), generator=torch.Generator().manual_seed(0))


def grown(**options):
    model = mixture_of("llama", **options)
    grow(model, 2)
    awaken(model)
    return model


def of_every_age():
    model = mixture_of("llama", router_type="learned_with_maturity")
    for expert, value in enumerate((0.0, 0.3, 1.0, 0.7)):
        model.set_expert_maturity(expert, value)
    return model


def with_set_weights():
    model = mixture_of("llama", router_type="fixed", routing_scale=3.0)
    model.set_routing_weights([0.1, 0.5, -0.2, 0.6])
    return model


def in_other_blocks():
    model = mixture_of("llama", layers_to_transform=[0])
    config = copy.deepcopy(model.peft_config["default"])
    config.layers_to_transform, config.target_modules, config.num_experts = None, {"v_proj", "down_proj"}, 2
    config.r, config.lora_alpha = 3, 5
    model.add_adapter("other", config)
    model.set_adapter(["default", "other"])
    awaken(model)
    return model


MODELS = {
    "sparse": lambda: mixture_of("llama"),
    "dense": lambda: mixture_of("llama", top_k_experts=4, router_temperature=1.0, routing_scale=4.0),
    "of every age": of_every_age,
    "capacity": lambda: mixture_of("llama", expert_capacity_factor=0.5),
    "fixed": lambda: mixture_of("llama", router_type="fixed", routing_scale=3.0),
    "set weights": with_set_weights,
    "two layers": lambda: mixture_of("llama", router_hidden_size=12),
    "sigmoid": lambda: mixture_of("llama", router_type="sigmoid", load_balance_loss_type="loss_free"),
    "per model": lambda: mixture_of("llama", router_scope="model"),
    "per module": lambda: mixture_of("llama", router_scope="module"),
    "patterns": lambda: mixture_of("llama", rank_pattern={"q_proj": 2}, alpha_pattern={"up_proj": 9}, use_rslora=True),
    "grown": grown,
    "domains": mixture_of_domains,
    "domains, 5 tokens": lambda: mixture_of_domains(domain_window=5),
    "domains, whole text": lambda: mixture_of_domains(domain_window=None),
    "domains, per model": lambda: mixture_of_domains(domain_window=None, router_scope="model"),
    "in other blocks": in_other_blocks,
}


def of_one_text(router, rows, densities_TA, window):
    return over_context(densities_TA[None], window)[0]


class Server(nn.Module):
    """What a server makes of a base and a mixture: two products a linear, and what is between them."""

    def __init__(self, base, served):
        super().__init__()
        self.base, self.slots, self.served = base, Slots(of_one_text), served
        self.slots.set(3, served)
        self.gates = {}
        for index, (name, block) in enumerate(base.model.layers.named_children()):
            block.register_forward_pre_hook(self.enter(f"model.layers.{name}", index == 0), with_kwargs=True)
        for name in served.factors:
            base.get_submodule(name).register_forward_hook(self.add(name))

    def enter(self, name, is_first):
        def before(block, args, kwargs):
            hidden = args[0][0]
            self.gates = {}
            if self.served.routers:
                groups = [(3, slice(0, hidden.shape[0]))]
                self.gates = self.slots.block_gates(name, is_first, hidden, groups)

        return before

    def add(self, name):
        def after(linear, args, output):
            A, B = self.served.factors[name]
            x = args[0][0]
            gates = self.gates | self.slots.linear_gates(name, x, [(3, slice(0, x.shape[0]))])
            return output + (x @ A.t() * gates.get(3, 1.0)) @ B.t()

        return after


@pytest.mark.parametrize("kind", MODELS)
def test_is_the_mixture_that_was_saved(kind, tmp_path):
    model = MODELS[kind]().eval()
    model.save_pretrained(str(tmp_path))
    with torch.no_grad():
        expected = model(input_ids=TEXT).logits
        with model.disable_adapter():
            assert not torch.allclose(model(input_ids=TEXT).logits, expected, atol=1e-2)
    server = Server(ARCHITECTURES["llama"].build().eval(), read_served_mixture(tmp_path))
    with torch.no_grad():
        torch.testing.assert_close(server.base(input_ids=TEXT).logits, expected, rtol=1e-3, atol=1e-3)


def test_of_imported_loras(tmp_path):
    loras = save_kinds(tmp_path / "loras", ["plain", "rslora", "patterns"])
    model = build(ARCHITECTURES["llama"].build(), loras, "arrow").eval()
    model.save_pretrained(str(tmp_path / "mixture"))
    served = read_served_mixture(tmp_path / "mixture")
    assert (served.num_experts, served.expert_rank) == (3, 5)
    server = Server(ARCHITECTURES["llama"].build().eval(), served)
    with torch.no_grad():
        expected = model(input_ids=TEXT).logits
        torch.testing.assert_close(server.base(input_ids=TEXT).logits, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["sparse", "dense", "of every age", "grown"])
def test_fewer_operations_give_the_same_weights(kind, dtype, tmp_path):
    MODELS[kind]().save_pretrained(str(tmp_path))
    router = next(iter(read_served_mixture(tmp_path).routers.values()))
    assert router.is_softmax
    hidden = torch.randn(9, router.first_NH.shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
    config = router.config
    scored = score(router.routers, hidden, router.first_NH, config.router_kind, config.router_temperature, None)
    expected = route(
        scored.logits, top_k=router.top_k, temperature=config.router_temperature, maturity_E=router.maturity_E
    ).weights
    torch.testing.assert_close(router.weights(hidden, None), expected * config.routing_scale)


def test_slots_do_not_mix(tmp_path):
    """Tokens of two mixtures, of a plain LoRA and of none, in any order."""
    served = {}
    for slot, kind in ((0, "sparse"), (2, "dense")):
        MODELS[kind]().save_pretrained(str(tmp_path / kind))
        served[slot] = read_served_mixture(tmp_path / kind)
    slots = Slots(of_one_text)
    for slot, mixture in served.items():
        slots.set(slot, mixture)
    of_token = [2, 0, -1, 0, 1, 2, 2, -1]
    hidden = torch.randn(len(of_token), 32, generator=torch.Generator().manual_seed(2))
    gate = torch.full((len(of_token), 20), 7.0)
    groups = groups_of(of_token)
    write_gates(slots.block_gates("model.layers.1", False, hidden, groups), groups, gate)
    for token, slot in enumerate(of_token):
        mixture = served.get(slot)
        if mixture is None:
            assert (gate[token] == 7).all()
        else:
            weights = mixture.routers["model.layers.1"].weights(hidden[token : token + 1], None)[0]
            torch.testing.assert_close(gate[token, : mixture.rank], weights.repeat_interleave(mixture.expert_rank))
            assert (gate[token, mixture.rank :] == 7).all()


def test_each_mixture_of_a_batch_has_its_own_window(tmp_path):
    windows, slots, asked = {0: None, 2: 5, 3: 64}, Slots(lambda *given: asked.append(given[1:]) or given[2]), []
    for slot, window in windows.items():
        mixture_of_domains(domain_window=window).save_pretrained(str(tmp_path / str(slot)))
        slots.set(slot, read_served_mixture(tmp_path / str(slot)))
    groups = [(2, slice(0, 3)), (0, slice(3, 4)), (3, slice(4, 6))]
    slots.block_gates("model.layers.1", False, torch.randn(6, 32), groups)
    assert [(rows, window) for rows, _, window in asked] == [(rows, windows[slot]) for slot, rows in groups]


def test_an_attached_router_is_refused(tmp_path):
    model = mixture_of("llama")
    model.base_model.attach_router(nn.Sequential(nn.Linear(32, 4), nn.Softmax(dim=-1)))
    model.save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match=r"an attached router \(router.safetensors\) decides"):
        read_served_mixture(tmp_path)


def test_an_attached_router_of_a_save_that_was_cut_short_is_refused(tmp_path):
    model = mixture_of("llama")
    model.base_model.attach_router(nn.Sequential(nn.Linear(32, 4), nn.Softmax(dim=-1)))
    model.save_pretrained(str(tmp_path))
    (tmp_path / PENDING).mkdir()
    (tmp_path / ROUTER_NAME).rename(tmp_path / PENDING / ROUTER_NAME)  # before it took its place
    with pytest.raises(ValueError, match=r"an attached router \(router.safetensors\) decides"):
        read_served_mixture(tmp_path)


def test_what_is_more_than_experts_is_refused(tmp_path):
    mixture_of("llama", modules_to_save=["norm"]).save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="more than experts and routers"):
        read_served_mixture(tmp_path)


def test_adapted_native_experts_are_refused(tmp_path):
    config = MoELoraConfig(target_modules="all-linear", r=2, task_type="CAUSAL_LM")
    get_peft_model(native_model("mixtral"), config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"adapter 'default' adapts the base's native experts \(`target_parameters`\)"):
        read_served_mixture(tmp_path)


def test_what_is_no_mixture_is_refused(tmp_path):
    with pytest.raises(UserError, match="no adapter"):
        read_served_mixture(tmp_path)
