"""The order of an output's axes: by the map, else by shapes, else as said for the inputs. Imports no framework."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from outlook_parity.core.layout import Axes, fitting_axes
from outlook_parity.core.sizes import resized

Shapes = Mapping[str, tuple[int, ...]]
Inputs = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class OutputAxes:
    """The order in which JAX has the axes of PyTorch's outputs.

    Attributes:
        orders: output -> order, where it is another one than PyTorch's.
        notes: on outputs whose shapes fit in several orders, which was taken and why.
    """

    orders: dict[str, Axes] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def output_axes(
    torch: Shapes,
    jax: Shapes,
    given: Mapping[str, Axes],
    torch_axes: Mapping[str, Axes],
    inputs: Inputs,
    shapes_of: Callable[[Inputs], tuple[Shapes, Shapes]],
) -> OutputAxes:
    """Return the order of the axes of every output.

    As the map says, else by shapes; where these fit in several orders, by the shapes that inputs of another size give,
    else as `torch_axes` says of an input with as many axes. Never by numbers: a twin that exchanges axes is wrong.

    Args:
        torch: shapes of PyTorch's outputs.
        jax: shapes of JAX's, under PyTorch's names.
        given: orders by output, of the user's map.
        torch_axes: the order in which PyTorch takes the axes of each input.
        inputs: by name, as JAX takes them.
        shapes_of: returns the shapes of both for other inputs; may raise anything for those that a model does not take.

    Raises:
        ValueError: an order of the map is of no output, or does not fit it.
    """
    if unknown := given.keys() - torch.keys():
        raise ValueError(f"out_axes names {', '.join(sorted(unknown))}; the torch model gives {', '.join(torch)}")
    fitting = {
        name: [given[name]] if name in given else fitting_axes(shape, jax.get(name, ()))
        for name, shape in torch.items()
    }
    open_ones = {name: orders for name, orders in fitting.items() if len(orders) > 1}
    reasons: dict[str, str] = {}
    for how, (torch_shapes, jax_shapes) in _at_other_sizes(inputs, shapes_of) if open_ones else ():
        for name in open_ones.keys() - reasons.keys():
            left = [o for o in fitting[name] if o in fitting_axes(torch_shapes.get(name, ()), jax_shapes.get(name, ()))]
            fitting[name] = left or fitting[name]
            if len(left) == 1:
                reasons[name] = f"as alone fits for inputs {how}"
    said = {len(axes): _inverse(axes) for axes in torch_axes.values() if axes != tuple(range(len(axes)))}
    for name in open_ones.keys() - reasons.keys():
        order = said.get(len(torch[name]))
        if order in fitting[name]:
            fitting[name], reasons[name] = [order], "the order said for the inputs"
        else:
            reasons[name] = "as it is, for nothing says otherwise"
    orders: dict[str, Axes] = {}
    notes: list[str] = []
    for name, shape in torch.items():
        order = fitting[name][0] if fitting[name] else None
        if order is None:
            continue
        same = tuple(range(len(shape)))
        if sorted(order) != list(same):
            raise ValueError(f"out_axes of {name}, in torch of shape {shape}, must not be {list(order)}")
        if order != same:
            orders[name] = order
        if name in open_ones and (order != same or len(fitting[name]) > 1):
            notes.append(
                f"{name} of shape {shape} fits in {len(open_ones[name])} orders of axes; taken in "
                f"{list(order)}, {reasons[name]} (out_axes in a map says it outright)"
            )
    return OutputAxes(orders, tuple(notes))


def _at_other_sizes(
    inputs: Inputs, shapes_of: Callable[[Inputs], tuple[Shapes, Shapes]]
) -> Iterator[tuple[str, tuple[Shapes, Shapes]]]:
    for how, other in resized(inputs).items():
        try:
            yield how, shapes_of(other)
        except Exception:  # a model of one size
            continue


def _inverse(axes: Axes) -> Axes:
    return tuple(int(axis) for axis in np.argsort(axes))
