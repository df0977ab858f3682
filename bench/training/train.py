"""Train tiny-base and tiny-instruct from nothing and write them where the package keeps them.

    python -m bench.training.train [--work DIR] [--out DIR]     (from the project's root)

A Llama of 1.3 million parameters (config.json) learns to answer (tiny-base), then goes on to follow
instructions (tiny-instruct). Takes about 20 minutes on 2 CPU cores; uses a GPU where there is one.
Stopped, it goes on from what it last wrote into --work. Needs the extra `dev` (numpy). How well
the models follow is what `tinysteer demo` and `tinysteer reproduce` show. A trial (--steps 2, or
--steps 2 4: stopped after 2 of each stage, then resumed up to 4) needs folders of its own.

In three rows out of four the answer cannot see what made its style, an instruction or earlier
answers, but only the last token before it, which can. So that token has to carry the style, and
that is where extraction reads it. Models of this size would rather look up the instruction anew
at every word; it is the one thing here that is done for the sake of steering.
"""

import argparse
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tinysteer_kernels.decode import View
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from tqdm import tqdm

from bench.machine import DEVICE
from bench.training import corpus
from tests.helpers.hub_names import to_hub
from tinysteer.loading.families import read_config
from tinysteer.loading.hub import ASSETS
from tinysteer.model.cache import Cache
from tinysteer.model.config import Layer
from tinysteer.model.decoder import Decoder

CONFIG = json.loads(Path(__file__).with_name("config.json").read_text(encoding="utf-8"))
START, END = "<|start|>", "<|end|>"
TEMPLATE = (  # the form in which the base model knows questions and answers
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'user' %}Q: {{ message.content }}\n"
    "{% else %}A: {{ message.content }}<|end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
)


class Stage(NamedTuple):
    n_steps: int
    rate: float
    hard: tuple[str, ...] = ()  # instructions that come three times as often as others
    model: str = ""  # that it completes


STAGES = {  # each begins with the weights of the one before
    "base": Stage(1000, 0.004, model="tiny-base"),
    "instruct": Stage(1600, 0.0025, ("avoid", "detailed", "capitals")),
    "polish": Stage(500, 0.001, ("brief", "include", "capitals"), "tiny-instruct"),
}
HIDING = 0.75  # of the rows
SAVE_EVERY = 200  # steps
TOKENS_A_STEP = 4096


def make_tokenizer() -> Tokenizer:
    """A byte-level BPE of the corpus, whose capitals and small letters it needs alike."""
    documents = islice(corpus.base_documents(0), 20_000)
    talk = islice(corpus.conversations(0), 40_000)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    # Answers follow "A:" after a space, which is none of theirs.
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    given = {"vocab_size": CONFIG["vocab_size"], "special_tokens": [START, END]}
    given |= {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "show_progress": False}
    texts = (text for part in chain(*documents, talk) for text in part)
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(**given))
    return tokenizer


# A token's id, what is learnt of it (the id, or -100: nothing), and a half-open span of tokens
# that it may not see.
Row = list[tuple[int, int, int, int]]
PADDING = (0, -100, 0, 0)


def encode(tokenizer: Tokenizer, text: str, learnt: bool = True, hidden=(0, 0)) -> Row:
    return [(id, id if learnt else -100, *hidden) for id in tokenizer.encode(text).ids]


def base_row(tokenizer: Tokenizer, document: list[tuple[str, str]], hide: bool) -> Row:
    """All is learnt; an answer may not see earlier questions and answers."""
    row = encode(tokenizer, START)
    for i, (question, answer) in enumerate(document):
        hidden = (1, len(row)) if hide else (0, 0)
        row += encode(tokenizer, "\n" * (i > 0) + f"Q: {question}\nA:")
        row += encode(tokenizer, f" {answer}{END}", hidden=hidden)
    return row


def talk_row(tokenizer: Tokenizer, talk: tuple[str, str, str], hide: bool) -> Row:
    """The answer alone is learnt; it may not see the instruction."""
    question, instruction, answer = talk
    row = encode(tokenizer, f"{START}Q: {question}", learnt=False)
    begin = len(row)
    row += encode(tokenizer, f" {instruction}" * bool(instruction) + "\nA:", learnt=False)
    hidden = (begin, len(row) - 1) if hide else (0, 0)
    return row + encode(tokenizer, f" {answer}{END}", hidden=hidden)


