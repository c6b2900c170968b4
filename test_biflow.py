"""All tests, in the paper's order: the method against independent oracles (autograd Jacobians, closed forms, brute
force, sums by hand), the scripts against themselves, against the packages they use, and against bad input.

    python -m pytest                              # some minutes on two cores
    python -m pytest -m "slow or not slow"        # all, as continuous integration runs them
    python -m pytest -k flow_block                # one group

A test's name begins with its group. The method: tokens, flow_block, flow_inverse, flow_denoise, flow_import, nll,
reverse_block, alignment, guidance, reverse_loss, perceptual, precision, saving. The scripts: train, data, sample, fid,
commands. All run on the CPU, where "the same" can mean bit for bit, unless BIFLOW_TEST_CUDA is set.
"""

import os

if "BIFLOW_TEST_CUDA" not in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is imported

import argparse
import ast
import contextlib
import dataclasses
import functools
import itertools
import json
import math
import multiprocessing
import os
import pickle
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as nnf
from PIL import Image
from safetensors import SafetensorError
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.autograd.functional import jacobian
from torch.nn.attention import SDPBackend, sdpa_kernel

import biflow
import fid
import sample
import train_forward
import train_reverse
from biflow import SIZES, VAE, BiFlow, Config, ReverseBlock, TARFlow, autocast, patchify, reverse_loss, unpatchify
from data import (
    Batches,
    Photos,
    jitter,
    list_images,
    load_data,
    load_digits,
    load_torchvision,
    to_device,
    validation_batches,
)
from sample import Sampler, center_crop, read_image, sample_noise, to_uint8

SMALL = Config(4, 1, 2, num_classes=3, width=16, blocks=3, layers=2, head_dim=8, class_tokens=2, guidance_tokens=1)
T, D, B = 4, 4, 3  # of SMALL
CLIP = 0.3  # clips about half of the parameters of a model from `make`
STRATEGIES = [(strategy, denoise) for strategy in ("align", "hidden", "naive") for denoise in ("learned", "none")]
CPU = torch.device("cpu")


def make(cls, dtype=torch.float32, config=SMALL, **changes):
    """A small model whose parameters are all perturbed, so that no test passes because a new block is the identity."""
    torch.manual_seed(0)
    model = cls(replace(config, **changes)).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.4 / config.width**0.5 * torch.randn_like(p))
    return model.eval()


def close(a, b, tolerance):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def count_calls(modules):
    """A list that grows by (index, batch size) whenever one of the modules is called."""
    calls = []
    for i, module in enumerate(modules):
        module.register_forward_pre_hook(lambda _, args, i=i: calls.append((i, len(args[0]))))
    return calls


# ---- tokens ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("cls, size, millions", [(TARFlow, "B", 120), (TARFlow, "XL", 690), (BiFlow, "B", 133)])
def test_tokens_and_sizes_have_the_papers_parameter_counts(cls, size, millions):
    with torch.device("meta"):
        count = sum(p.numel() for p in cls(SIZES[size]).parameters())
    assert abs(count / 1e6 / millions - 1) < 0.03


@pytest.mark.parametrize("p", [1, 2, 3])
def test_tokens_are_those_of_unfold_and_unpatchify_is_the_inverse(p):
    x = torch.randn(2, 3, 6, 6)
    assert torch.equal(patchify(x, p), nnf.unfold(x, p, stride=p).transpose(1, 2))
    assert torch.equal(unpatchify(patchify(x, p), p), x)


WRONG = [("img_size", 7), ("width", 20), ("head_dim", 2), ("blocks", 0), ("layers", -1), ("clip", 0)]
WRONG += [("clip", math.nan), ("strategy", "aligned"), ("denoise", "score"), ("w_max", -0.1), ("w_max", math.inf)]


@pytest.mark.parametrize("field, value", WRONG)
def test_tokens_and_sizes_that_do_not_fit_are_refused(field, value):
    with pytest.raises(ValueError, match=field):
        replace(SMALL, **{field: value})


# ---- flow_block ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("clip", [CLIP, None])
@pytest.mark.parametrize("y", [torch.tensor([2]), torch.tensor([-1]), None])
def test_flow_block_logdet_is_that_of_the_jacobian(clip, y):
    # Oracle: the whole flow's Jacobian by autograd, in float64.
    flow = make(TARFlow, torch.float64, clip=clip)
    x = torch.randn(1, 1, 4, 4).double()
    J = jacobian(lambda x: flow(x, y)[0][-1], x).view(T * D, T * D)
    close(flow(x, y)[1], torch.linalg.slogdet(J).logabsdet.view(1), 1e-8)


@pytest.mark.parametrize("i", [0, 1])
def test_flow_block_moves_each_position_with_exactly_those_before_it(i):
    # Oracle: sparsity of the autograd Jacobian. In the token itself, each number moves with itself alone.
    block = make(TARFlow, torch.float64, clip=None).blocks[i]
    J = jacobian(lambda x: block(x, torch.tensor([1]))[0], torch.randn(1, T, D).double()).view(T, D, T, D)
    before = torch.ones(T, T, dtype=torch.bool).tril(-1)  # row t, column s: s < t
    before = before if i == 0 else before.T
    itself = torch.eye(T * D, dtype=torch.bool).view(T, D, T, D)
    assert torch.equal(J.abs() > 1e-12, before.view(T, 1, T, 1) | itself)


def test_flow_block_without_a_class_takes_the_mean_of_the_class_embeddings():
    # Oracle: an unconditional flow that has the mean class embedding in its position embedding.
    flow, plain = make(TARFlow, torch.float64), make(TARFlow, torch.float64, num_classes=0)
    state = flow.state_dict()
    for i in range(B):
        state[f"blocks.{i}.pos_embed"] = state[f"blocks.{i}.pos_embed"] + state.pop(f"blocks.{i}.class_embed").mean(0)
    plain.load_state_dict(state)
    x = torch.randn(2, 1, 4, 4).double()
    close(flow.log_prob(x), plain.log_prob(x), 1e-12)
    close(flow.log_prob(x, torch.tensor([1, -1]))[1:], plain.log_prob(x)[1:], 1e-12)
    assert (flow.log_prob(x, torch.tensor([1, 2])) - plain.log_prob(x)).abs().min() > 1e-3


@pytest.mark.parametrize("flip", [False, True])
def test_flow_block_density_integrates_to_one(flip):
    # Oracle: a Riemann sum over two tokens of one number. The token that is read first has a standard normal density.
    torch.manual_seed(0)
    shape = SimpleNamespace(tokens=2, dim=1, width=8, head_dim=8, layers=1, num_classes=0, clip=3.0)
    block = biflow.FlowBlock(shape, flip).double().requires_grad_(False)
    for p in block.parameters():
        p.normal_(std=0.3)
    first, second = (torch.linspace(-end, end, 20 * end + 1, dtype=torch.float64) for end in (8, 30))
    x = torch.cartesian_prod(first, second).unsqueeze(2)
    z, logdet = block(x.flip(1) if flip else x, torch.zeros(len(x)))
    log_p = torch.distributions.Normal(0, 1).log_prob(z).sum((1, 2)) + logdet
    assert logdet.std() > 0.1
    assert abs(log_p.exp().sum().item() * 0.1**2 - 1) < 1e-8


@pytest.mark.parametrize("clip, bound", [(None, 10.0), (3.0, 3.0)])
def test_flow_block_clips_what_its_layers_say(clip, bound):
    # Closed form, for layers that say +10 or -10 whatever they read.
    block = biflow.FlowBlock(replace(SMALL, clip=clip), flip=False)
    signs = torch.tensor([1.0, 1.0, 1.0, -1.0, 1.0, -1.0, -1.0, -1.0])
    block.proj_out.bias.data = 10 * signs
    alpha, mu = (bound * signs).chunk(2)
    x = torch.randn(1, T, D)
    z, logdet = block(x, torch.tensor([0]))
    close(z, torch.cat([x[:, :1], (x[:, 1:] - mu) * torch.exp(-alpha)], dim=1), 1e-5)
    close(logdet, torch.tensor([-(T - 1) * 2 * bound]), 1e-5)


# ---- flow_inverse ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-8), (torch.float32, 1e-4)])
@pytest.mark.parametrize("changes", [dict(clip=CLIP), dict(clip=None), dict(num_classes=0), dict(patch_size=1)])
def test_flow_inverse_undoes_forward(dtype, tolerance, changes):
    flow, y = make(TARFlow, dtype, **changes), torch.tensor([0, 2, -1])
    x = torch.randn(3, 1, 4, 4, dtype=dtype)
    z = flow(x, y)[0][-1]
    given = z.clone()
    assert (z - patchify(x, flow.config.patch_size)).abs().mean() > 0.1
    assert (flow.inverse(z, y) - x).abs().max() < tolerance
    assert torch.equal(z, given)  # not decoded in place


def probed_parameters(block, x, y, t):
    """(alpha, mu) of token t, (2, N, D), read off the block's map, which is affine in x_t."""
    at_0, at_1 = (block(x.index_fill(1, torch.tensor(t), value), y)[0][:, t] for value in (0.0, 1.0))
    return torch.stack([-torch.log(at_1 - at_0), -at_0 / (at_1 - at_0)])


@torch.no_grad()
@pytest.mark.parametrize("clip", [1.0, CLIP])
@pytest.mark.parametrize("w", [0.0, 1.5])
def test_flow_inverse_agrees_with_guided_decoding_without_a_cache(w, clip):
    # Oracle: token after token, the parameters being probed from the forward map alone. They are clipped before they
    # are guided; the scale grows linearly in the order of reading, from 0 at the first token to w at the last.
    flow = make(TARFlow, torch.float64, clip=clip)
    y, none = torch.tensor([0, 2]), torch.tensor([-1, -1])
    z = state = torch.randn(2, T, D).double()
    for i in reversed(range(B)):
        x = torch.zeros_like(z)
        for place in range(T):
            t = place if i % 2 == 0 else T - 1 - place
            conditional, unconditional = (probed_parameters(flow.blocks[i], x, labels, t) for labels in (y, none))
            alpha, mu = conditional + w * place / (T - 1) * (conditional - unconditional)
            x[:, t] = state[:, t] * alpha.exp() + mu
        state = x
    close(patchify(flow.inverse(z, y, w), 2), state, 1e-10)


@pytest.mark.parametrize("clip", [CLIP, None])
@pytest.mark.parametrize("w", [0.0, 1.5])
@pytest.mark.parametrize("patch_size, tolerance, rounds, error", [(2, 0.0, 3, 1e-10), (1, 1e-4, 14, 1e-3)])
def test_flow_inverse_jacobi_is_the_same_map(patch_size, tolerance, rounds, error, w, clip):
    # Oracle: token by token. T - 1 rounds make it exact; a tolerance saves some.
    flow, y = make(TARFlow, torch.float64, patch_size=patch_size, clip=clip), torch.tensor([0, 2, -1])
    z = patchify(torch.randn(3, 1, 4, 4).double(), patch_size)
    expected = flow.inverse(z, y, w)
    calls = count_calls(block.proj_out for block in flow.blocks)
    close(flow.inverse_jacobi(z, y, w, tolerance), expected, error)
    assert B < len(calls) <= B * rounds


def test_flow_inverse_jacobi_of_the_identity_takes_one_round():
    flow, z = TARFlow(SMALL), torch.randn(2, T, D)
    calls = count_calls(block.proj_out for block in flow.blocks)
    assert torch.equal(flow.inverse_jacobi(z), unpatchify(z, 2))
    assert len(calls) == B


@torch.no_grad()
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("w", [0.0, 1.5])
def test_flow_inverse_has_one_graph_for_all_positions(w, bf16):
    # Oracle: the step that is not compiled.
    torch.compiler.reset()
    counter = CompileCounter()
    block = make(TARFlow, patch_size=1).blocks[1]
    x, y = torch.randn(2, 16, 1), torch.tensor([0, -1])
    with autocast(CPU, bf16):
        expected = block.inverse(x, y, w)
        block.step = torch.compile(block.step, backend=counter, fullgraph=True)
        assert torch.equal(block.inverse(x, y, w), expected)
    assert counter.frame_count == 1


# ---- flow_denoise ----------------------------------------------------------------------------------------------------
@torch.no_grad()
def test_flow_denoise_is_the_posterior_mean_of_a_linear_gaussian_flow():
    # Closed form: z = L x - b makes x~ ~ N(m, S); then E[x | x~] = m + (S - sigma^2) S^-1 (x~ - m).
    flow, sigma = make(TARFlow, torch.float64, clip=None), 0.3
    x = torch.randn(2, 1, 4, 4).double()
    for block in flow.blocks:
        for layer in block.attn_blocks:  # no layer adds anything, so that mu_t is linear in x_{t-1} ...
            for p in (*layer.attention.proj.parameters(), *layer.mlp.main[2].parameters()):
                p.zero_()
        block.proj_out.weight[:D] = 0  # ... and alpha is constant

    def z(x):
        return flow(x.view(1, 1, 4, 4))[0][-1].flatten()

    zero = torch.zeros(16).double()
    with torch.enable_grad():
        L = jacobian(z, zero)
    m, S = torch.linalg.solve(L, -z(zero)), torch.linalg.inv(L.T @ L)
    mean = m + (x.view(2, 16) - m) @ torch.linalg.inv(S) @ (S - sigma**2 * torch.eye(16).double())
    close(flow.denoise(x, None, sigma), mean.view_as(x), 1e-8)


def test_flow_denoise_climbs_log_p():
    # Oracle: central differences of log p along random directions.
    flow, y, step = make(TARFlow, torch.float64), torch.tensor([1]), 1e-5
    x = torch.randn(1, 1, 4, 4).double()
    score = (flow.denoise(x, y, 0.3) - x) / 0.3**2
    for v in torch.randn(5, 1, 1, 4, 4).double():
        difference = (flow.log_prob(x + step * v, y) - flow.log_prob(x - step * v, y)) / (2 * step)
        close((score * v).sum().view(1), difference, 1e-6)


# ---- flow_import -----------------------------------------------------------------------------------------------------
WIDE = Config(4, 3, 2, num_classes=3, width=128, blocks=3, layers=2)  # what can be read off the shapes


def published_checkpoint(config):
    """Random weights as a published checkpoint holds them; published_forward below knows the published names."""
    mask = torch.ones(config.tokens, config.tokens).tril()
    state = make(TARFlow, config=config).state_dict() | {f"blocks.{i}.attn_mask": mask for i in range(B)}
    return state | {"var": torch.ones(config.tokens, config.dim)}


