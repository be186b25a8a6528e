import math

import pytest

from edge_shiftkv import SettingError, ShiftKV
from edge_shiftkv.native import shiftkv
from edge_shiftkv.selection.methods import (
    DEFAULT_METHOD,
    METHODS,
    ExpectedAttention,
    KeyDiff,
    Published,
    Random,
    SnapKV,
    StreamingLLM,
    method,
)


def values(params):
    return {name: getattr(params, name) for name, _ in params._fields_}


@pytest.mark.parametrize(
    ("configuration", "kind"),
    [
        (ShiftKV, shiftkv.Method.SHIFTKV),
        (StreamingLLM, shiftkv.Method.STREAMINGLLM),
        (SnapKV, shiftkv.Method.SNAPKV),
        (KeyDiff, shiftkv.Method.KEYDIFF),
        (ExpectedAttention, shiftkv.Method.EXPECTED_ATTENTION),
        (Random, shiftkv.Method.RANDOM),
    ],
)
def test_the_defaults_are_the_native_ones(configuration, kind):
    native = shiftkv.default_params(kind)
    native.budget = 64
    assert native.method == kind
    assert values(configuration().params(64, "llama")) == values(native)


@pytest.mark.parametrize(
    ("architecture", "n_group"), [("llama", 16), ("qwen2", 16), ("qwen2vl", 32), ("qwen3vl", 32), ("qwen3vlmoe", 32)]
)
def test_the_number_of_groups_is_the_papers_for_the_model(architecture, n_group):
    assert ShiftKV().params(64, architecture).n_group == n_group
    assert ShiftKV(n_group=8).params(64, architecture).n_group == 8


def changed(configuration):
    """The native parameters that differ from the published ones, and n_query."""
    params = values(configuration.params(31, "llama"))
    published = values(shiftkv.default_params(params["method"]))
    return {name: value for name, value in params.items() if value != published[name]}, configuration.n_query


def test_every_parameter_reaches_the_library():
    proxies = {"n_proxy": 96, "n_group": 12, "n_stat": 7, "n_layer_repeat": 1, "n_repeat": 5}
    others = {"gamma": 3.0, "mass": 0.5, "seed": 9}
    assert changed(ShiftKV(**proxies, **others)) == ({"budget": 31, **proxies, **others}, 1)
    mixed = {"n_sink": 4, "n_recent": 8, "observed": 0.5}
    native = {"budget": 31, **mixed, "n_window": 20, "n_pool": 3}
    assert changed(ShiftKV(**mixed, window=20, kernel=3)) == (native, 20)
    assert changed(StreamingLLM(n_sink=7)) == ({"budget": 31, "n_sink": 7}, 1)
    snapkv = {"budget": 31, "n_window": 20, "n_recent": 20, "n_pool": 7}
    assert changed(SnapKV(window=20, kernel=7)) == (snapkv, 20)
    assert changed(KeyDiff()) == ({"budget": 31}, 1)
    expected = {"n_window": 100, "n_future": 64, "n_sink": 0}
    assert changed(ExpectedAttention(**expected)) == ({"budget": 31, **expected}, 100)
    assert changed(Random(seed=2**32 - 1)) == ({"budget": 31, "seed": 2**32 - 1}, 1)


@pytest.mark.parametrize(
    ("configuration", "parameter"),
    [
        (ShiftKV, {"gamma": -1}),
        (ShiftKV, {"gamma": math.nan}),
        (ShiftKV, {"mass": 0}),
        (ShiftKV, {"mass": 1.1}),
        (ShiftKV, {"n_proxy": 0}),
        (ShiftKV, {"n_proxy": 48}),
        (ShiftKV, {"n_proxy": 8192}),
        (ShiftKV, {"n_group": 0}),
        (ShiftKV, {"n_group": 7}),
        (ShiftKV, {"n_stat": 0}),
        (ShiftKV, {"n_repeat": 0}),
        (ShiftKV, {"n_layer_repeat": -1}),
        (ShiftKV, {"seed": -1}),
        (ShiftKV, {"seed": 1 << 32}),
        (ShiftKV, {"n_sink": -1}),
        (ShiftKV, {"n_recent": 0}),
        (ShiftKV, {"observed": -0.1}),
        (ShiftKV, {"observed": 1.0}),
        (ShiftKV, {"observed": math.nan}),
        (ShiftKV, {"window": 513}),
        (ShiftKV, {"kernel": 2}),
        (StreamingLLM, {"n_sink": -1}),
        (SnapKV, {"window": 0}),
        (SnapKV, {"window": 513}),
        (SnapKV, {"kernel": 4}),
        (SnapKV, {"kernel": 65}),
        (SnapKV, {"kernel": -1}),
        (ExpectedAttention, {"n_window": 0}),
        (ExpectedAttention, {"n_window": 513}),
        (ExpectedAttention, {"n_future": 0}),
        (ExpectedAttention, {"n_future": 4097}),
        (ExpectedAttention, {"n_sink": -1}),
        (Random, {"seed": 1 << 32}),
    ],
)
def test_parameters_out_of_range(configuration, parameter):
    with pytest.raises(SettingError, match="to be"):
        configuration(**parameter)


def test_methods_by_name():
    assert {name: type(method(name)) for name in METHODS} == {
        "mixed": ShiftKV,
        "paper": ShiftKV,
        "streamingllm": StreamingLLM,
        "snapkv": SnapKV,
        "keydiff": KeyDiff,
        "expected-attention": ExpectedAttention,
        "random": Random,
    }
    assert method("paper") == ShiftKV()


def test_the_methods_are_those_of_the_library():
    """A rule that only the library knows would be one by its name."""
    assert set(METHODS) == {*shiftkv.METHODS, "mixed", "paper"} - {"shiftkv"}
    assert list(shiftkv.METHODS) == sorted(shiftkv.METHODS)
    assert list(shiftkv.METHODS.values()) == list(range(len(shiftkv.METHODS)))
    assert {member.name for member in shiftkv.Method} == {name.upper().replace("-", "_") for name in shiftkv.METHODS}


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("mixed", "paper")])
def test_a_method_without_settings_of_its_own_needs_no_class(name):
    configured, published = method(name), Published(name)
    assert values(published.params(64, "llama")) == values(configured.params(64, "llama"))
    assert published.n_query == configured.n_query


def test_no_method_of_the_library():
    with pytest.raises(SettingError, match=r"'h2o' is no method of the library, which has .*snapkv"):
        Published("h2o")


def test_the_papers_settings_by_name():
    paper = method("paper").params(64, "llama")
    assert values(paper) == values(shiftkv.default_params(shiftkv.Method.SHIFTKV)) | {"budget": 64}


def test_the_settings_of_the_default_method():
    """They are what docs/quality.md was measured with; another window, kernel or share is another method."""
    assert DEFAULT_METHOD == "mixed"
    mixed = {"n_proxy": 256, "observed": 0.25, "n_window": 8, "n_pool": 9}
    assert changed(method("mixed")) == ({"budget": 31, **mixed}, 8)


def test_unknown_names_say_which_there_are():
    with pytest.raises(SettingError, match=r"'snap' is not known: use one of mixed, paper, .*snapkv"):
        method("snap")
