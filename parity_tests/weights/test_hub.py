"""Files from the Hub: requests, the cache, and errors of one line."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants

from outlook_common.hub import HubError, fetch, split_hub_id
from outlook_common.weights import read_arrays, write_arrays
from outlook_common.weights.checkpoint import open_checkpoint
from outlook_common.weights.locate import hub_id_in, weights_and_config
from parity_tests.support.hub_server import COMMIT, Repository, Server, one_line, serve, use_hub

OTHER_COMMIT = COMMIT[::-1]


def contents(seed: int, size: int = 4096) -> bytes:
    return np.random.default_rng(seed).bytes(size)


WEIGHTS, OLD_WEIGHTS = contents(0), contents(1)
CONFIG = json.dumps({"architecture": "volo_d1_224"}).encode()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Server]]:
    """Start a hub with one repository, org/model, and an empty cache; more by name."""
    running = []

    def start(model: Repository, **others: Repository) -> Server:
        running.append(serve(model=model, **others))
        server = running[-1].__enter__()
        use_hub(monkeypatch, server.url, tmp_path / "cache")
        return server

    yield start
    for context in running:
        context.__exit__(None, None, None)


def files(weights: bytes = WEIGHTS) -> dict[str, bytes]:
    return {"config.json": CONFIG, "model.safetensors": weights, "pytorch_model.bin": contents(2)}


def test_a_cold_cache_downloads_once_and_a_warm_one_not_again(hub: Callable[..., Server]) -> None:
    server = hub(Repository(files()))
    path = fetch("org/model")
    assert path.name == "model.safetensors"
    assert path.read_bytes() == WEIGHTS
    assert (server.count("HEAD", "model.safetensors"), server.count("GET", "model.safetensors")) == (1, 1)
    assert fetch("org/model") == path
    assert (server.count("HEAD", "model.safetensors"), server.count("GET", "model.safetensors")) == (2, 1)


def test_a_moved_branch_is_downloaded_anew(hub: Callable[..., Server]) -> None:
    server = hub(Repository(files()))
    assert fetch("org/model").read_bytes() == WEIGHTS
    server.repositories["org/model"] = Repository(files(OLD_WEIGHTS), {"main": OTHER_COMMIT})
    assert fetch("org/model").read_bytes() == OLD_WEIGHTS


def test_files_are_taken_by_name_and_weights_by_preference(hub: Callable[..., Server]) -> None:
    hub(Repository(files()), old=Repository({"pytorch_model.bin": contents(2)}))
    assert fetch("org/model", filename="config.json").read_bytes() == CONFIG
    assert fetch("org/old").name == "pytorch_model.bin"
    weights, config = weights_and_config("org/model")
    assert config is not None
    assert (weights.name, config.read_bytes()) == ("model.safetensors", CONFIG)
    assert weights_and_config("org/old")[1] is None


@pytest.mark.parametrize("how", ["argument", "in the id"])
def test_a_revision_is_requested(hub: Callable[..., Server], how: str) -> None:
    server = hub(Repository(files(), {"main": COMMIT, "v1.0": OTHER_COMMIT}))
    path = fetch("org/model", revision="v1.0") if how == "argument" else fetch("org/model@v1.0")
    assert {request for _, request in server.requests} == {"org/model/v1.0/model.safetensors"}
    assert path.parent.name == OTHER_COMMIT
    with pytest.raises(ValueError, match=r"has a revision, and revision='main' is another"):
        fetch("org/model@v1.0", revision="main")


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_the_token_is_sent_and_opens_a_private_repository(
    hub: Callable[..., Server], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    server = hub(Repository(files(), token="hf_secret"))
    with pytest.raises(HubError, match=r"org/model: no such repository at http.*, or a private one"):
        fetch("org/model")
    assert set(server.tokens) == {None}
    if how == "environment":
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert fetch("org/model", token="hf_secret" if how == "argument" else None).read_bytes() == WEIGHTS
    assert server.tokens[-2:] == ["Bearer hf_secret"] * 2


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_offline_the_cache_is_enough(
    hub: Callable[..., Server], monkeypatch: pytest.MonkeyPatch, how: str, tmp_path: Path
) -> None:
    server = hub(Repository(files()))
    path = fetch("org/model", cache_dir=tmp_path / "own")
    asked = len(server.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", how == "environment")
    assert fetch("org/model", cache_dir=tmp_path / "own", local_files_only=how == "argument") == path
    assert len(server.requests) == asked


@pytest.mark.parametrize(
    ("how", "words"), [("argument", "local_files_only=True"), ("environment", "HF_HUB_OFFLINE is set")]
)
def test_offline_without_the_file_says_where_it_looked_and_what_to_do(
    hub: Callable[..., Server], monkeypatch: pytest.MonkeyPatch, how: str, words: str, tmp_path: Path
) -> None:
    server = hub(Repository(files()))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", how == "environment")
    with one_line(f"org/model@v1: model.safetensors is not in the cache at {tmp_path / 'cache'}, and {words}") as lines:
        fetch("org/model@v1", local_files_only=how == "argument")
    assert "hf download org/model --revision v1" in lines[0]
    assert server.requests == []


def test_an_unknown_hub_id_is_reported_as_a_missing_path_too(hub: Callable[..., Server]) -> None:
    hub(Repository(files()))
    with one_line("org/absent: no such repository") as lines:
        weights_and_config("org/absent")
    assert lines[0].endswith(" (taken as a Hub id: there is no file or folder org/absent here)")
    with one_line("org/absent: no such repository") as lines:
        weights_and_config("hf-hub:org/absent")
    assert "file or folder" not in lines[0]


@pytest.mark.parametrize("mistyped", ["timm/volo_d1_224", "tim/volo_d1_224.sail_in1k", "hf-hub:timm/volo_d1_224.sail"])
def test_a_mistyped_hub_id_of_a_released_model_is_told_the_nearest(hub: Callable[..., Server], mistyped: str) -> None:
    server = hub(Repository(files()))
    with one_line(f"{mistyped.removeprefix('hf-hub:')}: no such repository at {server.url}") as lines:
        weights_and_config(mistyped)
    assert lines[0].endswith("did you mean 'timm/volo_d1_224.sail_in1k'?)")


def test_missing_repositories_files_and_revisions_are_reported(hub: Callable[..., Server]) -> None:
    server = hub(Repository(files()), bare=Repository({"README.md": b"soon"}), gated=Repository(files(), gated=True))
    with one_line(f"org/absent: no such repository at {server.url}, or a private one"):
        fetch("org/absent")
    with one_line("org/model: it has no revision 'v9'"):
        fetch("org/model", revision="v9")
    with one_line("org/model: it has no file absent.txt"):
        fetch("org/model", filename="absent.txt")
    with one_line(
        "org/bare: it has no weights: none of model.safetensors, model.safetensors.index.json, pytorch_model.bin"
    ):
        fetch("org/bare")
    with one_line(f"org/gated: access must be requested at {server.url}/org/gated"):
        fetch("org/gated")


def test_without_a_working_hub_the_cache_is_used_or_the_reason_reported(
    hub: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = hub(Repository(files()), other=Repository(files()))
    path = fetch("org/model")
    for repository in server.repositories.values():
        repository.broken = True
    assert fetch("org/model") == path
    with one_line(f"org/other: model.safetensors is not in the cache, and {server.url} cannot be reached: ") as lines:
        fetch("org/other")
    assert "500" in lines[0]
    nowhere = "http://127.0.0.1:9"  # the discard service, which nobody runs
    monkeypatch.setattr(constants, "ENDPOINT", nowhere)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", nowhere + "/{repo_id}/resolve/{revision}/{filename}")
    assert fetch("org/model") == path
    with one_line(f"org/other: model.safetensors is not in the cache, and {nowhere} cannot be reached: ConnectError"):
        fetch("org/other")


def test_a_connection_cut_once_is_resumed(hub: Callable[..., Server]) -> None:
    server = hub(Repository(files(), cuts=1))
    assert fetch("org/model").read_bytes() == WEIGHTS
    assert server.count("GET", "model.safetensors") == 2


def test_a_connection_cut_for_good_is_reported_and_leaves_nothing_behind(
    hub: Callable[..., Server], tmp_path: Path
) -> None:
    server = hub(Repository(files(), cuts=1000))
    with one_line(f"org/model: model.safetensors could not be downloaded from {server.url}: "):
        fetch("org/model")
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.stat().st_size > 1000] == []
    server.repositories["org/model"].cuts = 0
    assert fetch("org/model").read_bytes() == WEIGHTS


@pytest.mark.parametrize(("name", "digits"), [("model.safetensors", 64), ("config.json", 40)])
def test_a_wrong_hash_is_an_error_and_the_bad_file_is_removed(
    hub: Callable[..., Server], tmp_path: Path, name: str, digits: int
) -> None:
    server = hub(Repository(files(), etags={name: "ab" * (digits // 2)}))
    with one_line(f"org/model: {name} has the hash ") as lines:
        fetch("org/model", filename=name)
    assert f"expected {'ab' * (digits // 2)}" in lines[0]
    assert not list((tmp_path / "cache").rglob("ab" * (digits // 2)))
    assert not list((tmp_path / "cache").rglob(name))
    server.repositories["org/model"].etags.clear()
    assert fetch("org/model", filename=name).read_bytes() == files()[name]


def test_a_file_changed_in_the_cache_is_detected(hub: Callable[..., Server]) -> None:
    server = hub(Repository(files()))
    blob = fetch("org/model").resolve()
    blob.write_bytes(WEIGHTS[:-1] + b"!")
    with one_line("org/model: model.safetensors has the hash "):
        fetch("org/model", local_files_only=True)
    assert fetch("org/model").read_bytes() == WEIGHTS
    assert server.count("GET", "model.safetensors") == 2


def test_tags_of_a_mirror_are_not_checked_as_hashes(hub: Callable[..., Server]) -> None:
    hub(Repository(files(), etags={"model.safetensors": "version-7"}))
    assert fetch("org/model").read_bytes() == WEIGHTS


def test_the_environment_of_huggingface_hub_is_obeyed(tmp_path: Path) -> None:
    script = "import sys; from outlook_common.hub import fetch; print(fetch(sys.argv[1]))"
    with serve(model=Repository(files(), token="hf_secret")) as server:
        env = {
            **os.environ,
            "HF_ENDPOINT": server.url,
            "HF_HOME": str(tmp_path / "home"),
            "HF_TOKEN": "hf_secret",
            "NO_PROXY": "*",
        }
        env.pop("HF_HUB_CACHE", None)
        command = [sys.executable, "-c", script, "org/model"]
        online = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        assert online.returncode == 0, online.stderr
        asked = len(server.requests)
        offline = subprocess.run(
            command, env=env | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False
        )
        assert len(server.requests) == asked
    path = Path(online.stdout.splitlines()[-1])
    assert offline.stdout.splitlines()[-1] == str(path)
    assert path.is_relative_to(tmp_path / "home" / "hub")
    assert path.read_bytes() == WEIGHTS


# What is a Hub id


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("timm/volo_d1_224.sail_in1k", ("timm/volo_d1_224.sail_in1k", None)),
        ("timm/volo_d1_224.sail_in1k@v1.0", ("timm/volo_d1_224.sail_in1k", "v1.0")),
        ("owner/name@refs/pr/1", ("owner/name", "refs/pr/1")),
        ("hf-hub:owner/weights.bin", ("owner/weights.bin", None)),
        ("weights/volo.pth", None),
        ("weights/Volo.safetensors", None),
        ("volo", None),
        ("a/b/c", None),
        ("./a/b", None),
        ("../b", None),
        ("/a/b", None),
        (Path("timm/volo_d1_224.sail_in1k"), None),
    ],
    ids=str,
)
def test_hub_ids_are_distinguished_from_paths(source: str | Path, expected: tuple[str, str | None] | None) -> None:
    found = hub_id_in(source)
    assert (found and split_hub_id(found)) == expected


def test_an_existing_path_is_not_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub_id_in("owner/name") is None
    assert hub_id_in("hf-hub:owner/name") == "hf-hub:owner/name"


@pytest.mark.parametrize(
    "source",
    [
        "typo/file.safetensors", "typo/file.safetensor", "typo/flax_model.msgpack", "typo/model.h5", "typo/a.tar",
        "./typo/file", "../typo/file", "/typo/file", "typo/deeper/file", "runs/exp1", "runs/exp1@v1",
    ],
)  # fmt: skip
def test_what_looks_like_a_path_is_never_asked_of_the_hub(
    hub: Callable[..., Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    server = hub(Repository(files()))
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="No such file or directory") as caught:
        open_checkpoint(source)
    assert server.requests == []
    assert ("hf-hub:runs/exp1" in str(caught.value)) == source.startswith("runs")


def test_a_hub_that_does_not_answer_is_given_up_soon(
    hub: Callable[..., Server], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hub(Repository(files()))
    with socket.socket() as silent:  # accepts connections, and says nothing
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        use_hub(monkeypatch, f"http://127.0.0.1:{silent.getsockname()[1]}", Path(constants.HF_HUB_CACHE))
        monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "1")
        monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 1)
        start = time.monotonic()
        with one_line("org/model: config.json is not in the cache, and http") as lines:
            weights_and_config("org/model")
        assert time.monotonic() - start < 10  # without the first question: half a minute
        assert "tried for at most 1 s, which HF_HUB_ETAG_TIMEOUT changes" in lines[0]
        assert caplog.text == ""  # of retries


@pytest.mark.parametrize("hub_id", ["volo", "owner/", "a/b/c", "owner/na me"])
def test_what_is_not_a_hub_id_is_not_requested(hub: Callable[..., Server], hub_id: str) -> None:
    server = hub(Repository(files()))
    with pytest.raises(ValueError, match="is not of the form owner/name"):
        fetch(hub_id)
    with pytest.raises(ValueError, match=r"'owner/na\.\.me' is not a name of a repository"):
        fetch("owner/na..me")
    assert server.requests == []


def test_a_checkpoint_opens_from_a_hub_id_and_from_a_folder(hub: Callable[..., Server], tmp_path: Path) -> None:
    arrays = {"v.weight": np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)}
    (tmp_path / "folder").mkdir()
    file = tmp_path / "folder" / "model.safetensors"
    write_arrays(file, arrays)
    hub(Repository({"model.safetensors": file.read_bytes()}))
    for source in ("org/model", "hf-hub:org/model@main", tmp_path / "folder", str(tmp_path / "folder")):
        checkpoint = open_checkpoint(source)
        assert checkpoint.label == str(source)
        assert np.array_equal(dict(checkpoint.items)["v.weight"].read(), read_arrays(file)["v.weight"])
    with pytest.raises(FileNotFoundError, match=r"a folder without weights.*model\.safetensors"):
        open_checkpoint(tmp_path)
