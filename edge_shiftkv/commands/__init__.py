"""What the command line's sub-commands do, a module each; `cli` imports them when they run: they need the library."""

import edge_shiftkv.native  # noqa: F401 - first: it says what to do where the library is not the patched one
