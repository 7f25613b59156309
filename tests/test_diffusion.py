"""Mixtures on diffusers' UNet, DiT, SD3 and Flux, beside plain LoRA of the same PEFT."""

import copy
import importlib.util
import inspect
import os
import sys
from pathlib import Path

import pytest
import torch
from helpers import SCOPES, awaken, grads_of, routers_of
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from moelora import MoELoraConfig, load_lora_adapter
from moelora.forward.joint_blocks import text_comes_first

BESIDE = Path(sys.prefix) / "diffusers"  # where `make second` installs it
if importlib.util.find_spec("diffusers") is None and BESIDE.is_dir():
    sys.path.append(os.fspath(BESIDE))
diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.slow

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
JOINT = [*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "net.2"]


def unet(tokens=5):
    model = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1, sample_size=8, cross_attention_dim=12,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2, in_channels=4, out_channels=4,
    )  # fmt: skip
    return model, {
        "sample": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([3, 700]),
        "encoder_hidden_states": torch.randn(2, tokens, 12),
    }


def dit():
    model = diffusers.DiTTransformer2DModel(
        sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=4, in_channels=4,
        out_channels=8, attention_bias=True, activation_fn="gelu-approximate", num_embeds_ada_norm=1000,
        norm_type="ada_norm_zero", norm_elementwise_affine=False, dropout=0.0,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([3, 700]),
        "class_labels": torch.tensor([1, 2]),
    }


def sd3(tokens=7):
    model = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=4,
        caption_projection_dim=32, joint_attention_dim=32, pooled_projection_dim=64, out_channels=4,
        pos_embed_max_size=96, dual_attention_layers=(), qk_norm=None,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(2, 4, 4, 4),
        "encoder_hidden_states": torch.randn(2, tokens, 32),
        "pooled_projections": torch.randn(2, 64),
        "timestep": torch.tensor([3, 700]),
    }


def flux(tokens=7):
    model = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8],
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(2, 16, 4),
        "encoder_hidden_states": torch.randn(2, tokens, 32),
        "pooled_projections": torch.randn(2, 32),
        "timestep": torch.tensor([0.003, 0.7]),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(tokens, 3),
    }


TARGETS = {unet: ATTENTION, dit: [*ATTENTION, "net.2"], sd3: JOINT, flux: [*JOINT, "proj_mlp"]}
WITH_ADD_ADAPTER = [unet, sd3, flux]
CASES = [(build, kind) for build in TARGETS for kind in ("lora", *SCOPES)]


def config(kind, build, **options):
    options = {"r": 2, "target_modules": TARGETS[build], "init_lora_weights": True} | options
    if kind == "lora":
        return LoraConfig(**options)
    return MoELoraConfig(router_scope=kind, **({"router_type": "learned"} | options))


def made(build, **options):
    torch.manual_seed(0)
    return build(**options)


def adapted(build, kind, **options):
    base, inputs = made(build)
    torch.manual_seed(1)
    model = get_peft_model(base, config(kind, build, **options))
    awaken(model)
    return model.eval(), inputs


def run(model, inputs, **options):
    return model(**inputs, **options).sample


# ---- through get_peft_model ----


@pytest.mark.parametrize(("build", "kind"), CASES)
def test_a_fresh_adapter_changes_nothing_and_a_step_trains_all(build, kind):
    base, inputs = made(build)
    base.eval()
    expected = run(base, inputs)
    model = get_peft_model(base, config(kind, build))
    torch.testing.assert_close(run(model.eval(), inputs), expected, rtol=1e-4, atol=1e-5)
    awaken(model)
    (run(model.train(), inputs) - 1).square().mean().backward()
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    # The text's part of the last block of SD3 goes nowhere.
    assert {name for name in learning - grads_of(model).keys() if "lora_router" not in name} == set()


