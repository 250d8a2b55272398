# SPDX-License-Identifier: Apache-2.0
"""The list of decisions is of the pages that there are, by their numbers and titles."""

from __future__ import annotations

import re
from pathlib import Path

DECISIONS = Path(__file__).parents[2] / "docs" / "decisions"
_LINE = re.compile(r"- \[(\d{4})\]\((\S+)\): (.+)")


def test_each_decision_is_in_the_list_once_with_its_title() -> None:
    listed = {}
    for line in (DECISIONS / "README.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("-"):
            entry = _LINE.fullmatch(line)
            assert entry is not None, line
            number, file, title = entry.groups()
            assert file not in listed, f"{file} is listed twice"
            listed[file] = f"# {number}: {title}"
    pages = {page.name: page for page in DECISIONS.glob("*.md") if page.name != "README.md"}
    assert listed == {name: page.read_text(encoding="utf-8").partition("\n")[0] for name, page in pages.items()}
    for name, heading in listed.items():
        assert name.startswith(heading[2:6] + "-"), f"{name} has the number of another page"


def test_numbers_are_given_once_and_none_is_left_out() -> None:
    numbers = sorted(int(page.name[:4]) for page in DECISIONS.glob("*.md") if page.name != "README.md")
    assert numbers == list(range(1, len(numbers) + 1))
