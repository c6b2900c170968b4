"""Stage 1: train the flow F by maximum likelihood. Also the plumbing that both stages share.

    python train_forward.py                                                       # handwritten digits, on any machine
    torchrun --nproc-per-node 8 train_forward.py --size B --data IMAGENET/train   # latents of ImageNet at 256 x 256

From top to bottom: errors and processes, data and latents, batches, run folders, the training loop, and stage 1 itself.
Everything random in a training step is a function of (seed, step, the sample's place in the global batch): neither the
number of processes nor of workers changes a run, and a resumed run needs no generator's state.
"""

import argparse
import copy
import dataclasses
import functools
import json
import math
import os
import re
import shutil
import signal
import statistics
import sys
import tempfile
import time
import warnings
import zipfile
import zlib
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry
from tqdm import tqdm

from biflow import SIZES, BiFlow, Config, TARFlow, nll_loss

# ----------------------------------------------------------------------------------------------------------------------
# Errors and processes


class Failure(Exception):
    """Something that the user can put right; its text says what is wrong and what to do."""


def fail(message: str):
    raise Failure(" ".join(str(message).split())) from None


def script(main):
    """Decorator of a main(argv): a Failure ends the program with its one line and exit status 2, without a traceback."""

    @functools.wraps(main)
    def run(argv=None):
        try:
            main(argv)
            sys.stdout.flush()
            if dist.is_initialized():  # left to the interpreter's exit, a backend's threads can abort it
                dist.barrier()
                dist.destroy_process_group()
        except Failure as failure:
            print(f"error: {failure}", file=sys.stderr)
            raise SystemExit(2) from None
        except BrokenPipeError:  # the reader of the output is gone
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(2) from None

    return run


@dataclasses.dataclass
class Processes:
    """This process among those that torchrun started; alone, it is rank 0 of 1."""

    device: torch.device
    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def barrier(self):
        if self.world > 1:
            dist.barrier()

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of x over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(x)
        return x


def start_processes(args: argparse.Namespace | None = None) -> Processes:
    """Choose the device (CUDA, MPS, CPU) and join torchrun's process group, if there is one. Where args leave open whether
    to compile and whether to compute in bf16, the device decides: both on CUDA, neither elsewhere."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    else:
        device = torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    for name in ("compile", "bf16"):
        if args is not None and getattr(args, name) is None:
            setattr(args, name, device.type == "cuda")
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Processes(device, rank, world)


def autocast(device: torch.device, enabled: bool):
    """bf16 autocast. Without the cache of cast weights: one filled under no_grad would cut the gradient off later."""
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled, cache_enabled=False)


def freeze(model: TARFlow | BiFlow, device: torch.device, bf16: bool, compiled: bool):
    """Put a network that is not trained on the device. In bf16, store for good what autocast would cast at each call: the
    weights of the linear layers, but not of PreciseLinear."""
    model.to(device).eval().requires_grad_(False)
    for layer in model.modules():
        if bf16 and type(layer) is torch.nn.Linear:
            layer.to(torch.bfloat16)
    if compiled:
        compile_blocks(model)


def compile_blocks(model: TARFlow | BiFlow):
    """In place, so that state dicts keep their names."""
    for block in model.blocks:
        block.compile()


# ----------------------------------------------------------------------------------------------------------------------
# Cost

# Peak of dense bf16 products in FLOP/s, by a part of the GPU's name
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}


class FlopCounter(TorchDispatchMode):
    """Adds up torch's own formulas for what it executes (FlopCounterMode cannot see through autograd.grad)."""

    total = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        if op.overloadpacket in flop_registry:
            self.total += flop_registry[op.overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


def count_flops(f) -> int:
    """Floating-point operations of the matrix products and convolutions in f(), a multiply-add being two."""
    with torch.compiler.set_stance("force_eager"), sdpa_kernel(SDPBackend.MATH), FlopCounter() as counter:
        f()
    return counter.total


def reset_peak_memory(device: torch.device):
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):  # Linux alone has it
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> float:
    """GiB at the peak since the last reset: allocated on the GPU, else resident of this whole process; nan: not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    with suppress(OSError):
        return int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) / 2**20
    return math.nan


# ----------------------------------------------------------------------------------------------------------------------
# Data. Digits live in memory; a folder of images is read once into a cache of uint8 pixels or float16 VAE posteriors

IMAGE_TYPES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
CHUNK = 64  # images that are decoded, encoded and marked as done together


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's centre crop: halve with BOX while the short side is >= 2 size, scale it to size with BICUBIC, cut the middle."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def read_image(path: Path, size: int) -> np.ndarray:
    """An image file of any mode -> uint8 (3, size, size): EXIF rotation applied, transparency laid over white, 16-bit
    grey scaled down, the first frame of an animation. Raises ValueError for a file that cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = ImageOps.exif_transpose(Image.open(path))
            if image.mode.startswith("I"):
                image = Image.fromarray((np.asarray(image, np.uint32) >> 8).clip(0, 255).astype(np.uint8))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = center_crop(image.convert("RGB"), size)
    except Exception as error:  # Pillow raises many kinds for a damaged file
        raise ValueError(f"cannot read the image {path} ({error}); repair or remove it") from None
    return np.asarray(image).transpose(2, 0, 1)


class Folder(torch.utils.data.Dataset):
    """Class subfolders of images, as chunks of uint8 arrays (n, 3, size, size), for building a cache."""

    def __init__(self, root: Path, size: int):
        self.root, self.size = root.resolve(), size
        classes = sorted(p for p in root.iterdir() if p.is_dir())
        if len(classes) < 2:
            fail(f"{root} has {len(classes)} class subfolders, two at least are needed: {root}/CLASS/NAME.jpg")
        files = [sorted(p for p in c.rglob("*") if p.suffix.lower() in IMAGE_TYPES) for c in classes]
        for c, members in zip(classes, files):
            if len(members) < 2:
                fail(f"the class folder {c} holds {len(members)} images, two at least are needed; fill or remove it")
        self.classes = [c.name for c in classes]
        self.files = [p for members in files for p in members]
        self.labels = np.repeat(np.arange(len(classes)), [len(members) for members in files])
        listing = "\n".join(f"{p.relative_to(root)} {p.stat().st_size}" for p in self.files)
        self.fingerprint = f"{zlib.crc32(listing.encode()):08x}"

    def __len__(self):
        return math.ceil(len(self.files) / CHUNK)

    def __getitem__(self, chunk):
        """The chunk's images, or the message of what is wrong with one of them (which crosses a worker's border whole)."""
        try:
            return chunk, np.stack([read_image(p, self.size) for p in self.files[chunk * CHUNK : (chunk + 1) * CHUNK]])
        except ValueError as error:
            return chunk, str(error)


