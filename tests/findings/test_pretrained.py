"""A model and a text from the user's own folders through the real stages, as the hub profile does with names."""

import json
import shutil

import numpy as np
import pytest
import yaml
from gguf_files import write_llama

from influence_kit import models
from influence_kit.errors import UserError
from influence_kit.findings import families as grid
from influence_kit.findings.cross_lingual import translation_ranks
from influence_kit.findings.profiles import FOLDER, load_profile
from influence_kit.findings.trained import Trained
from influence_kit.reading.words import token_texts

WORDS = {
    "en": "open save file menu press button window close".split(),
    "de": "öffnen sichern datei menü drücken knopf fenster schließen".split(),
}
COMMIT = "0123456789" * 4


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of parallel JSON lines, and a small model with a byte-level tokenizer that has no padding token."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from tokenizers.trainers import BpeTrainer
    from transformers import PreTrainedTokenizerFast

    home = tmp_path_factory.mktemp("own")
    rng = np.random.default_rng(0)
    lines = []
    for pair in range(60):
        chosen = rng.integers(0, 8, 6)
        for language, words in WORDS.items():
            lines.append({"pair_id": str(pair), "language": language, "text": " ".join(words[i] for i in chosen)})
    (home / "text").mkdir()
    (home / "text" / "pairs.jsonl").write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines))
    raw = Tokenizer(BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        [line["text"] for line in lines], BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw)
    assert tokenizer.pad_token is None
    tokenizer.save_pretrained(home / "model")
    models.initialise(models.configure("llama", 320, 16, 1, 32), 0).save_pretrained(home / "model")
    return home


def save_bloom(folders):
    """A random model of BLOOM's class, with the tokenizer of the other."""
    from transformers import BloomConfig, BloomForCausalLM

    shutil.copytree(folders / "model", folders / "bloom", ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    config = BloomConfig(vocab_size=320, hidden_size=16, n_layer=1, n_head=2, seq_length=32)
    models.torch.manual_seed(1)
    BloomForCausalLM(config).save_pretrained(folders / "bloom")


def profile_with(folders, tmp_path, **changes):
    content = yaml.safe_load((FOLDER / "smoke.yaml").read_text())
    world = {
        "languages": ["en", "de"],
        "pairs": 40,
        "held_out": 5,
        "queries": 6,
        "scan": 20,
        "length": 24,
        "vocabulary": 300,
    }
    family = {"sizes": [{"pretrained": str(folders / "model")}]}
    content["text"] = {
        "source": "folder",
        "folder": str(folders / "text"),
        "world": world,
        "family": family,
        "scan": {"fit": 30},
    } | changes
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(content))
    return load_profile(str(path))


def test_own_model_on_own_text(folders, tmp_path, monkeypatch):
    monkeypatch.setenv("INFLUENCE_KIT_CACHE", str(tmp_path / "cache"))
    (trained,) = grid.text_grid(profile_with(folders, tmp_path), (0.0, 1.0))
    run = Trained(trained)
    scan = run.scan()
    assert scan.raw.shape[0] == 12 and np.isfinite(scan.raw).all() and scan.raw.std() > 0
    assert not np.array_equal(run.scan(0.0).raw, scan.raw)  # untrained weights are others
    assert run.parameters == models.non_embedding_parameters(models.load_pretrained(folders / "model"))
    found = translation_ranks(run.world, scan.raw, scan.rows, k=3)
    assert len(found) == 12 and found["auc"].between(0, 1).all() and set(found["asked"]) == {"en", "de"}
    text = run.world.queries["completion"][0].as_py()
    ids, mask = (run.world.queries[name][0].as_py() for name in ("input_ids", "loss_mask"))
    assert "".join(token_texts(run.world, ids[: mask.index(True) + sum(mask)])) == text
    assert run.card(0, k=2).png[:4] == b"\x89PNG"


@pytest.mark.parametrize("name", ["text/pairs.jsonl", "model/model.safetensors"])
def test_a_file_of_equal_length_with_other_content_makes_other_stages(folders, tmp_path, name):
    copy = tmp_path / "own"
    shutil.copytree(folders, copy)

    def fingerprints():
        (trained,) = grid.text_grid(profile_with(copy, tmp_path))
        return {stage.fingerprint for stage in trained.stages}

    before, path = fingerprints(), copy / name
    content = path.read_bytes()
    path.write_bytes(content)
    assert fingerprints() == before  # times alone say nothing
    path.write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
    assert before != fingerprints()


