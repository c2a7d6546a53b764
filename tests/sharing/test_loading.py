"""Opens checkpoints and autoencoders from folders and a local Hub."""

import os

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, DiTPipeline, DiTTransformer2DModel, UNet2DModel
from huggingface_hub import HfApi
from tiny import assert_rounded_alike, tiny_autoencoder, tiny_unet, tiny_vae

from hf_genmod import (
    AncestralDDPMScheduler,
    Autoencoder,
    AutoencoderPipeline,
    ClassifierFreeGuidedPipeline,
    DenoisingUNet2DModel,
    UnconditionalPipeline,
    VariationalAutoencoder,
    load_pipeline,
    load_vae,
)
from hf_genmod.sharing.facts import Facts


def pipeline(num_classes=None):
    torch.manual_seed(0)
    unet = DenoisingUNet2DModel(
        sample_size=8, block_out_channels=(8, 16), attention_levels=(False, True), attention_head_dim=8,
        layers_per_block=1, norm_num_groups=4, num_classes=num_classes,
    )  # fmt: skip
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    scheduler = AncestralDDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    if num_classes is None:
        return UnconditionalPipeline(unet, scheduler)
    return ClassifierFreeGuidedPipeline(unet, scheduler, id2label={0: "cat", 1: "dog"})


def draw(pipe):
    arguments = {"batch_size": 2} if isinstance(pipe, UnconditionalPipeline) else {"class_labels": ["cat", "dog"]}
    generator = torch.Generator().manual_seed(3)
    return torch.from_numpy(pipe(**arguments, generator=generator, num_inference_steps=3, output_type="np").images)


@pytest.mark.parametrize("num_classes", [None, 2])
def test_load_pipeline_finds_the_class_and_draws_the_same_from_a_folder_and_the_hub(num_classes, tmp_path, hub):
    pipe = pipeline(num_classes)
    repo_id = hub.new_repo_id("pipeline")
    pipe.save_pretrained(tmp_path)
    pipe.push_to_hub(repo_id)
    for where in (tmp_path, str(tmp_path), repo_id):
        loaded = load_pipeline(where)
        assert type(loaded) is type(pipe)
        assert_rounded_alike(draw(loaded), draw(pipe))


