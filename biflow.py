"""BiFlow: Bidirectional Normalizing Flow, from data to noise and back (arXiv 2512.10953, CVPR 2026).

The whole method in one file, from top to bottom: sizes and tokens; F: x -> z, a TARFlow, trained by maximum likelihood;
G: z -> x in one pass, a bidirectional Transformer, trained along F; the losses of both; running the networks.

Notation, as in the paper: F = f_{B-1} o ... o f_0 has B blocks; x is a clean image (or latent), x~ = x + sigma * eps
its noisy version; x^0 = x~, x^{i+1} = f_i(x^i), z = x^B. G's hidden state h^i belongs to x^i; x' = G(z).
Shapes: images and latents are (N, C, H, W); tokens (N, T, D) in raster order, hidden tokens (N, T, width); labels (N,)
long, -1 for "no class". A comment "[ours]" marks a choice that the paper leaves open.
"""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as nnf
from huggingface_hub import PyTorchModelHubMixin, snapshot_download
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# ----------------------------------------------------------------------------------------------------------------------
# 1. Sizes and tokens


@dataclass
class Config:
    """All that shapes a network, F or G, and nothing else. Raises ValueError where the fields do not fit together."""

    img_size: int = 32
    channels: int = 4
    patch_size: int = 2
    num_classes: int = 1000  # 0: unconditional
    width: int = 384
    blocks: int = 8  # B: the flow's blocks. G has as many aligned blocks, and the denoise block
    layers: int = 8  # Transformer layers in each block
    head_dim: int = 64
    clip: float | None = 1.0  # F: bound c on (alpha, mu); None: unbounded
    strategy: str = "align"  # G: how it is supervised: align, naive or hidden
    denoise: str = "learned"  # G: learned (one more block, clean target) or none (noisy target)
    class_tokens: int = 8  # G: in-context tokens for the class ...
    guidance_tokens: int = 4  # ... and for the guidance scale
    w_max: float = 1.0  # G: guidance scales it is trained for, [0, w_max]; 0: trained without guidance

    def __post_init__(self):
        checks = {
            "patch_size must divide img_size": self.patch_size > 0 == self.img_size % self.patch_size,
            "head_dim must divide width and be a multiple of 4": self.width % self.head_dim == self.head_dim % 4 == 0,
            "blocks and layers must be at least 1": min(self.blocks, self.layers) > 0,
            "clip must be positive or none": self.clip is None or self.clip > 0,
            "strategy must be align, naive or hidden": self.strategy in ("align", "naive", "hidden"),
            "denoise must be learned or none": self.denoise in ("learned", "none"),
            "w_max must be 0 or more": 0 <= self.w_max < math.inf,
        }
        for what, holds in checks.items():
            if not holds:
                raise ValueError(f"{what}: {self}")

    @property
    def tokens(self) -> int:
        """T, the number of tokens."""
        return (self.img_size // self.patch_size) ** 2

    @property
    def dim(self) -> int:
        """D, the numbers in a token."""
        return self.channels * self.patch_size**2


# toy and S are ours. The latents of ImageNet at 256 x 256 have the default shape: 256 tokens of 16 numbers.
SIZES = {
    "toy": Config(8, 1, 2, 10, width=64, blocks=4, layers=2, head_dim=32, clip=3.0, class_tokens=1, guidance_tokens=1),
    "S": Config(28, 1, 4, 10, width=128, blocks=4, layers=2, clip=3.0, class_tokens=1, guidance_tokens=1),
    "B": Config(width=384, blocks=8, layers=8),
    "L": Config(width=640, blocks=8, layers=8),  # [ours]
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
    return torch.full((len(x),), -1, dtype=torch.long, device=x.device)


class HubModel(nn.Module, PyTorchModelHubMixin, library_name="biflow", paper_url="https://arxiv.org/abs/2512.10953"):
    """A network that save_pretrained writes as config.json and model.safetensors."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config

    def _save_pretrained(self, save_directory: Path):
        from safetensors.torch import save

        (save_directory / "model.safetensors").write_bytes(save(self.state_dict()))  # safetensors' file has mode 0600

    @classmethod
    def from_pretrained(cls, name: str | Path, **hub_options):
        """The model saved in a folder or, for a "user/name" that is no local path, on the Hub. Unknown fields of the
        config and weights that do not fit it are errors. `hub_options` go to snapshot_download."""
        from safetensors.torch import load_file

        folder = Path(name).expanduser()
        if not folder.parent.exists():
            folder = Path(snapshot_download(str(name), **hub_options))
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
    """One pre-norm Transformer layer of the flow: causal self-attention, over all tokens or of one token over a cache
    of those before it, and a GELU MLP of ratio 4. The residual stream stays in float32 under autocast."""

    def __init__(self, width: int, head_dim: int):
        super().__init__()
        self.head_dim = head_dim
        self.attention = nn.ModuleDict(
            {"norm": nn.LayerNorm(width), "qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)}
        )
        main = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.mlp = nn.ModuleDict({"norm": nn.LayerNorm(width), "main": main})

    def forward(self, h, cache=None, t=None):
        """h (N, T, width); or h (N, 1, width), the token at position t (a tensor (1,)), with a cache, keys and values
        (N, heads, T, head_dim), that is filled up to t. Their shapes do not depend on t: one graph serves all."""
        N, T, width = h.shape
        q, k, v = self.attention.qkv(self.attention.norm(h)).view(N, T, 3, -1, self.head_dim).permute(2, 0, 3, 1, 4)
        if cache is None:
            a = nnf.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            keys, values = cache
            keys.index_copy_(2, t, k)
            values.index_copy_(2, t, v)
            filled = torch.arange(keys.shape[2], device=h.device)[None] <= t
            a = nnf.scaled_dot_product_attention(q, keys, values, attn_mask=filled)
        h = h + self.attention.proj(a.transpose(1, 2).reshape(N, T, width))
        return h + self.mlp.main(self.mlp.norm(h))


class FlowBlock(nn.Module):
    """f_i: an affine autoregressive map of the tokens, read in raster order or, if `flip`, in reversed order."""

    def __init__(self, config: Config, flip: bool):
        super().__init__()
        T, D, width = config.tokens, config.dim, config.width
        self.flip, self.clip, self.head_dim = flip, config.clip, config.head_dim
        self.proj_in = nn.Linear(D, width)
        self.pos_embed = nn.Parameter(1e-2 * torch.randn(T, width))
        if config.num_classes:
            self.class_embed = nn.Parameter(1e-2 * torch.randn(config.num_classes, 1, width))
        self.attn_blocks = nn.ModuleList(CausalLayer(width, config.head_dim) for _ in range(config.layers))
        self.proj_out = PreciseLinear(width, 2 * D)

    def order(self, x: Tensor) -> Tensor:
        """Raster order -> reading order, and back."""
        return x.flip(1) if self.flip else x

    def embedding(self, y: Tensor) -> Tensor:
        """Labels (N,) -> position + class embedding (N, T, width) in reading order. "No class": the classes' mean."""
        embedding = self.pos_embed.expand(len(y), -1, -1)
        if hasattr(self, "class_embed"):
            none = (y < 0).view(-1, 1, 1)
            embedding = embedding + torch.where(none, self.class_embed.mean(0), self.class_embed[y.clamp(min=0)])
        return self.order(embedding)

    def affine(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden tokens -> log-scale alpha and shift mu of the *next* token, each (N, T, D), clipped to [-c, c]. Norm
        control, part one: clipping bounds how far a block can move the norm of its input."""
        out = self.proj_out(h)
        return (out if self.clip is None else out.clamp(-self.clip, self.clip)).chunk(2, dim=-1)

    def alpha_mu(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens in reading order -> (alpha, mu)_t of every token, from the tokens before it; alpha_0 = mu_0 = 0."""
        h = self.proj_in(x) + self.embedding(y)
        for layer in self.attn_blocks:
            h = layer(h)
        alpha, mu = self.affine(h)
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
        shape = (N, width // self.head_dim, T, self.head_dim)
        dtype = self.proj_in(x[:, :1]).dtype  # autocast's, if it is on
        # Keys and values of each layer. Compiled code updates them in place, but would copy views of one tensor.
        cache = [x.new_zeros(shape, dtype=dtype) for _ in range(2 * len(self.attn_blocks))]
        t = torch.zeros(1, dtype=torch.long, device=x.device)
        for _ in range(T - 1):
            self.step(x, embedding, t, guidance, *cache)
        return self.order(x)

    def step(self, x: Tensor, embedding: Tensor, t: Tensor, guidance: float, *cache: Tensor):
        """Turn token t + 1 of x (N, T, D) from x^{i+1} into x^i, given those before it, in place; t (1,) moves on."""
        token = x.index_select(1, t)
        h = self.proj_in(torch.cat([token, token]) if guidance else token) + embedding.index_select(1, t)
        for layer, keys, values in zip(self.attn_blocks, cache[::2], cache[1::2]):
            h = layer(h, (keys, values), t)
        t += 1
        alpha, mu = guide(*self.affine(h), guidance * t / (x.shape[1] - 1)) if guidance else self.affine(h)
        x.index_copy_(1, t, x.index_select(1, t) * torch.exp(alpha) + mu)

    def jacobi_step(self, x: Tensor, x_next: Tensor, y: Tensor, guidance: float):
        """All tokens of x (N, T, D) at once, in place: x <- x^{i+1} exp(alpha(x)) + mu(x)."""
        alpha, mu = self.alpha_mu(torch.cat([x, x]) if guidance else x, y)
        if guidance:
            T = x.shape[1]
            alpha, mu = guide(alpha, mu, guidance * torch.arange(T, device=x.device).view(T, 1) / (T - 1))
        x.copy_(x_next * torch.exp(alpha) + mu)


def guide(alpha: Tensor, mu: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Guidance of the exact inverse (TARFlow): alpha_c + w (alpha_c - alpha_u), likewise mu, of a batch that holds the
    conditional and then the unconditional branch. In TARFlow's evaluation w grows along the tokens: w t / (T - 1)."""
    (alpha, alpha_u), (mu, mu_u) = alpha.chunk(2), mu.chunk(2)
    return alpha + w * (alpha - alpha_u), mu + w * (mu - mu_u)


class TARFlow(HubModel):
    """F: data -> noise, B autoregressive blocks of alternating direction, trained by maximum likelihood."""

    def __init__(self, config: Config):
        super().__init__(config)
        self.blocks = nn.ModuleList(FlowBlock(config, flip=i % 2 == 1) for i in range(config.blocks))

    def forward(self, x: Tensor, y: Tensor | None = None) -> tuple[list[Tensor], Tensor]:
        """x (N, C, H, W), y (N,) -> the trajectory [x^0 .. x^B = z], each (N, T, D), and log|det F'| (N,) in nats."""
        y = no_class(x) if y is None else y
        states, logdet = [patchify(x, self.config.patch_size)], x.new_zeros(len(x))
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
        """The exact inverse: z (N, T, D) tokens, y (N,) -> x~ (N, C, H, W), in B (T - 1) sequential steps."""
        y = no_class(z) if y is None else y
        for block in reversed(self.blocks):
            z = block.inverse(z, y, guidance)
        return unpatchify(z, self.config.patch_size)

    @torch.no_grad()
    def inverse_jacobi(self, z: Tensor, y: Tensor | None = None, guidance: float = 0.0, tolerance=1e-3) -> Tensor:
        """The same map by fixed-point iteration on all tokens of a block. Each round makes at least one more token
        exact, and a block ends when no number moves by more than the tolerance."""
        y = no_class(z) if y is None else y
        if guidance:
            y = torch.cat([y, no_class(y)])
        for block in reversed(self.blocks):
            x_next = block.order(z)
            x = x_next.clone()
            for _ in range(z.shape[1] - 1):
                before = x.clone()
                block.jacobi_step(x, x_next, y, guidance)
                if (x - before).abs().max() <= tolerance:
                    break
            z = block.order(x)
        return unpatchify(z, self.config.patch_size)

    def denoise(self, x: Tensor, y: Tensor | None, sigma: float) -> Tensor:
        """Score-based denoising, x~ + sigma^2 grad log p(x~) (Tweedie's formula): (N, C, H, W) -> (N, C, H, W)."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (score,) = torch.autograd.grad(self.log_prob(x, y).sum(), x)
        return x.detach() + sigma**2 * score

    @classmethod
    def from_tarflow(cls, state_dict: dict[str, Tensor], config: Config | None = None) -> "TARFlow":
        """A model with the weights of a published TARFlow checkpoint, with or without classes. Its flow is not clipped.

        The sizes are read off the tensors' shapes, for images of three channels; `config` says otherwise. Raises
        ValueError for a checkpoint of another kind: a learned prior (`var` other than ones: the volume-preserving
        variant), an attention mask that is not causal, names or shapes that do not fit.
        """
        state = dict(state_dict)
        if "var" not in state or not bool((state.pop("var") == 1).all()):
            raise ValueError("not an affine TARFlow checkpoint: its prior variance `var` is missing or not all ones")
        for name in [name for name in state if name.endswith(".attn_mask")]:
            mask = state.pop(name)
            if not torch.equal(mask.bool(), torch.ones_like(mask, dtype=torch.bool).tril()):
                raise ValueError(f"{name} is not a causal mask")
        try:
            model = cls(dataclasses.replace(config or config_of_tarflow(state), clip=None))
            model.load_state_dict(state)
        except (KeyError, RuntimeError) as error:
            raise ValueError(f"the checkpoint does not fit: {error}") from None
        return model.eval()


def config_of_tarflow(state: dict[str, Tensor]) -> Config:
    """The sizes of a published TARFlow, from the shapes of its tensors. Its heads have 64 channels, images three."""
    tokens, width = state["blocks.0.pos_embed"].shape
    patch_size = math.isqrt(state["blocks.0.proj_in.weight"].shape[1] // 3)
    blocks, layers = (1 + max(int(name.split(".")[i]) for name in state if "attn_blocks" in name) for i in (1, 3))
    num_classes = len(state.get("blocks.0.class_embed", ()))
    return Config(math.isqrt(tokens) * patch_size, 3, patch_size, num_classes, width, blocks, layers)


# ----------------------------------------------------------------------------------------------------------------------
# 3. G: the reverse model, a bidirectional ViT with RMSNorm, QK-norm, RoPE, SwiGLU and gated residuals


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
    (a, b), (cos, sin) = x.chunk(2, dim=-1), rope
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)


class ReverseLayer(nn.Module):
    """One layer of the reverse ViT. It starts near the identity: the gates at one, the branches' last layers small
    (gates at zero, before layers of full size, learned half as fast on digits [ours])."""

    def __init__(self, width: int, head_dim: int):
        super().__init__()
        hidden = 32 * round(width * 8 / 3 / 32)
        self.head_dim, self.norm = head_dim, RMSNorm()
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.qk_scale = nn.Parameter(torch.ones(head_dim))  # without it no logit could exceed sqrt(head_dim)
        self.proj = nn.Linear(width, width, bias=False)
        self.attn_gate = nn.Parameter(torch.ones(width))
        self.mlp_in = nn.Linear(width, 2 * hidden, bias=False)
        self.mlp_out = nn.Linear(hidden, width, bias=False)
        self.mlp_gate = nn.Parameter(torch.ones(width))
        with torch.no_grad():
            self.proj.weight.mul_(0.1)
            self.mlp_out.weight.mul_(0.1)

    def forward(self, h, rope):
        N, T, width = h.shape
        q, k, v = self.qkv(self.norm(h)).view(N, T, 3, -1, self.head_dim).permute(2, 0, 3, 1, 4)
        q = rotate(self.qk_scale * self.norm(q), rope).to(v.dtype)
        k = rotate(self.qk_scale * self.norm(k), rope).to(v.dtype)
        a = nnf.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(N, T, width)
        h = h + self.attn_gate * self.proj(a)
        gate, value = self.mlp_in(self.norm(h)).chunk(2, dim=-1)
        return h + self.mlp_gate * self.mlp_out(nnf.silu(gate) * value)


class ReverseBlock(nn.Module):
    """G_i(h | class, w): hidden tokens (N, T, width), y (N,), w (N,) -> hidden tokens (N, T, width).

    Class and guidance scale enter as context tokens, from a table and an MLP in each block. They are dropped at the
    end, so that a block is a function of (h, class, w) and of nothing else [ours].
    """

    def __init__(self, config: Config):
        super().__init__()
        width, self.w_max = config.width, config.w_max
        self.copies = (config.class_tokens, config.guidance_tokens)
        self.class_embed = nn.Embedding(1 + config.num_classes, width)  # the first row is "no class"
        self.guidance_embed = nn.Sequential(nn.Linear(32, width), nn.SiLU(), nn.Linear(width, width))
        self.slot_embed = nn.Parameter(torch.randn(sum(self.copies), width))  # tells the context tokens apart
        self.layers = nn.ModuleList(ReverseLayer(width, config.head_dim) for _ in range(config.layers))
        rope = rope_table(sum(self.copies), math.isqrt(config.tokens), config.head_dim)
        self.register_buffer("rope", rope, persistent=False)

    def context(self, y: Tensor, w: Tensor) -> Tensor:
        """Labels (N,), guidance scales (N,) -> context tokens (N, K, width)."""
        share = (w / self.w_max).clamp(0, 1) if self.w_max else torch.zeros_like(w)  # beyond the range: its end
        waves = torch.cos(math.pi * share[:, None] * torch.arange(32, device=w.device))
        class_tokens = self.class_embed(y + 1)[:, None].expand(-1, self.copies[0], -1)
        guidance_tokens = self.guidance_embed(waves)[:, None].expand(-1, self.copies[1], -1)
        return torch.cat([class_tokens, guidance_tokens], dim=1) + self.slot_embed

    def forward(self, h, y, w):
        h = torch.cat([self.context(y, w), h], dim=1)
        for layer in self.layers:
            h = layer(h, self.rope)
        return h[:, sum(self.copies) :]


def projection_head(width: int, dim: int) -> nn.Sequential:
    """phi_i: hidden tokens (N, T, width) -> token space (N, T, D), linear after an RMSNorm."""
    return nn.Sequential(RMSNorm(), PreciseLinear(width, dim))


class BiFlow(HubModel):
    """G: noise -> clean data in one pass, B blocks aligned with the flow's states and one denoise block.

    Block j = 0 .. B-1 maps h^{B-j} to h^{B-1-j}: its target is x^{B-1-j}, so that no block reproduces its own input,
    and the last of them is aligned with the *noisy* x^0. The denoise block then maps h^0 to the clean x'. Without it
    (config.denoise = "none") the output of block B-1 is x' itself, and its target is x^0.
    """

    def __init__(self, config: Config):
        super().__init__(config)
        D, width = config.dim, config.width
        blocks = config.blocks + (config.denoise == "learned")
        self.proj_in = nn.Linear(D, width)
        self.pos_embed = nn.Parameter(0.3 * torch.randn(config.tokens, width))
        self.blocks = nn.ModuleList(ReverseBlock(config) for _ in range(blocks))
        # One head for each state between z and x'; heads[j] reads block j. Naive distillation has none.
        supervised = 0 if config.strategy == "naive" else blocks - 1
        self.heads = nn.ModuleList(projection_head(width, D) for _ in range(supervised))
        if config.strategy == "hidden":  # the state itself is forced through token space
            self.lifts = nn.ModuleList(nn.Linear(D, width) for _ in range(supervised))
        self.out = projection_head(width, D)

    def conditions(self, z: Tensor, y: Tensor | None, w: Tensor | float) -> tuple[Tensor, Tensor]:
        """y or None, w or a float -> (N,) labels and (N,) scales on z's device; w = 0 where there is no class."""
        if y is None or self.config.num_classes == 0:
            y = no_class(z)
        w = w.to(z.dtype) if isinstance(w, Tensor) else torch.full((len(z),), w, dtype=z.dtype, device=z.device)
        return y, torch.where(y < 0, 0.0, w)

    def project(self, j: int, h: Tensor) -> tuple[Tensor, Tensor | None]:
        """After block j: the state that goes on, and what its head, if it has one, predicts of the flow's state."""
        if j >= len(self.heads):
            return h, None
        prediction = self.heads[j](h)
        return (self.lifts[j](prediction) if self.config.strategy == "hidden" else h), prediction

    def image(self, h: Tensor) -> Tensor:
        return unpatchify(self.out(h), self.config.patch_size)

    def forward(self, z: Tensor, y: Tensor | None, w: Tensor | float) -> tuple[Tensor, dict[int, Tensor]]:
        """Training: z (N, T, D), y (N,), w (N,) -> x' (N, C, H, W), predictions {i: (N, T, D)}, predictions[i] ~ x^i.

        Training-time guidance: (G_i(h | class, w) + w G_i(h | none)) / (1 + w) goes on and is supervised, so that
        G_i(h | class, w) learns to be the guided state. The none-branch runs without gradient; w_i = w for the aligned
        blocks, 0 for the denoise block [ours].
        """
        y, w = self.conditions(z, y, w)
        none, zero, w_i = no_class(z), torch.zeros_like(w), w.view(-1, 1, 1)
        h, predictions = self.proj_in(z) + self.pos_embed, {}
        for j, block in enumerate(self.blocks):
            out = block(h, y, w)
            if self.config.w_max and self.config.num_classes and j < self.config.blocks:
                with torch.no_grad():
                    out_none = block(h, none, zero)
                out = (out + w_i * out_none) / (1 + w_i)
            h, prediction = self.project(j, out)
            if prediction is not None:
                predictions[self.config.blocks - 1 - j] = prediction
        return self.image(h), predictions

    @torch.no_grad()
    def sample(self, z: Tensor, y: Tensor | None = None, w: Tensor | float = 0.0) -> Tensor:
        """1-NFE sampling: z (N, T, D), y (N,), w in [0, w_max] -> x' (N, C, H, W). Each block is called once. Without
        y, a class-conditional G gives the mean over the classes that fit z: it is no unconditional sampler."""
        y, w = self.conditions(z, y, w)
        h = self.proj_in(z) + self.pos_embed
        for j, block in enumerate(self.blocks):
            h = block(h, y, w)
            if self.config.strategy == "hidden":
                h, _ = self.project(j, h)
        return self.image(h)

    @torch.no_grad()
    def sample_two_pass(self, z: Tensor, y: Tensor | None, w: Tensor | float) -> Tensor:
        """2-NFE guidance at sampling: h <- (1 + w) G_i(h | class) - w G_i(h | none), in the aligned blocks."""
        y, w = self.conditions(z, y, w)
        none, zero, w_i = no_class(z), torch.zeros_like(w), w.view(-1, 1, 1)
        h = self.proj_in(z) + self.pos_embed
        for j, block in enumerate(self.blocks):
            out = block(h, y, zero)
            if j < self.config.blocks:
                out = (1 + w_i) * out - w_i * block(h, none, zero)
            h = self.project(j, out)[0] if self.config.strategy == "hidden" else out
        return self.image(h)


# ----------------------------------------------------------------------------------------------------------------------
# 4. Losses


def gaussian_log_prob(z: Tensor) -> Tensor:
    """log N(z; 0, I) (N,) in nats of tokens (N, T, D)."""
    return -0.5 * (z.square() + math.log(2 * math.pi)).sum((1, 2))


def nll_loss(z: Tensor, logdet: Tensor) -> Tensor:
    """Stage 1: the mean negative log-likelihood, in nats per dimension, of latents z (N, T, D) with log-dets (N,)."""
    return -(gaussian_log_prob(z) + logdet).mean() / z[0].numel()


def adaptive_weight(distance: Tensor, p: float = 1.0, c: float = 0.01) -> Tensor:
    """w_p = sg((D + c)^-p), for each sample; p = 0 turns it off."""
    return (distance.detach() + c) ** -p


def rms_normalize(x: Tensor) -> Tensor:
    """Norm control, part two: each state x^i (N, T, D) divided by its per-sample RMS [ours: which norm]."""
    return x / x.square().mean((1, 2), keepdim=True).sqrt().clamp(min=1e-6)


def squared_distance(prediction: Tensor, target: Tensor) -> Tensor:
    """D, (N,): the squared difference summed over all dimensions, for which c = 0.01 was published."""
    return (prediction.float() - target.float()).square().flatten(1).sum(1)


def reverse_loss(
    x_prime: Tensor, predictions: dict[int, Tensor], x: Tensor, states: list[Tensor], p=1.0, trajectory_norm=True
) -> tuple[Tensor, dict[str, Tensor]]:
    """Stage 2: w_p D(x, x') + sum_i w_p D(x^i, predictions[i]), averaged over the batch [ours: x' counts as a state].

    x' and its target x (N, C, H, W): the clean image, or the noisy one where there is no denoise block; states: the
    flow's trajectory, (N, T, D) each. The strategy decides which predictions there are; naive distillation has none.
    Also returns the unweighted relative errors |x^i - prediction|^2 / |x^i|^2, (N,) each, by name: "x", "x0", "x1", ...
    """
    pairs = {"x": (x_prime, x)}
    for i, prediction in predictions.items():
        pairs[f"x{i}"] = (prediction, rms_normalize(states[i]) if trajectory_norm else states[i])
    loss, errors = 0.0, {}
    for name, (prediction, target) in pairs.items():
        distance = squared_distance(prediction, target)
        loss = loss + (adaptive_weight(distance, p) * distance).mean()
        errors[name] = distance.detach() / target.square().flatten(1).sum(1)
    return loss, errors


class FeatureDistance(nn.Module):
    """Squared differences (N,) of a network's features of images in [-1, 1], normalised as in its training."""

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

    decode: what G sees (N, C, H, W) -> images (N, 1 or 3, S, S) in [-1, 1], differentiable.
    nets: modules that take two batches of images in [-1, 1], the same random crop of each resized to `size`, and give a
    distance for each pair. Gradients flow through them, the crop and the decoder to x'.
    """

    def __init__(self, decode, nets: dict[str, nn.Module], weights: dict[str, float], p: float = 1.0, size: int = 224):
        super().__init__()
        self.decode, self.weights, self.p, self.size = decode, weights, p, size
        self.nets = nn.ModuleDict(nets).eval().requires_grad_(False)

    def forward(self, x_prime: Tensor, x: Tensor, u: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """x', x (N, C, H, W), u (N, 4) the crop's uniform numbers -> mean weighted loss, distances (N,) by name."""
        a = checkpoint(self.decode, x_prime, use_reentrant=False)  # its activations are most of the memory
        with torch.no_grad():
            b = self.decode(x)
        a, b = (random_resized_crop(images.float(), u, self.size) for images in (a, b))
        distances = {name: net(a, b).float().flatten() for name, net in self.nets.items()}
        weighted = (self.weights[k] * (adaptive_weight(d, self.p) * d).mean() for k, d in distances.items())
        return sum(weighted), {k: d.detach() for k, d in distances.items()}


def random_resized_crop(x: Tensor, u: Tensor, size: int) -> Tensor:
    """Crop images (N, C, S, S) to a random area (0.08 to 1) and ratio (3/4 to 4/3), resize to (N, C, size, size).
    u (N, 4): uniform numbers that decide area, ratio, x and y. A side longer than the image is cut to it [ours]."""
    area, ratio = 0.08 + 0.92 * u[:, 0], torch.exp((2 * u[:, 1] - 1) * math.log(4 / 3))
    w, h = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    zero = torch.zeros_like(w)
    centre_x, centre_y = (2 * u[:, 2] - 1) * (1 - w), (2 * u[:, 3] - 1) * (1 - h)
    theta = torch.stack([w, zero, centre_x, zero, h, centre_y], dim=1).view(-1, 2, 3)
    with torch.autocast(x.device.type, enabled=False):  # affine_grid would compute places in bfloat16
        grid = nnf.affine_grid(theta, [len(x), 1, size, size], align_corners=False)
    return nnf.grid_sample(x, grid, padding_mode="border", align_corners=False)


# ----------------------------------------------------------------------------------------------------------------------
# 5. Running the networks: precision, compilation, VAE


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
    """Compile blocks, and what their inverses call, in place, so that state dicts keep their names."""
    torch._dynamo.config.optimize_ddp = False  # it would cut each block into several graphs
    for block in model.blocks:
        block.compile()
        if isinstance(block, FlowBlock):
            block.step = torch.compile(block.step)
            block.jacobi_step = torch.compile(block.jacobi_step)


class VAE:
    """Images <-> latents, by a diffusers AutoencoderKL. `encode` gives raw latents, `decode` takes normalised ones."""

    def __init__(self, name: str, device: torch.device, mean=0.0, std=1.0, bf16: bool = False):
        from diffusers import AutoencoderKL

        dtype = torch.bfloat16 if bf16 else torch.float32
        net = AutoencoderKL.from_pretrained(name, torch_dtype=dtype, low_cpu_mem_usage=False).eval()
        self.net = net.requires_grad_(False).to(device).to(memory_format=torch.channels_last)
        self.mean, self.std = torch.tensor(mean, device=device), torch.tensor(std, device=device)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) in [-1, 1] -> the posterior's mean and log-variance, (N, 2, C, h, w), not normalised."""
        posterior = self.net.encode(images.to(self.net.dtype)).latent_dist
        return torch.stack([posterior.mean, posterior.logvar], dim=1).float()

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents (N, C, h, w) -> images (N, 3, H, W) in about [-1, 1]. Differentiable."""
        with torch.autocast(latents.device.type, enabled=False):  # it would keep group_norm's activations in float32
            latents = latents * self.std + self.mean
            return self.net.decode(latents.to(self.net.dtype)).sample.float()
