"""What only a GPU can show: devices, no host synchronisation, CUDA graphs."""

import pytest
import torch
from accelerate import dispatch_model
from native import EXPERTS, gradients, native_model, ours
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from moelora import MoELoraConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def llama():
    torch.manual_seed(0)
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**size, vocab_size=64))


def mixture(base, **options):
    config = MoELoraConfig(r=8, target_modules="all-linear", num_experts=4, task_type="CAUSAL_LM", **options)
    model = get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


IDS = torch.arange(48).view(3, 16)


@pytest.mark.parametrize("scope", ["block", "model", "module"])
def test_equals_the_cpu(scope):
    model = mixture(llama(), router_scope=scope).train()
    expected = model(input_ids=IDS, labels=IDS)
    expected.loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.base_model.set_expert_maturity("default", 0.0)
    model.cuda()
    assert {p.device.type for p in (*model.parameters(), *model.buffers())} == {"cuda"}
    output = model(input_ids=IDS.cuda(), labels=IDS.cuda())
    output.loss.backward()
    torch.testing.assert_close(output.loss.cpu(), expected.loss, rtol=1e-4, atol=1e-5)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad.cpu(), gradients[name], rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    "targets", [{"target_modules": [], "target_parameters": EXPERTS}, {"target_modules": ["mlp.experts"]}], ids=str
)
def test_native_mixtures_equal_the_cpu(targets):
    model = ours(native_model("qwen3_moe"), **targets)
    expected_loss, expected = gradients(model, {"input_ids": IDS, "labels": IDS})
    loss, grads = gradients(model.cuda(), {"input_ids": IDS.cuda(), "labels": IDS.cuda()})
    torch.testing.assert_close(loss.cpu(), expected_loss, rtol=1e-4, atol=1e-5)
    for name, grad in expected.items():
        torch.testing.assert_close(grads[name].cpu(), grad, rtol=1e-3, atol=1e-5, msg=name)


def test_follows_a_device_map(tmp_path):
    mixture(llama()).save_pretrained(tmp_path)
    base = dispatch_model(
        llama(), {"model.embed_tokens": 0, "model.layers": 0, "model.norm": 0, "model.rotary_emb": 0, "lm_head": 0}
    )
    model = PeftModel.from_pretrained(base, tmp_path)
    assert {router.device.type for router in (b for n, b in model.named_buffers() if "moe_router" in n)} == {"cuda"}
    on_gpu = model(input_ids=IDS.cuda()).logits.cpu()
    on_cpu = PeftModel.from_pretrained(llama(), tmp_path)(input_ids=IDS).logits
    torch.testing.assert_close(on_gpu, on_cpu, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("scope", ["block", "model", "module"])
def test_training_never_synchronises_with_the_host(scope):
    model = mixture(llama(), router_scope=scope).cuda().train()
    ids = IDS.cuda()
    model(input_ids=ids, labels=ids).loss.backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(input_ids=ids, labels=ids).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_training_step_is_captured_in_a_cuda_graph():
    model = mixture(llama()).cuda().train()
    ids = IDS.cuda()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, capturable=True)

    def step():
        optimizer.zero_grad(set_to_none=False)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        return loss

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    maturity = model.expert_maturity.clone()
    losses = []
    for _ in range(20):
        graph.replay()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.01
    assert (model.expert_maturity > maturity).all()
