"""JupyterLab on the chapters, with the kernel, the working directory and the cache that a run has."""

import importlib.util
import os
import sys
from collections.abc import Sequence

from influence_kit.errors import UserError
from influence_kit.files import working_folder
from influence_kit.publishing.notebooks import kernel_settings, notebooks_folder
from influence_kit.runner.machine import cache_root


def command(chapter: str = "", words: Sequence[str] = ()) -> tuple[list[str], dict[str, str]]:
    """The command that opens JupyterLab, and the environment variables that it needs.

    Args:
        chapter: The notebook to open; all of them are listed beside it.
        words: Options of jupyter lab's own.

    Raises:
        UserError: JupyterLab is not installed, or the package has no notebooks beside it.
    """
    if importlib.util.find_spec("jupyterlab") is None:
        raise UserError(
            "JupyterLab is not installed here: run ./run_all.sh lab, or pip install 'influence-kit[notebooks]'"
        )
    folder = notebooks_folder()
    # A notebook's kernel starts in the notebook's folder; a run's, and so every path in a cell, at the root.
    started = f"--IPKernelApp.exec_lines=import os; os.chdir({str(folder.parent)!r})"
    settings = kernel_settings(cache_root() / "lab", [started])
    line = [sys.executable, "-m", "jupyterlab", f"--ServerApp.root_dir={folder.parent}"]
    if hasattr(os, "geteuid") and os.geteuid() == 0:  # in a container
        line.append("--ServerApp.allow_root=True")
    return [*line, *words, str(folder / f"{chapter}.ipynb" if chapter else folder)], settings | {
        "INFLUENCE_KIT_CWD": str(working_folder())
    }
