"""All tests. The method against independent oracles: autograd Jacobians, closed forms, brute force, sums by hand; the
scripts against themselves (interrupted or not, one process or two), against the packages they use, and against bad input.

    python -m pytest                              # some minutes on two cores
    python -m pytest -m "slow or not slow"        # all, as continuous integration runs them
"""

import argparse
import contextlib
import dataclasses
import io
import json
import math
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from PIL import Image
from torch.autograd.functional import jacobian

import biflow
import fid
import sample
import train_forward
import train_reverse
from biflow import (
    SIZES,
    BiFlow,
    Config,
    FlowBlock,
    PerceptualDistance,
    TARFlow,
    adaptive_weight,
    guidance_schedule,
    nll_loss,
    patchify,
    random_resized_crop,
    reverse_loss,
    rope_table,
    rotate,
    unpatchify,
)

SMALL = Config(img_size=4, num_classes=3, width=16, head_dim=8, blocks=3, class_tokens=2, guidance_tokens=1)
T, D, B = 4, 4, 3  # of SMALL
CLIP = 0.3  # clips about half of the parameters of a model from `make`
STRATEGIES = [(strategy, denoise) for strategy in ("align", "hidden", "naive") for denoise in ("learned", "none")]
BF16 = dict(device_type="cpu", dtype=torch.bfloat16, cache_enabled=False)


def make(cls, dtype=torch.float32, **changes):
    """A small model whose parameters are all perturbed, so that no test passes because a new block is the identity."""
    torch.manual_seed(0)
    model = cls(dataclasses.replace(SMALL, **changes)).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.eval()


def close(a, b, tolerance):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ----------------------------------------------------------------------------------------------------------------------
# Sizes, tokens, configs


@pytest.mark.parametrize("cls, size, millions", [(TARFlow, "B", 120), (TARFlow, "XL", 690), (BiFlow, "B", 133)])
def test_parameter_counts_are_the_papers(cls, size, millions):
    with torch.device("meta"):
        count = sum(p.numel() for p in cls(SIZES[size]).parameters())
    assert abs(count / 1e6 / millions - 1) < 0.03


@pytest.mark.parametrize("p", [1, 2, 3])
def test_patchify_is_unfold_and_unpatchify_its_inverse(p):
    x = torch.randn(2, 3, 6, 6)
    assert torch.equal(patchify(x, p), F.unfold(x, p, stride=p).transpose(1, 2))
    assert torch.equal(unpatchify(patchify(x, p), p), x)


@pytest.mark.parametrize(
    "field, value",
    [
        *[("img_size", 7), ("img_size", "8"), ("patch_size", 0), ("channels", True), ("num_classes", -1)],
        *[("width", 20), ("width", 16.0), ("head_dim", 2), ("blocks", 0), ("layers", -1), ("layers", None)],
        *[("clip", 0), ("clip", -1.0), ("clip", math.nan), ("clip", math.inf), ("clip", "none")],
        *[("strategy", "aligned"), ("denoise", "score"), ("class_tokens", 0), ("guidance_tokens", 0)],
        *[("w_max", -0.1), ("w_max", math.nan), ("w_max", math.inf), ("w_max", None)],
    ],
)
def test_config_refuses(field, value):
    with pytest.raises(ValueError, match=field):
        dataclasses.replace(SMALL, **{field: value})


# ----------------------------------------------------------------------------------------------------------------------
# F: log-det, inverse, causality, density, clipping, denoising


@pytest.mark.parametrize("clip", [CLIP, None])
@pytest.mark.parametrize("y", [torch.tensor([2]), torch.tensor([-1]), None])
def test_logdet_is_that_of_the_jacobian(clip, y):
    # Oracle: the whole flow's Jacobian by autograd, in float64.
    flow = make(TARFlow, torch.float64, clip=clip)
    x = torch.randn(1, 1, 4, 4, dtype=torch.float64)
    J = jacobian(lambda x: flow(x, y)[0][-1], x).view(T * D, T * D)
    close(flow(x, y)[1], torch.linalg.slogdet(J).logabsdet.view(1), 1e-8)


def test_no_class_is_the_mean_of_the_class_embeddings():
    # Oracle: an unconditional flow that has the mean class embedding in its position embedding.
    flow, plain = make(TARFlow, torch.float64), make(TARFlow, torch.float64, num_classes=0)
    state = flow.state_dict()
    for i in range(B):
        state[f"blocks.{i}.pos_embed"] = state[f"blocks.{i}.pos_embed"] + state.pop(f"blocks.{i}.class_embed").mean(0)
    plain.load_state_dict(state)
    x = torch.randn(2, 1, 4, 4, dtype=torch.float64)
    close(flow.log_prob(x, None), plain.log_prob(x), 1e-12)
    close(flow.log_prob(x, torch.tensor([1, -1]))[1:], plain.log_prob(x)[1:], 1e-12)
    assert (flow.log_prob(x, torch.tensor([1, 2])) - plain.log_prob(x)).abs().min() > 1e-3


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-8), (torch.float32, 1e-4)])
@pytest.mark.parametrize("changes", [dict(clip=CLIP), dict(clip=None), dict(num_classes=0), dict(patch_size=1)])
def test_inverse_undoes_forward(dtype, tolerance, changes):
    flow = make(TARFlow, dtype, **changes)
    x = torch.randn(3, 1, 4, 4, dtype=dtype)
    y = torch.tensor([0, 2, -1]) if flow.config.num_classes else None
    states, _ = flow(x, y)
    z = states[-1].clone()
    assert (z - states[0]).abs().mean() > 0.1
    assert (flow.inverse(z, y) - x).abs().max() < tolerance
    assert torch.equal(z, states[-1])  # not decoded in place


def probed_parameters(block, x, y, t):
    """(alpha, mu) of token t, each (N, D), read off the block's map, which is affine in x_t."""
    at_0, at_1 = (block(x.index_fill(1, torch.tensor(t), value), y)[0][:, t] for value in (0.0, 1.0))
    return -torch.log(at_1 - at_0), -at_0 / (at_1 - at_0)


@pytest.mark.parametrize("guidance", [0.0, 1.5])
def test_cached_decoding_agrees_with_uncached_guided_decoding(guidance):
    # Oracle: token after token without a cache, the parameters being probed from the forward map alone.
    flow, y, none = make(TARFlow, torch.float64), torch.tensor([0, 2]), torch.tensor([-1, -1])
    z = state = torch.randn(2, T, D, dtype=torch.float64)
    for i in reversed(range(B)):
        x = torch.zeros_like(z)
        for t in range(T) if i % 2 == 0 else reversed(range(T)):
            alpha_c, mu_c = probed_parameters(flow.blocks[i], x, y, t)
            alpha_u, mu_u = probed_parameters(flow.blocks[i], x, none, t)
            alpha, mu = alpha_c + guidance * (alpha_c - alpha_u), mu_c + guidance * (mu_c - mu_u)
            x[:, t] = state[:, t] * alpha.exp() + mu
        state = x
    close(patchify(flow.inverse(z, y, guidance), 2), state, 1e-8)


@pytest.mark.parametrize("i", [0, 1])
def test_a_tokens_parameters_move_with_exactly_the_tokens_before_it(i):
    # Oracle: sparsity of the autograd Jacobian of (slope, offset) of each token's map, probed around x itself.
    block, y = make(TARFlow, torch.float64).blocks[i], torch.tensor([1])

    def slope_and_offset(x, t):
        bumped = x + F.one_hot(torch.tensor(t), T).view(T, 1)
        slope = block(bumped[None], y)[0][0, t] - block(x[None], y)[0][0, t]
        return torch.stack([slope, block(x[None], y)[0][0, t] - slope * x[t]])

    x = torch.randn(T, D, dtype=torch.float64)
    moves = torch.stack([jacobian(lambda x: slope_and_offset(x, t), x).abs().amax((0, 1, 3)) > 1e-12 for t in range(T)])
    before = torch.ones(T, T, dtype=torch.bool).tril(-1)  # row t, column s: s < t
    assert torch.equal(moves, before if i == 0 else before.T)


@pytest.mark.parametrize("flip", [False, True])
def test_density_of_a_block_integrates_to_one(flip):
    # Oracle: a Riemann sum over two tokens of one number. The token that is read first has a standard normal density.
    torch.manual_seed(0)
    shape = SimpleNamespace(tokens=2, dim=1, width=8, head_dim=8, layers=1, num_classes=0, clip=3.0)
    block = FlowBlock(shape, flip).double().requires_grad_(False)
    for p in block.parameters():
        p.normal_(std=0.3)
    first, second = (torch.linspace(-end, end, 20 * end + 1, dtype=torch.float64) for end in (8, 30))
    x = torch.cartesian_prod(first, second).unsqueeze(2)
    z, logdet = block(x.flip(1) if flip else x, torch.zeros(len(x)))
    log_p = torch.distributions.Normal(0, 1).log_prob(z).sum((1, 2)) + logdet
    assert logdet.std() > 0.1
    assert abs(log_p.exp().sum().item() * 0.1**2 - 1) < 1e-8


def test_clipping_bounds_the_parameters_under_any_weights():
    flow, x, y = make(TARFlow, torch.float64, clip=1.0), torch.randn(4, T, D).double(), torch.tensor([0, 1, 2, -1])
    with torch.no_grad():
        for block in flow.blocks:
            block.proj_out.weight *= 1e6
            parameters = torch.stack([torch.stack(probed_parameters(block, x, y, t)) for t in range(T)])
            assert 0.99 < parameters.abs().max() < 1 + 1e-9


@pytest.mark.parametrize("clip, alpha", [(None, 10.0), (3.0, 3.0)])
def test_no_clip_lifts_the_bounds(clip, alpha):
    # Closed form: where every output is 10, each of the T - 1 tokens that have parameters adds -D alpha.
    block = FlowBlock(dataclasses.replace(SMALL, clip=clip), flip=False)
    torch.nn.init.constant_(block.proj_out.bias, 10.0)
    close(block(torch.randn(1, T, D), torch.tensor([0]))[1], torch.tensor([-(T - 1) * D * alpha]), 1e-6)


def test_denoising_under_the_identity_flow_shrinks_towards_zero():
    x = torch.randn(2, 1, 4, 4)
    close(TARFlow(SMALL).denoise(x, None, 0.3), x - 0.3**2 * x, 1e-6)


@torch.no_grad()
def test_denoising_is_the_posterior_mean_of_a_linear_gaussian_flow():
    # Closed form: z = L x - b makes x~ ~ N(m, S); then E[x | x~] = m + (S - sigma^2) S^-1 (x~ - m).
    flow, sigma, x = make(TARFlow, torch.float64, clip=None), 0.3, torch.randn(2, 1, 4, 4).double()
    for block in flow.blocks:
        for layer in block.attn_blocks:  # no layer adds anything, so that mu_t is linear in x_{t-1} ...
            for linear in (layer.attention.proj, layer.mlp.main[2]):
                linear.requires_grad_(False).weight.zero_(), linear.bias.zero_()
        block.proj_out.weight[:D] = 0  # ... and alpha is constant
    z = lambda x: flow(x.view(1, 1, 4, 4))[0][-1].flatten()
    zero = torch.zeros(16).double()
    with torch.enable_grad():
        L = jacobian(z, zero)
    m, S = torch.linalg.solve(L, -z(zero)), torch.linalg.inv(L.T @ L)
    mean = m + (x.view(2, 16) - m) @ torch.linalg.inv(S) @ (S - sigma**2 * torch.eye(16).double())
    close(flow.denoise(x, None, sigma), mean.view_as(x), 1e-8)


def test_denoising_climbs_log_p():
    # Oracle: central differences of log p along random directions.
    flow, y, step = make(TARFlow, torch.float64), torch.tensor([1]), 1e-5
    x = torch.randn(1, 1, 4, 4).double()
    score = (flow.denoise(x, y, 0.3) - x) / 0.3**2
    for v in torch.randn(5, 1, 1, 4, 4).double():
        difference = (flow.log_prob(x + step * v, y) - flow.log_prob(x - step * v, y)) / (2 * step)
        close((score * v).sum().view(1), difference, 1e-6)


def test_log_prob_and_nll_are_those_of_the_normal_distribution():
    flow, x, y = make(TARFlow, torch.float64), torch.randn(3, 1, 4, 4).double(), torch.tensor([0, 1, -1])
    states, logdet = flow(x, y)
    log_p = torch.distributions.Normal(0, 1).log_prob(states[-1]).sum((1, 2)) + logdet
    close(flow.log_prob(x, y), log_p, 1e-12)
    close(nll_loss(states[-1], logdet), -log_p.mean() / 16, 1e-12)


# ----------------------------------------------------------------------------------------------------------------------
# F: weights in the published TARFlow's naming


def published_checkpoint(layers=2, width=16, classes=3, tokens=T):
    """Random weights under the published names."""
    torch.manual_seed(0)
    linear = lambda name, i, o: {f"{name}.weight": 0.15 * torch.randn(o, i), f"{name}.bias": 0.15 * torch.randn(o)}
    norm = lambda name: {f"{name}.weight": 1 + 0.3 * torch.randn(width), f"{name}.bias": 0.3 * torch.randn(width)}
    state = {"var": torch.ones(tokens, D)}
    for i in range(B):
        b = f"blocks.{i}"
        state |= linear(f"{b}.proj_in", D, width) | linear(f"{b}.proj_out", width, 2 * D)
        state |= {f"{b}.pos_embed": torch.randn(tokens, width), f"{b}.class_embed": torch.randn(classes, 1, width)}
        state |= {f"{b}.attn_mask": torch.ones(tokens, tokens).tril()}
        for j in range(layers):
            a, m = f"{b}.attn_blocks.{j}.attention", f"{b}.attn_blocks.{j}.mlp"
            state |= norm(f"{a}.norm") | norm(f"{m}.norm")
            state |= linear(f"{a}.qkv", width, 3 * width) | linear(f"{a}.proj", width, width)
            state |= linear(f"{m}.main.0", width, 4 * width) | linear(f"{m}.main.2", 4 * width, width)
    return state


