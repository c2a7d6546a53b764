"""The timesteps to sample at."""

import numpy as np


def choose_timesteps(T: int, n: int | None, timesteps: list[int] | None, spacing: str, offset: int) -> np.ndarray:
    """n of the T timesteps in descending order (Lin et al. 2023, Table 2), or the given ones.

    - "linspace" takes both ends: round(linspace(0, T−1, n)).
    - "leading" takes multiples from 0, never pure noise: i ⌊T/n⌋ + `offset`.
    - "trailing" starts from pure noise: round(T − i T/n) − 1.

    Raises:
        ValueError: Both or neither of n and `timesteps`; n out of range; `timesteps` not descending in T−1 … 0.
    """
    if (n is None) == (timesteps is None):
        raise ValueError(f"num_inference_steps: {n} with timesteps: {timesteps}; pass exactly one of the two.")
    if timesteps is not None:
        chosen = np.asarray(timesteps)
        descending = chosen.size > 0 and (chosen[:-1] > chosen[1:]).all() and T > chosen[0] and chosen[-1] >= 0
        if not descending or (chosen != chosen.round()).any():
            raise ValueError(f"timesteps: {list(timesteps)} must be integers descending within {T - 1} ... 0.")
    elif not 1 <= n <= T:
        raise ValueError(f"num_inference_steps: {n} must be within 1 ... {T}, the steps of training.")
    elif spacing == "linspace":
        chosen = np.linspace(0, T - 1, n).round()[::-1]
    elif spacing == "leading":
        chosen = np.arange(n)[::-1] * (T // n) + offset
    else:
        # Rounding makes this arange one longer for some n (61 of 1000); diffusers then samples at timestep −1.
        chosen = np.arange(T, 0, -T / n)[:n].round() - 1
    return chosen.astype(np.int64)
