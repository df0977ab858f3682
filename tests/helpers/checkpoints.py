"""Tiny random checkpoints of every family, written by transformers: the oracle's side.

Weights are drawn large enough that a wrong soft-cap, norm, window or rope shows in the logits.
"""

import pytest
import tokenizers
import torch

SIZES = {
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def longrope(pairs: int, partial: float = 1.0) -> dict:
    return {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "partial_rotary_factor": partial,
        "short_factor": [1.0 + 0.1 * i for i in range(pairs)],
        "long_factor": [2.0 + 0.5 * i for i in range(pairs)],
    }


def capped(**more) -> dict:
    """Gemma 2's soft caps, low enough to bite on random weights."""
    return {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0} | more


GEMMA = {"head_dim": 16, "hidden_activation": "gelu_pytorch_tanh"}
GEMMA3_TEXT = (
    SIZES | GEMMA | {"num_hidden_layers": 7, "sliding_window": 6, "query_pre_attn_scalar": 9}
)
# name -> (transformers' classes, settings that differ from SIZES)
VARIANTS = {
    "llama: all heads": ("Llama", {"num_key_value_heads": 4}),
    "llama: grouped heads": ("Llama", {}),
    "llama: tied head": ("Llama", {"tie_word_embeddings": True}),
    "llama: biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama: wide heads": ("Llama", {"head_dim": 20}),
    "llama: llama3 rope": ("Llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama: linear rope": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0}},
    ),
    "mistral: no window": ("Mistral", {"sliding_window": None}),
    "mistral: window": ("Mistral", {"sliding_window": 5}),
    "phi3: 4k, window": ("Phi3", {"sliding_window": 7}),
    "phi3: longrope, short text": (
        "Phi3",
        {"original_max_position_embeddings": 64, "rope_parameters": longrope(6)},
    ),
    "phi3: longrope, long text": (
        "Phi3",
        {"original_max_position_embeddings": 8, "rope_parameters": longrope(6)},
    ),
    "phi3: partial rotary, tied (4-mini)": (
        "Phi3",
        {
            "original_max_position_embeddings": 8,
            "hidden_size": 64,
            "rope_parameters": longrope(6, partial=0.75),
            "tie_word_embeddings": True,
        },
    ),
    "gemma": ("Gemma", GEMMA),
    "gemma2": ("Gemma2", GEMMA | capped(sliding_window=6, query_pre_attn_scalar=9)),
    "gemma3_text": ("Gemma3Text", GEMMA3_TEXT),
    "gemma3_text: linear rope": (
        "Gemma3Text",
        GEMMA3_TEXT
        | {
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            }
        },
    ),
    "gemma3: text part of a multimodal model": (
        "Gemma3",
        {
            "text_config": GEMMA3_TEXT,
            "vision_config": {
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 28,
                "patch_size": 14,
            },
            "mm_tokens_per_image": 4,
        },
    ),
}
CLASSES = {"Gemma3Text": ("Gemma3TextConfig", "Gemma3ForCausalLM")}
CLASSES["Gemma3"] = ("Gemma3Config", "Gemma3ForConditionalGeneration")


def make_model(variant: str):
    transformers = pytest.importorskip("transformers")  # CI tries the oldest packages without it
    family, settings = VARIANTS[variant]
    config_class, model_class = CLASSES.get(family, (f"{family}Config", f"{family}ForCausalLM"))
    sizes = {} if family == "Gemma3" else SIZES | {"tie_word_embeddings": False}
    config = getattr(transformers, config_class)(**sizes | settings)
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(config).eval()
    model.set_attn_implementation("eager")  # some versions' sdpa drops Gemma 2's soft-cap
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.5 if "norm" in name or "embed" in name else 2 * parameter.shape[-1] ** -0.5
            shift = 1.0 if "norm" in name and "gemma" not in config.model_type else 0.0
            parameter.copy_(torch.randn_like(parameter) * scale + shift)
    return model


def make_tokenizer() -> tokenizers.Tokenizer:
    """300 ids: three special ones and every byte; a BOS in front of what it encodes."""
    special = ["<pad>", "<s>", "</s>"]
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(special + alphabet)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def make_checkpoint(variant: str, folder, **save):
    """Write a checkpoint in Hugging Face layout -> (folder, transformers model)."""
    model = make_model(variant)
    model.save_pretrained(folder, **save)
    make_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    return folder, model
