"""Training: same seed same bits, killed and resumed same bits, checkpoints, refusals."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ARCHITECTURES, random_sequences

from influence_kit import models
from influence_kit.errors import UserError

RECIPE = models.Recipe(batch_size=8, passes=2, warmup_steps=2, evaluations=2, checkpoints=(0.0, 0.5, 1.0), seed=4)


def small(architecture="gpt_neox"):
    return models.configure(architecture, 29, 16, 1, 24)


def weights(folder):
    return {path.parent.name: path.read_bytes() for path in sorted(folder.glob("checkpoint-*/model.safetensors"))}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_training_lowers_the_loss_and_keeps_checkpoints(tmp_path, architecture):
    data = random_sequences(1, 12).copy()
    data = {name: tensor.repeat(64, 1) for name, tensor in data.items()}
    curve = models.train(small(architecture), data, data, RECIPE, tmp_path)
    assert curve["held_out"][-1] < 0.9 * curve["held_out"][0]
    assert len(weights(tmp_path)) == 3 and not (tmp_path / "resume.safetensors").exists()
    about = json.loads((tmp_path / "losses.json").read_text())
    assert about["steps"] == 16 and about["non_embedding_parameters"] > 0
    end = models.load(tmp_path)
    assert models.held_out_loss(end, data) == pytest.approx(curve["held_out"][-1], rel=1e-5)
    assert not end.training


def test_same_seed_same_bits_other_seed_other_bits(tmp_path):
    data = random_sequences(40)
    for name, seed in (("a", 4), ("b", 4), ("c", 5)):
        models.train(small(), data, data, models.Recipe(**{**vars(RECIPE), "seed": seed}), tmp_path / name)
    assert weights(tmp_path / "a") == weights(tmp_path / "b") != weights(tmp_path / "c")


KILLED = """
import sys, time
sys.path[:0] = sys.argv[2:]
import torch; torch.set_num_threads(1)
from pathlib import Path
from influence_kit import models
from test_models import RECIPE, small
from conftest import random_sequences
models.SAVE_EVERY_SECONDS = 0.0
def slow(done, total):
    print(done, flush=True); time.sleep(0.05)
data = random_sequences(320)
models.train(small(), data, data, RECIPE, Path(sys.argv[1]), slow)
"""


def test_killed_training_goes_on_to_the_same_bits(tmp_path):
    here = os.path.dirname(__file__)
    command = [sys.executable, "-c", KILLED, str(tmp_path / "killed"), os.path.dirname(here), here]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if int(line) >= 30:
            process.send_signal(signal.SIGKILL)
            break
    process.wait()
    assert (tmp_path / "killed" / "resume.safetensors").exists()
    data = random_sequences(320)
    started = []
    models.train(small(), data, data, RECIPE, tmp_path / "killed", lambda done, total: started.append(done))
    assert started[0] > 20  # it went on, it did not begin again
    models.train(small(), data, data, RECIPE, tmp_path / "whole")
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")
    assert (tmp_path / "killed" / "losses.json").read_text() == (tmp_path / "whole" / "losses.json").read_text()


def test_last_batches_of_a_pass_are_full_and_cover_every_sequence():
    order = models.slots(19, models.Recipe(batch_size=8, passes=2))
    assert len(order) == 48 and torch.equal(order[:19], torch.arange(19))
    assert set(order[24:].tolist()) == set(range(19))


def test_size_leaves_embeddings_and_head_out():
    model = models.initialise(models.configure("gpt_neox", 1000, 64, 2, 24), 0)
    per_layer = 12 * 64 * 64 + 13 * 64
    assert models.non_embedding_parameters(model) == 2 * per_layer + 2 * 64


def test_missing_checkpoint_names_those_that_are_kept(tmp_path):
    data = random_sequences(40)
    models.train(small(), data, data, RECIPE, tmp_path)
    with pytest.raises(UserError, match=r"no checkpoint at 0.25.*0.00, 0.50, 1.00"):
        models.load(tmp_path, 0.25)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: models.configure("rnn", 10, 16, 1, 8), "architecture='rnn'"),
        (lambda: models.configure("gpt2", 10, 20, 1, 8), "width=20"),
        (lambda: models.load_pretrained("/nowhere/at/all"), "could not be loaded"),
    ],
)
def test_wrong_requests_end_in_one_line(call, message):
    with pytest.raises(UserError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_pickled_weights_are_refused(tmp_path):
    models.initialise(small(), 0).save_pretrained(tmp_path)
    torch.save(models.initialise(small(), 0).state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="safetensors"):
        models.load_pretrained(tmp_path)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_loss_and_its_gradient_are_those_of_the_masked_targets_alone(architecture):
    model = models.initialise(small(architecture), 3).double()
    tokens = torch.randint(0, 29, (5, 12), generator=torch.Generator().manual_seed(2))
    mask = torch.rand(5, 12, generator=torch.Generator().manual_seed(3)) < 0.5
    mask[0] = False
    loss, targets = models.cross_entropy(model, tokens, mask)
    logp = model(input_ids=tokens).logits.log_softmax(-1)
    chosen = [(row, t) for row in range(5) for t in range(1, 12) if mask[row, t]]
    expected = -sum(logp[row, t - 1, tokens[row, t]] for row, t in chosen)
    assert int(targets) == len(chosen)
    torch.testing.assert_close(loss, expected)
    found, wanted = (torch.autograd.grad(x, list(model.parameters())) for x in (loss, expected))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_evaluate_reads_only_the_completion():
    model = models.initialise(small(), 0).eval()
    data = random_sequences(3)
    data["loss_mask"][:, :-1] = False
    log_p, _ = models.evaluate(model, data)
    logits = model(input_ids=data["input_ids"]).logits[:, -2].log_softmax(-1)
    torch.testing.assert_close(log_p, logits.gather(1, data["input_ids"][:, -1:]).squeeze(1).detach())


@pytest.mark.parametrize("other", ["llama", "wider"])
def test_weights_of_another_model_are_refused_and_never_drawn_at_random(tmp_path, other, capfd):
    for name, architecture, width in (("own", "gpt_neox", 16), ("llama", "llama", 16), ("wider", "gpt_neox", 32)):
        models.initialise(models.configure(architecture, 29, width, 1, 24), 0).save_pretrained(tmp_path / name)
    shutil.copy(tmp_path / other / "model.safetensors", tmp_path / "own" / "model.safetensors")
    capfd.readouterr()
    with pytest.raises(UserError, match="own' (lacks|could not be loaded).*give a local folder") as caught:
        models.load_pretrained(tmp_path / "own")
    assert "\n" not in str(caught.value) and capfd.readouterr().err == ""
