"""Many vectors and many configurations in one batch: EasySteer's experiment with our decoder.

A configuration has a vector of its own at every layer, which is added with a weight that is not 0,
and rows take the configurations in turn; one is the same as "every layer", which shows the spread.
Tokens are chosen as by `model.complete`, and held against those of steps without a graph.

On a GPU the shape is DeepSeek-R1-Distill-Qwen-1.5B's but for the biases of q, k and v, with random
weights in bfloat16; 256 rows with 16 random tokens each get 128 new ones. A CPU takes
SmolLM2-135M's in float32, 16 rows and 8 new tokens. EasySteer's speed stands in a way's name: its
tokens/s over those of no steering, by another engine and GPU (vLLM, one RTX PRO 6000, scale 0; its
experiment/efficiency/README.md of 2026-08-06), so only ratios compare.
"""

from functools import partial

from bench.decoding.shapes import OFF, ONE, R1_DISTILL, SMOLLM2, Way, random_decoder, random_prompts
from bench.decoding.texts import compare, pool_of, run
from bench.machine import ON_GPU, Lines

CONFIGS = {1: 0.76, 8: 0.65, 32: 0.52, 64: 0.36, 128: 0.29, 256: 0.18}  # EasySteer's speeds
GPU_WAYS = [
    OFF,
    ONE._replace(name="one layer (EasySteer 0.89)"),
    Way("every layer (EasySteer 0.76)", 1, "adds"),
    Way("3 vectors at every layer (EasySteer 0.26)", 3, "adds"),
    *(Way(f"{n} configurations (EasySteer {r})", 1, "adds", n) for n, r in CONFIGS.items()),
    Way("256 configurations of 3 vectors", 3, "adds", 256),
]
CPU_WAYS = [OFF, *(Way(f"{n} configurations", 1, "adds", n) for n in (1, 4, 16))]
GPU, CPU = (R1_DISTILL, GPU_WAYS, (256, 16, 128), 7), (SMOLLM2, CPU_WAYS, (16, 8, 8), 7)


def configs(lines: Lines, tiny: bool = False) -> None:
    """Time the ways to make texts of rows, of tokens a prompt, of new tokens; in rounds."""
    model, ways, (B, T, n_tokens), rounds = GPU if ON_GPU or tiny else CPU
    B, T, n_tokens, rounds = (12, 5, 10, 2) if tiny else (B, T, n_tokens, rounds)
    decoder = random_decoder(model, tiny)
    pool, prompts = pool_of(decoder, tiny), random_prompts(decoder, B, T)
    edits = {way: way.edits(decoder, B) for way in ways}
    texts = {way: partial(run, pool, prompts, n_tokens, edits[way]) for way in ways}
    launched = {way: texts[way](graph=False).ids for way in ways}
    shown = compare(lines, texts, rounds, launched, part="configs", model=model, B=B)
    print("" if tiny else f"{shown}\n")
