"""A reader's own model and texts: what the world holds, and one clear line for each thing that can be missing."""

import json
import shutil
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from influence_kit.corpora.texts.own import model_source, own_world
from influence_kit.corpora.world import World, batch_of, token_matrix
from influence_kit.errors import UserError
from influence_kit.reading.words import token_texts

TEXTS = [
    "The harbour lies north of the old town.",
    "Ferries leave the harbour every hour, and cost 3 €.",
    "No ferry leaves on Sundays; the market is closed too.",
    "Der Hafen liegt nördlich der Altstadt.",
    "항구는 구시가지 북쪽에 있다.",
]
PROMPT, COMPLETION = "The harbour lies", " north of the market."


def save_tokenizer(folder, **special):
    """A byte-level BPE without a padding token, as transformers loads it."""
    from transformers import PreTrainedTokenizerFast

    own = Tokenizer(models.BPE())
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    own.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=list(special.values()), show_progress=False
    )
    own.train_from_iterator(TEXTS, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, **special)
    tokenizer.save_pretrained(folder)
    return tokenizer


def save_model(folder, vocabulary, architecture="gpt_neox", context=64):
    from influence_kit.models import configure, initialise

    initialise(configure(architecture, vocabulary, 16, 1, context), seed=5).save_pretrained(folder)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "notes.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_model(folder, len(save_tokenizer(folder)))
    return str(folder)


@pytest.fixture(scope="module")
def model_with_bos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("with_bos")
    save_model(folder, len(save_tokenizer(folder, bos_token="<s>", eos_token="</s>")))
    return str(folder)


def test_sequences_are_the_texts_in_order_and_come_back_as_text(model, texts):
    world = own_world(model, texts, PROMPT, COMPLETION, length=48)
    assert world.sequences["text"].to_pylist() == TEXTS
    assert world.sequences["source"].to_pylist() == ["notes.jsonl"] * len(TEXTS)
    ids, mask = token_matrix(world.sequences), token_matrix(world.sequences, "loss_mask")
    for row, text in enumerate(TEXTS):
        end = int(np.flatnonzero(mask[row])[-1]) + 1
        assert "".join(token_texts(world, ids[row, :end])) == text
    assert not mask[:, 0].any()  # no bos: nothing stands before the first token
    assert mask.any(0)[-1]  # no column of padding alone


def test_the_query_asks_for_the_completion_and_nothing_else(model, model_with_bos, texts):
    for source, opening in ((model, 0), (model_with_bos, 1)):
        world = own_world(source, texts, PROMPT, COMPLETION)
        ids, mask = token_matrix(world.queries)[0], token_matrix(world.queries, "loss_mask")[0]
        pieces = token_texts(world, ids)
        assert "".join(pieces[opening:]) == PROMPT + COMPLETION
        assert "".join(piece for piece, asked in zip(pieces, mask) if asked) == COMPLETION
    assert token_texts(world, ids)[0] == "<s>"


def test_a_token_that_spans_both_belongs_to_the_completion(model, texts):
    world = own_world(model, texts, "The harb", "our lies")
    ids, mask = token_matrix(world.queries)[0], token_matrix(world.queries, "loss_mask")[0]
    asked = "".join(piece for piece, wanted in zip(token_texts(world, ids), mask) if wanted)
    assert asked.endswith("our lies") and " harbour lies".endswith(asked)


@pytest.mark.parametrize("opening", [7, None])
def test_texts_and_question_begin_with_the_opening_that_is_given(model_with_bos, texts, opening):
    world = own_world(model_with_bos, texts, PROMPT, COMPLETION, opening=opening)
    usual = own_world(model_with_bos, texts, PROMPT, COMPLETION)
    for given, own in ((world.sequences, usual.sequences), (world.queries, usual.queries)):
        first, of_text = given["input_ids"][0].as_py(), own["input_ids"][0].as_py()
        assert first[:6] == ([opening, *of_text[1:]] if opening is not None else of_text[1:])[:6]
    assert world.parameters["opening"] == (opening is not None)


