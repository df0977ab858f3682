"""Activation steering: make a language model follow an instruction by adding vectors to its
residual stream (Stolfo et al., ICLR 2025).

    model = load("HuggingFaceTB/SmolLM2-135M-Instruct")
    vector = extract(model, with_instruction, without)
    model.complete("What is an owl?", steer=[vector.at(15).add()])
"""

import warnings

with warnings.catch_warnings():  # torch warns where numpy is missing; nothing here needs it
    warnings.filterwarnings("ignore", "Failed to initialize NumPy")
    import torch  # noqa: F401

from tinysteer.decoding.explanation import Explanation
from tinysteer.extraction import extract
from tinysteer.language_model import LanguageModel, load
from tinysteer.steering.edits import Direction, Edit
from tinysteer.steering.plans import load_plan
from tinysteer.steering.vectors import SteeringVector
from tinysteer.text.streaming import Answer
from tinysteer.version import VERSION

__version__ = VERSION

__all__ = [
    "Answer",
    "Direction",
    "Edit",
    "Explanation",
    "LanguageModel",
    "SteeringVector",
    "__version__",
    "extract",
    "load",
    "load_plan",
]
