"""Damaged and hostile weight files: `hostile(seed)` returns one, the same each time."""

import argparse
import bz2
import gzip
import io
import json
import os
import pickle
import random
import struct
import subprocess
import tempfile
import zipfile
import zlib
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy._core.multiarray import scalar

from outlook_common import OutlookAttentionConfig
from outlook_common.weights import table_for
from parity_tests.weights import hostile_formats as more

TABLE = table_for(OutlookAttentionConfig(6, 2, qkv_bias=True))
WEIGHTS = {
    entry.torch: np.random.default_rng(0).standard_normal(entry.shape).astype(np.float32) for entry in TABLE.entries
}
IN_FLAX = {entry.flax: np.ascontiguousarray(entry.to_flax(WEIGHTS[entry.torch])) for entry in TABLE.entries}

NUMBERS = (
    -1,
    0,
    1,
    2**31,
    2**32 - 1,
    2**53,
    2**63 - 1,
    2**64,
    10**400,
    float("nan"),
    float("inf"),
    1.5,
    True,
    "6",
    None,
)
NAMES = ("v.weіght", "v.weight ", "v.weight\u200b", "V.weight", "v․weight", "../v.weight", "v.weight\x00", "\x1b[2Jv")


class Link(str):
    """A symbolic link to this path; a pipe if it is empty."""

    __slots__ = ()


@dataclass(frozen=True)
class Hostile:
    """One file: suffix, family, contents, and {name: contents} of files beside it.

    An Orbax checkpoint is a folder: it has only files beside it.
    """

    suffix: str
    family: str
    contents: bytes
    beside: dict[str, bytes | Link]


def hostile(seed: int, canary: str, *, only_new: bool = False) -> Hostile:
    """Return the file with this number; code in it, if executed, creates a file in the folder `canary`.

    `only_new` leaves out all kinds but those of `NEW_FORMATS`.
    """
    rng = random.Random(seed)
    family = rng.choice(NEW_FORMATS if only_new else FAMILIES)
    suffix, contents, beside = family(rng, canary)
    return Hostile(suffix, family.__name__, contents, beside)


Made = tuple[str, bytes, dict[str, bytes | Link]]


# Whole files, and damage that suits any of them


