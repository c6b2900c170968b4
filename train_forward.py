"""Stage 1: train the flow F by maximum likelihood. Below it, what both stages share.

    python train_forward.py                                                       # handwritten digits, any machine
    python train_forward.py --size S                                              # MNIST: a laptop, or any GPU
    torchrun --nproc-per-node 8 train_forward.py --size B --data IMAGENET/train   # latents of ImageNet at 256 x 256

The randomness of a training step is a function of (seed, step, index in the global batch). A run therefore does not
depend on the number of processes or workers, and resuming needs no generator state.
"""

import contextlib
import copy
import dataclasses
import functools
import hashlib
import json
import math
import os
import shutil
import signal
import threading
import time
from argparse import SUPPRESS, ArgumentParser, BooleanOptionalAction
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as nnf
from filelock import FileLock, Timeout
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from biflow import SIZES, TARFlow, autocast, compile_blocks, nll_loss, random_resized_crop
from sample import RANK, WORLD, fail, flags, load_vae, or_fail, read_image, run_script, sample_noise, save_grid, setup

# Training settings of each size; a flag overrides them. Those of toy and S are [ours]; of the others the VAE's name and
# micro_batch are, and the rest is [dev]: 640 epochs of 1251 steps, after a warm-up of 20.
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
        noisy = batch.x + args.sigma * batch.eps
        nll.append(-flow.log_prob(noisy, batch.y) / noisy[0].numel())
    x, y = batch.x[:16], batch.y[:16]
    z = sample_noise(args.seed, range(len(y)), flow.config).to(device)
    rows = {"real": decode(x), "exact inverse": decode(flow.inverse(z, y))}
    return {"val_nll": torch.cat(nll).mean().item()}, rows


def main(argv=None):
    parser = shared_flags("Stage 1 of BiFlow: train the flow F (TARFlow) by maximum likelihood.")
    parser.add_argument("--clip", type=float_or_none, default=SUPPRESS, help="bound on alpha and mu, or none (3; B: 1)")
    args = parse_args(parser, PRESETS, argv)
    args.out = args.out or Path(f"runs/forward-{args.size}")
    args.patch_size = args.patch_size or SIZES[args.size].patch_size
    args.clip = getattr(args, "clip", SIZES[args.size].clip)
    device = setup(args)
    data = load_data(args, device)
    if args.sigma is None:
        args.sigma = 0.3 if data.info["vae"] else 0.1  # [ours]

    channels, side, _ = data.array.shape[-3:]
    fields = dict(channels=channels, img_size=side, patch_size=args.patch_size, clip=args.clip)
    with or_fail("the flags and the data do not fit together"):
        config = dataclasses.replace(SIZES[args.size], num_classes=len(data.info["classes"]), **fields)
    torch.manual_seed(args.seed % 2**64)
    model = TARFlow(config)
    run = dict(data.info, stage="forward", sigma=args.sigma)
    decode = load_vae(run, device, args.bf16).decode
    loss = functools.partial(forward_loss, args=args)
    look = functools.partial(evaluate, data=data, decode=decode, device=device, args=args)
    return train(args, device, model, data, run, loss, look)


# ----------------------------------------------------------------------------------------------------------------------
# The training loop

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)  # Ctrl-C, and what schedulers send
ASKED_TO_STOP = []  # such signals, since a training began


@contextlib.contextmanager
def stop_signals():
    """Collect signals to stop, so that the loop can finish its step. (Python has its handlers in the main thread.)"""
    ASKED_TO_STOP.clear()
    numbers = STOP_SIGNALS if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, lambda number, frame: ASKED_TO_STOP.append(number)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@stop_signals()
