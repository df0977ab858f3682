"""Which models there are, as data: config.json -> Config, and the Hub's names of tensors.

To support a family, add a row to FAMILIES. To support a trait, add a field to `Config`.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from tinysteer.loading.settings import check_settings
from tinysteer.model.config import Config, Layer
from tinysteer.model.rope import Rope

# Our module -> the checkpoint's, # standing for the layer; several are stacked by rows in order.
Names = dict[str, str | tuple[str, ...]]
LLAMA: Names = {
    "embed": "model.embed_tokens",
    "blocks.#.attn_norm": "model.layers.#.input_layernorm",
    "blocks.#.attn.qkv": (
        "model.layers.#.self_attn.q_proj",
        "model.layers.#.self_attn.k_proj",
        "model.layers.#.self_attn.v_proj",
    ),
    "blocks.#.attn.out": "model.layers.#.self_attn.o_proj",
    "blocks.#.mlp_norm": "model.layers.#.post_attention_layernorm",
    "blocks.#.mlp.gate_up": ("model.layers.#.mlp.gate_proj", "model.layers.#.mlp.up_proj"),
    "blocks.#.mlp.down": "model.layers.#.mlp.down_proj",
    "norm": "model.norm",
    "head": "lm_head",
}
PHI3: Names = LLAMA | {
    "blocks.#.attn.qkv": "model.layers.#.self_attn.qkv_proj",
    "blocks.#.mlp.gate_up": "model.layers.#.mlp.gate_up_proj",
}
GEMMA2: Names = LLAMA | {  # what Llama calls post_attention comes before the MLP; not so here
    "blocks.#.attn_post_norm": "model.layers.#.post_attention_layernorm",
    "blocks.#.mlp_norm": "model.layers.#.pre_feedforward_layernorm",
    "blocks.#.mlp_post_norm": "model.layers.#.post_feedforward_layernorm",
}
GEMMA3: Names = GEMMA2 | {
    "blocks.#.attn.q_norm": "model.layers.#.self_attn.q_norm",
    "blocks.#.attn.k_norm": "model.layers.#.self_attn.k_norm",
}
# Parts of a multimodal checkpoint that a text model does without, and buffers old ones hold.
IGNORED = ("vision_tower.", "multi_modal_projector.", "rotary_emb.inv_freq")
# A multimodal checkpoint's text model lies below this prefix, before or after "model.".
TEXT_PREFIX = "language_model."


def gemma(c: dict) -> dict[str, Any]:
    traits = {"norm_offset": 1.0, "embed_scale": c["hidden_size"] ** 0.5}
    if not c.get("hidden_activation"):  # Gemma 1 says "gelu" and means the tanh form
        traits["activation"] = "gelu_tanh"
    return traits


def gemma2(c: dict) -> dict[str, Any]:
    return gemma(c) | {
        "post_norms": True,
        "attn_scale": c["query_pre_attn_scalar"] ** -0.5,
        "attn_cap": c["attn_logit_softcapping"],
        "logit_cap": c["final_logit_softcapping"],
    }


def gemma3(c: dict) -> dict[str, Any]:
    return gemma2(c) | {"qk_norm": True}


@dataclass(frozen=True)
class Family:
    """One model_type of config.json.

    pattern: the layers' kinds, repeated: S sees a sliding window (where config.json gives one),
    G everything. defaults: what config.json may leave out.
    """

    names: Names
    pattern: str = "G"
    traits: Callable[[dict], dict[str, Any]] = lambda c: {}
    defaults: dict[str, Any] = field(default_factory=dict)


# What config.json may leave out, as each family's published config class has it.
CONTEXT, ORIGINAL = "max_position_embeddings", "original_max_position_embeddings"
EPS, KV_HEADS, WINDOW = "rms_norm_eps", "num_key_value_heads", "sliding_window"
GEMMA_DEFAULTS = {EPS: 1e-6, "tie_word_embeddings": True, "head_dim": 256}
GEMMA2_DEFAULTS = GEMMA_DEFAULTS | {
    CONTEXT: 8192,
    KV_HEADS: 4,
    WINDOW: 4096,
    "query_pre_attn_scalar": 256,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}
GEMMA3_DEFAULTS = GEMMA2_DEFAULTS | {  # sizes too: a multimodal model's text_config is sparse
    CONTEXT: 131_072,
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
}
MISTRAL_DEFAULTS = {CONTEXT: 131_072, EPS: 1e-6, KV_HEADS: 8, WINDOW: 4096}
FAMILIES = {
    "llama": Family(LLAMA, defaults={CONTEXT: 2048, EPS: 1e-6}),
    "mistral": Family(LLAMA, "S", defaults=MISTRAL_DEFAULTS),
    "phi3": Family(PHI3, "S", defaults={CONTEXT: 4096, ORIGINAL: 4096, EPS: 1e-5}),
    "gemma": Family(LLAMA, "G", gemma, GEMMA_DEFAULTS | {CONTEXT: 8192, KV_HEADS: 16}),
    "gemma2": Family(GEMMA2, "SG", gemma2, GEMMA2_DEFAULTS),
    "gemma3_text": Family(GEMMA3, "SSSSSG", gemma3, GEMMA3_DEFAULTS),
}
MULTIMODAL = {"gemma3": "gemma3_text"}  # whose text model stands in text_config, except for:
WHOLE = ("tie_word_embeddings", "quantization_config")
KINDS = {"S": "sliding_attention", "G": "full_attention"}
ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}


def read_config(config: dict[str, Any]) -> Config:
    """A config.json, as transformers wrote it before or since version 5 -> our Config.

    ValueError for a model_type that is not in FAMILIES, for settings that the decoder does not
    know or that are not of their kind, and for those that do not go together, each named.
    """
    check_settings(config)
    model_type = config.get("model_type")
    if model_type in MULTIMODAL:
        whole = {k: config[k] for k in WHOLE if k in config}
        config = (config.get("text_config") or {}) | whole
        check_settings(config)
        model_type = MULTIMODAL[model_type]
    if model_type not in FAMILIES:
        raise unsupported("model_type", model_type, [*FAMILIES, *MULTIMODAL])
    if config.get("quantization_config"):
        raise ValueError("this checkpoint is quantized; load the original, unquantized one")
    if config.get("use_bidirectional_attention"):
        raise ValueError("this model attends in both directions: it does not generate text")
    try:
        return build(model_type, FAMILIES[model_type], FAMILIES[model_type].defaults | config)
    except KeyError as key:
        raise ValueError(f"there is no {key}") from None


def unsupported(name: str, value: Any, known: Iterable[str]) -> ValueError:
    return ValueError(f"{name} {value!r} is not supported; those that are: {', '.join(known)}")


def build(model_type: str, family: Family, c: dict[str, Any]) -> Config:
    """The settings of a config.json, the family's defaults filled in -> Config."""
    activation = c.get("hidden_activation") or c.get("hidden_act") or "silu"
    if activation not in ACTIVATIONS:
        raise unsupported("hidden_act", activation, ACTIVATIONS)
    dim, n_heads = c["hidden_size"], c["num_attention_heads"]
    n_kv_heads, head_dim = c.get(KV_HEADS) or n_heads, c.get("head_dim") or dim // n_heads
    if n_heads % n_kv_heads:
        raise ValueError(
            f"num_attention_heads {n_heads} is not a multiple of {KV_HEADS} {n_kv_heads}"
        )
    if not c.get("head_dim") and dim % n_heads:
        raise ValueError(f"hidden_size {dim} is not a multiple of num_attention_heads {n_heads}")
    fields = {
        "vocab_size": c["vocab_size"],
        "dim": dim,
        "n_heads": n_heads,
        "n_kv_heads": n_kv_heads,
        "head_dim": head_dim,
        "hidden_dim": c["intermediate_size"],
        "norm_eps": c[EPS],
        "context_length": c[CONTEXT],
        "layers": read_layers(c, family, head_dim),
        "tied": bool(c.get("tie_word_embeddings", False)),
        "activation": ACTIVATIONS[activation],
        "attn_bias": bool(c.get("attention_bias", False)),
        "mlp_bias": bool(c.get("mlp_bias", False)),
    }
    return Config(model_type, **fields | family.traits(c))


