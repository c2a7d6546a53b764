"""The local Hub keeps the promises that the true client relies on; whatever else is tested with it rests on these."""

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
from huggingface_hub import HfApi, HfFileSystem, ModelCard, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from local_hub import LocalHub
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoTokenizer, PreTrainedTokenizerFast

httpx2 = pytest.importorskip("httpx2")  # what huggingface_hub is built on since 2.0

WEIGHTS = np.random.default_rng(0).bytes(300_000)


@pytest.fixture
def api(hub):
    return HfApi()


@pytest.fixture
def folder(tmp_path):
    """What a checkpoint looks like: text files, and weights that go to LFS, in a subfolder."""
    folder = tmp_path / "checkpoint"
    (folder / "unet").mkdir(parents=True)
    (folder / "README.md").write_text("---\nlicense: mit\ntags:\n- ddpm\n---\n# A model\n")
    (folder / "unet/config.json").write_text('{"x": 1}')
    (folder / "unet/weights.safetensors").write_bytes(WEIGHTS)
    return folder


@pytest.fixture
def repo_id(hub, api, folder):
    """A repository that holds `folder`."""
    repo_id = hub.new_repo_id("checkpoint")
    api.create_repo(repo_id)
    api.upload_folder(repo_id=repo_id, folder_path=folder)
    return repo_id


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def log(hub):
    return [f"{method} {path} {status}" for method, path, status in hub.requests]


def test_the_client_knows_no_other_hub_and_no_other_cache(hub, tmp_path):
    assert constants.ENDPOINT == hub.endpoint
    assert constants.HF_HOME == os.environ["HF_HOME"] != os.path.expanduser("~/.cache/huggingface")
    for cache in (constants.HF_HUB_CACHE, datasets.config.HF_DATASETS_CACHE, constants.HF_TOKEN_PATH):
        assert str(cache).startswith(constants.HF_HOME)
    environment = hub.environment(tmp_path)
    assert environment["HF_HOME"] == str(tmp_path) and "HF_HUB_OFFLINE" not in environment


def test_environment_leads_another_process_to_this_hub(hub, repo_id, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "elsewhere"))
    script = "import sys, huggingface_hub; print(huggingface_hub.hf_hub_download(sys.argv[1], 'unet/config.json'))"
    command = [sys.executable, "-c", script, repo_id]
    done = subprocess.run(command, env=hub.environment(tmp_path / "home"), capture_output=True, text=True, check=True)
    assert done.stdout.startswith(str(tmp_path / "home" / "hub"))
    assert not (tmp_path / "elsewhere").exists()


def test_a_stopped_hub_answers_no_more():
    with LocalHub() as hub:
        api = HfApi(endpoint=hub.endpoint, token=hub.token)
        api.create_repo("user/model")
        assert api.repo_exists("user/model")
    with pytest.raises(httpx2.TransportError):
        api.model_info("user/model")


def test_create_and_delete(hub, api):
    repo_id = hub.new_repo_id()
    assert not api.repo_exists(repo_id)
    url = api.create_repo(repo_id)
    assert (url.repo_id, url.repo_type, url.endpoint) == (repo_id, "model", hub.endpoint)
    assert list(hub.files(repo_id)) == [".gitattributes"]
    with pytest.raises(HfHubHTTPError, match="already created"):
        api.create_repo(repo_id)
    assert api.create_repo(repo_id, exist_ok=True).repo_id == repo_id
    assert api.create_repo(repo_id.split("/")[1], repo_type="dataset").repo_id == repo_id
    api.delete_repo(repo_id)
    assert not api.repo_exists(repo_id) and api.repo_exists(repo_id, repo_type="dataset")
    with pytest.raises(RepositoryNotFoundError):
        api.delete_repo(repo_id)
    api.delete_repo(repo_id, missing_ok=True)


