"""How good are the samples: Frechet distance, Inception score, precision and recall, and what each figure is.

python fid.py                                                     # runs/reverse-toy against held-out digits: one table
python fid.py --table RUN RUN ...                                 # runs on digits side by side, mean and spread over seeds
python fid.py IMAGENET/train --img-size 256 --save-stats ref.npz  # statistics of a reference, once
torchrun --nproc-per-node 8 fid.py runs/reverse-B --n 50000 --reference ref.npz
"""

import argparse
import dataclasses
import json
import math
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from sample import METHODS, Sampler, balanced_labels, cost_table, row_name
from train_forward import IMAGE_TYPES, VAE, Processes, fail, load_digits, load_weights, number, read_image, read_metrics
from train_forward import script, start_processes, to_uint8

# ----------------------------------------------------------------------------------------------------------------------
# The figures, as functions of features


def frechet_distance(mu1, sigma1, mu2, sigma2) -> float:
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1^1/2 S2 S1^1/2)^1/2), in float64; means (d,), covariances (d, d).

    The symmetric form: its matrix is positive semi-definite, so that eigenvalues need no complex arithmetic.
    """
    values, vectors = np.linalg.eigh(sigma1)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ sigma2 @ root).clip(min=0)).sum()
    return float(((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * cross)


def inception_score(logits: np.ndarray, splits: int = 10) -> float:
    """exp E KL(p(y|x) || p(y)) of logits (n, classes): mean over the splits, shuffled with a fixed seed (2020)."""
    n, splits = len(logits), min(splits, len(logits))
    logits = logits[np.random.RandomState(2020).permutation(n)].astype(np.float64)
    log_p = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    scores = []
    for i in range(splits):
        part = log_p[i * n // splits : (i + 1) * n // splits]
        p = np.exp(part)
        scores.append(np.exp((p * (part - np.log(p.mean(0)))).sum(1).mean()))
    return float(np.mean(scores))


def manifold_figures(real: np.ndarray, fake: np.ndarray, k: int = 3) -> dict[str, float]:
    """Precision and recall (Kynkaanniemi et al. 2019), coverage (Naeem et al. 2020) of features (n, d) and (m, d).

    Balls reach to the k-th nearest neighbour among their own kind. Precision is the share of fakes in a ball of the
    real ones, recall the share of the real in a ball of the fakes, coverage the share of the real ones' balls that hold
    a fake. A few outlying fakes, whose balls are wide, raise recall but not coverage. For two sets of one size from one
    distribution coverage is about 1 - 2^-k.
    """
    real, fake = torch.from_numpy(real).float(), torch.from_numpy(fake).float()

    def radii(x):
        return torch.cat([torch.cdist(part, x).kthvalue(k + 1, dim=1).values for part in x.split(1000)])

    real_radii, fake_radii = radii(real), radii(fake)
    covered, recalled, precise = [], [], torch.zeros(len(fake), dtype=torch.bool)
    for part, part_radii in zip(real.split(1000), real_radii.split(1000)):
        distances = torch.cdist(part, fake)
        held = distances <= part_radii[:, None]
        covered.append(held.any(1))
        precise |= held.any(0)
        recalled.append((distances <= fake_radii).any(1))
    shares = dict(precision=precise, recall=torch.cat(recalled), coverage=torch.cat(covered))
    return {name: float(share.double().mean()) for name, share in shares.items()}


def nearest(points: np.ndarray, others: np.ndarray) -> float:
    """The mean Euclidean distance of each point (n, d) to its nearest among the others (m, d)."""
    return float(torch.cdist(torch.from_numpy(points).float(), torch.from_numpy(others).float()).min(1).values.mean())


# ----------------------------------------------------------------------------------------------------------------------
# Digits


class DigitsClassifier:
    """What Inception is to photographs: scikit-learn's MLP, fitted on the training split with a fixed seed."""

    name = "64 hidden units of an MLP fitted on the training digits"

    def __init__(self, images: np.ndarray, labels: np.ndarray):
        from sklearn.neural_network import MLPClassifier

        self.net = MLPClassifier((64,), max_iter=400, random_state=0).fit(self.flat(images), labels)

    @staticmethod
    def flat(images: np.ndarray) -> np.ndarray:
        return images.reshape(len(images), -1) / 255.0

    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """uint8 images (n, 1, 8, 8) -> features (n, 64), logits (n, 10)."""
        (w1, w2), (b1, b2) = self.net.coefs_, self.net.intercepts_
        features = np.maximum(self.flat(images) @ w1 + b1, 0)
        return features, features @ w2 + b2


def moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return features.mean(0), np.cov(features, rowvar=False)


def digits_figures(images, labels, train, test, classifier) -> dict[str, float]:
    """All figures of uint8 images (n, 1, 8, 8) with labels (n,) against the test split; nothing is fitted on that."""
    features, logits = classifier(images)
    real, _ = classifier(test)
    flat, flat_real, flat_train = (classifier.flat(x) for x in (images, test, train))
    return {
        "FD": frechet_distance(*moments(features), *moments(real)),
        "FD pixels": frechet_distance(*moments(flat), *moments(flat_real)),
        "IS": inception_score(logits, splits=1),
        "accuracy": float((logits.argmax(1) == labels).mean()),
        **manifold_figures(real, features[: len(real)]),  # as many samples as there are real images
        "nearest": nearest(flat[: len(real)], flat_train),
    }


class DigitsReal:
    """The real digits and the classifier that scores others against them."""

    def __init__(self):
        self.data = load_digits()
        pixels = to_uint8(torch.from_numpy(self.data.array)).numpy()
        self.train, self.test = pixels[self.data.fit], pixels[self.data.test]
        self.classifier = DigitsClassifier(self.train, self.data.labels[self.data.fit])

    def figures(self, images, labels) -> dict[str, float]:
        return digits_figures(images, labels, self.train, self.test, self.classifier)

    def rows(self, draws: int) -> list[tuple[str, list[dict], tuple]]:
        """The test split against itself, and the training split against it: the floor."""
        labels, fit = self.data.labels, self.data.fit
        rng = np.random.default_rng(0)
        orders = [rng.permutation(len(fit)) for _ in range(draws)]  # the manifold's figures take the first ones
        floor = [self.figures(self.train[o], labels[fit][o]) | {"nearest": math.nan} for o in orders]  # 0 by construction
        return [("real: test", [self.figures(self.test, labels[self.data.test])], ()), ("real: train (floor)", floor, ())]

    def draws(self, sampler: Sampler, method: str, w: float, temperature: float, args) -> list[dict]:
        """The figures of --draws independent sets of samples; the same z and labels for every method."""
        if args.n < 4:
            fail("--n must be at least 4 for digits: precision and recall look at the third neighbour")
        y = balanced_labels(range(args.n), range(10))
        seeds = range(args.seed, args.seed + args.draws)
        sets = (to_uint8(sampler.images(method, range(args.n), y, w, seed, temperature)).numpy() for seed in seeds)
        return [self.figures(images, y.numpy()) for images in sets]


def compared(methods: list[str], args) -> list[tuple[str, float, float]]:
    """The (method, w, temperature) of a table's rows: every w for BiFlow, none for the exact inverse."""
    guidance = lambda method: args.guidance if method.startswith("biflow") else [0.0]
    return [(m, w, t) for m in methods for w in guidance(m) for t in args.temperature]


def digits_table(sampler: Sampler, args) -> list[tuple[str, list[dict], tuple]]:
    """Rows (name, figures of each draw, ms per image at batch 1 and 256), the real digits first."""
    real = DigitsReal()
    rows = real.rows(args.draws)
    costs = cost_table(sampler, args.method, 256)
    for method, w, t in compared(args.method, args):
        rows.append((row_name(method, w, t), real.draws(sampler, method, w, t, args), costs[method]))
    return rows


