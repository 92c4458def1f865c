"""The named cases of the op, shared by the tests and the benchmarks."""

from dataclasses import dataclass, replace

from outlook_common import WindowGrid, window_grid
from outlook_common.geometry import IntOrPair


@dataclass(frozen=True)
class Case:
    """One geometry; letters as in `outlook_common.geometry`."""

    name: str
    H: int
    W: int
    N: int
    D: int
    kernel_size: IntOrPair = 3
    stride: IntOrPair = 1
    padding: IntOrPair = 1
    B: int = 2

    @property
    def grid(self) -> WindowGrid:
        """The windows on the map."""
        return window_grid((self.H, self.W), self.kernel_size, self.stride, self.padding)

    @property
    def value_shape(self) -> tuple[int, ...]:
        """(B, H, W, N, D)."""
        return (self.B, self.H, self.W, self.N, self.D)

    @property
    def logits_shape(self) -> tuple[int, ...]:
        """(B, h, w, N, K·K, K·K)."""
        return (self.B, *self.grid.grid, self.N, self.grid.places, self.grid.places)

    @property
    def dim(self) -> int:
        """Channels of the layer, N * D."""
        return self.N * self.D

    @property
    def window(self) -> dict[str, IntOrPair]:
        """The keyword arguments of the op."""
        return {"kernel_size": self.kernel_size, "stride": self.stride, "padding": self.padding}

    def with_batch(self, batch: int) -> "Case":
        """Return the same geometry with another batch size."""
        return replace(self, B=batch)


CASES = (
    Case("volo_d1", 28, 28, 6, 32, stride=2),
    Case("volo_d2", 28, 28, 8, 32, stride=2),
    Case("volo_d4", 28, 28, 12, 32, stride=2, B=1),
    Case("seed_512", 28, 28, 1, 512, B=1),
    Case("seed_512_8_heads", 28, 28, 8, 64, B=1),
    Case("large_map", 56, 56, 2, 16, stride=2, B=1),
    Case("small_map", 7, 7, 4, 8),
    Case("kernel_5", 14, 14, 3, 8, kernel_size=5, padding=2),
    Case("kernel_5_stride_2", 13, 9, 2, 4, kernel_size=5, stride=2, padding=2),
    Case("kernel_1", 5, 6, 2, 3, kernel_size=1, padding=0),
    Case("stride_not_dividing", 7, 9, 3, 4, stride=2),
    Case("stride_3", 10, 8, 2, 5, stride=3),
    Case("stride_beyond_the_map", 3, 2, 2, 4, stride=5),
    Case("gaps_between_windows", 7, 5, 1, 3, kernel_size=1, stride=3, padding=0),
    Case("windows_side_by_side", 8, 6, 2, 3, kernel_size=2, stride=2, padding=0),
    Case("even_kernel", 8, 10, 2, 3, kernel_size=4, stride=2, padding=1),
    Case("rectangular", 9, 8, 2, 3, kernel_size=(3, 5), stride=(2, 1), padding=(1, 2)),
    Case("rectangular_kernel_1_by_3", 4, 6, 2, 3, kernel_size=(1, 3), stride=(1, 2), padding=(0, 1)),
    Case("one_pixel", 1, 1, 2, 3, B=3),
    Case("one_row", 1, 9, 2, 3, stride=2),
    Case("one_column", 8, 1, 2, 3, stride=2),
    Case("one_channel", 5, 5, 1, 1, B=1),
)

BY_NAME = {case.name: case for case in CASES}
