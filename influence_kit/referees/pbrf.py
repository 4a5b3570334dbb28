"""The proximal Bregman response (Grosse et al. 2023, Eq 7 and 8): what influence functions estimate, by optimisation.

    theta(eps) = argmin  1/N sum_i sum_t KL(p_s,t || p_theta,t)  +  eps L(z, theta)  +  1/2 sum_l lambda_l |theta_l - theta_s,l|^2

p_s are the trained model's own predictions, L the summed loss of one sequence, l a tracked layer; all other weights stay. The
damped Gauss-Newton inverse is its derivative at eps = 0, so the response divided by eps is what every score estimates:
positive means that more weight on z raises log p(query). One solve serves every query.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from influence_kit.engine.factors import Factors
from influence_kit.engine.gradients import forward, frozen, sequence_losses
from influence_kit.engine.products import GaussNewton, sampled_gradients
from influence_kit.engine.sequences import Batch, count, read_batch
from influence_kit.errors import UserError
from influence_kit.referees.curvature import LARGEST

DRAWS = 32  # sets of labels drawn for the coordinates


class Unconverged(UserError):
    """A response that the solver did not reach: `gradient` (the share of it that is left) and `evaluations`."""

    def __init__(self, message: str, gradient: float, evaluations: int) -> None:
        super().__init__(message)
        self.gradient, self.evaluations = gradient, evaluations


@dataclass(frozen=True)
class Response:
    """What more weight on one sequence did.

    log_p [Q]: change of the queries' log-probability divided by eps, in nats at eps = 1, the unit of raw influence.
    gradient: norm of the objective's gradient where the solver stopped, over its norm where it began, in the solver's
    coordinates. evaluations: of the objective.
    """

    log_p: Tensor
    gradient: float
    evaluations: int


class ProximalResponse:
    """Solves for the response of one model to single sequences, over one sample of its training sequences, in float64 on the CPU."""

    def __init__(
        self,
        model: nn.Module,
        factors: Factors,
        sample: Mapping[str, Tensor],
        damping: float = 0.1,
        batch_size: int = 512,
    ) -> None:
        """factors: of the layers that may move; lambda of a layer is `damping` times the mean of its eigenvalues.

        The solver works in coordinates in which the damped Fisher matrix, sampled, is the identity: that changes its speed and not
        its answer. Raises UserError where that matrix is too large to be held whole.
        """
        self.model = in_float64(model)
        self.curvature = GaussNewton(self.model, factors, sample, damping)
        self.names = list(self.curvature.weights_of(self.curvature.damping_of))
        self.weights = [self.model.get_parameter(name) for name in self.names]
        self.start = [weight.detach().clone() for weight in self.weights]
        total = count(sample)
        self.batches = [read_batch(sample, slice(i, min(i + batch_size, total))) for i in range(0, total, batch_size)]
        with frozen(self.model), torch.no_grad():
            self.expected = [forward(self.model, b.tokens[:, : b.length]).log_softmax(-1) for b in self.batches]
        self.total = total
        self.root = self._root()

    def _root(self) -> Tensor:
        """Lower triangle [D, D]: Cholesky's root of the damped Fisher matrix of the sample."""
        number = len(self.curvature.damping_of)
        if number > LARGEST:
            raise UserError(
                f"{number} tracked weights are too many for a proximal response, which holds a matrix of that side "
                f"({8 * number**2 / 1e9:.1f} GB): take a model of at most {LARGEST}"
            )
        fisher = torch.zeros(number, number, dtype=torch.float64)
        for gradients in sampled_gradients(self.curvature, DRAWS, batch_size=256):
            fisher.addmm_(gradients.T, gradients)
        return torch.linalg.cholesky(fisher.div_(DRAWS * self.total) + self.curvature.damping_of.diag())

    def respond(
        self,
        sequence: Mapping[str, Tensor],
        queries: Mapping[str, Tensor],
        eps: float,
        tolerance: float = 1e-3,
        most: int = 2_000,
    ) -> Response:
        """The response of the queries' log p to more weight on one sequence: eps = 1 / N is one more copy in a corpus of N.

        sequence: one row; queries: `input_ids` and `loss_mask` [Q, T]. tolerance: of the gradient's norm, relative to where it
        began. most: evaluations of the objective: where the response is far from linear, more than a thousand (else some thirty).
        Raises Unconverged where `most` evaluations were not enough: an unconverged response is none.
        """
        from scipy.optimize import minimize

        asked, read = read_batch(sequence, slice(0, 1)), read_batch(queries, slice(0, count(queries)))
        with frozen(self.model):
            try:
                before = self._log_p(read)
                begin = np.zeros(len(self.curvature.damping_of))
                norm = float(np.linalg.norm(self._objective(begin, asked, eps)[1]))
                latest = [norm]  # of the gradient: scipy's own test is on its largest entry

                def objective(y: np.ndarray) -> tuple[float, np.ndarray]:
                    value, gradient = self._objective(y, asked, eps)
                    latest[0] = float(np.linalg.norm(gradient))
                    return value, gradient

                def stop(intermediate_result) -> None:
                    if latest[0] <= tolerance * norm:
                        raise StopIteration

                options = {"maxfun": most, "maxiter": most, "ftol": 0.0, "gtol": 0.0, "maxcor": 30}
                found = minimize(objective, begin, method="L-BFGS-B", jac=True, callback=stop, options=options)
                left = float(np.linalg.norm(objective(found.x)[1])) / norm
                if not left <= tolerance:
                    raise Unconverged(
                        f"the proximal response has not converged: after {found.nfev} evaluations {left:.1e} of the gradient is "
                        f"left, {tolerance:.0e} was asked for; raise most={most} or damping",
                        left,
                        int(found.nfev),
                    )
                after = self._log_p(read)
            finally:
                self._place(self.start)
        return Response((after - before) / eps, left, int(found.nfev))

    def _objective(self, y: np.ndarray, asked: Batch, eps: float) -> tuple[float, np.ndarray]:
        """The objective and its gradient at theta_s + R^-T y, where R R^T is the damped Fisher matrix."""
        moved = torch.linalg.solve_triangular(self.root.T, torch.from_numpy(y)[:, None], upper=True)[:, 0]
        self._place([a + b for a, b in zip(self.start, self.curvature.weights_of(moved).values(), strict=True)])
        for weight in self.weights:
            weight.requires_grad_(True)
        value, gradients = 0.0, [torch.zeros_like(weight) for weight in self.weights]

        def add(loss: Tensor) -> None:
            nonlocal value
            value += float(loss.detach())
            for total, part in zip(gradients, torch.autograd.grad(loss, self.weights), strict=True):
                total += part

        for batch, expected in zip(self.batches, self.expected, strict=True):
            logs = forward(self.model, batch.tokens[:, : batch.length]).log_softmax(-1)
            apart = (expected.exp() * (expected - logs)).sum(-1) * batch.loss_mask[:, 1 : batch.length + 1]
            add(apart.sum() / self.total)
        add(eps * _losses(self.model, asked).sum())
        for weight in self.weights:
            weight.requires_grad_(False)
        flat = self.curvature.flat(dict(zip(self.names, gradients, strict=True))) + self.curvature.damping_of * moved
        value += float(0.5 * (self.curvature.damping_of * moved**2).sum())
        return value, torch.linalg.solve_triangular(self.root, flat[:, None], upper=False)[:, 0].numpy()

    def _log_p(self, queries: Batch) -> Tensor:
        with torch.no_grad():
            return -_losses(self.model, queries)

    def _place(self, values: list[Tensor]) -> None:
        with torch.no_grad():
            for weight, value in zip(self.weights, values, strict=True):
                weight.copy_(value)


def in_float64(model: nn.Module) -> nn.Module:
    """A copy on the CPU that computes in float64 throughout; transformers' RMSNorm would round to float32 inside."""
    found = copy.deepcopy(model).cpu().double()
    for parent in list(found.modules()):
        for name, module in parent.named_children():
            if type(module).__name__.endswith("RMSNorm") and not isinstance(module, nn.RMSNorm):
                eps = getattr(module, "variance_epsilon", getattr(module, "eps", 1e-6))
                exact = nn.RMSNorm(module.weight.shape, eps, dtype=torch.float64)
                exact.weight = module.weight  # type: ignore[assignment]
                setattr(parent, name, exact)
    return found


def _losses(model: nn.Module, batch: Batch) -> Tensor:
    logits = forward(model, batch.tokens[:, : batch.length])
    wanted = slice(1, batch.length + 1)
    return sequence_losses(logits, batch.tokens[:, wanted], batch.loss_mask[:, wanted])