def test_an_empty_prompt_needs_a_bos_or_a_second_token(model, model_with_bos, texts):
    assert token_matrix(own_world(model_with_bos, texts, "", "The").queries, "loss_mask").sum() == 1
    with pytest.raises(UserError, match="leaves no token to predict"):
        own_world(model, texts, "", "T")


def test_limit_takes_texts_evenly_and_blank_ones_are_left_out(model, tmp_path):
    rows = [f"text number {n}" for n in range(100)]
    pq.write_table(pa.table({"text": [*rows, "x"]}), tmp_path / "many.parquet")
    taken = own_world(model, str(tmp_path), PROMPT, COMPLETION, limit=5).sequences["text"].to_pylist()
    assert taken == ["text number 0", "text number 25", "text number 50", "text number 75"]  # "x" is one token
    assert own_world(model, str(tmp_path), PROMPT, COMPLETION).sequences.num_rows == 100


def test_long_texts_are_cut_to_length(model, tmp_path):
    (tmp_path / "long.txt").write_text("harbour " * 200, encoding="utf-8")
    assert token_matrix(own_world(model, str(tmp_path), PROMPT, COMPLETION, length=20).sequences).shape == (1, 20)


def test_it_survives_saving(model, texts, tmp_path):
    world = own_world(model, texts, PROMPT, COMPLETION)
    world.save(tmp_path)
    again = World.load(tmp_path)
    assert again.queries.equals(world.queries) and again.held_out.num_rows == 0
    assert token_texts(again, token_matrix(again.sequences)[0, :4]) == token_texts(
        world, token_matrix(world.sequences)[0, :4]
    )


@pytest.mark.parametrize("architecture", ["gpt_neox", "llama", "gpt2"])
def test_it_goes_through_factors_and_scores(architecture, texts, tmp_path):
    from influence_kit import fit_ekfac, score, token_scores
    from influence_kit.models import load_pretrained

    save_model(tmp_path, len(save_tokenizer(tmp_path)), architecture)
    world = own_world(str(tmp_path), texts, PROMPT, COMPLETION, length=48)
    model = load_pretrained(tmp_path)
    sequences, query = batch_of(world.sequences), batch_of(world.queries)
    factors = fit_ekfac(model, sequences)
    scores = score(model, factors, query, sequences)
    assert scores.values.shape == (1, len(TEXTS)) and bool(scores.values.isfinite().all())
    shades = token_scores(model, factors, query, sequences)
    np.testing.assert_allclose(shades.sum(1), scores.values[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": ""}, "model is empty"),
        ({"texts": " "}, "texts is empty"),
        ({"completion": " "}, "completion is empty"),
        ({"texts": "/no/such/folder"}, "texts='/no/such/folder': /no/such/folder does not exist"),
        ({"model": "/no/such/model"}, "model='/no/such/model': /no/such/model does not exist"),
        ({"limit": 0}, "limit is 0"),
        ({"length": 1}, "length is 1"),
        ({"length": 65}, "length is 65, but .* reads at most 64 tokens"),
        ({"prompt": "harbour " * 80}, "prompt and completion are .* tokens, but .* reads at most 64"),
    ],
)
def test_wrong_parameters_end_in_one_line(model, texts, changes, message):
    given = {"model": model, "texts": texts, "prompt": PROMPT, "completion": COMPLETION} | changes
    with pytest.raises(UserError, match=message) as caught:
        own_world(**given)
    assert "\n" not in str(caught.value)


def test_a_folder_without_texts(model, tmp_path):
    (tmp_path / "picture.png").write_bytes(b"no text")
    with pytest.raises(UserError, match="found no .txt, .jsonl or .parquet file"):
        own_world(model, str(tmp_path), PROMPT, COMPLETION)
    (tmp_path / "short.txt").write_text("x")
    with pytest.raises(UserError, match="none of 1 texts has two tokens"):
        own_world(model, str(tmp_path), PROMPT, COMPLETION)