class VAE:
    """The one encode/decode pair of a latent model; the latents outside it are normalised per channel.

    `name` is a folder saved by diffusers or a name on the Hub; mean and std, (C,), are those of the data set's latents.
    """

    def __init__(self, name: str, device: torch.device, mean=0.0, std=1.0):
        from diffusers import AutoencoderKL

        try:
            self.net = AutoencoderKL.from_pretrained(name).to(device).eval().requires_grad_(False)
        except Exception as error:  # diffusers and the Hub raise many kinds
            fail(f"cannot load the VAE {name} ({error}); give a folder saved by diffusers, or a Hub name and a network")
        self.channels = self.net.config.latent_channels
        self.factor = 2 ** (len(self.net.config.block_out_channels) - 1)
        if isinstance(mean, list) and len(mean) != self.channels:
            fail(
                f"the VAE {name} has {self.channels} latent channels, the data were encoded to {len(mean)}; give their VAE"
            )
        self.mean = torch.as_tensor(mean, dtype=torch.float32, device=device).view(-1, 1, 1)
        self.std = torch.as_tensor(std, dtype=torch.float32, device=device).view(-1, 1, 1)

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Images (N, 3, H, W) in [-1, 1] -> the posterior's mean and log-variance (N, 2, C, h, w), not normalised."""
        posterior = self.net.encode(images).latent_dist
        return torch.stack([posterior.mean, posterior.logvar], dim=1)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Normalised latents (N, C, h, w) -> images (N, 3, H, W), about in [-1, 1]. Differentiable."""
        return self.net.decode(latents * self.std + self.mean).sample.float()


def build_cache(folder: Folder, cache: Path, size: int, vae_name: str | None, processes: Processes, workers: int):
    """Decode (and encode) every image once into cache/data.npy; manifest.json, written last, marks the cache as whole.

    data.npy is uint8 (n, 3, S, S), or float16 (n, 2 mirror images, mean | logvar, C, h, w); crc.npy has a checksum for
    each chunk, 0 before it is written, by which a killed build goes on. Chunks are dealt out over the processes.
    """
    n, vae = len(folder.files), None
    shape, dtype = (n, 3, size, size), np.uint8
    if vae_name:
        vae = VAE(vae_name, processes.device)
        if size % vae.factor:
            fail(f"--img-size {size} is not a multiple of {vae.factor}, by which the VAE {vae_name} shrinks images")
        shape, dtype = (n, 2, 2, vae.channels, size // vae.factor, size // vae.factor), np.float16
    identity = dict(source=str(folder.root), vae=vae_name, img_size=size, shape=shape, fingerprint=folder.fingerprint)
    if processes.first:
        cache.mkdir(parents=True, exist_ok=True)
        started = cache / "started.json"
        if not started.exists() or json.loads(started.read_text()) != json.loads(json.dumps(identity)):
            for name, kind, size_ in (("data.npy", dtype, shape), ("crc.npy", np.uint32, (len(folder),))):
                np.lib.format.open_memmap(cache / name, mode="w+", dtype=kind, shape=size_).flush()
            write_json(started, identity)
    processes.barrier()
    data, crc = (np.load(cache / name, mmap_mode="r+") for name in ("data.npy", "crc.npy"))
    todo = [c for c in range(processes.rank, len(folder), processes.world) if not crc[c]]
    loader = torch.utils.data.DataLoader(folder, batch_size=None, sampler=todo, num_workers=workers)
    for chunk, images in tqdm(loader, desc="encoding images", unit=f"x{CHUNK}", disable=not processes.first):
        if isinstance(images, str):
            fail(images)
        rows = images.numpy()
        if vae:
            x = torch.from_numpy(rows).to(processes.device) / 127.5 - 1
            rows = torch.stack([vae.encode(x), vae.encode(x.flip(3))], dim=1).cpu().numpy().astype(np.float16)
        data[chunk * CHUNK : (chunk + 1) * CHUNK] = rows
        data.flush()
        crc[chunk] = chunk_checksum(data, chunk)
        crc.flush()
    processes.barrier()
    if processes.first:
        assert np.load(cache / "crc.npy").all(), "a chunk was left out"
        manifest = dict(identity, classes=folder.classes, labels=folder.labels.tolist(), mean=None, std=None)
        if vae:
            first = second = 0.0  # E[latent] and E[latent^2] per channel, over the posterior and both mirror images
            for i in range(0, n, 1024):
                mean, logvar = data[i : i + 1024, :, 0].astype(np.float64), data[i : i + 1024, :, 1].astype(np.float64)
                first += mean.sum((0, 1, 3, 4))
                second += (mean**2 + np.exp(logvar)).sum((0, 1, 3, 4))
            count = 2 * n * shape[-1] * shape[-2]
            manifest["mean"] = (first / count).tolist()
            manifest["std"] = np.sqrt(second / count - (first / count) ** 2).tolist()
        write_json(cache / "manifest.json", manifest | dict(crc=zlib.crc32(json.dumps(manifest).encode())))
    processes.barrier()


def chunk_checksum(data: np.ndarray, chunk: int) -> int:
    """CRC-32 of a chunk's bytes; never 0, which stands for a chunk that is not there."""
    return zlib.crc32(np.ascontiguousarray(data[chunk * CHUNK : (chunk + 1) * CHUNK])) or 1


