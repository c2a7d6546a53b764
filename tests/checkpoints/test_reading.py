import json
import shutil

import pytest
from tiny import tiny_unet

from hf_genmod import AncestralDDPMScheduler, ClassifierFreeGuidedPipeline, load_pipeline


@pytest.mark.parametrize("module", ["{outside}/victim", "../../victim", "victim"])
def test_saving_again_deletes_only_code_of_the_checkpoint(module, tmp_path):
    victim = tmp_path / "victim.py"
    victim.write_text("important = True")
    folder = tmp_path / "checkpoint"
    ClassifierFreeGuidedPipeline(tiny_unet(num_classes=2), AncestralDDPMScheduler()).save_pretrained(folder)
    shutil.copy(victim, folder / "unet" / "victim.py")
    index = json.loads((folder / "model_index.json").read_text())
    index["unet"][0] = module.format(outside=tmp_path)
    index["../"] = ["victim", "DenoisingUNet2DModel"]
    loaded = ClassifierFreeGuidedPipeline.from_pretrained(folder)
    (folder / "model_index.json").write_text(json.dumps(index))
    loaded.save_pretrained(folder)
    assert victim.exists()
    assert (folder / "unet" / "victim.py").exists() == (module != "victim")
    load_pipeline(folder)
