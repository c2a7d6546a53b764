"""A checkpoint opens with this package, and without it by its own code, and always draws the same images."""

import os
import shutil

import pytest
import torch
from bare_machine import BareMachine, fingerprint
from checkpoint_cases import NAMES, OURS, PACKAGE, PIPELINES, TEXT_PIPELINES, index_of
from diffusers import AutoencoderKL, AutoModel, DiffusionPipeline
from tiny import tiny_vae

from hf_genmod.checkpoints.bundle import bundle
from hf_genmod.models.image_model import COMPONENT
from hf_genmod.pipelines.autoencoder import AutoencoderPipeline
from hf_genmod.pipelines.classifier_free_guided import ClassifierFreeGuidedPipeline
from hf_genmod.pipelines.unconditional import UnconditionalPipeline

FAST = ("guided", "guided by a classifier in latent space", "upsampler", "variational autoencoder")


def of_each(kinds):
    """The kinds of pipelines as parameters, of which those are fast that together have every class."""
    return [pytest.param(kind, marks=[] if kind in FAST else pytest.mark.slow) for kind in kinds]


class TestEachWay:
    """From a folder and from the Hub, with this package and without, and again after load, save, load."""

    @pytest.fixture(params=of_each(PIPELINES))
    def pipeline(self, request):
        return PIPELINES[request.param]()

    @pytest.fixture
    def pictures(self, pipeline):
        return fingerprint(pipeline)

    def test_opens_with_the_installed_classes(self, pipeline, checkpoint, pictures):
        loaded = type(pipeline).from_pretrained(checkpoint)
        assert fingerprint(loaded) == pictures
        components = {name: type(component) for name, component in pipeline.components.items()}
        assert {name: type(component) for name, component in loaded.components.items()} == components
        assert any(component in OURS for component in components.values())

    def test_opens_by_its_own_code_where_nothing_is_installed(self, checkpoint, pictures, elsewhere):
        assert not elsewhere.imports("hf_genmod")
        assert elsewhere.draw(checkpoint) == pictures

    def test_opens_by_its_own_code_beside_the_package(self, pipeline, checkpoint, pictures, tmp_path):
        loaded = DiffusionPipeline.from_pretrained(checkpoint, trust_remote_code=True)
        for name, component in pipeline.components.items():
            if isinstance(component, OURS):
                assert type(loaded.components[name]).__module__.startswith("diffusers_modules.")
        assert fingerprint(loaded) == pictures
        loaded.save_pretrained(tmp_path / "again")
        assert fingerprint(DiffusionPipeline.from_pretrained(tmp_path / "again", trust_remote_code=True)) == pictures

    def test_passes_from_hand_to_hand(self, pipeline, checkpoint, pictures, elsewhere, tmp_path):
        here, there = type(pipeline).from_pretrained, elsewhere
        here(checkpoint).save_pretrained(tmp_path / "1")
        there.save_again(tmp_path / "1", tmp_path / "2")
        there.save_again(tmp_path / "2", tmp_path / "3")
        here(tmp_path / "3").save_pretrained(tmp_path / "4")
        for i in range(1, 5):
            assert fingerprint(here(tmp_path / str(i))) == pictures
            assert there.draw(tmp_path / str(i)) == pictures
            assert index_of(tmp_path / str(i)) == index_of(tmp_path / "1")

    def test_passes_from_hub_to_hub(self, pipeline, repo_id, pictures, elsewhere, hub):
        second, third = hub.new_repo_id(), hub.new_repo_id()
        elsewhere.push_again(repo_id, second)
        type(pipeline).from_pretrained(second).push_to_hub(third)
        assert fingerprint(type(pipeline).from_pretrained(third)) == pictures
        assert elsewhere.draw(third) == pictures
        ours = {path: data for path, data in hub.files(repo_id).items() if not path.endswith(".md")}
        assert {path: data for path, data in hub.files(third).items() if not path.endswith(".md")} == ours