@dataclasses.dataclass
class Data:
    """Labelled images or latents with a fixed split. `info` is what must travel with a model trained on them."""

    source: np.ndarray | Path  # the array, or the data.npy to map into memory
    labels: np.ndarray
    fit: np.ndarray  # indices to train on
    val: np.ndarray  # indices for choices (when the flow stops)
    test: np.ndarray  # indices for figures
    flip: bool  # train on mirror images, too
    info: dict  # data, cache, vae, img_size, classes, mean, std
    jitter: bool = False  # train on slightly distorted images

    @functools.cached_property
    def array(self) -> np.ndarray:
        return self.source if isinstance(self.source, np.ndarray) else np.load(self.source, mmap_mode="r")

    @functools.cached_property
    def unchecked(self) -> np.ndarray:
        """Each chunk's checksum until the chunk has been read once, then 0; in memory there is nothing to check."""
        if isinstance(self.source, np.ndarray):
            return np.zeros(math.ceil(len(self.source) / CHUNK))
        return np.load(self.source.with_name("crc.npy"))

    def __getstate__(self):  # a worker maps the file itself
        return {k: v for k, v in self.__dict__.items() if k not in ("array", "unchecked")}

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of what the models see."""
        return self.array.shape[-3:]

    def get(self, i: int, mirror: bool, rng: np.random.Generator) -> np.ndarray:
        """Sample i as the models see it, float32 (C, H, W); of a VAE's posterior one draw, normalised.

        Raises ValueError at the first touch of a chunk whose checksum does not match.
        """
        chunk = i // CHUNK
        if self.unchecked[chunk]:
            if self.unchecked[chunk] != chunk_checksum(self.array, chunk):
                raise ValueError(
                    f"the cache {self.source} is damaged at image {i}; remove its folder, and it is built again"
                )
            self.unchecked[chunk] = 0
        row = self.array[i]
        if row.ndim == 5:
            mean, logvar = row[int(mirror)].astype(np.float32)
            x = mean + np.exp(0.5 * logvar) * rng.standard_normal(mean.shape, np.float32)
            mean, std = (np.float32(self.info[k])[:, None, None] for k in ("mean", "std"))
            return (x - mean) / std
        x = row.astype(np.float32) / 127.5 - 1 if row.dtype == np.uint8 else row
        return x[:, :, ::-1] if mirror else x


def load_digits() -> Data:
    """scikit-learn's 1797 handwritten digits, 8 x 8, scaled to [-1, 1]. Split within each class, by the order in which
    its digits come: of twelve, two are for test and one for validation, so that all three sets are balanced."""
    from sklearn.datasets import load_digits as read

    digits = read()
    place = np.array([np.sum(digits.target[:i] == label) for i, label in enumerate(digits.target)]) % 12
    test, val = (place == 1) | (place == 7), place == 4
    images = (digits.images / 8 - 1).astype(np.float32)[:, None]
    classes = [str(c) for c in range(10)]
    info = dict(data="digits", cache=None, vae=None, img_size=8, classes=classes, mean=None, std=None)
    split = [np.flatnonzero(mask) for mask in (~(test | val), val, test)]
    return Data(images, digits.target.astype(np.int64), *split, flip=False, info=info, jitter=True)


def load_data(data: str, img_size: int | None, vae: str | None, runs: Path, processes: Processes, workers: int) -> Data:
    """`data`: "digits", a folder of class subfolders of images, or a cache. Builds the cache of a folder where needed.

    Of a folder, 5 % of the images (1000 at most) are held out for validation, at fixed indices.
    """
    if data == "digits":
        if vae or img_size not in (None, 8):
            fail("the digits are 8 x 8 pixels and have no VAE; leave --vae and --img-size out, or give --data DIR")
        return load_digits()
    root = Path(data).expanduser()
    if not root.is_dir():
        fail(f"--data {data} is not a folder; give digits, a folder of class subfolders, or a folder of cached latents")
    cache = root
    if not (root / "manifest.json").exists():
        size = img_size or (256 if vae else 32)
        folder = Folder(root, size)
        key = zlib.crc32(f"{root.resolve()} {vae} {size} {folder.fingerprint}".encode())
        cache = runs / f"cache-{root.name}-{size}-{key:08x}"
        if not (cache / "manifest.json").exists():
            build_cache(folder, cache, size, vae, processes, workers)
    try:
        manifest = json.loads((cache / "manifest.json").read_text())
        if manifest.pop("crc") != zlib.crc32(json.dumps(manifest).encode()):
            raise ValueError("the manifest's checksum does not match")
        labels = np.asarray(manifest["labels"], np.int64)
        shape = np.load(cache / "data.npy", mmap_mode="r").shape
        if list(shape) != manifest["shape"] or len(labels) != shape[0]:
            raise ValueError(f"data.npy has shape {shape}, the manifest says {manifest['shape']}, {len(labels)} labels")
    except (OSError, ValueError, KeyError, TypeError) as error:
        fail(f"the cache {cache} is damaged ({error}); remove it, and it is built again")
    for name, asked in (("vae", vae), ("img_size", img_size)):
        if asked is not None and manifest[name] != asked:
            fail(
                f"the cache {cache} was made with {name} {manifest[name]}, not {asked}; give another cache or drop the flag"
            )
    n = len(labels)
    val = np.unique(np.linspace(0, n - 1, min(1000, max(1, n // 20))).astype(int))
    fit = np.setdiff1d(np.arange(n), val)
    info = {k: manifest[k] for k in ("vae", "img_size", "classes", "mean", "std")}
    info |= dict(data=manifest["source"], cache=str(cache.resolve()))
    return Data(cache / "data.npy", labels, fit, val, val, flip=True, info=info)


def random_latents(size: str) -> Data:
    """Noise in the shape of the size's latents: enough to measure what a step costs."""
    config, n = SIZES[size], 64
    rng = np.random.default_rng(0)
    array = rng.standard_normal((n, config.channels, config.img_size, config.img_size), np.float32)
    classes = [str(c) for c in range(config.num_classes)]
    info = dict(data="random", cache=None, vae=None, img_size=config.img_size, classes=classes, mean=None, std=None)
    everything = np.arange(n)
    return Data(array, rng.integers(0, len(classes), n), everything, everything, everything, flip=False, info=info)


