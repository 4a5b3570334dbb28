"""Parallel text as a world: held-out queries, one translation each, nothing leaked; on sentences made here."""

import numpy as np
import pyarrow as pa
import pytest

from influence_kit.corpora.texts.parallel import ParallelText, aligned, build
from influence_kit.corpora.world import World, batch_of, token_matrix
from influence_kit.errors import UserError
from influence_kit.reading.words import token_texts

WORDS = {
    "en": "the open save file menu press button window close table".split(),
    "de": "die öffnen sichern datei menü drücken knopf fenster schließen tabelle".split(),
    "ko": "그 열기 저장 파일 메뉴 누르기 단추 창 닫기 표".split(),
}
PARAMETERS = {
    "languages": ("en", "de", "ko"),
    "pairs": 60,
    "held_out": 8,
    "queries": 5,
    "scan": 30,
    "length": 24,
    "vocabulary": 400,
}


def sentences() -> pa.Table:
    rng = np.random.default_rng(0)
    rows = []
    for pair in range(80):
        chosen = rng.integers(0, 10, 6)
        for language, words in WORDS.items():
            if language == "ko" and pair % 20 == 0:
                continue  # four pairs are missing in one language
            rows.append(
                {
                    "pair_id": f"p{pair:03d}",
                    "language": language,
                    "text": " ".join(words[i] for i in chosen) + f" {pair}",
                }
            )
    return pa.Table.from_pylist(rows)


@pytest.fixture(scope="module")
def world():
    return build(ParallelText(**PARAMETERS), sentences())


def test_a_query_is_never_trained_on_but_all_its_translations_are(world):
    trained = set(zip(world.sequences["pair_id"].to_pylist(), world.sequences["language"].to_pylist(), strict=True))
    asked = list(zip(world.queries["pair_id"].to_pylist(), world.queries["language"].to_pylist(), strict=True))
    about = ParallelText(**PARAMETERS)
    assert len(asked) == 15 and len(trained) == 60 * 3 - 15 == about.documents == world.sequences.num_rows
    assert world.context == about.length and world.vocabulary_size <= about.words and not about.asks
    for pair, language in asked:
        assert (pair, language) not in trained
        assert all((pair, other) in trained for other in WORDS if other != language)


def test_held_out_pairs_are_in_no_language(world):
    assert not set(world.held_out["pair_id"].to_pylist()) & set(world.sequences["pair_id"].to_pylist())
    assert world.held_out.num_rows == 24


def test_translations_are_found_in_the_scan(world):
    rows = np.flatnonzero(world.sequences["scan"].to_numpy(zero_copy_only=False))
    languages, pairs = (world.sequences[name].to_numpy(zero_copy_only=False)[rows] for name in ("language", "pair_id"))
    for language, place in aligned(world, rows).items():
        for query, (pair, asked) in enumerate(
            zip(world.queries["pair_id"].to_pylist(), world.queries["language"].to_pylist(), strict=True)
        ):
            if asked == language:
                assert place[query] == -1
            else:
                assert (pairs[place[query]], languages[place[query]]) == (pair, language)


def test_text_survives_the_tokens(world):
    batch = batch_of(world.sequences, [0, 50, 100])
    for ids, mask, text in zip(
        batch["input_ids"],
        batch["loss_mask"],
        world.sequences["text"].take(pa.array([0, 50, 100])).to_pylist(),
        strict=True,
    ):
        pieces = token_texts(world, ids[: int(mask.nonzero().max()) + 1].tolist())
        assert "".join(piece for piece in pieces if piece not in ("<bos>", "<eos>")) == text
    assert token_matrix(world.sequences).max() < world.vocabulary_size


def test_same_seed_same_world_and_it_comes_back(tmp_path, world):
    again = build(ParallelText(**PARAMETERS), sentences())
    assert again.sequences.equals(world.sequences) and again.tokenizer == world.tokenizer
    world.save(tmp_path)
    assert World.load(tmp_path).queries.equals(world.queries)
    other = build(ParallelText(**{**PARAMETERS, "seed": 1}), sentences())
    assert not other.queries.equals(world.queries)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pairs": 75}, "only 76 paragraphs exist in all"),
        ({"languages": ("en", "fr")}, "no paragraph in language 'fr'"),
        ({"languages": ("en",)}, "at least two"),
        ({"queries": 40}, "need scan and pairs of at least 120"),
    ],
)
def test_what_the_text_cannot_give_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        build(ParallelText(**{**PARAMETERS, **change}), sentences())
