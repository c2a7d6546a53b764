"""Latents are what the autoencoder says of the pictures, encoded once, and standardised on both sides alike."""

import collections
import math
import pickle
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from small_shards import FEATURES, damage, spoil_image, write_parquet, write_tar
from tiny import tiny_autoencoder, tiny_classifier, tiny_unet, tiny_vae

import hf_genmod.data.latents
import hf_genmod.data.shards as shards_module
import hf_genmod.data.stream as stream_module
import hf_genmod.data.stream_encoding as stream_encoding
from hf_genmod import (
    AncestralDDPMScheduler,
    Autoencoder,
    DenoisingObjective,
    Trainer,
    TrainingConfig,
    UnconditionalPipeline,
    VariationalAutoencoder,
)
from hf_genmod.data.latents import (
    CachedLatents,
    LatentDataset,
    StreamedLatents,
    draw_latents,
    encode,
    latents_of,
    standardised,
    with_statistics,
)
from hf_genmod.data.loading import load_pictures
from hf_genmod.data.picture_dataset import PictureDataset
from hf_genmod.data.randomness import Augmentation, BatchRandom, GlobalBatchSampler, _Philox, batch_positions
from hf_genmod.data.stream import stream_pictures
from hf_genmod.data.value_range import to_model_range
from hf_genmod.evaluation.recognition import accuracy_by_noise_level


def pictures(n=10, size=(8, 8), mode="RGB", seed=0, **kwargs):
    pixels = np.random.default_rng(seed).integers(256, size=(n, *size, len(mode)), dtype=np.uint8)
    images = [Image.fromarray(picture[..., 0] if mode == "L" else picture) for picture in pixels]
    return PictureDataset(images, "noise", channels=len(mode), **kwargs)


def make_vae(kind, channels=3, **config):
    if kind == "of diffusers":
        return tiny_vae(in_channels=channels, out_channels=channels, **config)
    if kind == "vector":
        return tiny_autoencoder(in_channels=channels, vector_latents=True, **config)
    cls = Autoencoder if kind == "plain" else VariationalAutoencoder
    return tiny_autoencoder(cls, in_channels=channels, **config)


@torch.no_grad()
def posterior(vae, x):
    """μ and σ of each latent, by the autoencoder itself."""
    output = vae.encode(x)
    if "latents" in output:
        return output.latents, torch.zeros_like(output.latents)
    return output.latent_dist.mean, output.latent_dist.std


def everything(dataset):
    return dataset.__getitems__(list(range(len(dataset))))


def counting(vae):
    """Counts the pictures of each call of `vae.encode`."""
    counts, original = [], vae.encode

    def encode(x):
        counts.append(len(x))
        return original(x)

    vae.encode = encode
    return counts


def rng_of(n, seed=0, step=0):
    return BatchRandom(seed, step, range(n), n)


