"""The part of `save_pretrained` and `push_to_hub` without a framework: a folder as on the Hub."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from outlook_common.card import ParityReport, model_card
from outlook_common.config import VOLOConfig
from outlook_common.hub import CONFIG_FILE, has_file, upload
from outlook_common.weights.described import model_config
from outlook_common.weights.formats.base import PathLike
from outlook_common.weights.formats.registry import write_tensors
from outlook_common.weights.formats.sharded import folder_of_shards
from outlook_common.weights.io.lazy import as_lazy
from outlook_common.weights.metadata import metadata_of
from outlook_common.weights.tables.base import WeightTable

CARD_FILE = "README.md"
MAX_SHARD_SIZE = "5GB"
# Files of an earlier push that would be found beside, or before, those of a new one.
_WEIGHT_PATTERNS = ["model*.safetensors", "model.safetensors.index.json"]


def write_pretrained(
    folder: PathLike,
    model: Any,
    table: WeightTable,
    weights: Mapping[str, Any],
    *,
    max_shard_size: int | str,
    license_name: str | None,
    report: ParityReport | None,
    source: str | None = None,
) -> None:
    """Write what a twin's `save_pretrained` does; see there for arguments and errors.

    Args:
        folder: to write.
        model: of either twin, with `config` and `pretrained_cfg`.
        table: of its weights.
        weights: under PyTorch's names, in its layout.
        max_shard_size: see `save_pretrained`.
        license_name: likewise.
        report: likewise.
        source: what the card loads the model from; None for the folder's name.
    """
    if not isinstance(model.config, VOLOConfig):
        raise TypeError(f"a VOLO is saved as a folder, got {type(model).__name__}: save_weights writes its file")
    path = Path(folder)
    described = model_config(model.config, model.pretrained_cfg)
    if license_name is not None:
        described["pretrained_cfg"]["license"] = license_name
    card = path / CARD_FILE
    if report is None and card.is_file():
        text = card.read_text(encoding="utf-8")  # edited, perhaps
    else:
        cfg = {"architecture": described["architecture"], **described["pretrained_cfg"]}
        made = model_card(model.config, cfg, source=source or path.name, license_name=license_name, report=report)
        text = str(made)
    texts = {CONFIG_FILE: json.dumps(described, indent=2) + "\n", CARD_FILE: text}
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: as_lazy(array) for name, array in weights.items()}
    write_tensors(path, folder_of_shards(max_shard_size, texts), tensors, metadata_of(model, table))


def push(
    repo_id: str,
    write: Callable[[Path], None],
    *,
    commit_message: str,
    private: bool | None,
    token: str | bool | None,
    revision: str | None,
    create_pr: bool,
    replace_card: bool,
) -> str:
    """Upload what `write` writes into a folder in one commit, and return its URL; see a twin's `push_to_hub`.

    A card that the repository has already stays, unless `replace_card`; weights of an earlier push are removed.
    """
    with TemporaryDirectory() as temporary:
        folder = Path(temporary) / repo_id.rpartition("/")[2]
        write(folder)
        if not replace_card and has_file(repo_id, CARD_FILE, token=token, revision=revision):
            (folder / CARD_FILE).unlink()
        return upload(
            folder,
            repo_id,
            commit_message=commit_message,
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
            delete_patterns=_WEIGHT_PATTERNS,
        )
