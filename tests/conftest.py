"""Determinism for every test: one seed, one thread, no network."""

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton: its kernels then run on the CPU


def pytest_collection_finish():
    """Trainers and servers collect garbage, and would go through half a million objects of packages each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _deterministic():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield


@pytest.fixture
def adapter_folder(tmp_path, monkeypatch):
    """A function that makes a model, an adapter with the mixture's options and texts in the folder one is then in."""
    from tiny import save_tiny_adapter

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def make(**options):
        save_tiny_adapter(tmp_path, **options)
        return tmp_path

    return make


@pytest.fixture
def kernel_device(monkeypatch):
    """Where Triton kernels run in this test: the GPU, or the CPU in Triton's interpreter."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        return torch.device("cuda")
    if os.environ["TRITON_INTERPRET"] != "1":
        pytest.skip("Triton's interpreter is switched off (TRITON_INTERPRET)")
    monkeypatch.setattr("moelora.ops.triton.INTERPRET", True)
    _repair_interpreter(monkeypatch)
    return torch.device("cpu")


def _repair_interpreter(monkeypatch):
    """Triton 3.6's interpreter keeps bfloat16 as uint16, multiplies those integers in tl.dot, and truncates to them.

    It keeps scalars as arrays of one element, too, which numpy from 2.4 on takes for no bound of a range.
    """
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    multiply, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl
    patch_tensor = interpreter._patch_lang_tensor

    def create_dot(self, a, b, *args):
        a, b = (self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return multiply(self, a, b, *args)

    def cast_impl(self, value, dtype):
        if (value.dtype.scalar, dtype.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, value, dtype)
        rounded = torch.from_numpy(value.data.copy()).to(torch.bfloat16)
        return TensorHandle(rounded.view(torch.uint16).numpy(), tl.bfloat16)

    def patch_tensor_and_index(tensor, scope):
        patch_tensor(tensor, scope)
        tensor.__index__ = lambda self: self.handle.data.item()

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
    monkeypatch.setattr(InterpreterBuilder, "cast_impl", cast_impl)
    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_tensor_and_index)


@pytest.fixture
def alone_in_accelerate():
    """What an earlier Accelerator told is none of this test's."""
    from accelerate.state import GradientState

    state = GradientState()
    before = dict(state.plugin_kwargs), state.sync_gradients
    yield
    state.plugin_kwargs, state.sync_gradients = before