class TestPosteriors:
    @pytest.mark.parametrize(
        "kind, mode, size",
        [
            ("variational", "RGB", (8, 12)),
            ("variational", "L", (8, 8)),
            ("plain", "RGBA", (12, 8)),
            ("vector", "RGB", (8, 8)),
            ("of diffusers", "RGB", (8, 12)),
            ("of diffusers", "RGBA", (8, 8)),
        ],
    )
    def test_are_those_of_each_picture_and_of_its_mirror_image_standardised(self, kind, mode, size):
        data = pictures(70, size, mode)  # more than are encoded together
        vae = make_vae(kind, len(mode), scaling_factor=0.7, shift_factor=0.3)
        latents, indices = LatentDataset(data, vae, mirrored=True), [65, 0, 3]
        batch = latents.__getitems__(indices)
        assert set(batch) == {"posteriors"} and len(latents) == 70
        x = to_model_range(data.__getitems__(indices)["images"])
        for variant, images in enumerate((x, x.flip(-1))):
            mean, std = posterior(vae, images)
            of_variant = batch["posteriors"][:, variant]
            torch.testing.assert_close(of_variant[:, 0], (mean - 0.3) * 0.7, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(of_variant[:, 1], std * 0.7, rtol=1e-4, atol=1e-5)
            assert (latents.channels, *latents.resolution) == mean.shape[1:]
        assert (batch["posteriors"][:, 0] - batch["posteriors"][:, 1]).abs().max() > 0.01
        plain = LatentDataset(data, vae).__getitems__(indices)["posteriors"]
        torch.testing.assert_close(plain, batch["posteriors"][:, :1], rtol=1e-5, atol=1e-6)

    def test_of_an_autoencoder_without_a_shift_are_only_scaled(self):
        data, vae = pictures(), make_vae("of diffusers")
        assert vae.config.shift_factor is None and vae.config.scaling_factor == 0.18215
        mean, std = posterior(vae, to_model_range(everything(data)["images"]))
        expected = 0.18215 * torch.stack([mean, std], dim=1)[:, None]
        torch.testing.assert_close(everything(LatentDataset(data, vae))["posteriors"], expected)

    def test_of_measured_values_are_those_of_what_the_model_sees(self):
        planes = np.random.default_rng(0).uniform(200, 300, size=(6, 8, 8)).astype(np.float32)
        data = PictureDataset([Image.fromarray(plane) for plane in planes], "measured")
        vae = make_vae("variational", channels=1)
        latents = LatentDataset(data, vae)
        assert latents.value_range == data.value_range and data.value_range["low"][0] == planes.min()
        x = 2 * (torch.from_numpy(planes)[:, None] - planes.min()) / (planes.max() - planes.min()) - 1
        expected = torch.stack(posterior(vae, x), dim=1)[:, None]
        torch.testing.assert_close(everything(latents)["posteriors"], expected, rtol=1e-4, atol=1e-5)

    def test_come_with_the_labels_and_captions_of_their_pictures(self):
        captions = [f"picture {i}" for i in range(10)]
        data = pictures(labels=torch.arange(10) % 3, label_names=["a", "b", "c"], captions=captions)
        latents = LatentDataset(data, make_vae("variational"))
        batch = latents.__getitems__([7, 2, 2])
        assert batch["class_labels"].tolist() == [1, 2, 2] and batch["class_labels"].dtype == torch.int64
        assert batch["captions"] == ["picture 7", "picture 2", "picture 2"]
        assert latents.label_names == ["a", "b", "c"] and latents.labels.tolist() == data.labels.tolist()
        assert (latents.name, latents.skipped, latents.value_range) == ("noise", [], None)

    @pytest.mark.parametrize(
        "kind, size, mode, message",
        [
            ("variational", (9, 8), "RGB", "resolution 9x8: this network (patch_size 1, 2 levels) needs a height and "
             "width that 2 divides, such as 8x8 or 10x8"),
            ("vector", (8, 12), "RGB", "makes vectors (vector_latents) of images of 8x8 alone; resize them to that"),
            ("of diffusers", (8, 9), "RGB", "vae: it needs a height and width that 2 divides, and these images are "
             "8x9; give --resolution 8x10, for example"),
            ("variational", (8, 8), "L", "vae: it takes images of 3 channels, and these have 1; train one for "
             "them, or give --channels 3"),
            ("of diffusers", (8, 8), "RGBA", "vae: it takes images of 3 channels, and these have 4; train one for "
             "them, or give --channels 3"),
        ],
    )  # fmt: skip
    def test_of_pictures_that_do_not_fit_are_refused(self, kind, size, mode, message, cache):
        with pytest.raises(ValueError, match=re.escape(message)):
            LatentDataset(pictures(3, size, mode), make_vae(kind))
        assert not cache.exists()


class TestCache:
    def test_the_same_pictures_are_encoded_once(self):
        data, vae = pictures(70), make_vae("variational")
        counts = counting(vae)
        first = everything(LatentDataset(data, vae))["posteriors"]
        assert sum(counts) == 1 + 70  # one for the shape
        counts.clear()
        again = LatentDataset(pictures(70), vae)
        assert counts == [1]
        assert torch.equal(everything(again)["posteriors"], first)

    def test_other_pictures_weights_and_variants_are_encoded_anew(self):
        data, vae = pictures(), make_vae("variational")
        counts = counting(vae)
        fingerprints = [LatentDataset(data, vae).fingerprint]
        for make in (
            lambda: LatentDataset(pictures(seed=1), vae),
            lambda: LatentDataset(data, vae, mirrored=True),
            lambda: (vae.encoder.conv_out.bias.data.add_(1e-3), LatentDataset(data, vae))[1],
        ):
            counts.clear()
            latents = make()
            assert sum(counts) == 1 + 10 * (1 + latents.mirrored)
            x = to_model_range(latents.pictures.__getitems__([4])["images"])
            expected = torch.stack(posterior(vae, x), dim=1)
            actual = latents.__getitems__([4])["posteriors"][:, 0]
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
            fingerprints.append(latents.fingerprint)
        assert len(set(fingerprints)) == 4

    def test_other_factors_change_the_latents_but_need_no_encoding(self):
        data, vae = pictures(), make_vae("variational")
        first = LatentDataset(data, vae)
        before = everything(first)["posteriors"]
        vae.register_to_config(scaling_factor=2.0, shift_factor=0.5)
        counts = counting(vae)
        other = LatentDataset(data, vae)
        assert counts == [1] and other.fingerprint != first.fingerprint
        mean, std = everything(other)["posteriors"].unbind(2)
        torch.testing.assert_close(mean, 2 * (before[:, :, 0] - 0.5))
        torch.testing.assert_close(std, 2 * before[:, :, 1])

    def test_other_units_of_the_same_values_are_encoded_anew(self):
        planes = np.random.default_rng(0).uniform(size=(4, 8, 8)).astype(np.float32)
        data = PictureDataset([Image.fromarray(plane) for plane in planes], "measured")
        vae = make_vae("variational", channels=1)
        first = LatentDataset(data, vae)
        before = everything(first)["posteriors"]
        other = LatentDataset(data.with_value_range({"low": [0.0], "high": [2.0]}), vae)  # that of another model
        assert other.fingerprint != first.fingerprint
        expected = torch.stack(posterior(vae, torch.from_numpy(planes)[:, None] - 1), dim=1)[:, None]
        torch.testing.assert_close(everything(other)["posteriors"], expected, rtol=1e-4, atol=1e-5)
        assert (expected - before).abs().max() > 0.01

    def test_an_interrupted_encoding_leaves_nothing_half_done(self, cache, monkeypatch):
        monkeypatch.setattr(hf_genmod.data.latents, "_PIXELS", 64 * 64)  # 64 pictures of 8x8 at once
        data, vae = pictures(140), make_vae("variational")
        expected = torch.stack(posterior(vae, to_model_range(everything(data)["images"])), dim=1)[:, None]
        original, calls = vae.encode, []

        def encode_until_the_power_fails(x):
            calls.append(len(x))
            if len(calls) == 3:
                raise KeyboardInterrupt
            return original(x)

        vae.encode = encode_until_the_power_fails
        with pytest.raises(KeyboardInterrupt):
            LatentDataset(data, vae)
        assert calls == [1, 64, 64] and not list(cache.rglob("*.arrow"))
        vae.encode = original
        actual = everything(LatentDataset(data, vae))["posteriors"]
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)

    def test_a_process_that_loads_batches_is_given_no_weights(self):
        vae = make_vae("variational")
        latents = LatentDataset(pictures(4), vae)
        assert next(vae.parameters()).numel() > 0
        vae.of_this_process = lambda: None  # which cannot be pickled
        loaded = pickle.loads(pickle.dumps(latents))
        assert not any(isinstance(value, torch.nn.Module) for value in vars(loaded).values())
        assert torch.equal(everything(loaded)["posteriors"], everything(latents)["posteriors"])
        other = latents.with_captions(["one"] * 4)
        assert other.vae is vae and other.captions != latents.captions