def safetensors_file(arrays: dict[str, np.ndarray], change: Callable[[dict[str, Any]], None] | None = None) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = bytearray()
    for name, array in arrays.items():
        start = len(data)
        data += array.tobytes()
        header[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": [start, len(data)]}
    if change is not None:
        change(header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def npz_file(arrays: dict[str, np.ndarray], packed: bool = False) -> bytes:
    file = io.BytesIO()
    (np.savez_compressed if packed else np.savez)(file, **arrays)
    return file.getvalue()


def torch_file(value: Any, new: bool = True) -> bytes:
    import torch

    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=new)
    return file.getvalue()


def state_dict() -> dict[str, Any]:
    import torch

    return {name: torch.from_numpy(array.copy()) for name, array in WEIGHTS.items()}


def intact(rng: random.Random) -> tuple[str, bytes]:
    arrays = rng.choice((WEIGHTS, IN_FLAX))
    kind = rng.randrange(5)
    if kind == 0:
        return ".safetensors", safetensors_file(arrays)
    if kind < 3:
        return ".npz", npz_file(arrays, packed=kind == 2)
    return ".pth", torch_file(state_dict(), new=kind == 3)


def truncated(rng: random.Random, canary: str) -> Made:
    suffix, contents = intact(rng)
    return suffix, contents[: rng.randrange(len(contents))], {}


def flipped(rng: random.Random, canary: str) -> Made:
    suffix, contents = intact(rng)
    damaged = bytearray(contents)
    # Near either end lies what describes the rest.
    spread = rng.choice((300, 1500, len(damaged)))
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        place = rng.randrange(min(spread, len(damaged)))
        damaged[rng.choice((place, len(damaged) - 1 - place))] ^= 1 << rng.randrange(8)
    return suffix, bytes(damaged), {}


def spliced(rng: random.Random, canary: str) -> Made:
    suffix, contents = intact(rng)
    start, end = sorted(rng.randrange(len(contents)) for _ in range(2))
    other = rng.choice((b"", rng.randbytes(rng.randrange(1, 64)), contents[start:end] * 2, bytes(end - start)))
    return suffix, contents[:start] + other + contents[end:], {}


def mislabelled(rng: random.Random, canary: str) -> Made:
    _, contents = intact(rng)
    return rng.choice((".safetensors", ".npz", ".pth", ".bin", ".safetensors.index.json")), contents, {}


def noise(rng: random.Random, canary: str) -> Made:
    start = rng.choice(
        (b"", b"PK\3\4", b"PK\5\6" + bytes(18), b"\x80\x02", b"\x93NUMPY\1\0", struct.pack("<Q", 40) + b"{")
    )
    suffix = rng.choice((".safetensors", ".npz", ".pth", ".bin", ".safetensors.index.json"))
    return suffix, start + rng.randbytes(rng.randrange(400)), {}


# .safetensors


def safetensors_header(rng: random.Random, canary: str) -> Made:
    def change(header: dict[str, Any]) -> None:
        name = rng.choice(list(WEIGHTS))
        spec = header[name]
        what = rng.randrange(9)
        if what == 0:
            spec["shape"] = rng.choice(
                ([], [rng.choice(NUMBERS)], [*spec["shape"], rng.choice(NUMBERS)], rng.choice(NUMBERS))
            )
        elif what == 1:
            spec["shape"][0] = rng.choice(NUMBERS)
        elif what == 2:
            spec["data_offsets"][rng.randrange(2)] = rng.choice(NUMBERS)
        elif what == 3:
            spec["data_offsets"] = header[rng.choice(list(WEIGHTS))]["data_offsets"]
        elif what == 4:
            spec["dtype"] = rng.choice(("F64", "F16", "BF16", "I32", "F8_E4M3", "f32", "O", "", None, 3, ["F32"]))
        elif what == 5:
            header[rng.choice(NAMES)] = header.pop(name) if rng.random() < 0.5 else spec
        elif what == 6:
            header["__metadata__"] = rng.choice(({"a": 1}, [], None, "pt", {"a": {"b": "c"}}))
        elif what == 7:
            header[name] = rng.choice((None, [], 3, "F32", {}, {**spec, "more": 1}, {"dtype": "F32"}))
        else:
            header |= {
                f"{index}{'x' * rng.choice((1, 2000))}": {**spec} for index in range(rng.choice((1, 100, 60_000)))
            }

    return ".safetensors", safetensors_file(WEIGHTS, change), {}


def safetensors_names(rng: random.Random, canary: str) -> Made:
    """Thousands of names, deep or similar, which slow down the search for models and similar names."""
    start = rng.choice(("network.0.0.attn.", "pos_embed", "a." * 60, "network.0.0.attn.v.weigh", ""))
    count = rng.choice((3000, 15_000, 19_000))
    names = [f"{start}{index}" if rng.random() < 0.9 else f"{index}.{start}.pos_embed" for index in range(count)]
    arrays = dict.fromkeys(names, np.zeros((), np.float32)) | dict(rng.sample(list(WEIGHTS.items()), 5))
    return ".safetensors", safetensors_file(arrays), {}


def safetensors_length(rng: random.Random, canary: str) -> Made:
    contents = safetensors_file(WEIGHTS)
    length = int.from_bytes(contents[:8], "little")
    wrong = rng.choice(
        (0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1, 10**8, len(contents), rng.randrange(2**64))
    )
    return ".safetensors", wrong.to_bytes(8, "little") + contents[8:], {}


def safetensors_json(rng: random.Random, canary: str) -> Made:
    deep = 100_000
    text = rng.choice(
        (
            b"[" * deep,
            b'{"a":' * deep,
            b'{"a":1,"a":2}',
            b"{}" + b" " * 100_000,
            b'{"v.weight":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}',
            b'{"v.weight":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"v.weight":{"dtype":"F32"}}',
            b'{"\xff":{}}',
            b'{"\\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
            b"{" + b"9" * 10_000,
            b'{"a":' + b"9" * 100_000 + b"}",
            b"null",
            b"",
        )
    )
    return ".safetensors", len(text).to_bytes(8, "little") + text + bytes(rng.choice((0, 4))), {}


def safetensors_swapped(rng: random.Random, canary: str) -> Made:
    """Big-endian numbers, which the format lacks: they are read bit for bit."""
    return ".safetensors", safetensors_file({name: array.astype(">f4") for name, array in WEIGHTS.items()}), {}


# .npz


def zipped(members: list[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> bytes:
    import warnings

    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that come twice
        with zipfile.ZipFile(file, "w", method) as archive:
            for name, contents in members:
                archive.writestr(zipfile.ZipInfo(name), contents, method)
    return file.getvalue()


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, allow_pickle=True)
    return file.getvalue()


def members() -> list[tuple[str, bytes]]:
    return [(f"{name}.npy", npy(array)) for name, array in WEIGHTS.items()]


def npz_header(rng: random.Random, canary: str) -> Made:
    shape = rng.choice(
        ("(6, 6)", "(36,)", "(-6, -6)", "(nan, 6)", "(10**18,)", "(2**62, 4)", "6", "()", "(1e3,)", "[6, 6]")
    )
    shape = shape if rng.random() < 0.7 else "(" * rng.choice((5, 500)) + "6" + ")" * 5
    descr = rng.choice(
        ("'<f4'", "'>f4'", "'|O'", "'<f2'", "'|V4'", "'<U9'", "[('a', '<f4')]", "'<M8[s]'", "'x'", "None", "'|S0'")
    )
    text = f"{{'descr': {descr}, 'fortran_order': {rng.choice(('False', 'True', '1'))}, 'shape': {shape}, }}\n"
    version, pack = rng.choice(((1, "<H"), (2, "<I"), (3, "<I"), (9, "<H")))
    length = rng.choice((len(text), len(text), len(text) + 1, 2**16 - 1, 0))
    header = b"\x93NUMPY" + bytes((version, 0)) + struct.pack(pack, length) + text.encode()
    found = members()
    found[0] = (found[0][0], header + WEIGHTS["v.weight"].tobytes())
    return ".npz", zipped(found), {}


def npz_members(rng: random.Random, canary: str) -> Made:
    found = members()
    what = rng.randrange(5)
    if what == 0:
        found.append(rng.choice(found))
    elif what == 1:
        found[0] = (rng.choice(("../../v.weight.npy", "/etc/passwd", "C:\\v.npy", "v.weight", *NAMES)), found[0][1])
    elif what == 2:
        found.append(
            (
                "__metadata__.npy",
                npy(np.array(rng.choice(('{"bfloat16": ["x"]}', "[]", "{", '{"bfloat16": 3}', "9" * 9999)))),
            )
        )
    elif what == 3:
        found.append((f"{rng.choice(('more', 'v_pj.weight', 'v.kernel'))}.npy", rng.randbytes(rng.randrange(300))))
    else:
        found += [(f"{index}.npy", b"") for index in range(60_000 if rng.random() < 0.1 else 200)]
    return ".npz", zipped(found, rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA))), {}


