"""What the pipelines of diffusers have in common, ours have, too."""

import contextlib
import inspect

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from diffusers.callbacks import PipelineCallback
from huggingface_hub import HfApi
from small_pipelines import (
    DIFFUSION,
    PIPELINES,
    guided,
    images_of,
    of_images,
    of_latents,
    quiet,
    seeded,
    unconditional,
    upsampler,
)
from tiny import assert_rounded_alike

from hf_genmod import load_pipeline
from hf_genmod.evaluation.config import EvaluationConfig


@pytest.fixture(params=PIPELINES)
def kind(request):
    return request.param


@pytest.fixture
def pipeline(kind):
    return PIPELINES[kind][0]()


def draw(pipeline, kind, n=2, output_type="pt", **kwargs):
    return images_of(pipeline, PIPELINES[kind][1](n), [seeded(i) for i in range(n)], output_type, **kwargs)


class TestArguments:
    def test_those_of_every_pipeline_are_optional(self, kind, pipeline):
        parameters = inspect.signature(pipeline.__call__).parameters
        expected = {"num_images_per_prompt", "generator", "latents", "output_type", "return_dict"}
        if kind in DIFFUSION:
            expected |= {"num_inference_steps", "callback_on_step_end", "callback_on_step_end_tensor_inputs"}
            assert parameters["num_inference_steps"].default == 20
            assert EvaluationConfig().settings_for(pipeline)[0]["num_inference_steps"] == 20
        assert expected <= {name for name, p in parameters.items() if p.default is not inspect.Parameter.empty}

    def test_outputs_as_tuples_hold_the_same(self, kind, pipeline):
        (images,) = draw_output(pipeline, kind, return_dict=False)
        output = draw_output(pipeline, kind)
        assert torch.equal(images, output.images) and torch.equal(images, output[0])

    def test_a_batch_is_like_singles_with_a_list_of_generators(self, kind, pipeline):
        together, request = draw(pipeline, kind, 3), PIPELINES[kind][1](3)
        for i in range(3):
            one = {name: x[i : i + 1] for name, x in request.items() if isinstance(x, (list, torch.Tensor))}
            alone = images_of(pipeline, PIPELINES[kind][1](1) | one, [seeded(i)], "pt")
            torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-4)


def draw_output(pipeline, kind, **kwargs):
    options = {"num_inference_steps": 2} if pipeline.denoises else {}
    return pipeline(**PIPELINES[kind][1](2), generator=seeded(), output_type="pt", **options, **kwargs)


class TestComponents:
    def test_are_those_of_the_constructor_and_make_the_same_pipeline(self, kind, pipeline):
        parameters = set(inspect.signature(type(pipeline).__init__).parameters)
        assert set(pipeline.components) <= parameters
        settings = {name: value for name, value in pipeline.config.items() if name in parameters}
        again = quiet(type(pipeline)(**(settings | pipeline.components)))
        assert_rounded_alike(draw(again, kind), draw(pipeline, kind))

    def test_are_shared_with_another_pipeline(self, kind, pipeline):
        pipeline.register_to_config(value_range={"low": [0.0, -1.0, 5.0], "high": [1.0, 2.0, 9.0]})
        pipeline.to(torch.bfloat16)
        shared = quiet(type(pipeline).from_pipe(pipeline))
        assert all(shared.components[name] is part for name, part in pipeline.components.items())
        assert shared.dtype == pipeline.dtype == torch.bfloat16
        kept = {"value_range", "process", "id2label", "factor", "max_noise_level"} & pipeline.config.keys()
        assert {key: shared.config[key] for key in kept} == {key: pipeline.config[key] for key in kept}
        if pipeline.denoises:
            scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
            assert type(pipeline).from_pipe(pipeline, scheduler=scheduler).scheduler is scheduler

    @pytest.mark.parametrize("kind", ["unconditional", "classifier guided", "upsampler", "autoencoder"])
    def test_come_back_from_a_folder_and_draw_the_same(self, kind, pipeline, tmp_path):
        pipeline.save_pretrained(tmp_path)
        loaded = type(pipeline).from_pretrained(tmp_path)
        assert set(loaded.components) == set(pipeline.components)
        for name in pipeline._optional_components:
            assert (getattr(loaded, name) is None) == (getattr(pipeline, name) is None)
        assert_rounded_alike(draw(loaded, kind), draw(pipeline, kind))

    @pytest.mark.parametrize("kind", ["latents", "text"])
    def test_come_back_as_a_variant(self, kind, pipeline, tmp_path):
        pipeline.save_pretrained(tmp_path, variant="ema")
        assert {len(file.suffixes) for file in tmp_path.rglob("*.safetensors")} == {2}  # .ema.safetensors
        loaded = type(pipeline).from_pretrained(tmp_path, variant="ema")
        assert_rounded_alike(draw(loaded, kind), draw(pipeline, kind))

    @pytest.mark.parametrize("kind", ["classifier guided", "text", "autoencoder"])
    def test_come_back_in_half_precision(self, kind, pipeline, tmp_path):
        dtype = torch.bfloat16
        expected = draw(pipeline.to(dtype), kind)
        assert pipeline.dtype == dtype
        pipeline.save_pretrained(tmp_path)
        loaded = type(pipeline).from_pretrained(tmp_path, torch_dtype=dtype)
        models = {name: x for name, x in loaded.components.items() if isinstance(x, torch.nn.Module)}
        assert {model.dtype for model in models.values()} == {dtype}
        torch.testing.assert_close(draw(loaded, kind), expected, rtol=0, atol=1e-2)

    def test_change_dtype_and_back(self, kind, pipeline):
        expected = draw(pipeline, kind)
        half = draw(pipeline.to(torch.bfloat16), kind)
        assert half.dtype == torch.float32 and 0 < (half - expected).abs().mean() < 0.1
        assert pipeline.to(torch.float32).dtype == torch.float32

    def test_are_offloaded_one_by_one(self, kind, pipeline):
        expected = draw(pipeline, kind)
        pipeline.enable_model_cpu_offload(device="cpu")
        for _ in range(2):
            assert_rounded_alike(draw(pipeline, kind), expected)

    def test_slicing_of_attention_changes_nothing(self, kind, pipeline):
        expected = draw(pipeline, kind)
        pipeline.enable_attention_slicing()
        assert_rounded_alike(draw(pipeline, kind), expected)


@pytest.mark.parametrize("kind", DIFFUSION)
class TestCallbacks:
    def test_know_the_number_of_steps_and_may_change_the_latents(self, kind, pipeline):
        def zeros_in_the_end(pipe, i, t, tensors):
            assert [*tensors] == pipe._callback_tensor_inputs and pipe.num_timesteps == 3
            if i == pipe.num_timesteps - 1:
                tensors["latents"] = torch.zeros_like(tensors["latents"])
            return tensors

        options = {"callback_on_step_end_tensor_inputs": pipeline._callback_tensor_inputs}
        images = draw(pipeline, kind, output_type="latent", callback_on_step_end=zeros_in_the_end, **options)
        assert images.abs().sum() == 0
        assert pipeline.num_timesteps == 3

    def test_see_no_tensors_that_they_do_not_ask_for(self, kind, pipeline):
        def callback(pipe, i, t, tensors):
            assert tensors == {}
            return tensors

        images = draw(pipeline, kind, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=[])
        assert_rounded_alike(images, draw(pipeline, kind))

    def test_change_the_guidance_scale(self, kind, pipeline):
        argument = pipeline.guidance_argument
        if argument is None:
            assert pipeline.guidance_scale is None
            return

        def increase(pipe, i, t, tensors):
            setattr(pipe, f"_{argument}", getattr(pipe, f"_{argument}") + 1.0)
            return tensors

        changed = draw(pipeline, kind, callback_on_step_end=increase, **{argument: 2.0})
        assert getattr(pipeline, argument) == 2.0 + pipeline.num_timesteps
        assert not torch.allclose(changed, draw(pipeline, kind, **{argument: 2.0}), atol=1e-4)
        assert getattr(pipeline, argument) == 2.0

    def test_a_changed_scale_is_that_of_the_next_steps(self, kind, pipeline):
        argument = pipeline.guidance_argument
        if argument is None:
            return
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)  # without noise, and of one step
        states = {}

        def remember(name, scales):
            def callback(pipe, i, t, tensors):
                states.setdefault(name, []).append(tensors["latents"].clone())
                setattr(pipe, f"_{argument}", scales[i])

            return callback

        for name, scales in (("constant", [2.0] * 3), ("changed", [4.0] * 3)):
            draw(pipeline, kind, callback_on_step_end=remember(name, scales), **{argument: 2.0})
        constant, changed = states["constant"], states["changed"]
        assert torch.equal(constant[0], changed[0]) and not torch.allclose(constant[1], changed[1], atol=1e-5)

        # From the same state, the second step is that of the new scale: replace the first state of a call by it.
        def replace(pipe, i, t, tensors):
            return {"latents": changed[0]} if i == 0 else {}

        expected = draw(pipeline, kind, output_type="latent", callback_on_step_end=replace, **{argument: 4.0})
        assert_rounded_alike(changed[2], expected)

    @pytest.mark.parametrize("value", ["x", None, float("nan"), [2.0]])
    def test_a_scale_that_is_no_number_is_refused(self, kind, pipeline, value):
        if pipeline.guidance_argument is not None:
            name = f"_{pipeline.guidance_argument}"
            with pytest.raises(ValueError, match=f"^{name[1:]}: .* is not a finite number"):
                draw(pipeline, kind, callback_on_step_end=lambda pipe, *_: setattr(pipe, name, value))

    def test_may_call_the_pipeline_which_keeps_the_values_of_both_calls_apart(self, kind, pipeline):
        argument = pipeline.guidance_argument or "guidance_scale"
        scales = {argument: 2.0} if pipeline.guidance_argument else {}
        expected, seen = draw(pipeline, kind, **scales), []

        def call(pipe, i, t, tensors):
            for inner in ({}, {"callback_on_step_end": fail}):
                with contextlib.suppress(ArithmeticError):
                    draw(pipe, kind, 1, num_inference_steps=2, **(inner | {name: 5.0 for name in scales}))
            seen.append((getattr(pipe, argument), pipe.num_timesteps, pipe.interrupt))

        def fail(pipe, *_):
            assert getattr(pipe, argument) == (5.0 if scales else None) and pipe.num_timesteps == 2
            pipe._interrupt = True
            raise ArithmeticError

        assert_rounded_alike(draw(pipeline, kind, callback_on_step_end=call, **scales), expected)
        assert seen == [(scales.get(argument), 3, False)] * 3
        assert (getattr(pipeline, argument), pipeline.num_timesteps) == (scales.get(argument), 3)

    def test_of_diffusers_name_their_own_tensors(self, kind, pipeline):
        class Half(PipelineCallback):
            tensor_inputs = ["latents"]

            def callback_fn(self, pipe, i, t, tensors):
                return {"latents": tensors["latents"] * 0}

        images = draw(pipeline, kind, output_type="latent", callback_on_step_end=Half())
        assert images.abs().sum() == 0


