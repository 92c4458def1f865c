"""What one twin computed, in a file: so that twins on two machines can be compared on a third. Imports no framework.

A trace is a safetensors file: the tensors in float64 (those of modules in the dtype and layout that they have there),
and in its metadata what they were computed from, as hashes, and with.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from outlook_common.text import listed
from outlook_parity.core.precision import PRECISIONS
from outlook_parity.core.recorder import Arrays, Key
from outlook_parity.mapping.names import is_counter

# Name of a weight -> the type of its module, and its shape.
Leaves = dict[str, tuple[str, tuple[int, ...]]]

FORMAT = "outlook-parity-trace"
VERSION = 2


@dataclass(frozen=True)
class Header:
    """What a trace is of.

    Attributes:
        framework: "torch" or "jax".
        dtype: the precision of the computation.
        rounded_to: the precision that inputs and weights were rounded to first.
        device: "cpu", "gpu" or "tpu".
        seed: of the cotangent.
        inputs: name -> hash of the rounded inputs, as the JAX twin takes them.
        summed: see `outlook_parity.compare.tensors.compare_level`.
        weights: name in torch -> hash of the rounded values, in torch's layout.
        environment: versions, device, and how products were computed.
        leaves: of a torch trace, name of each weight -> type of its module, and shape; by them JAX's names are found.
        modules: of a torch trace, the paths of the modules.
        output_dtypes: as the model gave its outputs.
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


@dataclass(frozen=True)
class TraceFile:
    """A trace: its header, outputs and gradients, and what each module was called with and gave."""

    header: Header
    outputs: dict[str, np.ndarray]
    gradients: dict[str, np.ndarray]
    events: dict[Key, Arrays]


def digest(array: np.ndarray) -> str:
    """Return the hash of numbers and shape; the same for the same numbers in any dtype that holds them exactly."""
    wide = np.ascontiguousarray(array, np.float64)
    return hashlib.sha256(repr(array.shape).encode() + wide.tobytes()).hexdigest()


def write(path: Path, trace: TraceFile) -> None:
    """Write a trace.

    Raises:
        OSError: it cannot be written.
    """
    kinds = {"output": trace.outputs, "gradient": trace.gradients}
    tensors = {f"{kind}/{name}": array for kind, arrays in kinds.items() for name, array in arrays.items()}
    for number, (key, arrays) in enumerate(trace.events.items()):
        if key.side == "whole":
            continue
        for index, array in enumerate(arrays):
            tensors[f"module/{number:06d}/{key.side}/{key.call}/{index}/{key.path}"] = array.astype(np.float64)
    header = {"format": FORMAT, "version": str(VERSION), "header": json.dumps(asdict(trace.header))}
    path.write_bytes(save({name: np.ascontiguousarray(array) for name, array in tensors.items()}, metadata=header))


def read(path: Path) -> TraceFile:
    """Read a trace.

    Raises:
        ValueError: it is no trace, or of another version.
        OSError: it cannot be read.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    try:
        with safe_open(path, "np") as file:
            metadata: dict[str, str] = file.metadata() or {}
            if metadata.get("format") != FORMAT or metadata.get("version") != str(VERSION):
                is_one = f"format {metadata.get('format')!r}, version {metadata.get('version')!r}"
                raise ValueError(f"{path}: no trace of version {VERSION}, but {is_one}; `outlook trace` writes them")
            header = _header(json.loads(metadata["header"]))
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError, AttributeError) as error:
        raise ValueError(f"{path}: damaged: {error}") from error
    events: dict[Key, Arrays] = {}
    named: dict[str, dict[str, np.ndarray]] = {"output": {}, "gradient": {}}
    for name, array in tensors.items():
        kind, _, rest = name.partition("/")
        if kind in named:
            named[kind][rest] = array
        elif kind == "module":
            _, side, call, _, module = rest.split("/", 4)
            events.setdefault(Key(module, int(call), "in" if side == "in" else "out"), []).append(array)
    return TraceFile(header, named["output"], named["gradient"], events)


def _header(given: dict[str, Any]) -> Header:
    """Return a header as JSON gives it back, which has no tuples."""
    leaves = {name: (kind, tuple(shape)) for name, (kind, shape) in given["leaves"].items()}
    return Header(**given | {"leaves": leaves, "summed": tuple(given["summed"])})


def refusal(one: TraceFile, other: TraceFile, truth: TraceFile | None) -> str | None:
    """Return why traces cannot be compared, None if they can."""
    ours, theirs = one.header, other.header
    if {ours.framework, theirs.framework} != {"torch", "jax"}:
        return f"one trace must be torch's and one jax's, these are of {ours.framework} and {theirs.framework}"
    for name in ("dtype", "rounded_to", "seed"):
        if getattr(ours, name) != getattr(theirs, name):
            return f"{name} {getattr(ours, name)} in {ours.framework}, {getattr(theirs, name)} in {theirs.framework}"
    for header in (ours, theirs, *([] if truth is None else [truth.header])):
        if header.inputs != ours.inputs:
            others = listed(_other(ours.inputs, header.inputs), 5)
            return f"other inputs in {header.framework}'s trace than in {ours.framework}'s: {others}"
        if other_weights := _other_weights(ours, header):
            others = listed(other_weights, 5)
            return f"other weights in {header.framework}'s trace than in {ours.framework}'s: {others}"
    if ours.dtype == "float64" and ours.rounded_to == "float64":
        return None
    if truth is None:
        how = f"--dtype float64 --rounded-to {ours.rounded_to}"
        return f"in {ours.dtype} a truth is needed: write one with `outlook trace {how}`, and give it with --truth"
    if truth.header.dtype != "float64" or _storage(truth.header.rounded_to) != _storage(ours.rounded_to):
        return (
            f"the truth must be in float64 of numbers rounded to {ours.rounded_to}, "
            f"it is in {truth.header.dtype} of {truth.header.rounded_to}"
        )
    return None


def _storage(precision: str) -> np.dtype:
    return PRECISIONS[precision].storage


def _other_weights(one: Header, other: Header) -> list[str]:
    """Return the weights that are not the same; counts of batches only where the JAX twin keeps them too."""
    uncounted = [header.weights for header in (one, other) if header.framework == "jax"]
    return [
        name
        for name in _other(one.weights, other.weights)
        if not (is_counter(name) and any(name not in weights for weights in uncounted))
    ]


def _other(one: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    return [name for name in {**one, **other} if one.get(name) != other.get(name)]


def environment_of(header: Header) -> dict[str, Any]:
    """Return the environment as a report of two machines has it."""
    return {f"{header.framework}: {name}": value for name, value in header.environment.items()}