def data_of(run: dict) -> str:
    """What a run was trained on, for --data: its cache if that is still there, else its images, or "digits"."""
    return run["cache"] if run["cache"] and Path(run["cache"]).is_dir() else run["data"]


# ----------------------------------------------------------------------------------------------------------------------
# Batches: every random number that a training step needs comes with its sample


def sample_rng(*key: int) -> np.random.Generator:
    """A generator of its own for each (seed, stream, ..., index)."""
    return np.random.default_rng(key)


TRAIN, EVAL, SAMPLE, ORDER = range(4)  # streams of randomness


class Batches(torch.utils.data.Dataset):
    """Item k: this process's k-th micro-batch, as tensors (x clean, eps Gaussian noise, y labels, u uniforms (n, 14)).

    The global batch of a step is a stretch of an endless series of epochs, each a permutation by the seed. Its rows are
    dealt out evenly, first over processes, then over micro-batches.
    """

    def __init__(self, data: Data, batch_size: int, seed: int, rank: int = 0, world: int = 1, micro_batches: int = 1):
        self.data, self.batch_size, self.seed = data, batch_size, seed
        self.rank, self.world, self.micro_batches = rank, world, micro_batches

    @functools.lru_cache(maxsize=2)
    def order(self, epoch: int) -> np.ndarray:
        return sample_rng(self.seed, ORDER, epoch).permutation(self.data.fit)

    def __getitem__(self, k: int):
        step, micro = divmod(k, self.micro_batches)
        pieces = np.array_split(np.arange(self.batch_size), self.world * self.micro_batches)
        rows = []
        for slot in pieces[self.rank * self.micro_batches + micro]:
            epoch, place = divmod(step * self.batch_size + int(slot), len(self.data.fit))
            rows.append(draw(self.data, self.order(epoch)[place], sample_rng(self.seed, TRAIN, step, int(slot))))
        x, eps, y, u = collate(rows)
        return jitter(x, u[:, 8:]) if self.data.jitter else x, eps, y, u


def draw(data: Data, i: int, rng: np.random.Generator):
    """Sample i of the data with its noise: (x, eps, y, u). u: mirror, label drop, six for stage 2, six for jitter."""
    u = rng.random(14, np.float32)
    eps = rng.standard_normal(data.shape, np.float32)
    return data.get(i, data.flip and u[0] < 0.5, rng), eps, data.labels[i], u


