"""Logical axes of every parameter, and rules that put them on the axes of a mesh of devices.

| axis | of |
|---|---|
| `embed` | the channels of a stage |
| `heads` | channels or logits of the heads, one head after the other |
| `qkv` | queries, keys and values one after the other, each of them by head: not split at the heads |
| `mlp` | the hidden channels of an MLP |
| `classes` | the classes |
| `stem` | the channels of the first convolutions |
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache

from outlook_common.text import closest, listed
from outlook_common.weights.tables.base import LAYOUTS, Entry

Axes = tuple[str | None, ...]

# Names in PyTorch -> axes of the weight in its layout; a bias or statistic has the first alone.
_TABLE: dict[str, Axes] = {
    r"norm\d?": ("embed",),
    r"pos_embed": (None, None, None, "embed"),
    r"cls_token": (None, None, "embed"),
    r"patch_embed\.conv\.\d+": ("stem", None, None, None),
    r"patch_embed\.proj": ("embed", None, None, None),
    r"network\.\d+\.proj": ("embed", None, None, None),  # downsampling: channels of two stages
    r"v|q|attn": ("heads", "embed"),
    r"qkv|kv": ("qkv", "embed"),
    r"proj": ("embed", "heads"),
    r"fc1": ("mlp", "embed"),
    r"fc2": ("embed", "mlp"),
    r"head|aux_head": ("classes", "embed"),
}
LOGICAL_AXES = tuple(dict.fromkeys(axis for axes in _TABLE.values() for axis in axes if axis is not None))

# What a logical axis is put on: an axis of the mesh, or several, the outermost first; None for none.
MeshAxes = str | Sequence[str] | None

# Rules -> logical axis -> the axis of the mesh, by the names that it may have there; all other axes are whole.
RULES: dict[str, dict[str, tuple[str, ...]]] = {
    "data": {},
    "fsdp": dict.fromkeys(("embed", "stem"), ("fsdp", "data")),
    "tensor": dict.fromkeys(("heads", "qkv", "mlp", "classes"), ("model", "tensor")),
}


def logical_axes(entry: Entry) -> Axes:
    """Return the logical axes of a parameter or buffer in PyTorch's layout, None for one that is never split.

    Raises:
        KeyError: its name is none of this package's.
    """
    return _axes_of_module(entry.torch.removesuffix(".weight"))[: len(entry.shape)]


@cache
def _axes_of_module(name: str) -> Axes:
    name = re.sub(r"\.(bias|running_mean|running_var|num_batches_tracked)$", "", name)
    for pattern, axes in _TABLE.items():
        if re.fullmatch(rf"(.*\.)?({pattern})", name):
            return axes
    raise KeyError(f"{name} has no logical axes; known are {', '.join(_TABLE)}")


def in_flax(entry: Entry, axes: Sequence[MeshAxes]) -> tuple[MeshAxes, ...]:
    """Return what stands for the axes in PyTorch's layout in the order of Flax's."""
    order = LAYOUTS[entry.layout]
    return tuple(axes) if order is None else tuple(axes[axis] for axis in order)


def rules_for(rules: str | Mapping[str, MeshAxes], mesh: Mapping[str, int]) -> dict[str, tuple[str, ...]]:
    """Return the axes of the mesh that each logical axis is put on; what is not there is whole.

    Args:
        rules: "data", "fsdp", "tensor", or own ones by logical axis.
        mesh: axis -> how many devices along it.

    Raises:
        ValueError: the rules, a logical axis or an axis of the mesh are unknown.
    """
    if isinstance(rules, str):
        if rules not in RULES:
            raise ValueError(f"unknown rules {rules!r}; known: {listed(RULES)}, or own ones by {listed(LOGICAL_AXES)}")
        found = {logical: next(filter(mesh.__contains__, names), None) for logical, names in RULES[rules].items()}
        if None in found.values():
            wanted = " or ".join(next(iter(RULES[rules].values())))
            raise ValueError(f"rules {rules!r} need a mesh with an axis {wanted}; it has {_shown(mesh)}")
        return {logical: (name,) for logical, name in found.items() if name is not None}
    for logical in rules:
        if logical not in LOGICAL_AXES:
            near = closest(logical, LOGICAL_AXES)
            hint = f"; did you mean {near!r}?" if near else ""
            raise ValueError(f"unknown logical axis {logical!r}; known: {listed(LOGICAL_AXES)}{hint}")
    own = {logical: (axes,) if isinstance(axes, str) else tuple(axes or ()) for logical, axes in rules.items()}
    if unknown := sorted({axis for axes in own.values() for axis in axes} - mesh.keys()):
        raise ValueError(f"the rules name the axes {listed(unknown)} of the mesh; it has {_shown(mesh)}")
    return own


def mesh_axes(
    entries: Iterable[Entry], mesh: Mapping[str, int], rules: str | Mapping[str, MeshAxes]
) -> dict[str, tuple[MeshAxes, ...]]:
    """Return PyTorch name -> what each axis, in PyTorch's layout, is put on.

    Raises:
        ValueError: as `rules_for`; or axes of the mesh do not divide those of parameters, with all numbers; or one is
            put on two axes of a parameter.
    """
    by_logical = rules_for(rules, mesh)
    found: dict[str, tuple[MeshAxes, ...]] = {}
    problems = []
    for entry in entries:
        axes = [by_logical.get(logical, ()) if logical else () for logical in logical_axes(entry)]
        for logical, size, on in zip(logical_axes(entry), entry.shape, axes, strict=True):
            devices = _product(mesh[axis] for axis in on)
            if size % devices:
                problems.append(f"{entry.torch}: {logical} of {size} on {'×'.join(on)} of {devices}")
        used = [axis for on in axes for axis in on]
        if len(set(used)) < len(used):
            raise ValueError(f"{entry.torch} {entry.shape}: the rules put two of its axes on {listed(set(used))}")
        found[entry.torch] = tuple(map(one_or_more, axes))
    if problems:
        shown = "; ".join(problems[:_MOST]) + (f"; and {len(problems) - _MOST} more" if len(problems) > _MOST else "")
        raise ValueError(f"the mesh {_shown(mesh)} does not divide {len(problems)} axes of parameters: {shown}")
    return found


def one_or_more(axes: tuple[str, ...]) -> MeshAxes:
    """Return axes of a mesh as a partition spec has them: None for none, one by its name."""
    return axes if len(axes) > 1 else next(iter(axes), None)


_MOST = 6  # problems that are named


def _product(sizes: Iterable[int]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total


def _shown(mesh: Mapping[str, int]) -> str:
    return f"({', '.join(f'{name}={size}' for name, size in mesh.items())})"
