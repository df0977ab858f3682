"""The command line: a demo; extract a vector, generate with it, explain it, inspect it.

Exit codes: 0; 1 for what the user can mend, with one sentence on stderr; 2 for usage.
"""

import argparse
import json
import os
import sys
import warnings
from pathlib import Path

import torch

from tinysteer.decoding.generation import nearest, per_prompt, settled
from tinysteer.demo.show import run_demo
from tinysteer.experiments import command
from tinysteer.extraction import METHODS, extract
from tinysteer.inspection import inspect_file, inspect_model
from tinysteer.language_model import LanguageModel, load
from tinysteer.loading.hub import EMBEDDED
from tinysteer.specs import (
    FORM,
    GRAMMAR,
    PLACE_FORM,
    asked,
    form_of,
    parse_read,
    parse_steer,
    read_pairs,
    read_prompts,
    read_specs,
)
from tinysteer.text.messages import STRANGERS
from tinysteer.text.streaming import Answer
from tinysteer.version import VERSION

MODEL = EMBEDDED[0]
EXAMPLES = """\
examples:
  tinysteer generate "What is an owl?"
  tinysteer extract pairs.jsonl -o brief.safetensors
  tinysteer generate "What is an owl?" --steer brief.safetensors@4:add
  tinysteer demo
"""


