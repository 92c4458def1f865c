"""Hostile files, full disks, killed processes: clear errors, nothing executed, the old file intact."""

import json
import os
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import pytest
import torch
from filelock import FileLock, Timeout
from hypothesis import given, settings
from hypothesis import strategies as st

from outlook_common.text import listed
from outlook_common.weights import WeightsError, convert, read_arrays, resolve, write_arrays
from outlook_common.weights.checksums import source_sha256
from outlook_common.weights.formats import orbax, sharded
from outlook_common.weights.io import atomic, limits
from parity_tests.weights import fuzz as fuzz_weights
from parity_tests.weights import kill as kill_weights
from parity_tests.weights.hostile_files import (
    IN_FLAX,
    TABLE,
    WEIGHTS,
    Link,
    Parts,
    hostile,
    npy,
    npz_file,
    safetensors_file,
    torch_file,
    zarr_parts,
    zipped,
)

# Fuzz


@pytest.fixture(scope="module")
def fuzz() -> Any:
    with fuzz_weights.fuzz(fuzz_weights.Figures()) as run:
        yield run


@settings(max_examples=100)
@given(st.integers(0, 2**32 - 1))
def test_hostile_file_ends_in_a_clear_error_or_in_an_exact_result(fuzz: fuzz_weights.Fuzz, seed: int) -> None:
    fuzz.check(seed)


@pytest.mark.slow  # 5,000 files take some minutes; `make fuzz` runs as many
def test_five_thousand_hostile_files_do_no_harm() -> None:
    with fuzz_weights.fuzz(fuzz_weights.Figures()) as run:
        for seed in range(5000):
            run.check(seed)
    assert run.figures.outcomes["error"] > 1000
    assert run.figures.outcomes["result"] > 100


def test_the_fuzz_detects_executed_code_and_wrong_results(tmp_path: Path) -> None:
    with fuzz_weights.fuzz(fuzz_weights.Figures()) as run:
        bomb = next(seed for seed in range(1000) if hostile(seed, "x").family == "pickle_bomb")
        run._ask = lambda path: {"outcome": "error", "message": "no", "seconds": 0.0, "megabytes": 0.0}
        run.check(bomb)
        (run.canary / "exploded").touch()
        with pytest.raises(fuzz_weights.HarmError, match=f"file {bomb} .*code was executed"):
            run.check(bomb)
        (run.canary / "exploded").unlink()
        swapped = next(seed for seed in range(1000) if hostile(seed, "x").family == "safetensors_swapped")
        run._ask = lambda path: {"outcome": "result", "message": "", "seconds": 0.0, "megabytes": 0.0}
        with pytest.raises(fuzz_weights.HarmError, match="the result is not what the file has"):
            run.check(swapped)
        run._ask = lambda path: {"outcome": "error", "message": "no", "seconds": 5.1, "megabytes": 0.0}
        with pytest.raises(fuzz_weights.HarmError, match=r"took 5\.1 s"):
            run.check(swapped)


# What is refused, and in which words


def refused(path: Path, contents: bytes) -> str:
    path.write_bytes(contents)
    with pytest.raises(WeightsError) as caught:
        convert(path, path.with_name("out.safetensors"))
    assert not path.with_name("out.safetensors").exists()
    return str(caught.value)


def test_header_longer_than_the_limit_is_not_read(tmp_path: Path) -> None:
    length = limits.HEADER_BYTES + 8
    said = refused(tmp_path / "a.safetensors", length.to_bytes(8, "little") + b"{}" + b" " * length)
    assert f"its header is {length} bytes long, at most {limits.HEADER_BYTES} are read" in said


def header_of(**changes: Any) -> bytes:
    return safetensors_file(WEIGHTS, lambda header: header["v.bias"].update(changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"shape": [float("nan")]}, "v.bias has the shape [nan], which no tensor has"),
        ({"shape": [-6]}, "v.bias has the shape [-6], which no tensor has"),
        ({"shape": [True]}, "v.bias has the shape [True], which no tensor has"),
        ({"shape": [2**60]}, "which no tensor has"),
        ({"shape": [7]}, "v.bias is 24 bytes long, float32 of shape (7,) would be 28"),
        ({"data_offsets": [0, 24]}, "lies at bytes"),
        ({"data_offsets": [144, 2**62]}, "expected it to begin"),
        ({"data_offsets": ["0", 24]}, "v.bias has the data_offsets ['0', 24], expected two integers"),
        ({"dtype": "F8_E4M3"}, "unknown dtypes {'v.bias': 'F8_E4M3'}"),
        ({"more": 1}, "a tensor is not described by dtype, shape and data_offsets alone"),
    ],
)
def test_inconsistent_safetensors_are_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    assert words in refused(tmp_path / "a.safetensors", header_of(**changes))


