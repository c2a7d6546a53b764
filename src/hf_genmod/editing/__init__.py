"""Editing of images by diffusion models, as functions of a pipeline."""

from hf_genmod.editing.edits import edit_of
from hf_genmod.editing.interpolation import interpolate, vary
from hf_genmod.editing.inversion import invert
from hf_genmod.editing.noise_levels import predicted_x_0

__all__ = ["edit_of", "interpolate", "invert", "predicted_x_0", "vary"]