# What can set two runs of a table apart
SETTINGS = "clip strategy denoise trajectory_norm adaptive_p w_max steps sigma lr weight_decay batch_size".split()


def runs_table(folders: list[str], args, processes: Processes) -> list[tuple[str, list[dict], tuple]]:
    """Rows as of digits_table, but a row of samples is what several digits runs say that differ by their seed alone: the
    mean of each run's draws. A row's name is the method and what sets its run apart; a flow of several runs counts once."""
    real, found, flows = DigitsReal(), {}, set()
    for folder in map(Path, folders):
        sampler = Sampler.load(folder, processes)
        if sampler.run["data"] != "digits":
            fail(f"{folder} was not trained on digits; --table compares runs that were")
        flow = (folder / sampler.run.get("forward", "")).resolve()
        flow_run = json.loads((flow / "run.json").read_text())
        methods = [m for m in args.method or sampler.methods if m.startswith("biflow") or (flow, m) not in flows]
        flows |= {(flow, m) for m in methods}
        settings = compared(methods, args)
        for method, w, _ in settings:
            sampler.check(method, w)
        costs = cost_table(sampler, methods, 256)
        for method, w, t in settings:
            draws = real.draws(sampler, method, w, t, args)
            figures = {k: float(np.mean([d[k] for d in draws])) for k in draws[0]}
            run = sampler.run
            if method.startswith("biflow"):
                figures |= last_errors(folder)
            else:
                run = flow_run
            key = {k: v for k, v in run["args"].items() if k not in ("seed", "forward")}
            key["flow"] = {k: v for k, v in flow_run["args"].items() if k != "seed"}
            key |= {"method": method, "guidance": w, "temperature": t, "clip": sampler.config.clip}
            found.setdefault(json.dumps(key, sort_keys=True), []).append((figures, costs[method]))
    keys = [json.loads(key) for key in found]
    reverse = [key for key in keys if key["method"].startswith("biflow")]
    differing = [k for k in SETTINGS if len({json.dumps(key.get(k)) for key in reverse}) > 1]
    rows = real.rows(args.draws)
    for key, members in zip(keys, found.values()):
        figures, costs = zip(*members)
        name = " ".join([key["method"]] + [f"{k}={key[k]}" for k in differing if k == "clip" or key.get(k) is not None])
        name = row_name(name, key["guidance"], key["temperature"]) + f" ({len(members)})"
        rows.append((name, list(figures), tuple(np.median(costs, axis=0))))
    return rows


def last_errors(folder: Path) -> dict[str, float]:
    """The last validation errors of a reverse run, of x' and of each depth, in per cent."""
    last = next((line for line in reversed(read_metrics(folder)) if "val_error_x" in line), {})
    return {f"% {k.removeprefix('val_error_')}": 100 * v for k, v in last.items() if k.startswith("val_error_")}


def print_table(rows):
    names = list(dict.fromkeys(name for _, draws, _ in rows for name in draws[0]))
    wide = max(22, *(len(name) + 2 for name, _, _ in rows))
    print(f"{'':{wide}}" + "".join(f"{n:>16}" for n in names) + f"{'ms (batch 1)':>14}{'ms (256)':>10}")
    for name, draws, cost in rows:
        line = f"{name:{wide}}"
        for key in names:
            values = [d.get(key, math.nan) for d in draws]
            spread = f" ±{np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
            line += f"{'-' if math.isnan(values[0]) else f'{np.mean(values):.3f}{spread}':>16}"
        print(line + "".join(f"{c:{w}.{p}f}" for c, w, p in zip(cost, (14, 10), (2, 3))))


# ----------------------------------------------------------------------------------------------------------------------
# Images. A source yields (indices, uint8 images (n, 3, S, S)) for this process's share; nothing holds all of them


def batches_of(n: int, batch: int, processes: Processes) -> list[range]:
    """The index ranges 0 .. n in batches; this process's share of them."""
    return [range(i, min(i + batch, n)) for i in range(0, n, batch)][processes.rank :: processes.world]


