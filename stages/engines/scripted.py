"""ScriptedEngine: the supported test double. Completions are given, not computed, without torch or a model."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pipeline.errors import EngineError
from stages.engines.base import EngineInfo, Generated, OnProgress, Request, Sampling, not_loaded

Answers = Mapping[tuple[int, ...], Sequence[Sequence[int]]] | Callable[[Request], Sequence[int]]


class ScriptedEngine:
    """Gives the completions of a script, every token with the same log probability.

    Args:
        answers: token ids of the completions of each prompt, given in order within one call to generate, starting over
            when they are used up; or a function of the request.
        logprob: of every token.

    A completion ends at its first stop token, or after ``max_tokens``. One without a stop token gets the first of
    ``stop_token_ids`` appended.

    Example:
        ``ScriptedEngine({(5, 6): [[7, 1], [8, 1]]})`` completes the prompt 5, 6 with 7 and 8 alternately; 1 ends them.
    """

    def __init__(self, answers: Answers, *, logprob: float = -1.0) -> None:
        self.answers = answers
        self.logprob = logprob
        self.policies: list[Path] = []
        """Every policy loaded, in order: for assertions."""
        self.requests: list[Request] = []
        """Every request answered, in order: for assertions."""

    @property
    def info(self) -> EngineInfo:
        return EngineInfo(name="scripted", version="1", logprobs_mode="processed", device="cpu")

    def load(self, policy: Path) -> None:
        """Record the policy; the script stays the same."""
        self.policies.append(policy)

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, on_progress: OnProgress | None
    ) -> list[Generated]:
        """Return the script's completions, in the order of requests.

        Raises:
            EngineError: when nothing was loaded, or the script has no completion of a prompt.
        """
        if not self.policies:
            raise not_loaded("scripted")
        turns: Counter[tuple[int, ...]] = Counter()
        generated: list[Generated] = []
        num_tokens = 0
        for request in requests:
            answer = self._answer(request, turns)
            generated.append(_finish(answer, sampling, self.logprob))
            num_tokens += len(generated[-1].token_ids)
            if on_progress is not None:
                on_progress(len(generated), num_tokens)
        self.requests += requests
        return generated

    def close(self) -> None:
        """Nothing to free."""

    def _answer(self, request: Request, turns: Counter[tuple[int, ...]]) -> list[int]:
        if not isinstance(self.answers, Mapping):
            return list(self.answers(request))
        prompt = tuple(request.prompt_token_ids)
        if not self.answers.get(prompt):
            raise EngineError(f"the script has no answer to the prompt {list(prompt)}: add one to the mapping")
        choices = self.answers[prompt]
        turns[prompt] += 1
        return list(choices[(turns[prompt] - 1) % len(choices)])


def _finish(answer: list[int], sampling: Sampling, logprob: float) -> Generated:
    stops = [i for i, token in enumerate(answer) if token in sampling.stop_token_ids]
    token_ids = answer[: stops[0] + 1] if stops else [*answer, *sampling.stop_token_ids[:1]]
    token_ids = token_ids[: sampling.max_tokens]
    is_stopped = bool(token_ids) and token_ids[-1] in sampling.stop_token_ids
    return Generated(
        token_ids=token_ids,
        logprobs=[logprob] * len(token_ids),
        finish_reason="stop" if is_stopped else "length",
        stop_reason=str(token_ids[-1]) if is_stopped else None,
        kept_mass=[1.0] * len(token_ids) if sampling.is_truncated else None,
    )
