"""config.json -> Config: both spellings, what is left out, and the settings of known models."""

import json

import pytest
import torch
from checkpoints import SIZES, VARIANTS, longrope

from tinysteer.loading.families import FAMILIES, read_config
from tinysteer.model.decoder import Decoder

transformers = pytest.importorskip("transformers")
CONFIG_CLASSES = {
    "llama": transformers.LlamaConfig,
    "mistral": transformers.MistralConfig,
    "phi3": transformers.Phi3Config,
    "gemma": transformers.GemmaConfig,
    "gemma2": transformers.Gemma2Config,
    "gemma3_text": transformers.Gemma3TextConfig,
    "gemma3": transformers.Gemma3Config,
}
ALWAYS_GIVEN = ("model_type", "vocab_size", "hidden_size", "intermediate_size")
ALWAYS_GIVEN += ("num_hidden_layers", "num_attention_heads")


def filled_in(config: dict) -> dict:
    """What transformers makes of a config.json, written out with nothing left out."""
    config_class = CONFIG_CLASSES[config["model_type"]]
    return json.loads(json.dumps(config_class.from_dict(config).to_dict()))


def before_5(config: dict, key: str = "rope_type") -> dict:
    """A config.json of transformers 5 as version 4 spelled it, `key` naming the rope's scheme."""
    if "text_config" in config:
        return config | {"text_config": before_5(config["text_config"], key)}
    old = {k: v for k, v in config.items() if k not in ("rope_parameters", "layer_types")}
    ropes = config["rope_parameters"]
    rope = dict(ropes.get("full_attention", ropes))
    scheme = rope.pop("rope_type")
    old["rope_theta"] = rope.pop("rope_theta")
    old["partial_rotary_factor"] = rope.pop("partial_rotary_factor", 1.0)
    old["rope_scaling"] = None if scheme == "default" else rope | {key: scheme}
    if "full_attention" in ropes:
        old["rope_local_base_freq"] = ropes["sliding_attention"]["rope_theta"]
        old["sliding_window_pattern"] = old.pop("_sliding_window_pattern")
    return old


def windows(config: dict) -> list[int | None]:
    return [layer.window for layer in read_config(config).layers]


