"""Verdicts on what the twins computed; arrays in, rows out. Imports no framework.

A hand-set tolerance hides bugs, so there is none for the lower precisions: there each twin's rounding error is measured
against the float64 truth, and what is judged is the factor between the two. Rounding is shared by both; a bug is not.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from outlook_parity.compare.metrics import measure
from outlook_parity.compare.noise import LEAST_NOISE, evenly, noise_factor, noise_of, sum_noise
from outlook_parity.core.check import EXCUSED, Check, Noise, RowVerdict, Verdict
from outlook_parity.core.precision import PRECISIONS

Tensors = Mapping[str, np.ndarray]

# max|torch - jax| / max|jax| in float64: agreement to rounding.
RELATIVE_BOUNDS = {"forward": 1e-12, "gradients": 1e-10, "training": 1e-9}

# The largest factor between the twins' noises. Among the 72 random layers of the tests the largest is 3.5, in a tensor
# of 28 numbers; windows rounded to TF32's 10 bits inside float32 make it 100 to 1600, to bfloat16's 7 bits 1400 to
# 11000.
FACTOR_BOUND = 8.0

# Gradients jump where rounding decides on which side of zero a ReLU's input lies, or which of two numbers is larger: a
# twin may take the other side at one of a million places, and err a thousand times more there. So where the noises of
# gradients or training differ, the truth itself is asked: its weights and inputs are moved by this many units of
# rounding, each up or down at random, and then the other way. By how much the two answers differ is what rounding can
# do, and errors below that count as that much; in float64 differences, where the true gradient is zero. No bug is
# excused that is larger than a few dozen units of rounding.
MOVED = 16.0


@dataclass(frozen=True)
class TensorPair:
    """One tensor as either twin has it; None where a twin lacks it."""

    name: str
    torch: np.ndarray | None
    jax: np.ndarray | None

    def alike(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Return both arrays if both are there and have one shape, else None."""
        if self.torch is None or self.jax is None or self.torch.shape != self.jax.shape:
            return None
        return self.torch, self.jax


def pairs(torch: Tensors, jax: Tensors, expected: Sequence[str] = ()) -> list[TensorPair]:
    """Return the tensors of both twins side by side, also those that only one of them has, or neither."""
    return [TensorPair(name, torch.get(name), jax.get(name)) for name in dict.fromkeys([*expected, *torch, *jax])]


def compare_weights(torch: Tensors, jax: Tensors, expected: Sequence[str]) -> list[Check]:
    """Compare weights: all that are expected must be there, and every single one equal."""
    return [compare_pair("weights", "as given", pair, bound=0.0) for pair in pairs(torch, jax, expected)]


def compare_level(
    level: str, dtype: str, traced: Mapping[str, Tensors], summed: tuple[int, int], whole: Collection[str] = ()
) -> list[Check]:
    """Compare what the twins, "torch" and "jax", computed in `dtype`; by their noise if there is a "truth" too.

    If there are "up" and "down", the truth moved by rounding to either side, errors below their difference count as it.
    `summed` is how many numbers are added up at most for a parameter's gradient and for a loss: the places of the
    largest input, and all its numbers. `whole` are the outputs that are whole numbers.
    """
    truth, moved = traced.get("truth"), ("up" in traced and level != "forward")
    bound = RELATIVE_BOUNDS[level] if truth is None else FACTOR_BOUND
    checks = []
    for pair in pairs(traced["torch"], traced["jax"]):
        if pair.name in whole:
            checks.append(_compare_whole(level, dtype, pair))
            continue
        kind = _kind(pair.name) if level == "training" else ""
        rooted = partial(_rooted, kind)
        exact = None if truth is None else rooted(truth.get(pair.name))
        least = sum_noise(_terms(level, kind, pair, dtype, summed), dtype)
        jump = None
        if moved and pair.name in traced["up"]:
            up, down = (rooted(traced[which][pair.name]) for which in ("up", "down"))
            jump = np.asarray(up - down)  # of single numbers it is no array
        pair = TensorPair(pair.name, rooted(pair.torch), rooted(pair.jax))
        if jump is not None and exact is not None and exact.any():
            size = noise_of(np.asarray(jump + exact), exact, dtype)
            least = Noise(max(least.rms, size.rms), max(least.max, size.max))
        check = compare_pair(level, dtype, pair, bound=bound, truth=exact, least=least)
        if truth is None and jump is not None and check.verdict == "mismatch" and _explained(pair, jump):
            check = replace(check, verdict="pass", note=EXCUSED, excused=True)
        checks.append(check)
    return checks


def _compare_whole(level: str, dtype: str, pair: TensorPair) -> Check:
    """Compare whole numbers, which are equal or not; in low precision rounding may decide which of two is larger."""
    check = compare_pair(level, dtype, pair, bound=0.0)
    if dtype == "float64" or check.verdict != "mismatch" or check.measured is None:
        return check
    note = "whole numbers, which rounding may decide: judged in float64"
    return replace(check, verdict="skipped", note=note)