def train(args, device, model, data, run, loss_fn, evaluate):
    """Train `model`, keep an average of its weights, and write both to the run folder, until the last step or a signal
    to stop. Returns the exit status, 0 or 128 + the signal.
    loss_fn(net, batch) -> mean loss, {name: (n,) values to log};  evaluate(ema) -> {name: float}, {label: images}"""
    # Re-enter the run folder, if it holds a run, with an average of the weights and the optimizer:
    args.out = args.out.resolve()
    lock = lock_folder(args.out)  # noqa: F841, it is held as long as this variable
    model.to(device)
    ema = copy.deepcopy(model).requires_grad_(False)
    parts = dict(model=model, ema=ema, optimizer=make_optimizer(model, args))
    start, skipped = open_run(args, run, data, parts)
    if sum_over_processes(torch.tensor(start, device=device)) != start * WORLD:
        fail(f"the processes find different checkpoints in {args.out}; all nodes must share this folder")

    # Compile, and distribute over processes:
    if args.compile:
        compile_blocks(model)
    net = DistributedDataParallel(model, gradient_as_bucket_view=True) if WORLD > 1 else model
    loader = DataLoader(
        Batches(data, args.batch_size, args.seed), batch_size=None, sampler=range(start, args.steps),
        num_workers=args.num_workers, collate_fn=Batch._make, worker_init_fn=ignore_stop_signals,
    )  # fmt: skip
    bar = tqdm(loader, total=args.steps, initial=start, desc=args.out.name, disable=RANK > 0, mininterval=1)
    bad_in_a_row = 0
    totals, seen, clock = {}, 0, time.perf_counter()  # since the last line of the log
    for step, batch in enumerate(bar, start):
        # Add up the gradients of the micro-batches:
        micro_batches = to_device(batch, device).split(args.micro_batch or args.batch_size)
        for i, micro_batch in enumerate(micro_batches):
            net.require_backward_grad_sync = i == len(micro_batches) - 1  # DDP: exchange them after the last one
            loss, values = loss_fn(net, micro_batch)
            n = len(micro_batch.y)
            (loss * n * WORLD / args.batch_size).backward()  # DDP takes the mean over the processes
            for name, value in {"loss": loss.detach().expand(n), **values}.items():
                totals[name] = totals.get(name, 0.0) + value.sum()
        seen += args.batch_size

        # Update the weights, unless the gradient is not finite:
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # [ours]
        bad = norm.isfinite().logical_not().to(norm.dtype)
        flags_of_step = torch.stack([bad, norm.new_full((), len(ASKED_TO_STOP))])
        not_finite, stopping = sum_over_processes(flags_of_step).tolist()  # the one time to wait for the device
        done = step + 1
        if not_finite:
            bad_in_a_row += 1
            skipped += 1
            totals, seen, clock = {}, 0, time.perf_counter()  # its values are not finite either
            if bad_in_a_row == 5:
                fail(f"step {done}: five gradients in a row are not finite; {args.out} keeps its last checkpoint")
        else:
            bad_in_a_row = 0
            update(parts, step, args)
        parts["optimizer"].zero_grad()

        # Log:
        if seen and (done % args.log_every == 0 or done == args.steps):
            means = sum_over_processes(torch.stack(list(totals.values()))) / seen
            line = dict(zip(totals, means.tolist()), lr=learning_rate(step, args), grad_norm=norm.item())
            speed = seen / (time.perf_counter() - clock)
            log(args.out, step=done, **line, skipped=skipped, images_per_s=round(speed, 1))
            shown = "error_x" if "error_x" in line else "loss"  # adaptive weights hide the progress in stage 2's loss
            bar.set_postfix_str(f"{shown} {line[shown]:.4f}, {speed:.0f} images/s")
            totals, seen, clock = {}, 0, time.perf_counter()

        # Save, and look at the result:
        if done % args.save_every == 0 or done == args.steps or stopping:
            pause = time.perf_counter()
            if RANK == 0:
                save_checkpoint(args.out, run, parts, done, skipped)
                if not stopping or done == args.steps:
                    report(args.out, done, *evaluate(ema), bar)
            barrier()
            clock += time.perf_counter() - pause
        if stopping and done < args.steps:
            if RANK == 0:
                bar.write(f"stopped at step {done} of {args.steps}; the same command goes on from there")
            return 128 + max(ASKED_TO_STOP, default=signal.SIGTERM)  # so that `a && b` does not go on to b
    return 0


