"""Random calls of the fused kernel, forward and backward, each judged against float64 and watched at its edges.

    python stress_swiglu.py --minutes 10                  new cases all the time
    python stress_swiglu.py --minutes 10 --cycle 100      these over and over: no memory may be lost
    python stress_swiglu.py --case 1234                   one of them again

A case is drawn from its number alone: sizes from 0 to a few thousand with a liking for tile edges, dtypes, strides,
offsets, leading dimensions, what is kept for the backward pass. Every tensor, inputs and what the kernels fill, lies
between guards of NaN, and so do the gaps that strides leave. A guard that is read spoils the result, one that is
written is seen. The first case that is wrong ends the run, with the line that runs it again alone.

Without a GPU it runs through Triton's interpreter, on smaller sizes.
"""

import argparse
import gc
import math
import random
import resource
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

import benchmark  # sets TRITON_INTERPRET where there is no GPU, before the kernel is defined
import fused_triton_swiglu as fts
from baseline_torch_swiglu import torch_swiglu
from fused_triton_swiglu import fused_swiglu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GUARD = 2**15  # elements on either side of a tensor, which stays aligned for TMA; in the interpreter more than a tile
# What rounding operands to tf32 costs where there are few of them; else it is 4.2e-4, and test_swiglu.py wants that.
TF32_ERROR = 2.5e-3


class Case(NamedTuple):
    number: int
    M: int
    K: int
    N: int
    dtype: str
    x: str  # strides, see guarded
    w_gate: str
    w_up: str
    dy: str
    blocks: int  # x is (blocks, M // blocks, K)
    precision: str  # of float32 products
    choice: str  # of the configuration
    recompute: bool


STRIDES = ("contiguous", "transposed", "padded", "transposed, padded", "steps", "offset")


