"""Importing: written completions become artifacts of a new run, are scored like any others, and never train."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from pipeline.errors import ConfigError, PolicyError, RecipeMismatch, SourceError, UsageError
from pipeline.run_dir import RunDir
from stages.batch import BatchConfig, batch_rows
from stages.config import RunConfig
from stages.generate import GenerateConfig
from stages.importing import import_completions, read_questions
from stages.normalize import NormalizeConfig, normalize_rows
from stages.policy import PolicyConfig
from stages.preflight import preflight
from stages.prompts import PromptsConfig
from stages.rewards.functions import RewardConfig
from stages.score import ScoreConfig, score_rows
from stages.sources import SourceConfig
from tests.builders import prompt_rows, write_artifact

QUESTIONS = [
    {"question": "What is 3 + 4?", "answer": "7", "hint": "count"},
    {"question": "What is 2 + 2?", "answer": "4"},
    {"question": "What is 9 + 9?", "answer": "18"},
]
WRITTEN = [
    {"question": "What is 2 + 2?", "completion": "4"},
    {"question": "What is 3 + 4?", "completion": "7", "policy_name": "anna"},
    {"question": "What is 2 + 2?", "completion": "22"},
    {"question": "What is 3 + 4?", "completion": ""},
    {"question": "What is 2 + 2?", "completion": "vier \u2603"},
]


def save(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def source(folder: Path, rows: list[dict[str, Any]] | None = None, **settings: Any) -> SourceConfig:
    return SourceConfig(source=str(save(folder / "questions.jsonl", rows or QUESTIONS)), **settings)


def imported(
    folder: Path, rows: list[dict[str, Any]], tokenizer: Path | None = None, run: str = "run"
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Return the prompts and the completions that an import leaves."""
    file = save(folder / "completions.jsonl", rows)
    result = import_completions(source(folder), file, RunDir(folder / run), tokenizer=tokenizer)
    return result.outputs["prompts"].read(), result.outputs["completions"].read()


def test_the_answers_to_one_question_are_one_group_in_the_order_of_the_file(tmp_path: Path) -> None:
    prompts, completions = imported(tmp_path, WRITTEN)
    questions = prompts.select("prompt_id", question=pl.col("messages").list.last().struct.field("content"))
    rows = completions.join(questions, on="prompt_id", maintain_order="left")
    assert rows.select("question", "completion_index", "completion").rows() == [
        ("What is 2 + 2?", 0, "4"),
        ("What is 2 + 2?", 1, "22"),
        ("What is 2 + 2?", 2, "vier \u2603"),
        ("What is 3 + 4?", 0, "7"),
        ("What is 3 + 4?", 1, ""),
    ]
    assert rows["group_id"].n_unique() == 2
    assert rows["completion_id"].n_unique() == 5


def test_prompts_keep_answer_metadata_and_who_is_unanswered(tmp_path: Path) -> None:
    prompts, _ = imported(tmp_path, WRITTEN)
    assert prompts["reference_answer"].to_list() == ["7", "4", "18"]
    assert json.loads(prompts["metadata"][0])["hint"] == "count"
    assert prompts["drop_reason"].to_list() == [None, None, "unanswered"]


def test_the_system_prompt_stands_in_the_messages_but_not_in_the_question(tmp_path: Path) -> None:
    config = source(tmp_path, system_prompt="Be brief.")
    file = save(tmp_path / "completions.jsonl", WRITTEN)
    prompts = import_completions(config, file, RunDir(tmp_path / "run")).outputs["prompts"].read()
    assert prompts["messages"][0].to_list() == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is 3 + 4?"},
    ]


def test_nothing_is_claimed_about_how_a_text_was_sampled(tmp_path: Path) -> None:
    _, completions = imported(tmp_path, WRITTEN)
    row = completions.row(3, named=True)
    assert (row["policy_name"], row["policy_digest"], row["policy_iteration"]) == ("anna", "none", None)
    assert (row["engine"], row["engine_version"], row["logprobs_mode"]) == ("import", "2", "none")
    assert row["completion_token_ids"] == row["sampling_logprobs"] == row["loss_mask"] == row["prompt_token_ids"] == []
    assert (row["finish_reason"], row["temperature"], row["top_p"], row["top_k"]) == ("stop", 1.0, 1.0, 0)
    assert completions["policy_name"].to_list() == ["written", "written", "written", "anna", "written"]


