"""Measure runs: quality (FD or FID, IS, precision, recall, coverage) and cost (parameters, GFLOPs, layers, time).

    python fid.py                                                     # runs/reverse-toy, against held-out digits
    python fid.py runs/align-0 runs/align-1 runs/naive-0 ...          # runs NAME-SEED share a row: mean and spread
    python fid.py --speed --size B                                    # cost alone, with random weights
    python fid.py IMAGENET/train --img-size 256 --save-stats ref.npz  # statistics of a reference, once
    torchrun --nproc-per-node 8 fid.py runs/reverse-B --reference ref.npz

Contents: the metrics, small images, photographs, speed, command line.
"""

import argparse
import itertools
import re
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader
from torch.utils.flop_counter import flop_registry
from tqdm import tqdm

from biflow import SIZES, BiFlow, TARFlow, unpatchify
from data import TORCHVISION, Photos, gather, list_images, load_digits, load_torchvision
from sample import METHODS, RANK, WORLD, Sampler, check_output, fail, labels_in_turn, run_script, setup, to_uint8

# ----------------------------------------------------------------------------------------------------------------------
# The metrics, as functions of features


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1^1/2 S2 S1^1/2)^1/2), in float64; means (d,), covariances (d, d).

    In this symmetric form the matrix is positive semi-definite, so that its eigenvalues are real.
    """
    values, vectors = np.linalg.eigh(sigma1)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ sigma2 @ root).clip(min=0)).sum()
    return max(0.0, float(((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * cross))


def inception_score(logits, splits=10):
    """exp E KL(p(y|x) || p(y)) of logits (n, classes): mean over the splits, shuffled with a fixed seed (2020)."""
    logits = logits[np.random.RandomState(2020).permutation(len(logits))].astype(np.float64)
    log_p = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    n, splits, scores = len(log_p), min(splits, len(log_p)), []
    for i in range(splits):
        part = log_p[i * n // splits : (i + 1) * n // splits]
        p = np.exp(part)
        scores.append(np.exp((p * (part - np.log(p.mean(0)))).sum(1).mean()))
    return float(np.mean(scores))


def precision_recall_coverage(real, fake, k=3):
    """Precision and recall (Kynkaanniemi et al. 2019), coverage (Naeem et al. 2020) of features (n, d) and (m, d).

    A ball reaches to the k-th nearest neighbour of its own kind. Precision: the share of fakes in a ball of the real
    ones. Recall: the share of the real ones in a ball of the fakes. Coverage: the share of the real ones' balls that
    hold a fake; unlike recall, it is not raised by a few outlying fakes, whose balls are wide.
    """
    real, fake = torch.from_numpy(real).float(), torch.from_numpy(fake).float()
    distances = torch.cdist(real, fake)  # (n, m)
    real_radii, fake_radii = (torch.cdist(x, x).topk(k + 1, largest=False).values[:, -1] for x in (real, fake))
    inside = distances <= real_radii[:, None]  # the balls of the real ones
    shares = dict(precision=inside.any(0), recall=(distances <= fake_radii).any(1), coverage=inside.any(1))
    return {name: share.double().mean().item() for name, share in shares.items()}


def equal_numbers(real, fake):
    """As many features of each, chosen at random: recall and coverage depend on how many there are."""
    n = min(len(real), len(fake))
    return [np.random.default_rng(0).permutation(features)[:n] for features in (real, fake)]


# ----------------------------------------------------------------------------------------------------------------------
# Small images (digits, MNIST, CIFAR-10): a small classifier is to them what Inception is to photographs


class Judge:
    """The real images of a data set, and the metrics of others against its test split. Nothing is fitted on that."""

    def __init__(self, name, folder):
        self.data = load_digits() if name == "digits" else load_torchvision(name, folder)
        images = self.data.array
        pixels = to_uint8(torch.from_numpy(images)).numpy() if images.dtype != np.uint8 else images
        pixels = pixels.reshape(len(pixels), -1)
        self.fit, self.test = pixels[self.data.fit] / 255, pixels[self.data.test] / 255
        self.weights = self.load_classifier(folder / f"judge-{name}.npz")
        self.test_features = self.features(self.test)[0]
        self.test_moments = moments(self.test_features)
        self.test_moments_px = moments(self.test)

    def load_classifier(self, path):
        """The weights of scikit-learn's MLP, fitted once. Of a large set it sees every second training image; the other
        half is for the perceptual distance's network."""
        if not path.exists():
            from sklearn.neural_network import MLPClassifier

            large = len(self.fit) > 10_000
            step, size, epochs = (2, 128, 20) if large else (1, 64, 400)
            net = MLPClassifier((size,), max_iter=epochs, random_state=0)
            net.fit(self.fit[::step], self.data.labels[self.data.fit][::step])
            if not large:
                return *net.coefs_, *net.intercepts_
            np.savez(path, *net.coefs_, *net.intercepts_)
        return load_npz(path).values()

    def features(self, x):
        """Pixels (n, d) in [0, 1] -> the classifier's hidden features, and logits (n, classes)."""
        w1, w2, b1, b2 = self.weights
        hidden = np.maximum(x @ w1 + b1, 0)
        return hidden, hidden @ w2 + b2

    def metrics(self, x, labels):
        """All metrics of images (n, d) in [0, 1] that were drawn for labels (n,)."""
        (fake, logits), real = self.features(x), self.test_features
        few = torch.from_numpy(x[:1000]).float()
        return {
            "FD": frechet_distance(*moments(fake), *self.test_moments),
            "FD px": frechet_distance(*moments(x), *self.test_moments_px),
            "IS": inception_score(logits, splits=1),
            "accuracy": (logits.argmax(1) == labels).mean() if (labels >= 0).all() else np.nan,
            **precision_recall_coverage(real, fake[: len(real)]),  # as many samples as there are real images
            "nearest": torch.cdist(few, torch.from_numpy(self.fit).float()).min(1).values.mean().item(),
        }

    def real_rows(self):
        """The test images against themselves, and training images against them: the floor."""
        labels = self.data.labels
        chosen = np.random.default_rng(0).permutation(len(self.fit))[: max(1000, len(self.test))]
        test = self.metrics(self.test, labels[self.data.test])
        floor = self.metrics(self.fit[chosen], labels[self.data.fit][chosen])
        return {"real: test": [test], "real: training": [floor | dict(nearest=np.nan)]}  # the second is the floor

    def draws(self, sampler, method, w, args):
        """The metrics of independent sets of samples; the same z and labels for every method."""
        y = labels_in_turn(range(args.n), range(sampler.config.num_classes))
        for seed in range(args.seed, args.seed + args.draws):
            images = sampler.draw(method, y, w, seed, args.batch)
            yield self.metrics(images.flatten(1).numpy() / 255, y.numpy())


