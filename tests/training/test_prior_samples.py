import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image
from tiny import tiny_autoencoder, tiny_classifier, tiny_text_pipeline, tiny_unet

from hf_genmod import (
    AncestralDDPMScheduler,
    ClassifierFreeGuidedPipeline,
    ClassifierGuidedPipeline,
    UnconditionalPipeline,
)
from hf_genmod.data.latents import LatentDataset
from hf_genmod.data.picture_dataset import PictureDataset
from hf_genmod.data.randomness import Augmentation, BatchRandom
from hf_genmod.training.prior_samples import PriorSamples, unguided_samples


def of_classes(**config):
    names, unet = {0: "a", 1: "b", 2: "c"}, tiny_unet(num_classes=3, **config)
    pipeline = ClassifierFreeGuidedPipeline(unet, AncestralDDPMScheduler(), id2label=names)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def pictures(count=5, **kwargs):
    colors = [Image.new("RGB", (8, 8), (40 * i, 255 - 40 * i, 128)) for i in range(count)]
    return PictureDataset(colors, "some", **kwargs)


def new_of_a_class(count):
    return pictures(count, labels=torch.full((count,), 3), label_names=["zebra"])


def test_samples_are_drawn_once_for_all_that_they_depend_on(capsys):
    calls, some = [], new_of_a_class(2)

    def prior(count=17, seed=11, scheduler=None, changed=False, steps=2):
        pipeline = of_classes()
        pipeline.register_modules(scheduler=scheduler or pipeline.scheduler)
        pipeline.register_to_config(defaults={"arguments": {"num_inference_steps": steps}})
        pipeline.unet.conv_in.bias.data += changed
        pipeline.set_progress_bar_config(desc="drawing")
        pipeline.unet.register_forward_hook(lambda *_: calls.append(1))
        calls.clear()
        return PriorSamples(some, pipeline, count, {"class_labels": [0, 1]}, seed).x_0(range(2 * count))

    first = prior()
    shown = capsys.readouterr().err
    assert calls and "drawing 17 samples of the model to keep what it knows\n" in shown
    assert "drawing: 100%" in shown and "17/17 [" in shown and shown.count("drawing:   0%") == 1
    assert torch.equal(first, prior()) and not calls
    assert not capsys.readouterr().err
    other = AncestralDDPMScheduler(timestep_spacing="trailing")
    for change in ({"seed": 12}, {"scheduler": other}, {"changed": True}, {"steps": 3}):
        assert not torch.equal(first, prior(**change)) and calls


def test_half_are_new_pictures_and_half_samples_of_what_was_known():
    pipeline, some = of_classes(), new_of_a_class(5)
    mixed = PriorSamples(some, pipeline, 8, {"class_labels": [0, 1, 2]}, seed=7)
    assert len(mixed) == 16
    batch = mixed.__getitems__(range(16))
    assert batch["class_labels"].tolist() == [3] * 8 + [0, 1, 2, 0, 1, 2, 0, 1]
    new = some.x_0(range(5))
    assert torch.equal(batch["images"][:8], new[[0, 1, 2, 3, 4, 0, 1, 2]])
    for i, label in enumerate([0, 1, 2, 0]):
        request = {"guidance_scale": 1.0, "num_inference_steps": 20, "output_type": "latent"}
        alone = pipeline(label, generator=[torch.Generator().manual_seed(7 + i)], **request).images[0]
        torch.testing.assert_close(batch["images"][8 + i], alone.clamp(-1, 1), atol=1e-4, rtol=0)


def test_a_batch_comes_in_the_order_asked_for():
    some = new_of_a_class(3)
    mixed = PriorSamples(some, of_classes(), 4, {"class_labels": [0, 1]})
    whole, part = mixed.__getitems__(range(8)), mixed.__getitems__([6, 1, 5])
    assert torch.equal(part["images"], whole["images"][[6, 1, 5]])
    assert part["class_labels"].tolist() == whole["class_labels"][[6, 1, 5]].tolist()


def test_captions_go_along():
    mixed = PriorSamples(pictures(2, captions=["x", ["y", "z"]]), tiny_text_pipeline(), 3, {"prompt": ["a cat", ""]})
    assert mixed.__getitems__([0, 1, 2, 3, 4, 5])["captions"] == ["x", ["y", "z"], "x", "a cat", "", "a cat"]


