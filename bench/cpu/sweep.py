"""A sweep over layers, ours against the paper's way, on the same weights.

    python -m bench.cpu.sweep MODEL_FOLDER

Ten layers x twenty prompts x 64 new tokens, greedy, float32: half a vector of brevity is added at
every position. Ours is `sweep`: 200 rows of one batch, each with its own edit, a KV cache. The
paper's code steers one prompt at a time by hooks and runs the whole prefix again for each token:
transformers without a cache. It takes minutes, so every layer has one prompt only, and the time is
multiplied by twenty. Texts must agree.
"""

import argparse
import time

import torch

import tinysteer as ts
from bench.cpu.generate import PROMPTS, by_transformers, generate
from bench.machine import installed, table, where
from tests.helpers.oracle import hooked
from tinysteer.evaluation.selection import sweep

N_LAYERS, N_TOKENS = 10, 64


def settings_of(model: ts.LanguageModel) -> dict[int, list]:
    """A layer -> its edit: half the mean difference of requests to be brief."""
    vector = ts.extract(model, [f"{prompt} Be extremely concise." for prompt in PROMPTS], PROMPTS)
    layers = torch.linspace(2, model.config.n_layers - 2, N_LAYERS).int().tolist()
    return {layer: [vector.at(layer).add(times=0.5)] for layer in layers}


@torch.inference_mode()
def alone(theirs, tokenizer, prompt: str, edits: list) -> tuple[str, float]:
    """One prompt's text by hooks, without a cache, and its seconds."""
    tokens, stops = torch.tensor([tokenizer.chat(prompt)]), sorted(tokenizer.stop_ids)
    with hooked(theirs, edits):
        out = generate(theirs, tokens, N_TOKENS, use_cache=False, eos_token_id=stops)
    return tokenizer.decode([i for i in out.ids[0].tolist() if i not in stops]), out.whole


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("folder", help="of a model")
    folder = arguments.parse_args().folder
    ours = ts.load(folder, dtype="float32", device="cpu")
    theirs = by_transformers(folder)
    settings = settings_of(ours)
    sweep(ours, PROMPTS[:1], settings, max_new_tokens=2)  # what is done only once, before
    print(where(), f"transformers {installed('transformers')}; {ours}", sep="; ", end="\n\n")
    n_rows, begin, theirs_s = N_LAYERS * len(PROMPTS), time.perf_counter(), 0.0
    texts = sweep(ours, PROMPTS, settings, max_new_tokens=N_TOKENS, batch_size=n_rows)
    ours_s = time.perf_counter() - begin
    for i, (layer, edits) in enumerate(settings.items()):
        text, seconds = alone(theirs, ours.tokenizer, PROMPTS[i], edits)
        assert text == texts[layer][i], f"at layer {layer} {text!r} is not {texts[layer][i]!r}"
        theirs_s += seconds * len(PROMPTS)
    paper = f"transformers, hooks, one by one, no cache ({N_LAYERS} rows, times {len(PROMPTS)})"
    ways = {"tinysteer, one batch with a cache": ours_s, paper: theirs_s}
    rows = [[way, f"{s:.1f}", f"{n_rows / s:.3f}", f"{s / ours_s:.1f}"] for way, s in ways.items()]
    print(table(["way", "seconds", "rows/s", "times ours"], rows))


if __name__ == "__main__":
    main()
