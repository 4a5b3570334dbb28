"""How much memory a fit and a scan of a model of SmolLM2's shape take, and how near a plan's bytes come.

    python tests/benchmarks/memory.py                      # batches of 8 and of 32, about ten minutes on one core
    python tests/benchmarks/memory.py --batches 8 --sequences 60

A Llama of 30 blocks, 576 wide, 49,152 tokens, with random weights: factors from 150 sequences of 64 tokens, which are then scored
for 6 queries, in a process of its own for each batch size. Peak: the most that the system held for the process, libraries
included. Bound: bytes of weights, factors and directions, and 1.5 GB. Plan: `scale.estimate` for the same layers, and what the
process held before it had a model. Prints a Markdown table. Ends with 1 where a peak is over its bound, or a plan more than a fifth off.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from influence_kit import fit_ekfac, score
from influence_kit.engine.layers import tracked_layers
from influence_kit.engine.scale import Decoder, Layer, Work, estimate

WIDTH, DEPTH, MLP, HEADS, SHARED_HEADS, VOCABULARY = 576, 30, 1536, 9, 3, 49_152
BEYOND, WITHIN = 1.5e9, 0.2


def main() -> int:
    asked = arguments()
    if asked.alone is not None:
        print(json.dumps(measured(asked, asked.alone)))
        return 0
    print("| batch | fit, s | scan, s | peak | bound | model | factors | directions | plan | plan ÷ peak |")
    print("| ---: " * 10 + "|", flush=True)
    failed = 0
    for batch in asked.batches:
        command = [sys.executable, __file__, *sys.argv[1:], "--alone", str(batch)]
        ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        if ran.returncode:
            return ran.returncode
        found = json.loads(ran.stdout.splitlines()[-1])
        bound = sum(found[name] for name in ("model", "factors", "directions")) + BEYOND
        off = found["plan"] / found["peak"]
        failed |= found["peak"] > bound or abs(off - 1) > WITHIN
        sizes = (found["peak"], bound, found["model"], found["factors"], found["directions"], found["plan"])
        cells = [str(batch), f"{found['fit']:.0f}", f"{found['scan']:.0f}", *(f"{each / 1e9:.2f} GB" for each in sizes)]
        print(f"| {' | '.join(cells)} | {off:.2f} |", flush=True)
    return int(failed)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--sequences", type=int, default=150)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--queries", type=int, default=6)
    parser.add_argument("--alone", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def measured(asked: argparse.Namespace, batch: int) -> dict[str, float]:
    """Seconds and bytes of one batch size."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    before = peak()
    shape = {"hidden_size": WIDTH, "num_hidden_layers": DEPTH, "intermediate_size": MLP, "vocab_size": VOCABULARY}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": SHARED_HEADS}
    model = LlamaForCausalLM(LlamaConfig(**shape, **heads, tie_word_embeddings=True)).eval()
    tokens = torch.randint(VOCABULARY, (asked.sequences + asked.queries, asked.length))
    data, queries = {"input_ids": tokens[: asked.sequences]}, {"input_ids": tokens[asked.sequences :]}

    began = time.perf_counter()
    factors = fit_ekfac(model, data, batch_size=batch)
    fitted = time.perf_counter()
    score(model, factors, queries, data, batch_size=batch)
    scanned = time.perf_counter()

    modules, seen, layers = tracked_layers(model), {}, []
    for name, module in modules.items():
        inputs = name.rsplit(".", 1)[0], module.in_features
        layers.append(Layer(module.out_features, module.in_features, shared=inputs in seen))
        seen[inputs] = name
    held = {}  # sides that layers share count once
    for one in factors.layers.values():
        held |= {each.data_ptr(): each.nbytes for each in (*one.inputs, *one.outputs, one.eigenvalues)}
    asked_for = {"sequences": asked.sequences, "length": asked.length, "queries": asked.queries, "fit": asked.sequences}
    plan = estimate(layers, Decoder(WIDTH, DEPTH, vocabulary=VOCABULARY), Work(**asked_for, batch_size=batch))
    return {
        "fit": fitted - began,
        "scan": scanned - fitted,
        "peak": peak(),
        "plan": before + max(stage.memory for stage in plan[:5]),  # what comes after makes an index
        "model": sum(p.nbytes for p in model.parameters()),
        "factors": sum(held.values()),
        "directions": asked.queries * 4.0 * sum(layer.outputs * layer.inputs for layer in layers),
    }


def peak() -> float:
    """Bytes: the most that this process held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


if __name__ == "__main__":
    raise SystemExit(main())
