"""Flax's msgpack, distributed checkpoints of PyTorch's (DCP), and PyTorch's shards with an index."""

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import flax.serialization
import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from flax.traverse_util import flatten_dict, unflatten_dict

import outlook_jax
from outlook_common.arrays import DTYPES, to_tensor
from outlook_common.weights import WeightsError, convert, inspect, read_arrays, resolve, write_arrays
from outlook_common.weights.checkpoint import open_checkpoint
from outlook_common.weights.formats.registry import open_file
from outlook_common.weights.io.pieces import tiling_error
from parity_tests.weights.hostile_formats import array, dcp_blocks, extension
from parity_tests.weights.layers import (
    FLOATS,
    IN_FLAX,
    TABLE,
    TWINS,
    WEIGHTS,
    any_bits,
    assert_same_bits,
    both_twins,
    layer_bits,
)

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
SUFFIXES = (".msgpack", ".dcp")


def save_dcp(state: dict[str, Any], path: Path) -> None:
    dcp.save(state, checkpoint_id=path, no_dist=True)


def tensors(arrays: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: to_tensor(array) for name, array in arrays.items()}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_gives_back_every_bit_of_every_dtype_and_shape(tmp_path: Path, suffix: str) -> None:
    rng = np.random.default_rng(0)
    arrays = {f"{dtype}.bits": any_bits((3, 4), dtype, rng) for dtype in FLOATS}
    arrays |= {f"{dtype}.scalar": any_bits((6,), dtype, rng)[5].reshape(()) for dtype in FLOATS}
    arrays |= {f"{name}.whole": np.asarray(rng.integers(0, 2, (2, 3)), dtype) for name, dtype in DTYPES.items()}
    arrays |= {"turned": any_bits((3, 5), "bfloat16", rng).T, "large": rng.random((700, 400))}
    write_arrays(tmp_path / f"a{suffix}", arrays)
    assert_same_bits(read_arrays(tmp_path / f"a{suffix}"), arrays)


@both_twins
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_both_twins_save_and_load(tmp_path: Path, twin: str, suffix: str) -> None:
    package, make = TWINS[twin]
    first, second = make(), make()
    package.load_weights(first, WEIGHTS)
    package.save_weights(first, tmp_path / f"a{suffix}")
    package.load_weights(second, tmp_path / f"a{suffix}")
    assert_same_bits(package.export_weights(second), WEIGHTS)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_checkpoint_is_replaced_whole_and_nothing_else_is(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    convert(WEIGHTS, path)
    convert({name: array + 1 for name, array in WEIGHTS.items()}, path)
    assert all(np.array_equal(array, WEIGHTS[name] + 1) for name, array in resolve(path, TABLE).items())
    beside = {f"{path.name}.outlook.json"} if suffix == ".msgpack" else set()
    assert {file.name for file in tmp_path.iterdir()} == {path.name, *beside}
    other = tmp_path / f"other{suffix}"
    other.mkdir()
    (other / "precious").touch()
    with pytest.raises(WeightsError, match=r"a folder, expected a file|is not replaced"):
        convert(WEIGHTS, other)


# Flax's msgpack


def test_what_flax_writes_is_read_and_what_is_written_flax_reads(tmp_path: Path) -> None:
    tree = unflatten_dict(IN_FLAX, sep=".")
    state = {"params": tree, "step": 7, "opt_state": [{"mu": tree}, None, 2.5, "x", np.float32(3), np.complex64(1j)]}
    (tmp_path / "a.msgpack").write_bytes(flax.serialization.to_bytes(state))
    assert_same_bits(resolve(tmp_path / "a.msgpack", TABLE, prefix="params"), WEIGHTS)
    convert(tmp_path / "a.msgpack", tmp_path / "b.msgpack", prefix="params")  # Flax's names, as Flax's users expect
    found = flatten_dict(flax.serialization.msgpack_restore((tmp_path / "b.msgpack").read_bytes()), sep=".")
    assert_same_bits(found, IN_FLAX)
    layer = TWINS["jax"][1]()
    outlook_jax.load_weights(layer, tmp_path / "b.msgpack")
    assert_same_bits(outlook_jax.export_weights(layer), WEIGHTS)


@pytest.mark.parametrize("dtype", FLOATS)
def test_arrays_that_flax_splits_are_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    bits = layer_bits(dtype)
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 50)
    (tmp_path / "a.msgpack").write_bytes(flax.serialization.msgpack_serialize(dict(bits)))
    assert b"__msgpack_chunked_array__" in (tmp_path / "a.msgpack").read_bytes()
    assert_same_bits(resolve(tmp_path / "a.msgpack", TABLE), bits)


def test_arrays_of_msgpack_stay_in_the_file_until_they_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.msgpack").write_bytes(flax.serialization.msgpack_serialize(unflatten_dict(IN_FLAX, sep=".")))
    contents = (tmp_path / "a.msgpack").read_bytes()
    for name, tensor in open_file(tmp_path / "a.msgpack").values.items():
        path, start = tensor.position
        assert path == tmp_path / "a.msgpack"
        assert contents[start : start + tensor.nbytes] == IN_FLAX[name].tobytes()


