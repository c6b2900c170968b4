"""All tests, in the paper's order: the method against independent oracles (autograd Jacobians, closed forms, brute
force, sums by hand), the scripts against themselves, against the packages they use, and against bad input.

    python -m pytest                              # some minutes on two cores
    python -m pytest -m "slow or not slow"        # all, as continuous integration runs them
    python -m pytest -k flow_block                # one group, with which its tests' names begin

All run on the CPU, where "the same" can mean bit for bit, unless BIFLOW_TEST_CUDA is set.
"""

import os

if "BIFLOW_TEST_CUDA" not in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is imported

import ast
import contextlib
import itertools
import json
import math
import multiprocessing
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
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
from torch._subclasses import FakeTensorMode
from torch.autograd.functional import jacobian
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import biflow
import fid
import sample
import train_forward
import train_reverse
from biflow import SIZES, BiFlow, Config, ReverseBlock, TARFlow, autocast, patchify, reverse_loss, unpatchify
from sample import Sampler, center_crop, load_vae, read_image, sample_noise, to_uint8
from train_forward import Batches, jitter, list_images, load_digits, load_torchvision, to_device, validation_batches

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


def test_tokens_and_sizes_that_do_not_fit_are_refused():
    wrong = dict(img_size=7, patch_size=3, width=20, head_dim=2, clip=math.nan, strategy="x", denoise="score", w_max=-1)
    for field, value in wrong.items():
        with pytest.raises(ValueError, match=field):
            replace(SMALL, **{field: value})


# ---- flow_block ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("clip", [CLIP, None])
@pytest.mark.parametrize("i, y", [(0, 2), (1, -1)])
def test_flow_block_has_the_jacobian_of_an_autoregressive_map(i, y, clip):
    # Oracle: autograd. Each number moves with itself and with exactly the tokens before it, but for what is clipped.
    block, y = make(TARFlow, torch.float64, clip=clip).blocks[i], torch.tensor([y])
    x = torch.randn(1, T, D).double()
    J = jacobian(lambda x: block(x, y)[0], x).view(T * D, T * D)
    close(block(x, y)[1], torch.linalg.slogdet(J).logabsdet.view(1), 1e-8)
    before = torch.ones(T, T).tril(-1)  # row t, column s: s < t
    allowed = torch.kron(before if i == 0 else before.flip(0, 1), torch.ones(D, D)) + torch.eye(T * D) > 0
    moves = J.abs() > 1e-12
    assert torch.equal(moves | allowed, allowed) and (clip or torch.equal(moves, allowed))


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
@pytest.mark.parametrize("w", [0.0, 1.3])
def test_flow_inverse_agrees_with_guided_decoding_without_a_cache(w, clip):
    # Oracle: token after token, with probed parameters. The scale grows from 0 at the first token to w at the last.
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


@pytest.mark.parametrize("w", [0.0, 1.3])
def test_flow_inverse_shows_each_layer_one_token_a_step(w):
    # What a KV cache saves. Both branches of guidance run as one batch.
    flow, seen = make(TARFlow), []
    for block in flow.blocks:
        for layer in block.attn_blocks:
            layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    flow.inverse(torch.randn(3, T, D), torch.tensor([0, 1, 2]), w)
    assert seen == B * (T - 1) * 2 * [(6 if w else 3, 1, 16)]


@pytest.mark.parametrize("w", [0.0, 1.3])
@pytest.mark.parametrize("patch_size, tolerance, rounds, error", [(2, 0.0, 3, 1e-10), (1, 1e-4, 14, 1e-3)])
def test_flow_inverse_jacobi_is_the_same_map(patch_size, tolerance, rounds, error, w):
    # Oracle: token by token. T - 1 rounds make it exact; a tolerance saves some, and the identity takes a single one.
    trained, y = make(TARFlow, torch.float64, patch_size=patch_size, clip=CLIP), torch.tensor([0, 2, -1])
    z = patchify(torch.randn(3, 1, 4, 4).double(), patch_size)
    for flow, least, most in ((trained, B + 1, B * rounds), (TARFlow(trained.config).double(), B, B)):
        expected = flow.inverse(z, y, w)
        calls = count_calls(block.proj_out for block in flow.blocks)
        close(flow.inverse_jacobi(z, y, w, tolerance), expected, error)
        assert least <= len(calls) <= most


# ---- flow_denoise ----------------------------------------------------------------------------------------------------
@torch.no_grad()
def test_flow_denoise_is_the_posterior_mean_of_a_linear_gaussian_flow():
    # Closed form: z = L x - b makes x~ ~ N(m, S); then E[x | x~] = m + (S - sigma^2) S^-1 (x~ - m).
    flow, sigma = make(TARFlow, torch.float64, clip=None), 0.3
    for block in flow.blocks:
        for layer in block.attn_blocks:  # no layer adds anything, so that mu_t is linear in x_{t-1} ...
            for p in (*layer.attention.proj.parameters(), *layer.mlp.main[2].parameters()):
                p.zero_()
        block.proj_out.weight[:D] = 0  # ... and alpha is constant

    x, zero = torch.randn(2, 16).double(), torch.zeros(1, 1, 4, 4).double()
    with torch.enable_grad():
        L = jacobian(lambda x: flow(x)[0][-1], zero).view(16, 16)
    m, S = torch.linalg.solve(L, -flow(zero)[0][-1].flatten()), torch.linalg.inv(L.T @ L)
    mean = m + (x - m) @ torch.linalg.inv(S) @ (S - sigma**2 * torch.eye(16).double())
    close(flow.denoise(x.view(2, 1, 4, 4), None, sigma), mean.view(2, 1, 4, 4), 1e-8)
    with torch.inference_mode():  # servers wrap everything in it
        close(flow.denoise(x.view(2, 1, 4, 4), None, sigma), mean.view(2, 1, 4, 4), 1e-8)


# ---- flow_import -----------------------------------------------------------------------------------------------------
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
        return nnf.layer_norm(h, h.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])

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
            h = h + linear(f"{layer}.mlp.main.2", nnf.gelu(linear(f"{layer}.mlp.main.0", norm(f"{layer}.mlp.norm", h))))
        alpha, mu = linear(f"{block}.proj_out", h)[:, :-1].chunk(2, dim=-1)
        x = torch.cat([x[:, :1], (x[:, 1:] - mu) * torch.exp(-alpha)], dim=1)[:, order]
        logdet = logdet - alpha.sum((1, 2))
    return x, logdet


@pytest.mark.parametrize("changes", [dict(), dict(num_classes=0), dict(patch_size=1, channels=3)])
def test_flow_import_reproduces_the_published_model(changes):
    config = replace(SMALL, **changes)
    state = published_checkpoint(config)
    flow = TARFlow.from_tarflow(state, config).double()
    assert flow.config == replace(config, clip=None) and not flow.training and "var" in state
    x, y = torch.randn(3, config.channels, 4, 4).double(), torch.tensor([0, 1, 2])
    tokens = nnf.unfold(x, config.patch_size, stride=config.patch_size).transpose(1, 2)
    z, logdet = published_forward(state, tokens, y, config.head_dim)
    states, flow_logdet = flow(x, y)
    close((states[-1], flow_logdet), (z, logdet), 1e-10)
    close(flow.inverse(z, y), x, 1e-8)


def test_flow_import_refuses_checkpoints_of_another_kind():
    wrong = {
        "var": 2 * torch.ones(T, D),
        "blocks.3.proj_in.bias": torch.zeros(16),
        "blocks.0.pos_embed": torch.zeros(5, 16),
    }
    for name, value in wrong.items():
        with pytest.raises((ValueError, RuntimeError)):
            TARFlow.from_tarflow(published_checkpoint(SMALL) | {name: value}, SMALL)


# ---- nll -------------------------------------------------------------------------------------------------------------
def test_nll_is_that_of_the_change_of_variables():
    # Oracle: the normal density at z, and the whole flow's Jacobian by autograd.
    flow, y = make(TARFlow, torch.float64, clip=CLIP), torch.tensor([1])
    x = torch.randn(1, 1, 4, 4).double()
    J = jacobian(lambda x: flow(x, y)[0][-1], x).view(T * D, T * D)
    states, logdet = flow(x, y)
    log_p = torch.distributions.Normal(0, 1).log_prob(states[-1]).sum() + torch.linalg.slogdet(J).logabsdet
    close(flow.log_prob(x, y), log_p.view(1), 1e-8)
    close(biflow.nll_loss(states[-1].expand(3, T, D), logdet.expand(3)), -log_p / 16, 1e-8)


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
    out = h + layer.attn_layer_scale * (torch.cat(attended, -1) @ layer.proj.weight.T)
    gate, value = (rms(out) @ layer.mlp_in.weight.T).chunk(2, -1)
    out = out + layer.mlp_layer_scale * ((gate / (1 + torch.exp(-gate)) * value) @ layer.mlp_out.weight.T)
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


@torch.no_grad()
def test_reverse_block_knows_every_position_class_and_scale_up_to_w_max():
    # Oracle for positions: the autograd Jacobian. Then equal tokens, which RoPE alone tells apart.
    block, y, zero = make(ReverseBlock), torch.tensor([-1, 0, 1, 2]), torch.zeros(4)
    with torch.enable_grad():
        J = jacobian(lambda h: block(h, y, zero), torch.randn(4, T, 16)).abs().sum((0, 2, 3, 5))
    assert J.shape == (T, T) and (J > 0).all()
    h = torch.randn(1, 1, 16).expand(4, T, 16)
    out = block(h, y, zero)
    for row in range(4):  # of the class table
        block.class_embed.weight[row] += 1
        before, out = out, block(h, y, zero)
        assert torch.equal((out != before).any(2).any(1), torch.arange(4) == row)
    out = block(h, torch.ones_like(y), torch.tensor([0.0, 0.5, 2.0, 3.0]))
    assert torch.pdist(out[:3].flatten(1)).min() > 1e-4
    assert torch.equal(out[2], out[3])
    assert torch.pdist(block(h, y, zero)[0]).min() > 1e-4
    block.rope = torch.stack([torch.ones(T + 3, 4), torch.zeros(T + 3, 4)])
    assert torch.pdist(block(h, y, zero)[0]).max() < 1e-5


# ---- alignment -------------------------------------------------------------------------------------------------------
def inputs():
    """z (4, T, D), y (4,), w (4,): unguided, guided, guided more, and a dropped label, where w must not matter."""
    return torch.randn(4, T, D), torch.tensor([0, 1, 2, -1]), torch.tensor([0.0, 0.5, 2.0, 1.0])


