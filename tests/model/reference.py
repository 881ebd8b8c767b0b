"""Components in plain float64 arithmetic, written from the equations."""

import torch

TINY = torch.finfo(torch.float64).eps


def rms_norm(x, weight):
    return x / (x.pow(2).mean(-1, keepdim=True) + TINY).sqrt() * weight


def silu(x):
    return x / (1 + torch.exp(-x))


def sigmoid(x):
    return 1 / (1 + torch.exp(-x))


def heads_of(x, heads):
    """[T, H] to a list of [T, H / heads]."""
    return x.split(x.shape[-1] // heads, dim=-1)


def attend(query, key, value, keep):
    """One head of one image: [T, d] each, keep bool [T]."""
    scores = query @ key.T / query.shape[-1] ** 0.5
    weights = torch.exp(scores - scores.max()) * keep
    return weights / weights.sum(-1, keepdim=True) @ value


def gated_attention(module, x, keep):
    """[T, H] of one image."""
    per_head = [
        attend(rms_norm(q, module.q_norm.weight), rms_norm(k, module.k_norm.weight), v, keep)
        for q, k, v in zip(
            heads_of(x @ module.q_proj.weight.T, module.heads),
            heads_of(x @ module.k_proj.weight.T, module.heads),
            heads_of(x @ module.v_proj.weight.T, module.heads),
            strict=True,
        )
    ]
    gate = sigmoid(x @ module.gate_proj.weight.T)
    return (torch.cat(per_head, dim=-1) * gate) @ module.o_proj.weight.T


def sparse_experts(module, x, top_k):
    """Update and router logits of [T, H], token by token."""
    router, gate_up, down = (
        module.block.gate.weight,
        module.block.experts.gate_up_proj,
        module.block.experts.down_proj,
    )
    logits = x @ router.T
    update = torch.zeros_like(x)
    for t, token in enumerate(x):
        probability = torch.exp(logits[t]) / torch.exp(logits[t]).sum()
        best = probability.argsort(descending=True)[:top_k]
        for expert in best:
            gate, up = (gate_up[expert] @ token).chunk(2)
            update[t] += probability[expert] / probability[best].sum() * (down[expert] @ (silu(gate) * up))
    return update, logits


def multihead_attention(module, x, keep):
    """`torch.nn.MultiheadAttention` on one image's [K, H]."""
    q, k, v = (x @ module.in_proj_weight.T + module.in_proj_bias).chunk(3, dim=-1)
    split = (heads_of(y, module.num_heads) for y in (q, k, v))
    per_head = [attend(*parts, keep) for parts in zip(*split, strict=True)]
    return torch.cat(per_head, dim=-1) @ module.out_proj.weight.T + module.out_proj.bias
