"""Tests of the fused kernel and of what surrounds it.

They run on whatever there is: a GPU, or the CPU through Triton's interpreter. What needs a GPU skips without one.
"""

import ast
import functools
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import benchmark  # sets TRITON_INTERPRET where there is no GPU, before the kernel is defined
import fused_triton_swiglu as fts
from baseline_torch_swiglu import torch_swiglu
from benchmark import check, make_inputs, nan_in_new_memory, reference, relative_error
from fused_triton_swiglu import fused_swiglu

HERE = Path(__file__).parent
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPES = tuple(benchmark.DTYPES.values())
LAYOUTS = benchmark.LAYOUTS
H100 = fts.Device("H100", "cuda", 90, 132, 227 * 1024)
TARGETS = {
    "sm_80": fts.Device("A100", "cuda", 80, 108, 163 * 1024),
    "sm_90": H100,
    "sm_100": fts.Device("B200", "cuda", 100, 148, 227 * 1024),
    "gfx942": fts.Device("MI300X", "hip", "gfx942", 304, 64 * 1024),
}
needs_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")

# What one rounding to the dtype costs at most, norm over norm; for float32, what a sum over K = 4096 costs.
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 3e-6}


# The default configuration: what tuning may choose instead has tests of its own, and would be tuned for each size here.
untuned = functools.partial(fused_swiglu, autotune=False)


def assert_right(x, w_gate, w_up, run=untuned):
    """No element unwritten, each within the benchmark's tolerance, the error no larger than eager PyTorch's own.

    Or than ROUNDING, where that is more: eager may be exact on a few elements, and sums few rows of float32 better.
    """
    shape = (*x.shape[:-1], w_gate.shape[1])
    expected = reference(x, w_gate, w_up)
    results = []
    correct, error = check(lambda: results.append(run(x, w_gate, w_up)) or results[-1], expected)
    eager_error = relative_error(torch_swiglu(x, w_gate, w_up), expected)
    assert correct
    assert error <= max(eager_error, ROUNDING[x.dtype])
    assert results[-1].shape == shape and results[-1].dtype == x.dtype and results[-1].is_contiguous()


def randn(*shape, dtype=torch.float32, scale=1):
    return (torch.randn(shape, device=DEVICE) * scale).to(dtype)


# ---- Right on any sizes, dtypes and strides ----

SIZES = [(1, 1, 1), (1, 64, 96), (2, 3, 5), (16, 16, 32), (17, 33, 65), (65, 40, 129), (129, 67, 31), (257, 24, 8)]
SIZES += [(1, 4099, 1031), (300, 1024, 4096), (1031, 257, 509), (4097, 264, 1032)] if GPU else []


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M, K, N", SIZES)
def test_sizes(M, K, N, dtype, layout):
    assert_right(*make_inputs(M, K, N, dtype, layout, DEVICE))


def strided(draw, rows, columns, dtype, scale):
    """A (rows, columns) tensor in one of the layouts that views make."""
    scaled = functools.partial(randn, dtype=dtype, scale=scale)
    kind = draw(st.sampled_from(["row-major", "transposed", "padded", "transposed, padded", "steps", "offset"]))
    if kind == "transposed":
        return scaled(columns, rows).t()
    if kind == "padded":
        return scaled(rows, columns + 8)[:, :columns]
    if kind == "transposed, padded":
        return scaled(columns, rows + 8)[:, :rows].t()
    if kind == "steps":
        return scaled(2 * rows, 3 * columns)[::2, ::3]
    if kind == "offset":
        return scaled(rows * columns + 1)[1:].view(rows, columns)
    return scaled(rows, columns)


