"""Every tab of every kind of model: the Python that it shows draws the same images, bitwise."""

import numpy as np
import pytest

pytest.importorskip("gradio", reason="needs the extra [demo]")

import torch
from adapter_cases import trained
from demo_cases import CHECKPOINTS, painted, picture, pixels_in, sent

from hf_genmod import load_pipeline
from hf_genmod.demo.drawing import TAKE_PICTURES, shown
from hf_genmod.demo.model import AS_SAVED, DemoModel

TABS = {
    "unconditional": ["draw", "between", "edit", "steps"],
    "guided": ["draw", "between", "edit", "steps"],
    "unnamed": ["draw"],
    "classifier guided": ["draw", "between", "edit", "steps"],
    "latents": ["draw", "between", "edit", "steps"],
    "text": ["draw", "between", "edit", "steps"],
    "upsampler": ["enlarge"],
    "vae": ["latents", "draw", "reconstruct"],
    "autoencoder": ["draw", "reconstruct"],
}
QUICK = {"steps": 4, "number": 2, "frames": 3}
OTHERS = [  # settings besides the defaults
    ("guided", "draw", {"class_1": "dog", "class_2": "cat", "weight_2": -0.5, "guidance_scale": 3.0}),
    ("guided", "draw", {"sampler": "DDIM", "seed": 7}),
    ("guided", "draw", {"sampler": "SDE-DPM-Solver++"}),
    ("guided", "draw", {"sampler": "Algorithm 2 (DDPM)"}),
    ("guided", "between", {"sampler": "DDIM", "class_2": "lizard"}),
    ("classifier guided", "draw", {"classifier_scale": 0.0}),
    ("classifier guided", "between", {"classifier_scale": 0.0}),
    ("latents", "draw", {"sampler": "DPM-Solver++"}),
    ("text", "draw", {"prompt": "a 'red' \"cat\"\n\\", "negative_prompt": "dogs"}),
    ("vae", "latents", {"seed": 3, "z0": 1.5}),
    ("upsampler", "enlarge", {"class_1": "cat", "noise_level": 50, "guidance_scale": 2.0, "longest": 8}),
]


@pytest.fixture(scope="module")
def model(checkpoint):
    made = {}

    def load(*kinds):
        if kinds not in made:
            made[kinds] = DemoModel(checkpoint(kinds[0]), [checkpoint(kind) for kind in kinds[1:]])
        return made[kinds]

    return load


def all_shown(model, tab, sent=None, **changed):
    """All that a tab shows, one after another, with defaults that are quick."""
    values = {setting.name: setting.default for setting in model.settings_of(tab)}
    values |= {name: value for name, value in (QUICK | changed).items() if name in values}
    return [*shown(model, tab, values, sent)]


def run(code, folder, monkeypatch, html):
    """What the Python of a page draws in a folder with the images that a click on the page has saved."""
    from PIL import Image

    for name, pixels in pixels_in(html).items():
        if name in ("given.png", "mask.png"):
            Image.fromarray(pixels).save(folder / name)
    monkeypatch.chdir(folder)
    names = {}
    exec(code, names)
    return [np.asarray(image) for image in names["images"]]


def assert_draws_the_same(html, code, folder, monkeypatch):
    expected = run(code, folder, monkeypatch, html)
    actual = [x for name, x in pixels_in(html).items() if name not in ("given.png", "mask.png", "bicubic.png")]
    assert len(actual) >= len(expected) > 0
    for one, other in zip(actual, expected, strict=False):  # those of the last stage come first
        assert np.array_equal(one, other)


@pytest.mark.parametrize("kind, tabs", TABS.items())
def test_a_page_offers_what_the_checkpoint_can_do(kind, tabs, model):
    assert model(kind).tabs[: len(tabs)] == tabs


CASES = [(kind, tab, {}) for kind, tabs in TABS.items() for tab in tabs if tab != "steps"] + OTHERS


@pytest.mark.parametrize("kind, tab, changed", CASES)
def test_the_python_draws_the_same_images_bitwise(kind, tab, changed, model, tmp_path, monkeypatch):
    html, code = all_shown(model(kind), tab, sent() if tab in TAKE_PICTURES else None, **changed)[-1]
    assert_draws_the_same(html, code, tmp_path, monkeypatch)


@pytest.mark.parametrize("kind", ["guided", "latents"])
def test_the_python_of_a_painted_part_draws_the_same_and_keeps_the_rest(kind, model, tmp_path, monkeypatch):
    html, code = all_shown(model(kind), "edit", sent(mask=painted(model(kind).shape[:0:-1])))[-1]
    assert_draws_the_same(html, code, tmp_path, monkeypatch)
    images = pixels_in(html)
    kept = images["mask.png"] == 0
    drawn = [x for name, x in images.items() if name not in ("given.png", "mask.png")]
    assert 0 < kept.sum() < kept.size
    assert all(np.array_equal(x[kept], images["given.png"][kept]) for x in drawn)
    assert not any(np.array_equal(x, images["given.png"]) for x in drawn)