def jitter(x: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Images (N, C, S, S) in [-1, 1] under small random affine maps, on a background of -1; u (N, 6) uniform numbers.

    What mirroring is to photographs: 1345 digits alone are soon known by heart. The entries of the 2 x 2 matrix move by
    up to 0.05, the centre by up to 0.03 of half a side; bicubic, since bilinear interpolation would blur [ours].
    """
    moved = (2 * u - 1) * torch.tensor([0.05, 0.05, 0.03, 0.05, 0.05, 0.03])
    grid = F.affine_grid(torch.eye(2, 3) + moved.view(-1, 2, 3), x.shape, align_corners=False)
    return F.grid_sample(x + 1, grid, mode="bicubic", align_corners=False).sub(1).clamp(-1, 1)


def collate(rows) -> tuple[torch.Tensor, ...]:
    return tuple(torch.from_numpy(np.stack(column)) for column in zip(*rows))


def validation_batches(data: Data, indices: np.ndarray, batch_size: int = 256):
    """Fixed batches (x, eps, y, u) of the samples with these indices; a small set is repeated with other noise, up to
    about 1000 samples, so that its figures do not hang on one draw."""
    keys = [(repeat, int(j)) for repeat in range(max(1, 1000 // len(indices))) for j in indices]
    for i in range(0, len(keys), batch_size):
        yield collate([draw(data, j, sample_rng(repeat, EVAL, j)) for repeat, j in keys[i : i + batch_size]])


def sample_noise(seed: int, indices, config: Config) -> torch.Tensor:
    """z (N, T, D) for the samples with these indices: each depends on seed and index alone."""
    shape = (config.tokens, config.dim)
    return torch.from_numpy(
        np.stack([sample_rng(seed, SAMPLE, int(i)).standard_normal(shape, np.float32) for i in indices])
    )


# ----------------------------------------------------------------------------------------------------------------------
# Run folders


@contextmanager
def atomic_file(path: Path):
    """A file to write that appears under its name only when it is whole and flushed to the disk."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: dict, indent: int | None = None):
    with atomic_file(path) as file:
        file.write(json.dumps(content, indent=indent).encode())


def read_metrics(folder: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl; none where there is no such file."""
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def save_model(out: Path, model: TARFlow | BiFlow, run: dict):
    """Put config.json, model.safetensors, a model card (README.md) and run.json into a run folder."""
    temporary = out / "saving.tmp"
    try:
        model.save_pretrained(temporary)
        for file in sorted(temporary.iterdir()):
            os.replace(file, out / file.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    write_json(out / "run.json", run, indent=2)


def load_run(folder: str | Path, stage: str | None = None) -> tuple[TARFlow | BiFlow, dict]:
    """The model of a run folder, and its run.json. Ends the program if the folder is missing, damaged or of another stage."""
    folder = Path(folder)
    try:
        run = json.loads((folder / "run.json").read_text())
        if stage and run["stage"] != stage:
            fail(f"{folder} is a {run['stage']} run; give the folder of a {stage} run")
        return {"forward": TARFlow, "reverse": BiFlow}[run["stage"]].from_pretrained(folder), run
    except FileNotFoundError as error:
        script = f"train_{stage or 'reverse'}.py"
        fail(f"{folder} is not a trained run ({error.filename or error}); make one with: python {script} --out {folder}")
    except (ValueError, KeyError, TypeError) as error:
        fail(f"the run {folder} is damaged: {error}")


def load_weights(path: str) -> dict[str, torch.Tensor]:
    """A state dict from a .safetensors file or a torch file that holds tensors alone; nothing is unpickled."""
    from safetensors.torch import load_file

    try:
        return load_file(path) if path.endswith(".safetensors") else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a missing file, a damaged one, or one that carries a pickle
        fail(f"cannot load the weights {path} ({str(error).splitlines()[0]}); give a state dict of tensors")


def save_grid(path: Path, rows: list[tuple[str, torch.Tensor]]):
    """Rows of images (n, C, H, W) in [-1, 1], each row with its label on the left, as one PNG. Small images grow."""
    scale = max(1, 40 // rows[0][1].shape[2])
    cell = rows[0][1].shape[2] * scale + 2
    longest = max(len(label) for label, _ in rows)
    canvas = Image.new("RGB", (8 + 7 * longest + cell * max(len(x) for _, x in rows), cell * len(rows)), "white")
    pen = ImageDraw.Draw(canvas)
    for r, (label, images) in enumerate(rows):
        pen.text((4, r * cell + cell // 2 - 6), label, fill="black")
        for c, image in enumerate(to_uint8(images)):
            tile = Image.fromarray(image.expand(3, -1, -1).permute(1, 2, 0).numpy())
            tile = tile.resize((cell - 2, cell - 2), Image.NEAREST)
            canvas.paste(tile, (8 + 7 * longest + c * cell + 1, r * cell + 1))
    canvas.save(path)


def to_uint8(x: torch.Tensor) -> torch.Tensor:
    """Images in [-1, 1] -> uint8 on the CPU, to the nearest of 256 levels."""
    return (x.float() * 127.5 + 127.5).round().clamp(0, 255).byte().cpu()


def load_decoder(run: dict, device: torch.device):
    """The function from what a run's models see (N, C, H, W) to images (N, c, S, S) in [-1, 1]."""
    if run["vae"] is None:
        return lambda x: x
    return VAE(run["vae"], device, run["mean"], run["std"]).decode


# ----------------------------------------------------------------------------------------------------------------------
# The training loop

# What a size trains with, where a flag does not say otherwise; all of it [ours]. 400,000 steps of 512 are the 160 epochs
# of the paper's ablations.
_B = dict(vae="stabilityai/sd-vae-ft-mse", steps=400_000, batch_size=512, lr=2e-4, weight_decay=1e-4, warmup=5000)
_B.update(log_every=100, save_every=5000, num_workers=4)
PRESETS = {
    "toy": dict(data="digits", vae="none", steps=1600, batch_size=256, lr=3e-3, weight_decay=0.3, warmup=100)
    | dict(log_every=25, save_every=500, num_workers=0),
    "B": _B,
    "L": _B | dict(lr=1e-4),
    "XL": _B | dict(lr=1e-4),
}
# Flags that may differ between the parts of one run: they do not change its weights.
NEUTRAL = "out resume fresh num_workers micro_batch compile log_every save_every benchmark activation_checkpointing".split()


def number(kind: type, low: float, high: float = math.inf):
    """An argparse type: an int or a float in [low, high]."""

    def parse(text: str):
        value = kind(text)
        if not (math.isfinite(value) and low <= value <= high):
            bounds = f"from {low} to {high}" if high < math.inf else f"at least {low}"
            raise argparse.ArgumentTypeError(f"must be {bounds}, not {text}")
        return value

    parse.__name__ = kind.__name__  # for argparse's message where it is no number at all
    return parse


def parser_of(stage: str, description: str, presets: dict) -> argparse.ArgumentParser:
    """The flags that both stages have. Defaults that depend on the size are filled in by parse."""
    parser = argparse.ArgumentParser(description=description)
    add, on_off = parser.add_argument, argparse.BooleanOptionalAction
    count, positive, fraction = number(int, 1), number(float, 0), number(float, 0, 1)

    def by_size(name):
        values = {size: preset[name] for size, preset in presets.items() if name in preset}
        shown = [f"{value} ({size})" for size, value in values.items() if size == "B" or value != values.get("B")]
        return "default: " + ", ".join(shown)

    inherited = "default: the forward run's" if stage == "reverse" else None
    add("--size", choices=SIZES, default="toy", help="network size (default: toy)")
    add("--data", help=f"digits, a folder of class subfolders of images, or a cache ({inherited or by_size('data')})")
    help_ = f"side of the images ({inherited or 'default: 256 with a VAE, 32 without'})"
    add("--img-size", type=count, metavar="S", help=help_)
    add("--vae", help=f"name or folder of a diffusers AutoencoderKL, or none for pixels ({inherited or by_size('vae')})")
    help_ = f"noise on F's inputs ({inherited or 'default: 0.3 on latents, 0.1 on pixels'})"
    add("--sigma", type=positive, help=help_)
    add("--out", type=Path, help=f"run folder (default: runs/{stage}-SIZE)")
    add("--steps", type=count, help=f"training steps ({by_size('steps')})")
    add("--batch-size", type=count, help=f"global batch, over all processes ({by_size('batch_size')})")
    add("--micro-batch", type=count, help="largest batch on one device, if its share of the batch must be accumulated")
    add("--lr", type=positive, help=f"peak learning rate of AdamW ({by_size('lr')})")
    add("--weight-decay", type=positive, help=f"of AdamW, on matrices that are no embeddings ({by_size('weight_decay')})")
    add("--warmup", type=number(int, 0), help=f"steps of linear warm-up before the cosine ({by_size('warmup')})")
    help_ = "decay of the weights' average, after a warm-up of its own (default: 0.9999)"
    add("--ema", type=fraction, default=0.9999, help=help_)
    add("--label-drop", type=fraction, default=0.1, help="share of labels dropped, for guidance (default: 0.1)")
    add("--num-workers", type=number(int, 0), help=f"processes that load data ({by_size('num_workers')})")
    add("--seed", type=number(int, 0), default=0, help="(default: 0)")
    add("--activation-checkpointing", action="store_true", help="compute each block twice, and keep its input alone")
    help_ = "time 10 steps, print their cost, keep nothing; sizes other than toy need no data for it"
    add("--benchmark", action="store_true", help=help_)
    add("--resume", default="auto", metavar="CKPT", help="a checkpoint; default auto: go on from --out's, if it has one")
    add("--fresh", action="store_true", help="start over; an existing run folder is renamed, never deleted")
    add("--compile", action=on_off, help="torch.compile (default: on CUDA)")
    add("--bf16", action=on_off, help="bfloat16 autocast (default: on CUDA)")
    add("--log-every", type=count, help=f"steps between lines of metrics.jsonl ({by_size('log_every')})")
    add("--save-every", type=count, help=f"steps between checkpoint, validation and grid ({by_size('save_every')})")
    return parser


def parse(parser: argparse.ArgumentParser, presets: dict, argv) -> argparse.Namespace:
    """Parse, and fill in the defaults that depend on the size; but which VAE made a cache, the cache itself says."""
    args = parser.parse_args(argv)
    cached = args.data and (Path(args.data).expanduser() / "manifest.json").exists()
    for name, value in presets[args.size].items():
        if getattr(args, name) is None and not (cached and name == "vae"):
            setattr(args, name, value)
    return args


def update_ema(ema: torch.nn.Module, model: torch.nn.Module, step: int, decay: float):
    """ema <- d ema + (1 - d) model with d = min(decay, (1 + step) / (10 + step)): a short run is not ruled by its start."""
    d = min(decay, (1 + step) / (10 + step))
    with torch.no_grad():
        torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - d)


def learning_rate(step: int, args) -> float:
    """Linear warm-up, then half a cosine down to zero at the last step."""
    t = (step - args.warmup) / max(1, args.steps - args.warmup)
    return args.lr * (step + 1) / args.warmup if step < args.warmup else args.lr * 0.5 * (1 + math.cos(math.pi * t))


def save_checkpoint(out: Path, state: dict):
    """Everything that going on needs, into out/checkpoint.pt; the one before it stays as checkpoint.prev.pt."""
    path = out / "checkpoint.pt"
    with atomic_file(out / "checkpoint.new.pt") as file:
        torch.save(state, file)
    if path.exists():
        os.replace(path, out / "checkpoint.prev.pt")
    os.replace(out / "checkpoint.new.pt", path)


def load_checkpoint(out: Path, resume: str) -> dict | None:
    """The newest whole checkpoint, or None if there is none at all. Damage shows in the zip file's own checksums."""
    paths = [out / f"checkpoint{kind}.pt" for kind in ("", ".prev")] if resume == "auto" else [Path(resume)]
    damaged = []
    for path in paths:
        try:
            if zipfile.ZipFile(path).testzip() is not None:
                raise ValueError("a checksum does not match")
            state = torch.load(path, map_location="cpu", weights_only=True)
            if not {"model", "ema", "optimizer", "step", "skipped", "args"} <= state.keys():
                raise ValueError("it is not a checkpoint of a run")
            if damaged:
                print(f"{damaged[0]}; going on from {path}, step {state['step']}", file=sys.stderr)
                with suppress(FileNotFoundError):  # another process was faster
                    os.replace(paths[0], out / "checkpoint.damaged.pt")
            return state
        except FileNotFoundError:
            if resume != "auto":
                fail(f"--resume {resume}: no such checkpoint")
        except Exception as error:  # zipfile, pickle and torch raise many kinds
            damaged.append(f"the checkpoint {path} is damaged ({str(error).splitlines()[0]})")
    if damaged:
        fail(f"{' and '.join(damaged)}; --fresh starts over")
    return None


def open_run(args, run: dict, processes: Processes) -> dict | None:
    """Make or re-enter the run folder; returns the checkpoint to go on from. Refuses arguments that alter the model."""
    out = args.out
    if processes.first and args.fresh and out.exists():
        old = next(p for i in range(1, 1000) if not (p := out.with_name(f"{out.name}.old-{i}")).exists())
        out.rename(old)
        print(f"{out} renamed to {old}")
    processes.barrier()
    try:
        out.mkdir(parents=True, exist_ok=True)
        open(out / "metrics.jsonl", "a").close()
    except OSError as error:
        fail(f"cannot write to {out} ({error.strerror}); give another --out")
    state = load_checkpoint(out, args.resume)
    if state is not None:
        changed = [
            f"{k}: {v!r} there, {run['args'].get(k)!r} now" for k, v in state["args"].items() if v != run["args"].get(k)
        ]
        if changed:
            fail(f"{out} was begun with other arguments ({'; '.join(changed)}); --fresh starts over, --out goes elsewhere")
    elif (out / "run.json").exists():
        fail(f"{out} holds a run without a checkpoint; --fresh starts over, --out goes elsewhere")
    return state


def next_batch(loader):
    try:
        return next(loader)
    except ValueError as error:  # damaged data; from a worker, it comes with a traceback as its text
        fail(str(error).strip().splitlines()[-1].removeprefix("ValueError: "))


def outlive_stop_requests(_):
    """For a loader's workers: a scheduler signals the whole group, and the step in hand still needs its batches."""
    for s in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(s, signal.SIG_IGN)


@contextmanager
def stop_requests():
    """A list that SIGTERM and SIGUSR1, which schedulers send, append to: a wish to save after the step in hand, and end."""
    asked = []
    before = {s: signal.signal(s, lambda number, _: asked.append(number)) for s in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield asked
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def train(args, processes: Processes, model, run: dict, data: Data, compute_loss, evaluate):
    """Train `model`, average its weights, keep its run folder.

    compute_loss(net, batch, step) -> (mean loss over the micro-batch, {name: (n,) values to log}); evaluate(ema) -> ({name:
    float}, rows for a grid) on the first process. Ends with the last step, or a step after SIGTERM or SIGUSR1.
    """
    on_cuda, out = processes.device.type == "cuda", args.out
    run["args"] = {k: v for k, v in json.loads(json.dumps(vars(args), default=str)).items() if k not in NEUTRAL}
    share = math.ceil(args.batch_size / processes.world)
    micro_batches = math.ceil(share / (args.micro_batch or share))
    if args.batch_size < processes.world * micro_batches:
        fail(f"--batch-size {args.batch_size} leaves some of {processes.world} processes x {micro_batches} parts empty")
    if args.benchmark:
        args.out = out = Path(tempfile.mkdtemp(prefix=out.name))
        args.steps, args.log_every, args.fresh, args.resume = 13, 14, False, "auto"
    state = open_run(args, run, processes)

    model.to(processes.device)
    ema = copy.deepcopy(model).requires_grad_(False)
    groups = {True: [], False: []}  # weight decay is for matrices: neither for vectors nor for embeddings
    for name, p in model.named_parameters():
        groups[p.ndim >= 2 and "embed" not in name].append(p)
    groups = [dict(params=ps, weight_decay=args.weight_decay * decayed) for decayed, ps in groups.items()]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=processes.device.type != "mps")
    start = skipped = 0
    if state is not None:
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        start, skipped = state["step"], state["skipped"]
        if processes.first:  # a kill may have come between the checkpoint and the rest
            save_model(out, ema, run | dict(step=start))
            print(f"{out}: going on from step {start} of {args.steps}")
    if args.activation_checkpointing:
        for block in model.blocks:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    if args.compile:
        compile_blocks(model)
    net = DistributedDataParallel(model, broadcast_buffers=False) if processes.world > 1 else model
    if processes.first:
        steps = re.compile(r'\{"step": (\d+), .*\}\n')  # of whole lines
        with open(out / "metrics.jsonl") as file:
            kept = [line for line in file if (match := steps.fullmatch(line)) and int(match[1]) <= start]
        with atomic_file(out / "metrics.jsonl") as file:
            file.write("".join(kept).encode())

    def save(step: int):
        if not processes.first:
            return
        state = dict(model=model.state_dict(), ema=ema.state_dict(), optimizer=optimizer.state_dict())
        try:
            save_checkpoint(out, state | dict(step=step, skipped=skipped, args=run["args"]))
            save_model(out, ema, run | dict(step=step))
        except (OSError, RuntimeError) as error:  # a full disk is the one or the other, as torch's writer sees it
            fail(f"cannot save step {step} to {out} ({error}); the last checkpoint there is whole: make room, start again")

    def log(**line):
        with open(out / "metrics.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")

    batches = Batches(data, args.batch_size, args.seed, processes.rank, processes.world, micro_batches)
    order = range(start * micro_batches, args.steps * micro_batches)
    loader = iter(
        torch.utils.data.DataLoader(
            batches,
            batch_size=None,
            sampler=order,
            num_workers=args.num_workers,
            pin_memory=on_cuda,
            worker_init_fn=outlive_stop_requests,
        )
    )
    sums, moments, in_a_row, logged, clock = {}, [], 0, start, time.perf_counter()
    with (
        stop_requests() as asked,
        tqdm(total=args.steps, initial=start, desc=out.name, disable=not processes.first, mininterval=1) as bar,
    ):
        for step in range(start, args.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, args)
            optimizer.zero_grad()
            for micro in range(micro_batches):
                *batch, u = next_batch(loader)  # u stays on the CPU: what it decides costs no synchronisation there
                batch = [x.to(processes.device, non_blocking=True) for x in batch] + [u]
                last = micro == micro_batches - 1
                with nullcontext() if last or processes.world == 1 else net.no_sync():
                    loss, values = compute_loss(net, batch, step)
                    n = len(u)
                    (loss * (n * processes.world / args.batch_size)).backward()
                for name, value in {"loss": loss.expand(n), **values}.items():
                    sums[name] = sums.get(name, 0) + torch.stack([value.detach().sum(), loss.new_full((), n)])
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            flags = torch.stack([(~norm.isfinite()).float(), norm.new_full((), float(len(asked)))])
            bad, stopping = processes.sum(flags).tolist()  # the one host read of a step
            if args.benchmark:
                moments.append(time.perf_counter())
            if bad:
                skipped, in_a_row, sums = skipped + 1, in_a_row + 1, {}
                if in_a_row == 5:
                    fail(f"step {step + 1}: the fifth non-finite gradient in a row; {out} keeps its last checkpoint")
            else:
                in_a_row = 0
                optimizer.step()
                update_ema(ema, model, step, args.ema)
            bar.update()
            done = step + 1
            if sums and (done % args.log_every == 0 or done == args.steps):
                totals = processes.sum(torch.stack(list(sums.values()))).tolist()
                means = {name: total / count for name, (total, count) in zip(sums, totals)}
                speed = (done - logged) * args.batch_size / (time.perf_counter() - clock)
                if processes.first:
                    extra = dict(lr=learning_rate(step, args), grad_norm=norm.item(), skipped=skipped)
                    log(step=done, **means, **extra, images_per_s=round(speed, 1))
                    bar.set_postfix_str(f"loss {means['loss']:.4f}, {speed:.0f} images/s")
                sums, logged, clock = {}, done, time.perf_counter()
            if args.benchmark:
                continue
            if done % args.save_every == 0 or done == args.steps or stopping:
                save(done)
                if processes.first and not stopping:
                    figures, rows = evaluate(ema)
                    log(step=done, **figures)
                    save_grid(out / f"samples-{done:07d}.png", rows)
                    bar.write(f"step {done}: " + ", ".join(f"{k} {v:.4f}" for k, v in figures.items()))
                processes.barrier()
                logged, clock = done, time.perf_counter()
            if stopping:
                print(f"stopped at step {done} on request; the same command goes on from there")
                break
    if args.benchmark:
        shutil.rmtree(out, ignore_errors=True)
        seconds = statistics.median(b - a for a, b in zip(moments[2:], moments[3:]))
        print_step_cost(args, processes, model, compute_loss, batches[0], seconds)


def print_step_cost(args, processes: Processes, model, compute_loss, batch, seconds: float):
    """One line: what a training step of so many seconds costs. FLOPs are counted on a few samples of a micro-batch."""
    memory, device = peak_memory(processes.device), processes.device.type
    few = [part[:16].to(processes.device) for part in batch[:3]] + [batch[3][:16]]
    flops = count_flops(lambda: compute_loss(model, few, 0)[0].backward()) / len(few[3])
    rate = args.batch_size / seconds
    parts = [f"{rate:.1f} images/s", f"{1e3 * seconds:.1f} ms a step of {args.batch_size}", f"peak memory {memory:.2f} GiB"]
    parts += [f"{flops / 1e9:.3g} GFLOPs an image", f"{flops * rate / 1e12:.3g} TFLOP/s"]
    if device == "cuda":
        device = torch.cuda.get_device_name()
        peak = next((v for k, v in PEAK_FLOPS.items() if k in device), math.nan) * processes.world
        parts.append(f"{flops * rate / peak:.1%} of the peak in bf16")
    how = f"{'bf16' if args.bf16 else 'float32'}, {'compiled' if args.compile else 'eager'}"
    if processes.first:
        print(f"{processes.world} x {device}, {how}: {', '.join(parts)}")


# ----------------------------------------------------------------------------------------------------------------------
# Stage 1


def number_or_none(text: str) -> float | None:
    return None if text == "none" else float(text)


def network_config(args, data: Data, **fields) -> Config:
    """The size's Config, fitted to the data and the flags."""
    C, H, _ = data.shape
    try:
        size = dict(img_size=H, channels=C, num_classes=len(data.info["classes"]))
        return dataclasses.replace(SIZES[args.size], **size, **fields)
    except ValueError as error:
        fail(error)


def import_flow(path: str, data: Data) -> TARFlow:
    """A published TARFlow checkpoint (a file of its state dict) for these data; sizes are read off its tensors' shapes."""
    state, (C, H, _) = load_weights(path), data.shape
    try:
        T, width = state["blocks.0.pos_embed"].shape
        D, classes = state["blocks.0.proj_in.weight"].shape[1], state.get("blocks.0.class_embed", ())
        blocks, layers = (1 + max(int(k.split(".")[i]) for k in state if "attn_blocks" in k) for i in (1, 3))
        patch = H // math.isqrt(T)
        if (math.isqrt(T) * patch, C * patch**2, len(classes)) != (H, D, len(data.info["classes"])):
            has = f"{T} tokens of {D} numbers and {len(classes)} classes"
            raise ValueError(f"it has {has}, the data {C} x {H} x {H} and {len(data.info['classes'])} classes")
        size = dict(img_size=H, channels=C, patch_size=patch, num_classes=len(classes))
        return TARFlow.from_tarflow(state, Config(**size, width=width, blocks=blocks, layers=layers))
    except KeyError as error:
        fail(f"{path} is not a TARFlow checkpoint: it has no {error}")
    except ValueError as error:
        fail(f"cannot import {path}: {error}")


def versions() -> dict:
    return dict(python=sys.version.split()[0], torch=torch.__version__, numpy=np.__version__)


@script
def main(argv=None):
    parser = parser_of("forward", "Stage 1 of BiFlow: train the flow F (TARFlow) by maximum likelihood.", PRESETS)
    help_ = "bound c on (alpha, mu), the paper's norm control, part one; or none (default: 3, ours)"
    parser.add_argument("--clip", type=number_or_none, default=3.0, help=help_)
    help_ = "no training: make a run folder of a published TARFlow checkpoint (give its --data, --img-size and --sigma)"
    parser.add_argument("--import", dest="checkpoint", metavar="CKPT", help=help_)
    args = parse(parser, PRESETS, argv)
    if args.data is None and not args.benchmark:
        fail(f"size {args.size} has no default data; give --data DIR, a folder of class subfolders of images")
    args.out = args.out or Path("runs") / f"forward-{args.size}"
    args.vae = None if args.vae == "none" else args.vae
    processes = start_processes(args)
    if args.benchmark and args.data is None:
        data = random_latents(args.size)
    else:
        data = load_data(args.data, args.img_size, args.vae, args.out.parent, processes, args.num_workers)
    args.sigma = args.sigma if args.sigma is not None else 0.3 if data.info["vae"] else 0.1
    torch.manual_seed(args.seed)
    if args.checkpoint:
        model = import_flow(args.checkpoint, data)
    else:
        model = TARFlow(network_config(args, data, clip=args.clip))
    run = dict(data.info, stage="forward", sigma=args.sigma, seed=args.seed, versions=versions())
    decode = load_decoder(run, processes.device)

    def compute_loss(net, batch, step):
        """Maximum likelihood of x~ = x + sigma eps, with some labels dropped."""
        x, eps, y, u = batch
        y = torch.where((u[:, 1] < args.label_drop).to(y.device), -1, y)
        with autocast(processes.device, args.bf16):
            states, logdet = net(x + args.sigma * eps, y)
        values = {f"rms_x{i}": s.detach().square().mean((1, 2)).sqrt() for i, s in enumerate(states)}
        return nll_loss(states[-1], logdet), values | {"logdet": logdet.detach() / states[0][0].numel()}

    @torch.no_grad()
    def evaluate(ema):
        nll = []
        for batch in validation_batches(data, data.val):
            x, eps, y, _ = (t.to(processes.device) for t in batch)
            nll.append(-ema.log_prob(x + args.sigma * eps, y) / x[0].numel())
        n = 16
        x, y = x[:n], y[:n]
        z = sample_noise(args.seed, range(len(y)), ema.config).to(processes.device)
        rows = [("real", decode(x)), ("exact inverse", decode(ema.inverse(z, y)))]
        return {"val_nll": torch.cat(nll).mean().item()}, rows

    if args.checkpoint:
        run["args"] = {}
        open_run(args, run, processes)
        save_model(args.out, model.to(processes.device), run | dict(step=0))
        figures, rows = evaluate(model)
        save_grid(args.out / "samples-0000000.png", rows)
        print(
            f"{args.out}: imported {args.checkpoint}, val_nll {figures['val_nll']:.4f} nats per dimension at sigma {args.sigma:g}"
        )
    else:
        train(args, processes, model, run, data, compute_loss, evaluate)


if __name__ == "__main__":
    main()
