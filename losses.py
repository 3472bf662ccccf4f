"""
Every loss, and nothing else: plain functions on tensors. Formulas live here and nowhere else.

B  rows (pairs, responses) of the batch     T  completion tokens     V  vocabulary
The log-prob of a response is the SUM of its completion tokens' log-probs given the prompt: (B,).
fp32 or fp64 in, the same out: half precision is off by nats in such sums.

Losses return (losses, metrics). `losses` is unreduced, so that the loop divides by the size of the
whole step, whatever the microbatches. `metrics` are detached scalars over the rows given, under
TRL's names. Reference log-probs are constants: compute them without a graph.
"""
import torch
from torch.nn.functional import logsigmoid

# ---------------------------------------------------------------------------------------------
# From logits to log-probabilities

def token_logps(logits, ids):
    """log p(ids[b, t]) under softmax(logits[b, t]): logits (B, T, V), ids (B, T) -> (B, T).

        logp = logits[ids] - logsumexp(logits)

    No shift inside: logits[:, t] scores ids[:, t]. A causal model's logits at position t speak of
    token t + 1, so the caller shifts, once. Half-precision logits become fp32 first; fp64 stays.
    """
    if logits.dtype != torch.float64:
        logits = logits.float()
    return logits.gather(-1, ids[..., None]).squeeze(-1) - logits.logsumexp(-1)


def sentence_sums(token_logps, sentence_id, n):
    """Log-probability of each sentence, the sum of its tokens': (B, T), (B, T) -> (n,).

    sentence_id numbers the sentences over the whole batch, 0 <= id < n; -1 is a token of none. A
    sentence without a token sums to 0. fKTO's unit (FactAlign, section 4.2.2).
    """
    inside = sentence_id >= 0
    return token_logps.new_zeros(n).index_add(0, sentence_id[inside], token_logps[inside])


# ---------------------------------------------------------------------------------------------
# Losses

def sft_loss(token_logps, mask):
    """Negative log-likelihood of the completion tokens: (B, T), (B, T) -> (B,).

        loss_b = - sum_t mask[b, t] * token_logps[b, t]

    mask is 1 (or True) on completion tokens, 0 on prompt and padding. Divide the step's sum by the
    step's tokens, not each microbatch by its own: only the former is exact when lengths differ.

    Logged: tokens, the number of completion tokens, a scalar.
    """
    mask = mask.bool()
    losses = -token_logps.masked_fill(~mask, 0.0).sum(-1)
    return losses, {"tokens": mask.sum()}


def dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta=0.1,
             label_smoothing=0.0):
    """DPO (Rafailov et al. 2023, arXiv 2305.18290, Eq. 7); four inputs (B,) -> (B,).

        h    = (policy_chosen - ref_chosen) - (policy_rejected - ref_rejected)
        loss = -(1 - eps) * log sigmoid(beta * h) - eps * log sigmoid(-beta * h)

    eps = label_smoothing in [0, 0.5): the share of labels thought to be flipped (conservative DPO;
    TRL since 0.29 ignores it for this loss). At policy == reference the loss is ln 2 for any beta
    and eps. Its gradient in policy_chosen is -beta * (sigmoid(-beta * h) - eps), the opposite in
    policy_rejected.

    Logged: means over the pairs, detached. rewards/chosen and rewards/rejected =
    beta * (policy - ref); rewards/margins, their difference; rewards/accuracies, the share of pairs
    with a margin above 0 (so 0 at policy == reference); logps/chosen, logps/rejected of the policy.
    """
    chosen = beta * (policy_chosen - ref_chosen)
    rejected = beta * (policy_rejected - ref_rejected)
    margin = chosen - rejected
    losses = -(1 - label_smoothing) * logsigmoid(margin) - label_smoothing * logsigmoid(-margin)
    metrics = {
        "rewards/chosen": chosen.mean(),
        "rewards/rejected": rejected.mean(),
        "rewards/margins": margin.mean(),
        "rewards/accuracies": (margin > 0).to(margin.dtype).mean(),
        "logps/chosen": policy_chosen.mean(),
        "logps/rejected": policy_rejected.mean(),
    }
    return losses, {name: value.detach() for name, value in metrics.items()}