def folder_source(root: Path, size: int, batch: int, processes: Processes, limit: int | None = None):
    """All images below a folder, cropped as for training; with a limit, so many of them, evenly over the sorted names."""
    files = sorted(p for p in root.rglob("*") if p.suffix.lower() in IMAGE_TYPES)
    if limit and limit < len(files):
        files = [files[i] for i in np.linspace(0, len(files) - 1, limit).astype(int)]
    if len(files) < 2:
        fail(f"{root} holds {len(files)} images; a covariance needs two at least")
    for part in tqdm(batches_of(len(files), batch, processes), desc=root.name, disable=not processes.first):
        try:
            yield part, torch.from_numpy(np.stack([read_image(files[i], size) for i in part]))
        except ValueError as error:
            fail(error)


def npz_source(path: Path, batch: int, processes: Processes):
    """uint8 images arr_0 (n, H, W, C) of an .npz, as ADM writes it, read piece by piece from the zip file."""
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
        np.lib.format.read_magic(file)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        if dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3) or fortran or shape[0] < 2:
            fail(f"arr_0 of {path} is {dtype} {shape}; expected at least two uint8 images (n, H, W, 3)")
        mine = set(batches_of(shape[0], batch, processes))
        for part in batches_of(shape[0], batch, Processes(processes.device)):
            rows = np.frombuffer(file.read(len(part) * math.prod(shape[1:])), np.uint8).reshape(-1, *shape[1:])
            if part in mine:
                yield part, torch.from_numpy(rows.transpose(0, 3, 1, 2).copy()).expand(-1, 3, -1, -1)


def run_source(sampler: Sampler, method: str, w: float, temperature: float, args, processes: Processes):
    """Samples of a run, the classes in turn."""
    classes = range(sampler.config.num_classes)
    for part in tqdm(batches_of(args.n, args.batch, processes), desc=method, disable=not processes.first):
        images = sampler.images(method, part, balanced_labels(part, classes), w, args.seed, temperature)
        yield part, to_uint8(images).expand(-1, 3, -1, -1)


def reconstruction_source(sampler: Sampler, source):
    """The VAE's round trip (the posterior's mean) of another source."""
    vae = VAE(sampler.run["vae"], sampler.device, sampler.run["mean"], sampler.run["std"])
    for part, images in source:
        with torch.no_grad():
            mean = vae.encode(images.to(sampler.device) / 127.5 - 1)[:, 0]
            yield part, to_uint8(vae.decode((mean - vae.mean) / vae.std))


class Inception:
    """torch-fidelity's port of the TF-1 Inception-v3: 2048 pooled features and the bias-free logits, in one pass."""

    def __init__(self, weights: str | None, device: torch.device, layer: str = "2048"):
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        if weights is not None:
            load_weights(weights)  # the package would unpickle the file: first make sure that it holds tensors alone
        try:
            layers = [layer, "logits_unbiased"]
            self.net = FeatureExtractorInceptionV3("inception-v3-compat", layers, feature_extractor_weights_path=weights)
        except Exception as error:
            fail(f"cannot load Inception's weights ({str(error).splitlines()[0]}); give --inception-weights FILE")
        self.net, self.device = self.net.to(device), device
        self.name = f"Inception-v3 of torch-fidelity, {layer} features, weights {weights or 'as published'}"

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """uint8 images (n, 3, S, S) -> features (n, 2048), logits (n, 1008)."""
        return tuple(x.cpu().numpy() for x in self.net(images.to(self.device)))


class Pixels:
    """The pixels themselves in [0, 1] as features, for data that no network knows; without logits."""

    name = "plain pixels"

    def __call__(self, images: torch.Tensor) -> tuple[np.ndarray, None]:
        if images[0].numel() > 4096:
            fail(f"--features pixels is for small images, not {tuple(images.shape[1:])}; use inception")
        return images.flatten(1).numpy() / 255.0, None


