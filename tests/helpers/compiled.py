"""Compile the kernels as their launchers would for a GPU that need not be here, and read the code.

    TRITON_INTERPRET=0 python tests/helpers/compiled.py 90

prints a JSON object, variant -> what `machine_code` counts and which optional arguments were given,
for compute capability 9.0.
"""

import collections
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from tinysteer_kernels import Move, compile_moves, residual, steering
from tinysteer_kernels.decode import View, attention, gating
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

BIN = Path(triton.__file__).parent / "backends/nvidia/bin"
TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int32: "i32",
    torch.int64: "i64",
}
BF16, FP32 = torch.bfloat16, torch.float32
ONE, MANY = 1, 64  # positions: decoding, and a prefill

# op, positions, width, moves, type of x, of the bank, Gemma's post-norm, and what is left out or
# given besides: by default a position is given, a slot is not
VARIANTS = {
    "steer, decode": ("steer", ONE, 4096, 4, BF16, BF16, False),
    "steer, decode, one edit": ("steer", ONE, 2048, 1, BF16, BF16, False),
    "steer, decode, float32": ("steer", ONE, 4096, 4, FP32, FP32, False),
    "steer, decode, precise bank": ("steer", ONE, 4096, 4, BF16, FP32, False),
    "steer, prefill": ("steer", MANY, 4096, 16, BF16, BF16, False),
    "steer, prefill, widest": ("steer", MANY, 16384, 4, BF16, BF16, False),
    "add, decode": ("add", ONE, 4096, 4, BF16, BF16, False),
    "add, decode, small": ("add", ONE, 576, 16, BF16, BF16, False),
    "add, decode, 8192": ("add", ONE, 8192, 4, BF16, BF16, False),
    "add, decode, widest": ("add", ONE, 16384, 4, BF16, BF16, True),
    "add, decode, post-norm": ("add", ONE, 3584, 4, BF16, BF16, True),
    "add, decode, float16": ("add", ONE, 2304, 4, torch.float16, torch.float16, True),
    "add, decode, float32": ("add", ONE, 8192, 4, FP32, FP32, False),
    "add, decode, widest float32": ("add", ONE, 16384, 4, FP32, FP32, False),
    "add, decode, precise bank": ("add", ONE, 4096, 4, BF16, FP32, True),
    "add, prefill, widest float32": ("add", MANY, 16384, 4, FP32, FP32, False),
    "add, decode, no moves": ("add", ONE, 4096, 0, BF16, BF16, False),
    "add, prefill": ("add", MANY, 4096, 4, BF16, BF16, False),
    "add, prefill, post-norm": ("add", MANY, 2048, 4, BF16, BF16, True),
    "steer, decode, no position": ("steer", ONE, 4096, 4, BF16, BF16, False, {"position": False}),
    "steer, prefill, no position": ("steer", MANY, 4096, 4, BF16, BF16, False, {"position": False}),
    "steer, decode, slot": ("steer", ONE, 4096, 4, BF16, BF16, False, {"slot": True}),
    "steer, prefill, slot": ("steer", MANY, 4096, 16, BF16, BF16, False, {"slot": True}),
    "add, decode, no position": ("add", ONE, 4096, 4, BF16, BF16, True, {"position": False}),
    "add, prefill, no position": ("add", MANY, 4096, 4, BF16, BF16, False, {"position": False}),
    "add, decode, slot": ("add", ONE, 4096, 4, BF16, BF16, False, {"slot": True}),
    "add, decode, slot alone": (
        ("add", ONE, 4096, 4, BF16, BF16, True, {"slot": True, "position": False})
    ),
    "add, prefill, slot": ("add", MANY, 4096, 4, BF16, BF16, False, {"slot": True}),
    "add, decode, no moves, post-norm": ("add", ONE, 4096, 0, BF16, BF16, True),
}
# rows, query heads, key heads, columns, head_dim, type, norms of the heads, cap of the scores
ATTENTION = {
    "attend, Llama 3.1": (1, 32, 8, 4096, 128, BF16, False, None),
    "attend, Gemma 2": (64, 8, 4, 4096, 256, BF16, False, 50.0),
    "attend, Gemma 3": (1, 4, 1, 4096, 256, BF16, True, None),
    "attend, Phi-3 mini": (64, 32, 32, 4096, 96, torch.float16, False, None),
    "attend, float32": (1, 9, 3, 1024, 64, FP32, False, None),
    "attend, all at once": (1, 8, 4, 4096, 256, BF16, True, 50.0),
}
COMBINING = {  # as many shares as there may be, and heads as wide as there are
    "combine, Llama 3.1": ATTENTION["attend, Llama 3.1"],
    "combine, one key head": (1, 8, 1, 8192, 256, BF16, False, None),
}
GATING = {  # activation, type
    "gated, silu": ("silu", BF16),
    "gated, gelu_tanh": ("gelu_tanh", FP32),
}


