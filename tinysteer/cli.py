"""The command line: a demo; extract a vector, generate with it, explain it, inspect it.

Exit codes: 0; 1 for what the user can mend, with one sentence on stderr; 2 for usage.
"""

import argparse
import json
import os
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from tinysteer.decoding.generation import Options
from tinysteer.demo.show import run_demo
from tinysteer.experiments import command
from tinysteer.extraction import METHODS, extract
from tinysteer.inspection import inspect_file, inspect_model
from tinysteer.language_model import LanguageModel, load
from tinysteer.loading.checkpoint import load_config
from tinysteer.loading.hub import EMBEDDED, fetch
from tinysteer.steering.batch import check_fit
from tinysteer.steering.edits import WINDOWS, Edit, parse_window
from tinysteer.steering.plans import VERBS, load_plan, make_edits
from tinysteer.text.files import read_jsonl
from tinysteer.version import VERSION

# What a line of a pairs file may call its two prompts; the second is how the paper's data do.
PAIR_KEYS = (("with", "without"), ("prompt", "prompt_without_instruction"))
SPEC = re.compile(
    r"(?P<file>.+)@(?P<layer>-?\d+):(?P<verb>\w+)(=(?P<number>[^:]+))?(:(?P<where>\w+|-?\d*,-?\d*))?"
)
SPEC_FORM = "FILE@LAYER:VERB[=NUMBER][:WHERE]"
MODEL = EMBEDDED[0]


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
    top = argparse.ArgumentParser(
        prog="tinysteer",
        description="Steer language models by adding vectors to their activations.",
    )
    top.add_argument("--version", action="version", version=f"tinysteer {VERSION}")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

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
    model.add_argument("--raw", action="store_true", help="take prompts as they are, no template")

    steered = argparse.ArgumentParser(add_help=False)
    steered.add_argument("prompts", metavar="PROMPT", nargs="+", help="- reads one a line")
    steered.add_argument(
        "--steer",
        metavar="SPEC",
        action="append",
        type=parse_steer,
        default=[],
        help=f"a plan.json, or {SPEC_FORM}; repeat for several edits, in order. VERB is one of "
        f"{', '.join(VERBS)}; NUMBER is the weight for add, the share of the way (1) for the next "
        f"three; WHERE one of {', '.join(WINDOWS)}, or FIRST,STOP (0,1: the last prompt token)",
    )

    one = commands.add_parser("demo", help="steer the embedded model: tables and texts, a minute")
    one.add_argument("--json", action="store_true", help="print everything as one JSON object")
    one.set_defaults(run=lambda options: run_demo(options.json))

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
    one.set_defaults(run=run_extract)

    parents = [model, steered]
    one = commands.add_parser("generate", parents=parents, help="answer prompts, steered")
    one.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="128")
    one.add_argument("--temperature", type=float, default=0.0, help="0 (default) is greedy")
    one.add_argument("--top-k", type=int, help="draw from so many tokens, with a temperature")
    one.add_argument("--top-p", type=float, help="from the fewest with this share, likewise")
    one.add_argument("--min-p", type=float, help="from those this near the likeliest, likewise")
    one.add_argument("--seed", type=int, help="of the draws")
    one.add_argument("--batch-size", type=int, default=32, help="prompts run together (32)")
    one.add_argument("--stop", action="append", default=[], help="a string that ends the text")
    output = one.add_mutually_exclusive_group()
    output.add_argument("--stream", action="store_true", help="print text as it comes")
    output.add_argument("--json", action="store_true", help="print one JSON object a prompt")
    one.set_defaults(run=run_generate)

    one = commands.add_parser("explain", parents=parents, help="what edits do, token by token")
    one.add_argument("--max-new-tokens", type=int, default=0, metavar="N", help="go on so far (0)")
    one.add_argument("--json", action="store_true", help="print one JSON object a prompt")
    one.set_defaults(run=run_explain)

    one = commands.add_parser("inspect", help="what a vector file or a model holds")
    one.add_argument("what", metavar="FILE_OR_MODEL", nargs="?", default=MODEL)
    one.add_argument("--revision", help="a branch, tag or commit on the Hub")
    one.set_defaults(run=run_inspect)
    command.add_parser(commands)
    return top


