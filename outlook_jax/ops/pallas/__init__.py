"""Outlook attention in one pass of Mosaic kernels, for TPUs: softmax, merged weights, weighted sum and fold."""

from outlook_common.dispatch import Implementation
from outlook_jax.ops.pallas.attend import pallas, pallas_or_composite, pallas_or_reference
from outlook_jax.ops.pallas.interpret import interpreted, on_tpu_or_interpreted
from outlook_jax.ops.pallas.limits import refusal

PALLAS = Implementation(run=pallas, refusal=refusal)

__all__ = ["PALLAS", "interpreted", "on_tpu_or_interpreted", "pallas_or_composite", "pallas_or_reference"]
