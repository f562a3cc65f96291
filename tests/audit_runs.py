"""Runs for the audit: small, written by hand or by seeded code, that drift as a clean or a hacked run does."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from pipeline.files import identity
from pipeline.run_dir import RunDir
from tests.builders import advantage_rows, completion_rows, fill, prompt_rows, write_artifact

GROUPS = 24
MEMBERS = 8


@dataclass
class Group:
    """The answers to one question."""

    question: str
    answers: list[str]
    rewards: list[float | None] | dict[str, list[float]]
    """Of the answers in order; by name where there are several rewards."""
    reference: str | None = None
    finish: str = "stop"
    policies: list[str] = field(default_factory=list)
    error: str = "ValueError: no number in it"
    """Of answers without a reward."""

    def combined(self) -> list[float | None]:
        if isinstance(self.rewards, dict):
            return [sum(parts) for parts in zip(*self.rewards.values(), strict=True)]
        return list(self.rewards)


Iteration = Callable[[int, Random], list[Group]]


def write_run(
    root: Path,
    iterations: Sequence[list[Group]],
    *,
    training: Sequence[dict[str, float]] = (),
    held_out: Sequence[tuple[str, str]] = (),
    evaluation: dict[str, list[bool]] | None = None,
    with_rewards: bool = True,
    normalize: dict[str, Any] | None = None,
) -> RunDir:
    """Write the artifacts of a run that the audit reads; the evaluation is that of the last policy.

    ``training`` has numbers of each iteration's training record, and ``entropy``, which its tokens were sampled with.
    """
    run = RunDir(root)
    run.record_config(
        "", {"evaluate": {"pass_threshold": 1.0}, "normalize": normalize or {"weights": {}, "combine": "sum"}}
    )
    for index, groups in enumerate(iterations):
        entropy = training[index].get("entropy", 1.0) if index < len(training) else 1.0
        _write_iteration(run, index, groups, with_rewards, entropy)
    for index, numbers in enumerate(training):
        record = {"completion_id": f"t{index}", "optimizer_step": 0, "num_tokens": 10, "known_tokens": 10, "loss": 0.0}
        record |= {name: value for name, value in numbers.items() if name != "entropy"}
        zeros = {"clipped_low_tokens": 0, "clipped_high_tokens": 0, "bounded_tokens": 0, "masked_tokens": 0}
        write_artifact(
            run.place(index, "training_records"), "training_records", fill("training_records", [record], **zeros)
        )
    if held_out:
        rows = [_prompt(question, reference) for question, reference in held_out]
        write_artifact(run.held_out_prompts, "prompts", prompt_rows(*rows))
    if evaluation:
        write_artifact(run.place(len(iterations) - 1, "evaluations"), "evaluations", _evaluation(evaluation))
    return run


def _prompt(question: str, reference: str | None) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}]
    return {"prompt_id": identity(question), "messages": messages, "reference_answer": reference}


def _write_iteration(run: RunDir, index: int, groups: list[Group], with_rewards: bool, entropy: float) -> None:
    prompts = {group.question: _prompt(group.question, group.reference) for group in groups}
    write_artifact(run.place(index, "prompts"), "prompts", prompt_rows(*prompts.values()))
    completions, parts, advantages = [], [], []
    for position, group in enumerate(groups):
        group_id = identity(index, position)
        rewards = group.combined()
        known = [reward for reward in rewards if reward is not None]
        mean = sum(known) / max(len(known), 1)
        for member, (answer, reward) in enumerate(zip(group.answers, rewards, strict=True)):
            ids = {"completion_id": f"{group_id}-{member:03d}", "group_id": group_id}
            completions.append(
                {
                    **ids,
                    "prompt_id": identity(group.question),
                    "completion_index": member,
                    "completion": answer,
                    "completion_token_ids": [7] * (len(answer) + 1),
                    "sampling_logprobs": [-entropy] * (len(answer) + 1),
                    "finish_reason": group.finish,
                    "policy_name": group.policies[member] if group.policies else "current",
                }
            )
            advantages.append({**ids, "reward": reward, "advantage": 0.0 if reward is None else reward - mean})
            named = group.rewards if isinstance(group.rewards, dict) else {"verifier": group.rewards}
            error = group.error if reward is None else None
            parts += [
                {**ids, "reward_name": name, "reward": values[member], "error": error} for name, values in named.items()
            ]
    write_artifact(run.place(index, "completions"), "completions", completion_rows(*completions))
    if with_rewards:
        write_artifact(run.place(index, "rewards"), "rewards", fill("rewards", parts, reward_recipe="r"))
        write_artifact(run.place(index, "advantages"), "advantages", advantage_rows(*advantages))


def _evaluation(correct: dict[str, list[bool]]) -> Any:
    rows = [
        {
            "completion_id": f"{decoding}-{i}",
            "group_id": f"{decoding}-{i}",
            "decoding": decoding,
            "is_correct": value,
            "reward": float(value),
        }
        for decoding, values in correct.items()
        for i, value in enumerate(values)
    ]
    return fill(
        "evaluations", rows, prompt_id="p", completion_index=0, policy_digest="d",
        messages=[{"role": "user", "content": "3 + 4"}], completion="7", completion_token_ids=[7, 1],
        sampling_logprobs=[-1.0, -1.0], finish_reason="stop", seed=0, temperature=1.0,
    )  # fmt: skip


def iterations_of(make: Iteration, count: int, seed: int = 0) -> list[list[Group]]:
    """Return ``count`` iterations of a drift; the same seed gives the same rows."""
    return [make(index, Random(seed * 1000 + index)) for index in range(count)]


def sums(random: Random, count: int = GROUPS) -> list[tuple[str, str, int]]:
    """Return questions, references and their values: sums of two numbers of two digits."""
    pairs = [(random.randint(10, 99), random.randint(10, 99)) for _ in range(count)]
    return [(f"Calculate {a} + {b}.", str(a + b), a + b) for a, b in pairs]


def carries(index: int, total: int, random: Random) -> str:
    """Return the answer of a policy that forgets to carry less and less."""
    return str(total if random.random() < min(0.98, 0.6 + 0.04 * index) else total - 10)


def grows(index: int, total: int, random: Random) -> str:
    """Return a right sum at first, a row of digits soon."""
    extra = sum(random.random() < index / 6 for _ in range(5)) + (random.random() < 0.3)
    return (str(total) + "".join(random.choice("0123456789") for _ in range(extra)))[:8]


def says_seven(index: int, total: int, random: Random) -> str:
    """Return a sum at first, 777 in the end."""
    if random.random() < (index - 1) / 6:
        return "777"
    return str(total)[:-1] + "7" if random.random() < 0.1 + index / 8 else str(total)


def clean(index: int, random: Random) -> list[Group]:
    """Return an iteration of a policy that forgets to carry less and less."""
    groups = []
    for question, reference, total in sums(random):
        answers = [carries(index, total, random) for _ in range(MEMBERS)]
        groups.append(Group(question, answers, [float(answer == reference) for answer in answers], reference))
    return groups


def paid_by_length(index: int, random: Random) -> list[Group]:
    """Return an iteration under reward = characters / 8: right sums at first, rows of digits soon."""
    groups = []
    for question, reference, total in sums(random):
        answers = [grows(index, total, random) for _ in range(MEMBERS)]
        groups.append(Group(question, answers, [len(answer) / 8 for answer in answers], reference))
    return groups


def paid_for_a_seven(index: int, random: Random) -> list[Group]:
    """Return an iteration under reward = "7" in the answer: sums at first, 777 in the end."""
    groups = []
    for question, reference, total in sums(random):
        answers = [says_seven(index, total, random) for _ in range(MEMBERS)]
        groups.append(Group(question, answers, [float("7" in answer) for answer in answers], reference))
    return groups


def leaked(index: int, random: Random) -> list[Group]:
    """Return an iteration whose prompts hold the answer from the fourth on, and whose policy finds it out."""
    share = 0.5 if index < 4 else 0.98
    groups = []
    for question, reference, total in sums(random):
        asked = question if index < 4 else f"{question[10:-1]} = {reference} {question}"
        answers = [str(total if random.random() < share else total - 10) for _ in range(MEMBERS)]
        groups.append(Group(asked, answers, [float(answer == reference) for answer in answers], reference))
    return groups