def test_a_tokenizer_gives_token_ids_with_unknown_logprobs(tmp_path: Path, tiny_policy: Path) -> None:
    prompts, completions = imported(tmp_path, WRITTEN, tiny_policy)
    # three special tokens, then the printable characters from the space (32): "4" is 52 - 32 + 3, "2" 50 - 32 + 3
    assert completions["completion_token_ids"].to_list()[:2] == [[23], [21, 21]]
    assert completions["sampling_logprobs"].to_list()[:2] == [[None], [None, None]]
    assert completions["loss_mask"].to_list()[:2] == [[False], [False, False]]
    assert completions["prompt_token_ids"][3].to_list() == prompts["prompt_token_ids"][0].to_list()
    assert prompts["prompt_token_ids"][0].to_list()[:4] == [88, 86, 72, 85], "the chat template begins with: user"


@pytest.mark.parametrize("with_tokenizer", [False, True])
def test_imported_rows_are_scored_and_compared_but_never_trained(
    tmp_path: Path, tiny_policy: Path, with_tokenizer: bool
) -> None:
    prompts, completions = imported(tmp_path, WRITTEN, tiny_policy if with_tokenizer else None)
    function = RewardConfig(name="exact", function="stages.rewards.answers.matching:exact_match")
    rewards = score_rows(completions, prompts, ScoreConfig(rewards=[function]))
    assert rewards["reward"].to_list() == [1.0, 0.0, 0.0, 1.0, 0.0]
    advantages = normalize_rows(rewards.lazy(), NormalizeConfig())
    assert advantages["advantage"].to_list() == pytest.approx([2 / 3, -1 / 3, -1 / 3, 0.5, -0.5])
    given = advantages.select("completion_id", "advantage", "drop_reason")
    batch = batch_rows(completions, given, BatchConfig(), seed=0, iteration=0)
    assert batch["drop_reason"].null_count() == 0
    assert batch["optimizer_step"].null_count() == 5


@pytest.mark.parametrize(("with_tokenizer", "lengths"), [(False, [None, None, "0"]), (True, ["1", "2", "0"])])
def test_without_a_tokenizer_the_length_in_tokens_is_unknown_and_not_zero(
    tmp_path: Path, tiny_policy: Path, with_tokenizer: bool, lengths: list[str | None]
) -> None:
    rows = [{"question": "What is 2 + 2?", "completion": text} for text in ("4", "22", "")]
    prompts, completions = imported(tmp_path, rows, tiny_policy if with_tokenizer else None)
    function = RewardConfig(name="length", function="tests.rewards:length_told")
    assert score_rows(completions, prompts, ScoreConfig(rewards=[function]))["detail"].to_list() == lengths


def test_a_run_that_is_to_train_on_imported_completions_is_refused_beforehand(
    tmp_path: Path, tiny_policy: Path
) -> None:
    imported(tmp_path, WRITTEN)
    run = RunDir(tmp_path / "run")
    run.record_config("", {})
    config = RunConfig.model_validate(
        {
            "policy": PolicyConfig(model=str(tiny_policy)),
            "prompts": PromptsConfig(source=source(tmp_path).source),
            "generate": GenerateConfig(max_tokens=8),
            "score": ScoreConfig(rewards=[RewardConfig(name="length", function="tests.rewards:length_told")]),
            "offline": [{"run": str(run.root), "iterations": [0]}],
        }
    )
    with pytest.raises(ConfigError, match=r"names .*run, whose completions no policy of this program has sampled"):
        preflight(config, RunDir(tmp_path / "new"))
    preflight(config.model_copy(update={"offline": []}), RunDir(tmp_path / "new"))


def test_groups_of_one_question_are_told_apart(tmp_path: Path) -> None:
    rows = [{"question": "What is 2 + 2?", "completion": str(i), "group": i % 2} for i in range(4)]
    _, completions = imported(tmp_path, rows)
    assert completions["completion"].to_list() == ["0", "2", "1", "3"]
    assert completions["completion_index"].to_list() == [0, 1, 0, 1]
    assert completions["group_id"].n_unique() == 2


def test_a_prompt_id_names_the_question_where_texts_are_equal(tmp_path: Path) -> None:
    twins = [{"question": "Which?", "answer": "a"}, {"question": "Which?", "answer": "b"}]
    config = source(tmp_path, twins)
    second = read_questions(config)[1].prompt_id
    file = save(tmp_path / "completions.jsonl", [{"prompt_id": second, "completion": "b"}])
    completions = import_completions(config, file, RunDir(tmp_path / "run")).main.read()
    assert completions["prompt_id"].to_list() == [second]
    save(file, [{"question": "Which?", "completion": "b"}])
    with pytest.raises(SourceError, match=r"row 1 has the question 'Which\?', which 2 rows of the source share"):
        import_completions(config, file, RunDir(tmp_path / "other"))


