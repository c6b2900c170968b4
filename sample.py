"""Use trained models: samples and edited images. biflow.py and this file are all that sampling needs.

python sample.py                                          # runs/reverse-toy: real | exact inverse | BiFlow
python sample.py RUN --method biflow --n 50000 --guidance 1 --npz samples.npz
python sample.py RUN --edit IMAGE --from 3 --to 8         # class editing; with --mask M.png: inpainting
"""

import contextlib
import hashlib
import itertools
import json
import os
import sys
import warnings
from argparse import ArgumentParser, BooleanOptionalAction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as nnf
from PIL import Image, ImageDraw, ImageOps
from tqdm import tqdm

from biflow import BiFlow, TARFlow, autocast, freeze, rms_normalize, unpatchify

METHODS = ("biflow", "biflow-2nfe", "biflow+score", "exact", "exact+score", "jacobi")
TORCHRUN = os.environ if dist.is_torchelastic_launched() else {}  # without it RANK and WORLD_SIZE are not meant for us
RANK = int(TORCHRUN.get("RANK", 0))
WORLD = int(TORCHRUN.get("WORLD_SIZE", 1))
Image.MAX_IMAGE_PIXELS = None  # Pillow would call a photograph of 180 megapixels an attack

# ----------------------------------------------------------------------------------------------------------------------
# Samples, edits, the trajectory. Each is {label: images}, the rows of a picture


def samples(sampler, args):
    """Real images, then each method at each scale, all of the same labels; the last row also goes to --npz."""
    classes = range(sampler.config.num_classes)
    if args.classes:
        classes = [label_of(name, sampler.run["classes"]) for name in args.classes.split(",")]
    labels = in_turn(args.n, classes)
    draws = [(method, w) for method in args.method or sampler.methods for w in args.guidance]
    for method, w in draws:
        sampler.check(method, w)
    rows = {}
    if (args.run / "real.pt").exists():  # not of an imported flow
        real = torch.load(args.run / "real.pt", weights_only=True)
        of_label = {int(y): itertools.cycle(real["x"][real["y"] == y]) for y in real["y"].unique()}
        shown = labels[:20].tolist()
        if set(shown) <= of_label.keys():  # each label has a held-out image
            rows["real"] = sampler.decode(torch.stack([next(of_label[y]) for y in shown]).to(sampler.device))
    for method, w in draws:
        row = f"{method} w={w:g}" if w else method
        images = torch.cat([to_uint8(x) for x in sampler.draw(method, labels, w, args.seed, args.batch)])
        rows[row] = images[:20] / 127.5 - 1
    if args.npz:
        with open(args.npz, "wb") as file:
            np.savez(file, arr_0=images.permute(0, 2, 3, 1).numpy(), arr_1=labels.numpy())
        print(f"wrote {args.npz}: {len(images)} images of {row}, seed {args.seed}")
    return rows


def edit(sampler, args):
    """An image to its noise z with its own class, and back: as it is; to another class (--to); or with new noise where
    --mask is white, z' = M z + (1 - M) eps. No training is needed, since data and noise are paired."""
    n = min(args.n, 20)
    names = [args.source, args.to] if args.to else [args.source]
    labels = [torch.full((n,), label_of(name, sampler.run["classes"]), device=sampler.device) for name in names]
    method = args.method[0] if args.method else sampler.methods[-1]
    w = args.guidance[0]
    sampler.check(method, w)
    x = sampler.vae.encode(load_image(args.edit, sampler.run["img_size"]).to(sampler.device))
    if sampler.config.channels == 1:
        x = x.mean(1, keepdim=True)
    z = sampler.encode(x.expand(n, -1, -1, -1), labels[0], args.seed)[-1]
    rows = {"input": sampler.decode(x)}
    if args.mask:
        mask = load_image(args.mask, sampler.run["img_size"], under="black")[:, :1].to(sampler.device) > 0
        if not mask.any():
            fail(f"{args.mask} has no white, where the image would be redrawn")
        side = sampler.config.img_size // sampler.config.patch_size  # in tokens, of which a white pixel redraws all
        redraw = nnf.adaptive_max_pool2d(mask.float(), side).view(1, -1, 1)
        eps = sample_noise(args.seed, range(n), sampler.config).to(sampler.device)
        z = torch.where(redraw > 0, eps, z[:1])
        rows["masked"] = torch.where(mask, 1.0, rows["input"])
    for name, y in zip(names, labels):
        rows[f"as {name}"] = sampler.decode(sampler(method, z, y, w))
    return rows