def test_a_folder_and_its_flax_file_are_recognised(tmp_path: Path) -> None:
    (tmp_path / "flax_model.msgpack").write_bytes(
        flax.serialization.msgpack_serialize({"params": unflatten_dict(IN_FLAX, sep=".")})
    )
    assert_same_bits(resolve(tmp_path, TABLE), WEIGHTS)


@pytest.mark.parametrize(
    ("contents", "words"),
    [
        (b"\xc0", "it holds NoneType, expected a mapping"),
        (b"\x80\0", "its mapping ends at byte 1, the file at 2"),
        (b"\x81\xa1a\xc6\xff\xff\xff\xff", "4294967295 bytes from byte 8 on, but the file ends at 8"),
        (b"\x82\xa1a\1\xa1a\2", "a is there twice"),
        (b"\x81\1\2", "a name is int, expected a string"),
        (b"\x81\xa1a" * 70 + b"\xc0", "mappings nest more than 64 deep"),
        (b"\xdf\xff\xff\xff\xff", "more than 20000 names"),
        (b"\x81\xa1a\xc1", "byte 3 is 0xc1, which begins no value"),
        (b"\x81\xa1a", "it ends at byte 3, amid a value"),
        (
            b"\x81\xa1a" + extension(1, array(np.ones(2), shape=(3,))),
            "16 bytes, float64",
        ),
        (b"\x81\xa1a" + extension(1, array(np.ones(2)), 9), "its extension at"),
    ],
)
def test_a_damaged_msgpack_is_one_clear_error(tmp_path: Path, contents: bytes, words: str) -> None:
    (tmp_path / "a.msgpack").write_bytes(contents)
    with pytest.raises(WeightsError) as caught:
        open_file(tmp_path / "a.msgpack")
    assert words in str(caught.value)


# Distributed checkpoints


def test_what_pytorch_saves_is_read_with_its_nesting(tmp_path: Path) -> None:
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(layer.parameters())
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = {"model": tensors(WEIGHTS), "optimizer": optimizer.state_dict(), "epoch": 3}
    save_dcp(state, tmp_path / "step_100")  # a folder of any name
    assert_same_bits(resolve(tmp_path / "step_100", TABLE), WEIGHTS)
    twin = TWINS["jax"][1]()
    outlook_jax.load_weights(twin, tmp_path / "step_100")
    assert_same_bits(outlook_jax.export_weights(twin), WEIGHTS)
    assert convert(tmp_path / "step_100", tmp_path / "b.safetensors").tensors == len(WEIGHTS)
    assert inspect(tmp_path / "step_100").weights_sha256 == inspect(WEIGHTS).weights_sha256


def test_what_is_written_pytorch_loads(tmp_path: Path) -> None:
    convert(IN_FLAX, tmp_path / "a.dcp")
    state = {name: torch.zeros(array.shape) for name, array in WEIGHTS.items()}
    dcp.load(state, checkpoint_id=tmp_path / "a.dcp", no_dist=True)
    assert_same_bits({name: tensor.numpy() for name, tensor in state.items()}, WEIGHTS)


def test_transposed_and_sliced_tensors_keep_their_numbers(tmp_path: Path) -> None:
    base = torch.arange(40.0).reshape(5, 8)
    given = {
        "t": base.t(),
        "s": base[1:4, ::2],
        "e": base[0].expand(3, 8),
        "n": torch.tensor(7),
        "z": torch.zeros(0, 3),
    }
    save_dcp(given, tmp_path / "a")
    found = read_arrays(tmp_path / "a")
    assert_same_bits(found, {name: tensor.contiguous().numpy() for name, tensor in given.items()})


@pytest.mark.slow  # starts two processes of PyTorch
def test_shards_of_several_processes_are_joined(tmp_path: Path) -> None:
    (tmp_path / "ranks.py").write_text(_TWO_RANKS)
    subprocess.run([sys.executable, str(tmp_path / "ranks.py"), str(tmp_path)], check=True)
    found = read_arrays(tmp_path / "a")
    assert len(list((tmp_path / "a").glob("*.distcp"))) == 2
    rows = np.arange(7 * 5, dtype=np.float32).reshape(7, 5)
    assert_same_bits(found, {"rows": rows, "columns": rows + 1, "whole": rows + 2, "one": rows[:1] + 3})


# A file of its own, which the processes that it starts import.
_TWO_RANKS = """
import sys, torch, torch.distributed as dist, torch.multiprocessing as mp, torch.distributed.checkpoint as dcp
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

def run(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    rows = torch.arange(35.0).reshape(7, 5)
    placed = {"rows": Shard(0), "columns": Shard(1), "whole": Replicate(), "one": Shard(0)}
    values = {"rows": rows, "columns": rows + 1, "whole": rows + 2, "one": rows[:1] + 3}
    state = {name: distribute_tensor(value, mesh, [placed[name]]) for name, value in values.items()}
    dcp.save(state, checkpoint_id=f"{folder}/a")
    dist.destroy_process_group()

if __name__ == "__main__":
    mp.spawn(run, (sys.argv[1],), nprocs=2)
"""


