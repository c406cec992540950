"""SwiGLU in one Triton kernel: ``y = silu(x @ w_gate) * (x @ w_up)``.

    x (..., K)    w_gate (K, N)    w_up (K, N)    ->    y (..., N)        silu(a) = a * sigmoid(a)

The feed-forward activation of Llama, Mistral, Qwen and Mixtral (Shazeer, "GLU Variants Improve Transformer",
https://arxiv.org/abs/2002.05202, without biases). Fused are both products, SiLU and the multiplication: each
tile of x is loaded once for both products, both accumulators stay on chip, only y is written. Not fused is the
down projection that follows in a model.

It can be trained, compiled and exported: the backward pass is one kernel for the activation, one product for the
gradient of x, and cuBLAS for those of the weights. For it gate and up are written too, or computed again.

The forward pass has two kernels. swiglu_kernel, in Triton, runs everywhere and is tuned. swiglu_kernel_hopper, in
Gluon, Triton's lower level, is faster on Hopper GPUs for more than 128 rows of 16-bit numbers, and has nothing to tune.

    from fused_triton_swiglu import SwiGLUMLP, fused_swiglu, replace_mlps

    y = fused_swiglu(x, gate_proj.weight.t(), up_proj.weight.t())  # nn.Linear keeps (N, K); t() copies nothing
    mlp = SwiGLUMLP(4096, 14336)  # with the down projection, as a module
    replace_mlps(llama)  # in a model from Hugging Face

This file needs torch and triton and nothing else: copy it into your project.
"""

import contextlib
import functools
import math
import tempfile
import threading
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.errors import TritonError
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonTensorDescriptor

    # The names from Triton 3.9 on, and those before
    tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
    tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
    reinterpret = getattr(gl.shared_memory_descriptor, "reinterpret", None) or gl.shared_memory_descriptor._reinterpret
except (ImportError, AttributeError):  # Gluon is experimental and may move: then the Triton kernel serves everywhere
    gluon = None

# ----------------------------------------------------------------------------------------------------------------
# Tile configurations, and which of them suit a call
# ----------------------------------------------------------------------------------------------------------------


def _config(block_m, block_n, block_k, num_warps, num_stages, *, tma="", persistent=False, flatten=False, swap=False):
    # GROUP_M = 16 against 8: 774 -> 739 us at M = 2048 with row-major weights, never worse than the noise elsewhere.
    tile = dict(BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, GROUP_M=16)
    form = dict(TMA=tma, PERSISTENT=persistent, FLATTEN=flatten, SWAP_AB=swap)
    return triton.Config(tile | form, num_warps=num_warps, num_stages=num_stages)


# In order of preference: the first that usable_configs() keeps is the default, which needs no tuning. The comments
# say where each one won on an H100 (K = 4096, N = 14336); those without a place serve devices with less shared memory.
# Those for more than 128 rows of 16-bit numbers won before swiglu_kernel_hopper: they are for other devices and for
# operands that TMA does not take.
CONFIGS = {
    "16-bit": [
        # nn.Linear weights. Not with swap=True: a race, 256 x 64 tiles in 3 stages gave errors of 1.6e-2 to 3.6e-2.
        _config(128, 128, 64, 8, 3, tma="xw", persistent=True, flatten=True),  # M > 128
        _config(128, 64, 64, 4, 3, tma="xw"),  # M = 128: two programs share an SM
        # Row-major weights. x by TMA leaves the threads the addresses of the weights only: in one run, persistent,
        # 800 -> 714 us at M = 2048.
        _config(256, 64, 64, 8, 3, tma="x", swap=True),  # M > 128
        _config(128, 128, 64, 8, 3, persistent=True),  # M = 128
        _config(128, 64, 64, 8, 3),
        _config(128, 64, 32, 8, 3),
        _config(64, 64, 128, 4, 4, tma="xw"),  # small layers
        _config(64, 32, 128, 4, 3, tma="xw"),  # M = 64: 96.0 -> 94.7 us, as two programs share an SM
        _config(64, 64, 64, 4, 4),
        _config(64, 128, 64, 8, 3, tma="x"),  # row-major, M = 64
        _config(64, 64, 32, 4, 3),
        _config(32, 64, 128, 4, 4, swap=True),  # M = 32
        _config(32, 128, 64, 4, 4, swap=True),  # row-major, M = 32
        _config(16, 64, 128, 4, 4, swap=True),
        _config(16, 32, 128, 4, 4, swap=True),  # M <= 16
        _config(16, 128, 64, 4, 3, swap=True),  # row-major, M <= 16
        _config(16, 64, 64, 4, 3),
    ],
    # Rounding to tf32 takes both operands through registers: see round_to_tf32.
    "tf32": [
        _config(128, 128, 32, 8, 2),  # M >= 512
        _config(128, 64, 32, 8, 4, swap=True),  # row-major, M >= 512
        _config(128, 64, 32, 8, 3),
        _config(64, 64, 32, 4, 3),
        _config(32, 64, 32, 4, 4),
        _config(16, 64, 32, 4, 4),
    ],
    # No tensor core multiplies in full fp32.
    "ieee": [
        _config(128, 64, 16, 8, 3),
        _config(64, 64, 16, 8, 3),
        _config(64, 32, 16, 4, 2),
        _config(16, 128, 16, 8, 3, swap=True),
        _config(16, 64, 16, 4, 3),
    ],
}


class Device(NamedTuple):
    """What the choice of a configuration depends on."""

    name: str
    backend: str  # "cuda", "hip", or "interpreter"
    arch: int | str  # 90 for sm_90, "gfx942"
    num_sms: int
    shared_memory: int  # bytes that one program can have


@functools.cache
def device_of(index):
    """The Device behind a torch device index. None is the CPU: the interpreter, which takes what an H100 takes."""
    if index is None:
        return Device("CPU", "interpreter", 90, 1, 227 * 1024)
    with torch.cuda.device(index):
        target = driver.active.get_current_target()
    properties = driver.active.utils.get_device_properties(index)
    num_sms, shared_memory = properties["multiprocessor_count"], properties["max_shared_mem"]
    return Device(torch.cuda.get_device_name(index), target.backend, target.arch, num_sms, shared_memory)


