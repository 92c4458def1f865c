"""Merged taps of outlook attention along one axis: the displacements from a pixel to those it sums.

In padded coordinates pixel i is at x = i + P = S*c + r: cell c of phase r. Window c - m covers it at the window's
position p = r + S*m; position q of that window is d = q - p pixels further. So with A the weights of a window and

    W_r[c, d] = sum over m of A[c - m, r + S*m, r + S*m + d]

outlook attention followed by fold is one local weighted sum per phase, out[x] = sum over d of W_r[c, d] * value[x + d].
Rows and columns are independent.
"""

from dataclasses import dataclass

from outlook_common.geometry import WindowGrid


@dataclass(frozen=True)
class Phase:
    """The pixels S*c + r - P of one axis, for a fixed r.

    Attributes:
        places: p = r, r + S, …, their positions in a window, in the order of m.
        first_displacement: the smallest d; the largest is `first_displacement + displacements - 1`.
        displacements: number of d.
        first_pixel: the first pixel on the map.
        first_cell: its cell c.
        pixels: number of pixels of this phase on the map.
    """

    places: range
    first_displacement: int
    displacements: int
    first_pixel: int
    first_cell: int
    pixels: int

    def index(self, place: int, other: int) -> int:
        """Return the index, among this phase's displacements, of that from position `place` to position `other`."""
        return other - place - self.first_displacement


@dataclass(frozen=True)
class AxisTaps:
    """All phases of one axis.

    Attributes:
        size: of the map, in pixels.
        kernel_size: K.
        stride: S.
        windows: h, the number of windows.
        cells: number of cells that windows cover; pixels of later cells are covered by none.
        phases: by r.
    """

    size: int
    kernel_size: int
    stride: int
    windows: int
    cells: int
    phases: tuple[Phase, ...]


def axis_taps(grid: WindowGrid) -> tuple[AxisTaps, AxisTaps]:
    """Return the taps of the rows and of the columns of a map."""
    rows, columns = (
        _axis_taps(*sizes)
        for sizes in zip(grid.map_size, grid.kernel_size, grid.stride, grid.padding, grid.grid, strict=True)
    )
    return rows, columns


def _axis_taps(size: int, kernel_size: int, stride: int, padding: int, windows: int) -> AxisTaps:
    phases = []
    for r in range(stride):
        places = range(r, kernel_size, stride)
        first_cell, beyond = -((r - padding) // stride), (padding + size - 1 - r) // stride + 1
        phases.append(
            Phase(
                places=places,
                first_displacement=-places[-1] if places else 0,
                displacements=places[-1] + kernel_size - r if places else 0,
                first_pixel=stride * first_cell + r - padding,
                first_cell=first_cell,
                pixels=max(0, beyond - first_cell),
            )
        )
    return AxisTaps(size, kernel_size, stride, windows, windows + (kernel_size - 1) // stride, tuple(phases))
