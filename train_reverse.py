"""Stage 2: freeze the flow F and learn its inverse G, which maps noise to clean data in one pass.

python train_reverse.py                                      # the inverse of runs/forward-toy
torchrun --nproc-per-node 8 train_reverse.py --size B        # data, VAE and sigma come from the forward run
"""

import contextlib
import dataclasses
import functools
import os
from argparse import BooleanOptionalAction
from pathlib import Path

import torch

from biflow import SIZES, BiFlow, FeatureDistance, PerceptualDistance, autocast, freeze, reverse_loss
from sample import RANK, fail, load_run, load_vae, or_fail, run_script, sample_noise, setup
from train_forward import PRESETS as FORWARD_PRESETS
from train_forward import load_classifier, load_data, parse_args, shared_flags, train, validation_batches

# As in stage 1, but for these; data, VAE and sigma come from the forward run.
PRESETS = {size: preset | dict(data=None, vae=None) for size, preset in FORWARD_PRESETS.items()}
PRESETS["toy"].update(steps=400, save_every=100, lr=1.2e-2, lpips=0.0, convnext=0.0)
PRESETS["S"].update(steps=1200, lr=4e-3, lpips=0.0, convnext=0.0)
for size, fits in (("B", 8), ("L", 8), ("XL", 2)):  # images at a time in 24 GB; 160 epochs, as in the paper's ablations
    PRESETS[size].update(micro_batch=fits, steps=200_000, lpips=0.4, convnext=0.1)  # the two weights are [dev]

CONVNEXT = "convnextv2_base.fcmae_ft_in22k_in1k"  # licence of these weights: CC-BY-NC-4.0


def draw_guidance(u, w_max):
    """Uniform numbers (n, 2) -> guidance scales (n,): zero for half of the samples, w_max u^2 for the others [ours]."""
    coin, share = u.unbind(1)
    return torch.where(coin < 0.5, w_max * share**2, 0.0)


def trajectory(flow, x, eps, y, args):
    """The frozen flow's states for x~ = x + sigma * eps, and the target of x': x where a block denoises, else x~."""
    noisy = x + args.sigma * eps
    with torch.no_grad(), autocast(x.device, args.bf16):
        states, _ = flow(noisy, y)
    return states, (x if args.denoise == "learned" else noisy)


def stage_2_loss(net, batch, flow, perceptual, args):
    """Align every state of G with the flow's trajectory, and its output with the image.

    F always keeps the label; G alone loses it at times [dev], so that G(h | none) is the mean over classes, from which
    guidance points away.
    """
    states, target = trajectory(flow, batch.x, batch.eps, batch.y, args)
    dropped = batch.drop < args.label_drop
    y = torch.where(dropped, -1, batch.y)
    w = draw_guidance(batch.guidance, args.w_max)  # G takes it as 0 where there is no class
    with autocast(batch.x.device, args.bf16):
        x_prime, predictions = net(states[-1], y, w)
        loss, errors = reverse_loss(x_prime, predictions, target, states, args.adaptive_p, args.trajectory_norm)
        if perceptual is not None:
            extra, distances = perceptual(x_prime, target, batch.crop)
            loss = loss + extra
            errors |= distances
    return loss, {f"error_{name}": value for name, value in errors.items()}


@torch.no_grad()
def evaluate(ema, flow, data, decode, device, args):
    """The unweighted errors on the validation split at w = 0, and rows of images for a grid."""
    sums, n = {}, 0
    for batch in validation_batches(data, device):
        states, target = trajectory(flow, batch.x, batch.eps, batch.y, args)
        x_prime, predictions = ema(states[-1], batch.y, 0.0)
        _, errors = reverse_loss(x_prime, predictions, target, states, trajectory_norm=args.trajectory_norm)
        for name, value in errors.items():
            sums[name] = sums.get(name, 0.0) + value.sum().item()
        n += len(batch.y)
    x, y = batch.x[:16], batch.y[:16]
    z = sample_noise(args.seed, range(len(y)), ema.config).to(device)
    rows = {"real": decode(x)}
    with autocast(device, args.bf16):
        rows["exact inverse"] = decode(flow.inverse(z, y))
        for w in sorted({0.0, args.w_max}):
            rows[f"BiFlow w={w:g}"] = decode(ema.sample(z, y, w))
    return {f"val_error_{name}": value / n for name, value in sums.items()}, rows


