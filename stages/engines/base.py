"""What every inference engine takes and returns."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from pydantic import Field, field_validator

from pipeline.config import StrictModel
from pipeline.errors import ConfigError, EngineError

ENGINES = ("vllm", "transformers")

MIN_TEMPERATURE = 0.01
"""vLLM silently raises a lower temperature to this one, and treats 0 as greedy."""

MAX_SEED = 2**63 - 1
"""The largest seed that fits the seed column and torch's generators; vLLM reads -1 as no seed at all."""

OnProgress = Callable[[int, int], None]
"""Told the number of finished requests and of generated tokens, both since the call began."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is drawn, the same for every request of a call.

    Filters apply after the temperature, in this order: min-p, top-k, top-p over what top-k left.
    """

    temperature: float
    """0 = greedy: the likeliest token, with its log probability at temperature 1 and no filters."""
    max_tokens: int
    """Longest completion. One that reaches the engine's ``max_model_len`` with its prompt ends earlier."""
    stop_token_ids: tuple[int, ...]
    """The only tokens that end a completion; end-of-sequence tokens belong here, engines add none of their own."""
    top_p: float = 1.0
    """1 = off."""
    top_k: int = 0
    """0 = off."""
    min_p: float = 0.0
    """0 = off."""

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: when a value is out of range, or an engine would read it otherwise.
        """
        for name, is_valid, expected in (
            ("temperature", self.temperature == 0 or self.temperature >= MIN_TEMPERATURE, f"0 or >= {MIN_TEMPERATURE}"),
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("top_p", 0 < self.top_p <= 1, "above 0, at most 1"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("min_p", 0 <= self.min_p < 1, "0 (off) or more, below 1"),
        ):
            if not is_valid:
                raise ConfigError(f"{name} is {getattr(self, name)}: expected {expected}; change it in the config")

    @property
    def is_truncated(self) -> bool:
        """Whether some tokens are cut off, so that log probabilities are over the rest only."""
        return self.temperature > 0 and (self.top_p < 1 or self.top_k > 0 or self.min_p > 0)


@dataclass(frozen=True, slots=True)
class Request:
    """One completion to generate."""

    prompt_token_ids: list[int]
    seed: int
    """0 to 2**63 - 1. On CPU torch's generators read the low 32 bits only, so spread the bits of a hash."""


@dataclass(frozen=True, slots=True)
class Generated:
    """One completion, in the order of its request."""

    token_ids: list[int]
    """Exactly as sampled, the stop token included."""
    logprobs: list[float | None]
    """Of each token, natural log, after temperature and filters; None where the engine gave no finite number."""
    finish_reason: Literal["stop", "length", "abort"]
    stop_reason: str | None
    """Id of the stop token, in decimal; None unless the reason is stop."""
    kept_mass: list[float] | None
    """Probability that the filters left at each token; None when sampling was not truncated, or the engine is vLLM,
    which does not report it."""


class EngineConfig(StrictModel):
    """Settings of an engine that can change the bits of its results."""

    engine: str = "vllm"
    """``vllm``; ``transformers``, for machines where vLLM cannot be installed: same rows, slower; or
    ``module:function``, which takes `EngineSettings` and returns an `Engine`."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the engine's weights."""
    max_model_len: int | None = Field(None, ge=2)
    """Longest prompt and completion together, in tokens; null = the model's context. A key-value cache must hold at
    least one such sequence. Longer prompts are dropped. Part of the recipe."""
    max_num_seqs: int = Field(256, ge=1)
    """Requests that run at once. Decides the shapes of matrix products, hence bits: part of the recipe."""
    max_num_batched_tokens: int | None = Field(None, ge=1)
    """Prompt tokens per engine step; null = from the model's context. Part of the recipe for the same reason."""
    prefix_caching: bool = True
    """Compute the prompt of a group once."""
    num_threads: int = Field(2, ge=1)
    """CPU threads of the engine; they change the bits of results."""

    @field_validator("engine")
    @classmethod
    def _known_engine(cls, name: str) -> str:
        if name not in ENGINES and ":" not in name:
            raise ValueError(f"{name!r} is no engine: expected {', '.join(ENGINES)} or module:function; choose one")
        return name


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """What an engine is started with. All but the two sizes of memory can change the bits of its results."""

    engine: str
    dtype: Literal["float32", "bfloat16", "float16"]
    """Of weights and activations; log probabilities are computed in float32 from logits in this type."""
    max_model_len: int
    """Longest prompt and completion together, in tokens."""
    max_num_seqs: int
    """Requests that run at once."""
    num_threads: int
    """CPU threads of torch, and of vLLM's kernels."""
    max_num_batched_tokens: int | None = None
    """Prompt tokens that vLLM takes in one step. On CPU at least ``max_model_len``; None = the larger of that,
    ``max_num_seqs`` and 4096. On a GPU None = vLLM's choice. The transformers engine prefills whole batches."""
    prefix_caching: bool = True
    """Whether vLLM computes the prompt of a group once, within a call to generate."""
    gpu_memory_utilization: float = 0.9
    """Share of the GPU's memory that vLLM may take for weights and cache. Unused on CPU."""
    kv_cache_gib: float = 1.0
    """Size of vLLM's key-value cache on CPU, GiB. A call for which it could be too small is refused."""


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """Which engine wrote a row."""

    name: str
    version: str
    logprobs_mode: str
    """``processed`` = after temperature and filters, as read back from the engine."""
    device: str


class Engine(Protocol):
    """Generates completions with one policy at a time. Not for use by several threads at once."""

    @property
    def info(self) -> EngineInfo:
        """Which engine this is; known after the first load."""
        ...

    def load(self, policy: Path) -> None:
        """Start with this checkpoint, or replace the weights by its own."""
        ...

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, on_progress: OnProgress | None
    ) -> list[Generated]:
        """Return one completion for each request, in the order of requests.

        The same requests in the same order, with the same weights and settings, give the same bits on the same CPU.
        """
        ...

    def close(self) -> None:
        """Free memory and processes. Closing twice is fine."""
        ...


def check_requests(requests: Sequence[Request], *, max_model_len: int, vocab_size: int) -> None:
    """Refuse requests that an engine could not answer as asked.

    Raises:
        EngineError: when a prompt is empty, leaves no room or has unknown tokens, or a seed is too large.
    """
    for index, request in enumerate(requests):
        ids = request.prompt_token_ids
        if not 1 <= len(ids) < max_model_len:
            raise EngineError(
                f"prompt {index} has {len(ids)} tokens: expected 1 to {max_model_len - 1}, as prompt and completion "
                f"share a context of {max_model_len}; drop the prompt, or raise the context"
            )
        if min(ids) < 0 or max(ids) >= vocab_size:
            raise EngineError(
                f"prompt {index} has the token ids {min(ids)} to {max(ids)}: expected 0 to {vocab_size - 1}, the "
                "policy's vocabulary; tokenize the prompts with the tokenizer of this policy"
            )
        if not 0 <= request.seed <= MAX_SEED:
            raise EngineError(f"request {index} has the seed {request.seed}: expected 0 to 2**63 - 1; derive another")


def not_loaded(engine: str) -> EngineError:
    """Return the error of a call that needs a policy before the first load."""
    return EngineError(f"the {engine} engine has no policy: expected load() before this call; load a checkpoint first")
