"""Checks the fused SwiGLU kernel, times it against PyTorch over a range of row counts, saves a CSV and a plot.

    python benchmark.py

On a machine without a GPU the kernel is checked through Triton's interpreter, and nothing is timed.
"""

import argparse
import contextlib
import functools
import math
import os
import sys
import tempfile
import time
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
import torch.nn.functional as F
from tqdm import tqdm

from baseline_torch_swiglu import torch_swiglu

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it when the kernel is defined: import that later

MODELS = {  # K (hidden size), N (intermediate size)
    "llama-3-8b": (4096, 14336),
    "llama-3-70b": (8192, 28672),
    "mixtral-8x7b": (4096, 14336),
    "qwen2.5-7b": (3584, 18944),
    "tinyllama-1.1b": (2048, 5632),
    "small": (1024, 4096),
}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
LAYOUTS = ("linear", "row-major")
PROVIDERS = ("torch", "torch.compile", "packed torch.compile", "fused", "packed matmul only")
BACKWARD_PROVIDERS = ("torch", "torch.compile", "packed torch.compile", "fused", "fused, recomputing")
ON_REQUEST = ("fused, batch-invariant",)  # forward only
PEERS = ("liger-kernel", "flash-swiglu-mlp", "quack-kernels")  # other people's packages, timed where installed
EVERY_PROVIDER = tuple(dict.fromkeys(PROVIDERS + BACKWARD_PROVIDERS + ON_REQUEST + PEERS))
# What `ms` is: GPU time after a cache flush, of the forward pass or of both; GPU time where weights take turns; time
# that a call keeps the CPU busy.
FLUSHED, BACKWARD, ROTATING, HOST = "flushed cache", "forward + backward, flushed cache", "rotating weights", "host"
COLUMNS = ["gpu", "torch", "triton", "dtype", "layout", "M", "K", "N", "provider", "method"]
COLUMNS += ["ms", "ms_p20", "ms_p80", "tflops", "gbps", "speedup", "fraction_of_floor", "rel_error"]
COLUMNS += ["peak_mib", "kept_mib"]  # both passes only: beyond inputs; and between the passes, beyond inputs and result
RECORDED_PLOT = "results/h100_bfloat16_linear.png"

# The fused result is rounded once, to half a unit in the last place; twice that is allowed, plus what float32 sums
# lose where the result is near zero. Eager PyTorch in bfloat16 or float16, which rounds five times, does not pass.
TOLERANCES = {
    torch.bfloat16: {"rtol": 2**-7, "atol": 1e-4},
    torch.float16: {"rtol": 2**-10, "atol": 1e-4},
    torch.float32: {"rtol": 2e-5, "atol": 2e-5},
}
# What one rounding to the dtype costs at most, norm over norm; for float32, what a sum over K = 4096 costs.
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 3e-6}
INTERPRETED_SHAPES = ((1, 64, 96), (5, 1, 33), (17, 67, 45), (70, 130, 129), (130, 72, 136))  # M, K, N
ROUNDS = 5
ROTATION_BYTES = 2**30  # of weights: many times any L2 cache
HOST_SHAPE = 1, 512, 512  # M, K, N: the GPU is done long before the next call comes
HOST_CALLS = 1000


# ---- Data and checks ----


def make_inputs(M, K, N, dtype, layout, device):
    """x (M, K) and two weights (K, N), scaled so that x @ w and the result are of order one."""
    generator = torch.Generator(device).manual_seed(M + K + N)
    x, w_gate, w_up = (
        torch.randn(rows, K, generator=generator, device=device, dtype=torch.float32) for rows in (M, N, N)
    )
    weights = [(w * K**-0.5).to(dtype).t() for w in (w_gate, w_up)]
    if layout == "row-major":
        weights = [w.contiguous() for w in weights]
    return x.to(dtype), *weights


def make_dy(M, N, dtype, device):
    """A gradient of the result, of order one."""
    generator = torch.Generator(device).manual_seed(M + N)
    return torch.randn(M, N, generator=generator, device=device, dtype=torch.float32).to(dtype)


