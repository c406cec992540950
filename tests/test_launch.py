"""Tests of what a later call may reuse, of when tuning happens, and of what happens when something goes wrong."""

import contextlib
import functools
import gc
import re
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import MagicMock

import pytest
import torch
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

import common
import fused_triton_swiglu as fts
from baseline_torch_swiglu import ROUNDING, differentiated, make_inputs, reference, relative_error, torch_swiglu
from benchmark import LAYOUTS
from common import DEVICE, DTYPES, GPU, HERE, assert_gradients_right, assert_right, needs_gpu, run_python, untuned
from fused_triton_swiglu import fused_swiglu

FILE = (HERE / "fused_triton_swiglu.py").read_text()
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
FEW = 20, 72, 136, FP16, "linear", DEVICE  # rows, which swiglu_kernel computes
CALL = """
import hashlib, torch, warnings
import fused_triton_swiglu as fts
from baseline_torch_swiglu import make_inputs, reference, relative_error
def call(M, N):
    leaves = [t.requires_grad_() for t in make_inputs(M, 328, N, torch.bfloat16, "linear", "cuda")]
    y = fts.fused_swiglu(*leaves)
    assert relative_error(y, reference(*leaves)) < 2**-8
    return y
"""


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """As in a new process with an empty cache folder: nothing launched before, nothing tuned. Returns the folder."""
    monkeypatch.setattr(fts, "_launchers", {})
    monkeypatch.setattr(fts.TUNER, "cache", {})
    with fts.triton.knobs.cache.scope():
        fts.triton.knobs.cache.dir = str(tmp_path)
        yield tmp_path


@pytest.fixture
def timed(monkeypatch, fresh):
    """A list that gets an entry for each configuration that is timed; the last one wins."""
    entries, cached_property = [], (fts.TUNER.__dict__, "do_bench")
    monkeypatch.setitem(*cached_property, lambda call, quantiles: entries.append(call()) or [1 / len(entries)] * 3)
    return entries


def watch(monkeypatch, owner, name, errors=(), fails=lambda keywords: True):
    """A list of the keywords of each call. Those that `fails` holds of raise one of the errors after the other."""
    calls, function = [], getattr(owner, name)

    def watched(*args, **keywords):
        calls.append(keywords)
        if errors and fails(keywords):
            raise errors[len(calls) % len(errors)]
        return function(*args, **keywords)

    monkeypatch.setattr(owner, name, watched)
    return calls


def test_launch_key_tells_apart():
    """A compiled launch is reused under its key: whatever it depends on must change the key."""
    inputs = make_inputs(64, 72, 136, FP32, "linear", DEVICE)

    def key(x=inputs[0], w_gate=inputs[1], w_up=inputs[2], linear=False, keep=False, choice=fts.TUNED):
        return fts._launch_key(x, w_gate, w_up, linear, keep, choice, *fts.NOT_FLOAT8)

    keys = [key(), key(*inputs[:1], *inputs[:0:-1]), key(keep=True), key(choice=fts.DEFAULT)]
    keys += [key(choice=fts.ONE_FOR_ALL_M), key(linear=True), key(w_up=inputs[1])]
    for name, t in zip(("x", "w_gate", "w_up"), inputs, strict=True):
        room = torch.empty(2 * t.numel() + 1, device=DEVICE)
        # Among them all that a descriptor is checked for, in the first launch only: shape, strides, dtype, address
        wide, odd = room.as_strided(t.shape, [2 * s for s in t.stride()]), room.as_strided(t.shape, t.stride(), 1)
        others = t[:1], t[:, :-8], t[None], wide, odd, t.half(), t.bfloat16(), t.to("meta")
        keys += [key(**{name: other}) for other in others]
    assert key(inputs[0] + 1) == keys[0]
    torch.set_float32_matmul_precision("high")
    keys.append(key())
    torch.set_float32_matmul_precision("highest")
    assert len(set(keys)) == len(keys), keys


