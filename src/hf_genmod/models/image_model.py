"""What all networks share: the sizes of images and the widths of layers that they take, and how they are saved."""

import functools
import inspect

from diffusers import ConfigMixin, ModelMixin


def pair(size) -> tuple[int, int]:
    """(height, width) of a size, which a config gives as one number or as two."""
    return (size, size) if isinstance(size, int) else tuple(size)


def in_safetensors_only(save):
    """A method of diffusers that saves, which is to refuse `safe_serialization=False`."""

    @functools.wraps(save)
    def save_safely(self, *args, **kwargs):
        if not inspect.signature(save).bind(self, *args, **kwargs).arguments.get("safe_serialization", True):
            raise ValueError("safe_serialization: False would write pickles, which are not loaded again; leave it out")
        return save(self, *args, **kwargs)

    return save_safely


class ImageModel(ModelMixin, ConfigMixin):
    """A network that folds patches of an image into channels and halves height and width from level to level."""

    save_pretrained = in_safetensors_only(ModelMixin.save_pretrained)
    push_to_hub = in_safetensors_only(ModelMixin.push_to_hub)
    _supports_gradient_checkpointing = True
    _skip_layerwise_casting_patterns = ["norm"]

    @property
    def size_factor(self) -> int:
        """The number that divides height and width of every image that the network takes."""
        return self.config.patch_size * 2 ** (len(self.config.block_out_channels) - 1)

    def check_size(self, size: tuple[int, int]) -> None:
        """Raises `ValueError` if the network cannot fold and halve images of `size` = (height, width)."""
        factor = self.size_factor
        if any(length % factor for length in size):
            below = tuple(max(length // factor, 1) * factor for length in size)
            above = tuple(-(-length // factor) * factor for length in size)
            raise ValueError(
                f"resolution {size[0]}x{size[1]}: this network (patch_size {self.config.patch_size}, "
                f"{len(self.config.block_out_channels)} levels) needs a height and width that {factor} divides, such "
                f"as {below[0]}x{below[1]} or {above[0]}x{above[1]}"
            )

    def _check_config(self) -> None:
        for width in self.config.block_out_channels:
            if width < 1 or width % self.config.norm_num_groups:
                raise ValueError(
                    f"block_out_channels: {width} is not a positive multiple of norm_num_groups "
                    f"({self.config.norm_num_groups}); change one of them"
                )
        self.check_size(pair(self.config.sample_size))

    def _check_images(self, sample) -> None:
        channels = self.config.in_channels
        if sample.ndim != 4 or sample.shape[1] != channels:
            raise ValueError(f"sample: shape {tuple(sample.shape)} is not (n, {channels}, height, width)")
        self.check_size(tuple(sample.shape[2:]))
