"""BiFlow: Bidirectional Normalizing Flow, from data to noise and back (arXiv 2512.10953, CVPR 2026).

The whole method in one file, from top to bottom:

    1. sizes and tokens
    2. F, the forward model: a TARFlow, trained by maximum likelihood          x -> z
    3. G, the reverse model: a bidirectional Transformer, trained along F      z -> x  in one pass
    4. the losses of both

Notation, as in the paper: F = f_{B-1} o ... o f_0 has B blocks; x is a clean image (or latent), x~ = x + sigma * eps
its noisy version; x^0 = x~, x^{i+1} = f_i(x^i), z = x^B. G's hidden state h^i belongs to x^i; x' = G(z).
Shapes: images and latents are (N, C, H, W); tokens (N, T, D) in raster order; labels (N,) long, -1 for "no class".
A comment "[ours]" marks a choice that the paper leaves open.
"""

import dataclasses
import json
import math
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin, snapshot_download
from torch import Tensor, nn

# ----------------------------------------------------------------------------------------------------------------------
# 1. Sizes and tokens


@dataclass
class Config:
    """All that shapes a network, F or G, and nothing else. Raises ValueError where the fields do not fit together."""

    img_size: int = 8
    channels: int = 1
    patch_size: int = 2
    num_classes: int = 10  # 0: unconditional
    width: int = 64
    blocks: int = 4  # B: the flow's blocks. G has as many aligned blocks, and the denoise block
    layers: int = 2  # Transformer layers in each block
    head_dim: int = 64
    clip: float | None = 3.0  # F: bound c on (alpha, mu); None: unbounded
    strategy: str = "align"  # G: how it is supervised: align, naive or hidden
    denoise: str = "learned"  # G: learned (one more block, clean target) or none (noisy target)
    class_tokens: int = 8  # G: in-context tokens for the class ...
    guidance_tokens: int = 4  # ... and for the guidance scale
    w_max: float = 2.0  # G: guidance scales it is trained for, [0, w_max]; 0: trained without guidance

    def __post_init__(self):
        def check(ok: bool, what: str):
            if not ok:
                raise ValueError(f"config: {what}")

        for field in dataclasses.fields(self):
            value, kinds = getattr(self, field.name), {int: int, str: str}.get(field.type, (int, float))
            check(
                (value is None and field.name == "clip") or (isinstance(value, kinds) and not isinstance(value, bool)),
                f"{field.name} is {value!r}, of the wrong type",
            )
        for name in "img_size channels patch_size width blocks layers head_dim class_tokens guidance_tokens".split():
            check(getattr(self, name) > 0, f"{name} must be positive, not {getattr(self, name)}")
        check(self.img_size % self.patch_size == 0, f"patch_size {self.patch_size} must divide img_size {self.img_size}")
        check(self.width % self.head_dim == 0, f"head_dim {self.head_dim} must divide width {self.width}")
        check(self.head_dim % 4 == 0, f"head_dim must be a multiple of 4, not {self.head_dim}")
        check(self.num_classes >= 0, f"num_classes must not be negative, it is {self.num_classes}")
        check(self.clip is None or 0 < self.clip < math.inf, f"clip must be positive or none, not {self.clip}")
        check(self.strategy in ("align", "naive", "hidden"), f"strategy {self.strategy!r} is not align, naive or hidden")
        check(self.denoise in ("learned", "none"), f"denoise {self.denoise!r} is neither learned nor none")
        check(0 <= self.w_max < math.inf, f"w_max must be 0 or more, not {self.w_max}")

    @property
    def tokens(self) -> int:
        """T, the number of tokens."""
        return (self.img_size // self.patch_size) ** 2

    @property
    def dim(self) -> int:
        """D, the numbers in a token."""
        return self.channels * self.patch_size**2


_latents = dict(img_size=32, channels=4, num_classes=1000)  # of ImageNet at 256 x 256: 256 tokens of 16 numbers
SIZES = {
    "toy": Config(class_tokens=1, guidance_tokens=1, head_dim=32),
    "B": Config(**_latents, width=768, blocks=8, layers=2),
    "L": Config(**_latents, width=1024, blocks=8, layers=3),
    "XL": Config(**_latents, width=1536, blocks=8, layers=3),
}


def patchify(x: Tensor, p: int) -> Tensor:
    """Image (N, C, H, W) -> tokens (N, T, D), T = H W / p^2 in raster order, D = C p^2 with the channel outermost."""
    N, C, H, W = x.shape
    return x.view(N, C, H // p, p, W // p, p).permute(0, 2, 4, 1, 3, 5).reshape(N, -1, C * p * p)


def unpatchify(tokens: Tensor, p: int) -> Tensor:
    """Tokens (N, T, D) -> square image (N, C, H, W), the inverse of patchify."""
    N, T, D = tokens.shape
    s = math.isqrt(T)
    return tokens.view(N, s, s, D // p**2, p, p).permute(0, 3, 1, 4, 2, 5).reshape(N, -1, s * p, s * p)


# ----------------------------------------------------------------------------------------------------------------------
# What both networks share: saving and loading, and arithmetic that stays in float32 under autocast


MODEL_CARD = """---
{{ card_data }}
---
One of the two networks of a BiFlow, *Bidirectional Normalizing Flow: From Data to Noise and Back* (arXiv 2512.10953):
a flow F from data to noise (TARFlow), or its learned inverse G from noise to data in one pass (BiFlow).
`config.json` says which size. With the reference implementation's `biflow.py`:

    from biflow import BiFlow, TARFlow
    images = BiFlow.from_pretrained("USER/NAME").sample(torch.randn(n, T, D), labels, w)   # of a G
    images = TARFlow.from_pretrained("USER/NAME").inverse(torch.randn(n, T, D), labels)    # of an F

Data, VAE, its latents' mean and std, sigma and training settings, where known, are in `run.json`.
"""


class HubModel(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="biflow",
    tags=["normalizing-flow", "image-generation"],
    paper_url="https://arxiv.org/abs/2512.10953",
    model_card_template=MODEL_CARD,
):
    """save_pretrained (huggingface_hub's) writes config.json, model.safetensors and a model card; loading is strict."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config

    def _save_pretrained(self, save_directory: Path):
        from safetensors.torch import save_file  # not needed to build a model

        weights = {k: v.detach().cpu().contiguous() for k, v in self.state_dict().items()}
        save_file(weights, save_directory / "model.safetensors", metadata={"crc32": checksum(weights)})

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **hub_options):
        """The model saved in a folder, or, for a "user/name" of which no part is a local folder, on the Hub.

        Raises FileNotFoundError where the folder or one of its two files is missing, ValueError where the config has
        unknown fields or does not fit the weights. `hub_options` (revision, token, ...) go to snapshot_download.
        """
        name = str(pretrained_model_name_or_path)
        is_hub_name = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and not Path(name).parent.exists()
        if is_hub_name and isinstance(pretrained_model_name_or_path, str):
            name = snapshot_download(name, allow_patterns=["config.json", "model.safetensors"], **hub_options)
        folder = Path(name).expanduser()
        for file in (folder, folder / "config.json", folder / "model.safetensors"):
            if not file.exists():
                raise FileNotFoundError(f"{file} does not exist")
        from safetensors import safe_open

        try:
            config = Config(**json.loads((folder / "config.json").read_text()))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{folder / 'config.json'}: {error}") from None
        try:
            with safe_open(folder / "model.safetensors", "pt") as file:
                weights, metadata = {k: file.get_tensor(k) for k in file.keys()}, file.metadata() or {}
                if "crc32" in metadata and metadata["crc32"] != checksum(weights):
                    raise ValueError("its checksum does not match")
        except Exception as error:  # safetensors raises a class of its own for a damaged file
            raise ValueError(f"{folder / 'model.safetensors'} is damaged: {error}") from None
        model = cls(config)
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            raise ValueError(f"{folder}: config.json does not match model.safetensors: {error}") from None
        return model.eval()


def checksum(weights: dict[str, Tensor]) -> str:
    """CRC-32 of all tensors' bytes, in the order of their names."""
    crc = 0
    for name in sorted(weights):
        crc = zlib.crc32(weights[name].contiguous().view(-1).view(torch.uint8).numpy(), crc)
    return f"{crc:08x}"


def upcast(x: Tensor) -> Tensor:
    """Half precision -> float32; float32 and float64 pass."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


class PreciseLinear(nn.Linear):
    """A linear layer that ignores autocast: the last layers, whose outputs are exponents, log-dets and pixels."""

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


# ----------------------------------------------------------------------------------------------------------------------
# 2. F: TARFlow (Zhai et al., arXiv 2412.06329), with clipping. Parameter names are those of the published TARFlow


class CausalAttention(nn.Module):
    """Pre-norm causal self-attention: (N, T, C) -> (N, T, C), or one token at a time with a cache."""

    def __init__(self, width: int, head_dim: int):
        super().__init__()
        self.head_dim = head_dim
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, h, cache=None, t=0):
        """h (N, T, C); or h (N, 1, C), the token at position t, with a cache of keys and values, each
        (N, heads, T, head_dim) and filled up to t."""
        N, T, C = h.shape
        q, k, v = self.qkv(self.norm(h)).view(N, T, 3, C // self.head_dim, self.head_dim).permute(2, 0, 3, 1, 4)
        if cache is not None:
            for past, new in zip(cache, (k, v)):
                past[:, :, t : t + 1] = new
            k, v = (past[:, :, : t + 1] for past in cache)
        a = F.scaled_dot_product_attention(q, k, v, is_causal=cache is None)
        return self.proj(a.transpose(1, 2).reshape(N, T, C))


class MLP(nn.Module):
    """Pre-norm GELU MLP of ratio 4: (N, T, C) -> (N, T, C)."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.main = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, h):
        return self.main(self.norm(h))


class CausalLayer(nn.Module):
    """One Transformer layer of the flow. The residual stream stays in float32 under autocast."""

    def __init__(self, width: int, head_dim: int):
        super().__init__()
        self.attention = CausalAttention(width, head_dim)
        self.mlp = MLP(width)

    def forward(self, h, cache=None, t=0):
        h = h + self.attention(h, cache, t)
        return h + self.mlp(h)


class FlowBlock(nn.Module):
    """f_i: an affine autoregressive map of the tokens, read in raster order or, if `flip`, in reversed order."""

    def __init__(self, config: Config, flip: bool):
        super().__init__()
        T, D, C = config.tokens, config.dim, config.width
        self.flip, self.clip, self.head_dim = flip, config.clip, config.head_dim
        self.proj_in = nn.Linear(D, C)
        self.pos_embed = nn.Parameter(1e-2 * torch.randn(T, C))
        self.class_embed = nn.Parameter(1e-2 * torch.randn(config.num_classes, 1, C)) if config.num_classes else None
        self.attn_blocks = nn.ModuleList(CausalLayer(C, config.head_dim) for _ in range(config.layers))
        self.proj_out = PreciseLinear(C, 2 * D)
        nn.init.zeros_(self.proj_out.weight)  # so that a new block is the identity
        nn.init.zeros_(self.proj_out.bias)

    def embedding(self, y: Tensor) -> Tensor:
        """Labels (N,) -> position + class embedding (N, T, C) in raster order; "no class" is the mean of the classes."""
        if self.class_embed is None:
            return self.pos_embed.expand(len(y), -1, -1)
        none = (y < 0).view(-1, 1, 1)
        return self.pos_embed + torch.where(none, self.class_embed.mean(0), self.class_embed[y.clamp(min=0)])

    def affine(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states (N, T, C) -> log-scale alpha and shift mu of the *next* token, each (N, T, D), clipped to [-c, c].

        Norm control, part one: clipping bounds how far a block can move the norm of its input.
        """
        out = self.proj_out(h)
        return (out if self.clip is None else out.clamp(-self.clip, self.clip)).chunk(2, dim=-1)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """x^i (N, T, D), y (N,) -> x^{i+1} (N, T, D), log|det f_i'| (N,) in nats.

        x^{i+1}_t = (x^i_t - mu_t) exp(-alpha_t), where (alpha, mu)_t depend on the tokens before t; alpha_0 = mu_0 = 0.
        """
        h = self.proj_in(x) + self.embedding(y)
        if self.flip:
            x, h = x.flip(1), h.flip(1)
        for layer in self.attn_blocks:
            h = layer(h)
        alpha, mu = self.affine(h)
        alpha, mu = F.pad(alpha[:, :-1], (0, 0, 1, 0)), F.pad(mu[:, :-1], (0, 0, 1, 0))  # output t-1 is for token t
        x = (x - mu) * torch.exp(-alpha)
        return (x.flip(1) if self.flip else x), -alpha.sum((1, 2))

    def inverse(self, x: Tensor, y: Tensor, guidance: float) -> Tensor:
        """x^{i+1} (N, T, D) -> x^i: x^i_t = x^{i+1}_t exp(alpha_t) + mu_t, one token after another, with a KV cache.

        Guidance (TARFlow): alpha = alpha_c + w (alpha_c - alpha_u), likewise mu; both branches run as one batch.
        """
        N, T, _ = x.shape
        if guidance:
            y = torch.cat([y, torch.full_like(y, -1)])
        embedding = self.embedding(y)
        x, embedding = (x.flip(1), embedding.flip(1)) if self.flip else (x.clone(), embedding)
        dtype = self.proj_in(x[:, :1]).dtype  # of keys and values: autocast's, if it is on
        size = (len(y), embedding.shape[2] // self.head_dim, T, self.head_dim)
        cache = [[x.new_empty(size, dtype=dtype) for _ in "kv"] for _ in self.attn_blocks]
        for t in range(T - 1):
            self.step(x, embedding, cache, t, guidance)
        return x.flip(1) if self.flip else x

    def step(self, x: Tensor, embedding: Tensor, cache: list, t: int, guidance: float):
        """Make token t + 1 of x (N, T, D) from token t, in place. Compiled, one graph with a dynamic t serves all."""
        token = x[:, t : t + 1]
        h = self.proj_in(torch.cat([token, token]) if guidance else token) + embedding[:, t : t + 1]
        for layer, layer_cache in zip(self.attn_blocks, cache):
            h = layer(h, layer_cache, t)
        alpha, mu = self.affine(h)
        if guidance:
            (alpha, alpha_u), (mu, mu_u) = alpha.chunk(2), mu.chunk(2)
            alpha, mu = alpha + guidance * (alpha - alpha_u), mu + guidance * (mu - mu_u)
        x[:, t + 1 : t + 2] = x[:, t + 1 : t + 2] * torch.exp(alpha) + mu


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

    def denoise(self, x: Tensor, y: Tensor | None, sigma: float) -> Tensor:
        """Score-based denoising, x~ + sigma^2 grad log p(x~) (Tweedie's formula): (N, C, H, W) -> (N, C, H, W)."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (score,) = torch.autograd.grad(self.log_prob(x, y).sum(), x)
        return x.detach() + sigma**2 * score

    @classmethod
    def from_tarflow(cls, state_dict: dict[str, Tensor], config: Config) -> "TARFlow":
        """A model with the weights of a published TARFlow checkpoint; its flow is not clipped, so clip becomes None.

        Raises ValueError for a checkpoint of another kind or shape: a learned prior (`var` other than ones: the
        volume-preserving variant), an attention mask that is not causal, names or sizes that do not fit `config`.
        """
        state = dict(state_dict)
        if "var" not in state or not bool((state.pop("var") == 1).all()):
            raise ValueError("not an affine TARFlow checkpoint: its prior variance `var` is missing or not all ones")
        for name in [name for name in state if name.endswith(".attn_mask")]:
            mask = state.pop(name)
            if not torch.equal(mask.bool(), torch.ones_like(mask, dtype=torch.bool).tril()):
                raise ValueError(f"{name} is not a causal mask")
        model = cls(dataclasses.replace(config, clip=None))
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(f"the checkpoint does not fit the config: {error}") from None
        return model.eval()


def no_class(x: Tensor) -> Tensor:
    """Labels (N,) that say "no class" for a batch x of N."""
    return torch.full((len(x),), -1, dtype=torch.long, device=x.device)


# ----------------------------------------------------------------------------------------------------------------------
# 3. G: the reverse model, a bidirectional ViT with RMSNorm, QK-norm, RoPE, SwiGLU and gated residuals


class RMSNorm(nn.Module):
    """x / RMS(x) over the last dimension, in at least float32. Without a scale: the layer that follows can hold it."""

    def forward(self, x):
        return F.rms_norm(upcast(x), x.shape[-1:], eps=1e-6).to(x.dtype)


def rope_table(context: int, side: int, head_dim: int) -> Tensor:
    """cos and sin (2, context + side^2, head_dim / 2) of axial RoPE: half of the pairs turn with the row, half with the
    column. The context tokens, which have no place in the image, do not turn. (Base 100 suits short axes [ours].)"""
    frequencies = 100.0 ** -(torch.arange(head_dim // 4) / (head_dim // 4))
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    angles = torch.cat([row.reshape(-1, 1) * frequencies, column.reshape(-1, 1) * frequencies], dim=1)
    angles = F.pad(angles, (0, 0, context, 0))
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Turn the pairs (x_k, x_{k + d/2}) of x (..., T, d) by the angles of rope (2, T, d / 2)."""
    (a, b), (cos, sin) = x.chunk(2, dim=-1), rope
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)


class ReverseLayer(nn.Module):
    """One layer of the reverse ViT: (N, T, C) -> (N, T, C). It starts near the identity: the gates at one, the
    branches' last layers small (gates at zero, before layers of full size, learned half as fast on digits [ours])."""

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
        N, T, C = h.shape
        qkv = self.qkv(self.norm(h)).view(N, T, 3, C // self.head_dim, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k = rotate(self.qk_scale * self.norm(qkv[:2]), rope).to(qkv.dtype)
        a = F.scaled_dot_product_attention(q, k, qkv[2]).transpose(1, 2).reshape(N, T, C)
        h = h + F.linear(a, self.attn_gate[:, None] * self.proj.weight)  # gate * proj(a)
        gate, value = self.mlp_in(self.norm(h)).chunk(2, dim=-1)
        return h + F.linear(F.silu(gate) * value, self.mlp_gate[:, None] * self.mlp_out.weight)


class ReverseBlock(nn.Module):
    """G_i: hidden tokens (N, T, C) and fresh context tokens (N, K, C) -> hidden tokens (N, T, C). The context is
    dropped at the end, so that the block is a function of (h, class, w) alone [ours]. Like a block of F it has position
    embeddings of its own, beside RoPE: what it inverts differs from place to place [ours]."""

    def __init__(self, config: Config):
        super().__init__()
        self.pos_embed = nn.Parameter(0.3 * torch.randn(config.tokens, config.width))
        self.layers = nn.ModuleList(ReverseLayer(config.width, config.head_dim) for _ in range(config.layers))

    def forward(self, h, context, rope):
        h = torch.cat([context, h + self.pos_embed], dim=1)
        for layer in self.layers:
            h = layer(h, rope)
        return h[:, context.shape[1] :]


def projection_head(width: int, dim: int) -> nn.Sequential:
    """phi_i: hidden state (N, T, C) -> token space (N, T, D)."""
    return nn.Sequential(RMSNorm(), nn.Linear(width, width), nn.GELU(), PreciseLinear(width, dim))


class BiFlow(HubModel):
    """G: noise -> clean data in one pass, B blocks aligned with the flow's states and one denoise block.

    Block j = 0 .. B-1 maps h^{B-j} to h^{B-1-j}: its target is x^{B-1-j}, so that no block reproduces its own input,
    and the last of them is aligned with the *noisy* x^0. The denoise block then maps h^0 to the clean x'. Without it
    (config.denoise = "none") the output of block B-1 is x' itself, and its target is x^0.
    """

    def __init__(self, config: Config):
        super().__init__(config)
        B, C, D = config.blocks, config.width, config.dim
        learned = config.denoise == "learned"
        self.proj_in = nn.Linear(D, C)
        self.blocks = nn.ModuleList(ReverseBlock(config) for _ in range(B + learned))
        # One head for each state between z and x'; heads[j] reads block j. Naive distillation has none.
        supervised = 0 if config.strategy == "naive" else B if learned else B - 1
        self.heads = nn.ModuleList(projection_head(C, D) for _ in range(supervised))
        if config.strategy == "hidden":  # the state itself is forced through token space
            self.lifts = nn.ModuleList(nn.Linear(D, C) for _ in range(supervised))
        self.out = nn.Sequential(RMSNorm(), PreciseLinear(C, D))
        # In-context conditioning: what the class and w say (shared by all blocks) plus where it is said (block, slot).
        self.class_embed = nn.Embedding(1 + config.num_classes, C)  # the first row is "no class"
        self.guidance_embed = nn.Sequential(nn.Linear(32, C), nn.SiLU(), nn.Linear(C, C))
        slots = config.class_tokens + config.guidance_tokens
        self.slot_embed = nn.Parameter(torch.randn(len(self.blocks), slots, C))
        rope = rope_table(slots, math.isqrt(config.tokens), config.head_dim)
        self.register_buffer("rope", rope, persistent=False)
        self.register_buffer("schedule", guidance_schedule(B, len(self.blocks)), persistent=False)

    def context(self, y: Tensor, w: Tensor) -> Tensor:
        """Labels (N,) and guidance scales (N,) -> the context tokens of all blocks at once, (blocks, N, K, C)."""
        classes = self.class_embed(y.clamp(min=-1) + 1)
        share = (w / max(self.config.w_max, 1e-6)).clamp(0, 1)  # beyond the trained range: its end
        scales = self.guidance_embed(torch.cos(math.pi * share[:, None] * torch.arange(32, device=w.device)))
        said = [classes] * self.config.class_tokens + [scales] * self.config.guidance_tokens
        return torch.stack(said, dim=1) + self.slot_embed[:, None]

    def conditions(self, z: Tensor, y: Tensor | None, w: Tensor | float) -> tuple[Tensor, Tensor]:
        """y or None, w or a float -> (N,) labels and (N,) scales on z's device; w = 0 where there is no class."""
        y = no_class(z) if y is None else y
        w = torch.as_tensor(w, dtype=z.dtype).to(z.device, non_blocking=True).expand(len(z))
        return y, torch.where(y < 0, 0.0, w)

    def walk(self, z: Tensor, step) -> tuple[Tensor, list[Tensor]]:
        """From z (N, T, D) through all blocks by h <- step(j, h) -> x' (N, C, H, W), and the states h with a head."""
        h, states = self.proj_in(z), []
        for j in range(len(self.blocks)):
            h = step(j, h)
            if j < len(self.heads):
                states.append(h)
                if self.config.strategy == "hidden":
                    h = self.lifts[j](self.heads[j](h))
        return unpatchify(self.out(h), self.config.patch_size), states

    def forward(self, z: Tensor, y: Tensor | None, w: Tensor | float) -> tuple[Tensor, dict[int, Tensor]]:
        """Training: z (N, T, D), y (N,), w (N,) -> x' (N, C, H, W), predictions {i: (N, T, D)}, predictions[i] ~ x^i.

        Training-time guidance: with w > 0 it is (G_i(h | class, w) + w_i G_i(h | none)) / (1 + w_i) that carries on and
        is supervised, so that G_i(h | class, w) alone learns to be the guided state. The none-branch runs without
        gradient [ours], only for the samples with w > 0: keep w on the CPU, and finding them costs no synchronisation.
        """
        guided = torch.nonzero(torch.as_tensor(w).expand(len(z)) > 0).squeeze(1).to(z.device, non_blocking=True)
        y, w = self.conditions(z, y, w)
        context = self.context(y, w)
        with torch.no_grad():
            none = self.context(no_class(guided), torch.zeros_like(w[guided]))

        def step(j, h):
            out = self.blocks[j](h, context[j], self.rope)
            if len(guided) and j < self.config.blocks:
                with torch.no_grad():
                    out_none = self.blocks[j](h[guided], none[j], self.rope)
                w_j = (self.schedule[j] * w[guided]).view(-1, 1, 1)
                out = out.index_copy(0, guided, (out[guided] + w_j * out_none) / (1 + w_j))
            return out

        x, states = self.walk(z, step)
        return x, {self.config.blocks - 1 - j: head(h) for j, (head, h) in enumerate(zip(self.heads, states))}

    @torch.no_grad()
    def sample(self, z: Tensor, y: Tensor | None = None, w: Tensor | float = 0.0) -> Tensor:
        """1-NFE sampling: z (N, T, D), y (N,), w in [0, w_max] -> x' (N, C, H, W). Each block is called once."""
        context = self.context(*self.conditions(z, y, w))
        return self.walk(z, lambda j, h: self.blocks[j](h, context[j], self.rope))[0]

    @torch.no_grad()
    def sample_two_pass(self, z: Tensor, y: Tensor | None, w: Tensor | float) -> Tensor:
        """2-NFE guidance at sampling: h <- (1 + w_i) G_i(h | class) - w_i G_i(h | none), both branches as one batch."""
        y, w = self.conditions(z, y, w)
        context = self.context(torch.cat([y, no_class(z)]), torch.zeros(2 * len(z), device=z.device))

        def step(j, h):
            if j == self.config.blocks:  # the denoise block takes no guidance
                return self.blocks[j](h, context[j, : len(h)], self.rope)
            out, out_none = self.blocks[j](torch.cat([h, h]), context[j], self.rope).chunk(2)
            w_j = (self.schedule[j] * w).view(-1, 1, 1)
            return (1 + w_j) * out - w_j * out_none

        return self.walk(z, step)[0]


def guidance_schedule(aligned: int, blocks: int) -> Tensor:
    """How much of the guidance scale w each block takes, (blocks,): w_i = w / B for the aligned blocks, since guidance
    block by block compounds, and none for the denoise block [ours]."""
    return torch.cat([torch.full((aligned,), 1 / aligned), torch.zeros(blocks - aligned)])


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
    """D, (N,): the squared difference summed over all dimensions [ours: the sum, for which c = 0.01 was published]."""
    return (upcast(prediction) - target).square().flatten(1).sum(1)


def reverse_loss(
    x_prime: Tensor,
    predictions: dict[int, Tensor],
    x: Tensor,
    states: list[Tensor],
    adaptive_p: float = 1.0,
    trajectory_norm: bool = True,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Stage 2: w_p D(x, x') + sum_i w_p D(x^i, predictions[i]), averaged over the batch.

    x' and its target x (N, C, H, W): the clean image, or the noisy one where there is no denoise block; states: the
    flow's trajectory, (N, T, D) each. Which predictions there are is the strategy: none of them in naive distillation.
    Also returns the unweighted relative errors |x^i - prediction|^2 / |x^i|^2, (N,) each, by name: "x", "x0", "x1", ...
    """
    pairs = {"x": (x_prime, x)}
    for i, prediction in predictions.items():
        pairs[f"x{i}"] = (prediction, rms_normalize(states[i]) if trajectory_norm else states[i])
    loss, errors = 0.0, {}
    for name, (prediction, target) in pairs.items():
        distance = squared_distance(prediction, target)
        loss = loss + (adaptive_weight(distance, adaptive_p) * distance).mean()
        errors[name] = distance.detach() / target.square().flatten(1).sum(1)
    return loss, errors


class PerceptualDistance(nn.Module):
    """LPIPS and ConvNeXt distances of decoded images, each with its weight and its adaptive weight.

    decode: what G sees (N, C, H, W) -> images (N, 1 or 3, S, S) in [-1, 1], differentiable. lpips(a, b) -> (N, 1, 1, 1)
    takes images in [-1, 1]; convnext(a) -> (N, features) takes images normalised with ImageNet's mean and std, as it
    was trained. Either may be None. The networks' weights are frozen; gradients flow through them, crop and decoder to x'.
    """

    def __init__(self, decode, lpips=None, convnext=None, weights: tuple[float, float] = (0.4, 0.1), p: float = 1.0):
        super().__init__()
        self.decode, self.weights, self.p = decode, dict(zip(("lpips", "convnext"), weights)), p
        self.lpips, self.convnext = (net and net.eval().requires_grad_(False) for net in (lpips, convnext))
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1), persistent=False)

    def forward(self, x_prime: Tensor, x: Tensor, u: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """x', x (N, C, H, W), u (N, 4) uniform numbers of the crop -> mean weighted loss, raw distances (N,) by name."""
        a = self.decode(x_prime)
        with torch.no_grad():
            b = self.decode(x)
        with torch.autocast(x.device.type, enabled=False):
            a, b = (random_resized_crop(upcast(i).expand(-1, 3, -1, -1), u) for i in (a, b))
            distances = {}
            if self.lpips is not None:
                distances["lpips"] = self.lpips(a, b).flatten()
            if self.convnext is not None:
                fa, fb = (self.convnext((i * 0.5 + 0.5 - self.mean) / self.std) for i in (a, b))
                distances["convnext"] = squared_distance(fa, fb)
        weighted = (self.weights[k] * (adaptive_weight(d, self.p) * d).mean() for k, d in distances.items())
        return sum(weighted), {k: d.detach() for k, d in distances.items()}


def random_resized_crop(x: Tensor, u: Tensor, size: int = 224) -> Tensor:
    """Crop images (N, C, S, S) to a random area (0.08 to 1) and ratio (3/4 to 4/3), resize to (N, C, size, size).

    u (N, 4): uniform numbers that decide area, ratio, x and y. A side longer than the image is cut to it [ours].
    """
    area, ratio = 0.08 + 0.92 * u[:, 0], torch.exp((2 * u[:, 1] - 1) * math.log(4 / 3))
    w, h = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    zero = torch.zeros_like(w)
    centre_x, centre_y = (2 * u[:, 2] - 1) * (1 - w), (2 * u[:, 3] - 1) * (1 - h)
    theta = torch.stack([w, zero, centre_x, zero, h, centre_y], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(theta, [len(x), 1, size, size], align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)
