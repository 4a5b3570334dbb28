"""What a stage depends on, as one hash: source, parameters, inputs, libraries. No path, no host, no clock."""

import ast
import hashlib
import importlib.util
import json
from collections.abc import Iterable, Iterator
from functools import cache
from importlib import metadata
from pathlib import Path

PACKAGE = "influence_kit"
PACKAGE_FOLDER = Path(__file__).resolve().parents[1]

# The machinery moves files and processes about and never changes a number, so an edit to it makes nothing again.
_ROOMS = {"runner": ("stages", "doctor", "fingerprint", "machine", "plan", "scheduler", "workers"), "publishing": ("notebooks", "results", "readme")}
MACHINERY = frozenset({f"{PACKAGE}.__main__", f"{PACKAGE}.cli", *(f"{PACKAGE}.{room}.{name}" for room, names in _ROOMS.items() for name in names)})

# Names through which code can reach what a reading of its names cannot see.
OPAQUE = frozenset({"globals", "vars", "eval", "exec", "__import__"})


def digest(content: object) -> str:
    """sha256 (hex) of anything JSON can hold, keys sorted. Raises TypeError or ValueError for what JSON cannot hold."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def versions(libraries: Iterable[str]) -> dict[str, str]:
    """Installed version of each library, without the build's local suffix (2.13.0+cpu -> 2.13.0); "absent" if missing."""

    def version(name: str) -> str:
        try:
            return metadata.version(name).split("+")[0]
        except metadata.PackageNotFoundError:
            return "absent"

    return {name: version(name) for name in sorted(libraries)}


def canonical(node: object) -> str:
    """A syntax tree as text that no comment, blank line, docstring, position or Python version changes."""
    if isinstance(node, ast.AST):
        fields = [
            f"{name}={canonical(value)}"
            for name, value in ast.iter_fields(node)
            if value is not None and value != [] and name not in ("ctx", "kind", "type_comment", "type_ignores")
        ]
        return f"{type(node).__name__}({','.join(fields)})"
    if isinstance(node, list):
        return f"[{','.join(map(canonical, node))}]"
    return repr(node)


def _is_docstring(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


class _Tidy(ast.NodeTransformer):
    """Drops bare strings (docstrings among them) and blocks that only a type checker reads."""

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        return None if _is_docstring(node) else self.generic_visit(node)

    def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt] | None:
        if not _is_type_checking(node):
            return self.generic_visit(node)
        return [kept for statement in node.orelse if (kept := self.visit(statement)) is not None]


def parse(source: str) -> ast.Module:
    """The tree of a module's source, without docstrings and type-checking blocks."""
    tree = _Tidy().visit(ast.parse(source))
    assert isinstance(tree, ast.Module)
    return tree


@cache
def _location(module: str) -> Path | None:
    """The source file of a module, found without importing it if it is one of the package's; None if there is none."""
    parts = module.split(".")
    if parts[0] == PACKAGE:
        base = PACKAGE_FOLDER.joinpath(*parts[1:])
        candidates = (base.with_suffix(".py") if len(parts) > 1 else base, base / "__init__.py")
        return next((path for path in candidates if path.is_file()), None)
    found = importlib.util.find_spec(module)
    return Path(found.origin) if found and found.origin and found.origin.endswith(".py") else None


@cache
def _tree(module: str) -> ast.Module:
    path = _location(module)
    if path is None:
        raise ModuleNotFoundError(f"no source found for module {module!r}, which a stage's function names")
    return parse(path.read_text(encoding="utf-8"))


def _imported(nodes: Iterable[ast.AST], module: str) -> Iterator[str]:
    """Modules of the package that these nodes import, or name in a string ("influence_kit.models:train")."""

    def known(name: str) -> bool:
        return name.split(".")[0] == PACKAGE and _location(name) is not None

    path = _location(module)
    package = module if path is not None and path.name == "__init__.py" else module.rpartition(".")[0]
    for node in (inner for outer in nodes for inner in ast.walk(outer)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if known(alias.name))
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            for alias in node.names:
                yield from (name for name in (f"{base}.{alias.name}",) if known(name))
            if known(base) and any(not known(f"{base}.{alias.name}") for alias in node.names):
                yield base
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            name = node.value.split(":")[0]
            if name.startswith(f"{PACKAGE}.") and known(name):
                yield name


def _bound(statement: ast.stmt) -> set[str]:
    """Names that a module's statement defines."""
    names: set[str] = set()
    nodes = [statement] if isinstance(statement, ast.FunctionDef | ast.ClassDef) else list(ast.walk(statement))
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names.update((alias.asname or alias.name).split(".")[0] for alias in node.names)
        elif isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            names.add(node.id)
    return names


def _reached(tree: ast.Module, function: str) -> list[ast.stmt]:
    """The statements of a module that one of its functions needs: what it names, what those name, and so on.

    A module of many stages would otherwise train every model again for an edit to the scoring stage beside it.
    """
    bound = {position: _bound(statement) for position, statement in enumerate(tree.body)}
    if not any(function in names for names in bound.values()):
        raise AttributeError(f"the module has no function {function!r}")
    # Statements that bind nothing (a call at import, say) act on the whole module.
    kept = {position for position, names in bound.items() if not names}
    wanted, seen = {function}, set[str]()
    for position in kept:
        wanted |= {node.id for node in ast.walk(tree.body[position]) if isinstance(node, ast.Name)}
    while wanted:
        name = wanted.pop()
        seen.add(name)
        if name in OPAQUE:
            return tree.body
        for position, names in bound.items():
            if position not in kept and (name in names or "*" in names):
                kept.add(position)
                statement = tree.body[position]
                wanted |= {node.id for node in ast.walk(statement) if isinstance(node, ast.Name)} - seen
    return [tree.body[position] for position in sorted(kept)]


@cache
def source_digest(function: str) -> str:
    """Hash of the code that a function ("module:name") can reach.

    That is: the statements of its own module that it needs, and the whole of every module of the package that these
    import (inside functions too), and so on; never the machinery (MACHINERY). Packages on the way to a module count
    too; a name taken from the top one counts as the whole package. Held for the life of the process, like loaded code.

    Raises ModuleNotFoundError or AttributeError when there is no such function.
    """
    module, _, name = function.partition(":")
    texts: dict[str, str] = {}
    waiting: list[str] = []
    if module not in MACHINERY:
        statements = _reached(_tree(module), name)
        texts[function] = canonical(statements)
        waiting.extend(_imported(statements, module))
    while waiting:
        current = waiting.pop()
        if current in texts or current in MACHINERY:
            continue
        if current == PACKAGE:
            # The top package resolves names on first use: whoever asks it for a name could reach any module.
            texts[current] = package_digest()
            continue
        texts[current] = canonical(_tree(current))
        waiting.extend(_imported([_tree(current)], current))
        parents = current.split(".")[:-1]
        waiting.extend(".".join(parents[:depth]) for depth in range(2, len(parents) + 1))
    return digest(texts)


@cache
def package_digest() -> str:
    """Hash of the whole package's code but the machinery: what a notebook's cells could reach."""
    texts = {}
    for path in sorted(PACKAGE_FOLDER.rglob("*.py")):
        parts = path.relative_to(PACKAGE_FOLDER.parent).with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if module not in MACHINERY:
            texts[module] = canonical(parse(path.read_text(encoding="utf-8")))
    return digest(texts)
