import dataclasses

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from PIL import Image
from tiny import bars, randn, tiny_autoencoder, tiny_classifier, tiny_text_pipeline, tiny_unet

from hf_genmod import (
    AncestralDDPMScheduler,
    Autoencoder,
    AutoencoderPipeline,
    ClassifierFreeGuidedPipeline,
    ClassifierGuidedPipeline,
    FewStepDDPMScheduler,
    SuperResolutionPipeline,
    UnconditionalPipeline,
)
from hf_genmod.data.picture_dataset import PictureDataset
from hf_genmod.evaluation.distances import frechet_distance, kernel_distance
from hf_genmod.evaluation.estimates import Estimate, Share
from hf_genmod.evaluation.features import FeatureClassifier, extract_features, train_feature_classifier
from hf_genmod.evaluation.neighbours import nearest_of, neighbourhoods
from hf_genmod.evaluation.report import Report, evaluate_features
from hf_genmod.evaluation.settings import (
    audit,
    enlarged_by_interpolation,
    make_sampler,
    recognised,
    settings_of,
    what_the_unet_is_told,
    what_to_ask,
)
from hf_genmod.models.conditioning import enlarge, shrink

PICTURES = PictureDataset(
    [Image.new("RGB", (8, 8))] * 4,
    "four",
    labels=torch.tensor([0, 1, 1, 0]),
    label_names=["a", "b"],
    captions=["a red cat", ["a green dog", "a dog"], "two lizards", "a cat"],
)


def of_classes():
    return ClassifierFreeGuidedPipeline(tiny_unet(num_classes=2), AncestralDDPMScheduler())


def guided():
    return ClassifierGuidedPipeline(tiny_unet(), tiny_classifier(num_classes=2), AncestralDDPMScheduler())


def plain():
    return UnconditionalPipeline(tiny_unet(), AncestralDDPMScheduler())


def upsampler(**config):
    unet = tiny_unet(conditioning_channels=3, **config)
    return SuperResolutionPipeline(unet, AncestralDDPMScheduler(), factor=4, max_noise_level=200)


def test_settings_are_all_combinations_by_the_names_that_the_pipeline_takes():
    settings = settings_of(of_classes(), ["DDIMScheduler", "UniPCMultistepScheduler"], [5, 10], [1.0, 3.0])
    assert len({tuple(setting.items()) for setting in settings}) == 8
    assert settings[0] == {"sampler": "DDIMScheduler", "num_inference_steps": 5, "guidance_scale": 1.0}
    assert settings_of(guided(), [], [5], [2.0])[0]["classifier_scale"] == 2.0
    assert settings_of(plain(), [], [5], []) == [{"sampler": "AncestralDDPMScheduler", "num_inference_steps": 5}]
    variational, fitted = AutoencoderPipeline(tiny_autoencoder()), AutoencoderPipeline(tiny_autoencoder(Autoencoder))
    fitted.vae.fit_prior(torch.randn(50, *fitted.vae.latent_shape(8, 8)))
    assert settings_of(variational, [], [5], []) == [{"prior": "standard"}]
    assert settings_of(fitted, [], [5], []) == [{"prior": "fitted"}]
    with pytest.raises(ValueError, match="guidance_scales: a UnconditionalPipeline is not guided"):
        settings_of(plain(), [], [5], [2.0])
    levels = settings_of(upsampler(), [], [5], [], noise_levels=[0, 100])
    assert [setting["noise_level"] for setting in levels] == [0, 100]
    with pytest.raises(ValueError, match="guidance_scales: a SuperResolutionPipeline is not guided"):
        settings_of(upsampler(), [], [5], [2.0])
    assert settings_of(upsampler(num_classes=2), [], [5], [2.0])[0]["guidance_scale"] == 2.0
    with pytest.raises(ValueError, match="noise_levels: a UnconditionalPipeline is no upsampler"):
        settings_of(plain(), [], [5], [], noise_levels=[0])


def test_a_sampler_is_of_the_same_process():
    own = AncestralDDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    sampler = make_sampler("DDIMScheduler", own)
    assert isinstance(sampler, DDIMScheduler) and sampler.config.prediction_type == "v_prediction"
    torch.testing.assert_close(sampler.alphas_cumprod, own.alphas_cumprod)
    assert make_sampler("AncestralDDPMScheduler", own) is own
    few_steps = make_sampler("FewStepDDPMScheduler", own)
    assert type(few_steps) is FewStepDDPMScheduler
    assert type(make_sampler("AncestralDDPMScheduler", few_steps)) is AncestralDDPMScheduler
    for name in ("NoScheduler", "DDPMPipeline"):
        with pytest.raises(ValueError, match=f"samplers: '{name}' is no scheduler of diffusers"):
            make_sampler(name, own)


def test_a_pipeline_is_asked_by_what_it_knows():
    text = tiny_text_pipeline()
    assert what_to_ask(of_classes(), PICTURES, [1, 0, 1]) == {"class_labels": [1, 0, 1]}
    assert what_to_ask(text, PICTURES, [2, 1]) == {"prompt": ["two lizards", "a green dog"]}
    assert what_to_ask(plain(), PICTURES, [0]) == {}
    assert set(what_to_ask(upsampler(num_classes=2), PICTURES, [0])) == {"image", "class_labels"}
    assert what_the_unet_is_told(of_classes(), PICTURES)["class_labels"].tolist() == [0, 1, 1, 0]
    assert what_the_unet_is_told(guided(), PICTURES) == {}
    told = what_the_unet_is_told(text, PICTURES)
    alone, mask = text.encode_prompt(["two lizards"])
    of_it = told["encoder_hidden_states"][2][told["encoder_attention_mask"][2].bool()]
    torch.testing.assert_close(of_it, alone[0][mask[0].bool()], atol=1e-5, rtol=0)


