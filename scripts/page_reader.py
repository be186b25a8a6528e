"""An mmproj with which any language model reads pages of one character a cell.

    python scripts/page_reader.py -m MODEL.gguf --out page-reader-mmproj.gguf [--cells 24]

`edge-shiftkv demo -m MODEL.gguf` makes its own; this is for pages of other sizes, and other places.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from edge_shiftkv.errors import ShiftKVError
from edge_shiftkv.page_reader import MAX_CELLS, write_mmproj


def main() -> None:
    parser = argparse.ArgumentParser(description="Write an mmproj that reads pages for a language model.")
    parser.add_argument("-m", "--model", type=Path, required=True, help="GGUF file of the language model")
    parser.add_argument("--out", type=Path, required=True, help="mmproj to write")
    parser.add_argument("--cells", type=int, default=24, help=f"of a page, a side, up to {MAX_CELLS} (default 24)")
    args = parser.parse_args()
    try:
        write_mmproj(args.model, args.out, args.cells)
    except ShiftKVError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
