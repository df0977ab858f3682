"""The command line: extract a vector, generate with it, inspect a vector or a model.

Exit codes: 0; 1 for what the user can mend, with one sentence on stderr; 2 for usage.
"""

import argparse
import json
import os
import re
import sys
from pathlib import Path

import torch

from tinysteer.checkpoint import load, load_config
from tinysteer.extraction import extract
from tinysteer.generation import Options
from tinysteer.hub import fetch
from tinysteer.model import Decoder
from tinysteer.steering import VERBS, WINDOWS, Edit, SteeringVector, check_fit
from tinysteer.tokenizer import Tokenizer
from tinysteer.version import VERSION

# What a line of a pairs file may call its two prompts; the second is how the paper's data do.
PAIR_KEYS = (("with", "without"), ("prompt", "prompt_without_instruction"))
SPEC = re.compile(
    r"(?P<file>.+)@(?P<layer>-?\d+):(?P<verb>\w+)(=(?P<number>[^:]+))?(:(?P<where>\w+))?"
)
SPEC_FORM = "FILE@LAYER:VERB[=NUMBER][:WHERE]"


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    for stream in (sys.stdin, sys.stdout):  # Windows' pipes have another encoding
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8")
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
    model.add_argument("model", metavar="MODEL", help="a folder, or a Hub id such as owner/name")
    model.add_argument("--dtype", help="float32, bfloat16 or float16 (default: as stored)")
    model.add_argument("--device", help="such as cpu or cuda (default: the GPU if there is one)")
    model.add_argument("--revision", help="a branch, tag or commit on the Hub")
    model.add_argument("--raw", action="store_true", help="take prompts as they are, no template")

    one = commands.add_parser(
        "extract", parents=[model], help="pairs of prompts in, a steering vector out"
    )
    one.add_argument(
        "pairs",
        metavar="PAIRS.jsonl",
        help='one {"with": PROMPT, "without": PROMPT} a line: with the instruction, without it',
    )
    one.add_argument("-o", "--output", required=True, metavar="V.safetensors")
    one.add_argument("--batch-size", type=int, default=16, help="prompts run together (16)")
    one.set_defaults(run=run_extract)

    one = commands.add_parser("generate", parents=[model], help="answer prompts, steered")
    one.add_argument("prompts", metavar="PROMPT", nargs="+", help="- reads one a line from stdin")
    one.add_argument(
        "--steer",
        metavar="SPEC",
        action="append",
        type=parse_spec,
        default=[],
        help=f"{SPEC_FORM}; repeat for several edits, in order. VERB is one of {', '.join(VERBS)}; "
        "NUMBER is the weight for add, the share of the way (1) for the next three; "
        f"WHERE one of {', '.join(WINDOWS)}",
    )
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

    one = commands.add_parser("inspect", help="what a vector file or a model holds")
    one.add_argument("what", metavar="FILE_OR_MODEL")
    one.add_argument("--revision", help="a branch, tag or commit on the Hub")
    one.set_defaults(run=run_inspect)
    return top


def parse_spec(spec: str) -> dict[str, str | None]:
    """FILE@LAYER:VERB[=NUMBER][:WHERE] -> its parts; argparse reports what does not fit."""
    match = SPEC.fullmatch(spec)
    if not match:
        raise argparse.ArgumentTypeError(f"{spec!r} is not {SPEC_FORM}, as in v.safetensors@12:add")
    parts = match.groupdict()
    if parts["verb"] not in VERBS:
        raise argparse.ArgumentTypeError(f"{parts['verb']!r} is none of {', '.join(VERBS)}")
    if parts["where"] and parts["where"] not in WINDOWS:
        raise argparse.ArgumentTypeError(f"{parts['where']!r} is none of {', '.join(WINDOWS)}")
    if parts["number"] is not None:
        if parts["verb"] == "ablate":
            raise argparse.ArgumentTypeError("ablate takes no number")
        try:
            float(parts["number"])
        except ValueError:
            raise argparse.ArgumentTypeError(f"{parts['number']!r} is no number") from None
    return parts


def make_edit(parts: dict[str, str | None]) -> Edit:
    direction = SteeringVector.load(parts["file"]).at(int(parts["layer"]))
    numbers = [] if parts["number"] is None else [float(parts["number"])]
    return getattr(direction, parts["verb"])(*numbers, where=parts["where"] or "all")


