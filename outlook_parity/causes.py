"""Where the twins first go different ways, and why, told from the rows. Imports no framework."""

from collections.abc import Callable, Mapping, Sequence

from outlook_parity.layers import Suspect, shown
from outlook_parity.masks import Draw
from outlook_parity.report import Check

Explanation = tuple[str | None, str | None]


def explain(checks: Sequence[Check], suspects: Sequence[Suspect], draws: Mapping[str, Sequence[Draw]]) -> Explanation:
    """Return the path of the first module that is wrong, and the cause in words; None where nothing is known."""
    wrong = [check for check in checks if check.verdict == "mismatch"]
    for rule in (_weights, _given(_alone, suspects), _gradients, _given(_training, draws)):
        found = rule(wrong)
        if found is not None:
            return found
    return None, None


def _given(rule: Callable[..., Explanation | None], *given: object) -> Callable[[Sequence[Check]], Explanation | None]:
    return lambda wrong: rule(wrong, *given)


def _weights(wrong: Sequence[Check]) -> Explanation | None:
    for check in wrong:
        if check.level == "weights":
            how = check.note or f"differs by {check.measured:.1e} of its largest"
            return _owner(check.name), f"weight {check.name}: {how}"
    return None


def _alone(wrong: Sequence[Check], suspects: Sequence[Suspect]) -> Explanation | None:
    """Return the first module that is wrong alone; in float64 if it shows there."""
    if not suspects:
        return None
    first = suspects[0]
    return shown(first.path), first.where and f"in {shown(first.path)}: {first.where}"


def _gradients(wrong: Sequence[Check]) -> Explanation | None:
    """Return the module whose backward pass is wrong: of those with wrong gradients the last, where that begins."""
    names = [check.name for check in wrong if check.level == "gradients"]
    if not names or any(check.level in ("forward", "layers") for check in wrong):
        return None
    named = [name for name in names if name != "input"]
    where = _owner(named[-1]) if named else None
    return where, f"the outputs agree, the gradients do not, from {named[-1] if named else 'the input'} backwards"


def _training(wrong: Sequence[Check], draws: Mapping[str, Sequence[Draw]]) -> Explanation | None:
    tensors = [check.name.partition(": ") for check in wrong if check.level == "training"]
    if not tensors:
        return None
    shapes = {twin: [draw.shape for draw in drawn] for twin, drawn in draws.items()}
    if len({tuple(drawn) for drawn in shapes.values()}) > 1:
        counts = ", ".join(f"{len(drawn)} in {twin}" for twin, drawn in shapes.items())
        return _first_other_draw(draws), f"the twins draw other dropout masks: {counts}"
    optimizers = sorted({optimizer for optimizer, _, _ in tensors})
    names = {name for _, _, name in tensors}
    if names and all(name.endswith(("running_mean", "running_var")) for name in names):
        first = next(name for _, _, name in tensors)
        only = "running_var" if all(name.endswith("running_var") for name in names) else "running statistics"
        return _owner(first), f"the {only} of {_owner(first)} move otherwise in one twin"
    if len(optimizers) == 1:
        return None, f"only {optimizers[0]} gives other weights: the optimizers differ"
    return None, "the twins go apart in training alone"


def _first_other_draw(draws: Mapping[str, Sequence[Draw]]) -> str | None:
    torch, jax = draws.get("torch", ()), draws.get("jax", ())
    for one, other in zip(torch, jax, strict=False):
        if one.shape != other.shape:
            return one.where
    longer = max(torch, jax, key=len)
    return longer[min(len(torch), len(jax))].where if len(torch) != len(jax) else None


def _owner(weight: str) -> str:
    return shown(weight.rpartition(".")[0])
