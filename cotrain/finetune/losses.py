"""Losses on the identifier logits of one prompt each, summed over rows.

All take scores (B, K) and relevance (B, K), not negative, with at least one candidate above 0 in
each row: the true next item has 1, what the user takes later less.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def ce_sum(scores: Tensor, relevance: Tensor) -> Tensor:
    """Softmax cross-entropy −Σ_k Q_k log P_k with Q = relevance / Σ relevance; with one relevant
    candidate the plain one. () over rows.

    Source: ListNet top-1 (Cao et al., ICML 2007).
    """
    target = relevance / relevance.sum(1, keepdim=True)
    return -(target * torch.log_softmax(scores, dim=1)).sum()


def ranknet_sum(scores: Tensor, relevance: Tensor) -> Tensor:
    """log(1 + exp(s_j − s_i)) over the pairs where i is more relevant than j, weighted by how much
    more, mean of a row's pairs. () over rows.

    Source: Burges et al., "Learning to Rank using Gradient Descent", ICML 2005; FIRST (Reddy et
    al., 2024) fits it to the logits of the first identifier and weights pairs by rank, not by
    difference of relevance.
    """
    more = (relevance[:, :, None] - relevance[:, None, :]).clamp(min=0)  # (B, K, K) of i over j
    pair = F.softplus(scores[:, None, :] - scores[:, :, None])
    return ((more * pair).sum((1, 2)) / more.sum((1, 2)).clamp(min=1e-12)).sum()


def listmle_sum(scores: Tensor, relevance: Tensor) -> Tensor:
    """Negative log-likelihood, under Plackett-Luce, of taking the relevant candidates first and by
    descending relevance; what is not relevant has no order. Equal ones stand in the order in which
    they are given. Mean of a row's relevant candidates, () over rows.

    Source: Xia et al., "Listwise Approach to Learning to Rank", ICML 2008, cut at the last relevant
    one.
    """
    order = relevance.argsort(dim=1, descending=True, stable=True)
    sorted_scores, relevant = scores.gather(1, order), relevance.gather(1, order) > 0
    # log Σ exp over what is left at each place
    left = torch.logcumsumexp(sorted_scores.flip(1), dim=1).flip(1)
    each = (left - sorted_scores) * relevant
    return (each.sum(1) / relevant.sum(1).clamp(min=1)).sum()


RANKING_LOSSES = {"ce": ce_sum, "ranknet": ranknet_sum, "listmle": listmle_sum}