def published_forward(state, x, y, layers=2, heads=2):
    """The published TARFlow by hand: z and the log-det in nats."""

    def linear(name, h):
        return h @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(name, h):
        h = h - h.mean(-1, keepdim=True)
        return h / (h.square().mean(-1, keepdim=True) + 1e-5).sqrt() * state[f"{name}.weight"] + state[f"{name}.bias"]

    x, logdet = F.unfold(x, 2, stride=2).transpose(1, 2), 0
    for i in range(B):
        b, order = f"blocks.{i}", list(range(x.shape[1]))[:: 1 if i % 2 == 0 else -1]
        x = x[:, order]
        h = linear(f"{b}.proj_in", x) + state[f"{b}.pos_embed"][order] + state[f"{b}.class_embed"][y]
        for j in range(layers):
            a, m = f"{b}.attn_blocks.{j}.attention", f"{b}.attn_blocks.{j}.mlp"
            q, k, v = linear(f"{a}.qkv", norm(f"{a}.norm", h)).view(*x.shape[:2], 3 * heads, -1).chunk(3, dim=2)
            logits = torch.einsum("nthd,nshd->nhts", q, k) / q.shape[-1] ** 0.5
            weights = logits.masked_fill(state[f"{b}.attn_mask"] == 0, -math.inf).softmax(-1)
            h = h + linear(f"{a}.proj", torch.einsum("nhts,nshd->nthd", weights, v).flatten(2))
            u = linear(f"{m}.main.0", norm(f"{m}.norm", h))
            h = h + linear(f"{m}.main.2", u * 0.5 * (1 + torch.erf(u / 2**0.5)))
        alpha, mu = linear(f"{b}.proj_out", h)[:, :-1].chunk(2, dim=-1)
        x = torch.cat([x[:, :1], (x[:, 1:] - mu) * torch.exp(-alpha)], dim=1)[:, order]
        logdet = logdet - alpha.sum((1, 2))
    return x, logdet


def test_from_tarflow_reproduces_the_published_model():
    state, x, y = published_checkpoint(), torch.randn(3, 1, 4, 4), torch.tensor([0, 1, 2])
    flow = TARFlow.from_tarflow(state, dataclasses.replace(SMALL, clip=0.1))
    assert flow.config == dataclasses.replace(SMALL, clip=None)
    z, logdet = published_forward(state, x, y)
    states, flow_logdet = flow(x, y)
    close(states[-1], z, 1e-4)
    close(flow_logdet, logdet, 1e-4)


@pytest.mark.parametrize(
    "change",
    [
        {"var": 2 * torch.ones(T, D)},
        {"var": None},
        {"blocks.1.attn_mask": torch.ones(T, T)},
        {"blocks.2.proj_in.bias": None},
        {"blocks.0.pos_embed": torch.zeros(T + 1, 16)},
        {"blocks.3.proj_in.bias": torch.zeros(16)},
    ],
    ids=["var is not 1", "no var", "mask is not causal", "missing", "wrong shape", "unknown"],
)
def test_from_tarflow_refuses(change):
    state = {k: v for k, v in (published_checkpoint() | change).items() if v is not None}
    with pytest.raises(ValueError):
        TARFlow.from_tarflow(state, SMALL)


# ----------------------------------------------------------------------------------------------------------------------
# G: blocks, conditions, guidance


def inputs():
    """z (4, T, D), y (4,), w (4,): unguided, guided, guided more, and a dropped label, where w must not matter."""
    return torch.randn(4, T, D), torch.tensor([0, 1, 2, -1]), torch.tensor([0.0, 0.5, 2.0, 1.0])


@pytest.mark.parametrize("strategy, denoise", STRATEGIES)
def test_predictions_of_each_strategy(strategy, denoise):
    model, (z, y, w) = make(BiFlow, strategy=strategy, denoise=denoise), inputs()
    x, predictions = model(z, y, w)
    aligned = set() if strategy == "naive" else set(range(B)) if denoise == "learned" else set(range(1, B))
    assert x.shape == (4, 1, 4, 4) and predictions.keys() == aligned
    assert all(p.shape == (4, T, D) for p in predictions.values())
    assert len(model.blocks) == B + (denoise == "learned")


@pytest.mark.parametrize("strategy", ["align", "hidden"])
def test_block_j_makes_the_state_of_index_B_minus_1_minus_j(strategy):
    # Changing block j moves the predictions of that state and of those closer to the image, and x', and no other.
    model, (z, y, w) = make(BiFlow, strategy=strategy), inputs()
    x, before = model(z, y, w)
    for j in range(B + 1):
        with torch.no_grad():
            model.blocks[j].layers[0].mlp_gate += 0.5
        x_after, after = model(z, y, w)
        assert {i for i in before if not torch.equal(before[i], after[i])} == {i for i in range(B) if i <= B - 1 - j}
        assert not torch.equal(x, x_after)
        x, before = x_after, after


@pytest.mark.parametrize("strategy, denoise", STRATEGIES)
def test_sample_calls_each_block_exactly_once(strategy, denoise):
    model, calls = make(BiFlow, strategy=strategy, denoise=denoise), []
    for j, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, j=j: calls.append(j))
    model.sample(*inputs())
    assert calls == list(range(len(model.blocks)))


def test_every_token_of_a_reverse_block_sees_every_token():
    block, model = make(BiFlow).blocks[0], make(BiFlow)
    context = model.context(torch.tensor([0]), torch.tensor([0.0]))[0].detach()
    J = jacobian(lambda h: block(h, context, model.rope), torch.randn(1, T, 16)).abs().sum((0, 2, 3, 5))
    assert J.shape == (T, T) and (J > 0).all()


def test_a_reverse_block_tells_the_places_of_equal_tokens_apart():
    model = make(BiFlow)
    block, context = model.blocks[0], torch.randn(1, 3, 16)
    still = torch.stack([torch.ones(T + 3, 4), torch.zeros(T + 3, 4)])  # no rotation: RoPE is not what tells them
    h = torch.randn(1, 1, 16).expand(1, T, 16)
    different = lambda: (block(h, context, still) - block(h, context, still)[:, :1]).abs().amax(2) > 1e-4
    assert different().tolist() == [[False] + [True] * (T - 1)]
    torch.nn.init.zeros_(block.pos_embed)
    assert not different().any()


def test_a_reverse_layer_by_hand():
    """RMSNorm, scaled QK-norm, RoPE as a product of complex numbers, softmax attention, SwiGLU, gates; in float64."""
    torch.manual_seed(0)
    layer, h = biflow.ReverseLayer(16, 8).double(), torch.randn(2, 5, 16).double()
    for p in layer.parameters():
        p.data += torch.randn_like(p)
    layer.qk_scale.data *= 2  # logits beyond sqrt(head_dim)
    angles = torch.randn(5, 4).double()
    rms = lambda x: x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    turn = lambda x: torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones_like(angles), angles)
    attended = []
    for head in range(2):
        q, k, v = (layer.qkv.weight[i * 16 + head * 8 :][:8] for i in range(3))
        q, k = (turn(rms(rms(h) @ w.T) * layer.qk_scale) for w in (q, k))
        logits = (q[:, :, None] * k[:, None].conj()).real.sum(-1) / 8**0.5
        attended.append(logits.softmax(-1) @ (rms(h) @ v.T))
    out = h + layer.attn_gate * (torch.cat(attended, -1) @ layer.proj.weight.T)
    gate, value = (rms(out) @ layer.mlp_in.weight.T).chunk(2, -1)
    out = out + layer.mlp_gate * ((gate / (1 + torch.exp(-gate)) * value) @ layer.mlp_out.weight.T)
    close(layer(h, torch.stack([angles.cos(), angles.sin()])), out, 1e-10)


@pytest.mark.parametrize("j", range(B + 1))
def test_class_and_guidance_reach_every_block(j):
    # With closed gates every block is the identity; open those of block j alone, and see the conditions in x'.
    torch.manual_seed(0)
    model, z = BiFlow(SMALL), torch.randn(1, T, D)
    for layer in (layer for block in model.blocks for layer in block.layers):
        torch.nn.init.zeros_(layer.attn_gate), torch.nn.init.zeros_(layer.mlp_gate)
    conditions = [(0, 0.0), (1, 0.0), (-1, 0.0), (0, 0.5), (0, 2.0)]
    outputs = lambda: [model.sample(z, torch.tensor([y]), w) for y, w in conditions]
    assert all(torch.equal(x, outputs()[0]) for x in outputs())
    for layer in model.blocks[j].layers:
        torch.nn.init.ones_(layer.attn_gate), torch.nn.init.ones_(layer.mlp_gate)
    x = torch.cat(outputs()).flatten(1)
    assert torch.pdist(x).min() > 1e-4


def test_no_class_takes_no_guidance_and_w_may_be_a_float():
    model, (z, y, _) = make(BiFlow), inputs()
    none = torch.full((4,), -1)
    for method in (model.sample, model.sample_two_pass, lambda *a: model(*a)[0]):
        assert torch.equal(method(z, none, 2.0), method(z, None, 0.0))
        assert torch.equal(method(z, y, 0.5), method(z, y, torch.full((4,), 0.5)))


@pytest.mark.parametrize("strategy, denoise", STRATEGIES)
def test_without_guidance_training_sampling_and_two_passes_agree(strategy, denoise):
    model, (z, y, w) = make(BiFlow, strategy=strategy, denoise=denoise), inputs()
    x = model.sample(z, y, 0.0)
    close(model(z, y, 0.0)[0], x, 1e-5)
    close(model.sample_two_pass(z, y, 0.0), x, 1e-5)
    close(model(z, y, w)[0][[0, 3]], x[[0, 3]], 1e-5)  # in a mixed batch too
    assert (model(z, y, w)[0][1:3] - x[1:3]).abs().amax((1, 2, 3)).min() > 1e-3


@pytest.mark.parametrize("denoise", ["learned", "none"])
def test_training_time_guidance_and_its_gradient(denoise):
    # Oracle: the recombination written out with w_j = w / B, the none-branch on all samples and detached afterwards.
    model, (z, y, w) = make(BiFlow, denoise=denoise), inputs()
    h, w_used = model.proj_in(z), torch.tensor([0.0, 0.5, 2.0, 0.0])
    context, none = model.context(y, w_used), model.context(torch.full((4,), -1), torch.zeros(4))
    for j, block in enumerate(model.blocks):
        w_j = (w_used / B if j < B else torch.zeros(4)).view(4, 1, 1)
        h = (block(h, context[j], model.rope) + w_j * block(h, none[j], model.rope).detach()) / (1 + w_j)
    expected = unpatchify(model.out(h), 2)
    x = model(z, y, w)[0]
    close(x, expected, 1e-5)
    target, parameters = torch.randn_like(x), [*model.blocks.parameters(), model.class_embed.weight, model.slot_embed]
    gradients = [torch.autograd.grad((out - target).square().sum(), parameters) for out in (x, expected)]
    for gradient, expected_gradient in zip(*gradients):
        close(gradient, expected_gradient, 1e-4 * expected_gradient.abs().max().item())


def test_one_pass_equals_two_passes_where_the_network_has_learned_guidance():
    # Toy blocks that obey training-time guidance exactly: G_j(h | y, w) = (1 + w_j) G_j(h | y) - w_j G_j(h | none).
    model, (z, y, w) = make(BiFlow), inputs()
    model.context = lambda y, w: torch.stack([y.float(), w], dim=1).expand(B + 1, -1, -1)

    def toy_block(j):
        response = lambda h, y: torch.sin((1 + j) * h + 0.3 * y)

        def block(h, context, rope):
            y, w_j = context.view(-1, 2, 1, 1).unbind(1)
            w_j = w_j * (1 / B if j < B else 0)
            return (1 + w_j) * response(h, y) - w_j * response(h, -1)

        return block

    del model.blocks
    model.blocks = [toy_block(j) for j in range(B + 1)]
    close(model.sample(z, y, w), model.sample_two_pass(z, y, w), 1e-4)
    close(model(z, y, w)[0], model.sample(z, y, 0.0), 1e-4)  # what is supervised is the unguided output, at any w
    assert (model.sample(z, y, w) - model.sample(z, y, 0.0))[1:3].abs().mean() > 0.1


def test_guidance_schedule_sums_to_one_over_the_aligned_blocks():
    for denoise in (0, 1):
        schedule = guidance_schedule(B, B + denoise)
        assert len(schedule) == B + denoise and (schedule[B:] == 0).all() and (schedule[:B] > 0).all()
        close(schedule[:B].sum(), torch.tensor(1.0), 1e-6)


def test_rope_logits_depend_on_relative_position_only():
    torch.manual_seed(0)
    side, context = 4, 2
    rope = rope_table(context, side, head_dim=16)
    q, k = (torch.randn(16).expand(context + side**2, 16) for _ in range(2))  # the same content everywhere
    close(rotate(q, rope).norm(dim=1), q.norm(dim=1), 1e-5)
    assert torch.equal(rotate(q, rope)[:context], q[:context])  # the context has no place and does not turn
    logits = (rotate(q, rope) @ rotate(k, rope).T)[context:, context:]
    logits = logits.view(side, side, side, side)  # row and column of q, row and column of k
    close(logits[1:, :, 1:], logits[:-1, :, :-1], 1e-5)
    close(logits[:, 1:, :, 1:], logits[:, :-1, :, :-1], 1e-5)
    assert torch.pdist(logits[0, 0].reshape(-1, 1)).min() > 1e-4  # every offset has its own


