"""PTX for Hopper executed by numpy: what a kernel does on a GPU that need not be here.

    memory = Memory()
    pointer = memory.put(array)
    races = launch(ptx, memory, [pointer, 5, 1e-6], grid=3, shared=1024)
    data = memory.get(pointer)

Of a block's threads those that are furthest behind take their instruction together; one block
follows another. A register is an array: the bits of each thread. In `ld.global.v4.b32` ld chooses
the function below; the rest are its traits, and the last of them is mostly a type.

Wrong addresses and races are noticed (see ptx_memory.py). Approximate instructions (ex2.approx,
div.full, ...) and sums of products are rounded once from float64. Nothing takes time.
"""

import re
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
from ptx_memory import Memory, Shared

UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}  # by bits
REGISTERS = {"%p": np.bool_, "%rs": np.uint16, "%r": np.uint32, "%rd": np.uint64}
WARP = 32


# The text.


class Program(NamedTuple):
    code: list[tuple]  # predicate under which a thread takes part, negated?, name, traits, operands
    labels: dict[str, int]
    parameters: list[str]
    n_threads: int


@cache
def parse(ptx: str) -> Program:
    """The one kernel of a text."""
    n_threads = re.search(r"\.reqntid (\d+)\n\{", ptx)
    body = re.sub("//.*", "", ptx[n_threads.end() : ptx.index("\n}", n_threads.end())])
    code, labels = [], {}
    for line in map(str.strip, re.split(r"[;\n]", body)):
        if label := re.fullmatch(r"(\$\w+):", line):
            labels[label[1]] = len(code)
        elif found := re.fullmatch(r"(?:@(!?)(%\w+)\s+)?([a-z]\w*)([\w.:]*)\s*(.*)", line):
            negated, guard, name, traits, operands = found.groups()
            operands = map(operand, re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", operands))
            code.append((guard, bool(negated), name, traits.split(".")[1:], tuple(operands)))
        elif line and not line.startswith("."):
            raise SyntaxError(line)
    parameters = re.findall(r"\.param .*?(\w+_param_\d+)", ptx)
    return Program(code, labels, parameters, int(n_threads[1]))


def operand(text: str) -> str | tuple:
    """A register or number, {several registers}, or [an address]: its base and an offset."""
    if text[0] == "[":
        base, offset = re.fullmatch(r"\[\s*([%\w]+)(?:\s*\+\s*(-?\d+))?\s*\]", text).groups()
        return base, int(offset or 0)
    return tuple(re.findall(r"[%\w]+", text)) if text[0] == "{" else text


# Types.


def n_bits(type: str) -> int:
    return 32 if type.endswith("x2") else int(re.search(r"\d+", type)[0])


def decode(bits: np.ndarray, type: str) -> np.ndarray:
    """Bits as wide as the type -> bool, integers or float64; of a pair (threads, 2)."""
    match type:
        case "bf16x2":
            return decode(bits.view(np.uint16).reshape(-1, 2), "bf16")
        case "bf16":
            return decode(bits.astype(np.uint32) << 16, "f32")
        case "f32":
            return bits.view(np.float32).astype(np.float64)
    return bits.view(f"i{bits.itemsize}") if type[0] == "s" else bits


def encode(values: np.ndarray, type: str) -> np.ndarray:
    """And back, rounded to nearest even; integers stay what they are."""
    match type:
        case "bf16x2":
            return encode(values, "bf16").view(np.uint32).reshape(-1)
        case "bf16":
            bits = encode(values, "f32")
            bits = np.where(np.isnan(values), 0x7FFF0000, bits + (0x7FFF + (bits >> 16 & 1)))
            return (bits >> 16).astype(np.uint16)
        case "f32":
            return values.astype(np.float32).view(np.uint32)
    return values


@cache
def literal(text: str, type: str) -> np.ndarray:
    """The bits of a number: 5, 0x7632U, or a float's in hexadecimal, 0f3F800000."""
    bits = int(text[2:], 16) if text.startswith("0f") else int(text.rstrip("U"), 0)
    return np.bool_(bits) if type == "pred" else UNSIGNED[n_bits(type)](bits % (1 << n_bits(type)))


# A block of threads.


class Block:
    """`run` executes a program, its pointers into `memory`."""

    def __init__(self, program: Program, memory: Memory, arguments: dict, index: int, shared: int):
        self.program, self.arguments = program, arguments
        self.memory, self.shared = memory, Shared(shared)
        self.thread = np.arange(program.n_threads, dtype=np.uint32)
        self.warp = self.thread // WARP
        self.registers = {"%tid.x": self.thread, "%ctaid.x": np.full_like(self.thread, index)}
        self.registers["global_smem"] = np.zeros_like(self.thread)
        self.copies, self.groups = [], []  # under way; of each group that was committed

    def run(self) -> None:
        code, labels = self.program.code, self.program.labels
        at = np.zeros(len(self.thread), np.int64)  # each thread's next instruction
        while (now := at.min()) < len(code):
            guard, negated, name, traits, operands = code[now]
            self.mask = at == now
            at[self.mask] += 1
            if guard is not None:
                self.mask &= self.registers[guard] ^ negated
            if name in ("bra", "ret"):
                at[self.mask] = labels[operands[0]] if operands else len(code)
            else:
                assert name not in TOGETHER or self.mask.all(), f"some threads miss a {name}"
                INSTRUCTIONS[name](self, traits, *operands)

    def read(self, source: str, type: str) -> np.ndarray:
        if source not in self.registers:
            bits = np.full(len(self.thread), literal(source, type))
        else:
            dtype = np.bool_ if type == "pred" else UNSIGNED[n_bits(type)]
            bits = self.registers[source].astype(dtype, copy=False)
        return decode(bits, type)

    def write(self, to: str, values: np.ndarray, type: str) -> None:
        """Where the mask is set; other threads keep what they have. _ is what nobody wants."""
        if to != "_":
            bits = encode(values, type).astype(REGISTERS[to.rstrip("0123456789")])
            if not self.mask.all():
                bits = np.where(self.mask, bits, self.registers.get(to, bits.dtype.type(0)))
            self.registers[to] = bits

    def columns(self, sources: str | tuple, bits: int) -> np.ndarray:
        """The bits of registers side by side, (threads, registers)."""
        return np.stack([self.read(source, f"b{bits}") for source in several(sources)], axis=-1)

    def fill(self, to: str | tuple, columns: np.ndarray) -> None:
        for register, column in zip(several(to), columns.T, strict=True):
            self.write(register, column, f"b{8 * column.itemsize}")

    def address(self, place: tuple[str, int]) -> np.ndarray:
        base, offset = place
        return self.registers[base].astype(np.int64) + offset


def several(operand: str | tuple) -> tuple:
    return (operand,) if isinstance(operand, str) else operand


# Instructions, named and ordered as in their manual: (block, traits, target, sources...).


def pure(function):
    """What is a function of each thread's own values of one type."""
    with_nan = {np.fmax: np.maximum, np.fmin: np.minimum}.get(function)

    def instruction(block, traits, to, *sources):
        values = (block.read(x, traits[-1]) for x in sources)
        block.write(to, (with_nan if "NaN" in traits else function)(*values), traits[-1])

    return instruction


def mul(block, traits, to, a, b, *c):
    """mul and mad: as wide as they come, twice as wide, or the upper half of that."""
    type, wide = traits[-1], f"{traits[-1][0]}64"
    if traits[0] not in ("wide", "hi"):
        return pure(lambda a, b, *c: sum(c, a * b))(block, traits, to, a, b, *c)
    a, b = (block.read(x, type).astype(np.int64 if wide == "s64" else np.uint64) for x in (a, b))
    if traits[0] == "hi":
        return block.write(to, a * b >> 32, type)
    block.write(to, sum((block.read(x, wide) for x in c), a * b), wide)


def bfe(block, traits, to, a, start, length):
    """Some bits of a number, the highest repeated where the type has a sign."""
    a, start, length = (block.read(x, "u32").astype(np.int64) for x in (a, start, length))
    field = a >> start & (1 << length) - 1
    sign = field >> length - 1 if traits[-1] == "s32" else 0
    block.write(to, field - (sign << length), traits[-1])


def setp(block, traits, to, a, b):
    block.write(to, COMPARISONS[traits[0]](*(block.read(x, traits[-1]) for x in (a, b))), "pred")


def selp(block, traits, to, a, b, which):
    a, b = (block.read(x, traits[-1]) for x in (a, b))
    block.write(to, np.where(block.read(which, "pred"), a, b), traits[-1])


def mov(block, traits, to, source):
    """Also of several registers into one, and of one into several."""
    if traits[-1] == "pred":
        return block.write(to, block.read(source, "pred"), "pred")
    columns = block.columns(source, n_bits(traits[-1]) // len(several(source)))
    block.fill(to, columns.view(UNSIGNED[n_bits(traits[-1]) // len(several(to))]))


def prmt(block, traits, to, a, b, selector):
    """Any four of the eight bytes of a and b."""
    places = block.read(selector, "u32")[:, None] >> np.arange(0, 16, 4, dtype=np.uint32) & 15
    assert (places < 8).all(), "a sign to repeat"
    chosen = np.take_along_axis(block.columns((a, b), 32).view(np.uint8), places.astype(int), 1)
    block.fill(to, chosen.view(np.uint32))


def ld(block, traits, to, source, *hint):
    if traits[0] == "param":
        value = np.full(len(block.thread), block.arguments[source[0]])
        value = decode(value.astype(UNSIGNED[n_bits(traits[-1])]), traits[-1])
        return block.write(to, value, traits[-1])
    space, mask = block.shared if traits[0] == "shared" else block.memory, block.mask
    data = np.zeros((len(mask), n_bits(traits[-1]) // 8 * len(several(to))), np.uint8)
    data[mask] = space.load(block.address(source)[mask], data.shape[1], block.warp[mask])
    block.fill(to, data.view(UNSIGNED[n_bits(traits[-1])]))


def st(block, traits, to, source, *hint):
    space, mask = block.shared if traits[0] == "shared" else block.memory, block.mask
    data = block.columns(source, n_bits(traits[-1])).view(np.uint8)
    space.store(block.address(to)[mask], data[mask], block.warp[mask])


def cvt(block, traits, to, *sources):
    """Of two sources the second becomes the lower half."""
    values = [block.read(source, traits[-1]) for source in reversed(sources)]
    block.write(to, np.stack(values, axis=-1) if len(values) > 1 else values[0], traits[-2])


def cp(block, traits, *operands):
    """cp.async: from global to shared memory; zeros where the last operand is 0."""
    if "commit_group" in traits:
        block.groups.append(block.copies)
        block.copies = []
    elif "wait_group" in traits:
        while len(block.groups) > int(operands[0]):
            for places, data in block.groups.pop(0):
                block.shared.bytes[places] = data
                block.shared.awaited[places // 2] = False
    else:
        to, source, size = operands[:3]
        size, given = int(size, 0), block.read(operands[-1], "u32")
        live, data = block.mask & (given == size), np.zeros((len(given), size), np.uint8)
        assert not given[block.mask & ~live].any()
        data[live] = block.memory.load(block.address(source)[live], size, block.warp[live])
        address, warp = block.address(to)[block.mask], block.warp[block.mask]
        places = block.shared.places(address, size, warp, writes=True)
        block.shared.awaited[places // 2] = True
        block.copies.append((places, data[block.mask]))


def bar(block, traits, *_):
    if "warp" not in traits:  # a warp's threads wait for each other here at every instruction
        block.shared.readers[:] = block.shared.writers[:] = 0


def shfl(block, traits, to, a, b, *_):
    """The value of another lane of the warp."""
    values, b = (block.read(x, "b32").reshape(-1, WARP) for x in (a, b))
    lane = {"bfly": b ^ np.arange(WARP, dtype=np.uint32), "idx": b}[traits[1]]
    block.write(to, np.take_along_axis(values, lane.astype(int), axis=1).reshape(-1), "b32")


def redux(block, traits, to, a, members):
    """One value of all lanes of the warp."""
    values = block.read(a, traits[-1]).reshape(-1, WARP)
    block.write(to, getattr(values, traits[1])(axis=1).repeat(WARP), traits[-1])


# Of an 8 x 8 matrix a lane holds two neighbours: 32 lanes x 2, read on, are its rows.


def matrix_rows(block, place: tuple, count: int) -> list[np.ndarray]:
    """Addresses of rows, and their warps: lanes 8 i to 8 i + 7 point at those of matrix i."""
    lanes = (x.reshape(-1, WARP)[:, : 8 * count] for x in (block.address(place), block.warp))
    return [x.reshape(-1) for x in lanes]


def ldmatrix(block, traits, to, source):
    address, warp = matrix_rows(block, source, len(to))
    matrices = block.shared.load(address, 16, warp).view(np.uint16).reshape(-1, len(to), 8, 8)
    matrices = np.ascontiguousarray(matrices.swapaxes(2, 3)) if "trans" in traits else matrices
    pairs = matrices.view(np.uint32).reshape(-1, len(to), WARP)
    block.fill(to, pairs.swapaxes(1, 2).reshape(-1, len(to)))


def stmatrix(block, traits, to, source):
    assert "trans" not in traits
    address, warp = matrix_rows(block, to, len(source))
    pairs = block.columns(source, 32).reshape(-1, WARP, len(source)).swapaxes(1, 2)
    block.shared.store(address, np.ascontiguousarray(pairs).view(np.uint8).reshape(-1, 16), warp)


def mma(block, traits, to, a, b, c):
    """(16, 16) x (16, 8) + (16, 8) of each warp: bfloat16, summed in float32."""
    assert traits[2:] == ["m16n8k16", "row", "col", "f32", "bf16", "bf16", "f32"], traits
    a, b = ([block.read(x, "bf16x2").reshape(-1, 8, 8) for x in several(m)] for m in (a, b))
    product = np.block([[a[0], a[2]], [a[1], a[3]]]) @ np.block(b).swapaxes(1, 2)
    values = product.reshape(-1, 2, WARP, 2).swapaxes(1, 2).reshape(-1, 4)  # of each lane
    for register, column, start in zip(to, values.T, c, strict=True):
        block.write(register, column + block.read(start, "f32"), "f32")


COMPARISONS = {"lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal}
COMPARISONS |= {"eq": np.equal, "neu": np.not_equal, "ne": lambda a, b: (a < b) | (a > b)}
FUNCTIONS = {"add": np.add, "sub": np.subtract, "neg": np.negative, "abs": np.abs, "rem": np.fmod}
FUNCTIONS |= {"div": lambda a, b: a / b if a.dtype == float else (a - np.fmod(a, b)) // b}
FUNCTIONS |= {"fma": lambda a, b, c: a * b + c, "rsqrt": lambda a: 1 / np.sqrt(a)}
FUNCTIONS |= {"max": np.fmax, "min": np.fmin, "ex2": np.exp2, "lg2": np.log2}
FUNCTIONS |= {"shl": np.left_shift, "shr": np.right_shift}
FUNCTIONS |= {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert}
INSTRUCTIONS = {name: pure(function) for name, function in FUNCTIONS.items()}
OTHERS = (mul, bfe, setp, selp, mov, prmt, ld, st, cvt, cp, bar, shfl, redux, ldmatrix, stmatrix)
INSTRUCTIONS |= {function.__name__: function for function in OTHERS} | {"mad": mul, "mma": mma}
TOGETHER = {"bar", "shfl", "redux", "ldmatrix", "stmatrix", "mma"}  # all threads, or none
INSTRUCTIONS["createpolicy"] = lambda block, traits, to, _: block.write(to, block.thread, "u32")


def launch(ptx: str, memory: Memory, arguments: Sequence, grid: int, shared: int) -> int:
    """Run `grid` blocks with `shared` bytes each. -> the number of races."""
    program, races = parse(ptx), 0
    values = [np.float32(x).view(np.uint32) if isinstance(x, float) else x for x in arguments]
    values += [0] * (len(program.parameters) - len(values))  # scratch memory, which nothing uses
    arguments = dict(zip(program.parameters, values, strict=True))
    with np.errstate(all="ignore"):
        for index in range(grid):
            block = Block(program, memory, arguments, index, shared)
            block.run()
            races += block.shared.races
    return races
