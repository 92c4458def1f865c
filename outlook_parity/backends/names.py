"""Names that correspond in two models of the user."""

from collections.abc import Callable
from dataclasses import replace

import torch

from outlook_common.arrays import to_numpy
from outlook_parity.backends.jax.base import JaxModel
from outlook_parity.backends.jax.model import shapes_of, transposed_of
from outlook_parity.backends.jax.model import weights_of as jax_weights_of
from outlook_parity.backends.torch.model import torch_leaves, weights_of
from outlook_parity.mapping.infer import derive_names
from outlook_parity.mapping.names import Names
from outlook_parity.mapping.structure import Order
from outlook_parity.mapping.user import NameMap


def names_of_models(
    torch_model: torch.nn.Module,
    model: JaxModel,
    name_map: NameMap,
    order: Callable[[], tuple[Order, Order]] | None = None,
    *,
    same_weights: bool = False,
) -> Names:
    """Return the names that correspond, see `derive_names`.

    Args:
        torch_model: PyTorch's model.
        model: JAX's.
        name_map: the user's map.
        order: returns when each module is first called; asked only where names do not tell.
        same_weights: whether the weights are meant to be equal already, so that they may break ties.

    Raises:
        TypeError: a parameter is complex.
        ValueError: the map names something that is not there.
    """
    for framework, weights in (("torch", dict(torch_model.named_parameters())), ("JAX", model.parameters)):
        for name, weight in weights.items():
            if "complex" in str(weight.dtype):
                raise TypeError(
                    f"{name} of the {framework} model is complex; store its real and imaginary parts as two parameters"
                )
    if usual := model.axes():
        name_map = replace(name_map, axes=usual | dict(name_map.axes))
    theirs, ours = weights_of(torch_model), jax_weights_of(model)
    values = (lambda name: to_numpy(theirs[name]), lambda name: to_numpy(ours[name])) if same_weights else None
    return derive_names(
        torch_leaves(torch_model),
        {path for path, _ in torch_model.named_modules()},
        shapes_of(model),
        model.modules(),
        name_map,
        transposed_of(model),
        order=order,
        values=values,
        aliases=_aliases(torch_model),
    )


def _aliases(model: torch.nn.Module) -> dict[str, str]:
    """Return the other names of tied parameters -> the first, which PyTorch keeps."""
    kept = {id(parameter): name for name, parameter in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    return {name: kept[id(parameter)] for name, parameter in every if kept[id(parameter)] != name}
