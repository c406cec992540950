"""Checks the fused SwiGLU kernel, times it against PyTorch over a range of row counts, saves a CSV and a plot.

    python benchmark.py

Every contender is timed in two ways. "Call by call": one call at a time from Python, after a flush of the L2 cache, as
a user of eager PyTorch sees it. "In a model": several sets of weights in turn inside one CUDA graph, as a served model
runs its layers; the host's speed does not matter, and all contenders share one clock. The measured limit is the time of
the bytes at a copy's rate or of the multiplications at one large matmul's, whichever is longer, measured at the start.
Without a GPU the kernel is checked through Triton's interpreter, and nothing is timed.
"""

import argparse
import contextlib
import copy
import datetime
import gc
import itertools
import math
import os
import random
import re
import shlex
import signal
import sys
import tempfile
import time
import traceback
from collections import deque, namedtuple
from functools import cache, partial
from importlib import import_module
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

os.environ["MPLBACKEND"] = "agg"  # notebooks name one that is not installed here, perhaps, and files need none
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from tqdm import tqdm

import baseline_torch_swiglu as baseline

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read while Triton and the kernel are imported, below

import triton
from triton.testing import do_bench

from fused_triton_swiglu import fused_swiglu

MODELS = {"llama-3-8b": (4096, 14336), "llama-3-70b": (8192, 28672), "tinyllama-1.1b": (2048, 5632)}  # K, N
DTYPES = {name: getattr(torch, name) for name in ("bfloat16", "float16", "float32", "float8_e4m3fn")}
LAYOUTS = ("linear", "row-major")
PROVIDERS = ("torch", "torch-compile", "packed-torch-compile", "fused", "packed-matmul-only")
BACKWARD_PROVIDERS = ("torch", "torch-compile", "packed-torch-compile", "fused", "fused-recompute")
ON_REQUEST = ("fused-batch-invariant",)  # forward only
PEERS = ("liger-kernel", "flash-swiglu-mlp", "quack-kernels")  # other people's packages, timed where installed
EVERY_PROVIDER = tuple(dict.fromkeys(PROVIDERS + BACKWARD_PROVIDERS + ON_REQUEST + PEERS))
COLORS = dict(zip(EVERY_PROVIDER, ("C0", "#17a2b8", "C2", "C3", "C7", "C1", "C1", "C6", "C5", "C4"), strict=True))
CALLS, MODEL, HOST = "call by call", "in a model", "host"  # two of GPU time, see above; how long a call busies the CPU
NAMED = ["date", "command", "gpu", "torch", "triton", "dtype", "layout", "K", "N"]  # the same in a run's GPU times
COLUMNS = [*NAMED, "M", "provider", "method", "ms", "ms_p20", "ms_p80", "speedup", "share_of_limit", "rel_error"]
COLUMNS += ["peak_mib", "kept_mib"]  # of both passes: MiB beyond the inputs; between the two, beyond the result as well
RECORDED_PLOT = "results/h200_bfloat16_linear_4096x14336.png"

INTERPRETED_SHAPES = ((1, 64, 96), (5, 1, 33), (17, 67, 45), (70, 130, 129), (130, 72, 136))  # M, K, N
ROUNDS = 3
# Under load the clock falls for 100 ms, by up to a tenth, until the power fits. Call by call a turn warms up that long,
# to the contender's own clock. In a model most turns are far shorter: all share one, and ratios repeat on another card.
TURNS = {CALLS: ROUNDS, MODEL: 50}
MODEL_BYTES = 2**30  # of weights: many times any L2 cache
HOST_SHAPES = (1, 512, 512), (256, 512, 5632)  # M, K, N: for the Triton kernel and, in 8 and 16 bits, Hopper's
HOST_BLOCKS, HOST_CALLS = 50, 20  # calls in a block: so few that none waits for the GPU


