"""Loading weights in JAX leaves every variable where it was, and free to move if it was free."""

from pathlib import Path
from typing import Any

import jax
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import outlook_jax
from outlook_common.config import volo_config
from outlook_common.weights import write_arrays
from parity_tests.support.volo import draw_weights

SIZES: dict[str, Any] = {"layers": (1, 1, 1, 1), "embed_dims": (12, 24, 24, 24), "num_heads": (2, 4, 4, 4)}


def arrays(module: nnx.Module) -> dict[str, jax.Array]:
    state = nnx.to_flat_state(nnx.state(module, (nnx.Param, nnx.BatchStat, nnx.OptState)))
    return {".".join(map(str, path)): variable.get_value() for path, variable in state}


def a_layer() -> outlook_jax.OutlookAttention:
    return outlook_jax.OutlookAttention(12, num_heads=2, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("placed", [False, True], ids=["nowhere-in-particular", "on-a-mesh"])
def test_a_loaded_layer_and_its_optimizer_are_where_they_were(placed: bool, tmp_path: Path) -> None:
    layer = a_layer()
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    if placed:
        nnx.update(layer, jax.device_put(nnx.state(layer), NamedSharding(mesh, PartitionSpec())))
    optimizer = nnx.Optimizer(layer, optax.adamw(1e-3), wrt=nnx.Param)
    before = {name: (array.committed, array.sharding) for name, array in (arrays(layer) | arrays(optimizer)).items()}
    outlook_jax.save_training(layer, optimizer, tmp_path / "training.safetensors")
    outlook_jax.load_training(layer, optimizer, tmp_path / "training.safetensors")
    after = {name: (array.committed, array.sharding) for name, array in (arrays(layer) | arrays(optimizer)).items()}
    assert after == before
    assert after["v.kernel"][0] == placed
    assert len(after) >= 15


def test_a_pretrained_model_is_placed_nowhere_in_particular(tmp_path: Path) -> None:
    sizes = SIZES | {"img_size": 32, "stem_hidden_dim": 6, "num_classes": 5}
    write_arrays(tmp_path / "volo.safetensors", draw_weights(volo_config("volo_d1_224", **sizes)))
    with pytest.warns(UserWarning, match="start with fresh weights"):
        loaded = outlook_jax.from_pretrained(
            tmp_path / "volo.safetensors", variant="volo_d1_224", **sizes | {"num_classes": 3}
        )
    assert not [name for name, array in arrays(loaded).items() if array.committed]
