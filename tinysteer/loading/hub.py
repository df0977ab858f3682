"""A model's files: embedded in the package, in a folder, or from the Hugging Face Hub; and what is
published there.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tinysteer.loading.checkpoint import read_index

# All that a model needs; the index names more. Not "*.safetensors": some hold weights twice.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
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
    what to do: ValueError, FileNotFoundError, PermissionError, ConnectionError.
    """
    if not isinstance(source, str | Path) or not str(source):
        raise ValueError(f"a model is a folder, a Hub id or one of {EMBEDDED}, not {source!r:.60}")
    if revision is not None and not (isinstance(revision, str) and revision):
        raise ValueError(f"revision is {revision!r:.60}; it must be a branch, tag or commit")
    embedded = is_embedded(source)
    folder = ASSETS / source if embedded else Path(source).expanduser()
    if folder.is_dir():
        if revision is not None:
            kind = "comes with the package" if embedded else "is a folder"
            raise ValueError(f"revision={revision!r} is for Hub ids; {source} {kind}")
        return folder
    if embedded:
        raise FileNotFoundError(f"{folder} is not there: install the package unzipped, by pip")
    if folder.is_file():
        raise ValueError(f"{folder} is a file: give the folder that holds it and its config.json")
    from huggingface_hub import HfApi, snapshot_download  # 0.2 s that a folder need not pay

    nowhere = f"there is no folder {source}, and "
    patterns = [*CONFIG, *TEXT, *(WEIGHTS if weights else WEIGHTS[1:])]
    with sentences(source, revision, nowhere):
        path = Path(snapshot_download(str(source), revision=revision, allow_patterns=patterns))
        if weights and (files := shards(path)):
            snapshot_download(str(source), revision=revision, allow_patterns=files)
    if absent := lacking(path, weights):
        # Without a Hub a cached half passes for all: this raises if there is none.
        with sentences(source, revision, nowhere, f" (it lacks {', '.join(absent)})"):
            HfApi().model_info(str(source), revision=revision)
    return path


@contextmanager
def sentences(
    source: str | Path, revision: str | None, nowhere: str = "", lacks: str = ""
) -> Iterator[None]:
    """The Hub's errors, and its client's, as sentences that say what to do.

    nowhere: where else was looked, as a sentence's beginning. lacks: what the cache has not.
    """
    from huggingface_hub import errors

    try:
        yield
    except errors.HFValidationError:
        raise FileNotFoundError(
            f"{nowhere}it is no Hugging Face Hub id (owner/name) either"
        ) from None
    except errors.GatedRepoError:
        raise PermissionError(
            f"{source} is gated: accept its terms at https://huggingface.co/{source}, then set "
            "HF_TOKEN to a token of that account or run `hf auth login`"
        ) from None
    except errors.RepositoryNotFoundError:
        raise FileNotFoundError(
            f"{nowhere}the Hugging Face Hub has no {source} (where it is private, set HF_TOKEN to "
            "a token that may read it)"
        ) from None
    except errors.RevisionNotFoundError:
        raise FileNotFoundError(f"{source} has no revision {revision!r} on the Hub") from None
    except (OSError, errors.HTTPError) as error:  # the latter is the HTTP client's own
        at = f" at {revision!r:.60}" if revision else ""
        unreachable = (
            f"{nowhere}the Hub's cache here does not hold all of {source}{at}{lacks}, and the Hub "
            "cannot be reached: connect, or pass the folder of a model"
        )
        raise what_failed(error, source, unreachable) from None


def lacking(folder: Path, weights: bool) -> list[str]:
    """The files that every model has and `folder` has not; shards are those its index names."""
    needed = ["config.json", "tokenizer.json"]
    if weights:
        needed += shards(folder) or [WEIGHTS[0]]
    return [file for file in needed if not (folder / file).exists()]


def shards(folder: Path) -> list[str]:
    """The files of weights that an index names, none where one file holds all. ValueError."""
    single, index = (folder / file for file in WEIGHTS)
    whole = single.exists() or not index.exists()
    return [] if whole else sorted({*read_index(index).values()})


def is_embedded(source: str | Path) -> bool:
    """Whether it names a model of the package; a folder of that name is ./NAME, or a Path."""
    return isinstance(source, str) and source in EMBEDDED


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
    with sentences(repo, revision):
        try:
            return Path(hf_hub_download(repo, file, revision=revision))
        except errors.EntryNotFoundError as error:
            if isinstance(error, errors.LocalEntryNotFoundError):  # that one is the network's
                raise
    raise FileNotFoundError(f"{repo} holds no {file}: it is no tinysteer vector")


def check_id(repo: str) -> None:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo)
        whole = repo.count("/") == 1
    except HFValidationError:
        whole = False
    if not whole:
        raise ValueError(f"{repo!r} is no Hugging Face Hub id (owner/name)")
