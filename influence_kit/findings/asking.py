"""A model and an index of texts, asked in one call: which texts make it say this?

card = ask("path/to/model", "The harbour lies", " north of the town.", texts="my_texts/")
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from influence_kit.corpora.texts.own import own_tokenizer
from influence_kit.corpora.world import World, batch_of
from influence_kit.errors import UserError
from influence_kit.files import working_folder
from influence_kit.findings.a_real_language_model import Planned, reads
from influence_kit.findings.own import check_own
from influence_kit.findings.profiles import load_profile
from influence_kit.findings.real_stages import context_of, encode, source_of, with_role
from influence_kit.measures.lexical import bm25, target_counts, token_counts
from influence_kit.runner.stages import Stage, ensure

if TYPE_CHECKING:
    from torch import nn

    from influence_kit.engine.index import Index
    from influence_kit.reading.cards import CardView

BATCH = 8  # sequences at a time: of a vocabulary of 50,000 more take gigabytes, and no less time
CANDIDATES = 3  # of an index, for each text that a card shows: these are scored exactly


def index_stage(planned: Planned) -> Stage:
    """The stage that indexes the real texts of a model that chapter 12 reads."""
    factors = planned.made["factors"]
    about = {name: factors.parameters[name] for name in ("source", "files") if name in factors.parameters}
    inputs = factors.inputs | {"factors": factors}
    return Stage("index", indexed, about, inputs, threads=2, label=f"index of {factors.label.partition(' of ')[2]}")


def indexed(parameters: dict, inputs: dict[str, Path], out: Path, progress) -> None:
    """An index of a world's real texts; beside it these, and in about.json where the model lies."""
    from dataclasses import replace

    from influence_kit.engine.factors import Factors
    from influence_kit.engine.index import build_index
    from influence_kit.models import load_pretrained

    folder, world = source_of(parameters, inputs), World.load(inputs["world"])
    pool = world.sequences.take(with_role(world.sequences, "pool"))
    factors = Factors.load(inputs["factors"] / "factors.safetensors")
    build_index(load_pretrained(folder), factors, batch_of(pool), out / "index", batch_size=BATCH, progress=progress)
    replace(world, sequences=pool).save(out / "world")
    place = os.path.relpath(folder, out) if "weights" in inputs else folder
    (out / "about.json").write_text(json.dumps({"model": place}) + "\n")


@dataclass(frozen=True)
class Opened:
    """An index, the texts that it is of, and the model with its tokenizer."""

    model: nn.Module
    tokenizer: Any
    world: World
    index: Index


@lru_cache(maxsize=2)
def opened(folder: Path) -> Opened:
    """What `indexed` wrote, read once a process."""
    from influence_kit.engine.index import Index
    from influence_kit.models import load_pretrained

    source = str((folder / json.loads((folder / "about.json").read_text())["model"]).resolve())
    index = Index.open(folder / "index", verify=False)  # a stage's files were looked at
    return Opened(load_pretrained(source), own_tokenizer(source), World.load(folder / "world"), index)


def ask(
    model_or_index: str | os.PathLike,
    prompt: str,
    completion: str,
    *,
    texts: str | os.PathLike = "",
    k: int = 5,
    title: str = "",
    profile: str = "real",
    **given: Any,
) -> CardView:
    """Which texts make a model say this: a card of those that raise its log-probability most and lower it most, shaded by token.

    Args:
        model_or_index: A model as chapter 12 takes it ("": the profile's own), whose texts are fitted and indexed once, in minutes; or
            the folder of an index that an earlier call made.
        prompt: What the model is given.
        completion: What it says then, with the space before it.
        texts: A .txt, .jsonl or .parquet file, or a folder of them; by default the chapter's.
        k: Texts shown at either end.
        title: Above the card.
        profile: Says how many texts are read, and how many EK-FAC is fitted on.
        given: sha256, terms and limit, as chapter 12 takes them.

    Raises:
        UserError: What cannot be read or tracked, in one line.
    """
    folder = working_folder() / Path(model_or_index).expanduser()
    if not (model_or_index and (folder / "about.json").is_file()):
        own = {"model": str(model_or_index), "texts": str(texts), **given}
        check_own(own)
        folder = ensure(index_stage(reads(load_profile(profile), **own)[0]))
    return card(opened(folder), prompt, completion, k, title)


def card(about: Opened, prompt: str, completion: str, k: int = 5, title: str = "") -> CardView:
    """The card of one question. Candidates are those of the index; their scores are exact.

    Raises:
        UserError: A completion of which nothing is left to predict, or more tokens than the model reads.
    """
    from torch import from_numpy

    from influence_kit.engine.scans import token_scores
    from influence_kit.reading.cards import Row, query_card
    from influence_kit.reading.words import token_texts

    world, opening = about.world, about.world.parameters["begins"]["token"]
    ids, mask = encode(about.tokenizer, [(prompt, completion)], None, opening)
    most = context_of(about.model.config)
    if len(ids[0]) > most or not mask.any():
        raise UserError(
            f"prompt={prompt!r} with completion={completion!r} is {len(ids[0])} tokens, of which the model reads {most}, or leaves "
            "nothing to predict: give others"
        )
    query = {"input_ids": from_numpy(ids), "loss_mask": from_numpy(mask)}
    total = world.sequences.num_rows
    found = about.index.query(about.model, query, min(CANDIDATES * k, total), batch_size=BATCH)
    places = found.sequences[0].unique().tolist()
    chosen = batch_of(world.sequences, places)
    shades = token_scores(about.model, about.index.factors, query, chosen, about.index.about["damping"], BATCH)
    order = shades.sum(1).argsort(descending=True).tolist()
    overlap = bm25(token_counts(ids), target_counts(world.sequences))[0]
    by_overlap = np.argsort(np.argsort(-overlap, kind="stable"), kind="stable") + 1
    rows = []
    for number, place in enumerate(order):
        score, sequence = float(shades[place].sum()), places[place]
        end = int(chosen["loss_mask"][place].nonzero()[-1]) + 1
        rows.append(
            Row(
                tokens=token_texts(world, chosen["input_ids"][place, :end].tolist()),
                score=score,
                rank=number + 1 if score > 0 else total - len(order) + number + 1,
                nats_per_copy=score / total,
                scored=total,
                source=world.sequences["name"][sequence].as_py(),
                bm25_rank=int(by_overlap[sequence]),
                token_scores=shades[place, :end].tolist(),
            )
        )
    start, opens = int(mask[0].argmax()), int(opening is not None)
    pieces = token_texts(world, ids[0, opens:start].tolist()), token_texts(world, ids[0, start:].tolist())
    return query_card(*pieces, rows, k=k, title=title, alignment="predicted", distinct=True)
