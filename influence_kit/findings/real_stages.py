"""What chapter 12 makes of a language model from elsewhere: the texts that are scored, factors, scans, and what judges them.

Sequences have a role: `pool` (real text), `more` (more of it, on which factors are fitted too and which is not scored), `planted`
(passages of our own among it), `aligned` (paragraphs in several languages) and `fact` (sentences about a fact). Queries have one
too: `prompt`, `paragraph` and `fact`. All are in the model's own tokens, after the opening that it reads best, without an
end-of-text token: what a chat model ends its turns with is no part of a text.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from influence_kit.corpora.sentences import load_facts, load_prompts, load_themes
from influence_kit.corpora.texts import sayings as short
from influence_kit.corpora.texts.folder import local_text, not_read
from influence_kit.corpora.texts.own import check_model, in_pieces
from influence_kit.corpora.texts.paragraphs import load_text, save_text
from influence_kit.corpora.tokens import check_vocabulary
from influence_kit.corpora.world import World, batch_of, token_columns, token_matrix
from influence_kit.errors import UserError
from influence_kit.findings.own import layers_of

if TYPE_CHECKING:
    from torch import Tensor, nn

OPENING_TEXTS = 24  # on which openings are compared
BITS, BLOCK = 4, 32  # of a GGUF file: levels of a weight, weights that share a scale
REFERENCE = "en-us"
FLOOR = (
    0.1  # of what sequences do to other queries on average, so that one that does nothing to any stands out for none
)


def sayings(parameters: dict, inputs: dict[str, Path], out: Path, progress) -> None:
    """Fetch sayings and entries of the hackers' dictionary once: text.parquet and manifest.json."""
    folder = out / "resume"
    folder.mkdir(parents=True, exist_ok=True)
    save_text(short.sayings(folder), out)


def little(parameters: dict, inputs: dict[str, Path], out: Path, progress) -> None:
    """Make a folder as any model's, of random weights and a tokenizer of the sayings: for tests, where nothing is downloaded."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    from influence_kit import models
    from influence_kit.corpora.tokens import BOS, EOS, train_bpe

    words = Tokenizer.from_str(train_bpe(load_text(inputs["sayings"])["text"].to_pylist(), parameters["vocabulary"]))
    size = parameters["width"], parameters["depth"]
    config = models.configure("llama", words.get_vocab_size(), *size, parameters["context"])
    model: Any = models.initialise(config, parameters["seed"])
    model.save_pretrained(out)
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token=BOS, eos_token=EOS).save_pretrained(out)


def candidates(parameters: dict, inputs: dict[str, Path], out: Path, progress) -> None:
    """Make the world: everything that is scored, ordered by length, and everything that is asked.

    Columns of sequences: role, source, language, name (of the paragraph, theme or fact), group (of a fact's sentences, or on_theme
    and shared_words), text; of queries: role, language, name, theme, prompt, completion.
    """
    from influence_kit import models
    from influence_kit.findings.openings import choose_opening

    folder = source_of(parameters, inputs)
    (config, tokenizer), rng = check_model(folder), np.random.default_rng([parameters["seed"], 0x12])
    context = context_of(config)
    length = min(parameters["length"], context)
    rows = _own(parameters, tokenizer, length) if parameters["texts"] else _packaged(parameters, inputs, tokenizer, rng)
    asked = _prompts(parameters) + [
        {"role": "fact", "name": fact.name, "prompt": fact.prompt, "completion": fact.completion, "theme": fact.kind}
        for fact in load_facts()
    ]
    asked += [
        {"role": "paragraph", "name": row["name"], "prompt": "", "completion": row["text"], "theme": ""}
        for row in rows
        if row["role"] == "aligned" and row["language"] == REFERENCE
    ]
    pool = [row["text"] for row in rows if row["role"] == "pool"]
    some = [pool[i] for i in _evenly(len(pool), OPENING_TEXTS)]
    model = models.load_pretrained(folder) if parameters["opening"] == "best" else None
    opening = choose_opening(model, tokenizer, some, parameters["opening"])
    ids, mask = encode(tokenizer, [("", row["text"]) for row in rows], length, opening.token)
    check_vocabulary(ids, config.get_text_config().vocab_size)
    order = [i for i in np.argsort(mask.sum(1), kind="stable") if mask[i].any()]
    passed_over = not_read(Path(parameters["texts"])) if parameters["texts"] else []
    about = parameters | {"begins": asdict(opening), "texts": Path(parameters["texts"]).name, "not_read": passed_over}
    sequences = _table([rows[i] for i in order], ids[order], mask[order])
    asked_ids, asked_mask = encode(tokenizer, [(q["prompt"], q["completion"]) for q in asked], None, opening.token)
    lengths = asked_mask.shape[1] - asked_mask[:, ::-1].argmax(1)
    for i in np.flatnonzero((lengths > context) | ~asked_mask.any(1)):
        if asked[i]["role"] == "prompt" and parameters["queries"]:
            raise UserError(
                f"prompt={asked[i]['prompt']!r}: with its completion {lengths[i]} tokens, of which the model reads {context}, or "
                "nothing is left to predict: shorten it, or give another by queries="
            )
    fits = np.flatnonzero((lengths <= context) & asked_mask.any(1))
    used = lengths[fits].max()
    queries = _table([asked[i] for i in fits], asked_ids[fits, :used], asked_mask[fits, :used])
    words = tokenizer.backend_tokenizer.to_str()
    World("asked", sequences, sequences.slice(0, 0), queries, (), words, about).save(out)


def source_of(parameters: Mapping[str, Any], inputs: Mapping[str, Path]) -> str:
    """The folder (or hub name) of the model."""
    return str(inputs.get("weights", parameters["source"]))


def context_of(config: Any) -> int:
    """Tokens that a model reads at most."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or 1 << 20