def test_guidance_is_off_from_the_step_on_that_a_callback_says():
    pipeline, sizes = guided(), []
    pipeline.unet.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))

    def off_after_two(pipe, i, t, tensors):
        pipe._guidance_scale = 1.0 if i == 1 else pipe._guidance_scale

    draw(pipeline, "guided", guidance_scale=3.0, num_inference_steps=4, callback_on_step_end=off_after_two)
    assert sizes == [4, 4, 2, 2]


def test_a_classifier_begins_and_ends_to_guide_when_a_callback_says_so():
    pipeline = PIPELINES["classifier guided"][0]()

    def with_scales(*scales):
        """One scale for each step."""

        def callback(pipe, i, t, tensors):
            pipe._classifier_scale = (*scales, 0.0)[i + 1]

        options = {"guidance_interval": (0.0, float("inf")), "callback_on_step_end": callback}
        return draw(pipeline, "classifier guided", output_type="latent", classifier_scale=scales[0], **options)

    constant = draw(pipeline, "classifier guided", output_type="latent", classifier_scale=0.0)
    assert_rounded_alike(with_scales(0.0, 0.0, 0.0), constant)  # clipped as the scheduler would
    for scales in ((0.0, 50.0, 0.0), (50.0, 0.0, 0.0)):
        assert not torch.allclose(with_scales(*scales), constant, atol=1e-4)


class TestPickles:
    @pytest.mark.parametrize("positional", [True, False])
    def test_are_not_written(self, kind, pipeline, positional, tmp_path):
        arguments, named = ([False], {}) if positional else ([], {"safe_serialization": False})
        with pytest.raises(ValueError, match="safe_serialization: False would write pickles, which are not loaded"):
            pipeline.save_pretrained(tmp_path / "new", *arguments, **named)
        assert not (tmp_path / "new").exists()

    def test_are_not_pushed(self, hub):
        pipeline, repo_id = unconditional(), hub.new_repo_id("pickles")
        for module in (pipeline, pipeline.unet):
            with pytest.raises(ValueError, match="safe_serialization: False would write pickles"):
                module.push_to_hub(repo_id, safe_serialization=False)
        assert not HfApi().repo_exists(repo_id)

    def test_are_not_written_by_the_code_of_a_checkpoint(self, tmp_path):
        guided().save_pretrained(tmp_path / "saved")
        theirs = DiffusionPipeline.from_pretrained(tmp_path / "saved", trust_remote_code=True)
        for module in (theirs, theirs.unet):
            with pytest.raises(ValueError, match="safe_serialization: False would write pickles"):
                module.save_pretrained(tmp_path / "again", safe_serialization=False)
        theirs.save_pretrained(tmp_path / "again", safe_serialization=True)
        assert_rounded_alike(draw(load_pipeline(tmp_path / "again"), "guided"), draw(theirs, "guided"))


def test_the_methods_that_save_have_the_signatures_of_diffusers():
    for pipeline in (unconditional(), of_latents(), of_images(), upsampler()):
        for name in ("save_pretrained", "push_to_hub"):
            ours, theirs = getattr(type(pipeline), name), getattr(DiffusionPipeline, name)
            assert inspect.signature(ours) == inspect.signature(theirs)
