"""losses.py against numbers computed by the authors' own code and TRL (golden_losses.json)."""
import json
import math
from pathlib import Path

import pytest
import torch

import losses

GOLDEN = json.loads((Path(__file__).parent / "golden_losses.json").read_text(encoding="utf-8"))
CASES = {case["name"]: case for case in GOLDEN["cases"]}
SIDES = ("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected")
DPO = [
    "dpo_em_beta0.1", "dpo_em_beta0.5", "dpo_em_beta0.1_ls0.1", "dpo_em_beta0.1_reffree",
    "dpo_em_x8_beta0.5", "dpo_em_x8_beta0.5_ls0.1",
    "dpo_halos_beta0.1", "cdpo_halos_beta0.1_eps0.1",
    "dpo_trl_beta0.1", "dpo_trl_beta0.5", "dpo_trl_x8_beta0.5",
    "sigmoid_trl_v0.8.6_beta0.1_ls0.0", "sigmoid_trl_v0.8.6_beta0.1_ls0.1",
    "sigmoid_trl_v0.9.6_beta0.1_ls0.0", "sigmoid_trl_v0.9.6_beta0.1_ls0.1",
]


def close(found, expected, tolerance=1e-6):
    found = torch.as_tensor(found, dtype=torch.float64)
    expected = torch.as_tensor(expected, dtype=torch.float64)
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance, (found, expected)


def sums(scale=1.0):
    """The golden pairs' summed log-probs, fp64, the policy's with a graph."""
    tokens = GOLDEN["inputs"]["pair_token_logps"]
    inputs = [torch.tensor([scale * sum(row) for row in tokens[side]], dtype=torch.float64)
              for side in SIDES]
    return [x.requires_grad_(side.startswith("policy")) for side, x in zip(SIDES, inputs)]


def padded(side):
    """Token log-probs (B, T) of one side, padded with what must never be added, and their mask."""
    rows = GOLDEN["inputs"]["pair_token_logps"][side]
    width = max(map(len, rows))
    logps = torch.tensor([r + [-math.inf] * (width - len(r)) for r in rows], dtype=torch.float64)
    return logps, torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows])


# ---------------------------------------------------------------------------------------------
# DPO

@pytest.mark.parametrize("name", DPO)
def test_dpo_matches_the_authors_code(name):
    args, golden = CASES[name]["args"], CASES[name]["outputs"]
    inputs = sums(8.0 if "_x8_" in name else 1.0)
    if args.get("reference_free"):  # the reference's margin is 0
        inputs[2:] = [torch.zeros(3, dtype=torch.float64)] * 2
    smoothing = args.get("label_smoothing") or args.get("epsilon") or 0.0
    rows, metrics = losses.dpo_loss(*inputs, beta=args["beta"], label_smoothing=smoothing)
    close(rows.mean(), golden["loss_mean"])
    if "losses" in golden:
        close(rows, golden["losses"])
    if "chosen_rewards" in golden and not args.get("reference_free"):
        close(metrics["rewards/chosen"], sum(golden["chosen_rewards"]) / 3)
        close(metrics["rewards/rejected"], sum(golden["rejected_rewards"]) / 3)
    for key in golden.keys() & metrics.keys():  # TRL's own metrics, under TRL's own names
        close(metrics[key], golden[key])
    if "grad_policy_chosen" in golden:
        rows.mean().backward()
        close(inputs[0].grad, golden["grad_policy_chosen"])
        close(inputs[1].grad, golden["grad_policy_rejected"])


def test_every_trl_metric_is_logged_and_detached():
    trl = CASES["dpo_trl_beta0.1"]["outputs"].keys() - {"loss_mean"}
    _, metrics = losses.dpo_loss(*sums())
    assert metrics.keys() == trl
    assert all(m.shape == () and not m.requires_grad for m in metrics.values())


def test_label_smoothing_is_not_ignored():
    # TRL >= 0.29 returns the unsmoothed value; FactTune's and HALOs' code do not.
    ignored = CASES["dpo_trl_beta0.1_ls0.1_IGNORED"]["outputs"]["loss_mean"]
    rows, _ = losses.dpo_loss(*sums(), beta=0.1, label_smoothing=0.1)
    assert abs(rows.mean().item() - ignored) > 4e-3


