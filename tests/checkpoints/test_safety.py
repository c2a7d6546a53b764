"""Checkpoints that mean harm: each is refused in a sentence, and nothing of it is run, read elsewhere or allocated."""

import json
import resource
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_autoencoder, tiny_text_pipeline, tiny_unet, tiny_vae

from hf_genmod import (
    AncestralDDPMScheduler,
    AutoencoderPipeline,
    ClassifierFreeGuidedPipeline,
    UnconditionalPipeline,
    load_pipeline,
    load_vae,
)
from hf_genmod.checkpoints.safety import check_code

KINDS = {
    "classes": lambda: ClassifierFreeGuidedPipeline(tiny_unet(num_classes=2), AncestralDDPMScheduler()),
    "text": tiny_text_pipeline,
    "autoencoder": lambda: AutoencoderPipeline(tiny_autoencoder()),
    "latent": lambda: UnconditionalPipeline(
        tiny_unet(in_channels=4, out_channels=4), AncestralDDPMScheduler(clip_sample=False), tiny_vae()
    ),
}
AUTO_MAP = {"AutoModel": "denoising_unet.DenoisingUNet2DModel"}
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def checkpoint(tmp_path):
    def make(kind):
        KINDS[kind]().save_pretrained(tmp_path / kind)
        return tmp_path / kind

    return make


def change(file, **settings):
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