def _explained(pair: TensorPair, jump: np.ndarray) -> bool:
    """Whether numbers differ by no more than rounding can move them, as a gradient does whose true value is zero."""
    if (arrays := pair.alike()) is None:
        return False
    torch, jax = arrays
    return float(np.abs(torch - jax).max()) <= FACTOR_BOUND * float(np.abs(jump).max())


def _kind(name: str) -> str:
    """Return what of a training step a tensor is: "losses", or of the optimizer's state "momentum"; else its name."""
    return name.partition(": ")[2].partition(" of ")[0]


def _rooted(kind: str, array: np.ndarray | None) -> Any:
    """Return the root of what is a mean of squares: of gradients that are nothing but rounding, squares would tell of
    a factor between the twins' noises its square.
    """
    return np.sqrt(array) if array is not None and kind == "second moment" else array


def _terms(level: str, kind: str, pair: TensorPair, dtype: str, summed: tuple[int, int]) -> int:
    """Return how many numbers are added up, in `dtype` itself, for one of this tensor.

    For a parameter's gradient (and for what optimizers keep of it) those are the places of the map, at
    most all of the input's; for a loss, whose outputs are about as many as the inputs, all numbers. Below float32
    matrix products and means add up in float32, and so only the gradients of vectors count.
    """
    if pair.torch is None:
        return 1
    places, numbers = summed
    in_float32 = PRECISIONS[dtype].storage == np.float32
    if level == "gradients" and pair.name.partition(".")[0] != "input":
        return places if in_float32 or pair.torch.ndim == 1 else 1
    if not in_float32:
        return 1
    return {"losses": numbers, **dict.fromkeys(("momentum", "first moment", "second moment"), places)}.get(kind, 1)


def may_be_a_jump(check: Check) -> bool:
    """Whether this row is a mismatch by the size of its numbers alone, of something that may jump."""
    return check.verdict == "mismatch" and check.measured is not None and check.level != "forward"


def compare_dtype(who: str, asked: str, given: str, output: str = "output") -> list[Check]:
    """Return a row if an output has another dtype than the one asked for: then nothing was shown about that one."""
    if given == PRECISIONS[asked].storage.name:
        return []
    name = f"dtype of {who}{_which(output)}"
    return [Check("forward", asked, name, "mismatch", bound=0.0, note=f"the output is {given}")]


def compare_self(who: str, dtype: str, plain: Tensors, watched: Tensors, truth: Tensors | None) -> list[Check]:
    """Return rows on whether a twin gives the same module by module as it does by itself.

    The outputs are compared as the twins' are with each other.
    """
    how = {"torch": "watched against plain", "jax": "module by module against jit"}[who]
    bound = RELATIVE_BOUNDS["forward"] if truth is None else FACTOR_BOUND
    checks = []
    for pair in pairs(watched, plain):
        row = replace(pair, name=f"{who}: {how}{_which(pair.name)}")
        exact = None if truth is None else truth.get(pair.name)
        checks.append(compare_pair("self-check", dtype, row, bound=bound, truth=exact))
    return checks


def _which(output: str) -> str:
    """Return which of several outputs this is, as in ", logits.0"; "" of the only one."""
    return output.removeprefix("output").replace(".", ", ", 1)


def compare_again(dtype: str, again: Mapping[str, Mapping[str, Tensors | str]]) -> list[Check]:
    """Return rows on whether the twins still agree when the same copies of them are called again; `again` by twin, how.

    What both refuse, or answer with NaN or Inf at the same places, is skipped: those are numbers of the verifier's own.
    """
    checks = []
    for how, ours in again["torch"].items():
        theirs = again["jax"].get(how, {})
        if isinstance(ours, str) or isinstance(theirs, str):
            refused = {"torch": ours, "jax": theirs}
            note = "; ".join(f"{twin} refuses: {why}" for twin, why in refused.items() if isinstance(why, str))
            checks.append(Check("again", dtype, how, "skipped", 0.0, note=note))
            continue
        for pair in pairs(ours, theirs):
            row = replace(pair, name=f"{how}: {pair.name}")
            check = compare_pair("again", dtype, row, bound=RELATIVE_BOUNDS["forward"])
            if check.verdict == "mismatch" and _as_undefined(pair):
                check = replace(check, verdict="skipped", note=f"{check.note}, at the same places")
            checks.append(check)
    return checks


def _as_undefined(pair: TensorPair) -> bool:
    """Whether both are NaN or Inf at the same places, and agree elsewhere."""
    if (arrays := pair.alike()) is None:
        return False
    torch, jax = arrays
    defined = np.isfinite(torch)
    if defined.all() or not np.array_equal(defined, np.isfinite(jax)):
        return False
    return not defined.any() or relative_error(torch[defined], jax[defined]) <= RELATIVE_BOUNDS["forward"]