def reference(x, w_gate, w_up, dy=None):
    """The result in float64, or in float32 where float64 does not fit into the GPU's memory.

    With dy, the gradient of the result, also the gradients of the three inputs.
    """
    dtype = torch.float64
    if x.is_cuda:
        elements = x.numel() + 2 * w_gate.numel() + 5 * x.shape[0] * w_gate.shape[1]
        if (8 if dy is None else 24) * elements > torch.cuda.mem_get_info(x.device)[0]:
            dtype = torch.float32
    inputs = [t.detach().to(dtype) for t in (x, w_gate, w_up)]
    if dy is None:
        return torch_swiglu(*inputs)
    return differentiated(lambda leaves: torch_swiglu(*leaves), dy.to(dtype))([t.requires_grad_() for t in inputs])


def differentiated(run, dy):
    """`run`, a function of several leaves, and its backward pass: a function of the same.

    It returns the result and the gradient of each leaf that requires one, None if the result does not depend on it.
    """

    def both_passes(leaves):
        y = run(leaves)
        leaves = [t for t in leaves if t is not None and t.requires_grad]
        return y.detach(), *torch.autograd.grad(y, leaves, dy, allow_unused=True)

    return both_passes


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


def largest(errors):
    """NaN if one is there, which max() may pass by."""
    return torch.tensor(errors).max().item()


def relative_errors(results, expected):
    """Of the result alone, or of the result and the gradients of x, w_gate and w_up."""
    if isinstance(results, torch.Tensor):
        return [relative_error(results, expected)]
    y, dx, dw_gate, dw_up, *dw_packed = results
    if dw_gate is None:
        dw_gate, dw_up = dw_packed[0].chunk(2, dim=1)
    return [relative_error(*pair) for pair in zip((y, dx, dw_gate, dw_up), expected, strict=True)]


def check(run, expected, eager_errors=None):
    """Whether `run()` is right, and its relative errors. Those of gradients are judged by eager PyTorch's."""
    run()  # tuning runs every configuration over one output: only the call after it shows what is unwritten
    with nan_in_new_memory():
        results = run()
    errors = relative_errors(results, expected)
    y, expected_y = (results, expected) if len(errors) == 1 else (results[0], expected[0])
    correct = torch.allclose(y.to(expected_y.dtype), expected_y, **TOLERANCES[y.dtype])
    for error, eager_error in zip(errors[1:], (eager_errors or [])[1:], strict=True):
        correct &= error <= gradient_limit(y.dtype, eager_error)
    return correct, errors


def gradient_limit(dtype, eager_error):
    """The relative error that a gradient may have: eager PyTorch's, or what rounding gate, dgate and it may cost."""
    return max(1.05 * eager_error, 2 * ROUNDING[dtype])


# ---- Contenders and ceilings ----


class Operands(NamedTuple):
    """One x and one set of weights, with the forms of them that contenders want."""

    x: torch.Tensor
    w_gate: torch.Tensor
    w_up: torch.Tensor
    w_packed: torch.Tensor  # (K, 2N), w_gate then w_up
    w_interleaved: torch.Tensor | None  # (2N, K), a row of w_gate, a row of w_up, and so on


def make_operands(x, w_gate, w_up, args):
    gate_t, up_t = w_gate.t(), w_up.t()
    w_packed = torch.cat([gate_t, up_t]).t() if args.layout == "linear" else torch.cat([w_gate, w_up], dim=1)
    w_interleaved = torch.stack([gate_t, up_t], dim=1).flatten(0, 1) if "quack-kernels" in args.providers else None
    return Operands(x, w_gate, w_up, w_packed, w_interleaved)


def timed_operands(M, K, N, args):
    """Operands, and where the backward pass is timed as well the gradient of the result, else None."""
    operands = make_operands(*make_inputs(M, K, N, DTYPES[args.dtype], args.layout, "cuda"), args)
    if not args.backward:
        return operands, None
    operands = Operands(*(t if t is None else t.requires_grad_() for t in operands))
    return operands, make_dy(M, N, DTYPES[args.dtype], "cuda")


