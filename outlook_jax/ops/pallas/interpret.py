"""Whether kernels are interpreted where there is no TPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import jax

_interpreted = ContextVar("outlook_pallas_interpreted", default=False)


@contextmanager
def interpreted() -> Iterator[None]:
    """Trace "pallas" within this context to run it on any device: its kernels become ordinary operations, slow ones."""
    token = _interpreted.set(True)
    try:
        yield
    finally:
        _interpreted.reset(token)


def is_interpreted() -> bool:
    """Return whether this runs within `interpreted()`."""
    return _interpreted.get()


def on_tpu_or_interpreted() -> bool:
    """Return whether kernels run on the default backend."""
    return is_interpreted() or jax.default_backend() == "tpu"