# ----------------------------------------------------------------------------------------------------------------------
# Losses


def trajectory():
    torch.manual_seed(0)
    return torch.randn(2, 1, 4, 4), [(i + 1) * torch.randn(2, T, D) for i in range(B + 1)]


def test_reverse_loss_is_zero_for_perfect_predictions_and_blind_to_the_states_scale():
    x, states = trajectory()
    perfect = {i: states[i] / states[i].square().mean((1, 2), keepdim=True).sqrt() for i in range(B)}
    assert reverse_loss(x, perfect, x, states)[0] < 1e-6
    assert reverse_loss(x, dict(enumerate(states)), x, states, trajectory_norm=False)[0] == 0
    predictions = {i: torch.randn(2, T, D) for i in range(B)}
    rescaled = [state * torch.tensor([7.0, 0.1]).view(2, 1, 1) for state in states]
    loss = lambda states, norm: reverse_loss(x, predictions, x, states, trajectory_norm=norm)[0]
    close(loss(rescaled, True), loss(states, True), 1e-5)
    assert abs(loss(rescaled, False) - loss(states, False)) > 1e-4


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("p", [1.0, 0.0])
def test_reverse_loss_by_hand(p, norm):
    # Constant differences: x' is off by 0.5, prediction 0 by 0.1 and prediction 2 by 0.2, in each of the 16 numbers.
    x, states = torch.ones(2, 1, 4, 4), [torch.full((2, T, D), i + 2.0) for i in range(B + 1)]
    scale = lambda i: i + 2.0 if norm else 1.0
    predictions = {0: states[0] / scale(0) - 0.1, 2: states[2] / scale(2) + 0.2}
    distances = {"x": 16 * 0.25, "x0": 16 * 0.01, "x2": 16 * 0.04}
    loss, errors = reverse_loss(x + 0.5, predictions, x, states, p, norm)
    close(loss, torch.tensor(sum(d / (d + 0.01) if p else d for d in distances.values())), 1e-5)
    norms = {"x": 16, "x0": 16 * (1 if norm else 4), "x2": 16 * (1 if norm else 16)}
    for name in distances:
        close(errors[name], torch.full((2,), distances[name] / norms[name]), 1e-4)


def test_reverse_loss_weighs_each_sample_by_itself_and_without_gradient():
    # Closed form: d/dx' of mean_n sg((D_n + c)^-p) D_n is (D_n + c)^-p 2 (x' - x) / N.
    x = torch.randn(3, 1, 4, 4)
    x_prime = (x + torch.tensor([0.1, 1.0, 3.0]).view(3, 1, 1, 1) * torch.randn_like(x)).requires_grad_()
    for p in (0.5, 1.0):
        (gradient,) = torch.autograd.grad(reverse_loss(x_prime, {}, x, [], p)[0], x_prime)
        distance = (x_prime - x).square().sum((1, 2, 3), keepdim=True)
        close(gradient, ((distance + 0.01) ** -p * 2 * (x_prime - x) / 3).detach(), 1e-5)
    assert not adaptive_weight(x_prime.square().sum()).requires_grad


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("strategy, denoise", STRATEGIES)
def test_every_parameter_of_G_and_none_of_F_gets_a_gradient(strategy, denoise, bf16):
    flow, model = make(TARFlow), make(BiFlow, strategy=strategy, denoise=denoise).train()
    x, (_, y, w) = torch.randn(4, 1, 4, 4), inputs()
    with torch.autocast(**BF16, enabled=bf16):
        with torch.no_grad():
            states, _ = flow(x, y)
        loss, _ = reverse_loss(*model(states[-1], y, w), x, states)
    loss.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), name
    assert model.class_embed.weight.grad.any(dim=1).all()  # every class, and "no class"
    assert all(p.grad is None for p in flow.parameters())


def test_under_bf16_what_enters_a_loss_stays_float32_and_close():
    # bf16 keeps 8 bits, an error of up to 0.4% in each product; in the end we allow 3% of the largest value.
    flow, model, (z, y, w) = make(TARFlow), make(BiFlow), inputs()

    def everything():
        states, logdet = flow(unpatchify(z, 2), y)
        x, predictions = model(z, y, w)
        f = [*flow.blocks[0](z, y), *states, logdet, flow.inverse(z, y), flow.inverse(z, y, 1.0)]
        return [*f, x, *predictions.values(), model.sample(z, y, w)]

    with torch.autocast(**BF16):
        rounded = everything()
    for a, b in zip(rounded, everything()):
        assert a.dtype == torch.float32
        assert (a - b).abs().max() < 0.03 * b.abs().max()
    assert not torch.equal(rounded[-1], model.sample(z, y, w))  # autocast was on


# ----------------------------------------------------------------------------------------------------------------------
# Perceptual distance


def ramps(size):
    """(1, 2, size, size): the first channel is x, the second is y, in [0, 1] at the pixels' centres."""
    centres = (torch.arange(size) + 0.5) / size
    return torch.stack([centres.expand(size, size), centres[:, None].expand(size, size)])[None]


def test_crop_of_the_whole_image_is_a_bilinear_resize():
    x = torch.randn(2, 3, 32, 32)
    u = torch.tensor([[1.0, 0.5, 0.3, 0.9]]).expand(2, 4)  # area 1, ratio 1; there is no room to move
    close(random_resized_crop(x, u, 48), F.interpolate(x, (48, 48), mode="bilinear", align_corners=False), 1e-5)


def test_crop_takes_its_pixels_from_the_right_box():
    # Closed form: ramps stay ramps. Two samples, two boxes; ratio = width / height = (4/3)^(2 u_1 - 1).
    u = torch.tensor([[0.0, 1.0, 0.25, 0.75], [0.2, 0.0, 0.5, 0.6]])
    crops = random_resized_crop(ramps(64).expand(2, -1, -1, -1), u, 16)
    for crop, area, ratio, left, top in zip(crops, (0.08, 0.264), (4 / 3, 3 / 4), (0.25, 0.5), (0.75, 0.6)):
        w, h = math.sqrt(area * ratio), math.sqrt(area / ratio)
        corner = torch.tensor([left * (1 - w), top * (1 - h)]).view(2, 1, 1)
        close(crop, corner + torch.tensor([w, h]).view(2, 1, 1) * ramps(16)[0], 1e-5)


class FakeLPIPS(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(3.0))

    def forward(self, a, b):
        return self.scale * (a - b).square().mean((1, 2, 3), keepdim=True)


def fake_convnext():
    return torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 3, bias=False))


@pytest.mark.parametrize("p", [1.0, 0.0])
def test_perceptual_distance_by_hand(p):
    # Constant grey images, which no crop changes, from a decoder in bf16: x' is decoded to 0.5 and 0.25, x to 0.125.
    convnext = fake_convnext()
    torch.nn.init.eye_(convnext[2].weight)
    distance = PerceptualDistance(lambda x: x.bfloat16() / 8, FakeLPIPS(), convnext, weights=(0.4, 0.1), p=p)
    x_prime = torch.tensor([4.0, 2.0]).view(2, 1, 1, 1).expand(2, 1, 8, 8)
    loss, raw = distance(x_prime, torch.ones(2, 1, 8, 8), torch.rand(2, 4))
    lpips = [3 * d**2 for d in (0.375, 0.125)]
    convnext = [sum((d / 2 / std) ** 2 for std in (0.229, 0.224, 0.225)) for d in (0.375, 0.125)]
    close(raw["lpips"], torch.tensor(lpips), 1e-4)
    close(raw["convnext"], torch.tensor(convnext), 1e-4)
    mean = lambda ds: sum(d / (d + 0.01) ** p for d in ds) / 2
    close(loss, torch.tensor(0.4 * mean(lpips) + 0.1 * mean(convnext)), 1e-4)


def test_perceptual_distance_is_zero_for_equal_images_and_trains_x_prime_alone():
    torch.manual_seed(0)
    seen, networks = [], (FakeLPIPS().train(), fake_convnext().train())
    networks[1].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    distance, x, u = PerceptualDistance(lambda x: x, *networks), torch.rand(2, 3, 16, 16) * 2 - 1, torch.rand(2, 4)
    loss, raw = distance(x, x, u)
    assert loss == 0 and all((d == 0).all() for d in raw.values())
    x_prime = (-x).requires_grad_()
    distance(x_prime, x, u)[0].backward()
    assert (x_prime.grad.flatten(1).abs().sum(1) > 0).all()
    assert not any(p.requires_grad or p.grad is not None for p in distance.parameters())
    assert not any(network.training for network in networks)
    # What the ConvNeXt saw is the shared crop, brought from [-1, 1] to [0, 1] and normalised as torchvision does.
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    close(seen[-1], ((random_resized_crop(x, u) + 1) / 2 - mean) / std, 1e-5)
    assert PerceptualDistance(lambda x: x, None, networks[1])(x_prime, x, u)[1].keys() == {"convnext"}


# ----------------------------------------------------------------------------------------------------------------------
# Saving and loading


@pytest.mark.parametrize("cls, changes", [(TARFlow, dict(clip=None)), (BiFlow, dict(strategy="hidden", w_max=1.0))])
def test_a_saved_model_comes_back_bit_for_bit(cls, changes, tmp_path):
    model = make(cls, **changes)
    model.save_pretrained(tmp_path)
    loaded = cls.from_pretrained(tmp_path)
    assert loaded.config == model.config and not loaded.training
    assert json.loads((tmp_path / "config.json").read_text()) == dataclasses.asdict(model.config)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in loaded.state_dict().items())


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """A saved flow's folder, on a machine where asking the network is an error."""
    monkeypatch.setattr("biflow.snapshot_download", lambda *args, **kwargs: pytest.fail("asked the network"))
    monkeypatch.chdir(tmp_path)
    make(TARFlow).save_pretrained(tmp_path / "run")
    return tmp_path / "run"


def test_a_missing_folder_or_file_is_said_without_asking_the_network(saved, monkeypatch):
    for name in (saved / "nothing", str(saved / "nothing"), "nothing", "./nothing", "run/nothing", Path("no/nothing")):
        with pytest.raises(FileNotFoundError, match="nothing"):
            TARFlow.from_pretrained(name)
    monkeypatch.setattr("biflow.snapshot_download", lambda name, **_: str(saved) if name == "user/name" else None)
    assert TARFlow.from_pretrained("user/name").config == SMALL  # a name on the Hub, in contrast
    (saved / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model.safetensors"):
        TARFlow.from_pretrained(saved)


@pytest.mark.parametrize("change", [dict(depth=3), dict(width=24), dict(blocks=2), dict(blocks=4), dict(clip="3")])
def test_loading_refuses_a_config_that_is_unknown_or_does_not_fit_the_weights(saved, change):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match="config"):
        TARFlow.from_pretrained(saved)


