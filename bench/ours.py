"""Our ways: the two ops, and their launchers with a tile or a bank of another kind."""

from unittest.mock import patch

from cases import EPS, Way
from tinysteer_kernels import add_steer_norm, residual, steer, steering
from tinysteer_kernels.devices import triton


def alone(kind: str, op=steer, name: str = "steer") -> Way:
    """`steer`, or what a reader has in its place."""

    def call(i):
        return op(i.x, i.bank, i.tables[kind], i.position)

    return Way(f"{name}: {kind}", call, kind, fused=False)


def fused(kind: str) -> Way:
    def call(i):
        steered = {"bank": i.bank, "tables": i.tables.get(kind), "position": i.position}
        return add_steer_norm(i.x, i.delta, i.weight, EPS, **steered)

    return Way(kind, call, kind, fused=True)


def launched(kind: str) -> list[Way]:
    """The launchers, for the interpreter: off a GPU the ops use their formulas."""

    def call_steer(i):
        steering.steer_launch(i.x, i.bank, i.tables[kind], i.position, None)
        return i.x

    def call_fused(i):
        steered = (None, None, None) if kind == "off" else (i.bank, i.tables[kind], i.position)
        return residual.add_steer_norm_launch(
            i.x, i.delta, i.weight, EPS, 0.0, None, *steered, None
        )

    ways = [Way(f"launched: {kind}", call_fused, kind, fused=True)]
    if kind != "off":
        ways.append(Way(f"launched: steer: {kind}", call_steer, kind, fused=False))
    return ways


def tiled(way: Way, block_t: int, block_k: int, n_warps: int) -> Way:
    """The same with other block sizes."""

    def call(i):
        tile = {"BLOCK_D": triton.next_power_of_2(i.x.shape[2])}
        chosen = tile | {"BLOCK_T": block_t, "BLOCK_K": block_k}, n_warps
        with (
            patch.object(steering, "steer_tiling", lambda *_: chosen),
            patch.object(residual, "steer_tiling", lambda *_: chosen),
        ):
            return way.call(i)

    return way._replace(name=f"{block_t} x {block_k}, {n_warps} warps", call=call)


def precise(way: Way) -> Way:
    """The same with the bank in float32."""

    def call(i, bank):
        return way.call(i._replace(bank=bank))

    changed = {"name": f"{way.name}, float32 bank", "bank_itemsize": 4}
    return way._replace(call=call, prepare=lambda i: (i.bank.float(),), **changed)
