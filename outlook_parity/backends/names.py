"""Names that correspond in two models of the user."""

from dataclasses import replace

import torch

from outlook_parity.backends.jax.base import JaxModel
from outlook_parity.backends.jax.model import shapes_of, transposed_of
from outlook_parity.backends.torch.model import torch_leaves
from outlook_parity.mapping.infer import derive_names
from outlook_parity.mapping.names import Names
from outlook_parity.mapping.user import NameMap


def names_of_models(torch_model: torch.nn.Module, model: JaxModel, name_map: NameMap) -> Names:
    """Return the names that correspond, by `name_map` and Flax's usual names.

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
    return derive_names(
        torch_leaves(torch_model),
        {path for path, _ in torch_model.named_modules()},
        shapes_of(model),
        model.modules(),
        name_map,
        transposed_of(model),
    )
