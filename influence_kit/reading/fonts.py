"""Fonts for scripts that matplotlib's own font lacks: found by path, since a family name says nothing of coverage."""

from __future__ import annotations

import functools
import os
import unicodedata
import warnings
from collections.abc import Iterator
from pathlib import Path

from influence_kit.files import write_whole

BASE = "DejaVu Sans"  # ships inside matplotlib: same glyphs on every machine
PROBES = {"Chinese": "中文", "Korean": "한국", "Japanese": "かナ"}
PACKAGE = "fonts-wqy-microhei"  # 1.6 MB; one face with every Hangul syllable, 20,932 Han characters and kana
VARIABLE = "INFLUENCE_KIT_FONT"


def coverage(path: str | Path) -> frozenset[int]:
    """Code points of a font file's first face (the one matplotlib loads); empty where the file is no readable font."""
    from matplotlib.ft2font import FT2Font

    try:
        return frozenset(FT2Font(path).get_charmap())
    except Exception:  # a broken font on the system is not this project's affair
        return frozenset()


def _cache() -> Path:
    checkout = Path(__file__).parents[2]
    default = checkout / ".cache" if (checkout / ".git").exists() else Path.home() / ".cache"
    return Path(os.environ.get("INFLUENCE_KIT_CACHE") or default / "influence_kit") / "fonts"


def _system() -> list[str]:
    from matplotlib.font_manager import findSystemFonts

    hints = ("cjk", "wqy", "fallback", "nanum", "hei", "gothic", "unicode", "unifont")
    return sorted(findSystemFonts(), key=lambda path: (not any(h in path.lower() for h in hints), path))


def _packaged() -> list[str]:
    """The face out of a Debian package, kept in the cache, so that the archive is asked only once."""
    folder = _cache()
    if not (kept := sorted(folder.glob("*.tt[cf]"))):
        from influence_kit.packages import fetch, members

        for name, data in members(fetch([PACKAGE], folder)[0], (".ttc", ".ttf")):
            kept.append(folder / Path(name).name)
            write_whole(kept[-1], data)
    return [str(path) for path in kept]


def _candidates(problems: list[str]) -> Iterator[str]:
    if named := os.environ.get(VARIABLE):
        if not coverage(named):
            problems.append(f"{VARIABLE}={named!r} is not a readable font file")
        yield named
    yield from _system()
    try:
        yield from _packaged()
    except Exception as error:  # no network, no apt, no such package: a figure must still be drawn
        problems.append(f"the Debian package {PACKAGE} could not be fetched ({type(error).__name__}: {error})")


@functools.cache
def fallbacks() -> tuple[str, ...]:
    """Paths of fonts that together cover Chinese, Korean and Japanese, as few as are found first.

    Looked for in this order: the file that INFLUENCE_KIT_FONT names, system fonts, a Debian package's. What stays
    uncovered is said once, in a warning that names the remedy; nothing is raised, for a figure must still be drawn.
    """
    problems: list[str] = []
    missing, found = dict(PROBES), []
    for path in _candidates(problems):
        points = coverage(path)
        if covered := [script for script, probe in missing.items() if all(ord(c) in points for c in probe)]:
            found.append(path)
            missing = {script: probe for script, probe in missing.items() if script not in covered}
        if not missing:
            break
    if missing:
        problems.insert(0, f"no font covers {', '.join(missing)}: such characters show as boxes in PNG and SVG")
        problems.append(f"set {VARIABLE} to a font file that covers them, or install {PACKAGE}")
    if problems:
        warnings.warn("; ".join(problems), stacklevel=2)
    return tuple(found)


@functools.cache
def _base_coverage() -> frozenset[int]:
    from matplotlib.font_manager import findfont

    return coverage(findfont(BASE))


def families(text: str) -> list[str]:
    """Font families to draw `text` with; others than the base are looked for only where wide characters need them."""
    if not any(unicodedata.east_asian_width(c) in "WF" and ord(c) not in _base_coverage() for c in text):
        return [BASE]
    from matplotlib.font_manager import FontProperties, fontManager

    names = []
    for path in fallbacks():
        name = FontProperties(fname=path).get_name()
        if not any(Path(entry.fname) == Path(path) for entry in fontManager.ttflist):
            fontManager.addfont(path)
        names.append(name)
    return [BASE, *names]
