"""The release of llama-cpp-python that the patches are for, and the version of the library that they make of it."""

from __future__ import annotations

UPSTREAM_VERSION = "0.3.36"
"""The one llama-cpp-python release the patches are written for."""

LOCAL_VERSION = "shiftkv.7"
"""Raise the number when a released set of patches changes, so that an older build is known as one."""

WHEEL_VERSION = f"{UPSTREAM_VERSION}+{LOCAL_VERSION}"
