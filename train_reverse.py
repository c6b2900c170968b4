"""Stage 2: freeze the flow F and learn its inverse G, which maps noise to clean data in one pass.

python train_reverse.py                                      # the inverse of runs/forward-toy
torchrun --nproc-per-node 8 train_reverse.py --size B        # data, VAE and sigma come from the forward run
"""

import argparse
import dataclasses
import os
from pathlib import Path

import numpy as np
import torch

from biflow import SIZES, BiFlow, PerceptualDistance, TARFlow, reverse_loss
from train_forward import PRESETS as FORWARD_PRESETS
from train_forward import autocast, data_of, fail, freeze, load_data, load_decoder, load_run, load_weights, number
from train_forward import parse, parser_of, random_latents, sample_noise, script, start_processes, train
from train_forward import validation_batches, versions

# What a size trains with, where a flag does not say otherwise; all of it [ours] but the two perceptual weights.
PRESETS = {size: dict(preset, lpips=0.4, convnext=0.1) for size, preset in FORWARD_PRESETS.items()}
PRESETS["toy"].update(steps=1600, lr=1.2e-2, weight_decay=0.3, lpips=0.0, convnext=0.0)
for preset in PRESETS.values():
    for inherited in ("data", "vae"):
        preset.pop(inherited, None)

CONVNEXT = "convnextv2_base.fcmae_ft_in22k_in1k"  # licence of these weights: CC-BY-NC-4.0


def load_lpips(weights: str | None) -> torch.nn.Module:
    """LPIPS with its VGG-16: torchvision's weights, or those in a file with torchvision's names."""
    import lpips

    try:
        net = lpips.LPIPS(net="vgg", pnet_rand=weights is not None, verbose=False)
    except Exception as error:  # no network, no cache
        fail(f"LPIPS needs torchvision's VGG-16 weights ({error}); give --lpips-weights FILE, or --lpips 0")
    if weights is not None:
        state = {k.removeprefix("features."): v for k, v in load_weights(weights).items() if k.startswith("features.")}
        for part in (net.net.slice1, net.net.slice2, net.net.slice3, net.net.slice4, net.net.slice5):
            try:
                part.load_state_dict({k: state[k] for k in part.state_dict()})
            except (KeyError, RuntimeError) as error:
                fail(f"{weights} does not hold torchvision's VGG-16 ({str(error).splitlines()[0]})")
    return net


def load_convnext(weights: str | None) -> torch.nn.Module:
    """ConvNeXt V2 without its classifier, (N, 3, 224, 224) -> (N, 1024) pooled features: timm's weights, or a file's."""
    import timm

    try:
        net = timm.create_model(CONVNEXT, pretrained=weights is None, num_classes=0)
    except Exception as error:
        fail(f"cannot load {CONVNEXT} from the Hub ({error}); give --convnext-weights FILE, or --convnext 0")
    if weights is not None:
        state = {k: v for k, v in load_weights(weights).items() if not k.startswith("head.fc.")}
        try:
            net.load_state_dict(state)
        except RuntimeError as error:
            fail(f"{weights} does not hold timm's {CONVNEXT} ({' '.join(str(error).split())[:200]})")
    return net


def draw_guidance(u: torch.Tensor, w_max: float) -> torch.Tensor:
    """Uniform numbers (n, 2) -> guidance scales (n,): zero for half of the samples, w_max u^2 for the others [ours]."""
    return torch.where(u[:, 0] < 0.5, w_max * u[:, 1] ** 2, 0.0)


