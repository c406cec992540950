"""Tests of what happens when something goes wrong, and of what must not depend on what else goes on.

As in test_swiglu.py: they run on a GPU, or through Triton's interpreter; what needs a GPU skips without one.
"""

import contextlib
import errno
import functools
import itertools
import os
import shutil
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pandas as pd
import pytest
import torch

import benchmark  # sets TRITON_INTERPRET where there is no GPU, before the kernel is defined
import fused_triton_swiglu as fts
import stress_swiglu
from baseline_torch_swiglu import torch_swiglu
from benchmark import ROUNDING, make_dy, make_inputs, reference, relative_error
from fused_triton_swiglu import fused_swiglu
from test_swiglu import DEVICE, DTYPES, GPU, HERE, LAYOUTS, TARGETS, needs_gpu, needs_hopper, run_python

# Few rows, which swiglu_kernel computes, and where the kernel for Hopper does
SHAPES = [(20, 72, 136)] + ([(300, 328, 5768)] if GPU else [])


# ---- Random cases, and mutants that they must find ----

BLOCK = 25
CASES = 500 if GPU else 50


@pytest.mark.parametrize("first", range(0, CASES, BLOCK))
def test_random_cases(first):
    for number in range(first, first + BLOCK):
        case = stress_swiglu.draw(number)
        assert stress_swiglu.run_case(case) <= 1, f"{case}: python stress_swiglu.py --case {number}"


MUTANTS = {
    "a K tile left out": ("for k in range(0, K, BLOCK_K):", "for k in range(BLOCK_K, K, BLOCK_K):"),
    "ragged K not masked": (
        "mask_xk = True if EVEN_K else (offs_k < K - k)[None, :]\n"
        "                mask_wk = True if EVEN_K else (offs_k < K - k)[:, None]",
        "mask_xk = True\n                mask_wk = True",
    ),
    "rows not masked when stored": ("mask_y = (offs_m < M)[:, None] & ", "mask_y = "),
    "columns not masked when stored": (
        "mask_y = (offs_m < M)[:, None] & (offs_n < N)[None, :]",
        "mask_y = (offs_m < M)[:, None]",
    ),
    "gate and up exchanged": ("gate, up = tl.split(", "up, gate = tl.split("),
    "one stride for both weights": ("if not SAME_STRIDE_K:", "if False:"),
    "rounded before SiLU": (
        "y = silu_mul(gate, up)",
        "y = silu_mul(gate.to(tl.float16).to(tl.float32), up.to(tl.float16).to(tl.float32))",
    ),
    "backward columns not masked": (
        "tl.store(d_ptr + offs_up, dup.to(d_ptr.dtype.element_ty), mask=mask)",
        "tl.store(d_ptr + offs_up, dup.to(d_ptr.dtype.element_ty))",
    ),
    "a wrong derivative": ("dgate = dy * up * sigmoid * (1 + gate * (1 - sigmoid))", "dgate = dy * up * sigmoid"),
}
# None that hangs: the steps of loads and products stay the same in number.
HOPPER_MUTANTS = {
    "x from the next K tile": ("tma_load(x_desc, [off_m, k]", "tma_load(x_desc, [off_m, k + BOX]"),
    "halves of the last wave left out": ("2 * last_wave, gl.num_programs(0)):", "last_wave, gl.num_programs(0)):"),
    "both consumers store the same rows": ("where = (off_m + CONSUMER * ROWS,", "where = (off_m,"),
    "gate and up exchanged": ("hopper_store(silu_mul(gate, up)", "hopper_store(silu_mul(up, gate)"),
    "one half of dx from the other's weights": ("tma_load(w_2_desc, where_2", "tma_load(w_2_desc, where_1"),
    "dup left out of dx": ("off_m, left, right, n, dup_desc,", "off_m, left, right, n, dgate_desc,"),
    "a store that is not waited for": ("        tma.store_wait(0)  # what was stored before has left the buffer\n", ""),
    "stages free too early": ("mbarrier.wait(empty.index(stage), step // STAGES & 1 ^ 1)", "pass"),
}


def mutated_copy(folder, right, wrong):
    """The repository's programs in `folder`, with a fault in the kernel file."""
    for path in HERE.glob("*.py"):
        shutil.copy(path, folder)
    source = (HERE / "fused_triton_swiglu.py").read_text()
    assert right in source
    (folder / "fused_triton_swiglu.py").write_text(source.replace(right, wrong))
    return folder


def assert_found(right, wrong, folder):
    """A kernel with this fault does not get through the cases."""
    code = f"from stress_swiglu import draw, run_case\nfor number in range({CASES}): run_case(draw(number))"
    folder = mutated_copy(folder, right, wrong)
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=180)
    assert done.returncode != 0, "no case found it"
    assert any(error in done.stderr for error in ("\nAssertionError: ", "CUDA error"))


@pytest.mark.parametrize("name", MUTANTS)
def test_random_cases_find(name, tmp_path):
    assert_found(*MUTANTS[name], tmp_path)


@needs_hopper
@pytest.mark.parametrize("name", HOPPER_MUTANTS)
def test_random_cases_find_in_the_kernels_for_hopper(name, tmp_path):
    assert_found(*HOPPER_MUTANTS[name], tmp_path)


# ---- Special values ----

EXP_ERROR = 3e-6  # of exp(50) on a GPU: half a unit in the last place of 50 * log2(e)


