"""Outputs of models: their leaves by name, and which of two models correspond. Imports no framework."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from outlook_common.text import listed
from outlook_parity.core.pytree import members, named_leaves
from outlook_parity.core.task import OUTPUT, is_array

Shape = tuple[int, ...]


@dataclass
class Beside:
    """What outputs hold besides arrays.

    Attributes:
        opaque: things in a mapping or dataclass that hold no arrays, a cache say: they are no outputs.
    """

    opaque: list[str] = field(default_factory=list)


def output_leaves(tree: Any, beside: Beside | None = None) -> dict[str, Any]:
    """Return the outputs by path, in the order in which the model gives them.

    Args:
        tree: what a model returned.
        beside: filled with what is there besides arrays.

    Raises:
        TypeError: there is something else that is no array.
    """
    found: dict[str, Any] = {}
    _collect(tree, OUTPUT, found, beside or Beside(), named=False)
    return found


def _collect(tree: Any, name: str, found: dict[str, Any], beside: Beside, *, named: bool) -> None:
    inner = members(tree)
    if is_array(tree) or tree is None or inner is None:
        if named and tree is not None and not is_array(tree):
            beside.opaque.append(f"{name} ({type(tree).__name__})")
        else:
            found |= named_leaves(tree, is_array, name)
        return
    by_key = dict(inner)
    order = [str(key) for key in tree] if isinstance(tree, Mapping) else list(by_key)
    below = isinstance(tree, Mapping) or not isinstance(tree, list | tuple) or hasattr(tree, "_fields")
    for key in order:
        _collect(by_key[key], f"{name}.{key}", found, beside, named=below)


@dataclass(frozen=True)
class Output:
    """Shape of an output, and whether it is floating-point."""

    shape: Shape
    floating: bool


@dataclass(frozen=True)
class OutputMatch:
    """Which outputs of two models correspond.

    Attributes:
        torch_names: JAX's path -> PyTorch's, where they differ.
        alone: those that one model alone has, under its own name: missing in the other, and in no gradient or loss.
        notes: what was matched otherwise than by path, in words.
    """

    torch_names: Mapping[str, str] = field(default_factory=dict)
    alone: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()

    def of_jax(self, outputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return JAX's outputs under PyTorch's names."""
        return {self.torch_names.get(name, name): x for name, x in outputs.items()}


def match_outputs(
    torch: Mapping[str, Output],
    jax: Mapping[str, Output],
    fits: Callable[[Shape, Shape], bool],
) -> OutputMatch:
    """Return which outputs correspond: by path, else by position, else by shape where that is unique.

    By position where both have as many floating-point outputs left. What only one model has is missing in the other: a
    mismatch, unless it is ignored with a reason.

    Args:
        torch: by path, in the order in which the model gives them.
        jax: likewise.
        fits: whether an output of the first shape, in PyTorch, can be one of the second in JAX.
    """
    names: dict[str, str] = {}
    notes: list[str] = []
    here = {name: output for name, output in torch.items() if name not in jax}
    there = {name: output for name, output in jax.items() if name not in torch}
    for floating in (True, False):
        ours = [name for name, output in here.items() if output.floating == floating]
        theirs = [name for name, output in there.items() if output.floating == floating]
        found = list(zip(theirs, ours, strict=True)) if len(ours) == len(theirs) else []
        how = "position"
        if not found:
            found, how = _by_shape(ours, theirs, torch, jax, fits), "shape"
        names |= dict(found)
        pairs = listed([f"{ours} of torch and {theirs} of JAX" for theirs, ours in found])
        notes += [f"outputs were matched by {how}: {pairs}"] if found else []
    alone = frozenset([*(here.keys() - names.values()), *(there.keys() - names.keys())])
    return OutputMatch(names, alone, tuple(notes))


def _by_shape(
    torch_names: Collection[str],
    jax_names: Collection[str],
    torch: Mapping[str, Output],
    jax: Mapping[str, Output],
    fits: Callable[[Shape, Shape], bool],
) -> list[tuple[str, str]]:
    """Return pairs of JAX's and PyTorch's outputs each of which fits the other alone."""
    fitting = {one: [o for o in torch_names if fits(torch[o].shape, jax[one].shape)] for one in jax_names}
    candidates = [other for others in fitting.values() for other in others]
    return [
        (one, others[0]) for one, others in fitting.items() if len(others) == 1 and candidates.count(others[0]) == 1
    ]
