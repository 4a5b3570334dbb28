"""A chapter is a notebook; executing one is a stage: its figures, claims and executed copy come from the cache or are made.

While it runs, INFLUENCE_KIT_FIGURES names the folder that it writes `<name>.{png,svg,parquet,csv}` and
`claims/<chapter>.json` into. Nothing here imports papermill or nbformat before a chapter is at hand.
"""

import ast
import errno
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from reprlib import repr as short

from influence_kit.errors import UserError, first_line
from influence_kit.files import sha256, working_folder, write_whole
from influence_kit.findings.fixed import fixed_claims
from influence_kit.findings.profiles import LARGEST
from influence_kit.runner.fingerprint import cells_digest
from influence_kit.runner.machine import cache_root, repository
from influence_kit.runner.stages import Progress, Stage

# Raise it when the executed copies should come out otherwise: the machinery's source is no part of a fingerprint.
FORMAT = 1
LIBRARIES = (
    "ipykernel", "matplotlib", "nbclient", "numpy", "pandas", "papermill", "powerlaw", "pyarrow", "scikit-learn",
    "scipy", "seaborn", "tokenizers", "torch", "transformers",
)  # fmt: skip
# What a run says for all chapters at once, and plans by.
OPTIONS = {"profile": "--profile", "seeds": "--seeds", "real_text": "--without-real-text"}
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
TYPES = {"int": (int,), "float": (int, float), "str": (str,), "bool": (bool,), "list": (list,), "tuple": (list,),
         "dict": (dict,), "None": (type(None),)}  # fmt: skip


def notebooks_folder() -> Path:
    """The checkout's `notebooks/`. Raises UserError where the package was installed without its notebooks."""
    folder = repository()
    if folder is None or not (folder / "notebooks").is_dir():
        raise UserError(
            "no notebooks/ beside the package: clone the repository and run ./run_all.sh there "
            "(`python -m influence_kit stages` works without them)"
        )
    return folder / "notebooks"


def _nbformat():
    """nbformat, without two seconds of grammars: jsonschema would compile those of internationalised addresses. To be called
    before papermill is imported, which imports jsonschema too."""
    sys.modules.setdefault("rfc3987_syntax", None)
    import nbformat

    return nbformat


def read_cells(path: Path) -> list[list]:
    """A notebook's cells as [type, source, tags], without outputs. Raises UserError if it is no notebook."""
    nbformat = _nbformat()
    try:
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
    except FileNotFoundError as error:
        raise UserError(f"there is no notebook {path}: bring it back (git checkout), or choose another") from error
    except Exception as error:  # of many kinds, for a file that is cut or holds something else
        raise UserError(
            f"{path} is not a notebook that nbformat can read ({first_line(error)}): bring it back (git checkout)"
        ) from error
    return [[cell.cell_type, cell.source, list(cell.metadata.get("tags", []))] for cell in notebook.cells]


def known_parameters(path: Path) -> dict[str, dict]:
    """The parameters that a notebook's `parameters` cell declares: name -> inferred_type_name, default, help."""
    read_cells(path)
    import papermill

    return papermill.inspect_notebook(str(path))


def chosen_parameters(paths: Iterable[Path], given: Mapping[str, str], always: Mapping[str, object]) -> dict[str, dict]:
    """Parameters for each chapter: what it knows of what is given, and is not its default.

    Args:
        paths: Of the chapters.
        given: As typed at the command line.
        always: With their values.

    Returns:
        By stem: name -> value.

    Raises:
        UserError: Before any work, a name that none of the chapters knows or a value that is not of its type; what an option
            of the command line says for all chapters at once.
    """
    known = {path.stem: known_parameters(path) for path in paths}
    for name in given:
        if name in OPTIONS:
            raise UserError(f"-p {name}=… would change the chapter and not what is made for it: use {OPTIONS[name]}")
        if not any(name in parameters for parameters in known.values()):
            listed = "; ".join(f"{chapter}: {', '.join(parameters) or 'none'}" for chapter, parameters in known.items())
            raise UserError(f"unknown parameter {name!r}; known are {listed}")
    chosen = {}
    for chapter, parameters in known.items():
        values = {name: value for name, value in always.items() if name in parameters}
        typed = {name: _value(chapter, parameters[name], text) for name, text in given.items() if name in parameters}
        defaults = {name: _literal(parameters[name]["default"]) for name in typed}
        chosen[chapter] = values | {name: value for name, value in typed.items() if value != defaults[name]}
    return chosen


