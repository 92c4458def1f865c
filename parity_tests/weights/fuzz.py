"""`make fuzz`: convert thousands of hostile files; each must end in a clear error or an exact result.

A child process converts one file after another, so that crashes, hangs and growth are seen from outside.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Annotated, Any

import numpy as np
import typer

from outlook_common.weights import convert, write_arrays
from outlook_common.weights.formats.pickle_stubs import PICKLE_STUBS
from outlook_common.weights.io.atomic import remove
from parity_tests.weights.hostile_files import TABLE, Hostile, Link, hostile

SECONDS, MEGABYTES = 5.0, 1000.0
# What the command line turns into exit code 2 and one message.
ERRORS = (ValueError, TypeError, OSError, ImportError, NotImplementedError)
OLD = {"old": np.arange(5.0)}


class Dropped:
    """Drops everything a pickle gives to an object; for the classes that have stubs, which PyTorch refuses."""

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


class HarmError(AssertionError):
    """A file that did harm; the message has its number."""


@dataclass
class Figures:
    """Figures of a run: outcomes, families, largest time and memory."""

    outcomes: Counter[str] = field(default_factory=Counter)
    families: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    megabytes: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return {
            "files": self.outcomes.total(),
            "outcomes": dict(self.outcomes),
            "slowest, seconds": round(self.seconds, 2),
            "peak memory, MB": round(self.megabytes),
            "families": dict(sorted(self.families.items())),
        }


class Fuzz:
    """A folder with a destination, and a process that converts files to it."""

    def __init__(self, folder: Path, process: "subprocess.Popen[str]", figures: Figures) -> None:
        self.folder = folder
        self.process = process
        self.canary = folder / "canary"
        self.target = folder / "target"
        self.source = folder / "source"
        for made in (self.canary, self.target, self.source):
            made.mkdir()
        self.destination = self.target / "out.safetensors"
        write_arrays(self.destination, OLD)
        self.old = self.destination.read_bytes()
        self.figures = figures

    def check(self, seed: int, *, only_new: bool = False) -> None:
        """Convert the file with this number; see `hostile`.

        Raises:
            HarmError: it crashed, hung, grew, executed, wrote where it should not, or gave a result the file has not.
        """
        made = hostile(seed, str(self.canary), only_new=only_new)
        path = self.source / f"a{made.suffix}"
        if made.contents or not made.beside:
            path.write_bytes(made.contents)
        for name, contents in made.beside.items():
            _put(self.source / name, contents)
        try:
            answer = self._ask(path)
            self._judge(made, path, answer)
        except HarmError as failure:
            raise HarmError(f"file {seed} ({made.family}, {made.suffix}): {failure}") from None
        finally:
            for file in self.source.iterdir():
                remove(file)
        self.figures.outcomes[answer["outcome"]] += 1
        self.figures.families[made.family] += 1
        self.figures.seconds = max(self.figures.seconds, answer["seconds"])
        self.figures.megabytes = max(self.figures.megabytes, answer["megabytes"])

    def _ask(self, path: Path) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([str(path), str(self.destination)]) + "\n")
        self.process.stdin.flush()
        line = _read_line(self.process, 6 * SECONDS)
        if not line:
            raise HarmError(f"the process is gone or hangs, exit status {self.process.poll()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _judge(self, made: Hostile, path: Path, answer: dict[str, Any]) -> None:
        if answer["outcome"] not in ("error", "result"):
            raise HarmError(f"{answer['outcome']}: {answer['message']}")
        if answer["seconds"] > SECONDS or answer["megabytes"] > MEGABYTES:
            raise HarmError(f"took {answer['seconds']:.1f} s and {answer['megabytes']:.0f} MB")
        if list(self.canary.iterdir()):
            raise HarmError(f"code was executed: it created {list(self.canary.iterdir())}")
        if [file.name for file in self.target.iterdir()] != [self.destination.name]:
            raise HarmError(f"debris: {[file.name for file in self.target.iterdir()]}")
        if answer["outcome"] == "error":
            if self.destination.read_bytes() != self.old:
                raise HarmError("the destination was touched in spite of the error")
            if not answer["message"] or not answer["message"].replace("\n", "").replace("…", "").isprintable():
                raise HarmError(f"the message cannot be printed: {answer['message']!r}")
            return
        found = reference(self.destination, ".safetensors")
        self.destination.write_bytes(self.old)
        try:
            expected = _in_torchs_names(reference(path, made.suffix))
        except Exception as error:
            raise HarmError(f"read, though the library that owns the format refuses it: {error!r}") from error
        same = found.keys() == expected.keys() and all(
            found[name].dtype == expected[name].dtype.newbyteorder("=")
            and found[name].shape == expected[name].shape
            and found[name].tobytes() == expected[name].astype(found[name].dtype).tobytes()
            for name in found
        )
        if not same:
            raise HarmError("the result is not what the file has")


def reference(path: Path, suffix: str) -> dict[str, np.ndarray]:
    """Read a file with the library that owns its format."""
    if suffix == ".safetensors":
        import safetensors.numpy

        return safetensors.numpy.load(path.read_bytes())
    if suffix in (".safetensors.index.json", ".bin.index.json"):
        files = set(json.loads(path.read_text())["weight_map"].values())
        shard = f".{suffix.split('.')[1]}"
        return {name: array for file in files for name, array in reference(path.with_name(file), shard).items()}
    if suffix == ".npz":
        with np.load(path, allow_pickle=False) as archive:
            return dict(archive)
    if suffix == ".orbax":
        return _by_tensorstore(path)
    if suffix == ".dcp":
        return _by_torch(path)
    if suffix == ".msgpack":
        return _by_flax(path)
    if suffix == ".h5":
        return _by_h5py(path)
    import torch

    with torch.serialization.safe_globals([(Dropped, name) for name in PICKLE_STUBS]):
        found = torch.load(path, weights_only=True)
    while wrapper := next((key for key in ("state_dict", "model") if isinstance(found.get(key), dict)), None):
        found = found[wrapper]
    return {name: tensor.numpy() for name, tensor in found.items() if tensor != {}}  # which has no names


def _by_torch(folder: Path) -> dict[str, np.ndarray]:
    """Return the tensors that PyTorch reads of a distributed checkpoint, by their names in the saved mapping."""
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    reader = dcp.FileSystemReader(folder)
    about = reader.read_metadata()
    state = {
        name: torch.empty(tensor.size, dtype=tensor.properties.dtype)
        for name, tensor in about.state_dict_metadata.items()
        if hasattr(tensor, "size")
    }
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is not run by several processes
            dcp.load(state, storage_reader=reader, no_dist=True)
    except CheckpointException as error:  # a BaseException
        raise ValueError(str(error).splitlines()[-1]) from error
    paths = about.planner_data if isinstance(about.planner_data, dict) else {}
    at = {name: paths.get(name) for name in state}
    names = {name: ".".join(map(str, path)) if isinstance(path, tuple) and path else name for name, path in at.items()}
    return {names[name]: tensor.numpy() for name, tensor in state.items()}


def _by_flax(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays that Flax reads."""
    from flax.serialization import msgpack_restore
    from flax.traverse_util import flatten_dict

    found = flatten_dict(msgpack_restore(path.read_bytes()), sep=".")
    return {name: np.asarray(array) for name, array in found.items() if hasattr(array, "shape")}


