"""Kernels that were started before are started as they were compiled, for arguments of the same kinds alone."""

from types import SimpleNamespace

import pytest
import torch

from moelora.ops.triton import launch as module
from moelora.ops.weighted import weighted_backward

ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
CUDA = SimpleNamespace(device=torch.device("cuda", 0))
STORAGE = torch.zeros(64)


class Kernel:
    """Stands in for one of Triton's: counts what it compiles, notes what is started."""

    arg_names = ("x_ptr", "T", "scale", "E", "BLOCK")

    def __init__(self):
        self.compiled, self.started = [], []

    def __getitem__(self, grid):
        def run(*args, **options):
            self.compiled.append((grid, args, options))
            return self

        return run if len(grid) < 3 else lambda *args: self.started.append((grid, args))


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(module, "_COMPILED", {})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.version, "hip", None)
    return Kernel()


def start(kernel, x=STORAGE, T=7, scale=0.5, **options):
    module.launch(kernel, (4,), CUDA, x, T, scale, num_warps=4, **{"BLOCK": 16, "E": 8} | options)


def test_the_second_launch_is_of_what_the_first_compiled(kernel):
    start(kernel)
    start(kernel, T=9, scale=0.25)
    assert len(kernel.compiled) == 1
    ((grid, args),) = kernel.started
    assert grid == (4, 1, 1)
    assert args[0] is STORAGE and args[1:] == (9, 0.25, 8, 16)  # constants in the kernel's own order, and no num_warps


@pytest.mark.parametrize(
    "change",
    [
        {"x": STORAGE[1:]},  # no multiple of 16 bytes
        {"x": STORAGE.double()},
        {"x": None},
        {"T": 16},
        {"T": 1},
        {"T": 2**31 + 1},
        {"scale": 1},
        {"E": 9},
    ],
    ids=str,
)
def test_other_kinds_are_compiled_anew(kernel, change):
    start(kernel)
    start(kernel, **change)
    assert len(kernel.compiled) == 2 and not kernel.started
    start(kernel, **change)
    start(kernel)
    assert len(kernel.compiled) == 2 and len(kernel.started) == 2


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=ON_GPU)])
@pytest.mark.parametrize("offset", [0, 1, 8])
def test_addresses_of_every_alignment(device, offset):
    """Whatever was compiled for aligned tensors does not serve others."""
    generator = torch.Generator(device).manual_seed(0)
    for start_at in (0, offset):
        g, h = (torch.randn(33 * 32 + 8, generator=generator, device=device, dtype=torch.bfloat16) for _ in range(2))
        g, h = (values[start_at : start_at + 33 * 32].view(33, 32) for values in (g, h))
        w = torch.rand(33, 4, generator=generator, device=device)
        found = weighted_backward(g, h, w, 8, 2.0)
        expected = weighted_backward(g.double(), h.double(), w.double(), 8, 2.0)
        for mine, its in zip(found, expected, strict=True):
            torch.testing.assert_close(mine.double(), its, rtol=0.02, atol=0.02)