@pytest.mark.parametrize("strategy", ["align", "hidden", "naive"])
def test_alignment_projects_by_hand(strategy):
    # Heads read the hidden tokens; only in hidden distillation what they predict is lifted and goes on. Gradients, too.
    model, h = make(BiFlow, strategy=strategy), torch.randn(4, T, 16, requires_grad=True)
    for j in range(B + 1):
        out, prediction = model.project(j, h)
        if strategy == "naive" or j == B:
            assert out is h and prediction is None
            continue
        weight, bias = parameters = list(model.heads[j].parameters())
        expected = (h / h.square().mean(-1, keepdim=True).add(1e-6).sqrt()) @ weight.T + bias
        pairs = [(prediction, expected), (out, h)]
        if strategy == "hidden":
            pairs[1] = (out, expected @ model.lifts[j].weight.T + model.lifts[j].bias)
            parameters += model.lifts[j].parameters()
        close(*zip(*pairs), 1e-5)
        sums = [a.sin().sum() + 2 * b.cos().sum() for a, b in zip(*pairs)]
        close(*(torch.autograd.grad(x, [h, *parameters], retain_graph=True) for x in sums), 1e-4)


# ---- guidance --------------------------------------------------------------------------------------------------------
def by_hand(model, z, step):
    """x' and the predictions of G, whose block j makes step(block, h, 1 if it is aligned else 0) of h."""
    h, predictions = model.proj_in(z) + model.pos_embed, {}
    for j, block in enumerate(model.blocks):
        h = step(block, h, float(j < B))
        if j < len(model.heads):
            norm = h.square().mean(-1, keepdim=True).add(1e-6).sqrt()
            prediction = h / norm @ model.heads[j][1].weight.T + model.heads[j][1].bias
            h = model.lifts[j](prediction) if model.config.strategy == "hidden" else h
            predictions[B - 1 - j] = prediction
    return unpatchify(model.out(h), 2), predictions


@pytest.mark.parametrize("w_max", [0.0, 2.0])
@pytest.mark.parametrize("strategy, denoise", STRATEGIES)
def test_guidance_by_hand(strategy, denoise, w_max):
    # Oracle: the formulas. Blocks are called once, with the whole batch; guided training calls the aligned ones twice.
    model, (z, y, w) = make(BiFlow, strategy=strategy, denoise=denoise, w_max=w_max), inputs()
    none, zero, w_used = torch.full((4,), -1), torch.zeros(4), torch.tensor([0.0, 0.5, 2.0, 0.0])

    def training(block, h, aligned):
        w_i = aligned * w_used.view(4, 1, 1) * (w_max > 0)
        return (block(h, y, w_used) + w_i * block(h, none, zero).detach()) / (1 + w_i)

    def two_passes(block, h, aligned):
        w_i = aligned * w_used.view(4, 1, 1)
        return (1 + w_i) * block(h, y, zero) - w_i * block(h, none, zero)

    calls, blocks = count_calls(model.blocks), range(len(model.blocks))
    x, outputs = model.sample(z, y, w), model(z, y, w)
    assert calls == [(j, 4) for j in blocks] + [(j, 4) for j in blocks for _ in range(2 if w_max and j < B else 1)]
    close(x, by_hand(model, z, lambda block, h, _: block(h, y, w_used))[0], 1e-5)
    close(model.sample_two_pass(z, y, w), by_hand(model, z, two_passes)[0], 1e-4)
    outputs = [outputs, by_hand(model, z, training)]
    close(*outputs, 1e-5)
    sums = [x.square().sum() + sum(p.sin().sum() for p in predictions.values()) for x, predictions in outputs]
    gradients = [torch.autograd.grad(x, list(model.parameters()), materialize_grads=True) for x in sums]
    for gradient, expected in zip(*gradients):
        close(gradient, expected, 1e-4 * max(1e-3, expected.abs().max().item()))


def test_guidance_needs_a_class_and_may_be_a_float():
    model, unconditional, (z, y, _) = make(BiFlow), make(BiFlow, num_classes=0), inputs()
    for method in (BiFlow.sample, BiFlow.sample_two_pass, lambda *args: BiFlow.forward(*args)[0]):
        assert torch.equal(method(model, z, torch.full((4,), -1), 2.0), method(model, z, None, 0.0))
        assert torch.equal(method(model, z, y, 0.5), method(model, z, y, torch.full((4,), 0.5)))
        close(method(model, z, y, 0.0), model.sample(z, y), 1e-5)  # unguided, all three are the same
        assert torch.equal(method(unconditional, z, y, 2.0), method(unconditional, z, None, 0.0))
    unguided = make(BiFlow, w_max=0.0)  # its guidance MLP has only learned w = 0
    assert torch.equal(unguided.sample(z, y, torch.ones(4).double()), unguided.sample(z, y, 0.0))


# ---- reverse_loss ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("p", [1.0, 0.5, 0.0])
def test_reverse_loss_by_hand(p, norm):
    # Each of a sample's 16 numbers is off by as much: D = 16 off^2. The states' scale, 7 for the first sample, may be
    # divided out. Closed form: d/dx' of mean_n sg((D_n + c)^-p) D_n is (D_n + c)^-p 2 (x' - x) / N.
    scale = torch.tensor([7.0, 1.0])
    off = {"x": torch.tensor([0.1, 1.0]), "x0": torch.tensor([-0.5, 0.1]), "x2": torch.tensor([0.7, -0.2])}
    x, signs = torch.ones(2, 1, 4, 4), [1, -1, 1, -1]  # so that a neighbouring state is no target even when scaled
    states = [signs[i] * (i + 2) * scale.view(2, 1, 1).expand(2, T, D) for i in range(B + 1)]
    value = {i: torch.ones(2) if norm else (i + 2) * scale for i in (0, 2)}
    predictions = {i: (value[i] + off[f"x{i}"]).view(2, 1, 1).expand(2, T, D) for i in (0, 2)}
    x_prime = (x + off["x"].view(2, 1, 1, 1) * torch.randn_like(x).sign()).requires_grad_()
    loss, errors = reverse_loss(x_prime, predictions, x, states, p, norm)
    weight = {name: (16 * d.square() + 0.01) ** -p for name, d in off.items()}
    close(loss, sum((weight[name] * 16 * d.square()).mean() for name, d in off.items()), 1e-5)
    close(errors, {"x": off["x"] ** 2, "x0": (off["x0"] / value[0]) ** 2, "x2": (off["x2"] / value[2]) ** 2}, 2e-5)
    (gradient,) = torch.autograd.grad(loss, x_prime)
    close(gradient, weight["x"].view(2, 1, 1, 1) * 2 * (x_prime - x).detach() / 2, 1e-5)


@pytest.mark.parametrize("strategy, denoise", STRATEGIES)
def test_reverse_loss_supervises_as_the_strategy_says_and_reaches_every_parameter_of_G_alone(strategy, denoise):
    flow, model = make(TARFlow), BiFlow(replace(SMALL, strategy=strategy, denoise=denoise))
    x, (_, y, w) = torch.randn(4, 1, 4, 4), inputs()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for begun in (False, True):  # from the second step on, since the heads start at zero
        with autocast(CPU, True):
            with torch.no_grad():
                states, _ = flow(x, y)
            x_prime, predictions = model(states[-1], y, w)
            loss, _ = reverse_loss(x_prime, predictions, x, states)
        assert all(out.any() == begun for out in (x_prime, *predictions.values()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    aligned = set() if strategy == "naive" else set(range(B)) if denoise == "learned" else set(range(1, B))
    assert x_prime.shape == x.shape and predictions.keys() == aligned
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), name
    assert all(block.class_embed.weight.grad.any(dim=1).all() for block in model.blocks)  # every class, and "no class"
    assert all(p.grad is None for p in flow.parameters())


# ---- perceptual ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bf16", [False, True])
def test_perceptual_crop_is_the_box_that_its_numbers_say(bf16):
    # Closed form: ramps stay ramps. The crop of all, which leaves no room to move, is torch's bilinear resize.
    def ramps(size):
        centres = (torch.arange(size) + 0.5) / size  # of the pixels, in [0, 1]
        return torch.stack([centres.expand(size, size), centres[:, None].expand(size, size)])[None]

    u, x = torch.tensor([[0.0, 1.0, 0.25, 0.75], [0.2, 0.0, 0.5, 0.6]]), torch.randn(1, 3, 32, 32)
    with autocast(CPU, bf16):
        crops = biflow.random_resized_crop(ramps(64).expand(2, -1, -1, -1), u, 16)
        whole = biflow.random_resized_crop(x, torch.tensor([[1.0, 0.5, 0.3, 0.9]]), 48)
    for crop, area, ratio, left, top in zip(crops, (0.08, 0.264), (4 / 3, 3 / 4), (0.25, 0.5), (0.75, 0.6)):
        w, h = math.sqrt(area * ratio), math.sqrt(area / ratio)
        corner = torch.tensor([left * (1 - w), top * (1 - h)]).view(2, 1, 1)
        close(crop, corner + torch.tensor([w, h]).view(2, 1, 1) * ramps(16)[0], 1e-5)
    close(whole, nnf.interpolate(x, (48, 48), mode="bilinear", align_corners=False), 1e-5)


class FakeLPIPS(nn.Linear):
    def forward(self, a, b):
        return self.weight.square() * (a - b).square().mean((1, 2, 3), keepdim=True)


@pytest.mark.parametrize("p", [1.0, 0.0])
def test_perceptual_distance_by_hand(p):
    # Both see the same crop of decoded images. The ConvNeXt's, normalised as torchvision does, gives tanh of the means.
    torch.manual_seed(0)
    decoded, mean, std = [], (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Tanh())
    nets = {"lpips": FakeLPIPS(1, 1), "convnext": biflow.FeatureDistance(net, mean, std)}
    weights, mean, std = {"lpips": 0.4, "convnext": 0.1}, torch.tensor(mean), torch.tensor(std)
    distance = biflow.PerceptualDistance(lambda x: decoded.append(x) or x.sin().bfloat16(), nets, weights, p, size=24)
    x, x_prime, u = torch.randn(2, 3, 16, 16), torch.randn(2, 3, 16, 16).requires_grad_(), torch.rand(2, 4)
    assert distance(x, x, u)[0] == 0
    loss, raw = distance(x_prime, x, u)
    (gradient,) = torch.autograd.grad(loss, x_prime)
    a, b = (biflow.random_resized_crop(images.sin().bfloat16().float(), u, 24) for images in (x_prime, x))
    f, g = (torch.tanh((images.mean((2, 3)) / 2 + 0.5 - mean) / std) for images in (a, b))
    lpips = nets["lpips"].weight.item() ** 2 * (a - b).square().mean((1, 2, 3))
    expected = {"lpips": lpips, "convnext": (f - g).square().sum(1)}
    close(raw, {name: d.detach() for name, d in expected.items()}, 1e-4)
    expected = sum(weights[name] * (d * (d.detach() + 0.01) ** -p).mean() for name, d in expected.items())
    close((loss, gradient), (expected, torch.autograd.grad(expected, x_prime)[0]), 1e-4)
    assert len(decoded) == 2 + 3  # once more in the backward pass: the decoder's activations are not kept
    assert not any(p.requires_grad for p in distance.parameters())
    assert not any(network.training for network in distance.nets.modules())


# ---- precision, and what else it takes to run the networks -----------------------------------------------------------
@torch.no_grad()
def all_outputs(flow, model, bf16, device=CPU):
    """What F and G make of four images or their noise, in every way; a list of tensors."""
    z, y, w = (x.to(device) for x in inputs())
    z = z * 0 + torch.linspace(-2, 2, z.numel(), device=device).view_as(z)
    with autocast(device, bf16):
        states, logdet = flow(unpatchify(z, 2), y)
        x, predictions = model(z, y, w)
        out = [*states, logdet, flow.inverse(z, y), flow.inverse(z, y, 1.0), flow.inverse_jacobi(z, y, 1.0, 0.0)]
        return [*out, x, *predictions.values(), model.sample(z, y, w), model.sample_two_pass(z, y, w)]


@pytest.mark.parametrize("bf16, compiled", [(True, False), pytest.param(False, True, marks=pytest.mark.slow)])
def test_precision_of_frozen_networks(bf16, compiled):
    # bf16 errs by up to 0.4% in each product; we allow 3% of the largest value. Weights stored in it add no error.
    if compiled and not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("torch.compile needs a C++ compiler")
    torch.compiler.reset()
    flow, model = (make(cls, blocks=2, layers=1) for cls in (TARFlow, BiFlow))
    expected = all_outputs(flow, model, bf16)
    for a, b in zip(expected, all_outputs(flow, model, bf16=False)):
        assert a.dtype == torch.float32
        assert (a - b).abs().max() < 0.03 * b.abs().max()
    assert torch.equal(a, b) != bf16
    names = [flow.state_dict().keys(), model.state_dict().keys()]
    for network in (flow, model):
        biflow.freeze(network, CPU, bf16, compiled)
        assert not network.training and not any(p.requires_grad for p in network.parameters())
    assert flow.blocks[0].proj_in.weight.dtype == (torch.bfloat16 if bf16 else torch.float32)
    assert flow.blocks[0].proj_out.weight.dtype == torch.float32
    assert [flow.state_dict().keys(), model.state_dict().keys()] == names
    close(all_outputs(flow, model, bf16), expected, 1e-4 if compiled else 0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and BIFLOW_TEST_CUDA in the environment")
@pytest.mark.parametrize("bf16, tolerance", [(False, 1e-3), (True, 0.05)])
def test_precision_on_a_gpu_of_compiled_networks(bf16, tolerance):
    torch.compiler.reset()
    flow, model, device = make(TARFlow), make(BiFlow), torch.device("cuda")
    expected = all_outputs(flow, model, False)
    for network in (flow, model):
        biflow.freeze(network, device, bf16, True)
    for a, b in zip(all_outputs(flow, model, bf16, device), expected):
        assert (a.cpu() - b).abs().max() < tolerance * b.abs().max()


class Trace(TorchDispatchMode):
    """Counts the bytes that live on after each operation, and lists those that would wait for a GPU, since they read a
    value, make a shape of one, or copy between devices."""

    WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "is_nonzero"}

    def __init__(self):
        super().__init__()
        self.live, self.known, self.waits, self.count = 0, set(), [], 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        given, made = ([x for x in tree_leaves(v) if isinstance(x, torch.Tensor)] for v in ((args, kwargs), out))
        name = op.overloadpacket.__name__
        by_mask = name.startswith("index") and any(x.dtype == torch.bool for x in given)
        if name in self.WAITS or by_mask or len({x.device for x in given + made}) > 1:
            self.waits.append(name)
        for storage in (x.untyped_storage() for x in made):
            if storage._cdata not in self.known:
                self.known.add(storage._cdata)
                self.live += storage.nbytes()
                weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
        self.count += 1
        return out

    def free(self, key, size):
        self.known.remove(key)
        self.live -= size


@pytest.fixture
def cuda(monkeypatch):
    """A CUDA device that need not exist: its tensors have shapes but no numbers, and autocast follows its rules."""
    flash = torch.ops.aten._scaled_dot_product_flash_attention
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda *args, **kwargs: True)
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention",
        lambda q, k, v, is_causal=False: flash(q.bfloat16(), k.bfloat16(), v.bfloat16(), 0.0, is_causal)[0],
    )  # fmt: skip
    with FakeTensorMode(), torch.device("cuda:0") as device:
        try:
            nn.Linear(1, 1)
        except RuntimeError as error:
            assert "driver" in str(error)
            pytest.skip("this version's fake tensors need a driver")
        yield device