def test_a_later_launch_leaves_out_what_serves_nobody(monkeypatch):
    """`run` is Triton's own: on another device, with hooks, or where it is another one, compiled[grid] launches."""
    compiled, hooks = MagicMock(), fts.triton.knobs.runtime.launch_enter_hook
    monkeypatch.setattr(fts.triton.runtime, "driver", MagicMock())
    devices = [0]
    monkeypatch.setattr(torch.cuda, "current_device", lambda: devices[-1])
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext(devices.append(index)))
    launch, ways = fts._launcher(compiled, 0), []
    compiled.run.side_effect = lambda *args: ways.append(("run", *args[:3], *args[-2:]))
    compiled.__getitem__.side_effect = lambda grid: lambda *args: ways.append(("[]", *grid, *args))
    launch((1, 2, 3), 4, 5)
    hooks.add(print)
    launch((1, 2, 3), 4, 5)
    hooks.remove(print)
    devices.append(1)
    launch((1, 2, 3), 4, 5)
    assert devices[-1] == 0
    compiled.run.side_effect = TypeError("an argument more")
    launch((1, 2, 3), 4, 5)
    assert ways == [(way, 1, 2, 3, 4, 5) for way in ("run", "[]", "[]", "[]")]


@needs_gpu
@pytest.mark.parametrize("M", [20, 300])  # the second by the kernel for Hopper
def test_hooks_see_every_launch_and_nothing_is_kept(M):
    leaves, dy = common.leaves_and_dy(M, 328, 5768, BF16)
    both_passes, names = differentiated(lambda t: fused_swiglu(*t), dy), []
    expected, hooks = both_passes(leaves), fts.triton.knobs.runtime.launch_enter_hook
    hooks.add(see := lambda metadata: names.append(metadata.get()["name"]))
    try:
        results = both_passes(leaves)
    finally:
        hooks.remove(see)
    assert names == ["swiglu_kernel" + "_hopper" * (common.HOPPER and M > 128), "swiglu_backward_kernel"]
    assert all(map(torch.equal, results, expected))
    kept = [weakref.ref(t) for t in (*leaves, dy)]
    del leaves, dy, both_passes, expected, results
    gc.collect()
    assert not [t for t in kept if t() is not None]


def test_launchers_are_bounded(monkeypatch, fresh):
    monkeypatch.setattr(fts, "MAX_LAUNCHERS", 4)
    for M in range(1, 7):
        assert_right(*make_inputs(M, 16, 24, FP32, "linear", DEVICE))
        assert 0 < len(fts._launchers) <= 4


@needs_gpu
def test_threads_and_streams(fresh):
    """All at once from the first, untuned call on, forward and backward, each thread on a stream of its own."""
    shapes = [(M, N) for M in (1, 20, 300) for N in (520, 5768)]

    def work(seed):
        with torch.cuda.stream(torch.cuda.Stream()):
            for M, N in (shapes[seed % 6 :] + shapes[: seed % 6]) * 5:
                leaves, dy = common.leaves_and_dy(M, 328, N, BF16)
                assert_gradients_right(leaves, dy, run=fused_swiglu)

    with ThreadPoolExecutor(8) as pool:
        [*pool.map(work, range(8))]


@needs_gpu
@pytest.mark.parametrize("N", [520, 5640])
def test_a_second_call_launches_the_same_kernel(N, fresh):
    """What a launch depends on and could be forgotten: alignment, the order of the weights, the precision."""
    M, K = 130, 264
    x, w_gate, w_up = make_inputs(M, K, N, BF16, "linear", DEVICE)
    dy = common.randn(M, N, dtype=BF16)
    unaligned_x, unaligned_dy = (t.new_empty(t.numel() + 1)[1:].view_as(t).copy_(t) for t in (x, dy))
    for _ in range(2):
        for gate, up in ((w_gate, w_up), (w_up, w_gate), (w_gate, w_gate), (w_gate, w_up.contiguous())):
            for rows in (x, unaligned_x, x[:1], x[:, None], x.t().contiguous().t()):
                assert_right(rows, gate, up)
        for incoming in (dy, unaligned_dy):
            assert_gradients_right([t.detach().requires_grad_() for t in (x, w_gate, w_up)], incoming)
    single, errors = make_inputs(M, K, N, FP32, "linear", DEVICE), {"high": [], "highest": []}
    for precision in ("high", "highest") * 2:
        torch.set_float32_matmul_precision(precision)
        errors[precision].append(relative_error(untuned(*single), reference(*single)))
    assert max(errors["highest"]) < 1e-5 < 1e-4 < min(errors["high"])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("M, N", [(3, 520), (200, 520), (200, 5640)])
