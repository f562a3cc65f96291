"""VllmEngine: completions from vLLM, inside the process that calls it. The only file that imports vllm.

Start it through `stages.engines.process`: vLLM reads its environment on import, prints, and cannot be unloaded.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

from pipeline.errors import ConfigError, EngineError
from stages.checkpoints import read_layout
from stages.engines.base import (
    EngineInfo,
    EngineSettings,
    Generated,
    OnProgress,
    Request,
    Sampling,
    check_requests,
    not_loaded,
)

PROCESSED = "processed_logprobs"
"""vLLM's own default, raw_logprobs, ignores temperature and filters."""

MIN_BATCHED_TOKENS = 4096
"""Prompt tokens per step unless the settings say otherwise."""


class VllmEngine:
    """vLLM with one policy at a time, whose weights are replaced in place."""

    def __init__(self, settings: EngineSettings) -> None:
        self.settings = settings
        self._llm: Any = None
        self._layout: dict[str, Any] = {}
        self._info: EngineInfo | None = None
        self._is_cpu = False

    @property
    def info(self) -> EngineInfo:
        if self._info is None:
            raise not_loaded("vllm")
        return self._info

    def load(self, policy: Path) -> None:
        """Start vLLM with this checkpoint, or replace the weights by its own.

        Raises:
            EngineError: when vllm cannot be imported, or the checkpoint is of another shape than the running one.
        """
        layout = read_layout(policy)
        if self._llm is None:
            self._start(policy)
        elif layout != self._layout:
            raise EngineError(
                f"{policy} differs from the running policy in its configuration or in the shapes of its weights: "
                "expected new weights of the same model; start a new engine for it"
            )
        else:
            self._llm.collective_rpc("reload_weights", kwargs={"weights_path": str(policy)})
            if self._is_cpu:
                self._llm.apply_model(_pack_embeddings_again)
        self._layout = layout
        self._forget_prefixes()

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, on_progress: OnProgress | None
    ) -> list[Generated]:
        """Return one completion for each request, in the order of requests. Progress counts finished requests only.

        Raises:
            EngineError: when nothing is loaded, or a request cannot be answered with these settings.
        """
        if self._llm is None:
            raise not_loaded("vllm")
        check_requests(
            requests,
            max_model_len=self.settings.max_model_len,
            vocab_size=self._llm.llm_engine.model_config.get_vocab_size(),
        )
        if self._is_cpu:
            self._check_cache_size(requests, sampling)
        # prefixes left by another call would change what is computed, and with it the bits
        self._forget_prefixes()
        try:
            return self._run(requests, sampling, on_progress)
        except BaseException:
            self.close()  # unfinished requests are still inside
            raise

    def close(self) -> None:
        """Drop the engine; the memory comes back when the process ends."""
        self._llm = None

    def _start(self, policy: Path) -> None:
        settings = self.settings
        try:
            import vllm
            from vllm.platforms import current_platform
        except ImportError as error:
            raise EngineError(
                f"vllm cannot be imported ({error}): expected one of the extras `cpu` or `gpu`; install the one for "
                'this machine, or set generate.engine = "transformers"'
            ) from error
        self._is_cpu = current_platform.is_cpu()
        num_batched = settings.max_num_batched_tokens
        if self._is_cpu and num_batched is not None and num_batched < settings.max_model_len:
            raise ConfigError(
                f"generate.max_num_batched_tokens is {num_batched}: on CPU a prompt is computed in one step, so "
                f"expected at least the policy's context, {settings.max_model_len}; raise it, or leave it out"
            )
        if self._is_cpu and num_batched is None:
            num_batched = max(settings.max_model_len, settings.max_num_seqs, MIN_BATCHED_TOKENS)
        options: dict[str, Any] = dict(
            model=str(policy),
            trust_remote_code=False,
            dtype=settings.dtype,
            seed=0,
            load_format="safetensors",
            skip_tokenizer_init=True,
            generation_config="vllm",
            logprobs_mode=PROCESSED,
            max_model_len=settings.max_model_len,
            max_num_seqs=settings.max_num_seqs,
            max_num_batched_tokens=num_batched,
            enable_prefix_caching=settings.prefix_caching,
            disable_log_stats=True,
            **(self._cpu_options() if self._is_cpu else {"gpu_memory_utilization": settings.gpu_memory_utilization}),
        )
        try:
            self._llm = vllm.LLM(**options)
        except ValueError as error:
            if "KV cache" not in str(error):
                raise
            raise EngineError(
                f"the key-value cache holds no sequence of {settings.max_model_len} tokens "
                f"({str(error).strip():.300}): expected room for one; set generate.max_model_len to the "
                "longest prompt and completion that you want, or give it more memory (resources.kv_cache_gib on a CPU, "
                "resources.gpu_memory_utilization on a GPU)"
            ) from error
        mode = self._llm.llm_engine.model_config.logprobs_mode
        if mode != PROCESSED:
            raise EngineError(
                f"vLLM {vllm.__version__} runs with logprobs_mode {mode!r}: expected {PROCESSED!r}, as asked for; use "
                "the vLLM version that this project pins"
            )
        device = "cpu" if self._is_cpu else f"cuda: {current_platform.get_device_name()}"
        self._info = EngineInfo("vllm", vllm.__version__, PROCESSED.removesuffix("_logprobs"), device)

    def _cpu_options(self) -> dict[str, Any]:
        return {
            "enforce_eager": True,
            # a chunked prefill of a request with a seed ends in "CPU Generator does not use offset"
            "enable_chunked_prefill": False,
            "kv_cache_memory_bytes": int(self.settings.kv_cache_gib * 2**30),
        }

    def _check_cache_size(self, requests: Sequence[Request], sampling: Sampling) -> None:
        """Refuse a call that could run out of cache: vLLM would stop requests and compute them again, in other batches.

        Raises:
            EngineError: when the longest ``max_num_seqs`` requests do not fit together.
        """
        settings = self.settings
        cache = self._llm.llm_engine.vllm_config.cache_config
        longest = sorted(
            (min(len(r.prompt_token_ids) + sampling.max_tokens, settings.max_model_len) for r in requests), reverse=True
        )
        needed = sum(math.ceil(length / cache.block_size) for length in longest[: settings.max_num_seqs])
        available = cache.num_gpu_blocks - 1  # vLLM keeps one for itself
        if needed > available:
            gib = settings.kv_cache_gib * (needed + 1) / cache.num_gpu_blocks
            raise EngineError(
                f"the key-value cache holds {available} blocks of {cache.block_size} tokens, and "
                f"{settings.max_num_seqs} requests at once can need {needed}: expected room for all; set "
                f"resources.kv_cache_gib to {math.ceil(gib * 100) / 100} or more, or lower generate.max_num_seqs"
            )

    def _forget_prefixes(self) -> None:
        is_empty = self._llm.reset_prefix_cache()
        assert is_empty, "requests of an earlier call are still running"

    def _run(self, requests: Sequence[Request], sampling: Sampling, on_progress: OnProgress | None) -> list[Generated]:
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        engine = self._llm.llm_engine
        for index, request in enumerate(requests):
            params = SamplingParams(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                min_p=sampling.min_p,
                seed=request.seed,
                max_tokens=sampling.max_tokens,
                stop_token_ids=list(sampling.stop_token_ids),
                ignore_eos=True,  # only the caller's stop tokens end a completion
                logprobs=0,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            engine.add_request(str(index), tokens_input(request.prompt_token_ids), params)
        finished: dict[int, Generated] = {}
        num_tokens = 0
        while engine.has_unfinished_requests():
            for output in engine.step():
                completion = _generated(output.outputs[0])
                finished[int(output.request_id)] = completion
                num_tokens += len(completion.token_ids)
            if on_progress is not None:
                on_progress(len(finished), num_tokens)
        return [finished[index] for index in range(len(requests))]


def _generated(output: Any) -> Generated:
    """Return vLLM's CompletionOutput as ours; a log probability is found by token id, never by position."""
    if output.finish_reason not in ("stop", "length", "abort"):
        raise EngineError(
            f"vLLM ended a request with {output.finish_reason!r} ({output.stop_reason}): expected stop, length or "
            "abort; run the same command again"
        )
    token_ids = list(output.token_ids)
    logprobs = [ranked[token].logprob for ranked, token in zip(output.logprobs, token_ids, strict=True)]
    return Generated(
        token_ids=token_ids,
        logprobs=[value if math.isfinite(value) else None for value in logprobs],
        finish_reason=cast(Literal["stop", "length", "abort"], output.finish_reason),
        stop_reason=None if output.stop_reason is None else str(output.stop_reason),
        kept_mass=None,
    )


def _pack_embeddings_again(model: Any) -> None:
    """Refresh the copies that vLLM's CPU kernels keep of embeddings and heads.

    A reload skips a head that shares the embedding's weight, and its packed copy (oneDNN) stays that of the old policy:
    log probabilities are then wrong, without any error. Packing is repeatable, so all of them are packed.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod, VocabParallelEmbedding

    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if isinstance(module, VocabParallelEmbedding) and isinstance(method, UnquantizedEmbeddingMethod):
            method.process_weights_after_loading(module)
