"""A decoding step of a real model, ours and transformers', plain and steered, the same weights.

    python -m bench.cpu.generate MODEL_FOLDER [--json FILE]

Greedy, float32, 32 new tokens, batches of 1 and 8 prompts of equal length. Steered: two edits at
each of four layers, done by us in the decoder, in transformers by forward hooks. "no cache" is how
the paper's code decodes: the whole prefix again for each token. Tokens must agree, between ours and
transformers' and from run to run. What times and speeds are: see bench/decoding/texts.py.
"""

import argparse
import time
from functools import partial
from pathlib import Path

import torch

import tinysteer as ts
from bench.decoding.shapes import Way
from bench.decoding.texts import Run, compare, run
from bench.machine import Lines, installed, where
from tests.helpers.oracle import hooked, vector_for

N_TOKENS, ROUNDS = 32, 5
TOPICS = "rivers bread bees glass salt bridges winter maps paper clocks gold trains tea wool stars"
TOPICS += " ink honey tides chess wind"
PROMPTS = [f"Tell me something about {topic} that few people know." for topic in TOPICS.split()]
PLAIN, STEERED = Way("tinysteer"), Way("tinysteer, steered", 2)


def by_transformers(folder: str):
    """The model of transformers in a folder."""
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def edits_of(model: ts.LanguageModel) -> list:
    """Two edits at four layers along random directions."""
    a, b = vector_for(model, 0), vector_for(model, 1)
    layers = torch.linspace(1, model.config.n_layers - 2, 4).int().tolist()
    pairs = [(a.at(L).add(times=0.2), b.at(L).to_target(target=0.5)) for L in layers]
    return [edit for pair in pairs for edit in pair]


def generate(model, prompts: torch.Tensor, n_tokens: int, **options) -> Run:
    """Texts by a model of transformers, whose first token is timed by itself."""
    prompts, seconds = prompts.to(model.device), []
    options = {"eos_token_id": None, "pad_token_id": 0, "do_sample": False} | options
    options |= {"attention_mask": torch.ones_like(prompts)}
    for n in (1, n_tokens):
        begin = time.perf_counter()
        ids = model.generate(prompts, max_new_tokens=n, **options).cpu()
        seconds.append(time.perf_counter() - begin)
    return Run(ids[:, prompts.shape[1] :], *seconds)


def by_hooks(model, edits: list, prompts: torch.Tensor, **options) -> Run:
    with hooked(model, edits):
        return generate(model, prompts, N_TOKENS, **options)


@torch.inference_mode()
def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("folder", help="of a model")
    arguments.add_argument("--json", metavar="FILE", help="append every result to a file")
    chosen = arguments.parse_args()
    ours = ts.load(chosen.folder, dtype="float32", device="cpu")
    theirs = by_transformers(chosen.folder)
    with torch.inference_mode(False):
        edits = edits_of(ours)
    print(where(), f"transformers {installed('transformers')}; {ours}", sep="; ", end="\n\n")
    for B in (1, 8):
        ids = [ours.tokenizer.chat(prompt) for prompt in PROMPTS[:B]]
        tokens = torch.tensor([row[: min(map(len, ids))] for row in ids])
        ways = {
            PLAIN: partial(run, ours.pool, tokens, N_TOKENS),
            STEERED: partial(run, ours.pool, tokens, N_TOKENS, [edits] * B),
            Way("transformers"): partial(by_hooks, theirs, [], tokens),
            Way("transformers, hooks", 2): partial(by_hooks, theirs, edits, tokens),
        }
        if B == 1:
            slow = partial(by_hooks, theirs, edits, tokens, use_cache=False)
            ways[Way("transformers, hooks, no cache", 2)] = slow
        case = {"part": "generate", "model": Path(chosen.folder).name, "B": B, "T": tokens.shape[1]}
        result = compare(Lines(chosen.json), ways, ROUNDS, **case)
        print(f"batch {B}, {tokens.shape[1]} tokens a prompt\n\n{result}\n", flush=True)


if __name__ == "__main__":
    main()
