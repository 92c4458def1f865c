"""`outlook predict`."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import typer
from click.testing import Result
from timm.data import ImageNetInfo, create_transform
from typer.testing import CliRunner

import outlook_torch
from outlook_parity.cli.app import predict
from outlook_parity.models import predict as predictions
from outlook_parity.models.photos import load_photos
from outlook_parity.models.predict import TIE, agree, guess
from parity_tests.support.hub_server import Repository, serve, use_hub
from parity_tests.weights.test_pretrained import SIDE, config, folder, weights

app = typer.Typer()
app.command()(predict.predict)


@app.callback()
def outlook_app() -> None:
    """Make `predict` a command by its name."""


def outlook(*arguments: Any, terminal: bool = False) -> Result:
    env = {"COLUMNS": "160", **({"FORCE_COLOR": "1", "TTY_INTERACTIVE": "1"} if terminal else {})}
    return CliRunner().invoke(app, ["predict", *map(str, arguments)], env=env)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two real photos, one without losses and one compressed."""
    path = tmp_path_factory.mktemp("photos")
    china, flower = load_photos()
    china.save(path / "china.png")
    flower.save(path / "flower.jpg")
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small VOLO with ImageNet's classes and random weights."""
    arrays = weights(config(num_classes=1000), dtype="float32")
    return folder(tmp_path_factory.mktemp("model"), arrays, num_classes=1000)


def by_hand(model: Path, photo: Path) -> np.ndarray:
    """Return the probabilities by timm's preprocessing and the PyTorch twin alone."""
    made = outlook_torch.from_pretrained(model)
    transform = create_transform((3, SIDE, SIDE), is_training=False, crop_pct=0.96, interpolation="bicubic")
    with torch.no_grad(), PIL.Image.open(photo) as image:
        return made(transform(image.convert("RGB"))[None]).softmax(-1)[0].numpy()


def test_both_twins_see_the_same_in_real_photos_and_what_the_model_gives_by_hand(photos: Path, model: Path) -> None:
    result = outlook(photos / "china.png", photos / "flower.jpg", "--weights", model, "--framework", "both", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["model"], found["weights"], found["frameworks"]) == ("volo_d1_224", str(model), ["torch", "jax"])
    names = ImageNetInfo().label_descriptions()
    seen = []
    for image, name in zip(found["images"], ("china.png", "flower.jpg"), strict=True):
        assert image["path"] == str(photos / name)
        assert image["agree"] is True
        guesses = image["guesses"]["torch"]
        assert [g["index"] for g in guesses] == [g["index"] for g in image["guesses"]["jax"]]
        expected = by_hand(model, photos / name)
        assert [g["index"] for g in guesses] == np.argsort(-expected)[:5].tolist()
        for twin in ("torch", "jax"):
            for g in image["guesses"][twin]:
                assert g["label"] == names[g["index"]]
                assert g["probability"] == pytest.approx(expected[g["index"]], rel=1e-4)
        seen.append(expected)
    assert np.abs(seen[0] - seen[1]).max() > 1e-3  # the model does look at the image


Forward = Callable[[np.ndarray], np.ndarray]


def use_forwards(monkeypatch: pytest.MonkeyPatch, **forwards: Forward) -> list[int]:
    """Put these in the place of the twins; return a list that will hold how many images each call got."""
    sizes: list[int] = []

    def counted(forward: Forward) -> Callable[[Any], Forward]:
        return lambda pretrained: lambda images: [sizes.append(len(images)), forward(images)][1]

    for name, forward in forwards.items():
        monkeypatch.setitem(predictions.FORWARDS, name, counted(forward))
    return sizes


def brightness(images: np.ndarray) -> np.ndarray:
    """Class 17 grows with the brightness, class 3 shrinks, the others stay."""
    logits = np.zeros((len(images), 1000), np.float32)
    logits[:, 17] = 5 + images.mean(axis=(1, 2, 3))
    logits[:, 3] = 5 - images.mean(axis=(1, 2, 3))
    return logits


def off_by_one(images: np.ndarray) -> np.ndarray:
    return np.roll(brightness(images), 1, axis=1)