def trajectory(sampler, args):
    """The states of the flow down to z, and what G's heads predict of them on the way back, each divided by its RMS."""
    sampler.check("biflow", 0.0)
    real = torch.load(args.run / "real.pt", weights_only=True)
    x, y = real["x"][:10].to(sampler.device), real["y"][:10].to(sampler.device)
    states = sampler.encode(x, y, args.seed)
    with torch.no_grad(), autocast(sampler.device, sampler.bf16):
        x_prime, predictions = sampler.reverse(states[-1], y, 0.0)
    tokens = {f"flow: x^{i}": state for i, state in enumerate(states[:-1])}
    tokens["z"] = states[-1]
    tokens |= {f"reverse: x^{i}": state for i, state in predictions.items()}
    rows = {"x": sampler.decode(x)}
    for name, state in tokens.items():
        rows[name] = 0.4 * unpatchify(rms_normalize(state.float()), sampler.config.patch_size)
    rows["x' = G(z)"] = sampler.decode(x_prime)
    return rows


def main(argv=None):
    args = parse(argv)
    device = setup(args)
    rows_of = samples
    if args.edit:
        rows_of = edit
    if args.trajectory:
        rows_of = trajectory
    out = args.out or args.run / f"{rows_of.__name__}.png"
    others = (args.to, args.mask) if rows_of is samples else (args.npz, args.classes)
    if any(others) or (args.edit and args.trajectory) or out in (args.edit, args.mask, args.npz):
        fail("--npz and --classes are for samples, --to and --mask for --edit alone, and --out is another file")
    sampler = Sampler.load(args.run, device, args)
    can_write(out, args.npz)
    save_grid(out, rows_of(sampler, args))
    print(f"wrote {out}")


def parse(argv):
    parser = ArgumentParser(description="Draw samples from a trained run.")
    add = parser.add_argument
    add("run", nargs="?", type=Path, default="runs/reverse-toy", help="run folder (%(default)s)")
    add("--method", choices=METHODS, action="append", help="repeatable (all of the run's)")
    add("--n", type=int, default=20, help="number of samples, or of an edit's variants (%(default)s)")
    add("--classes", help="names, with commas, drawn in turn; none: no class, of which G knows the mean (all)")
    add("--guidance", type=float, nargs="+", default=[0.0], metavar="W", help="scales (0)")
    add("--seed", type=int, default=0, help="of z (%(default)s)")
    add("--batch", type=int, default=256, help="samples at a time (%(default)s)")
    add("--out", type=Path, help="the PNG to write (RUN/samples.png, edit.png or trajectory.png)")
    add("--npz", type=Path, help="also write uint8 images (arr_0, NHWC) and labels (arr_1) of the last row")
    add("--edit", type=Path, metavar="IMAGE", help="an image to its noise and back, with --from, --to and --mask")
    add("--from", dest="source", metavar="CLASS", default="none", help="the image's class, by name (%(default)s)")
    add("--to", metavar="CLASS", help="the class to edit it to, by name")
    add("--mask", type=Path, metavar="IMAGE", help="white where the image is to be redrawn")
    add("--trajectory", action="store_true", help="the states of the flow and of its learned inverse")
    add("--compile", action=BooleanOptionalAction, default=False, help="torch.compile, for thousands of samples (off)")
    add("--bf16", action=BooleanOptionalAction, help="bfloat16 autocast (on CUDA)")
    return flags(parser, argv, ("n", "batch"))


# ----------------------------------------------------------------------------------------------------------------------
# The sampler

EVAL, SAMPLE = 1, 2  # streams of randomness; train_forward.py has those of training, and EVAL again


