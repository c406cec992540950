"""Random calls of fused_swiglu, forward and backward, each judged against float64 and watched at its edges.

    python tests/random_cases.py --minutes 10                  new cases all the time
    python tests/random_cases.py --minutes 10 --cycle 100      these over and over: no memory may be lost
    python tests/random_cases.py --case 1234                   one of them again

A case is drawn from its number: sizes with a liking for tile edges, dtypes, strides, offsets, leading dimensions, what
is kept. Every tensor, inputs and what the kernels fill, and the gaps that strides leave, lie between guards of NaN: one
that is read spoils the result, one that is written is seen. The first wrong case ends the run, with the line that runs
it again. float8 has no backward pass. Without a GPU: Triton's interpreter, on smaller sizes.

Gradients are cuBLAS's products. Version 13.1 leaves out the end of the sum in some small ones of 16-bit numbers (M =
2561, K = 2824, N = 8): where torch.mm does so without any kernel of ours, the case counts under `cublas_faults`.
"""

import argparse
import contextlib
import datetime
import gc
import itertools
import math
import os
import random
import resource
import shlex
import sys
import time
from collections import namedtuple
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent.parent))

import pandas as pd
import torch
from tqdm import tqdm

import benchmark  # sets TRITON_INTERPRET where there is no GPU, before the kernel is defined
import fused_triton_swiglu as fts
from baseline_torch_swiglu import FLOAT8, ROUNDING, TOLERANCES, differentiated, reference, torch_swiglu

# With AMX, torch.mm of bfloat16 on the CPU (2.14) reads what lies between the rows of a matrix, here NaN.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GUARD = 2**15  # elements on either side of a tensor, which stays aligned for TMA; in the interpreter more than a tile
# What rounding operands to tf32 costs where there are few of them; else it is 4.2e-4, and other tests want that.
TF32_ERROR = 2.5e-3
# x is (blocks, M // blocks, K); x, w_gate, w_up and dy name strides; precision: of float32 products; scales: of float8
Case = namedtuple("Case", "number M K N dtype x w_gate w_up dy blocks precision choice recompute scales")

