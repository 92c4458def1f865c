"""Make the figures of README.md and the pages: `python -m docs.figures`, into docs/images/. Needs `[parity]`.

- outlook_attention.svg: one window, the weights that its centre predicts, their sums, and the fold. Computed by the
  op, on a real photo; the linear layer that predicts the weights is random.
- verdict.svg: what `outlook verify --level forward --level layers` prints for the first port of docs/port-a-model.md.
"""

import re
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.patches import ConnectionPatch, Rectangle
from rich.console import Console
from rich.terminal_theme import TerminalTheme
from sklearn.datasets import load_sample_image

import outlook_torch

DOCS = Path(__file__).parent
IMAGES = DOCS / "images"

PIXELS = 7  # of a side of the map
K = 3
CENTRE = (2, 4)  # of the window that is shown
NEXT = (4, 5)  # of a window that overlaps it
INK, FIRST, SECOND = "#1f2328", "#d1242f", "#0969da"


def main() -> None:
    """Write both figures."""
    IMAGES.mkdir(exist_ok=True)
    with mpl.rc_context({"svg.hashsalt": "outlook", "font.size": 11, "text.color": INK, "font.family": "DejaVu Sans"}):
        attention(IMAGES / "outlook_attention.svg")
    verdict(IMAGES / "verdict.svg")


