"""Milliseconds per decoding step, ours and transformers', plain and steered, same weights.

    python bench/generate.py MODEL_FOLDER

Greedy, float32, 32 new tokens, batches of 1 and 8. Steered: two edits at each of four layers,
done by us in the decoder, in transformers by forward hooks. "no cache" is how the paper's code
decodes: the whole prefix again for each token. Rounds are interleaved, medians reported, and the
tokens of all must agree before a time counts. Needs the test extra.
"""

import statistics
import sys
import time
from pathlib import Path

import torch
import transformers
from common import table, where

import tinysteer as ts
from tinysteer.decoding import generation
from tinysteer.steering.batch import per_row
from tinysteer.text.streaming import TextStream
from tinysteer.text.tokenizer import pad

sys.path.append(str(Path(__file__).parents[1] / "tests/helpers"))
from oracle import hooked

N_TOKENS, ROUNDS = 32, 9
PROMPTS = [
    f"Tell me something about {topic} that most people do not know."
    for topic in ("rivers", "bread", "the moon", "bees", "glass", "salt", "bridges", "winter")
]


def edits_for(model) -> list:
    """Two edits at four layers along random directions, too small to derail the text."""
    torch.manual_seed(0)
    shape = model.config.n_layers, model.config.dim
    a, b = (ts.SteeringVector._from_means(torch.randn(shape), torch.zeros(shape)) for _ in range(2))
    layers = torch.linspace(1, model.config.n_layers - 2, 4).int().tolist()
    return [
        edit for L in layers for edit in (a.at(L).add(times=0.02), b.at(L).to_target(target=0.5))
    ]


@torch.inference_mode()
def run_ours(ours, ids, edits):
    rows = [TextStream(ours.tokenizer.decode, N_TOKENS) for _ in ids]
    edits = per_row(edits, len(ids))
    for _ in generation.decode(ours.pool, ids, rows, lambda n: edits):
        pass
    return [row.ids for row in rows]


@torch.inference_mode()
def run_theirs(theirs, ids, edits, use_cache=True):
    tokens, start = pad(ids)
    mask = torch.arange(tokens.shape[1]) >= start[:, None]
    settings = {"do_sample": False, "max_new_tokens": N_TOKENS, "use_cache": use_cache}
    with hooked(theirs, edits):
        out = theirs.generate(tokens, attention_mask=mask.long(), eos_token_id=None, **settings)
    return out[:, tokens.shape[1] :].tolist()


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    ours = ts.load(sys.argv[1], dtype="float32", device="cpu")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
    edits = edits_for(ours)
    print(where(), f"transformers {transformers.__version__}; {ours}", sep="; ", end="\n\n")
    rows = []
    for B in (1, 8):
        ids = [ours.tokenizer.chat(prompt) for prompt in PROMPTS[:B]]
        ways = {
            "tinysteer": lambda ids=ids: run_ours(ours, ids, []),
            "tinysteer, steered": lambda ids=ids: run_ours(ours, ids, edits),
            "transformers": lambda ids=ids: run_theirs(theirs, ids, []),
            "transformers, hooks": lambda ids=ids: run_theirs(theirs, ids, edits),
        }
        if B == 1:
            ways["transformers, hooks, no cache"] = lambda ids=ids: run_theirs(
                theirs, ids, edits, use_cache=False
            )
        said = {name: way() for name, way in ways.items()}
        times = {name: [] for name in ways}
        for _ in range(ROUNDS):
            for name, way in ways.items():
                start = time.perf_counter()
                again = way()
                times[name].append(1e3 * (time.perf_counter() - start) / N_TOKENS)
                assert again == said[name], f"{name} is not repeatable"
        plain, steered = said["tinysteer"], said["tinysteer, steered"]
        for name, ids_ in said.items():
            assert ids_ == (steered if "hooks" in name or "steered" in name else plain), name
        median = {name: statistics.median(times[name]) for name in ways}
        for name, ms in median.items():
            ratio = ms / median["tinysteer, steered" if "hooks" in name else "tinysteer"]
            rows.append([B, name, f"{ms:.1f}", f"{1e3 * B / ms:.1f}", f"{ratio:.2f}"])
    heads = ["batch", "", "ms a step, prefill included", "tokens/s", "x ours"]
    print(table(heads, rows))


if __name__ == "__main__":
    main()
