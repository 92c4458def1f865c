"""The PyTorch twin in timm's registry."""

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch

import outlook_torch
import outlook_torch.timm
from outlook_common.config import VOLO_VARIANTS
from outlook_common.hub import HubError
from outlook_parity.models.builtin import draw_weights

SMALL: dict[str, Any] = {
    "layers": (1, 2, 1, 1),
    "embed_dims": (12, 24, 24, 24),
    "num_heads": (2, 4, 3, 2),
    "stem_hidden_dim": 6,
}
NAME = "outlook_volo_d1_224"


def create(name: str = NAME, **arguments: Any) -> Any:
    return timm.create_model(name, **SMALL | arguments)


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "volo.safetensors"
    model = outlook_torch.volo("volo_d1_224", img_size=64, num_classes=7, **SMALL)
    outlook_torch.load_weights(model, draw_weights(model.config))
    outlook_torch.save_weights(model, path)
    return path


def overlay(path: Path) -> dict[str, Any]:
    return {"pretrained": True, "pretrained_cfg_overlay": {"file": str(path), "num_classes": 7}}


def test_every_variant_is_listed_beside_timms_own() -> None:
    assert timm.list_models("*outlook*") == [f"outlook_{name}" for name in VOLO_VARIANTS]
    assert timm.list_models("*outlook*", pretrained=True) == [f"outlook_{name}.sail_in1k" for name in VOLO_VARIANTS]
    assert set(VOLO_VARIANTS) <= set(timm.list_models("volo*", module="volo"))
    assert timm.models.model_entrypoint("volo_d1_224").__module__ == "timm.models.volo"


def test_the_registered_settings_are_timms() -> None:
    for name, variant in VOLO_VARIANTS.items():
        ours = timm.models.get_pretrained_cfg(f"outlook_{name}").to_dict()
        theirs = timm.models.get_pretrained_cfg(name).to_dict()
        assert ours.pop("hf_hub_id") == variant.hub_id == theirs.pop("hf_hub_id")
        assert ours.pop("architecture") == f"outlook_{theirs.pop('architecture')}"
        del theirs["url"]
        assert ours == theirs


@pytest.mark.parametrize("name", [NAME, f"{NAME}.sail_in1k"])
def test_a_model_by_name_is_this_packages_with_timms_settings(name: str) -> None:
    model = create(name, num_classes=5, in_chans=1, img_size=(64, 96), drop_path_rate=0.1, implementation="reference")
    assert type(model) is outlook_torch.VOLO
    assert model.training
    assert model.network[0][0].attn.implementation == "reference"
    assert (model.config.num_classes, model.config.in_chans, model.config.img_size) == (5, 1, (64, 96))
    assert model(torch.zeros(2, 1, 64, 96), token_labels=True)[0].shape == (2, 5)
    data = timm.data.resolve_model_data_config(model)
    assert (data["crop_pct"], data["interpolation"]) == (0.96, "bicubic")


def test_a_variants_own_sizes_are_the_defaults() -> None:
    with torch.device("meta"):
        model = timm.create_model("outlook_volo_d3_448")
    assert model.config == VOLO_VARIANTS["volo_d3_448"].config


def test_an_unknown_argument_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match="norm_layr"):
        create(norm_layr=3)


def test_pretrained_weights_are_those_of_the_file(weights_file: Path) -> None:
    model = create(img_size=64, **overlay(weights_file))
    assert model.training
    expected = draw_weights(model.config)
    for name, array in outlook_torch.export_weights(model).items():
        np.testing.assert_array_equal(array, expected[name].astype(array.dtype))


@pytest.mark.filterwarnings("ignore:.*its weights are for 7 classes")
def test_pretrained_weights_are_adapted_as_from_pretrained_adapts_them(weights_file: Path) -> None:
    changed = {"img_size": (96, 64), "in_chans": 1, "num_classes": 3}
    model = create(**overlay(weights_file) | changed).eval()
    same = outlook_torch.from_pretrained(weights_file, variant="volo_d1_224", **SMALL | changed)
    x = torch.randn(2, 1, 96, 64, generator=torch.Generator().manual_seed(0))
    features = model.forward_features(x)
    assert features.abs().max() > 0
    assert torch.equal(features, same.forward_features(x))


def test_a_local_folder_loads_by_timms_prefix(weights_file: Path) -> None:
    (weights_file.parent / "config.json").write_text(
        '{"architecture": "outlook_volo_d1_224", "num_classes": 7, "pretrained_cfg": {"input_size": [3, 64, 64], '
        '"fixed_input_size": true}, "model_args": {"layers": [1, 2, 1, 1], "embed_dims": [12, 24, 24, 24], '
        '"num_heads": [2, 4, 3, 2], "stem_hidden_dim": 6}}'
    )
    weights_file.with_name("model.safetensors").write_bytes(weights_file.read_bytes())
    weights_file = weights_file.rename(weights_file.with_suffix(".kept"))
    try:
        model = timm.create_model(f"local-dir:{weights_file.parent}", pretrained=True).eval()
    finally:
        weights_file.rename(weights_file.with_suffix(".safetensors"))
    same = outlook_torch.from_pretrained(
        weights_file.with_suffix(".safetensors"), variant="volo_d1_224", img_size=64, **SMALL
    )
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(x), same(x))


def test_without_the_hub_pretrained_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match=r"timm/volo_d1_224\.sail_in1k"):
        timm.create_model(NAME, pretrained=True, cache_dir=tmp_path)


def test_settings_without_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="names no weights in file or hf_hub_id"):
        create(pretrained=True, pretrained_cfg_overlay={"hf_hub_id": None})


def test_features_only_gives_the_stages(weights_file: Path) -> None:
    extractor = create(img_size=64, features_only=True, out_indices=(0, 2), **overlay(weights_file))
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    maps = extractor.eval()(x)
    model = outlook_torch.from_pretrained(weights_file, variant="volo_d1_224", img_size=64, **SMALL)
    expected = model.forward_intermediates(x, (0, 2), intermediates_only=True)
    assert [tuple(found.shape) for found in maps] == [(2, 12, 8, 8), (2, 24, 4, 4)]
    assert extractor.feature_info.channels() == [12, 24]
    assert extractor.feature_info.reduction() == [8, 16]
    assert all(torch.equal(found, right) for found, right in zip(maps, expected, strict=True))


def test_without_timm_the_error_says_what_to_install() -> None:
    code = "import sys; sys.modules['timm'] = None; import outlook_torch; import outlook_torch.timm"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode != 0
    assert "outlook_torch.timm needs timm, which is not installed; install it with: pip install timm" in done.stderr


def test_timm_is_imported_by_this_module_alone() -> None:
    code = "import sys, outlook_torch; assert 'timm' not in sys.modules and 'outlook_torch.timm' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    assert importlib.import_module("outlook_torch.timm").__all__ == [f"outlook_{name}" for name in VOLO_VARIANTS]
