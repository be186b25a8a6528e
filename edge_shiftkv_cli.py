"""Entry point of the `edge-shiftkv` command.

It stands outside the package because importing `edge_shiftkv` demands the patched llama-cpp-python, which
`edge-shiftkv build` has yet to make. ``python edge_shiftkv_cli.py build`` in a checkout works the same.
"""

from __future__ import annotations

import importlib.util
import sys


def main() -> int:
    """Run the command line; return the exit status."""
    spec = importlib.util.find_spec("edge_shiftkv")
    assert spec is not None
    # The bare package, its __init__ not executed: enough to import submodules that do not need the library.
    sys.modules["edge_shiftkv"] = importlib.util.module_from_spec(spec)
    from edge_shiftkv import cli

    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