def test_runs_on_the_device_of_its_inputs(M, N):
    leaves, dy = common.leaves_and_dy(M, 328, N, BF16)
    leaves = [t.detach().to("cuda:1").requires_grad_() for t in leaves]
    assert_gradients_right(leaves, dy.to("cuda:1"), run=fused_swiglu)
    assert fused_swiglu(*leaves).device == leaves[0].device


@needs_gpu
def test_when_tuning_happens(timed):
    counts = []
    for M, autotune in ((520, False), (520, True), (777, True), (1024, True), (1025, True)):
        inputs = make_inputs(M, 328, 344, BF16, "linear", DEVICE)
        assert_right(*inputs, run=functools.partial(fused_swiglu, autotune=autotune))
        counts.append(len(timed))
    assert 0 == counts[0] < counts[1] == counts[2] == counts[3] < counts[4]  # 513..1024 are one bucket


def test_tuning_times_the_gpu_alone(monkeypatch):
    """Not the host: the GPU sleeps until calls are queued, after do_bench's estimate and once in 64 calls."""
    order = []
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: order.append("sleep"))
    monkeypatch.setattr(fts.triton.testing, "do_bench", lambda run, quantiles: [run() for _ in range(6 + 130)])
    fts._time_on_gpu(lambda: order.append("call"), (0.5, 0.8))
    calls = [sum(what == "call" for what in order[:i]) for i, what in enumerate(order) if what == "sleep"]
    assert calls == [6, 70, 134]


@needs_gpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("M, N", [(1, 521), (300, 820), (300, 5768)])
def test_graph_capture(M, N, layout, timed):
    """It never tunes, a later call does; and the graph goes on giving what it gave."""
    leaves, dy = common.leaves_and_dy(M, 328, N, BF16, layout)
    both_passes = differentiated(lambda t: fused_swiglu(*t), dy)
    differentiated(lambda t: torch_swiglu(*t), dy)(leaves)  # cuBLAS starts, in autograd's thread too
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = both_passes(leaves)
    graph.replay()
    first = [t.clone() for t in results]
    common.assert_close(first, reference(*leaves, dy), 2 * ROUNDING[BF16])
    assert not timed
    both_passes(leaves)
    assert bool(timed) != (common.HOPPER and (M, N) == (300, 5768))  # where there is nothing to tune
    for rows in range(1, M + 1):
        untuned(leaves[0][:rows].detach(), *leaves[1:])
    fts._launchers.clear()
    torch._foreach_zero_(results)
    graph.replay()
    assert all(map(torch.equal, results, first))


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_without_tuning_the_default_serves(batch_invariant, timed, monkeypatch):
    """Also after another configuration was tuned. With batch_invariant it is the same for every M, on Hopper too."""
    asked, usable, choices = [], fts.usable_configs, []
    monkeypatch.setattr(fts, "hopper_layout", lambda *args, any_m: asked.append(any_m))
    monkeypatch.setattr(fts, "usable_configs", lambda *args: choices.append(usable(*args)) or choices[-1])
    launches = watch(monkeypatch, fts.swiglu_kernel, "run")
    for M in (20, 300):
        inputs = make_inputs(M, *FEW[1:])
        fused_swiglu(*inputs)
        launches.clear()
        untuned(*inputs, batch_invariant=batch_invariant)
        default = choices[-1][0]
        assert len(launches) == 1 and default.kwargs.items() <= launches[0].items()
        assert not GPU or (timed and str(fts.TUNER.best_config) != str(default))
    assert asked == [False, batch_invariant] * 2 and (choices[1][0] is choices[3][0]) == batch_invariant


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M, K, N", [FEW[:3], (300, 328, 5768)][: 1 + GPU])  # the second by the kernel for Hopper
def test_same_call_same_bits(M, K, N, dtype):
    inputs = make_inputs(M, K, N, dtype, "linear", DEVICE)
    y = fused_swiglu(*inputs)
    fused_swiglu(*make_inputs(M + 1, K, N, dtype, "row-major", DEVICE))
    assert all(torch.equal(fused_swiglu(*inputs), y) for _ in range(100 if GPU else 2))
    for stream in [torch.cuda.Stream() for _ in range(8 if GPU else 0)]:
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            assert torch.equal(fused_swiglu(*inputs), y)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batch_invariant(dtype, layout):
    """A row has the same bits in any number of rows, wherever it stands: not so numpy, the interpreter's."""
    M, K, N = (4100, 4096, 1544) if GPU else (140, 72, 136)
    x, w_gate, w_up = make_inputs(M, K, N, dtype, layout, DEVICE)
    y = fused_swiglu(x, w_gate, w_up, batch_invariant=True)
    assert relative_error(y, reference(x, w_gate, w_up)) <= ROUNDING[dtype]
    for m in (1, 17, 64, 65, 128, 129, 1000, 2048, 4097) if GPU else (1, 65, 129):
        for rows in (slice(m), slice(M - m, M)) if GPU else (slice(m),):
            w_up.requires_grad_(not w_up.requires_grad)  # gate and up kept, or not
            assert torch.equal(fused_swiglu(x[rows], w_gate, w_up, batch_invariant=True), y[rows]), m