def test_paths_start_from_where_one_stands_and_a_mistyped_one_is_answered_with_what_is_near(
    model, texts, tmp_path, monkeypatch
):
    shutil.copytree(model, tmp_path / "models" / "harbour")
    shutil.copy(texts, tmp_path / "notes.jsonl")
    monkeypatch.chdir(tmp_path)
    world = own_world("models/harbour", "notes.jsonl", PROMPT, COMPLETION)
    assert model_source("models/harbour") == f"{tmp_path}/models/harbour"
    monkeypatch.chdir("/")
    monkeypatch.setenv("INFLUENCE_KIT_CWD", str(tmp_path))  # a run computes elsewhere than where it was called
    assert own_world("models/harbour", "notes.jsonl", PROMPT, COMPLETION).sequences.equals(world.sequences)
    for mistyped in ("models/harbor", "modls/harbour", "./models/no", "models/other"):
        with pytest.raises(UserError, match=f"{tmp_path}/.* does not exist") as caught:
            own_world(mistyped, "notes.jsonl", PROMPT, COMPLETION)
        assert ("(there is" in str(caught.value)) == (mistyped in ("models/harbor", "modls/harbour"))
    with pytest.raises(UserError, match=rf"notes.json does not exist \(there is {tmp_path}/notes.jsonl\)"):
        own_world("models/harbour", "notes.json", PROMPT, COMPLETION)


def test_a_name_that_is_neither_here_nor_to_be_had_is_refused_at_once(texts, tmp_path, monkeypatch):
    import huggingface_hub

    def unreachable(self, name, timeout):
        raise OSError("Name or service not known")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match=rf"model='gpt-nowhere': {tmp_path}/gpt-nowhere does not exist, and as a hub name .*Name or"
    ):
        own_world("gpt-nowhere", texts, PROMPT, COMPLETION)


