"""Pushes a checkpoint to the Hub and proves that it loads there."""

import dataclasses
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, get_token, snapshot_download
from huggingface_hub.utils import HfHubHTTPError

from hf_genmod.checkpoints.safety import check_code
from hf_genmod.errors import first_line
from hf_genmod.sharing.model_card import base_of, check_license, figures_of, license_of, write_card
from hf_genmod.training.run_folder import RunFolder

# A machine without this package: its name leads nowhere, and only what the checkpoint carries can be loaded.
_SAMPLE_WITHOUT_PACKAGE = """
import hashlib, sys
sys.modules["hf_genmod"] = None
import torch
from diffusers import DiffusionPipeline
where, revision, adapter, adapter_revision = (word or None for word in sys.argv[1:])
pipe = DiffusionPipeline.from_pretrained(where, revision=revision, trust_remote_code=True)
if adapter:
    pipe.load_lora_weights(adapter, revision=adapter_revision)
pipe.set_progress_bar_config(disable=True)
rng = torch.Generator().manual_seed(0)
if hasattr(pipe, "reconstruct"):
    images = pipe.reconstruct(torch.rand(1, *pipe.picture_shape, generator=rng), output_type="np").images
else:
    request = {"prompt": "a picture"} if hasattr(pipe, "tokenizer") else {}
    if hasattr(pipe.config, "factor"):
        request = {"image": torch.rand(1, pipe.picture_shape[0], 8, 8, generator=rng)}
    if getattr(pipe, "num_classes", None):
        request["class_labels"] = pipe.num_classes - 1
    images = pipe(**request, num_inference_steps=2, generator=rng, output_type="np").images
print("sha256:" + hashlib.sha256(images.tobytes()).hexdigest())
"""


class PushError(RuntimeError):
    """A push that is not done, for a reason that its message gives, with the command that finishes it."""


@dataclasses.dataclass(frozen=True)
class PushReport:
    """
    What was pushed, and the proof that it loads.

    Args:
        repo_id (`str`): The repository.
        revision (`str`): The commit.
        url (`str`): Its page, or that of the pull request.
        files (`list[str]`): What was uploaded.
        sample (`str`): Hash of the picture that a process without this package drew of the repository, by a fixed
            seed, and another of the folder: they are equal.
    """

    repo_id: str
    revision: str
    url: str
    files: list[str]
    sample: str


def push_checkpoint(
    path: str | os.PathLike,
    repo_id: str,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    license: str | None = None,
    token: str | None = None,
) -> PushReport:
    """
    Uploads a checkpoint or an adapter with its card and the figures of that, and nothing else of the folder, in one
    commit; then a process without this package downloads it into an empty cache and draws a picture, which must be
    bitwise that of the folder. What may pass, such as a lost connection, is tried again.

    Args:
        path (`str` or `os.PathLike`): The folder of a run that is over; `push_report.json` is written into it.
        repo_id (`str`): The repository, which is made if there is none; without a slash it is one's own.
        private (`bool`, *optional*): Whether a new repository is private.
        revision (`str`, *optional*): The branch, which is made if there is none.
        create_pr (`bool`, defaults to `False`): Open a pull request instead.
        license (`str`, *optional*): Licence of the model, such as "mit"; by default that of the card in the folder.
        token (`str`, *optional*): By default the one that is logged in with. It is neither printed nor kept.

    Returns:
        [`PushReport`]

    Raises:
        ValueError, FileNotFoundError: If the folder holds no checkpoint, or code of others, or an adapter of a model
            that is nowhere but here, or if there is no licence.
        PushError: If it could not be uploaded, or the proof failed.
    """
    folder, api = RunFolder(path), HfApi(token=token)
    if not folder.is_complete:
        raise FileNotFoundError(f"{path}: no model_index.json in it, so there is no checkpoint to push")
    license = check_license(license) if license else license_of(path)
    base = base_of(path)
    if base is not None and os.path.isdir(base):
        raise ValueError(
            f"base: {base} is a folder here, which others do not have; push it, and give its id as --base"
        )
    check_code(folder.path)
    try:
        repo_id = _retried(lambda: api.create_repo(repo_id, private=private, exist_ok=True)).repo_id
        if revision is not None:
            _retried(lambda: api.create_branch(repo_id, branch=revision, exist_ok=True))
        card = write_card(path, license, repo_id, revision)
        _check_changed_card(card, license, "" if str(folder.path) == repo_id else f'("{folder.path}"')
        files = _files_to_push(folder)

        def commit():
            additions = [CommitOperationAdd(name, folder.path / name) for name in files]
            return api.create_commit(
                repo_id,
                additions,
                commit_message=f"Upload {folder.path.resolve().name}",
                revision=revision,
                create_pr=create_pr,
            )

        done = commit() if create_pr else _retried(commit)  # or there would be a second one
        sample = _prove(folder.path.resolve(), repo_id, done.oid, base, api)
        report = PushReport(repo_id, done.oid, done.pr_url or done.repo_url.url, files, sample)
        text = json.dumps(dataclasses.asdict(report), indent=2)
        (folder.path / "push_report.json").write_text(text + "\n", encoding="utf-8")
    except Exception as error:  # of any of the libraries in between; a token is in none of their messages, but may be
        reason = first_line(error)
        for secret in filter(None, (token, get_token())):
            reason = reason.replace(secret, "...")
        options = [("--license", license), ("--revision", revision)]
        words = [str(folder.path.resolve()), repo_id, *(word for pair in options if pair[1] for word in pair)]
        words += ["--private"] * bool(private) + ["--create_pr"] * create_pr
        raise PushError(
            f"the push to {repo_id} is not done ({reason}); finish it by: python -m hf_genmod push {shlex.join(words)}"
        ) from error
    return report


