"""The shared bicubic interpolation against PyTorch's."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from outlook_common.interpolation import bicubic_matrix, resize_map
from parity_tests.support.runners import relative_error

# Of `pos_embed`: from 224 pixels to the released 384, 448 and 512, back, and to maps of other shapes.
RESIZINGS = [
    ((14, 14), (24, 24)),
    ((14, 14), (28, 28)),
    ((14, 14), (32, 32)),
    ((32, 32), (14, 14)),
    ((14, 14), (7, 20)),
    ((3, 5), (11, 2)),
    ((1, 2), (6, 1)),
]


def torch_resized(x: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    channels_first = torch.from_numpy(x).permute(0, 3, 1, 2)
    return F.interpolate(channels_first, size=size, mode="bicubic").permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize(("size", "new_size"), RESIZINGS, ids=str)
def test_resized_maps_equal_pytorchs_in_float64(size: tuple[int, int], new_size: tuple[int, int]) -> None:
    x = np.random.default_rng(0).standard_normal((2, *size, 5))
    assert relative_error(resize_map(x, new_size), torch_resized(x, new_size)) <= 1e-12


@settings(max_examples=60)
@given(sizes=st.tuples(*[st.integers(1, 40)] * 4), seed=st.integers(0, 99))
def test_any_resizing_equals_pytorchs(sizes: tuple[int, int, int, int], seed: int) -> None:
    x = np.random.default_rng(seed).standard_normal((1, sizes[0], sizes[1], 2))
    assert relative_error(resize_map(x, sizes[2:]), torch_resized(x, sizes[2:])) <= 1e-12


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_low_precision_is_resized_in_float64_and_rounded_once(dtype: type) -> None:
    x = np.random.default_rng(1).standard_normal((1, 14, 14, 8)).astype(dtype)
    exact = torch_resized(x.astype(np.float64), (24, 24))
    resized = resize_map(x, (24, 24))
    assert resized.dtype == dtype
    np.testing.assert_array_equal(resized, exact.astype(dtype))


def test_a_map_of_the_right_size_is_left_as_it_is() -> None:
    x = np.random.default_rng(2).standard_normal((1, 4, 6, 3))
    assert resize_map(x, (4, 6)) is x
    np.testing.assert_array_equal(bicubic_matrix(9, 9), np.eye(9))


def test_a_constant_map_stays_constant() -> None:
    np.testing.assert_allclose(bicubic_matrix(14, 31).sum(axis=1), 1, rtol=1e-14)


@pytest.mark.parametrize("sizes", [(0, 4), (4, 0)])
def test_sizes_below_one_are_an_error_with_both_numbers(sizes: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"at least 1, got {sizes[0]} and {sizes[1]}"):
        bicubic_matrix(*sizes)
