"""Checks the fused SwiGLU kernel, times it against PyTorch over a range of row counts, saves a CSV and a plot.

    python benchmark.py

On a machine without a GPU the kernel is checked through Triton's interpreter, and nothing is timed.
"""

import argparse
import contextlib
import functools
import gc
import math
import os
import sys
import tempfile
import time
from collections import namedtuple
from importlib import import_module
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from tqdm import tqdm

from baseline_torch_swiglu import scaled_mm, torch_swiglu, torch_swiglu_float8

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read while Triton and the kernel are imported, below

import triton
from triton.testing import do_bench, do_bench_cudagraph

from fused_triton_swiglu import fused_swiglu

MODELS = {  # K (hidden size), N (intermediate size)
    "llama-3-8b": (4096, 14336),
    "llama-3-70b": (8192, 28672),
    "mixtral-8x7b": (4096, 14336),
    "qwen2.5-7b": (3584, 18944),
    "tinyllama-1.1b": (2048, 5632),
    "small": (1024, 4096),
}
FLOAT8 = torch.float8_e4m3fn
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "float8_e4m3fn": FLOAT8}
LAYOUTS = ("linear", "row-major")
PROVIDERS = ("torch", "torch.compile", "packed torch.compile", "fused", "packed matmul only")
BACKWARD_PROVIDERS = ("torch", "torch.compile", "packed torch.compile", "fused", "fused, recomputing")
ON_REQUEST = ("fused, batch-invariant",)  # forward only
PEERS = ("liger-kernel", "flash-swiglu-mlp", "quack-kernels")  # other people's packages, timed where installed
EVERY_PROVIDER = tuple(dict.fromkeys(PROVIDERS + BACKWARD_PROVIDERS + ON_REQUEST + PEERS))
COLORS = dict(zip(EVERY_PROVIDER, ("C0", "#17a2b8", "C2", "C3", "C7", "C1", "C1", "C6", "C5", "C4"), strict=True))
# What `ms` is: GPU time after a cache flush, of the forward pass or of both; GPU time where weights take turns; time
# that a call keeps the CPU busy.
FLUSHED, BACKWARD, ROTATING, HOST = "flushed cache", "forward + backward, flushed cache", "rotating weights", "host"
COLUMNS = ["gpu", "torch", "triton", "dtype", "layout", "M", "K", "N", "provider", "method"]
COLUMNS += ["ms", "ms_p20", "ms_p80", "tflops", "gbps", "speedup", "fraction_of_floor", "rel_error"]
COLUMNS += ["peak_mib", "kept_mib"]  # both passes only: beyond inputs; and between the passes, beyond inputs and result
RECORDED_PLOT = "results/h100_bfloat16_linear.png"

# The fused result is rounded once, to half a unit in the last place; twice that is allowed, plus what float32 sums
# lose where the result is near zero. Eager PyTorch in bfloat16 or float16, which rounds four times, does not pass.
TOLERANCES = {
    torch.bfloat16: {"rtol": 2**-7, "atol": 1e-4},
    torch.float16: {"rtol": 2**-10, "atol": 1e-4},
    torch.float32: {"rtol": 2e-5, "atol": 2e-5},
    FLOAT8: {"rtol": 2**-6, "atol": 4e-2},  # Hopper's tensor cores add its products with few bits
}
# What one rounding to the result's dtype costs at most, norm over norm; for float32, what a sum over K = 4096 costs.
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 3e-6, FLOAT8: 2**-8}
INTERPRETED_SHAPES = ((1, 64, 96), (5, 1, 33), (17, 67, 45), (70, 130, 129), (130, 72, 136))  # M, K, N
ROUNDS = 5
ROTATION_BYTES = 2**30  # of weights: many times any L2 cache
HOST_SHAPE = 1, 512, 512  # M, K, N: the GPU is done long before the next call comes
HOST_CALLS = 1000


def make_inputs(M, K, N, dtype, layout, device):
    """x (M, K) and two weights (K, N), scaled so that x @ w and the result are of order one."""
    generator = torch.Generator(device).manual_seed(M + K + N)
    x, w_gate, w_up = (torch.randn(rows, K, generator=generator, device=device) for rows in (M, N, N))
    weights = [(w * K**-0.5).to(dtype).t() for w in (w_gate, w_up)]
    if layout == "row-major":
        weights = [w.contiguous() for w in weights]
    return x.to(dtype), *weights


