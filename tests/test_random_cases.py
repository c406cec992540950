"""Random calls, see random_cases.py, and faults of the kernels that they must find."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pandas as pd
import pytest
import torch

import random_cases
from common import GPU, HERE, needs_hopper, run_python
from random_cases import draw, run_case

SOURCE = (HERE / "fused_triton_swiglu.py").read_text()

BLOCK = 10
CASES = 500 if GPU else 30


@pytest.mark.parametrize("first", range(0, CASES, BLOCK))
def test_random_cases(first):
    for number in range(first, first + BLOCK):
        assert run_case(draw(number))[0] <= 1, f"python tests/random_cases.py --case {number}"


# ---- Faults that they must find: what stands in the kernel file, and what takes its place ----

MUTANTS = {
    "a K tile left out": ("for k in range(0, K, BLOCK_K):", "for k in range(BLOCK_K, K, BLOCK_K):"),
    "ragged K of x not masked": ("mask_xk = True if EVEN_K else (offs_k < K - k)[None, :]", "mask_xk = True"),
    "ragged K of weights not masked": ("mask_wk = True if EVEN_K else (offs_k < K - k)[:, None]", "mask_wk = True"),
    "rows not masked when stored": ("mask_y = (offs_m < M)[:, None] & ", "mask_y = "),
    "columns not masked when stored": (" & (offs_n < N)[None, :]", ""),
    "gate and up exchanged": ("gate, up = tl.split(", "up, gate = tl.split("),
    "gate kept in place of up": ("tl.store(gate_ptrs + N, up.to", "tl.store(gate_ptrs + N, gate.to"),
    "one stride for both weights": ("SAME_STRIDE_K else tl.where(is_up, stride_uk, stride_gk)", "True else 0"),
    "one row's scale for all": ("x_scale_ptr + offs_m * stride_sx", "x_scale_ptr + offs_m * 0"),
    "scales taken for contiguous": ("t.numel() == 1 else t.stride(dim)", "t.numel() == 1 else 1"),
    "gate's scale for up": ("up_scale_ptr + offs_n * stride_su", "gate_scale_ptr + offs_n * stride_sg"),
    "rounded before SiLU": ("y = silu_mul(gate, up,", "y = silu_mul(gate.to(tl.float16).to(tl.float32), up,"),
    "backward columns not masked": ("dup.to(d_ptr.dtype.element_ty), mask=mask", "dup.to(d_ptr.dtype.element_ty)"),
    "a wrong derivative": ("dy * up * sigmoid * (1 + gate * (1 - sigmoid)), dy", "dy * up * sigmoid, dy"),
    "dup left out of dx": ("dx = add(torch.mm(dgate, w_gate), dup, w_up)", "dx = torch.mm(dgate, w_gate)"),
    "gradients of the weights exchanged": ("dw_gate, dw_up = weight_gradient", "dw_up, dw_gate = weight_gradient"),
    "gate and up overwritten, which the graph retains": ("d = gate_up if overwrite else torch.empty_like(", "d = ("),
}
# None that hangs: the steps of loads and products stay the same in number.
HOPPER_MUTANTS = {
    "x from the next K tile": ("tma_load(s.x_desc, [off_m, k]", "tma_load(s.x_desc, [off_m, k + s.BOX_K]"),
    "w_gate in place of w_up": ("tma_load(s.w_up_desc, where", "tma_load(s.w_gate_desc, where"),
    "the last tile left out": ("(first, num_pid_m * num_pid_n, p", "(first, num_pid_m * num_pid_n - 1, p"),
    "narrower tiles left out": ("num_whole_n * TILE_N, WIDTH)", "num_whole_n * TILE_N, WIDTH) - 1"),
    "narrower tiles of other columns": ("off_n, num_pid_n = s.num_whole_n * TILE_N,", "off_n, num_pid_n = 0,"),
    "96 columns, of which 32 are others": ("rest, k > 0, s, CONSUMER, MAIN)", "rest, k > 0, s, CONSUMER, 0)"),
    "96 columns, of which 32 go elsewhere": ("off_n + MAIN, s, CONSUMER)", "off_n, s, CONSUMER)"),
    "both consumers read the same rows": (".slice(CONSUMER * ROWS, ROWS)", ".slice(0, ROWS)"),
    "both consumers store the same rows": ("pid_m * TILE_M + ROLE * ROWS,", "pid_m * TILE_M,"),
    "gate and up exchanged": ("silu_mul(gate, up, scales), s", "silu_mul(up, gate, scales), s"),
    "gate kept in place of up": ("hopper_store(up, s.gate_up_desc", "hopper_store(gate, s.gate_up_desc"),
    "scales of another tile's columns": ("offs_n = off_n + gl.arange(", "offs_n = gl.arange("),
    "a store that is not waited for": ("        tma.store_wait(0)  # what was stored before has left the buffer\n", ""),
    "stages free too early": ("mbarrier.wait(s.empty.index(stage), step // STAGES & 1 ^ 1)", "pass"),
}
# First those that find the mutants soonest: in the interpreter; and on Hopper with some tiles for each program, as a
# stage that is free too early shows only where loads run ahead of an epilogue, and with tiles of 96 columns.
RUN = f"""
import benchmark  # and with it the kernel file in this folder
from random_cases import DEVICE, draw, run_case
large = dict(K=1024, dtype="bfloat16", x="contiguous", blocks=1, choice="default", scales=None)
for M, N, weights in ((3000, 6144, "transposed"), (256, 14336, "contiguous")) if DEVICE == "cuda" else ():
    run_case(draw(6)._replace(M=M, N=N, w_gate=weights, w_up=weights, **large))