@pytest.mark.parametrize("repo_type", ["model", "dataset"])
def test_what_is_uploaded_comes_back(hub, api, folder, tmp_path, repo_type):
    repo_id = hub.new_repo_id("round-trip")
    api.create_repo(repo_id, repo_type=repo_type)
    commit = api.upload_folder(repo_id=repo_id, folder_path=folder, repo_type=repo_type)
    expected = contents(folder) | {".gitattributes": hub.files(repo_id, repo_type)[".gitattributes"]}
    assert hub.files(repo_id, repo_type) == expected
    assert sorted(api.list_repo_files(repo_id, repo_type=repo_type)) == sorted(expected)
    assert contents(snapshot_download(repo_id, repo_type=repo_type)) == expected
    copy = snapshot_download(repo_id, repo_type=repo_type, local_dir=tmp_path, allow_patterns="unet/*")
    assert contents(f"{copy}/unet") == contents(folder / "unet")

    info = api.repo_info(repo_id, repo_type=repo_type, files_metadata=True)
    assert info.sha == commit.oid and info.card_data.license == "mit" and info.tags == ["ddpm"]
    sizes = {sibling.rfilename: (sibling.size, sibling.lfs is not None) for sibling in info.siblings}
    assert sizes["unet/weights.safetensors"] == (len(WEIGHTS), True)
    assert sizes["unet/config.json"] == (8, False)
    assert sum(line.startswith("PUT /lfs/") for line in log(hub)) == 1


def test_what_has_not_changed_is_not_sent_again(hub, api, repo_id, folder):
    before = api.model_info(repo_id).sha
    hub.requests.clear()
    assert api.upload_folder(repo_id=repo_id, folder_path=folder).oid == before
    assert not any("PUT" in line or "/commit/" in line for line in log(hub))


def test_old_revisions_branches_and_tags_stay_readable(hub, api, repo_id):
    old = api.model_info(repo_id).sha
    api.create_tag(repo_id, tag="v1")
    api.create_branch(repo_id, branch="fp16/half")
    api.upload_file(repo_id=repo_id, path_or_fileobj=b'{"x": 2}', path_in_repo="unet/config.json")
    for revision, expected in [(None, 2), (old, 1), ("v1", 1), ("fp16/half", 1)]:
        assert json.load(open(hf_hub_download(repo_id, "unet/config.json", revision=revision))) == {"x": expected}
    api.upload_file(repo_id=repo_id, path_or_fileobj=b"?", path_in_repo="a.txt", revision="fp16/half")
    assert "a.txt" in hub.files(repo_id, revision="fp16/half") and "a.txt" not in hub.files(repo_id)

    refs = api.list_repo_refs(repo_id)
    assert [ref.name for ref in refs.branches] == ["fp16/half", "main"]
    assert [(ref.name, ref.target_commit) for ref in refs.tags] == [("v1", old)]
    titles = [commit.title for commit in api.list_repo_commits(repo_id)]
    assert len(titles) == 3 and titles[-1] == "initial commit"
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_branch(repo_id, branch="fp16/half")
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_tag(repo_id, tag="v1")
    with pytest.raises(HfHubHTTPError, match="412"):
        api.upload_file(repo_id=repo_id, path_or_fileobj=b"", path_in_repo="b.txt", parent_commit=old)


def test_pull_requests_leave_main_alone(hub, api, repo_id, folder):
    main = hub.files(repo_id)
    (folder / "unet/weights.safetensors").write_bytes(WEIGHTS[::-1])
    first = api.upload_folder(repo_id=repo_id, folder_path=folder, create_pr=True)
    guest = HfApi(token=hub.guest_token)
    second = guest.upload_file(repo_id=repo_id, path_or_fileobj=b"\0\1", path_in_repo="x.bin", create_pr=True)
    assert (first.pr_revision, second.pr_revision, second.pr_num) == ("refs/pr/1", "refs/pr/2", 2)
    assert hub.files(repo_id) == main
    assert hub.files(repo_id, revision="refs/pr/1") == main | {"unet/weights.safetensors": WEIGHTS[::-1]}
    assert hub.files(repo_id, revision="refs/pr/2") == main | {"x.bin": b"\0\1"}
    path = hf_hub_download(repo_id, "unet/weights.safetensors", revision="refs/pr/1")
    assert open(path, "rb").read() == WEIGHTS[::-1]
    api.upload_file(repo_id=repo_id, path_or_fileobj=b"more", path_in_repo="more.txt", revision="refs/pr/1")
    assert HfFileSystem().cat_file(f"{repo_id}@refs/pr/1/more.txt") == b"more"


def test_delete_file_and_folder(hub, api, repo_id):
    api.delete_file("README.md", repo_id)
    assert sorted(hub.files(repo_id)) == [".gitattributes", "unet/config.json", "unet/weights.safetensors"]
    with pytest.raises(EntryNotFoundError):
        api.delete_file("README.md", repo_id)
    api.delete_folder("unet", repo_id)
    assert list(hub.files(repo_id)) == [".gitattributes"]


