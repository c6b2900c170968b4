"""What the models are trained on: digits, MNIST and its like, folders of images, latents; and the batches of a step.

Contents: data sets, folders of images and their cache, batches, a small classifier.

The randomness of a training step is a function of (seed, step, index in the global batch). A run therefore does not
depend on the number of processes or workers, and resuming needs no generator state.
"""

import dataclasses
import functools
import hashlib
import json
import math
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as nnf
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from biflow import SIZES, random_resized_crop
from sample import EVAL, ORDER, RANK, TRAIN, WORLD, barrier, fail, load_vae, read_image, slow_group

# ----------------------------------------------------------------------------------------------------------------------
# Data

TORCHVISION = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "cifar10": "CIFAR10"}
DATA_SETS = ", ".join(("digits", *TORCHVISION))


@dataclasses.dataclass
class Data:
    """Images or latents with labels and a fixed split. `info` is what has to travel with a model trained on them."""

    source: np.ndarray | Path  # the array, or the .npy file to map into memory
    labels: np.ndarray
    fit: np.ndarray  # indices to train on
    val: np.ndarray  # ... to make choices with
    test: np.ndarray  # ... to report metrics on
    augment: str  # mirror, jitter or none
    info: dict  # data, identity, cache, vae, img_size, classes, mean, std

    @property
    def array(self):
        return np.load(self.source, mmap_mode="r") if isinstance(self.source, Path) else self.source

    def prepare(self, row, mirror, rng):
        """A row of the array -> what the models see, float32 (C, H, W). A VAE's posterior is sampled and normalised."""
        if self.info["vae"]:
            mean, logvar = row[int(mirror)].astype(np.float32)
            x = mean + np.exp(0.5 * logvar) * rng.standard_normal(mean.shape, np.float32)
            return (x - np.float32(self.info["mean"])) / np.float32(self.info["std"])
        x = row.astype(np.float32) / 127.5 - 1 if row.dtype == np.uint8 else row
        return x[:, :, ::-1] if mirror else x


def load_data(args, device):
    """`--data`: digits, a torchvision data set, a folder of images, or a cache that was made of one."""
    if args.data == "random":
        return random_latents(args.size)
    if args.data != "digits" and args.data not in TORCHVISION:
        return load_folder(args, device)
    data = load_digits() if args.data == "digits" else load_torchvision(args.data, args.out.parent / "data")
    if args.vae not in (None, "none") or args.img_size not in (None, data.info["img_size"]):
        fail(f"{args.data} has pixels of its own size; give --vae none, and no --img-size")
    return data


def load_data_of(forward_run, args, device):
    """The flow's data (its cache, also if it was moved with the runs), or --data, which must be of the same kind."""
    if args.sigma not in (None, forward_run["sigma"]):
        fail(f"--sigma is the flow's, {forward_run['sigma']}")
    args.sigma = forward_run["sigma"]
    args.vae = args.vae or forward_run["vae"]
    args.img_size = args.img_size or forward_run.get("img_size")
    if args.data is None:
        args.data = forward_run["data"]
        if forward_run["cache"]:
            cache = Path(forward_run["cache"])
            args.data = cache if cache.exists() else args.forward.resolve().parent / cache.name
    data = load_data(args, device)
    for name in ("vae", "img_size", "classes"):
        if forward_run.get(name, data.info[name]) != data.info[name]:
            fail(f"the data have {name} {data.info[name]}, those of the flow {forward_run[name]}; give the flow's data")
    data.info |= {name: forward_run[name] for name in ("mean", "std") if name in forward_run}  # as F has learned them
    return data


def patch_size_for(side, args):
    """The default gives 256 tokens at most, and 49 to MNIST's images."""
    p = args.patch_size or (4 if side == 28 else next(2**k for k in range(1, 20) if side <= 16 * 2**k))
    if side % p:
        fail(f"--patch-size {p} does not divide {side}, the side of what the models see")
    return p


def data_info(name, side, classes):
    return dict(data=name, identity=name, cache=None, vae=None, img_size=side, classes=list(classes))