def npz_bomb(rng: random.Random, canary: str) -> Made:
    numbers = 1 << rng.choice((20, 25, 26))
    bomb = np.zeros(numbers, np.float32)
    return ".npz", zipped([*members()[1:], ("v.weight.npy", npy(bomb))], zipfile.ZIP_DEFLATED), {}


def npz_directory(rng: random.Random, canary: str) -> Made:
    """Changed sizes, offsets, flags and methods in the archive's list of members."""
    contents = bytearray(npz_file(WEIGHTS, packed=rng.random() < 0.5))
    entry = contents.find(b"PK\1\2")
    for _ in range(rng.randrange(len(WEIGHTS))):
        following = contents.find(b"PK\1\2", entry + 4)
        entry = following if following >= 0 else entry
    offset, size = rng.choice(((8, 2), (10, 2), (16, 4), (20, 4), (24, 4), (28, 2), (30, 2), (42, 4)))
    value = rng.choice((0, 1, 8, 14, 2 ** (8 * size) - 1, 2 ** (8 * size - 1), rng.randrange(2 ** (8 * size))))
    contents[entry + offset : entry + offset + size] = value.to_bytes(size, "little")
    return ".npz", bytes(contents), {}


def npz_objects(rng: random.Random, canary: str) -> Made:
    array = np.array([Bomb(rng, canary)] * rng.choice((1, 36)), dtype=object)
    return ".npz", zipped([("v.weight.npy", npy(array)), *members()[1:]]), {}


def npz_big_endian(rng: random.Random, canary: str) -> Made:
    arrays = {name: array.astype(rng.choice((">f4", "<f4", ">f8"))) for name, array in WEIGHTS.items()}
    return (
        ".npz",
        npz_file({name: np.asfortranarray(array) for name, array in arrays.items()}, packed=rng.random() < 0.5),
        {},
    )


# PyTorch's


class Bomb:
    """Creates something in the folder `canary` when it is unpickled."""

    def __init__(self, rng: random.Random, canary: str) -> None:
        self.way = rng.randrange(6)
        self.target = f"{canary}/exploded-{rng.randrange(10**9)}"

    def __reduce__(self) -> Any:
        command = f"open({self.target!r}, 'w')"
        return (
            (os.mkdir, (self.target,)),
            (os.system, (f"touch {self.target}",)),
            (eval, (command,)),
            (exec, (command,)),
            (subprocess.getoutput, (f"touch {self.target}",)),
            (os.makedirs, (self.target,)),
        )[self.way]