def _by_h5py(path: Path) -> dict[str, np.ndarray]:
    """Return the datasets that h5py reads."""
    import h5py

    found: dict[str, np.ndarray] = {}

    def keep(name: str, entry: Any) -> None:
        if isinstance(entry, h5py.Dataset):
            found[name.replace("/", ".")] = np.asarray(entry[()])

    with h5py.File(path, "r") as file:
        file.visititems(keep)
    return found


def _by_tensorstore(folder: Path) -> dict[str, np.ndarray]:
    """Return the arrays that TensorStore finds: in Orbax's store, or one per folder."""
    import tensorstore

    is_store = (folder / "manifest.ocdbt").exists()
    root = {"driver": "ocdbt", "base": f"file://{folder}/"} if is_store else {"driver": "file", "path": f"{folder}/"}
    keys = [key.decode() for key in tensorstore.KvStore.open(root).result().list().result()]
    drivers = {"/.zarray": "zarr", "/zarr.json": "zarr3"}
    return {
        name: np.asarray(tensorstore.open({"driver": driver, "kvstore": root | {"path": at}}).result().read().result())
        for end, driver in drivers.items()
        for key in keys
        if key.endswith(end)
        for name in [key.removesuffix(end)]
        for at in [f"{name}/" if is_store else f"{folder}/{name}/"]
    }


