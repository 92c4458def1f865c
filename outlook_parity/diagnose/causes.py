"""Where the twins first diverge, and why: rules over the rows. Imports no framework."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from outlook_common.text import listed
from outlook_parity.compare.modules import Suspect, shown_path
from outlook_parity.compare.patterns import weight_difference
from outlook_parity.core.attributes import FUNCTIONAL, NO_EFFECT_IN_FLOAT64, Difference
from outlook_parity.core.check import TWINS, Check, Tensors
from outlook_parity.core.dropout import Draw, correspond, without_single_numbers
from outlook_parity.core.sizes import SIZES
from outlook_parity.diagnose.precision import as_coarse_as, as_float32_rounds, finer_products
from outlook_parity.diagnose.program.facts import Programs


class Explanation(NamedTuple):
    """The path of the first module that is wrong, and the cause in words; None where nothing is known."""

    path: str | None
    cause: str | None


@dataclass
class Evidence:
    """What the rules decide by.

    Attributes:
        wrong: the rows that mismatch.
        suspects: modules that are wrong isolated, in the order of events.
        differences: the attributes that differ.
        weights: of each twin, as given.
        draws: of each twin's last training step.
        trained: of each twin, the tensors after training in float64, if it ran.
        unrounded: precision in which products may round -> the twins that show no such rounding.
        programs: for a suspect, what both twins compute, None if that cannot be had.
        programs_at: the same for inputs of another size, by how.
        differences_at: the attributes that differ there.
        kinds: of modules, as PyTorch calls them.
        hint: for a weight without counterpart, what to do about it, in brackets.
        wrong_step: for a suspect, the step inside outlook attention that is wrong, None if unknown.
    """

    wrong: list[Check]
    suspects: list[Suspect]
    differences: list[Difference]
    weights: Mapping[str, Tensors]
    draws: Mapping[str, Sequence[Draw]]
    trained: Mapping[str, Tensors] = field(default_factory=dict)
    unrounded: Mapping[str, list[str]] = field(default_factory=dict)
    wrong_step: Callable[[Suspect], str | None] = lambda suspect: None
    programs: Callable[[Suspect | None], Programs | None] = lambda suspect: None
    programs_at: Callable[[str], Programs | None] = lambda how: None
    differences_at: Callable[[str], list[Difference]] = lambda how: []
    kinds: Mapping[str, str] = field(default_factory=dict)
    hint: Callable[[str], str] = lambda name: ""


def explain(evidence: Evidence) -> Explanation:
    """Return where the twins first diverge, and why, by the first rule that applies."""
    for rule in RULES:
        found = rule(evidence)
        if found is not None:
            return found
    return Explanation(None, None)


def _weights(evidence: Evidence) -> Explanation | None:
    wrong = [check for check in evidence.wrong if check.level == "weights"]
    for check in sorted(
        wrong, key=lambda check: not evidence.hint(check.name)
    ):  # first those that another name may explain
        how = check.note or weight_difference(check.name, evidence.weights["torch"], evidence.weights["jax"])
        how = how or f"differs by {check.measured:.1e} of its largest"
        cause = f"weight {check.name}: {how}{evidence.hint(check.name)}"
        alone = [one for one in wrong if any(one.name not in weights for weights in evidence.weights.values())]
        if alone:
            if len(alone) > MANY:
                cause = f"{len(alone)} weights have no counterpart, so the twins could not be compared; {cause}"
        elif len(wrong) > max(MANY, len(evidence.weights["torch"]) / 2):
            cause = f"{len(wrong)} weights differ, so the twins were not given the same; {cause}"
        return Explanation(_owner(check.name), cause)
    return None


# More weights than that are no fault in one of them.
MANY = 3


# Attributes that matter in training alone.
IN_TRAINING = ("momentum", "dropout rate")


def _isolated(evidence: Evidence) -> Explanation | None:
    """Return the first module that is wrong isolated; in float64 if it shows there."""
    if not evidence.suspects:
        return None
    first = evidence.suspects[0]
    no_effect = (*IN_TRAINING, *(NO_EFFECT_IN_FLOAT64 if first.dtype == "float64" else ()))
    if reported := [d for d in evidence.differences if d.path == first.path and d.attribute not in no_effect]:
        return Explanation(shown_path(first.path), "; ".join(map(str, reported)))
    step = evidence.wrong_step(first)
    programs = None if step else evidence.programs(first)
    if programs is not None and (integers := _integers(programs, first.path)):
        return integers
    if programs is not None and (facts := _facts(programs, first, evidence.kinds)):
        return Explanation(shown_path(first.path), "; ".join(filter(None, [*map(str, facts), first.how])))
    own = next((check for check in evidence.wrong if _is_of(first, check)), None)
    operation = (programs and programs.step(first.path)) or ""
    coarse = "" if own is None or operation else as_coarse_as(own) or as_float32_rounds(own)
    reasons = [f"the step {step} of outlook attention" if step else first.where, first.how, operation, coarse]
    where = "; ".join(filter(None, reasons)) or "its own code computes something else"
    precision = "" if first.dtype == "float64" else f", in {first.dtype} alone"
    return Explanation(shown_path(first.path), f"{shown_path(first.path)}{precision}: {where}")


def _facts(programs: Programs, suspect: Suspect, kinds: Mapping[str, str]) -> list[Difference]:
    """Return how the operations of a suspect differ, by attribute."""
    found = programs.differences(suspect.path, kinds.get(suspect.path, "module"))
    # In float64 casts inside of models are lifted.
    return [one for one in found if one.attribute != "softmax dtype" or suspect.dtype != "float64"]


def _integers(programs: Programs, path: str) -> Explanation | None:
    """Return which caller gives a table, of a module or of one that it calls, other integers to be read at."""
    prefix = f"{path}." if path else ""
    for inner in programs.torch:
        near = inner == path or (inner.startswith(prefix) and "." not in inner[len(prefix) :])
        if near and (how := programs.integers(inner)):
            caller = shown_path(inner.rpartition(".")[0])
            return Explanation(caller, f"{caller} calls {shown_path(inner)} with other integers: {how}")
    return None


def _is_of(suspect: Suspect, check: Check) -> bool:
    row = ("layers", suspect.dtype, shown_path(suspect.path), suspect.view)
    return (check.level, check.dtype, check.name, check.view) == row


def _products(evidence: Evidence) -> Explanation | None:
    """Return that one twin alone multiplies in full precision, where nothing else is wrong."""
    how = finer_products(evidence.wrong, evidence.unrounded)
    if not how:
        return None
    reported = [difference for difference in evidence.differences if difference.attribute == "precision"]
    return Explanation(shown_path(reported[0].path) if reported else None, "; ".join([how, *map(str, reported[:1])]))


def _attributes(evidence: Evidence) -> Explanation | None:
    """Return the attributes that differ, where no module was found wrong by its numbers."""
    training = any(check.level == "training" for check in evidence.wrong)
    no_effect = (*NO_EFFECT_IN_FLOAT64, *(() if training else IN_TRAINING))
    reported = [difference for difference in evidence.differences if difference.attribute not in no_effect]
    return Explanation(shown_path(reported[0].path), listed(reported, 3, between="; ")) if reported else None


def _operations(evidence: Evidence) -> Explanation | None:
    """Return the first module whose operations differ, where outputs are wrong and no module was compared."""
    dtypes = [check.dtype for check in evidence.wrong if check.level == "forward" and not check.note]
    programs = evidence.programs(None) if dtypes else None
    return None if programs is None else _by_operations(programs, dtypes[0], evidence.kinds)


def _by_operations(programs: Programs, dtype: str, kinds: Mapping[str, str]) -> Explanation | None:
    for path in programs.torch:
        if integers := _integers(programs, path):
            return integers
        if facts := _facts(programs, Suspect(path, "", dtype, ""), kinds):
            return Explanation(shown_path(path), "; ".join(map(str, facts)))
    return None  # the first operation that differs may compute the same: it is named of suspects alone


def _output(evidence: Evidence) -> Explanation | None:
    for check in evidence.wrong:
        if check.level == "forward" and check.note:
            return Explanation(None, f"{check.name}: {check.note}")
    return None


def _rounding(evidence: Evidence) -> Explanation | None:
    """Return the precision that an output looks like, where outputs are wrong in a lower precision alone."""
    outputs = [check for check in evidence.wrong if check.level == "forward"]
    if not outputs or any(check.dtype == "float64" for check in evidence.wrong):
        return None
    how = as_coarse_as(outputs[0])
    return Explanation(None, f"{outputs[0].name}, in {outputs[0].dtype} alone: {how}") if how else None


def _repeated(evidence: Evidence) -> Explanation | None:
    """Return how the twins were called when they first differed, where they agreed the first time."""
    if any(check.level in ("forward", "layers") for check in evidence.wrong):
        return None
    for check in evidence.wrong:
        if check.level == "again":
            how = check.name.partition(":")[0]
            words = f"the outputs agree at first, and no more when the models are called again ({how})"
            programs = evidence.programs_at(how) if how in SIZES else None
            found = None if programs is None else _by_operations(programs, check.dtype, evidence.kinds)
            found = found or _only_there(evidence, how)
            return Explanation(found and found.path, f"{words}: {found.cause}" if found else words)
    return None


def _only_there(evidence: Evidence, how: str) -> Explanation | None:
    """Return the functions that are called otherwise with inputs of another size alone, such as resizing."""
    known = set(map(str, evidence.differences))
    there = [one for one in (evidence.differences_at(how) if how in SIZES else []) if one.attribute in FUNCTIONAL]
    new = [one for one in there if str(one) not in known]
    return Explanation(shown_path(new[0].path), listed(new, 3, between="; ")) if new else None


def _gradients(evidence: Evidence) -> Explanation | None:
    """Return the module whose backward pass is wrong: the last of those with wrong gradients."""
    names = [check.name for check in evidence.wrong if check.level == "gradients"]
    if not names or any(check.level in ("forward", "layers") for check in evidence.wrong):
        return None
    named = [name for name in names if name != "input"]
    begins = named[-1] if named else "the input"
    return Explanation(
        _owner(named[-1]) if named else None, f"the outputs agree, the gradients do not, from {begins} backwards"
    )


def _draws(evidence: Evidence) -> Explanation | None:
    drawn = [evidence.draws.get(twin, ()) for twin in TWINS]
    masks = [without_single_numbers(draws) for draws in drawn]
    return _differing_draws(*masks) or _differing_draws(*drawn)  # single numbers may decide nothing


def _differing_draws(torch: Sequence[Draw], jax: Sequence[Draw]) -> Explanation | None:
    """Return the first dropout mask that one twin alone draws, or otherwise than the other."""
    differing = next((n for n, pair in enumerate(zip(torch, jax, strict=False)) if not correspond(*pair)), None)
    if differing is None and len(torch) == len(jax):
        return None
    first = min(len(torch), len(jax)) if differing is None else differing
    longer_first = sorted((torch, jax), key=len, reverse=True)
    where = next((drawn[first].where for drawn in longer_first if first < len(drawn)), "")
    counts = f"{len(torch)} dropout masks in torch, {len(jax)} in jax"
    return Explanation(shown_path(where), f"{counts}; they differ from mask {first + 1} on, in {shown_path(where)}")


def _training(evidence: Evidence) -> Explanation | None:
    rows = [check for check in evidence.wrong if check.level == "training"]
    if not rows:
        return None
    names = [check.name.partition(": ")[2] for check in rows]
    if all(name.endswith(("running_mean", "running_var", "num_batches_tracked")) for name in names):
        return _running_statistics(evidence, names)
    if stale := _stale_statistics(evidence, names):
        owner, twin = stale
        how = "BatchNorm there computes with them in training, as in eval mode"
        return Explanation(owner, f"the running statistics of {owner} stay as they were in {twin}: {how}")
    optimizers = {check.name.partition(": ")[0] for check in rows}
    if len(optimizers) > 1:
        return Explanation(None, "the twins diverge in training alone")
    kinds = sorted({name.partition(" of ")[0] for name in names if " of " in name})
    how = f"its {' and '.join(kinds)} differ" if kinds else "its state agrees, its weights do not"
    missing = next((f" ({check.note})" for check in rows if check.note), "")
    return Explanation(None, f"only {optimizers.pop()} gives other weights: {how}{missing}")


def _running_statistics(evidence: Evidence, names: Sequence[str]) -> Explanation:
    """Return why BatchNorm's running statistics alone differ."""
    owner = _owner(names[0])
    if stale := _stale_statistics(evidence, names):
        return Explanation(stale[0], f"the running statistics of {stale[1]} stay as they were (stale buffers)")
    if all(name.endswith("running_var") for name in names):
        how = "one twin keeps the biased variance (n), the other the unbiased one (n - 1)"
        return Explanation(owner, f"running_var alone differs: {how}")
    return Explanation(owner, f"the running statistics of {owner} are updated differently: their momentum")


def _stale_statistics(evidence: Evidence, names: Sequence[str]) -> tuple[str, str] | None:
    """Return the first module whose running statistics one twin alone keeps as they were, and which twin."""
    for name in names:
        if name.endswith(("running_mean", "running_var")):
            same = [
                twin
                for twin in TWINS
                if _same(evidence.trained.get(twin, {}).get(f"SGD: {name}"), evidence.weights[twin].get(name))
            ]
            if len(same) == 1:
                return _owner(name), same[0]
    return None


def _same(after: object, before: object) -> bool:
    return after is not None and before is not None and bool((after == before).all())  # type: ignore[attr-defined]


RULES: tuple[Callable[[Evidence], Explanation | None], ...] = (
    _weights,
    _products,
    _isolated,
    _draws,
    _attributes,
    _operations,
    _output,
    _rounding,
    _repeated,
    _gradients,
    _training,
)


def _owner(weight: str) -> str:
    return shown_path(weight.rpartition(".")[0])
