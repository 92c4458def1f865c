"""Damaged and hostile files of Flax's `.msgpack`, DCP folders, and PyTorch's shards; see `hostile_files`."""

import io
import pickle
import random
import struct
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

# What the other formats' kinds use too.
Parts = dict[str, Any]
Arrays = dict[str, np.ndarray]
NUMBERS = (-1, 0, 1, 5, 2**31, 2**32 - 1, 2**40, 2**62)
STRANGE = ("..", ".", "", "/", "../../etc", "a/b", "v\0", "x" * 2000, "v.weіght", "\x1b[2Jv", "v.weight")


def flip(rng: random.Random, contents: bytes) -> bytes:
    """Change bits, mostly near either end."""
    damaged = bytearray(contents)
    spread = rng.choice((60, 300, 1500, len(damaged)))
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        place = rng.randrange(min(spread, len(damaged)))
        damaged[rng.choice((place, len(damaged) - 1 - place))] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def damage(rng: random.Random, contents: bytes) -> bytes:
    """Truncate, flip, splice or replace."""
    what = rng.randrange(8)
    if what < 4:
        return flip(rng, contents)
    if what < 6:
        return contents[: rng.randrange(len(contents))]
    start, end = sorted(rng.randrange(len(contents)) for _ in range(2))
    other = rng.choice((b"", rng.randbytes(rng.randrange(1, 64)), contents[start:end] * 2, bytes(end - start)))
    return contents[:start] + other + contents[end:]


# Flax's msgpack


def packed(value: Any) -> bytes:
    """Pack as Flax does; what is packed already (`bytes`) is taken as it is."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, np.ndarray):
        return extension(1, array(value))
    if isinstance(value, dict):
        head = bytes([0x80 | len(value)]) if len(value) < 16 else b"\xdf" + struct.pack(">I", len(value))
        return head + b"".join(packed(part) for item in value.items() for part in item)
    if isinstance(value, str):
        text = value.encode("utf-8", "surrogatepass")
        return b"\xdb" + struct.pack(">I", len(text)) + text
    return {None: b"\xc0", True: b"\xc3"}.get(value, b"\xd3" + struct.pack(">q", int(value or 0)))


def array(value: np.ndarray, shape: Any = None, dtype: Any = None, data: bytes | None = None) -> bytes:
    """The inside of an array's extension, with parts of it changed."""
    shape = value.shape if shape is None else shape
    sizes = b"".join(packed(size) for size in shape)
    data = value.tobytes() if data is None else data
    head = b"\xdd" + struct.pack(">I", len(shape))
    return b"\x93" + head + sizes + packed(dtype or value.dtype.name) + b"\xc6" + struct.pack(">I", len(data)) + data


def extension(kind: int, inside: bytes, length: int | None = None) -> bytes:
    return b"\xc9" + struct.pack(">Ib", len(inside) if length is None else length, kind) + inside


def nested(arrays: Arrays) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in arrays.items():
        *above, leaf = name.split(".")
        at = tree
        for step in above:
            at = at.setdefault(step, {})
        at[leaf] = value
    return tree


def chunked(value: np.ndarray, size: int) -> dict[str, Any]:
    """An array as Flax splits large ones."""
    flat = value.reshape(-1)
    parts = [flat[start : start + size] for start in range(0, len(flat), size)]
    return {"__msgpack_chunked_array__": True, "shape": numbered(value.shape), "chunks": numbered(parts)}


def numbered(items: Iterable[Any]) -> dict[str, Any]:
    """A list as Flax keeps it."""
    return {str(index): item for index, item in enumerate(items)}


def msgpack_damaged(rng: random.Random, arrays: Arrays) -> bytes:
    tree = nested(arrays)
    if rng.random() < 0.5:
        tree["v"]["kernel"] = chunked(tree["v"]["kernel"], rng.choice((1, 5, 36)))
    return damage(rng, packed(tree))