@pytest.mark.parametrize("M", [14, 300])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values(dtype, layout, M):
    """NaN and infinities where eager PyTorch has them in float64; every other number right; rows for themselves."""
    info = torch.finfo(dtype)
    special = [1.0, float("nan"), float("inf"), -float("inf"), 1e4, -1e4, 50.0, -50.0, 0.0, -0.0]
    special += [info.max, -info.max, info.smallest_normal / 4, -info.smallest_normal / 2]
    K, N = 16, 2056 if GPU else 24
    x = torch.zeros(M, K, dtype=dtype, device=DEVICE)
    x[:, 0], x[:, 1] = torch.tensor(special).repeat(M)[:M], 1
    w_gate, w_up = torch.zeros(2, K, N, dtype=dtype, device=DEVICE)
    w_gate[0] = 1  # gate is the special value
    w_up[0, : N // 2] = 1  # so is up in half of the columns, in the others it is one of these
    w_up[1, N // 2 :] = torch.tensor([1.0, -2.0, 0.5, info.max]).repeat(N)[: N - N // 2]
    if layout == "linear":
        w_gate, w_up = w_gate.t().contiguous().t(), w_up.t().contiguous().t()
    expected = torch_swiglu(*(t.double() for t in (x, w_gate, w_up))).to(dtype)
    y = fused_swiglu(x, w_gate, w_up, autotune=False)
    smallest = info.smallest_normal * info.eps
    torch.testing.assert_close(y, expected, rtol=max(2 * info.eps, EXP_ERROR), atol=smallest, equal_nan=True)
    plain = x.clone()
    plain[x[:, 0].isnan() | x[:, 0].isinf(), 0] = 0
    untouched = (x == plain).all(dim=1)
    assert torch.equal(y[untouched], fused_swiglu(plain, w_gate, w_up, autotune=False)[untouched])


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values_of_gradients(dtype, recompute):
    info = torch.finfo(dtype)
    special = [1.0, float("nan"), float("inf"), -float("inf"), 1e4, -1e4, 50.0, -50.0, 0.0, info.max, -info.max]
    x = torch.tensor(special, dtype=dtype, device=DEVICE)[:, None]
    w_gate, w_up = torch.ones(2, 1, 8, dtype=dtype, device=DEVICE)
    dy = torch.ones(len(special), 8, dtype=dtype, device=DEVICE)
    gate_up = None if recompute else torch.cat([x @ w_gate, x @ w_up], dim=1)
    d = fts._differentiate_activation(dy, x, w_gate, w_up, gate_up)
    gate, up = (x.double().expand(-1, 8).clone().requires_grad_() for _ in range(2))
    (torch.nn.functional.silu(gate) * up).backward(dy.double())
    expected = torch.cat([gate.grad, up.grad], dim=1).to(dtype)
    torch.testing.assert_close(d, expected, rtol=max(2 * info.eps, EXP_ERROR), atol=info.tiny, equal_nan=True)


# ---- The same bits ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M, K, N", SHAPES)
def test_same_call_same_bits(M, K, N, dtype):
    inputs = make_inputs(M, K, N, dtype, "linear", DEVICE)
    y = fused_swiglu(*inputs)
    for _ in range(100 if GPU else 3):
        assert torch.equal(fused_swiglu(*inputs), y)
    for other in SHAPES:
        fused_swiglu(*make_inputs(*other, dtype, "row-major", DEVICE))
    assert torch.equal(fused_swiglu(*inputs), y)
    for _ in range(8 if GPU else 0):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            again = fused_swiglu(*inputs)
        stream.synchronize()
        assert torch.equal(again, y)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batch_invariant(dtype, layout, keep):
    """A row has the same bits in any number of rows, wherever it stands."""
    M, K, N = (4100, 4096, 1544) if GPU else (140, 72, 136)
    x, w_gate, w_up = make_inputs(M, K, N, dtype, layout, DEVICE)
    w_up.requires_grad_(keep)
    y = fused_swiglu(x, w_gate, w_up, batch_invariant=True)
    assert relative_error(y, reference(x, w_gate, w_up)) <= ROUNDING[dtype]
    for m in (1, 2, 16, 17, 64, 65, 128, 129, 130, 300, 1000, 2048, 4097):
        for rows in (slice(m), slice(M - m, M)):
            if m <= M:
                assert torch.equal(fused_swiglu(x[rows], w_gate, w_up, batch_invariant=True), y[rows]), m


def test_batch_invariant_takes_one_configuration(monkeypatch):
    """Also where different ones happen to give the same bits."""
    taken = []
    working = fts._working
    monkeypatch.setattr(fts, "_working", lambda configs, launch: taken.append(configs[0]) or working(configs, launch))
    monkeypatch.setattr(fts, "gluon", None)
    monkeypatch.setattr(fts, "_launchers", {})
    for M in (1, 20, 70, 300, 9000 if GPU else 400):
        fused_swiglu(*make_inputs(M, 72, 136, torch.float16, "linear", DEVICE), batch_invariant=True)
    assert len(taken) == 5 and len(set(map(str, taken))) == 1

    asked = []
    monkeypatch.setattr(fts, "hopper_applies", lambda *args, any_m: asked.append(any_m))
    for batch_invariant in (False, True):
        inputs = make_inputs(2, 72, 136, torch.float16, "linear", DEVICE)
        fused_swiglu(*inputs, autotune=False, batch_invariant=batch_invariant)
    assert asked == [False, True]


@needs_gpu
def test_same_bits_in_another_process(tmp_path):
    code = (
        "import hashlib, torch\n"
        "from benchmark import make_inputs\n"
        "from fused_triton_swiglu import fused_swiglu\n"
        "for M, N in ((20, 520), (300, 5768)):\n"
        "    y = fused_swiglu(*make_inputs(M, 328, N, torch.bfloat16, 'linear', 'cuda'))\n"
        "    print(hashlib.sha256(y.view(torch.int16).cpu().numpy().tobytes()).hexdigest())\n"
    )
    outs = [run_python(code, HERE, TRITON_CACHE_DIR=str(tmp_path)) for _ in range(2)]
    assert outs[0] == outs[1] and len(outs[0].split()) == 2


# ---- Threads, streams, processes ----


def test_one_thread_at_a_time_makes_first_launches(monkeypatch):
    """Triton's autotuner and, without a GPU, its interpreter are not made for several."""
    inside, most = 0, 0
    first_launch = fts._first_launch

    def watched(*args):
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        time.sleep(0.05)
        try:
            return first_launch(*args)
        finally:
            inside -= 1

    monkeypatch.setattr(fts, "_first_launch", watched)
    monkeypatch.setattr(fts, "_launchers", {})
    threads = [
        threading.Thread(target=fused_swiglu, args=make_inputs(M, 16, 24, torch.float32, "linear", DEVICE))
        for M in range(1, 5)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """As in a new process with an empty cache folder: nothing launched before, nothing tuned. Returns the folder."""
    monkeypatch.setattr(fts, "_launchers", {})
    for tuner in fts.TUNERS.values():
        monkeypatch.setattr(tuner, "cache", {})
    with fts.triton.knobs.cache.scope():
        fts.triton.knobs.cache.dir = str(tmp_path)
        yield tmp_path


@needs_gpu
def test_threads_and_streams(fresh):
    """All at once from the first, untuned call on, forward and backward, each thread on a stream of its own."""
    shapes = [(M, 328, N) for M in (1, 20, 100, 300) for N in (520, 5768)]
    cases = []
    for shape in shapes:
        inputs = make_inputs(*shape, torch.bfloat16, "linear", DEVICE)
        dy = make_dy(shape[0], shape[2], torch.bfloat16, DEVICE)
        cases.append((inputs, dy, reference(*inputs, dy)))
    torch.cuda.synchronize()
    wrong = []

    def work(seed):
        try:
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                for i in range(40):
                    inputs, dy, expected = cases[(seed + i * 3) % len(cases)]
                    both = benchmark.differentiated(lambda t: fused_swiglu(*t), dy)
                    results = both([t.detach().requires_grad_() for t in inputs])
                    stream.synchronize()
                    errors = benchmark.relative_errors(results, expected)
                    if not max(errors) <= 2 * ROUNDING[torch.bfloat16]:
                        wrong.append((seed, i, errors))
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


CALL = (
    "import torch, warnings\n"
    "import fused_triton_swiglu as fts\n"
    "from benchmark import make_inputs, reference, relative_error\n"
    "def call(M, N, **options):\n"
    "    inputs = make_inputs(M, 328, N, torch.bfloat16, 'linear', 'cuda')\n"
    "    assert relative_error(fts.fused_swiglu(*inputs, **options), reference(*inputs)) < 2**-8\n"
)


@needs_gpu
def test_processes_share_a_cache(tmp_path):
    command = [sys.executable, "-c", CALL + "call(20, 520)\ncall(300, 5768)"]
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, cwd=HERE, env=environment, **pipe) for _ in range(4)]
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0 and "Warning: fused_swiglu" not in errors, errors
    assert not [*tmp_path.rglob("tmp.pid_*")]


@needs_gpu
def test_fork_after_use():
    """PyTorch's own error in the child: not a hang, not a wrong result."""
    code = CALL + (
        "import multiprocessing, sys\n"
        "def child():\n"
        "    for M in (20, 21):\n"  # launched before, and not
        "        try:\n"
        "            fts.fused_swiglu(inputs[0].expand(M - 19, 20, 328), *inputs[1:])\n"
        "        except RuntimeError as error:\n"
        "            print(str(error)[:40], flush=True)\n"
        "inputs = make_inputs(20, 328, 520, torch.bfloat16, 'linear', 'cuda')\n"
        "fts.fused_swiglu(inputs[0][None], *inputs[1:])\n"
        "process = multiprocessing.get_context('fork').Process(target=child)\n"
        "process.start()\n"
        "process.join(60)\n"
        "print(process.exitcode)\n"
    )
    *errors, status = run_python(code, HERE).splitlines()
    assert status == "0" and len(errors) == 2
    assert all(error.startswith("Cannot re-initialize CUDA in forked") for error in errors)


# ---- A cache folder that is of no use ----


def test_cache_faults_lead_to_a_temporary_folder(tmp_path):
    """On any machine: by a launch that finds the folder at fault."""
    folder = fts.triton.knobs.cache.dir
    for fault in (
        OSError(errno.ENOSPC, "No space left on device"),
        PermissionError(13, "denied"),
        KeyError("x"),
        ValueError("no JSON"),
    ):
        folders = []

        @fts._despite_cache_faults
        def launch(fault=fault, folders=folders):
            folders.append(fts.triton.knobs.cache.dir)
            if folders[-1] == folder:
                raise fault
            return "launched"

        with pytest.warns(UserWarning, match="fused_swiglu cannot use Triton's cache folder .*TRITON_CACHE_DIR"):
            assert launch() == "launched"
        assert len(folders) == 2 and Path(folders[1]).is_dir()
        assert fts.triton.knobs.cache.dir == folder

    @fts._despite_cache_faults
    def fail():
        raise ValueError("not the folder's fault")

    with warnings.catch_warnings(), pytest.raises(ValueError, match="not the folder's fault"):
        warnings.simplefilter("error")
        fail()


def test_every_first_launch_survives_a_cache_fault(monkeypatch):
    """Of the forward pass, of the activation's and, on Hopper, of dx's kernel."""
    folder = fts.triton.knobs.cache.dir

    class Faulty:
        """A kernel whose launch finds the folder at fault."""

        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            if fts.triton.knobs.cache.dir == folder:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.kernel[grid]

    launch_triton = fts._launch_triton

    def faulty_launch_triton(*args):
        Faulty({None: None})[None]
        return launch_triton(*args)

    monkeypatch.setattr(fts, "_launchers", {})
    monkeypatch.setattr(fts, "_launch_triton", faulty_launch_triton)
    monkeypatch.setattr(fts, "swiglu_backward_kernel", Faulty(fts.swiglu_backward_kernel))
    leaves = [t.requires_grad_() for t in make_inputs(3, 16, 24, torch.float32, "linear", DEVICE)]
    dy = make_dy(3, 24, torch.float32, DEVICE)
    with pytest.warns(UserWarning, match="cannot use Triton's cache folder") as warned:
        results = benchmark.differentiated(lambda t: fused_swiglu(*t, autotune=False), dy)(leaves)
    assert len([w for w in warned if "cache folder" in str(w.message)]) == 2
    assert max(benchmark.relative_errors(results, reference(*leaves, dy))) <= 2 * ROUNDING[torch.float32]
    assert hasattr(fts._launch_hopper_dx, "__wrapped__")


FULL = (
    "from triton.runtime.cache import FileCacheManager\n"
    "put = FileCacheManager.put\n"
    "def full(self, *args, **kwargs):\n"
    "    if self.cache_dir.startswith(fts.triton.knobs.cache.dir) and 'fused_swiglu_' not in self.cache_dir:\n"
    "        raise OSError(28, 'No space left on device')\n"
    "    return put(self, *args, **kwargs)\n"
    "FileCacheManager.put = full\n"
)


@needs_gpu
@pytest.mark.parametrize("fault", ["unwritable", "full"])
def test_cache_folder_unwritable_or_full(fault, tmp_path):
    (tmp_path / "file").write_text("")
    folder = tmp_path / ("file/cache" if fault == "unwritable" else "cache")
    code = (
        CALL
        + (FULL if fault == "full" else "")
        + (
            "with warnings.catch_warnings(record=True) as warned:\n"
            "    warnings.simplefilter('always')\n"
            "    for M, N in ((20, 520), (300, 5768)):\n"
            "        leaves = [t.requires_grad_() for t in make_inputs(M, 328, N, torch.bfloat16, 'linear', 'cuda')]\n"
            "        fts.fused_swiglu(*leaves).sum().backward()\n"
            "    call(20, 520)\n"
            "print(len(warned), {str(w.message).partition('(')[0] for w in warned})"
        )
    )
    out = run_python(code, HERE, TRITON_CACHE_DIR=str(folder))
    count, _, text = out.partition(" ")
    assert int(count) > 0 and f"fused_swiglu cannot use Triton's cache folder {folder}" in text


TWO_CALLS = "call(20, 520)\ncall(300, 5768)\nprint('right')"


@needs_gpu
@pytest.mark.parametrize("damage", ["truncated", "empty", "garbage", "other JSON"])
@pytest.mark.parametrize("files", ["*.autotune.json", "swiglu_kernel*.json", "__grp__swiglu*"])
def test_damaged_cache_entries(files, damage, tmp_path):
    assert run_python(CALL + TWO_CALLS, HERE, TRITON_CACHE_DIR=str(tmp_path)) == "right\n"
    damaged = [*tmp_path.rglob(files)]
    assert damaged
    for path in damaged:
        content = path.read_bytes()
        other = {"truncated": content[: len(content) // 2], "empty": b"", "garbage": b"\xff\x00" * 50}
        path.write_bytes(other.get(damage, b'{"configs_timings": 3, "child_paths": {"a": "b"}}'))
    assert run_python(CALL + TWO_CALLS, HERE, TRITON_CACHE_DIR=str(tmp_path)) == "right\n"


@needs_gpu
@pytest.mark.parametrize("damage", [b"", b"\xff\x00" * 50])
def test_damaged_kernels(damage, tmp_path):
    """Those that load serve; if none does the error says where it came from. (A driver may hang in half a kernel.)"""
    folder = {"TRITON_CACHE_DIR": str(tmp_path)}
    assert run_python(CALL + TWO_CALLS, HERE, **folder) == "right\n"
    for path in [*tmp_path.rglob("swiglu_kernel_hopper.cubin"), *sorted(tmp_path.rglob("swiglu_kernel.cubin"))[1:]]:
        path.write_bytes(damage)
    counted = "with warnings.catch_warnings(record=True) as warned:\n    warnings.simplefilter('always')\n    "
    counted += TWO_CALLS.replace("\n", "\n    ") + "\nprint(len(warned))"
    right, warned = run_python(CALL + counted, HERE, **folder).split()
    assert right == "right" and int(warned) > 0
    for path in tmp_path.rglob("*.cubin"):
        path.write_bytes(damage)
    all_fail = f"""
try:
    call(20, 520)
except RuntimeError as error:
    assert {str(tmp_path)!r} in str(error)
    print("said")
"""
    assert run_python(CALL + all_fail, HERE, **folder) == "said\n"


# ---- Configurations that fail ----


def failures():
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    return [
        OutOfResources(300_000, 232_448, "shared memory"),
        CompilationError("", None, "tl.dot is no longer what it was"),
        PTXASError("no such instruction"),
        RuntimeError("PassManager::run failed"),
    ]


def let_fail(monkeypatch, fails):
    """Whatever `fails` says of a configuration's keywords raises one error after the other."""
    errors, run = itertools.cycle(failures()), fts.swiglu_kernel.run

    def run_or_fail(*args, **kwargs):
        if fails(kwargs):
            raise next(errors)
        return run(*args, **kwargs)

    monkeypatch.setattr(fts.swiglu_kernel, "run", run_or_fail)


@pytest.mark.parametrize("tuned", [False, True])
def test_a_configuration_that_fails_is_skipped(tuned, monkeypatch, fresh):
    inputs = make_inputs(20, 72, 136, torch.float16, "linear", DEVICE)
    rows = fts._in_rows(inputs[0])
    device = fts.device_of(rows.device.index)
    configs = fts.usable_configs("16-bit", 20, 136, fts.tma_operands(rows, *inputs[1:], device), device)
    assert len(configs) > 2
    works, tried = configs[-1].kwargs, []

    def fails(keywords):
        tried.append(keywords)
        return any(keywords[name] != works[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))

    let_fail(monkeypatch, fails)
    with pytest.warns(UserWarning, match="fused_swiglu leaves a configuration out: .* fails: "):
        y = fused_swiglu(*inputs, autotune=tuned)
    assert relative_error(y, reference(*inputs)) <= ROUNDING[torch.float16]
    if GPU:  # launched without asking again
        again = len(tried)
        fused_swiglu(*inputs, autotune=tuned)
        assert len(tried) == again


@pytest.mark.parametrize("tuned", [False, True])
def test_all_configurations_fail(tuned, monkeypatch, fresh):
    """One error, with every reason; and nothing of it is kept: once it works, it works."""
    inputs = make_inputs(20, 72, 136, torch.float16, "linear", DEVICE)
    with monkeypatch.context() as patch:
        let_fail(patch, lambda keywords: True)
        with pytest.warns(UserWarning), pytest.raises(RuntimeError) as raised:
            fused_swiglu(*inputs, autotune=tuned)
    message = str(raised.value)
    assert message.startswith("fused_swiglu: no configuration works on this GPU\n")
    for reason in (
        "Required: 300000",
        "tl.dot is no longer what it was",
        "no such instruction",
        "PassManager::run failed",
    ):
        assert reason in message
    assert not [*fresh.rglob("*.autotune.json")]
    assert relative_error(fused_swiglu(*inputs, autotune=tuned), reference(*inputs)) <= ROUNDING[torch.float16]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), torch.AcceleratorError("illegal address", 700)])
