"""SwiGLU the way most models write it: four kernels, x read twice, three (M, N) intermediates through memory."""

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
