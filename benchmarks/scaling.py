"""Scaling of the layer's training step with pixels, batch, channels and kernel size."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from outlook_common.op_cases import BY_NAME, Case

BASE = replace(BY_NAME["volo_d1"], B=2)
# What grows, and the values it takes; the other sizes stay as in `BASE`.
AXES: dict[str, tuple[int, ...]] = {
    "pixels": (7, 14, 28, 56),
    "batch": (1, 2, 4, 8),
    "channels": (2, 4, 6, 12),
    "kernel size": (1, 3, 5, 7),
}
NAMES = ("timm", "torch composite", "torch reference", "jax composite", "jax reference")


def cases() -> Iterator[tuple[str, int, Case]]:
    """Yield (axis, size, case); sizes are total pixels or channels."""
    for axis, sizes in AXES.items():
        for size in sizes:
            change = {
                "pixels": {"H": size, "W": size},
                "batch": {"B": size},
                "channels": {"N": size},
                "kernel size": {"kernel_size": size, "padding": size // 2},
            }[axis]
            case = replace(BASE, **change)  # type: ignore[arg-type]
            yield axis, {"pixels": size * size, "channels": case.dim}.get(axis, size), case


def plot(path: Path, seconds: dict[str, dict[int, dict[str, float]]]) -> None:
    """Plot seconds, given as axis -> size -> contender -> seconds."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(seconds), figsize=(15, 4), sharey=True, layout="constrained")
    for panel, (axis, by_size) in zip(panels, seconds.items(), strict=True):
        for name in NAMES:
            times = [by_size[size][name] * 1e3 for size in by_size]
            style = {"linestyle": "--" if name.startswith("jax") else "-", "marker": "o", "markersize": 4}
            panel.plot(list(by_size), times, label=name, **style)
        panel.set(xscale="log", yscale="log", xlabel=axis, xticks=list(by_size), xticklabels=map(str, by_size))
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("forward + backward, ms")
    panels[0].legend(frameon=False)
    figure.savefig(path)
    pyplot.close(figure)