def attention(path: Path) -> None:
    """Draw the four steps of outlook attention at one window."""
    image = _photo()
    weights, summed, folded = _compute(image)
    row, column = CENTRE
    figure, axes = plt.subplots(1, 4, figsize=(11.6, 3.5), width_ratios=[1, 1.25, 0.72, 1])

    _grid(axes[0], image, "1  one window of the map")
    _frame(axes[0], CENTRE, FIRST, fill=False)
    axes[0].add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, ec=FIRST, lw=1.2))
    axes[0].plot(column, row, "o", color=FIRST, ms=5)

    axes[1].imshow(weights, cmap="Reds", vmin=0, vmax=weights.max())
    _cells(axes[1], K * K)
    axes[1].set_title("2  its centre predicts 9 × 9 weights", fontsize=11, loc="left")
    axes[1].set_xlabel("input position q", fontsize=9)
    axes[1].set_ylabel("output position p", fontsize=9)
    chosen = 5
    axes[1].add_patch(Rectangle((-0.5, chosen - 0.5), K * K, 1, fill=False, ec=INK, lw=1.4))

    _grid(axes[2], summed, "3  9 weighted sums")
    _frame(axes[2], (1, 1), FIRST, fill=False)
    axes[2].add_patch(
        Rectangle((chosen % K - 0.5, chosen // K - 0.5), 1, 1, fill=False, ec=INK, lw=1.6, joinstyle="round")
    )

    _grid(axes[3], folded, "4  fold: windows add up")
    _frame(axes[3], CENTRE, FIRST, fill=False)
    _frame(axes[3], NEXT, SECOND, fill=False)

    _arrow(figure, axes[0], (column, row), axes[1], (-0.6, 1))
    _arrow(figure, axes[1], (K * K - 0.4, chosen), axes[2], (chosen % K - 0.45, chosen // K))
    _arrow(figure, axes[2], (K - 0.5, 1), axes[3], (column - 1.45, row))
    figure.subplots_adjust(left=0.012, right=0.985, top=0.9, bottom=0.09, wspace=0.24)
    figure.savefig(path, metadata={"Date": None}, facecolor="white")
    plt.close(figure)


def _photo() -> np.ndarray:
    """Return a part of a photo as PIXELS × PIXELS colours from 0 to 1."""
    photo = load_sample_image("flower.jpg")[20:420, 130:530].astype(float) / 255
    side = photo.shape[0] // PIXELS
    part = photo[: side * PIXELS, : side * PIXELS]
    return part.reshape(PIXELS, side, PIXELS, side, 3).mean((1, 3))


def _compute(image: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the window's weights, its sums as colours, and the map after the fold as colours."""
    torch.manual_seed(0)
    value = torch.from_numpy(image)[None, :, :, None]  # B H W N D: one head of three channels, its colours
    logits = 6 * torch.nn.Linear(3, K**4).double()(torch.from_numpy(image)).reshape(1, PIXELS, PIXELS, 1, K**2, K**2)
    with torch.no_grad():
        folded = outlook_torch.outlook_attention(value, logits)[0, :, :, 0].numpy()
        weights = logits.softmax(-1)[0, *CENTRE, 0].numpy()
    row, column = CENTRE
    window = image[row - 1 : row + 2, column - 1 : column + 2].reshape(K * K, 3)
    summed = (weights @ window).reshape(K, K, 3)
    return weights, summed, folded / folded.max()


def _grid(axes: Axes, image: np.ndarray, title: str) -> None:
    axes.imshow(image.clip(0, 1))
    _cells(axes, image.shape[0])
    axes.set_title(title, fontsize=11, loc="left")


def _cells(axes: Axes, side: int) -> None:
    """Draw the lines between cells, and no ticks."""
    axes.set_xticks(np.arange(side + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(side + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", lw=0.8)
    axes.tick_params(which="both", length=0, labelbottom=False, labelleft=False)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _frame(axes: Axes, centre: tuple[int, int], colour: str, *, fill: bool) -> None:
    row, column = centre
    axes.add_patch(Rectangle((column - 1.5, row - 1.5), K, K, fill=fill, ec=colour, lw=2.4, clip_on=False))


def _arrow(figure: plt.Figure, a: Axes, start: tuple[float, float], b: Axes, end: tuple[float, float]) -> None:
    figure.add_artist(
        ConnectionPatch(start, end, a.transData, b.transData, arrowstyle="-|>", color=INK, lw=1.2, mutation_scale=12)
    )


# A page shows it as an image, which loads no fonts from elsewhere: Rich's own format would ask for one.
SVG = """<svg viewBox="0 0 {width} BOTTOM" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{ font: {char_height}px ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; }}
{styles}
</style>
<rect width="{width}" height="BOTTOM" rx="12" fill="#0d1117"/>
<g transform="translate({terminal_x}, 16)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g></g></svg>
"""
THEME = TerminalTheme(
    (13, 17, 23),
    (230, 237, 243),
    [
        *((72, 79, 88), (255, 123, 114), (86, 211, 100), (227, 179, 65)),
        *((121, 192, 255), (210, 168, 255), (86, 212, 221), (230, 237, 243)),
    ],
)


def verdict(path: Path) -> None:
    """Print the report of the tutorial's first port as a terminal would."""
    from outlook_parity import NameMap, verify
    from outlook_parity.report.terminal import print_report

    files = dict(
        re.findall(r"^```python\n# (convnext_\w+)\.py\n(.*?)^```$", _tutorial(), flags=re.DOTALL | re.MULTILINE)
    )
    command = re.search(r"^\$ (outlook verify --torch .*)$", _tutorial(), flags=re.MULTILINE)
    assert command is not None
    with TemporaryDirectory() as folder:
        for name, text in files.items():
            (Path(folder) / f"{name}.py").write_text(text)
        sys.path.insert(0, folder)
        import convnext_jax
        import convnext_torch

        images = np.random.default_rng(0).standard_normal((2, 16, 16, 3))
        names = NameMap(torch_axes=(0, 3, 1, 2))
        models = convnext_torch.model(), convnext_jax.model()
        report = verify(*models, images, names=names, levels=("forward", "layers"))
    console = Console(width=96, record=True, force_terminal=True, color_system="truecolor", file=sys.stderr)
    shown = f"$ {command[1]} --level forward --level layers".replace(" --inputs", " \\\n      --inputs")
    console.print(shown, style="bold", highlight=False)
    print_report(report, console)
    drawn = console.export_svg(title="", theme=THEME, code_format=SVG, unique_id="verdict")
    drawn = re.sub(r' clip-path="[^"]*"', "", drawn)  # of a definition that this format leaves out
    bottom = max(float(y) for y in re.findall(r'y="([\d.]+)" textLength', drawn))
    drawn = drawn.replace("BOTTOM", f"{bottom + 40:.0f}")
    path.write_text("\n".join(line.rstrip() for line in drawn.splitlines() if line.strip()) + "\n")


def _tutorial() -> str:
    return (DOCS / "port-a-model.md").read_text()


if __name__ == "__main__":
    main()
