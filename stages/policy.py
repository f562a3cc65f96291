"""policy: a hub name, a checkpoint directory or a starter -> the artifact that a run begins with.

The artifact holds what transformers and vLLM load as it stands: weights in float32, configuration, tokenizer.
"""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from pipeline.config import StrictModel
from pipeline.errors import PolicyError
from pipeline.remote import download_folder, local_path
from pipeline.stage import Stage, StageTask
from pipeline.storage import sha256_file, sha256_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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


class PolicyConfig(StrictModel):
    """Which weights the run begins with."""

    model: str = Field(min_length=1)
    """A Hugging Face model name, the path or URL of a checkpoint, or ``starter``: the one that [starter] describes."""
    revision: str | None = None
    """Commit of a hub model; a name alone can change its weights."""
    keep_optimizer: bool = True
    """When model is the policy of a run, go on with its optimizer's moments and step count."""


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


def source_identity(model: str) -> dict[str, str]:
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


def compute(task: StageTask) -> None:
    """Normalize a checkpoint. ``task.resources`` is the local path, or None for the hub model of the config."""
    from transformers import AutoTokenizer

    from grpo.policy import load_policy, save_policy

    source, revision = task.resources or task.config.model, task.config.revision
    target = task.writer.directory
    state = task.inputs["optimizer"].path / STATE_FILE if "optimizer" in task.inputs else Path(source) / OPTIMIZER_FILE
    if "policy" in task.inputs and task.config.keep_optimizer and state.is_file():
        (target / OPTIMIZER_FILE).parent.mkdir(exist_ok=True)
        shutil.copyfile(state, target / OPTIMIZER_FILE)
    try:
        save_policy(load_policy(str(source), revision=revision), target)
        if Path(source).is_dir():
            copy_tokenizer(Path(source), target)
        else:
            AutoTokenizer.from_pretrained(source, revision=revision).save_pretrained(target)
    except (ValueError, OSError) as error:
        raise PolicyError(str(error)) from error


STAGE = Stage("policy", version=1, outputs=("policy",), compute=compute)
