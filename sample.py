"""Use trained models: samples and edited images. biflow.py and this file are all that sampling needs.

    python sample.py                                          # runs/reverse-toy: real | exact inverse | BiFlow
    python sample.py RUN --method biflow --n 50000 --guidance 1 --npz samples.npz
    python sample.py RUN --edit IMAGE --from 3 --to 8         # class editing; with --mask M.png: inpainting

Contents: device and processes, run folders, images, sampler, edits, command line.
"""

import argparse
import functools
import hashlib
import json
import math
import os
import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as nnf
from PIL import Image, ImageDraw, ImageOps
from tqdm import tqdm

from biflow import VAE, BiFlow, TARFlow, autocast, freeze, rms_normalize, unpatchify

METHODS = ("biflow", "biflow-2nfe", "biflow+score", "exact", "exact+score", "jacobi")

# ----------------------------------------------------------------------------------------------------------------------
# Device and processes

RANK = int(os.environ.get("RANK", 0))  # torchrun sets these two
WORLD = int(os.environ.get("WORLD_SIZE", 1))


def fail(message):
    """End with one line and exit status 2, for mistakes that a user can put right."""
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()  # or the line would be appended to it
    print("error: " + " ".join(str(message).split()), file=sys.stderr)
    raise SystemExit(2)


def setup(args):
    """Choose the device (CUDA, MPS, CPU), join torchrun's process group, and decide what the flags leave open: bf16 and
    compilation are on where CUDA has the hardware."""
    kind = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = torch.device(kind, int(os.environ.get("LOCAL_RANK", 0)) if kind == "cuda" else None)
    if kind == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = False  # for comparable FIDs; what is heavy runs in bf16
    if WORLD > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if kind == "cuda" else "gloo", device_id=device if kind == "cuda" else None)
    if args.bf16 is None:
        args.bf16 = kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if args.compile is None:
        args.compile = kind == "cuda"
    if args.compile:
        try:
            torch.compile(torch.square)(torch.ones(1, device=device))
        except Exception as error:  # no C++ compiler, no Triton
            print(f"going on as with --no-compile: torch.compile fails here ({str(error).strip().splitlines()[0]})")
            args.compile = False
    return device


def barrier():
    """Wait for all processes, for up to a day: one of them may be encoding a data set."""
    if WORLD > 1:
        dist.barrier(group=slow_group())


@functools.cache
def slow_group():
    return dist.new_group(backend="gloo", timeout=timedelta(days=1))


def run_script(main):
    """Run a script: what a user can mend ends it with one line. A process group left open could abort Python's exit."""
    try:
        main()
        if dist.is_initialized():
            barrier()
            dist.destroy_process_group()
    except KeyboardInterrupt:
        fail("stopped by Ctrl-C")
    except torch.OutOfMemoryError:
        fail("out of memory; give a smaller --micro-batch (training) or --batch (sampling)")
    except BrokenPipeError:  # the reader of the output is gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(2) from None


# ----------------------------------------------------------------------------------------------------------------------
# Run folders


def load_run(folder, stage=None):
    """The model of a run folder, and its run.json."""
    folder = Path(folder).expanduser().resolve()
    if not (folder / "run.json").is_file():
        fail(f"{folder} is not a trained run; make one with: python train_{stage or 'reverse'}.py --out {folder}")
    try:
        run = json.loads((folder / "run.json").read_text())
        model_class = {"forward": TARFlow, "reverse": BiFlow}[run["stage"]]
        if stage and run["stage"] != stage:
            fail(f"{folder} is a {run['stage']} run; give the folder of a {stage} run")
        return model_class.from_pretrained(folder), run
    except Exception as error:  # json, safetensors and torch raise many kinds
        fail(f"cannot load the run {folder}: {type(error).__name__}: {error}")


def weights_hash(folder):
    """What identifies a trained model: SHA-256 of its model.safetensors."""
    return hashlib.sha256((Path(folder) / "model.safetensors").read_bytes()).hexdigest()


def find_flow(folder, run):
    """The folder of the flow that a reverse run was learned from, also if it was renamed; None if it is not there."""
    folder = Path(folder).expanduser().resolve()
    flow = folder / run["forward"]
    candidates = [flow, *(path.parent for path in folder.parent.glob("*/model.safetensors"))]
    runs = [path for path in candidates if (path / "model.safetensors").is_file()]
    found = next((path for path in runs if weights_hash(path) == run["forward_hash"]), None)
    if flow in runs and found != flow:
        print(f"warning: {flow.resolve()} is not the flow that {folder} was learned from; taking {found or flow}")
    return found or (flow if flow in runs else None)


def load_vae(name, device, mean=0.0, std=1.0, bf16=False):
    try:
        return VAE(name, device, mean, std, bf16)
    except Exception as error:  # diffusers and the Hub raise many kinds
        fail(f"cannot load the VAE {name} ({error}); give a folder saved by diffusers, or a Hub name and a network")