def test_a_model_in_a_gguf_file_reads_with_the_opening_that_is_asked(folders, tmp_path, monkeypatch):
    monkeypatch.setenv("INFLUENCE_KIT_CACHE", str(tmp_path / "cache"))
    texts = [" ".join(words) for words in WORDS.values()]
    model, begun = write_llama(tmp_path / "tiny.gguf", texts, quantised=True), {}
    for opening in ("best", "none", 5):
        size = {"pretrained": str(tmp_path / "tiny.gguf"), "opening": opening}
        (planned,) = grid.text_grid(profile_with(folders, tmp_path, family={"sizes": [size]}))
        begun[opening] = Trained(planned).world
        about = begun[opening].parameters["begins"]
        firsts = {ids[0] for ids in begun[opening].sequences["input_ids"].to_pylist()}
        assert "Texts begin with" in about["said"] if about["token"] is not None else "no opening" in about["said"]
        assert firsts == {about["token"]} if about["token"] is not None else len(firsts) > 1
    assert begun[5].parameters["begins"]["token"] == 5 and begun["none"].parameters["begins"]["token"] is None
    assert len(begun["best"].parameters["begins"]["nats"]) == 3
    scan = Trained(planned).scan()
    assert np.isfinite(scan.raw).all() and scan.raw.std() > 0
    assert Trained(planned).parameters == models.non_embedding_parameters(model)


def test_a_model_of_a_hub_is_read_as_it_was_at_its_commit(folders, tmp_path, monkeypatch):
    import huggingface_hub

    asked = []

    def give(name, revision, local_dir, **patterns):
        asked.append((name, revision))
        shutil.copytree(folders / name.rpartition("/")[2], local_dir, dirs_exist_ok=True)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", give)
    monkeypatch.setenv("INFLUENCE_KIT_CACHE", str(tmp_path / "cache"))
    save_bloom(folders)
    sizes = [{"pretrained": f"harbour/{name}@{COMMIT}"} for name in ("model", "bloom")]
    there = grid.text_grid(profile_with(folders, tmp_path, family={"sizes": sizes}))
    sizes = [{"pretrained": str(folders / name)} for name in ("model", "bloom")]
    here = grid.text_grid(profile_with(folders, tmp_path, family={"sizes": sizes}))
    for one, other in zip(there, here, strict=True):
        scan = Trained(one).scan()
        assert np.array_equal(scan.raw, Trained(other).scan().raw) and scan.raw.std() > 0
        found = translation_ranks(Trained(one).world, scan.raw, scan.rows, k=3)
        assert found["auc"].between(0, 1).all()
    assert asked == [("harbour/model", COMMIT), ("harbour/bloom", COMMIT)]


@pytest.mark.parametrize(
    "size, said",
    [
        ({"pretrained": "wheel:some-model==1.0"}, "pretrained: .*needs sha256"),
        ({"pretrained": "wheel:some-model"}, "pretrained: .*NAME==VERSION"),
        ({"pretrained": "wheel:gemma-it==1.0", "sha256": "a" * 64}, "pretrained: .*Gemma Terms of Use"),
        ({"pretrained": "nowhere.gguf"}, r"pretrained: .*nowhere\.gguf does not exist"),
        ({"opening": "bes"}, "opening"),
        ({"pretrained": "harbour/tiny"}, "pretrained: model='harbour/tiny' names no commit.*write harbour/tiny@COMMIT"),
        ({"pretrained": "harbour/tiny@main"}, "pretrained: .*names no commit.*write harbour/tiny@COMMIT"),
        ({"pretrained": f"harbour/gemma@{COMMIT}"}, "pretrained: .*Gemma Terms of Use"),
    ],
)
def test_a_profile_is_refused_for_a_model_that_cannot_be_had(folders, tmp_path, size, said):
    with pytest.raises(UserError, match=said):
        profile_with(folders, tmp_path, family={"sizes": [size]})


def test_pretrained_models_have_no_path_and_no_atlas(folders, tmp_path):
    with pytest.raises(UserError, match=r"scan\.fractions must be empty"):
        profile_with(folders, tmp_path, scan={"fractions": [0.5]})
    content = yaml.safe_load((FOLDER / "smoke.yaml").read_text())
    content["atlas"]["family"]["sizes"] = [{"pretrained": str(folders / "model")}]
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match="pretrained models read real text only"):
        load_profile(str(path))


def test_a_model_that_is_not_there_ends_in_one_line(folders, tmp_path, monkeypatch):
    monkeypatch.setenv("INFLUENCE_KIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="pretrained: .*nothing does not exist") as error:
        profile_with(folders, tmp_path, family={"sizes": [{"pretrained": str(tmp_path / "nothing")}]})
    assert "\n" not in str(error.value)
