"""Copy the weights of a PyTorch model into its JAX twin."""

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from outlook_common.arrays import to_numpy
from outlook_common.text import listed
from outlook_parity.mapping.names import Names
from outlook_parity.mapping.user import NameMap

if TYPE_CHECKING:
    import torch


MOST_LISTED = 6  # weights in an error


def load_torch_weights(jax_model: Any, torch_model: "torch.nn.Module", names: NameMap | None = None) -> Any:
    """Copy the parameters and running statistics of a PyTorch model into its JAX twin.

    Args:
        jax_model: an NNX module, Keras or Hugging Face model, which is changed; an Equinox module; or a pair of a
            Linen module and its variables, of a function and its weights, or of Haiku's `transform` and its parameters.
        torch_model: its twin.
        names: what corresponds to what, where Flax's usual names do not say it.

    Returns:
        The model that was changed, the new Equinox module, or the pair with new weights.

    Raises:
        ValueError: weights without counterpart, or of another shape; the first of them are named.
    """
    from outlook_parity.backends.jax.model import as_jax_model, weights_of
    from outlook_parity.backends.names import names_of_models

    model = as_jax_model(jax_model)
    found = names_of_models(torch_model, model, names or NameMap())
    torch_weights = torch_model.state_dict()
    weights, errors = _in_flax_layout(found, torch_weights, weights_of(model))
    if errors := [*errors, *_unused(found, torch_weights, weights)]:
        every = listed(dict.fromkeys(errors), MOST_LISTED, between="; ")
        raise ValueError(f"weights that do not correspond: {every}")
    return model.with_weights(weights)


def _in_flax_layout(
    names: Names, torch_weights: Mapping[str, Any], flax_weights: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Return PyTorch's weights by Flax path in Flax's layout and dtype, and what is wrong in words."""
    converted: dict[str, np.ndarray] = {}
    errors = []
    for flax, value in flax_weights.items():
        weight = names.by_flax[flax]
        if weight.torch not in torch_weights:
            errors.append(f"{flax} has no counterpart in torch{names.hint(flax)}")
            continue
        array = weight.to_flax(to_numpy(torch_weights[weight.torch]))
        if array.shape != value.shape:
            errors.append(f"{flax} has shape {value.shape}, {weight.torch} in its layout {array.shape}")
        converted[flax] = array.astype(value.dtype)
    return converted, errors


def _unused(names: Names, torch_weights: Mapping[str, Any], converted: Collection[str]) -> list[str]:
    """Return which weights of PyTorch went nowhere, in words."""
    used = {names.by_flax[flax].torch for flax in converted}
    return [
        f"{name} of torch has no counterpart in JAX{names.hint(name)}"
        for name in names.expected
        if name in torch_weights and name not in used
    ]
