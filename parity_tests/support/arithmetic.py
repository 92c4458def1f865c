"""Exact arithmetic, and compilation that is quick or done before, for every process that runs the tests' models."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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


def keep_compiled(folder: Path) -> None:
    """Keep in a folder what XLA compiles in this process, and read it back from there.

    Many tests verify the same small models, each time by new functions, so that JAX would compile them again. The key
    of an entry is the program with all options of its compilation. Processes that a test starts do without: it may kill
    them, and JAX writes entries without a lock.
    """
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
