"""Times a whole Hugging Face Llama before and after replace_mlps, in turn, and writes GPU_whole_model.csv here.

    python results/whole_model.py            # needs a GPU and `pip install transformers`

It has Llama-3-8B's shape, LAYERS of its 32 layers and as large a part of its vocabulary, random weights, bfloat16. Both
models share their weights. A training step is the loss and its backward pass, without an optimizer. `mib`: the most
that one of them takes in eager mode, weights included. Results are compared before anything is timed.
"""

import copy
import datetime
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import transformers
import triton
from triton.testing import do_bench

sys.path.insert(0, str(Path(__file__).parent.parent))
from swiglu_mlp import replace_mlps

LAYERS, TURNS = 4, [0, 1, 1, 0] * 5  # many short turns, as a host's speed changes within a second
FORWARD = (1, 1), (16, 1), (64, 1), (1, 512), (1, 4096)  # sequences, tokens of each
TRAINING = (1, 512), (1, 2048), (4, 2048)


def make_models():
    shape = dict(hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8)
    shape |= dict(num_hidden_layers=LAYERS, vocab_size=128256 * LAYERS // 32)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        before = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, use_cache=False))
    same_weights = {id(p): p for p in before.parameters()}  # which deepcopy takes for copied
    return before, replace_mlps(copy.deepcopy(before, same_weights))


def call(model, tokens, training):
    """The logits, or of a training step the embedding's gradient, in which all layers have a part."""
    with torch.set_grad_enabled(training):
        output = model(input_ids=tokens, labels=tokens if training else None)
    if not training:
        return output.logits
    output.loss.backward()
    gradient = model.get_input_embeddings().weight.grad
    model.zero_grad()
    return gradient


def in_a_graph(run):
    with torch.cuda.graph(graph := torch.cuda.CUDAGraph()):
        run()
    return graph.replay


def peak_mib(run):
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated() / 2**20


models, rows, gpu = make_models(), [], torch.cuda.get_device_name()
made = dict(date=datetime.date.today().isoformat(), command="python results/whole_model.py", gpu=gpu, layers=LAYERS)
made |= {module.__name__: module.__version__ for module in (torch, triton, transformers)}
for training, size in [(False, size) for size in FORWARD] + [(True, size) for size in TRAINING]:
    tokens = torch.randint(models[0].config.vocab_size, size, device="cuda")
    eager = [partial(call, model, tokens, training) for model in models]
    before, after = (run().double() for run in eager)
    difference = ((after - before).norm() / before.norm()).item()
    assert difference < 0.05, f"the results of {size} tokens differ by {difference}"
    del before, after
    named = dict(call="training step" if training else "forward", sequences=size[0], tokens=size[1])
    named |= dict(difference=difference, before_mib=peak_mib(eager[0]), after_mib=peak_mib(eager[1]))
    ways = {"eager": eager}
    if not training:
        torch.compiler.reset()  # or it gives up after eight sizes
        compiled = [torch.compile(model, dynamic=False) for model in models]
        ways["CUDA graph"] = [in_a_graph(run) for run in eager]
        ways["torch.compile"] = [partial(call, model, tokens, training) for model in compiled]
    for how, runs in ways.items():
        ms = [], []
        for i in TURNS:
            ms[i].append(do_bench(runs[i], warmup=5, rep=40, return_mode="median"))
        before_ms, after_ms = np.median(ms, axis=1)
        rows.append(made | named | dict(how=how, before_ms=before_ms, after_ms=after_ms))
        print(f"{named['call']} of {size}, {how}: {before_ms:.3f} -> {after_ms:.3f} ms", flush=True)
pd.DataFrame(rows).to_csv(f"{gpu.split()[1].lower()}_whole_model.csv", index=False, float_format="%.5g")
