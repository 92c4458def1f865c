"""Locate weight files: a path, a folder, or a Hub id."""

import errno
import os
from pathlib import Path
from typing import Any

from outlook_common.config import VOLO_VARIANTS
from outlook_common.hub import CONFIG_FILE, PREFIX, WEIGHT_FILES, HubError, NoSuchFileOnHubError, fetch, split_hub_id
from outlook_common.text import closest
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
    """Raise a FileNotFoundError if there is no such file or folder; with the nearest name or the way to the Hub."""
    if Path(source).exists():
        return
    why = os.strerror(errno.ENOENT)
    is_in_folder = Path(source).parent != Path() and Path(source).parent.is_dir()
    if not is_in_folder and (near := _near(str(source))) is not None:
        raise FileNotFoundError(errno.ENOENT, f"{why}; did you mean the released {near!r}?", str(source))
    try:
        split_hub_id(str(source))
    except ValueError:
        raise FileNotFoundError(errno.ENOENT, why, str(source)) from None
    why = f"{why}; as it looks like a path, the Hub was not asked: {PREFIX}{source} does"
    raise FileNotFoundError(errno.ENOENT, why, str(source))


def _near(name: str) -> str | None:
    """Return the released variant or Hub id that a name resembles; None if it resembles none, or is one."""
    name = name.removeprefix(PREFIX).partition("@")[0]
    hub_ids = [variant.hub_id for variant in VOLO_VARIANTS.values()]
    known = hub_ids if "/" in name else [*VOLO_VARIANTS, *hub_ids]
    return None if name in known else closest(name, known, cutoff=0.7)


def weights_and_config(source: PathLike, **access: Any) -> tuple[Path, Path | None]:
    """Return the path of the weights and of the `config.json` beside them, if any.

    Args:
        source: a file, a folder with files named as on the Hub, a folder of Orbax's or DCP's, or a Hub id (see
            `hub_id_in`), or the name of a released variant.
        **access: arguments of `fetch` for a Hub id.

    Returns:
        A file, an index of shards, or a folder of Orbax's or DCP's; and `config.json` or None.

    Raises:
        HubError: as `fetch` says.
        FileNotFoundError: there is no such file or folder, or the folder has no weights.
        WeightsError: the folder has several Orbax checkpoints.
    """
    if isinstance(source, str) and source in VOLO_VARIANTS and not Path(source).exists():
        source = PREFIX + VOLO_VARIANTS[source].hub_id
    if (hub_id := hub_id_in(source)) is not None:
        try:
            return _on_hub(hub_id, access)
        except HubError as error:
            notes = (
                [] if hub_id.startswith(PREFIX) else [f"taken as a Hub id: there is no file or folder {source} here"]
            )
            notes += [] if (near := _near(hub_id)) is None else [f"did you mean {near!r}?"]
            raise type(error)(" ".join([str(error), *([f"({'; '.join(notes)})"] if notes else [])])) from error
    _check_exists(source)
    folder = Path(source)
    if not folder.is_dir():
        return folder, _beside(folder) if folder.name in WEIGHT_FILES else None
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
    return found[0], _beside(found[0])


def _beside(file: Path) -> Path | None:
    config = file.with_name(CONFIG_FILE)
    return config if config.is_file() else None


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