def check_contenders(contenders, operands, dy, scales):
    """Of each fused kernel what is wrong with it, or "", and each contender's relative errors."""
    verdicts, errors, dtype = {}, {}, operands.x.dtype
    expected = baseline.reference(*operands[:3], dy, scales)
    for name, run in [*contenders.items()]:
        if name.startswith("fused"):
            correct, errors[name] = baseline.check(lambda run=run: run(operands), expected, dtype, errors["torch"])
            pairs = zip(("y", "dx", "dw_gate", "dw_up"), errors[name], errors["torch"], strict=False)
            pairs = ", ".join(f"{of} {error:.1e} ({eager_error:.1e})" for of, error, eager_error in pairs)
            limit = f"beyond {baseline.TOLERANCES[dtype]} or, in a gradient, eager PyTorch's error"
            verdicts[name] = "" if correct else f"{limit}; relative errors (eager PyTorch's) {pairs}"
        elif name != "packed-matmul-only":
            with left_out_if_it_fails(name, contenders):
                errors[name] = baseline.relative_errors(run(operands), expected)
    return verdicts, errors


@contextlib.contextmanager
def left_out_if_it_fails(name, contenders):
    """A peer: whether and where other people's packages work is their own affair."""
    try:
        yield
    except Exception as error:
        if name not in PEERS:
            raise
        del contenders[name]
        tqdm.write(f"{name} left out: {in_one_line(error)}")


def in_one_line(error):
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}".removesuffix(": ")


# One x and one set of weights, with the forms of them that contenders want: w_packed is (K, 2N), w_gate then w_up;
# w_interleaved is (2N, K), a row of w_gate, a row of w_up, and so on, and empty where nobody wants it.
Operands = namedtuple("Operands", ["x", "w_gate", "w_up", "w_packed", "w_interleaved"])


def make_operands(M, K, N, args):
    """Operands; the gradient of the result if the backward pass is timed as well, else None; scales in float8."""
    device, dtype = "cuda" if torch.cuda.is_available() else "cpu", DTYPES[args.dtype]
    inputs = baseline.make_inputs(M, K, N, torch.float32 if dtype == baseline.FLOAT8 else dtype, args.layout, device)
    (x, w_gate, w_up), scales = baseline.quantised(*inputs) if dtype == baseline.FLOAT8 else (inputs, ())
    gate_t, up_t = w_gate.t(), w_up.t()
    w_packed = torch.cat([gate_t, up_t]).t() if args.layout == "linear" else torch.cat([w_gate, w_up], dim=1)
    interleaved = "quack-kernels" in args.providers
    w_interleaved = torch.stack([gate_t, up_t], dim=1).flatten(0, 1) if interleaved else x.new_empty(0)
    leaves = [t.requires_grad_(args.backward) for t in (x, w_gate, w_up, w_packed, w_interleaved)]
    return Operands(*leaves), baseline.make_dy(M, N, dtype, device) if args.backward else None, scales


