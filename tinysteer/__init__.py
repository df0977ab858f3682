"""Activation steering: make a language model follow an instruction by adding vectors to its
residual stream (Stolfo et al., ICLR 2025).

    model = load("HuggingFaceTB/SmolLM2-135M-Instruct")
    vector = extract(model, with_instruction, without)
    model.complete(prompts, steer=[vector.at(15).add()])
"""

import warnings

with warnings.catch_warnings():  # torch warns where numpy is missing; nothing here needs it
    warnings.filterwarnings("ignore", "Failed to initialize NumPy")
    import torch  # noqa: F401

from tinysteer.checkpoint import load
from tinysteer.config import Config, Layer
from tinysteer.edits import Direction, Edit
from tinysteer.explanation import Explanation
from tinysteer.extraction import MeanResiduals, extract, mean_residuals
from tinysteer.generation import Options
from tinysteer.language_model import LanguageModel
from tinysteer.plan import load_plan
from tinysteer.rope import Rope
from tinysteer.tokenizer import Tokenizer
from tinysteer.vectors import SteeringVector
from tinysteer.version import VERSION

__version__ = VERSION

__all__ = [
    "Config",
    "Direction",
    "Edit",
    "Explanation",
    "LanguageModel",
    "Layer",
    "MeanResiduals",
    "Options",
    "Rope",
    "SteeringVector",
    "Tokenizer",
    "__version__",
    "extract",
    "load",
    "load_plan",
    "mean_residuals",
]
