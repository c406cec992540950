"""SwiGLU in one Triton kernel: ``y = silu(x @ w_gate) * (x @ w_up)``.

    x (..., K)    w_gate (K, N)    w_up (K, N)    ->    y (..., N)        silu(a) = a * sigmoid(a)

The feed-forward activation of Llama, Mistral, Qwen and Mixtral (Shazeer, "GLU Variants Improve Transformer",
https://arxiv.org/abs/2002.05202, without biases). Both products, SiLU and the multiplication are fused: each tile of x
is loaded once, both accumulators stay on chip, only y is written. Not fused is the down projection that follows.

    y = fused_swiglu(x, gate_proj.weight, up_proj.weight, linear=True)  # nn.Linear keeps its weights as (N, K)

swiglu_kernel, in Triton, runs everywhere and is tuned: read it first. swiglu_kernel_hopper, in Gluon, Triton's lower
level, is faster on Hopper for more than 128 rows in 8 and 16 bits. This file needs torch and triton only: copy it.
"""

import functools
import itertools
import math
import re
import threading
import warnings
from collections import namedtuple

import torch
import triton
import triton.language as tl
from torch.utils.flop_counter import register_flop_formula
from triton.tools.tensor_descriptor import TensorDescriptor

GROUP_M = tl.constexpr(16)  # against 8: 774 -> 739 us at M = 2048 with row-major weights, elsewhere no worse than noise
FP_FUSION = {"enable_fp_fusion": True}  # Triton 3.9 warns where it is not named, as 3.10 changes the default

# ---- Tile configurations, and which of them suit a call ----


def _config(m, n, k, num_warps, num_stages, *, tma="", persistent=False, flatten=False, swap=False):
    kwargs = dict(BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, TMA=tma, PERSISTENT=persistent, FLATTEN=flatten, SWAP_AB=swap)
    return triton.Config(kwargs, num_warps, num_stages)


# The first that usable_configs() keeps is the default. Comments say where each won on an H100 (K = 4096, N = 14336):
# those without serve other devices. Those of 16 bits for M > 128 serve Hopper only where its own kernel cannot.
CONFIGS = {
    "16-bit": [
        # nn.Linear weights. Never tma="xw" with swap=True: 256 x 64 tiles in 3 stages race, errors of 1.6e-2 to 3.6e-2.
        _config(128, 128, 64, 8, 3, tma="xw", persistent=True, flatten=True),  # M > 128
        _config(128, 64, 64, 4, 3, tma="xw"),  # M = 128: two programs share an SM
        _config(256, 64, 64, 8, 3, tma="x", swap=True),  # row-major, M > 128: TMA saves the addresses of x
        _config(128, 128, 64, 8, 3, persistent=True),  # row-major, M = 128
        _config(128, 64, 64, 8, 3),
        _config(128, 64, 32, 8, 3),
        _config(64, 64, 128, 4, 4, tma="xw"),  # small layers
        _config(64, 32, 128, 4, 3, tma="xw"),  # M = 64: 96.0 -> 94.7 us, as two programs share an SM
        _config(64, 64, 64, 4, 4),
        _config(64, 64, 64, 4, 4, tma="xw"),  # M = 64: 60.8 -> 58.9 us, in float8 33.6 -> 32.1 (in a graph, H200)
        _config(64, 128, 64, 8, 3, tma="x"),  # row-major, M = 64
        _config(64, 64, 32, 4, 3),
        _config(32, 64, 128, 4, 4, swap=True),  # M = 32
        _config(32, 128, 64, 4, 4, swap=True),  # row-major, M = 32
        _config(16, 64, 128, 4, 4, swap=True),
        _config(16, 32, 128, 4, 4, swap=True),  # M <= 16
        _config(16, 128, 64, 4, 3, swap=True),  # row-major, M <= 16
        _config(16, 64, 64, 4, 3),
    ],
    "32-bit, row-major": [
        _config(128, 64, 32, 8, 4, swap=True),  # M > 64. With row-major weights it spills 232 bytes, and wins
        _config(64, 64, 32, 8, 3, swap=True),  # tf32, M > 32, and row-major, M = 64
        _config(128, 32, 32, 8, 3),  # tf32, linear, M = 128
        _config(64, 64, 32, 8, 3),
        _config(64, 32, 32, 4, 2),
        _config(32, 64, 32, 4, 3),  # row-major, M = 32
        _config(16, 64, 32, 4, 4),  # row-major, M <= 16: 114.0 -> 109.0 us (H200) against three stages
        _config(16, 64, 32, 4, 3),
    ],
}
CONFIGS["32-bit, linear"] = [*CONFIGS["32-bit, row-major"]]
CONFIGS["32-bit, linear"][1:1] = [  # after the first; won at M = 64, M = 32, M <= 16
    _config(64, 128, 32, 8, 3, swap=True), _config(32, 64, 32, 4, 4, swap=True), _config(16, 64, 64, 4, 3, swap=True),
]  # fmt: skip
CONFIGS["8-bit"] = [  # the same tiles in bytes
    triton.Config(c.kwargs | {"BLOCK_K": 2 * c.kwargs["BLOCK_K"]}, c.num_warps, c.num_stages) for c in CONFIGS["16-bit"]
]
Device = namedtuple("Device", "arch num_sms shared_memory")  # 90 for sm_90, 0 on AMD; bytes that one program may use


@functools.cache
def device_limits(index):
    """The Device behind a torch device index. None is the CPU: the interpreter, which takes what an H100 takes."""
    if index is None:
        return Device(90, 1, 227 * 1024)
    major, minor = torch.cuda.get_device_capability(index)
    gpu = triton.runtime.driver.active.utils.get_device_properties(index)
    return Device(0 if torch.version.hip else 10 * major + minor, gpu["multiprocessor_count"], gpu["max_shared_mem"])


