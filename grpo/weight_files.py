"""Which files of a checkpoint's directory transformers loads weights from. Only the standard library is needed."""

import json
from pathlib import Path

WEIGHTS_FILE = "model.safetensors"
WEIGHTS_INDEX = f"{WEIGHTS_FILE}.index.json"
"""Says which file holds which weight, where there are several."""
ADAPTER_CONFIG = "adapter_config.json"


def weight_files(directory: Path) -> tuple[str, ...]:
    """Return the names of the files that a loader reads with ``use_safetensors=True``, the index included. Read-only.

    No other file of the directory is weights, whatever its name.

    Raises:
        ValueError: when there are none, or a file would be read from elsewhere or in another format.
    """
    if (directory / ADAPTER_CONFIG).is_file():
        raise ValueError(
            f"{directory} holds {ADAPTER_CONFIG}, so its weights are a change of another model's: expected a whole "
            "model; merge the adapter into its base, and save that"
        )
    if _config_of(directory).get("transformers_weights") is not None:
        raise ValueError(
            f"config.json of {directory} names the file of its weights (transformers_weights): expected "
            f"{WEIGHTS_FILE}; load the model and save it again"
        )
    if (directory / WEIGHTS_FILE).is_file():
        return (WEIGHTS_FILE,)
    if (directory / WEIGHTS_INDEX).is_file():
        return (WEIGHTS_INDEX, *shards(directory / WEIGHTS_INDEX))
    raise ValueError(
        f"{directory} has no {WEIGHTS_FILE} and no {WEIGHTS_INDEX}: expected one of them; convert its weights with "
        "save_pretrained, pickled ones are not read"
    )


def shards(index: Path) -> list[str]:
    """Return the files of weights that an index names, all of them beside it. Read-only.

    Raises:
        ValueError: when it is no index, or names a file elsewhere, of another format, or one that is not there.
    """
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index} is no index of weights ({error}): copy the checkpoint again") from error
    for name in names:
        is_beside = isinstance(name, str) and "/" not in name and "\\" not in name and not name.startswith(".")
        if not is_beside or not name.endswith(".safetensors") or not (index.parent / name).is_file():
            raise ValueError(
                f"{index} names the file {name!r}: expected .safetensors files beside it; copy the checkpoint again"
            )
    return names


def _config_of(directory: Path) -> dict[str, object]:
    path = directory / "config.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}): restore the checkpoint") from error
    return found if isinstance(found, dict) else {}