def make_optimizer(model, args):
    """AdamW [dev]. Neither vectors nor embeddings decay."""
    decayed = [p for name, p in model.named_parameters() if p.ndim >= 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim < 2 or "embed" in name]
    groups = [dict(params=decayed, weight_decay=args.weight_decay), dict(params=others, weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)


def learning_rate(step, args):
    """Linear warm-up, then constant, or half a cosine down to zero."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    if args.schedule == "constant":
        return args.lr
    progress = (step - args.warmup) / max(1, args.steps - args.warmup)
    return args.lr * 0.5 * (1 + math.cos(math.pi * progress))


@torch.no_grad()
def update(parts, step, args):
    """One step of the optimizer, and of the average, whose decay warms up, so that it forgets the start [ours]."""
    for group in parts["optimizer"].param_groups:
        group["lr"] = learning_rate(step, args)
    parts["optimizer"].step()
    decay = min(args.ema, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(parts["ema"].parameters()), list(parts["model"].parameters()), 1 - decay)


def join_processes(device):
    if WORLD > 1 and not dist.is_initialized():
        cuda = device.type == "cuda"
        backend = "nccl" if cuda else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=1), device_id=device if cuda else None)


def barrier():
    if WORLD > 1:
        dist.barrier()


def sum_over_processes(x):
    if WORLD > 1:
        dist.all_reduce(x)
    return x


def lock_folder(out):
    """Refuse a second process in a run folder. The lock lies beside it, since --fresh renames the folder."""
    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out.with_name(f".{out.name}.lock"), timeout=0, thread_local=False, is_singleton=True)
    try:
        if RANK == 0:
            lock.acquire()
    except Timeout:
        fail(f"another process is running in {out}; wait for it, or give another --out")
    except (OSError, NotImplementedError):
        pass  # a file system without locks, or one that is read-only there
    return lock


def ignore_stop_signals(worker):
    """Workers ignore them: schedulers signal the whole process group, but the current step still needs its batch."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


# ----------------------------------------------------------------------------------------------------------------------
# Flags

# A run that goes on may change where it lies, how fast it goes, and its schedule. The rest decides the weights.
FREE_FLAGS = (
    "data", "out", "forward", "micro_batch", "num_workers", "resume", "fresh", "compile", "bf16", "log_every",
    "save_every", "defaults",
)  # fmt: skip
SCHEDULE_FLAGS = ("steps", "lr", "warmup", "schedule")


def shared_flags(description):
    parser = ArgumentParser(description=description)
    add = parser.add_argument
    add("--size", choices=SIZES, default="toy", help="of the networks; --size B --help has B's defaults (%(default)s)")
    add("--data", help=f"{DATA_SETS}, random, a folder of images or of class folders, or a cache (%(default)s)")
    add("--img-size", type=int, help="side of the images of a folder (256 with a VAE, 32 without)")
    add("--patch-size", type=int, help="side of a patch (2; of size S 4; stage 2: the flow's)")
    add("--vae", help="name or folder of a diffusers AutoencoderKL, or none for pixels (%(default)s)")
    add("--mirror", action=BooleanOptionalAction, help="mirror half of the images (folders, cifar10; or the flow's)")
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
    add("--resume", type=Path, metavar="CKPT", help="begin a new run from this checkpoint of another")
    add("--fresh", action="store_true", help="start over; an existing run folder is renamed")
    add("--compile", action=BooleanOptionalAction, help="torch.compile (on CUDA, from size B up)")
    add("--bf16", action=BooleanOptionalAction, help="bfloat16 autocast (on CUDA)")
    add("--log-every", type=int, help="steps between lines of metrics.jsonl (%(default)s)")
    add("--save-every", type=int, help="steps between checkpoints, validations and grids (%(default)s)")
    return parser


def parse_args(parser, presets, argv):
    """Parse twice, since --size decides the defaults: `--size B --help` shows those of B."""
    only_size = ArgumentParser(add_help=False)
    only_size.add_argument("--size", default="toy")
    size = only_size.parse_known_args(argv)[0].size
    parser.set_defaults(**presets.get(size, {}))
    positive = ("steps", "batch_size", "micro_batch", "log_every", "save_every", "img_size", "patch_size")
    args = flags(parser, argv, positive)
    args.defaults = {action.dest: action.default for action in parser._actions}
    if args.batch_size < WORLD or args.label_drop > 1 or args.ema > 1:
        fail(f"--batch-size must be {WORLD} or more, for each process an image, and --label-drop and --ema 1 or less")
    if args.warmup >= args.steps and RANK == 0:
        print(f"warning: the run ends in its --warmup of {args.warmup} steps, and never reaches --lr")
    if args.vae and Path(args.vae).expanduser().is_dir():
        args.vae = str(Path(args.vae).expanduser().resolve())  # one VAE, however its folder is spelled
    return args


def float_or_none(text):
    return None if text == "none" else float(text)


# ----------------------------------------------------------------------------------------------------------------------
# Run folders: config.json, model.safetensors (the averaged weights), run.json, checkpoint.pt, metrics.jsonl, pictures


def open_run(args, run, data, parts):
    """Re-enter the run folder, or begin anew. Returns the steps done, and how many of them were skipped."""
    out = args.out
    now = {name: value for name, value in vars(args).items() if name not in FREE_FLAGS}
    now |= {name: run[name] for name in ("stage", "vae", "img_size")}
    now |= dict(data=run["identity"], flow=run.get("forward_hash"))
    run["args"] = now
    if RANK == 0 and args.fresh and any((out / name).exists() for name in ("run.json", "real.pt")):
        out.rename(out.with_name(f"{out.name}.old-{time.time_ns()}"))
        out.mkdir(exist_ok=True)
    barrier()
    step, skipped = 0, 0
    state = load_checkpoint(out, args.resume)
    if state:
        there = {name: args.defaults.get(name) for name in now} | state["args"]  # a flag that is new had its default
        changed = [name for name in there if there[name] != now.get(name)]
        shown = "; ".join(f"{name}: {there[name]} there, {now.get(name)} now" for name in changed)
        if not set(changed).issubset(SCHEDULE_FLAGS):
            fail(f"the run was begun with other arguments ({shown}); --fresh starts over, --out goes elsewhere")
        step, skipped = state["step"], state["skipped"]
        if step > args.steps or (args.resume and step == args.steps and not (out / "run.json").exists()):
            fail(f"the checkpoint is at step {step} already, so that nothing would be trained; give more --steps")
        for name, part in parts.items():
            part.load_state_dict(state[name])
        if RANK == 0:
            print(f"{out}: going on from step {step} of {args.steps}", shown and f"({shown})")
            save_model(out, run, parts["ema"], step)  # a kill may have come between the checkpoint and these
    if RANK == 0:
        write_aside(out / "real.pt", held_out(data))
        kept = [line for line in read_metrics(out) if line["step"] <= step]
        write_aside(out / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in kept).encode())
    return step, skipped


