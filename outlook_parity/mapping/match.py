"""The layouts of weights that correspond, chosen for all of one kind. Imports no framework."""

from collections import Counter
from collections.abc import Collection, Iterable

from outlook_parity.core.layout import Axes
from outlook_parity.mapping.layouts import KERNELS, other_axes, permuted, regroups, usual_axes
from outlook_parity.mapping.names import WeightName
from outlook_parity.mapping.tree import Leaf

# Type of PyTorch's module, leaf in JAX, number of axes: weights that have the same layout.
Group = tuple[str, str, int]


class Layouts:
    """The layouts of weights that correspond.

    Of the layouts that are known for a kind of weight, the one that fits most of that kind is that of all: so a square
    weight that is turned is not taken for one of another layout.

    Args:
        pairs: weights of PyTorch and of JAX that correspond.
        transposed: paths of Flax's transposed convolutions with `transpose_kernel`, whose kernel is as in PyTorch.
    """

    def __init__(self, pairs: Iterable[tuple[Leaf, Leaf]], transposed: Collection[str] = ()) -> None:
        self._transposed = transposed
        self._votes: dict[Group, Counter[Axes | None]] = {}
        for torch, jax in pairs:
            votes = self._votes.setdefault(_group(torch, jax), Counter())
            votes.update(axes for axes in _known(torch, jax) if _fits(torch, jax, axes))

    def of(self, torch: Leaf, jax: Leaf, axes: Axes | None = None) -> WeightName:
        """Return the layout of two weights that correspond; with `axes` those are given."""
        given = axes is not None
        flipped = False
        if not given:
            if torch.kind.startswith("ConvTranspose") and len(torch.shape) > 2:
                axes, flipped = self._of_transposed(torch, jax)
            else:
                axes = self._voted(torch, jax)
        here = permuted(torch.shape, axes) if axes is None or len(axes) == len(torch.shape) else torch.shape
        reshaped = (here, jax.shape) if here != jax.shape and regroups(here, jax.shape) else None
        return WeightName(torch.name, jax.name, axes, torch.parts, reshaped, flipped, jax.parts)

    def _voted(self, torch: Leaf, jax: Leaf) -> Axes | None:
        known = _known(torch, jax)
        votes = self._votes.get(_group(torch, jax), Counter())
        best = max(known, key=lambda axes: votes[axes])  # the most usual of those that fit as many
        if len(known) == 1 and not _fits(torch, jax, best):
            others = (axes for axes in other_axes(torch.shape) if permuted(torch.shape, axes) == jax.shape)
            return next(others, best)
        return best

    def _of_transposed(self, torch: Leaf, jax: Leaf) -> tuple[Axes | None, bool]:
        """Return axes and flip: Flax takes this kernel as that of a convolution, unless it has `transpose_kernel`."""
        axes = usual_axes(torch.kind, KERNELS[0], len(torch.shape))[0]
        if axes is None:
            return None, False
        turned = (*axes[:-2], axes[-1], axes[-2])
        owner = jax.name.rpartition(".")[0]
        fits = permuted(torch.shape, axes) == jax.shape
        plain = owner in self._transposed or (permuted(torch.shape, turned) == jax.shape and not fits)
        return (turned, False) if plain else (axes, True)


def may_correspond(torch: Leaf, jax: Leaf) -> bool:
    """Whether two weights have shapes that correspond in a known layout, and kinds that do not exclude each other."""
    leaf = jax.name.rpartition(".")[2]
    if leaf == "kernel" and (torch.kind == "Embedding" or torch.kind.endswith("Norm")):
        return False
    if (leaf.startswith("embedding") or leaf in ("scale", "gamma")) and torch.kind.startswith(("Linear", "Conv")):
        return False
    shapes = [axes for axes in _known(torch, jax) if _fits(torch, jax, axes)]
    return bool(shapes) or any(permuted(torch.shape, axes) == jax.shape for axes in other_axes(torch.shape))


def _known(torch: Leaf, jax: Leaf) -> list[Axes | None]:
    return usual_axes(torch.kind, jax.name.rpartition(".")[2], len(torch.shape))


def _fits(torch: Leaf, jax: Leaf, axes: Axes | None) -> bool:
    return regroups(permuted(torch.shape, axes), jax.shape)


def _group(torch: Leaf, jax: Leaf) -> Group:
    return torch.kind, jax.name.rpartition(".")[2], len(torch.shape)
