"""A checkpoint's directory: files, weights, configuration, tokenizer. No other module knows its layout.

The weights are the safetensors files that transformers loads, one or several; their headers are read here without
torch. transformers is imported only to load a tokenizer, or to ask the hub.
"""

import shutil
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo.weight_files import weight_files
from pipeline.artifact import WEIGHTS
from pipeline.errors import PolicyError
from pipeline.files import sha256_file, sha256_text
from pipeline.functions import ON_THE_HUB, check_permitted
from pipeline.object_store import download_folder, local_path
from pipeline.reading import loads, open_regular, read_limited

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STARTER = "starter"
CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
OPTIMIZER_FILE = "optimizer/state.safetensors"
"""In the initial policy of a fork: a folder of its own, where neither transformers nor vLLM looks for weights."""
STATE_FILE = "state.safetensors"
"""In the artifact of an optimizer's state."""
VOCABULARY_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model")
"""A tokenizer has at least one of them; where they are equal, a token id has the same text."""
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
CHECKPOINT_SUFFIXES = (WEIGHTS, ".json", ".jinja", ".txt", ".model")
"""Suffixes of the files that are downloaded from a checkpoint at a URL: no pickles."""
CAUSAL_SUFFIXES = ("ForCausalLM", "LMHeadModel")

NEUTRAL_KEYS = frozenset({"_name_or_path", "dtype", "torch_dtype", "transformers_version", "use_cache"})
"""Keys of config.json that change no shape and no computation of an engine whose dtype is set."""
HEADER_BYTES = 100_000_000
"""Longest header that safetensors reads."""
TOKENIZER_BYTES = 128 << 20
"""Size of the largest JSON file of a checkpoint that is read: a vocabulary of a million tokens."""
TIED_HEAD = "lm_head.weight"
"""Optional in a file when the head is the embedding."""


def holds_tensors(name: str) -> bool:
    """Return whether the name is that of a file of tensors: weights or an optimizer's state."""
    return name.endswith(WEIGHTS)


def weight_names(names: Iterable[str]) -> list[str]:
    """Return the files at the top of a directory or manifest that hold tensors: a policy's weights."""
    return [name for name in names if holds_tensors(name) and "/" not in name]


def _loaded(directory: Path) -> tuple[str, ...]:
    """Return the files that weights are loaded from, the index of several included."""
    try:
        return weight_files(directory)
    except ValueError as error:
        raise PolicyError(str(error)) from error


@dataclass(frozen=True, slots=True)
class Header:
    """The header of a safetensors file."""

    dtypes: dict[str, str]
    shapes: dict[str, list[int]]
    metadata: dict[str, str]


def read_header(file: Path) -> Header:
    """Return the header of a safetensors file: its length in 8 bytes, then JSON. Read-only.

    Raises:
        ValueError: when there is none, or the file does not end where its last tensor does.
    """
    size = file.stat().st_size
    try:
        with open_regular(file) as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            if length > size:
                raise ValueError(f"{file.name} has a header of {length} bytes, more than the file")
            if length > HEADER_BYTES:
                raise ValueError(f"{file.name} has a header of {length:,} bytes, more than safetensors reads")
            tensors = loads(opened.read(length))
        metadata = tensors.pop("__metadata__", {})
        ends = [facts["data_offsets"][1] for facts in tensors.values()]
        header = Header(
            {name: facts["dtype"] for name, facts in tensors.items()},
            {name: facts["shape"] for name, facts in tensors.items()},
            metadata,
        )
        is_whole = size == 8 + length + max(ends, default=0)
    except (struct.error, LookupError, TypeError, AttributeError, OSError) as error:
        raise ValueError(str(error)) from error
    if not is_whole:
        raise ValueError(f"{file.name} does not end with its last tensor")
    return header


def read_layout(policy: Path) -> dict[str, Any]:
    """Return the model configuration and the name and shape of every weight. Read-only.

    When layouts are equal, an engine that runs one checkpoint can load the other's weights in place.

    Raises:
        PolicyError: when the directory is no checkpoint with safetensors.
    """
    if not (policy / CONFIG_FILE).is_file():
        raise PolicyError(f"{policy} has no config.json: expected the directory of a checkpoint; give the path of one")
    files = weight_names(_loaded(policy))
    config = read_json(policy / CONFIG_FILE)
    weights = {name: shape for file in files for name, shape in _shapes(policy / file).items()}
    if config.get("tie_word_embeddings"):
        weights.pop(TIED_HEAD, None)
    return {"config": {k: v for k, v in config.items() if k not in NEUTRAL_KEYS}, "weights": weights}


