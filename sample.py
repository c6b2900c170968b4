"""Samples, grids and their cost.

python sample.py                                  # runs/reverse-toy -> a grid: real | exact inverse | BiFlow
python sample.py RUN --method biflow --n 50000 --guidance 1 --npz samples.npz
"""

import argparse
import math
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from biflow import BiFlow, TARFlow
from train_forward import EVAL, Data, autocast, data_of, fail, load_data, load_decoder, load_run, number, script
from train_forward import sample_noise, sample_rng, save_grid, start_processes, to_uint8

METHODS = ("biflow", "biflow-2nfe", "biflow+score", "exact", "exact+score")


class Sampler:
    """The models of a run folder, G and F or F alone, and how each method draws from them.

    A sample depends on the seed, its class and its own index, not on batch size or number of processes.
    """

    def __init__(self, folder: str | Path, device: torch.device, bf16: bool | None = None):
        model, self.run = load_run(folder)
        self.reverse: BiFlow | None = None
        if self.run["stage"] == "reverse":
            self.reverse, forward = model, Path(folder) / self.run["forward"]
            model = load_run(forward, "forward")[0]
        self.flow: TARFlow = model
        for net in (self.reverse, self.flow):
            if net is not None:
                net.to(device).requires_grad_(False)
        self.folder, self.device, self.config = Path(folder), device, self.flow.config
        self.bf16 = device.type == "cuda" if bf16 is None else bf16
        self.decode = load_decoder(self.run, device)

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
            if method == "biflow" and not 0 <= w <= self.reverse.config.w_max:
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

    def images(self, method: str, indices, y: torch.Tensor, w: float = 0.0, seed: int = 0) -> torch.Tensor:
        """The decoded samples with these indices and labels y (N,), (N, C, S, S) in about [-1, 1]."""
        z = sample_noise(seed, indices, self.config).to(self.device)
        with torch.no_grad(), autocast(self.device, self.bf16):
            return self.decode(self(method, z, y.to(self.device), w))


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


def cost_table(sampler: Sampler, methods: list[str], batch: int) -> dict[str, tuple[float, float]]:
    """Method -> ms per image at batch 1 and at the full batch, without guidance, decoding not included."""
    table = {}
    for method in methods:
        row = []
        for n in (1, batch):
            z = sample_noise(0, range(n), sampler.config).to(sampler.device)
            y = balanced_labels(range(n), range(sampler.config.num_classes)).to(sampler.device)
            row.append(milliseconds(lambda: sampler(method, z, y), sampler.device) / n)
        table[method] = tuple(row)
    return table


def real_images(sampler: Sampler, labels: torch.Tensor) -> torch.Tensor | None:
    """One held-out image for each label, or None where the data are not at hand."""
    source, processes = data_of(sampler.run), start_processes()
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
    return sampler.decode(torch.from_numpy(x).to(sampler.device))


@script
def main(argv=None):
    parser = argparse.ArgumentParser(description="Draw samples from a trained run: a grid, their cost, or an .npz.")
    add = parser.add_argument
    add("run", nargs="?", default="runs/reverse-toy", help="run folder (default: runs/reverse-toy)")
    add("--method", choices=METHODS, action="append", help="repeatable; default: all of the run's, compared")
    add("--n", type=number(int, 1), default=20, help="number of samples (default: 20)")
    add("--classes", help="comma-separated labels, drawn in turn; none for unconditional (default: all)")
    add("--guidance", type=float, nargs="+", metavar="W", help="scales (default: for BiFlow 0 and two more in its range)")
    add("--seed", type=number(int, 0), default=0, help="(default: 0)")
    add("--batch", type=number(int, 1), default=256, help="samples at a time, the full batch of the times (default: 256)")
    add("--out", type=Path, help="the PNG to write (default: RUN/samples.png)")
    add("--npz", type=Path, help="also write uint8 images (arr_0, NHWC) and labels (arr_1) of the last row, for fid.py")
    args = parser.parse_args(argv)
    sampler = Sampler(args.run, start_processes().device)
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

    labels = balanced_labels(range(args.n), classes)
    rows = [("real", x)] if (x := real_images(sampler, labels[:20])) is not None else []
    for method, w in draws:
        parts = [range(i, min(i + args.batch, args.n)) for i in range(0, args.n, args.batch)]
        images = torch.cat([to_uint8(sampler.images(method, p, labels[p.start : p.stop], w, args.seed)) for p in parts])
        rows.append((method + (f" w={w:g}" if len(scales) > 1 or w else ""), images[:20] / 127.5 - 1))
    out = args.out or sampler.folder / "samples.png"
    try:
        save_grid(out, rows)
        if args.npz:
            np.savez(args.npz, arr_0=images.permute(0, 2, 3, 1).numpy(), arr_1=labels.numpy())
    except OSError as error:
        fail(f"cannot write {out} or {args.npz} ({error.strerror})")
    print(f"wrote {out}" + (f" and {args.npz}" if args.npz else ""))

    costs = cost_table(sampler, methods, args.batch)
    base = costs.get("biflow", next(iter(costs.values())))
    print(f"\nms per image on {sampler.device.type}" + (", without the VAE" if sampler.run["vae"] else ""))
    print(f"{'':16}{'batch 1':>10}{'ratio':>8}{f'batch {args.batch}':>12}{'ratio':>8}")
    for method, (one, full) in costs.items():
        print(f"{method:16}{one:10.2f}{one / base[0]:8.1f}{full:12.3f}{full / base[1]:8.1f}")


if __name__ == "__main__":
    main()
