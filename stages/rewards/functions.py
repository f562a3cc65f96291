"""Finding reward functions: importing one, telling its shape, checking what it asks for, and its identity."""

import ast
import importlib.metadata
import importlib.util
import inspect
import sys
import sysconfig
import tokenize
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

from pydantic import Field

from pipeline.config import Name, StrictModel
from pipeline.errors import GrpoError, RewardError, UntrustedFunction
from pipeline.files import sha256_text
from pipeline.functions import check_permitted, import_function
from pipeline.manifest import canonical_json
from stages.rewards.base import FACTS

OWN_PACKAGES = ("pipeline", "grpo", "stages", "flows")
LIBRARY = "stages.rewards"
NO_REWARDS = (f"{LIBRARY}.base", f"{LIBRARY}.functions")
"""What rewards of the library import, and what decides none."""


class RewardConfig(StrictModel):
    """One reward function."""

    DECIDES_NOTHING: ClassVar = frozenset({"function", "concurrency"})
    DECIDES_ELSEWHERE: ClassVar = frozenset({"arguments"})  # through the reward's recipe

    name: Name
    """Value of the column reward_name; normalize.weights refers to it."""
    function: str
    """``module:function``."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Further keyword arguments."""
    time_limit: float | None = Field(None, gt=0)
    """Seconds for one completion, or for a function over a frame for one call; null = 60, or 3600."""
    memory_limit_gib: float | None = Field(None, gt=0)
    """Of a worker process; null = 4, and none for a function over a frame."""
    concurrency: int = Field(32, ge=1)
    """Calls of an async function under way at once in a worker."""


class Shape(StrEnum):
    """How a reward function is called, see `stages.rewards.base`."""

    completion = "completion"
    frame = "frame"
    expression = "expression"


@dataclass(frozen=True, slots=True)
class RewardFunction:
    """A reward function, found and checked."""

    config: RewardConfig
    call: Callable[..., Any]
    shape: Shape
    is_async: bool
    parameters: tuple[str, ...]
    """Names in its signature that a row may fill; a ``**rest`` is not among them."""
    takes_anything: bool
    """It has a ``**rest`` parameter."""
    required: tuple[str, ...]
    """Parameters without default."""
    recipe: str
    """Its identity: what stands in the column reward_recipe."""

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def arguments(self) -> dict[str, Any]:
        return self.config.arguments

    def columns(self) -> tuple[str, ...]:
        """Return the facts that it wants to see."""
        if self.shape is Shape.frame or self.takes_anything:
            return tuple(FACTS)
        if self.shape is Shape.expression:
            return tuple(name for name in _expression(self).meta.root_names() if name in FACTS)
        facts = [name for name in self.parameters if name in FACTS]
        if self.metadata_keys() and "metadata" not in facts:
            facts.append("metadata")
        return tuple(facts)

    def metadata_keys(self) -> tuple[str, ...]:
        """Return the parameters that only the source row's metadata can fill."""
        return tuple(name for name in self.parameters if name not in FACTS and name not in self.arguments)