def encode(
    tokenizer: Any, pairs: Sequence[tuple[str, str]], length: int | None, opening: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids [N, T] of prompt and completion after an opening, padded on the right with 0, and which are targets, bool [N, T]:
    those of the completion, from the first token that the prompt alone would not give.

    Args:
        tokenizer: Of transformers.
        pairs: Prompt and completion.
        length: Tokens that a row is cut to; None: T is the longest row's.
        opening: Token id, or None.
    """

    def ids(texts: list[str]) -> list[list[int]]:
        return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []

    before = [] if opening is None else [opening]
    prompts, wholes = ids([prompt for prompt, _ in pairs]), ids([prompt + said for prompt, said in pairs])
    kept = [(before + whole)[:length] for whole in wholes]
    tokens = np.zeros((len(pairs), length or max(map(len, kept))), np.int64)
    mask = np.zeros(tokens.shape, bool)
    for row, (prompt, whole) in enumerate(zip(prompts, wholes, strict=True)):
        shared = next((i for i, (a, b) in enumerate(zip(prompt, whole)) if a != b), min(len(prompt), len(whole)))
        tokens[row, : len(kept[row])] = kept[row]
        mask[row, max(1, len(before) + shared) : len(kept[row])] = True
    return tokens, mask


def _table(rows: list[dict], ids: np.ndarray, mask: np.ndarray) -> pa.Table:
    names = dict.fromkeys(name for row in rows for name in row)
    return pa.table({**token_columns(ids, mask), **{name: [row.get(name, "") for row in rows] for name in names}})


def _prompts(parameters: dict) -> list[dict]:
    """What is asked beside facts: the user's own, or the packaged."""
    if parameters["queries"]:
        own = enumerate(parameters["queries"], 1)
        return [{"role": "prompt", "name": f"query {i}", "theme": "", **query} for i, query in own]
    return [{"role": "prompt", **asdict(prompt)} for prompt in load_prompts()]


def _sentences(themes: bool) -> list[dict]:
    """Passages to plant, and sentences about facts."""
    planted = [
        {"role": "planted", "source": "planted", "language": "en", "name": theme.name, "group": group, "text": text}
        for theme in (load_themes().values() if themes else ())
        for group, texts in (("on_theme", theme.on_theme), ("shared_words", theme.shared_words))
        for text in texts
    ]
    return planted + [
        {"role": "fact", "source": "sentence", "language": "en", "name": fact.name, "group": group, "text": text}
        for fact in load_facts()
        for group, texts in fact.sentences.items()
        for text in texts
    ]


def _own(parameters: dict, tokenizer: Any, length: int) -> list[dict]:
    """The user's texts, long ones in pieces, `limit` of them evenly over all, and sentences about facts."""
    found = local_text(Path(parameters["texts"]))
    found = found.take(pa.array(_evenly(found.num_rows, parameters["limit"]))).to_pylist()
    ids, mask, of = in_pieces(tokenizer, [row["text"] for row in found], length - 1, None)  # an opening comes before
    several, rows = np.bincount(of, minlength=len(found)) > 1, []
    for i in _evenly(len(of), parameters["limit"]):
        row, piece = found[of[i]], ids[i, : mask[i].sum() + 1]
        about = {"role": "pool", "source": row["source"], "language": row["language"], "name": row["pair_id"]}
        rows.append(about | {"text": tokenizer.decode(piece) if several[of[i]] else row["text"]})
    if not rows:
        raise UserError(
            f"texts={parameters['texts']!r}: none has two tokens, so there is nothing to predict: give longer ones"
        )
    return rows + _sentences(themes=not parameters["queries"])


def _evenly(total: int, wanted: int) -> np.ndarray:
    """At most so many of the numbers below `total`, evenly over all."""
    return np.unique(np.linspace(0, total - 1, min(wanted, total)).astype(int))


def _packaged(parameters: dict, inputs: dict[str, Path], tokenizer: Any, rng: np.random.Generator) -> list[dict]:
    """Real text of several packages, paragraphs in several languages, passages to plant, and sentences about facts."""
    numbers, languages = parameters["numbers"], parameters["languages"]
    help_text = load_text(inputs["help"]).to_pylist()
    lines = [row | {"text": f"{row['speaker']}: {row['text']}"} for row in load_text(inputs["lines"]).to_pylist()]
    short_texts = load_text(inputs["sayings"]).to_pylist()
    by_pair: dict[str, dict[str, str]] = {}
    for row in help_text:
        by_pair.setdefault(row["pair_id"], {})[row["language"]] = row["text"]
    everywhere = [pair for pair, found in by_pair.items() if len(found) == len(languages)]
    fits = _of_length(tokenizer, [by_pair[pair][REFERENCE] for pair in everywhere], parameters)
    aligned = [everywhere[i] for i in rng.permutation(fits)[: parameters["aligned"]]]
    rows = [
        {"role": "aligned", "source": "help", "language": language, "name": pair, "text": by_pair[pair][language]}
        for pair in aligned
        for language in languages
    ]
    left = [row for row in help_text if row["pair_id"] not in set(aligned)]
    pools = {"help": [row for row in left if row["language"] == REFERENCE], "lines": lines}
    pools |= {f"help in {language}": [r for r in left if r["language"] == language] for language in languages[1:]}
    pools |= {name: [r for r in short_texts if r["source"] == name] for name in ("sayings", "jargon")}
    for name, texts in pools.items():
        wanted, more = numbers["translated" if name.startswith("help in") else name], parameters["more"].get(name, 0)
        fits = _of_length(tokenizer, [row["text"] for row in texts], parameters)
        if len(fits) < wanted + more:
            raise UserError(
                f"{len(fits)} texts of {name} have {parameters['shortest']} to {parameters['longest']} tokens, {wanted + more} are "
                "asked for: lower numbers (or more) in the profile, or widen shortest and longest"
            )
        for place, row in enumerate(texts[i] for i in rng.permutation(fits)[: wanted + more]):
            about = {
                "role": "pool" if place < wanted else "more",
                "source": name.split(" in ")[0],
                "language": row["language"],
                "name": row["pair_id"],
            }
            rows.append(about | {"text": row["text"]})
    return rows + _sentences(themes=not parameters["queries"])


def _of_length(tokenizer: Any, texts: list[str], parameters: dict) -> np.ndarray:
    """Positions of the texts that have `shortest` to `longest` tokens."""
    lengths = [len(ids) for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]]
    return np.flatnonzero([parameters["shortest"] <= n <= parameters["longest"] for n in lengths])


