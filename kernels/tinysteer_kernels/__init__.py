"""Steering of a residual stream: ordered moves of each row, in one pass.

naive.py is the definition, decode/ the rest of a decoder's step between its products. Needs torch
and nothing of tinysteer.
"""

from . import naive
from .residual import add_steer_norm
from .steering import steer
from .tables import PADDING, Move, MoveTables, compile_moves

__all__ = ["PADDING", "Move", "MoveTables", "add_steer_norm", "compile_moves", "naive", "steer"]
