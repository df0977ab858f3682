"""What all benches share: where a number was made, tables, JSON lines, the parts of a bench."""

import argparse
import datetime
import functools
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch

FORMAT = 1  # of the JSON lines: `bench.compare` reads no other
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"


def where() -> str:
    """Machine, versions, date and command, for above a table."""
    facts, load = environment(), f"load {os.getloadavg()[0]:.1f}" if os.name == "posix" else ""
    versions = [f"{name} {facts[name]}" for name in ("driver", "torch", "triton", "python")]
    machine = [facts["device"], f"{facts['threads']} threads of {os.cpu_count()} cores", load]
    groups = ", ".join(filter(None, machine)), ", ".join(versions), facts["date"]
    return "; ".join([*groups, f"`{facts['command']}`"])


@functools.cache
def environment() -> dict[str, str | int]:
    """What a line of results says besides its result."""
    main = sys.modules["__main__"].__spec__  # None for a script
    command = ["python", "-m", main.name, *sys.argv[1:]] if main else ["python", *sys.argv]
    return {
        "format": FORMAT,
        "device": torch.cuda.get_device_name() if ON_GPU else processor(),
        "driver": gpu("driver_version"),
        "torch": torch.__version__,
        "triton": installed("triton"),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "date": str(datetime.date.today()),
        "commit": commit(),
        "command": shlex.join(command),
    }


def processor() -> str:
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def gpu(field: str) -> str:
    """What nvidia-smi reads off the first GPU: "driver_version", "clocks.sm" in MHz."""
    query = f"--query-gpu={field}", "--format=csv,noheader,nounits"
    return said("nvidia-smi", *query) if ON_GPU else "none"


def commit() -> str:
    """The checkout's commit, a + after it where files differ; $COMMIT where there is no git."""
    head = said("git", "rev-parse", "--short", "HEAD")
    code = "--untracked-files=no", "--", ":/", ":(top,exclude)bench/results"
    changed = head != "none" and said("git", "status", "--porcelain", *code) != "none"
    return os.environ.get("COMMIT", head) if head == "none" else head + "+" * changed


def said(*command: str) -> str:
    """The first line of what a command prints, "none" where it fails or is silent."""
    run = {"cwd": Path(__file__).parent, "text": True, "stderr": subprocess.DEVNULL}
    try:
        return subprocess.check_output(command, **run).strip().split("\n")[0] or "none"
    except (OSError, subprocess.CalledProcessError):
        return "none"


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


class Lines:
    """Results as they come: kept, and appended to a file of JSON lines where one is named."""

    def __init__(self, file: str | None = None):
        self.file, self.kept, self.part = file, [], ""

    def write(self, **result) -> dict:
        """A result and where it was made; five digits of a float, since more are noise."""
        short = {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in result.items()}
        clock = {} if "sm_mhz" in short else {"sm_mhz": gpu("clocks.sm")}
        self.kept.append(environment() | {"part": self.part} | short | clock)
        if self.file:
            with open(self.file, "a") as lines:
                lines.write(json.dumps(self.kept[-1]) + "\n")
        return self.kept[-1]


class Part(NamedTuple):
    """One command's worth of a bench, and the question that it answers."""

    question: str
    minutes: float  # on one GPU: measured, or a guess before any run
    run: Callable[..., None]  # takes Lines, and what the bench hands to all its parts


def parser(about: str, parts: Mapping[str, Part]) -> argparse.ArgumentParser:
    """--quick, --part NAME and --json FILE; without any, all parts in order."""
    text = "\n".join(f"  {name:10} {p.question} ({p.minutes:g} min)" for name, p in parts.items())
    raw = argparse.RawDescriptionHelpFormatter
    one = argparse.ArgumentParser(description=f"{about}\nparts:\n{text}", formatter_class=raw)
    which = one.add_mutually_exclusive_group()
    which.add_argument("--quick", action="store_const", const="quick", dest="part")
    which.add_argument("--part", choices=parts, help="one of the parts below")
    one.add_argument("--json", metavar="FILE", help="append every result to a file of JSON lines")
    return one


def run_parts(parts: Mapping[str, Part], only: str | None, lines: Lines, *handed) -> None:
    """One part, or all in order, each with its question before it and its minutes after."""
    for name in [only] if only else parts:
        begin, lines.part = time.perf_counter(), name
        print(f"## {name}: {parts[name].question}\n", flush=True)
        parts[name].run(lines, *handed)
        print(f"{name}: {(time.perf_counter() - begin) / 60:.1f} minutes\n", flush=True)