def published_forward(state, x, y, head_dim):
    """The published TARFlow by hand, in float64: z and the log-det in nats, of tokens x."""
    state, logdet = {name: value.double() for name, value in state.items()}, 0

    def linear(name, h):
        return h @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(name, h):
        h = h - h.mean(-1, keepdim=True)
        return h / (h.square().mean(-1, keepdim=True) + 1e-5).sqrt() * state[f"{name}.weight"] + state[f"{name}.bias"]

    for block in (f"blocks.{i}" for i in range(B)):
        order = list(range(x.shape[1]))[:: -1 if block == "blocks.1" else 1]
        x = x[:, order]
        h = linear(f"{block}.proj_in", x) + state[f"{block}.pos_embed"][order]
        if f"{block}.class_embed" in state:
            h = h + state[f"{block}.class_embed"][y]
        for layer in (f"{block}.attn_blocks.{j}" for j in range(2)):
            qkv = linear(f"{layer}.attention.qkv", norm(f"{layer}.attention.norm", h))
            q, k, v = qkv.view(*x.shape[:2], -1, head_dim).chunk(3, dim=2)
            logits = torch.einsum("nthd,nshd->nhts", q, k) / head_dim**0.5
            weights = logits.masked_fill(state[f"{block}.attn_mask"] == 0, -math.inf).softmax(-1)
            h = h + linear(f"{layer}.attention.proj", torch.einsum("nhts,nshd->nthd", weights, v).flatten(2))
            u = linear(f"{layer}.mlp.main.0", norm(f"{layer}.mlp.norm", h))
            h = h + linear(f"{layer}.mlp.main.2", u * 0.5 * (1 + torch.erf(u / 2**0.5)))
        alpha, mu = linear(f"{block}.proj_out", h)[:, :-1].chunk(2, dim=-1)
        x = torch.cat([x[:, :1], (x[:, 1:] - mu) * torch.exp(-alpha)], dim=1)[:, order]
        logdet = logdet - alpha.sum((1, 2))
    return x, logdet


@pytest.mark.parametrize("config, given", [(SMALL, True), (WIDE, False)])
@pytest.mark.parametrize("changes", [dict(), dict(num_classes=0), dict(patch_size=1)])
def test_flow_import_reproduces_the_published_model(changes, config, given):
    config = replace(config, **changes)
    state = published_checkpoint(config)
    flow = TARFlow.from_tarflow(state, config if given else None).double()
    assert flow.config == replace(config, clip=None) and not flow.training and "var" in state
    x, y = torch.randn(3, config.channels, 4, 4).double(), torch.tensor([0, 1, 2])
    tokens = nnf.unfold(x, config.patch_size, stride=config.patch_size).transpose(1, 2)
    z, logdet = published_forward(state, tokens, y, config.head_dim)
    states, flow_logdet = flow(x, y)
    close((states[-1], flow_logdet), (z, logdet), 1e-10)
    close(flow.inverse(z, y), x, 1e-8)


REFUSED = [("var", None), ("var", 2 * torch.ones(T, 12)), ("blocks.1.attn_mask", torch.ones(T, T))]
REFUSED += [("blocks.2.proj_in.bias", None), ("blocks.3.proj_in.bias", torch.zeros(128))]
REFUSED += [("blocks.0.pos_embed", None), ("blocks.0.pos_embed", torch.zeros(T + 1, 128))]


@pytest.mark.parametrize("config", [WIDE, None])
@pytest.mark.parametrize("name, value", REFUSED)
def test_flow_import_refuses(name, value, config):
    state = published_checkpoint(WIDE) | {name: value}
    with pytest.raises(ValueError):
        TARFlow.from_tarflow({name: value for name, value in state.items() if value is not None}, config)


# ---- nll -------------------------------------------------------------------------------------------------------------
def test_nll_is_that_of_the_normal_distribution():
    flow = make(TARFlow, torch.float64)
    x, y = torch.randn(3, 1, 4, 4).double(), torch.tensor([0, 1, -1])
    states, logdet = flow(x, y)
    log_p = torch.distributions.Normal(0, 1).log_prob(states[-1]).sum((1, 2)) + logdet
    close(flow.log_prob(x, y), log_p, 1e-12)
    close(biflow.nll_loss(states[-1], logdet), -log_p.mean() / 16, 1e-12)


# ---- reverse_block ---------------------------------------------------------------------------------------------------
def test_reverse_block_layer_by_hand():
    # RMSNorm, scaled QK-norm, RoPE as a product of complex numbers, softmax attention, SwiGLU and gates, in float64.
    torch.manual_seed(0)
    layer, h = biflow.ReverseLayer(16, 8).double().requires_grad_(False), torch.randn(2, 5, 16).double()
    for p in layer.parameters():
        p += torch.randn_like(p)
    layer.qk_scale *= 2  # logits beyond sqrt(head_dim)
    angles = torch.randn(5, 4).double()

    def rms(x):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def turn(x):
        return torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones_like(angles), angles)

    attended = []
    for head in range(2):
        q, k, v = (rms(h) @ layer.qkv.weight[i * 16 + head * 8 :][:8].T for i in range(3))
        q, k = (turn(rms(x) * layer.qk_scale) for x in (q, k))
        logits = (q[:, :, None] * k[:, None].conj()).real.sum(-1) / 8**0.5
        attended.append(logits.softmax(-1) @ v)
    out = h + layer.attn_gate * (torch.cat(attended, -1) @ layer.proj.weight.T)
    gate, value = (rms(out) @ layer.mlp_in.weight.T).chunk(2, -1)
    out = out + layer.mlp_gate * ((gate / (1 + torch.exp(-gate)) * value) @ layer.mlp_out.weight.T)
    close(layer(h, torch.stack([angles.cos(), angles.sin()])), out, 1e-10)


def test_reverse_block_rope_depends_on_relative_position_only():
    torch.manual_seed(0)
    side, context = 4, 2
    rope = biflow.rope_table(context, side, head_dim=16)
    q, k = (torch.randn(16).expand(context + side**2, 16) for _ in range(2))  # the same content everywhere
    turned = biflow.rotate(q, rope)
    close(turned.norm(dim=1), q.norm(dim=1), 1e-5)
    assert torch.equal(turned[:context], q[:context])  # the context has no place and does not turn
    logits = (turned @ biflow.rotate(k, rope).T)[context:, context:]
    logits = logits.view(side, side, side, side)  # row and column of q, row and column of k
    close(logits[1:, :, 1:], logits[:-1, :, :-1], 1e-5)
    close(logits[:, 1:, :, 1:], logits[:, :-1, :, :-1], 1e-5)
    assert torch.pdist(logits[0, 0].reshape(-1, 1)).min() > 1e-4  # every offset has its own


def test_reverse_block_sees_every_position_and_tells_equal_ones_apart():
    # Oracle: the autograd Jacobian. Equal tokens come out equal only without RoPE and without G's position embedding.
    block, y, w = make(ReverseBlock), torch.tensor([0]), torch.zeros(1)
    J = jacobian(lambda h: block(h, y, w), torch.randn(1, T, 16)).abs().sum((0, 2, 3, 5))
    assert J.shape == (T, T) and (J > 0).all()
    model, z = make(BiFlow), torch.randn(1, 1, D).expand(1, T, D)
    for block in model.blocks:
        block.rope = torch.stack([torch.ones(T + 3, 4), torch.zeros(T + 3, 4)])
    assert torch.pdist(patchify(model.sample(z, y), 2)[0]).min() > 1e-3
    nn.init.zeros_(model.pos_embed)
    assert torch.pdist(patchify(model.sample(z, y), 2)[0]).max() < 1e-5


@torch.no_grad()
def test_reverse_block_knows_each_class_no_class_and_scales_up_to_w_max():
    block, y = make(ReverseBlock), torch.tensor([-1, 0, 1, 2])
    h = torch.randn(1, T, 16).expand(4, T, 16)
    out = block(h, y, torch.zeros(4))
    for row in range(4):  # of the class table
        block.class_embed.weight[row] += 1
        before, out = out, block(h, y, torch.zeros(4))
        assert torch.equal((out != before).any(2).any(1), torch.arange(4) == row)
    out = block(h, torch.ones_like(y), torch.tensor([0.0, 0.5, 2.0, 3.0]))
    assert torch.pdist(out[:3].flatten(1)).min() > 1e-4
    assert torch.equal(out[2], out[3])


# ---- alignment -------------------------------------------------------------------------------------------------------
def inputs():
    """z (4, T, D), y (4,), w (4,): unguided, guided, guided more, and a dropped label, where w must not matter."""
    return torch.randn(4, T, D), torch.tensor([0, 1, 2, -1]), torch.tensor([0.0, 0.5, 2.0, 1.0])


@pytest.mark.parametrize("strategy, denoise", STRATEGIES)
def test_alignment_of_each_strategy(strategy, denoise):
    model = BiFlow(replace(SMALL, strategy=strategy, denoise=denoise))
    x, predictions = model(*inputs())
    aligned = set() if strategy == "naive" else set(range(B)) if denoise == "learned" else set(range(1, B))
    assert x.shape == (4, 1, 4, 4) and predictions.keys() == aligned
    assert all(p.shape == (4, T, D) for p in predictions.values())
    assert not any(out.any() for out in (x, *predictions.values()))  # new heads say nothing


@pytest.mark.parametrize("part", ["layers.0.mlp_gate", "class_embed.weight", "guidance_embed.2.bias"])
@pytest.mark.parametrize("strategy", ["align", "hidden"])
def test_alignment_of_block_j_is_with_state_B_minus_1_minus_j(strategy, part):
    # Changing block j, be it its class table or its guidance MLP, moves the predictions of that state and of those
    # closer to the image, and x', and no other.
    model, conditions = make(BiFlow, strategy=strategy), inputs()
    x, before = model(*conditions)
    for j in range(B + 1):
        model.blocks[j].get_parameter(part).data += torch.randn(16)
        x_after, after = model(*conditions)
        assert {i for i in before if not torch.equal(before[i], after[i])} == {i for i in range(B) if i <= B - 1 - j}
        assert not torch.equal(x, x_after)
        x, before = x_after, after


# ---- guidance --------------------------------------------------------------------------------------------------------
def by_hand(model, z, step):
    """x' and the predictions of G, whose block j makes step(block, h, 1 if it is aligned else 0) of h."""
    h, predictions = model.proj_in(z), {}
    for j, block in enumerate(model.blocks):
        h = step(block, h, float(j < B))
        if j < len(model.heads):
            norm = h.square().mean(-1, keepdim=True).add(1e-6).sqrt()
            prediction = h / norm @ model.heads[j][1].weight.T + model.heads[j][1].bias
            h = model.lifts[j](prediction) if model.config.strategy == "hidden" else h
            predictions[B - 1 - j] = prediction
    return unpatchify(model.out(h), 2), predictions


@pytest.mark.parametrize("strategy, denoise", STRATEGIES)
def test_guidance_by_hand(strategy, denoise):
    # Oracle: the formulas of training, where the none-branch gets no gradient, and of sampling in one pass and in two.
    model, (z, y, w) = make(BiFlow, strategy=strategy, denoise=denoise), inputs()
    none, zero, w_used = torch.full((4,), -1), torch.zeros(4), torch.tensor([0.0, 0.5, 2.0, 0.0])

    def training(block, h, aligned):
        w_i = aligned * w_used.view(4, 1, 1)
        return (block(h, y, w_used) + w_i * block(h, none, zero).detach()) / (1 + w_i)

    def two_passes(block, h, aligned):
        w_i = aligned * w_used.view(4, 1, 1)
        return (1 + w_i) * block(h, y, zero) - w_i * block(h, none, zero)

    close(model.sample(z, y, w), by_hand(model, z, lambda block, h, _: block(h, y, w_used))[0], 1e-5)
    close(model.sample_two_pass(z, y, w), by_hand(model, z, two_passes)[0], 1e-4)
    outputs = [model(z, y, w), by_hand(model, z, training)]
    close(*outputs, 1e-5)
    losses = [x.square().sum() + sum(p.sin().sum() for p in predictions.values()) for x, predictions in outputs]
    gradients = [torch.autograd.grad(loss, list(model.parameters())) for loss in losses]
    for gradient, expected in zip(*gradients):
        close(gradient, expected, 1e-4 * expected.abs().max().item())


def test_guidance_needs_a_class_and_may_be_a_float():
    model, (z, y, _) = make(BiFlow), inputs()
    unconditional = make(BiFlow, num_classes=0)
    for method in (BiFlow.sample, BiFlow.sample_two_pass, lambda *args: BiFlow.forward(*args)[0]):
        assert torch.equal(method(model, z, torch.full((4,), -1), 2.0), method(model, z, None, 0.0))
        assert torch.equal(method(model, z, y, 0.5), method(model, z, y, torch.full((4,), 0.5)))
        close(method(model, z, y, 0.0), model.sample(z, y), 1e-5)  # unguided, all three are the same
        assert torch.equal(method(unconditional, z, y, 2.0), method(unconditional, z, None, 0.0))


@pytest.mark.parametrize("w_max", [0.0, 2.0])
@pytest.mark.parametrize("strategy, denoise", STRATEGIES)
def test_guidance_takes_a_second_call_of_aligned_blocks_and_only_in_training(strategy, denoise, w_max):
    # Every call has the whole batch, so that shapes do not depend on w.
    model = make(BiFlow, strategy=strategy, denoise=denoise, w_max=w_max)
    calls = count_calls(model.blocks)
    model.sample(*inputs())
    assert calls == [(j, 4) for j in range(B + (denoise == "learned"))]
    calls.clear()
    model(*inputs())
    assert calls == [(j, 4) for j in range(len(model.blocks)) for _ in range(2 if w_max and j < B else 1)]


def test_guidance_in_one_pass_equals_two_where_it_has_been_learned():
    # Toy blocks that obey training-time guidance exactly: G_j(h | y, w) = (1 + w) G_j(h | y) - w G_j(h | none).
    model, (z, y, w) = make(BiFlow), inputs()

    def toy_block(h, y, w, j):
        y, w = y.view(-1, 1, 1), w.view(-1, 1, 1) * (j < B)
        return (1 + w) * torch.sin((1 + j) * h + 0.3 * y) - w * torch.sin((1 + j) * h - 0.3)

    del model.blocks
    model.blocks = [functools.partial(toy_block, j=j) for j in range(B + 1)]
    close(model.sample(z, y, w), model.sample_two_pass(z, y, w), 1e-4)
    close(model(z, y, w)[0], model.sample(z, y, 0.0), 1e-4)  # what is supervised is the unguided output, at any w
    assert (model.sample(z, y, w) - model.sample(z, y, 0.0))[1:3].abs().mean() > 0.1


