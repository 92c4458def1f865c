"""`outlook explain`: what is drawn, not its pixels."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from typer.testing import CliRunner

import outlook_torch
from outlook_common.explain import place_weights
from outlook_common.images import Preprocessing, place_in_input, preprocess
from outlook_parity.cli.app import app
from outlook_parity.models.explain import ATTENTION_MAPS
from outlook_parity.models.photos import load_photos
from outlook_parity.report import explain as picture
from parity_tests.weights.test_pretrained import config, folder, weights

ROOT = Path(__file__).parents[2]
SIZE = (64, 64)


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photos") / "china.png"
    load_photos()[0].save(path)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    of = config(num_classes=1000, img_size=SIZE)
    return folder(tmp_path_factory.mktemp("model"), weights(of, dtype="float32"), num_classes=1000)


def outlook(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["explain", *map(str, arguments)], catch_exceptions=False)


@pytest.mark.parametrize("framework", ATTENTION_MAPS)
def test_what_is_drawn_are_the_weights_of_the_place(
    framework: str, photo: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple] = []
    honest = picture.save_explanation
    monkeypatch.setattr(
        picture, "save_explanation", lambda *args, **kwargs: (drawn.append(args), honest(*args, **kwargs))
    )
    out = tmp_path / "picture.png"
    place = (100, 300)  # of 427 rows and 640 columns
    result = outlook(photo, "--weights", model, "--place", "100,300", "--framework", framework, "--out", out)
    assert result.exit_code == 0, result.output
    [(path, title, seen, at, found)] = drawn
    assert path == out
    with PIL.Image.open(out) as written:
        assert written.size[0] > 1000
    assert "row 100, column 300" in title

    how = Preprocessing(SIZE, 0.96)
    pixels = preprocess(photo, how)
    assert np.abs(seen - (pixels * how.std + how.mean) * 255).max() <= 0.5 + 1e-3
    # The place is where a white pixel goes to.
    marked = np.zeros((427, 640, 3), np.uint8)
    marked[place[0] - 2 : place[0] + 3, place[1] - 2 : place[1] + 3] = 255
    assert np.unravel_index(preprocess(marked, how)[..., 0].argmax(), SIZE) == at

    own = outlook_torch.from_pretrained(model)
    with torch.no_grad():
        maps = outlook_torch.attention_maps(own, torch.tensor(pixels.transpose(2, 0, 1)[None]))
    expected = place_weights({name: part[0].numpy() for name, part in maps.items()}, own.config, SIZE, at)
    assert [weights.path for weights in found] == [weights.path for weights in expected]
    assert {weights.kind for weights in found} == {"outlook", "class"}
    for ours, theirs in zip(found, expected, strict=True):
        assert np.abs(ours.weights - theirs.weights).max() <= 1e-5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--place", "12"), "--place must be ROW,COLUMN in pixels, as in 120,300, got '12'"),
        (("--place", "427,3"), "row 427 lies outside the image of 427x640 pixels"),
        (("--place", "100,3"), "column 3 is cut off: the model sees columns 111 to 528"),
        (("--framework", "both"), "--framework must be torch or jax, got 'both'"),
    ],
)
def test_bad_options_are_errors_with_numbers(
    arguments: tuple[str, str], words: str, photo: Path, model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "picture.png"
    with pytest.raises(ValueError, match=re.escape(words)):
        outlook(photo, "--weights", model, "--out", out, *arguments)
    assert not out.exists()


def test_every_pixel_that_the_model_sees_has_a_place_and_no_other() -> None:
    size, how = (30, 47), Preprocessing((16, 16), 0.9)
    seen = []
    for column in range(47):
        try:
            seen.append(place_in_input(size, how, (15, column))[1])
        except ValueError as error:
            words = str(error)
    assert sorted(set(seen)) == list(range(16))
    first, last = (int(word) for word in words.split("columns ")[1].split(" to "))
    assert last - first + 1 == len(seen)


@pytest.mark.long(reason="VOLO in processes of their own")
@pytest.mark.parametrize("framework", ATTENTION_MAPS)
def test_one_framework_and_the_extra_plots_suffice(framework: str, photo: Path, model: Path, tmp_path: Path) -> None:
    script = f"""if True:
        import sys
        from parity_tests.support.environment import hide_all_but
        hide_all_but([{framework!r}, "plots"])
        from outlook_parity.cli.app import main
        sys.argv = ["outlook", "explain", {str(photo)!r}, "--weights", {str(model)!r}, "--out", "picture.png"]
        main()"""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "picture.png").stat().st_size > 10_000
