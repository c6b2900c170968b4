"""Samples, grids, edited images, and what they cost.

python sample.py                                  # runs/reverse-toy -> a grid: real | exact inverse | BiFlow
python sample.py RUN --method biflow --n 50000 --guidance 1 --npz samples.npz
python sample.py RUN --class-edit IMAGE --from 3 --to 8        # also --inpaint, --reconstruct, --interpolate
python sample.py --benchmark --size B             # the speed table, with random weights
"""

import argparse
import functools
import json
import math
import re
import statistics
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from biflow import SIZES, BiFlow, TARFlow, rms_normalize, unpatchify
from train_forward import EVAL, VAE, Data, Processes, autocast, count_flops, data_of, fail, freeze, load_data
from train_forward import load_decoder, load_run, number, peak_memory, read_image, read_metrics, reset_peak_memory
from train_forward import sample_noise, sample_rng, save_grid, script, start_processes, to_uint8

METHODS = ("biflow", "biflow-2nfe", "biflow+score", "exact", "exact+score")


class Sampler:
    """A flow F, and its learned inverse G if there is one, and how each method draws from them.

    A sample depends on the seed, its class and its own index, not on batch size or number of processes.
    """

    def __init__(self, flow: TARFlow, reverse: BiFlow | None, run: dict, folder: Path, processes: Processes, args=None):
        self.flow, self.reverse, self.run, self.folder = flow, reverse, run, folder
        self.device, self.config = processes.device, flow.config
        self.bf16, compiled = (getattr(args, name, self.device.type == "cuda") for name in ("bf16", "compile"))
        freeze(flow, self.device, self.bf16, compiled)
        if reverse is not None:
            freeze(reverse, self.device, self.bf16, compiled)
        if compiled:
            for block in flow.blocks:
                block.step = torch.compile(block.step, dynamic=True)

    @classmethod
    def load(cls, folder: str | Path, processes: Processes, args=None) -> "Sampler":
        """Of a run folder; a reverse run knows its forward run."""
        model, run = load_run(folder)
        if run["stage"] == "forward":
            return cls(model, None, run, Path(folder), processes, args)
        return cls(load_run(Path(folder) / run["forward"], "forward")[0], model, run, Path(folder), processes, args)

    @functools.cached_property
    def decoder(self):
        return load_decoder(self.run, self.device)

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        """What the models see (N, C, H, W) -> images (N, c, S, S) in about [-1, 1]."""
        with torch.no_grad(), autocast(self.device, self.bf16):
            return self.decoder(x)

    @property
    def methods(self) -> list[str]:
        """What can be compared: with G's own denoising where it has it, else with a score step of F."""
        if self.reverse is None:
            return ["exact", "exact+score"]
        return ["exact", "exact+score", "biflow"] + ["biflow+score"] * (self.reverse.config.denoise == "none")

    def check(self, method: str, w: float):
        if method.startswith("biflow"):
            if self.reverse is None:
                fail(f"{self.folder} is a forward run; give a reverse run, or --method exact")
            if method != "biflow-2nfe" and not 0 <= w <= self.reverse.config.w_max:
                fail(f"guidance {w:g} is outside [0, {self.reverse.config.w_max:g}], which {self.folder} was trained for")
        if not (math.isfinite(w) and w >= 0):
            fail(f"guidance must be a number of 0 or more, not {w:g}")

    def __call__(self, method: str, z: torch.Tensor, y: torch.Tensor, w: float = 0.0) -> torch.Tensor:
        """z (N, T, D), y (N,) -> what the models see, (N, C, H, W)."""
        with torch.no_grad(), autocast(self.device, self.bf16):
            if method == "biflow-2nfe":
                return self.reverse.sample_two_pass(z, y, w)
            base = self.reverse.sample(z, y, w) if method.startswith("biflow") else self.flow.inverse(z, y, w)
            return self.flow.denoise(base, y, self.run["sigma"]) if method.endswith("+score") else base

    def encode(self, x: torch.Tensor, y: torch.Tensor, seed: int) -> list[torch.Tensor]:
        """The flow's states [x^0, ..., z], each (N, T, D), of what the models see (N, C, H, W), with labels y (N,), and with
        the noise that F was trained with."""
        eps = np.stack([sample_rng(seed, EVAL, i).standard_normal(x.shape[1:], np.float32) for i in range(len(x))])
        with torch.no_grad(), autocast(self.device, self.bf16):
            return self.flow(x + self.run["sigma"] * torch.from_numpy(eps).to(self.device), y)[0]

    def draw(self, method: str, z: torch.Tensor, y: torch.Tensor, w: float = 0.0) -> torch.Tensor:
        """z (N, T, D), y (N,) -> images (N, c, S, S) in about [-1, 1]."""
        return self.decode(self(method, z, y, w))

    def images(self, method: str, indices, y, w: float = 0.0, seed: int = 0, temperature: float = 1.0) -> torch.Tensor:
        """The images with these indices and labels y (N,), of z with the temperature as its standard deviation."""
        z = temperature * sample_noise(seed, indices, self.config)
        return self.draw(method, z.to(self.device), y.to(self.device), w)