def packed(world: World, rows: np.ndarray, number: int, length: int, seed: int) -> dict[str, Tensor]:
    """Texts in random order, one after another as in training, cut into at most `number` rows of `length` tokens (of all there are,
    where there are fewer)."""
    import torch

    tokens, targets = token_matrix(world.sequences)[rows], token_matrix(world.sequences, "loss_mask")[rows]
    ends = targets.shape[1] - targets[:, ::-1].argmax(1)
    order = np.random.default_rng([seed, 0xFAC]).permutation(len(rows))
    flat = np.concatenate([tokens[i, : ends[i]] for i in order])
    length = min(length, tokens.shape[1], len(flat))
    found = flat[: len(flat) // length * length].reshape(-1, length)[:number]
    return {"input_ids": torch.from_numpy(found.astype(np.int64))}


def with_role(table: pa.Table, *roles: str) -> np.ndarray:
    """Positions of the rows that have one of these roles."""
    return np.flatnonzero(np.isin(table["role"].to_numpy(zero_copy_only=False), roles))


def tracked(parameters: Mapping[str, Any], inputs: Mapping[str, Path]) -> str:
    """Which layers are tracked: for "mlp" those that are the model's feed-forward ones, whatever it calls them."""
    return layers_of(source_of(parameters, inputs)) if parameters["layers"] == "mlp" else parameters["layers"]


def factors(parameters: dict, inputs: dict[str, Path], out: Path, progress) -> None:
    """Fit EK-FAC on real text, packed: factors.safetensors."""
    from influence_kit import models
    from influence_kit.engine.fitting import fit_ekfac

    world, model = World.load(inputs["world"]), models.load_pretrained(source_of(parameters, inputs))
    rows = with_role(world.sequences, "pool", "more")
    batch = packed(world, rows, parameters["fit"], parameters["length"], parameters["seed"])
    found = fit_ekfac(
        model,
        batch,
        tracked(parameters, inputs),
        seed=parameters["seed"],
        resume=out / "resume",
        progress=lambda done, to_do: progress(done, to_do, "factors"),
    )
    found.save(out / "factors.safetensors")


def scan(parameters: dict, inputs: dict[str, Path], out: Path, progress) -> None:
    """Score sequences of some roles for queries of some: scores.safetensors with values [Q, N] (nats at epsilon = 1), block_values
    [Q, N, blocks], rows [N], queries [Q], error [Q] (relative, of directions at low rank; 0 where they are whole), log_p [Q] (nats)
    and correct [Q]."""
    import torch

    from influence_kit import models
    from influence_kit.engine.factors import Factors

    world, model = World.load(inputs["world"]), models.load_pretrained(source_of(parameters, inputs))
    asked, rows = with_role(world.queries, *parameters["asked"]), with_role(world.sequences, *parameters["scored"])
    if not len(asked):
        raise UserError(
            f"no {parameters['asked'][0]} is short enough for the {context_of(model.config)} tokens that the model reads: give another model"
            + ", or prompts of your own by queries=" * ("prompt" in parameters["asked"])
        )
    log_p, correct = models.evaluate(model, batch_of(world.queries, asked), batch_size=8)
    known = Factors.load(inputs["factors"] / "factors.safetensors")  # after the logits, whose memory it takes
    found = _scored(parameters, world, model, known, asked, rows, out, progress)
    _keep(out, **found, rows=torch.from_numpy(rows), queries=torch.from_numpy(asked), log_p=log_p, correct=correct)


def _scored(parameters, world: World, model: nn.Module, known, asked: np.ndarray, rows: np.ndarray, out, progress):
    """values, block_values and error of a scan."""
    import torch

    from influence_kit.engine.scans import score
    from influence_kit.findings.layers_and_tokens import blocks

    scores = score(
        model,
        known,
        batch_of(world.queries, asked),
        batch_of(world.sequences, rows),
        parameters["damping"],
        by_layer=True,
        self_influence=False,
        rank=parameters["rank"],
        memory=parameters["memory"],
        resume=out / "resume",
        progress=lambda done, to_do: progress(done, to_do, "scan"),
    )
    of = torch.from_numpy(blocks(scores.layers))
    assert scores.by_layer is not None
    by_block = torch.zeros(*scores.values.shape, int(of.max()) + 1).index_add_(2, of, scores.by_layer)
    error = torch.zeros(len(asked)) if scores.query_error is None else scores.query_error
    return {"values": scores.values, "block_values": by_block, "error": error}


def _keep(out: Path, **tensors: Tensor) -> None:
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out / "scores.safetensors")


