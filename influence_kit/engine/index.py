"""A corpus's gradients kept on disk, so that the next query costs no pass over the corpus.

    index = build_index(model, factors, sequences, "index")
    index.query(model, queries, k=10, sequences=sequences)

Kept of every sequence are coordinates of its whitened gradient phi (`features.py`), whose inner products are the scores, and
|phi|^2. Whole in float16 where they fit into `bytes_per_sequence`; else as many bits each (8, 4, 2, 1; `codes.py`) as let all
fit; and where not even one bit does, one bit of those with the largest mean phi^2.

Why few bits: phi has nearly as many directions as the layers have weights, so at a given size the error comes from directions
left out far more than from rounding. Recall of the exact top 10 at either end after rescoring 100, at 8 kB a sequence, 50
queries, one seed, 2,850 to 4,000 sequences, models of width 32, 64, 128 on Atlas | real text:

    orthonormal projection of either side, float16     .89  .58   -   |  .98  .86   -
    coordinates of largest Lambda / (Lambda + lambda)  .91  .45  .35  |  .99  .87  .70
    coordinates of largest mean phi^2, float16         .95  .70  .59  |  .99  .92  .78
    the same, one bit, not mixed                       .94  .90  .93  | 1.00 1.00  .99
    what is kept here                                 1.00  .98  .98  | 1.00 1.00  .99

The share of directions kept falls with width, and recall with it: measure it with `recall` before trusting an index of a
model much wider than 128.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from .codes import NORMS, encode, fields, layout, products
from .factors import Factors
from .features import Features
from .files import digest, load_tensors, save_tensors, sha256, whole
from .processes import barrier, rank_and_size, shard
from .refine import Refined, refined_by
from .scans import NAMED, check_norms, check_numbers, score, warn_of_unusable
from .scores import FORMS, Scores, TopScores, ends
from .sequences import Progress, batch_rows, check, corpus_digest, count, gather, read_batch, row_digests
from .shelf import Buffers

VERSION = 3
SHARD = 4096  # sequences in a file: what a killed build goes on from, and what processes share
TILE = 1 << 20  # bytes of codes unpacked at a time in a query
KINDS = {
    "codes": None,
    "norms": NORMS,
    "rows": 8,
}  # what a file holds, and its bytes a sequence (codes: dims * bits / 8)
NAMES = {"model": "weights", "bytes_per_sequence": "bytes a sequence", "corpora": "sequences"}


def build_index(
    model: nn.Module,
    factors: Factors,
    sequences: Mapping[str, Tensor],
    folder: str | os.PathLike,
    *,
    bytes_per_sequence: int = 8192,
    damping: float = 0.1,
    batch_size: int = 32,
    seed: int = 0,
    progress: Progress | None = None,
) -> Index:
    """Write the gradients of `sequences` to a folder.

    The folder gets `index.json` (last), factors.safetensors, projection.safetensors, and for every SHARD sequences
    `<start>-<stop>.codes` [n, dims * bits / 8], `.norms` float32 [n, 2] (|phi|^2, scale) and `.rows` uint64 [n] (by which a
    sequence is recognised), raw and little-endian. A killed build goes on after its last whole file when it is called again
    with the same model, factors and sequences. Under `torchrun` ranks share the files of one folder.

    Args:
        model: The one that the factors were fitted on.
        factors: From `fit_ekfac`.
        sequences: As for `score`.
        folder: A new one, or one where a build was killed.
        bytes_per_sequence: Upper limit of what a sequence's codes and norms take; 8 bytes for its recognition come on top, and
            factors and projection once.
        damping: As for `score`.
        batch_size: Sequences read at a time.
        seed: Of the mixing.
        progress: Called with (sequences done, sequences to do).

    Raises:
        ValueError: A folder that holds another index, no sequences, or fewer bytes than one block of codes takes.

    Cost: one scan with self-influence over the sequences (and over PILOT of them where coordinates are chosen), and 64
    multiplications a coordinate kept.
    """
    check_numbers(damping, batch_size)
    folder, total = Path(folder), count(sequences)
    if total == 0:
        raise ValueError("no sequences to index: input_ids has no rows")
    check(sequences, model)
    factors = Factors(factors.beside(model).layers, None, factors.details)
    shapes = {name: list(layer.eigenvalues.shape) for name, layer in factors.layers.items()}
    bits, dims = layout(sum(p * m for p, m in shapes.values()), bytes_per_sequence)
    plan = {"version": VERSION, "model": digest(model), "factors": factors.fingerprint()}
    plan |= {"layers": shapes, "bits": bits, "dims": dims, "damping": damping, "seed": seed}
    plan |= {"bytes_per_sequence": bytes_per_sequence, "corpora": [corpus_digest(sequences)]}
    folder.mkdir(parents=True, exist_ok=True)
    _refuse_another(folder, plan)
    finished, kept = (folder / "index.json").exists(), folder / "projection.safetensors"
    made = kept.exists()
    barrier()  # all have looked before one writes
    if finished:
        return Index.open(folder)
    features = Features(model, factors, damping)
    projection = load_tensors(kept)[0] if made else features.choose(sequences, bits, dims, batch_size, seed)
    if rank_and_size()[0] == 0:
        _write_json(folder / "plan.json", plan)
        factors.save(folder / "factors.safetensors")
        if not made:
            save_tensors(kept, projection, {})
    barrier()
    _write_shards(features, projection, plan, sequences, folder, 0, batch_size, progress)
    files = {name: sha256(folder / name) for name in ("factors.safetensors", "projection.safetensors")}
    _finish(folder, plan | {"files": files, "shards": []}, total)
    return _warned(Index.open(folder, verify=False))


@dataclass(frozen=True)
class Index:
    """An opened index.

    Args:
        folder: Where it lies.
        about: What index.json says.
        factors: That its gradients are whitened by.
        projection: Which coordinates are kept where.
    """

    folder: Path
    about: dict
    factors: Factors
    projection: dict[str, Tensor]

    @property
    def sequences(self) -> int:
        """N, the number of indexed sequences."""
        return self.about["sequences"]

    @property
    def bytes_per_sequence(self) -> int:
        """What a sequence's codes and norms take on disk."""
        return self.about["dims"] * self.about["bits"] // 8 + NORMS

    @staticmethod
    def open(folder: str | os.PathLike, verify: bool = True) -> Index:
        """Read an index's manifest, factors and projection.

        Args:
            folder: Where it was built.
            verify: Hash every file (about 1 s a GB), not only weigh it.

        Raises:
            ValueError: A folder without a finished index, or a missing or damaged file, by name.
        """
        folder = Path(folder)
        try:
            about = json.loads((folder / "index.json").read_text())
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{folder} holds no finished index (index.json is missing or unreadable): build it with build_index"
            ) from error
        if about.get("version") != VERSION:
            raise ValueError(f"{folder} has format {about.get('version')}, this is {VERSION}: build the index again")
        row = about["dims"] * about["bits"] // 8
        listed = {name: (None, written) for name, written in about["files"].items()}
        for part in about["shards"]:
            for kind, width in KINDS.items():
                listed[f"{part['name']}.{kind}"] = ((part["stop"] - part["start"]) * (width or row), part[kind])
        for name, (size, written) in listed.items():
            path = folder / name
            complete = path.is_file() and size in (None, path.stat().st_size)
            if not complete or (verify and sha256(path) != written):
                state = "not what was written" if path.is_file() else "missing"
                raise ValueError(f"{path} is {state}: delete {folder} and build the index again")
        factors, projection = (
            Factors.load(folder / "factors.safetensors"),
            load_tensors(folder / "projection.safetensors")[0],
        )
        return Index(folder, about, factors, projection)

    def append(
        self,
        model: nn.Module,
        sequences: Mapping[str, Tensor],
        *,
        batch_size: int = 32,
        progress: Progress | None = None,
    ) -> Index:
        """The index with more sequences after its own, under the same factors and projection; a killed call can be repeated.

        Args:
            model: The indexed one.
            sequences: More of them.
            batch_size: Sequences read at a time.
            progress: Called with (sequences done, sequences to do).

        Raises:
            ValueError: The model's weights are not those of the index, or there are no sequences.
        """
        self._check(model)
        start, added = self.sequences, count(sequences)
        if added == 0:
            raise ValueError("no sequences to append: input_ids has no rows")
        check(sequences, model)
        about = self.about | {"corpora": [*self.about["corpora"], corpus_digest(sequences)]}
        features = Features(model, self.factors, about["damping"])
        _write_shards(features, self.projection, about, sequences, self.folder, start, batch_size, progress)
        _finish(self.folder, about, start + added)
        return _warned(Index.open(self.folder, verify=False))

    def query(
        self,
        model: nn.Module,
        queries: Mapping[str, Tensor],
        k: int = 10,
        *,
        sequences: Mapping[str, Tensor] | None = None,
        rescore: int = 100,
        form: str = "raw",
        batch_size: int = 32,
        refine: int | Refined = 0,
        refine_on: Mapping[str, Tensor] | None = None,
    ) -> TopScores:
        """The k most and k least influential indexed sequences of every query.

        Args:
            model: The indexed one.
            queries: As for `score`.
            k: How many of either end.
            sequences: The indexed corpus. With it, each query's `rescore` best candidates at either end are scored exactly in
                one pass over the candidates of all queries. Without it scores are approximate, and the result's `approximate`
                says so.
            rescore: How many candidates.
            form: raw, relatif or cosine.
            batch_size: Sequences read at a time.
            refine: As for `score`; the index stays as it is.
            refine_on: As for `score`. Without `sequences` there are none that the fresh residual could be taken on.

        Raises:
            ValueError: Another model's weights, a query without a target, another number of sequences than indexed, or a
                candidate that is not the sequence that was indexed (another corpus, or another order).

        Cost: a pass over the queries; reading the index once, N dims (1 + Q) additions and multiplications; a scan of at
        most 2 Q rescore sequences. Memory: a few tiles of codes, and Q (dims + N of one file) numbers.
        """
        if form not in FORMS:
            raise ValueError(f"form={form!r} is not known; choose one of {', '.join(FORMS)}")
        if k < 1 or rescore < k:
            raise ValueError(f"k={k!r} must be at least 1 and at most rescore={rescore!r}")
        if sequences is not None and count(sequences) != self.sequences:
            raise ValueError(
                f"sequences has {count(sequences)} rows, {self.sequences} were indexed: give the same corpus"
            )
        self._check(model)
        check(queries, model, "queries", asking=True)
        bits, buffers = self.about["bits"], Buffers()
        how = {"others": sequences, "batch_size": batch_size}
        refined = refined_by(refine, refine_on, model, self.factors, queries, self.about["damping"], **how)
        asked, norms = self._asked(model, queries, batch_size, refined)
        asked_fields = fields(asked, bits)
        nothing = torch.zeros(len(asked), 2, 0)
        values, rows = ends(nothing, nothing.long(), k)
        size = k if sequences is None else rescore
        for start, codes, about in self._shards():
            tiles = batch_rows(len(codes), max(TILE // codes.shape[1], 1))
            unscaled = torch.cat([products(codes[some], asked_fields, bits, buffers) for some in tiles], 1)
            found = Scores(unscaled * about[:, 1], about[:, 0], norms, (), self.sequences)
            both = found.form(form)[:, None].expand(-1, 2, -1)
            places = torch.arange(start, start + len(codes)).expand_as(both)
            values, rows = ends(torch.cat([values, both], 2), torch.cat([rows, places], 2), size)
        if sequences is None:
            return TopScores(values, rows, form, self.sequences, True, refined and refined.about)  # type: ignore[arg-type]
        return self._rescored(model, queries, sequences, rows, k, form, batch_size, refined or 0)

    def _rescored(self, model, queries, sequences, rows: Tensor, k: int, form, batch_size, refine) -> TopScores:
        together = rows[rows >= 0].unique()
        candidates = gather(sequences, together.tolist())
        wrong = row_digests(read_batch(candidates, slice(None))) != self._rows()[together.numpy()]
        if wrong.any():
            raise ValueError(
                f"row {int(together[wrong.argmax()])} of sequences is not the one that was indexed: give the same corpus, "
                "in the same order"
            )
        damping = self.about["damping"]
        how = {"corpus_size": self.sequences, "refine": refine}
        exact = score(model, self.factors, queries, candidates, damping, batch_size, **how)
        # A query sees its own candidates alone, so that its answer does not depend on what else is asked.
        own = torch.zeros(len(rows), len(together), dtype=torch.bool)
        own.scatter_(1, torch.searchsorted(together, rows.clamp(min=together[0])).flatten(1), True)
        values = exact.form(form)[:, None].expand(-1, 2, -1)
        places = torch.where(own, together, -1)[:, None].expand(-1, 2, -1)
        return TopScores(*ends(values, places, k), form, self.sequences, refinement=exact.refinement)

    def _asked(
        self, model: nn.Module, queries: Mapping[str, Tensor], batch_size: int, refined: Refined | None
    ) -> tuple[Tensor, Tensor]:
        """Projected whitened gradients of the queries float32 [Q, dims], and their norms [Q]."""
        features, parts = Features(model, self.factors, self.about["damping"]), []
        for rows in batch_rows(count(queries), batch_size):
            how = self.projection, self.about["bits"], self.about["dims"], refined
            parts.append(features.project(queries, rows, *how))
        norms = torch.cat([squares for _, squares in parts]).sqrt()
        check_norms(norms)
        return torch.cat([x for x, _ in parts]), norms if refined is None else refined.norms.float()

    def _shards(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(first row, codes uint8 [n, bytes], norms float32 [n, 2]) of every file, mapped, not read."""
        for part in self.about["shards"]:
            path, n = self.folder / part["name"], part["stop"] - part["start"]
            # Mode "c" never writes to the file; torch warns of arrays that it could not write to.
            codes = np.memmap(f"{path}.codes", np.uint8, "c").reshape(n, -1)
            norms = np.fromfile(f"{path}.norms", "<f4").astype(np.float32).reshape(n, 2)
            yield part["start"], torch.from_numpy(codes), torch.from_numpy(norms)

    def _rows(self) -> np.ndarray:
        """uint64 [N] by which sequences are recognised (`row_digests`)."""
        return np.concatenate(
            [np.fromfile(self.folder / f"{part['name']}.rows", "<u8") for part in self.about["shards"]]
        )

    def _check(self, model: nn.Module) -> None:
        if digest(model) != self.about["model"]:
            raise ValueError(
                f"{self.folder} indexes another model's weights: load that model, or build an index of this one"
            )


def recall(approximate: TopScores, exact: TopScores, k: int = 10) -> float:
    """Share of the exact k best at either end that are among the approximate k best, mean over queries and ends."""
    kept, true = approximate.sequences[..., :k], exact.sequences[..., :k]
    found = (true[..., :, None] == kept[..., None, :]).any(-1)
    return float(found[true >= 0].double().mean())


def _warned(index: Index) -> Index:
    """The index, once it is said which sequences' gradients are not finite."""
    bad = torch.cat([~about.isfinite().all(1) for *_, about in index._shards()]).nonzero().flatten()
    warn_of_unusable(len(bad), bad[:NAMED].tolist(), index.sequences)
    return index


def _write_shards(features, projection, plan, sequences, folder: Path, start: int, batch_size: int, progress) -> None:
    """Codes and norms of this rank's share of the sequences, whose first is row `start` of the index."""
    key, done = digest({n: plan[n] for n in plan if n not in ("shards", "sequences")}, start), 0
    own = shard(batch_rows(count(sequences), SHARD))
    to_do = sum(rows.stop - rows.start for rows in own)
    for rows in own:
        name = f"{start + rows.start:012}-{start + rows.stop:012}"
        if not _is_whole(folder, name, key):
            record = {"name": name, "start": start + rows.start, "stop": start + rows.stop, "key": key}
            with ExitStack() as stack:
                parts = {kind: stack.enter_context(whole(folder / f"{name}.{kind}")) for kind in KINDS}
                written = {kind: stack.enter_context(part.open("wb")) for kind, part in parts.items()}
                for some in batch_rows(rows.stop - rows.start, batch_size):
                    batch = slice(rows.start + some.start, rows.start + some.stop)
                    x, squares = features.project(sequences, batch, projection, plan["bits"], plan["dims"])
                    packed, scale = encode(x, plan["bits"])
                    written["codes"].write(packed.numpy().tobytes())
                    written["norms"].write(torch.stack([squares, scale], 1).numpy().astype("<f4").tobytes())
                    written["rows"].write(row_digests(read_batch(sequences, batch)).tobytes())
                    if progress:
                        progress(done + some.stop, to_do)
            record |= {kind: sha256(folder / f"{name}.{kind}") for kind in KINDS}
            _write_json(folder / f"{name}.json", record)
        done += rows.stop - rows.start
    barrier()


def _is_whole(folder: Path, name: str, key: str) -> bool:
    """Whether a killed call under this key has left this shard whole."""
    try:
        record = json.loads((folder / f"{name}.json").read_text())
        return record["key"] == key and all(sha256(folder / f"{name}.{k}") == record[k] for k in KINDS)
    except (OSError, ValueError, KeyError):
        return False


def _finish(folder: Path, about: dict, total: int) -> None:
    """Rank 0: take the records of new shards into the manifest, and let it appear."""
    if rank_and_size()[0] == 0:
        shards, start = list(about["shards"]), about["shards"][-1]["stop"] if about["shards"] else 0
        for rows in batch_rows(total - start, SHARD):
            name = f"{start + rows.start:012}-{start + rows.stop:012}"
            record = json.loads((folder / f"{name}.json").read_text())
            shards.append({k: record[k] for k in ("name", "start", "stop", *KINDS)})
        _write_json(folder / "index.json", about | {"shards": shards, "sequences": total})
        for path in [folder / "plan.json", *(folder / f"{part['name']}.json" for part in shards)]:
            path.unlink(missing_ok=True)
    barrier()


def _refuse_another(folder: Path, plan: dict) -> None:
    """Raise ValueError where the folder holds a finished or begun index that differs from the plan."""
    for name in ("index.json", "plan.json"):
        try:
            old = json.loads((folder / name).read_text())
        except (OSError, ValueError):
            continue
        old["corpora"] = old.get("corpora", [])[:1]
        if different := [NAMES.get(n, n) for n in plan if old.get(n) != plan[n]]:
            raise ValueError(
                f"{folder} holds an index of other {', '.join(different)}: give another folder, or delete this one first"
            )
        return


def _write_json(path: Path, content: dict) -> None:
    with whole(path) as part:
        part.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