def distinctive(kind, size=(8, 8)):
    """An autoencoder whose latents are far from standardised."""
    vae = make_vae(kind, **({"sample_size": size} if kind != "of diffusers" else {}))
    last = vae.encoder.conv_out if kind != "of diffusers" else vae.quant_conv
    num_means = len(last.bias) // (1 if kind == "plain" else 2)
    with torch.no_grad():
        last.weight[:num_means] *= 4
        last.bias[:num_means] += 3
    return vae


def trainer_of(latents, tmp_path, **config):
    unet = tiny_unet(in_channels=latents.channels, out_channels=latents.channels, sample_size=latents.resolution)
    scheduler = AncestralDDPMScheduler(clip_sample=False)
    return Trainer(
        unet,
        DenoisingObjective(scheduler),
        latents,
        TrainingConfig(output_dir=str(tmp_path / "run"), max_train_steps=1, batch_size=4, **config),
        make_pipeline=lambda unet: UnconditionalPipeline(unet, scheduler, vae=latents.vae),
    )


class TestStandardised:
    @pytest.mark.parametrize("kind", ["variational", "plain", "of diffusers"])
    @pytest.mark.parametrize("mirrored", [False, True])
    def test_latents_of_a_batch_have_mean_0_and_deviation_1_and_decode_as_they_were(self, kind, mirrored, tmp_path):
        data, vae = pictures(300, (8, 16)), distinctive(kind, (8, 16))
        before = dict(vae.config)
        latents = standardised(vae, data, mirrored)
        assert dict(vae.config) == before and latents.vae is not vae
        shift, scale = latents.vae.config.shift_factor, latents.vae.config.scaling_factor
        assert abs(shift) > 0.2 and abs(scale - 1) > 0.1  # there was something to standardise

        trainer = trainer_of(latents, tmp_path, horizontal_flip=mirrored)
        prepared = latents.x_0(everything(latents), rng_of(300), trainer.config.augmentation)
        assert abs(prepared.mean().item()) < 0.05 and abs(prepared.std().item() - 1) < 0.05

        rng = rng_of(300)
        x = to_model_range(everything(data)["images"])
        if mirrored:
            flipped = rng.uniform() < 0.5
            x = torch.where(flipped[:, None, None, None], x.flip(-1), x)
        mean, std = posterior(vae, x)
        z = mean + std * rng.normal(mean.shape[1:])
        torch.testing.assert_close(prepared, (z - shift) * scale, rtol=1e-3, atol=1e-4)
        with torch.no_grad():
            decoded = vae.decode(z[:20]).sample
            of_pipeline = trainer._pipeline().decode(prepared[:20])
        torch.testing.assert_close(of_pipeline, decoded, rtol=1e-3, atol=1e-3)

    def test_are_measured_once(self, cache, monkeypatch):
        vae, data = make_vae("variational"), pictures(20)
        first = standardised(vae, data)
        monkeypatch.setattr(hf_genmod.data.latents, "_standardise", None)
        second = standardised(vae, data)
        assert dict(second.vae.config) == dict(first.vae.config) and second.fingerprint == first.fingerprint

    def test_mirroring_needs_mirrored_latents_and_there_is_no_shift(self, tmp_path):
        latents = standardised(make_vae("variational"), pictures(8, (16, 16)))
        with pytest.raises(ValueError, match="horizontal_flip: the "):
            trainer_of(latents, tmp_path, horizontal_flip=True)
        with pytest.raises(ValueError, match="max_shift: latents cannot be moved by pixels"):
            trainer_of(latents, tmp_path, max_shift=1)
        trainer_of(latents, tmp_path)

    def test_each_step_draws_other_latents_of_a_picture_and_each_run_the_same(self, tmp_path):
        latents = standardised(make_vae("variational"), pictures(8, (16, 16)))
        trainer = trainer_of(latents, tmp_path)
        draws = [
            latents.x_0(everything(latents), rng_of(8, step=step), trainer.config.augmentation) for step in (0, 0, 1)
        ]
        assert torch.equal(draws[0], draws[1])
        assert (draws[0] - draws[2]).abs().mean() > 0.1


