"""Families of small causal language models: configurations from transformers, one-pass training, checkpoints.

    config = configure("gpt_neox", vocabulary_size, width=64, depth=2, context=19)
    train(config, sequences, held_out, Recipe(), folder)
    model = load(folder, fraction=1.0)

Knows nothing of influence.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from influence_kit.errors import UserError, first_line
from influence_kit.files import whole, write_whole
from influence_kit.recipes import ARCHITECTURES, Recipe, schedule, steps_of

SAVE_EVERY_SECONDS = 20.0


def _transformers():
    """transformers without its progress bars, which would end up in executed notebooks, and its tables of weights that are
    missing, which are refused in one line."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    return transformers


def configure(architecture: str, vocabulary_size: int, width: int, depth: int, context: int) -> Any:
    """A transformers configuration with feed-forward width 4d, tied embeddings and no dropout.

    Args:
        architecture: One of ARCHITECTURES.
        vocabulary_size: Number of token ids.
        width: d, 8 or a multiple of 16.
        depth: Number of blocks.
        context: Tokens of the longest sequence.

    Raises:
        UserError: An unknown architecture, or another width.
    """
    if architecture not in ARCHITECTURES:
        raise UserError(f"architecture={architecture!r} is not known: choose one of {', '.join(ARCHITECTURES)}")
    if width != 8 and (width % 16 or width < 16):
        raise UserError(
            f"width={width} must be 8, or a multiple of 16 (attention heads are 16 wide, or width / 4 if wider)"
        )
    transformers = _transformers()
    heads = max(1, min(width // 16, 4))
    common = {"vocab_size": vocabulary_size, "bos_token_id": 0, "eos_token_id": 0, "tie_word_embeddings": True}
    if architecture == "gpt2":
        silent = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return transformers.GPT2Config(
            n_embd=width, n_layer=depth, n_head=heads, n_positions=context, **silent, **common
        )
    common |= {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads}
    common |= {"max_position_embeddings": context}
    if architecture == "llama":
        inner = 16 * round(8 * width / 3 / 16)
        return transformers.LlamaConfig(intermediate_size=inner, num_key_value_heads=heads, **common)
    rotary = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 1.0}
    return transformers.GPTNeoXConfig(
        intermediate_size=4 * width, use_parallel_residual=False, rope_parameters=rotary, **common
    )


def initialise(config: Any, seed: int) -> nn.Module:
    """A float32 model with weights drawn from `seed`; the global random state is left as it was."""
    transformers = _transformers()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return transformers.AutoModelForCausalLM.from_config(config)


def non_embedding_parameters(model: nn.Module) -> int:
    """Number of weights outside token and position embeddings and the output head: the size used on every axis."""
    seen, total = set(), 0
    for name, parameter in model.named_parameters():
        if id(parameter) not in seen and not any(part in name for part in ("embed", "wte", "wpe", "lm_head")):
            total += parameter.numel()
        seen.add(id(parameter))
    return total


def cross_entropy(model: nn.Module, tokens: Tensor, loss_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Summed next-token loss in nats of a batch, and its number of targets.

    Args:
        model: Any causal language model of transformers.
        tokens: int64 [B, T].
        loss_mask: Which of them are targets, bool [B, T].
    """
    logits, keep = model(input_ids=tokens[:, :-1], use_cache=False).logits, loss_mask[:, 1:]
    targets = tokens[:, 1:].where(keep, -100)  # which cross_entropy leaves out: cheaper than to pick the others
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"), keep.sum()


def evaluate(model: nn.Module, batch: Mapping[str, Tensor], batch_size: int = 256) -> tuple[Tensor, Tensor]:
    """How likely a model finds the targets of each row.

    Args:
        model: Any causal language model of transformers.
        batch: `input_ids` int64 [Q, T], `loss_mask` bool [Q, T].
        batch_size: Rows at once.

    Returns:
        Log-probability of all targets of a row, nats [Q], and whether each of them is the likeliest token, bool [Q].
    """
    logs, correct = [], []
    with torch.no_grad():
        for start in range(0, len(batch["input_ids"]), batch_size):
            tokens = batch["input_ids"][start : start + batch_size]
            keep = batch["loss_mask"][start : start + batch_size, 1:]
            logp = model(input_ids=tokens, use_cache=False).logits[:, :-1].float().log_softmax(-1)
            gold = logp.gather(2, tokens[:, 1:, None]).squeeze(2)
            logs.append((gold * keep).sum(1))
            correct.append(((logp.argmax(2) == tokens[:, 1:]) | ~keep).all(1))
    return torch.cat(logs), torch.cat(correct)


def held_out_loss(model: nn.Module, held_out: Mapping[str, Tensor]) -> float:
    """Mean next-token loss, nats a target."""
    logs, _ = evaluate(model, held_out)
    return float(-logs.double().sum() / held_out["loss_mask"][:, 1:].sum())


def train(
    config: Any,
    sequences: Mapping[str, Tensor],
    held_out: Mapping[str, Tensor],
    recipe: Recipe,
    folder: Path,
    progress: Callable[[int, int], None] | None = None,
    device: str = "cpu",
) -> dict[str, list]:
    """Train one model in the sequences' own order; save checkpoints and the loss curve under `folder`.

    Further passes are reshuffled by the seed. Writes `checkpoint-<step>/` (transformers layout, safetensors) and
    `losses.json`; keeps `resume.safetensors` while running, from which a killed run continues to the same bits on one
    CPU thread.

    Args:
        config: Of `configure`.
        sequences: `input_ids` int64 [N, T], `loss_mask` bool [N, T].
        held_out: The same, never trained on.
        recipe: How.
        folder: Where to write.
        progress: Told steps done and in all, about a hundred times.
        device: Of torch.

    Returns:
        The loss curve, nats a target: step, train, held_out_step, held_out.

    Raises:
        UserError: The loss is no longer finite.
    """
    total, steps = len(sequences["input_ids"]), steps_of(len(sequences["input_ids"]), recipe)
    model = initialise(config, recipe.seed).to(device)
    optimiser = torch.optim.AdamW(_groups(model, recipe), lr=recipe.learning_rate, betas=recipe.betas, fused=True)
    curve: dict[str, list] = {"step": [], "train": [], "held_out_step": [], "held_out": []}
    start = _resume(folder, model, optimiser, curve)
    saves = {round(fraction * steps) for fraction in recipe.checkpoints}
    tests = {round(steps * i / recipe.evaluations) for i in range(recipe.evaluations + 1)} | saves
    held_out = {name: tensor.to(device) for name, tensor in held_out.items()}
    order = slots(total, recipe)
    recent, saved_at = [], time.monotonic()
    model.train()
    for step in range(start, steps + 1):
        if step in tests and (not curve["held_out_step"] or curve["held_out_step"][-1] < step):
            curve["held_out_step"].append(step)
            curve["held_out"].append(held_out_loss(model.eval(), held_out))
            model.train()
        if step in saves:
            save_checkpoint(model, folder, step)
        if step == steps:
            break
        rows = order[step * recipe.batch_size : (step + 1) * recipe.batch_size]
        loss, targets = cross_entropy(
            model, sequences["input_ids"][rows].to(device), sequences["loss_mask"][rows].to(device)
        )
        loss = loss / targets
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        for group in optimiser.param_groups:
            group["lr"] = recipe.learning_rate * schedule(step, steps, recipe.warmup_steps)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        recent.append(float(loss.detach()))
        if (step + 1) % max(1, steps // 100) == 0:
            curve["step"].append(step + 1)
            curve["train"].append(sum(recent) / len(recent))
            recent.clear()
            if progress:
                progress(step + 1, steps)
            if time.monotonic() - saved_at > SAVE_EVERY_SECONDS:
                _save_state(folder, model, optimiser, curve, step + 1)
                saved_at = time.monotonic()
        if not math.isfinite(float(loss.detach())):
            raise UserError(
                f"training diverged at step {step} (loss {float(loss.detach())}): lower "
                f"learning_rate={recipe.learning_rate}"
            )
    about = {"steps": steps, "non_embedding_parameters": non_embedding_parameters(model), "recipe": asdict(recipe)}
    write_whole(folder / "losses.json", json.dumps({**about, **curve}, sort_keys=True))
    for kept in folder.glob("resume.safetensors*"):  # a kill may have left half of one beside it
        kept.unlink()
    return curve


def slots(total: int, recipe: Recipe) -> Tensor:
    """Row of every slot of the run: the corpus's own order first, then seeded shuffles; a pass fills whole batches."""
    generator = torch.Generator().manual_seed(recipe.seed)
    padded = math.ceil(total / recipe.batch_size) * recipe.batch_size
    passes = []
    for number in range(recipe.passes):
        rows = torch.arange(total) if number == 0 else torch.randperm(total, generator=generator)
        passes.append(torch.cat([rows, rows[: padded - total]]))
    return torch.cat(passes)


def save_checkpoint(model: nn.Module, folder: Path, step: int) -> None:
    """Write `checkpoint-<step>/` in the transformers layout (safetensors, config.json)."""
    model.save_pretrained(folder / f"checkpoint-{step}")  # type: ignore[operator]


def load(folder: Path, fraction: float = 1.0, device: str = "cpu") -> nn.Module:
    """The checkpoint of a trained folder at a fraction of training, in evaluation mode.

    Args:
        folder: What `train` wrote.
        fraction: 0 untrained, 1 the end; the checkpoint may be off by one step, or by 2 % of training.
        device: Of torch.

    Raises:
        UserError: No checkpoint was kept there.
    """
    steps = json.loads((folder / "losses.json").read_text())["steps"]
    found = sorted(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))
    nearest = min(found, key=lambda step: abs(step - fraction * steps))
    if abs(nearest - fraction * steps) > max(1, 0.02 * steps):
        kept = ", ".join(f"{step / steps:.2f}" for step in found)
        raise UserError(
            f"no checkpoint at {fraction:.2f} of training: {kept} were kept; add it to the recipe's checkpoints"
        )
    return load_pretrained(folder / f"checkpoint-{nearest}", device)


def load_pretrained(source: str | os.PathLike, device: str = "cpu") -> nn.Module:
    """Any Hugging Face causal model from a local folder or a hub name: float32, safetensors only, no remote code.

    Raises:
        UserError: There is none, or it cannot be read.
    """
    transformers, remedy = _transformers(), "(give a local folder with config.json and model.safetensors, or a hub name"
    try:
        model, about = transformers.AutoModelForCausalLM.from_pretrained(
            str(source),
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:  # of many kinds, for a folder whose parts do not fit each other
        raise UserError(
            f"model {str(source)!r} could not be loaded: {first_line(error)} {remedy} on a machine with internet)"
        ) from error
    if missing := sorted(about["missing_keys"]):  # they would be drawn at random
        raise UserError(
            f"model {str(source)!r} lacks {len(missing)} of its weights, {missing[0]} among them: its configuration and its "
            f"weights are of two models {remedy})"
        )
    return model.to(device).eval()


def dequantise(gguf: Path, folder: Path) -> None:
    """Write a GGUF file's model and tokenizer to `folder` in the transformers layout, float32: the same logits, to the bit.

    Args:
        gguf: The file, alone in its folder: what lies beside it could be read with it.
        folder: Where to write; once full, it is a model like any other.

    Raises:
        UserError: An architecture that transformers does not read, weights that are missing, no tokenizer.
    """
    import accelerate

    transformers, bars = _transformers(), io.StringIO()  # of a kind that its setting does not silence
    asked = {"gguf_file": gguf.name, "trust_remote_code": False}
    try:
        with contextlib.redirect_stderr(bars):
            found, about = transformers.AutoModelForCausalLM.from_pretrained(
                gguf.parent, dtype=torch.float32, output_loading_info=True, **asked
            )
        tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, **asked)
    except Exception as error:  # of many kinds, for a file that means something else
        raise UserError(
            f"{gguf.name} could not be loaded: {first_line(error)} (give a causal language model with its tokenizer in GGUF, "
            "of an architecture that transformers reads)"
        ) from error
    if missing := sorted(about["missing_keys"]):
        raise UserError(f"{gguf.name} lacks {len(missing)} weights, {missing[0]} among them: give a whole model")
    config = found.config
    del config.quantization_config  # with which nothing could be saved
    state = {name: tensor.detach() for name, tensor in found.state_dict().items()}
    with accelerate.init_empty_weights():
        plain = type(found)(config)
    plain.load_state_dict(state, assign=True)
    plain.tie_weights()
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _groups(model: nn.Module, recipe: Recipe) -> list[dict]:
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    plain = [p for p in model.parameters() if p.ndim < 2]
    return [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}]