def usable_configs(kind, bucket, N, tma, device):
    """The entries of CONFIGS[kind] worth trying for up to `bucket` rows, the default first. `tma`: see tma_operands."""
    itemsize = int(kind.partition("-")[0]) // 8
    # wgmma and tcgen05 read their operands from shared memory. mma.sync and FMAs keep them in registers, which leaves
    # room for half the accumulator, and have no side of 64 rows that would make it worth to swap the operands.
    operands_in_shared_memory = device.arch // 10 in (9, 10)
    max_acc = (128 * 256 if operands_in_shared_memory else 128 * 128) // (2 if itemsize == 4 else 1)  # see dot_tf32x3
    min_rows = 64 if itemsize == 4 or triton.cdiv(bucket, 128) * triton.cdiv(N, 128) < device.num_sms else 128

    def usable(config):
        block_m, block_n, block_k = (config.kwargs[k] for k in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
        return (
            config.num_stages * (block_m + 2 * block_n) * block_k * itemsize <= device.shared_memory
            and block_m * 2 * block_n <= max_acc
            and (operands_in_shared_memory or not config.kwargs["SWAP_AB"])
            and min(bucket // 2, min_rows) <= block_m <= bucket
            # Below 64 rows pointers are as fast; from there on descriptors for both operands won at every M.
            and (config.kwargs["TMA"] == tma or (config.kwargs["TMA"] == "" and (block_m < 64 or tma != "xw")))
        )

    return [config for config in CONFIGS[kind] if usable(config)]


# ---- Kernel ----


@triton.jit
def grouped_tile(tile, num_pid_m, num_pid_n):
    """Go down GROUP_M row tiles before moving one column on: what runs at the same time shares x and w in L2."""
    tiles_in_group = GROUP_M * num_pid_n
    first_pid_m = tile // tiles_in_group * GROUP_M
    rows = min(num_pid_m - first_pid_m, GROUP_M)
    return first_pid_m + tile % tiles_in_group % rows, tile % tiles_in_group // rows


@triton.jit
def load_scales(scales, offs_m, offs_n, M, N):
    """The scales of x's rows and of both weights' columns, or () where there are none."""
    x_scale_ptr, gate_scale_ptr, up_scale_ptr, stride_sx, stride_sg, stride_su = scales
    loaded = ()
    if x_scale_ptr is not None:
        offs_m, offs_n = offs_m.to(tl.int64), offs_n.to(tl.int64)
        x_scale = tl.load(x_scale_ptr + offs_m * stride_sx, mask=offs_m < M)
        gate_scale = tl.load(gate_scale_ptr + offs_n * stride_sg, mask=offs_n < N)
        loaded = x_scale, gate_scale, tl.load(up_scale_ptr + offs_n * stride_su, mask=offs_n < N)
    return loaded


@triton.jit
def silu_mul(gate, up, scales):
    """silu(gate) * up in fp32, both first multiplied by what load_scales returns, if anything."""
    if len(scales) > 0:
        gate = gate * scales[0][:, None] * scales[1][None, :]
        up = up * scales[0][:, None] * scales[2][None, :]
    return gate / (1 + tl.exp(-gate)) * up


@triton.jit
def round_to_tf32(a):
    """The tensor cores cut fp32 off after 10 bits, which shrinks every product: 1.6e-3 error against 4.2e-4 rounded."""
    return tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r,r", [a], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def tf32_parts(a):
    """fp32 numbers as the sum of two: one of 10 bits, which the tensor cores take as it is, and the rest.

    Multiplied by 1.00045 and cut off, a number is rounded nearly as well as with half a unit added, and unchanged if it
    has 10 bits. mul.rz rounds to zero, so none gets infinite (114 us at M = 1 on an H200; comparing for that 128).
    """
    big = tl.inline_asm_elementwise(
        "mul.rz.f32 $0, $1, 0f3F800EBF; and.b32 $0, $0, -8192;", "=r,r", [a], dtype=tl.float32, is_pure=True, pack=1
    )
    return big, a - big


@triton.jit
def dot_tf32x3(a, b, acc):
    """acc + a @ b in full fp32, by three products of parts: 1574 us at M = 512, where eager PyTorch takes 2780."""
    a_big, a_rest = tf32_parts(a)
    b_big, b_rest = tf32_parts(b)
    product = tl.dot(a_rest, b_big, input_precision="tf32")
    product = tl.dot(a_big, b_rest, product, input_precision="tf32")
    product = tl.where(product == product, product, 0.0)  # an infinity's rest is NaN
    return acc + tl.dot(a_big, b_big, product, input_precision="tf32")


def _descriptors(x_ptr, w_gate_ptr, w_up_ptr, BLOCK_M, BLOCK_N, BLOCK_K, TMA, **_):
    """TMA's, of x (M, K) and of both weights as one (2, N, K): their distance in memory is a stride. None: not used."""
    x_desc = TensorDescriptor.from_tensor(x_ptr, [BLOCK_M, BLOCK_K]) if TMA else None
    if TMA != "xw":
        return x_desc, None
    first, second = sorted((w_gate_ptr, w_up_ptr), key=torch.Tensor.data_ptr)
    strides = [(second.data_ptr() - first.data_ptr()) // first.element_size(), first.stride(1), 1]
    return x_desc, TensorDescriptor(first, [2, *first.shape[::-1]], strides, [2, BLOCK_N, BLOCK_K])


# Descriptors need the tile sizes. A Config.pre_hook, the other place to make them, switches the cache on disk off.
@triton.heuristics({"x_desc": lambda args: _descriptors(**args)[0], "w_desc": lambda args: _descriptors(**args)[1]})
@triton.heuristics({"EVEN_K": lambda args: args["K"] % args["BLOCK_K"] == 0})
@triton.jit(do_not_specialize=["M_BUCKET"])
def swiglu_kernel(
    # gate_up (M, 2N), gate beside up, is kept for the backward pass, or None. It and y are contiguous
    x_ptr, w_gate_ptr, w_up_ptr, y_ptr, gate_up_ptr, x_scale_ptr, gate_scale_ptr, up_scale_ptr,  # scales, or None
    M, N, K, stride_xm, stride_xk, stride_gk, stride_gn, stride_uk, stride_un, stride_sx, stride_sg, stride_su,
    M_BUCKET, LAYOUT: tl.constexpr, DEVICE: tl.constexpr,  # not read: parts of TUNING_KEY
    INPUT_PRECISION: tl.constexpr, SAME_STRIDE_K: tl.constexpr, UP_FIRST: tl.constexpr,  # w_desc begins with w_up
    x_desc, w_desc, EVEN_K: tl.constexpr,  # from the heuristics
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,  # a configuration
    TMA: tl.constexpr,  # operands loaded through descriptors: "", "x" or "xw"; the others through pointers
    PERSISTENT: tl.constexpr,  # read by the grid: one program per SM instead of one per tile
    FLATTEN: tl.constexpr,  # one loop over tiles and K, so that loads run ahead across tiles
    SWAP_AB: tl.constexpr,  # compute y.T: the weights take the side of the tensor core that wants 64 rows
):  # fmt: skip
    num_pid_m, num_pid_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), num_pid_m * num_pid_n, tl.num_programs(0), flatten=FLATTEN):
        # ---- Which tile ----
        pid_m, pid_n = grouped_tile(tile, num_pid_m, num_pid_n)
        offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
        offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)

        # ---- Where its operands are ----
        # BLOCK_N columns of w_gate and the same columns of w_up, side by side in one operand: one wide dot in place
        # of two (1303 us against 1475 at M = 4096). 64-bit offsets: a tensor may have more than 2**31 elements.
        offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
        offs_w = tl.arange(0, 2 * BLOCK_N)
        is_up = (offs_w >= BLOCK_N)[None, :]
        columns = (pid_n * BLOCK_N + offs_w % BLOCK_N).to(tl.int64)[None, :]
        x_ptrs = x_ptr + offs_m.to(tl.int64)[:, None] * stride_xm + offs_k[None, :] * stride_xk
        w_gate_ptrs = w_gate_ptr + offs_k[:, None] * stride_gk + columns * stride_gn
        w_up_ptrs = w_up_ptr + offs_k[:, None] * stride_uk + columns * stride_un
        w_ptrs = tl.where(is_up, w_up_ptrs, w_gate_ptrs)
        stride_wk = stride_gk if SAME_STRIDE_K else tl.where(is_up, stride_uk, stride_gk)

        # ---- One K loop for both products ----
        acc = tl.zeros((2 * BLOCK_N, BLOCK_M) if SWAP_AB else (BLOCK_M, 2 * BLOCK_N), dtype=tl.float32)
        for k in range(0, K, BLOCK_K):
            mask_xk = True if EVEN_K else (offs_k < K - k)[None, :]
            mask_wk = True if EVEN_K else (offs_k < K - k)[:, None]
            if TMA == "":
                x = tl.load(x_ptrs, mask=(offs_m < M)[:, None] & mask_xk, other=0.0)
                x_ptrs += tl.cast(stride_xk, tl.int64) * BLOCK_K
            else:
                x = x_desc.load([pid_m * BLOCK_M, k])
            if TMA == "xw":
                w = w_desc.load([0, pid_n * BLOCK_N, k]).reshape(2 * BLOCK_N, BLOCK_K).T
            else:
                w = tl.load(w_ptrs, mask=(columns < N) & mask_wk, other=0.0)
                w_ptrs += tl.cast(stride_wk, tl.int64) * BLOCK_K
            a, b = (w.T, x.T) if SWAP_AB else (x, w)
            if INPUT_PRECISION == "tf32x3":
                acc = dot_tf32x3(a, b, acc)
            elif INPUT_PRECISION == "tf32":
                acc = tl.dot(round_to_tf32(a), round_to_tf32(b), acc, input_precision="tf32")
            else:
                acc = tl.dot(a, b, acc, input_precision="ieee")

        # ---- Epilogue: take the accumulator apart (column n and n + BLOCK_N are in one thread), SiLU in fp32 ----
        acc = acc.T if SWAP_AB else acc
        gate, up = tl.split(acc.reshape(BLOCK_M, 2, BLOCK_N).permute(0, 2, 1))
        if TMA == "xw" and UP_FIRST:
            gate, up = up, gate
        rows = offs_m.to(tl.int64)[:, None]
        mask_y = (offs_m < M)[:, None] & (offs_n < N)[None, :]
        if gate_up_ptr is not None:
            gate_ptrs = gate_up_ptr + rows * 2 * N + offs_n[None, :]
            tl.store(gate_ptrs, gate.to(y_ptr.dtype.element_ty), mask=mask_y)
            tl.store(gate_ptrs + N, up.to(y_ptr.dtype.element_ty), mask=mask_y)
        scales = (x_scale_ptr, gate_scale_ptr, up_scale_ptr, stride_sx, stride_sg, stride_su)
        y = silu_mul(gate, up, load_scales(scales, offs_m, offs_n, M, N))
        tl.store(y_ptr + rows * N + offs_n[None, :], y.to(y_ptr.dtype.element_ty), mask=mask_y)


