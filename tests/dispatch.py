"""What PyTorch is asked to do: counted, or kept as a tape that can be played again."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Calls(TorchDispatchMode):
    """Counts what is dispatched to PyTorch."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **kwargs or {})


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
        assert function is not torch.ops.aten._local_scalar_dense.default, "the host reads a tensor"
        results = function(*args, **kwargs or {})
        self.calls.append((function, args, kwargs or {}, results))
        return results

    def __call__(self):
        for function, args, kwargs, results in self.calls:
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(results), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and not same_memory(old, new):
                    old.copy_(new)


def same_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether one is a view of the other, or of what both are views of."""
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
