"""What the benches share: where and when a number was made, and a Markdown table."""

import datetime
import functools
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


def where() -> str:
    """Machine, versions, date and command, for above a table."""
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    facts = environment()
    versions = [f"torch {facts['torch']}", f"Python {platform.python_version()}"]
    if torch.cuda.is_available():
        versions[:0] = [f"driver {facts['driver']}", f"triton {facts['triton']}"]
    return (
        f"{facts['device']}, {os.cpu_count()} cores{load}; {', '.join(versions)}; "
        f"{facts['date']}; `{facts['command']}`"
    )


@functools.cache
def environment() -> dict[str, str]:
    """What a line of results says besides its result."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else processor(),
        "driver": gpu("driver_version"),
        "torch": torch.__version__,
        "triton": installed("triton"),
        "date": str(datetime.date.today()),
        "commit": commit(),
        "command": " ".join(["python", *sys.argv]),
    }


def processor() -> str:
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
        if names:
            return names[0]
    return platform.processor() or platform.machine()


def gpu(field: str) -> str:
    """What nvidia-smi reads off the first GPU: "driver_version", "clocks.sm" in MHz."""
    return said("nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits")


def commit() -> str:
    """The checkout's commit, a + after it where files differ; $COMMIT where there is no git."""
    known = said("git", "rev-parse", "--short", "HEAD")
    if known == "unknown":
        return os.environ.get("COMMIT", known)
    code = ":/", ":(top,exclude)bench/results"
    changed = said("git", "status", "--porcelain", "--untracked-files=no", "--", *code)
    return known + ("+" if changed != "unknown" else "")


def said(*command: str) -> str:
    """The first line of what a command prints, "unknown" where it fails or is silent."""
    run = {"cwd": Path(__file__).parent, "text": True, "stderr": subprocess.DEVNULL}
    try:
        return subprocess.check_output(command, **run).strip().split("\n")[0] or "unknown"
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def table(heads: list[str], rows: list[list]) -> str:
    """A Markdown table, its columns aligned."""
    cells = [heads, *[[f"{cell}" for cell in row] for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(heads))]
    cells.insert(1, ["-" * width for width in widths])
    lines = (" | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in cells)
    return "\n".join(f"| {line} |" for line in lines)
