"""Evidence from runs in float64: casts that were lifted, and float32 constants. Imports no framework.

In the truth run a cast to float32 inside a model gives float64 instead, in both twins. What was rounded to float32
before the model saw it (a table of rotary embeddings) stays so.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import numpy as np

from outlook_parity.core.precision import TRUTH
from outlook_parity.core.recorder import Recorder
from outlook_parity.core.request import Request


@dataclass
class Truth:
    """What the runs of one twin in float64 showed.

    Attributes:
        lifted: module path -> how often numbers that it asked for in float32 were kept in float64.
        constants: module path -> float32 constants that it uses, in words; under None those whose module is unknown.
        unlifted: why casts to float32 stayed, None if they were lifted.
    """

    lifted: Counter[str] = field(default_factory=Counter)
    constants: dict[str | None, set[str]] = field(default_factory=dict)
    unlifted: str | None = None

    def lifts(self, request: Request) -> bool:
        """Whether casts are to be lifted in this run."""
        return request.dtype == TRUTH and self.unlifted is None

    def saw_constant(self, path: str | None, values: Any, name: str = "") -> None:
        """Note an array in float32, unless it has numbers that float32 holds exactly, as masks and positions do."""
        if is_rounded(array := np.asarray(values)):
            words = f"{name or 'a constant'} of shape {array.shape}"
            self.constants.setdefault(path, set()).add(words)


# Numbers with so few bits were hardly rounded: 0.5, 1024, 0.0625, -1e9 by chance.
FEW_BITS = 16


def is_rounded(array: np.ndarray) -> bool:
    """Whether an array is float32 and its numbers use the last bits of it, as rounded ones do."""
    if array.dtype not in (np.dtype(np.float32), np.dtype(np.complex64)) or array.size == 0:
        return False
    parts = np.ascontiguousarray(array).view(np.float32)
    finite = parts[np.isfinite(parts)] if parts.ndim else parts.reshape(1)
    low = (1 << (23 - FEW_BITS)) - 1
    return bool((np.ascontiguousarray(finite).view(np.uint32) & low).any())


def or_unlifted(run: Callable[..., Any]) -> Callable[..., Any]:
    """Let a runner's method run again as the model is, where it fails with its casts lifted."""

    @wraps(run)
    def call(self: Any, request: Request, *args: Any, **options: Any) -> Any:
        truth: Truth = self.truth
        if not truth.lifts(request):
            return run(self, request, *args, **options)
        try:
            return run(self, request, *args, **options)
        except Exception as error:
            for recorder in args:
                if isinstance(recorder, Recorder):
                    recorder.forget()
            truth.unlifted = f"{type(error).__name__}: {error}".partition("\n")[0]
            try:
                return run(self, request, *args, **options)
            except Exception:
                truth.unlifted = None  # it fails either way: the casts are not why
                raise

    return call
