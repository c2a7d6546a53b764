"""What a checkpoint may not do, the options of loading, the Hub, and what is missing."""

import json
import re
import shutil

import pytest
import torch
from bare_machine import fingerprint
from checkpoint_cases import WEIGHTS, index_of
from diffusers import DDIMScheduler, DiffusionPipeline, EulerDiscreteScheduler
from huggingface_hub import HfApi

from hf_genmod import load_pipeline, load_vae
from hf_genmod.pipelines.classifier_free_guided import ClassifierFreeGuidedPipeline
from hf_genmod.pipelines.unconditional import UnconditionalPipeline
from hf_genmod.schedulers.ancestral_ddpm import AncestralDDPMScheduler


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


class TestOptions:
    @pytest.mark.parametrize(
        "options",
        [
            pytest.param({"variant": "fp16"}, id="variant", marks=pytest.mark.slow),
            pytest.param({"max_shard_size": "50KB"}, id="shards"),
        ],
    )
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

    @pytest.mark.parametrize("dtype", ["float16", "torch.float16", {"unet": "float16"}])
    def test_a_dtype_may_be_named(self, folder, dtype):
        assert load_pipeline(folder, dtype=dtype).unet.dtype == torch.float16

    @pytest.mark.parametrize("dtype", ["fp16", "int8", "auto", "nn", 16, torch.int64])
    def test_what_is_no_dtype_of_floats_is_refused(self, folder, dtype):
        for name in ("dtype", "torch_dtype"):
            message = f"{name}: {dtype!r} is no dtype of floats; give torch.float16, torch.bfloat16 or torch.float32"
            for load in (load_pipeline, load_vae, ClassifierFreeGuidedPipeline.from_pretrained):
                with pytest.raises(ValueError, match=message):
                    load(folder, **{name: dtype})

    @pytest.mark.parametrize("sampler", [DDIMScheduler, EulerDiscreteScheduler])
    def test_another_sampler_stays(self, pipeline, sampler, elsewhere, tmp_path):
        pipeline.scheduler = sampler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
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
        with pytest.raises(FileNotFoundError, match=f"'{repo_id}' is not a folder here, and the Hub has no"):
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

    def test_editing_without_the_package_says_what_to_install(self, folder, elsewhere):
        assert elsewhere.error_of_editing(folder) == (
            "editing images needs the package hf_genmod, besides the checkpoint; install it"
        )

    def test_the_wrong_pipeline_for_a_checkpoint_is_named(self, folder):
        with pytest.raises(ValueError, match="unet: it has 3 classes; use ClassifierFreeGuidedPipeline"):
            UnconditionalPipeline.from_pretrained(folder)