class TestEachWayOfText(TestEachWay):
    @pytest.fixture(params=TEXT_PIPELINES)
    def pipeline(self, request):
        return TEXT_PIPELINES[request.param]()

    @pytest.fixture
    def elsewhere(self, elsewhere_with_transformers):
        return elsewhere_with_transformers

    def test_text_encoder_and_tokenizer_are_those_of_transformers(self, folder):
        index = index_of(folder)
        assert index["text_encoder"][0] == index["tokenizer"][0] == "transformers"
        assert [file.name for file in folder.glob("t*/*.py")] == ["component.py"]


def test_opens_with_the_package_where_transformers_is_not_installed(folder, pipeline, hub, tmp_path):
    with BareMachine(hub.environment(tmp_path / "home"), absent=["transformers", "peft", "accelerate"]) as machine:
        assert machine.imports("hf_genmod")
        assert not machine.imports("transformers")
        assert machine.draw_with_the_package(folder) == fingerprint(pipeline)


class TestShippedCode:
    def test_is_that_of_this_package(self, folder):
        copies = {str(file.relative_to(folder)): file.read_text(encoding="utf-8") for file in folder.rglob("*.py")}
        assert copies == {
            "classifier_free_guided.py": bundle(PACKAGE / "pipelines/classifier_free_guided.py"),
            "unet/denoising_unet.py": bundle(PACKAGE / "models/denoising_unet.py"),
            "unet/component.py": COMPONENT,
            "scheduler/ancestral_ddpm.py": bundle(PACKAGE / "schedulers/ancestral_ddpm.py"),
        }

    def test_of_two_versions_each_pipeline_keeps_its_own(self, folder, elsewhere, tmp_path):
        other = tmp_path / "other"
        shutil.copytree(folder, other)
        for file in {*other.rglob("*.py")} - {other / "unet/component.py"}:  # whose text is in denoising_unet.py
            file.write_text(file.read_text() + "\n# another version\n")
        elsewhere.load_both_then_save_the_first(folder, other, tmp_path / "first")
        elsewhere.load_both_then_save_the_first(other, folder, tmp_path / "second")
        for file in folder.rglob("*.py"):
            path = file.relative_to(folder)
            assert (tmp_path / "first" / path).read_text() == file.read_text()
            assert (tmp_path / "second" / path).read_text() == (other / path).read_text()


class TestWhatIsSaved:
    def test_names_files_and_classes_beside_the_weights(self, folder):
        assert index_of(folder) == {
            "_class_name": ["classifier_free_guided", "ClassifierFreeGuidedPipeline"],
            "_diffusers_version": index_of(folder)["_diffusers_version"],
            "unet": ["denoising_unet", "DenoisingUNet2DModel"],
            "scheduler": ["ancestral_ddpm", "AncestralDDPMScheduler"],
            "auto_map": {"AutoModel": "component.Component"},
            "vae": [None, None],
            "guiding_unet": [None, None],
            "value_range": None,
            "defaults": None,
            "consistent": False,
            "id2label": {"0": "cat", "1": "dog", "2": "lizard"},
            "process": {
                "prediction_type": "epsilon", "num_train_timesteps": 1000, "beta_schedule": "linear",
                "beta_start": 0.0001, "beta_end": 0.02, "trained_betas": None, "rescale_betas_zero_snr": False,
            },
        }  # fmt: skip

    def test_tells_nobody_where_it_was_loaded_from(self, tmp_path, elsewhere):
        PIPELINES["in latent space"]().save_pretrained(tmp_path / "checkpoint")
        UnconditionalPipeline.from_pretrained(tmp_path / "checkpoint").save_pretrained(tmp_path / "here")
        elsewhere.save_again(tmp_path / "checkpoint", tmp_path / "there")
        for again in (tmp_path / "here", tmp_path / "there"):
            for file in again.rglob("*.json"):
                assert str(tmp_path) not in file.read_text(), file
                assert "_name_or_path" not in file.read_text(), file

    def test_numbers_of_labels_stay_numbers(self, checkpoint):
        loaded = ClassifierFreeGuidedPipeline.from_pretrained(checkpoint)
        assert loaded.config.id2label == NAMES
        assert loaded.labels == {"cat": 0, "dog": 1, "lizard": 2}

    def test_saving_twice_writes_the_same(self, folder, tmp_path):
        ClassifierFreeGuidedPipeline.from_pretrained(folder).save_pretrained(tmp_path / "again")
        first, again = (
            {str(file.relative_to(root)): file.read_bytes() for file in root.rglob("*") if file.is_file()}
            for root in (folder, tmp_path / "again")
        )
        assert first == again

    def test_a_compiled_model_is_saved_as_itself(self, pipeline, tmp_path):
        expected = fingerprint(pipeline)
        pipeline.unet = torch.compile(pipeline.unet)
        pipeline.save_pretrained(tmp_path)
        assert fingerprint(ClassifierFreeGuidedPipeline.from_pretrained(tmp_path)) == expected

    def test_save_pretrained_can_push(self, pipeline, hub, tmp_path):
        repo_id = hub.new_repo_id()
        pipeline.save_pretrained(str(tmp_path), push_to_hub=True, repo_id=repo_id)
        assert fingerprint(ClassifierFreeGuidedPipeline.from_pretrained(repo_id)) == fingerprint(pipeline)


