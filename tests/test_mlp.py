"""Tests of the layer, in models from Hugging Face and spread over processes."""

import copy
import functools
import re

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel as DDP

from baseline_torch_swiglu import ROUNDING, relative_error, torch_swiglu
from common import DEVICE, GPU, HERE, assert_close, randn, run_python, saved_by
from swiglu_mlp import SwiGLUMLP, replace_mlps


def both_passes(mlp, x, dy, distribute=lambda x: x):
    """The result, and the gradients of x and of the weights."""
    mlp.zero_grad()
    x = x.detach().clone().requires_grad_()
    y = mlp(distribute(x))
    y.backward(dy)
    return [y.detach(), x.grad, *(p.grad for p in mlp.parameters())]


@pytest.mark.parametrize("recompute", [False, True])
def test_mlp_is_its_formula(recompute):
    mlp, x = SwiGLUMLP(16, 24, recompute=recompute, device=DEVICE), randn(2, 3, 16)
    gate, up, down = (p.detach().double().t() for p in mlp.parameters())
    assert relative_error(mlp(x), torch_swiglu(x.double(), gate, up) @ down) <= ROUNDING[torch.float32]
    assert any(t.shape == (6, 48) for t in saved_by(lambda: mlp(x))) != recompute
    half = SwiGLUMLP(4, 4, dtype=torch.float16)
    assert half.load_state_dict(llama_mlp().state_dict()) == ([], []) and half.down_proj.weight.dtype == torch.float16


TOKENS = torch.randint(1, 128, (2, 16), generator=torch.Generator().manual_seed(0)).to(DEVICE)


def hugging_face(name):
    transformers = pytest.importorskip("transformers", reason="compares with transformers, which is not installed")
    torch.manual_seed(0)
    config = dict(hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=4, head_dim=16)
    config |= dict(num_key_value_heads=2, vocab_size=128, max_position_embeddings=64, pad_token_id=0, eos_token_id=0)
    return getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**config)).to(DEVICE)


def losses(model):
    """Of training on one batch of random tokens."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    curve = []
    for _ in range(12):
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    return torch.tensor(curve)


@pytest.mark.parametrize("name, recompute", [("Llama", False), ("Llama", True), ("Phi3", False), ("Glm", True)])
def test_model_trains_alike(name, recompute):
    """With the same parameters, under the same names, in the same order."""
    exact, eager = losses(hugging_face(name).double()), losses(hugging_face(name))
    model = hugging_face(name)
    parameters = list(model.named_parameters())
    assert replace_mlps(model, recompute=recompute) is model
    assert all(a == b and p is q for (a, p), (b, q) in zip(model.named_parameters(), parameters, strict=True))
    assert all(type(layer.mlp) is SwiGLUMLP and layer.mlp.recompute == recompute for layer in model.model.layers)
    assert exact[-1] < 0.8 * exact[0]  # it does train
    assert (losses(model) - exact).abs().max() <= 2 * (eager - exact).abs().max() + 1e-5


def test_halves_of_gate_up_proj():
    """Both passes when compiled. The kernel's weights are the parameter's own memory."""
    exact, x, dy = phi3_mlp().to(DEVICE), randn(5, 4), randn(5, 4)
    mlp = replace_mlps(torch.nn.Sequential(copy.deepcopy(exact)))[0]
    compiled = torch.compile(mlp, fullgraph=True, backend="inductor" if GPU else "aot_eager")
    assert_close(both_passes(compiled, x, dy), both_passes(exact.double(), x.double(), dy.double()))
    saved, start = {t.data_ptr() for t in saved_by(lambda: mlp(x.requires_grad_()))}, mlp.gate_up_proj.weight.data_ptr()
    assert saved >= {start, start + 4 * 4 * 4}


class MLP(torch.nn.Module):
    """With layers of these names, 4 x 4 unless given: Llama's or Phi-3's MLP, or nearly."""

    def __init__(self, *names, act=torch.nn.functional.silu, up_first=False, limit=torch.inf, dropout=0.0, **layers):
        super().__init__()
        for name in names:
            setattr(self, name, layers.get(name) or torch.nn.Linear(4, 8 if name == "gate_up_proj" else 4, bias=False))
        self.act_fn, self.up_first, self.limit, self.dropout = act, up_first, limit, dropout

    def forward(self, x):
        if hasattr(self, "gate_proj"):
            gate, up = self.gate_proj(x), self.up_proj(x)
        else:
            gate, up = self.gate_up_proj(x).chunk(2, dim=-1)[:: -1 if self.up_first else 1]
        inner = self.act_fn(gate.clamp(max=self.limit)) * up
        return self.down_proj(torch.nn.functional.dropout(inner, self.dropout, self.training))


llama_mlp = functools.partial(MLP, "gate_proj", "up_proj", "down_proj")
phi3_mlp = functools.partial(MLP, "gate_up_proj", "down_proj")


def test_replace_mlps_finds_layers_only():
    """Experts in one parameter, as transformers keeps them, are no MLP. An MLP on the meta device is one."""
    experts = torch.nn.ParameterDict(dict.fromkeys(["gate_up_proj", "down_proj"], torch.zeros(2, 4, 4)))
    model = torch.nn.ModuleDict({"experts": experts})
    with pytest.raises(ValueError, match="ModuleDict holds no module with gate_proj, up_proj, down_proj or gate_up_pr"):
        replace_mlps(model)
    model["shared"] = phi3_mlp().to("meta")
    assert type(replace_mlps(model)["shared"]) is SwiGLUMLP and model["experts"] is experts


def test_files_work_when_copied_alone(tmp_path):
    """Where PyTorch comes without its distributed part too."""
    for name in ("fused_triton_swiglu.py", "swiglu_mlp.py"):
        (tmp_path / name).write_text((HERE / name).read_text())
    code = f"""import sys, torch
