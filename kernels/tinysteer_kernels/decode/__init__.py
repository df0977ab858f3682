"""The rest of a decoder's step between its products: attention over a cache, and a gated MLP."""

from ..devices import use_kernels
from ..residual import rms_norm
from .attention import attend
from .gating import ACTIVATIONS, gated
from .view import View

__all__ = ["ACTIVATIONS", "View", "attend", "gated", "rms_norm", "use_kernels"]