@pytest.mark.parametrize("key", ["rope_type", "type"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_both_spellings_say_the_same(variant, key, checkpoint):
    new = json.loads((checkpoint(variant)[0] / "config.json").read_text())
    old = before_5(new, key)
    assert "rope_parameters" not in json.dumps(old)
    assert read_config(old) == read_config(new)
    if key == "rope_type":  # transformers overlooks the other name in Gemma 3
        assert read_config(old) == read_config(filled_in(old))


@pytest.mark.parametrize("early", ["su", "yarn"])
def test_early_names_of_longrope_mean_longrope(early):
    now = SIZES | {"model_type": "phi3", "rope_parameters": longrope(6)}
    config = read_config(before_5(now) | {"rope_scaling": longrope(6) | {"rope_type": early}})
    assert config.layers[0].rope.scheme == "longrope"
    assert config == read_config(now)


def full(family: str) -> dict:
    """Settings none of which is its family's default, as transformers writes them."""
    more = {"sliding_window": 6, "rms_norm_eps": 1e-3, "head_dim": 12, "attention_bias": True}
    more |= {"query_pre_attn_scalar": 9, "attn_logit_softcapping": 5.0, "mlp_bias": True}
    more |= {"final_logit_softcapping": 3.0, "original_max_position_embeddings": 32}
    theta = {"rope_type": "default", "rope_theta": 500.0}
    rope = {"phi3": longrope(6) | theta | {"rope_type": "longrope"}}
    rope["gemma3_text"] = {"sliding_attention": theta, "full_attention": theta}
    config_class = CONFIG_CLASSES[family]
    tied = not config_class().tie_word_embeddings
    settings = SIZES | {"num_hidden_layers": 7, "tie_word_embeddings": tied}
    settings |= {"hidden_size": 192, "num_attention_heads": 16}  # Gemma has 16 for keys, left out
    known = config_class().to_dict().keys()
    settings |= {k: v for k, v in more.items() if k in known}
    return config_class(**settings, rope_parameters=rope.get(family, theta)).to_dict()


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_left_out_is_the_default_of_transformers(family):
    config = full(family)
    for key in config.keys() - set(ALWAYS_GIVEN):
        sparse = {k: v for k, v in config.items() if k != key}
        assert read_config(sparse) == read_config(filled_in(sparse)), f"without {key}"
    least = {k: config[k] for k in ALWAYS_GIVEN}
    assert read_config(least) == read_config(filled_in(least))


def test_the_least_text_config_of_a_multimodal_model_is_enough():
    least = {"model_type": "gemma3"}
    assert read_config(least) == read_config(filled_in(least))
    some = least | {"text_config": {"num_hidden_layers": 7, "sliding_window": 5}}
    assert read_config(some) == read_config(filled_in(some))


def test_ties_and_quantization_of_a_multimodal_model_stand_outside_its_text_config():
    tied = {"text_config": {"tie_word_embeddings": True}}
    assert not read_config({"model_type": "gemma3", "tie_word_embeddings": False} | tied).tied
    assert read_config({"model_type": "gemma3"} | tied).tied
    with pytest.raises(ValueError, match="quantized"):
        read_config({"model_type": "gemma3", "quantization_config": {"bits": 4}} | tied)


def test_a_local_rope_without_a_theta_has_its_own_default():
    nested = {"sliding_attention": {"rope_type": "default"}, "full_attention": {}}
    config = SIZES | {"model_type": "gemma3_text", "rope_parameters": nested}
    assert read_config(config) == read_config(filled_in(config))
    assert read_config(config).layers[0].rope.theta == 10_000.0


def test_a_sliding_window_of_null_means_none():
    for family in FAMILIES:
        config = SIZES | {"model_type": family, "sliding_window": None}
        assert set(windows(config)) == {None}


def test_the_period_of_the_pattern_may_be_given():
    config = SIZES | {"model_type": "gemma3_text", "sliding_window": 7, "num_hidden_layers": 5}
    assert windows(config | {"sliding_window_pattern": 3}) == [7, 7, None, 7, 7]
    assert windows(config | {"sliding_window_pattern": 1}) == [None] * 5


def test_layer_types_outrank_the_pattern():
    kinds = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    config = SIZES | {"model_type": "gemma2", "sliding_window": 7, "layer_types": kinds}
    assert windows(config) == [None, 7, 7, None]


def test_layer_types_must_be_known_and_as_many_as_the_layers():
    config = SIZES | {"model_type": "gemma2"}
    with pytest.raises(ValueError, match=r"\['chunked_attention'\]; known are \['full_attention'"):
        read_config(config | {"layer_types": ["chunked_attention"] * 4})
    with pytest.raises(ValueError, match="layer_types has 3 entries for 4 layers"):
        read_config(config | {"layer_types": ["full_attention"] * 3})


def sizes(dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, context_length) -> dict:
    return {
        "hidden_size": dim,
        "intermediate_size": hidden_dim,
        "num_hidden_layers": n_layers,
        "num_attention_heads": n_heads,
        "num_key_value_heads": n_kv_heads,
        "vocab_size": vocab_size,
        "max_position_embeddings": context_length,
    }


LLAMA31 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA31 |= {"original_max_position_embeddings": 8192, "rope_type": "llama3"}
LONGROPE = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
# name -> (config.json, each layer's window, number of parameters)
KNOWN = {
    "Llama-3.1-8B": (
        sizes(4096, 14336, 32, 32, 8, 128_256, 131_072)
        | {"model_type": "llama", "rope_theta": 500_000.0, "rope_scaling": LLAMA31},
        [None] * 32,
        8_030_261_248,
    ),
    "Llama-3.2-1B": (
        sizes(2048, 8192, 16, 32, 8, 128_256, 131_072)
        | {"model_type": "llama", "head_dim": 64, "tie_word_embeddings": True},
        [None] * 16,
        1_235_814_400,
    ),
    "SmolLM2-135M": (
        sizes(576, 1536, 30, 9, 3, 49_152, 8192)
        | {"model_type": "llama", "rope_theta": 100_000, "tie_word_embeddings": True},
        [None] * 30,
        134_515_008,
    ),
    "Mistral-7B-v0.1": (
        sizes(4096, 14336, 32, 32, 8, 32_000, 32_768)
        | {"model_type": "mistral", "sliding_window": 4096},
        [4096] * 32,
        7_241_732_096,
    ),
    "Mistral-7B-v0.3": (
        sizes(4096, 14336, 32, 32, 8, 32_768, 32_768)
        | {"model_type": "mistral", "sliding_window": None, "rope_theta": 1e6},
        [None] * 32,
        7_248_023_552,
    ),
    "Phi-3-mini-4k-instruct": (
        sizes(3072, 8192, 32, 32, 32, 32_064, 4096)
        | {"model_type": "phi3", "sliding_window": 2047, "rope_scaling": None},
        [2047] * 32,
        3_821_079_552,
    ),
    "Phi-4-mini-instruct": (
        sizes(3072, 8192, 32, 24, 8, 200_064, 131_072)
        | {
            "model_type": "phi3",
            "sliding_window": 262_144,
            "partial_rotary_factor": 0.75,
            "original_max_position_embeddings": 4096,
            "rope_scaling": LONGROPE | {"short_factor": [1.0] * 48, "long_factor": [2.0] * 48},
            "tie_word_embeddings": True,
        },
        [262_144] * 32,
        3_836_021_760,
    ),
    "gemma-2b": (
        sizes(2048, 16_384, 18, 8, 1, 256_000, 8192)
        | {"model_type": "gemma", "head_dim": 256, "hidden_act": "gelu"},
        [None] * 18,
        2_506_172_416,
    ),
    "gemma-2-2b": (
        sizes(2304, 9216, 26, 8, 4, 256_000, 8192)
        | {"model_type": "gemma2", "head_dim": 256, "sliding_window": 4096},
        [4096, None] * 13,
        2_614_341_888,
    ),
    "gemma-2-27b": (
        sizes(4608, 36_864, 46, 32, 16, 256_000, 8192)
        | {"model_type": "gemma2", "head_dim": 128, "query_pre_attn_scalar": 144},
        [4096, None] * 23,
        27_227_128_320,
    ),
    "gemma-3-1b-it": (
        sizes(1152, 6912, 26, 4, 1, 262_144, 32_768)
        | {"model_type": "gemma3_text", "sliding_window": 512, "sliding_window_pattern": 6},
        ([512] * 5 + [None]) * 4 + [512] * 2,
        999_885_952,
    ),
    "gemma-3-4b-it": (
        {
            "model_type": "gemma3",
            "text_config": {
                "hidden_size": 2560,
                "intermediate_size": 10_240,
                "model_type": "gemma3_text",
                "num_hidden_layers": 34,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                "sliding_window": 1024,
            },
        },
        ([1024] * 5 + [None]) * 5 + [1024] * 4,
        3_880_263_168,
    ),
}


@pytest.mark.parametrize("name", KNOWN)
def test_known_models_have_their_windows_and_size(name):
    config, expected, n_parameters = KNOWN[name]
    assert windows(config) == expected
    with torch.device("meta"):
        decoder = Decoder(read_config(config))
    assert sum(parameter.numel() for parameter in decoder.parameters()) == n_parameters


def test_gemma_1_is_run_with_the_tanh_form_of_gelu_whatever_its_config_says():
    assert read_config(KNOWN["gemma-2b"][0]).activation == "gelu_tanh"


def test_gemma_2_is_scaled_and_capped_as_published():
    small, large = (read_config(KNOWN[name][0]) for name in ("gemma-2-2b", "gemma-2-27b"))
    assert (small.attn_cap, small.logit_cap, small.attn_scale) == (50.0, 30.0, 1 / 16)
    assert large.attn_scale == 1 / 12


def test_gemma_3_scales_only_the_ropes_of_its_global_layers():
    ropes = [layer.rope for layer in read_config(KNOWN["gemma-3-4b-it"][0]).layers]
    assert {(rope.scheme, rope.theta) for rope in ropes[:5]} == {("default", 10_000.0)}
    assert (ropes[5].scheme, ropes[5].theta, ropes[5].factor) == ("linear", 1_000_000.0, 8.0)


def test_phi_4_mini_turns_three_quarters_of_a_head_and_scales_its_tables():
    rope = read_config(KNOWN["Phi-4-mini-instruct"][0]).layers[0].rope
    assert (rope.dim, rope.original_length) == (96, 4096)
    assert rope.table_scale == pytest.approx((1 + 5 / 12) ** 0.5)  # 32 = 2 ** 5, 4096 = 2 ** 12


def test_longrope_takes_a_factor_that_config_json_gives():
    sizes = {"vocab_size": 9, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1}
    config = sizes | {"model_type": "phi3", "num_attention_heads": 2}
    config |= {"max_position_embeddings": 131072, "original_max_position_embeddings": 4096}

    def scale(**given):
        return read_config(config | {"rope_scaling": LONGROPE | given}).layers[0].rope.table_scale

    assert scale() == pytest.approx(1.1902380714238083)  # sqrt(1 + ln 32 / ln 4096)
    assert scale(factor=4.0) == pytest.approx(1.0801234497346435)  # sqrt(1 + ln 4 / ln 4096)
    assert scale(attention_factor=1.5) == 1.5