def read_pairs(path: Path) -> tuple[list[str], list[str]]:
    """A JSONL file -> prompts with the instruction, and without. ValueError names the line."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    pairs = []
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not valid JSON ({error})") from None
        keys = next((k for k in PAIR_KEYS if isinstance(row, dict) and row.keys() >= {*k}), None)
        if keys is None or not all(isinstance(row[key], str) for key in keys):
            raise ValueError(f'{path}, line {number}: not {{"with": PROMPT, "without": PROMPT}}')
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
    model = load(options.model, options.dtype, options.device, options.revision)
    settings = {"chat": not options.raw, "batch_size": options.batch_size}
    vector = extract(model, with_instruction, without, **settings)
    vector.save(options.output)
    print(f"{options.output}: {vector}")


def run_generate(options: argparse.Namespace) -> None:
    steer = [make_edit(parts) for parts in options.steer]
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "stop")
    settings = {name: getattr(options, name) for name in (*names, "batch_size")}
    settings["chat"] = not options.raw
    Options(**settings)  # refuses what is out of range before anything is loaded, as does:
    if steer:
        config = load_config(fetch(options.model, options.revision, weights=False))
        check_fit([steer], config.n_layers, config.dim)
    prompts = options.prompts
    if prompts == ["-"]:
        prompts = [line.rstrip("\r\n") for line in sys.stdin if line.strip()]
        if not prompts:
            raise ValueError("there are no prompts on the standard input")
    model = load(options.model, options.dtype, options.device, options.revision)
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


def run_inspect(options: argparse.Namespace) -> None:
    what = options.what
    print(inspect_file(what) if Path(what).is_file() else inspect_model(what, options.revision))


def inspect_file(path: str) -> str:
    vector = SteeringVector.load(path)
    lines = [f"{path}: steering vector, {vector.n_layers} layers of width {vector.dim}"]
    lines += [f"  {name}: {value}" for name, value in sorted(vector.metadata.items())]
    lines += ["", "  layer      norm    target  baseline"]
    for layer in range(vector.n_layers):
        row = (float(t[layer]) for t in (vector.norms, vector.targets, vector.baselines))
        lines.append(f"  {layer:>5}" + "".join(f"{value:>10.3f}" for value in row))
    return "\n".join(lines)


def inspect_model(source: str, revision: str | None) -> str:
    """From its configuration and tokenizer alone: no weights are read or downloaded."""
    folder = fetch(source, revision, weights=False)
    c, tokenizer = load_config(folder), Tokenizer.load(folder)
    with torch.device("meta"):
        n_parameters = sum(p.numel() for p in Decoder(c).parameters())
    cached = 2 * c.n_layers * c.n_kv_heads * c.head_dim  # numbers a token leaves in the cache
    windows = [layer.window for layer in c.layers]
    name = tokenizer.vocabulary.id_to_token
    rows = {
        "family": c.family,
        "layers": f"{c.n_layers} (0 to {c.n_layers - 1}), width {c.dim}, MLP {c.hidden_dim}",
        "heads": f"{c.n_heads} of {c.head_dim}, {c.n_kv_heads} for keys and values",
        "vocabulary": f"{c.vocab_size}, head {'tied to the embedding' if c.tied else 'of its own'}",
        "context": f"{c.context_length} tokens"
        + "".join(f", {windows.count(w)} layers see {w}" for w in sorted({*windows} - {None})),
        "parameters": f"{n_parameters / 1e6:,.1f} M, "
        f"{2 * n_parameters / 1e6:,.0f} MB in bfloat16, {4 * n_parameters / 1e6:,.0f} in float32",
        "cache": f"{2 * cached / 1024:,.0f} KiB a token in bfloat16, "
        f"{4 * cached / 1024:,.0f} in float32",
        "prompts": "chat template" if tokenizer.template else "no chat template: Q: ... A:",
        "BOS": name(tokenizer.bos_id) if tokenizer.adds_bos else "none added",
        "stops at": ", ".join(name(i) or str(i) for i in sorted(tokenizer.stop_ids)) or "nothing",
    }
    return "\n".join([f"{source}: model"] + [f"  {key}: {value}" for key, value in rows.items()])