def test_duplicate_names_are_refused_in_every_format(tmp_path: Path) -> None:
    text = b'{"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}'
    said = refused(tmp_path / "a.safetensors", len(text).to_bytes(8, "little") + text + bytes(4))
    assert "a is there twice in its header" in said
    members = [("a.npy", npy(np.ones(2))), ("a.npy", npy(np.ones(2)))]
    assert "a is there twice" in refused(tmp_path / "a.npz", zipped(members))
    assert "a.npy is there twice" in refused(tmp_path / "a.pth", zipped(members))


def test_names_are_escaped_so_that_lookalikes_show_and_the_terminal_is_safe(tmp_path: Path) -> None:
    def change(header: dict[str, Any]) -> None:
        header["attn.weіght"] = header.pop("attn.weight")  # a Cyrillic letter
        header["\x1b[2Jproj.bias"] = header.pop("proj.bias")

    said = refused(tmp_path / "a.safetensors", safetensors_file(WEIGHTS, change))
    assert "attn.we\\u0456ght; the most similar known is attn.weight" in said
    assert "\\x1b[2Jproj.bias" in said
    assert "\x1b" not in said
    with pytest.raises(WeightsError, match=r"its top level has \\x1b\[2J"):
        convert({"\x1b[2J": {}}, tmp_path / "b.npz", use_ema=True)


def test_a_long_list_of_names_ends_with_a_count() -> None:
    assert listed(["a", "b"]) == "a, b"
    assert listed("abcdefgh") == "a, b, c, d, e, f, g, h"
    assert listed((name for name in ("a", "\x1b", *"cdefghijklmn")), most=2) == "a, \\x1b, … and 12 more"
    assert listed("abc", most=1, between="\n") == "a\n… and 2 more"


def test_zip_bomb_is_refused_before_it_unpacks(tmp_path: Path) -> None:
    bomb = npy(np.zeros(1 << 25, np.float32))
    said = refused(tmp_path / "a.npz", zipped([("v.weight.npy", bomb)], zipfile.ZIP_DEFLATED))
    assert "unpack to 134217856, more than 64 times as many: a ZIP bomb?" in said


def test_members_that_overlap_are_refused(tmp_path: Path) -> None:
    contents = bytearray(npz_file(WEIGHTS))
    first, second = (contents.find(b"PK\1\2", start) for start in (0, contents.find(b"PK\1\2") + 4))
    contents[second + 42 : second + 46] = contents[first + 42 : first + 46]
    assert "overlaps the member before it" in refused(tmp_path / "a.npz", bytes(contents))


@pytest.mark.parametrize("name", WEIGHTS)  # the last one's checksum comes behind all that is written
def test_damaged_numbers_in_npz_are_found_by_their_checksum(tmp_path: Path, name: str) -> None:
    contents = bytearray(npz_file(WEIGHTS))
    contents[contents.find(WEIGHTS[name].tobytes()) + 20] ^= 1
    assert "its CRC-32 is" in refused(tmp_path / "a.npz", bytes(contents))


def test_tensor_larger_than_its_numbers_is_refused_unread(tmp_path: Path) -> None:
    huge = {"v.weight": torch.ones(1).expand(10**12)}
    said = refused(tmp_path / "a.pth", torch_file(huge))
    assert "v.weight has the shape (1000000000000,), that is 1000000000000 numbers, but only 4 bytes" in said


@pytest.mark.parametrize(
    "place", ["../s.safetensors", "/etc/passwd", "sub/s.safetensors", "..\\s.safetensors", "s.npz"]
)
def test_index_that_names_a_file_elsewhere_is_refused(tmp_path: Path, place: str) -> None:
    (tmp_path / "s.safetensors").write_bytes(safetensors_file(WEIGHTS))
    (tmp_path / "in").mkdir()
    text = json.dumps({"weight_map": dict.fromkeys(WEIGHTS, place)}).encode()
    said = refused(tmp_path / "in" / "a.safetensors.index.json", text)
    assert "which is not in its folder" in said


