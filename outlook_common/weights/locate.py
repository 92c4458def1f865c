"""Where weights come from: a file, a folder, or the Hub."""

from pathlib import Path
from typing import Any

from outlook_common.hub import CONFIG_FILE, PREFIX, WEIGHT_FILES, HubError, NoSuchFileOnHubError, fetch, split_hub_id
from outlook_common.weights.formats import orbax, sharded
from outlook_common.weights.formats.registry import FORMATS, PathLike


def hub_id_in(source: PathLike) -> str | None:
    """Return `source` if it is a Hub id, else None.

    "owner/name" and "owner/name@revision" are, unless a file or folder of this name exists or the name ends as weight
    files do; with "hf-hub:" in front they always are. A `Path` never is.
    """
    if not isinstance(source, str):
        return None
    if not source.startswith(PREFIX) and (source.lower().endswith(tuple(FORMATS)) or Path(source).exists()):
        return None
    try:
        split_hub_id(source)
    except ValueError:
        return None
    return source


def weights_and_config(source: PathLike, **access: Any) -> tuple[Path, Path | None]:
    """Return the weights that a path, a folder or a Hub id names, and the `config.json` beside them, if any.

    Args:
        source: a file, a folder with files named as on the Hub, a folder of Orbax's, or a Hub id; see `hub_id_in`.
        **access: of `fetch`, for a Hub id.

    Returns:
        A file, the index of several, or a folder that Orbax saved.

    Raises:
        HubError: as `fetch` says.
        FileNotFoundError: a folder without weights.
        WeightsError: a folder with several checkpoints of Orbax's.
    """
    if (hub_id := hub_id_in(source)) is not None:
        try:
            return _on_hub(hub_id, access)
        except HubError as error:
            if hub_id.startswith(PREFIX):
                raise
            raise type(error)(f"{error} (a Hub id, as there is no file or folder {source} here)") from error
    folder = Path(source)
    if not folder.is_dir():
        return folder, None
    found = [] if orbax.is_orbax(folder) else [path for name in WEIGHT_FILES if (path := folder / name).exists()]
    if not found and (item := orbax.item_of(folder)) is not None:
        return item, None
    if not found:
        raise FileNotFoundError(
            f"{source}: a folder without weights, that is without any of {', '.join(WEIGHT_FILES)}, nor Orbax's"
        )
    config = folder / CONFIG_FILE
    return found[0], config if config.exists() else None


def _on_hub(hub_id: str, access: dict[str, Any]) -> tuple[Path, Path | None]:
    try:
        config = fetch(hub_id, filename=CONFIG_FILE, **access)
    except NoSuchFileOnHubError:
        config = None
    weights = fetch(hub_id, **access)
    if weights.name == sharded.INDEX:
        for shard in sorted(set(sharded.weight_map(weights).values())):
            fetch(hub_id, filename=shard, **access)
    return weights, config
