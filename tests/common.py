"""What the tests share."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import baseline_torch_swiglu as baseline
import benchmark
from baseline_torch_swiglu import ROUNDING, make_inputs, reference, relative_error, torch_swiglu
from fused_triton_swiglu import fused_swiglu

HERE = Path(__file__).parent.parent  # the repository
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
HOPPER = GPU and torch.cuda.get_device_capability() == (9, 0)
DTYPES = tuple(benchmark.DTYPES.values())[:3]  # float8, without gradients, has tests of its own
needs_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")
needs_hopper = pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU (sm_90)")

# The default configuration: what tuning may choose instead has tests of its own, and would be tuned for each size here.
untuned = functools.partial(fused_swiglu, autotune=False)


def randn(*shape, dtype=torch.float32, scale=1):
    return (torch.randn(shape, device=DEVICE) * scale).to(dtype)


def leaves_of(M, K, N, dtype=torch.float32, layout="linear"):
    return [t.requires_grad_() for t in make_inputs(M, K, N, dtype, layout, DEVICE)]


def leaves_and_dy(M, K, N, dtype=torch.float32, layout="linear"):
    return leaves_of(M, K, N, dtype, layout), baseline.make_dy(M, N, dtype, DEVICE)


def assert_close(results, expected, limit=ROUNDING[torch.float32]):
    for result, right in zip(results, expected, strict=True):
        assert relative_error(result, right.double()) <= limit


def saved_by(run):
    """What autograd keeps for the backward pass of `run()`."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        run()
    return saved


def assert_right(x, w_gate, w_up, run=untuned):
    """No element unwritten, each within its dtype's tolerance, the error no larger than eager PyTorch's own.

    Or than ROUNDING, where that is more: eager may be exact on a few elements, and sums few rows of float32 better.
    """
    expected = reference(x, w_gate, w_up)
    results = []
    correct, (error,) = baseline.check(lambda: results.append(run(x, w_gate, w_up)) or results[-1], expected, x.dtype)
    assert correct
    assert error <= max(relative_error(torch_swiglu(x, w_gate, w_up), expected), ROUNDING[x.dtype])
    assert results[-1].shape == (*x.shape[:-1], w_gate.shape[1])
    assert results[-1].dtype == x.dtype and results[-1].is_contiguous()


def assert_gradients_right(leaves, dy, run=untuned):
    """Result and gradients as the benchmark wants them, next to eager PyTorch's errors."""
    expected = reference(*leaves, dy)
    eager, both_passes = (baseline.differentiated(lambda t, f=f: f(*t), dy) for f in (torch_swiglu, run))
    eager_errors = baseline.relative_errors(eager(leaves), expected)
    correct, errors = baseline.check(lambda: both_passes(leaves), expected, leaves[0].dtype, eager_errors)
    assert correct, (errors, eager_errors)


def run_python(code, cwd=HERE, **environment):
    """Standard output of a fresh interpreter that runs `code`."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(cwd), str(HERE), *sys.path])} | environment
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout
