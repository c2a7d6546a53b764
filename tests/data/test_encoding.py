"""Models are known again by their weights, and what they encode is encoded once."""

import json
import subprocess
import sys

import datasets
import pytest
import torch
from tiny import tiny_autoencoder

import hf_genmod.data.encoding
from hf_genmod import VariationalAutoencoder
from hf_genmod.data.encoding import encode_once, weights_fingerprint


def test_a_fingerprint_of_weights_is_theirs_alone():
    vae = tiny_autoencoder(VariationalAutoencoder)
    vae.register_to_config(scaling_factor=3.0)
    first = weights_fingerprint(vae)
    assert weights_fingerprint(tiny_autoencoder(VariationalAutoencoder)) == first
    assert weights_fingerprint(tiny_autoencoder(VariationalAutoencoder).to(memory_format=torch.channels_last)) == first
    assert weights_fingerprint(tiny_autoencoder(VariationalAutoencoder).bfloat16()) != first
    vae.decoder.conv_out.bias.data[0] += 1e-6
    assert weights_fingerprint(vae) != first


def test_what_an_interruption_leaves_is_not_encoded_again(cache, monkeypatch):
    monkeypatch.setattr(hf_genmod.data.encoding, "_PART", 4)
    rows, seen = {"number": list(range(10))}, []
    feature = datasets.List(datasets.Value("float32"))

    def squares(batch):
        seen.extend(batch["number"])
        if batch["number"] == [6, 7] and len(seen) == 8:
            raise KeyboardInterrupt
        return {"encoded": [[float(number**2)] for number in batch["number"]]}

    with pytest.raises(KeyboardInterrupt):
        encode_once(rows, squares, feature, "squares", "key", batch_size=2)
    assert seen == list(range(8))
    seen.clear()
    encode_once(rows, squares, feature, "squares", "key", batch_size=2)
    assert seen == [4, 5, 6, 7, 8, 9]  # the first four rows are in a file of their own
    rows = encode_once(rows, squares, feature, "squares", "key", batch_size=2)
    assert seen == [4, 5, 6, 7, 8, 9]
    assert rows[:]["encoded"].flatten().tolist() == [number**2 for number in range(10)]


# Two processes; each writes which rows it encodes, and what it gets in the end.
SHARES = """
import sys, datasets, hf_genmod.data.encoding as encoding
datasets.config.HF_DATASETS_CACHE = sys.argv[1]
encoding._PART = 4
mine = []
def squares(batch):
    mine.extend(batch["number"])
    return {"encoded": [[float(number ** 2)] for number in batch["number"]]}
feature = datasets.List(datasets.Value("float32"))
rows = encoding.encode_once({"number": list(range(10))}, squares, feature, "squares", "key", 2)
line = [encoding.processes().process_index, mine, rows[:]["encoded"].flatten().int().tolist()]
with open(f"{sys.argv[1]}/{line[0]}.json", "w") as file:
    file.write(str(line))
"""


@pytest.mark.slow
def test_processes_share_the_encoding(tmp_path):
    (tmp_path / "program.py").write_text(SHARES)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    subprocess.run([*launch, str(tmp_path / "program.py"), str(tmp_path)], check=True, timeout=300)
    everything = [number**2 for number in range(10)]
    assert json.loads((tmp_path / "0.json").read_text()) == [0, [0, 1, 2, 3, 8, 9], everything]
    assert json.loads((tmp_path / "1.json").read_text()) == [1, [4, 5, 6, 7], everything]
