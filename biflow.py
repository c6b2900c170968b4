"""BiFlow: Bidirectional Normalizing Flow, from data to noise and back (arXiv 2512.10953, CVPR 2026).

The whole method in one file, to be read from top to bottom: sizes and tokens; F, which maps data to noise and learns by
maximum likelihood (a TARFlow, the paper's "iTARFlow"); G, which learns to map noise back to data in one pass; the
losses of both; running the networks. Editing, z' = M z + (1 - M) eps, is in sample.py.

Notation, as in the paper: F = f_{B-1} o ... o f_0 has B blocks. x is a clean image (or latent), x~ = x + sigma * eps
its noisy version. The flow's states are x^0 = x~, x^{i+1} = f_i(x^i) and z = x^B. G's hidden tokens h^i belong to x^i.
Its blocks G_j, j = 0 .. B-1, map h^{B-j} to h^{B-1-j}, and its output is x' = G(z).
Shapes: images and latents are (N, C, H, W); tokens (N, T, D) in raster order, hidden tokens (N, T, width); labels (N,)
long, -1 for "no class".
Origins: [ours] marks our choices, [dev] those of the authors' development or later code. The rest is published.
"""

import dataclasses
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as nnf
from huggingface_hub import PyTorchModelHubMixin, snapshot_download
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# ----------------------------------------------------------------------------------------------------------------------
# 1. Sizes and tokens


@dataclasses.dataclass
class Config:
    """All that shapes a network, F or G, and nothing else. Raises ValueError where the fields do not fit together."""

    img_size: int = 32
    channels: int = 4
    patch_size: int = 2
    num_classes: int = 1000  # 0: unconditional
    width: int = 384  # numbers in a hidden token [dev]
    blocks: int = 8  # B: the flow's blocks [dev]. G has as many aligned blocks, and the denoise block
    layers: int = 8  # Transformer layers in each block [dev]
    head_dim: int = 64
    clip: float | None = 1.0  # F: bound c on (alpha, mu) [dev]; None: unbounded
    strategy: str = "align"  # G: how it is supervised: align, naive or hidden
    denoise: str = "learned"  # G: learned (one more block, clean target) or none (noisy target)
    class_tokens: int = 8  # G: context tokens for the class [dev]
    guidance_tokens: int = 4  # G: context tokens for the guidance scale [dev]
    w_max: float = 1.0  # G: it is trained for guidance scales from 0 to w_max [ours]; 0: without guidance

    def __post_init__(self):
        if self.img_size % self.patch_size != 0:
            raise ValueError(f"patch_size {self.patch_size} does not divide img_size {self.img_size}")
        if self.width % self.head_dim != 0 or self.head_dim % 4 != 0:
            raise ValueError(f"head_dim {self.head_dim} must divide width {self.width} and be a multiple of 4")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip must be positive or none, not {self.clip}")
        if not math.isfinite(self.w_max) or self.w_max < 0:
            raise ValueError(f"w_max must be 0 or more, not {self.w_max}")
        if self.strategy not in ("align", "naive", "hidden") or self.denoise not in ("learned", "none"):
            raise ValueError(f"there is no strategy {self.strategy} with denoise {self.denoise}")

    @property
    def tokens(self) -> int:
        """T, the number of tokens."""
        return (self.img_size // self.patch_size) ** 2

    @property
    def dim(self) -> int:
        """D, the numbers in a token."""
        return self.channels * self.patch_size**2


# toy, S and L are ours, B and XL [dev]. Latents of ImageNet at 256 x 256 are the default: 256 tokens of 16 numbers.
SIZES = {
    "toy": Config(8, 1, 2, 10, width=64, blocks=4, layers=2, head_dim=32, clip=3.0, class_tokens=1, guidance_tokens=1),
    "S": Config(28, 1, 4, 10, width=128, blocks=4, layers=2, clip=3.0, class_tokens=1, guidance_tokens=1),
    "B": Config(width=384, blocks=8, layers=8),
    "L": Config(width=640, blocks=8, layers=8),
    "XL": Config(width=768, blocks=8, layers=12),
}


def patchify(x: Tensor, p: int) -> Tensor:
    """Image (N, C, H, W) -> tokens (N, T, D), T = H W / p^2 in raster order, D = C p^2 with the channel outermost."""
    return nnf.pixel_unshuffle(x, p).flatten(2).transpose(1, 2).contiguous()


def unpatchify(tokens: Tensor, p: int) -> Tensor:
    """Tokens (N, T, D) -> square image (N, C, H, W), the inverse of patchify."""
    side = math.isqrt(tokens.shape[1])
    return nnf.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (side, side)), p)


