"""Configuration: what is accepted, and the one message for what is not."""

import json
import os
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from pydantic import BaseModel

import grpo.strict
from grpo.correction import CorrectionOptions
from pipeline.config import StrictModel, apply_overrides, load_toml, without_nulls
from pipeline.errors import ConfigError, RecipeMismatch, UsageError
from pipeline.run_dir import RunDir
from pipeline.runs import lock
from stages.config import RunConfig, check_unchanged, load_config
from stages.preflight import remarks
from stages.reward_model.reward_model import RewardModelConfig
from tests.test_identity import tables

ROOT = Path(__file__).parent.parent
MINIMAL = """
[policy]
model = "some/model"
[prompts]
source = "reasoning_gym:chain_sum"
[[score.rewards]]
name = "accuracy"
function = "stages.rewards.answers.reasoning_gym:verify"
"""


def load(tmp_path: Path, text: str = MINIMAL, *overrides: str) -> RunConfig:
    path = tmp_path / "config.toml"
    path.write_text(text)
    return load_config(path, list(overrides))


RUN_CONFIGS = sorted(path for path in (ROOT / "configs").glob("*.toml") if path.name != "audit.toml")


@pytest.mark.parametrize("path", RUN_CONFIGS, ids=lambda p: p.name)
def test_every_config_in_the_repository_loads(path: Path) -> None:
    assert load_config(path).iterations >= 1


def test_a_minimal_config_has_every_default(tmp_path: Path) -> None:
    config = load(tmp_path)
    assert (config.generate.size, config.normalize.scale, config.update.loss.clip_high) == (8, "none", 0.28)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["update.learning_rat=1"], r"update\.learning_rat: unknown key; did you mean learning_rate\?"),
        (["update.learning_rate=fast"], r"update\.learning_rate: Input should be a valid number.*found 'fast'"),
        (["iterations=2.5"], r"iterations: Input should be a valid integer.*found 2\.5"),
        (['iterations="3"'], r"iterations: Input should be a valid integer.*found '3'"),
        (["tracking.to=[]"], r"tracking\.to: List should have at least 1 item.*found \[\]"),
        (['tracking.to=["neptune"]'], r"tracking\.to\.0: Input should be 'trackio', 'tensorboard', 'wandb' or"),
        (['tracking.to=["wandb"]', "tracking.project=a/b"], r"tracking\.project: String should match.*found 'a/b'"),
        (["generate.group_size=1"], r"generate: group_size is 1.*set generate\.group_size to 2 or more"),
        (["generate.top_p=0.9"], r"generate: top_p=0\.9.*importance ratios would be wrong"),
        (["update.loss.clip_high=4.0"], r"update\.loss: dual_clip is 4\.0, inside of the clip"),
        (
            ["update.correction.low=0.5"],
            r"update\.correction\.low: unknown key; known keys: high, kind, off_policy_",
        ),
        (["update.correction.kind=token_tuncate"], r"update\.correction: kind should be none, token_truncate, .*found"),
        (
            ["update.correction.kind=k3_mask", "update.correction.high=0.0"],
            r"update\.correction\.high: .*than 0, found",
        ),
        (["update.schedule=linear", "update.total_steps=5", "update.warmup_steps=5"], "must end after the warm-up"),
        (["update.max_grad_norm=inf"], r"update\.max_grad_norm: Input should be a finite number"),
        (["update.schedule=cosine"], r"update: schedule cosine falls to 0 at total_steps: set update\.total_steps"),
        (["normalize.weights.style=1.0"], r"normalize\.weights names \['style'\], score\.rewards has \['accuracy'\]"),
        (["policy.model=starter"], r'policy\.model is "starter", but there is no \[starter\] table'),
        (["nonsense"], r"--set nonsense: expected key\.path=value"),
        (["policy.model.name=x"], r"--set policy\.model\.name=x: model is not a table"),
    ],
)
def test_wrong_settings_are_named_with_their_key(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, MINIMAL, *overrides)


NO_CORRECTION = "update.correction.kind=none"
MEMBERS = """
[[generate.members]]
name = "now"
count = 1
[[generate.members]]
name = "other"
policy = "age:20"
count = 7
"""


