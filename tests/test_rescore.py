"""Re-scoring stored completions, comparing two scorings, and training on the result, on a small scripted run."""

import json
import shutil
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from flows.commands.diff import diff_rewards
from flows.commands.fork import fork_tables
from flows.commands.reward import try_
from flows.commands.verify import print_verification
from flows.commands.whatif import whatif
from flows.printing import Format
from flows.reporter import SilentReporter
from flows.rescoring import choose_iterations, parse_iterations, rescore_run
from flows.session import Session
from pipeline.config import load_toml, validate
from pipeline.errors import (
    ArtifactDamaged,
    ArtifactMissing,
    ConfigError,
    PolicyError,
    RecipeMismatch,
    RewardError,
    UsageError,
)
from pipeline.run_dir import RunDir
from pipeline.runs import open_run
from stages.config import RunConfig, recorded_config
from stages.inspect.metrics import iteration_metrics
from tests.small_run import make_small_run

ROOT = Path(__file__).parent.parent
REWARDS = """
[[score.rewards]]
name = "exact"
function = "stages.rewards.answers.matching:exact_match"
[[score.rewards]]
name = "seven"
function = "tests.rewards:has_seven"
"""


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, tiny_policy: Path) -> Path:
    """Return a finished run, not to be changed."""
    return make_small_run(tmp_path_factory.mktemp("rescore"), tiny_policy, iterations=2)


@pytest.fixture
def run(original: Path, tmp_path: Path) -> Path:
    """Return a copy of the finished run."""
    return Path(shutil.copytree(original, tmp_path / "runs" / "small"))


def config(run: Path, text: str, name: str = "new.toml") -> Path:
    path = run.parent.parent / name
    path.write_text(text)
    return path


def rescored(run: Path, text: str, new: Path, iterations: list[int] | None = None) -> RunDir:
    rescore_run(open_run(run), load_toml(config(run, text)), RunDir(new), iterations, [], SilentReporter())
    return open_run(new)


