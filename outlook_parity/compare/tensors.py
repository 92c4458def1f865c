"""Verdicts on tensors: arrays in, rows out. Imports no framework.

A hand-set tolerance hides bugs, so there is none for the lower precisions: there each twin's rounding error is measured
against the float64 truth, and the factor between the two errors is judged. Rounding is shared by both; a bug is not.
"""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from outlook_parity.compare.metrics import measure
from outlook_parity.compare.noise import (
    LEAST_NOISE,
    distance,
    largest,
    noise_factor,
    noise_of,
    sum_noise,
    uniform_noise,
)
from outlook_parity.core.check import EXCUSED, Check, Noise, RowVerdict, Tensors, Verdict
from outlook_parity.core.precision import PRECISIONS

# max|torch - jax| / max|jax| in float64: agreement to rounding.
RELATIVE_BOUNDS = {"forward": 1e-12, "gradients": 1e-10, "training": 1e-9}

# The largest factor between the twins' noises. Among the 72 random layers of the tests the largest is 3.5, in a tensor
# of 28 numbers; windows rounded to TF32's 10 bits inside float32 make it 100 to 1600, to bfloat16's 7 bits 1400 to
# 11000.
FACTOR_BOUND = 8.0

# Gradients jump where rounding decides on which side of zero a ReLU's input lies, or which of two numbers is larger: a
# twin may take the other side at one of a million positions, and err a thousand times more there. So where the noises
# of gradients or training differ, the truth is computed twice more, with weights and inputs perturbed by this many
# units of rounding, each up or down at random, and then the other way. The difference of the two results is what
# rounding can do, and errors below it count as that much; in float64 so do differences, where the true gradient is
# zero. No bug is excused that is larger than a few dozen units of rounding.
PERTURBATION = 16.0


