"""Whole texts of one model by what one would write without a captured step and our kernels.

B  rows     T  positions     D  model width     K  edits of a row at one layer

All ways have the same weights and prompts, 32 random tokens a row, and choose greedily; "steered"
is K targets at each layer, the same for all rows, since that is what a hook does:

captured        tinysteer as it is: one CUDA graph a step
launched        the same step, launched kernel by kernel
hooked          so, but for sums, edits and norms, which are PyTorch's operations, K in turn
compiled        PyTorch's operations alone, the edits written into each block, torch.compile of one
                block for all, captured like ours
transformers    `generate` with its cache, a forward hook on each layer

Times are wall-clock, medians of interleaved rounds: to the first token, which takes the prompts and
of ours the tables of edits too, and then a token. In bfloat16 ways may round differently and part
company; the share of equal tokens is shown.
"""

import functools
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import NamedTuple
from unittest.mock import patch

import torch
import transformers
from baselines import to_targets
from common import table
from stepped import Run, finish, random_edits, random_prompts, run
from tinysteer_kernels import residual
from tinysteer_kernels.decode import attention, gating
from torch import Tensor, nn

from tinysteer.decoding.pool import DecodingPool
from tinysteer.decoding.step import Capture
from tinysteer.loading.families import FAMILIES
from tinysteer.model.cache import Cache
from tinysteer.model.decoder import Decoder, Seam, unsteered

PROMPT, N_TOKENS, ROUNDS, K = 32, 64, 3, 4
THEIRS = f"transformers {transformers.__version__}"
Vectors = list[tuple[Tensor, Tensor]]  # of each layer: targets (K,), directions (K, D)


def hooked(vectors: Vectors) -> Seam:
    """A seam as hooks would have it."""

    def seam(x, delta, norms, layer, position):
        h = to_targets(x + norms.post(delta), *vectors[layer])
        return h, norms.next(h)

    return seam


class Instead:
    """A decoder with a seam of its own, whatever it is told."""

    def __init__(self, decoder: Decoder, seam: Seam):
        self.decoder, self.seam = decoder, seam
        self.config, self.embed, self.logits = decoder.config, decoder.embed, decoder.logits
        self.parameters = decoder.parameters

    def __call__(self, tokens: Tensor, cache: Cache, steer: Seam) -> Tensor:
        return self.decoder(tokens, cache, self.seam)

    def prefill(self, tokens: Tensor, cache: Cache, steer: Seam) -> Tensor:
        return self.decoder.prefill(tokens, cache, self.seam)


class OneLayer(NamedTuple):
    """A cache for one block, which need not know its number: so one compilation serves all."""

    k: Tensor
    v: Tensor

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        return self.k, self.v


def block_and_edits(block, x, h, view, cache, norm, w=None, V=None) -> tuple[Tensor, Tensor]:
    """One block and what follows it, for a compiler. w (K,) targets along V (K, D), or None."""
    x, delta = block(x, h, view, cache)
    h = x + block.mlp_post_norm(delta)
    h = h if w is None else to_targets(h, w, V)
    return h, norm(h)


class Compiled(Instead):
    """Steps by compiled blocks, prompts by the decoder."""

    def __init__(self, decoder: Decoder, vectors: Vectors | None, backend: str):
        super().__init__(decoder, hooked(vectors) if vectors else unsteered)
        torch._dynamo.reset()
        self.vectors = vectors or [()] * decoder.config.n_layers
        self.block = torch.compile(block_and_edits, backend=backend, fullgraph=True, dynamic=False)

    def __call__(self, tokens: Tensor, cache: Cache, steer: Seam) -> Tensor:
        blocks, norm = self.decoder.blocks, self.decoder.norm
        views, _ = cache.advance(1)
        for view in views.values():
            _ = view.mask  # made once for all layers
        x = self.embed(tokens)
        x = x * torch.tensor(self.config.embed_scale, dtype=x.dtype)
        y = blocks[0].attn_norm(x)
        norms = [*(block.attn_norm for block in blocks[1:]), norm]
        for layer, (block, kind) in enumerate(zip(blocks, self.config.layers, strict=True)):
            one, vectors = OneLayer(*cache.layer(layer)), self.vectors[layer]
            x, y = self.block(block, x, y, views[kind], one, norms[layer], *vectors)
        return y


def called(step: Callable[[], None]) -> Callable[[], None]:
    """A capture that is none: no compiler works while a tape is recorded."""
    step()
    return step


@contextmanager
def formulas():
    """In it our ops are PyTorch's operations, which a compiler sees through."""
    with ExitStack() as stack:
        for module in (attention, gating, residual):
            stack.enter_context(patch.object(module, "traced", lambda *_: False))
            name = "fits" if module is residual else "serves"
            stack.enter_context(patch.object(module, name, lambda *_: False))
        stack.enter_context(patch.object(residual, "as_is", lambda *_: nullcontext()))
        yield


def theirs(decoder: Decoder, shape: dict) -> transformers.PreTrainedModel:
    """The model of transformers with the same weights."""
    config = transformers.AutoConfig.for_model(**shape)
    weight = decoder.embed.weight
    with torch.device(weight.device), torch.inference_mode(False):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=weight.dtype).eval()
    state, names = {}, FAMILIES[decoder.config.family].names
    for ours, tensor in decoder.state_dict().items():
        module, _, kind = ours.rpartition(".")
        number = next((part for part in module.split(".") if part.isdigit()), "")
        name = names[module.replace(f".{number}.", ".#.")]
        whole = isinstance(name, str)
        parts = tensor.shape[:1] if whole else decoder.get_submodule(module).parts
        for one, part in zip([name] if whole else name, tensor.split(list(parts)), strict=True):
            state[f"{one.replace('#', number)}.{kind}"] = part
    with torch.inference_mode(False):
        model.load_state_dict(state)
    return model


