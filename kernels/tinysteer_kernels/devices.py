"""Triton where it exists; elsewhere enough of its name for the kernels' files to be read."""

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS, Windows: the PyTorch formulas serve

    class triton:  # noqa: N801
        jit = staticmethod(lambda function: function)

    class tl:  # noqa: N801
        constexpr = None


HAS_TRITON = hasattr(triton, "runtime")
