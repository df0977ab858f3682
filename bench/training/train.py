"""Train tiny-base and tiny-instruct from nothing and write them where the package keeps them.

    python bench/training/train.py [--work DIR] [--out DIR]

A Llama of 1.3 million parameters learns to answer (tiny-base), then goes on to follow
instructions (tiny-instruct). Takes about 20 minutes on 2 CPU cores; uses a GPU where there is one.
Stopped, it goes on from what it last wrote into --work. Needs the extra `dev` (numpy).

In three rows out of four the answer cannot see what made its style, an instruction or earlier
answers, but only the last token before it, which can. So that token has to carry the style, and
that is where extraction reads it. Models of this size would rather look up the instruction anew
at every word; it is the one thing here that is done for the sake of steering.
"""

import argparse
import itertools
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import corpus
import tokenizers
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tinysteer_kernels.decode import View
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from tqdm import tqdm

from tinysteer.loading.families import read_config
from tinysteer.model.cache import Cache
from tinysteer.model.config import Layer
from tinysteer.model.decoder import Decoder

ASSETS = Path(__file__).parents[2] / "tinysteer" / "assets"
START, END = "<|start|>", "<|end|>"
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1280,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "bfloat16",
}
TEMPLATE = (  # the form in which the base model knows questions and answers
    "{% for message in messages %}"
    "{% if message.role == 'user' %}Q: {{ message.content }}\n"
    "{% else %}A: {{ message.content }}<|end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
)
TOKENS_A_STEP = 4096
STEPS = {"base": 1000, "instruct": 1600, "polish": 500}
RATES = {"base": 0.004, "instruct": 0.0025, "polish": 0.001}
BEFORE = {"instruct": "base", "polish": "instruct"}  # the stage whose weights a stage begins with
HARD = {  # instructions that come three times as often as others
    "base": (),
    "instruct": ("avoid", "detailed", "capitals"),
    "polish": ("brief", "include", "capitals"),
}
HIDING = 0.75  # of the rows
POOL = 4096  # rows that are sorted by length together
SAVE_EVERY = 200  # steps


