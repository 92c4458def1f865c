"""What works with neither framework: convert, inspect and compare weights."""

import json
import subprocess
from importlib.util import find_spec

import numpy as np

from outlook_common.weights import read_arrays, write_arrays

assert not any(find_spec(name) for name in ("torch", "jax", "flax", "orbax"))

DIM, PLACES = 6, 81
SHAPES = {
    "v.weight": (DIM, DIM),
    "attn.weight": (2 * PLACES, DIM),
    "attn.bias": (2 * PLACES,),
    "proj.weight": (DIM, DIM),
}
draw = np.random.default_rng(0).standard_normal
layer = {name: draw(shape).astype(np.float32) for name, shape in (SHAPES | {"proj.bias": (DIM,)}).items()}
write_arrays("layer.safetensors", layer)


def outlook(*arguments: str) -> str:
    return subprocess.run(["outlook", *arguments], check=True, stdout=subprocess.PIPE, text=True).stdout


assert "verify" in outlook("--help")
outlook("convert", "layer.safetensors", "layer.npz")  # names and layouts of Flax
flax = read_arrays("layer.npz")
np.testing.assert_array_equal(flax["v.kernel"], layer["v.weight"].T)
outlook("convert", "layer.npz", "back.safetensors")
back = read_arrays("back.safetensors")
assert back.keys() == layer.keys()
assert all(back[name].tobytes() == layer[name].tobytes() for name in layer)
assert len(json.loads(outlook("inspect", "layer.npz", "--json"))["tensors"]) == len(layer)
outlook("inspect", "layer.safetensors", "back.safetensors")  # compares them
