"""SwiGLU in Triton, step by step: y = silu(x @ w_gate) * (x @ w_up), each kernel one idea further than the one before.

    python tutorial.py

Read the kernels in order; each is complete. x is (M, K), w is (2, N, K): w_gate, then w_up, as two nn.Linear keep them.
For brevity both are contiguous and small enough for 32-bit offsets; fused_triton_swiglu.py takes any.
Every step is checked against float64. On a GPU each is timed, for many rows and for few, and a table like a staircase,
a CSV and a plot say what it brought on that card, next to eager PyTorch and to cuBLAS's bare product of x and both
weights, without SiLU. Without a GPU the steps are checked through Triton's interpreter.
"""

import sys
from datetime import date
from functools import partial
from pathlib import Path
from unittest import mock

import pandas as pd
import torch

import benchmark  # sets up the interpreter where there is no GPU, so it comes before Triton

# isort: split
import triton
import triton.language as tl
from matplotlib.figure import Figure
from triton.tools.tensor_descriptor import TensorDescriptor

import fused_triton_swiglu as fts
from baseline_torch_swiglu import check, make_inputs, reference, torch_swiglu
from fused_triton_swiglu import grouped_tile


@triton.jit
def textbook(x_ptr, w_ptr, y_ptr, M, N, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Step 1. A program owns a tile of y, and walks along K with two dots per step, one for each weight."""
    num_pid_n = tl.cdiv(N, BLOCK_N)
    pid_m, pid_n = tl.program_id(0) // num_pid_n, tl.program_id(0) % num_pid_n  # along a row of tiles, then the next
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)  # 16-bit operands, sums in fp32
    up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + offs_m * K + offs_k[None, :], (offs_m < M) & (offs_k < K)[None, :], 0.0)
        mask_w = (offs_n < N) & (offs_k < K)[:, None]
        w_gate = tl.load(w_ptr + offs_n * K + offs_k[:, None], mask_w, 0.0)
        w_up = tl.load(w_ptr + N * K + offs_n * K + offs_k[:, None], mask_w, 0.0)
        gate = tl.dot(x, w_gate, gate)
        up = tl.dot(x, w_up, up)
    y = gate * tl.sigmoid(gate) * up  # while both are still on chip: neither is ever written
    tl.store(y_ptr + offs_m * N + offs_n, y.to(y_ptr.dtype.element_ty), (offs_m < M) & (offs_n < N))


@triton.jit
def cache_order(x_ptr, w_ptr, y_ptr, M, N, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Step 2. The programs that run at one time make up a block of tiles, not a row: they share x and w in L2.

    At M = 4096 the 132 programs that run on an H100 read 2 tiles of x and 112 of each weight in step 1, here 16 and 9.
    """
    pid_m, pid_n = grouped_tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N))  # 16 down, then one across
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + offs_m * K + offs_k[None, :], (offs_m < M) & (offs_k < K)[None, :], 0.0)
        mask_w = (offs_n < N) & (offs_k < K)[:, None]
        w_gate = tl.load(w_ptr + offs_n * K + offs_k[:, None], mask_w, 0.0)
        w_up = tl.load(w_ptr + N * K + offs_n * K + offs_k[:, None], mask_w, 0.0)
        gate = tl.dot(x, w_gate, gate)
        up = tl.dot(x, w_up, up)
    y = gate * tl.sigmoid(gate) * up
    tl.store(y_ptr + offs_m * N + offs_n, y.to(y_ptr.dtype.element_ty), (offs_m < M) & (offs_n < N))