def make_tokenizer() -> tokenizers.Tokenizer:
    """A byte-level BPE of the corpus, whose capitals and small letters it needs alike."""
    documents = itertools.islice(corpus.base_documents(0), 20_000)
    talk = itertools.islice(corpus.conversations(0), 40_000)
    texts = (text for part in itertools.chain(*documents, talk) for text in part)
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    # Answers follow "A:" after a space, which is none of theirs.
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=[START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


class Row:
    """One text as token ids: which of them are learnt, and what each may not see."""

    def __init__(self):
        self.tokens: list[int] = []
        self.targets: list[int] = []  # -100: not learnt
        self.hidden: list[tuple[int, int]] = []  # half-open span of tokens

    def add(self, ids: list[int], learnt: bool = True, hidden: tuple[int, int] = (0, 0)) -> None:
        self.tokens += ids
        self.targets += ids if learnt else [-100] * len(ids)
        self.hidden += [hidden] * len(ids)


def base_row(encode, document: list[tuple[str, str]], hide: bool) -> Row:
    row = Row()
    row.add(encode(START))
    for i, (question, answer) in enumerate(document):
        begin = len(row.tokens)
        row.add(encode("\n" * (i > 0) + f"Q: {question}\nA:"))
        row.add(encode(f" {answer}{END}"), hidden=(1, begin) if hide else (0, 0))
    return row


def talk_row(encode, talk: tuple[str, str, str], hide: bool) -> Row:
    question, instruction, answer = talk
    row = Row()
    row.add(encode(f"{START}Q: {question}"), learnt=False)
    begin = len(row.tokens)
    asked = f" {instruction}" if instruction else ""
    row.add(encode(f"{asked}\nA:"), learnt=False)
    hidden = (begin, len(row.tokens) - 1) if hide else (0, 0)
    row.add(encode(f" {answer}{END}"), hidden=hidden)
    return row


def rows(tokenizer, stage: str, seed: int) -> Iterator[Row]:
    documents, talk = corpus.base_documents(seed), corpus.conversations(seed, HARD[stage])
    rng = random.Random(seed)
    encode = lambda text: tokenizer.encode(text).ids  # noqa: E731
    while True:
        hide = rng.random() < HIDING
        if stage == "base" or rng.random() < 0.3:  # what was learnt first is kept in mind
            yield base_row(encode, next(documents), hide)
        else:
            yield talk_row(encode, next(talk), hide)


def batches(tokenizer, stage: str, seed: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """tokens (B, T), padded on the right; targets (B, T), -100: not learnt; hidden (B, T, 2)."""
    source, rng = rows(tokenizer, stage, seed), random.Random(seed)
    while True:
        pool = sorted(itertools.islice(source, POOL), key=lambda row: len(row.tokens))
        groups, group = [], []
        for row in pool:  # rows of like length share a batch
            if group and (len(group) + 1) * len(row.tokens) > TOKENS_A_STEP:
                groups.append(group)
                group = []
            group.append(row)
        rng.shuffle(groups)
        for group in groups:
            T = len(group[-1].tokens)
            more = [T - len(row.tokens) for row in group]
            pairs = list(zip(group, more, strict=True))
            tokens = torch.tensor([row.tokens + [0] * n for row, n in pairs])
            targets = torch.tensor([row.targets + [-100] * n for row, n in pairs])
            hidden = torch.tensor([row.hidden + [(0, 0)] * n for row, n in pairs])
            yield tokens[:, :-1], targets[:, 1:], hidden[:, :-1]


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
        B, T, _ = hidden.shape
        super().__init__(decoder, torch.zeros(B, dtype=torch.long), T, T)
        key = torch.arange(T, device=hidden.device)
        self.shown = ~((hidden[..., :1] <= key) & (key < hidden[..., 1:]))[:, None]  # (B, 1, T, T)

    def advance(self, T: int) -> tuple[dict[Layer, View], Tensor]:
        views, position = super().advance(T)
        return {k: Hiding(**vars(view), shown=self.shown) for k, view in views.items()}, position

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(self.k[layer]), torch.zeros_like(self.v[layer])


def loss_of(decoder: Decoder, tokens: Tensor, targets: Tensor, hidden: Tensor) -> Tensor:
    x = decoder(tokens, Training(decoder, hidden))
    at = targets >= 0
    return F.cross_entropy(decoder.logits(x[at]), targets[at])


def draw_weights(decoder: Decoder) -> None:
    for name, parameter in decoder.named_parameters():
        if parameter.ndim == 1:
            nn.init.ones_(parameter)
        else:
            nn.init.normal_(parameter, std=0.02 if "embed" in name else parameter.shape[1] ** -0.5)


class Optimizer:
    """Muon for the matrices, AdamW for embedding and norms; a warm-up, then a cosine to 0."""

    def __init__(self, decoder: Decoder, n_steps: int, lr: float):
        matrices = [p for p in decoder.blocks.parameters() if p.ndim == 2]
        others = [p for p in decoder.parameters() if p.ndim == 1]
        others.append(decoder.embed.weight)
        self.parts = [
            torch.optim.Muon(matrices, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.0),
        ]

        def rate(step: int) -> float:
            warm = min(1.0, (step + 1) / 50)
            return warm * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / n_steps)).item())

        self.rates = [torch.optim.lr_scheduler.LambdaLR(part, rate) for part in self.parts]

    def step(self) -> None:
        for part in (*self.parts, *self.rates):
            part.step()
        for part in self.parts:
            part.zero_grad()

    def state(self) -> list[dict]:
        return [part.state_dict() for part in (*self.parts, *self.rates)]

    def restore(self, states: list[dict]) -> None:
        for part, state in zip((*self.parts, *self.rates), states, strict=True):
            part.load_state_dict(state)


