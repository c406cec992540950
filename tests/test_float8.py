"""float8_e4m3fn: the result by the scales' recipes, what is refused, compilers, and what the tensor cores may lose."""

import functools
import re

import pytest
import torch

import fused_triton_swiglu as fts
from baseline_torch_swiglu import make_inputs, nan_in_new_memory, quantised, reference, torch_swiglu_float8
from common import DEVICE, GPU, assert_close, needs_gpu, untuned
from fused_triton_swiglu import FLOAT8, fused_swiglu

CAPABLE = not GPU or torch.cuda.get_device_capability() >= (8, 9)
pytestmark = pytest.mark.skipif(not CAPABLE, reason="needs a GPU with float8 (sm_89 or later)")
# What rounding to a dtype costs at most, and on a GPU what the tensor cores lose up to K = 4096 beside it
LIMITS = {torch.bfloat16: 2**-8, torch.float16: 2.5e-3 if GPU else 2**-11, torch.float32: 2.5e-3 if GPU else 3e-6}


def operands(M, K, N, recipe="rows"):
    """x, both weights (K, N), and the scales: a number for each row and column, or one for each tensor."""
    inputs, scales = quantised(*make_inputs(M, K, N, torch.float32, "linear", DEVICE))
    if recipe == "numbers":
        scales = [scale.mean() for scale in scales]
    if recipe == "mixed":
        of_x, of_gate, of_up = scales
        scales = [of_x.repeat(1, 2)[:, 1:], of_gate.view(-1).repeat_interleave(2)[::2], of_up.mean()]
    return inputs, scales


SIZES = [(1, 16, 32), (17, 33, 65), (70, 130, 24), (130, 144, 136)]
SIZES += [(1, 4096, 1544), (16, 4096, 1037), (64, 1040, 4104), (300, 4096, 5640), (1037, 1104, 4104)] if GPU else []


@pytest.mark.parametrize("out_dtype", LIMITS, ids=str)
@pytest.mark.parametrize("recipe", ["rows", "numbers", "mixed"])
@pytest.mark.parametrize("M, K, N", SIZES)
def test_right(M, K, N, recipe, out_dtype):
    inputs, scales = operands(M, K, N, recipe)
    run = functools.partial(untuned, *inputs, scales=scales, out_dtype=out_dtype)
    for _ in range(2):  # the second call by the kept launcher
        with nan_in_new_memory():
            y = run()
        assert y.dtype == out_dtype and y.shape == (M, N) and y.is_contiguous()
        assert_close([y], [reference(*inputs, scales=scales)], LIMITS[out_dtype])
    assert torch.equal(y, run(batch_invariant=True)) or GPU


def test_leading_dimensions_stacked_halves_and_strides():
    (x, w_gate, w_up), (x_scale, *of_weights) = operands(60, 48, 40)
    stacked = torch.cat([w_up.t(), w_gate.t()])
    w_up, w_gate = (w.t() for w in stacked.chunk(2))
    expected = reference(x, w_gate, w_up, scales=(x_scale, *of_weights))
    column_major = x.t().contiguous().t()
    padded = torch.cat([x, x], dim=1)[:, :48]
    for rows in (x.view(4, 5, 3, 48), x.view(5, 12, 48).transpose(0, 1), column_major, padded):
        scale = x_scale.view(5, 12, 1).transpose(0, 1) if rows.dim() == 3 else x_scale.view(*rows.shape[:-1], 1)
        right = expected.view(5, 12, 40).transpose(0, 1) if rows.dim() == 3 else expected.view(*rows.shape[:-1], 40)
        y = untuned(rows, w_gate, w_up, scales=(scale, *of_weights))
        assert_close([y], [right], LIMITS[torch.bfloat16])


def test_without_scales_and_empty():
    inputs, _ = operands(20, 32, 24)
    inputs = [(t.float() / 64).to(FLOAT8) for t in inputs]
    inputs[1:] = [w.t().contiguous().t() for w in inputs[1:]]
    ones = [torch.ones((), device=DEVICE)] * 3
    assert_close([untuned(*inputs)], [reference(*inputs, scales=ones)], LIMITS[torch.bfloat16])
    for M, K, N in ((0, 8, 4), (3, 8, 0), (3, 0, 4)):
        x, w_gate, w_up = (torch.empty(rows, K, device=DEVICE).to(FLOAT8) for rows in (M, N, N))
        y = fused_swiglu(x, w_gate.t(), w_up.t(), scales=ones)
        assert y.dtype == torch.bfloat16 and torch.equal(y, torch.zeros(M, N, dtype=y.dtype, device=DEVICE))


@needs_gpu
@pytest.mark.parametrize("M", [1, 64, 300])
@pytest.mark.parametrize("recipe", ["rows", "numbers"])
def test_errors_of_sums_with_few_bits(recipe, M):
    """As the docstring has them; and the same bits each time."""
    for K, N, limit in ((4096, 2048, 3.3e-3), (14336, 1024, 6e-3)):
        inputs, scales = operands(M, K, N, recipe)
        expected, y = reference(*inputs, scales=scales), fused_swiglu(*inputs, scales=scales)
        assert_close([y], [expected], limit)
        assert_close([torch_swiglu_float8(*inputs, *scales)], [expected], limit + 1.2e-3)  # rounds four times
        assert all(torch.equal(fused_swiglu(*inputs, scales=scales), y) for _ in range(20))