def _in_torchs_names(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    if "v.weight" in arrays:
        return {entry.torch: arrays[entry.torch] for entry in TABLE.entries if entry.torch in arrays}
    return {entry.torch: entry.to_torch(arrays[entry.flax]) for entry in TABLE.entries if entry.flax in arrays}


def _put(path: Path, contents: bytes | Link) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(contents, Link):
        path.write_bytes(contents)
    elif contents:
        path.symlink_to(contents)
    else:
        os.mkfifo(path)


@contextmanager
def fuzz(figures: Figures) -> Iterator[Fuzz]:
    """Yield a folder and a process to fuzz with; results are added to `figures`."""
    command = [sys.executable, "-m", "parity_tests.weights.fuzz", "--worker"]
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process,
    ):
        try:
            yield Fuzz(Path(folder), process, figures)
        finally:
            process.kill()


def _read_line(process: "subprocess.Popen[str]", seconds: float) -> str:
    import select

    assert process.stdout is not None
    for _ in range(int(2 * seconds)):  # in slices, so that time in which both processes are stopped does not count
        if select.select([process.stdout], [], [], 0.5)[0]:
            return process.stdout.readline()
    return ""


def work(commands: IO[str], answers: IO[str]) -> None:
    """Convert the file named in each line, and answer with the outcome."""
    import tensorstore  # noqa: F401  (so that no file is charged with the imports)
    import torch.distributed.checkpoint  # noqa: F401

    resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))
    for line in commands:
        source, destination = json.loads(line)
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak of memory
        start, message = time.process_time(), ""  # of the processor: others may be busy with it
        try:
            convert(source, destination, to="torch")
            outcome = "result"
        except ERRORS as error:
            outcome, message = "error", str(error)
        except BaseException as error:
            outcome, message = "crash", repr(error)
        seconds = time.process_time() - start
        status = Path("/proc/self/status").read_text()
        peak = next(int(row.split()[1]) for row in status.splitlines() if row.startswith("VmHWM"))
        answer = {"outcome": outcome, "message": message, "seconds": seconds, "megabytes": peak / 1024}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def main(
    files: Annotated[int, typer.Option(help="How many.")] = 6000,
    first: Annotated[int, typer.Option(help="The number of the first.")] = 0,
    only_new: Annotated[bool, typer.Option("--only-new", help="Only msgpack, DCP, HDF5 and PyTorch's shards.")] = False,
    worker: Annotated[bool, typer.Option("--worker", hidden=True)] = False,
) -> None:
    """Convert hostile files; print figures as JSON; exit with 1 if any file did harm."""
    if worker:
        answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever libraries print is no answer
        work(sys.stdin, answers)
        return
    figures, failures = Figures(), []
    seeds = iter(range(first, first + files))
    while (seed := next(seeds, None)) is not None:
        with fuzz(figures) as run:  # anew after each failure
            try:
                while seed is not None:
                    run.check(seed, only_new=only_new)
                    seed = next(seeds, None)
            except HarmError as failure:
                failures.append(str(failure))
    print(json.dumps(figures.to_dict() | {"failures": failures}, indent=2))
    raise SystemExit(bool(failures))


if __name__ == "__main__":
    typer.run(main)
