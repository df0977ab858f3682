"""What each setting of a config.json may be, as data: its type, its range, whether null will do."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Kind(NamedTuple):
    """What a value must be, in words, and whether it is."""

    words: str
    fits: Callable[[Any], bool]
    null: bool = False  # null, as if the setting were not there


def whole(most: int, least: int = 1, null: bool = False) -> Kind:
    return Kind(
        f"a whole number from {least} to {most}",
        lambda v: type(v) is int and least <= v <= most,
        null,
    )


def real(most: float, null: bool = False) -> Kind:
    return Kind(f"a number above 0 and at most {most:g}", lambda v: is_real(v, most), null)


def is_real(value: Any, most: float) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and 0 < value <= most


def many(one: Kind, null: bool = False) -> Kind:
    fits = lambda v: isinstance(v, list) and len(v) <= MOST and all(map(one.fits, v))  # noqa: E731
    return Kind(f"a list, each entry {one.words}", fits, null)


MOST = 1000  # layers, and what there is one of for each
WIDTH = 1 << 18
LENGTH = 1 << 30
TEXT = Kind("a text", lambda v: isinstance(v, str), null=True)
SWITCH = Kind("true or false", lambda v: isinstance(v, bool), null=True)
OBJECT = Kind("an object", lambda v: isinstance(v, dict), null=True)
SETTINGS = {
    "model_type": TEXT,
    "text_config": OBJECT,
    "vocab_size": whole(1 << 24),
    "hidden_size": whole(WIDTH),
    "intermediate_size": whole(1 << 20),
    "num_hidden_layers": whole(MOST),
    "num_attention_heads": whole(4096),
    "num_key_value_heads": whole(4096, null=True),
    "head_dim": whole(8192, null=True),
    "rms_norm_eps": real(1.0),
    "max_position_embeddings": whole(LENGTH),
    "original_max_position_embeddings": whole(LENGTH, 2, null=True),
    "sliding_window": whole(LENGTH, null=True),
    "sliding_window_pattern": whole(MOST, null=True),
    "_sliding_window_pattern": whole(MOST, null=True),
    "layer_types": many(TEXT, null=True),
    "tie_word_embeddings": SWITCH,
    "attention_bias": SWITCH,
    "mlp_bias": SWITCH,
    "use_bidirectional_attention": SWITCH,
    "hidden_act": TEXT,
    "hidden_activation": TEXT,
    "query_pre_attn_scalar": real(1e6),
    "attn_logit_softcapping": real(1e6, null=True),
    "final_logit_softcapping": real(1e6, null=True),
    "rope_parameters": OBJECT,
    "rope_scaling": OBJECT,
    "rope_theta": real(1e12, null=True),
    "rope_local_base_freq": real(1e12),
    "partial_rotary_factor": real(1.0, null=True),
}
ROPE = {name: SETTINGS[name] for name in ("rope_theta", "partial_rotary_factor")} | {
    "original_max_position_embeddings": whole(LENGTH, 2, null=True),
    "full_attention": OBJECT,
    "sliding_attention": OBJECT,
    "rope_type": TEXT,
    "type": TEXT,
    "factor": real(1e6, null=True),
    "low_freq_factor": real(1e6),
    "high_freq_factor": real(1e6),
    "short_factor": many(real(1e6)),
    "long_factor": many(real(1e6)),
    "attention_factor": real(1e6, null=True),
}


def check_settings(settings: Mapping[str, Any], kinds: Mapping[str, Kind] = SETTINGS) -> None:
    """ValueError that names the first setting which is not of its kind."""
    for name, value in settings.items():
        kind = kinds.get(name)
        if kind and not (kind.null and value is None) and not kind.fits(value):
            raise ValueError(f"{name} is {value!r:.60}; it must be {kind.words}")
        if kind is OBJECT and name != "text_config" and value:
            check_settings(value, ROPE)
