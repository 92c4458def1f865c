"""Dropout masks that both twins share."""

import numpy as np
import pytest

from outlook_parity.masks import Draws


def draw(shape: tuple[int, ...], rate: float = 0.25, seed: int = 0, before: int = 0) -> np.ndarray:
    draws = Draws(seed)
    for _ in range(before):
        draws.uniform((3,), "")
    return draws.mask(shape, rate, "")


def test_the_same_draw_of_a_step_is_the_same_and_others_are_not() -> None:
    shape = (40, 50)
    assert np.array_equal(draw(shape), draw(shape))
    assert not np.array_equal(draw(shape), draw(shape, before=1))
    assert not np.array_equal(draw(shape), draw(shape, seed=1))
    draws = Draws(0)
    first = draws.mask(shape, 0.25, "a")
    draws.mask(shape, 0.25, "b")
    draws.begin()
    assert np.array_equal(draws.mask(shape, 0.25, "a"), first)
    assert [drawn.where for drawn in draws.drawn] == ["a"]


def test_a_mask_drops_at_its_rate_and_keeps_the_mean() -> None:
    mask = draw((100, 100))
    assert set(np.unique(mask)) == {0.0, 1 / 0.75}
    assert mask.mean() == pytest.approx(1.0, abs=0.02)
    assert not draw((10, 10), rate=1.0).any()


@pytest.mark.parametrize("places", [(5, 5), (1, 5), (5, 1)], ids=str)
def test_masks_of_attention_are_the_same_in_either_order_of_the_places(places: tuple[int, int]) -> None:
    mask, other = draw((2, 3, *places)), draw((2, 3, *places[::-1]))
    assert np.array_equal(mask, other.swapaxes(-1, -2))
    assert len({row.tobytes() for row in mask.reshape(6, -1)}) > 3  # each head has its own
    outlook = draw((2, 3, 4, 2, 9, 9))
    assert not np.array_equal(outlook, outlook.swapaxes(-1, -2))