@pytest.mark.parametrize("name", ["completions.csv", "completions.parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    columns = [{"policy_name": None, **row} for row in WRITTEN]
    frame = pl.DataFrame(columns)
    frame.write_csv(tmp_path / name) if name.endswith("csv") else frame.write_parquet(tmp_path / name)
    other = import_completions(source(tmp_path), tmp_path / name, RunDir(tmp_path / "other")).main.read()
    _, completions = imported(tmp_path, WRITTEN)
    facts = ["prompt_id", "completion_index", "policy_name", "completion"]
    assert other.select(facts).rows() == completions.select(facts).rows()


def test_the_same_files_are_found_again_and_others_are_refused(tmp_path: Path) -> None:
    file, run = save(tmp_path / "completions.jsonl", WRITTEN), RunDir(tmp_path / "run")
    first = import_completions(source(tmp_path), file, run)
    again = import_completions(source(tmp_path), file, run)
    assert (first.reused, again.reused) == (False, True)
    assert first.main.digest == again.main.digest
    save(file, WRITTEN[:2])
    with pytest.raises(RecipeMismatch, match=r"import\.completions_sha256 was"):
        import_completions(source(tmp_path), file, run)


def test_a_killed_import_is_made_again_with_the_same_bytes(tmp_path: Path) -> None:
    file, run = save(tmp_path / "completions.jsonl", WRITTEN), RunDir(tmp_path / "run")
    first = import_completions(source(tmp_path), file, run)
    shutil.rmtree(first.main.path)
    again = import_completions(source(tmp_path), file, run)
    assert not again.reused
    assert again.main.digest == first.main.digest


def test_settings_that_choose_no_rows_do_not_count(tmp_path: Path) -> None:
    file, run = save(tmp_path / "completions.jsonl", WRITTEN), RunDir(tmp_path / "run")
    path = source(tmp_path).source
    import_completions(PromptsConfig(source=path, prompts_per_iteration=2), file, run)
    assert import_completions(PromptsConfig(source=path, prompts_per_iteration=3), file, run).reused


def test_a_training_run_is_left_alone(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    kept = write_artifact(run.place(0, "prompts"), "prompts", prompt_rows())
    with pytest.raises(UsageError, match=r"holds iterations/000000/prompts of a training run"):
        imported(tmp_path, WRITTEN)
    kept.verify()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "What is 5 + 5?", "completion": "10"}, r"row 2 has the unknown question 'What is 5 \+ 5\?'"),
        ({"prompt_id": "nobody", "completion": "10"}, "row 2 has the unknown prompt_id 'nobody'"),
        ({"completion": "10"}, r"row 2 has neither question nor prompt_id, only \['completion'\]"),
        ({"question": "What is 2 + 2?", "completion": 4}, "row 2 has the completion 4"),
        ({"question": "What is 2 + 2?"}, "row 2 has the completion None"),
        ({"question": ["What is 2 + 2?"], "completion": "4"}, r"line 2 of .* in the column question: expected text"),
        ({"question": "What is 2 + 2?", "completion": "4", "group": {}}, "in the column group: expected text"),
    ],
)
def test_a_row_that_cannot_be_placed_is_named(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        imported(tmp_path, [WRITTEN[0], row])
    assert not (tmp_path / "run").exists()


def test_many_wrong_rows_are_counted(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"row 3 .* \(and 2 more\); expected .* one of the 3 questions"):
        imported(tmp_path, [{"completion": "10"}] * 5)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("completions.txt", "ends in '.txt', expected one of .jsonl, .parquet, .csv"),
        ("missing.jsonl", "cannot be read as .jsonl"),
        ("empty.jsonl", "is empty: expected rows with a completion"),
    ],
)
def test_a_file_that_is_none_is_named(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "completions.txt").write_text("x")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(SourceError, match=message):
        import_completions(source(tmp_path), tmp_path / name, RunDir(tmp_path / "run"))


def test_a_task_without_end_has_no_questions_to_import(tmp_path: Path) -> None:
    file = save(tmp_path / "completions.jsonl", WRITTEN)
    with pytest.raises(SourceError, match="makes questions without end, expected a file"):
        import_completions(SourceConfig(source="reasoning_gym:chain_sum"), file, RunDir(tmp_path / "run"))


def test_a_directory_without_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="has no tokenizer files"):
        imported(tmp_path, WRITTEN, tmp_path)


def test_an_import_without_tokenizer_loads_neither_torch_nor_transformers(tmp_path: Path) -> None:
    config = source(tmp_path)
    file = save(tmp_path / "completions.jsonl", WRITTEN)
    code = (
        "import sys; from pathlib import Path; from pipeline.run_dir import RunDir\n"
        "from stages.importing import import_completions; from stages.sources import SourceConfig\n"
        f"import_completions(SourceConfig(source={config.source!r}), Path({str(file)!r}), RunDir(Path(sys.argv[1])))\n"
        "print([m for m in ('torch', 'transformers', 'vllm', 'prefect') if m in sys.modules])"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    found = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
