"""How far two right computations of the same logits may be apart, whatever kernels a CPU picks.

Kernels sum in different orders, which in single precision changes a sum of n terms by about sqrt(n) * 2**-24 of their
size: less than 1e-5 after the few layers of the tests' models, whose logits have a standard deviation of about 1. Where
numbers are rounded to half precision, as in a cache, such a change now and then gives the next one, which is twice as
far away as the farthest that rounding moves any. Twice what rounding does at all is thus a bound that no kernel
reaches; `test_bounds_are_twice_the_rounding` measures it.
"""

from __future__ import annotations

from support.native import GPU_LAYERS

_LOGITS = {"f32": 2e-4, "f16": 2e-2}
_HALF_PRECISION_SUMS = 3e-2


def of_logits(type_k: str, flash: bool | None = False) -> float:
    """The bound for logits by the type of keys and values; None lets llama.cpp choose flash attention.

    Flash attention rounds keys and values, and sums, to half precision; so does every cache that is not f32.
    """
    if GPU_LAYERS:
        return 10 * _LOGITS["f16"]
    return _HALF_PRECISION_SUMS if flash is not False else _LOGITS.get(type_k, _LOGITS["f16"])
