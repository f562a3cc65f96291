"""The policy: a causal language model that is read from a checkpoint, trained, and written as the next checkpoint."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    GradientCheckpointingLayer,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from grpo.logprobs import check_supported
from grpo.weight_files import WEIGHTS_FILE, check_implementations, weight_files

POLICY_FILES = ("config.json", "generation_config.json", WEIGHTS_FILE)
"""What ``save_policy`` writes. The tokenizer is not part of a policy here: rows hold token ids."""

GENERATION_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
"""What a policy keeps of its generation config: a run's own settings decide how it samples."""
HARMLESS = {"_from_model_config", "transformers_version", "use_cache", "output_attentions", "output_hidden_states"}
"""What transformers writes there of itself."""

ONE_FILE = "1000TB"
"""Shard size that no model reaches: one weight file keeps the checkpoint's layout independent of its size."""


def load_policy(
    path_or_name: str | Path,
    *,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    gradient_checkpointing: bool = False,
) -> PreTrainedModel:
    """Return the model in evaluation mode, its logprobs checked against ``token_logprobs``, ready to train.

    Evaluation mode switches dropout off, which a policy ratio needs: two forwards of the same weights must agree.
    A path that exists is read from disk only; any other name goes to the Hugging Face hub or its local cache. Code and
    pickles of a checkpoint are never run or read. Of its generation config only the ids of tokens stay.

    Raises:
        ValueError: if there is no checkpoint, it is not a causal language model, weights are missing from it or are
            not finite, or its forward does more than the chunked head.
    """
    source = str(path_or_name)
    is_local = _is_local(path_or_name)
    config = _check_checkpoint(source, is_local, revision)
    names = weight_files(Path(source)) if is_local else ()
    try:
        _check_layers(config, [Path(source) / name for name in names if name.endswith(".safetensors")])
        with _quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source,
                revision=revision,
                dtype=dtype,
                local_files_only=is_local,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
    except Exception as error:  # what a broken checkpoint raises depends on its architecture
        raise ValueError(
            f"{source} has weights that cannot be read ({_first_line(error)}): expected {WEIGHTS_FILE} of the shapes "
            "in config.json; copy the checkpoint again"
        ) from error
    model, report = loaded
    absent = sorted(report["missing_keys"])
    if absent:
        raise ValueError(
            f"{source} lacks {len(absent)} weights of {type(model).__name__}, such as {absent[0]}: expected all of "
            "them, since a missing one would start at random; use a checkpoint of the whole model"
        )
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise ValueError(
                f"{source} has weights that are not finite, in {name}: expected numbers, since one NaN spoils every "
                "log probability; copy the checkpoint again, or take one from before it went wrong"
            )
        # Loaded tensors are views of the file. A copy has the allocator's alignment, on which matmul results depend.
        parameter.data = parameter.data.to(device, copy=True)
    policy: PreTrainedModel = model.to(device).eval()
    _keep_ids(policy)
    check_supported(policy)
    if gradient_checkpointing:
        _checkpoint_gradients(policy)
    return policy


def num_parameters(description: Mapping[str, Any]) -> int:
    """Return the number of weights of the model that a configuration describes, a tied head counted once.

    No weight is made or loaded.

    Raises:
        ValueError: when the configuration asks for code from elsewhere, or is none of a causal language model.
    """
    check_implementations(description, "the model")
    config = AutoConfig.for_model(**description)
    with torch.device("meta"), _quiet():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, trust_remote_code=False
        )
    return sum(parameter.numel() for parameter in model.parameters())


def save_policy(model: PreTrainedModel, directory: str | Path) -> None:
    """Write ``POLICY_FILES`` into an existing or new directory; the same weights always give the same bytes.

    transformers and vLLM load the directory as it stands. A tied head is written once.
    """
    with _quiet():
        model.save_pretrained(directory, max_shard_size=ONE_FILE)


def _keep_ids(model: PreTrainedModel) -> None:
    """Drop settings of sampling from the generation config; transformers refuses to save some pairs of them."""
    found: Any = model.generation_config
    if found is not None and not set(found.to_diff_dict()) <= {*GENERATION_IDS, *HARMLESS}:
        ids = {name: getattr(found, name, None) for name in GENERATION_IDS}
        model.generation_config = GenerationConfig(**ids)  # type: ignore[no-untyped-call]


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _is_local(path_or_name: str | Path) -> bool:
    """Return whether this is a path on disk; a hub name has at most one slash and is no local path."""
    text = str(path_or_name)
    looks_like_path = isinstance(path_or_name, Path) or text.startswith(("/", "./", "../", "~")) or text.count("/") > 1
    return looks_like_path or Path(text).exists()


def _check_checkpoint(source: str, is_local: bool, revision: str | None) -> Any:
    """Return the source's configuration, which is that of a causal language model, or raise."""
    if is_local and not (Path(source) / "config.json").is_file():
        found = "has no config.json" if Path(source).is_dir() else "is not a directory"
        raise ValueError(
            f"{source} {found}: expected a checkpoint written by save_pretrained; correct the path, or give a name "
            "such as Qwen/Qwen2.5-0.5B"
        )
    try:
        config: Any = AutoConfig.from_pretrained(
            source, revision=revision, local_files_only=is_local, trust_remote_code=False
        )
    except Exception as error:  # what a broken configuration raises depends on its architecture
        raise ValueError(
            f"{source} has no usable configuration ({_first_line(error)}): expected a model that transformers "
            "knows; correct the name or the revision, or give a local path"
        ) from error
    check_implementations(vars(config), source)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{source} is quantized: expected weights in floats, which can be trained; use its original")
    if config.is_encoder_decoder or type(config) not in AutoModelForCausalLM._model_mapping:
        raise ValueError(
            f"{source} is a {config.model_type} model: expected a causal language model; use a decoder-only checkpoint"
        )
    return config


def _check_layers(config: Any, files: Sequence[Path]) -> None:
    """Raise if local weights cannot fill the layers of a configuration; building those would take any time."""
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    held = 0
    for file in files:
        with safe_open(file, "pt") as opened:
            held += len(opened.keys())
    if files and isinstance(layers, int) and layers > held:
        raise ValueError(f"config.json says {layers:,} layers, and there are {held:,} weights")


def _checkpoint_gradients(model: PreTrainedModel) -> None:
    """Make the model recompute its layers in backward, with dropout still off.

    transformers checkpoints a layer only in training mode. So only the layers get that mode, not the modules inside
    them. Some layers (OPT) apply dropout themselves, at a rate in an attribute, which becomes 0.
    """
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True
            for name, value in vars(module).items():
                if "drop" in name and isinstance(value, float):
                    setattr(module, name, 0.0)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the progress bars of transformers, then restore them."""
    bars: Any = transformers_logging
    was_enabled = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            bars.enable_progress_bar()