def test_what_is_not_the_kernels_fault_surfaces(error, monkeypatch, fresh):
    """As PyTorch's own error, at once, whichever kernel meets it."""
    inputs = make_inputs(20, 72, 136, torch.float16, "linear", DEVICE)

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(fts.swiglu_kernel, "run", fail)
    with pytest.raises(type(error), match=str(error.args[0])):
        fused_swiglu(*inputs, autotune=False)
    monkeypatch.setattr(fts, "hopper_applies", lambda *args, **kwargs: True)
    monkeypatch.setattr(fts, "_launch_hopper", fail)
    gluon = fts.gluon
    with pytest.raises(type(error), match=str(error.args[0])):
        fused_swiglu(*inputs, autotune=False)
    assert fts.gluon is gluon


@needs_gpu
@pytest.mark.parametrize("tuned", [False, True])
def test_configurations_that_really_fail(tuned, monkeypatch, fresh):
    """One needs more shared memory than there is, one does not compile."""
    usable = fts.usable_configs
    too_large = fts._config(128, 128, 128, 8, 8)
    no_power_of_two = fts._config(16, 64, 24, 4, 3)
    monkeypatch.setattr(fts, "usable_configs", lambda *args: [too_large, no_power_of_two, *usable(*args)])
    inputs = make_inputs(20, 256, 512, torch.float16, "linear", DEVICE)
    with pytest.warns(UserWarning) as warned:
        y = fused_swiglu(*inputs, autotune=tuned)
    assert relative_error(y, reference(*inputs)) <= ROUNDING[torch.float16]
    texts = [str(w.message) for w in warned]
    assert any("OutOfResources" in text for text in texts) and any("power of 2" in text for text in texts)


