"""Tests of the fused kernel and of what surrounds it.

They run on whatever there is: a GPU, or the CPU through Triton's interpreter. What needs a GPU skips without one.
"""

import ast
import copy
import functools
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import pytest
import torch
import torch.utils.checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st

import benchmark  # sets TRITON_INTERPRET where there is no GPU, before the kernel is defined
import fused_triton_swiglu as fts
from baseline_torch_swiglu import torch_swiglu
from benchmark import (
    ROUNDING,
    check,
    differentiated,
    gradient_limit,
    make_dy,
    make_inputs,
    nan_in_new_memory,
    reference,
    relative_error,
)
from fused_triton_swiglu import SwiGLUMLP, fused_swiglu, replace_mlps

HERE = Path(__file__).parent
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPES = tuple(benchmark.DTYPES.values())
LAYOUTS = benchmark.LAYOUTS
H100 = fts.Device("H100", "cuda", 90, 132, 227 * 1024)
TARGETS = {
    "sm_80": fts.Device("A100", "cuda", 80, 108, 163 * 1024),
    "sm_86": fts.Device("RTX 3090", "cuda", 86, 82, 99 * 1024),
    "sm_89": fts.Device("RTX 4090", "cuda", 89, 128, 99 * 1024),
    "sm_90": H100,
    "sm_100": fts.Device("B200", "cuda", 100, 148, 227 * 1024),
    "sm_103": fts.Device("B300", "cuda", 103, 148, 227 * 1024),
    "sm_120": fts.Device("RTX 5090", "cuda", 120, 170, 99 * 1024),
    "gfx90a": fts.Device("MI250X", "hip", "gfx90a", 104, 64 * 1024),
    "gfx942": fts.Device("MI300X", "hip", "gfx942", 304, 64 * 1024),
    "gfx950": fts.Device("MI355X", "hip", "gfx950", 256, 160 * 1024),
}
WITH_TMA = ("sm_90", "sm_100", "sm_103")
COMPILED_IN_FULL = ("sm_80", "sm_90", "sm_100", "gfx942")  # one of a kind; for the others half of it: CI has 15 minutes
needs_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")


# The default configuration: what tuning may choose instead has tests of its own, and would be tuned for each size here.
untuned = functools.partial(fused_swiglu, autotune=False)


def assert_right(x, w_gate, w_up, run=untuned):
    """No element unwritten, each within the benchmark's tolerance, the error no larger than eager PyTorch's own.

    Or than ROUNDING, where that is more: eager may be exact on a few elements, and sums few rows of float32 better.
    """
    shape = (*x.shape[:-1], w_gate.shape[1])
    expected = reference(x, w_gate, w_up)
    results = []
    correct, (error,) = check(lambda: results.append(run(x, w_gate, w_up)) or results[-1], expected)
    eager_error = relative_error(torch_swiglu(x, w_gate, w_up), expected)
    assert correct
    assert error <= max(eager_error, ROUNDING[x.dtype])
    assert results[-1].shape == shape and results[-1].dtype == x.dtype and results[-1].is_contiguous()


def randn(*shape, dtype=torch.float32, scale=1):
    return (torch.randn(shape, device=DEVICE) * scale).to(dtype)


# ---- Right on any sizes, dtypes and strides ----

SIZES = [(1, 1, 1), (1, 64, 96), (2, 3, 5), (16, 16, 32), (17, 33, 65), (65, 40, 129), (129, 67, 31), (257, 24, 8)]
SIZES += [(1, 4099, 1031), (300, 1024, 4096), (1031, 257, 509), (4097, 264, 1032)] if GPU else []


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M, K, N", SIZES)
def test_sizes(M, K, N, dtype, layout):
    assert_right(*make_inputs(M, K, N, dtype, layout, DEVICE))


def strided(draw, rows, columns, dtype, scale):
    """A (rows, columns) tensor in one of the layouts that views make."""
    scaled = functools.partial(randn, dtype=dtype, scale=scale)
    kind = draw(st.sampled_from(["row-major", "transposed", "padded", "transposed, padded", "steps", "offset"]))
    if kind == "transposed":
        return scaled(columns, rows).t()
    if kind == "padded":
        return scaled(rows, columns + 8)[:, :columns]
    if kind == "transposed, padded":
        return scaled(columns, rows + 8)[:, :rows].t()
    if kind == "steps":
        return scaled(2 * rows, 3 * columns)[::2, ::3]
    if kind == "offset":
        return scaled(rows * columns + 1)[1:].view(rows, columns)
    return scaled(rows, columns)


