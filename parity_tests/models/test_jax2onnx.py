"""The JAX twin exported by jax2onnx and run by ONNX Runtime."""

from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import outlook_jax
from parity_tests.support.runners import relative_error
from parity_tests.support.volo import small_config

pytestmark = [
    pytest.mark.skipif(
        not all(find_spec(name) for name in ("jax2onnx", "onnxruntime")),
        reason="not run: jax2onnx and onnxruntime are not installed",
    ),
    pytest.mark.unchecked,
    # Of jax2onnx's own.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


@pytest.fixture(autouse=True)
def _in_float32() -> Any:
    with jax.enable_x64(False):
        yield


def assert_exports(model: Any, shape: tuple[int, ...]) -> None:
    import onnxruntime
    from jax2onnx import to_onnx

    program = to_onnx(model, [jax.ShapeDtypeStruct(shape, jnp.float32)], return_mode="proto")
    session = onnxruntime.InferenceSession(program.SerializeToString(), providers=["CPUExecutionProvider"])
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    (out,) = session.run(None, {session.get_inputs()[0].name: x})
    expected = np.asarray(model(x))
    assert out.shape == expected.shape
    assert relative_error(out, expected) <= 1e-5


@pytest.mark.parametrize("arguments", [{}, {"stride": 2}, {"stride": (3, 1), "kernel_size": (5, 3), "padding": (2, 1)}])
def test_the_layer_exports(arguments: dict[str, Any]) -> None:
    options = {"implementation": "reference", "deterministic": True, "rngs": nnx.Rngs(0)}
    assert_exports(outlook_jax.OutlookAttention(24, 3, **arguments, **options), (2, 7, 9, 24))


def test_a_small_model_exports_block_by_block() -> None:
    options = {"implementation": "reference", "scan_layers": False, "deterministic": True, "rngs": nnx.Rngs(0)}
    assert_exports(outlook_jax.VOLO(small_config(), **options), (2, 32, 32, 3))