@pytest.mark.parametrize("return_dict", [True, False])
@pytest.mark.parametrize("build", TARGETS)
def test_a_loss_of_ones_own_carries_the_balancing_loss(build, return_dict):
    gradients = []
    for coef in (0.0, 0.5):
        model, inputs = adapted(build, "block", router_aux_loss_coef=coef)
        output = model.train()(**inputs, return_dict=return_dict)
        (output.sample if return_dict else output[0]).square().mean().backward()
        gradients.append(grads_of(model))
    model.zero_grad()
    model(**inputs)
    model.balancing_loss.backward()
    balancing = grads_of(model)
    assert balancing
    for name, gradient in balancing.items():
        torch.testing.assert_close(gradients[1][name] - gradients[0][name], 0.5 * gradient, rtol=1e-3, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize(("build", "kind"), [case for case in CASES if case[1] != "lora"])
def test_every_linear_gets_the_weights_of_its_own_tokens(build, kind):
    """A mixture whose experts are all alike, weighed to 1, is that LoRA, wherever its tokens come from."""
    model, inputs = adapted(build, kind)
    single, _ = adapted(build, "lora")
    factors = dict(single.named_parameters())
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.copy_(factors[name].repeat(4, 1))
        elif "lora_B" in name:
            parameter.copy_(factors[name].repeat(1, 4))
    torch.testing.assert_close(run(model, inputs), run(single, inputs), rtol=1e-3, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("build", [sd3, flux])
@pytest.mark.parametrize("tokens", [7, 16])
def test_text_and_picture_are_told_apart(build, tokens):
    """By a router that knows tokens of the text: what it says of them comes where they are, also where text and picture
    have equally many tokens."""
    base, inputs = made(build, tokens=tokens)
    model = get_peft_model(base, config("block", build, router_type="fixed")).eval()
    awaken(model)
    seen = {}

    def spy(layer, args, kwargs):
        routing = layer.link.routing
        routing.weights = torch.full((*routing.lead, 4), 1.0)
        routing.encoder_weights = torch.full((*routing.encoder_hidden.shape[:2], 4), 2.0)
        seen[layer.link.name] = routing.weights_for(args[0], layer.link.name)[0, :, 0].tolist()

    for module in model.modules():
        if hasattr(module, "link"):
            module.register_forward_pre_hook(spy, with_kwargs=True)
    run(model, inputs)
    assert len(seen) == len([module for module in model.modules() if hasattr(module, "link")])
    for name, weights in seen.items():
        if "single" in name:
            assert weights == [2.0] * tokens + [1.0] * 16, name
        elif "add_" in name or "ff_context" in name:
            assert weights == [2.0] * tokens, name
        else:
            assert weights == [1.0] * 16, name


@torch.no_grad()
@pytest.mark.parametrize(("build", "kind"), [case for case in CASES if case[1] in ("block", "module")])
def test_routing_depends_on_the_token_and_on_the_time_step(build, kind):
    model, inputs = adapted(build, kind)
    routers = list(routers_of(model).values())
    decided = {}
    for router in routers:
        router.register_forward_hook(lambda module, args, output: decided.setdefault(module, []).append(output))
    earlier = inputs | {"timestep": inputs["timestep"].flip(0)}
    for given in (inputs, earlier):
        run(model, given)
    last = decided[[router for router in routers if "attn2" not in router.name][-1]]
    assert not torch.allclose(last[0], last[-1], atol=1e-3), "the time step makes no difference"
    assert (last[0].flatten(0, -2).std(dim=0) > 1e-3).any(), "all tokens are routed alike"


@pytest.mark.parametrize("kind", ["block", "module"])
@pytest.mark.parametrize("build", TARGETS)
def test_gradient_checkpointing_changes_nothing(build, kind):
    gradients, counted = [], []
    for checkpoints in (False, True):
        model, inputs = adapted(build, kind, expert_capacity_factor=0.7, target_modules=_with_time(build, kind))
        if checkpoints:
            model.get_base_model().enable_gradient_checkpointing()
        run(model.train(), inputs).square().mean().backward()
        gradients.append(grads_of(model))
        counted.append({name: stats.num_tokens for name, stats in model.routing_stats().items()})
    assert counted[0] == counted[1] and gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-6)


def _with_time(build, kind):
    return [*TARGETS[build], "time_emb_proj"] if build is unet and kind == "module" else TARGETS[build]


def test_what_cannot_be_routed_is_refused_and_the_base_stays(tmp_path):
    base, inputs = made(unet)
    expected = run(base.eval(), inputs)
    before = [(name, type(module)) for name, module in base.named_modules()]
    with pytest.raises(ValueError, match=r"`\S*conv1` is a (LoRACompatible)?Conv2d, which a mixture cannot route"):
        get_peft_model(base, config("block", unet, target_modules=["to_q", "conv1"]))
    with pytest.raises(ValueError, match="conv1` is a"):
        base.add_adapter(config("block", unet, target_modules=["to_q", "conv1"]))
    assert [(name, type(module)) for name, module in base.named_modules()] == before
    assert torch.equal(run(base, inputs), expected)


def test_the_order_of_text_and_picture_is_read_from_the_source():
    blocks = inspect.getmodule(diffusers.FluxTransformer2DModel)
    assert text_comes_first(blocks.FluxSingleTransformerBlock.forward) is True
    assert text_comes_first(blocks.FluxTransformerBlock.forward) is None
    assert text_comes_first(nn.Linear.forward) is None


@torch.no_grad()
@pytest.mark.parametrize(("build", "kind"), CASES)
def test_saved_and_loaded(tmp_path, build, kind):
    model, inputs = adapted(build, kind)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(made(build)[0], tmp_path).eval()
    weights = again.state_dict()
    assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items())
    # Where tensors lie in memory decides how some processors round: not to the last bit, a plain LoRA's neither.
    torch.testing.assert_close(run(again, inputs), run(model, inputs))