def _shapes(file: Path) -> dict[str, list[int]]:
    try:
        return read_header(file).shapes
    except ValueError as error:
        raise PolicyError(f"{file} is no safetensors file ({error}): copy the checkpoint again") from error


def checkpoint_path(model: str) -> Path:
    """Return the directory of a checkpoint; for a URL, its working copy, downloaded once per process."""
    path = local_path(model)
    return download_folder(model, CHECKPOINT_SUFFIXES) if path is None else path


def check_policy(model: str) -> dict[str, Any]:
    """Return the configuration of a local checkpoint, after checking that it is a causal language model. Read-only.

    Raises:
        PolicyError: when the directory is not the checkpoint of a causal language model.
    """
    path = checkpoint_path(model)
    if not (path / CONFIG_FILE).is_file():
        raise PolicyError(
            f"{model} has no config.json: expected the directory of a transformers checkpoint; give one, a hub name, "
            f'or "{STARTER}" with a [starter] table'
        )
    config = read_json(path / CONFIG_FILE)
    _check_trainable(model, config)
    _loaded(path)
    if not any((path / name).is_file() for name in VOCABULARY_FILES):
        raise PolicyError(f"{model} has no tokenizer beside its weights: save the tokenizer into the same directory")
    check_stop_tokens(path)
    return config


def check_stop_tokens(policy: Path) -> None:
    """Check that the model knows the end-of-sequence tokens that its files name.

    Raises:
        PolicyError: naming the file.
    """
    size = vocabulary_size(policy)
    for name in (GENERATION_FILE, CONFIG_FILE):
        beyond = [i for i in _stops_in(policy / name) if not isinstance(i, int) or not 0 <= i < (size or i + 1)]
        if beyond:
            raise PolicyError(
                f"eos_token_id in {policy / name} is {beyond[0]!r}, and the model knows the ids 0 to "
                f"{(size or 0) - 1}: expected ids of its vocabulary; correct that file"
            )


def is_causal(architectures: Sequence[str]) -> bool:
    """Return whether the architectures that a configuration names are those of a causal language model."""
    return any(name.endswith(CAUSAL_SUFFIXES) for name in architectures)


def _check_trainable(model: str, config: dict[str, Any]) -> None:
    named = config.get("architectures")
    architectures = [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
    quantized = config.get("quantization_config") or config.get("compression_config")
    if quantized:
        method = quantized.get("quant_method", "?") if isinstance(quantized, dict) else quantized
        raise PolicyError(
            f"{model} is quantized ({method}): expected weights in floats, which can be trained; give the model that "
            "it was made from"
        )
    if not is_causal(architectures):
        raise PolicyError(
            f"{model} is a {', '.join(architectures) or 'model of unknown architecture'}, expected a causal language "
            "model (...ForCausalLM): give the checkpoint of one"
        )


def hub_config(model: str, revision: str | None) -> dict[str, Any]:
    """Return the model configuration of a hub model.

    Raises:
        PolicyError: when it cannot be reached or is no causal language model.
        UntrustedFunction: when only a recorded config names it.
    """
    check_permitted(model, ON_THE_HUB)
    from transformers import AutoConfig

    try:
        config: dict[str, Any] = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=False).to_dict()
    except Exception as error:  # the hub client and a broken configuration raise many unrelated classes
        raise PolicyError(
            f"policy.model {model!r} is neither a directory nor a model that can be loaded from the hub "
            f"({first_line(error)}): give the path of a checkpoint, or check the name, the revision and the network"
        ) from error
    _check_trainable(model, config)
    return config


def hub_tokenizer(model: str, revision: str | None) -> "PreTrainedTokenizerBase":
    """Return the tokenizer of a hub model.

    Raises:
        PolicyError: when it cannot be loaded.
        UntrustedFunction: when only a recorded config names it.
    """
    check_permitted(model, ON_THE_HUB)
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            model, revision=revision, trust_remote_code=False
        )
    except Exception as error:  # the hub client and broken files raise many unrelated classes
        raise PolicyError(
            f"the tokenizer of {model} cannot be loaded ({first_line(error)}): give a model with one"
        ) from error
    return tokenizer


