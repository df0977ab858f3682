"""What every test may use: tiny random checkpoints of every family, and the real models."""

from device import DEVICE  # it sets what torch and triton see: first

# isort: split
import os
from pathlib import Path

import pytest
import torch
from checkpoints import VARIANTS, make_checkpoint
from lab import FORMATS, Lab
from tinysteer_kernels.devices import HAS_TRITON

import tinysteer as ts

if HAS_TRITON and DEVICE == "cpu":
    import interpreter  # noqa: F401

REAL = ("smollm2", "gemma3")
torch.set_num_threads(1)  # tiny models lose by more
collect_ignore = ["test_gpu.py"] if DEVICE == "cpu" else []


def pytest_collection_modifyitems(items):
    """Without $TINYSTEER_MODELS the real models' tests are skipped; with it none is."""
    if "TINYSTEER_MODELS" not in os.environ:
        reason = "needs the folder of shared/models/build.py's models in $TINYSTEER_MODELS"
        for item in items:
            if item.get_closest_marker("real"):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """variant's name -> (folder, transformers model), each made once."""
    made = {}

    def make(variant: str):
        if variant not in made:
            made[variant] = make_checkpoint(variant, tmp_path_factory.mktemp("model") / "tiny")
        return made[variant]

    return make


@pytest.fixture(params=VARIANTS)
def pair(request, checkpoint):
    """Our model and transformers' from one checkpoint, for each variant in turn, float32."""
    folder, theirs = checkpoint(request.param)
    return ts.load(folder, dtype="float32"), theirs


@pytest.fixture
def model(checkpoint):
    """One tiny random model, where the family does not matter."""
    return ts.load(checkpoint("llama: grouped heads")[0], dtype="float32")


@pytest.fixture(scope="session")
def lab():
    """The embedded models with their questions."""
    return Lab()


@pytest.fixture(scope="session")
def tiny(lab):
    """A small trained model, where behaviour matters: tiny-instruct, float32."""
    return lab.model


@pytest.fixture(scope="session")
def vectors(lab):
    """Vectors of tiny-instruct by the name of their instruction."""
    return {name: lab.vector(name) for name in (*FORMATS, "brief")}


def real_folder(name: str) -> Path:
    folder = Path(os.environ["TINYSTEER_MODELS"]) / name
    assert folder.is_dir(), f"$TINYSTEER_MODELS has no {name}: shared/models/build.py makes it"
    return folder


@pytest.fixture(scope="session", params=REAL)
def real_pair(request):
    """A real model, ours and transformers', float32."""
    from transformers import AutoModelForCausalLM

    folder = real_folder(request.param)
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    torch.set_num_threads(os.cpu_count() or 1)
    yield ts.load(folder, dtype="float32"), theirs.eval()
    torch.set_num_threads(1)


def pytest_collection_finish(session):
    """Modules that have processes of their own at work start them now, beside all other tests."""
    if HAS_TRITON and not session.config.option.collectonly:
        for module in {item.module for item in session.items}:
            getattr(module, "started", lambda: None)()
