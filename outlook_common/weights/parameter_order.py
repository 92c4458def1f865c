"""Which parameter has which number in an optimizer of PyTorch's, which numbers them group by group."""

from collections.abc import Mapping, Sequence

Shape = tuple[int, ...]

_HEADS = ("aux_head.", "head.")
# Groups of parameters that decay, and that do not; more are by layer.
_BY_DECAY = 2


def names_of_numbers(
    groups: Sequence[tuple[Sequence[str], bool]], shapes: Mapping[str, Shape], order: Sequence[tuple[str, Shape]]
) -> dict[str, str]:
    """Return number -> name, where order and shapes leave one way only.

    Parameters have the model's order among those that decay, and among those that do not: so they are numbered in one
    group, in groups of layers one after the other, and in groups by decay, as of timm.

    Args:
        groups: the numbers of each group's parameters, and whether these decay.
        shapes: number -> shape of its moments, where it has any.
        order: names and shapes of the trained parameters, in the model's order.

    Raises:
        ValueError: they do not fit, or in several ways.
    """
    numbered = [number for numbers, _ in groups for number in numbers]
    sizes = ", ".join(str(len(numbers)) for numbers, _ in groups)
    of_groups = f"{len(numbered)} in groups of {sizes}" if len(groups) > 1 else f"{len(numbered)}"
    if len(set(numbered)) != len(order) or len(numbered) != len(order):
        raise ValueError(f"these are {of_groups}, the model's optimizer has {len(order)}")
    # Groups by layer have the heads last, which the model has around its last norm.
    by_layer = sorted(order, key=lambda entry: entry[0].startswith(_HEADS))
    orders = [order] if len(groups) <= _BY_DECAY else [order, by_layer]
    found = [way for order in orders for way in _ways(groups, shapes, order)]
    if any(way != found[0] for way in found) or not found:
        how_many = "several" if found else "none"
        raise ValueError(f"of the ways to order these, {of_groups}, {how_many} fit the shapes of the model's")
    return found[0]


def _ways(
    groups: Sequence[tuple[Sequence[str], bool]], shapes: Mapping[str, Shape], order: Sequence[tuple[str, Shape]]
) -> list[dict[str, str]]:
    """Return the ways to merge what decays and what does not into an order; two of them if there are more."""
    a = [number for numbers, decays in groups if decays for number in numbers]
    b = [number for numbers, decays in groups if not decays for number in numbers]
    partial: dict[int, list[tuple[str, ...]]] = {0: [()]}  # how many of the first were taken -> ways so far
    for at, (_, shape) in enumerate(order):
        longer: dict[int, list[tuple[str, ...]]] = {}
        for i, ways in partial.items():
            for sequence, index, taken in ((a, i, i + 1), (b, at - i, i)):
                if index < len(sequence) and shapes.get(sequence[index], shape) == shape:
                    longer.setdefault(taken, []).extend((*way, sequence[index]) for way in ways)
        partial = {taken: ways[:2] for taken, ways in longer.items()}
    names = [name for name, _ in order]
    return [dict(zip(way, names, strict=True)) for way in partial.get(len(a), ())]
