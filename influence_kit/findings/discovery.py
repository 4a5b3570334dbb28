"""Which chapters there are, what each reads, and what is looked at before any of it is made."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

from influence_kit.errors import UserError
from influence_kit.findings.profiles import Profile
from influence_kit.runner.machine import gpus, repository
from influence_kit.runner.stages import Stage

# Sources that are downloaded, and the files that do instead; `dialogue` takes a source and a folder as `text` does.
FETCHED = {"libreoffice": "libreoffice-help-<language>_*.deb", "wesnoth": "wesnoth-<series>-<campaign>_*.deb"}


def chapter_names() -> list[str]:
    """Stems of the notebooks, in order; where the package was installed without them, the findings' names."""
    root = repository()
    found = sorted(path.stem for path in (root / "notebooks").glob("[0-9][0-9]_*.ipynb")) if root else []
    if found:
        return found
    modules = pkgutil.iter_modules(importlib.import_module("influence_kit.findings").__path__)
    return sorted(module.name for module in modules if hasattr(finding(module.name), "reads"))


def finding(chapter: str) -> ModuleType:
    """The module of a chapter: `findings/word_order.py` for `07_word_order`. Raises UserError where there is none."""
    name = f"influence_kit.findings.{re.sub(r'^[0-9]+_', '', chapter)}"
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise

        place = name.replace(".", "/")
        raise UserError(
            f"notebooks/{chapter}.ipynb has no module {place}.py that says what it reads: add one"
        ) from error


def chapters_for(profile: Profile) -> list[str]:
    """The chapters for which a profile has the section that they begin with: SECTION of their module, `atlas` by default."""
    return [name for name in chapter_names() if getattr(profile, getattr(finding(name), "SECTION", "atlas"), None)]


def stages_for(profile: Profile, chapter: str, given: Mapping[str, object] | None = None) -> list[Stage]:
    """All stages a chapter reads, inputs before what is made of them, each once.

    Args:
        profile: That the run computes.
        chapter: Its stem.
        given: Parameters of its notebook; `reads` gets those that it takes by name, so that they may decide what is made.
    """
    reads = finding(chapter).reads
    taken = {name: value for name, value in (given or {}).items() if name in inspect.signature(reads).parameters}
    unique = {stage.fingerprint: stage for planned in reads(profile, **taken) for stage in planned.stages}
    return list(unique.values())


def text_is_in_reach(todo: Sequence[Stage]) -> None:
    """Before any work: raise UserError when real text has to be fetched and cannot be."""
    for stage in todo:
        if stage.kind != "text":
            continue
        if stage.parameters["folder"] and not Path(stage.parameters["folder"]).exists():
            raise UserError(
                f"text folder {stage.parameters['folder']} does not exist: mend the profile or pass --without-real-text"
            )
        if stage.parameters["source"] in FETCHED:
            from influence_kit.packages import available

            if problem := available():
                raise UserError(
                    f"real text cannot be fetched: {problem}; run on Debian or Ubuntu (or in a container of one), put the "
                    f"{FETCHED[stage.parameters['source']]} files into a folder and name it in a profile of your own "
                    "(text: {source: debs, folder: …}), or pass --without-real-text"
                )


def device_is_there(todo: Sequence[Stage]) -> None:
    """Before any work: raise UserError when stages want a GPU that is not here."""
    wanted = {stage.parameters.get("device", "cpu") for stage in todo} - {"cpu"}
    if wanted and (missing := sorted(wanted - set(here := gpus()))):
        raise UserError(
            f"this profile computes on {', '.join(missing)} and torch finds {', '.join(here[1:]) or 'no GPU'}: change its `device`, or use "
            "--profile laptop"
        )


CHECKS = (text_is_in_reach, device_is_there)