def steps(parameters: dict, inputs: dict[str, Path], out: Path, progress) -> None:
    """What one real step of training on a fact's sentence does to its query: steps.parquet, a row a sentence.

    A step adds `step` times the sign of the gradient of the sentence's log-probability to every weight of the model. Columns: row
    (position of the sentence), query (of its fact), delta (nats, of the query's log-probability), delta_half (after half a step, of
    each fact's first sentence alone).
    """
    import torch

    from influence_kit import models
    from influence_kit.engine.blas import attention, by_onednn, is_large
    from influence_kit.referees.finetuning import log_p

    world, model = World.load(inputs["world"]), models.load_pretrained(source_of(parameters, inputs))
    rows, asked = with_role(world.sequences, "fact"), with_role(world.queries, "fact")
    place = {name: int(asked[i]) for i, name in enumerate(world.queries["name"].take(asked).to_pylist())}
    of = [place[name] for name in world.sequences["name"].take(rows).to_pylist()]
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    start, found, halved = [weight.detach().clone() for weight in weights], [], set[int]()
    length = max(token_matrix(table).shape[1] for table in (world.sequences, world.queries))
    with by_onednn(is_large(model)), attention(length):
        before = {query: float(log_p(model, batch_of(world.queries, [query])).detach()) for query in set(of)}
        for done, (row, query) in enumerate(zip(rows, of, strict=True), 1):
            sentence, question = batch_of(world.sequences, [row]), batch_of(world.queries, [query])
            said = log_p(model, sentence).sum()
            signs = [gradient.sign_() for gradient in torch.autograd.grad(said, weights, materialize_grads=True)]
            parts = (1.0,) if query in halved else (0.5, 0.5)
            halved.add(query)
            with torch.no_grad():
                measured = []
                for part in parts:
                    for weight, sign in zip(weights, signs, strict=True):
                        weight.add_(sign, alpha=part * parameters["step"])
                    measured.append(float(log_p(model, question)) - before[query])
                for weight, value in zip(weights, start, strict=True):
                    weight.copy_(value)
            half = measured[0] if len(parts) > 1 else None
            found.append({"row": int(row), "query": query, "delta_half": half, "delta": measured[-1]})
            progress(done, len(rows), "steps")
    pq.write_table(pa.Table.from_pylist(found), out / "steps.parquet")


