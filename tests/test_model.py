"""The decoder against transformers, and against itself cached, padded and in chunks."""

import dataclasses

import pytest
import torch
from checkpoints import VARIANTS

import tinysteer as ts
from tinysteer.model.cache import Cache
from tinysteer.model.config import Config
from tinysteer.model.decoder import CHUNK, Decoder, unsteered
from tinysteer.text.tokenizer import pad

T = 24


def some_tokens(B: int = 2, length: int = T) -> torch.Tensor:
    return torch.randint(3, 200, (B, length), generator=torch.Generator().manual_seed(1))


def close(ours, theirs, limit=2e-4):
    torch.testing.assert_close(ours, theirs, atol=limit, rtol=0)


@torch.no_grad()
def test_logits_are_those_of_transformers(pair):
    ours, theirs = pair
    tokens = some_tokens()
    close(ours.logits(tokens), theirs(tokens).logits)


@torch.no_grad()
def test_residuals_are_the_hidden_states_of_transformers(pair):
    ours, theirs = pair
    tokens = some_tokens()
    states = theirs(tokens, output_hidden_states=True).hidden_states
    residuals = ours.residuals(tokens)
    assert residuals.shape == (ours.config.n_layers, *tokens.shape, ours.config.dim)
    for layer in range(ours.config.n_layers - 1):  # transformers' last state is normed
        close(residuals[layer], states[layer + 1], 1e-3)
    close(ours.decoder.norm(residuals[-1]), states[-1], 1e-3)


@torch.no_grad()
def test_decoding_one_by_one_equals_prefill(pair):
    ours, _ = pair
    tokens = some_tokens()
    cache = Cache(ours.decoder, torch.zeros(2, dtype=torch.long), T, T)
    steps = [ours.decoder.logits(ours.decoder(tokens[:, t : t + 1], cache)) for t in range(T)]
    close(torch.cat(steps, dim=1), ours.logits(tokens))


def test_left_padding_changes_nothing(pair):
    ours, _ = pair
    rows = [some_tokens(1, n)[0].tolist() for n in (T, T - 9, 3, 1)]
    tokens, start = pad(rows)
    padded = ours.logits(tokens, start=start)
    assert padded.isfinite().all()
    for i, row in enumerate(rows):
        close(padded[i, int(start[i]) :], ours.logits(torch.tensor([row]))[0])


def test_longrope_goes_by_the_room_a_row_has(checkpoint):
    """Six tokens alone are a short text; with room for more they are the start of a long one."""
    ours = ts.load(checkpoint("phi3: longrope, long text")[0])
    row, start = some_tokens(1, 6), torch.zeros(1, dtype=torch.long)

    def logits(room):
        cache = Cache(ours.decoder, start, 6, T, torch.tensor([room]))
        with torch.no_grad():
            return ours.decoder.logits(ours.decoder(row, cache))

    close(logits(6), ours.logits(row))
    assert torch.equal(logits(8), logits(6))  # 8 is still within the original length
    assert (logits(9) - logits(8)).abs().max() > 1e-2


def test_a_prompt_in_chunks_is_the_same_prompt(pair, monkeypatch):
    ours, _ = pair
    whole = ours.logits(some_tokens())
    monkeypatch.setattr("tinysteer.language_model.CHUNK", 5)
    close(ours.logits(some_tokens()), whole)


