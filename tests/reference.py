"""EK-FAC the slow way, from ordinary weight gradients of one sequence at a time: shares no code with the kit's engine."""

import re

import torch
from torch import nn


def tracked(model, pattern=r"\.mlp\."):
    """{name: module} of the linear maps whose name matches."""
    found = {}
    for name, module in model.named_modules():
        if re.search(pattern, name) and (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"):
            found[name] = module
    return found


def log_loss(model, tokens, mask, labels=None):
    """Summed loss of one sequence [T]; targets are labels[t] where mask[t], predicted from t - 1."""
    output = model(tokens[None])
    log_p = (output.logits if hasattr(output, "logits") else output)[0, :-1].log_softmax(-1)
    targets = (tokens if labels is None else labels)[1:]
    return -(log_p.gather(1, targets[:, None])[:, 0] * mask[1:]).sum()


def gradient(model, layers, loss):
    """{name: [P, M'] gradient}, bias as last column."""
    parameters = [p for module in layers.values() for p in module.parameters()]
    found, grads = {}, iter(torch.autograd.grad(loss, parameters))
    for name, module in layers.items():
        weight = next(grads)
        weight = weight if isinstance(module, nn.Linear) else weight.T
        found[name] = torch.cat([weight, next(grads)[:, None]], 1) if module.bias is not None else weight
    return found


def statistics(model, layers, data, labels):
    """Mean over counted positions of a a^T and g g^T, {name: (A, S)}."""
    seen, A, S, total = {}, {}, {}, 0

    def hook(name):
        def record(module, arguments, output):
            output.retain_grad()
            seen[name] = (arguments[0].detach().flatten(0, -2), output)

        return record

    handles = [module.register_forward_hook(hook(name)) for name, module in layers.items()]
    for n in range(len(labels)):
        mask = data["loss_mask"][n]
        last = int(mask.nonzero().max())  # positions from here on predict nothing
        model.zero_grad()
        log_loss(model, data["input_ids"][n], mask, labels[n]).backward()
        for name, module in layers.items():
            a, out = seen[name][0][:last], seen[name][1].grad.flatten(0, -2)[:last]
            if module.bias is not None:
                a = torch.cat([a, torch.ones_like(a[:, :1])], 1)
            A[name] = A.get(name, 0) + a.T @ a
            S[name] = S.get(name, 0) + out.T @ out
        total += last
    for handle in handles:
        handle.remove()
    model.zero_grad()
    return {name: (A[name] / total, S[name] / total) for name in layers}


def ekfac_scores(model, data, labels, queries, damping=0.1, pattern=r"\.mlp\."):
    """[Q, N] scores of the sequences `data` on the queries, factors fitted on `data` with the given labels."""
    layers = tracked(model, pattern)
    moments = statistics(model, layers, data, labels)

    def all_gradients(data, labels=None):
        return [
            gradient(
                model,
                layers,
                log_loss(model, data["input_ids"][n], data["loss_mask"][n], None if labels is None else labels[n]),
            )
            for n in range(len(data["input_ids"]))
        ]

    pseudo, train, asked = all_gradients(data, labels), all_gradients(data), all_gradients(queries)
    scores = 0
    for name, (A, S) in moments.items():
        q_a, q_s = torch.linalg.eigh(A.double())[1].to(A), torch.linalg.eigh(S.double())[1].to(S)
        turned = torch.stack([q_s.T @ g[name] @ q_a for g in pseudo])
        eigenvalues = turned.square().mean(0)
        inverse = 1 / (eigenvalues + damping * eigenvalues.mean())
        left = torch.stack([q_s @ ((q_s.T @ g[name] @ q_a) * inverse) @ q_a.T for g in asked]).flatten(1)
        scores = scores + left @ torch.stack([g[name] for g in train]).flatten(1).T
    return scores.detach()
