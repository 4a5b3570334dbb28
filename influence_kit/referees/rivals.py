"""EK-FAC and its rivals behind one interface: `method(setting) -> scores [Q, N]`, higher means that more weight on the
sequence should raise log p(query) more. Only differences between sequences mean anything across methods: of their
scales, those of the inverse-Hessian family alone are nats.

Cost of a method is what the caller measures around it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor, nn

from influence_kit.engine.factors import Factors
from influence_kit.engine.fitting import fit_ekfac
from influence_kit.engine.gradients import device_of, frozen
from influence_kit.engine.products import GaussNewton
from influence_kit.engine.scans import score
from influence_kit.engine.scores import Scores
from influence_kit.engine.sequences import batch_rows, count, read_batch
from influence_kit.referees.curvature import dense, within_layers
from influence_kit.referees.lissa import tuned

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Setting:
    """What every method gets: the model at any fraction of its training, queries, sequences to score, and a sample of
    the training sequences for curvature (`input_ids` int64 [., T], `loss_mask` bool [., T])."""

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
        return dense(self.curvature)


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

    The second moment is the training gradients' own, as an optimizer holds it, not smoothed over steps; there is no
    projection and no Hessian on top.
    """
    return s.score(s.fit("diagonal", "data"), damping=1e-3).cosine


def exact(s: Setting) -> Tensor:
    """The damped Gauss-Newton matrix of the sample itself, over all tracked layers."""
    return _solved(s, s.matrix)


def block_diagonal(s: Setting) -> Tensor:
    """The same without what one layer's weights know of another's."""
    return _solved(s, within_layers(s.curvature, s.matrix))


def _solved(s: Setting, matrix: Tensor) -> Tensor:
    vectors = s.curvature.gradients(s.queries)
    found = torch.cholesky_solve(vectors.double().cpu().T, torch.linalg.cholesky(matrix)).T
    return s.curvature.scores(found.to(vectors), s.sequences, 256)


def lissa(s: Setting) -> Tensor:
    """LiSSA, its scale found by power iteration."""
    _, found = tuned(
        s.curvature, s.curvature.gradients(s.queries), [s.depth], min(s.minibatch, count(s.sample)), s.seed
    )
    return s.curvature.scores(found[-1], s.sequences, 256)


def representations(s: Setting, layer: int) -> Tensor:
    """Cosine between mean hidden states [d] of query and sequence after `layer` blocks (0: the embeddings)."""
    query, train = (_states(s.model, part, layer) for part in (s.queries, s.sequences))
    return query @ train.T


def _states(model: nn.Module, sequences: Batch, layer: int) -> Tensor:
    """Unit vectors [N, d]: the mean over the counted positions and the last target of a sequence's hidden states."""
    found = []
    with frozen(model), torch.no_grad():
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


Overlap = Callable[
    [list[list[int]], list[list[int]]], np.ndarray
]  # token ids of queries and of sequences -> scores [Q, N]


def by_words(s: Setting, overlap: Overlap) -> Tensor:
    """What the tokens that query and sequence share are worth, up to the last target of either."""
    return torch.from_numpy(overlap(*(_words(part) for part in (s.queries, s.sequences)))).float()


def _words(sequences: Batch) -> list[list[int]]:
    """Token ids of each row up to its last target, without the first: every document begins alike."""
    batch = read_batch(sequences, slice(0, count(sequences)))
    last = (batch.loss_mask * torch.arange(batch.tokens.shape[1])).amax(1).tolist()
    return [row[1 : end + 1] for row, end in zip(batch.tokens.tolist(), last, strict=True)]


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
    "LiSSA": lissa,
    "TrackStar-style": trackstar,
    "TracIn": tracin,
    "gradient dot": gradient_dot,
    "gradient cosine": gradient_cosine,
}


# With the sample's Gauss-Newton matrix itself: dear, and for small models alone.
INVERSES = ("exact", "block-diagonal", "LiSSA")


def methods_for(model: nn.Module, overlaps: Mapping[str, Overlap]) -> dict[str, Method]:
    """The methods by name: METHODS but INVERSES, rankings by shared words, random numbers, and representation similarity at the
    first, middle and last block.

    Args:
        overlaps: What two texts share, by name ("BM25", …).
    """
    found = {name: method for name, method in METHODS.items() if name not in INVERSES}
    found |= {name: partial(by_words, overlap=overlap) for name, overlap in overlaps.items()}
    found["random"] = chance
    depth = int(model.config.num_hidden_layers)  # type: ignore[union-attr, arg-type]
    for layer in sorted({0, (depth + 1) // 2, depth}):
        found[f"representations, {layer} of {depth} blocks"] = partial(representations, layer=layer)
    return found


def damping_sweep(dampings: tuple[float, ...]) -> dict[str, Method]:
    """EK-FAC at other dampings, as shares of the mean eigenvalue."""
    return {f"EK-FAC, damping {damping:g}": partial(_variant, damping=damping) for damping in dampings}


def variants(sizes: tuple[int, ...], fractions: tuple[float, ...]) -> dict[str, Method]:
    """EK-FAC under the empirical Fisher, fitted on fewer sequences, and asked at earlier checkpoints."""
    found: dict[str, Method] = {"EK-FAC, empirical Fisher": partial(_variant, labels="data")}
    found |= {f"EK-FAC, fitted on {size}": partial(_variant, fitted_on=size) for size in sizes}
    return found | {f"EK-FAC, at {at:.0%} of training": partial(_variant, at=at) for at in fractions}


def _variant(
    s: Setting, damping: float | None = None, labels: str = "sampled", fitted_on: int | None = None, at: float = 1.0
) -> Tensor:
    sample = None if fitted_on is None else {name: tensor[:fitted_on] for name, tensor in s.sample.items()}
    return s.score(s.fit("ekfac", labels, sample, at), damping, at).values
