"""Measure runs: quality (FD or FID, IS, precision, recall, coverage) and cost (parameters, GFLOPs, layers, time).

python fid.py                                                     # runs/reverse-toy, against held-out digits
python fid.py runs/align-0 runs/align-1 runs/naive-0 ...          # runs NAME-SEED share a row: mean and spread
python fid.py --speed --size B                                    # cost alone, with random weights
python fid.py IMAGENET/train --img-size 256 --save-stats ref.npz  # statistics of a reference, once
python fid.py runs/reverse-B --reference ref.npz                  # FID and IS of 50,000 samples
"""

import functools
import re
import time
from argparse import ArgumentParser, BooleanOptionalAction
from pathlib import Path

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader
from torch.utils.flop_counter import flop_registry
from tqdm import tqdm

from biflow import SIZES, BiFlow, CausalLayer, ReverseLayer, TARFlow
from sample import METHODS, Sampler, can_write, fail, flags, in_turn, or_fail, run_script, sample_noise, setup, to_uint8
from train_forward import TORCHVISION, list_images, load_digits, load_torchvision, read_images


def main(argv=None):
    args = parse(argv)
    device = setup(args)
    first = args.inputs[0]
    if args.save_stats and (len(args.inputs) > 1 or args.speed or args.save_stats in (first, args.reference)):
        fail("--save-stats is of one input, no file that is read, and not of --speed")
    can_write(args.save_stats)
    if args.size:
        return speed_table(random_sampler(args.size, device, args), args)
    if first.exists() and not (first / "run.json").exists():
        if len(args.inputs) > 1 or args.speed:
            fail("images are scored one folder or .npz at a time, without --speed")
        return score_images({first: image_batches(first, args)}, args, device)
    samplers = {folder: Sampler.load(folder, device, args) for folder in args.inputs}
    for sampler in samplers.values():
        for method in args.method or sampler.methods:
            for w in args.guidance:
                sampler.check(method, w)
    run = samplers[first].run
    if args.speed:
        return speed_table(samplers[first], args)
    if len({sampler.run.get("identity") for sampler in samplers.values()} - {None}) > 1:  # None: an imported flow
        fail("runs of different data have no common reference; give them one at a time")
    if run["data"] in ("digits", *TORCHVISION) and not (args.reference or args.save_stats):
        return quality_table(samplers, args)
    args.img_size = run["img_size"]
    sources = {}
    for folder, sampler in samplers.items():
        n = args.n or 50_000
        if n < sampler.config.num_classes:
            print(f"{n} samples leave out classes: there are {sampler.config.num_classes}")
        labels = in_turn(n, range(sampler.config.num_classes))
        for method in args.method or sampler.methods[-1:]:
            for w in args.guidance:
                images = map(to_uint8, sampler.draw(method, labels, w, args.seed, args.batch))
                sources[f"{folder} {method} w={w:g}"] = images
    score_images(sources, args, device)


def parse(argv):
    parser = ArgumentParser(description="Quality and cost of runs, of a folder of images or of an .npz.")
    add = parser.add_argument
    add("inputs", nargs="*", type=Path, default=[Path("runs/reverse-toy")], help="runs (NAME-SEED in a row), or images")
    add("--method", choices=METHODS, action="append", help="repeatable (all of the run's; photographs: the last)")
    add("--n", type=int, help="samples (small images 1000 or 10000, others 50000)")
    add("--draws", type=int, default=5, help="small images: independent draws, for the spread (%(default)s)")
    add("--guidance", type=float, nargs="+", default=[0.0], metavar="W", help="guidance scales (0)")
    add("--seed", type=int, default=0, help="of z (%(default)s)")
    add("--batch", type=int, default=256, help="images at a time (%(default)s)")
    add("--img-size", type=int, help="crop folders of images to this size (the run's, or 256)")
    add("--num-workers", type=int, default=4, help="processes that read images (%(default)s)")
    add("--reference", type=Path, help=".npz with mu and sigma, or images as a folder or .npz")
    add("--save-stats", type=Path, help="write mu and sigma of the input, to be a --reference later")
    add("--inception-weights", type=Path, help="torch-fidelity's Inception-v3 (its download)")
    add("--speed", action="store_true", help="the cost of each method, instead of its quality; compiled only if asked")
    add("--size", choices=SIZES, help="--speed of random weights of this size, in place of a run")
    add("--compile", action=BooleanOptionalAction, default=False, help="torch.compile (off)")
    add("--bf16", action=BooleanOptionalAction, help="bfloat16 autocast (on CUDA)")
    return flags(parser, argv, ("n", "draws", "batch", "img_size"))


