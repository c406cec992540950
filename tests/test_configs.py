"""Tests of the tile configurations and of the kernel for Hopper: which may be chosen, right in each, compiled."""

import ast
import functools
import itertools
import math
import re
import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch

import fused_triton_swiglu as fts
from baseline_torch_swiglu import ROUNDING, make_inputs, reference, relative_error, torch_swiglu
from benchmark import LAYOUTS
from common import DEVICE, DTYPES, GPU, needs_gpu, needs_hopper, run_python

TARGETS = {
    "sm_80": fts.Device(80, 108, 163 * 1024),  # A100
    "sm_86": fts.Device(86, 82, 99 * 1024),  # RTX 3090
    "sm_89": fts.Device(89, 128, 99 * 1024),  # RTX 4090
    "sm_90": fts.Device(90, 132, 227 * 1024),  # H100
    "sm_100": fts.Device(100, 148, 227 * 1024),  # B200
    "sm_103": fts.Device(103, 148, 227 * 1024),  # B300
    "sm_120": fts.Device(120, 170, 99 * 1024),  # RTX 5090
    "gfx90a": fts.Device(0, 104, 64 * 1024),  # MI250X
    "gfx942": fts.Device(0, 304, 64 * 1024),  # MI300X
    "gfx950": fts.Device(0, 256, 160 * 1024),  # MI355X
}
# Bytes, at most, by all versions of Triton: where gate and up are kept, of float32 tiles, and of these on sm_90
STACK_WHERE_KEPT, STACK_OF_FLOAT32, STACK_OF_FLOAT32_ON_HOPPER = 168, 56, 248
STACK_OF_FLOAT8 = 48  # of 128 x 64 tiles on sm_89
# To save time the other targets compile half of it, and those in OTHER_HALF what sm_80 and sm_100 leave out.
IN_FULL, OTHER_HALF = ("sm_90", "sm_120", "gfx942"), ("sm_86", "sm_103")
TRITON_3_5 = fts.triton.__version__.startswith("3.5.")
EVERY_CONFIG = [(kind, config) for kind, configs in fts.CONFIGS.items() for config in configs]
RUNS = {"small": 3 if GPU else 1, "large": 20}  # to have the same bits: a race in one configuration came and went
SIZES = ["small", pytest.param("large", marks=needs_gpu)]


# ---- Which may be chosen ----


def operands_of(device):
    """Each kind of numbers on a device, with each answer that tma_operands may give."""
    kinds = [kind for kind in fts.CONFIGS if kind != "8-bit" or not 0 < device.arch < 89]
    return [(kind, "") for kind in kinds] + [
        (f"{bits}-bit", tma) for bits in (8, 16) for tma in ("x", "xw") if 90 <= device.arch < 120
    ]


def layouts_of(kind, tma):
    one = {"8-bit": ["linear"], "32-bit, linear": ["linear"], "32-bit, row-major": ["row-major"]}
    return one.get(kind, LAYOUTS[: 1 + (tma != "xw")])


def precisions_of(kind, tensor_cores):
    """float32 by three products in tf32, and by one."""
    return ("highest", "high") if kind.startswith("32-bit") and tensor_cores else ("highest",)


def chosen(device, kind, *tmas):
    """The configurations that some M and N may get."""
    sizes = itertools.product((16, 32, 64, 128, 256, 8192), (512, 14336), tmas)
    usable = [config for rows, N, tma in sizes for config in fts.usable_configs(kind, rows, N, tma, device)]
    return [config for config in fts.CONFIGS[kind] if config in usable]


@pytest.mark.parametrize("target", TARGETS)
def test_there_is_always_a_configuration(target):
    device = TARGETS[target]
    sizes = (16, 32, 64, 128, 256, 512, 8192), (1, 512, 14336)
    for (kind, tma), rows, N in itertools.product(operands_of(device), *sizes):
        assert 1 <= len(fts.usable_configs(kind, rows, N, tma, device)) <= 12, (kind, tma, rows, N)


