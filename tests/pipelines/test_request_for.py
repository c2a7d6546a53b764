"""What pipelines are asked by to draw images like those of a data set."""

import torch
from PIL import Image
from tiny import tiny_classifier, tiny_text_pipeline, tiny_unet

from hf_genmod import (
    AncestralDDPMScheduler,
    ClassifierFreeGuidedPipeline,
    ClassifierGuidedPipeline,
    SuperResolutionPipeline,
    UnconditionalPipeline,
)
from hf_genmod.data.picture_dataset import PictureDataset
from hf_genmod.models.conditioning import enlarge, shrink

PICTURES = PictureDataset(
    [Image.new("RGB", (8, 8))] * 4,
    "four",
    labels=torch.tensor([0, 1, 1, 0]),
    label_names=["a", "b"],
    captions=["a red cat", ["a green dog", "a dog"], "two lizards", "a cat"],
)


def upsampler(**config):
    unet = tiny_unet(conditioning_channels=3, **config)
    return SuperResolutionPipeline(unet, AncestralDDPMScheduler(), factor=4, max_noise_level=200)


def test_a_pipeline_is_asked_by_labels_captions_or_small_images():
    of_classes = ClassifierFreeGuidedPipeline(tiny_unet(num_classes=2), AncestralDDPMScheduler())
    guided = ClassifierGuidedPipeline(tiny_unet(), tiny_classifier(num_classes=2), AncestralDDPMScheduler())
    text, plain = tiny_text_pipeline(), UnconditionalPipeline(tiny_unet(), AncestralDDPMScheduler())
    assert of_classes.request_for(PICTURES, [1, 0, 1]) == {"class_labels": [1, 0, 1]}
    assert guided.request_for(PICTURES, [2]) == {"class_labels": [1]}
    assert text.request_for(PICTURES, [2, 1]) == {"prompt": ["two lizards", "a green dog"]}
    assert plain.request_for(PICTURES, [0]) == {}
    assert set(upsampler(num_classes=2).request_for(PICTURES, [0])) == {"image", "class_labels"}
    assert of_classes.unet_inputs(PICTURES, range(4))["class_labels"].tolist() == [0, 1, 1, 0]
    assert guided.unet_inputs(PICTURES, range(4)) == {}
    inputs = text.unet_inputs(PICTURES, range(4))
    alone, mask = text.encode_prompt(["two lizards"])
    of_it = inputs["encoder_hidden_states"][2][inputs["encoder_attention_mask"][2].bool()]
    torch.testing.assert_close(of_it, alone[0][mask[0].bool()], atol=1e-5, rtol=0)


def test_an_upsampler_is_asked_to_enlarge_images_made_small():
    images = torch.randint(0, 256, (3, 8, 12, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    pictures = PictureDataset([Image.fromarray(image.numpy()) for image in images], "three")
    small = shrink(images.permute(0, 3, 1, 2) / 127.5 - 1, 4)
    request = upsampler().request_for(pictures, [2, 0])
    torch.testing.assert_close(torch.stack(request["image"]), small[[2, 0]] / 2 + 0.5)
    inputs = upsampler().unet_inputs(pictures, range(3))
    torch.testing.assert_close(inputs["conditioning_image"], enlarge(small, 4))