@dataclasses.dataclass
class Statistics:
    """What the figures need of a set of images: moments in float64, logits, and the first features for recall."""

    mu: np.ndarray
    sigma: np.ndarray
    n: int | None = None  # unknown for a statistics file
    logits: np.ndarray | None = None
    features: np.ndarray | None = None


def statistics_of(source, extractor, processes: Processes, keep: int = 10_000) -> Statistics:
    """Stream a source through an extractor. Under torchrun all processes' shares add up to what one would find."""
    count, first, second, kept = 0, 0.0, 0.0, []
    for part, images in source:
        features, logits = extractor(images)
        wide = features.astype(np.float64)
        count, first, second = count + len(wide), first + wide.sum(0), second + wide.T @ wide
        kept.append((part.start, features[: max(0, keep - part.start)], logits))
    if processes.world > 1:
        shares = [None] * processes.world
        dist.all_gather_object(shares, (count, first, second, kept))
        count, first, second = (sum(share[i] for share in shares) for i in range(3))
        kept = [item for share in shares for item in share[3]]
    kept.sort(key=lambda item: item[0])
    if count < 2:
        fail(f"{count} images; a covariance needs two at least")
    mu = first / count
    sigma = (second - count * np.outer(mu, mu)) / (count - 1)
    logits = None if kept[0][2] is None else np.concatenate([item[2] for item in kept])
    return Statistics(mu, sigma, count, logits, np.concatenate([item[1] for item in kept]))


def load_statistics(path: Path) -> Statistics | None:
    """A statistics file with mu and sigma (ADM's, pytorch-fid's) or ref_mu and ref_sigma (iMF's); None for other files."""
    try:
        with np.load(path, allow_pickle=False) as file:
            for prefix in ("", "ref_"):
                if prefix + "mu" in file and prefix + "sigma" in file:
                    return Statistics(file[prefix + "mu"].astype(np.float64), file[prefix + "sigma"].astype(np.float64))
            if "arr_0" not in file:
                fail(f"{path} holds {', '.join(file.files) or 'nothing'}; expected mu and sigma, or images arr_0")
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        fail(f"cannot read {path} ({error})")
    return None


def measure(path: str, args, extractor, processes: Processes) -> Statistics:
    """The statistics of an image folder, an .npz of images or a statistics file."""
    path = Path(path).expanduser()
    if path.is_dir():
        return statistics_of(folder_source(path, args.img_size, args.batch, processes), extractor, processes)
    if not path.is_file():
        fail(f"{path} does not exist; give a folder of images, an .npz of images or of statistics")
    return load_statistics(path) or statistics_of(npz_source(path, args.batch, processes), extractor, processes)


def image_figures(fake: Statistics, real: Statistics | None) -> dict[str, float]:
    figures = {}
    if real is not None:
        if fake.mu.shape != real.mu.shape:
            fail(f"the reference has {len(real.mu)} features, the images {len(fake.mu)}; use the same --features for both")
        figures["FID"] = frechet_distance(fake.mu, fake.sigma, real.mu, real.sigma)
    if fake.logits is not None:
        figures["IS"] = inception_score(fake.logits)
    if real is not None and real.features is not None and fake.features is not None:
        n = min(len(real.features), len(fake.features))
        if n > 3:
            figures |= manifold_figures(real.features[:n], fake.features[:n])
    return figures


