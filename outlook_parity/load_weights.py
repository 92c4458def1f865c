"""Copy the weights of a PyTorch model into its JAX twin."""

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from outlook_common.arrays import to_numpy
from outlook_common.text import listed
from outlook_parity.mapping.names import Names
from outlook_parity.mapping.user import NameMap

if TYPE_CHECKING:
    import torch


def load_torch_weights(
    jax_model: Any, torch_model: "torch.nn.Module", names: NameMap | None = None, inputs: Any = None
) -> Any:
    """Copy the parameters and running statistics of a PyTorch model into its JAX twin.

    Args:
        jax_model: an NNX module, Keras or Hugging Face model, which is changed; an Equinox module; or a pair of a
            Linen module and its variables, of a function and its weights, or of Haiku's `transform` and its parameters.
        torch_model: its twin.
        names: what corresponds to what, where names and structure do not say it.
        inputs: as in `verify`; needed only where nothing but the order of execution tells which weight is which.

    Returns:
        The model that was changed, the new Equinox module, or the pair with new weights.

    Raises:
        TypeError: a model is none, or the two are exchanged.
        ValueError: weights without counterpart, or of another shape; the first of them are named.
    """
    from outlook_parity.backends.jax.model import weights_of
    from outlook_parity.backends.names import names_of_models
    from outlook_parity.pair import normalise_models

    torch_model, model = normalise_models(torch_model, jax_model)
    name_map = names or NameMap()
    order = None if inputs is None else partial(_call_order, torch_model, model, inputs, name_map)
    found = names_of_models(torch_model, model, name_map, order)
    torch_weights = torch_model.state_dict()
    weights, errors = _in_flax_layout(found, torch_weights, weights_of(model))
    if errors := list(dict.fromkeys([*errors, *_unused(found, torch_weights)])):
        hint = "" if inputs is not None else "; with inputs=, the order of execution tells more"
        raise ValueError(f"weights that do not correspond: {listed(errors, _LISTED, between='; ')}{hint}")
    return model.with_weights(weights)


# How many errors are listed.
_LISTED = 6


def _call_order(torch_model: Any, model: Any, inputs: Any, name_map: NameMap) -> Any:
    from outlook_parity.core.request import inputs_of, keywords_of
    from outlook_parity.mapping.user import torch_axes_of
    from outlook_parity.pair import call_order_of, shared_keywords

    arrays, keywords = inputs_of(inputs), shared_keywords(torch_model, model, keywords_of(inputs))
    return call_order_of(torch_model, model, arrays, torch_axes_of(name_map, arrays, None), keywords)


def _in_flax_layout(
    names: Names, torch_weights: Mapping[str, Any], flax_weights: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Return PyTorch's weights by Flax path in Flax's layout and dtype, and what is wrong in words."""
    converted: dict[str, np.ndarray] = {}
    errors = []
    for flax, value in flax_weights.items():
        pieces = names.pieces[flax]
        if any(weight.torch not in torch_weights for weight in pieces):
            errors.append(f"{flax} has no counterpart in torch{names.hint(flax)}")
            continue
        arrays = {weight.torch: to_numpy(torch_weights[weight.torch]) for weight in pieces}
        array = names.in_flax_layout(flax, arrays)
        if array is None or array.shape != value.shape:
            got = "parts that do not fit" if array is None else array.shape
            errors.append(f"{flax} has shape {value.shape}, {pieces[0].torch} in its layout {got}")
            continue
        converted[flax] = array.astype(value.dtype)
    return converted, errors


def _unused(names: Names, torch_weights: Mapping[str, Any]) -> list[str]:
    """Return which weights of PyTorch went nowhere, in words."""
    left = [name for name in names.found.left if name in torch_weights and name in names.expected]
    return [f"{name} of torch has no counterpart in JAX{names.hint(name)}" for name in left]