def test_what_is_no_checkpoint_of_ours_is_named(tmp_path, hub):
    unet = UNet2DModel(
        sample_size=8, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    )  # fmt: skip
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'DDPMPipeline' is not of this package"):
        load_pipeline(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no model_index.json in it"):
        load_pipeline(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="'user/nothing-here' is not a folder here, and the Hub has no"):
        load_pipeline("user/nothing-here")
    with pytest.raises(FileNotFoundError, match="is not a folder, nor can it be the id"):
        load_pipeline(tmp_path / "mistyped")
    (tmp_path / "empty" / "training_config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="no model_index.json in it, so it is an unfinished run; repeat"):
        load_pipeline(tmp_path / "empty")


def test_a_mistyped_folder_beside_checkpoints_is_not_looked_for_on_the_hub(tmp_path, hub, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("runs/plain", "runs/guided"):
        pipeline().save_pretrained(name)
    others = "runs holds the checkpoints guided, plain: check the spelling"
    for name, told in (("plane", r"did you mean runs/plain\?"), ("xy", others)):
        with pytest.raises(FileNotFoundError, match=f"'runs/{name}' is not a folder; {told}$"):
            load_pipeline(f"runs/{name}")
    assert not hub.requests
    wrong = r"did you mean .*runs/plain\?$"
    with pytest.raises(FileNotFoundError, match=f"nor can it be the id of a repository on the Hub; {wrong}"):
        load_pipeline(tmp_path / "runs" / "plane")
    with pytest.raises(FileNotFoundError, match=r"did you mean runs\?"):
        load_pipeline("run/plain")
    with pytest.raises(FileNotFoundError, match=wrong):
        pipeline().load_lora_weights("runs/plane")
    with pytest.raises(FileNotFoundError, match=r"did you mean runs/plain\?"):
        load_vae("runs/plane")
    with pytest.raises(FileNotFoundError, match=f"^runs/plane: there is no such folder; {wrong}"):
        Facts.read("runs/plane")


VAES = {
    "plain": lambda: tiny_autoencoder(Autoencoder, scaling_factor=0.7, shift_factor=0.3),
    "variational": lambda: tiny_autoencoder(VariationalAutoencoder, sample_size=(8, 16)),
    "of diffusers": lambda: tiny_vae(scaling_factor=0.7),
}


class TestLoadVAE:
    @pytest.fixture(params=VAES)
    def vae(self, request):
        return VAES[request.param]()

    def is_the_same(self, loaded, vae):
        assert type(loaded) is type(vae) and not loaded.training
        loaded_config, config = ({**model.config} for model in (loaded, vae))
        for name in set(config) - {"_name_or_path", "_use_default_values"}:
            expected = list(config[name]) if isinstance(config[name], tuple) else config[name]  # as JSON has it
            actual = loaded_config[name]
            assert (list(actual) if isinstance(actual, tuple) else actual) == expected, name
        weights = loaded.state_dict()
        assert weights.keys() == vae.state_dict().keys()
        assert all(torch.equal(weights[name], weight) for name, weight in vae.state_dict().items())

    def test_finds_one_alone_and_in_the_checkpoints_that_have_one(self, vae, tmp_path, hub):
        latent_channels = vae.config.latent_channels
        unet = tiny_unet(in_channels=latent_channels, out_channels=latent_channels)
        latent = UnconditionalPipeline(unet, AncestralDDPMScheduler(clip_sample=False), vae)
        AutoencoderPipeline(vae).save_pretrained(tmp_path / "run")
        (tmp_path / "run" / "training_config.json").write_text("{}")
        latent.save_pretrained(tmp_path / "latent")
        vae.save_pretrained(tmp_path / "bare")
        for folder in ("run", "run/vae", "latent", "latent/vae", "bare"):
            self.is_the_same(load_vae(tmp_path / folder), vae)
            self.is_the_same(load_vae(str(tmp_path / folder)), vae)
        for what in (latent, vae):
            repo_id = hub.new_repo_id()
            what.push_to_hub(repo_id)
            hub.requests.clear()
            self.is_the_same(load_vae(repo_id), vae)
            assert not any(request.path.endswith((".py", ".bin")) for request in hub.requests)

    def test_finds_that_of_a_pipeline_of_diffusers(self, tmp_path):
        vae = VAES["of diffusers"]()
        transformer = DiTTransformer2DModel(
            num_attention_heads=1, attention_head_dim=8, num_layers=1, in_channels=4, out_channels=8, sample_size=4,
            norm_num_groups=4,
        )  # fmt: skip
        DiTPipeline(transformer, vae, DDPMScheduler()).save_pretrained(tmp_path)
        self.is_the_same(load_vae(tmp_path), vae)

    def test_options_of_loading_reach_it(self, hub):
        vae, repo_id = VAES["variational"](), hub.new_repo_id()
        vae.push_to_hub(repo_id, private=True)
        first = HfApi().model_info(repo_id).sha
        before = vae.log_variance.item()
        vae.log_variance.data += 1
        vae.push_to_hub(repo_id)
        assert load_vae(repo_id, token=hub.token).log_variance.item() == vae.log_variance.item()
        assert load_vae(repo_id, revision=first).log_variance.item() == before
        assert load_vae(repo_id, torch_dtype=torch.bfloat16).dtype == torch.bfloat16
        hub.requests.clear()
        assert load_vae(repo_id, revision=first, local_files_only=True).log_variance.item() == before
        assert not hub.requests

    def test_never_reads_pickles_nor_runs_code(self, tmp_path):
        vae = VAES["variational"]()
        AutoencoderPipeline(vae).save_pretrained(tmp_path)
        for file in tmp_path.rglob("*.py"):
            file.write_text("raise RuntimeError('the code of the checkpoint ran')")
        self.is_the_same(load_vae(tmp_path), vae)
        (weights,) = (tmp_path / "vae").glob("*.safetensors")
        torch.save(vae.state_dict(), tmp_path / "vae" / "diffusion_pytorch_model.bin")
        weights.unlink()
        with pytest.raises(FileNotFoundError, match="vae: the weights in .* cannot be read"):
            load_vae(tmp_path)

    def test_what_is_none_is_named_in_a_sentence(self, tmp_path, hub, monkeypatch):
        monkeypatch.chdir(tmp_path)
        pipeline().save_pretrained("pixels")
        pipeline().push_to_hub(repo_id := hub.new_repo_id())
        UNet2DModel(
            sample_size=8, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4,
            down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
        ).save_pretrained("unet")  # fmt: skip
        (tmp_path / "unfinished").mkdir()
        (tmp_path / "unfinished" / "training_config.json").write_text("{}")
        (tmp_path / "transformer").mkdir()
        (tmp_path / "transformer" / "config.json").write_text('{"model_type": "bert"}')
        paths = ["pixels", "pixels/unet", "unet", "unfinished", "transformer", repo_id]
        for path in [*paths, "missing", "no/such/folder", "/no/such", "user/nothing-here", "a b"]:
            with pytest.raises(FileNotFoundError) as error:
                load_vae(path)
            message = str(error.value)
            place = "" if os.path.isdir(path) else ", and no folder here"
            assert message.startswith(f"vae: {path!r} is neither an autoencoder nor a checkpoint with one{place} (")
            assert message.endswith("or an id on the Hub") and "\n" not in message and len(message) < 400