# ----------------------------------------------------------------------------------------------------------------------
# Small images (digits, MNIST, CIFAR-10): a small classifier is to them what Inception is to photographs


class Judge:
    """The real images of a data set, and the metrics of others against its test split. Nothing is fitted on that."""

    def __init__(self, name, folder):
        self.data = load_digits() if name == "digits" else load_torchvision(name, folder)
        images = torch.from_numpy(self.data.array)
        if images.dtype != torch.uint8:
            images = to_uint8(images)
        pixels = images.flatten(1).numpy()
        self.fit = pixels[self.data.fit] / 255
        self.test = pixels[self.data.test] / 255
        self.weights = self.load_classifier(folder / f"judge-{name}.npz")
        self.test_features, _ = self.features(self.test)

    def load_classifier(self, path):
        """The weights of scikit-learn's MLP, fitted once. Of a large set it sees every second training image; the other
        half is for the perceptual distance's network."""
        if not path.exists():
            from sklearn.neural_network import MLPClassifier

            step, size, epochs = (2, 128, 20) if len(self.fit) > 10_000 else (1, 64, 400)
            net = MLPClassifier((size,), max_iter=epochs, random_state=0)
            net.fit(self.fit[::step], self.data.labels[self.data.fit][::step])
            path.parent.mkdir(parents=True, exist_ok=True)
            np.savez(path, *net.coefs_, *net.intercepts_)
        return load_npz(path).values()

    def features(self, x):
        """Pixels (n, d) in [0, 1] -> the classifier's hidden features, and logits (n, classes)."""
        w1, w2, b1, b2 = self.weights
        hidden = np.maximum(x @ w1 + b1, 0)
        return hidden, hidden @ w2 + b2

    def metrics(self, x, labels):
        """All metrics of images (n, d) in [0, 1] that were drawn for labels (n,)."""
        features, logits = self.features(x)
        to_training = torch.cdist(torch.from_numpy(x[:1000]).float(), torch.from_numpy(self.fit).float())
        return {
            "FD": frechet_distance(*moments(features), *moments(self.test_features)),
            "FD px": frechet_distance(*moments(x), *moments(self.test)),
            "IS": inception_score(logits, splits=1),
            "accuracy": (logits.argmax(1) == labels).mean() if labels.min() >= 0 else np.nan,
            # As many samples as there are real images, since recall and coverage depend on how many there are.
            **precision_recall_coverage(self.test_features, features[: len(self.test)]),
            "nearest": to_training.min(1).values.mean().item(),
        }

    def real_rows(self):
        """The test images against themselves, and training images against them: the floor."""
        labels = self.data.labels
        chosen = np.random.default_rng(0).permutation(len(self.fit))[: max(1000, len(self.test))]
        test = self.metrics(self.test, labels[self.data.test])
        floor = self.metrics(self.fit[chosen], labels[self.data.fit][chosen])
        return {"real: test": [test], "real: training": [floor | dict(nearest=np.nan)]}