def test_loading_refuses_damaged_files_and_another_kind_of_model(saved):
    with pytest.raises(ValueError, match="match"):
        BiFlow.from_pretrained(saved)
    weights = (saved / "model.safetensors").read_bytes()
    flipped = weights[:-1] + bytes([weights[-1] ^ 1])  # the last bit of a tensor, which only the checksum can tell
    for damaged in (b"", weights[:100], weights[:-1], flipped):
        (saved / "model.safetensors").write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged"):
            TARFlow.from_pretrained(saved)
    (saved / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json"):
        TARFlow.from_pretrained(saved)


# ----------------------------------------------------------------------------------------------------------------------
# The scripts, on digits: run in process, from an empty folder, shortened by flags


def run_files(run: Path) -> set[str]:
    return {p.name for p in run.iterdir() if not p.name.startswith("samples-")}


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """A folder in which every script has run with no arguments but those that shorten it."""
    folder = tmp_path_factory.mktemp("toy")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train_forward.main(["--steps", "60", "--batch-size", "64", "--save-every", "20", "--log-every", "5"])
        train_reverse.main(["--steps", "60", "--batch-size", "64", "--save-every", "20", "--log-every", "5"])
        sample.main([])
        fid.main(["--n", "100", "--draws", "2"])
    return folder


def test_every_script_runs_without_arguments(toy):
    for run in ("forward-toy", "reverse-toy"):
        expected = {"config.json", "run.json", "model.safetensors", "README.md", "metrics.jsonl"}
        assert expected | {"checkpoint.pt", "checkpoint.prev.pt"} <= run_files(toy / "runs" / run)
    assert (toy / "runs/reverse-toy/samples.png").stat().st_size > 1000


def test_a_short_training_lowers_every_unweighted_error(toy):
    nll = [m["val_nll"] for m in metrics(toy / "runs/forward-toy") if "val_nll" in m]
    assert nll[0] > nll[1] > nll[2]
    errors = [m for m in metrics(toy / "runs/reverse-toy") if "val_error_x" in m]
    for name in ("x", "x0", "x1", "x2", "x3"):
        assert errors[-1][f"val_error_{name}"] < errors[0][f"val_error_{name}"], name


def weights(run: Path) -> bytes:
    return (run / "model.safetensors").read_bytes()


SHORT = ["--steps", "8", "--batch-size", "16", "--save-every", "4", "--log-every", "2"]


def test_a_seed_decides_the_weights_and_micro_batches_do_not(tmp_path):
    for name, extra in dict(a=[], b=["--num-workers", "1"], c=["--seed", "1"], d=["--micro-batch", "5"]).items():
        train_forward.main(SHORT + ["--out", str(tmp_path / name), *extra])
    assert weights(tmp_path / "a") == weights(tmp_path / "b") != weights(tmp_path / "c")
    whole, accumulated = (biflow.TARFlow.from_pretrained(tmp_path / name).state_dict() for name in "ad")
    for name in whole:
        torch.testing.assert_close(accumulated[name], whole[name], rtol=1e-3, atol=1e-4)


def test_a_batch_is_the_same_for_any_number_of_processes_and_micro_batches():
    data = train_forward.load_digits()
    whole = train_forward.Batches(data, 22, seed=3)
    for step in (0, 70):  # 70 * 22 > 1345: the second epoch has begun
        for world, micro in ((2, 1), (3, 2), (1, 4)):
            parts = [
                train_forward.Batches(data, 22, 3, rank, world, micro)[step * micro + m]
                for rank in range(world)
                for m in range(micro)
            ]
            for joined, one in zip(map(torch.cat, zip(*parts)), whole[step]):
                assert torch.equal(joined, one)


def test_an_epoch_sees_every_training_sample_once():
    data = train_forward.load_digits()
    order = [train_forward.Batches(data, 1345, seed=0).order(epoch) for epoch in (0, 1)]
    assert sorted(order[0]) == sorted(order[1]) == data.fit.tolist() and not np.array_equal(*order)
    assert not set(data.fit) & (set(data.val) | set(data.test)) and not set(data.val) & set(data.test)


def test_jitter_is_the_affine_map_that_its_numbers_say():
    """Against a smooth image whose values are known at every point, on a grid of pixel centres in [-1, 1]^2."""
    blob = lambda x, y: torch.exp(-12 * ((x - 0.1) ** 2 + 2 * (y + 0.1) ** 2)) - 1
    y, x = torch.meshgrid(*[(torch.arange(128) + 0.5) / 64 - 1] * 2, indexing="ij")
    u = torch.cat([torch.full((1, 6), 0.5), torch.rand(20, 6, generator=torch.Generator().manual_seed(0))])
    a, b, s, c, d, t = ((2 * u - 1) * torch.tensor([0.05, 0.05, 0.03, 0.05, 0.05, 0.03])).T[..., None, None]
    expected = blob(x + a * x + b * y + s, y + c * x + d * y + t)
    close(train_forward.jitter(blob(x, y).expand(21, 1, -1, -1), u)[:, 0], expected, 5e-3)


def test_training_sees_jittered_digits_and_validation_the_digits_themselves():
    data = train_forward.load_digits()
    clean = torch.from_numpy(data.array)
    for x, source in zip(train_forward.Batches(data, 8, seed=0)[0][0], train_forward.Batches(data, 8, 0).order(0)):
        assert 0.01 < (x - clean[source]).abs().mean() < 0.2 and x.abs().max() <= 1
    assert torch.equal(next(train_forward.validation_batches(data, data.val))[0][:100], clean[data.val][:100])


@pytest.mark.parametrize("stage", ["forward", "reverse"])
def test_an_interrupted_run_ends_with_the_same_weights(tmp_path, toy, stage, monkeypatch):
    """Killed at an arbitrary step (here by an exception), then started again with the same arguments."""
    script = {"forward": train_forward, "reverse": train_reverse}[stage]
    extra = ["--forward", str(toy / "runs/forward-toy")] if stage == "reverse" else []
    script.main(SHORT + extra + ["--out", str(tmp_path / "whole")])
    learning_rate = train_forward.learning_rate

    def broken(step, args):
        if step == 6:
            raise KeyboardInterrupt
        return learning_rate(step, args)

    again = SHORT + extra + ["--out", str(tmp_path / "parts")]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_forward, "learning_rate", broken)
        script.main(again)
    script.main(again + ["--log-every", "3"])  # an argument that does not alter the model
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")
    steps = [m["step"] for m in metrics(tmp_path / "parts")]
    assert steps == sorted(steps) and steps[-1] == 8
    assert weights(tmp_path / "whole") == weights(tmp_path / "parts")


@pytest.mark.parametrize("signal_, workers", [(signal.SIGTERM, 0), (signal.SIGUSR1, 0), (signal.SIGTERM, 2)])
def test_a_signal_finishes_the_step_saves_and_ends(tmp_path, monkeypatch, signal_, workers):
    """Also where, as a scheduler does it, the data loader's processes get the signal."""
    train_forward.main(SHORT + ["--out", str(tmp_path / "whole")])
    learning_rate = train_forward.learning_rate

    def signalling(step, args):
        if step == 2:
            pids = [child.pid for child in multiprocessing.active_children()] + [os.getpid()]
            assert len(pids) == 1 + workers
            subprocess.run(["kill", f"-{int(signal_)}", *map(str, pids)], check=True)  # not by the parent: torch tells
            time.sleep(0.5 if workers else 0)
        return learning_rate(step, args)

    with monkeypatch.context() as patch:
        patch.setattr(train_forward, "learning_rate", signalling)
        train_forward.main(SHORT + ["--out", str(tmp_path / "parts"), "--num-workers", str(workers)])
    assert torch.load(tmp_path / "parts/checkpoint.pt", weights_only=True)["step"] == 3
    train_forward.main(SHORT + ["--out", str(tmp_path / "parts")])
    assert weights(tmp_path / "whole") == weights(tmp_path / "parts")


def test_fresh_renames_the_old_run(tmp_path, capsys):
    for extra in ([], ["--fresh", "--seed", "5"], ["--fresh"]):
        train_forward.main(["--steps", "2", "--batch-size", "4", "--out", str(tmp_path / "run"), *extra])
    assert {p.name for p in tmp_path.iterdir()} == {"run", "run.old-1", "run.old-2"}
    assert weights(tmp_path / "run") == weights(tmp_path / "run.old-1") != weights(tmp_path / "run.old-2")


def flip_a_bit(path: Path, offset: int):
    content = bytearray(path.read_bytes())
    content[offset] ^= 4
    path.write_bytes(content)


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, capsys):
    train_forward.main(SHORT + ["--out", str(tmp_path / "run")])
    whole, checkpoint = weights(tmp_path / "run"), tmp_path / "run/checkpoint.pt"
    original = checkpoint.read_bytes()
    for damage in (lambda: checkpoint.write_bytes(original[:1000]), lambda: flip_a_bit(checkpoint, 10_000)):
        damage()
        train_forward.main(SHORT + ["--out", str(tmp_path / "run")])
        assert "checkpoint.pt is damaged" in capsys.readouterr().err
        assert weights(tmp_path / "run") == whole


def test_a_non_finite_gradient_skips_the_step_and_five_in_a_row_end_the_run(tmp_path, monkeypatch, capsys):
    original, calls = train_forward.nll_loss, []

    def loss(bad):
        def nll(z, logdet):
            calls.append(0)
            return original(z, logdet) * (math.nan if len(calls) in bad else 1.0)

        return nll

    monkeypatch.setattr(train_forward, "nll_loss", loss({3, 5}))
    train_forward.main(SHORT + ["--out", str(tmp_path / "a")])
    assert metrics(tmp_path / "a")[-2]["skipped"] == 2
    assert all(v.isfinite().all() for v in biflow.TARFlow.from_pretrained(tmp_path / "a").state_dict().values())
    calls.clear()
    monkeypatch.setattr(train_forward, "nll_loss", loss(range(6, 100)))
    with pytest.raises(SystemExit) as end:
        train_forward.main(SHORT[:1] + ["20"] + SHORT[2:] + ["--out", str(tmp_path / "b")])
    assert end.value.code == 2 and "fifth non-finite" in capsys.readouterr().err
    state = torch.load(tmp_path / "b/checkpoint.pt", weights_only=True)
    assert state["step"] == 8 and all(v.isfinite().all() for v in state["model"].values())


def test_a_checkpoint_with_a_pickle_payload_is_refused_without_running_it(tmp_path, capsys):
    class Payload:
        def __reduce__(self):
            return (Path(tmp_path / "ran").touch, ())

    (tmp_path / "run").mkdir()
    torch.save({"model": Payload()}, tmp_path / "run/checkpoint.pt")
    with pytest.raises(SystemExit) as end:
        train_forward.main(SHORT + ["--out", str(tmp_path / "run")])
    assert end.value.code == 2 and not (tmp_path / "ran").exists()


@pytest.mark.parametrize("script", [train_forward, train_reverse], ids=["forward", "reverse"])
def test_two_processes_train_as_one_does(tmp_path, toy, script):
    """torchrun with 2 gloo processes and an uneven batch: the same losses to 1e-5 over 10 steps, the same average."""
    args = ["--steps", "10", "--batch-size", "15", "--log-every", "1", "--lr", "1e-3"]
    args += ["--forward", str(toy / "runs/forward-toy")] if script is train_reverse else []
    script.main(args + ["--out", str(tmp_path / "one")])
    torchrun(2, [str(Path(script.__file__)), *args, "--out", str(tmp_path / "two")])
    one, two = ([m["loss"] for m in metrics(tmp_path / name) if "loss" in m] for name in ("one", "two"))
    np.testing.assert_allclose(two, one, rtol=1e-5, atol=1e-5)
    a, b = (train_forward.load_run(tmp_path / name)[0].state_dict() for name in ("one", "two"))
    for name in a:
        torch.testing.assert_close(b[name], a[name], rtol=1e-3, atol=1e-4)


def test_weight_decay_shrinks_matrices_but_neither_vectors_nor_embeddings(tmp_path):
    args = ["--steps", "1", "--warmup", "0", "--lr", "0.01", "--ema", "0", "--batch-size", "8"]
    for decay in ("0", "1"):
        train_forward.main([*args, "--weight-decay", decay, "--out", str(tmp_path / decay)])
    a, b = (train_forward.load_run(tmp_path / decay)[0].state_dict() for decay in ("0", "1"))
    for name in a:
        decayed = a[name].ndim == 2 and "embed" not in name and "proj_out" not in name  # proj_out starts at zero
        assert torch.equal(a[name], b[name]) != decayed


@pytest.mark.parametrize("script", [train_forward, train_reverse], ids=["forward", "reverse"])
def test_activation_checkpointing_changes_no_weight(tmp_path, toy, script):
    args = ["--steps", "4", "--batch-size", "8", "--save-every", "9"]
    args += ["--forward", str(toy / "runs/forward-toy")] if script is train_reverse else []
    script.main([*args, "--out", str(tmp_path / "a")])
    script.main([*args, "--out", str(tmp_path / "b"), "--activation-checkpointing"])
    assert weights(tmp_path / "a") == weights(tmp_path / "b")


def torchrun(n: int, script: list[str]):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n), *script]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_a_sample_depends_on_its_seed_class_and_index_alone(toy):
    sampler = sample.Sampler.load(toy / "runs/reverse-toy", train_forward.Processes(torch.device("cpu")))
    y = torch.arange(6)
    for method in ("biflow", "exact", "exact+score", "biflow-2nfe"):
        whole = sampler.images(method, range(6), y, 0.5)
        part = sampler.images(method, [4, 2], y[[4, 2]], 0.5)
        torch.testing.assert_close(part, whole[[4, 2]], rtol=1e-4, atol=1e-4)
        assert not torch.allclose(sampler.images(method, range(6), y, 0.5, seed=1), whole)
        z = 1.5 * train_forward.sample_noise(0, range(6), sampler.config)
        assert torch.equal(sampler.images(method, range(6), y, 0.5, temperature=1.5), sampler.draw(method, z, y, 0.5))


def test_sample_writes_what_it_says(toy, tmp_path, capsys):
    args = [str(toy / "runs/reverse-toy"), "--n", "7", "--batch", "4", "--classes", "3,8", "--method", "biflow"]
    sample.main(args + ["--guidance", "0.5", "--out", str(tmp_path / "a.png"), "--npz", str(tmp_path / "a.npz")])
    with np.load(tmp_path / "a.npz") as file:
        assert file["arr_0"].shape == (7, 8, 8, 1) and file["arr_0"].dtype == np.uint8
        assert file["arr_1"].tolist() == [3, 8, 3, 8, 3, 8, 3]
    assert "batch 4" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------------------
# Speed: fast paths agree with plain ones, and the table counts what it says


def sampler_of(flow, model, **options):
    options = SimpleNamespace(**{"bf16": False, "compile": False} | options)
    run = dict(stage="reverse", sigma=0.3, vae=None)
    return sample.Sampler(flow, model, run, Path(), train_forward.Processes(torch.device("cpu")), options)


def everything_sampled(sampler, n):
    z, y = torch.from_numpy(np.random.default_rng(n).standard_normal((n, T, D), np.float32)), torch.arange(n) % 3
    draws = [(method, 0.0) for method in sample.METHODS] + [("exact", 1.5), ("biflow-2nfe", 1.0)]
    return [sampler(method, z, y, w) for method, w in draws]


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler")
def test_compiled_networks_agree_with_eager_ones():
    eager = sampler_of(make(TARFlow), make(BiFlow))
    compiled = sampler_of(make(TARFlow), make(BiFlow), compile=True)
    for n in (1, 5):
        for a, b in zip(everything_sampled(compiled, n), everything_sampled(eager, n)):
            close(a, b, 1e-4)


