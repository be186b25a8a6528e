"""The reader of GGUF headers and what is checked of them, against the gguf package's reader and writer."""

from __future__ import annotations

import ctypes
import struct
from pathlib import Path

import gguf
import llama_cpp.llama_cpp as llama
import numpy as np
import pytest
from support import gguf_random, tiny_models
from support.gguf_random import Spec

from edge_shiftkv._paths import models_dir
from edge_shiftkv.errors import ModelError
from edge_shiftkv.native import gguf_file
from edge_shiftkv.native.gguf_check import check_mmproj, check_model
from edge_shiftkv.native.gguf_file import Array, GGUFError, read_header

DEMO = ("demo-text-f16.gguf", "demo-text-q8_0.gguf", "demo-mmproj-f16.gguf")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return gguf_random.write_model(Spec(n_layer=1), tmp_path)


def assert_same(path: Path) -> None:
    header, expected = read_header(path), gguf.GGUFReader(path)
    fields = {name: field for name, field in expected.fields.items() if not name.startswith("GGUF.")}
    assert header.metadata.keys() == fields.keys()
    for name, field in fields.items():
        value = header.metadata[name].value
        assert header.metadata[name].kind == field.types[0]
        if isinstance(value, Array):
            assert (value.kind, value.n) == (field.types[1], len(field.data)), name
            if value.kind != gguf_file.STRING:
                assert list(header.numbers(value)) == field.contents()
        else:
            assert (value.decode() if isinstance(value, bytes) else value) == field.contents(), name
    assert list(header.tensors) == [tensor.name for tensor in expected.tensors]
    for tensor in expected.tensors:
        mine = header.tensors[tensor.name]
        assert (list(mine.shape), mine.type, mine.n_bytes) == (
            tensor.shape.tolist(),
            tensor.tensor_type,
            tensor.n_bytes,
        )


@pytest.mark.parametrize("name", DEMO)
def test_headers_of_the_demo(name):
    assert_same(models_dir() / name)


@pytest.mark.parametrize("projector", ["mlp", "gemma3", "qwen2vl_merger"])
def test_headers_of_encoders(tmp_path, projector):
    path = tiny_models.write_mmproj(tmp_path / "mmproj.gguf", projector, pinpoints=((112, 56), (56, 112)))
    assert_same(path)
    check_mmproj(path)


