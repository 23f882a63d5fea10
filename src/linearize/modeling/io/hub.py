"""The Hub: a model's files at one commit, fetched into transformers' cache, and folders uploaded."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from linearize.errors import InputError, one_line
from linearize.modeling.io.model_source import looks_local
from linearize.phases import phase
from linearize.storage.files import expand_home

DOCUMENTS = ("*.json", "*.yaml", "*.txt", "*.jinja", "*.model", "*.tiktoken", "tokenizer*", "README.md")
LEFT_OUT = ("original/*", "onnx/*", "openvino/*", "consolidated*")
NOT_UPLOADED = ("log/*", ".*")


@dataclass(frozen=True)
class LocalCopy:
    """`name`: as it was given, `~` written out. `path`: the folder or file here. `commit`: of a Hub model."""

    name: str
    path: str
    commit: str | None = None


def local_copy(
    name: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | None = None,
    code: bool = False,
    weights: bool = True,
) -> LocalCopy:
    """A model on this machine: itself where it is a folder or file, else fetched from the Hub, or from its cache.

    Args:
        revision: a branch, tag or commit of a Hub model; None: its main branch.
        token: to read with; None: HF_TOKEN, or that of `hf auth login`.
        code: fetch Python files too. weights: fetch safetensors too.

    Raises:
        InputError: a revision of a folder, a model or revision that is not there or may not be read, or no network.
    """
    name = expand_home(name)
    if looks_local(name):
        if revision is not None:
            raise InputError(f"revision {revision!r} given, but {name} is on this machine: revisions are of Hub names")
        return LocalCopy(name, name)
    from huggingface_hub import snapshot_download

    patterns = [*DOCUMENTS, *(["*.py"] if code else []), *(["*.safetensors"] if weights else [])]
    with _hub_errors(f"cannot read {name} from the Hub"), phase(f"fetching {name}"):
        folder = snapshot_download(
            name, revision=revision, token=token, allow_patterns=patterns, ignore_patterns=list(LEFT_OUT)
        )
    return LocalCopy(name, folder, Path(folder).name)


def create_repository(name: str, *, private: bool | None = None, token: str | None = None) -> str:
    """The full name of a model repository, which is made where there is none; needs the network and a token.

    Raises:
        InputError: an invalid name, no network, or a token that may not write there.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.constants import is_offline_mode

    if is_offline_mode():
        raise InputError(f"cannot upload to {name}: HF_HUB_OFFLINE is set; unset it, or leave the upload out")
    with _hub_errors(f"cannot upload to {name}"):
        return str(HfApi(token=token).create_repo(name, private=private, exist_ok=True).repo_id)


def upload(folder: Path, name: str, *, token: str | None = None, message: str, revision: str | None = None) -> str:
    """Upload a student's folder, but for its training log, as one commit; returns the commit's address.

    Raises:
        InputError: the Hub cannot be reached or refuses.
    """
    from huggingface_hub import HfApi

    with _hub_errors(f"cannot upload {folder} to {name}"), phase(f"uploading to {name}"):
        commit = HfApi(token=token).upload_folder(
            repo_id=name, folder_path=folder, commit_message=message, revision=revision,
            ignore_patterns=list(NOT_UPLOADED),
        )  # fmt: skip
    return str(commit.commit_url)


@contextmanager
def _hub_errors(doing: str) -> Iterator[None]:
    """The errors of huggingface_hub as one line that says what to do."""
    from huggingface_hub import errors

    try:
        yield
    except errors.HFValidationError as error:
        raise InputError(f"{doing}: it is neither a folder here nor a Hub name like ORGANISATION/MODEL") from error
    except errors.GatedRepoError as error:
        raise InputError(
            f"{doing}: its owner asks for consent; give it on the model's page, and set HF_TOKEN"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(
            f"{doing}: there is none of that name, or only for others; check it, or set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise InputError(f"{doing}: it has no such revision; give a branch, tag or commit of it") from error
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        remedy = "set HF_TOKEN to a token that may do so" if status in (401, 403) else "try again later"
        raise InputError(f"{doing}: {one_line(error)}; {remedy}") from error
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as error:
        offline = "HF_HUB_OFFLINE is set" if _offline() else "the Hub cannot be reached"
        raise InputError(
            f"{doing}: {offline} and the files are not in the cache; go online, or give a folder"
        ) from error
    except Exception as error:
        outside = type(error).__module__.startswith(("httpx", "requests", "urllib3"))
        if outside or isinstance(error, ConnectionError | TimeoutError):  # hf_xet raises Python's own
            raise InputError(f"{doing}: the Hub cannot be reached ({one_line(error)}); go online") from error
        raise


def _offline() -> bool:
    from huggingface_hub.constants import is_offline_mode

    return bool(is_offline_mode())
