"""Writes the tables in README.md and results/README.md anew, from the CSVs beside this file.

    python results/tables.py

What stands between <!-- NAME --> and <!-- end --> is what BLOCKS has under that name. The rest is written by hand.
"""

import re
from functools import partial
from pathlib import Path

import pandas as pd

RESULTS = Path(__file__).parent
FILES = RESULTS.parent / "README.md", RESULTS / "README.md"
MAIN = "h200_bfloat16_linear_4096x14336"
CALLS, MODEL, HOST = "call by call", "in a model", "host"  # as in benchmark.py
BARE = "packed-matmul-only"


def read(name):
    return pd.read_csv(RESULTS / f"{name}.csv")


def times(name, method=CALLS):
    """Microseconds by M and provider."""
    rows = read(name)
    rows = rows[rows.method == method]
    return rows.pivot(index="M", columns="provider", values="ms")[rows.provider.unique()] * 1e3


def recorded(name):
    """The methods of a recording, and their times."""
    return {method: us for method in (CALLS, MODEL) if len(us := times(name, method))}


def markdown(head, rows):
    right = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in (head, right, *rows))


def by_m(name, digits=1):
    """Microseconds of one recording: a row for each provider and method, a column for each M."""
    both = recorded(name)
    rows = [
        [f"{provider}, {method}" if len(both) > 1 else provider, *(f"{value:.{digits}f}" for value in us[provider])]
        for method, us in both.items()
        for provider in us.columns
    ]
    (Ms,) = {tuple(us.index) for us in both.values()}
    return markdown([f"[µs, median]({name}.csv)", *(f"M = {M}" for M in Ms)], rows)


def headline():
    first, calls, model = read(MAIN).iloc[0], times(MAIN), times(MAIN, MODEL)
    gains = [f"{(us.torch / us.fused).min():.2f} to {(us.torch / us.fused).max():.2f}" for us in (model, calls)]
    us = " and ".join(f"**{model.fused[M]:.1f} µs at M = {M}** (eager {model.torch[M]:.1f})" for M in (512, 4096))
    return (
        f"On an {first.gpu}, K = 4096, N = 14336, bfloat16, it takes inside a model\n{us}:\n{gains[0]} times the "
        f"speed of eager PyTorch at each M measured from 1 to 16384, {gains[1]} called from Python."
    )


def output():
    first, calls, model, host = read(MAIN).iloc[0], times(MAIN), times(MAIN, MODEL), times(MAIN, HOST).iloc[0]
    lines = [f"{first.gpu}, PyTorch {first.torch}, Triton {first.triton}"]
    lines += [
        f"host time of a call, us (M, K, N = (1, 512, 512)): {', '.join(f'{k} {v:.1f}' for k, v in host.items())}"
    ]
    lines += [f"us {CALLS} | {MODEL}"]
    for M in (1, 512):
        lines.append(f"M = {M:5}  {', '.join(f'{name} {calls[name][M]:.1f} | {model[name][M]:.1f}' for name in calls)}")
    lines += ["...", f"{len(calls)} checks of the fused kernel passed, none failed"]
    return "\n".join(["```", *lines, "```"])


def main_table():
    calls, model = times(MAIN), times(MAIN, MODEL)
    names = ["torch", "torch-compile", "packed-torch-compile", "fused", BARE]
    rows = []
    for M, us in model.iterrows():
        cells = [f"**{us[name]:.1f}**" if name == "fused" else f"{us[name]:.1f}" for name in names]
        rows.append([M, *cells, f"{us.torch / us.fused:.2f}x", f"{calls.torch[M] / calls.fused[M]:.2f}x"])
    return markdown(["M", *names, "speed-up", "call by call"], rows)