def quality_table(samplers, args):
    """A row for each run, method and scale, and below it the standard deviation of its draws. Runs that differ in the
    last part of their name, the seed, share a row, and each counts with the mean of its draws."""
    first = next(iter(samplers))
    judge = Judge(samplers[first].run["data"], Path(first).resolve().parent / "data")
    rows = judge.real_rows()
    times = {}
    n = args.n or (1000 if len(judge.test) < 1000 else 10_000)
    if n < 4:
        fail(f"--n {n} is too small: metrics look at the third nearest neighbour")
    for folder, sampler in samplers.items():
        labels = in_turn(n, range(sampler.config.num_classes))  # and z: the same for every method
        for method in args.method or sampler.methods:
            for w in args.guidance if method.startswith("biflow") or args.method else [0.0]:
                draws = []
                for seed in range(args.seed, args.seed + args.draws):
                    images = torch.cat([to_uint8(x) for x in sampler.draw(method, labels, w, seed, args.batch)])
                    draws.append(judge.metrics(images.flatten(1).numpy() / 255, labels.numpy()))
                row = method + (f" w={w:g}" if w else "")
                if len(samplers) > 1:
                    row = re.sub(r"-\d+$", "", str(folder)) + " " + row
                    draws = [{name: np.mean([draw[name] for draw in draws]) for name in draws[0]}]
                rows.setdefault(row, []).extend(draws)
                times[row] = [f"{measure(sampler, method, n, w):.3g}" for n in (1, 256)]
    wide = max(map(len, rows)) + 1
    names = list(rows["real: test"][0])
    heads = ("FD", "FD px", "IS", "acc.", "prec.", "recall", "cover.", "near.")
    print(f"{'':{wide}}" + "".join(f"{head:>8}" for head in heads) + "  ms at 1  at 256")
    for row, draws in rows.items():
        cells = np.array([[draw[name] for name in names] for draw in draws])
        line = "".join(f"{x:8.3f}" for x in cells.mean(0)).replace("nan", "  -")
        print(f"{row:{wide}}{line}" + "".join(f"{x:>9}" for x in times.get(row, ())))
        if len(draws) > 1:
            print(f"{'  +-':{wide}}" + "".join(f"{x:8.3f}" for x in cells.std(0, ddof=1)))
    print(f"{args.draws} draws of {n} from seed {args.seed}; FD, prec., recall, cover. of a classifier's features")


# ----------------------------------------------------------------------------------------------------------------------
# Photographs, by Inception


def score_images(sources, args, device):
    """{name: batches} -> a line each, with all that its metrics depend on."""
    inception = load_inception(args.inception_weights, device)
    real = reference_statistics(args.reference, inception, args, device) if args.reference else None
    for name, batches in sources.items():
        logits = None if args.save_stats else []  # those of all ImageNet would take 5 GB
        fake = image_statistics(batches, inception, device, logits)
        size = fake["img_size"]
        metrics = {} if args.save_stats else {"IS": inception_score(np.concatenate(logits))}
        if args.save_stats:
            with open(args.save_stats, "wb") as file:
                np.savez(file, **fake)
        if real:
            if real.get("img_size", size) != size:
                fail(f"{args.reference} has images of {real['img_size']} pixels, {name} of {size}; give --img-size")
            metrics["FID"] = frechet_distance(fake["mu"], fake["sigma"], real["mu"], real["sigma"])
        shown = ", ".join(f"{metric} {value:.3f}" for metric, value in metrics.items())
        print(f"{name}: {shown} ({fake['n']} images of {size} x {size}, seed {args.seed}, reference {args.reference})")
    print("Inception-v3 of torch-fidelity; uint8 by round(127.5 x + 127.5); IS in 10 shuffled splits")


def load_npz(path):
    """The arrays of an .npz, by name."""
    with or_fail(f"cannot read {path}"), np.load(path) as arrays:
        return dict(arrays)