def make_contenders(names, scales):
    """name -> function of Operands. Peers import their package when they are called."""
    naive, matmul, fused, packed_scales = baseline.torch_swiglu, torch.matmul, fused_swiglu, ()
    if scales:
        naive, matmul, fused = baseline.torch_swiglu_float8, baseline.scaled_mm, partial(fused_swiglu, scales=scales)
        packed_scales = scales[0], torch.cat(scales[1:], dim=1)

    def packed_swiglu(x, w_packed, *packed_scales):
        gate, up = matmul(x, w_packed, *packed_scales).chunk(2, dim=-1)
        return F.silu(gate) * up

    torch.compiler.reset()  # each shape is compiled for itself: PyTorch gives up after eight on one function
    compiled, packed_compiled = (torch.compile(run, dynamic=False) for run in (naive, packed_swiglu))
    contenders = {
        "torch": lambda o: naive(o.x, o.w_gate, o.w_up, *scales),
        "torch-compile": lambda o: compiled(o.x, o.w_gate, o.w_up, *scales),
        "packed-torch-compile": lambda o: packed_compiled(o.x, o.w_packed, *packed_scales),
        "fused": lambda o: fused(o.x, o.w_gate, o.w_up),
        "fused-recompute": lambda o: fused(o.x, o.w_gate, o.w_up, recompute=True),
        "fused-batch-invariant": lambda o: fused(o.x, o.w_gate, o.w_up, batch_invariant=True),
        "packed-matmul-only": lambda o: matmul(o.x, o.w_packed, *packed_scales),
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


def measure_limits(dtype):
    """The card's limits: bytes per ms of a device-to-device copy, read and written; FLOPs per ms of a large matmul."""

    def fastest(run):  # in short bursts, at full clock: at one that power limits it would be no limit for others
        return min(do_bench(run, warmup=10, rep=60, return_mode="min") for _ in range(ROUNDS))

    source = torch.randn(2**28, device="cuda")
    bandwidth = 2 * source.nbytes / fastest(source.clone)
    size = 4096 if dtype.itemsize == 4 else 8192
    a, b = (torch.randn(size, size, device="cuda").to(dtype) for _ in range(2))
    one = torch.ones((), device="cuda")
    rate = 2 * size**3 / fastest(lambda: baseline.scaled_mm(a, b.t(), one, one) if dtype == baseline.FLOAT8 else a @ b)
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


def new_path(folder, gpu, kind):
    """Of a CSV named after both, that neither exists nor has a plot beside it. It does now, empty."""
    gpu = re.sub(r"[^a-z0-9]+", "-", gpu.lower().removeprefix("nvidia "))
    for number in itertools.count(1):
        path = folder / f"{gpu}_{kind}{f'_{number}' if number > 1 else ''}.csv"
        with contextlib.suppress(FileExistsError):
            if not path.with_suffix(".png").exists():
                path.touch(exist_ok=False)
                return path


def write_csv(rows, path):
    """All at once, so that whoever is interrupted leaves a whole file."""
    unfinished = path.with_suffix(".unfinished")
    try:
        pd.DataFrame(rows, columns=COLUMNS).to_csv(unfinished, index=False, float_format="%.6g")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def measure(M, args, limits):
    """What check_contenders says of the fused kernels for this M and, if nothing is wrong, rows of the table."""
    K, N = args.k, args.n
    first, dy, scales = make_operands(M, K, N, args)
    forward = make_contenders(args.providers, scales)
    contenders = {name: baseline.differentiated(run, dy) for name, run in forward.items()}
    verdicts, errors = check_contenders(contenders, first, dy, scales)
    if any(verdicts.values()):
        return verdicts, []
    memory = {}
    for name in [*contenders] * args.backward:
        with left_out_if_it_fails(name, contenders):
            memory[name] = memory_of(forward[name], first, dy)
    sets = max(2, math.ceil(MODEL_BYTES / (first.w_gate.nbytes + first.w_up.nbytes)))
    operands = [first, *(copy.deepcopy(first)._replace(x=first.x) for _ in range(sets - 1))]
    calls, model = (times_in_turn(contenders, operands, method, M) for method in (CALLS, MODEL))
    least_bytes = first.x.nbytes + first.w_gate.nbytes + first.w_up.nbytes + M * N * max(first.x.element_size(), 2)
    limit = max(least_bytes * (1 + args.backward) / limits[0], 4 * M * N * K * (1 + 2 * args.backward) / limits[1])
    rows = summarize({name: calls[name] for name in model}, CALLS, M, K, N) + summarize(model, MODEL, M, K, N)
    for row in rows:
        row["share_of_limit"] = limit / row["ms"]
        row["rel_error"] = np.max(errors.get(row["provider"], math.nan))  # NaN if one is there
        row["peak_mib"], row["kept_mib"] = memory.get(row["provider"], (None, None))
    return verdicts, rows


def times_in_turn(contenders, operands, method, M):
    """name -> milliseconds of its calls. contenders: name -> function of one of the operands; peers that fail go."""
    pool = torch.cuda.graph_pool_handle()  # of all graphs but the peers', as a capture that fails spoils it for others

    @cache
    def timer(name):
        if method == CALLS:
            return partial(do_bench, partial(contenders[name], operands[0]), warmup=100, rep=100, return_mode="all")
        return in_a_graph(contenders[name], operands, None if name in PEERS else pool)

    times = {name: [] for name in contenders}
    for i in tqdm(range(TURNS[method]), f"M = {M}, {method}", leave=False, disable=None):
        for name in random.Random(i).sample([*contenders], len(contenders)):  # in another order each turn
            with left_out_if_it_fails(name, contenders):
                times[name] += timer(name)()
    return {name: times[name] for name in contenders}


def memory_of(run, leaves, dy):
    """MiB: at most during both passes beyond the leaves and dy, and kept between the two beyond the result as well."""
    torch.cuda.synchronize()
    gc.collect()  # or tensors in cycles are counted, and may go meanwhile
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    y = run(leaves)
    kept = torch.cuda.memory_allocated() - before - y.nbytes
    baseline.differentiated(lambda leaves: y, dy)(leaves)
    return (torch.cuda.max_memory_allocated() - before) / 2**20, kept / 2**20


def in_a_graph(run, operands, pool):
    """A function that times a call in a CUDA graph, where `run` takes all operands in turn until 2 ms have passed."""
    ms = do_bench(lambda: deque(map(run, operands), maxlen=0), warmup=1, rep=1, return_mode="min")  # tunes as well
    graph, many = torch.cuda.CUDAGraph(), operands * math.ceil(2 / ms)
    gc.disable()  # a kernel that is collected now unloads itself, which spoils the capture
    with torch.cuda.stream(torch.cuda.Stream()), torch.cuda.graph(graph, pool=pool):  # a failure stays in its stream
        deque(map(run, many), maxlen=0)  # keeps no result
    gc.enable()

    def time_a_call():
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        graph.replay()  # not timed: it meets the cache and the clock that another contender left
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return [start.elapsed_time(end) / len(many)]

    return time_a_call


def summarize(times, method, M, K, N):
    """A row for each contender, from its times in milliseconds."""
    rows = []
    for name, ms in times.items():
        p20, median, p80 = np.quantile(ms, [0.2, 0.5, 0.8])
        row = {"M": M, "K": K, "N": N, "provider": name, "method": method, "ms": median, "ms_p20": p20, "ms_p80": p80}
        rows.append(row | {"speedup": np.median(times["torch"]) / median})
    return rows


def measure_host_cost(args):
    """Rows of the table: how long a call keeps the CPU busy, by blocks of calls in turn."""
    names, rows = [name for name in ("torch", "torch-compile", "fused") if name in args.providers], []
    for shape in HOST_SHAPES:
        operands, dy, scales = make_operands(*shape, args)
        contenders = make_contenders(names, scales)
        times = {name: [] for name in names}
        for block, name in itertools.product(range(HOST_BLOCKS + 1), names):
            run = baseline.differentiated(contenders[name], dy)
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(HOST_CALLS):
                run(operands)
            if block > 0:  # the first compiles and tunes
                times[name].append((time.perf_counter() - start) * 1e3 / HOST_CALLS)
        rows += summarize(times, HOST, *shape)
    return rows


def run_on_gpu(args, checked):
    other_users()
    command = shlex.join(["python", "benchmark.py", *sys.argv[1:]]).encode(errors="backslashreplace").decode()
    named = {"date": datetime.date.today().isoformat(), "command": command, "gpu": torch.cuda.get_device_name()}
    named |= {"torch": torch.__version__, "triton": triton.__version__, "dtype": args.dtype, "layout": args.layout}
    print("{gpu}, PyTorch {torch}, Triton {triton}".format(**named))
    print(f"{args.dtype}, K = {args.k}, N = {args.n}, {args.layout} weights")
    kind = f"{args.dtype}_{args.layout}_{args.k}x{args.n}{'_backward' * args.backward}"
    path, rows = new_path(args.output_dir, named["gpu"], kind), []
    try:
        bandwidth, rate = limits = measure_limits(DTYPES[args.dtype])
        print(f"measured limits: copy {bandwidth * 1e-9:.2f} TB/s, matmul {rate * 1e-9:.0f} TFLOP/s")
        host_rows = [named | row for row in measure_host_cost(args)]
        for shape, of_shape in itertools.groupby(host_rows, lambda row: (row["M"], row["K"], row["N"])):
            host_costs = ", ".join(f"{row['provider']} {row['ms'] * 1e3:.1f}" for row in of_shape)
            print(f"host time of a call, us (M, K, N = {shape}): {host_costs}")
        print(f"\nus {CALLS} | {MODEL}")
        for M in args.m:
            verdicts, measured = measure(M, args, limits)
            checked |= {f"M = {M}, {name}": verdict for name, verdict in verdicts.items()}
            by_provider = pd.DataFrame(measured, columns=COLUMNS).groupby("provider", sort=False).ms
            medians = [f"{name} {' | '.join(f'{ms * 1e3:.1f}' for ms in pair)}" for name, pair in by_provider]
            print(f"M = {M:5}  {', '.join(medians) or 'WRONG, not timed'}")
            rows += [named | row for row in measured]
            if rows:
                write_csv(host_rows + rows, path)
    finally:
        previous = signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not cost the table and the plot
        try:
            report(host_rows + rows if rows else [], path)
        finally:
            signal.signal(signal.SIGINT, previous)


def report(rows, path):
    """The CSV and the plot of what was measured, and its tables, even if one of these fails."""
    table = pd.DataFrame(rows, columns=COLUMNS)
    try:
        if rows:
            write_csv(rows, path)
            plot(table, path.with_suffix(".png"))
            print(f"\n{path}, {path.with_suffix('.png').name}")
    except OSError:  # a full disk, say
        path.with_suffix(".png").unlink(missing_ok=True)
        print(f"\nnot all could be written; the CSV would hold\n\n{table.to_csv(index=False)}")
        raise
    finally:
        if path.stat().st_size == 0:
            path.unlink()
        if rows:
            print_tables(table)


def verdict(checked, ended):
    """Print the last line, return the exit status. `checked`: a name, and what is wrong with it, or ""."""
    wrong = [f"{name}: {sentence}" for name, sentence in checked.items() if sentence]
    if ended is not None:
        print(f"ENDED by {in_one_line(ended)}, after:", end=" ")
    if wrong:
        print(f"WRONG in {len(wrong)} of {len(checked)} checks: {'; '.join(wrong)}")
    else:
        print(f"{len(checked)} checks of the fused kernel passed, none failed")
    return 130 if isinstance(ended, KeyboardInterrupt) else int(bool(wrong or ended))


def run_interpreted(args, checked):
    print("No GPU found: checking the kernel through Triton's interpreter, in all dtypes and layouts.")
    print("The shapes are small and fixed there: of the options only --backward matters.\n")
    for args.dtype in DTYPES:
        float8, largest = DTYPES[args.dtype] == baseline.FLOAT8, {}
        if float8 and args.backward:
            continue
        for args.layout, shape in itertools.product(LAYOUTS[:1] if float8 else LAYOUTS, INTERPRETED_SHAPES):
            operands, dy, scales = make_operands(*shape, args)
            contenders = make_contenders(["torch", "fused"] + ["fused-recompute"] * args.backward, scales)
            both = {name: baseline.differentiated(run, dy) for name, run in contenders.items()}
            verdicts, errors = check_contenders(both, operands, dy, scales)
            where = f"{args.dtype}, {args.layout}, M, K, N = {shape}"
            checked |= {f"{where}, {name}": verdict for name, verdict in verdicts.items()}
            largest = {name: np.max([largest.get(name, 0), *of]) for name, of in errors.items()}
        print(f"{args.dtype:13}  largest relative error: {', '.join(f'{n} {e:.1e}' for n, e in largest.items())}")
    print(f"\nSpeed was not measured: that needs a GPU. The plot of a recorded run is {RECORDED_PLOT}")


def print_tables(table):
    """For each method: median microseconds by M and provider, and the fused kernel's place. Memory if measured."""
    for method in (CALLS, MODEL):
        by_m = table[table.method == method].pivot(index="M", columns="provider")
        names = table.provider[table.method == method].unique()
        times = by_m.ms[names] * 1e3
        if "fused" in names:
            times["fused: speed-up"] = by_m.speedup.fused.map("{:.2f}x".format)
            times["of the limit"] = by_m.share_of_limit.fused.map("{:.0%}".format)
        print(f"\nmicroseconds, median, {method}\n\n" + times.to_string(float_format="{:.1f}".format))
    for column, title in (("peak_mib", "at most, beyond the inputs"), ("kept_mib", "kept for the backward pass")):
        if table[column].notna().any():
            print(f"\nMiB {title}\n\n" + by_m[column][names].to_string(float_format="{:.0f}".format))


def plot(table, path):
    """Speed-up over eager PyTorch by M; beside it the share of the measured limit or, for both passes, memory."""
    first, names = table.iloc[-1], table.provider[table.method == CALLS].unique()
    calls, model = (table[table.method == m].pivot(index="M", columns="provider") for m in (CALLS, MODEL))
    panels = {f"speed-up over eager PyTorch, {CALLS}, higher is better": (calls.speedup, calls, "{x:.2f}x")}
    both = table.peak_mib.notna().any()
    if both:
        memory = calls.peak_mib.div(calls.peak_mib.torch, axis=0)
        panels["peak memory beyond the inputs, of eager PyTorch's, lower is better"] = memory, None, "{x:.0%}"
    else:
        share = f"share of the measured limit, {MODEL}, higher is better"
        panels[share] = model.share_of_limit, model, "{x:.0%}"
    figure = Figure(figsize=(13, 5.4), layout="constrained")
    for axis, (title, (values, by_m, unit)) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        lines = {name: values[name] for name in names}
        if by_m is calls and "fused" in names:
            lines[f"fused, {MODEL}"] = model.speedup.fused
        for label, line in lines.items():
            name = label.partition(",")[0]
            # The bare matmul is no contender: it leaves silu and the product out.
            style = {"linestyle": ":" if name == "packed-matmul-only" else "-" if name == label else "--"}
            style |= {"linewidth": 2.8 if label == "fused" else 1.6, "color": COLORS[name]}
            axis.plot(line.index, line, marker="o", markersize=4, **style)
        limits = axis.get_ylim()  # of the medians: no outlier is to squeeze them
        for name in {"torch", "fused"} & {*names} if by_m is not None else ():
            low, high = (values[name] * by_m.ms[name] / by_m[slower][name] for slower in ("ms_p80", "ms_p20"))
            axis.fill_between(values.index, low, high, color=COLORS[name], alpha=0.12, linewidth=0)
        axis.set_ylim(limits)
        # Names stand at the lines' ends, halfway between pushed up and pushed down until none overlap, beside the axis.
        *steps, room = np.arange(len(lines) + 1) * 0.05 * np.ptp(limits)
        free = pd.Series({label: line.ffill().iloc[-1] for label, line in lines.items()}).sort_values() - steps
        free = (free.cummax() + free[::-1].cummin()[::-1]) / 2
        for label, y in (free.clip(limits[0], limits[1] - room) + steps).items():
            style = {"color": COLORS[label.partition(",")[0]], "weight": "bold" if label == "fused" else "normal"}
            style |= {"textcoords": "offset points", "annotation_clip": False, "va": "center"}
            axis.annotate(label, (values.index[-1], y), (8, 0), **style)
        axis.set_xscale("log", base=2)
        axis.set_xticks(values.index, values.index, rotation=45)
        axis.minorticks_off()
        axis.set(xlabel="M (rows of x: tokens)", xmargin=0.02, title=title)
        axis.yaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10]))  # ticks that two digits can name
        axis.yaxis.set_major_formatter(unit)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"SwiGLU forward{' + backward' if both else ''}, {first.gpu}, {first['dtype']}, K = {first.K}, N = {first.N}, "
        f"{first.layout} weights (torch {first.torch}, triton {first.triton}, {first.date})",
        parse_math=False,
    )
    figure.savefig(path, dpi=130)


