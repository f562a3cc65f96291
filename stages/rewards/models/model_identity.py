"""What makes a model the same model: the bytes of a local directory, the commit of a hub name."""

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from grpo.weight_files import WEIGHTS_INDEX, check_description, shards
from pipeline.errors import RewardError
from pipeline.files import sha256_file, sha256_text
from pipeline.functions import ON_THE_HUB, check_permitted
from pipeline.manifest import MANIFEST
from stages.checkpoints import looks_local
from stages.rewards.base import deciding_arguments

BESIDE_THE_MODEL = (MANIFEST, "optimizer", "README.md")
"""What may lie in a checkpoint's directory and no inference reads; the manifest has clock times in it."""


def model_identity(model: str, revision: str | None = None) -> dict[str, str]:
    """Return what decides which weights a model name means, wherever a local one lies. Read-only.

    A directory is known by the names and bytes of its files, hidden ones and `BESIDE_THE_MODEL` left out; they are
    hashed once in a process. A hub model is known by its name and its commit.

    Raises:
        RewardError: when the directory does not exist or is empty, or a hub name comes without a revision.
        UntrustedFunction: when only a recorded config names a hub model.
    """
    if looks_local(model):
        return {"model_sha256": _directory_sha256(model_path(model))}
    if revision is None:
        raise RewardError(
            f"the model {model!r} is no directory here, so it is taken for a hub name; those need revision (a commit), "
            "or the weights could change under the rewards: add it, or give the path of a local model"
        )
    check_permitted(model, ON_THE_HUB)
    return {"model": model, "revision": revision}


def identity_by_model(function: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that decide a reward, with what decides the weights in place of ``model`` and ``revision``.

    Raises:
        RewardError: as `model_identity` does.
    """
    arguments = deciding_arguments(function, given)
    return {**model_identity(arguments.pop("model"), arguments.pop("revision")), **arguments}


def model_path(model: str) -> Path:
    """Return the directory of a local model.

    Raises:
        RewardError: when there is none.
    """
    path = Path(model).expanduser().resolve()
    if not path.is_dir():
        raise RewardError(f"the model {model!r} does not exist: expected a directory; correct the path")
    return path


def model_source(model: str) -> str:
    """Return what the loaders of transformers are given: an absolute path, or the hub name as it is."""
    return str(model_path(model)) if looks_local(model) else model


@cache
def _directory_sha256(path: Path) -> str:
    found = sorted(p for p in path.rglob("*") if p.is_file())
    names = [p.relative_to(path) for p in found]
    deciding = [n for n in names if n.parts[0] not in BESIDE_THE_MODEL and not any(x.startswith(".") for x in n.parts)]
    if not deciding:
        raise RewardError(f"the model directory {path} holds no file: expected a saved model; correct the path")
    for name in names:
        try:
            if name.name == WEIGHTS_INDEX:  # a file that it names elsewhere would stand in no identity
                shards(path / name)
            elif name.name.endswith("config.json"):  # sentence-transformers has one for each of its modules
                check_description(path / name)
        except ValueError as error:
            raise RewardError(str(error)) from error
    return sha256_text("\n".join(f"{name.as_posix()} {sha256_file(path / name)}" for name in deciding))
