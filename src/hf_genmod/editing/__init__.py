"""Editing of images by diffusion models, as functions of a pipeline."""

from hf_genmod.editing.edits import edit_of
from hf_genmod.editing.interpolation import interpolate, vary
from hf_genmod.editing.inversion import invert

__all__ = ["edit_of", "interpolate", "invert", "vary"]
