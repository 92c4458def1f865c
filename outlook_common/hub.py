"""Download files from the Hugging Face Hub, checked against its hashes, and upload folders; errors are one line.

Access is that of `huggingface_hub`, with its environment variables: `HF_ENDPOINT`, `HF_HOME`, `HF_HUB_CACHE`,
`HF_TOKEN`, `HF_HUB_OFFLINE`, `HF_HUB_ETAG_TIMEOUT`. Before it is asked for a file that is not in the cache, the Hub
must have answered once, within seconds: the library itself tries for half a minute.
"""

import hashlib
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from outlook_common.version import __version__

# Names of the weights in a repository, as timm uses them; the first one found counts.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "flax_model.msgpack",
)
CONFIG_FILE = "config.json"

_log = logging.getLogger(__name__)

# Seconds in which the Hub must answer, unless HF_HUB_ETAG_TIMEOUT is set.
_ANSWERS_IN = 5
# Endpoints that have answered.
_answered: set[str] = set()

PREFIX = "hf-hub:"  # as timm writes it
_HUB_ID = re.compile(rf"(?:{PREFIX})?(?P<repo>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>[^@\s]+))?", re.ASCII)


class HubError(OSError):
    """A file that cannot be downloaded; the message is one line with the file, the reason and a remedy."""


class NoSuchFileOnHubError(HubError):
    """The repository exists, but has no such file."""


def split_hub_id(hub_id: str) -> tuple[str, str | None]:
    """Return (repository, revision or None) of "owner/name" or "owner/name@revision", also after "hf-hub:".

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
    """Return the path of a file of a repository in the cache, downloading it if needed.

    Its SHA-256 (Git's SHA-1 for small files) is compared each time with the Hub's, by which the cache names its files;
    not on file systems without symbolic links, where it does not.

    Args:
        hub_id: "owner/name" or "owner/name@revision".
        revision: a branch, tag or commit; None means that of `hub_id`, or "main".
        token: for private repositories; None means that of the environment or the last login.
        cache_dir: None means the one that all programs share.
        local_files_only: whether to look in the cache alone.
        filename: None for the weights, under any of `WEIGHT_FILES`.

    Raises:
        HubError: no such repository, revision or file; no access; no connection, or one that was cut; offline and not
            in the cache; or the file has another hash than on the Hub, and has been removed from the cache.
        ValueError: `hub_id` is not of this form, or names another revision than `revision`.
    """
    repo, own_revision = split_hub_id(hub_id)
    if own_revision and revision not in (None, own_revision):
        raise ValueError(f"{hub_id!r} has a revision, and revision={revision!r} is another")
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
        raise NoSuchFileOnHubError(f"{repo}: it has no weights: none of {', '.join(filenames)}") from missing
    raise missing


def has_file(repo_id: str, filename: str, *, token: str | bool | None, revision: str | None) -> bool:
    """Whether a repository exists and has a file.

    Raises:
        HubError: the Hub cannot be reached.
        ValueError: `repo_id` is not of the form owner/name.
    """
    with _upload_errors(repo_id):
        return _api(repo_id, token).file_exists(repo_id, filename, revision=revision)


def upload(
    folder: Path,
    repo_id: str,
    *,
    commit_message: str,
    private: bool | None,
    token: str | bool | None,
    revision: str | None,
    create_pr: bool,
    delete_patterns: list[str],
) -> str:
    """Upload the files of a folder in one commit, into a repository that is made if needed; return the commit's URL.

    Args:
        folder: whose files, by name, become those of the repository.
        repo_id: "owner/name".
        commit_message: first line of the commit.
        private: of a new repository; None means the owner's default.
        token: that may write; None means that of the environment or the last login.
        revision: branch to commit to; None means "main".
        create_pr: whether to open a pull request instead.
        delete_patterns: files of the repository to delete in the same commit, unless they are uploaded.

    Raises:
        HubError: no access, no connection, or the Hub refuses.
        ValueError: `repo_id` is not of the form owner/name.
    """
    with _upload_errors(repo_id):
        api = _api(repo_id, token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
            delete_patterns=delete_patterns,
        )
    return str(done.pr_url or done.commit_url)


def _api(repo_id: str, token: str | bool | None) -> Any:
    """Return the library's client for a repository, once the Hub has answered."""
    from huggingface_hub import HfApi, constants

    if split_hub_id(repo_id) != (repo_id, None):
        raise ValueError(f"{repo_id!r} is not of the form owner/name")
    if constants.HF_HUB_OFFLINE:
        raise HubError(f"{repo_id}: not uploaded, HF_HUB_OFFLINE is set")
    if (error := _unreachable({"local_files_only": False})) is not None:
        raise HubError(
            f"{repo_id}: not uploaded, {_endpoint()} cannot be reached: {_words(error)} (tried for at most "
            f"{_timeout()} s, which HF_HUB_ETAG_TIMEOUT changes)"
        )
    return HfApi(endpoint=_endpoint(), token=token, library_name="outlook-attention", library_version=__version__)


@contextmanager
def _upload_errors(repo_id: str) -> Iterator[None]:
    try:
        yield
    except (HubError, ValueError, OSError) as error:
        from huggingface_hub import errors

        if not isinstance(error, errors.HfHubHTTPError):
            raise
        status = error.response.status_code
        hint = ": pass token=, set HF_TOKEN or log in with `hf auth login`" if status in (401, 403) else ""
        raise HubError(f"{repo_id}: {_endpoint()} refuses the upload, {status}{hint} ({_words(error)})") from error
    except Exception as error:  # of the libraries below, whose errors differ between versions
        raise HubError(f"{repo_id}: not uploaded to {_endpoint()}: {_words(error)}") from error


def _download(repo: str, filename: str, access: dict[str, Any]) -> Path:
    from huggingface_hub import errors, hf_hub_download

    at = f"{repo}@{access['revision']}" if access["revision"] else repo
    if not _is_cached(repo, filename, access) and (error := _unreachable(access)) is not None:
        within = f"tried for at most {_timeout()} s, which HF_HUB_ETAG_TIMEOUT changes"
        raise HubError(
            f"{at}: {filename} is not in the cache, and {_endpoint()} cannot be reached: {_words(error)} ({within})"
        ) from error
    if not _is_offline(access) and not _is_cached(repo, filename, access):
        _log.info("downloading %s of %s", filename, at)
    try:
        options = {**access, "library_name": "outlook-attention", "etag_timeout": _timeout()}
        return Path(hf_hub_download(repo, filename, **options))
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
            f"{at}: access must be requested at {_endpoint()}/{repo}; then pass token=, set "
            "HF_TOKEN or log in with `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(
            f"{at}: no such repository at {_endpoint()}, or a private one that the given token, if any, does not open"
        ) from error
    except errors.HFValidationError as error:
        raise ValueError(f"{repo!r} is not a name of a repository: {_words(error)}") from error
    except Exception as error:  # of the libraries below, whose errors differ between versions
        raise HubError(f"{at}: {filename} could not be downloaded from {_endpoint()}: {_words(error)}") from error


