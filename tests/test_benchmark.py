"""Tests of benchmark.py."""

import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure

import benchmark
from baseline_torch_swiglu import torch_swiglu
from benchmark import CALLS, DTYPES, FLOAT8, HOST, MODEL, ROUNDING
from common import DEVICE, GPU, HERE, run_python


def run_benchmark(*arguments, script=HERE / "benchmark.py", cwd):
    command = [sys.executable, script, *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize("passes", ["forward", "backward"])
def test_a_run(passes, tmp_path):
    options = ["--backward"] * (passes == "backward")
    done = run_benchmark(*options, *(["--m", "65", "1", "--k", "264", "--n", "520"] if GPU else []), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    *lines, verdict = done.stdout.splitlines()
    variants = 2 if options else 1
    if not GPU:
        assert verdict == f"{30 * variants + 5 * (not options)} checks of the fused kernel passed, none failed"
        assert "Speed was not measured" in lines[-1] and benchmark.RECORDED_PLOT in lines[-1]
        assert sum(line.startswith(tuple(DTYPES)) for line in lines) == len(DTYPES) - bool(options)
        assert not [*tmp_path.iterdir()]
        return
    assert verdict == f"{2 * variants} checks of the fused kernel passed, none failed"
    assert sum(line.startswith("M = ") for line in lines) == 2
    (path,) = tmp_path.glob(f"*_bfloat16_linear_264x520{'_backward' * bool(options)}.csv")
    assert path.with_suffix(".png").is_file()
    table = benchmark.read_run(path)
    assert (table.ms_p20 <= table.ms).all() and (table.ms <= table.ms_p80).all() and (table.ms > 0).all()
    host, table = table[table.method == HOST], table[table.method != HOST]
    assert [*host.provider] == ["torch", "torch-compile", "fused"]
    assert host.ms[host.provider == "fused"].item() < 3  # ms: no tuning is in it
    providers = benchmark.BACKWARD_PROVIDERS if options else benchmark.PROVIDERS
    timed = itertools.product((1, 65), (CALLS, MODEL), providers)
    assert [*zip(table.M, table.method, table.provider, strict=True)] == [*timed]
    assert (table.rel_error[table.provider == "fused"] < 3 * ROUNDING[torch.bfloat16]).all()
    if options:
        kept = table[(table.M == 65) & (table.method == CALLS)].set_index("provider").kept_mib
        assert kept["fused-recompute"] < 0.01 < kept.fused < kept.torch  # MiB: blocks of 512 bytes
        assert (table.peak_mib > table.kept_mib).all()


WRONG_KERNELS = {
    "forward": ([], "offs_k < K - k", "offs_k < K - k - 1"),
    "backward": (["--backward"], ", dy * gate * sigmoid\n", ", dy * gate\n"),
}


@pytest.mark.parametrize("passes", WRONG_KERNELS)
def test_stops_at_a_wrong_kernel(passes, tmp_path):
    options, right, wrong = WRONG_KERNELS[passes]
    for name in ("benchmark.py", "baseline_torch_swiglu.py"):
        shutil.copy(HERE / name, tmp_path)
    kernel = (HERE / "fused_triton_swiglu.py").read_text()
    assert right in kernel
    (tmp_path / "fused_triton_swiglu.py").write_text(kernel.replace(right, wrong))
    small = ["--m", "3", "--k", "67", "--n", "33"] if GPU else []
    done = run_benchmark(*options, *small, script=tmp_path / "benchmark.py", cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert done.stdout.splitlines()[-1].startswith("WRONG in ")
    assert not [*tmp_path.glob("*.csv")]


@pytest.mark.parametrize("wrong", ["last column of K left out", "gate and up exchanged", "last row unwritten"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_the_check_can_fail(wrong, dtype):
    inputs = benchmark.make_inputs(8, 512, 64, torch.float32 if dtype == FLOAT8 else dtype, "linear", DEVICE)
    x, w_gate, w_up = (t.double() for t in inputs)
    result_dtype = torch.bfloat16 if dtype == FLOAT8 else dtype

    def run():
        if wrong == "last column of K left out":
            return torch_swiglu(x[:, :-1], w_gate[:-1], w_up[:-1]).to(result_dtype)
        if wrong == "gate and up exchanged":
            return torch_swiglu(x, w_up, w_gate).to(result_dtype)
        y = torch.empty(8, 64, dtype=result_dtype, device=DEVICE)
        y[:-1] = torch_swiglu(x[:-1], w_gate, w_up)
        return y

    expected = benchmark.reference(*inputs)
    assert benchmark.check(lambda: torch_swiglu(x, w_gate, w_up).to(result_dtype), expected, dtype)[0]
    assert not benchmark.check(run, expected, dtype)[0]


def test_float8_is_judged_by_its_norm_too():
    expected = torch.linspace(-1, 1, 1000, dtype=torch.float64)
    for fault, right in ((0.003, True), (0.03, False)):  # both within the tolerance of one element
        y = expected + fault * expected.norm() / len(expected) ** 0.5
        assert benchmark.check(lambda y=y: y, expected, FLOAT8, eager_errors=[0.004])[0] == right


NOT_ONE_RUN = "expected one run of this benchmark, with each contender once for each M and method"
REFUSED = {
    "--m 0": "argument --m: 0 is not 1 or more",
    "--k many": "argument --k: invalid positive_int value: 'many'",
    "--model small --k 8": "--model gives K and N",
    "--providers cublas": "argument --providers: invalid choice: 'cublas'",
    "--providers fused-recompute": "--providers fused-recompute: with these options expected some of ('torch', ",
    "--backward --providers packed-matmul-only": "--providers packed-matmul-only: with these options expected some of",
    "--dtype float8_e4m3fn --backward": "--dtype float8_e4m3fn has no --backward",
    "--dtype float8_e4m3fn --layout row-major": "no --layout but linear",
    "--dtype float8_e4m3fn --n 24": "no K and N but in steps of 16",
    "--plot nothing.csv": "--plot nothing.csv: FileNotFoundError: [Errno 2] No such file",
    "--plot no-columns.csv": "--plot no-columns.csv: ValueError: Usecols do not match columns",
    "--plot empty.csv": "--plot empty.csv: EmptyDataError: No columns",
    "--plot binary.png": "--plot binary.png: UnicodeDecodeError: ",
    "--plot text.csv": "--plot text.csv: ValueError: could not convert string to float: 'fast'",
    "--plot untimed.csv": f"--plot untimed.csv: ValueError: {NOT_ONE_RUN}",
    "--plot two-gpus.csv": f"--plot two-gpus.csv: ValueError: {NOT_ONE_RUN}",
    "--plot twice.csv": f"--plot twice.csv: ValueError: {NOT_ONE_RUN}",
    "--plot one-way.csv": f"--plot one-way.csv: ValueError: {NOT_ONE_RUN}",
    "--plot someone.csv": f"--plot someone.csv: ValueError: {NOT_ONE_RUN}",
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
    Path("no-columns.csv").write_text("gpu\nnone\n")
    Path("empty.csv").touch()
    Path("binary.png").write_bytes(b"\x89PNG\r\n")
    rows = a_run(1, 16)
    benchmark.write_csv(rows, Path("good.csv"))
    benchmark.parse_args(["--plot", "good.csv"])
    benchmark.write_csv([*rows[1:], rows[0] | {"ms": "fast"}], Path("text.csv"))
    benchmark.write_csv([*rows[1:], rows[0] | {"ms": None}], Path("untimed.csv"))
    benchmark.write_csv([*rows[1:], rows[0] | {"gpu": "other"}], Path("two-gpus.csv"))
    benchmark.write_csv([*rows, rows[0]], Path("twice.csv"))
    benchmark.write_csv([row for row in rows if row["method"] == CALLS], Path("one-way.csv"))
    benchmark.write_csv([*rows[1:], rows[0] | {"provider": "someone"}], Path("someone.csv"))
    with pytest.raises(SystemExit) as stopped:
        benchmark.parse_args(line.split())
    assert stopped.value.code == 2
    assert REFUSED[line] in capsys.readouterr().err.splitlines()[-1]


FAILURES = {
    "Ctrl-C": (130, KeyboardInterrupt()),
    "memory": (1, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")),
    "kernel": (1, RuntimeError("an illegal memory access was encountered\nmore of it")),
}


@pytest.fixture
def measured_up_to_16(monkeypatch):
    """benchmark.run_on_gpu times nothing: rows come from a_run, and beyond M = 16 what is put in the list is raised."""
    failures = []

    def measure(M, args, limits, progress):
        if M > 16 and failures:
            raise failures[0]
        return [], [row for row in a_run(1, 16, 64) if row["M"] == M]

    monkeypatch.setattr(benchmark, "measure", measure)
    monkeypatch.setattr(benchmark, "measure_limits", lambda dtype: (3e9, 8e11))
    monkeypatch.setattr(benchmark, "measure_host_cost", lambda args: [a_run(1)[0] | {"method": HOST}])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    return failures


def run_on_gpu(tmp_path):
    args = ["--m", "1", "16", "64", "--k", "64", "--n", "96", "--output-dir", str(tmp_path)]
    return benchmark.run_on_gpu(benchmark.parse_args(args))


@pytest.mark.parametrize("failure", FAILURES)
def test_what_was_measured_is_kept(failure, tmp_path, measured_up_to_16, capsys):
    status, error = FAILURES[failure]
    measured_up_to_16.append(error)
    assert run_on_gpu(tmp_path) == status
    path = tmp_path / "h100-80gb-hbm3_bfloat16_linear_64x96.csv"
    table = benchmark.read_run(path)
    assert {*table.M} == {1, 16} and {*tmp_path.iterdir()} == {path, path.with_suffix(".png")}
    out, err = capsys.readouterr()
    assert len(re.findall(r"^16 .* 10.0 .* 1.10x +90%$", out, re.MULTILINE)) == 2
    first_line = str(error).partition("\n")[0]
    kept = f"ENDED by {type(error).__name__}: {first_line}, after: 2 checks of the fused kernel passed, none failed"
    assert out.splitlines()[-1] == kept
    assert ("Traceback" in err) == (failure == "kernel")


def test_nothing_is_overwritten(tmp_path, measured_up_to_16):
    for count in (1, 2, 3):
        assert run_on_gpu(tmp_path) == 0
        assert len([*tmp_path.iterdir()]) == 2 * count
    assert (tmp_path / "h100-80gb-hbm3_bfloat16_linear_64x96_3.png").is_file()


def test_a_full_disk_costs_no_figure(tmp_path, measured_up_to_16, monkeypatch, capsys):
    def full(self, path, **options):
        raise OSError(28, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        to_csv = pd.DataFrame.to_csv
        patch.setattr(pd.DataFrame, "to_csv", lambda t, to=None, **o: to_csv(t, **o) if to is None else full(t, to))
        assert run_on_gpu(tmp_path) == 1
    out = capsys.readouterr().out
    assert "some,some,some,some,some,some,some,64,96,1,fused,call by call,0.01," in out
    assert "ENDED by OSError: [Errno 28] No space left on device" in out.splitlines()[-1]


def test_a_reader_that_goes_costs_no_figure(tmp_path, measured_up_to_16, monkeypatch):
    read, write = os.pipe()
    os.close(read)
    with open(write, "w", buffering=1) as closed, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", closed)
        with pytest.raises(BrokenPipeError):  # for which main() has a word
            run_on_gpu(tmp_path)
        os.dup2(os.open(os.devnull, os.O_WRONLY), write)


def test_any_backend_may_be_set():
    code = "import benchmark, pathlib; benchmark.Figure().savefig(pathlib.Path('/dev/null'), format='png')"
    run_python(code, MPLBACKEND="module://matplotlib_inline.backend_inline")


@pytest.mark.parametrize("passes", ["forward", "backward"])
def test_showing_it_again(passes, tmp_path, monkeypatch, capsys):
    """The tables tell memory where it was measured; the plot each line's name, over no other one."""
    drawn = []
    monkeypatch.setattr(benchmark, "Figure", lambda **options: drawn.append(Figure(**options)) or drawn[-1])
    backward = passes == "backward"
    rows = a_run(1, 16, 64, providers=benchmark.EVERY_PROVIDER)
    rows = [row | {"peak_mib": 8.0, "kept_mib": 4.0} for row in rows] if backward else rows
    benchmark.write_csv(rows, tmp_path / "run.csv")
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--plot", str(tmp_path / "run.csv")])
    assert benchmark.main() == 0
    assert (tmp_path / "run.png").is_file()
    benchmark.print_tables(pd.read_csv(tmp_path / "run.csv"))
    assert ("\nMiB kept for the backward pass\n" in capsys.readouterr().out) == backward
    (figure,) = drawn
    figure.draw_without_rendering()  # at its own resolution, not the file's
    assert f"fused, {MODEL}" in {text.get_text() for text in figure.axes[0].texts}
    for axis in figure.axes:
        assert {*benchmark.EVERY_PROVIDER} <= {text.get_text() for text in axis.texts}
        boxes = [text.get_window_extent() for text in axis.texts]
        assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
