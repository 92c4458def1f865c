"""Pictures of a verification: the photo beside where, or in which tensors, the twins' results differ."""

from pathlib import Path
from typing import Any

import numpy as np

from outlook_common.extras import require
from outlook_parity.report.report import Report, sentence

# Ink and paper of the figure.
INK, PAPER, FAINT = "#1b1f24", "#ffffff", "#6b7480"


def save_plot(path: Path, photo: np.ndarray, difference: np.ndarray, report: Report) -> None:
    """Write the picture.

    Args:
        path: its suffix decides the format.
        photo: (H, W, 3) bytes.
        difference: (h, w, C), |jax - torch| in float32, in units of rounding.
        report: for the title.

    Raises:
        ValueError: the format is unknown.
        OSError: the file cannot be written.
    """
    places = difference.max(axis=-1)
    figure = _figure(report)
    seen, where, how_often = figure.subplots(1, 3, width_ratios=(1, 1.17, 1.1))
    _show_photo(seen, photo)

    unit = "|JAX − PyTorch|, units of float32 rounding\n(2⁻²³ of the outputs' RMS)"
    heat = where.imshow(places, cmap="magma", vmin=0.0)
    where.set_title("where the twins' outputs differ (largest over channels)", fontsize=11, color=INK)
    where.set_xlabel(f"{places.shape[1]} places", color=FAINT)
    where.set_ylabel(f"{places.shape[0]} places", color=FAINT)
    where.set(xticks=[], yticks=[])
    bar = figure.colorbar(heat, ax=where, fraction=0.046, pad=0.03)
    bar.set_label(unit, color=INK)
    bar.outline.set_visible(False)

    how_often.hist(difference.ravel(), bins=24, color="#3b528b")
    how_often.set_yscale("log")
    how_often.set_title(f"all {difference.size:,} outputs", fontsize=11, color=INK)
    how_often.set_xlabel(unit, color=INK)
    how_often.set_ylabel("outputs", color=INK)
    how_often.set_xlim(left=0.0)
    how_often.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def save_model_plot(path: Path, photo: np.ndarray, report: Report) -> None:
    """Write the picture of a whole model: how exact either twin's gradients are, parameter by parameter.

    Args:
        path: its suffix decides the format.
        photo: (H, W, 3) bytes.
        report: with gradients in float64 or a lower precision.

    Raises:
        ValueError: the format is unknown.
        OSError: the file cannot be written.
    """
    figure = _figure(report)
    seen, exact, noisy = figure.subplots(1, 3, width_ratios=(1, 1.3, 1.3))
    _show_photo(seen, photo)

    rows = [check for check in report.checks if check.level == "gradients" and check.name != "input"]
    in_float64 = [check for check in rows if check.dtype == "float64"]
    exact.semilogy([check.measured or np.nan for check in in_float64], ".", color="#3b528b", markersize=4)
    exact.set_title("gradients in float64: JAX against PyTorch", fontsize=11, color=INK)
    exact.set_ylabel("relative error", color=INK)
    if in_float64:
        exact.axhline(in_float64[0].bound, color="#c62828", linewidth=1)
        exact.text(0, in_float64[0].bound / 2, "bound", color="#c62828", fontsize=9, va="top")

    lower = [check for check in rows if check.torch_noise and check.jax_noise]
    lower = [check for check in lower if check.dtype == lower[0].dtype]
    for twin, marker, colour in (("torch", "o", "#e0633a"), ("jax", "x", "#3b528b")):
        noises = [getattr(check, f"{twin}_noise").rms for check in lower]
        noisy.semilogy(noises, marker, color=colour, markersize=3.5, fillstyle="none", label=f"{NAMES[twin]}")
    what = lower[0].dtype if lower else "a lower precision"
    noisy.set_title(f"gradients in {what}: each twin against the truth", fontsize=11, color=INK)
    noisy.set_ylabel(f"RMS error, units of {what} rounding", color=INK)
    noisy.legend(frameon=False)
    for axes, checks in ((exact, in_float64), (noisy, lower)):
        axes.set_xlabel(f"{len(checks)} parameters, from the images to the logits", color=INK)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


NAMES = {"torch": "PyTorch", "jax": "JAX"}


def _figure(report: Report) -> Any:
    """Return an empty figure with the verdict above."""
    require("matplotlib", extra="parity", needed_by="outlook verify --plot")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(rect=(0.005, 0.0, 0.99, 0.835), wspace=0.05)
    figure = Figure(figsize=(13.5, 4.9), dpi=150, facecolor=PAPER, layout=layout)
    FigureCanvasAgg(figure)
    verdict, _, findings = sentence(report).partition(": ")
    colour = {"pass": "#1a7f37", "mismatch": "#c62828"}.get(report.verdict, "#9a6700")
    figure.suptitle(verdict, fontsize=17, fontweight="bold", color=colour, x=0.012, y=0.975, ha="left")
    figure.text(0.012, 0.88, findings, fontsize=10.5, color=INK, ha="left", va="center")
    return figure


def _show_photo(axes: Any, photo: np.ndarray) -> None:
    axes.imshow(photo)
    axes.set_title("the photo", fontsize=11, color=INK)
    axes.set_xlabel(f"{photo.shape[1]} pixels", color=FAINT)
    axes.set_ylabel(f"{photo.shape[0]} pixels", color=FAINT)
    axes.set(xticks=[], yticks=[])