def sample_noise(seed, indices, config, stream=SAMPLE):
    """z (N, T, D). Sample i depends only on seed, stream and i."""
    z = torch.empty(len(indices), config.tokens, config.dim)
    for tokens, i in zip(z.numpy(), indices):
        np.random.default_rng((seed, stream, int(i))).standard_normal(dtype=np.float32, out=tokens)
    return z


def in_turn(n, labels):
    """n labels, each of the given ones in turn; -1 ("no class") where there are none."""
    return torch.tensor([labels[i % len(labels)] for i in range(n)] if labels else [-1] * n)


def label_of(name, classes):
    """The label of a class, by its name; -1 for "none"."""
    if name not in (*classes, "none"):
        fail(f"there is no class {name!r}; the classes are {classes[:20]}")
    return classes.index(name) if name in classes else -1


class Sampler:
    """A flow F and, of a reverse run, its learned inverse G; draws by each method. G alone draws in one pass."""

    def __init__(self, flow, reverse, run, device, args):
        self.flow = flow
        self.reverse = reverse
        self.run = run
        self.device = device
        self.bf16 = args.bf16
        self.config = (reverse or flow).config
        for model in filter(None, (flow, reverse)):
            freeze(model, device, args.bf16, args.compile)
        self.vae = load_vae(run, device)  # in float32, for comparable FIDs

    @classmethod
    def load(cls, folder, device, args):
        """From the folder of a forward or reverse run."""
        if WORLD > 1:
            fail("sampling runs on one process; start this script without torchrun")
        model, run = load_run(folder)
        if run["stage"] == "forward":
            return cls(model, None, run, device, args)
        flow = None
        path = Path(folder).resolve() / run["forward"]
        if path.exists():
            flow, forward_run = load_run(path, "forward")
            if forward_run["weights_hash"] != run["forward_hash"]:
                print(f"warning: {path} is not the flow that {folder} was learned from; was it trained again?")
        return cls(flow, model, run, device, args)

    @property
    def methods(self):
        """Those to compare by default. A G without denoise block is also shown with a score step of F."""
        exact = ["exact", "exact+score"] if self.flow is not None else []
        learned = ["biflow"] if self.reverse is not None else []
        score = ["biflow+score"] if exact and learned and self.config.denoise == "none" else []
        return exact + learned + score

    def check(self, method, w):
        """End with one line where the run cannot be sampled like this."""
        if method.startswith("biflow") and self.reverse is None:
            fail("this is a forward run; give a reverse run, or --method exact")
        if self.flow is None and method not in ("biflow", "biflow-2nfe"):
            fail(f"this needs the flow F, which is not at {self.run['forward']}; sampling by --method biflow does not")
        w_max = self.config.w_max if method in ("biflow", "biflow+score") else float("inf")
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

    def encode(self, x, y, seed):
        """What the models see (N, C, H, W), y (N,) -> the flow's states [x^0, ..., z], with noise as in training."""
        self.check("exact", 0.0)  # it takes F, too
        eps = unpatchify(sample_noise(seed, range(len(x)), self.config, EVAL), self.config.patch_size)
        with torch.no_grad(), autocast(self.device, self.bf16):
            states, _ = self.flow(x + self.run["sigma"] * eps.to(self.device), y)
        return states

    def decode(self, x):
        """What the models see (N, C, H, W) -> images in about [-1, 1]; 32 at a time, since a VAE takes much memory."""
        with torch.no_grad():
            return torch.cat([self.vae.decode(part) for part in x.split(32)])

    def draw(self, method, labels, w=0.0, seed=0, batch=256):
        """Images in [-1, 1], one for each of the labels (n,), in batches."""
        for indices in torch.arange(len(labels)).split(batch):
            z = sample_noise(seed, indices, self.config).to(self.device)
            x = self.decode(self(method, z, labels[indices].to(self.device), w))
            if not x.isfinite().all():  # they would become black pixels
                fail(f"{method} at w = {w:g} gives images that are not finite")
            yield x


# ----------------------------------------------------------------------------------------------------------------------
# Run folders, the VAE that a run's latents are of, pictures


