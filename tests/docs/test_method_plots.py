"""The plots of docs/methods.md: what is drawn is what the CSV files say."""

from __future__ import annotations

import csv
import re
import sys

import method_plots
import numpy as np
import pytest
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.colors import to_hex
from method_plots import CARDS, PANELS, draw, read
from PIL import Image
from quality_tasks import cases
from scipy.stats import binomtest
from support.howto import ROOT

from edge_shiftkv.selection.methods import METHODS

HEADER = "suite,task,method,budget,bytes,n,mean,low,high"
TINY = {
    # 20 answers a cell, of three tasks; one cell of `mixed` is missing, and so is `snapkv` as published.
    "pages.csv": """
pages,list,"full, q8_0/q4_0",all,0.406,20,0.9,0,1
pages,look-up,"full, q8_0/q4_0",all,0.406,20,1.0,0,1
pages,which,"full, q8_0/q4_0",all,0.406,20,0.8,0,1
pages,list,full,all,1,20,0.1,0,1
pages,look-up,full,all,1,20,0.1,0,1
pages,which,full,all,1,20,0.1,0,1
pages,list,"paper, q8_0/q4_0",1/8B,0.125,20,0.6,0,1
pages,look-up,"paper, q8_0/q4_0",1/8B,0.125,20,0.7,0,1
pages,which,"paper, q8_0/q4_0",1/8B,0.125,20,0.8,0,1
pages,list,"paper, q8_0/q4_0",1/16B,0.0624,10,0.1,0,1
pages,look-up,"paper, q8_0/q4_0",1/16B,0.0624,20,0.5,0,1
pages,which,"paper, q8_0/q4_0",1/16B,0.0624,10,0.3,0,1
pages,list,paper,1/8B,0.125,20,0.1,0,1
pages,look-up,paper,1/8B,0.125,20,0.1,0,1
pages,which,paper,1/8B,0.125,20,0.1,0,1
pages,list,"paper, q8_0/q4_0",64,0.03,20,0.1,0,1
pages,look-up,"paper, q8_0/q4_0",64,0.03,20,0.1,0,1
pages,which,"paper, q8_0/q4_0",64,0.03,20,0.1,0,1
pages,all tasks,"paper, q8_0/q4_0",1/8B,0.125,66,0.2,0,1
pages,transcribe,"paper, q8_0/q4_0",1/8B,0.125,6,0.2,0,1
pages,list,"mixed, q8_0/q4_0",1/8B,0.125,20,0.5,0,1
pages,look-up,"mixed, q8_0/q4_0",1/8B,0.125,20,0.5,0,1
pages,which,"mixed, q8_0/q4_0",1/8B,0.125,20,0.5,0,1
pages,list,"mixed, q8_0/q4_0",1/16B,0.0624,20,0.5,0,1
pages,which,"mixed, q8_0/q4_0",1/16B,0.0624,20,0.5,0,1
pages,list,"snapkv:window=8,kernel=9, q8_0/q4_0",1/8B,0.125,20,0.2,0,1
pages,look-up,"snapkv:window=8,kernel=9, q8_0/q4_0",1/8B,0.125,20,0.2,0,1
pages,which,"snapkv:window=8,kernel=9, q8_0/q4_0",1/8B,0.125,20,0.2,0,1
""",
    "demo.csv": """
demo,lookup,oracle,64,,50,1,0,1
demo,line,oracle,64,,50,1,0,1
demo,values,oracle,64,,50,1,0,1
demo,transcribe,oracle,64,,50,1,0,1
demo-second,lookup,mixed,64,,50,1,0,1
demo-second,line,mixed,64,,50,1,0,1
demo-second,values,mixed,64,,50,1,0,1
demo-second,transcribe,mixed,64,,50,1,0,1
""",
    "text-long.csv": """
text,code,mixed,128,,6,1,0,1
text,codes,mixed,128,,6,0.5,0,1
text,table,mixed,128,,6,0.5,0,1
text,story,mixed,128,,6,1,0,1
""",
}


@pytest.fixture
def folder(tmp_path):
    """The tiny files."""
    for name, rows in TINY.items():
        (tmp_path / name).write_text(HEADER + rows)
    return tmp_path


def drawn(folder, *names):
    """The axes of the three panels."""
    return draw(names, {panel: read(panel, folder) for panel in PANELS}).axes


def lines(axes, label):
    return [line.get_xydata() for line in axes.get_lines() if line.get_label() == label]


def interval(right, n):
    found = binomtest(right, n).proportion_ci(method="wilson")
    return 100 * found.low, 100 * found.high