def row_name(method: str, w: float, temperature: float, with_zero: bool = False) -> str:
    """A method and how it draws, where that is not the default: w above 0 (or also w = 0), a temperature other than 1."""
    return method + (f" w={w:g}" if w or with_zero else "") + (f" t={temperature:g}" if temperature != 1 else "")


def balanced_labels(indices, classes: range | list[int]) -> torch.Tensor:
    """Label of each index: the classes in turn, so that every class is drawn equally often; -1 where there is none."""
    return torch.tensor([classes[i % len(classes)] for i in indices] if classes else [-1] * len(indices))


def milliseconds(f, device: torch.device, repeats: int = 5) -> float:
    """Median time of f() in ms, after a warm-up call, the device synchronised."""
    wait = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device.type, lambda: None)
    times = []
    for _ in range(repeats + 1):
        wait()
        start = time.perf_counter()
        f()
        wait()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times[1:])


def workload(sampler: Sampler, method: str, n: int, w: float = 0.0):
    """A function without arguments that draws n samples by a method, undecoded, or decodes n ("VAE decode")."""
    z = sample_noise(0, range(n), sampler.config).to(sampler.device)
    y = balanced_labels(range(n), range(sampler.config.num_classes)).to(sampler.device)
    if method == "VAE decode":
        return functools.partial(sampler.decode, unpatchify(z, sampler.config.patch_size))
    return functools.partial(sampler, method, z, y, w)


def cost_table(sampler: Sampler, methods: list[str], batch: int) -> dict[str, tuple[float, float]]:
    """Method -> ms per image at batch 1 and at the full batch, without guidance, decoding not included."""
    return {m: tuple(milliseconds(workload(sampler, m, n), sampler.device) / n for n in (1, batch)) for m in methods}


# ----------------------------------------------------------------------------------------------------------------------
# The speed table

# The VAE of the paper's latents, sd-vae-ft-mse, for its cost alone
SD_VAE = dict(block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, sample_size=256)
SD_VAE.update(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)


def random_sampler(size: str, processes: Processes, args) -> Sampler:
    """Networks of a size with random weights, which cost what trained ones do; and SD's VAE for sizes other than toy."""
    config, run = SIZES[size], dict(stage="reverse", sigma=0.3, vae=None)
    sampler = Sampler(TARFlow(config), BiFlow(config), run, Path(f"random-{size}"), processes, args)
    if size != "toy":
        from diffusers import AutoencoderKL

        vae = AutoencoderKL(**SD_VAE).to(processes.device).eval().requires_grad_(False)
        sampler.run["vae"], sampler.decoder = "random", lambda x: vae.decode(x).sample
    return sampler