def find_reward(config: RewardConfig) -> RewardFunction:
    """Return the function of the config, imported and checked.

    Raises:
        RewardError: when it cannot be imported, has no parameter for one of its arguments, or its identity cannot be
            determined, for example because a file that it reads does not exist.
        UntrustedFunction: when only a recorded config names it, and it is not of the library, or reaches out of it.
    """
    name, function, arguments = config.name, config.function, config.arguments
    if (found := _reaches_out(config)) is not None:
        check_permitted(function, found)
    try:
        call, _ = import_function(function)
    except UntrustedFunction:
        raise
    except (Exception, SystemExit) as error:  # importing a user's module may do anything
        raise RewardError(
            f"the reward {name!r} names {function!r}, which cannot be imported "
            f"({type(error).__name__}: {error}): give module:function, importable from the current directory"
        ) from error
    signature = inspect.signature(call)
    takes_anything = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    named = {n: p for n, p in signature.parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    unknown = sorted(set(arguments) - set(named))
    if unknown and not takes_anything:
        raise RewardError(
            f"the reward {name!r} ({function}) has no parameters {unknown}; it has {list(named)}: "
            "correct score.rewards.arguments"
        )
    only_from_config = getattr(call, "only_from_config", ())  # what a row of strangers' data must not choose
    return RewardFunction(
        config=config,
        call=call,
        shape=_shape(signature),
        is_async=_is_async(call),
        parameters=tuple(n for n in named if n not in only_from_config),
        takes_anything=takes_anything,
        required=tuple(n for n, p in named.items() if p.default is p.empty),
        recipe=_recipe(name, function, call, arguments),
    )


def _is_async(call: Callable[..., Any]) -> bool:
    while isinstance(call, partial):
        call = call.func
    # an object is called by its class
    return inspect.iscoroutinefunction(call) or inspect.iscoroutinefunction(type(call).__call__)


def _reaches_out(config: RewardConfig) -> str | None:
    """Return what a reward of the library does that its user must have asked for; None for most of them."""
    if config.function.startswith(f"{LIBRARY}.judge."):
        return f"sends texts, and a key from the environment, to {config.arguments.get('base_url')}"
    if (isolation := config.arguments.get("isolation", "full")) != "full":
        return f"runs programs with isolation = {isolation!r}"
    if readable := config.arguments.get("readable"):
        return f"shows programs {readable!r:.100} of this machine"
    return None


def _expression(reward: RewardFunction) -> Any:
    """Return the expression that the function gives.

    Raises:
        RewardError: when it raises or gives something else.
    """
    try:
        expression = reward.call(**reward.arguments)
        expression.meta.root_names()
    except Exception as error:  # a user's function may raise anything
        raise RewardError(
            f"the reward {reward.name!r} ({reward.config.function}) is to return a polars expression, as its return "
            f"annotation says, but: {type(error).__name__}: {error}; correct it"
        ) from error
    return expression


def _shape(signature: inspect.Signature) -> Shape:
    if "completions" in signature.parameters:
        return Shape.frame
    returned = signature.return_annotation
    if (returned.rpartition(".")[2] if isinstance(returned, str) else getattr(returned, "__name__", "")) == "Expr":
        return Shape.expression
    return Shape.completion


def check_parameters(reward: RewardFunction, metadata: Mapping[str, Any]) -> None:
    """Check that every parameter without default has something to be filled with, for rows with this metadata.

    Raises:
        RewardError: naming the parameter, most likely misspelt, and what there is.
    """
    given = {
        Shape.completion: [*FACTS, *reward.arguments, *metadata],
        Shape.frame: ["completions", *reward.arguments],
        Shape.expression: list(reward.arguments),
    }[reward.shape]
    missing = [name for name in reward.required if name not in given]
    if missing:
        raise RewardError(
            f"the reward {reward.name!r} wants {missing}, but there is only {sorted(set(given))}: correct the "
            "parameter, or give it in score.rewards.arguments"
        )


def _recipe(name: str, function: str, call: Callable[..., Any], arguments: dict[str, Any]) -> str:
    """Return the hash of everything that decides the reward: the function's name, its arguments or identity, and what
    stands in its module and those that it uses, wherever they lie.
    """
    module_name, _, own_name = function.partition(":")
    named = sys.modules[module_name]
    defining = inspect.getmodule(call) or named  # a closure or an alias may come from elsewhere
    decided_by: Any = arguments
    identity = getattr(named, f"{own_name}_identity", None)
    if identity is None:
        identity = getattr(defining, f"{getattr(call, '__name__', '')}_identity", None)
    if callable(identity):
        try:
            decided_by = identity(**arguments)
        except UntrustedFunction:
            raise
        except Exception as error:  # a user's function may raise anything
            text = str(error) if isinstance(error, GrpoError) else f"{type(error).__name__}: {error}"
            raise RewardError(
                f"the identity of the reward {name!r} ({function}) cannot be determined: {text}; correct "
                "score.rewards.arguments"
            ) from error
    sources = {**source_hashes(defining), **source_hashes(named)}
    # the name in the config, not the function's own: two closures of one maker have the same
    # a name may stand in several of the sources: say which of them it is taken from
    taken_from = [sources.get(module.__name__) for module in (named, defining)]
    return sha256_text(canonical_json([own_name, decided_by, taken_from, sorted(set(sources.values()))]))


@cache  # a module that is loaded stays what it is
def source_hashes(module: ModuleType) -> dict[str, str]:
    """Return the hash of the source of a reward's module and of every module of the user's that it imports, by name.

    Left out are the standard library, installed packages and the pipeline itself, whose own rewards count; and empty
    files, which only say that a folder is a package.
    """
    return hash_sources(module)


def check_sources(reward: RewardFunction) -> None:
    """Check that the files are still those whose hashes stand in the recipe: worker processes import them anew.

    Raises:
        RewardError: when one was changed since this process has read it.
    """
    module = sys.modules[reward.config.function.partition(":")[0]]
    before, now = source_hashes(module), hash_sources(module)
    changed = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
    if changed:
        raise RewardError(
            f"the source of {', '.join(changed)} was changed after this command began to use the reward "
            f"{reward.name!r}: start the command again, which uses the new source"
        )


def hash_sources(module: ModuleType) -> dict[str, str]:
    """Return what `source_hashes` does, of the files as they are now."""
    package = module.__name__.partition(".")[0]
    found: dict[str, str] = {}
    seen: set[str] = set()
    waiting = [module.__name__]
    while waiting:
        name = waiting.pop()
        path = _source_file(name)
        if name in seen or path is None or not (name == module.__name__ or _is_users(name, path, package)):
            continue
        seen.add(name)
        source = _source(path)
        if source.strip():
            found[name] = sha256_text(source)
        is_package = path.name == "__init__.py"
        waiting += _imported(source, name if is_package else name.rpartition(".")[0])
    return dict(sorted(found.items()))


def _source_file(name: str) -> Path | None:
    module = sys.modules.get(name)
    origin = getattr(module, "__file__", None)
    if module is None:
        try:
            spec = importlib.util.find_spec(name)
        except (ImportError, ValueError, AttributeError):
            return None
        origin = spec.origin if spec else None
    return Path(origin) if origin and origin.endswith(".py") and Path(origin).is_file() else None


def _source(path: Path) -> str:
    """Return the text as Python reads it: without a byte order mark, in the encoding that it names."""
    try:
        with tokenize.open(path) as file:
            return file.read()
    except (SyntaxError, UnicodeDecodeError):  # Python cannot read it either, and nobody imports it in earnest
        return path.read_text(encoding="latin-1")


def _is_users(name: str, path: Path, package: str) -> bool:
    top = name.partition(".")[0]
    if top in OWN_PACKAGES:
        return name.startswith(f"{LIBRARY}.") and name not in NO_REWARDS
    if top == package:
        return True
    return not _is_installed(name, path)


def _is_installed(name: str, path: Path) -> bool:
    """Return whether the file is part of a package that was installed, in any of the folders that exist for this.

    These are the interpreter's, those that are called so (a user's, a distribution's, another environment's), and
    any folder whose metadata lists the file, as `pip install --target` leaves it. Sources that are installed in place
    are the user's: their metadata lie elsewhere, or have no list of installed files.
    """
    places = (path, path.resolve())
    if any(place.is_relative_to(folder) for place in places for folder in _installed_folders()):
        return True
    if any(part in ("site-packages", "dist-packages") for place in places for part in place.parts):
        return True
    folder = path.parents[name.count(".") + (path.name == "__init__.py")]
    return path.relative_to(folder).as_posix() in _recorded(folder)


@cache
def _recorded(folder: Path) -> frozenset[str]:
    """Return the files of the packages installed in a folder, by their metadata."""
    distributions = importlib.metadata.distributions(path=[str(folder)])
    return frozenset(str(file) for found in distributions if found.read_text("RECORD") for file in found.files or ())


@cache
def _installed_folders() -> frozenset[Path]:
    return frozenset(Path(sysconfig.get_path(key)).resolve() for key in ("stdlib", "platstdlib", "purelib", "platlib"))


@cache  # the same sources are hashed in every iteration
def _imported(source: str, package: str) -> tuple[str, ...]:
    """Return the names that a module imports; of ``from a import b`` both a and a.b, which may be a module."""
    return tuple(_names_imported(source, package))


def _names_imported(source: str, package: str) -> Iterator[str]:
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):  # of another Python: it cannot be imported either
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                parts = alias.name.split(".")
                yield from (".".join(parts[: i + 1]) for i in range(len(parts)))
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = importlib.util.resolve_name("." * node.level + base, package)
            parts = base.split(".")
            yield from (".".join(parts[: i + 1]) for i in range(len(parts)))
            yield from (f"{base}.{alias.name}" for alias in node.names)
