"""What Autoencoder and VariationalAutoencoder share: network, latents, prior, and a place in diffusers."""

import re

import pytest
import torch
import torch.nn.functional as F
from accelerate.utils import convert_outputs_to_fp32
from diffusers import DiffusionPipeline
from tiny import (
    AUTOENCODER_KINDS,
    TINY_AUTOENCODER,
    assert_rounded_alike,
    autoencoder_inputs,
    encoded,
    everything,
    relative_error,
    tiny_autoencoder,
    tiny_unet,
)

from hf_genmod import AncestralDDPMScheduler, Autoencoder, UnconditionalPipeline, VariationalAutoencoder, load_pipeline
from hf_genmod.models.blocks import ResidualBlock

CLASSES = (Autoencoder, VariationalAutoencoder)


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture(params=AUTOENCODER_KINDS)
def model(request):
    kind, config = AUTOENCODER_KINDS[request.param]
    return tiny_autoencoder(kind, **config)


@pytest.fixture
def x(model):
    return autoencoder_inputs(model)


class TestAsAModelOfDiffusers:
    @pytest.mark.parametrize("with_prior", [False, True])
    def test_weights_come_back_bitwise_from_disk(self, model, x, with_prior, tmp_path):
        if with_prior:
            model.fit_prior(encoded(model, autoencoder_inputs(model, n=5))[:, : model.config.latent_channels])
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path)
        assert all(torch.equal(loaded.state_dict()[name], weight) for name, weight in model.state_dict().items())
        assert_rounded_alike(everything(loaded, x), everything(model, x))
        assert {k: v for k, v in loaded.config.items() if not k.startswith("_")} == {
            k: list(v) if isinstance(v, tuple) else v for k, v in model.config.items() if not k.startswith("_")
        }
        if with_prior:
            epsilon = randn(3, model.config.prior_rank)
            assert_rounded_alike(loaded.sample_prior(epsilon), model.sample_prior(epsilon))
        else:
            assert loaded.config.prior_rank is None

    @pytest.mark.parametrize(
        "dtype, tolerance", [(torch.float64, 1e-5), (torch.float16, 0.01), (torch.bfloat16, 0.05)]
    )
    def test_computes_in_its_dtype(self, model, x, dtype, tolerance, tmp_path):
        expected = everything(model, x)
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path, torch_dtype=dtype)
        actual = everything(loaded, x.to(dtype))
        assert actual.dtype == dtype
        assert actual.isfinite().all()
        assert relative_error(actual, expected) < tolerance

    def test_under_autocast_the_latents_keep_the_dtype_of_the_pictures(self, model, x):
        expected = everything(model, x)
        with torch.autocast("cpu", torch.bfloat16):
            assert encoded(model, x).dtype == torch.float32
            assert relative_error(everything(model, x), expected) < 0.05

    def test_accelerate_may_convert_its_outputs(self, model, x):
        with torch.autocast("cpu", torch.bfloat16):
            expected, converted = model(x), convert_outputs_to_fp32(model.forward)(x)
        assert type(converted) is type(expected) and converted.keys() == expected.keys()
        assert converted.sample.dtype == torch.float32
        assert torch.equal(converted.sample, expected.sample.float())

    def test_memory_format_does_not_matter(self, model, x):
        expected = everything(model, x)
        actual = everything(
            model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
        )
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)

    def test_is_deterministic_and_the_same_in_training(self, model, x):
        expected = everything(model, x)
        assert torch.equal(everything(model, x), expected)
        assert torch.equal(everything(model.train(), x), expected)

    def test_dropout_acts_in_training_only(self):
        model = tiny_autoencoder(dropout=0.5)
        x = autoencoder_inputs(model)
        expected = everything(tiny_autoencoder(), x)
        assert torch.equal(everything(model, x), expected)
        assert not torch.allclose(everything(model.train(), x), expected)

    def test_tuples_and_outputs_hold_the_same(self, model, x):
        assert torch.equal(model(x, return_dict=False)[0], model(x).sample)
        z = encoded(model, x)[:, : model.config.latent_channels]
        assert torch.equal(model.decode(z, return_dict=False)[0], model.decode(z).sample)
        first = model.encode(x, return_dict=False)[0]
        assert torch.equal(getattr(first, "parameters", first), encoded(model, x))

    def test_every_parameter_has_a_gradient(self, model, x):
        output = model(x)
        loss = output.sample.square().mean()
        if output.get("latent_dist") is not None:
            loss = loss + output.latent_dist.kl().mean()
        if output.get("log_variance") is not None:
            loss = loss + output.log_variance**2
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())

    def test_gradient_checkpointing_computes_blocks_twice_and_the_same_gradients(self, model, x):
        def gradients():
            calls = []
            hooks = [
                block.register_forward_pre_hook(lambda *_: calls.append(1))
                for block in model.modules()
                if isinstance(block, ResidualBlock)
            ]
            model.zero_grad()
            model(x).sample.square().mean().backward()
            for hook in hooks:
                hook.remove()
            return len(calls) / len(hooks), [p.grad.clone() for p in model.parameters() if p.grad is not None]

        once, plain = gradients()
        model.train().enable_gradient_checkpointing()
        twice, checkpointed = gradients()
        assert (once, twice) == (1, 2)
        for expected, actual in zip(plain, checkpointed, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("how", ["block_level", "leaf_level"])
    def test_group_offloading_brings_back_each_weight_in_time(self, model, x, tmp_path, how):
        expected = everything(model, x)
        model.enable_group_offload("cpu", offload_type=how, num_blocks_per_group=1, offload_to_disk_path=str(tmp_path))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(torch.nan)  # the weights are on the disk now
        assert_rounded_alike(everything(model, x), expected)

    def test_encoding_and_decoding_call_the_hook_that_brings_an_offloaded_model_back(self, model, x):
        class Hook:
            calls = 0

            def pre_forward(self, module):
                self.calls += 1

        model._hf_hook = Hook()
        everything(model, x)
        assert model._hf_hook.calls == 2

    @pytest.mark.parametrize("kind", ["vector", "variational"])
    def test_compiles_without_a_graph_break(self, kind):
        torch.compiler.reset()
        model = tiny_autoencoder(AUTOENCODER_KINDS[kind][0], **AUTOENCODER_KINDS[kind][1])
        x = autoencoder_inputs(model)
        epsilon = {"epsilon": randn(2, 2, 4, 4)} if kind == "variational" else {}
        expected = model(x, **epsilon).sample
        actual = torch.compile(model, fullgraph=True, backend="eager")(x, **epsilon).sample
        assert_rounded_alike(actual, expected)

    @pytest.mark.parametrize("kind", CLASSES)
    def test_travels_in_the_checkpoint_of_a_pipeline(self, kind, tmp_path):
        vae = tiny_autoencoder(kind, sample_size=16, scaling_factor=0.7, shift_factor=0.3)
        unet = tiny_unet(in_channels=2, out_channels=2)
        scheduler = AncestralDDPMScheduler(clip_sample=False)
        pipeline = UnconditionalPipeline(unet, scheduler, vae=vae)
        pipeline.save_pretrained(tmp_path)

        def images(pipeline):
            pipeline.set_progress_bar_config(disable=True)
            rng = torch.Generator().manual_seed(0)
            return pipeline(num_inference_steps=2, generator=rng, output_type="pt").images

        expected = images(pipeline)
        assert expected.shape == (1, 3, 16, 16)
        ours = load_pipeline(tmp_path)
        assert type(ours.vae) is kind
        theirs = DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True)
        assert type(theirs.vae).__module__.startswith("diffusers_modules.")
        for loaded in (ours, theirs):
            assert_rounded_alike(images(loaded), expected)


