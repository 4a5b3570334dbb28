"""Glosses: German of Atlas word for word, paragraphs by their pair, nothing where nothing is known."""

import numpy as np
import pyarrow as pa

from influence_kit.corpora.world import World, token_columns, token_matrix
from influence_kit.corpora.worlds.atlas import Atlas, build
from influence_kit.reading.glosses import in_english
from influence_kit.reading.words import token_texts

SMALL = {"entities": 24, "values": 60, "documents": 12_000, "queries": 6, "canaries": 1, "held_out": 50}


def test_atlas_is_told_word_for_word():
    world = build(Atlas(**SMALL))
    language = world.sequences["language"].to_pylist()
    english, german = language.index(0), language.index(1)
    assert in_english(world, world.sequences, english) == in_english(world, world.sequences, language.index(-1)) == ""
    told = in_english(world, world.sequences, german).split(" ")
    words = token_texts(world, token_matrix(world.sequences)[german].tolist())[1:]
    assert len(told) == len(words) and told[5] == "." and words[5] == "!" and told[1] == words[1]
    ids = {word: token for token, word in enumerate(world.vocabulary)}
    values = world.queries.to_pandas().query("kind == 'fact' and language == 1")
    for row, prompt, completion in zip(values.index, values.prompt, values.completion):
        said = in_english(world, world.queries, int(row)).split(" ")
        assert len(said) == len(prompt.split()) + 1
        assert ids[said[-1]] == ids[completion] - 1  # a word and its translation lie beside each other


def test_paragraphs_are_told_by_their_pair():
    columns = token_columns(np.array([[1], [2], [3]]))
    told = {"pair_id": ["p", "p", "q"], "language": ["en-us", "ko", "ko"], "text": ["Open it.", "열기", "닫기"]}
    table = pa.table({**columns, **told})
    queries = table.slice(0, 1).rename_columns([{"text": "completion"}.get(name, name) for name in table.column_names])
    world = World("parallel", table, table, queries.slice(0, 0), (), "{}", {})
    assert [in_english(world, table, row) for row in range(3)] == ["", "Open it.", ""]
    asked = World("parallel", table.slice(1), table, queries, (), "{}", {})  # the English one is asked, not trained on
    assert in_english(asked, asked.sequences, 0) == "Open it."
    plain = pa.table(columns)
    assert in_english(World("own", plain, plain, plain, (), "{}", {}), plain, 0) == ""
