"""Write a model that says what another one says, for the cost of a larger one: layers that add nothing are appended.

    python scripts/deepen_gguf.py qwen2.5-1.5b-q4_k_m.gguf deep.gguf --layers 130    # a 7B's weights in 1.5B's widths

The appended layers are copies of the model's own, in turn, but for the output projections of attention and feed-forward
network, which are zero. So a model's answers, and what a draft is worth, can be measured at the cost of a larger model.
What is measured with it is no measurement of that larger model, and has to be labelled so.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import gguf
import numpy as np

_ZERO = ("attn_output.weight", "attn_output.bias", "ffn_down.weight", "ffn_down.bias")


def deepen(source: Path, destination: Path, n_layer: int) -> None:
    """Write `source` with `n_layer` layers, as many as it has or more, to `destination`."""
    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    count = f"{architecture}.block_count"
    own = int(reader.fields[count].contents())
    if n_layer < own:
        raise SystemExit(f"{source} has {own} layers: --layers has to be that or more")
    writer = gguf.GGUFWriter(destination, architecture)
    for field in reader.fields.values():
        if field.name == "general.architecture" or field.name.startswith("GGUF."):
            continue
        value = n_layer if field.name == count else field.contents()
        kind, element = field.types[0], field.types[-1] if len(field.types) > 1 else None
        writer.add_key_value(field.name, value, kind, sub_type=element)
    tensors = [(tensor.name, tensor, False) for tensor in reader.tensors]
    for layer in range(own, n_layer):
        prefix = f"blk.{layer % own}."
        for tensor in reader.tensors:
            if tensor.name.startswith(prefix):
                part = tensor.name.removeprefix(prefix)
                tensors.append((f"blk.{layer}.{part}", tensor, part in _ZERO))
    for name, tensor, _ in tensors:
        data = tensor.data
        writer.add_tensor_info(name, list(data.shape), data.dtype, data.nbytes, tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, tensor, is_zero in tensors:
        writer.write_tensor_data(np.zeros_like(tensor.data) if is_zero else tensor.data)
    writer.close()


def main() -> None:
    """Parse the command line and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="GGUF")
    parser.add_argument("destination", type=Path, metavar="OUT")
    parser.add_argument("--layers", type=int, required=True, metavar="N", help="layers of the new model")
    arguments = parser.parse_args()
    deepen(arguments.source, arguments.destination, arguments.layers)


if __name__ == "__main__":
    main()
