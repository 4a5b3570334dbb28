"""influence_kit: EK-FAC influence functions for causal language models, and the findings they support.

    factors = influence_kit.fit_ekfac(model, sequences)
    scores = influence_kit.score(model, factors, queries, sequences)

    card = influence_kit.ask("path/to/model", prompt, completion, texts="my_texts/")

What the engine offers, one call from a model to a card, and errors. Names are resolved on first use, so that importing the package costs nothing.
"""

from influence_kit import engine
from influence_kit.errors import UserError

__version__ = "0.1.0"
__all__ = [*engine.__all__, "UserError", "__version__", "ask"]


def __getattr__(name: str):
    if name in engine.__all__:
        return getattr(engine, name)
    if name == "ask":
        from influence_kit.findings.asking import ask

        return ask
    raise AttributeError(f"module 'influence_kit' has no attribute {name!r}; it has {', '.join(__all__)}")
