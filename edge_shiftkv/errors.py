"""What the runtime raises. Every message says what was wrong and what to do about it."""

from __future__ import annotations


class ShiftKVError(RuntimeError):
    """Base of all errors of this package, and the error where none of the narrower ones fits."""


class ModelError(ShiftKVError):
    """A GGUF file that cannot be loaded, or does not fit the other one."""


class PromptError(ShiftKVError):
    """A prompt, a list of messages or a setting of a request that cannot be used."""


class ImageError(PromptError):
    """An image that cannot be read or is outside the limits."""