@pytest.mark.parametrize("name", DEMO[:2])
def test_rows_and_texts_are_read_from_the_file(name):
    header, expected = read_header(models_dir() / name), gguf.GGUFReader(models_dir() / name)
    tokens = header.array("tokenizer.ggml.tokens")
    assert list(header.texts(tokens)) == expected.fields["tokenizer.ggml.tokens"].contents()
    for tensor in expected.tensors:
        data = np.asarray(tensor.data).reshape(-1, np.asarray(tensor.data).shape[-1])
        numbers = [len(data) - 1, 0, len(data) // 2]
        assert header.rows(tensor.name, numbers) == [data[number].tobytes() for number in numbers]


def test_block_sizes():
    size, block = llama._lib.ggml_type_size, llama._lib.ggml_blck_size
    size.restype, block.restype = ctypes.c_size_t, ctypes.c_int64
    n_types = max(gguf_file.BLOCKS) + 1
    known = {kind: (block(kind), size(kind)) for kind in range(n_types) if block(kind)}
    assert known == gguf_file.BLOCKS


def test_the_demo_is_fine():
    for name in DEMO:
        (check_mmproj if "mmproj" in name else check_model)(models_dir() / name)


def test_every_start_of_a_file_is_incomplete(model, tmp_path):
    data = model.read_bytes()
    with pytest.raises(ModelError, match="it starts with b''"):
        check_model(written(tmp_path, b""))
    for size in [*range(4, 3000, 7), len(data) // 2, len(data) - 32]:
        with pytest.raises(ModelError, match="incomplete file"):
            check_model(written(tmp_path, data[:size]))


def written(folder: Path, data: bytes) -> Path:
    path = folder / "damaged.gguf"
    path.write_bytes(data)
    return path


def pairs(*entries: bytes) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, 0, len(entries)) + b"".join(entries)


def entry(key: bytes, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(key)) + key + struct.pack("<I", kind) + value


ONE = struct.pack("<I", 1)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "GGUF version 1"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0), "incomplete"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60), "incomplete"),
        (pairs(entry(b"a", gguf_file.UINT32, ONE), entry(b"a", gguf_file.UINT32, ONE)), "the key 'a' twice"),
        (pairs(entry(b"", gguf_file.UINT32, ONE)), "key is empty"),
        (pairs(entry(b"a", 13, ONE)), "unknown GGUF type 13"),
        (pairs(entry(b"a", gguf_file.ARRAY, struct.pack("<IQ", 9, 1))), "a list of 1 items of the GGUF type 9"),
        (pairs(entry(b"a", gguf_file.ARRAY, struct.pack("<IQ", 4, 1 << 62))), "a list of"),
        (pairs(entry(b"a", gguf_file.ARRAY, struct.pack("<IQ", 8, 1 << 62))), "incomplete"),
        (pairs(entry(b"a", gguf_file.STRING, struct.pack("<Q", 1 << 63))), "incomplete"),
        (pairs(entry(b"general.alignment", gguf_file.UINT32, struct.pack("<I", 24))), "general.alignment is 24"),
        (pairs(entry(b"general.alignment", gguf_file.UINT32, struct.pack("<I", 0))), "general.alignment is 0"),
    ],
)
def test_damaged_headers(tmp_path, data, message):
    with pytest.raises(GGUFError, match=message):
        read_header(written(tmp_path, data))


def tensors(*entries: tuple[bytes, tuple[int, ...], int, int], size: int = 4096) -> bytes:
    out = b"GGUF" + struct.pack("<IQQ", 3, len(entries), 0)
    for name, shape, kind, offset in entries:
        out += struct.pack("<Q", len(name)) + name + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        out += struct.pack("<IQ", kind, offset)
    return out + bytes(-len(out) % 32) + bytes(size)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (tensors((b"a", (8,), 0, 0), (b"a", (8,), 0, 32)), "two tensors 'a'"),
        (tensors((b"a" * 64, (8,), 0, 0)), "is too long"),
        (tensors((b"a", (1, 1, 1, 1, 1), 0, 0)), "5 dimensions"),
        (tensors((b"a", (8,), 4, 0)), "unknown type 4"),
        (tensors((b"a", (33,), 8, 0)), "rows of 33"),
        (tensors((b"a", (8,), 0, 64)), "byte 64 of the data instead of 0"),
        (tensors((b"a", (8,), 0, 0), (b"b", (8,), 0, 0)), "byte 0 of the data instead of 32"),
        (tensors((b"a", (1 << 40, 1 << 40), 0, 0)), "ends before the data of tensor 'a'"),
        (tensors((b"a", (1024,), 0, 0), (b"b", (8,), 0, 4096)), "ends before the data of tensor 'b'"),
    ],
)
def test_damaged_tensors(tmp_path, data, message):
    with pytest.raises(GGUFError, match=message):
        read_header(written(tmp_path, data))


def test_a_tensor_of_nothing(tmp_path):
    with pytest.raises(ModelError, match=r"'a' is empty: \[8, 0\]"):
        check_model(written(tmp_path, tensors((b"a", (8, 0), 0, 0))))


def test_lists_of_numbers(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "lists.gguf", "llama")
    writer.add_array("floats", [0.5, -1.0])
    writer.add_array("integers", [-3, 7])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    header = read_header(tmp_path / "lists.gguf")
    floats, integers = header.array("floats"), header.array("integers")
    assert floats and integers
    assert np.array_equal(header.numbers(floats), [0.5, -1.0])
    assert header.numbers(integers) == (-3, 7)
    assert header.integer("floats") is None and header.text("floats") is None