class TestAutoModel:
    """`AutoModel` of diffusers loads each model of a checkpoint."""

    @pytest.fixture(
        params=["guided by a classifier in latent space", "in latent space"]  # of this package, and of diffusers
        + [pytest.param(name, marks=pytest.mark.slow) for name in (*PIPELINES, "CLIP")]
    )
    def pipeline(self, request):
        return (PIPELINES | TEXT_PIPELINES)[request.param]()

    def loads(self, checkpoint, pipeline):
        models = {name: model for name, model in pipeline.components.items() if isinstance(model, torch.nn.Module)}
        for name, model in models.items():
            loaded = AutoModel.from_pretrained(checkpoint, subfolder=name, trust_remote_code=True)
            assert type(loaded).__name__ == type(model).__name__
            is_own = type(model).__module__.startswith("hf_genmod.")
            assert is_own == type(loaded).__module__.startswith("diffusers_modules.")
            weights = loaded.state_dict()
            assert weights.keys() == model.state_dict().keys()
            assert all(torch.equal(weights[key], weight) for key, weight in model.state_dict().items())

    def test_from_a_folder_and_from_the_hub(self, checkpoint, pipeline):
        self.loads(checkpoint, pipeline)

    def test_from_a_checkpoint_that_was_saved_again_by_its_own_code(self, folder, pipeline, tmp_path, caplog):
        loaded = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
        assert not [record for record in caplog.records if "auto_map" in record.getMessage()]
        loaded.save_pretrained(tmp_path / "again")
        self.loads(str(tmp_path / "again"), pipeline)


def test_automodel_loads_a_model_alone_or_its_config_in_a_checkpoint(folder, tmp_path, hub):
    unet = PIPELINES["guided"]().unet
    unet.save_pretrained(tmp_path / "alone")
    unet.push_to_hub(repo_id := hub.new_repo_id())
    for model in (
        AutoModel.from_pretrained(str(tmp_path / "alone"), trust_remote_code=True),
        AutoModel.from_pretrained(repo_id, trust_remote_code=True),
        AutoModel.from_config(str(folder), subfolder="unet", trust_remote_code=True),
    ):
        assert type(model).__name__ == "DenoisingUNet2DModel"


def test_automodel_loads_models_of_others_as_ever(tmp_path):
    AutoencoderPipeline(tiny_vae()).save_pretrained(tmp_path)
    assert isinstance(AutoModel.from_pretrained(str(tmp_path), subfolder="vae"), AutoencoderKL)


def test_the_working_folder_does_not_matter(pipeline, folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    assert os.path.isdir("checkpoint")
    assert fingerprint(ClassifierFreeGuidedPipeline.from_pretrained("checkpoint")) == fingerprint(pipeline)