def test_weights_stored_in_bf16_change_nothing():
    stored = sampler_of(make(TARFlow), make(BiFlow), bf16=True)
    assert stored.flow.blocks[0].proj_in.weight.dtype == torch.bfloat16
    assert stored.flow.blocks[0].proj_out.weight.dtype == torch.float32
    cast = sampler_of(make(TARFlow), make(BiFlow))
    with torch.autocast(**BF16):
        z, y = torch.randn(3, T, D), torch.arange(3)
        expected, x = cast.flow.inverse(z, y), cast.reverse.sample(z, y, 1.0)
    assert torch.equal(stored("exact", z, y), expected) and not torch.equal(cast("exact", z, y), expected)
    assert (
        stored("biflow", z, y, 1.0) - x
    ).abs().max() < 0.03 * x.abs().max()  # G folds gates into weights: one rounding more


def test_flops_are_counted_as_by_hand():
    flow, N = make(TARFlow), 3
    layer = 2 * T * 12 * 16**2 + 2 * 2 * T**2 * 16  # four products of 12 C^2 weights; q k' and a v; two FLOPs each
    expected = N * B * (2 * layer + 2 * T * D * 16 + 2 * T * 16 * 2 * D)
    assert train_forward.count_flops(lambda: flow(torch.randn(N, 1, 4, 4), torch.zeros(N, dtype=torch.long))) == expected


@pytest.mark.slow
def test_score_denoising_costs_the_papers_multiple_of_the_denoise_block():
    flow, model = (cls(SIZES["B"]).requires_grad_(False) for cls in (TARFlow, BiFlow))
    score = train_forward.count_flops(lambda: flow.denoise(torch.zeros(1, 4, 32, 32), torch.tensor([0]), 0.3))
    h, context = torch.zeros(1, 256, 768), torch.zeros(1, 12, 768)
    assert abs(score / train_forward.count_flops(lambda: model.blocks[-1](h, context, model.rope)) / 15.8 - 1) < 0.02


def test_the_speed_table(toy, capsys, monkeypatch):
    run = str(toy / "runs/reverse-toy")
    capsys.readouterr()
    sample.main([run, "--benchmark", "--batch", "4", "--repeats", "1", "--json"])
    rows = {row["method"]: row for row in json.loads(capsys.readouterr().out)}
    assert [row["nfe"] for row in rows.values()] == ["1", "2", "16", "16 + 1"]
    assert [row["layers"] for row in rows.values()] == [10, 10, 120, 136]
    # Twice the four aligned blocks, once the denoise block, which takes no guidance.
    assert rows["biflow-2nfe"]["gflops"] / rows["biflow"]["gflops"] == pytest.approx(9 / 5, rel=1e-2)
    assert rows["exact+score"]["gflops"] > 3 * rows["exact"]["gflops"] > 0
    assert (
        all(min(row["ms_1"], row["ms_4"]) > 0 and row["gib_4"] > 0 for row in rows.values())
        and rows["biflow"]["ratio_4"] == 1
    )
    monkeypatch.setitem(SIZES, "L", dataclasses.replace(SMALL, channels=4, img_size=8))
    small = dict(block_out_channels=(4,), down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",))
    monkeypatch.setattr(sample, "SD_VAE", dict(small, norm_num_groups=2, latent_channels=4))
    sample.main(["--benchmark", "--size", "L", "--batch", "2", "--repeats", "1", "--guidance", "1"])
    out = capsys.readouterr().out
    assert "VAE decode" in out and "16 x 2 + 1" in out and "ms, batch 2" in out


@pytest.mark.parametrize("script", [train_forward, train_reverse], ids=["forward", "reverse"])
def test_training_benchmark_needs_no_data_and_leaves_nothing(tmp_path, monkeypatch, capsys, script):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(SIZES, "B", dataclasses.replace(SMALL, channels=4))
    args = ["--size", "B", "--benchmark", "--batch-size", "6", "--micro-batch", "4", "--num-workers", "0", "--ema", "0.9"]
    script.main(args)
    out = capsys.readouterr().out
    assert "images/s" in out and "ms a step of 6" in out and "GFLOPs" in out and not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------------------------------------
# Editing and pictures


@pytest.fixture(scope="session")
def edits(toy):
    """A sampler, four copies of a digit, and its label."""
    sampler = sample.Sampler.load(toy / "runs/reverse-toy", train_forward.Processes(torch.device("cpu")))
    data = train_forward.load_digits()
    x = torch.from_numpy(data.array[data.test[:1]]).expand(4, -1, -1, -1)
    return sampler, x, torch.full((4,), int(data.labels[data.test[0]]))


def test_exact_reconstruction_gives_the_noisy_input_back(edits):
    sampler, x, y = edits
    (_, shown), (_, back) = sample.reconstruct(sampler, "exact", x, y, 0.0, 0)
    assert torch.equal(shown, x[:1])
    close(back, unpatchify(sampler.encode(x, y, 0)[0], 2), 1e-3)
    assert (back - x).std() == pytest.approx(sampler.run["sigma"], rel=0.2) and not torch.equal(back[0], back[1])


def test_class_edit_keeps_z_and_changes_the_class(edits):
    sampler, x, y = edits
    rows = dict(sample.class_edit(sampler, "biflow", x, y, (y + 1) % 10, 1.0, 3))
    z = sampler.encode(x, y, 3)[-1]
    assert torch.equal(rows["own class"], sampler.reverse.sample(z, y, 1.0))
    assert torch.equal(rows["new class"], sampler.reverse.sample(z, (y + 1) % 10, 1.0))


def test_inpainting_keeps_the_noise_of_known_tokens_and_draws_the_rest(edits, monkeypatch):
    sampler, x, y = edits
    seen = []
    monkeypatch.setattr(sampler, "draw", lambda method, z, y, w: seen.append(z) or x)
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[0, 0] = mask[7, 2] = True  # a pixel of token 0 (top left), one of token 13 (bottom row, second)
    masked = dict(sample.inpaint(sampler, "biflow", x, y, mask, 0.0, 5))["masked"]
    assert torch.equal(masked[0, 0][~mask], x[0, 0][~mask]) and bool((masked[0, 0][mask] == 1).all())
    z, fresh = sampler.encode(x[:1], y[:1], 5)[-1], train_forward.sample_noise(5, range(4), sampler.config)
    redrawn = [0, 13]
    known = [t for t in range(16) if t not in redrawn]
    assert torch.equal(seen[0][:, redrawn], fresh[:, redrawn])
    assert torch.equal(seen[0][:, known], z[:, known].expand(4, -1, -1))


def test_interpolation_runs_along_the_sphere_between_two_samples(edits, monkeypatch):
    sampler, _, _ = edits
    ends, seen = train_forward.sample_noise(2, range(2), sampler.config), []
    monkeypatch.setattr(sampler, "draw", lambda method, z, y, w: seen.append((z, y)))
    sample.interpolate(sampler, "biflow", [7, 1], 5, 0.0, 2)
    z, y = seen[1]
    assert y.tolist() == [1] * 5
    close(z[[0, 4]], ends, 1e-5)
    unit = lambda v: v.flatten() / v.norm()
    angles = [torch.acos(unit(a) @ unit(b)) for a, b in zip(z[:-1], z[1:])]
    lengths = ends.flatten(1).norm(dim=1)
    assert max(angles) - min(angles) < 0.1  # even steps, but for the ends' lengths
    assert lengths.min() * 0.9 < z.flatten(1).norm(dim=1).min()  # a straight line would dip to 0.7 of the length


def test_trajectory_shows_every_state_and_its_prediction(edits):
    sampler, x, y = edits
    rows = dict(sample.trajectory(sampler, x, y, 0))
    assert list(rows) == ["x", "flow: x^0", "flow: x^1", "flow: x^2", "flow: x^3", "z"] + [
        *("reverse: x^3", "reverse: x^2", "reverse: x^1", "reverse: x^0", "x' = G(z)")
    ]
    z = sampler.encode(x, y, 0)[-1]
    close(rows["z"], 0.4 * unpatchify(z / z.square().mean((1, 2), keepdim=True).sqrt(), 2), 1e-5)
    assert torch.equal(rows["x' = G(z)"], sampler.reverse.sample(z, y))


def test_edits_and_pictures_from_the_command_line(toy, edits, tmp_path, monkeypatch):
    digit = train_forward.to_uint8(torch.from_numpy(train_forward.load_digits().array[5, 0]))
    Image.fromarray(digit.numpy()).save(tmp_path / "five.png")
    Image.fromarray(np.triu(np.full((8, 8), 255, np.uint8))).save(tmp_path / "mask.png")
    monkeypatch.chdir(tmp_path)
    run = str(toy / "runs/reverse-toy")
    for args in (
        *(["--reconstruct", "five.png", "--from", "5"], ["--class-edit", "five.png", "--from", "5", "--to", "3"]),
        *(["--inpaint", "five.png", "--mask", "mask.png"], ["--interpolate", "--classes", "1,2"], ["--trajectory"]),
        *(["--curves"], ["--reconstruct", "five.png", "--method", "exact"]),
    ):
        sample.main([run, *args, "--n", "3", "--out", "edit.png"])
        with Image.open("edit.png") as picture:
            assert len(set(picture.convert("L").getdata())) > 10  # something was drawn
    sample.main([str(toy / "runs/forward-toy"), "--curves", "--out", "forward.png"])
    close(sample.open_image(edits[0], "five.png", 2)[1, 0], digit / 127.5 - 1, 1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# Somebody else's flow, tables, and what little an import needs


def test_a_published_checkpoint_becomes_a_run_whose_inverse_is_learned(tmp_path, capsys):
    """From a random checkpoint under the published names to samples; the flow is the checkpoint's, by hand."""
    state = published_checkpoint(width=64, classes=10, tokens=16)
    state |= {name: 0.1 * value for name, value in state.items() if "proj_out" in name}  # a wide layer must not explode
    torch.save(state, tmp_path / "tarflow.pth")
    flow_run, reverse_run = str(tmp_path / "forward"), str(tmp_path / "reverse")
    train_forward.main(["--import", str(tmp_path / "tarflow.pth"), "--sigma", "0.05", "--out", flow_run])
    assert "val_nll" in capsys.readouterr().out
    flow, run = train_forward.load_run(flow_run, "forward")
    assert run["sigma"] == 0.05 and flow.config.clip is None and flow.config.head_dim == 64
    x, y = torch.randn(2, 1, 8, 8), torch.tensor([9, 0])
    states, logdet = flow(x, y)
    z, expected = published_forward(state, x, y, heads=1)
    close(states[-1], z, 1e-3)
    close(logdet, expected, 1e-3)
    train_reverse.main(["--forward", flow_run, "--out", reverse_run, "--steps", "2", "--batch-size", "8"])
    sample.main([reverse_run, "--n", "2", "--batch", "2"])
    assert (tmp_path / "reverse/samples.png").exists()


def test_a_table_puts_runs_that_differ_by_their_seed_into_one_row(toy, tmp_path, capsys):
    forward, runs = str(toy / "runs/forward-toy"), []
    for name, flags in (("a0", "--seed 0"), ("a1", "--seed 1"), ("n0", "--strategy naive")):
        runs.append(str(tmp_path / name))
        short = ["--steps", "3", "--batch-size", "8", "--forward", forward, "--out", runs[-1]]
        train_reverse.main(short + flags.split())
    args = SimpleNamespace(method=None, guidance=[0.0], temperature=[1.0], draws=2, n=50, seed=0)
    alone = train_forward.Processes(torch.device("cpu"))
    rows = fid.runs_table(runs, args, alone)
    assert [name for name, _, _ in rows[:2]] == ["real: test", "real: train (floor)"]
    rows = rows[2:]
    names = ["exact (1)", "exact+score (1)", "biflow strategy=align (2)", "biflow strategy=naive (1)"]
    assert [name for name, _, _ in rows] == names
    seeds = rows[2][1]
    sampler = sample.Sampler.load(runs[1], alone)
    assert seeds[1]["FD"] == np.mean([d["FD"] for d in fid.DigitsReal().draws(sampler, "biflow", 0.0, 1.0, args)])
    last = [m for m in metrics(tmp_path / "a1") if "val_error_x" in m][-1]
    assert seeds[1]["% x0"] == pytest.approx(100 * last["val_error_x0"]) and "% x" not in rows[0][1][0]
    fid.print_table(rows)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith(names[2]))
    a, b = (figures["accuracy"] for figures in seeds)
    assert f"{(a + b) / 2:.3f} ±{abs(a - b) / 2**0.5:.3f}" in line


def test_biflow_imports_little():
    """`import biflow` works where only torch, numpy and huggingface_hub are installed."""
    blocked = "diffusers lpips timm torch_fidelity sklearn PIL scipy torchvision".split()
    code = f"import sys; sys.modules.update(dict.fromkeys({blocked})); import biflow; biflow.BiFlow(biflow.SIZES['toy'])"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(biflow.__file__).parent)


# ----------------------------------------------------------------------------------------------------------------------
# Figures


def gaussian(rng, d):
    a = rng.standard_normal((d, d))
    return rng.standard_normal(d), a @ a.T + 0.1 * np.eye(d)


def test_frechet_distance_of_two_gaussians():
    """Closed form for commuting covariances; scipy's matrix square root for any."""
    rng = np.random.default_rng(0)
    a, b = rng.uniform(0.1, 2, 5), rng.uniform(0.1, 2, 5)
    expected = 5 * 0.25 + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert abs(fid.frechet_distance(np.zeros(5), np.diag(a), np.full(5, 0.5), np.diag(b)) - expected) < 1e-12
    (m1, s1), (m2, s2) = gaussian(rng, 6), gaussian(rng, 6)
    expected = ((m1 - m2) ** 2).sum() + np.trace(s1 + s2 - 2 * scipy.linalg.sqrtm(s1 @ s2).real)
    assert abs(fid.frechet_distance(m1, s1, m2, s2) - expected) < 1e-8 * expected
    singular = np.outer(m1, m1)  # fewer images than features
    assert abs(fid.frechet_distance(m1, singular, m1, singular)) < 1e-6


