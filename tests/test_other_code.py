"""What other people's code does to an operator and to a module."""

import copy
import functools
import importlib.util
import sys

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations, prune
from torch.utils.flop_counter import FlopCounterMode

import fused_triton_swiglu as fts
from baseline_torch_swiglu import relative_error, torch_swiglu
from common import DEVICE, GPU, assert_close, leaves_of, randn, saved_by
from fused_triton_swiglu import fused_swiglu
from swiglu_mlp import SwiGLUMLP, replace_mlps
from test_mlp import MLP, both_passes, llama_mlp, phi3_mlp

M, K, N = 17, 40, 24


def gradients(run, leaves, dy, **options):
    return torch.autograd.grad(run(*leaves), leaves, dy, **options)


def counted(*inputs):
    with FlopCounterMode(display=False):
        return fused_swiglu(*inputs)


@pytest.mark.parametrize("way", ["eager", "jvp", "compile", "mode"])
def test_forward_mode(way):
    """Refused by all ways in; through the operator it came out as zero."""
    dy, (x, *weights) = randn(M, N), (t.detach() for t in leaves_of(M, K, N))

    def dual(run):
        with forward_ad.dual_level():
            run(forward_ad.make_dual(x, x), *weights)

    torch._dynamo.reset()
    ways = {
        "eager": lambda: dual(fused_swiglu),
        "jvp": lambda: torch.func.jvp(lambda x: fused_swiglu(x, *weights), (x,), (x,)),
        "compile": lambda: dual(torch.compile(fused_swiglu, backend="aot_eager")),
        "mode": lambda: dual(counted),
    }
    with pytest.raises(NotImplementedError, match="fused_swiglu has no forward-mode derivative"):
        ways[way]()
    with forward_ad.dual_level():
        assert_close([fused_swiglu(x, *weights)], [torch_swiglu(x, *weights)])  # no derivative is wanted here
        (dx,) = torch.autograd.grad(fused_swiglu(x.requires_grad_(), *weights), x, forward_ad.make_dual(dy, dy + 1))
        tangent = forward_ad.unpack_dual(dx).tangent  # of the backward pass, which is linear in dy
    assert_close([tangent], torch.autograd.grad(torch_swiglu(x, *weights), x, dy + 1))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("which", range(4))
def test_negative_bit(which, recompute):
    """Of x, a weight or the gradient of the result, as the imaginary part of a conjugated tensor has it."""
    *leaves, dy = *leaves_of(M, K, N), randn(M, N)
    odd = [torch._neg_view(-t) if i == which else t for i, t in enumerate((*leaves, dy))]
    assert odd[which].is_neg()
    eager = functools.partial(fused_swiglu, recompute=recompute)
    for run in (eager, torch.compile(eager, backend="aot_eager")):
        assert_close([run(*odd[:3]).detach()], [torch_swiglu(*leaves).detach()])
        assert_close(torch.autograd.grad(run(*odd[:3]), leaves, odd[3]), gradients(torch_swiglu, leaves, dy))


@pytest.mark.parametrize("name", ["matmul", "all", "cudnn", "mkldnn"])
def test_fp32_precision(name):
    """Float32 products are as exact as torch.mm's, by PyTorch's present settings too."""
    setting = {"matmul": torch.backends.cuda.matmul, "all": torch.backends}.get(name) or getattr(torch.backends, name)
    inputs, before = [t.detach() for t in leaves_of(300, 512, 256)], setting.fp32_precision
    exact = torch_swiglu(*(t.double() for t in inputs))
    try:
        setting.fp32_precision = "tf32"
        coarse = [relative_error(run(*inputs), exact) > 1e-5 for run in (fused_swiglu, torch_swiglu)]
    finally:
        setting.fp32_precision = before
    assert coarse[0] == coarse[1] and (coarse[0] == GPU or name != "matmul")


