"""The rows of a report: one tensor compared, and one twin compared with itself. Imports no framework."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["pass", "mismatch", "not-run"]

RowVerdict = Literal["pass", "zero", "skipped", "mismatch", "not-run"]

# The note of a row that is excused.
EXCUSED = "as large as rounding makes it: the true value is zero"

TWINS = ("torch", "jax")

# On whose input the numbers of a layer are, where it is not on that of one of the twins.
PROPAGATED = "propagated"

# The ways of calling a twin again that change nothing in its outputs, unless it is not deterministic, keeps state, or
# mixes the samples of a batch.
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
        level: "weights", "forward", "layers", "gradients", "training"; "again" of the same copies of the twins called
            once more; or "self-check" of what the verifier itself does.
        dtype: the precision that the twins computed in; "as given" for weights.
        name: the tensor under its torch name; of layers the module's path.
        verdict: "zero" if it is exactly zero in both twins: no difference, but no evidence either; "skipped" if only
            one twin has such a module, or another shape there, of which both make the same: no difference.
        bound: the largest `measured` that passes.
        measured: in float64 and for weights the relative error max|torch - jax| / max|jax|; in lower precisions the
            factor between the twins' noises. None if it could not be measured: then `note` says why.
        torch_noise: of the PyTorch twin, in lower precisions.
        jax_noise: of the JAX twin, likewise.
        note: in words.
        metrics: of outputs, and of what mismatches: how far apart the twins are; see `compare.metrics.measure`.
        view: of a layer, on whose input: "propagated", each twin's own; else the twin whose input both were given.
        excused: whether it passes although `measured` is above `bound`, as rounding alone can make it so.
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