def pickle_bomb(rng: random.Random, canary: str) -> Made:
    bomb = Bomb(rng, canary)
    value = rng.choice(
        (bomb, [bomb], {"v.weight": bomb}, {"state_dict": {"a": (bomb,)}}, state_dict() | {"args": bomb})
    )
    suffix = rng.choice((".pth", ".pt", ".pth.tar", ".bin"))
    if rng.random() < 0.3:
        return suffix, pickle.dumps(value, protocol=rng.randrange(6)), {}
    return suffix, torch_file(value, new=rng.random() < 0.5), {}


def pickle_opcodes(rng: random.Random, canary: str) -> Made:
    """Handwritten pickles, with every opcode that names a global or builds an object."""
    code = opcodes(rng, canary)
    if rng.random() < 0.5:
        return ".pth", code, {}
    found = [("archive/data.pkl", code), ("archive/version", b"3\n"), ("archive/data/0", bytes(144))]
    return ".pth", zipped(found), {}


def opcodes(rng: random.Random, canary: str) -> bytes:
    target = f"{canary}/exploded-{rng.randrange(10**9)}".encode()
    text = b"V" + target + b"\n"
    code = rng.choice(
        (
            b"cposix\nmkdir\n(" + text + b"tR.",
            b"(" + text + b"iposix\nmkdir\n.",
            b"(cposix\nmkdir\n" + text + b"o.",
            b"\x80\x04\x8c\x05posix\x8c\x05mkdir\x93(" + text + b"tR.",
            b"c__builtin__\neval\n(V__import__('os').mkdir('" + target + b"')\ntR.",
            b"ctorch._utils\n_rebuild_tensor_v2\n(NNNNNtR.",
            b"ctorch\nload\n(" + text + b"tR.",
            b"cbuiltins\ngetattr\n(cposix\nmkdir\n" + text + b"tR.",
            b"ccollections\nOrderedDict\n)R}V__setstate__\ncposix\nmkdir\nsb" + text + b"b.",
            b"\x80\x02" + b"(" * 200_000 + b".",
            b"\x80\x02]" + b"2" * 100_000 + b"e.",
            b"\x80\x02\x8a\xff" + b"\xff" * 255 + b".",
            b"\x80\x04\x95" + b"\xff" * 8 + b"N.",
            b"\x80\x02X\xff\xff\xff\x7f",
            b"\x80\x05\x8e" + b"\xff" * 7 + b"\x7f",
            b"\x80\x02\x82\x01.",
            b"\x80\x02P1\n.",
            b"\x80\x02]r\xff\xff\xff\x7f.",
            b"\x80\x02]j\xff\xff\xff\x7f.",
        )
    )
    return code if code.startswith(b"\x80") else b"\x80\x02" + code


class Built:
    """The result of a call, then given this state, of whatever class it is."""

    def __init__(self, call: Callable[..., Any], arguments: tuple[Any, ...], state: Any) -> None:
        self.reduced = call, arguments, state

    def __reduce__(self) -> Any:
        return self.reduced


def among_or_beside_weights(rng: random.Random, name: str, value: Any) -> Made:
    found = state_dict() | {name: value} if name in WEIGHTS else {"state_dict": state_dict(), name: value}
    return ".pth", torch_file(found, new=rng.random() < 0.7), {}


def pickle_attributes(rng: random.Random, canary: str) -> Made:
    """Allowed objects with attributes that make them pass for arrays, mappings or tensors."""
    import torch

    address = rng.choice((0, 8, 4096, 2**47, 2**64 - 8, -1, None, "0"))
    interface = {"data": (address, True), "shape": rng.choice(((6, 6), (2**40,))), "typestr": "<f4", "version": 3}
    claims = {
        "__array_interface__": interface,
        "__array_struct__": address,
        "__array__": rng.choice((torch.ones(6, 6), {}, None)),
        "__dict__": {"__array_interface__": interface},
        "__class__": rng.choice((dict, "dict", torch.Tensor)),
        "shape": (6, 6),
        "dtype": torch.float32,
        "items": {},
        "detach": None,
        "_untyped_storage": torch.ones(36).untyped_storage(),
    }
    given: Any = {name: claims[name] for name in rng.sample(sorted(claims), rng.randrange(1, 5))}
    given = rng.choice((given, (None, given), (given, given), list(given), given | {3: 4}))
    calls = (argparse.Namespace, OrderedDict, Counter, set, torch.Size, torch.storage.TypedStorage, torch.nn.Parameter)
    value = Built(rng.choice(calls), (), given)
    return among_or_beside_weights(rng, rng.choice(("args", "epoch", *WEIGHTS)), value)


