"""The tree: package names, lazy imports, documentation that keeps up with the code."""

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from flows.app import COMMANDS, build_app, module_of
from flows.commands.schema import schema_markdown

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "vllm", "prefect", "transformers")
DOCUMENTED = sorted(
    path.parent.relative_to(ROOT).as_posix()
    for package in ("pipeline", "grpo", "stages", "flows")
    for path in (ROOT / package).rglob("__init__.py")
)
"""Packages whose __init__ names their files."""


@pytest.mark.parametrize("name", ["pipeline", "grpo", "stages", "flows"])
def test_the_generic_package_names_resolve_inside_the_repository(name: str) -> None:
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    assert Path(spec.origin) == ROOT / name / "__init__.py"


@pytest.mark.parametrize(
    "module",
    [
        "flows.planning.plan",
        "flows.replayer",
        "flows.report.live",
        "flows.report.render",
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


def test_the_commands_import_nothing_heavy_before_they_are_called() -> None:
    code = "import sys; from flows.app import COMMANDS, build_app; build_app(COMMANDS)(standalone_mode=False); "
    code += f"print([m for m in {(*HEAVY, 'polars', 'pydantic', 'rich', 'urllib.request')} if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.splitlines()[-1] == "[]"


def test_a_command_imports_no_other_one() -> None:
    code = "import sys; from flows.cli import main\ntry:\n    main()\nexcept SystemExit:\n    "
    code += "print(sorted(m for m in sys.modules if m.startswith('flows.commands.')))"
    command = [sys.executable, "-c", code, "show", "--help"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "['flows.commands.options', 'flows.commands.show']"


def test_every_file_of_commands_is_a_command_and_says_whether_it_writes() -> None:
    files = {path.stem for path in (ROOT / "flows" / "commands").glob("*.py")} - {"__init__", "options"}
    modules = [module_of(name) for name in COMMANDS]
    assert sorted(module.__name__ for module in modules) == sorted(f"flows.commands.{name}" for name in files)
    assert [module.__name__ for module in modules if type(module.WRITES) is not bool] == []


def test_an_unknown_command_is_met_with_those_of_a_like_name() -> None:
    command = [sys.executable, "-m", "flows.cli", "runn"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1] == "Error: No such command 'runn'. Did you mean 'run', 'prune'?"


def test_every_command_has_a_line_in_the_documentation() -> None:
    page = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    names, groups = [], []
    for name, command in typer.main.get_command(build_app(COMMANDS)).commands.items():  # type: ignore[attr-defined]
        names += [f"{name} {inner}" for inner in getattr(command, "commands", {})] or [name]
        groups.append(name)
    assert sorted(groups) == sorted(COMMANDS)
    assert [name for name in names if f"grpo {name}" not in page] == []


@pytest.mark.parametrize("package", DOCUMENTED)
def test_a_package_says_what_each_of_its_files_is(package: str) -> None:
    folder = ROOT / package
    text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or ""
    described = re.findall(r"^(\w+)  +\S+ \S+", text, re.MULTILINE)
    modules = [path.stem for path in folder.glob("*.py") if path.stem != "__init__"]
    packages = [path.parent.name for path in folder.glob("*/__init__.py")]
    assert sorted(described) == sorted([*modules, *packages])


def test_no_file_grew_out_of_one_sitting() -> None:
    files = [p for package in ("pipeline", "grpo", "stages", "flows") for p in (ROOT / package).rglob("*.py")]
    assert {p.name: n for p in files if (n := len(p.read_text(encoding="utf-8").splitlines())) > 420} == {}
