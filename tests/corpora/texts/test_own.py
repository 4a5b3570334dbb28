"""A reader's own model and texts: what is read of them, and one clear line for each thing that can be missing."""

import json
import shutil

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from influence_kit.corpora.texts.own import (
    AT_ONCE,
    check_model,
    in_pieces,
    model_source,
    own_text,
    own_tokenizer,
)
from influence_kit.corpora.tokens import check_vocabulary
from influence_kit.errors import UserError
from influence_kit.reading.words import tokenizer_texts

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


def read(model, texts, length=64):
    """What a chapter does: the texts, their sequences in the model's tokens, and the text of each token of a row."""
    config, tokenizer = check_model(model_source(str(model)))
    found = own_text(str(texts))
    ids, mask, of = in_pieces(tokenizer, found["text"].to_pylist(), length, tokenizer.bos_token_id)
    check_vocabulary(ids, config.vocab_size)
    json_of = tokenizer.backend_tokenizer.to_str()
    return found, ids, mask, of, [tokenizer_texts(row[: mask[i].sum() + 1], json_of) for i, row in enumerate(ids)]


def test_sequences_are_the_texts_in_order_and_come_back_as_text(model, texts):
    found, _, mask, of, pieces = read(model, texts)
    assert found["text"].to_pylist() == ["".join(row) for row in pieces] == TEXTS
    assert found["source"].to_pylist() == ["notes.jsonl"] * len(TEXTS) and of.tolist() == list(range(len(TEXTS)))
    assert not mask[:, 0].any()  # no bos: nothing stands before the first token


def test_texts_begin_with_the_opening(model_with_bos, texts):
    assert {row[0] for row in read(model_with_bos, texts)[4]} == {"<s>"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"texts": " "}, "texts is empty"),
        ({"texts": "/no/such/folder"}, "texts='/no/such/folder': /no/such/folder does not exist"),
        ({"model": "/no/such/model"}, "model='/no/such/model': /no/such/model does not exist"),
        ({"length": 1}, "length is 1"),
    ],
)
def test_wrong_parameters_end_in_one_line(model, texts, changes, message):
    with pytest.raises(UserError, match=message) as caught:
        read(**{"model": model, "texts": texts} | changes)
    assert "\n" not in str(caught.value)


def test_a_folder_without_texts(model, tmp_path):
    (tmp_path / "picture.png").write_bytes(b"no text")
    with pytest.raises(UserError, match="found no .txt, .jsonl or .parquet file"):
        read(model, tmp_path)
    (tmp_path / "short.txt").write_text("x")
    assert len(read(model, tmp_path)[1]) == 0  # nothing can be predicted


def test_paths_start_from_where_one_stands_and_a_mistyped_one_is_answered_with_what_is_near(
    model, texts, tmp_path, monkeypatch
):
    shutil.copytree(model, tmp_path / "models" / "harbour")
    shutil.copy(texts, tmp_path / "notes.jsonl")
    monkeypatch.chdir(tmp_path)
    assert own_text("notes.jsonl")["text"].to_pylist() == TEXTS
    assert model_source("models/harbour") == f"{tmp_path}/models/harbour"
    monkeypatch.chdir("/")
    monkeypatch.setenv("INFLUENCE_KIT_CWD", str(tmp_path))  # a run computes elsewhere than where it was called
    assert read("models/harbour", "notes.jsonl")[0]["text"].to_pylist() == TEXTS
    for mistyped in ("models/harbor", "modls/harbour", "./models/no", "models/other"):
        with pytest.raises(UserError, match=f"{tmp_path}/.* does not exist") as caught:
            read(mistyped, "notes.jsonl")
        assert ("(there is" in str(caught.value)) == (mistyped in ("models/harbor", "modls/harbour"))
    with pytest.raises(UserError, match=rf"notes.json does not exist \(there is {tmp_path}/notes.jsonl\)"):
        read("models/harbour", "notes.json")


