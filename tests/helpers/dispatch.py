"""What PyTorch is asked to do: counted, or kept as a tape that can be played again."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only


class Calls(TorchDispatchMode):
    """Counts what is dispatched to PyTorch."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **kwargs or {})


aten = torch.ops.aten
READING = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten._unique2, aten.equal}


class Tape(TorchDispatchMode):
    """A CUDA graph without CUDA: the operations of one run, played again on the same memory.

    What Python decided or computed is frozen in them, as in a captured graph; a number that the
    host reads from a tensor is an error, as there.
    """

    def __init__(self, run):
        super().__init__()
        self.calls = []
        with self:
            run()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.overloadpacket not in READING, f"{function} asks for what a tensor holds"
        results = function(*args, **kwargs or {})
        kept = tree_map_only(torch.Tensor, torch.Tensor.detach, (args, kwargs or {}, results))
        self.calls.append((function, *kept))  # what is put into a parameter later is not seen
        return results

    @torch.autocast("cpu", enabled=False)  # a graph's types are settled
    def __call__(self):
        for function, args, kwargs, results in self.calls:
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(results), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and not same_memory(old, new):
                    old.copy_(new)


def same_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether one is a view of the other, or of what both are views of."""
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