@script
def main(argv=None):
    parser = parser_of("reverse", "Stage 2 of BiFlow: learn the inverse G of a frozen flow F.", PRESETS)
    add, on_off, positive = parser.add_argument, argparse.BooleanOptionalAction, number(float, 0)
    add("--forward", type=Path, metavar="RUN", help="the flow's run folder (default: runs/forward-SIZE)")
    add("--strategy", choices=("align", "naive", "hidden"), default="align", help="how G is supervised (default: align)")
    help_ = "with a denoise block or without (default: learned)"
    add("--denoise", choices=("learned", "none"), default="learned", help=help_)
    help_ = "divide each state of the trajectory by its RMS, the paper's norm control, part two (default: on)"
    add("--trajectory-norm", action=on_off, default=True, help=help_)
    add("--adaptive-p", type=positive, default=1.0, help="p of the adaptive weight (D + 0.01)^-p (default: 1)")
    add("--w-max", type=positive, help="train guidance scales in [0, W_MAX]; 0: no guidance (default: the size's)")
    add("--lpips", type=positive, help="weight of LPIPS; 0: never loaded (default: 0.4, toy 0)")
    add("--convnext", type=positive, help="weight of ConvNeXt V2 features; 0: never loaded (default: 0.1, toy 0)")
    add("--lpips-weights", metavar="FILE", help="torchvision's vgg16 state dict (default: its download)")
    add("--convnext-weights", metavar="FILE", help=f"timm's {CONVNEXT} state dict (default: its download)")
    help_ = "perceptual terms at every K-th step only, there K times as heavy (default: 1)"
    add("--perceptual-every", type=number(int, 1), default=1, metavar="K", help=help_)
    args = parse(parser, PRESETS, argv)
    args.out = args.out or Path("runs") / f"reverse-{args.size}"
    args.forward = args.forward or Path("runs") / f"forward-{args.size}"
    args.w_max = SIZES[args.size].w_max if args.w_max is None else args.w_max
    processes = start_processes(args)

    synthetic = args.benchmark and args.size != "toy" and not args.forward.exists()
    if synthetic:
        data = random_latents(args.size)
        flow, forward_run = TARFlow(SIZES[args.size]), dict(data.info, sigma=0.3)
        args.lpips = args.convnext = 0.0  # there are no images to compare
    else:
        flow, forward_run = load_run(args.forward, "forward")
    vae = forward_run["vae"] if args.vae is None else None if args.vae == "none" else args.vae
    args.sigma = forward_run["sigma"] if args.sigma is None else args.sigma
    size = args.img_size or forward_run["img_size"]
    if not synthetic:
        data = load_data(args.data or data_of(forward_run), size, vae, args.out.parent, processes, args.num_workers)
    for name in ("vae", "img_size", "classes", "mean", "std"):
        has, needed = data.info[name], forward_run[name]
        same = np.allclose(has, needed, 1e-2, 1e-2) if name in ("mean", "std") and needed else has == needed
        if not same:
            fail(f"the data have {name} {has}, the flow was trained with {needed}; give its data")
    data.info |= {name: forward_run[name] for name in ("mean", "std")}  # a cache made anew differs in the last digits

    freeze(flow, processes.device, args.bf16, args.compile)
    fields = {k: getattr(flow.config, k) for k in ("img_size", "channels", "patch_size", "num_classes", "blocks", "clip")}
    torch.manual_seed(args.seed)
    model = BiFlow(
        dataclasses.replace(SIZES[args.size], **fields, strategy=args.strategy, denoise=args.denoise, w_max=args.w_max)
    )
    run = dict(data.info, stage="reverse", sigma=args.sigma, seed=args.seed, versions=versions())
    run["forward"] = os.path.relpath(args.forward, args.out)
    decode = load_decoder(run, processes.device)
    perceptual = None
    if args.lpips or args.convnext:
        nets = args.lpips and load_lpips(args.lpips_weights), args.convnext and load_convnext(args.convnext_weights)
        nets = (net or None for net in nets)
        perceptual = PerceptualDistance(decode, *nets, (args.lpips, args.convnext), args.adaptive_p).to(processes.device)

    def trajectory(x, eps, y):
        """The frozen flow's states for x~ = x + sigma eps, and the target of x': clean where a block denoises, or x~."""
        noisy = x + args.sigma * eps
        with torch.no_grad(), autocast(processes.device, args.bf16):
            return flow(noisy, y)[0], x if args.denoise == "learned" else noisy

    def compute_loss(net, batch, step):
        x, eps, y, u = batch
        dropped = u[:, 1] < args.label_drop  # for F and G alike, and without guidance
        w = torch.where(dropped, 0.0, draw_guidance(u[:, 2:4], args.w_max))
        y = torch.where(dropped.to(y.device), -1, y)
        states, target = trajectory(x, eps, y)
        with autocast(processes.device, args.bf16):
            x_prime, predictions = net(states[-1], y, w)
            loss, errors = reverse_loss(x_prime, predictions, target, states, args.adaptive_p, args.trajectory_norm)
            if perceptual is not None and step % args.perceptual_every == 0:
                extra, distances = perceptual(x_prime, target, u[:, 4:8].to(x.device, non_blocking=True))
                loss = loss + args.perceptual_every * extra
                errors |= distances
        return loss, {f"error_{name}": value for name, value in errors.items()}

    @torch.no_grad()
    def evaluate(ema):
        sums, n = {}, 0
        for batch in validation_batches(data, data.val):
            x, eps, y, _ = (t.to(processes.device) for t in batch)
            states, target = trajectory(x, eps, y)
            errors = reverse_loss(*ema(states[-1], y, 0.0), target, states, 0.0, args.trajectory_norm)[1]
            sums = {k: sums.get(k, 0) + v.sum() for k, v in errors.items()}
            n += len(y)
        x, y = x[:16], y[:16]
        z = sample_noise(args.seed, range(len(y)), ema.config).to(processes.device)
        with autocast(processes.device, args.bf16):
            rows = [("real", decode(x)), ("exact inverse", decode(flow.inverse(z, y)))]
        for w in sorted({0.0, args.w_max}):
            rows.append((f"BiFlow w={w:g}", decode(ema.sample(z, y, w))))
        return {f"val_error_{k}": v.item() / n for k, v in sums.items()}, rows

    train(args, processes, model, run, data, compute_loss, evaluate)


if __name__ == "__main__":
    main()