def load_checkpoint(out, resume):
    """The newest checkpoint that loads, or None if there is none. One elsewhere (--resume) only begins a run."""
    paths = [path for path in (out / "checkpoint.pt", out / "checkpoint.prev.pt") if path.exists()]
    if resume and not paths:
        paths = [resume / "checkpoint.pt" if resume.is_dir() else resume]
    for path in paths:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=os.name == "posix")
            if "optimizer" not in state:
                raise ValueError("it is not a checkpoint")
            return state
        except Exception as error:  # zipfile, pickle and torch raise many kinds
            if RANK == 0:
                print(f"the checkpoint {path} is damaged or missing ({repr(error)[:200]})")
    if paths or (out / "run.json").exists():
        fail(f"{resume or out} has no checkpoint that loads; --fresh starts over, --out goes elsewhere")


def save_checkpoint(out, run, parts, step, skipped):
    """checkpoint.pt, of which the one before is kept; then the averaged model and run.json."""
    state = {name: part.state_dict() for name, part in parts.items()}
    state |= dict(step=step, skipped=skipped, args=run["args"])
    with or_fail(f"cannot save step {step} to {out}; is the disk full? Earlier checkpoints are whole"):
        write_aside(out / "checkpoint.next.pt", state)
        if (out / "checkpoint.pt").exists():
            os.replace(out / "checkpoint.pt", out / "checkpoint.prev.pt")
        os.replace(out / "checkpoint.next.pt", out / "checkpoint.pt")
        save_model(out, run, parts["ema"], step)


def save_model(out, run, ema, step):
    aside = out / "saving"
    ema.save_pretrained(aside)
    for name in ("config.json", "model.safetensors"):  # a README.md in `out` is the user's
        os.replace(aside / name, out / name)
    shutil.rmtree(aside)
    write_aside(out / "run.json", json.dumps(run | dict(step=step), indent=2).encode())


def write_aside(path, content):
    """Written under another name, flushed and renamed, so that a kill at any moment leaves a whole file."""
    new = path.with_name(path.name + ".new")
    with open(new, "wb") as file:
        torch.save(content, file) if isinstance(content, dict) else file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)


def report(out, step, metrics, rows, bar):
    """Validation metrics, a grid of images and the curves."""
    log(out, step=step, **metrics)
    save_grid(out / f"samples-{step:07d}.png", rows)
    save_curves(out)
    bar.write(f"step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()))


def log(out, **line):
    if RANK == 0:
        with open(out / "metrics.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")


def read_metrics(out):
    """The lines of metrics.jsonl, but for one that a kill cut off."""
    path = out / "metrics.jsonl"
    text = path.read_text(errors="replace") if path.exists() else ""
    return [json.loads(line) for line in text.splitlines() if line.startswith('{"step": ') and line.endswith("}")]


def save_curves(out):
    """curves.png: the unweighted error of each depth, or the NLL, over the steps."""
    os.environ.pop("MPLBACKEND", None)  # a notebook's may not exist here
    from matplotlib.figure import Figure

    lines = read_metrics(out)
    errors = {name for line in lines for name in line if "error_" in name}
    axes = Figure(figsize=(7, 4), layout="tight").subplots()
    for name in sorted(errors or {"loss", "val_nll"}):
        points = [(line["step"], line[name]) for line in lines if name in line]
        axes.plot(*zip(*points), label=name)
    axes.set(xlabel="step", yscale="log" if errors else "linear")
    axes.legend(fontsize=8)
    axes.figure.savefig(out / "curves.png", dpi=100)


# ----------------------------------------------------------------------------------------------------------------------
# Data, and batches of them

TRAIN, EVAL, ORDER = 0, 1, 3  # streams of randomness, beside sample.py's
TORCHVISION = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "cifar10": "CIFAR10"}
DATA_SETS = ", ".join(("digits", *TORCHVISION))