def untrained(parameters: dict, inputs: dict[str, Path], out: Path, progress) -> None:
    """The same architecture with random weights, fitted and scanned on less: scores.safetensors as `scan` writes it."""
    import torch
    from transformers import AutoConfig

    from influence_kit import models
    from influence_kit.engine.fitting import fit_ekfac

    world = World.load(inputs["world"])
    config = AutoConfig.from_pretrained(source_of(parameters, inputs), trust_remote_code=False)
    model = models.initialise(config, parameters["seed"]).float().eval()
    pool, asked = with_role(world.sequences, "pool"), with_role(world.queries, *parameters["asked"])
    batch = packed(world, pool, parameters["fit"], parameters["length"], parameters["seed"])
    known = fit_ekfac(model, batch, tracked(parameters, inputs), seed=parameters["seed"])
    rng = np.random.default_rng([parameters["seed"], 0x0])
    rows = np.sort(rng.permutation(pool)[: parameters["sequences"]])
    log_p, correct = models.evaluate(model, batch_of(world.queries, asked), batch_size=8)
    found = _scored(parameters, world, model, known, asked, rows, out, progress)
    _keep(out, **found, rows=torch.from_numpy(rows), queries=torch.from_numpy(asked), log_p=log_p, correct=correct)


def rounded(parameters: dict, inputs: dict[str, Path], out: Path, progress) -> None:
    """What one more rounding to 4 bits does to the scores of facts: scores.safetensors with values [draws, Q, N], relative [draws]
    (|change| / |weights|), rows [N] and queries [Q]. The factors stay those of the model as it was.

    A draw adds to every weight of a tracked layer what another rounding would be off by: evenly from -1/2 to 1/2 of a level, of
    which there are 16 between the smallest and the largest of 32 neighbours.
    """
    import torch

    from influence_kit import models
    from influence_kit.engine.factors import Factors

    world, known = World.load(inputs["world"]), Factors.load(inputs["factors"] / "factors.safetensors")
    asked, rows = with_role(world.queries, "fact"), with_role(world.sequences, "fact")
    parts, changes = [], []
    for draw in range(parameters["draws"]):
        model = models.load_pretrained(source_of(parameters, inputs))
        generator = torch.Generator().manual_seed(parameters["seed"] + draw)
        changes.append(round_again(model, known.layers, generator))
        within = out / "resume" / str(draw)
        parts.append(_scored(parameters, world, model, known, asked, rows, within, lambda *_: None)["values"])
        del model  # before the next is loaded
        progress(draw + 1, parameters["draws"], "rounding")
    about = {"rows": torch.from_numpy(rows), "queries": torch.from_numpy(asked), "relative": torch.tensor(changes)}
    _keep(out, values=torch.stack(parts), **about)