@pytest.mark.parametrize("sampler", ["as saved", "DDIM"])
def test_the_class_of_an_adapter_can_be_drawn(sampler, checkpoint, tmp_path, monkeypatch):
    pipe = trained(load_pipeline(checkpoint("guided")), name="zebra")
    pipe.save_lora_weights(tmp_path / "adapter")
    model = DemoModel(checkpoint("guided"), adapter=tmp_path / "adapter")
    assert model.class_names == ["cat", "dog", "lizard", "zebra"]
    html, code = all_shown(model, "draw", class_1="zebra", sampler=sampler)[-1]
    assert_draws_the_same(html, code, tmp_path, monkeypatch)
    with pytest.raises(ValueError, match="adapter: an AutoencoderPipeline takes none; leave it out"):
        DemoModel(checkpoint("vae"), adapter=tmp_path / "adapter")


def test_a_cascade_shows_all_stages_and_its_python_draws_the_last(model, tmp_path, monkeypatch):
    html, code = all_shown(model("guided", "larger"), "draw")[-1]
    assert_draws_the_same(html, code, tmp_path, monkeypatch)
    assert [x.shape for x in pixels_in(html).values()] == [(16, 16, 3)] * 2 + [(8, 8, 3)] * 2


@pytest.mark.parametrize("kind", ["guided", "unconditional"])
def test_each_step_is_shown_with_and_without_guidance(kind, model, tmp_path, monkeypatch):
    html, code = all_shown(model(kind), "steps")[-1]
    rows = 2 if kind == "guided" else 1
    assert html.count("<img") == rows * 2 * QUICK["steps"] and html.count("hidden") == rows * 2 * (QUICK["steps"] - 1)
    names = {}
    exec(code, names)
    assert len(names["steps"]) == rows * QUICK["steps"]
    t, tensors = names["steps"][-1]
    assert f'alt="x after the step at t = {t}"' in html and set(tensors) == {"latents", "pred_original_sample"}


def test_images_are_shown_while_they_are_drawn(model):
    *before, (html, _) = all_shown(model("guided"), "draw", steps=20)
    assert len(before) > 2 and "step 2 of 20" in before[1][0]
    assert [x.shape for x in pixels_in(before[1][0]).values()] == [x.shape for x in pixels_in(html).values()]


def test_a_page_that_is_left_stops_the_call(model):
    pipe, calls = model("guided").pipe, []
    hook = pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    frames = shown(model("guided"), "draw", {**all_values(model("guided")), "steps": 100})
    next(frames), next(frames)
    frames.close()
    import threading

    for thread in threading.enumerate():
        if thread.name == "stepwise":
            thread.join()
    hook.remove()
    assert 0 < len(calls) < 100


def all_values(model):
    return {setting.name: setting.default for setting in model.settings_of("draw")}


def test_samplers_of_a_page_are_those_that_draw(model):
    assert model("latents").schedulers["DDIM"].config.clip_sample is False
    assert model("guided").schedulers["DDIM"].config.clip_sample is True
    assert set(model("guided").schedulers) == {
        AS_SAVED,
        "SDE-DPM-Solver++",
        "DPM-Solver++",
        "DDIM",
        "Algorithm 2 (DDPM)",
    }


def test_latents_are_sorted_by_their_divergence_from_the_prior(model):
    pipe, factors = model("vae").pipe, model("vae").factors
    assert [kl for _, kl in factors] == sorted((kl for _, kl in factors), reverse=True)
    seeds = [torch.Generator().manual_seed(seed) for seed in range(64)]
    x = pipe(64, "standard", generator=seeds, output_type="pt").images
    with torch.no_grad():
        q = pipe.vae.encode(2 * x - 1).latent_dist
        own = torch.distributions.Normal(q.mean, q.std)
        kl = torch.distributions.kl_divergence(own, torch.distributions.Normal(0.0, 1.0)).flatten(1).mean(0)
    expected = kl.sort(descending=True)
    assert [i for i, _ in factors] == expected.indices[: len(factors)].tolist()
    torch.testing.assert_close(
        torch.tensor([kl for _, kl in factors]), expected.values[: len(factors)], rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK", "LA"])
def test_pictures_of_any_mode_are_edited(mode, model):
    image = picture(mode="RGB").convert(mode)
    file = image if mode != "CMYK" else image.convert("RGB")
    html, _ = all_shown(model("guided"), "edit", sent(file))[-1]
    assert pixels_in(html)["given.png"].shape == (8, 8, 3)


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_all_settings_have_defaults_within_their_ranges(kind, model):
    for setting in model(kind).settings.values():
        assert setting.checked(setting.default) == setting.default
