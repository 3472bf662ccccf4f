"""
Every loss, and nothing else: plain functions on tensors. Formulas live here and nowhere else.

B  rows (pairs, responses)   M  their labelled sentences   T  token positions   V  vocabulary
The log-prob of a response is the SUM (for IPO the mean) of its completion tokens' log-probs given
the prompt. pi_w = log pi(y_w|x) and pi_l are those of the chosen and the rejected response under
the policy, ref_w and ref_l under the reference: each (B,), fp32 or fp64, as is what comes out (half
precision is off by nats in such sums). A step is one update, over all microbatches and processes.

Losses return (losses, metrics), factalign_loss and mix a scalar. `losses` is unreduced: divide its
sum by what the whole step counts. `metrics` are detached scalars over the rows given, under TRL's
names where it has them. The gradient is in the policy's log-probs of the rows and nowhere else: the
reference's and those behind z0 (`kl_estimate`) are computed under no_grad by the caller.
"""
import torch
from torch.nn.functional import logsigmoid

# ---------------------------------------------------------------------------------------------
# From logits to log-probabilities

def token_logps(logits, ids):
    """log p(ids[b, t]) under softmax(logits[b, t]): logits (B, T, V), ids (B, T) -> (B, T).

        logp = logits[ids] - logsumexp(logits)

    No shift inside: logits[:, t] scores ids[:, t]. A causal model's logits at position t speak of
    token t + 1, so the caller shifts, once. Half precision becomes fp32 first; fp64 stays.
    """
    if logits.dtype != torch.float64:
        logits = logits.float()
    return logits.gather(-1, ids[..., None]).squeeze(-1) - logits.logsumexp(-1)


def sentence_sums(token_logps, sentence_id, n):
    """Log-probability of each sentence, the sum of its tokens': (B, T), (B, T) -> (n,).

    sentence_id numbers the sentences over all rows given, 0 <= id < n; -1 is a token of none. A
    sentence without a token sums to 0. The unit of `fkto_loss`: a sentence is scored given the
    prompt and the text before it. FactAlign's code is off by one: each sentence loses its first
    token and gains the one after its end; and it may take one that also stands in the prompt there.
    """
    inside = sentence_id >= 0
    return token_logps.new_zeros(n).index_add(0, sentence_id[inside], token_logps[inside])


# ---------------------------------------------------------------------------------------------
# Targets and pairs

def sft_loss(token_logps, mask):
    """Negative log-likelihood of the completion tokens: (B, T), (B, T) -> (B,).

        loss_b = - sum_t mask[b, t] * token_logps[b, t]

    mask is 1 (or True) on completion tokens, 0 on prompt and padding. Divide the step's sum by the
    step's tokens, not each microbatch by its own: only the former is exact when lengths differ.

    Logged: tokens, the sum of the mask.
    """
    mask = mask.bool()
    losses = -token_logps.masked_fill(~mask, 0.0).sum(-1)
    return losses, {"tokens": mask.sum()}


def _pair_metrics(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta):
    """Means over the pairs. accuracies: how often the margin is above 0."""
    chosen = beta * (policy_chosen - ref_chosen).detach()
    rejected = beta * (policy_rejected - ref_rejected).detach()
    margin = chosen - rejected
    return {
        "rewards/chosen": chosen.mean(), "rewards/rejected": rejected.mean(),
        "rewards/margins": margin.mean(), "rewards/accuracies": (margin > 0).to(margin).mean(),
        "logps/chosen": policy_chosen.detach().mean(),
        "logps/rejected": policy_rejected.detach().mean()}


def dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta=0.1,
             label_smoothing=0.0):
    """DPO (Rafailov et al. 2023, arXiv 2305.18290, Eq. 7); four inputs (B,) -> (B,).

        h    = (pi_w - ref_w) - (pi_l - ref_l)
        loss = -(1 - eps) * log sigmoid(beta * h) - eps * log sigmoid(-beta * h)

    eps = label_smoothing in [0, 0.5): the share of labels thought to be flipped (conservative DPO;
    TRL since 0.29 ignores it for this loss). At policy == reference the loss is ln 2 for any beta
    and eps. Its gradient in pi_w is -beta * (sigmoid(-beta * h) - eps), the opposite in pi_l.

    Logged: rewards beta * (pi - ref), their margins and accuracies, the policy's log-probs.
    """
    h = (policy_chosen - ref_chosen) - (policy_rejected - ref_rejected)
    eps = label_smoothing
    losses = -(1 - eps) * logsigmoid(beta * h) - eps * logsigmoid(-beta * h)
    return losses, _pair_metrics(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta)


def ipo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta=0.1):
    """IPO (Azar et al. 2023, arXiv 2310.12036, Eq. 17); four inputs (B,) -> (B,).

        loss = (h - 1 / (2 * beta)) ** 2,    h as in DPO; the paper's tau is beta

    Inputs are per-token MEANS, each response by its own length, as in TRL and HALOs (the paper does
    not say). With sums, as in the DPO authors' code, h is 10 to 1,000 times larger and beta means
    another thing. At policy == reference the loss is 1 / (4 * beta ** 2); HALOs (KTO's authors'
    code) divides by the number of NON-ZERO token ratios and gets NaN there.

    Logged: as for DPO, but of the means (TRL: of the sums).
    """
    h = (policy_chosen - ref_chosen) - (policy_rejected - ref_rejected)
    losses = (h - 1 / (2 * beta)) ** 2
    return losses, _pair_metrics(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta)


def rso_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta=0.1):
    """The hinge of RSO (Liu et al. 2023, arXiv 2309.06657, "hinge-norm"); inputs (B,) -> (B,).

        loss = max(0, 1 - beta * h),    h as in DPO; the paper's gamma is beta

    1 at policy == reference; no gradient once h >= 1 / beta. RSO's sampling makes data, no loss.

    Logged: as for DPO.
    """
    h = (policy_chosen - ref_chosen) - (policy_rejected - ref_rejected)
    losses = torch.relu(1 - beta * h)
    return losses, _pair_metrics(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta)


def cpo_loss(policy_chosen, policy_rejected, chosen_nll, beta=0.1, alpha=1.0):
    """CPO (Xu et al. 2024, arXiv 2401.08417); three inputs (B,) -> (B,).

        loss = -log sigmoid(beta * (pi_w - pi_l)) + alpha * chosen_nll

    DPO with ref_w = ref_l, and a likelihood term that holds the chosen up. chosen_nll is
    -pi_w * (pairs of the step) / (chosen tokens of the step), so that its mean over the step is the
    mean over the step's chosen tokens, as in TRL. Without a reference nothing offsets length: of
    equally likely tokens the shorter completion wins. No value is fixed at the start.

    Logged: as for DPO with rewards beta * pi; nll_loss, the mean of chosen_nll.
    """
    losses = -logsigmoid(beta * (policy_chosen - policy_rejected)) + alpha * chosen_nll
    metrics = _pair_metrics(policy_chosen, policy_rejected, 0.0, 0.0, beta)
    return losses, {**metrics, "nll_loss": chosen_nll.detach().mean()}


# ---------------------------------------------------------------------------------------------
# Single responses, single sentences, mixtures

def kl_estimate(policy_kl, ref_kl):
    """z0, the reference point of KTO (Ethayarajh et al. 2024, arXiv 2402.01306); (N,), (N,) -> ().

        z0 = max(0, mean_i(log pi(y'_i|x_i) - log ref(y'_i|x_i))),    y'_i of a row with another x

    The N mismatched responses are those of the WHOLE step, gathered by the caller: one number for
    all microbatches and processes; first the mean, then the maximum. 0 for N = 0. Detached. It says
    how far the policy has gone from the reference, in nats: log-ratios are held against it.
    FactAlign pairs each row's OWN completion with another prompt, so its z0 moves with the very
    log-ratios it is held against; HALOs divides by the number of NON-ZERO log-ratios.
    """
    if not len(policy_kl):
        return torch.zeros((), dtype=policy_kl.dtype, device=policy_kl.device)
    return (policy_kl - ref_kl).mean().clamp(min=0).detach()


