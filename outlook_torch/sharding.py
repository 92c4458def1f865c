"""FSDP2 for the models of this package: block by block, along the axes of the table that JAX's specs come from."""

from typing import TYPE_CHECKING, Any

from torch import nn

from outlook_common.axes import RULES, logical_axes
from outlook_torch.blocks import ClassBlock, Downsample, Outlooker, PatchEmbed, Transformer
from outlook_torch.weights import table_of

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

# What is gathered and freed as one: each block; and of what returns a view, which FSDP2 warns of, the parts.
BLOCKS = (Outlooker, Transformer, ClassBlock)
IN_PARTS = (PatchEmbed, Downsample)

# Methods that FSDP2 gathers the weights of the model itself for, besides `forward`.
METHODS = ("forward_train", "forward_features", "forward_head", "forward_intermediates")


def fsdp_plan(model: nn.Module) -> dict[str, nn.Module]:
    """Return what `fully_shard` takes as one unit each, by path and in its order; the model itself, "", is the last."""
    units: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        if isinstance(module, BLOCKS):
            units[path] = module
        elif isinstance(module, IN_PARTS):
            units |= {f"{path}.{name}": part for name, part in module.named_children()}
    return {**units, "": model}


def fully_shard(model: nn.Module, mesh: "DeviceMesh | None" = None, **options: Any) -> None:
    """Let the ranks of a mesh share the weights of `model`, in place: PyTorch's FSDP2, block by block.

    Each weight is split along its channels, as by the rules "fsdp" in JAX, where the ranks divide them, else along its
    first axis. All methods of the model can be called. BatchNorm's statistics are each rank's own.

    Args:
        model: one of this package, on any device, also the meta device: then call `to_empty` and `init_weights`, or
            `load_weights`.
        mesh: of one axis, or of two, of which the second shards and the first replicates; None means all ranks.
        **options: of `torch.distributed.fsdp.fully_shard`: `mp_policy`, `reshard_after_forward`, `offload_policy`.

    Raises:
        TypeError: `model` is not one of this package.
    """
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard as shard_unit
    from torch.distributed.fsdp import register_fsdp_forward_method
    from torch.distributed.tensor import Shard

    if mesh is None:
        first = next(model.parameters()).device.type
        kind = "cuda" if dist.get_backend() == "nccl" else "cpu" if first == "meta" else first
        mesh = init_device_mesh(kind, (dist.get_world_size(),))
    axes = _split_axes(model, mesh.shape[-1])

    def placement(parameter: nn.Parameter) -> Shard | None:
        return Shard(axes[id(parameter)]) if id(parameter) in axes else None

    for module in fsdp_plan(model).values():
        shard_unit(module, mesh=mesh, shard_placement_fn=placement, **options)
    for method in METHODS:
        if hasattr(model, method):
            register_fsdp_forward_method(model, method)


def _split_axes(model: nn.Module, ranks: int) -> dict[int, int]:
    """Return the id of each parameter -> along which axis it is split, where the ranks divide that of the table."""
    parameters = dict(model.named_parameters())
    axes: dict[int, int] = {}
    for entry in table_of(model).entries:
        if (parameter := parameters.get(entry.torch)) is None:
            continue  # a buffer
        split = [axis for axis, logical in enumerate(logical_axes(entry)) if logical in RULES["fsdp"]]
        if split and entry.shape[split[0]] % ranks == 0:
            axes[id(parameter)] = split[0]
    return axes