def test_unknown_revision_entry_and_repository(hub, api, repo_id):
    assert api.file_exists(repo_id, "README.md") and not api.file_exists(repo_id, "absent.txt")
    assert not api.file_exists(repo_id, "README.md", revision="absent")
    assert api.revision_exists(repo_id, "main") and not api.revision_exists(repo_id, "absent")
    with pytest.raises(EntryNotFoundError):
        hf_hub_download(repo_id, "absent.txt")
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree(repo_id, "absent"))
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download(repo_id, "README.md", revision="absent")
    with pytest.raises(RevisionNotFoundError):
        snapshot_download(repo_id, revision="absent")
    for token in (None, False):
        with pytest.raises(RepositoryNotFoundError):
            hf_hub_download("user/absent", "README.md", token=token)
        with pytest.raises(RepositoryNotFoundError):
            api.upload_file(repo_id="user/absent", path_or_fileobj=b"", path_in_repo="x", token=token)


def test_trees_and_paths(hub, api, repo_id, monkeypatch):
    (entry,) = api.get_paths_info(repo_id, ["unet/weights.safetensors", "absent"], expand=True)
    assert entry.size == entry.lfs.size == len(WEIGHTS) and entry.last_commit.oid == api.model_info(repo_id).sha
    shallow = [(type(each).__name__, each.path) for each in api.list_repo_tree(repo_id)]
    assert shallow == [("RepoFile", ".gitattributes"), ("RepoFile", "README.md"), ("RepoFolder", "unet")]
    complete = api.list_repo_files(repo_id)
    monkeypatch.setattr(hub, "page_size", 2)
    hub.requests.clear()
    assert api.list_repo_files(repo_id) == complete
    assert len(hub.requests) == 3  # five entries, the folder included
    assert [each.path for each in api.list_repo_tree(repo_id, "unet")] == [
        "unet/config.json",
        "unet/weights.safetensors",
    ]


def test_ranges(hub, repo_id):
    url = f"{hub.endpoint}/{repo_id}/resolve/main/unet/weights.safetensors"
    for asked, expected in [("0-9", WEIGHTS[:10]), ("299990-", WEIGHTS[-10:]), ("-5", WEIGHTS[-5:])]:
        response = httpx2.get(url, headers={"Range": f"bytes={asked}"})
        assert (response.status_code, response.content) == (206, expected)
        assert response.headers["Content-Range"].endswith("/300000")
    assert httpx2.get(url, headers={"Range": "bytes=300000-"}).status_code == 416
    with HfFileSystem().open(f"{repo_id}/unet/weights.safetensors", block_size=1000) as file:
        file.seek(150_000)
        assert file.read(10) == WEIGHTS[150_000:150_010]


def test_private_and_gated_repositories_ask_who_you_are(hub, api):
    repo_id = hub.new_repo_id("private")
    api.create_repo(repo_id, private=True)
    api.upload_file(repo_id=repo_id, path_or_fileobj=b"secret", path_in_repo="x.txt")
    assert api.model_info(repo_id).private
    for token in (False, hub.guest_token):
        assert not api.repo_exists(repo_id, token=token)
        with pytest.raises(RepositoryNotFoundError):
            hf_hub_download(repo_id, "x.txt", token=token)
    api.update_repo_settings(repo_id, private=False, gated="manual")
    for token, status in [(False, 401), (hub.guest_token, 403)]:
        assert api.repo_exists(repo_id, token=token)
        with pytest.raises(GatedRepoError) as error:
            hf_hub_download(repo_id, "x.txt", token=token)
        assert error.value.response.status_code == status
        with pytest.raises(GatedRepoError):
            api.auth_check(repo_id, token=token)
    assert open(hf_hub_download(repo_id, "x.txt")).read() == "secret"


def test_tokens_carry_permissions(hub, api, repo_id):
    assert api.whoami()["name"] == "user" and api.whoami(token=hub.guest_token)["name"] == "guest"
    api.auth_check(repo_id, write=True)
    assert api.create_repo(hub.new_repo_id().replace("user/", "org/")).namespace == "org"
    for token, status in [(hub.guest_token, 403), (False, 401), ("hf_revoked", 401)]:
        with pytest.raises(HfHubHTTPError) as error:
            api.upload_file(repo_id=repo_id, path_or_fileobj=b"", path_in_repo="x", token=token)
        assert error.value.response.status_code == status
        assert not isinstance(error.value, RepositoryNotFoundError)
    with pytest.raises(HfHubHTTPError, match="403"):
        api.create_repo("someone-else/model")


