"""Pictures of a report: the photo, and where or in which gradients the twins differ."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from outlook_common.extras import require
from outlook_parity.core.check import Check
from outlook_parity.report.report import Report, sentence

INK, PAPER, FAINT, RED = "#1b1f24", "#ffffff", "#6b7480", "#c62828"
COLOURS = {"torch": "#e0633a", "jax": "#3b528b"}
FRAMEWORK_NAMES = {"torch": "PyTorch", "jax": "JAX"}

UNIT = "|JAX − PyTorch|, units of float32 rounding\n(2⁻²³ of the outputs' RMS)"


def save_map(path: Path, photo: np.ndarray, difference: np.ndarray, report: Report) -> None:
    """Write the picture of a layer: the photo, where the outputs differ, and how many by how much.

    Args:
        path: its suffix is the format.
        photo: (H, W, 3) bytes.
        difference: (h, w, C), |jax - torch| in float32, in units of rounding.
        report: for the title.

    Raises:
        ValueError: the format is unknown.
        OSError: the file cannot be written.
    """
    figure = _figure(report)
    photo_axes, map_axes, histogram_axes = figure.subplots(1, 3, width_ratios=(1, 1.17, 1.1))
    _draw_photo(photo_axes, photo)
    _draw_map(figure, map_axes, difference.max(axis=-1))
    _draw_histogram(histogram_axes, difference)
    figure.savefig(path)


def save_gradients(path: Path, photo: np.ndarray, report: Report) -> None:
    """Write the picture of a whole model: the photo, and the error of each parameter's gradient in both twins.

    Args:
        path: its suffix is the format.
        photo: (H, W, 3) bytes.
        report: with gradients in float64 or a lower precision.

    Raises:
        ValueError: the format is unknown.
        OSError: the file cannot be written.
    """
    gradients = [check for check in report.checks if check.level == "gradients" and check.name != "input"]
    float64 = [check for check in gradients if check.dtype == "float64"]
    lower = [check for check in gradients if check.torch_noise and check.jax_noise]
    lower = [check for check in lower if check.dtype == lower[0].dtype]

    figure = _figure(report)
    photo_axes, error_axes, noise_axes = figure.subplots(1, 3, width_ratios=(1, 1.3, 1.3))
    _draw_photo(photo_axes, photo)
    _draw_errors(error_axes, float64)
    _draw_noise(noise_axes, lower)
    for axes, checks in ((error_axes, float64), (noise_axes, lower)):
        axes.set_xlabel(f"{len(checks)} parameters, from the images to the logits", color=INK)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def _draw_map(figure: Any, axes: Any, positions: np.ndarray) -> None:
    """Draw the largest difference of each position: (h, w)."""
    height, width = positions.shape
    image = axes.imshow(positions, cmap="magma", vmin=0.0)
    axes.set_title("where the twins' outputs differ (largest over channels)", fontsize=11, color=INK)
    axes.set_xlabel(f"{width} positions", color=FAINT)
    axes.set_ylabel(f"{height} positions", color=FAINT)
    axes.set(xticks=[], yticks=[])
    bar = figure.colorbar(image, ax=axes, fraction=0.046, pad=0.03)
    bar.set_label(UNIT, color=INK)
    bar.outline.set_visible(False)


def _draw_histogram(axes: Any, difference: np.ndarray) -> None:
    axes.hist(difference.ravel(), bins=24, color=COLOURS["jax"])
    axes.set_yscale("log")
    axes.set_title(f"all {difference.size:,} outputs", fontsize=11, color=INK)
    axes.set_xlabel(UNIT, color=INK)
    axes.set_ylabel("outputs", color=INK)
    axes.set_xlim(left=0.0)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_errors(axes: Any, checks: Sequence[Check]) -> None:
    """Draw the relative errors in float64, and their bound."""
    axes.semilogy([check.measured or np.nan for check in checks], ".", color=COLOURS["jax"], markersize=4)
    axes.set_title("gradients in float64: JAX against PyTorch", fontsize=11, color=INK)
    axes.set_ylabel("relative error", color=INK)
    if checks:
        axes.axhline(checks[0].bound, color=RED, linewidth=1)
        axes.text(0, checks[0].bound / 2, "bound", color=RED, fontsize=9, va="top")


def _draw_noise(axes: Any, checks: Sequence[Check]) -> None:
    """Draw each twin's error against the float64 truth in a lower precision."""
    for twin, marker in (("torch", "o"), ("jax", "x")):
        noise = [getattr(check, f"{twin}_noise").rms for check in checks]
        axes.semilogy(noise, marker, color=COLOURS[twin], markersize=3.5, fillstyle="none", label=FRAMEWORK_NAMES[twin])
    dtype = checks[0].dtype if checks else "a lower precision"
    axes.set_title(f"gradients in {dtype}: each twin against the truth", fontsize=11, color=INK)
    axes.set_ylabel(f"RMS error, units of {dtype} rounding", color=INK)
    axes.legend(frameon=False)


def _figure(report: Report) -> Any:
    """Return an empty figure under the verdict."""
    require("matplotlib", needed_by="outlook verify --plot")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(rect=(0.005, 0.0, 0.99, 0.835), wspace=0.05)
    figure = Figure(figsize=(13.5, 4.9), dpi=150, facecolor=PAPER, layout=layout)
    FigureCanvasAgg(figure)
    verdict, _, findings = sentence(report).partition(": ")
    colour = {"pass": "#1a7f37", "mismatch": RED}.get(report.verdict, "#9a6700")
    figure.suptitle(verdict, fontsize=17, fontweight="bold", color=colour, x=0.012, y=0.975, ha="left")
    figure.text(0.012, 0.88, findings, fontsize=10.5, color=INK, ha="left", va="center")
    return figure


def _draw_photo(axes: Any, photo: np.ndarray) -> None:
    axes.imshow(photo)
    axes.set_title("the photo", fontsize=11, color=INK)
    axes.set_xlabel(f"{photo.shape[1]} pixels", color=FAINT)
    axes.set_ylabel(f"{photo.shape[0]} pixels", color=FAINT)
    axes.set(xticks=[], yticks=[])
