"""Stage 1: train the flow F by maximum likelihood. Below it, what both stages share.

    python train_forward.py                                                       # handwritten digits, any machine
    python train_forward.py --size S                                              # MNIST: a laptop, or any GPU
    torchrun --nproc-per-node 8 train_forward.py --size B --data IMAGENET/train   # latents of ImageNet at 256 x 256

Contents: stage 1, training loop, flags, run folders.
"""

import argparse
import copy
import dataclasses
import functools
import json
import math
import os
import signal
import threading
import time
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from biflow import SIZES, TARFlow, autocast, compile_blocks, nll_loss
from data import (
    DATA_SETS,
    Batch,
    Batches,
    gather,
    held_out,
    load_data,
    patch_size_for,
    sum_over_processes,
    to_device,
    validation_batches,
    write_aside,
)
from sample import RANK, WORLD, barrier, fail, load_decoder, run_script, sample_noise, save_grid, setup

# Training settings of each size; a flag overrides them. Those of toy and S are ours, the others the authors':
# 640 epochs of 1251 steps, after a warm-up of 20.
TOY = dict(
    data="digits", vae="none", steps=800, batch_size=128, lr=3e-3, weight_decay=0.3, warmup=100, schedule="cosine",
    log_every=25, save_every=400, num_workers=0, compile=False,  # which would take longer than the training
)  # fmt: skip
IMAGENET = dict(
    data=None, vae="stabilityai/sd-vae-ft-mse", steps=800_000, batch_size=1024, micro_batch=32, lr=4e-4,
    weight_decay=0.0, warmup=25_000, schedule="constant", log_every=100, save_every=5000, num_workers=4,
)  # fmt: skip
S = TOY | dict(data="mnist", steps=3000, batch_size=128, lr=2e-3, weight_decay=0.01, save_every=1000)
PRESETS = {"toy": TOY, "S": S, "B": IMAGENET, "L": IMAGENET, "XL": IMAGENET | dict(micro_batch=8)}  # should fit 24 GB

# ----------------------------------------------------------------------------------------------------------------------
# Stage 1


def forward_loss(net, batch, args):
    """Negative log-likelihood of x~ = x + sigma * eps; some labels are dropped, so that F is also unconditional."""
    y = torch.where(batch.drop < args.label_drop, -1, batch.y)
    with autocast(batch.x.device, args.bf16):
        states, logdet = net(batch.x + args.sigma * batch.eps, y)
    norms = {f"rms_x{i}": state.detach().square().mean((1, 2)).sqrt() for i, state in enumerate(states)}
    return nll_loss(states[-1], logdet), norms


@torch.no_grad()
def evaluate(flow, data, decode, device, args):
    """Validation NLL in nats per dimension, and rows of images for a grid."""
    nll = []
    for batch in validation_batches(data, device):
        nll.append(-flow.log_prob(batch.x + args.sigma * batch.eps, batch.y) / batch.x[0].numel())
    x, y = batch.x[:16], batch.y[:16]
    z = sample_noise(args.seed, range(len(y)), flow.config).to(device)
    return {"val_nll": torch.cat(nll).mean().item()}, {"real": decode(x), "exact inverse": decode(flow.inverse(z, y))}


def main(argv=None):
    parser = shared_flags("Stage 1 of BiFlow: train the flow F (TARFlow) by maximum likelihood.")
    clip_help = "bound c on (alpha, mu), or none (3; 1 from size B up)"
    parser.add_argument("--clip", type=float_or_none, default=argparse.SUPPRESS, help=clip_help)
    args = parse_args(parser, PRESETS, argv)
    args.out = args.out or Path(f"runs/forward-{args.size}")
    device = setup(args)
    data = load_data(args, device)
    if args.sigma is None:
        args.sigma = 0.3 if data.info["vae"] else 0.1  # [ours]
    channels, side, _ = data.array.shape[-3:]
    shape = dict(channels=channels, img_size=side, patch_size=patch_size_for(side, args))
    clip = dict(clip=args.clip) if "clip" in args else {}
    config = config_of(args.size, **shape, num_classes=len(data.info["classes"]), **clip)
    args.clip = config.clip
    args.patch_size = config.patch_size
    torch.manual_seed(args.seed)
    model = TARFlow(config)
    run = dict(data.info, stage="forward", sigma=args.sigma)
    decode = load_decoder(run, device, args.bf16)
    loss = functools.partial(forward_loss, args=args)
    train(args, device, model, run, data, loss, lambda ema: evaluate(ema, data, decode, device, args))


