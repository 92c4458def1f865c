"""Kill each recipe 20 times, amid steps and amid saves; losses must be those of a training that was never killed.

`python -m parity_tests.docs.kill_recipes [jax|torch] [data|fsdp]` prints how often what was going on, and how far the
losses are apart.
"""

import collections
import contextlib
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from examples.imagenet import log
from parity_tests.docs.test_recipes import FSDP, SMALL, kill, logged, run, start

KILLS = 20
PROCESSES = {"jax": 8, "torch": 2}
SHARDING = {"data": "", "fsdp": FSDP}
# What a save is called until it is whole, by Orbax and by the recipe for PyTorch.
UNFINISHED = ("*orbax-checkpoint-tmp*", "unfinished-*")
EPOCHS = 16
# A save that is not seen in so many steps is not waited for.
MOST_STEPS = 3
_CACHE_ALL = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
BOUND = 1e-12


def saving(folder: Path, since: float) -> bool:
    """Whether a save has begun since then and is not whole yet."""
    found = [path for name in UNFINISHED for path in (folder / "checkpoints").glob(name)]
    with contextlib.suppress(FileNotFoundError):  # whole meanwhile
        return any(path.stat().st_mtime > since for path in found)
    return False


def kill_once(framework: str, recipe: Path, folder: Path, rng: np.random.Generator) -> str:
    """Start or go on, kill at a random moment; return what was going on."""
    before, amid_save, began = logged(folder), rng.random() < 0.5, time.time()
    process = start(framework, recipe, folder, PROCESSES[framework])
    wanted = before + int(rng.integers(1, 4))
    while process.poll() is None:
        done = logged(folder)
        if done >= wanted and (not amid_save or saving(folder, began) or done >= wanted + MOST_STEPS):
            break
        time.sleep(0.002)
    if process.poll() is not None:
        return "ended before"
    time.sleep(float(rng.uniform(0, 0.02 if amid_save else 0.2)))
    was_saving = saving(folder, began)
    kill(process)
    return "amid a save" if was_saving else "amid steps"


def furthest(whole: Path, killed: Path) -> float:
    """Return the largest relative difference of what was logged; infinity if other steps were."""
    ours, theirs = log.read(killed), log.read(whole)
    if ours.keys() != theirs.keys():
        return float("inf")
    pairs = [(ours[step][name], value) for step, values in theirs.items() for name, value in values.items()]
    return max(abs(one - other) / abs(other) if other else abs(one) for one, other in pairs)


def main(framework: str, sharding: str) -> float:
    """Train whole, and killed; print and return how far they are apart."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        # JAX's programs are compiled once, not after each kill.
        os.environ |= {"JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"), **_CACHE_ALL}
        recipe = folder / "small.toml"
        recipe.write_text(SMALL.replace("epochs = 4", f"epochs = {EPOCHS}") + SHARDING[sharding])
        run(framework, recipe, folder / "whole", PROCESSES[framework])
        rng = np.random.default_rng(0)
        kills = collections.Counter(kill_once(framework, recipe, folder / "killed", rng) for _ in range(KILLS))
        run(framework, recipe, folder / "killed", PROCESSES[framework])
        lines = len((folder / "killed" / "metrics.jsonl").read_text().splitlines())
        apart = furthest(folder / "whole", folder / "killed")
    print(f"{framework}, {sharding}: {dict(kills)}; {lines} lines for {EPOCHS * 5 + 1} steps; losses {apart:.1e} apart")
    return apart


if __name__ == "__main__":
    frameworks, shardings = (
        [word for word in sys.argv[1:] if word in names] or names for names in (PROCESSES, SHARDING)
    )
    sys.exit(max(main(framework, sharding) for framework in frameworks for sharding in shardings) > BOUND)
