"""Weight files: every bit is kept, writes are atomic, nothing in a file is executed."""

import argparse
import contextlib
import hashlib
import itertools
import os
import pickle
import stat
import subprocess
import sys
import types
import warnings
import zipfile
from dataclasses import replace
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import timm.utils
import torch

import outlook_jax
import outlook_torch
from outlook_common.arrays import DTYPES, NotNumbers, to_numpy
from outlook_common.weights import WeightsError, convert, read_arrays, write_arrays
from outlook_common.weights.formats import registry as weight_files
from outlook_common.weights.io import verified
from outlook_common.weights.io.lazy import as_lazy
from parity_tests.weights.layers import (
    FLOATS,
    TABLE,
    WEIGHTS,
    any_bits,
    assert_same_bits,
    inside_a_model,
    jax_layer,
    layer_bits,
    renamed,
    torch_layer,
)

SUFFIXES = (".safetensors", ".npz", ".pth", ".pt", ".pth.tar", ".bin")
KINDS = (".safetensors", ".npz", ".pth")


def read(path: Path) -> dict[str, np.ndarray]:
    return {name: to_numpy(array) for name, array in read_arrays(path).items()}


# Round trips


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_file_gives_back_every_bit_of_every_dtype_and_shape(tmp_path: Path, suffix: str) -> None:
    rng = np.random.default_rng(0)
    arrays = {f"{dtype}.bits": any_bits((3, 4), dtype, rng) for dtype in FLOATS}
    arrays |= {f"{dtype}.scalar": any_bits((6,), dtype, rng)[5].reshape(()) for dtype in FLOATS}
    arrays |= {f"{name}.whole": np.asarray(rng.integers(0, 2, (2, 3)), dtype) for name, dtype in DTYPES.items()}
    arrays |= {"empty": np.zeros((0, 3), "f4"), "turned": any_bits((3, 5), "bfloat16", rng).T}
    path = tmp_path / f"weights{suffix}"
    write_arrays(path, arrays)
    assert_same_bits(read(path), arrays)


@pytest.mark.parametrize("suffix", KINDS)
def test_names_may_be_arguments_of_savez(tmp_path: Path, suffix: str) -> None:
    arrays = {name: np.random.default_rng(0).random(3) for name in ("file", "allow_pickle", "a/b", "größe", "a.npy")}
    write_arrays(tmp_path / f"weights{suffix}", arrays)
    assert_same_bits(read(tmp_path / f"weights{suffix}"), arrays)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("first", "second"), list(itertools.product(KINDS, KINDS)))
def test_bits_survive_torch_to_file_to_flax_to_file_to_torch(
    tmp_path: Path, first: str, second: str, dtype: str
) -> None:
    bits = layer_bits(dtype)
    start, middle, end = torch_layer(dtype), jax_layer(dtype), torch_layer(dtype)
    outlook_torch.load_weights(start, bits)
    outlook_torch.save_weights(start, tmp_path / f"start{first}")
    convert(tmp_path / f"start{first}", tmp_path / f"middle{second}")
    outlook_jax.load_weights(middle, tmp_path / f"middle{second}")
    outlook_jax.save_weights(middle, tmp_path / f"saved{second}")
    convert(tmp_path / f"saved{second}", tmp_path / f"end{first}", to="torch")
    outlook_torch.load_weights(end, tmp_path / f"end{first}")
    assert_same_bits(outlook_torch.export_weights(end), bits)


@pytest.mark.parametrize("naming", TABLE.namings)
@pytest.mark.parametrize("back", TABLE.namings)
def test_convert_goes_between_any_two_namings_without_changing_a_bit(tmp_path: Path, naming: str, back: str) -> None:
    bits = layer_bits("bfloat16")
    convert(bits, tmp_path / "there.npz", to=naming)
    assert_same_bits(read(tmp_path / "there.npz"), renamed(bits, TABLE, naming))
    done = convert(tmp_path / "there.npz", tmp_path / "back.safetensors", to=back)
    assert_same_bits(read(tmp_path / "back.safetensors"), renamed(bits, TABLE, back))
    assert (done.found_naming, done.written_naming) == (naming, back)


