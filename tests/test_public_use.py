"""The kernels without tinysteer: in a transformers hook, in a split residual, from a hub."""

import importlib.metadata
import json
import shutil
from pathlib import Path

import pytest
import torch
from oracle import hooked, layers_of
from tinysteer_kernels import Move, add_steer_norm, compile_moves, steer

from tinysteer.steering.edits import Edit as LayerEdit

LAYERS = (1, 3)
KERNELS = Path(__file__).parents[1] / "kernels"


@pytest.fixture
def theirs(checkpoint):
    """A tiny random Llama of transformers', float32."""
    return checkpoint("llama: grouped heads")[1]


@pytest.fixture
def tokens(theirs):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(theirs.config.vocab_size, (2, 7), generator=generator)


@pytest.fixture
def bank(theirs):
    generator = torch.Generator().manual_seed(1)
    return torch.nn.functional.normalize(
        torch.randn(3, theirs.config.hidden_size, generator=generator), dim=-1
    )


ROWS = [
    [Move(0, bias=4.0), Move(1, bias=3.0, slope=1.0)],
    [Move(2, slope=1.0), Move(0, bias=-5.0, slope=1.0, high=0.0), Move(1, bias=2.0)],
]


@torch.no_grad()
def by_reference(theirs, tokens, bank):
    """Each row alone, one forward hook doing one edit after another."""
    logits = []
    for row, ids in zip(ROWS, tokens, strict=True):
        edits = [LayerEdit(layer, bank[move.index], move) for layer in LAYERS for move in row]
        with hooked(theirs, edits):
            logits.append(theirs(ids[None]).logits)
    return torch.cat(logits)


def test_a_forward_hook_steers_each_row_of_a_transformers_model(theirs, tokens, bank):
    tables = compile_moves(bank, ROWS)
    hook = lambda block, args, h: steer(h, bank, tables)  # noqa: E731
    handles = [layers_of(theirs)[layer].register_forward_hook(hook) for layer in LAYERS]
    with torch.no_grad():
        result = theirs(tokens).logits
    for handle in handles:
        handle.remove()
    assert (result - theirs(tokens).logits).abs().max() > 0.1
    torch.testing.assert_close(result, by_reference(theirs, tokens, bank), atol=2e-4, rtol=1e-4)


@torch.no_grad()
def test_a_split_residual_is_steered_in_its_sum(theirs, tokens, bank):
    """The stream as vLLM keeps it: a residual, and what the last product adds to it."""
    base, tables = theirs.model, compile_moves(bank, ROWS)
    residual = base.embed_tokens(tokens)
    place = torch.arange(tokens.shape[1])[None]
    attend = {
        "position_embeddings": base.rotary_emb(residual, place),
        "attention_mask": torch.full((7, 7), -1e9).triu(1)[None, None],
    }
    eps = theirs.config.rms_norm_eps
    y = base.layers[0].input_layernorm(residual)
    for layer, block in enumerate(base.layers):
        last = layer + 1 == len(base.layers)
        after = base.norm if last else base.layers[layer + 1].input_layernorm
        hidden = block.self_attn(y, **attend)[0]
        residual, y = add_steer_norm(residual, hidden, block.post_attention_layernorm.weight, eps)
        steering = {"bank": bank, "tables": tables} if layer in LAYERS else {}
        residual, y = add_steer_norm(residual, block.mlp(y), after.weight, eps, **steering)
    expected = by_reference(theirs, tokens, bank)
    torch.testing.assert_close(theirs.lm_head(y), expected, atol=2e-4, rtol=1e-4)


def test_tokens_of_many_requests_are_rows_of_one_position(bank):
    """(M, D) of a serving engine: a view with a row for each token."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(4, bank.shape[1], generator=generator)
    request = [0, 0, 1, 1]  # of each token
    whole = torch.stack([x[:2], x[2:]])
    expected = steer(whole, bank, compile_moves(bank, ROWS)).flatten(0, 1)
    slot = torch.tensor(request, dtype=torch.int32)
    steer(x[:, None], bank, compile_moves(bank, ROWS), slot=slot)
    torch.testing.assert_close(x, expected)


def has_kernels() -> bool:
    """Whether Hugging Face's library is installed: our folder kernels/ passes for it in imports."""
    try:
        return bool(importlib.metadata.version("kernels"))
    except importlib.metadata.PackageNotFoundError:
        return False


def as_built(folder: Path) -> Path:
    """The package in `folder` as a repository of the Hub holds it: a variant for each backend."""
    variant = folder / "build" / "torch-cpu"
    shutil.copytree(KERNELS / "tinysteer_kernels", variant / "tinysteer_kernels")
    about = json.loads((KERNELS / "metadata.json").read_text())
    about |= {"id": "tinysteer_kernels_built", "backend": {"type": "cpu"}}
    (variant / "metadata.json").write_text(json.dumps(about))
    return folder


LAYOUTS = {"clone": lambda folder: KERNELS, "built": as_built}


@pytest.mark.skipif(not has_kernels(), reason="needs Hugging Face's kernels: pip install kernels")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_hugging_faces_kernels_library_loads_the_package(layout, bank, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from kernels import get_local_kernel

    loaded = get_local_kernel(LAYOUTS[layout](tmp_path))
    assert loaded.steer is not steer
    x = torch.zeros(1, 1, bank.shape[1])
    tables = loaded.compile_moves(bank, [[loaded.Move(1, bias=2.0)]])
    torch.testing.assert_close(loaded.steer(x, bank, tables)[0, 0], 2 * bank[1])
    names = ["tinysteer_kernels", f"tinysteer_kernels_{layout}"]
    assert all(hasattr(torch.ops, name) for name in names), "each copy has ops of its own"
    x = torch.zeros(1, 1, bank.shape[1])  # and the installed one still works beside it
    tables = compile_moves(bank, [[Move(1, bias=2.0)]])
    torch.testing.assert_close(steer(x, bank, tables)[0, 0], 2 * bank[1])