class TestDraws:
    def test_a_draw_of_a_picture_does_not_depend_on_its_neighbours(self):
        posteriors = torch.rand(6, 2, 2, 3, 4, 2, generator=torch.Generator().manual_seed(0))
        for mirror in (False, True):
            together = draw_latents(posteriors, BatchRandom(1, 5, range(6), 6), mirror)
            assert together.shape == (6, 3, 4, 2)
            for i in range(6):
                alone = draw_latents(posteriors[i : i + 1], BatchRandom(1, 5, [i], 6), mirror)
                assert torch.equal(alone, together[i : i + 1])

    def test_half_are_of_the_mirror_image_and_only_where_asked_for(self):
        posteriors = torch.zeros(4000, 2, 2, 1, 1, 1)
        posteriors[:, 1, 0] = 1  # μ of the mirror image
        drawn = draw_latents(posteriors, rng_of(4000), mirror=True)
        assert set(drawn.unique().tolist()) == {0.0, 1.0}
        assert abs(drawn.mean().item() - 0.5) < 0.04  # five standard deviations
        assert draw_latents(posteriors, rng_of(4000)).abs().max() == 0

    def test_have_the_mean_and_deviation_of_the_posterior(self):
        posteriors = torch.tensor([2.0, 0.5])[None, None, :, None, None, None].expand(5000, 1, 2, 1, 2, 1)
        z = draw_latents(posteriors, rng_of(5000))
        assert abs(z.mean().item() - 2) < 0.025 and abs(z.std().item() - 0.5) < 0.02
        assert abs(torch.corrcoef(z.flatten(1).T)[0, 1].item()) < 0.07