def image_batches(path, args):
    """A folder of images, or an .npz of uint8 arr_0 (n, S, S, 1 or 3) -> batches of uint8 (n, 3, S, S)."""
    if path.is_dir():
        files, _, _ = list_images(path)
        read = functools.partial(read_images, size=args.img_size or 256)
        loader = DataLoader(list(enumerate(files)), args.batch, num_workers=args.num_workers, collate_fn=read)
        for indices, pixels, marks in loader:
            if marks.max() > 1:
                fail(f"cannot read {files[indices[marks.argmax()]]}; repair or remove it")
            yield torch.from_numpy(pixels)
        return
    images = load_npz(path).get("arr_0", np.zeros((0, 0, 0, 0)))
    n, height, width, channels = images.shape if images.ndim == 4 else (0, 0, 0, 0)
    if n < 2 or channels not in (1, 3) or images.dtype != np.uint8:
        fail(f"{path} does not hold uint8 images arr_0 (n, S, S, 1 or 3), two or more of them")
    if height != width or args.img_size not in (None, width):
        fail(f"{path} holds images of {height} x {width}; they must be square, and of --img-size, if that is given")
    for part in torch.from_numpy(images).split(args.batch):
        yield part.permute(0, 3, 1, 2)


def load_inception(weights, device):
    """torch-fidelity's port of the Inception-v3 of FID: 2048 pooled features and the bias-free logits. The package
    unpickles its weights, so we make sure first that they are plain tensors."""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

    with or_fail(f"cannot load Inception's weights {weights or ''}; give --inception-weights FILE"):
        if weights is None:
            torch.hub.load_state_dict_from_url(URL_INCEPTION_V3, weights_only=True)  # and keeps them
        else:
            torch.load(weights, weights_only=True)
        options = dict(features_list=["2048", "logits_unbiased"], feature_extractor_weights_path=weights)
        return FeatureExtractorInceptionV3("inception-v3-compat", **options).to(device)


@torch.no_grad()
def image_statistics(batches, inception, device, logits=None):
    """Batches of uint8 images -> their moments, in float64. Their logits are appended to the list `logits`, if any."""
    n = 0
    total = 0.0
    products = 0.0
    for images in tqdm(batches, desc="Inception"):
        features, batch_logits = inception(images.expand(-1, 3, -1, -1).to(device))
        features = features.cpu().numpy().astype(np.float64)
        n += len(features)
        total = total + features.sum(0)
        products = products + features.T @ features
        if logits is not None:
            logits.append(batch_logits.cpu().numpy())
    mean = total / n
    covariance = (products - n * np.outer(mean, mean)) / (n - 1)
    return dict(mu=mean, sigma=covariance, img_size=images.shape[-1], n=n)


def reference_statistics(path, inception, args, device):
    """Of an .npz with mu and sigma (ADM's, pytorch-fid's, ours) or ref_mu and ref_sigma (iMF's), or of images."""
    arrays = {} if path.is_dir() else load_npz(path)
    arrays = {name.removeprefix("ref_"): value for name, value in arrays.items()}
    if "mu" not in arrays:
        return image_statistics(image_batches(path, args), inception, device)
    if arrays.get("sigma", np.zeros(0)).shape != (2048, 2048) or not np.isfinite(arrays["sigma"]).all():
        fail(f"mu and sigma of {path} are not those of Inception's 2048 features")
    return arrays


# ----------------------------------------------------------------------------------------------------------------------
# The metrics, as functions of features


