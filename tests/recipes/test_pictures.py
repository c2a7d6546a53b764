import dataclasses
import inspect
import json
import shutil
import warnings

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from small_shards import write_parquet
from tiny import tiny_autoencoder, tiny_text_pipeline, tiny_unet, tiny_vae

from hf_genmod import (
    AutoencoderPipeline,
    ClassifierFreeGuidedPipeline,
    UnconditionalPipeline,
)
from hf_genmod.data.latents import CachedLatents, LatentDataset, StreamedLatents, encode
from hf_genmod.data.loading import load_pictures
from hf_genmod.data.picture_dataset import PictureDataset
from hf_genmod.data.stream import StreamedPictures, stream_pictures
from hf_genmod.recipes.pictures import CaptionedDataArguments, DataArguments, MeasuredDataArguments
from hf_genmod.schedulers.ancestral_ddpm import AncestralDDPMScheduler


def save_class_folders(folder, **counts):
    for split, count in counts.items():
        for index in range(count):
            file = folder / split / "ab"[index % 2] / f"{index:03}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (4, 4), index % 256).save(file)


def test_held_out_pictures_of_a_stream_are_in_memory(tmp_path):
    write_parquet(tmp_path / "both", (50, 25))
    write_parquet(tmp_path / "test", (20,))
    arguments = {"dataset": str(tmp_path / "both"), "streaming": True}
    training, held_out = DataArguments(**arguments).load(hold_out=True, require_labels=True)
    assert isinstance(training, StreamedPictures) and (len(training), len(held_out)) == (67, 8)
    assert held_out.images is not None and held_out.may_have_been_trained_on
    training, held_out = DataArguments(**arguments).load()
    assert len(training) == 75 and held_out is None
    shutil.move(tmp_path / "test" / "train-00000-of-00001.parquet", tmp_path / "both" / "test-00000-of-00001.parquet")
    training, held_out = DataArguments(**arguments).load(require_labels=True)
    assert (len(training), len(held_out)) == (75, 20) and not held_out.may_have_been_trained_on
    assert len(DataArguments(**arguments).load(num_held_out=3)[1]) == 3
    measured, held_out = MeasuredDataArguments(**arguments).load(require_labels=True)
    assert type(measured) is type(held_out) is PictureDataset and len(measured) == 75
    with pytest.raises(ValueError, match="validation_split: .* has no 'x' beside 'train'; it has 'test'"):
        DataArguments(**arguments, validation_split="x").load()


def test_held_out_pictures_are_those_of_the_test_split(tmp_path):
    save_class_folders(tmp_path, train=6, test=300)
    training, held_out = DataArguments(dataset=str(tmp_path)).load(require_labels=True)
    assert len(training) == 6 and len(held_out) == 256  # at even distances
    assert held_out.images[:8, 0, 0, 0].tolist() == [0, 2, 4, 6, 8, 10, 14, 16]  # of class a, which has the even ones
    training, held_out = DataArguments(dataset=str(tmp_path), split="test", validation_split="train").load()
    assert (len(training), len(held_out)) == (300, 6)
    assert DataArguments(dataset=str(tmp_path / "train")).load()[1] is None


def test_a_model_is_measured_on_the_data_set_of_its_run(tmp_path):
    trained = CaptionedDataArguments("photos", resolution="8", channels=1, split="all", on_bad_image="skip")
    sections = {"arguments": {"data": dataclasses.asdict(trained)}, "pictures": {"name": "photos"}}
    (tmp_path / "training_config.json").write_text(json.dumps(sections))
    measured = MeasuredDataArguments(split="new").of_run(str(tmp_path))
    assert measured == MeasuredDataArguments("photos", split="new", on_bad_image="skip")  # at the size of the model
    assert MeasuredDataArguments("shapes").of_run(str(tmp_path)) == MeasuredDataArguments("shapes")
    with pytest.raises(ValueError, match="^dataset: user/model does not say on what it was trained; give --dataset$"):
        MeasuredDataArguments().of_run("user/model")