class TestShapes:
    @pytest.mark.parametrize("kind", CLASSES)
    @pytest.mark.parametrize(
        "config, z",
        [
            ({"sample_size": 8, "in_channels": 1}, (2, 4, 4)),
            ({"sample_size": (16, 8)}, (2, 8, 4)),
            ({"sample_size": (12, 8), "in_channels": 4, "patch_size": 2}, (2, 3, 2)),
            ({"sample_size": 8, "in_channels": 7, "latent_channels": 5}, (5, 4, 4)),
            ({"sample_size": 8, "block_out_channels": (8,)}, (2, 8, 8)),
            (
                {
                    "sample_size": 28,
                    "in_channels": 1,
                    "block_out_channels": (8, 8, 8),
                    "vector_latents": True,
                    "latent_channels": 20,
                },
                (20, 1, 1),
            ),
        ],
    )
    def test_of_latents_and_pictures(self, kind, config, z):
        model = tiny_autoencoder(kind, **config)
        x = autoencoder_inputs(model, n=3)
        assert model.latent_shape(*x.shape[2:]) == z
        moments = encoded(model, x)
        assert moments.shape == (3, z[0] * (1 if kind is Autoencoder else 2), *z[1:])
        assert model.decode(moments[:, : z[0]]).sample.shape == x.shape
        assert model(x).sample.shape == x.shape

    def test_each_level_and_the_patches_shrink_the_picture(self):
        assert tiny_autoencoder().downsampling_factor == 2
        assert tiny_autoencoder(block_out_channels=(8, 16, 16), patch_size=2).downsampling_factor == 8

    def test_takes_pictures_of_other_sizes_than_its_own_unless_z_is_a_vector(self):
        model = tiny_autoencoder()
        assert model(randn(1, 3, 16, 12)).sample.shape == (1, 3, 16, 12)
        assert model.latent_shape(16, 12) == (2, 8, 6)