@pytest.mark.parametrize(
    "kind, file, settings, message",
    [
        ("classes", "unet/config.json", {"num_classes": 10**10}, "its config defines .* parameters, but the weights"),
        ("classes", "unet/config.json", {"block_out_channels": [10**6] * 2}, "but the weights have only"),
        ("classes", "unet/config.json", {"layers_per_block": 10**9}, "layers_per_block is 1,000,000,000"),
        ("classes", "unet/config.json", {"sample_size": 10**9}, "sample_size is 1000000000"),
        ("classes", "unet/config.json", {"sample_size": [10**5, 10**5]}, r"sample_size is \[100000, 100000\]"),
        ("classes", "unet/config.json", {"attention_head_dim": 0}, "its config does not define a Denoising"),
        ("classes", "unet/config.json", {"auto_map": {"AutoModel": "evil.Evil"}}, "'auto_map' names code"),
        ("classes", "unet/config.json", {"auto_map": {"AutoModel": "evil.DenoisingUNet2DModel"}}, "names code"),
        ("classes", "unet/config.json", {"auto_map": {"AutoModel": "user/evil--denoising_unet.X"}}, "names code"),
        ("classes", "unet/config.json", {"auto_map": {**AUTO_MAP, "AutoModelForImages": "evil.Evil"}}, "names code"),
        ("classes", "scheduler/scheduler_config.json", {"auto_map": AUTO_MAP}, "names code"),
        ("classes", "model_index.json", {"auto_map": {"AutoModel": "evil.Evil"}}, "'auto_map' names code"),
        ("classes", "model_index.json", {"auto_map": None}, "'auto_map' names code"),
        ("text", "text_encoder/config.json", {"auto_map": AUTO_MAP}, "names code"),
        ("latent", "vae/config.json", {"auto_map": {"AutoModel": "autoencoder_kl.AutoencoderKL"}}, "names code"),
        (
            "classes",
            "scheduler/scheduler_config.json",
            {"num_train_timesteps": 10**11},
            "not 1 to 1,000,000",
        ),
        ("classes", "model_index.json", {"unet": ["os", "system"]}, "names the module 'os'"),
        ("classes", "model_index.json", {"unet": ["diffusers", "UNet2DModel"]}, "is not a class for"),
        ("classes", "model_index.json", {"scheduler": ["diffusers", "DiffusionPipeline"]}, "is not a class for"),
        ("classes", "model_index.json", {"unet": []}, "is not a component of a pipeline"),
        ("classes", "model_index.json", {"unet": ["transformers", "AutoModel"]}, "is not a class for"),
        ("classes", "model_index.json", {"unet": ["denoising_unet", "torch"]}, "names the module 'denoising_unet'"),
        ("classes", "model_index.json", {"unet": ["any", "AncestralDDPMScheduler"]}, "is not a class for"),
        ("classes", "model_index.json", {"../unet": ["denoising_unet", "DenoisingUNet2DModel"]}, "'../unet'"),
        ("classes", "model_index.json", {"unet": [["denoising_unet"], 5]}, "is not a component of a pipeline"),
        ("classes", "model_index.json", {"_class_name": ["evil", "Evil"]}, "'Evil' is not of this package"),
        ("text", "model_index.json", {"tokenizer": ["transformers", "AutoTokenizer"]}, "is not a class for"),
        ("text", "text_encoder/config.json", {"num_hidden_layers": 10**8}, "num_hidden_layers is 100,000,000"),
        ("text", "text_encoder/config.json", {"num_hidden_layers": 5}, "its config defines"),  # would be random
        ("text", "text_encoder/config.json", {"vocab_size": 10**11}, "its config defines"),
        ("text", "text_encoder/config.json", {"_attn_implementation": "evil/kernel"}, "names code"),
        ("text", "text_encoder/config.json", {"a": [{"b": {"attn_implementation": "evil/kernel"}}]}, "names code"),
        ("text", "text_encoder/config.json", {"quantization_config": {"quant_method": "gptq"}}, "names code"),
        ("text", "tokenizer/tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.Evil"]}}, "names code"),
        ("autoencoder", "vae/config.json", {"latent_channels": 10**10}, "its config defines"),
        ("latent", "vae/config.json", {"block_out_channels": [10**6] * 2}, "its config defines"),
        ("latent", "vae/config.json", {"layers_per_block": 10**9}, "layers_per_block is 1,000,000,000"),
    ],
)
def test_a_config_that_asks_for_more_than_the_weights_is_refused(kind, file, settings, message, checkpoint):
    folder = checkpoint(kind)
    change(folder / file, **settings)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=message) as error:
        load_pipeline(folder)
    assert "\n" not in str(error.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024  # KiB
    if file.startswith("vae"):
        with pytest.raises(ValueError, match=message):
            load_vae(folder)


@pytest.mark.parametrize("content", ["[1, 2", "[1, 2]", '"text"', "[" * 100_000, "\x00\xff"])
def test_files_that_are_no_json_are_named(content, checkpoint):
    folder = checkpoint("classes")
    for file in ("unet/config.json", "model_index.json"):
        (folder / file).write_text(content, encoding="latin-1")
        with pytest.raises(ValueError, match=f"{file.split('/')[-1]}: not a ") as error:
            load_pipeline(folder)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("where", ["../../outside.safetensors", "/{root}/outside.safetensors", "evil.bin", 7])
def test_an_index_of_shards_leads_nowhere_else(where, checkpoint, tmp_path):
    folder = checkpoint("classes")
    weights = load_file(folder / "unet" / WEIGHTS)
    shutil.move(folder / "unet" / WEIGHTS, tmp_path / "outside.safetensors")
    save_file({"none": torch.zeros(1)}, folder / "unet" / "other.safetensors")
    where = where.format(root=tmp_path) if isinstance(where, str) else where
    index = {"metadata": {}, "weight_map": {name: where for name in weights}}
    (folder / "unet" / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="is not the name of a safetensors file in the same folder"):
        load_pipeline(folder)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 1234\n"


@pytest.mark.parametrize("load, component", [(load_pipeline, "unet"), (load_pipeline, "vae"), (load_vae, "vae")])
def test_pointers_of_git_lfs_are_named(load, component, checkpoint):
    file = checkpoint("latent") / component / WEIGHTS
    file.write_text(POINTER)
    with pytest.raises(ValueError, match=f"{file}: a pointer of Git LFS, not the file itself; run `git lfs pull`"):
        load(file.parents[1])


@pytest.mark.parametrize("damage", ["cut", "huge header", "shape"])
def test_weights_that_are_not_what_they_say(damage, checkpoint):
    file = checkpoint("classes") / "unet" / WEIGHTS
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    if damage == "cut":
        file.write_bytes(content[:-100])
    elif damage == "huge header":
        file.write_bytes((2**62).to_bytes(8, "little") + content[8:])
    else:
        header = json.loads(content[8 : 8 + length])
        next(value for name, value in header.items() if name != "__metadata__")["shape"] = [10**9, 10**9]
        header = json.dumps(header).encode()
        file.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    with pytest.raises(ValueError, match="not a safetensors file"):
        load_pipeline(file.parents[1])


def test_code_and_pickles_are_neither_run_nor_downloaded(checkpoint, tmp_path, hub):
    folder, ran = checkpoint("text"), tmp_path / "ran"
    for file in folder.rglob("*.py"):
        file.write_text(f"open({str(ran)!r}, 'w')")
    for component in ("unet", "text_encoder", "tokenizer"):
        (folder / component / "evil.py").write_text(f"open({str(ran)!r}, 'w')")
        torch.save({"weights": torch.zeros(1)}, folder / component / "pytorch_model.bin")
    load_pipeline(folder)
    repo_id = hub.new_repo_id()
    from huggingface_hub import HfApi

    HfApi().create_repo(repo_id)
    HfApi().upload_folder(repo_id=repo_id, folder_path=folder)
    hub.requests.clear()
    load_pipeline(repo_id)
    assert not ran.exists()
    assert not [request for request in hub.requests if request.path.endswith((".py", ".bin"))]
    (folder / "unet" / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=r"the weights of 'unet' \(\*.safetensors\) are missing"):
        load_pipeline(folder)


def test_a_repository_whose_files_climb_out_of_the_cache_writes_nothing_there(checkpoint, tmp_path, hub):
    pipe = KINDS["classes"]()
    repo_id = hub.new_repo_id()
    pipe.push_to_hub(repo_id)
    main = hub.repos["models", repo_id].branches["main"]
    some = next(iter(main.files.values()))
    for name in ("unet/../../../../../escaped.json", "../escaped.json", "unet/..\\escaped.json"):
        main.files[name] = some
    try:
        load_pipeline(repo_id, cache_dir=tmp_path / "deep" / "cache")
    except (ValueError, OSError) as error:
        assert "\n" not in str(error)
    written = [file for file in tmp_path.rglob("*escaped*") if not file.is_relative_to(tmp_path / "deep" / "cache")]
    assert not written


def test_a_setting_of_the_pipeline_cannot_be_made_a_component(checkpoint):
    folder = checkpoint("classes")
    change(folder / "model_index.json", value_range=["diffusers", "UNet2DModel"])
    (folder / "value_range").mkdir()
    with pytest.raises(ValueError, match="'UNet2DModel' of diffusers is not a class for the component 'value_range'"):
        load_pipeline(folder)


def test_the_file_for_automodel_is_that_of_this_package(checkpoint):
    folder = checkpoint("latent")
    check_code(folder)
    with open(folder / "vae" / "component.py", "a") as file:
        file.write("\nraise SystemExit('this ran')\n")
    with pytest.raises(ValueError, match="vae/component.py is not a file of this package"):
        check_code(folder)
