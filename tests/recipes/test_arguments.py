import dataclasses
import json
import re

import pytest

from hf_genmod.recipes.arguments import SharingArguments, parse_arguments
from hf_genmod.recipes.networks import ModelArguments
from hf_genmod.recipes.pictures import DataArguments
from hf_genmod.training.config import TrainingConfig


def test_flags_override_the_file_which_overrides_the_defaults(tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text("dataset: mine\nmax_train_steps: 7\nlearning_rate: 1e-4\nblock_out_channels: [16, 32]\n")
    argv = ["--config", str(file), "--dataset", str(tmp_path), "--horizontal_flip"]
    data, model, config = parse_arguments(DataArguments, ModelArguments, TrainingConfig, argv=argv)
    assert data == DataArguments(dataset=str(tmp_path))
    assert model == ModelArguments(block_out_channels=[16, 32])
    assert config == TrainingConfig(max_train_steps=7, learning_rate=1e-4, horizontal_flip=True)


def test_what_a_run_writes_down_is_a_settings_file(tmp_path):
    data, model = DataArguments(resolution="16x8"), ModelArguments(block_out_channels=[8, 16], learn_variance=True)
    config = TrainingConfig(max_train_steps=3, ema_length=0.1)
    sections = {"data": dataclasses.asdict(data), "model": dataclasses.asdict(model)}
    records = {"pictures": {"name": "shapes", "num_pictures": 3}, "built_on": {"autoencoder": "x"}, "depends_on": {}}
    written = {"training": dataclasses.asdict(config), "arguments": sections, **records}
    file = tmp_path / "training_config.json"
    file.write_text(json.dumps(written, indent=2))
    parsed = parse_arguments(DataArguments, ModelArguments, TrainingConfig, argv=["--config", str(file)])
    assert parsed == (data, model, config)


def test_a_run_by_the_settings_of_another_does_not_push_over_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_somebody")
    sharing = SharingArguments(license="mit", push_to_hub=True, hub_model_id="user/first")
    file = tmp_path / "training_config.json"
    file.write_text(json.dumps({"training": {}, "arguments": {"sharing": dataclasses.asdict(sharing)}}))
    (parsed,) = parse_arguments(SharingArguments, argv=["--config", str(file)])
    assert parsed == SharingArguments(license="mit")
    with pytest.raises(ValueError, match="hub_model_id: it is the repository for --push_to_hub"):
        parse_arguments(SharingArguments, argv=["--config", str(file), "--hub_model_id", "user/second"])


def test_parts_of_settings_that_hold_each_other_s_names_are_read(tmp_path):
    file = tmp_path / "settings.json"
    file.write_text(json.dumps({"a": {"hub_model_id": "x", "b": "y"}, "hub_model_id": {"c": "z"}, "b": {"seed": 1}}))
    with pytest.raises(ValueError, match="settings that .* does not have: hub_model_id, b, c; is the file for"):
        parse_arguments(TrainingConfig, argv=["--config", str(file)])


def test_a_data_set_that_is_not_there_is_told_before_a_missing_budget(tmp_path):
    (tmp_path / "photos").mkdir()
    for name in (str(tmp_path / "photo"), "../no/photos"):
        with pytest.raises(FileNotFoundError, match=f"^{name}: there is no such folder"):
            parse_arguments(DataArguments, TrainingConfig, argv=["--dataset", name])
    for name in (str(tmp_path / "photos"), "shapes"):
        with pytest.raises(ValueError, match="^a run needs a budget; give one, such as --max_train_minutes 30 "):
            parse_arguments(DataArguments, TrainingConfig, argv=["--dataset", name])


@pytest.mark.parametrize("text, message", [("a: [1", "not a YAML file"), ("- a\n- b", "it holds no settings; give")])
def test_a_file_that_holds_no_settings_is_named(tmp_path, text, message):
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=f"settings.yaml: {message}"):
        parse_arguments(TrainingConfig, argv=["--config", str(file)])


@pytest.mark.parametrize(
    "flag, hint",
    [
        ("--labels", r"did you mean --label_column\?"),
        ("--train_data_dir=x", r"did you mean --dataset\?"),
        ("--image-size", r"did you mean --resolution\?"),
        ("--epochs", "--help lists them"),  # which these dataclasses do not have
        ("--label_colum", r"did you mean --label_column\?"),
        ("--chunnels", r"did you mean --channels\?"),
        ("--foo", "--help lists them"),
    ],
)
def test_unknown_flags_are_taken_for_near_ones_and_for_those_of_other_scripts(flag, hint):
    with pytest.raises(ValueError, match=f"^{flag.split('=')[0]}: no such flag; {hint}$"):
        parse_arguments(DataArguments, argv=[flag])


@pytest.mark.parametrize(
    "argv, remedy",
    [
        (["pets"], "put its flag in front, such as --dataset pets"),
        (["pets", "--dataset", "x"], r"put its flag in front \(--help lists them\)"),
    ],
)
def test_a_word_without_a_flag_is_named_with_the_first_flag_that_is_not_given(argv, remedy):
    with pytest.raises(ValueError, match=f"^pets: belongs to no flag; {remedy}$"):
        parse_arguments(DataArguments, argv=argv)


