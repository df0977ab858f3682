"""Whether what an op is given goes together: if not, a ValueError with the sizes seen."""

import torch
from torch import Tensor

from .tables import FIELDS, MoveTables

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def check_stream(x: Tensor) -> None:
    """ValueError for what is no residual stream that the kernels can read."""
    if not isinstance(x, Tensor):
        raise ValueError(f"x is a {type(x).__name__}: give the residual stream, a tensor")
    if x.ndim != 3 or not x.shape[2]:
        raise ValueError(f"x is {tuple(x.shape)}: give (rows, positions, width)")
    if x.dtype not in FLOATS:
        raise ValueError(f"x is {x.dtype}: use float32, float16 or bfloat16")
    if x.stride(2) != 1:
        raise ValueError(f"x has strides {x.stride()}: its last must be 1")


def check_steering(
    x: Tensor, bank: Tensor, tables: MoveTables, position: Tensor | None, slot: Tensor | None
) -> None:
    """ValueError, with the sizes seen, for what does not go together.

    What the tables and slots hold is not read: it may lie on a GPU.
    """
    if not isinstance(tables, MoveTables):
        raise ValueError(f"tables are a {type(tables).__name__}: give what compile_moves returns")
    (B, T, D), packed = x.shape, tables.packed
    if bank.ndim != 2 or bank.shape[1] != D:
        raise ValueError(f"x is {D} wide, but the bank of directions is {tuple(bank.shape)}")
    if bank.dtype not in FLOATS:
        raise ValueError(f"the bank is {bank.dtype}: use float32, float16 or bfloat16")
    if packed.ndim != 3 or packed.shape[1] != FIELDS + packed.shape[2]:
        raise ValueError(
            f"the tables are {tuple(packed.shape)}: give one layer's, (rows, {FIELDS} + K, K)"
        )
    if slot is None and packed.shape[0] != B:
        raise ValueError(f"tables are for {packed.shape[0]} rows, x has {B}: give a slot for each")
    shapes = {"tables": packed.shape, "position": (B, T), "slot": (B,)}
    given = {"bank": bank, "tables": packed, "position": position, "slot": slot}
    for name, tensor in given.items():
        if tensor is None:
            continue
        shape = shapes.get(name)
        if shape is not None and (tensor.shape != shape or tensor.dtype != torch.int32):
            seen = f"{tuple(tensor.shape)} {tensor.dtype}"
            raise ValueError(f"{name} is {seen}: it should be {tuple(shape)} torch.int32")
        if tensor.device != x.device:
            raise ValueError(f"x is on {x.device}, {name} on {tensor.device}")
        if name != "position" and not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()}: make it contiguous")


def check_residual(x: Tensor, delta: Tensor, weight: Tensor, post_weight: Tensor | None) -> None:
    """ValueError, with the sizes seen, for what does not go together."""
    check_stream(x)
    D = x.shape[2]
    if delta.shape != x.shape:
        raise ValueError(f"x is {tuple(x.shape)}, delta {tuple(delta.shape)}")
    if delta.stride(2) != 1:
        raise ValueError(f"delta has strides {delta.stride()}: its last must be 1")
    for name, tensor in (("delta", delta), ("weight", weight), ("post_weight", post_weight)):
        if tensor is None:
            continue
        if tensor.dtype != x.dtype or tensor.device != x.device:
            theirs = f"{tensor.dtype} on {tensor.device}"
            raise ValueError(f"x is {x.dtype} on {x.device}, {name} {theirs}")
        if name != "delta" and (tensor.shape != (D,) or not tensor.is_contiguous()):
            raise ValueError(f"{name} is {tuple(tensor.shape)}: it should be {(D,)}, contiguous")
