"""What the vectors are like: similarity of states by layer (paper, figure 2), and the lens.

The lens reads a direction through the head: which tokens it speaks for (paper, appendix).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tinysteer.experiments.formats import read_pairs, vectors_of
from tinysteer.experiments.report import Findings, mean, table_of
from tinysteer.experiments.study import Study
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


def curves(asked: Tensor, plain: Tensor) -> dict[str, list[float]]:
    """States with and without an instruction, (n_layers, N, D) each -> mean cosines by layer.

    As in the authors' script the means over pairs of requests include each with itself.
    """
    a, b = F.normalize(asked, dim=-1), F.normalize(plain, dim=-1)
    return {
        "same instruction": (a @ a.mT).mean((1, 2)).tolist(),
        "same request": (a * b).sum(-1).mean(1).tolist(),
        "neither": (b @ b.mT).mean((1, 2)).tolist(),
    }


def similarity(study: Study) -> Findings:
    pairs, size, by_name = read_pairs(study), study.settings.batch_size, {}
    for name in [name for name in SHOWN if name in pairs] or pairs:
        items = pairs[name][: min(MOST, study.settings.limit or MOST)]
        texts = [item.prompt for item in items], [item.request for item in items]
        ids = (study.model.prompt_ids(side) for side in texts)
        by_name[name] = curves(*(all_residuals(study.model, side, size) for side in ids))
    cells = {
        (layer, curve): mean([each[curve][layer] for each in by_name.values()])
        for layer in range(study.model.config.n_layers)
        for curve in CURVES
    }
    title = "Mean cosine of the last token's states, by layer (mean over instructions)"
    notes = [f"{name}: {text}." for name, text in CURVES.items()]
    return Findings([table_of(title, cells, "layer")], notes, {"curves": by_name})


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
    rows = []
    for name, (own, control) in vectors_of(study, study.model).items():
        for layer in sorted({n // 3, 2 * n // 3, n - 1}):
            for what, vector in (("", own), (", random", control)):
                tokens = top_tokens(study, vector.directions[layer])
                rows.append({"": name + what, "layer": layer, "tokens": " ".join(tokens)})
    table = {"title": f"The {TOP} tokens that a direction speaks for", "rows": rows}
    return Findings([table], ["u times the last norm's gain times the head's rows."])
