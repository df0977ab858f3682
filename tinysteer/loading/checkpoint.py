"""Safetensors files, one or in shards, of a folder or the Hub -> a decoder in memory."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from tqdm import tqdm

from tinysteer.loading.families import FAMILIES, IGNORED, TEXT_PREFIX, read_config
from tinysteer.model.config import Config
from tinysteer.model.decoder import Decoder, Stacked
from tinysteer.text.files import read_json

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STORED_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
CURE = "is it complete, and is its config.json its own?"


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
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"{folder} has no config.json: it is not a model's folder")
    return read_config(read_json(folder / "config.json"))


@dataclass(frozen=True)
class Stored:
    """A tensor in a file, not read yet."""

    path: Path
    shape: tuple[int, ...]
    dtype: str  # as safetensors spells it: "BF16"


def read_headers(folder: Path) -> dict[str, Stored]:
    """Every tensor of a checkpoint by its name, and where it is; reads no weights."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if single.exists():
        paths = [single]
    elif index.exists():
        weight_map = read_json(index).get("weight_map")
        if not weight_map:
            raise ValueError(f"{index} has no weight_map; download it again")
        paths = [folder / file for file in sorted(set(weight_map.values()))]
        if absent := [path.name for path in paths if not path.exists()]:
            raise FileNotFoundError(
                f"{folder} lacks {shorten(absent)}, which {index.name} names; download it again"
            )
    else:
        pickles = sorted(path.name for path in [*folder.glob("*.bin"), *folder.glob("*.pt*")])
        found = f"only {shorten(pickles)}, a pickle, which can run code when read; " * bool(pickles)
        raise FileNotFoundError(
            f"{folder} has no model.safetensors: {found}convert the checkpoint to safetensors "
            "or choose one that has them"
        )
    stored = {}
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (it is no dict)
                    part = file.get_slice(name)
                    stored[name] = Stored(path, tuple(part.get_shape()), part.get_dtype())
        except SafetensorError as error:
            raise ValueError(
                f"{path} is cut short or is no safetensors file ({error}); download it again"
            ) from None
    return stored


def sources_of(stored: dict[str, Stored], decoder: Decoder) -> dict[str, list[str]]:
    """Our parameters -> the checkpoint's tensors, to be stacked by rows in that order.

    ValueError naming what is missing, unexpected or of another shape.
    """
    # A text model inside a multimodal one: its tensors by their plain names.
    ours = (name for name in stored if not any(part in name for part in IGNORED))
    plain = {name.replace(TEXT_PREFIX, ""): name for name in ours}
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
            shape, tensor = (n_rows, *parameter.shape[1:]), stored.get(plain.get(name, ""))
            if tensor and tensor.shape != shape:
                wrong.append(f"{name} is {list(tensor.shape)}, not {list(shape)}")
    wanted = {name for names in sources.values() for name in names}
    unexpected = plain.keys() - wanted - ({"lm_head.weight"} if decoder.config.tied else set())
    if missing := sorted(wanted - plain.keys()):
        raise ValueError(f"the checkpoint lacks {shorten(missing)}; {CURE}")
    if unexpected:
        raise ValueError(f"the checkpoint has unknown {shorten(sorted(unexpected))}; {CURE}")
    if wrong:
        raise ValueError(f"the checkpoint does not fit its config.json: {shorten(wrong)}; {CURE}")
    return {target: [plain[name] for name in names] for target, names in sources.items()}


def load_decoder(
    folder: Path, config: Config, dtype: torch.dtype | None, device: torch.device
) -> Decoder:
    """Every tensor from its mapped file straight into its final weight, dtype and device."""
    stored = read_headers(folder)
    with torch.device("meta"):
        decoder = Decoder(config)
    sources = sources_of(stored, decoder)
    if dtype is None:
        kind = stored[sources["embed.weight"][0]].dtype
        if kind not in STORED_DTYPES:
            raise ValueError(f"the weights are stored as {kind}; pass dtype= or another checkpoint")
        dtype = STORED_DTYPES[kind]
    progress = tqdm(sources.items(), "weights", unit="", leave=False, disable=None)
    for target, names in progress:
        module, _, kind = target.rpartition(".")
        shape = decoder.get_parameter(target).shape
        weight = torch.empty(shape, dtype=dtype, device=device)
        parts = weight.split([stored[name].shape[0] for name in names])
        for name, part in zip(names, parts, strict=True):
            # Opened anew for each: pages that were read leave memory with the mapping.
            with safe_open(stored[name].path, framework="pt") as file:
                part.copy_(file.get_tensor(name))
        setattr(decoder.get_submodule(module), kind, nn.Parameter(weight, requires_grad=False))
    return decoder.eval()


def shorten(names: list[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" * (len(names) > most)
    return ", ".join(names[:most]) + more
