"""What a report is made of: measures by iteration, distributions, chosen groups, findings."""

import json
import shutil
from pathlib import Path

import polars as pl
import pytest
from tokenizers import Tokenizer, decoders, models

from flows.report.figures import figure_specs
from pipeline.errors import ArtifactDamaged, ArtifactMissing, UsageError
from pipeline.run_dir import RunDir
from pipeline.schema import SCHEMAS
from stages.inspect.report_data import collect, heat, measure, read_findings
from stages.inspect.report_groups import TokenText, choose_groups, group_views, number
from tests.builders import advantage_rows, check_rows, completion_rows, fill, reward_rows, write_artifact
from tests.report_runs import new_run, write_iteration

RECORD = {
    "clipped_low_tokens": 0, "clipped_high_tokens": 0, "masked_tokens": 0, "known_tokens": 0, "loss": 0.0,
    "optimizer_step": 0,
}  # fmt: skip


def record_rows(*rows: dict[str, object]) -> pl.DataFrame:
    return fill("training_records", rows, **RECORD)


def test_measures_of_answers_and_rewards(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    write_iteration(run, 0)
    report = collect(run)
    assert {name: values for name, values in report.series.items() if name in ("reward_mean", "pass_rate")} == {
        "reward_mean": [0.5],
        "pass_rate": [0.5],
    }
    assert report.series["truncated_share"] == [0.5]
    assert report.families["parts"] == {"exact": [0.5]}
    assert report.families["drops"] == {"trained": [1.0]}
    assert report.counts == {"completions": 2, "groups": 1, "shown_groups": 1, "shown_completions": 2}


def test_measures_of_an_update_weigh_rows_by_their_tokens() -> None:
    records = record_rows(
        {
            "completion_id": "a",
            "num_tokens": 3,
            "entropy_mean": 1.0,
            "correction_weight_mean": 1.0,
            "clipped_high_tokens": 1,
        },
        {"completion_id": "b", "num_tokens": 1, "entropy_mean": 2.0, "correction_weight_mean": 3.0, "masked_tokens": 1},
        {"completion_id": "c", "num_tokens": 4},
    )
    values, _ = measure({"training_records": records.lazy()}, 0, None)
    assert values["entropy_trained"] == 1.25
    assert values["clip_high_share"] == 0.125
    assert values["masked_share"] == 0.125
    assert values["ess_rows"] == pytest.approx(0.8)  # (1 + 3)^2 / (2 * (1 + 9))
    assert values["kl_to_sampler"] is None
    assert "ess_tokens" not in values


def test_effective_sample_size_of_recorded_tokens_leaves_out_what_did_not_train() -> None:
    row = {"completion_id": "a", "num_tokens": 2, "correction_weights": [1.0, None, 3.0]}
    values, _ = measure({"training_records": record_rows(row).lazy()}, 0, None)
    assert values["ess_tokens"] == pytest.approx(0.8)


def test_staleness_counts_updates_between_writer_and_learner() -> None:
    rows = completion_rows({"policy_iteration": 3}, {"policy_iteration": 0}, {"policy_iteration": None})
    values, families = measure({"completions": rows.lazy()}, 3, None)
    assert (values["age_mean"], values["age_max"]) == (1.5, 3)
    assert families["members"] == {"current": 1.0}


def test_an_iteration_without_a_dataset_leaves_a_gap(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    write_iteration(run, 0)
    write_artifact(run.place(1, "rewards"), "rewards", reward_rows(g=[1.0, 0.0]))
    write_iteration(run, 2)
    report = collect(run)
    assert report.series["reward_mean"] == [0.5, None, 0.5]
    assert report.families["parts"]["accuracy"] == [None, 0.5, None]
    assert report.absent["completions"] == 1


def test_groups_are_chosen_by_turns_after_those_that_an_audit_names() -> None:
    spreads = {"a": (0.1, 9.0), "b": (0.5, 1.0), "c": (0.9, 0.5), "d": (0.0, 0.0), "e": (0.0, 0.0)}
    rows = [
        {"completion_id": group, "group_id": group, "group_reward_std": std, "advantage": advantage}
        for group, (std, advantage) in spreads.items()
    ]
    rewards = reward_rows(a=[1.0], b=[None], c=[1.0], d=[1.0], e=[1.0])
    data = {"advantages": advantage_rows(*rows).lazy(), "rewards": rewards.lazy()}
    chosen, total = choose_groups(data, {"e", "of another iteration"}, 4, "seed")
    expected = {"e": "audit finding", "b": "failed reward", "c": "widest spread", "a": "largest advantage"}
    assert (chosen, total) == (expected, 5)
    assert choose_groups(data, set(), 9, "seed")[0]["d"] == "sampled"


def test_the_sampled_groups_depend_on_the_seed_alone() -> None:
    rows = [{"completion_id": f"{g}", "group_id": f"{g:03d}", "advantage": 0.0} for g in range(50)]
    data = {"advantages": advantage_rows(*rows).lazy()}
    backwards = {"advantages": advantage_rows(*reversed(rows)).lazy()}
    assert choose_groups(data, set(), 5, "0:1") == choose_groups(backwards, set(), 5, "0:1")
    assert set(choose_groups(data, set(), 5, "0:1")[0]) != set(choose_groups(data, set(), 5, "1:1")[0])


def test_members_stand_by_advantage_with_what_became_of_them(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    completions = completion_rows({"policy_iteration": 1, "finish_reason": "length"}, {"completion_token_ids": [7]})
    advantages = advantage_rows({"advantage": -1.0, "drop_reason": "zero_variance"}, {"advantage": 1.0})
    error = {"completion_id": "c0", "group_id": "g", "reward_name": "exact", "error": "ValueError: no", "detail": None}
    rewards = fill("rewards", [error], reward_recipe="r")
    data = {"completions": completions.lazy(), "advantages": advantages.lazy(), "rewards": rewards.lazy()}
    [view] = group_views(data, 3, {"g": "sampled"}, TokenText(run), set())
    assert [m["completion_id"] for m in view["members"]] == ["c1", "c0"]
    low = view["members"][1]
    assert (low["age"], low["dropped"], low["logprob_sum"]) == (2, "zero_variance", -2.0)
    assert low["parts"] == [{"name": "exact", "reward": None, "error": "ValueError: no", "detail": None}]
    assert (view["num_cut"], view["num_failed"]) == (1, 1)


def test_token_numbers_come_from_the_last_optimizer_step_that_saw_the_answer(tmp_path: Path) -> None:
    data = {
        "completions": completion_rows({"loss_mask": [True, False]}).lazy(),
        "training_records": record_rows(
            {"completion_id": "c0", "num_tokens": 1, "optimizer_step": 1, "importance_ratios": [1.23456, None]},
            {"completion_id": "c0", "num_tokens": 1, "optimizer_step": 0, "importance_ratios": [1.0, None]},
        ).lazy(),
    }
    [view] = group_views(data, 0, {"g": "sampled"}, TokenText(new_run(tmp_path)), set())
    assert view["members"][0]["ratio"] == [1.23, None]
    assert view["members"][0]["logprob"] == [-1.0, -1.0]
    assert view["members"][0]["loss_mask"] == [1, 0]


def test_of_a_large_group_the_best_the_worst_and_the_named_are_shown(tmp_path: Path) -> None:
    completions = completion_rows(*[{} for _ in range(40)])
    advantages = advantage_rows(*[{"advantage": float(-i)} for i in range(40)])
    data = {"completions": completions.lazy(), "advantages": advantages.lazy()}
    [view] = group_views(data, 0, {"g": "sampled"}, TokenText(new_run(tmp_path)), {"c20"})
    shown = [int(m["completion_id"][1:]) for m in view["members"]]
    assert shown == [0, 1, 2, 3, 4, 5, 6, 7, 20, 33, 34, 35, 36, 37, 38, 39]
    assert view["num_members"] == 40


def test_of_a_long_answer_the_beginning_and_the_end_are_shown(tmp_path: Path) -> None:
    data = {"completions": completion_rows({"completion_token_ids": list(range(1500))}).lazy()}
    [view] = group_views(data, 0, {"g": "sampled"}, TokenText(new_run(tmp_path)), set())
    [member] = view["members"]
    assert member["token_ids"] == [*range(768), *range(1244, 1500)]
    assert (member["tokens_left_out"], member["num_tokens"], len(member["logprob"])) == (476, 1500, 1024)


def test_tokens_are_text_where_the_run_has_a_tokenizer_and_ids_where_not(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    assert TokenText(run).pieces([5, 6]) == ["[5]", "[6]"]
    # bytes of an umlaut as two tokens: only the second completes a character
    tokenizer = Tokenizer(models.BPE({"h": 0, "<0xC3>": 1, "<0xA4>": 2}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    run.initial_policy.mkdir(parents=True)
    tokenizer.save(str(run.initial_policy / "tokenizer.json"))
    assert TokenText(run).pieces([0, 1, 2]) == ["h", "", "ä"]


def test_a_tokenizer_larger_than_any_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = new_run(tmp_path)
    run.initial_policy.mkdir(parents=True, exist_ok=True)
    (run.initial_policy / "tokenizer.json").write_text(" " * 99)
    monkeypatch.setattr("stages.inspect.report_groups.TOKENIZER_BYTES", 98)
    with pytest.raises(ArtifactDamaged, match="more than 98 bytes"):
        TokenText(run)


def test_the_groups_keep_to_their_bytes_spread_over_the_iterations(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    for index in range(4):
        write_iteration(run, index, answer="x" * 1000)
    size = sum(len(json.dumps(view)) for views in collect(run).groups.values() for view in views)
    report = collect(run, most_bytes=size // 2 + 100)
    assert [len(views) for views in report.groups.values()] == [0, 1, 0, 1]


def test_a_distribution_counts_every_value_once() -> None:
    spread = heat([pl.Series([0.0, 0.0, 1.0, None]), pl.Series([1.0])], [0, 1])
    assert spread is not None
    assert (spread.shares[0][0], spread.shares[0][-1], spread.shares[1][-1]) == (
        pytest.approx(2 / 3),
        pytest.approx(1 / 3),
        1,
    )
    assert (spread.edges[0], spread.edges[-1], spread.outside) == (0.0, 1.0, 0)


def test_one_wild_value_does_not_flatten_a_distribution() -> None:
    spread = heat([pl.Series([i / 10_000 for i in range(10_000)] + [1e9])], [0])
    assert spread is not None
    assert spread.edges[-1] < 2
    assert spread.outside > 0


@pytest.mark.parametrize("values", [[], [None]])
def test_a_distribution_of_nothing_is_none(values: list[float | None]) -> None:
    assert heat([pl.Series(values, dtype=pl.Float64)], [0]) is None


def test_what_is_no_number_or_too_large_is_counted_and_not_spread() -> None:
    spread = heat([pl.Series([float("nan"), 1e308, -1e308, float("inf"), 1.0, 2.0])], [0])
    assert spread is not None
    assert (spread.edges[0], spread.edges[-1], spread.outside, spread.not_numbers) == (1.0, 2.0, 3, 1)
    equal = heat([pl.Series([1e20, 1e20])], [0])
    assert equal is not None
    assert (equal.edges[0], equal.edges[-1]) == (0.99e20, 1.01e20)


def test_numbers_that_json_cannot_say_become_their_names() -> None:
    assert [number(x) for x in (float("nan"), float("-inf"), 1.23456, None)] == ["nan", "-inf", 1.235, None]


def test_findings_are_read_from_a_list_and_from_lines() -> None:
    first = '{"check": "c", "severity": "error", "message": "m", "rows": [{"iteration": 3}], "more": 1}'
    second = '{"check": "d", "severity": "info", "message": "n"}'
    assert read_findings(f"[{first},{second}]", "f") == read_findings(f"{first}\n\n{second}\n", "f")
    assert read_findings("", "f") == []
    assert read_findings(first, "f")[0].rows[0].group_id is None


@pytest.mark.parametrize("text", ["[1]", "no json", '[{"check": "c"}]', "{"])
def test_findings_of_another_shape_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="does not hold an audit's findings"):
        read_findings(text, "findings.json")


def test_what_only_the_metrics_still_know_is_taken_from_there(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    write_iteration(run, 0)
    run.iteration(1).mkdir()
    known = {"completion_tokens_mean": 1.0, "truncated_share": 0.0, "zero_variance_share": 0.0}
    counts = {"num_completions": 2, "num_trained": 2, "num_tokens": 2, "generate_tokens_per_second": 9.0}
    rows = [{"iteration": k, "reward_mean": 0.25, "entropy_trained": 0.75, **known, **counts} for k in range(2)]
    fill("metrics", rows, rewards=[], seconds=[]).write_parquet(run.metrics)
    report = collect(run)
    assert report.series["reward_mean"] == [0.5, 0.25]
    assert report.series["entropy_trained"] == [0.75, 0.75]


def test_every_measure_of_the_figures_exists() -> None:
    rows = record_rows({"completion_id": "a", "num_tokens": 1, "correction_weights": [1.0]})
    data = {
        "completions": completion_rows({}).lazy(),
        "advantages": advantage_rows({}).lazy(),
        "training_records": rows.lazy(),
        "optimizer_steps": fill("optimizer_steps", [{"optimizer_step": 0}]).lazy(),
    }
    values, _ = measure(data, 0, 1.0)
    known = {*values, *SCHEMAS["metrics"].names}
    assert [name for spec in figure_specs() for name in spec.lines if name not in known] == []


def test_the_checks_that_failed_are_those_of_each_iteration(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    for index in range(3):
        write_iteration(run, index)
    write_artifact(run.place(1, "checks"), "checks", check_rows({"passed": True}))
    write_artifact(run.place(2, "checks"), "checks", check_rows({"passed": True}, {"name": "long", "num_failed": 2}))
    report = collect(run)
    assert report.num_checked == 2
    assert [(row["iteration"], row["name"], row["num_failed"]) for row in report.failed_checks] == [(2, "long", 2)]


def test_answers_of_another_run_are_read_there_and_their_seconds_are_not_counted(tmp_path: Path) -> None:
    first = new_run(tmp_path / "first")
    write_iteration(first, 0)
    second = new_run(tmp_path / "second")
    write_iteration(second, 0)
    shutil.rmtree(second.place(0, "completions"))
    second.refer(0, "completions", first.open(0, "completions"))
    report = collect(RunDir(second.root))
    assert report.series["truncated_share"] == [0.5]
    assert report.elsewhere == {"completions": 1}


def test_answers_that_left_the_other_run_are_an_error(tmp_path: Path) -> None:
    first, second = new_run(tmp_path / "first"), new_run(tmp_path / "second")
    write_iteration(first, 0)
    second.refer(0, "completions", first.open(0, "completions"))
    shutil.rmtree(first.place(0, "completions"))
    with pytest.raises(ArtifactMissing, match="where no finished artifact is"):
        collect(second)
