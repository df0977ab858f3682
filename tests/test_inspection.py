"""The memory that is foretold, against what PyTorch allocates."""

import dataclasses
import re
import shutil

import pytest
import torch
from dispatch import Tape
from oracle import vector_for
from torch.profiler import ProfilerActivity, profile

import tinysteer as ts
from tinysteer.decoding.sampling import Sampler
from tinysteer.decoding.step import Batch, Decoding, Means
from tinysteer.inspection import footprint, inspect_file, inspect_model
from tinysteer.loading.hub import ASSETS
from tinysteer.model.decoder import Decoder

ROWS, COLUMNS, PROMPT = 6, 128, 120


def peak_of(run) -> int:
    """Bytes that live at once, at most, of what `run` allocates."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    events = seen.profiler.kineto_results.events()
    events = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return int(torch.tensor([n for _, n in events]).cumsum(0).max())


def widened(folder) -> Decoder:
    """A model large enough for its tensors to count, random, bfloat16."""
    config = ts.load(folder).config
    sizes = {"dim": 256, "hidden_dim": 1024, "vocab_size": 8000, "context_length": COLUMNS}
    decoder = Decoder(dataclasses.replace(config, **sizes)).bfloat16().requires_grad_(False)
    for parameter in decoder.parameters():
        parameter.normal_(std=0.05)
    return decoder


CASES = {
    "llama: grouped heads": ("greedy", {}),
    "gemma2": ("greedy", {}),
    "gemma3_text": ("greedy", {}),
    "llama: tied head": ("whole", {}),
    "llama: all heads": ("cut", {"top_p": 0.9}),
}


@pytest.mark.parametrize("variant", CASES)
@torch.inference_mode()
def test_memory_is_as_foretold(variant, checkpoint):
    decoder, (sampling, cuts) = widened(checkpoint(variant)[0]), CASES[variant]
    sampler = Sampler([0] * ROWS, 4, **cuts) if sampling != "greedy" else None
    expected = footprint(decoder.config, ROWS, COLUMNS, sampling=sampling)
    shape = decoder.config.n_layers, decoder.config.dim
    vector = ts.SteeringVector._from_means(torch.randn(shape), torch.zeros(shape))
    edits = [[vector.at(L).add() for L in range(shape[0])]] * ROWS
    made = []

    def decode():
        made.append(step := Decoding(decoder, ROWS, COLUMNS, Means(Tape)))
        tokens = torch.randint(3, 200, (ROWS, PROMPT))
        start = torch.zeros(ROWS, dtype=torch.long)
        step.begin(Batch(tokens, start, [4] * ROWS, sampler=sampler), edits)

    peak, step = peak_of(decode), made[0]
    assert expected.weights == sum(p.nbytes for p in decoder.parameters())
    tables = [table for pair in step.cache.tables.values() for table in pair]
    caches = (step.cache.k, step.cache.v, *(t for t in tables if len(t) == 1))
    assert expected.cache == pytest.approx(sum(t.nbytes for t in caches), rel=0.01)
    (fixed,) = step.steering.stacks.values()
    assert expected.edits == fixed.stack.packed.nbytes + fixed.bank.nbytes
    rest = expected.peak - expected.weights
    assert 0.8 * peak < rest < 1.5 * peak


def test_a_model_of_the_paper_shows_what_the_paper_used(tmp_path):
    shutil.copytree(ASSETS / "tiny-instruct", tmp_path / "Phi-3-mini-4k-instruct")
    said = inspect_model(str(tmp_path / "Phi-3-mini-4k-instruct"), None)
    assert re.search(r"^  change_case:english_capital +28 / 22$", said, re.MULTILINE)
    assert re.search(r"^  exclude +28, -100.0$", said, re.MULTILINE)
    assert "paper" not in inspect_model("tiny-instruct", None)


def test_a_file_cannot_write_lines_of_its_own_into_a_terminal_or_a_card(tmp_path, model):
    about = {"name": "<b>x</b>|\n", "note": "fine\n  layers: 99\x1b[2J", "k\ney": "long " * 999}
    vector = dataclasses.replace(vector_for(model), metadata=about)
    vector.save(tmp_path / "v.safetensors")
    shown = inspect_file(str(tmp_path / "v.safetensors"))
    assert r"note: fine\n  layers: 99\x1b[2J" in shown
    assert shown.replace("\n", "").isprintable()
    assert len(shown) < 4000
    card = vector.card("me/terse")
    assert "<b>" not in card
    assert "| note | fine layers: 99\\x1b[2J |" in card