STRIDES = "contiguous", "transposed", "padded", "transposed, padded", "steps", "offset"


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
    dtype = rng.choice(("bfloat16", "bfloat16", "float16", "float16", "float32"))
    blocks = rng.choice([b for b in (1, 2, 3, 5) if M % b == 0])
    precision = rng.choice(("highest", "high"))
    # Tuning takes a second and a half: seldom
    choice = rng.choices((fts.DEFAULT, fts.ONE_FOR_ALL_M, fts.TUNED), (300, 60, 1))[0]
    recompute, scales = rng.random() < 0.3, None
    if rng.random() < 0.2:
        dtype, scales = "float8_e4m3fn", rng.choice((None, "numbers", "mixed", "rows"))
        K = -(-K // 16) * 16 if plain else K  # where descriptors apply
        w_gate, w_up = (rng.choice(("transposed", "transposed, padded")) for _ in range(2))
    return Case(number, M, K, N, dtype, x, w_gate, w_up, dy, blocks, precision, choice, recompute, scales)


class Guards:
    """Tensors between guards of NaN, and whether anything but those tensors was written."""

    def __init__(self):
        self.watched = []  # (flat buffer, the tensor in it, whether a kernel fills that, what the buffer held)

    def around(self, shape, strides, dtype, values=None, offset=0):
        """A tensor of NaN or of `values`; what is around it is kept in mind."""
        extent = math.prod(shape) and 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        buffer = torch.full((GUARD + offset + extent + GUARD,), math.nan, dtype=dtype, device=DEVICE)
        t = buffer.as_strided(shape, strides, GUARD + offset)
        if values is not None:
            t.copy_(values)
        self.watched.append((buffer, t.detach(), values is None, buffer.clone()))
        return t

    @contextlib.contextmanager
    def around_new_tensors(self):
        """What is allocated without being filled, in any thread, holds NaN between guards."""

        def guarded(t):
            return self.around(t.shape, t.stride(), t.dtype) if t.is_floating_point() and t.numel() else t

        # Not by a TorchFunctionMode: torch.autograd.grad is a function that it sees, and so runs outside of it.
        with contextlib.ExitStack() as stack:
            for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
                new = getattr(owner, name)
                stack.enter_context(mock.patch.object(owner, name, lambda *a, f=new, **k: guarded(f(*a, **k))))
            yield

    def hold(self):
        """Whether inputs are as they were, and so is all that lies around what was filled."""
        for buffer, t, filled, before in self.watched:
            if filled:
                before.as_strided(t.shape, t.stride(), t.storage_offset()).copy_(t)
            if not torch.equal(buffer.view(torch.uint8), before.view(torch.uint8)):
                return False
        return True


def error_of(result, expected, scale):
    """Norm of the difference over the norm of `expected`, or where that is less over that of elements like `scale`."""
    difference = (result.to(expected.dtype) - expected).norm().item()
    return difference / max(expected.norm().item(), scale * expected.numel() ** 0.5) if difference else 0.0


def gradients_by_mm(x, w_gate, w_up, dy):
    """Those of the inputs, by the products of fused_swiglu's backward pass, of operands made by PyTorch alone."""
    rows, N = x.reshape(-1, x.shape[-1]), w_gate.shape[1]
    gate, up = ((rows.double() @ w.double()).to(x.dtype).float().requires_grad_() for w in (w_gate, w_up))
    halves = torch.autograd.grad(torch.nn.functional.silu(gate) * up, (gate, up), dy.reshape(-1, N).float())
    dgate, dup = (d := torch.cat(halves, dim=1).to(x.dtype)).chunk(2, dim=1)
    dx = torch.mm(dgate, w_gate.t()).addmm_(dup, w_up.t()).view(x.shape)
    if w_gate.stride(0) == w_up.stride(0) == 1:
        return dx, *torch.mm(d.t(), rows).t().chunk(2, dim=1)
    return dx, torch.mm(rows.t(), dgate), torch.mm(rows.t(), dup)


def run_case(case):
    """The largest error over its limit, and which gradients cuBLAS spoils; or an AssertionError."""
    dtype, (M, K, N) = benchmark.DTYPES[case.dtype], (case.M, case.K, case.N)
    torch.manual_seed(case.number)

    def operand(rows, columns, kind, scale=1.0):
        """A matrix with strides of this kind and the same guards everywhere between its elements."""
        values = (torch.randn(rows, columns, device=DEVICE) * scale).to(dtype)
        more = 8 if "padded" in kind else 0
        strides = (1, rows + more) if "transposed" in kind else (columns + more, 1)
        strides = [max(stride, 1) for stride in ((6 * columns, 3) if kind == "steps" else strides)]
        return guards.around(values.shape, strides, dtype, values, offset=kind == "offset")

    guards, small = Guards(), max(K, 1) ** -0.5
    x, w_gate = operand(M, K, case.x), operand(K, N, case.w_gate, small)
    w_up, dy = operand(K, N, case.w_up, small), operand(M, N, case.dy)
    leading = (case.blocks, M // case.blocks) if case.blocks > 1 else (M,)
    x, dy = x.view(*leading, K), dy.view(*leading, N)
    float8 = dtype == FLOAT8
    inputs = [t.detach().requires_grad_(not float8) for t in (x, w_gate, w_up)]
    lengths = {"rows": (M, N, N), "numbers": (1, 1, 1), "mixed": (M, 1, N)}.get(case.scales, ())
    scales = [guards.around((n,), (1 + i,), torch.float32, torch.rand(n) + 0.5) for i, n in enumerate(lengths)]
    scales[:1] = [t.view(*leading, 1) if len(t) == M else t for t in scales[:1]]
    options = dict(recompute=case.recompute, autotune=case.choice == fts.TUNED, scales=scales or None)
    options |= dict(batch_invariant=case.choice == fts.ONE_FOR_ALL_M)
    torch.set_float32_matmul_precision(case.precision)
    try:
        with guards.around_new_tensors():
            y = fts.fused_swiglu(*inputs, **options)
            gradients = () if float8 else torch.autograd.grad(y, inputs, dy, retain_graph=True)
            last_gradients = () if float8 else torch.autograd.grad(y, inputs, dy)  # over gate and up: not needed again
        assert guards.hold(), "written outside of the result"  # before a call without guards does the same
        assert torch.equal(y, fts.fused_swiglu(*inputs, **options)), "another result in a second call"
        eager = () if float8 else differentiated(lambda t: torch_swiglu(*t), dy)(inputs)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert all(map(torch.equal, gradients, last_gradients)), "other gradients in a second backward pass"
    expected = [reference(*inputs, scales=scales)] if float8 else reference(*inputs, dy)
    tf32 = DEVICE == "cuda" and dtype == torch.float32 and case.precision == "high"
    rounding = TF32_ERROR if tf32 else ROUNDING[dtype]
    # Errors of tf32 are those of the products, large where a sum of them is small
    right = tf32 or torch.allclose(y.to(expected[0].dtype), expected[0], **TOLERANCES[dtype])
    assert right, "an element of y is wrong"
    # What elements are like: x and dy are of order one, the weights K ** -0.5
    sizes = (0.3, 0.3 * (N**0.5) * small, 0.3 * M**0.5, 0.3 * M**0.5)[: 1 if float8 else 4]
    worst, spoiled, names = 0.0, [], ("y", "dx", "dw_gate", "dw_up")[: 1 if float8 else 4]
    for name, *results, right, size in zip(names, (y, *gradients), eager or expected, expected, sizes, strict=True):
        error, eager_error = (error_of(t, right, size) for t in results)
        # Chance evens out over many values of gate and of the result; over few, twice as much is no fault
        lenience = 1 if min(M * N, right.numel()) >= 2000 else 2
        limit = max(eager_error, rounding) if name == "y" else lenience * max(1.05 * eager_error, 2 * rounding)
        if not error <= limit and name != "y" and dtype != torch.float32:
            product = gradients_by_mm(*(t.detach() for t in inputs), dy)[names.index(name) - 1]
            if error_of(results[0], product.to(right), size) <= limit < error_of(product, right, size):
                spoiled.append(name)
                continue
        assert error <= limit, f"the error of {name} is {error:.1e}, eager PyTorch's {eager_error:.1e}"
        worst = max(worst, error / limit)
    return worst, spoiled


def memory():
    """Bytes that PyTorch holds on the GPU, and the most MiB that the process has held on the host."""
    gc.collect()
    return torch.cuda.memory_allocated(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1, help="how long (1)")
    parser.add_argument("--first", type=int, default=0, metavar="NUMBER", help="the case to begin with (0)")
    parser.add_argument("--cycle", type=int, metavar="N", help="so many different cases, then from the first again")
    parser.add_argument("--case", type=int, metavar="NUMBER", help="this case only")
    parser.add_argument("--csv", type=Path, help="append a line about the run to this file")
    args = parser.parse_args()
    if args.case is not None:
        return print(case := draw(args.case), "right: error over limit {:.2f}, spoiled: {}".format(*run_case(case)))

    worst, faults, settled, start = 0.0, 0, (math.nan, math.nan), time.monotonic()
    for done in tqdm(itertools.count(), unit=" cases", disable=None):
        if (seconds := time.monotonic() - start) >= 60 * args.minutes:
            break
        if args.cycle and done == 2 * args.cycle:  # compiled in the first round, tuned, with every workspace
            settled = memory()
        case = draw(args.first + done % (args.cycle or done + 1))
        try:
            worst_here, spoiled = run_case(case)
        except Exception:
            print(f"{case}\nfailed. Again: python tests/random_cases.py --case {case.number}", file=sys.stderr)
            raise
        worst, faults = max(worst, round(worst_here, 3)), faults + bool(spoiled)
        if spoiled:
            tqdm.write(f"cuBLAS spoils {', '.join(spoiled)}, by torch.mm alone as well: {case}")
    gpu_grown, host_grown = (now - before for now, before in zip(memory(), settled, strict=True))
    gpu = torch.cuda.get_device_name() if DEVICE == "cuda" else "none (Triton interpreter)"
    different, launchers = min(done, args.cycle or done), len(fts._launchers)
    summary = dict(date=datetime.date.today().isoformat(), command=shlex.join(["python", *sys.argv]), gpu=gpu)
    summary |= dict(torch=torch.__version__, triton=fts.triton.__version__, different_cases=different, cases=done)
    summary |= dict(seconds=round(seconds), worst_error_over_limit=worst, gpu_bytes_grown=gpu_grown)
    summary |= dict(host_mib_grown=host_grown, launchers=launchers, cublas_faults=faults)
    print("\n".join(f"{name}: {value}" for name, value in summary.items()))
    if args.csv:
        pd.DataFrame([summary]).to_csv(args.csv, mode="a", index=False, header=not args.csv.exists())
    assert not gpu_grown > 0 and not host_grown > 32, "memory was lost"
    assert launchers <= 3 * different  # with gate and up, without, and the backward pass's


if __name__ == "__main__":
    main()