def _time_on_gpu(call, quantiles):
    """Triton's launch takes the host longer than few rows take the GPU, so the GPU sleeps until calls are queued up."""
    calls = itertools.count(-6)  # do_bench begins with six, for an estimate. In one of 64 the GPU sleeps some 9 ms
    return triton.testing.do_bench(lambda: (next(calls) % 64 or torch.cuda._sleep(2**24), call()), quantiles=quantiles)


TUNING_KEY = ["M_BUCKET", "N", "K", "LAYOUT", "INPUT_PRECISION", "DEVICE"]
TUNER = triton.autotune(CONFIGS["16-bit"], TUNING_KEY, do_bench=_time_on_gpu, cache_results=True)(swiglu_kernel)


# ---- Kernel for Hopper and results of many tiles, in Gluon: swiglu_kernel_hopper, at its end, is where to begin ----

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia import hopper
    from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonTensorDescriptor

    tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # since Triton 3.9, and before
    tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
    reinterpret = getattr(gl.shared_memory_descriptor, "reinterpret", None) or gl.shared_memory_descriptor._reinterpret
    gl.NVMMASharedLayout(128, 16)  # Triton 3.5's wants a rank
except Exception:  # Gluon is experimental: where it is another one than this file knows, the Triton kernel serves
    gluon = None

TILE_M, TILE_N = tl.constexpr(128), tl.constexpr(128)  # for every M; some tiles are narrower: see _last_wave
STAGES = tl.constexpr(4)  # of 128 bytes along K, 48 KB each. With y they fill the shared memory
CONSUMERS, ROWS = tl.constexpr(2), tl.constexpr(64)  # of four warps; a tile's rows for each, as many as wgmma has
# 168 registers for each thread of 12 warps, the producer's one counting as four: it keeps 24, a consumer gets 240.
HOPPER_OPTIONS = {"num_warps": 4, "maxnreg": 168} | FP_FUSION

Shared = namedtuple(  # num_whole_n: see _last_wave. A TMA box has BOX columns of y or of a weight, and BOX_K of K
    "Shared",
    "x_desc w_gate_desc w_up_desc y_desc gate_up_desc x_buffers w_buffers y_buffers full empty scales "
    "M N K num_whole_n BOX BOX_K ROW_MAJOR",
)

