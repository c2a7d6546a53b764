"""A Space: the page of a model on the Hub, as a folder that also runs by itself."""

import importlib.metadata
import json
import os
import re
import shlex
import shutil
import tempfile
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from packaging.requirements import Requirement

import hf_genmod
from hf_genmod.drawing.grids import grid
from hf_genmod.sharing.facts import Facts
from hf_genmod.sharing.loading import load_pipeline
from hf_genmod.sharing.model_card import license_of
from hf_genmod.sharing.push import PushError, reason_of, retried

PACKAGE = Path(hf_genmod.__file__).parent
KINDS = (".py", ".css", ".js", ".md", ".typed")  # of the package's files
PICTURES = ("samples.png", "reconstructions.png", "evaluation/enlarged.png")

_APP = '''"""
The page of {model}. After `pip install -r requirements.txt`, `python app.py` shows it at http://127.0.0.1:7860/, too.
"""

import os

from {package}.demo.model import DemoModel
from {package}.demo.server import serve

model = DemoModel({model!r}, revision={revision!r})
page = serve(
    model,
    port=int(os.environ.get("GRADIO_SERVER_PORT", 7860)),
    host=os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"),  # a Space sets both
)
page.block_thread()
'''

_README = """---
{metadata}
---

# {title}

A page on which to draw with [{model}]({link}).

![Images by the model](picture.png)

`app.py` loads the model from the Hub. `hf_genmod/` is the package of that name, {version}, under the licence
Apache 2.0. The same page on your own machine, with the files of this folder:

    pip install -r requirements.txt
    python app.py
"""


def space_requirements() -> list[str]:
    """What a Space installs: what the package and its page need, in the versions that are installed here.

    Raises:
        ValueError: If Gradio is not installed.
    """
    lines = ["--extra-index-url https://download.pytorch.org/whl/cpu  # on a GPU, delete this line"]
    for text in importlib.metadata.requires("hf_genmod") or []:
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": "demo"}):
            try:
                version = importlib.metadata.version(requirement.name)
            except importlib.metadata.PackageNotFoundError as error:
                remedy = 'install the page by `pip install "hf_genmod[demo]"`'
                raise ValueError(f"space: it runs {requirement.name}, which is not here; {remedy}") from error
            lines.append(f"{requirement.name}=={version.partition('+')[0]}")
    return lines


def check_space(path: str | os.PathLike, create_pr: bool = False) -> Facts:
    """The facts of a run that a Space can show. Raises a `ValueError` if it can not, before anything is uploaded."""
    facts = Facts.read(path)
    if facts.base is not None:
        raise ValueError("space: an adapter has no page of its own; leave out --space")
    if create_pr:
        raise ValueError("space: it shows what a repository holds, and a pull request is not yet in it; leave out one")
    space_requirements()
    return facts


def write_space(facts: Facts, folder: Path, model: str, revision: str, license: str, endpoint: str) -> None:
    """
    Writes the files of a Space into an empty folder.

    Args:
        facts ([`Facts`]): Those of the run, for the picture.
        folder (`Path`): Where the files go.
        model (`str`): The id of the model on the Hub.
        revision (`str`): Its commit.
        license (`str`): Its licence.
        endpoint (`str`): The address of the Hub.

    Raises:
        ValueError: If Gradio is not installed.
    """
    title = re.sub(r"[^\w .-]", " ", model.split("/")[-1])
    metadata = {
        "title": title,
        "emoji": "🎨",
        "colorFrom": "yellow",
        "colorTo": "red",
        "sdk": "gradio",
        "sdk_version": importlib.metadata.version("gradio"),
        "python_version": "3.11",
        "app_file": "app.py",
        "license": license,
        "models": [model],
        "tags": ["hf_genmod", "diffusers"],
        "thumbnail": f"{endpoint}/spaces/{model}/resolve/main/picture.png",
        "short_description": "Draw with a model in the browser"[:60],
    }
    lines = "\n".join(f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in metadata.items())
    texts = {
        "app.py": _APP.format(package=hf_genmod.__name__, model=model, revision=revision),
        "requirements.txt": "\n".join(space_requirements()) + "\n",
        "README.md": _README.format(
            metadata=lines, title=title, model=model, link=f"{endpoint}/{model}", version=hf_genmod.__version__
        ),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8", newline="\n")
    shown = [name for name in facts.figures(shared=True) if name in PICTURES]
    if shown:
        shutil.copyfile(facts.folder / shown[0], folder / "picture.png")
    else:
        pipeline = load_pipeline(facts.folder)
        grid([pipeline(**pipeline.example_request()).images]).save(folder / "picture.png")
    for file in PACKAGE.rglob("*"):
        if file.suffix in KINDS and "__pycache__" not in file.parts and "examples" not in file.parts:
            place = folder / "hf_genmod" / file.relative_to(PACKAGE)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, place)


def push_space(
    path: str | os.PathLike,
    repo_id: str,
    revision: str,
    private: bool | None = None,
    token: str | None = None,
) -> str:
    """
    Makes a Space of the name of a model that is on the Hub, with a page for it, in one commit. It carries the source
    of this package, and installs the versions that are installed here. Returns its address.

    Args:
        path (`str` or `os.PathLike`): The folder of the run.
        repo_id (`str`): The id of the model.
        revision (`str`): The commit of the model that the page loads.
        private (`bool`, *optional*): Whether a new Space is private. To load a private model, it needs a secret
            `HF_TOKEN`.
        token (`str`, *optional*): By default that of the login.

    Raises:
        ValueError: If the run is an adapter, or Gradio is not installed.
        PushError: If the upload failed.
    """
    api, facts = HfApi(token=token), check_space(path)
    with tempfile.TemporaryDirectory() as place:
        write_space(facts, Path(place), repo_id, revision, license_of(facts.folder), api.endpoint)
        files = sorted(file for file in Path(place).rglob("*") if file.is_file())

        def create():
            return api.create_repo(repo_id, repo_type="space", space_sdk="gradio", private=private, exist_ok=True)

        def commit():
            added = [CommitOperationAdd(file.relative_to(place).as_posix(), file) for file in files]
            message = f"Show {repo_id} at {revision[:8]}"
            return api.create_commit(repo_id, added, commit_message=message, repo_type="space")

        try:
            url = retried(create)
            retried(commit)
        except Exception as error:  # the model is pushed; the same command goes on from there
            again = shlex.join(["hf_genmod", "push", str(facts.folder.resolve()), repo_id, "--space"])
            raise PushError(f"the Space of {repo_id} failed ({reason_of(error, token)}); again: {again}") from error
    return str(url)
