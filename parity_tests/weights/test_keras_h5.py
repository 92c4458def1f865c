"""Keras `.h5` files: kecam's VOLOs under PyTorch's names, and what is refused unread."""

import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import outlook_torch
from outlook_common import VOLOConfig
from outlook_common.config import volo_config
from outlook_common.weights import WeightsError, convert, inspect, read_arrays, resolve, table_for, write_arrays
from outlook_common.weights.formats.registry import open_file
from parity_tests.weights.layers import WEIGHTS, any_bits, assert_same_bits

pytestmark = pytest.mark.skipif(find_spec("h5py") is None, reason="not run: h5py is not installed")

Arrays = dict[str, np.ndarray]
Layers = dict[str, Arrays]

SMALL: dict[str, Any] = {
    "img_size": (64, 96),
    "num_classes": 7,
    "stem_hidden_dim": 6,
    "embed_dims": (24, 48, 48, 48),
    "num_heads": (2, 4, 4, 4),
}


def kecam_layers(weights: Arrays, config: VOLOConfig) -> Layers:
    """The weights that kecam's model of this size has, layer by layer, as its source builds it."""
    layers: Layers = {}

    def dense(name: str, source: str) -> None:
        layers[name] = {"kernel": weights[f"{source}.weight"].T}
        if f"{source}.bias" in weights:
            layers[name]["bias"] = weights[f"{source}.bias"]

    def convolution(name: str, source: str) -> None:
        dense(name, source)
        layers[name]["kernel"] = weights[f"{source}.weight"].transpose(2, 3, 1, 0)

    def norm(name: str, source: str) -> None:
        layers[name] = {"gamma": weights[f"{source}.weight"], "beta": weights[f"{source}.bias"]}

    def batch_norm(name: str, source: str) -> None:
        norm(name, source)
        layers[name] |= {
            "moving_mean": weights[f"{source}.running_mean"],
            "moving_variance": weights[f"{source}.running_var"],
        }

    def attention(name: str, source: str, heads: int, projections: Arrays) -> None:
        dim = len(weights[f"{source}.proj.weight"])
        kernels = {f"{each}/kernel": w.T.reshape(dim, heads, dim // heads) for each, w in projections.items()}
        out = weights[f"{source}.proj.weight"].T.reshape(heads, dim // heads, dim)
        layers[f"{name}_mhsa"] = kernels | {"attention_output/kernel": out}
        layers[f"{name}_bias"] = {"bias": weights[f"{source}.proj.bias"]}

    def block(name: str, source: str, heads: int, kind: str) -> None:
        norm(f"{name}_LN", f"{source}.norm1")
        if kind == "outlook":
            for layer, own in (("v", "v"), ("attn", "attn"), ("out", "proj")):
                dense(f"{name}_attn_{layer}", f"{source}.attn.{own}")
        elif kind == "mhsa":
            q, k, v = np.split(weights[f"{source}.attn.qkv.weight"], 3)
            attention(f"{name}_attn", f"{source}.attn", heads, {"query": q, "key": k, "value": v})
        else:
            k, v = np.split(weights[f"{source}.attn.kv.weight"], 2)
            q = weights[f"{source}.attn.q.weight"]
            attention(f"{name}_attn", f"{source}.attn", heads, {"query": q, "key": k, "value": v})
        norm(f"{name}_mlp_LN", f"{source}.norm2")
        dense(f"{name}_mlp_dense_1", f"{source}.mlp.fc1")
        dense(f"{name}_mlp_dense_2", f"{source}.mlp.fc2")

    for index, place in enumerate((0, 3, 6), 1):
        convolution(f"stem_{index}_conv", f"patch_embed.conv.{place}")
        batch_norm(f"stem_{index}_bn", f"patch_embed.conv.{place + 1}")
    convolution("stem_patch_conv", "patch_embed.proj")
    for index in range(config.layers[0]):
        block(f"outlook_block{index}", f"network.0.{index}", config.num_heads[0], "outlook")
    convolution("downsample_conv", "network.1.proj")
    layers["positional_embedding"] = {"positional_embedding": weights["pos_embed"]}
    blocks = [(stage, index) for stage, count in enumerate(config.layers[1:]) for index in range(count)]
    for number, (stage, index) in enumerate(blocks):
        block(f"MHSA_block{number}", f"network.{stage + 2}.{index}", config.num_heads[stage + 1], "mhsa")
    layers["class_token"] = {"tokens": weights["cls_token"]}
    for index in range(len(config.post_layers or ())):
        block(f"classfiers{index}", f"post_network.{index}", config.num_heads[-1], "class")
    norm("pre_out_LN", "norm")
    dense("token_head", "head")
    dense("aux_head", "aux_head")
    return layers


def write_h5(path: Path, layers: Layers, *, within: str = "", ending: str = ":0") -> None:
    """Write what Keras does: a group per layer, and in it one of the same name."""
    import h5py

    with h5py.File(path, "w") as file:
        root = file.create_group(within) if within else file
        root.attrs["layer_names"] = [name.encode() for name in layers]
        root.attrs["backend"] = b"tensorflow"
        for layer, weights in layers.items():
            group = root.create_group(layer)
            group.attrs["weight_names"] = [f"{layer}/{name}{ending}".encode() for name in weights]
            for name, array in weights.items():
                group.create_dataset(f"{layer}/{name}{ending}", data=array)


def drawn(config: VOLOConfig) -> Arrays:
    rng = np.random.default_rng(0)
    return {
        entry.torch: np.zeros((), np.int64) if entry.dtype else any_bits(entry.shape, "float32", rng)
        for entry in table_for(config).entries
    }


@pytest.mark.parametrize("variant", ["volo_d1_224", "volo_d2_224", "volo_d5_224"])
@pytest.mark.parametrize(("within", "ending"), [("", ":0"), ("model_weights", "")])
def test_kecams_weights_are_converted_bit_by_bit(tmp_path: Path, variant: str, within: str, ending: str) -> None:
    config = volo_config(variant, **SMALL)
    weights = drawn(config)
    write_h5(tmp_path / "volo.h5", kecam_layers(weights, config), within=within, ending=ending)
    assert_same_bits(resolve(tmp_path / "volo.h5", table_for(config)), weights)
    convert(tmp_path / "volo.h5", tmp_path / "volo.safetensors", to="torch")
    assert_same_bits(read_arrays(tmp_path / "volo.safetensors"), weights)


def test_kecams_weights_load_into_a_model(tmp_path: Path) -> None:
    config = volo_config("volo_d1_224", **SMALL)
    weights = drawn(config)
    write_h5(tmp_path / "volo.h5", kecam_layers(weights, config))
    model = outlook_torch.VOLO(config)
    outlook_torch.load_weights(model, tmp_path / "volo.h5")
    assert_same_bits(outlook_torch.export_weights(model), weights)


def test_a_number_of_blocks_of_no_variant_is_one_stage(tmp_path: Path) -> None:
    sizes = {"layers": (2, 3), "embed_dims": (24, 48), "num_heads": (2, 4), "mlp_ratio": (3.0, 3.0)}
    own = {"downsamples": (True, False), "outlook_attention": (True, False)}
    config = VOLOConfig(**SMALL | sizes | own)
    weights = drawn(config)
    write_h5(tmp_path / "volo.h5", kecam_layers(weights, config))
    assert_same_bits(resolve(tmp_path / "volo.h5", table_for(config)), weights)


def test_what_is_missing_or_too_much_is_named(tmp_path: Path) -> None:
    config = volo_config("volo_d1_224", **SMALL)
    layers = kecam_layers(drawn(config), config)
    del layers["MHSA_block3_attn_mhsa"]["key/kernel"]
    layers["extra"] = {"kernel": np.ones((2, 2), np.float32)}
    write_h5(tmp_path / "volo.h5", layers)
    with pytest.raises(WeightsError) as caught:
        resolve(tmp_path / "volo.h5", table_for(config))
    message = "\n".join(problem.detail for problem in caught.value.problems)
    assert "network.2.3.attn.qkv.weight" in message
    assert "extra.kernel" in message
    assert "MHSA_block3_attn_mhsa.query.kernel" in message


def test_tensors_are_read_when_they_are_asked_for(tmp_path: Path) -> None:
    config = volo_config("volo_d1_224", **SMALL)
    write_h5(tmp_path / "volo.h5", kecam_layers(drawn(config), config))
    contents = open_file(tmp_path / "volo.h5").values
    (tmp_path / "volo.h5").write_bytes(b"changed")
    with pytest.raises(WeightsError, match="changed while it was being read"):
        contents["network.0.0.attn.v.weight"].read()


def test_other_names_are_kept_and_inspected(tmp_path: Path) -> None:
    write_h5(tmp_path / "layer.hdf5", {"v": {"weight": WEIGHTS["v.weight"]}, "bias": {"b": np.arange(3.0)}})
    found = read_arrays(tmp_path / "layer.hdf5")
    assert_same_bits(found, {"v/weight": WEIGHTS["v.weight"], "bias/b": np.arange(3.0)})
    assert inspect(tmp_path / "layer.hdf5")


def test_big_endian_numbers_and_half_precision_are_read(tmp_path: Path) -> None:
    layers = {"a": {"big": np.arange(6, dtype=">f8").reshape(2, 3), "half": np.arange(4, dtype=np.float16)}}
    write_h5(tmp_path / "a.h5", layers)
    found = read_arrays(tmp_path / "a.h5")
    assert found["a/big"].dtype == np.float64
    np.testing.assert_array_equal(found["a/big"], layers["a"]["big"])
    assert_same_bits({"half": found["a/half"]}, {"half": layers["a"]["half"]})


def packed(group: Any) -> None:
    group.create_dataset("x", data=np.zeros(100), compression="gzip")


def soft_link(group: Any) -> None:
    import h5py

    group["x"] = h5py.SoftLink("/v")


def outside(group: Any) -> None:
    import h5py

    group["x"] = h5py.ExternalLink("/etc/passwd", "/")


def in_another_file(group: Any) -> None:
    group.create_dataset("x", (4,), np.float32, external=[("/etc/passwd", 0, 16)])


def virtual(group: Any) -> None:
    import h5py

    layout = h5py.VirtualLayout((4,), np.float32)
    layout[:] = h5py.VirtualSource("/etc/passwd", "x", (4,))
    group.create_virtual_dataset("x", layout)


def circle(group: Any) -> None:
    group["x"] = group.parent


def twice(group: Any) -> None:
    group["x"] = group["v"]


def text(group: Any) -> None:
    group.create_dataset("x", data="text")


def record(group: Any) -> None:
    group.create_dataset("x", data=np.zeros(3, [("a", "f4"), ("b", "i4")]))


def unwritten(group: Any) -> None:
    group.create_dataset("x", (1 << 40,), np.float32)


def deep(group: Any) -> None:
    group.create_group("/".join("a" * 80))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (packed, "does not lie in one piece"),
        (soft_link, "is a link"),
        (outside, "is a link"),
        (in_another_file, "does not lie in one piece"),
        (virtual, "does not lie in one piece"),
        (circle, "is there twice"),
        (twice, "is there twice"),
        (text, "not plain numbers"),
        (record, "not plain numbers"),
        (unwritten, "the file has 0 from"),
        (deep, "nest more than 64 deep"),
    ],
)
def test_what_no_weights_need_is_refused(tmp_path: Path, change: Callable[[Any], None], message: str) -> None:
    import h5py

    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("g/v", data=np.ones(3, np.float32))
        change(file["g"])
    with pytest.raises(WeightsError, match=message):
        open_file(tmp_path / "a.h5")


def test_a_file_that_is_none_is_refused_and_none_is_written(tmp_path: Path) -> None:
    (tmp_path / "a.h5").write_bytes(b"not HDF5")
    with pytest.raises(WeightsError, match=r"a\.h5: not a readable \.h5 file"):
        open_file(tmp_path / "a.h5")
    with pytest.raises(WeightsError, match="read, not written"):
        write_arrays(tmp_path / "b.h5", {"a": np.ones(3)})
    assert not (tmp_path / "b.h5").exists()


def test_a_library_that_crashes_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "crash.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    monkeypatch.setattr("outlook_common.weights.formats.hdf5._INDEX", tmp_path / "crash.py")
    (tmp_path / "a.h5").write_bytes(b"")
    with pytest.raises(WeightsError, match="the HDF5 library ends with code -11"):
        open_file(tmp_path / "a.h5")


def test_without_h5py_the_error_names_the_extra(tmp_path: Path) -> None:
    (tmp_path / "a.h5").write_bytes(b"")
    code = f"""
import sys
sys.modules["h5py"] = None
from outlook_common.weights.formats.registry import open_file
open_file({str(tmp_path / "a.h5")!r})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert "reading a.h5 needs h5py, which is not installed" in done.stderr
    assert "pip install 'outlook-attention[h5]'" in done.stderr
