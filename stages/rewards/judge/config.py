"""The arguments of the judge: where to ask, what, and how the answer is read; checked before anything is generated."""

from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from pipeline.config import StrictModel
from pipeline.manifest import canonical_json
from stages.rewards.judge.prompt import choose_template
from stages.rewards.judge.verdict import Rule, Scale, make_rule

RESERVED = ("model", "messages", "stream", "n", "temperature", "max_tokens", "seed")


class Endpoint(StrictModel):
    """Where and how fast to ask; decides no answer."""

    base_url: str
    """Address of the server; ends in /v1 as a rule."""
    api_key_env: str = ""
    """Name of the environment variable with the key; "" = none is sent."""
    concurrency: int = Field(32, ge=1)
    """Requests under way at once."""
    requests_per_minute: float = Field(0.0, ge=0)
    """0 = as many as come."""
    timeout: float = Field(120.0, gt=0)
    """Seconds for one answer, from the first byte sent to the last received."""
    max_retries: int = Field(5, ge=0)
    """How often a request is repeated after a fault."""
    cache: str = "judgements"
    """Directory of known answers; "" = keep none."""

    @model_validator(mode="after")
    def _check_base_url(self) -> "Endpoint":
        url = urlsplit(self.base_url)
        if url.scheme not in ("http", "https") or not url.hostname or url.port == 0:  # asking for the port checks it
            raise ValueError(f"base_url is {self.base_url!r}: give one such as http://localhost:8000/v1")
        if "@" in url.netloc:
            raise ValueError("base_url holds a user or password: leave it out, and name a variable in api_key_env")
        return self


class JudgeConfig(Endpoint):
    """All arguments of the judge; what stands here, and not in `Endpoint`, decides the reward."""

    model: str = Field(min_length=1)
    """Name under which the server offers the model."""
    prompt_template: str = ""
    """quality, grounded, rubric or a text of one's own, see `judge_prompt`; "" = rubric with criteria, else quality."""
    system: str = ""
    """A system message; "" = none."""
    verdict: str = ""
    """What to find in the answer, see `judge_verdict.Rule`; "" = the number after the last "Score:"."""
    scale: Scale = (1.0, 10.0)
    """``[worst, best]``, or the reward of each word."""
    criteria: Mapping[str, str] | None = None
    """Name -> what it asks, judged one by one; takes the place of ``verdict``."""
    weights: Mapping[str, float] | None = None
    """Of the criteria; 1 where not given."""
    temperature: float = Field(0.0, ge=0)
    """Sent to the server, like the next two."""
    max_tokens: int = Field(1024, ge=1)
    """Left out when ``extra`` has max_completion_tokens."""
    seed: int = 0
    """Of the first attempt; each further one has the next."""
    extra: Mapping[str, Any] | None = None
    """Further fields of the request."""
    leave_out: Sequence[str] = ()
    """Fields that the server refuses."""
    ask_again: int = Field(0, ge=0)
    """Further attempts when an answer has no verdict."""

    @model_validator(mode="after")
    def _check_question(self) -> "JudgeConfig":
        self.rule()
        self.template()
        reserved = sorted(set(self.extra or {}) & set(RESERVED))
        if reserved:
            raise ValueError(f"extra holds {reserved}: these have arguments of their own, or are not for a judge")
        if self.ask_again and "seed" in self.leave_out:
            raise ValueError("ask_again asks with another seed, but leave_out has the seed: drop one of them")
        try:
            canonical_json(self.sampling(0))
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"extra cannot be sent as JSON ({error}): give texts, finite numbers, lists, tables"
            ) from error
        return self

    def rule(self) -> Rule:
        """Return how answers are read."""
        return make_rule(self.verdict, self.scale, self.criteria, self.weights)

    def template(self) -> str:
        """Return the text of the template."""
        return choose_template(self.prompt_template, has_criteria=bool(self.criteria))

    def sampling(self, attempt: int) -> dict[str, Any]:
        """Return the fields of a request that are neither model nor messages; each attempt has a seed of its own."""
        fields = {
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            **(self.extra or {}),
            "seed": self.seed + attempt,
        }
        if "max_completion_tokens" in fields:
            del fields["max_tokens"]
        return {name: value for name, value in fields.items() if name not in self.leave_out}