def config_of(size, **fields):
    """A size's Config, fitted to the data and the flags."""
    try:
        return dataclasses.replace(SIZES[size], **fields)
    except ValueError as error:
        fail(error)


# ----------------------------------------------------------------------------------------------------------------------
# The training loop


def train(args, *others):
    """train_loop, after which the signal handlers are as before and the run folder is free, however it ends."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        train_loop(args, *others)
    finally:
        run_locks.pop(args.out, None)
        for number, handler in before.items():
            handle_stop_signals(handler, [number])


def train_loop(args, device, model, run, data, loss_fn, evaluate):
    """Train `model`, keep an average of its weights, and write both to the run folder.

    loss_fn(net, batch) -> (mean loss, {name: (n,) values to log});  evaluate(ema) -> ({name: float}, {label: images})
    """
    # Re-enter the run folder, if it holds a run:
    state = open_run(args, run, data)
    start, skipped = (state["step"], state["skipped"]) if state else (0, 0)

    # Create the average of the weights and the optimizer:
    model.to(device)
    ema = copy.deepcopy(model).requires_grad_(False)
    parts = dict(model=model, ema=ema, optimizer=make_optimizer(model, args))
    for name in parts if state else ():
        parts[name].load_state_dict(state[name])
    if state and RANK == 0:
        save_model(args, run, ema, start)  # a kill may have come between the checkpoint and these
    del state  # it is as large as the three together

    # Compile, and distribute over processes:
    if args.compile:
        compile_blocks(model)
    net = DistributedDataParallel(model, gradient_as_bucket_view=True) if WORLD > 1 else model
    loader = DataLoader(
        Batches(data, args.batch_size, args.seed), batch_size=None, sampler=range(start, args.steps),
        num_workers=args.num_workers, collate_fn=Batch._make, worker_init_fn=ignore_stop_signals,
    )  # fmt: skip
    bar = tqdm(loader, total=args.steps, initial=start, desc=args.out.name, disable=RANK > 0, mininterval=1)
    asked, in_a_row, totals, since, clock = [], 0, {}, start, time.perf_counter()
    handle_stop_signals(lambda number, frame: asked.append(number))
    for step, batch in enumerate(bar, start):
        # Add up the gradients of the micro-batches:
        micro_batches = to_device(batch, device).split(args.micro_batch or args.batch_size)
        for i, micro_batch in enumerate(micro_batches):
            net.require_backward_grad_sync = i == len(micro_batches) - 1  # DDP: exchange them after the last one only
            loss, values = loss_fn(net, micro_batch)
            n = len(micro_batch.y)
            (loss * n * WORLD / args.batch_size).backward()  # DDP takes the mean over the processes
            for name, value in {"loss": loss.detach().expand(n), **values}.items():
                totals[name] = totals.get(name, 0.0) + value.sum()

        # Update the weights. The fused kernel itself skips a step whose gradient is not finite:
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        skip = (~norm.isfinite()).float()
        update(parts, step, skip, args)
        skip, stopping = sum_over_processes(torch.stack([skip, torch.full_like(skip, len(asked))])).tolist()
        done = step + 1
        in_a_row = in_a_row + 1 if skip else 0
        if skip:  # its values are not finite either
            skipped += 1
            totals, since, clock = {}, done, time.perf_counter()
            if in_a_row == 5:
                fail(f"step {done}: five gradients in a row are not finite; {args.out} keeps its last checkpoint")

        # Log:
        if totals and (done % args.log_every == 0 or done == args.steps):
            means = sum_over_processes(torch.stack(list(totals.values()))) / ((done - since) * args.batch_size)
            line = dict(zip(totals, means.tolist()), lr=learning_rate(step, args), grad_norm=norm.item())
            speed = (done - since) * args.batch_size / (time.perf_counter() - clock)
            log(args, step=done, **line, skipped=skipped, images_per_s=round(speed, 1))
            shown = "error_x" if "error_x" in line else "loss"  # adaptive weights hide the progress in stage 2's loss
            bar.set_postfix_str(f"{shown} {line[shown]:.4f}, {speed:.0f} images/s")
            totals, since, clock = {}, done, time.perf_counter()

        # Save, and look at the result:
        if done % args.save_every == 0 or done == args.steps or stopping:
            pause = time.perf_counter()
            if RANK == 0 and not args.benchmark:
                save_checkpoint(args, run, parts, done, skipped)
                if not stopping or done == args.steps:
                    report(args, done, *evaluate(ema), bar)
            barrier()
            clock += time.perf_counter() - pause
        if stopping:
            if RANK == 0:
                bar.write(f"stopped at step {done}; the same command goes on from there")
            break
    if args.benchmark and RANK == 0 and done == args.steps:
        memory = f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if device.type == "cuda" else ""
        print(f"{WORLD} x {device.type}: {speed:.1f} images/s, {1e3 * args.batch_size / speed:.1f} ms a step{memory}")


def make_optimizer(model, args):
    """AdamW. Neither vectors nor embeddings decay."""
    decayed = [p for name, p in model.named_parameters() if p.ndim >= 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim < 2 or "embed" in name]
    groups = [dict(params=decayed, weight_decay=args.weight_decay), dict(params=others, weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)


def learning_rate(step, args):
    """Linear warm-up, then constant, or half a cosine down to zero."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    progress = (step - args.warmup) / max(1, args.steps - args.warmup)
    return args.lr * (0.5 * (1 + math.cos(math.pi * progress)) if args.schedule == "cosine" else 1.0)