def contents(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_a_rescored_run_holds_new_rewards_and_refers_to_the_old_completions(run: Path, tmp_path: Path) -> None:
    before = contents(run)
    new = rescored(run, REWARDS, tmp_path / "new")
    assert contents(run) == before
    assert new.iterations() == [0, 1]
    assert not new.place(0, "completions").exists()
    assert new.open(1, "completions").digest == open_run(run).open(1, "completions").digest
    rows = new.open(0, "rewards").read()
    assert rows["reward_name"].to_list() == ["exact", "seven"] * 4
    assert new.open(0, "rewards").manifest.inputs["completions"] == {
        "path": "../../../../runs/small/iterations/000000/completions",
        "digest": open_run(run).open(0, "completions").digest,
    }


def test_the_same_rewards_give_the_same_advantages(run: Path, tmp_path: Path) -> None:
    same = '[[score.rewards]]\nname = "exact"\nfunction = "stages.rewards.answers.matching:exact_match"\n'
    new = rescored(run, same, tmp_path / "new")
    for index in (0, 1):
        assert new.open(index, "advantages").digest == open_run(run).open(index, "advantages").digest


def test_rescoring_again_finds_what_is_there_and_another_config_is_refused(run: Path, tmp_path: Path) -> None:
    rescored(run, REWARDS, tmp_path / "new", [1])
    before = contents(tmp_path / "new")
    rescored(run, REWARDS, tmp_path / "new", [1])
    assert contents(tmp_path / "new") == before
    rescored(run, "[score]\nmax_failed_share = 0.5\n" + REWARDS, tmp_path / "new", [1])  # decides no row
    again = contents(tmp_path / "new")
    assert {name for name in before if again[name] != before[name]} == {"config.toml", "config.resolved.json"}
    other = REWARDS.replace("matching:exact_match", "matching:token_f1")
    with pytest.raises(RecipeMismatch, match=r"scored by other versions of the reward functions \['exact'\]"):
        rescored(run, other, tmp_path / "new", [1])
    assert contents(tmp_path / "new") == again  # refused before anything is written
    with pytest.raises(RecipeMismatch, match=r"normalize.eps was 0.0001, now 0.5"):
        rescored(run, "[normalize]\neps = 0.5\n" + REWARDS, tmp_path / "new", [1])


def test_a_reward_that_asks_for_what_is_not_there_is_refused_before_anything_is_written(
    run: Path, tmp_path: Path
) -> None:
    wants_city = '[[score.rewards]]\nname = "x"\nfunction = "tests.test_score:everything"\n'
    with pytest.raises(RewardError, match=r"wants \['city'\]"):
        rescored(run, wants_city, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_iterations_that_do_not_exist_are_named(run: Path) -> None:
    with pytest.raises(ArtifactMissing, match=r"no completions of the iterations \[7\], it has 0 to 1"):
        choose_iterations(open_run(run), [0, 7])


@pytest.mark.parametrize(("text", "numbers"), [("3", [3]), ("0-2", [0, 1, 2]), ("0,4,8-9", [0, 4, 8, 9]), (None, None)])
def test_iterations_are_numbers_and_ranges(text: str | None, numbers: list[int] | None) -> None:
    assert parse_iterations(text) == numbers


@pytest.mark.parametrize("text", ["", "a", "3-1", "1-"])
def test_what_names_no_iterations_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="names no iterations"):
        parse_iterations(text)


def test_completions_that_moved_or_were_replaced_are_refused(run: Path, tmp_path: Path) -> None:
    new = rescored(run, REWARDS, tmp_path / "new", [0])
    run.rename(run.with_name("elsewhere"))
    with pytest.raises(ArtifactMissing, match="where no finished artifact is: put the run with the digest"):
        new.open(0, "completions")
    (run / "iterations").mkdir(parents=True)
    other = run.with_name("elsewhere") / "iterations" / "000001"
    other.rename(run / "iterations" / "000000")
    with pytest.raises(ArtifactDamaged, match="another artifact lies there by now"):
        new.open(0, "completions")


def test_an_iteration_that_has_completions_takes_no_others_for_them(run: Path, tmp_path: Path) -> None:
    new = rescored(run, REWARDS, tmp_path / "new", [0])
    before, source = contents(new.root), open_run(run)
    with pytest.raises(RecipeMismatch, match=r"iteration 0 of .*new has other completions .* use a new run directory"):
        new.refer(0, "completions", source.open(1, "completions"))
    new.refer(0, "completions", source.open(0, "completions"))
    assert contents(new.root) == before


def test_a_run_that_is_a_link_to_another_disk_finds_what_it_refers_to(run: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk" / "of" / "mine"
    disk.mkdir(parents=True)
    (run.parent / "new").symlink_to(disk)
    new = rescored(run, REWARDS, run.parent / "new")
    assert new.open(0, "completions").digest == RunDir(run).open(0, "completions").digest
    assert print_verification(new.root, 20, Format.table)


def test_rescoring_starts_neither_torch_nor_vllm_nor_prefect(run: Path, tmp_path: Path) -> None:
    path = config(run, REWARDS)
    code = (
        "import sys\nfrom flows.cli import main\n"
        f"sys.argv = ['grpo', 'rescore', {str(run)!r}, {str(path)!r}, '--run', {str(tmp_path / 'new')!r}]\n"
        "try:\n    main()\nexcept SystemExit as e:\n    assert not e.code\n"
        "print([m for m in ('torch', 'vllm', 'prefect', 'transformers') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


def test_the_difference_of_two_scorings_is_found_exactly(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Turning right into wrong turns the two advantages of the informative group round, in both iterations."""
    text = '[[score.rewards]]\nname = "exact"\nfunction = "tests.rewards:opposite"\n'
    rescored(run, text, tmp_path / "new")
    assert diff_rewards(run, tmp_path / "new", 0.5, Format.table)
    assert not diff_rewards(run, tmp_path / "new", 0.49, Format.table)
    output = capsys.readouterr().out
    assert "the advantage of 4 (50.00%) has another sign, of 4 the opposite one" in output
    assert "4 groups: 0 gain a signal, 0 lose it" in output
    assert not diff_rewards(run, tmp_path / "new", 0.0, Format.jsonl)
    moved = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["advantage_a"], row["advantage_b"], row["completion"]) for row in moved] == [
        (0.5, -0.5, "2"),
        (-0.5, 0.5, "3"),
    ] * 2


def test_a_scoring_does_not_differ_from_itself(run: Path) -> None:
    assert diff_rewards(run, run, 0.0, Format.jsonl)


def test_runs_without_common_completions_cannot_be_compared(run: Path, tmp_path: Path) -> None:
    one, other = (rescored(run, REWARDS, tmp_path / f"new{i}", [i]).root for i in (0, 1))
    with pytest.raises(ArtifactMissing, match="share no iteration with the same completions"):
        diff_rewards(one, other, 0.0, Format.table)


def test_what_if_shows_what_another_normalization_would_change(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(run)
    whatif(run, ["normalize.baseline=none"], Format.jsonl)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    # without baseline the right answer keeps its 1 and the wrong one its 0, so that one advantage changes its sign
    assert [(r["iteration"], r["completions"], r["sign_changes"], r["opposite_signs"]) for r in rows] == [
        (0, 4, 1, 0),
        (1, 4, 1, 0),
    ]
    assert contents(run) == before


def test_what_if_of_another_table_is_refused(run: Path) -> None:
    with pytest.raises(UsageError, match=r"give settings of \[normalize\]"):
        whatif(run, ["update.learning_rate=1.0"], Format.table)


def test_a_reward_can_be_tried_on_stored_completions(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(run)
    try_("tests.rewards:misbehave", run, [], 0, 3, None, Format.jsonl)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["completion"], row["reward"]) for row in rows] == [("2", 1.0), ("3", 1.0), ("3", 1.0)]
    try_("tests.rewards:seven_with_detail", run, ["word='2'"], 0, 8, None, Format.table)
    output = capsys.readouterr().out
    assert 'detail     {"completion":"2","task":' in output
    assert "[red]0 + 2 =" in output
    assert contents(run) == before


def test_a_fork_trains_on_stored_completions_under_new_rewards(run: Path, tmp_path: Path) -> None:
    """Offline: nothing is generated; the policy and its optimizer go on from where the other run left them."""
    text = '[[score.rewards]]\nname = "exact"\nfunction = "tests.rewards:opposite"\n'
    tables = fork_tables(open_run(run), 1, load_toml(config(run, text)), None, [])
    settings = validate(RunConfig, tables, "fork")
    assert [(o.run, o.iterations) for o in settings.offline] == [(str(run), [1])]
    new = RunDir(tmp_path / "fork")
    with closing(Session(settings, new)) as session:
        session.initial_policy()
        session.perform("generate", 0)
        for stage in ("score", "normalize", "batch", "update"):
            session.perform(stage, 0)
    old_policy = open_run(run).open(0, "policy")
    initial = next(a for a in new.artifacts() if a.path.name == "initial_policy")
    assert initial.manifest.inputs["policy"]["digest"] == old_policy.digest
    assert initial.manifest.files["model.safetensors"] == old_policy.manifest.files["model.safetensors"]
    state = open_run(run).open(0, "optimizer").manifest.files["state.safetensors"]
    assert initial.manifest.files["optimizer/state.safetensors"] == state
    advantages = new.open(0, "advantages").read()["advantage"]
    assert (-advantages).to_list() == open_run(run).open(1, "advantages").read()["advantage"].to_list()
    assert len(new.open(0, "training_records").read()) == 2
    assert new.open(0, "policy").digest != open_run(run).open(1, "policy").digest
    assert iteration_metrics(new, 0, 1.0)["generate_tokens_per_second"] is None


def test_offline_rows_have_no_age(run: Path, tmp_path: Path) -> None:
    """The stored iteration 0 feeds iteration 1, whose own policy has seen one update more than its author."""
    text = f'[batch]\nmax_policy_age = 0\n[[offline]]\nrun = "{run}"\niterations = [1, 0]\n'
    settings = validate(RunConfig, fork_tables(open_run(run), 0, load_toml(config(run, text)), None, []), "fork")
    new = RunDir(tmp_path / "fork")
    with closing(Session(settings, new)) as session:
        session.initial_policy()
        session.perform("generate", 1)
        for stage in ("score", "normalize", "batch"):
            session.perform(stage, 1)
    assert set(new.open(1, "batches").read()["drop_reason"]) == {None, "zero_variance"}
    new.record_config("", settings.model_dump(mode="json"))
    assert print_verification(new.root, 20, Format.table)


def test_a_rescored_run_can_be_verified(run: Path, tmp_path: Path) -> None:
    assert print_verification(rescored(run, REWARDS, tmp_path / "new").root, 20, Format.table)


def test_a_fork_of_a_fork_is_fed_by_the_fork(run: Path, tmp_path: Path) -> None:
    settings = validate(RunConfig, fork_tables(open_run(run), 1, load_toml(config(run, REWARDS)), None, []), "fork")
    fork = RunDir(tmp_path / "fork")
    fork.record_config("", settings.model_dump(mode="json"))
    with closing(Session(settings, fork)) as session:
        session.initial_policy()
        session.perform("generate", 0)
        for stage in ("score", "normalize", "batch", "update"):
            session.perform(stage, 0)
    second = fork_tables(open_run(fork.root), 0, load_toml(config(run, REWARDS)), 1, [])
    assert second["offline"] == [{"run": str(fork.root), "iterations": [0]}]


def test_nothing_is_generated_over_the_completions_of_another_run(run: Path, tmp_path: Path) -> None:
    new = rescored(run, REWARDS, tmp_path / "new", [0])
    with closing(Session(recorded_config(new), new)) as session, pytest.raises(UsageError, match="refers to the compl"):
        session.perform("prompts", 0)
    assert not new.place(0, "prompts").exists()


def test_a_fork_wants_a_policy_that_exists(run: Path) -> None:
    with pytest.raises(ArtifactMissing, match="has no policy after 5 updates"):
        fork_tables(open_run(run), 5, load_toml(config(run, REWARDS)), None, [])


def test_a_fork_cannot_take_more_stored_iterations_than_there_are(run: Path) -> None:
    with pytest.raises(ConfigError, match=r"wants as many stored iterations .* from 1 on, there are 1"):
        fork_tables(open_run(run), 1, load_toml(config(run, REWARDS)), 3, [])


def test_stored_completions_without_correction_are_refused(run: Path) -> None:
    text = f'[update.correction]\nkind = "none"\n[[offline]]\nrun = "{run}"\niterations = [0]\n'
    with pytest.raises(ConfigError, match=r"kind is none, but .*offline.* has answers of other policies"):
        validate(RunConfig, fork_tables(open_run(run), 0, load_toml(config(run, text)), None, []), "fork")


def test_stored_completions_of_another_tokenizer_are_refused(run: Path, tiny_policy: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_policy, tmp_path / "other")
    file = tmp_path / "other" / "tokenizer.json"
    file.write_text(file.read_text().replace('"4"', '"four"'))
    tables = {"policy": {"model": str(tmp_path / "other")}, "offline": [{"run": str(run), "iterations": [0]}]}
    settings = validate(RunConfig, {**open_run(run).settings(), **tables}, "new")
    new = RunDir(tmp_path / "new")
    with closing(Session(settings, new)) as session:
        session.initial_policy()
        with pytest.raises(PolicyError, match=r"the policy of .*small has another tokenizer than the run's policy"):
            session.perform("generate", 0)
    assert not new.has(0, "prompts")


def test_looking_commands_follow_references(run: Path, tmp_path: Path) -> None:
    from flows.commands.groups import group_table

    new = rescored(run, REWARDS, tmp_path / "new", [1])
    table = group_table(new, 1)
    assert table["members"].to_list() == [2, 2]
