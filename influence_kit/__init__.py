"""influence_kit: EK-FAC influence functions for causal language models, and the findings they support.

    factors = influence_kit.fit_ekfac(model, sequences)
    scores = influence_kit.score(model, factors, queries, sequences)

Names are resolved on first use, so that importing the package costs nothing.
"""

import importlib

__version__ = "0.1.0"
_HOME = {
    "fit_ekfac": "engine.fitting",
    "Factors": "engine.factors",
    "score": "engine.scans",
    "top_scores": "engine.scans",
    "TopScores": "engine.scores",
    "token_scores": "engine.scans",
    "Scores": "engine.scores",
    "build_index": "engine.index",
    "Index": "engine.index",
    "tracked_layers": "engine.layers",
    "UserError": "errors",
}
__all__ = [*sorted(_HOME), "__version__"]


def __getattr__(name: str):
    if name in _HOME:
        return getattr(importlib.import_module(f"influence_kit.{_HOME[name]}"), name)
    raise AttributeError(f"module 'influence_kit' has no attribute {name!r}; it has {', '.join(__all__)}")
