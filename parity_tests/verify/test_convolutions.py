"""Convolutions in float64, written as those that XLA has products of matrices for."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import pytest
from jax import lax

from outlook_parity.backends.jax.convolutions import as_products
from outlook_parity.backends.jax.jaxprs import bodies_of

pytestmark = pytest.mark.usefixtures("quick_compilation")

# Channels in and out, the kernel's sizes, options: one axis and two, in groups, dilated, with much and uneven padding.
CASES: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "plain": ((6, 4), (3, 3), {"padding": [(1, 1), (1, 1)]}),
    "strided": ((6, 4), (3, 2), {"window_strides": (2, 3), "padding": [(1, 1), (0, 1)]}),
    "depthwise, strided": ((6, 6), (3, 3), {"window_strides": (2, 2), "groups": 6}),
    "depthwise, two for each": ((6, 12), (3, 3), {"groups": 6}),
    "groups": ((6, 9), (3, 3), {"groups": 3, "padding": [(1, 1), (2, 0)]}),
    "groups, strided": ((6, 4), (3, 2), {"groups": 2, "window_strides": (2, 1)}),
    "transposed": ((6, 4), (4, 3), {"lhs_dilation": (2, 3), "padding": [(2, 2), (1, 2)]}),
    "transposed, uneven": ((6, 4), (7, 4), {"lhs_dilation": (2, 4), "padding": [(3, 4), (3, 3)]}),
    "transposed, cropped": ((6, 4), (2, 5), {"lhs_dilation": (3, 2), "padding": [(-1, 0), (6, -2)]}),
    "transposed, groups": ((6, 4), (4, 3), {"lhs_dilation": (2, 1), "groups": 2, "padding": [(1, 2), (1, 1)]}),
    "transposed, strided": ((6, 4), (4, 3), {"lhs_dilation": (2, 3), "window_strides": (3, 1)}),
    "dilated kernel": ((6, 4), (3, 3), {"rhs_dilation": (2, 1), "padding": [(2, 2), (5, 4)]}),
    "cropped": ((6, 4), (3, 3), {"padding": [(-1, 2), (0, -1)]}),
    "sequence": ((6, 4), (5,), {"padding": [(2, 2)]}),
    "sequence, groups, strided": ((6, 4), (4,), {"groups": 2, "window_strides": (3,), "padding": [(2, 1)]}),
    "sequence, transposed": ((6, 4), (5,), {"lhs_dilation": (3,), "padding": [(2, 3)]}),
    "sequence, depthwise": ((6, 6), (3,), {"groups": 6, "padding": [(2, 0)]}),
}
# Of batch, channels and axes: channels last, channels first, and neither.
LAYOUTS = {
    1: [("NWC", "WIO", "NWC"), ("NCW", "OIW", "NCW"), ("WNC", "IWO", "CWN")],
    2: [("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW"), ("HNWC", "IHOW", "CHWN")],
}


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def convolution(case: str, layout: int) -> tuple[Callable[[Any, Any], Any], jax.Array, jax.Array]:
    """Return a convolution, a map and a kernel."""
    (inside, out), sizes, options = CASES[case]
    options = {"window_strides": (1,) * len(sizes), "padding": [(0, 0)] * len(sizes), **options}
    groups = options.pop("groups", 1)
    names = LAYOUTS[len(sizes)][layout]
    lengths = {"N": 2, "C": inside, "I": inside // groups, "O": out}
    rng = np.random.default_rng(0)
    x = jax.device_put(rng.standard_normal([lengths.get(axis, 9 - "HW".find(axis)) for axis in names[0]]))
    axes = "HW" if len(sizes) == 2 else "W"
    lengths |= dict(zip(axes, sizes, strict=True))
    kernel = jax.device_put(rng.standard_normal([lengths[axis] for axis in names[1]]))

    def convolve(x: Any, kernel: Any) -> Any:
        return lax.conv_general_dilated(x, kernel, dimension_numbers=names, feature_group_count=groups, **options)

    return convolve, x, kernel


def results(convolve: Callable[[Any, Any], Any], x: jax.Array, kernel: jax.Array) -> list[Any]:
    """Return the map, and the gradients of the sum of its squares."""
    out, gradients = jax.vjp(convolve, x, kernel)
    return [out, *gradients(2 * out)]


@pytest.mark.parametrize("layout", range(3))
@pytest.mark.parametrize("case", CASES)
def test_the_numbers_are_those_of_the_convolution_jitted_and_not(case: str, layout: int) -> None:
    convolve, x, kernel = convolution(case, layout)
    expected = jax.jit(lambda *args: results(convolve, *args))(x, kernel)
    with as_products():
        found = {"jitted": jax.jit(lambda *args: results(convolve, *args))(x, kernel)}
        found["not"] = results(convolve, x, kernel)
    for how, arrays in found.items():
        for array, exact in zip(arrays, expected, strict=True):
            assert array.dtype == np.float64
            np.testing.assert_allclose(array, exact, rtol=1e-12, atol=1e-12, err_msg=how)


@pytest.mark.parametrize("case", CASES)
def test_forward_and_backward_are_without_loops(case: str) -> None:
    convolve, x, kernel = convolution(case, 0)
    with as_products():
        traced = jax.make_jaxpr(lambda *args: results(convolve, *args))(x, kernel)
    found = list(convolutions(traced.jaxpr))
    assert len(found) >= 3
    for equation in found:
        params, kernel_shape = equation.params, equation.invars[1].aval.shape
        numbers = params["dimension_numbers"].rhs_spec
        sizes = [kernel_shape[axis] for axis in numbers[2:]]
        assert len(sizes) == 2
        assert set(params["lhs_dilation"]) == {1}
        for size, dilation, padding in zip(sizes, params["rhs_dilation"], params["padding"], strict=True):
            assert min(padding) >= 0
            assert sum(padding) <= (size - 1) * dilation
        groups = params["feature_group_count"]
        assert groups == 1 or (kernel_shape[numbers[1]] == 1 and kernel_shape[numbers[0]] == groups)


def convolutions(jaxpr: Any) -> Iterator[Any]:
    """Yield the convolutions of a program, and of those within."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "conv_general_dilated":
            yield equation
        for body in bodies_of(equation):
            yield from convolutions(body)


def test_below_float64_and_afterwards_they_stay_as_they_are() -> None:
    convolve, x, kernel = convolution("groups", 0)
    with jax.enable_x64(False), as_products():
        low = jax.make_jaxpr(convolve)(x.astype(np.float32), kernel.astype(np.float32))
    for traced in (low, jax.make_jaxpr(convolve)(x, kernel)):
        assert [equation.primitive.name for equation in traced.jaxpr.eqns] == ["conv_general_dilated"]
        assert traced.jaxpr.eqns[0].params["feature_group_count"] == 3