@pytest.mark.parametrize("fails", ["swiglu", "dx"])
def test_gluon_fails(fails, monkeypatch, fresh):
    """The kernels for Hopper step back, with a warning, and are not tried again."""
    if GPU and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU (sm_90)")
    from triton.compiler.errors import CompilationError

    M, K, N = (300, 2056, 5768) if GPU else SHAPES[0]
    calls = []

    def fail(*args):
        calls.append(args)
        raise CompilationError("", None, "mbarrier has moved")

    monkeypatch.setattr(fts, "gluon", True)
    if not GPU:
        monkeypatch.setattr(fts, "hopper_applies", lambda *args, **kwargs: fts.gluon is not None)
        monkeypatch.setattr(fts, "_launch_hopper", lambda *args: fts._launch_triton(*args, fts.DEFAULT))
    monkeypatch.setattr(fts, "_launch_hopper" if fails == "swiglu" else "_launch_hopper_dx", fail)
    leaves = [t.requires_grad_() for t in make_inputs(M, K, N, torch.float16, "linear", DEVICE)]
    dy = make_dy(M, N, torch.float16, DEVICE)
    both_passes = benchmark.differentiated(lambda t: fused_swiglu(*t, autotune=False), dy)
    with pytest.warns(UserWarning, match="goes on without its kernels for Hopper, .*mbarrier has moved"):
        results = both_passes(leaves)
    for _ in range(2):
        errors = benchmark.relative_errors(results, reference(*leaves, dy))
        assert max(errors) <= 2 * ROUNDING[torch.float16]
        results = both_passes(leaves)
    assert len(calls) == 1 and fts.gluon is None


