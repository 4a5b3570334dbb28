"""What a stage depends on, as one hash: source, parameters, inputs, libraries. No path, no host, no clock.

Source is read, not run. From a function the names that it uses are followed through the modules of the package, definition
by definition: a change counts exactly for those whose code can reach it.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

PACKAGE = "influence_kit"
PACKAGE_FOLDER = Path(__file__).resolve().parents[1]

# Rooms that move files and processes about and never change a number: an edit to them makes nothing again.
MACHINERY = (f"{PACKAGE}.runner", f"{PACKAGE}.publishing", f"{PACKAGE}.cli", f"{PACKAGE}.__main__")

# Names through which code can reach what a reading of its names cannot see.
OPAQUE = frozenset({"globals", "vars", "eval", "exec", "__import__"})
LAZY = "_HOME"  # a package's table of names that it imports on first use: name -> module below the package

Target = tuple[str, str | None]  # a module, and a name in it; None: all of the module


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


def name_of(function: Callable) -> str:
    """ "module:name" of a function at the top of a module."""
    return f"{function.__module__}:{function.__qualname__}"


@cache
def source_digest(function: str) -> str:
    """Hash of the code that a function ("module:name") can reach; nothing for one of the machinery.

    Definitions are followed by name, also through imports inside functions; a class counts whole, a module that is used
    otherwise than by `module.name` counts whole, and so does one that names come out of in ways that no reading sees
    (OPAQUE). What a module does at import without binding a name counts wherever the module is reached, and so
    do its packages. Held for the life of the process, like loaded code.

    Raises:
        ModuleNotFoundError, AttributeError: there is no such function.
    """
    module, _, name = function.partition(":")
    if _is_machinery(module):
        return digest({})
    if name not in _read(module).definitions:
        raise AttributeError(f"module {module} has no function {name!r}")
    return _digest_of([(module, name)])


def cells_digest(cells: Iterable[str]) -> str:
    """Hash of the package's code that a notebook's code cells can reach; Python that cannot be parsed raises SyntaxError."""
    scope = _scope_of(_parse("\n".join(cells)), "", "")
    return _digest_of(target for part in scope.body for target in _uses(part, scope))


def _digest_of(targets: Iterable[Target]) -> str:
    """Hash of the statements that these targets need, and those what they name, and so on."""
    reached: dict[str, set[int]] = {}
    waiting, seen = list(targets), set[Target]()
    while waiting:
        target = waiting.pop()
        module, name = target
        if target in seen or _is_machinery(module) or not _is_ours(module):
            continue
        seen.add(target)
        scope = _read(module)
        if name in scope.definitions:
            found = [*scope.effects, *scope.definitions[name]]
        elif name in scope.imports:  # handed on from another module
            found = scope.effects
            waiting.append(scope.imports[name])
        else:
            found = list(range(len(scope.body)))
            waiting.extend(scope.imports.values())
        new = set(found) - reached.setdefault(module, set())
        reached[module] |= new
        for position in new:
            waiting.extend(_uses(scope.body[position], scope))
        parents = module.split(".")[:-1]
        for depth in range(2, len(parents) + 1):  # importing a module runs its packages
            parent = ".".join(parents[:depth])
            if _location(parent) and _read(parent).effects:
                waiting.append((parent, None))
    return digest({m: [canonical(_read(m).body[i]) for i in sorted(found)] for m, found in reached.items() if found})


@dataclass(frozen=True)
class _Scope:
    """A module as it is read: its statements, which of them define or import which name, and which bind none."""

    module: str
    body: list[ast.stmt]
    definitions: dict[str, list[int]]
    imports: dict[str, Target]
    effects: list[int]


def _is_machinery(module: str) -> bool:
    return any(module == room or module.startswith(f"{room}.") for room in MACHINERY)


def _is_ours(module: str) -> bool:
    """Whether the module is one of the package's, or (a stage of somebody's own) was asked for by name."""
    return module.split(".")[0] == PACKAGE or module in _asked


_asked: set[str] = set()


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
def _read(module: str) -> _Scope:
    path = _location(module)
    if path is None:
        raise ModuleNotFoundError(f"no source found for module {module!r}, which a stage's function names")
    _asked.add(module)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    return _scope_of(_parse(path.read_text(encoding="utf-8")), module, package)


def _scope_of(tree: ast.Module, module: str, package: str) -> _Scope:
    definitions: dict[str, list[int]] = {}
    imports: dict[str, Target] = {}
    effects = []
    for position, statement in enumerate(tree.body):
        imported = dict(_imported(statement, package))
        bound = _bound(statement) | set(imported)
        for name in bound - set(imported):
            definitions.setdefault(name, []).append(position)
        imports |= imported
        if not bound and not isinstance(statement, ast.Import | ast.ImportFrom):
            effects.append(position)
        if LAZY in bound and isinstance(statement, ast.Assign):
            homes = ast.literal_eval(statement.value)
            imports |= {name: (f"{package}.{home}", name) for name, home in homes.items()}
    return _Scope(module, tree.body, definitions, imports, effects)


def _imported(node: ast.AST, package: str) -> Iterator[tuple[str, Target]]:
    """Local names of the package's modules and definitions that an import binds."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.Import):
            for alias in inner.names:
                if alias.name.split(".")[0] == PACKAGE:
                    yield (alias.asname or PACKAGE), (alias.name if alias.asname else PACKAGE, None)
        elif isinstance(inner, ast.ImportFrom):
            base = inner.module or ""
            if inner.level:
                above = package.split(".")[: len(package.split(".")) - inner.level + 1]
                base = ".".join([*above, base] if base else above)
            if base.split(".")[0] != PACKAGE and base not in _asked:
                continue
            for alias in inner.names:
                whole = f"{base}.{alias.name}"
                target = (whole, None) if _location(whole) else (base, None if alias.name == "*" else alias.name)
                yield alias.asname or alias.name, target


