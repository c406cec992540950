"""SwiGLU the way most models write it: four kernels, x read twice, three (M, N) intermediates through memory."""

import torch
import torch.nn.functional as F


def torch_swiglu(x, w_gate, w_up):
    """``silu(x @ w_gate) * (x @ w_up)``: x (..., K), w_gate and w_up (K, N), result (..., N)."""
    return F.silu(x @ w_gate) * (x @ w_up)


def torch_swiglu_float8(x, w_gate, w_up, scales):
    """The same in float8_e4m3fn, result in bfloat16: x (M, K), weights (K, N) that lie (N, K) in memory.

    scales: float32 tensors for x, w_gate, w_up: each one number, or (M, 1) for x and (N,) for both weights.
    """
    x_scale, gate_scale, up_scale = scales

    def scaled_mm(w, scale):
        scale = scale if scale.numel() == 1 else scale.view(1, -1)
        return torch._scaled_mm(x, w, x_scale, scale, out_dtype=torch.bfloat16, use_fast_accum=True)

    return F.silu(scaled_mm(w_gate, gate_scale)) * scaled_mm(w_up, up_scale)
