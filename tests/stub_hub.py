"""Stands in for the package huggingface_hub: repositories are folders on this disk, copied on request to a cache as links."""

import fnmatch
import os
import types
from pathlib import Path


class RepositoryNotFoundError(Exception):
    pass


class GatedRepoError(RepositoryNotFoundError):
    pass


class RevisionNotFoundError(Exception):
    pass


class LocalEntryNotFoundError(Exception):
    pass


ERRORS = (RepositoryNotFoundError, GatedRepoError, RevisionNotFoundError, LocalEntryNotFoundError)


class Hub:
    """A hub with the folders ROOT/KIND/OWNER/NAME; `fails` is raised instead of an answer, `calls` are the questions so far."""

    def __init__(self, root: Path):
        self.root, self.cache, self.fails, self.calls = root, root / "cache", None, []
        self.module = types.ModuleType("huggingface_hub")
        self.module.errors = types.SimpleNamespace(**{error.__name__: error for error in ERRORS})
        self.module.snapshot_download = self.snapshot_download

    def folder(self, repository: str, kind: str = "model") -> Path:
        folder = self.root / kind / repository
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def snapshot_download(self, repo_id, *, repo_type, revision, allow_patterns):
        self.calls.append((repo_type, repo_id, revision, allow_patterns))
        if self.fails is not None:
            raise self.fails
        repository = self.root / repo_type / repo_id
        if not repository.is_dir():
            raise RepositoryNotFoundError("404 Client Error\n\nRepository Not Found")
        if revision not in (None, "main", "v1"):
            raise RevisionNotFoundError("404")
        snapshot = self.cache / repo_type / repo_id / "snapshots" / "0123"
        snapshot.mkdir(parents=True, exist_ok=True)
        for file in repository.rglob("*"):
            name = str(file.relative_to(repository))
            wanted = allow_patterns is None or any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns)
            if file.is_file() and wanted and not (snapshot / name).exists():
                (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
                os.symlink(file, snapshot / name)
        return str(snapshot)