# ---- Out of memory, interrupted ----


@needs_gpu
def test_out_of_memory(tmp_path):
    """PyTorch's own error, and the next smaller call works; too little to tune in is enough to compute."""
    code = CALL + (
        "total = torch.cuda.get_device_properties(0).total_memory\n"
        "x, w_gate, w_up = make_inputs(20, 328, 520, torch.bfloat16, 'linear', 'cuda')\n"
        "many = x.repeat(200_000, 1)\n"
        "torch.cuda.empty_cache()\n"
        "torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**26) / total)\n"
        "for rows in (many, many[:, None]):\n"
        "    for w in (w_gate, w_gate.clone().requires_grad_()):\n"
        "        try:\n"
        "            fts.fused_swiglu(rows, w, w_up)\n"
        "            print('no error')\n"
        "        except torch.OutOfMemoryError as error:\n"
        "            assert str(error).startswith('CUDA out of memory')\n"
        "with warnings.catch_warnings(record=True) as warned:\n"
        "    warnings.simplefilter('always')\n"
        "    call(20, 520)\n"
        "print([str(w.message)[:60] for w in warned])\n"
        "torch.cuda.set_per_process_memory_fraction(1.0)\n"
        "with warnings.catch_warnings(record=True) as warned:\n"
        "    warnings.simplefilter('always')\n"
        "    call(20, 520)\n"
        "print([str(w.message) for w in warned], len(fts.TUNERS['16-bit'].cache))\n"
    )
    out = run_python(code, HERE, TRITON_CACHE_DIR=str(tmp_path)).splitlines()
    assert any("fused_swiglu is not tuned for M = 20, K = 328, N = 520 yet" in line for line in out)
    assert out[-1] == "[] 1"


