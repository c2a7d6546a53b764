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

from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, get_token, snapshot_download
from huggingface_hub.utils import HfHubHTTPError

from hf_genmod.checkpoints.safety import check_code
from hf_genmod.errors import first_line
from hf_genmod.sharing.facts import Facts
from hf_genmod.sharing.model_card import check_license, license_of, write_card

# Stands for a machine without this package: it cannot be imported, so only the code in the checkpoint is loaded.
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
if pipe.denoises:
    images = pipe(**pipe.example_request(), generator=rng, output_type="np").images
else:  # an autoencoder, whose encoder is to load as well
    images = pipe.reconstruct(torch.rand(1, *pipe.picture_shape, generator=rng), output_type="np").images
print("sha256:" + hashlib.sha256(images.tobytes()).hexdigest())
"""


class PushError(RuntimeError):
    """A push that failed; the message gives the reason and the command that finishes it."""


@dataclasses.dataclass(frozen=True)
class PushReport:
    """What was pushed, and the proof that the repository loads."""

    repo_id: str
    revision: str  # the commit
    url: str  # the page of the repository or of the pull request
    files: list[str]
    sample: str  # hash of the image that both the folder and, without this package, the repository gave


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
    Uploads a checkpoint or an adapter, its card and the figures in the card, and no other file, in one commit. Then a
    process without this package downloads the repository and draws an image, which must be bitwise the one that the
    folder gives. After temporary errors, such as a lost connection, it tries again.

    Args:
        path (`str` or `os.PathLike`): The folder of a finished run; `push_report.json` is written into it.
        repo_id (`str`): The repository, created if missing; without a slash it belongs to the user who is logged in.
        private (`bool`, *optional*): Whether a new repository is private.
        revision (`str`, *optional*): The branch, created if missing.
        create_pr (`bool`, defaults to `False`): Open a pull request instead.
        license (`str`, *optional*): Licence of the model, such as "mit"; by default that of the card in the folder.
        token (`str`, *optional*): By default that of the login. It is neither printed nor stored.

    Returns:
        [`PushReport`]

    Raises:
        ValueError, FileNotFoundError: If the folder holds no checkpoint, or foreign code, or an adapter whose base
            model is only on this machine, or if there is no licence.
        PushError: If the upload or the proof failed.
    """
    folder, facts, api = Path(path), Facts.read(path), HfApi(token=token)
    license = check_license(license) if license else license_of(folder)
    if facts.base is not None and os.path.isdir(facts.base):
        raise ValueError(f"base: {facts.base} is a folder that others do not have; push it, and give its id as --base")
    check_code(folder)
    try:
        repo_id = retried(lambda: api.create_repo(repo_id, private=private, exist_ok=True)).repo_id
        if revision is not None:
            retried(lambda: api.create_branch(repo_id, branch=revision, exist_ok=True))
        card = write_card(folder, license, repo_id, revision, facts)
        _check_edited_card(card, license, "" if str(folder) == repo_id else f'("{folder.as_posix()}"')
        files = _files_to_push(facts)

        def commit():  # not `upload_folder`, which may split files among several commits
            added, message = [CommitOperationAdd(name, folder / name) for name in files], f"Upload {facts.name}"
            return api.create_commit(repo_id, added, commit_message=message, revision=revision, create_pr=create_pr)

        done = commit() if create_pr else retried(commit)  # a second try could open a second pull request
        sample = _prove(folder.resolve(), repo_id, done.oid, facts.base, api)
        report = PushReport(repo_id, done.oid, done.pr_url or done.repo_url.url, files, sample)
        text = json.dumps(dataclasses.asdict(report), indent=2)
        (folder / "push_report.json").write_text(text + "\n", encoding="utf-8")
    except Exception as error:  # any library may raise; none of their messages holds a token, but one might
        reason = reason_of(error, token)
        words = ["hf_genmod", "push", str(folder.resolve()), repo_id, "--license", license]
        words += ["--revision", revision] if revision else []
        words += ["--private"] * bool(private) + ["--create_pr"] * create_pr
        raise PushError(f"the push to {repo_id} failed ({reason}); finish it by: {shlex.join(words)}") from error
    return report


def reason_of(error: Exception, token: str | None = None) -> str:
    """The first line of an error, without a token."""
    reason = first_line(error)
    for secret in filter(None, (token, get_token())):
        reason = reason.replace(secret, "...")
    return reason


def _prove(folder: Path, repo_id: str, revision: str, base: str | None, api: HfApi) -> str:
    """The hash of the image that both the folder and the repository give."""
    token = api.token or get_token()
    if base is None:
        places = [{"where": folder}, {"where": repo_id, "revision": revision}]
    else:
        known = {"where": base, "revision": api.model_info(base).sha}
        check_code(Path(snapshot_download(base, revision=known["revision"], token=token, allow_patterns="*.py")))
        places = [known | {"adapter": folder}, known | {"adapter": repo_id, "adapter_revision": revision}]
    with ThreadPoolExecutor() as pool:  # each thread waits for a process
        drawn = [pool.submit(sample_without_package, **place, token=token) for place in places]
        here, there = (future.result() for future in drawn)
    if here != there:
        raise RuntimeError(f"{repo_id} gives another image ({there}) than the folder ({here})")
    return here


def _check_edited_card(card: ModelCard, license: str, usage_here: str) -> None:
    """Raises if a card that was edited by hand is not fit for the Hub."""
    for word in (usage_here, "closest_"):
        if word and word in card.text:
            raise ValueError(f"README.md names {word}, which must not be shared; change the card, or delete it")
    if card.data.license != license:
        raise ValueError(f"README.md names the licence {card.data.license!r}, not {license!r}; change one of them")


def _files_to_push(facts: Facts) -> list[str]:
    """The card, its figures and results, and the checkpoint or adapter."""
    files = ["README.md", *facts.figures(shared=True), *(file for _, file in facts.examples if "/" in file)]
    files += [name for name in [facts.results_file] if name and (facts.folder / name).is_file()]
    if not facts.index:
        return sorted([*files, LORA_WEIGHT_NAME_SAFE])
    files += ["model_index.json", f"{facts.index['_class_name'][0]}.py"]
    kinds = (".json", ".safetensors", ".py", ".txt", ".model", ".jinja")
    for name in facts.configs:
        inside = (facts.folder / name).glob("*")
        files += [f"{name}/{file.name}" for file in inside if file.suffix in kinds]
    return sorted(files)


def retried(attempt):
    """Returns `attempt()`, and tries again after an error that may be temporary."""
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
    The hash of an image that is drawn from a checkpoint with a fixed seed, in a process that has only the code of the
    checkpoint and an empty cache. `where` and `adapter` are ids on the Hub or absolute paths of folders.

    Raises:
        RuntimeError: If the checkpoint does not load or draw within ten minutes.
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
            raise RuntimeError("no image was drawn within ten minutes") from error
    if done.returncode:
        raise RuntimeError((done.stderr.strip() or f"status {done.returncode}").splitlines()[-1])
    return done.stdout.split()[-1]