def test_a_file_about_a_model_is_named(tmp_path):
    file = tmp_path / "model_index.json"
    file.write_text('{"_class_name": "UnconditionalPipeline", "unet": ["diffusers", "UNet2DModel"]}')
    with pytest.raises(ValueError, match="model_index.json: it describes a model, not a run; give .*training_config"):
        parse_arguments(TrainingConfig, argv=["--config", str(file)])


def test_an_unknown_setting_in_the_file_is_named(tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text("max_train_step: 7\n")
    with pytest.raises(ValueError, match=r"not have: max_train_step; did you mean max_train_steps\?"):
        parse_arguments(TrainingConfig, argv=["--config", str(file)])


@dataclasses.dataclass
class BaseArguments:
    """Base model.

    More words.
    """

    base: str = dataclasses.field(metadata={"help": "The base.", "may_change": True, "built_on": "base model"})
    parts: list[int] = dataclasses.field(default_factory=list, metadata={"help": "Some numbers."})
    rank: int = dataclasses.field(default=3, metadata={"help": "The rank."})


def test_help_has_the_example_on_top_and_a_group_for_each_dataclass(capsys):
    description = "Trains a model.\n\n    python train.py --base some/model\n"
    with pytest.raises(SystemExit) as ended:
        parse_arguments(DataArguments, BaseArguments, argv=["--help"], description=description)
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "\nTrains a model.\n\n    python train.py --base some/model\n" in text
    images, base = (text.index(f"\n{title}:\n") for title in ("Images", "Base model"))
    assert images < text.index("--dataset") < base < text.index("--rank")
    flags = {part.split()[0]: " ".join(part.split()) for part in text.split("\n  --")[1:]}
    assert flags["rank"].endswith("The rank. (default: 3)")
    assert flags["base"].endswith("The base.") and flags["parts"].endswith("Some numbers.")


def test_a_required_flag_may_stand_in_the_file(tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text("base: some/model\nparts: [1, 2]\n")
    (parsed,) = parse_arguments(BaseArguments, argv=["--config", str(file), "--rank", "5"])
    assert parsed == BaseArguments(base="some/model", parts=[1, 2], rank=5)
    with pytest.raises(ValueError, match="^the following arguments are required: --base; --help tells what flags"):
        parse_arguments(BaseArguments, argv=["--rank", "5"])
    file.write_text("base: some/model\nrank: many\n")
    with pytest.raises(ValueError, match="^--rank: invalid int value: 'many'; --help tells what flags take$"):
        parse_arguments(BaseArguments, argv=["--config", str(file)])
    with pytest.raises(ValueError, match="^--max_train_minutes: invalid float value: '5m'; --help"):
        parse_arguments(TrainingConfig, argv=["--max_train_minutes", "5m"])


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e999"])
@pytest.mark.parametrize("name", ["max_grad_norm", "max_train_minutes", "learning_rate"])
def test_a_number_that_is_not_finite_is_refused(name, value):
    given = [f"--{name}={value}"] + ["--max_train_steps=1"] * (name != "max_train_minutes")
    with pytest.raises(ValueError, match=f"{name}: -?(nan|inf) is not finite"):
        parse_arguments(TrainingConfig, argv=given)


def test_a_list_of_numbers_is_refused_if_one_is_not_finite():
    with pytest.raises(ValueError, match=r"fourier_frequencies: \[1.0, nan\] is not finite"):
        parse_arguments(ModelArguments, argv=["--fourier_frequencies", "1", "nan"])


@pytest.mark.parametrize("by_file", [True, False])
def test_a_tilde_in_a_path_is_the_home_folder_in_a_file_and_in_a_flag(tmp_path, monkeypatch, by_file):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "pets").mkdir()
    values = {"dataset": "~/pets", "output_dir": "~/runs/a", "vae": "~/runs/vae", "base": "~"}
    argv = ["--max_train_steps=1", *(f"--{name}={value}" for name, value in values.items())]
    if by_file:
        file = tmp_path / "settings.yaml"
        file.write_text("".join(f"{name}: {json.dumps(value)}\n" for name, value in values.items() if value != "~"))
        argv = ["--config=~/settings.yaml", "--max_train_steps=1", "--base=~"]
    parsed = parse_arguments(DataArguments, ModelArguments, TrainingConfig, BaseArguments, argv=argv)
    data, model, config, base = parsed
    found = [data.dataset, config.output_dir, model.vae, base.base]
    assert found == [str(tmp_path / path) for path in ("pets", "runs/a", "runs/vae", "")]
    assert TrainingConfig(output_dir="~/runs/b", max_train_steps=1).output_dir == str(tmp_path / "runs/b")


@pytest.mark.parametrize("text", ["a ~ b", "~ about a cat", "cat ~/x", "nobody~"])
def test_a_tilde_elsewhere_stays(text):
    (parsed,) = parse_arguments(BaseArguments, argv=["--base", text])
    assert parsed.base == text


@pytest.mark.parametrize("name, reason", [("nope.yaml", "No such file or directory"), ("", "Is a directory")])
def test_a_settings_file_that_cannot_be_read_is_named_with_its_flag(tmp_path, name, reason):
    with pytest.raises(ValueError, match=f"^config: {re.escape(str(tmp_path / name))} cannot be read .{reason}.$"):
        parse_arguments(TrainingConfig, argv=["--config", str(tmp_path / name)])