def load_decoder(run, device, bf16):
    """From what a run's models see, (N, C, H, W), to images in [-1, 1]."""
    return load_vae(run["vae"], device, run["mean"], run["std"], bf16).decode if run["vae"] else lambda x: x


def check_output(path, suffix):
    """Refuse, before the work, a file name that cannot be written after it."""
    if path is not None and (path.suffix != suffix or not os.access(path.parent, os.W_OK) or path.is_dir()):
        fail(f"cannot write {path}: its folder must exist and be writable, and its name must end in {suffix}")


# ----------------------------------------------------------------------------------------------------------------------
# Images


def open_image(file):
    """An image file of any mode -> RGB: EXIF rotation applied, transparency laid over white, 16-bit grey scaled down,
    the first frame of an animation."""
    image = ImageOps.exif_transpose(Image.open(file))
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image, np.uint32) >> 8).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def center_crop(image, size):
    """PIL image -> uint8 (3, size, size), by ADM's centre crop: halve with BOX while the short side is >= 2 size, scale
    it to size with BICUBIC, cut the middle."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size))).transpose(2, 0, 1)


def read_image(path, size):
    """An image file -> uint8 (3, size, size). Raises many kinds of errors, as Pillow does."""
    return center_crop(open_image(path), size)


def to_uint8(x):
    """Images in [-1, 1] -> uint8 on the CPU, to the nearest of 256 levels."""
    return (x.float() * 127.5 + 127.5).round().clamp(0, 255).byte().cpu()


def save_grid(path, rows):
    """{label: images (n, C, H, W) in [-1, 1]} as one PNG, a labelled row for each; small images are enlarged."""
    cell = max(40, next(iter(rows.values())).shape[-1])
    left = 8 + 7 * max(map(len, rows))
    canvas = Image.new("RGB", (left + (cell + 2) * max(map(len, rows.values())), (cell + 2) * len(rows)), "white")
    for r, (label, images) in enumerate(rows.items()):
        ImageDraw.Draw(canvas).text((4, r * (cell + 2) + cell // 2 - 6), label, fill="black")
        for c, image in enumerate(to_uint8(images).expand(-1, 3, -1, -1)):
            tile = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((cell, cell), Image.NEAREST)
            canvas.paste(tile, (left + c * (cell + 2), r * (cell + 2)))
    canvas.save(path)


# ----------------------------------------------------------------------------------------------------------------------
# Sampler

TRAIN, EVAL, SAMPLE, ORDER = range(4)  # streams of randomness


def sample_noise(seed, indices, config):
    """z (N, T, D): each sample's depends on seed and index alone."""
    shape = (config.tokens, config.dim)
    rngs = [np.random.default_rng((seed, SAMPLE, int(i))) for i in indices]
    return torch.from_numpy(np.stack([rng.standard_normal(shape, np.float32) for rng in rngs]))


def labels_in_turn(indices, labels):
    """The label of each index, so that every class is drawn equally often; -1 ("no class") where there are none."""
    return torch.tensor([labels[i % len(labels)] for i in indices] if labels else [-1] * len(indices))


def label_of(name, classes):
    """The label of a class, by its name."""
    if name not in classes:
        fail(f"there is no class {name!r}; the classes are {', '.join(classes[:20]) or 'none'}")
    return classes.index(name)