def load_digits():
    """scikit-learn's 1797 handwritten digits in [-1, 1]. Of every twelve of a class two are for test, one validates."""
    from sklearn import datasets

    digits = datasets.load_digits()
    place = np.array([np.sum(digits.target[:i] == label) for i, label in enumerate(digits.target)]) % 12
    split = [np.flatnonzero(np.isin(place, places)) for places in ([0, 2, 3, 5, 6, 8, 9, 10, 11], [4], [1, 7])]
    images = (digits.images / 8 - 1).astype(np.float32)[:, None]
    return Data(images, digits.target.astype(np.int64), *split, "jitter", data_info("digits", 8, "0123456789"))


def load_torchvision(name, root):
    """MNIST, Fashion-MNIST or CIFAR-10: 2,000 training images are for validation, the official test images for test."""
    from torchvision import datasets

    if RANK > 0:
        barrier()  # the first process downloads
    try:
        parts = [getattr(datasets, TORCHVISION[name])(root, train=train, download=True) for train in (True, False)]
        assert all(len(part.data) == len(part.targets) for part in parts), "images and labels differ in number"
    except Exception as error:  # no network, a damaged file
        fail(f"cannot load {name} ({error}); put the files of torchvision's {TORCHVISION[name]} into {root}")
    if RANK == 0:
        barrier()
    images = np.concatenate([np.asarray(part.data) for part in parts])
    images = images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
    labels = np.concatenate([np.asarray(part.targets) for part in parts]).astype(np.int64)
    n = len(parts[0])
    val = np.linspace(0, n - 1, min(2000, n // 10)).astype(int)
    augment = {"mnist": "jitter", "cifar10": "mirror"}.get(name, "none")
    info = data_info(name, images.shape[-1], [c.partition(" - ")[0] for c in parts[0].classes])  # "0 - zero" -> "0"
    return Data(images, labels, np.setdiff1d(np.arange(n), val), val, np.arange(n, len(labels)), augment, info)


def random_latents(size):
    """Noise in the shape of the size's latents: enough to measure what a step costs."""
    config = SIZES[size]
    shape = (64, config.channels, config.img_size, config.img_size)
    array = np.random.default_rng(0).standard_normal(shape, np.float32)
    info = data_info("random", config.img_size, map(str, range(config.num_classes)))
    return Data(array, np.zeros(64, np.int64), *[np.arange(64)] * 3, "none", info)


# ----------------------------------------------------------------------------------------------------------------------
# Folders of images are read once, into a cache of uint8 pixels or of float16 VAE posteriors

IMAGE_TYPES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
HIDDEN = (".", "__MACOSX")
SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}


def list_images(root):
    """The images below a folder, their labels, and the classes: its sub-folders, if there are any.

    Hidden files and folders are skipped, links are followed, and what else is not read is counted in a line.
    """
    paths = []
    for folder, folders, names in os.walk(root, followlinks=True, onerror=fail):
        paths += [Path(folder, name) for name in names if not name.startswith(HIDDEN)]
        real = Path(folder).resolve()
        folders[:] = [name for name in folders if not name.startswith(HIDDEN)]
        folders[:] = [name for name in folders if not real.is_relative_to(Path(folder, name).resolve())]  # no loops
    paths.sort()
    files = [p for p in paths if p.suffix.lower() in IMAGE_TYPES and p.exists()]
    classes = sorted({p.relative_to(root).parts[0] for p in files if p.parent != root})
    loose = [p for p in files if p.parent == root]
    if len(classes) == 1 and loose:
        fail(f"{root} holds {len(loose)} images beside the folder {classes[0]}; move the one or the other away")
    others = set(paths).difference(files)
    skipped = Counter(p.suffix or p.name if p.exists() else f"dangling link {p}" for p in others)
    if classes and loose:
        files = [p for p in files if p.parent != root]
        skipped["images beside the class folders"] = len(loose)
    shown = [p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith(HIDDEN)]
    skipped.update(f"empty folder {name}" for name in shown if name not in classes)
    if skipped and RANK == 0:
        print(f"{root}: skipped {dict(skipped)}; types that are read: {' '.join(sorted(IMAGE_TYPES))}")
    if len(files) < 2:
        fail(f"{root} holds {len(files)} images, too few; types that are read: {' '.join(sorted(IMAGE_TYPES))}")
    if len(classes) > 1 and SPLITS.issuperset(map(str.lower, classes)):
        fail(f"{root} holds the splits {', '.join(classes)}, not classes; give one, such as {root / classes[0]}")
    if len(classes) < 2:
        return files, [-1] * len(files), []
    label = {name: i for i, name in enumerate(classes)}
    return files, [label[p.relative_to(root).parts[0]] for p in files], classes


class Photos(torch.utils.data.Dataset):
    """Image files as (index, uint8 array (3, size, size), mark); mark is 1, or 2 for a file that cannot be read."""

    def __init__(self, files, size):
        self.files, self.size = files, size

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        try:
            return i, read_image(self.files[i], self.size), 1
        except Exception:  # Pillow raises many kinds for a damaged file
            return i, np.zeros((3, self.size, self.size), np.uint8), 2


def load_folder(args, device):
    """A cache, or a folder of images, which is cached beside the runs. 5 % are for validation."""
    if not args.data or not Path(args.data).expanduser().is_dir():
        fail(f"--data {args.data} is not a folder; give a folder of images or class folders, a cache, or {DATA_SETS}")
    cache = Path(args.data).expanduser().resolve()
    if args.out.resolve().is_relative_to(cache):
        fail(f"--out {args.out} lies inside --data {args.data}, whose images its pictures would join")
    if not all((cache / name).exists() for name in ("manifest.json", "data.npy", "done.npy")):
        cache = find_cache(cache, args, device)
    try:
        info = json.loads((cache / "manifest.json").read_text())
        labels = np.array(info.pop("labels"))
        good = np.flatnonzero(np.load(cache / "done.npy") == 1)
        assert len(np.load(cache / "data.npy", mmap_mode="r")) == len(labels), "data.npy has another length"
    except Exception as error:
        fail(f"the cache {cache} is damaged ({type(error).__name__}: {error}); remove it, and give its images")
    if len(good) < len(labels) and RANK == 0:
        left_out = f"{len(labels) - len(good)} images cannot be read and are left out"
        print(f"{left_out}; {cache / 'damaged.txt'} lists them; repair them, and remove the cache")
    if len(good) < 2:
        fail(f"of the images in {cache} {len(good)} can be read, too few; repair them, and remove the cache")
    if args.img_size not in (None, info["img_size"]):
        fail(f"the cache {cache} was made with --img-size {info['img_size']}, not {args.img_size}")
    info["cache"] = str(cache)
    val = good[np.unique(np.linspace(0, len(good) - 1, min(1000, max(1, len(good) // 20))).astype(int))]
    return Data(cache / "data.npy", labels, np.setdiff1d(good, val), val, val, "mirror", info)


def find_cache(root, args, device):
    """The cache of a folder of images. It knows them by names, sizes and times: if any changes, they are read anew."""
    vae_name = None if args.vae == "none" else args.vae
    size = args.img_size or (256 if vae_name else 32)
    files, labels, classes = list_images(root)
    stats = [(str(file.relative_to(root)), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    identity = hashlib.sha256(json.dumps([vae_name, size, classes, stats]).encode()).hexdigest()[:12]
    cache = args.out.parent / f"cache-{root.name}-{size}-{identity}"
    if not (cache / "manifest.json").exists():
        begun = args.out / "run.json"
        if begun.exists() and not args.fresh and identity not in begun.read_text():
            hint = "if only the files' times have changed, give their old cache as --data; --fresh starts over"
            fail(f"{args.out} was begun with other images, --img-size or --vae; {hint}")
        vae = load_vae(vae_name, device) if vae_name else None
        statistics = build_cache(cache, files, size, vae, device, args)
        info = dict(data=str(root), identity=identity, vae=vae_name, img_size=size, classes=classes, labels=labels)
        if RANK == 0:
            write_aside(cache / "manifest.json", json.dumps(info | statistics).encode())
        barrier()
    return cache.resolve()


def build_cache(cache, files, size, vae, device, args):
    """Read (and encode) every image once; returns the latents' mean and std per channel.

    data.npy is uint8 (n, 3, S, S), or float16 (n, 2, 2, C, h, w): image and mirror image, mean and log-variance.
    done.npy says which images are in, so that a killed build goes on.
    """
    shape, dtype = (3, size, size), np.uint8
    if vae:
        shape, dtype = (2, 2, *vae.encode(torch.zeros(1, *shape, device=device)).shape[2:]), np.float16
    patch_size_for(shape[-1], args)
    if size % shape[-1]:
        fail(f"--img-size {size} is not a multiple of the side of the VAE's latents, {shape[-1]}")
    if RANK == 0 and not (cache / "done.npy").exists():
        cache.mkdir(parents=True, exist_ok=True)
        needed = len(files) * math.prod(shape) * np.dtype(dtype).itemsize
        if shutil.disk_usage(cache).free < needed:  # a memory-mapped file that meets a full disk kills the process
            fail(f"{cache} needs {needed / 1e9:.3g} GB and the disk has less room; make some, or give another --out")
        np.lib.format.open_memmap(cache / "data.npy", "w+", dtype, (len(files), *shape)).flush()
        np.lib.format.open_memmap(cache / "done.npy", "w+", np.uint8, (len(files),)).flush()
    barrier()
    data, done = (np.load(cache / name, mmap_mode="r+") for name in ("data.npy", "done.npy"))
    todo = [i for i in range(RANK, len(files), WORLD) if not done[i]]
    batch = args.micro_batch or 32
    loader = DataLoader(Photos(files, size), batch, sampler=todo, num_workers=args.num_workers, collate_fn=list)
    for items in tqdm(loader, desc="reading images", disable=RANK > 0):
        indices, pixels, marks = map(np.array, zip(*items))
        if vae:
            x = torch.from_numpy(pixels).to(device) / 127.5 - 1
            pixels = torch.stack([vae.encode(x), vae.encode(x.flip(3))], dim=1).cpu().numpy()
        data[indices] = pixels
        data.flush()
        done[indices] = marks
        done.flush()
    barrier()
    if not done.all():  # as network disks may do that several machines write to
        fail(f"{np.sum(done == 0)} images are not in {cache}; the same command reads them")
    damaged = [str(files[i]) for i in np.flatnonzero(done == 2)]
    if damaged and RANK == 0:
        (cache / "damaged.txt").write_text("\n".join(damaged))
    if not vae:
        return {}
    sums = torch.zeros(3, shape[2], dtype=torch.float64)  # each process adds up its share of E[1], E[x] and E[x^2]
    for i in range(RANK * 32, len(files), WORLD * 32):
        mean, logvar = torch.from_numpy(data[i : i + 32][done[i : i + 32] == 1]).double().unbind(2)
        sums += torch.stack([x.sum((0, 1, 3, 4)) for x in (torch.ones_like(mean), mean, mean**2 + logvar.exp())])
    n, first, second = sum(gather(sums)).view(3, -1, 1, 1)
    return dict(mean=(first / n).tolist(), std=(second / n - (first / n) ** 2).sqrt().tolist())


def sum_over_processes(x):
    if WORLD > 1:
        dist.all_reduce(x)
    return x


def gather(x):
    """The objects x of all processes."""
    found = [x] * WORLD
    if WORLD > 1:
        dist.all_gather_object(found, x, group=slow_group())
    return found


def write_aside(path, content):
    """Written under another name, flushed and renamed, so that a kill at any moment leaves a whole file."""
    new = path.with_name(path.name + ".new")
    with open(new, "wb") as file:
        torch.save(content, file) if isinstance(content, dict) else file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)


# ----------------------------------------------------------------------------------------------------------------------
# Batches


class Batch(NamedTuple):
    """Samples with all the random numbers that a training step needs."""

    x: torch.Tensor  # (n, C, H, W), clean
    eps: torch.Tensor  # (n, C, H, W), Gaussian
    y: torch.Tensor  # (n,)
    drop: torch.Tensor  # (n,), uniform like the two below: whether the label is dropped
    guidance: torch.Tensor  # (n, 2): the guidance scale
    crop: torch.Tensor  # (n, 4): the perceptual distance's crop

    def split(self, size):
        return [Batch(*part) for part in zip(*(tensor.split(size) for tensor in self))]


class Batches(torch.utils.data.Dataset):
    """Item `step`: this process's share of the batch, as numpy arrays, which workers send without shared memory."""

    def __init__(self, data, batch_size, seed, rank=RANK, world=WORLD):
        self.data, self.batch_size, self.seed, self.rank, self.world = data, batch_size, seed, rank, world

    @functools.lru_cache(maxsize=2)
    def order(self, epoch):
        return np.random.default_rng((self.seed, ORDER, epoch)).permutation(self.data.fit)

    def __getitem__(self, step):
        samples, array = [], self.data.array  # the file is opened here, in the worker
        for slot in np.array_split(np.arange(self.batch_size), self.world)[self.rank]:
            epoch, place = divmod(step * self.batch_size + int(slot), len(self.data.fit))
            rng = np.random.default_rng((self.seed, TRAIN, step, int(slot)))
            samples.append(draw(self.data, array, self.order(epoch)[place], rng, self.data.augment == "mirror"))
        samples, moves = zip(*samples)
        batch = collate(samples)
        if self.data.augment == "jitter":
            batch = batch._replace(x=jitter(torch.from_numpy(batch.x), torch.from_numpy(np.stack(moves))).numpy())
        return batch


def draw(data, array, i, rng, mirrors=False):
    """Sample i of the data with its random numbers, and those that would jitter it. `mirrors`: half are mirrored."""
    u = rng.random(14, np.float32)
    mirror, drop, guidance, crop, moved = u[0], u[1], u[2:4], u[4:8], u[8:]
    eps = rng.standard_normal(array.shape[-3:], np.float32)
    x = data.prepare(array[i], mirrors and mirror < 0.5, rng)
    return Batch(x, eps, data.labels[i], drop, guidance, crop), moved


def jitter(x, u):
    """Images (N, C, S, S) in [-1, 1] under small random affine maps, by u (N, 6): what mirroring is to photographs."""
    moved = (2 * u - 1) * torch.tensor([0.05, 0.05, 0.03, 0.05, 0.05, 0.03])
    grid = nnf.affine_grid(torch.eye(2, 3) + moved.view(-1, 2, 3), x.shape, align_corners=False)
    return nnf.grid_sample(x + 1, grid, mode="bicubic", align_corners=False).sub(1).clamp(-1, 1)


def collate(samples):
    return Batch(*(np.stack(column) for column in zip(*samples)))


def to_device(batch, device):
    """Numpy arrays -> tensors. Copies are asynchronous on CUDA only: on MPS they would be corrupted silently."""
    tensors = [torch.from_numpy(array) for array in batch]
    if device.type == "cuda":
        return Batch(*(tensor.pin_memory().to(device, non_blocking=True) for tensor in tensors))
    return Batch(*(tensor.to(device) for tensor in tensors))


def validation_batches(data, device, batch_size=256):
    """Fixed batches. A small set is repeated with other noise, so that metrics do not depend on one noise sample."""
    keys = [(repeat, int(i)) for repeat in range(max(1, 1000 // len(data.val))) for i in data.val]
    array = data.array
    for k in range(0, len(keys), batch_size):
        part = keys[k : k + batch_size]
        samples = [draw(data, array, i, np.random.default_rng((repeat, EVAL, i)))[0] for repeat, i in part]
        yield to_device(collate(samples), device)


def held_out(data, n=20):
    """n held-out samples, the classes in turn, to show beside generated ones."""
    of_class = [data.test[data.labels[data.test] == label] for label in np.unique(data.labels[data.test])]
    chosen = [members[k // len(of_class) % len(members)] for k, members in zip(range(n), of_class * n)]
    array = data.array
    x = np.stack([data.prepare(array[i], False, np.random.default_rng(int(i))) for i in chosen])
    return {"x": torch.from_numpy(x), "y": torch.from_numpy(data.labels[chosen])}


# ----------------------------------------------------------------------------------------------------------------------
# A small classifier


def load_classifier(data, args):
    """A small convolutional classifier without its last layer, (n, C, S, S) -> (n, 128). It is trained once, on every
    second training image, cropped as the distance crops; of MNIST and its like fid.py's judge sees the other half."""
    torch.manual_seed(1)
    channels, side = data.array.shape[1], data.info["img_size"]
    net = nn.Sequential(
        nn.Conv2d(channels, 32, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(64, 64, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(),
        nn.Linear(64 * math.ceil(side / 8) ** 2, 128), nn.ReLU(),
        nn.Linear(128, len(data.info["classes"])),
    )  # fmt: skip
    path = args.out.parent / "data" / f"features-{data.info['data']}.pt"
    if RANK == 0 and not path.exists():
        batches = Batches(dataclasses.replace(data, fit=data.fit[1::2]), 128, seed=1, rank=0, world=1)
        optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
        for step in tqdm(range(1000), desc="perceptual network"):
            batch = to_device(batches[step], torch.device("cpu"))
            x = random_resized_crop(batch.x, batch.crop, side)
            nnf.cross_entropy(net(x), batch.y).backward()
            optimizer.step()
            optimizer.zero_grad()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_aside(path, net.state_dict())
    barrier()
    net.load_state_dict(torch.load(path, weights_only=True))
    return net[:-1]
