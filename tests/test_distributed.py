"""Two data-parallel processes against one on the concatenated batch: gradients and maturity."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from peft import get_peft_model
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from moelora import MoELoraConfig

WORLD = 2


def build(loss_type):
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = MoELoraConfig(
        r=2,
        target_modules="all-linear",
        num_experts=3,
        task_type="CAUSAL_LM",
        router_aux_loss_coef=1.0,
        load_balance_loss_type=loss_type,
        expert_capacity_factor=None,  # each process fills its own experts
        maturity_tokens=100,
    )
    model = get_peft_model(LlamaForCausalLM(LlamaConfig(**size, vocab_size=32)), config).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.2, generator=torch.Generator().manual_seed(parameter.numel()))
    return model


def batch():
    ids = torch.randint(0, 32, (4, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, 2:] = 0  # the first process has far fewer tokens than the second
    mask[1, 4:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def gradients(model, rows, num_items, scale):
    (model(**rows, num_items_in_batch=num_items).loss * scale).backward()
    inner = getattr(model, "module", model)
    state = {name: p.grad.clone() for name, p in inner.named_parameters() if p.grad is not None}
    return state | {name: b.clone() for name, b in inner.named_buffers() if "moe_router" in name}


def worker(rank, port, loss_type, path):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    try:
        everything = batch()
        rows = {name: tensor.chunk(WORLD)[rank] for name, tensor in everything.items()}
        num_items = (everything["labels"][:, 1:] != -100).sum()
        model = DistributedDataParallel(build(loss_type))  # find_unused_parameters=False
        # The Trainer multiplies by the number of processes what DDP divides by it.
        torch.save(gradients(model, rows, num_items, scale=WORLD), f"{path}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("loss_type", ["aux_loss", "switch", "z_loss"])
def test_two_processes_equal_one(tmp_path, loss_type):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(worker, args=(port, loss_type, str(tmp_path)), nprocs=WORLD)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(WORLD))
    everything = batch()
    num_items = (everything["labels"][:, 1:] != -100).sum()
    expected = gradients(build(loss_type), everything, num_items, scale=1)
    assert first.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], tensor, rtol=1e-4, atol=1e-6, msg=name)