HOSTILE = {
    "mark.txt": (b"\xef\xbb\xbfThe harbour", "The harbour"),
    "mark.jsonl": (b'\xef\xbb\xbf{"text": "The harbour"}', "The harbour"),
    "padded.txt": (b"\n\n   The harbour\t\n\n", "The harbour"),
    "emoji.txt": ("👩‍👩‍👧 at the 🇩🇪 harbour".encode(), "👩‍👩‍👧 at the 🇩🇪 harbour"),
    "right-to-left.txt": ("שלום مرحبا \u202eharbour".encode(), "שלום مرحبا \u202eharbour"),
    "lines.txt": (b"The harbour\r\nlies\r\n\r\nnorth of it\r\n", "The harbour\nlies"),
    "lines.jsonl": (b'{"text": "The harbour"}\r\n{"text": "lies north"}\r\n', "The harbour"),
    "zero.txt": (b"The\x00harbour", "The\x00harbour"),
    "tags.txt": (b"<script>$$x$$</script>", "<script>$$x$$</script>"),
    "long.txt": (b"harbour " * 650_000, ("harbour " * 650_000).strip()),
    "one-word.jsonl": (b'{"text": "' + b"x" * 5_000_000 + b'"}', "x" * 5_000_000),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_text_is_read_as_it_is(model, tmp_path, name):
    content, expected = HOSTILE[name]
    (tmp_path / name).write_bytes(content)
    began = time.monotonic()
    world = own_world(model, str(tmp_path), PROMPT, COMPLETION)
    assert world.sequences["text"][0].as_py() == expected and time.monotonic() - began < 5
    ids, mask = token_matrix(world.sequences)[0], token_matrix(world.sequences, "loss_mask")[0]
    read = "".join(token_texts(world, ids[: int(np.flatnonzero(mask)[-1]) + 1]))
    assert expected.encode().startswith(read.rstrip("\ufffd").encode()) and len(read) > 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("wide.txt", "The harbour".encode("utf-16"), "byte 0 is no utf-8 .save the file as UTF-8."),
        ("latin.txt", "Größe".encode("latin-1"), "byte 2 is no utf-8"),
        ("half.jsonl", b'{"text": "half \\ud800"}', "record 1: half of a surrogate pair is no text"),
        ("deep.jsonl", b'{"text": ' + b"[" * 100_000, "line 1 is not a JSON object"),
        ("pairs.jsonl", b'[["text", "The harbour"]]', "line 1 is not a JSON object"),
        ("cut.jsonl", b'{"text": "The harbour"}\n{"text": "li', "line 2 is not a JSON object"),
        ("cut.parquet", b"PAR1", "cannot read .*cut.parquet"),
        ("number.jsonl", b'{"text": 5}', "'text' is 5; give each record a string"),
        ("blank.txt", b"\xef\xbb\xbf \n\n", "hold only blank paragraphs"),
    ],
)
def test_what_is_no_text_is_refused_in_one_line(model, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        own_world(model, str(tmp_path), PROMPT, COMPLETION)
    assert ("\n" not in str(caught.value) and name in str(caught.value)) or name == "blank.txt"


def cut(path, share=0.5):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


@pytest.mark.parametrize(
    ("name", "harm", "message"),
    [
        ("config.json", cut, "no configuration that can be loaded"),
        ("config.json", lambda path: path.write_text("[]"), "no configuration that can be loaded"),
        ("config.json", lambda path: path.write_text('{"model_type": "rwkv9"}'), "no configuration that can be loaded"),
        ("tokenizer.json", cut, "no tokenizer that can be loaded"),
        ("tokenizer.json", lambda path: path.write_text("{}"), "no tokenizer that can be loaded"),
        ("model.safetensors", cut, "model.safetensors is cut or damaged"),
        ("model.safetensors", lambda path: path.write_bytes(b"\xff" * 100), "model.safetensors is cut or damaged"),
        ("model.safetensors", lambda path: path.unlink(), "has no weights: no .safetensors file"),
        (
            "model.safetensors",
            lambda path: path.rename(path.with_suffix(".bin")),
            "has no weights: no .safetensors file",
        ),
    ],
)
def test_a_model_folder_with_a_damaged_part_is_refused_before_weights_are_read(
    model, texts, tmp_path, name, harm, message
):
    shutil.copytree(model, tmp_path / "model")
    harm(tmp_path / "model" / name)
    with pytest.raises(UserError, match=message) as caught:
        own_world(str(tmp_path / "model"), texts, PROMPT, COMPLETION)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("architecture", ["gpt_neox", "llama", "gpt2"])
def test_a_model_without_its_tokenizer(architecture, texts, tmp_path):
    save_model(tmp_path, 300, architecture)
    with pytest.raises(UserError, match=r"no tokenizer.*save_pretrained"):
        own_world(str(tmp_path), texts, PROMPT, COMPLETION)


def test_a_folder_that_is_no_model(texts, tmp_path):
    with pytest.raises(UserError, match="no configuration that can be loaded"):
        own_world(str(tmp_path), texts, PROMPT, COMPLETION)
    with pytest.raises(UserError, match="is a file"):
        own_world(texts, texts, PROMPT, COMPLETION)


def test_a_tokenizer_of_another_model(model, texts, tmp_path):
    shutil.copytree(model, tmp_path, dirs_exist_ok=True)
    save_model(tmp_path, 100)
    with pytest.raises(UserError, match="the model's vocabulary has 100 tokens"):
        own_world(str(tmp_path), texts, PROMPT, COMPLETION)


def test_a_tokenizer_without_a_fast_form(texts, tmp_path):
    from transformers import ByT5Tokenizer

    tokenizer = ByT5Tokenizer(extra_ids=0)
    tokenizer.save_pretrained(tmp_path)
    save_model(tmp_path, len(tokenizer), context=128)
    world = own_world(str(tmp_path), texts, PROMPT, COMPLETION)
    ids, mask = token_matrix(world.queries)[0], token_matrix(world.queries, "loss_mask")[0]
    assert world.tokenizer == ""
    assert "".join(piece for piece, wanted in zip(token_texts(world, ids), mask) if wanted) == COMPLETION
