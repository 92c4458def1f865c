"""Rows of a report: one tensor compared, and one twin compared with itself. Imports no framework."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

Tensors = Mapping[str, np.ndarray]

Verdict = Literal["pass", "mismatch", "not-run"]

RowVerdict = Literal["pass", "zero", "skipped", "mismatch", "not-run"]

# The note of a row that is excused.
EXCUSED = "as large as rounding makes it: the true value is zero"

# What the notes of rows begin with that are skipped for a reason: by the user, or with evidence that it is no fault.
IGNORED, UNUSED, FROZEN = "ignored: ", "unused: ", "frozen: "

# What a note on outputs begins with that are not compared.
NOT_COMPARED = "not compared"

TWINS = ("torch", "jax")

# The view of a row of a module: each twin on its own input. Else the view is the twin whose input both were given.
PROPAGATED = "propagated"

# Ways of calling a twin again that change no output, unless it is not deterministic, keeps state, or mixes samples.
TWICE, REVERSED = "called twice", "batch reversed"


@dataclass(frozen=True)
class Noise:
    """A twin's error against the float64 truth, in units of rounding: eps of the dtype times the truth's own size."""

    rms: float
    max: float


@dataclass(frozen=True)
class Check:
    """One tensor compared.

    Attributes:
        level: "weights", "forward", "layers", "gradients", "training"; "again" for the same copies of the twins
            called once more; or "self-check" for what the verifier itself does.
        dtype: the precision that the twins computed in; "as given" for weights.
        name: the tensor under its torch name; of layers the module's path.
        verdict: "zero" if it is exactly zero in both twins, which is no evidence; "skipped" if only one twin has such
            a module, or has another shape there that leads to the same results, or for the reason in `note`.
        bound: the largest `measured` that passes.
        measured: in float64 and for weights the relative error max|torch - jax| / max|jax|; in lower precisions the
            factor between the twins' noises. None if it could not be measured: then `note` says why.
        torch_noise: of the PyTorch twin, in lower precisions.
        jax_noise: of the JAX twin, likewise.
        note: anything else, in words.
        metrics: of outputs and mismatches: other measures of the difference; see `compare.metrics.measure`.
        view: of a module: "propagated" if each twin has its own input; else the twin whose input both were given.
        excused: whether it passes although `measured` is above `bound`, because rounding alone can make it so.
    """

    level: str
    dtype: str
    name: str
    verdict: RowVerdict
    bound: float
    measured: float | None = None
    torch_noise: Noise | None = None
    jax_noise: Noise | None = None
    note: str = ""
    view: str = ""
    metrics: Mapping[str, float] | None = None
    excused: bool = False


@dataclass(frozen=True)
class SelfNoise:
    """How far a twin is from itself when the same copy of it is called again; part of no verdict.

    Attributes:
        twin: "torch" or "jax".
        dtype: what it computed in.
        how: "called twice" on the same inputs, or "batch reversed" and its outputs put back in order.
        measured: max|again - first| / max|first|, infinite where shapes differ.
        units: the same in units of rounding of the dtype.
    """

    twin: str
    dtype: str
    how: str
    measured: float
    units: float