def test_reading_needs_no_pytorch(tmp_path: Path) -> None:
    save_dcp(tensors(WEIGHTS), tmp_path / "a")
    code = (
        "import sys; sys.modules['torch'] = sys.modules['jax'] = sys.modules['flax'] = None\n"
        "from outlook_common.weights import convert\n"
        f"convert({str(tmp_path / 'a')!r}, {str(tmp_path / 'b.npz')!r}, to='torch')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert_same_bits(read_arrays(tmp_path / "b.npz"), WEIGHTS)


def blocks(arrays: dict[str, np.ndarray], folder: Path, change: Any = lambda found, files: None) -> Path:
    """Write a checkpoint of two blocks per tensor, after a change."""
    import random

    found, files = dcp_blocks(random.Random(0), arrays)
    change(found, files)
    folder.mkdir()
    for name, contents in {**files, ".metadata": pickle.dumps(found)}.items():
        (folder / name).write_bytes(contents)
    return folder


def test_blocks_are_joined(tmp_path: Path) -> None:
    assert_same_bits(resolve(blocks(WEIGHTS, tmp_path / "a"), TABLE), WEIGHTS)


def first(found: Any) -> Any:
    return found.state_dict_metadata["v.weight"].chunks[0]


def place(found: Any) -> Any:
    return next(place for index, place in found.storage_data.items() if index.fqn == "v.weight")


CHANGES: dict[str, tuple[Any, str]] = {
    "gap": (lambda found, files: setattr(first(found), "sizes", torch.Size((2, 6))), "blocks have 30 numbers"),
    "overlap": (
        lambda found, files: setattr(found.state_dict_metadata["v.weight"].chunks[1], "offsets", torch.Size((0, 0))),
        "its blocks overlap",
    ),
    "beyond the shape": (
        lambda found, files: setattr(first(found), "offsets", torch.Size((4, 0))), "reaches beyond the shape (6, 6)"
    ),
    "beyond the file": (lambda found, files: setattr(place(found), "offset", 10**9), "the file ends at"),
    "too short": (lambda found, files: setattr(place(found), "length", 70), "70 bytes, float32 of shape (3, 6)"),
    "elsewhere": (
        lambda found, files: setattr(place(found), "relative_path", "../a.distcp"), "not a .distcp file in its folder"
    ),
    "absent": (lambda found, files: files.pop("__1_0.distcp"), "__1_0.distcp is missing"),
    "shared bytes": (
        lambda found, files: [setattr(found, "offset", 0) for found in found.storage_data.values()], "share the bytes"
    ),
    "code": (lambda found, files: setattr(found, "planner_data", print), "builtins.print, which is code"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_dcp_folder_that_contradicts_itself_is_one_clear_error(tmp_path: Path, name: str) -> None:
    change, words = CHANGES[name]
    with pytest.raises(WeightsError) as caught:
        resolve(blocks(WEIGHTS, tmp_path / "a", change), TABLE)
    assert words in str(caught.value)


def test_blocks_that_tile_a_shape_are_told_from_others() -> None:
    quarters = [((row, column), (2, 3)) for row in (0, 2) for column in (0, 3)]
    assert tiling_error((4, 6), quarters) is None
    assert tiling_error((), [((), ())]) is None
    assert tiling_error((0, 3), []) is None
    assert "overlap" in str(tiling_error((4, 6), [*quarters[:3], quarters[0]]))
    assert "18 numbers" in str(tiling_error((4, 6), quarters[:3]))
    assert "other axes" in str(tiling_error((24,), quarters))


# PyTorch's shards


def write_shards(folder: Path, **more: Any) -> Path:
    names = list(WEIGHTS)
    files = {f"pytorch_model-0000{number}-of-00002.bin": names[number - 1 :: 2] for number in (1, 2)}
    for file, part in files.items():
        torch.save(tensors({name: WEIGHTS[name] for name in part}), folder / file)
    index = folder / "pytorch_model.bin.index.json"
    places = {name: file for file, part in files.items() for name in part} | more
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return index


def test_shards_of_pytorch_are_read_by_their_index_and_their_folder(tmp_path: Path) -> None:
    index = write_shards(tmp_path)
    for source in (index, tmp_path):
        assert_same_bits(resolve(source, TABLE), WEIGHTS)
    assert len(open_checkpoint(index).items) == len(WEIGHTS)
    done = convert(tmp_path, tmp_path / "b.safetensors")
    assert done.source_sha256 == inspect(index).sha256
    with pytest.raises(WeightsError, match="shards are written into a folder"):
        convert(index, tmp_path / "c.bin.index.json")


def test_shards_of_pytorch_elsewhere_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="which is not in its folder"):
        resolve(write_shards(tmp_path, more="../a.bin"), TABLE)
    with pytest.raises(WeightsError, match="more is not in pytorch_model-00001"):
        resolve(write_shards(tmp_path, more="pytorch_model-00001-of-00002.bin"), TABLE)