# ---- Right, and the same in each run ----


def expected_of(inputs, size):
    """y and gate beside up, in float64, and the error that each may have: eager PyTorch's, or one rounding's."""
    if inputs[0].dtype == fts.FLOAT8:  # 2.7e-3 at K = 4096, as the tensor cores add
        x, w_gate, w_up = (t.float() for t in inputs)
        return (torch_swiglu(x.double(), w_gate.double(), w_up.double()), None), 3.3e-3
    if size == "small" and inputs[0].element_size() == 2:
        inputs = [t.cpu() for t in inputs]
    x, w_gate, w_up = inputs
    by_eager, wanted = torch_swiglu(*inputs), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # where memory is short, the reference is in float32
    y = reference(*inputs)
    gate_up = torch.cat([x.to(y) @ w_gate.to(y), x.to(y) @ w_up.to(y)], dim=1)
    torch.set_float32_matmul_precision(wanted)
    # Rounding both operands to tf32 costs about 4.2e-4, on both sides alike; cutting them off, 1.6e-3.
    limit = max(1.05 * relative_error(by_eager, y), ROUNDING[x.dtype])
    return (y, gate_up), limit


def inputs_of(M, K, N, dtype, layout):
    if dtype != fts.FLOAT8:
        return make_inputs(M, K, N, dtype, layout, DEVICE)
    x, *weights = make_inputs(M, K, N, torch.float32, layout, DEVICE)  # in float8 small numbers would be zero
    return [x.to(dtype), *((w * 8).to(dtype) for w in weights)]


def assert_launches_right(launch, inputs, size):
    """`launch` fills y, and gate beside up where they are kept. A function that it returns does the next runs."""
    (M, _), N, float8 = inputs[0].shape, inputs[1].shape[1], inputs[0].dtype == fts.FLOAT8
    dtype = torch.bfloat16 if float8 else inputs[0].dtype
    results, launches = None, {False: launch} | ({} if float8 else {True: launch})
    for _, keep in itertools.product(range(RUNS[size]), launches):
        y, gate_up = (torch.full((M, columns), math.nan, dtype=dtype, device=DEVICE) for columns in (N, 2 * N))
        launches[keep] = launches[keep](*inputs, y, gate_up if keep else None, None, None, None) or launches[keep]
        results = results or [y, None]
        results[1] = gate_up if keep and results[1] is None else results[1]
        assert torch.equal(y, results[0]) and (not keep or torch.equal(gate_up, results[1]))
    expected, limit = expected_of(inputs, size)
    assert all(relative_error(*pair) <= limit for pair in zip(results, expected, strict=True) if pair[1] is not None)


@pytest.fixture
def precision():
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind, config", EVERY_CONFIG, ids=str)
def test_every_configuration(kind, config, layout, size, precision, monkeypatch):
    """One tile, ragged edges, many waves."""
    device = fts.device_limits(0 if GPU else None)
    block_m, block_n, block_k, tma = (config.kwargs[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "TMA"))
    if layout not in layouts_of(kind, tma):
        pytest.skip("for the other layout only")
    if kind == "8-bit" and not GPU:
        pytest.skip("the interpreter computes it in float32")
    if (kind, tma) not in operands_of(device) or config not in chosen(device, kind, tma):
        pytest.skip("never chosen on this GPU")
    monkeypatch.setattr(fts, "usable_configs", lambda *_: [config])
    monkeypatch.setattr(fts, "gluon", None)  # the kernel for Hopper does not serve instead
    sizes = [(block_m, block_k, block_n), (block_m + 1, 2 * block_k + (16 if tma else 7), block_n + 7)]
    if size == "large":
        ragged = 1104 if kind == "8-bit" else 1096  # of bytes TMA wants a multiple of 16
        sizes = [(2048, 4096, 14336), (1037, ragged, 4104), (8192, 4096, 4096)] + [(517, 1031, 2063)] * (not tma)
    # The interpreter's products of bf16 numbers are garbage
    dtypes = {"8-bit": [fts.FLOAT8], "16-bit": DTYPES[not GPU : 2]}.get(kind, DTYPES[2:])
    precisions = precisions_of(kind, device.arch and GPU)  # the interpreter multiplies in full float32
    for (i, (M, K, N)), dtype, wanted in itertools.product(enumerate(sizes), dtypes, precisions):
        precision(wanted)
        x, *weights = inputs_of(M, K, N, dtype, layout)
        weights.sort(key=torch.Tensor.data_ptr, reverse=i % 2)  # either may come first in memory
        assert tma in fts.tma_operands(x, *weights, device)
        assert_launches_right(functools.partial(fts._launch, fts.DEFAULT), (x, *weights), size)


