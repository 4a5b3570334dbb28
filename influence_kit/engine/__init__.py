"""EK-FAC and scoring: needs torch, numpy, scipy, safetensors and threadpoolctl alone, and can be copied out under any name.

Names are resolved on first use, so that importing the package costs nothing.
"""

import importlib

_HOME = {
    "fit_ekfac": "fitting",
    "Factors": "factors",
    "score": "scans",
    "top_scores": "scans",
    "TopScores": "scores",
    "token_scores": "scans",
    "Scores": "scores",
    "build_index": "index",
    "Index": "index",
    "tracked_layers": "layers",
}
__all__ = [*sorted(_HOME)]


def __getattr__(name: str):
    if name in _HOME:
        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
