"""``python -m edge_shiftkv``: the `edge-shiftkv` command, also in a checkout that is not installed."""

import sys

from edge_shiftkv.cli import main

sys.exit(main())
