"""What the benches share: a line that says where and when, and a Markdown table."""

import datetime
import os
import platform
import sys

import torch


def where() -> str:
    """Machine, versions, date and command, for above a table."""
    cpu = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
        cpu = names[0] if names else cpu
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    command = " ".join(["python", *sys.argv])
    return (
        f"{device}, {os.cpu_count()} cores{load}; torch {torch.__version__}, "
        f"Python {platform.python_version()}; {datetime.date.today()}; `{command}`"
    )


def table(heads: list[str], rows: list[list]) -> str:
    """A Markdown table, its columns aligned."""
    cells = [heads, *[[f"{cell}" for cell in row] for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(heads))]
    cells.insert(1, ["-" * width for width in widths])
    lines = (" | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in cells)
    return "\n".join(f"| {line} |" for line in lines)