def quantised(*inputs):
    """x and weights in float8, strides kept, and their scales, (M, 1) and (1, N): one for each row, or column."""
    scales = [t.abs().amax(dim=dim, keepdim=True) / 448 for t, dim in zip(inputs, (1, 0, 0), strict=True)]
    return [(t / scale).to(FLOAT8) for t, scale in zip(inputs, scales, strict=True)], scales


def make_dy(M, N, dtype, device):
    """A gradient of the result, of order one."""
    generator = torch.Generator(device).manual_seed(M + N)
    return torch.randn(M, N, generator=generator, device=device).to(dtype)


def reference(x, w_gate, w_up, dy=None, scales=()):
    """The result in float64, or float32 where memory is short. With dy, its gradient, also the inputs' gradients."""
    dtype = torch.float64
    if x.is_cuda:
        elements = x.numel() + 2 * w_gate.numel() + 5 * x.shape[0] * w_gate.shape[1]
        if (8 if dy is None else 24) * elements > torch.cuda.mem_get_info(x.device)[0]:
            dtype = torch.float32
    scaled = (t.detach().to(dtype) * scale for t, scale in zip((x, w_gate, w_up), scales or (1, 1, 1), strict=True))
    leaves = [t.requires_grad_(dy is not None) for t in scaled]
    return differentiated(lambda leaves: torch_swiglu(*leaves), None if dy is None else dy.to(dtype))(leaves)


def differentiated(run, dy):
    """`run` of leaves, or with dy both its passes: the result, and a gradient or None for each leaf that wants one."""

    def both_passes(leaves):
        y = run(leaves)
        return y.detach(), *torch.autograd.grad(y, [t for t in leaves if t.requires_grad], dy, allow_unused=True)

    return run if dy is None else both_passes


def relative_error(result, expected):
    """Norm of the difference over the norm of `expected`, a float64 tensor or the next best; NaN if one is there."""
    return ((result.to(expected) - expected).norm() / expected.norm()).item()


@contextlib.contextmanager
def nan_in_new_memory():
    """torch.empty returns NaN, so that an element which nobody writes shows up."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def relative_errors(results, expected):
    """Of the result alone, or of the result and the gradients of x, w_gate and w_up."""
    if isinstance(results, torch.Tensor):
        return [relative_error(results, expected)]
    y, dx, dw_gate, dw_up, *dw_packed = results
    if dw_gate is None:
        dw_gate, dw_up = dw_packed[0].chunk(2, dim=1)
    return [relative_error(*pair) for pair in zip((y, dx, dw_gate, dw_up), expected, strict=True)]


def check(run, expected, dtype, eager_errors=None):
    """Whether `run()` on operands of this dtype is right, and its relative errors. Gradients' are judged by eager's."""
    run()  # tuning runs every configuration over one output: only the call after it shows what is unwritten
    with nan_in_new_memory():
        results = run()
    errors = relative_errors(results, expected)
    y, expected_y = (results, expected) if len(errors) == 1 else (results[0], expected[0])
    correct = torch.allclose(y.to(expected_y.dtype), expected_y, **TOLERANCES[dtype])
    correct &= not (dtype == FLOAT8 and eager_errors) or errors[0] <= 1.25 * eager_errors[0]
    for error, eager_error in zip(errors[1:], (eager_errors or [])[1:], strict=True):
        correct &= error <= gradient_limit(dtype, eager_error)
    return correct, errors


def gradient_limit(dtype, eager_error):
    """The relative error that a gradient may have: eager PyTorch's, or what rounding gate, dgate and it may cost."""
    return max(1.05 * eager_error, 2 * ROUNDING[dtype])


