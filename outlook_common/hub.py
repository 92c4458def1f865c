"""Files from the Hugging Face Hub, checked against the hashes the Hub gives, and said in one line what went wrong.

Everything about access is `huggingface_hub`'s, with its environment: `HF_ENDPOINT`, `HF_HOME`, `HF_HUB_CACHE`,
`HF_TOKEN`, `HF_HUB_OFFLINE`.
"""

import hashlib
import os
import re
from pathlib import Path
from typing import Any

# What timm, and this package, call the weights in a repository; the first there is counts.
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
CONFIG_FILE = "config.json"

PREFIX = "hf-hub:"  # as timm writes it
_HUB_ID = re.compile(rf"(?:{PREFIX})?(?P<repo>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>[^@\s]+))?", re.ASCII)


class HubError(OSError):
    """A file that cannot be had from the Hub; the message is one line that says which, why, and what would help."""


class NoSuchFileOnHubError(HubError):
    """The repository is there, but has no such file."""


def split_hub_id(hub_id: str) -> tuple[str, str | None]:
    """Return (repository, revision or None) of "owner/name" or "owner/name@revision", with "hf-hub:" in front or not.

    Raises:
        ValueError: it has another form.
    """
    match = _HUB_ID.fullmatch(hub_id)
    if match is None:
        raise ValueError(f"{hub_id!r} is not of the form owner/name or owner/name@revision")
    return match["repo"], match["revision"]


def fetch(
    hub_id: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    filename: str | None = None,
) -> Path:
    """Return where a file of a repository lies in the cache, downloaded if it is not there already.

    Its SHA-256 (or Git's SHA-1 for a small file) is computed each time and compared with the Hub's, after which the
    cache names its files; on file systems without symbolic links it does not, and nothing is compared.

    Args:
        hub_id: "owner/name" or "owner/name@revision".
        revision: a branch, tag or commit; None means that of `hub_id`, or "main".
        token: for private repositories; None means that of the environment or the last login.
        cache_dir: None means the one that all programs share.
        local_files_only: whether to look in the cache alone.
        filename: None means the weights, whatever they are called.

    Raises:
        HubError: no such repository, revision or file; no access; no connection, or one that was cut; offline and not
            in the cache; or the file is not what the Hub says it is, and has been removed from the cache.
        ValueError: `hub_id` is not of this form, or names another revision than `revision`.
    """
    repo, own_revision = split_hub_id(hub_id)
    if own_revision and revision not in (None, own_revision):
        raise ValueError(f"{hub_id!r} names one revision, revision={revision!r} another")
    access = {
        "revision": revision or own_revision,
        "token": token,
        "cache_dir": cache_dir,
        "local_files_only": local_files_only,
    }
    filenames = (filename,) if filename else WEIGHT_FILES
    missing: NoSuchFileOnHubError | None = None
    for name in filenames:
        try:
            return _verified(_download(repo, name, access), repo, name)
        except NoSuchFileOnHubError as error:
            missing = missing or error
    assert missing is not None
    if len(filenames) > 1 and not _is_offline(access):
        raise NoSuchFileOnHubError(f"{repo}: it has no weights, that is none of {', '.join(filenames)}") from missing
    raise missing


def _download(repo: str, filename: str, access: dict[str, Any]) -> Path:
    from huggingface_hub import errors, hf_hub_download

    at = f"{repo}@{access['revision']}" if access["revision"] else repo
    try:
        return Path(hf_hub_download(repo, filename, library_name="outlook-attention", **access))
    except errors.LocalEntryNotFoundError as error:
        if _is_offline(access):
            raise NoSuchFileOnHubError(_offline(at, filename, access)) from error
        why = _words(error.__cause__ or error)
        raise HubError(f"{at}: {filename} is not in the cache, and {_endpoint()} cannot be reached: {why}") from error
    except errors.EntryNotFoundError as error:
        raise NoSuchFileOnHubError(f"{at}: it has no file {filename}") from error
    except errors.RevisionNotFoundError as error:
        raise HubError(f"{repo}: it has no revision {access['revision']!r}") from error
    except errors.GatedRepoError as error:
        raise HubError(
            f"{at}: its owner grants access one by one; ask for it at {_endpoint()}/{repo}, then give token=, set "
            "HF_TOKEN or log in with `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(
            f"{at}: no such repository at {_endpoint()}, or a private one that the given token, if any, does not open"
        ) from error
    except errors.HFValidationError as error:
        raise ValueError(f"{repo!r} is no name of a repository: {_words(error)}") from error
    except Exception as error:  # the libraries below raise their own errors, which differ between versions
        raise HubError(f"{at}: {filename} could not be downloaded from {_endpoint()}: {_words(error)}") from error


def _verified(path: Path, repo: str, filename: str) -> Path:
    """Return `path`; if its contents do not have the hash that names them in the cache, remove them and raise."""
    if not path.is_symlink():
        return path
    blob = path.parent / path.readlink()
    if re.fullmatch(r"[0-9a-f]{64}", blob.name):
        with blob.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    elif re.fullmatch(r"[0-9a-f]{40}", blob.name):
        contents = blob.read_bytes()
        found = hashlib.sha1(b"blob %d\0" % len(contents) + contents, usedforsecurity=False).hexdigest()
    else:  # some mirror's own tag
        return path
    if found == blob.name:
        return path
    for link in (blob.resolve(), blob, path):
        link.unlink(missing_ok=True)
    raise HubError(
        f"{repo}: {filename} has the hash {found}, expected {blob.name}: it was damaged on the way or in the cache, "
        "and has been removed; try again"
    )


def _is_offline(access: dict[str, Any]) -> bool:
    from huggingface_hub import constants

    return bool(access["local_files_only"] or constants.HF_HUB_OFFLINE)


def _offline(at: str, filename: str, access: dict[str, Any]) -> str:
    from huggingface_hub import constants

    why = "local_files_only=True" if access["local_files_only"] else "HF_HUB_OFFLINE is set"
    return (
        f"{at}: {filename} is not in the cache at {access['cache_dir'] or constants.HF_HUB_CACHE}, and {why}; go "
        f"online once, or fetch it elsewhere with `hf download {at.replace('@', ' --revision ')}` and give its path"
    )


def _endpoint() -> str:
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def _words(error: BaseException) -> str:
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {line}" if line else type(error).__name__