@triton.jit
def wide_dot(x_ptr, w_ptr, y_ptr, M, N, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Step 3. Both weights' tiles side by side are one operand: one dot, twice as wide.

    The tensor cores read x's tile from shared memory once, by one instruction of 256 columns in place of two of 128.
    """
    pid_m, pid_n = grouped_tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N))
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    offs_w = tl.arange(0, 2 * BLOCK_N)[None, :]  # BLOCK_N columns of w_gate, then the same ones of w_up
    columns = pid_n * BLOCK_N + offs_w % BLOCK_N
    w_ptrs = w_ptr + (columns + offs_w // BLOCK_N * N) * K
    acc = tl.zeros((BLOCK_M, 2 * BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + offs_m * K + offs_k[None, :], (offs_m < M) & (offs_k < K)[None, :], 0.0)
        w = tl.load(w_ptrs + offs_k[:, None], (columns < N) & (offs_k < K)[:, None], 0.0)
        acc = tl.dot(x, w, acc)
    # Column n of gate and column n of up lie in one thread's registers: to take acc apart moves nothing.
    gate, up = tl.split(acc.reshape(BLOCK_M, 2, BLOCK_N).permute(0, 2, 1))
    y = gate * tl.sigmoid(gate) * up
    tl.store(y_ptr + offs_m * N + offs_n, y.to(y_ptr.dtype.element_ty), (offs_m < M) & (offs_n < N))


@triton.jit
def by_tma(x_desc, w_desc, y_ptr, M, N, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Step 4. The tensor memory accelerator fetches whole tiles: no thread computes addresses or masks for them."""
    pid_m, pid_n = grouped_tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N))
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    acc = tl.zeros((BLOCK_M, 2 * BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        x = x_desc.load([pid_m * BLOCK_M, k])  # zeros beyond the edges
        w = w_desc.load([0, pid_n * BLOCK_N, k]).reshape(2 * BLOCK_N, BLOCK_K)
        acc = tl.dot(x, w.T, acc)
    gate, up = tl.split(acc.reshape(BLOCK_M, 2, BLOCK_N).permute(0, 2, 1))
    y = gate * tl.sigmoid(gate) * up
    tl.store(y_ptr + offs_m * N + offs_n, y.to(y_ptr.dtype.element_ty), (offs_m < M) & (offs_n < N))


@triton.jit
def persistent(x_desc, w_desc, y_ptr, M, N, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Step 5. One program per SM goes from tile to tile, and loads for the next one while it finishes this one."""
    num_pid_m, num_pid_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    # flatten=True makes one loop of this one and that over k, so the pipeline of loads never runs empty between tiles.
    for tile in tl.range(tl.program_id(0), num_pid_m * num_pid_n, tl.num_programs(0), flatten=True):
        pid_m, pid_n = grouped_tile(tile, num_pid_m, num_pid_n)
        offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
        offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        acc = tl.zeros((BLOCK_M, 2 * BLOCK_N), tl.float32)
        for k in range(0, K, BLOCK_K):
            x = x_desc.load([pid_m * BLOCK_M, k])
            w = w_desc.load([0, pid_n * BLOCK_N, k]).reshape(2 * BLOCK_N, BLOCK_K)
            acc = tl.dot(x, w.T, acc)
        gate, up = tl.split(acc.reshape(BLOCK_M, 2, BLOCK_N).permute(0, 2, 1))
        y = gate * tl.sigmoid(gate) * up
        tl.store(y_ptr + offs_m * N + offs_n, y.to(y_ptr.dtype.element_ty), (offs_m < M) & (offs_n < N))


@triton.jit
def weights_first(x_ptr, w_ptr, y_ptr, M, N, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Few rows, step 2. The wide dot with its operands exchanged: y is computed transposed, as (w @ x.T).T.

    Hopper's instruction wants 64 rows of its first operand. x has not as many, and without them Triton takes Ampere's.
    """
    pid_m, pid_n = grouped_tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N))
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    offs_w = tl.arange(0, 2 * BLOCK_N)[:, None]
    rows = pid_n * BLOCK_N + offs_w % BLOCK_N
    w_ptrs = w_ptr + (rows + offs_w // BLOCK_N * N) * K
    acc = tl.zeros((2 * BLOCK_N, BLOCK_M), tl.float32)
    for k in range(0, K, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)[None, :]
        x = tl.load(x_ptr + offs_m * K + offs_k, (offs_m < M) & (offs_k < K), 0.0)
        w = tl.load(w_ptrs + offs_k, (rows < N) & (offs_k < K), 0.0)
        acc = tl.dot(w, x.T, acc)
    # Here gate and up lie in different warps: they are taken apart through shared memory, which is cheap for few rows.
    gate, up = tl.split(acc.T.reshape(BLOCK_M, 2, BLOCK_N).permute(0, 2, 1))
    y = gate * tl.sigmoid(gate) * up
    tl.store(y_ptr + offs_m * N + offs_n, y.to(y_ptr.dtype.element_ty), (offs_m < M) & (offs_n < N))


def launch(kernel, tile, num_warps, num_stages, x, w):
    (M, K), N = x.shape, w.shape[1]
    BLOCK_M, BLOCK_N, BLOCK_K = tile
    y = x.new_empty(M, N)
    programs = triton.cdiv(M, BLOCK_M) * triton.cdiv(N, BLOCK_N)
    if kernel is persistent:
        programs = min(programs, DEVICE.num_sms)
    if kernel in (by_tma, persistent):
        x = TensorDescriptor.from_tensor(x, [BLOCK_M, BLOCK_K])
        w = TensorDescriptor.from_tensor(w, [2, BLOCK_N, BLOCK_K])
    kernel[programs,](x, w, y, M, N, K, *tile, num_warps=num_warps, num_stages=num_stages, **fts.FP_FUSION)
    return y


def hopper(x, w, narrow_tiles):
    """Steps 6 and 7 are swiglu_kernel_hopper of fused_triton_swiglu.py, first with whole tiles only."""
    y = x.new_empty(len(x), w.shape[1])
    cut = fts._last_wave if narrow_tiles else lambda M, N, programs: (triton.cdiv(N, fts.TILE_N.value), 64)
    with mock.patch.object(fts, "_last_wave", cut):
        fts._launch_hopper(False, x, w[0].t(), w[1].t(), y, None, None, None, None)
    return y


GPU = torch.cuda.is_available()
DEVICE = fts.device_limits(0 if GPU else None)
K, N = 4096, 14336
# As launch takes them: a tile of y and its depth along K, warps, stages of loads. 144 KB, which only large GPUs have.
MANY = ((128, 128, 64), 8, 3) if DEVICE.shared_memory >= 144 * 2**10 else ((64, 64, 64), 4, 3)
BARE = "cuBLAS's bare product"
MANY_ROWS = {
    "1 textbook": partial(launch, textbook, *MANY),
    "2 order for the cache": partial(launch, cache_order, *MANY),
    "3 one wide dot": partial(launch, wide_dot, *MANY),
    "4 tiles by TMA": partial(launch, by_tma, *MANY),
    "5 persistent programs": partial(launch, persistent, *MANY),
    "6 one warp loads, two groups multiply": partial(hopper, narrow_tiles=False),
    "7 last wave in narrower tiles": partial(hopper, narrow_tiles=True),
}
FEW_ROWS = {
    "1 textbook": partial(launch, textbook, (16, 32, 128), 4, 2),
    "2 weights as first operand": partial(launch, weights_first, (16, 32, 128), 4, 2),
    "3 four stages of loads, not two": partial(launch, weights_first, (16, 32, 128), 4, 4),
}
STAIRS = {16: FEW_ROWS, 512: MANY_ROWS, 4096: MANY_ROWS} if GPU else {40: FEW_ROWS, 300: MANY_ROWS}
NOISE = 0.02  # a gain below is told as none


def runs_here(run):
    """TMA came with Hopper (the interpreter has it), and swiglu_kernel_hopper is for no other GPU."""
    if run.func is hopper:
        return GPU and DEVICE.arch == 90
    return DEVICE.arch >= 90 or run.args[0] not in (by_tma, persistent)


def measure(M, steps):
    """Check the steps for M rows. On a GPU a table of them as well, else None."""
    k, n, dtype = (K, N, torch.bfloat16) if GPU else (144, 200, torch.float16)  # bfloat16 fails in the interpreter
    x, w_gate, w_up = make_inputs(M, k, n, dtype, "linear", "cuda" if GPU else "cpu")
    w = torch.stack([w_gate.t(), w_up.t()])
    expected = reference(x, w_gate, w_up)
    runs, errors = {"eager PyTorch": lambda x, w: torch_swiglu(x, w[0].t(), w[1].t())}, {}
    for name, run in steps.items():
        if not runs_here(run):
            print(f"M = {M}: {name} left out, it needs a Hopper GPU")
            continue
        correct, (errors[name],) = check(partial(run, x, w), expected, dtype)
        print(f"M = {M}: {name} {'is right' if correct else 'is WRONG'}, relative error {errors[name]:.1e}")
        if not correct:
            sys.exit(1)
        runs[name] = run
    if not GPU:
        return None
    runs[BARE] = lambda x, w: x @ w.flatten(0, 1).t()
    calls = {name: lambda both, run=run: run(*both) for name, run in runs.items()}
    us = pd.DataFrame(benchmark.times_in_turn(calls, [(x, w)], benchmark.MODEL, M)).median() * 1e3
    gain = (us.shift() / us - 1).drop(BARE)  # over the step before, and of the first one over eager PyTorch
    table = pd.DataFrame({"M": M, "us": us, "share": us[BARE] / us, "gain": gain, "rel_error": pd.Series(errors)})
    return table.loc[us.index].rename_axis("step").reset_index()


def plot(table, path):
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    for axis, (M, rows) in zip(figure.subplots(1, table.M.nunique()), table.groupby("M"), strict=True):
        colors = ["C3" if name[0].isdigit() else "C7" for name in rows.step]
        axis.barh(rows.step, rows.us, color=colors)
        for y, (us, share) in enumerate(zip(rows.us, rows.share, strict=True)):
            axis.text(us, y, f" {us:.0f} µs, {share:.0%}", va="center", fontsize=8)
        axis.axvline(rows.us.iloc[-1], color="grey", linestyle="--", linewidth=1.2)
        axis.set(title=f"M = {M}", xlabel="µs, lower is better", xlim=(0, 1.7 * rows.us.max()))
        axis.invert_yaxis()
        axis.spines[["top", "right"]].set_visible(False)
    first = table.iloc[0]
    figure.suptitle(f"SwiGLU step by step, {first.gpu}, bfloat16, K = {K}, N = {N}; %: cuBLAS's time over the step's")
    figure.savefig(path, dpi=130)


def main():
    tables = [measure(M, steps) for M, steps in STAIRS.items()]
    if not GPU:
        print("All that ran is right. Speed was not measured: that needs a GPU.")
        return
    named = {"date": date.today().isoformat(), "command": "python tutorial.py", "gpu": torch.cuda.get_device_name()}
    named |= {"torch": torch.__version__, "triton": triton.__version__, "K": K, "N": N}
    table = pd.concat(tables).assign(**named)
    for M, rows in table.groupby("M"):
        shown = pd.DataFrame({"us": rows.us.map("{:.1f}".format), "of cuBLAS": rows.share.map("{:.0%}".format)})
        shown["gain"] = ["" if g != g else f"{g:+.0%}" if abs(g) >= NOISE else "nothing" for g in rows.gain]
        print(f"\nM = {M}\n{shown.set_index(rows.step).to_string()}")
    path = benchmark.new_path(Path(), named["gpu"], "tutorial")
    table.to_csv(path, index=False, float_format="%.6g")
    plot(table, path.with_suffix(".png"))
    print(f"\n{path}\n{path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
