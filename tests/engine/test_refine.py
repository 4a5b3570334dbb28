"""Refined directions against dense solutions, killed and gone on with, and what is refused."""

import warnings

import pytest
import torch
from conftest import ARCHITECTURES, random_sequences, tiny_model
from oracles import gauss_newton, sequence_gradients
from random_models import random_model

from influence_kit import build_index, fit_ekfac, score, token_scores, top_scores
from influence_kit.engine import products, resume
from influence_kit.engine import refine as module
from influence_kit.engine.products import GaussNewton
from influence_kit.engine.refine import Diverges, refine
from influence_kit.referees.pbrf import in_float64

pytestmark = pytest.mark.filterwarnings("ignore:refine_on has:UserWarning", "ignore:layers=:UserWarning")
SIZE = {"depth": 1, "vocabulary": 11}
MANY = 200  # iterations in which the small models here converge


def queries_of(rows=2, length=6, vocabulary=11):
    data = random_sequences(rows, length, vocabulary, seed=5)
    data["loss_mask"][:, :-2] = False
    return data


def dense_solution(model, factors, sample, queries, damping=0.1):
    """(x [Q, D], v [Q, D], G + lambda) from autograd alone; lambda from the factors' eigenvalues."""
    damped = gauss_newton(model, sample)
    sizes = [layer.eigenvalues.numel() for layer in factors.layers.values()]
    means = [damping * layer.eigenvalues.mean() for layer in factors.layers.values()]
    damped += torch.cat([mean.expand(size) for mean, size in zip(means, sizes, strict=True)]).diag()
    v = torch.cat(list(sequence_gradients(model, queries).values()), 1)
    return torch.linalg.solve(damped, v.T).T, v, damped


@pytest.fixture(scope="module", params=ARCHITECTURES)
def case(request):
    """(model, factors, sample, queries, sequences); Llama's norms compute in float64 too."""
    model = in_float64(tiny_model(request.param, **SIZE))
    sample, sequences = random_sequences(6, 6, 11, padded=True), random_sequences(9, 6, 11, seed=3, padded=True)
    return model, fit_ekfac(model, random_sequences(12, 6, 11, seed=8)), sample, queries_of(), sequences


@pytest.mark.parametrize(("preconditioner", "damping"), [("drawn", 0.1), ("ekfac", 10.0)])
def test_refined_scores_are_those_of_the_dense_solution(case, preconditioner, damping):
    model, factors, sample, queries, sequences = case
    solved = refine(model, factors, queries, sample, MANY, preconditioner=preconditioner, damping=damping)
    found = score(model, factors, queries, sequences, damping, refine=solved)
    x, v, _ = dense_solution(model, factors, sample, queries, damping)
    expected = x @ torch.cat(list(sequence_gradients(model, sequences).values()), 1).T
    torch.testing.assert_close(found.values, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))
    torch.testing.assert_close(found.query_norm, (v * x).sum(1).sqrt(), rtol=1e-6, atol=0)
    assert float(found.refinement.residual.max()) < 1e-6 and found.refinement.preconditioner == preconditioner