class TestNetwork:
    def test_pictures_do_not_see_each_other(self, model):
        x = autoencoder_inputs(model, n=4)
        batch = everything(model, x)
        for i in range(4):
            torch.testing.assert_close(everything(model, x[i : i + 1])[0], batch[i], rtol=1e-4, atol=1e-5)

    def test_different_pictures_have_different_latents_and_reconstructions(self, model):
        x = autoencoder_inputs(model)
        latents, reconstruction = encoded(model, x), model(x).sample
        assert relative_error(latents[0], latents[1]) > 0.01
        assert relative_error(reconstruction[0], reconstruction[1]) > 0.001

    def test_an_autoencoder_decodes_what_it_encodes(self):
        model = tiny_autoencoder(Autoencoder)
        x = autoencoder_inputs(model)
        output = model(x)
        assert torch.equal(output.latents, model.encode(x).latents)
        assert torch.equal(output.sample, model.decode(output.latents).sample)

    def test_patches_are_the_same_network_on_unshuffled_pixels(self):
        patched = tiny_autoencoder(Autoencoder, patch_size=2)
        inner = Autoencoder(**(TINY_AUTOENCODER | {"sample_size": 4, "in_channels": 12})).eval()
        inner.load_state_dict(patched.state_dict())
        x = autoencoder_inputs(patched)
        expected = F.pixel_shuffle(inner(F.pixel_unshuffle(x, 2)).sample, 2)
        assert torch.equal(patched(x).sample, expected)

    def test_the_last_stage_of_a_vector_is_a_linear_map_of_the_whole_feature_map(self):
        model = tiny_autoencoder(Autoencoder, vector_latents=True)
        features = randn(2, 16, 4, 4)
        last, first = model.encoder.conv_out, model.decoder.conv_in
        z = last(features)
        torch.testing.assert_close(z[:, :, 0, 0], features.flatten(1) @ last.weight.flatten(1).T + last.bias)
        rows = (z[:, :, 0, 0] @ first.weight.flatten(1)).unflatten(1, (16, 4, 4))
        torch.testing.assert_close(first(z), rows + first.bias[:, None, None])

    def test_height_and_width_are_treated_alike(self):
        tall = tiny_autoencoder(Autoencoder, sample_size=(16, 8))
        x = autoencoder_inputs(tall)
        latents, reconstruction = tall.encode(x).latents, tall(x).sample
        with torch.no_grad():
            for parameter in tall.parameters():
                if parameter.ndim == 4:
                    parameter.copy_(parameter.mT.clone())
        torch.testing.assert_close(tall.encode(x.mT).latents, latents.mT, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(tall(x.mT).sample, reconstruction.mT, rtol=1e-4, atol=1e-5)

    def test_a_block_starts_as_the_identity(self):
        x = randn(2, 8, 4, 4)
        assert torch.equal(ResidualBlock(8, 8, groups=4, dropout=0.0, kernel={"kernel_size": 3, "padding": 1})(x), x)

    def test_the_latent_scale_is_left_to_the_diffusion_model(self):
        scaled = tiny_autoencoder(Autoencoder, scaling_factor=0.2, shift_factor=3.0)
        x = autoencoder_inputs(scaled)
        assert torch.equal(everything(scaled, x), everything(tiny_autoencoder(Autoencoder), x))

    def test_features_are_what_the_last_convolution_makes_latents_of(self):
        for vector_latents in (False, True):
            vae = tiny_autoencoder(Autoencoder, vector_latents=vector_latents)
            x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
            features = vae.features(x)
            assert features.shape == (2, 16, 4, 4)
            torch.testing.assert_close(vae.encoder.conv_out(features), vae.encode(x).latents)


class TestPrior:
    @pytest.mark.parametrize("kind", CLASSES)
    def test_has_the_mean_and_covariance_of_the_latents(self, kind):
        model, n = tiny_autoencoder(kind), 100
        latents = (randn(n, 32) @ randn(32, 32, seed=1) + randn(32, seed=2)).reshape(n, 2, 4, 4)
        model.fit_prior(latents)
        assert model.config.prior_rank == 32
        z = latents.flatten(1).double()
        basis = torch.cat([torch.zeros(1, 32), torch.eye(32)])
        sampled = model.sample_prior(basis).flatten(1)  # μ, then μ + each direction
        torch.testing.assert_close(sampled[0].double(), z.mean(dim=0))
        directions = (sampled[1:] - sampled[0]).double()
        torch.testing.assert_close(directions.T @ directions, z.T.cov(), rtol=1e-4, atol=1e-4)

    def test_keeps_the_largest_variances_when_there_are_too_many(self, monkeypatch):
        monkeypatch.setattr("hf_genmod.models.image_autoencoder.MAX_PRIOR_RANK", 3)
        model, scales = tiny_autoencoder(), 2.0 ** -torch.arange(32)
        model.fit_prior(randn(400, 32).mul(scales).reshape(400, 2, 4, 4))
        assert model.config.prior_rank == 3
        torch.testing.assert_close(model.prior_directions.norm(dim=1), scales[:3], rtol=0.15, atol=0)
        assert model.prior_directions[range(3), range(3)].abs().min() > 0.1

    def test_of_few_latents_stays_in_their_plane_and_can_be_fitted_anew(self):
        model, latents = tiny_autoencoder(), randn(3, 2, 4, 4)
        model.fit_prior(randn(50, 2, 4, 4, seed=1))
        model.fit_prior(latents)
        assert model.config.prior_rank == 2
        z = model.sample_prior(randn(4, 2)).flatten(1)
        plane = torch.cat([latents.flatten(1), torch.ones(3, 1)], dim=1).T
        points = torch.cat([z, torch.ones(4, 1)], dim=1).T  # an affine combination of the three
        residual = points - plane @ torch.linalg.lstsq(plane, points).solution
        assert residual.abs().max() < 1e-4

    def test_has_to_be_fitted_first_and_to_the_latents_of_its_pictures(self):
        model = tiny_autoencoder()
        with pytest.raises(ValueError, match="prior_rank: None, no prior has been fitted .*; call fit_prior first"):
            model.sample_prior(randn(1, 3))
        for shape in ((5, 2, 4, 2), (1, 2, 4, 4)):
            with pytest.raises(ValueError, match=re.escape(f"latents: shape {shape} is not (n, 2, 4, 4) with n of")):
                model.fit_prior(randn(*shape))
        model.fit_prior(randn(5, 2, 4, 4))
        with pytest.raises(ValueError, match=re.escape("epsilon: shape (1, 3) is not (n, 4), n times prior_rank")):
            model.sample_prior(randn(1, 3))
