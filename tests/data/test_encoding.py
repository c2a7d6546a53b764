"""Models are known again by their weights."""

import torch
from tiny import tiny_autoencoder

from hf_genmod import VariationalAutoencoder
from hf_genmod.data.encoding import weights_fingerprint


def test_a_fingerprint_of_weights_is_theirs_alone():
    vae = tiny_autoencoder(VariationalAutoencoder)
    vae.register_to_config(scaling_factor=3.0)
    first = weights_fingerprint(vae)
    assert weights_fingerprint(tiny_autoencoder(VariationalAutoencoder)) == first
    assert weights_fingerprint(tiny_autoencoder(VariationalAutoencoder).to(memory_format=torch.channels_last)) == first
    assert weights_fingerprint(tiny_autoencoder(VariationalAutoencoder).bfloat16()) != first
    vae.decoder.conv_out.bias.data[0] += 1e-6
    assert weights_fingerprint(vae) != first
