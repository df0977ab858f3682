"""The experiments of Stolfo et al. (ICLR 2025), one command each, on any supported model.

tinysteer reproduce EXPERIMENT MODEL --out FOLDER
"""

import importlib.util
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from tinysteer.experiments import format, geometry, length, multi, transfer, words
from tinysteer.experiments.pictures import draw
from tinysteer.experiments.report import Findings, quality
from tinysteer.experiments.study import Settings, Study
from tinysteer.language_model import LanguageModel
from tinysteer.quality import JUDGES, Judge

EXPERIMENTS: dict[str, Callable[[Study], Findings]] = {
    "format": format.run,
    "length": length.run,
    "words": words.run,
    "multi": multi.run,
    "transfer": transfer.run,
    "similarity": geometry.similarity,
    "lens": geometry.lens,
}


def reproduce(
    experiment: str,
    model: LanguageModel,
    out: str | Path,
    settings: Settings | None = None,
    judge: LanguageModel | None = None,
    source: LanguageModel | None = None,
    judges: Mapping[str, Judge] = JUDGES,
) -> str:
    """Run an experiment -> its report; answers, summary and pictures are in the folder `out`.

    A run that was stopped goes on where it was. judge: whose perplexity tells spoilt texts when
    layers are chosen (the paper: GPT-2); default the model itself. source: where vectors come from
    in "transfer". judges: what is said of the answers' quality, by name. ValueError for what is no
    experiment, for a folder that holds another run, and for extras that are missing: before
    anything is run.
    """
    if experiment not in EXPERIMENTS:
        raise ValueError(f"{experiment!r} is no experiment: {', '.join(EXPERIMENTS)}")
    if experiment not in ("similarity", "lens"):
        missing = [m for m in ("langdetect", "nltk", "punkt") if not importlib.util.find_spec(m)]
        if missing:
            raise ValueError(
                f"{experiment} checks languages and counts sentences, without {missing[0]}: "
                'pip install "tinysteer[eval]"'
            )
    began = time.perf_counter()
    study = Study(experiment, model, Path(out), settings or Settings(), judge, source)
    findings = EXPERIMENTS[experiment](study)
    findings.tables += quality(study, judges)
    report = findings.write(study.out, study.about, time.perf_counter() - began)
    if importlib.util.find_spec("matplotlib"):
        draw(findings, study.out)
    return report
