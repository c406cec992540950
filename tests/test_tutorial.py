"""Tests of tutorial.py: each step, at sizes that no tile divides."""

from functools import partial

import pytest
import torch

import tutorial
from baseline_torch_swiglu import check, make_inputs, reference
from common import DEVICE, GPU, HOPPER, run_python


@pytest.mark.parametrize("name, run", [*tutorial.FEW_ROWS.items(), *tutorial.MANY_ROWS.items()])
def test_a_step(name, run):
    dtype = torch.bfloat16 if GPU else torch.float16
    if run.func is tutorial.hopper and not HOPPER:
        pytest.skip("needs a Hopper GPU (sm_90)")
    for M, K, N in ((300, 144, 200), (1, 64, 8)):
        x, w_gate, w_up = make_inputs(M, K, N, dtype, "linear", DEVICE)
        w = torch.stack([w_gate.t(), w_up.t()])
        assert check(partial(run, x, w), reference(x, w_gate, w_up), dtype)[0]


@pytest.mark.skipif(GPU, reason="takes minutes on a GPU")
def test_without_a_gpu(tmp_path):
    out = run_python("import tutorial; tutorial.main()", cwd=tmp_path)
    assert out.count("is right, relative error") == 8 and out.count("left out, it needs a Hopper GPU") == 2
    assert out.splitlines()[-1] == "All that ran is right. Speed was not measured: that needs a GPU."
    assert not [*tmp_path.iterdir()]
