"""SwiGLU the way most models write it: four kernels, x read twice, three (M, N) intermediates through memory.

Below it, by what a result is judged: inputs of order one, the same in float64, and how far from it a result may be.
"""

import contextlib

import torch
import torch.nn.functional as F


def torch_swiglu(x, w_gate, w_up):
    """``silu(x @ w_gate) * (x @ w_up)``: x (..., K), w_gate and w_up (K, N), result (..., N)."""
    return F.silu(x @ w_gate) * (x @ w_up)


def scaled_mm(x, w, x_scale, w_scale):
    """x (M, K) @ w (K, N) in float8_e4m3fn, w lying (N, K) in memory, times their scales; result in bfloat16.

    Scales are float32 tensors: each is one number, or x_scale is (M, 1) and w_scale (1, N).
    """
    if not x.is_cuda:  # PyTorch 2.9 takes no scales of rows there
        return (x.float() @ w.float() * x_scale * w_scale).bfloat16()
    return torch._scaled_mm(x, w, x_scale, w_scale, out_dtype=torch.bfloat16, use_fast_accum=True)


def torch_swiglu_float8(x, w_gate, w_up, x_scale, gate_scale, up_scale):
    """torch_swiglu in float8: operands and scales as scaled_mm takes them."""
    return F.silu(scaled_mm(x, w_gate, x_scale, gate_scale)) * scaled_mm(x, w_up, x_scale, up_scale)


# ---- What is right ----

FLOAT8 = torch.float8_e4m3fn
# The fused result is rounded once, to half a unit in the last place; twice that is allowed, plus what float32 sums
# lose where the result is near zero. Eager PyTorch in bfloat16 or float16, which rounds four times, does not pass.
TOLERANCES = {
    torch.bfloat16: {"rtol": 2**-7, "atol": 1e-4},
    torch.float16: {"rtol": 2**-10, "atol": 1e-4},
    torch.float32: {"rtol": 2e-5, "atol": 2e-5},
    FLOAT8: {"rtol": 2**-6, "atol": 4e-2},  # Hopper's tensor cores add its products with few bits
}
# What one rounding to the result's dtype costs at most, norm over norm; for float32, what a sum over K = 4096 costs.
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 3e-6, FLOAT8: 2**-8}


def make_inputs(M, K, N, dtype, layout, device):
    """x (M, K) and two weights (K, N), scaled so that x @ w and the result are of order one."""
    generator = torch.Generator(device).manual_seed(M + K + N)
    x, w_gate, w_up = (torch.randn(rows, K, generator=generator, device=device) for rows in (M, N, N))
    weights = [(w * K**-0.5).to(dtype).t() for w in (w_gate, w_up)]
    if layout == "row-major":
        weights = [w.contiguous() for w in weights]
    return x.to(dtype), *weights


def quantised(*inputs):
    """x and weights in float8, strides kept, and their scales, (M, 1) and (1, N): one for each row, or column."""
    scales = [t.abs().amax(dim=dim, keepdim=True) / 448 for t, dim in zip(inputs, (1, 0, 0), strict=True)]
    return [(t / scale).to(FLOAT8) for t, scale in zip(inputs, scales, strict=True)], scales


def make_dy(M, N, dtype, device):
    """A gradient of the result, of order one."""
    generator = torch.Generator(device).manual_seed(M + N)
    return torch.randn(M, N, generator=generator, device=device).to(dtype)


def reference(x, w_gate, w_up, dy=None, scales=()):
    """The result in float64, or float32 where memory is short. With dy, its gradient, also the inputs' gradients."""
    dtype = torch.float64
    if x.is_cuda:
        elements = x.numel() + 2 * w_gate.numel() + 5 * x.shape[0] * w_gate.shape[1]
        if (8 if dy is None else 24) * elements > torch.cuda.mem_get_info(x.device)[0]:
            dtype = torch.float32
    scaled = (t.detach().to(dtype) * scale for t, scale in zip((x, w_gate, w_up), scales or (1, 1, 1), strict=True))
    leaves = [t.requires_grad_(dy is not None) for t in scaled]
    return differentiated(lambda leaves: torch_swiglu(*leaves), None if dy is None else dy.to(dtype))(leaves)


def differentiated(run, dy):
    """`run` of leaves, or with dy both its passes: the result, and a gradient or None for each leaf that wants one."""

    def both_passes(leaves):
        y = run(leaves)
        return y.detach(), *torch.autograd.grad(y, [t for t in leaves if t.requires_grad], dy, allow_unused=True)

    return run if dy is None else both_passes


def relative_error(result, expected):
    """Norm of the difference over the norm of `expected`, a float64 tensor or the next best; NaN if one is there."""
    return ((result.to(expected) - expected).norm() / expected.norm()).item()


@contextlib.contextmanager
def nan_in_new_memory():
    """torch.empty returns NaN, so that an element which nobody writes shows up."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def relative_errors(results, expected):
    """Of the result alone, or of the result and the gradients of x, w_gate and w_up."""
    if isinstance(results, torch.Tensor):
        return [relative_error(results, expected)]
    y, dx, dw_gate, dw_up, *dw_packed = results
    if dw_gate is None:
        dw_gate, dw_up = dw_packed[0].chunk(2, dim=1)
    return [relative_error(*pair) for pair in zip((y, dx, dw_gate, dw_up), expected, strict=True)]


def check(run, expected, dtype, eager_errors=None):
    """Whether `run()` on operands of this dtype is right, and its relative errors. Gradients' are judged by eager's."""
    run()  # tuning runs every configuration over one output: only the call after it shows what is unwritten
    with nan_in_new_memory():
        results = run()
    errors = relative_errors(results, expected)
    y, expected_y = (results, expected) if len(errors) == 1 else (results[0], expected[0])
    correct = torch.allclose(y.to(expected_y.dtype), expected_y, **TOLERANCES[dtype])
    if dtype == FLOAT8 and eager_errors:
        correct &= errors[0] <= 1.25 * eager_errors[0]
    for error, eager_error in zip(errors[1:], (eager_errors or [])[1:], strict=True):
        correct &= error <= gradient_limit(dtype, eager_error)
    return correct, errors


def gradient_limit(dtype, eager_error):
    """The relative error that a gradient may have: eager PyTorch's, or what rounding gate, dgate and it may cost."""
    return max(1.05 * eager_error, 2 * ROUNDING[dtype])