if gluon:

    @gluon.jit
    def hopper_load(step, off_m, off_n, s, WIDTH: gl.constexpr):
        """Load what WIDTH columns of y need. `step` counts stages through all tiles, and is returned."""
        for k in range(0, s.K, s.BOX_K):
            stage = step % STAGES
            ready = s.full.index(stage)
            # The phase before the first counts as done, so the first round of stages is free at once.
            mbarrier.wait(s.empty.index(stage), step // STAGES & 1 ^ 1)
            mbarrier.expect(ready, s.x_desc.block_type.nbytes + 2 * WIDTH // s.BOX * s.w_gate_desc.block_type.nbytes)
            tma_load(s.x_desc, [off_m, k], ready, s.x_buffers.index(stage))
            for i in gl.static_range(WIDTH // s.BOX):
                where = (k, off_n + i * s.BOX) if s.ROW_MAJOR else (off_n + i * s.BOX, k)
                box = 2 * (stage * (TILE_N // s.BOX) + i)  # one of w_gate, then the same of w_up
                tma_load(s.w_gate_desc, where, ready, s.w_buffers.index(box))
                tma_load(s.w_up_desc, where, ready, s.w_buffers.index(box + 1))
            step += 1
        return step

    @gluon.jit
    def hopper_begin(off_m, off_n, s, WIDTH: gl.constexpr):
        """An accumulator for WIDTH columns of both weights, and the scales of its rows and of these columns."""
        ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 2 * WIDTH, s.BOX_K // 4])  # 32 bytes of K
        # Scales are loaded before the main loop and each column's by one thread: loaded by all threads that want it,
        # in the epilogue, they took 6 % of the time (H200).
        offs_m = off_m + gl.arange(0, ROWS, gl.SliceLayout(1, ACC))
        offs_n = off_n + gl.arange(0, WIDTH, gl.BlockedLayout([1], [32], [4], [0]))
        return gl.zeros([ROWS, 2 * WIDTH], gl.float32, ACC), load_scales(s.scales, offs_m, offs_n, s.M, s.N)

    @gluon.jit
    def hopper_dot(stage, acc, use_acc, s, CONSUMER: gl.constexpr, FIRST: gl.constexpr):
        """acc + x @ w in one wgmma: as many columns of both weights as acc holds, from the tile's column FIRST on."""
        # A stage's boxes lie just as the swizzled layout of one wide operand has them, in either layout of the weights.
        WIDTH: gl.constexpr = acc.shape[1] // 2
        COUNT: gl.constexpr = STAGES * TILE_N // WIDTH
        SHAPE: gl.constexpr = [COUNT, s.BOX_K, 2 * WIDTH] if s.ROW_MAJOR else [COUNT, 2 * WIDTH, s.BOX_K]
        w = reinterpret(s.w_buffers, s.w_buffers.dtype, SHAPE, s.w_buffers.layout)
        w = w.index((stage * TILE_N + FIRST) // WIDTH)
        x = s.x_buffers.index(stage).slice(CONSUMER * ROWS, ROWS)
        return hopper.warpgroup_mma(x, w if s.ROW_MAJOR else w.permute([1, 0]), acc, use_acc=use_acc, is_async=True)

    @gluon.jit
    def hopper_store(values, desc, off_m, off_n, s, CONSUMER: gl.constexpr, IS_UP: gl.constexpr):
        """Round and store one consumer's rows of y, (M, 1, N), or of gate or up in (M, 2, N), through shared memory."""
        WIDTH: gl.constexpr = values.shape[1]
        LAYOUT: gl.constexpr = gl.NVMMASharedLayout(2 * s.BOX, 16, rank=2)
        wide = reinterpret(s.y_buffers, desc.dtype, [CONSUMERS * TILE_N // WIDTH, ROWS, WIDTH], LAYOUT)
        tma.store_wait(0)  # what was stored before has left the buffer
        wide.index(CONSUMER * (TILE_N // WIDTH)).store(values.to(desc.dtype))
        hopper.fence_async_shared()
        for i in gl.static_range(WIDTH // s.BOX):
            tma_store(desc, (off_m, IS_UP, off_n + i * s.BOX), s.y_buffers.index(CONSUMER * (TILE_N // s.BOX) + i))

    @gluon.jit
    def hopper_epilogue(acc, scales, off_m, off_n, s, CONSUMER: gl.constexpr):
        """SiLU and the stores for one consumer's rows. acc holds a box of gate, the same of up, the next of gate..."""
        WIDTH: gl.constexpr = acc.shape[1] // 2
        gate, up = acc.reshape([ROWS, WIDTH // s.BOX, 2, s.BOX]).permute([0, 1, 3, 2]).reshape([ROWS, WIDTH, 2]).split()
        if s.gate_up_desc is not None:
            hopper_store(gate, s.gate_up_desc, off_m, off_n, s, CONSUMER, 0)
            hopper_store(up, s.gate_up_desc, off_m, off_n, s, CONSUMER, 1)
        if len(scales) > 0:
            COLUMN: gl.constexpr = gl.SliceLayout(0, gate.type.layout)
            x_scale = gl.convert_layout(scales[0], gl.SliceLayout(1, gate.type.layout))
            scales = x_scale, gl.convert_layout(scales[1], COLUMN), gl.convert_layout(scales[2], COLUMN)
        hopper_store(silu_mul(gate, up, scales), s.y_desc, off_m, off_n, s, CONSUMER, 0)

    @gluon.jit
    def hopper_compute(step, off_m, off_n, s, CONSUMER: gl.constexpr, WIDTH: gl.constexpr):
        """One consumer's rows of WIDTH columns of y, and of gate and up where they are kept."""
        REST: gl.constexpr = WIDTH % 64  # an accumulator's width is a power of two: 96 columns take two of them
        MAIN: gl.constexpr = WIDTH - REST
        acc, scales = hopper_begin(off_m, off_n, s, MAIN)
        rest, rest_scales = hopper_begin(off_m, off_n + MAIN, s, REST) if REST else ((), ())
        # ---- One K loop for both products ----
        for k in range(0, s.K, s.BOX_K):
            stage = step % STAGES
            mbarrier.wait(s.full.index(stage), step // STAGES & 1)
            acc = hopper_dot(stage, acc, k > 0, s, CONSUMER, 0)
            if REST:
                rest = hopper_dot(stage, rest, k > 0, s, CONSUMER, MAIN)
                acc, rest = hopper.warpgroup_mma_wait(2, [acc, rest])
            else:
                acc = hopper.warpgroup_mma_wait(1, [acc])
            # The step before is done: its stage may be loaded again.
            mbarrier.arrive(s.empty.index((step + STAGES - 1) % STAGES), pred=k > 0)
            step += 1
        acc = hopper.warpgroup_mma_wait(0, [acc])
        mbarrier.arrive(s.empty.index((step + STAGES - 1) % STAGES))
        hopper_epilogue(acc, scales, off_m, off_n, s, CONSUMER)
        if REST:
            hopper_epilogue(hopper.warpgroup_mma_wait(0, [rest]), rest_scales, off_m, off_n + MAIN, s, CONSUMER)
        return step

    @gluon.jit
    def hopper_role(s, ROLE: gl.constexpr):
        """What a group of warps does: a consumer, by its number, or after these the producer."""
        num_pid_m, num_pid_n, off_n = gl.cdiv(s.M, TILE_M), s.num_whole_n, 0
        programs, first, step = gl.num_programs(0), gl.program_id(0), 0
        for WIDTH in gl.static_range(TILE_N, TILE_N - 2 * s.BOX, -s.BOX):  # whole tiles, then narrower ones
            if WIDTH < TILE_N:  # begun by the program after that of the last whole tile
                first = (first + programs - num_pid_m * num_pid_n % programs) % programs
                off_n, num_pid_n = s.num_whole_n * TILE_N, gl.cdiv(s.N - s.num_whole_n * TILE_N, WIDTH)
            for tile in range(first, num_pid_m * num_pid_n, programs):
                pid_m, pid_n = grouped_tile(tile, num_pid_m, num_pid_n)
                if ROLE == CONSUMERS:
                    step = hopper_load(step, pid_m * TILE_M, off_n + pid_n * WIDTH, s, WIDTH)
                else:
                    step = hopper_compute(step, pid_m * TILE_M + ROLE * ROWS, off_n + pid_n * WIDTH, s, ROLE, WIDTH)
        tma.store_wait(0)  # the shared memory must outlive the stores that read it

    @gluon.jit
    def hopper_roles(s):  # a function, as s = Shared(...) would turn the constexprs in it into tensors
        gl.warp_specialize([(hopper_role, (s, 0)), (hopper_role, (s, 1)), (hopper_role, (s, 2))], [4, 1], [240, 24])

    @gluon.jit(do_not_specialize=["M", "N", "K", "num_whole_n"])
    def swiglu_kernel_hopper(
        x_desc, w_gate_desc, w_up_desc, y_desc, gate_up_desc, x_scale_ptr, gate_scale_ptr, up_scale_ptr,
        M, N, K, stride_sx, stride_sg, stride_su, num_whole_n, ROW_MAJOR: gl.constexpr
    ):  # fmt: skip
        """As swiglu_kernel. Weights lie (N, K) in memory, with ROW_MAJOR (K, N). gate_up_desc may be None.

        One warp loads, two consumers of four warps compute, joined by no barrier: one keeps the tensor cores busy while
        the other, up to STAGES behind, is in its epilogue (705 -> 676 us at M = 2048 against one of eight warps).
        """
        scales = (x_scale_ptr, gate_scale_ptr, up_scale_ptr, stride_sx, stride_sg, stride_su)
        BOX: gl.constexpr = y_desc.block_type.shape[2]
        BOX_K: gl.constexpr = x_desc.block_type.shape[1]
        SHAPE_W: gl.constexpr = [STAGES * 2 * TILE_N // BOX] + w_gate_desc.block_type.shape  # noqa: RUF005
        x_buffers = gl.allocate_shared_memory(x_desc.dtype, [STAGES, TILE_M, BOX_K], x_desc.layout)
        w_buffers = gl.allocate_shared_memory(x_desc.dtype, SHAPE_W, w_gate_desc.layout)
        y_buffers = gl.allocate_shared_memory(y_desc.dtype, [CONSUMERS * TILE_N // BOX, ROWS, 1, BOX], y_desc.layout)
        full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        for stage in gl.static_range(STAGES):
            mbarrier.init(full.index(stage), count=1)
            mbarrier.init(empty.index(stage), count=CONSUMERS)
        hopper.fence_async_shared()
        hopper_roles(Shared(
            x_desc, w_gate_desc, w_up_desc, y_desc, gate_up_desc, x_buffers, w_buffers, y_buffers, full, empty, scales,
            M, N, K, num_whole_n, BOX, BOX_K, ROW_MAJOR,
        ))  # fmt: skip


# ---- Checks, choice, launch ----

INTERPRETED = triton.knobs.runtime.interpret  # as @triton.jit saw it when it made the kernels above
MAX_STEP = 2**40  # bytes: TMA takes strides below it
RESULT_DTYPES, FLOAT8 = (torch.bfloat16, torch.float16, torch.float32), torch.float8_e4m3fn
ARGUMENTS = "x", "w_gate", "w_up", "x_scale", "gate_scale", "up_scale"
NOT_FLOAT8 = None, None, None, None  # in place of the scales and out_dtype
NO_GRADIENT = "fused_swiglu has no gradient in float8: call it under torch.no_grad()"
PLAIN_TENSORS = torch.Tensor, torch.nn.Parameter  # and no subclass of theirs


def _check(x, w_gate, w_up, linear, *of_float8):
    """Raise for what fused_swiglu does not take. It reads what _launch_key holds, so one call with a key is enough."""
    if x.dtype not in (*RESULT_DTYPES, FLOAT8):
        raise TypeError(f"x is {x.dtype}: expected one of {(*RESULT_DTYPES, FLOAT8)}")
    scales = () if of_float8[0] is None else of_float8[:3]
    for name, t in zip(ARGUMENTS, (x, w_gate, w_up, *scales), strict=False):
        if t.layout != torch.strided or t.is_nested:
            raise TypeError(f"{name} is {'nested' if t.is_nested else t.layout}: expected an ordinary, dense tensor")
        wanted = torch.float32 if name.endswith("scale") else x.dtype
        if (t.dtype, t.device) != (wanted, x.device):
            raise ValueError(f"{name} is {t.dtype} on {t.device}: expected {wanted} on {x.device}")
        if t.device.type not in ("cuda", "meta") and not (INTERPRETED and t.device.type == "cpu"):
            raise ValueError(f"{name} is on {t.device}: expected a GPU (or the CPU with TRITON_INTERPRET=1)")
    shape, k, expected = tuple(w_gate.shape), int(linear), "(N, K)" if linear else "(K, N)"
    if x.dim() < 1 or w_gate.dim() != 2 or shape[k] != x.shape[-1]:
        raise ValueError(f"w_gate is {shape} and x is {tuple(x.shape)}: expected {expected} and (..., K)")
    if w_up.shape != w_gate.shape:
        raise ValueError(f"w_up is {tuple(w_up.shape)}, but w_gate is {shape}: both must be {expected}")
    if x.dtype == FLOAT8 and shape[k] > 1 and not w_gate.stride(k) == w_up.stride(k) == 1:
        raise ValueError(f"w_gate, w_up have strides {w_gate.stride()}, {w_up.stride()}: expected 1 along K in float8")
    for name, t in zip(ARGUMENTS[3:], scales, strict=False):
        wanted = (*x.shape[:-1], 1) if name == "x_scale" else (1, shape[1 - k])
        if wanted not in (t.shape, (1, *t.shape)) and t.numel() != 1:
            raise ValueError(f"{name} is {tuple(t.shape)}: expected {wanted} or one number")


def _needs_dispatcher(*tensors):
    """Whether a call must take swiglu_op: a compiler, transform, mode or subclass is to see it, or data is odd."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack() > 0:
        return True
    for t in tensors:
        if type(t) not in PLAIN_TENSORS or t.is_meta or t.is_neg():
            return True
    return torch._C._are_functorch_transforms_active()


def _tma_takes(t):
    """Whether TMA can load from a matrix: the last dimension contiguous, all else in steps of 16 bytes."""
    step, unit = t.stride(0) * t.element_size(), 16 * (t.element_size() if INTERPRETED else 1)  # as Triton 3.5's wants
    return t.stride(1) == 1 and t.data_ptr() % 16 == 0 and 0 < step < MAX_STEP and step % unit == 0


def tma_operands(x, w_gate, w_up, device):
    """What swiglu_kernel's descriptors can describe: "xw", "x" or "". The interpreter moves GPU tensors apart."""
    if (INTERPRETED and x.is_cuda) or not 90 <= device.arch < 120 or x.element_size() > 2 or not _tma_takes(x):
        return ""
    distance = abs(w_up.data_ptr() - w_gate.data_ptr())
    alike = w_gate.stride() == w_up.stride() and _tma_takes(w_gate.t())
    return "xw" if alike and 0 < distance < MAX_STEP and distance % 16 == 0 else "x"


def hopper_layout(x, w_gate, w_up, device, any_m=False):
    """How swiglu_kernel_hopper loads the weights, "row-major" (K, N) or "linear" (N, K), or None: it does not."""
    M, N = x.shape[0], w_gate.shape[1]
    # Few rows are a matter of reading the weights, which smaller tiles do better: 98 us against 104 at M = 128.
    few = M <= 128 or 3 * triton.cdiv(M, TILE_M.value) * triton.cdiv(N, TILE_N.value) < device.num_sms
    possible = gluon is not None and not INTERPRETED and device.arch == 90 and x.element_size() <= 2
    if not possible or (few and not any_m) or not _tma_takes(x) or N % 8:  # TMA stores y, in rows of N
        return None
    if x.element_size() == 2 and _tma_takes(w_gate) and _tma_takes(w_up):  # not float8, where K = 1 lies both ways
        return "row-major"
    return "linear" if _tma_takes(w_gate.t()) and _tma_takes(w_up.t()) else None


TUNED, DEFAULT, ONE_FOR_ALL_M = "tuned", "default", "one for all M"  # how a configuration is chosen: see fused_swiglu
UNUSABLE = triton.errors.TritonError, RuntimeError, TypeError, AttributeError  # a kernel does not compile or load here
FATAL = torch.OutOfMemoryError, torch.AcceleratorError  # RuntimeErrors as well, but not the kernel's fault

# key -> what launches a compiled kernel again, or None: there is none in the interpreter, nor before tuning succeeds
_launchers = {}
MAX_LAUNCHERS = 4096  # of some 10 KB each; a server meets every M there is
_one_at_a_time = threading.RLock()  # Triton's autotuner keeps what it works at in itself


def _launch_key(x, w_gate, w_up, linear, keep, choice, *of_float8):
    """All that the checks, the choice of a configuration and Triton's specialization depend on."""
    gate_address, up_address = w_gate.data_ptr(), w_up.data_ptr()
    distance, scales = up_address - gate_address, () if of_float8[0] is None else of_float8[:3]
    return (  # one flat tuple: a loop over the three, with a tuple for each, takes half as long again
        x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16,
        w_gate.shape, w_gate.stride(), w_gate.dtype, w_gate.device, gate_address % 16,
        w_up.shape, w_up.stride(), w_up.dtype, w_up.device, up_address % 16,
        *[(t.shape, t.stride(), t.dtype, t.device, t.data_ptr() % 16) for t in scales],
        0 < distance < MAX_STEP, -MAX_STEP < distance < 0, linear, keep, choice, of_float8[3],
        x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision,  # by all of PyTorch's settings
    )  # fmt: skip


def _first_launch(launch, *arguments):
    """launch(*arguments), one thread at a time, as it may compile and tune."""
    with _one_at_a_time, triton.knobs.amd.scope():
        triton.knobs.amd.use_buffer_ops = False  # with them Triton 3.6 cannot select between w_gate_ptrs, w_up_ptrs
        if len(_launchers) >= MAX_LAUNCHERS:
            _launchers.clear()
        return launch(*arguments)


def _like(desc):
    """A class of such descriptors of other tensors, made in a tenth of the time: _launch_key holds what is checked."""
    changed = {"base": None, "__init__": lambda self, base: setattr(self, "base", base)}
    return type("Like", (type(desc),), vars(desc) | changed)


def _launcher(compiled, index):
    """A function that launches as compiled[grid](*arguments) does, on device `index`, in less host time."""
    current_stream, hooks = triton.runtime.driver.active.get_current_stream, triton.knobs.runtime
    run, *handles = (getattr(compiled, name, None) for name in ("run", "function", "packed_metadata"))

    def launch(grid, *arguments):
        hooked = getattr(hooks.launch_enter_hook, "calls", True) or getattr(hooks.launch_exit_hook, "calls", True)
        if torch.cuda.current_device() == index and not hooked:  # a profiler's hooks want what is left out here
            try:
                return run(*grid, current_stream(index), *handles, None, None, None, *arguments)
            except (TypeError, AttributeError):  # another Triton has no `run`, or one that wants other arguments
                pass
        with torch.cuda.device(index):
            compiled[grid](*arguments)

    return launch


def _forward(x, w_gate, w_up, linear, keep, choice, *of_float8):
    """y (..., N), and gate_up (M, 2N), gate beside up, or None if it is not to be kept."""
    try:
        key = _launch_key(x, w_gate, w_up, linear, keep, choice, *of_float8)
    except RuntimeError:  # a tensor without strides or an address, which _check names
        _check(x, w_gate, w_up, linear, *of_float8)
        raise
    *scales, out_dtype = of_float8
    again = _launchers.get(key)
    if again is None:
        _check(x, w_gate, w_up, linear, *of_float8)
    K, N = x.shape[-1], w_gate.shape[0 if linear else 1]
    y = x.new_empty((*x.shape[:-1], N), dtype=out_dtype)
    gate_up = x.new_empty((math.prod(x.shape[:-1]), 2 * N)) if keep else None
    if again is None and (K == 0 or y.numel() == 0):
        return y.zero_(), gate_up
    if INTERPRETED and x.dtype in (torch.bfloat16, FLOAT8):  # of which its products are garbage (Triton 3.5 to 3.9)
        in_float32 = _forward(x.float(), w_gate.float(), w_up.float(), linear, keep, choice, *scales, None)
        return tuple(t if t is None else t.to(y.dtype) for t in in_float32)
    # What launches again wants an address only. reshape copies where leading dimensions do not collapse.
    rows = x if x.dim() == 2 or (again is not None and x.is_contiguous()) else x.reshape(-1, K)
    if x.dim() != 2 and scales[0] is not None:
        scales[0] = scales[0].reshape(-1, 1)
    if again is not None:
        again(rows, w_gate, w_up, y, gate_up, *scales)
        return y, gate_up
    with torch.cuda.device_of(x):
        if choice == TUNED and x.is_cuda and torch.cuda.is_current_stream_capturing():
            return _forward(x, w_gate, w_up, linear, keep, DEFAULT, *of_float8)
        weights = (w_gate.t(), w_up.t()) if linear else (w_gate, w_up)
        _launchers[key] = _first_launch(_launch, choice, rows, *weights, y, gate_up, *scales)
    return y, gate_up


def _scale_strides(*scales):
    """From one row of x to the next, and from one column of each weight. One number serves all."""
    return [0 if t is None or t.numel() == 1 else t.stride(dim) for t, dim in zip(scales, (0, -1, -1), strict=True)]


def _launch(choice, x, w_gate, w_up, y, gate_up, *scales):
    """Fill y and gate_up, none of them empty. Returns what does it again, or None if there is nothing that does."""
    global gluon
    (M, K), N, device = x.shape, w_gate.shape[1], device_limits(x.device.index)
    hopper_weights = hopper_layout(x, w_gate, w_up, device, any_m=choice == ONE_FOR_ALL_M)
    if hopper_weights is not None and y.element_size() == 2:
        try:
            return _launch_hopper(hopper_weights == "row-major", x, w_gate, w_up, y, gate_up, *scales)
        except FATAL:
            raise
        except UNUSABLE as error:
            gluon = None
            warnings.warn(f"fused_swiglu goes on without its kernel for Hopper, slower: {_brief(error)}", stacklevel=2)
    tma = tma_operands(x, w_gate, w_up, device)
    strides = *x.stride(), *w_gate.stride(), *w_up.stride(), *_scale_strides(*scales)
    strides_k = x.stride(1), w_gate.stride(0), w_up.stride(0)
    kind, precision = f"{8 * x.element_size()}-bit", "ieee"
    if kind == "32-bit":
        kind = "32-bit, linear" if strides_k[1:] == (1, 1) else "32-bit, row-major"
        if device.arch and not INTERPRETED:
            precision = "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"
    layout = "".join("K" if stride == 1 else "-" for stride in strides_k) + "/" + tma  # such as "KKK/xw"
    bucket = min(max(triton.next_power_of_2(M), 16), 8192)  # 1..16, 17..32, ..., 4097 and more share a tuning result
    same_stride_k, up_first = strides_k[1] == strides_k[2], tma == "xw" and w_up.data_ptr() < w_gate.data_ptr()
    tensors = x, w_gate, w_up, y, gate_up, *scales
    scalars = M, N, K, *strides, bucket, layout, str(device), precision, same_stride_k, up_first
    options = FP_FUSION | ({"maxnreg": 255} if device.arch else {})  # or ptxas spills, to fit one more program

    def grid(meta):
        tiles = triton.cdiv(M, meta["BLOCK_M"]) * triton.cdiv(N, meta["BLOCK_N"])
        return (min(tiles, device.num_sms) if meta["PERSISTENT"] else tiles, 1, 1)

    usable = usable_configs(kind, 8192 if choice == ONE_FOR_ALL_M else bucket, N, tma, device)
    working = _working(usable, lambda c: swiglu_kernel[grid](*tensors, *scalars, **options, **c.all_kwargs()))
    if choice != TUNED or INTERPRETED:
        config, compiled = next(working)
    else:
        # In place of its own list: the tuner passes over some kinds of failure only, and keeps on disk that all fail.
        TUNER.early_config_prune = lambda *_, **__: [config for config, _ in working]
        try:
            compiled = TUNER[grid](*tensors, *scalars, **options)
            config = TUNER.best_config
        except torch.OutOfMemoryError as error:  # tuning takes 256 MB more than the call itself
            warnings.warn(f"fused_swiglu is not tuned for M = {M}, K = {K}, N = {N} yet: {_brief(error)}", stacklevel=2)
            _launch(DEFAULT, *tensors)
            return None  # to be tuned in a later call
        finally:
            TUNER.nargs = TUNER.early_config_prune = None  # or they would keep this call's tensors
    if INTERPRETED:
        return None
    launch, tiles, names = _launcher(compiled, x.device.index), grid(config.kwargs), swiglu_kernel.arg_names
    constants = (None,) * (len(names) - names.index("EVEN_K"))  # the last ones, which the compiled kernel ignores
    x_like, w_like = (desc and _like(desc) for desc in _descriptors(x, w_gate, w_up, **config.kwargs))

    def again(x, w_gate, w_up, *others):  # whose addresses alone count: linear=True's weights come as (N, K)
        # Of a tensor, Triton asks the driver where it is: in a Llama 1 % of an eager call with one token.
        addresses = [t if t is None else t.data_ptr() for t in (x, w_gate, w_up, *others)]
        x_desc, w_desc = x_like and x_like(x), w_like and w_like(w_up if up_first else w_gate)
        if w_desc:
            w_desc.strides = [abs(addresses[2] - addresses[1]) // w_up.element_size(), *w_desc.strides[1:]]
        launch(tiles, *addresses, *scalars, x_desc, w_desc, *constants)

    return again


def _last_wave(M, N, programs):
    """How many tile columns are whole, and the width of a TMA box, by which the tiles to their right are narrower.

    These make up the last wave, if no other is needed: 195 -> 175 us at M = 512 (H100), 100 -> 93 at M = 256 (H200).
    """
    num_pid_m, num_pid_n = triton.cdiv(M, TILE_M.value), triton.cdiv(N, TILE_N.value)
    slots = triton.cdiv(num_pid_m * num_pid_n, programs) * programs
    num_whole_n = (slots - programs) // num_pid_m  # all waves but the last
    for box in (64, 32):
        if num_pid_m * (num_whole_n + triton.cdiv(N - num_whole_n * TILE_N.value, TILE_N.value - box)) <= slots:
            return num_whole_n, box
    return num_pid_n, 64


def _launch_hopper(row_major, x, w_gate, w_up, y, gate_up, *scales):
    """_launch by swiglu_kernel_hopper."""
    (M, K), N, strides = x.shape, w_gate.shape[1], _scale_strides(*scales)
    grid = device_limits(x.device.index).num_sms, 1, 1
    num_whole_n, box = _last_wave(M, N, grid[0])
    box_k = 128 // x.element_size()  # the widest swizzle

    def describe(t, *block):
        layout = gl.NVMMASharedLayout(block[-1] * t.element_size(), 8 * t.element_size(), rank=len(block))
        return GluonTensorDescriptor(t, [*t.shape], [*t.stride()], [*block], layout)

    descriptors = [describe(x, TILE_M.value, box_k)]
    descriptors += [describe(w, box_k, box) if row_major else describe(w.t(), box, box_k) for w in (w_gate, w_up)]
    descriptors += [describe(t.view(M, -1, N), ROWS.value, 1, box) for t in (y, gate_up) if t is not None]
    not_kept, scalars = [None] * (gate_up is None), (M, N, K, *strides, num_whole_n, row_major)
    compiled = swiglu_kernel_hopper[grid](*descriptors, *not_kept, *scales, *scalars, **HOPPER_OPTIONS)
    launch, classes = _launcher(compiled, x.device.index), [_like(desc) for desc in descriptors]

    def again(*tensors):
        described = [like(t) for like, t in zip(classes, tensors, strict=False)]
        launch(grid, *described, *not_kept, *tensors[5:], *scalars)

    return again


def _brief(error):
    """In one line: Triton's messages begin with the source and end with what is wrong."""
    return f"{type(error).__name__}: {str(error).strip().rpartition(chr(10))[2]}"


def _working(configs, launch):
    """Yield each configuration that can be launched, with what `launch(config)` returns. Raise if there is none."""
    reasons = []
    for config in configs:
        try:
            yield config, launch(config)
        except FATAL:
            raise
        except UNUSABLE as error:
            reasons.append(f"{config} fails: {_brief(error)}")
            warnings.warn(f"fused_swiglu leaves a configuration out: {reasons[-1]}", stacklevel=2)
    if len(reasons) == len(configs):
        raise RuntimeError("fused_swiglu: no configuration works on this GPU\n" + "\n".join(reasons))


# ---- Backward pass ----


@triton.jit
def swiglu_backward_kernel(dy_ptr, gate_up_ptr, d_ptr, N, BLOCK_N: tl.constexpr):
    """From dy (M, N) and gate beside up (M, 2N) to dgate beside dup, in the same memory or not. All are contiguous."""
    row = (tl.program_id(0) // tl.cdiv(N, BLOCK_N)).to(tl.int64)
    offs_n = tl.program_id(0) % tl.cdiv(N, BLOCK_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_gate, offs_up, mask = row * 2 * N + offs_n, row * 2 * N + N + offs_n, offs_n < N
    dy = tl.load(dy_ptr + row * N + offs_n, mask=mask).to(tl.float32)
    gate = tl.load(gate_up_ptr + offs_gate, mask=mask).to(tl.float32)
    up = tl.load(gate_up_ptr + offs_up, mask=mask).to(tl.float32)
    sigmoid = 1 / (1 + tl.exp(-gate))
    dgate, dup = dy * up * sigmoid * (1 + gate * (1 - sigmoid)), dy * gate * sigmoid
    tl.store(d_ptr + offs_gate, dgate.to(d_ptr.dtype.element_ty), mask=mask)
    tl.store(d_ptr + offs_up, dup.to(d_ptr.dtype.element_ty), mask=mask)


def _save_for_backward(ctx, inputs, output, hooked=True):
    x, w_gate, w_up, linear, keep, ctx.choice, *_, out_dtype = inputs
    if out_dtype is not None:  # fused_swiglu has refused this, an exported program has not
        raise NotImplementedError(NO_GRADIENT)
    ctx.mark_non_differentiable(*(output[1:] if keep else ()))
    ctx.set_materialize_grads(False)  # or autograd would make zeros for gate_up's gradient
    ctx.hooked, ctx.linear, k = hooked, linear, int(linear)
    ctx.along_k = w_gate.stride(k) == w_up.stride(k) == 1
    needs_x, needs_gate, needs_up, *_ = ctx.needs_input_grad
    # With linear=True not the parameters themselves, of which autograd would hand out whatever .data they have by then
    weights = (None, None) if keep and not needs_x else (w_gate.detach(), w_up.detach()) if linear else (w_gate, w_up)
    ctx.save_for_backward(x if needs_gate or needs_up or not keep else None, *weights, output[1] if keep else None)


def _backward(ctx, dy, *_):
    """dx, dw_gate and dw_up, None where not needed: the backward pass of EagerSwiGLU and of swiglu_op."""
    if torch.is_grad_enabled():  # with create_graph=True
        raise NotImplementedError("fused_swiglu can be differentiated once: its backward pass has no gradient")
    if dy is None:
        return (None,) * 10  # swiglu_op's inputs
    x, w_gate, w_up, gate_up = ctx.saved_tensors
    # dgate and dup take the place of gate and up unless these may be wanted again.
    overwrite = gate_up is None or not (ctx.hooked or torch._C._autograd._get_current_graph_task_keep_graph())
    ctx.maybe_clear_saved_tensors()  # not where the graph is retained
    # Without saved-tensor hooks these are the forward pass's own tensors, which it has looked at.
    others = (x, w_gate, w_up, gate_up) if ctx.hooked else ()
    dispatched = _needs_dispatcher(dy, *(t for t in others if t is not None))
    # With is_grads_batched=True, and for a dy that is a dual tensor
    dispatched |= torch._C._functorch.is_legacy_batchedtensor(dy) or torch.autograd.forward_ad._current_level >= 0
    if gate_up is None:
        forward = swiglu_op if dispatched else _forward
        gate_up = forward(x, w_gate, w_up, ctx.linear, True, ctx.choice, *NOT_FLOAT8)[1]
    gate_up, leading = gate_up.contiguous(), dy.shape[:-1]
    if len(leading) != 1:
        dy, x = (t if t is None else t.reshape(gate_up.shape[0], t.shape[-1]) for t in (dy, x))
    if dispatched or (INTERPRETED and dy.dtype == torch.bfloat16):  # a compiler fuses it; the interpreter cuts bf16
        gate, up = gate_up.float().chunk(2, 1)
        s = torch.sigmoid(gate)
        d = torch.cat([dy * up * s * (1 + gate * (1 - s)), dy * gate * s], dim=1).to(dy.dtype)
    else:
        d = gate_up if overwrite else torch.empty_like(gate_up)
        torch.autograd.graph.increment_version(d)  # of gate_up, which a Triton kernel changes unseen
        _differentiate_activation(dy.contiguous(), gate_up, d)
    del gate_up, others

    def weight_gradient(d):  # of the weights' shape, and in memory as both of them
        dw = torch.mm(d.t(), x) if ctx.along_k else torch.mm(x.t(), d).t()
        return dw if ctx.linear else dw.t()

    needs_x, needs_gate, needs_up, *_ = ctx.needs_input_grad
    dx, (dgate, dup) = None, d.chunk(2, 1)
    with torch._C._DisableAutocast():  # torch.autocast(enabled=False) takes four times as long
        if needs_x:
            add = torch.addmm if dispatched else torch.Tensor.addmm_  # which FlopCounterMode does not know
            w_gate, w_up = (w_gate, w_up) if ctx.linear else (w_gate.t(), w_up.t())
            dx = add(torch.mm(dgate, w_gate), dup, w_up)
            dx = dx if len(leading) == 1 else dx.view(*leading, dx.shape[1])
        if ctx.along_k and needs_gate and needs_up:  # one product, handed out in halves
            dw_gate, dw_up = weight_gradient(d).chunk(2, 0 if ctx.linear else 1)
        else:
            dw_gate = weight_gradient(dgate) if needs_gate else None
            dw_up = weight_gradient(dup) if needs_up else None
    return dx, dw_gate, dw_up, *(None,) * 7


def _differentiate_activation(dy, gate_up, d):
    """Fill d (M, 2N), which may be gate_up, by swiglu_backward_kernel."""
    (M, N), BLOCK_N = dy.shape, 1024
    grid = (M * -(-N // BLOCK_N), 1, 1)  # triton.cdiv takes 5 us
    arguments = dy, gate_up, d, N, BLOCK_N
    key = dy.dtype, gate_up.dtype, dy.device, N, dy.data_ptr() % 16, gate_up.data_ptr() % 16, d.data_ptr() % 16
    if again := _launchers.get(key):
        again(grid, *arguments)
    elif d.numel():
        with torch.cuda.device_of(dy):
            compiled = _first_launch(functools.partial(swiglu_backward_kernel[grid], **FP_FUSION), *arguments)
        _launchers[key] = compiled and _launcher(compiled, dy.device.index)  # not by the interpreter


# ---- The public function, and what autograd, torch.compile, torch.export and torch.vmap see ----


def _refuse_forward_mode(*_):
    if torch.autograd.forward_ad._current_level >= 0:
        raise NotImplementedError("fused_swiglu has no forward-mode derivative")


class EagerSwiGLU(torch.autograd.Function):
    """For eager autograd, without the operator's layers, of which each takes host time."""

    @staticmethod
    def forward(ctx, x, w_gate, w_up, inputs):  # of swiglu_op, with all three as autocast wants them
        output = _forward(*inputs)
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)  # which may hold what is saved
        _save_for_backward(ctx, inputs, output, hooked=hooks is not None)
        return output[0]

    backward = staticmethod(_backward)
    jvp = staticmethod(_refuse_forward_mode)


# Named after the module, as two copies of this file want two operators, in the characters that PyTorch takes
NAME = re.sub(r"\W|^(?=\d)", "_", __name__, flags=re.ASCII) + "::swiglu"


@torch.library.custom_op(NAME, mutates_args=())
def swiglu_op(
    x: torch.Tensor, w_gate: torch.Tensor, w_up: torch.Tensor, linear: bool, keep: bool, choice: str,
    x_scale: torch.Tensor | None, gate_scale: torch.Tensor | None, up_scale: torch.Tensor | None,
    out_dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    _refuse_forward_mode()  # PyTorch would take it for zero. Whether any is wanted cannot be seen here
    y, gate_up = _forward(x, w_gate, w_up, linear, keep, choice, x_scale, gate_scale, up_scale, out_dtype)
    return y, x.new_empty((0, 2 * y.shape[-1])) if gate_up is None else gate_up  # operators return tensors only


@swiglu_op.register_fake
def _(x, w_gate, w_up, linear, keep, choice, x_scale, gate_scale, up_scale, out_dtype):
    rows, N = x.shape[:-1], w_gate.shape[0 if linear else 1]
    return x.new_empty((*rows, N), dtype=out_dtype), x.new_empty((math.prod(rows) if keep else 0, 2 * N))


swiglu_op.register_autograd(_backward, setup_context=_save_for_backward)
register_flop_formula(swiglu_op._opoverload.overloadpacket)(  # of shapes
    lambda x, *_, out_shape, **__: 4 * x[-1] * math.prod(out_shape[0])
)


@swiglu_op.register_vmap
def _(*_):
    raise NotImplementedError("fused_swiglu under torch.vmap: x takes any number of leading dimensions without it")


def _autocast(t, dtype, dispatched):
    """t in autocast's dtype, as F.linear has it. On a GPU einsum casts, a parameter once for all calls in a region."""
    dtype = dtype if t.is_floating_point() and t.dtype != torch.float64 else t.dtype
    if dispatched or t.dtype == dtype:
        return t.to(dtype)
    parameter = t if t._base is None else t._base  # of weight.t(), behind which autocast does not look
    kept = parameter.is_leaf and parameter.requires_grad  # by autocast
    if kept and (t is parameter or (parameter.dim() == 2 and t.is_set_to(parameter.t()))):
        cast = torch.einsum("...->...", parameter)
        t = cast if t is parameter else cast.t()
    return t.detach().to(dtype)


def fused_swiglu(
    x, w_gate, w_up, *, linear=False, scales=None, out_dtype=None, recompute=False, autotune=True, batch_invariant=False
):
    """``silu(x @ w_gate) * (x @ w_up)`` in one kernel (Shazeer 2020, https://arxiv.org/abs/2002.05202).

    Args:
        x: (..., K), bfloat16, float16, float32 or float8_e4m3fn, copied only where leading dimensions do not collapse.
        w_gate, w_up: (K, N), of x's dtype and device, never copied. Any strides, in float8 1 along K.
        linear: the weights are (N, K) instead, as nn.Linear has them, which takes the host less time than `weight.t()`.
        scales: in float8, (x_scale, gate_scale, up_scale) of float32, by which x @ w_gate and x @ w_up are multiplied.
            Each is one number, or (..., 1) for x and (N,) or (1, N) for a weight. None: ones.
        out_dtype: in float8, the result's dtype: bfloat16 unless given, or float16 or float32.
        recompute: False keeps `x @ w_gate` and `x @ w_up` for a backward pass, 2 * N numbers for each row. True keeps
            nothing beyond the arguments, and computes these two products again.
        autotune: whether the first call with a new N, K, dtype, layout or power of two of rows may time configurations
            for some seconds; Triton keeps the result on disk. Else, and in CUDA-graph capture, a default serves.
        batch_invariant: whether a row's result has the same bits whatever rows are beside it: one configuration serves
            every M, and few rows take longer. For one device, dtype of x and result, K, N and layout, rows of x being
            K apart and aligned to 16 bytes, and not for gradients.

    Returns:
        (..., N), contiguous, in x's dtype or out_dtype. Sums and SiLU are in float32; on NVIDIA, float32 products are
        rounded to tf32 where PyTorch's settings have torch.mm do so. Differentiable once in all three, not in float8:
        only required gradients are computed, the weights' lie in memory as both weights do. torch.autocast casts as
        for F.linear, but no x in float8. Hopper's tensor cores add float8 products with few bits, as torch._scaled_mm
        with use_fast_accum: errors up to 5.8e-3 at K = 14336, up to 5.7e-3 by the naive form.

    Raises:
        TypeError, ValueError: an argument has another type, dtype, device or shape than it should.
        NotImplementedError: under torch.vmap or forward-mode AD, or in a backward pass with create_graph=True.
        RuntimeError: no configuration works here (one that fails is left out with a warning).
    """
    if scales is not None and not (isinstance(scales, (tuple, list)) and len(scales) == 3):
        raise ValueError("scales must be three tensors: of x, w_gate and w_up")
    linear, scales, of_float8 = bool(linear), scales or (), NOT_FLOAT8
    dispatched = _needs_dispatcher(x, w_gate, w_up, *scales)
    if dispatched:  # so it is for what is no tensor, too
        for name, t in zip(ARGUMENTS, (x, w_gate, w_up, *scales), strict=False):
            if not isinstance(t, torch.Tensor):
                raise TypeError(f"{name} is a {type(t).__name__}: expected a torch.Tensor")
    if x.dtype == FLOAT8:
        if out_dtype not in (None, *RESULT_DTYPES):
            raise ValueError(f"out_dtype is {out_dtype}: expected one of {RESULT_DTYPES}")
        if torch.is_grad_enabled() and any(t.requires_grad for t in (x, w_gate, w_up, *scales)):
            raise NotImplementedError(NO_GRADIENT)
        _refuse_forward_mode()
        of_float8 = *(scales or NOT_FLOAT8[:3]), out_dtype or torch.bfloat16
    elif scales or out_dtype is not None:
        raise ValueError(f"scales or out_dtype were given, but x is {x.dtype}: they are for {FLOAT8}")
    device, cast = "cuda" if x.is_cuda else x.device.type, (x, w_gate, w_up)  # is_cuda: a tenth of .type's time
    if x.dtype != FLOAT8 and device in ("cuda", "cpu") and torch.is_autocast_enabled(device):
        cast = tuple(_autocast(t, torch.get_autocast_dtype(device), dispatched) for t in cast)
    needs_grad = torch.is_grad_enabled() and (x.requires_grad or w_gate.requires_grad or w_up.requires_grad)
    # An exported program mostly serves inference, though its weights require grad (is_exporting() holds in compile too)
    keep = needs_grad and not (recompute or torch.compiler._is_exporting_flag or torch.jit.is_tracing())
    choice = ONE_FOR_ALL_M if batch_invariant else TUNED if autotune else DEFAULT
    if dispatched:
        _check(*cast, linear, *of_float8)
    elif needs_grad or torch.autograd.forward_ad._current_level >= 0:  # float8 has been refused then
        return EagerSwiGLU.apply(x, w_gate, w_up, (*cast, linear, keep, choice, *of_float8))
    return (swiglu_op if dispatched else _forward)(*cast, linear, keep, choice, *of_float8)[0]