def speed_table(sampler: Sampler, batch: int, w: float, repeats: int) -> list[dict]:
    """A row for each way to sample, and for the VAE: parameters, FLOPs, steps, and ms per image and memory at batch 1 and
    `batch`. "layers" counts the Transformer layers evaluated one after another: they make the latency."""
    flow, reverse, config, device = sampler.flow, sampler.reverse, sampler.config, sampler.device
    T, F_layers = config.tokens, config.blocks * config.layers
    inverse_layers = (T - 1) * F_layers
    guided = " x 2" if w else ""
    rows = []
    if reverse is not None:
        G_layers = len(reverse.blocks) * reverse.config.layers
        rows += [("biflow", reverse, "1", G_layers), ("biflow-2nfe", reverse, "2", G_layers)]
    rows += [("exact", flow, f"{T}{guided}", inverse_layers)]
    rows += [("exact+score", flow, f"{T}{guided} + 1", inverse_layers + 2 * F_layers)]
    table = []
    for method, net, nfe, layers in rows + [("VAE decode", None, "", "")] * bool(sampler.run["vae"]):
        row = dict(method=method, nfe=nfe, layers=layers, gflops=count_flops(workload(sampler, method, 1, w)) / 1e9)
        if net is not None:
            row["params_M"] = sum(p.numel() for p in net.parameters()) / 1e6
        for n in (1, batch):
            f = workload(sampler, method, n, w)
            reset_peak_memory(device)
            row[f"ms_{n}"] = milliseconds(f, device, repeats) / n
            row[f"gib_{n}"] = peak_memory(device)
        table.append(row)
    for row in table:
        row |= {f"ratio_{n}": row[f"ms_{n}"] / table[0][f"ms_{n}"] for n in (1, batch)}
    return table


def print_speed_table(table: list[dict], batch: int):
    print(f"{'':14}{'params M':>9}{'GFLOPs':>9}{'NFE':>9}{'layers':>8}", end="")
    print("".join(f"{f'ms, batch {n}':>15}{'ratio':>8}{'GiB':>6}" for n in dict.fromkeys((1, batch))))
    for row in table:
        params = f"{row['params_M']:.1f}" if "params_M" in row else ""
        print(f"{row['method']:14}{params:>9}{row['gflops']:9.3g}{row['nfe']:>9}{row['layers']:>8}", end="")
        parts = ((row[f"ms_{n}"], row[f"ratio_{n}"], row[f"gib_{n}"]) for n in dict.fromkeys((1, batch)))
        print("".join(f"{ms:15.3f}{ratio:8.1f}{gib:6.2f}" for ms, ratio, gib in parts))


# ----------------------------------------------------------------------------------------------------------------------
# Pictures. Each gives the rows of a grid: (label, images (n, C, S, S) in [-1, 1])


def held_out(sampler: Sampler, labels: torch.Tensor) -> torch.Tensor | None:
    """One held-out image for each label as the models see it, or None where the data are not at hand."""
    source, processes = data_of(sampler.run), Processes(sampler.device)
    if source != "digits" and source != sampler.run["cache"]:
        return None
    data: Data = load_data(source, None, None, sampler.folder.parent, processes, 0)
    used, chosen = set(), []
    for label in labels.tolist():
        of_class = [i for i in data.test if data.labels[i] == label or label < 0] or list(data.test)
        i = next((i for i in of_class if i not in used), of_class[0])
        used.add(i)
        chosen.append(i)
    x = np.stack([data.get(i, False, sample_rng(0, EVAL, int(i))) for i in chosen])
    return torch.from_numpy(x).to(sampler.device)


def open_pixels(sampler: Sampler, path: str) -> torch.Tensor:
    """An image file -> uint8 (3, S, S), of the size of the run's images."""
    try:
        return torch.from_numpy(read_image(Path(path).expanduser(), sampler.run["img_size"]).copy())
    except ValueError as error:
        fail(error)


def open_image(sampler: Sampler, path: str, n: int) -> torch.Tensor:
    """An image file -> n copies of what the models see, (n, C, H, W), through the VAE (the posterior's mean) if it has one."""
    x = open_pixels(sampler, path).to(sampler.device)[None] / 127.5 - 1
    if sampler.run["vae"]:
        vae = VAE(sampler.run["vae"], sampler.device, sampler.run["mean"], sampler.run["std"])
        x = (vae.encode(x)[:, 0] - vae.mean) / vae.std
    elif sampler.config.channels == 1:
        x = x.mean(1, keepdim=True)
    return x.expand(n, -1, -1, -1)


def reconstruct(sampler: Sampler, method: str, x, y, w: float, seed: int):
    """x -> z -> x', with other noise in each column."""
    return [("input", sampler.decode(x[:1])), (method, sampler.draw(method, sampler.encode(x, y, seed)[-1], y, w))]


