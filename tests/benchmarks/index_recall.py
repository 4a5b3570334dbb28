"""How much of the exact ranking an index finds, by bytes a sequence, and what it costs.

    python tests/benchmarks/index_recall.py                                       # the laptop profile's middle size
    python tests/benchmarks/index_recall.py --widths 32 128 --bytes 8192 --corpora text
    python tests/benchmarks/index_recall.py --profile smoke --sequences 1000 --queries 10 --rows 5000

Models and worlds come from the project's own stages: from the cache, or made there first (minutes to tens of minutes).
Real text that cannot be reached is left out, with a line that says so. Factors are fitted anew on 1,000 sequences;
indexes go to a temporary folder. Prints a Markdown table; --readme also puts it into README.md. Not a test: run by hand on an
idle machine.

Recall: share of the exact 10 best at either end found, mean over queries and ends (queries asked together see their own
candidates alone). The cost of a query is that of reading an index of 100,000 sequences (the built one repeated) that the page cache holds, without
rescoring, for one query alone and for five together. Build / scan: time of `build_index` over that of `score` for all queries.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from rivals import processor

from influence_kit import fit_ekfac, score
from influence_kit.corpora.world import World, batch_of
from influence_kit.engine import index
from influence_kit.engine.index import Index, build_index, recall
from influence_kit.engine.scores import TopScores, ends
from influence_kit.errors import UserError
from influence_kit.findings.common import scan_rows, scored_queries
from influence_kit.findings.families import planted_grid, text_grid
from influence_kit.findings.profiles import load_profile
from influence_kit.models import load
from influence_kit.publishing.readme import fill
from influence_kit.runner.stages import ensure

HEAD = "corpus | model | sequences | bytes asked | bytes taken | bits | coordinates kept | recall@10, rescored 100 | recall@10, not rescored"
COST = "s a query of {rows:,} (1 alone) | s a query (5 together) | build / scan"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="laptop")
    parser.add_argument("--corpora", nargs="+", choices=["atlas", "text"], default=["atlas", "text"])
    parser.add_argument("--widths", nargs="+", type=int, help="of the profile's models; default its middle one")
    parser.add_argument("--bytes", nargs="+", type=int, default=[1024, 2048, 4096, 8192])
    parser.add_argument("--sequences", type=int, default=4000)
    parser.add_argument("--queries", type=int, default=50)
    parser.add_argument("--rows", type=int, default=100_000, help="sequences of the index that queries are timed on")
    parser.add_argument("--seed", type=int, help="one of the profile's; default its first")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--readme", action="store_true", help="also put the table into README.md")
    return parser.parse_args()


def exact_ends(values: torch.Tensor, k: int) -> TopScores:
    """Both ends of exact scores [Q, N]."""
    both = values[:, None].expand(-1, 2, -1)
    return TopScores(*ends(both, torch.arange(values.shape[1]).expand_as(both), k), "raw", values.shape[1])


def repeated(small: Index, rows: int, folder: Path) -> Index:
    """An index of `rows` sequences: the same ones again and again, in files of their own."""
    codes, norms = ([part.numpy() for _, *parts in small._shards() for part in parts[i : i + 1]] for i in (0, 1))
    one = {"codes": np.concatenate(codes), "norms": np.concatenate(norms)}
    shards = []
    for start in range(0, rows, index.SHARD):
        stop = min(start + index.SHARD, rows)
        name = f"{start:012}-{stop:012}"
        taken = np.arange(start, stop) % small.sequences
        for kind, content in one.items():
            content[taken].tofile(folder / f"{name}.{kind}")
        shards.append({"name": name, "start": start, "stop": stop, "codes": "", "norms": ""})
    for name in small.about["files"]:
        shutil.copy(small.folder / name, folder / name)
    (folder / "index.json").write_text(json.dumps(small.about | {"shards": shards, "sequences": rows}))
    return Index.open(folder, verify=False)


def seconds(call) -> float:
    """The fastest of five calls: the first ones bring the index into the page cache."""
    times = []
    for _ in range(5):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return min(times)


def measure(asked: argparse.Namespace, trained) -> Iterator[str]:
    """The table's lines for one model."""
    folder = ensure(trained.world)
    world, model = World.load(folder), load(ensure(trained.model))
    rng = np.random.default_rng(0)
    total = world.sequences.num_rows
    fitting = batch_of(world.sequences, np.sort(rng.permutation(total)[:1000]))
    rows = scan_rows(world, total, rng)
    corpus = batch_of(world.sequences, np.sort(rng.permutation(rows)[: asked.sequences]))
    chosen = scored_queries(world)
    if trained.corpus == "atlas":  # facts, not canaries
        chosen = chosen[world.queries["kind"].to_numpy(zero_copy_only=False)[chosen] == "fact"]
    queries = batch_of(world.queries, np.sort(rng.permutation(chosen)[: asked.queries]))
    few = {name: tensor[:5] for name, tensor in queries.items()}
    one = {name: tensor[:1] for name, tensor in queries.items()}
    factors = fit_ekfac(model, fitting, seed=11)
    coordinates = sum(layer.eigenvalues.numel() for layer in factors.layers.values())
    started = time.perf_counter()
    exact = score(model, factors, queries, corpus)
    scan, best = time.perf_counter() - started, exact_ends(exact.values, 10)
    for limit in asked.bytes:
        with tempfile.TemporaryDirectory() as place:
            built, large = Path(place, "index"), Path(place, "repeated")
            large.mkdir()
            started = time.perf_counter()
            small = build_index(model, factors, corpus, built, bytes_per_sequence=limit)
            build = time.perf_counter() - started
            quick = small.query(model, queries, 10)
            careful = small.query(model, queries, 10, sequences=corpus, rescore=100)
            cells = [trained.corpus, f"{trained.size.width}x{trained.size.depth}", f"{small.sequences:,}", f"{limit:,}"]
            kept = len(small.projection["kept"])
            cells += [f"{small.bytes_per_sequence:,}", str(small.about["bits"]), f"{kept:,} of {coordinates:,}"]
            cells += [f"{recall(careful, best):.3f}", f"{recall(quick, best):.3f}"]
            if asked.rows:
                many = repeated(small, asked.rows, large)
                cells.append(f"{seconds(lambda many=many: many.query(model, one, 10)):.2f}")
                cells.append(f"{seconds(lambda many=many: many.query(model, few, 10)) / len(few['input_ids']):.2f}")
            else:
                cells += ["", ""]
            yield f"| {' | '.join([*cells, f'{build / scan:.2f}'])} |"


