from example_scripts import error_of, run
from PIL import Image
from tiny import tiny_unet

from hf_genmod import AncestralDDPMScheduler, ClassifierFreeGuidedPipeline, UnconditionalPipeline
from hf_genmod.data.shapes import ShapesDataset


def test_the_demo_checks_the_model_it_samples(tmp_path):
    names = dict(enumerate(ShapesDataset(1).label_names))
    unet = tiny_unet(sample_size=16, num_classes=8)
    ClassifierFreeGuidedPipeline(unet, AncestralDDPMScheduler(), id2label=names).save_pretrained(tmp_path)
    done = run("demo.py", "--model", tmp_path, "--samples_per_class", 2)
    assert done.returncode == 0, done.stderr
    assert " of 16 samples (" in done.stdout
    assert f'DiffusionPipeline.from_pretrained("{tmp_path}", trust_remote_code=True)' in done.stdout
    assert Image.open(tmp_path / "samples" / "classes.png").size == (2 * 100, 8 * (20 + 100))


def test_a_model_that_the_demo_cannot_check_is_one_sentence(tmp_path):
    assert error_of("demo.py", "--model", tmp_path / "nope").endswith(
        "nope holds no checkpoint; `make demo` trains one"
    )
    UnconditionalPipeline(tiny_unet(), AncestralDDPMScheduler()).save_pretrained(tmp_path / "plain")
    assert "an UnconditionalPipeline of 0 classes" in error_of("demo.py", "--model", tmp_path / "plain")
    names = {0: "cat", 1: "dog", 2: "bee"}
    pets = ClassifierFreeGuidedPipeline(tiny_unet(num_classes=3), AncestralDDPMScheduler(), id2label=names)
    pets.save_pretrained(tmp_path / "pets")
    assert "model: 'cat' is not a shape" in error_of("demo.py", "--model", tmp_path / "pets")
    assert "samples_per_class: 0" in error_of("demo.py", "--model", tmp_path / "pets", "--samples_per_class", 0)
