"""What is said of weights without counterpart in a trace. Imports no framework."""

from collections.abc import Mapping

from outlook_common.text import closest, listed
from outlook_parity.mapping.infer import TorchLeaf, usual_name
from outlook_parity.mapping.names import Names, is_counter

Shapes = Mapping[str, tuple[int, ...]]

# Of how many weights the nearest name is looked up and said.
_LISTED = 3

_WHAT_TO_DO = "--map says what corresponds to what, and `outlook compare` refuses traces of other weights"


def note_on_names(names: Names, torch: Mapping[str, TorchLeaf], flax: Shapes, trace: str) -> str | None:
    """Return what weights have no counterpart, in words; None if each has one.

    Args:
        names: see `derive_names`.
        torch: the weights of the trace.
        flax: shapes of the weights of the model by path.
        trace: what the trace is called.

    Raises:
        ValueError: no weight of the model has one.
    """
    found = {names.by_flax[path].torch for path in flax}
    here = [path for path in flax if names.by_flax[path].torch not in torch]
    there = {name: leaf.shape for name, leaf in torch.items() if name not in found and not is_counter(name)}
    every, parts = bool(flax) and len(here) == len(flax), []
    if here:
        near = [f"{path}{_near(names, path, flax[path], there)}" for path in here[:_LISTED]]
        count = f"none of {len(flax)} weights has a" if every else f"{len(here)} of {len(flax)} weights have no"
        parts.append(f"{count} counterpart in {trace}: {listed([*near, *here[_LISTED:]], _LISTED)}")
    if there:
        parts.append(f"{len(there)} of {len(torch)} weights of {trace} have no counterpart here: {listed(there)}")
    if not parts:
        return None
    told = "; ".join([*parts, _WHAT_TO_DO])
    if every:
        raise ValueError(told)
    return told


def _near(names: Names, path: str, shape: tuple[int, ...], there: Shapes) -> str:
    """Return the nearest name that has no counterpart either, in brackets, of the same shape if any is; "" if none."""
    owner, _, leaf = path.rpartition(".")
    wanted = usual_name(names.module(owner), leaf)
    alike = [name for name, other in there.items() if sorted(other) == sorted(shape)]
    close = closest(wanted, alike) or (alike[0] if len(alike) == 1 else closest(wanted, there))
    return f" (nearest there: {close})" if close else ""
