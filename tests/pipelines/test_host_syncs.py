"""While it samples, the host never waits for the accelerator."""

import pytest
import torch
from small_pipelines import classifier_guided, draw, guided, quiet, seeded, unconditional
from tiny import tiny_text_pipeline
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_genmod.schedulers.ancestral_ddpm import AncestralDDPMScheduler


class HostSyncs(TorchDispatchMode):
    """Counts the operations for which the host would wait if some tensors, and all that is computed from them, were on
    an accelerator."""

    WAITING = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select")

    def __init__(self, tensors):
        super().__init__()
        self.counted, self.storages = [], {}
        self.keep(tensors)

    def keep(self, tensors):
        """Marks tensors as on the accelerator. Their memory is kept, so that no other tensor gets its address."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.nbytes():
                self.storages[storage.data_ptr()] = storage

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        leaves = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if any(tensor.untyped_storage().data_ptr() in self.storages for tensor in leaves):
            if function.overloadpacket.__name__ in self.WAITING:
                self.counted.append(function)
            self.keep(x for x in tree_leaves(result) if isinstance(x, torch.Tensor))
        return result


@pytest.mark.parametrize(
    "make, request_",
    [
        (unconditional, {"batch_size": 2}),
        (guided, {"class_labels": ["cat", {"dog": 1.0, "cat": -0.5}]}),
        (classifier_guided, {"class_labels": ["cat", {"dog": 1.0, "cat": -0.5}]}),
        (lambda **kwargs: quiet(tiny_text_pipeline(**kwargs)), {"prompt": ["a red cat", "two dogs"]}),
    ],
    ids=["unconditional", "guided", "classifier guided", "text"],
)
@pytest.mark.parametrize("clips", [True, False])
def test_no_step_waits_for_the_device(make, request_, clips):
    pipeline, counts = make(scheduler=AncestralDDPMScheduler(clip_sample=clips)), []
    for steps in (2, 5):
        x_T = torch.randn(2, 3, 8, 8, generator=seeded())
        with HostSyncs([*pipeline.unet.parameters(), pipeline.scheduler.alphas_cumprod, x_T]) as syncs:
            images = draw(pipeline, **request_, num_inference_steps=steps, latents=x_T)
            counts.append(len(syncs.counted))
            assert images.isfinite().all() and len(syncs.counted) == counts[-1] + 1  # one that is there is seen
    assert counts[0] == counts[1]  # there may be some before the first step


def test_a_prediction_that_is_not_finite_is_found_after_the_last_step():
    pipeline, steps = unconditional(), []
    with torch.no_grad():
        pipeline.unet.conv_out.bias.fill_(torch.nan)
    pipeline.scheduler.set_timesteps(3)
    first = int(pipeline.scheduler.timesteps[0])
    callback = lambda pipe, step, t, tensors: steps.append(step)  # noqa: E731
    with pytest.raises(ValueError, match=f"the prediction at timestep {first} is not finite"):
        draw(pipeline, num_inference_steps=3, callback_on_step_end=callback)
    assert steps == [0, 1, 2]
