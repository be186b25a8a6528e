"""Every operation in our graphs, with its types, runs on all backends that llama.cpp documents.

An operation that a backend lacks does not fail: it moves to the CPU, and the cache with it.
"""

from __future__ import annotations

import csv
import io
import re
import tarfile
from functools import cache

import pytest

from edge_shiftkv import build
from edge_shiftkv._paths import patches_dir

BACKENDS = ("CPU", "CUDA", "Metal", "Vulkan")

KV_TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0")
TRANSPOSED = ("f32", "f16", "bf16")
"""Types of values where they are stored transposed, without flash attention."""

FLOAT = ("type=f32,",)
PLAIN = ("type=f32,.*v=0",)

OPERATIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    # Only contiguous operands, or rows far apart: views of a whole tensor's rows.
    "add": ("ADD", ("type=f32,(?!.*perm1=1)",)),
    "argsort": ("ARGSORT", FLOAT),
    "concat": ("CONCAT", ("type=f32,.*dim=0,v=0", "type=f32,.*dim=2,v=0")),
    "cont": ("CONT", tuple(f"type={kind},.*use_view_slice=0" for kind in TRANSPOSED)),
    "cpy": (
        "CPY",
        ("type_src=i32,type_dst=i32,", *(f"type_src={t},type_dst={t},.*_src_transpose=1" for t in TRANSPOSED)),
    ),
    "cumsum": ("CUMSUM", FLOAT),
    "div": ("DIV", ("type=f32,(?!.*perm1=1)",)),
    # Keys and values become numbers by it.
    "get_rows": ("GET_ROWS", ("type=f32,n=1,", "type=i32,.*v=0", *(f"type={kind},.*v=0" for kind in KV_TYPES))),
    "l2_norm": ("L2_NORM", FLOAT),
    "mul": ("MUL", ("type=f32,(?!.*perm1=1)",)),
    # Keys by head lie between those of other heads.
    "mul_mat": ("MUL_MAT", tuple(rf"type_a={kind},type_b=f32,.*per=\[0,2,1,3\]" for kind in KV_TYPES)),
    "repeat_4d": ("REPEAT", FLOAT),
    "scale": ("SCALE", FLOAT),
    "scale_bias": ("SCALE", ("type=f32,.*bias=1",)),
    "set_rows": ("SET_ROWS", (r"type(_dst)?=f32,type_idx=i64,.*v=0", r"type(_dst)?=f32,type_idx=i32,ne=\[1,")),
    "soft_max_ext": ("SOFT_MAX", ("type=f32,.*mask=0,sinks=0", "type=f32,.*mask=1,sinks=0,m_prec=f32")),
    "sqr": ("SQR", FLOAT),
    "sqrt": ("SQRT", FLOAT),
    "step": ("STEP", PLAIN),
    "sub": ("SUB", ("type=f32,(?!.*perm1=1)",)),
    "sum_rows": ("SUM_ROWS", ("type=f32,.*permute=0,slice=0",)),
    "tanh": ("TANH", PLAIN),
}
"""The ggml functions that the native code calls to build graphs: the operation in the tables, and what its test cases
have to match; each expression at least one, all of which the backend has to support."""

NO_OPERATIONS = re.compile(
    r"backend_.*|new_tensor(_\dd)?|view_\dd|reshape_\dd|permute|transpose|set_(input|output)|prec_set_acc|build_forward_expand"
    r"|custom_(4d|inplace)"  # for keys in host memory only
    r"|graph_(node|n_nodes|size|overhead_custom)|new_graph_custom|build_forward_order|nrows|set_name"
    r"|op_desc|type_name|set_abort_callback|print_backtrace|time_us"
    r"|init|tensor_overhead|format_name|op_name|get_unary_op|is_contiguous|nbytes|nelements|get_type_traits|row_size|type_size|blck_size"
)

ON_THE_CPU = {("Vulkan", "mul_mat"): r"type_a=q[48]_0,"}
"""What a backend lacks, so that the scheduler computes it on the CPU: Vulkan multiplies no quantized keys by head."""

LONG = 131_072
"""Keys that a row may hold."""


@cache
def tables() -> dict[str, list[tuple[str, str, bool]]]:
    """Operation, parameters and support of llama.cpp's test cases, by backend."""
    sdist = build.default_cache_dir() / "sdist" / f"llama_cpp_python-{build.UPSTREAM_VERSION}.tar.gz"
    if not sdist.is_file():
        pytest.skip(f"llama.cpp's tables of operations are in the sdist, which is not there: {sdist}")
    result = {}
    with tarfile.open(sdist) as archive:
        for member in archive:
            match = re.search(r"/docs/ops/(\w+)\.csv$", member.name)
            if match and match[1] in BACKENDS:
                stream = archive.extractfile(member)
                assert stream is not None
                rows = csv.DictReader(io.TextIOWrapper(stream, "utf-8"))
                result[match[1]] = [(row["op_name"], row["op_params"], row["supported"] == "1") for row in rows]
    return result


def calls() -> set[str]:
    """The ggml functions that the native code calls."""
    sources = sorted((patches_dir() / "llama.cpp/src").glob("llama-shiftkv*"))
    assert len(sources) >= 3
    text = "\n".join(source.read_text(encoding="utf-8") for source in sources)
    text = re.sub(r"//.*", "", text)
    return set(re.findall(r"\bggml_(\w+)\(", text))


def test_the_list_is_complete() -> None:
    assert {name for name in calls() if not NO_OPERATIONS.fullmatch(name)} == set(OPERATIONS)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_backends_support(backend: str, name: str) -> None:
    operation, expressions = OPERATIONS[name]
    lacking = ON_THE_CPU.get((backend, name))
    for expression in expressions:
        cases = [
            (parameters, supported)
            for op, parameters, supported in tables()[backend]
            if op == operation and re.search(expression, parameters)
        ]
        assert cases, f"no test case of {operation} matches {expression}"
        unsupported = [parameters for parameters, supported in cases if not supported]
        if lacking and re.search(lacking, expression):
            assert unsupported, "the table has it now: take the exception out"
        else:
            assert unsupported == []


@pytest.mark.parametrize("operation", ["ARGSORT", "CUMSUM"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_backends_support_long_rows(backend: str, operation: str) -> None:
    lengths = {
        int(match[1])
        for op, parameters, supported in tables()[backend]
        if op == operation and supported and (match := re.search(r"type=f32,ne=\[(\d+),", parameters))
    }
    assert max(lengths) >= LONG


def test_the_tables_tell_what_is_missing() -> None:
    """CUDA lacks TOP_K of long rows, which is why the selection sorts."""
    assert not all(supported for op, _, supported in tables()["CUDA"] if op == "TOP_K")