for number in (6, 21, 9, *range({CASES})):
    run_case(draw(number))
"""
# Which of torch and Triton meets a failed launch first is a matter of time.
FOUND = "\nAssertionError: ", "CUDA error", "Triton Error [CUDA]", "modified by an inplace operation"


def survivors(mutants, folder):
    """Those that get through the cases, each a copy of the kernel file with a fault."""

    def survives(name):
        right, wrong = mutants[name]
        assert SOURCE.count(right) == 1, name
        (folder / name).mkdir()
        (folder / name / "fused_triton_swiglu.py").write_text(SOURCE.replace(right, wrong))
        try:
            run_python(RUN, folder / name)
        except AssertionError as error:  # whose text is what went to stderr
            if not any(fault in str(error) for fault in FOUND):
                raise
            return False
        return True

    with ThreadPoolExecutor(2) as pool:
        return [name for name, survived in zip(mutants, pool.map(survives, mutants), strict=True) if survived]


def test_they_find_mutants(tmp_path):
    assert not survivors(MUTANTS, tmp_path)
    assert {SOURCE.count(right) for right, _ in HOPPER_MUTANTS.values()} == {1}  # without such a GPU too


@needs_hopper
def test_they_find_mutants_of_the_kernel_for_hopper(tmp_path):
    assert not survivors(HOPPER_MUTANTS, tmp_path)


# ---- The script ----


def test_what_the_kernels_fill_is_guarded(monkeypatch):
    """y, gate and up, and what the backward pass allocates, in a thread of its own on a GPU."""
    watched, hold = [], random_cases.Guards.hold
    monkeypatch.setattr(random_cases.Guards, "hold", lambda guards: watched.append(guards.watched) or hold(guards))
    case = draw(6)._replace(M=6, K=16, N=24, dtype="float16", blocks=2, choice="default", recompute=False)
    run_case(case)
    run_case(case._replace(recompute=True))
    filled = [[tuple(t.shape) for _, t, is_filled, _ in tensors if is_filled] for tensors in watched]
    assert filled == [[(2, 3, 24), (6, 48), (6, 48)], [(2, 3, 24), (2, 3, 24), (6, 48), (2, 3, 24), (6, 48)]]


def test_a_fault_of_cublas_is_told_from_ours(monkeypatch):
    case = draw(6)._replace(M=65, K=16, N=24, dtype="float16", w_gate="contiguous", w_up="contiguous", blocks=1)
    mm, backward = torch.mm, random_cases.fts.EagerSwiGLU.backward

    def cut(a, b):
        """Without the end of the sum, where there is more than 64 of it."""
        return mm(a[:, :64], b[:64]) if a.dtype == torch.float16 else mm(a, b)

    def cut_ours(*args):
        with mock.patch.object(torch, "mm", cut):
            return backward(*args)

    with mock.patch.object(torch, "mm", cut):
        assert run_case(case)[1] == ["dw_gate", "dw_up"]
    monkeypatch.setattr(random_cases.fts.EagerSwiGLU, "backward", staticmethod(cut_ours))
    with pytest.raises(AssertionError, match="the error of dw_gate is"):
        run_case(case)


def test_a_run_ends_well(tmp_path):
    command = [sys.executable, HERE / "tests" / "random_cases.py", "--first", "1000", "--cycle", "1"]
    command += ["--minutes", "0.3" if GPU else "0.1", "--csv", tmp_path / "run.csv"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(tmp_path / "run.csv")
    assert [*table] == [*pd.read_csv(HERE / "results" / "h200_stress.csv")]
    (row,) = table.to_dict("records")
    assert row["cases"] > 2 and row["different_cases"] == 1
    assert row["gpu_bytes_grown"] == 0 and row["worst_error_over_limit"] <= 1