def test_default_dtype():
    leaves, dy = leaves_of(M, K, N), randn(M, N)
    expected = gradients(torch_swiglu, leaves, dy)
    torch.set_default_dtype(torch.bfloat16)
    try:
        runs = fused_swiglu, torch.compile(fused_swiglu, backend="aot_eager")
        results = [t for run in runs for t in gradients(run, leaves, dy)]
    finally:
        torch.set_default_dtype(torch.float32)
    assert_close(results, 2 * expected)
    assert {t.dtype for t in results} == {torch.float32}


@pytest.mark.parametrize("run", [fused_swiglu, counted])
def test_undefined_gradient(run):
    leaves = leaves_of(M, K, N)
    torch._C._functions.UndefinedGrad()(run(*leaves)).sum().backward()
    assert [t.grad for t in leaves] == [None] * 3


@pytest.mark.parametrize("recompute", [False, True])
def test_batched_gradients(recompute):
    leaves, dys = leaves_of(M, K, N), randn(3, M, N)
    results = gradients(lambda *t: fused_swiglu(*t, recompute=recompute), leaves, dys, is_grads_batched=True)
    assert_close(results, gradients(torch_swiglu, leaves, dys, is_grads_batched=True))
    x, *weights = (t.detach() for t in leaves)
    jacobian = functools.partial(torch.autograd.functional.jacobian, inputs=x, vectorize=True)
    assert_close(*([jacobian(lambda x, run=run: run(x, *weights))] for run in (fused_swiglu, torch_swiglu)))


def test_autocast():
    """As F.linear: a parameter is cast once in a region, and the gradient goes the way of the tensor that was given."""
    leaves = randn(1, M, K), randn(N, K), randn(N, K), randn(2, N, K)
    x, a, b, stacked = (t.requires_grad_() for t in leaves)
    ways = [
        lambda swiglu: swiglu(x, a.t(), b.t()),
        lambda swiglu: swiglu(x, (t := a.t()).register_hook(lambda grad: 2 * grad) and t, b.t()),
        lambda swiglu: swiglu(x.view(M, K), *(w.t() for w in stacked)),
    ]
    with torch.autocast(DEVICE, torch.bfloat16):
        saved = saved_by(lambda: [ways[0](fused_swiglu) for _ in range(8)])
        copies = {t.data_ptr() for t in saved if t.shape == (K, N)}
        for way in ways:
            ys = way(fused_swiglu).sum(), way(torch_swiglu).sum()
            pairs = zip(*(torch.autograd.grad(y, leaves, materialize_grads=True) for y in ys), strict=True)
            assert all(a.dtype == b.dtype and (a - b).norm() <= 0.02 * b.norm() for a, b in pairs)
    assert len(copies) == 2 or not GPU  # the CPU's autocast casts for products only


ODD = {
    "torch.sparse_coo": torch.Tensor.to_sparse,
    "torch.sparse_csr": torch.Tensor.to_sparse_csr,
    "torch._mkldnn": lambda t: t.cpu().to_mkldnn(),
    "nested": lambda t: torch.nested.nested_tensor([t, t]),
    "nested, jagged": lambda t: torch.nested.nested_tensor([t, t], layout=torch.jagged),
}


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("which, name", enumerate(["x", "w_gate", "w_up"]))
@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:The PyTorch API of nested")
def test_odd_tensors(which, name, kind):
    inputs = leaves_of(M, K, N)
    inputs[which] = ODD[kind](inputs[which].detach())
    with pytest.raises((TypeError, ValueError), match=f"^{name} is (.* on cpu: |{kind.split(',')[0]}: expected)"):
        fused_swiglu(*inputs)


@pytest.mark.filterwarnings("ignore")
def test_jit_trace():
    """The operator is in the trace, which serves other row counts and keeps no gate and up."""
    mlp = SwiGLUMLP(K, N, device=DEVICE)
    traced = torch.jit.trace(mlp, (randn(M, K),))
    x = randn(2 * M, K)
    assert_close([traced(x).detach()], [mlp(x).detach()])
    assert "swiglu" in str(traced.inlined_graph) and not any(t.shape[-1] == 2 * N for t in saved_by(lambda: traced(x)))


