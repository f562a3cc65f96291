"""The tree: package names, lazy imports, documentation that keeps up with the code."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from flows.look import schema_markdown

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "vllm", "prefect", "transformers")


@pytest.mark.parametrize("name", ["pipeline", "grpo", "stages", "flows"])
def test_the_generic_package_names_resolve_inside_the_repository(name: str) -> None:
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    assert Path(spec.origin) == ROOT / name / "__init__.py"


@pytest.mark.parametrize(
    "module",
    [
        "flows.cli",
        "flows.look",
        "flows.report.render",
        "flows.verification",
        "pipeline.run_dir",
        "pipeline.schema",
        "stages.wiring",
        "stages.inspect.verify.verify",
    ],
)
def test_looking_and_configuring_import_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print([m for m in {HEAVY} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_every_column_of_every_dataset_is_documented() -> None:
    text = (ROOT / "docs" / "datasets.md").read_text(encoding="utf-8")
    assert schema_markdown().strip() in text, "run `make docs`"


def test_every_command_is_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    files = sorted((ROOT / "flows" / "commands").glob("*.py"))
    source = "\n".join(path.read_text(encoding="utf-8") for path in files)
    found = re.findall(r"@(\w+)\.command\((?:\"([\w-]+)\")?\)\ndef (\w+)", source)
    groups = {"app": "", "reward_app": "reward "}
    commands = [groups[app] + (name or function.replace("_", "-")) for app, name, function in found]
    assert len(commands) >= 14
    assert [name for name in commands if f"grpo {name}" not in readme] == []


def test_every_module_is_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    modules = [p for package in ("pipeline", "grpo", "stages", "flows") for p in (ROOT / package).rglob("*.py")]
    names = [p.stem for p in modules if p.stem != "__init__"]
    assert [name for name in names if not re.search(rf"\b{name}\b", readme)] == []


def test_no_file_grew_out_of_one_sitting() -> None:
    files = [p for package in ("pipeline", "grpo", "stages", "flows") for p in (ROOT / package).rglob("*.py")]
    assert {p.name: n for p in files if (n := len(p.read_text(encoding="utf-8").splitlines())) > 420} == {}