def round_again(model: nn.Module, layers: Iterable[str], generator) -> float:
    """Change the weights of some layers as one more rounding to BITS bits would, in blocks of BLOCK; |change| / |weights|."""
    import torch

    change = size = 0.0
    with torch.no_grad():
        for name in layers:
            weight: Any = model.get_submodule(name).weight
            blocks = weight.reshape(-1, BLOCK) if weight.numel() % BLOCK == 0 else weight.reshape(1, -1)
            level = (blocks.amax(1, keepdim=True) - blocks.amin(1, keepdim=True)) / (2**BITS - 1)
            noise = (torch.rand(blocks.shape, generator=generator) - 0.5) * level
            change, size = change + float(noise.square().sum()), size + float(weight.square().sum())
            weight.add_(noise.view_as(weight))
    return (change / size) ** 0.5


def maps(parameters: dict, inputs: dict[str, Path], out: Path, progress) -> None:
    """Token scores of what cards show: maps.parquet, a row a query and sequence, with token_scores [T].

    Of every prompt the `k` highest and lowest real texts, the highest in relation to what they do to the other prompts (see `apart`),
    and all that was planted for it; of two facts all sentences; of `paragraphs` paragraphs the `k` highest and lowest.
    """
    from influence_kit import models
    from influence_kit.engine.factors import Factors
    from influence_kit.engine.scans import token_scores

    world, model = World.load(inputs["world"]), models.load_pretrained(source_of(parameters, inputs))
    known, found = Factors.load(inputs["factors"] / "factors.safetensors"), []
    wanted = shown(parameters, world, inputs)
    for done, (query, rows) in enumerate(wanted.items(), 1):
        asked, chosen = batch_of(world.queries, [query]), batch_of(world.sequences, rows)
        tokens = token_scores(model, known, asked, chosen, parameters["damping"])
        found += [{"query": query, "row": row, "token_scores": t.tolist()} for row, t in zip(rows, tokens, strict=True)]
        progress(done, len(wanted), "cards")
    pq.write_table(pa.Table.from_pylist(found), out / "maps.parquet")


