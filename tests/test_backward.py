"""The backward pass: gradients right by themselves, and with whatever else autograd does to them."""

import collections
import contextlib
import functools
import itertools
import re
import weakref

import pytest
import torch
import torch.utils.checkpoint

import benchmark
import common
import fused_triton_swiglu as fts
from baseline_torch_swiglu import ROUNDING, gradient_limit, make_inputs, nan_in_new_memory, reference, torch_swiglu
from benchmark import LAYOUTS
from common import DEVICE, DTYPES, GPU, assert_close, assert_gradients_right, leaves_and_dy, needs_gpu, randn, untuned
from fused_triton_swiglu import fused_swiglu
from test_forward import K, N

NEEDS = [needs for needs in itertools.product([False, True], repeat=3) if any(needs)]
both_ways = pytest.mark.parametrize("recompute", [False, True], ids=["keep", "recompute"])
SIZES = [(1, 1, 1), (2, 3, 5), (17, 33, 65), (129, 67, 31)]
SIZES += [(1, 1024, 4096), (300, 1096, 4104), (517, 1031, 2063), (4100, 1024, 2048)] if GPU else []


@both_ways
@pytest.mark.parametrize("layout", [*LAYOUTS, "unlike"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M, K, N", SIZES)
def test_gradients(M, K, N, dtype, layout, recompute):
    leaves, dy = leaves_and_dy(M, K, N, dtype, "row-major" if layout == "row-major" else "linear")
    if layout == "unlike":
        leaves[2] = leaves[2].detach().contiguous().requires_grad_()
    assert_gradients_right(leaves, dy, functools.partial(untuned, recompute=recompute))
    if layout != "unlike":  # nn.Linear takes them over as they are
        gradients = torch.autograd.grad(untuned(*leaves, recompute=recompute), leaves, dy)
        assert [t.stride() for t in gradients] == [t.stride() for t in leaves]


LEADING = {
    "vector": lambda x: x[0, 0, 0],
    "batch of 1 and one row": lambda x: x[:1, :1, 0],
    "four": lambda x: x,
    "transposed": lambda x: x[0].transpose(0, 1),
    "every other column": lambda x: x[0, ..., ::2],
    "expanded": lambda x: x[0, :1].expand(5, -1, -1),
    "K first": lambda x: x[0, 0].t().contiguous().t(),
}


@both_ways
@pytest.mark.parametrize("name", LEADING)
def test_leading_dimensions(name, recompute):
    x = LEADING[name](randn(2, 3, 35, K, dtype=torch.float16)).detach()
    weights = make_inputs(1, x.shape[-1], N, torch.float16, "linear", DEVICE)[1:]
    leaves = [t.requires_grad_() for t in (x, *weights)]
    dy, run = randn(*x.shape[:-1], N, dtype=torch.float16), functools.partial(untuned, recompute=recompute)
    assert_gradients_right(leaves, dy, run)
    for y in (run(*leaves), untuned(*(t.detach() for t in leaves))):
        assert y.shape == dy.shape and y.is_contiguous()


@both_ways
@pytest.mark.parametrize("M, K, N", [(0, 8, 4), (3, 8, 0), (3, 0, 4), (0, 0, 0)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty(M, K, N, dtype, recompute):
    inputs = [randn(*shape, dtype=dtype).requires_grad_() for shape in ((2, M, K), (K, N), (K, N))]
    with nan_in_new_memory():
        y = fused_swiglu(*inputs, recompute=recompute)
        y.sum().backward()
    assert torch.equal(y, torch.zeros(2, M, N, dtype=dtype, device=DEVICE))
    assert all(torch.equal(t.grad, torch.zeros_like(t)) for t in inputs)


@both_ways
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values(dtype, recompute):
    """NaN and infinities where float64 has them. The weights' gradients are dgate and dup, as x is 1 and K is 1."""
    info = torch.finfo(dtype)
    special = [1.0, float("nan"), float("inf"), -float("inf"), 1e4, -1e4, 50.0, -50.0, 0.0, info.max, -info.max]
    x, values = torch.ones(1, 1, dtype=dtype, device=DEVICE), torch.tensor([special], dtype=dtype, device=DEVICE)
    leaves = [values.clone().requires_grad_() for _ in range(2)]
    fused_swiglu(x, *leaves, recompute=recompute).sum().backward()
    gate, up = (values.double().requires_grad_() for _ in range(2))
    (torch.nn.functional.silu(gate) * up).sum().backward()
    rtol = max(2 * info.eps, 3e-6)  # see test_forward.py
    for leaf, exact in zip(leaves, (gate, up), strict=True):
        torch.testing.assert_close(leaf.grad, exact.grad.to(dtype), rtol=rtol, atol=info.tiny, equal_nan=True)


# ---- What is kept and computed ----


class CountCalls(torch.utils._python_dispatch.TorchDispatchMode):
    """How often each PyTorch operator runs."""

    def __init__(self):
        super().__init__()
        self.calls = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls[function.overloadpacket.__name__] += 1
        return function(*args, **kwargs or {})


@both_ways
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("needs", NEEDS, ids=str)
def test_only_what_is_needed(needs, layout, recompute):
    M = 20
    inputs = make_inputs(M, K, N, torch.float32, layout, DEVICE)
    x, w_gate, w_up = (t.requires_grad_(need) for t, need in zip(inputs, needs, strict=True))
    leaves = [t for t in (x, w_gate, w_up) if t.requires_grad]
    dy = randn(M, N)
    saved = common.saved_by(lambda: fused_swiglu(*inputs, recompute=recompute))
    assert sum(t.shape == (M, 2 * N) for t in saved) == (not recompute)
    assert any(t is x for t in saved) == (recompute or needs[1] or needs[2])  # frozen weights: x is not kept
    assert any(t is w_gate for t in saved) == any(t is w_up for t in saved) == (recompute or needs[0])
    expected = [g for g, need in zip(reference(*inputs, dy)[1:], needs, strict=True) if need]
    for mode in (contextlib.nullcontext(), CountCalls()):  # by the kernel, and by what a compiler sees
        y = fused_swiglu(*inputs, recompute=recompute)
        with mode as count:
            gradients = torch.autograd.grad(y, leaves, dy)
        assert_close(gradients, expected)
    weights = 1 if layout == "linear" and needs[1] and needs[2] else needs[1] + needs[2]
    assert count.calls["mm"] == needs[0] + weights
    assert count.calls["addmm"] == needs[0] and count.calls["swiglu"] == recompute


@both_ways
@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_as_linear_layers_have_them(layout, recompute):
    """The same bits as with weight.t(), and no view of the weights is in the graph."""
    (x, *weights), dy = leaves_and_dy(20, K, N, torch.float32, layout)
    gate, up = weights = [w.detach().t().requires_grad_() for w in weights]
    given = functools.partial(fused_swiglu, linear=True, recompute=recompute)
    for mode in (contextlib.nullcontext(), CountCalls(), torch.autocast(DEVICE, torch.bfloat16)):
        with mode:
            ys = given(x, gate, up), fused_swiglu(x, gate.t(), up.t(), recompute=recompute)
        gradients = [torch.autograd.grad(y, [x, gate, up], dy.to(y.dtype)) for y in ys]
        assert torch.equal(*ys) and all(map(torch.equal, *gradients))
    with torch.no_grad():
        assert torch.equal(given(x, gate, up), fused_swiglu(x, gate.t(), up.t()))
    y, expected = given(x, gate, up), reference(x, gate.t(), up.t(), dy)[1:]
    assert [node.variable for node, _ in y.grad_fn.next_functions[:3]] == [x, gate, up]
    gate.data = torch.zeros_like(gate)  # the gradients are still those of what was multiplied by, as of nn.Linear
    dx, dgate, dup = torch.autograd.grad(y, [x, gate, up], dy)
    assert_close([dx, dgate.t(), dup.t()], expected)
    for wrong in (up[None], up[:5], up.t()):
        with pytest.raises(ValueError, match=re.escape(f"w_up is {tuple(wrong.shape)}, but w_gate is {(N, K)}")):
            given(x, gate, wrong)
    with pytest.raises(ValueError, match=re.escape(f"w_gate is {(K, N)} and x is {(20, K)}: expected (N, K)")):
        given(x, gate.t(), up.t())


def test_without_gradients_nothing_is_kept(monkeypatch):
    leaves, kept, forward = common.leaves_of(5, 16, 24), [], fts._forward
    monkeypatch.setattr(fts, "_forward", lambda *args: kept.append(args[4]) or forward(*args))
    fused_swiglu(*(t.detach() for t in leaves))
    with torch.inference_mode():
        fused_swiglu(*(t.clone() for t in leaves))
    with torch.no_grad():
        fused_swiglu(*leaves)
        with CountCalls():  # the way through the operator
            fused_swiglu(*leaves)
    fused_swiglu(*leaves, recompute=True)
    fused_swiglu(*leaves)
    assert kept == [False] * 5 + [True]


@pytest.mark.parametrize("retain_graph", [False, True])
def test_gate_and_up_make_room_for_their_gradients(retain_graph):
    """Unless they are needed again; and autograd is told."""
    leaves, dy = leaves_and_dy(20, K, N, torch.float16)
    y = fused_swiglu(*leaves)
    kept = y.grad_fn.saved_tensors[-1]
    before, version = kept.clone(), kept._version
    y.backward(dy, retain_graph=retain_graph)
    assert torch.equal(kept, before) == (kept._version == version) == retain_graph
    with contextlib.nullcontext() if retain_graph else pytest.raises(RuntimeError, match="second time"):
        y.backward(dy)


@both_ways
@pytest.mark.parametrize("unpack", [lambda t: t, lambda t: t.t().contiguous().t()], ids=["same", "other strides"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_saved_tensor_hooks(dtype, unpack, recompute):
    (leaves, dy), packed = leaves_and_dy(20, K, N, dtype), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, unpack):
        y = fused_swiglu(*leaves, recompute=recompute)
    before = [t.clone() for t in packed]
    gradients = torch.autograd.grad(y, leaves, dy)
    assert all(map(torch.equal, packed, before))  # the hook may still hold what it gave back
    assert_close(gradients, reference(*leaves, dy)[1:], gradient_limit(dtype, 0))


@both_ways
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activation_checkpointing(dtype, reentrant, recompute):
    leaves, dy = leaves_and_dy(20, K, N, dtype)
    run = functools.partial(untuned, recompute=recompute)
    torch.utils.checkpoint.checkpoint(run, *leaves, use_reentrant=reentrant).backward(dy)
    for t, expected in zip(leaves, torch.autograd.grad(run(*leaves), leaves, dy), strict=True):
        assert torch.equal(t.grad, expected)


def test_gate_and_up_are_gone_before_the_products(monkeypatch):
    """Also where checkpointing has its own hooks on what is saved, so that they are not overwritten."""
    (leaves, dy), kept, alive, forward, mm = leaves_and_dy(20, K, N), [], [], fts._forward, torch.mm

    def watched(*args):
        y, gate_up = forward(*args)
        kept.append(weakref.ref(gate_up))
        return y, gate_up

    monkeypatch.setattr(fts, "_forward", watched)
    monkeypatch.setattr(torch, "mm", lambda *args: alive.append(kept[-1]() is not None) or mm(*args))
    torch.utils.checkpoint.checkpoint(untuned, *leaves, use_reentrant=False).backward(dy)
    assert alive == [False] * 2 and len(kept) == 2


@both_ways
@pytest.mark.parametrize("needs", NEEDS, ids=str)
def test_second_derivatives_are_refused(needs, recompute):
    leaves = [t.requires_grad_(need) for t, need in zip(common.leaves_of(5, 16, 24), needs, strict=True)]
    for mode in (torch.enable_grad, CountCalls):  # by itself, and through the operator
        with mode(), pytest.raises(NotImplementedError, match="fused_swiglu can be differentiated once"):
            fused_swiglu(*leaves, recompute=recompute).sum().backward(create_graph=True)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_autocast(dtype):
    """As F.linear: operands cast to autocast's dtype, gradients in the dtype of their tensors."""
    leaves, dy = common.leaves_of(20, K, N), randn(20, N, dtype=dtype)
    mixed = [leaves[0].detach().bfloat16(), leaves[1].detach(), leaves[2].detach().half()]
    other = torch.float16 if dtype == torch.bfloat16 else torch.bfloat16
    unlike = [t.detach().to(other).requires_grad_() for t in leaves]
    y_unlike = fused_swiglu(*unlike)
    with torch.autocast(DEVICE, dtype):
        y = fused_swiglu(*leaves)
        assert y.dtype == fused_swiglu(*mixed).dtype == dtype
        with pytest.raises(TypeError, match=r"x is torch\.float64"):
            fused_swiglu(leaves[0].double(), *leaves[1:])
        with torch.autocast(DEVICE, enabled=False):
            assert fused_swiglu(*leaves).dtype == torch.float32
        inside = torch.autograd.grad(y, leaves, dy, retain_graph=True)
        # What was computed elsewhere in another dtype has its gradients in that one.
        unlike_inside = torch.autograd.grad(y_unlike, unlike, dy.to(other), retain_graph=True)
    assert all(map(torch.equal, unlike_inside, torch.autograd.grad(y_unlike, unlike, dy.to(other))))
    expected = reference(*(t.detach().to(dtype) for t in leaves), dy)
    assert_close([y], expected[:1], ROUNDING[dtype])
    outside = torch.autograd.grad(y, leaves, dy)
    assert all(map(torch.equal, inside, outside)) and {t.dtype for t in inside} == {torch.float32}
    assert_close(inside, expected[1:], gradient_limit(dtype, 0))


# ---- Memory, on a GPU ----


@needs_gpu
@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory(layout):
    """Kept: two thirds of eager PyTorch's, or nothing. One (M, 2N) buffer serves gate, up and their gradients."""
    M, K, N = 8192, 256, 2048
    leaves, dy = leaves_and_dy(M, K, N, torch.bfloat16, layout)
    gate_up = 2 * M * N * 2 / 2**20
    peak, kept = {}, {}
    recomputing = functools.partial(fused_swiglu, recompute=True)
    for name, run in (("eager", torch_swiglu), ("keep", fused_swiglu), ("recompute", recomputing)):
        for _ in range(2):  # the first call tunes
            peak[name], kept[name] = benchmark.memory_of(lambda t, run=run: run(*t), leaves, dy)
    rounding = 3  # the allocator's, which does not split off less than 1 MiB: for each of three tensors
    assert 1.5 * gate_up <= kept["eager"] <= 1.5 * gate_up + rounding
    assert gate_up <= kept["keep"] <= gate_up + rounding
    assert kept["recompute"] <= 0.01
    gradients = sum(t.nbytes for t in leaves) / 2**20
    assert peak["keep"] <= 1.5 * gate_up + gradients + 5  # y, the buffer, the gradients
    assert peak["keep"] < peak["eager"]