def test_convert_defaults_to_the_other_twins_naming_and_to_torchs_in_torchs_files(tmp_path: Path) -> None:
    flax = renamed(WEIGHTS, TABLE, "flax")
    written = {
        (naming, suffix): convert(source, tmp_path / f"to{suffix}").written_naming
        for naming, source in (("torch", WEIGHTS), ("flax", flax))
        for suffix in (".npz", ".pth")
    }
    assert written == {
        ("torch", ".npz"): "flax",
        ("torch", ".pth"): "torch",
        ("flax", ".npz"): "torch",
        ("flax", ".pth"): "torch",
    }


def test_convert_reports_what_it_found_and_wrote(tmp_path: Path) -> None:
    write_arrays(tmp_path / "model.npz", inside_a_model("external-attention"))
    done = convert(tmp_path / "model.npz", tmp_path / "layer.safetensors", prefix="network.0.1.attn")
    assert done.to_dict() == {
        "source": str(tmp_path / "model.npz"),
        "destination": str(tmp_path / "layer.safetensors"),
        "prefix": "network.0.1.attn",
        "model": "OutlookAttention(dim=6, attn_features=162, qkv_bias=True)",
        "sizes": {"dim": 6, "attn_features": 162, "qkv_bias": True, "num_heads": 2, "window_places": 9},
        "found_naming": "external-attention",
        "written_naming": "flax",
        "tensors": 6,
        "dtypes": {"float32": 6},
        "source_sha256": hashlib.sha256((tmp_path / "model.npz").read_bytes()).hexdigest(),
        "missing": (),
        "not_weights": (),
        "ignored": (),
        "manifest": None,
    }