def shown(parameters: dict, world: World, inputs: dict[str, Path]) -> dict[int, list[int]]:
    """Positions of the sequences that a query's card shows, by position of the query."""
    from safetensors.numpy import load_file

    wanted: dict[int, list[int]] = {}
    names = world.sequences["name"].to_numpy(zero_copy_only=False)
    asked = world.queries["name"].to_numpy(zero_copy_only=False)
    for kind in ("influence", "languages", "facts"):
        if kind not in inputs:
            continue
        read = load_file(inputs[kind] / "scores.safetensors")
        rows, values, k = read["rows"], read["values"], parameters["k"]
        if kind == "facts":
            for query in _middling(world, read):
                wanted[query] = rows[names[rows] == asked[query]].tolist()
            continue
        among = np.flatnonzero(world.sequences["role"].to_numpy(zero_copy_only=False)[rows] != "planted")
        order = among[np.argsort(-values[:, among], 1, "stable")]
        special = among[np.argsort(-apart(values)[:, among], 1, "stable")[:, : k if kind == "influence" else 0]]
        for place, query in enumerate(read["queries"][: None if kind == "influence" else parameters["paragraphs"]]):
            columns = [*order[place, : k + 1], *order[place, -k:], *special[place]]
            if kind == "influence":
                planted = names[rows] == world.queries["theme"][int(query)].as_py()
                columns += np.flatnonzero(planted).tolist()
            wanted[int(query)] = rows[list(dict.fromkeys(columns))].tolist()
    return wanted


def _middling(world: World, read: Mapping[str, np.ndarray]) -> list[int]:
    """Positions of two queries: of the real facts and of the nonsense ones that whose flipped sentences keep the median share of
    the influence of those as asked."""
    groups, names = (world.sequences[n].to_numpy(zero_copy_only=False)[read["rows"]] for n in ("group", "name"))
    asked, found = world.queries["name"].to_pylist(), []
    for nonsense in (False, True):
        kept = {}
        for place, query in enumerate(map(int, read["queries"])):
            if asked[query] in {fact.name for fact in load_facts() if fact.nonsense == nonsense}:
                own = names == asked[query]
                flipped, forward = (read["values"][place, own & (groups == g)].mean() for g in ("flipped", "as_asked"))
                kept[query] = flipped / forward
        found += sorted(kept, key=kept.__getitem__)[len(kept) // 2 :][:1]
    return found


def apart(values: np.ndarray) -> np.ndarray:
    """Scores [Q, N], each divided by the root mean square of what the same sequence does to the other queries (each query's scores
    in units of their own root mean square): what it does to this query more than to any."""
    units = values / np.sqrt(np.mean(values**2, 1, keepdims=True))
    squares = units**2
    others = (squares.sum(0, keepdims=True) - squares) / max(len(values) - 1, 1)
    return units / np.sqrt(others + FLOOR)


def read_steps(folder: Path) -> Any:
    """The table that `steps` wrote."""
    return pq.read_table(folder / "steps.parquet").to_pandas()


def origin(folder: Path) -> dict[str, Any]:
    """Where weights are from, and under which licence, as far as their folder says."""
    path = folder / "origin.json"
    return json.loads(path.read_text()) if path.is_file() else {}
