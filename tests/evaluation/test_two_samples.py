from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_unet

from hf_genmod import AncestralDDPMScheduler, UnconditionalPipeline
from hf_genmod.data.loading import load_pictures
from hf_genmod.evaluation.comparison import audit, evaluate_features
from hf_genmod.evaluation.features import all_bytes, extract_features, train_feature_classifier
from hf_genmod.evaluation.neighbours import nearest_of
from hf_genmod.evaluation.two_samples import Judge, told_apart

DATA = Path(__file__).parents[3] / "shared/data"


def hills(n, seed=0, size=16):
    """Smooth random pictures."""
    few = 255 * torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(few, size=size, mode="bicubic").round().clamp(0, 255).byte()


def noisy(images, deviation, seed=0):
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    return (images + deviation * noise).round().clamp(0, 255).byte()


def blurred(images):
    return F.avg_pool2d(F.pad(images.float(), [1] * 4, mode="replicate"), 3, stride=1).round().byte()


def test_what_is_changed_is_told_apart_and_what_is_not_is_not():
    assert told_apart(noisy(hills(50, seed=1), 4), hills(50)).low > 0.7
    pictures, others = hills(100, size=8), hills(100, seed=1, size=8)
    assert told_apart(others, pictures).low < 0.5
    assert told_apart(blurred(others), pictures).low > 0.7


def test_a_seed_repeats_it_whatever_the_global_random_state():
    pictures, others = hills(30, size=8), hills(50, seed=1, size=8)
    torch.manual_seed(0)
    once = told_apart(others, pictures, seed=3)
    state = torch.get_rng_state()
    assert told_apart(others, pictures, seed=3) == once and torch.equal(torch.get_rng_state(), state)
    assert once.count == 60  # of the larger set as many as of the other


@pytest.mark.parametrize("shape", [(1, 2, 2), (3, 7, 33), (4, 64, 48), (2, 128, 128)])
def test_a_judge_takes_images_of_any_size(shape):
    assert Judge(shape[0], max(shape[1:]))(torch.zeros(2, *shape)).shape == (2,)


def test_images_of_other_sizes_and_single_ones_are_refused():
    pictures = hills(4)
    with pytest.raises(ValueError, match="give two or more images of one size"):
        told_apart(pictures[..., :8], pictures)
    with pytest.raises(ValueError, match="give two or more images of one size"):
        told_apart(pictures[:1], pictures)


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA} is not there")
@pytest.mark.parametrize("name", ["mnist", "cats_dogs32"])
def test_each_kind_of_false_sample_is_told_by_a_number_of_the_headline(name, tmp_path):
    training, held_out = load_pictures(DATA / name, split="train"), load_pictures(DATA / name, split="test")
    real, unseen = all_bytes(training), all_bytes(held_out)
    unseen, rest = unseen[:1000], unseen[1000:2000]
    network = train_feature_classifier(real, training.labels, len(training.label_names))
    of_real, of_unseen = extract_features(real, network), extract_features(unseen, network)
    apart = {"pixels": nearest_of(unseen, real)[0], "features": nearest_of(of_unseen, of_real)[0]}

    def headline(samples):
        features = extract_features(samples, network)
        spaces = {"pixels": (samples, real), "features": (features, of_real)}
        audits = audit(spaces, apart, samples, real, tmp_path / "closest.png")
        measures = evaluate_features(features, of_real)
        return told_apart(samples, real), measures["frechet_distance"], any(x["flagged"] for x in audits.values())

    def findings(samples):
        """The numbers of the headline that are worse than those of held-out images, beyond both intervals."""
        (judged, distance, copies), (judged_real, distance_real, _) = headline(samples), perfect
        found = {"told apart": judged.low > judged_real.high, "distance": distance.low > distance_real.high}
        return {key for key, is_worse in (found | {"copies": copies}).items() if is_worse}

    perfect = headline(unseen)
    half = torch.as_tensor(training.labels) < len(training.label_names) // 2
    some = torch.randperm(len(real), generator=torch.Generator().manual_seed(0))
    assert findings(rest) == set()
    assert "told apart" in findings(noisy(rest, 2))
    assert "told apart" in findings(blurred(rest))
    assert findings(real[some[half[some]]][:1000]) & {"told apart", "distance"}
    assert findings(real[some[:1000]]) == {"copies"}
    channels, *size = real.shape[1:]
    model = tiny_unet(sample_size=size, in_channels=channels, out_channels=channels)
    untrained = UnconditionalPipeline(model, AncestralDDPMScheduler())
    untrained.set_progress_bar_config(disable=True)
    drawn = untrained(1000, 5, torch.Generator().manual_seed(0), output_type="pt").images
    assert {"told apart", "distance"} <= findings((255 * drawn).round().byte())