@pytest.mark.parametrize("beta", [0.01, 0.1, 2.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_ln_2_where_policy_is_reference(beta, smoothing):
    policy = sums()[:2]
    rows, metrics = losses.dpo_loss(*policy, *[p.detach() for p in policy], beta, smoothing)
    close(rows, [math.log(2)] * 3, 1e-12)
    assert metrics["rewards/margins"] == 0 and metrics["rewards/accuracies"] == 0


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_dpo_gradient_is_the_derivative(smoothing):
    policy_chosen, policy_rejected, *reference = sums(4.0)
    assert torch.autograd.gradcheck(
        lambda w, r: losses.dpo_loss(w, r, *reference, 0.3, smoothing)[0],
        (policy_chosen, policy_rejected))


def test_dpo_holds_far_from_zero():
    far = torch.tensor([1e4, -1e4], dtype=torch.float64, requires_grad=True)
    rows, _ = losses.dpo_loss(far, torch.zeros_like(far), *[torch.zeros_like(far)] * 2, beta=1.0)
    rows.sum().backward()
    close(rows, [0.0, 1e4])
    close(far.grad, [0.0, -1.0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_dtype_is_kept(dtype):
    rows, metrics = losses.dpo_loss(*[x.to(dtype) for x in sums()])
    assert {rows.dtype, *(m.dtype for m in metrics.values())} == {dtype}


# ---------------------------------------------------------------------------------------------
# SFT

def test_sft_matches_each_convention_by_its_reduction():
    logps, mask = padded("policy_chosen")
    rows, metrics = losses.sft_loss(logps, mask)
    golden = CASES["sft_conventions"]["outputs"]
    close(rows.mean(), golden["eric_mitchell_mean_of_sequence_sums"])
    close(rows.sum() / metrics["tokens"], golden["token_mean"])
    close((rows / mask.sum(-1)).mean(), golden["mean_of_sequence_token_means"])
    close(rows.sum() / metrics["tokens"], CASES["sft_term_trl"]["outputs"]["loss_mean"])
    assert metrics["tokens"] == 9


def test_dpo_plus_sft_is_trls_mixture():
    case = CASES["dpo_plus_sft_trl_w1_0.2"]
    weight_dpo, weight_sft = case["args"]["loss_weights"]
    nll, metrics = losses.sft_loss(*padded("policy_chosen"))
    pairs, _ = losses.dpo_loss(*sums(), beta=case["args"]["beta"])
    total = weight_dpo * pairs.mean() + weight_sft * nll.sum() / metrics["tokens"]
    close(total, case["outputs"]["loss_mean"])


def test_sft_gradient_ignores_padding():
    logps, mask = padded("policy_rejected")
    logps.requires_grad_()
    losses.sft_loss(logps, mask)[0].sum().backward()
    close(logps.grad, -mask)
    finite = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    kept = torch.tensor([[1, 1, 0], [0, 1, 0]])
    assert torch.autograd.gradcheck(lambda x: losses.sft_loss(x, kept)[0], finite)


# ---------------------------------------------------------------------------------------------
# Log-probabilities

def test_token_logps_is_log_softmax_and_gather():
    generator = torch.Generator().manual_seed(0)
    logits = 30 * torch.randn(3, 5, 11, generator=generator, dtype=torch.float64)
    ids = torch.randint(11, (3, 5), generator=generator)
    expected = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    close(losses.token_logps(logits, ids), expected, 1e-12)
    assert losses.token_logps(logits, ids).dtype == torch.float64
    assert torch.autograd.gradcheck(lambda x: losses.token_logps(x, ids),
                                    logits.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_token_logps_computes_in_fp32(dtype):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 300, 1000, generator=generator).to(dtype)
    ids = torch.randint(1000, (2, 300), generator=generator)
    exact = losses.token_logps(logits.double(), ids)
    found = losses.token_logps(logits, ids)
    assert found.dtype == torch.float32
    close(found.sum(-1), exact.sum(-1), 5e-3)  # log_softmax in bf16 is off by nats here


def test_token_logps_does_not_shift():
    logits = torch.zeros(1, 3, 4)
    logits[0, 1, 2] = 100.0  # position 1 is sure of token 2
    close(losses.token_logps(logits, torch.tensor([[2, 2, 2]])),
          [[-math.log(4), 0.0, -math.log(4)]])


def test_sentence_sums_against_a_loop():
    logps = -torch.arange(1.0, 13.0, dtype=torch.float64).reshape(3, 4)
    ids = torch.tensor([[-1, 0, 0, 1], [3, 3, -1, 3], [-1, -1, -1, -1]])  # sentence 2 has no token
    expected = [sum(x for x, s in zip(logps.flatten().tolist(), ids.flatten().tolist()) if s == k)
                for k in range(4)]
    found = losses.sentence_sums(logps, ids, 4)
    close(found, expected)
    rest = logps[ids == -1].sum()
    close(found.sum() + rest, logps.sum())  # sentences and the rest make the whole
    assert torch.autograd.gradcheck(lambda x: losses.sentence_sums(x, ids, 4),
                                    logps.requires_grad_())
    assert losses.sentence_sums(logps, torch.full((3, 4), -1), 0).shape == (0,)


def test_sentence_sums_are_the_exact_spans():
    # FactAlign's code loses each sentence's first token and gains the one after its end.
    golden = CASES["fkto_factalign_sentence_slice_offbyone"]["outputs"]
    logps = torch.tensor([[-0.1, -0.2, -0.4, -0.8, -1.6, -3.2]], dtype=torch.float64)
    found = losses.sentence_sums(logps, torch.tensor([[0, 0, 0, 1, 1, 1]]), 2)
    close(found, golden["correct_sentence_logps"])
    close(found.sum()[None], golden["full"])
