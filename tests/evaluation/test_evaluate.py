import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny import bars, randn, tiny_unet

from hf_genmod import (
    AncestralDDPMScheduler,
    ClassifierFreeGuidedPipeline,
    SuperResolutionPipeline,
    UnconditionalPipeline,
)
from hf_genmod.data.picture_dataset import PictureDataset
from hf_genmod.drawing.grids import draw_steps
from hf_genmod.evaluation.comparison import audit, evaluate_features
from hf_genmod.evaluation.distances import frechet_distance, kernel_distance
from hf_genmod.evaluation.evaluate import draw_figures
from hf_genmod.evaluation.features import as_bytes, extract_features, train_feature_classifier
from hf_genmod.evaluation.neighbours import nearest_of, neighbourhoods
from hf_genmod.evaluation.report import Report
from hf_genmod.models.conditioning import enlarge, shrink


def test_the_figure_shows_the_closest_samples_above_the_pictures_that_they_copy(tmp_path):
    rng = torch.Generator().manual_seed(0)
    real, held_out, fresh = torch.randint(0, 256, (3, 200, 3, 8, 8), generator=rng, dtype=torch.uint8)
    images = torch.cat([fresh[:170], real[50:80]])

    def look(pictures):
        return pictures.flatten(1).float()

    apart = {"pixels": nearest_of(look(held_out), look(real))[0]}
    result = audit({"pixels": (look(images), look(real))}, apart, images, real, tmp_path / "closest.png")
    assert result["pixels"]["flagged"] and result["pixels"]["share"].count == 200
    figure = Image.open(tmp_path / "closest_pixels.png")
    above, below = (figure.crop((0, y, figure.width, y + 96)) for y in (20, 140))  # below the name of each row
    assert above.tobytes() == below.tobytes()


def test_the_figure_of_steps_has_the_numbers_that_were_asked_for(tmp_path):
    pipe = UnconditionalPipeline(tiny_unet(), AncestralDDPMScheduler())
    pipe.set_progress_bar_config(disable=True)
    settings = [{"num_inference_steps": 3}, {"num_inference_steps": 2}]
    draw_figures(pipe, Report("model", {}, "features", 0, settings), settings[0], {}, None, tmp_path)
    assert Image.open(tmp_path / "steps.png").tobytes() == draw_steps(pipe, {}, {}, steps=(2, 3)).tobytes()


def test_the_figure_of_steps_shows_several_classes(tmp_path):
    unet, settings = tiny_unet(num_classes=2), [{"num_inference_steps": 3}, {"num_inference_steps": 2}]
    pipe = ClassifierFreeGuidedPipeline(unet, AncestralDDPMScheduler(), id2label={0: "cat", 1: "dog"})
    pipe.set_progress_bar_config(disable=True)
    report, request = Report("model", {}, "features", 0, settings), {"class_labels": [1, 1, 1, 1, 0]}
    draw_figures(pipe, report, settings[0], request, None, tmp_path)
    expected = draw_steps(pipe, {"class_labels": [1, 0, 1, 1]}, {"guidance_scale": [1.0, 2.0, 4.0]}, steps=(2, 3))
    assert Image.open(tmp_path / "steps.png").tobytes() == expected.tobytes()


def test_an_upsampler_sees_images_made_small_and_enlarged_by_interpolation():
    images = torch.randint(0, 256, (3, 8, 12, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    pictures = PictureDataset([Image.fromarray(image.numpy()) for image in images], "three")
    small = shrink(images.permute(0, 3, 1, 2) / 127.5 - 1, 4)
    unet = tiny_unet(conditioning_channels=3)
    pipeline = SuperResolutionPipeline(unet, AncestralDDPMScheduler(), factor=4, max_noise_level=200)
    interpolated = as_bytes(pipeline.unet_inputs(pictures, [1])["conditioning_image"])
    expected = (enlarge(small[1:2], 4).clamp(-1, 1) + 1) * 127.5
    assert interpolated.dtype == torch.uint8
    assert (interpolated - expected).abs().max() <= 0.51


def test_features_are_evaluated_as_their_parts_are():
    generated, real = randn(40, 5), randn(100, 5, seed=1) + 0.2
    metrics = evaluate_features(generated, real)
    assert metrics["frechet_distance"].value == frechet_distance(generated, real)
    assert metrics["frechet_distance"].low < metrics["frechet_distance"].value < metrics["frechet_distance"].high
    some = real[torch.randperm(100, generator=torch.Generator().manual_seed(0))[:40]]
    assert metrics["kernel_distance"].value == kernel_distance(generated, some)
    for name, value in neighbourhoods(some, generated).items():
        assert metrics[name] == value


def test_measures_that_need_more_images_are_left_out():
    assert "frechet_distance" in evaluate_features(randn(12, 5), randn(6, 5, seed=1))
    for n, m in ((11, 12), (12, 5)):
        some = {"kernel_distance", "precision", "recall", "density", "coverage"}
        if m > 5:
            assert set(evaluate_features(randn(n, 5), randn(m, 5, seed=1))) == some
        else:
            with pytest.raises(ValueError, match="give .n, d. of at least 6 images"):
                evaluate_features(randn(n, 5), randn(m, 5, seed=1))


def test_worse_pictures_are_told_from_better():
    classifier = train_feature_classifier(*bars(256), num_classes=2, max_train_steps=40, batch_size=32)
    images = bars(150, seed=4)[0]
    blurred = F.avg_pool2d(images.float(), 5, stride=1, padding=2).byte()
    good, bad, real = (extract_features(x, classifier) for x in (images, blurred, bars(300, seed=3)[0]))
    good, bad = (evaluate_features(features, real) for features in (good, bad))
    for name in ("frechet_distance", "kernel_distance"):
        assert good[name].high < bad[name].low
    for name in ("precision", "density", "coverage"):
        assert good[name].value > bad[name].value