def _cdiv(a, b):
    """a / b, rounded up. triton.cdiv takes 5 us on the host."""
    return -(-a // b)


MANY_ROWS = 8192  # more make no difference to the choice of a configuration


def m_bucket(M):
    """Row counts that share one tuning result: 1..16, 17..32, 33..64, ..., 4097 and more."""
    return min(max(triton.next_power_of_2(M), 16), MANY_ROWS)


def usable_configs(kind, M, N, tma, device):
    """The entries of CONFIGS[kind] worth trying for an (M, N) result, the default first.

    `tma` names the operands that tensor descriptors can describe, see tma_operands.
    """
    bucket = m_bucket(M)
    # wgmma and tcgen05 read their operands from shared memory. mma.sync and FMAs keep them in registers, which leaves
    # room for half the accumulator, and have no side of 64 rows that would make it worth to swap the operands.
    operands_in_shared_memory = device.backend != "hip" and device.arch // 10 in (9, 10)
    max_acc = 128 * 256 if operands_in_shared_memory else 128 * 128
    large_tiles_idle_sms = _cdiv(M, 128) * _cdiv(N, 128) < device.num_sms
    min_rows = 64 if large_tiles_idle_sms else 128

    def usable(config):
        block_m, block_n, block_k = (config.kwargs[k] for k in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
        itemsize = 2 if kind == "16-bit" else 4
        shared_memory = config.num_stages * (block_m + 2 * block_n) * block_k * itemsize
        if config.kwargs["FLATTEN"]:  # y is staged while the next tile is on its way
            shared_memory += block_m * block_n * itemsize
        return (
            shared_memory <= device.shared_memory
            and block_m * 2 * block_n <= max_acc
            and (operands_in_shared_memory or not config.kwargs["SWAP_AB"])
            and min(bucket // 2, min_rows) <= block_m <= bucket
            # Below 64 rows pointers are as fast; from there on descriptors for both operands won at every M.
            and (config.kwargs["TMA"] == tma or (config.kwargs["TMA"] == "" and (block_m < 64 or tma != "xw")))
        )

    return [config for config in CONFIGS[kind] if usable(config)]


# ----------------------------------------------------------------------------------------------------------------
# Kernel
# ----------------------------------------------------------------------------------------------------------------


@triton.jit
def grouped_tile(tile, num_pid_m, num_pid_n, GROUP_M: tl.constexpr):
    """Go down GROUP_M row tiles before moving one column on: what runs at the same time shares x and w in L2."""
    tiles_in_group = GROUP_M * num_pid_n
    first_pid_m = tile // tiles_in_group * GROUP_M
    rows = min(num_pid_m - first_pid_m, GROUP_M)
    pid_m = first_pid_m + tile % tiles_in_group % rows
    pid_n = tile % tiles_in_group // rows
    return pid_m, pid_n


@triton.jit
def silu_mul(gate, up):
    return gate / (1 + tl.exp(-gate)) * up


@triton.jit
def round_to_tf32(a):
    """The tensor cores cut fp32 off after 10 bits, which shrinks every product: 1.6e-3 error against 4.2e-4 rounded."""
    return tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r,r", [a], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def multiply_add(x, w, acc, INPUT_PRECISION: tl.constexpr, SWAP_AB: tl.constexpr):
    """acc + x @ w, or its transpose with SWAP_AB."""
    if INPUT_PRECISION == "tf32":
        x = round_to_tf32(x)
        w = round_to_tf32(w)
    if SWAP_AB:
        acc = tl.dot(w.T, x.T, acc, input_precision=INPUT_PRECISION)
    else:
        acc = tl.dot(x, w, acc, input_precision=INPUT_PRECISION)
    return acc


def _x_descriptor(args):
    if args["TMA"]:
        shape, strides = [args["M"], args["K"]], [args["stride_xo"], 1]
        return TensorDescriptor(args["x_ptr"], shape, strides, [args["BLOCK_M"], args["BLOCK_K"]])


def _w_descriptor(args):
    """Both weights as one (2, N, K) tensor: the second lies a fixed distance behind the first in memory."""
    if args["TMA"] == "xw":
        first, second = args["w_gate_ptr"], args["w_up_ptr"]
        if args["UP_FIRST"]:
            first, second = second, first
        distance = (second.data_ptr() - first.data_ptr()) // first.element_size()
        shape, strides = [2, args["N"], args["K"]], [distance, args["stride_gn"], 1]
        return TensorDescriptor(first, shape, strides, [2, args["BLOCK_N"], args["BLOCK_K"]])


# Descriptors need the configuration's tile sizes. Made here, below the autotuner, they leave its cache on disk usable
# (a Config.pre_hook, the other place for them, switches it off).
@triton.heuristics(
    {
        "x_desc": _x_descriptor,
        "w_desc": _w_descriptor,
        "EVEN_K": lambda args: args["K"] % args["BLOCK_K"] == 0,
        "SAME_STRIDE_K": lambda args: args["stride_gk"] == args["stride_uk"],
    }
)
@triton.jit(do_not_specialize=["M_BUCKET"])
def swiglu_kernel(
    # Tensors
    x_ptr,
    w_gate_ptr,
    w_up_ptr,
    y_ptr,
    gate_up_ptr,  # (M, 2N): gate beside up, kept for the backward pass, or None
    x_desc,  # (M, K), or None where TMA does not load x
    w_desc,  # (2, N, K), both weights, or None
    # Sizes. Row m of x is row m % M_INNER of block m // M_INNER
    M,
    N,
    K,
    M_INNER,
    # Strides, in elements. y is contiguous
    stride_xo,
    stride_xi,
    stride_xk,
    stride_gk,
    stride_gn,
    stride_uk,
    stride_un,
    # Not read here: with N, K, INPUT_PRECISION and the dtypes, what a tuning result is kept under
    M_BUCKET,
    LAYOUT: tl.constexpr,
    DEVICE: tl.constexpr,
    # How
    INPUT_PRECISION: tl.constexpr,
    UP_FIRST: tl.constexpr,  # the descriptor's first weight is w_up
    EVEN_K: tl.constexpr,
    SAME_STRIDE_K: tl.constexpr,
    # From the configuration
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    TMA: tl.constexpr,  # operands loaded through descriptors: "", "x" or "xw"; the others through pointers
    PERSISTENT: tl.constexpr,  # read by the grid: one program per SM instead of one per tile
    FLATTEN: tl.constexpr,  # one loop over tiles and K, so that loads run ahead across tiles
    SWAP_AB: tl.constexpr,  # compute y.T: the weights take the side of the tensor core that wants 64 rows
):
    num_pid_m = tl.cdiv(M, BLOCK_M)
    num_pid_n = tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), num_pid_m * num_pid_n, tl.num_programs(0), flatten=FLATTEN):
        # ---- Which tile ----
        pid_m, pid_n = grouped_tile(tile, num_pid_m, num_pid_n, GROUP_M)
        offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
        offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)

        # ---- One K loop for both products ----
        # BLOCK_N columns of w_gate and the same columns of w_up, side by side in one operand: one wide dot in place
        # of two (1303 us against 1475 at M = 4096).
        if SWAP_AB:
            acc = tl.zeros((2 * BLOCK_N, BLOCK_M), dtype=tl.float32)
        else:
            acc = tl.zeros((BLOCK_M, 2 * BLOCK_N), dtype=tl.float32)
        if TMA == "xw":
            for k in range(0, K, BLOCK_K):
                x = x_desc.load([pid_m * BLOCK_M, k])
                w = w_desc.load([0, pid_n * BLOCK_N, k]).reshape(2 * BLOCK_N, BLOCK_K).T
                acc = multiply_add(x, w, acc, INPUT_PRECISION, SWAP_AB)
        else:
            offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
            offs_w = tl.arange(0, 2 * BLOCK_N)
            offs_wn = pid_n * BLOCK_N + offs_w % BLOCK_N
            mask_m = (offs_m < M)[:, None]
            mask_n = (offs_wn < N)[None, :]

            # 64-bit offsets: a tensor may have more than 2**31 elements.
            rows = (offs_m // M_INNER).to(tl.int64) * stride_xo + (offs_m % M_INNER).to(tl.int64) * stride_xi
            x_ptrs = x_ptr + rows[:, None] + offs_k[None, :] * stride_xk
            x_step = tl.cast(stride_xk, tl.int64) * BLOCK_K
            is_up = (offs_w >= BLOCK_N)[None, :]
            columns = offs_wn.to(tl.int64)[None, :]
            w_ptrs = tl.where(
                is_up,
                w_up_ptr + offs_k[:, None] * stride_uk + columns * stride_un,
                w_gate_ptr + offs_k[:, None] * stride_gk + columns * stride_gn,
            )
            w_step = tl.cast(stride_gk, tl.int64) * BLOCK_K
            if not SAME_STRIDE_K:
                w_step = tl.where(is_up, tl.cast(stride_uk, tl.int64) * BLOCK_K, w_step)

            for k in range(0, K, BLOCK_K):
                mask_xk = True if EVEN_K else (offs_k < K - k)[None, :]
                mask_wk = True if EVEN_K else (offs_k < K - k)[:, None]
                if TMA == "x":
                    x = x_desc.load([pid_m * BLOCK_M, k])
                else:
                    x = tl.load(x_ptrs, mask=mask_m & mask_xk, other=0.0)
                w = tl.load(w_ptrs, mask=mask_n & mask_wk, other=0.0)
                acc = multiply_add(x, w, acc, INPUT_PRECISION, SWAP_AB)
                x_ptrs += x_step
                w_ptrs += w_step

        # ---- Epilogue: take the accumulator apart (column n and n + BLOCK_N are in one thread), SiLU in fp32 ----
        if SWAP_AB:
            acc = acc.T
        gate, up = tl.split(acc.reshape(BLOCK_M, 2, BLOCK_N).permute(0, 2, 1))
        if TMA == "xw" and UP_FIRST:
            gate, up = up, gate
        offs_y = offs_m.to(tl.int64)[:, None] * N + offs_n[None, :]
        mask_y = (offs_m < M)[:, None] & (offs_n < N)[None, :]
        if gate_up_ptr is not None:
            gate_ptrs = gate_up_ptr + offs_y + offs_m.to(tl.int64)[:, None] * N
            tl.store(gate_ptrs, gate.to(y_ptr.dtype.element_ty), mask=mask_y)
            tl.store(gate_ptrs + N, up.to(y_ptr.dtype.element_ty), mask=mask_y)
        y = silu_mul(gate, up)
        tl.store(y_ptr + offs_y, y.to(y_ptr.dtype.element_ty), mask=mask_y)


# ----------------------------------------------------------------------------------------------------------------
# Kernels for Hopper and results of many tiles: warp-specialised, in Gluon
# ----------------------------------------------------------------------------------------------------------------

# A tile is TILE_M x TILE_N of y, twice as wide of dx. Not tuned: the one other size that pays is half of TILE_N, see
# hopper_walk.
TILE_M, TILE_N, TILE_GROUP = tl.constexpr(128), tl.constexpr(128), tl.constexpr(16)
STAGES = tl.constexpr(4)  # of 48 KB. With y they fill the shared memory
BOX = tl.constexpr(64)  # what a stage takes of K, and the columns of a TMA box: 128 bytes, the widest swizzle
CONSUMERS = tl.constexpr(2)  # of four warps; each computes the TILE_M // CONSUMERS rows that one wgmma has
# A third of the registers for each consumer and for the producer, which hands most of its third on.
HOPPER_OPTIONS = {"num_warps": 4, "maxnreg": 168}

if gluon:
    SWIZZLE = gl.NVMMASharedLayout(swizzle_byte_width=2 * BOX.value, element_bitwidth=16)

    @gluon.jit
    def hopper_walk(work: gl.constexpr, arguments, M, N):
        """Call `work` for each tile of this program, with its first row and column, and its width.

        Steps along K are counted through all tiles: they say which stage is next, and in which phase.

        Where the last wave would keep at most half of the programs busy, its tiles are computed in halves, each by a
        program: 195 -> 175 us at M = 512.
        """
        num_pid_m, num_pid_n = gl.cdiv(M, TILE_M), gl.cdiv(N, TILE_N)
        tiles = num_pid_m * num_pid_n
        last_wave = tiles % gl.num_programs(0)
        if 2 * last_wave > gl.num_programs(0):
            last_wave = 0
        whole = tiles - last_wave
        step = 0
        for tile in range(gl.program_id(0), whole, gl.num_programs(0)):
            pid_m, pid_n = grouped_tile(tile, num_pid_m, num_pid_n, TILE_GROUP)
            step = work(step, pid_m * TILE_M, pid_n * TILE_N, TILE_N, arguments)
        for half in range(gl.program_id(0), 2 * last_wave, gl.num_programs(0)):
            pid_m, pid_n = grouped_tile(whole + half // 2, num_pid_m, num_pid_n, TILE_GROUP)
            off_n = pid_n * TILE_N + half % 2 * (TILE_N // 2)
            step = work(step, pid_m * TILE_M, off_n, TILE_N // 2, arguments)
        tma.store_wait(0)  # the shared memory must outlive the stores that read it

    @gluon.jit
    def hopper_load(
        step,
        off_m,
        off_1,
        off_2,
        k,
        x_desc,
        w_1_desc,
        w_2_desc,
        buffers,
        WIDTH: gl.constexpr,
        ROW_MAJOR: gl.constexpr,
    ):
        """Start the loads of one stage: x from row off_m on, WIDTH columns of w_1 from off_1 and of w_2 from off_2 on.

        Returns the next step. The operand that the weights make lies (K, columns) in memory with ROW_MAJOR, else
        (columns, K).
        """
        x_buffers, w_buffers, full, empty = buffers
        HALF: gl.constexpr = WIDTH // BOX  # the boxes of one weight, then as many of the other, make one operand
        stage = step % STAGES
        # The phase before the first counts as done, so the first round of stages is free at once.
        mbarrier.wait(empty.index(stage), step // STAGES & 1 ^ 1)
        ready = full.index(stage)
        mbarrier.expect(ready, x_desc.block_type.nbytes + 2 * HALF * w_1_desc.block_type.nbytes)
        tma_load(x_desc, [off_m, k], ready, x_buffers.index(stage))
        for i in gl.static_range(HALF):
            box = stage * (w_buffers.shape[0] // STAGES) + i
            where_1 = (k, off_1 + i * BOX) if ROW_MAJOR else (off_1 + i * BOX, k)
            where_2 = (k, off_2 + i * BOX) if ROW_MAJOR else (off_2 + i * BOX, k)
            tma_load(w_1_desc, where_1, ready, w_buffers.index(box))
            tma_load(w_2_desc, where_2, ready, w_buffers.index(box + HALF))
        return step + 1

    @gluon.jit
    def hopper_multiply(step, steps, buffers, CONSUMER: gl.constexpr, WIDTH: gl.constexpr, ROW_MAJOR: gl.constexpr):
        """One consumer's rows of x times WIDTH columns of each weight, over all steps. Returns the next step too."""
        # ---- Where its operands are ----
        # The boxes of a stage lie one behind the other just as the swizzled layout of one wide operand has them, in
        # either layout of the weights: one wgmma of n = 2 * WIDTH, and no distance between the weights to describe.
        x_buffers, w_buffers, full, empty = buffers
        ROWS: gl.constexpr = TILE_M // CONSUMERS
        OPERANDS: gl.constexpr = w_buffers.shape[0] * BOX // (2 * WIDTH)
        SHAPE_W: gl.constexpr = [OPERANDS, BOX, 2 * WIDTH] if ROW_MAJOR else [OPERANDS, 2 * WIDTH, BOX]
        w_operands = reinterpret(w_buffers, w_buffers.dtype, SHAPE_W, w_buffers.layout)

        # ---- One K loop for both products ----
        acc = gl.zeros([ROWS, 2 * WIDTH], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 2 * WIDTH, 16]))
        for i in range(0, steps):
            stage = step % STAGES
            mbarrier.wait(full.index(stage), step // STAGES & 1)
            x = x_buffers.index(stage).slice(CONSUMER * ROWS, ROWS)
            w = w_operands.index(stage * (OPERANDS // STAGES))
            if not ROW_MAJOR:
                w = w.permute([1, 0])
            acc = warpgroup_mma(x, w, acc, use_acc=i > 0, is_async=True)
            acc = warpgroup_mma_wait(1, [acc])  # the product before this one is done: its stage may be loaded again
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), pred=i > 0)
            step += 1
        acc = warpgroup_mma_wait(0, [acc])
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES))
        first, second = acc.reshape([ROWS, 2, WIDTH]).permute([0, 2, 1]).split()
        return first, second, step

    @gluon.jit
    def hopper_store(values, desc, buffers, off_m, off_n, CONSUMER: gl.constexpr):
        """Round and store one consumer's rows, through shared memory."""
        ROWS: gl.constexpr = values.shape[0]
        WIDTH: gl.constexpr = values.shape[1]
        FIRST_BOX: gl.constexpr = CONSUMER * (TILE_N // BOX)
        wide = reinterpret(buffers, buffers.dtype, [buffers.shape[0] * BOX // WIDTH, ROWS, WIDTH], buffers.layout)
        values = values.to(desc.dtype)
        tma.store_wait(0)  # what was stored before has left the buffer
        wide.index(FIRST_BOX * BOX // WIDTH).store(values)
        fence_async_shared()
        for i in gl.static_range(WIDTH // BOX):
            where = (off_m + CONSUMER * ROWS, off_n + i * BOX)
            tma_store(desc, where, buffers.index(FIRST_BOX + i))

    @gluon.jit
    def hopper_specialize(load: gl.constexpr, compute: gl.constexpr, loads, stores, sizes, ROW_MAJOR: gl.constexpr):
        """One warp does nothing but `load`, two consumers of four warps `compute`; each walks over the program's tiles.

        No barrier joins the consumers, so that one keeps the tensor cores busy while the other is in its epilogue: 705
        -> 676 us at M = 2048 against one consumer of eight warps.
        """
        x_desc, w_desc, out_desc = loads[0], loads[-1], stores[0]
        x_buffers = gl.allocate_shared_memory(x_desc.dtype, [STAGES, TILE_M, BOX], x_desc.layout)
        w_buffers = gl.allocate_shared_memory(w_desc.dtype, [STAGES * 2 * TILE_N // BOX, BOX, BOX], w_desc.layout)
        SHAPE_OUT: gl.constexpr = [CONSUMERS * TILE_N // BOX, TILE_M // CONSUMERS, BOX]
        out_buffers = gl.allocate_shared_memory(out_desc.dtype, SHAPE_OUT, out_desc.layout)
        full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        for stage in gl.static_range(STAGES):
            mbarrier.init(full.index(stage), count=1)
            mbarrier.init(empty.index(stage), count=CONSUMERS)
        fence_async_shared()
        buffers = (x_buffers, w_buffers, full, empty)
        M, N, K = sizes
        gl.warp_specialize(
            [
                (hopper_walk, (compute, (stores, out_buffers, buffers, K, ROW_MAJOR, 0), M, N)),
                (hopper_walk, (compute, (stores, out_buffers, buffers, K, ROW_MAJOR, 1), M, N)),
                (hopper_walk, (load, (loads, buffers, K, ROW_MAJOR), M, N)),
            ],
            worker_num_warps=[4, 1],
            # A consumer's accumulator takes 128 registers of each thread, the epilogue nearly as many; loads take few.
            worker_num_regs=[240, 24],
        )

    @gluon.jit
    def hopper_load_swiglu(step, off_m, off_n, WIDTH: gl.constexpr, arguments):
        """The same columns of both weights for each step along K."""
        loads, buffers, K = arguments[:3]
        ROW_MAJOR: gl.constexpr = arguments[3]
        x_desc, w_gate_desc, w_up_desc = loads
        for k in range(0, K, BOX):
            step = hopper_load(step, off_m, off_n, off_n, k, x_desc, w_gate_desc, w_up_desc, buffers, WIDTH, ROW_MAJOR)
        return step

    @gluon.jit
    def hopper_swiglu(step, off_m, off_n, WIDTH: gl.constexpr, arguments):
        """One consumer's rows and WIDTH columns of y, and of gate and up where they are kept."""
        stores, out_buffers, buffers, K = arguments[:4]
        ROW_MAJOR: gl.constexpr = arguments[4]
        CONSUMER: gl.constexpr = arguments[5]
        y_desc, gate_desc, up_desc = stores
        gate, up, step = hopper_multiply(step, gl.cdiv(K, BOX), buffers, CONSUMER, WIDTH, ROW_MAJOR)
        if gate_desc is not None:
            hopper_store(gate, gate_desc, out_buffers, off_m, off_n, CONSUMER)
            hopper_store(up, up_desc, out_buffers, off_m, off_n, CONSUMER)
        hopper_store(silu_mul(gate, up), y_desc, out_buffers, off_m, off_n, CONSUMER)
        return step

    @gluon.jit(do_not_specialize=["M", "N", "K"])
    def swiglu_kernel_hopper(
        x_desc, w_gate_desc, w_up_desc, y_desc, gate_desc, up_desc, M, N, K, ROW_MAJOR: gl.constexpr
    ):
        """As swiglu_kernel. Weights lie (N, K) in memory, with ROW_MAJOR (K, N). gate_desc and up_desc may be None.

        Which tile: hopper_walk; its operands: hopper_load; K loop: hopper_multiply; epilogue: hopper_swiglu.
        At M = 2048 676 us, where swiglu_kernel takes 727 and cuBLAS 692 for the products alone (one run, H100).
        """
        loads = (x_desc, w_gate_desc, w_up_desc)
        stores = (y_desc, gate_desc, up_desc)
        hopper_specialize(hopper_load_swiglu, hopper_swiglu, loads, stores, (M, N, K), ROW_MAJOR)

    @gluon.jit
    def hopper_load_dx(step, off_m, off_k, WIDTH: gl.constexpr, arguments):
        """First all of dgate and w_gate, then all of dup and w_up. A tile is twice as wide as the walk counts."""
        loads, buffers, N = arguments[:3]
        ROW_MAJOR: gl.constexpr = arguments[3]
        dgate_desc, dup_desc, w_gate_desc, w_up_desc = loads
        left, right = 2 * off_k, 2 * off_k + WIDTH
        for n in range(0, N, BOX):
            step = hopper_load(
                step, off_m, left, right, n, dgate_desc, w_gate_desc, w_gate_desc, buffers, WIDTH, ROW_MAJOR
            )
        for n in range(0, N, BOX):
            step = hopper_load(step, off_m, left, right, n, dup_desc, w_up_desc, w_up_desc, buffers, WIDTH, ROW_MAJOR)
        return step

    @gluon.jit
    def hopper_dx(step, off_m, off_k, WIDTH: gl.constexpr, arguments):
        """One consumer's rows and 2 * WIDTH columns of dx."""
        stores, out_buffers, buffers, N = arguments[:4]
        ROW_MAJOR: gl.constexpr = arguments[4]
        CONSUMER: gl.constexpr = arguments[5]
        left, right, step = hopper_multiply(step, 2 * gl.cdiv(N, BOX), buffers, CONSUMER, WIDTH, ROW_MAJOR)
        hopper_store(left, stores[0], out_buffers, off_m, 2 * off_k, CONSUMER)
        hopper_store(right, stores[0], out_buffers, off_m, 2 * off_k + WIDTH, CONSUMER)
        return step

    @gluon.jit(do_not_specialize=["M", "N", "K"])
    def swiglu_dx_kernel_hopper(
        dgate_desc, dup_desc, w_gate_desc, w_up_desc, dx_desc, M, N, K, ROW_MAJOR: gl.constexpr
    ):
        """dx = dgate @ w_gate.T + dup @ w_up.T in one accumulator. Weights lie (K, N) in memory, with ROW_MAJOR (N, K).

        At M = 4096 1350 us, where cuBLAS takes 1404 with its first product rounded before the second is added, and 1471
        in float32 (one run, H200). In longer runs, at the card's power limit, it is 1 to 3 % slower than the former.
        """
        loads = (dgate_desc, dup_desc, w_gate_desc, w_up_desc)
        hopper_specialize(hopper_load_dx, hopper_dx, loads, (dx_desc,), (M, gl.cdiv(K, 2), N), ROW_MAJOR)


# ----------------------------------------------------------------------------------------------------------------
# Kernel for the backward pass
# ----------------------------------------------------------------------------------------------------------------


@triton.jit
def swiglu_backward_kernel(
    # Tensors
    dy_ptr,
    gate_up_ptr,  # (M, 2N): gate beside up
    d_ptr,  # (M, 2N): dgate beside dup. May be gate_up
    # Sizes and strides, in elements
    N,
    stride_dym,
    stride_dyn,
    BLOCK_N: tl.constexpr,
):
    """With s = sigmoid(gate): dgate = dy * up * s * (1 + gate * (1 - s)), dup = dy * gate * s."""
    blocks = tl.cdiv(N, BLOCK_N)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    offs_n = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_gate = row * 2 * N + offs_n
    offs_up = offs_gate + N
    mask = offs_n < N
    dy = tl.load(dy_ptr + row * stride_dym + offs_n.to(tl.int64) * stride_dyn, mask=mask).to(tl.float32)
    gate = tl.load(gate_up_ptr + offs_gate, mask=mask).to(tl.float32)
    up = tl.load(gate_up_ptr + offs_up, mask=mask).to(tl.float32)
    sigmoid = 1 / (1 + tl.exp(-gate))
    dgate = dy * up * sigmoid * (1 + gate * (1 - sigmoid))
    dup = dy * gate * sigmoid
    tl.store(d_ptr + offs_gate, dgate.to(d_ptr.dtype.element_ty), mask=mask)
    tl.store(d_ptr + offs_up, dup.to(d_ptr.dtype.element_ty), mask=mask)


# ----------------------------------------------------------------------------------------------------------------
# Checks of the arguments
# ----------------------------------------------------------------------------------------------------------------


def _check(x, w_gate, w_up):
    """Raise for what fused_swiglu does not take. All that this reads is in _launch_key."""
    tensors = {"x": x, "w_gate": w_gate, "w_up": w_up}
    for name, t in tensors.items():
        if t.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise TypeError(f"{name} is {t.dtype}: expected torch.bfloat16, torch.float16 or torch.float32")
        if t.dtype != x.dtype:
            raise TypeError(f"{name} is {t.dtype}, but x is {x.dtype}: all three must have one dtype")
        if t.device != x.device:
            raise ValueError(f"{name} is on {t.device}, but x is on {x.device}: all three must be on one device")
        if t.device.type != "cuda" and not (INTERPRETED and t.device.type == "cpu"):
            raise ValueError(f"{name} is on {t.device}: expected a GPU (or the CPU with TRITON_INTERPRET=1)")
    if x.dim() < 1:
        raise ValueError("x has no dimensions: expected (..., K)")
    for name in ("w_gate", "w_up"):
        if tensors[name].dim() != 2:
            raise ValueError(f"{name} is {tuple(tensors[name].shape)}: expected two dimensions, (K, N)")
    if w_up.shape != w_gate.shape:
        raise ValueError(f"w_up is {tuple(w_up.shape)}, but w_gate is {tuple(w_gate.shape)}: both must be (K, N)")
    if x.shape[-1] != w_gate.shape[0]:
        K = x.shape[-1]
        raise ValueError(f"w_gate is {tuple(w_gate.shape)}, but x is {tuple(x.shape)}: w_gate must be ({K}, N)")


# ----------------------------------------------------------------------------------------------------------------
# Where Triton fails: a configuration, Gluon, the cache folder
# ----------------------------------------------------------------------------------------------------------------

# What a kernel raises that Triton cannot compile or load here, that does not fit this GPU, or that calls what Gluon no
# longer has; but see FATAL.
UNUSABLE = TritonError, RuntimeError, TypeError, AttributeError
FATAL = torch.OutOfMemoryError, torch.AcceleratorError  # RuntimeErrors too, and not the kernel's fault


def _working(configs, launch):
    """Yield each configuration that can be launched, with what `launch(config)` returns. Raise if there is none."""
    reasons = []
    for config in configs:
        try:
            compiled = launch(config)
        except FATAL:
            raise
        except UNUSABLE as error:
            reasons.append(f"{config} fails: {_brief(error)}")
            warnings.warn(f"fused_swiglu leaves a configuration out: {reasons[-1]}", stacklevel=2)
        else:
            yield config, compiled
    if len(reasons) == len(configs):
        reasons.append(f"(Kernels that do not load may be damaged in Triton's cache folder, {triton.knobs.cache.dir})")
        raise RuntimeError("fused_swiglu: no configuration works on this GPU\n" + "\n".join(reasons))


def _brief(error):
    """In one line: Triton's messages begin with the source and end with what is wrong."""
    return f"{type(error).__name__}: {str(error).strip().rpartition(chr(10))[2]}"


@contextlib.contextmanager
def _gluon_may_fail():
    """Should Gluon turn out to work in another way than this file knows, the other kernels serve from then on."""
    global gluon
    try:
        yield
    except FATAL:
        raise
    except UNUSABLE as error:
        gluon = None
        warnings.warn(f"fused_swiglu goes on without its kernels for Hopper, slower: {_brief(error)}", stacklevel=2)


@functools.cache
def _temporary_folder():
    return tempfile.TemporaryDirectory(prefix="fused_swiglu_")  # removed when the process ends


def _despite_cache_faults(launch):
    """`launch`, which compiles, and works where Triton's cache folder is damaged, full or cannot be written."""

    @functools.wraps(launch)
    def launch_again(*args, **kwargs):
        try:
            return launch(*args, **kwargs)
        except (OSError, ValueError, KeyError, TypeError) as error:  # all but the first: JSON that is not what it was
            folder = triton.knobs.cache.dir
            with triton.knobs.cache.scope():
                triton.knobs.cache.dir = _temporary_folder().name
                result = launch(*args, **kwargs)
            # The folder was at fault, as with another one it works.
            warnings.warn(
                f"fused_swiglu cannot use Triton's cache folder {folder} ({_brief(error)}): what is compiled and tuned "
                "now is lost with this process. Empty the folder, or choose another one by TRITON_CACHE_DIR.",
                stacklevel=2,
            )
            return result

    return launch_again


# ----------------------------------------------------------------------------------------------------------------
# Launch
# ----------------------------------------------------------------------------------------------------------------

INTERPRETED = triton.knobs.runtime.interpret  # as @triton.jit saw it when it made the kernel above
TUNED, DEFAULT, ONE_FOR_ALL_M = "tuned", "default", "one for all M"  # how a configuration is chosen: see fused_swiglu


def _prune(configs, args, **kwargs):
    every = args | kwargs
    kind = next(kind for kind in CONFIGS if CONFIGS[kind] is configs)
    device = device_of(every["x_ptr"].device.index)
    usable = usable_configs(kind, every["M"], every["N"], every["LAYOUT"].partition("/")[2], device)
    # Triton's autotuner skips some of what may fail, and would keep on disk that all failed.
    launches = _working(usable, lambda config: swiglu_kernel.run(*args.values(), **kwargs, **config.all_kwargs()))
    return [config for config, _ in launches]


TUNERS = {
    kind: triton.autotune(
        configs=configs,
        key=["M_BUCKET", "N", "K", "LAYOUT", "INPUT_PRECISION", "DEVICE"],
        prune_configs_by={"early_config_prune": _prune},
        cache_results=True,
    )(swiglu_kernel)
    for kind, configs in CONFIGS.items()
}


def _in_rows(x):
    """x as (blocks, rows, K), evenly strided in each of the two row dimensions, or None where only a copy is."""
    for split in range(x.dim() - 1, -1, -1):
        try:
            return x.view(math.prod(x.shape[:split]), math.prod(x.shape[split:-1]), x.shape[-1])
        except RuntimeError:
            continue
    return None


MAX_STEP = 2**40  # bytes: a descriptor's strides are below


def _tma_takes(t):
    """Whether TMA can load from a 2-D tensor: the last dimension contiguous, all else in steps of 16 bytes."""
    step = t.stride(0) * t.element_size()
    return t.stride(1) == 1 and t.data_ptr() % 16 == 0 and 0 < step < MAX_STEP and step % 16 == 0


def tma_operands(rows, w_gate, w_up, device):
    """The operands that swiglu_kernel's descriptors can describe: "xw", "x" or ""."""
    if device.backend == "hip" or not 90 <= device.arch < 120 or rows.element_size() != 2:
        return ""
    if INTERPRETED and rows.is_cuda:  # the interpreter works on copies, whose distance is another
        return ""
    if rows.shape[1] > 1 or not _tma_takes(rows[:, 0]):
        return ""
    distance = abs(w_up.data_ptr() - w_gate.data_ptr())
    if w_gate.stride() != w_up.stride() or not _tma_takes(w_gate.t()) or not 0 < distance < MAX_STEP or distance % 16:
        return "x"
    return "xw"


def hopper_weights(w_gate, w_up):
    """How swiglu_kernel_hopper loads the weights: "row-major" (K, N), "linear" (N, K), or None if TMA takes neither."""
    if _tma_takes(w_gate) and _tma_takes(w_up):
        return "row-major"
    return "linear" if _tma_takes(w_gate.t()) and _tma_takes(w_up.t()) else None


def hopper_applies(rows, w_gate, w_up, device, any_m=False):
    """Whether swiglu_kernel_hopper computes this call: it can, and it is faster or, with `any_m`, the same for all M.

    Up to 128 rows reading the weights takes the time, which smaller tiles do better: 98 us against 104 at M = 128. With
    fewer than a third as many tiles as SMs nothing was measured.
    """
    (blocks, inner, _), N = rows.shape, w_gate.shape[1]
    M = blocks * inner
    tiles = _cdiv(M, TILE_M.value) * _cdiv(N, TILE_N.value)
    if gluon is None or INTERPRETED or (device.backend, device.arch) != ("cuda", 90) or N % 8:  # y is stored by TMA
        return False
    if not any_m and (M <= 128 or 3 * tiles < device.num_sms):
        return False
    return tma_operands(rows, w_gate, w_up, device) != "" and hopper_weights(w_gate, w_up) is not None


class Launcher(NamedTuple):
    """A compiled kernel, for any tensors with one _launch_key."""

    run: Callable
    arguments: Callable  # x, w_gate, w_up, y, gate_up -> all that the kernel takes
    final: bool  # nothing is left to tune

    def __call__(self, *tensors):
        self.run(*self.arguments(*tensors))


# _launch_key -> Launcher. The second call with a key skips the checks, the autotuner, the heuristics and the binding of
# arguments: 20 us of host time (M = 1, K = N = 512), eager PyTorch's four operations 43 to 56 in the same run.
_launchers = {}
MAX_LAUNCHERS = 4096  # of some KB each; a server meets every M there is
_first_launches = threading.RLock()  # Triton's autotuner keeps what it works at in itself: one thread at a time


def _launch_key(x, w_gate, w_up, keep, choice):
    """All that the checks, the choice of a configuration and Triton's specialization depend on."""
    distance = w_up.data_ptr() - w_gate.data_ptr()
    return (
        (x.shape, w_gate.shape, w_up.shape),
        (x.stride(), w_gate.stride(), w_up.stride()),
        (x.dtype, w_gate.dtype, w_up.dtype),
        (x.device, w_gate.device, w_up.device),
        (x.data_ptr() % 16, w_gate.data_ptr() % 16, w_up.data_ptr() % 16),
        (0 < distance < MAX_STEP, -MAX_STEP < distance < 0),
        keep,
        choice == ONE_FOR_ALL_M,
        x.dtype == torch.float32 and torch.get_float32_matmul_precision(),
    )


def _on_device_of(t):
    """A context in which kernels are launched where `t` lies."""
    elsewhere = t.is_cuda and t.device.index != torch.cuda.current_device()
    return torch.cuda.device(t.device) if elsewhere else contextlib.nullcontext()


def _forward(x, w_gate, w_up, keep, choice):
    """y (..., N), and gate_up (..., 2N), gate beside up, or None if it is not to be kept."""
    key = _launch_key(x, w_gate, w_up, keep, choice)
    launcher = _launchers.get(key)
    if launcher is None:
        _check(x, w_gate, w_up)
    N = w_gate.shape[1]
    y = torch.empty(*x.shape[:-1], N, dtype=x.dtype, device=x.device)
    gate_up = torch.empty(*x.shape[:-1], 2 * N, dtype=x.dtype, device=x.device) if keep else None
    if y.numel() == 0:
        return y, gate_up
    if x.shape[-1] == 0:
        return y.zero_(), gate_up.zero_() if keep else None
    if INTERPRETED and x.dtype == torch.bfloat16:  # the interpreter's bf16 products are garbage (Triton 3.6 to 3.9)
        results = _forward(x.float(), w_gate.float(), w_up.float(), keep, choice)
        return tuple(t if t is None else t.to(x.dtype) for t in results)
    with _on_device_of(x):
        if launcher and (launcher.final or choice != TUNED or torch.cuda.is_current_stream_capturing()):
            launcher(x, w_gate, w_up, y, gate_up)
        else:
            with _first_launches:
                if len(_launchers) >= MAX_LAUNCHERS:
                    _launchers.clear()
                _launchers[key] = _first_launch(x, w_gate, w_up, y, gate_up, choice)
    return y, gate_up


@_despite_cache_faults
def _first_launch(x, w_gate, w_up, y, gate_up, choice):
    """Fill y and gate_up, all sizes above 0, and return the Launcher that does it again, or None if there is none."""
    rows = _in_rows(x)
    if rows is None:  # three row strides or more: each block of rows by itself
        for i, x_i in enumerate(x):
            _first_launch(x_i, w_gate, w_up, y[i], gate_up if gate_up is None else gate_up[i], choice)
        return None
    if hopper_applies(rows, w_gate, w_up, device_of(x.device.index), any_m=choice == ONE_FOR_ALL_M):
        with _gluon_may_fail():
            return _launch_hopper(rows, w_gate, w_up, y, gate_up)
    return _launch_triton(rows, w_gate, w_up, y, gate_up, choice)


def _hopper_descriptor(t, rows, columns, stride, box_rows):
    """A (rows, columns) matrix at the start of `t`, `stride` elements from row to row."""
    return GluonTensorDescriptor(t, [rows, columns], [stride, 1], [box_rows, BOX.value], SWIZZLE)


def _hopper_weight(w, row_major):
    """A (K, N) weight as it lies in memory: see hopper_weights."""
    w = w if row_major else w.t()
    return _hopper_descriptor(w, *w.shape, w.stride(0), BOX.value)


def _launch_hopper(rows, w_gate, w_up, y, gate_up):
    """Fill y and gate_up by swiglu_kernel_hopper, and return the Launcher that does it again."""
    (M, _, K), N, stride_xm = rows.shape, w_gate.shape[1], rows.stride(0)
    row_major = hopper_weights(w_gate, w_up) == "row-major"
    box_rows = TILE_M.value // CONSUMERS.value

    def arguments(x, w_gate, w_up, y, gate_up):
        x_desc = _hopper_descriptor(x, M, K, stride_xm, TILE_M.value)
        w_descs = _hopper_weight(w_gate, row_major), _hopper_weight(w_up, row_major)
        y_desc = _hopper_descriptor(y, M, N, N, box_rows)
        gate_desc = up_desc = None
        if gate_up is not None:
            gate_desc, up_desc = (_hopper_descriptor(t, M, N, 2 * N, box_rows) for t in gate_up.chunk(2, dim=-1))
        return x_desc, *w_descs, y_desc, gate_desc, up_desc, M, N, K, row_major

    grid = (device_of(rows.device.index).num_sms, 1, 1)
    compiled = swiglu_kernel_hopper[grid](*arguments(rows, w_gate, w_up, y, gate_up), **HOPPER_OPTIONS)
    return Launcher(compiled[grid], arguments, final=True)


# (dtype, layout, device) -> compiled swiglu_dx_kernel_hopper: 72 -> 30 us of host time
_hopper_dx = {}


@_despite_cache_faults
def _launch_hopper_dx(dgate, dup, w_gate, w_up, dx):
    """Fill dx, which is contiguous, by swiglu_dx_kernel_hopper. dgate and dup are the halves of one (M, 2N) buffer."""
    (K, N), M = w_gate.shape, dgate.shape[0]
    row_major = hopper_weights(w_gate, w_up) == "row-major"
    d_descs = [_hopper_descriptor(half, M, N, 2 * N, TILE_M.value) for half in (dgate, dup)]
    w_descs = [_hopper_weight(w, row_major) for w in (w_gate, w_up)]
    dx_desc = _hopper_descriptor(dx, M, K, K, TILE_M.value // CONSUMERS.value)
    arguments = *d_descs, *w_descs, dx_desc, M, N, K, not row_major
    key = dx.dtype, row_major, dx.device
    if key in _hopper_dx:
        _hopper_dx[key](*arguments)
    else:
        grid = (device_of(dx.device.index).num_sms, 1, 1)
        _hopper_dx[key] = swiglu_dx_kernel_hopper[grid](*arguments, **HOPPER_OPTIONS)[grid]


def _launch_triton(rows, w_gate, w_up, y, gate_up, choice, configs=None):
    """Fill y and gate_up by swiglu_kernel, and return the Launcher that does it again, or None in the interpreter.

    `configs`: those to take the first from that works, None: as `choice` says.
    """
    (blocks, inner, K), N = rows.shape, w_gate.shape[1]
    M = blocks * inner
    device = device_of(rows.device.index)
    kind = "16-bit" if rows.element_size() == 2 else "ieee"
    if kind == "ieee" and device.backend == "cuda" and not INTERPRETED:
        kind = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    tma = tma_operands(rows, w_gate, w_up, device)
    contiguous = ("K" if stride == 1 else "-" for stride in (rows.stride(2), w_gate.stride(0), w_up.stride(0)))
    values = dict(
        M=M,
        N=N,
        K=K,
        M_INNER=inner,
        stride_xo=rows.stride(0),
        stride_xi=rows.stride(1),
        stride_xk=rows.stride(2),
        stride_gk=w_gate.stride(0),
        stride_gn=w_gate.stride(1),
        stride_uk=w_up.stride(0),
        stride_un=w_up.stride(1),
        M_BUCKET=m_bucket(M),
        LAYOUT="".join(contiguous) + "/" + tma,
        DEVICE=device.name,
        INPUT_PRECISION="tf32" if kind == "tf32" else "ieee",
        UP_FIRST=tma == "xw" and w_up.data_ptr() < w_gate.data_ptr(),
    )
    # ptxas would rather spill a few registers than lose a resident program.
    options = {"maxnreg": 255} if device.backend == "cuda" else {}

    def grid(meta):
        tiles = _cdiv(M, meta["BLOCK_M"]) * _cdiv(N, meta["BLOCK_N"])
        return (min(tiles, device.num_sms) if meta["PERSISTENT"] else tiles, 1, 1)

    def launch(config):
        return swiglu_kernel[grid](rows, w_gate, w_up, y, gate_up, **values, **options, **config.all_kwargs())

    tuner = TUNERS[kind]
    tuned = choice == TUNED and not INTERPRETED and not torch.cuda.is_current_stream_capturing()
    if tuned:
        try:
            compiled = tuner[grid](rows, w_gate, w_up, y, gate_up, **values, **options)
            config = tuner.best_config
        except torch.OutOfMemoryError as error:  # tuning takes 256 MB more than the call itself
            warnings.warn(f"fused_swiglu is not tuned for M = {M}, K = {K}, N = {N} yet: {_brief(error)}", stacklevel=2)
            tuned = False
        finally:
            tuner.nargs = None  # after an interruption it would keep the tensors
    if not tuned:
        rows_to_serve = MANY_ROWS if choice == ONE_FOR_ALL_M else M
        configs = configs or usable_configs(kind, rows_to_serve, N, tma, device)
        config, compiled = next(_working(configs, launch))
    if INTERPRETED:
        return None
    values |= config.kwargs
    # Sizes, strides and what follows. What the compiled kernel has as a constant, it ignores.
    others = tuple(values.get(name) for name in swiglu_kernel.arg_names[7:])

    def arguments(x, w_gate, w_up, y, gate_up):
        x_desc = w_desc = None
        if values["TMA"]:
            args = values | {"x_ptr": x, "w_gate_ptr": w_gate, "w_up_ptr": w_up}
            x_desc, w_desc = _x_descriptor(args), _w_descriptor(args)
        return x, w_gate, w_up, y, gate_up, x_desc, w_desc, *others

    return Launcher(compiled[grid(values)], arguments, final=tuned)


@_despite_cache_faults
def _differentiate_activation(dy, x, w_gate, w_up, gate_up):
    """d (..., 2N): dgate beside dup. x may be None unless gate_up is, which is computed again then."""
    if INTERPRETED and dy.dtype == torch.bfloat16:  # which the interpreter cuts off instead of rounding it
        tensors = (t if t is None else t.float() for t in (dy, x, w_gate, w_up, gate_up))
        return _differentiate_activation(*tensors).to(dy.dtype)
    (K, N), M = w_gate.shape, math.prod(dy.shape[:-1])
    d = dy.new_empty(*dy.shape[:-1], 2 * N)
    with _on_device_of(dy):
        if gate_up is None:
            gate_up, rows = d, x.reshape(M, K)
            for w, half in zip((w_gate, w_up), d.view(M, 2 * N).tensor_split(2, dim=1), strict=True):
                _multiply(rows, w, half)
        if d.numel():
            dy, BLOCK_N = dy.reshape(M, N), 1024
            swiglu_backward_kernel[(M * _cdiv(N, BLOCK_N),)](dy, gate_up, d, N, *dy.stride(), BLOCK_N)
    return d


def _empty_gradients(d, x, w_gate, w_up, needs):
    """New dx, dw_gate and dw_up, those that are needed, in the layouts of their tensors. x None: dx is contiguous."""
    gradients = []
    if needs[0]:
        gradients.append(d.new_empty(*d.shape[:-1], w_gate.shape[0]) if x is None else torch.empty_like(x))
    return gradients + [torch.empty_like(w) for w, need in zip((w_gate, w_up), needs[1:], strict=True) if need]


def _gradients(d, x, w_gate, w_up, needs):
    """dx, dw_gate and dw_up, those that are needed. x may be None if only dx is."""
    (K, N), M = w_gate.shape, math.prod(d.shape[:-1])
    gradients = _empty_gradients(d, x, w_gate, w_up, needs)
    halves = d.view(M, 2 * N).tensor_split(2, dim=1)
    with _on_device_of(d):
        if needs[0]:
            _multiply_both(*halves, w_gate, w_up, gradients[0])
        if needs[1] or needs[2]:
            columns = x.reshape(M, K).t()
            needed = (half for half, need in zip(halves, needs[1:], strict=True) if need)
            for half, dw in zip(needed, gradients[needs[0] :], strict=True):
                _multiply(columns, half, dw)
    return gradients


CUBLAS_STEP = 64  # along the sum


def _parts(a, b):
    """Products of which a @ b is the sum, each one that cuBLAS gets right: one, or two along the sum.

    Where a result is small, some of its 16-bit kernels leave out what follows the last whole step of the sum (13.1 on
    an H200: one or two in a thousand random shapes, of up to 300,000 elements; eager PyTorch meets it too). For dw_gate
    at M = 2561, K = 2824, N = 8 two parts take 62 us, one that lacks the last row 14.
    """
    whole = a.shape[1] // CUBLAS_STEP * CUBLAS_STEP
    small = a.element_size() == 2 and a.shape[0] * b.shape[1] < 2**20
    if device_of(a.device.index).backend != "cuda" or not small or whole in (0, a.shape[1]):
        return [(a, b)]
    return [(a[:, :whole], b[:whole]), (a[:, whole:], b[whole:])]


def _sum_of_products(pairs):
    """The sum of a @ b over pairs of 16-bit matrices, in float32."""
    acc = torch.mm(*pairs[0], out_dtype=torch.float32)
    for a, b in pairs[1:]:
        acc = torch.addmm(acc, a, b, out_dtype=torch.float32)
    return acc


def _multiply(a, b, out):
    """out = a @ b."""
    parts = _parts(a, b)
    # With `out` or `out_dtype`, as everywhere in the backward pass, since autocast leaves such calls alone.
    if len(parts) == 1:
        torch.mm(a, b, out=out)
    else:
        out.copy_(_sum_of_products(parts))


def _multiply_both(dgate, dup, w_gate, w_up, dx):
    """dx = dgate @ w_gate.T + dup @ w_up.T, summed in float32 and rounded once."""
    if dx.is_contiguous() and hopper_applies(dup.unsqueeze(1), w_gate.t(), w_up.t(), device_of(dx.device.index)):
        with _gluon_may_fail():
            return _launch_hopper_dx(dgate, dup, w_gate, w_up, dx)
    if dx.is_cuda and dx.dtype != torch.float32:
        acc = _sum_of_products(_parts(dgate, w_gate.t()) + _parts(dup, w_up.t()))
    else:
        acc = torch.empty(dgate.shape[0], w_gate.shape[0], device=dx.device)
        torch.mm(dgate.float(), w_gate.float().t(), out=acc).addmm_(dup.float(), w_up.float().t())
    dx.copy_(acc.view(dx.shape))


# ----------------------------------------------------------------------------------------------------------------
# Operators: what autograd, torch.compile, torch.export and torch.vmap see
# ----------------------------------------------------------------------------------------------------------------

NAMESPACE = __name__.replace(".", "_")  # so that several copies of this file do not meet


def _forward_with_both(x, w_gate, w_up, keep, choice):
    """As _forward, with an empty tensor for a gate_up that is not kept: operators return tensors only."""
    y, gate_up = _forward(x, w_gate, w_up, keep, choice)
    return y, x.new_empty(0) if gate_up is None else gate_up


@torch.library.custom_op(f"{NAMESPACE}::swiglu", mutates_args=())
def swiglu_op(
    x: torch.Tensor, w_gate: torch.Tensor, w_up: torch.Tensor, keep: bool, choice: str
) -> tuple[torch.Tensor, torch.Tensor]:
    return _forward_with_both(x, w_gate, w_up, keep, choice)


@swiglu_op.register_fake
def _(x, w_gate, w_up, keep, choice):
    N = w_gate.shape[1]
    return x.new_empty(*x.shape[:-1], N), x.new_empty(*x.shape[:-1], 2 * N) if keep else x.new_empty(0)


@torch.library.custom_op(f"{NAMESPACE}::swiglu_activation_backward", mutates_args=())
def activation_backward_op(
    dy: torch.Tensor,
    x: torch.Tensor | None,
    w_gate: torch.Tensor,
    w_up: torch.Tensor,
    gate_up: torch.Tensor | None,
) -> torch.Tensor:
    return _differentiate_activation(dy, x, w_gate, w_up, gate_up)


@activation_backward_op.register_fake
def _(dy, x, w_gate, w_up, gate_up):
    return dy.new_empty(*dy.shape[:-1], 2 * w_gate.shape[1])


@torch.library.custom_op(f"{NAMESPACE}::swiglu_gradients", mutates_args=())
def gradients_op(
    d: torch.Tensor, x: torch.Tensor | None, w_gate: torch.Tensor, w_up: torch.Tensor, needs: list[bool]
) -> list[torch.Tensor]:
    return _gradients(d, x, w_gate, w_up, needs)


gradients_op.register_fake(_empty_gradients)


def _save_for_backward(ctx, inputs, output):
    x, w_gate, w_up, keep, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # or autograd would make zeros for gate_up's gradient
    needs_x = not keep or any(ctx.needs_input_grad[1:3]) or not x.is_contiguous()
    ctx.save_for_backward(x if needs_x else None, w_gate, w_up, output[1] if keep else None)


def _differentiate(ctx, dy, _, *, activation_backward=activation_backward_op, gradients=gradients_op):
    needs = list(ctx.needs_input_grad[:3])
    x, w_gate, w_up, gate_up = ctx.saved_tensors
    ctx.maybe_clear_saved_tensors()  # not under retain_graph: without it gate_up is freed here, before the products
    d = activation_backward(dy, x, w_gate, w_up, gate_up)
    del gate_up
    results = iter(gradients(d, x, w_gate, w_up, needs))
    return *(next(results) if need else None for need in needs), None, None


def _differentiate_twice(ctx, *_):
    raise NotImplementedError("fused_swiglu can be differentiated once: its backward pass has no gradient")


def _batch(*_):
    raise NotImplementedError("fused_swiglu under torch.vmap: x takes any number of leading dimensions without it")


swiglu_op.register_autograd(_differentiate, setup_context=_save_for_backward)
gradients_op.register_autograd(_differentiate_twice)
swiglu_op.register_vmap(_batch)


class EagerSwiGLU(torch.autograd.Function):
    """The operator for eager autograd, without the dispatcher's layers: 930 -> 520 us of host time, both passes."""

    @staticmethod
    def forward(ctx, x, w_gate, w_up, keep, choice):
        # A setup_context would make PyTorch bind the arguments by name: 23 -> 46 us, on a CPU with the launch left out.
        output = _forward_with_both(x, w_gate, w_up, keep, choice)
        _save_for_backward(ctx, (x, w_gate, w_up, keep, choice), output)
        return output

    @staticmethod
    def backward(ctx, *grads):
        if torch.is_grad_enabled():  # the operators know that there is no second derivative
            return _differentiate(ctx, *grads)
        return _differentiate(ctx, *grads, activation_backward=_differentiate_activation, gradients=_gradients)


# ----------------------------------------------------------------------------------------------------------------
# Public functions and the module
# ----------------------------------------------------------------------------------------------------------------


def _autocast_dtype(x):
    """What autocast casts a matmul's operands to on x's device, or None."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if kind in ("cuda", "cpu") and torch.is_autocast_enabled(kind) else None


PLAIN = {torch.Tensor, torch.nn.Parameter}


def _needs_dispatcher(x, w_gate, w_up):
    """Whether something other than eager autograd is to see the call: a compiler, a transform, a mode, a subclass."""
    return (
        torch.compiler.is_compiling()
        or not {type(x), type(w_gate), type(w_up)} <= PLAIN
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
    )


def fused_swiglu(x, w_gate, w_up, *, recompute=False, autotune=True, batch_invariant=False):
    """``silu(x @ w_gate) * (x @ w_up)`` in one kernel (Shazeer 2020, https://arxiv.org/abs/2002.05202).

    Args:
        x: (..., K), bfloat16, float16 or float32, any number of leading dimensions.
        w_gate: (K, N), of x's dtype and on x's device. `gate_proj.weight.t()` for an nn.Linear.
        w_up: (K, N), likewise.
        recompute: what is kept for a backward pass. False: `x @ w_gate` and `x @ w_up`, 2 * N numbers for each row.
            True: nothing beyond the arguments; the backward pass computes these two products again.
        autotune: whether the first call with a new N, K, dtype, layout or power of two of rows may time the usable
            configurations of swiglu_kernel. That takes some seconds, once: Triton keeps the result on disk. With False,
            and always under CUDA-graph capture, a call whose shape was not tuned before takes the default one.
        batch_invariant: whether each row of the result has the same bits however many other rows there are. One
            configuration serves every M then, chosen for many rows and not tuned: few rows take longer. It holds for
            one device, dtype, K, N and layout, x contiguous and aligned to 16 bytes. Gradients are not included.

    Returns:
        (..., N), contiguous, x's dtype. Sums are in float32, SiLU too. float32 products follow
        `torch.get_float32_matmul_precision()`.

    Differentiable once in all three, and only what requires a gradient is computed. Gradients have the layout of their
    tensors; x's is summed in float32 over both products and rounded once. Under torch.autocast the arguments are cast
    as those of F.linear.

    All strides are taken as they are, no operand of the forward pass is ever copied. The call runs on the device of
    its arguments, on that device's current stream.

    Raises:
        TypeError: an argument is no tensor, or of another dtype than these.
        ValueError: shapes or devices do not fit each other.
        NotImplementedError: under torch.vmap, or in a second backward pass through the first one.
        RuntimeError: no configuration works on this GPU; it gives the reason of each. Where one fails and another
            serves, and where Triton's cache folder cannot be used, a warning says so.
    """
    for name, t in (("x", x), ("w_gate", w_gate), ("w_up", w_up)):
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"{name} is a {type(t).__name__}: expected a torch.Tensor")
    dtype = _autocast_dtype(x)
    if dtype is not None:
        cast = (t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in (x, w_gate, w_up))
        with torch.autocast(x.device.type, enabled=False):
            return fused_swiglu(*cast, recompute=recompute, autotune=autotune, batch_invariant=batch_invariant)

    needs_grad = torch.is_grad_enabled() and (x.requires_grad or w_gate.requires_grad or w_up.requires_grad)
    # An exported program mostly serves inference, with weights that require grad: it would keep gate and up each time.
    keep = needs_grad and not recompute and not torch.compiler.is_exporting()
    choice = ONE_FOR_ALL_M if batch_invariant else TUNED if autotune else DEFAULT
    if _needs_dispatcher(x, w_gate, w_up):
        _check(x, w_gate, w_up)
        return swiglu_op(x, w_gate, w_up, keep, choice)[0]
    if needs_grad or torch.autograd.forward_ad._current_level >= 0:  # autograd refuses forward mode clearly
        return EagerSwiGLU.apply(x, w_gate, w_up, keep, choice)[0]
    return _forward(x, w_gate, w_up, False, choice)[0]


class SwiGLUMLP(torch.nn.Module):
    """``down_proj(silu(gate_proj(x)) * up_proj(x))``, the feed-forward layer of Llama, Mistral and Qwen.

    x is (..., hidden_size), and so is the result. Parameters have the names and shapes of Hugging Face's MLPs, so that
    load_state_dict takes theirs: gate_proj.weight and up_proj.weight (intermediate_size, hidden_size), down_proj.weight
    (hidden_size, intermediate_size). `recompute` as in fused_swiglu.
    """

    def __init__(self, hidden_size, intermediate_size, *, recompute=False, device=None, dtype=None):
        super().__init__()
        options = {"bias": False, "device": device, "dtype": dtype}
        self.gate_proj = torch.nn.Linear(hidden_size, intermediate_size, **options)
        self.up_proj = torch.nn.Linear(hidden_size, intermediate_size, **options)
        self.down_proj = torch.nn.Linear(intermediate_size, hidden_size, **options)
        self.recompute = recompute

    def forward(self, x):
        w_gate, w_up = self.gate_proj.weight.t(), self.up_proj.weight.t()
        return self.down_proj(fused_swiglu(x, w_gate, w_up, recompute=self.recompute))


PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def replace_mlps(model, *, recompute=False):
    """Swap every MLP inside a Hugging Face Llama, Mistral or Qwen model for a SwiGLUMLP, in place; returns the model.

    An MLP is a module with gate_proj, up_proj and down_proj. They are taken over as they are: parameters, optimizers
    and checkpoints do not notice.

    Raises:
        ValueError: there is no MLP, or one has a bias, another kind of layer than nn.Linear, or another activation
            than SiLU. Then nothing was changed.
    """
    found = []
    for path, parent in model.named_modules():
        for name, mlp in parent.named_children():
            if all(hasattr(mlp, projection) for projection in PROJECTIONS) and not isinstance(mlp, SwiGLUMLP):
                _check_mlp(f"{path}.{name}".lstrip("."), mlp)
                found.append((parent, name, mlp))
    if not found:
        raise ValueError(f"{type(model).__name__} holds no module with {', '.join(PROJECTIONS)}: nothing to replace")
    for parent, name, mlp in found:
        replacement = SwiGLUMLP(
            mlp.gate_proj.in_features, mlp.gate_proj.out_features, recompute=recompute, device="meta"
        )
        for projection in PROJECTIONS:
            setattr(replacement, projection, getattr(mlp, projection))
        setattr(parent, name, replacement.train(mlp.training))
    return model


def _check_mlp(path, mlp):
    """Raise if SwiGLUMLP would compute something else than this module does."""
    for projection in PROJECTIONS:
        layer = getattr(mlp, projection)
        if type(layer) is not torch.nn.Linear or layer.bias is not None:
            raise ValueError(f"{path}.{projection} is {layer}: expected an nn.Linear without bias")
    probe = torch.linspace(-8, 8, 65, device="cpu")
    act_fn = getattr(mlp, "act_fn", None)
    if act_fn is None or not torch.allclose(act_fn(probe), torch.nn.functional.silu(probe)):
        raise ValueError(f"{path}.act_fn is {act_fn}: expected SiLU")
