"""The experiments of Stolfo et al. (ICLR 2025), one command each, on any supported model.

tinysteer reproduce EXPERIMENT -m MODEL --out FOLDER
"""

import importlib.util
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from tinysteer.evaluation.quality import JUDGES, Judge
from tinysteer.experiments import formats, geometry, length, multi, transfer, words
from tinysteer.experiments.corpus import corpus_for
from tinysteer.experiments.pictures import draw
from tinysteer.experiments.report import Findings, quality
from tinysteer.experiments.study import Settings, Study
from tinysteer.language_model import LanguageModel

EXPERIMENTS: dict[str, Callable[[Study], Findings]] = {
    "format": formats.run,
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
    reader: LanguageModel | None = None,
    source: LanguageModel | None = None,
    judges: Mapping[str, Judge] = JUDGES,
) -> str:
    """Run an experiment -> its report; answers, summary and pictures are in the folder `out`.

    A run that was stopped goes on where it was. reader: to whose perplexity a text is spoilt when
    layers are chosen, and is judged after; default the model itself, and not judged. source: where
    vectors come from in "transfer", "length" and "words". judges: what is said of the answers'
    quality, by name. ValueError for what is not an experiment, for a folder that holds another run,
    and for extras that are missing: before anything is run.
    """
    if experiment not in EXPERIMENTS:
        raise ValueError(f"{experiment!r} is not an experiment: {', '.join(EXPERIMENTS)}")
    counts = experiment == "length" and corpus_for(model, source or model).sentences
    if experiment in ("format", "multi", "transfer") or counts:
        missing = [m for m in ("langdetect", "nltk", "punkt") if not importlib.util.find_spec(m)]
        if missing:
            raise ValueError(
                f"{experiment} checks languages and counts sentences, without {missing[0]}: "
                'pip install "tinysteer[eval]"'
            )
    began = time.perf_counter()
    if source and experiment not in ("transfer", "length", "words"):
        raise ValueError(f"{experiment} takes no vectors from elsewhere: leave out the source")
    if experiment == "transfer" and source is None:
        raise ValueError("transfer needs the model that vectors come from: --source MODEL")
    study = Study(experiment, model, Path(out), settings or Settings(), reader, source)
    findings = EXPERIMENTS[experiment](study)
    findings.notes += dict.fromkeys(study.notes)
    findings.tables += quality(study, judges)
    report = findings.write(study.out, study.about, time.perf_counter() - began)
    if importlib.util.find_spec("matplotlib"):
        draw(findings, study.out)
    return report
