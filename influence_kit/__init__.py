"""influence_kit: EK-FAC influence functions for causal language models, and the findings they support.

    factors = influence_kit.fit_ekfac(model, sequences)
    scores = influence_kit.score(model, factors, queries, sequences)

What the engine offers, and its errors. Names are resolved on first use, so that importing the package costs nothing.
"""

from influence_kit import engine
from influence_kit.errors import UserError

__version__ = "0.1.0"
__all__ = [*engine.__all__, "UserError", "__version__"]


def __getattr__(name: str):
    if name in engine.__all__:
        return getattr(engine, name)
    raise AttributeError(f"module 'influence_kit' has no attribute {name!r}; it has {', '.join(__all__)}")
