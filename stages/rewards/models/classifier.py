"""Sequence classifiers of transformers: loaded complete or with a seeded new head, and run over padded rows.

Shapes: `B` rows, `L` labels.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel
from transformers.utils import logging as transformers_logging

from grpo.weight_files import check_implementations, weight_files

Encoding = Mapping[str, list[int]]
"""One row as a tokenizer gives it: input_ids, and attention_mask and token_type_ids where the model wants them."""

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
REWARD_HEAD = "ForSequenceClassification"


def load_classifier(
    source: str,
    *,
    revision: str | None = None,
    is_local: bool,
    device: str = "cpu",
    new_head_seed: int | None = None,
) -> PreTrainedModel:
    """Return the classifier in float32 and evaluation mode; every weight is from the checkpoint.

    With ``new_head_seed`` the source may be a model without classification head, such as a causal language model; it
    gets one with a single logit, its weights normal with variance 1 / (inputs + 1), the same for the same seed.

    Raises:
        ValueError: if there is no such checkpoint, or it lacks weights other than those of a new head.
    """
    labels = {} if new_head_seed is None else {"num_labels": 1}
    try:
        if is_local:
            weight_files(Path(source))
        with quiet_loading():
            config: Any = AutoConfig.from_pretrained(
                source, revision=revision, local_files_only=is_local, trust_remote_code=False, **labels
            )
            check_implementations(vars(config), source)
            loaded: Any = AutoModelForSequenceClassification.from_pretrained(
                source,
                config=config,
                revision=revision,
                dtype=torch.float32,
                local_files_only=is_local,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
    except Exception as error:  # what a broken checkpoint raises depends on its architecture
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{source} cannot be loaded as a sequence classifier ({reason}): expected a checkpoint of transformers "
            "whose architecture can classify; correct the path, or the name and its revision"
        ) from error
    model, report = loaded
    absent = sorted(report["missing_keys"])
    inside = [name for name in absent if new_head_seed is None or name.startswith(f"{model.base_model_prefix}.")]
    if inside:
        raise ValueError(
            f"{source} lacks {len(inside)} weights of {type(model).__name__}, such as {inside[0]}: expected all of "
            "them, since a missing one would be a random number; use a checkpoint of the whole model"
        )
    if new_head_seed is not None:
        _fill_head({name: parameter for name, parameter in model.named_parameters() if name in absent}, new_head_seed)
    for parameter in model.parameters():
        # Loaded tensors are views of the file. A copy has the allocator's alignment, on which matmul results depend.
        parameter.data = parameter.data.to(device, copy=True)
    classifier: PreTrainedModel = model.to(device).eval()
    return classifier


def class_logits(model: PreTrainedModel, encodings: Sequence[Encoding]) -> Tensor:
    """Return the logits of one batch, float32, shape [B, L]; rows are padded on the right."""
    untyped: Any = model
    padded = pad_right(encodings, model.config.get_text_config().pad_token_id or 0)
    inputs = {key: torch.tensor(rows, device=model.device) for key, rows in padded.items()}
    logits_BL: Tensor = untyped(**inputs).logits.float()
    return logits_BL


def pad_right(encodings: Sequence[Encoding], pad_token_id: int) -> dict[str, list[list[int]]]:
    """Return the rows of each model input, filled up on the right with ``pad_token_id`` and zeros."""
    width = max(len(e["input_ids"]) for e in encodings)
    fillers = dict.fromkeys(INPUTS, 0) | {"input_ids": pad_token_id}
    keys = [key for key in INPUTS if key in encodings[0]]
    return {key: [[*e[key], *[fillers[key]] * (width - len(e[key]))] for e in encodings] for key in keys}


def choose_pad_token(model: PreTrainedModel, tokenizer: Any) -> None:
    """Set the padding token in the model's config, where decoders look for the end of a row.

    The config's own stays; else the tokenizer's is taken, else its end of sequence.

    Raises:
        ValueError: if there is none of them.
    """
    config = model.config.get_text_config()
    known = [i for i in (config.pad_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None]
    if not known:
        raise ValueError(
            f"{type(model).__name__} has no padding token: expected pad_token_id in config.json, or a pad_token or "
            "eos_token of the tokenizer; set one"
        )
    config.pad_token_id = known[0]


def _fill_head(parameters: Mapping[str, Tensor], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in sorted(parameters.items()):
        if parameter.dim() < 2:
            parameter.data = torch.zeros(parameter.shape)
        else:
            std = 1 / math.sqrt(parameter.shape[-1] + 1)
            parameter.data = torch.randn(parameter.shape, generator=generator) * std


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Hide progress bars, and the reports on weights that a checkpoint lacks: we check these ourselves."""
    untyped: Any = transformers_logging
    bars, verbosity = untyped.is_progress_bar_enabled(), untyped.get_verbosity()
    untyped.disable_progress_bar()
    untyped.set_verbosity_error()
    try:
        yield
    finally:
        untyped.set_verbosity(verbosity)
        if bars:
            untyped.enable_progress_bar()
