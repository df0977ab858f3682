"""Where tests run: on the CPU, as the oracles do, with kernels in Triton's interpreter.

The kernels' own tests run on a GPU, compiled, by
TINYSTEER_TEST_DEVICE=cuda pytest tests/test_steering.py tests/test_residual.py tests/test_ops.py
"""

import os

DEVICE = os.environ.get("TINYSTEER_TEST_DEVICE", "cpu")
if DEVICE == "cpu":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["TRITON_INTERPRET"] = "1"