def stage(cls, config, n, bf16):
    """A network with its stage's loss of a random batch, as a function; perceptual terms by small networks."""
    x = torch.randn(n, config.channels, config.img_size, config.img_size)
    numbers = map(torch.rand, (n, (n, 2), (n, 4), (n, 6)))
    batch = train_forward.Batch(x, torch.randn_like(x), torch.zeros(n).long(), *numbers)
    args, model = SimpleNamespace(**vars(ARGS) | dict(bf16=bf16)), cls(config)
    if cls is TARFlow:
        return model, lambda: train_forward.forward_loss(model, batch, args)
    flow, decode = (net.requires_grad_(False) for net in (TARFlow(config), nn.Conv2d(config.channels, 3, 3, padding=1)))
    perceptual = biflow.PerceptualDistance(decode, {"lpips": FakeLPIPS(1, 1)}, {"lpips": 1.0}, size=24)
    return model, lambda: train_reverse.stage_2_loss(model, batch, flow, perceptual, args)


# What B with one block of one layer keeps for its backward pass, MiB an image; of G it is two, with the denoise block.
@pytest.mark.parametrize("cls, limit", [(TARFlow, 4.0), (BiFlow, 14.5)])
def test_precision_on_cuda_of_both_losses_and_their_memory(cls, limit, cuda):
    kept = {}
    for n in (2, 4):
        _, loss_of = stage(cls, replace(SIZES["B"], blocks=1, layers=1), n, True)
        with Trace() as trace:
            loss, values = loss_of()
            kept[n] = trace.live / 2**20
        assert loss.dtype == torch.float32 and not trace.waits
        del loss, values
    assert 0.9 * limit < (kept[4] - kept[2]) / 2 < limit


def test_precision_on_cuda_sampling_never_waits(cuda):
    flow, model, z, y = TARFlow(SMALL), BiFlow(SMALL), torch.randn(2, T, D), torch.zeros(2).long()
    with Trace() as trace, autocast(cuda, True):
        out = [flow.blocks[0](z, y)[0], model.sample(z, y, 0.5), model.sample_two_pass(z, y, 0.5)]
    assert not trace.waits and all(x.dtype == torch.float32 for x in out)


@pytest.mark.parametrize(
    "cls, changes", [(TARFlow, {}), *((BiFlow, dict(strategy=s, denoise=d)) for s, d in STRATEGIES)]
)
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


def test_saving_asks_the_network_for_no_local_path_and_refuses_what_does_not_fit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(TARFlow).save_pretrained("run")
    asked = []
    monkeypatch.setattr("biflow.snapshot_download", lambda name, **options: asked.append((name, options)) or "run")
    assert TARFlow.from_pretrained("user/name", revision="v1").config == SMALL
    two = ["config.json", "model.safetensors"]  # and no checkpoints
    assert asked == [("user/name", dict(revision="v1", allow_patterns=two))]
    with pytest.raises(RuntimeError, match="Missing key"):
        BiFlow.from_pretrained("run")
    config, whole = (Path("run", name).read_bytes() for name in ("config.json", "model.safetensors"))
    for error, change in {TypeError: dict(depth=3), RuntimeError: dict(blocks=2), ValueError: dict(clip=0)}.items():
        Path("run/config.json").write_text(json.dumps(json.loads(config) | change))
        with pytest.raises(error):
            TARFlow.from_pretrained("run")
    Path("run/config.json").write_bytes(config)
    for damaged in (b"", whole[:100], whole[:-1]):
        Path("run/model.safetensors").write_bytes(damaged)
        with pytest.raises(SafetensorError):
            TARFlow.from_pretrained("run")
    Path("run/model.safetensors").unlink()
    for name in (tmp_path / "nothing", "nothing", "./nothing", "run/nothing", "run"):
        with pytest.raises(FileNotFoundError):
            TARFlow.from_pretrained(name)


# ======================================================================================================================
# The scripts. `toy` is a folder in which all of them have run; tests that change a run copy it

FOLDER = Path(biflow.__file__).parent
README = (FOLDER / "README.md").read_text()
SCRIPTS = {"train_forward": train_forward, "train_reverse": train_reverse, "sample": sample, "fid": fid}
TINY = "--steps 4 --batch-size 4 --save-every 2 --log-every 1"
ARGS = SimpleNamespace(sigma=0.1, label_drop=0.5, denoise="learned", w_max=3.0, adaptive_p=1.0, trajectory_norm=True)
ARGS.bf16 = ARGS.compile = False


class Killed(BaseException):
    """In place of SIGKILL: nothing in the scripts catches it."""


def kill(*_):
    raise Killed


def at_calls(patch, module, name, numbers, action):
    """Have some calls of a function, counted from 1, do action(*args) before, and instead if that returns something."""
    original, counter = getattr(module, name), itertools.count(1)

    def function(*args):
        value = action(*args) if next(counter) in numbers else None
        return original(*args) if value is None else value

    patch.setattr(module, name, function)


def run(script, line):
    sample.run_script(lambda: script.main(line.split()))


def refusal(capsys, script, line):
    """The one line with which a script refuses a command line; the exit status is 2."""
    with pytest.raises(SystemExit) as end:
        run(script, line)
    assert end.value.code == 2
    (message,) = re.findall("error: (.*)", capsys.readouterr().err)
    return message


def torchrun(n, script, line):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n), str(script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *line.split()], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder):
    """The loss and the norm of the gradient, by step."""
    return {line["step"]: [line["loss"], line["grad_norm"]] for line in metrics(folder) if "loss" in line}


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


def draw_images(folder, n, side=20):
    folder.mkdir(parents=True)
    for i, image in enumerate(np.random.default_rng(n).integers(0, 256, (n, side, side, 3), dtype=np.uint8)):
        Image.fromarray(image).save(folder / f"{i:02d}.png")


def load(line):
    """The data set of a stage 1 command line."""
    parser = train_forward.shared_flags("")
    args = train_forward.parse_args(parser, train_forward.PRESETS, ["--patch-size", "2", *line.split()])
    return train_forward.load_data(args, CPU)


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


# ---- train -----------------------------------------------------------------------------------------------------------
def test_train_without_arguments_lowers_every_error_and_the_bar_shows_it(toy):
    files = {"checkpoint.prev.pt", "real.pt", "curves.png", "samples-0000030.png"}
    errors = [f"val_error_{name}" for name in ("x", "x0", "x1", "x2", "x3")]
    for name, values in {"forward-toy": ["val_nll"], "reverse-toy": errors}.items():
        assert files <= {path.name for path in (toy / "runs" / name).iterdir()}
        first, *_, last = [line for line in metrics(toy / "runs" / name) if values[0] in line]
        assert all(last[value] < first[value] for value in values)
    line = "digits: 1345 images and 150 for validation, side 8, VAE none, 10 classes, jitter; 0.7 epochs on 1"
    assert line in (toy / "train_forward.txt").read_text()
    shown = [float(value) for value in re.findall(r"error_x ([\d.]+), ", (toy / "train_reverse.txt").read_text())]
    assert len(shown) >= 6 and shown[-1] < 0.5 * shown[0]