@needs_hopper
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [*DTYPES[:2], fts.FLOAT8], ids=str)
def test_hopper_kernel(dtype, layout, size):
    """One tile, ragged edges, many waves, the last one in tiles of 128, 96 and 64 columns."""
    if dtype == fts.FLOAT8 and layout == "row-major":
        pytest.skip("float8 weights lie (N, K)")
    sizes = [(1, 8, 8), (128, 64, 128), (129, 72, 136), (77, 264, 520)]
    if size == "large":
        sizes = [(1037, 1096, 4104), (4100, 1024, 8192), (512, 4096, 14336), (2048, 4096, 14336), (8192, 4096, 4096)]
    for M, K, N in sizes:
        inputs = inputs_of(M, K if dtype != fts.FLOAT8 else -(-K // 16) * 16, N, dtype, layout)
        assert_launches_right(functools.partial(fts._launch_hopper, layout == "row-major"), inputs, size)


def test_last_wave():
    """In tiles of 64 columns, else of 96, where these add no wave; all tiles before it are whole."""
    waves = {128: (112, 64), 256: (66, 32), 384: (88, 32), 512: (99, 64), 1024: (112, 64), 2048: (107, 32)}
    assert {M: fts._last_wave(M, 14336, 132) for M in waves} == waves
    edges = {2816: (0, 64), 2824: (0, 32), 4224: (0, 32), 4232: (34, 64)}  # 3 tiles of M = 300 more, and none fits
    assert {N: fts._last_wave(300, N, 132) for N in edges} == edges


@needs_hopper
@pytest.mark.parametrize("layout", LAYOUTS)
def test_hopper_last_wave(layout):
    """On both sides of each N from which on the last wave goes in wider or narrower tiles, the same bits each time."""
    programs, seen = fts.device_limits(0).num_sms, set()
    for M in (129, 300, 513):
        waves = [(N, fts._last_wave(M, N, programs)) for N in range(8, 12000, 8)]
        kinds = [(columns == -(-N // 128)) or box for N, (columns, box) in waves]  # whole, or 64, or 32
        for i in range(1, len(waves)):
            if kinds[i] != kinds[i - 1]:
                for N, _ in waves[i - 1 : i + 1]:
                    inputs = inputs_of(M, 264, N, torch.bfloat16, layout)
                    assert_launches_right(functools.partial(fts._launch_hopper, layout == "row-major"), inputs, "large")
                seen |= {kinds[i - 1], kinds[i]}
    assert seen == {True, 64, 32}


@pytest.mark.skipif(TRITON_3_5, reason="its Gluon is another one than this file knows")
def test_where_the_hopper_kernel_applies(monkeypatch):
    monkeypatch.setattr(fts, "INTERPRETED", False)
    M, K, N = 300, 72, 136 * 45
    x, w_gate, w_up = make_inputs(M, K, N, torch.bfloat16, "linear", "cpu")
    row_major = w_gate.contiguous(), w_up.contiguous()
    unaligned = torch.empty(N * K + 1, dtype=torch.bfloat16)[1:].view(N, K).t()
    cases = [
        ("linear", x, w_gate, w_up),
        ("row-major", x, *row_major),
        ("row-major", x, *torch.cat(row_major, dim=1).chunk(2, dim=1)),
        ("linear", torch.cat([x, x], dim=1)[:, K:], w_gate, w_up),
        ("linear, any M", x[:128], w_gate, w_up),  # swiglu_kernel is faster
        ("linear, any M", x, w_gate[:, :1024], w_up[:, :1024]),  # fewer tiles than a third of the SMs
        (None, x, w_gate[:, :-4], w_up[:, :-4]),  # y does not come in steps of 16 bytes
        (None, x, w_gate, row_major[1]),
        (None, x, w_gate, unaligned),
        (None, torch.empty(M, K + 1, dtype=x.dtype)[:, :K], w_gate, w_up),
        (None, torch.cat([x, x], dim=1)[:, ::2], w_gate, w_up),
        (None, x.float(), w_gate.float(), w_up.float()),
    ]
    for i, (layout, rows, *weights) in enumerate(cases):
        any_m = layout and layout.removesuffix(", any M")
        assert fts.hopper_layout(rows, *weights, TARGETS["sm_90"]) == (layout if layout == any_m else None), i
        for m in (1, 129, len(rows)):
            assert fts.hopper_layout(rows[:m], *weights, TARGETS["sm_90"], any_m=True) == any_m, (i, m)
    column, row = torch.empty(M, 16, dtype=fts.FLOAT8)[:, :1], torch.empty(1, 8192, dtype=fts.FLOAT8)
    assert fts.hopper_layout(column, row, row, TARGETS["sm_90"]) is None  # K is 1, so that weights lie both ways
    for target in ("sm_80", "sm_100", "gfx942"):
        assert fts.hopper_layout(x, w_gate, w_up, TARGETS[target], any_m=True) is None


# ---- Compiled for ten targets, without a GPU ----


def stack_bytes(kernel):
    """Bytes of the stack frame: above 0, registers were spilled."""
    if "amdgcn" in kernel.asm:
        return int(re.search(r"\.private_segment_fixed_size: *(\d+)", kernel.asm["amdgcn"])[1])
    cuobjdump = Path(fts.triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", usage)[1])


def compile_everything(target):
    """Let the launcher compile for a GPU that only seems to be there. Returns a line for each kernel and its fault."""
    device, (M, N), compiled, lines = TARGETS[target], (256, 1024), [], []
    compiler = fts.triton.backends.compiler
    gpu = compiler.GPUTarget("cuda", device.arch, 32) if device.arch else compiler.GPUTarget("hip", target, 64)
    seeming = {"get_current_device": lambda: 0, "get_current_stream": lambda _: 0, "get_current_target": lambda: gpu}
    fts.triton.runtime.driver.set_active(SimpleNamespace(**seeming))
    fts.device_limits = lambda _: device
    run = fts.triton.JITFunction.run

    def compile_only(*arguments, warmup, **options):
        compiled.append(run(*arguments, warmup=True, **options))
        return MagicMock()

    fts.triton.JITFunction.run = compile_only

    def judge(name, what, launch, *arguments, allowed_stack=0):
        compiled.clear()
        try:
            launch(*arguments)
            (kernel,) = compiled
            stack, shared = stack_bytes(kernel), kernel.metadata.shared
            right = kernel.metadata.name == name and stack <= allowed_stack and shared <= device.shared_memory
            fault = "" if right else f"{kernel.metadata.name}, {stack} bytes of stack, {shared} of shared memory"
        except Exception as error:
            fault = repr(error)
        lines.append((f"{name} {what}", fault))

    def judge_forward(name, what, dtype, layout, K, keep, choice, **options):
        x, *weights = (torch.empty(rows, K, dtype=dtype) for rows in (M, N, N))
        weights = [w.t() if layout == "linear" else w.t().contiguous() for w in weights]
        y, gate_up = torch.empty(M, N, dtype=dtype), torch.empty(M, 2 * N, dtype=dtype) if keep else None
        what = f"{what} {dtype} {layout}{' kept' * keep}"
        scales = [None] * 3
        if dtype == fts.FLOAT8:
            y, scales = y.to(torch.float32 if keep else torch.bfloat16), [torch.empty(size) for size in (M, N, N)]
            gate_up = None
        tensors = x, *weights, y, gate_up, *scales
        judge(name, what, fts._first_launch, fts._launch, choice, *tensors, **options)

    cases = [
        (kind, layout, config, precision)
        for layout, (kind, tma) in itertools.product(LAYOUTS, operands_of(device))
        for config, precision in itertools.product(chosen(device, kind, tma), precisions_of(kind, device.arch))
        if config.kwargs["TMA"] == tma and layout in layouts_of(kind, tma)
    ]
    if device.arch == 90 and fts.gluon:
        for box in (64, 32):  # the last wave in tiles of 64 columns, or of 96
            fts._last_wave = lambda *_, box=box: (1, box)
            for layout, keep in itertools.product(LAYOUTS, (False, True)):
                judge_forward("swiglu_kernel_hopper", box, DTYPES[0], layout, 1024, keep, fts.ONE_FOR_ALL_M)
            judge_forward("swiglu_kernel_hopper", box, fts.FLOAT8, "linear", 1024, False, fts.ONE_FOR_ALL_M)
    fts.gluon = None
    for dtype in DTYPES:
        dy, gate_up = torch.empty(M, N, dtype=dtype), torch.empty(M, 2 * N, dtype=dtype)
        judge("swiglu_backward_kernel", dtype, fts._differentiate_activation, dy, gate_up, gate_up)
    for kind, layout, config, precision in cases:
        fts.usable_configs = lambda *_, config=config: [config]
        torch.set_float32_matmul_precision(precision)
        half = (layout == "row-major") ^ (target in OTHER_HALF)
        for keep in (False, True) if target in IN_FULL else (half,):
            # Kept is ragged too. An epilogue that stores three tiles spills in some of them, once per tile.
            K = 1024 + keep * min(16, config.kwargs["BLOCK_K"] // 2)
            wide, what = kind.startswith("32-bit"), f"{config} {precision}"
            dtype = {"8-bit": fts.FLOAT8, "16-bit": DTYPES[0]}.get(kind, DTYPES[2])
            of_float32 = STACK_OF_FLOAT32_ON_HOPPER if target == "sm_90" else STACK_OF_FLOAT32
            allowed = max(STACK_WHERE_KEPT * keep, of_float32 * wide, STACK_OF_FLOAT8 * (kind == "8-bit"))
            judge_forward("swiglu_kernel", what, dtype, layout, K, keep, fts.DEFAULT, allowed_stack=allowed)
    return lines


@pytest.fixture(scope="module")
def compilations(request):
    """For each target that is to be tested what compile_everything returns."""
    items = [item for item in request.session.items if "compilations" in item.fixturenames]
    targets = [item.callspec.params["target"] for item in items]
    code = f"""import multiprocessing, test_configs
with multiprocessing.get_context("fork").Pool(maxtasksperchild=1) as pool:  # a process for each, which changes state
    print(pool.map(test_configs.compile_everything, {targets}, chunksize=1))"""
    # The interpreter's Triton cannot compile, and a GPU that is there does not matter.
    out = run_python(code, TRITON_INTERPRET="0", CUDA_VISIBLE_DEVICES="", HIP_VISIBLE_DEVICES="")
    return dict(zip(targets, ast.literal_eval(out.splitlines()[-1]), strict=True))


@pytest.mark.parametrize("target", TARGETS)
def test_compiles(compilations, target):
    """Every kernel that the launcher may ask for compiles, fits the shared memory and does not spill."""
    if target == "sm_103" and TRITON_3_5:
        pytest.skip("the ptxas of Triton 3.5 does not know sm_103")
    assert len(compilations[target]) >= 15
    assert not [line for line in compilations[target] if line[1]]