class TestStatistics:
    @pytest.mark.parametrize("kind", ["variational", "plain", "vector"])
    def test_are_those_of_the_latents_and_leave_the_autoencoder_alone(self, kind):
        data, vae = pictures(100), make_vae(kind)
        before, weights = dict(vae.config), {name: w.clone() for name, w in vae.state_dict().items()}
        told = with_statistics(vae.train(), data)
        assert dict(vae.config) == before and vae.training and not told.training
        for name, weight in weights.items():
            assert torch.equal(vae.state_dict()[name], weight) and torch.equal(told.state_dict()[name], weight)

        mean, std = posterior(vae.eval(), to_model_range(everything(data)["images"]))
        shift = mean.mean()
        deviation = ((mean - shift) ** 2 + std**2).mean().sqrt()
        assert told.config.shift_factor == pytest.approx(shift.item(), rel=1e-4)
        assert told.config.scaling_factor == pytest.approx(1 / deviation.item(), rel=1e-4)
        assert (told.config.prior_rank is None) == told.has_standard_prior
        if kind == "plain":
            torch.testing.assert_close(told.prior_mean, mean.flatten(1).mean(dim=0))
            covariance = told.prior_directions.T @ told.prior_directions
            torch.testing.assert_close(covariance, mean.flatten(1).T.cov(), rtol=1e-3, atol=1e-5)

    def test_are_those_of_some_pictures_at_even_distances(self):
        data, vae = pictures(20), make_vae("plain")
        told = with_statistics(vae, data, count=7)
        mean, _ = posterior(vae, to_model_range(data.__getitems__(range(0, 20, 3))["images"]))
        torch.testing.assert_close(told.prior_mean, mean.flatten(1).mean(dim=0))
        assert told.config.prior_rank == 6

    def test_of_latents_that_are_all_the_same_are_finite(self):
        black = PictureDataset([Image.new("RGB", (8, 8))] * 3, "black")
        vae = make_vae("plain")
        with torch.no_grad():
            vae.encoder.conv_out.weight.zero_()
            vae.encoder.conv_out.bias.fill_(0.25)
        told = with_statistics(vae, black)
        assert told.config.shift_factor == 0.25 and math.isfinite(told.config.scaling_factor)


def test_encoding_needs_no_gradient_and_takes_the_dtype_of_the_autoencoder():
    vae, x = make_vae("variational"), pictures(3).x_0([0, 1, 2])
    moments = encode(vae, x)
    assert moments.shape == (3, 2, 2, 4, 4) and not moments.requires_grad
    half = encode(vae.bfloat16(), x)
    assert half.dtype == torch.float32 and (half - moments).abs().max() < 0.1


def test_a_classifier_of_latents_is_judged_by_latents():
    data = pictures(30, (16, 16), labels=torch.arange(30) % 3, label_names=["a", "b", "c"])
    latents = LatentDataset(data, make_vae("variational"))
    classifier, scheduler = tiny_classifier(in_channels=2), AncestralDDPMScheduler()
    measured = accuracy_by_noise_level(classifier, scheduler, latents, num_levels=3, batch_size=8)
    rng = rng_of(30)
    z = draw_latents(everything(latents)["posteriors"], rng)
    epsilon = rng.normal(z.shape[1:])
    for level, t in zip(measured, (0, 500, 999), strict=True):
        alpha_bar = scheduler.alphas_cumprod[t]
        with torch.no_grad():
            logits = classifier(alpha_bar.sqrt() * z + (1 - alpha_bar).sqrt() * epsilon, t).logits
        right = (logits.argmax(dim=1) == data.labels).float().mean().item()
        assert level["t"] in (t, 499) and level["accuracy"].value == pytest.approx(right, abs=1 / 29)


