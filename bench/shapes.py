"""Models of known shapes with random weights, so that nothing is downloaded, and what a step reads.

Each matrix is drawn by its width ** -0.5: what comes out of it is as large as what goes in, through
all layers to the logits.
"""

import torch

from tinysteer.loading.families import read_config
from tinysteer.model.decoder import Decoder

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
    """What a step reads of the weights, as gpt-fast counts: an embedding only if it is the head."""
    total = sum(parameter.nbytes for parameter in decoder.parameters())
    return total if decoder.config.tied else total - decoder.embed.weight.nbytes


def cache_bytes(decoder: Decoder, B: int, seen: float) -> float:
    """What a step reads of the keys and values of B rows that see so many columns."""
    config = decoder.config
    columns = sum(min(seen, layer.window or seen) for layer in config.layers)
    one = config.n_kv_heads * config.head_dim * decoder.embed.weight.itemsize
    return 2 * B * columns * one