def load_perceptual(decode, data, args, device):
    """LPIPS (VGG-16 of torchvision) and ConvNeXt V2 (timm) for photographs, a small classifier's features for small
    images; without the terms whose weight is 0."""
    weights = dict(lpips=args.lpips, convnext=args.convnext, features=args.features)
    nets = {}
    size = 224
    with or_fail("cannot load the perceptual networks; --lpips 0 --convnext 0 goes on without them"):
        if args.lpips:
            import lpips

            nets["lpips"] = lpips.LPIPS(net="vgg", verbose=False)
        if args.convnext:
            import timm

            net = timm.create_model(CONVNEXT, pretrained=True, num_classes=0)
            nets["convnext"] = FeatureDistance(net, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # [ours]
    if args.features:
        if data.info["vae"] or not data.info["classes"]:
            fail("--features is for small images with classes; photographs have --lpips and --convnext")
        size = data.info["img_size"]  # the crops of all networks
        net = load_classifier(data, args.out.parent / "data")
        nets["features"] = FeatureDistance(net, (0.5,), (0.5,))
    return PerceptualDistance(decode, nets, weights, args.adaptive_p, size).to(device) if nets else None


def load_data_of(flow, run, args, device):
    """The flow's data, also if they were moved with the runs, or --data, which must be of the same kind."""
    of_flow = dict(sigma=run["sigma"], img_size=run["img_size"], patch_size=flow.config.patch_size)
    of_flow |= dict(vae=run["vae"] or "none", mirror=run.get("mirror", args.mirror))
    for name, value in of_flow.items():
        if getattr(args, name) not in (None, value):
            fail(f"--{name.replace('_', '-')} is the flow's, {value}")
        setattr(args, name, value)
    if args.data is None:
        caches = [Path(run["cache"]), args.forward.resolve().parent / Path(run["cache"]).name] if run["cache"] else []
        found = [str(cache) for cache in caches if cache.exists()]  # the second was moved with the runs
        args.data = found[0] if found else run["data"]
    data = load_data(args, device)
    if data.info["data"] == "random":
        args.lpips, args.convnext = 0.0, 0.0  # there is nothing to see
    classes = data.info["classes"]  # which the G of an unconditional flow ignores
    same = flow.config.num_classes in (0, len(classes)) and (run.get("classes") or classes) == classes
    if not same or data.array.shape[-3] != flow.config.channels:
        fail(f"{args.data} has other classes or channels than the flow's data, {run['data']}")
    if flow.config.num_classes and args.w_max > 0 and args.label_drop == 0:
        fail("guidance needs dropped labels, by which G learns of no class; give --label-drop, or --w-max 0")
    data.info |= {name: run[name] for name in ("mean", "std") if name in run}  # as F has learned them
    return data


def main(argv=None):
    parser = shared_flags("Stage 2 of BiFlow: learn the inverse G of a frozen flow F, with F's data, VAE and sigma.")
    add = parser.add_argument
    add("--forward", type=Path, metavar="RUN", help="the flow's run folder (runs/forward-SIZE)")
    add("--strategy", choices=("align", "naive", "hidden"), default="align", help="how G is supervised (%(default)s)")
    add("--denoise", choices=("learned", "none"), default="learned", help="with a denoise block or not (%(default)s)")
    add("--trajectory-norm", action=BooleanOptionalAction, default=True, help="divide each state by its RMS (on)")
    add("--adaptive-p", type=float, default=1.0, help="p of the adaptive weight (d + 0.01)^-p (%(default)s)")
    add("--w-max", type=float, default=1.0, help="train guidance scales in [0, W_MAX]; 0: no guidance (%(default)s)")
    add("--lpips", type=float, help="weight of LPIPS; 0: never loaded (%(default)s)")
    add("--convnext", type=float, help="weight of ConvNeXt V2 features; 0: never loaded (%(default)s)")
    add("--features", type=float, default=0.0, help="weight of a classifier's features, for small images (%(default)s)")
    args = parse_args(parser, PRESETS, argv)
    args.out = args.out or Path(f"runs/reverse-{args.size}")
    args.forward = args.forward or Path(f"runs/forward-{args.size}")
    if args.out.resolve() == args.forward.resolve():
        fail(f"--out {args.out} is the flow's run folder; give another")
    device = setup(args)
    flow, forward_run = load_run(args.forward, "forward")
    step, steps = forward_run["step"], forward_run["args"].get("steps", 0)
    if step < steps and RANK == 0:
        print(f"warning: {args.forward} is not finished: step {step} of {steps}")
    data = load_data_of(flow, forward_run, args, device)
    freeze(flow, device, args.bf16, args.compile)

    same = ("img_size", "channels", "patch_size", "num_classes", "blocks", "clip")
    fields = {name: getattr(flow.config, name) for name in same}
    fields |= dict(strategy=args.strategy, denoise=args.denoise, w_max=args.w_max)
    with or_fail("the flags do not fit together"):
        config = dataclasses.replace(SIZES[args.size], **fields)
    torch.manual_seed(args.seed % 2**64)
    model = BiFlow(config)
    run = dict(data.info, stage="reverse", sigma=args.sigma, forward_hash=forward_run["weights_hash"])
    run["forward"] = str(args.forward.resolve())
    with contextlib.suppress(ValueError):  # another drive of Windows has no relative path
        run["forward"] = os.path.relpath(run["forward"], args.out.resolve())
    decode = load_vae(run, device, args.bf16).decode
    perceptual = load_perceptual(decode, data, args, device)
    loss = functools.partial(stage_2_loss, flow=flow, perceptual=perceptual, args=args)
    look = functools.partial(evaluate, flow=flow, data=data, decode=decode, device=device, args=args)
    return train(args, device, model, data, run, loss, look)


if __name__ == "__main__":
    run_script(main)
