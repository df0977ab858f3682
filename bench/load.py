"""What it costs to begin: seconds of import over torch's own, and peak memory of loading.

    python bench/load.py [MODEL_FOLDER ...]

Without folders it writes a random checkpoint of Llama-3.2-1B's shape, 2.5 GB, in one file and in
shards. Each row is a process of its own; its peak is the whole process's, torch included.
The limit is 1.25 x the weights in their final dtype + 300 MB.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from common import table, where
from safetensors.torch import save_file

from tinysteer.loading.checkpoint import read_headers

CONFIG = {
    "model_type": "llama",
    "vocab_size": 128_256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
LOAD = """
import sys, time
from pathlib import Path
import torch
from tinysteer.loading.checkpoint import load_config, load_decoder

def peak():  # not getrusage's, which a process inherits from its parent
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1e3 * 1.024

folder, dtype = Path(sys.argv[1]), getattr(torch, sys.argv[2])
before, start = peak(), time.perf_counter()
decoder = load_decoder(folder, load_config(folder), dtype, torch.device("cpu"))
seconds = time.perf_counter() - start
weights = sum(p.numel() * p.element_size() for p in decoder.parameters()) / 1e6
print(weights, before, peak(), seconds)
"""


def write_checkpoint(folder: Path, n_files: int) -> Path:
    """Random weights, under the names that a Llama checkpoint has on the Hub."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    sizes = {"q": 2048, "k": 512, "v": 512}
    tensors = {"model.embed_tokens": (128_256, 2048), "model.norm": (2048,)}
    for i in range(CONFIG["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        tensors |= {f"{layer}.self_attn.{part}_proj": (rows, 2048) for part, rows in sizes.items()}
        tensors |= {
            f"{layer}.self_attn.o_proj": (2048, 2048),
            f"{layer}.mlp.gate_proj": (8192, 2048),
            f"{layer}.mlp.up_proj": (8192, 2048),
            f"{layer}.mlp.down_proj": (2048, 8192),
            f"{layer}.input_layernorm": (2048,),
            f"{layer}.post_attention_layernorm": (2048,),
        }
    names = list(tensors)
    index = {}
    for i in range(n_files):
        file = "model.safetensors"
        if n_files > 1:
            file = f"model-{i + 1:05}-of-{n_files:05}.safetensors"
        part = {
            f"{name}.weight": torch.randn(tensors[name], dtype=torch.bfloat16)
            for name in names[i::n_files]
        }
        save_file(part, folder / file)
        index |= dict.fromkeys(part, file)
    if n_files > 1:
        text = json.dumps({"weight_map": index})
        (folder / "model.safetensors.index.json").write_text(text)
    return folder


def importing() -> None:
    code = "import torch, time; t = time.perf_counter(); import tinysteer; "
    command = [sys.executable, "-c", code + "print(time.perf_counter() - t)"]
    seconds = [float(subprocess.check_output(command)) for _ in range(9)]
    row = [f"{statistics.median(seconds):.3f}", f"{max(seconds):.3f}"]
    print(table(["import tinysteer after torch, s: median of 9", "most"], [row]), end="\n\n")


def loading(folders: list[Path]) -> None:
    rows = []
    for folder in folders:
        files = {stored.path for stored in read_headers(folder).values()}
        for dtype in ("bfloat16", "float32"):
            said = subprocess.check_output([sys.executable, "-c", LOAD, str(folder), dtype])
            weights, before, peak, seconds = map(float, said.split())
            limit = 1.25 * weights + 300
            numbers = [f"{n:,.0f}" for n in (weights, before, peak, limit)]
            rows.append([folder.name, len(files), dtype, *numbers, f"{seconds:.1f}"])
    heads = ["model", "files", "dtype", "weights, MB", "before, MB", "peak, MB", "limit, MB", "s"]
    print(table(heads, rows))


def main() -> None:
    print(where(), end="\n\n")
    importing()
    if folders := [Path(argument) for argument in sys.argv[1:]]:
        return loading(folders)
    with tempfile.TemporaryDirectory() as folder:
        loading([write_checkpoint(Path(folder) / f"1B shape {n}", n) for n in (1, 5)])
    return None


if __name__ == "__main__":
    main()
