"""Finding reward functions: their shape, what they ask for, and their identity."""

import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import chosen
from pipeline.errors import RewardError
from stages.rewards.base import deciding_arguments
from stages.rewards.functions import RewardConfig, RewardFunction, Shape, check_sources, find_reward


def find(function: str, **arguments: Any) -> RewardFunction:
    return find_reward(RewardConfig(name="r", function=function, arguments=arguments))


@pytest.mark.parametrize(
    ("function", "arguments", "shape", "columns"),
    [
        ("share_of_digits", {}, Shape.completion, {"completion"}),
        ("misbehave_async", {}, Shape.completion, {"completion"}),
        ("has_seven", {}, Shape.expression, {"completion"}),
        ("seven_with_detail", {"word": "7"}, Shape.expression, {"completion", "task"}),
    ],
)
def test_the_signature_tells_the_shape_and_what_it_wants_to_see(
    function: str, arguments: dict[str, Any], shape: Shape, columns: set[str]
) -> None:
    found = find(f"tests.rewards:{function}", **arguments)
    assert found.shape is shape
    assert set(found.columns()) == columns


def test_a_function_over_a_frame_sees_every_fact() -> None:
    found = find("tests.rewards:length_in_frame")
    assert found.shape is Shape.frame
    assert {"completion", "metadata", "num_tokens", "policy_name"} <= set(found.columns())


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's reward module that imports another one of the user's."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "helping.py").write_text("FACTOR = 2.0\n")
    (tmp_path / "unrelated.py").write_text("X = 1\n")
    (tmp_path / "my_reward.py").write_text(
        "import json\nimport polars\nfrom helping import FACTOR\n\ndef f(completion, file=''):\n    return FACTOR\n"
    )
    return tmp_path / "my_reward.py"


def recipe(function: str = "my_reward:f", **arguments: Any) -> str:
    for name in ("my_reward", "helping"):
        sys.modules.pop(name, None)
    return find(function, **arguments).recipe


def test_the_identity_covers_what_the_function_imports_from_the_users_own_modules(module: Path) -> None:
    before = recipe()
    (module.parent / "unrelated.py").write_text("X = 2\n")
    assert recipe() == before
    (module.parent / "helping.py").write_text("FACTOR = 3.0\n")
    assert recipe() != before


def test_the_identity_covers_the_functions_own_module_and_arguments(module: Path) -> None:
    before = recipe()
    assert recipe(file="a") != before
    module.write_text(module.read_text() + "# another comment\n")
    assert recipe() != before


def test_the_identity_covers_the_named_module_of_a_closure_from_elsewhere(module: Path) -> None:
    helping = module.parent / "helping.py"
    helping.write_text("def make(factor):\n    def f(completion):\n        return factor\n    return f\n")
    module.write_text("from helping import make\nf = make(2.0)\n")
    before = recipe()
    module.write_text("from helping import make\nf = make(3.0)\n")
    assert recipe() != before


def test_the_identity_does_not_know_where_a_module_lies(module: Path) -> None:
    package = module.parent / "elsewhere" / "deeper"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").touch()
    (package / "renamed.py").write_text(module.read_text())
    copy = recipe("elsewhere.deeper.renamed:f", file="a")
    assert copy == recipe(file="a") != recipe(file="b")
    module.write_text(module.read_text().replace("FACTOR\n\n", "FACTOR as X\n\n"))
    assert recipe(file="a") != copy


@pytest.mark.parametrize(
    "source",
    [
        b"\xef\xbb\xbffrom helping import FACTOR\ndef f(completion): return FACTOR\n",
        b"# -*- coding: latin-1 -*-\n# \xe4\nfrom helping import FACTOR\ndef f(completion): return FACTOR\n",
        b"from helping import FACTOR\ntry:\n    import old\nexcept SyntaxError:\n    pass\n"
        b"def f(completion): return FACTOR\n",
    ],
    ids=["byte order mark", "latin-1", "a module of another Python"],
)
def test_sources_are_read_as_python_reads_them(module: Path, source: bytes) -> None:
    (module.parent / "old.py").write_bytes(b"print 'x\xe4'\n")
    module.write_bytes(source)
    before = recipe()
    (module.parent / "helping.py").write_text("FACTOR = 3.0\n")
    assert recipe() != before


PACKAGED = {  # where a module that a reward imports lies -> whether it is an installed package, not the user's source
    "site-packages": True,
    "python3/dist-packages": True,
    "target": True,
    "own": False,
    "in_place": False,
}


