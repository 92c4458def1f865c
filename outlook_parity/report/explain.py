"""The picture of `outlook explain`: a photo, and what a place and the class token of it mix in each block."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from outlook_common.explain import PlaceWeights
from outlook_common.extras import require
from outlook_parity.report.plot import FAINT, INK, PAPER

COLUMNS = 4
COLOURS, COVER = "coolwarm", 0.75
# The colour scale ends where a weight is this many times the panel's mean, or as many times smaller.
WIDEST = 8.0


def save_explanation(
    path: Path, title: str, photo: np.ndarray, place: tuple[int, int], found: Sequence[PlaceWeights], reach: int
) -> None:
    """Write the picture of what one place mixes in each outlooker, and the class token in each class block.

    Args:
        path: its suffix is the format.
        title: of the picture.
        photo: (H, W, 3) bytes, the model's input.
        place: (row, column) in pixels of the photo.
        found: of each block.
        reach: how many places of the map to show around `place`, on each side.

    Raises:
        ValueError: the format is unknown.
        OSError: the file cannot be written.
    """
    require("matplotlib", needed_by="outlook explain")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    ratios = [relative(weights.weights) for weights in found]
    widest = min(WIDEST, max(max(ratio.max(), 1 / ratio.min()) for ratio in ratios))
    norm = LogNorm(1 / widest, widest, clip=True)
    rows = -(-(len(found) + 1) // COLUMNS)
    figure = Figure(
        figsize=(13.5, 0.8 + 3.7 * rows), dpi=150, facecolor=PAPER, layout=ConstrainedLayoutEngine(hspace=0.06)
    )
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=14, fontweight="bold", color=INK)
    axes = figure.subplots(rows, COLUMNS, squeeze=False).ravel()
    grey = np.repeat(photo.mean(axis=-1, keepdims=True), 3, axis=-1).astype(np.uint8)

    axes[0].imshow(photo)
    axes[0].set_title("the photo, as the model sees it\n+ the place, dotted: what is enlarged", fontsize=10, color=INK)
    _mark(axes[0], place)
    for panel, weights, ratio in zip(axes[1:], found, ratios, strict=False):
        panel.imshow(grey)
        image = panel.imshow(_enlarged(ratio, grey), norm=norm, cmap=COLOURS, alpha=COVER, interpolation="nearest")
        _describe(panel, weights, grey.shape[:2], place, reach)
    for frame in {_view(panel) for panel, weights in zip(axes[1:], found, strict=False) if weights.kind == "outlook"}:
        _outline(axes[0], *frame)
    for panel in axes:
        panel.set(xticks=[], yticks=[])
    for panel in axes[1 + len(found) :]:
        panel.set_axis_off()
    bar = figure.colorbar(
        image, ax=axes.tolist(), fraction=0.025, pad=0.01, extend="both" if widest == WIDEST else "neither"
    )
    ticks = [tick for tick in (1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8) if 1 / widest <= tick <= widest]
    bar.set_ticks(ticks, labels=[f"{tick:g}×" for tick in ticks])
    bar.minorticks_off()
    bar.set_label("weight, mean over the heads, as a multiple of the panel's mean weight", color=INK)
    bar.outline.set_visible(False)
    figure.savefig(path)


def relative(weights: np.ndarray) -> np.ma.MaskedArray:
    """Return weights as multiples of their mean; those of zero, of places that are not mixed, are masked."""
    mixed = np.ma.masked_equal(weights, 0)
    return mixed / mixed.mean()


def _enlarged(values: np.ma.MaskedArray, photo: np.ndarray) -> np.ma.MaskedArray:
    """Return one value per pixel of the photo."""
    rows, columns = (side // count for side, count in zip(photo.shape, values.shape, strict=False))
    return values.repeat(rows, axis=0).repeat(columns, axis=1)


def _describe(panel: Any, weights: PlaceWeights, size: tuple[int, int], place: tuple[int, int], reach: int) -> None:
    """Write what a panel shows; of an outlooker show the neighbourhood alone."""
    block = weights.path.removesuffix(".attn")
    if weights.kind == "class":
        panel.set_title(f"class block {block}:\nwhat goes into the class token", fontsize=10, color=INK)
        panel.set_xlabel(f"besides {weights.rest:.1%} from itself", fontsize=9, color=FAINT)
        return
    panel.set_title(f"outlooker {block}:\nwhat goes into the marked patch", fontsize=10, color=INK)
    patch = [side // count for side, count in zip(size, weights.weights.shape, strict=True)]
    own = [at // step * step for at, step in zip(place, patch, strict=True)]
    ends = [
        (max(0, start - reach * step), min(side, start + (reach + 1) * step))
        for start, step, side in zip(own, patch, size, strict=True)
    ]
    (top, bottom), (left, right) = ends
    panel.set(xlim=(left - 0.5, right - 0.5), ylim=(bottom - 0.5, top - 0.5))
    _outline(panel, own[1] - 0.5, own[0] - 0.5, patch[1], patch[0], linestyle="-")
    _mark(panel, place)
    note = (
        f"enlarged: {(bottom - top) // patch[0]}×{(right - left) // patch[1]} patches of {patch[0]}×{patch[1]} pixels"
    )
    beyond = f"; {weights.rest:.0%} falls outside the photo" if weights.rest > 1e-6 else ""
    panel.set_xlabel(note + beyond, fontsize=9, color=FAINT)


def _view(panel: Any) -> tuple[float, float, float, float]:
    """Return what a panel shows, as left, top, width, height."""
    (left, right), (bottom, top) = panel.get_xlim(), panel.get_ylim()
    return left, top, right - left, bottom - top


def _mark(panel: Any, place: tuple[int, int]) -> None:
    for colour, width in ((PAPER, 5.0), (INK, 2.0)):
        panel.plot(place[1], place[0], "+", color=colour, markersize=13, markeredgewidth=width)


def _outline(panel: Any, left: float, top: float, width: float, height: float, linestyle: str = ":") -> None:
    from matplotlib.patches import Rectangle

    for colour, line in ((PAPER, 3.0), (INK, 1.2)):
        style = "-" if colour == PAPER else linestyle
        panel.add_patch(
            Rectangle((left, top), width, height, fill=False, color=colour, linewidth=line, linestyle=style)
        )