def parse_steer(spec: str) -> tuple[str, dict[str, Any] | None]:
    """A plan's file as it is, or FILE@LAYER:VERB[=NUMBER][:WHERE] with the plan of one edit.

    argparse reports what does not fit.
    """
    if spec.endswith(".json"):
        return spec, None
    match = SPEC.fullmatch(spec)
    if not match:
        raise argparse.ArgumentTypeError(
            f"{spec!r} is no plan.json and not {SPEC_FORM}, as in v.safetensors@12:add"
        )
    file, layer, verb, number, where = match.group("file", "layer", "verb", "number", "where")
    if verb not in VERBS:
        raise argparse.ArgumentTypeError(f"{verb!r} is none of {', '.join(VERBS)}")
    edit: dict[str, Any] = {"vector": file, "layer": int(layer), "verb": verb}
    if number is not None:
        if not VERBS[verb]:
            raise argparse.ArgumentTypeError(f"{verb} takes no number")
        try:
            edit[VERBS[verb][0]] = float(number)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{number!r} is no number") from None
    if where:
        try:
            edit["where"] = parse_window(where)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    return spec, {"edits": [edit]}


def read_edits(options: argparse.Namespace) -> list[Edit]:
    """What --steer says, checked against the model's configuration before weights are read."""
    steer: list[Edit] = []
    for spec, plan in options.steer:
        steer += load_plan(spec) if plan is None else make_edits(plan, spec, Path())
    if steer:
        config = load_config(fetch(options.model, options.revision, weights=False))
        check_fit([steer], config.n_layers, config.dim)
    return steer


def read_prompts(options: argparse.Namespace) -> list[str]:
    if options.prompts != ["-"]:
        return options.prompts
    prompts = [line.rstrip("\r\n") for line in sys.stdin if line.strip()]
    if not prompts:
        raise ValueError("there are no prompts on the standard input")
    return prompts


def load_model(options: argparse.Namespace) -> LanguageModel:
    return load(options.model, options.dtype, options.device, options.revision)


def read_pairs(path: Path) -> tuple[list[str], list[str]]:
    """A JSONL file -> prompts with the instruction, and without. ValueError names the line."""
    pairs = []
    for place, row in read_jsonl(path):
        keys = next((keys for keys in PAIR_KEYS if row.keys() >= {*keys}), None)
        if keys is None or not all(isinstance(row[key], str) for key in keys):
            raise ValueError(f'{place}: not {{"with": PROMPT, "without": PROMPT}}')
        pairs.append([row[key] for key in keys])
    if not pairs:
        raise ValueError(f"{path} holds no pairs")
    with_instruction, without = map(list, zip(*pairs, strict=True))
    return with_instruction, without


def run_extract(options: argparse.Namespace) -> None:
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
        chat=not options.raw,
        batch_size=options.batch_size,
    )
    vector.save(options.output)
    print(f"{options.output}: {vector}")


def run_generate(options: argparse.Namespace) -> None:
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "stop")
    settings = {name: getattr(options, name) for name in (*names, "batch_size")}
    settings["chat"] = not options.raw
    Options(**settings)  # refuses what is out of range before anything is loaded
    steer, prompts = read_edits(options), read_prompts(options)
    model = load_model(options)
    heading = "\n> {}\n" if len(prompts) > 1 else ""
    if options.stream:
        for prompt in prompts:
            print(heading.format(prompt), end="")
            for piece in model.stream(prompt, steer, **settings):
                print(piece, end="", flush=True)
            print()
        return
    for prompt, text in zip(prompts, model.complete(prompts, steer, **settings), strict=True):
        if options.json:
            print(json.dumps({"prompt": prompt, "completion": text}, ensure_ascii=False))
        else:
            print(heading.format(prompt) + text)


def run_explain(options: argparse.Namespace) -> None:
    steer, prompts = read_edits(options), read_prompts(options)
    settings = {"max_new_tokens": options.max_new_tokens, "chat": not options.raw}
    rows = load_model(options).explain(prompts, steer, **settings)
    for prompt, row in zip(prompts, rows, strict=True):
        if options.json:
            print(json.dumps({"prompt": prompt, **row.as_dict()}, ensure_ascii=False))
        else:
            print(f"> {prompt}\n{row}\n")


def run_inspect(options: argparse.Namespace) -> None:
    what = options.what
    if what.endswith(".safetensors") and not Path(what).is_file():
        raise FileNotFoundError(f"there is no file {what}")
    print(inspect_file(what) if Path(what).is_file() else inspect_model(what, options.revision))