def no_class(x: Tensor) -> Tensor:
    """Labels (N,) that say "no class" for a batch x of N."""
    return x.new_full((len(x),), -1, dtype=torch.long)


class HubModel(nn.Module, PyTorchModelHubMixin, library_name="biflow", paper_url="https://arxiv.org/abs/2512.10953"):
    """A network that save_pretrained writes as config.json and model.safetensors."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config

    def _save_pretrained(self, save_directory: Path):
        from safetensors.torch import save  # its save_file would give the file mode 0600

        (save_directory / "model.safetensors").write_bytes(save(self.state_dict()))

    @classmethod
    @torch.inference_mode(False)  # wherever it is called, for denoise needs gradients
    def from_pretrained(cls, name: str | Path, **hub_options):
        """The model saved in a folder or, for a "user/name" that is no local path, on the Hub (with hub_options such as
        revision). Raises TypeError for unknown fields of the config, RuntimeError for weights that do not fit it."""
        from safetensors.torch import load_file

        folder = Path(name).expanduser()
        if not folder.parent.exists():
            files = ["config.json", "model.safetensors"]  # a run folder also holds checkpoints, which are larger
            folder = Path(snapshot_download(str(name), allow_patterns=files, **hub_options))
        model = cls(Config(**json.loads((folder / "config.json").read_text())))
        model.load_state_dict(load_file(folder / "model.safetensors"))
        return model.eval()


class PreciseLinear(nn.Linear):
    """A linear layer that ignores autocast: the last layers, whose outputs are exponents, log-dets and pixels. It
    starts at zero: a new block of F is the identity, a new head of G predicts zero."""

    def __init__(self, width: int, dim: int):
        super().__init__(width, dim)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return nnf.linear(x.to(self.weight.dtype), self.weight, self.bias)


# ----------------------------------------------------------------------------------------------------------------------
# 2. F: TARFlow (Zhai et al., arXiv 2412.06329), with clipping. Parameter names are those of the published TARFlow


class CausalLayer(nn.Module):
    """One pre-norm Transformer layer of the flow: causal self-attention and a GELU MLP of ratio 4. The residual stream
    stays in float32 under autocast."""

    def __init__(self, width: int, head_dim: int):
        super().__init__()
        self.head_dim = head_dim
        self.attention = nn.ModuleDict(
            {"norm": nn.LayerNorm(width), "qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)}
        )
        main = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.mlp = nn.ModuleDict({"norm": nn.LayerNorm(width), "main": main})

    def forward(self, h, cache=None, t=0):
        """All tokens h (N, T, width); or token t alone, h (N, 1, width), with the keys and values of those before it in
        a cache (2, N, heads, T, head_dim)."""
        N, T, width = h.shape
        qkv = self.attention.qkv(self.attention.norm(h)).view(N, T, 3, -1, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv
        if cache is not None:
            cache[:, :, :, t : t + 1] = qkv[1:]
            k, v = cache[:, :, :, : t + 1]
        a = nnf.scaled_dot_product_attention(q, k, v, is_causal=(cache is None))
        h = h + self.attention.proj(a.transpose(1, 2).reshape(N, T, width))
        return h + self.mlp.main(self.mlp.norm(h))


class FlowBlock(nn.Module):
    """f_i: an affine autoregressive map of the tokens, read in raster order or, if `flip`, in reversed order."""

    def __init__(self, config: Config, flip: bool):
        super().__init__()
        width = config.width
        self.flip = flip
        self.clip = config.clip
        self.head_dim = config.head_dim
        self.proj_in = nn.Linear(config.dim, width)
        self.pos_embed = nn.Parameter(1e-2 * torch.randn(config.tokens, width))
        if config.num_classes:
            self.class_embed = nn.Parameter(1e-2 * torch.randn(config.num_classes, 1, width))
        self.attn_blocks = nn.ModuleList(CausalLayer(width, config.head_dim) for _ in range(config.layers))
        self.proj_out = PreciseLinear(width, 2 * config.dim)

    def order(self, x: Tensor) -> Tensor:
        """Raster order -> reading order, and back."""
        return x.flip(1) if self.flip else x

    def embedding(self, y: Tensor) -> Tensor:
        """Labels (N,) -> position + class embedding (N, T, width) in reading order. "No class": the classes' mean."""
        embedding = self.pos_embed.expand(len(y), -1, -1)
        if hasattr(self, "class_embed"):
            none = (y < 0).view(-1, 1, 1)
            of_class = self.class_embed[y.clamp(min=0)]
            embedding = embedding + torch.where(none, self.class_embed.mean(0), of_class)
        return self.order(embedding)

    def affine(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden tokens -> log-scale alpha and shift mu of the *next* token, each (N, T, D), clipped to [-c, c]. Norm
        control, part one: clipping bounds how far a block can move the norm of its input."""
        out = self.proj_out(h)
        if self.clip is not None:
            out = out.clamp(-self.clip, self.clip)
        return out.chunk(2, dim=-1)

    def alpha_mu(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens in reading order -> (alpha, mu)_t of every token, from the tokens before it; alpha_0 = mu_0 = 0."""
        h = self.proj_in(x) + self.embedding(y)
        for layer in self.attn_blocks:
            h = layer(h)
        alpha, mu = self.affine(h)
        # The output at token t - 1, which has read the tokens up to there, belongs to token t: shift both by one.
        return nnf.pad(alpha[:, :-1], (0, 0, 1, 0)), nnf.pad(mu[:, :-1], (0, 0, 1, 0))

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """x^i (N, T, D), y (N,) -> x^{i+1} (N, T, D), log|det f_i'| (N,) in nats:
        x^{i+1}_t = (x^i_t - mu_t) exp(-alpha_t), so that log|det f_i'| = -sum of alpha."""
        x = self.order(x)
        alpha, mu = self.alpha_mu(x, y)
        return self.order((x - mu) * torch.exp(-alpha)), -alpha.sum((1, 2))

    def inverse(self, x: Tensor, y: Tensor, guidance: float) -> Tensor:
        """x^{i+1} (N, T, D) -> x^i: x^i_t = x^{i+1}_t exp(alpha_t) + mu_t, one token after another, with a KV cache."""
        x = self.order(x).clone()
        if guidance:
            y = torch.cat([y, no_class(y)])  # both branches run as one batch
        embedding = self.embedding(y)
        N, T, width = embedding.shape
        shape = (2, N, width // self.head_dim, T, self.head_dim)
        dtype = self.proj_in(x[:, :1]).dtype  # autocast's, if it is on
        caches = [x.new_empty(shape, dtype=dtype) for _ in self.attn_blocks]  # keys and values
        for t in range(1, T):
            before = x[:, t - 1 : t]  # x^i_{t-1}, decoded in the step before
            if guidance:
                before = torch.cat([before, before])
            h = self.proj_in(before) + embedding[:, t - 1 : t]
            for layer, cache in zip(self.attn_blocks, caches):
                h = layer(h, cache, t - 1)
            alpha, mu = self.affine(h)
            if guidance:
                alpha, mu = guide(alpha, mu, guidance * t / (T - 1))
            x[:, t : t + 1] = x[:, t : t + 1] * torch.exp(alpha) + mu
        return self.order(x)

    def inverse_jacobi(self, x_next: Tensor, y: Tensor, guidance: float, tolerance: float) -> Tensor:
        """The same map by fixed-point iteration on all tokens: x <- x^{i+1} exp(alpha(x)) + mu(x). Each round makes at
        least one more token exact, and it ends when no number moves by more than the tolerance."""
        x_next = self.order(x_next)
        x = x_next
        w = torch.linspace(0, guidance, x.shape[1], dtype=x.dtype, device=x.device).view(-1, 1)
        if guidance:
            y = torch.cat([y, no_class(y)])
        for _ in range(x.shape[1] - 1):
            if guidance:
                alpha, mu = guide(*self.alpha_mu(torch.cat([x, x]), y), w)
            else:
                alpha, mu = self.alpha_mu(x, y)
            before = x
            x = x_next * torch.exp(alpha) + mu
            if (x - before).abs().max() <= tolerance:
                break
        return self.order(x)


def guide(alpha: Tensor, mu: Tensor, w: Tensor | float) -> tuple[Tensor, Tensor]:
    """Guidance of the exact inverse (TARFlow): alpha_c + w (alpha_c - alpha_u), likewise mu, of a batch that holds the
    conditional and then the unconditional branch. In TARFlow's evaluation w grows along the tokens: w t / (T - 1)."""
    alpha, alpha_u = alpha.chunk(2)
    mu, mu_u = mu.chunk(2)
    return alpha + w * (alpha - alpha_u), mu + w * (mu - mu_u)


class TARFlow(HubModel):
    """F: data -> noise, B autoregressive blocks of alternating direction, trained by maximum likelihood."""

    def __init__(self, config: Config):
        super().__init__(config)
        self.blocks = nn.ModuleList(FlowBlock(config, flip=i % 2 == 1) for i in range(config.blocks))

    def forward(self, x: Tensor, y: Tensor | None = None) -> tuple[list[Tensor], Tensor]:
        """x (N, C, H, W), y (N,) -> the trajectory [x^0 .. x^B = z], each (N, T, D), and log|det F'| (N,) in nats."""
        y = no_class(x) if y is None else y
        states = [patchify(x, self.config.patch_size)]
        logdet = x.new_zeros(len(x))
        for block in self.blocks:
            state, block_logdet = block(states[-1], y)
            states.append(state)
            logdet = logdet + block_logdet
        return states, logdet

    def log_prob(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """x (N, C, H, W), y (N,) -> log p(x|y) (N,) in nats, by the change of variables."""
        states, logdet = self(x, y)
        return gaussian_log_prob(states[-1]) + logdet

    @torch.no_grad()
    def inverse(self, z: Tensor, y: Tensor | None = None, guidance: float = 0.0) -> Tensor:
        """The exact inverse: z (N, T, D) tokens, y (N,) -> x~ (N, C, H, W), in B (T - 1) sequential steps (the paper
        counts B T, but the first token of a block passes unchanged). guidance: the scale w at the last token."""
        y = no_class(z) if y is None else y
        for block in reversed(self.blocks):
            z = block.inverse(z, y, guidance)
        return unpatchify(z, self.config.patch_size)

    @torch.no_grad()
    def inverse_jacobi(self, z: Tensor, y: Tensor | None = None, guidance: float = 0.0, tolerance=1e-3) -> Tensor:
        """The same map by Jacobi iteration on all tokens of a block at once."""
        y = no_class(z) if y is None else y
        for block in reversed(self.blocks):
            z = block.inverse_jacobi(z, y, guidance, tolerance)
        return unpatchify(z, self.config.patch_size)

    def denoise(self, x: Tensor, y: Tensor | None, sigma: float) -> Tensor:
        """Score-based denoising, x~ + sigma^2 grad log p(x~) (Tweedie's formula): (N, C, H, W) -> (N, C, H, W)."""
        with torch.inference_mode(False), torch.enable_grad():  # wherever it is called
            x = x.detach().clone().requires_grad_()
            (score,) = torch.autograd.grad(self.log_prob(x, y).sum(), x)
        return x.detach() + sigma**2 * score

    @classmethod
    def from_tarflow(cls, state_dict: dict[str, Tensor], config: Config) -> "TARFlow":
        """A model with a published TARFlow's weights, not clipped. Raises ValueError or RuntimeError for others."""
        if not torch.all(state_dict.get("var", torch.zeros(1)) == 1):
            raise ValueError("the checkpoint has a learned prior: it is the volume-preserving variant of TARFlow")
        state = {name: value for name, value in state_dict.items() if not name.endswith(("var", "attn_mask"))}
        model = cls(dataclasses.replace(config, clip=None))
        model.load_state_dict(state)
        return model.eval()


# ----------------------------------------------------------------------------------------------------------------------
# 3. G: the reverse model, a bidirectional ViT with RMSNorm, QK-norm, RoPE, SwiGLU and layer scales [dev]


class RMSNorm(nn.Module):
    """x / RMS(x) over the last dimension, in at least float32. Without a scale: the layer that follows can hold it."""

    def forward(self, x):
        return nnf.rms_norm(x, x.shape[-1:], eps=1e-6).to(x.dtype)


def rope_table(context: int, side: int, head_dim: int) -> Tensor:
    """cos and sin (2, context + side^2, head_dim / 2) of axial RoPE: half of the pairs turn with the row, half with the
    column. The context tokens, which have no place in the image, do not turn. (Base 100 suits short axes [ours].)"""
    frequencies = 100.0 ** -(torch.arange(head_dim // 4) / (head_dim // 4))
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    angles = torch.cat([row.reshape(-1, 1) * frequencies, column.reshape(-1, 1) * frequencies], dim=1)
    angles = nnf.pad(angles, (0, 0, context, 0))
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Turn the pairs (x_k, x_{k + d/2}) of x (..., T, d) by the angles of rope (2, T, d / 2)."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = rope
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)


class ReverseLayer(nn.Module):
    """One layer of the reverse ViT. It starts near the identity, with layer scales of one and small last layers of the
    branches (scales of zero, before layers of full size, learned half as fast on digits [ours])."""

    def __init__(self, width: int, head_dim: int):
        super().__init__()
        mlp_width = 32 * round(width * 8 / 3 / 32)
        self.head_dim = head_dim
        self.norm = RMSNorm()
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.qk_scale = nn.Parameter(torch.ones(head_dim))  # without it no logit could exceed sqrt(head_dim)
        self.proj = nn.Linear(width, width, bias=False)
        self.attn_layer_scale = nn.Parameter(torch.ones(width))
        self.mlp_in = nn.Linear(width, 2 * mlp_width, bias=False)
        self.mlp_out = nn.Linear(mlp_width, width, bias=False)
        self.mlp_layer_scale = nn.Parameter(torch.ones(width))
        self.proj.weight.data.mul_(0.1)
        self.mlp_out.weight.data.mul_(0.1)

    def forward(self, h, rope):
        N, T, width = h.shape
        q, k, v = self.qkv(self.norm(h)).view(N, T, 3, -1, self.head_dim).permute(2, 0, 3, 1, 4)
        q = rotate(self.qk_scale * self.norm(q), rope).to(v.dtype)
        k = rotate(self.qk_scale * self.norm(k), rope).to(v.dtype)
        a = nnf.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(N, T, width)
        h = h + self.attn_layer_scale * self.proj(a)
        gate, value = self.mlp_in(self.norm(h)).chunk(2, dim=-1)
        return h + self.mlp_layer_scale * self.mlp_out(nnf.silu(gate) * value)


class ReverseBlock(nn.Module):
    """G_j(h | class, w): hidden tokens (N, T, width), y (N,), w (N,) -> hidden tokens (N, T, width).

    Class and guidance scale enter as context tokens, from a table and an MLP in each block [dev]. They are dropped at
    the end, so that a block is a function of (h, class, w) and of nothing else [ours]."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        width = config.width
        self.K = config.class_tokens + config.guidance_tokens  # context tokens
        self.class_embed = nn.Embedding(1 + config.num_classes, width)  # the first row is "no class"
        self.guidance_embed = nn.Sequential(nn.Linear(32, width), nn.SiLU(), nn.Linear(width, width))  # of waves [ours]
        self.slot_embed = nn.Parameter(torch.randn(self.K, width))  # tells the context tokens apart
        self.layers = nn.ModuleList(ReverseLayer(width, config.head_dim) for _ in range(config.layers))
        self.register_buffer("rope", rope_table(self.K, math.isqrt(config.tokens), config.head_dim), persistent=False)

    def context(self, y: Tensor, w: Tensor) -> Tensor:
        """Labels (N,), guidance scales (N,) -> context tokens (N, K, width)."""
        share = w.clamp(0, self.config.w_max) / (self.config.w_max or 1.0)  # beyond the range: its end
        waves = torch.cos(math.pi * share[:, None] * torch.arange(32, device=w.device))
        class_tokens = self.class_embed(y + 1)[:, None].expand(-1, self.config.class_tokens, -1)
        guidance_tokens = self.guidance_embed(waves)[:, None].expand(-1, self.config.guidance_tokens, -1)
        return torch.cat([class_tokens, guidance_tokens], dim=1) + self.slot_embed

    def forward(self, h, y, w):
        h = torch.cat([self.context(y, w), h], dim=1)
        for layer in self.layers:
            h = layer(h, self.rope)
        return h[:, self.K :]


def projection_head(width: int, dim: int) -> nn.Sequential:
    """phi_i: hidden tokens (N, T, width) -> token space (N, T, D). Linear, but after an RMSNorm [ours]."""
    return nn.Sequential(RMSNorm(), PreciseLinear(width, dim))


class BiFlow(HubModel):
    """G: noise -> clean data in one pass, B blocks aligned with the flow's states and one denoise block.

    h^B = proj_in(z) + pos_embed, h^{B-1-j} = G_j(h^{B-j} | class, w), and x' = phi(h^{-1}) after the denoise block,
    which maps h^0, aligned with the *noisy* x^0, to clean data. Without it (config.denoise = "none") the last aligned
    block gives x' = phi(h^0), whose target is x^0. With the distance d, config.strategy says what is supervised:

        naive   naive distillation    d(x, x')
        hidden  hidden distillation   d(x, x') + sum_i d(x^i, phi_i(h^i)), and lift(phi_i(h^i)) goes on in place of h^i
        align   hidden alignment      d(x, x') + sum_i d(x^i, phi_i(h^i)), and h^i itself goes on
    """

    def __init__(self, config: Config):
        super().__init__(config)
        width = config.width
        blocks = config.blocks + 1 if config.denoise == "learned" else config.blocks
        self.proj_in = nn.Linear(config.dim, width)
        self.pos_embed = nn.Parameter(0.3 * torch.randn(config.tokens, width))  # one for all blocks; 0.3 is [ours]
        self.blocks = nn.ModuleList(ReverseBlock(config) for _ in range(blocks))
        # One head for each state between z and x'. heads[j] reads what block j gives.
        supervised = 0 if config.strategy == "naive" else blocks - 1
        self.heads = nn.ModuleList(projection_head(width, config.dim) for _ in range(supervised))
        if config.strategy == "hidden":
            self.lifts = nn.ModuleList(nn.Linear(config.dim, width) for _ in range(supervised))
        self.out = projection_head(width, config.dim)

    def conditions(self, z: Tensor, y: Tensor | None, w: Tensor | float) -> tuple[Tensor, Tensor]:
        """y or None, w or a float -> (N,) labels and (N,) scales on z's device; w = 0 where there is no class."""
        if y is None or self.config.num_classes == 0:
            y = no_class(z)
        w = (z.new_zeros(len(z)) + w).to(z.dtype)
        return y, torch.where(y < 0, 0.0, w)

    def project(self, j: int, h: Tensor) -> tuple[Tensor, Tensor | None]:
        """After block j: the hidden tokens that go on, and what their head, if there is one, predicts of the state."""
        if j >= len(self.heads):
            return h, None
        prediction = self.heads[j](h)
        if self.config.strategy == "hidden":
            h = self.lifts[j](prediction)
        return h, prediction

    def forward(self, z: Tensor, y: Tensor | None, w: Tensor | float) -> tuple[Tensor, dict[int, Tensor]]:
        """Training: z (N, T, D), y (N,), w (N,) -> x' (N, C, H, W), predictions {i: (N, T, D)} of normalised x^i.

        Training-time guidance: (G_j(h | class, w) + w G_j(h | none)) / (1 + w) goes on and is supervised, so that
        G_j(h | class, w) learns to be guided. The none-branch runs without gradient, and one w serves all aligned
        blocks [dev]. The denoise block reads w, but is not recombined [ours]. Naive distillation also, if w_max > 0."""
        y, w = self.conditions(z, y, w)
        none, zero = self.conditions(z, None, 0.0)
        scale = w.view(-1, 1, 1)
        guided = self.config.w_max > 0 and self.config.num_classes > 0
        h = self.proj_in(z) + self.pos_embed
        predictions = {}
        for j, block in enumerate(self.blocks):
            out = block(h, y, w)
            if guided and j < self.config.blocks:
                with torch.no_grad():
                    out_none = block(h, none, zero)
                out = (out + scale * out_none) / (1 + scale)
            h, prediction = self.project(j, out)
            if prediction is not None:
                predictions[self.config.blocks - 1 - j] = prediction
        return unpatchify(self.out(h), self.config.patch_size), predictions

    @torch.no_grad()
    def sample(self, z: Tensor, y: Tensor | None = None, w: Tensor | float = 0.0) -> Tensor:
        """1-NFE sampling: z (N, T, D), y (N,), w in [0, w_max] -> x' (N, C, H, W). Each block is called once. If w > 0,
        its guided output goes on, where training passed on the mixture. Without y, a class-conditional G gives about
        the mean over the classes: it is no unconditional sampler."""
        y, w = self.conditions(z, y, w)
        h = self.proj_in(z) + self.pos_embed
        for j, block in enumerate(self.blocks):
            h = block(h, y, w)
            if self.config.strategy == "hidden":  # elsewhere the heads only serve the loss
                h, _ = self.project(j, h)
        return unpatchify(self.out(h), self.config.patch_size)

    @torch.no_grad()
    def sample_two_pass(self, z: Tensor, y: Tensor | None, w: Tensor | float) -> Tensor:
        """2-NFE guidance at sampling: (1 + w) G_j(h | class) - w G_j(h | none) goes on, in the aligned blocks."""
        y, w = self.conditions(z, y, w)
        none, zero = self.conditions(z, None, 0.0)
        scale = w.view(-1, 1, 1)
        h = self.proj_in(z) + self.pos_embed
        for j, block in enumerate(self.blocks):
            out = block(h, y, zero)
            if j < self.config.blocks:
                out = (1 + scale) * out - scale * block(h, none, zero)
            h = out
            if self.config.strategy == "hidden":
                h, _ = self.project(j, h)
        return unpatchify(self.out(h), self.config.patch_size)


# ----------------------------------------------------------------------------------------------------------------------
# 4. Losses


def gaussian_log_prob(z: Tensor) -> Tensor:
    """log N(z; 0, I) (N,) in nats of tokens (N, T, D)."""
    return -0.5 * (z.square() + math.log(2 * math.pi)).sum((1, 2))


def nll_loss(z: Tensor, logdet: Tensor) -> Tensor:
    """Stage 1: the mean of -log p(x~), in nats per dimension, from z (N, T, D) and log|det F'| (N,)."""
    return -(gaussian_log_prob(z) + logdet).mean() / z[0].numel()


def adaptive_weight(distance: Tensor, p: float = 1.0, offset: float = 0.01) -> Tensor:
    """w_p = sg((d + offset)^-p) of each sample's distance d; p = 0 turns it off. The values are [dev]. With p = 1 the
    loss w_p d has the gradient of log(d + offset) and stays near 1 while d falls, so watch the errors instead."""
    return (distance.detach() + offset) ** -p


def rms_normalize(x: Tensor) -> Tensor:
    """Norm control, part two: each state x^i (N, T, D) divided by its per-sample RMS [ours: which norm]."""
    return x / x.square().mean((1, 2), keepdim=True).sqrt().clamp(min=1e-6)


def squared_distance(prediction: Tensor, target: Tensor) -> Tensor:
    """d (N,): the squared difference summed over all dimensions [dev], for which the offset 0.01 was chosen."""
    return (prediction.float() - target.float()).square().flatten(1).sum(1)


def reverse_loss(
    x_prime: Tensor, predictions: dict[int, Tensor], x: Tensor, states: list[Tensor], p=1.0, trajectory_norm=True
) -> tuple[Tensor, dict[str, Tensor]]:
    """Stage 2: the batch's mean of w_p d(x, x') + sum_i w_p d(x^i / RMS(x^i), predictions[i]), equal weights [ours].

    x' and its target x (N, C, H, W): the clean image, or the noisy one where there is no denoise block. states: the
    flow's trajectory, (N, T, D) each. The strategy decides which predictions there are; naive distillation has none.
    Also returns the unweighted relative errors d(target, prediction) / |target|^2, (N,) each: "x", "x0", "x1", ..."""
    pairs = {"x": (x_prime, x)}
    for i, prediction in predictions.items():
        target = rms_normalize(states[i]) if trajectory_norm else states[i]
        pairs[f"x{i}"] = (prediction, target)
    loss = 0.0
    errors = {}
    for name, (prediction, target) in pairs.items():
        distance = squared_distance(prediction, target)
        loss = loss + (adaptive_weight(distance, p) * distance).mean()
        errors[name] = distance.detach() / target.square().flatten(1).sum(1)
    return loss, errors


class FeatureDistance(nn.Module):
    """Squared differences (N,) of a network's features. mean, std: of the images, in [0, 1], that it was trained on."""

    def __init__(self, net: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.net = net
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        features = [self.net((0.5 * images + 0.5 - self.mean) / self.std) for images in (a, b)]
        return squared_distance(*features)


class PerceptualDistance(nn.Module):
    """Distances of decoded images by frozen networks, such as LPIPS, each with its weight and its adaptive weight.

    decode: what G gives (N, C, H, W) -> images (N, 1 or 3, S, S) in [-1, 1], differentiable. nets: modules that map
    two batches of images in [-1, 1], the same crops of x' and its target resized to `size`, to a distance for each
    pair. Gradients flow through them, the crop and the decoder to x'."""

    def __init__(self, decode, nets: dict[str, nn.Module], weights: dict[str, float], p: float = 1.0, size: int = 224):
        super().__init__()
        self.decode = decode
        self.nets = nn.ModuleDict(nets).eval().requires_grad_(False)
        self.weights = weights
        self.p = p
        self.size = size

    def forward(self, x_prime: Tensor, x: Tensor, u: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """x', its target x (N, C, H, W; noisy without a denoise block), u (N, 4) of the crop -> loss, distances."""
        a = checkpoint(self.decode, x_prime, use_reentrant=False)  # its activations are most of the memory
        with torch.no_grad():
            b = self.decode(x)
        a = random_resized_crop(a.float(), u, self.size)
        b = random_resized_crop(b.float(), u, self.size)
        loss = 0.0
        distances = {}
        for name, net in self.nets.items():
            distance = net(a, b).float().flatten()
            loss = loss + self.weights[name] * (adaptive_weight(distance, self.p) * distance).mean()
            distances[name] = distance.detach()
        return loss, distances


def random_resized_crop(x: Tensor, u: Tensor, size: int) -> Tensor:
    """Crop images (N, C, S, S) to a random area (0.08 to 1) and ratio (3/4 to 4/3) [dev], resize to (N, C, size, size).
    u (N, 4): uniform numbers that decide area, ratio, x and y. Bilinear without antialiasing, and a side longer than
    the image is cut to it [ours]."""
    area = 0.08 + 0.92 * u[:, 0]
    ratio = torch.exp((2 * u[:, 1] - 1) * math.log(4 / 3))
    crop_w = (area * ratio).sqrt().clamp(max=1)  # shares of the image
    crop_h = (area / ratio).sqrt().clamp(max=1)
    centre_x = (2 * u[:, 2] - 1) * (1 - crop_w)
    centre_y = (2 * u[:, 3] - 1) * (1 - crop_h)
    zero = torch.zeros_like(crop_w)
    theta = torch.stack([crop_w, zero, centre_x, zero, crop_h, centre_y], dim=1).view(-1, 2, 3)
    with torch.autocast(x.device.type, enabled=False):  # affine_grid would compute places in bfloat16
        grid = nnf.affine_grid(theta, [len(x), 1, size, size], align_corners=False)
    return nnf.grid_sample(x, grid, padding_mode="border", align_corners=False)


# ----------------------------------------------------------------------------------------------------------------------
# 5. Running the networks: precision and compilation


def autocast(device: torch.device, enabled: bool):
    """bf16 autocast. The weight cache is disabled: weights cast under no_grad would be reused by a later forward pass
    and get no gradient."""
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled, cache_enabled=False)


def freeze(model: nn.Module, device: torch.device, bf16: bool, compiled: bool):
    """Make a frozen network ready: cast its linear layers (but PreciseLinear) once, and compile it."""
    model.to(device).eval().requires_grad_(False)
    for layer in model.modules():
        if bf16 and type(layer) is nn.Linear:
            layer.to(torch.bfloat16)
    if compiled:
        compile_blocks(model)


def compile_blocks(model: nn.Module):
    """Compile the blocks in place, so that state dicts keep their names."""
    torch._dynamo.config.optimize_ddp = False  # it would cut each block into several graphs
    for block in model.blocks:
        block.compile()