def first_line(error: Exception) -> str:
    """Return the first line of a library's message, which has often many."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def looks_local(model: str) -> bool:
    """Return whether the name is to be read as a path: it exists, or could not be a hub name."""
    return Path(model).exists() or model.startswith((".", "/", "~")) or model.count("/") > 1


def context_length(config: dict[str, Any]) -> int:
    """Return the number of tokens that the model can attend to."""
    found = _text_config(config)
    length = found.get("max_position_embeddings") or found.get("n_positions")
    return length if isinstance(length, int) else 0


def checkpoint_identity(path: Path) -> dict[str, str]:
    """Return the hash of the files that are loaded from a checkpoint's directory, whatever its path. Read-only.

    Raises:
        PolicyError: when there is no checkpoint.
    """
    names = sorted({*_loaded(path), *TOKENIZER_FILES, CONFIG_FILE, GENERATION_FILE})
    wanted = [path / name for name in names if (path / name).is_file()]
    return {"source_sha256": sha256_text("\n".join(f"{p.name} {sha256_file(p)}" for p in wanted))}


def load_tokenizer(path: Path) -> "PreTrainedTokenizerBase":
    """Return the tokenizer of a policy artifact; the same object for equal files. Read-only.

    Never uses the network, and never runs a checkpoint's code.

    Raises:
        PolicyError: when the files hold no tokenizer.
    """
    files = [path / name for name in TOKENIZER_FILES if (path / name).is_file()]
    key = tuple((file.name, sha256_file(file)) for file in files)
    if key not in _tokenizers:
        from transformers import AutoTokenizer

        try:
            _tokenizers[key] = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # what broken files raise depends on the tokenizer's class
            raise PolicyError(
                f"the tokenizer in {path} cannot be loaded ({first_line(error)}): save it there again"
            ) from error
    return _tokenizers[key]


_tokenizers: "dict[tuple[tuple[str, str], ...], PreTrainedTokenizerBase]" = {}


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer's files, byte for byte, next to new weights."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def stop_token_ids(policy: Path) -> list[int]:
    """Return the ids of all end-of-sequence tokens: of the generation config, the model config and the tokenizer.

    Raises:
        PolicyError: when the model does not know the tokenizer's.
    """
    tokenizer_id, size = load_tokenizer(policy).eos_token_id, vocabulary_size(policy)
    if isinstance(tokenizer_id, int) and size is not None and tokenizer_id >= size:
        raise PolicyError(
            f"the tokenizer in {policy} ends a sequence with the id {tokenizer_id}, and the model knows the ids 0 to "
            f"{size - 1}: expected one of them; save the tokenizer that belongs to the weights"
        )
    return sorted(_configured_stops(policy) | ({tokenizer_id} if isinstance(tokenizer_id, int) else set()))


def stated_stop_token_ids(policy: Path) -> list[int] | None:
    """Return the stop token ids that files state, without transformers; None if only the tokenizer knows. Read-only.

    `grpo verify` must start fast, and must not trust what a tokenizer's code makes of the files.
    """
    stated = read_json(policy / "tokenizer_config.json").get("eos_token")
    text = stated.get("content") if isinstance(stated, dict) else stated
    added = read_json(policy / "tokenizer.json").get("added_tokens", [])
    known = {token["id"] for token in added if token["content"] == text}
    return None if text is not None and not known else sorted(_configured_stops(policy) | known)


def _configured_stops(policy: Path) -> set[int]:
    return {i for name in (GENERATION_FILE, CONFIG_FILE) for i in _stops_in(policy / name)}


def _stops_in(file: Path) -> list[int]:
    value = read_json(file).get("eos_token_id")
    return value if isinstance(value, list) else [] if value is None else [value]


def vocabulary_size(policy: Path) -> int | None:
    """Return how many token ids the model knows, None where its configuration does not say. Read-only."""
    size = _text_config(read_json(policy / CONFIG_FILE)).get("vocab_size")
    return size if isinstance(size, int) else None


def _text_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a model's configuration that describes its language model."""
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config


def read_json(path: Path) -> dict[str, Any]:
    """Return the table in a checkpoint's file; an empty one where there is none. Read-only.

    Raises:
        PolicyError: when the file is not JSON, or larger than that of any tokenizer.
    """
    try:
        found = loads(read_limited(path, TOKENIZER_BYTES)) if path.is_file() else {}
    except (ValueError, OSError) as error:
        raise PolicyError(f"{path} is not JSON ({error}): restore the checkpoint") from error
    return found if isinstance(found, dict) else {}
