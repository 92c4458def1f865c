"""What works with both frameworks: the verdict on the layer, from the command line and from Python."""

import json
import subprocess

import numpy as np
from flax import nnx

import outlook_jax
import outlook_parity
import outlook_torch

done = subprocess.run(
    ["outlook", "verify", "--model", "layer", "--json"], check=True, stdout=subprocess.PIPE, text=True
)
assert json.loads(done.stdout)["verdict"] == "pass"

torch_layer = outlook_torch.OutlookAttention(24, 2)
jax_layer = outlook_jax.OutlookAttention(24, 2, rngs=nnx.Rngs(0))
outlook_parity.load_torch_weights(jax_layer, torch_layer)
images = np.random.default_rng(0).standard_normal((2, 9, 7, 24))
report = outlook_parity.verify(torch_layer, jax_layer, images, levels=("forward", "gradients"))
assert report.verdict == "pass"
report.to_html("report.html")