def _is_cached(repo: str, filename: str, access: dict[str, Any]) -> bool:
    from huggingface_hub import errors, try_to_load_from_cache

    try:
        found = try_to_load_from_cache(repo, filename, cache_dir=access["cache_dir"], revision=access["revision"])
    except errors.HFValidationError:  # told by the download
        return True
    return isinstance(found, str)


def _unreachable(access: dict[str, Any]) -> Exception | None:
    """Return the error of asking the Hub for its front page; None if it answers, whatever that is."""
    from huggingface_hub import errors, get_hf_file_metadata

    if _is_offline(access) or _endpoint() in _answered:
        return None
    try:
        get_hf_file_metadata(_endpoint(), token=False, timeout=_timeout())
    except errors.HfHubHTTPError:  # an answer
        pass
    except Exception as error:  # of the libraries below, whose errors differ between versions
        return error
    _answered.add(_endpoint())
    return None


def _timeout() -> float:
    from huggingface_hub import constants

    return constants.HF_HUB_ETAG_TIMEOUT if "HF_HUB_ETAG_TIMEOUT" in os.environ else _ANSWERS_IN


def _verified(path: Path, repo: str, filename: str) -> Path:
    """Return `path`; if its contents do not have the hash that is its name in the cache, remove it and raise."""
    if not path.is_symlink():
        return path
    blob = path.parent / path.readlink()
    if re.fullmatch(r"[0-9a-f]{64}", blob.name):
        with blob.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    elif re.fullmatch(r"[0-9a-f]{40}", blob.name):
        contents = blob.read_bytes()
        found = hashlib.sha1(b"blob %d\0" % len(contents) + contents, usedforsecurity=False).hexdigest()
    else:  # the tag of a mirror
        return path
    if found == blob.name:
        return path
    for link in (blob.resolve(), blob, path):
        link.unlink(missing_ok=True)
    raise HubError(
        f"{repo}: {filename} has the hash {found}, expected {blob.name}: it was damaged in transit or in the cache, "
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
        f"online once, or download it elsewhere with `hf download {at.replace('@', ' --revision ')}` and pass its path"
    )


def _endpoint() -> str:
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def _words(error: BaseException) -> str:
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {line}" if line else type(error).__name__