class Layer(torch.nn.Module):
    def forward(self, x, w_gate, w_up, scales):
        return fused_swiglu(x, w_gate, w_up, scales=scales, out_dtype=torch.float32)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_and_export(dynamic):
    torch._dynamo.reset()
    inputs, scales = operands(6, 32, 24)
    compiled = torch.compile(fused_swiglu, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for M in (6, 9):
        inputs, scales = operands(M, 32, 24)
        assert torch.equal(compiled(*inputs, scales=scales), fused_swiglu(*inputs, scales=scales))
    exported = torch.export.export(Layer(), (*inputs, scales)).module()
    assert torch.equal(exported(*inputs, scales), Layer()(*inputs, scales))
    with torch.autocast(DEVICE, torch.float16):  # leaves them as they are
        assert torch.equal(fused_swiglu(*inputs, scales=scales), fused_swiglu(*inputs, scales=scales))
        assert fused_swiglu(inputs[0].float(), *inputs[1:]).dtype == torch.float16
    meta = [t.to("meta") for t in inputs]
    assert fused_swiglu(*meta, out_dtype=torch.float16).dtype == torch.float16


(X, G, U), (XS, GS, US) = operands(4, 8, 6)
REFUSED = [
    (dict(scales=(XS, GS)), ValueError, "scales must be three tensors: of x, w_gate and w_up"),
    (dict(scales=XS), ValueError, "scales must be three tensors"),
    (dict(scales=()), ValueError, "scales must be three tensors"),
    (dict(scales=(XS, GS.half(), US)), ValueError, "gate_scale is torch.float16 on "),
    (dict(scales=(XS, GS, 1.0)), TypeError, "up_scale is a float: expected a torch.Tensor"),
    (dict(scales=(XS.to("meta"), GS, US)), ValueError, "x_scale is torch.float32 on meta: expected torch.float32 on "),
    (dict(scales=(XS.to_sparse(), GS, US)), TypeError, "x_scale is torch.sparse_coo: expected an ordinary, dense "),
    (dict(scales=(XS.view(-1), GS, US)), ValueError, "x_scale is (4,): expected (4, 1) or one number"),
    (dict(scales=(XS, GS.t(), US)), ValueError, "gate_scale is (6, 1): expected (1, 6) or one number"),
    (dict(scales=(XS, GS, US[:, 1:])), ValueError, "up_scale is (1, 5): expected (1, 6) or one number"),
    (dict(out_dtype=FLOAT8), ValueError, "out_dtype is torch.float8_e4m3fn: expected one of (torch.bfloat16, "),
    (dict(out_dtype=0), ValueError, "out_dtype is 0: expected one of "),
    (dict(w_gate=G.contiguous()), ValueError, "w_gate, w_up have strides (6, 1), (1, 8): expected 1 along K in float8"),
    (dict(w_up=U.contiguous()), ValueError, "w_gate, w_up have strides (1, 8), (6, 1): expected 1 along K in float8"),
    (dict(scales=(XS, GS, US.clone().requires_grad_())), NotImplementedError, "has no gradient in float8"),
    (dict(scales=(XS, GS.clone().requires_grad_(), US)), NotImplementedError, "no gradient in float8: call it under"),
    (dict(scales=(XS.clone().requires_grad_(), GS, US)), NotImplementedError, "no gradient in float8: call it under"),
    (dict(w_up=U.clone().requires_grad_()), NotImplementedError, "has no gradient in float8: call it under torch"),
    (dict(x=X.clone().requires_grad_()), NotImplementedError, "has no gradient in float8: call it under torch.no_grad"),
    (dict(x=X.float(), w_gate=G.float(), w_up=U.float(), scales=(XS, GS, US)), ValueError, "but x is torch.float32"),
    (dict(x=X.half(), w_gate=G.half(), w_up=U.half(), out_dtype=torch.float32), ValueError, "but x is torch.float16"),
]


@pytest.mark.parametrize("changed, error, message", REFUSED, ids=[case[2] for case in REFUSED])
def test_refuses(changed, error, message):
    with pytest.raises(error, match=re.escape(message)):
        fused_swiglu(**(dict(x=X, w_gate=G, w_up=U) | changed))


def test_forward_mode_is_refused():
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="no forward-mode"):
        scale = torch.autograd.forward_ad.make_dual(XS, XS)
        fused_swiglu(X, G, U, scales=(scale, GS, US))


def test_no_gradient_in_an_exported_program():
    exported = torch.export.export(Layer(), (X, G, U, (XS, GS, US))).module()
    with pytest.raises(NotImplementedError, match="no gradient in float8"):
        exported(X, G, U, (XS.clone().requires_grad_(), GS, US))


def test_scales_as_they_come():
    """Negated lazily, with a dimension less than x, and others at the next call of the same sizes."""
    calls = [(X, XS), (X, torch._neg_view(-XS)), (X[None], XS), (X[None], XS[None]), (X, 2 * XS), (X, XS[:1])]
    for x, x_scale in calls:
        y = untuned(x, G, U, scales=(x_scale, GS, US))
        assert y.shape == (*x.shape[:-1], 6)
        assert_close([y], [reference(x, G, U, scales=(x_scale, GS, US))], LIMITS[torch.bfloat16])


def test_the_launch_key_tells_scales_apart():
    narrow, offset = torch.cat([GS, GS], dim=1)[:, ::2], torch.cat([US, US], dim=1)[:, 1:7]
    changed = [(XS, GS, US), (XS[:1], GS, US), (XS.t(), GS, US), (XS, narrow, US), (XS, GS, offset)]
    changed += [(XS, GS.half(), US), (XS, GS, US.to("meta")), (None, None, None)]
    keys = {fts._launch_key(X, G, U, False, False, fts.DEFAULT, *scales, torch.bfloat16) for scales in changed}
    keys.add(fts._launch_key(X, G, U, False, False, fts.DEFAULT, XS, GS, US, torch.float16))
    assert len(keys) == len(changed) + 1
