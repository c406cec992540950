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
NOISE = 0.02  # what differs by less is told as the same
CALLS, MODEL, HOST = "call by call", "in a model", "host"  # as in benchmark.py
BARE = "packed-matmul-only"
RECORDED = sorted(RESULTS.glob("*float*.csv"))  # by benchmark.py
KINDS = {"": "", "_backward": ", both passes", "_all": ", every contender", "_card1": ", card 1", "_card2": ", card 2"}


def read(name):
    return pd.read_csv(RESULTS / f"{name}.csv")


def by_m(name, column, method=CALLS):
    """A column of one recording, by M and provider."""
    rows = read(name)
    rows = rows[rows.method == method]
    return rows.pivot(index="M", columns="provider", values=column)[rows.provider.unique()]


def times(name, method=CALLS):
    """Microseconds by M and provider."""
    return by_m(name, "ms", method) * 1e3


def markdown(head, rows):
    right = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in (head, right, *rows))


def label(name):
    """What a recording is of, by its last row: the first ones are the host's, of another shape."""
    run = read(name).iloc[-1]
    kind = KINDS[name.partition(f"{run.K}x{run.N}")[2]]
    return f"{run['dtype']}, {run.layout} weights, {run.K} x {run.N}{kind}"


def host_times(name, text):
    """`text` for each shape in which the host was timed, with the shape and each provider's microseconds."""
    rows = read(name)
    for shape, of_shape in rows[rows.method == HOST].groupby(["M", "K", "N"]):
        us = ", ".join(f"{row.provider} {row.ms * 1e3:.1f}" for row in of_shape.itertuples())
        yield text.format(", ".join(map(str, shape)), us)


def recordings():
    """For each CSV of the benchmark: what it is, and a row for each provider and method, a column for each M."""
    sections = []
    for path in RECORDED:
        run = read(path.stem).iloc[-1]
        both = pd.notna(run.peak_mib)
        host = ". ".join(host_times(path.stem, "Host time of a call, µs (M, K, N = {}): {}"))
        tables = {f"{method}, µs": times(path.stem, method) for method in (CALLS, MODEL)}
        if both:
            tables |= {"MiB at most": by_m(path.stem, "peak_mib"), "MiB kept": by_m(path.stem, "kept_mib")}
        rows = [
            [f"{provider}, {unit}", *(f"{value:.{0 if both else 1}f}" for value in table[provider])]
            for unit, table in tables.items()
            for provider in table
        ]
        made = f"[{path.name}]({path.name}), torch {run.torch}, triton {run.triton}, {run.date}, `{run.command}`"
        head = ["", *(f"M = {M}" for M in times(path.stem).index)]
        sections.append(f"### {run.gpu}, {label(path.stem)}\n\n{made}.\n{host}.\n\n{markdown(head, rows)}")
    return "\n\n".join(sections)


def headline():
    run, calls, model = read(MAIN).iloc[-1], times(MAIN), times(MAIN, MODEL)
    gains = model.torch / model.fused, competitors(model).min(axis=1) / model.fused, calls.torch / calls.fused
    eager, best, one = (f"{gain.min():.2f} to {gain.max():.2f}" for gain in gains)
    us = [f"**{model.fused[M]:.1f} µs at M = {M}** (eager PyTorch {model.torch[M]:.1f})" for M in (512, 4096)]
    return (
        f"On an {run.gpu}, K = {run.K}, N = {run.N}, {run['dtype']}, it takes in a model {us[0]} and\n{us[1]}. "
        f"At each M measured from {model.index[0]} to {model.index[-1]} it has {eager} times eager's\nspeed, {best} "
        f"times the fastest `torch.compile` form's, and call by call {one} times eager's."
    )


def output():
    first, calls, model = read(MAIN).iloc[0], times(MAIN), times(MAIN, MODEL)
    host = "\n".join(host_times(MAIN, "host time of a call, us (M, K, N = ({})): {}"))
    medians = ", ".join(f"{name} {calls[name][512]:.1f} | {model[name][512]:.1f}" for name in calls)
    return f"""```
{first.gpu}, PyTorch {first.torch}, Triton {first.triton}
{host}
us {CALLS} | {MODEL}
M =   512  {medians}
...
{len(calls)} checks of the fused kernel passed, none failed
```"""


def main_table():
    calls, model = times(MAIN), times(MAIN, MODEL)
    names, rows = list(model), []
    for M, us in model.iterrows():
        cells = [f"**{us[name]:.1f}**" if name == "fused" else f"{us[name]:.1f}" for name in names]
        rows.append([M, *cells, f"{us.torch / us.fused:.2f}x", f"{calls.torch[M] / calls.fused[M]:.2f}x"])
    return f"{markdown(['M', *names, 'speed-up', 'speed-up call by call'], rows)}\n\n{elsewhere()}"


