"""Dialogue as a world: held-out lines of known speakers, names given and never predicted; on lines made here."""

from collections import Counter

import numpy as np
import pyarrow as pa
import pytest

from influence_kit.corpora.texts.dialogue import Dialogue, build
from influence_kit.corpora.world import World, batch_of, token_matrix
from influence_kit.errors import UserError
from influence_kit.reading.words import token_texts

PARAMETERS = {"campaigns": ("one", "two"), "lines": 150, "held_out": 12, "queries": 10, "per_speaker": 3, "least": 8,
              "length": 20, "vocabulary": 330}  # fmt: skip
WORDS = "kettle lamp table garden miller letter copper morning lantern walk".split()


def lines() -> pa.Table:
    rng = np.random.default_rng(0)
    rows = []
    for campaign in ("one", "two", "three"):
        for number in range(100):
            speaker = ("narrator", "Orla", "Kai Odo", "Tamsin", "Bit")[
                0 if number < 20 else 1 + (number % 13 > 4) + (number % 13 > 9) + (number % 33 == 0)
            ]
            text = " ".join(rng.choice(WORDS, 4)) + f" {campaign} {number}."
            rows.append({"pair_id": f"{campaign}{number}", "language": "en", "text": text, "campaign": campaign,
                         "scenario": f"s{number // 25}", "speaker": speaker, "order": number,
                         "side": {"Orla": "1", "Kai Odo": "2", "Tamsin": "1", "Bit": "2"}.get(speaker, "")})  # fmt: skip
    return pa.Table.from_pylist(rows)


@pytest.fixture(scope="module", params=[True, False], ids=["named", "unnamed"])
def world(request):
    return build(Dialogue(**PARAMETERS, named=request.param), lines())


def test_queries_are_unseen_lines_of_speakers_who_say_enough(world):
    told = set(world.sequences["text"].to_pylist())
    of = Counter(zip(world.sequences["campaign"].to_pylist(), world.sequences["speaker"].to_pylist()))
    about = Dialogue(**PARAMETERS)
    assert (about.documents, about.length) == (world.sequences.num_rows, world.context)
    assert world.vocabulary_size <= about.words and not about.asks
    assert world.queries.num_rows == 10 and world.sequences.num_rows == 150 and world.held_out.num_rows == 12
    for row in world.queries.to_pylist():
        assert row["text"] not in told and row["speaker"] != "narrator" and row["campaign"] in ("one", "two")
        assert of[row["campaign"], row["speaker"]] >= 8
    assert max(Counter(zip(world.queries["campaign"].to_pylist(), world.queries["speaker"].to_pylist())).values()) <= 3
    assert not told & set(world.held_out["text"].to_pylist())


def test_what_is_said_is_the_target_and_the_name_is_not(world):
    for table in (world.sequences, world.held_out, world.queries):
        batch = batch_of(table)
        for ids, mask, row in zip(batch["input_ids"], batch["loss_mask"], table.to_pylist()):
            text = "".join(token_texts(world, ids[mask].tolist())).removesuffix("<eos>")
            assert f" {row['text']}".startswith(text) and (len(text) == len(row["text"]) + 1 or mask[-1])
            name = "".join(token_texts(world, ids[: int(mask.nonzero().min())].tolist())).removeprefix("<bos>")
            assert name == (f"{row['speaker']}:" if world.parameters["named"] else "")


def test_names_change_the_tokens_and_nothing_else():
    named, unnamed = (build(Dialogue(**PARAMETERS, named=name), lines()) for name in (True, False))
    for table in ("sequences", "held_out", "queries"):
        ours, theirs = getattr(named, table), getattr(unnamed, table)
        assert ours["text"].equals(theirs["text"]) and not ours["input_ids"].equals(theirs["input_ids"])
    assert named.tokenizer == unnamed.tokenizer


def test_same_seed_same_world_and_it_comes_back(tmp_path, world):
    again = build(Dialogue(**{**world.parameters, "campaigns": ("one", "two")}), lines())
    assert again.sequences.equals(world.sequences) and again.tokenizer == world.tokenizer
    world.save(tmp_path)
    assert World.load(tmp_path).queries.equals(world.queries)
    other = build(Dialogue(**PARAMETERS, seed=1), lines())
    assert not other.queries["text"].equals(world.queries["text"])
    assert token_matrix(world.sequences).shape[1] == world.parameters["length"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lines": 190}, "hold 200 lines, 212 are needed"),
        ({"least": 60}, "0 speakers have 63 lines or more"),
        ({"campaigns": ()}, "at least one"),
        ({"queries": 0}, "queries=0 must be 1 or more"),
    ],
)
def test_what_the_lines_cannot_give_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        build(Dialogue(**{**PARAMETERS, **change}), lines())