def test_scores_of_the_tasks_taken_together_stand_at_their_budgets(folder):
    pages, _, _ = drawn(folder, "paper")
    (line,) = lines(pages, "paper")
    # 1 + 10 + 3 of 40, then 12 + 14 + 16 of 60
    np.testing.assert_allclose(line, [[1 / 16, 100 * 14 / 40], [1 / 8, 100 * 42 / 60]])
    (uncut,) = lines(pages, "nothing cut")
    np.testing.assert_allclose(uncut[:, 1], 90)
    labels = [label.get_text() for label in pages.get_xticklabels()]
    assert dict(zip(pages.get_xticks(), labels, strict=True)) == {1 / 16: "1/16", 1 / 8: "1/8"}


def test_the_band_is_wilsons_interval(folder):
    pages, _, _ = drawn(folder, "paper")
    (band,) = [found for found in pages.collections if isinstance(found, PolyCollection)]
    corners = {(x, round(y, 6)) for path in band.get_paths() for x, y in path.vertices}
    expected = {(1 / 16, interval(14, 40)), (1 / 8, interval(42, 60))}
    for x, ends in expected:
        for end in ends:
            assert any(at == x and y == pytest.approx(end, abs=0.01) for at, y in corners), (x, end)
    assert {x for x, _ in corners} == {1 / 16, 1 / 8}


def test_a_single_point_has_its_interval(folder):
    _, _, texts = drawn(folder, "mixed")
    (line,) = lines(texts, "mixed")
    np.testing.assert_allclose(line, [[128, 75]])
    (bar,) = [found for found in texts.collections if isinstance(found, LineCollection)]
    np.testing.assert_allclose(bar.get_segments()[0][:, 1], interval(18, 24), atol=0.01)


def test_other_methods_are_thin_and_grey(folder):
    pages, _, _ = drawn(folder, "snapkv", "snapkv:window=8,kernel=9")
    grey = [line for line in pages.get_lines() if line.get_label() == "other methods"]
    # That which has a task missing at 1/16 has no point there.
    assert sorted(map(len, (line.get_xydata() for line in grey))) == [1, 2]
    np.testing.assert_allclose(next(line for line in grey if len(line.get_xydata()) == 1).get_xydata(), [[1 / 8, 50]])
    (ours,) = [line for line in pages.get_lines() if line.get_label() == "snapkv:window=8,kernel=9"]
    assert len({to_hex(line.get_color()) for line in [*grey, ours]}) == 2
    assert all(line.get_linewidth() < 1 < ours.get_linewidth() for line in grey)


def test_what_was_not_measured_is_said(folder):
    said = [[text.get_text() for text in axes.texts] for axes in drawn(folder, "paper")]
    assert said == [[], ["not measured"], ["not measured"]]
    _, pictures, _ = drawn(folder, "mixed")
    assert not pictures.get_lines()  # neither the oracle nor another suite


def test_panels_have_one_scale(folder):
    (ends,) = {axes.get_ylim() for axes in drawn(folder, "paper")}
    assert ends[0] == 0
    assert 100 <= ends[1] < 110


def test_files_are_written_for_all_cards(folder, tmp_path, monkeypatch):
    out = tmp_path / "plots"
    monkeypatch.setattr(sys, "argv", ["method_plots.py", "--csv", str(folder), "--out", str(out)])
    method_plots.main()
    assert {path.stem for path in out.iterdir()} == {*CARDS, "all"}
    for path in out.iterdir():
        assert path.stat().st_size < 40_000
        with Image.open(path) as picture:
            assert len(picture.getcolors()) > 2


def test_panels_are_of_suites_and_tasks_that_there_are():
    for panel in PANELS:
        assert set(panel.tasks) <= {case.task for case in cases(panel.suite, 1)}


def test_each_card_has_its_plot_and_each_method_a_card():
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    cards = re.findall(r"^## (`[^\n]*)$(.*?)(?=^## )", page, re.MULTILINE | re.DOTALL)
    shown = {}
    for title, text in cards:
        (plot,) = re.findall(r"!\[[^]]{20,}\]\(images/methods/([\w-]+)\.png\)", text)
        shown[plot] = set(re.findall(r"`([\w-]+)`", title))
    assert shown == {card: {name.partition(":")[0] for name in names} for card, names in CARDS.items()}
    assert set().union(*shown.values()) == set(METHODS)


def test_names_in_the_files_mean_what_they_mean_today():
    """The default is measured as the default: a share of a half goes by its settings."""
    with (ROOT / "docs" / "quality" / "demo.csv").open(newline="") as file:
        rows = {(row["task"], row["method"], row["budget"]): float(row["mean"]) for row in csv.DictReader(file)}
    assert rows["lookup", "mixed", "32"] == pytest.approx(0.26)
    assert rows["lookup", "paper:n_proxy=256,observed=0.5,window=8,kernel=9", "32"] == pytest.approx(0.62)