def competitors(us):
    """The columns of other forms of SwiGLU."""
    return us.drop(columns=[BARE, *(name for name in us if name.startswith("fused"))], errors="ignore")


def elsewhere():
    """For other shapes, dtypes and for training: the range of the speed-ups in a model."""
    lines = []
    kinds = ["bfloat16_linear_8192x28672", "bfloat16_linear_2048x5632", "float32_linear_4096x14336"]
    for kind in (*kinds, "float8_e4m3fn_linear_4096x14336", "bfloat16_linear_4096x14336_backward"):
        name = f"h200_{kind}"
        us = times(name, MODEL)
        gains = [other / us.fused for other in (us.torch, competitors(us).min(axis=1))]
        eager, best = (f"{gain.min():.2f} to {gain.max():.2f} times" for gain in gains)
        lines.append(f"- {label(name)}: in a model {eager} eager's speed, {best} the fastest other form's.")
    recompute = us.torch / us["fused-recompute"]  # of the last one
    lines[-1] += f" With `recompute=True` {recompute.min():.2f} to {recompute.max():.2f} times eager's."
    us = times(f"{MAIN}_all", MODEL)
    peers = {name: us[name] / us.fused for name in ("liger-kernel", "flash-swiglu-mlp", "quack-kernels")}
    peers = ", ".join(f"{gain.min():.2f} to {gain.max():.2f} times the speed of {name}" for name, gain in peers.items())
    lines.append(f"- [Other packages](results/{MAIN}_all.csv), in the table's shape: in a model {peers}.")
    here, *others = (times(f"{MAIN}{card}", MODEL) for card in ("", "_card1", "_card2"))
    apart = max((here.div(here.fused, axis=0) / us.div(us.fused, axis=0) - 1).abs().max(axis=None) for us in others)
    links = " and ".join(f"[{i}](results/{MAIN}_card{i}.csv)" for i in (1, 2))
    lines.append(f"- On two cards ({links}) ratios to `fused` differ by at most {apart:.1%} from this table's.")
    return "\n".join(lines)


def losses():
    """Wherever another form of SwiGLU is ahead by more than noise of the fused kernel, in any CSV here."""
    lines = []
    for path in RECORDED:
        cases = []
        for method in (CALLS, MODEL):
            us = times(path.stem, method)
            others = competitors(us)
            ahead = us.fused / others.min(axis=1) - 1
            best = [f"M = {M} {others.loc[M].idxmin()} by {ahead[M]:.0%}" for M in us.index[ahead >= NOISE]]
            cases += [f"{method} {', '.join(best)}"] * bool(best)
        lines += [f"- [{label(path.stem)}](results/{path.name}): {'; '.join(cases)}."] * bool(cases)
    model = read("h200_whole_model")
    model["loss"] = model.after_ms / model.before_ms - 1
    for how, slower in model[model.loss >= NOISE].groupby("how"):
        cases = (f"{row.call} of {row.sequences} x {row.tokens} by {row.loss:.0%}" for row in slower.itertuples())
        lines.append(f"- [A whole Llama](results/h200_whole_model.csv), {how}: as it was before, {', '.join(cases)}.")
    return "\n".join(lines)


def whole_model():
    """The speed after replace_mlps over that before it, for each number of sequences x tokens in each."""
    rows = read("h200_whole_model")
    rows["gain"] = (rows.before_ms / rows.after_ms).map("{:.2f}x".format)
    gains = rows.pivot(index=["call", "how"], columns=["sequences", "tokens"], values="gain").fillna("")
    head = ["", *(f"{sequences} x {tokens}" for sequences, tokens in gains)]
    return markdown(head, [[", ".join(row[0]), *row[1:]] for row in gains.itertuples()])


def staircase(*Ms):
    sizes = {M: rows.set_index("step") for M, rows in read("h200_tutorial").groupby("M")}
    rows = []
    for step in sizes[Ms[0]].index:
        cells = []
        for of_M in (sizes[M].loc[step] for M in Ms):
            gain = "" if pd.isna(of_M.gain) else f"{of_M.gain:+.0%}" if abs(of_M.gain) >= NOISE else "nothing"
            cells += [f"{of_M.us:.1f}", f"{of_M.share:.0%}", gain]
        rows.append([step, *cells])
    return markdown(["step", *(head for M in Ms for head in (f"M = {M}, µs", "of cuBLAS", "gain"))], rows)


BLOCKS = {
    "headline": headline,
    "output": output,
    "main_table": main_table,
    "losses": losses,
    "whole_model": whole_model,
    "staircase": partial(staircase, 512, 4096),
    "staircase_few_rows": partial(staircase, 16),
    "recordings": recordings,
}


def rendered(text):
    def block(match):
        return f"<!-- {match[1]} -->\n{BLOCKS[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- (\w+) -->\n.*?<!-- end -->", block, text, flags=re.DOTALL)


if __name__ == "__main__":
    for path in FILES:
        path.write_text(rendered(path.read_text()))