def test_model_card(hub, api):
    repo_id = hub.new_repo_id("card")
    api.create_repo(repo_id)
    card = ModelCard("---\nlibrary_name: diffusers\npipeline_tag: text-to-image\n---\nHi")
    card.validate()
    card.push_to_hub(repo_id)
    assert ModelCard.load(repo_id).data.to_dict() == card.data.to_dict()
    info = api.model_info(repo_id)
    assert (info.library_name, info.pipeline_tag) == ("diffusers", "text-to-image")
    with pytest.raises(ValueError, match="library_name"):
        ModelCard("---\nlibrary_name: [1]\n---\n").push_to_hub(repo_id)
    for readme in (b"---\ntags: [1]\n---\n", b"---\nmodel-index:\n- results: [{}]\n---\n", b"---\n{\n---\n"):
        with pytest.raises(ValueError, match="Invalid metadata in README.md"):
            api.upload_file(repo_id=repo_id, path_or_fileobj=readme, path_in_repo="README.md")
    with pytest.warns(UserWarning, match="empty or missing yaml"):
        api.upload_file(repo_id=repo_id, path_or_fileobj=b"# No metadata", path_in_repo="README.md")


@pytest.fixture(scope="module")
def pipeline():
    torch.manual_seed(0)
    widths = {"block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1}
    blocks = {"down_block_types": ("DownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "UpBlock2D")}
    unet = UNet2DModel(sample_size=8, attention_head_dim=None, add_attention=False, **widths, **blocks)
    return DDPMPipeline(unet, DDPMScheduler())


def test_diffusers_pushes_and_loads(hub, pipeline):
    repo_id = hub.new_repo_id("ddpm")
    pipeline.push_to_hub(repo_id, private=True)
    assert {"model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors"} <= set(
        hub.files(repo_id)
    )
    loaded = DiffusionPipeline.from_pretrained(repo_id)
    assert type(loaded) is DDPMPipeline
    unet = UNet2DModel.from_pretrained(repo_id, subfolder="unet")
    for name, parameter in pipeline.unet.state_dict().items():
        assert torch.equal(parameter, loaded.unet.state_dict()[name])
        assert torch.equal(parameter, unet.state_dict()[name])


def test_diffusers_loads_shards(hub, api, pipeline, tmp_path):
    repo_id = hub.new_repo_id("shards")
    pipeline.unet.save_pretrained(tmp_path / "unet", max_shard_size="20KB")
    api.create_repo(repo_id)
    api.upload_folder(repo_id=repo_id, folder_path=tmp_path)
    assert sum(name.endswith(".safetensors") for name in hub.files(repo_id)) > 1
    loaded = UNet2DModel.from_pretrained(repo_id, subfolder="unet")
    for name, parameter in pipeline.unet.state_dict().items():
        assert torch.equal(parameter, loaded.state_dict()[name])


def test_diffusers_runs_code_of_the_repository(hub, api):
    repo_id = hub.new_repo_id("remote-code")
    code = b"""from diffusers import DiffusionPipeline
class Sevenfold(DiffusionPipeline):
    def __init__(self):
        super().__init__()
    def __call__(self, x):
        return 7 * x
"""
    index = json.dumps({"_class_name": ["sevenfold", "Sevenfold"], "_diffusers_version": "0.42.1"}).encode()
    api.create_repo(repo_id)
    for name, content in (("sevenfold.py", code), ("model_index.json", index)):
        api.upload_file(repo_id=repo_id, path_or_fileobj=content, path_in_repo=name)
    assert DiffusionPipeline.from_pretrained(repo_id, trust_remote_code=True)(6) == 42


def test_transformers_pushes_and_loads(hub):
    repo_id = hub.new_repo_id("tokenizer")
    words = Tokenizer(WordLevel({"[UNK]": 0, "a": 1, "cat": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").push_to_hub(repo_id)
    assert AutoTokenizer.from_pretrained(repo_id)("a cat purrs").input_ids == [1, 2, 0]


def test_datasets_pushes_and_loads(hub, api, tmp_path):
    repo_id = hub.new_repo_id("data")
    data = datasets.Dataset.from_dict({"label": [2, 0, 1], "caption": ["a", "b", "c"]})
    data.push_to_hub(repo_id)
    assert datasets.load_dataset(repo_id, split="train").to_dict() == data.to_dict()
    streamed = datasets.load_dataset(repo_id, split="train", streaming=True)
    assert list(streamed) == data.to_list()

    repo_id = hub.new_repo_id("parquet")
    data.to_parquet(tmp_path / "data.parquet")
    api.create_repo(repo_id, repo_type="dataset")
    where = {"path_or_fileobj": tmp_path / "data.parquet", "path_in_repo": "data/train-00000-of-00001.parquet"}
    api.upload_file(repo_id=repo_id, repo_type="dataset", **where)
    assert datasets.load_dataset(repo_id, split="train").to_dict() == data.to_dict()
    with pytest.raises(datasets.exceptions.DatasetNotFoundError):
        datasets.load_dataset("user/absent")


def test_datasets_loads_a_folder_of_images(hub, api, tmp_path):
    repo_id = hub.new_repo_id("pictures")
    for split, labels in (("train", "cat dog dog"), ("test", "cat")):
        for i, label in enumerate(labels.split()):
            path = tmp_path / split / label / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (4, 4), (i, 0, 0)).save(path)
    api.create_repo(repo_id, repo_type="dataset")
    api.upload_folder(repo_id=repo_id, repo_type="dataset", folder_path=tmp_path)
    loaded = datasets.load_dataset(repo_id)
    assert {split: rows.num_rows for split, rows in loaded.items()} == {"train": 3, "test": 1}
    assert loaded["train"].features["label"].names == ["cat", "dog"]
    found = {(row["image"].getpixel((0, 0))[0], row["label"]) for row in loaded["train"]}
    assert found == {(0, 0), (1, 1), (2, 1)}


def test_the_client_survives_what_it_promises_to_survive(hub, api, repo_id, folder, monkeypatch):
    """An overloaded server, a body that stops halfway, a connection that is reset: the client tries again."""
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)  # it can resume from a complete chunk only
    hub.requests.clear()
    hub.fail_next("HEAD .*/resolve/main/unet/weights", 503)
    hub.fail_next("GET .*/resolve/main/unet/weights", "cut")
    assert open(hf_hub_download(repo_id, "unet/weights.safetensors"), "rb").read() == WEIGHTS
    methods_and_status = [(method, status) for method, _, status in hub.requests]
    assert methods_and_status == [("HEAD", 503), ("HEAD", 200), ("GET", 200), ("GET", 206)]

    faults = [hub.fail_next("PUT /lfs/", 500), hub.fail_next("POST .*/preupload/", "reset")]
    (folder / "unet/weights.safetensors").write_bytes(WEIGHTS[:-1])
    api.upload_folder(repo_id=repo_id, folder_path=folder)
    assert hub.files(repo_id)["unet/weights.safetensors"] == WEIGHTS[:-1]
    assert [fault.left for fault in faults] == [0, 0]


def test_a_commit_is_never_sent_twice(hub, api, repo_id):
    """Its answer may have been lost after the work was done, so the client leaves it to the caller."""
    hub.fail_next("POST .*/commit/main", 500)
    with pytest.raises(HfHubHTTPError, match="500"):
        api.upload_file(repo_id=repo_id, path_or_fileobj=b"1", path_in_repo="a.txt")
    assert "a.txt" not in hub.files(repo_id)
    hub.fail_next("POST .*/commit/main", "lost")
    with pytest.raises(httpx2.TransportError):
        api.upload_file(repo_id=repo_id, path_or_fileobj=b"1", path_in_repo="a.txt")
    assert hub.files(repo_id)["a.txt"] == b"1"


def test_slow_answers(hub, repo_id):
    hub.fail_next("GET .*/resolve/main/unet/weights", "slow", seconds=0.5)
    assert open(hf_hub_download(repo_id, "unet/weights.safetensors"), "rb").read() == WEIGHTS
    hub.fail_next("HEAD .*/resolve/main/README", "slow", seconds=20)
    assert hf_hub_download(repo_id, "README.md", etag_timeout=0.2)
    hub.fail_next("HEAD .*/resolve/main/README", "slow", seconds=20)
    assert hf_hub_download(repo_id, "README.md", etag_timeout=0.2)  # from the cache


def test_faults_are_checked_and_cleared(hub):
    with pytest.raises(ValueError, match="'explode'"):
        hub.fail_next("GET", "explode")
    other = LocalHub()
    other.fail_next("GET")
    other.clear()
    assert other.faults == other.requests == [] and other.repos == {}