def load_run(folder, stage=None):
    """The model of a run folder, and its run.json with the SHA-256 of the weights, by which stage 2 knows its flow."""
    folder = Path(folder)
    if not (folder / "run.json").is_file():
        fail(f"{folder} is not a trained run; make one with: python train_{stage or 'reverse'}.py --out {folder}")
    with or_fail(f"cannot load the run {folder}; look at its run.json, config.json and model.safetensors"):
        run = json.loads((folder / "run.json").read_text())
        if stage and run["stage"] != stage:
            fail(f"{folder} is a {run['stage']} run; give the folder of a {stage} run")
        model = {"forward": TARFlow, "reverse": BiFlow}[run["stage"]].from_pretrained(folder)
        run["weights_hash"] = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    return model, run


class VAE:
    """Images <-> latents, by a diffusers AutoencoderKL. mean, std: of each channel of its latents."""

    def __init__(self, net, device, mean=0.0, std=1.0):
        net.eval().requires_grad_(False).to(device).to(memory_format=torch.channels_last)
        self.net = net
        self.mean = torch.tensor(mean, device=device)
        self.std = torch.tensor(std, device=device)

    @torch.no_grad()
    def encode(self, images):
        """Images (N, 3, H, W) in [-1, 1] -> the mean of their latents (N, C, h, w), normalised."""
        return (self.net.encode(images).latent_dist.mean - self.mean) / self.std

    def decode(self, x):
        """Normalised latents (N, C, h, w) -> images (N, 3, H, W) in about [-1, 1]. Differentiable."""
        with torch.autocast(x.device.type, enabled=False):  # it would keep group_norm's activations in float32
            latents = x * self.std + self.mean
            return self.net.decode(latents.to(self.net.dtype)).sample.float()


def load_vae(run, device, bf16=False):
    """The VAE of a run's latents, by the name or folder of a diffusers AutoencoderKL. Of pixels it is the identity."""
    if run["vae"] is None:
        return SimpleNamespace(encode=torch.nn.Identity(), decode=torch.nn.Identity())
    from diffusers import AutoencoderKL

    dtype = torch.bfloat16 if bf16 else torch.float32
    with or_fail(f"cannot load the VAE {run['vae']}; it must be a folder of diffusers' or on the Hub; see run.json"):
        options = dict(torch_dtype=dtype, low_cpu_mem_usage=False, output_loading_info=True)
        net, info = AutoencoderKL.from_pretrained(run["vae"], **options)
        if info["missing_keys"]:  # which would stay at random
            raise ValueError(f"it lacks {len(info['missing_keys'])} weights of an AutoencoderKL")
    return VAE(net, device, run.get("mean", 0.0), run.get("std", 1.0))


def load_image(file, size, under="white"):
    """An image file -> (1, 3, size, size) in [-1, 1]."""
    with or_fail(f"cannot read {file}"):
        return torch.tensor(read_image(file, size, under))[None] / 127.5 - 1


def read_image(file, size, under="white"):
    """A file -> uint8 (3, size, size), with EXIF rotation, 16-bit grey scaled down, and a colour under transparency."""
    image = ImageOps.exif_transpose(Image.open(file))
    if image.mode[0] in "IF":
        levels = np.asarray(image, np.uint32)
        if levels.max() < 4096:
            warnings.warn("images of floats or of 12 bits in 16 come out dark; scale them to all of 16 bits")
        image = Image.fromarray((levels >> 8).clip(0, 255).astype(np.uint8))
    image = Image.alpha_composite(Image.new("RGBA", image.size, under), image.convert("RGBA"))
    return center_crop(image.convert("RGB"), size)


def center_crop(image, size):
    """PIL image -> uint8 (3, size, size), by ADM's centre crop: halve it while it is large, scale, cut the middle."""
    longest = 8 * min(image.size)  # a strip that is longer would take gigabytes when it is scaled
    image = cut_middle(image, min(image.width, longest), min(image.height, longest))
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.BICUBIC)
    return np.asarray(cut_middle(image, size, size)).transpose(2, 0, 1)