def test_index_and_shards_must_agree(tmp_path: Path) -> None:
    (tmp_path / "s.safetensors").write_bytes(safetensors_file(WEIGHTS))
    index = tmp_path / "a.safetensors.index.json"
    places = dict.fromkeys(WEIGHTS, "s.safetensors")
    lacking = {name: place for name, place in places.items() if name != "v.bias"}
    said = refused(index, json.dumps({"weight_map": lacking}).encode())
    assert "v.bias lies in s.safetensors, its index says nowhere" in said
    said = refused(index, json.dumps({"weight_map": places | {"more": "s.safetensors"}}).encode())
    assert "more is not in s.safetensors, where its index says it is" in said


def refused_orbax(folder: Path, parts: Parts) -> str:
    for name, contents in parts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(contents, Link):
            (folder / name).symlink_to(contents) if contents else os.mkfifo(folder / name)
        else:
            (folder / name).write_bytes(contents)
    with pytest.raises(WeightsError) as caught:
        convert(folder, folder.with_name("out.safetensors"))
    assert not folder.with_name("out.safetensors").exists()
    return str(caught.value)


def zarr_with(**changes: Any) -> Parts:
    parts = zarr_parts(IN_FLAX)
    return parts | {"v.bias/.zarray": json.dumps(json.loads(parts["v.bias/.zarray"]) | changes).encode()}


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        (zarr_parts(IN_FLAX) | {"v.bias/0": Link("/etc/passwd")}, "v.bias/0 is a link, expected only files"),
        (zarr_parts(IN_FLAX) | {"more": Link("..")}, "more is a link"),
        (zarr_parts(IN_FLAX) | {"v.bias/0": Link("")}, "v.bias/0 is a device or pipe"),
        (zarr_with(shape=[10**9]), "its arrays would take 4000004848 bytes, more than 64 times the"),
        (zarr_with(chunks=[10**10]), "one chunk of v.bias would take 40000000000 bytes, more than 64 times the"),
        (zarr_with(compressor={"id": "blosc"}), "v.bias is compressed by blosc, which Orbax does not use"),
        (zarr_with(shape=[7], chunks=[7]), "v.bias: (7,), expected (6,)"),
        (zarr_parts({"../v.bias": WEIGHTS["v.bias"]}), "is not a name of an array"),
        ({"_METADATA": b"{}"}, "its _METADATA has no tree_metadata, which lists its arrays"),
        ({"_METADATA": b"[" * 100_000}, "not a readable Orbax file"),
    ],
)
def test_hostile_orbax_folders_are_refused_unread(tmp_path: Path, parts: Parts, words: str) -> None:
    assert words in refused_orbax(tmp_path / "a.orbax", parts)


def test_an_orbax_folder_with_too_many_files_is_refused_with_their_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(orbax, "_MOST_FILES", 3)
    parts = {f"{place}": b"" for place in range(12)} | {"_METADATA": b"{}"}
    assert "at least 13 files and folders, at most 3 are read" in refused_orbax(tmp_path / "a.orbax", parts)


def test_an_orbax_folder_without_ocdbt_is_read(tmp_path: Path) -> None:
    for zarr3 in (False, True):
        folder = tmp_path / f"{zarr3}.orbax"
        for name, contents in zarr_parts(IN_FLAX, zarr3=zarr3).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(contents)
        convert(folder, tmp_path / "b.npz", to="torch")
        found = read_arrays(tmp_path / "b.npz")
        assert all(np.array_equal(found[name], array) for name, array in WEIGHTS.items())


@pytest.mark.parametrize("ocdbt", [True, False])
def test_names_with_slashes_are_read_from_orbax_as_from_the_mapping(tmp_path: Path, ocdbt: bool) -> None:
    mapping: dict[str, dict[str, np.ndarray]] = {}
    for name, array in IN_FLAX.items():
        module, leaf = name.split(".")
        mapping.setdefault(f"volo/~/{module}", {})[leaf] = array
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about ocdbt
        ocp.PyTreeCheckpointer(use_ocdbt=ocdbt).save(tmp_path / "a.orbax", mapping)
    for source in (mapping, tmp_path / "a.orbax"):
        found = resolve(source, TABLE, prefix="volo/~")
        assert all(np.array_equal(found[name], array) for name, array in WEIGHTS.items())