@torch.no_grad()
def update(parts, step, skip, args):
    """One step of the optimizer, which its kernel leaves out if `skip`, a tensor, is 1, and one of the average, whose
    decay warms up, so that the first steps do not dominate a short run's."""
    optimizer = parts["optimizer"]
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, args)
    optimizer.found_inf = skip
    optimizer.step()
    optimizer.zero_grad()
    decay = min(args.ema, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(parts["ema"].parameters()), list(parts["model"].parameters()), 1 - decay)


STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)  # Ctrl-C, and what schedulers send


def handle_stop_signals(handler, numbers=STOP_SIGNALS):
    if threading.current_thread() is threading.main_thread():  # Python allows handlers in no other
        for number in numbers:
            signal.signal(number, handler)


def ignore_stop_signals(worker):
    """Workers ignore them: schedulers signal the whole process group, but the current step still needs its batch."""
    handle_stop_signals(signal.SIG_IGN)


# ----------------------------------------------------------------------------------------------------------------------
# Flags

# What decides a run's weights. Those of the schedule may change when a run goes on.
MODEL_FLAGS = (
    "size", "img_size", "patch_size", "vae", "sigma", "batch_size", "weight_decay", "ema", "label_drop", "seed", "clip",
    "strategy", "denoise", "trajectory_norm", "adaptive_p", "w_max", "lpips", "convnext", "features",
)  # fmt: skip
SCHEDULE_FLAGS = ("steps", "lr", "warmup", "schedule")

LEAST = dict(
    steps=1, batch_size=WORLD, micro_batch=1, img_size=1, patch_size=1, log_every=1, save_every=1, num_workers=0,
    warmup=0, lr=0, weight_decay=0, ema=0, label_drop=0, sigma=0, seed=0,
)  # fmt: skip


