"""SwiGLU as a layer: ``down_proj(silu(gate_proj(x)) * up_proj(x))``, for one's own model or one of Hugging Face's.

    from swiglu_mlp import SwiGLUMLP, replace_mlps

    mlp = SwiGLUMLP(4096, 14336)
    replace_mlps(llama)

It can be trained and compiled, also under DDP, FSDP2 and PyTorch's tensor parallelism. A second file to copy, for
whoever has a model: it needs torch, and fused_triton_swiglu.py beside it.
"""

import torch
from torch.nn.functional import silu

from fused_triton_swiglu import fused_swiglu

# Names of an MLP's layers. Of gate_up_proj's rows (2N, K) the first half is gate_proj's, as in Phi-3 and GLM.
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
PACKED_PROJECTIONS = ("gate_up_proj", "down_proj")


class SwiGLUMLP(torch.nn.Module):
    """``down_proj(silu(gate_proj(x)) * up_proj(x))``, the feed-forward layer of Llama, Mistral and Qwen.

    x is (..., hidden_size), and so is the result. Parameters have the names and shapes of Hugging Face's MLPs, so that
    load_state_dict takes theirs: gate_proj.weight and up_proj.weight (intermediate_size, hidden_size), down_proj.weight
    (hidden_size, intermediate_size). `recompute` as in fused_swiglu.

    Where gate_proj or up_proj is more than an nn.Linear without bias and hooks, because of an adapter, a quantised
    weight, pruning or a parametrization, both are called as they are, without the kernel.

    Tensor parallelism: parallelize_module with ColwiseParallel() for gate_proj and up_proj, RowwiseParallel() for
    down_proj. Each rank computes its columns. x is an ordinary tensor, the same on every rank, or a DTensor over the
    same mesh. Of these layers' hooks only down_proj's run: its output_layouts may be others.

    Raises:
        ValueError: weights are DTensors in forward, and not spread like that. So are those of gate_up_proj always.
    """

    def __init__(self, hidden_size, intermediate_size, *, recompute=False, device=None, dtype=None):
        super().__init__()
        options = {"bias": False, "device": device, "dtype": dtype}
        self.gate_proj = torch.nn.Linear(hidden_size, intermediate_size, **options)
        self.up_proj = torch.nn.Linear(hidden_size, intermediate_size, **options)
        self.down_proj = torch.nn.Linear(intermediate_size, hidden_size, **options)
        self.recompute = recompute

    def forward(self, x):
        packed = "gate_up_proj" in self._modules  # instead of the two, where replace_mlps found it
        layers = [self.gate_up_proj] if packed else [self.gate_proj, self.up_proj]
        if not all(map(_only_multiplies, layers)):
            gate, up = self.gate_up_proj(x).chunk(2, dim=-1) if packed else (layer(x) for layer in layers)
            return self.down_proj(silu(gate) * up)
        weights = [layer.weight for layer in layers]
        if any(hasattr(w, "placements") for w in weights):  # of DTensor, whose import costs a while
            x, weights = _of_this_rank(x, self)
        w_gate, w_up = weights[0].chunk(2) if packed else weights
        return self.down_proj(fused_swiglu(x, w_gate.t(), w_up.t(), recompute=self.recompute))


def _only_multiplies(layer):
    """Whether a layer multiplies by its weight and does nothing else, so that it need not be called."""
    if type(layer) is not torch.nn.Linear or layer.bias is not None or "forward" in layer.__dict__:
        return False
    if hasattr(layer.weight, "__tensor_flatten__") and not hasattr(layer.weight, "placements"):
        return False  # a tensor subclass other than DTensor, such as a quantised weight
    hooks = layer._forward_pre_hooks, layer._forward_hooks, layer._backward_pre_hooks, layer._backward_hooks
    if torch.nn.modules.module._has_any_global_hook():
        return False
    # Tensor parallelism has hooks that spread x: see _of_this_rank, which does so.
    return all(str(h.__module__).startswith("torch.distributed.tensor") for kind in hooks for h in kind.values())


