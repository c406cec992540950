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
LINEAR_FORWARD = torch.nn.Linear.forward  # which other libraries replace


class SwiGLUMLP(torch.nn.Module):
    """``down_proj(silu(gate_proj(x)) * up_proj(x))``, the feed-forward layer of Llama, Mistral and Qwen.

    x is (..., hidden_size), and so is the result. Parameters have the names and shapes of Hugging Face's MLPs, so that
    load_state_dict takes theirs: gate_proj.weight and up_proj.weight (intermediate_size, hidden_size), down_proj.weight
    (hidden_size, intermediate_size). `recompute` as in fused_swiglu.

    Where one of the layers before down_proj is more than an nn.Linear without bias and hooks (an adapter, a quantised
    weight, pruning, a parametrization), they are called as they are, without the kernel.

    Tensor parallelism: parallelize_module with ColwiseParallel() for gate_proj and up_proj, RowwiseParallel() for
    down_proj. Each rank computes its columns. x is an ordinary tensor, the same on every rank, or a DTensor over the
    same mesh. Of the hooks that this adds only down_proj's run: its output_layouts may be others.

    Raises:
        ValueError: in forward, weights are DTensors spread in another way, or gate_up_proj's is a DTensor at all.
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
        names = PACKED_PROJECTIONS if packed else PROJECTIONS
        # Past nn.Module.__getattr__, but for a function in the place of a layer
        *layers, down_proj = [self._modules.get(name) or getattr(self, name) for name in names]
        weights = _only_weights(layers)
        if weights is None:
            gate, up = layers[0](x).chunk(2, dim=-1) if packed else (layer(x) for layer in layers)
            return down_proj(silu(gate) * up)
        if hasattr(weights[0], "placements") or hasattr(weights[-1], "placements"):  # DTensor's; its import is slow
            x, weights = _of_this_rank(x, self)
        w_gate, w_up = weights[0].chunk(2) if packed else weights
        return down_proj(fused_swiglu(x, w_gate, w_up, linear=True, recompute=self.recompute))


def _only_weights(layers):
    """Each layer's weight, if all multiply by it and do nothing else, so that they need not be called, or None."""
    if torch.nn.Linear.forward is not LINEAR_FORWARD or torch.nn.modules.module._has_any_global_hook():
        return None
    weights = []
    for layer in layers:
        # Read where nn.Module keeps them: layer.weight calls its __getattr__, which takes as long as all the rest here.
        if type(layer) is not torch.nn.Linear or layer._parameters.get("bias", layer) is not None:
            return None
        if "forward" in layer.__dict__:
            return None
        for hooks in (layer._forward_pre_hooks, layer._forward_hooks, layer._backward_pre_hooks, layer._backward_hooks):
            for hook in hooks.values() if hooks else ():
                # Tensor parallelism has hooks that spread x: see _of_this_rank, which does so.
                if not str(hook.__module__).startswith("torch.distributed.tensor"):
                    return None
        weight = layer._parameters.get("weight")
        weight = layer.weight if weight is None else weight  # a replica of DataParallel's has it as an attribute
        known = type(weight) is torch.nn.Parameter or type(weight) in (torch.Tensor, torch._subclasses.FakeTensor)
        if not known and not hasattr(weight, "placements"):  # DTensor's; no quantised weight
            return None
        weights.append(weight)
    return weights


def _of_this_rank(x, mlp):
    """x (..., K), and this rank's rows of gate_proj.weight and up_proj.weight, as ordinary tensors."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    # Without gate_up_proj: some ranks would have rows of gate's, the others of up's. With down_proj, which tells these
    # from layers that fully_shard was called for one by one: all of those are Shard(0).
    expected = {"gate_proj": (Shard(0),), "up_proj": (Shard(0),), "down_proj": (Shard(1),)}
    for name, layer in mlp.named_children():
        placements, right = getattr(getattr(layer, "weight", None), "placements", None), expected.get(name)
        if placements != right:
            raise ValueError(f"{name}.weight has the placements {placements}: expected {right} (None: no DTensor)")
    mesh = mlp.gate_proj.weight.device_mesh
    if not isinstance(x, DTensor):
        x = DTensor.from_local(x, mesh, [Replicate()])
    # A rank's columns give it a part of x's gradient. Unless told so, DTensor takes the part for the whole.
    x = x.redistribute(mesh, [Replicate()]).to_local(grad_placements=[Partial()])
    return x, [mlp.gate_proj.weight.to_local(), mlp.up_proj.weight.to_local()]


def replace_mlps(model, *, recompute=False):
    """Make every MLP of a Hugging Face Llama, Mistral, Qwen, Phi-3 or GLM model a SwiGLUMLP, in place.

    An MLP is a module with the layers gate_proj, up_proj and down_proj, or gate_up_proj and down_proj. It stays the
    same object, of another class: parameters, optimizers, checkpoints and what is wrapped around it do not notice.
    `recompute` is given to each SwiGLUMLP in the model, also to those of an earlier call. Returns the model.

    Raises:
        ValueError: there is no MLP; or one has a bias, another layer than nn.Linear, more than these layers, another
            formula (tried on a few rows), its own forward, or hooks, as of an earlier fully_shard. All is as it was.
    """
    found = [(path or type(module).__name__, module) for path, module in model.named_modules() if _projections(module)]
    for path, mlp in found:
        _check_mlp(path, mlp)
    for _, mlp in found:
        mlp.__class__ = SwiGLUMLP
    mlps = [module for module in model.modules() if isinstance(module, SwiGLUMLP)]
    if not mlps:
        layers = " or ".join(map(", ".join, (PROJECTIONS, PACKED_PROJECTIONS)))
        raise ValueError(f"{type(model).__name__} holds no module with {layers}: nothing to replace")
    for mlp in mlps:
        mlp.recompute = recompute
    return model


def _projections(module):
    """The names of its layers, if a module is an MLP that is no SwiGLUMLP yet."""
    for names in (PROJECTIONS, PACKED_PROJECTIONS):
        if module._modules.keys() >= set(names) and not isinstance(module, SwiGLUMLP):
            return names
    return ()


def _check_mlp(path, mlp):
    """Raise if SwiGLUMLP would compute something else than this module does."""
    projections = _projections(mlp)
    for module in (mlp, *(child for name, child in mlp.named_children() if name not in projections)):
        for name, value in vars(module).items():
            if name == "forward" or (name.endswith("_hooks") and value):
                raise ValueError(
                    f"{path} has {name.strip('_')} on its {type(module).__name__}: call replace_mlps first"
                )
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
    expected, right, why = (silu(x @ gate.t()) * (x @ up.t())) @ down.t(), True, None
    modes = {module: module.training for module in mlp.modules()}
    try:
        for training, shape in ((True, (8, 8)), (False, (8, 8)), (True, (2, 4, 8))):  # there may be dropout
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                y = torch.func.functional_call(mlp.train(training), weights, x.view(shape))
            right &= torch.allclose(y, expected.view(shape))
    except Exception as error:
        right, why = False, error
    for module, training in modes.items():
        module.training = training
    if not right:
        formula = "down_proj(silu(gate) * up), gate being gate_proj(x) or the first half of gate_up_proj(x)"
        raise ValueError(f"{path} ({type(mlp).__name__}) computes another formula than {formula}") from why
