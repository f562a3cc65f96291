"""What two checkpoints must share so that the weights of one can be loaded over those of the other."""

import json
import shutil
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import PolicyError
from pipeline.files import sha256_file, sha256_text
from pipeline.object_store import download_folder, local_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NEUTRAL_KEYS = frozenset({"_name_or_path", "dtype", "torch_dtype", "transformers_version", "use_cache"})
"""Keys of config.json that change no shape and no computation of an engine that is told its dtype."""

TIED_HEAD = "lm_head.weight"
"""Present or absent at the writer's pleasure when the head is the embedding."""


def read_layout(policy: Path) -> dict[str, Any]:
    """Return the model configuration and the name and shape of every weight. Read-only.

    Equal layouts mean that an engine which runs one checkpoint can take over the other's weights in place.

    Raises:
        PolicyError: when the directory is no checkpoint with safetensors.
    """
    if not (policy / "config.json").is_file():
        raise PolicyError(f"{policy} has no config.json: expected the directory of a checkpoint; give the path of one")
    files = sorted(policy.glob("*.safetensors"))
    if not files:
        raise PolicyError(
            f"{policy} has no *.safetensors file: expected weights in that format; convert the checkpoint"
        )
    config = json.loads((policy / "config.json").read_text(encoding="utf-8"))
    weights = {name: shape for file in files for name, shape in _read_shapes(file).items()}
    if config.get("tie_word_embeddings"):
        weights.pop(TIED_HEAD, None)
    return {"config": {k: v for k, v in config.items() if k not in NEUTRAL_KEYS}, "weights": weights}


def _read_shapes(file: Path) -> dict[str, list[int]]:
    """Return the shapes from the header: its length in 8 bytes, then JSON."""
    try:
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            header = json.loads(opened.read(length))
    except (struct.error, ValueError, OverflowError, MemoryError) as error:
        raise PolicyError(f"{file} is no safetensors file ({error}): copy the checkpoint again") from error
    return {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}


STARTER = "starter"
OPTIMIZER_FILE = "optimizer/state.safetensors"
"""In the initial policy of a fork: a folder of its own, where neither transformers nor vLLM looks for weights."""
STATE_FILE = "state.safetensors"
"""In the artifact of an optimizer's state."""
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
CHECKPOINT_SUFFIXES = (".safetensors", ".json", ".jinja", ".txt", ".model")
"""Files of a checkpoint at a URL that are downloaded: no pickles."""
CAUSAL_SUFFIXES = ("ForCausalLM", "LMHeadModel")


def checkpoint_path(model: str) -> Path:
    """Return the directory of a checkpoint; of one at a URL the working copy, downloaded once in this process."""
    path = local_path(model)
    return download_folder(model, CHECKPOINT_SUFFIXES) if path is None else path


def check_policy(model: str) -> dict[str, Any]:
    """Return the configuration of a local checkpoint, after checking that it is a causal language model. Read-only.

    Raises:
        PolicyError: when the directory is no checkpoint, or of something else.
    """
    path = checkpoint_path(model)
    if not (path / "config.json").is_file():
        raise PolicyError(
            f"{model} has no config.json: expected the directory of a transformers checkpoint; give one, a hub name, "
            f'or "{STARTER}" with a [starter] table'
        )
    try:
        config: dict[str, Any] = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise PolicyError(f"{path / 'config.json'} is not JSON ({error}): restore the checkpoint") from error
    _check_causal(model, config)
    if not any(path.glob("*.safetensors")):
        raise PolicyError(f"{model} has no *.safetensors file: convert its weights, pickled ones are not read")
    if not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise PolicyError(f"{model} has no tokenizer beside its weights: save the tokenizer into the same directory")
    return config


def _check_causal(model: str, config: dict[str, Any]) -> None:
    architectures = config.get("architectures") or []
    if not any(name.endswith(CAUSAL_SUFFIXES) for name in architectures):
        raise PolicyError(
            f"{model} is a {', '.join(architectures) or 'model of unknown architecture'}, expected a causal language "
            "model (...ForCausalLM): give the checkpoint of one"
        )


def hub_config(model: str, revision: str | None) -> dict[str, Any]:
    """Return the model configuration of a hub model.

    Raises:
        PolicyError: when it cannot be reached or is no causal language model.
    """
    from transformers import AutoConfig

    try:
        config: dict[str, Any] = AutoConfig.from_pretrained(model, revision=revision).to_dict()
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise PolicyError(
            f"policy.model {model!r} is neither a directory nor a model that can be loaded from the hub ({reason}): "
            "give the path of a checkpoint, or check the name, the revision and the network"
        ) from error
    _check_causal(model, config)
    return config


def looks_local(model: str) -> bool:
    """Return whether the name is to be read as a path: it exists, or could not be a hub name."""
    return Path(model).exists() or model.startswith((".", "/", "~")) or model.count("/") > 1


def context_length(config: dict[str, Any]) -> int:
    """Return the number of tokens that the model can attend to."""
    text = config.get("text_config", config)
    return int(text.get("max_position_embeddings") or text.get("n_positions") or 0)


def checkpoint_identity(model: str) -> dict[str, str]:
    """Return the hash of a local checkpoint's files: its identity wherever it lies. Read-only."""
    if not looks_local(model):
        return {}
    path = checkpoint_path(model)
    wanted = [
        p for p in sorted(path.iterdir()) if p.is_file() and (p.suffix == ".safetensors" or _is_description(p.name))
    ]
    return {"source_sha256": sha256_text("\n".join(f"{p.name} {sha256_file(p)}" for p in wanted))}


def _is_description(name: str) -> bool:
    return name in TOKENIZER_FILES or name in {"config.json", "generation_config.json"}


def load_tokenizer(path: Path) -> "PreTrainedTokenizerBase":
    """Return the tokenizer of a policy artifact; the same object for equal files. Never asks the network. Read-only."""
    files = [path / name for name in TOKENIZER_FILES if (path / name).is_file()]
    key = tuple((file.name, sha256_file(file)) for file in files)
    if key not in _tokenizers:
        from transformers import AutoTokenizer

        _tokenizers[key] = AutoTokenizer.from_pretrained(path, local_files_only=True)
    return _tokenizers[key]


_tokenizers: "dict[tuple[tuple[str, str], ...], PreTrainedTokenizerBase]" = {}


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer's files, byte for byte, beside new weights."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def stop_token_ids(policy: Path) -> list[int]:
    """Return the ids of all end-of-sequence tokens: of the generation config, the model config and the tokenizer."""
    ids: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        if (policy / name).is_file():
            found = json.loads((policy / name).read_text(encoding="utf-8")).get("eos_token_id")
            ids.update(found if isinstance(found, list) else [] if found is None else [found])
    tokenizer_id = load_tokenizer(policy).eos_token_id
    if isinstance(tokenizer_id, int):
        ids.add(tokenizer_id)
    return sorted(ids)