@pytest.mark.parametrize("step", ["/", "/etc", "a//b", "a/../b", "../b", "a/", "./a", "a/.", "a\\..\\b", "a/\0"])
def test_names_with_slashes_that_lead_elsewhere_are_refused(tmp_path: Path, step: str) -> None:
    parts = zarr_parts(IN_FLAX)
    about = json.loads(parts["_METADATA"])
    about["tree_metadata"][str(("v", "bias"))]["key_metadata"][0]["key"] = step
    assert "is not a name of an array" in refused_orbax(
        tmp_path / "a.orbax", parts | {"_METADATA": json.dumps(about).encode()}
    )


def test_arrays_in_orbax_folders_that_lie_too_deep_are_refused(tmp_path: Path) -> None:
    parts = zarr_parts(IN_FLAX)
    about = json.loads(parts["_METADATA"])
    about["tree_metadata"][str(("v", "bias"))]["key_metadata"] = [{"key": "0", "key_type": 1}] * 100_000
    words = refused_orbax(tmp_path / "a.orbax", parts | {"_METADATA": json.dumps(about).encode()})
    assert "an array lies 100000 mappings deep, at most 64 are read" in words


def test_devices_and_pipes_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.npz")
    with pytest.raises(WeightsError, match=r"a\.npz: not a file"):
        convert(tmp_path / "a.npz", tmp_path / "b.npz")


def test_file_that_changes_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    from outlook_common.weights.checkpoint import open_checkpoint

    write_arrays(tmp_path / "a.safetensors", WEIGHTS)
    tensor = dict(open_checkpoint(tmp_path / "a.safetensors").items)["v.weight"]
    write_arrays(tmp_path / "a.safetensors", IN_FLAX)
    with pytest.raises(WeightsError, match="it was changed while it was being read"):
        tensor.read()
    blocks = dict(open_checkpoint(tmp_path / "a.safetensors").items)["v.kernel"].blocks()
    next(blocks)
    with (tmp_path / "a.safetensors").open("r+b") as file:  # written to in the midst of a tensor
        file.write(b"\0")
    with pytest.raises(WeightsError, match="it was changed while it was being read"):
        list(blocks)


# Destinations


def test_symbolic_link_is_not_written_through(tmp_path: Path) -> None:
    for target in ("there.npz", "absent.npz"):
        (tmp_path / "there.npz").write_bytes(b"somebody's")
        (tmp_path / "link.npz").unlink(missing_ok=True)
        (tmp_path / "link.npz").symlink_to(tmp_path / target)
        with pytest.raises(WeightsError, match=rf"link\.npz: a symbolic link to .*{target}"):
            convert(WEIGHTS, tmp_path / "link.npz")
        assert (tmp_path / "there.npz").read_bytes() == b"somebody's"
        assert not (tmp_path / "absent.npz").exists()


def test_folder_is_replaced_only_if_it_is_such_a_checkpoint(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(WeightsError, match="exists and is not a checkpoint of this kind, so it is not replaced"):
        convert(WEIGHTS, mine, max_shard_size=1000)
    (tmp_path / "mine.orbax").mkdir()
    (tmp_path / "mine.orbax" / "thesis.txt").write_text("years of work")
    with pytest.raises(WeightsError, match="so it is not replaced"):
        convert(WEIGHTS, tmp_path / "mine.orbax")
    (tmp_path / "dir.npz").mkdir()
    with pytest.raises(WeightsError, match=r"dir\.npz: a folder, expected a file"):
        convert(WEIGHTS, tmp_path / "dir.npz")
    assert (mine / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".pth", ".orbax"])