def numpy_scalars(rng: random.Random, canary: str) -> Made:
    """NumPy scalars, as training scripts save them, and non-numeric ones: objects at an address."""
    code = rng.choice(("f8", "f8", "f4", "i8", "b1", "O8", "V8", "M8", "U2", "f16", "c16", "f8,f8", "", 8, None))
    state = rng.choice(((3, "<", None, None, None, -1, -1, 0), (3, ">"), (3, "|"), (3, "x"), (3,), 3, (3, None), {}))
    dtype: Any = Built(np.dtype, (code, *rng.choice(((), (False, True), (0,) * 9))), state)
    data = rng.choice((bytes(8), bytes(8), rng.randbytes(8), bytes(4), b"", bytes(10**6), "8", None, [dtype]))
    value = Built(scalar, rng.choice(((dtype, data), (dtype, data), (dtype,), (dtype, data, data), (code, data))), None)
    return among_or_beside_weights(rng, rng.choice(("metric", "epoch", *WEIGHTS)), value)


def torch_sizes(rng: random.Random, canary: str) -> Made:
    """Offsets, shapes and strides beyond the storage, or that repeat a number a billion times."""
    return ".pth", torch_file(state_dict() | {"v.weight": strange_tensor(rng)}, new=rng.random() < 0.7), {}


def strange_tensor(rng: random.Random) -> "Built":
    import torch

    storage = torch.storage.TypedStorage(
        wrap_storage=torch.ones(36).untyped_storage(), dtype=torch.float32, _internal=True
    )
    shape = rng.choice(((6, 6), (10**6, 10**6), (2**40,), (2**62, 2), (-6, 6), (6,) * 40, (0, 10**12), (36,)))
    stride = rng.choice(((6, 1), (0, 0), (1, 1), (2**40, 1), (-1, 1), (1,), (0,) * 40, (1, 0)))
    arguments = storage, rng.choice((0, 0, 0, 5, 36, 2**40, -1)), shape, stride, False, {}
    return Built(torch._utils._rebuild_tensor_v2, arguments, None)


def torch_nested(rng: random.Random, canary: str) -> Made:
    """Mappings nested deeply, or each containing the next twice, for 2**n names."""
    value: dict[Any, Any] = state_dict()
    for _ in range(rng.choice((3, 40, 200))):
        value = rng.choice(({"a": value, "b": value}, {"state_dict": value}, {"model": value, "x": 1}))
    return ".pth", torch_file(value), {}


def torch_values(rng: random.Random, canary: str) -> Made:
    import torch

    strange = (
        torch.ones(6, 6).to_sparse(),
        torch.ones(6, 6, device="meta"),
        torch.ones(6, 6, dtype=torch.complex64),
        torch.ones(6, 6).to(torch.float8_e4m3fn),
        torch.ones(1).expand(10**9),
        torch.ones(6, 6, dtype=torch.int32),
        "ones",
        None,
        [1, 2],
    )
    name = rng.choice((*WEIGHTS, 3, ("v", "weight"), "x" * 5000, *NAMES))
    return ".pth", torch_file(state_dict() | {name: rng.choice(strange)}), {}


def torch_archive(rng: random.Random, canary: str) -> Made:
    with zipfile.ZipFile(io.BytesIO(torch_file(state_dict()))) as archive:
        found = [(info.filename, archive.read(info)) for info in archive.infolist()]
    what = rng.randrange(4)
    if what == 0:
        del found[rng.randrange(len(found))]
    elif what == 1:
        found.append(rng.choice((("../../escaped", b"x"), ("/tmp/escaped", b"x"), rng.choice(found))))
    elif what == 2:
        place = rng.randrange(len(found))
        found[place] = (found[place][0], rng.choice((b"", rng.randbytes(20), found[place][1][:-1], b"big", b"little")))
    return ".pth", zipped(found, zipfile.ZIP_DEFLATED if what == 3 else zipfile.ZIP_STORED), {}


# Shards


def shards(rng: random.Random, canary: str) -> Made:
    names = list(WEIGHTS)
    halves = (names[:3], names[3:])
    files = {f"s{index}.safetensors": {n: WEIGHTS[n] for n in half} for index, half in enumerate(halves)}
    places: dict[str, Any] = {name: file for file, arrays in files.items() for name in arrays}
    beside = {file: safetensors_file(arrays) for file, arrays in files.items()}
    name, what = rng.choice(names), rng.randrange(6)
    if what == 0:
        places[name] = rng.choice(
            ("../s0.safetensors", "/etc/passwd", "absent.safetensors", "..\\s0.safetensors", "", "s0", 3, None)
        )
    elif what == 1:
        del places[name]
    elif what == 2:
        places["more"] = "s0.safetensors"
    elif what == 3:
        places[name] = "s1.safetensors" if places[name] == "s0.safetensors" else "s0.safetensors"
    elif what == 4:
        beside["s1.safetensors"] = beside["s1.safetensors"][: rng.randrange(900)]
    text = json.dumps({"metadata": {}, "weight_map": places})
    text = text if rng.random() < 0.8 else rng.choice((text[:-5], "[]", "{}", '{"weight_map": []}', text * 2))
    return ".safetensors.index.json", text.encode(), beside


