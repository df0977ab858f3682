"""Loading a folder: what is equal, what is accepted, and one clear sentence for what is not."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import VARIANTS, make_checkpoint
from hub_names import to_hub
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import tinysteer as ts
from tinysteer.loading.checkpoint import EMBEDDING, HEAD, INDEX
from tinysteer.loading.families import IGNORED, TEXT_PREFIX

TOKENS = torch.tensor([[1, 5, 9, 200, 7]])
Q, K = (f"model.layers.1.self_attn.{part}_proj.weight" for part in "qk")


@pytest.fixture
def folder(checkpoint, tmp_path) -> Path:
    """A copy of a tiny checkpoint, to be changed."""
    return Path(shutil.copytree(checkpoint("llama: grouped heads")[0], tmp_path / "copy"))


def configure(folder: Path, name: str = "config.json", **settings):
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def rewrite(folder: Path, change):
    """Write model.safetensors anew with `change` of its tensors, a dict by name."""
    tensors = change(load_file(folder / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def in_shards(folder: Path) -> list[Path]:
    """Split model.safetensors into three, as the Hub does with large ones."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for i in range(3):
        file = f"model-{i + 1:05}-of-00003.safetensors"
        names = sorted(tensors)[i::3]
        save_file({name: tensors[name] for name in names}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return sorted(folder.glob("model-*"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_decoder_says_its_weights_by_the_names_it_was_loaded_from(variant, checkpoint):
    folder, _ = checkpoint(variant)
    stored = load_file(folder / "model.safetensors")
    stored = {k.replace(TEXT_PREFIX, ""): v for k, v in stored.items()}
    text = {k: v for k, v in stored.items() if not any(part in k for part in IGNORED)}
    told = to_hub(ts.load(folder).decoder)
    assert told.keys() == text.keys()
    assert all(torch.equal(told[name], text[name]) for name in text)


def test_one_file_equals_shards(checkpoint, tmp_path):
    whole, _ = checkpoint("llama: grouped heads")
    shards, _ = make_checkpoint("llama: grouped heads", tmp_path, max_shard_size="100KB")
    assert len(list(shards.glob("model-*-of-*.safetensors"))) > 1
    assert not (shards / "model.safetensors").exists()
    assert torch.equal(ts.load(whole).logits(TOKENS), ts.load(shards).logits(TOKENS))


def test_the_text_part_of_a_multimodal_model_goes_by_either_of_its_names(checkpoint, tmp_path):
    source, theirs = checkpoint("gemma3: text part of a multimodal model")
    folder = Path(shutil.copytree(source, tmp_path / "copy"))
    with torch.no_grad():
        expected = theirs(TOKENS).logits
    outside, inside = "language_model.model.", "model.language_model."
    for old, new in ((inside, outside), (outside, inside)):
        rewrite(
            folder, lambda tensors, o=old, n=new: {k.replace(o, n): t for k, t in tensors.items()}
        )
        assert f"{new}embed_tokens.weight" in load_file(folder / "model.safetensors")
        assert (ts.load(folder).logits(TOKENS) - expected).abs().max() < 2e-4


def test_the_dtype_is_the_checkpoints_own_or_the_one_asked_for(folder):
    exact = ts.load(folder)
    assert exact.dtype == torch.float32
    rewrite(folder, lambda tensors: {name: t.bfloat16() for name, t in tensors.items()})
    assert ts.load(folder).dtype == torch.bfloat16
    rounded = exact.decoder.to(torch.bfloat16).to(torch.float32).state_dict()
    for dtype in ("float32", torch.float32):
        model = ts.load(folder, dtype=dtype)
        assert model.dtype == torch.float32
        torch.testing.assert_close(model.decoder.state_dict(), rounded, atol=0, rtol=0)
    assert ts.load(folder, dtype="float16").dtype == torch.float16


def test_a_model_is_named_after_its_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)
    for source in (folder, str(folder), "."):
        assert ts.load(source).name == "copy"


def test_nothing_of_a_model_is_trained(folder):
    model = ts.load(folder)
    assert not model.decoder.training
    assert not any(parameter.requires_grad for parameter in model.decoder.parameters())


@pytest.fixture
def tied(checkpoint, tmp_path) -> Path:
    return Path(shutil.copytree(checkpoint("llama: tied head")[0], tmp_path / "copy"))


def test_a_head_that_says_the_same_as_the_embedding_stays_tied(tied):
    expected = ts.load(tied).logits(TOKENS)
    rewrite(tied, lambda tensors: tensors | {HEAD: tensors[EMBEDDING].clone()})
    model = ts.load(tied)
    assert model.config.tied
    assert torch.equal(model.logits(TOKENS), expected)
    rewrite(tied, lambda tensors: {n: t for n, t in tensors.items() if n != EMBEDDING})
    assert torch.equal(ts.load(tied).logits(TOKENS), expected)  # the head alone


def test_a_head_of_its_own_is_used_although_config_json_says_tied(tied):
    head = torch.randn(300, 48, generator=torch.Generator().manual_seed(0))
    rewrite(tied, lambda tensors: tensors | {HEAD: head})
    model = ts.load(tied)
    configure(tied, tie_word_embeddings=False)
    assert not model.config.tied
    assert torch.equal(model.logits(TOKENS), ts.load(tied).logits(TOKENS))
    transformers = pytest.importorskip("transformers")
    with torch.no_grad():  # what transformers makes of it, once it is told
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tied)(TOKENS).logits
    torch.testing.assert_close(model.logits(TOKENS), theirs, rtol=2e-4, atol=2e-4)


def test_a_bare_model_and_a_head_for_values_are_loaded(tied):
    expected = ts.load(tied).logits(TOKENS)
    bare = {"v_head.summary.weight": torch.ones(1, 48)}
    rewrite(tied, lambda ts: bare | {n.removeprefix("model."): t for n, t in ts.items()})
    with pytest.warns(UserWarning, match=r"the checkpoint's v_head\.summary\.weight is left out"):
        assert torch.equal(ts.load(tied).logits(TOKENS), expected)


def test_of_two_tensors_by_one_name_the_index_says_which(folder):
    expected = ts.load(folder).logits(TOKENS)
    for shard in in_shards(folder):
        save_file({K: torch.zeros(24, 48)} | load_file(shard), shard, {"format": "pt"})
    assert torch.equal(ts.load(folder).logits(TOKENS), expected)


def test_a_link_is_followed_wherever_it_leads(folder, tmp_path):
    """So the Hub's cache is built."""
    expected = ts.load(folder).logits(TOKENS)
    moved = (folder / "model.safetensors").rename(tmp_path / "blob")
    (folder / "model.safetensors").symlink_to(moved)
    assert torch.equal(ts.load(folder).logits(TOKENS), expected)
    moved.unlink()
    refused(folder, ValueError, r"model\.safetensors is a link to nothing: delete that folder")


def indexed(weight_map):
    """Weights by an index that says so."""

    def do(folder: Path):
        (folder / "model.safetensors").rename(folder / "other.safetensors")
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))

    return do


