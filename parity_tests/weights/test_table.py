"""The weight table: names, layouts and shapes of the layer, and how a layer is recognised."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from outlook_common.arrays import BFLOAT16
from outlook_common.weights import (
    Entry,
    WeightsError,
    WeightTable,
    resolve,
    table_for,
)
from outlook_common.weights.identify import recognise
from outlook_common.weights.tables.base import linear_entries
from parity_tests.weights.layers import (
    TABLE,
    assert_same_bits,
    jax_layer,
    renamed,
    torch_layer,
)


def test_table_lists_the_torch_twins_state_dict_in_its_order() -> None:
    state = torch_layer().state_dict()
    assert [(entry.torch, entry.shape) for entry in TABLE.entries] == [(k, tuple(v.shape)) for k, v in state.items()]


def test_table_lists_the_jax_twins_paths_and_shapes() -> None:
    state = nnx.to_flat_state(nnx.state(jax_layer(), nnx.Param))
    found = {".".join(map(str, path)): variable.get_value().shape for path, variable in state}
    assert found == {entry.flax: entry.flax_shape for entry in TABLE.entries}


def test_conv_layout_turns_pytorchs_oihw_into_flaxs_hwio_and_back() -> None:
    entry = Entry("stem.weight", "stem.kernel", (2, 3, 4, 5), "conv")
    kernel = np.random.default_rng(0).standard_normal(entry.shape)
    turned = entry.to_flax(kernel)
    assert turned.shape == entry.flax_shape == (4, 5, 3, 2)
    assert turned[3, 2, 1, 0] == kernel[0, 1, 3, 2]
    assert np.array_equal(entry.to_torch(turned), kernel)


def test_layout_needs_its_number_of_axes() -> None:
    with pytest.raises(ValueError, match=r"w: layout 'conv' has 4 axes, its shape is \(2, 3\)"):
        Entry("w", "w", (2, 3), "conv")


@pytest.mark.parametrize(
    ("entries", "aliases", "words"),
    [
        ([("a", "x"), ("a", "y")], {}, "torch"),
        ([("a", "x"), ("b", "x")], {}, "flax"),
        ([("a", "x"), ("b", "y")], {"other": {"b": "a"}}, "other"),
        ([("a", "x"), ("b", "y")], {"other": {"c": "a", "d": "a"}}, "two aliases of other"),
        ([("a", "x")], {"other": {"c": "z"}}, "unknown"),
    ],
)
def test_table_refuses_names_that_are_not_unique(
    entries: list[tuple[str, str]], aliases: dict[str, dict[str, str]], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        WeightTable("model", tuple(Entry(name, path, (1,)) for name, path in entries), aliases)


@settings(max_examples=50)
@given(
    st.lists(
        st.tuples(st.from_regex(r"[a-z]{1,4}(\.[0-9])?", fullmatch=True), st.integers(1, 4), st.integers(1, 4)),
        unique_by=lambda entry: entry[0],
        min_size=1,
        max_size=6,
    ),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_any_table_survives_torch_to_flax_to_torch(layers: list[tuple[str, int, int]], bias: bool, seed: int) -> None:
    table = WeightTable("model", sum((linear_entries(*layer, bias=bias) for layer in layers), ()))
    rng = np.random.default_rng(seed)
    weights = {entry.torch: rng.standard_normal(entry.shape) for entry in table.entries}
    flax = renamed(weights, table, "flax")
    assert {name: array.shape for name, array in flax.items()} == {e.flax: e.flax_shape for e in table.entries}
    assert_same_bits(resolve(flax, table), weights)


def test_config_of_an_unknown_model_is_an_error() -> None:
    with pytest.raises(TypeError, match="no weight table for dict; known: OutlookAttentionConfig"):
        table_for({})


def test_heads_are_inferred_from_shapes_only_if_unambiguous() -> None:
    def shapes(dim: int, features: int) -> dict[str, tuple[int, ...]]:
        return {"v.weight": (dim, dim), "attn.bias": (features,), "proj.bias": (dim,)}

    only = recognise(shapes(192, 6 * 81))
    assert only is not None
    assert only.sizes == {"dim": 192, "attn_features": 486, "qkv_bias": False, "num_heads": 6, "window_places": 9}
    # 81 * 81 weights are 81 heads of one place, or one head of 81, or nine heads' worth of 27.
    several = recognise(shapes(81, 81 * 81))
    assert several is not None
    assert several.sizes.keys() == {"dim", "attn_features", "qkv_bias"}


COUNTED = WeightTable("counted", (Entry("count", "count", (), dtype="int64"),))


def test_counter_keeps_its_own_dtype_and_takes_no_fractions() -> None:
    found = resolve({"count": jnp.asarray(7, jnp.int32)}, COUNTED)
    assert found["count"].dtype == np.int64
    assert found["count"] == 7
    for wrong in (np.float32(7.0), np.asarray(7.0, BFLOAT16), np.asarray(True)):
        with pytest.raises(WeightsError, match="expected integers"):
            resolve({"count": wrong}, COUNTED)
