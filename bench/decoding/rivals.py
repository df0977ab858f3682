"""Whole texts of one model by what one would write without a captured step and our kernels.

All ways have the same weights and prompts and choose greedily; "steered" is K targets at each
layer, the same for all rows, since that is what a hook does:

captured       tinysteer as it is: one CUDA graph a step
launched       the same step, launched kernel by kernel
hooked         so, but for sums, edits and norms, which are PyTorch's operations, K in turn
compiled       PyTorch's operations, edits in each block, one compiled for all, captured like ours
transformers   `generate` with its cache, a forward hook on each layer
"""

import copy
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple
from unittest.mock import patch

import torch
from tinysteer_kernels import residual
from tinysteer_kernels.decode import attention, gating
from torch import Tensor, nn

from bench.cpu.generate import generate
from bench.decoding.shapes import Way, random_decoder, random_prompts, shape_of
from bench.decoding.texts import Run, pool_of, run
from bench.kernels.ways import to_targets
from bench.machine import installed
from tests.helpers.hub_names import to_hub
from tinysteer.model.decoder import Decoder

PROMPT, N_TOKENS, K = 32, 64, 4
THEIRS = f"transformers {installed('transformers')}"
Vectors = list[tuple[Tensor, Tensor]]  # of each layer: targets (K,), directions (K, D); or none


class OneLayer(NamedTuple):
    """A cache for one block, which need not know its number: so one compilation serves all."""

    k: Tensor
    v: Tensor

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        return self.k, self.v


def block_and_edits(block, x, h, view, cache, norm, w=None, V=None) -> tuple[Tensor, Tensor]:
    """One block and what follows it. w (K,) targets along V (K, D), or None."""
    x, delta = block(x, h, view, cache)
    h = x + block.mlp_post_norm(delta)
    h = h if w is None else to_targets(h, w, V)
    return h, norm(h)


def edited(decoder: Decoder, vectors: Vectors, one_block: Callable = block_and_edits) -> Decoder:
    """The same weights with the edits of hooks behind each block. one_block: does it in steps."""
    config, blocks = decoder.config, decoder.blocks
    norms = [*(block.attn_norm for block in blocks), decoder.norm]

    def forward(tokens: Tensor, cache, steer) -> Tensor:
        block_of = one_block if tokens.shape[1] == 1 else block_and_edits
        views, _ = cache.advance(tokens.shape[1])
        for view in views.values():
            _ = block_of is block_and_edits or view.mask  # made once for all layers
        x = decoder.embed(tokens)
        x = x * torch.tensor(config.embed_scale, dtype=x.dtype)
        h = norms[0](x)
        for layer, (block, kind) in enumerate(zip(blocks, config.layers, strict=True)):
            one, edits = OneLayer(*cache.layer(layer)), vectors[layer] if vectors else ()
            x, h = block_of(block, x, h, views[kind], one, norms[layer + 1], *edits)
        return h

    other = copy.copy(decoder)
    other.forward = forward
    return other


def never(*_) -> bool:
    return False


@patch.multiple(attention, serves=never, traced=never)
@patch.multiple(gating, serves=never, traced=never)
@patch.multiple(residual, fits=never, traced=never)
def run_formulas(*arguments) -> Run:
    """Our ops are PyTorch's operations, which a compiler sees through."""
    return run(*arguments)


def theirs(decoder: Decoder, shape: dict) -> nn.Module:
    """The model of transformers with the same weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config, weight = AutoConfig.for_model(**shape), decoder.embed.weight
    with torch.device(weight.device), torch.inference_mode(False):
        model = AutoModelForCausalLM.from_config(config, dtype=weight.dtype).eval()
        model.load_state_dict(to_hub(decoder))
    return model


def generated(model: Callable, prompts: Tensor, vectors: Vectors) -> Run:
    """`generate` with a forward hook on each layer that `vectors` has something for."""
    hooks = [
        layer.register_forward_hook(lambda _, __, h, edits=edits: to_targets(h, *edits))
        for layer, edits in zip(model().model.layers, vectors, strict=bool(vectors))
    ]
    texts = generate(model(), prompts, N_TOKENS)
    for one in hooks:
        one.remove()
    return texts


def ways_of(model: str, B: int, tiny: bool = False) -> dict[Way, Callable[[], Run]]:
    """A way -> what makes the texts of B rows, unsteered and steered."""
    decoder, ways = random_decoder(model, tiny), {}
    prompts, weight = random_prompts(decoder, B, PROMPT), decoder.embed.weight
    other = cache(partial(theirs, decoder, shape_of(model, tiny)))
    edits = Way("", K).edits(decoder, B)
    w = torch.tensor([edit.move.bias for edit in edits[0]]).to(weight).view(-1, K)
    V = torch.stack([edit.direction for edit in edits[0]]).to(weight).unflatten(0, (-1, K))
    torch._dynamo.reset()
    backend = "inductor" if weight.is_cuda else "aot_eager"
    one_block = torch.compile(block_and_edits, backend=backend, fullgraph=True, dynamic=False)

    def add(name: str, edits: list, vectors: Vectors) -> None:
        ours, by_hooks = pool_of(decoder, tiny), pool_of(edited(decoder, vectors), False)
        by_compiler = pool_of(edited(decoder, vectors, one_block), False)
        texts = {
            "captured": partial(run, ours, prompts, N_TOKENS, edits),
            "launched": partial(run, ours, prompts, N_TOKENS, edits, graph=False),
            "hooked": partial(run, by_hooks, prompts, N_TOKENS, graph=False),
            "compiled": partial(run_formulas, by_compiler, prompts, N_TOKENS),
            THEIRS: partial(generated, other, prompts, vectors),
        }
        ways.update({Way(way + name, K * bool(edits)): one for way, one in texts.items()})

    add("", [], [])
    add(", steered", edits, [*zip(w, V, strict=True)])
    return ways