class Recorder:
    """Stands in a kernel's place and keeps what a launcher hands it."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        def launch(*positional, num_warps, **named):
            arguments = dict(zip(self.kernel.arg_names, positional, strict=False)) | named
            (self.grid,) = grid
            self.arguments = {name: arguments[name] for name in self.kernel.arg_names}
            self.n_warps = num_warps

        return launch


def describe(value):
    """An argument's type as Triton writes it; None, and a size of 1, are constants to it."""
    if isinstance(value, torch.Tensor):
        return "*" + TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "constexpr" if value is None or value == 1 else "i32"


def parameters(recorder: Recorder) -> dict[str, object]:
    """What the compiled kernel is handed, * before pointers."""
    handed = {}
    for name, value in run_time(recorder).items():
        handed[f"*{name[:-4]}" if isinstance(value, torch.Tensor) else name] = value  # no _ptr
    return handed


def run_time(recorder: Recorder) -> dict[str, object]:
    """The arguments that are no constants."""
    constexprs = {p.name for p in recorder.kernel.params if p.is_constexpr}
    return {
        name: value
        for name, value in recorder.arguments.items()
        if name not in constexprs and describe(value) != "constexpr"
    }


def compile_as_launched(recorder: Recorder, capability: int):
    """The recorded launch -> Triton's compiled kernel.

    As in a launch, it is known which tensors are aligned and which sizes 16 divides.
    """
    given, signature, constants, aligned = run_time(recorder), {}, {}, []
    for i, (name, value) in enumerate(recorder.arguments.items()):
        signature[name] = describe(value) if name in given else "constexpr"
        if name not in given:
            constants[(i,)] = value
        elif isinstance(value, torch.Tensor):
            aligned += [(i,)] * (value.data_ptr() % 16 == 0)
        elif isinstance(value, int) and value % 16 == 0:
            aligned.append((i,))
    attributes = {place: [["tt.divisibility", 16]] for place in aligned}
    source = ASTSource(recorder.kernel, signature, constants, attributes)
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options={"num_warps": recorder.n_warps})


def record(op, T, D, K, dtype, bank_dtype, post_norm, given=None) -> Recorder:
    """Launch an op on empty tensors with the kernel replaced."""
    given = {"position": True, "slot": False} | (given or {})
    x = torch.empty(2, T, D, dtype=dtype)
    bank = torch.eye(1, D, dtype=bank_dtype)
    tables = compile_moves(bank, [[Move(0, bias=1.0)] * K] * 2)
    position = torch.zeros(2, T, dtype=torch.int32) if given["position"] else None
    slot = torch.zeros(2, dtype=torch.int32) if given["slot"] else None
    if op == "steer":
        steering.steer_kernel = recorder = Recorder(STEER)
        steering.steer_launch(x, bank, tables, position, slot)
    else:
        residual.add_steer_norm_kernel = recorder = Recorder(ADD)
        weight, post = x[0, 0].clone(), x[0, 0].clone() if post_norm else None
        steered = (bank, tables, position, slot) if K else (None,) * 4
        offset = float(post_norm)
        residual.add_steer_norm_launch(x, x.clone(), weight, 1e-6, offset, post, *steered)
    return recorder


