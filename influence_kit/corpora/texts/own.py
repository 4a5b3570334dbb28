"""A reader's own model and texts: what is there, whether it can be read, and the texts as sequences of the model's tokens."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from influence_kit.corpora.texts.folder import local_text
from influence_kit.errors import UserError, first_line
from influence_kit.files import working_folder

AT_ONCE = 20_000  # characters given to a tokenizer: of some the time grows with the square
PACKED = ("U8", "I8", "U16", "I16", "U32", "I32", "F8_E4M3", "F8_E5M2", "F4")  # of safetensors: not weights as such
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def own_text(texts: str) -> pa.Table:
    """A user's texts as `local_text` gives them, from where the user stands.

    Raises:
        UserError: As `local_text`, and where nothing is there, with what is near.
    """
    if not texts.strip():
        raise UserError("texts is empty: give a .txt, .jsonl or .parquet file, or a folder of them")
    place = working_folder() / Path(texts).expanduser()
    if not place.exists():
        raise UserError(
            f"texts={texts!r}: {place} does not exist{_near(place)}: give a .txt, .jsonl or .parquet file, or a folder of them"
        )
    return local_text(place)


def in_pieces(
    tokenizer: Any, texts: Sequence[str], length: int, opening: int | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Whole texts as sequences of at most `length` tokens: a longer one as several of equal length, one after the other.

    Args:
        tokenizer: Of transformers; it needs no padding token.
        texts: N of them.
        length: T, the opening among them.
        opening: Token that each sequence begins with, None for none.

    Returns:
        input_ids int32 [M, T], padded on the right with 0, loss_mask bool [M, T], True at all tokens of the text that are predicted
        from another, and the text of each, int [M]. What leaves nothing to predict is left out.

    Raises:
        UserError: `length` < 2.
    """
    if length < 2:
        raise UserError(f"length is {length}; it must be at least 2, as a first token is never a target")
    before = [] if opening is None else [opening]
    pieces: list[tuple[int, list[int]]] = []
    for number, text in enumerate(texts):
        blocks = list(_blocks(text))
        found = tokenizer(blocks, add_special_tokens=False, verbose=False)["input_ids"] if blocks else []
        ids = [token for block in found for token in block]
        parts = np.array_split(np.array(ids, np.int32), max(1, math.ceil(len(ids) / (length - len(before)))))
        pieces += [(number, [*before, *part.tolist()]) for part in parts if len(before) + len(part) > 1]
    input_ids, loss_mask = np.zeros((len(pieces), length), np.int32), np.zeros((len(pieces), length), bool)
    for row, (_, ids) in enumerate(pieces):
        input_ids[row, : len(ids)], loss_mask[row, 1 : len(ids)] = ids, True
    return input_ids, loss_mask, np.array([number for number, _ in pieces], int)


def _blocks(text: str) -> Iterator[str]:
    """A text cut after white space, or in the middle of what has none, so that no block is longer than AT_ONCE."""
    start = 0
    while start < len(text):
        end = start + AT_ONCE
        if end < len(text) and (last := max(text.rfind(" ", start, end), text.rfind("\n", start, end))) > start:
            end = last
        yield text[start:end]
        start = end


def check_model(source: str) -> tuple[Any, Any]:
    """The configuration and tokenizer of a folder or a hub's model, whose weights are looked at and not read.

    Raises:
        UserError: One of them cannot be loaded; weights that are missing, cut, or packed in a few bits each.
    """
    config = _configuration(source)
    tokenizer = own_tokenizer(source)
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise UserError(
            f"{source} has a tokenizer without a fast form: save one with a tokenizer.json beside its weights"
        )
    _check_weights(source)
    packed = getattr(config, "quantization_config", None)
    tensor = _packed(Path(source))
    if packed or tensor:
        how = f"quantization_config in config.json: {_method(packed)}" if packed else tensor
        raise UserError(
            f"model {source!r} has packed weights ({how}): their gradients cannot be had; save it unpacked "
            "(model.dequantize(), then save_pretrained), or give its GGUF file, which is unpacked here"
        )
    return config, tokenizer