def generated(model: transformers.PreTrainedModel, prompts: Tensor, vectors: Vectors | None) -> Run:
    """`generate` with a forward hook on each layer that `vectors` has something for."""

    def hook(w: Tensor, V: Tensor):
        def edited(module, args, output):
            if isinstance(output, tuple):
                return to_targets(output[0], w, V), *output[1:]
            return to_targets(output, w, V)

        return edited

    came, prompts = [], prompts.to(model.device)

    def note(ids: Tensor, scores: Tensor) -> Tensor:
        if not came:
            came.append((ids.cpu(), time.perf_counter())[1])
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)  # nothing stops

    settings = {"do_sample": False, "max_new_tokens": N_TOKENS, "eos_token_id": None}
    settings |= {"attention_mask": torch.ones_like(prompts), "pad_token_id": 0}
    settings["stopping_criteria"] = transformers.StoppingCriteriaList([note])
    hooks = [
        layer.register_forward_hook(hook(*of_layer))
        for layer, of_layer in zip(model.model.layers, vectors or [], strict=bool(vectors))
    ]
    begin = time.perf_counter()
    ids = model.generate(prompts, **settings)[:, prompts.shape[1] :].cpu()
    whole = time.perf_counter() - begin
    for one in hooks:
        one.remove()
    return Run(ids, came[0] - begin, whole)


def ways(
    decoder: Decoder, B: int, steered: bool, capture: Capture, model: Callable[[], nn.Module]
) -> dict[str, Callable[[], Run]]:
    """Name -> what makes the texts. model: makes transformers', or returns the one made before."""
    prompts = random_prompts(decoder.config, B, PROMPT)
    layers, weight = range(decoder.config.n_layers), decoder.embed.weight
    edits, vectors = [], None
    if steered:
        edits, vectors = random_edits(decoder, B, 1, K, layers, "targets"), []
        for layer in layers:
            here = [edit for edit in edits[0] if edit.layer == layer]
            w, V = [edit.move.bias for edit in here], [edit.direction for edit in here]
            vectors.append((torch.tensor(w).to(weight), torch.stack(V).to(weight)))
    backend, capturing = ("inductor", capture) if weight.is_cuda else ("aot_eager", called)
    by_hooks = DecodingPool(Instead(decoder, hooked(vectors)) if steered else decoder)
    compiled, ours = (
        DecodingPool(Compiled(decoder, vectors, backend), capturing),
        DecodingPool(decoder, capture),
    )

    def by_compiler() -> Run:
        with formulas():
            return run(compiled, prompts, N_TOKENS)

    by_name = {
        "captured": lambda: run(ours, prompts, N_TOKENS, edits),
        "launched": lambda: run(ours, prompts, N_TOKENS, edits, graph=False),
        "hooked": lambda: run(by_hooks, prompts, N_TOKENS, graph=False),
        "compiled": by_compiler,
        THEIRS: lambda: generated(model(), prompts, vectors),
    }
    return by_name if steered else {way: by_name[way] for way in by_name if way != "hooked"}


def compare(
    name: str,
    shape: dict,
    decoder: Decoder,
    batches: Sequence[int],
    record: Callable[..., dict],
    capture: Capture | None = None,
    strict: bool = False,
) -> list[dict]:
    """A result for each batch and way, unsteered and steered; each way runs once before its time.

    strict: one round, and an error is one, where else it costs but its own way's results.
    """
    model, results = functools.cache(lambda: theirs(decoder, shape)), []
    for B, steered in itertools.product(batches, (False, True)):
        texts_by, said = ways(decoder, B, steered, capture, model), {}
        for way, texts in list(texts_by.items()):
            try:
                said[way] = texts().ids
            except Exception as error:
                if strict or way == "captured":
                    raise
                print(f"{way}, batch {B}, is left out: {error!r:.500}", flush=True)
                del texts_by[way]
        times = {way: [] for way in texts_by}
        for _ in range(1 if strict else ROUNDS):
            for way, texts in texts_by.items():
                finish(decoder)
                times[way].append(texts())
        for way, runs in times.items():
            first = 1e3 * statistics.median(one.first for one in runs)
            ms = 1e3 * statistics.median(one.whole - one.first for one in runs) / (N_TOKENS - 1)
            same = float((said[way] == said["captured"]).float().mean())
            result = {"part": "baselines", "model": name, "B": B, "way": way, "steered": steered}
            result |= {"K": K * steered, "first_ms": first, "ms": ms, "tokens_s": 1e3 * B / ms}
            results.append(record("decode", **result, same=same))
    return results


def rows(results: list[dict]) -> str:
    """A Markdown table: a row for each batch and way, steered and not."""
    ours = {(r["B"], r["steered"]): r["ms"] for r in results if r["way"] == "captured"}
    cells = [
        [
            r["B"],
            r["way"],
            "steered" * r["steered"],
            f"{r['first_ms']:.0f}",
            f"{r['ms']:.2f}",
            f"{r['tokens_s']:.0f}",
            f"{r['ms'] / ours[r['B'], r['steered']]:.2f}",
            f"{100 * r['same']:.0f} %",
        ]
        for r in results
    ]
    heads = ["batch", "", "", "first, ms", "ms a token", "tokens/s", "x ours", "tokens as ours"]
    return table(heads, cells)
