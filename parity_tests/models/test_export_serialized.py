"""`jax.export` of programs that take the model's weights as an argument, through a file."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from outlook_jax import linen
from parity_tests.support.runners import relative_error
from parity_tests.support.volo import draw_images, draw_weights, jax_logits, jax_volo, last, small_config

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.mark.unchecked  # a symbol is no int
def test_a_serialized_program_takes_any_weights_and_any_batch() -> None:
    config = small_config()
    module = linen.VOLO(config, param_dtype="float64")
    models = [jax_volo(config, draw_weights(config, seed), deterministic=True) for seed in (1, 2)]
    (batch,) = jax.export.symbolic_shape("batch")
    shape = jax.ShapeDtypeStruct((batch, 32, 32, 3), jnp.float64)
    platforms = ("cpu", "cuda", "tpu")
    exported = jax.export.export(jax.jit(module.apply), platforms=platforms)(linen.variables_of(models[0]), shape)
    program = jax.export.deserialize(exported.serialize())
    assert program.platforms == platforms
    for size, model in zip((1, 5), models, strict=True):
        images = last(draw_images(config, batch=size))
        logits = np.asarray(program.call(linen.variables_of(model), images))
        assert relative_error(logits, jax_logits(model, images)) <= 1e-12