def stored_as(dtype: torch.dtype):
    return lambda folder: rewrite(folder, lambda ts: ts | {K: torch.ones(24, 48).to(dtype)})


def test_buffers_of_old_checkpoints_are_accepted(folder):
    expected = ts.load(folder).logits(TOKENS)
    old = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(6) for i in range(4)}
    rewrite(folder, lambda tensors: tensors | old)
    assert torch.equal(ts.load(folder).logits(TOKENS), expected)


def test_the_files_are_free_once_a_model_is_loaded(folder):
    model = ts.load(folder)
    expected = model.logits(TOKENS)
    with open(folder / "model.safetensors", "r+b") as file:
        file.write(b"\0" * (folder / "model.safetensors").stat().st_size)
    assert torch.equal(model.logits(TOKENS), expected)


def swap(folder: Path):
    """Queries' rows where keys' belong and the other way round: together they still fit."""
    rewrite(folder, lambda tensors: tensors | {Q: tensors[K], K: tensors[Q]})


def only_a_pickle(folder: Path):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def without(folder: Path, setting: str):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    del config[setting]
    path.write_text(json.dumps(config))


BAD = {  # what is done to a folder, and the sentence
    "a tensor is missing": (
        lambda folder: rewrite(folder, lambda ts: {name: ts[name] for name in ts if name != K}),
        rf"^the checkpoint lacks {K}; is it complete, and is its config.json its own\?$",
    ),
    "a tensor is unexpected": (
        lambda folder: rewrite(folder, lambda tensors: tensors | {"x.bias": torch.ones(2)}),
        r"^the checkpoint has unknown x\.bias; is it complete, and is its config\.json",
    ),
    "queries and keys are swapped": (
        swap,
        rf"does not fit its config\.json: {Q} is \[24, 48\], not \[48, 48\], "
        rf"{K} is \[48, 48\], not \[24, 48\]; is it complete",
    ),
    "a shard is cut short": (
        lambda folder: os.truncate(in_shards(folder)[1], 5000),
        r"model-00002-of-00003\.safetensors is cut short",
    ),
    "the index names no tensors": (
        lambda folder: (
            (folder / "model.safetensors").rename(folder / "x.safetensors")
            and (folder / "model.safetensors.index.json").write_text("{}")
        ),
        r"model\.safetensors\.index\.json has no weight_map; download it again",
    ),
    "the weights are of a dtype that no model is run in": (
        lambda folder: rewrite(folder, lambda ts: {name: t.double() for name, t in ts.items()}),
        r"the weights are stored as F64; pass dtype= ",
    ),
    "a file of the index leads out of the folder": (
        indexed({K: "../other.safetensors"}),
        r"index\.json names '\.\./other\.safetensors': not a safetensors file of its folder$",
    ),
    "a file of the index lies elsewhere": (
        indexed({K: "/etc/model.safetensors"}),
        r"index\.json names '/etc/model\.safetensors': not a safetensors file of its folder$",
    ),
    "the index is a list": (indexed([K]), r"weight_map is not a table of files' names"),
    "the index names a number": (indexed({K: 5}), r"weight_map is not a table of files' names"),
    "the index promises more": (
        indexed({"x.weight": "other.safetensors"}),
        r"index\.json names x\.weight, which its files lack; download it again$",
    ),
    "a shard is a folder": (
        lambda folder: [shard.unlink() or shard.mkdir() for shard in in_shards(folder)[:1]],
        r"model-00001-of-00003\.safetensors is a folder, not a file",
    ),
    "weights are whole numbers": (stored_as(torch.int8), rf"{K} is stored as I8, which no decoder"),
    "weights are truth values": (stored_as(torch.bool), rf"{K} is stored as BOOL, which no"),
    "weights are complex": (stored_as(torch.complex64), rf"{K} is stored as C64, which no"),
    "weights lack their scales": (stored_as(torch.float8_e4m3fn), rf"{K} is stored as F8_E4M3, "),
    "names come twice": (
        lambda folder: rewrite(folder, lambda ts: ts | {f"language_model.{K}": ts[K].clone()}),
        rf"the checkpoint has {K} twice, with and without a prefix$",
    ),
    "the header is longer than any": (
        lambda folder: (folder / "model.safetensors").write_bytes(
            (20 << 20).to_bytes(8, "little") + b"{" + b" " * (20 << 20)
        ),
        r"has a header of more than 16 MB: it is no checkpoint's$",
    ),
    "a name would be printed": (
        lambda folder: rewrite(folder, lambda ts: ts | {"a\x1b[2J\nb" * 99: torch.ones(2)}),
        r"the checkpoint has unknown model\.a\\x1b\[2J\\nb|has unknown a\\x1b\[2J\\nb",
    ),
    "config.json lacks a setting": (
        lambda folder: without(folder, "num_attention_heads"),
        r"config\.json: there is no 'num_attention_heads'$",
    ),
    "there is no model_type": (
        lambda folder: without(folder, "model_type"),
        r"config\.json: model_type None is not supported; those that are: llama, ",
    ),
}
ABSENT = {
    "a shard is missing": (
        lambda folder: in_shards(folder)[1].unlink(),
        r"copy lacks model-00002-of-00003\.safetensors, which model\.safetensors\.index\.json "
        "names; download it again$",
    ),
    "the weights are a pickle": (
        only_a_pickle,
        r"no model\.safetensors: only pytorch_model\.bin, a pickle, which can run code when read; "
        "convert the checkpoint to safetensors or choose one that has them",
    ),
    "there are no weights": (
        lambda folder: (folder / "model.safetensors").unlink(),
        r"no model\.safetensors: convert the checkpoint to safetensors",
    ),
    "it is an adapter": (
        lambda folder: (
            (folder / "config.json").rename(folder / "adapter_config.json")
            and configure(folder, "adapter_config.json", base_model_name_or_path="owner/base")
        ),
        r"copy is a LoRA adapter of 'owner/base', not a model: merge it into that \(peft: merge_",
    ),
    "it is for llama.cpp": (
        lambda folder: (folder / "model.safetensors").rename(folder / "model-q4.gguf"),
        r"no model\.safetensors: model-q4\.gguf is GGUF, for llama\.cpp; take the repository that",
    ),
    "it is as its maker has it": (
        lambda folder: (folder / "model.safetensors").rename(folder / "consolidated.safetensors"),
        r"consolidated\.safetensors is its maker's own layout; take model\.safetensors from the",
    ),
    "there is no config.json": (
        lambda folder: (folder / "config.json").unlink(),
        r"copy has no config\.json: it is not a model's folder",
    ),
    "there is no tokenizer.json": (
        lambda folder: (folder / "tokenizer.json").unlink(),
        r"copy has no tokenizer\.json; where it has a tokenizer\.model, convert that with transf",
    ),
}
SETTINGS = {  # a sentence, and what config.json says then
    r"lacks model\.layers\.4\.\S+, \S+, \S+ and 15 more; is it complete": {"num_hidden_layers": 6},
    r"does not fit its config\.json: model\.embed_tokens\.weight is \[300, 48\], not "
    r"\[301, 48\], lm_head\.weight is": {"vocab_size": 301},
    r"config\.json: model_type 'mamba' is not supported; those that are: "
    "llama, mistral, phi3, gemma, gemma2, gemma3_text, gemma3$": {"model_type": "mamba"},
    r"config\.json: rope type 'yarn' is not supported; those that are: default, linear, llama3, ": {
        "rope_parameters": {"rope_type": "yarn", "factor": 4.0}
    },
    r"config\.json: LongRoPE has 2 factors for 6 pairs of dimensions$": {
        "rope_parameters": {"type": "longrope", "short_factor": [1, 2], "long_factor": [1, 2]}
    },
    r"config\.json: hidden_act 'relu2' is not supported; those that are: silu, gelu, gelu_py": {
        "hidden_act": "relu2"
    },
    r"config\.json: hidden_act 'relu3' is not supported; those": {"hidden_activation": "relu3"},
    r"config\.json: this checkpoint is quantized; load the original, unquantized one$": {
        "quantization_config": {"quant_method": "gptq"}
    },
    r"config\.json: this model attends in both directions: it does not generate text$": {
        "use_bidirectional_attention": True
    },
}
CUT = r"model\.safetensors is cut short or is no safetensors file .*; download it again"
FILES = {  # a file and what it holds, or how many bytes of it are left: the sentence
    ("model.safetensors", 50_000): CUT,  # in its weights
    ("model.safetensors", 100): CUT,  # in its header
    ("model.safetensors", b""): CUT,
    (
        "model.safetensors",
        b"version https://git-lfs.git",
    ): r"safetensors is a pointer of Git LFS, .*: run `git lfs pull`",
    ("config.json", b"{"): r"copy.config\.json is not valid JSON: ",
    ("config.json", b"\xff\xfe\x00"): r"copy.config\.json is not valid JSON: ",
    ("config.json", b"[]"): r"copy.config\.json holds a list, not a JSON object$",
    ("tokenizer.json", 500): r"copy.tokenizer\.json is damaged: ",
    ("tokenizer_config.json", 9): r"copy.tokenizer_config\.json is not valid JSON: ",
}


