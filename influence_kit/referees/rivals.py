"""EK-FAC and its rivals behind one interface: `method(setting) -> scores [Q, N]`, higher means that more weight on the sequence
should raise log p(query) more. Only differences between sequences mean anything across methods: of their scales, those of the
inverse-Hessian family alone are nats.

Cost of a method is what `stages/rivals.py` measures around it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from influence_kit.engine.factors import Factors
from influence_kit.engine.fitting import fit_ekfac
from influence_kit.engine.gradients import device_of, frozen
from influence_kit.engine.scans import score
from influence_kit.engine.scores import Scores
from influence_kit.engine.sequences import batch_rows, count, read_batch
from influence_kit.errors import UserError
from influence_kit.measures.lexical import bm25, idf_overlap, token_counts
from influence_kit.referees.curvature import GaussNewton
from influence_kit.referees.lissa import lissa, top_eigenvalue

HALVINGS = 4  # of LiSSA's scale, before it is given up
Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Setting:
    """What every method gets: the model at any fraction of its training, queries, sequences to score, and a sample of the
    training sequences for curvature (`input_ids` int64 [., T], `loss_mask` bool [., T])."""

    model_at: Callable[[float], nn.Module]
    queries: Batch
    sequences: Batch
    sample: Batch
    damping: float = 0.1
    layers: str = "mlp"
    seed: int = 0
    corpus_size: int | None = None
    checkpoints: tuple[tuple[float, float], ...] = ((1.0, 1.0),)  # (fraction, learning rate there), for TracIn
    depth: int = 64  # LiSSA's steps
    minibatch: int = 64  # LiSSA's sequences a step
    factors: Factors | None = field(default=None, compare=False)  # EK-FAC's on the sample, where they are there already

    @cached_property
    def model(self) -> nn.Module:
        """The model at the end of training."""
        return self.model_at(1.0)

    def fit(
        self, method: str = "ekfac", labels: str = "sampled", sample: Batch | None = None, at: float = 1.0
    ) -> Factors:
        """Factors of one method, of the curvature sample by default."""
        if (method, labels, sample, at) == ("ekfac", "sampled", None, 1.0) and self.factors is not None:
            return self.factors
        model = self.model if at == 1.0 else self.model_at(at)
        return fit_ekfac(
            model, self.sample if sample is None else sample, self.layers, labels, seed=self.seed, method=method
        )

    def score(self, factors: Factors, damping: float | None = None, at: float = 1.0) -> Scores:
        """Scores under given factors, at the setting's damping by default."""
        model = self.model if at == 1.0 else self.model_at(at)
        damping = self.damping if damping is None else damping
        return score(model, factors, self.queries, self.sequences, damping, corpus_size=self.corpus_size)

    @cached_property
    def by_ekfac(self) -> Scores:
        """EK-FAC's scores, of which there are three forms."""
        return self.score(self.fit())

    @cached_property
    def by_gradients(self) -> Scores:
        """Scores from plain gradients."""
        return self.score(self.fit("identity"))

    @cached_property
    def curvature(self) -> GaussNewton:
        """The Gauss-Newton matrix of the sample, damped as EK-FAC damps it."""
        return GaussNewton(self.model, self.fit(), self.sample, self.damping)

    @cached_property
    def matrix(self) -> Tensor:
        """That matrix whole, float64 [D, D], for models small enough."""
        return self.curvature.dense()


Method = Callable[[Setting], Tensor]


def gradient_dot(s: Setting) -> Tensor:
    """Inner product of the two gradients."""
    return s.by_gradients.values


def gradient_cosine(s: Setting) -> Tensor:
    """Cosine of the two gradients."""
    return s.by_gradients.cosine


def tracin(s: Setting) -> Tensor:
    """TracInCP (Pruthi et al. 2020): gradient dots at several checkpoints, weighted by the learning rate there."""
    plain = s.fit("identity")
    return torch.stack([rate * s.score(plain, at=at).values for at, rate in s.checkpoints]).sum(0)


def ekfac(s: Setting) -> Tensor:
    """EK-FAC influence."""
    return s.by_ekfac.values


def relatif(s: Setting) -> Tensor:
    """RelatIF (Barshan et al. 2020): EK-FAC influence over the norm of the training sequence's whitened gradient."""
    return s.by_ekfac.relatif


def ekfac_cosine(s: Setting) -> Tensor:
    """Cosine of the two whitened gradients."""
    return s.by_ekfac.cosine


def kfac(s: Setting) -> Tensor:
    """K-FAC influence: eigenvalues from the factors, not corrected."""
    return s.score(s.fit("kfac")).values


def diagonal(s: Setting) -> Tensor:
    """Diagonal of the Fisher matrix in place of the whole."""
    return s.score(s.fit("diagonal")).values


def trackstar(s: Setting) -> Tensor:
    """After TrackStar (Chang et al. 2024): gradients divided by the root of their second moment, at unit norm.

    The second moment is the training gradients' own, as an optimizer holds it, not smoothed over steps; there is no projection
    and no Hessian on top.
    """
    return s.score(s.fit("diagonal", "data"), damping=1e-3).cosine


def exact(s: Setting) -> Tensor:
    """The damped Gauss-Newton matrix of the sample itself, over all tracked layers."""
    return _solved(s, s.matrix)


def block_diagonal(s: Setting) -> Tensor:
    """The same without what one layer's weights know of another's."""
    return _solved(s, s.curvature.within_layers(s.matrix))


def _solved(s: Setting, matrix: Tensor) -> Tensor:
    vectors = s.curvature.gradients(s.queries)
    found = torch.cholesky_solve(vectors.double().cpu().T, torch.linalg.cholesky(matrix)).T
    return s.curvature.scores(found.to(vectors), s.sequences, 256)