class Sampler:
    """A flow F and, of a reverse run, its learned inverse G; draws by each method. G alone draws in one pass."""

    def __init__(self, flow, reverse, run, device, args):
        self.flow, self.reverse, self.run, self.device, self.bf16 = flow, reverse, run, device, args.bf16
        self.config = (flow or reverse).config
        for model in (flow, reverse):
            if model is not None:
                freeze(model, device, args.bf16, args.compile)
        self.decoder = load_decoder(run, device, args.bf16)

    @classmethod
    def load(cls, folder, device, args):
        """Of a run folder: forward or reverse."""
        model, run = load_run(folder)
        if run["stage"] == "forward":
            return cls(model, None, run, device, args)
        flow_folder = find_flow(folder, run)
        flow = load_run(flow_folder, "forward")[0] if flow_folder else None
        return cls(flow, model, run, device, args)

    @property
    def methods(self):
        """Those to compare by default. A G without denoise block is also shown with a score step of F."""
        exact = ["exact", "exact+score"] if self.flow is not None else []
        learned = ["biflow"] if self.reverse is not None else []
        if exact and learned and self.reverse.config.denoise == "none":
            learned.append("biflow+score")
        return exact + learned

    def check(self, method, w):
        if method.startswith("biflow") and self.reverse is None:
            fail("this is a forward run; give a reverse run, or --method exact")
        if self.flow is None and method not in ("biflow", "biflow-2nfe"):
            fail(f"--method {method} needs the flow F, which is not at {self.run['forward']}; --method biflow does not")
        if method in ("biflow", "biflow+score") and not 0 <= w <= self.reverse.config.w_max:
            fail(f"guidance {w:g} is outside [0, {self.reverse.config.w_max:g}], which the run was trained for")
        if not 0 <= w < math.inf:
            fail(f"guidance must be 0 or more, not {w:g}")

    def __call__(self, method, z, y, w=0.0):
        """z (N, T, D), y (N,) -> what the models see, (N, C, H, W)."""
        with torch.no_grad(), autocast(self.device, self.bf16):
            if method == "biflow-2nfe":
                return self.reverse.sample_two_pass(z, y, w)
            if method == "jacobi":
                return self.flow.inverse_jacobi(z, y, w)
            x = self.reverse.sample(z, y, w) if method.startswith("biflow") else self.flow.inverse(z, y, w)
            return self.flow.denoise(x, y, self.run["sigma"]) if method.endswith("+score") else x

    def decode(self, x):
        """What the models see (N, C, H, W) -> images in about [-1, 1]; 32 at a time, since a VAE takes much memory."""
        with torch.no_grad():
            return torch.cat([self.decoder(part) for part in x.split(32)])

    def encode(self, x, y, seed):
        """What the models see (N, C, H, W), y (N,) -> the flow's states [x^0, ..., z], with the noise of training."""
        if self.flow is None:
            fail("only the flow F turns an image into noise, and the flow of this reverse run is not there")
        eps = [np.random.default_rng((seed, EVAL, i)).standard_normal(x.shape[1:], np.float32) for i in range(len(x))]
        with torch.no_grad(), autocast(self.device, self.bf16):
            return self.flow(x + self.run["sigma"] * torch.from_numpy(np.stack(eps)).to(self.device), y)[0]

    def images(self, method, indices, y, w=0.0, seed=0):
        """The images of these indices and labels."""
        z = sample_noise(seed, indices, self.config).to(self.device)
        return self.decode(self(method, z, y.to(self.device), w))

    def draw(self, method, labels, w, seed, batch):
        """As many uint8 images as labels (n,), so many at a time."""
        parts = torch.arange(len(labels)).split(batch)
        return torch.cat([to_uint8(self.images(method, part, labels[part], w, seed)) for part in parts])


# ----------------------------------------------------------------------------------------------------------------------
# Edits: no training, since data and noise are paired


def edit(sampler, args):
    """An image to its noise z with its own class, and back: as it is; to another class (--to); or with new noise where
    --mask is white, z' = M z + (1 - M) eps."""
    classes, n = sampler.run["classes"], min(args.n, 20)
    own, new = [label_of(name, classes) if name else -1 for name in (args.source, args.to)]
    own_y, new_y = [torch.full((n,), label, device=sampler.device) for label in (own, new)]
    try:
        files = [path for path in (args.edit, args.mask) if path]
        image, *mask = [torch.tensor(read_image(path, sampler.run["img_size"])).to(sampler.device) for path in files]
    except Exception as error:  # Pillow raises many kinds
        fail(f"cannot read {args.edit} or {args.mask} ({error})")
    x = image[None] / 127.5 - 1
    if sampler.run["vae"]:
        vae = load_vae(sampler.run["vae"], sampler.device, sampler.run["mean"], sampler.run["std"])
        x = (vae.encode(x)[:, 0] - vae.mean) / vae.std
    elif sampler.config.channels == 1:
        x = x.mean(1, keepdim=True)
    method = args.method[0] if args.method else sampler.methods[-1]
    w = args.guidance[0] if args.guidance else 0.0
    sampler.check(method, w)
    z = sampler.encode(x.expand(n, -1, -1, -1), own_y, args.seed)[-1]
    rows = {"input": sampler.decode(x)}
    if args.mask:
        mask = mask[0][0] > 127
        redraw = nnf.adaptive_max_pool2d(mask[None].float(), math.isqrt(sampler.config.tokens)).view(1, -1, 1)
        z = (1 - redraw) * z[:1] + redraw * sample_noise(args.seed, range(n), sampler.config).to(sampler.device)
        rows["masked"] = torch.where(mask, 1.0, rows["input"])
    rows[f"as {args.source or 'no class'}"] = sampler.decode(sampler(method, z, own_y, w))
    if args.to:
        rows[f"as {args.to}"] = sampler.decode(sampler(method, z, new_y, w))
    return rows


