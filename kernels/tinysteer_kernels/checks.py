"""Whether what an op is given goes together: if not, a ValueError with the sizes seen."""

import torch
from torch import Tensor

from .tables import Edits

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


def check_edits(x: Tensor, bank: Tensor, edits: Edits, position: Tensor | None) -> None:
    """ValueError, with the sizes seen, for what does not go together."""
    if not isinstance(edits, Edits):
        raise ValueError(f"edits are a {type(edits).__name__}: give what compile_edits returns")
    (B, T, D), K = x.shape, edits.index.shape[-1]
    if bank.ndim != 2 or bank.shape[1] != D:
        raise ValueError(f"x is {D} wide, but the bank of directions is {tuple(bank.shape)}")
    if bank.dtype not in FLOATS:
        raise ValueError(f"the bank is {bank.dtype}: use float32, float16 or bfloat16")
    if len(edits.index) != B:
        raise ValueError(f"edits are for {len(edits.index)} rows, x has {B}")
    wanted = dict.fromkeys(("index", "first", "last"), ((B, K), torch.int32))
    wanted |= dict.fromkeys(("bias", "slope", "low", "high"), ((B, K), torch.float32))
    wanted |= {"gram": ((B, K, K), torch.float32), "position": ((B, T), torch.int32)}
    tables = edits._asdict() | ({} if position is None else {"position": position})
    for name, table in tables.items():
        shape, dtype = wanted[name]
        if table.shape != shape or table.dtype != dtype:
            seen = f"{tuple(table.shape)} {table.dtype}"
            raise ValueError(f"{name} is {seen}: it should be {shape} {dtype}")
    for name, tensor in (tables | {"bank": bank}).items():
        if tensor.device != x.device:
            raise ValueError(f"x is on {x.device}, {name} on {tensor.device}")
        if name != "position" and not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()}: make it contiguous")


def check_surroundings(
    x: Tensor, delta: Tensor, weight: Tensor, post_weight: Tensor | None
) -> None:
    """ValueError, with the sizes seen, for what does not go together."""
    check_stream(x)
    D = x.shape[2]
    if delta.shape != x.shape:
        raise ValueError(f"x is {tuple(x.shape)}, delta {tuple(delta.shape)}")
    if delta.stride(2) != 1:
        raise ValueError(f"delta has strides {delta.stride()}: its last must be 1")
    for name, tensor in {"delta": delta, "weight": weight, "post_weight": post_weight}.items():
        if tensor is None:
            continue
        if tensor.dtype != x.dtype or tensor.device != x.device:
            theirs = f"{tensor.dtype} on {tensor.device}"
            raise ValueError(f"x is {x.dtype} on {x.device}, {name} {theirs}")
        if name != "delta" and (tensor.shape != (D,) or not tensor.is_contiguous()):
            raise ValueError(f"{name} is {tuple(tensor.shape)}: it should be {(D,)}, contiguous")