def shared_flags(description):
    parser = argparse.ArgumentParser(description=description)
    add, on_off = parser.add_argument, argparse.BooleanOptionalAction
    add("--size", choices=SIZES, default="toy", help="of the networks; --size B --help has B's defaults (%(default)s)")
    add("--data", help=f"{DATA_SETS}, a folder of images or of class folders, or a cache (%(default)s)")
    add("--img-size", type=int, help="side of the images of a folder (256 with a VAE, 32 without)")
    add("--patch-size", type=int, help="side of a patch (4 for 28 pixels, else 2, or more to have at most 256 tokens)")
    add("--vae", help="name or folder of a diffusers AutoencoderKL, or none for pixels (%(default)s)")
    add("--sigma", type=float, help="noise on F's inputs (0.3 on latents, 0.1 on pixels; stage 2: the flow's)")
    add("--out", type=Path, help="run folder (runs/STAGE-SIZE)")
    add("--steps", type=int, help="training steps (%(default)s)")
    add("--batch-size", type=int, help="images in a step, over all processes (%(default)s)")
    add("--micro-batch", type=int, help="images on one device at a time, to save memory; None: all (%(default)s)")
    add("--lr", type=float, help="peak learning rate of AdamW (%(default)s)")
    add("--weight-decay", type=float, help="of matrices that are not embeddings (%(default)s)")
    add("--warmup", type=int, help="steps of linear warm-up (%(default)s)")
    add("--schedule", choices=("cosine", "constant"), help="the learning rate after the warm-up (%(default)s)")
    add("--ema", type=float, default=0.9999, help="decay of the weights' average (%(default)s)")
    add("--label-drop", type=float, default=0.1, help="share of labels dropped, for guidance (%(default)s)")
    add("--num-workers", type=int, help="processes that load data (%(default)s)")
    add("--seed", type=int, default=0, help="of the weights and of all noise (%(default)s)")
    add("--benchmark", action="store_true", help="20 steps on random latents; print their cost, write nothing")
    add("--resume", metavar="CKPT", help="begin a new run from this checkpoint, or go back to an older one of --out")
    add("--fresh", action="store_true", help="start over; an existing run folder is renamed")
    add("--compile", action=on_off, help="torch.compile (on CUDA, from size B up)")
    add("--bf16", action=on_off, help="bfloat16 autocast (on CUDA)")
    add("--log-every", type=int, help="steps between lines of metrics.jsonl (%(default)s)")
    add("--save-every", type=int, help="steps between checkpoints, validations and grids (%(default)s)")
    return parser


def parse_args(parser, presets, argv):
    """Parse twice, since --size decides the defaults: `--size B --help` shows those of B."""
    only_size = argparse.ArgumentParser(add_help=False)
    only_size.add_argument("--size", choices=SIZES, default="toy")
    preset = presets[only_size.parse_known_args(argv)[0].size]
    parser.set_defaults(**preset)
    args = parser.parse_args(argv)
    for name, least in LEAST.items():
        value = getattr(args, name)
        if value is not None and not least <= value < math.inf:
            fail(f"--{name.replace('_', '-')} must be at least {least}, not {value}")
    if max(args.ema, args.label_drop) > 1:
        fail("--ema and --label-drop are shares, at most 1")
    if args.fresh and args.resume:
        fail("give --fresh to start over, or --resume CKPT with another --out")
    if args.benchmark:
        args.data = "random" if args.data == preset["data"] else args.data
        args.steps, args.log_every = 20, 10
    return args


def float_or_none(text):
    return None if text == "none" else float(text)


# ----------------------------------------------------------------------------------------------------------------------
# Run folders: config.json, model.safetensors (the averaged weights), run.json, checkpoint.pt, metrics.jsonl, pictures

run_locks = {}


def open_run(args, run, data):
    """Make or re-enter the run folder; returns the checkpoint to go on from, if there is one."""
    out = args.out
    run["args"] = {name: value for name, value in vars(args).items() if name in MODEL_FLAGS + SCHEDULE_FLAGS}
    run["args"] |= {name: data.info[name] for name in ("vae", "img_size")}  # also where a flag leaves them open
    if args.benchmark:
        return None
    try:
        if RANK == 0:
            strange = out.exists() and not (out / "real.pt").exists() and any(p.name != "lock" for p in out.iterdir())
            if args.fresh and strange:
                fail(f"{out} is no run folder; --fresh would rename it; give another --out")
            lock(out)
            if args.fresh and (out / "real.pt").exists():
                out.rename(next(p for i in range(1, 1000) if not (p := out.with_name(f"{out.name}.old-{i}")).exists()))
                lock(out)
        barrier()
        state = load_checkpoint(out, args.resume)
        if len(set(gather(state and state["step"]))) > 1:
            fail("the processes found different checkpoints; give an --out that all machines share")
        if state:
            refuse_changes(args, run, state)
        if RANK == 0:
            torch.save(held_out(data), out / "real.pt")
            kept = [line for line in read_metrics(out) if state and line["step"] <= state["step"]]
            write_aside(out / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in kept).encode())
    except OSError as error:
        fail(f"cannot write to {out} ({error.strerror}); give another --out")
    return state


