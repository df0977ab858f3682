"""Triton where it can be of use; elsewhere enough of its name for the kernels' files to be read.

A CPU build of torch launches no kernel, and Triton takes 0.2 s to import: there it is left alone,
unless TRITON_INTERPRET is set (1 interprets kernels, 0 is for compiling them without a GPU).
"""

import os

import torch

try:
    if not (torch.version.cuda or torch.version.hip or "TRITON_INTERPRET" in os.environ):
        raise ImportError
    import triton
    import triton.language as tl
except ImportError:  # or macOS, or Windows: the PyTorch formulas serve

    class triton:  # noqa: N801
        jit = staticmethod(lambda function: function)

    class tl:  # noqa: N801
        constexpr = None


HAS_TRITON = hasattr(triton, "runtime")