def flips(config: Config) -> dict[str, Config]:
    """The config with one trait changed at a time, for each trait this model has."""
    change = {
        "norm_offset": 1.0 - config.norm_offset,
        "embed_scale": config.embed_scale * 2,
        "attn_scale": 0.9 * (config.attn_scale or config.head_dim**-0.5),
        "attn_cap": 2 * config.attn_cap if config.attn_cap else 5.0,
        "logit_cap": None if config.logit_cap else 5.0,
        "activation": "gelu_tanh" if config.activation == "silu" else "silu",
        "norm_eps": 0.1,
        "post_norms": False,
        "qk_norm": False,
    }
    change = {name: value for name, value in change.items() if value != getattr(config, name)}
    made = {name: dataclasses.replace(config, **{name: value}) for name, value in change.items()}

    def each_layer(change):
        layers = (dataclasses.replace(layer, **change(layer)) for layer in config.layers)
        return dataclasses.replace(config, layers=tuple(layers))

    def each_rope(**changed):
        return each_layer(lambda layer: {"rope": dataclasses.replace(layer.rope, **changed)})

    rope = config.layers[-1].rope
    windows = {layer.window for layer in config.layers}
    made["window"] = each_layer(lambda layer: {"window": 3})
    if windows != {None}:
        wider = each_layer(lambda layer: {"window": layer.window and layer.window + 1})
        made["window wider by one"] = wider
    made["theta"] = each_rope(theta=500.0)
    if rope.scheme != "default":
        made["rope scheme"] = each_rope(scheme="default")
    if rope.scheme == "longrope":
        made["table_scale"] = each_rope(table_scale=1.0)
        swapped = {"short_factors": rope.long_factors, "long_factors": rope.short_factors}
        made["longrope's side"] = each_rope(**swapped)
    if len(windows) > 1:
        made["order of layers"] = dataclasses.replace(config, layers=config.layers[::-1])
    return made


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_every_trait_matters(variant, checkpoint):
    """With any one trait wrong the comparison above would fail: the random weights show it."""
    folder, theirs = checkpoint(variant)
    ours = ts.load(folder)
    tokens = some_tokens()
    expected = theirs(tokens).logits
    for name, config in flips(ours.config).items():
        decoder = Decoder(config).requires_grad_(False)
        decoder.load_state_dict(ours.decoder.state_dict(), strict=False)
        wrong = ts.LanguageModel(decoder, ours.tokenizer).logits(tokens)
        assert (wrong - expected).abs().max() > 2e-3, f"{name} does not show"


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_half_precision_is_as_near_to_float32_as_transformers(variant, checkpoint):
    folder, theirs = checkpoint(variant)
    tokens = some_tokens()
    exact = theirs(tokens).logits
    half = ts.load(folder, dtype="bfloat16").logits(tokens)
    reference = (
        type(theirs)
        .from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="eager")(tokens)
        .logits.float()
    )
    assert half.dtype == torch.float32
    assert (half - exact).std() < 1.25 * (reference - exact).std()


@pytest.mark.parametrize("variant", ["llama: grouped heads", "gemma2", "gemma3_text"])
@torch.no_grad()
def test_norms_and_embeddings_round_where_transformers_rounds(variant, checkpoint):
    """In bfloat16, bit by bit, with blocks that add nothing."""
    folder, theirs = checkpoint(variant)
    ours = ts.load(folder, dtype="bfloat16")
    theirs = type(theirs).from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="eager")
    for name, parameter in [*ours.decoder.named_parameters(), *theirs.named_parameters()]:
        if any(part in name for part in ("attn.out", "mlp.down", "o_proj", "down_proj")):
            parameter.zero_()
    states = theirs(some_tokens(), output_hidden_states=True).hidden_states
    residuals = ours.residuals(some_tokens())
    assert torch.equal(residuals[-1], states[0])
    assert torch.equal(ours.decoder.norm(residuals[-1]), states[-1])


def test_a_row_of_padding_never_becomes_nan(checkpoint):
    ours = ts.load(checkpoint("gemma2")[0])
    residuals = ours.residuals(some_tokens(), start=torch.tensor([T - 1, 0]))
    assert residuals.isfinite().all()


def test_a_long_prompt_is_run_in_chunks(model):
    tokens, lengths = some_tokens(1, CHUNK + 90), []

    def measure(x, *rest):
        lengths.append(x.shape[1])
        return unsteered(x, *rest)

    cache = Cache(model.decoder, torch.zeros(1, dtype=torch.long), CHUNK + 90, CHUNK + 90)
    last = model.decoder.prefill(tokens, cache, measure)
    assert max(lengths) == CHUNK
    assert last.shape == (1, 1, model.config.dim)
