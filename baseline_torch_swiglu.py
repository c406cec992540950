"""SwiGLU the way most models write it: four kernels, x read twice, three (M, N) intermediates through memory."""

import torch.nn.functional as F


def torch_swiglu(x, w_gate, w_up):
    """``silu(x @ w_gate) * (x @ w_up)``: x (..., K), w_gate and w_up (K, N), result (..., N)."""
    return F.silu(x @ w_gate) * (x @ w_up)
