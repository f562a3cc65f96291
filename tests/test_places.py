"""Where the program imports by name, evaluates, unpickles, starts processes, loads models, connects or follows links.

`golden/places.txt` lists every such place with what makes it safe. A new one fails here until somebody has thought:
what reaches it that a model, a run or a checkpoint of a stranger has written?
"""

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LISTED = Path(__file__).parent / "golden" / "places.txt"
PACKAGES = ("flows", "grpo", "pipeline", "stages")

NAMES = {
    "imports": (
        "__import__", "importlib.import_module", "importlib.reload", "importlib.util", "runpy", "imp", "zipimport",
        "pkgutil.resolve_name", "site.addsitedir",
    ),
    "evaluates": (
        "eval", "exec", "compile", "sympy.sympify", "sympy.S", "sympy.parse_expr", "sympy.parsing", "sympy.lambdify",
        "numexpr", "asteval", "simpleeval",
        "polars.sql_expr", "polars.SQLContext", "polars.sql", "duckdb", "jinja2", "code",
    ),
    "unpickles": (
        "pickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "jsonpickle", "torch.load",
        "numpy.load", "yaml", "pandas.read_pickle", "multiprocessing.Pipe", "multiprocessing.Queue",
        "multiprocessing.Pool", "multiprocessing.Manager", "multiprocessing.connection.Connection",
        "multiprocessing.connection.Listener", "multiprocessing.connection.Client",
    ),
    "starts": (
        "subprocess", "webbrowser", "pty.spawn", "multiprocessing.Process", "asyncio.create_subprocess_exec",
        "asyncio.create_subprocess_shell", "concurrent.futures.ProcessPoolExecutor", "os.system", "os.popen", "os.fork",
        "os.forkpty", "os.execv", "os.execve", "os.execvp", "os.execvpe", "os.execl", "os.execlp", "os.execle",
        "os.posix_spawn", "os.posix_spawnp", "os.spawnv", "os.spawnve", "os.spawnl",
    ),
    "loads": (
        "datasets.load_dataset", "sentence_transformers", "transformers.pipeline", "vllm.LLM", "torch.hub",
        "huggingface_hub", "tokenizers.Tokenizer.from_file", "safetensors",
    ),
    "native": ("ctypes.CDLL", "ctypes.PyDLL", "ctypes.cdll", "cffi", "torch.ops.load_library"),
    "connects": (
        "urllib.request", "httpx", "requests", "aiohttp", "fsspec", "http.client", "http.server", "smtplib", "ftplib",
        "asyncio.open_connection", "sqlite3", "socket.socket", "socket.create_connection", "socket.create_server",
        "trackio.init", "wandb.init", "wandb.login", "mlflow.MlflowClient",
    ),
    "links": (
        "os.readlink", "os.path.realpath", "os.symlink", "os.link", "shutil", "tarfile", "zipfile",
    ),
}  # fmt: skip
"""Kind -> modules and functions whose calls are places."""
EVALUATORS = ("latex2sympy2_extended", "math_verify", "reasoning_gym")
"""Libraries whose import is a place: what they are handed they may evaluate somewhere inside."""
METHODS = {
    "imports": ("exec_module", "load_module"),
    "evaluates": ("score_answer", "get_score_answer_fn", "from_string", "map_elements", "apply_chat_template"),
    "unpickles": ("recv", "deserialize"),
    "loads": ("from_pretrained", "from_config", "from_file"),
    "native": ("load_extension", "enable_load_extension"),
    "links": ("resolve", "readlink", "symlink_to", "hardlink_to"),
}
"""Kind -> methods whose calls are places, whatever they are called on."""


def places(path: Path) -> Iterator[str]:
    """Yield ``file function kind: what`` for each place in a module."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    meant = dict(_imported(tree))
    for function, node in _with_functions(tree, "module"):
        if (found := _place(node, meant)) is not None:
            yield f"{path.relative_to(ROOT).as_posix()} {function} {found[0]} {found[1]}"


def _imported(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Yield each name that imports bind, with what it stands for."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield (
                    alias.asname or alias.name.partition(".")[0],
                    alias.name if alias.asname else alias.name.partition(".")[0],
                )
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                yield alias.asname or alias.name, f"{node.module}.{alias.name}"


def _with_functions(node: ast.AST, function: str) -> Iterator[tuple[str, ast.AST]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            inner = child.name if function == "module" else f"{function}.{child.name}"
            yield from _with_functions(child, inner)
        else:
            yield function, child
            yield from _with_functions(child, function)


def _place(node: ast.AST, meant: dict[str, str]) -> tuple[str, str] | None:
    """Return kind and name of the place that a node is."""
    if isinstance(node, ast.keyword) and node.arg in ("follow_symlinks", "allow_pickle", "trust_remote_code", "shell"):
        return "option", f"{node.arg}={ast.unparse(node.value)}"
    if isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.path":
        return "imports", "sys.path"
    if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in EVALUATORS:
        return "evaluates", node.module or ""
    if isinstance(node, ast.Import) and node.names[0].name.partition(".")[0] in EVALUATORS:
        return "evaluates", node.names[0].name
    if not isinstance(node, ast.Call):
        return None
    first, dot, rest = ast.unparse(node.func).partition(".")
    name = f"{meant[first]}{dot}{rest}" if first in meant else f"{first}{dot}{rest}"
    is_ours = name.partition(".")[0] in PACKAGES
    for kind, wanted in NAMES.items():
        for prefix in wanted:
            if not is_ours and (name == prefix or name.startswith(f"{prefix}.")):
                return kind, name
    if isinstance(node.func, ast.Attribute):
        for kind, methods in METHODS.items():
            if node.func.attr in methods:
                return kind, f".{node.func.attr}"
    return None


def found_places() -> dict[str, int]:
    """Return every place of the program with how often it occurs."""
    modules = (path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py")))
    return Counter(place for module in modules for place in places(module))


def listed_places() -> dict[str, str]:
    """Return the listed places with what makes each safe."""
    lines = [line for line in LISTED.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    assert lines == sorted(lines), "keep the list sorted"
    return {place: reason for place, _, reason in (line.partition(": ") for line in lines)}


def test_every_place_that_could_run_what_a_stranger_wrote_is_listed_with_what_makes_it_safe() -> None:
    found = {f"{place} x{times}" if times > 1 else place for place, times in found_places().items()}
    listed = listed_places()
    new = sorted(found - set(listed))
    gone = sorted(set(listed) - found)
    assert not new, (
        "think about these, then list them in tests/golden/places.txt with what makes them safe:\n"
        + "\n".join(f"{place}: " for place in new)
    )
    assert not gone, "these are no more; take them from tests/golden/places.txt:\n" + "\n".join(gone)
    assert [place for place, reason in listed.items() if len(reason) < 10] == []


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ("import pickle as p\ndef f(x): return p.loads(x)", "f unpickles pickle.loads"),
        ("from importlib import import_module as i\ni('a')", "module imports importlib.import_module"),
        ("class A:\n    def f(self, c): return c.recv()", "A.f unpickles .recv"),
        ("def f(x): return eval(x)", "f evaluates eval"),
        ("import subprocess\nsubprocess.run('x', shell=True)", "module option shell=True"),
        ("def f():\n    from sympy import sympify\n    return lambda x: sympify(x)", "f evaluates sympy.sympify"),
        ("import polars as pl\npl.sql_expr('a')", "module evaluates polars.sql_expr"),
        ("path.resolve()", "module links .resolve"),
    ],
)
def test_a_new_place_is_found(source: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "module.py").write_text(source)
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    assert f"module.py {kind}" in list(places(tmp_path / "module.py"))