def _method(packed: Any) -> str:
    """What a configuration says of how weights are packed."""
    about = packed if isinstance(packed, dict) else vars(packed)
    named = [str(about[name]) for name in ("quant_method", "bits") if about.get(name)]
    return ", ".join([*named, *(name for name in ("load_in_4bit", "load_in_8bit") if about.get(name))]) or "given"


def _packed(folder: Path) -> str:
    """The first tensor of a folder's weights whose numbers are none or hold several, with its type; "" where there is none."""
    from safetensors import safe_open

    for file in sorted(folder.glob("*.safetensors")) if folder.is_dir() else ():
        with safe_open(str(file), "numpy") as opened:
            for name in opened.keys():
                part = opened.get_slice(name)
                if part.get_dtype() in PACKED and len(part.get_shape()) > 1:
                    return f"{name} is {part.get_dtype()}"
    return ""


def model_source(model: str) -> str:
    """The folder that `model` names, from where the user stands, else the hub name.

    Raises:
        UserError: It can be neither; or it is meant as a folder (beside one, or named much like one) that is not there.
    """
    folder = working_folder() / Path(model).expanduser()
    if folder.is_dir():
        return str(folder)
    near = _near(folder)
    beside = "/" in model and folder.parent.is_dir()
    if folder.exists() or near or beside or not HUB_NAME.fullmatch(model):
        what = "is a file" if folder.exists() else "does not exist"
        raise UserError(
            f"model={model!r}: {folder} {what}{near}: give a folder with config.json, model.safetensors and tokenizer.json, or "
            "a hub name"
        )
    return model


def _near(path: Path) -> str:
    """A hint at what a mistyped path may have meant: a name much like its own beside it, or like its folder's beside that."""
    for wrong in (path, path.parent):
        beside = [each.name for each in wrong.parent.iterdir()] if wrong.parent.is_dir() else []
        if not wrong.exists() and (close := difflib.get_close_matches(wrong.name, beside, 1, 0.8)):
            return f" (there is {wrong.parent / close[0]})"
    return ""


def own_tokenizer(source: str) -> Any:
    """The tokenizer kept beside a model; UserError when there is none."""
    import transformers

    remedy = "save the model's tokenizer beside its weights (tokenizer.save_pretrained)"
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # tokenizers raises bare ones for a file that it cannot read
        raise UserError(f"{source} has no tokenizer that can be loaded ({first_line(error)}): {remedy}") from error
    # Without its files some tokenizers of transformers load all the same, with an empty vocabulary.
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise UserError(f"{source} has no tokenizer: only {len(tokenizer)} special tokens were found; {remedy}")
    return tokenizer


def _configuration(source: str) -> Any:
    import transformers

    if not Path(source).is_dir():
        _ask_the_hub(source)
    try:
        config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # of many kinds, for a value that a configuration cannot have
        raise UserError(
            f"model {source!r} has no configuration that can be loaded ({first_line(error)}): give a local folder with "
            "config.json, or a hub name on a machine with internet"
        ) from error
    return config.get_text_config()


def _check_weights(source: str) -> None:
    """Raise UserError where a folder's weights are missing or cut, by what their first bytes say of the rest."""
    from safetensors import SafetensorError, safe_open

    folder = Path(source)
    if not folder.is_dir():
        return
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{source} has no weights: no .safetensors file; save them by save_pretrained")
    for file in files:
        try:
            with safe_open(str(file), "numpy") as opened:
                opened.keys()
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{file} is cut or damaged ({first_line(error)}): save or copy it again") from error


def _ask_the_hub(name: str) -> None:
    """Raise UserError at once where loading would try for half a minute: a name that is no folder, not kept here, and not on the hub."""
    import huggingface_hub

    if isinstance(huggingface_hub.try_to_load_from_cache(name, "config.json"), str):
        return
    try:
        huggingface_hub.HfApi().model_info(name, timeout=3)
    except Exception as error:  # no common base: of the network, of the hub's answer, of its settings
        raise UserError(
            f"model={name!r}: {working_folder() / name} does not exist, and as a hub name it was not to be had "
            f"({first_line(error)}): give the path of a folder, or a hub name on a machine with internet"
        ) from error
