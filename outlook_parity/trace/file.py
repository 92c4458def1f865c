"""Trace files: what one twin computes, to be compared on another machine. Imports no framework.

A trace is a safetensors file. Tensors: outputs, gradients and the inputs and outputs of modules, in float64; those of
modules in the layout of the framework; in float64 also how far rounding can change the gradients. Metadata: hashes of
inputs and weights, and the environment.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from outlook_common.text import listed
from outlook_common.weights.formats import safetensors
from outlook_common.weights.io.atomic import replacing
from outlook_common.weights.io.lazy import LazyTensor
from outlook_parity.core.check import Tensors
from outlook_parity.core.precision import PRECISIONS
from outlook_parity.core.recorder import Arrays, Events, Key, Shaped, shapes_of
from outlook_parity.core.stored import Computed
from outlook_parity.mapping.names import is_counter

# Name of a weight -> type of its module, shape.
Leaves = dict[str, tuple[str, tuple[int, ...]]]

# Reads an array of a file.
Reader = Callable[[], np.ndarray]

FORMAT = "outlook-parity-trace"
VERSION = 4


@dataclass(frozen=True)
class Header:
    """Metadata of a trace.

    Attributes:
        framework: "torch" or "jax".
        dtype: the precision of the computation.
        rounded_to: the precision that inputs and weights were rounded to first.
        device: "cpu", "gpu" or "tpu".
        seed: of the cotangent.
        inputs: name -> hash of the rounded inputs, as the JAX twin takes them.
        weights: name in torch -> hash of the rounded values, in torch's layout.
        summed: see `outlook_parity.compare.tensors.compare_level`.
        environment: versions, device, and how products were computed.
        leaves: of a torch trace: name of each weight -> type of its module, shape; JAX's names are inferred from them.
        modules: of a torch trace: the paths of the modules.
        output_dtypes: name of each output -> the dtype that the model gave it.
        constants: of a trace in float64: module, "" for an unknown one -> the float32 constants that it uses.
    """

    framework: str
    dtype: str
    rounded_to: str
    device: str
    seed: int
    inputs: dict[str, str]
    weights: dict[str, str]
    summed: tuple[int, int] = (1, 1)
    environment: dict[str, str] = field(default_factory=dict)
    leaves: Leaves = field(default_factory=dict)
    modules: list[str] = field(default_factory=list)
    output_dtypes: dict[str, str] = field(default_factory=dict)
    constants: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class TraceFile:
    """A trace.

    Attributes:
        header: metadata.
        outputs: by name; read when they are asked for, as all arrays of a trace are.
        gradients: likewise.
        events: inputs and outputs of every module call.
        jumps: of a trace in float64, by name of a gradient: what it is with inputs and weights perturbed by rounding,
            less what it is with the opposite perturbation.
    """

    header: Header
    outputs: Tensors
    gradients: Tensors
    events: Events
    jumps: Tensors = field(default_factory=dict)


class _Float64(LazyTensor):
    """An array that is read, and cast, when it is written."""

    def __init__(self, shape: tuple[int, ...], array: Callable[[], np.ndarray]) -> None:
        super().__init__(np.dtype(np.float64), shape)
        self._array = array

    def read(self) -> np.ndarray:
        """Return the array."""
        return self._array().astype(np.float64, copy=False)


def digest(array: np.ndarray) -> str:
    """Return the SHA-256 of shape and values; the same in every dtype that holds the values exactly."""
    values = np.ascontiguousarray(array, np.float64)
    return hashlib.sha256(repr(array.shape).encode() + values.tobytes()).hexdigest()


def write(path: Path, trace: TraceFile) -> None:
    """Write a trace.

    Raises:
        OSError: it cannot be written.
    """
    tensors: dict[str, LazyTensor] = {}
    for kind, arrays in (("output", trace.outputs), ("gradient", trace.gradients), ("jump", trace.jumps)):
        for name in arrays:
            tensors[f"{kind}/{name}"] = _Float64(arrays[name].shape, partial(arrays.__getitem__, name))
    for number, key in enumerate(trace.events):
        if key.side == "whole":
            continue
        for index, shape in enumerate(shapes_of(trace.events, key)):
            name = f"module/{number:06d}/{key.side}/{key.call}/{index}/{key.path}"
            tensors[name] = _Float64(shape, partial(_array_of, trace.events, key, index))
    metadata = {"format": FORMAT, "version": str(VERSION), "header": json.dumps(asdict(trace.header))}
    with replacing(path) as temporary:  # a trace may be written over the file that its arrays are still read from
        safetensors.write(temporary, tensors, metadata)


def _array_of(events: Events, key: Key, index: int) -> np.ndarray:
    return events[key][index]


def read(path: Path) -> TraceFile:
    """Read a trace.

    Raises:
        ValueError: it is no trace, or of another version.
        OSError: it cannot be read.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; `outlook trace` writes traces")
    try:
        file = safe_open(path, "np")
        metadata: dict[str, str] = file.metadata() or {}  # type: ignore[no-untyped-call]
        if metadata.get("format") != FORMAT or metadata.get("version") != str(VERSION):
            found = f"format {metadata.get('format')!r}, version {metadata.get('version')!r}"
            raise ValueError(f"{path}: {found} found, a trace of version {VERSION} expected; write it again")
        header = _header(json.loads(metadata["header"]))
        readers = {name: partial(file.get_tensor, name) for name in sorted(file.keys())}  # type: ignore[no-untyped-call]
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError, AttributeError) as error:
        raise ValueError(f"{path}: no trace, or a damaged one: {error}; `outlook trace` writes traces") from error
    outputs, gradients, jumps = (Computed(_named(readers, f"{kind}/")) for kind in ("output", "gradient", "jump"))
    return TraceFile(header, outputs, gradients, _EventsInFile(_named(readers, "module/"), file), jumps)


