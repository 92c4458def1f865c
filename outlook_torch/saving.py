"""Save VOLO as a folder as on the Hugging Face Hub, or push it there."""

from typing import Any

from torch import nn

from outlook_common.card import ParityReport
from outlook_common.saving import MAX_SHARD_SIZE, push, write_pretrained
from outlook_common.weights.formats.registry import PathLike
from outlook_torch.placement import write_once
from outlook_torch.weights import export_weights, table_of


def save_pretrained(
    model: nn.Module,
    folder: PathLike,
    *,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    license: str | None = None,  # noqa: A002 - the Hub's word
    report: ParityReport | None = None,
) -> None:
    """Save a VOLO as a folder that `from_pretrained` of either twin reads.

    timm reads it too, if layers, channels, heads and windows are those of a released variant. The folder holds
    `config.json`, `model.safetensors` under PyTorch's names (in shards above `max_shard_size`) and a card,
    `README.md`. It is written completely or not at all. If several ranks share the weights, all of
    them must call it, and rank 0 writes.

    Args:
        model: of `VOLO`, of any sizes.
        folder: new, empty, or with nothing but what this function writes: that is replaced, except for a model card
            if there is no `report`.
        max_shard_size: in bytes, or as "5GB".
        license: of the weights, for the card, as the Hub calls it ("apache-2.0").
        report: of `outlook_parity.verify` on this model, whose verdict the card tells.

    Raises:
        TypeError: `model` is no VOLO of this package, or has other weights than its configuration says.
        WeightsError: the folder has other files.
        ValueError: `max_shard_size` is no size.
        OSError: the folder cannot be written; an existing one is unchanged.
    """
    table, weights = table_of(model), export_weights(model)
    settings: dict[str, Any] = {"max_shard_size": max_shard_size, "license_name": license, "report": report}
    write_once(model, lambda: write_pretrained(folder, model, table, weights, **settings))


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    commit_message: str = "Add VOLO",
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    license: str | None = None,  # noqa: A002 - the Hub's word
    report: ParityReport | None = None,
) -> str | None:
    """Upload what `save_pretrained` writes to the Hugging Face Hub in one commit, and return its URL.

    The repository is made if needed. Weights of an earlier push are removed; a model card that it has already stays,
    unless there is a `report`. If several ranks share the weights, all of them must call it; rank 0 uploads, and the
    others return None.

    Args:
        model: of `VOLO`, of any sizes.
        repo_id: "owner/name".
        commit_message: first line of the commit.
        private: of a new repository; None means the owner's default.
        token: that may write; None means that of the environment or the last login.
        revision: branch to commit to; None means "main".
        create_pr: whether to open a pull request instead, whose URL is returned.
        max_shard_size: see `save_pretrained`.
        license: likewise.
        report: likewise.

    Raises:
        HubError: no access, no connection, or the Hub refuses; an `OSError`.
        TypeError: `model` is no VOLO of this package, or has other weights than its configuration says.
        ValueError: `repo_id` is not of the form owner/name, or `max_shard_size` is no size.
    """
    table, weights, urls = table_of(model), export_weights(model), list[str]()
    settings: dict[str, Any] = {"max_shard_size": max_shard_size, "license_name": license, "report": report}

    def upload() -> None:
        url = push(
            repo_id,
            lambda folder: write_pretrained(folder, model, table, weights, source=repo_id, **settings),
            commit_message=commit_message,
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
            replace_card=report is not None,
        )
        urls.append(url)

    write_once(model, upload)
    return urls[0] if urls else None