def moments(x):
    return x.mean(0), np.cov(x, rowvar=False)


def quality_table(samplers, args):
    """A row for each run, method and scale. Runs that differ in the last part of their name, the seed, share a row, and
    each counts with the mean of its draws. Below a row of several is their standard deviation."""
    first = next(iter(samplers))
    judge = Judge(samplers[first].run["data"], Path(first).resolve().parent / "data")
    rows, times = judge.real_rows(), {}
    group = {folder: re.sub(r"-\d+$", "", Path(folder).name) for folder in samplers}
    seeds = Counter((group[folder], sampler.run["args"].get("seed")) for folder, sampler in samplers.items())
    if max(seeds.values()) > 1:
        fail("runs NAME-NUMBER are taken for seeds of one setting, but two of a NAME have the same --seed; rename one")
    args.n = args.n or (1000 if len(judge.test) < 1000 else 10_000)
    for folder, sampler in samplers.items():
        name = group[folder] + " " if len(samplers) > 1 else ""
        for method in args.method or sampler.methods:
            for w in args.guidance if method.startswith("biflow") or args.method else [0.0]:
                draws = list(judge.draws(sampler, method, w, args))
                if len(samplers) > 1:
                    draws = [{k: np.mean([draw[k] for draw in draws]) for k in draws[0]}]
                row = f"{name}{method}" + (f" w={w:g}" if w else "")
                rows.setdefault(row, []).extend(draws)
                times[row] = [f"{measure(sampler, method, n, w):.3g}" for n in (1, 256)]
    wide, names = max(map(len, rows)) + 1, list(rows["real: test"][0])
    heads = ("FD", "FD px", "IS", "acc.", "prec.", "recall", "cover.", "near.")
    print(f"{'':{wide}}" + "".join(f"{head:>8}" for head in heads) + "  ms at 1  at 256")
    for row, draws in rows.items():
        cells = np.array([[draw[name] for name in names] for draw in draws])
        line = "".join(f"{x:8.3f}" for x in cells.mean(0) + 0.0).replace("nan", "  -")  # + 0.0: no -0.000
        print(f"{row:{wide}}{line}" + "".join(f"{x:>{w}}" for x, w in zip(times.get(row, ()), (9, 8))))
        if len(draws) > 1:
            print(f"{'  +-':{wide}}" + "".join(f"{x:8.3f}" for x in cells.std(0, ddof=1)))
    print(f"draws: {args.draws} of {args.n} from seed {args.seed}; FD and the next of a classifier's hidden features")