def table(asked: argparse.Namespace) -> Iterator[str]:
    """The Markdown table, line by line."""
    profile = load_profile(asked.profile)
    seeds = [profile.seeds[0] if asked.seed is None else asked.seed]
    head = f"{HEAD} | {COST.format(rows=asked.rows)}"
    yield f"{asked.queries} queries, {asked.threads} thread{'s' * (asked.threads > 1)}, {processor()}, torch {torch.__version__}"
    yield ""
    yield f"| {head} |"
    yield f"|{' --- |' * len(head.split(' | '))}"
    for corpus in asked.corpora:
        sizes = (profile.atlas if corpus == "atlas" else profile.text or profile.atlas).family.sizes
        widths = asked.widths or [sizes[len(sizes) // 2].width]
        if corpus == "text" and profile.text is None:
            yield f"| text left out: profile {profile.name} has none |"
            continue
        try:
            narrowed = {"widths": widths, "seeds": seeds}
            text = corpus == "text"
            for trained in text_grid(profile, **narrowed) if text else planted_grid(profile, corpus, **narrowed):
                yield from measure(asked, trained)
        except UserError as error:
            yield f"| {corpus} left out: {error} |"


def main() -> None:
    asked = arguments()
    torch.set_num_threads(asked.threads)
    lines = []
    for line in table(asked):
        print(line, flush=True)
        lines.append(line)
    if asked.readme:
        readme = Path(__file__).resolve().parents[2] / "README.md"
        readme.write_text(fill(readme.read_text(), {"index": "\n".join(lines) + "\n"}))


if __name__ == "__main__":
    main()
