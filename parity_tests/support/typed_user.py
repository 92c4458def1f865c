"""A user's program, never run: mypy and pyright find these types by the packages' `py.typed` and annotations."""

from typing import Literal, assert_type

import jax
import numpy as np
import torch
from flax import nnx

import outlook_common
import outlook_jax
import outlook_parity
import outlook_torch
from outlook_common.weights import Conversion, Inspection, WeightsError, convert, inspect


def op(torch_x: torch.Tensor, jax_x: jax.Array) -> None:
    assert_type(outlook_torch.outlook_attention(torch_x, torch_x, stride=2), torch.Tensor)
    assert_type(outlook_jax.outlook_attention(jax_x, jax_x, kernel_size=(3, 5), implementation="composite"), jax.Array)


def layers(jax_x: jax.Array) -> None:
    torch_layer = outlook_torch.OutlookAttention(24, 2, device="cpu")
    assert_type(torch_layer, outlook_torch.OutlookAttention)
    jax_layer = outlook_jax.OutlookAttention(24, num_heads=2, rngs=nnx.Rngs(0))
    assert_type(jax_layer(jax_x), jax.Array)
    assert_type(jax_layer.config, outlook_common.OutlookAttentionConfig)


def models(images: jax.Array) -> None:
    assert_type(outlook_torch.volo("volo_d1_224", img_size=64), outlook_torch.VOLO)
    model = outlook_jax.volo("volo_d1_224", rngs=nnx.Rngs(0), scan_layers=False)
    assert_type(model, outlook_jax.VOLO)
    assert_type(model.forward_features(images), jax.Array)
    assert_type(outlook_jax.from_pretrained("volo_d1_224.safetensors", num_classes=5), outlook_jax.VOLO)
    assert_type(outlook_torch.from_pretrained("volo_d1_224.safetensors"), outlook_torch.VOLO)


def weights(torch_model: outlook_torch.VOLO, jax_model: outlook_jax.VOLO) -> None:
    exported = outlook_torch.export_weights(torch_model)
    assert_type(exported, dict[str, np.ndarray])
    try:
        outlook_jax.load_weights(jax_model, exported, prefix="")
        outlook_torch.load_weights(torch_model, "volo.safetensors", use_ema=True)
        outlook_jax.save_weights(jax_model, "volo.npz")
    except WeightsError as error:
        assert_type(str(error), str)
    assert_type(convert("volo.pth", "volo.safetensors", dtype="bfloat16"), Conversion)
    assert_type(inspect("volo.pth"), Inspection)


def parity(torch_model: torch.nn.Module, jax_model: nnx.Module, images: np.ndarray) -> None:
    outlook_parity.load_torch_weights(jax_model, torch_model)
    report = outlook_parity.verify(torch_model, jax_model, images, levels=("forward", "gradients"), dtypes=("float64",))
    assert_type(report, outlook_parity.Report)
    assert_type(report.verdict, Literal["pass", "mismatch", "not-run"])
    assert_type(report.cause, str | None)
    report.to_html("report.html")


def misspelt() -> None:
    outlook_jax.load_weight  # type: ignore[attr-defined]  # noqa: B018
    outlook_torch.OutlookAttention("24")  # type: ignore[arg-type]