@needs_gpu
def test_a_second_process_tunes_nothing_and_gives_the_same_bits(tmp_path):
    code = """
timed = []
fts.TUNER._do_bench = lambda call, quantiles: timed.append(call) or fts._time_on_gpu(call, quantiles)
warnings.simplefilter("error", UserWarning)  # Triton has none on first use
for M, N in ((1, 520), (20, 520), (300, 520), (300, 5768)):
    y = call(M, N)
    y.sum().backward()
    print(hashlib.sha256(y.detach().view(torch.int16).cpu().numpy().tobytes()).hexdigest())
print(len(timed))
"""
    first, second = (run_python(CALL + code, TRITON_CACHE_DIR=str(tmp_path)).split() for _ in range(2))
    assert first[:-1] == second[:-1] and len(first) == 5
    assert int(first[-1]) > 5 and int(second[-1]) == 0


FAILURES = [OutOfResources(300_000, 232_448, "shared memory"), CompilationError("", None, "tl.dot has changed")]
FAILURES += [PTXASError("no such instruction"), RuntimeError("PassManager::run failed")]
FATAL = [torch.OutOfMemoryError("no memory"), torch.AcceleratorError("illegal address", 700)]


@pytest.mark.parametrize("autotune", [False, True])
def test_a_configuration_that_fails_is_left_out(autotune, monkeypatch, fresh):
    usable, choices, inputs = fts.usable_configs, [], make_inputs(20, 256, 512, *FEW[3:])
    # On a GPU two fail by themselves: too much shared memory, and a tile that does not compile
    broken = [fts._config(128, 128, 128, 8, 8), fts._config(16, 64, 24, 4, 3)] if GPU else []
    monkeypatch.setattr(fts, "usable_configs", lambda *args: choices.append([*broken, *usable(*args)]) or choices[-1])

    def is_let_fail(keywords):  # all but the last
        return not any(c.kwargs.items() <= keywords.items() for c in (*broken, choices[-1][-1]))

    calls = watch(monkeypatch, fts.swiglu_kernel, "run", FAILURES, is_let_fail)
    with pytest.warns(UserWarning, match="fused_swiglu leaves a configuration out: .* fails: ") as warned:
        y = fused_swiglu(*inputs, autotune=autotune)
    assert relative_error(y, reference(*inputs)) <= ROUNDING[FP16]
    texts, tried = " ".join(str(w.message) for w in warned), len(calls)
    assert any(fts._brief(error) in texts for error in FAILURES) and all(str(config) in texts for config in broken)
    if GPU:  # what works is launched without asking again
        assert torch.equal(fused_swiglu(*inputs, autotune=autotune), y) and len(calls) == tried