@st.composite
def any_inputs(draw):
    largest = 300 if GPU else 70
    M, K, N = (draw(st.integers(1, largest)) for _ in range(3))
    if draw(st.booleans()):  # aligned, where vector loads and descriptors apply
        K, N = 8 * (K // 8 + 1), 8 * (N // 8 + 1)
    dtype = draw(st.sampled_from(DTYPES))
    torch.manual_seed(draw(st.integers(0, 2**32 - 1)))
    return [strided(draw, *shape, dtype, scale) for shape, scale in (((M, K), 1), ((K, N), K**-0.5), ((K, N), K**-0.5))]


@settings(max_examples=100 if GPU else 30, deadline=None, derandomize=True)
@given(any_inputs())
def test_any_strides(inputs):
    assert_right(*inputs)


K, N = 72, 136  # multiples of 8, so that descriptors apply where the strides allow them


def stacked_halves(layout, up_first):
    if layout == "linear":
        halves = randn(2 * N, K, dtype=torch.float16).div(K**0.5).t().chunk(2, dim=1)
    elif layout == "interleaved":
        stacked = randn(2 * N, K, dtype=torch.float16).div(K**0.5)
        halves = stacked[::2].t(), stacked[1::2].t()
    else:
        halves = randn(K, 2 * N, dtype=torch.float16).div(K**0.5).chunk(2, dim=1)
    return reversed(halves) if up_first else halves


@pytest.mark.parametrize("M", [1, 40, 130])
@pytest.mark.parametrize("up_first", [False, True])
@pytest.mark.parametrize("layout", [*LAYOUTS, "interleaved"])
def test_halves_of_one_weight(layout, up_first, M):
    w_gate, w_up = stacked_halves(layout, up_first)
    assert_right(randn(M, K, dtype=torch.float16), w_gate, w_up)


@pytest.mark.parametrize("M", [3, 130])
def test_same_weight_twice_and_unlike_layouts(M):
    x, linear, _ = make_inputs(M, K, N, torch.float16, "linear", DEVICE)
    assert_right(x, linear, linear)
    assert_right(x, linear, linear.contiguous())
    assert_right(x, linear.contiguous(), linear)


@pytest.mark.parametrize("unaligned", [(0,), (1,), (2,), (1, 2)])
def test_two_bytes_off(unaligned):
    """Strides that suit a descriptor and vector loads, addresses that do not."""
    inputs = [*make_inputs(130, K, N, torch.float16, "linear", DEVICE)]
    for i in unaligned:
        storage = torch.empty(inputs[i].numel() + 1, dtype=torch.float16, device=DEVICE)
        inputs[i] = storage[1:].as_strided(inputs[i].shape, inputs[i].stride()).copy_(inputs[i])
    assert_right(*inputs)


LEADING = {
    "vector": lambda x: x[0, 0, 0],
    "batch of 1": lambda x: x[:1, 0, 0],
    "three": lambda x: x[0],
    "batch of 1 and one row": lambda x: x[:1, :1, 0],
    "four": lambda x: x,
    "transposed": lambda x: x[0].transpose(0, 1),
    "sliced": lambda x: x[0, :, 1:3],
    "every other column": lambda x: x[0, ..., ::2].repeat_interleave(2, -1)[..., ::2],
    "expanded": lambda x: x[0, :1].expand(5, -1, -1),
    "three row strides": lambda x: x[:, ::2].transpose(1, 2)[:, :2],
    "K first": lambda x: x[0, 0].t().contiguous().t(),
}


@pytest.mark.parametrize("name", LEADING)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_leading_dimensions(name, layout):
    x = LEADING[name](randn(2, 3, 35, 2 * K if "column" in name else K, dtype=torch.float16))
    _, w_gate, w_up = make_inputs(1, x.shape[-1], N, torch.float16, layout, DEVICE)
    assert_right(x, w_gate, w_up)


@pytest.mark.parametrize("M, K, N", [(0, 8, 4), (3, 8, 0), (3, 0, 4), (0, 0, 0)])
def test_empty(M, K, N):
    with nan_in_new_memory():
        y = fused_swiglu(randn(2, M, K), randn(K, N), randn(K, N))
    assert torch.equal(y, torch.zeros(2, M, N, device=DEVICE))


def test_extreme_values():
    """Where exp overflows, silu is 0 or the value itself; NaN stays NaN."""
    x = torch.tensor([[1.0], [-1.0], [float("nan")]], device=DEVICE)
    w_gate, w_up = (torch.tensor([[a, 0.0]], device=DEVICE) for a in (200.0, 3.0))
    y = fused_swiglu(x, w_gate, w_up)
    assert torch.allclose(y[:2], torch.tensor([[600.0, 0.0], [0.0, 0.0]], device=DEVICE))
    assert y[2].isnan().all()


@pytest.mark.parametrize("wrong", ["last column of K left out", "gate and up exchanged", "last row unwritten"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_check_can_fail(wrong, dtype):
    inputs = make_inputs(8, 512, 64, dtype, "linear", DEVICE)
    x, w_gate, w_up = (t.double() for t in inputs)

    def run():
        if wrong == "last column of K left out":
            return torch_swiglu(x[:, :-1], w_gate[:-1], w_up[:-1]).to(dtype)
        if wrong == "gate and up exchanged":
            return torch_swiglu(x, w_up, w_gate).to(dtype)
        y = torch.empty(8, 64, dtype=dtype, device=DEVICE)
        y[:-1] = torch_swiglu(x[:-1], w_gate, w_up)
        return y

    assert not check(run, reference(*inputs))[0]


# ---- Gradients ----

GRADIENT_SIZES = [(1, 1, 1), (2, 3, 5), (17, 33, 65), (129, 67, 31)]
GRADIENT_SIZES += [(1, 1024, 4096), (300, 1096, 4104), (517, 1031, 2063), (4100, 1024, 2048)] if GPU else []


def assert_gradients_right(inputs, dy, **options):
    """All as the benchmark wants it, and each gradient laid out as its tensor."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    expected = reference(*leaves, dy)
    eager_errors = benchmark.relative_errors(differentiated(lambda t: torch_swiglu(*t), dy)(leaves), expected)
    results = []
    both_passes = differentiated(lambda t: fused_swiglu(*t, autotune=False, **options), dy)
    correct, errors = check(lambda: results.append(both_passes(leaves)) or results[-1], expected, eager_errors)
    assert correct, (errors, eager_errors)
    for gradient, t in zip(results[-1][1:], inputs, strict=True):
        assert gradient.shape == t.shape and gradient.dtype == t.dtype
        assert gradient.stride() == torch.empty_like(t).stride()


@pytest.mark.parametrize("recompute", [False, True], ids=["keep", "recompute"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M, K, N", GRADIENT_SIZES)
def test_gradients(M, K, N, dtype, layout, recompute):
    inputs = make_inputs(M, K, N, dtype, layout, DEVICE)
    assert_gradients_right(inputs, make_dy(M, N, dtype, DEVICE), recompute=recompute)


@st.composite
def any_inputs_and_dy(draw):
    inputs = draw(any_inputs())
    M, N = inputs[0].shape[0], inputs[1].shape[1]
    return inputs, strided(draw, M, N, inputs[0].dtype, 1), draw(st.booleans())


@settings(max_examples=60 if GPU else 15, deadline=None, derandomize=True)
@given(any_inputs_and_dy())
def test_gradients_with_any_strides(case):
    inputs, dy, recompute = case
    assert_gradients_right(inputs, dy, recompute=recompute)


@pytest.mark.parametrize("name", LEADING)
def test_gradients_with_leading_dimensions(name):
    x = LEADING[name](randn(2, 3, 35, 2 * K if "column" in name else K, dtype=torch.float16))
    _, w_gate, w_up = make_inputs(1, x.shape[-1], N, torch.float16, "linear", DEVICE)
    dy = randn(*x.shape[:-1], N, dtype=torch.float16)
    for recompute in (False, True):
        assert_gradients_right((x, w_gate, w_up), dy, recompute=recompute)


@pytest.mark.parametrize("M, K, N", [(0, 8, 4), (3, 8, 0), (3, 0, 4), (0, 0, 0)])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty_gradients(M, K, N, recompute, dtype):
    inputs = [randn(*shape, dtype=dtype).requires_grad_() for shape in ((2, M, K), (K, N), (K, N))]
    with nan_in_new_memory():
        fused_swiglu(*inputs, recompute=recompute).sum().backward()
    assert all(torch.equal(t.grad, torch.zeros_like(t)) for t in inputs)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", ["expanded", "of a sum", "of a mean over rows", "transposed", "steps"])
def test_strided_incoming_gradients(name, recompute):
    inputs = [t.requires_grad_() for t in make_inputs(20, K, N, torch.float32, "linear", DEVICE)]
    dy = {
        "expanded": randn(1, N).expand(20, N),
        "transposed": randn(N, 20).t(),
        "steps": randn(40, 3 * N)[::2, ::3],
        "of a sum": torch.ones(20, N, device=DEVICE),
        "of a mean over rows": torch.full((20, N), 1 / 20, device=DEVICE),
    }[name]
    y = fused_swiglu(*inputs, recompute=recompute)
    if name == "of a sum":
        y.sum().backward()
    elif name == "of a mean over rows":
        y.mean(0).sum().backward()
    else:
        y.backward(dy)
    for t, expected in zip(inputs, reference(*inputs, dy)[1:], strict=True):
        assert relative_error(t.grad, expected) <= ROUNDING[torch.float32]


def saved_by(run):
    """What autograd keeps for the backward pass of `run()`."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        run()
    return saved


class CountCalls(torch.utils._python_dispatch.TorchDispatchMode):
    """How often each PyTorch operator runs."""

    def __enter__(self):
        self.calls = {}
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.calls[name] = self.calls.get(name, 0) + 1
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("needs", [n for n in itertools.product([False, True], repeat=3) if any(n)], ids=str)
def test_only_what_is_needed(needs, recompute):
    M, K, N = 20, 40, 33  # too small for the Hopper kernel: x's gradient is one mm and one addmm
    x, w_gate, w_up = inputs = make_inputs(M, K, N, torch.float32, "linear", DEVICE)
    dy = make_dy(M, N, torch.float32, DEVICE)
    expected = [g for g, need in zip(reference(*inputs, dy)[1:], needs, strict=True) if need]
    for t, need in zip(inputs, needs, strict=True):
        t.requires_grad_(need)
    saved = saved_by(lambda: fused_swiglu(*inputs, recompute=recompute))
    gate_up = [t for t in saved if t.shape == (M, 2 * N)]
    assert len(gate_up) == (not recompute)
    assert any(t is x for t in saved) == (recompute or needs[1] or needs[2])  # frozen weights: x is not kept
    y = fused_swiglu(*inputs, recompute=recompute)
    gradients = torch.autograd.grad(y, [t for t, need in zip(inputs, needs, strict=True) if need], dy)
    for gradient, right in zip(gradients, expected, strict=True):
        assert relative_error(gradient, right) <= ROUNDING[torch.float32]
    with CountCalls() as count, torch.no_grad():
        d = fts._differentiate_activation(dy, x, w_gate, w_up, None if recompute else gate_up[0])
        fts._gradients(d, x, w_gate, w_up, list(needs))
    assert count.calls.get("mm", 0) == sum(needs) + 2 * recompute
    assert sum(n for name, n in count.calls.items() if name.startswith("addmm")) == needs[0]


def test_without_gradients_nothing_is_kept(monkeypatch):
    inputs = make_inputs(5, 16, 24, torch.float32, "linear", DEVICE)
    kept = []
    forward = fts._forward
    monkeypatch.setattr(
        fts, "_forward", lambda x, g, u, keep, choice: kept.append(keep) or forward(x, g, u, keep, choice)
    )
    fused_swiglu(*inputs)
    for t in inputs:
        t.requires_grad_()
    with torch.no_grad():
        fused_swiglu(*inputs)
    with torch.inference_mode():
        fused_swiglu(*inputs)
        fused_swiglu(*(t.clone() for t in inputs))
    with torch.no_grad(), CountCalls():  # the way through the operator
        fused_swiglu(*inputs)
    fused_swiglu(*inputs, recompute=True)
    assert kept == [False] * 6
    fused_swiglu(*inputs)
    assert kept[-1]


@pytest.mark.parametrize("recompute", [False, True])
def test_backward_twice_and_second_derivative(recompute):
    inputs = [t.requires_grad_() for t in make_inputs(5, 16, 24, torch.float32, "linear", DEVICE)]
    dy = make_dy(5, 24, torch.float32, DEVICE).requires_grad_()
    y = fused_swiglu(*inputs, recompute=recompute)
    first = torch.autograd.grad(y, inputs, dy, retain_graph=True)
    second = torch.autograd.grad(y, inputs, dy, create_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for wrong in (inputs[0], inputs[1], dy):
        with pytest.raises(NotImplementedError, match="fused_swiglu can be differentiated once"):
            torch.autograd.grad(second[0].sum() + second[2].sum(), wrong, retain_graph=True)
    inputs[1].data = inputs[1].data.clone()  # not in place: allowed
    with torch.no_grad():
        inputs[2].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y, inputs, dy)


def test_gradient_of_x_is_one_accumulation():
    """Both halves are near 1, their sum is near 1 / 32: rounding each to bfloat16 would leave an error of 0.1."""
    # The last one is a shape that cuBLAS cuts short: see test_small_products_have_every_row
    for M, K, N in [(20, 64, 128)] + ([(300, 4096, 4096), (32, 32, 13448)] if GPU else []):
        w_gate, d = randn(N, K, scale=N**-0.5).bfloat16().t(), randn(M, N).bfloat16()
        w_up = (randn(N, K, scale=N**-0.5 / 32).t() - w_gate).bfloat16()
        d = torch.cat([d, d], dim=1)
        dx = torch.full((M, K), float("nan"), dtype=torch.bfloat16, device=DEVICE)
        fts._multiply_both(*d.split(N, dim=1), w_gate, w_up, dx)
        expected = d[:, :N].double() @ (w_gate.double() + w_up.double()).t()
        assert relative_error(dx, expected) <= ROUNDING[torch.bfloat16]


@pytest.mark.parametrize("K, parts", [(8, [8]), (64, [64]), (65, [64, 1]), (200, [192, 8]), (256, [256])])
def test_products_in_parts(K, parts, monkeypatch):
    """What cuBLAS may leave out of a small product in 16 bits is a product of its own."""
    monkeypatch.setattr(fts, "device_of", lambda index: TARGETS["sm_90"])
    a, b = randn(3, K, dtype=torch.float16), randn(K, 5, dtype=torch.float16)
    pairs = fts._parts(a, b)
    assert [part.shape[1] for part, _ in pairs] == parts
    assert torch.allclose(sum(c.double() @ d.double() for c, d in pairs), a.double() @ b.double())
    assert len(fts._parts(a.float(), b.float())) == 1
    assert len(fts._parts(a.expand(2**20, 3, K)[:, 0], b)) == 1


@needs_gpu
@pytest.mark.parametrize("out", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("M, K, N", [(2561, 2824, 8), (4353, 376, 336), (3713, 464, 640), (9857, 184, 1512)])
def test_small_products_have_every_row(M, K, N, dtype, out):
    """By itself cuBLAS 13.1 left the last row out of these, on an H200: 1e-2 and more."""
    x, d = randn(M, K, dtype=dtype), randn(M, 2 * N, dtype=dtype)
    dw = torch.full((N, K) if out == "linear" else (K, N), float("nan"), dtype=dtype, device=DEVICE)
    dw = dw.t() if out == "linear" else dw
    fts._multiply(x.t(), d[:, :N], dw)
    assert relative_error(dw, x.double().t() @ d[:, :N].double()) <= ROUNDING[dtype]


@needs_gpu
@pytest.mark.parametrize("recompute", [False, True])
def test_small_gradients_have_every_row(recompute):
    leaves = leaves_of(2561, 2824, 8, torch.float16)
    dy = make_dy(2561, 8, torch.float16, DEVICE)
    results = differentiated(lambda t: fused_swiglu(*t, autotune=False, recompute=recompute), dy)(leaves)
    for result, expected in zip(results, reference(*leaves, dy), strict=True):
        assert relative_error(result, expected) <= 2 * ROUNDING[torch.float16]


def test_backward_formula_at_extremes():
    gate = torch.tensor([-1e4, -200.0, -1.0, 0.0, 1.0, 200.0, 1e4, float("nan"), float("inf")], device=DEVICE)
    up, dy = torch.full_like(gate, 3.0), torch.full_like(gate, 2.0)
    one = torch.ones(1, 1, device=DEVICE)
    x, w_gate, w_up = one, gate[None], up[None]
    leaves = [t.clone().requires_grad_() for t in (x, w_gate, w_up)]
    gradients = torch.autograd.grad(fused_swiglu(*leaves), leaves[1:], dy[None])
    eager = torch.autograd.grad(torch_swiglu(*leaves), leaves[1:], dy[None])
    for a, b in zip(gradients, eager, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, equal_nan=True)


# ---- What the rest of PyTorch expects of an operator ----

BACKEND = "inductor" if GPU else "aot_eager"  # the first wants a compiler for the CPU


def leaves_of(M, K, N, dtype=torch.float32, layout="linear"):
    return [t.requires_grad_() for t in make_inputs(M, K, N, dtype, layout, DEVICE)]


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("shape", [(5, 16), (2, 3, 16)], ids=str)
def test_opcheck(shape, keep):
    _, w_gate, w_up = leaves_of(1, 16, 24)
    x = randn(*shape).requires_grad_()
    torch.library.opcheck(fts.swiglu_op, (x, w_gate, w_up, keep, fts.TUNED))
    gate_up = randn(*shape[:-1], 48) if keep else None
    x, w_gate, w_up, dy, d = (t.detach() for t in (x, w_gate, w_up, randn(*shape[:-1], 24), randn(*shape[:-1], 48)))
    torch.library.opcheck(fts.activation_backward_op, (dy, None if keep else x, w_gate, w_up, gate_up))
    for needs in ([True, True, True], [True, False, True], [False, True, False]):
        torch.library.opcheck(fts.gradients_op, (d, x, w_gate, w_up, needs))
    torch.library.opcheck(fts.gradients_op, (d, None, w_gate, w_up, [True, False, False]))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dynamic, frames", [(False, 4), (None, 2), (True, 1)])
def test_compile(dynamic, frames, recompute):
    """Both passes, without a graph break; with a dynamic M no frame is compiled again for another one."""
    import torch._dynamo.testing  # not above: it imports Triton, which reads TRITON_INTERPRET then

    torch._dynamo.reset()
    count = torch._dynamo.testing.CompileCounterWithBackend(BACKEND)

    def layer(x, w_gate, w_up):
        return fused_swiglu(x * 2, w_gate, w_up, recompute=recompute).square()

    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend=count)
    for M in (5, 9, 130, 300):
        leaves = leaves_of(M, 16, 24)
        dy = make_dy(M, 24, torch.float32, DEVICE)
        results = differentiated(lambda t: compiled(*t), dy)(leaves)
        expected = differentiated(lambda t: layer(*t), dy)(leaves)
        for a, b in zip(results, expected, strict=True):
            assert relative_error(a, b.double()) <= ROUNDING[torch.float32] and a.stride() == b.stride()
    assert count.frame_count == frames


def test_compile_without_gradients():
    torch._dynamo.reset()
    x, w_gate, w_up = leaves_of(5, 16, 24)
    compiled = torch.compile(fused_swiglu, fullgraph=True, backend=BACKEND)
    with torch.no_grad():
        assert relative_error(compiled(x, w_gate, w_up), reference(x, w_gate, w_up)) <= ROUNDING[torch.float32]


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    mlp = SwiGLUMLP(16, 24, device=DEVICE)
    rows = torch.export.Dim("rows", max=4096)
    exported = torch.export.export(mlp, (randn(3, 16),), dynamic_shapes=({0: rows},), strict=strict)
    x = randn(70, 16)
    assert torch.allclose(exported.module()(x), mlp(x), atol=1e-6)
    (call,) = (node for node in exported.graph.nodes if "swiglu" in str(node.target))
    assert call.args[3] is False  # an exported model keeps no gate and up


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_autocast(dtype):
    """As F.linear: operands cast to autocast's dtype, gradients in the dtype of their tensors."""
    leaves = leaves_of(20, K, N)
    linear = [t.detach().requires_grad_() for t in leaves]
    dy = make_dy(20, N, dtype, DEVICE)
    mixed = [leaves[0].detach().bfloat16(), leaves[1].detach(), leaves[2].detach().half()]
    with torch.autocast(DEVICE, dtype):
        y = fused_swiglu(*leaves)
        y_linear = torch.nn.functional.linear(linear[0], linear[1].t())
        assert y.dtype == y_linear.dtype == dtype
        assert fused_swiglu(*mixed).dtype == dtype
        inside = torch.autograd.grad(y, leaves, dy, retain_graph=True)
        with pytest.raises(TypeError, match=r"x is torch\.float64"):
            fused_swiglu(leaves[0].double(), *leaves[1:])
        with torch.autocast(DEVICE, enabled=False):
            assert fused_swiglu(*leaves).dtype == torch.float32
        # Computed elsewhere in another dtype: autocast during the backward pass does not matter either.
        for other in (torch.float32, torch.float16 if dtype == torch.bfloat16 else torch.bfloat16):
            with torch.autocast(DEVICE, enabled=False):
                unlike = [t.detach().to(other).requires_grad_() for t in leaves]
                y_other = fused_swiglu(*unlike, recompute=True)
            in_autocast = torch.autograd.grad(y_other, unlike, dy.to(other), retain_graph=True)
            with torch.autocast(DEVICE, enabled=False):
                assert all(
                    torch.equal(a, b)
                    for a, b in zip(in_autocast, torch.autograd.grad(y_other, unlike, dy.to(other)), strict=True)
                )
    outside = torch.autograd.grad(y, leaves, dy)
    rounded = [t.detach().to(dtype) for t in leaves]
    expected = reference(*rounded, dy)
    assert relative_error(y, expected[0]) <= ROUNDING[dtype]
    for a, b, right, t in zip(inside, outside, expected[1:], leaves, strict=True):
        assert a.dtype == t.dtype == torch.float32 and torch.equal(a, b)
        assert relative_error(a, right) <= gradient_limit(dtype, 0)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_activation_checkpointing(recompute, reentrant):
    leaves = leaves_of(20, K, N)
    run = functools.partial(fused_swiglu, recompute=recompute)
    torch.utils.checkpoint.checkpoint(run, *leaves, use_reentrant=reentrant).sum().backward()
    _, *expected = reference(*leaves, torch.ones(20, N, device=DEVICE))
    for t, right in zip(leaves, expected, strict=True):
        assert relative_error(t.grad, right) <= ROUNDING[torch.float32]


def test_transforms_are_refused():
    x, w_gate, w_up = make_inputs(6, 16, 24, torch.float32, "linear", DEVICE)
    for t in (x, x.clone().requires_grad_()):
        with pytest.raises(NotImplementedError, match="x takes any number of leading dimensions without it"):
            torch.vmap(fused_swiglu, (0, None, None))(t, w_gate, w_up)
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(lambda t: fused_swiglu(t, w_gate, w_up).sum())(x)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        fused_swiglu(torch.autograd.forward_ad.make_dual(x, x), w_gate, w_up)


def test_modes_see_the_operator():
    """A mode that counts, traces or fakes operators must not be passed by."""
    inputs = make_inputs(6, 16, 24, torch.float32, "linear", DEVICE)
    with CountCalls() as count:
        fused_swiglu(*inputs)
    assert count.calls == {"swiglu": 1}
    wrapper = Wrapper(inputs[0])
    assert torch.equal(fused_swiglu(wrapper, *inputs[1:]), fused_swiglu(*inputs))
    assert wrapper.seen == ["swiglu"]


class Wrapper(torch.Tensor):
    """A tensor subclass, as DTensor is one: it has no data itself, and unwraps at each operator."""

    @staticmethod
    def __new__(cls, t):
        return torch.Tensor._make_wrapper_subclass(cls, t.shape, strides=t.stride(), dtype=t.dtype, device=t.device)

    def __init__(self, t):
        self.inner, self.seen = t, []

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        for t in args:
            if isinstance(t, cls):
                t.seen.append(function.overloadpacket.__name__)
        return function(*(t.inner if isinstance(t, cls) else t for t in args), **kwargs or {})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fake_tensors_have_the_layout_of_real_ones(layout):
    real = leaves_of(6, 16, 24, layout=layout)
    real[0] = randn(16, 6).t().requires_grad_()
    with torch._subclasses.FakeTensorMode() as mode:
        for recompute in (False, True):
            fake = [mode.from_tensor(t) for t in real]
            y = fused_swiglu(*fake, recompute=recompute)
            gradients = torch.autograd.grad(y, fake, torch.ones_like(y))
            assert type(y) is torch._subclasses.FakeTensor and y.is_contiguous() and y.shape == (6, 24)
            assert [t.stride() for t in gradients] == [t.stride() for t in real]


@needs_gpu
@pytest.mark.parametrize("M, N", [(20, 136), (300, 5768)])
@pytest.mark.parametrize("recompute", [False, True])
def test_graph_capture_of_both_passes(M, N, recompute):
    leaves = leaves_of(M, 328, N, torch.bfloat16)
    dy = make_dy(M, N, torch.bfloat16, DEVICE)
    both_passes = differentiated(lambda t: fused_swiglu(*t, recompute=recompute), dy)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        both_passes(leaves)  # cuBLAS takes its workspace
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        results = both_passes(leaves)
    for t in results:
        t.fill_(float("nan"))
    graph.replay()
    for result, expected in zip(results, reference(*leaves, dy), strict=True):
        assert relative_error(result, expected) <= gradient_limit(torch.bfloat16, 0)


@needs_gpu
def test_reduce_overhead():
    torch._dynamo.reset()
    mlp = SwiGLUMLP(328, 5768, device=DEVICE, dtype=torch.bfloat16)
    compiled = torch.compile(mlp, mode="reduce-overhead", fullgraph=True)
    for seed in range(4):
        torch.manual_seed(seed)
        x = randn(300, 328, dtype=torch.bfloat16)
        gradients = []
        for run in (compiled, mlp):
            torch.compiler.cudagraph_mark_step_begin()
            mlp.zero_grad()
            run(x).square().mean().backward()
            gradients.append([p.grad.clone() for p in mlp.parameters()])
        for a, b in zip(*gradients, strict=True):
            assert relative_error(a, b.double()) <= gradient_limit(torch.bfloat16, 0)


@needs_gpu
@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_kept_for_the_backward_pass(layout):
    M, K, N = 8192, 512, 2048
    leaves = leaves_of(M, K, N, torch.bfloat16, layout)
    dy = make_dy(M, N, torch.bfloat16, DEVICE)
    kept = {}
    for name, run in (
        ("eager", torch_swiglu),
        ("keep", fused_swiglu),
        ("recompute", functools.partial(fused_swiglu, recompute=True)),
    ):
        for _ in range(2):  # the first call tunes
            _, kept[name] = benchmark.memory_of(lambda t, run=run: run(*t), leaves, dy)
    gate_up = 2 * M * N * 2 / 2**20
    rounding = 3  # the allocator's, which does not split off less than 1 MiB: for each of three tensors
    assert 1.5 * gate_up <= kept["eager"] <= 1.5 * gate_up + rounding
    assert gate_up <= kept["keep"] <= gate_up + rounding
    assert kept["recompute"] <= 0.01


@needs_gpu
def test_gate_and_up_are_freed_early():
    """The most memory is y, gate, up, dgate and dup, or without gate and up but with the gradients: not all of it."""
    M, K, N = 8192, 256, 2048
    leaves = leaves_of(M, K, N, torch.bfloat16)
    dy = make_dy(M, N, torch.bfloat16, DEVICE)
    for _ in range(2):
        peak, _ = benchmark.memory_of(lambda t: fused_swiglu(*t), leaves, dy)
    assert peak <= 5 * M * N * 2 / 2**20 + 5  # what the allocator adds


DDP = """
import sys, torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from fused_triton_swiglu import SwiGLUMLP

dist.init_process_group("nccl")
rank, world = dist.get_rank(), dist.get_world_size()
torch.cuda.set_device(rank)

def make(seed):
    torch.manual_seed(seed)
    return SwiGLUMLP(256, 1024, device="cuda", dtype=torch.bfloat16)

torch.manual_seed(1)
batches = [torch.randn(300, 256, device="cuda").bfloat16() for _ in range(world)]
alone = make(0)
for x in batches:
    (alone(x).float().square().mean() / world).backward()
wrapped = {"DDP": torch.nn.parallel.DistributedDataParallel(make(rank)), "FSDP2": fully_shard(make(0))}
for name, model in wrapped.items():
    model(batches[rank]).float().square().mean().backward()
    for p, right in zip(model.parameters(), alone.parameters()):
        gradient = p.grad.full_tensor() if name == "FSDP2" else p.grad
        error = ((gradient.float() - right.grad.float()).norm() / right.grad.float().norm()).item()
        assert error < 2**-7, (name, error)
print("right")
dist.destroy_process_group()
"""


@needs_gpu
def test_ddp_and_fsdp(tmp_path):
    """One process for each GPU: gradients as of one process that sees all batches."""
    (tmp_path / "train.py").write_text(DDP)
    processes = torch.cuda.device_count()
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={processes}",
        "train.py",
    ]
    environment = os.environ | {"PYTHONPATH": str(HERE)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("right") == processes


# ---- The module ----


def test_mlp_is_its_formula():
    mlp = SwiGLUMLP(16, 24, device=DEVICE)
    x = randn(2, 3, 16)
    gate, up, down = (p.detach().double() for p in (mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight))
    expected = torch_swiglu(x.double(), gate.t(), up.t()) @ down.t()
    assert relative_error(mlp(x), expected) <= ROUNDING[torch.float32]
    for recompute in (False, True):
        saved = saved_by(functools.partial(SwiGLUMLP(16, 24, recompute=recompute, device=DEVICE), x))
        assert any(t.shape == (2, 3, 48) for t in saved) != recompute


def hugging_face_llama(**options):
    transformers = pytest.importorskip("transformers", reason="compares with transformers, which is not installed")
    torch.manual_seed(0)
    config = dict(hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=4)
    config |= dict(num_key_value_heads=2, vocab_size=128, max_position_embeddings=64, pad_token_id=0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config | options))
    return model.to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mlp_against_transformers(dtype):
    theirs = hugging_face_llama().model.layers[0].mlp.to(dtype)
    ours = SwiGLUMLP(64, 176, device=DEVICE, dtype=dtype)
    assert ours.load_state_dict(theirs.state_dict()) == ([], [])
    x, dy = randn(2, 10, 64, dtype=dtype), randn(2, 10, 64, dtype=dtype)
    exact = copy.deepcopy(theirs).double()
    errors = {}
    for name, mlp in (("exact", exact), ("theirs", theirs), ("ours", ours)):
        leaf = x.to(next(mlp.parameters()).dtype).requires_grad_()
        y = mlp(leaf)
        results = [y, *torch.autograd.grad(y, [leaf, *mlp.parameters()], dy.to(y.dtype))]
        if name == "exact":
            expected = results
        errors[name] = [relative_error(*pair) for pair in zip(results, expected, strict=True)]
    for error, their_error in zip(errors["ours"], errors["theirs"], strict=True):
        assert error <= gradient_limit(dtype, their_error)


def losses(model, steps=12):
    """Of training on one batch of random tokens."""
    tokens = torch.randint(1, 128, (2, 16), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    curve = []
    for _ in range(steps):
        loss = model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    return torch.tensor(curve)


@pytest.mark.parametrize("recompute", [False, True])
def test_llama_trains_alike(recompute):
    exact = losses(hugging_face_llama().double())
    eager = losses(hugging_face_llama())
    model = hugging_face_llama()
    parameters = {name: p.data_ptr() for name, p in model.named_parameters()}
    assert replace_mlps(model, recompute=recompute) is model
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == parameters
    assert all(type(layer.mlp) is SwiGLUMLP and layer.mlp.recompute == recompute for layer in model.model.layers)
    fused = losses(model)
    assert exact[-1] < 0.8 * exact[0]  # it does train
    assert (fused - exact).abs().max() <= 2 * (eager - exact).abs().max() + 1e-5
    if GPU:
        eager, fused = losses(hugging_face_llama().bfloat16()), losses(replace_mlps(hugging_face_llama().bfloat16()))
        assert (fused - exact).abs().max() <= 2 * (eager - exact).abs().max()


def test_llama_generates_alike():
    tokens = torch.randint(1, 128, (2, 5), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    model = hugging_face_llama().eval()
    expected = model.generate(tokens, max_new_tokens=12, do_sample=False)
    assert torch.equal(replace_mlps(model).generate(tokens, max_new_tokens=12, do_sample=False), expected)
    assert not model.model.layers[0].mlp.training


def test_replace_mlps_refuses():
    def mlp(act_fn, **layers):
        module = torch.nn.Module()
        for name in fts.PROJECTIONS:
            setattr(module, name, layers.get(name) or torch.nn.Linear(4, 4, bias=False))
        module.act_fn = act_fn
        return module

    silu = torch.nn.SiLU()
    cases = [
        (
            mlp(silu, up_proj=torch.nn.Linear(4, 4)),
            r"1.mlp.up_proj is Linear(in_features=4, out_features=4, bias=True)",
        ),
        (
            mlp(silu, gate_proj=torch.nn.Identity()),
            r"1.mlp.gate_proj is Identity(): expected an nn.Linear without bias",
        ),
        (mlp(torch.nn.GELU()), r"1.mlp.act_fn is GELU(approximate='none'): expected SiLU"),
        (mlp(None), r"1.mlp.act_fn is None: expected SiLU"),
    ]
    for wrong, message in cases:
        right = mlp(silu)
        model = torch.nn.Sequential(torch.nn.ModuleDict({"mlp": right}), torch.nn.ModuleDict({"mlp": wrong}))
        with pytest.raises(ValueError, match=re.escape(message)):
            replace_mlps(model)
        assert model[0].mlp is right
    with pytest.raises(ValueError, match="Sequential holds no module with gate_proj, up_proj, down_proj"):
        replace_mlps(torch.nn.Sequential(torch.nn.Linear(4, 4)))


# ---- Bad input ----

A, B = torch.zeros(4, 8), torch.zeros(8, 6)
BAD_INPUT = [
    ((A.tolist(), B, B), TypeError, "x is a list: expected a torch.Tensor"),
    ((A.int(), B, B), TypeError, "x is torch.int32: expected torch.bfloat16, torch.float16 or torch.float32"),
    ((A.double(), B, B), TypeError, "x is torch.float64: expected"),
    ((A, B.half(), B), TypeError, "w_gate is torch.float16, but x is torch.float32: all three must have one dtype"),
    ((A, B, B.half()), TypeError, "w_up is torch.float16, but x is torch.float32"),
    ((A[0, 0], B, B), ValueError, r"x has no dimensions: expected (..., K)"),
    ((A, B[0], B), ValueError, r"w_gate is (6,): expected two dimensions, (K, N)"),
    ((A, B, B[None]), ValueError, r"w_up is (1, 8, 6): expected two dimensions, (K, N)"),
    ((A, B, B[:, :5]), ValueError, r"w_up is (8, 5), but w_gate is (8, 6): both must be (K, N)"),
    ((A, B.t(), B.t()), ValueError, r"w_gate is (6, 8), but x is (4, 8): w_gate must be (8, N)"),
    ((A, B.to("meta"), B), ValueError, "w_gate is on meta, but x is on "),
]


@pytest.mark.parametrize("arguments, error, message", BAD_INPUT, ids=[case[2] for case in BAD_INPUT])
def test_bad_input(arguments, error, message):
    def prepared(t, requires_grad):
        if not isinstance(t, torch.Tensor) or t.is_meta:
            return t
        return t.to(DEVICE).requires_grad_(requires_grad and t.is_floating_point())

    for requires_grad in (False, True):
        with pytest.raises(error, match=re.escape(message)):
            fused_swiglu(*(prepared(t, requires_grad) for t in arguments))
    if not any(isinstance(t, list) or t.is_meta for t in arguments):
        with pytest.raises(error, match=re.escape(message)):
            torch.compile(fused_swiglu, backend="eager")(*(prepared(t, False) for t in arguments))


def test_cpu_tensors_need_the_interpreter(monkeypatch):
    monkeypatch.setattr(fts, "INTERPRETED", False)
    with pytest.raises(ValueError, match=re.escape("x is on cpu: expected a GPU (or the CPU with TRITON_INTERPRET=1)")):
        fused_swiglu(A, B, B)


# ---- What a later call may reuse ----


def test_launch_key_tells_apart():
    """A compiled launch is reused under its key: whatever it depends on must change the key."""
    x, w_gate, w_up = make_inputs(64, 72, 136, torch.float32, "linear", DEVICE)
    unaligned = torch.empty(x.numel() + 1, device=DEVICE)[1:].view(x.shape)
    calls = {
        "as it is": (x, w_gate, w_up),
        "weights exchanged": (x, w_up, w_gate),
        "one weight twice": (x, w_gate, w_gate),
        "another address": (unaligned, w_gate, w_up),
        "fewer rows": (x[:1], w_gate, w_up),
        "more dimensions": (x[None], w_gate, w_up),
        "another stride of x": (x.t().contiguous().t(), w_gate, w_up),
        "another layout of w_up": (x, w_gate, w_up.contiguous()),
        "another dtype of w_up": (x, w_gate, w_up.double()),
        "another device of w_up": (x, w_gate, w_up.to("meta")),
    }
    keys = {name: fts._launch_key(*tensors, False, fts.TUNED) for name, tensors in calls.items()}
    keys["gate and up kept"] = fts._launch_key(x, w_gate, w_up, True, fts.TUNED)
    keys["batch-invariant"] = fts._launch_key(x, w_gate, w_up, False, fts.ONE_FOR_ALL_M)
    previous = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    keys["another precision"] = fts._launch_key(x, w_gate, w_up, False, fts.TUNED)
    torch.set_float32_matmul_precision(previous)
    assert len(set(keys.values())) == len(keys), keys
    assert fts._launch_key(x + 1, w_gate, w_up, False, fts.DEFAULT) == keys["as it is"]


# ---- The file by itself ----


def run_python(code, cwd, **environment):
    """Standard output of a fresh interpreter that runs `code`."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("gluon", ["with Gluon", "without Gluon"])
def test_file_works_when_copied_alone(gluon, tmp_path):
    shutil.copy(HERE / "fused_triton_swiglu.py", tmp_path)
    # Gluon as it might be one day, without a name that is needed here.
    hide = "from triton.experimental.gluon.language.nvidia import hopper; del hopper.warpgroup_mma_wait\n"
    out = run_python(
        f"{hide if gluon == 'without Gluon' else ''}import torch\n"
        "from fused_triton_swiglu import fused_swiglu\n"
        "assert not torch.cuda.is_initialized()  # nothing happens at import\n"
        f"x, w_gate, w_up = (torch.randn(s, device='{DEVICE}') for s in ((3, 5), (5, 7), (5, 7)))\n"
        "expected = torch.nn.functional.silu(x @ w_gate) * (x @ w_up)\n"
        "assert torch.allclose(fused_swiglu(x, w_gate, w_up), expected, atol=1e-4)\n"
        "print('right')",
        tmp_path,
    )
    assert out == "right\n"


def test_file_needs_torch_and_triton_only():
    imported = set()
    for node in ast.walk(ast.parse((HERE / "fused_triton_swiglu.py").read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    assert imported - set(sys.stdlib_module_names) == {"torch", "triton"}


# ---- Configurations ----

EVERY_CONFIG = [(kind, config) for kind, configs in fts.CONFIGS.items() for config in configs]


def config_id(value):
    if isinstance(value, str):
        return value
    marks = [name for name in ("PERSISTENT", "FLATTEN", "SWAP_AB") if value.kwargs[name]]
    marks += [f"TMA-{value.kwargs['TMA']}"] if value.kwargs["TMA"] else []
    tile = "x".join(str(value.kwargs[name]) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
    return " ".join([tile, f"{value.num_warps}w", f"{value.num_stages}s", *marks])


@pytest.mark.parametrize("tma", ["", "x", "xw"])
@pytest.mark.parametrize("kind", fts.CONFIGS)
def test_there_is_always_a_configuration(kind, tma):
    for name, device in TARGETS.items():
        if tma and (kind != "16-bit" or name not in WITH_TMA):
            continue
        if kind == "tf32" and device.backend == "hip":
            continue
        for M in (1, 17, 33, 65, 129, 257, 5000, 10**6):
            for N in (1, 512, 14336):
                configs = fts.usable_configs(kind, M, N, tma, device)
                assert configs and len(configs) <= 12, (device, M, N)


def test_every_configuration_is_chosen_somewhere():
    chosen = []
    for device in TARGETS.values():
        for kind in fts.CONFIGS:
            for M in (1, 32, 64, 128, 256, 4096):
                for tma in ("", "x", "xw"):
                    chosen += fts.usable_configs(kind, M, 14336, tma, device)
                    chosen += fts.usable_configs(kind, M, 512, tma, device)
    assert all(config in chosen for _, config in EVERY_CONFIG)


def force(config):
    """fused_swiglu with this configuration; returns gate beside up too."""

    def run(x, w_gate, w_up):
        y = torch.empty(*x.shape[:-1], w_gate.shape[1], dtype=x.dtype, device=x.device)
        gate_up = torch.empty(*x.shape[:-1], 2 * w_gate.shape[1], dtype=x.dtype, device=x.device)
        fts._launch_triton(fts._in_rows(x), w_gate, w_up, y, gate_up, fts.DEFAULT, [config])
        return y, gate_up

    return run


# Small ones are for compute-sanitizer too, which takes its time: see the README. Under it cuBLAS's 16-bit kernels fail
# (racecheck) or leave what counts as unwritten (initcheck), so PyTorch computes on the CPU what these compare with.
SMALL_AND_LARGE = ["small", pytest.param("large", marks=needs_gpu)]
RUNS = {"small": 3 if GPU else 1, "large": 20}  # to have the same bits: a race in one configuration came and went


@pytest.mark.parametrize("size", SMALL_AND_LARGE)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind, config", EVERY_CONFIG, ids=config_id)
def test_every_configuration(kind, config, layout, size):
    """One tile, ragged edges, many waves; right, and the same in each run."""
    if config.kwargs["TMA"] == "xw" and layout != "linear":
        pytest.skip("the weights' descriptor takes nn.Linear weights only")
    block_m, block_n, block_k = (config.kwargs[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
    sizes = [(block_m, block_k, block_n), (block_m + 1, 2 * block_k + 8, block_n + 8)]
    if size == "large":
        sizes = [(2048, 4096, 14336), (1037, 1096, 4104), (8192, 4096, 4096)]
        if not config.kwargs["TMA"]:
            sizes += [(517, 1031, 2063)]
    if kind == "tf32":
        if not GPU:
            pytest.skip("the interpreter multiplies in full float32")
        if torch.version.hip:
            pytest.skip("float32 products are never tf32 on AMD")
    dtypes = DTYPES[:2] if kind == "16-bit" and GPU else DTYPES[1:2] if kind == "16-bit" else DTYPES[2:]
    previous = torch.get_float32_matmul_precision()
    for M, K, N in sizes:
        for dtype in dtypes:
            inputs = make_inputs(M, K, N, dtype, layout, DEVICE)
            compared = [t.to("cpu" if size == "small" and kind == "16-bit" else DEVICE) for t in inputs]
            expected = reference(*compared)
            torch.set_float32_matmul_precision("high" if kind == "tf32" else "highest")
            try:
                eager_error = relative_error(torch_swiglu(*compared), expected)
                # Rounding both operands to tf32 costs about 4.2e-4, on both sides alike; cutting them off, 1.6e-3.
                limit = 1.05 * eager_error if kind == "tf32" else max(eager_error, ROUNDING[dtype])
                x, w_gate, w_up = (t.to(expected.dtype) for t in compared)
                expected_gate_up = torch.cat([x @ w_gate, x @ w_up], dim=1)
                results = None
                for _ in range(RUNS[size]):
                    with nan_in_new_memory():
                        again = force(config)(*inputs)
                    results = results or again
                    assert all(map(torch.equal, again, results)), (M, K, N, dtype)
                assert relative_error(results[0], expected) <= limit, (M, K, N, dtype)
                assert relative_error(results[1], expected_gate_up) <= limit, (M, K, N, dtype)
            finally:
                torch.set_float32_matmul_precision(previous)


needs_hopper = pytest.mark.skipif(
    not GPU or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU (sm_90)"
)


def gate_up_times_weights(gate_up, w_gate, w_up):
    gate, up = gate_up.chunk(2, dim=1)
    return gate @ w_gate.to(gate.dtype).t() + up @ w_up.to(up.dtype).t()


@needs_hopper
@pytest.mark.parametrize("size", ["small", "large"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_hopper_kernels(dtype, layout, size):
    """One tile, ragged edges, many waves, the last one in whole and in half tiles; the same in each run."""
    sizes = [(1, 8, 8), (128, 64, 128), (129, 72, 136), (77, 264, 520)]
    if size == "large":
        sizes = [(1037, 1096, 4104), (4100, 1024, 8192), (512, 4096, 14336), (2048, 4096, 14336), (8192, 4096, 4096)]
    for M, K, N in sizes:
        inputs = make_inputs(M, K, N, dtype, layout, DEVICE)
        x, *weights = compared = [t.to("cpu" if size == "small" else DEVICE) for t in inputs]
        expected = reference(*compared)
        expected_gate_up = torch.cat([x.to(expected.dtype) @ w.to(expected.dtype) for w in weights], dim=1)
        expected_dx = gate_up_times_weights(expected_gate_up, *weights)
        limit = max(relative_error(torch_swiglu(*compared), expected), ROUNDING[dtype])
        x, w_gate, w_up = inputs
        d = expected_gate_up.to(DEVICE, dtype).split(N, dim=1)
        results = None
        for _ in range(RUNS[size]):
            y, kept_y = (torch.full((M, N), float("nan"), dtype=dtype, device=DEVICE) for _ in range(2))
            gate_up = torch.full((M, 2 * N), float("nan"), dtype=dtype, device=DEVICE)
            dx = torch.full((M, K), float("nan"), dtype=dtype, device=DEVICE)
            fts._launch_hopper(fts._in_rows(x), w_gate, w_up, y, None)
            fts._launch_hopper(fts._in_rows(x), w_gate, w_up, kept_y, gate_up)
            fts._launch_hopper_dx(*d, w_gate, w_up, dx)
            results = results or (y, gate_up, dx)
            assert torch.equal(y, kept_y) and all(map(torch.equal, (y, gate_up, dx), results)), (M, K, N)
        for result, right in zip(results, (expected, expected_gate_up, expected_dx), strict=True):
            assert relative_error(result, right) <= limit, (M, K, N)


def test_where_the_hopper_kernel_applies(monkeypatch):
    monkeypatch.setattr(fts, "INTERPRETED", False)
    M, K, N = 300, 72, 136 * 45
    x, w_gate, w_up = make_inputs(M, K, N, torch.bfloat16, "linear", "cpu")
    row_major = w_gate.contiguous(), w_up.contiguous()
    padded = torch.empty(M, K + 1, dtype=torch.bfloat16)[:, :K]
    unaligned = torch.empty(N * K + 1, dtype=torch.bfloat16)[1:].view(N, K).t()
    cases = [
        (True, x, w_gate, w_up),
        (True, x, *row_major),
        (True, x, *torch.cat(row_major, dim=1).chunk(2, dim=1)),
        (True, torch.cat([x, x], dim=1)[:, K:], w_gate, w_up),
        (False, x[:128], w_gate, w_up),  # swiglu_kernel is faster
        (False, x, w_gate[:, :1024], w_up[:, :1024]),  # fewer tiles than a third of the SMs
        (False, x, w_gate[:, :-4], w_up[:, :-4]),  # y does not come in steps of 16 bytes
        (False, x, w_gate, row_major[1]),
        (False, x, w_gate, unaligned),
        (False, padded, w_gate, w_up),
        (False, torch.cat([x, x], dim=1)[:, ::2], w_gate, w_up),
        (False, x.t().contiguous().t(), w_gate, w_up),
        (False, x.float(), w_gate.float(), w_up.float()),
    ]
    for i, (applies, rows, gate, up) in enumerate(cases):
        assert fts.hopper_applies(fts._in_rows(rows), gate, up, H100) == applies, i
        for m in (1, 129, 300) if rows.is_contiguous() else ():  # with any_m M does not matter
            answer = fts.hopper_applies(fts._in_rows(rows[:m]), gate, up, H100, any_m=True)
            assert answer == (applies or i in (4, 5)), (i, m)
    for device in (TARGETS["sm_80"], TARGETS["sm_100"], TARGETS["gfx942"]):
        assert not fts.hopper_applies(fts._in_rows(x), w_gate, w_up, device)


def compile_hopper(target, element, layout, form):
    """A kernel for Hopper as the launcher would compile it, without a GPU."""
    import triton
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonASTSource

    tile_m, box, consumers = fts.TILE_M.value, fts.BOX.value, fts.CONSUMERS.value
    kernel = fts.swiglu_dx_kernel_hopper if form == "dx" else fts.swiglu_kernel_hopper
    loads = ("dgate_desc", "dup_desc") if form == "dx" else ("x_desc",)
    rows = dict.fromkeys(loads, tile_m) | dict.fromkeys(("w_gate_desc", "w_up_desc"), box)
    stores = ("dx_desc",) if form == "dx" else ("y_desc", "gate_desc", "up_desc")
    rows |= dict.fromkeys(stores, tile_m // consumers)
    swizzled = gl.NVMMASharedLayout(2 * box, 16)
    types = {name: f"tensordesc<{element}[{rows[name]}, {box}],{swizzled!r}>" for name in rows}
    types |= dict.fromkeys(("M", "N", "K"), "i32")
    constants = {"ROW_MAJOR": layout == "row-major"}
    if form == "forward":
        constants |= {"gate_desc": None, "up_desc": None}
    types |= dict.fromkeys(constants, "constexpr")
    constants = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = GluonASTSource(kernel, {name: types[name] for name in kernel.arg_names}, constexprs=constants, attrs={})
    return triton.compile(source, target=target, options=fts.HOPPER_OPTIONS)


def compile_for(target, kind, config, layout, even_k, keep):
    """What the launcher would compile for tensors aligned to 16 bytes, without a GPU."""
    import triton  # not above: it reads TRITON_INTERPRET when it is imported, before benchmark could set it

    kernel = fts.swiglu_kernel.fn
    element = "bf16" if kind == "16-bit" else "fp32"
    tile_m, tile_n, tile_k = (config.kwargs[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
    constants = {"M_INNER": 1, "stride_xk": 1, "LAYOUT": "", "DEVICE": "", "UP_FIRST": False}
    constants |= dict.fromkeys(("stride_gk", "stride_uk") if layout == "linear" else ("stride_gn", "stride_un"), 1)
    constants |= {"EVEN_K": even_k, "SAME_STRIDE_K": True, "INPUT_PRECISION": "tf32" if kind == "tf32" else "ieee"}
    constants |= config.kwargs
    types = {name: f"*{element}" if name.endswith("_ptr") else "i32" for name in kernel.arg_names}
    types["x_desc"] = f"tensordesc<{element}[{tile_m},{tile_k}]>"
    types["w_desc"] = f"tensordesc<{element}[2,{tile_n},{tile_k}]>"
    constants |= {name: None for name in ("x_desc", "w_desc") if name[0] not in config.kwargs["TMA"]}
    if not keep:
        constants["gate_up_ptr"] = None
    types |= dict.fromkeys(constants, "constexpr")
    aligned = [i for i, name in enumerate(kernel.arg_names) if types[name] == "i32" or types[name][0] == "*"]
    source = triton.compiler.ASTSource(
        kernel,
        types,
        constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    if target.backend == "cuda":
        options["maxnreg"] = 255
    return triton.compile(source, target=target, options=options)


def compile_backward(target, element):
    """swiglu_backward_kernel as the launcher would compile it for a contiguous dy, without a GPU."""
    import triton

    kernel = fts.swiglu_backward_kernel
    constants = {"stride_dyn": 1, "BLOCK_N": 1024}
    types = {name: f"*{element}" if name.endswith("_ptr") else "i32" for name in kernel.arg_names}
    types |= dict.fromkeys(constants, "constexpr")
    source = triton.compiler.ASTSource(
        kernel,
        types,
        constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name not in constants},
    )
    return triton.compile(source, target=target)


def stack_bytes(compiled):
    """Bytes of the stack frame: above 0, registers were spilled."""
    if "amdgcn" in compiled.asm:
        return int(re.search(r"\.private_segment_fixed_size: *(\d+)", compiled.asm["amdgcn"])[1])
    cuobjdump = Path(sys.modules["triton"].__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", usage)[1])


def compile_everything(target_name):
    """Compile each configuration that may be chosen on a target; print a line for each that spills or does not fit."""
    from triton.backends.compiler import GPUTarget

    device = TARGETS[target_name]
    target = GPUTarget(device.backend, device.arch, 64 if device.backend == "hip" else 32)
    compiled = 0
    for kind, layout in itertools.product(fts.CONFIGS, LAYOUTS):
        if kind == "tf32" and device.backend == "hip":
            continue
        tma = "" if kind != "16-bit" or target_name not in WITH_TMA else "xw" if layout == "linear" else "x"
        configs = []
        for M, N, operands in itertools.product((1, 32, 64, 128, 256, 4096), (512, 14336), {"", tma}):
            usable = fts.usable_configs(kind, M, N, operands, device)
            configs += [config for config in usable if config not in configs]
        # Not plain: ragged along K, gate and up kept
        variants = (True, False) if target_name in COMPILED_IN_FULL else (layout == "linear",)
        for config, plain in itertools.product(configs, variants):
            result = compile_for(target, kind, config, layout, even_k=plain, keep=not plain)
            compiled += 1
            # The epilogue that stores three tiles spills in some of them, once per tile: Triton 3.9 up to 136 bytes.
            if stack_bytes(result) > (0 if plain else 136) or result.metadata.shared > device.shared_memory:
                print(f"{kind} {layout} {'plain' if plain else 'ragged, kept'} {config}:", end=" ")
                print(f"{stack_bytes(result)} bytes of stack, {result.metadata.shared} of shared memory")
    for element in ("bf16", "fp32"):
        compiled += 1
        if stack_bytes(compile_backward(target, element)):
            print(f"swiglu_backward_kernel {element} spills")
    if device.arch == 90:
        for element, layout, form in itertools.product(("bf16", "fp16"), LAYOUTS, ("forward", "keep", "dx")):
            result = compile_hopper(target, element, layout, form)
            compiled += 1
            if stack_bytes(result) or result.metadata.shared > device.shared_memory:
                print(f"Hopper, {form}, {element} {layout}:", end=" ")
                print(f"{stack_bytes(result)} bytes of stack, {result.metadata.shared} of shared memory")
    print("compiled", compiled)


@pytest.fixture(scope="session")
def compilations():
    """A process for each target, as the interpreter's Triton cannot compile, beside the tests that run meanwhile."""
    pool = ThreadPoolExecutor(os.cpu_count())
    options = {"cwd": HERE, "env": os.environ | {"TRITON_INTERPRET": "0"}, "capture_output": True, "text": True}
    code = "import test_swiglu; test_swiglu.compile_everything({!r})"
    command = [sys.executable, "-c"]
    yield {name: pool.submit(subprocess.run, [*command, code.format(name)], **options) for name in TARGETS}
    pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="session", autouse=True)
def start_compiling(request):
    """With the first test, if one of this run is to compile."""
    if any("compilations" in item.fixturenames for item in request.session.items):
        request.getfixturevalue("compilations")


@pytest.mark.parametrize("target", TARGETS)
def test_every_configuration_compiles(compilations, target):
    """Without a GPU, for each kind of target: it compiles, fits the shared memory and does not spill."""
    done = compilations[target].result(timeout=800)
    assert done.returncode == 0, done.stderr[-3000:]
    *problems, last = done.stdout.splitlines()
    assert not problems, done.stdout
    assert int(last.removeprefix("compiled ")) >= (20 if target in COMPILED_IN_FULL else 16)


# ---- On a GPU: tuning, memory, capture, devices ----


@pytest.fixture
def timings(monkeypatch):
    """A list that gets an entry for each configuration that the autotuner times."""
    entries = []

    def do_bench(kernel_call, quantiles):
        entries.append(kernel_call)
        kernel_call()
        return [1.0] * len(quantiles)

    for tuner in fts.TUNERS.values():
        monkeypatch.setitem(tuner.__dict__, "do_bench", do_bench)  # a cached property
        monkeypatch.setattr(tuner, "cache_results", False)
    return entries


@needs_gpu
@pytest.mark.parametrize("name", ["linear", "row-major", "stacked", "transposed x", "three row strides", "unlike"])
def test_no_operand_is_copied(name):
    M, K, N = 512, 1024, 2048
    x, w_gate, w_up = make_inputs(M, K, N, torch.bfloat16, "row-major" if name == "row-major" else "linear", DEVICE)
    if name == "stacked":
        w_up, w_gate = torch.cat([w_gate.t(), w_up.t()]).t().chunk(2, dim=1)
    if name == "transposed x":
        x = x.t().contiguous().t()
    if name == "three row strides":
        x = x.view(4, 8, 16, K)[:, ::2].transpose(1, 2)[:, :8]
    if name == "unlike":
        w_up = w_up.contiguous()
    fused_swiglu(x, w_gate, w_up)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    y = fused_swiglu(x, w_gate, w_up)
    assert torch.cuda.max_memory_allocated() - before == y.nbytes  # all sizes here are multiples of 512 bytes


@needs_gpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("large", ["x", "w", "w, many rows", "y"])
def test_more_than_2_to_the_31_elements(large, layout):
    sizes = {"x": (2**20 + 65, 2056, 64), "w": (65, 32776, 65544), "y": (2**18 + 65, 16, 8200)}
    M, K, N = (sizes | {"w, many rows": (200, 32776, 65544)})[large]
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of GPU memory")
    x = torch.randn(M, K, device=DEVICE, dtype=torch.bfloat16)
    shape = (N, K) if layout == "linear" else (K, N)
    w_gate, w_up = (torch.randn(shape, device=DEVICE, dtype=torch.bfloat16).mul_(K**-0.5) for _ in range(2))
    if layout == "linear":
        w_gate, w_up = w_gate.t(), w_up.t()
    with nan_in_new_memory():
        y = untuned(x, w_gate, w_up)
    rows, columns = slice(-65, None), slice(-64, None)  # the farthest from the start
    expected = reference(x[rows], w_gate[:, columns], w_up[:, columns])
    assert relative_error(y[rows, columns], expected) <= ROUNDING[torch.bfloat16]
    assert not y.isnan().any()


@needs_gpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("M, N", [(1, 521), (300, 820), (300, 5768)])
def test_graph_capture_never_tunes(M, N, layout, timings):
    inputs = make_inputs(M, 328, N, torch.bfloat16, layout, DEVICE)  # sizes no other test has
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = fused_swiglu(*inputs)
    y.fill_(float("nan"))
    graph.replay()
    assert relative_error(y, reference(*inputs)) <= ROUNDING[torch.bfloat16]
    assert not timings
    fused_swiglu(*inputs)
    x, w_gate, w_up = inputs  # outside a capture it does, where there is something to tune
    assert bool(timings) != fts.hopper_applies(fts._in_rows(x), w_gate, w_up, fts.device_of(0))


@needs_gpu
def test_when_tuning_happens(timings):
    sizes = {M: make_inputs(M, 328, 344, torch.bfloat16, "linear", DEVICE) for M in (520, 777, 1024, 1025)}
    untuned(*sizes[520])
    assert not timings
    fused_swiglu(*sizes[520])
    once = len(timings)
    assert once > 1
    for M in (520, 777, 1024):  # one bucket
        assert_right(*sizes[M], run=fused_swiglu)
    assert len(timings) == once
    fused_swiglu(*sizes[1025])
    assert len(timings) > once


@needs_gpu
@pytest.mark.parametrize("N", [520, 5640])
def test_a_second_call_launches_the_same_kernel(N, monkeypatch):
    """What a launch depends on and could be forgotten: alignment, the order of the weights, the precision."""
    monkeypatch.setattr(fts, "_launchers", {})
    M, K = 130, 264
    x, w_gate, w_up = make_inputs(M, K, N, torch.bfloat16, "linear", DEVICE)
    storage = torch.empty(M * K + 8, dtype=torch.bfloat16, device=DEVICE)
    unaligned = storage[1 : 1 + M * K].view(M, K).copy_(x)
    for _ in range(2):
        for gate, up in ((w_gate, w_up), (w_up, w_gate), (w_gate, w_gate), (w_gate, w_up.contiguous())):
            for rows in (x, unaligned, x[:1], x[:, None], x.t().contiguous().t()):
                assert_right(rows, gate, up)
    single = make_inputs(M, K, N, torch.float32, "linear", DEVICE)
    errors = {}
    previous = torch.get_float32_matmul_precision()
    for precision in ("highest", "high", "highest", "high"):
        torch.set_float32_matmul_precision(precision)
        errors.setdefault(precision, []).append(relative_error(untuned(*single), reference(*single)))
    torch.set_float32_matmul_precision(previous)
    assert max(errors["highest"]) < 1e-5 < 1e-4 < min(errors["high"])
    for _ in range(2):  # the same shapes, with and without gate and up kept
        assert fused_swiglu(x.requires_grad_(), w_gate, w_up).requires_grad
        assert not fused_swiglu(x.detach(), w_gate, w_up).requires_grad


@needs_gpu
def test_tuning_is_quick_and_kept_on_disk(tmp_path):
    code = (
        "import sys, time, torch, triton.testing\n"
        "import fused_triton_swiglu as fts\n"
        "from benchmark import make_inputs\n"
        "measured = 0\n"
        "def count(call, quantiles):\n"
        "    global measured\n"
        "    measured += 1\n"
        "    return triton.testing.do_bench(call, quantiles=quantiles)\n"
        "fts.TUNERS['16-bit']._do_bench = count\n"
        "seconds = []\n"
        "for M, layout in ((1, 'linear'), (128, 'linear'), (64, 'row-major'), (4096, 'linear')):\n"
        "    inputs = make_inputs(M, 4096, 14336, torch.bfloat16, layout, 'cuda')\n"
        "    start = time.time()\n"
        "    fts.fused_swiglu(*inputs)\n"
        "    torch.cuda.synchronize()\n"
        "    seconds.append(time.time() - start)\n"
        "print(measured, max(seconds))\n"
    )
    (first, seconds), (second, _) = (
        map(float, run_python(code, HERE, TRITON_CACHE_DIR=str(tmp_path)).split()) for _ in range(2)
    )
    assert first > 5 and second == 0
    assert seconds < 15


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("M, N", [(3, 520), (200, 520), (200, 5640)])
def test_runs_on_the_device_of_its_inputs(M, N, layout):
    inputs = [t.to("cuda:1") for t in make_inputs(M, 328, N, torch.bfloat16, layout, "cuda:0")]
    assert torch.cuda.current_device() == 0
    assert_right(*inputs, run=fused_swiglu)
    assert fused_swiglu(*inputs).device == inputs[0].device
    with pytest.raises(ValueError, match="w_up is on cuda:0, but x is on cuda:1"):
        fused_swiglu(*inputs[:2], inputs[2].to("cuda:0"))


# ---- benchmark.py as a process ----


def run_benchmark(*arguments, script=HERE / "benchmark.py", cwd):
    command = [sys.executable, str(script), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600)


def test_benchmark(tmp_path):
    small = ["--m", "65", "1", "--k", "264", "--n", "520"] if GPU else []
    done = run_benchmark(*small, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(tmp_path / "swiglu_benchmark.csv")
    assert list(table) == benchmark.COLUMNS
    fused = table[(table.provider == "fused") & (table.method != benchmark.HOST)]
    assert (fused.rel_error < ROUNDING[torch.bfloat16]).all()
    if GPU:
        assert (table.ms_p20 <= table.ms).all() and (table.ms <= table.ms_p80).all() and (table.ms > 0).all()
        host, table = table[table.method == benchmark.HOST], table[table.method == benchmark.FLUSHED]
        assert [*host.provider] == ["torch", "torch.compile", "fused"]
        assert host.ms[host.provider == "fused"].item() < 1  # ms: no tuning is in it
        assert [*zip(table.M, table.provider, strict=True)] == [(M, p) for M in (1, 65) for p in benchmark.PROVIDERS]
        assert (table.K == 264).all() and (table.N == 520).all()
        assert (tmp_path / "swiglu_benchmark.png").stat().st_size > 10_000
        assert table[["peak_mib", "kept_mib"]].isna().all(axis=None)
    else:
        assert "Speed was not measured" in done.stdout and benchmark.RECORDED_PLOT in done.stdout
        assert (HERE / benchmark.RECORDED_PLOT).is_file()
        assert set(table.dtype) == set(benchmark.DTYPES) and set(table.layout) == set(LAYOUTS)
        measured = ["method", "ms", "ms_p20", "ms_p80", "tflops", "gbps", "speedup", "fraction_of_floor"]
        assert table[measured].isna().all(axis=None)


def test_benchmark_of_both_passes(tmp_path):
    small = ["--m", "65", "--k", "264", "--n", "520"] if GPU else []
    done = run_benchmark("--backward", *small, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(tmp_path / "swiglu_benchmark_backward.csv")
    assert list(table) == benchmark.COLUMNS
    if GPU:
        table = table[table.method == benchmark.BACKWARD].set_index("provider")
        assert tuple(table.index) == benchmark.BACKWARD_PROVIDERS
        assert (table.ms > 0).all() and (table.peak_mib > table.kept_mib).all()
        kept = table.kept_mib
        assert kept["fused, recomputing"] < 0.01 < kept.fused < kept.torch  # MiB: blocks of 512 bytes
        assert (tmp_path / "swiglu_benchmark_backward.png").stat().st_size > 10_000
    else:
        assert set(table.provider) == {"torch", "fused", "fused, recomputing"}
    assert (table.rel_error < 3 * ROUNDING[torch.bfloat16]).all()


@needs_gpu
def test_benchmark_rotating_weights_and_peers(tmp_path):
    """One file more, times of the same order, and a line for each peer that is not installed or does not run."""
    small = ["--m", "65", "--k", "2048", "--n", "4104", "--providers", "all", "--rotate-weights"]
    done = run_benchmark(*small, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(tmp_path / "swiglu_benchmark_rotating_weights.csv")
    table = table[table.method == benchmark.ROTATING]
    assert {*benchmark.PROVIDERS} <= {*table.provider}
    assert table.ms.between(1e-3, 1).all()
    for name in benchmark.PEERS:
        assert (name in {*table.provider}) != (f"{name} left out: " in done.stdout + done.stderr)


@pytest.mark.parametrize(
    "options, right, wrong",
    [
        ([], "offs_k < K - k", "offs_k < K - k - 1"),
        (["--backward"], "dup = dy * gate * sigmoid\n", "dup = dy * gate\n"),
    ],
    ids=["forward", "backward"],
)
def test_benchmark_stops_at_a_wrong_kernel(options, right, wrong, tmp_path):
    for name in ("benchmark.py", "baseline_torch_swiglu.py", "fused_triton_swiglu.py"):
        shutil.copy(HERE / name, tmp_path)
    kernel = (HERE / "fused_triton_swiglu.py").read_text()
    broken = kernel.replace(right, wrong)
    assert broken != kernel
    (tmp_path / "fused_triton_swiglu.py").write_text(broken)
    small = ["--m", "3", "--k", "67", "--n", "33"] if GPU else []
    done = run_benchmark(*options, *small, script=tmp_path / "benchmark.py", cwd=tmp_path)
    assert done.returncode == 1
    assert "WRONG" in done.stdout + done.stderr
    if GPU:
        assert not [*tmp_path.glob("*.csv")]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--m", "0"], "argument --m: 0 is not 1 or more"),
        (["--k", "many"], "argument --k: invalid positive_int value: 'many'"),
        (["--model", "gpt-1"], "argument --model: invalid choice: 'gpt-1'"),
        (["--model", "llama-3-8b", "--k", "8"], "--model gives K and N"),
        (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["--providers", "cublas"], "argument --providers: invalid choice: 'cublas'"),
        (["--providers", "fused, recomputing"], "--providers fused, recomputing: not without --backward"),
        (["--backward", "--providers", "packed matmul only"], "packed matmul only: not with --backward"),
        (["--backward", "--rotate-weights"], "--backward and --rotate-weights exclude each other"),
        (["--plot", "nothing.csv"], "--plot nothing.csv: no such file"),
        (["--plot", "empty.csv"], "--plot empty.csv: no column K, M, N"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_benchmark_refuses(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.csv").write_text("gpu\nnone\n")
    with pytest.raises(SystemExit) as stopped:
        benchmark.parse_args(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_interrupt_keeps_what_was_measured(tmp_path, monkeypatch):
    table = pd.read_csv((HERE / benchmark.RECORDED_PLOT).with_suffix(".csv"))
    host_rows = table[table.method == benchmark.HOST].to_dict("records")
    table = table[table.method == benchmark.FLUSHED]

    def measure(M, K, N, args, ceilings, progress):
        if M > 16:
            raise KeyboardInterrupt
        return table[table.M == M].to_dict("records")

    monkeypatch.setattr(benchmark, "measure", measure)
    monkeypatch.setattr(benchmark, "measure_ceilings", lambda dtype: (3e9, 8e11))
    monkeypatch.setattr(benchmark, "measure_host_cost", lambda args: host_rows)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    status = benchmark.run_on_gpu(benchmark.parse_args(["--m", "1", "16", "64", "--output-dir", str(tmp_path)]))
    assert status == 130
    assert set(pd.read_csv(tmp_path / "swiglu_benchmark.csv").M) == {1, 16}
    assert (tmp_path / "swiglu_benchmark.png").is_file()


TRIALS = ("h200_stress", "h200_sanitizer")  # what was tried, not timed: see test_faults.py
RECORDED = sorted(path for path in (HERE / "results").glob("*.csv") if path.stem not in TRIALS)


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_recorded_results(path, tmp_path, monkeypatch):
    table = pd.read_csv(path)
    assert list(table) == benchmark.COLUMNS
    assert path.with_suffix(".png").is_file()
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--plot", str(path), "--output-dir", str(tmp_path)])
    assert benchmark.main() == 0
    assert (tmp_path / path.with_suffix(".png").name).stat().st_size > 10_000


def recorded_times(name):
    """A table of microseconds, rows by M and columns by provider, and the CSV it comes from."""
    table = pd.read_csv(HERE / "results" / f"{name}.csv")
    table = table[table.method == benchmark.FLUSHED].reset_index()
    return table.pivot(index="M", columns="provider", values="ms") * 1e3, table


@pytest.mark.parametrize("layout", LAYOUTS)
def test_readme_tables_are_the_recorded_ones(layout):
    """| M | a column for each provider, in microseconds | speed-up of the fused kernel |, from the CSV."""
    readme = (HERE / "README.md").read_text()
    times, table = recorded_times(f"h100_bfloat16_{layout}")
    for M, row in times.iterrows():
        cells = [f"{M}", *(f"{row[name]:.1f}" for name in benchmark.PROVIDERS), f"{row.torch / row.fused:.2f}x"]
        assert "| " + " | ".join(cells) + " |" in readme
    assert str(table.gpu[0]) in readme and table.torch[0] in readme and table.triton[0] in readme


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", ["8192x28672", "2048x5632", "1024x4096"])
def test_readme_table_of_other_shapes_is_the_recorded_one(shape, layout):
    """A row for each CSV: microseconds (times as fast as eager, as the packed form under torch.compile)."""
    path = f"h100_bfloat16_{layout}_{shape}"
    times, _ = recorded_times(path)
    gains = zip(times.fused, times.torch / times.fused, times["packed torch.compile"] / times.fused, strict=True)
    cells = [f"{fused:.1f} ({eager:.2f}x, {packed:.2f}x)" for fused, eager, packed in gains]
    assert f"[{layout}](results/{path}.csv) | {' | '.join(cells)} |" in (HERE / "README.md").read_text()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_readme_tables_of_both_passes_are_the_recorded_ones(layout):
    """Microseconds and the speed-up by M; memory in MiB, the same in both layouts."""
    readme = (HERE / "README.md").read_text()
    providers = ["torch", "torch.compile", "packed torch.compile", "liger-kernel", "fused", "fused, recomputing"]
    path = HERE / "results" / f"h200_bfloat16_{layout}_backward.csv"
    table = pd.read_csv(path)
    table = table[table.method == benchmark.BACKWARD]
    times = table.pivot(index="M", columns="provider", values="ms") * 1e3
    for M, row in times.iterrows():
        cells = [f"{M}", *(f"{row[name]:.0f}" for name in providers), f"{row.torch / row.fused:.2f}x"]
        assert "| " + " | ".join(cells) + " |" in readme
    for column, label in (("kept_mib", "kept between the passes"), ("peak_mib", "at most")):
        memory = table.pivot(index="M", columns="provider", values=column)
        for M in (2048, 4096, 8192):
            cells = [f"{label}, M = {M}", *(f"{memory.loc[M, name]:.0f}" for name in providers)]
            assert "| " + " | ".join(cells) + " |" in readme


@needs_gpu
def test_readme_examples_run():
    examples = re.findall("```python\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)
    assert len(examples) == 2
    pytest.importorskip("transformers", reason="one example needs transformers, which is not installed")
    for example in examples:
        exec(example, {})