def make_contenders(names):
    """name -> function of Operands. Peers import their package when they are called."""
    from fused_triton_swiglu import fused_swiglu

    def packed_swiglu(x, w_packed):
        gate, up = (x @ w_packed).chunk(2, dim=-1)
        return F.silu(gate) * up

    def liger(o):
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        return LigerSiLUMulFunction.apply(o.x @ o.w_gate, o.x @ o.w_up)

    def flash_swiglu_mlp(o):
        from flash_swiglu_mlp.ops import gemm_swiglu

        return gemm_swiglu(o.x[None], o.w_gate.t(), o.w_up.t(), 1.0, False)[0][0]

    def quack(o):
        from quack.gemm_interface import gemm_gated

        return gemm_gated(o.x, o.w_interleaved.t(), activation="swiglu", store_preact=False)[1]

    torch.compiler.reset()  # each shape is compiled for itself: PyTorch gives up after eight on one function
    compiled = torch.compile(torch_swiglu, dynamic=False)
    packed_compiled = torch.compile(packed_swiglu, dynamic=False)
    contenders = {
        "torch": lambda o: torch_swiglu(o.x, o.w_gate, o.w_up),
        "torch.compile": lambda o: compiled(o.x, o.w_gate, o.w_up),
        "packed torch.compile": lambda o: packed_compiled(o.x, o.w_packed),
        "fused": lambda o: fused_swiglu(o.x, o.w_gate, o.w_up),
        "fused, recomputing": lambda o: fused_swiglu(o.x, o.w_gate, o.w_up, recompute=True),
        "fused, batch-invariant": lambda o: fused_swiglu(o.x, o.w_gate, o.w_up, batch_invariant=True),
        "packed matmul only": lambda o: o.x @ o.w_packed,
        "liger-kernel": liger,
        "flash-swiglu-mlp": flash_swiglu_mlp,
        "quack-kernels": quack,
    }
    return {name: contenders[name] for name in names}


def measure_ceilings(dtype):
    """(bytes per ms of a device-to-device copy, read and written; FLOPs per ms of a large matmul) on this card."""
    from triton.testing import do_bench

    def fastest(run):
        """Of bursts as short as the contenders': a longer one meets the card's power limit, and is beaten."""
        return min(do_bench(run, warmup=10, rep=60, return_mode="min") for _ in range(ROUNDS))

    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    bandwidth = 2 * source.nbytes / fastest(lambda: target.copy_(source))
    size = 8192 if dtype.itemsize == 2 else 4096
    a, b = (torch.randn(size, size, device="cuda").to(dtype) for _ in range(2))
    rate = 2 * size**3 / fastest(lambda: a @ b)
    return bandwidth, rate


# ---- Runs ----


def other_users():
    """Print what else uses this GPU. To be called before this process does."""
    try:
        busy, taken = torch.cuda.utilization(0), torch.cuda.device_memory_used(0) / 2**30  # 0: or CUDA would start
    except Exception as error:  # no nvidia-ml-py, or a driver that does not say, in NVML's own errors
        print(f"whether something else uses this GPU could not be checked: {error}")
        return
    if busy > 5 or taken > 1:
        print(f"WARNING: something else uses this GPU: it is {busy} % busy, and {taken:.1f} GiB are taken.")
        print("The times below are not those of a free GPU.")


def write_csv(rows, path):
    """All at once, so that whoever is interrupted leaves a whole file."""
    unfinished = path.with_suffix(".csv.unfinished")
    pd.DataFrame(rows, columns=COLUMNS).to_csv(unfinished, index=False, float_format="%.6g")
    unfinished.replace(path)


def error_line(provider, dtype, correct, errors, eager_errors):
    verdict = "" if correct else f"WRONG, beyond {TOLERANCES[dtype]} or, in a gradient, eager PyTorch's error: "
    pairs = zip(("y", "dx", "dw_gate", "dw_up"), errors, eager_errors, strict=False)
    return f"{verdict}error of {provider} (of eager PyTorch): " + ", ".join(
        f"{name} {error:.1e} ({eager_error:.1e})" for name, error, eager_error in pairs
    )


def environment(gpu):
    import triton

    return {"gpu": gpu, "torch": torch.__version__, "triton": triton.__version__}


