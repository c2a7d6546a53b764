import math

import numpy as np
import torch
from runs import make_trainer, metrics

from hf_genmod import load_pipeline
from hf_genmod.data.randomness import BatchRandom
from hf_genmod.data.value_range import to_model_range


def test_validation_is_the_loss_of_the_averaged_weights_by_noise_level(dataset, held_out, tmp_path):
    trainer = make_trainer(dataset, tmp_path, max_train_steps=4, validation_steps=2, batch_size=4, held_out=held_out)
    trainer.train()
    lines = metrics(tmp_path)
    assert ["validation_loss" in line for line in lines] == [False, True, False, True]
    unet, losses = load_pipeline(tmp_path).unet.eval(), {}
    scheduler = trainer.objective.scheduler
    order = torch.randperm(23, generator=torch.Generator().manual_seed(0))
    for position, index in enumerate(order.tolist()):  # one at a time, in batches of one
        rng = BatchRandom(0, 0, [position], 23)
        t = int(rng.stratified() * 1000)
        noise = rng.normal(3, 16, 16)
        y = held_out.labels[index : index + 1].masked_fill(rng.uniform() < 0.1, unet.null_label)
        x_0 = to_model_range(held_out.images[index : index + 1])
        x_t, v = (f(x_0, noise, torch.tensor([t])) for f in (scheduler.add_noise, scheduler.get_velocity))
        with torch.no_grad():
            losses[t] = (unet(x_t, t, class_labels=y).sample - v).square().mean().item()
    assert math.isclose(lines[-1]["validation_loss"], np.mean(list(losses.values())), rel_tol=1e-4)
    bands = [[loss for t, loss in losses.items() if t // 200 == band] for band in range(5)]
    for band, name in enumerate(["0.0_0.2", "0.2_0.4", "0.4_0.6", "0.6_0.8", "0.8_1.0"]):
        # 23 do not divide by 5, so that a picture at the edge may be counted by its neighbour
        measured, expected = lines[-1][f"validation_loss_{name}"], np.mean(bands[band])
        assert math.isclose(measured, expected, rel_tol=0.5 if name != "0.8_1.0" else 1e-4), name
