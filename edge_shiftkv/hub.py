"""Models by name: GGUF files of the Hugging Face hub, through huggingface_hub and its cache.

files = fetch("user/model-GGUF:Q8_0")  # files.model, and files.mmproj where there is one
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from edge_shiftkv.errors import HubError

QUANT = "Q4_K_M"
"""The file that is taken where a repository has several and none is named, as in llama.cpp."""

AUTO = "auto"
"""Stands for the mmproj that a repository has, if it has one."""

_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
_MMPROJ_TYPES = ("f16", "bf16", "f32", "q8_0")  # which of several is taken, the first ones first
_MOST_LISTED = 20


@dataclass(frozen=True)
class Files:
    """Where the files of a model are on this machine.

    model: the language model; of one in parts the first, beside which the others are.
    mmproj: its vision encoder and projector, if it has one.
    """

    model: Path
    mmproj: Path | None


def fetch(repo: str, file: str | None = None, mmproj: str | None = AUTO) -> Files:
    """Download a model, or find it in huggingface_hub's cache, also without a network.

    Progress is shown on stderr. A login (``hf auth login`` or HF_TOKEN), HF_HOME and HF_ENDPOINT are huggingface_hub's.

    repo: "user/model", or "user/model:quant" for the file of a quantization.
    file: the model's file, or a pattern such as "*q8_0.gguf" that fits one; None takes Q4_K_M, or the only one.
        All parts of a model in parts are fetched.
    mmproj: the same for the mmproj: None takes none; "auto", the default, takes one if there is one, f16 first.

    Raises HubError where huggingface_hub is not installed, the repository is not there or gated, no file or several
    fit, or what is not in the cache cannot be had.

    Example::

        files = fetch("ggml-org/SmolVLM-500M-Instruct-GGUF", "*Q8_0.gguf")
        Runtime(files.model, files.mmproj)
    """
    name, _, quant = repo.partition(":")
    if file and quant:
        raise HubError(f"{repo} names a quantization, and {file} a file: use one of them")
    hub = _Hub(name)
    available = [path for path in hub.files if path.endswith(".gguf")]
    models = [path for path in available if not _is_mmproj(path)]
    model = _one_model(name, models, file, quant)
    projector = _one_mmproj(name, [path for path in available if _is_mmproj(path)], mmproj)
    parts = [hub.path(part) for part in _parts(model, available, name)]
    return Files(parts[0], hub.path(projector) if projector else None)


def _is_mmproj(path: str) -> bool:
    return "mmproj" in PurePosixPath(path).name.lower()


def _one_model(repo: str, models: Sequence[str], file: str | None, quant: str) -> str:
    """The model that is meant; of one in parts the first. Raises HubError."""
    firsts = [path for path in models if not (part := _PART.search(path)) or int(part[1]) == 1]
    if file:
        return _fitting(repo, models if file in models else firsts, file)
    fitting = [path for path in firsts if _is_quant(path, quant or QUANT)]
    if not fitting and not quant and len(firsts) == 1:
        return firsts[0]
    if len(fitting) != 1:
        what = f"{quant} is" if quant else f"no file is named, and {QUANT} is"
        raise HubError(f"{repo}: {what} {_how_many(fitting)} of its models: {_listed(fitting or firsts)}")
    return fitting[0]


def _is_quant(path: str, quant: str) -> bool:
    stem = _PART.sub(".gguf", PurePosixPath(path).name).removesuffix(".gguf").lower()
    return stem == quant.lower() or stem.endswith(tuple(f"{mark}{quant.lower()}" for mark in "-._"))


def _one_mmproj(repo: str, projectors: Sequence[str], mmproj: str | None) -> str | None:
    """The mmproj that is meant, if any. Raises HubError."""
    if mmproj is None or (mmproj == AUTO and not projectors):
        return None
    if mmproj != AUTO:
        return _fitting(repo, projectors, mmproj)
    ranks = [*_MMPROJ_TYPES, ""]
    return min(projectors, key=lambda path: (next(i for i, kind in enumerate(ranks) if _has(path, kind)), path))


def _has(path: str, kind: str) -> bool:
    return not kind or kind in re.split(r"[-.]", PurePosixPath(path).name.lower())


def _fitting(repo: str, paths: Sequence[str], pattern: str) -> str:
    """The one path that is the pattern, or that the pattern fits, by itself or by its name. Raises HubError."""
    if pattern in paths:
        return pattern
    fitting = [path for path in paths if fnmatchcase(path, pattern) or fnmatchcase(PurePosixPath(path).name, pattern)]
    if len(fitting) != 1:
        raise HubError(f"{repo}: {pattern} is {_how_many(fitting)} of its files: {_listed(fitting or paths)}")
    return fitting[0]


def _how_many(fitting: Sequence[str]) -> str:
    return f"{len(fitting)}" if fitting else "none"


def _listed(paths: Sequence[str]) -> str:
    more = f", and {len(paths) - _MOST_LISTED} more" if len(paths) > _MOST_LISTED else ""
    return ", ".join(sorted(paths)[:_MOST_LISTED]) + more if paths else "it has no such GGUF files"


def _parts(path: str, available: Sequence[str], repo: str) -> list[str]:
    """The file, or all parts of it. Raises HubError where some are missing."""
    part = _PART.search(path)
    if not part:
        return [path]
    head, n = path[: part.start()], int(part[2])
    paths = [f"{head}-{i:05}-of-{part[2]}.gguf" for i in range(1, n + 1)]
    if missing := [path for path in paths if path not in available]:
        raise HubError(f"{repo}: parts of the model are not there: {_listed(missing)}")
    return paths


class _UnreachableError(HubError):
    """The hub does not answer."""


class _Hub:
    """A repository of the hub, or what the cache has of it.

    files: its paths.

    Raises HubError.
    """

    def __init__(self, repo: str) -> None:
        try:
            import huggingface_hub.errors
        except ImportError as error:
            raise HubError(
                'models by name need huggingface_hub: install it with pip install "edge-shiftkv[hub]"'
            ) from error
        self._hub, self._api = huggingface_hub, huggingface_hub.HfApi()
        self._repo = repo
        self._cached: dict[str, Path] = {}
        try:
            self.files = self._try(self._list)
        except _UnreachableError as error:
            self._cached = self._find_cached()
            if not self._cached:
                raise HubError(f"{error}, and nothing of it is in the cache") from error
            self.files = list(self._cached)

    def path(self, file: str) -> Path:
        """Where a file is, after it was downloaded if need be. Raises HubError."""
        if file in self._cached:
            return self._cached[file]
        return Path(self._try(lambda: self._hub.hf_hub_download(self._repo, file)))

    def _list(self) -> list[str]:
        return [file.rfilename for file in self._api.model_info(self._repo).siblings or []]

    def _try(self, call: Callable[[], Any]) -> Any:
        errors = self._hub.errors
        # What could not connect is an error of the HTTP library, whichever this version of huggingface_hub uses.
        transport = errors.HfHubHTTPError.__bases__[0]
        where = f"{self._api.endpoint}/{self._repo}"
        try:
            return call()
        except errors.HFValidationError as error:
            raise HubError(f"{self._repo!r} is no name of a model: it has to be user/model") from error
        except errors.GatedRepoError as error:
            raise HubError(f"{where} is gated: accept its terms there, and log in with: hf auth login") from error
        except errors.RepositoryNotFoundError as error:
            raise HubError(f"{where}: there is no such model, or it is private and you are not logged in") from error
        except (transport, OSError) as error:
            status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
            kind = HubError if status and status < 500 else _UnreachableError
            raise kind(f"{where} cannot be downloaded: {_first_line(error)}") from error

    def _find_cached(self) -> dict[str, Path]:
        try:
            repos = self._hub.scan_cache_dir().repos
        except (OSError, ValueError, self._hub.errors.CacheNotFound):
            return {}
        revisions = [
            revision
            for repo in repos
            if (repo.repo_type, repo.repo_id) == ("model", self._repo)
            for revision in repo.revisions
        ]
        if not revisions:
            return {}
        newest = max(revisions, key=lambda revision: ("main" in revision.refs, revision.last_modified))
        return {file.file_path.relative_to(newest.snapshot_path).as_posix(): file.file_path for file in newest.files}


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
