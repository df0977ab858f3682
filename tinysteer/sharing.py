"""Vectors on the Hugging Face Hub: one safetensors file and a card that says what it is."""

import json
import tempfile
from pathlib import Path

from tinysteer.hub import gated, what_failed
from tinysteer.vectors import SteeringVector

FILE = "vector.safetensors"
CARD = """\
---
library_name: tinysteer
{base_model}tags:
- steering-vector
- activation-steering
---

# {title}

A steering vector for `tinysteer`: added to the residual stream of
{model}, it makes the model behave as if it had been given an instruction.

```python
import tinysteer as ts

model = ts.load({source})
vector = ts.SteeringVector.from_hub("{repo}")
model.complete("...", steer=[vector.at({layer}).add()])
```

Which layer is best is for you to find out; {layer} is only the middle one of {n_layers}. Layer L is
the residual stream after block L, counted from 0.

## Where it comes from

| | |
|---|---|
{provenance}

## What it holds

{n_layers} directions of unit length and width {dim}; for each the mean difference's length along it
(norm), and the mean projection of the states with the instruction (target) and without (baseline).

| layer | norm | target | baseline |
|---|---|---|---|
{layers}
"""


def card(vector: SteeringVector, repo: str) -> str:
    """The repository's README.md."""
    model = vector.metadata.get("model", "")
    on_hub = model.count("/") == 1  # as in owner/name
    numbers = zip(vector.norms, vector.targets, vector.baselines, strict=True)
    return CARD.format(
        base_model=f"base_model: {json.dumps(model)}\n" if on_hub else "",
        title=cell(vector.metadata.get("name") or vector.metadata.get("formula", ""))
        or repo.split("/")[-1],
        model=f"`{model}`" if model else "a language model",
        source=json.dumps(model or "..."),
        repo=repo,
        layer=vector.n_layers // 2,
        n_layers=vector.n_layers,
        dim=vector.dim,
        provenance="\n".join(
            f"| {key} | {cell(value)} |" for key, value in sorted(vector.metadata.items())
        ),
        layers="\n".join(
            f"| {layer} | " + " | ".join(f"{float(x):.3f}" for x in row) + " |"
            for layer, row in enumerate(numbers)
        ),
    )


def cell(text: str) -> str:
    """Text that may stand in a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")


def push(vector: SteeringVector, repo: str, private: bool) -> str:
    """Make the repository where there is none, write file and card in one commit -> its address."""
    from huggingface_hub import HfApi, errors

    check_id(repo)
    api = HfApi(token=True)
    try:
        with tempfile.TemporaryDirectory() as folder:
            vector.save(Path(folder) / FILE)
            (Path(folder) / "README.md").write_text(card(vector, repo), encoding="utf-8")
            api.create_repo(repo, private=private, exist_ok=True)
            done = api.upload_folder(
                repo_id=repo, folder_path=folder, commit_message="Steering vector"
            )
    except errors.LocalTokenNotFoundError:
        raise PermissionError(
            "uploading needs an account: set HF_TOKEN to a token that may write, or run "
            "`hf auth login`"
        ) from None
    except (OSError, errors.HTTPError) as error:
        raise what_failed(error, repo, f"the Hub did not take {repo}: try again later") from None
    return str(done.repo_url)


def pull(repo: str, revision: str | None) -> SteeringVector:
    """What `push` wrote, through the Hub's cache."""
    from huggingface_hub import errors, hf_hub_download

    check_id(repo)
    unreachable = f"the Hub's cache here does not hold {repo}, and the Hub cannot be reached"
    try:
        path = hf_hub_download(repo, FILE, revision=revision)
    except errors.GatedRepoError:
        raise gated(repo) from None
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
        at = f" at revision {revision!r}" if revision else ""
        raise FileNotFoundError(
            f"the Hugging Face Hub has no {repo}{at} (where it is private, set HF_TOKEN)"
        ) from None
    except errors.LocalEntryNotFoundError as error:
        raise what_failed(error, repo, unreachable) from None
    except errors.EntryNotFoundError:
        raise FileNotFoundError(f"{repo} holds no {FILE}: it is no tinysteer vector") from None
    except (OSError, errors.HTTPError) as error:
        raise what_failed(error, repo, unreachable) from None
    return SteeringVector.load(path)


def check_id(repo: str) -> None:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    wrong = ValueError(f"{repo!r} is no Hugging Face Hub id (owner/name)")
    try:
        validate_repo_id(repo)
    except HFValidationError:
        raise wrong from None
    if repo.count("/") != 1:
        raise wrong
