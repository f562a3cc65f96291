"""A report: what is measured, which groups are chosen, and that nothing a model wrote can become markup."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq
import pytest
from markupsafe import escape

from flows.report.figures import draw, figure_specs
from flows.report.render import content_security_policy, for_script, say, write_report
from pipeline.errors import ArtifactDamaged, ArtifactMissing, SchemaError, UsageError
from pipeline.text import STEERING, visible
from stages.inspect.report_data import Report, heat
from tests.builders import advantage_rows, check_rows, completion_rows, fill, prompt_rows, reward_rows, write_artifact
from tests.manifests import fix_hashes
from tests.report_runs import new_run, write_iteration

HOSTILE = (
    '</script><script>window.pwned=1</script><img src=x onerror="pwned=1"><a href="javascript:pwned()">&amp;\u2028'
)
STEERS = "\x00\x01\x1b\ufffe\r\x9b\u202e\u200b\u2028\ufeff\U000e0041"


class Page(HTMLParser):
    """Collects what a browser would run, load or follow."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.styles: list[str] = []
        self.policy = ""
        self._open: tuple[str, dict[str, str | None]] | None = None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag in ("script", "style"):
            self._open = (tag, dict(attrs))
            self.scripts += [(dict(attrs), "")] if tag == "script" else []
        if ("http-equiv", "Content-Security-Policy") in attrs:
            self.policy = dict(attrs)["content"] or ""

    def handle_data(self, data: str) -> None:
        if self._open is None:
            return
        tag, attributes = self._open
        if tag == "style":
            self.styles.append(data)
        else:
            self.scripts[-1] = (attributes, self.scripts[-1][1] + data)

    def handle_endtag(self, tag: str) -> None:
        self._open = None

    def data(self, name: str) -> object:
        return next(json.loads(text) for attributes, text in self.scripts if attributes.get("id") == name)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Page:
    """Return the page of a run in which the model, a prompt, names and findings all try to be markup."""
    root = tmp_path_factory.mktemp("hostile")
    run = new_run(root, {"policy": {"model": HOSTILE}})
    write_iteration(run, 0, answer=HOSTILE)
    write_iteration(run, 1, answer=HOSTILE, reward=0.5)
    rows = [{"iteration": 0, "group_id": "g0", "completion_id": "c1"}, {"iteration": 7, "group_id": HOSTILE}]
    finding = {"check": HOSTILE, "severity": HOSTILE, "message": HOSTILE, "rows": rows}
    (root / "findings.json").write_text(json.dumps([finding]), encoding="utf-8")
    path, _ = write_report(run.root, root / "page.html", findings=root / "findings.json")
    return Page(path.read_text(encoding="utf-8"))


def test_no_text_of_the_run_becomes_an_element(hostile: Page) -> None:
    assert {"img", "iframe", "form", "object", "embed", "base", "link"}.isdisjoint(hostile.tags)
    executable = [text for attributes, text in hostile.scripts if attributes.get("type") != "application/json"]
    assert len(executable) == 1
    assert "pwned" not in executable[0]


def test_an_answer_travels_whole_as_json(hostile: Page) -> None:
    [group] = hostile.data("groups-0")  # type: ignore[misc]
    assert group["members"][0]["text"] == HOSTILE
    assert group["members"][0]["parts"][0]["detail"] == HOSTILE