def _bound(statement: ast.stmt) -> set[str]:
    """Names that a module's statement defines, imports apart."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {statement.name}
    names: set[str] = set()
    for node in ast.walk(statement):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            names.add(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names.update((alias.asname or alias.name).split(".")[0] for alias in node.names)
    return names


def _uses(statement: ast.stmt, scope: _Scope) -> Iterator[Target]:
    """What a statement names: definitions of its own module, and what its imports lead to."""
    if isinstance(statement, ast.Import | ast.ImportFrom):
        return
    package = scope.module if _is_package(scope.module) else scope.module.rpartition(".")[0]
    known = scope.imports | dict(_imported(statement, package))
    through: set[int] = set()  # what stands before a dot, by identity: `module.name` reaches no more than the name
    for node in ast.walk(statement):  # outer attributes come before inner ones
        if not isinstance(node, ast.Attribute) or id(node) in through:
            continue
        chain, inner = [node.attr], node.value
        links = [id(inner)]
        while isinstance(inner, ast.Attribute):
            chain, inner = [inner.attr, *chain], inner.value
            links.append(id(inner))
        if isinstance(inner, ast.Name) and known.get(inner.id, ("", ""))[1] is None:
            through.update(links)
            module = known[inner.id][0]
            while chain and _location(f"{module}.{chain[0]}"):
                module, chain = f"{module}.{chain[0]}", chain[1:]
            yield module, (chain[0] if chain else None)
    for node in ast.walk(statement):
        if isinstance(node, ast.Name) and id(node) not in through:
            if node.id in OPAQUE and scope.module:
                yield scope.module, None
            elif node.id in known:
                yield known[node.id]
            elif scope.module and node.id in scope.definitions:
                yield scope.module, node.id


def _is_package(module: str) -> bool:
    path = _location(module) if module else None
    return path is not None and path.name == "__init__.py"


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


class _Tidy(ast.NodeTransformer):
    """Drops bare strings (docstrings among them) and blocks that only a type checker reads."""

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        bare = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if bare else self.generic_visit(node)

    def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt] | None:
        if "TYPE_CHECKING" not in ast.dump(node.test):
            return self.generic_visit(node)
        return [kept for statement in node.orelse if (kept := self.visit(statement)) is not None]


def _parse(source: str) -> ast.Module:
    """The tree of a module's source, without docstrings and type-checking blocks."""
    tree = _Tidy().visit(ast.parse(source))
    assert isinstance(tree, ast.Module)
    return tree