def class_edit(sampler: Sampler, method: str, x, y, target, w: float, seed: int):
    """To z with the image's own class, back with another: what z holds beside the class stays."""
    z = sampler.encode(x, y, seed)[-1]
    rows = [("input", sampler.decode(x[:1])), ("own class", sampler.draw(method, z, y, w))]
    return rows + [("new class", sampler.draw(method, z, target, w))]


def inpaint(sampler: Sampler, method: str, x, y, mask, w: float, seed: int):
    """The noise of the known tokens stays, the others' is drawn anew, z' = M z + (1 - M) eps; then back in one pass.

    mask (S, S), True where the image is to be redrawn; a token is redrawn if a part of it is.
    """
    redraw = F.adaptive_max_pool2d(mask[None].float(), math.isqrt(sampler.config.tokens)).view(1, -1, 1).to(x.device)
    z = sampler.encode(x[:1], y[:1], seed)[-1]
    fresh = sample_noise(seed, range(len(x)), sampler.config).to(x.device)
    image = sampler.decode(x[:1])
    masked = torch.where(mask.to(x.device), 1.0, image)
    return [("input", image), ("masked", masked), ("result", sampler.draw(method, (1 - redraw) * z + redraw * fresh, y, w))]


def interpolate(sampler: Sampler, method: str, classes, n: int, w: float, seed: int):
    """From one z to another along the great circle between them, once for each class (ten at most)."""
    a, b = sample_noise(seed, range(2), sampler.config).to(sampler.device)
    angle = torch.acos((a * b).sum() / (a.norm() * b.norm()))
    t = torch.linspace(0, 1, n, device=a.device).view(-1, 1, 1)
    z = (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)
    return [
        (f"class {c}", sampler.draw(method, z, torch.full((n,), c, device=a.device), w)) for c in (classes or [-1])[:10]
    ]


def trajectory(sampler: Sampler, x, y, seed: int):
    """The states of the flow down to z, and what G's heads predict of them on the way back up to x'. The states are shown
    divided by their RMS, their first channel or the first three."""

    def show(state):
        image = 0.4 * unpatchify(rms_normalize(state.float()), sampler.config.patch_size)
        return image[:, : 3 if image.shape[1] >= 3 else 1]

    states = sampler.encode(x, y, seed)
    with torch.no_grad(), autocast(sampler.device, sampler.bf16):
        x_prime, predictions = sampler.reverse(states[-1], y, 0.0)
    rows = [("x", sampler.decode(x))] + [(f"flow: x^{i}", show(state)) for i, state in enumerate(states[:-1])]
    rows += [("z", show(states[-1]))] + [(f"reverse: x^{i}", show(state)) for i, state in predictions.items()]
    return rows + [("x' = G(z)", sampler.decode(x_prime))]


def save_curves(path: Path, lines: list[dict]):
    """The unweighted errors of metrics.jsonl, or else the loss, over the steps; a logarithmic axis where all are positive."""
    if not lines:
        fail("there are no curves yet: the run's metrics.jsonl is missing or empty")
    chosen = [k for k in dict.fromkeys(k for line in lines for k in line) if re.match(r"(val_)?(error_|nll)|loss$", k)]
    errors = [k for k in chosen if "error" in k] or chosen
    series = {k: [(line["step"], line[k]) for line in lines if k in line] for k in errors}
    values = [v for points in series.values() for _, v in points]
    scale = math.log10 if min(values) > 0 else lambda v: v
    low, high, last = scale(min(values)), scale(max(values)), max(line["step"] for line in lines)
    image = Image.new("RGB", (640, 300), "white")
    pen = ImageDraw.Draw(image)
    place = lambda step, v: (60 + 430 * step / last, 270 - 250 * (scale(v) - low) / max(high - low, 1e-9))
    pen.rectangle((60, 20, 490, 270), outline="grey")
    for v in (min(values), max(values)):
        pen.text((4, place(0, v)[1] - 6), f"{v:.3g}", fill="black")
    pen.text((60, 276), "0", fill="black")
    pen.text((460, 276), f"{last}", fill="black")
    for i, (name, points) in enumerate(series.items()):
        colour = f"hsl({360 * i // len(series)}, 80%, 40%)"
        pen.line([place(*point) for point in points], fill=colour, width=3 if name.startswith("val_") else 1)
        pen.text((500, 20 + 14 * i), name, fill=colour)
    image.save(path)


