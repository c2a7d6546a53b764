"""Values go to the range of the models and back."""

import torch

from hf_genmod.data.value_range import from_model_range, to_model_range


def test_model_range():
    every = torch.arange(256, dtype=torch.uint8)
    x = to_model_range(every)
    assert x.dtype == torch.float32 and x[0] == -1 and x[255] == 1
    assert torch.equal(((x + 1) * 127.5).round().to(torch.uint8), every)


def test_measured_values_go_from_low_and_high_of_their_channel_to_the_ends_and_back():
    value_range = {"low": [-2.0, 5.0], "high": [2.0, 5.0]}
    values = torch.tensor([[-2.0, 0.0, 2.0], [5.0, 5.0, 5.0]])[None, :, None]  # the second channel is constant
    x = to_model_range(values, value_range)
    assert x.shape == (1, 2, 1, 3) and x.flatten().tolist() == [-1, 0, 1, -1, -1, -1]
    assert torch.equal(from_model_range(x, value_range), values)
    assert to_model_range(values) is values  # without a range they are in that of the models