def test_the_policy_admits_the_script_and_the_style_by_hash_and_nothing_else(hostile: Page) -> None:
    directives = dict(part.split(" ", 1) for part in hostile.policy.split("; "))
    [script] = [text for attributes, text in hostile.scripts if attributes.get("type") != "application/json"]
    [style] = hostile.styles

    def digest(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    assert directives == {
        "default-src": "'none'",
        "script-src": digest(script),
        "style-src": digest(style),
        "base-uri": "'none'",
        "form-action": "'none'",
    }


def test_nothing_on_the_page_needs_what_the_policy_forbids(hostile: Page) -> None:
    names = {name for name, _ in hostile.attributes}
    assert "style" not in names
    assert "src" not in names
    assert [name for name in names if name.startswith("on")] == []
    assert {value[0] for name, value in hostile.attributes if name.endswith("href") and value} == {"#"}
    [script] = [text for attributes, text in hostile.scripts if attributes.get("type") != "application/json"]
    assert [
        word for word in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval(") if word in script
    ] == []
    assert "@import" not in hostile.styles[0]
    assert "url(" not in hostile.styles[0]


def test_a_finding_leads_to_its_row_only_where_the_page_has_it(hostile: Page) -> None:
    links = [value for name, value in hostile.attributes if name == "href" and value and value.startswith("#group/")]
    assert links == ["#group/0/g0/c1"]
    assert hostile.data("groups-0")[0]["reason"] == "audit finding"  # type: ignore[index]


def test_errors_stand_before_warnings_and_what_is_too_much_is_counted(tmp_path: Path) -> None:
    rows = [{"iteration": 0, "group_id": f"absent{i}"} for i in range(23)]
    findings = [{"check": s, "severity": s, "message": "m", "rows": rows} for s in ("warning", "error")]
    findings += [{"check": "note", "severity": "info", "message": "m"}] * 199
    (tmp_path / "findings.jsonl").write_text("\n".join(map(json.dumps, findings)), encoding="utf-8")
    path, _ = write_report(new_run(tmp_path).root, tmp_path / "page.html", findings=tmp_path / "findings.jsonl")
    page = path.read_text(encoding="utf-8")
    assert page.index("</span> error</h3>") < page.index("</span> warning</h3>") < page.index("</span> note</h3>")
    assert page.count("and 3 more") == 2
    assert "And 1 more, which the audit itself prints." in page


def test_checks_that_failed_stand_by_severity_with_their_last_iterations(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    often = {"name": "often", "note": HOSTILE, "max_share": None}
    for index in range(22):
        held = [{"name": "held", "severity": "block", "condition": HOSTILE, "max_share": 0.05}] * (index == 21)
        write_artifact(run.place(index, "checks"), "checks", check_rows(often, *held))
    path, _ = write_report(run.root)
    page = path.read_text(encoding="utf-8")
    assert "22 iterations with checks. Those that failed:" in page
    assert page.index("block</span> held</h3>") < page.index("warn</span> often</h3>")
    assert "<li>iteration 21: 1 of 2 rows (50.0%), at most 5.0% may</li>" in page
    assert f"<li>iteration 2: 1 of 2 rows (50.0%); {escape(visible(HOSTILE))}</li>" in page
    assert "iteration 1: " not in page
    assert "<li>and 2 earlier</li>" in page
    assert "img" not in Page(page).tags


def test_a_run_whose_checks_passed_says_so(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    write_artifact(run.place(0, "checks"), "checks", check_rows({"passed": True}))
    path, _ = write_report(run.root)
    assert "1 iteration with checks, in which none failed." in path.read_text(encoding="utf-8")


def test_json_in_a_script_element_cannot_end_it() -> None:
    text = for_script({"a": "</script>&\u2028\u2029"})
    assert text == '{"a":"\\u003c/script\\u003e\\u0026\\u2028\\u2029"}'
    assert json.loads(text) == {"a": "</script>&\u2028\u2029"}


def test_the_policy_changes_with_the_script() -> None:
    assert content_security_policy("a", "b") != content_security_policy("a", "c")


def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    write_iteration(run, 0)
    write_iteration(run, 1, reward=0.25)
    first, second = (write_report(run.root, tmp_path / name)[0].read_bytes() for name in ("a.html", "b.html"))
    assert first == second


def test_a_run_of_rewards_and_advantages_alone_has_a_report(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    write_artifact(run.place(4, "rewards"), "rewards", reward_rows(g=[1.0, 0.0]))
    rows = [{"completion_id": f"g-{i}", "reward": 1.0 - i} for i in range(2)]
    write_artifact(run.place(4, "advantages"), "advantages", advantage_rows(*rows))
    path, report = write_report(run.root)
    assert path == run.root / "report.html"
    assert report.counts == {"completions": 2, "groups": 1, "shown_groups": 1, "shown_completions": 2}
    page = path.read_text(encoding="utf-8")
    assert "completions: not stored for any iteration." in page
    assert "Length: completions of this run does not hold it." in page


def test_a_run_without_iterations_has_a_report(tmp_path: Path) -> None:
    path, _ = write_report(new_run(tmp_path).root)
    assert "No iteration has rewards or answers yet." in path.read_text(encoding="utf-8")


def steering(text: str) -> str:
    return "".join(sorted(set(STEERING.findall(text))))


def test_no_character_that_steers_is_on_the_page(tmp_path: Path) -> None:
    """Names, ids and reasons of every kind reach the page: legends, tables, groups, findings, facts."""
    run = new_run(tmp_path, {"policy": {"model": STEERS}, "score": {"rewards": [{"name": STEERS, "function": STEERS}]}})
    for index, reward in enumerate((1.0, 0.5)):
        ids = {"completion_id": f"c{STEERS}", "group_id": f"g{STEERS}"}
        texts = ("policy_name", "policy_digest", "finish_reason", "completion")
        rows = {**ids, **dict.fromkeys(texts, f"x{index}{STEERS}")}
        write_artifact(run.place(index, "completions"), "completions", completion_rows(rows))
        write_artifact(run.place(index, "prompts"), "prompts", prompt_rows({"task": STEERS}))
        parts = [{**ids, "reward_name": f"{STEERS}{i}", "reward": reward / i} for i in (1, 2)]
        rewards = fill("rewards", parts, error=STEERS, detail=STEERS, reward_recipe="r")
        write_artifact(run.place(index, "rewards"), "rewards", rewards)
        advantages = advantage_rows({**ids, "reward": reward, "drop_reason": f"{STEERS}{index}"})
        checks = check_rows(dict.fromkeys(("name", "severity", "condition", "note"), STEERS))
        write_artifact(run.place(index, "checks"), "checks", checks)
        write_artifact(run.place(index, "advantages"), "advantages", advantages)
    named = {"iteration": 0, "group_id": f"g{STEERS}", "completion_id": f"c{STEERS}"}
    finding = {"check": STEERS, "severity": STEERS, "message": STEERS, "rows": [named]}
    (tmp_path / "findings.json").write_text(json.dumps([finding]), encoding="utf-8")
    path, _ = write_report(run.root, tmp_path / "page.html", findings=tmp_path / "findings.json")
    text = path.read_text(encoding="utf-8")
    assert steering(text) == ""
    assert steering(unescape(text.partition("<script")[0])) == ""
    page = Page(text)
    [group] = page.data("groups-0")  # type: ignore[misc]
    assert group["members"][0]["text"] == f"x0{STEERS}"
    legends = re.findall(r"<text[^>]*>([^<]*)</text>", text)
    assert [legend for legend in legends if "x00" in legend], legends


def test_the_script_shows_what_the_terminal_shows(tmp_path: Path) -> None:
    path, _ = write_report(new_run(tmp_path).root)
    page = Page(path.read_text(encoding="utf-8"))
    [script] = [text for attributes, text in page.scripts if attributes.get("type") != "application/json"]
    assert re.findall(r"textContent = (?!visible|tokens|event.target.title).*", script) == []
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed: the script's own function cannot be asked")
    function = script[script.index("function visible") : script.index("function el(")]
    samples = [STEERS, "a\n\tb \\neq", *map(chr, range(0, 0x110000, 37))]
    code = f"const STEERING = new RegExp({json.dumps(page.data('page-data')['steering'])}, 'gu'); {function}"  # type: ignore[index]
    code += "const texts = JSON.parse(require('fs').readFileSync(0)); console.log(JSON.stringify(texts.map(visible)));"
    done = subprocess.run([node, "-e", code], input=json.dumps(samples), capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [visible(sample) for sample in samples]


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("rewards", "said"),
    [
        ((NAN, 1.0), "1 values are no numbers and stand in no cell"),
        ((-INF, INF), "\u2212inf"),
        ((1e308, -1e308), "beyond 1e+100, and not drawn"),
        ((1.7e308, 1.7e308), "values beyond the edges stand in the outer cells"),
    ],
)
def test_numbers_beyond_drawing_are_said(tmp_path: Path, rewards: tuple[float, float], said: str) -> None:
    run = new_run(tmp_path)
    for index, reward in enumerate(rewards):
        write_iteration(run, index, reward=reward)
    path, _ = write_report(run.root)
    page = path.read_text(encoding="utf-8")
    assert said in page
    assert "NaN" not in page.partition("<script>")[0]


def test_rows_without_a_column_are_one_error(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    write_iteration(run, 0)
    place = run.place(0, "rewards")
    rows = pq.read_table(place / "part-00000.parquet").drop_columns(["reward_name"])
    pq.write_table(rows, place / "part-00000.parquet")
    fix_hashes(place)
    with pytest.raises(SchemaError, match="lacks what a report needs"):
        write_report(run.root)


def test_a_prompt_without_a_text_has_a_report(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    write_iteration(run, 0)
    shutil.rmtree(run.place(0, "prompts"))
    silent = prompt_rows({"messages": [{"role": None, "content": None}]})
    write_artifact(run.place(0, "prompts"), "prompts", silent)
    path, _ = write_report(run.root)
    [group] = Page(path.read_text(encoding="utf-8")).data("groups-0")  # type: ignore[misc]
    assert group["messages"] == [{"role": None, "content": None}]


def test_a_changed_file_is_reported_not_shown(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    write_iteration(run, 0)
    (run.place(0, "rewards") / "part-00000.parquet").write_bytes(b"")
    with pytest.raises(ArtifactDamaged, match="has 0 bytes, its manifest says"):
        write_report(run.root)


def report_of(series: dict[str, list[float | None]]) -> Report:
    num = len(next(iter(series.values())))
    return Report("r", {}, list(range(num)), {}, {"parts": series}, None, None, {}, {}, None)


def test_names_with_dollars_underscores_and_foreign_letters_are_drawn_as_they_are() -> None:
    spec = next(spec for spec in figure_specs() if spec.name == "parts")
    names = ["_private", "$x^2$", "<b>漢字</b>"]
    drawn = draw(spec, report_of({name: [0.0, float(i)] for i, name in enumerate(names, 1)}))
    assert drawn is not None
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", drawn.svg)
    assert [t for t in texts if "x" in t or "_" in t or "漢" in t] == [
        " _private",
        "$x^2$",
        "&lt;b&gt;漢字&lt;/b&gt;",
    ]


def test_what_never_changes_is_said_not_drawn() -> None:
    spec = next(spec for spec in figure_specs() if spec.name == "parts")
    drawn = draw(spec, report_of({"a": [1.0, 1.0 + 1e-9, None]}))
    assert drawn is not None
    assert drawn.svg == ""


def test_drawings_have_the_pages_colours_and_no_inline_style() -> None:
    report = report_of({"a": [0.0]})
    report.rewards = heat([pl.Series([0.0, 1.0, 1.0])], [0])
    spec = next(spec for spec in figure_specs() if spec.heat == "rewards")
    drawn = draw(spec, report)
    assert drawn is not None
    assert re.findall(r"#0[0-9a-f]{5}|style=", drawn.svg) == []
    assert "var(--heat-7)" in drawn.svg


def test_every_colour_of_the_style_sheet_is_defined() -> None:
    page = Path(__file__).parent.parent / "flows" / "report" / "page"
    style = (page / "page.css").read_text(encoding="utf-8")
    defined = set(re.findall(r"(--[\w-]+):", style))
    assert set(re.findall(r"var\((--[\w-]+)\)", style)) <= defined
    names = [spec.name for spec in figure_specs()]
    assert len(names) == len(set(names)), "names are ids of the page"


@pytest.mark.parametrize(
    ("value", "is_share", "text"),
    [(0.60302734, False, "0.603"), (None, False, ""), (-0.5, False, "\u22120.5"), (1.39e-13, False, "1.39e\u221213"),
     (0.0, True, "0"), (0.98974, True, "99.0%"), (0.00049, True, "0.05%"), (12345.6, False, "12,346"),
     (1.0, True, "100.0%")],
)  # fmt: skip
def test_numbers_have_a_sensible_precision(value: float | None, is_share: bool, text: str) -> None:
    assert say(value, is_share=is_share) == text


def test_mistaken_arguments_are_told(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    with pytest.raises(ArtifactMissing, match="not a run directory"):
        write_report(tmp_path)
    with pytest.raises(UsageError, match="at least one group"):
        write_report(run.root, groups=0)
    with pytest.raises(UsageError, match="name a file of an audit's findings"):
        write_report(run.root, findings=tmp_path / "absent.json")
    with pytest.raises(UsageError, match="--output"):
        write_report(run.root, tmp_path / "absent" / "page.html")
