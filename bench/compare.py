"""Two runs of one bench side by side: how many times as long is each way in the second?

    python -m bench.compare a.jsonl b.jsonl

Lines are matched by all that they say of a case (part, shape, way, dtype); of several the last
counts. A ratio is of medians. Its interval is the widest that the 95 % intervals of both allow, so
that one which excludes 1 is a change between these two runs; a card's runs on two days differ too.
"""

import json
import sys
from pathlib import Path

from bench.machine import FORMAT, table

CASE = ("part", "model", "B", "T", "context", "D", "K", "directions", "dtype", "kind", "way")
CASE += ("fused", "warm", "position", "slot")
SAME = ("device", "driver", "torch", "triton", "threads", "commit", "date")


def read(path: str) -> dict[tuple, dict]:
    """A case -> its line. ValueError for a file that no bench of this version wrote."""
    lines = {}
    for number, text in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        try:
            line = json.loads(text)
            if line["format"] != FORMAT or not line["us_low"] <= line["us"] <= line["us_high"]:
                raise ValueError(f"its format is {line['format']}, this is {FORMAT}")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}:{number} is not a timed line of a bench: {error}") from None
        lines[tuple(line.get(name) for name in CASE)] = line
    return lines


def compared(a: dict[tuple, dict], b: dict[tuple, dict]) -> list[list[str]]:
    """A row for each case that both have: its name, both medians, the ratio, its interval."""
    rows = []
    for case in (case for case in a if case in b):
        name = ", ".join(f"{n} {v}" for n, v in zip(CASE, case, strict=True) if v not in (None, ""))
        old, new = a[case], b[case]
        low, high = new["us_low"] / old["us_high"], new["us_high"] / old["us_low"]
        medians = [f"{old['us']:.4g}", f"{new['us']:.4g}"]
        sign = "slower" if low > 1 else "faster" if high < 1 else ""
        ratio = f"{new['us'] / old['us']:.3f}", f"{low:.3f}..{high:.3f}"
        rows.append([name, *medians, *ratio, sign])
    return rows


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    try:
        a, b = map(read, sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"{error}")
    if not (rows := compared(a, b)):
        sys.exit(f"{sys.argv[1]} and {sys.argv[2]} have no case in common")
    for name in SAME:
        old, new = ({line.get(name) for line in lines.values()} for lines in (a, b))
        if old != new:
            print(f"{name}: {', '.join(map(str, old))} -> {', '.join(map(str, new))}")
    print(table(["case", "a, us", "b, us", "b / a", "interval", ""], rows))
    alone = len(a) + len(b) - 2 * len(rows)
    print(f"\n{len(rows)} cases in both files, {alone} in one alone")


if __name__ == "__main__":
    main()