def _literal(text: str) -> object:
    """Typed text as the value that it writes, where JSON can hold that; else the text itself."""
    try:
        value = ast.literal_eval({"true": "True", "false": "False", "null": "None"}.get(text, text))
        return json.loads(json.dumps(value, allow_nan=False))
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return text


def _value(chapter: str, parameter: Mapping[str, str], text: str) -> object:
    """Typed text as a value of the parameter's declared type, or of its default's type where none is declared."""
    declared = parameter["inferred_type_name"]
    if declared == "None":
        default = _literal(parameter["default"])
        declared = "" if default is None or default == parameter["default"] else type(default).__name__
    heads = [part.split("[")[0].strip() for part in declared.split("|")]
    if not all(head in TYPES for head in heads):
        return _literal(text)
    value = _literal(text)
    for head in heads:
        if isinstance(value, TYPES[head]) and (head == "bool") == isinstance(value, bool):
            _check_range(chapter, parameter, value)
            return float(value) if head == "float" and isinstance(value, int) else value
    if "str" in heads:
        return text
    raise UserError(
        f"parameter {parameter['name']} of {chapter} takes {declared} (default {parameter['default']}), not {text!r}"
    )


def _check_range(chapter: str, parameter: Mapping[str, str], value: object) -> None:
    """Raise UserError for a number that is not of its default's kind: a share (.01), a measure (2.0), a count (5), or a place, for which
    0 or -1 stand for none."""
    default = _literal(parameter["default"])
    if not isinstance(value, int | float) or not isinstance(default, int | float) or isinstance(default, bool):
        return
    if isinstance(default, int):
        least = min(default, 1)
        sound, allowed = least <= value <= LARGEST, f"at least {least} and at most {LARGEST:g}"
    else:
        most = 1 if 0 < default < 1 else LARGEST
        sound, allowed = 0 < value <= most, f"above 0 and at most {most:g}"
    if not sound:
        raise UserError(
            f"parameter {parameter['name']} of {chapter} must be {allowed} (default {parameter['default']}), not {short(value)}"
        )


def chapter_stage(
    path: Path,
    given: Mapping[str, object],
    profile: Mapping,
    stages: Iterable[Stage],
    changed: Mapping[str, object] | None = None,
) -> Stage:
    """The stage that executes a notebook.

    It depends on the notebook's cells, the code that they can reach, its parameters (what files of the user's hold, not where
    they lie), the rules of its claims, the profile's content and the stages that the chapter reads.

    Args:
        path: The notebook.
        given: Its parameters, but for those at their default.
        profile: The profile's content.
        stages: What the chapter reads.
        changed: What its claims and figures say was changed of the plain run.
    """
    cells = read_cells(path)
    try:
        code = cells_digest(source for kind, source, _ in cells if kind == "code")
    except SyntaxError as error:
        raise UserError(
            f"{path}: its code cells are not plain Python ({error.msg}: {(error.text or '').strip()!r}): mend that cell"
        ) from error
    return Stage(
        kind="chapter",
        function=execute,
        parameters={
            "format": FORMAT,
            "chapter": path.stem,
            "cells": cells,
            "given": dict(given),
            "profile": dict(profile),
            "claims": [asdict(rule) for rule in fixed_claims().values() if rule.chapter == path.stem],
            "code": code,
            "changed": dict(changed or {}),
            "own": {name: _content(str(given[name])) for name in ("model", "texts") if given.get(name)},
        },
        inputs={stage.fingerprint[:16]: stage for stage in stages},
        label=path.stem,
        libraries=LIBRARIES,
    )