def draw(number):
    """The case with this number."""
    rng = random.Random(number)
    largest = 3000 if DEVICE == "cuda" else 80

    def size():
        kind = rng.random()
        if kind < 0.1:
            return rng.choice((0, 1, 1, 2, 3, 7, 8))
        if kind < 0.5:  # at the edge of some tiles
            tile = rng.choice((8, 16, 32, 64, 128, 256))
            edge = tile * rng.randint(1, max(1, largest // tile)) + rng.choice((-8, -1, 0, 0, 1, 8))
            return min(max(edge, 0), largest)
        return round(largest ** rng.random())

    M, K, N = size(), size(), size()
    if rng.random() < 0.6:  # where descriptors apply
        K, N = -(-K // 8) * 8, -(-N // 8) * 8
    plain = rng.random() < 0.5
    x, w_gate, w_up, dy = ("contiguous" if plain else rng.choice(STRIDES) for _ in range(4))
    if rng.random() < 0.7:
        w_gate = w_up = rng.choice(("contiguous", "transposed")) if plain else w_gate
    return Case(
        number,
        M,
        K,
        N,
        rng.choice(("bfloat16", "bfloat16", "float16", "float16", "float32")),
        x,
        w_gate,
        w_up,
        dy,
        rng.choice([b for b in (1, 2, 3, 5) if M % b == 0]),
        rng.choice(("highest", "high")),
        # Tuning takes a second and a half: seldom
        rng.choices((fts.DEFAULT, fts.ONE_FOR_ALL_M, fts.TUNED), (300, 60, 1))[0],
        rng.random() < 0.3,
    )


class Guards:
    """Tensors between guards of NaN, and whether anything but those tensors was written."""

    def __init__(self):
        self.watched = []  # (flat buffer, where its own elements are, what it held)

    def around(self, shape, strides, dtype, values=None, offset=0):
        """A tensor of NaN or of `values`; what is around it is kept in mind."""
        extent = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        extent = 0 if math.prod(shape) == 0 else extent
        buffer = torch.full((GUARD + offset + extent + GUARD,), math.nan, dtype=dtype, device=DEVICE)
        t = buffer.as_strided(shape, strides, GUARD + offset)
        own = None
        if values is None:
            own = torch.zeros(buffer.shape, dtype=torch.bool, device=DEVICE)
            own.as_strided(shape, strides, GUARD + offset).fill_(True)
        else:
            t.copy_(values)
        self.watched.append((buffer, own, buffer.clone()))
        return t

    def hold(self):
        """Whether inputs are as they were, and so is all that lies around what was filled."""
        bits = {2: torch.int16, 4: torch.int32}
        for buffer, own, before in self.watched:
            differs = buffer.view(bits[buffer.itemsize]) != before.view(bits[buffer.itemsize])
            if (differs if own is None else differs & ~own).any():
                return False
        return True


class GuardNewTensors(TorchFunctionMode):
    """What is allocated without being filled lies between guards, and holds NaN."""

    ALLOCATIONS = (torch.empty, torch.empty_like, torch.Tensor.new_empty)

    def __init__(self, guards):
        super().__init__()
        self.guards = guards

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        if function in self.ALLOCATIONS and result.is_floating_point() and result.numel():
            return self.guards.around(result.shape, result.stride(), result.dtype)
        return result


def guarded(guards, values, kind):
    """`values`, a matrix, with strides of this kind and the same guards everywhere between its elements."""
    rows, columns = values.shape
    strides = {
        "contiguous": (columns, 1),
        "transposed": (1, rows),
        "padded": (columns + 8, 1),
        "transposed, padded": (1, rows + 8),
        "steps": (3 * columns * 2, 3),
        "offset": (columns, 1),
    }[kind]
    strides = tuple(max(stride, 1) for stride in strides)
    return guards.around(values.shape, strides, values.dtype, values, offset=kind == "offset")


def error_of(result, expected, scale):
    """Norm of the difference over the norm of `expected`, or where that is less over that of elements like `scale`."""
    difference = (result.to(expected.dtype) - expected).norm().item()
    return difference / max(expected.norm().item(), scale * expected.numel() ** 0.5) if difference else 0.0


def run_case(case):
    """The largest error over its limit, or an AssertionError."""
    dtype, (M, K, N) = benchmark.DTYPES[case.dtype], (case.M, case.K, case.N)
    torch.manual_seed(case.number)

    def randn(rows, columns, scale=1.0):
        return (torch.randn(rows, columns, device=DEVICE) * scale).to(dtype)

    guards, small = Guards(), max(K, 1) ** -0.5
    x = guarded(guards, randn(M, K), case.x)
    x = x.view(case.blocks, M // case.blocks, K) if case.blocks > 1 else x
    w_gate = guarded(guards, randn(K, N, small), case.w_gate)
    w_up = guarded(guards, randn(K, N, small), case.w_up)
    dy = guarded(guards, randn(M, N), case.dy).view(*x.shape[:-1], N)
    inputs = x, w_gate, w_up
    previous = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(case.precision)
    try:
        with GuardNewTensors(guards), torch.no_grad():
            y, gate_up = fts._forward(*inputs, not case.recompute, case.choice)
            d = fts._differentiate_activation(dy, *inputs, gate_up)
            gradients = fts._gradients(d, *inputs, [True, True, True])
        assert guards.hold(), "written outside of the result"  # before a call without guards does the same
        eager = benchmark.differentiated(lambda t: torch_swiglu(*t), dy)([t.detach().requires_grad_() for t in inputs])
        options = {"autotune": case.choice == fts.TUNED, "batch_invariant": case.choice == fts.ONE_FOR_ALL_M}
        leaves = [t.detach().requires_grad_() for t in inputs]
        again = fused_swiglu(*leaves, recompute=case.recompute, **options)
        gradients_again = torch.autograd.grad(again, leaves, dy)
    finally:
        torch.set_float32_matmul_precision(previous)
    assert torch.equal(y, again), "another result in a second call"

    expected = benchmark.reference(*inputs, dy)
    tf32 = DEVICE == "cuda" and dtype == torch.float32 and case.precision == "high"
    rounding = TF32_ERROR if tf32 else benchmark.ROUNDING[dtype]
    if not tf32:  # whose errors are those of the products, large where a sum of them is small
        right = torch.allclose(y.to(expected[0].dtype), expected[0], **benchmark.TOLERANCES[dtype])
        assert right, "an element of y is wrong"
    # What elements are like: x and dy are of order one, the weights K ** -0.5
    scales = (0.3, 0.3 * (N**0.5) * small, 0.3 * M**0.5, 0.3 * M**0.5)
    worst = 0.0
    for results in ((y, *gradients), (again, *gradients_again)):
        names = ("y", "dx", "dw_gate", "dw_up")
        for name, result, right, other, scale in zip(names, results, expected, eager, scales, strict=True):
            eager_error = error_of(other, right, scale)
            # Chance evens out over many values of gate and of the result; over few, twice as much is no fault
            lenience = 1 if min(M * N, right.numel()) >= 2000 else 2
            limit = max(eager_error, rounding) if name == "y" else lenience * max(1.05 * eager_error, 2 * rounding)
            error = error_of(result, right, scale)
            assert error <= limit, f"the error of {name} is {error:.1e}, eager PyTorch's {eager_error:.1e}"
            worst = max(worst, error / limit)
    return worst


def memory():
    """Bytes that PyTorch holds on the GPU, and the most that the process has held on the host."""
    gc.collect()
    on_host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10
    return torch.cuda.memory_allocated() if DEVICE == "cuda" else 0, on_host


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1, help="how long (1)")
    parser.add_argument("--first", type=int, default=0, metavar="NUMBER", help="the case to begin with (0)")
    parser.add_argument("--cycle", type=int, metavar="N", help="so many different cases, then from the first again")
    parser.add_argument("--case", type=int, metavar="NUMBER", help="this case only")
    parser.add_argument("--csv", type=Path, help="append a line about the run to this file")
    args = parser.parse_args()
    if args.case is not None:
        case = draw(args.case)
        print(case)
        print(f"right: at most {run_case(case):.2f} of the error that is allowed")
        return 0

    worst, done, settled = 0.0, 0, None
    start = time.monotonic()
    with tqdm(total=round(60 * args.minutes), unit="s", disable=None) as progress:
        while (seconds := time.monotonic() - start) < 60 * args.minutes:
            if args.cycle and done == 2 * args.cycle:  # compiled in the first round, tuned, with every workspace
                settled = memory()
            case = draw(args.first + (done % args.cycle if args.cycle else done))
            try:
                worst = max(worst, run_case(case))
            except Exception:
                print(f"{case}\nfailed. Again: python stress_swiglu.py --case {case.number}", file=sys.stderr)
                raise
            done += 1
            progress.update(round(seconds) - progress.n)
    gpu_grown, host_grown = (now - before for now, before in zip(memory(), settled or (math.nan,) * 2, strict=True))
    summary = {
        "gpu": torch.cuda.get_device_name() if DEVICE == "cuda" else "none (Triton interpreter)",
        "torch": torch.__version__,
        "triton": fts.triton.__version__,
        "first": args.first,
        "different_cases": min(done, args.cycle or done),
        "cases": done,
        "seconds": round(seconds),
        "worst_error_over_limit": round(worst, 3),
        "gpu_bytes_grown": gpu_grown,
        "host_mib_grown": host_grown / 2**20,
        "launchers": len(fts._launchers),
    }
    print("\n".join(f"{name}: {value}" for name, value in summary.items()))
    if args.csv:
        pd.DataFrame([summary]).to_csv(args.csv, mode="a", index=False, header=not args.csv.exists())
    assert not gpu_grown > 0 and not host_grown > 32 * 2**20, "memory was lost"
    assert len(fts._launchers) <= 3 * summary["different_cases"]  # with gate and up, without, and what a tuned one adds
    return 0


if __name__ == "__main__":
    sys.exit(main())
