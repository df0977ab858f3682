"""Safetensors files, one or in shards, of a folder or the Hub -> a decoder in memory."""

import warnings
from dataclasses import dataclass, replace
from pathlib import Path, PureWindowsPath

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from tqdm import tqdm

from tinysteer.loading.families import FAMILIES, IGNORED, TEXT_PREFIX, read_config
from tinysteer.model.config import Config
from tinysteer.model.decoder import Decoder, Stacked
from tinysteer.text.files import printable, read_json

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STORED_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
CURE = "is it complete, and is its config.json its own?"
INDEX = "model.safetensors.index.json"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
OTHER_HEADS = ("v_head.", "value_head.", "score.", "classifier.")  # of rewards, of classes
HEADER = 16 << 20  # bytes: a model of a thousand layers needs a tenth
OTHERS = {  # how other files begin, and what they are
    b"version https://git-lfs": "a pointer of Git LFS, not the weights: run `git lfs pull`",
    b"GGUF": "a GGUF file, for llama.cpp: take the repository that it was made from",
    b"PK": "a pickle, which can run code when read: convert it to safetensors",
}


def parse_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """None, one of DTYPES or its name -> None or a dtype; ValueError for another."""
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, dtype)
    if dtype is not None and dtype not in DTYPES:
        known = ", ".join(str(known).removeprefix("torch.") for known in DTYPES)
        raise ValueError(f"dtype {dtype} is not supported; those that are: {known}")
    return dtype


def parse_device(device: torch.device | str | None) -> torch.device:
    """A device that is there, by default the GPU or else the CPU; ValueError for another."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(
            f"torch has no device {str(device)!r} here ({reason}); try 'cpu'"
        ) from None
    return torch.device(device)


def load_config(folder: Path) -> Config:
    """config.json, read. FileNotFoundError that says what the folder is instead; ValueError."""
    file = folder / "config.json"
    if not is_there(file):
        adapter = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        if adapter is not None:
            raise FileNotFoundError(
                f"{folder} is a LoRA adapter of {adapter!r:.100}, not a model: merge it into that "
                "(peft: merge_and_unload, save_pretrained) and load the result"
            )
        raise FileNotFoundError(f"{folder} has no config.json: it is not a model's folder")
    settings = read_json(file)
    try:
        return read_config(settings)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def is_there(file: Path) -> bool:
    """Whether there is such a file. ValueError for a folder, or a link that leads to nothing."""
    if file.is_symlink() and not file.exists():
        raise ValueError(f"{file} is a link to nothing: delete that folder and download it again")
    if file.is_dir():
        raise ValueError(f"{file} is a folder, not a file; download it again")
    return file.exists()


@dataclass(frozen=True)
class Stored:
    """A tensor in a file, not read yet."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str  # as safetensors spells it: "BF16"


def read_headers(folder: Path) -> dict[str, Stored]:
    """Every tensor of a checkpoint by its name, and where it is; reads no weights."""
    index, single = folder / INDEX, folder / "model.safetensors"
    weight_map: dict[str, str] = {}
    if is_there(single):
        files = [single.name]
    elif is_there(index):
        weight_map = read_index(index)
        files = sorted(set(weight_map.values()))
        if absent := [file for file in files if not is_there(folder / file)]:
            raise FileNotFoundError(
                f"{folder} lacks {shorten(absent)}, which {index.name} names; download it again"
            )
    else:
        raise no_weights(folder)
    stored = {}
    for file in files:
        for name, tensor in read_header(folder / file).items():
            if weight_map.get(name, file) == file:  # of two by one name the one that is meant
                stored[name] = tensor
    if absent := sorted(weight_map.keys() - stored.keys()):
        raise ValueError(
            f"{index} names {shorten(absent)}, which its files lack; download it again"
        )
    return stored


def no_weights(folder: Path) -> FileNotFoundError:
    """What lies there in their place."""
    cure = "convert the checkpoint to safetensors or choose one that has them"
    own = {path.name for pattern in ("consolidated*", "original") for path in folder.glob(pattern)}
    pickles = {path.name for pattern in ("*.bin", "*.pt*") for path in folder.glob(pattern)}
    if own:
        there = f"{shorten(sorted(own))} is its maker's own layout; "
        cure = "take model.safetensors from the same repository"
    elif ggufs := sorted(path.name for path in folder.glob("*.gguf")):
        there = f"{shorten(ggufs)} is GGUF, for llama.cpp; "
        cure = "take the repository that it was made from"
    else:
        there = f"only {shorten(sorted(pickles))}, a pickle, which can run code when read; "
        there *= bool(pickles)
    return FileNotFoundError(f"{folder} has no model.safetensors: {there}{cure}")


def read_index(index: Path) -> dict[str, str]:
    """A tensor -> the file that holds it, in the index's own folder. ValueError."""
    weight_map = read_json(index).get("weight_map")
    if not weight_map:
        raise ValueError(f"{index} has no weight_map; download it again")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise ValueError(f"{index}: weight_map is not a table of files' names; download it again")
    for file in {*weight_map.values()}:
        path = PureWindowsPath(file)  # which knows the separators of all systems
        if path.anchor or ".." in path.parts or not file.endswith(".safetensors"):
            raise ValueError(f"{index} names {file!r:.100}: not a safetensors file of its folder")
    return weight_map