@pytest.mark.parametrize("recompute", [False, True])
def test_flops(recompute):
    """As eager PyTorch's, and the two products that are computed again."""
    leaves, counts = leaves_of(M, K, N), []
    for run in (lambda *t: fused_swiglu(*t, recompute=recompute), torch_swiglu):
        with FlopCounterMode(display=False) as counter:
            run(*leaves).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts == [3 * 4 * M * N * K + recompute * 4 * M * N * K, 3 * 4 * M * N * K]


@pytest.mark.parametrize("name", ["my-kernels.swiglu", "2nd_copy", "größe"])
def test_module_name(name):
    """A file loaded by its path has whatever name it is given."""
    spec = importlib.util.spec_from_file_location(name, fts.__file__)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    leaves = leaves_of(M, K, N)
    with FlopCounterMode(display=False):
        assert torch.equal(module.fused_swiglu(*leaves), fused_swiglu(*leaves))


# ---- replace_mlps and SwiGLUMLP ----


def refused(mlp, message):
    model = torch.nn.Sequential(torch.nn.ModuleDict({"mlp": llama_mlp()}), torch.nn.ModuleDict({"mlp": mlp}))
    with pytest.raises(ValueError, match=r"^1\.mlp.*" + message):
        replace_mlps(model)
    assert type(model[0].mlp) is MLP and type(mlp) is not SwiGLUMLP


def test_what_looks_like_an_mlp():
    """Other layers, more in it than the formula has, a dropout, a limit that only large numbers meet."""
    gelu = torch.nn.GELU()
    refused(llama_mlp(up_proj=torch.nn.Linear(4, 4)), r"up_proj is Linear\(.* bias=True\): expected .* without bias")
    refused(llama_mlp(gate_proj=gelu), r"gate_proj is GELU\(.*\): expected an nn\.Linear without bias")
    scale, activation = torch.nn.Parameter(torch.zeros(1)), torch.nn.SiLU()
    activation.register_buffer("beta", torch.ones(1))
    for name, value in (("norm", torch.nn.Identity()), ("experts", torch.nn.ModuleList()), ("scale", scale)):
        setattr(wrong := llama_mlp(), name, value)
        refused(wrong, f" has {name}: expected gate_proj, up_proj, down_proj and an activation, no more")
    refused(llama_mlp(act=activation), r" has act_fn\.beta")
    for wrong in (llama_mlp(act=gelu), phi3_mlp(act=gelu), phi3_mlp(up_first=True), llama_mlp(limit=50)):
        refused(wrong, r" \(MLP\) computes another formula than down_proj\(silu\(gate\) \* up\)")
    refused(llama_mlp(dropout=0.5).eval(), " computes another formula")
    for changed in (lambda mlp, y: y if mlp.training else 2 * y, lambda mlp, y: y if y.dim() == 2 else 2 * y):
        wrong = type("Odd", (MLP,), {"forward": lambda self, x, f=changed: f(self, MLP.forward(self, x))})
        refused(wrong("gate_proj", "up_proj", "down_proj"), " computes another formula")


