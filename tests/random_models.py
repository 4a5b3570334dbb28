"""Random models of many families, straight from transformers' own configurations, none of the kit's."""


def random_model(architecture: str, seed: int, width: int, depth: int = 2, vocabulary: int = 29, length: int = 64):
    """A float32 model in evaluation mode, far from uniform: weights scaled up, biases drawn. Four heads; `length`: most tokens
    of a sequence. Sets torch's seed."""
    import torch
    import transformers as tf

    common = {"vocab_size": vocabulary, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    deep = common | {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": 4}
    room = {"max_position_embeddings": length}
    grouped = deep | room | {"intermediate_size": 3 * width, "num_key_value_heads": 2, "tie_word_embeddings": False}
    configuration = {
        "gpt_neox": lambda: tf.GPTNeoXConfig(**deep, **room, intermediate_size=4 * width),
        "gpt2": lambda: tf.GPT2Config(**common, n_embd=width, n_layer=depth, n_head=4, n_positions=length),
        "llama": lambda: tf.LlamaConfig(**grouped),
        "qwen2": lambda: tf.Qwen2Config(**grouped),
        "olmo2": lambda: tf.Olmo2Config(**grouped),
        "bloom": lambda: tf.BloomConfig(**common, hidden_size=width, n_layer=depth, n_head=4),
    }[architecture]()
    torch.manual_seed(seed)
    model = tf.AutoModelForCausalLM.from_config(configuration)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model.eval()


def breaking(model):
    """The model, but that its logits are not finite where a sequence holds token 28."""
    import torch

    class Breaking(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, tokens):
            breaks = (tokens == 28).any(1)[:, None, None]
            return self.model(input_ids=tokens).logits * torch.where(breaks, torch.inf, 1.0)

    return Breaking()
