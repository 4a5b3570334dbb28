"""Models that somebody else trained: a world in their tokens, and their weights in the layout of a trained family."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from influence_kit import models
from influence_kit.corpora.tokens import encode_with
from influence_kit.corpora.world import World, batch_of, token_columns
from influence_kit.errors import UserError


def retokenise(parameters: dict, inputs: dict[str, Path], out: Path, progress) -> None:
    """The same paragraphs and queries in the tokens of a Hugging Face tokenizer."""
    world, tokenizer = World.load(inputs["world"]), _tokenizer(parameters["source"])

    def again(table: pa.Table, column: str) -> pa.Table:
        ids, mask = encode_with(tokenizer, table[column].to_pylist(), parameters["length"])
        for name, values in token_columns(ids, mask).items():
            table = table.set_column(table.column_names.index(name), name, values)
        return table

    tables = {"sequences": again(world.sequences, "text"), "held_out": again(world.held_out, "text")}
    tables["queries"] = again(world.queries, "completion")
    replace(world, **tables, tokenizer=tokenizer.backend_tokenizer.to_str()).save(out)


def pretrained(parameters: dict, inputs: dict[str, Path], out: Path, progress) -> None:
    """Keep a model as the end of its training, and one with new random weights as the beginning."""
    world, end = World.load(inputs["world"]), models.load_pretrained(parameters["source"])
    queries, parts, held_out = batch_of(world.queries), [], []
    beginning = models.initialise(end.config, parameters["seed"]).eval()
    for step, model in enumerate((beginning, end)):
        models.save_checkpoint(model, out, step)
        log_p, correct = models.evaluate(model, queries, batch_size=8)
        columns = {"step": np.full(len(log_p), step), "query": np.arange(len(log_p)), "log_p": log_p.numpy()}
        parts.append(pa.table({**columns, "correct": correct.numpy()}))
        held_out.append(models.held_out_loss(model, batch_of(world.held_out)))
        progress(step + 1, 2)
    pq.write_table(pa.concat_tables(parts), out / "answers.parquet")
    size = models.non_embedding_parameters(end)
    curves = {"step": [1], "train": [held_out[1]], "held_out_step": [0, 1], "held_out": held_out}
    (out / "losses.json").write_text(
        json.dumps({"steps": 1, "non_embedding_parameters": size, **curves}, sort_keys=True)
    )


def _tokenizer(source: str):
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False, use_fast=True)
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"tokenizer of {source!r} could not be loaded: {reason} (give a local folder, or a hub name with internet)"
        ) from error