# ----------------------------------------------------------------------------------------------------------------------
# Photographs, by Inception. Each process takes its share; only moments, logits and the first features are kept

KEPT = 10_000  # features


def load_npz(path):
    """The arrays of an .npz, by name."""
    try:
        with np.load(path) as file:
            return dict(file)
    except Exception as error:  # zipfile, zlib and numpy raise many kinds
        fail(f"cannot read {path} ({error}); is it whole?")


def images_of(path, arrays):
    """The uint8 images arr_0 (n, H, W, 1 or 3) among the arrays of an .npz."""
    images = arrays.get("arr_0", np.zeros(0))
    if images.ndim != 4 or images.shape[3] not in (1, 3) or len(images) < 2 or images.dtype != np.uint8:
        fail(f"{path} does not hold uint8 images arr_0 (n, H, W, 1 or 3), two or more of them")
    return images


def share(n, args):
    """This process's batches of the indices 0 .. n-1, which are dealt in turn. A large set is shuffled, so that the
    features that are kept are not those of its first classes."""
    order = np.arange(n) if n <= KEPT else np.random.default_rng(0).permutation(n)
    return [order[i : i + args.batch] for i in range(RANK * args.batch, n, WORLD * args.batch)]


def image_batches(source, args):
    """A folder of images, or uint8 images (n, H, W, 3) -> batches of uint8 (n, 3, S, S); of this process's share."""
    if isinstance(source, np.ndarray):
        for indices in share(len(source), args):
            yield torch.from_numpy(source[indices].transpose(0, 3, 1, 2).copy()).expand(-1, 3, -1, -1)
        return
    photos = Photos(list_images(Path(source))[0], args.img_size)
    batches = share(len(photos), args)
    for items in DataLoader(photos, batch_sampler=batches, num_workers=args.num_workers, collate_fn=list):
        damaged = [str(photos.files[i]) for i, _, mark in items if mark == 2]
        if damaged:
            fail(f"cannot read {', '.join(damaged)}; repair or remove them")
        yield torch.from_numpy(np.stack([pixels for _, pixels, _ in items]))


def sample_batches(sampler, method, w, args):
    y = labels_in_turn(range(args.n), range(sampler.config.num_classes))
    for indices in share(args.n, args):
        yield to_uint8(sampler.images(method, indices, y[indices], w, args.seed)).expand(-1, 3, -1, -1)


