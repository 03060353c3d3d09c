"""Files of the Hugging Face Hub by names such as hf://owner/name/file@revision, which huggingface-hub puts into its cache."""

import functools
import os
import re

from dar_jax.errors import InputError, one_line
from dar_jax.files import ON_HUB

NAME = re.compile(
    r"hf://(?P<datasets>datasets/)?(?P<repository>[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})"
    r"(?P<path>(?:/[^/@]+)*)/?(?:@(?P<revision>\w[\w.-]*(?:/\w[\w.-]*)*))?",
    re.ASCII,
)
REFUSED = re.compile(r"[\x00-\x1f\x7f\\*?\[\]]")  # in a path; the client takes the last four for patterns
FORM = "hf://OWNER/NAME[/PATH][@REVISION], or hf://datasets/OWNER/NAME..., is expected"


def local(path: str | os.PathLike) -> str | os.PathLike:
    """The place on this disk of what hf:// names, downloaded where the cache lacks it; other paths are returned unchanged.

    hf://OWNER/NAME[/PATH][@REVISION] is a repository, or a folder or a file in it; hf://datasets/OWNER/NAME... is in a
    repository of data. The revision is a branch, a tag or a commit (default: main), and stays the same within a process. The
    cache, the token and the offline mode are those of huggingface-hub (HF_HUB_CACHE, HF_TOKEN, HF_HUB_OFFLINE).

    Raises InputError where the name is malformed, huggingface-hub is not installed, the Hub cannot be reached and the cache
    lacks the files, or there is no such repository, revision or file, or no permission to read it.
    """
    name = os.fspath(path)
    if not isinstance(name, str) or not name.startswith(ON_HUB):
        return path
    match = NAME.fullmatch(name)
    if (
        match is None
        or REFUSED.search(name)
        or any(part.strip(".") == "" for part in name[len(ON_HUB) :].rstrip("/").split("/"))
    ):
        raise InputError(f"{one_line(repr(name))} is no name on the Hub: {FORM}")
    kind = "dataset" if match["datasets"] else "model"
    inside = match["path"].strip("/")
    place = os.path.join(_snapshot(kind, match["repository"], match["revision"], inside), inside)
    if not os.path.exists(place):
        raise InputError(f"{match['repository']} on the Hub holds no {inside}" + _at(match["revision"]))
    return place


@functools.cache
def _snapshot(kind: str, repository: str, revision: str | None, inside: str) -> str:
    """The folder of the cache with a repository, or with the file or folder `inside` of it alone."""
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError as error:
        raise InputError(f'{ON_HUB}{repository} is on the Hugging Face Hub; that needs: pip install ".[hub]"') from error
    patterns = [inside, f"{inside}/*"] if inside else None
    log_in = "hf auth login, or set HF_TOKEN"
    try:
        return snapshot_download(repository, repo_type=kind, revision=revision, allow_patterns=patterns)
    except errors.RevisionNotFoundError as error:
        raise InputError(f"{repository} on the Hub has no revision {revision or 'main'}") from error
    except errors.GatedRepoError as error:
        where = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{repository}"
        raise InputError(f"{repository} on the Hub is gated: accept its terms at {where}, then {log_in}") from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(f"the Hub has no {kind} {repository}, or it is private; for a private one: {log_in}") from error
    except errors.LocalEntryNotFoundError as error:
        cause = error.__cause__ or error
        raise InputError(
            f"{repository}{_at(revision)} is not in the cache of huggingface-hub, and the Hub cannot be reached "
            f"({one_line(f'{type(cause).__name__}: {cause}')})"
        ) from error
    except Exception as error:  # of its transport, which was exchanged more than once
        reason = one_line(f"{type(error).__name__}: {error}")
        raise InputError(f"{repository}{_at(revision)} cannot be read from the Hub: {reason}") from error


def _at(revision: str | None) -> str:
    return f" at {revision}" if revision else ""
