"""Tests of benchmark.py."""

import contextlib
import gc
import io
import itertools
import math
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure

import benchmark
import fused_triton_swiglu
from baseline_torch_swiglu import FLOAT8, ROUNDING, check, make_inputs, reference, torch_swiglu
from benchmark import CALLS, DTYPES, HOST, MODEL
from common import DEVICE, GPU, HERE, run_python


@pytest.mark.parametrize("passes", ["forward", "backward"])
def test_a_run(passes, tmp_path):
    options = ["--backward"] * (passes == "backward")
    command = [sys.executable, HERE / "benchmark.py", *options]
    command += ["--m", "65", "1", "--k", "264", "--n", "520"] if GPU else []
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    *lines, verdict = done.stdout.splitlines()
    variants, roundings = (2, 3) if options else (1, 1)
    if not GPU:
        assert verdict == f"{30 * variants + 5 * (not options)} checks of the fused kernel passed, none failed"
        assert "Speed was not measured" in lines[-1] and benchmark.RECORDED_PLOT in lines[-1]
        rows = [line for line in lines if "error:" in line]
        told = {row.split()[0]: re.findall(r"(torch|fused\S*) (\S+?)(?:,|$)", row) for row in rows}
        assert [*told] == [*DTYPES][: len(DTYPES) - bool(options)]
        for dtype, errors in told.items():
            assert len(errors) == 1 + variants
            judged = [float(error) for name, error in errors if options or name == "fused"]
            assert max(judged) < roundings * ROUNDING[DTYPES[dtype]]
        assert not [*tmp_path.iterdir()]
        return
    assert verdict == f"{2 * variants} checks of the fused kernel passed, none failed"
    assert sum(line.startswith("M = ") for line in lines) == 2
    (path,) = tmp_path.glob(f"*_bfloat16_linear_264x520{'_backward' * bool(options)}.csv")
    assert path.with_suffix(".png").is_file()
    table = benchmark.read_run(path)
    assert (table.ms_p20 <= table.ms).all() and (table.ms <= table.ms_p80).all() and (table.ms > 0).all()
    host, table = table[table.method == HOST], table[table.method != HOST]
    assert [*host.M] == [1] * 3 + [256] * 3 and [*host.provider] == ["torch", "torch-compile", "fused"] * 2
    assert sum(line.startswith("host time of a call, us (M, K, N = ") for line in lines) == 2
    providers = benchmark.BACKWARD_PROVIDERS if options else benchmark.PROVIDERS
    timed = itertools.product((1, 65), (CALLS, MODEL), providers)
    assert [*zip(table.M, table.method, table.provider, strict=True)] == [*timed]
    judged = table if options else table[table.provider == "fused"]
    assert (judged.rel_error < roundings * ROUNDING[torch.bfloat16]).all()
    if options:
        kept = table[(table.M == 65) & (table.method == CALLS)].set_index("provider").kept_mib
        assert kept["fused-recompute"] < 0.01 < kept.fused < kept.torch  # MiB: blocks of 512 bytes
        assert (table.peak_mib > table.kept_mib).all()


