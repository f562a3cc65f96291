"""[retention]: a long run keeps a bounded number of policies, and can still be continued, forked and replayed."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from flows.commands.fork import fork_tables
from flows.commands.lineage import lineage
from flows.commands.replay import print_replay
from flows.commands.verify import print_verification
from flows.printing import Format
from flows.replayer import Replayer
from flows.session import Session
from grpo.settings import KlConfig
from pipeline.artifact import PRUNED_NOTE, open_artifact
from pipeline.config import validate
from pipeline.conformance import conform
from pipeline.errors import ArtifactError, ArtifactMissing, ConfigError
from pipeline.files import sha256_file
from pipeline.manifest import STORE_NOTE
from pipeline.prune import evaluation_scores, has_weights, prunable
from pipeline.retention import RetentionConfig, kept_policies
from pipeline.run_dir import RunDir
from pipeline.runs import lock, open_run, run_at
from stages.config import RunConfig, check_unchanged, load_config
from stages.engines.base import Request
from stages.engines.scripted import ScriptedEngine
from stages.inspect.metrics import append_metrics, iteration_metrics
from stages.members import MemberConfig, coming_members
from stages.preflight import preflight
from tests.finished import answer, replace_value
from tests.manifests import fix_hashes
from tests.policies import EOS
from tests.small_run import CONFIG, DIGIT_0, EXACT, perform_iteration
from tests.stores import ROWS, objects

ROOT = Path(__file__).parent.parent
LONG = 30
RULES = "[retention]\nkeep_last = 2\nkeep_every = 10\n"
KEPT = {0, 10, 20, 29, 30}


def varied(request: Request) -> list[int]:
    """Answer 2 or 3, as prompt and seed say: most iterations have something to learn."""
    return [DIGIT_0 + 2 + request.seed % 2, EOS]


def with_weights(run: RunDir, last: int) -> set[int]:
    return {n for n in range(last + 1) if has_weights(open_artifact(run.policy_before(n)))}


def with_states(run: RunDir, last: int) -> set[int]:
    return {n for n in range(1, last + 1) if has_weights(open_artifact(run.place(n - 1, "optimizer")))}


def tensor_bytes(run: RunDir) -> int:
    return sum(path.stat().st_size for path in run.root.rglob("*.safetensors"))


def continued(config: RunConfig, run: RunDir) -> Iterator[int]:
    """Do what `grpo run` does after its last finished iteration; yield after each one."""
    with closing(Session(config, run, _engine=ScriptedEngine(varied))) as session:
        session.initial_policy()
        for iteration in range(config.iterations):
            if session.is_done(iteration):
                continue
            perform_iteration(session, iteration)
            append_metrics(run, iteration_metrics(run, iteration, pass_threshold=1.0))
            session.retain()
            yield iteration


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_policy: Path) -> RunConfig:
    folder = tmp_path_factory.mktemp("config")
    (folder / "rows.jsonl").write_text(ROWS)
    text = CONFIG.format(policy=tiny_policy, source=folder / "rows.jsonl", iterations=LONG, function=EXACT)
    (folder / "config.toml").write_text(text + RULES)
    return load_config(folder / "config.toml", ["generate.group_size=4"])


Curve = list[tuple[set[int], int]]


@pytest.fixture(scope="module")
def grown(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunDir, Curve]:
    """Return a run of 30 iterations, and after each the policies that have weights and the bytes of all tensors."""
    run = RunDir(tmp_path_factory.mktemp("long") / "run")
    run.record_config("", config.model_dump(mode="json"))
    return run, [(with_weights(run, i + 1), tensor_bytes(run)) for i in continued(config, run)]


@pytest.fixture
def run(grown: tuple[RunDir, Curve], tmp_path: Path) -> RunDir:
    return RunDir(shutil.copytree(grown[0].root, tmp_path / "run"))


def test_a_run_of_thirty_iterations_keeps_a_bounded_number_of_policies_and_bytes(
    grown: tuple[RunDir, Curve],
) -> None:
    run, curve = grown
    for index, (kept, _) in enumerate(curve):
        updates = index + 1
        assert kept == {0, updates - 1, updates, *range(10, updates + 1, 10)}
    sizes = [size for _, size in curve]
    pair = tensor_bytes_of(run, 30)
    initial = sizes[0] - pair
    assert sizes == [initial + pair * (len(kept) - 1) for kept, _ in curve]
    assert max(sizes) == initial + 4 * pair
    assert with_states(run, LONG) == KEPT - {0}


def tensor_bytes_of(run: RunDir, num_updates: int) -> int:
    places = [run.place(num_updates - 1, name) for name in ("policy", "optimizer")]
    return sum(path.stat().st_size for place in places for path in place.glob("*.safetensors"))


def test_rows_and_manifests_stay_and_nothing_is_wrong(
    grown: tuple[RunDir, Curve], capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = grown
    for index in range(LONG):
        for dataset in ("prompts", "completions", "rewards", "advantages", "batches"):
            assert run.open(index, dataset).read().height
    assert print_verification(run.root, 20, Format.table)
    said = capsys.readouterr().out
    assert "pruned: 52 files of 52 checkpoints, dropped on purpose" in said
    for name in ("policies", "optimizer states"):
        assert f"  {name} after 1-9, 11-19, 21-28 updates\n" in said
    assert f"  `grpo replay {run.root} --iteration N --stage update --scratch FOLDER` makes again what is " in said


def test_retention_decides_no_result_and_may_change(config: RunConfig, run: RunDir, tmp_path: Path) -> None:
    free = RunDir(tmp_path / "free")
    none = config.model_copy(update={"retention": None, "iterations": 3})
    assert list(continued(none, free)) == [0, 1, 2]
    assert with_weights(free, 3) == {0, 1, 2, 3}
    for dataset in ("completions", "policy", "optimizer"):
        assert free.open(2, dataset).digest == run.open(2, dataset).digest
    for other in (None, RetentionConfig(keep_last=9)):
        check_unchanged(run, config.model_copy(update={"retention": other}))


def test_a_run_goes_on_where_it_ended(config: RunConfig, run: RunDir) -> None:
    more = config.model_copy(update={"iterations": LONG + 2})
    assert list(continued(more, run)) == [30, 31]
    assert with_weights(run, LONG + 2) == {0, 10, 20, 30, 31, 32}
    assert print_replay(run.root, [31], "update", Format.jsonl)


def test_a_lost_state_is_made_again_from_the_one_that_stays(config: RunConfig, run: RunDir) -> None:
    state = run.open(LONG - 1, "optimizer").digest
    shutil.rmtree(run.place(LONG - 1, "optimizer"))
    with closing(Session(config, run, _engine=ScriptedEngine(varied))) as session:
        session.retain()
        assert with_weights(run, LONG) == KEPT
        session.perform("optimizer", LONG - 1)
    assert run.open(LONG - 1, "optimizer").digest == state


def rewards_only() -> dict[str, object]:
    return {"score": {"rewards": [{"name": "exact", "function": EXACT}]}}


def forked(run: RunDir, at: int, place: Path) -> RunDir:
    settings = validate(RunConfig, fork_tables(open_run(run.root), at, rewards_only(), 0, []), "fork")
    fork = RunDir(place)
    preflight(settings, fork)
    with closing(Session(settings, fork)) as session:
        session.initial_policy()
    return fork


def test_a_fork_begins_with_a_policy_that_stays(run: RunDir, tmp_path: Path) -> None:
    fork = forked(run, 20, tmp_path / "fork")
    files = open_artifact(fork.initial_policy).manifest.files
    assert files["model.safetensors"] == run.open(19, "policy").manifest.files["model.safetensors"]
    assert files["optimizer/state.safetensors"] == run.open(19, "optimizer").manifest.files["state.safetensors"]


def test_a_fork_of_a_dropped_policy_says_how_it_is_made_again_and_then_works(
    run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ArtifactMissing, match=r"grpo replay .* --iteration 15 --stage update --scratch FOLDER"):
        forked(run, 16, tmp_path / "fork")
    assert print_replay(run.root, [15], "update", Format.jsonl, scratch=tmp_path / "again")
    for name, file in (("policy", "model.safetensors"), ("optimizer", "state.safetensors")):
        shutil.copyfile(tmp_path / "again" / "000015" / name / file, run.place(15, name) / file)
    forked(run, 16, tmp_path / "fork")


def test_replay_begins_with_the_nearest_policy_that_stays(run: RunDir, tmp_path: Path) -> None:
    for index in range(10):
        shutil.rmtree(run.place(index, "batches"))
    before = sorted(path for path in run.root.rglob("*"))
    with closing(Replayer(run, tmp_path)) as replayer:
        found = [row for iteration in (15, 16) for row in replayer.replay("update", iteration)]
    assert [(row.iteration, row.dataset, row.result) for row in found] == [
        (iteration, dataset, "equal")
        for iteration in (15, 16)
        for dataset in ("training_records", "optimizer_steps", "policy", "optimizer")
    ]
    assert sorted(path for path in run.root.rglob("*")) == before


def test_replay_samples_from_dropped_weights_that_were_made_again(run: RunDir, tmp_path: Path) -> None:
    engine = ScriptedEngine(varied)
    with closing(Replayer(run, tmp_path, engine)) as replayer:
        (row,) = replayer.replay("generate", 15)
        loaded = engine.policies[-1]
        assert loaded.is_relative_to(tmp_path)
        stated = run.open(14, "policy").manifest.files["model.safetensors"]["sha256"]
        assert sha256_file(loaded / "model.safetensors") == stated
        assert not (loaded / PRUNED_NOTE).exists()
        list(replayer.replay("generate", 17))
        assert not loaded.exists()  # no coming iteration needs it
    assert row.result == "equal"


def test_replay_of_dropped_weights_finds_forged_rows_before_them(
    run: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was dropped is proved by its hash: batches that were changed since do not lead to it."""
    place = run.place(12, "batches")
    rows = run.open(12, "batches").read()
    trained = rows["drop_reason"].is_null().arg_max()
    forged = replace_value("advantage", trained or 0, 7.0)(rows)
    pq.write_table(conform(forged, "batches"), place / "part-00000.parquet")
    fix_hashes(place)
    with pytest.raises(ArtifactError, match="could not be computed again"):
        print_replay(run.root, [14], "update", Format.jsonl)
    assert "gives other weights than those stored" in capsys.readouterr().out