def _content(name: str) -> list[list[str]] | str:
    """Hashes of a file or folder of the user's own, [file, sha256] each; a name on the hub stands for itself."""
    place = working_folder() / Path(name).expanduser()
    if not place.exists():
        return name
    files = [place] if place.is_file() else sorted(path for path in place.rglob("*") if path.is_file())
    return [[path.relative_to(place.parent).as_posix(), sha256(path)] for path in files]


def execute(parameters: dict, inputs: Mapping[str, Path], out: Path, progress: Progress) -> None:
    """Execute a chapter with papermill; `out` gets what it writes and its normalised copy, notebooks/<chapter>.ipynb.

    Raises UserError where a cell did, MemoryError when the kernel died, RuntimeError with cell and error otherwise.
    """
    nbformat = _nbformat()
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    chapter = parameters["chapter"]
    failed = out.with_name(out.name.removesuffix(".part") + ".failed.ipynb")
    _empty(out)
    notebook = nbformat.v4.new_notebook(metadata={"kernelspec": KERNEL})
    for kind, source, tags in parameters["cells"]:
        cell = getattr(nbformat.v4, f"new_{kind}_cell")(source, metadata={"tags": tags})
        notebook.cells.append(cell)
    total = len(notebook.cells) + 1
    try:
        with _kernel(out, parameters["changed"]):
            executed = papermill.execute_notebook(
                notebook,
                str(failed),
                parameters=parameters["given"],
                kernel_name="python3",
                progress_bar=False,
                log_output=False,
                request_save_on_cell_execute=False,
                cwd=str(repository() or out),
                start_timeout=180,
                iopub_timeout=60,
                coalesce_streams=True,
                on_cell_start=lambda cell, cell_index, **_: progress(
                    cell_index, total, f"cell {cell_index + 1}/{total}"
                ),
            )
    except PapermillExecutionError as error:
        _empty(out)
        raise _cell_error(error, failed) from None
    except DeadKernelError as error:
        _empty(out)
        raise MemoryError("the chapter's kernel died, usually out of memory") from error
    failed.unlink(missing_ok=True)
    for note in normalise(executed):
        print(f"{chapter}: {note}", file=sys.stderr)
    copy = out / "notebooks" / f"{chapter}.ipynb"
    copy.parent.mkdir()
    copy.write_text(to_text(executed), encoding="utf-8")


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _cell_error(error, executed: Path) -> Exception:
    """What a failing cell means for the run: the user's to mend, memory, disk, or a fault with the place to look."""
    if error.ename == "UserError":
        return UserError(error.evalue)
    last = ([line for line in error.evalue.splitlines() if line.strip()] or [""])[-1]
    if error.ename in ("MemoryError", "OutOfMemoryError"):
        return MemoryError(last or "a cell ran out of memory")
    if "No space left on device" in error.evalue:
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    code = (line for line in error.source.splitlines() if line.strip() and not line.lstrip().startswith("#"))
    return RuntimeError(f"cell {error.exec_count} (`{next(code, '').strip()}`): {error.ename}: {last}; see {executed}")


def kernel_settings(folder: Path, options: Sequence[str] = ()) -> dict[str, str]:
    """Write into `folder` a kernel called "python3" that is this environment's Python, with the package and its cache; the
    environment variables that let Jupyter find it there before any other, and the package find the cache."""
    kernel = folder / "kernels" / "python3"
    kernel.mkdir(parents=True, exist_ok=True)
    launch = [sys.executable, "-Xfrozen_modules=off", "-m", "ipykernel_launcher", "-f", "{connection_file}", *options]
    write_whole(kernel / "kernel.json", json.dumps({"argv": launch, "display_name": "Python 3", "language": "python"}))
    package = Path(__file__).resolve().parents[2]
    return {
        "JUPYTER_PATH": str(folder),
        "INFLUENCE_KIT_CACHE": str(cache_root()),
        "PYTHONHASHSEED": "0",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(package), os.environ.get("PYTHONPATH", "")])),
    }