@pytest.mark.parametrize("split", ["train", "validation"])
def test_images_that_are_held_out_are_of_another_split(tmp_path, split):
    save_class_folders(tmp_path, train=2, test=2)
    with pytest.raises(ValueError, match=f"validation_split: .* has no '{split}' beside 'train'; it has 'test'$"):
        DataArguments(dataset=str(tmp_path), validation_split=split).load()


def test_the_files_are_found_once(tmp_path):
    save_class_folders(tmp_path, train=2, test=2)
    (tmp_path / "train" / "notes.pdf").write_text("")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        training, held_out = DataArguments(dataset=str(tmp_path)).load()
    assert (len(training), len(held_out)) == (2, 2)
    assert ["notes.pdf" in str(warning.message) for warning in caught] == [True]


def test_held_out_pictures_are_mapped_as_the_others_are(tmp_path):
    for split, value in (("train", 1.0), ("test", 3.0)):
        (tmp_path / split).mkdir()
        np.save(tmp_path / split / "0.npy", np.array([[0.0, value]]))
    training, held_out = DataArguments(dataset=str(tmp_path)).load()
    assert training[0]["images"].tolist() == [[[-1.0, 1.0]]] and held_out[0]["images"].tolist() == [[[-1.0, 5.0]]]


def test_held_out_pictures_of_other_classes_are_refused(tmp_path):
    save_class_folders(tmp_path, train=4)
    rows = [{"image": Image.new("L", (4, 4)), "label": 0}] * 2
    for split, names in (("train", ["a", "b"]), ("test", ["a", "c"])):
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
        saved = datasets.Dataset.from_list(rows, features=features)
        saved.save_to_disk(tmp_path / "saved" / split)
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(ValueError, match="the classes of 'test' are not those of 'train'"):
        DataArguments(dataset=str(tmp_path / "saved")).load(require_labels=True)


def test_a_test_split_without_labels_is_not_held_out(tmp_path):
    save_class_folders(tmp_path, train=20)
    (tmp_path / "test").mkdir()
    Image.new("L", (4, 4)).save(tmp_path / "test" / "0.png")
    assert len(DataArguments(dataset=str(tmp_path)).load()[1]) == 1
    with pytest.warns(UserWarning, match=r"\(test\): its images have no labels, so they are not held out"):
        training, held_out = DataArguments(dataset=str(tmp_path)).load(require_labels=True)
    assert len(training) == 20 and held_out is None
    with pytest.raises(ValueError, match="1 of 1 image, such as"):
        DataArguments(dataset=str(tmp_path), validation_split="test").load(require_labels=True)


def test_where_there_is_no_held_out_split_a_tenth_is_held_out_on_demand(tmp_path):
    save_class_folders(tmp_path / "few", train=45)
    training, held_out = DataArguments(dataset=str(tmp_path / "few")).load(hold_out=True)
    assert (len(training), len(held_out)) == (40, 5)
    training, held_out = DataArguments(dataset=str(tmp_path / "few")).load(num_held_out=3, hold_out=True)
    assert (len(training), len(held_out)) == (42, 3)
    save_class_folders(tmp_path / "both", train=45, test=10)
    training, held_out = DataArguments(dataset=str(tmp_path / "both")).load(hold_out=True)
    assert (len(training), len(held_out)) == (45, 10)


def test_a_class_without_pictures_to_train_on_is_named(tmp_path):
    save_class_folders(tmp_path, train=4, test=6)
    (tmp_path / "test" / "c").mkdir()
    (tmp_path / "test" / "b" / "001.png").rename(tmp_path / "test" / "c" / "001.png")
    with pytest.warns(UserWarning, match="there is no image of c, so the model cannot learn it"):
        training, _ = DataArguments(dataset=str(tmp_path)).load(require_labels=True)
    assert training.label_names == ["a", "b", "c"]


