"""Exact arithmetic and quick compilation, for every process that runs the tests' models."""

from collections.abc import Iterator
from contextlib import contextmanager

import jax
import torch


def make_exact() -> None:
    """Allow float64 in JAX, and products of full precision only in both frameworks."""
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_default_matmul_precision", "highest")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


@contextmanager
def quick_compilation() -> Iterator[None]:
    """Leave out XLA's optimizations: a small model takes longer to optimize than to run."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
