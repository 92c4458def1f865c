"""`save_pretrained` and `push_to_hub` of both twins: folders, cards, shards, a Hub on the loopback interface."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from flax import nnx
from huggingface_hub import ModelCard, constants
from timm.models._hub import save_for_hf

import outlook_jax
import outlook_torch
from outlook_common.hub import HubError
from outlook_common.weights import WeightsError
from outlook_common.weights.formats.sharded import INDEX
from outlook_parity import Report
from parity_tests.support.hub_server import Server, serve, use_hub
from parity_tests.weights.test_own_sizes import CONFIG, OTHER, TWINS, assert_whole, both_twins, make

pytestmark = [
    pytest.mark.usefixtures("quick_compilation"),
    pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning"),  # huggingface_hub uploads so
]

FILES = ["README.md", "config.json", "model.safetensors"]
REPORT = Report("mismatch", reason=None, cause="another epsilon in `norm`", environment={"jax": "0.0.1"})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@both_twins
def test_what_one_twin_saves_the_other_loads_bit_for_bit(tmp_path: Path, twin: str) -> None:
    TWINS[twin].save_pretrained(make(twin), tmp_path / "new" / "model", license="mit")
    assert names(tmp_path / "new" / "model") == FILES
    assert_whole(OTHER[twin], tmp_path / "new" / "model")
    assert_whole(twin, tmp_path / "new" / "model" / "model.safetensors")


@both_twins
def test_above_the_size_of_a_shard_there_are_several_and_an_index(tmp_path: Path, twin: str) -> None:
    TWINS[twin].save_pretrained(make(twin), tmp_path / "model", max_shard_size="20KB")
    shards = names(tmp_path / "model")[2:]
    assert INDEX in shards
    assert len(shards) > 3
    assert_whole(OTHER[twin], tmp_path / "model")
    TWINS[twin].save_pretrained(make(twin), tmp_path / "model")
    assert names(tmp_path / "model") == FILES
    with pytest.raises(ValueError, match="Unit"):
        TWINS[twin].save_pretrained(make(twin), tmp_path / "model", max_shard_size="5 parsecs")
    with pytest.raises(ValueError, match="max_shard_size must be at least 1 byte, got 0"):
        TWINS[twin].save_pretrained(make(twin), tmp_path / "model", max_shard_size=0)


def test_both_twins_write_the_same_files(tmp_path: Path) -> None:
    for twin in TWINS:
        TWINS[twin].save_pretrained(make(twin), tmp_path / twin / "model", report=REPORT)
    for name in FILES:
        assert (tmp_path / "torch" / "model" / name).read_bytes() == (tmp_path / "jax" / "model" / name).read_bytes()


def test_the_card_says_what_the_model_is_and_what_verify_found(tmp_path: Path) -> None:
    outlook_torch.save_pretrained(make("torch"), tmp_path / "model", license="mit", report=REPORT)
    card = ModelCard.load(tmp_path / "model" / "README.md")
    assert (card.data.license, card.data.pipeline_tag) == ("mit", "image-classification")
    described = json.loads((tmp_path / "model" / "config.json").read_text())["pretrained_cfg"]
    assert (described["license"], described["crop_pct"]) == ("mit", 0.5)
    for text in (
        "64x32 pixels",
        "heads (2, 6, 3, 2)",
        "**MISMATCH** — MISMATCH: ",
        "another epsilon",
        "| jax | 0.0.1 |",
    ):
        assert text in card.text
    code = card.text.partition("```python\n")[2].partition("```")[0]
    assert 'jax_model = outlook_jax.from_pretrained("model")' in code


def test_the_code_in_the_card_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outlook_torch.save_pretrained(make("torch"), tmp_path / "model")
    card = ModelCard.load(tmp_path / "model" / "README.md")
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(card.text.partition("```python\n")[2].partition("```")[0], found)
    assert found["jax_model"].config == found["torch_model"].config == CONFIG


def test_a_card_that_was_edited_stays_unless_there_is_a_report(tmp_path: Path) -> None:
    outlook_torch.save_pretrained(make("torch"), tmp_path / "model")
    (tmp_path / "model" / "README.md").write_text("mine")
    outlook_torch.save_pretrained(make("torch"), tmp_path / "model")
    assert (tmp_path / "model" / "README.md").read_text() == "mine"
    outlook_torch.save_pretrained(make("torch"), tmp_path / "model", report=REPORT)
    assert "MISMATCH" in (tmp_path / "model" / "README.md").read_text()


@both_twins
def test_other_files_and_other_models_are_refused_and_left_alone(tmp_path: Path, twin: str) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(WeightsError, match="is not a checkpoint of this kind, so it is not replaced"):
        TWINS[twin].save_pretrained(make(twin), tmp_path)
    assert names(tmp_path) == ["notes.txt"]
    layer = (
        outlook_torch.OutlookAttention(12) if twin == "torch" else outlook_jax.OutlookAttention(12, rngs=nnx.Rngs(0))
    )
    with pytest.raises(TypeError, match="a VOLO is saved as a folder, got OutlookAttention: save_weights writes"):
        TWINS[twin].save_pretrained(layer, tmp_path / "model")


def test_timm_makes_the_same_model_of_a_folder_with_the_channels_of_a_variant(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"img_size": (64, 32), "num_classes": 5, "in_chans": 4, "mlp_ratio": (2.0, 1.5, 2.0, 2.0)}
    model = outlook_torch.volo("volo_d1_224", **sizes).eval()
    model.pretrained_cfg |= {"crop_pct": 0.5}
    outlook_torch.save_pretrained(model, tmp_path / "model")
    assert 'timm.create_model("hf-hub:model"' in (tmp_path / "model" / "README.md").read_text()
    theirs = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
    images = torch.randn(2, 4, 64, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = model(images), theirs(images)
    assert found.std() > 1e-3
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert theirs.pretrained_cfg["crop_pct"] == 0.5


def test_timm_is_not_named_where_it_cannot_make_the_model(tmp_path: Path) -> None:
    outlook_torch.save_pretrained(make("torch"), tmp_path / "model")
    assert "timm.create_model" not in (tmp_path / "model" / "README.md").read_text()


@pytest.mark.parametrize(("twin", "safe"), [("torch", True), ("torch", False), ("jax", True)])
def test_a_folder_that_timm_saved_is_read(tmp_path: Path, twin: str, safe: bool) -> None:
    theirs = timm.create_model("volo_d1_224", num_classes=5, img_size=64, drop_path_rate=0.1, stem_hidden_dim=8)
    save_for_hf(theirs, str(tmp_path / "timm"), safe_serialization=safe, model_args={"stem_hidden_dim": 8})
    ours = TWINS[twin].from_pretrained(tmp_path / "timm")
    assert (ours.config.img_size, ours.config.stem_hidden_dim, ours.num_classes) == ((64, 64), 8, 5)
    weights = TWINS[twin].export_weights(ours)
    assert all(np.array_equal(weights[name], value.numpy()) for name, value in theirs.state_dict().items())


# The Hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with serve() as server:
        use_hub(monkeypatch, server.url, tmp_path / "cache")
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # has a server of its own
        yield server


@both_twins
def test_what_one_twin_pushes_the_other_loads(hub: Server, twin: str) -> None:
    url = TWINS[twin].push_to_hub(make(twin), "org/mine", commit_message="First", token="hf_x", license="apache-2.0")
    repository = hub.repositories["org/mine"]
    assert url == f"{hub.url}/org/mine/commit/{repository.revisions['main']}"
    assert sorted(repository.files) == FILES
    assert repository.commits == ["First"]
    assert 'outlook_torch.from_pretrained("org/mine")' in repository.files["README.md"].decode()
    assert_whole(OTHER[twin], "org/mine")  # type: ignore[arg-type]


def test_weights_of_an_earlier_push_are_removed_and_an_edited_card_stays(hub: Server) -> None:
    outlook_torch.push_to_hub(make("torch"), "org/mine")
    repository = hub.repositories["org/mine"]
    repository.files |= {"README.md": b"mine", "notes.txt": b"too"}
    outlook_jax.push_to_hub(make("jax"), "org/mine", max_shard_size="20KB")
    assert "model.safetensors" not in repository.files
    assert repository.files["README.md"] == b"mine"
    assert repository.files["notes.txt"] == b"too"
    assert_whole("torch", "org/mine")  # type: ignore[arg-type]
    outlook_jax.push_to_hub(make("jax"), "org/mine", report=REPORT)
    assert sorted(repository.files) == ["README.md", "config.json", "model.safetensors", "notes.txt"]
    assert b"MISMATCH" in repository.files["README.md"]


@both_twins
def test_errors_of_a_push_are_one_line_that_says_what_to_do(hub: Server, twin: str) -> None:
    hub.writers = {"hf_right"}
    with pytest.raises(HubError, match=r"org/mine: .* refuses the upload, 401: pass token=, set HF_TOKEN") as caught:
        TWINS[twin].push_to_hub(make(twin), "org/mine", token="hf_wrong")
    assert "\n" not in str(caught.value)
    assert hub.repositories == {}
    with pytest.raises(ValueError, match="'mine' is not of the form owner/name"):
        TWINS[twin].push_to_hub(make(twin), "mine")


@both_twins
def test_without_a_network_a_push_fails_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, twin: str) -> None:
    use_hub(monkeypatch, "http://127.0.0.1:9", tmp_path / "cache")
    with pytest.raises(
        HubError, match=r"org/mine: not uploaded, http://127\.0\.0\.1:9 cannot be reached: ConnectError"
    ):
        TWINS[twin].push_to_hub(make(twin), "org/mine")
