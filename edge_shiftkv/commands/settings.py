"""From the command line's arguments to a runtime and its requests."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edge_shiftkv import hub
from edge_shiftkv.budget import is_in_bytes
from edge_shiftkv.engine.engine import Progress
from edge_shiftkv.errors import ModelError, SettingError
from edge_shiftkv.prompts.images import AllowHttp
from edge_shiftkv.request import Options
from edge_shiftkv.runtime import Runtime
from edge_shiftkv.selection.methods import DEFAULT_METHOD
from edge_shiftkv.session_file import file_hash
from edge_shiftkv.speculative.options import DraftOptions

_MACHINE = (
    "n_threads",
    "n_gpu_layers",
    "pack_weights",
    "prefill",
    "image_root",
    "allow_http",
    "draft",
    "draft_options",
)


def allow_http(arguments: argparse.Namespace) -> AllowHttp:
    """Whether pictures may be fetched, as `Runtime` takes it."""
    return "private" if arguments.allow_http == "private" else bool(arguments.allow_http)


def load_runtime(
    arguments: argparse.Namespace, progress: Progress | None = None, *, keep_prompt: bool = False
) -> Runtime:
    """Load the models that the arguments name. Raises what `Runtime` does, and HubError."""
    settings = runtime_settings(arguments)
    model, mmproj = settings.pop("model"), settings.pop("mmproj")
    return Runtime(model, mmproj, **settings, keep_prompt=keep_prompt, progress=progress)


def runtime_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `Runtime` is made with, by name; models are downloaded where they are named so. Raises HubError."""
    model, mmproj = _model_files(arguments)
    return {
        "model": model,
        "mmproj": mmproj,
        "kv_budget": arguments.kv_budget,
        "kv_method": arguments.kv_method,
        "prefill": arguments.prefill,
        "n_ctx": arguments.n_ctx,
        "type_k": arguments.type_k,
        "type_v": arguments.type_v,
        "n_gpu_layers": arguments.gpu_layers,
        "pack_weights": arguments.pack_weights,
        "n_threads": arguments.threads,
        "allow_http": allow_http(arguments),
        "image_root": arguments.image_root,
        "draft": arguments.draft,
        "draft_options": DraftOptions(
            n_draft=arguments.draft_tokens, rule=arguments.draft_rule, mmproj=arguments.draft_mmproj
        ),
    }


def _model_files(arguments: argparse.Namespace) -> tuple[str | Path, str | Path | None]:
    """The model and its mmproj, downloaded where they are named so."""
    if not arguments.hf_repo:
        if arguments.hf_file or arguments.hf_mmproj:
            raise SettingError("--hf-file and --hf-mmproj are files of a repository: name it with -hf")
        return arguments.model, arguments.mmproj
    wanted = None if arguments.mmproj or arguments.hf_mmproj == "none" else arguments.hf_mmproj or hub.AUTO
    files = hub.fetch(arguments.hf_repo, arguments.hf_file, wanted)
    return files.model, arguments.mmproj or files.mmproj


def request_options(arguments: argparse.Namespace) -> Options:
    """How answers are written. Raises SettingError for a file that cannot be read."""
    return Options(
        max_tokens=arguments.max_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        min_p=arguments.min_p,
        seed=arguments.seed,
        repeat_penalty=arguments.repeat_penalty,
        presence_penalty=arguments.presence_penalty,
        frequency_penalty=arguments.frequency_penalty,
        grammar=_text(arguments.grammar_file),
        json_schema=_text(arguments.json_schema),
        stop=arguments.stop,
    )


def answers_depend_on(runtime: Mapping[str, Any], options: Options) -> dict[str, Any]:
    """What a run that goes on with another's answers has in common with it, by name, for JSON: all but the seed.

    runtime, options: as `runtime_settings` and `request_options` give them.

    Raises ModelError for a model that cannot be read.
    """
    chosen = "small" if is_in_bytes(runtime["kv_budget"]) else "f16"
    return {
        "model": _hash(runtime["model"]),
        "mmproj": runtime["mmproj"] and _hash(runtime["mmproj"]),
        **{name: value for name, value in runtime.items() if name not in (*_MACHINE, "model", "mmproj")},
        "kv_method": runtime["kv_method"] or DEFAULT_METHOD,
        **{name: runtime[name] or chosen for name in ("type_k", "type_v")},
        **{name: value for name, value in options.items() if name not in ("seed", "time_limit")},
    }


def _hash(path: str | Path) -> str:
    try:
        return file_hash(Path(path))
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror or error}") from error


def _text(path: Path | None) -> str | None:
    try:
        return None if path is None else path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or error
        raise SettingError(f"{path}: {reason}") from error
