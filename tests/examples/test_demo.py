from example_scripts import SMALL, run
from PIL import Image


def test_the_demo_checks_the_model_it_samples(tmp_path):
    assert run("train_cfg.py", "--output_dir", tmp_path, "--max_train_steps", 1, *SMALL).returncode == 0
    done = run("demo.py", "--model", tmp_path, "--samples_per_class", 8)
    assert done.returncode == 0, done.stderr
    assert " of 64 samples (" in done.stdout
    assert f'DiffusionPipeline.from_pretrained("{tmp_path}", trust_remote_code=True)' in done.stdout
    assert Image.open(tmp_path / "samples" / "classes.png").size == (8 * 64, 8 * 64)
