"""Tests of benchmark.py, of the recorded results, and of what the README says of them."""

import itertools
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
from benchmark import BACKWARD, COLUMNS, DTYPES, FLOAT8, FLUSHED, HOST, LAYOUTS, ROUNDING
from common import DEVICE, GPU, HERE

README = (HERE / "README.md").read_text()


def run_benchmark(*arguments, script=HERE / "benchmark.py", cwd):
    command = [sys.executable, script, *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600)


def test_forward(tmp_path):
    small = ["--m", "65", "1", "--k", "264", "--n", "520"] if GPU else []
    done = run_benchmark(*small, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(tmp_path / "swiglu_benchmark.csv")
    assert list(table) == COLUMNS
    assert (table.rel_error[(table.provider == "fused") & (table.method != HOST)] < ROUNDING[torch.bfloat16]).all()
    if GPU:
        assert (table.ms_p20 <= table.ms).all() and (table.ms <= table.ms_p80).all() and (table.ms > 0).all()
        host, table = table[table.method == HOST], table[table.method == FLUSHED]
        assert [*host.provider] == ["torch", "torch.compile", "fused"]
        assert host.ms[host.provider == "fused"].item() < 1  # ms: no tuning is in it
        assert [*zip(table.M, table.provider, strict=True)] == [*itertools.product((1, 65), benchmark.PROVIDERS)]
        assert (table.K == 264).all() and (table.N == 520).all()
        assert (tmp_path / "swiglu_benchmark.png").is_file()
    else:
        assert "Speed was not measured" in done.stdout and benchmark.RECORDED_PLOT in done.stdout
        assert {*table.dtype} == {*DTYPES} and {*table.layout} == {*LAYOUTS}
        assert table.loc[:, "method":"fraction_of_floor"].isna().all(axis=None)


def test_backward(tmp_path):
    small = ["--m", "65", "--k", "264", "--n", "520"] if GPU else []
    done = run_benchmark("--backward", *small, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(tmp_path / "swiglu_benchmark_backward.csv")
    assert list(table) == COLUMNS
    if GPU:
        table = table[table.method == BACKWARD].set_index("provider")
        assert tuple(table.index) == benchmark.BACKWARD_PROVIDERS
        assert (table.ms > 0).all() and (table.peak_mib > table.kept_mib).all()
        kept = table.kept_mib
        assert kept["fused, recomputing"] < 0.01 < kept.fused < kept.torch  # MiB: blocks of 512 bytes
        assert (tmp_path / "swiglu_benchmark_backward.png").is_file()
    else:
        assert {*table.provider} == {"torch", "fused", "fused, recomputing"}
    assert (table.rel_error < 3 * ROUNDING[torch.bfloat16]).all()


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
    assert "WRONG" in done.stdout
    assert not GPU or not [*tmp_path.glob("*.csv")]


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


REFUSED = {
    "--m 0": "argument --m: 0 is not 1 or more",
    "--k many": "argument --k: invalid positive_int value: 'many'",
    "--model small --k 8": "--model gives K and N",
    "--providers cublas": "argument --providers: invalid choice: 'cublas'",
    "--providers fused,~recomputing": "--providers fused, recomputing: with these options expected some of ('torch', ",
    "--backward --providers packed~matmul~only": "--providers packed matmul only: with these options expected some of",
    "--dtype float8_e4m3fn --backward": "--dtype float8_e4m3fn has no --backward",
    "--dtype float8_e4m3fn --layout row-major": "no --layout but linear",
    "--dtype float8_e4m3fn --n 24": "no K and N but in steps of 16",
    "--backward --rotate-weights": "--backward and --rotate-weights exclude each other",
    "--plot nothing.csv": "--plot nothing.csv: [Errno 2] No such file",
    "--plot no-columns.csv": "--plot no-columns.csv: Usecols do not match columns",
    "--plot no-times.csv": "--plot no-times.csv: holds no times",
    "--output-dir a-file": "--output-dir a-file cannot be written: File exists",
}


@pytest.mark.parametrize("line", REFUSED)
def test_refuses(line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("a-file").touch()
    Path("no-columns.csv").write_text("gpu\nnone\n")
    benchmark.write_csv([{"gpu": "none"}], Path("no-times.csv"))
    with pytest.raises(SystemExit) as stopped:
        benchmark.parse_args([argument.replace("~", " ") for argument in line.split()])
    assert stopped.value.code == 2
    assert REFUSED[line] in capsys.readouterr().err.splitlines()[-1]


FAILURES = {130: KeyboardInterrupt(), 1: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")}


@pytest.mark.parametrize("status", FAILURES)
def test_what_was_measured_is_kept(status, tmp_path, monkeypatch, capsys):
    table = pd.read_csv((HERE / benchmark.RECORDED_PLOT).with_suffix(".csv"))
    host_rows = table[table.method == HOST].to_dict("records")

    def measure(M, K, N, args, ceilings, progress):
        if M > 16:
            raise FAILURES[status]
        return table[(table.method == FLUSHED) & (table.M == M)].to_dict("records")

    monkeypatch.setattr(benchmark, "measure", measure)
    monkeypatch.setattr(benchmark, "measure_ceilings", lambda dtype: (3e9, 8e11))
    monkeypatch.setattr(benchmark, "measure_host_cost", lambda args: host_rows)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    args = benchmark.parse_args(["--m", "1", "16", "64", "--output-dir", str(tmp_path)])
    assert benchmark.run_on_gpu(args) == status
    assert {*pd.read_csv(tmp_path / "swiglu_benchmark.csv").M} == {1, 16}
    assert (tmp_path / "swiglu_benchmark.png").is_file()
    out = capsys.readouterr().out
    assert f"M = 64: {str(FAILURES[status]) or 'interrupted'}\nwhat was measured is kept" in out
    fused = table[(table.method == FLUSHED) & (table.M == 16)].set_index("provider").loc["fused"]
    line = rf"^16 .* {fused.ms * 1e3:.1f} .* {fused.speedup:.2f}x +{fused.fraction_of_floor:.0%}$"
    assert re.search(line, out, re.MULTILINE)


def test_recorded_results():
    recorded = [*(HERE / "results").glob("*float*.csv")]
    assert (HERE / benchmark.RECORDED_PLOT).with_suffix(".csv") in recorded
    for path in recorded:
        assert list(pd.read_csv(path)) == COLUMNS, path
        assert path.with_suffix(".png").is_file(), path


def recorded(layout, kind=""):
    """The CSV of this kind to which the README links first, of bfloat16, without the rows of host time."""
    path = HERE / re.search(rf"results/\w+_bfloat16_{layout}{kind}\.csv", README)[0]
    table = pd.read_csv(path)
    return path, table[table.method != HOST]


@pytest.mark.parametrize("kind", ["", "_backward", "_peers"])
def test_showing_it_again(kind, tmp_path, monkeypatch, capsys):
    """The table tells memory where it was measured; the plot each line's name, over no other one."""
    drawn = []
    monkeypatch.setattr(benchmark, "Figure", lambda **options: drawn.append(Figure(**options)) or drawn[-1])
    path, table = recorded("linear", kind)
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--plot", str(path), "--output-dir", str(tmp_path)])
    assert benchmark.main() == 0
    assert (tmp_path / path.with_suffix(".png").name).is_file()
    benchmark.print_table(table)
    assert ("\nMiB kept for the backward pass\n" in capsys.readouterr().out) == (kind == "_backward")
    (figure,) = drawn
    figure.draw_without_rendering()  # at its own resolution, not the file's
    for axis in figure.axes:
        assert {*table.provider} <= {text.get_text() for text in axis.texts}
        boxes = [text.get_window_extent() for text in axis.texts]
        assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


def by_m(table, column="ms", factor=1e3):  # microseconds
    return table.pivot(index="M", columns="provider", values=column) * factor


def assert_readme_has(*cells):
    assert f"| {' | '.join(cells)} |" in README


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind, digits", [("", 1), ("_backward", 0)])
def test_readme_tables(kind, digits, layout):
    """| M | a column for each provider, in microseconds | speed-up of the fused kernel |"""
    _, table = recorded(layout, kind)
    for M, row in by_m(table).iterrows():
        times = (f"{row[name]:.{digits}f}" for name in table.provider.unique())
        assert_readme_has(f"{M}", *times, f"{row.torch / row.fused:.2f}x")
    for column in ("gpu", "torch", "triton"):
        assert table[column].iloc[0] in README


@pytest.mark.parametrize("where, kind", [("in a graph", "_rotating"), ("call by call", "")])
def test_readme_table_of_float8(where, kind):
    table = pd.read_csv(HERE / f"results/h200_float8_e4m3fn_linear{kind}.csv")
    times = by_m(table[table.method != HOST]).loc[[1, 16, 64, 128, 256, 512, 1024, 4096]]
    for first, name in ((where, "torch"), ("", "packed torch.compile"), ("", "fused")):
        label = f"| {first} | {name} | " if first else f"| | {'**fused**' if name == 'fused' else name} | "
        assert label + " | ".join(f"{ms:.1f}" for ms in times[name]) + " |" in README


def test_readme_table_of_peers():
    table = pd.read_csv(HERE / "results/h200_bfloat16_linear_peers.csv")
    times = by_m(table[table.method != HOST])
    for name in ("fused", *benchmark.PEERS):
        assert_readme_has("**fused**" if name == "fused" else name, *(f"{us:.1f}" for us in times[name]))


def test_readme_table_of_widths():
    rows = re.findall(r"\[(\w+)\]\((results/\w+\.csv)\) \| (H.00) \|", README)
    assert {name for name, *_ in rows} == {*DTYPES}
    for name, path, card in rows:
        table = pd.read_csv(HERE / path)
        times = by_m(table[table.method != HOST]).loc[[1, 16, 64, 128, 256, 512, 1024, 4096, 16384]]
        assert {*table.dtype} == {name} and card in table.gpu[0]
        assert_readme_has(f"[{name}]({path})", card, *(f"{ratio:.2f}x" for ratio in times.torch / times.fused))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", ["8192x28672", "2048x5632", "1024x4096"])
def test_readme_table_of_other_shapes(shape, layout):
    """A row for each CSV: microseconds (times as fast as eager, as the packed form under torch.compile)."""
    path, table = recorded(layout, f"_{shape}")
    cells = (
        f"{row.fused:.1f} ({row.torch / row.fused:.2f}x, {row['packed torch.compile'] / row.fused:.2f}x)"
        for _, row in by_m(table).iterrows()
    )
    assert_readme_has(f"[{layout}](results/{path.name})", *cells)


@pytest.mark.parametrize("column, label", [("kept_mib", "kept between the passes"), ("peak_mib", "at most")])
def test_readme_table_of_memory(column, label):
    _, table = recorded("linear", "_backward")
    memory = by_m(table, column, factor=1)
    for M in (2048, 4096, 8192):
        assert_readme_has(f"{label}, M = {M}", *(f"{memory.loc[M, name]:.0f}" for name in table.provider.unique()))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_readme_table_of_batch_invariance(layout):
    path, table = recorded(layout, "_batch_invariant")
    cells = (f"{row.fused:.1f} → {row['fused, batch-invariant']:.1f}" for _, row in by_m(table).iterrows())
    assert_readme_has(f"[{layout}](results/{path.name})", *cells)
