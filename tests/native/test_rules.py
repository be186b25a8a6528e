"""The methods beside MM-ShiftKV against their numpy references: architectures, KV types, prompts and parameters."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from support import rules
from support.cases import Case, Load, open_context, prefill
from support.native import OK, Model
from support.rules import RULES, Rule

from native.test_selection import ARCHITECTURES

every_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)


def names(cases: list[Case]) -> pytest.MarkDecorator:
    """The table as a pytest parameter."""
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


def check(model: Model, case: Case, rule: Rule, **settings: Any) -> None:
    with open_context(model, case) as context:
        assert context.capture(n_query=rule.n_query) == OK
        prefill(context, case)
        native = rule.params(case.budget, **settings)
        assert context.select(native) == OK
        rules.check(context, rule, native)


@pytest.mark.device
@pytest.mark.parametrize("flash", [False, True], ids=["", "flash"])
@every_rule
@names(ARCHITECTURES)
def test_architectures(load: Load, case: Case, rule: Rule, flash: bool) -> None:
    check(load(case.spec), replace(case, flash=flash), rule)
