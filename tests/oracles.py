"""Dense curvature of small models, from autograd alone: the exact Gauss-Newton matrix and the exact Fisher matrix."""

import torch
from reference import gradient, log_loss, tracked


def _jacobians(model, layers, tokens, mask):
    """For each target position: (Jacobian of the logits [V, D], probabilities [V]); D runs over all layers' [P, M']."""
    output = model(tokens[None])
    logits = (output.logits if hasattr(output, "logits") else output)[0]
    for t in range(len(tokens) - 1):
        if mask[t + 1]:
            rows = [
                torch.cat([g.flatten() for g in gradient_of(model, layers, logits[t, v]).values()])
                for v in range(logits.shape[1])
            ]
            yield torch.stack(rows), logits[t].detach().softmax(-1)


def gradient_of(model, layers, value):
    """Gradients of one number, keeping the graph."""
    parameters = [p for module in layers.values() for p in module.parameters()]
    grads, found = iter(torch.autograd.grad(value, parameters, retain_graph=True)), {}
    for name, module in layers.items():
        weight = next(grads)
        weight = weight if isinstance(module, torch.nn.Linear) else weight.T
        found[name] = torch.cat([weight, next(grads)[:, None]], 1) if module.bias is not None else weight
    return found


def gauss_newton(model, data, pattern=r"\.mlp\."):
    """[D, D]: mean over sequences of sum_t J^T (diag p - p p^T) J."""
    layers, total = tracked(model, pattern), 0
    for tokens, mask in zip(data["input_ids"], data["loss_mask"], strict=True):
        for jacobian, p in _jacobians(model, layers, tokens, mask):
            total = total + jacobian.T @ (torch.diag(p) - p[:, None] * p) @ jacobian
    return total / len(data["input_ids"])


def fisher(model, data, pattern=r"\.mlp\."):
    """[D, D]: mean over sequences of sum_t E_y [g g^T], y running over the whole vocabulary with the model's probabilities.

    Labels of different positions are independent given the tokens, so that cross terms of a sequence's gradient vanish.
    """
    layers, total = tracked(model, pattern), 0
    for tokens, mask in zip(data["input_ids"], data["loss_mask"], strict=True):
        for jacobian, p in _jacobians(model, layers, tokens, mask):
            each = (torch.eye(len(p), dtype=p.dtype) - p) @ jacobian  # gradient of log p(y) for every label y
            total = total + each.T @ (p[:, None] * each)
    return total / len(data["input_ids"])


def sequence_gradients(model, data, pattern=r"\.mlp\."):
    """{layer: [N, P M']} gradients of the summed losses."""
    layers = tracked(model, pattern)
    found = [
        gradient(model, layers, log_loss(model, tokens, mask))
        for tokens, mask in zip(data["input_ids"], data["loss_mask"], strict=True)
    ]
    return {name: torch.stack([each[name].flatten() for each in found]) for name in layers}


def exact_scores(model, data, queries, curvature, damping=0.1, blocks=False, pattern=r"\.mlp\."):
    """[Q, N] by a dense solve; every layer damped by its own mean curvature; `blocks`: layers taken one by one."""
    train, asked = (sequence_gradients(model, some, pattern) for some in (data, queries))
    sizes = [each.shape[1] for each in train.values()]
    damped, start = curvature.clone(), 0
    keep = torch.zeros_like(curvature)
    for size in sizes:
        own = slice(start, start + size)
        damped[own, own] += damping * curvature[own, own].diagonal().mean() * torch.eye(size, dtype=curvature.dtype)
        keep[own, own] = 1
        start += size
    damped = damped * keep if blocks else damped
    left, right = torch.cat(list(asked.values()), 1), torch.cat(list(train.values()), 1)
    return left @ torch.linalg.solve(damped, right.T)
