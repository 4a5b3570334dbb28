"""Rival methods: each against the library's own scores or a hand-made one."""

import numpy as np
import pytest
import torch
from conftest import random_sequences, tiny_model

from influence_kit import fit_ekfac, score
from influence_kit.errors import UserError
from influence_kit.referees import lissa, rivals
from influence_kit.referees.curvature import dense
from influence_kit.referees.rivals import INVERSES, METHODS, Setting, by_words, damping_sweep, methods_for, variants


@pytest.fixture(scope="module")
def setting():
    model = tiny_model("gpt_neox", depth=1, vocabulary=11)
    queries, sequences = random_sequences(3, 6, 11, seed=5), random_sequences(9, 6, 11, padded=True)
    checkpoints = ((0.5, 2.0), (1.0, 0.5))
    return Setting(
        lambda at: model,
        queries,
        sequences,
        random_sequences(8, 6, 11, seed=9),
        checkpoints=checkpoints,
        depth=800,
        minibatch=8,
    )


@pytest.fixture(scope="module")
def found(setting):
    methods = methods_for(setting.model, {"shared": shared}) | {name: METHODS[name] for name in INVERSES}
    return {name: method(setting) for name, method in methods.items()}


def shared(queries, sequences):
    """How many different tokens two rows share."""
    return np.array([[len({*query} & {*sequence}) for sequence in sequences] for query in queries])


def test_every_method_scores_every_pair(found):
    assert {"exact", "EK-FAC", "TracIn", "shared", "random", "representations, 0 of 1 blocks"} <= set(found)
    for name, values in found.items():
        assert values.shape == (3, 9) and bool(torch.isfinite(values).all()), name


def test_every_method_is_either_dear_or_run_everywhere(setting):
    everywhere = set(methods_for(setting.model, {}))
    assert not everywhere & set(INVERSES) and set(METHODS) <= everywhere | set(INVERSES)


def test_ekfac_and_its_forms_are_the_library_s(setting, found):
    factors = fit_ekfac(setting.model, setting.sample)
    expected = score(setting.model, factors, setting.queries, setting.sequences)
    for name, form in (("EK-FAC", "values"), ("RelatIF", "relatif"), ("EK-FAC cosine", "cosine")):
        torch.testing.assert_close(found[name], getattr(expected, form))


def test_the_exact_method_solves_with_the_dense_matrix(setting, found):
    curvature = setting.curvature
    matrix = dense(curvature)
    directions = torch.linalg.solve(matrix, curvature.gradients(setting.queries).T).T
    torch.testing.assert_close(found["exact"], directions @ curvature.gradients(setting.sequences).T)
    # Closer to the exact one than what forgets the layers' correlations.
    apart = [float((found[name] - found["exact"]).norm()) for name in ("block-diagonal", "gradient dot")]
    assert 0 < apart[0] < apart[1]


def test_lissa_comes_near_the_exact_method_when_it_runs_long(found):
    pair = np.corrcoef(found["LiSSA"].flatten(), found["exact"].flatten())
    assert pair[0, 1] > 0.88


def test_tracin_sums_its_checkpoints_by_their_rates(found):
    torch.testing.assert_close(found["TracIn"], 2.5 * found["gradient dot"])  # the same model at both


def test_cosines_lie_between_minus_one_and_one(found):
    for name in ("gradient cosine", "EK-FAC cosine", "TrackStar-style", "representations, 1 of 1 blocks"):
        assert float(found[name].abs().max()) <= 1 + 1e-6


def test_words_are_compared_up_to_the_last_target_of_either(setting, found):
    same = Setting(setting.model_at, setting.sequences, setting.sequences, setting.sample)
    assert bool((by_words(same, shared).diagonal() == by_words(same, shared).amax(1)).all())
    changed = {name: tensor.clone() for name, tensor in setting.sequences.items()}
    changed["input_ids"][~changed["loss_mask"]] = 1  # padding, and the first token: every document begins alike
    padded = Setting(setting.model_at, setting.queries, changed, setting.sample)
    assert torch.equal(by_words(padded, shared), found["shared"])


def test_representations_do_not_see_padding(setting):
    changed = {name: tensor.clone() for name, tensor in setting.sequences.items()}
    changed["input_ids"][~changed["loss_mask"]] = 1
    padded = Setting(setting.model_at, setting.queries, changed, setting.sample)
    torch.testing.assert_close(rivals.representations(padded, 1), rivals.representations(setting, 1))


def test_lissa_halves_a_scale_that_diverges(setting, monkeypatch):
    monkeypatch.setattr(lissa, "top_eigenvalue", lambda *_, **__: 0.3 * real_top(setting))
    assert bool(torch.isfinite(rivals.lissa(setting)).all())
    monkeypatch.setattr(lissa, "HALVINGS", 0)
    with pytest.raises(UserError, match="diverges"):
        rivals.lissa(setting)


def real_top(setting):
    return float(torch.linalg.eigvalsh(setting.matrix)[-1])


def test_sweeps_and_variants_change_what_they_say(setting, found):
    tenth = damping_sweep((0.1, 10.0))
    torch.testing.assert_close(tenth["EK-FAC, damping 0.1"](setting), found["EK-FAC"])
    assert not torch.allclose(tenth["EK-FAC, damping 10"](setting), found["EK-FAC"])
    others = variants((4, 8), (0.5,))
    torch.testing.assert_close(others["EK-FAC, fitted on 8"](setting), found["EK-FAC"])
    assert not torch.allclose(others["EK-FAC, fitted on 4"](setting), found["EK-FAC"])
    assert not torch.allclose(others["EK-FAC, empirical Fisher"](setting), found["EK-FAC"])
    assert "EK-FAC, at 50% of training" in others