LABELLED = {"hold_out": True, "require_labels": True}


class TestPicturesForAModel:
    @pytest.fixture
    def folder(self, tmp_path):
        save_class_folders(tmp_path / "pictures", train=20)
        return str(tmp_path / "pictures")

    def test_come_as_its_network_sees_them(self, folder):
        model = UnconditionalPipeline(tiny_unet(sample_size=(16, 8)), AncestralDDPMScheduler())
        training, held_out = DataArguments(dataset=folder).training_pictures_for(model, **LABELLED)
        for pictures, count in ((training, 18), (held_out, 2)):
            assert (len(pictures), pictures.resolution, pictures.channels) == (count, (16, 8), 3)
            assert pictures.label_names == ["a", "b"]

    def test_of_measured_values_are_mapped_as_its_own_were(self, tmp_path):
        for i in range(20):
            (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
            np.save(tmp_path / "ab"[i % 2] / f"{i}.npy", np.full((5, 8, 8), float(i)))
        ranges = {"low": [0.0] * 5, "high": [100.0] * 5}
        model = UnconditionalPipeline(
            tiny_unet(in_channels=5, out_channels=5), AncestralDDPMScheduler(), value_range=ranges
        )
        training, held_out = DataArguments(dataset=str(tmp_path)).training_pictures_for(model, **LABELLED)
        seen = [pictures.x_0(range(len(pictures)))[:, 0, 0, 0] for pictures in (training, held_out)]
        values = {round(value, 4) for value in torch.cat(seen).tolist()}
        assert values == {round(2 * i / 100 - 1, 4) for i in range(20)}
        plain = UnconditionalPipeline(tiny_unet(), AncestralDDPMScheduler())
        with pytest.raises(ValueError, match="it holds measured values of 5 channels, which stay as they are"):
            DataArguments(dataset=str(tmp_path)).training_pictures_for(plain, **LABELLED)
        of_three = {"low": [0.0] * 3, "high": [100.0] * 3}
        other = UnconditionalPipeline(tiny_unet(), AncestralDDPMScheduler(), value_range=of_three)
        with pytest.raises(ValueError, match="trained on images of 3 channels, and these have 5"):
            DataArguments(dataset=str(tmp_path)).training_pictures_for(other, **LABELLED)

    def test_of_8_bits_do_not_do_for_measured_values(self, folder):
        ranges = {"low": [0.0] * 5, "high": [1.0] * 5}
        unet = tiny_unet(in_channels=5, out_channels=5)
        model = UnconditionalPipeline(unet, AncestralDDPMScheduler(), value_range=ranges)
        with pytest.raises(ValueError, match="dataset: the model was trained on measured values, and these are not"):
            DataArguments(dataset=folder).training_pictures_for(model, **LABELLED)

    @pytest.mark.parametrize(
        "arguments",
        [{"resolution": "16"}, {"channels": 1}],
    )
    def test_of_another_size_are_refused(self, folder, arguments):
        model = UnconditionalPipeline(tiny_unet(), AncestralDDPMScheduler())
        data = DataArguments(dataset=folder, **arguments)
        for load in (data.training_pictures_for, data.evaluation_pictures):
            with pytest.raises(ValueError, match="resolution: the model is for 8x8 images of 3 channels"):
                load(model)

    def test_of_other_labels_are_refused(self, folder):
        model = ClassifierFreeGuidedPipeline(
            tiny_unet(num_classes=2), AncestralDDPMScheduler(), id2label={0: "a", 1: "c"}
        )
        with pytest.raises(
            ValueError, match="dataset: the labels of the model are a, c, and those of the images a, b"
        ):
            DataArguments(dataset=folder).training_pictures_for(model, **LABELLED)

    def test_of_an_autoencoder_there_are_none(self, folder):
        with pytest.raises(ValueError, match="the model is an autoencoder and no diffusion model"):
            DataArguments(dataset=folder).training_pictures_for(AutoencoderPipeline(tiny_autoencoder()))

    def test_may_be_of_other_classes_or_none(self, folder, tmp_path):
        model = ClassifierFreeGuidedPipeline(
            tiny_unet(num_classes=2), AncestralDDPMScheduler(), id2label={0: "x", 1: "y"}
        )
        more, held_out = DataArguments(dataset=folder).training_pictures_for(model)
        assert held_out is None
        assert more.label_names == ["a", "b"] and (more.channels, *more.resolution) == (3, 8, 8)
        (tmp_path / "alone").mkdir()
        Image.new("RGB", (20, 10), "red").save(tmp_path / "alone" / "red.png")
        alone, _ = DataArguments(dataset=str(tmp_path / "alone")).training_pictures_for(model)
        assert alone.labels is None and len(alone) == 1

    def test_held_out_images_that_nobody_asks_for_are_not_even_read(self, tmp_path):
        save_class_folders(tmp_path, train=20, test=4)
        (tmp_path / "test" / "a" / "000.png").write_bytes(b"no image")
        model = UnconditionalPipeline(tiny_unet(), AncestralDDPMScheduler())
        training, held_out = DataArguments(dataset=str(tmp_path)).training_pictures_for(model)
        assert len(training) == 20 and held_out is None
        with pytest.raises(ValueError, match="000.png"):
            DataArguments(dataset=str(tmp_path)).training_pictures_for(model, hold_out=True)


class TestPicturesForAnEvaluation:
    def test_are_those_that_the_pipeline_is_asked_by(self, tmp_path):
        save_class_folders(tmp_path / "classes", train=20)
        (tmp_path / "bare").mkdir()
        Image.new("L", (4, 4)).save(tmp_path / "bare" / "one.png")
        labelled, plain = (
            DataArguments(dataset=str(tmp_path / "classes")),
            DataArguments(dataset=str(tmp_path / "bare")),
        )
        names, scheduler = {0: "a", 1: "b"}, AncestralDDPMScheduler()
        model = ClassifierFreeGuidedPipeline(tiny_unet(num_classes=2), scheduler, id2label=names)
        training, held_out = labelled.evaluation_pictures(model)
        assert (len(training), len(held_out), training.resolution, training.channels) == (18, 2, (8, 8), 3)
        other = ClassifierFreeGuidedPipeline(tiny_unet(num_classes=2), scheduler, id2label={0: "a", 1: "c"})
        with pytest.raises(ValueError, match="dataset: the labels of the model are a, c, and"):
            labelled.evaluation_pictures(other)
        with pytest.raises(ValueError, match="label"):
            plain.evaluation_pictures(model)
        with pytest.raises(ValueError, match="caption"):
            labelled.evaluation_pictures(tiny_text_pipeline())


def test_the_fields_are_parameters_of_the_loader():
    fields = {field.name for field in dataclasses.fields(CaptionedDataArguments)}
    for load in (load_pictures, stream_pictures):
        assert fields - {"validation_split", "streaming", "cache_latents"} < set(inspect.signature(load).parameters)


def colored_folder(folder, size=(8, 12), **counts):
    rng = np.random.default_rng(0)
    for split, count in counts.items():
        for index in range(count):
            file = folder / split / "ab"[index % 2] / f"{index:03}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(256, size=(*size, 3), dtype=np.uint8)).save(file)
    return str(folder)


class TestLatents:
    @pytest.fixture
    def vae(self):
        return tiny_autoencoder(sample_size=(8, 12), in_channels=1)

    def test_have_the_size_and_channels_of_the_autoencoder_and_factors_of_the_training_pictures(self, vae, tmp_path):
        AutoencoderPipeline(vae).save_pretrained(tmp_path / "vae")
        folder = colored_folder(tmp_path / "pictures", (20, 10), train=40, test=7)
        arguments = DataArguments(dataset=folder, channels=1)
        training, held_out = arguments.load(require_labels=True, vae=str(tmp_path / "vae"))
        for latents, count in ((training, 40), (held_out, 7)):
            assert (latents.pictures.resolution, latents.pictures.channels) == ((8, 12), 1)
            assert (len(latents), latents.resolution, latents.channels) == (count, (4, 6), 2)
            assert latents.label_names == ["a", "b"] and not latents.mirrored
        assert held_out.vae is training.vae
        mean, std = training.__getitems__(range(40))["posteriors"].double().unbind(2)
        assert abs(mean.mean().item()) < 1e-4
        assert (mean**2 + std**2).mean().item() == pytest.approx(1, abs=1e-3)
        both = arguments.load(vae=str(tmp_path / "vae"), mirrored=True)
        assert all(latents.mirrored for latents in both)
        only = DataArguments(dataset=f"{folder}/train", channels=1)
        assert only.load(vae=str(tmp_path / "vae"))[1] is None

    def test_of_a_stream_are_encoded_in_each_step_or_on_demand_once(self, tmp_path):
        vae = tiny_autoencoder(sample_size=(16, 16))
        vae.save_pretrained(tmp_path / "vae")
        shards = write_parquet(tmp_path / "shards", (20,))
        arguments = DataArguments(dataset=str(shards), streaming=True)
        assert type(arguments.load(str(tmp_path / "vae"))[0]) is StreamedLatents
        arguments.cache_latents = True
        assert type(arguments.load(str(tmp_path / "vae"))[0]) is CachedLatents
        unet = tiny_unet(in_channels=2, out_channels=2, sample_size=(8, 8))
        pipeline = UnconditionalPipeline(unet, AncestralDDPMScheduler(clip_sample=False), vae)
        latents = arguments.training_pictures_for(pipeline, **LABELLED)
        assert [(type(part), len(part)) for part in latents] == [(CachedLatents, 18), (LatentDataset, 2)]
        assert type(arguments.evaluation_pictures(pipeline)[0]) is StreamedPictures
        pixels = UnconditionalPipeline(tiny_unet(sample_size=(16, 16)), AncestralDDPMScheduler())
        for load in (arguments.load, lambda: arguments.training_pictures_for(pixels)):
            with pytest.raises(ValueError, match="cache_latents: there is no autoencoder to encode the images"):
                load()
        arguments.streaming = False
        with pytest.raises(ValueError, match="cache_latents: only a stream is encoded in each step; leave it out, or"):
            arguments.load(str(tmp_path / "vae"))

    def test_of_shifted_images_are_refused_before_any_is_read(self, vae, tmp_path):
        vae.save_pretrained(tmp_path / "vae")
        model = UnconditionalPipeline(tiny_unet(in_channels=2, out_channels=2), AncestralDDPMScheduler(), vae)
        for options in ({}, {"streaming": True, "cache_latents": True}):
            data = DataArguments(dataset=str(tmp_path / "missing"), **options)
            for load, of in ((data.load, str(tmp_path / "vae")), (data.training_pictures_for, model)):
                with pytest.raises(ValueError, match="max_shift: latents cannot be moved by pixels; shift the images"):
                    load(of, max_shift=1)
        shards = write_parquet(tmp_path / "shards", (20,))
        tiny_autoencoder(sample_size=(16, 16)).save_pretrained(tmp_path / "large")
        stream = DataArguments(dataset=str(shards), streaming=True)
        assert type(stream.load(str(tmp_path / "large"), max_shift=1)[0]) is StreamedLatents

    def test_may_be_of_another_size_than_the_autoencoder_was_made_for(self, vae, tmp_path):
        vae.save_pretrained(tmp_path / "vae")
        folder = colored_folder(tmp_path / "pictures", train=4)
        training, _ = DataArguments(dataset=folder, resolution="16x20", channels=1).load(vae=str(tmp_path / "vae"))
        assert training.resolution == (8, 10)
        for arguments, message in (
            ({"resolution": "9", "channels": 1}, "resolution 9x9: .* such as 8x8 or 10x10"),
            ({"channels": 3}, "vae: it takes images of 1 channel, and these have 3"),
            ({}, "vae: it is for grey images, and some of .* are stored in colour; .* give --channels 1"),
        ):
            with pytest.raises(ValueError, match=message):
                DataArguments(dataset=folder, **arguments).load(vae=str(tmp_path / "vae"))

    def test_of_an_autoencoder_of_diffusers_have_the_size_of_the_data(self, tmp_path):
        tiny_vae().save_pretrained(tmp_path / "vae")  # its sample_size is 32, whatever it was trained on
        folder = colored_folder(tmp_path / "pictures", train=4)
        training, _ = DataArguments(dataset=folder).load(vae=str(tmp_path / "vae"))
        assert (training.pictures.resolution, training.resolution) == ((8, 12), (4, 6))

    def test_of_grey_pictures_may_be_those_of_an_autoencoder_of_coloured_ones(self, tmp_path):
        tiny_vae().save_pretrained(tmp_path / "vae")
        (tmp_path / "greys").mkdir()
        for i in range(4):
            Image.new("L", (12, 8), 60 * i).save(tmp_path / "greys" / f"{i}.png")
        training, _ = DataArguments(dataset=str(tmp_path / "greys")).load(vae=str(tmp_path / "vae"))
        assert training.pictures.channels == 3

    def test_of_measured_values_are_in_the_units_of_the_autoencoder(self, vae, tmp_path):
        (tmp_path / "values").mkdir()
        for i in range(4):
            np.save(tmp_path / "values" / f"{i}.npy", np.linspace(0, 30, 96).reshape(8, 12))
        ranges = {"low": [0.0], "high": [60.0]}
        AutoencoderPipeline(vae, ranges).save_pretrained(tmp_path / "vae")
        vae.save_pretrained(tmp_path / "alone")
        data = DataArguments(dataset=str(tmp_path / "values"))
        latents, _ = data.load(vae=str(tmp_path / "vae"))
        assert latents.value_range == ranges
        seen = latents.pictures.x_0([0])
        torch.testing.assert_close(seen.flatten(), torch.linspace(-1, 0, 96))
        with pytest.raises(ValueError, match="vae: it was trained on images of 8 bits, and these are not"):
            data.load(vae=str(tmp_path / "alone"))

    def test_for_a_classifier_are_those_that_the_model_was_trained_on(self, vae, tmp_path):
        vae.register_to_config(scaling_factor=0.5, shift_factor=-0.25)
        unet = tiny_unet(in_channels=2, out_channels=2, sample_size=(4, 6))
        pipeline = UnconditionalPipeline(unet, AncestralDDPMScheduler(clip_sample=False), vae)
        folder = colored_folder(tmp_path, (20, 10), train=20)
        for latents, count in zip(
            DataArguments(dataset=folder).training_pictures_for(pipeline, **LABELLED), (18, 2), strict=True
        ):
            assert isinstance(latents, LatentDataset) and latents.vae is vae and len(latents) == count
            x = latents.pictures.x_0([1])
            assert x.shape == (1, 1, 8, 12)
            mean, std = encode(vae, x).unbind(1)
            expected = torch.stack([(mean + 0.25) * 0.5, std * 0.5], dim=1)[:, None]
            torch.testing.assert_close(latents.__getitems__([1])["posteriors"], expected, rtol=1e-4, atol=1e-5)
        with pytest.raises(ValueError, match="resolution: the model is for 8x12 images of 1 channel,"):
            DataArguments(dataset=folder, resolution="8").training_pictures_for(pipeline)