def trajectory(sampler, x, y, seed):
    """The states of the flow down to z, and what G's heads predict of them on the way back, each divided by its RMS."""
    if sampler.reverse is None:
        fail("--trajectory needs a reverse run")
    states = sampler.encode(x, y, seed)
    with torch.no_grad(), autocast(sampler.device, sampler.bf16):
        x_prime, predictions = sampler.reverse(states[-1], y, 0.0)
    rows = {f"flow: x^{i}": state for i, state in enumerate(states[:-1])} | {"z": states[-1]}
    rows |= {f"reverse: x^{i}": state for i, state in predictions.items()}
    for name, state in rows.items():
        image = 0.4 * unpatchify(rms_normalize(state.float()), sampler.config.patch_size)
        rows[name] = image[:, :3] if image.shape[1] >= 3 else image[:, :1]
    return {"x": sampler.decode(x)} | rows | {"x' = G(z)": sampler.decode(x_prime)}


# ----------------------------------------------------------------------------------------------------------------------
# Command line


def parse(argv):
    parser = argparse.ArgumentParser(description="Draw samples from a trained run.")
    add, on_off = parser.add_argument, argparse.BooleanOptionalAction
    add("run", nargs="?", default="runs/reverse-toy", help="run folder (default: runs/reverse-toy)")
    add("--method", choices=METHODS, action="append", help="repeatable; default: all of the run's")
    add("--n", type=int, default=20, help="number of samples, or of an edit's variants (default: 20)")
    add("--classes", help="names, with commas, drawn in turn; none: no class, of which G knows the mean (default: all)")
    add("--guidance", type=float, nargs="+", metavar="W", help="scales (default: for BiFlow three of its range)")
    add("--seed", type=int, default=0)
    add("--batch", type=int, default=256, help="samples at a time (default: 256)")
    add("--out", type=Path, help="the PNG to write (default: RUN/samples.png, edit.png or trajectory.png)")
    add("--npz", type=Path, help="also write uint8 images (arr_0, NHWC) and labels (arr_1) of the last row")
    add("--edit", metavar="IMAGE", help="an image to its noise and back, with --from, --to and --mask")
    add("--from", dest="source", metavar="CLASS", help="the image's class, by name (default: none)")
    add("--to", metavar="CLASS", help="the class to edit it to, by name")
    add("--mask", metavar="IMAGE", help="white where the image is to be redrawn")
    add("--trajectory", action="store_true", help="the states of the flow and of its learned inverse")
    add("--compile", action=on_off, help="torch.compile (default: on CUDA)")
    add("--bf16", action=on_off, help="bfloat16 autocast (default: on CUDA)")
    args = parser.parse_args(argv)
    if min(args.n, args.batch) < 1:
        fail("--n and --batch must be at least 1")
    return args


def main(argv=None):
    args = parse(argv)
    mode = "edit" if args.edit else "trajectory" if args.trajectory else "samples"
    out = args.out or Path(args.run) / f"{mode}.png"
    device = setup(args)
    sampler = Sampler.load(args.run, device, args)
    check_output(out, ".png")
    check_output(args.npz, ".npz")
    try:
        held_out = torch.load(Path(args.run) / "real.pt", map_location=device, weights_only=True)
    except Exception as error:
        fail(f"cannot read the held-out images {args.run}/real.pt ({error}); go on with the run, and they are written")
    if mode == "edit":
        rows = edit(sampler, args)
    elif mode == "trajectory":
        rows = trajectory(sampler, held_out["x"][:10], held_out["y"][:10], args.seed)
    else:
        rows = samples(sampler, held_out, args)
    save_grid(out, rows)
    print(f"wrote {out}")


def samples(sampler, held_out, args):
    """Rows of real images and of each method and guidance scale; the last row also goes to --npz."""
    classes = sampler.run["classes"]
    chosen = range(sampler.config.num_classes)
    if args.classes:
        chosen = [] if args.classes == "none" else [label_of(name, classes) for name in args.classes.split(",")]
    labels = labels_in_turn(range(args.n), chosen)
    w_max = sampler.reverse.config.w_max if sampler.reverse is not None else 0.0
    scales = args.guidance or ([0.0] if args.method else sorted({0.0, w_max / 4, w_max}))
    draws = [
        (m, w) for m in args.method or sampler.methods for w in (scales if args.guidance or m == "biflow" else [0.0])
    ]
    for method, w in draws:
        sampler.check(method, w)

    shown = torch.isin(held_out["y"].cpu(), labels) | (labels < 0).all()
    rows = {"real": sampler.decode(held_out["x"][shown])} if shown.any() else {}
    for method, w in draws:
        images = sampler.draw(method, labels, w, args.seed, args.batch)
        name = f"{method} w={w:g}" if w else method
        rows[name] = images[:20] / 127.5 - 1
    if args.npz:
        np.savez(args.npz, arr_0=images.permute(0, 2, 3, 1).numpy(), arr_1=labels.numpy())
    return rows


if __name__ == "__main__":
    run_script(main)
