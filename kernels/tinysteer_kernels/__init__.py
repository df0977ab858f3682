"""Steering operations on a residual stream, and the rest of a decoder's step between its products.

Needs torch and nothing of tinysteer.
"""

from .attention import View, attend
from .devices import fusing
from .edits import directions, moves, steer
from .gating import ACTIVATIONS, gated
from .residual import add_steer_norm, rms_norm
from .tables import ALWAYS, PADDING, Edit, Edits, compile_edits

__all__ = [
    "ACTIVATIONS",
    "ALWAYS",
    "PADDING",
    "Edit",
    "Edits",
    "View",
    "add_steer_norm",
    "attend",
    "compile_edits",
    "directions",
    "fusing",
    "gated",
    "moves",
    "rms_norm",
    "steer",
]
