"""The forward pass: right on any sizes, dtypes, strides and values, and clear about what it does not take."""

import re

import pytest
import torch

import benchmark
import fused_triton_swiglu as fts
from baseline_torch_swiglu import ROUNDING, make_inputs, nan_in_new_memory, reference, relative_error, torch_swiglu
from benchmark import LAYOUTS
from common import DEVICE, DTYPES, GPU, assert_right, needs_gpu, randn, untuned
from fused_triton_swiglu import fused_swiglu

SIZES = [(1, 1, 1), (1, 64, 96), (2, 3, 5), (16, 16, 32), (17, 33, 65), (65, 48, 129), (129, 67, 31), (257, 24, 8)]
SIZES += [(1, 4099, 1031), (300, 1024, 4096), (1031, 257, 509), (4097, 264, 1032)] if GPU else []


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M, K, N", SIZES)
def test_sizes(M, K, N, dtype, layout):
    assert_right(*make_inputs(M, K, N, dtype, layout, DEVICE))


K, N = 80, 144  # multiples of 16, so that descriptors apply where the strides allow them, in the interpreter too


@pytest.mark.parametrize("M", [1, 40, 130])
@pytest.mark.parametrize("up_first", [False, True])
@pytest.mark.parametrize("layout", [*LAYOUTS, "interleaved", "twice", "unlike"])
def test_halves_of_one_weight(layout, up_first, M):
    stacked = randn(2 * N, K, dtype=torch.float16, scale=K**-0.5)
    halves = {
        "linear": stacked.t().chunk(2, dim=1),
        "row-major": stacked.t().contiguous().chunk(2, dim=1),
        "interleaved": (stacked[::2].t(), stacked[1::2].t()),
        "twice": (stacked[:N].t(), stacked[:N].t()),
        "unlike": (stacked[:N].t(), stacked[N:].t().contiguous()),
    }[layout]
    assert_right(randn(M, K, dtype=torch.float16), *(reversed(halves) if up_first else halves))


@pytest.mark.parametrize("unaligned", [(0,), (1,), (2,), (1, 2)])
def test_two_bytes_off(unaligned):
    """Strides that suit a descriptor and vector loads, addresses that do not."""
    inputs = [*make_inputs(130, K, N, torch.float16, "linear", DEVICE)]
    for i in unaligned:
        storage = torch.empty(inputs[i].numel() + 1, dtype=torch.float16, device=DEVICE)
        inputs[i] = storage[1:].as_strided(inputs[i].shape, inputs[i].stride()).copy_(inputs[i])
    assert_right(*inputs)


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
    y = untuned(x, w_gate, w_up)
    # The GPU's exp(50) is off by half a unit in the last place of 50 * log2(e): 3e-6
    rtol, atol = max(2 * info.eps, 3e-6), info.smallest_normal * info.eps
    torch.testing.assert_close(y, expected, rtol=rtol, atol=atol, equal_nan=True)
    plain = x.clone()
    plain[x[:, 0].isnan() | x[:, 0].isinf(), 0] = 0
    untouched = (x == plain).all(dim=1)
    assert torch.equal(y[untouched], untuned(plain, w_gate, w_up)[untouched])


A, B = torch.zeros(4, 8), torch.zeros(8, 6)
HERE = torch.zeros(1, device=DEVICE).device
BAD_INPUT = [
    ((A.tolist(), B, B), TypeError, "x is a list: expected a torch.Tensor"),
    ((A.int(), B, B), TypeError, "x is torch.int32: expected one of (torch.bfloat16, torch.float16, torch.float32,"),
    ((A.double(), B, B), TypeError, "x is torch.float64: expected"),
    ((A, B.half(), B), ValueError, "w_gate is torch.float16 on "),
    ((A, B, B.half()), ValueError, f"w_up is torch.float16 on {HERE}: expected torch.float32 on {HERE}"),
    ((A[0, 0], B, B), ValueError, "w_gate is (8, 6) and x is (): expected (K, N) and (..., K)"),
    ((A, B[0], B), ValueError, "w_gate is (6,) and x is (4, 8): expected (K, N) and (..., K)"),
    ((A, B, B[None]), ValueError, "w_up is (1, 8, 6), but w_gate is (8, 6): both must be (K, N)"),
    ((A, B, B[:, :5]), ValueError, "w_up is (8, 5), but w_gate is (8, 6): both must be (K, N)"),
    ((A, B.t(), B.t()), ValueError, "w_gate is (6, 8) and x is (4, 8): expected (K, N) and (..., K)"),
    ((A, B.to("meta"), B), ValueError, "w_gate is torch.float32 on meta: expected torch.float32 on "),
]


@pytest.mark.parametrize("arguments, error, message", BAD_INPUT, ids=[case[2] for case in BAD_INPUT])
def test_bad_input(arguments, error, message):
    def prepared(t, requires_grad):
        if not isinstance(t, torch.Tensor) or t.is_meta:
            return t
        return t.to(DEVICE).requires_grad_(requires_grad and t.is_floating_point())

    for requires_grad in (False, True):
        with pytest.raises(error, match=re.escape(message)):
            fused_swiglu(*(prepared(t, requires_grad) for t in arguments))
    if not any(isinstance(t, list) or t.is_meta for t in arguments):
        with pytest.raises(error, match=re.escape(message)):
            torch.compile(fused_swiglu, backend="eager")(*(prepared(t, False) for t in arguments))


def test_cpu_tensors_need_the_interpreter(monkeypatch):
    monkeypatch.setattr(fts, "INTERPRETED", False)
    with pytest.raises(ValueError, match=re.escape("x is on cpu: expected a GPU (or the CPU with TRITON_INTERPRET=1)")):
        fused_swiglu(A, B, B)


@needs_gpu
@pytest.mark.parametrize("name", ["linear", "row-major", "stacked", "transposed x", "three row strides", "unlike"])
def test_what_is_copied(name):
    """Nothing but an x whose leading dimensions do not collapse."""
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
    for _ in range(2):  # the first call tunes
        peak, _ = benchmark.memory_of(lambda t: fused_swiglu(*t), (x, w_gate, w_up), None)
    copied = x.nbytes if name == "three row strides" else 0
    assert peak * 2**20 == x.nbytes // K * N + copied  # all sizes are multiples of 512 bytes


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