def test_the_residuals_are_those_of_the_sample_and_of_other_sequences(case):
    model, factors, sample, queries, sequences = case
    mixed = {name: torch.cat([sample[name][:4], sequences[name]]) for name in sample}
    found = score(model, factors, queries, mixed, refine=3, refine_on=sample).refinement
    assert (found.iterations, found.sequences, found.fresh_sequences) == (3, 6, 6)
    solved = refine(model, factors, queries, sample, 40, others=sequences)
    x = torch.cat([torch.cat([solved.turned(n, slice(0, 2)).flatten(1) for n in factors.layers], 1)])
    basis = torch.block_diag(*(torch.kron(layer.Q_S, layer.Q_A) for layer in factors.layers.values()))
    fresh = {name: tensor[torch.arange(6) * 9 // 6] for name, tensor in sequences.items()}
    for own, other in ((solved.about.residual, sample), (solved.about.fresh_residual, fresh)):
        _, v, damped = dense_solution(model, factors, other, queries)
        torch.testing.assert_close(own, (v - x @ basis.T @ damped).norm(dim=1) / v.norm(dim=1), rtol=1e-6, atol=1e-9)
    assert bool((solved.about.residual < solved.about.fresh_residual).all())
    nothing = score(model, factors, queries, sample, refine=1, refine_on=sample).refinement
    assert nothing.fresh_sequences == 0 and bool(nothing.fresh_residual.isnan().all())


def test_no_iterations_are_ekfac_to_the_bit(case):
    model, factors, sample, queries, sequences = case
    plain = score(model, factors, queries, sequences, by_layer=True)
    found = score(model, factors, queries, sequences, by_layer=True, refine=0, refine_on=sample)
    for part in ("values", "self_influence", "query_norm", "by_layer"):
        assert torch.equal(getattr(found, part), getattr(plain, part))
    assert found.refinement is None
    ends = top_scores(model, factors, queries, sequences, k=3, refine=0)
    assert torch.equal(ends.values, top_scores(model, factors, queries, sequences, k=3).values)


@pytest.mark.parametrize("self_influence", [True, False])
@pytest.mark.parametrize("memory", [2e9, 1.0])
def test_forms_ends_tokens_and_index_rest_on_the_same_solve(tmp_path, memory, self_influence):
    model, sample, queries = tiny_model("gpt_neox"), random_sequences(20), random_sequences(3, seed=5)
    sequences = random_sequences(30, seed=3, padded=True)
    factors = fit_ekfac(model, sample)
    how = {"refine": 4, "refine_on": sample}
    found = score(
        model, factors, queries, sequences, memory=memory, self_influence=self_influence, by_layer=True, **how
    )
    own = score(model, factors, queries, sequences, by_layer=True, **how)
    assert found.refinement.preconditioner == ("drawn" if memory > 1 else "ekfac")
    if memory == 1.0:  # queries one by one, directions in files: as with room for all, under the same preconditioner
        solved = refine(model, factors, queries, sample, 4, preconditioner="ekfac")
        own = score(model, factors, queries, sequences, by_layer=True, refine=solved)
    near = {"rtol": 1e-8, "atol": 1e-8 * float(own.values.abs().max())}
    torch.testing.assert_close(found.values, own.values, **near)
    torch.testing.assert_close(found.by_layer.sum(2), own.values, **near)
    torch.testing.assert_close(found.per_token(-1, [4, 2]).sum(1), own.values[-1, [4, 2]], **near)
    if not self_influence or memory == 1.0:
        return
    one = {name: tensor[:1] for name, tensor in queries.items()}
    torch.testing.assert_close(token_scores(model, factors, one, sequences, **how).sum(1), own.values[0], **near)
    for form in ("raw", "relatif", "cosine"):
        ends = top_scores(model, factors, queries, sequences, k=5, form=form, **how)
        torch.testing.assert_close(ends.values[:, 0], own.form(form).topk(5).values, **near)
        assert ends.refinement.residual.shape == (3,)
    index = build_index(model, factors, sequences, tmp_path / "index", bytes_per_sequence=1 << 16)
    exact = index.query(model, queries, k=5, sequences=sequences, rescore=30, **how)
    torch.testing.assert_close(exact.values[:, 0], own.values.topk(5).values, **near)
    rough = index.query(model, queries, k=5, **how)  # whole gradients in float16
    assert rough.approximate and rough.refinement.fresh_sequences == 0 and exact.refinement.fresh_sequences == 20
    torch.testing.assert_close(rough.values[:, 0].double(), own.values.topk(5).values, rtol=1e-2, atol=1e-2)
    rough = index.query(model, queries, k=5, form="cosine", **how)
    torch.testing.assert_close(rough.values[:, 0].double(), own.cosine.topk(5).values, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(("after", "left"), [(3, 8), (7, 5), (11, 2)])
def test_a_killed_solve_goes_on_to_the_same_bits(tmp_path, monkeypatch, after, left):
    """Killed inside the first block of queries, inside the second, and in the scan that follows: each block takes five products."""
    model, sample, queries = (
        tiny_model("gpt_neox", dtype=torch.float32),
        random_sequences(20),
        random_sequences(2, seed=5),
    )
    sequences, factors = random_sequences(30, seed=3), fit_ekfac(tiny_model("gpt_neox", dtype=torch.float32), sample)
    size = sum(layer.eigenvalues.numel() for layer in factors.layers.values())
    memory = 2 * 4 * size * module.VECTORS  # one query at a time
    monkeypatch.setattr(resume, "SAVE_SECONDS", -1)
    how = {"refine": 4, "refine_on": sample, "memory": memory}
    expected = score(model, factors, queries, sequences, **how)
    calls, plain = [], GaussNewton.product

    def counted(self, *given):
        calls.append(1)
        if len(calls) == after:
            raise KeyboardInterrupt
        return plain(self, *given)

    def stop(done, total):
        raise KeyboardInterrupt

    monkeypatch.setattr(GaussNewton, "product", counted)
    with pytest.raises(KeyboardInterrupt):
        score(model, factors, queries, sequences, resume=tmp_path, progress=stop, **how)
    assert list(tmp_path.glob("refined-*"))
    calls[:] = [0] * 100
    found = score(model, factors, queries, sequences, resume=tmp_path, **how)
    assert torch.equal(found.values, expected.values)
    assert torch.equal(found.refinement.residual, expected.refinement.residual)
    assert len(calls) == 100 + left and not list(tmp_path.iterdir())
    other = {name: tensor.clone() for name, tensor in sample.items()}
    other["input_ids"][1, 2] = (other["input_ids"][1, 2] + 1) % 29
    again = score(model, factors, queries, sequences, resume=tmp_path, **how | {"refine_on": other})
    assert not torch.equal(again.values, expected.values)


def test_padding_and_what_is_no_target_move_nothing():
    model, queries, sequences = tiny_model("llama"), random_sequences(2, seed=5), random_sequences(5, seed=3)
    sample = random_sequences(8, padded=True)
    factors = fit_ekfac(model, sample)
    other = {"input_ids": sample["input_ids"].where(sample["loss_mask"], 7), "loss_mask": sample["loss_mask"]}
    other = {name: torch.nn.functional.pad(tensor, (0, 3)) for name, tensor in other.items()}
    found, again = (score(model, factors, queries, sequences, refine=5, refine_on=each) for each in (sample, other))
    torch.testing.assert_close(again.values, found.values, rtol=1e-5, atol=1e-5 * float(found.values.abs().max()))


@pytest.mark.parametrize("layers", ["mlp", "all"])
@pytest.mark.parametrize("architecture", ["gpt_neox", "gpt2", "bloom", "olmo2"])
def test_products_are_the_same_however_they_are_cut(architecture, layers, monkeypatch):
    """Middle folded or not, in pieces of one sequence, one row and one token, and from whole logits."""
    model = in_float64(random_model(architecture, 0, 16))
    sample = random_sequences(7, padded=True)
    curvature = GaussNewton(model, fit_ekfac(model, sample, layers), sample)
    assert curvature._trunk.head is not None
    v = curvature.gradients(random_sequences(10, seed=5))
    whole = curvature.product(v)
    assert torch.equal(curvature.product(v), whole) and curvature._passes  # kept ones
    near = {"rtol": 1e-9, "atol": 1e-9 * float(whole.abs().max())}
    torch.testing.assert_close(torch.cat([curvature.product(each) for each in v.split(1)]), whole, **near)
    for name, value in {"CPU_BLOCK": 1, "ROWS": 3, "FOLDED": 0}.items():
        monkeypatch.setattr(products, name, value)
        curvature._passes.clear()
        torch.testing.assert_close(curvature.product(v), whole, **near)
    object.__setattr__(curvature._trunk, "head", None)
    curvature._passes.clear()
    torch.testing.assert_close(curvature.product(v), whole, **near)
    curvature._passes.clear()
    curvature._room = 0.0
    torch.testing.assert_close(curvature.product(v), whole, **near)
    assert not curvature._passes


def test_a_head_that_is_not_plain_or_is_tracked_is_differentiated_as_it_is():
    import transformers as tf

    small = {"vocab_size": 29, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 8}
    config = tf.Gemma2Config(**small, num_attention_heads=2, num_key_value_heads=2, final_logit_softcapping=0.5)
    capped, sample = tf.AutoModelForCausalLM.from_config(config).double().eval(), random_sequences(4)
    curvature = GaussNewton(capped, fit_ekfac(capped, sample), sample)
    assert curvature._trunk.head is None
    v = curvature.gradients(random_sequences(2, seed=5))
    damped = gauss_newton(capped, sample) + curvature.damping_of.diag()
    torch.testing.assert_close(curvature.product(v), v @ damped, rtol=1e-6, atol=1e-6 * float(v.abs().max()))
    untied = random_model("qwen2", 0, 16)
    tracked = GaussNewton(untied, fit_ekfac(untied, sample, r"lm_head|mlp"), sample)
    assert tracked._trunk.head is None


def test_a_model_that_cannot_be_differentiated_twice_is_refused():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, gradient):
            return 2 * gradient

    sample = random_sequences(4)
    for beside in (0, 1):  # in the only way through the model, and beside another
        model = tiny_model("gpt_neox")
        model.gpt_neox.layers[1].register_forward_hook(
            lambda module, given, out, beside=beside: Once.apply(out) + beside * out
        )
        with pytest.raises(ValueError, match="cannot be differentiated twice, which Gauss-Newton products need: "):
            score(model, fit_ekfac(model, sample), sample, sample, refine=2, refine_on=sample)


def test_the_same_in_float32():
    sample, queries = random_sequences(20), random_sequences(3, seed=5)
    found = []
    for dtype in (torch.float64, torch.float32):
        model = tiny_model("gpt_neox", dtype=dtype)
        factors = fit_ekfac(model, sample, labels=sample["input_ids"])
        solved = refine(model, factors, queries, sample, 5, preconditioner="ekfac")
        found.append(score(model, factors, queries, sample, refine=solved).values.double())
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-4 * float(found[0].abs().max()))


def test_small_samples_are_warned_of_and_large_ones_not():
    model, queries = tiny_model("gpt_neox", **SIZE), queries_of()
    small, large = random_sequences(999, 6, 11), random_sequences(1000, 6, 11)
    factors = fit_ekfac(model, small)
    with pytest.warns(UserWarning, match="refine_on has 999 sequences: below 1,000"):
        refine(model, factors, queries, small, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refine(model, factors, queries, large, 3)


def test_gradients_are_drawn_from_as_many_sequences_as_fit():
    model, sample = tiny_model("gpt_neox", dtype=torch.float32), random_sequences(1500)
    curvature = GaussNewton(model, fit_ekfac(model, sample), sample)
    size = 4 * len(curvature.damping_of)
    of = {number: number * size + 24 * number**2 for number in (999, 1000, 1200, 1500)}
    assert [module._drawn(curvature, of[number] + 1) for number in of] == [0, 1000, 1200, 1500]
    few = GaussNewton(model, curvature.factors, random_sequences(30), 0.1)  # 33 each
    assert module._drawn(few, of[1000]) == 30 and module._drawn(few, of[999] / 2) == 0


def test_what_does_not_converge_is_refused(monkeypatch):
    model, sample, queries = (
        tiny_model("gpt_neox", dtype=torch.float32),
        random_sequences(4),
        random_sequences(2, seed=5),
    )
    factors = fit_ekfac(model, sample)
    plain = GaussNewton.product
    with (
        monkeypatch.context() as changed,
        pytest.raises(Diverges, match=r"query 0 does not converge: nan of its") as caught,
    ):
        changed.setattr(GaussNewton, "product", lambda self, v: plain(self, v) * torch.nan)
        score(model, factors, queries, sample, refine=2, refine_on=sample)
    assert caught.value.queries == [0, 1]  # all at once, so that who leaves them out solves once more, not twice
    generator = torch.Generator().manual_seed(0)

    def noisy(self, v):
        return plain(self, v) + 30 * v.norm() * torch.randn(v.shape, generator=generator) / v.shape[1] ** 0.5

    with monkeypatch.context() as changed, pytest.raises(ValueError, match=r"does not converge: .* raise damping=0.1"):
        changed.setattr(GaussNewton, "product", noisy)
        score(model, factors, queries, sample, refine=30, refine_on=sample)


def test_nonsense_is_refused_in_a_line():
    model, sample, queries = tiny_model("gpt_neox", **SIZE), random_sequences(6, 6, 11), queries_of()
    factors = fit_ekfac(model, sample)

    def asked(model=model, queries=queries, **how):
        return score(model, factors, queries, sample, **how)

    for wrong in (-1, 2.0, True, "8"):
        with pytest.raises(ValueError, match="must be a whole number of iterations"):
            asked(refine=wrong, refine_on=sample)
    with pytest.raises(ValueError, match="refine=4 needs refine_on"):
        asked(refine=4)
    with pytest.raises(ValueError, match="refine_on has no sequences"):
        asked(refine=4, refine_on={name: tensor[:0] for name, tensor in sample.items()})
    with pytest.raises(ValueError, match="refine_on: input_ids of row 2 holds the id 11"):
        asked(
            refine=4, refine_on=sample | {"input_ids": sample["input_ids"].clone().index_fill_(0, torch.tensor(2), 11)}
        )
    with pytest.raises(ValueError, match="damping=0.* must be above 0 to refine"):
        asked(refine=4, refine_on=sample, damping=0.0)
    with pytest.raises(ValueError, match=r"refining needs float32 or float64, the model is bfloat16"):
        asked(model=tiny_model("gpt_neox", **SIZE, dtype=torch.bfloat16), refine=4, refine_on=sample)
    with pytest.raises(ValueError, match="preconditioner='kfac' is not known"):
        refine(model, factors, queries, sample, 4, preconditioner="kfac")
    solved = refine(model, factors, queries, sample, 4)
    for other in ({"damping": 0.2}, {"queries": random_sequences(2, 6, 11)}):
        with pytest.raises(ValueError, match="solved for other queries, or at another damping"):
            asked(refine=solved, **other)
