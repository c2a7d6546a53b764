"""The image sizes and layer widths that a network takes."""


def pair(size) -> tuple[int, int]:
    """(height, width) of a size, which a config gives as one number or as two."""
    return (size, size) if isinstance(size, int) else tuple(size)


def size_factor(config) -> int:
    """The number that has to divide height and width: `patch_size` for the patches, times 2 for each lower level."""
    return config.patch_size * 2 ** (len(config.block_out_channels) - 1)


def check_size(config, size) -> None:
    """Raises `ValueError` if images of `size` = (height, width) cannot be folded and halved as the network needs."""
    factor = size_factor(config)
    if any(length % factor for length in size):
        below = tuple(max(length // factor, 1) * factor for length in size)
        above = tuple(-(-length // factor) * factor for length in size)
        raise ValueError(
            f"resolution {size[0]}x{size[1]}: this network (patch_size {config.patch_size}, "
            f"{len(config.block_out_channels)} levels) needs a height and width that {factor} divides, such "
            f"as {below[0]}x{below[1]} or {above[0]}x{above[1]}"
        )


def check_channels(config, sample) -> None:
    """Raises `ValueError` if a sample is not of shape (n, in_channels, height, width)."""
    if sample.ndim != 4 or sample.shape[1] != config.in_channels:
        raise ValueError(
            f"sample: shape {tuple(sample.shape)} is not (n, {config.in_channels}, height, width), "
            "the shape this network takes"
        )


def check_widths(config) -> None:
    """Raises `ValueError` if the groups of the normalisations do not divide the width of every level."""
    for width in config.block_out_channels:
        if width < 1 or width % config.norm_num_groups:
            raise ValueError(
                f"block_out_channels: {width} is not a positive multiple of norm_num_groups "
                f"({config.norm_num_groups}); change one of them"
            )