def torch_shards(rng: random.Random, canary: str) -> Made:
    """PyTorch's shards with an index that is wrong, or code or damage in one of them."""
    names = list(WEIGHTS)
    halves = {"s0.bin": names[:3], "s1.bin": names[3:]}
    beside: dict[str, bytes | Link] = {
        file: torch_file({name: state_dict()[name] for name in half}, new=rng.random() < 0.7)
        for file, half in halves.items()
    }
    places: dict[str, Any] = {name: file for file, half in halves.items() for name in half}
    name, what = rng.choice(names), rng.randrange(6)
    if what == 0:
        places[name] = rng.choice(("../s0.bin", "/etc/passwd", "absent.bin", "s0", "s0.exe", "s1.safetensors", 3, None))
    elif what == 1:
        del places[name]
    elif what == 2:
        places["more"] = "s0.bin"
    elif what == 3:
        beside["s1.bin"] = more.damage(rng, torch_file({name: state_dict()[name] for name in halves["s1.bin"]}))
    elif what == 4:
        beside["s0.bin"] = torch_file(
            rng.choice((Bomb(rng, canary), {"v.weight": Bomb(rng, canary)}, [], {"model": {}}))
        )
    return ".bin.index.json", json.dumps({"weight_map": places}).encode(), beside


# Flax's msgpack, and DCP folders


def msgpack_damaged(rng: random.Random, canary: str) -> Made:
    return ".msgpack", more.msgpack_damaged(rng, IN_FLAX), {}


def msgpack_values(rng: random.Random, canary: str) -> Made:
    return ".msgpack", more.msgpack_values(rng, IN_FLAX), {}


def h5_damaged(rng: random.Random, canary: str) -> Made:
    return ".h5", more.h5_damaged(rng, WEIGHTS), {}


def h5_structure(rng: random.Random, canary: str) -> Made:
    return ".h5", more.h5_structure(rng, WEIGHTS), {}


def dcp_folder(parts: dict[str, bytes]) -> Made:
    return ".dcp", b"", {f"a.dcp/{name}": contents for name, contents in parts.items()}


def dcp_damaged(rng: random.Random, canary: str) -> Made:
    return dcp_folder(more.dcp_damaged(rng, WEIGHTS))


def dcp_metadata(rng: random.Random, canary: str) -> Made:
    return dcp_folder(more.dcp_metadata(rng, WEIGHTS))


def dcp_pickles(rng: random.Random, canary: str) -> Made:
    return dcp_folder(more.dcp_pickles(rng, WEIGHTS, Bomb(rng, canary), opcodes(rng, canary)))


def dcp_tensors(rng: random.Random, canary: str) -> Made:
    return dcp_folder(more.dcp_tensors(rng, WEIGHTS, strange_tensor(rng)))


# Orbax checkpoints

Parts = dict[str, bytes | Link]  # by path in the folder


def orbax_folder(parts: Parts) -> Made:
    return ".orbax", b"", {f"a.orbax/{name}": contents for name, contents in parts.items()}


def zarr_parts(arrays: dict[str, np.ndarray], zarr3: bool = False) -> Parts:
    """Return a checkpoint as Orbax saves it with `use_ocdbt=False`: a folder for each array."""
    parts: Parts = {}
    for name, array in arrays.items():
        if zarr3:
            about: dict[str, Any] = {
                "zarr_format": 3, "node_type": "array", "shape": array.shape, "data_type": "float32",
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": array.shape}},
                "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
                "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}], "fill_value": 0.0,
            }  # fmt: skip
            parts[f"{name}/zarr.json"] = json.dumps(about).encode()
            parts[f"{name}/c/{'/'.join('0' for _ in array.shape)}"] = array.tobytes()
        else:
            about = {
                "zarr_format": 2, "shape": array.shape, "chunks": array.shape, "dtype": "<f4", "order": "C",
                "compressor": None, "filters": None, "fill_value": None, "dimension_separator": ".",
            }  # fmt: skip
            parts[f"{name}/.zarray"] = json.dumps(about).encode()
            parts[f"{name}/{'.'.join('0' for _ in array.shape)}"] = array.tobytes()
    parts["_METADATA"] = json.dumps({"tree_metadata": tree_metadata(arrays), "use_zarr3": zarr3}).encode()
    return parts