def test_convert_can_replace_its_own_source(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    write_arrays(path, WEIGHTS)
    convert(path, path)
    assert_same_bits(read(path), renamed(WEIGHTS, TABLE, "flax"))


def test_convert_refuses_flax_names_in_torchs_files_and_unknown_namings(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds PyTorch's names; for Flax's use \.safetensors or \.npz"):
        convert(WEIGHTS, tmp_path / "a.pth", to="flax")
    with pytest.raises(ValueError, match="no names in 'keras'; known: torch, flax, external-attention"):
        convert(WEIGHTS, tmp_path / "a.npz", to="keras")
    assert list(tmp_path.iterdir()) == []


def test_convert_of_an_unknown_model_lists_prefixes_with_a_layer(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"no known model in its 1 tensors \(fc\.weight\); known: OutlookAttention"):
        convert({"fc.weight": np.ones((2, 2))}, tmp_path / "a.npz")
    with pytest.raises(WeightsError, match=r"a known one has prefix='network\.0\.0\.attn', 'network\.0\.1\.attn'"):
        convert(inside_a_model("flax"), tmp_path / "a.npz")


def test_convert_of_a_layer_with_a_missing_tensor_names_it_and_writes_nothing(tmp_path: Path) -> None:
    for name in WEIGHTS.keys() - {"v.weight", "v.bias"}:
        with pytest.raises(WeightsError, match="1 problem with") as caught:
            convert({key: array for key, array in WEIGHTS.items() if key != name}, tmp_path / "a.npz")
        assert caught.value.names("missing") == [name]
    assert list(tmp_path.iterdir()) == []


# Formats and their traps


def test_safetensors_metadata_state_the_framework(tmp_path: Path) -> None:
    for naming, words in (("torch", "pt"), ("flax", "flax"), ("external-attention", "pt")):
        convert(WEIGHTS, tmp_path / "a.safetensors", to=naming)
        with safetensors.safe_open(tmp_path / "a.safetensors", "np") as file:
            assert file.metadata()["format"] == words


def test_written_files_are_read_by_the_libraries_that_own_the_formats(tmp_path: Path) -> None:
    bits = layer_bits("bfloat16")
    for suffix in KINDS:
        write_arrays(tmp_path / f"a{suffix}", bits)
    from safetensors.torch import load_file

    owned = {"safetensors": load_file(tmp_path / "a.safetensors"), "torch": torch.load(tmp_path / "a.pth")}
    for tensors in owned.values():
        assert_same_bits({name: to_numpy(tensor) for name, tensor in tensors.items()}, bits)
    with np.load(tmp_path / "a.npz") as archive:
        assert_same_bits(
            {name: archive[name] for name in bits}, {name: array.view("u2") for name, array in bits.items()}
        )


def test_npz_of_bfloat16_by_savez_is_refused_since_its_dtype_is_lost(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        np.savez(tmp_path / "a.npz", **{"v.weight": any_bits((3, 3), "bfloat16", np.random.default_rng(0))})
    with pytest.raises(WeightsError, match=r"v\.weight hold raw bytes \('\|V2'\): `np.savez` leaves bfloat16 so"):
        read_arrays(tmp_path / "a.npz")


def test_npz_by_savez_compressed_is_read(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", **WEIGHTS)
    assert_same_bits(read(tmp_path / "a.npz"), WEIGHTS)


def test_big_endian_arrays_are_read_and_written_by_value(tmp_path: Path) -> None:
    numbers = np.random.default_rng(0).standard_normal((3, 4))
    np.savez(tmp_path / "a.npz", **{"v.weight": numbers.astype(">f8")})
    assert_same_bits(read(tmp_path / "a.npz"), {"v.weight": numbers})
    for suffix in KINDS:
        write_arrays(tmp_path / f"b{suffix}", {"v.weight": numbers.astype(">f8")})
        assert_same_bits(read(tmp_path / f"b{suffix}"), {"v.weight": numbers})


def test_dtype_of_safetensors_that_numpy_cannot_hold_is_named(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"v.weight": torch.ones(3).to(torch.float8_e4m3fn)}, tmp_path / "a.safetensors")
    with pytest.raises(WeightsError, match=r"\{'v\.weight': 'F8_E4M3'\}; known: F16, BF16"):
        read_arrays(tmp_path / "a.safetensors")


def test_unknown_suffix_lists_those_known(tmp_path: Path) -> None:
    for use in (read_arrays, lambda path: write_arrays(path, WEIGHTS), lambda path: convert(WEIGHTS, path)):
        with pytest.raises(WeightsError, match=r"a\.tflite: unknown suffix .*\.safetensors, \.npz, \.pth, \.pt, "):
            use(tmp_path / "a.tflite")


def test_suffix_may_be_in_capitals(tmp_path: Path) -> None:
    write_arrays(tmp_path / "A.NPZ", WEIGHTS)
    assert_same_bits(read(tmp_path / "A.NPZ"), WEIGHTS)


@pytest.mark.parametrize("damage", ["empty", "junk", "zip junk", "cut", "pickle"])
@pytest.mark.parametrize("suffix", KINDS)
def test_damaged_file_is_one_clear_error(tmp_path: Path, suffix: str, damage: str) -> None:
    path = tmp_path / f"a{suffix}"
    write_arrays(path, WEIGHTS)
    whole = path.read_bytes()
    path.write_bytes(
        {
            "empty": b"",
            "junk": b"no weights at all",
            "zip junk": b"PK\3\4" + bytes(range(200)),
            "cut": whole[: len(whole) // 2],
            "pickle": pickle.dumps([1, 2], protocol=2),
        }[damage]
    )
    with pytest.raises(WeightsError, match=f"a{suffix}: not a readable {suffix} file: ."):
        read_arrays(path)


def test_missing_file_is_an_os_error(tmp_path: Path) -> None:
    for suffix in KINDS:
        with pytest.raises(FileNotFoundError):
            read_arrays(tmp_path / f"absent{suffix}")


# Nothing is executed


class Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("new_format", [True, False])
def test_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path: Path, new_format: bool) -> None:
    path, target = tmp_path / "bomb.pth", tmp_path / "exploded"
    torch.save({"v.weight": Bomb(target)}, path, _use_new_zipfile_serialization=new_format)
    with pytest.raises(WeightsError, match=r"bomb\.pth: it refers to posix\.mkdir, which is code and is not executed"):
        read_arrays(path)
    assert not target.exists()
    torch.load(path, weights_only=False)
    assert target.exists()  # the bomb was a real one


def test_pickle_inside_npz_is_refused_and_does_not_run(tmp_path: Path) -> None:
    target = tmp_path / "exploded"
    np.savez(tmp_path / "a.npz", bomb=np.array([Bomb(target)], dtype=object))
    with pytest.raises(WeightsError, match="bomb holds Python objects, a pickle"):
        read_arrays(tmp_path / "a.npz")
    assert not target.exists()


def test_blocked_global_of_a_harmless_checkpoint_is_named(tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "args": types.SimpleNamespace(lr=1e-3)}, tmp_path / "a.pth")
    with pytest.raises(WeightsError, match=r"it refers to types\.SimpleNamespace"):
        read_arrays(tmp_path / "a.pth")


@pytest.mark.parametrize("metric", [73.2, np.float64(73.2), np.float32(73.2), np.int64(3)])
def test_checkpoint_of_timms_own_training_is_read(tmp_path: Path, metric: Any) -> None:
    model = outlook_torch.OutlookAttention(6, 2, qkv_bias=True)
    averaged = timm.utils.ModelEmaV3(model)
    saver = timm.utils.CheckpointSaver(
        model,
        torch.optim.AdamW(model.parameters()),
        args=argparse.Namespace(model="volo_d1_224", lr=1e-3, betas=[0.9, 0.999]),
        model_ema=averaged,
        amp_scaler=timm.utils.NativeScaler(device="cpu"),
        checkpoint_dir=str(tmp_path),
        recovery_dir=str(tmp_path),
    )
    with torch.no_grad():
        model.proj.bias += 1
    saver.save_checkpoint(0, metric=metric)
    path = tmp_path / "last.pth.tar"
    held = read_arrays(path)
    assert (held["metric"], type(held["args"])) == (metric, NotNumbers)
    for use_ema, source in ((False, model), (True, averaged.module)):
        convert(path, tmp_path / "b.npz", to="torch", use_ema=use_ema)
        found = read_arrays(tmp_path / "b.npz")
        for name, tensor in source.state_dict().items():
            assert np.array_equal(found[name], tensor.numpy()), name
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


@pytest.mark.parametrize("scalar", [np.datetime64("2026-01-01"), np.str_("a"), np.longdouble(1)])
def test_non_numeric_numpy_scalar_is_an_error_with_a_remedy(tmp_path: Path, scalar: Any) -> None:
    torch.save({"metric": scalar}, tmp_path / "a.pth")
    with pytest.raises(WeightsError, match=r"convert it with \.item\(\) before saving"):
        read_arrays(tmp_path / "a.pth")


def test_big_endian_numpy_scalar_keeps_its_value(tmp_path: Path) -> None:
    torch.save({"metric": np.dtype(">f8").type(2.5)}, tmp_path / "a.pth")
    pickled = pickle_with(scalar_opcodes(b"f8", b">", np.array(2.5, ">f8").tobytes()))
    write_pickle(tmp_path / "b.pth", pickled)
    assert [read_arrays(tmp_path / f"{name}.pth")["metric"] for name in "ab"] == [2.5, 2.5]


def pickle_with(value: bytes) -> bytes:
    """Return the pickle of {"metric": value}."""
    return b"\x80\x02}(X\x06\0\0\0metric" + value + b"u."


def scalar_opcodes(code: bytes, order: bytes, data: bytes) -> bytes:
    def text(value: bytes) -> bytes:
        return b"X" + len(value.decode("latin1").encode()).to_bytes(4, "little") + value.decode("latin1").encode()

    dtype = b"cnumpy\ndtype\n(" + text(code) + b"\x89\x88tR(K\x03" + text(order) + b"NNNK\0K\0K\0tb"
    return (
        b"cnumpy._core.multiarray\nscalar\n(" + dtype + b"c_codecs\nencode\n(" + text(data) + text(b"latin1") + b"tRtR"
    )


def write_pickle(path: Path, contents: bytes) -> None:
    """Write what `torch.save` would, with this pickle in it."""
    torch.save({}, path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, member in members.items():
            archive.writestr(name, contents if name.endswith("data.pkl") else member)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        # An object of Python's would be an address taken for one.
        (scalar_opcodes(b"O8", b"|", bytes(8)), "a NumPy scalar that is not a number"),
        (scalar_opcodes(b"f8", b"<", bytes(7)), "a NumPy scalar of 7 bytes"),
        (scalar_opcodes(b"f8", b"x", bytes(8)), "a NumPy scalar of unknown byte order"),
        (b"cnumpy._core.multiarray\n_reconstruct\n)R", r"refers to numpy\._core\.multiarray\._reconstruct"),
        (b"cargparse\nNamespace\n(K\x01tR", "takes no arguments"),
        (b"cargparse\nNamespace\n)R}X\x01\0\0\0acos\nsystem\nsb", r"os\.system|os whose module"),
        (b"cargparse\nNamespace\n)\x81}X\x01\0\0\0acposix\nmkdir\nX\x01\0\0\0b\x85Rsb", "posix"),
        (b"cargparse\nArgumentParser\n)R", r"refers to argparse\.ArgumentParser"),
    ],
)
def test_pickle_stubs_do_not_allow_other_classes(tmp_path: Path, value: bytes, words: str) -> None:
    write_pickle(tmp_path / "a.pth", pickle_with(value))
    with pytest.raises(WeightsError, match=words):
        read_arrays(tmp_path / "a.pth")


@pytest.mark.parametrize("kind", [b"argparse\nNamespace", b"torch.storage\nTypedStorage", b"collections\nOrderedDict"])
@pytest.mark.parametrize("twice", [False, True])  # the second half of a state is set by setattr
def test_attributes_set_by_a_pickle_are_ignored(tmp_path: Path, kind: bytes, twice: bool) -> None:
    """With `__array_interface__` anything at all would be an array: of this process's memory."""
    secret = np.arange(36, dtype=np.float32)
    interface = {"data": (secret.ctypes.data, True), "shape": (6, 6), "typestr": "<f4", "version": 3}
    given = {"__array_interface__": interface}
    state = pickle.dumps((None, given) if twice else given, 2)[2:-1]
    write_pickle(tmp_path / "a.pth", pickle_with(b"c" + kind + b"\n)\x81" + state + b"b"))
    with contextlib.suppress(WeightsError):  # OrderedDict has no second half
        value = read_arrays(tmp_path / "a.pth")["metric"]
        assert not hasattr(value, "__array_interface__")
        with pytest.raises(TypeError):
            to_numpy(value)


def test_lightnings_file_is_one_of_pytorchs(tmp_path: Path) -> None:
    weights = {name: torch.from_numpy(array) for name, array in WEIGHTS.items()}
    found = {"epoch": 3, "state_dict": {f"model.{name}": tensor for name, tensor in weights.items()}}
    torch.save(found, tmp_path / "a.ckpt")
    for prefix in ("", "model"):
        convert(tmp_path / "a.ckpt", tmp_path / "b.npz", to="torch", prefix=prefix)
        assert_same_bits(read_arrays(tmp_path / "b.npz"), WEIGHTS)


def test_torch_file_without_a_state_dict_is_an_error_with_its_type(tmp_path: Path) -> None:
    torch.save(torch.ones(3), tmp_path / "a.pth")
    with pytest.raises(WeightsError, match="it holds Tensor, expected a state_dict"):
        read_arrays(tmp_path / "a.pth")


@pytest.mark.parametrize("suffix", KINDS)
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "`git lfs pull`"),
        ("<!DOCTYPE html>", "web page"),
    ],
    ids=["pointer", "page"],
)
def test_git_lfs_pointers_and_web_pages_are_recognised(tmp_path: Path, suffix: str, text: str, words: str) -> None:
    (tmp_path / f"a{suffix}").write_text(text)
    with pytest.raises(WeightsError, match=words):
        read_arrays(tmp_path / f"a{suffix}")