def lock(out):
    """Make the folder, and have it for this process until that ends or is done with it. (Windows has no such lock.)"""
    out.mkdir(parents=True, exist_ok=True)
    if os.name == "posix":
        import fcntl

        run_locks[out] = open(out / "lock", "w")
        try:
            fcntl.flock(run_locks[out], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fail(f"another process is running in {out}; wait for it, or give another --out")
        except OSError:
            pass  # a file system without locks


def refuse_changes(args, run, state):
    """End where the flags or the data are not those of the checkpoint; the schedule's may change."""
    now = identity_of(run)
    changed = {k: f"{k}: {v} there, {now.get(k)} now" for k, v in state["args"].items() if v != now.get(k)}
    refused = "; ".join(change for name, change in changed.items() if name not in SCHEDULE_FLAGS)
    if refused:
        fail(f"the run was begun with other arguments ({refused}); --fresh starts over, --out goes elsewhere")
    if RANK == 0:
        print(f"{args.out}: going on from step {state['step']} of {args.steps}", *changed.values(), sep="; ")


def identity_of(run):
    """What a run is: a run that goes on must agree, but for its schedule."""
    return dict(stage=run["stage"]) | run["args"] | dict(data=run["identity"], flow=run.get("forward_hash"))


def load_checkpoint(out, resume):
    """The newest checkpoint that loads, or None if there is none. One elsewhere (--resume) only begins a run."""
    paths = [p for p in (out / "checkpoint.pt", out / "checkpoint.prev.pt") if p.exists()]
    if resume and (not paths or Path(resume).resolve().parent == out.resolve()):
        paths = [Path(resume)]
    for path in paths:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=os.name == "posix")
            assert "args" in state, "it is no checkpoint of a run"
            return state
        except Exception as error:  # zipfile, pickle and torch raise many kinds
            if RANK == 0:
                print(f"the checkpoint {path} is damaged or missing ({str(error).splitlines()[0]})")
    if paths or (out / "run.json").exists():
        fail(f"{resume or out} has no checkpoint that loads; --fresh starts over, --out goes elsewhere")


def save_checkpoint(args, run, parts, step, skipped):
    """checkpoint.pt, of which the one before is kept; then the averaged model and run.json."""
    out, names = args.out, ("checkpoint.pt", "checkpoint.prev.pt")
    state = {name: part.state_dict() for name, part in parts.items()}
    state |= dict(step=step, skipped=skipped, args=identity_of(run))
    try:
        write_aside(out / "checkpoint.next.pt", state)
        if (out / names[0]).exists():
            os.replace(out / names[0], out / names[1])
        os.replace(out / "checkpoint.next.pt", out / names[0])
        save_model(args, run, parts["ema"], step)
    except (OSError, RuntimeError) as error:  # a full disk is the one or the other, as torch's writer sees it
        fail(f"cannot save step {step} to {out}; is the disk full? Earlier checkpoints are whole ({error})")


def save_model(args, run, ema, step):
    aside = args.out / "saving"
    ema.save_pretrained(aside)
    for file in aside.iterdir():
        os.replace(file, args.out / file.name)
    aside.rmdir()
    write_aside(args.out / "run.json", json.dumps(run | dict(step=step), indent=2).encode())


def report(args, step, metrics, rows, bar):
    """Validation metrics, a grid of images and the curves."""
    log(args, step=step, **metrics)
    save_grid(args.out / f"samples-{step:07d}.png", rows)
    save_curves(args.out)
    bar.write(f"step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()))


def log(args, **line):
    if RANK == 0 and not args.benchmark:
        with open(args.out / "metrics.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")


def read_metrics(folder):
    """The lines of metrics.jsonl, but for one that a kill cut off."""
    path = folder / "metrics.jsonl"
    text = path.read_text(errors="replace") if path.exists() else ""
    return [json.loads(line) for line in text.splitlines() if line.startswith('{"step": ') and line.endswith("}")]


def save_curves(out):
    """curves.png: the unweighted error of each depth, or the NLL, over the steps."""
    from matplotlib.figure import Figure

    lines = read_metrics(out)
    errors = {name for line in lines for name in line if "error_" in name}
    axes = Figure(figsize=(7, 4), layout="tight").subplots()
    for name in sorted(errors or {"loss", "val_nll"}):
        points = [(line["step"], line[name]) for line in lines if name in line]
        axes.plot(*zip(*points), label=name, linewidth=2 if name.startswith("val_") else 1)
    axes.set(xlabel="step", ylabel="error" if errors else "nats per dimension")
    axes.set_yscale("log" if errors else "linear")
    axes.legend(fontsize=8)
    axes.figure.savefig(out / "curves.png", dpi=100)


if __name__ == "__main__":
    run_script(main)