def load_inception(weights, device):
    """torch-fidelity's port of the Inception-v3 of FID: 2048 pooled features and the bias-free logits."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    layers = ["2048", "logits_unbiased"]
    try:
        if weights:
            torch.load(weights, weights_only=True)  # the package would unpickle it: make sure that it is plain tensors
        net = FeatureExtractorInceptionV3("inception-v3-compat", layers, feature_extractor_weights_path=weights)
    except Exception as error:
        fail(f"cannot load Inception's weights {weights or ''} ({error}); give --inception-weights FILE")
    return net.to(device)


@torch.no_grad()
def image_statistics(batches, inception, device, keep_logits):
    """Batches of uint8 images -> moments over all processes, in float64; logits and some features on the first."""
    count, total, products, logits, features = 0, 0.0, 0.0, [], []
    for images in tqdm(batches, desc="Inception", disable=RANK > 0):
        batch_features, batch_logits = (x.cpu().numpy() for x in inception(images.to(device)))
        wide = batch_features.astype(np.float64)
        count, total, products = count + len(wide), total + wide.sum(0), products + wide.T @ wide
        logits += [batch_logits] * keep_logits
        features += [batch_features] * (count - len(wide) < KEPT / WORLD)
    *sums, logits, features = zip(*gather((count, total, products, logits, features)))
    count, total, products = map(sum, sums)
    mean = total / count
    covariance = (products - count * np.outer(mean, mean)) / (count - 1)
    found = dict(mu=mean, sigma=covariance, n=count, features=in_order(features)[:KEPT])
    return found | (dict(logits=in_order(logits)) if keep_logits else {})


def in_order(shares):
    """The batches of all processes, which were dealt in turn, as one array."""
    batches = itertools.chain(*itertools.zip_longest(*shares))
    return np.concatenate([batch for batch in batches if batch is not None])


def reference_statistics(path, inception, args, device):
    """Of an .npz with mu and sigma (ADM's, pytorch-fid's, ours) or ref_mu and ref_sigma (iMF's), or of images."""
    if path.is_dir():
        return image_statistics(image_batches(path, args), inception, device, keep_logits=False)
    arrays = load_npz(path)
    prefix = "ref_" if "ref_mu" in arrays else ""
    if prefix + "mu" not in arrays:
        images = images_of(path, arrays)
        if images.shape[1] != args.img_size:
            fail(f"the images of {path} have {images.shape[1]} pixels a side, the others {args.img_size}")
        return image_statistics(image_batches(images, args), inception, device, keep_logits=False)
    mu, sigma = (arrays.get(prefix + name, np.zeros(0)).astype(np.float64) for name in ("mu", "sigma"))
    if sigma.shape != (2048, 2048) or not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        fail(f"mu and sigma of {path} are missing, not finite, or not those of 2048 features")
    if arrays.get("img_size", args.img_size) != args.img_size:
        fail(f"{path} was made of images of {arrays['img_size']} pixels, these have {args.img_size}; give --img-size")
    return dict(mu=mu, sigma=sigma)


def score_images(sources, args, device):
    """{name: batches} -> a line each, with all that its metrics depend on."""
    size = args.img_size
    inception = load_inception(args.inception_weights, device)
    real = reference_statistics(args.reference, inception, args, device) if args.reference else {}
    for name, batches in sources.items():
        fake = image_statistics(batches, inception, device, keep_logits=not args.save_stats)  # ImageNet's take 5 GB
        if args.save_stats and RANK == 0:
            np.savez(args.save_stats, mu=fake["mu"], sigma=fake["sigma"], img_size=size)
        metrics = {}
        if real:
            metrics["FID"] = frechet_distance(fake["mu"], fake["sigma"], real["mu"], real["sigma"])
            if "features" in real and min(real["n"], fake["n"]) > 3:
                metrics |= precision_recall_coverage(*equal_numbers(real["features"], fake["features"]))
        if "logits" in fake:
            metrics["IS"] = inception_score(fake["logits"])
        if RANK == 0:
            shown = ", ".join(f"{metric} {value:.3f}" for metric, value in metrics.items())
            conditions = f"{fake['n']} images of {size} x {size}, seed {args.seed}, reference {args.reference}"
            print(f"{name}: {shown} ({conditions})")
    if RANK == 0:
        print("Inception-v3 of torch-fidelity; uint8 by round(127.5 x + 127.5); IS in 10 shuffled splits")


# ----------------------------------------------------------------------------------------------------------------------
# Speed


class FlopCounter(TorchDispatchMode):
    """Adds up torch's own formulas for what it executes. (FlopCounterMode fails inside autograd.grad.)"""

    total = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        if op.overloadpacket in flop_registry:
            self.total += flop_registry[op.overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


class Replay:
    """Replays a function of many small kernels as a CUDA graph, recorded when it is called with inputs at the addresses
    of the call before. The function works in place or returns one tensor."""

    def __init__(self, function):
        self.function, self.key, self.graph, self.out = function, None, None, None

    def __call__(self, *inputs):
        key = [(x.data_ptr(), x.shape, x.stride(), x.dtype) if torch.is_tensor(x) else x for x in inputs]
        key.append(torch.is_autocast_enabled("cuda"))
        if key != self.key:
            self.key, self.graph, self.out = key, None, None
            return self.function(*inputs)  # this compiles, and sets up libraries, which cannot be recorded
        if self.graph is None:
            self.graph, self.out = record(self.function, *inputs)
        self.graph.replay()
        return None if self.out is None else self.out.clone()  # the next replay overwrites it


def record(function, *inputs):
    """The CUDA graph of what function(*inputs) launches, and its result. Nothing runs before the graph is replayed."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads, such as NCCL's, may go on
        out = function(*inputs)
    return graph, out


def noise_and_labels(sampler, n):
    """z (n, T, D) and y (n,), on the device."""
    y = labels_in_turn(range(n), range(sampler.config.num_classes))
    return sampler.noise(range(n)), y.to(sampler.device)


def call(sampler, method, z, y, w):
    """A method's samples, undecoded; or what the VAE makes of z."""
    if method == "VAE decode":
        return sampler.decode(unpatchify(z, sampler.config.patch_size))
    return sampler(method, z, y, w)


def count(sampler, method, w):
    """GFLOPs of a sample, and how often, in sequence, each flow block runs its layers."""
    calls = []
    hooks = [b.proj_out.register_forward_hook(lambda *_: calls.append(1)) for b in sampler.flow.blocks]
    with torch.compiler.set_stance("force_eager"), sdpa_kernel(SDPBackend.MATH), FlopCounter() as counter:
        call(sampler, method, *noise_and_labels(sampler, 1), w)
    for hook in hooks:
        hook.remove()
    return counter.total / 1e9, len(calls) / len(sampler.flow.blocks)


def measure(sampler, method, n, w):
    """Milliseconds a sample in a batch of n: the median of five calls."""
    z, y = noise_and_labels(sampler, n)
    times = []
    for _ in range(6):  # the first call warms up
        start = time.perf_counter()
        call(sampler, method, z, y, w).sum().item()  # .item() waits for the device
        times.append(time.perf_counter() - start)
    return 1e3 * np.median(times[1:]) / n


def speed_table(sampler, args):
    """A row for each method as soon as it is measured. "layers" counts the Transformer layers evaluated one after
    another: they make the latency at batch 1. The ratios are to the first row's times."""
    w, flow, reverse = args.guidance[0], sampler.flow, sampler.reverse
    methods = ["biflow", "biflow-2nfe"] * (reverse is not None) + ["exact", "jacobi", "exact+score"]
    methods += ["VAE decode"] * bool(sampler.run["vae"])
    heads = f"{'params M':>10}{'GFLOPs':>9}{'rounds':>8}{'layers':>8}"
    print(f"{'':12}{heads}" + "".join(f"{f'ms, batch {n}':>15}{'ratio':>8}" for n in (1, args.batch)))
    base, counts = {}, {method: count(sampler, method, w) for method in methods}
    if args.compile and sampler.device.type == "cuda":  # at batch 1 the launches would take longer than the kernels
        for block in flow.blocks:
            block.step = Replay(block.step)
            block.jacobi_step = Replay(block.jacobi_step)
        if reverse is not None:
            reverse.sample = Replay(reverse.sample)
            reverse.sample_two_pass = Replay(reverse.sample_two_pass)
    for method in methods:
        net = reverse if method.startswith("biflow") else flow if method != "VAE decode" else None
        params = f"{sum(p.numel() for p in net.parameters()) / 1e6:.1f}" if net else ""
        flops, rounds = counts[method]
        blocks = len(net.blocks) + net.config.blocks * (method == "biflow-2nfe") if net else 0
        layers = f"{blocks * net.config.layers * max(1, rounds):.0f}" if net else ""
        print(f"{method:12}{params:>10}{flops:9.3g}{rounds:8.4g}{layers:>8}", end="", flush=True)
        for n in (1, args.batch):
            try:
                ms = measure(sampler, method, n, w)
                print(f"{ms:15.3f}{ms / base.setdefault(n, ms):8.1f}", end="", flush=True)
            except torch.OutOfMemoryError:
                print(f"{'out of memory':>23}", end="")
        print()


def random_sampler(size, device, args):
    """Networks of a size with random weights, which cost what trained ones do; for latents also SD's VAE."""
    sampler = Sampler(TARFlow(SIZES[size]), BiFlow(SIZES[size]), dict(sigma=0.3, vae=None), device, args)
    for block in sampler.flow.blocks:
        torch.nn.init.normal_(block.proj_out.weight, std=0.01)  # at zero, Jacobi would need a single round
    if SIZES[size].channels == 4:
        from diffusers import AutoencoderKL

        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        ).to(device).to(memory_format=torch.channels_last).requires_grad_(False)  # fmt: skip
        sampler.run["vae"] = "random"
        sampler.decoder = lambda x: vae.decode(x).sample
    return sampler


# ----------------------------------------------------------------------------------------------------------------------
# Command line


def parse(argv):
    parser = argparse.ArgumentParser(description="Quality and cost of runs, of a folder of images or of an .npz.")
    add, on_off = parser.add_argument, argparse.BooleanOptionalAction
    add("inputs", nargs="*", help="run folders, or one folder or .npz of images (runs/reverse-toy)")
    add("--method", choices=METHODS, action="append", help="repeatable (all of the run's; photographs: the last)")
    add("--n", "--samples", type=int, help="samples (small images 1000 or 10000, others 50000; torchrun: --samples)")
    add("--draws", type=int, default=5, help="small images: independent draws, for the spread (%(default)s)")
    add("--guidance", type=float, nargs="+", default=[0.0], metavar="W", help="guidance scales (0)")
    add("--seed", type=int, default=0, help="of z (%(default)s)")
    add("--batch", type=int, default=256, help="images at a time (%(default)s)")
    add("--img-size", type=int, help="crop folders of images to this size (the run's, or 256)")
    add("--num-workers", type=int, default=4, help="processes that read images (%(default)s)")
    add("--reference", type=Path, help=".npz with mu and sigma, or images as a folder or .npz")
    add("--save-stats", type=Path, help="write mu and sigma of the input, to be a --reference later")
    add("--inception-weights", help="torch-fidelity's Inception-v3 (its download)")
    add("--speed", action="store_true", help="the cost of each method, instead of its quality")
    add("--size", choices=SIZES, help="of --speed: random weights of this size, in place of a run")
    add("--compile", action=on_off, help="torch.compile (on CUDA)")
    add("--bf16", action=on_off, help="bfloat16 autocast (on CUDA)")
    args = parser.parse_args(argv)
    if args.size and (not args.speed or args.inputs):
        fail("--size belongs to --speed without a run")
    if args.speed and (args.save_stats or args.reference or args.method or len(args.guidance) > 1 or WORLD > 1):
        fail("--speed is of all methods, with one --guidance, on one process, without --save-stats and --reference")
    args.inputs = args.inputs or ["runs/reverse-toy"]
    if min(args.batch, args.draws) < 1 or args.n is not None and args.n < 4:
        fail("--n must be at least 4, --batch and --draws at least 1")
    return args


def main(argv=None):
    args = parse(argv)
    device = setup(args)
    check_output(args.save_stats, ".npz")
    sources = [Path(path).resolve() for path in (*args.inputs, args.reference) if path]
    if args.save_stats and args.save_stats.resolve() in sources:
        fail(f"--save-stats {args.save_stats} would overwrite what it is made of")
    first = Path(args.inputs[0])
    if args.speed and args.size:
        return speed_table(random_sampler(args.size, device, args), args)
    images = not (first / "run.json").exists() and first.exists()
    if len(args.inputs) > 1 and (images or args.speed):
        fail("give several runs, or one folder or .npz of images, or one run for --speed")
    if images and not args.speed:
        source = images_of(first, load_npz(first)) if first.is_file() else first
        args.img_size = source.shape[1] if first.is_file() else args.img_size or 256
        return score_images({first: image_batches(source, args)}, args, device)
    samplers = {folder: Sampler.load(folder, device, args) for folder in args.inputs}
    sampler = samplers[args.inputs[0]]
    for each in samplers.values():
        for method in args.method or each.methods:
            for w in args.guidance:
                each.check(method, w)
    if args.speed:
        sampler.check("exact", 0.0)
        return speed_table(sampler, args)
    if len({(each.run["data"], each.run["img_size"]) for each in samplers.values()}) > 1:
        fail("runs of different data, or sizes of images, have no common reference; give them one at a time")
    if sampler.run["data"] in ("digits", *TORCHVISION):
        if args.reference or args.save_stats:
            fail("small images have their own reference; --reference and --save-stats are for photographs")
        if WORLD > 1:
            fail("small images are scored by one process; leave out torchrun")
        return quality_table(samplers, args)
    args.n, args.img_size = args.n or 50_000, sampler.run["img_size"]
    sources = {}
    for folder, each in samplers.items():
        for m, w in itertools.product(args.method or each.methods[-1:], args.guidance):
            sources[f"{folder} {m} w={w:g}"] = sample_batches(each, m, w, args)
    if args.save_stats and len(sources) > 1:
        fail("--save-stats is for one run, --method and --guidance")
    score_images(sources, args, device)


if __name__ == "__main__":
    run_script(main)
