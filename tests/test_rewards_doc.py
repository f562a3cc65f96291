"""docs/rewards.md: its Python runs, its TOML validates, its commands exist, and it lists the whole library."""

import importlib
import json
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from pipeline.config import validate
from pipeline.errors import RewardError
from stages.normalize import NormalizeConfig
from stages.rewards.base import FACTS
from stages.rewards.functions import RewardConfig, RewardFunction, Shape, check_parameters, find_reward
from stages.rewards.scorer import open_scorer
from stages.score import ScoreConfig
from tests.builders import completion_rows, prompt_rows
from tests.judge_server import Reply, always, serve
from tests.pages import commands_of, parse
from tests.rewards_doc import TARGET, reward_functions

PAGE = TARGET.with_name("rewards.md").read_text(encoding="utf-8")
MODULE = "my_rewards"
PRAGUE = {"city": "Prague"}
NO_ROW_HAS_IT = {"city": None}


def blocks(language: str) -> list[str]:
    """Return the fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture(autouse=True)
def my_rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the page's Python into the file that its first lines name."""
    assert all(text.startswith(f"# {MODULE}.py\n") for text in blocks("python"))
    (tmp_path / f"{MODULE}.py").write_text("\n\n".join(blocks("python")), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    importlib.invalidate_caches()
    monkeypatch.delitem(sys.modules, MODULE, raising=False)


def find(name: str, **arguments: Any) -> RewardFunction:
    return find_reward(RewardConfig(name="r", function=f"{MODULE}:{name}", arguments=arguments))


def score(reward: RewardFunction, *texts: str, metadata: Any = PRAGUE, reference: str | None = None) -> pl.DataFrame:
    """Return what the scorer makes of answers; their number of tokens is their number of characters."""
    completions = completion_rows(*({"completion": t, "completion_token_ids": [7] * len(t)} for t in texts))
    prompts = prompt_rows({"metadata": json.dumps(metadata), "reference_answer": reference})
    check_parameters(reward, metadata)
    with open_scorer(1) as scorer:
        return scorer.score(completions, prompts, [reward])


def test_over_one_completion_city_bonus_and_null() -> None:
    reward = find("names_the_city", bonus=0.5)
    assert reward.shape is Shape.completion
    found = score(reward, "Prague it is", "In Prague", "In Brno", "")
    assert found["reward"].to_list() == [1.5, 1.0, 0.0, 0.0]
    assert json.loads(found["detail"][1]) == {"city": "Prague", "place": 3}
    unknown = score(reward, "In Prague", metadata=NO_ROW_HAS_IT)
    assert unknown.select("reward", "error", "detail").row(0) == (
        None,
        "the function returned None",
        '{"reason": "the row has no city"}',
    )


def test_over_a_frame_the_same_comes_out() -> None:
    reward = find("names_the_city_in_frame", bonus=0.5)
    assert reward.shape is Shape.frame
    found = score(reward, "Prague it is", "In Prague", "In Brno", "")
    assert found["reward"].to_list() == [1.5, 1.0, 0.0, 0.0]
    assert found["detail"][0] == '{"city":"Prague"}'
    unknown = score(reward, "In Prague", metadata=NO_ROW_HAS_IT)
    assert unknown.select("reward", "error").row(0) == (None, "the row has no city")


def test_the_async_function_asks_the_service() -> None:
    for body, reward, error in (
        (b'{"score": 0.25}', 0.25, None),
        (b'{"score": null}', None, "the function returned None"),
        (b"{}", None, "KeyError: 'score' (my_rewards.py:"),
    ):
        with serve(always(Reply(body=body))) as server:
            function = find("rated_by_service", url=server.base_url)
            found = score(function, "text")
        assert function.is_async
        assert server.bodies == [{"text": "text"}]
        assert found["reward"].to_list() == [reward]
        assert (found["error"][0] or "").startswith(error or "")
        assert (error is None) == (found["error"][0] is None)


def test_the_expression_counts_tokens() -> None:
    reward = find("is_short", most=3)
    assert reward.shape is Shape.expression
    assert score(reward, "abc", "abcd")["reward"].to_list() == [1.0, 0.0]


def test_the_share_of_right_digits_is_counted_from_the_right() -> None:
    found = score(find("digits_right"), "100", " 90\n", "190", "", "1000", reference="100")
    # 100: all; 90: the last of three; 190: first and last; nothing; 1000: the last two of four
    assert found["reward"].to_list() == pytest.approx([1.0, 1 / 3, 2 / 3, 0.0, 0.5])
    assert found["detail"][1] == '{"answer": "90", "right": 1}'
    assert score(find("digits_right", least=4), "73", reference="73")["reward"].to_list() == [0.5]
    assert score(find("digits_right"), "73", reference=None)["error"].to_list() == ["the function returned None"]


def test_the_identity_follows_the_file_and_not_its_place(tmp_path: Path) -> None:
    for name, text in (("a.txt", "Prague\n"), ("b.txt", "Prague\n"), ("c.txt", "Brno\n")):
        (tmp_path / name).write_text(text, encoding="utf-8")
    recipes = [find("names_a_place", file=name).recipe for name in ("a.txt", "b.txt", "c.txt")]
    assert recipes[0] == recipes[1] != recipes[2]
    assert score(find("names_a_place", file="c.txt"), "Prague", "Brno!")["reward"].to_list() == [0.0, 1.0]
    with pytest.raises(RewardError, match="identity of the reward 'r'"):
        find("names_a_place", file="missing.txt")


def test_the_error_for_a_misspelt_argument_is_the_one_shown() -> None:
    with pytest.raises(RewardError) as caught:
        find_reward(RewardConfig(name="tried", function=f"{MODULE}:digits_right", arguments={"most": 4}))
    assert f"error: {caught.value}" in re.sub(r"\s+", " ", PAGE)


@pytest.mark.parametrize("text", blocks("toml"), ids=lambda text: str(len(text)))
def test_the_tables_of_the_page_are_valid_and_name_what_exists(text: str) -> None:
    tables = tomllib.loads(text)
    assert set(tables) <= {"score", "normalize"}
    config = validate(ScoreConfig, tables["score"], "score")
    normalize = validate(NormalizeConfig, tables.get("normalize", {}), "normalize")
    assert set(normalize.weights) <= {reward.name for reward in config.rewards}
    for reward in config.rewards:
        check_parameters(find_reward(reward), {**PRAGUE, "entry": {}})


@pytest.mark.parametrize("line", commands_of("rewards.md"))
def test_the_commands_of_the_page_can_be_called_like_that(line: str) -> None:
    parse(line)


def test_the_walk_through_has_all_its_commands() -> None:
    called = [
        " ".join(line.split()[:2]) if line.startswith("reward") else line.split()[0]
        for line in commands_of("rewards.md")
    ]
    assert called == ["reward try", "reward try", "rescore", "diff", "whatif", "fork"]


def test_every_function_of_the_library_is_listed_once_with_a_link_to_its_cases() -> None:
    listed = re.findall(r"^\| \[([\w.]+:\w+)\]\(reward_table\.md#(\w+)\)", PAGE, re.MULTILINE)
    names = [name.removeprefix("stages.rewards.") for name, _ in reward_functions()]
    assert sorted(name for name, _ in listed) == sorted(names)
    # GitHub makes the anchor of a heading by leaving out its punctuation
    assert [anchor for _, anchor in listed] == ["stagesrewards" + re.sub(r"[.:]", "", name) for name, _ in listed]


def test_links_lead_to_pages_and_headings_that_exist() -> None:
    for page, anchor in re.findall(r"\]\((\w*(?:\.md)?)(?:#([\w-]+))?\)", PAGE):
        text = TARGET.with_name(page or "rewards.md").read_text(encoding="utf-8")
        headings = [title.lower() for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE)]
        anchors = [re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in headings]
        assert not anchor or anchor in anchors, (page, anchor)


def test_every_fact_is_in_the_table() -> None:
    table = PAGE.partition("## What a function may ask for")[2].partition("\n\nOver one completion")[0]
    assert set(FACTS) == set(re.findall(r"`(\w+)`", re.sub(r"\|[^|]*\|$", "", table, flags=re.MULTILINE)))