@pytest.mark.parametrize("wrong", ["last column of K left out", "last row unwritten"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_the_check_can_fail(wrong, dtype):
    inputs = make_inputs(8, 512, 64, torch.float32 if dtype == FLOAT8 else dtype, "linear", DEVICE)
    x, w_gate, w_up = (t.double() for t in inputs)
    result_dtype = torch.bfloat16 if dtype == FLOAT8 else dtype

    def run():
        if wrong == "last column of K left out":
            return torch_swiglu(x[:, :-1], w_gate[:-1], w_up[:-1]).to(result_dtype)
        y = torch.empty(8, 64, dtype=result_dtype, device=DEVICE)
        y[:-1] = torch_swiglu(x[:-1], w_gate, w_up)
        return y

    expected = reference(*inputs)
    assert check(lambda: torch_swiglu(x, w_gate, w_up).to(result_dtype), expected, dtype)[0]
    assert not check(run, expected, dtype)[0]


def test_float8_is_judged_by_its_norm_too():
    expected = torch.linspace(-1, 1, 1000, dtype=torch.float64)
    for fault, right in ((0.003, True), (0.03, False)):  # both within the tolerance of one element
        y = expected + fault * expected.norm() / len(expected) ** 0.5
        assert check(lambda y=y: y, expected, FLOAT8, eager_errors=[0.004])[0] == right


REFUSED = {
    "--m 0": "argument --m: 0 is not 1 or more, and less than 2**31",
    "--m 99999999999999999999999": "99999999999999999999999 is not 1 or more",
    "--providers fused-recompute": "--providers fused-recompute: with these options expected some of ('torch', ",
    "--backward --providers packed-matmul-only": "--providers packed-matmul-only: with these options expected some of",
    "--dtype float8_e4m3fn --backward": "--dtype float8_e4m3fn has no --backward",
    "--dtype float8_e4m3fn --layout row-major": "no --layout but linear",
    "--dtype float8_e4m3fn --n 24": "no K and N but in steps of 16",
    "--output-dir a-file": "--output-dir a-file cannot be written: File exists",
}


def a_run(*Ms, providers=("torch", "fused")):
    """Rows as a run on a GPU has them."""
    named = dict.fromkeys(benchmark.NAMED, "some") | {"K": 64, "N": 96}
    times = {"ms": 0.01, "ms_p20": 0.009, "ms_p80": 0.011, "speedup": 1.1, "share_of_limit": 0.9}
    cases = itertools.product(Ms, (CALLS, MODEL), providers)
    return [named | {"M": M, "provider": name, "method": method} | times for M, method, name in cases]


@pytest.mark.parametrize("line", REFUSED)
def test_refuses(line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("a-file").touch()
    with pytest.raises(SystemExit) as stopped:
        benchmark.parse_args(line.split())
    assert stopped.value.code == 2
    assert REFUSED[line] in capsys.readouterr().err.splitlines()[-1]


NOT_ONE_RUN = "ValueError: expected one run of this benchmark, with each contender once for each M and method"
RUN = a_run(1, 16)
NOT_PLOTTED = {  # what a file holds, and what is said of it
    "nothing": (None, "FileNotFoundError: [Errno 2] No such file"),
    "a plot": (RUN, "ValueError: expected a .csv"),
    "binary": (b"\x89PNG\r\n", "UnicodeDecodeError: "),
    "no columns": (b"gpu\nnone\n", "ValueError: Usecols do not match columns"),
    "text": ([*RUN[1:], RUN[0] | {"ms": "fast"}], "ValueError: could not convert string to float: 'fast'"),
    "huge": ([*RUN[1:], RUN[0] | {"M": 10**23}], "OverflowError: "),
    "infinite": ([*RUN[1:], RUN[0] | {"ms": math.inf}], NOT_ONE_RUN),
    "negative": ([*RUN[1:], RUN[0] | {"speedup": -1}], NOT_ONE_RUN),
    "no rows": ([row | {"M": row["M"] - 1} for row in RUN], NOT_ONE_RUN),
    "two GPUs": ([*RUN[1:], RUN[0] | {"gpu": "other"}], NOT_ONE_RUN),
    "no GPU": ([*RUN[1:], RUN[0] | {"gpu": None, "dtype": "other"}], NOT_ONE_RUN),
    "twice": ([*RUN, RUN[0]], "ValueError: Index contains duplicate entries"),
    "one way": ([row for row in RUN if row["method"] == CALLS], NOT_ONE_RUN),
    "one M in one way": (RUN[:-1], NOT_ONE_RUN),
    "fused in one way": ([row for row in RUN if row["provider"] == "torch" or row["method"] == CALLS], NOT_ONE_RUN),
    "no torch": ([row for row in RUN if row["provider"] == "fused"], NOT_ONE_RUN),
    "someone": ([row | {"provider": row["provider"].replace("fused", "someone")} for row in RUN], NOT_ONE_RUN),
}


@pytest.mark.parametrize("what", NOT_PLOTTED)
def test_plots_one_run_only(what, tmp_path):
    content, message = NOT_PLOTTED[what]
    path = tmp_path / ("run.png" if what == "a plot" else "run.csv")
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        benchmark.write_csv(content, path)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(SystemExit) as stopped:
        benchmark.draw_again(path)
    assert stopped.value.code.startswith(f"--plot {path}: {message}") and "\n" not in stopped.value.code
    assert before == {file: file.read_bytes() for file in tmp_path.iterdir()}


FAILURES = {
    "KeyboardInterrupt": (130, KeyboardInterrupt()),
    "OutOfMemoryError: CUDA out of memory": (1, torch.OutOfMemoryError("CUDA out of memory")),
    "RuntimeError: illegal access": (1, RuntimeError("illegal access\nmore of it")),
}


@pytest.fixture
def run_by_rule(tmp_path, monkeypatch):
    """main() with options, as on a GPU but without it: calls run on the CPU, and what they take is told by a rule.

    The time of a call is the number of its M among those timed, in 1/16 ms, twice that in a graph, nine times as long
    in the first 100 ms and in the first replay of a turn. What is put in `failures` is raised where the second M is
    timed.
    """
    if GPU:
        pytest.skip("simulates a GPU")
    failures, Ms, called, clock = [], [], [], [0]

    class Graph:
        made, order = [], []

        def __init__(self):
            self.made.append(self)
            self.replays = 0

        def replay(self):
            self.order.append(self)
            self.replays += 1
            clock[0] += 2 * self.calls * len({*Ms}) / 16 * (9 if self.replays % 2 else 1)

    @contextlib.contextmanager
    def capture(graph, pool):
        sets = math.ceil(2**17 / (2 * 64 * 96 * 2))  # of weights
        assert len({*called}) == sets  # each was tuned before
        called.clear()
        assert not gc.isenabled()
        graph.pool = pool
        yield
        graph.calls = len(called)
        assert len({*called}) == sets
        assert graph.calls * len({*Ms}) / 16 >= 2  # ms

    class Event(SimpleNamespace):
        def record(self):
            self.recorded = clock[0]

        def synchronize(self):
            self.at = self.recorded

        def elapsed_time(self, end):
            return end.at - self.recorded

    def do_bench(run, warmup, rep, return_mode):
        called.clear()
        run()
        if len({*Ms}) == 2 and failures:
            raise failures[0]
        ms = len(called) * len({*Ms}) / 16
        return [ms * (1 if warmup >= 100 else 9)] * 10 if return_mode == "all" else ms

    def counted(run, dy, real=benchmark.baseline.differentiated):
        return lambda operands: called.append(operands[1].data_ptr()) or real(run, dy)(operands)

    def check_contenders(contenders, operands, dy, scales, real=benchmark.check_contenders):
        Ms.append(len(operands.x))
        return real(contenders, operands, dy, scales)

    seeming = {"CUDAGraph": Graph, "graph": capture, "graph_pool_handle": lambda: "shared", "Event": Event}
    seeming |= {"stream": contextlib.nullcontext, "Stream": lambda: None, "synchronize": lambda: None}
    seeming |= {"get_device_name": lambda: r"NVIDIA H100 80GB $\frac$"}
    by_rule = {"check_contenders": check_contenders, "do_bench": do_bench, "MODEL_BYTES": 2**17}
    by_rule |= {"HOST_SHAPES": ((2, 32, 48), (5, 32, 48)), "HOST_BLOCKS": 1, "HOST_CALLS": 1}
    by_rule |= {"measure_limits": lambda dtype: (2e4, 1.2e5), "run_interpreted": benchmark.run_on_gpu}
    by_rule |= {"memory_of": lambda run, leaves, dy: (run(leaves), (2, 1))[1]}  # MiB
    monkeypatch.setattr(benchmark.baseline, "differentiated", counted)
    monkeypatch.setattr(torch, "compile", lambda run, **_: run)
    for owner, names in ((torch.cuda, seeming), (benchmark, by_rule)):
        for name, value in names.items():
            monkeypatch.setattr(owner, name, value)

    def run(*options):
        argv = ["benchmark.py", "--m", "3", "17", "--k", "64", "--n", "96", "--output-dir", str(tmp_path), *options]
        monkeypatch.setattr(sys, "argv", argv)
        return benchmark.main()

    run.failures = failures
    yield run
    gc.enable()  # where a capture has failed


@pytest.mark.parametrize("backward", [False, True])
def test_rows_of_a_run(backward, tmp_path, run_by_rule, capsys):
    providers = benchmark.BACKWARD_PROVIDERS if backward else benchmark.PROVIDERS
    assert run_by_rule(*["--backward"] * backward) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == f"{2 + 2 * backward} checks of the fused kernel passed, none failed"
    as_in_the_readme = ", ".join(f"{name} 62.5 | 125.0" for name in providers)
    assert f"M =     3  {as_in_the_readme}" in out.splitlines()
    graphs, order, count = torch.cuda.CUDAGraph.made, torch.cuda.CUDAGraph.order, len(providers)
    assert [graph.replays for graph in graphs] == [2 * benchmark.TURNS[MODEL]] * 2 * count
    assert order[0 : 2 * count : 2] == graphs[:count] != order[2 * count : 4 * count : 2]  # other turns, another order
    assert {graph.pool for graph in graphs} == {"shared"} and gc.isenabled()
    table = benchmark.read_run(tmp_path / f"h100-80gb-frac-_bfloat16_linear_64x96{'_backward' * backward}.csv")
    host, table = table[table.method == HOST], table[table.method != HOST]
    assert [*host.M] == [2] * 3 + [5] * 3 and [*host.provider] == ["torch", "torch-compile", "fused"] * 2
    assert len(re.findall(r"^host time of a call, us \(M, K, N = \([25], 32, 48\)\): torch \d", out, re.MULTILINE)) == 2
    assert [*table.provider.unique()] == [*providers]
    assert not backward or ((table.peak_mib == 2) & (table.kept_mib == 1)).all()
    nth = table.M.map({3: 1, 17: 2})
    assert (table.ms == nth * table.method.map({CALLS: 1 / 16, MODEL: 1 / 8})).all() and (table.speedup == 1).all()
    # Bytes over a copy's rate for M = 3, FLOPs over a matmul's for M = 17. Backward: as many bytes, twice the FLOPs.
    bytes_3, flops_17 = 2 * (3 * 64 + 2 * 64 * 96 + 3 * 96), 4 * 17 * 64 * 96
    limit = table.M.map({3: (1 + backward) * bytes_3 / 2e4, 17: (1 + 2 * backward) * flops_17 / 1.2e5})
    assert (limit / table.ms).tolist() == pytest.approx(table.share_of_limit.tolist(), rel=1e-5)
    assert (table.rel_error[table.provider == "fused"] < (1 + backward) * ROUNDING[torch.bfloat16]).all()


def test_a_row_has_median_percentiles_and_speedup():
    torch_row, fused_row = benchmark.summarize({"torch": [2.0, 3, 4, 5, 6, 8], "fused": [2.25]}, CALLS, 1, 2, 3)
    times = dict(ms=4.5, ms_p20=3, ms_p80=6, speedup=1)
    assert torch_row == dict(M=1, K=2, N=3, provider="torch", method=CALLS) | times
    assert fused_row["speedup"] == 2


@pytest.mark.parametrize("failure", FAILURES)
def test_what_was_measured_is_kept(failure, tmp_path, run_by_rule, capsys):
    status, error = FAILURES[failure]
    run_by_rule.failures.append(error)
    assert run_by_rule() == status
    path = tmp_path / "h100-80gb-frac-_bfloat16_linear_64x96.csv"
    timed = benchmark.read_run(path)
    assert {*timed.M[timed.method != HOST]} == {3}
    assert {*tmp_path.iterdir()} == {path, path.with_suffix(".png")}
    out, err = capsys.readouterr()
    assert len(re.findall(r"^3 .* (?:62|125)\.[05] .* 1.00x +\d+%$", out, re.MULTILINE)) == 2
    assert out.splitlines()[-1] == f"ENDED by {failure}, after: 1 checks of the fused kernel passed, none failed"
    assert ("Traceback" in err) == ("illegal access" in failure)


def test_nothing_is_overwritten(tmp_path, run_by_rule):
    for count in (1, 2, 3):
        assert run_by_rule("--providers", "fused") == 0
        assert len([*tmp_path.iterdir()]) == 2 * count
    (first,) = tmp_path.glob("*_64x96.csv")
    first.unlink()  # its plot is still there
    assert run_by_rule("--providers", "fused") == 0
    assert len([*tmp_path.iterdir()]) == 7 and not first.exists()


IN_TURN = 1 + benchmark.TURNS[CALLS]  # calls of a contender for the first M: one is checked
FAILING = {  # how many calls of a peer are right before it fails, and options
    "memory": (1, ["--backward"]),
    "call by call": (IN_TURN - 1, []),
    "captured": (IN_TURN + 6, []),  # of six sets of weights each is tuned
    "another M": (IN_TURN + 6 + 36, []),
}


@pytest.mark.parametrize("failing", FAILING)
@pytest.mark.parametrize("status, error", [(0, RuntimeError), (130, KeyboardInterrupt)])
def test_a_peer_may_fail_at_any_time(failing, status, error, tmp_path, monkeypatch, run_by_rule, capsys):
    calls, (right, options) = [], FAILING[failing]

    def peer(module):
        calls.append(module)
        if len(calls) > right:
            raise error("not here")
        return SimpleNamespace(gemm_swiglu=lambda x, gate, up, *_: (torch_swiglu(x, gate.t(), up.t()),))

    monkeypatch.setattr(benchmark, "import_module", peer)
    assert run_by_rule(*options, "--providers", "fused", "flash-swiglu-mlp") == status
    left_out = "flash-swiglu-mlp left out: RuntimeError: not here" in capsys.readouterr().out
    assert left_out == (error is RuntimeError)
    if left_out:
        (path,) = tmp_path.glob("*.csv")
        by_m = benchmark.read_run(path).groupby("M").provider.unique()
        assert [*by_m[17]] == ["torch", "fused"] == [*by_m[3][:2]] and len(by_m[3]) == 2 + (failing == "another M")
    if failing == "captured":
        assert {graph.pool for graph in torch.cuda.CUDAGraph.made} == {"shared", None}


@pytest.mark.parametrize("backward", [False, True])
def test_a_wrong_kernel_is_not_timed(backward, tmp_path, monkeypatch, run_by_rule, capsys):
    def wrong(x, gate, up, recompute=False):  # for the second M: gate and up exchanged, or twice the gradient of one
        if len(x) > 3:
            gate, up = (gate, 2 * up - up.detach()) if backward else (up, gate)
        return torch_swiglu(x.double(), gate.double(), up.double()).to(x.dtype)

    monkeypatch.setattr(benchmark, "fused_swiglu", wrong)
    assert run_by_rule(*["--backward"] * backward) == 1
    told = f"WRONG in {1 + backward} of {2 + 2 * backward} checks: M = 17, fused: beyond"
    assert capsys.readouterr().out.splitlines()[-1].startswith(told)
    (path,) = tmp_path.glob("*.csv")
    timed = benchmark.read_run(path)
    assert {*timed.M[timed.method != HOST]} == {3}


@pytest.mark.skipif(GPU, reason="of a run without a GPU")
def test_a_wrong_kernel_is_told_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(
        fused_triton_swiglu, "fused_swiglu", lambda x, gate, *_, **__: x.new_zeros(len(x), gate.shape[1])
    )
    monkeypatch.setattr(sys, "argv", ["benchmark.py"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(HERE / "benchmark.py"), run_name="__main__")
    assert stopped.value.code == 1 and capsys.readouterr().out.splitlines()[-1].startswith("WRONG in 35 of 35 checks: ")


@pytest.mark.parametrize("full", ["csv", "png"])
def test_a_full_disk_costs_no_figure(full, tmp_path, monkeypatch, run_by_rule, capsys):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*(Path, "replace") if full == "csv" else (benchmark, "plot"), fail)
    assert run_by_rule() == 1
    out = capsys.readouterr().out
    assert ",bfloat16,linear,64,96,3,fused,call by call,0.0625," in out
    assert "ENDED by OSError: [Errno 28] No space left on device" in out.splitlines()[-1]
    assert [path.suffix for path in tmp_path.iterdir()] == ([] if full == "csv" else [".csv"])


def test_a_reader_that_goes_costs_no_figure(monkeypatch, run_by_rule):
    read, write = os.pipe()
    os.close(read)
    with open(write, "w", buffering=1) as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert run_by_rule() == 1  # at the first line: nothing is measured, and nothing raised


def test_a_notebooks_output(monkeypatch, run_by_rule):
    monkeypatch.setattr(sys, "stdout", io.StringIO())  # which has no `reconfigure` either
    assert run_by_rule() == 0


def test_any_backend_may_be_set():
    code = "import benchmark, pathlib; benchmark.Figure().savefig(pathlib.Path('/dev/null'), format='png')"
    run_python(code, MPLBACKEND="module://matplotlib_inline.backend_inline")


@pytest.mark.parametrize("passes", ["forward", "backward"])
def test_showing_it_again(passes, tmp_path, monkeypatch, capsys):
    """The tables tell memory where it was measured; the plot each line's name, over no other one nor the title."""
    drawn = []
    monkeypatch.setattr(benchmark, "Figure", lambda **options: drawn.append(Figure(**options)) or drawn[-1])
    backward = passes == "backward"
    *others, slow = benchmark.EVERY_PROVIDER  # all others end at the top. The last one is a peer, which may fail
    rows = a_run(1, 16, 64, providers=others)
    rows += [row | {"speedup": 0.4, "share_of_limit": 0.3} for row in a_run(1, 16, providers=[slow])]  # no 64
    rows = [row | {"peak_mib": 8.0 + (row["provider"] != slow), "kept_mib": 4.0} for row in rows] if backward else rows
    benchmark.write_csv(rows, tmp_path / "run.csv")
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--plot", str(tmp_path / "run.csv")])
    assert not benchmark.main()
    assert (tmp_path / "run.png").is_file()
    benchmark.print_tables(pd.read_csv(tmp_path / "run.csv"))
    assert ("\nMiB kept for the backward pass\n" in capsys.readouterr().out) == backward
    (figure,) = drawn
    figure.draw_without_rendering()  # at its own resolution, not the file's
    assert f"fused, {MODEL}" in {text.get_text() for text in figure.axes[0].texts}
    for axis in figure.axes:
        assert {*benchmark.EVERY_PROVIDER} <= {text.get_text() for text in axis.texts if math.isfinite(text.xy[1])}
        boxes = [text.get_window_extent() for text in (*axis.texts, axis.title)]
        assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
