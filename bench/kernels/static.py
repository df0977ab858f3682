"""What can be known of the kernels without a GPU: bytes that must move, and the compiled code.

    python -m bench.kernels.steer --part compiler

The first table is arithmetic: the bytes that any way must read and write in a case, and the time
they take at a card's published bandwidth. Nothing can be faster with inputs out of the L2 cache;
cases of a few microseconds wait rather than move bytes. The second is read off the machine code
that Triton makes for Ampere, Hopper and Blackwell: registers of a thread, spilled loads and stores,
instructions, and on Hopper how many bits a load has. It is compiled in processes of their own.
"""

import json
import os
import subprocess
import sys

from bench.kernels.cases import Case, Way
from bench.machine import installed, table

CARDS = {"A100": 2039, "H100": 3350, "H200": 4800, "RTX 4090": 1008}  # GB/s: 80 GB, SXM, SXM, -
CAPABILITIES = (80, 90, 100)
MOVED = (1, 1), (64, 1), (256, 1), (1, 8192)  # B, T
COMPILED = [  # op, T, D, K
    (op, T, D, K)
    for op in ("steer", "add_steer_norm")
    for T, D, K in ((1, 576, 4), (1, 4096, 1), (1, 4096, 4), (1, 8192, 4), (64, 4096, 4))
]


def floors() -> str:
    """Of both ops in bfloat16."""
    rows = []
    for (B, T), D, K in ((bt, D, K) for bt in MOVED for D in (576, 4096) for K in (4, 16)):
        case = Case(B, T, D, K, dtype="bfloat16")
        title = " ".join(map(str, case[:4]))
        for name, fused in (("steer", False), ("add_steer_norm", True)):
            moved = Way(name, lambda: None, "targets", fused).traffic(case)
            times = [f"{moved / gbs / 1e3:.3g}" for gbs in CARDS.values()]
            rows.append([name, title, f"{moved / 1e6:.3g}", *times])
    heads = [f"{name}, us" for name in CARDS]
    return table(["op, bfloat16", "B T D K", "MB that must move", *heads], rows)


def machine_code() -> str:
    """A row a variant, a column a capability."""
    if installed("triton") == "none":
        return 'The compiler\'s table needs Triton: on Linux, pip install "tinysteer[gpu]".'
    settings = os.environ | {"TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1"}
    command = [sys.executable, "-m", "bench.kernels.static"]
    run = {"env": settings, "stdout": subprocess.PIPE, "text": True}
    started = [subprocess.Popen([*command, str(sm)], **run) for sm in CAPABILITIES]
    reports = [json.loads(process.communicate()[0]) for process in started]
    rows = []
    for name, *codes in zip(reports[0], *(report.values() for report in reports), strict=True):
        numbers = ("{registers} / {spills} / {instructions}".format(**code) for code in codes)
        loads = codes[CAPABILITIES.index(90)]["loads"]
        bits = {pointer: "+".join(sorted(loads[pointer], key=int)) for pointer in sorted(loads)}
        rows.append([name, *numbers, ", ".join(map(" ".join, bits.items()))])
    heads = [f"sm_{sm}: registers / spills / instructions" for sm in CAPABILITIES]
    return table([f"Triton {installed('triton')}", *heads, "bits of a load"], rows)


def compile_for(capability: int) -> None:
    """Print a JSON object: a variant -> what its machine code holds."""
    from tests.helpers import compiled  # reads Triton, which must not interpret here

    report = {}
    for op, T, D, K in COMPILED:
        for position in (True, False):
            name = f"{op}, {'prefill' if T > 1 else 'decode'}, D {D}, K {K}"
            name += "" if position else ", no position"
            sizes = op.split("_")[0], T, D, K, compiled.BF16, compiled.BF16, False
            recorder = compiled.record(*sizes, {"position": position})
            kernel = compiled.compile_as_launched(recorder, capability)
            loads = compiled.load_widths(kernel.asm["ptx"], list(compiled.parameters(recorder)))
            report[name] = compiled.machine_code(kernel) | {"loads": loads}
    print(json.dumps(report))


if __name__ == "__main__":
    compile_for(int(sys.argv[1]))