def _of_this_rank(x, mlp):
    """x (..., K), and this rank's rows of gate_proj.weight and up_proj.weight, as ordinary tensors."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    # Without gate_up_proj: some ranks would have rows of gate's, the others of up's. With down_proj, which tells these
    # from layers that fully_shard was called for one by one: all of those are Shard(0).
    expected = {"gate_proj": (Shard(0),), "up_proj": (Shard(0),), "down_proj": (Shard(1),)}
    for name, layer in mlp.named_children():
        placements, right = getattr(layer.weight, "placements", None), expected.get(name)
        if placements != right:
            raise ValueError(f"{name}.weight has the placements {placements}: expected {right} (None: no DTensor)")
    mesh = mlp.gate_proj.weight.device_mesh
    if not isinstance(x, DTensor):
        x = DTensor.from_local(x, mesh, [Replicate()])
    # A rank's columns give it a part of x's gradient. Unless told so, DTensor takes the part for the whole.
    x = x.redistribute(mesh, [Replicate()]).to_local(grad_placements=[Partial()])
    return x, [mlp.gate_proj.weight.to_local(), mlp.up_proj.weight.to_local()]


def replace_mlps(model, *, recompute=False):
    """Swap every MLP inside a Hugging Face Llama, Mistral, Qwen, Phi-3 or GLM model for a SwiGLUMLP, in place.

    An MLP is a module with the layers gate_proj, up_proj and down_proj, or gate_up_proj and down_proj. They are taken
    over as they are: parameters, optimizers and checkpoints do not notice. Each SwiGLUMLP that is there already, as
    after an earlier call, is given `recompute`. Returns the model.

    Raises:
        ValueError: there is no MLP; the model is one itself; or one has a bias, another layer than nn.Linear, more than
            these layers, another formula (tried on a few rows), hooks, as of an earlier fully_shard, or a forward
            method of its own, or is compiled. Then nothing was changed.
    """
    already = [module for module in model.modules() if isinstance(module, SwiGLUMLP)]
    replacements, places = {}, []
    for path, parent in model.named_modules():
        if parent is model and _projections(model):
            raise ValueError(f"{type(model).__name__} is itself an MLP: expected a model that holds one")
        for name, mlp in parent._modules.items():
            if _projections(mlp):
                _check_mlp(f"{path}.{name}".lstrip("."), mlp, parent)
                replacements[mlp] = SwiGLUMLP(1, 1, device="meta")
                places.append((parent, name, mlp))
    if not already and not places:
        layers = " or ".join(map(", ".join, (PROJECTIONS, PACKED_PROJECTIONS)))
        raise ValueError(f"{type(model).__name__} holds no module with {layers}: nothing to replace")
    for mlp, replacement in replacements.items():
        replacement._modules.clear()
        for name in mlp._modules:  # in its own order, by which optimizers number parameters
            if name in _projections(mlp):
                setattr(replacement, name, getattr(mlp, name))
        replacement.train(mlp.training)
    for parent, name, mlp in places:  # each of them, where one MLP has several
        setattr(parent, name, replacements[mlp])
    for mlp in [*already, *replacements.values()]:
        mlp.recompute = recompute
    return model


def _projections(module):
    """The names of its layers, if a module is an MLP that may be replaced."""
    for names in (PROJECTIONS, PACKED_PROJECTIONS):
        if module is not None and module._modules.keys() >= set(names) and not isinstance(module, SwiGLUMLP):
            return names
    return ()


def _check_mlp(path, mlp, parent):
    """Raise if SwiGLUMLP would compute something else than this module does, or something of it would be lost."""
    own = [name for name, value in vars(mlp).items() if value and (name.endswith("_hooks") or name == "forward")]
    if own or mlp._compiled_call_impl or hasattr(parent, "_orig_mod"):
        how = f"has {own[0].strip('_')} of its own" if own else "is compiled"
        raise ValueError(f"{path} {how}, which would be lost: call replace_mlps first")
    projections = _projections(mlp)
    for projection in projections:
        layer = getattr(mlp, projection)
        if type(layer) is not torch.nn.Linear or layer.bias is not None:
            raise ValueError(f"{path}.{projection} is {layer}: expected an nn.Linear without bias")
    known = {*projections, *(f"{name}.weight" for name in projections), "act_fn", "activation_fn"}
    for name in (*mlp._modules, *dict(mlp.named_parameters()), *dict(mlp.named_buffers())):
        if name not in known:
            raise ValueError(f"{path} has {name}: expected {', '.join(projections)} and an activation, no more")
    # Nothing in a module says what else it computes, or which half of gate_up_proj is gate's. So a few rows go through
    # it, with small weights in the place of its own, which may be all zero, spread over ranks or on the meta device.
    numbers = torch.Generator("cpu").manual_seed(0)
    x, gate, up, down = torch.randn(4, 8, 8, generator=numbers, dtype=torch.float64, device="cpu")
    x *= torch.logspace(-1, 2, 8, device="cpu")[:, None]  # far enough to meet a module that clamps
    weights = {"down_proj.weight": down}
    if projections == PACKED_PROJECTIONS:
        weights["gate_up_proj.weight"] = torch.cat([gate, up])
    else:
        weights |= {"gate_proj.weight": gate, "up_proj.weight": up}
    training = mlp.training
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):  # in training, where there may be dropout
            y = torch.func.functional_call(mlp.train(), weights, x)
        right = torch.allclose(y, (silu(x @ gate.t()) * (x @ up.t())) @ down.t())
    except Exception:
        right = False
    finally:
        mlp.train(training)
    if not right:
        raise ValueError(
            f"{path} computes another formula: expected down_proj(silu(gate) * up), with gate the first half of "
            "gate_up_proj's result and up the second"
        )
