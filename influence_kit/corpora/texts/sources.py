"""Where aligned text may come from, by the name that a profile gives."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from influence_kit.corpora.texts.folder import local_text
from influence_kit.corpora.texts.libreoffice import libreoffice_help
from influence_kit.errors import UserError

SOURCES = ("libreoffice", "debs", "folder")


def read_text(source: str, languages: Sequence[str], folder: Path) -> pa.Table:
    """Text from one of SOURCES.

    Args:
        source: "libreoffice", downloaded into the folder; "debs", the help's `.deb` files that lie there; "folder", a
            reader's own files.
        languages: Those of the help to take.
        folder: As the source says.

    Returns:
        Columns pair_id, language, text, source.

    Raises:
        UserError: an unknown source, and as `libreoffice_help` and `local_text`.
    """
    if source not in SOURCES:
        raise UserError(f"unknown text source {source!r}; choose one of {', '.join(SOURCES)}")
    if source == "folder":
        return local_text(Path(folder))
    return libreoffice_help(languages, Path(folder), download=source == "libreoffice")
