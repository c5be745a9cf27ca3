"""Losses of a recovery, each the mean over the predicted tokens, in nats."""

import torch
from torch.nn.functional import cross_entropy, log_softmax

LEAST = 1e-12
"""Least probability that a student leaves over for all tokens which a teacher's file omits."""


def divergence(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Return mean KL(teacher ‖ student) of logits ``(windows, tokens, V')``."""
    wanted, found = log_softmax(teacher.float(), -1), log_softmax(student.float(), -1)
    return (wanted.exp() * (wanted - found)).sum(-1).mean()


def divergence_from_top(
    student: torch.Tensor, ids: torch.Tensor, logprobs: torch.Tensor, rest: torch.Tensor
) -> torch.Tensor:
    """Return mean KL(teacher ‖ student) where only the teacher's likeliest tokens are known.

    All other tokens count as one, whose probability is what these leave over. If the teacher's file
    names all tokens, this is ``divergence``.

    Args:
        student: Logits ``(windows, tokens, V')``.
        ids: int64 ``(windows, tokens, k)``, the likeliest tokens.
        logprobs: Their ln p, float ``(windows, tokens, k)``.
        rest: The ln of the probability that is left over, ``(windows, tokens)``; −inf where nothing
            is.
    """
    found = log_softmax(student.float(), -1).gather(-1, ids)
    wanted = logprobs.float()
    known = (wanted.exp() * (wanted - found)).sum(-1)
    some = rest > -torch.inf
    left = (1 - found.exp().sum(-1)).clamp(min=LEAST).log()
    unnamed = rest.exp() * (rest.where(some, left) - left)
    return (known + unnamed.where(some, torch.zeros_like(unnamed))).mean()


def surprise(student: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return the mean −ln p of each next token: what pretraining minimizes."""
    logits, targets = student[:, :-1].float(), ids[:, 1:].long()
    return cross_entropy(logits.flatten(0, 1), targets.flatten())
