"""What decode.py and many_configs.py share: models' shapes, random weights and edits, whole texts.

B  rows     T  positions     D  model width     K  edits of a row at one layer

Weights are drawn, so nothing is downloaded: each matrix by its width ** -0.5, so that what comes out
is as large as what goes in, through all layers to the logits. An edit moves a row by 0.1 sqrt(D), or
sets its projection to that: a few percent of a stream whose coordinates are about 1.
"""

import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tinysteer.config import Config
from tinysteer.edits import Direction, Edit
from tinysteer.families import read_config
from tinysteer.generation import tokens_of
from tinysteer.model import Decoder
from tinysteer.stepping import Steps

LLAMA = {"model_type": "llama", "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
GEMMA2 = {
    "model_type": "gemma2",
    "vocab_size": 256_000,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "sliding_window": 4096,
    "query_pre_attn_scalar": 256,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "hidden_activation": "gelu_pytorch_tanh",
}


def sizes(dim: int, hidden: int, layers: int, heads: int, kv_heads: int) -> dict[str, int]:
    return {
        "hidden_size": dim,
        "intermediate_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }


def rope(theta: float) -> dict:
    return {"rope_type": "default", "rope_theta": theta}


# What a config.json says. The last is DeepSeek-R1-Distill-Qwen-1.5B but for the biases of q, k, v.
SHAPES = {
    "Llama-3.1-8B": LLAMA
    | sizes(4096, 14336, 32, 32, 8)
    | {
        "vocab_size": 128_256,
        "max_position_embeddings": 131_072,
        "rope_parameters": LLAMA3_ROPE,
    },
    "Mistral-7B-v0.3": LLAMA
    | sizes(4096, 14336, 32, 32, 8)
    | {
        "model_type": "mistral",
        "vocab_size": 32_768,
        "max_position_embeddings": 32_768,
        "sliding_window": None,
        "rope_parameters": rope(1e6),
    },
    "Phi-3-mini-4k": LLAMA
    | sizes(3072, 8192, 32, 32, 32)
    | {
        "model_type": "phi3",
        "vocab_size": 32_064,
        "max_position_embeddings": 4096,
        "sliding_window": 2047,
        "rope_parameters": rope(1e4),
    },
    "Gemma-2-2B": GEMMA2 | sizes(2304, 9216, 26, 8, 4),
    "Gemma-2-9B": GEMMA2 | sizes(3584, 14336, 42, 16, 8),
    "SmolLM2-135M": LLAMA
    | sizes(576, 1536, 30, 9, 3)
    | {
        "vocab_size": 49_152,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "rope_parameters": rope(1e5),
    },
    "R1-Distill-1.5B": LLAMA
    | sizes(1536, 8960, 28, 12, 2)
    | {
        "vocab_size": 151_936,
        "max_position_embeddings": 131_072,
        "rope_parameters": rope(1e4),
    },
}


def shrunk(shape: dict) -> dict:
    """A shape with the same traits that a CPU runs in no time."""
    small = sizes(48, 80, 2, 4, 2) | {"vocab_size": 211, "head_dim": 16}
    return shape | small | ({"sliding_window": 24} if shape.get("sliding_window") else {})


def draw(shape: dict, device: str, dtype: torch.dtype) -> Decoder:
    """A decoder with random weights, made where it will run."""
    config = read_config(shape)
    with torch.device("meta"):
        decoder = Decoder(config).requires_grad_(False)
    decoder = decoder.to(dtype).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for parameter in decoder.parameters():
        mean, std = 0.0, parameter.shape[-1] ** -0.5
        if parameter.ndim == 1:  # a norm's
            mean, std = 1 - config.norm_offset, 0.1
        parameter.normal_(mean, std, generator=generator)
    return decoder


def weight_bytes(decoder: Decoder) -> int:
    """What a step reads of the weights, by gpt-fast's count: all but an embedding that is no head."""
    total = sum(parameter.nbytes for parameter in decoder.parameters())
    return total if decoder.config.tied else total - decoder.embed.weight.nbytes


def cache_bytes(decoder: Decoder, B: int, seen: float) -> float:
    """What a step reads of the keys and values of B rows that see so many columns."""
    config = decoder.config
    columns = sum(min(seen, layer.window or seen) for layer in config.layers)
    one = config.n_kv_heads * config.head_dim * decoder.embed.weight.itemsize
    return 2 * B * columns * one


VERBS = {
    "adds": lambda direction, weight: direction.add(weight),
    "targets": lambda direction, weight: direction.to_target(target=weight),
    "idle": lambda direction, weight: direction.add(weight, where=(1 << 30, None)),  # never
}


def random_edits(
    decoder: Decoder, n_rows: int, n_lists: int, K: int, layers: Sequence[int], verb: str
) -> list[list[Edit]]:
    """n_lists lists of K edits at each of `layers`, each edit along a direction of its own.

    -> one of them for each row, in turn.
    """
    config, device = decoder.config, decoder.embed.weight.device
    generator = torch.Generator(device).manual_seed(n_lists + K)
    shape = n_lists, len(layers), K, config.dim
    u = torch.randn(shape, generator=generator, device=device)
    u = (u / u.norm(dim=-1, keepdim=True)).cpu()
    weight, make = 0.1 * config.dim**0.5, VERBS[verb]
    lists = [
        [
            make(Direction(layer, one, weight, weight, 0.0), weight)
            for layer, several in zip(layers, at_layers, strict=True)
            for one in several
        ]
        for at_layers in (several.unbind() for several in u.unbind())
    ]
    return [lists[row % n_lists] for row in range(n_rows)]


class Run(NamedTuple):
    """A batch's whole texts, and when they came."""

    ids: Tensor  # (B, n_tokens) int64
    first: float  # seconds to the first tokens: tables, prompts
    whole: float  # seconds to the last ones


@torch.inference_mode()
def run(
    steps: Steps,
    prompts: Tensor,
    n_tokens: int,
    edits: Sequence[Sequence[Edit]] = (),
    graph: bool = True,
) -> Run:
    """prompts (B, T), each row as long: as `generation.decode` does, but for making text of it."""
    (B, T), chosen = prompts.shape, []
    finish(steps.decoder)
    begin = time.perf_counter()
    with steps.take(B, T + n_tokens, graph) as step:
        start = torch.zeros(B, dtype=torch.long)
        step.begin(prompts, start, [n_tokens] * B, frozenset(), edits)
        for tokens in tokens_of(step, n_tokens, lambda n: edits):
            chosen.append(tokens)
            if len(chosen) == 1:
                first = time.perf_counter() - begin
    return Run(torch.tensor(chosen).T, first, time.perf_counter() - begin)


def random_prompts(config: Config, B: int, T: int) -> Tensor:
    """(B, T) int64."""
    generator = torch.Generator().manual_seed(B + T)
    return torch.randint(config.vocab_size, (B, T), generator=generator)


def finish(decoder: Decoder) -> None:
    """Wait for all that its device has been asked to do."""
    if decoder.embed.weight.is_cuda:
        torch.cuda.synchronize()
