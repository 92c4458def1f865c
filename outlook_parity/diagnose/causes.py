"""Where the twins first go different ways, and why, told from what was compared. Imports no framework."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from outlook_common.text import listed
from outlook_parity.compare.modules import Suspect, shown_path
from outlook_parity.compare.patterns import weight_difference
from outlook_parity.compare.tensors import Tensors
from outlook_parity.core.attributes import HARMLESS, Difference
from outlook_parity.core.check import TWINS, Check
from outlook_parity.core.dropout import Draw
from outlook_parity.diagnose.precision import as_coarse_as, as_float32_rounds, finer_products


class Explanation(NamedTuple):
    """The path of the first module that is wrong, and the cause in words; None where nothing is known."""

    path: str | None
    cause: str | None


@dataclass
class Evidence:
    """What is known when a cause is looked for.

    Attributes:
        wrong: the rows that mismatch.
        suspects: modules that are wrong alone, in the order of events.
        differences: what the models say differently about themselves.
        weights: of each twin, as given.
        draws: of each twin's last training step.
        trained: of each twin, what training in float64 gave, if it ran.
        in_full: by precision in which products may round, the twins that show none of it.
        hint: of a weight without counterpart, what to do about it, in brackets.
        wrong_step: of a suspect, the step inside outlook attention that is wrong, None if it cannot be told.
    """

    wrong: list[Check]
    suspects: list[Suspect]
    differences: list[Difference]
    weights: Mapping[str, Tensors]
    draws: Mapping[str, Sequence[Draw]]
    trained: Mapping[str, Tensors] = field(default_factory=dict)
    in_full: Mapping[str, list[str]] = field(default_factory=dict)
    wrong_step: Callable[[Suspect], str | None] = lambda suspect: None
    hint: Callable[[str], str] = lambda name: ""


def explain(evidence: Evidence) -> Explanation:
    """Return where the twins first go different ways, and why."""
    for rule in RULES:
        found = rule(evidence)
        if found is not None:
            return found
    return Explanation(None, None)


def _weights(evidence: Evidence) -> Explanation | None:
    wrong = [check for check in evidence.wrong if check.level == "weights"]
    for check in sorted(wrong, key=lambda check: not evidence.hint(check.name)):  # first what a name may explain
        how = check.note or weight_difference(check.name, evidence.weights["torch"], evidence.weights["jax"])
        how = how or f"differs by {check.measured:.1e} of its largest"
        said = f"weight {check.name}: {how}{evidence.hint(check.name)}"
        if len(wrong) > max(MANY, len(evidence.weights["torch"]) / 2):
            said = f"{len(wrong)} weights differ, so the twins were not given the same; {said}"
        return Explanation(_owner(check.name), said)
    return None


# So many weights that differ are no fault in one of them.
MANY = 3


# Facts that matter in training alone.
IN_TRAINING = ("momentum", "dropout rate")


def _alone(evidence: Evidence) -> Explanation | None:
    """Return the first module that is wrong alone; in float64 if it shows there."""
    if not evidence.suspects:
        return None
    first = evidence.suspects[0]
    harmless = (*IN_TRAINING, *(HARMLESS if first.dtype == "float64" else ()))
    if said := [d for d in evidence.differences if d.path == first.path and d.fact not in harmless]:
        return Explanation(shown_path(first.path), "; ".join(map(str, said)))
    step = evidence.wrong_step(first)
    own = next((check for check in evidence.wrong if _is_of(first, check)), None)
    coarse = "" if own is None else as_coarse_as(own) or as_float32_rounds(own)
    reasons = [f"the step {step} of outlook attention" if step else first.where, first.how, coarse]
    where = "; ".join(filter(None, reasons)) or "its own code gives something else"
    precision = "" if first.dtype == "float64" else f", in {first.dtype} alone"
    return Explanation(shown_path(first.path), f"{shown_path(first.path)}{precision}: {where}")


def _is_of(suspect: Suspect, check: Check) -> bool:
    asked = ("layers", suspect.dtype, shown_path(suspect.path), suspect.view)
    return (check.level, check.dtype, check.name, check.view) == asked


def _products(evidence: Evidence) -> Explanation | None:
    """Return that one twin multiplies more exactly than it need, where nothing else is wrong."""
    how = finer_products(evidence.wrong, evidence.in_full)
    if not how:
        return None
    said = [difference for difference in evidence.differences if difference.fact == "precision"]
    return Explanation(shown_path(said[0].path) if said else None, "; ".join([how, *map(str, said[:1])]))


def _said(evidence: Evidence) -> Explanation | None:
    """Return what the models say differently, where no module was found wrong by its numbers."""
    training = any(check.level == "training" for check in evidence.wrong)
    said = [d for d in evidence.differences if d.fact not in HARMLESS and (training or d.fact not in IN_TRAINING)]
    return Explanation(shown_path(said[0].path), listed(said, 3, between="; ")) if said else None


def _output(evidence: Evidence) -> Explanation | None:
    for check in evidence.wrong:
        if check.level == "forward" and check.note:
            return Explanation(None, f"{check.name}: {check.note}")
    return None


def _rounding(evidence: Evidence) -> Explanation | None:
    """Return how coarse the outputs of one twin are, where they are wrong in a lower precision alone."""
    outputs = [check for check in evidence.wrong if check.level == "forward"]
    if not outputs or any(check.dtype == "float64" for check in evidence.wrong):
        return None
    how = as_coarse_as(outputs[0])
    return Explanation(None, f"{outputs[0].name}, in {outputs[0].dtype} alone: {how}") if how else None


def _again(evidence: Evidence) -> Explanation | None:
    """Return how a twin was called when it first gave something else, where it did not the first time."""
    if any(check.level in ("forward", "layers") for check in evidence.wrong):
        return None
    for check in evidence.wrong:
        if check.level == "again":
            how = check.name.partition(":")[0]
            return Explanation(
                None, f"the outputs agree at first, and no more when the models are called again ({how})"
            )
    return None


def _gradients(evidence: Evidence) -> Explanation | None:
    """Return the module whose backward pass is wrong: of those with wrong gradients the last, where that begins."""
    names = [check.name for check in evidence.wrong if check.level == "gradients"]
    if not names or any(check.level in ("forward", "layers") for check in evidence.wrong):
        return None
    named = [name for name in names if name != "input"]
    begins = named[-1] if named else "the input"
    return Explanation(
        _owner(named[-1]) if named else None, f"the outputs agree, the gradients do not, from {begins} backwards"
    )


def _draws(evidence: Evidence) -> Explanation | None:
    torch, jax = (evidence.draws.get(twin, ()) for twin in TWINS)
    if [draw.shape for draw in torch] == [draw.shape for draw in jax]:
        return None
    other = next((n for n, (a, b) in enumerate(zip(torch, jax, strict=False)) if a.shape != b.shape), None)
    first = min(len(torch), len(jax)) if other is None else other
    longer_first = sorted((torch, jax), key=len, reverse=True)  # it has what the other lacks
    where = next((drawn[first].where for drawn in longer_first if first < len(drawn)), "")
    counts = f"{len(torch)} dropout masks in torch, {len(jax)} in jax"
    return Explanation(shown_path(where), f"{counts}; they differ from mask {first + 1} on, in {shown_path(where)}")


def _training(evidence: Evidence) -> Explanation | None:
    rows = [(check, *check.name.partition(": ")[::2]) for check in evidence.wrong if check.level == "training"]
    if not rows:
        return None
    names = [name for _, _, name in rows]
    first = names[0]
    if all(name.endswith(("running_mean", "running_var", "num_batches_tracked")) for name in names):
        for twin in TWINS:
            trained = evidence.trained.get(twin, {})
            if all(_same(trained.get(f"SGD: {name}"), evidence.weights[twin].get(name)) for name in names):
                return Explanation(_owner(first), f"the running statistics of {twin} stay as they were (stale buffers)")
        if all(name.endswith("running_var") for name in names):
            how = "one twin keeps the biased variance (n), the other the unbiased one (n - 1)"
            return Explanation(_owner(first), f"running_var alone differs: {how}")
        return Explanation(_owner(first), f"the running statistics of {_owner(first)} move otherwise: their momentum")
    optimizers = sorted({optimizer for _, optimizer, _ in rows})
    if len(optimizers) == 1:
        kinds = sorted({name.partition(" of ")[0] for name in names if " of " in name})
        how = f"its {' and '.join(kinds)} differ" if kinds else "its state agrees, its weights do not"
        missing = next((f" ({check.note})" for check, _, _ in rows if check.note), "")
        return Explanation(None, f"only {optimizers[0]} gives other weights: {how}{missing}")
    return Explanation(None, "the twins go apart in training alone")


def _same(after: object, before: object) -> bool:
    return after is not None and before is not None and bool((after == before).all())  # type: ignore[attr-defined]


RULES: tuple[Callable[[Evidence], Explanation | None], ...] = (
    _weights,
    _products,
    _alone,
    _draws,
    _said,
    _output,
    _rounding,
    _again,
    _gradients,
    _training,
)


def _owner(weight: str) -> str:
    return shown_path(weight.rpartition(".")[0])