def test_the_share_of_each_class_is_of_the_pictures_of_that_class():
    classifier = FeatureClassifier(1, 3).eval()
    images = torch.randint(0, 256, (60, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    with torch.no_grad():
        said = classifier(images / 127.5 - 1).argmax(dim=1)
    labels = said.clone()
    labels[:20] = (labels[:20] + 1) % 3
    found = recognised(classifier, images, labels, ["a", "b", "c"])
    assert found["recognised_share"] == Share.of(torch.arange(60) >= 20)
    for i, name in enumerate("abc"):
        if (labels == i).any():
            assert found["recognised_share_by_class"][name] == Share.of((said == labels)[labels == i])


def test_the_figure_shows_the_closest_samples_above_the_pictures_that_they_copy(tmp_path):
    rng = torch.Generator().manual_seed(0)
    real, held_out, fresh = torch.randint(0, 256, (3, 200, 3, 8, 8), generator=rng, dtype=torch.uint8)
    images = torch.cat([fresh[:170], real[50:80]])

    def look(pictures):
        return pictures.flatten(1).float()

    spaces = {"pixels": (look, look(real), nearest_of(look(held_out), look(real))[0])}
    result = audit(spaces, images, real, tmp_path / "closest.png")
    assert result["pixels"]["flagged"] and result["pixels"]["share"].count == 200
    figure = Image.open(tmp_path / "closest_pixels.png")
    above, below = (figure.crop((0, y, figure.width, y + figure.height // 2)) for y in (0, figure.height // 2))
    assert above.tobytes() == below.tobytes()


def test_an_upsampler_is_asked_to_enlarge_the_pictures_made_small():
    images = torch.randint(0, 256, (3, 8, 12, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    pictures = PictureDataset([Image.fromarray(image.numpy()) for image in images], "three")
    x = images.permute(0, 3, 1, 2) / 127.5 - 1
    small = shrink(x, 4)
    asked = what_to_ask(upsampler(), pictures, [2, 0])["image"]
    torch.testing.assert_close(torch.stack(asked), small[[2, 0]] / 2 + 0.5)
    told = what_the_unet_is_told(upsampler(), pictures)
    torch.testing.assert_close(told["conditioning_image"], enlarge(small, 4))
    interpolated = enlarged_by_interpolation(upsampler(), pictures, [1])
    expected = (enlarge(small[1:2], 4).clamp(-1, 1) + 1) * 127.5
    assert interpolated.dtype == torch.uint8
    assert (interpolated - expected).abs().max() <= 0.51


def test_a_report_is_read_as_it_was_saved(tmp_path):
    hits, values = torch.arange(9) > 3, torch.arange(9.0)
    share, estimate = Share.of(hits), Estimate.of(values)
    report = Report(
        model="a",
        dataset={"name": "b", "num_pictures": 9, "held_out_is_unseen": True},
        features="c",
        seed=0,
        settings=[
            {
                "sampler": "DDIMScheduler",
                "guidance_scale": 2.0,
                "seconds": estimate,
                "forward_passes": 4.0,
                "frechet_distance": estimate,
                "density": estimate,
                "precision": share,
                "recognised_share_by_class": {"density": share, "share": share},
                "memorisation": {"pixels": {"threshold": 0.5, "share": share, "flagged": False}},
            }
        ],
        held_out={"coverage": share},
        bits_per_dimension={"variational bound": estimate},
    )
    assert Report.read(tmp_path / "report") is None
    report.save(tmp_path / "report")
    text = (tmp_path / "report" / "evaluation.json").read_text()
    assert "interpolated" not in text and '"low"' in text
    assert Report.read(tmp_path / "report") == report
    interpolated = dataclasses.replace(report, interpolated={"recall": share})
    interpolated.save(tmp_path / "report")
    assert Report.read(tmp_path / "report") == interpolated


def test_features_are_evaluated_as_their_parts_are():
    generated, real = randn(40, 5), randn(100, 5, seed=1) + 0.2
    metrics = evaluate_features(generated, real)
    assert metrics["frechet_distance"].value == frechet_distance(generated, real)
    assert metrics["frechet_distance"].low < metrics["frechet_distance"].value < metrics["frechet_distance"].high
    some = real[torch.randperm(100, generator=torch.Generator().manual_seed(0))[:40]]
    assert metrics["kernel_distance"].value == kernel_distance(generated, some)
    for name, value in neighbourhoods(some, generated).items():
        assert metrics[name] == value


def test_features_need_samples_enough_for_their_halves():
    evaluate_features(randn(12, 5), randn(12, 5, seed=1))
    with pytest.raises(ValueError, match="samples: 11 are too few for features of 5 dimensions; take 12 or more"):
        evaluate_features(randn(11, 5), randn(12, 5, seed=1))
    with pytest.raises(ValueError, match="real images: 5 are too few for features of 5 dimensions; take 6 or more"):
        evaluate_features(randn(12, 5), randn(5, 5, seed=1))


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