def test_a_table_per_image_shows_names_and_probabilities_side_by_side(
    photos: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_forwards(monkeypatch, torch=brightness, jax=brightness)
    result = outlook(photos, "--weights", model, "--top", 2)
    assert result.exit_code == 0, result.output
    names, lines = ImageNetInfo().label_descriptions(), result.stdout.splitlines()
    for name in ("china.png", "flower.jpg"):
        assert sum(name in line for line in lines) == 1
    assert sum("torch" in line and "jax" in line for line in lines) == 2
    rows = [line for line in lines if names[17] in line]
    assert len(rows) == 2
    assert all(row.count(names[17]) == 2 and row.count("%") == 2 for row in rows)
    alone = outlook(photos / "china.png", "--weights", model, "--framework", "torch", "--top", 1).stdout
    assert "torch" in alone
    assert "jax" not in alone


def test_an_unreadable_image_is_reported_at_the_end_and_the_others_are_shown(
    photos: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = use_forwards(monkeypatch, torch=brightness, jax=brightness)
    pictures = tmp_path / "pictures"
    (pictures / "deeper").mkdir(parents=True)
    for name in ("a.png", "c.png", "deeper/d.PNG"):
        shutil.copy(photos / "china.png", pictures / name)
    (pictures / "b[1].png").write_bytes((photos / "china.png").read_bytes()[:5000])
    (pictures / "notes.txt").write_text("not an image")
    arguments = (pictures, tmp_path / "absent.png", "--weights", model, "--batch-size", 2, "--quiet")
    result = outlook(*arguments)
    assert result.exit_code == 2
    assert sizes == [2, 2, 1, 1]  # each batch in each twin
    for name in ("a.png", "c.png", "d.PNG"):
        assert name in result.stdout
    errors = result.stderr.splitlines()
    assert len(errors) == 2
    assert errors[0].startswith(f"error: {pictures / 'b[1].png'}: not a readable image")
    assert str(tmp_path / "absent.png") in errors[1]
    found = json.loads(outlook(*arguments, "--json").stdout)
    assert [Path(image["path"]).name for image in found["images"]] == ["a.png", "c.png", "d.PNG"]
    assert [Path(image["path"]).name for image in found["unreadable"]] == ["b[1].png", "absent.png"]


def test_twins_that_disagree_end_in_exit_code_1_and_are_named(
    photos: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_forwards(monkeypatch, torch=brightness, jax=off_by_one)
    result = outlook(photos / "china.png", photos / "absent.png", "--weights", model)
    assert result.exit_code == 1  # more than the image that is not there
    names = ImageNetInfo().label_descriptions()
    assert f"the twins disagree: {photos / 'china.png'}: torch: " in result.stderr
    assert names[17] in result.stderr or names[3] in result.stderr
    assert "absent.png" in result.stderr


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_a_bar_on_a_terminal_and_lines_without_one(
    photos: Path, model: Path, monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    use_forwards(monkeypatch, torch=brightness, jax=brightness)
    given = (photos / "china.png", photos / "flower.jpg", "--weights", model, "--batch-size", 1)
    result, quiet = outlook(*given, terminal=terminal), outlook(*given, "--quiet", terminal=terminal)
    assert result.exit_code == quiet.exit_code == 0, result.output
    assert "2/2" in result.stderr
    assert "2/2" not in quiet.stderr
    if not terminal:
        loading, *lines = result.stderr.splitlines()
        assert loading == "loading the frameworks"
        assert [line.split("s  ")[1] for line in lines] == ["china.png", "flower.jpg", "done"]


def test_without_weights_the_released_ones_come_from_the_hub(
    photos: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_forwards(monkeypatch, torch=brightness, jax=brightness)
    with serve(model=Repository({path.name: path.read_bytes() for path in model.iterdir()})) as server:
        server.repositories["timm/volo_d1_224.sail_in1k"] = server.repositories.pop("org/model")
        use_hub(monkeypatch, server.url, tmp_path / "cache")
        result = outlook(photos / "china.png", "--json")
        assert json.loads(result.stdout)["weights"] == "timm/volo_d1_224.sail_in1k"
        assert "downloading model.safetensors of timm/volo_d1_224.sail_in1k" in result.stderr.splitlines()
        again = outlook(photos / "china.png", "--json")
        assert "downloading" not in again.stderr
        assert server.count("GET", "model.safetensors") == 1
        fine = outlook(photos / "china.png", "--model", "volo_d2_224")
    assert str(fine.exception).startswith("timm/volo_d2_224.sail_in1k: no such repository")


def test_classes_other_than_imagenets_are_numbered(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_forwards(monkeypatch, torch=lambda images: np.tile(np.arange(7.0), (len(images), 1)))
    small = folder(tmp_path / "small", weights(config()))
    found = json.loads(
        outlook(photos / "china.png", "--weights", small, "--framework", "torch", "--top", 9, "--json").stdout
    )
    assert [g["label"] for g in found["images"][0]["guesses"]["torch"]] == [f"class {k}" for k in range(6, -1, -1)]
    assert found["images"][0]["agree"] is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--framework", "tensorflow"], "--framework must be torch, jax or both, got 'tensorflow'"),
        (["--model", "volo_d1_225"], "did you mean 'volo_d1_224'"),
        (["--weights", "absent.safetensors"], "absent.safetensors"),
        (["--weights", "HEADLESS"], "a model without classifier"),
        (
            ["--weights", "GREY"],
            "in_chans=1 channels, images are read with 3; --model volo_d1_224 adapts",
        ),
        (["--weights", "MODEL", "--model", "volo_d1_384"], "problems with its"),
        (["EMPTY", "--weights", "MODEL"], "no images in this folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_a_user_gets_wrong_is_an_error_before_anything_is_computed(
    photos: Path,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
) -> None:
    from outlook_parity.cli.app import main

    sizes = use_forwards(monkeypatch, torch=brightness, jax=brightness)
    (tmp_path / "empty").mkdir()
    headless = folder(tmp_path / "headless", weights(config(num_classes=0)), num_classes=0)
    grey = folder(tmp_path / "grey", weights(config(in_chans=1)))
    places = {"MODEL": model, "HEADLESS": headless, "GREY": grey, "EMPTY": tmp_path / "empty"}
    given = [str(places.get(argument, argument)) for argument in arguments]
    monkeypatch.setattr(sys, "argv", ["outlook", "predict", str(photos / "china.png"), "--quiet", *given])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert words in error
    assert sizes == []


def test_logits_that_are_not_finite_are_an_error(photos: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_forwards(monkeypatch, torch=lambda images: brightness(images) * np.float32(np.nan))
    result = outlook(photos / "china.png", "--weights", model, "--framework", "torch")
    assert "the logits of torch are not finite" in str(result.exception)


@pytest.mark.parametrize(
    ("missing", "asked", "expected"),
    [
        ((), None, ("torch", "jax")),
        (("torch",), None, ("jax",)),
        (("flax",), None, ("torch",)),
        (("jax",), "both", "outlook predict needs jax, .*outlook-attention.jax."),
        (("torch", "jax"), None, "outlook predict needs torch or jax, .*outlook-attention.torch."),
    ],
    ids=str,
)
def test_frameworks_are_those_installed_unless_asked_for(
    monkeypatch: pytest.MonkeyPatch, missing: set[str], asked: str | None, expected: tuple[str, ...] | str
) -> None:
    def find_spec(name: str) -> object | None:
        return None if name in missing else object()

    monkeypatch.setattr("outlook_common.extras.find_spec", find_spec)
    if isinstance(expected, str):
        with pytest.raises(ImportError, match=expected):
            predict.frameworks_of(asked, "outlook predict")
    else:
        assert predict.frameworks_of(asked, "outlook predict") == expected


def test_guesses_are_the_largest_with_their_softmax() -> None:
    logits = np.random.default_rng(0).standard_normal(50).astype(np.float32) * 100
    found = guess(logits, 50, 4)
    expected = torch.from_numpy(logits).double().softmax(0)
    assert [g.index for g in found] == expected.argsort(descending=True)[:4].tolist()
    assert [g.probability for g in found] == pytest.approx(
        expected.sort(descending=True).values[:4].tolist(), rel=1e-12
    )


def test_labels_agree_if_equal_or_tied_in_both_twins() -> None:
    first = np.array([1.0, 8.0, 8.0 - 2 * TIE, -10.0])
    other = np.array([1.0, 8.0 - 2 * TIE, 8.0, -10.0])
    assert agree(first, first + 0.1)
    assert agree(first, other)
    assert not agree(first, np.array([1.0, 7.0, 8.0, -10.0]))
    assert not agree(np.array([1.0, 8.0, 7.0, -10.0]), other)
    assert not agree(first, np.array([9.0, 8.0, 7.0, -10.0]))