@pytest.mark.parametrize("autotune", [False, True])
def test_all_configurations_fail(autotune, monkeypatch, fresh):
    """One error, with every reason; and nothing of it is kept: once it works, it works."""
    with monkeypatch.context() as patch, pytest.warns(UserWarning), pytest.raises(RuntimeError) as raised:
        watch(patch, fts.swiglu_kernel, "run", FAILURES)
        fused_swiglu(*make_inputs(*FEW), autotune=autotune)
    assert str(raised.value).startswith("fused_swiglu: no configuration works on this GPU\n")
    assert all(fts._brief(error) in str(raised.value) for error in FAILURES)
    assert not fts._launchers and not [*fresh.rglob("*.autotune.json")]
    assert_right(*make_inputs(*FEW), run=functools.partial(fused_swiglu, autotune=autotune))


@pytest.fixture
def hopper(monkeypatch, fresh):
    """As if on a Hopper GPU with Gluon."""
    monkeypatch.setattr(fts, "gluon", True)
    monkeypatch.setattr(fts, "hopper_layout", lambda *args, **kwargs: fts.gluon and "linear")


def test_gluon_fails(monkeypatch, hopper):
    """The kernel for Hopper steps back, with a warning, and is not tried again."""
    calls = watch(monkeypatch, fts, "_launch_hopper", [CompilationError("", None, "mbarrier has moved")])
    with pytest.warns(UserWarning, match="goes on without its kernel for Hopper, .*mbarrier has moved"):
        assert_gradients_right(*common.leaves_and_dy(*FEW[:4]))
    assert_right(*make_inputs(21, *FEW[1:]))
    assert len(calls) == 1 and fts.gluon is None


@pytest.mark.parametrize("error", FATAL, ids=repr)
def test_what_is_not_the_kernels_fault_surfaces(error, monkeypatch, hopper):
    """As PyTorch's own error, at once."""
    for owner, name in ((fts, "_launch_hopper"), (fts.swiglu_kernel, "run")):
        calls = watch(monkeypatch, owner, name, [error])
        with pytest.raises(type(error), match=str(error.args[0])):
            untuned(*make_inputs(*FEW))
        assert len(calls) == 1 and fts.gluon and not fts._launchers
        monkeypatch.setattr(fts, "hopper_layout", lambda *args, **kwargs: None)


@needs_gpu
def test_really_too_little_memory_to_tune(tmp_path):
    code = """
torch.cuda.set_per_process_memory_fraction(0.0012)  # 96 MB of 80 GB, where tuning takes 256
for _ in range(2):
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        call(20, 520)
    print([str(w.message)[:59] for w in warned], len(fts.TUNER.cache))
    torch.cuda.set_per_process_memory_fraction(1.0)
"""
    warnings = ["fused_swiglu is not tuned for M = 20, K = 328, N = 520 yet:"]
    assert run_python(CALL + code, TRITON_CACHE_DIR=str(tmp_path)) == f"{warnings} 0\n[] 1\n"


@pytest.mark.parametrize("gone", ["nothing", "NVMMASharedLayout", "nvidia.hopper.warpgroup_mma_wait"])
def test_file_works_when_copied_alone(gone, tmp_path):
    """Also where Gluon lacks a name that is needed here."""
    (tmp_path / "fused_triton_swiglu.py").write_text(FILE)
    code = f"""
from triton.experimental.gluon import language
language.nothing = None
del language.{gone}
import torch
from fused_triton_swiglu import fused_swiglu
assert not torch.cuda.is_initialized()  # nothing happens at import
x, w_gate, w_up = (torch.randn(shape, device="{DEVICE}").half() for shape in ((150, 8), (8, 24), (8, 24)))
expected = torch.nn.functional.silu(x.float() @ w_gate.float()) * (x.float() @ w_up.float())
y = fused_swiglu(x, w_gate, w_up, batch_invariant=True)  # so that the kernel for Hopper serves
assert torch.allclose(y.float(), expected, rtol=2e-3, atol=2e-3)
"""
    run_python(code, tmp_path)


def test_file_needs_torch_and_triton_only():
    imported = re.findall(r"^ *(?:from|import) (\w+)", FILE, re.MULTILINE)
    assert {*imported} - set(sys.stdlib_module_names) == {"torch", "triton"}
