"""How much a traced program computes and holds, and how much XLA should optimize it."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from math import prod
from typing import Any, NamedTuple
from unittest.mock import patch

import jax
import jax._src.compiler as compiler_internal
import jax._src.interpreters.mlir as mlir_internal

from outlook_parity.backends.jax.convolutions import are_loops, as_products
from outlook_parity.backends.jax.jaxprs import bodies_of

# Without the optimizations of LLVM a CPU takes up to five nanoseconds longer for each number of a forward pass of which
# it computes the derivative, ten for each product of a convolution that is plain loops; with them it compiles up to
# twenty milliseconds longer for each operation. For fewer numbers than these for each operation, and fewer products in
# plain loops, all runs together, not to optimize is quicker, and takes less memory.
MOST_NUMBERS, MOST_CONVOLVED = 1 << 21, 1 << 22


class Work(NamedTuple):
    """What a program computes.

    Attributes:
        live: how many numbers are needed at the same time at most.
        numbers: how many there are.
        convolved: how many products convolutions compute in plain loops.
        operations: how many there are to compile; those of a loop once.
    """

    live: int
    numbers: int
    convolved: int
    operations: int


def work_of(jaxpr: Any) -> Work:
    """Return what a jaxpr computes; a loop as often as it runs, where that is known."""
    last = {variable: index for index, equation in enumerate(jaxpr.eqns) for variable in _variables(equation.invars)}
    last |= dict.fromkeys(_variables(jaxpr.outvars), len(jaxpr.eqns))
    live = most = numbers = convolved = operations = 0
    ends: dict[int, int] = {}  # numbers that are needed until an operation
    for index, equation in enumerate(jaxpr.eqns):
        repeats = int(equation.params.get("length", 1))
        inner = [work_of(body) for body in bodies_of(equation)]
        made = sum(_size(variable) for variable in equation.outvars)
        live += made
        most = max(most, live + max((one.live for one in inner), default=0))
        numbers += repeats * sum(one.numbers for one in inner) or made
        convolved += repeats * sum(one.convolved for one in inner)
        operations += sum(one.operations for one in inner) or 1
        if equation.primitive.name == "conv_general_dilated" and are_loops(_kernel(equation), equation.params):
            convolved += made * _kernel_size(equation)
        for variable in equation.outvars:
            end = last.get(variable, index)
            ends[end] = ends.get(end, 0) + _size(variable)
        live -= ends.pop(index, 0)
    return Work(most, numbers, convolved, operations)


def _variables(variables: Any) -> list[Any]:
    return [variable for variable in variables if not hasattr(variable, "val")]


def _size(variable: Any) -> int:
    return prod(variable.aval.shape)


def _kernel(equation: Any) -> tuple[int, ...]:
    shape: tuple[int, ...] = equation.invars[1].aval.shape
    return shape


def _kernel_size(equation: Any) -> int:
    """Return how many products make a number of a convolution."""
    kernel = _kernel(equation)
    return prod(kernel) // kernel[equation.params["dimension_numbers"].rhs_spec[0]]


# Part of the key of what JAX keeps of compiled operations: those are the verifier's alone.
_context = jax.make_user_context(default_value=None)  # type: ignore[no-untyped-call]

_SWITCH = "jax_disable_most_optimizations"

# What XLA's newer code for fusions gives runs no faster, and takes LLVM up to twice as long.
_OPTIONS: dict[str, str | bool] = {"xla_cpu_use_fusion_emitters": False}


@contextmanager
def compiled_for(work: Work, place: jax.Device, runs: int = 1) -> Iterator[None]:
    """Compile what runs meanwhile as suits a CPU: what computes little, without the optimizations of LLVM.

    Args:
        work: of a forward pass.
        place: where it runs.
        runs: how often its derivative is computed.
    """
    if place.platform != "cpu":
        yield
        return
    little = runs * work.numbers <= MOST_NUMBERS * work.operations and runs * work.convolved <= MOST_CONVOLVED
    with _context("little" if little else "much"), unoptimized() if little else _quick_to_compile(), as_products():
        yield


@contextmanager
def unoptimized() -> Iterator[None]:
    """Compile what runs meanwhile without optimizations, single operations too, for which JAX takes no options."""
    before = jax.config._read(_SWITCH)  # type: ignore[no-untyped-call]
    jax.config.update(_SWITCH, True)  # type: ignore[no-untyped-call]
    try:
        with _quick_to_compile():
            yield
    finally:
        jax.config.update(_SWITCH, before)  # type: ignore[no-untyped-call]


@contextmanager
def _quick_to_compile() -> Iterator[None]:
    """Compile what runs meanwhile with `_OPTIONS`, and in one context of MLIR.

    To make one takes 4 of the 20 milliseconds of a small program.
    """
    make: Any = compiler_internal.get_compile_options
    known = _known_options()

    def options(*args: Any, **more: Any) -> Any:
        given = more.pop("env_options_overrides", None) or {}
        return make(*args, **more, env_options_overrides={**given, **known})

    with (
        patch.object(compiler_internal, "get_compile_options", options),
        patch.object(mlir_internal, "make_ir_context", cache(mlir_internal.make_ir_context)),
    ):
        yield


@cache
def _known_options() -> dict[str, str | bool]:
    """Return `_OPTIONS` if this version of XLA has them."""
    try:
        jax.jit(lambda: 0).lower().compile(compiler_options=_OPTIONS)
    except jax.errors.JaxRuntimeError:
        return {}
    return _OPTIONS