def test_train_a_seed_decides_the_weights_and_neither_thread_nor_workers_do(tmp_path, monkeypatch):
    line, handler = f"{TINY} --fresh --out {tmp_path / 'run'}", signal.getsignal(signal.SIGTERM)
    run(train_forward, f"{line} --seed 1")
    thread = threading.Thread(target=run, args=(train_forward, line))
    thread.start()
    thread.join()
    run(train_forward, line)
    spawn = multiprocessing.get_context("spawn")  # as on macOS and Windows
    monkeypatch.setattr("multiprocessing.context._default_context._actual_context", spawn)
    run(train_forward, f"{line} --num-workers 1")
    other, *same = (weights(folder) for folder in [*sorted(tmp_path.glob("run.old-*")), tmp_path / "run"])
    assert same[0] == same[1] == same[2] != other
    assert signal.getsignal(signal.SIGTERM) is handler  # given back


def test_train_an_epoch_has_every_image_once_and_numbers_that_are_uniform_and_independent():
    digits = load_digits()
    assert len(digits.fit) == 1345 and len({*digits.fit, *digits.val, *digits.test}) == 1797
    batches = Batches(replace(digits, labels=np.arange(1797)), 269, seed=0)  # five are an epoch
    first, second = ([batches[step] for step in range(start, start + 5)] for start in (0, 5))
    orders = [np.concatenate([batch.y for batch in epoch]) for epoch in (first, second)]
    assert sorted(orders[0]) == sorted(orders[1]) == digits.fit.tolist()
    assert not np.array_equal(*orders)
    columns = ("drop", "guidance", "crop", "jitter")
    u = np.concatenate([np.column_stack([getattr(batch, name) for name in columns]) for batch in first + second])
    assert u.min() >= 0 and u.max() <= 1
    assert abs(u.mean(0) - 0.5).max() < 0.03
    assert abs(np.corrcoef(u, rowvar=False) - np.eye(13)).max() < 0.08
    assert abs(first[0].eps.std() - 1) < 0.02
    assert not any(isinstance(x, torch.Tensor) for x in first[0])  # which workers send through shared memory


@pytest.mark.slow
@pytest.mark.parametrize("script", [train_forward, train_reverse], ids=["1", "2"])
def test_train_a_killed_run_ends_as_if_it_was_not_and_with_two_processes_too(toy, tmp_path, script, monkeypatch):
    # On one process bit for bit. On two, with an uneven batch in micro-batches, the same losses and the same average.
    flow = f"--forward {toy / 'runs/forward-toy'} --features 0.1" if script is train_reverse else ""
    line = f"--steps 8 --batch-size 15 --save-every 3 --log-every 1 --lr 1e-3 --warmup 2 {flow} --out {tmp_path}"
    run(script, f"{line}/whole")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        at_calls(patch, train_forward, "update", [6], kill)
        run(script, f"{line}/one")
    torchrun(2, script.__file__, f"{line}/two --resume {tmp_path / 'one/checkpoint.pt'} --micro-batch 3")
    run(script, f"{line}/one --save-every 4 --patch-size 2 --img-size 8 --vae none")  # which do not alter the model
    assert weights(tmp_path / "one") == weights(tmp_path / "whole")
    whole = losses(tmp_path / "whole")
    assert losses(tmp_path / "one") == whole and list(whole) == list(range(1, 9))
    two = losses(tmp_path / "two")
    assert list(two) == list(range(4, 9))
    np.testing.assert_allclose(list(two.values()), [whole[step] for step in two], rtol=1e-5, atol=1e-5)
    whole, two = (sample.load_run(tmp_path / name)[0].state_dict() for name in ("whole", "two"))
    torch.testing.assert_close(two, whole, rtol=1e-3, atol=1e-4)


def test_train_goes_on_from_any_moment_of_a_save(tmp_path, monkeypatch):
    run(train_forward, f"{TINY} --out {tmp_path / 'whole'}")
    for moment in itertools.count(1):
        out = tmp_path / str(moment)
        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            at_calls(patch, os, "replace", [moment], kill)
            run(train_forward, f"{TINY} --out {out}")
            break
        run(train_forward, f"{TINY} --out {out}")
        assert weights(out) == weights(tmp_path / "whole"), moment
        assert json.loads((out / "run.json").read_text())["step"] == 4, moment
    assert moment > 8


def test_train_survives_a_full_disk_and_a_damaged_checkpoint(tmp_path, monkeypatch, capsys):
    def full(content, file):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    line, checkpoint = f"{TINY} --out {tmp_path}", tmp_path / "parts/checkpoint.pt"
    run(train_forward, f"{line}/whole")
    with monkeypatch.context() as patch:
        at_calls(patch, torch, "save", [3], full)  # after real.pt and step 2
        assert "No space left" in refusal(capsys, train_forward, f"{line}/parts")
    for _ in ("then", "damaged"):
        run(train_forward, f"{line}/parts")
        assert "going on from step 2 of 4" in capsys.readouterr().out
        assert weights(tmp_path / "parts") == weights(tmp_path / "whole")
        checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    checkpoint.with_name("checkpoint.prev.pt").unlink()
    assert "no checkpoint that loads" in refusal(capsys, train_forward, f"{line}/parts")
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")


