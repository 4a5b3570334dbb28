"""Chapter 00: wrong answers are other answers of the same kind, and a reader's own texts are scored as by a direct call."""

import numpy as np
import pandas
import pytest
import torch

from influence_kit import fit_ekfac, score
from influence_kit.corpora.texts.own import own_world
from influence_kit.corpora.world import batch_of
from influence_kit.corpora.worlds.atlas import Atlas, build
from influence_kit.errors import UserError
from influence_kit.findings.profiles import load_profile
from influence_kit.findings.start_here import lifts, middling, places, reads, score_own, wrong_answers
from influence_kit.models import load_pretrained
from tests.corpora.texts.test_own import COMPLETION, PROMPT, TEXTS, save_model, save_tokenizer


def test_a_wrong_answer_is_another_answer_to_the_same_kind_of_question():
    parameters = {"entities": 12, "relations": 2, "values": 6, "documents": 300, "most_supporters": 100}
    world = build(Atlas(**parameters, canaries=1, repetitions=(1,), held_out=20, queries=6))
    queries = np.flatnonzero(world.queries["kind"].to_numpy(zero_copy_only=False) == "fact")
    asks = wrong_answers(world, queries)
    tokens = batch_of(world.queries, queries)
    assert tokens["loss_mask"].numpy()[range(len(asks)), asks["place"]].all()
    relation = asks["fact"] % 2
    for _, same in asks.groupby(["language", relation]):
        assert set(same["wrong"]) <= set(same["answer"])
        assert (same["wrong"] != same["answer"]).all() or same["answer"].nunique() == 1


def test_another_width_is_made_beforehand_and_one_that_no_model_has_is_refused():
    profile = load_profile("laptop")
    small, large = (planned.size.width for width in (0, 128) for planned in reads(profile, width))
    assert (small, large) == (32, 128)
    with pytest.raises(UserError, match=r"width=17 is not among the profile's models: choose one of \[16, 32"):
        reads(profile, 17)


def test_lifts_are_left_out_where_a_query_is_not_usable():
    values, member = np.arange(20.0)[None].repeat(2, 0), np.arange(20) >= 19
    found = lifts({"last": member}, {"up": values, "down": -values}, 3, np.array([True, False]))
    assert found["ranking"].tolist() == ["up", "up", "down", "down"] and found["lift"].fillna(-1).tolist() == [
        20,
        -1,
        0,
        -1,
    ]


def test_the_query_shown_is_known_by_half_and_stated_often():
    at_end = pandas.DataFrame({"language": [0, 0, 0, 1], "log_p": [-0.45, -0.6, -3.0, -0.5]})
    assert middling(at_end, np.arange(20)[None] < np.array([3, 12, 12, 12])[:, None]) == 1


def test_places_begin_at_the_highest():
    assert places(np.array([0.1, 0.5, 0.5, -1])).tolist() == [3, 1, 2, 4]


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    save_model(folder, len(save_tokenizer(folder, eos_token="<end>")))
    (folder / "texts.txt").write_text("\n\n".join(TEXTS * 3))
    return score_own(
        own_world(str(folder), str(folder / "texts.txt"), PROMPT, COMPLETION, 64, 500), load_pretrained(str(folder))
    )


def test_own_texts_are_scored_as_by_a_direct_call(own):
    texts, question = batch_of(own.world.sequences), batch_of(own.world.queries)
    direct = score(own.model, fit_ekfac(own.model, texts), question, texts)
    torch.testing.assert_close(own.scores.values, direct.values)
    assert own.overlap.shape == (own.world.sequences.num_rows,) and own.overlap[0] > 0
    assert f"{own.world.sequences.num_rows} texts scored" in own.words()
    assert "harbour" in own.card(2, "ours").html and "ours" in own.card(2, "ours").alt
