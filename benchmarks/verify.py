"""Processor time and peak memory of a verification, each of a case and a level in a process of its own."""

import gc
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from json import dumps, loads
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from outlook_parity.core.memory import release_large_blocks, resident_bytes

if TYPE_CHECKING:
    from outlook_parity import NameMap

LEVELS = ("forward", "layers", "gradients", "training")
ALL = "all levels"
# As `outlook verify` runs by default.
TRAINED = ("float64",)
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Pair(NamedTuple):
    """Both twins with the same weights, their inputs, and PyTorch's order of the inputs' axes."""

    torch_model: Any
    jax_model: Any
    inputs: np.ndarray
    torch_axes: tuple[int, ...] | None


@dataclass(frozen=True)
class Cost:
    """What a verification takes.

    Attributes:
        seconds: of the processor, user and system, after the imports.
        imports: the same of the imports, of PyTorch's compiler too, which its optimizers load.
        verdict: of the report.
        megabytes: at the peak, the weights of both models included, above what is resident once they are made, after a
            verification of another small pair: so without what compilers and late imports take. None where the weights
            are few.
        estimate: the same megabytes as `--memory` counts them.
        weights: megabytes of the weights of one twin as given.
    """

    seconds: float
    imports: float
    verdict: str
    megabytes: float | None = None
    estimate: float | None = None
    weights: float | None = None


def _convnext() -> Pair:
    from benchmarks.pairs.convnext import models

    return Pair(*models(), np.random.default_rng(0).standard_normal((2, 16, 16, 3)), (0, 3, 1, 2))


def _loaded(torch_model: Any, jax_model: Any) -> tuple[Any, Any]:
    from outlook_parity import load_torch_weights

    return torch_model, load_torch_weights(jax_model, torch_model)


def _maxvit() -> Pair:
    import torch
    from flax import nnx

    from benchmarks.pairs.maxvit import MaxViT, TorchMaxViT

    torch.manual_seed(0)
    images = np.random.default_rng(0).standard_normal((2, 56, 56, 3))
    return Pair(*_loaded(TorchMaxViT(), MaxViT(nnx.Rngs(0))), images, (0, 3, 1, 2))


def _encoder() -> Pair:
    import torch
    from flax import nnx

    from benchmarks.pairs.encoder import WORDS, Encoder, TorchEncoder

    torch.manual_seed(0)
    ids = np.random.default_rng(0).integers(0, WORDS, (2, 32))
    return Pair(*_loaded(TorchEncoder(), Encoder(nnx.Rngs(0))), ids, None)


def _volo() -> Pair:
    from outlook_parity.models.builtin import Options, make

    made = make(Options("volo_d1_224", None, "", 0, None, 3, 2, None))
    return Pair(made.torch_model, made.jax_model, made.inputs, None)


CASES: dict[str, Callable[[], Pair]] = {
    "ConvNeXt of the docs": _convnext,
    "MaxViT, 0.1 M": _maxvit,
    "VOLO-D1, 27 M": _volo,
    "encoder, 20 M": _encoder,
}

# Whose weights, not what compilers take, make the memory.
LARGE = ("VOLO-D1, 27 M", "encoder, 20 M")


def cost(case: str, level: str) -> Cost:
    """Verify in a new process, for the memory of a large pair in another, and return what it took."""
    took = _run("time", case, level)
    return Cost(**took, **_run("memory", case, level) if case in LARGE else {})


def _run(what: str, case: str, level: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.verify", what, case, level]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = loads(done.stdout.splitlines()[-1])
    return found


def _time(case: str, level: str) -> dict[str, Any]:
    import jax
    import optax  # noqa: F401
    import torch._dynamo  # noqa: F401

    import outlook_parity.pair  # noqa: F401
    from outlook_parity.backends.jax.work import unoptimized

    jax.jit(lambda x: x + 1)(1.0)
    imports = _processor()
    with unoptimized():  # as the command line calls factories
        pair = CASES[case]()
    verdict = _verify(pair, level)
    return {"seconds": _processor() - imports, "imports": imports, "verdict": verdict}


def _memory(case: str, level: str) -> dict[str, Any]:
    release_large_blocks()  # as the command line does
    _verify(_convnext(), ALL)
    pair = CASES[case]()
    weights = sum(weight.nbytes for weight in pair.torch_model.parameters()) / 2**20
    gc.collect()
    before = resident_bytes() / 2**20
    CLEAR.write_text("5")  # forget the highest so far
    _verify(pair, level)
    found = {"megabytes": _peak() - before, "estimate": _estimate(pair, level)}
    return {name: size + 2 * weights for name, size in found.items()} | {"weights": weights}


def _estimate(pair: Pair, level: str) -> float:
    """Return the megabytes of a verification, besides the models as they are given, as `--memory` counts them."""
    from outlook_parity.core.memory import needed
    from outlook_parity.core.request import inputs_of
    from outlook_parity.pair import make_pair

    inputs = inputs_of(pair.inputs)
    takes = needed(make_pair(pair.torch_model, pair.jax_model, inputs, _names(pair)).sizes(inputs))
    return max(takes.values() if level == ALL else [takes[level]]) / 2**20


def _verify(pair: Pair, level: str) -> str:
    """Verify as the command line does by default, and return the verdict."""
    from outlook_parity import verify

    levels = None if level == ALL else (level,)
    return verify(*pair[:3], levels=levels, training_dtypes=TRAINED, names=_names(pair)).verdict


def _names(pair: Pair) -> "NameMap":
    from outlook_parity import NameMap

    return NameMap(torch_axes=pair.torch_axes)


def _processor() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _peak() -> float:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    what, *of = sys.argv[1:]
    print(dumps({"time": _time, "memory": _memory}[what](*of)))