class Parser(argparse.ArgumentParser):
    """One that asks whether the nearest option, command or choice was meant."""

    def parse_known_args(self, args=None, namespace=None):
        known, unknown = super().parse_known_args(args, namespace)
        if unknown:
            meant = nearest(unknown[0].partition("=")[0], [*self._option_string_actions])
            self.error(f"unrecognized arguments: {' '.join(unknown)}{meant}")
        return known, unknown

    def _check_value(self, action, value):
        if action.choices is not None and value not in action.choices:
            names = [*action.choices]
            meant = f"{value!r} is none of {', '.join(names)}{nearest(value, names)}"
            raise argparse.ArgumentError(action, meant)


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    for stream in (sys.stdin, sys.stdout):  # Windows' pipes have another encoding
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8")
    warnings.showwarning = lambda message, *_: print(f"tinysteer: {message}", file=sys.stderr)
    try:
        options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        print(f"tinysteer: {error}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        if "allocate" not in str(error) and not isinstance(error, torch.OutOfMemoryError):
            raise
        print(
            "tinysteer: out of memory: lower --batch-size or --max-new-tokens, or pass "
            "--dtype bfloat16",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def parser() -> argparse.ArgumentParser:
    top = Parser(
        prog="tinysteer",
        description="Steer language models by adding vectors to their activations.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("-V", "--version", action="version", version=f"tinysteer {VERSION}")
    top.set_defaults(run=lambda options: top.print_help())
    commands = top.add_subparsers(metavar="COMMAND")

    model = argparse.ArgumentParser(add_help=False)
    model.add_argument(
        "-m",
        "--model",
        default=MODEL,
        help=f"a folder, or a Hub id such as owner/name (default: {MODEL}, which is embedded)",
    )
    model.add_argument("--dtype", help="float32, bfloat16 or float16 (default: as stored)")
    model.add_argument("--device", help="such as cpu or cuda (default: the GPU if there is one)")
    model.add_argument("--revision", help="a branch, tag or commit on the Hub")
    command.add_threads(model)
    model.add_argument("--raw", action="store_true", help="take prompts as they are, no template")
    model.add_argument(
        "--special-tokens",
        choices=STRANGERS,
        default=STRANGERS[0],
        help="where a prompt holds special tokens (warn)",
    )

    steered = argparse.ArgumentParser(add_help=False)
    steered.add_argument(
        "prompts", metavar="PROMPT", nargs="+", help="- stands for the lines of stdin"
    )
    steered.add_argument(
        "--steer",
        metavar="SPEC",
        action="append",
        type=parse_steer,
        default=[],
        help=f"a plan.json, or {FORM}, see below; repeat for several edits, in order",
    )
    steered.add_argument("--system", metavar="TEXT", help="a system message before each prompt")
    steered.add_argument("--continue-final", metavar="TEXT", help="how each answer begins")

    one = commands.add_parser(
        "demo", help="steer the embedded model: a text and a table, in half a minute"
    )
    one.add_argument("--json", action="store_true", help="print everything as one JSON object")
    command.add_threads(one)
    one.set_defaults(run=lambda options: run_demo(options.json, options.threads))

    one = commands.add_parser(
        "extract", parents=[model], help="pairs of prompts in, a steering vector out"
    )
    one.add_argument(
        "pairs",
        metavar="PAIRS.jsonl",
        help='one {"with": PROMPT, "without": PROMPT} a line: with the instruction, without it',
    )
    one.add_argument("-o", "--output", required=True, metavar="V.safetensors")
    one.add_argument("--method", choices=METHODS, default="mean", help="mean (default) or pca")
    one.add_argument(
        "--name", default="", help="what to call the vector (default: the file's name)"
    )
    one.add_argument("--batch-size", type=int, default=16, help="prompts run together (16)")
    one.add_argument(
        "--continue-final",
        action="store_true",
        help="the pairs' conversations end in answers begun",
    )
    one.set_defaults(run=run_extract)

    both = {"parents": [model, steered], "epilog": GRAMMAR, "formatter_class": top.formatter_class}
    one = commands.add_parser("generate", **both, help="answer prompts, steered")
    one.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="at most (128)")
    one.add_argument("--temperature", type=float, default=0.0, help="0 (default) is greedy")
    one.add_argument("--top-k", type=int, help="draw from so many tokens, with a temperature")
    one.add_argument("--top-p", type=float, help="from the fewest with this share, likewise")
    one.add_argument("--min-p", type=float, help="from those this near the likeliest, likewise")
    one.add_argument("--seed", type=int, help="of the draws")
    one.add_argument("--batch-size", type=int, default=32, help="prompts run together (32)")
    one.add_argument("--stop", action="append", default=[], help="a string that ends the text")
    one.add_argument("--compare", action="store_true", help="answer without edits and with")
    output = one.add_mutually_exclusive_group()
    output.add_argument("--stream", action="store_true", help="print text as it comes")
    output.add_argument("--json", action="store_true", help="print one JSON object a prompt")
    one.set_defaults(run=run_generate)

    one = commands.add_parser("explain", **both, help="what edits do, token by token")
    one.add_argument(
        "--read",
        metavar=PLACE_FORM,
        action="append",
        type=parse_read,
        default=[],
        help="read a vector's directions off every token, without the edits; repeat for several",
    )
    one.add_argument("--max-new-tokens", type=int, default=0, metavar="N", help="go on so far (0)")
    one.add_argument("--json", action="store_true", help="print one JSON object a prompt")
    one.set_defaults(run=run_explain)

    one = commands.add_parser("inspect", help="what a vector file or a model holds")
    what = one.add_mutually_exclusive_group()
    what.add_argument("what", metavar="FILE_OR_MODEL", nargs="?", help=f"default: {MODEL}")
    what.add_argument("-m", "--model", default=MODEL, help="a model alone")
    one.add_argument("--revision", help="a branch, tag or commit on the Hub")
    one.set_defaults(run=run_inspect)
    command.add_parser(commands)
    return top


def load_model(options: argparse.Namespace) -> LanguageModel:
    model = load(options.model, options.dtype, options.device, options.revision)
    command.use_threads(options.threads, model)
    return model


def run_extract(options: argparse.Namespace) -> None:
    settled({"batch_size": options.batch_size})
    with_instruction, without = read_pairs(Path(options.pairs))
    output = Path(options.output).absolute()
    if output.is_dir() or not output.parent.is_dir():
        kind = "is a folder" if output.is_dir() else "lies in no folder"
        raise FileNotFoundError(f"{options.output} {kind}: -o names the file to write")
    if output.exists() and output.samefile(options.pairs):
        raise ValueError(f"-o {options.output} would overwrite the pairs")
    if not os.access(output if output.exists() else output.parent, os.W_OK):
        raise PermissionError(f"{options.output} cannot be written")
    vector = extract(
        load_model(options),
        with_instruction,
        without,
        method=options.method,
        name=options.name or output.stem,
        batch_size=options.batch_size,
        **form_of(options),
    )
    vector.save(options.output)
    print(f"{options.output}: {vector}")


def run_generate(options: argparse.Namespace) -> None:
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "stop")
    settings = {name: getattr(options, name) for name in (*names, "batch_size")}
    settings |= form_of(options)
    settled(settings)  # refuses what is out of range before anything is loaded, as below
    per_prompt("seed", options.seed, 1)
    if options.compare and options.stream:
        raise ValueError("--compare shows whole answers: leave out --stream")
    if options.compare and not options.steer:
        raise ValueError("--compare needs --steer: without edits both answers are the same")
    prompts, steer = read_prompts(options), read_specs(options.steer, options)
    model, questions = load_model(options), asked(prompts, options.system, options.continue_final)
    heading = "\n> {}\n" if len(prompts) > 1 else ""
    if options.stream:
        for prompt, question in zip(prompts, questions, strict=True):
            print(heading.format(prompt), end="")
            for _, piece in model.stream([question], steer, **settings):
                print(piece, end="", flush=True)
            print()
        return
    ways = {"plain": [], "steered": steer} if options.compare else {"": steer}
    rows = [question for question in questions for _ in ways]
    answers = iter(model.generate(rows, [*ways.values()] * len(questions), **settings))
    for prompt in prompts:
        own = {way: next(answers) for way in ways}
        print(as_json(prompt, own) if options.json else heading.format(prompt) + as_text(own))


def as_json(prompt: str, answers: dict[str, Answer]) -> str:
    said = {way: {"completion": a.text, "reason": a.reason} for way, a in answers.items()}
    return json.dumps({"prompt": prompt, **said.get("", said)}, ensure_ascii=False)


def as_text(answers: dict[str, Answer]) -> str:
    """One below the other, lines of a text below its first."""
    lines = []
    for way, answer in answers.items():
        label = f"{way}:".ljust(9) if way else ""
        lines.append(label + answer.text.replace("\n", "\n" + " " * len(label)))
    return "\n".join(lines)


def run_explain(options: argparse.Namespace) -> None:
    prompts = read_prompts(options)
    steer, read = (read_specs(specs, options) for specs in (options.steer, options.read))
    settings = {"max_new_tokens": options.max_new_tokens, "read": read, **form_of(options)}
    questions = asked(prompts, options.system, options.continue_final)
    rows = load_model(options).explain(questions, steer, **settings)
    for prompt, row in zip(prompts, rows, strict=True):
        if options.json:
            print(json.dumps({"prompt": prompt, **row.as_dict()}, ensure_ascii=False))
        else:
            print(f"> {prompt}\n{row}\n")


def run_inspect(options: argparse.Namespace) -> None:
    what = options.what or options.model
    if what.endswith(".safetensors") and not Path(what).is_file():
        raise FileNotFoundError(f"there is no file {what}")
    print(inspect_file(what) if Path(what).is_file() else inspect_model(what, options.revision))