@pytest.mark.parametrize(
    ("text", "overrides", "cause"),
    [
        (MEMBERS, [], r"generate\.members has age:20"),
        (MEMBERS.replace("age:20", "initial"), [], r"generate\.members has initial"),
        (MEMBERS.replace("age:20", "iteration:0"), [], r"generate\.members has iteration:0"),
        (MEMBERS.replace("age:20", "some/checkpoint"), [], r"generate\.members has some/checkpoint"),
        ('[[offline]]\nrun = "x"\niterations = [0]\n', [], r"\[\[offline\]\] has answers of other policies"),
        ("", ["generate.dtype=bfloat16"], r"generate\.dtype is bfloat16"),
        ("", ["generate.dtype=float16"], r"generate\.dtype is float16"),
        ("", ["update.autocast_bf16=true"], r"update\.autocast_bf16"),
        ("", ["generate.engine=transformers", "generate.top_p=0.9"], r"truncate sampling"),
        ("", ["generate.engine=transformers", "generate.top_k=5"], r"truncate sampling"),
        ("", ["generate.engine=transformers", "generate.min_p=0.1"], r"truncate sampling"),
    ],
)
def test_going_without_correction_is_refused_when_any_answer_needs_one(
    tmp_path: Path, text: str, overrides: list[str], cause: str
) -> None:
    load(tmp_path, MINIMAL + text, *overrides)
    with pytest.raises(ConfigError, match=rf"correction\.kind is none, but .*{cause}.*set the kind to token_truncate"):
        load(tmp_path, MINIMAL + text, *overrides, NO_CORRECTION)


def test_going_without_correction_is_allowed_where_the_sampler_is_the_policy(tmp_path: Path) -> None:
    assert load(tmp_path, MINIMAL, NO_CORRECTION).update.correction.kind == "none"
    load(tmp_path, MINIMAL + MEMBERS.replace("age:20", "age:0"), NO_CORRECTION)
    stored = '[[offline]]\nrun = "x"\niterations = [0]\n'
    load(tmp_path, MINIMAL + stored, NO_CORRECTION, "update.proximal=sampler", "generate.dtype=bfloat16")


def test_all_problems_are_listed_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"(?s)batch\.x: unknown key.*update\.y: unknown key"):
        load(tmp_path, MINIMAL, "batch.x=1", "update.y=2")


def test_missing_tables_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"(?s)policy: missing.*prompts: missing.*score: missing"):
        load(tmp_path, "iterations = 1")


