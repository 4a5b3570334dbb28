"""What stages do, one module a kind, so that a change to one leaves the others' results valid.

Each function takes (parameters, inputs, out, progress). They need only torch, transformers, numpy, safetensors, pyarrow and
tokenizers, so that a machine without notebooks can run them.
"""


def tuples(parameters: dict) -> dict:
    """Parameters as dataclasses take them: JSON's lists become tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in parameters.items()}