def test_verify_and_lineage_say_what_is_gone(
    run: RunDir, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run.root.parent)
    lineage(run.policy_before(30), None, 2, Format.table)
    said = capsys.readouterr().out
    assert "`grpo replay run --iteration N --stage update --scratch FOLDER`" in said
    lineage(run.policy_before(30), None, 2, Format.jsonl)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    policies = {row["artifact"]: row["dropped"] for row in rows if row["artifact"].endswith("policy")}
    assert policies == {
        "iterations/000029/policy": False,
        "iterations/000028/policy": False,
        "iterations/000027/policy": True,
    }
    completion = run.open(27, "completions").read()["completion_id"][0]
    lineage(run.root, str(completion), None, Format.jsonl)
    says = {row["what"]: row["says"] for row in map(json.loads, capsys.readouterr().out.splitlines())}
    assert says["author"] == "policy:current, after 27 updates; its weights were dropped"


def test_without_a_policy_to_begin_with_verify_says_that_nothing_makes_it_again(
    run: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    (run.initial_policy / "model.safetensors").rename(run.root.parent / "away")
    facts = open_artifact(run.initial_policy).manifest.files["model.safetensors"]
    (run.initial_policy / PRUNED_NOTE).write_text(json.dumps({"files": {"model.safetensors": facts["sha256"]}}))
    assert print_verification(run.root, 20, Format.table)
    said = capsys.readouterr().out
    assert "  policies after 0-9, 11-19, 21-28 updates\n" in said
    assert "makes again what is dropped after N + 1 updates, for N + 1 = 11-19, 21-28\n" in said
    assert "  nothing makes again what is dropped after 0-9 updates: no policy before is there\n" in said


@pytest.mark.parametrize(
    ("rules", "kept"),
    [
        ({"keep_last": 1}, {8}),
        ({"keep_last": 3}, {6, 7, 8}),
        ({"keep_last": 1, "keep_every": 3}, {3, 6, 8}),
        ({"keep_last": 1, "keep_best": 1}, {4, 8}),
        ({"keep_last": 1, "keep_best": 2}, {2, 4, 8}),
        ({"keep_last": 1, "keep_best": 3}, {2, 4, 6, 8}),
        ({"keep_last": 99}, set(range(9))),
    ],
)
def test_the_rules_say_what_stays(rules: dict[str, Any], kept: set[int]) -> None:
    assert kept_policies(range(9), RetentionConfig(**rules), {2: 0.5, 4: 0.75, 6: 0.5, 9: 1.0}) == kept


def test_the_best_are_those_of_the_figures(original: Path) -> None:
    run = RunDir(original)
    figures = run.read_metrics()
    assert evaluation_scores(run, "eval_pass_rate") == {2: figures["eval_pass_rate"][1]}
    assert evaluation_scores(RunDir(original.parent), "eval_pass_rate") == {}


def test_states_stay_with_the_last_policies_alone(run: RunDir) -> None:
    going = prunable(run, RetentionConfig(keep_last=1, keep_every=10, states="last"), [])
    found = [(item.num_updates, item.artifact.manifest.dataset) for item in going]
    assert found == [(10, "optimizer"), (20, "optimizer"), (29, "optimizer"), (29, "policy")]


@pytest.mark.parametrize(
    ("policy", "expected"),
    [("current", {7}), ("initial", {0}), ("iteration:3", {3}), ("iteration:9", {7}), ("age:2", {5, 6, 7})],
)
def test_members_of_coming_groups_are_needed(policy: str, expected: set[int]) -> None:
    assert coming_members([MemberConfig(name="one", policy=policy, count=1)], 7) == expected


def test_members_of_a_great_age_are_needed_long_after(config: RunConfig) -> None:
    assert coming_members([MemberConfig(name="one", policy="age:100", count=1)], 7) == set(range(8))
    assert coming_members([MemberConfig(name="one", policy="/elsewhere", count=1)], 7) == set()


def test_the_proximal_policy_of_an_offline_phase_is_needed(config: RunConfig, run: RunDir) -> None:
    tables = {**config.model_dump(mode="json"), "offline": [{"run": str(run.root), "iterations": [0, 1, 2]}]}
    offline = validate(RunConfig, tables, "offline")
    assert [offline.needed_policies(n) for n in (1, 2, 3)] == [{0, 1}, {0, 2}, {3}]


@pytest.mark.parametrize(
    ("done", "every", "expected"),
    [
        *[(27, every, number) for every, number in ((None, 0), (10, 20), (7, 21), (27, 27))],
        *[(30, every, number) for every, number in ((None, 0), (10, 30), (7, 28), (27, 27))],  # it may be continued
    ],
)
def test_the_reference_policy_of_coming_iterations_is_needed(
    config: RunConfig, done: int, every: int | None, expected: int
) -> None:
    update = config.update.model_copy(update={"kl": KlConfig(refresh_every=every)})
    held = config.model_copy(update={"update": update, "iterations": 30})
    assert held.needed_policies(done) == {done, expected}


def test_a_policy_that_is_to_be_evaluated_and_was_dropped_is_told_at_the_start(config: RunConfig, run: RunDir) -> None:
    evaluated = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"every": 15})})
    with pytest.raises(ConfigError, match=r"every = 15 .* after 15 updates, whose weights were dropped: set both back"):
        preflight(evaluated, run)


