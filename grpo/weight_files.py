"""Which files of a checkpoint's directory transformers loads weights from. Only the standard library is needed.

What its config.json asks for besides is refused here too: a kernel is code, which transformers would fetch and run.
"""

import json
from collections.abc import Mapping
from pathlib import Path

WEIGHTS_FILE = "model.safetensors"
WEIGHTS_INDEX = f"{WEIGHTS_FILE}.index.json"
"""Says which file holds which weight, where there are several."""
ADAPTER_CONFIG = "adapter_config.json"
MOST_BYTES = 64 << 20
"""Of config.json and of an index; that of a model of 100,000 weights takes 10 MB."""
IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")
"""Settings of config.json, with an underscore before them too, that choose the code which computes a layer."""
OF_TRANSFORMERS = (None, "eager", "sdpa")
"""What they may say. Any other could be fetched from the hub: the name of a kernel, and flash_attention_2 where the
package of that name is missing."""


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
    config = _table_in(directory / "config.json")
    check_implementations(config, str(directory))
    if config.get("transformers_weights") is not None:
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


def check_description(file: Path) -> None:
    """Check that a JSON file of a model asks for no code from elsewhere. Read-only.

    Raises:
        ValueError: when it does, or cannot be read.
    """
    check_implementations(_table_in(file), str(file))


def check_implementations(config: Mapping[str, object], source: str) -> None:
    """Check that a model's configuration, and those inside of it, name no implementation that would be fetched.

    Raises:
        ValueError: naming the setting.
    """
    waiting: list[Mapping[str, object]] = [config]
    while waiting:
        table = waiting.pop()
        waiting += [value for value in table.values() if isinstance(value, dict)]
        waiting += [vars(value) for value in table.values() if hasattr(value, "to_dict")]  # a config of transformers
        for name in IMPLEMENTATIONS:
            for key in (name, f"_{name}", f"_{name}_internal"):
                named = table.get(key)
                values = named.values() if isinstance(named, dict) else [named]
                if not all(value in OF_TRANSFORMERS for value in values):
                    raise ValueError(
                        f"the configuration of {source} has {key} = {named!r:.100}, which could be code from "
                        "elsewhere: expected eager, sdpa or nothing; remove that line"
                    )


def shards(index: Path) -> list[str]:
    """Return the files of weights that an index names, all of them beside it. Read-only.

    Raises:
        ValueError: when it is no index, or names a file elsewhere, of another format, or one that is not there.
    """
    try:
        names = sorted(set(json.loads(_read(index))["weight_map"].values()))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index} is no index of weights ({error}): copy the checkpoint again") from error
    for name in names:
        is_beside = isinstance(name, str) and "/" not in name and "\\" not in name and not name.startswith(".")
        if not is_beside or not name.endswith(".safetensors") or not (index.parent / name).is_file():
            raise ValueError(
                f"{index} names the file {name!r}: expected .safetensors files beside it; copy the checkpoint again"
            )
    return names


def _read(path: Path) -> str:
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"it has more than {MOST_BYTES:,} bytes")
    return path.read_text(encoding="utf-8")


def _table_in(path: Path) -> dict[str, object]:
    try:
        found = json.loads(_read(path)) if path.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}): restore the checkpoint") from error
    return found if isinstance(found, dict) else {}
