"""Exact arithmetic, and compilation that is quick or done before, for every process that runs the tests' models."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import torch

# Of XLA, for models that compile for longer than they run: no optimizations, and no fusions by way of MLIR, which take
# twice as long as all else. Newer versions lack that option, and end where it is given.
QUICKLY: dict[str, Any] = {"xla_backend_optimization_level": 0}
if jax.__version_info__ < (0, 11):
    QUICKLY["xla_cpu_use_fusion_emitters"] = False
# The same for a process.
QUICK_FLAGS = " ".join(f"--{name}={str(value).lower()}" for name, value in QUICKLY.items())


def make_exact() -> None:
    """Allow float64 in JAX, and products of full precision only in both frameworks."""
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_default_matmul_precision", "highest")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


@contextmanager
def kept_compilations(store: Path, limit: int = 4 << 30) -> Iterator[None]:
    """Keep what XLA compiles, and read what earlier processes left in the store.

    Many tests verify the same small models, each time by new functions, so that JAX would compile them again. The key
    of an entry is the program with all options of its compilation. JAX writes entries without a lock, so each process
    has a folder of its own, of links, and adds to the store what is whole when it ends. A store of more than `limit`
    bytes is begun anew. Processes that a test starts do without.
    """
    if sum(entry.stat().st_size for entry in store.glob("*-cache")) > limit:
        for entry in store.glob("*-cache"):
            entry.unlink(missing_ok=True)
    with TemporaryDirectory(dir=store) as name:
        own = Path(name)
        for entry in store.glob("*-cache"):
            os.link(entry, own / entry.name)
        jax.config.update("jax_compilation_cache_dir", name)
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")  # their path would be part of every key
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        yield
        for entry in own.glob("*-cache"):
            with suppress(FileExistsError):
                os.link(entry, store / entry.name)