@needs_gpu
def test_interrupted_tuning(monkeypatch, fresh):
    """Nothing half tuned is kept, in this process or on disk, and no tensor is held."""
    inputs = make_inputs(20, 328, 520, torch.bfloat16, "linear", DEVICE)
    timed, tuner = [], fts.TUNERS["16-bit"]

    def do_bench(kernel_call, quantiles):
        kernel_call()
        timed.append(kernel_call)
        if len(timed) == 2:
            raise KeyboardInterrupt
        return [1.0] * len(quantiles)

    monkeypatch.setitem(tuner.__dict__, "do_bench", do_bench)
    with pytest.raises(KeyboardInterrupt):
        fused_swiglu(*inputs)
    assert not tuner.cache and not fts._launchers and tuner.nargs is None
    assert not [*fresh.rglob("*.autotune.json")] and not [*fresh.rglob("tmp.pid_*")]
    y = fused_swiglu(*inputs)
    assert len(timed) > 4 and len(tuner.cache) == len([*fresh.rglob("*.autotune.json")]) == 1
    assert relative_error(y, reference(*inputs)) <= ROUNDING[torch.bfloat16]


@pytest.mark.parametrize("failure", [torch.OutOfMemoryError("no memory for the flush"), KeyboardInterrupt()], ids=repr)
def test_tuning_that_fails(failure, monkeypatch):
    """On any machine, as if there were something to tune: with too little memory the default serves."""

    class Tuner:
        best_config = None

        def __getitem__(self, grid):
            return self

        def __call__(self, *args, **kwargs):
            self.nargs = args
            raise failure

    class Kernel:
        """Without a GPU nothing is compiled that could be launched again."""

        arg_names = fts.swiglu_kernel.arg_names

        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return lambda *args, **kwargs: self.kernel[grid](*args, **kwargs) or {(1, 1, 1): None}

    tuner = Tuner()
    monkeypatch.setattr(fts, "TUNERS", dict.fromkeys(fts.TUNERS, tuner))
    monkeypatch.setattr(fts, "swiglu_kernel", Kernel(fts.swiglu_kernel))
    monkeypatch.setattr(fts, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    x, w_gate, w_up = make_inputs(3, 16, 24, torch.float16, "linear", DEVICE)
    y = torch.full((3, 24), float("nan"), dtype=torch.float16, device=DEVICE)
    launch = functools.partial(fts._launch_triton, fts._in_rows(x), w_gate, w_up, y, None, fts.TUNED)
    if isinstance(failure, KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt):
            launch()
    else:
        with pytest.warns(UserWarning, match="is not tuned for M = 3, K = 16, N = 24 yet: .*no memory for the flush"):
            launcher = launch()
        assert not launcher.final
        assert relative_error(y, reference(x, w_gate, w_up)) <= ROUNDING[torch.float16]
    assert tuner.nargs is None


@needs_gpu
@pytest.mark.parametrize("seconds", [0.3, 1.0, 2.0])
def test_ctrl_c(seconds, tmp_path):
    """As a user does it, at some moment of compiling or tuning; it harms neither this process nor the next."""
    cache, left = tmp_path / "cache", tmp_path / "left"
    cache.mkdir()
    interrupted = CALL + (
        "import shutil, signal, threading, time\n"
        "reference(*make_inputs(20, 328, 4104, torch.bfloat16, 'linear', 'cuda'))  # CUDA has started\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it may be ignored\n"
        f"seconds = {seconds}\n"
        "threading.Timer(seconds, signal.raise_signal, [signal.SIGINT]).start()\n"
        "try:\n"
        "    call(20, 4104)\n"
        "    time.sleep(seconds)  # it was quicker, or the interrupt met code that ignores it\n"
        "except KeyboardInterrupt:\n"
        "    pass\n"
        f"shutil.copytree({str(cache)!r}, {str(left)!r})\n"
        "call(20, 4104)\n"
        "print('right')"
    )
    assert run_python(interrupted, HERE, TRITON_CACHE_DIR=str(cache)) == "right\n"
    again = CALL + "warnings.filterwarnings('error', 'fused_swiglu')\ncall(20, 4104)\nprint('right')"
    assert run_python(again, HERE, TRITON_CACHE_DIR=str(left)) == "right\n"


# ---- CUDA graphs, and long lives ----


@needs_gpu
@pytest.mark.parametrize("M, K, N", SHAPES)
def test_replays_after_many_other_calls(M, K, N, fresh):
    """A graph captured before anything is tuned or compiled goes on giving what it gave."""
    leaves = [t.requires_grad_() for t in make_inputs(M, K, N, torch.bfloat16, "linear", DEVICE)]
    dy = make_dy(M, N, torch.bfloat16, DEVICE)
    both_passes = benchmark.differentiated(lambda t: fused_swiglu(*t), dy)
    benchmark.differentiated(lambda t: torch_swiglu(*t), dy)(leaves)  # cuBLAS starts, in autograd's thread too
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = both_passes(leaves)
    graph.replay()
    first = [t.clone() for t in results]
    errors = benchmark.relative_errors(first, reference(*leaves, dy))
    assert max(errors) <= 2 * ROUNDING[torch.bfloat16]
    for i in range(3000):
        rows = i % 200 + 1
        fused_swiglu(leaves[0][:rows].detach(), *leaves[1:], autotune=False)
    fts._launchers.clear()
    fused_swiglu(*leaves)  # tuned now
    for t in results:
        t.fill_(float("nan"))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(results, first, strict=True))