def read_layers(c: dict, family: Family, head_dim: int) -> tuple[Layer, ...]:
    """Each layer's window and rope, from `layer_types` or the family's pattern."""
    pattern, n_layers = family.pattern, c["num_hidden_layers"]
    if period := c.get("sliding_window_pattern") or c.get("_sliding_window_pattern"):
        pattern = "S" * (period - 1) + "G"
    kinds = c.get("layer_types") or [KINDS[pattern[i % len(pattern)]] for i in range(n_layers)]
    if len(kinds) != n_layers:
        raise ValueError(f"layer_types has {len(kinds)} entries for {n_layers} layers")
    window = c.get(WINDOW)
    layers = {
        "sliding_attention": Layer(read_rope(c, head_dim, "sliding_attention"), window),
        "full_attention": Layer(read_rope(c, head_dim, "full_attention")),
    }
    if unknown := set(kinds) - set(layers):
        raise ValueError(f"layer_types has {sorted(unknown)}; known are {sorted(layers)}")
    return tuple(layers[kind] for kind in kinds)


def read_rope(c: dict, head_dim: int, kind: str) -> Rope:
    """The rope of one kind of layer, from either spelling of config.json.

    `rope_parameters` (transformers 5) may be nested per kind; before, `rope_theta` and
    `rope_scaling` stood apart, and Gemma 3's local layers had `rope_local_base_freq` alone.
    """
    local = kind == "sliding_attention" and "rope_local_base_freq" in c
    theta = c["rope_local_base_freq"] if local else c.get("rope_theta")
    r = c.get("rope_parameters") or c.get("rope_scaling") or {}
    if local or r.keys() & KINDS.values():
        r = r.get(kind) or {}
    scheme = r.get("rope_type") or r.get("type") or "default"
    scheme = "longrope" if "short_factor" in r else scheme  # early Phi-3 said "su", then "yarn"
    if scheme not in SETTINGS:
        raise unsupported("rope type", scheme, SETTINGS)
    partial = r.get("partial_rotary_factor") or c.get("partial_rotary_factor") or 1.0
    dim = int(head_dim * partial)
    if dim < 2 or dim % 2:
        raise ValueError(
            f"{partial:g} of a head's {head_dim} dimensions are {dim}: rope needs pairs"
        )
    return Rope(
        dim=dim,
        theta=float(r.get("rope_theta") or theta or 10_000.0),
        scheme=scheme,
        **SETTINGS[scheme](r, c),
    )


def llama3_settings(r: dict, c: dict) -> dict[str, Any]:
    if r["low_freq_factor"] >= r["high_freq_factor"]:
        raise ValueError("low_freq_factor must be below high_freq_factor")
    return {
        "factor": float(r["factor"]),
        "low_freq_factor": float(r["low_freq_factor"]),
        "high_freq_factor": float(r["high_freq_factor"]),
        "original_length": r.get(ORIGINAL) or c[CONTEXT],
    }


def longrope_settings(r: dict, c: dict) -> dict[str, Any]:
    original = c.get(ORIGINAL) or r.get(ORIGINAL) or c[CONTEXT]
    factor = r.get("factor") or c[CONTEXT] / original
    scale = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return {
        "original_length": original,
        "short_factors": tuple(map(float, r["short_factor"])),
        "long_factors": tuple(map(float, r["long_factor"])),
        "table_scale": float(r.get("attention_factor") or scale),
    }


SETTINGS: dict[str, Callable[[dict, dict], dict[str, Any]]] = {
    "default": lambda r, c: {},
    "linear": lambda r, c: {"factor": float(r["factor"])},
    "llama3": llama3_settings,
    "longrope": longrope_settings,
}
