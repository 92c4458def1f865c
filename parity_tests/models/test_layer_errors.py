"""Bad input: the same exception with the same words from both twins, with the numbers in it."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import outlook_jax
import outlook_torch
from outlook_common import window_grid
from outlook_common.dispatch import Implementation, choose
from outlook_common.text import closest

pytestmark = pytest.mark.unchecked

VALUE, LOGITS = (2, 6, 5, 3, 4), (2, 6, 5, 3, 9, 9)


def torch_op(value: tuple, logits: tuple, mask: tuple | None, dtypes: dict[str, str], **arguments: Any) -> None:
    operands = {
        name: None if shape is None else torch.ones(shape, dtype=getattr(torch, dtypes.get(name, "float32")))
        for name, shape in (("value", value), ("logits", logits), ("dropout_mask", mask))
    }
    outlook_torch.outlook_attention(**operands, **arguments)


def jax_op(value: tuple, logits: tuple, mask: tuple | None, dtypes: dict[str, str], **arguments: Any) -> None:
    operands = {
        name: None if shape is None else jnp.ones(shape, dtypes.get(name, "float32"))
        for name, shape in (("value", value), ("logits", logits), ("dropout_mask", mask))
    }
    outlook_jax.outlook_attention(**operands, **arguments)


def torch_layer(shape: tuple | None = None, **arguments: Any) -> None:
    layer = outlook_torch.OutlookAttention(**arguments)
    if shape is not None:
        layer(torch.ones(shape))


def jax_layer(shape: tuple | None = None, **arguments: Any) -> None:
    layer = outlook_jax.OutlookAttention(**arguments, rngs=nnx.Rngs(0))
    if shape is not None:
        layer(jnp.ones(shape))


def assert_same_error(
    runs: tuple[Callable, Callable], kind: type[Exception], words: str, *args: Any, **kw: Any
) -> None:
    messages = []
    for run in runs:
        with pytest.raises(kind, match=words) as caught:
            run(*args, **kw)
        assert caught.type is kind
        # PyTorch has one implementation more to list.
        messages.append(str(caught.value).replace("'triton', ", "").replace("'pallas', ", ""))
    assert messages[0] == messages[1]


@pytest.mark.parametrize(
    ("value", "logits", "mask", "dtypes", "arguments", "kind", "words"),
    [
        ((5, 3, 4), LOGITS, None, {}, {}, ValueError, r"\(\*B, H, W, N, D\), got 3 axes: \(5, 3, 4\)"),
        (VALUE[1:], LOGITS, None, {}, {}, ValueError, r"= \(6, 5, 3, 9, 9\) for value.*got \(2, 6, 5, 3, 9, 9\)"),
        ((2, *VALUE), (3, *LOGITS), None, {}, {}, ValueError, r"= \(2, 2, 6, .* got \(3, 2, 6, 5, 3, 9, 9\)"),
        ((2, *VALUE), (2, *LOGITS), LOGITS, {}, {}, ValueError, r"the shape of logits, \(2, 2, .* got \(2, 6, 5"),
        (VALUE, (2, 6, 5, 9, 9), None, {}, {}, ValueError, r"= \(2, 6, 5, 3, 9, 9\) for value"),
        (VALUE, LOGITS, None, {}, {"stride": 2}, ValueError, r"= \(2, 3, 3, 3, 9, 9\).*got \(2, 6, 5, 3, 9, 9\)"),
        (VALUE, (2, 6, 5, 3, 9, 8), None, {}, {}, ValueError, r"got \(2, 6, 5, 3, 9, 8\)"),
        (VALUE, (3, 6, 5, 3, 9, 9), None, {}, {}, ValueError, r"got \(3, 6, 5, 3, 9, 9\)"),
        (VALUE, LOGITS, (1, 6, 5, 3, 9, 9), {}, {}, ValueError, r"dropout_mask must have the shape of logits"),
        ((2, 0, 5, 3, 4), LOGITS, None, {}, {}, ValueError, r"map's size must be at least 1, got \(0, 5\)"),
        (VALUE, LOGITS, None, {"value": "int32"}, {}, TypeError, "value must be one of float16.*got int32"),
        (VALUE, LOGITS, None, {"logits": "complex64"}, {}, TypeError, "logits must be one of .* got complex64"),
        (VALUE, LOGITS, LOGITS, {"dropout_mask": "bool"}, {}, TypeError, "dropout_mask must be one of .* got bool"),
        (VALUE, LOGITS, None, {}, {"padding": 0}, ValueError, "hold 4 windows.*=6; padding=1 would fit"),
        (
            VALUE,
            LOGITS,
            None,
            {},
            {"padding": (1, 3)},
            ValueError,
            r"columns: 5 columns.* hold 9 .*=5; padding=1",
        ),
        (
            VALUE,
            LOGITS,
            None,
            {},
            {"kernel_size": 2},
            ValueError,
            "no padding fits; kernel_size=3 with padding=1",
        ),
        (VALUE, LOGITS, None, {}, {"kernel_size": 9, "padding": 0}, ValueError, "hold 0 windows.*padding=4 would fit"),
        (VALUE, LOGITS, None, {}, {"kernel_size": 0}, ValueError, "kernel_size must be at least 1, got 0"),
        (VALUE, LOGITS, None, {}, {"stride": -1}, ValueError, "stride must be at least 1, got -1"),
        (VALUE, LOGITS, None, {}, {"padding": (0, -1)}, ValueError, r"padding must be at least 0, got \(0, -1\)"),
        (VALUE, LOGITS, None, {}, {"kernel_size": 3.0}, TypeError, "kernel_size must be an int or a pair.* got 3.0"),
        (VALUE, LOGITS, None, {}, {"stride": (1, 2, 3)}, TypeError, r"stride must be .* got \(1, 2, 3\)"),
        (VALUE, LOGITS, None, {}, {"implementation": "refrence"}, ValueError, "'refrence'; known: .*mean 'reference'"),
        (VALUE, LOGITS, None, {}, {"implementation": ()}, ValueError, "implementation is an empty sequence"),
    ],
)
def test_the_op_says_what_does_not_fit(
    value: tuple, logits: tuple, mask: tuple, dtypes: dict, arguments: dict, kind: type[Exception], words: str
) -> None:
    assert_same_error((torch_op, jax_op), kind, words, value, logits, mask, dtypes, **arguments)


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        ({"dim": 192, "num_heads": 5}, ValueError, "192 % 5 = 2; num_heads=4 or num_heads=6 would divide it"),
        ({"dim": 4, "num_heads": 6}, ValueError, "4 % 6 = 4; num_heads=4 would divide it"),
        ({"dim": 0}, ValueError, "at least 1, got dim=0, num_heads=1"),
        ({"dim": 8, "num_heads": 0}, ValueError, "at least 1, got dim=8, num_heads=0"),
        ({"dim": 8, "kernel_size": (3, 0)}, ValueError, r"kernel_size must be at least 1, got \(3, 0\)"),
        ({"dim": 8, "attn_drop": 1.5}, ValueError, "attn_drop must be a rate between 0 and 1, got 1.5"),
        ({"dim": 8, "proj_drop": -0.1}, ValueError, "proj_drop must be a rate between 0 and 1, got -0.1"),
        ({"dim": 8, "shape": (4, 8)}, ValueError, r"\(\*B, H, W, C\).* got 2 axes: \(4, 8\)"),
        ({"dim": 8, "shape": (2, 4, 4, 9)}, ValueError, r"dim=8 channels on its last axis, got shape \(2, 4, 4, 9\)$"),
        ({"dim": 8, "shape": (2, 8, 4, 4)}, ValueError, "axis 1 is 8: is the input channels first"),
        ({"dim": 8, "shape": (8, 4, 4)}, ValueError, "axis 0 is 8: is the input channels first"),
        ({"dim": 8, "padding": 0, "shape": (2, 4, 4, 8)}, ValueError, "hold 2 windows.*padding=1 would fit"),
        ({"dim": 8, "implementation": "none", "shape": (2, 4, 4, 8)}, ValueError, "unknown implementation 'none'"),
    ],
)
def test_the_layer_says_what_does_not_fit(arguments: dict, kind: type[Exception], words: str) -> None:
    assert_same_error((torch_layer, jax_layer), kind, words, **arguments)


@pytest.mark.parametrize(
    ("implementation", "words"),
    [
        ("refrence", "unknown implementation 'refrence'; known: .*; did you mean 'reference'"),
        (("reference", "none"), "unknown implementation 'none'; known: .*'composite', 'reference'$"),
        ((), "implementation is an empty sequence; known: "),
    ],
)
def test_an_implementation_that_does_not_exist_shows_when_the_layer_is_made(implementation: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        outlook_torch.OutlookAttention(8, implementation=implementation)
    with pytest.raises(ValueError, match=words):
        outlook_jax.OutlookAttention(8, implementation=implementation, rngs=nnx.Rngs(0))


def test_the_padding_an_error_names_does_fit() -> None:
    named = 0
    for size, kernel, stride, padding in np.ndindex(9, 6, 4, 4):
        size, kernel, stride = size + 1, kernel + 1, stride + 1
        try:
            window_grid((size, size), kernel, stride, padding)
        except ValueError as error:
            remedy = str(error).rsplit("; ", 1)[1]
            numbers = {part.split("=")[0]: int(part.split("=")[1]) for part in remedy.split() if "=" in part}
            grid = window_grid((size, size), numbers.get("kernel_size", kernel), stride, numbers["padding"])
            assert grid.grid == (-(-size // stride),) * 2
            named += 1
    assert named > 100


class TestChoice:
    """Which implementation runs, and what is said when none can."""

    TABLE = {  # noqa: RUF012
        "fast": Implementation(lambda x: f"fast {x}", lambda x: "it needs a GPU" if x < 1 else None),
        "small": Implementation(lambda x: f"small {x}", lambda x: f"x={x} is odd" if x % 2 else None),
        "plain": Implementation(lambda x: f"plain {x}", lambda x: "it is negative" if x < 0 else None),
    }

    @pytest.mark.parametrize(
        ("requested", "x", "ran"),
        [
            (None, 1, "fast 1"),
            (None, 0, "small 0"),
            ("plain", 1, "plain 1"),
            (("small", "plain"), 3, "plain 3"),
            (["plain", "fast"], 3, "plain 3"),
        ],
    )
    def test_the_first_that_can_run_is_chosen(self, requested: Any, x: int, ran: str) -> None:
        assert choose(requested, self.TABLE, x)(x) == ran

    @pytest.mark.parametrize("requested", ["fast", ("fast",)])
    def test_one_that_cannot_run_says_why(self, requested: Any) -> None:
        with pytest.raises(NotImplementedError, match="'fast' cannot run here: it needs a GPU"):
            choose(requested, self.TABLE, 0)

    @pytest.mark.parametrize("requested", [None, ("fast", "small", "plain")])
    def test_several_that_cannot_run_say_why_together(self, requested: Any) -> None:
        with pytest.raises(ExceptionGroup, match="no requested implementation can run here") as caught:
            choose(requested, self.TABLE, -1)
        assert [type(e) for e in caught.value.exceptions] == [NotImplementedError] * 3
        assert [str(e).rsplit(": ", 1)[1] for e in caught.value.exceptions] == [
            "it needs a GPU",
            "x=-1 is odd",
            "it is negative",
        ]


@pytest.mark.parametrize(
    ("name", "known", "expected"),
    [
        ("volo_d1", ("volo_d1_224", "volo_d5_224"), "volo_d1_224"),
        ("volo_d", ("volo_d1", "volo_d5"), "volo_d1"),  # equally near: the first
        ("resnet", ("volo_d1", "volo_d5"), None),
        ("anything", (), None),
    ],
)
def test_the_nearest_known_name_is_suggested(name: str, known: tuple[str, ...], expected: str | None) -> None:
    assert closest(name, known) == expected