def test_launchers_are_bounded(monkeypatch):
    monkeypatch.setattr(fts, "_launchers", {})
    monkeypatch.setattr(fts, "MAX_LAUNCHERS", 4)
    for M in range(1, 12):
        inputs = make_inputs(M, 16, 24, torch.float32, "linear", DEVICE)
        y = fused_swiglu(*inputs, autotune=False)
        assert relative_error(y, reference(*inputs)) <= ROUNDING[torch.float32]
        assert 0 < len(fts._launchers) <= 4


def test_a_stress_run_ends_well(tmp_path):
    command = [sys.executable, HERE / "stress_swiglu.py", "--minutes", "0.25", "--first", "1000", "--cycle", "2"]
    done = subprocess.run([*command, "--csv", tmp_path / "run.csv"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (row,) = pd.read_csv(tmp_path / "run.csv").to_dict("records")
    assert row["cases"] > 4 and row["different_cases"] == 2
    assert row["gpu_bytes_grown"] == 0 and row["worst_error_over_limit"] <= 1


def test_a_stress_run_notices_lost_memory(monkeypatch):
    lost = []
    monkeypatch.setattr(stress_swiglu, "run_case", lambda case: lost.append(case) or 0.5)
    monkeypatch.setattr(stress_swiglu, "memory", lambda: (len(lost), 0))
    monkeypatch.setattr(sys, "argv", ["stress_swiglu.py", "--minutes", "0.01", "--cycle", "5"])
    with pytest.raises(AssertionError, match="memory was lost"):
        stress_swiglu.main()


def test_a_stress_run_says_which_case_fails(monkeypatch, capsys):
    def fail(case):
        assert case.number != 3, "wrong"
        return 0.5

    monkeypatch.setattr(stress_swiglu, "run_case", fail)
    monkeypatch.setattr(sys, "argv", ["stress_swiglu.py", "--minutes", "0.01"])
    with pytest.raises(AssertionError, match="wrong"):
        stress_swiglu.main()
    assert "failed. Again: python stress_swiglu.py --case 3" in capsys.readouterr().err


# ---- benchmark.py ----


def test_a_killed_benchmark_leaves_a_whole_csv(tmp_path, monkeypatch):
    path = tmp_path / "swiglu_benchmark.csv"
    rows = [dict.fromkeys(benchmark.COLUMNS, 1)] * 3
    benchmark.write_csv(rows[:2], path)

    def killed(self, target, **options):
        Path(target).write_text("gpu,tor")
        raise SystemExit

    with monkeypatch.context() as patch, contextlib.suppress(SystemExit):
        patch.setattr(pd.DataFrame, "to_csv", killed)
        benchmark.write_csv(rows, path)
    assert len(pd.read_csv(path)) == 2
    benchmark.write_csv(rows, path)
    assert len(pd.read_csv(path)) == 3 and [*tmp_path.iterdir()] == [path]


def test_benchmark_output_folder(tmp_path, monkeypatch, capsys):
    args = benchmark.parse_args(["--output-dir", str(tmp_path / "new" / "folder")])
    assert args.output_dir.is_dir() and not [*args.output_dir.iterdir()]
    (tmp_path / "file").write_text("")
    for folder, reason in ((tmp_path / "file", "File exists"), (tmp_path / "file" / "below", "Not a directory")):
        with pytest.raises(SystemExit):
            benchmark.parse_args(["--output-dir", str(folder)])
        assert f"--output-dir {folder} cannot be written: {reason}" in capsys.readouterr().err

    def read_only(dir):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(benchmark.tempfile, "TemporaryFile", read_only)
    with pytest.raises(SystemExit):
        benchmark.parse_args(["--output-dir", str(tmp_path)])
    assert f"--output-dir {tmp_path} cannot be written: Permission denied" in capsys.readouterr().err


def test_benchmark_says_who_else_uses_the_gpu(monkeypatch, capsys):
    for busy, taken, said in ((0, 2**29, False), (40, 2**29, True), (0, 2**34, True)):
        monkeypatch.setattr(torch.cuda, "utilization", lambda device, busy=busy: busy)
        monkeypatch.setattr(torch.cuda, "device_memory_used", lambda device, taken=taken: taken)
        benchmark.other_users()
        assert ("WARNING: something else uses this GPU" in capsys.readouterr().out) == said

    def unknown(device):
        raise ModuleNotFoundError("nvidia-ml-py does not seem to be installed")

    monkeypatch.setattr(torch.cuda, "utilization", unknown)
    benchmark.other_users()
    assert "could not be checked: nvidia-ml-py does not" in capsys.readouterr().out


def test_benchmark_out_of_memory_keeps_what_was_measured(tmp_path, monkeypatch, capsys):
    table = pd.read_csv((HERE / benchmark.RECORDED_PLOT).with_suffix(".csv"))
    table = table[table.method == benchmark.FLUSHED]

    def measure(M, K, N, args, ceilings, progress):
        if M > 16:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
        return table[table.M == M].to_dict("records")

    monkeypatch.setattr(benchmark, "measure", measure)
    monkeypatch.setattr(benchmark, "other_users", lambda: None)
    monkeypatch.setattr(benchmark, "measure_ceilings", lambda dtype: (3e9, 8e11))
    monkeypatch.setattr(benchmark, "measure_host_cost", lambda args: [])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    status = benchmark.run_on_gpu(benchmark.parse_args(["--m", "1", "16", "64", "--output-dir", str(tmp_path)]))
    assert status == 1
    assert set(pd.read_csv(tmp_path / "swiglu_benchmark.csv").M) == {1, 16}
    captured = capsys.readouterr()
    assert "M = 64: CUDA out of memory" in captured.out + captured.err


@needs_gpu
def test_benchmark_notices_another_process(tmp_path):
    code = (
        "import torch, time\n"
        "x = torch.empty(3 * 2**30, dtype=torch.uint8, device='cuda')\n"
        "print('ready', flush=True)\n"
        "time.sleep(300)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout.readline() == "ready\n"
            small = ["--m", "1", "--k", "264", "--n", "520", "--providers", "fused", "--output-dir", str(tmp_path)]
            command = [sys.executable, str(HERE / "benchmark.py"), *small]
            out = subprocess.run(command, capture_output=True, text=True, timeout=300).stdout
        finally:
            other.kill()
    assert "WARNING: something else uses this GPU" in out


# ---- The README's account of it ----


@pytest.mark.parametrize("layout", LAYOUTS)
def test_readme_table_of_batch_invariance_is_the_recorded_one(layout):
    table = pd.read_csv(HERE / f"results/h200_bfloat16_{layout}_batch_invariant.csv")
    times = table[table.method == benchmark.FLUSHED].pivot(index="M", columns="provider", values="ms") * 1e3
    cells = [f"{row.fused:.1f} → {row['fused, batch-invariant']:.1f}" for _, row in times.iterrows()]
    assert f"| {' | '.join(cells)} |" in (HERE / "README.md").read_text()


def test_readme_counts_what_was_tried():
    readme = (HERE / "README.md").read_text()
    runs = pd.read_csv(HERE / "results" / "h200_stress.csv")
    numbers = (range(row["first"], row["first"] + row.different_cases) for _, row in runs.iterrows())
    assert f"| {len({*itertools.chain(*numbers)}):,} different ones in {len(runs)} runs on an H200" in readme
    soak = runs[runs.cases > runs.different_cases]
    assert f"| soak: up to {soak.different_cases.max()} cases over and over" in readme
    assert f"| {soak.cases.sum():,} calls in {len(soak)} processes, one of them for ten minutes" in readme
    assert soak.seconds.max() == 600 and soak.gpu_bytes_grown.eq(0).all()
    assert f"at most {soak.host_mib_grown.max()} MiB" in readme
    sanitizer = pd.read_csv(HERE / "results" / "h200_sanitizer.csv")
    (tests,) = set(sanitizer[sanitizer.of == "everything"].tests)
    assert f"the backward kernel: {tests} tests on an H200" in readme
    assert f"| the same, racecheck | the same {tests} tests |" in readme
    (controls,) = sanitizer[sanitizer.outcome == "hazards in each"].tests
    assert f"hazards in each of {controls} configurations" in readme
    assert f"| {len(MUTANTS)} of the Triton kernels in every run of the tests, {len(HOPPER_MUTANTS)} of the" in readme
    assert f"{CASES if GPU else 500} in the tests there, {50 if GPU else CASES} in the interpreter" in readme
    targets = ", ".join([*TARGETS]).replace(" sm_", " ")
    assert f"| {targets}, without a GPU |" in readme