def refusal(inputs: Mapping[str, np.ndarray]) -> str | None:
    """Return why a comparison on these inputs would tell nothing, or None if it can tell something."""
    for name, array in inputs.items():
        what = f"the {name}" if len(inputs) == 1 else name
        if reason := _refusal(what, array):
            return reason
    return None


def _refusal(what: str, array: np.ndarray) -> str | None:
    if array.size == 0:
        return f"{what} of shape {array.shape} is empty"
    if array.dtype.kind in "iub":  # ids and masks: alike for all samples may be meant
        same = array.size > 1 and not (array != array.flat[0]).any()
        return f"{what} is {array.flat[0]} everywhere: no fault could be seen in what it decides" if same else None
    if bad := int((~np.isfinite(array)).sum()):
        return f"{what} has {bad} NaN or Inf among {array.size} numbers"
    for axis, size in enumerate(array.shape):
        if size > 1 and not np.ptp(array, axis=axis).any():
            return f"{what} is constant along axis {axis} of {array.shape}: no fault along it could be seen"
    return None if array.any() else f"{what} is zero"


def judge(checks: Sequence[Check], expected: Iterable[tuple[str, str]]) -> tuple[Verdict, str | None]:
    """Return the verdict on all rows together, and the reason if it is "not-run".

    "pass" takes, of every expected (level, dtype), at least one comparison of numbers that are not all zero, and no
    row that is anything but equal.
    """
    if any(check.verdict == "mismatch" for check in checks):
        return "mismatch", None
    empty = [check for check in checks if check.verdict == "not-run"]
    told = {(check.level, check.dtype) for check in checks if check.verdict in ("pass", "not-run")}
    vacuous = [f"{level} ({dtype})" for level, dtype in expected if (level, dtype) not in told]
    reasons = [
        f"{why}: {', '.join(f'{row.name} ({row.level}, {row.dtype})' for row in empty if row.note == why)}"
        for why in dict.fromkeys(row.note for row in empty)
    ]
    reasons += [f"nothing but zeros to compare: {', '.join(vacuous)}"] if vacuous else []
    return ("not-run", "; ".join(reasons)) if reasons else ("pass", None)


def compare_pair(
    level: str,
    dtype: str,
    pair: TensorPair,
    *,
    bound: float,
    truth: np.ndarray | None = None,
    least: Noise | None = None,
) -> Check:
    """Compare one tensor; by noise if there is a truth, where noises below `least` count as it."""
    row = partial(Check, level=level, dtype=dtype, name=pair.name, bound=bound)
    if pair.torch is None or pair.jax is None:
        lacking = [twin for twin, array in (("torch", pair.torch), ("jax", pair.jax)) if array is None]
        return row(verdict="mismatch", note=f"missing in {' and '.join(lacking)}")
    if pair.torch.shape != pair.jax.shape:
        return row(verdict="mismatch", note=f"shape {pair.torch.shape} in torch, {pair.jax.shape} in jax")
    if pair.torch.size == 0:
        return row(verdict="not-run", note=f"empty: shape {pair.torch.shape}")
    check = _judged(row, pair.torch, pair.jax, dtype, bound, truth, least or evenly(LEAST_NOISE))
    if dtype in PRECISIONS and (level == "forward" or check.verdict == "mismatch"):
        check = replace(check, metrics=measure(pair.torch, pair.jax, PRECISIONS[dtype]))
    return check


def _judged(
    row: Callable[..., Check],
    torch: np.ndarray,
    jax: np.ndarray,
    dtype: str,
    bound: float,
    truth: np.ndarray | None,
    least: Noise,
) -> Check:
    """Compare two arrays of one shape that are not empty."""
    arrays = {"torch": torch, "jax": jax} | ({} if truth is None else {"the float64 truth": truth})
    if strange := [f"{bad} NaN or Inf in {name}" for name, array in arrays.items() if (bad := _not_finite(array))]:
        return row(verdict="mismatch", note=", ".join(strange))
    if not any(array.any() for array in arrays.values()):
        return row(verdict="zero", note="zero in both")
    if truth is None:
        measured = relative_error(torch, jax)
        return row(verdict="pass" if measured <= bound else "mismatch", measured=measured)
    if not truth.any():
        return row(verdict="mismatch", note="zero in float64, and not here")
    torch_noise, jax_noise = noise_of(torch, truth, dtype), noise_of(jax, truth, dtype)
    measured = noise_factor(torch_noise, jax_noise, least=least)
    verdict: RowVerdict = "pass" if measured <= bound else "mismatch"
    return row(verdict=verdict, measured=measured, torch_noise=torch_noise, jax_noise=jax_noise)


def _not_finite(array: np.ndarray) -> int:
    return int((~np.isfinite(array)).sum())


def relative_error(a: np.ndarray, b: np.ndarray) -> float:
    """Return max|a - b| / max|b|."""
    scale = float(np.abs(b).max())
    return float(np.abs(a - b).max()) / scale if scale else math.inf