CHANGES = {
    "adapter": lambda layer: torch.nn.Sequential(layer, torch.nn.LayerNorm(layer.out_features, device=DEVICE)),
    "bias": lambda layer: setattr(layer, "bias", torch.nn.Parameter(randn(layer.out_features))) or layer,
    "hook": lambda layer: layer.register_forward_hook(lambda module, inputs, y: 2 * y) and layer,
    "forward": lambda layer: setattr(layer, "forward", lambda x, old=layer.forward: old(x) + 1) or layer,
    "weight_norm": parametrizations.weight_norm,
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", amount=0.5),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("make", [llama_mlp, phi3_mlp])
def test_changed_layers(change, make):
    """Whatever hangs on a layer after replace_mlps works, and is trained."""
    exact = make().to(DEVICE)
    mlp = replace_mlps(torch.nn.Sequential(copy.deepcopy(exact)))[0]
    x, dy = randn(5, 4), randn(5, 4)
    assert_close(both_passes(mlp, x, dy), both_passes(exact, x, dy))
    for module in (mlp, exact):
        torch.manual_seed(0)
        name = "up_proj" if make is llama_mlp else "gate_up_proj"
        setattr(module, name, CHANGES[change](getattr(module, name)))
    torch._dynamo.reset()
    for run in (mlp, torch.compile(mlp, backend="aot_eager")):
        assert_close(both_passes(run, x, dy), both_passes(exact, x, dy))


def test_a_function_in_the_place_of_a_layer():
    mlp, x = replace_mlps(llama_mlp().to(DEVICE)), randn(5, 4)
    layers, y = {name: getattr(mlp, name) for name in ("up_proj", "down_proj")}, mlp(x)
    for name, layer in layers.items():
        delattr(mlp, name)
        setattr(mlp, name, lambda x, layer=layer: layer(x))
        assert_close([mlp(x)], [y])


def test_layers_with_global_hooks_and_quantised_weights_are_called(monkeypatch):
    mlp, calls = SwiGLUMLP(K, N, device=DEVICE), []
    monkeypatch.setattr("swiglu_mlp.fused_swiglu", lambda *_, **__: calls.append(1))
    with pytest.raises(TypeError):
        mlp(randn(M, K))
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    mlp(randn(M, K))
    handle.remove()
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.Linear, "forward", lambda layer, x: torch.nn.functional.linear(x, 2 * layer.weight))
        assert mlp(randn(M, K)).shape == (M, K)
    quantised = type("Quantised", (torch.Tensor,), {})
    mlp.up_proj.weight = torch.nn.Parameter(mlp.up_proj.weight.detach().as_subclass(quantised))
    assert mlp(randn(M, K)).shape == (M, K) and len(calls) == 1


def test_what_hangs_on_the_replaced_module():
    """Refused where it would be lost, or it is still there."""
    hook, forward = llama_mlp(), llama_mlp()
    hook.register_forward_hook(lambda *_: None)
    refused(hook, " has forward_hooks on its MLP: call replace_mlps first")
    (activation := torch.nn.SiLU()).register_forward_hook(lambda *_: None)
    refused(llama_mlp(act=activation), " has forward_hooks on its SiLU")
    forward.forward = lambda x: x
    refused(forward, " has forward on its MLP: call replace_mlps first")
    calls, x = [], randn(5, 4).requires_grad_()
    model = torch.nn.Sequential(checkpoint_wrapper(llama_mlp().to(DEVICE)))
    model[0].register_forward_hook(lambda *_: calls.append(1))
    y = model(x)
    assert_close([replace_mlps(model)(x)], [y])
    assert len(calls) == 2 and type(model[0]._checkpoint_wrapped_module) is SwiGLUMLP
    assert not any(t.shape == (5, 8) for t in saved_by(lambda: model(x)))  # it is still checkpointed


COMPILE = [lambda mlp: torch.compile(mlp, backend="aot_eager"), lambda mlp: mlp.compile(backend="aot_eager") or mlp]


@pytest.mark.parametrize("compile", COMPILE)
def test_called_again_shared_and_compiled(compile, monkeypatch):
    mlp, x, calls = llama_mlp().to(DEVICE), randn(5, 4), []
    model = torch.nn.ModuleDict({"a": mlp, "b": torch.nn.Sequential(mlp), "c": compile(mlp)})
    y = model["c"](x)
    monkeypatch.setattr("swiglu_mlp.fused_swiglu", lambda *args, **kw: calls.append(1) or fused_swiglu(*args, **kw))
    assert replace_mlps(model)["a"] is mlp is model["b"][0] and type(mlp) is SwiGLUMLP and not mlp.recompute
    assert_close([model["c"](x)], [y])
    assert calls and replace_mlps(model, recompute=True)["a"].recompute and not replace_mlps(mlp).recompute
