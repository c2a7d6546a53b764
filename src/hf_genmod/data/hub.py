"""Questions to the Hub about data sets."""

import queue
import re
import threading
from pathlib import Path

import datasets
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import RepositoryNotFoundError

from hf_genmod.errors import first_line

_SECONDS = 5


def can_be_id(name: str) -> bool:
    """Whether a data set of this name can be on the Hub. A path that starts with a dot, a slash or ~, or has several
    parts or a backslash, cannot."""
    return re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name, re.ASCII) is not None


def check_exists(name: str) -> None:
    """
    Returns if the Hub has a data set, or if the cache has it and the Hub does not answer.

    Raises:
        FileNotFoundError: If the Hub has none, or does not answer in 5 seconds.
    """
    if constants.HF_HUB_OFFLINE:
        return  # `datasets` looks into the cache
    answer = queue.SimpleQueue()

    def ask():
        try:
            HfApi().dataset_info(name, timeout=_SECONDS)
            answer.put(None)
        except Exception as error:  # of any library below
            answer.put(error)

    threading.Thread(target=ask, daemon=True).start()  # a timeout of HTTP does not limit the resolution of names
    try:
        error = answer.get(timeout=_SECONDS)
    except queue.Empty:
        error = TimeoutError(f"no answer in {_SECONDS} seconds")
    is_cached = Path(datasets.config.HF_DATASETS_CACHE, name.replace("/", "___")).is_dir()
    if error is None or (is_cached and not isinstance(error, RepositoryNotFoundError)):
        return
    if isinstance(error, RepositoryNotFoundError):
        problem = f"the Hub has no such data set ({first_line(error)}); check the spelling"
    else:
        problem = f"the Hub cannot be asked ({first_line(error)}); check the spelling and the connection"
    raise FileNotFoundError(f"{name}: there is no such folder, and {problem}") from error


def check_configuration(source: str, name: str, config_name: str | None) -> None:
    """Raises a `ValueError` with the names of the configurations of a data set if none is chosen of several, or one
    that does not exist. `source` is a folder or an id."""
    known = datasets.get_dataset_config_names(source)
    if config_name is None and len(known) > 1 and datasets.get_dataset_default_config_name(source) is None:
        raise ValueError(f"{name}: it has several configurations; choose one of {', '.join(known)} by --config_name")
    if config_name is not None and config_name not in known:
        raise ValueError(f"config_name: {name} has no {config_name!r}; it has {', '.join(known)}")