def _header(fields: dict[str, Any]) -> Header:
    """Return the header of a JSON object, whose lists become tuples."""
    leaves = {name: (kind, tuple(shape)) for name, (kind, shape) in fields["leaves"].items()}
    return Header(**fields | {"leaves": leaves, "summed": tuple(fields["summed"])})


def _named(readers: Mapping[str, Reader], prefix: str) -> dict[str, Reader]:
    return {name.removeprefix(prefix): read for name, read in readers.items() if name.startswith(prefix)}


class _EventsInFile(Mapping[Key, Arrays], Shaped):
    """The inputs and outputs of module calls, in the order of the calls."""

    def __init__(self, readers: Mapping[str, Reader], file: Any) -> None:
        self._file = file
        self._readers: dict[Key, dict[str, Reader]] = {}
        for name, read in readers.items():
            _, side, call, _, path = name.split("/", 4)
            self._readers.setdefault(Key(path, int(call), "in" if side == "in" else "out"), {})[name] = read

    def shapes(self, key: Key) -> list[tuple[int, ...]]:
        """See `Shaped`."""
        return [tuple(self._file.get_slice(f"module/{name}").get_shape()) for name in self._readers[key]]

    def __getitem__(self, key: Key) -> Arrays:
        return [read() for read in self._readers[key].values()]

    def __iter__(self) -> Iterator[Key]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)


def refusal(one: TraceFile, other: TraceFile, truth: TraceFile | None) -> str | None:
    """Return why traces cannot be compared, None if they can."""
    a, b = one.header, other.header
    if {a.framework, b.framework} != {"torch", "jax"}:
        return f"one trace must be torch's and one jax's, these are of {a.framework} and {b.framework}"
    for name in ("dtype", "rounded_to", "seed"):
        if getattr(a, name) != getattr(b, name):
            return f"{name} {getattr(a, name)} in {a.framework}, {getattr(b, name)} in {b.framework}"
    for header in (a, b, *([] if truth is None else [truth.header])):
        for what, names in (
            ("inputs", _different(a.inputs, header.inputs)),
            ("weights", _different_weights(a, header)),
        ):
            if names:
                return f"different {what} in the traces of {a.framework} and {header.framework}: {listed(names, 5)}"
    return _refusal_of_truth(a, truth)


def _refusal_of_truth(header: Header, truth: TraceFile | None) -> str | None:
    """Return why a truth does not fit a trace in a lower precision, None if it does or none is needed."""
    if header.dtype == "float64" and header.rounded_to == "float64":
        return None
    if truth is None:
        how = f"--dtype float64 --rounded-to {header.rounded_to}"
        return f"{header.dtype} needs a truth: write one with `outlook trace {how}`, and give it with --truth"
    if truth.header.dtype != "float64" or _storage(truth.header.rounded_to) != _storage(header.rounded_to):
        return (
            f"the truth must be in float64 of numbers rounded to {header.rounded_to}, "
            f"it is in {truth.header.dtype} of {truth.header.rounded_to}"
        )
    return None


def _storage(precision: str) -> np.dtype:
    return PRECISIONS[precision].storage


def _different_weights(one: Header, other: Header) -> list[str]:
    """Return the weights that differ; counts of batches only if the JAX twin has them too."""
    jax_weights = [header.weights for header in (one, other) if header.framework == "jax"]
    return [
        name
        for name in _different(one.weights, other.weights)
        if not (is_counter(name) and any(name not in weights for weights in jax_weights))
    ]


def _different(one: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    return [name for name in {**one, **other} if one.get(name) != other.get(name)]


def environment_of(header: Header) -> dict[str, Any]:
    """Return the environment, its names marked with the framework: reports have two."""
    return {f"{header.framework}: {name}": value for name, value in header.environment.items()}