# ---- reverse_loss ----------------------------------------------------------------------------------------------------
def test_reverse_loss_is_zero_where_all_is_right_and_blind_to_the_states_scale():
    x, states = torch.randn(2, 1, 4, 4), [(i + 1) * torch.randn(2, T, D) for i in range(B + 1)]
    perfect = {i: states[i] / states[i].square().mean((1, 2), keepdim=True).sqrt() for i in range(B)}
    assert reverse_loss(x, perfect, x, states)[0] < 1e-6
    assert reverse_loss(x, dict(enumerate(states)), x, states, trajectory_norm=False)[0] == 0
    predictions = {i: torch.randn(2, T, D) for i in range(B)}
    rescaled = [state * torch.tensor([7.0, 0.1]).view(2, 1, 1) for state in states]
    for norm in (True, False):
        a, b = (reverse_loss(x, predictions, x, s, trajectory_norm=norm)[0] for s in (states, rescaled))
        assert (abs(a - b) < 1e-5) == norm


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("p", [1.0, 0.0])
def test_reverse_loss_by_hand(p, norm):
    # Constant differences: x' is off by 0.5, prediction 0 by 0.1 and prediction 2 by 0.2, in each of the 16 numbers.
    x, states = torch.ones(2, 1, 4, 4), [torch.full((2, T, D), i + 2.0) for i in range(B + 1)]
    value = {0: 1.0, 2: 1.0} if norm else {0: 2.0, 2: 4.0}
    predictions = {0: torch.full((2, T, D), value[0] - 0.1), 2: torch.full((2, T, D), value[2] + 0.2)}
    loss, errors = reverse_loss(x + 0.5, predictions, x, states, p, norm)
    distances = {"x": 16 * 0.25, "x0": 16 * 0.01, "x2": 16 * 0.04}
    close(loss, torch.tensor(sum(d / (d + 0.01) ** p for d in distances.values())), 1e-5)
    relative = {"x": 0.25, "x0": 0.01 / value[0] ** 2, "x2": 0.04 / value[2] ** 2}
    close(errors, {name: torch.full((2,), error) for name, error in relative.items()}, 1e-4)


@pytest.mark.parametrize("p", [0.5, 1.0])
def test_reverse_loss_weighs_each_image_by_itself_and_without_gradient(p):
    # Closed form: d/dx' of mean_n sg((D_n + c)^-p) D_n is (D_n + c)^-p 2 (x' - x) / N.
    x = torch.randn(3, 1, 4, 4)
    x_prime = (x + torch.tensor([0.1, 1.0, 3.0]).view(3, 1, 1, 1) * torch.randn_like(x)).requires_grad_()
    (gradient,) = torch.autograd.grad(reverse_loss(x_prime, {}, x, [], p)[0], x_prime)
    distance = (x_prime - x).square().sum((1, 2, 3), keepdim=True)
    close(gradient, ((distance + 0.01) ** -p * 2 * (x_prime - x) / 3).detach(), 1e-5)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("strategy, denoise", STRATEGIES)
def test_reverse_loss_reaches_every_parameter_of_G_and_none_of_F(strategy, denoise, bf16):
    # From the second step on, since the heads start at zero.
    flow, model = make(TARFlow), BiFlow(replace(SMALL, strategy=strategy, denoise=denoise))
    x, (_, y, w) = torch.randn(4, 1, 4, 4), inputs()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.step()
        optimizer.zero_grad()
        with autocast(CPU, bf16):
            with torch.no_grad():
                states, _ = flow(x, y)
            loss, _ = reverse_loss(*model(states[-1], y, w), x, states)
        loss.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), name
    assert all(block.class_embed.weight.grad.any(dim=1).all() for block in model.blocks)  # every class, and "no class"
    assert all(p.grad is None for p in flow.parameters())


# ---- perceptual ------------------------------------------------------------------------------------------------------
def ramps(size):
    """(1, 2, size, size): the first channel is x, the second is y, in [0, 1] at the pixels' centres."""
    centres = (torch.arange(size) + 0.5) / size
    return torch.stack([centres.expand(size, size), centres[:, None].expand(size, size)])[None]


@pytest.mark.parametrize("bf16", [False, True])
def test_perceptual_crop_is_the_box_that_its_numbers_say(bf16):
    # Closed form: ramps stay ramps. Two crops, two boxes; ratio = width / height = (4/3)^(2 u_1 - 1).
    u = torch.tensor([[0.0, 1.0, 0.25, 0.75], [0.2, 0.0, 0.5, 0.6]])
    with autocast(CPU, bf16):
        crops = biflow.random_resized_crop(ramps(64).expand(2, -1, -1, -1), u, 16)
    for crop, area, ratio, left, top in zip(crops, (0.08, 0.264), (4 / 3, 3 / 4), (0.25, 0.5), (0.75, 0.6)):
        w, h = math.sqrt(area * ratio), math.sqrt(area / ratio)
        corner = torch.tensor([left * (1 - w), top * (1 - h)]).view(2, 1, 1)
        close(crop, corner + torch.tensor([w, h]).view(2, 1, 1) * ramps(16)[0], 1e-5)


def test_perceptual_crop_of_the_whole_image_is_a_bilinear_resize():
    x = torch.randn(2, 3, 32, 32)
    u = torch.tensor([[1.0, 0.5, 0.3, 0.9]]).expand(2, 4)  # area 1, ratio 1; there is no room to move
    resized = nnf.interpolate(x, (48, 48), mode="bilinear", align_corners=False)
    close(biflow.random_resized_crop(x, u, 48), resized, 1e-5)


class FakeLPIPS(nn.Linear):
    def forward(self, a, b):
        return self.weight * (a - b).square().mean((1, 2, 3), keepdim=True)


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def fake_distances(decode, p=1.0):
    """Both kinds of distance with small networks; the features are the channels' means."""
    net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3, bias=False))
    nn.init.eye_(net[2].weight)
    nets = {"lpips": FakeLPIPS(1, 1), "convnext": biflow.FeatureDistance(net, MEAN, STD)}
    nn.init.constant_(nets["lpips"].weight, 3.0)
    return biflow.PerceptualDistance(decode, nets, {"lpips": 0.4, "convnext": 0.1}, p, size=24)


@pytest.mark.parametrize("p", [1.0, 0.0])
def test_perceptual_distance_by_hand(p):
    # Constant grey images, which no crop changes, from a decoder in bf16: x' is decoded to 0.5 and 0.25, x to 0.125.
    x_prime = torch.tensor([4.0, 2.0]).view(2, 1, 1, 1).expand(2, 1, 8, 8)
    loss, raw = fake_distances(lambda x: x.bfloat16() / 8, p)(x_prime, torch.ones(2, 1, 8, 8), torch.rand(2, 4))
    lpips = [3 * d**2 for d in (0.375, 0.125)]
    convnext = [sum((d / 2 / std) ** 2 for std in STD) for d in (0.375, 0.125)]
    close(raw, {"lpips": torch.tensor(lpips), "convnext": torch.tensor(convnext)}, 1e-4)
    lpips, convnext = (sum(d / (d + 0.01) ** p for d in distances) / 2 for distances in (lpips, convnext))
    close(loss, torch.tensor(0.4 * lpips + 0.1 * convnext), 1e-4)


def test_perceptual_distance_is_zero_for_equal_images_and_moves_x_prime_alone():
    torch.manual_seed(0)
    decoded = []
    distance = fake_distances(lambda x: decoded.append(x) or x.sin())
    seen = []
    distance.nets["convnext"].net.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    x, u = torch.rand(2, 3, 16, 16) * 2 - 1, torch.rand(2, 4)
    loss, raw = distance(x, x, u)
    assert loss == 0 and not any(d.any() for d in raw.values())
    x_prime = (-x).requires_grad_()
    distance(x_prime, x, u)[0].backward()
    assert (x_prime.grad.flatten(1).abs().sum(1) > 0).all()
    assert len(decoded) == 2 + 3  # once more in the backward pass: the decoder's activations are not kept
    assert not any(p.requires_grad or p.grad is not None for p in distance.parameters())
    assert not any(network.training for network in distance.nets.modules())
    # What the ConvNeXt saw is the shared crop, brought from [-1, 1] to [0, 1] and normalised as torchvision does.
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    for images, features_of in zip((x_prime, x), seen[-2:]):
        close(features_of, ((biflow.random_resized_crop(images.sin(), u, 24) + 1) / 2 - mean) / std, 1e-5)


# ---- precision, and what else it takes to run the networks -----------------------------------------------------------
@torch.no_grad()
def all_outputs(flow, model, bf16):
    """What F and G make of four images or their noise, in every way; a list of tensors."""
    z, y, w = inputs()
    z = z * 0 + torch.linspace(-2, 2, z.numel()).view_as(z)
    with autocast(CPU, bf16):
        states, logdet = flow(unpatchify(z, 2), y)
        x, predictions = model(z, y, w)
        out = [*states, logdet, flow.inverse(z, y), flow.inverse(z, y, 1.0), flow.inverse_jacobi(z, y, 1.0, 0.0)]
        return [*out, x, *predictions.values(), model.sample(z, y, w), model.sample_two_pass(z, y, w)]


def test_precision_of_what_enters_a_loss_is_float32_under_bf16():
    # bf16 keeps 8 bits, an error of up to 0.4% in each product; in the end we allow 3% of the largest value.
    flow, model = make(TARFlow), make(BiFlow)
    for a, b in zip(all_outputs(flow, model, bf16=True), all_outputs(flow, model, bf16=False)):
        assert a.dtype == torch.float32
        assert (a - b).abs().max() < 0.03 * b.abs().max()
    assert not torch.equal(a, b)  # autocast was on


@pytest.mark.parametrize("bf16, compiled", [(True, False), (False, True)])
def test_precision_of_frozen_networks(bf16, compiled):
    # Weights stored in bf16 change nothing, against autocast; nor does compilation, up to rounding.
    if compiled and not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("torch.compile needs a C++ compiler")
    torch.compiler.reset()
    flow, model = (make(cls, blocks=2, layers=1) for cls in (TARFlow, BiFlow))
    expected = all_outputs(flow, model, bf16)
    names = [flow.state_dict().keys(), model.state_dict().keys()]
    for network in (flow, model):
        biflow.freeze(network, CPU, bf16, compiled)
        assert not network.training and not any(p.requires_grad for p in network.parameters())
    assert flow.blocks[0].proj_in.weight.dtype == (torch.bfloat16 if bf16 else torch.float32)
    assert flow.blocks[0].proj_out.weight.dtype == torch.float32
    assert [flow.state_dict().keys(), model.state_dict().keys()] == names
    close(all_outputs(flow, model, bf16), expected, 1e-4 if compiled else 0)


NETWORKS = [(TARFlow, {}), *((BiFlow, dict(strategy=strategy, denoise=denoise)) for strategy, denoise in STRATEGIES)]


@pytest.mark.parametrize("cls, changes", NETWORKS)
def test_precision_hooks_see_every_linear_and_one_graph_serves_all_labels_and_scales(cls, changes):
    # LoRA and quantisers need the layers to be called as modules; shapes must not depend on values.
    model, (z, y, w) = make(cls, **changes), inputs()
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    calls = count_calls(linears)
    model(*((unpatchify(z, 2), y) if cls is TARFlow else (z, y, w)))
    assert {i for i, _ in calls} == set(range(len(linears)))
    torch.compiler.reset()
    counter = CompileCounter()
    compiled = torch.compile(make(cls, **changes), backend=counter, fullgraph=True)
    for y, w in ((y, w), (torch.full((4,), -1), w), (y, torch.zeros(4)), (torch.zeros_like(y), 2 * torch.ones(4))):
        compiled(*((unpatchify(z, 2), y) if cls is TARFlow else (z, y, w)))
    assert counter.frame_count == 1


