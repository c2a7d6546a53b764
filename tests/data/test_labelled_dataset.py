"""What data sets of pixels, measured values and latents have in common: x_0, copies, what was held out."""

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from tiny import tiny_autoencoder

from hf_genmod import VariationalAutoencoder
from hf_genmod.data.labelled_dataset import Captions
from hf_genmod.data.latents import LatentDataset, draw_latents
from hf_genmod.data.picture_dataset import PictureDataset
from hf_genmod.data.randomness import Augmentation, BatchRandom, flip, shift
from hf_genmod.data.value_range import to_model_range


def of_pixels(n=10, **kwargs):
    pixels = np.random.default_rng(0).integers(256, size=(n, 8, 8, 3), dtype=np.uint8)
    return PictureDataset([Image.fromarray(image) for image in pixels], "noise", channels=3, **kwargs)


def measured(n=10):
    planes = np.random.default_rng(0).uniform(200, 300, size=(n, 8, 8)).astype(np.float32)
    return PictureDataset([Image.fromarray(plane) for plane in planes], "measured"), torch.from_numpy(planes)[:, None]


def of_latents(mirrored=False, pictures=None, **config):
    vae = tiny_autoencoder(VariationalAutoencoder, scaling_factor=0.7, shift_factor=0.3, **config)
    return LatentDataset(pictures or of_pixels(), vae, mirrored)


def rng():
    return BatchRandom(3, 5, range(4), 4)


INDICES = [3, 0, 9, 4]


def test_captions_are_a_sequence_whatever_chunks_they_lie_in():
    texts = [f"picture {i}" for i in range(7)]
    captions = Captions(pa.chunked_array([texts[:3], [], texts[3:]]))
    assert captions == texts and [*captions] == texts and len(captions) == 7
    assert captions[4] == texts[4] and captions[-1] == texts[-1] and captions[2:5] == texts[2:5]
    part = captions.select([6, 0, 6])
    assert part == [texts[6], texts[0], texts[6]] and part.select([]) == []
    assert Captions(pa.chunked_array([[["a", "b"], ["c"]]])) == [["a", "b"], ["c"]]
    with pytest.raises(IndexError):
        captions[7]


class TestX0:
    @pytest.mark.parametrize("in_memory", [True, False])
    def test_of_pixels_is_their_batch_in_the_range_of_the_models(self, in_memory):
        data = of_pixels(in_memory=in_memory)
        batch = data.__getitems__(INDICES)
        assert batch["images"].dtype == torch.uint8
        x_0 = data.x_0(INDICES)
        assert x_0.dtype == torch.float32 and torch.equal(x_0, data.x_0(batch))
        assert torch.equal(x_0, data.x_0(torch.tensor(INDICES)))
        assert torch.equal(x_0, to_model_range(batch["images"]))

    def test_of_measured_values_is_mapped_once(self):
        data, planes = measured()
        x_0 = data.x_0(INDICES)
        assert torch.equal(x_0, data.x_0(data.__getitems__(INDICES)))
        assert torch.equal(x_0, to_model_range(planes[INDICES], data.value_range))

    def test_of_pixels_is_mirrored_and_then_moved_by_the_numbers_of_the_step(self):
        data, plain = of_pixels(), of_pixels().x_0(INDICES)
        assert torch.equal(data.x_0(INDICES, rng()), plain)
        assert torch.equal(data.x_0(INDICES, rng(), Augmentation(mirror=True)), flip(plain, rng()))
        assert torch.equal(data.x_0(INDICES, rng(), Augmentation(max_shift=2)), shift(plain, rng(), 2))
        both, numbers = data.x_0(INDICES, rng(), Augmentation(True, 2)), rng()
        assert torch.equal(both, shift(flip(plain, numbers), numbers, 2)) and not torch.equal(both, plain)
        assert torch.equal(data.x_0(INDICES, augment=Augmentation(True, 2)), plain)  # without random numbers

    @pytest.mark.parametrize("mirror", [False, True])
    def test_of_latents_is_drawn_by_the_numbers_of_the_step_or_is_the_mean(self, mirror):
        data = of_latents(mirrored=True)
        batch = data.__getitems__(INDICES)
        augment = Augmentation(mirror=mirror)
        expected = draw_latents(batch["posteriors"], rng(), mirror)
        assert torch.equal(data.x_0(batch, rng(), augment), expected)
        assert torch.equal(data.x_0(INDICES, rng(), augment), expected)
        assert torch.equal(data.x_0(INDICES, augment=augment), batch["posteriors"][:, 0, 0])


def test_latents_can_be_mirrored_only_if_the_mirror_images_were_encoded_and_never_moved():
    of_pixels().check_augmentation(Augmentation(True, 3))
    for mirrored in (False, True):
        latents = of_latents(mirrored)
        latents.check_augmentation(Augmentation())
        with pytest.raises(ValueError, match="max_shift: latents cannot be moved by pixels"):
            latents.check_augmentation(Augmentation(max_shift=1))
    latents.check_augmentation(Augmentation(mirror=True))
    with pytest.raises(ValueError, match="horizontal_flip: the mirrored images were not encoded"):
        of_latents().check_augmentation(Augmentation(mirror=True))


def test_a_copy_with_another_value_range_maps_by_it_and_is_known_by_it():
    data, planes = measured()
    own, fingerprint, other = data.value_range, data.fingerprint, {"low": [100.0], "high": [500.0]}
    copy = data.with_value_range(other)
    assert torch.equal(copy.x_0(INDICES), to_model_range(planes[INDICES], other)) and copy.value_range == other
    assert (data.value_range, data.fingerprint) == (own, fingerprint) != (other, copy.fingerprint)
    assert data.with_value_range(dict(own)).fingerprint == fingerprint
    assert data.with_value_range({"low": [100.0], "high": [501.0]}).fingerprint != copy.fingerprint
    fingerprints = {of_latents(False, pictures, in_channels=1).fingerprint for pictures in (data, copy)}
    assert len(fingerprints) == 2


def test_held_out_images_may_have_been_trained_on():
    data = of_pixels()
    held_out = data.hold_out(2)
    assert held_out.may_have_been_trained_on and not data.may_have_been_trained_on
    assert of_latents(pictures=held_out).may_have_been_trained_on and not of_latents().may_have_been_trained_on
    assert held_out.with_value_range(None).may_have_been_trained_on


@pytest.mark.parametrize("make", [of_pixels, of_latents])
def test_a_copy_with_other_labels_or_captions_leaves_the_data_set_alone(make):
    data = make()
    labels, captions = torch.arange(10) % 2, [f"image {i}" for i in range(10)]
    labelled, captioned = data.with_labels(labels, ["a", "b"]), data.with_captions(captions)
    batch = labelled.__getitems__([3, 4])
    assert batch["class_labels"].tolist() == [1, 0] and labelled.label_names == ["a", "b"]
    assert captioned.__getitems__([3, 4])["captions"] == ["image 3", "image 4"]
    assert data.labels is data.captions is captioned.labels is labelled.captions is None
    assert torch.equal(labelled.x_0([3, 4]), data.x_0([3, 4]))
    others = data.with_labels(1 - labels, ["a", "b"]), data.with_labels(labels, ["b", "a"])
    assert len({copy.fingerprint for copy in (data, labelled, captioned, *others)}) == 5
    assert data.with_labels(labels, ["a", "b"]).fingerprint == labelled.fingerprint
