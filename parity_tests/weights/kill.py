"""`python -m parity_tests.weights.kill`: kill conversions at random moments, then check what is left.

Children are forked from a process that has imported what they need, so that they die while converting.
"""

import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from outlook_common.config import OutlookAttentionConfig
from outlook_common.weights import convert, table_for, write_arrays
from outlook_common.weights.formats.sharded import INDEX

SUFFIXES = (".safetensors", ".npz", ".shards", ".orbax")
SHARD = 1 << 20


def write_source(path: Path, seed: int, dim: int) -> None:
    rng = np.random.default_rng(seed)
    table = table_for(OutlookAttentionConfig(dim, 8))
    write_arrays(path, {entry.torch: rng.standard_normal(entry.shape, dtype=np.float32) for entry in table.entries})


def to(destination: Path) -> Callable[[Path], None]:
    shard = SHARD if destination.suffix == ".shards" else None
    return lambda source: convert(source, destination, to="torch", max_shard_size=shard) and None


def run(suffix: str, kills: int, seed: int, dim: int = 512) -> dict[str, int]:
    """Kill conversions to one destination; return how often it was the old one and how often the new one.

    Raises:
        AssertionError: it was neither, or something was left that looks like a checkpoint.
    """
    if suffix == ".orbax":
        import orbax.checkpoint  # noqa: F401
    rng, seen = random.Random(seed), Counter[str]()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sources = [folder / f"{index}.safetensors" for index in range(2)]
        for index, source in enumerate(sources):
            write_source(source, index, dim)
        (folder / "there").mkdir()
        destination = folder / "there" / f"out{suffix}"
        convert_from = to(destination)
        seconds = max(_time(lambda: _wait(_fork(lambda: convert_from(sources[0])))) for _ in range(3))
        while seen.total() < kills:
            old = _holds(destination, sources)
            child = _fork(lambda old=old: convert_from(sources[1 - old]))
            time.sleep(rng.uniform(0, 1.2 * seconds))
            os.kill(child, signal.SIGKILL)
            _wait(child)
            now = _holds(destination, sources)
            seen["old" if now == old else "new"] += 1
            left = {path.name for path in destination.parent.iterdir()} - {destination.name}
            assert all(path.startswith(".") and path.endswith((".tmp", ".tmp.lock")) for path in left), left
        _wait(_fork(lambda: convert_from(sources[0])))
        assert [path.name for path in destination.parent.iterdir()] == [destination.name], "debris was not swept up"
    return {"kills": kills, "old": seen["old"], "new": seen["new"]}


def _holds(destination: Path, sources: list[Path]) -> int:
    """Return which of the sources the destination has, bit for bit."""
    from outlook_common.weights.checkpoint import open_checkpoint
    from outlook_common.weights.inspection import differences

    if destination.suffix == ".orbax":  # in a process of its own: this one must not start threads before it forks
        for index in range(len(sources)):
            if _wait(_fork(lambda index=index: _must_be_same(sources[index], destination))) == 0:
                return index
        raise AssertionError(f"{destination} holds neither")
    there = destination / INDEX if destination.suffix == ".shards" else destination
    same = [not differences(open_checkpoint(source), open_checkpoint(there)) for source in sources]
    assert any(same), f"{destination} holds neither"
    return same.index(True)


def _must_be_same(source: Path, destination: Path) -> None:
    from outlook_common.weights.checkpoint import open_checkpoint
    from outlook_common.weights.inspection import differences

    if differences(open_checkpoint(source), open_checkpoint(destination)):
        raise SystemExit(1)


def _fork(work: Callable[[], object]) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.close(sys.stderr.fileno())
        work()
        status = 0
    finally:
        os._exit(status)


def _wait(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _time(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def together(suffix: str, processes: int, dim: int = 256) -> int:
    """Convert different sources to one destination at once; return which of them it holds in the end.

    Raises:
        AssertionError: none of them whole, or something else was left.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sources = [folder / f"{index}.safetensors" for index in range(processes)]
        for index, source in enumerate(sources):
            write_source(source, index, dim)
        (folder / "there").mkdir()
        destination = folder / "there" / f"out{suffix}"
        children = [_fork(lambda source=source: to(destination)(source)) for source in sources for _ in range(3)]
        assert [_wait(child) for child in children] == [0] * len(children)
        assert [path.name for path in destination.parent.iterdir()] == [destination.name]
        return _holds(destination, sources)


def main(
    kills: Annotated[int, typer.Option(help="How many, of each format.")] = 200,
    seed: Annotated[int, typer.Option(help="Of the moments.")] = 0,
    only: Annotated[list[str] | None, typer.Option(help="Suffixes; all if none is given.")] = None,
) -> None:
    """Kill conversions at random moments; print what was seen as JSON, or fail."""
    print(json.dumps({suffix: run(suffix, kills, seed) for suffix in only or SUFFIXES}))


if __name__ == "__main__":
    typer.run(main)