def cut_middle(image, width, height):
    left = (image.width - width) // 2
    top = (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def to_uint8(x):
    """Images in [-1, 1] -> uint8 on the CPU, to the nearest of 256 levels."""
    return (x.float() * 127.5 + 127.5).round().clamp(0, 255).byte().cpu()


def save_grid(path, rows):
    """{label: images (n, C, H, W) in [-1, 1]} as one PNG, a labelled row for each; small images are enlarged."""
    cell = max(40, next(iter(rows.values())).shape[-1])
    left = 8 + 7 * max(map(len, rows))
    right = left + (cell + 2) * max(map(len, rows.values()))
    canvas = Image.new("RGB", (right, (cell + 2) * len(rows)), "white")
    for r, (label, images) in enumerate(rows.items()):
        top = r * (cell + 2)
        text = label.encode(errors="replace").decode()  # file names may be no text
        ImageDraw.Draw(canvas).text((4, top + cell // 2 - 6), text, fill="black")
        for c, image in enumerate(to_uint8(images[:, :3]).expand(-1, 3, -1, -1)):  # of latents the first channels
            tile = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((cell, cell), Image.NEAREST)
            canvas.paste(tile, (left + c * (cell + 2), top))
    canvas.save(path, "PNG")


# ----------------------------------------------------------------------------------------------------------------------
# Device, flags, ends in one line


def setup(args):
    """Choose the device, and precision and compilation where no flag does. Both are on where CUDA supports them."""
    device = torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(TORCHRUN.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = False  # for comparable FIDs; what is heavy runs in bf16
        torch.backends.cuda.enable_cudnn_sdp(False)  # it would plan anew for each length of the exact inverse's cache
    if args.bf16 is None:
        args.bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if args.compile is None:
        args.compile = device.type == "cuda"
    if args.compile:
        try:
            torch.compile(torch.square)(torch.ones(1, device=device))
        except Exception as error:  # no C++ compiler, no Triton
            print(f"going on as with --no-compile: torch.compile fails here ({repr(error)[:200]})")
            args.compile = False
    return device


def flags(parser, argv, positive):
    """The flags, none of which is negative, and those named positive are at least 1. The ~ of --out=~/runs expands."""
    parser.error = fail
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        if isinstance(value, Path):
            setattr(args, name, value.expanduser())
        elif isinstance(value, int | float) and not value >= (1 if name in positive else 0):  # so that nan is refused
            fail(f"--{name.replace('_', '-')} {value} is too small")
    return args


def can_write(*paths):
    """End with one line, before the work, if a file cannot be written."""
    for path in filter(None, paths):
        open(path, "ab").close()
        if path.is_file() and not path.is_symlink() and path.stat().st_size == 0:  # /dev/null is no file
            path.unlink()


def fail(message, status=2):
    """End with one line, for mistakes that a user can put right."""
    tqdm.write("error: " + " ".join(str(message).split())[:1000], file=sys.stderr)  # names of weights can be many
    raise SystemExit(status)


@contextlib.contextmanager
def or_fail(message):
    """End with one line whatever goes wrong inside: Pillow, torch, zipfile and the Hub raise many kinds of errors."""
    try:
        yield
    except Exception as error:
        fail(f"{message} ({type(error).__name__}: {error})")


def run_script(main):
    """Run a script. What a user can mend ends it with one line, and main may return another exit status."""
    with contextlib.suppress(AttributeError):
        sys.stdout.reconfigure(errors="backslashreplace")  # for names that the console cannot show
    try:
        status = main()
    except KeyboardInterrupt:
        fail("stopped by Ctrl-C", 130)
    except torch.OutOfMemoryError:
        fail("out of memory; give a smaller --micro-batch (training) or --batch (sampling)")
    except OSError as error:  # such as a full disk
        fail(f"cannot read or write {error.filename or 'a file'}: {error.strerror or error}")
    if dist.is_initialized():  # left open, it could abort Python's exit
        dist.barrier()
        dist.destroy_process_group()
    if status:
        sys.exit(status)


if __name__ == "__main__":
    run_script(main)
