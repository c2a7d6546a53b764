"""What is around every training script."""

import dataclasses

import pytest
from tiny import tiny_unet
from transformers.hf_argparser import HfArg

from hf_genmod import AncestralDDPMScheduler, DenoisingObjective, Trainer, TrainingConfig
from hf_genmod.data.loading import load_pictures
from hf_genmod.data.shapes import ShapesDataset
from hf_genmod.errors import TrainingError
from hf_genmod.processes import processes
from hf_genmod.recipes.arguments import SharingArguments
from hf_genmod.recipes.run import run as run_main


class TestRun:
    """With trainers that only note what they are told."""

    @dataclasses.dataclass
    class Arguments:
        """Numbers."""

        number: int = HfArg(default=1, help="A number.")

    @dataclasses.dataclass
    class OtherArguments:
        """Words."""

        word: str = HfArg(default="a", help="A word.")

    class Trainer:
        accelerator = processes()

        def __init__(self, config, log, error=None):
            self.config, self.log, self.error = config, log, error

        def open_run(self, arguments):
            self.log.append({name: dataclasses.asdict(value) for name, value in arguments.items()})

        def train(self):
            self.log.append("trained")
            if self.error is not None:
                raise self.error

    @pytest.fixture
    def log(self):
        return []

    @pytest.fixture
    def flags(self, tmp_path):
        return ["--output_dir", str(tmp_path / "run"), "--max_train_steps", "1", "--number", "5"]

    def test_records_all_arguments_but_the_training_config_by_name(self, log, flags):
        def main(first: self.Arguments, settings: TrainingConfig, second: self.OtherArguments):
            assert settings.max_train_steps == 1
            return self.Trainer(settings, log)

        run_main(main, flags)
        sharing = dataclasses.asdict(SharingArguments())
        assert log == [{"first": {"number": 5}, "second": {"word": "a"}, "sharing": sharing}, "trained"]

    def test_records_for_a_stage_what_it_names_as_it_is_then(self, log, flags):
        def main(first: self.Arguments, second: self.OtherArguments, shared: SharingArguments, config: TrainingConfig):
            yield self.Trainer(config, log), second
            log.append("between")
            first.number += 1
            yield self.Trainer(config, log)

        run_main(main, flags)
        shared = dataclasses.asdict(SharingArguments())
        all_of_them = {"first": {"number": 6}, "second": {"word": "a"}, "shared": shared}
        assert log == [{"second": {"word": "a"}, "shared": shared}, "trained", "between", all_of_them, "trained"]

    @pytest.mark.parametrize(
        "error, status", [(TrainingError("out of memory"), 1), (ValueError("a bug"), None), (KeyboardInterrupt(), 130)]
    )
    def test_an_error_of_the_training_ends_it(self, error, status, log, flags, capsys):
        def main(first: self.Arguments, config: TrainingConfig):
            yield self.Trainer(config, log, error)
            log.append("went on")

        with pytest.raises(ValueError if status is None else SystemExit) as ended:
            run_main(main, [*flags, "--license", "mit"])
        assert "went on" not in log
        if status is not None:
            assert ended.value.code == status
            assert capsys.readouterr().err == ("stopped\n" if status == 130 else "error: out of memory\n")

    def test_a_mistake_found_by_a_later_stage_is_one_sentence(self, log, flags, capsys):
        def main(first: self.Arguments, config: TrainingConfig):
            yield self.Trainer(config, log)
            raise ValueError("number: 5 is too many")

        with pytest.raises(SystemExit) as ended:
            run_main(main, flags)
        assert ended.value.code == 2 and capsys.readouterr().err == "error: number: 5 is too many\n"

    def test_parts_of_a_pipeline_that_do_not_fit_are_one_sentence_before_training(self, tmp_path, flags, capsys):
        def make_pipeline(unet):
            raise ValueError("classifier: it does not fit the diffusion model")

        def main(first: self.Arguments, config: TrainingConfig):
            pictures = load_pictures(ShapesDataset(8, resolution=16))
            return Trainer(tiny_unet(), DenoisingObjective(AncestralDDPMScheduler()), pictures, config, make_pipeline)

        with pytest.raises(SystemExit) as ended:
            run_main(main, [*flags, "--batch_size", "4"])
        assert ended.value.code == 2 and not (tmp_path / "run").exists()
        assert capsys.readouterr().err.endswith("error: classifier: it does not fit the diffusion model\n")

    def test_a_card_that_cannot_be_written_is_reported(self, log, flags, capsys, tmp_path):
        def main(first: self.Arguments, config: TrainingConfig):
            return self.Trainer(config, log)

        run_main(main, [*flags, "--license", "mit"])  # there is no checkpoint to write a card for
        captured = capsys.readouterr()
        assert captured.err.startswith("writing the card failed (FileNotFoundError: ")
        assert captured.out == f"{tmp_path / 'run'} is the checkpoint\n"

    def test_a_name_that_the_hub_does_not_know_is_refused_before_training(self, log, flags, capsys, monkeypatch):
        def main(first: self.Arguments, config: TrainingConfig):
            return self.Trainer(config, log)

        with pytest.raises(SystemExit) as ended:
            run_main(main, [*flags, "--license", "mit", "--push_to_hub", "--hub_model_id", "a b"])
        assert ended.value.code == 2 and log == [] and "'a b'" in capsys.readouterr().err
