"""`tinysteer reproduce EXPERIMENT -m MODEL`: its options, and what they become."""

import argparse
import dataclasses
import json
import os
from pathlib import Path

import torch

from tinysteer.experiments import EXPERIMENTS, Settings, check, reproduce
from tinysteer.language_model import LanguageModel, load
from tinysteer.loading.hub import EMBEDDED, is_embedded
from tinysteer.steering.edits import WINDOWS, parse_window

MODEL = EMBEDDED[0]


def add_parser(commands) -> None:
    one = commands.add_parser(
        "reproduce", help="an experiment of the paper, on any model, in a folder"
    )
    one.add_argument("experiment", choices=EXPERIMENTS)
    one.add_argument("positional", nargs="?", help=argparse.SUPPRESS)  # where the model stood once
    one.add_argument(
        "-m", "--model", default=MODEL, help=f"a folder, a Hub id or an embedded model ({MODEL})"
    )
    one.add_argument("--out", metavar="DIR", help="default: EXPERIMENT-MODEL; resumed if there")
    one.add_argument("--limit", type=int, metavar="N", help="test prompts, at most")
    one.add_argument("--prompts", metavar="JSONL", help="test prompts in place of the built-in")
    one.add_argument("--pairs", metavar="JSONL", help="pairs for formats, likewise")
    one.add_argument("--source", metavar="MODEL", help="of vectors: for transfer, length, words")
    one.add_argument("--reader", metavar="MODEL", help="to whose perplexity a text is spoilt")
    one.add_argument("--layers", metavar="JSON", help="a summary.json whose layers to take")
    one.add_argument("--layer", type=int, metavar="L", help="for lengths and words")
    one.add_argument("--weights", type=float, nargs="+", metavar="W", help="to sweep, likewise")
    one.add_argument("--where", help=f"{', '.join(WINDOWS)} or FIRST,STOP (all; embedded: 0,1)")
    one.add_argument("--validation", type=int, metavar="N", help="prompts a choice (8)")
    one.add_argument("--validation-tokens", type=int, metavar="N", help="256 (embedded: 112)")
    one.add_argument("--step", type=int, help="between the layers tried (2; embedded: 1)")
    one.add_argument(
        "--max-new-tokens", type=int, metavar="N", help="the paper's 1024 or 2048 (embedded: 112)"
    )
    one.add_argument("--batch-size", type=int, metavar="N", help="prompts together (32)")
    one.add_argument("--dtype", help="float32, bfloat16 or float16 (default: as stored)")
    one.add_argument("--device", help="such as cpu or cuda (default: the GPU if there is one)")
    add_threads(one)
    one.set_defaults(run=run)


def add_threads(one: argparse.ArgumentParser) -> None:
    one.add_argument(
        "--threads",
        type=positive,
        metavar="N",
        help="of the CPU (default: $OMP_NUM_THREADS; without it 1 for a small model, else all)",
    )


def positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, 1 or more")
    return int(text)


def use_threads(n: int | None, *models: LanguageModel) -> None:
    """So many; by default one where small models run on a CPU: on a busy machine two, which wait
    for each other by spinning, take ten times the processor's time.
    """
    if n is None and "OMP_NUM_THREADS" not in os.environ:
        small = all(model.config.dim < 512 and model.device.type == "cpu" for model in models)
        n = 1 if small else None
    if n is not None:
        torch.set_num_threads(n)


def run(options: argparse.Namespace) -> None:
    if options.positional:
        raise ValueError(
            f"reproduce takes its model by -m: "
            f"tinysteer reproduce {options.experiment} -m {options.positional}"
        )
    names = {"model": options.model, "reader": options.reader, "source": options.source}
    embedded = is_embedded(options.model) and is_embedded(options.source or options.model)
    check(options.experiment, bool(options.source), embedded)
    fields = {field.name for field in dataclasses.fields(Settings)}
    chosen = {k: v for k, v in vars(options).items() if k in fields and v is not None}
    readers = {"layers": read_layers, "weights": tuple, "where": parse_window}
    settings = Settings(**{k: readers[k](v) if k in readers else v for k, v in chosen.items()})
    models = {k: load(name, options.dtype, options.device) for k, name in names.items() if name}
    use_threads(options.threads, *models.values())
    out = options.out or f"{options.experiment}-{Path(options.model).name}"
    print(reproduce(options.experiment, out=out, settings=settings, **models), end="")


def read_layers(path: str) -> dict[str, dict[str, int | None]]:
    """The layers that a run of `format` chose: of each setting, by instruction."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))["data"]["layers"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a summary.json of `reproduce format` ({error})") from None
