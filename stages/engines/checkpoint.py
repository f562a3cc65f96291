"""What two checkpoints must share so that the weights of one can be loaded over those of the other."""

import json
import struct
from pathlib import Path
from typing import Any

from pipeline.errors import PolicyError

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