def _prove(folder: Path, repo_id: str, revision: str, base: str | None, api: HfApi) -> str:
    """The hash of the picture that both the folder and the repository draw."""
    token = api.token or get_token()
    if base is None:
        places = [{"where": folder}, {"where": repo_id, "revision": revision}]
    else:
        known = {"where": base, "revision": api.model_info(base).sha}
        check_code(Path(snapshot_download(base, revision=known["revision"], token=token, allow_patterns="*.py")))
        places = [known | {"adapter": folder}, known | {"adapter": repo_id, "adapter_revision": revision}]
    with ThreadPoolExecutor() as pool:  # of processes
        drawn = [pool.submit(sample_without_package, **place, token=token) for place in places]
        here, there = (future.result() for future in drawn)
    if here != there:
        raise RuntimeError(f"{repo_id} gives another picture ({there}) than the folder ({here})")
    return here


def _check_changed_card(card: ModelCard, license: str, usage_here: str) -> None:
    """Whether a card that somebody has changed is fit for the Hub."""
    unfit = [word for word in (usage_here, "closest_") if word and word in card.text]
    if unfit:
        raise ValueError(
            f"README.md names {unfit[0]}, which is not for others; change that, or delete the card for a new one"
        )
    if card.data.license != license:
        raise ValueError(f"README.md names the licence {card.data.license!r}, and not {license!r}; change one of them")


def _files_to_push(folder: RunFolder) -> list[str]:
    """The card, its figures, and the checkpoint or adapter."""
    files = ["README.md", *figures_of(folder.path), folder.index]
    if folder.index == "model_index.json":
        index = json.loads((folder.path / folder.index).read_text(encoding="utf-8"))
        files.append(f"{index['_class_name'][0]}.py")
        for name, entry in index.items():
            if isinstance(entry, list) and entry[0] is not None and (folder.path / name).is_dir():
                inside = (folder.path / name).iterdir()
                kinds = (".json", ".safetensors", ".py", ".txt", ".model", ".jinja")
                files += [f"{name}/{file.name}" for file in inside if file.suffix in kinds]
    return sorted(files)


def _retried(attempt):
    """What `attempt` returns, some tries later where what failed may pass."""
    for wait in (1, 4, None):  # seconds
        try:
            return attempt()
        except Exception as error:
            final = isinstance(error, ValueError)
            if isinstance(error, HfHubHTTPError) and error.response is not None:
                status = error.response.status_code
                final = 400 <= status < 500 and status not in (408, 429)
            if final or wait is None:
                raise
        time.sleep(wait)


def sample_without_package(
    where: str | os.PathLike,
    revision: str | None = None,
    adapter: str | os.PathLike | None = None,
    adapter_revision: str | None = None,
    token: str | None = None,
) -> str:
    """
    Draws a picture of a checkpoint, by a fixed seed, in a process that knows no other code than the checkpoint's, and
    no cache.

    Args:
        where (`str` or `Path`): An id on the Hub, or a folder as an absolute path.
        revision (`str`, *optional*): Which, of the Hub.
        adapter (`str` or `Path`, *optional*): An adapter of it, likewise.
        adapter_revision (`str`, *optional*): Which.
        token (`str`, *optional*): For the Hub.

    Returns:
        `str`: The picture's hash.

    Raises:
        RuntimeError: If it cannot be loaded or drawn, or not within ten minutes.
    """
    words = [os.fspath(word or "") for word in (where, revision, adapter, adapter_revision)]
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "HF_HOME": cache, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_MODULES_CACHE"):
            environment.pop(name, None)
        if token is not None:
            environment["HF_TOKEN"] = token
        command = [sys.executable, "-c", _SAMPLE_WITHOUT_PACKAGE, *words]
        try:
            done = subprocess.run(command, capture_output=True, text=True, cwd=cache, env=environment, timeout=600)
        except subprocess.TimeoutExpired as error:
            raise RuntimeError("it was not drawn within ten minutes") from error
    if done.returncode:
        raise RuntimeError((done.stderr.strip() or f"status {done.returncode}").splitlines()[-1])
    return done.stdout.split()[-1]
