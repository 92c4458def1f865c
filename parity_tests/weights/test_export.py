"""Exporting weights: every bit, as copies, and only from unchanged models."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import outlook_torch
from parity_tests.weights.layers import (
    DIM,
    FLOATS,
    TWINS,
    WEIGHTS,
    assert_same_bits,
    both_twins,
    layer_bits,
    layer_weights,
    torch_layer,
)


@pytest.mark.parametrize("dtype", FLOATS)
@both_twins
def test_load_and_export_keep_every_bit(twin: str, dtype: str) -> None:
    package, make = TWINS[twin]
    bits, layer = layer_bits(dtype), make(dtype)
    package.load_weights(layer, bits)
    assert_same_bits(package.export_weights(layer), bits)


@both_twins
def test_models_with_replaced_parts_are_refused_and_unchanged(twin: str) -> None:
    package, make = TWINS[twin]
    layer = make()
    layer.proj = torch.nn.Linear(DIM, 5) if twin == "torch" else nnx.Linear(DIM, 5, rngs=nnx.Rngs(0))
    layer.gain = torch.nn.Parameter(torch.ones(3)) if twin == "torch" else nnx.Param(jnp.ones(3))
    before = layer.v.weight.detach().clone() if twin == "torch" else layer.v.kernel[...]
    # Names of the first few, those of another shape first.
    match = rf"not those of its configuration \(proj\.\w+ is .*5.*, not .*; proj\.bias is \(5,\), not \({DIM},\)"
    for call in (lambda: package.load_weights(layer, layer_weights()), lambda: package.export_weights(layer)):
        with pytest.raises(TypeError, match=match + "; gain is unexpected"):
            call()
    assert (before == (layer.v.weight if twin == "torch" else layer.v.kernel[...])).all()


def test_a_compiled_model_is_refused() -> None:
    with pytest.raises(TypeError, match=r"weight is missing; .*: pass it as it was made, not compiled"):
        outlook_torch.export_weights(torch.compile(torch_layer(), backend="eager"))


@both_twins
def test_exported_weights_are_copies(twin: str) -> None:
    package, make = TWINS[twin]
    layer = make()
    package.load_weights(layer, WEIGHTS)
    for array in package.export_weights(layer).values():
        array[...] = -1
    assert_same_bits(package.export_weights(layer), WEIGHTS)


def test_a_sharded_model_is_exported_whole(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        layer = torch_layer()
        fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))
        whole = get_model_state_dict(layer, options=StateDictOptions(full_state_dict=True))
        exported = outlook_torch.export_weights(layer)
        assert exported.keys() == whole.keys()
        for name, array in exported.items():
            np.testing.assert_array_equal(array, whole[name].numpy())
        outlook_torch.load_weights(torch_layer(), whole)
    finally:
        torch.distributed.destroy_process_group()
