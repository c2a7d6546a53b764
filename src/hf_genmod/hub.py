"""Whether the Hub has a repository, found out in a few seconds."""

import contextlib
import difflib
import os
import queue
import re
import threading
from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.file_download import repo_folder_name

from hf_genmod.errors import first_line

_SECONDS = 5


def can_be_id(name: str) -> bool:
    """Whether a repository of this name can be on the Hub. A path that starts with a dot, a slash or ~, or has several
    parts or a backslash, cannot."""
    return re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name, re.ASCII) is not None


def did_you_mean(path: str) -> str:
    """The question whether somebody has meant what is there in place of a path that is not, if it is called almost so;
    else an empty text."""
    wanted, cutoff = Path(os.path.expanduser(path)), 0.5
    while not wanted.parent.exists() and wanted != wanted.parent:  # as a drive of Windows that is not there
        wanted, cutoff = wanted.parent, 0.75  # it may be an id, of a user
    with contextlib.suppress(OSError):
        if near := difflib.get_close_matches(wanted.name, os.listdir(wanted.parent), n=1, cutoff=cutoff):
            return f"did you mean {wanted.parent / near[0]}?"
    return ""


def why_missing(
    repo_id: str, repo_type: str = "model", cache_dir: str | os.PathLike | None = None, token: str | bool | None = None
) -> str | None:
    """
    Asks the Hub once for a repository, for 5 seconds at most; the libraries would ask again and again.

    Args:
        repo_id (`str`): The id.
        repo_type (`str`): "model" or "dataset".
        cache_dir, token: As [`~huggingface_hub.hf_hub_download`] takes them. If the cache has the repository, a Hub
            that does not answer is no reason.

    Returns:
        `str` or `None`: Why the repository cannot be had; `None` if it exists, or may be in the cache.
    """
    if constants.HF_HUB_OFFLINE:
        return None
    if not can_be_id(repo_id):
        return f"it cannot be the id of a repository on the Hub; {did_you_mean(repo_id) or 'check the path'}"
    answer = queue.SimpleQueue()

    def ask():
        try:
            HfApi(token=token).repo_info(repo_id, repo_type=repo_type, timeout=2 * _SECONDS)
            answer.put(None)
        except Exception as error:  # of any library below
            answer.put(error)

    threading.Thread(target=ask, daemon=True).start()  # a timeout of HTTP does not limit the resolution of names
    try:
        error = answer.get(timeout=_SECONDS)
    except queue.Empty:
        error = TimeoutError(f"no answer in {_SECONDS} seconds")
    if isinstance(error, RepositoryNotFoundError):
        kind = "data set" if repo_type == "dataset" else "model"
        return f"the Hub has no such {kind} ({first_line(error)}); {did_you_mean(repo_id) or 'check the spelling'}"
    cached = Path(cache_dir or constants.HF_HUB_CACHE, repo_folder_name(repo_id=repo_id, repo_type=repo_type))
    if error is None or cached.is_dir():
        return None
    remedy = did_you_mean(repo_id) or "check the spelling and the connection"
    return f"the Hub cannot be asked ({first_line(error)}); {remedy}"
