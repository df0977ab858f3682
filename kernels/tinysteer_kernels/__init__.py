"""Steering operations on a residual stream. Needs torch and nothing of tinysteer."""

from tinysteer_kernels.edits import (
    ALWAYS,
    PADDING,
    Edit,
    Edits,
    compile_edits,
    directions,
    moves,
    steer,
)

__all__ = ["ALWAYS", "PADDING", "Edit", "Edits", "compile_edits", "directions", "moves", "steer"]