def test_inception_score_bounds():
    certain = np.repeat(np.eye(10) * 1e3, 100, axis=0)
    assert abs(fid.inception_score(certain, splits=1) - 10) < 1e-6
    assert abs(fid.inception_score(np.zeros((1000, 10))) - 1) < 1e-12


def test_precision_and_recall_by_brute_force():
    rng = np.random.default_rng(0)
    real, fake = rng.standard_normal((40, 2)), 0.5 * rng.standard_normal((30, 2))

    def share(points, centres):
        inside = 0
        for p in points:
            for c in centres:
                radius = sorted(np.linalg.norm(centres - c, axis=1))[3]
                if np.linalg.norm(p - c) <= radius:
                    inside += 1
                    break
        return inside / len(points)

    figures = fid.manifold_figures(real, fake)
    assert figures["precision"] == share(fake, real) > figures["recall"] == share(real, fake)
    balls = [(r, sorted(np.linalg.norm(real - r, axis=1))[3]) for r in real]
    held = [any(np.linalg.norm(f - r) <= radius for f in fake) for r, radius in balls]
    assert figures["coverage"] == np.mean(held)


def test_outliers_raise_recall_but_not_coverage():
    rng = np.random.default_rng(0)
    real, fake = rng.standard_normal((2, 3000, 4))
    figures = fid.manifold_figures(real, fake)
    assert abs(figures["coverage"] - 7 / 8) < 0.03  # 1 - 2^-k, for equal distributions
    collapsed = 0.1 * fake  # all fakes in the middle ...
    outliers = np.where(np.arange(3000)[:, None] < 10, 10 * fake, collapsed)  # ... but for a few far away
    before, after = fid.manifold_figures(real, collapsed), fid.manifold_figures(real, outliers)
    assert before["recall"] < 0.1 and after["recall"] > 0.9
    assert after["coverage"] - before["coverage"] < 0.02


@pytest.fixture(scope="session")
def inception(tmp_path_factory):
    """Random weights of the Inception that torch-fidelity would download, with features that differ between images."""
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda *a, **k: {})
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda *a, **k: None)
        net = module.FeatureExtractorInceptionV3("random", ["2048"])
    for name, p in net.named_parameters():
        if p.ndim == 4:
            torch.nn.init.kaiming_normal_(p)
        elif name == "fc.weight":
            torch.nn.init.normal_(p, std=3.0)
    torch.save(net.state_dict(), path)
    return path


def test_fid_and_is_equal_torch_fidelitys_on_the_same_features():
    metric_fid = pytest.importorskip("torch_fidelity.metric_fid")
    from torch_fidelity.metric_isc import isc_features_to_metric

    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((307, 64)) @ rng.standard_normal((64, 64)) + i for i in (0, 1))
    stats = [metric_fid.fid_features_to_statistics(torch.from_numpy(x)) for x in (a, b)]
    expected = metric_fid.fid_statistics_to_metric(*stats, verbose=False)["frechet_inception_distance"]
    assert abs(fid.frechet_distance(*fid.moments(a), *fid.moments(b)) / expected - 1) < 1e-6
    expected = isc_features_to_metric(torch.from_numpy(a))["inception_score_mean"]
    assert abs(fid.inception_score(a) / expected - 1) < 1e-6


@pytest.mark.slow
def test_fid_and_is_equal_torch_fidelitys(tmp_path, inception):
    """The same images and weights; first-layer features (64), so that 100 images give covariances of full rank."""
    fidelity = pytest.importorskip("torch_fidelity")
    rng = np.random.default_rng(0)
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder, scale in zip(folders, (60, 90)):
        folder.mkdir()
        for i in range(100):
            pixels = (128 + scale * rng.standard_normal((1, 1, 3)) + 20 * rng.standard_normal((24, 24, 3))).clip(0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:03d}.png")
    expected = fidelity.calculate_metrics(
        input1=str(folders[0]), input2=str(folders[1]), fid=True, isc=True, feature_layer_fid="64", cuda=False, cache=False,
        feature_extractor="inception-v3-compat", feature_extractor_weights_path=str(inception), verbose=False,
    )  # fmt: skip
    alone = train_forward.Processes(torch.device("cpu"))
    extractor = fid.Inception(str(inception), alone.device, layer="64")
    a, b = (fid.statistics_of(fid.folder_source(f, 24, 32, alone), extractor, alone) for f in folders)
    ours = fid.image_figures(a, b)
    assert abs(ours["FID"] / expected["frechet_inception_distance"] - 1) < 1e-3
    assert abs(ours["IS"] / expected["inception_score_mean"] - 1) < 1e-3


