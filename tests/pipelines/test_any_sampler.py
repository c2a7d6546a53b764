"""Every scheduler that diffusers exports draws N(m, s²) by a pipeline, as its denoiser is a formula, or is refused."""

import copy
import functools
import json
import re
import threading

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
)
from diffusers.utils import logging
from small_pipelines import draw, guided, seeded, unconditional

from hf_genmod.data.exact_networks import ExactDenoiser
from hf_genmod.data.mixtures import GaussianMixture
from hf_genmod.pipelines import samplers
from hf_genmod.pipelines.samplers import Sampler, check_sampler
from hf_genmod.schedulers.ancestral_ddpm import AncestralDDPMScheduler
from hf_genmod.schedulers.few_step_ddpm import FewStepDDPMScheduler
from hf_genmod.sharing.loading import load_pipeline

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

EXPORTED = {name: getattr(diffusers, name) for name in sorted(dir(diffusers)) if name.endswith("Scheduler")}
EXPORTED |= {cls.__name__: cls for cls in (AncestralDDPMScheduler, FewStepDDPMScheduler)}
STEPS = (1, 2, 3, 7, 20, 61, 103, 121)  # "trailing" of diffusers makes one step more at the last three
MEAN, DEVIATION = 0.3, 0.5
REMEDY = r'(?P<remedy>DPMSolverMultistepScheduler\.from_config\(pipe\.config\.process, timestep_spacing="trailing"\))'
PROCESS = {"beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "trailing", "clip_sample": False}

# Those that draw in every number of steps, and those that never do, as they are for other processes or networks. The
# others draw if there are enough steps, or few for those of distilled models, or for one type of prediction: at least
# for that, and in as many steps, as is given here.
ALWAYS = ["AncestralDDPM", "DDIM", "DDIMParallel", "DDPM", "DDPMParallel", "DEISMultistep", "DPMSolverMultistep"]
ALWAYS += ["DPMSolverSinglestep", "EulerDiscrete", "FewStepDDPM", "LMSDiscrete", "UniPCMultistep"]
SOMETIMES = {"EulerAncestralDiscrete": ("epsilon", 20), "HeunDiscrete": ("epsilon", 300), "SASolver": ("epsilon", 30)}
SOMETIMES |= {"KDPM2AncestralDiscrete": ("epsilon", 103), "KDPM2Discrete": ("epsilon", 30), "LCM": ("epsilon", 4)}
SOMETIMES |= {"TCD": ("epsilon", 4), "PNDM": ("v_prediction", 20)}
SOMETIMES |= {"UnCLIP": ("sample", 1000), "DPMSolverSDE": ("epsilon", 103)}


@functools.cache
def denoiser(beta_schedule="squaredcos_cap_v2", prediction_type="epsilon"):
    """What predicts ε, v or x_0 of x_0 ~ N(m, s²) best."""
    process = AncestralDDPMScheduler(beta_schedule=beta_schedule, prediction_type=prediction_type)
    return ExactDenoiser(GaussianMixture([1.0], [[MEAN]], DEVIATION**2), process, tile=(1, 1, 1), size=(64, 64))


def deviation_of_algorithm_2(scheduler, n, spacing="trailing"):
    """The deviation of the samples of Algorithm 2 in n steps, in closed form."""
    reference = AncestralDDPMScheduler(trained_betas=scheduler.betas.tolist(), timestep_spacing=spacing)
    reference.set_timesteps(n)
    alpha_bar, variance = [*reference.alphas_cumprod[reference.timesteps].double().tolist(), 1.0], 1.0
    for here, there in zip(alpha_bar[:-1], alpha_bar[1:], strict=True):
        beta = 1 - here / there
        gain = here**0.5 * DEVIATION**2 / (here * DEVIATION**2 + 1 - here)
        slope = there**0.5 * beta / (1 - here) * gain + (here / there) ** 0.5 * (1 - there) / (1 - here)
        variance = slope**2 * variance + (1 - there) / (1 - here) * beta
    return variance**0.5


def make(name, config, **options):
    """The scheduler of a name by `from_config`; skips those that cannot be made."""
    try:
        return EXPORTED[name].from_config(config, **options)
    except (TypeError, ImportError):  # of tokens, or of a library that is not installed
        pytest.skip(f"{name} has no such config")


def drawn(scheduler, n, beta_schedule="squaredcos_cap_v2"):
    """The picture of a pipeline, or the sentence by which it refuses."""
    unet = denoiser(beta_schedule, scheduler.config.get("prediction_type", "epsilon"))
    try:
        return draw(unconditional(unet, scheduler), 1, num_inference_steps=n, generator=seeded(7))
    except ValueError as error:
        message, name = str(error), type(scheduler).__name__
        reasons = (
            rf"in {n} steps (draws N.*|fails)|is for another kind of model|changes the noise levels of the training"
        )
        assert re.fullmatch(rf"scheduler: {name} ({reasons}); use {REMEDY}", message), message
        return None


def assert_draws(picture, scheduler, n):
    assert picture.mean().item() == pytest.approx(MEAN, abs=0.2 * DEVIATION if n < 100 else 0.05 * DEVIATION + 0.03)
    least = 0.75 if n > 3 else 0.3
    spacings = {"trailing", scheduler.config.get("timestep_spacing", "trailing")}
    least *= min(deviation_of_algorithm_2(scheduler, n, spacing) for spacing in spacings) / DEVIATION
    assert (least if n < 100 else 0.85) < picture.std().item() / DEVIATION < (1.5 if n < 100 else 1.1)


@pytest.fixture(autouse=True)
def no_logs_of_diffusers():
    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    yield
    logging.set_verbosity(before)


def test_there_are_many():
    assert len(EXPORTED) >= 40
    assert {f"{name}Scheduler" for name in [*ALWAYS, *SOMETIMES]} <= set(EXPORTED)


@pytest.mark.parametrize("prediction_type", ["epsilon", pytest.param("v_prediction", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", EXPORTED)
def test_each_draws_the_gaussian_or_is_refused(name, prediction_type):
    scheduler = make(name, AncestralDDPMScheduler(**PROCESS, prediction_type=prediction_type).config)
    pictures = {n: drawn(scheduler, n) for n in STEPS}
    for n, picture in pictures.items():
        if picture is not None:
            assert_draws(picture, scheduler, n)
    kind = name.removesuffix("Scheduler")
    if kind not in SOMETIMES:
        assert {picture is not None for picture in pictures.values()} == {kind in ALWAYS}


@pytest.mark.parametrize("kind", SOMETIMES)
def test_those_that_draw_sometimes_do(kind):
    prediction_type, n = SOMETIMES[kind]
    scheduler = make(f"{kind}Scheduler", AncestralDDPMScheduler(**PROCESS, prediction_type=prediction_type).config)
    picture = drawn(scheduler, n)
    assert picture is not None
    assert_draws(picture, scheduler, n)


@pytest.mark.parametrize("prediction_type", ["epsilon", pytest.param("v_prediction", marks=pytest.mark.slow)])
def test_a_process_that_ends_before_pure_noise_is_tried_from_its_end(prediction_type):
    options = PROCESS | {"beta_schedule": "linear", "prediction_type": prediction_type}
    process = AncestralDDPMScheduler(num_train_timesteps=100, **options)
    assert process.alphas_cumprod[-1] > 0.3
    for kind in ALWAYS:
        for n in (1, 2, 7, 20, 61, 100):
            check_sampler(make(f"{kind}Scheduler", process.config), n)
    for kind in ("DPMSolverMultistepInverse", "DDIMInverse"):
        scheduler = make(f"{kind}Scheduler", process.config)
        for n in (1, 7, 20):
            with pytest.raises(ValueError, match=f"scheduler: {kind}Scheduler in {n} steps (draws N|fails)"):
                check_sampler(scheduler, n)


@pytest.mark.parametrize("of", [torch.tensor, np.array, list])
def test_a_config_may_have_tensors_and_numbers_of_numpy(of):
    betas = AncestralDDPMScheduler(beta_schedule="squaredcos_cap_v2").betas.tolist()
    check_sampler(DDIMScheduler(trained_betas=of(betas), timestep_spacing="trailing"), 20)
    check_sampler(DDIMScheduler(beta_start=np.float32(1e-4), beta_end=np.float64(0.02)), 20)


@pytest.mark.parametrize("beta_schedule", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler", "PNDMScheduler"])
def test_every_spacing_draws_or_is_refused(name, spacing, beta_schedule):
    process = PROCESS | {"timestep_spacing": spacing, "beta_schedule": beta_schedule}
    scheduler = make(name, AncestralDDPMScheduler(**process).config)
    for n in (1, 20, 61, 501):
        picture = drawn(scheduler, n, beta_schedule)
        if picture is not None:
            assert_draws(picture, scheduler, n)
        # At 501 steps "leading" starts at t = 500, where √ᾱ is 0.7 for the cosine and 0.28 for the linear process.
        starts_late = (n == 1 and spacing != "trailing") or (n == 501 and spacing == "leading")
        if name != "PNDMScheduler" and (n, beta_schedule) != (501, "linear"):
            assert (picture is None) == starts_late


@pytest.mark.parametrize(
    "option", ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas"]
)
@pytest.mark.parametrize("beta_schedule", ["linear", "squaredcos_cap_v2"])
def test_other_sigmas_draw(option, beta_schedule):
    ours = AncestralDDPMScheduler(**PROCESS | {"beta_schedule": beta_schedule})
    for cls in (DPMSolverMultistepScheduler, EulerDiscreteScheduler):
        if option in cls().config:
            scheduler = cls.from_config(ours.config, **{option: True})
            picture = drawn(scheduler, 30, beta_schedule)
            # The cosine process goes up to σ = 20,000, and a beta distribution has few σ below 1.
            is_late = option == "use_karras_sigmas" and beta_schedule != "linear" and cls is EulerDiscreteScheduler
            assert (picture is None) == (is_late or option == "use_beta_sigmas")
            if picture is not None:
                assert_draws(picture, scheduler, 30)


OPTIONS = [{"use_karras_sigmas": True}, {"use_exponential_sigmas": True}, {"use_beta_sigmas": True}]
OPTIONS += [{"use_lu_lambdas": True}, {"final_sigmas_type": "sigma_min"}, {"solver_order": 1}, {"solver_order": 3}]
OPTIONS += [{"algorithm_type": "sde-dpmsolver++"}, {"solver_type": "bh1"}, {"solver_type": "heun"}, {}]
OPTIONS += [
    {"skip_prk_steps": True},
    {"set_alpha_to_one": False},
    {"variance_type": "fixed_large"},
    {"steps_offset": 1},
]


@pytest.mark.slow
@pytest.mark.parametrize("beta_schedule", ["linear", "squaredcos_cap_v2", "scaled_linear"])
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", [f"{name}Scheduler" for name in [*ALWAYS, *SOMETIMES]])
def test_every_option_draws_or_is_refused(name, prediction_type, spacing, beta_schedule):
    if name == "DPMSolverSDEScheduler":
        pytest.importorskip("torchsde")
    process = PROCESS | {"timestep_spacing": spacing, "beta_schedule": beta_schedule}
    ours = AncestralDDPMScheduler(**process, prediction_type=prediction_type)
    for option in OPTIONS:
        if set(option) <= set(EXPORTED[name]._get_init_keys(EXPORTED[name])):
            try:
                scheduler = make(name, ours.config, **option)
            except (ValueError, NotImplementedError):
                continue  # diffusers has no such combination
            for n in (*STEPS, *((999, 1000) if not option else ())):
                picture = drawn(scheduler, n, beta_schedule)
                if picture is not None and not any(key.startswith("use_") for key in option):
                    assert_draws(picture, scheduler, n)
                elif picture is not None:  # few of its steps are at the noise levels that matter
                    assert picture.mean().item() == pytest.approx(MEAN, abs=0.2 * DEVIATION)
                    assert n < 7 or 0.3 < picture.std().item() / DEVIATION < 1.4


@pytest.mark.slow
@pytest.mark.parametrize("n", [999, 1000])
@pytest.mark.parametrize(
    "name", ["DDIMScheduler", "HeunDiscreteScheduler", "PNDMScheduler", "UniPCMultistepScheduler"]
)
def test_as_many_steps_as_in_training(name, n):
    scheduler = make(name, AncestralDDPMScheduler(**PROCESS, prediction_type="v_prediction").config)
    picture = drawn(scheduler, n)
    assert picture is not None
    assert_draws(picture, scheduler, n)
    with pytest.raises(ValueError, match="num_inference_steps: 1001 must be within 1 ... 1000, the steps of training"):
        draw(unconditional(denoiser(), scheduler), 1, num_inference_steps=1001)


def test_trailing_has_as_many_timesteps_as_asked_for_and_ddim_takes_them():
    expected = AncestralDDPMScheduler(timestep_spacing="trailing")
    for n in range(1, 400):
        sampler = Sampler(DDIMScheduler(timestep_spacing="trailing", clip_sample=False), n)
        expected.set_timesteps(n)
        timesteps, i = sampler.scheduler.timesteps.tolist(), n // 2
        assert timesteps == expected.timesteps.tolist()
        # Where ε = 0, a step multiplies x_t by √(ᾱ_{t'} / ᾱ_t).
        alpha_bar = [*sampler.scheduler.alphas_cumprod[timesteps].tolist(), 1.0]
        x = sampler.step(i, torch.zeros(1, 1), torch.ones(1, 1), [])
        assert x.item() == pytest.approx((alpha_bar[i + 1] / alpha_bar[i]) ** 0.5, rel=1e-5)


class Biased(DDIMScheduler):
    """A sampler by somebody else, with a mistake."""

    def step(self, *args, **kwargs):
        result = super().step(*args, **kwargs)
        result.prev_sample = 1.02 * result.prev_sample
        return result


def test_a_sampler_with_a_mistake_is_refused_whoever_wrote_it():
    scheduler = Biased.from_config(AncestralDDPMScheduler(**PROCESS).config)
    with pytest.raises(
        ValueError, match="scheduler: Biased in 20 steps draws N.* with mean .* and deviation .*; use DPMSolverMul"
    ):
        check_sampler(scheduler, 20)


class Shifted(DDIMScheduler):
    """A sampler that adds a little to every image, and leaves their deviation as it is."""

    def step(self, model_output, timestep, sample, **kwargs):
        result = super().step(model_output, timestep, sample, **kwargs)
        result.prev_sample = result.prev_sample + 0.05 * (timestep == 0)
        return result


def test_a_wrong_mean_is_noticed():
    scheduler = Shifted.from_config(AncestralDDPMScheduler(**PROCESS | {"timestep_spacing": "leading"}).config)
    with pytest.raises(ValueError, match=r"Shifted in 50 steps draws N\(0.5, 0.1²\) with mean 0.55 "):
        check_sampler(scheduler, 50)


@pytest.mark.parametrize("n", [4, 7, 20])
@pytest.mark.parametrize(
    "name, options",
    [
        ("LMSDiscreteScheduler", {"use_beta_sigmas": True}),
        ("EulerDiscreteScheduler", {"use_karras_sigmas": True, "sigma_min": 5, "sigma_max": 6}),
        ("DDIMScheduler", {"clip_sample": True, "clip_sample_range": 0.1}),
        ("DDPMScheduler", {"clip_sample": True, "clip_sample_range": 0.9}),
        ("DDIMScheduler", {"thresholding": True, "sample_max_value": 0.5}),
    ],
)
def test_images_without_variety_are_refused_in_few_steps_too(name, options, n):
    scheduler = make(name, AncestralDDPMScheduler(**PROCESS).config, **options)
    assert drawn(scheduler, n) is None


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler", "AncestralDDPMScheduler"])
def test_images_may_be_clipped_to_their_range(name):
    for options in ({"clip_sample": True}, {"clip_sample": True, "clip_sample_range": 3.0}, {"thresholding": True}):
        check_sampler(make(name, AncestralDDPMScheduler(**PROCESS).config, **options), 7)


@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler", "AncestralDDPMScheduler"])
def test_clipping_by_thresholds_is_that_of_the_scheduler_and_takes_images_of_any_size(name):
    options = {"thresholding": True, "sample_max_value": 1.0}
    scheduler = make(name, AncestralDDPMScheduler(**PROCESS).config, **options)
    sampler = Sampler(scheduler, 7)
    some = 2 * torch.randn(2, 3, 8, 8)
    assert torch.equal(sampler.scheduler._threshold_sample(some), scheduler._threshold_sample(some))
    many = torch.full((1, 1, 4097, 4096), 3.0)  # more values than torch.quantile takes
    assert torch.equal(sampler.scheduler._threshold_sample(many).aminmax().max, torch.tensor(1.0))
    dynamic = make(name, AncestralDDPMScheduler(**PROCESS).config, **options | {"sample_max_value": 2.0})
    assert Sampler(dynamic, 7).scheduler._threshold_sample(some).abs().max() <= 1 < some.abs().max()
    assert not torch.equal(Sampler(dynamic, 7).scheduler._threshold_sample(some), some.clamp(-1, 1))


class AnyArguments(DDPMScheduler):
    """A step that passes on what it does not know."""

    def step(self, *args, **kwargs):
        return super().step(*args, **kwargs)


class OfAnyArguments(AnyArguments):
    """The same twice."""

    def step(self, model_output, timestep, sample, **kwargs):
        return super().step(model_output, timestep, sample, **kwargs)


class OfAncestral(AncestralDDPMScheduler):
    """The same for a step that takes more."""

    def step(self, *args, **kwargs):
        return super().step(*args, **kwargs)


class OfLMS(EXPORTED["LMSDiscreteScheduler"]):
    """The same for a step that takes no generator."""

    def step(self, *args, **kwargs):
        return super().step(*args, **kwargs)


class WithoutOptions(DDIMScheduler):
    """A step without options of one that has them."""

    def step(self, model_output, timestep, sample):
        return super().step(model_output, timestep, sample)


@pytest.mark.parametrize("cls", [AnyArguments, OfAnyArguments, OfAncestral, OfLMS, WithoutOptions])
def test_a_step_of_any_arguments_takes_the_generators(cls):
    scheduler = cls.from_config(AncestralDDPMScheduler(**PROCESS).config)
    base = cls.__mro__[2 if cls is OfAnyArguments else 1]
    pictures = []
    for seed, kind in ((1, cls), (2, cls), (3, base)):
        torch.manual_seed(seed)
        pictures.append(drawn(kind.from_config(scheduler.config), 7))
    assert torch.equal(pictures[0], pictures[1])
    torch.testing.assert_close(pictures[0], pictures[2])


def with_key(scheduler, **config):
    scheduler.register_to_config(**config)
    return scheduler


BASE = AncestralDDPMScheduler(**PROCESS)
REFUSED = {
    "flow sigmas": lambda: make("DPMSolverMultistepScheduler", BASE.config, use_flow_sigmas=True),
    "an offset": lambda: make("DDIMScheduler", BASE.config, steps_offset=500, timestep_spacing="leading"),
    "beta sigmas": lambda: make("EulerDiscreteScheduler", BASE.config, use_beta_sigmas=True),
    "flow": lambda: make("DPMSolverMultistepScheduler", BASE.config, prediction_type="flow_prediction"),
    "another model": lambda: make("FlowMatchEulerDiscreteScheduler", BASE.config),
    "another formula": lambda: make("CogVideoXDPMScheduler", BASE.config),
    "another process": lambda: DDIMScheduler(beta_end=0.03),
    "late": lambda: make("DDIMScheduler", BASE.config, timestep_spacing="leading", num_train_timesteps=500),
    "a small range": lambda: make("DDIMScheduler", BASE.config, clip_sample=True, clip_sample_range=0.1),
    "no JSON": lambda: with_key(make("DDIMScheduler", BASE.config), extra=object()),
}


@pytest.mark.parametrize("n", [1, 4, 20])
@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused_says_what_draws(kind, n):
    pipe = unconditional(denoiser(), BASE)
    pipe.scheduler = REFUSED[kind]()
    try:
        draw(pipe, 1, num_inference_steps=n)
        assert n == 1 and kind in ("flow sigmas", "beta sigmas")
    except ValueError as error:
        remedy = re.fullmatch(f"scheduler: .*; use {REMEDY}", str(error))["remedy"]
        pipe.scheduler = eval(remedy)
        assert_draws(draw(pipe, 1, num_inference_steps=n, generator=seeded(7)), pipe.scheduler, n)


def test_a_sampler_is_tried_once_for_each_config_and_number_of_steps():
    samplers._fault.cache_clear()
    pipeline = unconditional(scheduler=DDIMScheduler(timestep_spacing="trailing"))
    for n in (4, 4, 5, 4):
        draw(pipeline, 1, num_inference_steps=n)
    assert samplers._fault.cache_info().misses == 2
    pipeline.scheduler.register_to_config(timestep_spacing="linspace")
    draw(pipeline, 1, num_inference_steps=4)
    assert samplers._fault.cache_info().misses == 3


def test_trying_leaves_the_random_numbers_of_torch_alone():
    samplers._fault.cache_clear()
    before = torch.random.get_rng_state()
    check_sampler(AncestralDDPMScheduler(), 20)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("cls", [AncestralDDPMScheduler, FewStepDDPMScheduler, DPMSolverMultistepScheduler])
def test_calls_in_several_threads_draw_what_they_draw_alone(cls):
    pipeline = guided(scheduler=cls.from_config(AncestralDDPMScheduler(timestep_spacing="trailing").config))
    requests = [{"num_inference_steps": n, "generator": seeded(n)} for n in (3, 5, 8, 13)]
    alone = [draw(pipeline, "cat", **copy.deepcopy(request)) for request in requests]
    together, start = [None] * len(requests), threading.Barrier(len(requests))

    def call(i):
        start.wait()
        together[i] = draw(pipeline, "cat", **requests[i])

    threads = [threading.Thread(target=call, args=(i,)) for i in range(len(requests))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for picture, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(picture, expected, rtol=1e-4, atol=1e-4)


def test_a_call_leaves_the_scheduler_as_it_was():
    pipeline = unconditional(scheduler=DPMSolverMultistepScheduler(timestep_spacing="trailing"))
    before = copy.deepcopy(vars(pipeline.scheduler))
    draw(pipeline, 1, num_inference_steps=5)
    assert str(vars(pipeline.scheduler)) == str(before)


@pytest.mark.parametrize("name", ["AncestralDDPM", "FewStepDDPM", "DPMSolverMultistep", "DDIM", "EulerDiscrete"])
def test_the_config_of_a_scheduler_survives_a_save(name, tmp_path):
    scheduler = EXPORTED[f"{name}Scheduler"].from_config(AncestralDDPMScheduler(beta_schedule="laplace").config)
    unconditional(scheduler=scheduler).save_pretrained(tmp_path / "once")
    load_pipeline(tmp_path / "once").save_pretrained(tmp_path / "twice")
    file = "scheduler/scheduler_config.json"
    once, twice = (json.loads((tmp_path / place / file).read_text()) for place in ("once", "twice"))
    assert once == twice
