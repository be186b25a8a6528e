"""Answers in the OpenAI chat schema, as llama-cpp-python gives them, with the figures next to "usage"."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from typing import Any

from edge_shiftkv.results import Completion
from edge_shiftkv.stream import Stream


def completion(answer: Completion, model: str) -> dict[str, Any]:
    """The answer as a ``chat.completion`` object."""
    message = {"role": "assistant", "content": answer.text}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": answer.finish_reason}
    return {**_head("chat.completion", model), "choices": [choice], **_usage(answer)}


def chunks(answer: Stream, model: str) -> Iterator[dict[str, Any]]:
    """The answer as ``chat.completion.chunk`` objects: the role, the text, and an end with reason and figures."""
    head = _head("chat.completion.chunk", model)

    def chunk(delta: dict[str, str], finish_reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return {**head, "choices": [choice]}

    with answer:
        yield chunk({"role": "assistant"})
        for text in answer:
            yield chunk({"content": text})
        yield {**chunk({}, answer.completion.finish_reason), **_usage(answer.completion)}


def _head(kind: str, model: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{uuid.uuid4()}", "object": kind, "created": int(time.time()), "model": model}


def _usage(answer: Completion) -> dict[str, Any]:
    figures = answer.figures
    usage = {
        "prompt_tokens": figures.prompt_tokens,
        "completion_tokens": figures.generated_tokens,
        "total_tokens": figures.prompt_tokens + figures.generated_tokens,
    }
    return {"usage": usage, "figures": figures.as_dict()}