def check_contenders(contenders, operands, dy, scales, where):
    """Whether the fused kernels are right, and each contender's relative errors. A peer that fails is left out."""
    correct, errors, dtype = True, {}, operands.x.dtype
    expected = reference(*operands[:3], dy, scales)
    for name, run in contenders.items():
        if name.startswith("fused"):
            right, errors[name] = check(lambda run=run: run(operands), expected, dtype, errors["torch"])
            correct &= right
            verdict = "" if right else f"WRONG, beyond {TOLERANCES[dtype]} or, in a gradient, eager PyTorch's error: "
            pairs = zip(("y", "dx", "dw_gate", "dw_up"), errors[name], errors["torch"], strict=False)
            pairs = ", ".join(f"{of} {error:.1e} ({eager_error:.1e})" for of, error, eager_error in pairs)
            tqdm.write(f"{where}  {verdict}error of {name} (of eager PyTorch): {pairs}, against {expected[0].dtype}")
        elif name != "packed matmul only":
            try:
                errors[name] = relative_errors(run(operands), expected)
            except Exception as error:
                if name not in PEERS:
                    raise
                tqdm.write(f"{where}  {name} left out: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
    return correct, errors


# One x and one set of weights, with the forms of them that contenders want: w_packed is (K, 2N), w_gate then w_up;
# w_interleaved is (2N, K), a row of w_gate, a row of w_up, and so on, and empty where nobody wants it.
Operands = namedtuple("Operands", ["x", "w_gate", "w_up", "w_packed", "w_interleaved"])


def make_operands(M, K, N, args):
    """Operands; the gradient of the result if the backward pass is timed as well, else None; scales in float8."""
    device, dtype = "cuda" if torch.cuda.is_available() else "cpu", DTYPES[args.dtype]
    inputs = make_inputs(M, K, N, torch.float32 if dtype == FLOAT8 else dtype, args.layout, device)
    (x, w_gate, w_up), scales = quantised(*inputs) if dtype == FLOAT8 else (inputs, ())
    gate_t, up_t = w_gate.t(), w_up.t()
    w_packed = torch.cat([gate_t, up_t]).t() if args.layout == "linear" else torch.cat([w_gate, w_up], dim=1)
    interleaved = "quack-kernels" in args.providers
    w_interleaved = torch.stack([gate_t, up_t], dim=1).flatten(0, 1) if interleaved else x.new_empty(0)
    leaves = [t.requires_grad_(args.backward) for t in (x, w_gate, w_up, w_packed, w_interleaved)]
    return Operands(*leaves), make_dy(M, N, dtype, device) if args.backward else None, scales


def make_contenders(names, scales):
    """name -> function of Operands. Peers import their package when they are called."""
    naive, matmul, fused, packed_scales = torch_swiglu, torch.matmul, fused_swiglu, ()
    if scales:
        naive, matmul, fused = torch_swiglu_float8, scaled_mm, functools.partial(fused_swiglu, scales=scales)
        packed_scales = scales[0], torch.cat(scales[1:], dim=1)

    def packed_swiglu(x, w_packed, *packed_scales):
        gate, up = matmul(x, w_packed, *packed_scales).chunk(2, dim=-1)
        return F.silu(gate) * up

    torch.compiler.reset()  # each shape is compiled for itself: PyTorch gives up after eight on one function
    compiled, packed_compiled = (torch.compile(run, dynamic=False) for run in (naive, packed_swiglu))
    contenders = {
        "torch": lambda o: naive(o.x, o.w_gate, o.w_up, *scales),
        "torch.compile": lambda o: compiled(o.x, o.w_gate, o.w_up, *scales),
        "packed torch.compile": lambda o: packed_compiled(o.x, o.w_packed, *packed_scales),
        "fused": lambda o: fused(o.x, o.w_gate, o.w_up),
        "fused, recomputing": lambda o: fused(o.x, o.w_gate, o.w_up, recompute=True),
        "fused, batch-invariant": lambda o: fused(o.x, o.w_gate, o.w_up, batch_invariant=True),
        "packed matmul only": lambda o: matmul(o.x, o.w_packed, *packed_scales),
        "liger-kernel": lambda o: import_module("liger_kernel.ops.swiglu").LigerSiLUMulFunction.apply(
            o.x @ o.w_gate, o.x @ o.w_up
        ),
        "flash-swiglu-mlp": lambda o: import_module("flash_swiglu_mlp.ops").gemm_swiglu(
            o.x[None], o.w_gate.t(), o.w_up.t(), 1.0, False
        )[0][0],
        "quack-kernels": lambda o: import_module("quack.gemm_interface").gemm_gated(
            o.x, o.w_interleaved.t(), activation="swiglu", store_preact=False
        )[1],
    }
    return {name: contenders[name] for name in names}


def measure_ceilings(dtype):
    """(bytes per ms of a device-to-device copy, read and written; FLOPs per ms of a large matmul) on this card."""

    def fastest(run):
        """Of bursts as short as the contenders': a longer one meets the card's power limit, and is beaten."""
        return min(do_bench(run, warmup=10, rep=60, return_mode="min") for _ in range(ROUNDS))

    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    bandwidth = 2 * source.nbytes / fastest(lambda: target.copy_(source))
    size = 4096 if dtype.itemsize == 4 else 8192
    a, b = (torch.randn(size, size, device="cuda").to(dtype) for _ in range(2))
    one = torch.ones((), device="cuda")
    rate = 2 * size**3 / fastest(lambda: scaled_mm(a, b.t(), one, one) if dtype == FLOAT8 else a @ b)
    return bandwidth, rate


def other_users():
    """Print what else uses this GPU, before this process does."""
    try:
        busy, taken = torch.cuda.utilization(0), torch.cuda.device_memory_used(0) / 2**30  # 0: or CUDA would start
    except Exception as error:  # no nvidia-ml-py, or a driver that does not say, in NVML's own errors
        print(f"whether something else uses this GPU could not be checked: {error}")
        return
    if busy > 5 or taken > 1:
        print(f"WARNING: something else uses this GPU ({busy} % busy, {taken:.1f} GiB taken), which changes the times.")


def write_csv(rows, path):
    """All at once, so that whoever is interrupted leaves a whole file."""
    unfinished = path.with_suffix(".csv.unfinished")
    pd.DataFrame(rows, columns=COLUMNS).to_csv(unfinished, index=False, float_format="%.6g")
    unfinished.replace(path)


def measure(M, K, N, args, ceilings, progress):
    """Rows of the table for one M, or None if the fused kernel is wrong there."""
    first, dy, scales = make_operands(M, K, N, args)
    forward = make_contenders(args.providers, scales)
    contenders = {name: differentiated(run, dy) for name, run in forward.items()}
    correct, errors = check_contenders(contenders, first, dy, scales, f"M = {M:5}")
    if not correct:
        return None
    contenders = {name: run for name, run in contenders.items() if name in errors or name == "packed matmul only"}
    memory = {name: memory_of(forward[name], first, dy) for name in contenders} if args.backward else {}

    operands = [first]
    if args.rotate_weights:
        sets = max(2, math.ceil(ROTATION_BYTES / (first.w_gate.nbytes + first.w_up.nbytes)))
        operands += [Operands(first.x, *map(torch.clone, first[1:])) for _ in range(sets - 1)]
    times = {name: [] for name in contenders}
    for i in range(ROUNDS):  # in turn, so that a drifting clock hits all of them alike, and each after another one
        for name in [*contenders][i:] + [*contenders][:i]:
            progress.set_description(f"M = {M}, {name}")
            times[name] += gpu_times(contenders[name], operands, args)
            progress.update()

    bandwidth, rate = ceilings
    flops = 4 * M * N * K * (1 + 2 * args.backward)
    result_bytes = M * N * max(first.x.element_size(), 2)
    least_bytes = (first.x.nbytes + first.w_gate.nbytes + first.w_up.nbytes + result_bytes) * (1 + args.backward)
    floor = max(least_bytes / bandwidth, flops / rate)
    rows = summarize(times, M, K, N, args)
    for row in rows:
        row["method"] = ROTATING if args.rotate_weights else BACKWARD if args.backward else FLUSHED
        row["tflops"] = flops / row["ms"] * 1e-9
        row["gbps"] = least_bytes / row["ms"] * 1e-6
        row["fraction_of_floor"] = floor / row["ms"]
        row["rel_error"] = np.max(errors.get(row["provider"], math.nan))  # NaN if one is there
        row["peak_mib"], row["kept_mib"] = memory.get(row["provider"], (None, None))
    return rows


def memory_of(run, leaves, dy):
    """MiB: at most during both passes beyond the leaves and dy, and kept between the two beyond the result as well."""
    torch.cuda.synchronize()
    gc.collect()  # or tensors in cycles are counted, and may go meanwhile
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    y = run(leaves)
    kept = torch.cuda.memory_allocated() - before - y.nbytes
    differentiated(lambda leaves: y, dy)(leaves)
    return (torch.cuda.max_memory_allocated() - before) / 2**20, kept / 2**20


def gpu_times(run, operands, args):
    """Milliseconds per call: after a flush of the cache, or with several operands in turn inside one CUDA graph."""
    if args.rotate_weights:
        all_in_turn = do_bench_cudagraph(lambda: [run(o) for o in operands], rep=20, return_mode="all")
        return [ms / len(operands) for ms in all_in_turn]
    warmup, rep = (100, 300) if args.backward else (10, 60)  # training meets the card's power limit
    return do_bench(lambda: run(operands[0]), warmup=warmup, rep=rep, return_mode="all")


def summarize(times, M, K, N, args):
    """A row for each contender from its times in milliseconds."""
    rows = [{"dtype": args.dtype, "layout": args.layout, "M": M, "K": K, "N": N, "provider": name} for name in times]
    for row in rows:
        row["ms_p20"], row["ms"], row["ms_p80"] = np.quantile(times[row["provider"]], [0.2, 0.5, 0.8])
        row["speedup"] = np.median(times["torch"]) / row["ms"]
    return rows


def measure_host_cost(args):
    """Rows of the table: how long a call keeps the CPU busy, thousands of calls without a synchronisation."""
    operands, dy, scales = make_operands(*HOST_SHAPE, args)
    names = [name for name in ("torch", "torch.compile", "fused") if name in args.providers]
    contenders, times = make_contenders(names, scales), {name: [] for name in names}
    for _ in range(ROUNDS):
        for name, forward in contenders.items():
            run = differentiated(forward, dy)
            run(operands)
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(HOST_CALLS):
                run(operands)
            times[name].append((time.perf_counter() - start) * 1e3 / HOST_CALLS)
    return [row | {"method": HOST} for row in summarize(times, *HOST_SHAPE, args)]


def run_on_gpu(args):
    other_users()
    properties = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    print("{gpu}, PyTorch {torch}, Triton {triton}".format(**properties))
    print(f"{args.dtype}, K = {args.k}, N = {args.n}, {args.layout} weights")
    bandwidth, rate = ceilings = measure_ceilings(DTYPES[args.dtype])
    print(f"ceilings: copy {bandwidth * 1e-9:.2f} TB/s, matmul {rate * 1e-9:.0f} TFLOP/s")
    host_rows = measure_host_cost(args)
    host_costs = ", ".join(f"{row['provider']} {row['ms'] * 1e3:.1f}" for row in host_rows)
    print(f"host time of {'both passes' if args.backward else 'a call'}, us (M, K, N = {HOST_SHAPE}): {host_costs}\n")

    kind = "_backward" if args.backward else "_rotating_weights" if args.rotate_weights else ""
    path = args.output_dir / f"swiglu_benchmark{kind}.csv"
    rows, status = [], 0
    timings = len(args.m) * len(args.providers) * ROUNDS
    with tqdm(total=timings, unit="timing", dynamic_ncols=True, disable=None) as progress:
        try:
            for M in args.m:
                measured = measure(M, args.k, args.n, args, ceilings, progress)
                if measured is None:
                    status = 1
                    break
                rows += measured
                write_csv([properties | row for row in host_rows + rows], path)
        except (KeyboardInterrupt, torch.OutOfMemoryError) as error:
            progress.write(f"\nM = {M}: {str(error) or 'interrupted'}\nwhat was measured is kept")
            status = 130 if isinstance(error, KeyboardInterrupt) else 1
    if rows:
        table = pd.read_csv(path)
        print_table(table)
        plot(table, path.with_suffix(".png"))
        print(f"\n{path}\n{path.with_suffix('.png')}")
    return status


def run_interpreted(args):
    print("No GPU found: checking the kernel through Triton's interpreter, in all dtypes and layouts.")
    print("The shapes are small and fixed there: of the options only --backward and --output-dir matter.\n")
    rows, status = [], 0
    cases = [*product([*DTYPES][:3], LAYOUTS, INTERPRETED_SHAPES)]
    cases += [("float8_e4m3fn", "linear", shape) for shape in INTERPRETED_SHAPES if not args.backward]
    for dtype, layout, (M, K, N) in tqdm(cases, unit="case", leave=False, dynamic_ncols=True, disable=None):
        args.dtype, args.layout = dtype, layout
        operands, dy, scales = make_operands(M, K, N, args)
        contenders = make_contenders(["torch", "fused"] + ["fused, recomputing"] * args.backward, scales)
        both = {name: differentiated(run, dy) for name, run in contenders.items()}
        where = f"{dtype:13} {layout:10} M = {M:3}  K = {K:3}  N = {N:3}"
        correct, errors = check_contenders(both, operands, dy, scales, where)
        status |= not correct
        case = {"gpu": "none (Triton interpreter)", "torch": torch.__version__, "triton": triton.__version__}
        case |= {"dtype": dtype, "layout": layout, "M": M, "K": K, "N": N}
        rows += [case | {"provider": name, "rel_error": np.max(errors[name])} for name in errors]
    path = args.output_dir / f"swiglu_benchmark{'_backward' if args.backward else ''}.csv"
    write_csv(rows, path)
    print(f"\n{path}")
    print(f"Speed was not measured: that needs a GPU. The plot of a recorded run on an H100 is {RECORDED_PLOT}")
    return int(status)


def print_table(table):
    """Median microseconds by M and provider, then the fused kernel's place, and memory where it was measured."""
    table = table[table.method != HOST]
    by_m = table.pivot(index="M", columns="provider")
    names = table.provider.unique()
    times = by_m.ms[names] * 1e3
    if "fused" in names:
        times["fused: speed-up"] = by_m.speedup.fused.map("{:.2f}x".format)
        times["of the floor"] = by_m.fraction_of_floor.fused.map("{:.0%}".format)
    print("\nmicroseconds, median\n\n" + times.to_string(float_format="{:.1f}".format))
    for column, title in (("peak_mib", "at most, beyond the inputs"), ("kept_mib", "kept for the backward pass")):
        if table[column].notna().any():
            print(f"\nMiB {title}\n\n" + by_m[column][names].to_string(float_format="{:.0f}".format))


def plot(table, path):
    """Speed-up over eager PyTorch by M, for one shape; beside it the share of the floor or, for both passes, memory."""
    table = table[table.method != HOST].sort_values("M", kind="stable")
    both = (table.method == BACKWARD).all()
    panels = [("speedup", "{x:.2f}x", "speed-up over eager PyTorch, higher is better")]
    if both:
        eager = table[table.provider == "torch"].set_index("M").peak_mib
        table = table.assign(memory=table.peak_mib / table.M.map(eager))
        panels.append(("memory", "{x:.0%}", "peak memory beyond the inputs, of eager PyTorch's, lower is better"))
    else:
        panels.append(("fraction_of_floor", "{x:.0%}", "share of the card's limit reached, higher is better"))
    figure = Figure(figsize=(13, 5.4), layout="constrained")
    ticks = table.M.unique()
    for axis, (column, unit, title) in zip(figure.subplots(1, 2), panels, strict=True):
        ends = {}
        for name, rows in table.groupby("provider", sort=False):
            # The last one of PROVIDERS is no contender: it leaves silu and the product out.
            style = {"linewidth": 2.8 if name == "fused" else 1.6, "linestyle": ":" if name == PROVIDERS[-1] else "-"}
            axis.plot(rows.M, rows[column], color=COLORS[name], marker="o", markersize=4, **style)
            if column != "memory":
                low, high = (rows[column] * rows.ms / slower for slower in (rows.ms_p80, rows.ms_p20))
                axis.fill_between(rows.M, low, high, color=COLORS[name], alpha=0.1, linewidth=0)
            ends[name] = rows[column].iloc[-1]
        # Names stand at the lines' ends, halfway between pushed up and pushed down until none overlap.
        steps = np.arange(len(ends)) * 0.05 * np.ptp(axis.get_ylim())
        free = pd.Series(ends).sort_values() - steps
        for name, y in ((free.cummax() + free[::-1].cummin()[::-1]) / 2 + steps).items():
            style = {"color": COLORS[name], "weight": "bold" if name == "fused" else "normal", "va": "center"}
            axis.annotate(name, (ticks[-1], y), (8, 0), textcoords="offset points", annotation_clip=False, **style)
        if column == "fraction_of_floor":
            axis.axhline(1, color="grey", linestyle="--", linewidth=1.2)
            floor = "floor: measured bandwidth or matmul rate"
            axis.annotate(floor, (ticks[0], 1), (0, 4), textcoords="offset points", color="grey", fontsize=9)
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, ticks, rotation=45)
        axis.minorticks_off()
        axis.set(xlabel="M (rows of x: tokens)", xmargin=0.02, title=title)
        axis.yaxis.set_major_formatter(unit)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    first = table.iloc[0]
    figure.suptitle(
        f"SwiGLU forward{' + backward' if both else ''}, {first.gpu}, {first['dtype']}, K = {first.K}, N = {first.N}, "
        f"{first.layout} weights, {first.method.split(', ')[-1]} (torch {first.torch}, triton {first.triton})"
    )
    figure.savefig(path, dpi=130)


