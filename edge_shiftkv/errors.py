"""What the runtime raises. Every message says what was wrong and what to do about it."""

from __future__ import annotations


class ShiftKVError(RuntimeError):
    """Base of all errors of this package, and the error where none of the narrower ones fits."""


class SettingError(ShiftKVError, ValueError):
    """A setting of a runtime, a method, a draft or a request that is out of its range."""


class ModelError(ShiftKVError):
    """A GGUF file that cannot be loaded, or does not fit the other one."""


class HubError(ModelError):
    """A model that the Hugging Face hub does not have, does not give, or could not be asked for."""


class PromptError(ShiftKVError):
    """A prompt or a list of messages that cannot be used."""


class ImageError(PromptError):
    """An image that cannot be read or is outside the limits."""


class ContextOverflowError(PromptError):
    """A prompt that leaves no room for an answer.

    n_tokens: tokens of the prompt.
    n_ctx: the most tokens that prompt and answer may have together.
    """

    def __init__(self, message: str, n_tokens: int, n_ctx: int) -> None:
        super().__init__(message)
        self.n_tokens = n_tokens
        self.n_ctx = n_ctx


class SessionError(ShiftKVError):
    """A session file that cannot be used: damaged, altered, or of another model."""


class BusyError(ShiftKVError):
    """A runtime that another thread is using; it serves one request at a time."""


class ClosedError(ShiftKVError):
    """Something that was used after it was closed."""


class CancelledError(ShiftKVError):
    """A request that `cancel` ended; what a stream gave before stays valid."""


class TimeLimitError(CancelledError):
    """A request that took longer than its `time_limit`."""