@dataclasses.dataclass
class Data:
    """Images or latents with labels and a fixed split. `info` is what has to travel with a model trained on them."""

    source: np.ndarray | Path  # the array, or the .npy file to map into memory
    labels: np.ndarray
    fit: np.ndarray  # indices to train on
    val: np.ndarray  # ... to make choices with
    test: np.ndarray  # ... to report metrics on
    augment: str  # mirror, jitter or none
    info: dict  # data, identity, cache, vae, img_size, classes, mirror, mean, std

    @property
    def array(self):
        return np.load(self.source, mmap_mode="r") if isinstance(self.source, Path) else self.source

    def batch(self, indices, keys, augment=False):
        """The samples of these indices, each with the random numbers of its key: a Batch of numpy arrays, which workers
        send without shared memory."""
        array = self.array  # the file is opened here, in the worker
        rows = []
        for i, key in zip(indices, keys):
            rng = np.random.default_rng(key)
            u = rng.random(14, np.float32)
            eps = rng.standard_normal(array.shape[-3:], np.float32)
            mirror = augment and self.augment == "mirror" and u[0] < 0.5
            x = self.prepare(array[i], mirror, rng)
            rows.append(Batch(x, eps, self.labels[i], drop=u[1], guidance=u[2:4], crop=u[4:8], jitter=u[8:]))
        batch = Batch(*map(np.stack, zip(*rows)))
        if augment and self.augment == "jitter":
            batch = batch._replace(x=jitter(torch.from_numpy(batch.x), torch.from_numpy(batch.jitter)).numpy())
        return batch

    def prepare(self, row, mirror, rng):
        """A row of the array -> what the models see, float32 (C, H, W). A VAE's posterior is sampled and normalised."""
        if self.info["vae"]:
            mean, logvar = row[int(mirror)].astype(np.float32)
            x = mean + np.exp(0.5 * logvar) * rng.standard_normal(mean.shape, np.float32)
            return (x - np.float32(self.info["mean"])) / np.float32(self.info["std"])
        x = row.astype(np.float32) / 127.5 - 1 if row.dtype == np.uint8 else row
        return x[:, :, ::-1] if mirror else x


class Batch(NamedTuple):
    """Samples with all the random numbers that a training step needs."""

    x: torch.Tensor  # (n, C, H, W), clean
    eps: torch.Tensor  # (n, C, H, W), Gaussian
    y: torch.Tensor  # (n,)
    drop: torch.Tensor  # (n,), uniform like the three below: whether the label is dropped
    guidance: torch.Tensor  # (n, 2): the guidance scale
    crop: torch.Tensor  # (n, 4): the perceptual distance's crop
    jitter: torch.Tensor  # (n, 6): how x was moved

    def split(self, size):
        return [Batch(*part) for part in zip(*(tensor.split(size) for tensor in self))]


