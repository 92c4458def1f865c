"""Locate weight files: a path, a folder, or a Hub id."""

import errno
import os
from pathlib import Path
from typing import Any

from outlook_common.hub import CONFIG_FILE, PREFIX, WEIGHT_FILES, HubError, NoSuchFileOnHubError, fetch, split_hub_id
from outlook_common.weights.formats import dcp, orbax, sharded
from outlook_common.weights.formats.base import PathLike
from outlook_common.weights.formats.registry import FORMATS

# Suffixes of files that are no weights, or of formats that are not read.
_FILE_SUFFIXES = (
    ".safetensor", ".st", ".npy", ".h5", ".hdf5", ".keras", ".msgpack", ".distcp", ".onnx", ".gguf", ".pb", ".tflite",
    ".pkl", ".pickle", ".joblib", ".tar", ".gz", ".tgz", ".zip", ".json", ".yaml", ".yml", ".txt", ".py",
)  # fmt: skip


def hub_id_in(source: PathLike) -> str | None:
    """Return `source` if it is a Hub id, else None.

    "owner/name" and "owner/name@revision" are Hub ids unless they look like a path: the name has the suffix of a file,
    or a file or folder of that name, or a folder "owner", is there. "hf-hub:owner/name" always is, a `Path` never.
    """
    if not isinstance(source, str):
        return None
    if not source.startswith(PREFIX) and _looks_like_a_path(source):
        return None
    try:
        split_hub_id(source)
    except ValueError:
        return None
    return source


def _looks_like_a_path(source: str) -> bool:
    path = Path(source)
    is_in_folder = path.parent != Path() and path.parent.is_dir()
    return source.lower().endswith((*FORMATS, *_FILE_SUFFIXES)) or path.exists() or is_in_folder


def _check_exists(source: PathLike) -> None:
    """Raise a FileNotFoundError if there is no such file or folder; with the way to the Hub if that is its form."""
    if Path(source).exists():
        return
    why = os.strerror(errno.ENOENT)
    try:
        split_hub_id(str(source))
    except ValueError:
        raise FileNotFoundError(errno.ENOENT, why, str(source)) from None
    why = f"{why}; as it looks like a path, the Hub was not asked: {PREFIX}{source} does"
    raise FileNotFoundError(errno.ENOENT, why, str(source))


def weights_and_config(source: PathLike, **access: Any) -> tuple[Path, Path | None]:
    """Return the path of the weights and of the `config.json` beside them, if any.

    Args:
        source: a file, a folder with files named as on the Hub, a folder of Orbax's or DCP's, or a Hub id (see
            `hub_id_in`).
        **access: arguments of `fetch` for a Hub id.

    Returns:
        A file, an index of shards, or a folder of Orbax's or DCP's; and `config.json` or None.

    Raises:
        HubError: as `fetch` says.
        FileNotFoundError: there is no such file or folder, or the folder has no weights.
        WeightsError: the folder has several Orbax checkpoints.
    """
    if (hub_id := hub_id_in(source)) is not None:
        try:
            return _on_hub(hub_id, access)
        except HubError as error:
            if hub_id.startswith(PREFIX):
                raise
            raise type(error)(f"{error} (taken as a Hub id: there is no file or folder {source} here)") from error
    _check_exists(source)
    folder = Path(source)
    if not folder.is_dir():
        return folder, None
    if dcp.is_dcp(folder):
        return folder, None
    found = [] if orbax.is_orbax(folder) else [path for name in WEIGHT_FILES if (path := folder / name).exists()]
    if not found and (item := orbax.item_of(folder)) is not None:
        return item, None
    if not found:
        raise FileNotFoundError(
            f"{source}: a folder without weights: no {', '.join(WEIGHT_FILES)}, no Orbax checkpoint and no "
            f"{dcp.METADATA} of DCP's"
        )
    config = folder / CONFIG_FILE
    return found[0], config if config.exists() else None


def _on_hub(hub_id: str, access: dict[str, Any]) -> tuple[Path, Path | None]:
    try:
        config = fetch(hub_id, filename=CONFIG_FILE, **access)
    except NoSuchFileOnHubError:
        config = None
    weights = fetch(hub_id, **access)
    if weights.name.endswith(sharded.INDEX_SUFFIX):
        for shard in sorted(set(sharded.weight_map(weights).values())):
            fetch(hub_id, filename=shard, **access)
    return weights, config