def score_images(args, sampler: Sampler | None, processes: Processes):
    """Score a run, or images, against a reference; print each figure with what it is."""
    extractor = Pixels() if args.features == "pixels" else Inception(args.inception_weights, processes.device)
    reference = args.reference or (sampler and not args.save_stats and sampler.run["data"])
    real = measure(reference, args, extractor, processes) if reference else None
    rows = []
    if sampler is None:
        rows.append((args.input, measure(args.input, args, extractor, processes)))
    elif args.reconstruct:
        originals = folder_source(Path(sampler.run["data"]), args.img_size, args.batch, processes, args.n)
        rows.append(("VAE round trip", statistics_of(reconstruction_source(sampler, originals), extractor, processes)))
    else:
        for method, w, t in compared(args.method, args):
            source = run_source(sampler, method, w, t, args, processes)
            rows.append((row_name(method, w, t), statistics_of(source, extractor, processes)))
    if not processes.first:
        return
    print(
        f"features: {extractor.name}; uint8 by round(127.5 x + 127.5); covariance with ddof = 1; IS in 10 shuffled splits"
    )
    print(f"reference: {reference} ({real.n or 'unknown number of'} images)" if real else "no reference: no FID")
    labels = f"; labels in turn over {sampler.config.num_classes} classes, seed {args.seed}" if sampler else ""
    for name, fake in rows:
        figures = ", ".join(f"{k} {v:.4f}" for k, v in image_figures(fake, real).items())
        print(f"{name}: {figures}  ({fake.n or 'unknown number of'} images{labels})")
        if args.save_stats:
            np.savez(args.save_stats, mu=fake.mu, sigma=fake.sigma)
            print(f"wrote {args.save_stats}")


@script
def main(argv=None):
    parser = argparse.ArgumentParser(description="Score a run, a folder of images or an .npz of uint8 images.")
    add = parser.add_argument
    help_ = "run folder, folder of images, or .npz with uint8 images arr_0 (default: runs/reverse-toy)"
    add("input", nargs="?", default="runs/reverse-toy", help=help_)
    add("--method", choices=METHODS, action="append", help="repeatable (default: digits: all of the run's; else biflow)")
    add("--n", type=number(int, 2), help="samples (default: digits: 1000 a draw; else 50000)")
    add("--draws", type=number(int, 1), default=5, help="digits: independent draws, for the spread (default: 5)")
    add("--guidance", type=float, nargs="+", default=[0.0], metavar="W", help="guidance scales (default: 0)")
    help_ = "standard deviations of z (default: 1; for one run on digits 1 and 1.06)"
    add("--temperature", type=number(float, 0), nargs="+", metavar="T", help=help_)
    add("--seed", type=number(int, 0), default=0, help="(default: 0)")
    add("--batch", type=number(int, 1), default=64, help="images at a time (default: 64)")
    add("--features", choices=("inception", "pixels"), default="inception", help="of images (digits have their own)")
    add("--inception-weights", metavar="FILE", help="torch-fidelity's Inception-v3 weights (default: its download)")
    add("--reference", help="folder of images, .npz of images, or .npz with mu and sigma (default: the run's data)")
    help_ = "crop folders of images to this size (default: the run's, or 256)"
    add("--img-size", type=number(int, 1), metavar="S", help=help_)
    add("--save-stats", type=Path, metavar="FILE", help="write mu and sigma of the input, to be a --reference later")
    add("--reconstruct", action="store_true", help="score the VAE's round trip of the run's data: the floor of its latents")
    add(
        "--table", nargs="+", metavar="RUN", help="digits: one table of several runs; those that differ by seed share a row"
    )
    args = parser.parse_args(argv)
    processes = start_processes()
    if args.table:
        args.n, args.temperature = args.n or 1000, args.temperature or [1.0]
        return print_table(runs_table(args.table, args, processes))
    path = Path(args.input)
    is_images = path.is_file() or (path.is_dir() and not (path / "run.json").exists())
    sampler = None if is_images else Sampler.load(path, processes)
    if sampler is not None:
        digits = sampler.run["data"] == "digits"
        args.method = args.method or (sampler.methods if digits else [sampler.methods[-1]])
        for method in args.method:
            for w in args.guidance:
                sampler.check(method, w)
        if digits:
            args.n, args.temperature = args.n or 1000, args.temperature or [1.0, 1.06]
            return print_table(digits_table(sampler, args))
        if args.reconstruct and not sampler.run["vae"]:
            fail(f"{path} has no VAE to reconstruct with")
    args.n, args.temperature = args.n or 50_000, args.temperature or [1.0]
    args.img_size = args.img_size or (sampler.run["img_size"] if sampler else 256)
    score_images(args, sampler, processes)


if __name__ == "__main__":
    main()
