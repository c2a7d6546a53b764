"""A pipeline that several threads call at once draws for each what it draws alone."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler
from small_pipelines import DIFFUSION, PIPELINES, guided, images_of, of_latents, seeded, unconditional
from tiny import TINY_UNET, assert_rounded_alike

from hf_genmod import AncestralDDPMScheduler, DenoisingUNet2DModel
from hf_genmod.pipelines import pictures, text_to_image

N = 3  # threads


def at_once(call):
    """The results of `call(i, step_end)` in N threads, each of which waits for the others at the end of every step."""
    barrier = threading.Barrier(N, timeout=60)

    def run(i):
        def step_end(pipe, step, t, tensors):
            barrier.wait()
            return {}

        barrier.wait()
        try:
            return call(i, step_end)
        except Exception:
            barrier.abort()  # else the others would wait for it
            raise

    with ThreadPoolExecutor(N) as threads:
        return list(threads.map(run, range(N)))


def alone(call):
    return [call(i, lambda *_: {}) for i in range(N)]


SCHEDULERS = [AncestralDDPMScheduler, DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler]


@pytest.mark.parametrize("kind", DIFFUSION)
def test_images_are_those_of_a_thread_alone(kind):
    make, request = PIPELINES[kind]
    pipeline = make()
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)

    def call(i, step_end):
        return images_of(pipeline, request(1 + i % 2), seeded(i), "pt", callback_on_step_end=step_end)

    for actual, expected in zip(at_once(call), alone(call), strict=True):
        assert_rounded_alike(actual, expected)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_noise_is_bitwise_that_of_a_thread_alone(scheduler):
    unet = DenoisingUNet2DModel(**TINY_UNET)  # untrained, it predicts 0: only the noise is left
    pipeline = unconditional(unet, scheduler.from_config(AncestralDDPMScheduler(clip_sample=False).config))

    def call(i, step_end):
        return images_of(pipeline, {"batch_size": 2}, seeded(i), callback_on_step_end=step_end)

    for actual, expected in zip(at_once(call), alone(call), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("kind", ["guided", "autoencoder"])
def test_calls_of_several_lengths_and_sizes_do_not_disturb_each_other(kind):
    make, request = PIPELINES[kind]
    pipeline = make()
    pipeline.set_progress_bar_config(disable=False)

    def call(i, step_end):
        return images_of(pipeline, request(1 + i), seeded(i), "pt", num_inference_steps=2 + 2 * i)

    for actual, expected in zip(at_once(call), alone(call), strict=True):
        assert_rounded_alike(actual, expected)


@pytest.mark.parametrize("kind", ["guided", "classifier guided", "text", "upsampler"])
def test_each_thread_sees_and_changes_the_values_of_its_own_call(kind):
    make, request = PIPELINES[kind]
    pipeline, argument = make(), make().guidance_argument

    def call(i, step_end):
        seen = []

        def on_step_end(pipe, step, t, tensors):
            seen.append((getattr(pipe, argument), pipe.num_timesteps, pipe.interrupt))
            step_end(pipe, step, t, tensors)
            setattr(pipe, f"_{argument}", getattr(pipe, argument) + i)
            pipe._interrupt = step == 2 and i == 1

        options = {argument: 2.0, "num_inference_steps": 4, "callback_on_step_end": on_step_end}
        # The thread that stops early must leave the barrier to the others.
        steps_seen = images_of(pipeline, request(1), seeded(i), **options)
        return steps_seen, seen, getattr(pipeline, argument), pipeline.interrupt

    def thread(i, step_end):
        return call(i, lambda pipe, step, *rest: step_end(pipe, step, *rest) if step <= 2 else {})

    for i, (actual, expected) in enumerate(zip(at_once(thread), alone(thread), strict=True)):
        assert_rounded_alike(actual[0], expected[0])
        steps = 3 if i == 1 else 4
        assert actual[1:] == expected[1:]
        assert actual[1] == [(2.0 + i * step, 4, False) for step in range(steps)]
        assert actual[2:] == (2.0 + i * steps, i == 1)


def test_a_thread_without_a_call_sees_the_values_of_another():
    pipeline = guided()
    assert pipeline.guidance_scale is None and pipeline.num_timesteps is None
    images_of(pipeline, {"class_labels": 0, "guidance_scale": 3.0}, seeded())
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(lambda: (pipeline.guidance_scale, pipeline.num_timesteps)).result() == (3.0, 3)


def test_gradients_of_one_thread_do_not_reach_another():
    pipeline = unconditional()

    def call(i, step_end):
        with torch.set_grad_enabled(i % 2 == 0):
            images = images_of(pipeline, {}, seeded(i), callback_on_step_end=step_end)
            return images.requires_grad, torch.is_grad_enabled()

    assert at_once(call) == [(False, i % 2 == 0) for i in range(N)]


class Room:
    """A lock, and the room behind it. The first in the room stays until all N threads have come to the door or in."""

    def __init__(self):
        self.lock, self.changed, self.came, self.inside, self.most = (
            threading.Lock(),
            threading.Condition(),
            set(),
            0,
            0,
        )

    def __enter__(self):
        self._come(0)
        self.lock.acquire()

    def __exit__(self, *_):
        self.lock.release()

    def _come(self, inside):
        with self.changed:
            self.came.add(threading.get_ident())
            self.inside += inside
            self.most = max(self.most, self.inside)
            self.changed.notify_all()

    def visit(self, *_):
        self._come(1)
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.came) >= N, timeout=20)
            self.inside -= 1


def test_an_autoencoder_in_half_precision_is_used_by_one_thread_at_a_time(monkeypatch):
    pipeline, room = of_latents(), Room()
    pipeline.vae.to(torch.bfloat16)
    assert pipeline.vae.config.force_upcast  # so that its dtype changes meanwhile
    pipeline.vae.decoder.register_forward_pre_hook(room.visit)
    monkeypatch.setattr(pictures, "_UPCASTING", room)

    def call(i, step_end):
        return images_of(pipeline, {}, seeded(i), "pt", callback_on_step_end=step_end)

    for actual, expected in zip(at_once(call), alone(call), strict=True):
        assert_rounded_alike(actual, expected)
    assert pipeline.vae.dtype == torch.bfloat16 and room.most == 1


def test_a_tokenizer_is_used_by_one_thread_at_a_time(monkeypatch):
    pipeline, room = PIPELINES["text"][0](), Room()
    tokenizer = pipeline.tokenizer

    class Visited:
        def __call__(self, *args, **kwargs):
            room.visit()
            return tokenizer(*args, **kwargs)

        def __getattr__(self, name):
            return getattr(tokenizer, name)

    prompts = [["a red cat"], ["two lizards", "a green dog on a hill"], ["a cat above a blue dog"] * 3]
    expected = [pipeline.encode_prompt(prompt)[0] for prompt in prompts]
    pipeline.tokenizer = Visited()
    monkeypatch.setattr(text_to_image, "_TOKENIZING", room)
    with ThreadPoolExecutor(N) as threads:
        actual = list(threads.map(lambda prompt: pipeline.encode_prompt(prompt)[0], prompts))
    for one, other in zip(actual, expected, strict=True):
        assert_rounded_alike(one, other)
    assert room.most == 1
