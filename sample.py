"""Use trained models: samples and edited images. biflow.py and this file are all that sampling needs.

python sample.py                                          # runs/reverse-toy: real | exact inverse | BiFlow
python sample.py RUN --method biflow --n 50000 --guidance 1 --npz samples.npz
python sample.py RUN --edit IMAGE --from 3 --to 8         # class editing; with --mask M.png: inpainting
"""

import argparse
import functools
import hashlib
import json
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
    message = " ".join(str(message).split())
    if len(message) > 1000:  # such as the names of all weights that do not fit
        message = f"{message[:500]} [...] {message[-500:]}"
    tqdm.write(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def setup(args):
    """Choose the device and join torchrun's process group. Bf16 and compilation are on where CUDA supports them."""
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


@functools.cache
def slow_group():
    return dist.new_group(backend="gloo", timeout=timedelta(days=1))


def barrier():
    """Wait for all processes, for up to a day: one of them may be encoding a data set."""
    if WORLD > 1:
        dist.barrier(group=slow_group())


def run_script(main):
    """Run a script: what a user can mend ends it with one line. A process group left open could abort Python's exit."""
    try:
        main()
        sys.stdout.flush()
        if dist.is_initialized():
            barrier()
            dist.destroy_process_group()
    except KeyboardInterrupt:
        fail("stopped by Ctrl-C")
    except torch.OutOfMemoryError:
        fail("out of memory; give a smaller --micro-batch (training) or --batch (sampling)")
    except RuntimeError as error:
        if "DataLoader worker (pid" not in str(error):
            raise
        fail("a process that loads data was killed, perhaps for lack of memory; go on with fewer --num-workers")
    except BrokenPipeError:  # the reader of the output is gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(2) from None
    except OSError as error:  # such as a full disk
        fail(f"cannot read or write {error.filename or 'a file'}: {error.strerror or error}")


# ----------------------------------------------------------------------------------------------------------------------
# Files: run folders, pictures


def load_run(folder, stage=None):
    """The model of a run folder, and its run.json."""
    folder = Path(folder)
    if not (folder / "run.json").is_file():
        fail(f"{folder} is not a trained run; make one with: python train_{stage or 'reverse'}.py --out {folder}")
    try:
        run = json.loads((folder / "run.json").read_text())
        if stage and run["stage"] != stage:
            fail(f"{folder} is a {run['stage']} run; give the folder of a {stage} run")
        model = {"forward": TARFlow, "reverse": BiFlow}[run["stage"]].from_pretrained(folder)
        assert all(p.isfinite().all() for p in model.parameters()), "there are weights that are not finite"
        return model, run
    except Exception as error:  # json, safetensors and torch raise many kinds
        files = "run.json, config.json and model.safetensors"
        fail(f"cannot load the run {folder}; look at its {files} ({type(error).__name__}: {error})")


def weights_hash(folder):
    """What identifies a trained model: SHA-256 of its model.safetensors."""
    return hashlib.sha256((Path(folder) / "model.safetensors").read_bytes()).hexdigest()


def load_flow(folder, run):
    """The flow that a reverse run was learned from, also if its folder was renamed; None if it is not there."""
    folder = Path(folder).resolve()
    flow = (folder / run["forward"]).resolve()
    files = [flow / "model.safetensors", *folder.parent.glob("*/model.safetensors")]
    runs = [file.parent for file in files if file.is_file()]
    found = next((path for path in runs if weights_hash(path) == run["forward_hash"]), None)
    if flow in runs and found != flow:
        found = found or flow
        print(f"warning: {flow} is not the flow that {folder} was learned from; taking {found}")
    return load_run(found, "forward")[0] if found else None


def load_real(folder):
    """The held-out images of a run: x as the models see them, labels y."""
    try:
        real = torch.load(Path(folder) / "real.pt", weights_only=True)
        assert real["x"].isfinite().all(), "there are pixels that are not finite"
        return real
    except Exception as error:  # zipfile, pickle and torch raise many kinds
        fail(f"cannot read {folder}/real.pt ({error}); go on with the run, and it is written anew")


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


def center_crop(image, size):
    """PIL image -> uint8 (3, size, size), by ADM's centre crop: halve it while it is large, scale, cut the middle."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size))).transpose(2, 0, 1)


def read_image(file, size, under="white"):
    """A file -> uint8 (3, size, size), with EXIF rotation, 16-bit grey scaled down, and a colour under transparency."""
    image = ImageOps.exif_transpose(Image.open(file))
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image, np.uint32) >> 8).clip(0, 255).astype(np.uint8))
    image = Image.alpha_composite(Image.new("RGBA", image.size, under), image.convert("RGBA")).convert("RGB")
    return center_crop(image, size)


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


def sample_noise(seed, indices, config, stream=SAMPLE):
    """z (N, T, D). Sample i depends only on seed, stream and i."""
    rngs = [np.random.default_rng((seed, stream, int(i))) for i in indices]
    return torch.from_numpy(np.stack([rng.standard_normal((config.tokens, config.dim), np.float32) for rng in rngs]))


def labels_in_turn(indices, labels):
    """The label of each index, so that every class is drawn equally often; -1 ("no class") where there are none."""
    return torch.tensor([labels[i % len(labels)] for i in indices] if labels else [-1] * len(indices))


def label_of(name, classes):
    """The label of a class, by its name; -1 for "none"."""
    if name not in (*classes, "none"):
        fail(f"there is no class {name!r}; the classes are {', '.join(classes[:20]) or 'none'}")
    return classes.index(name) if name in classes else -1


class Sampler:
    """A flow F and, of a reverse run, its learned inverse G; draws by each method. G alone draws in one pass."""

    def __init__(self, flow, reverse, run, device, args):
        self.flow, self.reverse, self.run, self.device, self.bf16 = flow, reverse, run, device, args.bf16
        self.config = (reverse or flow).config
        for model in filter(None, (flow, reverse)):
            freeze(model, device, args.bf16, args.compile)
        self.decoder = load_decoder(run, device, bf16=False)  # for comparable FIDs

    @classmethod
    def load(cls, folder, device, args):
        """From the folder of a forward or reverse run."""
        model, run = load_run(folder)
        run.setdefault("classes", [str(i) for i in range(model.config.num_classes)])  # an imported flow knows no names
        if run["stage"] == "forward":
            return cls(model, None, run, device, args)
        return cls(load_flow(folder, run), model, run, device, args)

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
            fail(f"this needs the flow F, which is not at {self.run['forward']}; sampling by --method biflow does not")
        w_max = self.reverse.config.w_max if method in ("biflow", "biflow+score") else float("inf")
        if not 0 <= w <= w_max:
            fail(f"guidance {w:g} is outside [0, {w_max:g}], the range of {method} in this run")
        if w and not self.config.num_classes:
            fail("this run has no classes, and so no guidance")

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
        """What the models see (N, C, H, W), y (N,) -> the flow's states [x^0, ..., z], with noise as in training."""
        self.check("exact", 0.0)  # it takes F, too
        eps = unpatchify(sample_noise(seed, range(len(x)), self.config, EVAL), self.config.patch_size)
        with torch.no_grad(), autocast(self.device, self.bf16):
            return self.flow(x + self.run["sigma"] * eps.to(self.device), y)[0]

    def noise(self, indices, seed=0):
        """z (N, T, D) of these indices, on the device."""
        return sample_noise(seed, indices, self.config).to(self.device)

    def images(self, method, indices, y, w=0.0, seed=0):
        """The images of these indices and labels."""
        x = self.decode(self(method, self.noise(indices, seed), y.to(self.device), w))
        if not x.isfinite().all():  # they would become black pixels
            fail(f"{method} at w = {w:g} gives images that are not finite")
        return x

    def draw(self, method, labels, w, seed, batch):
        """A uint8 image for each of the labels (n,), `batch` at a time."""
        parts = torch.arange(len(labels)).split(batch)
        return torch.cat([to_uint8(self.images(method, part, labels[part], w, seed)) for part in parts])


# ----------------------------------------------------------------------------------------------------------------------
# Command line: samples, edits, the trajectory


def parse(argv):
    parser = argparse.ArgumentParser(description="Draw samples from a trained run.")
    add, on_off = parser.add_argument, argparse.BooleanOptionalAction
    add("run", nargs="?", default="runs/reverse-toy", help="run folder (default: runs/reverse-toy)")
    add("--method", choices=METHODS, action="append", help="repeatable; default: all of the run's")
    add("--n", type=int, default=20, help="number of samples, or of an edit's variants (default: 20)")
    add("--classes", help="names, with commas, drawn in turn; none: no class, of which G knows the mean (default: all)")
    add("--guidance", type=float, nargs="+", metavar="W", help="scales (default: 0, of BiFlow also w_max/4 and w_max)")
    add("--seed", type=int, default=0, help="of z (default: 0)")
    add("--batch", type=int, default=256, help="samples at a time (default: 256)")
    add("--out", type=Path, help="the PNG to write (default: RUN/samples.png, edit.png or trajectory.png)")
    add("--npz", type=Path, help="also write uint8 images (arr_0, NHWC) and labels (arr_1) of the last row")
    add("--edit", metavar="IMAGE", help="an image to its noise and back, with --from, --to and --mask")
    add("--from", dest="source", metavar="CLASS", default="none", help="the image's class, by name (default: none)")
    add("--to", metavar="CLASS", help="the class to edit it to, by name")
    add("--mask", metavar="IMAGE", help="white where the image is to be redrawn")
    add("--trajectory", action="store_true", help="the states of the flow and of its learned inverse")
    add("--compile", action=on_off, default=False, help="torch.compile, for thousands of samples (default: off)")
    add("--bf16", action=on_off, help="bfloat16 autocast (default: on CUDA)")
    args = parser.parse_args(argv)
    if min(args.n, args.batch) < 1 or args.seed < 0:
        fail("--n and --batch must be at least 1, --seed at least 0")
    if WORLD > 1:
        fail("sampling takes one process; leave out torchrun (fid.py takes several)")
    if bool(args.edit) + args.trajectory + bool(args.npz or args.classes) > 1:
        fail("give --edit, or --trajectory, or --npz and --classes")
    if (args.to or args.mask or args.source != "none") and not args.edit:
        fail("--from, --to and --mask belong to --edit IMAGE")
    return args


def main(argv=None):
    args = parse(argv)
    mode = "edit" if args.edit else "trajectory" if args.trajectory else "samples"
    out = args.out or Path(args.run) / f"{mode}.png"
    device = setup(args)
    sampler = Sampler.load(args.run, device, args)
    check_output(out, ".png")
    check_output(args.npz, ".npz")
    if args.edit:
        rows = edit(sampler, args)
    elif args.trajectory:
        sampler.check("biflow", 0.0)
        real = load_real(args.run)
        rows = trajectory(sampler, real["x"][:10].to(device), real["y"][:10].to(device), args.seed)
    else:
        rows = samples(sampler, args)
    save_grid(out, rows)
    print(f"wrote {out}")


def samples(sampler, args):
    """Real images of the classes drawn, then each method at each guidance scale; the last row also goes to --npz."""
    chosen = range(sampler.config.num_classes)
    if args.classes:
        whole = args.classes in sampler.run["classes"]  # a name may have a comma
        names = [args.classes] if whole else args.classes.split(",")
        chosen = [label_of(name, sampler.run["classes"]) for name in names]
    labels = labels_in_turn(range(args.n), chosen)
    draws = [(method, w) for method in args.method or sampler.methods for w in args.guidance or [0.0]]
    if "biflow" in sampler.methods and len(chosen) and not (args.method or args.guidance):
        w_max = sampler.reverse.config.w_max
        draws += [("biflow", w) for w in (w_max / 4, w_max) if w > 0]
    for method, w in draws:
        sampler.check(method, w)

    rows = {}
    if sampler.run["step"]:  # an imported flow has no held-out images
        real = load_real(args.run)
        shown = real["x"][torch.isin(real["y"], labels)]
        if len(shown):
            rows["real"] = sampler.decode(shown.to(sampler.device))
    for method, w in draws:
        images = sampler.draw(method, labels, w, args.seed, args.batch)
        rows[f"{method} w={w:g}" if w else method] = images[:20] / 127.5 - 1
    if args.npz:
        np.savez(args.npz, arr_0=images.permute(0, 2, 3, 1).numpy(), arr_1=labels.numpy())
    return rows


def edit(sampler, args):
    """An image to its noise z with its own class, and back: as it is; to another class (--to); or with new noise where
    --mask is white, z' = M z + (1 - M) eps. No training is needed, since data and noise are paired."""
    run, config, device, n = sampler.run, sampler.config, sampler.device, min(args.n, 20)
    names = [args.source, args.to] if args.to else [args.source]
    labels = [torch.full((n,), label_of(name, run["classes"]), device=device) for name in names]
    method = args.method[0] if args.method else sampler.methods[-1]
    w = args.guidance[0] if args.guidance else 0.0
    sampler.check(method, w)
    x = load_image(args.edit, run["img_size"]).to(device)
    if run["vae"]:
        vae = load_vae(run["vae"], device, run["mean"], run["std"])
        x = (vae.encode(x)[:, 0] - vae.mean) / vae.std
    elif config.channels == 1:
        x = x.mean(1, keepdim=True)
    z = sampler.encode(x.expand(n, -1, -1, -1), labels[0], args.seed)[-1]
    rows = {"input": sampler.decode(x)}
    if args.mask:
        mask = load_image(args.mask, run["img_size"], under="black")[:, :1].to(device) > 0
        if not mask.any():
            fail(f"{args.mask} has no white, where the image would be redrawn")
        redraw = nnf.adaptive_max_pool2d(mask.float(), config.img_size // config.patch_size).view(1, -1, 1)
        z = torch.where(redraw > 0, sampler.noise(range(n), args.seed), z[:1])
        rows["masked"] = torch.where(mask, 1.0, rows["input"])
    for name, y in zip(names, labels):
        rows[f"as {name}"] = sampler.decode(sampler(method, z, y, w))
    return rows


def load_image(file, size, under="white"):
    """An image file -> (1, 3, size, size) in [-1, 1]."""
    try:
        return torch.tensor(read_image(file, size, under))[None] / 127.5 - 1
    except Exception as error:  # Pillow raises many kinds
        fail(f"cannot read {file} ({error})")


def trajectory(sampler, x, y, seed):
    """The states of the flow down to z, and what G's heads predict of them on the way back, each divided by its RMS."""
    states = sampler.encode(x, y, seed)
    with torch.no_grad(), autocast(sampler.device, sampler.bf16):
        x_prime, predictions = sampler.reverse(states[-1], y, 0.0)
    rows = {f"flow: x^{i}": state for i, state in enumerate(states[:-1])} | {"z": states[-1]}
    rows |= {f"reverse: x^{i}": state for i, state in predictions.items()}
    for name, state in rows.items():
        image = 0.4 * unpatchify(rms_normalize(state.float()), sampler.config.patch_size)
        rows[name] = image[:, :3] if image.shape[1] >= 3 else image[:, :1]
    return {"x": sampler.decode(x)} | rows | {"x' = G(z)": sampler.decode(x_prime)}


if __name__ == "__main__":
    run_script(main)
