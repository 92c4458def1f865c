"""Causes told from the operations of both twins: on a decoder that is written by hand."""

import itertools
from typing import Any, Literal

import numpy as np
import pytest

from outlook_parity import verify
from parity_tests.support.decoder import LENGTH, ids, twins

pytestmark = pytest.mark.usefixtures("quick_compilation")

# What one twin does otherwise, where the report must place it, and what it must say, with the numbers of both.
FAULTS: dict[str, tuple[dict[str, Any], str, tuple[str, ...]]] = {
    "eps": ({"eps": 1e-3}, "blocks.0.norm1", ("eps", "0.001", "1e-06")),
    "weight of the norm": ({"offset": 1.0}, "blocks.0.norm1", ("weight of the norm", "1 + weight")),
    "base of RoPE": ({"base": 500.0}, "blocks.0.attn", ("rotary base", "500", "10000")),
    "layout of RoPE": ({"layout": "pairs"}, "blocks.0.attn", ("rotary layout", "interleaved", "in halves")),
    "scale": ({"scale": 0.25}, "blocks.0.attn", ("attention scale", "0.25", "0.5")),
    "heads": ({"head": 8}, "blocks.0.attn", ("channels per head", "8", "4")),
    "window": ({"window": LENGTH - 2}, "blocks.0.attn", ("attention mask", "window of 4", "causal")),
    "order of heads": ({"repeat": "tile"}, "blocks.0.attn", ("order of repeated heads", "0, 0", "0, 1")),
    "GELU": ({"activation": "gelu"}, "blocks.0.mlp", ("activation", "GELU (exact)", "SiLU")),
    "quick GELU": ({"activation": "quick"}, "blocks.0.mlp", ("activation", "quick", "SiLU")),
    "ReLU": ({"activation": "relu"}, "blocks.0.mlp", ("activation", "ReLU", "SiLU")),
    "an unknown activation": ({"activation": "own"}, "blocks.0.mlp", ("activation", "f(-1)", "SiLU")),
    "a factor": ({"factor": 0.25}, "blocks.0", ("multiplies by 0.25", "by nothing")),
    "positions": ({"types": 1}, "(model)", ("positions begin at", "1, 2, … 6", "0, 1, … 5")),
}


# Each in one twin, and in the other one too among the slow tests.
CASES = [
    pytest.param(fault, twin, marks=() if twin == quick else pytest.mark.slow(reason="a verification for each fault"))
    for fault, quick in zip(FAULTS, itertools.cycle(("jax", "torch")), strict=False)
    for twin in ("jax", "torch")
]


@pytest.mark.parametrize(("fault", "twin"), CASES)
def test_what_one_twin_computes_otherwise_is_named(fault: str, twin: Literal["torch", "jax"]) -> None:
    choices, path, words = FAULTS[fault]
    report = verify(*twins(twin, **choices), ids(), levels=("forward", "layers"), dtypes=("float64",))
    assert report.verdict == "mismatch"
    assert report.first_divergence == path, report.cause
    for word in words:
        assert word in str(report.cause)


def test_what_shows_in_longer_sequences_alone_is_found_and_named() -> None:
    report = verify(*twins(window=LENGTH + 2), ids(), levels=("forward",), dtypes=("float64",))
    assert report.verdict == "mismatch"
    assert {row.name for row in report.checks if row.verdict == "mismatch"} == {"twice as long: output"}
    assert report.first_divergence == "blocks.0.attn"
    for word in ("twice as long", "attention mask", f"window of {LENGTH + 2}"):
        assert word in str(report.cause)


def test_a_size_that_a_model_refuses_is_skipped_with_its_words() -> None:
    report = verify(*twins(), np.tile(ids(), (1, 2)), levels=("forward",), dtypes=("float64",))
    assert report.verdict == "pass", str(report)
    (row,) = [row for row in report.checks if row.name.startswith("twice as long")]
    assert row.verdict == "skipped"
    assert "torch refuses" in row.note


def test_a_decoder_that_is_written_alike_passes() -> None:
    report = verify(*twins(), ids(), levels=("forward", "layers", "gradients"))
    assert report.verdict == "pass", str(report)
