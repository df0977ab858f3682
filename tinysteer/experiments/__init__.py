"""The experiments of Stolfo et al. (ICLR 2025), one command each, on any supported model.

tinysteer reproduce EXPERIMENT -m MODEL --out FOLDER
"""

import importlib.util
import time
from collections.abc import Mapping
from pathlib import Path

from tinysteer.evaluation.quality import JUDGES, Judge
from tinysteer.experiments import formats, geometry, length, multi, words
from tinysteer.experiments.report import examples, quality, write
from tinysteer.experiments.study import Settings, Study
from tinysteer.experiments.texts import corpus_for
from tinysteer.language_model import LanguageModel

EXPERIMENTS = {
    "format": formats.run,
    "length": length.run,
    "words": words.run,
    "multi": multi.run,
    "transfer": formats.run,
    "similarity": geometry.similarity,
    "lens": geometry.lens,
}
EXTRA = ("langdetect", "nltk", "punkt")  # by which languages are told, and sentences counted


def check(experiment: str, source: bool, embedded: bool) -> None:
    """ValueError for what lacks something, before models are loaded, or anything is run.

    source: whether vectors come from elsewhere; embedded: whether by the embedded models alone.
    """
    if experiment not in EXPERIMENTS:
        raise ValueError(f"{experiment!r} is not an experiment: {', '.join(EXPERIMENTS)}")
    if experiment == "transfer" and not source:
        raise ValueError("transfer needs the model that vectors come from: --source MODEL")
    if source and experiment not in ("transfer", "length", "words"):
        raise ValueError(f"{experiment} takes no vectors from elsewhere: leave out the source")
    needs_extra = experiment in ("format", "multi", "transfer", *([] if embedded else ["length"]))
    missing = [name for name in EXTRA if needs_extra and not importlib.util.find_spec(name)]
    if missing:
        raise ValueError(f'{experiment} needs {missing[0]}: pip install "tinysteer[eval]"')


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
    quality, by name. ValueError as `check`, and for a folder that holds another run.
    """
    check(experiment, source is not None, not corpus_for(model, source or model).sentences)
    began = time.perf_counter()
    study = Study(experiment, model, Path(out), settings or Settings(), reader, source)
    findings = EXPERIMENTS[experiment](study)
    findings.notes += dict.fromkeys(study.notes)
    findings.tables += quality(study, judges)
    seconds = time.perf_counter() - began
    return write(study.out, findings, study.about, seconds, examples(study))
