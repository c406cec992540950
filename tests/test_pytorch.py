"""What the rest of PyTorch expects of an operator: compilers, export, modes, subclasses, transforms, CUDA graphs."""

import functools

import pytest
import torch

import fused_triton_swiglu as fts
from baseline_torch_swiglu import ROUNDING, differentiated, gradient_limit, reference
from benchmark import LAYOUTS
from common import DEVICE, GPU, HERE, assert_close, leaves_and_dy, leaves_of, needs_gpu, randn
from fused_triton_swiglu import fused_swiglu
from swiglu_mlp import SwiGLUMLP
from test_backward import CountCalls, both_ways

BACKEND = "inductor" if GPU else "aot_eager"  # the first wants a compiler for the CPU


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("shape", [(5, 16), (2, 3, 16)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(shape, keep, layout):
    _, w_gate, w_up = leaves_of(1, 16, 24, layout=layout)
    torch.library.opcheck(
        fts.swiglu_op, (randn(*shape).requires_grad_(), w_gate, w_up, False, keep, fts.TUNED, *fts.NOT_FLOAT8)
    )


@both_ways
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dynamic, frames", [(False, 3), (None, 2), (True, 1)])
def test_compile(dynamic, frames, layout, recompute):
    """Both passes, without a graph break; with a dynamic M no frame is compiled again for another one."""
    import torch._dynamo.testing  # not above: it imports Triton, which reads TRITON_INTERPRET then

    torch._dynamo.reset()
    count = torch._dynamo.testing.CompileCounterWithBackend(BACKEND)

    def layer(x, w_gate, w_up):
        return fused_swiglu(x * 2, w_gate, w_up, recompute=recompute).square()

    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend=count)
    for M in (5, 9, 130):
        leaves, dy = leaves_and_dy(M, 16, 24, layout=layout)
        results = differentiated(lambda t: compiled(*t), dy)(leaves)
        expected = differentiated(lambda t: layer(*t), dy)(leaves)
        assert_close(results, expected)
        assert [t.stride() for t in results] == [t.stride() for t in expected]
    assert count.frame_count == frames


@pytest.mark.parametrize("autocast", [False, True])
def test_compile_without_gradients_and_under_autocast(autocast):
    torch._dynamo.reset()
    leaves, dy = leaves_of(5, 16, 24), randn(5, 24, dtype=torch.bfloat16)
    compiled = torch.compile(fused_swiglu, fullgraph=True, backend=BACKEND)
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast), torch.set_grad_enabled(autocast):
        y, expected = compiled(*leaves), fused_swiglu(*leaves)
    assert torch.equal(y, expected)
    if autocast:
        gradients, right = (torch.autograd.grad(t, leaves, dy) for t in (y, expected))
        assert_close(gradients, right, 2 * ROUNDING[torch.bfloat16])
        assert {t.dtype for t in gradients} == {torch.float32}


@both_ways
def test_what_a_compiled_forward_pass_keeps(recompute, monkeypatch):
    """gate and up, to be read in the backward pass; or nothing, to be computed there. Divided as Inductor does."""
    torch._dynamo.reset()
    kept, forward = [], fts._forward
    monkeypatch.setattr(fts, "_forward", lambda *args: kept.append(args[4]) or forward(*args))
    run = functools.partial(fused_swiglu, recompute=recompute)
    y = torch.compile(run, fullgraph=True, backend="aot_eager_decomp_partition")(*leaves_of(5, 16, 24))
    assert kept == [not recompute]
    y.sum().backward()
    assert kept == [not recompute] + [True] * recompute


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    layer, rows = SwiGLUMLP(16, 24, device=DEVICE), torch.export.Dim("rows", max=4096)
    exported = torch.export.export(layer, (randn(3, 16),), dynamic_shapes=({0: rows},), strict=strict)
    x = randn(70, 16)
    assert torch.equal(exported.module()(x), layer(x))
    (call,) = (node for node in exported.graph.nodes if "swiglu" in str(node.target))
    assert call.args[4] is False  # an exported model keeps no gate and up


def test_transforms_are_refused():
    leaf, w_gate, w_up = leaves_of(6, 16, 24)
    for t in (x := leaf.detach(), leaf):
        with pytest.raises(NotImplementedError, match="x takes any number of leading dimensions without it"):
            torch.vmap(fused_swiglu, (0, None, None))(t, w_gate, w_up)
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(lambda t: fused_swiglu(t, w_gate, w_up).sum())(x)


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


def test_modes_and_subclasses_see_the_operator():
    """What counts, traces or fakes operators must not be passed by, in neither pass."""
    leaves, dy = leaves_and_dy(6, 16, 24)
    with CountCalls() as count:
        y = fused_swiglu(*leaves)
    assert count.calls == {"swiglu": 1}
    for recompute in (False, True):
        wrapper = Wrapper(leaves[0].detach())
        wrapped = fused_swiglu(wrapper, *leaves[1:], recompute=recompute)
        assert torch.equal(wrapped, y) and wrapper.seen == ["swiglu"]
        wrapped.sum().backward()  # whose gradient is no wrapper
        assert "mm" in wrapper.seen
    for keeping in (y, fused_swiglu(*leaves)):  # kept by the operator, and without it
        with CountCalls() as count:
            gradients = torch.autograd.grad(keeping, leaves, dy)
        assert count.calls["sigmoid"] == 1 and count.calls["mm"] == 2
        assert_close(gradients, reference(*leaves, dy)[1:])


@needs_gpu
def test_reduce_overhead():
    torch._dynamo.reset()
    compiled = torch.compile(fused_swiglu, mode="reduce-overhead", fullgraph=True)
    weights = leaves_of(1, 328, 5768, torch.bfloat16)[1:]
    for seed in range(4):
        torch.manual_seed(seed)
        leaves = [randn(300, 328, dtype=torch.bfloat16).requires_grad_(), *weights]
        dy = randn(300, 5768, dtype=torch.bfloat16)
        torch.compiler.cudagraph_mark_step_begin()
        results = [t.clone() for t in differentiated(lambda t: compiled(*t), dy)(leaves)]
        assert_close(results, reference(*leaves, dy), gradient_limit(torch.bfloat16, 0))


@needs_gpu
def test_readme_examples_run():
    import re

    pytest.importorskip("transformers", reason="one example needs transformers, which is not installed")
    examples = re.findall("```python\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)
    assert len(examples) == 2
    for example in examples:
        exec(example, {})
