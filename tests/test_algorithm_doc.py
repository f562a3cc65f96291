"""docs/algorithm.md: every choice that a config can name has a heading, and the defaults that stand there are true."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from grpo.advantages.baselines import BASELINES
from grpo.advantages.scales import SCALES
from grpo.aggregation import AGGREGATIONS
from grpo.correction import KINDS
from grpo.kl import PLAIN, weighted_k3
from grpo.losses.options import LOSSES

DOC = (Path(__file__).parent.parent / "docs" / "algorithm.md").read_text(encoding="utf-8")
CHOICES: dict[str, Mapping[str, Callable[..., Any]]] = {
    "Baselines": BASELINES,
    "Scales": SCALES,
    "Losses": LOSSES,
    "Corrections": KINDS,
    "KL and entropy": {"weighted_k3": weighted_k3, **PLAIN},
    "Means": AGGREGATIONS,
}


def section(title: str) -> str:
    """Return the text of a chapter."""
    return DOC.split(f"\n## {title}\n")[1].split("\n## ")[0]


def entries(title: str) -> dict[str, str]:
    """Return the text under each heading of a chapter."""
    parts = re.split(r"^### (.+)$", section(title), flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


@pytest.mark.parametrize("title", CHOICES)
def test_every_choice_has_a_heading(title: str) -> None:
    assert sorted(entries(title)) == sorted(CHOICES[title])
    lines = (set(re.findall(r"`([a-z_0-9]+)`", line)) for line in DOC.splitlines() if line.startswith("|"))
    assert any(names >= CHOICES[title].keys() for names in lines), "one line of the first table names them all"


@pytest.mark.parametrize("title", ["Losses", "Corrections"])
def test_the_defaults_of_a_choice_are_those_of_its_function(title: str) -> None:
    """Options that stand under another heading, "the same options", have the same defaults."""
    for name, text in entries(title).items():
        said = {option: float(value) for option, value in re.findall(r"`(\w+) = ([\d.e-]+)`", text)}
        defaults = CHOICES[title][name].__kwdefaults__ or {}
        if "same options" in text:
            defaults = {}
        missing = defaults.keys() - said.keys() - ({"ratio_cap"} if name == "dppo_kl" else set())
        assert not missing, (name, missing)
        assert {option: value for option, value in said.items() if defaults.get(option, value) != value} == {}, name