def test_a_name_that_is_neither_here_nor_to_be_had_is_refused_at_once(texts, tmp_path, monkeypatch):
    import huggingface_hub

    def unreachable(self, name, timeout):
        raise OSError("Name or service not known")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match=rf"model='gpt-nowhere': {tmp_path}/gpt-nowhere does not exist, and as a hub name .*Name or"
    ):
        read("gpt-nowhere", texts)


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
    "long.txt": (b"harbour " * 60_000, ("harbour " * 60_000).strip()),
    "one-word.jsonl": (b'{"text": "' + b"x" * 500_000 + b'"}', "x" * 500_000),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_text_is_read_as_it_is(model, tmp_path, name):
    content, expected = HOSTILE[name]
    (tmp_path / name).write_bytes(content)
    found, _, _, of, pieces = read(model, tmp_path)
    assert found["text"][0].as_py() == expected
    shown = "".join("".join(row) for row, text in zip(pieces, of) if text == 0)
    assert shown == expected or "\ufffd" in shown  # a character may stand on both sides of a cut


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
        read(model, tmp_path)
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
        read(tmp_path / "model", texts)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("architecture", ["gpt_neox", "llama", "gpt2"])
def test_a_model_without_its_tokenizer(architecture, texts, tmp_path):
    save_model(tmp_path, 300, architecture)
    with pytest.raises(UserError, match=r"no tokenizer.*save_pretrained"):
        read(tmp_path, texts)


def test_a_folder_that_is_no_model(texts, tmp_path):
    with pytest.raises(UserError, match="no configuration that can be loaded"):
        read(tmp_path, texts)
    with pytest.raises(UserError, match="is a file"):
        read(texts, texts)


def test_a_tokenizer_of_another_model(model, texts, tmp_path):
    shutil.copytree(model, tmp_path, dirs_exist_ok=True)
    save_model(tmp_path, 100)
    with pytest.raises(UserError, match="the model's vocabulary has 100 tokens"):
        read(tmp_path, texts)


# --- long texts in pieces


@pytest.mark.parametrize("opening", [None, 7])
def test_a_long_text_is_several_sequences_of_equal_length_that_hold_all_of_it(model_with_bos, opening):
    tokenizer = own_tokenizer(model_with_bos)
    long = "The harbour lies north of the old town. " * 20
    ids, mask, of = in_pieces(tokenizer, ["", TEXTS[0], long], 16, opening)
    begins = opening is not None
    assert not mask[:, 0].any() and (not begins or (ids[:, 0] == opening).all())
    lengths = mask.sum(1) + 1 - begins
    assert of.tolist() == sorted(of.tolist()) and lengths[of == 2].max() - lengths[of == 2].min() <= 1
    for number, text in ((1, TEXTS[0]), (2, long)):
        parts = [row[begins : begins + n] for row, n in zip(ids[of == number], lengths[of == number])]
        assert tokenizer.decode(np.concatenate(parts)) == text
    assert 0 not in of  # of an empty text nothing is left


def test_a_text_without_white_space_is_cut_and_nothing_is_lost(model):
    tokenizer, text = own_tokenizer(model), "x" * (2 * AT_ONCE + 5)
    ids, mask, _ = in_pieces(tokenizer, [text], 64, None)
    assert "".join(tokenizer.decode(row[: n + 1]) for row, n in zip(ids, mask.sum(1))) == text
    with pytest.raises(UserError, match="length is 1"):
        in_pieces(tokenizer, [text], 1, None)


def test_five_megabytes_on_a_line_are_cut(model):
    ids, _, _ = in_pieces(own_tokenizer(model), ["harbour " * 650_000], 128, None)
    assert len(ids) > 1000


# --- packed weights


def packed_tensor(folder):
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("dense_4h_to_h.weight"))
    tensors[name] = torch.zeros(8, 64, dtype=torch.uint8)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def packed_config(folder):
    about = json.loads((folder / "config.json").read_text())
    about["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(about))


@pytest.mark.parametrize(
    ("harm", "told"), [(packed_tensor, r"dense_4h_to_h.weight is U8"), (packed_config, "bitsandbytes, load_in_4bit")]
)
def test_packed_weights_are_refused_by_name(model, tmp_path, harm, told):
    shutil.copytree(model, tmp_path / "model")
    assert check_model(str(tmp_path / "model"))[0].vocab_size
    harm(tmp_path / "model")
    with pytest.raises(UserError, match=rf"packed weights \(.*{told}.*save it unpacked") as caught:
        check_model(str(tmp_path / "model"))
    assert "\n" not in str(caught.value)
