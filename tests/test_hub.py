import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from hf_genmod import (
    AncestralDDPMScheduler,
    ClassifierFreeGuidedPipeline,
    DenoisingUNet2DModel,
    UnconditionalPipeline,
    load_pipeline,
)


def pipeline(num_classes=None):
    torch.manual_seed(0)
    unet = DenoisingUNet2DModel(
        sample_size=8, block_out_channels=(8, 16), attention_levels=(False, True), attention_head_dim=8,
        layers_per_block=1, norm_num_groups=4, num_classes=num_classes,
    )  # fmt: skip
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    scheduler = AncestralDDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    if num_classes is None:
        return UnconditionalPipeline(unet, scheduler)
    return ClassifierFreeGuidedPipeline(unet, scheduler, id2label={0: "cat", 1: "dog"})


def draw(pipe):
    arguments = {"batch_size": 2} if isinstance(pipe, UnconditionalPipeline) else {"class_labels": ["cat", "dog"]}
    generator = torch.Generator().manual_seed(3)
    return torch.from_numpy(pipe(**arguments, generator=generator, num_inference_steps=3, output_type="np").images)


@pytest.mark.parametrize("num_classes", [None, 2])
def test_load_pipeline_finds_the_class_and_draws_the_same_from_a_folder_and_the_hub(num_classes, tmp_path, hub):
    pipe = pipeline(num_classes)
    repo_id = hub.new_repo_id("pipeline")
    pipe.save_pretrained(tmp_path)
    pipe.push_to_hub(repo_id)
    for where in (tmp_path, str(tmp_path), repo_id):
        loaded = load_pipeline(where)
        assert type(loaded) is type(pipe)
        assert torch.equal(draw(loaded), draw(pipe))


def test_what_is_no_checkpoint_of_ours_is_named(tmp_path, hub):
    unet = UNet2DModel(
        sample_size=8, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    )  # fmt: skip
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'DDPMPipeline', is not one of this package"):
        load_pipeline(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no model_index.json in it"):
        load_pipeline(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="'user/nothing-here' is not a folder here, nor a pipeline on the Hub"):
        load_pipeline("user/nothing-here")
    with pytest.raises(FileNotFoundError, match="is not a folder, nor can it be the id"):
        load_pipeline(tmp_path / "mistyped")
    (tmp_path / "empty" / "training_config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="no model_index.json in it, so it is a run that is not over; repeat"):
        load_pipeline(tmp_path / "empty")


def test_a_mistyped_folder_beside_checkpoints_is_not_looked_for_on_the_hub(tmp_path, hub, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("runs/plain", "runs/guided"):
        pipeline().save_pretrained(name)
    with pytest.raises(
        FileNotFoundError, match="'runs/plane' is not a folder; runs holds the checkpoints guided, plain:"
    ):
        load_pipeline("runs/plane")
    assert not hub.requests
