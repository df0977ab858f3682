"""How good a text is, whether or not it follows: perplexity, repetition, and judges.

A judge is a function of a prompt and its response. The paper asks GPT-4o five questions about each
response; any function will do in its place.
"""

from collections.abc import Callable, Mapping, Sequence

import torch

from tinysteer.decoding.scoring import logprobs_of
from tinysteer.language_model import LanguageModel
from tinysteer.model.cache import Cache
from tinysteer.text.tokenizer import pad

WINDOW = 1024  # tokens of a text that count, its last ones (paper)

Judge = Callable[[str, str], float]


@torch.no_grad()
def perplexity(judge: LanguageModel, texts: Sequence[str], *, batch_size: int = 32) -> list[float]:
    """exp of the mean negative log-likelihood of each text's last WINDOW tokens under a model.

    Of the texts alone, without a prompt. A text of fewer than two tokens has none to predict,
    and counts as 1 (paper).
    """
    window = min(WINDOW, judge.config.context_length)
    ids = [judge.tokenizer.encode(text)[-window:] for text in texts]
    values = [1.0] * len(ids)
    order = sorted((i for i in range(len(ids)) if len(ids[i]) > 1), key=lambda i: len(ids[i]))
    for at in range(0, len(order), batch_size):
        batch = order[at : at + batch_size]
        tokens, start = pad([ids[i] for i in batch])
        tokens = tokens.to(judge.device)
        cache = Cache(judge.decoder, start, tokens.shape[1], tokens.shape[1])
        states = judge.decoder(tokens, cache)
        losses = -logprobs_of(judge.decoder, states[:, :-1], tokens[:, 1:])  # (B, T - 1)
        for row, i in enumerate(batch):
            values[i] = losses[row, int(start[row]) :].mean().exp().item()
    return values


def repetition(text: str, n: int = 3) -> float:
    """The share of a text's runs of n words that stood there before: 0 where none recurs."""
    return 1 - distinct(text, n)


def distinct(text: str, n: int = 2) -> float:
    """The share of different runs of n words among all (distinct-n); 1 for a text too short."""
    words = text.lower().split()
    runs = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return len(set(runs)) / len(runs) if runs else 1.0


def perplexity_under(model: LanguageModel) -> Judge:
    """A judge: how surprising the response is to a model, by itself (see `perplexity`)."""

    def judge(prompt: str, response: str) -> float:
        return perplexity(model, [response])[0]

    return judge


JUDGES: Mapping[str, Judge] = {
    "repetition": lambda prompt, response: repetition(response),
    "distinct-2": lambda prompt, response: distinct(response),
}


def judged(
    prompts: Sequence[str], responses: Sequence[str], judges: Mapping[str, Judge] = JUDGES
) -> dict[str, list[float]]:
    """Each judge's value for each response."""
    return {
        name: [judge(p, r) for p, r in zip(prompts, responses, strict=True)]
        for name, judge in judges.items()
    }