def refused(folder: Path, error: type[Exception], sentence: str):
    with pytest.raises(error, match=sentence) as raised:
        ts.load(folder)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("damage", BAD | ABSENT)
def test_what_is_wrong_is_said_in_one_sentence(damage, folder):
    do, sentence = (BAD | ABSENT)[damage]
    do(folder)
    refused(folder, FileNotFoundError if damage in ABSENT else ValueError, sentence)


@pytest.mark.parametrize("sentence", SETTINGS)
def test_a_setting_that_is_not_supported_is_named(sentence, folder):
    configure(folder, **SETTINGS[sentence])
    refused(folder, ValueError, sentence)


@pytest.mark.parametrize(("file", "left"), FILES)
def test_a_damaged_file_is_named(file, left, folder):
    whole = (folder / file).read_bytes()
    (folder / file).write_bytes(whole[:left] if isinstance(left, int) else left)
    refused(folder, ValueError, FILES[file, left])


@pytest.mark.parametrize("dtype", ["float64", torch.float64, "bf16", "int8", "nn", 32])
def test_a_dtype_that_no_model_is_run_in_is_refused(dtype, folder):
    with pytest.raises(ValueError, match="not supported; those that are: float32, bfloat16, flo"):
        ts.load(folder, dtype=dtype)


def test_no_other_part_of_a_checkpoint_is_read(folder):
    """A pickle beside the weights may hold anything."""
    (folder / "pytorch_model.bin").write_bytes(b"not a pickle")
    (folder / "consolidated.safetensors").write_bytes(b"not safetensors")
    assert ts.load(folder).logits(TOKENS).isfinite().all()


def test_a_multimodal_checkpoint_keeps_its_vision_to_itself(checkpoint):
    folder, _ = checkpoint("gemma3: text part of a multimodal model")
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert any("vision_tower" in name for name in file.keys())  # noqa: SIM118 (it is no dict)
    names = [name for name, _ in ts.load(folder).decoder.named_parameters()]
    assert not any("vision" in name for name in names)


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "meta"])
def test_a_device_that_is_not_there_is_refused(device, folder):
    with pytest.raises(ValueError, match=f"torch has no device '{device}' here"):
        ts.load(folder, device=device)