def test_an_npz_streams_like_a_folder_and_statistics_files_load(tmp_path):
    rng, alone = np.random.default_rng(0), train_forward.Processes(torch.device("cpu"))
    images = rng.integers(0, 256, (70, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", arr_0=images)
    np.savez_compressed(tmp_path / "c.npz", arr_0=images)
    flat = images.transpose(0, 3, 1, 2).reshape(70, -1) / 255
    for name in ("a.npz", "c.npz"):
        found = fid.statistics_of(fid.npz_source(tmp_path / name, 16, alone), fid.Pixels(), alone)
        np.testing.assert_allclose(found.mu, flat.mean(0), atol=1e-12)
        np.testing.assert_allclose(found.sigma, np.cov(flat, rowvar=False), atol=1e-12)
    for prefix in ("", "ref_"):
        np.savez(tmp_path / "s.npz", **{prefix + "mu": found.mu, prefix + "sigma": found.sigma})
        assert np.array_equal(fid.load_statistics(tmp_path / "s.npz").sigma, found.sigma)
    assert fid.load_statistics(tmp_path / "a.npz") is None


def test_two_processes_score_as_one_does(tmp_path, toy):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "a.npz", arr_0=rng.integers(0, 256, (90, 6, 6, 3), dtype=np.uint8))
    script = [str(Path(fid.__file__)), str(tmp_path / "a.npz"), "--features", "pixels", "--batch", "16"]
    fid.main([*script[1:], "--save-stats", str(tmp_path / "one.npz")])
    torchrun(2, script + ["--save-stats", str(tmp_path / "two.npz")])
    one, two = (fid.load_statistics(tmp_path / f"{n}.npz") for n in ("one", "two"))
    np.testing.assert_allclose(two.sigma, one.sigma, rtol=1e-9, atol=1e-12)


# ----------------------------------------------------------------------------------------------------------------------
# Images, latents, perceptual networks


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """Two class folders of JPEGs in two colours, a few sizes."""
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for c, colour in enumerate(((200, 60, 40), (40, 80, 210))):
        (root / f"class{c}").mkdir()
        for i in range(20):
            h, w = rng.integers(256, 300, 2)
            ramp = np.linspace(-40, 40, w)[None, :, None] * (1 if i % 2 else -1)
            pixels = np.array(colour) + ramp + 10 * rng.standard_normal((h, w, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / f"class{c}" / f"{i:02d}.jpg")
    return root


@pytest.fixture(scope="session")
def vae(tmp_path_factory):
    """A small random AutoencoderKL, saved as diffusers saves it: 8-fold smaller, 4 channels."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    kinds = dict(down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4)
    net = diffusers.AutoencoderKL(block_out_channels=[4] * 4, norm_num_groups=2, layers_per_block=1, **kinds)
    folder = tmp_path_factory.mktemp("vae")
    net.save_pretrained(folder)
    return str(folder)


def test_images_of_every_kind_are_read(tmp_path):
    rgb = Image.new("RGB", (40, 30), (250, 10, 20))
    sideways = Image.new("RGB", (30, 40), "black")
    sideways.paste("white", (0, 0, 30, 20))  # the upper half; orientation 6 turns it to the right
    exif = sideways.getexif()
    exif[0x0112] = 6
    clear = Image.new("RGBA", (40, 40), (250, 10, 20, 0))
    grey16 = Image.fromarray(np.full((40, 40), 40_000, np.uint16))
    frames = [Image.new("RGB", (40, 40), c) for c in ("red", "blue")]
    rgb.save(tmp_path / "rgb.png")
    rgb.convert("CMYK").save(tmp_path / "cmyk.jpg")
    rgb.convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "palette.png")
    rgb.convert("L").save(tmp_path / "grey.png")
    sideways.save(tmp_path / "exif.jpg", exif=exif, quality=95)
    clear.save(tmp_path / "clear.png")
    grey16.save(tmp_path / "grey16.png")
    frames[0].save(tmp_path / "animated.webp", save_all=True, append_images=frames[1:], lossless=True)
    read = {p.stem: train_forward.read_image(p, 16) for p in tmp_path.iterdir()}
    assert all(x.shape == (3, 16, 16) and x.dtype == np.uint8 for x in read.values())
    for name in ("rgb", "palette", "cmyk"):
        assert abs(read[name].mean((1, 2)) - [250, 10, 20]).max() < 12, name
    assert (read["clear"] == 255).all() and abs(read["grey16"].astype(int) - 156).max() <= 1
    assert read["animated"].mean((1, 2)).tolist() == [255, 0, 0] and (read["grey"] == read["grey"][0, 0, 0]).all()
    assert read["exif"][:, :, 10:].min() > 240 and read["exif"][:, :, :6].max() < 15  # white on the right


def test_center_crop_is_adms():
    """ADM's three steps by hand on 100 x 70 -> 16: BOX halving twice, BICUBIC to (24, 16), the middle 16 columns."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 100, 3), dtype=np.uint8))
    small = image.resize((50, 35), Image.BOX).resize((25, 17), Image.BOX).resize((24, 16), Image.BICUBIC)
    assert np.array_equal(np.asarray(train_forward.center_crop(image, 16)), np.asarray(small)[:, 4:20])
    assert train_forward.center_crop(image.resize((5, 9)), 16).size == (16, 16)  # small images grow


def load(photos, runs, **kw):
    alone = train_forward.Processes(torch.device("cpu"))
    return train_forward.load_data(str(photos), kw.get("size"), kw.get("vae"), runs, alone, kw.get("workers", 0))


def test_latents_are_the_vaes_posterior_normalised(photos, vae, tmp_path):
    """Against diffusers used directly, for both mirror images; decode inverts the normalisation."""
    from diffusers import AutoencoderKL

    data = load(photos, tmp_path, size=64, vae=vae)
    net = AutoencoderKL.from_pretrained(vae).eval()
    files = sorted(photos.rglob("*.jpg"))
    images = torch.stack([torch.from_numpy(train_forward.read_image(p, 64)) for p in files]) / 127.5 - 1
    with torch.no_grad():
        posteriors = [net.encode(x).latent_dist for x in (images, images.flip(3))]
    for mirror, posterior in enumerate(posteriors):
        stored = torch.from_numpy(data.array[:, mirror].astype(np.float32))
        torch.testing.assert_close(stored[:, 0], posterior.mean, rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(stored[:, 1], posterior.logvar, rtol=2e-3, atol=2e-3)
    rng = np.random.default_rng(0)
    drawn = np.stack([data.get(i, bool(m), rng) for _ in range(50) for i in range(40) for m in (0, 1)])
    np.testing.assert_allclose(drawn.mean((0, 2, 3)), 0, atol=0.02)
    np.testing.assert_allclose(drawn.std((0, 2, 3)), 1, atol=0.02)
    ours = train_forward.VAE(vae, torch.device("cpu"), data.info["mean"], data.info["std"])
    normal = (posteriors[0].mean - ours.mean) / ours.std
    with torch.no_grad():
        torch.testing.assert_close(ours.decode(normal), net.decode(posteriors[0].mean).sample, rtol=1e-4, atol=1e-4)


def test_a_cache_says_which_vae_made_it_and_stage_2_takes_the_flows_statistics(photos, vae, tmp_path):
    cache = load(photos, tmp_path, size=64, vae=vae).source.parent
    short = ["--steps", "2", "--batch-size", "2", "--num-workers", "0", "--size", "toy"]
    train_forward.main([*short, "--data", str(cache), "--out", str(tmp_path / "F")])
    run = json.loads((tmp_path / "F/run.json").read_text())
    assert (run["vae"], run["sigma"]) == (vae, 0.3)
    for change, ends in ((1e-5, False), (0.5, True)):
        moved = run | {"mean": [m + change for m in run["mean"]]}
        (tmp_path / "F/run.json").write_text(json.dumps(moved))
        reverse = [*short, "--forward", str(tmp_path / "F"), "--out", str(tmp_path / f"G{change}")]
        with pytest.raises(SystemExit) if ends else contextlib.nullcontext():
            train_reverse.main(reverse)
            assert json.loads((tmp_path / f"G{change}/run.json").read_text())["mean"] == moved["mean"]


def test_some_of_a_folder_are_taken_evenly_from_all_classes(photos):
    alone = train_forward.Processes(torch.device("cpu"))
    ((_, images),) = fid.folder_source(photos, 24, 32, alone, 4)
    files = sorted(photos.rglob("*.jpg"))
    for image, i in zip(images, (0, 13, 26, 39), strict=True):
        assert np.array_equal(image, train_forward.read_image(files[i], 24))


def test_a_killed_cache_build_goes_on_without_encoding_again(photos, vae, tmp_path, monkeypatch):
    monkeypatch.setattr(train_forward, "CHUNK", 8)
    encode, calls = train_forward.VAE.encode, []

    def dying(self, images):
        calls.append(len(images))
        if len(calls) == 6:
            raise KeyboardInterrupt
        return encode(self, images)

    monkeypatch.setattr(train_forward.VAE, "encode", dying)
    with pytest.raises(KeyboardInterrupt):
        load(photos, tmp_path / "a", size=32, vae=vae)
    assert not list((tmp_path / "a").glob("*/manifest.json"))
    again = load(photos, tmp_path / "a", size=32, vae=vae)
    assert len(calls) == 6 + 6  # two chunks of five were done; three are encoded, in two mirror images
    whole = load(photos, tmp_path / "b", size=32, vae=vae)
    assert np.array_equal(again.array, whole.array) and again.info["std"] == whole.info["std"]


@pytest.mark.slow
def test_two_processes_build_the_cache_that_one_builds(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(train_forward, "CHUNK", 64)
    for c in range(2):  # 160 images: three chunks
        shutil.copytree(photos / f"class{c}", tmp_path / f"photos/class{c}")
        for i, k in ((i, k) for i in range(20) for k in range(3)):
            shutil.copy(photos / f"class{c}/{i:02d}.jpg", tmp_path / f"photos/class{c}/{i:02d}-{k}.jpg")
    one = load(tmp_path / "photos", tmp_path / "one", size=16)
    args = ["--data", str(tmp_path / "photos"), "--img-size", "16", "--steps", "1", "--batch-size", "4"]
    torchrun(2, [train_forward.__file__, *args, "--out", str(tmp_path / "two/run")])
    two = train_forward.load_run(tmp_path / "two/run")[1]["cache"]
    assert np.array_equal(np.load(Path(two) / "data.npy"), one.array) and len(one.labels) == 160


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(tmp_path, monkeypatch):
    args = ["--steps", "10", "--batch-size", "15", "--log-every", "1", "--save-every", "5"]
    train_forward.main(args + ["--out", str(tmp_path / "one")])
    learning_rate = train_forward.learning_rate

    def broken(step, args):
        if step == 5:
            raise KeyboardInterrupt
        return learning_rate(step, args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_forward, "learning_rate", broken)
        train_forward.main(args + ["--out", str(tmp_path / "both")])
    torchrun(2, [train_forward.__file__, *args, "--out", str(tmp_path / "both")])
    one, both = ([m["loss"] for m in metrics(tmp_path / name) if "loss" in m] for name in ("one", "both"))
    np.testing.assert_allclose(both, one, atol=1e-5)


def test_a_pixel_cache_holds_the_images_and_workers_change_nothing(photos, tmp_path):
    data = load(photos, tmp_path / "a", size=32, workers=2)
    files = sorted(photos.rglob("*.jpg"))
    assert all(np.array_equal(data.array[i], train_forward.read_image(p, 32)) for i, p in enumerate(files))
    assert data.labels.tolist() == [0] * 20 + [1] * 20 and data.info["classes"] == ["class0", "class1"]
    x = data.get(3, True, None)
    np.testing.assert_allclose(x, data.array[3][:, :, ::-1] / 127.5 - 1, atol=1e-6)
    assert not set(data.fit) & set(data.val) and len(data.fit) + len(data.val) == 40


def test_a_folder_of_small_images_trains_with_any_size_in_pixel_mode(photos, tmp_path):
    args = ["--data", str(photos), "--vae", "none", "--img-size", "32", "--steps", "2", "--batch-size", "2"]
    train_forward.main(args + ["--out", str(tmp_path / "f")])
    config = biflow.TARFlow.from_pretrained(tmp_path / "f").config
    assert (config.tokens, config.dim, config.num_classes) == (256, 12, 2)


@pytest.fixture(scope="session")
def perceptual_files(tmp_path_factory):
    """Random weights of VGG-16 and of a small ConvNeXt V2, in files as their packages would download them."""
    torchvision, timm = pytest.importorskip("torchvision"), pytest.importorskip("timm")
    folder = tmp_path_factory.mktemp("perceptual")
    torch.manual_seed(0)
    torch.save(torchvision.models.vgg16(weights=None).state_dict(), folder / "vgg.pth")
    torch.save(timm.create_model("convnextv2_atto").state_dict(), folder / "convnext.pth")
    return folder


def test_perceptual_distances_equal_the_packages_used_directly(perceptual_files, monkeypatch):
    import lpips
    import timm
    from torchvision.models import vgg16

    monkeypatch.setattr(train_reverse, "CONVNEXT", "convnextv2_atto")
    nets = [
        f(str(perceptual_files / n))
        for f, n in ((train_reverse.load_lpips, "vgg.pth"), (train_reverse.load_convnext, "convnext.pth"))
    ]
    a, b = (torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(i)) * 2 - 1 for i in (0, 1))
    whole = torch.tensor([[1.0, 0.5, 0.5, 0.5]] * 2)  # area 1, ratio 1: the crop is the image
    distance = biflow.PerceptualDistance(lambda x: x, *nets)
    with torch.no_grad():
        loss, found = distance(a, b, whole)

    package = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    trunk = vgg16(weights=None)
    trunk.load_state_dict(torch.load(perceptual_files / "vgg.pth", weights_only=True))
    for i in range(1, 6):
        for name, layer in getattr(package.net, f"slice{i}").named_children():
            layer.load_state_dict(trunk.features[int(name)].state_dict())
    classifier = timm.create_model("convnextv2_atto")
    classifier.load_state_dict(torch.load(perceptual_files / "convnext.pth", weights_only=True))
    classifier.eval()
    cfg = classifier.pretrained_cfg
    mean, std = (torch.tensor(cfg[k]).view(3, 1, 1) for k in ("mean", "std"))
    with torch.no_grad():
        expected_lpips = package.eval()(a, b).flatten()
        fa, fb = (
            classifier.forward_head(classifier.forward_features(((i + 1) / 2 - mean) / std), pre_logits=True)
            for i in (a, b)
        )
    expected_convnext = (fa - fb).square().sum(1)
    torch.testing.assert_close(found["lpips"], expected_lpips, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found["convnext"], expected_convnext, rtol=1e-3, atol=1e-6)
    by_hand = 0.4 * expected_lpips / (expected_lpips + 0.01) + 0.1 * expected_convnext / (expected_convnext + 0.01)
    assert abs(loss - by_hand.mean()) < 1e-3


def test_photographs_end_to_end(photos, vae, perceptual_files, inception, tmp_path, monkeypatch, capsys):
    """JPEGs at 256 x 256 -> latents -> both stages with both perceptual terms -> samples -> FID, on a CPU."""
    monkeypatch.setattr(train_reverse, "CONVNEXT", "convnextv2_atto")
    few = ["--steps", "2", "--batch-size", "2"]
    train_forward.main(["--data", str(photos), "--vae", vae, "--out", str(tmp_path / "f"), *few])
    files = [
        "--lpips-weights",
        str(perceptual_files / "vgg.pth"),
        "--convnext-weights",
        str(perceptual_files / "convnext.pth"),
    ]
    runs = ["--forward", str(tmp_path / "f"), "--out", str(tmp_path / "r")]
    train_reverse.main([*runs, *files, "--lpips", "0.4", "--convnext", "0.1", *few])
    last = [m for m in metrics(tmp_path / "r") if "loss" in m][-1]
    assert last["error_lpips"] > 0 and last["error_convnext"] > 0
    sample.main([str(tmp_path / "r"), "--n", "3", "--batch", "2", "--method", "biflow", "--npz", str(tmp_path / "s.npz")])
    assert np.load(tmp_path / "s.npz")["arr_0"].shape == (3, 256, 256, 3)
    photo, mask = str(photos / "class0/03.jpg"), np.zeros((256, 256), np.uint8)
    mask[:128] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    for edit in (["--class-edit", photo, "--from", "class0", "--to", "class1"], ["--inpaint", photo, "--mask", "mask.png"]):
        sample.main([str(tmp_path / "r"), *[e.replace("mask.png", str(tmp_path / "mask.png")) for e in edit], "--n", "2"])
    assert (tmp_path / "r/class-edit.png").exists() and (tmp_path / "r/inpaint.png").exists()
    score = ["--inception-weights", str(inception), "--n", "4", "--batch", "4"]
    fid.main([str(photos), "--save-stats", str(tmp_path / "ref.npz"), *score])
    fid.main([str(tmp_path / "r"), "--reference", str(tmp_path / "ref.npz"), *score])
    fid.main([str(tmp_path / "r"), "--reference", str(tmp_path / "ref.npz"), "--reconstruct", *score])
    out = capsys.readouterr().out
    assert "VAE round trip: FID" in out and "4 images; labels in turn over 2 classes" in out


# ----------------------------------------------------------------------------------------------------------------------
# Bad input: one line that names the cause, exit status 2, no traceback, nothing overwritten


@pytest.fixture(scope="session")
def bad(tmp_path_factory, toy, photos):
    """Files and folders with something wrong, by name."""
    root = tmp_path_factory.mktemp("bad")
    forward, reverse = toy / "runs/forward-toy", toy / "runs/reverse-toy"
    good = (photos / "class0/00.jpg").read_bytes()

    def images(name, content, suffix=".jpg"):
        for c, data in (("a", good), ("b", content)):
            (root / name / c).mkdir(parents=True)
            (root / name / c / "0.jpg").write_bytes(good)
            (root / name / c / f"1{suffix}").write_bytes(data)

    images("truncated", good[: len(good) // 2])
    images("zero", b"")
    images("text", b"not an image")
    bomb = io.BytesIO()
    Image.new("1", (30_000, 30_000)).save(bomb, "PNG")
    images("bomb", bomb.getvalue(), ".png")
    for name in ("empty", "emptyclass/a", "emptyclass/b", "oneclass/a", "single/a", "single/b"):
        (root / name).mkdir(parents=True)
    for name, n in (("emptyclass/a", 2), ("oneclass/a", 2), ("single/a", 2), ("single/b", 1)):
        for i in range(n):
            (root / name / f"{i}.jpg").write_bytes(good)
    (root / "file").write_text("a file")
    Image.new("L", (8, 8), 100).save(root / "grey.png")

    def copy_of(run, name, **changes):
        shutil.copytree(run, root / name)
        for file, change in changes.items():
            path = root / name / file.replace("_", ".")
            path.write_bytes(change(path.read_bytes()))

    copy_of(forward, "mismatch", config_json=lambda b: b.replace(b'"width": 64', b'"width": 32'))
    copy_of(forward, "unknown", config_json=lambda b: b.replace(b'"width"', b'"breadth"'))
    copy_of(forward, "cut", model_safetensors=lambda b: b[:-100])
    copy_of(forward, "flipped", model_safetensors=lambda b: b[:-100] + bytes([b[-100] ^ 1]) + b[-99:])
    copy_of(forward, "garbled", run_json=lambda b: b[:50])
    copy_of(reverse, "orphan", run_json=lambda b: b.replace(b"../forward-toy", b"../nowhere"))
    copy_of(forward, "nocurves", metrics_jsonl=lambda b: b"")
    copy_of(forward, "nocheckpoint")
    for p in (root / "nocheckpoint").glob("checkpoint*"):
        p.unlink()
    data = load(photos, root / "caches", size=32)
    cache = data.source.parent
    for name in ("cachecut", "cacheflip", "cachelabels", "cachemanifest"):
        shutil.copytree(cache, root / name)
    (root / "cachecut/data.npy").write_bytes((cache / "data.npy").read_bytes()[:5000])
    flip_a_bit(root / "cacheflip/data.npy", 30_000)
    flip_a_bit(root / "cachemanifest/manifest.json", 100)
    manifest = json.loads((cache / "manifest.json").read_text())
    del manifest["crc"]
    manifest["labels"].pop()
    manifest["crc"] = zlib.crc32(json.dumps(manifest).encode())
    (root / "cachelabels/manifest.json").write_text(json.dumps(manifest))
    shutil.copytree(cache, root / "cache")
    np.savez(root / "nothing.npz", other=np.zeros(3))
    np.savez(root / "float.npz", arr_0=np.zeros((4, 8, 8, 3)))
    np.savez(root / "stats.npz", mu=np.zeros(5), sigma=np.eye(5))
    np.savez(root / "images.npz", arr_0=np.zeros((4, 8, 8, 3), np.uint8))
    np.savez(root / "large.npz", arr_0=np.zeros((4, 64, 64, 3), np.uint8))
    np.savez(root / "pickle.npz", mu=np.array([{}], dtype=object), sigma=np.eye(5))
    torch.save({"a": root}, root / "pickle.pth")  # a Path is not a tensor
    torch.save({"a": torch.zeros(2)}, root / "other.pth")
    (root / "F").symlink_to(forward)
    (root / "G").symlink_to(reverse)
    return root


BAD_INPUT = [
    ("train_forward", "--size Z", "invalid choice"),
    ("train_forward", "--steps 0", "--steps: must be"),
    ("train_forward", "--steps many", "invalid int"),
    ("train_forward", "--batch-size 0", "--batch-size: must be"),
    ("train_forward", "--micro-batch 0", "--micro-batch: must be"),
    ("train_forward", "--lr nan", "--lr: must be"),
    ("train_forward", "--lr -1", "--lr: must be"),
    ("train_forward", "--label-drop 2", "--label-drop: must be"),
    ("train_forward", "--ema 1.5", "--ema: must be"),
    ("train_forward", "--sigma -0.1", "--sigma: must be"),
    ("train_forward", "--seed -1", "--seed: must be"),
    ("train_forward", "--clip -1", "clip must be positive"),
    ("train_forward", "--clip x", "invalid"),
    ("train_forward", "--no-such-flag", "unrecognized"),
    ("train_forward", "--size B", "no default data"),
    ("train_forward", "--data missing", "not a folder"),
    ("train_forward", "--data file", "not a folder"),
    ("train_forward", "--data digits --img-size 16", "8 x 8"),
    ("train_forward", "--data digits --vae x", "no VAE"),
    ("train_forward", "--data empty", "class subfolders"),
    ("train_forward", "--data oneclass", "1 class subfolders"),
    ("train_forward", "--data emptyclass", "holds 0 images"),
    ("train_forward", "--data single", "holds 1 images"),
    ("train_forward", "--data truncated", "cannot read the image"),
    ("train_forward", "--data zero", "cannot read the image"),
    ("train_forward", "--data text", "cannot read the image"),
    ("train_forward", "--data bomb", "cannot read the image"),
    ("train_forward", "--data cache --img-size 33", "was made with img_size 32"),
    ("train_forward", "--data cache --vae x", "was made with vae None"),
    ("train_forward", "--data cachecut", "is damaged"),
    ("train_forward", "--data cacheflip --steps 5 --batch-size 16", "is damaged at image"),
    ("train_forward", "--data cachelabels", "is damaged"),
    ("train_forward", "--data cachemanifest", "is damaged"),
    ("train_forward", "--data oneclass --vae missing", "class subfolders"),
    ("train_forward", "--data cache --vae none --out file", "cannot write to"),
    ("train_forward", "--out file/run", "cannot write to"),
    ("train_forward", "--resume missing.pt", "no such checkpoint"),
    ("train_forward", "--resume other.pth", "not a checkpoint"),
    ("train_forward", "--resume pickle.pth", "is damaged"),
    ("train_forward", "--out nocheckpoint", "without a checkpoint"),
    ("train_forward", "--out F --seed 3", "seed: 0 there, 3 now"),
    ("train_reverse", "--forward missing", "not a trained run"),
    ("train_reverse", "--forward G", "is a reverse run"),
    ("train_reverse", "--forward mismatch", "does not match"),
    ("train_reverse", "--forward unknown", "breadth"),
    ("train_reverse", "--forward cut", "damaged"),
    ("train_reverse", "--forward flipped", "checksum"),
    ("train_reverse", "--forward garbled", "damaged"),
    ("train_reverse", "--forward F --data cache", "was made with img_size 32, not 8"),
    ("train_reverse", "--forward F --strategy best", "invalid choice"),
    ("train_reverse", "--forward F --w-max -1", "--w-max: must be"),
    ("train_reverse", "--forward F --adaptive-p -1", "--adaptive-p: must be"),
    ("train_reverse", "--forward F --perceptual-every 0", "--perceptual-every: must be"),
    ("train_reverse", "--forward F --lpips 1 --lpips-weights missing.pth", "cannot load the weights"),
    ("train_reverse", "--forward F --lpips 1 --lpips-weights pickle.pth", "cannot load the weights"),
    ("train_reverse", "--forward F --lpips 1 --lpips-weights other.pth", "does not hold"),
    ("train_reverse", "--forward F --convnext 1 --convnext-weights other.pth", "does not hold"),
    ("sample", "G --class-edit grey.png --from 1", "needs --from"),
    ("sample", "G --class-edit missing.png --from 1 --to 2", "cannot read the image missing.png"),
    ("sample", "G --class-edit grey.png --from 1 --to dog", "dog is not a class"),
    ("sample", "G --inpaint grey.png", "needs --mask"),
    ("sample", "G --inpaint grey.png --mask missing.png", "cannot read the image missing.png"),
    ("sample", "G --reconstruct grey.png --guidance 9", "outside [0, 2]"),
    ("sample", "F --trajectory", "needs a reverse run"),
    ("sample", "nocurves --curves", "no curves yet"),
    ("sample", "G --method biflow+score --guidance 9", "outside [0, 2]"),
    ("sample", "G --size B", "--size is for --benchmark"),
    ("train_forward", "--import missing.pth --out new", "cannot load the weights missing.pth"),
    ("train_forward", "--import other.pth --out new", "not a TARFlow checkpoint"),
    ("train_forward", "--import pickle.pth --out new", "cannot load the weights pickle.pth"),
    ("fid", "--table G missing", "not a trained run"),
    ("sample", "missing", "not a trained run"),
    ("sample", "orphan", "not a trained run"),
    ("sample", "G --n 0", "at least 1"),
    ("sample", "G --batch 0", "at least 1"),
    ("sample", "G --classes 11", "from 0 to 9"),
    ("sample", "G --classes one", "comma-separated"),
    ("sample", "G --guidance 99", "outside [0, 2]"),
    ("sample", "G --guidance nan", "guidance"),
    ("sample", "G --method magic", "invalid choice"),
    ("sample", "F --method biflow", "give a reverse run"),
    ("sample", "G --n 1 --out file/x.png", "cannot write"),
    ("fid", "missing", "not a trained run"),
    ("fid", "empty --features pixels", "holds 0 images"),
    ("fid", "G --n 1", "--n: must be at least 2"),
    ("fid", "G --n 3", "at least 4 for digits"),
    ("fid", "--table G --n 3", "at least 4 for digits"),
    ("fid", "G --guidance 99", "outside [0, 2]"),
    ("fid", "F --method biflow", "give a reverse run"),
    ("fid", "nothing.npz --features pixels", "expected mu and sigma"),
    ("fid", "float.npz --features pixels", "expected at least two uint8 images"),
    ("fid", "pickle.npz --features pixels", "cannot read"),
    ("fid", "file --features pixels", "cannot read"),
    ("fid", "large.npz --features pixels", "use inception"),
    ("fid", "images.npz --features pixels --reference stats.npz", "the reference has 5 features"),
    ("fid", "images.npz --inception-weights pickle.pth", "cannot load the weights"),
    ("fid", "images.npz --inception-weights other.pth", "Inception"),
]


@pytest.mark.parametrize("script, args, message", BAD_INPUT, ids=[f"{s} {a}" for s, a, _ in BAD_INPUT])
def test_bad_input_ends_with_one_line(bad, script, args, message, capsys, monkeypatch):
    monkeypatch.chdir(bad)
    before = {p: p.stat().st_mtime_ns for p in bad.rglob("*") if p.is_file() and "cache" not in p.parent.name}
    short = [] if script in ("sample", "fid") or "--steps" in args else ["--steps", "1", "--batch-size", "4"]
    with pytest.raises(SystemExit) as end:
        globals()[script].main(args.split() + short)
    error = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and message in error[-1] and "Traceback" not in "".join(error)
    assert all(p.stat().st_mtime_ns == t for p, t in before.items())


def test_a_vae_that_does_not_fit_is_refused(photos, vae, tmp_path):
    for size, name, message in ((36, vae, "not a multiple of 8"), (32, str(tmp_path), "cannot load the VAE")):
        with pytest.raises(train_forward.Failure, match=message):
            load(photos, tmp_path / "caches", size=size, vae=name)
    with pytest.raises(train_forward.Failure, match="4 latent channels, the data were encoded to 8"):
        train_forward.VAE(vae, torch.device("cpu"), [0.0] * 8, [1.0] * 8)


def test_a_changed_folder_gets_a_cache_of_its_own(photos, tmp_path):
    copy = shutil.copytree(photos, tmp_path / "photos")
    before = load(copy, tmp_path / "caches", size=16)
    (copy / "class0/00.jpg").unlink()
    after = load(copy, tmp_path / "caches", size=16)
    assert len(before.labels) == 40 and len(after.labels) == 39


# ----------------------------------------------------------------------------------------------------------------------
# Nothing lost: kills, full disks, dead processes, memory


def train_in(folder: str, **patches):
    """A process that trains a small flow with a checkpoint at every step; for killing."""
    torch.set_num_threads(1)
    train_forward.main([*TINY, "--out", f"{folder}/run"])


TINY = ["--steps", "12", "--batch-size", "4", "--save-every", "1", "--log-every", "1", "--warmup", "2"]


def kill_and_go_on(tmp_path, kills: int):
    """SIGKILL at random moments, also during a save; after the last, the run goes on to its end."""
    reference = tmp_path / "whole"
    train_in(str(reference))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train_forward", "sklearn.datasets"])
    rng, done, rounds = np.random.default_rng(0), 0, 0
    while done < kills:
        folder, patience = tmp_path / f"parts{rounds}", 2.0
        rounds += 1
        while not (folder / "run/run.json").exists() or json.loads((folder / "run/run.json").read_text())["step"] < 12:
            process = context.Process(target=train_in, args=(str(folder),))
            process.start()
            process.join(rng.uniform(0.1, 1) * patience)
            patience *= 1.2  # on a slow machine, too, the run gets to its end
            if process.is_alive():
                process.kill()
                done += 1
            process.join()
            assert process.exitcode in (0, -signal.SIGKILL), "a run could not go on"
        assert weights(folder / "run") == weights(reference / "run")


def test_a_run_survives_being_killed(tmp_path):
    kill_and_go_on(tmp_path, 2)


@pytest.mark.slow
def test_a_run_survives_being_killed_twenty_times(tmp_path):
    kill_and_go_on(tmp_path, 20)


@pytest.mark.parametrize("file", ["checkpoint.new.pt", "model.safetensors"])
def test_a_full_disk_leaves_the_last_checkpoint_whole(tmp_path, monkeypatch, capsys, file):
    train_in(str(tmp_path / "whole"))
    replace, calls = os.replace, []

    def full(source, target):
        calls.append(target)
        if Path(target).name == file and len([c for c in calls if Path(c).name == file]) == 5:
            raise OSError(28, "No space left on device")
        return replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(os, "replace", full)
        train_in(str(tmp_path / "parts"))
    assert end.value.code == 2 and "No space left" in capsys.readouterr().err
    assert not list(tmp_path.glob("parts/run/*.tmp"))
    assert torch.load(tmp_path / "parts/run/checkpoint.pt", weights_only=True)["step"] >= 4
    train_in(str(tmp_path / "parts"))
    assert weights(tmp_path / "parts/run") == weights(tmp_path / "whole/run")


def test_one_dead_process_ends_the_job_with_its_error(tmp_path):
    script = tmp_path / "dying.py"
    script.write_text(
        f"import os, sys; sys.path.insert(0, {str(Path(train_forward.__file__).parent)!r})\n"
        "import train_forward\n"
        "schedule = train_forward.learning_rate\n"
        "def dying(step, args):\n"
        "    if step == 3 and os.environ['RANK'] == '1':\n"
        "        raise RuntimeError('this process dies')\n"
        "    return schedule(step, args)\n"
        "train_forward.learning_rate = dying\n"
        f"train_forward.main({[*TINY, '--out', str(tmp_path / 'run')]})\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=100)
    assert done.returncode != 0 and "this process dies" in done.stderr


def test_five_hundred_steps_do_not_grow_memory(tmp_path, monkeypatch):
    resident, learning_rate = [], train_forward.learning_rate

    def watching(step, args):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        resident.append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)
        return learning_rate(step, args)

    if not Path("/proc/self/statm").exists():
        pytest.skip("reads /proc")
    monkeypatch.setattr(train_forward, "learning_rate", watching)
    train_forward.main(["--steps", "500", "--batch-size", "4", "--save-every", "1000", "--out", str(tmp_path / "run")])
    assert max(resident[400:]) - max(resident[50:150]) < 10, "MiB between steps 50-150 and 400-500"


@pytest.mark.parametrize("script", ["train_forward", "train_reverse", "sample", "fid"])
def test_help_and_a_closed_stdout(script):
    """--help names every flag's default; a reader that goes away causes no traceback."""
    file = str(Path(train_forward.__file__).with_name(f"{script}.py"))
    command = f"{sys.executable} {file} --help | head -c 1 > /dev/null; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert "Traceback" not in done.stderr and done.returncode in (0, 2)


class Parsed(Exception):
    pass


def readme_commands():
    """Every `python X.py ...` and `torchrun ... X.py ...` in the README's shell blocks, as (script, arguments)."""
    text = (Path(biflow.__file__).parent / "README.md").read_text()
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
        values = {"s": "0"} | dict(re.findall(r'(\w+)="([^"]*)"', block))
        block = re.sub(r"\$(\w+)", lambda m: values[m[1]].replace("$s", "0"), block)
        for command in re.split(r"\n|&&|;", block):
            words = shlex.split(command, comments=True)
            names = [i for i, word in enumerate(words) if word.endswith(".py")]
            if names:
                yield words[names[0]].removesuffix(".py"), words[names[0] + 1 :]


@pytest.mark.parametrize("script, args", readme_commands(), ids=lambda v: v if isinstance(v, str) else " ".join(v))
def test_every_command_of_the_readme_parses(script, args, monkeypatch):
    parse_args = argparse.ArgumentParser.parse_args

    def only_parse(self, argv=None):
        parse_args(self, argv)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", only_parse)
    with pytest.raises(Parsed):
        globals()[script].main(args)


def test_every_name_of_the_readmes_tables_exists():
    text = (Path(biflow.__file__).parent / "README.md").read_text()
    section = text.split("## From the paper to the code")[1].split("\n## ")[0]
    names = re.findall(r"`([A-Za-z_.]+)`", section)
    assert len(names) > 15
    for name in names:
        if name != "biflow.py":
            owner, _, member = name.partition(".")
            assert hasattr(getattr(biflow, owner), member or "__doc__") or member in Config.__dataclass_fields__
