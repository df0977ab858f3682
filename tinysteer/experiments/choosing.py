"""Choosing layers, or layers and weights, on validation prompts by the paper's rule (section 2)."""

from collections.abc import Hashable, Sequence
from statistics import fmean
from typing import Any

from tinysteer.evaluation.quality import perplexity
from tinysteer.evaluation.selection import LOW_PERPLEXITY, choose_layer
from tinysteer.experiments.study import Study, Trial


def choose(study: Study, trials: Sequence[Trial]) -> tuple[dict, list[dict]]:
    """-> each group's choice, and what every choice did: accuracy, and the share of spoilt texts.

    Spoilt is a text of a perplexity below LOW_PERPLEXITY to the study's reader: it repeats itself.
    The paper's reader is GPT-2, no family of ours, and allows none. Without a reader the model
    reads its own texts, finds most of them likely, and as many may be spoilt as without steering.
    """
    texts = study.answer([trial.ask for trial in trials], study.settings.validation_tokens)
    values = perplexity(study.reader or study.model, texts, batch_size=study.settings.batch_size)
    groups: dict[Hashable, dict[Any, list[tuple[bool, bool]]]] = {}
    for trial, text, value in zip(trials, texts, values, strict=True):
        result = trial.check(text), value < LOW_PERPLEXITY
        groups.setdefault(trial.group, {}).setdefault(trial.choice, []).append(result)
    chosen, rows = {}, []
    for group, choices in groups.items():
        accuracy, spoilt = (
            {choice: fmean(result[i] for result in results) for choice, results in choices.items()}
            for i in (0, 1)
        )
        chosen[group] = choose_layer(accuracy, spoilt, 0.0 if study.reader else spoilt[None])
        rows += [
            {"group": group, "choice": c, "accuracy": accuracy[c], "spoilt": spoilt[c]}
            for c in choices
        ]
    return chosen, rows
