"""The Hub is asked for a data set or a model only if its name can be an id, and for a few seconds at most."""

import os
import socket
import subprocess
import sys

import datasets
import pytest
from huggingface_hub import HfApi
from made_images import coded, picture, pixels, rows

from hf_genmod.data.loading import load_pictures
from hf_genmod.hub import can_be_id


@pytest.mark.parametrize(
    "name", ["./x", "../x", "/x", "x/y/z", "~/x", "~nobody/x", "x\\y", "C:\\x", "x/", "a b", "x/.y"]
)
def test_paths_are_not_asked_for(hub, name):
    assert not can_be_id(name)
    with pytest.raises(FileNotFoundError, match="there is no such folder or file; (check|did you mean)"):
        load_pictures(name)
    assert not hub.requests


def test_an_unknown_name_is_asked_for_once(hub):
    with pytest.raises(
        FileNotFoundError, match="^user/picturs: there is no such folder, and the Hub has no such data"
    ):
        load_pictures("user/picturs")
    assert [exchange.path for exchange in hub.requests] == ["/api/datasets/user/picturs"]


@pytest.mark.parametrize("how", [503, "reset"])
def test_a_hub_that_fails_is_asked_once(hub, how):
    fault = hub.fail_next("/api/datasets/user/picturs", how, times=10)
    with pytest.raises(FileNotFoundError, match="^user/picturs: .*the Hub cannot be asked .*check the spelling"):
        load_pictures("user/picturs")
    assert fault.left == 9 and len(hub.requests) == 1


LOADERS = {
    "hf_genmod.data.loading:load_pictures": "user/picturs: there is no such folder",
    "hf_genmod:load_pipeline": "'user/picturs' is not a folder here",
    "hf_genmod:load_vae": "vae: 'user/picturs' is neither an autoencoder nor a checkpoint with one",
    "hf_genmod.recipes.pictures:DataArguments().load": "vae: 'user/picturs' is neither an autoencoder nor",
    "hf_genmod.training.text_encoder:load_text_encoder": "text_encoder: 'user/picturs' is no folder here",
    "hf_genmod.evaluation.features:PretrainedFeatures": "features: 'user/picturs' is no folder here",
}


def test_a_hub_that_never_answers_is_left():
    """Found out by another process, as the address of the Hub is read once. Its own timeout would be a hundred times
    as long."""
    source = """if True:
        import sys
        from importlib import import_module
        from hf_genmod import hub
        hub._SECONDS = 0.1
        for name in sys.argv[1:]:
            module, loader = name.split(":")
            try:
                eval(f"module.{loader}", {"module": import_module(module)})("user/picturs")
            except FileNotFoundError as error:
                print(error)"""
    with socket.create_server(("127.0.0.1", 0)) as server:  # connections wait here, and nobody accepts them
        environment = os.environ | {"HF_ENDPOINT": f"http://127.0.0.1:{server.getsockname()[1]}"}
        command = [sys.executable, "-c", source, *LOADERS]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    for printed, expected in zip(done.stdout.splitlines(), LOADERS.values(), strict=True):
        assert printed.startswith(expected)
        assert "the Hub cannot be asked (no answer in 0.1 seconds); check the spelling and the connection" in printed


def card_with_two(folder):
    """A data set of two configurations, one image each."""
    card = "---\nconfigs:\n"
    for name, seed in (("large", 1), ("small", 2)):
        data = rows([coded(picture(pixels(1, seed=seed)[0]))], label=(datasets.ClassLabel(names=["a"]), [0]))
        (folder / name).mkdir()
        data.to_parquet(folder / name / "train.parquet")
        card += f"- config_name: {name}\n  data_files: {name}/*.parquet\n"
    (folder / "README.md").write_text(card + "---\n")


@pytest.fixture(params=["folder", "hub"])
def two_configurations(request, tmp_path, hub):
    card_with_two(tmp_path)
    if request.param == "folder":
        return str(tmp_path)
    repo_id = hub.new_repo_id()
    HfApi().create_repo(repo_id, repo_type="dataset")
    HfApi().upload_folder(repo_id=repo_id, repo_type="dataset", folder_path=tmp_path)
    return repo_id


def test_several_configurations_are_listed_or_chosen(two_configurations):
    with pytest.raises(ValueError, match="has several configurations; choose one of large, small by --config_name"):
        load_pictures(two_configurations)
    with pytest.raises(ValueError, match="config_name: .* has no 'tiny'; it has large, small"):
        load_pictures(two_configurations, config_name="tiny")
    dataset = load_pictures(two_configurations, config_name="small")
    assert dataset[0]["images"].movedim(0, -1).tolist() == pixels(1, seed=2)[0].tolist()