def test_torchscript_is_recognised(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        for name in ("a/data.pkl", "a/code/__torch__.py", "a/constants.pkl"):
            archive.writestr(name, b"")
    with pytest.raises(WeightsError, match="a TorchScript archive, that is code"):
        read_arrays(tmp_path / "a.pt")


def test_npz_member_that_is_not_an_array_is_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **WEIGHTS)
    with zipfile.ZipFile(tmp_path / "a.npz", "a") as archive:
        archive.writestr("README", "hi")
    with pytest.raises(WeightsError, match="README is not a NumPy array"):
        read_arrays(tmp_path / "a.npz")


# All or nothing


OLD = {"old": np.random.default_rng(3).standard_normal(5)}


def assert_only_the_old_file_is_left(path: Path) -> None:
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert_same_bits(read(path), OLD)


@pytest.mark.parametrize("suffix", KINDS)
def test_write_that_fails_midway_leaves_the_old_file_and_no_debris(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"a{suffix}"
    write_arrays(path, OLD)

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_arrays(path, WEIGHTS)
    assert_only_the_old_file_is_left(path)


@pytest.mark.parametrize("suffix", KINDS)
def test_write_that_reads_back_differently_leaves_the_old_file_and_no_debris(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"a{suffix}"
    write_arrays(path, OLD)
    file_format = weight_files.format_of(path)

    def one_bit_flipped(file: Path, tensors: Any, metadata: Any) -> Any:
        bits = tensors["v.bias"].read().copy()
        bits.view("u4")[0] ^= 1
        return file_format.write(file, tensors | {"v.bias": as_lazy(bits)}, metadata)

    monkeypatch.setitem(weight_files.FORMATS, suffix, replace(file_format, write=one_bit_flipped))
    with pytest.raises(WeightsError, match=r"what was read back differs: .*v.bias"):
        write_arrays(path, WEIGHTS)
    assert_only_the_old_file_is_left(path)


class BitFlippingFile(FileIO):
    """A file that flips one bit when it is written."""

    position = 0

    def write(self, data: Any) -> int:
        kept, at = bytearray(data), self.position - self.tell()
        if 0 <= at < len(kept):
            kept[at] ^= 1
        return super().write(kept)


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
@pytest.mark.parametrize("position", [0, 200, 900])  # of a header and of numbers
def test_disk_that_flips_a_bit_is_detected(
    tmp_path: Path, suffix: str, position: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"a{suffix}"
    write_arrays(path, OLD)
    monkeypatch.setattr(BitFlippingFile, "position", position)
    monkeypatch.setattr(verified, "FileIO", BitFlippingFile)
    with pytest.raises(WeightsError, match="not written, other bits were read back from byte"):
        write_arrays(path, WEIGHTS)
    assert_only_the_old_file_is_left(path)


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_tensors_found_at_another_position_are_compared_again(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader that takes one tensor for another of the same shape is not believed, though both were written well."""
    path = tmp_path / f"a{suffix}"
    write_arrays(path, OLD)
    file_format = weight_files.format_of(path)

    def swapped(file: Path) -> Any:
        contents = file_format.read(file)
        values = dict(contents.values)
        values["v.weight"], values["proj.weight"] = values["proj.weight"], values["v.weight"]
        return replace(contents, values=values)

    monkeypatch.setitem(weight_files.FORMATS, suffix, replace(file_format, read=swapped))
    with pytest.raises(WeightsError, match=r"other bits in v\.weight, proj\.weight"):
        write_arrays(path, WEIGHTS)
    monkeypatch.undo()
    assert_only_the_old_file_is_left(path)


def test_value_that_cannot_be_written_leaves_the_old_file_and_no_debris(tmp_path: Path) -> None:
    write_arrays(tmp_path / "a.npz", OLD)
    with pytest.raises(TypeError, match="object"):
        write_arrays(tmp_path / "a.npz", {"v.weight": object()})
    assert_only_the_old_file_is_left(tmp_path / "a.npz")


def test_new_file_has_the_permissions_of_any_new_file_and_a_replaced_one_keeps_its_own(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    path = tmp_path / "a.npz"
    write_arrays(path, WEIGHTS)
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    path.chmod(0o640)
    write_arrays(path, OLD)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


# Without frameworks


def run_python(code: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_convert_imports_no_framework_unless_the_file_is_pytorchs(tmp_path: Path) -> None:
    code = """if True:
        import sys
        from outlook_common.weights import convert
        convert(sys.argv[1], sys.argv[2])
        print(sorted({"torch", "jax", "flax"} & sys.modules.keys()))"""
    write_arrays(tmp_path / "a.safetensors", layer_bits("bfloat16"))
    assert run_python(code, str(tmp_path / "a.safetensors"), str(tmp_path / "b.npz")) == "[]"
    assert run_python(code, str(tmp_path / "b.npz"), str(tmp_path / "c.safetensors")) == "[]"
    assert_same_bits(read(tmp_path / "c.safetensors"), layer_bits("bfloat16"))
    assert run_python(code, str(tmp_path / "c.safetensors"), str(tmp_path / "d.pth")) == "['torch']"


def test_torchs_file_without_pytorch_names_the_extra_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_arrays(tmp_path / "a.pth", WEIGHTS)
    monkeypatch.setattr("outlook_common.extras.find_spec", lambda module: None)
    with pytest.raises(ImportError, match=r"a\.pth, .* needs torch, .*'outlook-attention\[torch\]'"):
        read_arrays(tmp_path / "a.pth")
    with pytest.raises(ImportError, match=r"'outlook-attention\[torch\]'"):
        write_arrays(tmp_path / "b.pth", WEIGHTS)
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]
