import math

import pytest

from edge_shiftkv import PromptError, ShiftKV
from edge_shiftkv.native import shiftkv


def values(params):
    return {name: getattr(params, name) for name, _ in params._fields_}


def test_the_defaults_are_the_native_ones():
    native = shiftkv.default_params()
    native.budget = 64
    assert values(ShiftKV().params(64, "llama")) == values(native)


@pytest.mark.parametrize(
    ("architecture", "n_group"), [("llama", 16), ("qwen2", 16), ("qwen2vl", 32), ("qwen3vl", 32), ("qwen3vlmoe", 32)]
)
def test_the_number_of_groups_is_the_papers_for_the_model(architecture, n_group):
    assert ShiftKV().params(64, architecture).n_group == n_group
    assert ShiftKV(n_group=8).params(64, architecture).n_group == 8


def test_every_parameter_reaches_the_library():
    method = ShiftKV(gamma=3.0, n_proxy=96, n_group=12, n_stat=7, n_layer_repeat=1, n_repeat=5, mass=0.5, seed=9)
    assert values(method.params(31, "llama")) == {
        "budget": 31,
        "gamma": 3.0,
        "n_proxy": 96,
        "n_group": 12,
        "n_stat": 7,
        "n_layer_repeat": 1,
        "n_repeat": 5,
        "mass": 0.5,
        "seed": 9,
        "keep_scores": False,
    }


@pytest.mark.parametrize(
    "parameter",
    [
        {"gamma": -1},
        {"gamma": math.nan},
        {"mass": 0},
        {"mass": 1.1},
        {"n_proxy": 0},
        {"n_proxy": 48},
        {"n_proxy": 8192},
        {"n_group": 0},
        {"n_group": 7},
        {"n_stat": 0},
        {"n_repeat": 0},
        {"n_layer_repeat": -1},
        {"seed": -1},
        {"seed": 1 << 32},
    ],
)
def test_parameters_out_of_range(parameter):
    with pytest.raises(PromptError, match="to be"):
        ShiftKV(**parameter)