@pytest.mark.parametrize("kind", ["plain", "variational"])
def test_latents_of_a_stream_are_those_that_are_encoded_once(kind, tmp_path):
    shards = write_parquet(tmp_path, (20, 12))
    vae = make_vae(kind)
    streamed, kept = standardised(vae, stream_pictures(str(shards))), standardised(vae, load_pictures(shards))
    assert isinstance(streamed, StreamedLatents) and len(streamed) == len(kept) == 32
    assert (streamed.channels, streamed.resolution) == (kept.channels, kept.resolution)
    for name in ("scaling_factor", "shift_factor"):
        assert streamed.vae.config[name] == pytest.approx(kept.vae.config[name], rel=1e-5)
    indices = [31, 4, 4, 0]
    torch.testing.assert_close(streamed.x_0(indices), kept.x_0(indices), rtol=1e-4, atol=1e-5)
    first, second = (dataset.x_0(dataset.__getitems__(indices), rng_of(4)) for dataset in (streamed, kept))
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)
    assert not torch.equal(first[1], first[2]) or kind == "plain"
    kept, mirror = standardised(vae, load_pictures(shards), mirrored=True), Augmentation(mirror=True)
    first, second = (dataset.x_0(dataset.__getitems__(indices), rng_of(4), mirror) for dataset in (streamed, kept))
    # The factors of mirrored images are others.
    back = [dataset.vae.config.scaling_factor for dataset in (streamed, kept)]
    shift = [dataset.vae.config.shift_factor for dataset in (streamed, kept)]
    first, second = (x / back[i] + shift[i] for i, x in enumerate((first, second)))
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)
    streamed.check_augmentation(Augmentation(mirror=True, max_shift=3))
    other = standardised(make_vae(kind, latent_channels=3), stream_pictures(str(shards)))
    assert streamed.fingerprint != other.fingerprint


