"""One call, a card back: of models of many kinds, saved with their tokenizers; what cannot be tracked is refused at once, by name."""

import re
from pathlib import Path

import pytest
import torch

import influence_kit
from influence_kit import fit_ekfac, models
from influence_kit.corpora.texts.own import own_tokenizer
from influence_kit.corpora.world import World, batch_of
from influence_kit.engine.scans import score
from influence_kit.errors import UserError
from influence_kit.findings.own import FEED_FORWARD, check_own, layers_of
from tests.corpora.texts.test_own import COMPLETION, PROMPT, TEXTS, save_tokenizer
from tests.gguf_files import write_llama

README = Path(__file__).parents[2] / "README.md"
CONTEXT = 64


def configuration(kind: str, vocabulary: int, context: int):
    """Two layers, sixteen wide."""
    import transformers as tf

    words = {"vocab_size": vocabulary, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    deep = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": context}
    wide = words | deep | {"intermediate_size": 48}
    grouped = wide | {"num_key_value_heads": 1}
    experts = {"moe_intermediate_size": 16, "num_experts": 2, "num_experts_per_tok": 1}
    return {
        "gpt2": lambda: tf.GPT2Config(**words, n_embd=16, n_layer=2, n_head=2, n_positions=context),
        "llama": lambda: tf.LlamaConfig(**grouped, tie_word_embeddings=False),
        "tied head": lambda: tf.LlamaConfig(**grouped, tie_word_embeddings=True),
        "gpt_neox": lambda: tf.GPTNeoXConfig(**wide),
        "qwen2": lambda: tf.Qwen2Config(**grouped),
        "gemma3": lambda: tf.Gemma3TextConfig(**grouped, head_dim=8),
        "opt": lambda: tf.OPTConfig(**words | deep, ffn_dim=48, word_embed_proj_dim=16),
        "fused experts": lambda: tf.MixtralConfig(**grouped, num_local_experts=2, num_experts_per_tok=1),
        "a shared expert": lambda: tf.Qwen2MoeConfig(**grouped, **experts, shared_expert_intermediate_size=32),
        "Conv1d": lambda: tf.MambaConfig(**words, hidden_size=16, num_hidden_layers=2, state_size=4),
        "an encoder": lambda: tf.T5Config(
            vocab_size=vocabulary, d_model=16, d_ff=32, num_layers=1, num_heads=2, d_kv=8
        ),
    }[kind]()


def saved(folder: Path, kind: str, context: int = CONTEXT) -> str:
    """A folder with a random model and its tokenizer, and texts beside it."""
    tokenizer = save_tokenizer(folder / "model", eos_token="</s>")
    config = configuration(kind, len(tokenizer), context)
    if kind in ("fused experts", "a shared expert", "Conv1d", "an encoder"):  # looked at, never loaded
        config.save_pretrained(folder / "model")
        (folder / "model" / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    else:
        models.initialise(config, seed=5).save_pretrained(folder / "model")
    (folder / "texts").mkdir()
    long = " ".join(f"The harbour lies {n} miles north." for n in range(40))
    (folder / "texts" / "notes.txt").write_text("\n\n".join([*TEXTS, long]))
    return str(folder / "model")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("INFLUENCE_KIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("kind", ["gpt2", "llama", "tied head", "gpt_neox", "qwen2", "gemma3", "opt"])
def test_a_saved_model_of_any_kind_answers_with_a_card(kind, tmp_path, cache):
    model = saved(tmp_path, kind)
    check_own({"model": model, "texts": str(tmp_path / "texts")})
    assert layers_of(model) == (FEED_FORWARD if kind == "opt" else "mlp")
    card = influence_kit.ask(model, PROMPT, COMPLETION, texts=tmp_path / "texts", k=3, profile="smoke", title="mine")
    (shown,) = card.cards
    assert shown.prompt + shown.completion == PROMPT + COMPLETION and shown.top and shown.title == "mine"
    assert "harbour" in card.html and card.png[:4] == b"\x89PNG"
    assert all(row.scored >= len(TEXTS) and "notes.txt" in row.source for row in shown.rows)


def test_scores_on_a_card_are_those_of_a_direct_call_and_the_next_question_is_of_its_index(tmp_path, cache):
    from influence_kit.engine.factors import Factors

    model = saved(tmp_path, "llama")
    first = influence_kit.ask(model, PROMPT, COMPLETION, texts=tmp_path / "texts", k=20, profile="smoke")
    kept = {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.is_file()}
    (index,), (fitted,) = cache.glob("index/*/about.json"), cache.glob("factors/*/factors.safetensors")
    again = influence_kit.ask(index.parent, PROMPT, COMPLETION, k=20)
    assert again == first and kept == {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.is_file()}
    world, tokenizer = World.load(index.parent / "world"), own_tokenizer(model)
    before = [] if (opening := world.parameters["begins"]["token"]) is None else [opening]
    asked, start = tokenizer(PROMPT + COMPLETION)["input_ids"], len(tokenizer(PROMPT)["input_ids"])
    mask = [False] * (len(before) + start) + [True] * (len(asked) - start)
    question = {"input_ids": torch.tensor([before + asked]), "loss_mask": torch.tensor([mask])}
    direct = score(models.load_pretrained(model), Factors.load(fitted), question, batch_of(world.sequences))
    found = sorted(row.score for row in first.cards[0].rows)
    assert found == pytest.approx(sorted(direct.values[0].tolist()), rel=1e-3, abs=1e-3)
    with pytest.raises(UserError, match="leaves nothing to predict"):
        influence_kit.ask(index.parent, "", "T")
    with pytest.raises(UserError, match="of which the model reads 64"):
        influence_kit.ask(index.parent, "The harbour " * 60, "lies")


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("fused experts", r"fused in one parameter \(model.layers.0.mlp.experts.gate_up_proj\)"),
        ("a shared expert", r"fused in one parameter \(model.layers.0.mlp.experts.gate_up_proj\)"),
        ("Conv1d", r"no feed-forward layers .* Conv1d \(backbone.layers.0.mixer.conv1d\)"),
        ("an encoder", "no causal language model"),
    ],
)
def test_what_cannot_be_tracked_is_refused_by_name(kind, told, tmp_path):
    model = saved(tmp_path, kind)
    with pytest.raises(UserError, match=told) as caught:
        check_own({"model": model, "texts": str(tmp_path / "texts")})
    assert "\n" not in str(caught.value)


def test_texts_that_leave_nothing_to_predict_are_refused_before_any_work(tmp_path):
    model = saved(tmp_path, "llama")
    (tmp_path / "short.jsonl").write_text('{"text": "T"}\n' * 3)
    with pytest.raises(UserError, match="texts='.*short.jsonl': none has two tokens, .*: give longer ones"):
        check_own({"model": model, "texts": str(tmp_path / "short.jsonl")})
    (tmp_path / "short.jsonl").write_text('{"text": "T"}\n' * 300 + '{"text": "The harbour lies north."}\n')
    check_own({"model": model, "texts": str(tmp_path / "short.jsonl")})


def test_a_gguf_file_is_asked_as_a_folder_is(tmp_path, cache):
    write_llama(tmp_path / "tiny.gguf", TEXTS, quantised=True)
    (tmp_path / "notes.txt").write_text("\n\n".join(TEXTS * 2))
    card = influence_kit.ask(tmp_path / "tiny.gguf", "The", " old", texts=tmp_path / "notes.txt", k=2, profile="smoke")
    assert card.cards[0].top and "harbour" in card.html.lower()


def test_readmes_example_runs(tmp_path, cache, monkeypatch):
    (code,) = [part for part in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL) if ".ask(" in part]
    monkeypatch.chdir(tmp_path)
    saved(tmp_path, "llama")
    (tmp_path / "path" / "to").mkdir(parents=True)
    (tmp_path / "model").rename(tmp_path / "path" / "to" / "model")
    (tmp_path / "texts").rename(tmp_path / "my_texts")
    found: dict = {}
    exec(code, found)
    assert found["card"].cards[0].top


def test_without_a_model_or_texts_that_are_there_nothing_is_begun(tmp_path, cache):
    model = saved(tmp_path, "llama")
    with pytest.raises(UserError, match="does not exist"):
        influence_kit.ask(tmp_path / "modle", PROMPT, COMPLETION, texts=tmp_path / "texts")
    with pytest.raises(UserError, match="does not exist"):
        influence_kit.ask(model, PROMPT, COMPLETION, texts=tmp_path / "text")
    with pytest.raises(UserError, match="names no commit"):
        influence_kit.ask("harbour/small", PROMPT, COMPLETION, texts=tmp_path / "texts")
    assert not cache.exists()


def test_fitting_what_is_tracked_is_what_layers_says(tmp_path):
    model = models.load_pretrained(saved(tmp_path, "opt"))
    told = {"input_ids": torch.arange(24).reshape(3, 8)}
    assert list(fit_ekfac(model, told, FEED_FORWARD).layers) == [
        f"model.decoder.layers.{layer}.fc{which}" for layer in (0, 1) for which in (1, 2)
    ]