@contextmanager
def _kernel(out: Path, changed: Mapping[str, object]) -> Iterator[None]:
    """Make "python3" mean this environment's Python, with nobody's startup files, quiet, and told where and what it runs for.

    A kernel of that name in the user's folder may well belong to another environment. Output below Python's level is
    left alone, so that progress bars for the terminal stay out of the executed copy; the log level hides the warning
    that local sockets are not encrypted.
    """
    with tempfile.TemporaryDirectory(prefix="influence_kit_") as scratch:
        options = ["--log-level=ERROR", "--IPKernelApp.capture_fd_output=False", "--HistoryManager.enabled=False"]
        settings = kernel_settings(Path(scratch), options) | {
            "JUPYTER_RUNTIME_DIR": f"{scratch}/runtime",
            "IPYTHONDIR": f"{scratch}/ipython",
            "INFLUENCE_KIT_FIGURES": str(out),
            "INFLUENCE_KIT_CWD": str(working_folder()),  # the kernel stands at the root
            "INFLUENCE_KIT_CHANGED": json.dumps(changed),
            "INFLUENCE_KIT_QUIET": "1",
        }
        before = {name: os.environ.get(name) for name in settings}
        os.environ.update(settings)
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})


def normalise(notebook) -> list[str]:
    """Take out of an executed notebook what differs between equal runs; return a note for each thing a reader would miss.

    Times, papermill's and widgets' metadata go, cell ids count up, folders of this machine and addresses of objects in
    printed text get names.
    """
    notes = []
    notebook.metadata = {
        "kernelspec": dict(KERNEL),
        "language_info": {"name": "python"},
    }
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number:02d}"
        cell.metadata = {"tags": tags} if (tags := list(cell.metadata.get("tags", []))) else {}
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            for kind in [kind for kind in data if "jupyter.widget" in kind]:
                del data[kind]
                notes.append(f"cell {number} shows a widget, which no file can: use plain tqdm on sys.__stderr__")
            for kind, content in data.items():
                if kind.startswith("text/"):
                    data[kind] = _without_places(content)
            if "text" in output:
                output["text"] = _without_places(output["text"])
    return notes


def _without_places(text: str) -> str:
    # Inner folders first: the environment and the cache may lie in the checkout.
    places = [(cache_root(), "<cache>"), (sys.prefix, "<environment>"), (repository(), "."), (Path.home(), "~")]
    for place, name in places:
        # A home of "/" or "/root" inside longer words would spoil text that is no path.
        if place and len(str(place)) > 4:
            text = re.sub(re.escape(str(place)) + r"(?=[/\s'\")]|$)", name, text)
    return re.sub(r"(?<= at )0x[0-9a-f]{6,}", "0x…", text)


def answer(executed: Path) -> str:
    """What an executed chapter found, in its own words: the first paragraph of its outputs with something in bold, else (an open
    question has nothing in bold) the first of all; tables are none; "" where there is no other."""
    said = [
        paragraph
        for cell in json.loads(executed.read_text(encoding="utf-8"))["cells"]
        for output in cell.get("outputs", [])
        for paragraph in "".join(output.get("data", {}).get("text/markdown", "")).split("\n\n")
        if not paragraph.lstrip().startswith("|")
    ]
    found = next((paragraph for paragraph in said if "**" in paragraph), said[0] if said else "")
    return " ".join(found.replace("**", "").split())


def to_text(notebook) -> str:
    """A notebook as JSON, always the same for the same content."""
    nbformat = _nbformat()
    nbformat.validate(notebook)
    return nbformat.writes(notebook, version=4).rstrip("\n") + "\n"