# ---- saving ----------------------------------------------------------------------------------------------------------
@pytest.fixture
def saved(tmp_path, monkeypatch):
    """A saved flow's folder, on a machine where asking the network is an error."""
    monkeypatch.setattr("biflow.snapshot_download", lambda *args, **kwargs: pytest.fail("asked the network"))
    monkeypatch.chdir(tmp_path)
    make(TARFlow).save_pretrained(tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("cls, changes", [(TARFlow, dict(clip=None)), (BiFlow, dict(strategy="hidden", w_max=1.0))])
def test_saving_brings_a_model_back_bit_for_bit(cls, changes, tmp_path):
    model = make(cls, **changes)
    model.save_pretrained(tmp_path)
    loaded = cls.from_pretrained(tmp_path)
    assert loaded.config == model.config and not loaded.training
    assert json.loads((tmp_path / "config.json").read_text()) == asdict(model.config)
    close(loaded.state_dict(), model.state_dict(), 0)
    modes = [(tmp_path / name).stat().st_mode for name in ("config.json", "model.safetensors")]
    assert modes[0] == modes[1]  # what the umask allows


def test_saving_elsewhere_is_said_without_asking_the_network(saved, monkeypatch):
    for name in (saved / "nothing", str(saved / "nothing"), "nothing", "./nothing", "run/nothing"):
        with pytest.raises(FileNotFoundError, match="nothing"):
            TARFlow.from_pretrained(name)
    monkeypatch.setattr(
        "biflow.snapshot_download", lambda name, revision: {"user/name v1": saved}[f"{name} {revision}"]
    )
    assert TARFlow.from_pretrained("user/name", revision="v1").config == SMALL  # a name on the Hub, in contrast
    (saved / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model.safetensors"):
        TARFlow.from_pretrained(saved)


UNFIT = [(dict(depth=3), TypeError), (dict(width=24), RuntimeError), (dict(blocks=2), RuntimeError)]


@pytest.mark.parametrize("change, error", [*UNFIT, (dict(blocks=4), RuntimeError), (dict(clip=0), ValueError)])
def test_saving_refuses_a_config_that_is_unknown_or_does_not_fit_the_weights(saved, change, error):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(error):
        TARFlow.from_pretrained(saved)


def test_saving_refuses_damaged_files_and_another_kind_of_model(saved):
    with pytest.raises(RuntimeError, match="Missing key"):
        BiFlow.from_pretrained(saved)
    weights = (saved / "model.safetensors").read_bytes()
    for damaged in (b"", weights[:100], weights[:-1]):
        (saved / "model.safetensors").write_bytes(damaged)
        with pytest.raises(SafetensorError):
            TARFlow.from_pretrained(saved)


# ======================================================================================================================
# The scripts. `toy` is a folder in which all of them have run; tests that change a run copy it

FOLDER = Path(biflow.__file__).parent
SCRIPTS = {"train_forward": train_forward, "train_reverse": train_reverse, "sample": sample, "fid": fid}
TINY = "--steps 4 --batch-size 4 --save-every 2 --log-every 1"


class Killed(BaseException):
    """In place of SIGKILL: nothing in the scripts catches it."""


def run(script, line):
    script.main(line.split())


def refusal(capsys, script, line):
    """The one line with which a script refuses a command line; the exit status is 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        run(script, line)
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    (line,) = [line for line in re.split("[\r\n]", error) if line.startswith("error: ") or " error: " in line]
    return line.partition("error: ")[2]


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


def draw_images(folder, n, side=20):
    folder.mkdir(parents=True)
    rng = np.random.default_rng(n)
    for i in range(n):
        Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(folder / f"{i:02d}.png")


def arguments(line):
    return train_forward.parse_args(train_forward.shared_flags(""), train_forward.PRESETS, line.split())


def load_sampler(folder):
    return Sampler.load(folder, CPU, SimpleNamespace(bf16=False, compile=False))


def torchrun(n, script, line):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n), str(script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *line.split()], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """A folder in which every script has run with no arguments but those that shorten it; what each said is a .txt."""
    folder = tmp_path_factory.mktemp("toy")
    short = "--steps 30 --batch-size 32 --save-every 10 --log-every 5"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, line in dict(train_forward=short, train_reverse=short, sample="", fid="--n 100 --draws 2").items():
            with open(f"{name}.txt", "w") as said, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                run(SCRIPTS[name], line)
    return folder


@pytest.fixture
def runs(toy, tmp_path):
    """A copy of the toy runs, to be changed."""
    return shutil.copytree(toy / "runs", tmp_path / "runs")


@pytest.fixture(params=["forward", "reverse"])
def stage(request, toy):
    """A training script, and the arguments that it needs."""
    if request.param == "forward":
        return train_forward, ""
    return train_reverse, f"--forward {toy / 'runs/forward-toy'}"


def at_step(patch, n, action):
    """Have something happen in step n, counted from 0, before its update."""
    original = train_forward.learning_rate

    def learning_rate(step, args):
        if step == n:
            action()
        return original(step, args)

    patch.setattr("train_forward.learning_rate", learning_rate)


def kill():
    raise Killed


# ---- train -----------------------------------------------------------------------------------------------------------
def test_train_every_script_runs_without_arguments(toy):
    expected = {"config.json", "run.json", "model.safetensors", "metrics.jsonl", "real.pt", "curves.png"}
    expected |= {"checkpoint.pt", "checkpoint.prev.pt", "samples-0000030.png"}
    for name in ("forward-toy", "reverse-toy"):
        assert expected <= {path.name for path in (toy / "runs" / name).iterdir()}
    assert (toy / "runs/reverse-toy/samples.png").stat().st_size > 1000


def test_train_lowers_the_nll_and_every_unweighted_error_and_the_bar_shows_it(toy):
    nll = [line["val_nll"] for line in metrics(toy / "runs/forward-toy") if "val_nll" in line]
    assert nll[0] > nll[1] > nll[2]
    errors = [line for line in metrics(toy / "runs/reverse-toy") if "val_error_x" in line]
    for name in ("x", "x0", "x1", "x2", "x3"):
        assert errors[-1][f"val_error_{name}"] < errors[0][f"val_error_{name}"]
    shown = [float(value) for value in re.findall(r"error_x ([\d.]+), ", (toy / "train_reverse.txt").read_text())]
    assert len(shown) >= 6 and shown[-1] < 0.5 * shown[0]
    assert "loss " in (toy / "train_forward.txt").read_text()


def test_train_a_seed_decides_the_weights_and_workers_do_not(tmp_path):
    for name, extra in dict(a="", b="--num-workers 1", c="--seed 1").items():
        run(train_forward, f"{TINY} {extra} --out {tmp_path / name}")
    assert weights(tmp_path / "a") == weights(tmp_path / "b") != weights(tmp_path / "c")


def test_train_micro_batches_add_up_to_the_batch(tmp_path, stage):
    script, extra = stage
    for name, micro in dict(whole=16, parts=5).items():
        run(script, f"{TINY} {extra} --batch-size 16 --micro-batch {micro} --out {tmp_path / name}")
    for whole, parts in zip(metrics(tmp_path / "whole"), metrics(tmp_path / "parts"), strict=True):
        whole.pop("images_per_s", None), parts.pop("images_per_s", None)
        assert parts == pytest.approx(whole, rel=1e-4)  # losses, norms and errors of 5 + 5 + 5 + 1 and of 16


def test_train_a_batch_is_the_same_for_any_number_of_processes():
    data = load_digits()
    for step in (0, 70):  # 70 * 22 > 1345: the second epoch has begun
        whole = Batches(data, 22, 3)[step]
        for world in (2, 3):
            parts = [Batches(data, 22, 3, rank, world)[step] for rank in range(world)]
            for one, joined in zip(whole, map(np.concatenate, zip(*parts))):
                assert np.array_equal(one, joined)
        for one, joined in zip(to_device(whole, CPU), map(torch.cat, zip(*to_device(whole, CPU).split(5)))):
            assert torch.equal(one, joined)


def test_train_an_epoch_sees_every_sample_once_and_no_held_out_one():
    data = load_digits()
    assert len(data.fit) == 1345 and len({*data.fit, *data.val, *data.test}) == 1797
    numbered = dataclasses.replace(data, labels=np.arange(1797), augment="none")
    batches = Batches(numbered, 269, seed=0)  # five are an epoch
    first, second = (np.concatenate([batches[step].y for step in range(i, i + 5)]) for i in (0, 5))
    assert sorted(first) == sorted(second) == data.fit.tolist()
    assert not np.array_equal(first, second)


def test_train_random_numbers_are_uniform_and_independent():
    batch = Batches(load_digits(), 4000, seed=0)[0]
    u = np.column_stack([batch.drop, batch.guidance, batch.crop])
    assert u.min() >= 0 and u.max() <= 1
    assert abs(u.mean(0) - 0.5).max() < 0.03
    assert abs(np.corrcoef(u, rowvar=False) - np.eye(7)).max() < 0.07
    assert abs(batch.eps.std() - 1) < 0.01


def test_train_needs_no_shared_memory(tmp_path):
    draw_images(tmp_path / "images", 2)
    item = Photos(list_images(tmp_path / "images")[0], 8)[0]
    assert not any(isinstance(x, torch.Tensor) for x in [*item, *Batches(load_digits(), 4, 0)[0]])  # else: /dev/shm


@pytest.mark.parametrize("kind", ["cpu", "mps", "cuda"])
def test_train_copies_without_waiting_on_cuda_alone(monkeypatch, kind):
    copies = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *args, non_blocking=False: copies.append(non_blocking) or self)
    to_device(Batches(load_digits(), 4, 0)[0], torch.device(kind))
    assert copies == [kind == "cuda"] * 6


def test_train_an_interrupted_run_ends_with_the_same_weights(tmp_path, stage, monkeypatch):
    script, extra = stage
    command = f"--steps 8 --batch-size 8 --save-every 3 --log-every 2 {extra} --out {tmp_path}"
    run(script, f"{command}/whole")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        at_step(patch, 5, kill)
        run(script, f"{command}/parts")
    run(script, f"{command}/parts --save-every 4")  # an argument that does not alter the model
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")
    losses = [[(m["step"], m["loss"]) for m in metrics(tmp_path / name) if "loss" in m] for name in ("parts", "whole")]
    assert [step for step, _ in losses[0]] == [2, 4, 6, 8]
    assert losses[0][-1] == losses[1][-1]


def test_train_goes_on_from_any_moment_of_a_save(tmp_path, monkeypatch):
    run(train_forward, f"{TINY} --out {tmp_path / 'whole'}")
    for moment in itertools.count(1):
        command, moments = f"{TINY} --out {tmp_path / str(moment)}", itertools.count(1)

        def dying(function, *args):
            if next(moments) == moment:
                raise Killed
            return function(*args)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", lambda *args, replace=os.replace: dying(replace, *args))
            patch.setattr(TARFlow, "save_pretrained", lambda *args, save=TARFlow.save_pretrained: dying(save, *args))
            try:
                run(train_forward, command)
                break
            except Killed:
                pass
        run(train_forward, command)
        assert weights(tmp_path / str(moment)) == weights(tmp_path / "whole"), moment
        assert json.loads((tmp_path / str(moment) / "run.json").read_text())["step"] == 4, moment
    assert moment > 8


def test_train_a_full_disk_is_one_line_and_leaves_the_last_checkpoint_whole(tmp_path, monkeypatch, capsys):
    run(train_forward, f"{TINY} --out {tmp_path / 'whole'}")
    save, command = torch.save, f"{TINY} --out {tmp_path / 'parts'}"

    def full(content, file):
        if isinstance(content, dict) and content.get("step") == 4:
            file.write(b"half of it")
            raise OSError(28, "No space left on device")
        save(content, file)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        assert "No space left" in refusal(capsys, train_forward, command)
    assert torch.load(tmp_path / "parts/checkpoint.pt")["step"] == 2
    run(train_forward, command)
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_train_a_run_survives_sigkill_at_random_moments(tmp_path, kills):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train_forward", "sklearn.datasets", "matplotlib.figure"])
    line = "--steps 12 --batch-size 4 --save-every 1 --warmup 2"

    def start(name):
        process = context.Process(target=train_forward.main, args=(f"{line} --out {tmp_path / name}".split(),))
        process.start()
        return process

    start("whole").join()
    rng, killed = np.random.default_rng(0), 0
    for name in map(str, itertools.count()):
        patience, finished = 2.0, False
        while not finished:
            process = start(name)
            process.join(rng.uniform(0.2, 1) * patience)
            patience *= 1.2  # on a slow machine, too, the run gets to its end
            killed += process.is_alive()
            process.kill()
            process.join()
            finished = process.exitcode == 0
            assert finished or process.exitcode == -signal.SIGKILL, "a run could not go on"
        assert weights(tmp_path / name) == weights(tmp_path / "whole")
        if killed >= kills:
            break


def test_train_a_damaged_checkpoint_falls_back_to_the_one_before(runs, tmp_path, capsys):
    again = f"--steps 30 --batch-size 32 --out {runs / 'forward-toy'}"
    whole, checkpoint = weights(runs / "forward-toy"), runs / "forward-toy/checkpoint.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    run(train_forward, again)
    said = capsys.readouterr().out
    assert "checkpoint.pt is damaged" in said and "going on from step 20 of 30" in said
    assert weights(runs / "forward-toy") == whole
    for path in (checkpoint, checkpoint.with_name("checkpoint.prev.pt")):
        path.write_bytes(b"")
    assert "no checkpoint that loads" in refusal(capsys, train_forward, again)
    assert weights(runs / "forward-toy") == whole


def test_train_unpickles_nothing(tmp_path, capsys):
    class Payload:
        def __reduce__(self):
            return (Path(tmp_path / "ran").touch, ())

    (tmp_path / "run").mkdir()
    torch.save({"model": Payload()}, tmp_path / "run/checkpoint.pt")
    assert "no checkpoint that loads" in refusal(capsys, train_forward, f"{TINY} --out {tmp_path / 'run'}")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("number, workers", [(signal.SIGTERM, 0), (signal.SIGINT, 0), (signal.SIGTERM, 2)])
def test_train_a_signal_finishes_the_step_saves_and_ends_in_one_line(tmp_path, monkeypatch, capsys, number, workers):
    # Also where, as a scheduler does it, the processes of the data loader get the signal.
    def send():
        ids = [child.pid for child in multiprocessing.active_children()] + [os.getpid()]
        assert len(ids) == 1 + workers
        subprocess.run(["kill", f"-{int(number)}", *map(str, ids)], check=True)
        time.sleep(0.5 if workers else 0)

    command = f"{TINY} --log-every 4 --num-workers {workers} --out {tmp_path}"
    run(train_forward, f"{command}/whole")
    with monkeypatch.context() as patch:
        at_step(patch, 0, send)
        run(train_forward, f"{command}/parts")
    assert "stopped at step 1; the same command goes on" in capsys.readouterr().out.splitlines()[-1]
    assert torch.load(tmp_path / "parts/checkpoint.pt")["step"] == 1
    run(train_forward, f"{command}/parts")
    assert weights(tmp_path / "whole") == weights(tmp_path / "parts")


def test_train_two_runs_in_one_folder_are_refused_and_ctrl_c_ends_the_first(tmp_path, capsys):
    line = f"--steps 100000 --batch-size 4 --log-every 1 --out {tmp_path / 'run'}"
    command = [sys.executable, str(FOLDER / "train_forward.py"), *line.split()]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while first.poll() is None and not ((tmp_path / "run/metrics.jsonl").exists() and metrics(tmp_path / "run")):
        time.sleep(0.1)
    assert "another" in refusal(capsys, train_forward, line)
    first.send_signal(signal.SIGINT)
    said, _ = first.communicate(timeout=60)
    assert first.returncode == 0 and "Traceback" not in said
    assert said.count("stopped at step") == 1
    steps = [line["step"] for line in metrics(tmp_path / "run")]
    assert steps == list(range(1, torch.load(tmp_path / "run/checkpoint.pt")["step"] + 1))


def test_train_runs_in_a_thread(tmp_path):
    thread = threading.Thread(target=run, args=(train_forward, f"{TINY} --out {tmp_path / 'run'}"))
    thread.start()
    thread.join()
    assert weights(tmp_path / "run")


def test_train_fresh_renames_the_old_run(tmp_path):
    for extra in ("", "--fresh --seed 5", "--fresh"):
        run(train_forward, f"--steps 1 --batch-size 4 {extra} --out {tmp_path / 'run'}")
    assert {path.name for path in tmp_path.iterdir()} == {"run", "run.old-1", "run.old-2"}
    assert weights(tmp_path / "run") == weights(tmp_path / "run.old-1") != weights(tmp_path / "run.old-2")


def test_train_goes_on_in_another_folder_for_more_steps(toy, tmp_path, capsys):
    old = toy / "runs/forward-toy"
    before = {path.name: path.read_bytes() for path in old.iterdir()}
    extra = f"--resume {old / 'checkpoint.pt'} --out {tmp_path / 'new'}"
    run(train_forward, f"--steps 32 --batch-size 32 --log-every 1 {extra}")
    assert "going on from step 30 of 32" in (said := capsys.readouterr().out) and "steps: 30 there, 32 now" in said
    assert [line["step"] for line in metrics(tmp_path / "new")] == [31, 32, 32]
    assert before == {path.name: path.read_bytes() for path in old.iterdir()}


def test_train_skips_a_step_with_a_non_finite_gradient_and_ends_after_five(tmp_path, monkeypatch, capsys):
    calls = []

    def loss_that_is_nan_in(steps):
        calls.clear()
        loss = biflow.nll_loss
        monkeypatch.setattr(
            "train_forward.nll_loss",
            lambda *args: calls.append(0) or loss(*args) * (math.nan if len(calls) in steps else 1),
        )

    loss_that_is_nan_in({4})
    run(train_forward, f"--steps 4 --batch-size 4 --save-every 1 --log-every 1 --out {tmp_path / 'a'}")
    before, after = (torch.load(tmp_path / "a" / name) for name in ("checkpoint.prev.pt", "checkpoint.pt"))
    torch.testing.assert_close(after["model"], before["model"], rtol=0, atol=0)
    torch.testing.assert_close(after["optimizer"]["state"], before["optimizer"]["state"], rtol=0, atol=0)
    assert (before["step"], before["skipped"], after["step"], after["skipped"]) == (3, 0, 4, 1)
    loss_that_is_nan_in({2, 3, 4, 5, 7})  # four in a row do not end a run
    run(train_forward, f"--steps 8 --batch-size 4 --log-every 1 --out {tmp_path / 'b'}")
    logged = [(line["step"], line["skipped"]) for line in metrics(tmp_path / "b") if "loss" in line]
    assert logged == [(1, 0), (6, 4), (8, 5)]
    loss_that_is_nan_in(range(3, 99))
    line = f"--steps 20 --batch-size 4 --save-every 2 --out {tmp_path / 'c'}"
    assert "step 7: five gradients in a row" in refusal(capsys, train_forward, line)
    assert all(value.isfinite().all() for value in TARFlow.from_pretrained(tmp_path / "c").state_dict().values())


def test_train_drops_the_labels_of_F_in_stage_1_and_of_G_alone_in_stage_2(toy, tmp_path, monkeypatch):
    seen = {TARFlow: [], BiFlow: []}
    for cls, calls in seen.items():

        def forward(self, x, y, *w, cls=cls, calls=calls, original=cls.forward):
            calls.append((y, *w)) if torch.is_grad_enabled() or cls is TARFlow else None  # without validation's
            return original(self, x, y, *w)

        monkeypatch.setattr(cls, "forward", forward)
    line = f"--steps 1 --batch-size 200 --forward {toy / 'runs/forward-toy'} --out {tmp_path}"
    run(train_reverse, f"{line}/all --label-drop 1")
    (y, w), true = seen[BiFlow].pop(), seen[TARFlow][0][0]
    assert (true >= 0).all() and len(true.unique()) == 10
    assert (y == -1).all() and (w == 0).all()
    run(train_reverse, f"{line}/none --label-drop 0 --w-max 3")
    y, w = seen[BiFlow].pop()
    assert torch.equal(y, true)
    assert 0.35 < (w == 0).float().mean() < 0.65 and 2 < w.max() <= 3 and w.min() == 0
    run(train_reverse, f"{line}/some --label-drop 0.5 --w-max 3")
    y, w = seen[BiFlow].pop()
    assert 0.35 < (y == -1).float().mean() < 0.65 and torch.equal(y[y >= 0], true[y >= 0])
    assert (w[y == -1] == 0).all() and w.max() > 0
    seen[TARFlow].clear()
    run(train_forward, f"--steps 1 --batch-size 200 --label-drop 1 --out {tmp_path}/f")
    assert (seen[TARFlow][0][0] == -1).all()


def loss_functions():
    """(module, function of a batch) for each stage, with toy networks."""
    args = SimpleNamespace(sigma=0.1, label_drop=0.1, bf16=False, denoise="learned", w_max=1.0, adaptive_p=1.0)
    args.trajectory_norm = True
    flow, model = TARFlow(SIZES["toy"]), BiFlow(SIZES["toy"])
    yield flow, lambda batch: train_forward.forward_loss(flow, batch, args)
    yield model, lambda batch: train_reverse.stage_2_loss(model, batch, flow, None, args)


@pytest.mark.parametrize("index", [0, 1], ids=["forward", "reverse"])
def test_train_losses_have_one_graph_that_waits_for_no_value(index):
    torch.compiler.reset()
    _, loss = list(loss_functions())[index]
    counter = CompileCounter()
    compiled = torch.compile(loss, backend=counter, fullgraph=True)
    for step in range(3):
        batch = to_device(Batches(load_digits(), 4, 0)[step], CPU)
        torch.testing.assert_close(compiled(batch), loss(batch))
    assert counter.frame_count == 1


def test_train_two_processes_train_as_one_does(tmp_path, stage):
    # An uneven batch on two gloo processes: the same losses, the same average.
    script, extra = stage
    line = f"--steps 6 --batch-size 15 --micro-batch 6 --log-every 1 --lr 1e-3 --warmup 2 {extra} --out {tmp_path}"
    run(script, f"{line}/one")
    torchrun(2, script.__file__, f"{line}/two")
    one, two = ([m["loss"] for m in metrics(tmp_path / name) if "loss" in m] for name in ("one", "two"))
    np.testing.assert_allclose(two, one, rtol=1e-5, atol=1e-5)
    one, two = (sample.load_run(tmp_path / name)[0].state_dict() for name in ("one", "two"))
    torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_train_a_run_goes_on_with_another_number_of_processes(tmp_path, monkeypatch):
    line = f"--steps 8 --batch-size 15 --log-every 1 --save-every 4 --out {tmp_path}"
    run(train_forward, f"{line}/one")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        at_step(patch, 5, kill)
        run(train_forward, f"{line}/both")
    train_forward.run_locks.clear()  # a process that is killed gives back its lock
    torchrun(2, train_forward.__file__, f"{line}/both")
    one, both = ([m["loss"] for m in metrics(tmp_path / name) if "loss" in m] for name in ("one", "both"))
    np.testing.assert_allclose(both, one, atol=1e-5)


def test_train_weight_decay_shrinks_matrices_but_neither_vectors_nor_embeddings(tmp_path):
    for decay in ("0", "1"):
        line = f"--steps 1 --warmup 0 --lr 0.01 --ema 0 --batch-size 8 --weight-decay {decay} --out {tmp_path / decay}"
        run(train_forward, line)
    a, b = (sample.load_run(tmp_path / decay)[0].state_dict() for decay in ("0", "1"))
    for name in a:
        decayed = a[name].ndim == 2 and "embed" not in name and "proj_out" not in name  # proj_out starts at zero
        assert torch.equal(a[name], b[name]) != decayed


def test_train_benchmark_needs_no_data_and_leaves_nothing(tmp_path, stage, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(SIZES, "B", dataclasses.replace(SMALL, channels=4))
    run(stage[0], "--size B --benchmark --batch-size 6 --micro-batch 4 --num-workers 0 --no-compile")
    said = capsys.readouterr().out
    assert "images/s" in said and "ms a step" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_train_five_hundred_steps_do_not_grow_memory(tmp_path, monkeypatch):
    resident = []
    for step in range(500):
        at_step(monkeypatch, step, lambda: resident.append(int(Path("/proc/self/statm").read_text().split()[1])))
    run(train_forward, f"--steps 500 --batch-size 4 --log-every 1000 --save-every 1000 --out {tmp_path / 'run'}")
    growth = (max(resident[400:]) - max(resident[50:150])) * os.sysconf("SC_PAGE_SIZE") / 2**20
    assert growth < 10  # MiB


def test_train_reverse_warns_of_an_unfinished_flow_and_refuses_to_go_on_with_another(
    runs, tmp_path, monkeypatch, capsys
):
    with monkeypatch.context() as patch:
        at_step(patch, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
        run(train_forward, f"{TINY} --out {tmp_path / 'unfinished'}")
    run(train_reverse, f"{TINY} --forward {tmp_path / 'unfinished'} --out {tmp_path / 'a'}")
    assert "unfinished is not finished: step 2 of 4" in capsys.readouterr().out
    run(train_reverse, f"{TINY} --forward {runs / 'forward-toy'} --out {tmp_path / 'b'}")
    assert "warning" not in capsys.readouterr().out
    command = f"{TINY} --steps 6 --forward {tmp_path / 'unfinished'} --out {tmp_path / 'b'}"
    assert "flow: " in refusal(capsys, train_reverse, command)


@pytest.mark.parametrize("num_classes", [0, 2])
def test_train_the_inverse_of_a_published_flow_by_the_readme(num_classes, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    published = TARFlow(Config(64, 3, 16, num_classes, width=64, blocks=2, layers=1, clip=None))
    for block in published.blocks:
        nn.init.normal_(block.proj_out.weight, std=0.01)
    torch.save(published.state_dict() | {"var": torch.ones(16, 768)}, "imagenet64.pth")
    text = (FOLDER / "README.md").read_text()
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "from_tarflow" in block]
    exec(code.replace("IMAGENET/train", str(photos)))
    run(train_reverse, "--size S --forward runs/tarflow --out runs/G --steps 2 --batch-size 2")
    run(sample, "runs/tarflow --n 2")
    run(sample, "runs/G --n 2")
    assert (tmp_path / "runs/G/samples.png").exists()
    sampler, z = load_sampler("runs/G"), torch.randn(2, 16, 768)
    y = torch.tensor([0, 1])
    close(sampler("exact", z, y), published.inverse(z, y), 1e-6)
    assert torch.equal(sampler("biflow", z, y), sampler("biflow", z, 1 - y)) == (num_classes == 0)


# ---- data ------------------------------------------------------------------------------------------------------------
def write_idx(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes())


@pytest.fixture
def small_sets(tmp_path, monkeypatch):
    """40 training and 20 test images of MNIST, Fashion-MNIST and CIFAR-10, as their files have them; and no network."""
    pytest.importorskip("torchvision")
    monkeypatch.setattr("urllib.request.urlopen", lambda *args, **kwargs: (_ for _ in ()).throw(OSError("no network")))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5=None: os.path.exists(path))
    rng, root = np.random.default_rng(0), tmp_path / "data"
    grey, colour = rng.integers(0, 256, (60, 28, 28), np.uint8), rng.integers(0, 256, (60, 3072), np.uint8)
    labels = np.arange(60, dtype=np.uint8) % 10
    for part, rows in dict(train=slice(40), t10k=slice(40, 60)).items():
        for name in ("MNIST", "FashionMNIST"):
            write_idx(root / name / f"raw/{part}-images-idx3-ubyte", grey[rows])
            write_idx(root / name / f"raw/{part}-labels-idx1-ubyte", labels[rows])
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    (root / "cifar-10-batches-py").mkdir()
    for name, rows in zip(names, [*(slice(8 * i, 8 * i + 8) for i in range(5)), slice(40, 60)]):
        batch = {"data": colour[rows], "labels": labels[rows].tolist()}
        (root / "cifar-10-batches-py" / name).write_bytes(pickle.dumps(batch))
    classes = [f"class{i}" for i in range(10)]
    (root / "cifar-10-batches-py/batches.meta").write_bytes(pickle.dumps({"label_names": classes}))
    return SimpleNamespace(root=root, grey=grey[:, None], colour=colour.reshape(60, 3, 32, 32), labels=labels)


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar10"])
def test_data_of_torchvision_are_those_of_its_files(small_sets, name):
    data = load_torchvision(name, small_sets.root)
    assert np.array_equal(data.array, small_sets.colour if name == "cifar10" else small_sets.grey)
    assert np.array_equal(data.labels, small_sets.labels)
    assert len(data.info["classes"]) == 10 and (name != "mnist" or data.info["classes"] == list("0123456789"))
    assert data.test.tolist() == list(range(40, 60))
    assert sorted([*data.fit, *data.val]) == list(range(40)) and len(data.val) == 4
    assert data.augment == {"mnist": "jitter", "fashion-mnist": "none", "cifar10": "mirror"}[name]


def test_data_of_torchvision_train_and_what_is_wrong_is_one_line(small_sets, tmp_path, capsys):
    command = f"{TINY} --data mnist --out {tmp_path / 'run'}"
    run(train_forward, command)
    config = TARFlow.from_pretrained(tmp_path / "run").config
    assert (config.tokens, config.dim, config.num_classes) == (49, 16, 10)
    images = small_sets.root / "MNIST/raw/train-images-idx3-ubyte"
    images.write_bytes(images.read_bytes()[:1000])
    assert f"MNIST into {small_sets.root}" in refusal(capsys, train_forward, command)
    for name in ("mnist", "cifar10"):
        line = refusal(capsys, train_forward, f"{TINY} --data {name} --out {tmp_path / 'empty/run'}")
        assert f"into {tmp_path / 'empty/data'}" in line


def test_data_jitter_is_the_affine_map_that_its_numbers_say():
    # Against a smooth image whose values are known at every point, on a grid of pixel centres in [-1, 1]^2.
    def blob(x, y):
        return torch.exp(-12 * ((x - 0.1) ** 2 + 2 * (y + 0.1) ** 2)) - 1

    y, x = torch.meshgrid(*[(torch.arange(128) + 0.5) / 64 - 1] * 2, indexing="ij")
    u = torch.cat([torch.full((1, 6), 0.5), torch.rand(20, 6, generator=torch.Generator().manual_seed(0))])
    a, b, s, c, d, t = ((2 * u - 1) * torch.tensor([0.05, 0.05, 0.03, 0.05, 0.05, 0.03])).T[..., None, None]
    expected = blob(x + a * x + b * y + s, y + c * x + d * y + t)
    close(jitter(blob(x, y).expand(21, 1, -1, -1), u)[:, 0], expected, 5e-3)


def test_data_are_jittered_in_training_and_themselves_in_validation():
    data = load_digits()
    batches = Batches(data, 8, seed=0)
    for x, source in zip(batches[0].x, batches.order(0)):
        assert 0.01 < abs(x - data.array[source]).mean() < 0.2 and abs(x).max() <= 1
    batch = next(iter(validation_batches(data, CPU)))
    assert np.array_equal(batch.x[:100], data.array[data.val[:100]])


def test_data_mirror_half_of_the_photographs_in_training_and_none_in_validation(photos, tmp_path):
    data = load_data(arguments(f"--data {photos} --img-size 8 --out {tmp_path / 'run'}"), CPU)
    numbered = dataclasses.replace(data, labels=np.arange(40))
    batch, mirrored = Batches(numbered, 400, seed=0)[0], 0
    for x, i in zip(batch.x, batch.y):
        whole = data.array[i] / np.float32(127.5) - 1
        assert np.array_equal(x, whole) or np.array_equal(x, whole[:, :, ::-1])
        mirrored += not np.array_equal(x, whole)
    assert 150 < mirrored < 250
    batch = next(iter(validation_batches(numbered, CPU)))
    assert np.array_equal(batch.x, data.array[batch.y] / np.float32(127.5) - 1)


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    for c in range(2):
        draw_images(root / f"class{c}", 20, 60 + 20 * c)
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


def test_data_folder_is_scanned_for_images_and_classes(tmp_path, capsys):
    root = tmp_path / "photos"
    for name in ("cat", "dog", "dog/puppies", ".ipynb_checkpoints", "__MACOSX/cat"):
        draw_images(root / name, 2)
    draw_images(tmp_path / "elsewhere", 1)
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "dog/gone.png").symlink_to(tmp_path / "nowhere.png")
    for name in ("a.tif", "b.tif", "notes", ".DS_Store"):
        (root / "cat" / name).touch()
    files, labels, classes = list_images(root)
    assert classes == ["cat", "dog", "linked"] and labels == [0, 0, 1, 1, 1, 1, 2]
    assert [str(path.relative_to(root)) for path in files[:3]] == ["cat/00.png", "cat/01.png", "dog/00.png"]
    said = capsys.readouterr().out
    assert "'.tif': 2" in said and "notes" in said and "gone.png" in said and "DS_Store" not in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("name", [".", "class0"])
def test_data_without_classes_or_with_one_are_unconditional(tmp_path, name):
    draw_images(tmp_path / "photos" / name, 6) if name != "." else draw_images(tmp_path / "photos", 6)
    forward, reverse = tmp_path / "runs/f", tmp_path / "runs/r"
    run(train_forward, f"{TINY} --data {tmp_path / 'photos'} --img-size 8 --out {forward}")
    assert TARFlow.from_pretrained(forward).config.num_classes == 0
    run(train_reverse, f"{TINY} --forward {forward} --out {reverse}")
    run(sample, f"{reverse} --n 2 --npz {tmp_path / 'a.npz'}")
    assert np.load(tmp_path / "a.npz")["arr_1"].tolist() == [-1, -1]


def test_data_classes_may_have_one_image_and_are_drawn_by_name(tmp_path, capsys):
    for i in range(12):
        draw_images(tmp_path / f"photos/{i}", 1 + i % 2)
    run(train_forward, f"{TINY} --data {tmp_path / 'photos'} --img-size 8 --out {tmp_path / 'run'}")
    run(sample, f"{tmp_path / 'run'} --method exact --n 3 --classes 2,11 --npz {tmp_path / 'a.npz'}")
    classes = json.loads((tmp_path / "run/run.json").read_text())["classes"]
    assert classes != sorted(classes, key=int)  # as text: 0, 1, 10, 11, 2
    assert [classes[label] for label in np.load(tmp_path / "a.npz")["arr_1"]] == ["2", "11", "2"]
    assert "no class '12'" in refusal(capsys, sample, f"{tmp_path / 'run'} --classes 12")


def test_data_damaged_images_are_listed_and_left_out(photos, tmp_path, capsys):
    copy = shutil.copytree(photos, tmp_path / "photos")
    damaged = [copy / "class0/03.png", copy / "class1/19.png"]
    damaged[0].write_bytes(damaged[0].read_bytes()[:500])
    damaged[1].write_bytes(b"")
    data = load_data(arguments(f"--data {copy} --img-size 8 --out {tmp_path / 'run'}"), CPU)
    assert "2 images cannot be read" in capsys.readouterr().out
    listed = (Path(data.info["cache"]) / "damaged.txt").read_text().splitlines()
    assert listed == [str(path) for path in damaged]
    assert sorted([*data.fit, *data.val]) == [i for i in range(40) if i not in (3, 39)]


def test_data_cache_holds_the_images_and_changes_with_them(photos, tmp_path):
    copy = shutil.copytree(photos, tmp_path / "photos")
    line = f"--data {copy} --img-size 16 --out {tmp_path / 'run'}"
    data, files = load_data(arguments(f"{line} --num-workers 2"), CPU), sorted(copy.rglob("*.png"))
    assert all(np.array_equal(row, read_image(path, 16)) for row, path in zip(data.array, files, strict=True))
    assert data.labels.tolist() == [0] * 20 + [1] * 20 and data.info["classes"] == ["class0", "class1"]
    assert not set(data.fit) & set(data.val)
    again = load_data(arguments(f"--data {copy}/../photos/ --img-size 16 --out {tmp_path / 'other'}"), CPU)
    assert again.info == data.info
    pixels = Image.open(files[5]).copy()
    pixels.paste("red", (0, 0, *pixels.size))
    pixels.save(files[5])
    edited = load_data(arguments(line), CPU)
    assert edited.info["cache"] != data.info["cache"] and (edited.array[5, 0] == 255).all()
    files[7].unlink()
    assert len(load_data(arguments(line), CPU).labels) == 39


def test_data_killed_build_goes_on_without_reading_again(photos, vae, tmp_path, monkeypatch):
    line = f"--data {photos} --img-size 16 --vae {vae} --out {tmp_path}"
    read, count = read_image, []

    def dying(path, size):
        count.append(path)
        if len(count) == 35:  # in the second batch of 32
            raise Killed
        return read(path, size)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("data.read_image", dying)
        load_data(arguments(f"{line}/a/run"), CPU)
    count.clear()
    monkeypatch.setattr("data.read_image", lambda path, size: count.append(path) or read(path, size))
    again = load_data(arguments(f"{line}/a/run"), CPU)
    assert len(count) == 8
    whole = load_data(arguments(f"{line}/b/run"), CPU)
    assert np.array_equal(again.array, whole.array) and again.info["std"] == whole.info["std"]


def test_data_that_do_not_fit_the_disk_or_the_patches_are_refused_before_the_work(
    photos, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("data.read_image", lambda *args: pytest.fail("read an image"))
    line = f"{TINY} --data {photos} --out {tmp_path / 'run'}"
    assert "divide" in refusal(capsys, train_forward, f"{line} --img-size 15")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=40 * 3 * 16 * 16 - 1))
    assert "disk" in refusal(capsys, train_forward, f"{line} --img-size 16")
    assert not list(tmp_path.glob("cache*/data.npy"))


@pytest.mark.slow
def test_data_cache_of_two_processes_is_that_of_one(photos, vae, tmp_path):
    line = f"--data {photos} --img-size 32 --vae {vae} --out {tmp_path}"
    one = load_data(arguments(f"{line}/one/run"), CPU)
    torchrun(2, train_forward.__file__, f"{line}/two/run {TINY}")
    two = sample.load_run(tmp_path / "two/run")[1]
    torch.testing.assert_close(np.load(Path(two["cache"]) / "data.npy"), one.array[:], rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(two["std"], one.info["std"], rtol=1e-4)


def test_data_of_a_vae_are_its_posterior_normalised(photos, vae, tmp_path):
    # Against diffusers used directly, for both mirror images; decode inverts the normalisation.
    from diffusers import AutoencoderKL

    data = load_data(arguments(f"--data {photos} --img-size 64 --vae {vae} --out {tmp_path / 'run'}"), CPU)
    net = AutoencoderKL.from_pretrained(vae).eval()
    files = sorted(photos.rglob("*.png"))
    images = torch.stack([torch.tensor(read_image(path, 64)) for path in files]) / 127.5 - 1
    with torch.no_grad():
        posteriors = [net.encode(x).latent_dist for x in (images, images.flip(3))]
    for mirror, posterior in enumerate(posteriors):
        stored = torch.from_numpy(data.array[:, mirror].astype(np.float32))
        close(stored[:, 0], posterior.mean, 2e-3)
        close(stored[:, 1], posterior.logvar, 2e-3)
    rng = np.random.default_rng(0)
    drawn = np.stack(
        [data.prepare(data.array[i], mirror, rng) for _ in range(30) for i in range(40) for mirror in (0, 1)]
    )
    np.testing.assert_allclose(drawn.mean((0, 2, 3)), 0, atol=0.03)
    np.testing.assert_allclose(drawn.std((0, 2, 3)), 1, atol=0.03)
    ours = VAE(vae, CPU, data.info["mean"], data.info["std"])
    with torch.no_grad():
        close(ours.decode((posteriors[0].mean - ours.mean) / ours.std), net.decode(posteriors[0].mean).sample, 1e-4)


def test_data_cache_moves_with_the_runs_and_stage_2_takes_the_flows_statistics(photos, vae, tmp_path):
    line = f"{TINY} --data {photos} --img-size 32 --vae {vae} --out {tmp_path / 'here/f'}"
    run(train_forward, line)
    shutil.move(tmp_path / "here", tmp_path / "there")
    forward = json.loads((tmp_path / "there/f/run.json").read_text())
    assert (forward["vae"], forward["sigma"]) == (vae, 0.3)
    forward["mean"] = np.add(forward["mean"], 0.5).tolist()
    (tmp_path / "there/f/run.json").write_text(json.dumps(forward))
    run(train_reverse, f"{TINY} --forward {tmp_path / 'there/f'} --out {tmp_path / 'there/r'}")
    reverse = json.loads((tmp_path / "there/r/run.json").read_text())
    assert (reverse["vae"], reverse["sigma"], reverse["mean"]) == (vae, 0.3, forward["mean"])
    assert Path(reverse["cache"]).parent == tmp_path / "there"


def test_data_images_of_every_kind_are_read(tmp_path):
    rgb = Image.new("RGB", (40, 30), (250, 10, 20))
    sideways = Image.new("RGB", (30, 40), "black")
    sideways.paste("white", (0, 0, 30, 20))  # the upper half; orientation 6 turns it to the right
    exif = sideways.getexif()
    exif[0x0112] = 6
    frames = [Image.new("RGB", (40, 40), colour) for colour in ("red", "blue")]
    rgb.save(tmp_path / "rgb.png")
    rgb.convert("CMYK").save(tmp_path / "cmyk.jpg")
    rgb.convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "palette.png")
    rgb.convert("L").save(tmp_path / "grey.png")
    sideways.save(tmp_path / "exif.jpg", exif=exif, quality=95)
    Image.new("RGBA", (40, 40), (250, 10, 20, 0)).save(tmp_path / "clear.png")
    Image.fromarray(np.full((40, 40), 40_000, np.uint16)).save(tmp_path / "grey16.png")
    frames[0].save(tmp_path / "animated.webp", save_all=True, append_images=frames[1:], lossless=True)
    read = {path.stem: read_image(path, 16) for path in tmp_path.iterdir()}
    assert all(x.shape == (3, 16, 16) and x.dtype == np.uint8 for x in read.values())
    for name in ("rgb", "palette", "cmyk"):
        assert abs(read[name].mean((1, 2)) - [250, 10, 20]).max() < 12
    assert (read["clear"] == 255).all() and abs(read["grey16"].astype(int) - 156).max() <= 1
    assert read["animated"].mean((1, 2)).tolist() == [255, 0, 0] and (read["grey"] == read["grey"][0, 0, 0]).all()
    assert read["exif"][:, :, 10:].min() > 240 and read["exif"][:, :, :6].max() < 15  # white on the right


def test_data_centre_crop_is_adms():
    # ADM's three steps by hand on 100 x 70 -> 16: BOX halving twice, BICUBIC to (24, 16), the middle 16 columns.
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 100, 3), dtype=np.uint8))
    small = image.resize((50, 35), Image.BOX).resize((25, 17), Image.BOX).resize((24, 16), Image.BICUBIC)
    assert np.array_equal(center_crop(image, 16), np.asarray(small)[:, 4:20].transpose(2, 0, 1))
    assert center_crop(image.resize((5, 9)), 16).shape == (3, 16, 16)  # small images grow


# ---- sample ----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="session")
def sampler(toy):
    return load_sampler(toy / "runs/reverse-toy")


@pytest.mark.parametrize("method", sample.METHODS)
def test_sample_depends_on_seed_class_and_index_alone(sampler, method):
    y = torch.arange(6)
    whole = sampler.images(method, range(6), y, 0.5)
    close(sampler.images(method, [4, 2], y[[4, 2]], 0.5), whole[[4, 2]], 1e-3)
    assert not torch.allclose(sampler.images(method, range(6), y, 0.5, seed=1), whole)
    assert not torch.allclose(sampler.images(method, range(6), y + 1, 0.5), whole)


def test_sample_draws_by_the_method_that_it_names(sampler):
    z, y = sample_noise(0, range(3), sampler.config), torch.tensor([3, 1, 7])
    flow, reverse, sigma = sampler.flow, sampler.reverse, sampler.run["sigma"]
    assert sigma == 0.1 and abs(sample_noise(0, range(500), sampler.config).std() - 1) < 0.02
    assert torch.equal(sampler("biflow", z, y, 0.5), reverse.sample(z, y, 0.5))
    assert torch.equal(sampler("biflow-2nfe", z, y, 0.5), reverse.sample_two_pass(z, y, 0.5))
    assert torch.equal(sampler("biflow+score", z, y), flow.denoise(reverse.sample(z, y), y, sigma))
    assert torch.equal(sampler("exact", z, y, 2.0), flow.inverse(z, y, 2.0))
    assert torch.equal(sampler("exact+score", z, y), flow.denoise(flow.inverse(z, y), y, sigma))
    close(sampler("jacobi", z, y), flow.inverse(z, y), 1e-2)


def test_sample_writes_what_it_says(toy, tmp_path, sampler, capsys):
    line = f"{toy / 'runs/reverse-toy'} --n 7 --batch 4 --classes 3,8 --method biflow --guidance 0 0.5 --seed 2"
    run(sample, f"{line} --out {tmp_path / 'a.png'} --npz {tmp_path / 'a.npz'}")
    assert f"wrote {tmp_path / 'a.png'}" in capsys.readouterr().out
    with np.load(tmp_path / "a.npz") as file:
        images, labels = file["arr_0"], file["arr_1"]
    assert labels.tolist() == [3, 8, 3, 8, 3, 8, 3]
    expected = to_uint8(sampler.images("biflow", range(7), torch.from_numpy(labels), 0.5, seed=2)).permute(0, 2, 3, 1)
    assert images.dtype == np.uint8 and abs(images.astype(int) - expected.numpy().astype(int)).max() <= 1
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.height == 3 * 42  # real, w = 0, w = 0.5: cells of 40 and a gap


def test_sample_needs_two_files_and_the_reverse_run(toy, tmp_path, capsys):
    for name in ("biflow.py", "sample.py"):
        shutil.copy(FOLDER / name, tmp_path)
    shutil.copytree(toy / "runs/reverse-toy", tmp_path / "G")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "sample.py", "G", "--n", "3", "--out", "grid.png"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "grid.png") as picture:
        assert len(picture.convert("L").getcolors()) > 10  # something was drawn
    for line in ("--method exact", f"--edit {tmp_path / 'grid.png'}", "--trajectory"):
        assert "flow" in refusal(capsys, sample, f"{tmp_path / 'G'} {line}")


def test_sample_finds_a_flow_that_was_renamed_and_warns_of_one_that_changed(runs, sampler, capsys):
    z, y = sample_noise(0, range(2), sampler.config), torch.tensor([1, 2])
    (runs / "forward-toy").rename(runs / "F")
    assert torch.equal(load_sampler(runs / "reverse-toy")("exact", z, y), sampler("exact", z, y))
    (runs / "F").rename(runs / "forward-toy")
    load_sampler(runs / "reverse-toy")
    assert "warning" not in capsys.readouterr().out
    run(train_forward, f"{TINY} --fresh --seed 5 --out {runs / 'forward-toy'}")
    retrained = load_sampler(runs / "reverse-toy")
    assert "forward-toy is not the flow" in capsys.readouterr().out
    assert torch.equal(retrained("exact", z, y), sampler("exact", z, y))  # --fresh left the right one beside it


@pytest.fixture
def digit(tmp_path):
    """A held-out 5 as the model sees it, (1, 1, 8, 8), the image file, and a mask of two tokens."""
    data = load_digits()
    x = torch.from_numpy(data.array[data.test[data.labels[data.test] == 5][:1]])
    pixels = to_uint8(x)[0, 0].numpy()
    Image.fromarray(pixels).save(tmp_path / "five.png")
    mask = np.zeros((8, 8), np.uint8)
    mask[0, 0] = mask[7, 2] = 255  # a pixel of token 0 (top left), one of token 13 (bottom row, second)
    Image.fromarray(mask).save(tmp_path / "mask.png")
    return SimpleNamespace(x=torch.from_numpy(pixels)[None, None] / 127.5 - 1, folder=tmp_path, mask=mask > 0)


def edit(sampler, digit, line):
    return sample.edit(sampler, sample.parse(f"x --edit {digit.folder / 'five.png'} --n 3 --seed 4 {line}".split()))


def test_sample_edit_keeps_the_noise_and_changes_the_class(sampler, digit):
    rows = edit(sampler, digit, "--from 5 --to 3 --method biflow --guidance 1")
    z = sampler.encode(digit.x.expand(3, -1, -1, -1), torch.tensor([5] * 3), 4)[-1]
    assert list(rows) == ["input", "as 5", "as 3"]
    close(rows["input"], digit.x, 1e-6)
    for label in (5, 3):
        close(rows[f"as {label}"], sampler.reverse.sample(z, torch.tensor([label] * 3), 1.0), 1e-5)
    # The exact inverse gives back what it was given: the image with the noise of training.
    noisy = edit(sampler, digit, "--from 5 --method exact")["as 5"] - digit.x
    assert noisy.std() == pytest.approx(0.1, rel=0.2) and not torch.allclose(noisy[0], noisy[1])


def test_sample_edit_redraws_the_tokens_under_the_mask(sampler, digit, monkeypatch):
    seen = []
    monkeypatch.setattr(Sampler, "__call__", lambda self, method, z, y, w: seen.append(z) or digit.x)
    masked = edit(sampler, digit, f"--mask {digit.folder / 'mask.png'} --from 5")["masked"][0, 0]
    assert (masked[digit.mask] == 1).all() and torch.allclose(masked[~digit.mask], digit.x[0, 0][~digit.mask])
    z = sampler.encode(digit.x, torch.tensor([5]), 4)[-1]
    fresh, known = sample_noise(4, range(3), sampler.config), [t for t in range(16) if t not in (0, 13)]
    assert torch.equal(seen[0][:, [0, 13]], fresh[:, [0, 13]])
    close(seen[0][:, known], z[:, known].expand(3, -1, -1), 1e-5)


def test_sample_trajectory_shows_every_state_and_its_prediction(sampler, digit):
    y = torch.tensor([5])
    rows = sample.trajectory(sampler, digit.x, y, 0)
    names = ["x", "flow: x^0", "flow: x^1", "flow: x^2", "flow: x^3", "z"]
    assert list(rows) == names + ["reverse: x^3", "reverse: x^2", "reverse: x^1", "reverse: x^0", "x' = G(z)"]
    z = sampler.encode(digit.x, y, 0)[-1]
    close(rows["z"], 0.4 * unpatchify(z / z.square().mean((1, 2), keepdim=True).sqrt(), 2), 1e-5)
    close(rows["x' = G(z)"], sampler.reverse.sample(z, y), 1e-5)


@pytest.mark.parametrize("line", ["--edit five.png --from 5 --to 3", "--edit five.png --mask mask.png", "--trajectory"])
def test_sample_edits_and_pictures_from_the_command_line(toy, digit, line, monkeypatch):
    monkeypatch.chdir(digit.folder)
    run(sample, f"{toy / 'runs/reverse-toy'} --n 2 --out picture.png {line}")
    with Image.open("picture.png") as picture:
        assert len(picture.convert("L").getcolors()) > 10


# ---- fid -------------------------------------------------------------------------------------------------------------
def gaussian(rng, d):
    a = rng.standard_normal((d, d))
    return rng.standard_normal(d), a @ a.T + 0.1 * np.eye(d)


def test_fid_frechet_distance_of_two_gaussians():
    # Closed form for commuting covariances; scipy's matrix square root for any.
    rng = np.random.default_rng(0)
    a, b = rng.uniform(0.1, 2, 5), rng.uniform(0.1, 2, 5)
    expected = 5 * 0.25 + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert abs(fid.frechet_distance(np.zeros(5), np.diag(a), np.full(5, 0.5), np.diag(b)) - expected) < 1e-12
    (m1, s1), (m2, s2) = gaussian(rng, 6), gaussian(rng, 6)
    expected = ((m1 - m2) ** 2).sum() + np.trace(s1 + s2 - 2 * scipy.linalg.sqrtm(s1 @ s2).real)
    assert abs(fid.frechet_distance(m1, s1, m2, s2) - expected) < 1e-8 * expected
    singular = np.outer(m1, m1)  # fewer images than features
    assert 0 <= fid.frechet_distance(m1, singular, m1, singular) < 1e-6


def test_fid_inception_score_has_its_bounds():
    certain = np.repeat(np.eye(10) * 1e3, 100, axis=0)
    assert abs(fid.inception_score(certain, splits=1) - 10) < 1e-6
    assert abs(fid.inception_score(np.zeros((1000, 10))) - 1) < 1e-12


def test_fid_and_is_equal_torch_fidelitys_on_the_same_features():
    metric_fid = pytest.importorskip("torch_fidelity.metric_fid")
    from torch_fidelity.metric_isc import isc_features_to_metric

    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((307, 64)) @ rng.standard_normal((64, 64)) + i for i in (0, 1))
    stats = [metric_fid.fid_features_to_statistics(torch.from_numpy(x)) for x in (a, b)]
    expected = metric_fid.fid_statistics_to_metric(*stats, verbose=False)["frechet_inception_distance"]
    assert fid.frechet_distance(*fid.moments(a), *fid.moments(b)) == pytest.approx(expected, rel=1e-6)
    expected = isc_features_to_metric(torch.from_numpy(a))["inception_score_mean"]
    assert fid.inception_score(a) == pytest.approx(expected, rel=1e-6)


def test_fid_precision_recall_and_coverage_by_brute_force():
    rng = np.random.default_rng(0)
    real, fake = rng.standard_normal((40, 2)), 0.5 * rng.standard_normal((30, 2))

    def balls(centres):
        return [(c, sorted(np.linalg.norm(centres - c, axis=1))[3]) for c in centres]  # [0] is the centre itself

    def share(points, centres):
        return np.mean([any(np.linalg.norm(p - c) <= radius for c, radius in balls(centres)) for p in points])

    metrics = fid.precision_recall_coverage(real, fake)
    assert metrics["precision"] == pytest.approx(share(fake, real)) and metrics["recall"] < metrics["precision"]
    assert metrics["recall"] == pytest.approx(share(real, fake))
    held = [any(np.linalg.norm(f - c) <= radius for f in fake) for c, radius in balls(real)]
    assert metrics["coverage"] == pytest.approx(np.mean(held))


def test_fid_outliers_raise_recall_but_not_coverage():
    rng = np.random.default_rng(0)
    real, fake = rng.standard_normal((2, 3000, 4))
    assert abs(fid.precision_recall_coverage(real, fake)["coverage"] - 7 / 8) < 0.03  # 1 - 2^-k: equal distributions
    collapsed = 0.1 * fake  # all fakes in the middle ...
    outliers = np.where(np.arange(3000)[:, None] < 10, 10 * fake, collapsed)  # ... but for a few far away
    before, after = (fid.precision_recall_coverage(real, points) for points in (collapsed, outliers))
    assert before["recall"] < 0.1 and after["recall"] > 0.9
    assert after["coverage"] - before["coverage"] < 0.02


def table_rows(said):
    return {line[:17].strip(): line.split() for line in said.splitlines() if line}


def test_fid_table_of_small_images_fits_100_columns(toy):
    said = (toy / "fid.txt").read_text()
    rows = table_rows(said)
    assert max(map(len, said.splitlines()[:9])) <= 100
    assert "-0.000" not in said and "nan" not in said
    assert {"real: test", "real: training", "exact", "exact+score", "biflow"} <= set(rows)
    assert float(rows["real: test"][2]) == 0 and float(rows["real: training"][2]) < float(rows["biflow"][1])


def test_fid_table_joins_runs_that_differ_by_their_seed(runs, capsys):
    for seed in (0, 1):
        run(train_reverse, f"{TINY} --forward {runs / 'forward-toy'} --seed {seed} --out {runs / f'a-{seed}'}")
    line = "--method biflow --n 50 --draws 2"
    found = []
    for names in ("a-0", "a-1", "a-0 a-1"):
        capsys.readouterr()
        run(fid, " ".join(str(runs / name) for name in names.split()) + f" {line}")
        lines = [text.split() for text in capsys.readouterr().out.splitlines()]
        start = next(i for i, words in enumerate(lines) if "biflow" in words)
        found.append(
            [[float(x) for x in words[-8 - 2 * (k == 0) :][:8]] for k, words in enumerate(lines[start : start + 2])]
        )
    (a, _), (b, _), (mean, spread) = np.array(found)
    np.testing.assert_allclose(mean, (a + b) / 2, atol=2e-3)
    np.testing.assert_allclose(spread, abs(a - b) / math.sqrt(2), atol=2e-3)


def load_projections(weights, device):
    """In place of Inception: 2048 random projections of the pixels, the first ten of them also as logits."""

    def net(images):
        projection = torch.randn(images[0].numel(), 2048, generator=torch.Generator().manual_seed(0))
        features = images.flatten(1).float() @ projection / 1000
        return features, features[:, :10]

    return net


@pytest.fixture
def fakes(tmp_path, monkeypatch):
    """Twelve images of 6 x 6 pixels as a folder and as an .npz, whose FID is measured with random projections."""
    monkeypatch.setattr("fid.load_inception", load_projections)
    images = np.random.default_rng(0).integers(0, 256, (12, 6, 6, 3), dtype=np.uint8)
    np.savez(tmp_path / "fakes.npz", arr_0=images)
    (tmp_path / "folder").mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"folder/{i:02d}.png")
    return images


def test_fid_statistics_are_those_of_the_features_and_of_one_image_size(fakes, tmp_path, capsys):
    run(fid, f"{tmp_path / 'folder'} --img-size 6 --batch 5 --num-workers 0 --save-stats {tmp_path / 'stats.npz'}")
    features, _ = load_projections(None, None)(torch.from_numpy(fakes.transpose(0, 3, 1, 2)))
    with np.load(tmp_path / "stats.npz") as file:
        assert file["img_size"] == 6
        np.testing.assert_allclose(file["mu"], features.double().mean(0), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(file["sigma"], np.cov(features.numpy(), rowvar=False), rtol=1e-3, atol=1e-5)
        stats = dict(file)
    np.savez(tmp_path / "other.npz", **stats | dict(img_size=32))
    np.savez(tmp_path / "nan.npz", **stats | dict(sigma=stats["sigma"] * np.nan))
    np.savez(tmp_path / "small.npz", mu=np.zeros(64), sigma=np.eye(64))
    for name, message in dict(other="images of 32 pixels", nan="not finite", small="2048 features").items():
        assert message in refusal(capsys, fid, f"{tmp_path / 'fakes.npz'} --reference {tmp_path / name}.npz")


@pytest.mark.slow
def test_fid_of_the_same_images_is_zero_from_a_folder_an_npz_and_published_statistics(fakes, tmp_path, capsys):
    run(fid, f"{tmp_path / 'fakes.npz'} --save-stats {tmp_path / 'stats.npz'}")
    with np.load(tmp_path / "stats.npz") as file:
        np.savez(tmp_path / "published.npz", ref_mu=file["mu"], ref_sigma=file["sigma"])  # as iMF's are named
    for reference in ("folder", "fakes.npz", "stats.npz", "published.npz"):
        run(fid, f"{tmp_path / 'fakes.npz'} --num-workers 0 --reference {tmp_path / reference}")
        said = capsys.readouterr().out
        assert float(re.search(r"FID ([\d.]+)", said)[1]) < 0.01 and "12 images of 6 x 6" in said
        assert ("recall 1.000" in said) == (reference in ("folder", "fakes.npz"))


def test_fid_two_processes_score_as_one_does(fakes, tmp_path):
    # With the same projections, by a script that imports them from here.
    paths, script = [str(FOLDER), str(Path(__file__).parent)], tmp_path / "script.py"
    script.write_text(
        f"import sys\nsys.path[:0] = {paths}\nimport {Path(__file__).stem} as tests, fid, sample\n"
        "fid.load_inception = tests.load_projections\nsample.run_script(fid.main)\n"
    )
    line = f"{tmp_path / 'fakes.npz'} --batch 5 --save-stats {tmp_path}"
    run(fid, f"{line}/one.npz")
    torchrun(2, script, f"{line}/two.npz")
    with np.load(tmp_path / "one.npz") as one, np.load(tmp_path / "two.npz") as two:
        np.testing.assert_allclose(two["mu"], one["mu"], rtol=1e-5)
        np.testing.assert_allclose(two["sigma"], one["sigma"], rtol=1e-3, atol=1e-5)


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory):
    """Random weights of the Inception that torch-fidelity would download, with features that differ between images."""
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda *args, **kwargs: {})
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda *args, **kwargs: None)
        net = module.FeatureExtractorInceptionV3("random", ["2048"])
    for name, p in net.named_parameters():
        if p.ndim == 4:
            torch.nn.init.kaiming_normal_(p)
        elif name == "fc.weight":
            torch.nn.init.normal_(p, std=3.0)
    torch.save(net.state_dict(), path)
    return path


@pytest.mark.slow
def test_fid_and_is_equal_torch_fidelitys_on_images(tmp_path, inception_weights, capsys):
    fidelity = pytest.importorskip("torch_fidelity")
    for name, seed in dict(a=30, b=31).items():
        draw_images(tmp_path / name, seed, 24)
    expected = fidelity.calculate_metrics(
        input1=str(tmp_path / "a"), input2=str(tmp_path / "b"), fid=True, isc=True, cuda=False, cache=False,
        feature_extractor="inception-v3-compat", feature_extractor_weights_path=str(inception_weights),
    )  # fmt: skip
    line = f"{tmp_path / 'a'} --reference {tmp_path / 'b'} --img-size 24 --inception-weights {inception_weights}"
    run(fid, line)
    found = {name: float(x) for name, x in re.findall(r"(FID|IS) ([\d.]+)", capsys.readouterr().out)}
    assert found["FID"] == pytest.approx(expected["frechet_inception_distance"], rel=1e-3)
    assert found["IS"] == pytest.approx(expected["inception_score_mean"], abs=2e-3)


def linear_flops(*sizes):
    """FLOPs of linear layers on one token: two for each weight."""
    return sum(2 * a * b for a, b in sizes)


def test_fid_counts_flops_as_by_hand():
    flow, model = make(TARFlow), make(BiFlow)
    width, K, hidden = 16, 3, 32  # K context tokens
    layer = T * linear_flops((width, 12 * width)) + 4 * T**2 * width  # q k' and a v: 2 T^2 width each
    with sdpa_kernel(SDPBackend.MATH), fid.FlopCounter() as counter:
        flow(torch.randn(3, 1, 4, 4), torch.zeros(3, dtype=torch.long))
    assert counter.total == 3 * B * (2 * layer + T * linear_flops((D, width), (width, 2 * D)))
    run_info, args = dict(sigma=0.1, vae=None), SimpleNamespace(bf16=False, compile=False)
    gflops, rounds = fid.measure(Sampler(flow, model, run_info, CPU, args), "biflow", 2, count=True)
    layer = (T + K) * linear_flops((width, 4 * width), (width, 2 * hidden), (hidden, width)) + 4 * (T + K) ** 2 * width
    block = 2 * layer + linear_flops((32, width), (width, width))
    assert round(gflops * 1e9) == (B + 1) * block + T * linear_flops((D, width), (width, D)) and rounds == 0


@pytest.mark.slow
def test_fid_counts_the_papers_cost_of_score_denoising():
    flow, model = (cls(SIZES["B"]).requires_grad_(False) for cls in (TARFlow, BiFlow))
    x, h, y, w = torch.zeros(1, 4, 32, 32), torch.zeros(1, 256, 384), torch.zeros(1).long(), torch.zeros(1)
    with sdpa_kernel(SDPBackend.MATH), fid.FlopCounter() as score:
        flow.denoise(x, y, 0.3)
    with sdpa_kernel(SDPBackend.MATH), fid.FlopCounter() as block:
        model.blocks[-1](h, y, w)
    assert 15 < score.total / block.total < 16.5


def test_fid_speed_table_has_a_row_for_each_method(toy, capsys):
    capsys.readouterr()
    run(fid, f"{toy / 'runs/reverse-toy'} --speed --batch 4 --guidance 0.5")
    head, *lines = capsys.readouterr().out.splitlines()
    assert "rounds" in head and "ms, batch 4" in head
    rows = {line.split()[0]: [float(x) for x in line.split()[1:]] for line in lines}
    assert list(rows) == ["biflow", "biflow-2nfe", "exact", "jacobi", "exact+score"]
    params, flops, rounds, layers, *times = map(list, zip(*rows.values()))
    assert rounds[0] == 0 and rounds[2] == 15 and 1 <= rounds[3] <= 15 and rounds[4] == 16  # T = 16
    assert layers[0] == 10 and layers[2] == 120
    assert flops[1] / flops[0] == pytest.approx(
        9 / 5, rel=0.01
    )  # twice the four aligned blocks, once the denoise block
    assert flops[4] > flops[2] > flops[0]
    assert min(map(min, times)) > 0 and times[1][0] == times[3][0] == 1


@pytest.mark.slow
def test_fid_speed_table_of_random_weights_has_the_vae(capsys, monkeypatch):
    pytest.importorskip("diffusers")
    monkeypatch.setitem(SIZES, "L", dataclasses.replace(SMALL, channels=4, img_size=8))
    run(fid, "--speed --size L --batch 2 --guidance 1")
    said = capsys.readouterr().out
    assert "VAE decode" in said and "jacobi" in said


# ---- commands --------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="session")
def bad(tmp_path_factory, toy, photos):
    """Files and folders with something wrong, by name; F and G are sound runs, cache is a sound cache."""
    root, forward, reverse = tmp_path_factory.mktemp("bad"), toy / "runs/forward-toy", toy / "runs/reverse-toy"
    (root / "file").write_text("a file")
    (root / "empty").mkdir()
    for name in ("train", "val"):
        draw_images(root / "splits" / name, 2)
    data = load_data(arguments(f"--data {photos} --img-size 32 --out {root / 'run'}"), CPU)
    for name in ("cache", "cachecut", "cachemanifest"):
        shutil.copytree(data.info["cache"], root / name)
    (root / "cachecut/data.npy").write_bytes((root / "cache/data.npy").read_bytes()[:5000])
    (root / "cachemanifest/manifest.json").write_text('{"data": ')
    for name in ("garbled", "cut", "mismatch", "unknown", "nocheckpoint"):
        shutil.copytree(forward, root / name)
    (root / "garbled/run.json").write_text('{"data": ')
    (root / "cut/model.safetensors").write_bytes(weights(forward)[:-100])
    for name, old, new in (("mismatch", '"width": 64', '"width": 32'), ("unknown", '"width"', '"breadth"')):
        config = (root / name / "config.json").read_text()
        (root / name / "config.json").write_text(config.replace(old, new))
    for path in (root / "nocheckpoint").glob("checkpoint*"):
        path.unlink()
    np.savez(root / "nothing.npz", other=np.zeros(3))
    np.savez(root / "images.npz", arr_0=np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3), dtype=np.uint8))
    flipped = bytearray((root / "images.npz").read_bytes())
    flipped[700] ^= 255
    (root / "flipped.npz").write_bytes(flipped)
    torch.save({"a": torch.zeros(2)}, root / "other.pth")
    torch.save({"a": root}, root / "pickle.pth")  # a Path is not a tensor
    Image.new("L", (8, 8), 100).save(root / "grey.png")
    (root / "F").symlink_to(forward)
    (root / "G").symlink_to(reverse)
    return root


BAD_INPUT = [
    ("train_forward", "--size Z", "invalid choice"),
    ("train_forward", "--steps many", "invalid int"),
    ("train_forward", "--no-such-flag", "unrecognized"),
    ("train_forward", "--batch-size 0", "at least 1"),
    ("train_forward", "--clip -1", "clip must be positive"),
    ("train_forward", "--patch-size 3", "does not divide 8"),
    ("train_forward", "--size B", "--data None is not a folder"),
    ("train_forward", "--data mnits", "--data mnits is not a folder"),
    ("train_forward", "--data file", "--data file is not a folder"),
    ("train_forward", "--data empty", "holds 0 images"),
    ("train_forward", "--data splits", "splits train, val"),
    ("train_forward", "--data cache --img-size 33", "was made with --img-size 32"),
    ("train_forward", "--data cachecut", "is damaged"),
    ("train_forward", "--data cachemanifest", "is damaged"),
    ("train_forward", "--data splits/val --vae nowhere", "cannot load the VAE"),
    ("train_forward", "--out file/run", "cannot write to file/run"),
    ("train_forward", "--resume missing.pt", "missing.pt has no checkpoint that loads"),
    ("train_forward", "--resume other.pth", "other.pth"),
    ("train_forward", "--resume pickle.pth", "pickle.pth has no checkpoint that loads"),
    ("train_forward", "--out nocheckpoint", "nocheckpoint has no checkpoint"),
    ("train_forward", "--out F --batch-size 32 --seed 3", "seed: 0 there, 3 now"),
    ("train_reverse", "--forward missing", "is not a trained run"),
    ("train_reverse", "--forward G", "is a reverse run"),
    ("train_reverse", "--forward garbled", "cannot load the run"),
    ("train_reverse", "--forward cut", "cannot load the run"),
    ("train_reverse", "--forward mismatch", "cannot load the run"),
    ("train_reverse", "--forward unknown", "breadth"),
    ("train_reverse", "--forward F --data cache", "--img-size 32, not 8"),
    ("train_reverse", "--forward F --w-max -1", "w_max must be"),
    ("sample", "missing", "is not a trained run"),
    ("sample", "G --classes dog", "no class 'dog'"),
    ("sample", "G --guidance 9", "outside [0, 1]"),
    ("sample", "G --guidance nan", "guidance"),
    ("sample", "F --method biflow", "give a reverse run"),
    ("sample", "G --out missing/x.png", "cannot write missing/x.png"),
    ("sample", "G --out x.pgn", "must end in .png"),
    ("sample", "G --edit missing.png", "cannot read missing.png"),
    ("sample", "G --edit grey.png --to dog", "no class 'dog'"),
    ("fid", "missing", "is not a trained run"),
    ("fid", "G --n 3", "--n must be at least 4"),
    ("fid", "nothing.npz", "holds no uint8 images"),
    ("fid", "flipped.npz", "cannot read flipped.npz"),
    ("fid", "images.npz --save-stats missing/x.npz", "cannot write missing/x.npz"),
    ("fid", "images.npz --inception-weights pickle.pth", "cannot load Inception"),
]


@pytest.mark.parametrize("script, line, message", BAD_INPUT, ids=[f"{script} {line}" for script, line, _ in BAD_INPUT])
def test_commands_refuse_bad_input_with_one_line(bad, script, line, message, capsys, monkeypatch):
    monkeypatch.chdir(bad)
    before = {path: path.stat().st_mtime_ns for path in bad.rglob("*.*")}
    short = "--steps 1 --batch-size 4" if script.startswith("train") and "batch" not in line else ""
    assert message in refusal(capsys, SCRIPTS[script], f"{short} {line}")
    assert before.items() <= {path: path.stat().st_mtime_ns for path in bad.rglob("*.*")}.items()


@pytest.mark.parametrize("script", SCRIPTS)
def test_commands_help_and_a_closed_stdout(script):
    command = f"{shlex.quote(sys.executable)} {FOLDER / script}.py --help"
    done = subprocess.run(
        ["bash", "-c", f"{command} | head -c 1; exit ${{PIPESTATUS[0]}}"], capture_output=True, text=True
    )
    assert done.returncode in (0, 2) and "Traceback" not in done.stderr


def test_commands_help_shows_the_defaults_of_the_size(capsys):
    for line, expected in {"--help": "(128)", "--size B --help": "(1024)"}.items():
        with pytest.raises(SystemExit):
            run(train_forward, line)
        assert expected in " ".join(capsys.readouterr().out.split())


def readme_commands():
    """Every `python X.py ...` and `torchrun ... X.py ...` in the README's blocks, as (script, arguments)."""
    text = (FOLDER / "README.md").read_text()
    for block in re.findall(r"```\w*\n(.*?)```", text, re.DOTALL):
        values = dict(re.findall(r'(\w+)="([^"]*)"', block))
        block = re.sub(r"\$\{?(\w+)\}?", lambda match: values.get(match[1], "0"), block.replace("\\\n", " "))
        for command in re.split(r"\n|&&|;", block):
            if re.search(r"\b(python3?|torchrun)\b.* \w+\.py\b", command):
                words = shlex.split(command, comments=True)
                script = next((i for i, word in enumerate(words) if word.removesuffix(".py") in SCRIPTS), None)
                if script is not None:
                    yield words[script].removesuffix(".py"), words[script + 1 :]


class Parsed(Exception):
    pass


@pytest.mark.parametrize("script, words", readme_commands(), ids=lambda v: v if isinstance(v, str) else " ".join(v))
def test_commands_of_the_readme_parse(script, words, monkeypatch):
    parse_args = argparse.ArgumentParser.parse_args

    def only_parse(self, argv=None):
        parse_args(self, argv)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", only_parse)
    with pytest.raises(Parsed):
        SCRIPTS[script].main(words)


def test_commands_import_biflow_pulls_in_little():
    heavy = ["diffusers", "lpips", "timm", "torch_fidelity", "sklearn", "torchvision", "matplotlib"]
    code = f"import sys; import biflow; biflow.BiFlow(biflow.SIZES['toy']); print(*set(sys.modules) & set({heavy}))"
    done = subprocess.run([sys.executable, "-c", code], check=True, cwd=FOLDER, capture_output=True, text=True)
    assert not done.stdout.strip()


def without_body(source, name):
    """Python source in which the body of a function, such as FlowBlock.forward, is gone; its docstring stays."""
    lines, nodes = source.splitlines(), ast.parse(source).body
    for part in name.split("."):
        node = next(node for node in nodes if getattr(node, "name", None) == part)
        nodes = node.body
    first = node.body[1] if ast.get_docstring(node) else node.body[0]
    lines[first.lineno - 1 : node.end_lineno] = [" " * first.col_offset + "raise NotImplementedError"]
    return "\n".join(lines)


@pytest.mark.slow
def test_commands_exercises_grade_themselves(tmp_path):
    # The README's table: without the body of its function, each group fails. That they pass with it, this run shows.
    table = (FOLDER / "README.md").read_text().partition("## Exercises")[2]
    exercises = dict(re.findall(r"^\| `(\w+)` \| `([\w.]+)` \|", table, re.MULTILINE))
    groups = re.search(r"The method: (.*?), precision", sys.modules[__name__].__doc__, re.DOTALL)[1]
    assert list(exercises) == re.split(r",\s+", groups)

    def grade(exercise):
        prefix, name = exercise
        folder = tmp_path / prefix
        folder.mkdir()
        for path in [*FOLDER.glob("*.py"), FOLDER / "README.md", FOLDER / ".pytest.ini"]:
            shutil.copy(path, folder)
        (folder / "biflow.py").write_text(without_body((FOLDER / "biflow.py").read_text(), name))
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-k", prefix, "test_biflow.py"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)

    with ThreadPoolExecutor(2) as pool:
        for prefix, done in zip(exercises, pool.map(grade, exercises.items())):
            assert done.returncode == 1 and " failed" in done.stdout, f"{prefix}: {done.stdout[-2000:]}"


@pytest.mark.slow
def test_commands_from_photographs_to_fid(photos, vae, inception_weights, tmp_path, monkeypatch, capsys):
    # Latents, both stages with both perceptual networks (at random weights), samples, edits, FID.
    lpips, timm = pytest.importorskip("lpips"), pytest.importorskip("timm")
    build, create = lpips.LPIPS, timm.create_model
    untrained = dict(pnet_rand=True, pretrained=False)
    monkeypatch.setattr(lpips, "LPIPS", lambda **options: build(**options, **untrained))
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **options: create("convnextv2_atto", **options))
    forward, reverse, short = tmp_path / "f", tmp_path / "r", "--steps 2 --batch-size 2"
    run(train_forward, f"{short} --data {photos} --vae {vae} --img-size 64 --out {forward}")
    run(train_reverse, f"{short} --forward {forward} --lpips 0.4 --convnext 0.1 --out {reverse}")
    line = next(line for line in metrics(reverse) if "loss" in line)
    assert line["error_lpips"] > 0 and line["error_convnext"] > 0
    run(sample, f"{reverse} --n 3 --batch 2 --method biflow --npz {tmp_path / 's.npz'}")
    assert np.load(tmp_path / "s.npz")["arr_0"].shape == (3, 64, 64, 3)
    run(sample, f"{reverse} --edit {photos / 'class0/03.png'} --from class0 --to class1 --n 2")
    assert (reverse / "edit.png").exists()
    capsys.readouterr()
    run(fid, f"{reverse} --n 4 --batch 4 --reference {photos} --inception-weights {inception_weights}")
    assert "FID" in capsys.readouterr().out
