import re

from example_scripts import run


def test_what_features_are_worth_is_a_table_of_four_rows(vae_run):
    flags = ["--labels_per_class", 1, "--num_seeds", 2, "--learning_rates", 1e-3, 3e-3, "--max_train_steps", 2,
             "--batch_size", 4, "--num_validation", 5]  # fmt: skip
    done = run("transfer_features.py", "--vae", vae_run, *flags)
    title, header, *rows = done.stdout.splitlines()
    assert title.startswith("accuracy on 3 images, mean ± standard deviation of 2 seeds")
    assert header.split() == ["n", "=", "1"]
    names = ["encoder, frozen", "encoder, fine-tuned", "from scratch", "linear on pixels"]
    assert [row[:20].strip() for row in rows] == names
    for row in rows:
        mean, std = re.fullmatch(r" +([\d.]+) ± ([\d.]+)%", row[20:]).groups()
        seeds = {100 * i / 3 for i in range(4)}  # of 3 pictures
        assert any(abs((a + b) / 2 - float(mean)) < 0.06 for a in seeds for b in seeds) and float(std) <= 70.8
