"""A sweep over layers, ours against the paper's way, on the same weights.

    python bench/sweep.py MODEL_FOLDER [--whole]

Ten layers x twenty prompts x 64 new tokens, greedy, float32: half a vector of brevity is added at
every position. Ours is `sweep`: 200 rows of one batch, each with its own edit, a KV cache. The
paper's code steers one prompt at a time by hooks and runs the whole prefix again for each token;
here that is transformers without a cache. It takes minutes, so it runs every layer with one prompt
only and its time is multiplied by twenty, unless --whole. Texts must agree. Needs the test extra.
"""

import sys
import time
from pathlib import Path

import torch
import transformers
from common import table, where

import tinysteer as ts
from tinysteer.evaluation.selection import sweep

sys.path.append(str(Path(__file__).parents[1] / "tests/helpers"))
from oracle import hooked

N_LAYERS, N_PROMPTS, N_TOKENS = 10, 20, 64
TOPICS = """
rivers bread bees glass salt bridges winter maps paper clocks gold trains tea wool stars ink honey
tides chess wind
"""
PROMPTS = [f"Tell me something about {topic} that few people know." for topic in TOPICS.split()]


def settings_for(model) -> dict[int, list]:
    """A layer -> its edit: half the mean difference of requests to be brief."""
    asked = [prompt + " Be extremely concise." for prompt in PROMPTS]
    vector = ts.extract(model, asked, PROMPTS)
    layers = torch.linspace(2, model.config.n_layers - 2, N_LAYERS).int().tolist()
    return {L: [vector.at(L).add(weight=0.5 * vector.at(L).norm)] for L in layers}


@torch.inference_mode()
def alone(theirs, ids: list[int], edits: list, stops: list[int]) -> list[int]:
    """One prompt by hooks, without a cache."""
    tokens = torch.tensor([ids])
    mask = torch.ones_like(tokens)
    with hooked(theirs, edits):
        out = theirs.generate(
            tokens,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=N_TOKENS,
            use_cache=False,
            eos_token_id=stops,
        )
    return [i for i in out[0, len(ids) :].tolist() if i not in stops]


def main() -> None:
    if len(sys.argv) not in (2, 3) or (len(sys.argv) == 3 and sys.argv[2] != "--whole"):
        sys.exit(__doc__)
    ours = ts.load(sys.argv[1], dtype="float32", device="cpu")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
    settings, stops = settings_for(ours), sorted(ours.tokenizer.stop_ids)
    sweep(ours, PROMPTS[:1], settings, max_new_tokens=2)  # what is done only once, before
    alone(theirs, ours.tokenizer.chat("Hi"), [], stops)
    print(where(), f"transformers {transformers.__version__}; {ours}", sep="; ", end="\n\n")
    rows = N_LAYERS * N_PROMPTS
    start = time.perf_counter()
    texts = sweep(ours, PROMPTS, settings, max_new_tokens=N_TOKENS, batch_size=rows)
    ours_s = time.perf_counter() - start
    done = N_PROMPTS if len(sys.argv) == 3 else 1
    start, same = time.perf_counter(), 0
    for i, (layer, edits) in enumerate(settings.items()):
        for j in range(done):
            at = (i + j) % N_PROMPTS
            said = alone(theirs, ours.tokenizer.chat(PROMPTS[at]), edits, stops)
            same += ours.tokenizer.decode(said) == texts[layer][at]
    n = N_LAYERS * done
    theirs_s = (time.perf_counter() - start) * rows / n
    assert same == n, f"{n - same} of {n} texts differ"
    how = "measured" if n == rows else f"{n} of {rows} rows, times {rows // n}"
    print(
        table(
            ["way", "seconds", "rows/s", "times ours"],
            [
                ["tinysteer, one batch with a cache", f"{ours_s:.1f}", f"{rows / ours_s:.2f}", "1"],
                [
                    f"transformers, hooks, one by one, no cache ({how})",
                    f"{theirs_s:.0f}",
                    f"{rows / theirs_s:.3f}",
                    f"{theirs_s / ours_s:.1f}",
                ],
            ],
        )
    )


if __name__ == "__main__":
    main()