def moments(x):
    return x.mean(0), np.cov(x, rowvar=False)


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1^1/2 S2 S1^1/2)^1/2), in float64; means (d,), covariances (d, d).

    In this symmetric form the matrix is positive semi-definite, so that its eigenvalues are real."""
    values, vectors = np.linalg.eigh(sigma1)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ sigma2 @ root).clip(min=0)).sum()
    return max(0.0, float(((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * cross))


def inception_score(logits, splits=10):
    """exp E KL(p(y|x) || p(y)) of logits (n, classes): mean over the splits, shuffled with a fixed seed."""
    from torch_fidelity.metric_isc import isc_features_to_metric

    return isc_features_to_metric(torch.from_numpy(logits), min(splits, len(logits)))["inception_score_mean"]


def precision_recall_coverage(real, fake, k=3):
    """Precision and recall (Kynkaanniemi et al. 2019), coverage (Naeem et al. 2020) of features (n, d) and (m, d).

    A ball reaches to the k-th nearest neighbour of its own kind. Precision: the share of fakes in a ball of the real
    ones. Recall: the share of the real ones in a ball of the fakes. Coverage: the share of the real ones' balls that
    hold a fake; unlike recall, it is not raised by a few outlying fakes, whose balls are wide."""
    real, fake = torch.from_numpy(real).float(), torch.from_numpy(fake).float()
    distances = torch.cdist(real, fake)  # (n, m)
    real_radii = torch.cdist(real, real).topk(k + 1, largest=False).values[:, -1:]
    fake_radii = torch.cdist(fake, fake).topk(k + 1, largest=False).values[:, -1]
    inside = distances <= real_radii  # the balls of the real ones
    shares = dict(precision=inside.any(0), recall=(distances <= fake_radii).any(1), coverage=inside.any(1))
    return {name: share.double().mean().item() for name, share in shares.items()}


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


def noise_and_labels(sampler, n):
    """z (n, T, D) and y (n,), on the device."""
    y = in_turn(n, range(sampler.config.num_classes))
    return sample_noise(0, range(n), sampler.config).to(sampler.device), y.to(sampler.device)


def count(sampler, method, w):
    """GFLOPs of a sample, and the Transformer layers that it evaluates one after another."""
    calls = []
    modules = [module for net in (sampler.flow, sampler.reverse) if net for module in net.modules()]
    layers = [module for module in modules if isinstance(module, (CausalLayer, ReverseLayer))]
    hooks = [layer.register_forward_hook(lambda *_: calls.append(1)) for layer in layers]
    with torch.compiler.set_stance("force_eager"), sdpa_kernel(SDPBackend.MATH), FlopCounter() as counter:
        sampler(method, *noise_and_labels(sampler, 1), w)
    for hook in hooks:
        hook.remove()
    return counter.total / 1e9, len(calls)


def measure(sampler, method, n, w):
    """Milliseconds a sample in a batch of n: the median of five calls."""
    z, y = noise_and_labels(sampler, n)
    times = []
    for _ in range(6):  # the first call warms up
        start = time.perf_counter()
        sampler(method, z, y, w).sum().item()  # .item() waits for the device
        times.append(time.perf_counter() - start)
    return 1e3 * np.median(times[1:]) / n


def speed_table(sampler, args):
    """A row for each method as soon as it is measured. "layers" counts the Transformer layers evaluated one after
    another: they make the latency at batch 1. The ratios are to the first row's times."""
    sampler.check("exact", 0.0)
    heads = "".join(f"{f'ms, batch {n}':>15}{'ratio':>8}" for n in (1, args.batch))
    print(f"{'':12}{'params M':>10}{'GFLOPs':>9}{'layers':>8}{heads}")
    base = {}
    for method in ("biflow", "biflow-2nfe", "exact", "jacobi", "exact+score"):
        net = sampler.reverse if method.startswith("biflow") else sampler.flow
        if net is None:
            continue
        flops, layers = count(sampler, method, args.guidance[0])
        params = sum(p.numel() for p in net.parameters()) / 1e6
        print(f"{method:12}{params:10.1f}{flops:9.3g}{layers:8}", end="", flush=True)
        for n in (1, args.batch):
            ms = measure(sampler, method, n, args.guidance[0])
            print(f"{ms:15.3f}{ms / base.setdefault(n, ms):8.1f}", end="", flush=True)
        print()
    print("compiled: BiFlow and the score step alone, which flatters their ratio" if args.compile else "not compiled")


def random_sampler(size, device, args):
    """Networks of a size with random weights, which cost what trained ones do."""
    sampler = Sampler(TARFlow(SIZES[size]), BiFlow(SIZES[size]), dict(sigma=0.3, vae=None), device, args)
    for block in sampler.flow.blocks:
        torch.nn.init.normal_(block.proj_out.weight, std=0.01)  # at zero, Jacobi would need a single round
    return sampler


if __name__ == "__main__":
    run_script(main)
