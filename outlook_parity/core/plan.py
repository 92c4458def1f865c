"""What a verification runs: levels, precisions, and the passes over the twins that they take. No framework."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count

from outlook_parity.core.memory import release
from outlook_parity.core.precision import TRUTH

LEVELS = ("forward", "layers", "gradients", "training")
# What a trace of one twin can hold.
TRACED_LEVELS = ("forward", "layers", "gradients")
# Training steps with each optimizer, unless asked for others: from the second on its state counts.
STEPS = 3


@dataclass(frozen=True)
class Pass:
    """Runs of both twins in one precision.

    Attributes:
        levels: what they give rows of.
        runs: how many runs in float64.
        runs_below: how many in a lower precision, those of the float64 truth included.
    """

    levels: tuple[str, ...]
    runs: int
    runs_below: int


PASSES = {
    "evaluation": Pass(("forward", "gradients"), runs=2, runs_below=3),
    "layers": Pass(("layers",), runs=4, runs_below=5),
    "training": Pass(("training",), runs=2, runs_below=3),
}


@dataclass(frozen=True)
class Plan:
    """What one verification runs.

    Attributes:
        levels: what is compared.
        dtypes: the precisions.
        training_dtypes: those of `dtypes` to train in.
        device: "cpu", "gpu" or "tpu", of the lower precisions.
        seed: of everything random.
        steps: of training, with each optimizer.
        missing: precision -> why it cannot be had on the device.
        too_large: level -> why it does not fit into the memory that was given.
    """

    levels: Sequence[str]
    dtypes: Sequence[str]
    training_dtypes: Sequence[str]
    device: str = "cpu"
    seed: int = 0
    steps: int = 1
    missing: Mapping[str, str] = field(default_factory=dict)
    too_large: Mapping[str, str] = field(default_factory=dict)

    def absence(self, level: str, dtype: str) -> str | None:
        """Return why a level is not run in a precision, None if it is."""
        return self.missing.get(dtype) or self.too_large.get(level)

    @property
    def requested(self) -> list[tuple[str, str]]:
        """What is to be compared, as (level, precision): each once, in the order of `LEVELS`."""
        levels = [level for level in LEVELS if level in self.levels]
        return [
            (level, dtype)
            for dtype in dict.fromkeys(self.dtypes)
            for level in levels
            if level != "training" or dtype in self.training_dtypes
        ]

    @property
    def passes(self) -> list[tuple[str, str]]:
        """The passes to run, as (name, precision)."""
        possible = [(level, dtype) for level, dtype in self.requested if self.absence(level, dtype) is None]
        return list(dict.fromkeys((_pass_of(level), dtype) for level, dtype in possible))

    @property
    def runs(self) -> int:
        """How many runs of a twin the passes take."""
        return sum(PASSES[name].runs if dtype == TRUTH else PASSES[name].runs_below for name, dtype in self.passes)

    def levels_of(self, name: str) -> list[str]:
        """Return the levels that a pass gives rows of."""
        return [level for level in PASSES[name].levels if level in self.levels and level not in self.too_large]


def _pass_of(level: str) -> str:
    return next(name for name, one in PASSES.items() if level in one.levels)


# Called with what runs next, how many runs are done, and how many there are.
Progress = Callable[[str, int, int], None]


def run_counter(progress: Progress | None, total: int) -> Callable[..., None]:
    """Return a function to call before each run with what it is; `extra=True` if it was not among the `total`."""
    done = count()

    def step(what: str, *, extra: bool = False) -> None:
        nonlocal total
        total += extra
        release()
        if progress is not None:
            progress(what, next(done), total)

    return step