def measure(M, K, N, args, ceilings, progress):
    """Rows of the table for one M, or None if the fused kernel is wrong there."""
    dtype = DTYPES[args.dtype]
    first, dy = timed_operands(M, K, N, args)
    operands = [first]
    x, w_gate, w_up = inputs = first[:3]
    contenders = forward = make_contenders(args.providers)
    if args.backward:
        contenders = {name: differentiated(run, dy) for name, run in forward.items()}
    expected = reference(*inputs, dy)
    reference_dtype = expected[0].dtype

    errors, memory = {}, {}
    for name, run in [*contenders.items()]:
        if name == "packed matmul only":
            continue
        try:
            errors[name] = relative_errors(run(operands[0]), expected)
        except Exception as error:
            if name not in PEERS:
                raise
            progress.write(f"M = {M:5}  {name} left out: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
            del contenders[name]
            continue
        if args.backward:
            memory[name] = memory_of(forward[name], operands[0], dy)
    for name in [name for name in contenders if name.startswith("fused")]:
        correct, errors[name] = check(lambda run=contenders[name]: run(operands[0]), expected, errors["torch"])
        line = error_line(name, dtype, correct, errors[name], errors["torch"])
        progress.write(f"M = {M:5}  {line}, against {reference_dtype}")
        if not correct:
            return None
    del expected

    if args.rotate_weights:
        sets = max(2, math.ceil(ROTATION_BYTES / (w_gate.nbytes + w_up.nbytes)))
        # w * 1 keeps the layout
        operands += [make_operands(x, w_gate * 1, w_up * 1, args) for _ in range(sets - 1)]
    times = {name: [] for name in contenders}
    for i in range(ROUNDS):  # in turn, so that a drifting clock hits all of them alike, and each after another one
        for name in [*contenders][i:] + [*contenders][:i]:
            progress.set_description(f"M = {M}, {name}")
            times[name] += gpu_times(contenders[name], operands, args)
            progress.update()

    bandwidth, rate = ceilings
    flops = 4 * M * N * K * (1 + 2 * args.backward)
    least_bytes = x.element_size() * (M * K + 2 * K * N + M * N) * (1 + args.backward)
    floor = max(least_bytes / bandwidth, flops / rate)
    method = ROTATING if args.rotate_weights else BACKWARD if args.backward else FLUSHED
    rows = summarize(times, {"M": M, "K": K, "N": N, "method": method}, args)
    for row in rows:
        row["tflops"] = flops / row["ms"] * 1e-9
        row["gbps"] = least_bytes / row["ms"] * 1e-6
        row["fraction_of_floor"] = floor / row["ms"]
        row["rel_error"] = largest(errors.get(row["provider"], [math.nan]))
        row["peak_mib"], row["kept_mib"] = memory.get(row["provider"], (None, None))
    return rows


def memory_of(run, leaves, dy):
    """MiB: at most during both passes beyond the leaves and dy, and kept between the two beyond the result as well."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    y = run(leaves)
    kept = torch.cuda.memory_allocated() - before - y.nbytes
    differentiated(lambda leaves: y, dy)(leaves)
    return (torch.cuda.max_memory_allocated() - before) / 2**20, kept / 2**20


def gpu_times(run, operands, args):
    """Milliseconds per call: after a flush of the cache, or with several operands in turn inside one CUDA graph."""
    from triton.testing import do_bench, do_bench_cudagraph

    if args.backward:  # long enough to meet the card's power limit, at which it trains
        return do_bench(lambda: run(operands[0]), warmup=100, rep=300, return_mode="all")
    if not args.rotate_weights:
        return do_bench(lambda: run(operands[0]), warmup=10, rep=60, return_mode="all")
    all_in_turn = do_bench_cudagraph(lambda: [run(o) for o in operands], rep=20, return_mode="all")
    return [ms / len(operands) for ms in all_in_turn]


def summarize(times, shape, args):
    """A row for each contender from its times in milliseconds."""
    rows = []
    for name in times:
        p20, ms, p80 = pd.Series(times[name]).quantile([0.2, 0.5, 0.8])
        row = {"dtype": args.dtype, "layout": args.layout, "provider": name, "ms": ms, "ms_p20": p20, "ms_p80": p80}
        rows.append(row | shape | {"speedup": pd.Series(times["torch"]).median() / ms})
    return rows


def measure_host_cost(args):
    """Rows of the table: how long a call keeps the CPU busy, thousands of calls without a synchronisation."""
    M, K, N = HOST_SHAPE
    operands, dy = timed_operands(M, K, N, args)
    names = [name for name in args.providers if name in ("torch", "torch.compile", "fused")]
    contenders = make_contenders(names)
    if args.backward:
        contenders = {name: differentiated(run, dy) for name, run in contenders.items()}
    times = {name: [] for name in names}
    for _ in range(ROUNDS):
        for name, run in contenders.items():
            run(operands)
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(HOST_CALLS):
                run(operands)
            times[name].append((time.perf_counter() - start) * 1e3 / HOST_CALLS)
    return summarize(times, {"M": M, "K": K, "N": N, "method": HOST}, args)


def run_on_gpu(args):
    K, N = args.k, args.n
    other_users()
    properties = environment(torch.cuda.get_device_name())
    print(f"{properties['gpu']}, PyTorch {properties['torch']}, Triton {properties['triton']}")
    print(f"{args.dtype}, K = {K}, N = {N}, {args.layout} weights")
    ceilings = measure_ceilings(DTYPES[args.dtype])
    bandwidth, rate = ceilings
    print(f"ceilings: copy {bandwidth * 1e-9:.2f} TB/s, matmul {rate * 1e-9:.0f} TFLOP/s")
    host_rows = measure_host_cost(args)
    host_costs = ", ".join(f"{row['provider']} {row['ms'] * 1e3:.1f}" for row in host_rows)
    passes = "both passes" if args.backward else "a call"
    print(f"host time of {passes}, us (M = {{}}, K = {{}}, N = {{}}): ".format(*HOST_SHAPE) + host_costs + "\n")

    kind = "_backward" if args.backward else "_rotating_weights" if args.rotate_weights else ""
    path = args.output_dir / f"swiglu_benchmark{kind}.csv"
    rows, status = [], 0
    with tqdm(
        total=len(args.m) * len(args.providers) * ROUNDS, unit="timing", dynamic_ncols=True, disable=None
    ) as progress:
        try:
            for M in args.m:
                measured = measure(M, K, N, args, ceilings, progress)
                if measured is None:
                    status = 1
                    break
                rows += measured
                write_csv([properties | row for row in host_rows + rows], path)
        except KeyboardInterrupt:
            progress.write("\ninterrupted: what was measured is kept")
            status = 130
        except torch.OutOfMemoryError as error:
            progress.write(f"\nM = {M}: {error}\nwhat was measured is kept")
            status = 1
    if rows:
        table = pd.read_csv(path)
        print_table(table)
        plot(table, path.with_suffix(".png"))
        print(f"\n{path}\n{path.with_suffix('.png')}")
    return status


def run_interpreted(args):
    from fused_triton_swiglu import fused_swiglu

    print("No GPU found: checking the kernel through Triton's interpreter, in all dtypes and layouts.")
    print("The shapes are small and fixed there: of the options only --backward and --output-dir matter.\n")
    properties = environment("none (Triton interpreter)")
    rows, status = [], 0
    cases = [(*shape, d, lay) for d in DTYPES for lay in LAYOUTS for shape in INTERPRETED_SHAPES]
    for M, K, N, dtype, layout in tqdm(cases, unit="case", leave=False, dynamic_ncols=True, disable=None):
        inputs = make_inputs(M, K, N, DTYPES[dtype], layout, "cpu")
        runs, dy = {"torch": lambda t: torch_swiglu(*t), "fused": lambda t: fused_swiglu(*t)}, None
        if args.backward:
            inputs = [t.requires_grad_() for t in inputs]
            dy = make_dy(M, N, DTYPES[dtype], "cpu")
            runs["fused, recomputing"] = lambda t: fused_swiglu(*t, recompute=True)
            runs = {provider: differentiated(run, dy) for provider, run in runs.items()}
        expected = reference(*inputs, dy)
        eager_errors = relative_errors(runs.pop("torch")(inputs), expected)
        shape = {"dtype": dtype, "layout": layout, "M": M, "K": K, "N": N}
        rows.append(properties | shape | {"provider": "torch", "rel_error": largest(eager_errors)})
        for provider, run in runs.items():
            correct, errors = check(functools.partial(run, inputs), expected, eager_errors)
            status |= not correct
            rows.append(properties | shape | {"provider": provider, "rel_error": largest(errors)})
            line = f"{dtype:9} {layout:10} M = {M:3}  K = {K:3}  N = {N:3}  "
            tqdm.write(line + error_line(provider, DTYPES[dtype], correct, errors, eager_errors))
    path = args.output_dir / f"swiglu_benchmark{'_backward' if args.backward else ''}.csv"
    write_csv(rows, path)
    print(f"\n{path}")
    print(f"Speed was not measured: that needs a GPU. The plot of a recorded run on an H100 is {RECORDED_PLOT}")
    return int(status)


# ---- Output ----


def print_table(table):
    """Median microseconds by M and provider, then the fused kernel's place, and memory where it was measured."""
    table = table[table.method != HOST]
    columns = [name for name in EVERY_PROVIDER if name in set(table.provider)]
    microseconds = table.pivot(index="M", columns="provider", values="ms")[columns] * 1e3
    formats = dict.fromkeys(microseconds, "{:.1f}".format) | {
        "fused: speed-up": "{:.2f}x".format,
        "of the floor": "{:.0%}".format,
    }
    if "fused" in columns:
        fused = table[table.provider == "fused"].set_index("M")
        microseconds = microseconds.assign(
            **{"fused: speed-up": fused.speedup, "of the floor": fused.fraction_of_floor}
        )
    print("\nmicroseconds, median\n")
    print(microseconds.to_string(formatters={name: formats[name] for name in microseconds}))
    for column, title in (("peak_mib", "at most, beyond the inputs"), ("kept_mib", "kept for the backward pass")):
        if table[column].notna().any():
            print(f"\nMiB {title}\n")
            print(
                table.pivot(index="M", columns="provider", values=column)[columns].to_string(
                    float_format="{:.0f}".format
                )
            )


def plot(table, path):
    """Speed-up over eager PyTorch by M, for one shape; beside it the share of the floor or, for both passes, memory."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import PercentFormatter, StrMethodFormatter

    table = table[table.method != HOST].sort_values("M")
    colors = {
        "fused": "#d62728",
        "fused, recomputing": "#ff7f0e",
        "fused, batch-invariant": "#ff7f0e",
        "torch": "#1f77b4",
        "torch.compile": "#17a2b8",
        "packed torch.compile": "#2ca02c",
        "packed matmul only": "#9a9a9a",
        "liger-kernel": "#e377c2",
        "flash-swiglu-mlp": "#8c564b",
        "quack-kernels": "#9467bd",
    }
    passes, right = "forward", ("fraction_of_floor", "share of the card's limit reached, higher is better")
    if table.peak_mib.notna().any():
        eager = table[table.provider == "torch"].set_index("M").peak_mib
        table = table.assign(memory=table.peak_mib / table.M.map(eager))
        passes, right = "forward + backward", ("memory", "peak memory beyond the inputs, lower is better")
    figure, axes = plt.subplots(1, 2, figsize=(13, 5.4), layout="constrained")
    panels = (("speedup", "speed-up over eager PyTorch, higher is better"), right)
    for axis, (column, title) in zip(axes, panels, strict=True):
        ends = {}
        for name in (name for name in EVERY_PROVIDER if name in set(table.provider)):
            rows = table[table.provider == name]
            style = {"color": colors[name], "linewidth": 2.8 if name == "fused" else 1.6}
            if name == "packed matmul only":  # no contender: it leaves silu and the product out
                style["linestyle"] = ":"
            axis.plot(rows.M, rows[column], marker="o", markersize=4, **style)
            if column != "memory":
                low, high = rows[column] * rows.ms / rows.ms_p80, rows[column] * rows.ms / rows.ms_p20
                axis.fill_between(rows.M, low, high, color=colors[name], alpha=0.1, linewidth=0)
            ends[name] = rows[column].iloc[-1]
        label_ends(axis, ends, colors, table.M.max())
        axis.set_xscale("log", base=2)
        axis.set_xticks(sorted(table.M.unique()), [str(M) for M in sorted(table.M.unique())], rotation=45)
        axis.minorticks_off()
        axis.margins(x=0.02)
        axis.set_xlabel("M (rows of x: tokens)")
        axis.set_title(title)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].yaxis.set_major_formatter(StrMethodFormatter("{x:.2f}x"))
    axes[1].yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    if passes == "forward":
        axes[1].axhline(1, color="grey", linestyle="--", linewidth=1.2)
        floor_text = "floor: measured bandwidth or matmul rate"
        place = {"xytext": (0, 4), "textcoords": "offset points"}
        axes[1].annotate(floor_text, (table.M.min(), 1), **place, color="grey", fontsize=9)
    else:
        axes[1].set_ylabel("of eager PyTorch's")
    first = table.iloc[0]
    figure.suptitle(
        f"SwiGLU {passes}, {first.gpu}, {first['dtype']}, K = {first.K}, N = {first.N}, {first.layout} weights, "
        f"{first.method.split(', ')[-1]} (torch {first.torch}, triton {first.triton})",
        fontsize=12,
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)


def label_ends(axis, ends, colors, x):
    """Write each line's name at its right end, pushed apart where names would overlap."""
    low, high = axis.get_ylim()
    gap = 0.05 * (high - low)
    names = sorted(ends, key=ends.get)
    pushed_up = list(accumulate((ends[name] for name in names), lambda below, y: max(y, below + gap)))
    pushed_down = list(accumulate((ends[name] for name in names[::-1]), lambda above, y: min(y, above - gap)))[::-1]
    for name, up, down in zip(names, pushed_up, pushed_down, strict=True):
        axis.annotate(
            name,
            (x, (up + down) / 2),
            (8, 0),
            textcoords="offset points",
            va="center",
            color=colors[name],
            weight="bold" if name == "fused" else "normal",
            annotation_clip=False,
        )


# ---- Command line ----


def positive_int(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default_m = [1, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384]
    parser.add_argument("--m", type=positive_int, nargs="+", default=default_m, metavar="M", help="rows of x to time")
    parser.add_argument("--k", type=positive_int, metavar="K", help="input features (4096)")
    parser.add_argument("--n", type=positive_int, metavar="N", help="hidden features (14336)")
    models = ", ".join(f"{name} {shape}" for name, shape in MODELS.items())
    parser.add_argument("--model", choices=MODELS, metavar="NAME", help=f"K and N of a model: {models}")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="bfloat16", help="of x, the weights and the result (bfloat16)"
    )
    layout_help = "linear: (N, K) in memory, as nn.Linear keeps them; row-major: (K, N)"
    parser.add_argument("--layout", choices=LAYOUTS, default="linear", help=layout_help)
    provider_help = (
        f"contenders, from: {', '.join(map(repr, EVERY_PROVIDER))}, or all (torch is always there; "
        f"{', '.join(ON_REQUEST)} only if named, or with all; so are {', '.join(PEERS)}, where installed)"
    )
    parser.add_argument("--providers", choices=(*EVERY_PROVIDER, "all"), nargs="+", metavar="P", help=provider_help)
    backward_help = "the forward and the backward pass together, and the memory they take"
    parser.add_argument("--backward", action="store_true", help=backward_help)
    rotate_help = "several sets of weights in turn inside a CUDA graph, as in a model, instead of a flushed cache"
    parser.add_argument("--rotate-weights", action="store_true", help=rotate_help)
    parser.add_argument("--output-dir", type=Path, default=Path(), metavar="DIR", help="where to write (here)")
    parser.add_argument("--plot", type=Path, metavar="CSV", help="only draw a CSV of an earlier run again")
    args = parser.parse_args(argv)
    if args.model and (args.k or args.n):
        parser.error("--model gives K and N: leave --k and --n out, or --model")
    K, N = MODELS[args.model or "llama-3-8b"]
    args.k, args.n = args.k or K, args.n or N
    args.m = sorted(set(args.m))
    if args.backward and args.rotate_weights:
        parser.error("--backward and --rotate-weights exclude each other")
    own = BACKWARD_PROVIDERS if args.backward else PROVIDERS
    possible = own + (() if args.backward else ON_REQUEST) + PEERS
    if wrong := set(args.providers or ()) - {*possible, "all"}:
        parser.error(f"--providers {' '.join(sorted(wrong))}: not {'with' if args.backward else 'without'} --backward")
    chosen = {"torch", *(args.providers or own)}
    args.providers = [name for name in possible if name in chosen or "all" in chosen]
    if args.plot and not args.plot.is_file():
        parser.error(f"--plot {args.plot}: no such file")
    if args.plot:
        args.table = pd.read_csv(args.plot)
        if missing := set(COLUMNS) - set(args.table):
            parser.error(f"--plot {args.plot}: no column {', '.join(sorted(missing))}")
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
