"""What a stranger could put into a checkpoint: its files spoiled, its manifest made to fit."""

import json
import random
from pathlib import Path

from pipeline.files import sha256_file
from tests.hostile import TEXTS, VALUES, replace_digest, special, write_manifest
from tests.manifests import manifest_of


def spoil_checkpoint(place: Path, rng: random.Random) -> str:
    """Spoil a checkpoint, and make its manifest fit."""
    names = ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors", "generation_config.json"]
    path = place / rng.choice([name for name in names if (place / name).is_file()] + ["model.safetensors"])
    how = rng.choice(("text", "field", "bytes", "special", "header"))
    if path.suffix == ".safetensors" and how in ("text", "field"):
        how = "header"
    if how == "header":
        path = place / "model.safetensors"
        what = _spoil_header(path, rng)
    elif how == "special":
        what = special(path, rng.choice(("fifo", "zero", "folder", "loop", "outside", "dangling")))
    elif how == "text":
        text = rng.choice(TEXTS)
        path.write_bytes(text)
        what = f"begins with {text[:8]!r}, {len(text)} bytes"
    elif how == "field":
        table, value = json.loads(path.read_text()), rng.choice(VALUES)
        key = rng.choice(sorted(table) or ["x"])
        table[key] = value
        path.write_bytes(json.dumps(table).encode(errors="surrogatepass"))
        what = f"{key} is {value!r}"
    else:
        data = bytearray(path.read_bytes())
        for _ in range(rng.choice((1, 16))):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(bytes(data[: rng.choice((len(data), len(data) // 2))]))
        what = "bytes are changed"
    manifest = manifest_of(place)
    before = manifest["digest"]
    for name, facts in manifest["files"].items():
        if (place / name).is_file() and (place / name).stat().st_size < 1 << 30 and not (place / name).is_symlink():
            facts |= {"bytes": (place / name).stat().st_size, "sha256": sha256_file(place / name)}
    write_manifest(place, manifest)
    replace_digest(place.parent, before, manifest["digest"])
    return f"{path.name}: {what}"[:200]


def _spoil_header(path: Path, rng: random.Random) -> str:
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    tensors, rest = json.loads(data[8 : 8 + size]), data[8 + size :]
    name = rng.choice([name for name in tensors if name != "__metadata__"])
    how = rng.choice(("length", "dtype", "shape", "offsets", "json", "metadata", "missing", "extra", "overlap"))
    header = b""
    if how == "length":
        path.write_bytes(rng.choice((0, 2**63, len(data), size + 1)).to_bytes(8, "little") + data[8:])
        return "length of the header"
    if how == "json":
        header = rng.choice(TEXTS[:10])
    elif how == "metadata":
        tensors["__metadata__"] = rng.choice(VALUES)
    elif how == "missing":
        del tensors[name]
    elif how == "extra":
        tensors["x"] = {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}
    elif how == "overlap":
        tensors["x"] = tensors[name]
    else:
        key = {"dtype": "dtype", "shape": "shape", "offsets": "data_offsets"}[how]
        tensors[name][key] = rng.choice((*VALUES, [2**62, 2**62], [-1, 1], [0, 0], "F64", "I8"))
    header = header or json.dumps(tensors).encode(errors="surrogatepass")
    path.write_bytes(len(header).to_bytes(8, "little") + header + rest)
    return f"{how} in the header"
