"""What a caller has set in PyTorch, its default device and autocast, changes no result."""

import pytest
import torch
from checkpoints import VARIANTS
from dispatch import Tape

import tinysteer as ts
from tinysteer.decoding.pool import DecodingPool
from tinysteer.model.decoder import Decoder, nearest

PROMPTS = ["short", "a somewhat longer prompt", "x"]
OTHERS = ["shorter", "another prompt, longer", "y"]
OPTIONS = {"chat": False, "max_new_tokens": 8}
IDS = torch.tensor([[1, 5, 6, 7], [9, 8, 7, 6]])
DRAWN = {"temperature": 1.5, "seed": [3, 1, 4]}


def vector(model) -> ts.SteeringVector:
    shape = model.config.n_layers, model.config.dim
    states = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    return ts.SteeringVector._from_means(states, torch.zeros(shape, device="cpu"))


def edits(model) -> list[ts.Edit]:
    v = vector(model)
    return [v.at(1).add(weight=6.0), v.at(2).to_target(target=3.0), v.at(2).ablate(where=(1, 3))]


def extracted(model, **options):
    v = ts.extract(model, PROMPTS, OTHERS, chat=False, **options)
    return v.directions, v.norms, v.targets, v.baselines


def explained(model, steer=None):
    (one, *_) = model.explain(PROMPTS, steer, max_new_tokens=3, chat=False)
    return str(one), one.d.nan_to_num(-1.0)


def captured(model, steer=None, **options):
    model.pool = DecodingPool(model.decoder, capture=Tape)
    texts = model.complete(PROMPTS, steer, **OPTIONS, **options)
    model.pool = DecodingPool(model.decoder)
    return texts


def sliding(model):
    """Other layers, and of a captured step other numbers alone."""
    v = vector(model)
    weights = captured(model, lambda n: [v.at(1).add(weight=1.0 * n)])
    layers = model.stream(PROMPTS, lambda n: [v.at(1 + n // 4).add(weight=1.0 * n)], **OPTIONS)
    return weights, [*layers]


VERBS = {
    "complete": lambda m: m.complete(PROMPTS, **OPTIONS),
    "complete, steered": lambda m: m.complete(PROMPTS, edits(m), **OPTIONS),
    "complete, drawn": lambda m: m.complete(PROMPTS, **OPTIONS, **DRAWN),
    "complete, drawn and cut": lambda m: m.complete(PROMPTS, **OPTIONS, **DRAWN, top_p=0.9),
    "complete, captured": lambda m: captured(m, edits(m)),
    "complete, captured and drawn": lambda m: captured(m, **DRAWN),
    "stream, edits change": sliding,
    "logits": lambda m: m.logits(IDS, edits(m)),
    "residuals": lambda m: m.residuals(IDS, edits(m)),
    "explain": explained,
    "explain, steered": lambda m: explained(m, edits(m)),
    "extract": extracted,
    "extract, pca": lambda m: extracted(m, method="pca"),
    "random_like": lambda m: vector(m).random_like(3).directions,
    "a sum": lambda m: (vector(m) + vector(m).random_like(3)).directions,
}
SURROUNDINGS = {
    "another default device": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}
SOME = ["llama: grouped heads", "gemma2", "phi3: longrope, long text"]


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize("surroundings", SURROUNDINGS)
@pytest.mark.parametrize("variant", SOME)
def test_surroundings_change_no_result(variant, surroundings, checkpoint):
    folder = checkpoint(next(name for name in VARIANTS if name == variant))[0]
    model = ts.load(folder, dtype="float32")
    expected = {name: verb(model) for name, verb in VERBS.items()}
    nearest.cache_clear()
    with SURROUNDINGS[surroundings]():
        loaded = ts.load(folder, dtype="float32", device="cpu")
        for name, verb in VERBS.items():
            assert same(verb(model), expected[name]), name
            assert same(verb(loaded), expected[name]), f"{name}, of a model loaded here"


def test_vectors_are_written_and_read_as_ever(model, tmp_path):
    v = vector(model)
    with torch.device("meta"):
        v.save(tmp_path / "v.gguf")
        v.save(tmp_path / "v.safetensors")
        read = ts.SteeringVector.load(tmp_path / "v.safetensors")
    assert torch.equal(read.directions, v.directions)
    assert torch.equal(read.targets, v.targets)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_rounded_number_multiplies_as_a_tensor_of_the_type_does(dtype):
    x = torch.randn(1000).to(dtype)
    for scale in (48.0, 1152**0.5, 640**0.5, 1.0):
        assert torch.equal(x * nearest(scale, dtype), x * torch.tensor(scale, dtype=dtype))


@torch.no_grad()
@pytest.mark.parametrize("variant", SOME)
def test_columns_rounded_up_as_on_a_gpu_change_no_text(variant, checkpoint, monkeypatch):
    ours = ts.load(checkpoint(variant)[0], dtype="float32")
    verbs = [name for name in VERBS if "complete" in name or "stream" in name]
    texts = {name: VERBS[name](ours) for name in verbs}
    states = extracted(ours)[2]
    widths, prefill = [], Decoder.prefill
    told = lambda self, x, *a: (widths.append(x.shape[1]), prefill(self, x, *a))[1]  # noqa: E731
    monkeypatch.setattr(Decoder, "prefill", told)
    monkeypatch.setattr(Decoder, "multiple", 64)
    assert {name: VERBS[name](ours) for name in verbs} == texts
    torch.testing.assert_close(extracted(ours)[2], states, atol=1e-4, rtol=1e-4)
    assert {*widths} == {64}
