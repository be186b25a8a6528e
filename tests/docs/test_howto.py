"""Every example of README and docs/howto runs, on the shipped model, and prints what it says."""

import pytest
from support import howto

PAGES = [howto.ROOT / "README.md", *sorted((howto.ROOT / "docs" / "howto").glob("*.md"))]
PAGES = [page for page in PAGES if howto.program(page)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_examples_run(page, tmp_path, demo):
    code = howto.program(page)
    left = howto.run(code, tmp_path)
    for line in howto.promised(code):
        assert line in left, f"not printed, or not in this order: {line!r}"
        left = left.partition(line)[2]


def test_the_examples_are_found(tmp_path, demo):
    """The extractor itself: blocks in order, nested ones, and what is to be printed."""
    page = tmp_path / "page.md"
    page.write_text(
        "# A\n\n```python\nif True:\n    x = 1\n```\n\nText.\n\n```python\n    print(x)  # one\n    # > 1\n```\n\n"
        "```sh\nfalse\n```\n\n```python server\nraise SystemExit\n```\n"
    )
    code = howto.program(page)
    assert howto.promised(code) == ["1"]
    assert howto.run(code, tmp_path) == "1\n"
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        (tmp_path / "fails").mkdir()
        howto.run("1 / 0", tmp_path / "fails")
