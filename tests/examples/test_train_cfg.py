import pytest
from example_scripts import SMALL, error_of, run

from hf_genmod import load_pipeline


def test_training_on_a_folder_of_grey_class_folders_leaves_a_model_of_them(class_folders, tmp_path):
    done = run("train_cfg.py", "--dataset", class_folders, "--output_dir", tmp_path, "--max_train_steps", 3, *SMALL)
    assert done.returncode == 0, done.stderr
    pipe = load_pipeline(tmp_path)
    assert sorted(pipe.labels) == sorted(folder.name for folder in class_folders.iterdir())
    images = pipe(list(pipe.labels)[:2], num_inference_steps=2).images
    assert [(image.mode, image.size) for image in images] == [("L", (16, 16))] * 2

    again = run("train_cfg.py", "--dataset", class_folders, "--output_dir", tmp_path, "--max_train_steps", 4, *SMALL)
    assert again.returncode == 2
    assert "holds a different run (--max_train_steps was 3, is 4)" in again.stderr


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--max_train_steps", 1, "--dataset", "no/such/folder"], "no/such/folder: there is no such folder"),
        (["--max_train_steps", -1], "max_train_steps: -1 is not positive"),
        (["--max_train_steps", 1, "--max_train_minutes", 1], "a run has one budget"),
        (["--max_train_steps", 1, "--resolution", 30, "--block_out_channels", 48, 96, 128], "such as 24x24 or 32x32"),
        (["--max_train_steps", 1, "--weighting", "snr"], "weighting: 'snr' is not one of"),
        (["--max_train_steps", 1, "--license", "MIT License"], "license: 'MIT License' is not the name of a licence"),
        (["--max_train_steps", 1, "--push_to_hub"], "push_to_hub: a shared model needs a licence"),
        (
            ["--max_train_steps", 1, "--hub_model_id", "user/name"],
            "hub_model_id: it is the repository for --push_to_hub",
        ),
        (["--max_train_steps", 1, "--license", "mit", "--push_to_hub", "--hub_model_id", "a b"], "'a b'"),
        (["--datset", "shapes"], "error: --datset: no such flag; did you mean --dataset?"),
    ],
)
def test_mistakes_get_one_sentence_and_leave_nothing(arguments, message, class_folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["train_cfg.py", "--dataset", class_folders, "--output_dir", tmp_path / "run"]
    assert message in error_of(*command, *arguments)
    assert not list(tmp_path.iterdir())
