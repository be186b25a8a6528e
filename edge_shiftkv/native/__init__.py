"""The patched llama.cpp through ctypes: one module per C header, plus its log.

Importing this package loads the library and fails where it is not the patched one.
"""

from __future__ import annotations

from edge_shiftkv._version import WHEEL_VERSION

_HINT = "edge_shiftkv needs its patched llama-cpp-python; build and install it with: edge-shiftkv build"

try:
    import llama_cpp as _package
    import llama_cpp.llama_cpp as _llama_cpp
    import llama_cpp.mtmd_cpp as _mtmd_cpp
except (ImportError, OSError, RuntimeError) as error:  # not installed, or without its shared libraries
    raise ImportError(f"{_HINT} ({error})") from error

if not hasattr(_llama_cpp._lib, "llama_shiftkv_asserts_throw"):
    raise ImportError(f"{_HINT} (the llama-cpp-python installed here is the stock one, or of an older edge_shiftkv)")
if _package.__version__ != WHEEL_VERSION:  # its structures may be others
    raise ImportError(f"{_HINT} (version {WHEEL_VERSION}; {_package.__version__} is installed here)")

from edge_shiftkv.native import logs  # noqa: E402  (after the check: it takes the library's log over)

logs.redirect(_llama_cpp, _mtmd_cpp)
_llama_cpp.llama_backend_init()
