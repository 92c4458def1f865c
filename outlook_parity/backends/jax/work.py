"""How much a traced program computes and holds, and how much XLA should optimize it."""

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import Any, NamedTuple

import jax

from outlook_parity.backends.jax.jaxprs import bodies_of

# Without the optimizations of LLVM a CPU takes some nanoseconds longer for each number that is computed, and a hundred
# for each product of a convolution's derivative in float64: for fewer than these that is less than to optimize.
MOST_NUMBERS, MOST_CONVOLVED = 1 << 27, 1 << 20


class Work(NamedTuple):
    """What a program computes.

    Attributes:
        live: how many numbers are needed at the same time at most.
        numbers: how many there are.
        convolved: how many products convolutions compute.
    """

    live: int
    numbers: int
    convolved: int


def work_of(jaxpr: Any) -> Work:
    """Return what a jaxpr computes; a loop as often as it runs, where that is known."""
    last = {variable: index for index, equation in enumerate(jaxpr.eqns) for variable in _variables(equation.invars)}
    last |= dict.fromkeys(_variables(jaxpr.outvars), len(jaxpr.eqns))
    live = most = numbers = convolved = 0
    ends: dict[int, int] = {}  # numbers that are needed until an operation
    for index, equation in enumerate(jaxpr.eqns):
        repeats = int(equation.params.get("length", 1))
        inner = [work_of(body) for body in bodies_of(equation)]
        made = sum(_size(variable) for variable in equation.outvars)
        live += made
        most = max(most, live + max((one.live for one in inner), default=0))
        numbers += repeats * sum(one.numbers for one in inner) or made
        convolved += repeats * sum(one.convolved for one in inner)
        if equation.primitive.name == "conv_general_dilated":
            convolved += made * _kernel_size(equation)
        for variable in equation.outvars:
            end = last.get(variable, index)
            ends[end] = ends.get(end, 0) + _size(variable)
        live -= ends.pop(index, 0)
    return Work(most, numbers, convolved)


def _variables(variables: Any) -> list[Any]:
    return [variable for variable in variables if not hasattr(variable, "val")]


def _size(variable: Any) -> int:
    return prod(variable.aval.shape)


def _kernel_size(equation: Any) -> int:
    """Return how many products make a number of a convolution."""
    kernel = equation.invars[1].aval.shape
    return prod(kernel) // kernel[equation.params["dimension_numbers"].rhs_spec[0]]


# Part of the key of what JAX keeps of compiled operations: those are the verifier's alone.
_context = jax.make_user_context(default_value=None)  # type: ignore[no-untyped-call]

_SWITCH = "jax_disable_most_optimizations"


@contextmanager
def compiled_for(work: Work, place: jax.Device, *, backward: bool = False) -> Iterator[None]:
    """Compile what runs meanwhile: what computes little, on a CPU, without the optimizations of LLVM.

    Args:
        work: of a forward pass.
        place: where it runs.
        backward: whether it is differentiated.
    """
    little = work.numbers <= MOST_NUMBERS and (not backward or work.convolved <= MOST_CONVOLVED)
    if place.platform != "cpu" or not little:
        yield
        return
    before = jax.config._read(_SWITCH)  # type: ignore[no-untyped-call]
    jax.config.update(_SWITCH, True)  # type: ignore[no-untyped-call]
    try:
        with _context(True):
            yield
    finally:
        jax.config.update(_SWITCH, before)  # type: ignore[no-untyped-call]
