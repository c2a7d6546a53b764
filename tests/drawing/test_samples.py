"""Samples drawn by several processes together, and kept."""

import os
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_unet

from hf_genmod import AncestralDDPMScheduler, ClassifierFreeGuidedPipeline, UnconditionalPipeline
from hf_genmod.drawing.samples import CHUNK, draw_images, draw_to_folder, to_bytes
from hf_genmod.processes import processes


def tiny_pipeline():
    pipeline = ClassifierFreeGuidedPipeline(tiny_unet(num_classes=3), AncestralDDPMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class Broken:
    def __call__(self, class_labels, **kwargs):
        if 1 in class_labels:
            raise ZeroDivisionError("no picture")
        return tiny_pipeline()(class_labels, num_inference_steps=2, **kwargs)


def draw_in_processes(process, port, folder):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"RANK": str(process), "LOCAL_RANK": str(process)}
    state = processes()
    images = draw_images(tiny_pipeline(), {"class_labels": [0, 1, 2, 0, 1]}, seed=3, num_inference_steps=3)
    for i, image in enumerate(images):
        image.save(f"{folder}/{process}-{i}.png")

    request = {"class_labels": [0, 1, 2, 0]}
    for z in draw_images(tiny_pipeline(), request, num_inference_steps=4, output_type="latent"):
        assert z.device.type == "cpu" and z.untyped_storage().nbytes() == z.nbytes, "sent with the rest of its batch"

    with pytest.raises(RuntimeError, match="^ZeroDivisionError: no picture$"):
        draw_images(Broken(), {"class_labels": [0, 1]})
    pipeline, labels = tiny_pipeline(), [0] * CHUNK + [7]  # which the second process draws
    with pytest.raises(ValueError, match="class_labels: 7"):
        draw_to_folder(pipeline, Path(folder, "kept"), {"class_labels": labels}, len(labels), num_inference_steps=3)
    assert not pipeline.unet._forward_hooks
    state.destroy_process_group()


def test_two_processes_share_the_drawing_of_the_same_pictures(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.set_forkserver_preload([draw_images.__module__])  # imports the libraries once for both
    torch.multiprocessing.start_processes(draw_in_processes, (port, tmp_path), 2, start_method="forkserver")
    alone = draw_images(tiny_pipeline(), {"class_labels": [0, 1, 2, 0, 1]}, seed=3, num_inference_steps=3)
    for process in (0, 1):
        for i, image in enumerate(alone):
            other = np.asarray(Image.open(tmp_path / f"{process}-{i}.png"), dtype=int)
            assert abs(other - np.asarray(image)).max() <= 1  # of 255, as rounding differs with the size of a batch
    assert len({image.tobytes() for image in alone}) == 5


class TestDrawingToAFolder:
    def test_gives_what_each_seed_gives_alone_and_counts_what_it_costs(self, tmp_path):
        pipeline, labels = tiny_pipeline(), [i % 3 for i in range(CHUNK + 7)]
        request = {"num_inference_steps": 2, "guidance_scale": 3.0}
        drawn = draw_to_folder(pipeline, tmp_path, {"class_labels": labels}, len(labels), seed=5, **request)
        assert drawn["images"].shape == (CHUNK + 7, 3, 8, 8) and drawn["images"].dtype == torch.uint8
        assert drawn["forward_passes"] == 4  # two steps, with and without the label
        for i in (0, 3, CHUNK, CHUNK + 6):
            generator = [torch.Generator().manual_seed(5 + i)]
            alone = pipeline([labels[i]], generator=generator, output_type="pt", **request).images
            difference = to_bytes(alone, pipeline)[0].int() - drawn["images"][i].int()
            assert difference.abs().max() <= 1  # as rounding differs

    def test_draws_only_what_is_missing(self, tmp_path):
        pipeline = UnconditionalPipeline(tiny_unet(), AncestralDDPMScheduler())
        pipeline.set_progress_bar_config(disable=True)
        first = draw_to_folder(pipeline, tmp_path, {}, 2 * CHUNK, num_inference_steps=2)
        (tmp_path / f"{CHUNK:05}.pt").unlink()
        pipeline.unet.conv_in.bias.data += 1  # another model, to be seen where it draws
        second = draw_to_folder(pipeline, tmp_path, {}, 2 * CHUNK, num_inference_steps=2)
        same = (first["images"] == second["images"]).flatten(1).all(dim=1)
        assert same[:CHUNK].all() and not same[CHUNK:].any()


def test_measured_values_are_kept_by_their_range():
    ranges = {"low": [-2.0, 0.0, 0.0], "high": [2.0, 1.0, 10.0]}
    pipeline = UnconditionalPipeline(tiny_unet(), AncestralDDPMScheduler(), value_range=ranges)
    values = torch.tensor([0.0, 1.0, 20.0])[None, :, None, None]
    assert to_bytes(values, pipeline).flatten().tolist() == [128, 255, 255]


def test_alone_a_process_raises_what_went_wrong():
    pipeline = tiny_pipeline()
    for shared in (False, True):
        with pytest.raises(ValueError, match="class_labels: 'cat'"):
            draw_images(pipeline, {"class_labels": ["cat"]}, shared=shared)
