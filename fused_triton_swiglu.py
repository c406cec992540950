"""SwiGLU in one Triton kernel: ``y = silu(x @ w_gate) * (x @ w_up)``.

    x (..., K)    w_gate (K, N)    w_up (K, N)    ->    y (..., N)        silu(a) = a * sigmoid(a)

The feed-forward activation of Llama, Mistral, Qwen and Mixtral (Shazeer, "GLU Variants Improve Transformer",
https://arxiv.org/abs/2002.05202, without biases). Fused are both products, SiLU and the multiplication: each
tile of x is loaded once for both products, both accumulators stay on chip, only y is written. Not fused is the
down projection that follows in a model. There is no backward pass yet.

There are two kernels. swiglu_kernel, in Triton, runs everywhere and is tuned. swiglu_kernel_hopper, in Gluon, Triton's
lower level, is faster on Hopper GPUs for more than 128 rows of 16-bit numbers, and has nothing to tune.

    from fused_triton_swiglu import fused_swiglu

    y = fused_swiglu(x, gate_proj.weight.t(), up_proj.weight.t())  # nn.Linear keeps (N, K); t() copies nothing

This file needs torch and triton and nothing else: copy it into your project.
"""

import contextlib
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
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
except ImportError:  # Gluon is experimental and may move: then the Triton kernel serves everywhere
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
        # nn.Linear weights. Not with swap=True: a race, 256 x 64 tiles in 3 stages gave errors of 1.6e-2 to 3.4e-2.
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


def m_bucket(M):
    """Row counts that share one tuning result: 1..16, 17..32, 33..64, ..., 4097 and more."""
    return min(max(triton.next_power_of_2(M), 16), 8192)


def usable_configs(kind, M, N, tma, device):
    """The entries of CONFIGS[kind] worth trying for an (M, N) result, the default first.

    `tma` names the operands that tensor descriptors can describe, see tma_operands.
    """
    bucket = m_bucket(M)
    # wgmma and tcgen05 read their operands from shared memory. mma.sync and FMAs keep them in registers, which leaves
    # room for half the accumulator, and have no side of 64 rows that would make it worth to swap the operands.
    operands_in_shared_memory = device.backend != "hip" and device.arch // 10 in (9, 10)
    max_acc = 128 * 256 if operands_in_shared_memory else 128 * 128
    large_tiles_idle_sms = triton.cdiv(M, 128) * triton.cdiv(N, 128) < device.num_sms
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
        y = silu_mul(gate, up)
        y_ptrs = y_ptr + offs_m.to(tl.int64)[:, None] * N + offs_n[None, :]
        tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=(offs_m < M)[:, None] & (offs_n < N)[None, :])


# ----------------------------------------------------------------------------------------------------------------
# Kernel for Hopper and results of many tiles: warp-specialised, in Gluon
# ----------------------------------------------------------------------------------------------------------------

# A tile is TILE_M x TILE_N results. Not tuned: the one other size that pays is half of TILE_N, see hopper_schedule.
TILE_M, TILE_N, TILE_GROUP = tl.constexpr(128), tl.constexpr(128), tl.constexpr(16)
STAGES = tl.constexpr(4)  # of 48 KB. With y they fill the shared memory
BOX = tl.constexpr(64)  # what a stage takes of K, and the columns of a TMA box: 128 bytes, the widest swizzle
CONSUMERS = tl.constexpr(2)  # of four warps; each computes the TILE_M // CONSUMERS rows that one wgmma has
# A third of the registers for each consumer and for the producer, which hands most of its third on.
HOPPER_OPTIONS = {"num_warps": 4, "maxnreg": 168}