STORED = torch.float8_e4m3fn


def cast_base(model):
    """As the model's own method does it, which passes over LoRAs."""
    model.get_base_model().enable_layerwise_casting(storage_dtype=STORED, compute_dtype=torch.float32)


def cast_all(model):
    skipped = ("norm", "pos_embed")
    diffusers.hooks.apply_layerwise_casting(model.get_base_model(), STORED, torch.float32, skipped)


@torch.no_grad()
@pytest.mark.parametrize("cast_weights", [cast_base, cast_all])
@pytest.mark.parametrize(("build", "kind"), CASES)
def test_layerwise_casting(build, kind, cast_weights):
    """Weights are stored in eight bits, and computed as if they had been rounded to them."""
    model, inputs = adapted(build, kind)
    rounded = copy.deepcopy(model)
    cast_weights(model)
    cast = [name for name, parameter in model.named_parameters() if parameter.dtype == STORED]
    assert cast and any("lora_B" in name for name in cast) == (cast_weights is cast_all)
    for name in cast:
        parameter = rounded.get_parameter(name)
        parameter.copy_(parameter.to(STORED).float())
    torch.testing.assert_close(run(model, inputs), run(rounded, inputs), rtol=1e-3, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(("build", "kind"), CASES)
def test_an_adapter_on_a_base_that_is_cast(build, kind):
    base, inputs = made(build)
    base.enable_layerwise_casting(storage_dtype=STORED, compute_dtype=torch.float32)
    torch.manual_seed(1)
    model = get_peft_model(base, config(kind, build)).eval()
    assert {p.dtype for name, p in model.named_parameters() if "lora" in name} == {torch.float32}
    awaken(model)
    expected, _ = adapted(build, kind)
    cast_base(expected)
    torch.testing.assert_close(run(model, inputs), run(expected, inputs), rtol=1e-4, atol=1e-5)


# ---- through diffusers ----


@torch.no_grad()
@pytest.mark.parametrize("kind", ["lora", "block", "module"])
@pytest.mark.parametrize("build", WITH_ADD_ADAPTER)
def test_add_adapter(tmp_path, build, kind):
    base, inputs = made(build)
    plain = run(base.eval(), inputs)
    base.add_adapter(config(kind, build))
    awaken(base)
    expected = run(base, inputs)
    assert not torch.allclose(expected, plain, atol=1e-3)
    base.disable_adapters()
    assert torch.equal(run(base, inputs), plain)
    base.enable_adapters()
    assert torch.equal(run(base, inputs), expected)
    base.save_lora_adapter(tmp_path)
    again, _ = made(build)
    if kind == "lora":
        again.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
    else:
        with pytest.raises(TypeError, match="`LoraConfig` class could not be instantiated"):
            again.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
        load_lora_adapter(again, tmp_path)
    assert torch.equal(run(again.eval(), inputs), expected)
    base.unload_lora()
    assert torch.equal(run(base, inputs), plain)
    assert not [name for name, _ in base.named_modules() if "lora" in name or "moe" in name]
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in base.modules())


@torch.no_grad()
@pytest.mark.parametrize("kind", ["lora", "block"])
def test_scales_of_adapters(kind):
    base, inputs = made(unet)
    base.eval().add_adapter(config(kind, unet))
    awaken(base)
    whole, half = run(base, inputs), run(base, inputs, cross_attention_kwargs={"scale": 0.5})
    assert not torch.allclose(whole, half, atol=1e-3)
    torch.testing.assert_close(run(base, inputs), whole)
    base.set_adapters("default", 0.5)
    torch.testing.assert_close(run(base, inputs), half)
    base.delete_adapters("default")
    torch.testing.assert_close(run(base, inputs), run(made(unet)[0].eval(), inputs))


def test_a_file_that_does_not_fit_is_refused(tmp_path):
    base, _ = made(unet)
    with pytest.raises(ValueError, match="there is no"):
        load_lora_adapter(base, tmp_path)
    base.add_adapter(config("lora", unet))
    base.save_lora_adapter(tmp_path / "plain")
    with pytest.raises(ValueError, match="holds no mixture"):
        load_lora_adapter(base, tmp_path / "plain", "mixture")
    other, _ = made(unet)
    other.add_adapter(config("block", unet))
    other.save_lora_adapter(tmp_path / "mixture")
    (tmp_path / "cut").mkdir()
    whole = (tmp_path / "mixture" / "pytorch_lora_weights.safetensors").read_bytes()
    (tmp_path / "cut" / "pytorch_lora_weights.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="is damaged"):
        load_lora_adapter(made(unet)[0], tmp_path / "cut")
    larger = diffusers.UNet2DConditionModel(**(dict(other.config) | {"block_out_channels": (8, 32)}))
    with pytest.raises(ValueError, match="does not fit the model"):
        load_lora_adapter(larger, tmp_path / "mixture")