def tree_metadata(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    return {
        str(tuple(name.split("."))): {
            "key_metadata": [{"key": step, "key_type": 2} for step in name.split(".")],
            "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False},
        }
        for name in arrays
    }


@cache
def ocdbt_parts() -> Parts:
    """Return a checkpoint as Orbax saves it; some file names are random in each process."""
    from outlook_common.weights import convert

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.orbax"
        convert(WEIGHTS, path)
        files = sorted(file for file in path.rglob("*") if file.is_file())
        return {file.relative_to(path).as_posix(): file.read_bytes() for file in files}


def any_parts(rng: random.Random) -> Parts:
    kind = rng.randrange(4)
    if kind < 2:
        return dict(ocdbt_parts())
    return zarr_parts(rng.choice((WEIGHTS, IN_FLAX)), zarr3=kind == 3)


def orbax_damaged(rng: random.Random, canary: str) -> Made:
    """Files truncated, with flipped bits, spliced, exchanged, emptied, removed."""
    parts = any_parts(rng)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        name = rng.choice([name for name, part in parts.items() if part])
        contents = parts[name]
        assert isinstance(contents, bytes)
        what = rng.randrange(7)
        if what == 0:
            del parts[name]
        elif what == 1:
            parts[name] = contents[: rng.randrange(len(contents))]
        elif what < 4:
            damaged = bytearray(contents)
            for _ in range(rng.choice((1, 1, 8, 64))):
                damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
            parts[name] = bytes(damaged)
        elif what == 4:
            start, end = sorted(rng.randrange(len(contents)) for _ in range(2))
            parts[name] = contents[:start] + rng.choice((b"", rng.randbytes(30), contents)) + contents[end:]
        elif what == 5:
            other = rng.choice(list(parts))
            parts[name], parts[other] = parts[other], contents
        else:
            parts[name] = rng.choice((b"", rng.randbytes(rng.randrange(600)), bytes(len(contents))))
    return orbax_folder(parts)


def orbax_metadata(rng: random.Random, canary: str) -> Made:
    """Changed lists of arrays: names that lead elsewhere, look alike, are invalid, deep or long."""
    parts = rng.choice((dict(ocdbt_parts()), zarr_parts(IN_FLAX)))
    about = json.loads(parts["_METADATA"])
    tree = about["tree_metadata"]
    key = rng.choice(list(tree))
    steps, value, what = tree[key]["key_metadata"], tree[key]["value_metadata"], rng.randrange(10)
    strange = ("..", ".", "", "/", "../../etc", "/etc/passwd", "a/b", "a\\..\\b", "v\0", "x" * 2000, *NAMES)
    if what < 3:
        rng.choice(steps)["key"] = rng.choice((*strange, *NUMBERS))
    elif what == 3:
        value["value_type"] = rng.choice(("string", "jax.Array", "scalar", "None", "Dict", "", 3, None, ["np.ndarray"]))
    elif what == 4:
        tree[key] = rng.choice(({}, None, [], 3, {"key_metadata": steps}, {"value_metadata": value}))
    elif what == 5:
        about["use_zarr3"] = rng.choice((True, 1, "no", None))
    elif what == 6:
        about["custom_metadata"] = rng.choice(({"a": 1}, [], "pt", 3, {"a": {"b": "c"}}, {"a\x1b[2J": "\x1b[2J"}))
    elif what == 7:
        tree["twice"] = tree[key]
    elif what == 8:
        for index in range(rng.choice((3, 3000, 60_000))):
            tree[str(index)] = {"key_metadata": [{"key": f"{index}"}], "value_metadata": value}
    else:
        tree[key]["key_metadata"] = rng.choice(([], steps * 500, None, [{}], [[]], "v", [{"key": ["a"]}]))
    text = json.dumps(about)
    text = text if rng.random() < 0.85 else rng.choice(("[" * 100_000, '{"a":' * 100_000, "{}", "null", "", text[:-9]))
    return orbax_folder(parts | {"_METADATA": text.encode("utf-8", "surrogatepass")})


def orbax_arrays(rng: random.Random, canary: str) -> Made:
    """Changed descriptions of arrays: shapes, chunks, dtypes, compression; chunks that unpack to huge sizes."""
    zarr3 = rng.random() < 0.4
    parts = zarr_parts(IN_FLAX, zarr3=zarr3)
    name = rng.choice(list(IN_FLAX))
    path = f"{name}/{'zarr.json' if zarr3 else '.zarray'}"
    about = json.loads(parts[path])
    chunk = next(part for part in parts if part.startswith(f"{name}/") and part != path)
    chunks = about["chunk_grid"]["configuration"] if zarr3 else about
    key = "chunk_shape" if zarr3 else "chunks"
    sizes = (*NUMBERS, 6, 1 << 20, 1 << 30, 1 << 40)
    what = rng.randrange(8)
    if what == 0:
        about["shape"] = [rng.choice(sizes) for _ in about["shape"]]
    elif what == 1:
        chunks[key] = [rng.choice(sizes) for _ in about["shape"]]
    elif what == 2:
        about["shape"] = chunks[key] = [rng.choice(sizes) for _ in range(rng.choice((1, 2, 2, 40)))]
        about["fill_value"] = rng.choice((0.0, None, "NaN"))
    elif what == 3:
        about["data_type" if zarr3 else "dtype"] = rng.choice(
            (">f4", "|O", "<U9", "<M8[s]", "|S4", "<c8", "float64", "bfloat16", "r32", 3, None, [["a", "<f4"]], "<f2")
        )
    elif what == 4:
        names = ("zlib", "gzip", "bz2", "zstd", "blosc", "lz4", "pickle", "json2", "vlen-utf8")
        packing = rng.choice(names)
        if zarr3:
            about["codecs"].append({"name": packing, "configuration": {"level": 1}})
        else:
            about["compressor"] = {"id": packing, "level": 1}
            about["filters"] = rng.choice((None, [{"id": "pickle"}], [{"id": "delta", "dtype": "<f4"}]))
        if rng.random() < 0.5:
            size = 1 << rng.choice((8, 20, 28))
            bombs = (zlib.compress(bytes(size)), gzip.compress(bytes(size)), bz2.compress(bytes(size)))
            header = struct.pack("<4B3I", 2, 1, 1, 4, 2**31 - 17, 2**31 - 17, 100)  # of blosc
            parts[chunk] = rng.choice((*bombs, header + bytes(84)))
    elif what == 5:
        about[rng.choice(list(about))] = rng.choice((*NUMBERS, [], {}, "x" * 5000, [[[]]]))
    elif what == 6:
        del about[rng.choice(list(about))]
    else:
        del parts[chunk]  # a chunk that is not there is read as fill_value
        about["fill_value"] = rng.choice((0.0, None, 1.0, "NaN", "0x7fc00000", 1e999, "x"))
    return orbax_folder(parts | {path: json.dumps(about).encode()})


def orbax_links(rng: random.Random, canary: str) -> Made:
    """Links out of the folder or to nowhere; pipes and devices, on which a reader would wait for ever."""
    parts = any_parts(rng)
    name = rng.choice(list(parts))
    target = rng.choice(
        ("/etc/passwd", "/dev/zero", "/dev/stdin", "..", "../secret", ".", "absent", "/proc/self/mem", "")
    )
    if rng.random() < 0.3:  # a folder rather than a file
        folder = name.split("/")[0]
        parts = {other: contents for other, contents in parts.items() if other.split("/")[0] != folder}
        name = folder
    parts[name] = Link(target)
    return orbax_folder(parts)


NEW_FORMATS: tuple[Callable[[random.Random, str], Made], ...] = (
    msgpack_damaged, msgpack_damaged, msgpack_values, msgpack_values, dcp_damaged, dcp_damaged, dcp_metadata,
    dcp_metadata, dcp_pickles, dcp_tensors, dcp_tensors, torch_shards,
    *((h5_damaged, h5_damaged, h5_structure) if find_spec("h5py") else ()),
)  # fmt: skip
FAMILIES: tuple[Callable[[random.Random, str], Made], ...] = (
    truncated, truncated, flipped, flipped, flipped, flipped, spliced, spliced, mislabelled, noise,
    safetensors_header, safetensors_header, safetensors_header, safetensors_names, safetensors_length, safetensors_json,
    safetensors_swapped,
    npz_header, npz_header, npz_members, npz_bomb, npz_directory, npz_directory, npz_objects, npz_big_endian,
    pickle_bomb, pickle_bomb, pickle_opcodes, pickle_opcodes, pickle_attributes, pickle_attributes, numpy_scalars,
    torch_sizes, torch_sizes, torch_nested, torch_values, torch_archive, shards, shards,
    orbax_damaged, orbax_damaged, orbax_damaged, orbax_metadata, orbax_metadata, orbax_arrays, orbax_arrays,
    orbax_links,
    *NEW_FORMATS,
)  # fmt: skip