if gluon:

    @gluon.jit
    def hopper_schedule(M, N):
        """The number of tiles, and how many of them, the first ones, are computed whole.

        Where the last wave would keep at most half of the programs busy, its tiles are computed in halves, each by a
        program: 195 -> 175 us at M = 512.
        """
        tiles = gl.cdiv(M, TILE_M) * gl.cdiv(N, TILE_N)
        last_wave = tiles % gl.num_programs(0)
        if 2 * last_wave > gl.num_programs(0):
            last_wave = 0
        return tiles, tiles - last_wave

    @gluon.jit
    def hopper_offsets(tile, M, N):
        """A tile's first row and column."""
        pid_m, pid_n = grouped_tile(tile, gl.cdiv(M, TILE_M), gl.cdiv(N, TILE_N), TILE_GROUP)
        return pid_m * TILE_M, pid_n * TILE_N

    @gluon.jit
    def hopper_load(
        step, off_m, off_n, K, x_desc, w_gate_desc, w_up_desc, buffers, WIDTH: gl.constexpr, ROW_MAJOR: gl.constexpr
    ):
        """Start the loads for WIDTH columns of a tile, one stage for each step along K. Returns the next step."""
        x_buffers, w_buffers, full, empty = buffers
        HALF: gl.constexpr = WIDTH // BOX  # the boxes of w_gate, then as many of w_up, make one operand
        for k in range(0, K, BOX):
            stage = step % STAGES
            # The phase before the first counts as done, so the first round of stages is free at once.
            mbarrier.wait(empty.index(stage), step // STAGES & 1 ^ 1)
            ready = full.index(stage)
            mbarrier.expect(ready, x_desc.block_type.nbytes + 2 * HALF * w_gate_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(x_desc, [off_m, k], ready, x_buffers.index(stage))
            for i in gl.static_range(HALF):
                box = stage * (w_buffers.shape[0] // STAGES) + i
                n = off_n + i * BOX
                where = (k, n) if ROW_MAJOR else (n, k)
                tma.async_copy_global_to_shared(w_gate_desc, where, ready, w_buffers.index(box))
                tma.async_copy_global_to_shared(w_up_desc, where, ready, w_buffers.index(box + HALF))
            step += 1
        return step

    @gluon.jit
    def hopper_producer(x_desc, w_gate_desc, w_up_desc, buffers, M, N, K, ROW_MAJOR: gl.constexpr):
        tiles, whole = hopper_schedule(M, N)
        step = 0
        for tile in range(gl.program_id(0), whole, gl.num_programs(0)):
            off_m, off_n = hopper_offsets(tile, M, N)
            step = hopper_load(step, off_m, off_n, K, x_desc, w_gate_desc, w_up_desc, buffers, TILE_N, ROW_MAJOR)
        for half in range(gl.program_id(0), 2 * (tiles - whole), gl.num_programs(0)):
            off_m, off_n = hopper_offsets(whole + half // 2, M, N)
            off_n += half % 2 * (TILE_N // 2)
            step = hopper_load(step, off_m, off_n, K, x_desc, w_gate_desc, w_up_desc, buffers, TILE_N // 2, ROW_MAJOR)

    @gluon.jit
    def hopper_compute(
        step,
        off_m,
        off_n,
        K,
        y_desc,
        y_buffers,
        buffers,
        CONSUMER: gl.constexpr,
        WIDTH: gl.constexpr,
        ROW_MAJOR: gl.constexpr,
    ):
        """One consumer's rows and WIDTH columns of y, from the loaded stages to the store. Returns the next step."""
        # ---- Where its operands are ----
        # The boxes of a stage lie one behind the other just as the swizzled layout of one wide operand has them, in
        # either layout of the weights: one wgmma of n = 2 * WIDTH, and no distance between the weights to describe.
        x_buffers, w_buffers, full, empty = buffers
        ROWS: gl.constexpr = TILE_M // CONSUMERS
        OPERANDS: gl.constexpr = w_buffers.shape[0] * BOX // (2 * WIDTH)
        SHAPE_W: gl.constexpr = [OPERANDS, BOX, 2 * WIDTH] if ROW_MAJOR else [OPERANDS, 2 * WIDTH, BOX]
        w_operands = w_buffers._reinterpret(w_buffers.dtype, SHAPE_W, w_buffers.layout)

        # ---- One K loop for both products ----
        acc = gl.zeros([ROWS, 2 * WIDTH], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 2 * WIDTH, 16]))
        for k in range(0, K, BOX):
            stage = step % STAGES
            mbarrier.wait(full.index(stage), step // STAGES & 1)
            x = x_buffers.index(stage).slice(CONSUMER * ROWS, ROWS)
            w = w_operands.index(stage * (OPERANDS // STAGES))
            if not ROW_MAJOR:
                w = w.permute([1, 0])
            acc = warpgroup_mma(x, w, acc, use_acc=k > 0, is_async=True)
            acc = warpgroup_mma_wait(1, [acc])  # the product before this one is done: its stage may be loaded again
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), pred=k > 0)
            step += 1
        acc = warpgroup_mma_wait(0, [acc])
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES))

        # ---- Epilogue: as in swiglu_kernel; y leaves through shared memory ----
        gate, up = acc.reshape([ROWS, 2, WIDTH]).permute([0, 2, 1]).split()
        y = silu_mul(gate, up).to(y_desc.dtype)
        FIRST_BOX: gl.constexpr = CONSUMER * (TILE_N // BOX)
        SHAPE_Y: gl.constexpr = [y_buffers.shape[0] * BOX // WIDTH, ROWS, WIDTH]
        y_wide = y_buffers._reinterpret(y_buffers.dtype, SHAPE_Y, y_buffers.layout)
        tma.store_wait(0)  # the tile before this one has left the buffer
        y_wide.index(FIRST_BOX * BOX // WIDTH).store(y)
        fence_async_shared()
        for i in gl.static_range(WIDTH // BOX):
            where = (off_m + CONSUMER * ROWS, off_n + i * BOX)
            tma.async_copy_shared_to_global(y_desc, where, y_buffers.index(FIRST_BOX + i))
        return step

    @gluon.jit
    def hopper_consumer(y_desc, y_buffers, buffers, M, N, K, CONSUMER: gl.constexpr, ROW_MAJOR: gl.constexpr):
        tiles, whole = hopper_schedule(M, N)
        step = 0
        for tile in range(gl.program_id(0), whole, gl.num_programs(0)):
            off_m, off_n = hopper_offsets(tile, M, N)
            step = hopper_compute(step, off_m, off_n, K, y_desc, y_buffers, buffers, CONSUMER, TILE_N, ROW_MAJOR)
        for half in range(gl.program_id(0), 2 * (tiles - whole), gl.num_programs(0)):
            off_m, off_n = hopper_offsets(whole + half // 2, M, N)
            off_n += half % 2 * (TILE_N // 2)
            step = hopper_compute(step, off_m, off_n, K, y_desc, y_buffers, buffers, CONSUMER, TILE_N // 2, ROW_MAJOR)
        tma.store_wait(0)

    @gluon.jit(do_not_specialize=["M", "N", "K"])
    def swiglu_kernel_hopper(x_desc, w_gate_desc, w_up_desc, y_desc, M, N, K, ROW_MAJOR: gl.constexpr):
        """One warp only starts TMA loads, two consumers multiply. Weights lie (N, K) in memory, with ROW_MAJOR (K, N).

        Which tile: hopper_schedule and hopper_offsets; operands: hopper_load; K loop and epilogue: hopper_compute.
        No barrier joins the consumers, so that one keeps the tensor cores busy while the other is in its epilogue: 705
        -> 676 us at M = 2048 against one consumer of eight warps. There swiglu_kernel takes 727 and cuBLAS 692 for the
        products alone (one run).
        """
        dtype: gl.constexpr = x_desc.dtype
        x_buffers = gl.allocate_shared_memory(dtype, [STAGES, TILE_M, BOX], x_desc.layout)
        w_buffers = gl.allocate_shared_memory(dtype, [STAGES * 2 * TILE_N // BOX, BOX, BOX], w_gate_desc.layout)
        y_buffers = gl.allocate_shared_memory(
            dtype, [CONSUMERS * TILE_N // BOX, TILE_M // CONSUMERS, BOX], y_desc.layout
        )
        full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        for stage in gl.static_range(STAGES):
            mbarrier.init(full.index(stage), count=1)
            mbarrier.init(empty.index(stage), count=CONSUMERS)
        buffers = (x_buffers, w_buffers, full, empty)
        gl.warp_specialize(
            [
                (hopper_consumer, (y_desc, y_buffers, buffers, M, N, K, 0, ROW_MAJOR)),
                (hopper_consumer, (y_desc, y_buffers, buffers, M, N, K, 1, ROW_MAJOR)),
                (hopper_producer, (x_desc, w_gate_desc, w_up_desc, buffers, M, N, K, ROW_MAJOR)),
            ],
            worker_num_warps=[4, 1],
            # A consumer's accumulator takes 128 registers of each thread, the epilogue nearly as many; loads take few.
            worker_num_regs=[240, 24],
        )


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
        if t.requires_grad and torch.is_grad_enabled():
            raise NotImplementedError(f"{name} requires grad, but there is no backward pass: use torch.no_grad()")
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
# Launch
# ----------------------------------------------------------------------------------------------------------------

INTERPRETED = triton.knobs.runtime.interpret  # as @triton.jit saw it when it made the kernel above


def _prune(configs, args, **kwargs):
    args = args | kwargs
    kind = next(kind for kind in CONFIGS if CONFIGS[kind] is configs)
    device = device_of(args["x_ptr"].device.index)
    return usable_configs(kind, args["M"], args["N"], args["LAYOUT"].partition("/")[2], device)


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


def hopper_applies(rows, w_gate, w_up, device):
    """Whether swiglu_kernel_hopper computes this call: it can, and it is faster.

    Up to 128 rows reading the weights takes the time, which smaller tiles do better: 98 us against 104 at M = 128. With
    fewer than a third as many tiles as SMs nothing was measured.
    """
    (blocks, inner, _), N = rows.shape, w_gate.shape[1]
    M = blocks * inner
    tiles = triton.cdiv(M, TILE_M.value) * triton.cdiv(N, TILE_N.value)
    if gluon is None or INTERPRETED or (device.backend, device.arch) != ("cuda", 90):
        return False
    if M <= 128 or 3 * tiles < device.num_sms or N % 8:  # y is stored by TMA
        return False
    return tma_operands(rows, w_gate, w_up, device) != "" and hopper_weights(w_gate, w_up) is not None


class Launcher(NamedTuple):
    """A compiled kernel, for any tensors with one _launch_key."""

    run: Callable
    arguments: Callable  # x, w_gate, w_up, y -> all that the kernel takes
    final: bool  # nothing is left to tune

    def __call__(self, x, w_gate, w_up, y):
        self.run(*self.arguments(x, w_gate, w_up, y))


# _launch_key -> Launcher. The second call with a key skips the checks, the autotuner, the heuristics and the binding of
# arguments: 20 us of host time (M = 1, K = N = 512), eager PyTorch's four operations 43 to 56 in the same run.
_launchers = {}


def _launch_key(x, w_gate, w_up):
    """All that the checks, the choice of a configuration and Triton's specialization depend on."""
    for name, t in (("x", x), ("w_gate", w_gate), ("w_up", w_up)):
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"{name} is a {type(t).__name__}: expected a torch.Tensor")
    distance = w_up.data_ptr() - w_gate.data_ptr()
    return (
        (x.shape, w_gate.shape, w_up.shape),
        (x.stride(), w_gate.stride(), w_up.stride()),
        (x.dtype, w_gate.dtype, w_up.dtype),
        (x.device, w_gate.device, w_up.device),
        (x.data_ptr() % 16, w_gate.data_ptr() % 16, w_up.data_ptr() % 16),
        (0 < distance < MAX_STEP, -MAX_STEP < distance < 0),
        torch.is_grad_enabled() and (x.requires_grad or w_gate.requires_grad or w_up.requires_grad),
        x.dtype == torch.float32 and torch.get_float32_matmul_precision(),
    )


def _first_launch(x, w_gate, w_up, y, autotune):
    """Fill y, all sizes above 0, and return the Launcher that does it again, or None where there is none."""
    rows = _in_rows(x)
    if rows is None:  # three row strides or more: each block of rows by itself
        for x_i, y_i in zip(x, y, strict=True):
            _first_launch(x_i, w_gate, w_up, y_i, autotune)
        return None
    if hopper_applies(rows, w_gate, w_up, device_of(x.device.index)):
        return _launch_hopper(rows, w_gate, w_up, y)
    return _launch_triton(rows, w_gate, w_up, y, autotune)


def _launch_hopper(rows, w_gate, w_up, y):
    """Fill y by swiglu_kernel_hopper, and return the Launcher that does it again."""
    (M, _, K), N, stride_xm = rows.shape, w_gate.shape[1], rows.stride(0)
    row_major = hopper_weights(w_gate, w_up) == "row-major"
    layout = gl.NVMMASharedLayout(swizzle_byte_width=2 * BOX.value, element_bitwidth=16)

    def descriptor(t, rows, columns, stride, box_rows):
        return GluonTensorDescriptor(t, [rows, columns], [stride, 1], [box_rows, BOX.value], layout)

    def arguments(x, w_gate, w_up, y):
        x_desc = descriptor(x, M, K, stride_xm, TILE_M.value)
        if row_major:
            w_descs = [descriptor(w, K, N, w.stride(0), BOX.value) for w in (w_gate, w_up)]
        else:
            w_descs = [descriptor(w, N, K, w.stride(1), BOX.value) for w in (w_gate, w_up)]
        y_desc = descriptor(y, M, N, N, TILE_M.value // CONSUMERS.value)
        return x_desc, *w_descs, y_desc, M, N, K, row_major

    grid = (device_of(rows.device.index).num_sms, 1, 1)
    compiled = swiglu_kernel_hopper[grid](*arguments(rows, w_gate, w_up, y), **HOPPER_OPTIONS)
    return Launcher(compiled[grid], arguments, final=True)


def _launch_triton(rows, w_gate, w_up, y, autotune, config=None):
    """Fill y by swiglu_kernel, and return the Launcher that does it again, or None in the interpreter.

    `config` None: the tuned one, or the default.
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
        tiles = triton.cdiv(M, meta["BLOCK_M"]) * triton.cdiv(N, meta["BLOCK_N"])
        return (min(tiles, device.num_sms) if meta["PERSISTENT"] else tiles, 1, 1)

    tuned = config is None and autotune and not INTERPRETED and not torch.cuda.is_current_stream_capturing()
    if tuned:
        compiled = TUNERS[kind][grid](rows, w_gate, w_up, y, **values, **options)
        config = TUNERS[kind].best_config
    else:
        config = config or usable_configs(kind, M, N, tma, device)[0]
        compiled = swiglu_kernel[grid](rows, w_gate, w_up, y, **values, **options, **config.all_kwargs())
    if INTERPRETED:
        return None
    values |= config.kwargs
    # Sizes, strides and what follows. What the compiled kernel has as a constant, it ignores.
    others = tuple(values.get(name) for name in swiglu_kernel.arg_names[6:])

    def arguments(x, w_gate, w_up, y):
        x_desc = w_desc = None
        if values["TMA"]:
            args = values | {"x_ptr": x, "w_gate_ptr": w_gate, "w_up_ptr": w_up}
            x_desc, w_desc = _x_descriptor(args), _w_descriptor(args)
        return x, w_gate, w_up, y, x_desc, w_desc, *others

    return Launcher(compiled[grid(values)], arguments, final=tuned)


# ----------------------------------------------------------------------------------------------------------------
# Public function
# ----------------------------------------------------------------------------------------------------------------


def fused_swiglu(x, w_gate, w_up, *, autotune=True):
    """``silu(x @ w_gate) * (x @ w_up)`` in one kernel (Shazeer 2020, https://arxiv.org/abs/2002.05202).

    Args:
        x: (..., K), bfloat16, float16 or float32, any number of leading dimensions.
        w_gate: (K, N), of x's dtype and on x's device. `gate_proj.weight.t()` for an nn.Linear.
        w_up: (K, N), likewise.
        autotune: whether the first call with a new N, K, dtype, layout or power of two of rows may time the usable
            configurations of swiglu_kernel. That takes some seconds, once: Triton keeps the result on disk. With False,
            and always under CUDA-graph capture, a call whose shape was not tuned before takes the default one.

    Returns:
        (..., N), contiguous, x's dtype. Sums are in float32, SiLU too. float32 products follow
        `torch.get_float32_matmul_precision()`.

    All strides are taken as they are, no operand is ever copied. The call runs on the device of its arguments, on
    that device's current stream.

    Raises:
        TypeError: an argument is no tensor, or of another dtype than these.
        ValueError: shapes or devices do not fit each other.
        NotImplementedError: an argument requires grad.
    """
    key = _launch_key(x, w_gate, w_up)
    launcher = _launchers.get(key)
    if launcher is None:
        _check(x, w_gate, w_up)
    y = torch.empty(*x.shape[:-1], w_gate.shape[1], dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    if x.shape[-1] == 0:
        return y.zero_()
    if INTERPRETED and x.dtype == torch.bfloat16:  # the interpreter's bf16 products are garbage (Triton 3.6, 3.8)
        return fused_swiglu(x.float(), w_gate.float(), w_up.float()).to(x.dtype)
    elsewhere = x.is_cuda and x.device.index != torch.cuda.current_device()
    with torch.cuda.device(x.device) if elsewhere else contextlib.nullcontext():
        if launcher and (launcher.final or not autotune or torch.cuda.is_current_stream_capturing()):
            launcher(x, w_gate, w_up, y)
        else:
            _launchers[key] = _first_launch(x, w_gate, w_up, y, autotune)
    return y