class Batches(torch.utils.data.Dataset):
    """Item `step`: this process's share of the step's batch."""

    def __init__(self, data, batch_size, seed, rank=RANK, world=WORLD):
        self.data, self.seed = data, seed
        self.batch_size = batch_size
        self.slots = np.array_split(np.arange(batch_size), world)[rank].tolist()

    @functools.lru_cache(maxsize=2)
    def order(self, epoch):
        return np.random.default_rng((self.seed, ORDER, epoch)).permutation(self.data.fit)

    def __getitem__(self, step):
        n = len(self.data.fit)
        places = [step * self.batch_size + slot for slot in self.slots]
        indices = [self.order(place // n)[place % n] for place in places]
        return self.data.batch(indices, [(self.seed, TRAIN, step, slot) for slot in self.slots], augment=True)


def jitter(x, u):
    """Images (N, C, S, S) in [-1, 1] under small random affine maps, by u (N, 6): what mirroring is to photographs."""
    moved = (2 * u - 1) * torch.tensor([0.05, 0.05, 0.03, 0.05, 0.05, 0.03])
    grid = nnf.affine_grid(torch.eye(2, 3) + moved.view(-1, 2, 3), x.shape, align_corners=False)
    return nnf.grid_sample(x + 1, grid, mode="bicubic", align_corners=False).sub(1).clamp(-1, 1)


def to_device(batch, device):
    return Batch(*(torch.from_numpy(array).to(device) for array in batch))


def validation_batches(data, device, batch_size=256):
    """Fixed batches. A small set is repeated with other noise, so that metrics do not depend on one noise sample."""
    keys = [(repeat, EVAL, int(i)) for repeat in range(max(1, 1000 // len(data.val))) for i in data.val]
    for k in range(0, len(keys), batch_size):
        part = keys[k : k + batch_size]
        yield to_device(data.batch([i for _, _, i in part], part), device)


def held_out(data, n=20):
    """Up to n held-out samples, the classes in turn, to show beside generated ones."""
    labels = data.labels[data.test]
    of_class = [data.test[labels == label] for label in np.unique(labels)]
    in_turn = [members[k : k + 1] for k in range(n) for members in of_class]
    chosen = np.concatenate(in_turn)[:n].tolist()
    batch = data.batch(chosen, [(0, EVAL, i) for i in chosen])
    return dict(x=torch.from_numpy(batch.x), y=torch.from_numpy(batch.y))


def load_data(args, device):
    """`--data`: digits, a torchvision data set, random latents, a folder of images, or a cache that was made of one."""
    join_processes(device)  # the first one downloads, and they share the reading of images
    if args.data == "digits":
        data = load_digits()
    elif args.data in TORCHVISION:
        data = load_torchvision(args.data, args.out.parent / "data")
    elif args.data == "random":
        data = random_latents(SIZES[args.size])
    else:
        data = load_folder(args, device)
    vae = data.info["vae"] or "none"
    if args.vae not in (None, vae, args.defaults["vae"]) or args.img_size not in (None, data.info["img_size"]):
        fail(f"{args.data} is of --vae {vae} and --img-size {data.info['img_size']}; not of those given")
    args.defaults["mirror"] = data.augment == "mirror"
    if args.mirror is not None:
        data.augment = "mirror" if args.mirror else data.augment.replace("mirror", "none")
    args.mirror = data.info["mirror"] = data.augment == "mirror"
    if RANK == 0:
        kind = f"side {data.info['img_size']}, VAE {vae}, {len(data.info['classes']) or 'no'} classes, {data.augment}"
        epochs = f"{args.steps * args.batch_size / len(data.fit):,.1f} epochs on {WORLD} process(es)"
        print(f"{args.data}: {len(data.fit)} images and {len(data.val)} for validation, {kind}; {epochs}")
    return data


def data_info(name, side, classes):
    return dict(data=name, identity=name, cache=None, vae=None, img_size=side, classes=list(classes))


def load_digits():
    """scikit-learn's 1797 handwritten digits in [-1, 1]. Of every twelve of a class two are for test, one validates."""
    from sklearn import datasets

    digits = datasets.load_digits()
    images = (digits.images / 8 - 1).astype(np.float32)[:, None]
    labels = digits.target.astype(np.int64)
    place = np.zeros_like(labels)
    for label in range(10):
        members = np.flatnonzero(labels == label)
        place[members] = np.arange(len(members)) % 12
    val = np.flatnonzero(place == 4)
    test = np.flatnonzero((place == 1) | (place == 7))
    fit = np.setdiff1d(np.arange(len(labels)), [*val, *test])
    return Data(images, labels, fit, val, test, "jitter", data_info("digits", 8, "0123456789"))


def load_torchvision(name, root):
    """MNIST, Fashion-MNIST or CIFAR-10: 2,000 training images are for validation, the official test images for test."""
    from torchvision import datasets

    dataset = getattr(datasets, TORCHVISION[name])
    if RANK > 0:
        barrier()  # the first process downloads
    with or_fail(f"cannot load {name}; put the files of torchvision's {TORCHVISION[name]} into {root}"):
        train = dataset(root, train=True, download=True)
        test = dataset(root, train=False, download=True)
    if RANK == 0:
        barrier()
    images = np.concatenate([np.asarray(train.data), np.asarray(test.data)])
    images = images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
    labels = np.concatenate([np.asarray(train.targets), np.asarray(test.targets)]).astype(np.int64)
    n = len(train)
    val = np.linspace(0, n - 1, min(2000, n // 10)).astype(int)
    fit = np.setdiff1d(np.arange(n), val)
    test = np.arange(n, len(labels))
    augment = {"mnist": "jitter", "cifar10": "mirror"}.get(name, "none")
    classes = [name.partition(" - ")[0] for name in train.classes]  # "0 - zero" -> "0"
    return Data(images, labels, fit, val, test, augment, data_info(name, images.shape[-1], classes))


def random_latents(config):
    """Noise in the shape of a size's latents: enough to measure what a step costs."""
    side = config.img_size
    array = np.random.default_rng(0).standard_normal((64, config.channels, side, side), np.float32)
    everything = np.arange(64)
    info = data_info("random", side, map(str, range(config.num_classes)))
    return Data(array, np.zeros(64, np.int64), everything, everything, everything, "none", info)


# ----------------------------------------------------------------------------------------------------------------------
# Folders of images are read once, into a cache of uint8 pixels or of float16 VAE posteriors

IMAGE_TYPES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}
SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}


def list_images(root):
    """The images below a folder, their labels, and the classes: its sub-folders, if there are several. What is hidden
    is left out, links are followed, and what else is not read is counted in a line."""
    paths = []
    for folder, folders, names in os.walk(root, followlinks=True, onerror=fail):
        real = Path(folder).resolve()
        visible = [Path(folder, name) for name in folders if not name.startswith(".")]
        folders[:] = [path.name for path in visible if not real.is_relative_to(path.resolve())]  # no loops
        paths += [Path(folder, name).relative_to(root) for name in names if not name.startswith(".")]
    files = sorted(path for path in paths if path.suffix.lower() in IMAGE_TYPES)
    classes = sorted({file.parts[0] for file in files if len(file.parts) > 1})
    if len(classes) > 1:
        files = [file for file in files if len(file.parts) > 1]
    if len(files) < len(paths) and RANK == 0:
        print(f"{root}: skipped {len(paths) - len(files)} files, since they are of other types or beside class folders")
    if len(files) < 2:
        fail(f"{root} holds {len(files)} images, too few; types that are read: {' '.join(sorted(IMAGE_TYPES))}")
    if len(classes) < 2:
        return [root / file for file in files], [-1] * len(files), []
    if len(SPLITS.intersection(map(str.lower, classes))) > 1:
        fail(f"{root} holds the splits {', '.join(classes)}, not classes; give one, such as {root / classes[0]}")
    return [root / file for file in files], [classes.index(file.parts[0]) for file in files], classes


def read_images(numbered, size):
    """[(index, file)] -> indices, uint8 (n, 3, size, size), and marks: 1, or 2 for a file that cannot be read."""
    pixels = np.zeros((len(numbered), 3, size, size), np.uint8)
    marks = np.ones(len(numbered), np.uint8)
    for k, (_, file) in enumerate(numbered):
        try:
            pixels[k] = read_image(file, size)
        except Exception:  # Pillow raises many kinds for a damaged file
            marks[k] = 2
    return [i for i, _ in numbered], pixels, marks


def load_folder(args, device):
    """A folder of images, which is cached beside the runs, or such a cache. 5 %, or 1,000, are for validation."""
    root = Path(args.data or "").expanduser().resolve()
    if not args.data or not root.is_dir():
        fail(f"--data {args.data} is not a folder; give a folder of images or class folders, a cache, or {DATA_SETS}")
    if args.out.resolve().is_relative_to(root):
        fail(f"--out {args.out} lies inside --data {args.data}, whose images its pictures would join")
    cache = root if (root / "data.npy").exists() else make_cache(root, args, device)
    with or_fail(f"the cache {cache} is not whole; remove it, and give its images"):
        info = json.loads((cache / "manifest.json").read_text())
        labels = np.array(info.pop("labels"))
        done = np.load(cache / "done.npy")
        if not done.all() or len(np.load(cache / "data.npy", mmap_mode="r")) != len(labels):
            raise ValueError(f"it lacks {np.sum(done == 0)} images, or data.npy has another length")
    good = np.flatnonzero(done == 1)
    if len(good) < len(labels) and RANK == 0:
        print(f"{len(labels) - len(good)} images cannot be read; {cache / 'damaged.txt'} lists what is left out")
    if len(good) < 2:
        fail(f"of the images in {cache} {len(good)} can be read, too few; repair them, and remove the cache")
    info["cache"] = str(cache)
    val = good[np.unique(np.linspace(0, len(good) - 1, min(1000, max(1, len(good) // 20))).astype(int))]
    return Data(cache / "data.npy", labels, np.setdiff1d(good, val), val, val, "mirror", info)


def make_cache(root, args, device):
    """The cache of a folder, made if there is none. It knows images and VAE by their files' names, sizes and times."""
    vae_name = None if args.vae == "none" else args.vae
    size = args.img_size or (256 if vae_name else 32)
    files, labels, classes = list_images(root)
    known_by = files + sorted(Path(vae_name).glob("[cd]*.*") if vae_name else [])  # config and diffusion_... weights
    stats = [(str(p).removeprefix(str(root)), p.stat().st_size, p.stat().st_mtime_ns) for p in known_by]
    identity = [hashlib.sha256(json.dumps([vae_name, size, classes, stats]).encode()).hexdigest()[:12]]
    if WORLD > 1:
        dist.broadcast_object_list(identity)  # a node's own copy of the images may have other times
    cache = args.out.resolve().parent / f"cache-{root.name}-{size}-{identity[0]}"
    if not (cache / "manifest.json").exists():
        info = dict(data=str(root), identity=identity[0], vae=vae_name, img_size=size, classes=classes, labels=labels)
        encode_images(files, info, cache, args, device)
        if RANK == 0:
            info |= latent_statistics(cache) if vae_name else {}
            write_aside(cache / "manifest.json", json.dumps(info).encode())  # which makes it whole
        barrier()
    return cache


def encode_images(files, info, cache, args, device):
    """Read (and encode) every image once. done.npy says which are in, so that a killed build goes on.

    data.npy is uint8 (n, 3, S, S), or float16 (n, 2, 2, C, h, w): image and mirror image, mean and log-variance."""
    if WORLD > 1 and int(os.environ["LOCAL_WORLD_SIZE"]) < WORLD:
        fail("several nodes would overwrite each other's images; let one node make the cache first, with --steps 1")
    size = info["img_size"]
    vae = load_vae(info, device) if info["vae"] else None
    example = torch.zeros(1, 3, size, size, device=device)
    example = posteriors(vae, example) if vae else example.byte()
    if example.shape[-1] % args.patch_size or size % example.shape[-1]:
        fail(
            f"the models see a side of {example.shape[-1]}; it must divide --img-size and be a multiple of --patch-size"
        )
    if RANK == 0 and not (cache / "done.npy").exists():
        cache.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(cache).free < len(files) * example.nbytes:  # else a full disk would kill the process
            fail(f"{cache} needs {len(files) * example.nbytes / 1e9:.3g} GB, and the disk has less room")
        shape = (len(files), *example.shape[1:])
        np.lib.format.open_memmap(cache / "data.npy", "w+", example.cpu().numpy().dtype, shape).flush()
        np.lib.format.open_memmap(cache / "done.npy", "w+", np.uint8, shape[:1]).flush()
    barrier()
    data = np.load(cache / "data.npy", mmap_mode="r+")
    done = np.load(cache / "done.npy", mmap_mode="r+")
    todo = [(i, files[i]) for i in range(RANK, len(files), WORLD) if not done[i]]
    read = functools.partial(read_images, size=size)
    loader = DataLoader(todo, args.micro_batch or 32, num_workers=args.num_workers, collate_fn=read)
    for indices, rows, marks in tqdm(loader, desc="reading images", disable=RANK > 0):
        if vae:
            rows = posteriors(vae, torch.from_numpy(rows).to(device) / 127.5 - 1).cpu().numpy()
            if not np.isfinite(rows).all():
                fail(f"the VAE {info['vae']} gives latents that are not finite, or beyond the range of float16")
        data[indices] = rows
        data.flush()
        done[indices] = marks
        done.flush()
    barrier()
    damaged = "\n".join(str(files[i]) for i in np.flatnonzero(done == 2))
    (cache / "damaged.txt").write_text(damaged, "utf-8", "surrogateescape")


@torch.no_grad()
def posteriors(vae, x):
    """Images (n, 3, S, S) in [-1, 1] -> float16 (n, 2, 2, C, h, w): mean and log-variance of them and their mirrors."""
    both = [vae.net.encode(images).latent_dist for images in (x, x.flip(3))]
    return torch.stack([torch.stack([latents.mean, latents.logvar], dim=1) for latents in both], dim=1).half()


def latent_statistics(cache):
    """Mean and standard deviation of each channel of the latents, from at most 2,000 of the images."""
    good = np.flatnonzero(np.load(cache / "done.npy") == 1)
    some = good[:: 1 + len(good) // 2000]
    posteriors = np.load(cache / "data.npy", mmap_mode="r")[some].astype(np.float64)
    mean, logvar = np.moveaxis(posteriors, 2, 0)
    axes = (0, 1, 3, 4)  # all but the channel
    first = mean.mean(axes)[:, None, None]
    second = (mean**2 + np.exp(logvar)).mean(axes)[:, None, None]
    return dict(mean=first.tolist(), std=np.sqrt(second - first**2).tolist())


def load_classifier(data, folder):
    """A small convolutional classifier without its last layer, (n, C, S, S) -> (n, 128): to small images what VGG is to
    photographs. It is trained once, on crops of every second training image, and kept in `folder`. Of MNIST and its
    like fid.py's judge, which is another network, sees the other half."""
    torch.manual_seed(1)
    channels, side = data.array.shape[-3], data.info["img_size"]
    net = nn.Sequential(
        nn.Conv2d(channels, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU(),
        nn.Conv2d(64, 64, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(64 * math.ceil(side / 8) ** 2, 128), nn.ReLU(),
        nn.Linear(128, len(data.info["classes"])),
    )  # fmt: skip
    path = folder / f"features-{data.info['identity']}.pt"
    if RANK == 0 and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        batches = Batches(dataclasses.replace(data, fit=data.fit[1::2]), 128, seed=1, rank=0, world=1)
        optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
        for step in tqdm(range(1000), desc="perceptual network"):
            batch = to_device(batches[step], torch.device("cpu"))
            x = random_resized_crop(batch.x, batch.crop, side)
            nnf.cross_entropy(net(x), batch.y).backward()
            optimizer.step()
            optimizer.zero_grad()
        write_aside(path, net.state_dict())
    barrier()
    net.load_state_dict(torch.load(path, weights_only=True))
    return net[:-1]


if __name__ == "__main__":
    run_script(main)
