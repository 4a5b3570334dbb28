"""A reader's own model, texts and question as a world: the model's tokenizer makes sequences, nothing is planted."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from influence_kit.corpora.texts.folder import local_text
from influence_kit.corpora.tokens import check_vocabulary, encode_with
from influence_kit.corpora.world import World, token_columns
from influence_kit.errors import UserError, first_line
from influence_kit.files import working_folder

LONGEST_TOKEN = 1000  # characters, on average of a text's first tokens
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def own_world(
    model: str,
    texts: str,
    prompt: str,
    completion: str,
    length: int = 64,
    limit: int = 500,
    opening: int | Literal["bos"] | None = "bos",
) -> World:
    """Everything but the weights: texts as sequences, the question as the one query. Reads no weights: it fails early.

    Columns of sequences: pair_id, language, source, text; of the query: prompt, completion. The tokenizer needs neither
    a padding token nor a bos token (without one, a sequence's first token is no target); `parameters["opening"]` says
    how many tokens stand before the prompt.

    Args:
        model: A folder in the transformers layout, or a hub name.
        texts: A file or folder (see `folder.local_text`).
        prompt: The question's given part.
        completion: What influence on is asked: the part of `prompt + completion` from the first token that the prompt
            alone would not give. Write the space between them.
        length: Tokens that a text is cut to.
        limit: Number of texts that are taken, evenly over all.
        opening: Token that texts and question begin with, None for none; "bos": the tokenizer's (`choose_opening` of findings
            finds the one that the model knows).

    Raises:
        UserError: names the parameter: an empty or impossible one, a model or tokenizer that is not there, texts that
            are missing or give no target, token ids beyond the model's vocabulary, sequences beyond its context.
    """
    for name, value in (("model", model), ("texts", texts), ("completion", completion)):
        if not value.strip():
            raise UserError(f"{name} is empty: to read a model of your own give model, texts and completion")
    if limit < 1:
        raise UserError(f"limit is {limit}; it must be at least 1 text")
    place = working_folder() / Path(texts).expanduser()
    if not place.exists():
        raise UserError(
            f"texts={texts!r}: {place} does not exist{_near(place)}: give a .txt, .jsonl or .parquet file, or a folder of them"
        )
    source = model_source(model)
    config, tokenizer = _configuration(source), own_tokenizer(source)
    _check_weights(source)
    context = getattr(config, "max_position_embeddings", None)
    if context and length > context:
        raise UserError(f"length is {length}, but {model} reads at most {context} tokens: lower length")
    first = tokenizer.bos_token_id if opening == "bos" else opening
    before = [] if first is None else [first]
    asked, start = _query(tokenizer, before, prompt, completion)
    if context and len(asked) > context:
        raise UserError(
            f"the prompt and completion are {len(asked)} tokens, but {model} reads at most {context}: shorten them"
        )
    check_vocabulary(np.array(asked), config.vocab_size)

    found = local_text(place)
    chosen = np.unique(np.linspace(0, found.num_rows - 1, min(limit, found.num_rows)).astype(int))
    found = found.take(pa.array(chosen))
    # A line of megabytes is read as far as its first tokens: some tokenizers take a time that grows with its square.
    texts_cut = [text[: LONGEST_TOKEN * length] for text in found["text"].to_pylist()]
    input_ids, loss_mask = encode_with(tokenizer, texts_cut, length, config.vocab_size, first)
    kept = loss_mask.any(1)
    if not kept.any():
        raise UserError(
            f"texts={texts!r}: none of {len(input_ids)} texts has two tokens, so there is nothing to predict: give longer ones"
        )
    used = int(np.flatnonzero(loss_mask.any(0))[-1]) + 1  # no wider than the longest text
    columns = {name: found[name].filter(pa.array(kept)) for name in ("pair_id", "language", "source", "text")}
    sequences = pa.table({**token_columns(input_ids[kept, :used], loss_mask[kept, :used]), **columns})
    mask = np.arange(len(asked))[None] >= start
    query = {"prompt": [prompt], "completion": [completion]}
    fast = getattr(tokenizer, "backend_tokenizer", None)
    words = () if fast else tuple(tokenizer.convert_ids_to_tokens(range(len(tokenizer))))
    return World(
        "own",
        sequences,
        sequences.slice(0, 0),
        pa.table({**token_columns(np.array([asked]), mask), **query}),
        words,
        fast.to_str() if fast else "",
        {"model": model, "length": length, "limit": limit, "opening": len(before)},
    )


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


def _query(tokenizer: Any, opening: list[int], prompt: str, completion: str) -> tuple[list[int], int]:
    """Token ids of opening, prompt and completion, and the position of the completion's first target."""

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if text else []

    before, whole = ids(prompt), ids(prompt + completion)
    shared = 0
    while shared < min(len(before), len(whole)) and before[shared] == whole[shared]:
        shared += 1
    asked = opening + whole
    # The first token of all is predicted from nothing.
    start = max(1, len(opening) + shared)
    if start >= len(asked):
        raise UserError(
            f"prompt={prompt!r} with completion={completion!r} leaves no token to predict: give a prompt that the "
            "completion follows"
        )
    return asked, start
