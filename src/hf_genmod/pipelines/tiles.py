"""Predictions over overlapping tiles."""

import torch


def blend_tiles(predict, inputs, tile_size: int, multiple: int) -> torch.Tensor:
    """`predict(*inputs)` of tensors (n, C, H, W), as the weighted mean over overlapping tiles, whose weights fall
    toward their edges. Sizes that `multiple` does not divide are padded by reflection."""
    height, width = inputs[0].shape[2:]
    rows, columns = (_reflected(length, -(-length // multiple) * multiple) for length in (height, width))
    inputs = [x[:, :, rows][:, :, :, columns] for x in inputs]
    tile_size = tile_size // multiple * multiple
    if max(inputs[0].shape[2:]) <= tile_size:
        return predict(*inputs)[:, :, :height, :width]

    total, weights = None, torch.zeros(inputs[0].shape[2:], device=inputs[0].device)
    for of_rows, weights_of_rows in _tiles(len(rows), tile_size, multiple):
        for of_columns, weights_of_columns in _tiles(len(columns), tile_size, multiple):
            weight = (weights_of_rows[:, None] * weights_of_columns).to(weights)
            prediction = weight * predict(*(x[:, :, of_rows, of_columns] for x in inputs))
            total = prediction.new_zeros(*prediction.shape[:2], *weights.shape) if total is None else total
            total[:, :, of_rows, of_columns] += prediction
            weights[of_rows, of_columns] += weight
    return (total / weights)[:, :, :height, :width]


def _reflected(length: int, longer: int) -> torch.Tensor:
    """Indices of reflection padding: 0 ... length - 1, then back, then forth."""
    index = torch.arange(longer) % (2 * length)
    return torch.minimum(index, 2 * length - 1 - index)


def _tiles(length: int, tile_size: int, multiple: int):
    """(slice, weights) of tiles that cover a length; neighbours overlap by a quarter of a tile or more."""
    size, overlap = min(length, tile_size), tile_size // 4
    count = 1 if length <= size else -(-(length - overlap) // (size - overlap))
    position = torch.arange(size) + 0.5
    weights = (torch.minimum(position, size - position) / overlap).clamp(max=1)
    for i in range(count):
        start = round(i * (length - size) / max(count - 1, 1) / multiple) * multiple
        yield slice(start, start + size), weights