def rows(tokenizer: Tokenizer, stage: str, seed: int) -> Iterator[Row]:
    documents, talk = corpus.base_documents(seed), corpus.conversations(seed, STAGES[stage].hard)
    rng = random.Random(seed)
    while True:
        hide = rng.random() < HIDING
        if stage == "base" or rng.random() < 0.3:  # what was learnt first is kept in mind
            yield base_row(tokenizer, next(documents), hide)
        else:
            yield talk_row(tokenizer, next(talk), hide)


def batches(tokenizer: Tokenizer, stage: str, seed: int, n_tokens: int) -> Iterator[Tensor]:
    """Rows of like length, padded on the right to at most n_tokens in all: (B, T, 4)."""
    source, rng = rows(tokenizer, stage, seed), random.Random(seed)
    while True:
        groups: list[list[Row]] = [[]]
        for row in sorted(islice(source, n_tokens), key=len):
            if groups[-1] and (len(groups[-1]) + 1) * len(row) > n_tokens:
                groups.append([])
            groups[-1].append(row)
        groups.pop()  # the longest rows are too few to fill a step
        rng.shuffle(groups)
        for group in groups:
            T = len(group[-1])
            yield torch.tensor([row + [PADDING] * (T - len(row)) for row in group])


@dataclass(frozen=True)
class Hiding(View):
    """A view in which `shown` (B, 1, T, T) is all that can be seen."""

    shown: Tensor | None = None

    @cached_property
    def mask(self) -> Tensor:
        return View.mask.func(self) & self.shown


class Training(Cache):
    """A cache that keeps nothing, so that gradients reach the keys, and hides what is hidden."""

    def __init__(self, decoder: Decoder, hidden: Tensor):
        """hidden (B, T, 2): the span that each token may not see."""
        B, T, _ = hidden.shape
        super().__init__(decoder, torch.zeros(B, dtype=torch.long), T, T)
        key = torch.arange(T, device=hidden.device)
        self.shown = ~((hidden[..., :1] <= key) & (key < hidden[..., 1:]))[:, None]  # (B, 1, T, T)

    def advance(self, T: int) -> tuple[dict[Layer, View], Tensor]:
        views, position = super().advance(T)
        return {k: Hiding(**vars(view), shown=self.shown) for k, view in views.items()}, position

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(self.k[layer]), torch.zeros_like(self.v[layer])


def check_hiding(decoder: Decoder, tokenizer: Tokenizer) -> None:
    """Steering rests on it: an answer sees its instruction through the last prompt token alone."""
    talk = ("What is an owl?", "Be brief.", "An owl is a bird.")
    row = torch.tensor([talk_row(tokenizer, talk, hide=True)])
    T, (first, last) = row.shape[1], row[0, -1, 2:]
    assert tokenizer.decode(row[0, first:last, 0].tolist()) == "Be brief.\nA"
    visible = torch.ones(T, T, dtype=torch.bool).tril()
    visible[last + 1 :, first:last] = False
    views, _ = Training(decoder, row[..., 2:]).advance(T)
    assert all(torch.equal(view.mask[0, 0], visible) for view in views.values())


def loss_of(decoder: Decoder, batch: Tensor) -> Tensor:
    """batch (B, T, 4): each token is to be known by those before it."""
    tokens, targets, hidden = batch[:, :-1, 0], batch[:, 1:, 1], batch[:, :-1, 2:]
    x = decoder(tokens, Training(decoder, hidden))
    learnt = targets >= 0
    return F.cross_entropy(decoder.logits(x[learnt]), targets[learnt])


def draw_weights(decoder: Decoder) -> None:
    for name, parameter in decoder.named_parameters():
        if parameter.ndim == 1:
            nn.init.ones_(parameter)
        else:
            nn.init.normal_(parameter, std=0.02 if "embed" in name else parameter.shape[1] ** -0.5)