def read_header(path: Path) -> dict[str, Stored]:
    """What a safetensors file holds. ValueError for another file, which is named if it is known."""
    with open(path, "rb") as file:
        begin = file.read(64)
    for mark, what in OTHERS.items():
        if begin.startswith(mark):
            raise ValueError(f"{path} is {what}")
    if len(begin) == 64 and begin[8:9] == b"{" and int.from_bytes(begin[:8], "little") > HEADER:
        raise ValueError(
            f"{path} has a header of more than {HEADER >> 20} MB: it is no checkpoint's"
        )
    stored = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is no dict)
                part = file.get_slice(name)
                stored[name] = Stored(path, name, tuple(part.get_shape()), part.get_dtype())
    except SafetensorError as error:
        raise ValueError(
            f"{path} is cut short or is no safetensors file ({error!s:.200}); download it again"
        ) from None
    return stored


def plain_names(stored: dict[str, Stored]) -> dict[str, Stored]:
    """A text model's tensors by the names they have in a checkpoint that holds nothing else.

    A multimodal model's lie under another prefix, a bare base model's under none. Heads of other
    uses are left out with a warning. ValueError for two tensors of one name.
    """
    ours = [name for name in stored if not any(part in name for part in IGNORED)]
    if heads := sorted(name for name in ours if name.startswith(OTHER_HEADS)):
        warnings.warn(
            f"the checkpoint's {shorten(heads)} is left out: no text needs it", stacklevel=4
        )
    named = [(name.replace(TEXT_PREFIX, ""), name) for name in ours if name not in heads]
    if not any(name.startswith("model.") for name, _ in named):
        named = [(n if n.startswith("lm_head.") else f"model.{n}", name) for n, name in named]
    plain = {name: stored[own] for name, own in named}
    if len(plain) < len(named):
        names = [name for name, _ in named]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"the checkpoint has {shorten(twice)} twice, with and without a prefix")
    return plain


def tie(config: Config, plain: dict[str, Stored]) -> Config:
    """The head as the file has it: where it says the same as the embedding, one weight serves both.

    Fine-tuning may leave a head of its own beside a config.json that still says tied.
    """
    if not config.tied or HEAD not in plain:
        return config
    head = plain.pop(HEAD)
    if plain.setdefault(EMBEDDING, head) is head or same_values(head, plain[EMBEDDING]):
        return config
    plain[HEAD] = head
    return replace(config, tied=False)


def same_values(a: Stored, b: Stored, rows: int = 4096) -> bool:
    if a.shape != b.shape:
        return False
    with safe_open(a.path, framework="pt") as first, safe_open(b.path, framework="pt") as second:
        x, y = first.get_slice(a.name), second.get_slice(b.name)
        spans = (slice(i, i + rows) for i in range(0, a.shape[0], rows))
        return all(torch.equal(x[span].float(), y[span].float()) for span in spans)


def sources_of(plain: dict[str, Stored], decoder: Decoder) -> dict[str, list[Stored]]:
    """Our parameters -> the checkpoint's tensors, to be stacked by rows in that order.

    ValueError naming what is missing, unexpected, of another shape or not of numbers to run.
    """
    names, sources, wrong = FAMILIES[decoder.config.family].names, {}, []
    for target, parameter in decoder.named_parameters():
        module, kind = target.rsplit(".", 1)
        layer = next((word for word in module.split(".") if word.isdigit()), "#")
        hub = names[module.replace(f".{layer}.", ".#.")]
        hub = (hub,) if isinstance(hub, str) else hub
        sources[target] = [f"{name.replace('#', layer)}.{kind}" for name in hub]
        owner = decoder.get_submodule(module)
        rows = owner.parts if isinstance(owner, Stacked) and len(hub) > 1 else parameter.shape[:1]
        for name, n_rows in zip(sources[target], rows, strict=True):
            shape, tensor = (n_rows, *parameter.shape[1:]), plain.get(name)
            if tensor and tensor.shape != shape:
                wrong.append(f"{name} is {list(tensor.shape)}, not {list(shape)}")
            elif tensor and tensor.dtype not in {*STORED_DTYPES, "F64"}:
                wrong.append(f"{name} is stored as {tensor.dtype}, which no decoder runs in")
    wanted = {name for names in sources.values() for name in names}
    if missing := sorted(wanted - plain.keys()):
        raise ValueError(f"the checkpoint lacks {shorten(missing)}; {CURE}")
    if unexpected := sorted(plain.keys() - wanted):
        raise ValueError(f"the checkpoint has unknown {shorten(unexpected)}; {CURE}")
    if wrong:
        raise ValueError(f"the checkpoint does not fit its config.json: {shorten(wrong)}; {CURE}")
    return {target: [plain[name] for name in names] for target, names in sources.items()}


def load_decoder(
    folder: Path, config: Config, dtype: torch.dtype | None, device: torch.device
) -> Decoder:
    """Every tensor from its mapped file straight into its final weight, dtype and device."""
    plain = plain_names(read_headers(folder))
    config = tie(config, plain)
    with torch.device("meta"):
        decoder = Decoder(config)
    sources = sources_of(plain, decoder)
    if dtype is None:
        kind = sources["embed.weight"][0].dtype
        if kind not in STORED_DTYPES:
            raise ValueError(f"the weights are stored as {kind}; pass dtype= or another checkpoint")
        dtype = STORED_DTYPES[kind]
    progress = tqdm(sources.items(), "weights", unit="", leave=False, disable=None)
    for target, tensors in progress:
        module, _, kind = target.rpartition(".")
        shape = decoder.get_parameter(target).shape
        weight = torch.empty(shape, dtype=dtype, device=device)
        parts = weight.split([tensor.shape[0] for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            # Opened anew for each: pages that were read leave memory with the mapping.
            with safe_open(tensor.path, framework="pt") as file:
                part.copy_(file.get_tensor(tensor.name))
        setattr(decoder.get_submodule(module), kind, nn.Parameter(weight, requires_grad=False))
    return decoder.eval()


def shorten(names: list[str], most: int = 3) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - most} more" * (len(names) > most)
    return ", ".join(printable(name, 100) for name in names[:most]) + more