def _save_state(folder: Path, model: nn.Module, optimiser, curve: dict, step: int) -> None:
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        state = optimiser.state[parameter]
        kept = {"value": parameter.detach(), "m": state["exp_avg"], "v": state["exp_avg_sq"]}
        tensors |= {f"{name}/{part}": tensor.cpu().contiguous() for part, tensor in kept.items()}
    with whole(folder / "resume.safetensors") as part:
        save_file(tensors, part, {"resume": json.dumps({"step": step, "curve": curve})})


def _resume(folder: Path, model: nn.Module, optimiser, curve: dict) -> int:
    """Put model, optimiser and curve back where a killed run left them; returns the step to go on from."""
    from safetensors import safe_open

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "resume.safetensors"
    if not path.exists():
        return 0
    with safe_open(str(path), "pt") as file:
        kept = json.loads(file.metadata()["resume"])
        for name, parameter in model.named_parameters():
            parameter.data.copy_(file.get_tensor(f"{name}/value"))
            optimiser.state[parameter] = {
                "step": torch.tensor(float(kept["step"]), device=parameter.device),
                "exp_avg": file.get_tensor(f"{name}/m").to(parameter.device),
                "exp_avg_sq": file.get_tensor(f"{name}/v").to(parameter.device),
            }
    curve.update(kept["curve"])
    return kept["step"]