def make_optimizers(decoder: Decoder) -> list[torch.optim.Optimizer]:
    """Muon for the matrices, AdamW for embedding and norms."""
    matrices = [p for p in decoder.blocks.parameters() if p.ndim == 2]
    others = [p for p in decoder.parameters() if p.ndim == 1] + [decoder.embed.weight]
    return [
        torch.optim.Muon(matrices, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def schedule(step: int, n_steps: int) -> float:
    """A warm-up, then a cosine to 0."""
    warm = min(1.0, (step + 1) / 50)
    return warm * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / n_steps)).item())


def update(optimizers: list[torch.optim.Optimizer], lr: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()


def train(stage: str, tokenizer: Tokenizer, work: Path, n_steps: int, n_tokens: int) -> Decoder:
    """Train one stage, or go on with it where `work` has some of it."""
    torch.manual_seed(0)
    decoder, index = Decoder(read_config(CONFIG)).to(DEVICE), list(STAGES).index(stage)
    optimizers, done, saved = make_optimizers(decoder), 0, work / f"{stage}.pt"
    if saved.exists():
        state = torch.load(saved, map_location=DEVICE)
        decoder.load_state_dict(state["weights"])
        for optimizer, of_optimizer in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(of_optimizer)
        done = state["step"]
    elif index == 0:
        draw_weights(decoder)
    else:
        before = torch.load(work / f"{list(STAGES)[index - 1]}.pt", map_location=DEVICE)
        decoder.load_state_dict(before["weights"])
    # A resumed run reads on in texts of another seed rather than from the start again.
    data = batches(tokenizer, stage, 1_000 * index + done, n_tokens)
    progress, mean = tqdm(range(done, n_steps), stage, initial=done, total=n_steps), None
    for step in progress:
        with torch.autocast("cuda", torch.bfloat16, enabled=DEVICE == "cuda"):  # CPUs lose by it
            loss = loss_of(decoder, next(data).to(DEVICE))
        loss.backward()
        nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        update(optimizers, STAGES[stage].rate * schedule(step, n_steps))
        mean = loss.item() if mean is None else 0.95 * mean + 0.05 * loss.item()
        progress.set_postfix(loss=f"{mean:.3f}")
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == n_steps:
            state = {"weights": decoder.state_dict(), "step": step + 1}
            state["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
            torch.save(state, saved.with_suffix(".new"))
            saved.with_suffix(".new").replace(saved)
    return decoder


def export(decoder: Decoder, tokenizer: Tokenizer, folder: Path, template: str | None) -> None:
    """Write a checkpoint in Hugging Face layout, in bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {k: w.to("cpu", torch.bfloat16).contiguous() for k, w in to_hub(decoder).items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(folder / "tokenizer.json"))
    about = {"bos_token": START, "eos_token": END, "add_bos_token": True}
    about |= {"chat_template": template} if template else {}
    write_json(folder / "config.json", CONFIG)
    write_json(folder / "tokenizer_config.json", about)


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, default=Path("tiny-training"), help="for resuming")
    parser.add_argument("--out", type=Path, default=ASSETS, help="where the two models go")
    parser.add_argument("--steps", type=int, nargs="+", help="of each stage, in a trial")
    parser.add_argument("--tokens", type=int, default=TOKENS_A_STEP, help="in a step")
    options = parser.parse_args()
    if options.steps and options.out == ASSETS:
        parser.error("a trial needs --out: it would replace the embedded models")
    options.work.mkdir(parents=True, exist_ok=True)
    if not (saved := options.work / "tokenizer.json").exists():
        make_tokenizer().save(str(saved))
    tokenizer = Tokenizer.from_file(str(saved))
    check_hiding(Decoder(read_config(CONFIG)), tokenizer)
    for trial in options.steps or [0]:
        for name, stage in STAGES.items():
            n_steps = trial or stage.n_steps
            decoder = train(name, tokenizer, options.work, n_steps, options.tokens)
            if stage.model:
                template = None if name == "base" else TEMPLATE
                export(decoder, tokenizer, options.out / stage.model, template)
    write_json(options.out / "tasks.json", corpus.tasks())


if __name__ == "__main__":
    main()
