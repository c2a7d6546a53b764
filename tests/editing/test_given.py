"""Images and masks as a pipeline is given them; `test_edits` has their forms and errors."""

import torch
from small_pipelines import guided, of_latents, of_text, seeded, unconditional
from tiny import tiny_autoencoder, tiny_unet

from hf_genmod.data.latents import LatentDataset
from hf_genmod.data.picture_dataset import PictureDataset
from hf_genmod.editing.given import latents_of, read_images, repeated


def test_latents_are_those_of_the_training(tmp_path):
    pipeline = unconditional(
        tiny_unet(in_channels=2, out_channels=2), vae=tiny_autoencoder(latent_channels=2, scaling_factor=0.7)
    )
    images = torch.randint(0, 256, (3, *pipeline.picture_shape), dtype=torch.uint8, generator=seeded())
    from PIL import Image

    pictures = PictureDataset([Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images], "made")
    expected = LatentDataset(pictures, pipeline.vae).x_0([0, 1, 2])
    torch.testing.assert_close(latents_of(pipeline, images / 127.5 - 1), expected, atol=1e-5, rtol=1e-5)


def test_pixels_are_their_own_latents():
    x = torch.rand(2, 3, 8, 8)
    assert latents_of(unconditional(), x) is x and latents_of(of_latents(), x).shape == (2, 4, 4, 4)


def test_images_are_repeated_one_after_another():
    image = torch.rand(2, 3, 8, 8, generator=seeded())
    assert torch.equal(read_images(unconditional(), image, 6), image[[0, 0, 0, 1, 1, 1]])


def test_a_condition_serves_all_images():
    assert repeated(unconditional(), {}, 3) == {"batch_size": 3}
    assert repeated(guided(), {"class_labels": "cat", "guidance_scale": 2.0}, 2) == {
        "class_labels": ["cat", "cat"], "guidance_scale": 2.0
    }  # fmt: skip
    weights = {"cat": 1.0, "dog": -0.5}
    assert repeated(guided(), {"class_labels": weights}, 2) == {"class_labels": [weights, weights]}
    assert repeated(guided(), {"class_labels": [0, 1]}, 2) == {"class_labels": [0, 1]}
    assert repeated(of_text(), {"prompt": "a cat"}, 2) == {"prompt": ["a cat", "a cat"]}