sys.modules["torch.distributed.tensor"] = None  # an import of it fails
from swiglu_mlp import SwiGLUMLP
print(SwiGLUMLP(5, 7, device="{DEVICE}")(torch.ones(3, 5, device="{DEVICE}")).shape)"""
    assert run_python(code, tmp_path) == "torch.Size([3, 5])\n"
    imported = re.findall(r"^ *(?:import|from) (\w+)", (HERE / "swiglu_mlp.py").read_text(), re.MULTILINE)
    assert set(imported) == {"torch", "fused_triton_swiglu", "swiglu_mlp"}  # the last in its docstring


# ---- Spread over two processes ----


def layer(seed=0):
    torch.manual_seed(seed)
    return SwiGLUMLP(16, 24, device=DEVICE)


def errors_of(model, part=lambda t: t, batches=1, **options):
    """Of y, dx and the weights' gradients, where this rank has `part` of x. Right is a mean over batches in float64."""
    exact = layer().double()
    exact.forward = lambda x: exact.down_proj(torch_swiglu(x, exact.gate_proj.weight.t(), exact.up_proj.weight.t()))
    x, dy = randn(2, 6, 16), randn(2, 6, 16)
    y, dx, *dw = both_passes(exact, x.double(), dy.double())
    results = both_passes(model, part(x), part(dy), **options)
    assert all(getattr(p, "placements", None) == getattr(p.grad, "placements", None) for p in model.parameters())
    results = [t.full_tensor() if hasattr(t, "placements") else t for t in results]
    expected = part(y), part(dx), *(t / batches for t in dw)
    return [relative_error(*pair) for pair in zip(results, expected, strict=True)]


def run_cases(rank, folder):
    """One of two processes. Saves what each case comes to: its errors, or its exception."""
    if GPU:
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if GPU else "gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    grid = init_device_mesh(DEVICE, (1, 2), mesh_dim_names=("batches", "columns"))

    def spread(model, **styles):
        plan = {name: ColwiseParallel() for name, _ in model.named_children()} | {"down_proj": RowwiseParallel()}
        return parallelize_module(model, grid["columns"], plan | styles)

    cases = {
        "DDP": lambda: errors_of(DDP(layer(seed=rank)), lambda t: t[rank], batches=2),
        "FSDP2": lambda: errors_of(fully_shard(layer()), lambda t: t[rank], batches=2),
        "columns": lambda: errors_of(spread(layer())),
        "columns, compiled": lambda: errors_of(torch.compile(spread(layer()), fullgraph=True, backend="aot_eager")),
        "columns, FSDP2": lambda: errors_of(fully_shard(spread(layer()), mesh=grid["batches"])),
        "columns, sequence": lambda: errors_of(
            spread(layer(), down_proj=RowwiseParallel(output_layouts=Shard(1))),
            lambda t: t.chunk(2, dim=1)[rank],
            distribute=lambda x: DTensor.from_local(x, grid["columns"], [Shard(1)]),
        ),
        "rows of up_proj": lambda: errors_of(spread(layer(), up_proj=RowwiseParallel())),
        "as FSDP2 shards": lambda: errors_of(spread(layer(), down_proj=ColwiseParallel())),
        "gate_up_proj": lambda: spread(replace_mlps(torch.nn.Sequential(phi3_mlp().to(DEVICE)))[0])(randn(4)),
        "FSDP2 too early": lambda: replace_mlps(torch.nn.Sequential(fully_shard(phi3_mlp().to(DEVICE)))),
    }
    outcomes = {}
    for name, run in cases.items():
        try:
            outcomes[name] = run()
        except Exception as error:
            outcomes[name] = f"{type(error).__name__}: {error}"
    torch.save(outcomes, folder / str(rank))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Of both processes: over NCCL on two GPUs, over Gloo where there is none."""
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(run_cases, (folder,), nprocs=2)
    return [torch.load(folder / str(rank)) for rank in range(2)]


EXPECTED = dict.fromkeys(["DDP", "FSDP2", "columns", "columns, compiled", "columns, FSDP2", "columns, sequence"]) | {
    "rows of up_proj": "up_proj.weight has the placements (Shard(dim=1),): expected (Shard(dim=0),)",
    "as FSDP2 shards": "down_proj.weight has the placements (Shard(dim=0),): expected (Shard(dim=1),)",
    "gate_up_proj": "gate_up_proj.weight has the placements (Shard(dim=0),): expected None",
    "FSDP2 too early": "0 has forward_hooks on its FSDPMLP: call replace_mlps first",
}


@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="needs two GPUs, or none")
@pytest.mark.parametrize("case", EXPECTED)
def test_on_two_ranks(case, outcomes):
    for outcome in (o[case] for o in outcomes):
        if EXPECTED[case]:
            assert outcome.startswith(f"ValueError: {EXPECTED[case]}")
        else:
            assert type(outcome) is list and all(error < 1e-5 for error in outcome), outcome