@pytest.mark.slow
def test_train_is_alone_in_its_folder_survives_sigkill_and_ends_by_a_signal_in_one_line(tmp_path, capsys):
    # Ctrl-C in a terminal and a scheduler's SIGTERM reach the processes of the data loader, too.
    line = f"--batch-size 4 --schedule constant --save-every 3 --log-every 1 --out {tmp_path}"
    command = [sys.executable, train_forward.__file__, *f"{line}/run --steps 100000 --num-workers 2".split()]
    log, rng, logged = tmp_path / "run/metrics.jsonl", np.random.default_rng(0), 0
    for number in (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
        while process.poll() is None and (not log.exists() or log.read_text().count("\n") <= logged):
            time.sleep(0.1)
        for fresh in ("", "--fresh"):
            assert "another process" in refusal(capsys, train_forward, f"{line}/run --steps 100000 {fresh}")
        time.sleep(rng.uniform(0, 1))
        os.killpg(process.pid, number)
        said, _ = process.communicate(timeout=300)
        logged = log.read_text().count("\n")
        if number != signal.SIGKILL:
            assert process.returncode == 128 + number
            assert said.count(b"stopped at step") == 1 and b"Traceback" not in said
    step = torch.load(tmp_path / "run/checkpoint.pt")["step"]
    run(train_forward, f"{line}/whole --steps {step}")
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    run(train_reverse, f"{TINY} --forward {tmp_path / 'run'} --out {tmp_path / 'reverse'}")
    assert f"is not finished: step {step} of 100000" in capsys.readouterr().out


def test_train_skips_steps_with_a_non_finite_gradient_and_ends_after_five_in_a_row(tmp_path, monkeypatch, capsys):
    def run_with_nan_in(steps, line):
        with monkeypatch.context() as patch:
            at_calls(patch, train_forward, "nll_loss", steps, lambda *args: biflow.nll_loss(*args) * math.nan)
            run(train_forward, f"--batch-size 4 --log-every 1 --out {tmp_path}/{line}")

    run_with_nan_in([4], "a --steps 4 --save-every 1")
    before, after = (torch.load(tmp_path / "a" / name) for name in ("checkpoint.prev.pt", "checkpoint.pt"))
    close(after["model"], before["model"], 0)
    close(after["optimizer"]["state"], before["optimizer"]["state"], 0)
    assert (before["step"], before["skipped"], after["step"], after["skipped"]) == (3, 0, 4, 1)
    run_with_nan_in([2, 3, 4, 5, 7], "b --steps 8")  # four in a row do not end a run
    logged = [(line["step"], line["skipped"]) for line in metrics(tmp_path / "b") if "loss" in line]
    assert logged == [(1, 0), (6, 4), (8, 5)]
    with pytest.raises(SystemExit):
        run_with_nan_in(range(3, 99), "c --steps 20 --save-every 2")
    assert "step 7: five gradients in a row" in capsys.readouterr().err
    assert all(value.isfinite().all() for value in TARFlow.from_pretrained(tmp_path / "c").state_dict().values())


def test_train_one_step_by_hand(tmp_path):
    # AdamW's first step moves each number by lr, but for those without a gradient. Embeddings and vectors do not decay.
    run(train_forward, f"--steps 1 --warmup 4 --lr 0.04 --weight-decay 2 --batch-size 8 --out {tmp_path / 'run'}")
    config, state = TARFlow.from_pretrained(tmp_path / "run").config, torch.load(tmp_path / "run/checkpoint.pt")
    torch.manual_seed(0)
    for name, p in TARFlow(config).named_parameters():
        decay = 0.01 * 2 if p.ndim == 2 and "embed" not in name else 0.0
        step = (state["model"][name] - p * (1 - decay)).abs()
        assert ((step < 1e-6) | ((step - 0.01).abs() < 1e-4)).all()
        close(state["ema"][name], 0.1 * p.data + 0.9 * state["model"][name], 1e-6)  # short runs forget their start


def test_train_drops_the_labels_of_F_in_stage_1_and_of_G_alone_in_stage_2():
    flow, model, seen = TARFlow(SIZES["toy"]), BiFlow(SIZES["toy"]), []
    for network in (flow, model):
        network.register_forward_pre_hook(lambda _, args: seen.append(args))
    batch = to_device(Batches(load_digits(), 400, 0)[0], CPU)
    train_reverse.stage_2_loss(model, batch, flow, None, ARGS)
    (x, true), (_, y, w) = seen
    assert torch.equal(x, batch.x + 0.1 * batch.eps) and torch.equal(true, batch.y)
    assert 0.4 < (y == -1).float().mean() < 0.6 and torch.equal(y[y >= 0], true[y >= 0])
    _, w = model.conditions(torch.zeros(len(y)), y, w)  # as G takes it
    assert (w[y == -1] == 0).all()
    assert 0.35 < (w[y >= 0] == 0).float().mean() < 0.65 and 2 < w.max() <= 3 and w.min() == 0
    train_forward.forward_loss(flow, batch, ARGS)
    assert torch.equal(seen[-1][0], x) and torch.equal(seen[-1][1], y)
    noisy = SimpleNamespace(**vars(ARGS) | dict(denoise="none"))  # where no block denoises, x' is x~
    assert torch.equal(train_reverse.trajectory(flow, batch.x, batch.eps, true, noisy)[1], x)


@pytest.mark.parametrize("num_classes", [0, 2])
def test_train_the_inverse_of_a_published_flow_by_the_notebook(num_classes, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    published = TARFlow(Config(64, 3, 16, num_classes, width=64, blocks=2, layers=1, clip=None))
    for block in published.blocks:
        nn.init.normal_(block.proj_out.weight, std=0.01)
    torch.save(published.state_dict() | {"var": torch.ones(16, 768)}, "imagenet64.pth")
    notebook = (FOLDER / ".github/results.md").read_text()
    (code,) = re.findall(r"```python\n(import json.*?)```", notebook, re.DOTALL)
    code = code.replace("IMAGENET/train", str(photos))
    exec(re.sub(r"biflow.Config\(.*\)  #", "published.config  #", code), dict(published=published))
    run(train_reverse, "--size S --forward runs/tarflow --out runs/G --steps 2 --batch-size 2")
    run(sample, "runs/tarflow --n 2")
    run(sample, "runs/G --n 2")
    sampler, z, y = Sampler.load("runs/G", CPU, ARGS), torch.randn(2, 16, 768), torch.tensor([0, 1])
    close(sampler("exact", z, y), published.inverse(z, y), 1e-6)
    assert torch.equal(sampler("biflow", z, y), sampler("biflow", z, 1 - y)) == (num_classes == 0)


# ---- data ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name, augment", [("mnist", "jitter"), ("fashion-mnist", "none"), ("cifar10", "mirror")])
def test_data_of_torchvision_keep_its_pixels_labels_and_test_split(name, augment, tmp_path, monkeypatch, capsys):
    # In place of its classes, which read or download the files, one of 40 training and 20 test images.
    shape = (60, 32, 32, 3) if name == "cifar10" else (60, 28, 28)
    images, labels = np.random.default_rng(0).integers(0, 256, shape, np.uint8), np.arange(60) % 10

    class Part(list):
        classes = ["0 - zero", "one"]

        def __init__(self, root, train, download):
            part = slice(40) if train else slice(40, 60)
            super().__init__(labels[part])
            self.data, self.targets = images[part], labels[part]

    kind = f"torchvision.datasets.{train_forward.TORCHVISION[name]}"
    monkeypatch.setattr(kind, Part)
    found = load_torchvision(name, tmp_path)
    assert np.array_equal(found.array, images.transpose(0, 3, 1, 2) if name == "cifar10" else images[:, None])
    assert np.array_equal(found.labels, labels) and found.info["classes"] == ["0", "one"]
    assert found.test.tolist() == list(range(40, 60)) and found.augment == augment
    assert sorted([*found.fit, *found.val]) == list(range(40)) and len(found.val) == 4
    monkeypatch.setattr(Part, "__init__", lambda *args, **options: 1 / 0)  # no network, or a damaged file
    assert f"cannot load {name}; put the files" in refusal(capsys, train_forward, f"--data {name} --out {tmp_path}/r")


def test_data_jitter_is_the_affine_map_that_its_numbers_say():
    # Against a smooth image whose values are known at every point, on a grid of pixel centres in [-1, 1]^2.
    def blob(x, y):
        return torch.exp(-12 * ((x - 0.1) ** 2 + 2 * (y + 0.1) ** 2)) - 1

    y, x = torch.meshgrid(*[(torch.arange(128) + 0.5) / 64 - 1] * 2, indexing="ij")
    u = torch.cat([torch.full((1, 6), 0.5), torch.rand(20, 6, generator=torch.Generator().manual_seed(0))])
    a, b, s, c, d, t = ((2 * u - 1) * torch.tensor([0.05, 0.05, 0.03, 0.05, 0.05, 0.03])).T[..., None, None]
    expected = blob(x + a * x + b * y + s, y + c * x + d * y + t)
    close(jitter(blob(x, y).expand(21, 1, -1, -1), u)[:, 0], expected, 5e-3)


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    draw_images(root / "class0", 20, 60)
    draw_images(root / "class1", 20, 80)
    return root


@pytest.fixture(scope="session")
def vae(tmp_path_factory):
    """A small random AutoencoderKL, saved as diffusers saves it: 8-fold smaller, 4 channels."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    folder, kinds = tmp_path_factory.mktemp("vae"), dict(block_out_channels=[4] * 4, norm_num_groups=2)
    kinds |= dict(down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4)
    diffusers.AutoencoderKL(**kinds).save_pretrained(folder)
    return str(folder)


def test_data_are_jittered_or_half_of_them_mirrored_while_learning_and_themselves_in_validation(photos, tmp_path):
    digits, folder = load_digits(), load(f"--data {photos} --img-size 8 --out {tmp_path / 'run'}")
    for source in (digits, folder):
        batch = next(iter(validation_batches(replace(source, labels=np.arange(1797)), CPU)))
        assert np.array_equal(batch.x[:50], source.prepare(source.array[batch.y[:50]], False, None))
    batches = Batches(digits, 8, seed=0)
    for x, source in zip(batches[0].x, batches.order(0)):
        assert 0.01 < abs(x - digits.array[source]).mean() < 0.2 and abs(x).max() <= 1
    batch, mirrored = Batches(replace(folder, labels=np.arange(40)), 400, seed=0)[0], 0
    for x, i in zip(batch.x, batch.y):
        whole = folder.array[i] / np.float32(127.5) - 1
        assert np.array_equal(x, whole) or np.array_equal(x, whole[:, :, ::-1])
        mirrored += not np.array_equal(x, whole)
    assert 150 < mirrored < 250


def test_data_are_mirrored_by_default_or_not_and_so_in_stage_2(photos, tmp_path, capsys):
    line = f"{TINY} --data {photos} --img-size 8 --out {tmp_path}"
    run(train_forward, f"{line}/f --no-mirror")
    assert ", 2 classes, none; 0.4 epochs on 1" in capsys.readouterr().out
    run(train_forward, f"{line}/f --no-mirror")  # goes on
    assert "mirror: False there, True now" in refusal(capsys, train_forward, f"{line}/f")
    run(train_reverse, f"{TINY} --forward {tmp_path}/f --out {tmp_path}/r")
    assert [json.loads((tmp_path / name / "run.json").read_text())["mirror"] for name in "fr"] == [False, False]
    line = f"{TINY} --forward {tmp_path}/f --out {tmp_path}/other"
    assert "--mirror is the flow's, False" in refusal(capsys, train_reverse, f"{line} --mirror")
    shutil.rmtree(next(tmp_path.glob("cache-*")))
    run(train_reverse, line)  # makes the cache again
    assert len(list(tmp_path.glob("cache-*"))) == 1


def test_data_folder_is_scanned_for_images_and_classes(tmp_path):
    root = tmp_path / "photos"
    for name in ("cat", "dog", "dog/puppies", ".ipynb_checkpoints", "../elsewhere"):
        draw_images(root / name, 2)
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    for name in ("cat/notes", "cat/.hidden.png", "cover.png"):
        (root / name).touch()
    files, labels, classes = list_images(root)
    assert classes == ["cat", "dog", "linked"] and labels == [0, 0, 1, 1, 1, 1, 2, 2]
    assert [str(path.relative_to(root)) for path in files[:3]] == ["cat/00.png", "cat/01.png", "dog/00.png"]


@pytest.mark.parametrize("n, drawn, labels", [(0, "", [-1] * 3), (1, "", [-1] * 3), (12, "--classes 2,11", [4, 3, 4])])
def test_data_classes_are_the_folders_in_the_order_of_text_and_one_is_none(n, drawn, labels, tmp_path, capsys):
    for name in range(n) or ".":
        draw_images(tmp_path / "photos" / str(name), 2)
    run(train_forward, f"{TINY} --data {tmp_path / 'photos'} --img-size 8 --out {tmp_path / 'f'}")
    run(train_reverse, f"{TINY} --forward {tmp_path / 'f'} --out {tmp_path / 'r'}")
    run(sample, f"{tmp_path / 'r'} --n 3 {drawn} --npz {tmp_path / 'a.npz'}")
    assert np.load(tmp_path / "a.npz")["arr_1"].tolist() == labels
    assert (BiFlow.from_pretrained(tmp_path / "r").config.num_classes == 0) == (not drawn)
    if not drawn:
        assert "no classes, and so no guidance" in refusal(capsys, sample, f"{tmp_path / 'r'} --guidance 0.5")
        line = f"{TINY} --forward {tmp_path / 'f'} --features 1"
        assert "--features is for" in refusal(capsys, train_reverse, line)


def test_data_cache_holds_the_images_that_can_be_read_and_changes_with_them(photos, tmp_path, capsys):
    copy = shutil.copytree(photos, tmp_path / "photos")
    line, files, good = f"--img-size 16 --out {tmp_path / 'run'}", sorted(copy.rglob("*.png")), {*range(40)} - {3, 39}
    files[3].write_bytes(files[3].read_bytes()[:500])
    files[39].write_bytes(b"")
    (copy / "manifest.json").write_text("{}")  # not that of a cache
    found = load(f"--data {copy} {line} --num-workers 2")
    assert "2 images cannot be read" in capsys.readouterr().out
    assert (Path(found.info["cache"]) / "damaged.txt").read_text().splitlines() == [str(files[i]) for i in (3, 39)]
    assert {*found.fit, *found.val} == good and not {*found.fit} & {*found.val}
    assert all(np.array_equal(found.array[i], read_image(files[i], 16)) for i in good)
    assert found.labels.tolist() == [0] * 20 + [1] * 20 and found.info["classes"] == ["class0", "class1"]
    assert load(f"--data {copy}/../photos/ {line}").info == found.info
    Image.new("RGB", (20, 20), "red").save(files[5])
    assert (load(f"--data {copy} {line}").array[5, 0] == 255).all()


def test_data_of_a_vae_are_its_posterior_normalised_also_if_the_build_was_killed(photos, vae, tmp_path):
    # Against diffusers used directly. A kill in the 2nd batch of 32 costs 8 images.
    from diffusers import AutoencoderKL

    line, read = f"--data {photos} --img-size 64 --vae {vae} --out {tmp_path / 'run'}", []
    for numbers, action in (([35], kill), (range(99), lambda path, size: read.append(path))):
        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Killed):
            at_calls(patch, train_forward, "read_image", numbers, action)
            latents = load(line)
    assert len(read) == 8
    net = AutoencoderKL.from_pretrained(vae).eval().requires_grad_(False)
    images = torch.stack([torch.tensor(read_image(path, 64)) for path in sorted(photos.rglob("*.png"))]) / 127.5 - 1
    posteriors = [net.encode(x).latent_dist for x in (images, images.flip(3))]
    expected = torch.stack([torch.stack([posterior.mean, posterior.logvar], 1) for posterior in posteriors], 1)
    close(torch.from_numpy(latents.array.astype(np.float32)), expected, 2e-3)
    rng = np.random.default_rng(0)
    drawn = np.stack([latents.prepare(latents.array[i // 2 % 40], i % 2, rng) for i in range(2400)])
    np.testing.assert_allclose([drawn.mean((0, 2, 3)), drawn.std((0, 2, 3))], [[0] * 4, [1] * 4], atol=0.03)
    ours = load_vae(latents.info, CPU)
    close(ours.encode(images), (posteriors[0].mean - ours.mean) / ours.std, 1e-4)
    close(ours.decode((posteriors[0].mean - ours.mean) / ours.std), net.decode(posteriors[0].mean).sample, 1e-4)


def test_data_of_a_vae_know_it_by_its_files(photos, vae, tmp_path, capsys, monkeypatch):
    # Not by how its path is spelled. A VAE that lacks weights or gives infinite latents is named.
    from safetensors.torch import load_file, save_file

    monkeypatch.chdir(tmp_path)
    file = shutil.copytree(vae, "vae") / Path("diffusion_pytorch_model.safetensors")
    line = f"--data {photos} --img-size 64 --out r --vae"
    latents = [load(f"{line} {name}") for name in ("vae", "./vae/")]
    assert latents[0].info == latents[1].info and latents[0].info["vae"] == str(tmp_path / "vae")
    monkeypatch.chdir("/")
    assert load_vae(latents[0].info, CPU).net.config.latent_channels == 4
    monkeypatch.chdir(tmp_path)
    assert "is of --vae none" in refusal(capsys, train_forward, f"{line} vae --data digits")
    line_of_cache = f"--data {latents[0].info['cache']} --vae {vae}"
    assert f"is of --vae {tmp_path / 'vae'}" in refusal(capsys, train_forward, line_of_cache)
    state = {name: value.clone() for name, value in load_file(file).items()}  # not mapped from what is written over
    save_file(state | {"quant_conv.weight": state["quant_conv.weight"] * 1e9}, file)
    assert f"VAE {tmp_path / 'vae'} gives latents that are not finite" in refusal(capsys, train_forward, f"{line} vae")
    save_file({name: value for name, value in state.items() if "up_blocks.0" not in name}, file)
    assert "weights of an AutoencoderKL" in refusal(capsys, train_forward, f"{line} vae")


def test_data_caches_with_gaps_and_links_that_loop(photos, tmp_path, capsys):
    copy = shutil.copytree(photos, tmp_path / "photos")
    (copy / "class0/loop").symlink_to(copy)
    (copy / "class0/gone.png").symlink_to("nowhere")
    assert "gone.png: No such file" in refusal(capsys, train_forward, f"--data {copy} --out {tmp_path / 'run'}")
    (copy / "class0/gone.png").unlink()
    os.rename(os.fsencode(copy / "class1/07.png"), os.fsencode(copy / "class1") + b"/caf\xe9.png")  # no UTF-8
    Path(os.fsdecode(os.fsencode(copy / "class1") + b"/caf\xe9.png")).write_bytes(b"")
    found = load(f"--data {copy} --img-size 8 --out {tmp_path / 'run'}")
    assert len(found.labels) == 40 and len(found.fit) + len(found.val) == 39
    assert b"caf\xe9.png" in (Path(found.info["cache"]) / "damaged.txt").read_bytes()
    done = np.load(Path(found.info["cache"]) / "done.npy", mmap_mode="r+")
    done[3:6] = 0
    done.flush()
    line = f"--data {found.info['cache']} --out {tmp_path / 'run'}"
    assert "it lacks 3 images" in refusal(capsys, train_forward, line)


def test_data_images_of_every_kind_are_read(tmp_path):
    sideways = Image.new("RGB", (30, 40), "black")
    sideways.paste("white", (0, 0, 30, 20))  # the upper half; orientation 6 turns it to the right
    exif = sideways.getexif()
    exif[0x0112] = 6
    sideways.save(tmp_path / "exif.jpg", exif=exif, quality=95)
    Image.new("RGB", (40, 30), (250, 10, 20)).convert("P").save(tmp_path / "palette.png")
    Image.new("RGBA", (40, 40), (250, 10, 20, 0)).save(tmp_path / "clear.png")
    Image.fromarray(np.full((40, 40), 40_000, np.uint16)).save(tmp_path / "grey16.png")
    Image.new("RGB", (20_000, 1), "red").save(tmp_path / "strip.png")
    read = {path.stem: read_image(path, 16).astype(int) for path in tmp_path.iterdir()}
    assert read["strip"].shape == (3, 16, 16) and (read["strip"][0] == 255).all()
    Image.fromarray(np.full((40, 40), 4000, np.uint16)).save(tmp_path / "grey12.png")
    with pytest.warns(UserWarning, match="12 bits in 16"):
        assert (read_image(tmp_path / "grey12.png", 16) == 15).all()
    assert abs(read["palette"] - [[[255]], [[0]], [[0]]]).max() <= 51  # the palette's steps
    assert (read["clear"] == 255).all() and abs(read["grey16"] - 156).max() <= 1
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
    return Sampler.load(toy / "runs/reverse-toy", CPU, ARGS)


def images(sampler, *args, **options):
    return torch.cat(list(sampler.draw(*args, **options)))


@pytest.mark.parametrize("method", sample.METHODS)
def test_sample_depends_on_method_seed_class_and_index_alone(sampler, method):
    flow, reverse, y, z = sampler.flow, sampler.reverse, torch.arange(6), sample_noise(0, range(6), sampler.config)
    draws = {"biflow": reverse.sample, "biflow-2nfe": reverse.sample_two_pass}
    x = draws.get(method.removesuffix("+score"), flow.inverse)(z, y, 0.5)
    x = flow.denoise(x, y, 0.1) if method.endswith("+score") else x
    whole = images(sampler, method, y, 0.5)
    close(whole, x, 1e-2 if method == "jacobi" else 1e-5)
    close(images(sampler, method, y[:5], 0.5, batch=2), whole[:5], 1e-3)
    assert not torch.allclose(images(sampler, method, y, 0.5, seed=1), whole)
    assert not torch.allclose(images(sampler, method, y + 1, 0.5), whole)
    assert abs(sample_noise(0, range(500), sampler.config).std() - 1) < 0.02


def test_sample_needs_two_files_and_a_run_and_writes_what_it_says(toy, tmp_path, sampler, capsys):
    heavy = ["diffusers", "lpips", "timm", "torch_fidelity", "sklearn", "torchvision", "matplotlib"]
    for name in ("biflow.py", "sample.py"):
        shutil.copy(FOLDER / name, tmp_path)
    shutil.copytree(toy / "runs/reverse-toy", tmp_path / "G")
    line = "G --n 7 --batch 4 --classes 3,8 --guidance 0 0.5 --seed 2 --out a.png --npz a.npz"
    code = f"import sys, sample; sample.main({line.split()}); assert not sys.modules.keys() & {heavy}"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": ""}, check=True)
    found, labels = np.load(tmp_path / "a.npz").values()
    assert labels.tolist() == [3, 8, 3, 8, 3, 8, 3]
    expected = to_uint8(images(sampler, "biflow", torch.from_numpy(labels), 0.5, seed=2)).permute(0, 2, 3, 1)
    assert found.dtype == np.uint8 and abs(found.astype(int) - expected.numpy().astype(int)).max() <= 1
    assert Image.open(tmp_path / "a.png").height == 3 * 42  # real, w = 0, w = 0.5: cells of 40 and a gap
    for line in ("--method exact", f"--edit {tmp_path / 'a.png'}", "--trajectory"):
        assert "flow" in refusal(capsys, sample, f"{tmp_path / 'G'} {line}")
    assert "flow" in refusal(capsys, fid, f"{tmp_path / 'G'} --speed")


def test_sample_the_shipped_weights_on_held_out_digits():
    # Right values: as measured when they were shipped. Then the README's snippet.
    folder = FOLDER / ".github/weights/reverse-mnist"
    sampler, real = Sampler.load(folder, CPU, ARGS), torch.load(folder / "real.pt")
    (noisy, *_, z), x, y = sampler.encode(real["x"], real["y"], 0), real["x"], real["y"]
    noisy = unpatchify(noisy, 4)
    assert -sampler.flow.log_prob(noisy, y).mean().item() / 784 == pytest.approx(-0.6706, abs=1e-3)
    close(sampler.flow.inverse(z, y), noisy, 1e-4)
    errors = (sampler.reverse.sample(z, y) - x).square().sum((1, 2, 3)) / x.square().sum((1, 2, 3))
    assert errors.mean().item() == pytest.approx(0.0201, abs=2e-4)
    (code,) = re.findall(r"```python\n(import torch, biflow\n.*?)```", README, re.DOTALL)
    exec(code.replace("runs/reverse-mnist", str(folder)), scope := {})
    assert scope["x"].shape == (4, 1, 28, 28)


def test_sample_runs_on_one_process_whatever_an_environment_has_left_over(toy, tmp_path, capsys, monkeypatch):
    code = "import sample; print(sample.RANK, sample.WORLD)"
    environment = os.environ | {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3"}
    said = subprocess.run([sys.executable, "-c", code], cwd=FOLDER, env=environment, capture_output=True, text=True)
    assert said.stdout == "0 1\n"
    monkeypatch.setattr(sample, "WORLD", 2)
    assert "one process" in refusal(capsys, sample, str(toy / "runs/reverse-toy"))


def test_sample_says_what_it_writes_and_shows_real_images_of_the_labels(toy, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    line = f"{toy / 'runs/reverse-toy'} --n 4 --classes 8,3 --guidance 0 0.5 --method biflow --seed {2**70}"
    run(sample, f"{line} --npz=~/a --out=~/图.png")
    assert f"a: 4 images of biflow w=0.5, seed {2**70}" in capsys.readouterr().out and (tmp_path / "图.png").exists()
    found = np.load(tmp_path / "a")
    assert found["arr_1"].tolist() == [8, 3, 8, 3]
    real = torch.load(toy / "runs/reverse-toy/real.pt")
    sampler, args = Sampler.load(toy / "runs/reverse-toy", CPU, ARGS), sample.parse(line.split())
    close(sample.samples(sampler, args)["real"], real["x"][[8, 3, 18, 13]], 0)
    run(train_forward, f"{TINY} --seed {2**70} --out=~/f")
    assert (tmp_path / "f/model.safetensors").exists()


def test_sample_warns_of_a_flow_that_changed(toy, tmp_path, capsys):
    runs = tmp_path / "runs"
    shutil.copytree(toy / "runs", runs)
    for warned in (False, True):
        Sampler.load(runs / "reverse-toy", CPU, ARGS)
        assert ("forward-toy is not the flow" in capsys.readouterr().out) == warned
        run(train_forward, f"{TINY} --fresh --seed 5 --out {runs / 'forward-toy'}")


@pytest.fixture
def digit(toy, tmp_path, monkeypatch):
    """A held-out 5 as the model sees it, (1, 1, 8, 8). Here it lies as an image, with a mask of two tokens."""
    monkeypatch.chdir(tmp_path)
    pixels = to_uint8(torch.load(toy / "runs/forward-toy/real.pt")["x"][5:6])
    Image.fromarray(pixels[0, 0].numpy()).save("five.png")
    mask = np.zeros((8, 8), np.uint8)
    mask[0, 0] = mask[7, 2] = 255  # a pixel of token 0 (top left), one of token 13 (bottom row, second)
    Image.fromarray(mask).save("mask.png")
    Image.merge("LA", [Image.new("L", (8, 8), "white"), Image.fromarray(mask)]).save("layer.png")  # on a clear one
    return pixels / 127.5 - 1


def test_sample_edit_keeps_the_noise_and_changes_the_class_or_what_is_under_the_mask(sampler, digit, monkeypatch):
    def edit(line):
        return sample.edit(sampler, sample.parse(f"x --edit five.png --from 5 --n 3 --seed 4 {line}".split()))

    rows = edit("--to 3 --method biflow --guidance 1")
    z = sampler.encode(digit.expand(3, -1, -1, -1), torch.tensor([5] * 3), 4)[-1]
    close(rows["input"], digit, 1e-6)
    for label in (5, 3):
        close(rows[f"as {label}"], sampler.reverse.sample(z, torch.tensor([label] * 3), 1.0), 1e-5)
    noisy = edit("--method exact")["as 5"] - digit  # the exact inverse also gives back the noise of training
    assert noisy.std() == pytest.approx(0.1, rel=0.2) and not torch.allclose(noisy[0], noisy[1])
    seen = []
    monkeypatch.setattr(Sampler, "__call__", lambda self, method, z, y, w: seen.append(z) or digit)
    for mask in ("mask.png", "layer.png"):
        masked = edit(f"--mask {mask}")["masked"]
        assert ((masked - digit).abs() > 1e-5).nonzero().tolist() == [[0, 0, 0, 0], [0, 0, 7, 2]] and masked.max() == 1
    expected = z[:1].repeat(3, 1, 1)
    expected[:, [0, 13]] = sample_noise(4, range(3), sampler.config)[:, [0, 13]]
    close(seen[0], expected, 1e-5)


def test_sample_trajectory_shows_every_state_and_its_prediction(sampler, digit, toy):
    real = torch.load(toy / "runs/reverse-toy/real.pt")
    x, y = real["x"][:10], real["y"][:10]
    rows = sample.trajectory(sampler, SimpleNamespace(run=toy / "runs/reverse-toy", seed=0))
    names = ["x", "flow: x^0", "flow: x^1", "flow: x^2", "flow: x^3", "z"]
    assert list(rows) == names + ["reverse: x^3", "reverse: x^2", "reverse: x^1", "reverse: x^0", "x' = G(z)"]
    z = sampler.encode(x, y, 0)[-1]
    close(rows["z"], 0.4 * unpatchify(z / z.square().mean((1, 2), keepdim=True).sqrt(), 2), 1e-5)
    close(rows["x' = G(z)"], sampler.reverse.sample(z, y), 1e-5)
    for line in ("--trajectory", "--edit five.png --from 5 --to 3 --mask mask.png"):
        run(sample, f"{toy / 'runs/reverse-toy'} --n 2 --out picture.png {line}")
        assert len(Image.open("picture.png").convert("L").getcolors()) > 10


# ---- fid -------------------------------------------------------------------------------------------------------------
def test_fid_frechet_distance_of_two_gaussians():
    # Closed form for commuting covariances; scipy's matrix square root for any.
    rng = np.random.default_rng(0)
    a, b = rng.uniform(0.1, 2, 5), rng.uniform(0.1, 2, 5)
    expected = 5 * 0.25 + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert abs(fid.frechet_distance(np.zeros(5), np.diag(a), np.full(5, 0.5), np.diag(b)) - expected) < 1e-12
    (m1, s1), (m2, s2) = (fid.moments(rng.standard_normal((9, 6))) for _ in range(2))
    expected = ((m1 - m2) ** 2).sum() + np.trace(s1 + s2 - 2 * scipy.linalg.sqrtm(s1 @ s2).real)
    assert abs(fid.frechet_distance(m1, s1, m2, s2) - expected) < 1e-8 * expected
    singular = np.outer(m1, m1)  # fewer images than features
    assert 0 <= fid.frechet_distance(m1, singular, m1, singular) < 1e-6


def test_fid_balls_by_brute_force():
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
    metrics = fid.precision_recall_coverage(*rng.standard_normal((2, 3000, 4)))
    assert abs(metrics["coverage"] - 7 / 8) < 0.03  # 1 - 2^-k for equal distributions


def test_fid_table_of_small_images_joins_runs_that_differ_by_their_seed(toy, tmp_path, capsys):
    said, found = (toy / "fid.txt").read_text(), []
    rows = {name: cells.split() for name, cells in re.findall(r"^(\S[^-]*?)  +(.*)$", said, re.MULTILINE)}
    assert max(map(len, said.splitlines()[:9])) <= 100 and "-0.000" not in said and "nan" not in said
    assert float(rows["real: test"][0]) == 0 and float(rows["real: training"][0]) < float(rows["biflow"][0])
    a, b = tmp_path / "a-0", tmp_path / "a-1"
    for seed, folder in enumerate((a, b)):
        run(train_reverse, f"{TINY} --forward {toy / 'runs/forward-toy'} --seed {seed} --out {folder}")
    for names in (a, b, f"{a} {b}"):
        run(fid, f"{names} --method biflow --n 50 --draws 2")
        row = re.search(r"biflow(.*)\n\s*\+-(.*)", capsys.readouterr().out).groups()
        found.append([np.array(cells.split()[:8], float) for cells in row])
    (a, _), (b, _), (mean, spread) = found
    np.testing.assert_allclose([mean, spread], [(a + b) / 2, abs(a - b) / math.sqrt(2)], atol=2e-3)


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
    for p in net.parameters():
        if p.ndim == 4:
            nn.init.kaiming_normal_(p)
    nn.init.normal_(net.fc.weight, std=3.0)
    torch.save(net.state_dict(), path)
    return path


@pytest.mark.slow
def test_fid_and_is_equal_torch_fidelitys_from_any_source(tmp_path, inception_weights, capsys):
    fidelity = pytest.importorskip("torch_fidelity")
    for name, n in dict(a=30, b=31).items():
        draw_images(tmp_path / name, n, 24)
    expected = fidelity.calculate_metrics(
        input1=str(tmp_path / "a"), input2=str(tmp_path / "b"), fid=True, isc=True, cuda=False, cache=False,
        feature_extractor="inception-v3-compat", feature_extractor_weights_path=str(inception_weights),
    )  # fmt: skip
    line = f"{tmp_path / 'a'} --img-size 24 --inception-weights {inception_weights} --num-workers 0 --batch 7"
    np.savez(tmp_path / "b.npz", arr_0=np.stack([np.asarray(Image.open(path)) for path in (tmp_path / "b").iterdir()]))
    run(fid, f"{tmp_path / 'b.npz'} {line.partition(' ')[2]} --save-stats {tmp_path / 'stats.npz'}")
    stats = dict(np.load(tmp_path / "stats.npz"))
    np.savez(tmp_path / "published.npz", ref_mu=stats["mu"], ref_sigma=stats["sigma"])  # as iMF's are named
    for reference in ("b", "b.npz", "stats.npz", "published.npz"):
        run(fid, f"{line} --reference {tmp_path / reference}")
        found = {name: float(x) for name, x in re.findall(r"(FID|IS) ([\d.]+)", capsys.readouterr().out)}
        assert found["FID"] == pytest.approx(expected["frechet_inception_distance"], rel=1e-3)
        assert found["IS"] == pytest.approx(expected["inception_score_mean"], abs=2e-3)
    np.savez(tmp_path / "size.npz", **stats | dict(img_size=32))
    capsys.readouterr()
    assert "images of 32 pixels" in refusal(capsys, fid, f"{line} --reference {tmp_path / 'size.npz'}")
    (tmp_path / "a/07.png").write_bytes(b"")
    assert "a/07.png" in refusal(capsys, fid, line)


def test_fid_counts_flops_as_by_hand_and_the_papers_ratio_of_a_score_step_to_a_block():
    # A linear layer takes 2 a weight and token, q k' and a v 2 T^2 width each. G has K context tokens.
    def counted(function, *args):
        with sdpa_kernel(SDPBackend.MATH), fid.FlopCounter() as counter:
            function(*args)
        return counter.total

    width, K, hidden, z, y = 16, 3, 32, torch.randn(3, T, D), torch.zeros(3, dtype=torch.long)
    layer = 2 * T * 12 * width**2 + 4 * T**2 * width
    block = 2 * layer + 2 * T * (D * width + width * 2 * D)
    assert counted(make(TARFlow), unpatchify(z, 2), y) == 3 * B * block
    layer = 2 * (T + K) * (4 * width**2 + 3 * width * hidden) + 4 * (T + K) ** 2 * width
    block = 2 * layer + 2 * (32 * width + width**2)
    assert counted(make(BiFlow).sample, z, y) == 3 * ((B + 1) * block + 2 * T * 2 * D * width)
    with FakeTensorMode():
        flow, model = (cls(SIZES["B"]).requires_grad_(False) for cls in (TARFlow, BiFlow))
        x, h, y, w = torch.zeros(1, 4, 32, 32), torch.zeros(1, 256, 384), torch.zeros(1).long(), torch.zeros(1)
        assert 15 < counted(flow.denoise, x, y, 0.3) / counted(model.blocks[-1], h, y, w) < 16.5


def test_fid_speed_needs_no_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run(fid, "--speed --size toy --batch 4 --guidance 0.5")
    _, *lines, last = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert last == ["not", "compiled"]
    rows = {method: [float(x) for x in numbers] for method, *numbers in lines}
    assert list(rows) == ["biflow", "biflow-2nfe", "exact", "jacobi", "exact+score"]
    params, flops, layers, *times = map(list, zip(*rows.values()))
    assert layers[:3] == [10, 18, 120] and 8 <= layers[3] <= 120 and layers[4] == 128  # T = 16
    assert flops[1] / flops[0] == pytest.approx(9 / 5, rel=0.01)  # twice the aligned blocks, once the denoise block
    assert min(map(min, times)) > 0 and times[1][0] == times[3][0] == 1
    for script in (train_forward, train_reverse):  # what a step costs, without data
        run(script, "--data random --size toy --steps 3 --batch-size 6 --micro-batch 4 --log-every 1")
    assert metrics(tmp_path / "runs/reverse-toy")[2]["images_per_s"] > 0


# ---- commands --------------------------------------------------------------------------------------------------------
class Payload:
    def __reduce__(self):
        return Path("ran").touch, ()  # what an unpickler would do


@pytest.fixture(scope="session")
def bad(tmp_path_factory, toy, photos):
    """Files and folders with something wrong, by name; F and G are sound runs, cache is a sound cache."""
    root, forward, reverse = tmp_path_factory.mktemp("bad"), toy / "runs/forward-toy", toy / "runs/reverse-toy"
    (root / "empty").mkdir()
    (root / "file").touch()
    draw_images(root / "splits/train", 2)
    shutil.copytree(root / "splits/train", root / "broken")
    (root / "broken/00.png").write_bytes(b"")
    draw_images(root / "splits/val", 2)
    cache = load(f"--data {photos} --img-size 32 --out {root / 'run'}").info["cache"]
    shutil.copytree(cache, root / "cache")
    for name in ("garbled", "cut", "other", "nan"):
        shutil.copytree(forward, root / name, ignore=shutil.ignore_patterns("checkpoint*"))
    (root / "garbled/run.json").write_text('{"data": ')
    (root / "cut/model.safetensors").write_bytes(weights(forward)[:-100])
    flow = TARFlow(SIZES["toy"])
    flow.save_pretrained(root / "other")
    nn.init.constant_(flow.blocks[1].pos_embed, math.nan)
    flow.save_pretrained(root / "nan")
    Image.new("L", (8, 8)).save(root / "black.png")
    np.savez(root / "nothing.npz", other=np.zeros(3))
    np.savez(root / "images.npz", arr_0=np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3), dtype=np.uint8))
    np.savez(root / "wide.npz", arr_0=np.zeros((4, 8, 16, 3), np.uint8))
    flipped = bytearray((root / "images.npz").read_bytes())
    flipped[700] ^= 255
    (root / "flipped.npz").write_bytes(flipped)
    torch.save({"a": Payload()}, root / "pickle.pth")
    (root / "F").symlink_to(forward)
    (root / "G").symlink_to(reverse)
    return root


BAD_INPUT = [
    ("train_forward", "--batch-size 0", "--batch-size 0 is too small"),
    ("train_forward", "--patch-size 3", "does not divide img_size 8"),
    ("train_forward", "--img-size 16", "digits is of --vae none and --img-size 8"),
    ("train_forward", "--lr -1", "--lr -1.0 is too small"),
    ("train_forward", "--label-drop 1.5", "--ema 1 or less"),
    ("train_forward", "--data empty", "holds 0 images, too few"),
    ("train_forward", "--data broken", "1 can be read, too few"),
    ("train_forward", "--data mnists", "is not a folder"),
    ("train_forward", "--data splits", "splits train, val"),
    ("train_forward", "--data cache --img-size 33", "of --vae none and --img-size 32"),
    ("train_forward", "--data splits/val --vae nowhere", "cannot load the VAE"),
    ("train_forward", "--out file/run", "Not a directory"),
    ("train_forward", "--resume pickle.pth", "pickle.pth has no checkpoint that loads"),
    ("train_forward", "--resume F/real.pt --out new", "F/real.pt has no checkpoint that loads"),
    ("train_forward", "--data cache --vae nowhere", "of --vae none and --img-size 32"),
    ("train_forward", "--out other", "other has no checkpoint"),
    ("train_forward", "--data splits/val --out splits/val/run", "lies inside --data"),
    ("train_forward", "--out F --batch-size 32 --seed 3", "seed: 0 there, 3 now"),
    ("train_forward", "--out G --batch-size 32", "stage: reverse there, forward now"),
    ("train_reverse", "--forward F --out F --batch-size 32", "--out F is the flow's run folder"),
    ("train_reverse", "--forward missing", "is not a trained run"),
    ("train_reverse", "--forward G", "is a reverse run"),
    ("train_reverse", "--forward F --patch-size 4", "--patch-size is the flow's, 2"),
    ("train_reverse", "--forward F --sigma 0.5", "--sigma is the flow's, 0.1"),
    ("train_reverse", "--forward F --label-drop 0", "guidance needs dropped labels"),
    ("train_reverse", "--forward garbled", "cannot load the run"),
    ("train_reverse", "--forward F --data cache", "of --vae none and --img-size 32"),
    ("train_reverse", "--forward other --out G --batch-size 32", "flow: "),
    ("sample", "G --classes dog", "no class 'dog'"),
    ("sample", "G --guidance 9", "outside [0, 1]"),
    ("sample", "G --guidance nan", "guidance"),
    ("sample", "F --method biflow", "give a reverse run"),
    ("sample", "G --out missing/x.png", "cannot read or write missing/x.png"),
    ("sample", "G --edit file", "cannot read file"),
    ("sample", "G --edit black.png --from 1 --mask black.png", "black.png has no white"),
    ("sample", "nan", "not finite"),
    ("sample", "G --trajectory --npz x.npz", "--npz and --classes are for samples"),
    ("sample", "G --edit black.png --out black.png", "--out is another file"),
    ("fid", "missing", "missing is not a trained run"),
    ("fid", "nothing.npz --inception-weights pickle.pth", "cannot load Inception"),
    ("fid", "flipped.npz --inception-weights sound", "cannot read flipped.npz"),
    ("fid", "wide.npz --inception-weights sound", "8 x 16; they must be square"),
    ("fid", "images.npz wide.npz --inception-weights sound", "one folder or .npz at a time"),
    ("fid", "images.npz --save-stats images.npz --inception-weights sound", "no file that is read"),
    ("fid", "images.npz --img-size 9 --inception-weights sound", "8 x 8; they must be square, and of --img-size"),
]


@pytest.mark.parametrize("script, line, message", BAD_INPUT, ids=map(str, range(len(BAD_INPUT))))
def test_commands_refuse_bad_input_with_one_line(bad, script, line, message, capsys, monkeypatch):
    monkeypatch.chdir(bad)
    paths = [*bad.rglob("*.*"), *Path("F").glob("*.*")]  # rglob does not follow the link F
    before = {path: path.stat().st_mtime_ns for path in paths}
    if "sound" in line:
        monkeypatch.setattr(fid, "load_inception", lambda *args: None)
    short = "--steps 1 --batch-size 4" if script.startswith("train") and "batch" not in line else ""
    assert message in refusal(capsys, SCRIPTS[script], f"{short} {line}") and not Path("ran").exists()
    assert before == {path: path.stat().st_mtime_ns for path in paths}


@pytest.mark.parametrize("error", [OSError(28, "No space left"), torch.OutOfMemoryError(), KeyboardInterrupt()])
def test_commands_end_in_one_line_where_the_machine_fails(error, capsys):
    with pytest.raises(SystemExit):
        sample.run_script(lambda: (_ for _ in ()).throw(error))
    assert re.fullmatch("error: .*(No space left|out of memory.*|Ctrl-C)\n", capsys.readouterr().err)


def test_commands_help_shows_the_defaults_of_the_size(capsys):
    for script, line in [*((script, "--help") for script in SCRIPTS.values()), (train_forward, "--size B --help")]:
        with pytest.raises(SystemExit):
            run(script, line)
    assert "over all processes (1024)" in " ".join(capsys.readouterr().out.split())


def test_commands_of_the_readme_parse(monkeypatch):
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.DOTALL))
    commands = re.findall(r"(?:python|torchrun [\w -]*) (\w+)\.py([^#&\n]*)", blocks)
    assert len(commands) >= 9
    for script, line in commands:
        monkeypatch.setattr(SCRIPTS[script], "setup", kill)  # which comes after the parser
        with pytest.raises(Killed):
            run(SCRIPTS[script], line)


@pytest.mark.slow
def test_commands_from_photographs_to_scores(photos, vae, inception_weights, tmp_path, monkeypatch, capsys):
    # Latents of two processes are those of one, and move with the runs. The perceptual networks' trunks are random.
    lpips, timm = pytest.importorskip("lpips"), pytest.importorskip("timm")
    build, create = lpips.LPIPS, timm.create_model
    monkeypatch.setattr(lpips, "LPIPS", lambda **options: build(**options, pnet_rand=True))
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **options: create("convnextv2_atto", **options))
    short = "--steps 2 --batch-size 2"
    line = f"{short} --data {photos} --vae {vae} --img-size 64 --out"
    torchrun(2, train_forward.__file__, f"{line} {tmp_path / 'here/f'}")
    one, there = load(f"{line} {tmp_path / 'one/f'}"), shutil.move(tmp_path / "here", tmp_path / "there")
    two = np.load(next(there.glob("cache*")) / "data.npy")
    torch.testing.assert_close(two, one.array[:], rtol=2e-3, atol=2e-3)
    forward = json.loads((there / "f/run.json").read_text())
    np.testing.assert_allclose(forward["std"], one.info["std"], rtol=1e-4)
    forward["mean"] = np.add(forward["mean"], 0.5).tolist()
    (there / "f/run.json").write_text(json.dumps(forward))
    run(train_reverse, f"{short} --forward {there / 'f'} --lpips 0.4 --convnext 0.1 --out {there / 'r'}")
    reverse = json.loads((there / "r/run.json").read_text())
    assert (reverse["vae"], reverse["sigma"], reverse["mean"]) == (vae, 0.3, forward["mean"])
    assert Path(reverse["cache"]).parent == there
    assert metrics(there / "r")[0]["error_lpips"] > 0 and metrics(there / "r")[0]["error_convnext"] > 0
    run(sample, f"{there / 'r'} --n 3 --batch 2 --method biflow --npz {tmp_path / 's.npz'}")
    assert np.load(tmp_path / "s.npz")["arr_0"].shape == (3, 64, 64, 3)
    run(sample, f"{there / 'r'} --edit {photos / 'class0/03.png'} --from class0 --to class1 --n 2")
    run(fid, f"{there / 'r'} --n 4 --batch 4 --reference {photos} --inception-weights {inception_weights}")
    assert (there / "r/edit.png").exists() and "FID" in capsys.readouterr().out


def grade(folder, prefix, function=None, body="pass"):
    """The exit status of `pytest -k prefix` in a copy of the repository in which the function has another body."""
    folder.mkdir()
    for file in (*FOLDER.glob("*.py"), FOLDER / "README.md"):
        shutil.copy(file, folder)
    if function:
        tree = node = ast.parse((folder / "biflow.py").read_text())
        for name in function.split("."):
            node = next(child for child in node.body if getattr(child, "name", None) == name)
        node.body = ast.parse(body).body
        (folder / "biflow.py").write_text(ast.unparse(tree))
    command = [sys.executable, "-m", "pytest", "-qx", "-p", "no:cacheprovider", "-k", prefix]
    return subprocess.run(command, cwd=folder, stdout=subprocess.DEVNULL).returncode


PROJECT = """
if j >= len(self.heads):
    return h, None
prediction = self.heads[j]({read})
return ({lifted} if self.config.strategy == "hidden" else h), prediction
"""
WRONG = [
    ("flow_inverse", "return self.inverse_jacobi(x, y, guidance, 0.0)"),
    ("alignment", PROJECT.format(read="h", lifted="h")),
    ("alignment", PROJECT.format(read="h.detach()", lifted="self.lifts[j](prediction)")),
    ("alignment", PROJECT.format(read="2 * h + 1", lifted="self.lifts[j](prediction)")),
    ("alignment", PROJECT.format(read="h", lifted="self.lifts[j](prediction.detach())")),
]


@pytest.mark.slow
def test_commands_exercises_grade_themselves(tmp_path):
    # Each group fails (exit status 1) without its function, passes with it, and is selected alone by its prefix.
    exercises = dict(re.findall(r"\| `(\w+)` \| `([\w.]+)` \|$", README, re.MULTILINE))
    tests = re.findall(r"^def test_(\w+)", Path(__file__).read_text(), re.MULTILINE)
    assert len(exercises) >= 11 and all(name.startswith(k) for k in exercises for name in tests if k in name)
    for prefix, function in exercises.items():
        assert grade(tmp_path / prefix, prefix, function) == 1, prefix
    for i, (prefix, body) in enumerate(WRONG):  # plausible answers
        assert grade(tmp_path / str(i), prefix, exercises[prefix], body) == 1, body
    assert grade(tmp_path / "whole", " or ".join(exercises)) == 0
