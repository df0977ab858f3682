"""What arguments stand for: edits and directions, prompts, pairs of prompts.

Specs of edits are read in two steps: argparse reports what does not fit their grammar and gets what
reads their files, which is called when all that was asked for is known to make sense.
"""

import argparse
import os
import re
import sys
import warnings
from argparse import ArgumentTypeError
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tinysteer.decoding.generation import nearest, per_prompt
from tinysteer.loading.checkpoint import load_config
from tinysteer.loading.hub import fetch, is_embedded
from tinysteer.steering.batch import check_fit
from tinysteer.steering.edits import Direction, Edit, Where, parse_window
from tinysteer.steering.plans import VERBS, load_plan, span
from tinysteer.steering.vectors import SteeringVector
from tinysteer.text.files import read_jsonl
from tinysteer.text.messages import Form, Prompt

PLACE = r"(?P<file>.+)@(?P<first>-?\d+)(-(?P<last>\d+))?"
MOVE = r"(?P<verb>\w+)(=(?P<number>[^:]+?)(?P<unit>x?))?(:(?P<where>\w+|-?\d*,-?\d*))?"
PLACE_FORM, FORM = "FILE@LAYERS", "FILE@LAYERS:VERB[=NUMBER][:WHERE]"
# What a line of a pairs file may call its two prompts; the second is how the paper's data do.
PAIR_KEYS = (("with", "without"), ("prompt", "prompt_without_instruction"))
NUMBERS = {verb: {"": keys[0]} if keys else {} for verb, keys in VERBS.items()}  # by their unit
NUMBERS["add"] = {"x": "times", "": "weight"}
GRAMMAR = f"""\
--steer takes a plan.json, or {FORM}:
  LAYERS  12; -1, the last; or 10-20, from 10 to 20 inclusive
  VERB    {", ".join(VERBS)}
  NUMBER  of add: 1.5x, times the vector's norm (1x), or 20, times its unit direction
          of to_target, at_least and at_most: the share of the way (1)
  WHERE   all, prompt (before its last token), last (that token alone), generation (from
          it on), or FIRST,STOP, counted from it: 0,1 is last
"""


def parse_steer(spec: str) -> Callable[[], list[Edit]]:
    """A plan's file, or FORM -> what reads its edits. ArgumentTypeError."""
    if spec.endswith(".json"):
        return partial(load_plan, spec)
    match = re.fullmatch(f"{PLACE}:{MOVE}", spec)
    if not match:
        raise ArgumentTypeError(
            f"{spec!r} is not a plan.json and not {FORM}, as in v.safetensors@12:add=1.5x"
        )
    verb, number, unit, where = match.group("verb", "number", "unit", "where")
    if verb not in VERBS:
        raise ArgumentTypeError(f"{verb!r} is none of {', '.join(VERBS)}{nearest(verb, [*VERBS])}")
    if number and unit not in NUMBERS[verb]:
        raise ArgumentTypeError(f"{verb} takes no number{' with an x' * bool(unit)}")
    try:
        how: dict[str, float | Where] = {"where": parse_window(where or "all")}
        if number:
            how[NUMBERS[verb][unit]] = float(number)
    except ValueError as error:
        raise ArgumentTypeError(f"{spec!r}: {error}") from None
    return partial(read, spec, match, lambda place: getattr(place, verb)(**how))


def parse_read(spec: str) -> Callable[[], list[Direction]]:
    """PLACE_FORM -> what reads its directions. ArgumentTypeError."""
    match = re.fullmatch(PLACE, spec)
    if not match:
        raise ArgumentTypeError(f"{spec!r} is not {PLACE_FORM}, as in v.safetensors@12")
    return partial(read, spec, match, list)


def read(spec: str, match: re.Match[str], make: Callable) -> list:
    """What is made of a vector at its layers. Errors name the spec, and of its warnings the first
    is passed on: those of other layers say the same.
    """
    first, last = match["first"], match["last"]
    try:
        layers = span(int(first), int(last)) if last else [int(first)]
        place = SteeringVector.load(match["file"]).at(layers)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            made = make(place)
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(f"{spec}: {error}") from None
    for warning in told[:1]:
        warnings.warn(f"{spec}: {warning.message} (here: add=1x)", stacklevel=2)
    return made


def read_specs(specs: list[Callable[[], list]], options: argparse.Namespace) -> list:
    """What --steer or --read says, checked against the model's configuration: no weights yet."""
    values = [value for read in specs for value in read()]
    if values:
        config = load_config(fetch(options.model, options.revision, weights=False))
        edits = [v.ablate() if isinstance(v, Direction) else v for v in values]
        check_fit([edits], config.n_layers, config.dim)
    return values


def read_prompts(options: argparse.Namespace) -> list[str]:
    """The prompts, with stdin's lines where - stands. ValueError, also for what is not run."""
    for name in ("system", "continue_final"):
        if getattr(options, name) is not None and options.raw:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} needs the chat template: leave out --raw")
    prompts: list[str] = []
    for prompt in options.prompts:
        folder = os.path.isdir(prompt)  # a Path's is_dir would not take a long text
        if folder or is_embedded(prompt):
            kind = "a folder" if folder else "a model"
            raise ValueError(f"{prompt!r} is {kind}, not a prompt: as the model, write -m {prompt}")
        found = [prompt]
        if prompt == "-":
            found = [line.rstrip("\r\n") for line in sys.stdin if line.strip()]
        if not found:
            raise ValueError("there are no prompts on the standard input")
        prompts += found
    per_prompt("max_new_tokens", options.max_new_tokens, len(prompts))
    return prompts


def asked(prompts: list[str], system: str | None, begun: str | None = None) -> list[Prompt]:
    """As conversations where there is a system message, or the beginning of an answer."""
    if system is None and begun is None:
        return prompts
    first = [] if system is None else [{"role": "system", "content": system}]
    last = [] if begun is None else [{"role": "assistant", "content": begun}]
    return [[*first, {"role": "user", "content": prompt}, *last] for prompt in prompts]


def form_of(options: argparse.Namespace) -> Form:
    """How the command's prompts become tokens."""
    begun = getattr(options, "continue_final", None)
    given: Form = {"chat": not options.raw, "special_tokens": options.special_tokens}
    return {**given, "continue_final": begun not in (None, False)}


def read_pairs(path: Path) -> tuple[list[Prompt], list[Prompt]]:
    """A JSONL file -> prompts with the instruction, and without: texts, or lists of messages.

    ValueError names the line.
    """
    pairs = []
    for place, row in read_jsonl(path):
        keys = next((keys for keys in PAIR_KEYS if row.keys() >= {*keys}), None)
        if keys is None or not all(is_prompt(row[key]) for key in keys):
            raise ValueError(f'{place}: not {{"with": PROMPT, "without": PROMPT}}')
        pairs.append([row[key] for key in keys])
    if not pairs:
        raise ValueError(f"{path} holds no pairs")
    with_instruction, without = map(list, zip(*pairs, strict=True))
    return with_instruction, without


def is_prompt(value: object) -> bool:
    """A text, or a list of messages, whose insides are checked when they are formatted."""
    messages = isinstance(value, list) and bool(value) and all(isinstance(m, dict) for m in value)
    return isinstance(value, str) or messages