def msgpack_values(rng: random.Random, arrays: Arrays) -> bytes:
    """Wrong sizes, shapes, dtypes, names and nesting; chunks that do not make an array."""
    tree = nested(arrays)
    value = tree["v"]["kernel"]
    what = rng.randrange(10)
    shape: list[Any] = list(value.shape)
    if what == 0:
        shape[rng.randrange(2)] = rng.choice((*NUMBERS, None, "6"))
        tree["v"]["kernel"] = extension(1, array(value, shape=rng.choice((shape, shape * 40, []))))
    elif what == 1:
        dtype = rng.choice(("float64", "bfloat16", "int32", "object", "O", "V4", "complex64", "", "x" * 5000, "f4"))
        tree["v"]["kernel"] = extension(rng.choice((1, 3)), array(value, dtype=dtype))
    elif what == 2:
        tree["v"]["kernel"] = extension(1, array(value), length=rng.choice((0, 1, 150, 10**6, 2**32 - 1)))
    elif what == 3:
        data = b"" if rng.random() < 0.3 else bytes(rng.choice((1, 143, 145, 288)))
        tree["v"]["kernel"] = extension(rng.choice((0, 1, 2, 3, 4, -1)), array(value, data=data))
    elif what == 4:
        split = chunked(value, rng.choice((1, 7, 36, 100)))
        part = rng.choice(("shape", "chunks", "__msgpack_chunked_array__"))
        if part == "chunks":
            split[part][rng.choice(("0", "1", "9", "x"))] = rng.choice((value, value[0], value[0].astype("f8"), {}, 3))
        elif part == "shape":
            split[part][rng.choice(("0", "1", "2", "x"))] = rng.choice(NUMBERS)
        else:
            split[rng.choice((part, "more"))] = rng.choice((False, {}, value))
        tree["v"]["kernel"] = split
    elif what == 5:
        tree["v"][rng.choice(STRANGE)] = tree["v"].pop("kernel") if rng.random() < 0.5 else value
    elif what == 6:
        deep: Any = value
        for _ in range(rng.choice((3, 70, 3000))):
            deep = packed({"a": deep})
        tree["deep"] = deep
    elif what == 7:
        tree |= {f"{index}{'x' * rng.choice((0, 1000))}": 0 for index in range(rng.choice((1, 100, 30_000)))}
    elif what == 8:
        inside = packed(tree)[1:]
        twice = packed("v") + packed(tree["v"])
        return bytes([0x80 | (len(tree) + 1)]) + inside + twice
    else:
        kinds = (b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff")
        return rng.choice((
            b"", b"\x80", b"\xc1", b"\xc0", b"\x91" * 100_000, b"\x81\xa1a" * 50_000, b"\xdd\x00\x01\x00\x00" * 20_000,
            packed(tree) + b"\0", b"\x93" + packed(tree), *(kind + rng.randbytes(9) for kind in kinds),
            b"\x82\xa1a" + rng.choice(kinds), b"\x81\x93\1\2\3\1", b"\x81\xa2\xff\xfe\1", packed({"a": b"\xc9\0\0"}),
        ))  # fmt: skip
    return packed(tree)


# Keras' HDF5

H5_SIZES = (0, 1, 3, 6, 1 << 20, 1 << 40)


@cache
def _h5(names: tuple[str, ...], data: tuple[bytes, ...], shapes: tuple[tuple[int, ...], ...]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.h5"
        _write_h5(
            path, {n: np.frombuffer(d, np.float32).reshape(s) for n, d, s in zip(names, data, shapes, strict=True)}
        )
        return path.read_bytes()


def _write_h5(path: Path, arrays: Arrays) -> None:
    import h5py

    with h5py.File(path, "w") as file:
        for name, value in arrays.items():
            file.create_dataset(name.replace(".", "/"), data=value)


def h5_damaged(rng: random.Random, arrays: Arrays) -> bytes:
    """Truncated, with flipped bits, spliced: mostly in what is no number."""
    values = tuple(arrays.values())
    whole = _h5(tuple(arrays), tuple(v.tobytes() for v in values), tuple(v.shape for v in values))
    if rng.random() < 0.4:
        damaged = bytearray(whole)
        for _ in range(rng.choice((1, 2, 8, 32))):
            place = rng.randrange(0, len(damaged), 8)  # the library's fields are aligned
            damaged[place : place + 8] = struct.pack("<q", rng.choice(NUMBERS[:-1]))
        return bytes(damaged)
    return damage(rng, whole)


def h5_structure(rng: random.Random, arrays: Arrays) -> bytes:
    """Links, files elsewhere, filters, circles, other types, shapes and names."""
    import h5py

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.h5"
        _write_h5(path, arrays)
        with h5py.File(path, "r+") as file, suppress(ValueError, TypeError, RuntimeError, OSError):  # impossible ones
            _change_h5(rng, file)
        return path.read_bytes()


def _change_h5(rng: random.Random, file: Any) -> None:
    import h5py

    what, name = rng.randrange(12), rng.choice(("v/weight", "v/more", "extra"))
    if name in file:
        del file[name]
    shape = tuple(rng.choice(H5_SIZES) for _ in range(rng.choice((0, 1, 2, 5))))
    if what == 0:
        file[name] = rng.choice((h5py.SoftLink("/attn"), h5py.ExternalLink("/etc/passwd", "/"), file["attn"]))
    elif what == 1:
        file.create_dataset(name, (4,), np.float32, external=[(rng.choice(("/etc/passwd", "b")), 0, 16)])
    elif what == 2:
        file.create_dataset(name, data=np.zeros((6, 3), np.float32), compression="gzip", chunks=(6, 3))
    elif what == 3:
        file[name] = file["/"]
    elif what == 4:
        file.create_dataset(name, shape, rng.choice(("f4", "f8", "i8", "S9", "c8", ">f2", "?")))
    elif what == 5:
        kinds = ("text", np.zeros(3, [("a", "f4")]), np.void(b"abc"), h5py.Empty("f"), np.array([b"a", b"bc"]))
        file.create_dataset(name, data=rng.choice(kinds))
    elif what == 6:
        file.create_group("/".join("a" * rng.choice((3, 70, 300))))
    elif what == 7:
        for index in range(rng.choice((3, 300))):
            file.create_dataset(f"{index}{'x' * rng.choice((0, 1200))}", data=np.float32(1))
    elif what == 8:
        for strange in rng.sample(STRANGE, 3):
            file.create_dataset(strange, data=np.ones(2, np.float32))
    elif what == 9:
        layout = h5py.VirtualLayout((6, 3), np.float32)
        layout[:] = h5py.VirtualSource("/etc/passwd", "x", (6, 3))
        file.create_virtual_dataset(name, layout)
    elif what == 10:
        file[name] = np.dtype("f4")  # a type and no numbers
    else:
        file.create_dataset("v/weight", data=np.ones((6, 6), rng.choice((">f4", "<f2", "<f8", "<i4"))))


# DCP folders


@cache
def written(names: tuple[str, ...], data: tuple[bytes, ...], shapes: tuple[tuple[int, ...], ...]) -> Parts:
    """A checkpoint as PyTorch writes it."""
    from outlook_common.weights import write_arrays

    arrays = {
        name: np.frombuffer(contents, np.float32).reshape(shape)
        for name, contents, shape in zip(names, data, shapes, strict=True)
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.dcp"
        write_arrays(path, arrays)
        return {file.name: file.read_bytes() for file in path.iterdir()}


def dcp_parts(arrays: Arrays) -> Parts:
    return dict(
        written(
            tuple(arrays), tuple(value.tobytes() for value in arrays.values()), tuple(v.shape for v in arrays.values())
        )
    )


def dcp_blocks(rng: random.Random, arrays: Arrays) -> tuple[Any, dict[str, bytes]]:
    """Metadata and files of a checkpoint whose tensors lie in two blocks each, as two ranks write them."""
    import torch
    from torch.distributed.checkpoint import metadata as about
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    files = {f"__{rank}_0.distcp": bytearray() for rank in range(2)}
    tensors: dict[str, Any] = {}
    stored: dict[Any, Any] = {}
    for name, value in arrays.items():
        half = (value.shape[0] + 1) // 2
        chunks = []
        for rank, (start, part) in enumerate(((0, value[:half]), (half, value[half:]))):
            offsets = torch.Size((start, *[0] * (value.ndim - 1)))
            chunks.append(about.ChunkStorageMetadata(offsets, torch.Size(part.shape)))
            file = io.BytesIO()
            torch.save(torch.from_numpy(part.copy()), file)
            place = list(files)[rank]
            stored[about.MetadataIndex(name, offsets)] = _StorageInfo(place, len(files[place]), len(file.getvalue()))
            files[place] += file.getvalue()
        properties = about.TensorProperties(torch.float32)
        tensors[name] = about.TensorStorageMetadata(properties, torch.Size(value.shape), chunks)
    paths = {name: (name,) for name in arrays}
    return about.Metadata(tensors, paths, stored), {name: bytes(contents) for name, contents in files.items()}


def dcp_damaged(rng: random.Random, arrays: Arrays) -> Parts:
    """Files truncated, with flipped bits, spliced, exchanged, emptied, removed."""
    parts = dcp_parts(arrays)
    if rng.random() < 0.5:
        found, files = dcp_blocks(rng, arrays)
        parts = {**files, ".metadata": pickle.dumps(found)}
    name = rng.choice(list(parts))
    what = rng.randrange(6)
    if what == 0:
        del parts[name]
    elif what == 1:
        other = rng.choice(list(parts))
        parts[name], parts[other] = parts[other], parts[name]
    elif what == 2:
        parts[name] = rng.choice((b"", rng.randbytes(300), bytes(len(parts[name]))))
    else:
        parts[name] = damage(rng, parts[name])
    return parts


def dcp_metadata(rng: random.Random, arrays: Arrays) -> Parts:
    """Changed lists of tensors: blocks that overlap, leave gaps or reach beyond; places elsewhere; other classes."""
    import torch

    found, files = dcp_blocks(rng, arrays)
    name = rng.choice(list(arrays))
    tensor = found.state_dict_metadata[name]
    index = rng.choice([index for index in found.storage_data if index.fqn == name])
    place = found.storage_data[index]
    block = rng.choice(tensor.chunks)
    sizes = [rng.choice((*NUMBERS[1:], 6, 3)) for _ in tensor.size]
    what = rng.randrange(12)
    if what == 0:
        block.offsets = torch.Size(sizes)
    elif what == 1:
        block.sizes = torch.Size(sizes)
    elif what == 2:
        tensor.size = torch.Size(rng.choice((sizes, [*tensor.size, 1], [], [6] * 40)))
    elif what == 3:
        tensor.chunks = rng.choice((tensor.chunks * 2, tensor.chunks[:1], [], tensor.chunks * 500, None, "x"))
    elif what == 4:
        place.offset = rng.choice((*NUMBERS, 1.5, "0", None))
    elif what == 5:
        place.length = rng.choice((*NUMBERS, 100, "9", None))
    elif what == 6:
        place.relative_path = rng.choice(
            (*STRANGE, "/etc/passwd", "../a.distcp", "absent.distcp", "..\\a.distcp", "__1_0.distcp", 3, None)
        )
    elif what == 7:
        tensor.properties.dtype = rng.choice(
            (torch.float64, torch.float16, torch.complex64, torch.float8_e4m3fn, torch.bool, None, "float32")
        )
    elif what == 8:
        found.state_dict_metadata[rng.choice((*STRANGE, 3, ("a",)))] = tensor
    elif what == 9:
        found.planner_data = rng.choice((
            None, [], {name: ("a", name)}, {name: ("v",)}, {name: ()}, {name: ("x",) * 200}, {name: (1, "a")},
            dict.fromkeys(arrays, ("same",)), {name: "v"},
        ))  # fmt: skip
    elif what == 10:
        del found.storage_data[index]
    else:
        found.storage_data = rng.choice((None, [], {"a": place}, {index: "b"}, {index: index}))
    return {**files, ".metadata": pickle.dumps(found, protocol=rng.choice((2, 4, 5)))}


def dcp_pickles(rng: random.Random, arrays: Arrays, bomb: Any, opcodes: bytes) -> Parts:
    """Code in `.metadata`, or in the archive of a block."""
    found, files = dcp_blocks(rng, arrays)
    what = rng.randrange(5)
    if what == 0:
        return {**files, ".metadata": opcodes}
    if what == 1:
        return {**files, ".metadata": pickle.dumps(rng.choice((bomb, [bomb], {"a": bomb})), protocol=2)}
    if what == 2:
        found.planner_data = rng.choice((bomb, {"a": bomb}))
    elif what == 3:
        found.state_dict_metadata[rng.choice(list(arrays))] = bomb
    else:
        import torch

        file = io.BytesIO()
        torch.save(rng.choice((bomb, [bomb], {"a": bomb})), file)
        index = rng.choice(list(found.storage_data))
        place = found.storage_data[index]
        place.offset, place.length = len(files[place.relative_path]), len(file.getvalue())
        files[place.relative_path] += file.getvalue()
    return {**files, ".metadata": pickle.dumps(found)}


def dcp_tensors(rng: random.Random, arrays: Arrays, replaced: Any) -> Parts:
    """Other tensors in the archives than `.metadata` says: beyond their storage, of other shapes, strides or dtypes."""
    import torch

    found, files = dcp_blocks(rng, arrays)
    index = rng.choice([index for index in found.storage_data if index.fqn == "v.weight"])
    place = found.storage_data[index]
    value = rng.choice((
        replaced, replaced, replaced,
        torch.ones(3, 6).t().contiguous().t(), torch.ones(6, 6)[:3], torch.ones(3, 12)[:, ::2],
        torch.ones(3, 6, dtype=torch.float64), torch.ones(18), torch.ones(1, 6).expand(3, 6), "x", None, 3,
        torch.ones(3, 6).to_sparse(), torch.ones(3, 6, device="meta"), torch.nn.Parameter(torch.ones(3, 6)),
    ))  # fmt: skip
    file = io.BytesIO()
    torch.save(value, file)
    contents = file.getvalue() if rng.random() < 0.8 else damage(rng, file.getvalue())
    place.offset, place.length = len(files[place.relative_path]), len(contents)
    files[place.relative_path] += contents
    return {**files, ".metadata": pickle.dumps(found)}