def kto_loss(logratio, label, kl, beta=0.1, desirable_weight=1.0, undesirable_weight=1.0):
    """KTO (arXiv 2402.01306, Eq. 8): logratio (B,), label (B,) bool, kl = z0 of the step -> (B,).

        logratio = log pi(y|x) - log ref(y|x)
        loss     = w_D * (1 - sigmoid(beta * (logratio - z0)))    where label is True: desirable
                   w_U * (1 - sigmoid(beta * (z0 - logratio)))    where it is False

    w_D, w_U: the two weights. z0 is a constant, without gradient. At policy == reference it is 0
    and the loss w / 2. Far from z0 on either side the gradient vanishes (DPO's on one): KTO gives
    up on what it cannot move. Divide by all rows; keep w_D * n_D : w_U * n_U (n rows) within 4:3.

    Logged: rewards/chosen, rewards/rejected = beta * logratio, means over the desirable and the
    undesirable rows, and rewards/margins, their difference, where there are such rows; kl = z0.
    """
    label = label.bool()
    kl = torch.as_tensor(kl, dtype=logratio.dtype, device=logratio.device).detach()
    desirable = desirable_weight * (1 - torch.sigmoid(beta * (logratio - kl)))
    undesirable = undesirable_weight * (1 - torch.sigmoid(beta * (kl - logratio)))
    rewards, metrics = beta * logratio.detach(), {"kl": kl}
    for name, rows in (("chosen", label), ("rejected", ~label)):
        if rows.any():
            metrics[f"rewards/{name}"] = rewards[rows].mean()
    if len(metrics) == 3:
        metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    return torch.where(label, desirable, undesirable), metrics


def fkto_loss(sentence_logratio, sentence_label, sentence_row, sentence_kl, beta=0.5,
              desirable_weight=1.0, undesirable_weight=1.0, per_response=True):
    """fKTO, KTO on sentences (FactAlign, arXiv 2410.01691, section 4.2.2) -> (annotated rows,).

        loss_b = mean over the sentences s of response b of KTO's loss, with
                 logratio = log pi(s | x, what precedes s) - log ref(s | x, what precedes s)

    sentence_logratio (M,), of `sentence_sums`; sentence_label (M,) bool: do the sentence's facts
    hold; sentence_row (M,): the response it stands in; sentence_kl: the sentences' z0, again a
    constant: `kl_estimate` of all labelled sentences in the step's mismatched responses. A sentence
    without a label or a token is not passed; a response without sentences has no loss. Losses by
    ascending sentence_row; w / 2 at policy == reference. beta exceeds KTO's: fewer tokens.

    per_response=False: (M,), a loss a sentence; FactAlign's code takes their flat mean over a
    microbatch. Its z0, of which the paper is silent, is that of the row's own sentences under
    another prompt.

    Logged: KTO's names with "sentence_" in front.
    """
    losses, metrics = kto_loss(sentence_logratio, sentence_label, sentence_kl, beta,
                               desirable_weight, undesirable_weight)
    if per_response:
        rows, place, counts = sentence_row.unique(return_inverse=True, return_counts=True)
        losses = losses.new_zeros(len(rows)).index_add(0, place, losses) / counts
    return losses, {f"sentence_{name}": value for name, value in metrics.items()}


def factalign_loss(kto_losses, fkto_losses, lam=2.0, n_rows=None, n_annotated=None):
    """FactAlign's objective (arXiv 2410.01691, section 4.2): (B,), (annotated rows,) -> scalar.

        loss = sum(kto_losses) / n_rows + lam * sum(fkto_losses) / n_annotated

    The counts are those of the whole STEP (default: of what is given): add up microbatches and
    divide no further. FactAlign's code averages in each and then over them, so that those without
    sentences thin out the second term. lam 2: the paper's. (1 + lam) / 2 at policy == reference
    with weights 1; without sentences in the step KTO alone.
    """
    n_rows = len(kto_losses) if n_rows is None else n_rows
    n_annotated = len(fkto_losses) if n_annotated is None else n_annotated
    return kto_losses.sum() / n_rows + lam * fkto_losses.sum() / max(n_annotated, 1)


def mix(losses, kinds, weights):
    """APEFT's mixture of general and atomic preferences: losses (B,), kinds [str] -> scalar.

        loss = sum_i w[kind_i] * loss_i / sum_i w[kind_i]

    Of a whole step. weights {kind: number above 0}, ours: the paper (arXiv 2406.12416) merely joins
    pairs of responses and pairs of single facts.
    """
    w = torch.tensor([weights[kind] for kind in kinds], dtype=losses.dtype, device=losses.device)
    return (w * losses).sum() / w.sum()
