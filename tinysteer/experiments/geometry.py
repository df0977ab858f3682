"""What the vectors are like: similarity of states by layer (paper, figure 2), and the lens.

The lens reads a direction through the head: which tokens it speaks for (paper, appendix).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tinysteer.experiments.instructions import all_instructed
from tinysteer.experiments.intervals import mean
from tinysteer.experiments.report import Findings, Table
from tinysteer.experiments.study import Study
from tinysteer.experiments.texts import Item, of_instruction, read_items
from tinysteer.extraction import all_residuals

SHOWN = (  # as in the paper's figure, where there are pairs of them
    "change_case:english_lowercase",
    "detectable_format:json_format",
    "startend:quotation",
    "language:response_language_de",
)
MOST = 50  # pairs of an instruction
CURVES = {
    "same instruction": "other requests, the same instruction",
    "same request": "the same request, with and without the instruction",
    "neither": "other requests, no instruction",
}
TOP = 10


def pairs_of(study: Study) -> dict[str, list[Item]]:
    file = study.settings.pairs
    found = of_instruction(read_items(file) if file else study.corpus.format_items("pairs"))
    names = [name for name in SHOWN if name in found] or list(found)
    return {name: found[name][: min(MOST, study.settings.limit or MOST)] for name in names}


def curves(asked: Tensor, plain: Tensor) -> dict[str, Tensor]:
    """States with and without an instruction, (n_layers, N, D) each -> mean cosines by layer.

    As in the authors' script the means over pairs of requests include each with itself.
    """
    a, b = F.normalize(asked, dim=-1), F.normalize(plain, dim=-1)
    return {
        "same instruction": (a @ a.mT).mean((1, 2)),
        "same request": (a * b).sum(-1).mean(1),
        "neither": (b @ b.mT).mean((1, 2)),
    }


def similarity(study: Study) -> Findings:
    size, by_name = study.settings.batch_size, {}
    for name, items in pairs_of(study).items():
        states = (
            all_residuals(study.model, texts, True, size)
            for texts in ([item.prompt for item in items], [item.request for item in items])
        )
        by_name[name] = curves(*states)
    table = Table("Mean cosine of the last token's states, by layer (mean over instructions)")
    for layer in range(study.model.config.n_layers):
        cells = {c: mean([float(each[c][layer]) for each in by_name.values()]) for c in CURVES}
        table.rows.append({"layer": layer} | cells)
    data = {name: {c: each[c].tolist() for c in CURVES} for name, each in by_name.items()}
    notes = [f"{name}: {text}." for name, text in CURVES.items()]
    return Findings([table], notes, {"curves": data})


@torch.no_grad()
def top_tokens(study: Study, direction: Tensor) -> list[str]:
    """The tokens whose rows of the head, with the last norm's gain, agree most with u (D,)."""
    decoder, tokenizer = study.model.decoder, study.model.tokenizer
    head = decoder.embed.weight if decoder.config.tied else decoder.head.weight
    gain = decoder.norm.weight.float() + decoder.norm.offset
    u = direction.to(head.device).float() * gain
    best = (head.float() @ u).topk(TOP).indices.tolist()
    return [repr(tokenizer.vocabulary.decode([i], skip_special_tokens=False)) for i in best]


def lens(study: Study) -> Findings:
    """At a third, at two thirds and at the end of the model."""
    n = study.model.config.n_layers
    table = Table(f"The {TOP} tokens that a direction speaks for")
    for name, instructed in all_instructed(study, study.model).items():
        for layer in sorted({n // 3, 2 * n // 3, n - 1}):
            for what, vector in (("", instructed.vector), (", random", instructed.control)):
                tokens = top_tokens(study, vector.directions[layer])
                table.rows.append({"": name + what, "layer": layer, "tokens": " ".join(tokens)})
    return Findings([table], ["u times the last norm's gain times the head's rows."])
