"""Steering operations on a residual stream. Needs torch and nothing of tinysteer."""

from .edits import directions, moves, steer
from .residual import add_steer_norm, rms_norm
from .tables import ALWAYS, PADDING, Edit, Edits, compile_edits

__all__ = [
    "ALWAYS",
    "PADDING",
    "Edit",
    "Edits",
    "add_steer_norm",
    "compile_edits",
    "directions",
    "moves",
    "rms_norm",
    "steer",
]
