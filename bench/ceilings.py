"""What this GPU can do at most: every percentage of the other benches is of these.

    python bench/ceilings.py

A large copy, bytes read and written both counted; a sum, which only reads; a chain of kernels
that do nothing, in a CUDA graph; a product of two 8192 x 8192 matrices. Inputs are random.
"""

import torch
from cases import BF16
from common import gpu, table, where
from timing import Graph, capture, measure, quantiles, record, replays
from tinysteer_kernels.devices import HAS_TRITON, tl, triton
from torch import Tensor

COPIES = (2**26, 2**28, 2**30)  # bytes; one H200 copied the last at two thirds of the others' rate
CEILING = COPIES[1]


@triton.jit
def nothing_kernel(x, BLOCK: tl.constexpr):
    pass


def copy(source: Tensor, target: Tensor) -> Tensor:
    return target.copy_(source)


def product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    return torch.mm(a, b, out=out)


def nothing(x: Tensor) -> Tensor:
    nothing_kernel[(1,)](x, BLOCK=1)
    return x


def random(n: int, dtype=torch.float32, device="cuda") -> Tensor:
    return torch.randn(n, dtype=dtype, device=device)


def copy_bandwidth(n_bytes: int = CEILING) -> float:
    """Bytes a second, read and written."""
    source, target = random(n_bytes // 4), random(n_bytes // 4)
    time = measure({"copy": capture(copy, [(source, target)])})["copy"]
    assert torch.equal(source, target)
    return 2e6 * n_bytes / time.us


def read_bandwidth(n_bytes: int = COPIES[-1]) -> float:
    """Bytes a second of a sum in float32."""
    x = random(n_bytes // 4)
    graph = capture(torch.sum, [(x,)])
    time = measure({"sum": graph})["sum"]
    expected = float(x.double().sum())
    assert abs(float(graph.outputs[0]) - expected) < 1.0
    return 1e6 * n_bytes / time.us


def chain(lengths: tuple[int, ...] = (1, 10, 100, 1000)) -> dict[int, float]:
    """Nodes in the graph -> microseconds a replay."""
    x = random(1)
    graphs = {n: Graph(nothing, [(x,)], n) for n in lengths}
    times = replays(graphs, 200)
    return {n: n * quantiles(times[n], 0.5)[0] for n in lengths}


def multiply_rate(n: int = 8192) -> float:
    """FLOP a second in bfloat16."""
    a, b = random(n * n, BF16).view(n, n), random(n * n, BF16).view(n, n)
    graph = capture(product, [(a, b, torch.empty_like(a))])
    time = measure({"mm": graph})["mm"]
    some = a[:8].double() @ b.double()
    assert (graph.outputs[0][:8].double() - some).norm() < 1e-2 * some.norm()
    return 2e6 * n**3 / time.us


def check_on_cpu() -> None:
    a, b = random(64 * 64, device="cpu").view(64, 64), random(64 * 64, device="cpu").view(64, 64)
    out = torch.full_like(a, torch.nan)
    torch.testing.assert_close(copy(a, out), a)
    torch.testing.assert_close(product(a, b, out), (a.double() @ b.double()).float())


def main() -> None:
    print(where(), end="\n\n")
    if not torch.cuda.is_available():
        check_on_cpu()
        return print("No GPU is here: the calls were checked on the CPU, nothing was timed.")
    rows = []

    def result(what: str, value: float, unit: str, dtype: str) -> None:
        rows.append([what, dtype, f"{value:.4g}", unit])
        clock = gpu("clocks.sm")
        record("ceilings", what=what, value=value, unit=unit, dtype=dtype, sm_mhz=clock)

    for n in COPIES:
        result(f"copy of {n >> 20} MiB", copy_bandwidth(n) / 1e9, "GB/s", "float32")
    result(f"sum of {COPIES[-1] >> 20} MiB", read_bandwidth() / 1e9, "GB/s", "float32")
    if HAS_TRITON:
        times = chain()
        for n, us in times.items():
            result(f"graph of {n} empty kernels", us, "us", "")
        result("empty kernel in a graph", (times[1000] - times[100]) / 900, "us", "")
    result("8192 x 8192 x 8192 product", multiply_rate() / 1e12, "TFLOP/s", "bfloat16")
    print(table(["", "dtype", "", "unit"], rows))
    return None


if __name__ == "__main__":
    main()