def record_attention(B, H, G, S, D, dtype, qk_norm, cap) -> tuple[Recorder, Recorder]:
    """Likewise: the launches of both kernels."""
    attention.attend_kernel, attention.combine_kernel = Recorder(ATTEND), Recorder(COMBINE)
    with torch.device("meta"):
        qkv = torch.empty(B, 1, (H + 2 * G) * D, dtype=dtype)
        cos = torch.empty(B, 1, 1, D, dtype=dtype)
        k = torch.empty(B, G, S, D, dtype=dtype)
        column = torch.empty(1, dtype=torch.int64)
    view = View(cos, cos, column, column, S)
    weight = cos[0, 0, 0] if qk_norm else None
    traits = attention.Traits(0.1, cap, weight, weight, 1e-6, float(qk_norm))
    attention.attend_launch(qkv, k, k, view, traits)
    return attention.attend_kernel, attention.combine_kernel


def record_gating(activation, dtype) -> Recorder:
    gating.gated_kernel = recorder = Recorder(GATED)
    gating.gated_launch(torch.empty(2, 1, 2 * 14336, dtype=dtype), activation)
    return recorder


STEER, ADD = steering.steer_kernel, residual.add_steer_norm_kernel
ATTEND, COMBINE = attention.attend_kernel, attention.combine_kernel
GATED = gating.gated_kernel


def machine_code(kernel) -> dict:
    """Registers, bytes of stack, spills, barriers and instructions of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        run = {"capture_output": True, "text": True, "check": True}
        usage = subprocess.run([BIN / "cuobjdump", "-res-usage", file.name], **run).stdout
        code = subprocess.run([BIN / "nvdisasm", "-c", file.name], **run).stdout
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", code)),
        "barriers": len(re.findall(r"\bBAR\.", code)),
        "instructions": len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", code, flags=re.MULTILINE)),
    }


def load_widths(ptx: str, pointers: list[str]) -> dict[str, dict[int, int]]:
    """pointer -> {bits: number of loads}, by following each address back to the kernel's arguments.

    pointers: the arguments' names in order, those that are constants left out.
    """
    made_of = collections.defaultdict(set)  # register -> what it is computed from
    loads = []  # register of the address, bits
    for line in ptx.splitlines():
        load = re.search(r"ld\.global\S*?(?:\.v(\d))?\.[bfsu](\d+)\s.*\[\s*(%\w+)", line)
        rule = re.match(r"\s*(?:@!?%p\d+\s+)?([a-z][\w.:]*)\s+(%\w+),\s*(.*);", line)
        if load:
            loads.append((load[3], int(load[1] or 1) * int(load[2])))
        elif rule and rule[1].startswith("ld.param"):
            made_of[rule[2]].add(pointers[int(re.search(r"param_(\d+)", rule[3])[1])])
        elif rule:
            made_of[rule[2]].update(re.findall(r"%\w+", rule[3]))
    widths = collections.defaultdict(collections.Counter)
    for register, bits in loads:
        todo, seen = [register], set()
        while todo:
            if (name := todo.pop()) not in seen:
                seen.add(name)
                todo += made_of[name]
        (base,) = {name for name in seen if name.startswith("*")}
        widths[base[1:]][bits] += 1
    return widths


def main() -> None:
    capability = int(sys.argv[1])
    report = {}
    launches = {name: record(*variant) for name, variant in VARIANTS.items()}
    launches |= {name: record_attention(*variant)[0] for name, variant in ATTENTION.items()}
    launches |= {name: record_attention(*variant)[1] for name, variant in COMBINING.items()}
    launches |= {name: record_gating(*variant) for name, variant in GATING.items()}
    for name, recorder in launches.items():
        kernel = compile_as_launched(recorder, capability)
        ptx, pointers = kernel.asm["ptx"], list(parameters(recorder))
        report[name] = machine_code(kernel) | {"loads": load_widths(ptx, pointers)}
        report[name]["kernel"], report[name]["warps"] = recorder.kernel.__name__, recorder.n_warps
        arguments = recorder.arguments.items()
        report[name]["given"] = [name for name, value in arguments if value is not None]
        report[name]["absent"] = [name for name, value in arguments if value is None]
        report[name]["copies"] = sorted({*re.findall(r"cp\.async\.c\w.*\], (\w+)", ptx)})
    print(json.dumps(report))


if __name__ == "__main__":
    main()
