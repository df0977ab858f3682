"""What tests hold results against: the same edits by forward hooks on a transformers model."""

import contextlib

import torch

import tinysteer as ts


def layers_of(model) -> torch.nn.ModuleList:
    """The decoder blocks of a transformers model."""
    base = model.model
    return (base.language_model if hasattr(base, "language_model") else base).layers


def hook(edits):
    """What a forward hook on a block's output does for one list of edits, all positions."""

    def edit_output(module, args, output):
        h = output[0] if isinstance(output, tuple) else output
        for edit in edits:
            u = edit.direction.to(h)
            d = edit.move.bias - edit.move.slope * (h @ u)
            h = h + d.clamp(edit.move.low, edit.move.high)[..., None] * u
        return (h, *output[1:]) if isinstance(output, tuple) else h

    return edit_output


@contextlib.contextmanager
def hooked(model, edits):
    """Inside, the transformers model runs with one prompt's edits, in order, at their layers."""
    handles = [
        layers_of(model)[layer].register_forward_hook(hook([e for e in edits if e.layer == layer]))
        for layer in {edit.layer for edit in edits}
    ]
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def last_states(model, prompts) -> torch.Tensor:
    """The last token's state after every block, one prompt of ids at a time: (n, n_layers, D)."""
    states = []

    def keep(module, args, output):
        states.append((output[0] if isinstance(output, tuple) else output)[0, -1])

    handles = [block.register_forward_hook(keep) for block in layers_of(model)]
    n = len([model(torch.tensor([ids])) for ids in prompts])
    for handle in handles:
        handle.remove()
    return torch.stack(states).unflatten(0, (n, -1))


@torch.no_grad()
def greedy_ids(model, ids: list[int], edits, n_tokens: int) -> list[int]:
    """Greedy tokens of a transformers model under edits, the whole prefix run each time."""
    with hooked(model, edits):
        for _ in range(n_tokens):
            ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
    return ids[-n_tokens:]


@torch.no_grad()
def would_say(model, prompt: list[int], answer: list[int], edits=()) -> list[int]:
    """What greedy decoding of a transformers model, under edits, says where `answer` is right.

    The likeliest token after the prompt and after each token of the answer, in one pass: equal to
    the answer, token by token, just when decoding would have given it. One more than the answer.
    """
    with hooked(model, edits):
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 :]
    return logits.argmax(-1).tolist()


def vector_for(model, seed: int = 0) -> ts.SteeringVector:
    """Random directions, long enough to change what a random model says."""
    generator = torch.Generator().manual_seed(seed)
    shape = model.config.n_layers, model.config.dim
    without = torch.randn(shape, generator=generator)
    return ts.SteeringVector._from_means(without + torch.randn(shape, generator=generator), without)