def read_run(path):
    """The table of one run of this benchmark. ValueError where the file holds something else."""
    numbers = dict.fromkeys("KNM", int) | dict.fromkeys(COLUMNS[12:], float)
    table = pd.read_csv(path, usecols=COLUMNS, dtype=numbers, compression=None)
    timed = table[table.method != HOST]
    columns = timed.pivot(index="M", columns=["method", "provider"], values="ms")  # ValueError: one is there twice
    calls, model = ({*columns.get(method, {})} for method in (CALLS, MODEL))
    whole = columns.drop(columns=[*PEERS], level=1, errors="ignore").notna()  # a peer may fail for some M
    sensible = (timed[["M", *COLUMNS[12:16]]] > 0).all(axis=None) and np.isfinite(timed.ms).all()
    one_run = sensible and whole.all(axis=None) and timed.groupby(NAMED, dropna=False).ngroups == 1
    if not one_run or calls != model or "torch" not in calls or not calls <= {*EVERY_PROVIDER}:
        raise ValueError("expected one run of this benchmark, with each contender once for each M and method")
    return table


def positive_int(text):
    value = int(text)
    if not 0 < value < 2**31:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more, and less than 2**31")
    return value


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    m = [1, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384]
    add("--m", type=positive_int, nargs="+", default=m, metavar="M", help="rows of x to time")
    add("--model", choices=MODELS, default="llama-3-8b", metavar="NAME", help=f"K and N of a model: {MODELS}")
    add("--k", type=positive_int, metavar="K", help="input features (the model's)")
    add("--n", type=positive_int, metavar="N", help="hidden features (the model's)")
    add("--dtype", choices=DTYPES, default="bfloat16", help="of x and the weights; float8 gives bfloat16 (bfloat16)")
    add("--layout", choices=LAYOUTS, default="linear", help="linear: (N, K) in memory (nn.Linear); row-major: (K, N)")
    providers = f"contenders, of {EVERY_PROVIDER}, or all. torch is always there, {ON_REQUEST + PEERS} if asked for"
    add("--providers", choices=(*EVERY_PROVIDER, "all"), nargs="+", default=(), metavar="P", help=providers)
    add("--backward", action="store_true", help="time both passes together, and measure the memory they take")
    add("--output-dir", type=Path, default=Path(), metavar="DIR", help="where to write (here)")
    add("--plot", type=Path, metavar="CSV", help="only draw a CSV of an earlier run again")
    args = parser.parse_args(argv)
    args.k, args.n = args.k or MODELS[args.model][0], args.n or MODELS[args.model][1]
    args.m = sorted(set(args.m))
    float8 = DTYPES[args.dtype] == baseline.FLOAT8
    if float8 and (args.backward or args.layout != "linear" or args.k % 16 or args.n % 16):
        parser.error(f"--dtype {args.dtype} has no --backward, no --layout but linear, no K and N but in steps of 16")
    possible = (BACKWARD_PROVIDERS if args.backward else PROVIDERS + ON_REQUEST) + PEERS * (not float8)
    if wrong := {*args.providers} - {*possible, "all"}:
        parser.error(f"--providers {' '.join(sorted(wrong))}: with these options expected some of {possible}")
    chosen = {"torch", *(args.providers or PROVIDERS + BACKWARD_PROVIDERS)}
    args.providers = [name for name in possible if name in chosen or "all" in chosen]
    try:  # now, not after an hour of measuring
        args.output_dir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.output_dir).close()
    except OSError as error:
        parser.error(f"--output-dir {args.output_dir} cannot be written: {error.strerror}")
    return args


def draw_again(path):
    """The plot of a CSV, beside it, in place of the one that may be there."""
    try:
        if path.suffix != ".csv":
            raise ValueError("expected a .csv")
        plot(read_run(path), path.with_suffix(".png"))
    except (OSError, ValueError, OverflowError) as error:
        sys.exit(f"--plot {path}: {in_one_line(error)}")
    print(path.with_suffix(".png"))


def main():
    with contextlib.suppress(AttributeError):  # a notebook's. Else medians are to come at once, through a pipe too
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    args = parse_args()
    if args.plot:
        return draw_again(args.plot)
    checked, ended = {}, None
    try:
        run_on_gpu(args, checked) if torch.cuda.is_available() else run_interpreted(args, checked)
    except (Exception, KeyboardInterrupt) as error:
        ended = error
        if not isinstance(ended, (KeyboardInterrupt, torch.OutOfMemoryError, BrokenPipeError)):
            traceback.print_exc()
    try:
        return verdict(checked, ended)
    except BrokenPipeError:  # the reader of what is printed has gone, as `head` does. What was measured is in the files
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


if __name__ == "__main__":
    sys.exit(main())