@pytest.mark.parametrize("folder", PACKAGED)
def test_installed_packages_are_no_source_of_the_user_wherever_they_lie(
    module: Path, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    place = module.parent / folder
    (place / "lib_of_somebody").mkdir(parents=True)
    (place / "lib_of_somebody" / "__init__.py").write_text("from lib_of_somebody.inner import X\n")
    (place / "lib_of_somebody" / "inner.py").write_text("X = 1.0\n")
    if folder == "target":  # as pip install --target leaves it
        (place / "lib-1.0.dist-info").mkdir()
        (place / "lib-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: lib\nVersion: 1.0\n")
        files = ("lib_of_somebody/__init__.py", "lib_of_somebody/inner.py", "lib-1.0.dist-info/METADATA")
        (place / "lib-1.0.dist-info" / "RECORD").write_text("".join(f"{file},,\n" for file in files))
    if folder == "in_place":  # as setuptools leaves it beside sources that are installed in place
        (place / "lib.egg-info").mkdir()
        (place / "lib.egg-info" / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: lib\nVersion: 1.0\n")
        (place / "lib.egg-info" / "SOURCES.txt").write_text("lib_of_somebody/__init__.py\nlib_of_somebody/inner.py\n")
    monkeypatch.syspath_prepend(place)
    module.write_text("from lib_of_somebody import X\ndef f(completion): return X\n")
    for name in ("lib_of_somebody", "lib_of_somebody.inner"):
        sys.modules.pop(name, None)
    before = recipe()
    (place / "lib_of_somebody" / "inner.py").write_text("X = 2.0\n")
    assert (recipe() == before) is PACKAGED[folder]


def test_two_functions_of_one_module_have_two_identities(module: Path) -> None:
    maker = "def make(factor):\n    def inner(completion):\n        return factor\n    return inner\n"
    module.write_text(f"{maker}f = make(2.0)\ng = make(3.0)\n")
    assert recipe("my_reward:f") != recipe("my_reward:g")


def test_functions_of_one_name_in_modules_that_import_each_other_have_recipes_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "twins"
    package.mkdir()
    (package / "__init__.py").write_text("from twins.strict import score\nimport twins.lenient\n")
    (package / "common.py").write_text("WORD = 'yes'\n")
    for name, value in (("strict", 0.0), ("lenient", 1.0)):
        (package / f"{name}.py").write_text(
            f"from twins.common import WORD\n\n\ndef score(completion: str) -> float:\n    return {value}\n"
        )
    monkeypatch.syspath_prepend(tmp_path)
    assert find("twins.strict:score").recipe != find("twins.lenient:score").recipe


def test_what_decides_a_score_holds_no_place_and_no_pace() -> None:
    config = RewardConfig(name="r", function="m:f", arguments={"cache": "here"}, time_limit=2.0, concurrency=5)
    assert chosen(config) == {"name": "r", "time_limit": 2.0}


def test_a_source_that_changes_while_it_is_used_is_refused(module: Path) -> None:
    for name in ("my_reward", "helping"):
        sys.modules.pop(name, None)
    reward = find("my_reward:f")
    check_sources(reward)
    (module.parent / "helping.py").write_text("FACTOR = 4.0\n")
    with pytest.raises(RewardError, match="source of helping was changed"):
        check_sources(reward)


def test_an_expression_that_cannot_be_made_is_one_clear_error() -> None:
    with pytest.raises(RewardError, match=r"is to return a polars expression.*no such word"):
        find("tests.rewards:broken_expression").columns()


def test_an_identity_function_takes_the_arguments_place(module: Path) -> None:
    module.write_text(
        "from pathlib import Path\n\n"
        "def f(completion, file):\n    return 1.0\n\n"
        "def f_identity(file):\n    return {'content': Path(file).read_text()}\n"
    )
    for name, text in (("a", "same"), ("b", "same"), ("c", "other")):
        (module.parent / name).write_text(text)
    one, same, other = (recipe(file=str(module.parent / name)) for name in "abc")
    assert one == same != other


def test_an_identity_that_cannot_be_determined_says_why(module: Path) -> None:
    module.write_text(
        "from pathlib import Path\n\n"
        "def f(completion, file):\n    return 1.0\n\n"
        "def f_identity(file):\n    return Path(file).read_text()\n"
    )
    with pytest.raises(RewardError, match=r"identity of the reward 'r' .* FileNotFoundError"):
        recipe(file="absent")


def test_the_arguments_that_decide_have_their_defaults_and_lack_what_the_row_fills() -> None:
    def f(completion: str, city: str, factor: float, file: str = "a", cache: str = "b", task: str = "c") -> float:
        return 1.0

    assert deciding_arguments(f, {"factor": 2.0, "cache": "x"}, without=["city", "cache"]) == {
        "factor": 2.0,
        "file": "a",
    }
    with pytest.raises(TypeError, match="missing a required argument: 'factor'"):
        deciding_arguments(f, {}, without=["city"])
    with pytest.raises(TypeError, match="unexpected keyword argument 'fac'"):
        deciding_arguments(f, {"factor": 2.0, "fac": 1.0}, without=["city"])
