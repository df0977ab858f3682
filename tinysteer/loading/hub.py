"""A model's files: embedded in the package, in a folder, or from the Hugging Face Hub; and what is
published there.
"""

from pathlib import Path

# All that a model needs. Not "*.safetensors": some repositories hold their weights twice.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors")
TEXT = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
)
CONFIG = ("config.json", "generation_config.json")
ASSETS = Path(__file__).parents[1] / "assets"
EMBEDDED = ("tiny-instruct", "tiny-base")  # models that come with the package


def fetch(source: str | Path, revision: str | None = None, weights: bool = True) -> Path:
    """The folder with the files of `source`: an EMBEDDED name, a folder, or a Hub id.

    Downloads what is missing from the Hub's cache, with progress bars; without a network the
    cache alone serves. A token in HF_TOKEN, or saved by `hf auth login`, is used. Errors say
    what to do: FileNotFoundError, PermissionError, ConnectionError.
    """
    embedded = is_embedded(source)
    folder = ASSETS / source if embedded else Path(source).expanduser()
    if folder.is_dir():
        if revision is not None:
            kind = "comes with the package" if embedded else "is a folder"
            raise ValueError(f"revision={revision!r} is for Hub ids; {source} {kind}")
        return folder
    from huggingface_hub import errors, snapshot_download  # 0.2 s that a folder need not pay

    missing = f"there is no folder {source}, and the Hugging Face Hub has no model of that name"
    try:
        found = snapshot_download(
            str(source),
            revision=revision,
            allow_patterns=[*CONFIG, *TEXT, *(WEIGHTS if weights else WEIGHTS[1:2])],
        )
    except errors.HFValidationError:
        raise FileNotFoundError(
            f"there is no folder {source}, and it is no Hugging Face Hub id (owner/name) either"
        ) from None
    except errors.GatedRepoError:
        raise gated(source) from None
    except errors.RepositoryNotFoundError:
        raise FileNotFoundError(
            f"{missing} (where it is private, set HF_TOKEN to a token that may read it)"
        ) from None
    except errors.RevisionNotFoundError:
        raise FileNotFoundError(f"{source} has no revision {revision!r} on the Hub") from None
    except (OSError, errors.HTTPError) as error:  # the latter is the HTTP client's own
        unreachable = (
            f"there is no folder {source}, the Hub's cache here does not hold all of that model, "
            "and the Hub cannot be reached: connect, or pass the folder of a model"
        )
        raise what_failed(error, source, unreachable) from None
    return Path(found)


def is_embedded(source: str | Path) -> bool:
    """Whether it names a model of the package; a folder of that name is ./NAME, or a Path."""
    return isinstance(source, str) and source in EMBEDDED


def gated(source: str | Path) -> PermissionError:
    return PermissionError(
        f"{source} is gated: accept its terms at https://huggingface.co/{source}, then set "
        "HF_TOKEN to a token of that account or run `hf auth login`"
    )


def what_failed(error: Exception, source: str | Path, unreachable: str) -> Exception:
    """What to raise for an error of the network, of the Hub or of this machine's disk."""
    cause = error.__cause__ or error
    status = getattr(getattr(cause, "response", None), "status_code", None)
    if status in (401, 403):
        return PermissionError(
            f"the Hub refuses {source} to you (HTTP {status}): check the token in HF_TOKEN or log "
            "in anew with `hf auth login`"
        )
    if getattr(error, "errno", None) and not isinstance(error, ConnectionError | TimeoutError):
        return error  # the disk's own words: no space, no permission
    return ConnectionError(f"{unreachable} ({status or type(cause).__name__})")


def push(folder: str | Path, repo: str, *, private: bool, message: str) -> str:
    """A folder's files as one commit to `repo`, which is made where there is none -> its address.

    ValueError for what is not an id, PermissionError, ConnectionError.
    """
    from huggingface_hub import HfApi, errors

    check_id(repo)
    api = HfApi(token=True)
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        done = api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message)
    except errors.LocalTokenNotFoundError:
        raise PermissionError(
            "uploading needs an account: set HF_TOKEN to a token that may write, or run "
            "`hf auth login`"
        ) from None
    except (OSError, errors.HTTPError) as error:
        raise what_failed(error, repo, f"the Hub did not take {repo}: try again later") from None
    return str(done.repo_url)


def pull(repo: str, file: str, revision: str | None = None) -> Path:
    """One file of a repository that `push` wrote, through the Hub's cache -> its path.

    FileNotFoundError, PermissionError, ConnectionError.
    """
    from huggingface_hub import errors, hf_hub_download

    check_id(repo)
    unreachable = f"the Hub's cache here does not hold {repo}, and the Hub cannot be reached"
    try:
        path = hf_hub_download(repo, file, revision=revision)
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
        raise FileNotFoundError(f"{repo} holds no {file}: it is no tinysteer vector") from None
    except (OSError, errors.HTTPError) as error:
        raise what_failed(error, repo, unreachable) from None
    return Path(path)


def check_id(repo: str) -> None:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    wrong = ValueError(f"{repo!r} is no Hugging Face Hub id (owner/name)")
    try:
        validate_repo_id(repo)
    except HFValidationError:
        raise wrong from None
    if repo.count("/") != 1:
        raise wrong