def lissa_tuned(s: Setting) -> Tensor:
    """LiSSA at the largest scale that power iteration calls safe, or half of it, and so on, where that diverges."""
    size = min(s.minibatch, count(s.sample))
    scale, vectors = 1 / top_eigenvalue(s.curvature, size, seed=s.seed), s.curvature.gradients(s.queries)
    for halvings in range(HALVINGS + 1):
        try:
            found = lissa(s.curvature, vectors, [s.depth], scale / 2**halvings, size, seed=s.seed)
            break
        except UserError:  # a minibatch with a larger eigenvalue than those that power iteration saw
            if halvings == HALVINGS:
                raise
    return s.curvature.scores(found[-1], s.sequences, 256)


def representations(s: Setting, layer: int) -> Tensor:
    """Cosine between mean hidden states [d] of query and sequence after `layer` blocks (0: the embeddings)."""
    query, train = (_states(s.model, part, layer) for part in (s.queries, s.sequences))
    return query @ train.T


def _states(model: nn.Module, sequences: Batch, layer: int) -> Tensor:
    """Unit vectors [N, d]: the mean over the counted positions and the last target of a sequence's hidden states."""
    found = []
    with torch.no_grad(), frozen(model):
        for rows in batch_rows(count(sequences), 256):
            batch = read_batch(sequences, rows)
            read = batch.tokens[:, : batch.length + 1]
            asked = read.to(device_of(model))
            states = (
                model(input_ids=asked, output_hidden_states=True, use_cache=False).hidden_states[layer].float().cpu()
            )
            last = (batch.loss_mask[:, : read.shape[1]] * torch.arange(read.shape[1])).amax(1, keepdim=True)
            kept = (torch.arange(read.shape[1])[None] <= last)[..., None]
            found.append(nn.functional.normalize((states * kept).sum(1), dim=1))
    return torch.cat(found)


def lexical_bm25(s: Setting) -> Tensor:
    """BM25 between the query's tokens and the sequence's."""
    return _lexical(s, bm25)


def lexical_tfidf(s: Setting) -> Tensor:
    """Summed IDF of the tokens that the two share (the paper's TF-IDF filter, Eq 28 and 29, without counts)."""
    return _lexical(s, idf_overlap)


def _lexical(s: Setting, overlap: Callable) -> Tensor:
    counts = []
    for part in (s.queries, s.sequences):
        batch = read_batch(part, slice(0, count(part)))
        last = (batch.loss_mask * torch.arange(batch.tokens.shape[1])).amax(1, keepdim=True)
        kept = torch.arange(batch.tokens.shape[1])[None] <= last
        kept[:, 0] = False  # every document begins alike
        counts.append(token_counts(batch.tokens.numpy(), kept.numpy()))
    return torch.from_numpy(overlap(*counts)).float()


def chance(s: Setting) -> Tensor:
    """Random numbers: what no method may fall below."""
    generator = torch.Generator().manual_seed(s.seed)
    return torch.randn(count(s.queries), count(s.sequences), generator=generator)


METHODS: dict[str, Method] = {
    "exact": exact,
    "block-diagonal": block_diagonal,
    "EK-FAC": ekfac,
    "RelatIF": relatif,
    "EK-FAC cosine": ekfac_cosine,
    "K-FAC": kfac,
    "diagonal": diagonal,
    "LiSSA": lissa_tuned,
    "TrackStar-style": trackstar,
    "TracIn": tracin,
    "gradient dot": gradient_dot,
    "gradient cosine": gradient_cosine,
    "BM25": lexical_bm25,
    "TF-IDF": lexical_tfidf,
    "random": chance,
}


def methods_for(model: nn.Module, exactly: bool) -> dict[str, Method]:
    """The methods by name, representation similarity at the first, middle and last block among them; `exactly`: also those that
    solve with the Gauss-Newton matrix itself, which small models alone can afford."""
    slow = ("exact", "block-diagonal", "LiSSA")
    found = {name: method for name, method in METHODS.items() if exactly or name not in slow}
    depth = int(model.config.num_hidden_layers)  # type: ignore[union-attr, arg-type]
    for layer in sorted({0, (depth + 1) // 2, depth}):
        found[f"representations, {layer} of {depth} blocks"] = lambda s, layer=layer: representations(s, layer)  # type: ignore[misc]
    return found


def damping_sweep(dampings: tuple[float, ...]) -> dict[str, Method]:
    """EK-FAC at other dampings, as shares of the mean eigenvalue."""
    return {f"EK-FAC, damping {d:g}": lambda s, d=d: s.score(s.fit(), d).values for d in dampings}  # type: ignore[misc]


def variants(sizes: tuple[int, ...], fractions: tuple[float, ...]) -> dict[str, Method]:
    """EK-FAC under the empirical Fisher, fitted on fewer sequences, and asked at earlier checkpoints."""

    def fewer(s: Setting, size: int) -> Tensor:
        return s.score(s.fit(sample={name: tensor[:size] for name, tensor in s.sample.items()})).values

    found: dict[str, Method] = {"EK-FAC, empirical Fisher": lambda s: s.score(s.fit("ekfac", "data")).values}
    found |= {f"EK-FAC, fitted on {n}": lambda s, n=n: fewer(s, n) for n in sizes}  # type: ignore[misc]
    found |= {
        f"EK-FAC, at {f:.0%} of training": lambda s, f=f: s.score(s.fit(at=f), at=f).values  # type: ignore[misc]
        for f in fractions
    }
    return found