@script
def main(argv=None):
    parser = argparse.ArgumentParser(description="Draw samples from a trained run: a grid, their cost, or an .npz.")
    add, on_off = parser.add_argument, argparse.BooleanOptionalAction
    add("run", nargs="?", default="runs/reverse-toy", help="run folder (default: runs/reverse-toy)")
    add("--method", choices=METHODS, action="append", help="repeatable; default: all of the run's, compared")
    add("--n", type=number(int, 1), default=20, help="number of samples, or of an edit's variants (default: 20)")
    add("--classes", help="comma-separated labels, drawn in turn; none for unconditional (default: all)")
    add("--guidance", type=float, nargs="+", metavar="W", help="scales (default: for BiFlow 0 and two more in its range)")
    add("--temperature", type=number(float, 0), default=1.0, help="standard deviation of the samples' z (default: 1)")
    add("--seed", type=number(int, 0), default=0, help="(default: 0)")
    add("--batch", type=number(int, 1), default=256, help="samples at a time, the full batch of the times (default: 256)")
    add("--out", type=Path, help="the PNG to write (default: RUN/samples.png, or named after what was asked for)")
    add("--npz", type=Path, help="also write uint8 images (arr_0, NHWC) and labels (arr_1) of the last row, for fid.py")
    add("--compile", action=on_off, help="torch.compile (default: on CUDA)")
    add("--bf16", action=on_off, help="bfloat16 autocast (default: on CUDA)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--reconstruct", metavar="IMAGE", help="an image to z by F, and back")
    what.add_argument("--class-edit", metavar="IMAGE", help="to z with the class --from, back with the class --to")
    what.add_argument("--inpaint", metavar="IMAGE", help="redraw it where --mask is white; --from is its class")
    what.add_argument("--interpolate", action="store_true", help="from one z to another, for each class")
    what.add_argument("--trajectory", action="store_true", help="the states of the flow and of its learned inverse")
    what.add_argument("--curves", action="store_true", help="the run's errors over its steps, from metrics.jsonl")
    what.add_argument("--benchmark", action="store_true", help="print the speed table")
    add("--mask", metavar="IMAGE", help="of --inpaint: white where the image is to be redrawn")
    add("--from", dest="source", metavar="CLASS", help="the image's class, a name or a label (default: none)")
    add("--to", metavar="CLASS", help="of --class-edit: the new class")
    add("--size", choices=SIZES, help="of --benchmark: random weights of this size, in place of a run")
    add("--repeats", type=number(int, 1), default=5, help="of --benchmark: timed calls, of which the median (default: 5)")
    add("--json", action="store_true", help="of --benchmark: as JSON")
    args = parser.parse_args(argv)
    processes = start_processes(args)
    if args.size and not args.benchmark:
        parser.error("--size is for --benchmark; a run folder knows its size")
    if args.size:
        sampler = random_sampler(args.size, processes, args)
    else:
        sampler = Sampler.load(args.run, processes, args)
    K = sampler.config.num_classes
    try:
        given = args.classes.split(",") if args.classes else range(K)
        classes = [] if args.classes == "none" else [int(c) for c in given]
    except ValueError:
        parser.error(f"--classes {args.classes} is not a comma-separated list of labels")
    if any(not 0 <= c < K for c in classes):
        parser.error(f"--classes: labels must be from 0 to {K - 1}")
    methods = args.method or sampler.methods
    w_max = sampler.reverse.config.w_max if sampler.reverse is not None else 0.0
    scales = args.guidance or ([0.0] if args.method else sorted({0.0, w_max / 4, w_max}))
    draws = [(m, w) for m in methods for w in (scales if args.guidance or m == "biflow" else [0.0])]
    for method, w in draws:
        sampler.check(method, w)
    if args.benchmark:
        table = speed_table(sampler, args.batch, scales[0], args.repeats)
        return print(json.dumps(table)) if args.json else print_speed_table(table, args.batch)

    labels = balanced_labels(range(args.n), classes)
    modes = ("reconstruct", "class_edit", "inpaint", "interpolate", "trajectory", "curves")
    mode = next((name for name in modes if getattr(args, name)), "samples")
    out = args.out or sampler.folder / f"{mode.replace('_', '-')}.png"
    try:
        if mode == "samples":
            rows, images = sample_rows(sampler, draws, labels, args)
            save_grid(out, rows)
            if args.npz:
                np.savez(args.npz, arr_0=images.permute(0, 2, 3, 1).numpy(), arr_1=labels.numpy())
        elif mode == "curves":
            save_curves(out, read_metrics(sampler.folder))
        else:
            save_grid(out, edit_rows(sampler, mode, args, classes, labels[:20]))
    except OSError as error:
        fail(f"cannot write {out} or {args.npz} ({error.strerror})")
    print(f"wrote {out}" + (f" and {args.npz}" if args.npz else ""))
    if mode == "samples":
        print_costs(sampler, methods, args.batch)


