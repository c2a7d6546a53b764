from types import SimpleNamespace

import pytest
import torch
from algorithm_1 import batch_random, pictures
from tiny import tiny_autoencoder

from hf_genmod import Autoencoder, ReconstructionObjective


@pytest.mark.parametrize("loss, distance", [("mse", torch.square), ("l1", torch.abs)])
def test_loss_is_the_mean_distance_of_the_pixels(loss, distance):
    x, autoencoder = pictures((4, 3, 8, 8)), tiny_autoencoder(Autoencoder)
    measured, metrics = ReconstructionObjective(loss)(autoencoder, {"images": x}, batch_random(4))
    torch.testing.assert_close(measured, distance(x - autoencoder(x).sample).mean())
    assert metrics == {}


def test_a_mask_hides_squares_from_the_encoder_and_not_from_the_loss():
    x, seen = 0.9 * pictures((200, 3, 10, 8)), []  # none of them black

    def blind(y):
        seen.append(y)
        return SimpleNamespace(sample=torch.zeros_like(y))

    loss, _ = ReconstructionObjective(mask=0.3)(blind, {"images": x}, batch_random(200))
    torch.testing.assert_close(loss, x.square().mean())
    hidden = seen[0] == -1
    assert torch.equal(seen[0][~hidden], x[~hidden])
    squares = torch.nn.functional.pad(hidden, (0, 0, 0, 2), value=False).unflatten(3, (2, 4)).unflatten(2, (3, 4))
    of_whole = squares[:, :, :2].transpose(3, 4).flatten(4)  # (n, c, 2, 2, 16)
    assert torch.equal(of_whole.all(-1), of_whole.any(-1))
    assert torch.equal(hidden.all(1), hidden.any(1))
    assert abs(of_whole.float().mean() - 0.3) < 0.06  # of 800 squares: 3.7 standard deviations


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="loss: 'l2' is not one of mse, l1"):
        ReconstructionObjective("l2")
    with pytest.raises(ValueError, match=r"mask: 1 is not a probability in \[0, 1\)"):
        ReconstructionObjective(mask=1)