@pytest.mark.parametrize(("text", "message"), [(None, "does not exist"), ("a = = 1", "is not valid TOML")])
def test_a_file_that_cannot_be_read_is_one_message(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "config.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_toml(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"a = {'[' * 9999}{']' * 9999}", "nested more than 50"),
        (f"a = {'[' * 60}{']' * 60}", "nested more than 50"),
        (f"a = {'{b=' * 60}1{'}' * 60}", "nested more than 50"),
        (f"{'.'.join('a' * 20_000)} = 1", "nested more than 50"),
        (f"""{" . ".join(['"b c"'] * 20_000)} = 1""", "nested more than 50"),
        (f"[{'.'.join('a' * 20_000)}]", "nested more than 50"),
        ("a.b = [{c = 1000000000000000000000000000000}]", "holds an integer of more than 64 bits"),
        (f"a = {'9' * 5000}", "Exceeds the limit"),
        ("#" + "x" * (4 << 20), "has more than 4,194,304 bytes"),
    ],
)
def test_a_text_that_would_exhaust_the_reader_is_one_message(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "config.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_toml(path)


def test_only_a_regular_file_is_a_config(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path, tmp_path / "fifo", Path("/dev/zero")):
        with pytest.raises(ConfigError, match="is no regular file"):
            load_toml(path)


@pytest.mark.parametrize("override", [f"{'a.' * 60}b=1", f"a={'[' * 60}{']' * 60}", f"a={'9' * 30}"])
def test_an_override_is_as_shallow_as_a_file(override: str) -> None:
    with pytest.raises(ConfigError, match=r"nested more than 50|expected key\.path|64 bits"):
        apply_overrides({}, [override])


@pytest.mark.parametrize("name", ["", "a\nb", "\x1b[2J", "a\u202eb", "a\u200db", "tab\t"])
@pytest.mark.parametrize("table", ["[[score.rewards]]\nfunction = 'a:b'", "[[generate.members]]\ncount = 2"])
def test_names_are_shown_as_they_are(tmp_path: Path, table: str, name: str) -> None:
    text = f"{MINIMAL}{table}\nname = {json.dumps(name)}\n"
    with pytest.raises(ConfigError, match=r"name: (a name must be one line|String should)"):
        load(tmp_path, text)


@pytest.mark.parametrize("place", ["a\x00b", "a" * 256, "a/" * 2100])
@pytest.mark.parametrize("key", ["policy.model", "prompts.source", "evaluate.source.source"])
def test_a_path_that_no_file_system_has_is_refused(tmp_path: Path, key: str, place: str) -> None:
    with pytest.raises(ConfigError, match=f"{key}: no file system has such a path"):
        load(tmp_path, MINIMAL, f"{key}={json.dumps(place)}")


def test_a_message_shows_the_beginning_of_a_long_value(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load(tmp_path, MINIMAL, f"iterations={'x' * 10_000}")
    assert len(str(error.value)) < 600


def test_a_run_with_a_name_that_hides_something_is_not_begun(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "a\u202eb")
    with pytest.raises(UsageError, match="has invisible characters"), lock(run):
        pass
    assert not run.root.exists()


@pytest.mark.parametrize(
    ("override", "expected"),
    [("a.b=2e-6", 2e-6), ("a.b=true", True), ("a.b=text", "text"), ('a.b="2"', "2"), ("a.b=[1, 2]", [1, 2])],
)
def test_an_override_is_read_as_toml_and_else_as_text(override: str, expected: Any) -> None:
    assert apply_overrides({"a": {"c": 1}}, [override]) == {"a": {"b": expected, "c": 1}}


def test_overrides_leave_the_given_tables_alone() -> None:
    tables = {"a": {"b": 1}}
    apply_overrides(tables, ["a.b=2"])
    assert tables == {"a": {"b": 1}}


def test_members_must_add_up_to_the_group(tmp_path: Path) -> None:
    members = (
        '[[generate.members]]\nname = "a"\ncount = 2\n[[generate.members]]\nname = "b"\npolicy = "age:2"\ncount = 1\n'
    )
    assert load(tmp_path, MINIMAL + members).generate.size == 3
    with pytest.raises(ConfigError, match=r"counts of generate\.members add up to 3"):
        load(tmp_path, MINIMAL + members, "generate.group_size=4")


@pytest.mark.parametrize("override", ["iterations=20", "resources.kv_cache_gib=2.0", "evaluate.every=5"])
def test_a_run_may_go_on_with_settings_that_decide_no_result(tmp_path: Path, override: str) -> None:
    run = RunDir(tmp_path / "run")
    run.record_config("", load(tmp_path).model_dump(mode="json"))
    check_unchanged(run, load(tmp_path, MINIMAL, override))


def test_a_run_refuses_settings_that_decide_results_and_names_them(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.record_config("", load(tmp_path).model_dump(mode="json"))
    with pytest.raises(RecipeMismatch, match=r"update\.learning_rate was 1e-06, now 0\.1.*new run directory"):
        check_unchanged(run, load(tmp_path, MINIMAL, "update.learning_rate=0.1"))


def test_the_starter_follows_the_seed_of_the_run_unless_it_has_its_own() -> None:
    demo = ROOT / "configs" / "demo.toml"
    assert load_config(demo, ["seed=7"]).starter.seed == 7  # type: ignore[union-attr]
    assert load_config(demo, ["seed=7", "starter.seed=3"]).starter.seed == 3  # type: ignore[union-attr]


def test_what_is_on_by_default_can_be_switched_off_in_toml_and_stays_off_in_a_run_made_of_this_one() -> None:
    on = [
        (table, name)
        for table in (*tables(RunConfig), RewardModelConfig)
        for name, field in table.model_fields.items()
        if type(None) in (of := get_args(field.annotation))
        and not any(isinstance(kind, type) and issubclass(kind, BaseModel) for kind in of)
        and not field.is_required()
        and field.default is not None
    ]
    names = {"clip_low", "clip_high", "dual_clip", "ratio_cap", "max_grad_norm", "answer_column"}
    assert {name for _, name in on} == names
    needed = {"source": "x", "base": "x", "preferences": ["x"]}
    for table, name in on:
        off = table.model_validate({key: needed[key] for key in needed if key in table.model_fields} | {name: "none"})
        assert getattr(off, name) is None
        assert getattr(table.model_validate(without_nulls(off.model_dump(mode="json"))), name) is None


@pytest.mark.parametrize(
    ("learning_rate", "weight_decay", "is_told"),
    [(1e-6, 0.01, True), (1e-6, 0.05, True), (1e-6, 0.1, False), (1e-3, 0.01, False), (1e-6, 0.0, False)],
)
def test_a_decay_that_float32_rounds_away_is_told(
    tmp_path: Path, learning_rate: float, weight_decay: float, is_told: bool
) -> None:
    settings = (f"update.learning_rate={learning_rate}", f"update.weight_decay={weight_decay}")
    found = remarks(load(tmp_path, MINIMAL, *settings))
    assert [text.partition(" is ")[0] for text in found] == ["update.learning_rate times update.weight_decay"] * is_told
    decayed = np.float32(1.0) * np.float32(1 - learning_rate * weight_decay)
    if not is_told and weight_decay:
        assert 1 - decayed == pytest.approx(learning_rate * weight_decay, rel=0.2)


@pytest.mark.parametrize(
    ("loss", "mean", "is_told"),
    [("gspo", "token_mean", True), ("gspo", "row_mean", False), ("ppo_clip", "token_mean", False)],
)
def test_a_loss_of_rows_under_another_mean_is_told(tmp_path: Path, loss: str, mean: str, is_told: bool) -> None:
    found = remarks(load(tmp_path, MINIMAL, f"update.loss.name={loss}", f"batch.aggregation={mean}"))
    assert [text.partition(" is ")[0] for text in found] == ["update.loss gspo"] * is_told


@pytest.mark.parametrize(
    ("loss", "steps", "is_told"), [("reinforce", 2, True), ("reinforce", 1, False), ("cispo", 2, False)]
)
def test_a_loss_without_a_ratio_over_several_steps_is_told(
    tmp_path: Path, loss: str, steps: int, is_told: bool
) -> None:
    found = remarks(load(tmp_path, MINIMAL, f"update.loss.name={loss}", f"batch.optimizer_steps={steps}"))
    assert [text.partition(" takes ")[0] for text in found] == ["update.loss reinforce"] * is_told


def test_the_tables_of_grpo_are_as_strict_as_all_others() -> None:
    assert grpo.strict.StrictModel.model_config == StrictModel.model_config
    assert CorrectionOptions.model_fields["veto_low"].description is not None


def test_a_config_is_read_once(tmp_path: Path) -> None:
    """An editor may save it in the middle: the run keeps the text that was parsed."""
    from flows.prepare import prepare

    class Saved(type(Path())):  # type: ignore[misc]
        """A file that says something else when it is read again."""

        def read_text(self, *arguments: object, **named: object) -> str:
            return str(self.read_bytes().decode())

        def read_bytes(self) -> bytes:
            before = bytes(Path(self).read_bytes())
            Path(self).write_bytes(before + b"# saved\n")
            return before

    with pytest.raises(ConfigError, match="does not exist"):
        prepare(Saved(tmp_path / "absent.toml"), str(tmp_path / "run"))
    (tmp_path / "rows.jsonl").write_text('{"question": "1 + 1 =", "answer": "2"}\n')
    text = (
        f'[policy]\r\nmodel = "starter"\n[starter]\n[prompts]\nsource = "{tmp_path}/rows.jsonl"\n'
        '[[score.rewards]]\nname = "exact"\nfunction = "stages.rewards.answers.matching:exact_match"\n'
        "[generate]\nnum_threads = 1\nmax_tokens = 8\n[update]\nnum_threads = 1\n"
    )
    (tmp_path / "config.toml").write_text(text, newline="")
    assert prepare(Saved(tmp_path / "config.toml"), str(tmp_path / "run")).toml == text
    assert (tmp_path / "config.toml").read_text().count("# saved") == 1