def positive_int(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    m = [1, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384]
    add("--m", type=positive_int, nargs="+", default=m, metavar="M", help="rows of x to time")
    add("--k", type=positive_int, metavar="K", help="input features (4096)")
    add("--n", type=positive_int, metavar="N", help="hidden features (14336)")
    add("--model", choices=MODELS, metavar="NAME", help=f"K and N of a model: {MODELS}")
    add("--dtype", choices=DTYPES, default="bfloat16", help="of x and the weights; float8 gives bfloat16 (bfloat16)")
    add("--layout", choices=LAYOUTS, default="linear", help="linear: (N, K) in memory (nn.Linear); row-major: (K, N)")
    providers = f"contenders, of {EVERY_PROVIDER}, or all. torch is always there, {ON_REQUEST + PEERS} if asked for"
    add("--providers", choices=(*EVERY_PROVIDER, "all"), nargs="+", default=(), metavar="P", help=providers)
    add("--backward", action="store_true", help="time both passes together, and measure the memory they take")
    add("--rotate-weights", action="store_true", help="weights in turn inside a CUDA graph, as in a model, no flush")
    add("--output-dir", type=Path, default=Path(), metavar="DIR", help="where to write (here)")
    add("--plot", type=Path, metavar="CSV", help="only draw a CSV of an earlier run again")
    args = parser.parse_args(argv)
    if args.model and (args.k or args.n):
        parser.error("--model gives K and N: leave --k and --n out, or --model")
    K, N = MODELS[args.model or "llama-3-8b"]
    args.k, args.n = args.k or K, args.n or N
    args.m = sorted(set(args.m))
    if args.backward and args.rotate_weights:
        parser.error("--backward and --rotate-weights exclude each other")
    float8 = DTYPES[args.dtype] == FLOAT8
    if float8 and (args.backward or args.layout != "linear" or args.k % 16 or args.n % 16):
        parser.error(f"--dtype {args.dtype} has no --backward, no --layout but linear, no K and N but in steps of 16")
    possible = (BACKWARD_PROVIDERS if args.backward else PROVIDERS + ON_REQUEST) + PEERS * (not float8)
    if wrong := {*args.providers} - {*possible, "all"}:
        parser.error(f"--providers {' '.join(sorted(wrong))}: with these options expected some of {possible}")
    chosen = {"torch", *(args.providers or PROVIDERS + BACKWARD_PROVIDERS)}
    args.providers = [name for name in possible if name in chosen or "all" in chosen]
    if args.plot:
        try:
            args.table = pd.read_csv(args.plot, usecols=COLUMNS)
        except (OSError, ValueError) as error:
            parser.error(f"--plot {args.plot}: {error}")
        if args.table.ms.isna().all():
            parser.error(f"--plot {args.plot}: holds no times, it comes from a machine without a GPU")
    try:  # now, not after an hour of measuring
        args.output_dir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.output_dir).close()
    except OSError as error:
        parser.error(f"--output-dir {args.output_dir} cannot be written: {error.strerror}")
    return args


def main():
    args = parse_args()
    if args.plot:
        path = args.output_dir / args.plot.with_suffix(".png").name
        plot(args.table, path)
        print(path)
        return 0
    return run_on_gpu(args) if torch.cuda.is_available() else run_interpreted(args)


if __name__ == "__main__":
    sys.exit(main())
