"""Chapter 12 over families, as the hub profile has them: tiny models of SmolLM2's and BLOOM's classes, given by a hub that is a folder."""

import shutil

import huggingface_hub
import numpy as np
import pytest
import torch
import yaml

from influence_kit.corpora.sentences import load_facts, load_prompts
from influence_kit.findings import a_real_language_model as finding
from influence_kit.findings import real_stages
from influence_kit.findings.chapter import Chapter
from influence_kit.findings.profiles import FOLDER, load_profile
from influence_kit.findings.real_sizes import KEPT, THEME, by_size, drawn, family, on_sizes
from tests.findings.test_a_real_language_model import TEXTS

COMMIT = "0123456789" * 4


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """Two sizes of one family, one of another, with one tokenizer, and texts."""
    from gguf_files import byte_tokenizer
    from transformers import BloomConfig, BloomForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    home = tmp_path_factory.mktemp("hub")
    (home / "texts.txt").write_text("\n\n".join(TEXTS))
    words = byte_tokenizer(TEXTS)
    shared = {"vocab_size": words.get_vocab_size(), "hidden_size": 16, "tie_word_embeddings": True}
    llama = {
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 48,
        "max_position_embeddings": 512,
    }
    torch.manual_seed(0)
    made = {
        "SmolLM2-2M": LlamaForCausalLM(LlamaConfig(**shared, **llama, num_hidden_layers=2)),
        "SmolLM2-1M": LlamaForCausalLM(LlamaConfig(**shared, **llama, num_hidden_layers=1)),
        "bloom-1m": BloomForCausalLM(BloomConfig(**shared, n_layer=1, n_head=2)),
    }
    for name, model in made.items():
        model.save_pretrained(home / name)
        PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<|end|>").save_pretrained(home / name)
    return home


@pytest.mark.slow
def test_families_stand_side_by_side_by_size(shelf, tmp_path, monkeypatch):
    def give(name, revision, local_dir, **patterns):
        shutil.copytree(shelf / name.rpartition("/")[2], local_dir, dirs_exist_ok=True)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", give)
    for module in (finding, real_stages):  # a few tell
        monkeypatch.setattr(module, "load_facts", lambda: load_facts()[:3])
    monkeypatch.setattr(real_stages, "load_prompts", lambda: load_prompts()[:2])
    monkeypatch.setenv("INFLUENCE_KIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("INFLUENCE_KIT_FIGURES", str(tmp_path / "figures"))
    content = yaml.safe_load((FOLDER / "smoke.yaml").read_text())
    names = [f"harbour/{name}@{COMMIT}" for name in ("SmolLM2-2M", "SmolLM2-1M", "bloom-1m")]
    first, *more = [{"pretrained": name} for name in names]
    content["real"] |= {"model": first, "family": more, "fit": 12, "length": 64}
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(content))
    chapter = Chapter("12_a_real_language_model", str(path))
    runs = finding.readings(chapter, texts=str(shelf / "texts.txt"), limit=20)
    assert [run.name for run in runs] == ["SmolLM2-2M", "SmolLM2-1M", "bloom-1m"]
    table = by_size(runs)
    assert table["model"].drop_duplicates().tolist() == ["SmolLM2-1M", "SmolLM2-2M", "bloom-1m"]
    assert set(table["family"]) == {"SmolLM2", "bloom"} and set(table["quantity"]) == {
        KEPT,
        THEME,
    }  # no languages in own texts
    assert np.isfinite(table[["estimate", "low", "high"]].to_numpy()).all() and (table["parameters"] > 1000).all()
    assert [figure.name for figure in drawn(chapter, table)] == ["12_size_word_order", "12_size_themes"]
    told = on_sizes(table).splitlines()
    assert len(told) == 4 and told[0].startswith(f"- SmolLM2, 0 to 0 million weights: {KEPT} (swapped round) ")
    assert (
        len(finding.reads(load_profile(str(path)), model=str(shelf / "bloom-1m"))) == 1
    )  # a reader's own has no family


def test_a_family_is_what_names_share():
    told = {
        "SmolLM2-135M": "SmolLM2",
        "bloom-1b7": "bloom",
        "pythia-70m": "pythia",
        "harbour": "harbour",
        "SmolLM2 1.7B": "SmolLM2",
    }
    assert {name: family(name) for name in told} == told


def test_hub_reads_smollm2_and_bloom_at_commits():
    profile = load_profile("hub")
    stages = [one.made["weights"].parameters["source"] for one in finding.reads(profile)]
    names = [source.partition("@")[0] for source in stages]
    assert (
        names[:3] == [f"HuggingFaceTB/SmolLM2-{size}" for size in ("135M", "360M", "1.7B")]
        and "bigscience/bloom-560m" in names
    )