class TestCachedLatents:
    """Those of a stream, which are encoded once."""

    @pytest.fixture(autouse=True)
    def small_files(self, monkeypatch):
        monkeypatch.setattr(stream_encoding, "_ROWS", 24)
        monkeypatch.setattr(stream_encoding, "_BLOCK", 2**11)  # two images with their mirror images, or four

    @pytest.mark.parametrize("kind", ["variational", "plain"])
    def test_are_those_of_the_loaded_data_set_rounded(self, kind, tmp_path, monkeypatch):
        if kind == "plain":
            write_tar(tmp_path / "a.tar", 40)
        else:
            write_parquet(tmp_path, (20, 13, 7))
        monkeypatch.setattr(stream_module, "NUM_SAMPLE_IMAGES", 16)  # the factors are those of all images
        vae, mirror = make_vae(kind), Augmentation(mirror=True)
        counts = counting(vae)
        cached = standardised(vae, stream_pictures(str(tmp_path)), mirrored=True, cached=True)
        assert isinstance(cached, CachedLatents)
        kept = standardised(vae, load_pictures(tmp_path), mirrored=True)
        assert len(cached) == len(kept) == 40 and cached.labels.tolist() == kept.labels.tolist()
        assert (cached.channels, cached.resolution) == (kept.channels, kept.resolution)
        for name in ("scaling_factor", "shift_factor"):
            assert cached.vae.config[name] == pytest.approx(kept.vae.config[name], rel=1e-3, abs=1e-4)
        indices = [39, 4, 4, 0, 33]
        mine, theirs = (dataset.__getitems__(indices) for dataset in (cached, kept))
        assert mine.keys() == theirs.keys() == {"posteriors", "class_labels", "captions"}
        assert mine["posteriors"].shape == theirs["posteriors"].shape
        difference = (mine["posteriors"] - theirs["posteriors"]).abs()
        assert 0 < difference.max() < 4e-3 and difference.square().mean().sqrt() < 1e-3
        assert torch.equal(mine["class_labels"], theirs["class_labels"]) and mine["captions"] == theirs["captions"]
        first, second = (data.x_0(batch, rng_of(5), mirror) for data, batch in ((cached, mine), (kept, theirs)))
        torch.testing.assert_close(first, second, rtol=0, atol=1e-2)
        counts.clear()
        again = standardised(vae, stream_pictures(str(tmp_path)), mirrored=True, cached=True)
        assert torch.equal(again.x_0(indices), cached.x_0(indices)) and again.fingerprint == cached.fingerprint
        assert set(counts) == {1}  # for the shape, and for what the latents take
        with pytest.raises(ValueError, match="max_shift: latents cannot be moved"):
            cached.check_augmentation(Augmentation(max_shift=1))

    def test_take_half_the_bytes_where_rounding_changes_little(self, tmp_path, cache):
        shards, sizes = write_parquet(tmp_path, (12,)), []
        for shift in (0.0, 1e3, 1e6):  # from which fp16 would have only whole numbers, and infinity
            vae = make_vae("variational")
            vae.encoder.conv_out.bias.data[:2] += shift
            cached = standardised(vae, stream_pictures(str(shards)), cached=True)
            content = pq.read_table(cached._posteriors.shards._paths[0])["encoded"].to_pylist()
            sizes.append({len(posteriors) for posteriors in content})
            expected = standardised(vae, load_pictures(shards)).x_0(range(12))
            assert (cached.x_0(range(12)) - expected).square().mean().sqrt() < 2e-3
        assert sizes == [{4 * 64 * 2}, {4 * 64 * 4}, {4 * 64 * 4}]  # 2 channels of 8x8, as mean and deviation

    @pytest.mark.parametrize("num_processes", [1, 2])
    def test_occur_once_in_an_epoch_on_any_number_of_processes(self, num_processes, tmp_path, monkeypatch):
        whole = latents_of(stream_pictures(str(write_parquet(tmp_path))), make_vae("variational"), cached=True)
        for module in (shards_module, stream_module):
            monkeypatch.setattr(module, "BUFFER", 16 * int(whole._posteriors.shards.num_bytes.max()))
        assert len(whole.order(_Philox(0, b"order"), 0, 8).intervals) == 2  # lanes
        epochs = [collections.Counter(), collections.Counter()]
        for process in range(num_processes):
            latents = pickle.loads(pickle.dumps(whole))
            parts = [batch_positions(8, process_index=process, num_processes=num_processes)]
            sampler = iter(GlobalBatchSampler(72, 8, 0, 0, parts, latents.order))
            for step in range(18):
                epochs[step // 9].update(latents.__getitems__(next(sampler))["captions"])
        every = collections.Counter(f"number {i}" for i in range(72))
        assert epochs == [every, every]

    def test_of_a_file_that_can_no_longer_be_read_are_named_or_others_take_their_place(self, tmp_path, monkeypatch):
        monkeypatch.setattr(stream_encoding, "_ROWS", 8)
        pictures = stream_pictures(str(write_parquet(tmp_path)))
        cached = latents_of(pictures, make_vae("variational"), cached=True)
        file, expected = cached._posteriors.shards._paths[0], cached.__getitems__([8, 9])
        named, skipping = (pickle.loads(pickle.dumps(cached)) for _ in range(2))
        end = pq.read_metadata(file).serialized_size + 100  # which tells the blocks
        damage(Path(file), 4, Path(file).stat().st_size - end)
        batch = named.__getitems__([0, 9])
        assert batch["failure"].startswith(f"{file}: the shard cannot be read (")
        skipping.pictures.on_bad_image = "skip"
        batch = skipping.__getitems__([0, 9])
        assert "failure" not in batch and batch["unusable"][0].startswith(f"{file}: the shard cannot be read (")
        assert all(torch.equal(batch[name], expected[name]) for name in ("posteriors", "class_labels"))
        assert batch["captions"] == expected["captions"]

    def test_of_an_unusable_image_are_those_of_the_next_with_its_label_and_caption(self, tmp_path, monkeypatch):
        monkeypatch.setattr(stream_module, "NUM_SAMPLE_IMAGES", 1)
        (file,) = write_parquet(tmp_path, (8,)).iterdir()
        spoil_image(file, 5)
        cached = latents_of(stream_pictures(str(tmp_path), on_bad_image="skip"), make_vae("variational"), cached=True)
        batch = cached.__getitems__([5, 6])
        assert batch["captions"] == ["number 6"] * 2 and batch["class_labels"].tolist() == [6, 6]
        assert torch.equal(*batch["posteriors"]) and "unusable" not in batch

    def test_have_all_captions_of_an_image(self, tmp_path):
        captions = [["a", "b"], ["c"], ["d", "e", "f"]]
        folder = write_parquet(tmp_path, (3,), features={"image": FEATURES["image"]})
        (file,) = folder.iterdir()
        pq.write_table(pq.read_table(file).append_column("text", [captions]), file)
        cached = latents_of(stream_pictures(str(folder)), make_vae("variational"), cached=True)
        assert cached.__getitems__([2, 0])["captions"] == [captions[2], captions[0]]
        assert "class_labels" not in cached.__getitems__([0])
