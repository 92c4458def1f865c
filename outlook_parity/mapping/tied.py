"""Weights that one twin has under several names. Imports no framework."""

from collections.abc import Iterable, Mapping

from outlook_parity.mapping.usual import leaf_name, part_name, steps_of


def names_as_in_jax(torch: Iterable[str], aliases: Mapping[str, str], jax: Iterable[str]) -> dict[str, str]:
    """Return the names under which a tree has PyTorch's weights: of a tied one that which JAX has, if it has one.

    PyTorch keeps the name that was made first, Flax the first in the order of names.

    Args:
        torch: the names that PyTorch keeps.
        aliases: another name of a tied weight -> the one that PyTorch keeps.
        jax: the paths of JAX's weights.
    """
    there = set(map(_usual, jax))
    found = {name: name for name in torch}
    for alias, name in aliases.items():
        if name in found and _usual(name) not in there and _usual(alias) in there:
            found[name] = alias
    return found


def _usual(name: str) -> tuple[str, ...]:
    *owner, leaf = steps_of(name)
    return (*map(part_name, owner), leaf_name(leaf))
