from types import SimpleNamespace

import torch
from algorithm_1 import batch_random, drawn, pictures, scheduler

from hf_genmod import NoisyClassificationObjective


def test_classification_loss_is_the_cross_entropy_at_x_t_and_goes_with_the_accuracy():
    process, x_0 = scheduler(), pictures()
    y = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
    t, _, _, x_t = drawn(process, x_0, batch_random())
    seen = {}

    def classifier(x_t, t):
        seen.update(x_t=x_t, t=t)
        return SimpleNamespace(logits=x_t.mean(dim=(2, 3)))  # of three channels

    loss, metrics = NoisyClassificationObjective(process)(
        classifier, {"images": x_0, "class_labels": y}, batch_random()
    )

    torch.testing.assert_close(seen["x_t"], x_t)
    assert torch.equal(seen["t"], t)
    probabilities = x_t.mean(dim=(2, 3)).softmax(dim=1)
    torch.testing.assert_close(loss, -probabilities[range(8), y].log().mean())
    assert metrics["accuracy"] == sum(int(p.argmax()) == label for p, label in zip(probabilities, y, strict=True)) / 8
