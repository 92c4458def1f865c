"""How maps are resized, in words shared by both frameworks. Imports no framework."""

from collections.abc import Sequence
from typing import Any

LINEAR, CUBIC = "linear", "cubic"

# Attributes.
INTERPOLATION, SCALE = "interpolation", "scale of resizing"

# Names of methods -> the method, and the `a` of its cubic kernel without antialiasing.
METHODS: dict[str, str] = {
    **dict.fromkeys(("linear", "bilinear", "trilinear", "triangle"), LINEAR),
    **dict.fromkeys(("cubic", "bicubic", "tricubic"), CUBIC),
}

# Without antialiasing; with it both have -0.5.
TORCH_A, JAX_A = -0.75, -0.5


def resizing(
    method: str,
    old: Sequence[int],
    new: Sequence[int],
    scales: Sequence[float] | None = None,
    *,
    antialias: bool = False,
    a: float = JAX_A,
    corners: bool = False,
) -> dict[str, Any]:
    """Return the attributes of one resizing; none where nothing is resized.

    Args:
        method: as the framework calls it.
        old: the sizes before.
        new: the sizes after.
        scales: by which positions are multiplied, None for `new` / `old`.
        antialias: whether it is asked for: upsampling has none.
        a: of a cubic kernel without antialiasing.
        corners: whether the outermost places stay where they are.
    """
    scales = [after / before for before, after in zip(old, new, strict=True)] if scales is None else scales
    changing = [float(f"{scale:.6g}") for scale in scales if abs(scale - 1) > 1e-9]
    if not changing:
        return {}
    words = [METHODS.get(method, method)]
    if words[0] in (LINEAR, CUBIC):
        smaller = min(changing) < 1
        if words[0] == CUBIC:
            words.append(f"a = {JAX_A if antialias and smaller else a}")
        if smaller:
            words.append(f"{'with' if antialias else 'without'} antialiasing")
    elif words[0] == "nearest" and all(scale == int(scale) for scale in changing):
        words = ["nearest"]  # from whichever corner
    found: dict[str, Any] = {INTERPOLATION: ", ".join([*words, *(["corners aligned"] if corners else [])])}
    if not corners:
        found[SCALE] = changing[0] if len(set(changing)) == 1 else tuple(changing)
    return found
