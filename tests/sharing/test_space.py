"""`push --space`: the files of a Space, and the page that they show by themselves."""

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from demo_cases import CHECKPOINTS
from packaging.requirements import Requirement
from PIL import Image
from safetensors.torch import save_file

from hf_genmod.__main__ import main
from hf_genmod.sharing.facts import Facts
from hf_genmod.sharing.push import PushError
from hf_genmod.sharing.space import check_space, push_space, space_requirements, write_space

pytest.importorskip("gradio", reason="a Space needs the extra [demo]")
HEAD = "https://hub"


def without_proof(monkeypatch):
    """For the model, which takes seconds and has tests of its own."""
    monkeypatch.setattr("hf_genmod.sharing.push.sample_without_package", lambda where, **options: "sha256:0")


@pytest.fixture
def run(tmp_path):
    def make(kind="guided"):
        folder = tmp_path / f"run-{kind}"
        CHECKPOINTS[kind]().save_pretrained(folder)
        return folder

    return make


def test_the_command_pushes_a_model_and_a_space_that_shows_it(run, hub, monkeypatch, capsys):
    without_proof(monkeypatch)
    repo_id = hub.new_repo_id()
    assert main(["push", str(run()), repo_id, "--license", "mit", "--space"]) == 0
    assert f"/spaces/{repo_id} shows a page for it" in capsys.readouterr().out
    files, commit = hub.files(repo_id, "space"), hub.repos["models", repo_id].at("main").sha
    assert f"DemoModel({repo_id!r}, revision={commit!r})" in files["app.py"].decode()
    head = yaml.safe_load(files["README.md"].decode().split("---")[1])
    assert (head["sdk"], head["app_file"], head["models"], head["license"]) == ("gradio", "app.py", [repo_id], "mit")
    assert head["thumbnail"].endswith(f"/spaces/{repo_id}/resolve/main/picture.png")
    assert len(head["short_description"]) <= 60
    assert Image.open(io.BytesIO(files["picture.png"])).size > (96, 96)
    assert len(list(hub.repos["spaces", repo_id].at("main").history())) == 2  # one commit after the first


@pytest.mark.slow
def test_the_folder_of_a_space_runs_by_itself(run, hub, monkeypatch, tmp_path):
    """From its own source, with a model of the Hub."""
    import httpx

    without_proof(monkeypatch)
    repo_id, place = hub.new_repo_id(), tmp_path / "space"
    main(["push", str(run()), repo_id, "--license", "mit", "--space"])
    for name, content in hub.files(repo_id, "space").items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(content)
    source = "import hf_genmod; print(hf_genmod.__file__)"
    found = subprocess.run([sys.executable, "-c", source], cwd=place, capture_output=True, text=True, timeout=60)
    assert Path(found.stdout.strip()) == place / "hf_genmod" / "__init__.py"
    port = _free_port()
    environment = {**os.environ, "GRADIO_SERVER_PORT": str(port), "HF_HOME": str(tmp_path / "cache")}
    process = subprocess.Popen([sys.executable, "app.py"], cwd=place, env=environment, stderr=subprocess.PIPE)
    try:
        with httpx.Client(transport=httpx.HTTPTransport(retries=0), base_url=f"http://127.0.0.1:{port}") as client:
            page = _answer(client, process)
        assert repo_id in page
    finally:
        process.kill()
        process.communicate()


def _free_port():
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _answer(client, process) -> str:
    """The page, as soon as it is there."""
    import httpx

    while process.poll() is None:
        try:
            return client.get("/").text
        except httpx.TransportError:
            try:
                process.wait(0.2)
            except subprocess.TimeoutExpired:
                pass
    raise AssertionError(process.stderr.read().decode())


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_every_kind_of_model_has_a_space_with_a_picture(kind, run, tmp_path):
    facts = Facts.read(run(kind))
    (tmp_path / "space").mkdir()
    write_space(facts, tmp_path / "space", "user/mine", "1234", "mit", HEAD)
    names = {file.relative_to(tmp_path / "space").as_posix() for file in (tmp_path / "space").rglob("*")}
    assert {"app.py", "requirements.txt", "README.md", "picture.png", "hf_genmod/demo/page.js"} <= names
    assert not any("__pycache__" in name for name in names)
    compile((tmp_path / "space" / "app.py").read_text(encoding="utf-8"), "app.py", "exec")


def test_its_requirements_are_what_the_package_and_the_page_need_in_these_versions():
    option, *lines = space_requirements()
    assert option.startswith("--extra-index-url https://download.pytorch.org/whl/cpu  # ")
    assert {"torch", "diffusers", "gradio", "transformers"} <= {Requirement(line).name for line in lines}
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    assert not {"pytest", "ruff", "mkdocs-material"} & {Requirement(line).name for line in lines}


def test_a_pull_request_and_an_adapter_have_no_space(run, tmp_path):
    with pytest.raises(ValueError, match="space: it shows what a repository holds"):
        check_space(run(), create_pr=True)
    (tmp_path / "training_config.json").write_text('{"built_on": {"base model": "user/mine"}}', encoding="utf-8")
    save_file({"weight": torch.zeros(1)}, tmp_path / "pytorch_lora_weights.safetensors")
    with pytest.raises(ValueError, match="space: an adapter has no page of its own; leave out --space"):
        check_space(tmp_path)


def test_a_space_that_fails_says_how_to_go_on(run, hub, monkeypatch):
    repo_id, folder = hub.new_repo_id(), run()
    (folder / "README.md").write_text("---\nlicense: mit\n---\n", encoding="utf-8")
    hub.fail_next("POST /api/repos/create", 403)
    with pytest.raises(PushError, match=f"the Space of {repo_id} failed .*; again: hf_genmod push .* --space"):
        push_space(folder, repo_id, "1234")