def losses():
    """Wherever another form of SwiGLU is more than 1 % ahead of the fused kernel, in any CSV here."""
    lines = []
    for path in sorted(RESULTS.glob("*float*.csv")):
        first, cases = read(path.stem).iloc[-1], []
        for method, us in recorded(path.stem).items():
            others = us.drop(columns=[BARE, *(name for name in us if name.startswith("fused"))], errors="ignore")
            ahead = us.fused / others.min(axis=1) - 1
            best = [f"M = {M} {others.loc[M].idxmin()} by {ahead[M]:.0%}" for M in us.index[ahead >= 0.01]]
            cases += [f"{method} {', '.join(best)}"] * bool(best)
        passes = ", both passes" if pd.notna(first.peak_mib) else ""
        which = f"{first.gpu.split()[1]}, {first['dtype']}, {first.layout}, {first.K} x {first.N}{passes}"
        lines += [f"- [{which}](results/{path.name}): {'; '.join(cases)}."] * bool(cases)
    return "\n".join(lines)


def staircase(*Ms):
    sizes = {M: rows.set_index("step") for M, rows in read("h200_tutorial").groupby("M")}
    rows = []
    for step in sizes[Ms[0]].index:
        cells = []
        for of_M in (sizes[M].loc[step] for M in Ms):
            gain = "" if pd.isna(of_M.gain) else f"{of_M.gain:+.0%}" if abs(of_M.gain) >= 0.01 else "nothing"
            cells += [f"{of_M.us:.1f}", f"{of_M.share:.0%}", gain]
        rows.append([step, *cells])
    return markdown(["step", *(head for M in Ms for head in (f"M = {M}, µs", "of cuBLAS", "gain"))], rows)


def files():
    rows = []
    for path in sorted(RESULTS.glob("*.csv")):
        first = pd.read_csv(path).iloc[-1]
        known = {"date": "by 2026-11-25", "command": "not recorded"} | first.dropna().to_dict()
        link, card = f"[{path.name}]({path.name})", known["gpu"].split()[1]
        rows.append([link, card, known["date"], known["triton"], known["command"]])
    return markdown(["file", "card", "date", "Triton", "command"], rows)


def memory():
    rows = read("h100_bfloat16_linear_backward").dropna(subset="peak_mib")
    table = []
    for column, label in (("kept_mib", "kept between the passes"), ("peak_mib", "at most")):
        mib = rows.pivot(index="M", columns="provider", values=column)[rows.provider.unique()]
        table += [[f"{label}, M = {M}", *(f"{value:.0f}" for value in mib.loc[M])] for M in (2048, 4096, 8192)]
    return markdown(["MiB", *rows.provider.unique()], table)


BLOCKS = {
    "headline": headline,
    "output": output,
    "main_table": main_table,
    "losses": losses,
    "staircase": partial(staircase, 512, 4096),
    "staircase_few_rows": partial(staircase, 16),
    "files": files,
    "all_of_main": partial(by_m, MAIN),
    "peers": partial(by_m, f"{MAIN}_peers"),
    "llama_70b": partial(by_m, "h200_bfloat16_linear_8192x28672"),
    "tinyllama": partial(by_m, "h200_bfloat16_linear_2048x5632"),
    "row_major": partial(by_m, "h200_bfloat16_row-major"),
    "h100": partial(by_m, "h100_bfloat16_linear"),
    "h100_row_major": partial(by_m, "h100_bfloat16_row-major"),
    "float16": partial(by_m, "h100_float16_linear"),
    "float32": partial(by_m, "h100_float32_linear"),
    "float32_row_major": partial(by_m, "h100_float32_row-major"),
    "float8": partial(by_m, "h200_float8_e4m3fn_linear"),
    "float8_in_a_model": partial(by_m, "h200_float8_e4m3fn_linear_rotating"),
    "training": partial(by_m, "h100_bfloat16_linear_backward", digits=0),
    "training_row_major": partial(by_m, "h100_bfloat16_row-major_backward", digits=0),
    "memory": memory,
    "batch_invariance": partial(by_m, "h200_bfloat16_linear_batch_invariant"),
    "batch_invariance_row_major": partial(by_m, "h200_bfloat16_row-major_batch_invariant"),
}


def rendered(text):
    def block(match):
        return f"<!-- {match[1]} -->\n{BLOCKS[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- (\w+) -->\n.*?<!-- end -->", block, text, flags=re.DOTALL)


if __name__ == "__main__":
    for path in FILES:
        path.write_text(rendered(path.read_text()))
