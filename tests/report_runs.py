"""Small runs for the tests of the report."""

from pathlib import Path

from pipeline.run_dir import RunDir
from tests.builders import advantage_rows, completion_rows, fill, prompt_rows, write_artifact


def new_run(root: Path, settings: dict[str, object] | None = None) -> RunDir:
    run = RunDir(root / "runs" / "small")
    run.record_config("", {"evaluate": {"pass_threshold": 1.0}, "generate": {"max_tokens": 8}, **(settings or {})})
    return run


def write_iteration(run: RunDir, index: int, *, answer: str = "7", reward: float = 1.0) -> None:
    """Write one group of two members: the first has the reward, the second 0."""
    rows = ({"completion": answer, "group_id": f"g{index}"}, {"group_id": f"g{index}", "finish_reason": "length"})
    write_artifact(run.place(index, "prompts"), "prompts", prompt_rows())
    write_artifact(run.place(index, "completions"), "completions", completion_rows(*rows))
    rewards = [
        {"completion_id": f"c{i}", "group_id": f"g{index}", "reward_name": "exact", "reward": value, "detail": answer}
        for i, value in enumerate([reward, 0.0])
    ]
    write_artifact(run.place(index, "rewards"), "rewards", fill("rewards", rewards, reward_recipe="r"))
    advantages = [
        {"group_id": f"g{index}", "reward": value, "advantage": advantage, "group_reward_mean": reward / 2,
         "group_reward_std": 0.7}
        for value, advantage in [(reward, 0.5), (0.0, -0.5)]
    ]  # fmt: skip
    write_artifact(run.place(index, "advantages"), "advantages", advantage_rows(*advantages))
