"""What it costs to begin: seconds of import over torch's own, and peak memory of loading.

    python -m bench.cpu.load [MODEL_FOLDER ...]

Without folders it writes a random checkpoint of Llama-3.2-1B's shape, 2.5 GB, in one file and in
shards. Each row is a process of its own; its peak is the whole process's, torch included.
The limit is 1.25 x the weights in their final dtype + 300 MB.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict

from bench.decoding.shapes import random_decoder, shape_of
from bench.machine import table, where
from tests.helpers.hub_names import to_hub
from tinysteer.loading.checkpoint import read_headers
from tinysteer.model.decoder import Decoder

MODEL = "Llama-3.2-1B"
IMPORT = "import torch, time; begin = time.perf_counter(); import tinysteer; "
IMPORT += "print(time.perf_counter() - begin)"
LOAD = """
import sys, time
from pathlib import Path
import torch
from tinysteer.loading.checkpoint import load_config, load_decoder

def peak():  # not getrusage's, which a process inherits from its parent
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1e3 * 1.024

folder, dtype, begin = Path(sys.argv[1]), getattr(torch, sys.argv[2]), time.perf_counter()
decoder = load_decoder(folder, load_config(folder), dtype, torch.device("cpu"))
seconds = time.perf_counter() - begin
weights = sum(p.numel() * p.element_size() for p in decoder.parameters()) / 1e6
print(weights, peak(), seconds)
"""


def write_checkpoint(folder: Path, decoder: Decoder, largest: str) -> Path:
    """In files of at most that size, under the names that weights have on the Hub."""
    folder.mkdir(parents=True)
    tensors = {name: tensor.clone() for name, tensor in to_hub(decoder).items()}  # no views
    save_torch_state_dict(tensors, folder, max_shard_size=largest)
    (folder / "config.json").write_text(json.dumps(shape_of(MODEL)))
    return folder


def python(code: str, *arguments: str) -> list[float]:
    """The numbers that a process of its own prints."""
    printed = subprocess.check_output([sys.executable, "-c", code, *arguments], text=True)
    return [float(number) for number in printed.split()]


def loading(folders: list[Path]) -> None:
    rows = []
    for folder in folders:
        files = {stored.path for stored in read_headers(folder).values()}
        for dtype in ("bfloat16", "float32"):
            weights, peak, seconds = python(LOAD, str(folder), dtype)
            numbers = [f"{n:,.0f}" for n in (weights, peak, 1.25 * weights + 300)]
            rows.append([folder.name, len(files), dtype, *numbers, f"{seconds:.1f}"])
    heads = ["model", "files", "dtype", "weights, MB", "peak, MB", "limit, MB", "s"]
    print(table(heads, rows))


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("folders", nargs="*", type=Path, help="of models")
    folders = arguments.parse_args().folders
    print(where(), end="\n\n")
    seconds = [python(IMPORT)[0] for _ in range(9)]
    row = [f"{statistics.median(seconds):.3f}", f"{max(seconds):.3f}"]
    print(table(["import tinysteer after torch, s: median of 9", "most"], [row]), end="\n\n")
    if folders:
        return loading(folders)
    decoder = random_decoder(MODEL).to(torch.bfloat16)
    with tempfile.TemporaryDirectory() as folder:
        loading([write_checkpoint(Path(folder) / MODEL / n, decoder, n) for n in ("9GB", "600MB")])
    return None


if __name__ == "__main__":
    main()
