"""The types and shapes of signatures are checked in these tests, by whichever of two hooks a module has."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from beartype import beartype
from beartype.roar import BeartypeCallHintParamViolation
from jaxtyping import TypeCheckError, jaxtyped

from outlook_common.flops import multiply_adds
from outlook_common.mixing import cutmix_box
from outlook_common.volo import take_indices
from outlook_jax.losses import soft_target_cross_entropy as jax_loss
from outlook_parity.api import verify
from outlook_parity.core.request import round_to
from outlook_torch.losses import soft_target_cross_entropy as torch_loss
from parity_tests.support.type_checks import once


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        pytest.param(lambda: multiply_adds("volo_d1_224"), BeartypeCallHintParamViolation, id="outlook_common"),
        pytest.param(lambda: cutmix_box((8, 8), "half", np.random.default_rng()), TypeCheckError, id="its shapes"),
        pytest.param(lambda: round_to([1.0], "float32"), BeartypeCallHintParamViolation, id="outlook_parity"),
        pytest.param(lambda: take_indices(4, ("1", *[1] * 99)), BeartypeCallHintParamViolation, id="the first item"),
        pytest.param(lambda: verify(1, 2, 3, steps="three"), TypeCheckError, id="its names for types alone"),
        pytest.param(lambda: jax_loss(jnp.ones((2, 3)), jnp.ones((2, 4))), TypeCheckError, id="outlook_jax"),
        pytest.param(lambda: torch_loss(torch.ones(2, 3), torch.ones(2, 4)), TypeCheckError, id="outlook_torch"),
    ],
)
def test_a_wrong_argument_is_refused(wrong: Callable[[], Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        wrong()


@pytest.mark.parametrize(
    ("decorator", "error"),
    [
        pytest.param(beartype, BeartypeCallHintParamViolation, id="beartype"),
        pytest.param(partial(jaxtyped, typechecker=beartype), TypeCheckError, id="jaxtyping"),
    ],
)
def test_a_function_within_another_is_checked_as_first_made(decorator: Any, error: type[Exception]) -> None:
    """Made again it is left alone: to decorate it takes a millisecond each time."""
    checked = once(decorator)

    def make() -> Callable[[Any], Any]:
        @checked()
        def inner(number: int) -> int:
            return number

        return inner

    first, second = make(), make()
    with pytest.raises(error):
        first("1")
    assert second("1") == "1"