def test_full_disk_leaves_the_old_file_and_no_debris(tmp_path: Path, suffix: str) -> None:
    """The limit on a file's size stands in for the disk's: writing past it fails as on a full disk."""
    path = tmp_path / f"a{suffix}"
    write_arrays(path, {"old": np.ones(3)})
    old = source_sha256(path)
    code = """if True:
        import resource, sys
        import numpy as np
        from outlook_common.weights import write_arrays
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        try:
            write_arrays(sys.argv[1], {"a": np.ones(1 << 20)})
        except (OSError, RuntimeError) as error:
            print(type(error).__name__)"""
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "OSError", done.stdout + done.stderr
    assert done.stderr == ""
    assert source_sha256(path) == old
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_folder_where_nothing_can_be_written_is_an_os_error() -> None:
    with pytest.raises(OSError, match="/proc/self"):
        convert(WEIGHTS, "/proc/self/a.safetensors")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        convert(WEIGHTS, "/proc/self/absent/a.safetensors")


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".shards"])
def test_killed_at_a_random_moment_the_destination_is_old_or_new(suffix: str) -> None:
    assert killed(suffix, 4)["kills"] == 4


@pytest.mark.slow  # 200 conversions in each of four formats, each killed and then compared: some minutes
@pytest.mark.parametrize("suffix", kill_weights.SUFFIXES)
def test_killed_at_200_random_moments_the_destination_is_old_or_new(suffix: str) -> None:
    seen = killed(suffix, 200)
    assert seen["old"] >= 20
    assert seen["new"] >= 20


def killed(suffix: str, kills: int) -> dict[str, int]:
    """Run in a process of its own: this one has threads, which do not survive a fork."""
    command = [sys.executable, "-m", "parity_tests.weights.kill", "--kills", str(kills), "--only", suffix]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    seen: dict[str, int] = json.loads(done.stdout)[suffix]
    return seen


@pytest.mark.parametrize("suffix", [".safetensors", ".shards"])
def test_simultaneous_conversions_to_one_destination_end_with_one_complete_file(suffix: str) -> None:
    code = "import sys; from parity_tests.weights.kill import together; print(together(sys.argv[1], 3))"
    done = subprocess.run([sys.executable, "-c", code, suffix], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in ("0", "1", "2")


def test_a_name_whose_lock_another_process_takes_for_a_leftover_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    acquire, tried = FileLock.acquire, []

    def contended(lock: FileLock, *args: Any, **kwargs: Any) -> Any:
        tried.append(lock.lock_file)
        if len(tried) == 1:  # it is held just now
            raise Timeout(lock.lock_file)
        held = acquire(lock, *args, **kwargs)
        if len(tried) == 2:  # it was removed between open and lock
            Path(lock.lock_file).unlink()
        return held

    monkeypatch.setattr(FileLock, "acquire", contended)
    with atomic.replacing(tmp_path / "a.npz") as temporary:
        assert f"{temporary}.lock" == tried[2]
        assert Path(tried[2]).exists()
    assert len(tried) == len(set(tried)) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


def test_a_folder_created_meanwhile_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, shards = atomic.sync, tmp_path / "a"

    def sync(path: Path) -> None:
        real(path)
        monkeypatch.setattr(atomic, "sync", real)
        convert({name: array + 1 for name, array in WEIGHTS.items()}, shards, to="torch", max_shard_size=100)

    monkeypatch.setattr(atomic, "sync", sync)
    convert(WEIGHTS, shards, to="torch", max_shard_size=10**6)
    assert sorted(path.name for path in shards.iterdir()) == [sharded.SINGLE]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert np.array_equal(read_arrays(shards / sharded.SINGLE)["v.bias"], WEIGHTS["v.bias"])


def test_leftovers_of_killed_processes_are_removed_and_files_of_living_ones_kept(tmp_path: Path) -> None:
    from outlook_common.weights.io.atomic import replacing

    orphan = tmp_path / f".a.npz.{'0' * 32}.tmp"
    orphan.write_bytes(b"half")
    lock = tmp_path / f".a.npz.{'1' * 32}.tmp.lock"  # of a process that was killed before it made its file
    lock.touch()
    other = tmp_path / f".b.npz.{'0' * 32}.tmp"
    other.write_bytes(b"somebody else's")
    with replacing(tmp_path / "a.npz") as living:
        write_arrays(tmp_path / "a.npz", WEIGHTS)
        assert living.exists()
        assert not orphan.exists()
        assert not lock.exists()
        assert other.exists()
    assert {path.name for path in tmp_path.iterdir()} == {"a.npz", other.name}
    assert (tmp_path / "a.npz").stat().st_size == 0  # the one that finishes last counts
    with pytest.raises(WeightsError):
        read_arrays(tmp_path / "a.npz")