def test_latents_are_joined_to_latents():
    vae = tiny_autoencoder()
    scheduler = AncestralDDPMScheduler(clip_sample=False)
    unet = tiny_unet(in_channels=2, out_channels=2, sample_size=4)
    pipeline = UnconditionalPipeline(unet, scheduler, vae)
    pipeline.set_progress_bar_config(disable=True)
    latents = LatentDataset(pictures(2), vae, mirrored=True)
    mixed = PriorSamples(latents, pipeline, 2, {})
    batch = mixed.__getitems__(range(4))["posteriors"]
    assert torch.equal(batch[:2], latents.__getitems__([0, 1])["posteriors"])
    samples = unguided_samples(pipeline, {}, 2)
    for variant in range(2):
        assert torch.equal(batch[2:, variant, 0], samples)
    assert not batch[2:, :, 1].any()  # with no variance


def test_samples_with_a_classifier_are_without_its_guidance():
    scheduler = AncestralDDPMScheduler()
    guided = ClassifierGuidedPipeline(tiny_unet(), tiny_classifier(), scheduler)
    plain = UnconditionalPipeline(guided.unet, scheduler)
    for pipeline in (guided, plain):
        pipeline.set_progress_bar_config(disable=True)
    torch.testing.assert_close(unguided_samples(guided, {"class_labels": [0, 1]}, 2), unguided_samples(plain, {}, 2))


def test_without_samples_there_are_the_new_pictures_alone():
    some = pictures(3)
    alone = PriorSamples(some, of_classes(), 0, {"class_labels": [0]})
    assert len(alone) == 3
    assert torch.equal(alone.x_0([2]), some.x_0([2]))


@pytest.mark.parametrize("of_latents", [False, True])
def test_gives_x_0_as_the_new_images_do(of_latents):
    vae, channels, size = (tiny_autoencoder(), 2, 4) if of_latents else (None, 3, 8)
    unet = tiny_unet(in_channels=channels, out_channels=channels, sample_size=size)
    pipeline = UnconditionalPipeline(unet, AncestralDDPMScheduler(clip_sample=vae is None), vae)
    pipeline.set_progress_bar_config(disable=True)
    new = LatentDataset(pictures(3), vae, mirrored=True) if of_latents else pictures(3)
    mixed, augment, indices = PriorSamples(new, pipeline, 3, {}), Augmentation(mirror=True), [0, 4, 1, 5]
    batch, numbers = mixed.__getitems__(indices), [BatchRandom(3, 5, range(4), 4) for _ in range(3)]
    x_0 = mixed.x_0(batch, numbers[0], augment)
    assert torch.equal(x_0, mixed.x_0(indices, numbers[1], augment))
    assert torch.equal(x_0, new.x_0(batch, numbers[2], augment))
    assert torch.equal(mixed.x_0([0, 1]), new.x_0([0, 1]))
    mixed.check_augmentation(augment)
    if of_latents:
        with pytest.raises(ValueError, match="max_shift: latents cannot be moved by pixels"):
            mixed.check_augmentation(Augmentation(max_shift=1))


def test_is_known_by_pictures_model_and_samples():
    def fingerprint(pipeline, count=3, labels=(0, 1), seed=0, num_new=2):
        return PriorSamples(new_of_a_class(num_new), pipeline, count, {"class_labels": labels}, seed).fingerprint

    other = of_classes()
    other.unet.conv_in.bias.data += 1
    by_other_steps = of_classes()
    by_other_steps.scheduler = DDIMScheduler.from_config(by_other_steps.scheduler.config)
    changed = [
        fingerprint(other),
        fingerprint(by_other_steps),
        fingerprint(of_classes(), count=2),
        fingerprint(of_classes(), labels=(0, 2)),
        fingerprint(of_classes(), seed=1),
        fingerprint(of_classes(), num_new=3),
    ]
    assert fingerprint(of_classes()) == fingerprint(of_classes())
    assert len({fingerprint(of_classes()), *changed}) == 7


def test_a_number_that_is_none_is_refused():
    with pytest.raises(ValueError, match="prior_samples: -1 is negative"):
        PriorSamples(pictures(), of_classes(), -1, {})
