"""A checkpoint opens with this package, and without it by its own code, and always draws the same pictures."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from bare_machine import BareMachine, fingerprint
from diffusers import DDIMScheduler, DiffusionPipeline, EulerDiscreteScheduler
from huggingface_hub import HfApi
from tiny import tiny_autoencoder, tiny_classifier, tiny_text_pipeline, tiny_unet, tiny_vae
from transformers import T5EncoderModel

import hf_genmod
from hf_genmod.checkpoints.bundle import bundle
from hf_genmod.models.denoising_unet import DenoisingUNet2DModel
from hf_genmod.models.image_autoencoder import Autoencoder
from hf_genmod.models.variational_autoencoder import VariationalAutoencoder
from hf_genmod.pipelines.autoencoder import AutoencoderPipeline
from hf_genmod.pipelines.classifier_free_guided import ClassifierFreeGuidedPipeline
from hf_genmod.pipelines.classifier_guided import ClassifierGuidedPipeline
from hf_genmod.pipelines.super_resolution import SuperResolutionPipeline
from hf_genmod.pipelines.unconditional import UnconditionalPipeline
from hf_genmod.schedulers.ancestral_ddpm import AncestralDDPMScheduler

PACKAGE = Path(hf_genmod.__file__).parent
NAMES = {0: "cat", 1: "dog", 2: "lizard"}
LEARNED = {"variance_type": "learned_range", "prediction_type": "v_prediction", "beta_schedule": "squaredcos_cap_v2"}
WEIGHTS = "diffusion_pytorch_model.safetensors"


def guided(scheduler=None):
    return ClassifierFreeGuidedPipeline(
        tiny_unet(num_classes=3), scheduler or AncestralDDPMScheduler(), id2label=NAMES
    )


def fitted(kind):
    """An autoencoder of 16x16 pictures that knows what its latents are distributed like."""
    vae = tiny_autoencoder(kind, sample_size=16, scaling_factor=0.7, shift_factor=0.3)
    vae.fit_prior(torch.randn(20, 2, 8, 8, generator=torch.Generator().manual_seed(0)))
    return vae


def of_latents(pipeline_class, kind, **components):
    scheduler = AncestralDDPMScheduler(clip_sample=False)
    unet = tiny_unet(in_channels=2, out_channels=2, **components.pop("unet", {}))
    return pipeline_class(unet=unet, scheduler=scheduler, vae=fitted(kind), **components)


PIPELINES = {
    "guided": guided,
    "unconditional": lambda: UnconditionalPipeline(tiny_unet(out_channels=6), AncestralDDPMScheduler(**LEARNED)),
    "guided by a classifier": lambda: ClassifierGuidedPipeline(
        tiny_unet(), tiny_classifier(), AncestralDDPMScheduler(), id2label=NAMES
    ),
    "in latent space": lambda: UnconditionalPipeline(
        tiny_unet(in_channels=4, out_channels=4),
        AncestralDDPMScheduler(clip_sample=False),
        tiny_vae(latent_channels=4),
    ),
    "in the latent space of ours": lambda: of_latents(UnconditionalPipeline, Autoencoder),
    "guided in latent space": lambda: of_latents(
        ClassifierFreeGuidedPipeline, VariationalAutoencoder, unet={"num_classes": 3}, id2label=NAMES
    ),
    "guided by a classifier in latent space": lambda: of_latents(
        ClassifierGuidedPipeline, VariationalAutoencoder, classifier=tiny_classifier(in_channels=2), id2label=NAMES
    ),
    "upsampler": lambda: SuperResolutionPipeline(
        tiny_unet(conditioning_channels=3, num_classes=3), AncestralDDPMScheduler(), NAMES, 4, max_noise_level=100
    ),
    "autoencoder": lambda: AutoencoderPipeline(fitted(Autoencoder)),
    "variational autoencoder": lambda: AutoencoderPipeline(fitted(VariationalAutoencoder)),
}
TEXT_PIPELINES = {
    "CLIP": tiny_text_pipeline,
    "T5 in latent space": lambda: tiny_text_pipeline(
        T5EncoderModel, vae=fitted(VariationalAutoencoder), in_channels=2, out_channels=2
    ),
}
OURS = (DenoisingUNet2DModel, AncestralDDPMScheduler, Autoencoder, VariationalAutoencoder)


@pytest.fixture(scope="module")
def elsewhere(hub, tmp_path_factory):
    """A machine with torch and diffusers and not this package, and with a cache of its own."""
    absent = ["hf_genmod", "transformers", "peft", "accelerate"]
    environment = hub.environment(tmp_path_factory.mktemp("elsewhere"))
    with BareMachine(environment | {"OMP_NUM_THREADS": str(torch.get_num_threads())}, absent) as machine:
        yield machine


@pytest.fixture(scope="module")
def elsewhere_with_transformers(hub, tmp_path_factory):
    """One with transformers, which text needs."""
    environment = hub.environment(tmp_path_factory.mktemp("elsewhere"))
    with BareMachine(environment | {"OMP_NUM_THREADS": str(torch.get_num_threads())}, ["hf_genmod"]) as machine:
        yield machine


@pytest.fixture
def pipeline():
    return guided()


@pytest.fixture
def folder(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.fixture
def repo_id(pipeline, hub):
    repo_id = hub.new_repo_id("checkpoint")
    pipeline.push_to_hub(repo_id)
    return repo_id


@pytest.fixture(params=["folder", "hub"])
def checkpoint(request):
    """Where a checkpoint is: a folder, or a repository on the Hub."""
    return str(request.getfixturevalue({"folder": "folder", "hub": "repo_id"}[request.param]))


def index_of(folder):
    return json.loads(Path(folder, "model_index.json").read_text())


class TestEachWay:
    """From a folder and from the Hub, with this package and without, and again after load, save, load."""

    @pytest.fixture(params=PIPELINES)
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
        assert not list(folder.glob("t*/*.py"))


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
            "scheduler/ancestral_ddpm.py": bundle(PACKAGE / "schedulers/ancestral_ddpm.py"),
        }

    def test_of_two_versions_each_pipeline_keeps_its_own(self, folder, elsewhere, tmp_path):
        other = tmp_path / "other"
        shutil.copytree(folder, other)
        for file in other.rglob("*.py"):
            file.write_text(file.read_text() + "\n# another version\n")
        elsewhere.load_both_then_save_the_first(folder, other, tmp_path / "first")
        elsewhere.load_both_then_save_the_first(other, folder, tmp_path / "second")
        for file in folder.rglob("*.py"):
            path = file.relative_to(folder)
            assert (tmp_path / "first" / path).read_text() == file.read_text()
            assert (tmp_path / "second" / path).read_text() == file.read_text() + "\n# another version\n"


class TestTrust:
    def spoil(self, folder, touched):
        """Whoever imports the code of the checkpoint leaves a trace and fails."""
        for file in [
            *folder.rglob("*.py"),
            folder / "unet/hf_genmod.checkpoints.reading.py",
            folder / "pipeline.py",
        ]:
            file.write_text(f"open({str(touched)!r}, 'w')\nraise RuntimeError('the code of the checkpoint ran')\n")

    def opens_without_its_code(self, checkpoint, pictures, touched):
        with pytest.raises(RuntimeError, match="the code of the checkpoint ran"):
            DiffusionPipeline.from_pretrained(checkpoint, trust_remote_code=True)
        assert touched.exists()
        touched.unlink()
        for options in ({}, {"trust_remote_code": True}):
            assert fingerprint(ClassifierFreeGuidedPipeline.from_pretrained(checkpoint, **options)) == pictures
        assert not touched.exists()

    def test_the_code_in_a_folder_is_not_executed(self, folder, pipeline, tmp_path):
        self.spoil(folder, tmp_path / "touched")
        (folder / "unet/hf_genmod.checkpoints.reading.py").unlink()
        self.opens_without_its_code(folder, fingerprint(pipeline), tmp_path / "touched")

    def test_the_code_on_the_hub_is_not_even_fetched(self, folder, pipeline, hub, tmp_path):
        self.spoil(folder, tmp_path / "touched")
        repo_id = hub.new_repo_id()
        HfApi().create_repo(repo_id)
        HfApi().upload_folder(repo_id=repo_id, folder_path=folder)
        assert "unet/denoising_unet.py" in hub.files(repo_id)
        hub.requests.clear()
        assert fingerprint(ClassifierFreeGuidedPipeline.from_pretrained(repo_id)) == fingerprint(pipeline)
        assert any(WEIGHTS in request.path for request in hub.requests)
        assert not any(re.search(r"/resolve/.*\.py$", request.path) for request in hub.requests)
        self.opens_without_its_code(repo_id, fingerprint(pipeline), tmp_path / "touched")

    def test_code_under_the_name_of_an_installed_module_is_not_executed(self, folder, tmp_path):
        self.spoil(folder, tmp_path / "touched")
        with pytest.raises(ValueError, match="contains custom code"):
            ClassifierFreeGuidedPipeline.from_pretrained(folder, trust_remote_code=True)
        assert not (tmp_path / "touched").exists()

    def test_pickled_weights_are_not_read(self, folder, pipeline):
        torch.save(pipeline.unet.state_dict(), folder / "unet/diffusion_pytorch_model.bin")
        (folder / "unet" / WEIGHTS).unlink()
        for options in ({}, {"use_safetensors": False}):
            with pytest.raises(FileNotFoundError, match=r"the weights of 'unet' \(\*.safetensors\) are missing"):
                ClassifierFreeGuidedPipeline.from_pretrained(folder, **options)

    def test_pickled_weights_beside_others_are_not_read(self, folder, pipeline):
        torch.save(pipeline.unet.state_dict(), folder / "unet/diffusion_pytorch_model.fp16.bin")
        with pytest.raises(OSError, match="no file named diffusion_pytorch_model.fp16.safetensors"):
            ClassifierFreeGuidedPipeline.from_pretrained(folder, variant="fp16")

    @pytest.mark.parametrize("module", ["os", "stable_diffusion", "hf_genmod.training", "builtins"])
    def test_an_index_cannot_name_any_module(self, folder, module):
        index = index_of(folder) | {"unet": [module, "system"]}
        (folder / "model_index.json").write_text(json.dumps(index))
        with pytest.raises(
            ValueError, match=f"model_index.json: 'unet' names the module '{module}', which is neither"
        ):
            ClassifierFreeGuidedPipeline.from_pretrained(folder)

    def test_diffusers_asks_before_it_runs_the_code(self, checkpoint):
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            DiffusionPipeline.from_pretrained(checkpoint)


class TestWhatIsSaved:
    def test_names_files_and_classes_beside_the_weights(self, folder):
        assert index_of(folder) == {
            "_class_name": ["classifier_free_guided", "ClassifierFreeGuidedPipeline"],
            "_diffusers_version": index_of(folder)["_diffusers_version"],
            "unet": ["denoising_unet", "DenoisingUNet2DModel"],
            "scheduler": ["ancestral_ddpm", "AncestralDDPMScheduler"],
            "vae": [None, None],
            "value_range": None,
            "id2label": {"0": "cat", "1": "dog", "2": "lizard"},
        }

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


class TestOptions:
    @pytest.mark.parametrize("options", [{"variant": "fp16"}, {"max_shard_size": "50KB"}], ids=["variant", "shards"])
    def test_variants_and_shards_open_everywhere(self, pipeline, options, elsewhere, hub, tmp_path):
        expected = fingerprint(pipeline)
        repo_id, variant = hub.new_repo_id(), {k: v for k, v in options.items() if k == "variant"}
        pipeline.save_pretrained(tmp_path, **options)
        pipeline.push_to_hub(repo_id, **variant)
        assert not (tmp_path / "unet" / WEIGHTS).exists()
        for checkpoint in (str(tmp_path), repo_id):
            assert fingerprint(ClassifierFreeGuidedPipeline.from_pretrained(checkpoint, **variant)) == expected
            assert elsewhere.draw(checkpoint, **variant) == expected

    def test_shards_on_the_hub_open_everywhere(self, pipeline, elsewhere, hub, tmp_path):
        repo_id = hub.new_repo_id()
        pipeline.save_pretrained(str(tmp_path), max_shard_size="50KB", push_to_hub=True, repo_id=repo_id)
        assert "unet/diffusion_pytorch_model.safetensors.index.json" in hub.files(repo_id)
        assert fingerprint(ClassifierFreeGuidedPipeline.from_pretrained(repo_id)) == fingerprint(pipeline)
        assert elsewhere.draw(repo_id) == fingerprint(pipeline)

    def test_models_load_in_the_dtype_asked_for(self, checkpoint, pipeline):
        loaded = ClassifierFreeGuidedPipeline.from_pretrained(checkpoint, dtype=torch.bfloat16)
        assert loaded.unet.dtype == torch.bfloat16
        assert torch.equal(loaded.unet.conv_in.weight, pipeline.unet.conv_in.weight.bfloat16())

    @pytest.mark.parametrize("sampler", [DDIMScheduler, EulerDiscreteScheduler])
    def test_another_sampler_stays(self, pipeline, sampler, elsewhere, tmp_path):
        pipeline.scheduler = sampler.from_config(pipeline.scheduler.config)
        pipeline.save_pretrained(tmp_path)
        assert index_of(tmp_path)["scheduler"] == ["diffusers", sampler.__name__]
        loaded = ClassifierFreeGuidedPipeline.from_pretrained(tmp_path)
        assert type(loaded.scheduler) is sampler
        assert fingerprint(loaded) == fingerprint(pipeline)
        assert elsewhere.draw(tmp_path) == fingerprint(pipeline)

    def test_the_sampler_of_training_comes_back(self, pipeline, folder):
        expected = fingerprint(pipeline)
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
        pipeline.scheduler = AncestralDDPMScheduler.from_config(pipeline.scheduler.config)
        pipeline.save_pretrained(folder)
        assert index_of(folder)["scheduler"] == ["ancestral_ddpm", "AncestralDDPMScheduler"]
        assert fingerprint(ClassifierFreeGuidedPipeline.from_pretrained(folder)) == expected

    def test_a_component_can_be_passed_in(self, pipeline, folder):
        shutil.rmtree(folder / "unet")
        loaded = ClassifierFreeGuidedPipeline.from_pretrained(folder, unet=pipeline.unet)
        assert fingerprint(loaded) == fingerprint(pipeline)

    def test_a_revision_can_be_chosen(self, pipeline, repo_id):
        first = HfApi().model_info(repo_id).sha
        before = fingerprint(pipeline)
        with torch.no_grad():
            pipeline.unet.conv_out.bias.add_(1)
        pipeline.push_to_hub(repo_id)
        assert fingerprint(ClassifierFreeGuidedPipeline.from_pretrained(repo_id, revision=first)) == before
        assert fingerprint(ClassifierFreeGuidedPipeline.from_pretrained(repo_id)) == fingerprint(pipeline) != before


class TestHub:
    def test_a_private_repository_opens_with_its_token(self, pipeline, hub):
        repo_id = hub.new_repo_id()
        pipeline.push_to_hub(repo_id, private=True)
        loaded = ClassifierFreeGuidedPipeline.from_pretrained(repo_id, token=hub.token)
        assert fingerprint(loaded) == fingerprint(pipeline)

    @pytest.mark.parametrize("whose", ["nobody", "guest"])
    def test_a_private_repository_is_not_there_for_others(self, pipeline, hub, tmp_path, whose):
        repo_id = hub.new_repo_id()
        pipeline.push_to_hub(repo_id, private=True)
        token = {"nobody": False, "guest": hub.guest_token}[whose]
        with pytest.raises(
            FileNotFoundError, match=f"'{repo_id}' is not a folder here, nor a pipeline on the Hub: Repo"
        ):
            ClassifierFreeGuidedPipeline.from_pretrained(repo_id, token=token, cache_dir=tmp_path)

    def test_once_loaded_it_opens_without_the_network(self, repo_id, pipeline, hub, elsewhere):
        ClassifierFreeGuidedPipeline.from_pretrained(repo_id)
        elsewhere.draw(repo_id)
        hub.requests.clear()
        loaded = ClassifierFreeGuidedPipeline.from_pretrained(repo_id, local_files_only=True)
        assert not hub.requests
        assert fingerprint(loaded) == fingerprint(pipeline)
        assert elsewhere.draw(repo_id, local_files_only=True) == fingerprint(pipeline)

    def test_never_loaded_it_does_not_open_without_the_network(self, repo_id, tmp_path):
        with pytest.raises(FileNotFoundError, match=f"'{repo_id}' is not .* Cannot find the requested files"):
            ClassifierFreeGuidedPipeline.from_pretrained(repo_id, local_files_only=True, cache_dir=tmp_path)


class TestWhatIsMissing:
    @pytest.mark.parametrize(
        "missing, message",
        [
            (f"unet/{WEIGHTS}", "{folder}/unet: the weights of 'unet' (*.safetensors) are missing"),
            ("unet", "{folder}/unet: the folder of the component 'unet' is missing"),
            ("scheduler", "{folder}/scheduler: the folder of the component 'scheduler' is missing"),
            ("model_index.json", "{folder}: no model_index.json in it, so it is not the folder of a pipeline"),
        ],
    )
    def test_in_a_folder_is_named_in_a_sentence(self, folder, missing, message):
        path = folder / missing
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        with pytest.raises(FileNotFoundError) as error:
            ClassifierFreeGuidedPipeline.from_pretrained(folder)
        assert str(error.value) == message.format(folder=folder)

    def test_a_shard_is_named(self, pipeline, tmp_path):
        pipeline.save_pretrained(tmp_path, max_shard_size="50KB")
        shard = sorted((tmp_path / "unet").glob("*.safetensors"))[1]
        shard.unlink()
        with pytest.raises(FileNotFoundError, match=shard.name):
            ClassifierFreeGuidedPipeline.from_pretrained(tmp_path)

    def test_on_the_hub_is_named_in_a_sentence(self, pipeline, repo_id, hub):
        HfApi().delete_file(f"unet/{WEIGHTS}", repo_id)
        with pytest.raises(FileNotFoundError, match="the weights of 'unet'"):
            ClassifierFreeGuidedPipeline.from_pretrained(repo_id)
        HfApi().delete_file("model_index.json", repo_id)
        with pytest.raises(FileNotFoundError, match=f"'{repo_id}' is .* nor a pipeline on the Hub: Entry Not Found"):
            ClassifierFreeGuidedPipeline.from_pretrained(repo_id)

    @pytest.mark.parametrize(
        "path", ["./runs", "/no/such/folder", "~/runs", "runs/cats/final", "user/mistyped", "a b"]
    )
    def test_a_mistyped_path_is_no_checkpoint(self, path, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(FileNotFoundError) as error:
            ClassifierFreeGuidedPipeline.from_pretrained(path)
        assert str(error.value).startswith(f"{path!r} is not a folder")
        assert "\n" not in str(error.value)

    def test_the_wrong_pipeline_for_a_checkpoint_is_named(self, folder):
        with pytest.raises(ValueError, match="unet: it has 3 classes; use ClassifierFreeGuidedPipeline"):
            UnconditionalPipeline.from_pretrained(folder)


def test_the_working_folder_does_not_matter(pipeline, folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    assert os.path.isdir("checkpoint")
    assert fingerprint(ClassifierFreeGuidedPipeline.from_pretrained("checkpoint")) == fingerprint(pipeline)