def sample_rows(sampler: Sampler, draws, labels: torch.Tensor, args):
    """Rows of real images and of each (method, w), and all uint8 images of the last one."""
    real = held_out(sampler, labels[:20])
    rows = [] if real is None else [("real", sampler.decode(real))]
    for method, w in draws:
        parts = [range(i, min(i + args.batch, args.n)) for i in range(0, args.n, args.batch)]
        batches = (sampler.images(method, p, labels[p.start : p.stop], w, args.seed, args.temperature) for p in parts)
        images = torch.cat([to_uint8(x) for x in batches])
        several = len({w for _, w in draws}) > 1
        rows.append((row_name(method, w, args.temperature, several), images[:20] / 127.5 - 1))
    return rows, images


def edit_rows(sampler: Sampler, mode: str, args, classes: list[int], labels: torch.Tensor):
    """Check what an edit or a picture needs, and make its rows."""
    method = args.method[0] if args.method else "exact" if sampler.reverse is None else "biflow"
    w = args.guidance[0] if args.guidance else 0.0
    sampler.check(method, w)
    n, device = min(args.n, 20), sampler.device

    def label_of(name: str | None) -> torch.Tensor:
        names = sampler.run["classes"]
        if name is not None and name not in names and not (name.isdecimal() and int(name) < len(names)):
            fail(f"{name} is not a class of {sampler.folder}; its classes are {', '.join(names[:12])} ...")
        label = -1 if name is None else names.index(name) if name in names else int(name)
        return torch.full((n,), label, device=device)

    if mode == "interpolate":
        return interpolate(sampler, method, classes, n, w, args.seed)
    if mode == "trajectory":
        x = held_out(sampler, labels)
        if sampler.reverse is None or x is None:
            fail(f"--trajectory needs a reverse run whose data are at hand; {sampler.folder} has not both")
        return trajectory(sampler, x, labels.to(device), args.seed)
    x, y = open_image(sampler, getattr(args, mode), n), label_of(args.source)
    if mode == "reconstruct":
        return reconstruct(sampler, method, x, y, w, args.seed)
    if mode == "class_edit":
        if args.to is None or args.source is None:
            fail("--class-edit needs --from, the image's class, and --to, the new one")
        return class_edit(sampler, method, x, y, label_of(args.to), w, args.seed)
    if args.mask is None:
        fail("--inpaint needs --mask, an image that is white where it is to be redrawn")
    return inpaint(sampler, method, x, y, open_pixels(sampler, args.mask)[0] > 127, w, args.seed)


def print_costs(sampler: Sampler, methods: list[str], batch: int):
    costs = cost_table(sampler, methods, batch)
    base = costs.get("biflow", next(iter(costs.values())))
    print(f"\nms per image on {sampler.device.type}" + (", without the VAE" if sampler.run["vae"] else ""))
    print(f"{'':16}{'batch 1':>10}{'ratio':>8}{f'batch {batch}':>12}{'ratio':>8}")
    for method, (one, full) in costs.items():
        print(f"{method:16}{one:10.2f}{one / base[0]:8.1f}{full:12.3f}{full / base[1]:8.1f}")


if __name__ == "__main__":
    main()