def test_the_best_need_evaluations(config: RunConfig) -> None:
    tables = {**config.model_dump(mode="json"), "retention": {"keep_best": 1}}
    with pytest.raises(ConfigError, match=r"retention\.keep_best is 1, and evaluate\.every is 0"):
        validate(RunConfig, tables, "config")


def test_on_a_store_the_working_copy_alone_is_freed_and_only_what_is_published(base: str, config: RunConfig) -> None:
    run = run_at(f"{base}/demo")
    short = config.model_copy(update={"iterations": 3, "retention": RetentionConfig(keep_last=1)})
    with lock(run), closing(Session(short, run, _engine=ScriptedEngine(answer))) as session:
        run.record_config("", short.model_dump(mode="json"))
        session.initial_policy()
        for iteration in range(3):
            perform_iteration(session, iteration)
        (run.policy_before(1) / STORE_NOTE).unlink()
        session.retain()
        assert [(run.policy_before(n) / "model.safetensors").is_file() for n in (1, 2, 3)] == [True, False, True]
    assert "iterations/000001/policy/model.safetensors" in objects(f"{base}/demo")
    with lock(run), closing(Session(short, run, _engine=ScriptedEngine(answer))) as session:
        assert all(map(session.is_done, range(3)))


ENGINE = """
from stages.engines.scripted import ScriptedEngine


def make(settings):
    return ScriptedEngine(lambda request: [21 + request.seed % 2, 1])
"""


@pytest.mark.slow
def test_a_run_of_the_command_drops_policies_while_it_goes_on(tmp_path: Path, tiny_policy: Path) -> None:
    (tmp_path / "scripted_answers.py").write_text(ENGINE)
    rows = [{"question": f"{i} + {2 - i} =", "answer": "2"} for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    text = CONFIG.format(policy=tiny_policy, source="rows.jsonl", iterations=4, function=EXACT)
    text = text.replace("every = 0", "every = 2\nnum_prompts = 2").replace("share = 0.0", "share = 0.5")
    (tmp_path / "run.toml").write_text(text + "[retention]\nkeep_last = 1\nkeep_best = 1\n")
    command = [sys.executable, "-m", "flows.cli", "run", "run.toml", "--set", "generate.engine=scripted_answers:make"]
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("disk: ")]
    assert line.startswith("disk: about ")
    assert ": 2 policies and 2 optimizer states " in line
    run = RunDir(tmp_path / "runs" / "run")
    scores = evaluation_scores(run, "eval_pass_at_1")
    assert set(scores) == {2, 4}
    assert with_weights(run, 4) == {0, 4, max(scores, key=lambda n: (scores[n], -n))}
    assert with_states(run, 4) == with_weights(run, 4) - {0}