@st.composite
def any_inputs(draw):
    largest = 300 if GPU else 70
    M, K, N = (draw(st.integers(1, largest)) for _ in range(3))
    if draw(st.booleans()):  # aligned, where vector loads and descriptors apply
        K, N = 8 * (K // 8 + 1), 8 * (N // 8 + 1)
    dtype = draw(st.sampled_from(DTYPES))
    torch.manual_seed(draw(st.integers(0, 2**32 - 1)))
    return [strided(draw, *shape, dtype, scale) for shape, scale in (((M, K), 1), ((K, N), K**-0.5), ((K, N), K**-0.5))]


@settings(max_examples=100 if GPU else 30, deadline=None, derandomize=True)
@given(any_inputs())
def test_any_strides(inputs):
    assert_right(*inputs)


K, N = 72, 136  # multiples of 8, so that descriptors apply where the strides allow them


def stacked_halves(layout, up_first):
    if layout == "linear":
        halves = randn(2 * N, K, dtype=torch.float16).div(K**0.5).t().chunk(2, dim=1)
    elif layout == "interleaved":
        stacked = randn(2 * N, K, dtype=torch.float16).div(K**0.5)
        halves = stacked[::2].t(), stacked[1::2].t()
    else:
        halves = randn(K, 2 * N, dtype=torch.float16).div(K**0.5).chunk(2, dim=1)
    return reversed(halves) if up_first else halves


@pytest.mark.parametrize("M", [1, 40, 130])
@pytest.mark.parametrize("up_first", [False, True])
@pytest.mark.parametrize("layout", [*LAYOUTS, "interleaved"])
def test_halves_of_one_weight(layout, up_first, M):
    w_gate, w_up = stacked_halves(layout, up_first)
    assert_right(randn(M, K, dtype=torch.float16), w_gate, w_up)


@pytest.mark.parametrize("M", [3, 130])
def test_same_weight_twice_and_unlike_layouts(M):
    x, linear, _ = make_inputs(M, K, N, torch.float16, "linear", DEVICE)
    assert_right(x, linear, linear)
    assert_right(x, linear, linear.contiguous())
    assert_right(x, linear.contiguous(), linear)


@pytest.mark.parametrize("unaligned", [(0,), (1,), (2,), (1, 2)])
def test_two_bytes_off(unaligned):
    """Strides that suit a descriptor and vector loads, addresses that do not."""
    inputs = [*make_inputs(130, K, N, torch.float16, "linear", DEVICE)]
    for i in unaligned:
        storage = torch.empty(inputs[i].numel() + 1, dtype=torch.float16, device=DEVICE)
        inputs[i] = storage[1:].as_strided(inputs[i].shape, inputs[i].stride()).copy_(inputs[i])
    assert_right(*inputs)


LEADING = {
    "vector": lambda x: x[0, 0, 0],
    "batch of 1": lambda x: x[:1, 0, 0],
    "three": lambda x: x[0],
    "batch of 1 and one row": lambda x: x[:1, :1, 0],
    "four": lambda x: x,
    "transposed": lambda x: x[0].transpose(0, 1),
    "sliced": lambda x: x[0, :, 1:3],
    "every other column": lambda x: x[0, ..., ::2].repeat_interleave(2, -1)[..., ::2],
    "expanded": lambda x: x[0, :1].expand(5, -1, -1),
    "three row strides": lambda x: x[:, ::2].transpose(1, 2)[:, :2],
    "K first": lambda x: x[0, 0].t().contiguous().t(),
}


@pytest.mark.parametrize("name", LEADING)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_leading_dimensions(name, layout):
    x = LEADING[name](randn(2, 3, 35, 2 * K if "column" in name else K, dtype=torch.float16))
    _, w_gate, w_up = make_inputs(1, x.shape[-1], N, torch.float16, layout, DEVICE)
    assert_right(x, w_gate, w_up)


@pytest.mark.parametrize("M, K, N", [(0, 8, 4), (3, 8, 0), (3, 0, 4), (0, 0, 0)])
def test_empty(M, K, N):
    with nan_in_new_memory():
        y = fused_swiglu(randn(2, M, K), randn(K, N), randn(K, N))
    assert torch.equal(y, torch.zeros(2, M, N, device=DEVICE))


def test_extreme_values():
    """Where exp overflows, silu is 0 or the value itself; NaN stays NaN."""
    x = torch.tensor([[1.0], [-1.0], [float("nan")]], device=DEVICE)
    w_gate, w_up = (torch.tensor([[a, 0.0]], device=DEVICE) for a in (200.0, 3.0))
    y = fused_swiglu(x, w_gate, w_up)
    assert torch.allclose(y[:2], torch.tensor([[600.0, 0.0], [0.0, 0.0]], device=DEVICE))
    assert y[2].isnan().all()


@pytest.mark.parametrize("wrong", ["last column of K left out", "gate and up exchanged", "last row unwritten"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_check_can_fail(wrong, dtype):
    inputs = make_inputs(8, 512, 64, dtype, "linear", DEVICE)
    x, w_gate, w_up = (t.double() for t in inputs)

    def run():
        if wrong == "last column of K left out":
            return torch_swiglu(x[:, :-1], w_gate[:-1], w_up[:-1]).to(dtype)
        if wrong == "gate and up exchanged":
            return torch_swiglu(x, w_up, w_gate).to(dtype)
        y = torch.empty(8, 64, dtype=dtype, device=DEVICE)
        y[:-1] = torch_swiglu(x[:-1], w_gate, w_up)
        return y

    assert not check(run, reference(*inputs))[0]


# ---- Bad input ----

A, B = torch.zeros(4, 8), torch.zeros(8, 6)
BAD_INPUT = [
    ((A.tolist(), B, B), TypeError, "x is a list: expected a torch.Tensor"),
    ((A.int(), B, B), TypeError, "x is torch.int32: expected torch.bfloat16, torch.float16 or torch.float32"),
    ((A.double(), B, B), TypeError, "x is torch.float64: expected"),
    ((A, B.half(), B), TypeError, "w_gate is torch.float16, but x is torch.float32: all three must have one dtype"),
    ((A, B, B.half()), TypeError, "w_up is torch.float16, but x is torch.float32"),
    ((A[0, 0], B, B), ValueError, r"x has no dimensions: expected (..., K)"),
    ((A, B[0], B), ValueError, r"w_gate is (6,): expected two dimensions, (K, N)"),
    ((A, B, B[None]), ValueError, r"w_up is (1, 8, 6): expected two dimensions, (K, N)"),
    ((A, B, B[:, :5]), ValueError, r"w_up is (8, 5), but w_gate is (8, 6): both must be (K, N)"),
    ((A, B.t(), B.t()), ValueError, r"w_gate is (6, 8), but x is (4, 8): w_gate must be (8, N)"),
    ((A, B.to("meta"), B), ValueError, "w_gate is on meta, but x is on "),
    ((A, B.clone().requires_grad_(), B), NotImplementedError, "w_gate requires grad"),
]


@pytest.mark.parametrize("arguments, error, message", BAD_INPUT, ids=[case[2] for case in BAD_INPUT])
def test_bad_input(arguments, error, message):
    def to_device(t):
        return t.detach().to(DEVICE).requires_grad_(t.requires_grad) if isinstance(t, torch.Tensor) else t

    moved = [t if getattr(t, "is_meta", False) else to_device(t) for t in arguments]
    with pytest.raises(error, match=re.escape(message)):
        fused_swiglu(*moved)


def test_cpu_tensors_need_the_interpreter(monkeypatch):
    monkeypatch.setattr(fts, "INTERPRETED", False)
    with pytest.raises(ValueError, match=re.escape("x is on cpu: expected a GPU (or the CPU with TRITON_INTERPRET=1)")):
        fused_swiglu(A, B, B)


# ---- What a later call may reuse ----


def test_launch_key_tells_apart():
    """A compiled launch is reused under its key: whatever it depends on must change the key."""
    x, w_gate, w_up = make_inputs(64, 72, 136, torch.float32, "linear", DEVICE)
    unaligned = torch.empty(x.numel() + 1, device=DEVICE)[1:].view(x.shape)
    calls = {
        "as it is": (x, w_gate, w_up),
        "weights exchanged": (x, w_up, w_gate),
        "one weight twice": (x, w_gate, w_gate),
        "another address": (unaligned, w_gate, w_up),
        "fewer rows": (x[:1], w_gate, w_up),
        "more dimensions": (x[None], w_gate, w_up),
        "another stride of x": (x.t().contiguous().t(), w_gate, w_up),
        "another layout of w_up": (x, w_gate, w_up.contiguous()),
        "another dtype of w_up": (x, w_gate, w_up.double()),
        "another device of w_up": (x, w_gate, w_up.to("meta")),
        "requires grad": (x, w_gate, w_up.detach().requires_grad_()),
    }
    keys = {name: fts._launch_key(*tensors) for name, tensors in calls.items()}
    previous = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    keys["another precision"] = fts._launch_key(x, w_gate, w_up)
    torch.set_float32_matmul_precision(previous)
    assert len(set(keys.values())) == len(keys), keys
    assert fts._launch_key(x + 1, w_gate, w_up) == keys["as it is"]


# ---- The file by itself ----


def run_python(code, cwd, **environment):
    """Standard output of a fresh interpreter that runs `code`."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("gluon", ["with Gluon", "without Gluon"])
def test_file_works_when_copied_alone(gluon, tmp_path):
    shutil.copy(HERE / "fused_triton_swiglu.py", tmp_path)
    # Gluon as it might be one day, without a name that is needed here.
    hide = "from triton.experimental.gluon.language.nvidia import hopper; del hopper.warpgroup_mma_wait\n"
    out = run_python(
        f"{hide if gluon == 'without Gluon' else ''}import torch\n"
        "from fused_triton_swiglu import fused_swiglu\n"
        "assert not torch.cuda.is_initialized()  # nothing happens at import\n"
        f"x, w_gate, w_up = (torch.randn(s, device='{DEVICE}') for s in ((3, 5), (5, 7), (5, 7)))\n"
        "expected = torch.nn.functional.silu(x @ w_gate) * (x @ w_up)\n"
        "assert torch.allclose(fused_swiglu(x, w_gate, w_up), expected, atol=1e-4)\n"
        "print('right')",
        tmp_path,
    )
    assert out == "right\n"


def test_file_needs_torch_and_triton_only():
    imported = set()
    for node in ast.walk(ast.parse((HERE / "fused_triton_swiglu.py").read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    assert imported - set(sys.stdlib_module_names) == {"torch", "triton"}


# ---- Configurations ----

EVERY_CONFIG = [(kind, config) for kind, configs in fts.CONFIGS.items() for config in configs]


def config_id(value):
    if isinstance(value, str):
        return value
    marks = [name for name in ("PERSISTENT", "FLATTEN", "SWAP_AB") if value.kwargs[name]]
    marks += [f"TMA-{value.kwargs['TMA']}"] if value.kwargs["TMA"] else []
    tile = "x".join(str(value.kwargs[name]) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
    return " ".join([tile, f"{value.num_warps}w", f"{value.num_stages}s", *marks])


@pytest.mark.parametrize("tma", ["", "x", "xw"])
@pytest.mark.parametrize("kind", fts.CONFIGS)
def test_there_is_always_a_configuration(kind, tma):
    small = fts.Device("RTX 4090", "cuda", 89, 128, 99 * 1024)
    for device in (*TARGETS.values(), small):
        if tma and (kind != "16-bit" or device.arch not in (90, 100)):
            continue
        if kind == "tf32" and device.backend == "hip":
            continue
        for M in (1, 17, 33, 65, 129, 257, 5000, 10**6):
            for N in (1, 512, 14336):
                configs = fts.usable_configs(kind, M, N, tma, device)
                assert configs and len(configs) <= 12, (device, M, N)


def test_every_configuration_is_chosen_somewhere():
    chosen = []
    for device in TARGETS.values():
        for kind in fts.CONFIGS:
            for M in (1, 32, 64, 128, 256, 4096):
                for tma in ("", "x", "xw"):
                    chosen += fts.usable_configs(kind, M, 14336, tma, device)
                    chosen += fts.usable_configs(kind, M, 512, tma, device)
    assert all(config in chosen for _, config in EVERY_CONFIG)


def force(config):
    """fused_swiglu with this configuration."""

    def run(x, w_gate, w_up):
        y = torch.empty(*x.shape[:-1], w_gate.shape[1], dtype=x.dtype, device=x.device)
        fts._launch_triton(fts._in_rows(x), w_gate, w_up, y, autotune=False, config=config)
        return y

    return run


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind, config", EVERY_CONFIG, ids=config_id)
def test_every_configuration(kind, config, layout):
    """One tile, ragged edges, many waves; several times, as a race in one configuration came and went (FINDINGS)."""
    if config.kwargs["TMA"] == "xw" and layout != "linear":
        pytest.skip("the weights' descriptor takes nn.Linear weights only")
    block_m, block_n, block_k = (config.kwargs[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
    sizes = [(block_m, block_k, block_n), (block_m + 1, 2 * block_k + 8, block_n + 8)]
    if GPU:
        sizes += [(2048, 4096, 14336), (1037, 1096, 4104), (8192, 4096, 4096)]
        if not config.kwargs["TMA"]:
            sizes += [(517, 1031, 2063)]
    if kind == "tf32":
        if not GPU:
            pytest.skip("the interpreter multiplies in full float32")
        if torch.version.hip:
            pytest.skip("float32 products are never tf32 on AMD")
    dtypes = DTYPES[:2] if kind == "16-bit" and GPU else DTYPES[1:2] if kind == "16-bit" else DTYPES[2:]
    previous = torch.get_float32_matmul_precision()
    for M, K, N in sizes:
        for dtype in dtypes:
            inputs = make_inputs(M, K, N, dtype, layout, DEVICE)
            expected = reference(*inputs)
            torch.set_float32_matmul_precision("high" if kind == "tf32" else "highest")
            try:
                eager_error = relative_error(torch_swiglu(*inputs), expected)
                # Rounding both operands to tf32 costs about 4.2e-4, on both sides alike; cutting them off, 1.6e-3.
                limit = 1.05 * eager_error if kind == "tf32" else max(eager_error, ROUNDING[dtype])
                for _ in range(3 if GPU else 1):
                    with nan_in_new_memory():
                        error = relative_error(force(config)(*inputs), expected)
                    assert error <= limit, (M, K, N, dtype)
            finally:
                torch.set_float32_matmul_precision(previous)


needs_hopper = pytest.mark.skipif(
    not GPU or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU (sm_90)"
)


@needs_hopper
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_hopper_kernel(dtype, layout):
    """One tile, ragged edges, many waves, the last one in whole and in half tiles; several times, as for the others."""
    sizes = [(1, 8, 8), (128, 64, 128), (129, 72, 136), (77, 264, 520), (1037, 1096, 4104), (4100, 1024, 8192)]
    sizes += [(512, 4096, 14336), (2048, 4096, 14336), (8192, 4096, 4096)]
    for M, K, N in sizes:
        x, w_gate, w_up = inputs = make_inputs(M, K, N, dtype, layout, DEVICE)
        expected = reference(*inputs)
        limit = max(relative_error(torch_swiglu(*inputs), expected), ROUNDING[dtype])
        for _ in range(3):
            y = torch.full((M, N), float("nan"), dtype=dtype, device=DEVICE)
            fts._launch_hopper(fts._in_rows(x), w_gate, w_up, y)
            assert relative_error(y, expected) <= limit, (M, K, N)


def test_where_the_hopper_kernel_applies(monkeypatch):
    monkeypatch.setattr(fts, "INTERPRETED", False)
    M, K, N = 300, 72, 136 * 45
    x, w_gate, w_up = make_inputs(M, K, N, torch.bfloat16, "linear", "cpu")
    row_major = w_gate.contiguous(), w_up.contiguous()
    padded = torch.empty(M, K + 1, dtype=torch.bfloat16)[:, :K]
    unaligned = torch.empty(N * K + 1, dtype=torch.bfloat16)[1:].view(N, K).t()
    cases = [
        (True, x, w_gate, w_up),
        (True, x, *row_major),
        (True, x, *torch.cat(row_major, dim=1).chunk(2, dim=1)),
        (True, torch.cat([x, x], dim=1)[:, K:], w_gate, w_up),
        (False, x[:128], w_gate, w_up),  # swiglu_kernel is faster
        (False, x, w_gate[:, :1024], w_up[:, :1024]),  # fewer tiles than a third of the SMs
        (False, x, w_gate[:, :-4], w_up[:, :-4]),  # y does not come in steps of 16 bytes
        (False, x, w_gate, row_major[1]),
        (False, x, w_gate, unaligned),
        (False, padded, w_gate, w_up),
        (False, torch.cat([x, x], dim=1)[:, ::2], w_gate, w_up),
        (False, x.t().contiguous().t(), w_gate, w_up),
        (False, x.float(), w_gate.float(), w_up.float()),
    ]
    for i, (applies, rows, gate, up) in enumerate(cases):
        assert fts.hopper_applies(fts._in_rows(rows), gate, up, H100) == applies, i
    for device in (TARGETS["sm_80"], TARGETS["sm_100"], TARGETS["gfx942"]):
        assert not fts.hopper_applies(fts._in_rows(x), w_gate, w_up, device)


def compile_hopper(target, element, layout):
    """swiglu_kernel_hopper as the launcher would compile it, without a GPU."""
    import triton
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonASTSource

    tile_m, box, consumers = fts.TILE_M.value, fts.BOX.value, fts.CONSUMERS.value
    rows = {"x_desc": tile_m, "w_gate_desc": box, "w_up_desc": box, "y_desc": tile_m // consumers}
    swizzled = gl.NVMMASharedLayout(2 * box, 16)
    types = {name: f"tensordesc<{element}[{rows[name]}, {box}],{swizzled!r}>" for name in rows}
    types |= {"M": "i32", "N": "i32", "K": "i32", "ROW_MAJOR": "constexpr"}
    source = GluonASTSource(
        fts.swiglu_kernel_hopper, types, constexprs={(len(types) - 1,): layout == "row-major"}, attrs={}
    )
    return triton.compile(source, target=target, options=fts.HOPPER_OPTIONS)


def compile_for(target, kind, config, layout, even_k):
    """What the launcher would compile for tensors aligned to 16 bytes, without a GPU."""
    import triton  # not above: it reads TRITON_INTERPRET when it is imported, before benchmark could set it

    kernel = fts.swiglu_kernel.fn
    element = "bf16" if kind == "16-bit" else "fp32"
    tile_m, tile_n, tile_k = (config.kwargs[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
    constants = {"M_INNER": 1, "stride_xk": 1, "LAYOUT": "", "DEVICE": "", "UP_FIRST": False}
    constants |= dict.fromkeys(("stride_gk", "stride_uk") if layout == "linear" else ("stride_gn", "stride_un"), 1)
    constants |= {"EVEN_K": even_k, "SAME_STRIDE_K": True, "INPUT_PRECISION": "tf32" if kind == "tf32" else "ieee"}
    constants |= config.kwargs
    types = {name: f"*{element}" if name.endswith("_ptr") else "i32" for name in kernel.arg_names}
    types["x_desc"] = f"tensordesc<{element}[{tile_m},{tile_k}]>"
    types["w_desc"] = f"tensordesc<{element}[2,{tile_n},{tile_k}]>"
    constants |= {name: None for name in ("x_desc", "w_desc") if name[0] not in config.kwargs["TMA"]}
    types |= dict.fromkeys(constants, "constexpr")
    aligned = [i for i, name in enumerate(kernel.arg_names) if types[name] == "i32" or types[name][0] == "*"]
    source = triton.compiler.ASTSource(
        kernel,
        types,
        constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    if target.backend == "cuda":
        options["maxnreg"] = 255
    return triton.compile(source, target=target, options=options)


def stack_bytes(compiled):
    """Bytes of the stack frame: above 0, registers were spilled."""
    if "amdgcn" in compiled.asm:
        return int(re.search(r"\.private_segment_fixed_size: *(\d+)", compiled.asm["amdgcn"])[1])
    cuobjdump = Path(sys.modules["triton"].__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", usage)[1])


def compile_everything(target_name):
    """Compile each configuration that may be chosen on a target; print a line for each that spills or does not fit."""
    from triton.backends.compiler import GPUTarget

    device = TARGETS[target_name]
    target = GPUTarget(device.backend, device.arch, 64 if device.backend == "hip" else 32)
    compiled = 0
    for kind, layout in itertools.product(fts.CONFIGS, LAYOUTS):
        if kind == "tf32" and device.backend == "hip":
            continue
        tma = "" if kind != "16-bit" or device.arch not in (90, 100) else "xw" if layout == "linear" else "x"
        configs = []
        for M, N, operands in itertools.product((1, 32, 64, 128, 256, 4096), (512, 14336), {"", tma}):
            usable = fts.usable_configs(kind, M, N, operands, device)
            configs += [config for config in usable if config not in configs]
        for config, even_k in itertools.product(configs, (True, False)):
            result = compile_for(target, kind, config, layout, even_k)
            compiled += 1
            if stack_bytes(result) or result.metadata.shared > device.shared_memory:
                print(f"{kind} {layout} EVEN_K={even_k} {config}:", end=" ")
                print(f"{stack_bytes(result)} bytes of stack, {result.metadata.shared} of shared memory")
    if device.arch == 90:
        for element, layout in itertools.product(("bf16", "fp16"), LAYOUTS):
            result = compile_hopper(target, element, layout)
            compiled += 1
            if stack_bytes(result) or result.metadata.shared > device.shared_memory:
                print(f"swiglu_kernel_hopper {element} {layout}:", end=" ")
                print(f"{stack_bytes(result)} bytes of stack, {result.metadata.shared} of shared memory")
    print("compiled", compiled)


@pytest.fixture(scope="module")
def compilations():
    """A process for each target, as the interpreter's Triton cannot compile; all at once, to use every core."""
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    processes = {}
    for name in TARGETS:
        command = [sys.executable, "-c", f"import test_swiglu; test_swiglu.compile_everything({name!r})"]
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        processes[name] = subprocess.Popen(command, cwd=HERE, env=environment, **pipe)
    yield processes
    for process in processes.values():
        process.kill()


@pytest.mark.parametrize("target", TARGETS)
def test_every_configuration_compiles(compilations, target):
    """Without a GPU, for each kind of target: it compiles, fits the shared memory and does not spill."""
    out, _ = compilations[target].communicate(timeout=800)
    assert compilations[target].returncode == 0, out[-3000:]
    *problems, last = out.splitlines()
    assert not problems, out
    assert int(last.removeprefix("compiled ")) >= 20


# ---- On a GPU: tuning, memory, capture, devices ----


@pytest.fixture
def timings(monkeypatch):
    """A list that gets an entry for each configuration that the autotuner times."""
    entries = []

    def do_bench(kernel_call, quantiles):
        entries.append(kernel_call)
        kernel_call()
        return [1.0] * len(quantiles)

    for tuner in fts.TUNERS.values():
        monkeypatch.setitem(tuner.__dict__, "do_bench", do_bench)  # a cached property
        monkeypatch.setattr(tuner, "cache_results", False)
    return entries


@needs_gpu
@pytest.mark.parametrize("name", ["linear", "row-major", "stacked", "transposed x", "three row strides", "unlike"])
def test_no_operand_is_copied(name):
    M, K, N = 512, 1024, 2048
    x, w_gate, w_up = make_inputs(M, K, N, torch.bfloat16, "row-major" if name == "row-major" else "linear", DEVICE)
    if name == "stacked":
        w_up, w_gate = torch.cat([w_gate.t(), w_up.t()]).t().chunk(2, dim=1)
    if name == "transposed x":
        x = x.t().contiguous().t()
    if name == "three row strides":
        x = x.view(4, 8, 16, K)[:, ::2].transpose(1, 2)[:, :8]
    if name == "unlike":
        w_up = w_up.contiguous()
    fused_swiglu(x, w_gate, w_up)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    y = fused_swiglu(x, w_gate, w_up)
    assert torch.cuda.max_memory_allocated() - before == y.nbytes  # all sizes here are multiples of 512 bytes


@needs_gpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("large", ["x", "w", "w, many rows", "y"])
def test_more_than_2_to_the_31_elements(large, layout):
    sizes = {"x": (2**20 + 65, 2056, 64), "w": (65, 32776, 65544), "y": (2**18 + 65, 16, 8200)}
    M, K, N = (sizes | {"w, many rows": (200, 32776, 65544)})[large]
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of GPU memory")
    x = torch.randn(M, K, device=DEVICE, dtype=torch.bfloat16)
    shape = (N, K) if layout == "linear" else (K, N)
    w_gate, w_up = (torch.randn(shape, device=DEVICE, dtype=torch.bfloat16).mul_(K**-0.5) for _ in range(2))
    if layout == "linear":
        w_gate, w_up = w_gate.t(), w_up.t()
    with nan_in_new_memory():
        y = untuned(x, w_gate, w_up)
    rows, columns = slice(-65, None), slice(-64, None)  # the farthest from the start
    expected = reference(x[rows], w_gate[:, columns], w_up[:, columns])
    assert relative_error(y[rows, columns], expected) <= ROUNDING[torch.bfloat16]
    assert not y.isnan().any()


@needs_gpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("M, N", [(1, 521), (300, 820), (300, 5768)])
def test_graph_capture_never_tunes(M, N, layout, timings):
    inputs = make_inputs(M, 328, N, torch.bfloat16, layout, DEVICE)  # sizes no other test has
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = fused_swiglu(*inputs)
    y.fill_(float("nan"))
    graph.replay()
    assert relative_error(y, reference(*inputs)) <= ROUNDING[torch.bfloat16]
    assert not timings
    fused_swiglu(*inputs)
    x, w_gate, w_up = inputs  # outside a capture it does, where there is something to tune
    assert bool(timings) != fts.hopper_applies(fts._in_rows(x), w_gate, w_up, fts.device_of(0))


@needs_gpu
def test_when_tuning_happens(timings):
    sizes = {M: make_inputs(M, 328, 344, torch.bfloat16, "linear", DEVICE) for M in (520, 777, 1024, 1025)}
    untuned(*sizes[520])
    assert not timings
    fused_swiglu(*sizes[520])
    once = len(timings)
    assert once > 1
    for M in (520, 777, 1024):  # one bucket
        assert_right(*sizes[M], run=fused_swiglu)
    assert len(timings) == once
    fused_swiglu(*sizes[1025])
    assert len(timings) > once


@needs_gpu
@pytest.mark.parametrize("N", [520, 5640])
def test_a_second_call_launches_the_same_kernel(N, monkeypatch):
    """What a launch depends on and could be forgotten: alignment, the order of the weights, the precision."""
    monkeypatch.setattr(fts, "_launchers", {})
    M, K = 130, 264
    x, w_gate, w_up = make_inputs(M, K, N, torch.bfloat16, "linear", DEVICE)
    storage = torch.empty(M * K + 8, dtype=torch.bfloat16, device=DEVICE)
    unaligned = storage[1 : 1 + M * K].view(M, K).copy_(x)
    for _ in range(2):
        for gate, up in ((w_gate, w_up), (w_up, w_gate), (w_gate, w_gate), (w_gate, w_up.contiguous())):
            for rows in (x, unaligned, x[:1], x[:, None], x.t().contiguous().t()):
                assert_right(rows, gate, up)
    single = make_inputs(M, K, N, torch.float32, "linear", DEVICE)
    errors = {}
    previous = torch.get_float32_matmul_precision()
    for precision in ("highest", "high", "highest", "high"):
        torch.set_float32_matmul_precision(precision)
        errors.setdefault(precision, []).append(relative_error(untuned(*single), reference(*single)))
    torch.set_float32_matmul_precision(previous)
    assert max(errors["highest"]) < 1e-5 < 1e-4 < min(errors["high"])
    with pytest.raises(NotImplementedError, match="x requires grad"):
        fused_swiglu(x.requires_grad_(), w_gate, w_up)


@needs_gpu
def test_tuning_is_quick_and_kept_on_disk(tmp_path):
    code = (
        "import sys, time, torch, triton.testing\n"
        "import fused_triton_swiglu as fts\n"
        "from benchmark import make_inputs\n"
        "measured = 0\n"
        "def count(call, quantiles):\n"
        "    global measured\n"
        "    measured += 1\n"
        "    return triton.testing.do_bench(call, quantiles=quantiles)\n"
        "fts.TUNERS['16-bit']._do_bench = count\n"
        "seconds = []\n"
        "for M, layout in ((1, 'linear'), (128, 'linear'), (64, 'row-major'), (4096, 'linear')):\n"
        "    inputs = make_inputs(M, 4096, 14336, torch.bfloat16, layout, 'cuda')\n"
        "    start = time.time()\n"
        "    fts.fused_swiglu(*inputs)\n"
        "    torch.cuda.synchronize()\n"
        "    seconds.append(time.time() - start)\n"
        "print(measured, max(seconds))\n"
    )
    (first, seconds), (second, _) = (
        map(float, run_python(code, HERE, TRITON_CACHE_DIR=str(tmp_path)).split()) for _ in range(2)
    )
    assert first > 5 and second == 0
    assert seconds < 15


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("M, N", [(3, 520), (200, 520), (200, 5640)])
def test_runs_on_the_device_of_its_inputs(M, N, layout):
    inputs = [t.to("cuda:1") for t in make_inputs(M, 328, N, torch.bfloat16, layout, "cuda:0")]
    assert torch.cuda.current_device() == 0
    assert_right(*inputs, run=fused_swiglu)
    assert fused_swiglu(*inputs).device == inputs[0].device
    with pytest.raises(ValueError, match="w_up is on cuda:0, but x is on cuda:1"):
        fused_swiglu(*inputs[:2], inputs[2].to("cuda:0"))


# ---- benchmark.py as a process ----


def run_benchmark(*arguments, script=HERE / "benchmark.py", cwd):
    command = [sys.executable, str(script), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600)


def test_benchmark(tmp_path):
    small = ["--m", "65", "1", "--k", "264", "--n", "520"] if GPU else []
    done = run_benchmark(*small, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(tmp_path / "swiglu_benchmark.csv")
    assert list(table) == benchmark.COLUMNS
    fused = table[(table.provider == "fused") & (table.method != benchmark.HOST)]
    assert (fused.rel_error < ROUNDING[torch.bfloat16]).all()
    if GPU:
        assert (table.ms_p20 <= table.ms).all() and (table.ms <= table.ms_p80).all() and (table.ms > 0).all()
        host, table = table[table.method == benchmark.HOST], table[table.method == benchmark.FLUSHED]
        assert [*host.provider] == ["torch", "torch.compile", "fused"]
        assert host.ms[host.provider == "fused"].item() < 1  # ms: no tuning is in it
        assert [*zip(table.M, table.provider, strict=True)] == [(M, p) for M in (1, 65) for p in benchmark.PROVIDERS]
        assert (table.K == 264).all() and (table.N == 520).all()
        assert (tmp_path / "swiglu_benchmark.png").stat().st_size > 10_000
    else:
        assert "Speed was not measured" in done.stdout and benchmark.RECORDED_PLOT in done.stdout
        assert (HERE / benchmark.RECORDED_PLOT).is_file()
        assert set(table.dtype) == set(benchmark.DTYPES) and set(table.layout) == set(LAYOUTS)
        measured = ["method", "ms", "ms_p20", "ms_p80", "tflops", "gbps", "speedup", "fraction_of_floor"]
        assert table[measured].isna().all(axis=None)


@needs_gpu
def test_benchmark_rotating_weights_and_peers(tmp_path):
    """One file more, times of the same order, and a line for each peer that is not installed or does not run."""
    small = ["--m", "65", "--k", "2048", "--n", "4104", "--providers", "all", "--rotate-weights"]
    done = run_benchmark(*small, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(tmp_path / "swiglu_benchmark_rotating_weights.csv")
    table = table[table.method == benchmark.ROTATING]
    assert {*benchmark.PROVIDERS} <= {*table.provider}
    assert table.ms.between(1e-3, 1).all()
    for name in benchmark.PEERS:
        assert (name in {*table.provider}) != (f"{name} left out: " in done.stdout + done.stderr)


def test_benchmark_stops_at_a_wrong_kernel(tmp_path):
    for name in ("benchmark.py", "baseline_torch_swiglu.py", "fused_triton_swiglu.py"):
        shutil.copy(HERE / name, tmp_path)
    kernel = (HERE / "fused_triton_swiglu.py").read_text()
    broken = kernel.replace("offs_k < K - k", "offs_k < K - k - 1")
    assert broken != kernel
    (tmp_path / "fused_triton_swiglu.py").write_text(broken)
    small = ["--m", "3", "--k", "67", "--n", "33"] if GPU else []
    done = run_benchmark(*small, script=tmp_path / "benchmark.py", cwd=tmp_path)
    assert done.returncode == 1
    assert "WRONG" in done.stdout + done.stderr
    if GPU:
        assert not (tmp_path / "swiglu_benchmark.csv").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--m", "0"], "argument --m: 0 is not 1 or more"),
        (["--k", "many"], "argument --k: invalid positive_int value: 'many'"),
        (["--model", "gpt-1"], "argument --model: invalid choice: 'gpt-1'"),
        (["--model", "llama-3-8b", "--k", "8"], "--model gives K and N"),
        (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["--providers", "cublas"], "argument --providers: invalid choice: 'cublas'"),
        (["--plot", "nothing.csv"], "--plot nothing.csv: no such file"),
        (["--plot", "empty.csv"], "--plot empty.csv: no column K, M, N"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_benchmark_refuses(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.csv").write_text("gpu\nnone\n")
    with pytest.raises(SystemExit) as stopped:
        benchmark.parse_args(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_interrupt_keeps_what_was_measured(tmp_path, monkeypatch):
    table = pd.read_csv((HERE / benchmark.RECORDED_PLOT).with_suffix(".csv"))
    host_rows = table[table.method == benchmark.HOST].to_dict("records")
    table = table[table.method == benchmark.FLUSHED]

    def measure(M, K, N, args, ceilings, progress):
        if M > 16:
            raise KeyboardInterrupt
        return table[table.M == M].to_dict("records")

    monkeypatch.setattr(benchmark, "measure", measure)
    monkeypatch.setattr(benchmark, "measure_ceilings", lambda dtype: (3e9, 8e11))
    monkeypatch.setattr(benchmark, "measure_host_cost", lambda args: host_rows)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    status = benchmark.run_on_gpu(benchmark.parse_args(["--m", "1", "16", "64", "--output-dir", str(tmp_path)]))
    assert status == 130
    assert set(pd.read_csv(tmp_path / "swiglu_benchmark.csv").M) == {1, 16}
    assert (tmp_path / "swiglu_benchmark.png").is_file()


RECORDED = sorted((HERE / "results").glob("*.csv"))


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_recorded_results(path, tmp_path):
    table = pd.read_csv(path)
    assert list(table) == benchmark.COLUMNS
    assert path.with_suffix(".png").is_file()
    done = run_benchmark("--plot", str(path), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / path.with_suffix(".png").name).stat().st_size > 10_000


def recorded_times(name):
    """A table of microseconds, rows by M and columns by provider, and the CSV it comes from."""
    table = pd.read_csv(HERE / "results" / f"{name}.csv")
    table = table[table.method == benchmark.FLUSHED].reset_index()
    return table.pivot(index="M", columns="provider", values="ms") * 1e3, table


@pytest.mark.parametrize("layout", LAYOUTS)
def test_readme_tables_are_the_recorded_ones(layout):
    """| M | a column for each provider, in microseconds | speed-up of the fused kernel |, from the CSV."""
    readme = (HERE / "README.md").read_text()
    times, table = recorded_times(f"h100_bfloat16_{layout}")
    for M, row in times.iterrows():
        cells = [f"{M}", *(f"{row[name]:.1f}" for name in benchmark.PROVIDERS), f"{row.torch / row.fused:.2f}x"]
        assert "| " + " | ".join(cells) + " |" in readme
    assert str(table.gpu[0]) in readme and table.torch[0] in readme and table.triton[0] in readme


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", ["8192x28672", "2048x5632", "1024x4096"])
def test_readme_table_of_other_shapes_is_the_recorded_one(shape, layout):
    """A row for each CSV: microseconds (times as fast as eager, as the packed form under torch.compile)."""
    path = f"h100_bfloat16_{layout}_{shape}"
    times, _ = recorded_times(path)
    gains = zip(times.fused, times.torch / times.fused, times["packed torch.compile"] / times.fused, strict=True)
    cells = [f"{fused:.1f} ({eager:.2f}x, {packed:.2f}x)" for fused, eager, packed in gains]
    assert f"[{layout}](results/{path}.csv) | {' | '.join(cells)} |" in (HERE / "README.md").read_text()