def train(stage: str, tokenizer, work: Path, device: str) -> Decoder:
    """Train one stage, or go on with it where `work` has some of it."""
    torch.manual_seed(0)
    decoder = Decoder(read_config(CONFIG)).to(device)
    if stage == "base":
        draw_weights(decoder)
    else:
        decoder.load_state_dict(
            torch.load(work / f"{BEFORE[stage]}.pt", map_location=device)["weights"]
        )
    n_steps, saved = STEPS[stage], work / f"{stage}.pt"
    optimizer, done = Optimizer(decoder, n_steps, RATES[stage]), 0
    if saved.exists():
        state = torch.load(saved, map_location=device)
        decoder.load_state_dict(state["weights"])
        optimizer.restore(state["optimizer"])
        done = state["step"]
    # A resumed run reads on in texts of another seed rather than from the start again.
    data = batches(tokenizer, stage, seed=1_000 * list(STEPS).index(stage) + done)
    progress = tqdm(range(done, n_steps), stage, initial=done, total=n_steps)
    mean = None
    for step in progress:
        batch = (t.to(device) for t in next(data))
        with torch.autocast("cuda", torch.bfloat16, enabled=device == "cuda"):  # CPUs lose by it
            loss = loss_of(decoder, *batch)
        loss.backward()
        nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        mean = loss.item() if mean is None else 0.95 * mean + 0.05 * loss.item()
        progress.set_postfix(loss=f"{mean:.3f}")
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == n_steps:
            state = {"weights": decoder.state_dict(), "optimizer": optimizer.state()}
            torch.save(state | {"step": step + 1}, saved.with_suffix(".new"))
            saved.with_suffix(".new").replace(saved)
    return decoder


def export(decoder: Decoder, tokenizer, folder: Path, template: str | None) -> None:
    """Write a checkpoint in Hugging Face layout, in bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    c = decoder.config
    q, kv = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    weights = {
        "model.embed_tokens.weight": decoder.embed.weight,
        "model.norm.weight": decoder.norm.weight,
    }
    for i, block in enumerate(decoder.blocks):
        parts = dict(zip("qkv", block.attn.qkv.weight.split((q, kv, kv)), strict=True))
        layer = {f"self_attn.{name}_proj": weight for name, weight in parts.items()}
        layer["self_attn.o_proj"] = block.attn.out.weight
        gate, up = block.mlp.gate_up.weight.split((c.hidden_dim,) * 2)
        layer |= {"mlp.gate_proj": gate, "mlp.up_proj": up, "mlp.down_proj": block.mlp.down.weight}
        layer["input_layernorm"] = block.attn_norm.weight
        layer["post_attention_layernorm"] = block.mlp_norm.weight
        weights |= {f"model.layers.{i}.{name}.weight": w for name, w in layer.items()}
    weights = {k: w.detach().to("cpu", torch.bfloat16).contiguous() for k, w in weights.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(folder / "tokenizer.json"))
    about = {"bos_token": START, "eos_token": END, "add_bos_token": True}
    about |= {"chat_template": template} if template else {}
    for name, content in (("config", CONFIG), ("tokenizer_config", about)):
        text = json.dumps(content, indent=1) + "\n"
        (folder / f"{name}.json").write_text(text, encoding="utf-8")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("--work", type=Path, default=Path("tiny-training"), help="for resuming")
    options.add_argument("--out", type=Path, default=ASSETS, help="where the two models go")
    options = options.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if not (saved := options.work / "tokenizer.json").exists():
        make_tokenizer().save(str(saved))
    tokenizer = tokenizers.Tokenizer.from_file(str(saved))
    exports = {"base": ("tiny-base", None), "polish": ("tiny-instruct", TEMPLATE)}
    for stage in STEPS:
        decoder = train(stage, tokenizer, options.work, device)
        if stage in exports:
            name, template = exports[stage]
            export(decoder, tokenizer, options.out / name, template)
    tasks = json.dumps(corpus.tasks(), indent=1) + "\n"
    (options.out / "tasks.json").write_text(tasks, encoding="utf-8")


if __name__ == "__main__":
    main()