@dataclass(frozen=True)
class TensorPair:
    """One tensor of both twins; None where a twin lacks it."""

    name: str
    torch: np.ndarray | None
    jax: np.ndarray | None

    def alike(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Return both arrays if both exist and have one shape, else None."""
        if self.torch is None or self.jax is None or self.torch.shape != self.jax.shape:
            return None
        return self.torch, self.jax


def pairs(torch: Tensors, jax: Tensors, expected: Sequence[str] = ()) -> Iterator[TensorPair]:
    """Yield the tensors of both twins by name, also those that only one of them has, or neither; one at a time."""
    return (TensorPair(name, torch.get(name), jax.get(name)) for name in dict.fromkeys([*expected, *torch, *jax]))


def compare_weights(torch: Tensors, jax: Tensors, expected: Sequence[str]) -> list[Check]:
    """Compare weights: all that are expected must exist, and every number be equal."""
    return [compare_pair("weights", "as given", pair, bound=0.0) for pair in pairs(torch, jax, expected)]


def compare_level(
    level: str,
    dtype: str,
    results: Mapping[str, Tensors],
    summed: tuple[int, int],
    integer_outputs: Collection[str] = (),
) -> list[Check]:
    """Compare what the twins computed in `dtype`; by their noise if there is a truth.

    Args:
        level: "forward", "gradients" or "training".
        dtype: a precision.
        results: "torch" and "jax"; in lower precisions "truth"; perhaps "up" and "down", the truth perturbed by
            rounding to either side: errors below their difference count as that much.
        summed: how many numbers are added up at most for a parameter's gradient and for a loss: the positions of the
            largest input, and all its numbers.
        integer_outputs: the outputs that are integers or booleans.
    """
    truth, perturbed = results.get("truth"), ("up" in results and level != "forward")
    checks = []
    for pair in pairs(results["torch"], results["jax"]):
        if pair.name in integer_outputs:
            checks.append(_compare_integers(level, dtype, pair))
            continue
        quantity = _quantity(pair.name) if level == "training" else ""
        root = partial(_root, quantity)
        jump = None
        if perturbed and pair.name in results["up"]:
            # Of single numbers the difference is no array.
            jump = np.asarray(root(results["up"][pair.name]) - root(results["down"][pair.name]))
        exact = None if truth is None else root(truth.get(pair.name))
        least = _least_noise(sum_noise(_terms(level, quantity, pair, dtype, summed), dtype), jump, exact, dtype)
        pair = TensorPair(pair.name, root(pair.torch), root(pair.jax))  # frees what the roots are of
        bound = RELATIVE_BOUNDS[level] if truth is None else FACTOR_BOUND
        check = compare_pair(level, dtype, pair, bound=bound, truth=exact, least=least)
        if truth is None and jump is not None and check.verdict == "mismatch" and _within(pair, jump):
            check = replace(check, verdict="pass", note=EXCUSED, excused=True)
        checks.append(check)
    return checks


def _compare_integers(level: str, dtype: str, pair: TensorPair) -> Check:
    """Compare integers, which must be equal; in low precision rounding may decide which of two is larger."""
    check = compare_pair(level, dtype, pair, bound=0.0)
    if dtype == "float64" or check.verdict != "mismatch" or check.measured is None:
        return check
    note = "integers, which rounding may decide: judged in float64"
    return replace(check, verdict="skipped", note=note)


def _least_noise(least: Noise, jump: np.ndarray | None, exact: np.ndarray | None, dtype: str) -> Noise:
    """Return the noise below which all counts as equally exact, raised to that of a jump where there is one."""
    if jump is None or exact is None or not exact.any():
        return least
    moved = np.asarray(jump + exact)
    size = noise_of(moved, exact, dtype, out=moved)
    return Noise(max(least.rms, size.rms), max(least.max, size.max))


def _within(pair: TensorPair, jump: np.ndarray) -> bool:
    """Whether numbers differ by no more than rounding can change them, as where the true gradient is zero."""
    if (arrays := pair.alike()) is None:
        return False
    torch, jax = arrays
    return float(distance(torch, jax).max()) <= FACTOR_BOUND * largest(jump)


def _quantity(name: str) -> str:
    """Return the quantity of a training step: "losses", or an optimizer's slot as in "momentum"; else the name."""
    return name.partition(": ")[2].partition(" of ")[0]


def _root(quantity: str, array: np.ndarray | None) -> Any:
    """Return the square root of a mean of squares, anything else as it is.

    Of gradients that are nothing but rounding, squares would show the factor between the twins' noises squared.
    """
    # Of a single number NumPy's root is no array.
    return np.asarray(np.sqrt(array)) if array is not None and quantity == "second moment" else array


def _terms(level: str, quantity: str, pair: TensorPair, dtype: str, summed: tuple[int, int]) -> int:
    """Return how many numbers are added up, in `dtype` itself, for one of this tensor.

    For a parameter's gradient (and for what optimizers keep of it) those are the positions of the map, at most all of
    the input's; for a loss, whose outputs are about as many as the inputs, all numbers. Below float32 matrix products
    and means add up in float32, and so only the gradients of vectors count.
    """
    if pair.torch is None:
        return 1
    positions, numbers = summed
    in_float32 = PRECISIONS[dtype].storage == np.float32
    if level == "gradients" and pair.name.partition(".")[0] != "input":
        return positions if in_float32 or pair.torch.ndim == 1 else 1
    if not in_float32:
        return 1
    return {"losses": numbers, **dict.fromkeys(("momentum", "first moment", "second moment"), positions)}.get(
        quantity, 1
    )


def may_be_a_jump(check: Check) -> bool:
    """Whether this row may be a mismatch by a jump: by the size of its numbers, and of no output."""
    return check.verdict == "mismatch" and check.measured is not None and check.level != "forward"


def compare_dtype(twin: str, dtype: str, actual: str, output: str = "output") -> list[Check]:
    """Return a row if an output has another dtype than was computed in: then nothing was shown about that one."""
    if actual == PRECISIONS[dtype].storage.name:
        return []
    name = f"dtype of {twin}{output_suffix(output)}"
    return [Check("forward", dtype, name, "mismatch", bound=0.0, note=f"the output is {actual}")]


def output_suffix(output: str) -> str:
    """Return which of several outputs this is, as in ", logits.0"; "" for the only one."""
    return output.removeprefix("output").replace(".", ", ", 1)


def refusal(inputs: Mapping[str, np.ndarray]) -> str | None:
    """Return why a comparison on these inputs would show nothing, or None if it can show something."""
    constant = constant_inputs(inputs)
    for name, array in inputs.items():
        what = f"the {name}" if len(inputs) == 1 else name
        if name in constant:
            if len(constant) == len(inputs):
                return f"{what} is {array.flat[0]} everywhere: no fault could be seen in what it decides"
        elif reason := _refusal(what, array):
            return reason
    return None


def constant_inputs(inputs: Mapping[str, np.ndarray]) -> list[str]:
    """Return the names of integers and booleans that are the same everywhere, as an attention mask of ones is."""
    integers = {name: array for name, array in inputs.items() if array.dtype.kind in "iub" and array.size > 1}
    return [name for name, array in integers.items() if not (array != array.flat[0]).any()]


def notes_on_inputs(inputs: Mapping[str, np.ndarray]) -> list[str]:
    """Return notes on inputs that tell nothing of what they decide."""
    return [
        f"{name} is {inputs[name].flat[0]} everywhere: no fault could be seen in what it decides"
        for name in constant_inputs(inputs)
    ]


def _refusal(what: str, array: np.ndarray) -> str | None:
    if array.size == 0:
        return f"{what} of shape {array.shape} is empty"
    if array.dtype.kind in "iub":  # ids and masks may be alike for all samples
        return None
    if bad := int((~np.isfinite(array)).sum()):
        return f"{what} has {bad} NaN or Inf among {array.size} numbers"
    for axis, size in enumerate(array.shape):
        if size > 1 and not np.ptp(array, axis=axis).any():
            return f"{what} is constant along axis {axis} of {array.shape}: no fault along it could be seen"
    return None if array.any() else f"{what} is zero"


def judge(checks: Sequence[Check], expected: Iterable[tuple[str, str]]) -> tuple[Verdict, str | None]:
    """Return the verdict on all rows together, and the reason if it is "not-run".

    "pass" takes at least one comparison of numbers that are not all zero for every expected (level, dtype), and no row
    that differs or could not be compared.
    """
    if any(check.verdict == "mismatch" for check in checks):
        return "mismatch", None
    empty = [check for check in checks if check.verdict == "not-run"]
    shown = {(check.level, check.dtype) for check in checks if check.verdict in ("pass", "not-run")}
    vacuous = [f"{level} ({dtype})" for level, dtype in expected if (level, dtype) not in shown]
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
    check = _judged(row, pair.torch, pair.jax, dtype, bound, truth, least or uniform_noise(LEAST_NOISE))
    if dtype in PRECISIONS and (level == "forward" or check.verdict == "mismatch"):
        logits = level == "forward" and bound > 0  # integers have no bound
        check = replace(check, metrics=measure(pair.torch, pair.jax, PRECISIONS[dtype], logits=logits))
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
    """Compare two arrays of one shape, not empty."""
    arrays = {"torch": torch, "jax": jax} | ({} if truth is None else {"the float64 truth": truth})
    if undefined := [f"{bad} NaN or Inf in {name}" for name, array in arrays.items() if (bad := _not_finite(array))]:
        return row(verdict="mismatch", note=", ".join(undefined))
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
    scale = largest(b)
    return float(distance(a, b).max()) / scale if scale else math.inf
