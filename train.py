"""Train MoDA, or its lip-sync expert ALSE, from scratch.

    python train.py                                      the toy talker on a CPU: data, training, a talking video
    python train.py --model=alse                         the lip-sync expert, for --alse and for sample.py --eval
    python train.py --alse=out/alse/ckpt.pt              MoDA under the expert's supervision (Eq. 6, 7)
    torchrun --standalone --nproc_per_node=8 train.py --preset=moda --data_dir=data/hdtf

Flags and what they are without being given; every field of moda.Config, such as --width=256, is one too:

    --model=moda             moda or alse
    --preset=toy             toy or moda
    --data_dir=              a data set prepared by data.py; the toy talker without one
    --clips=300              how many clips the toy talker makes, 8 s each
    --out_dir=               checkpoints, log.csv, samples; out/<preset> without one
    --init_from=scratch      scratch, resume, or a checkpoint to start from, the released net-200.pth too
    --stats=                 file with the motion's mean and std; those of the data without one
    --alse=                  checkpoint of a lip-sync expert that supervises MoDA
    --tau=0.4                Eq. 7: its loss counts only below this
    --steps=1200
    --batch_size=8           windows per step, over all processes
    --micro_batch=0          windows per pass of one process; 0 = all at once, else gradients accumulate
    --learning_rate=2e-3
    --warmup=50              steps
    --cooldown=0.5           last share of the steps, over which the rate falls to zero
    --grad_clip=1.0
    --ema=0.0                decay of a running average of the weights, which sampling then uses; 0 = none
    --bf16=False             bfloat16 where autocast knows it to be safe
    --compile=False          torch.compile the model
    --checkpointing=False    recompute activations in the backward pass: slower, but the full model fits a 24 GB card
    --save_every=250         steps; the last two checkpoints are kept
    --eval_clips=16          unseen toy clips for the table and the film at the end; 0 = neither
    --seed=1
    --device=                cuda if there is one
    --workers=0              processes that read windows

All chance in step k, windows, times, noise and dropped conditions, is drawn for the whole batch from (seed, k): a
resumed run equals an uninterrupted one, and any number of processes sees the same batch.
"""
import contextlib
import os
import signal
import time
from dataclasses import asdict, fields
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import sample
from data import Clips, ToyTalker, UsageError, parse_flags, run
from moda import ALSE, PRESETS, Config, M, MoDA, draw, load_statistics, load_strictly, losses, read_tensors, save

TRAINING = {                 # what a preset changes; Sec. 4.1.2: Adam, 1e-4, batch 512
    "toy": {},
    "moda": dict(steps=500_000, batch_size=512, learning_rate=1e-4, warmup=1000, cooldown=0.0, bf16=True, workers=4),
}
BF16_PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "4090": 165e12}       # FLOP/s without sparsity


def settings(argv):
    """Flags of the run and Config of the network: the preset's, overridden by flags."""
    preset = parse_flags(__doc__, argv, asdict(Config()))["preset"]
    if preset not in PRESETS:
        raise UsageError(f"--preset={preset}: known are {', '.join(PRESETS)}")
    flags = parse_flags(__doc__, argv, TRAINING[preset] | asdict(Config(**PRESETS[preset])))
    cfg = Config(**{field.name: flags.pop(field.name) for field in fields(Config)})
    flags["out_dir"] = Path(flags["out_dir"] or f"out/{preset if flags['model'] == 'moda' else flags['model']}")
    world = int(os.environ.get("WORLD_SIZE", 1))
    if flags["batch_size"] % (world * max(1, flags["micro_batch"])):
        raise UsageError(f"--batch_size={flags['batch_size']} does not divide into {world} processes' micro-batches")
    return flags, cfg


def chance(seed, step, use):
    """The random numbers of one step and use: 0 windows, 1 noise."""
    return torch.Generator().manual_seed((2 * seed + use) * 10**9 + step)


def batches(n_windows, flags, first_step, rank, share, micro):
    """Indices of this process's windows, one micro-batch at a time."""
    for step in range(first_step, flags["steps"]):
        index = torch.randint(n_windows, (flags["batch_size"],), generator=chance(flags["seed"], step, 0))
        yield from index[rank * share:(rank + 1) * share].split(micro)


def learning_rate(step, flags):
    """Linear warm-up, constant, linear cool-down."""
    left = (flags["steps"] - step) / max(1, flags["cooldown"] * flags["steps"])
    return flags["learning_rate"] * min(1, (step + 1) / flags["warmup"], left)


def flops_per_window(cfg, N):
    """Multiplications and additions of one training step, per window: the backward pass costs two forward ones."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        number = torch.zeros(1, dtype=torch.long)
        audio = torch.zeros(1, N, cfg.audio_layers, cfg.audio_dim)
        MoDA(cfg)(torch.zeros(1, N, M), torch.zeros(1), audio, number, torch.zeros(1, 63), torch.zeros(1, M))
    return 3 * counter.get_total_flops()


class Objective(nn.Module):
    """The losses as one module, so that DistributedDataParallel sees one forward pass."""

    def __init__(self, model, expert, tau):
        super().__init__()
        self.model, self.expert, self.tau = model, expert, tau

    def forward(self, batch, drawn):
        z0, zero = self.model.normalise(batch["motion"]), drawn["t"].new_zeros(())
        if isinstance(self.model, ALSE):
            shift = int(3 + 27 * drawn["t"][0])                            # frames
            return self.model.pretraining_loss(batch["audio"], z0, batch["mask"], shift), zero, zero
        prev = self.model.normalise(batch["prev"])
        return losses(self.model, z0, batch["audio"], batch["emotion"], batch["identity"], prev, batch["mask"],
                      **drawn, expert=self.expert, tau=self.tau)


def build(flags, cfg, data, device):
    """The model to train, and what a checkpoint holds of it and of its training."""
    cfg.audio_layers, cfg.audio_dim = data.audio_shape
    kind, source = {"moda": MoDA, "alse": ALSE}[flags["model"]], flags["init_from"]
    model = kind(cfg) if source in ("scratch", "resume") else kind.from_pretrained(source).train()
    if (model.cfg.audio_layers, model.cfg.audio_dim) != data.audio_shape:
        raise ValueError(f"{source}: hears other features than the data set holds, {data.audio_shape}")
    if flags["stats"]:
        load_statistics(model, flags["stats"])
    elif source in ("scratch", "resume"):
        model.mean[:], model.std[:] = torch.as_tensor(data.moments)
    model.checkpointing = flags["checkpointing"]
    model.to(device)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(flags["ema"])) if flags["ema"] else None
    optimizer = torch.optim.Adam(model.parameters(), flags["learning_rate"], betas=(0.9, 0.99), fused=True)
    return model, average, optimizer


def resume(flags, path, model, average, optimizer):
    """Continue as if never stopped: weights, average, optimizer and log of the last complete checkpoint -> its step."""
    path = path if path.exists() else path.with_name("previous.pt")
    state = read_tensors(path, "there is nothing to resume")
    load_strictly(model, state["model"], path)
    if average:
        load_strictly(average, state["average"], path)
    optimizer.load_state_dict(state["optimizer"])
    log = path.with_name("log.csv")
    rows = log.read_text().splitlines()[:state["step"] + 1]                # the header, and the steps that are kept
    log.write_text("\n".join(rows) + "\n")
    return state["step"]


def main(argv):
    flags, cfg = settings(argv)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device(flags["device"] or sample.default_device())
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        path = train(flags, cfg, device, rank, world)
    finally:
        if world > 1:
            dist.destroy_process_group()
    if path and rank == 0 and flags["eval_clips"] and not flags["data_dir"] and flags["model"] == "moda":
        sample.after_training(path, flags["out_dir"], flags["eval_clips"])


def train(flags, cfg, device, rank, world):
    """The training loop of one process -> path of the last checkpoint, None if SIGTERM ended it."""
    torch.manual_seed(flags["seed"])
    torch.set_flush_denormal(True)                                         # Adam's tiny moments are slow on a CPU
    data = Clips.open(flags["data_dir"], "train") if flags["data_dir"] else ToyTalker("train", flags["clips"])
    model, average, optimizer = build(flags, cfg, data, device)
    expert = ALSE.from_pretrained(flags["alse"]).to(device).requires_grad_(False) if flags["alse"] else None
    path, first_step = flags["out_dir"] / "ckpt.pt", 0
    path.parent.mkdir(parents=True, exist_ok=True)
    if flags["init_from"] == "resume":
        first_step = resume(flags, path, model, average, optimizer)
    if flags["compile"]:
        model.compile()                                                    # in place: names in checkpoints stay
    net = Objective(model, expert, flags["tau"])
    net = DistributedDataParallel(net) if world > 1 else net

    share = flags["batch_size"] // world
    micro = flags["micro_batch"] or share
    loader = iter(DataLoader(data, batch_sampler=batches(len(data), flags, first_step, rank, share, micro),
                             num_workers=flags["workers"], pin_memory=device.type == "cuda"))
    log = open(path.with_name("log.csv"), "a" if first_step else "w") if rank == 0 else None
    if rank == 0 and not first_step:
        print("step,loss,rf,vel,sync,learning_rate,samples_per_second,waiting", file=log)
    work = flops_per_window(model.cfg, data.frames) if flags["model"] == "moda" else 0
    name = torch.cuda.get_device_name() if device.type == "cuda" else ""
    peak = next((peak for card, peak in BF16_PEAK.items() if card in name), 0)
    asked = []                                                             # to stop, by SIGTERM
    signal.signal(signal.SIGTERM, lambda *_: asked.append(True))

    bar = tqdm(range(first_step, flags["steps"]), "training", disable=rank > 0)
    for step in bar:
        began, waited = time.perf_counter(), 0.0
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, flags)
        drawn = draw(model.cfg, flags["batch_size"], data.frames, chance(flags["seed"], step, 1))
        parts = torch.zeros(4, device=device)
        for first in range(rank * share, (rank + 1) * share, micro):
            asking = time.perf_counter()
            batch = {key: value.to(device, non_blocking=True) for key, value in next(loader).items()}
            waited += time.perf_counter() - asking
            some = {key: value[first:first + micro].to(device) for key, value in drawn.items()}
            last = first + micro >= (rank + 1) * share
            with contextlib.nullcontext() if last or world == 1 else net.no_sync():
                with torch.autocast(device.type, torch.bfloat16, enabled=flags["bf16"]):
                    rf_vel_sync = net(batch, some)
                (sum(rf_vel_sync) * micro / share).backward()
            parts[:3] += torch.stack(rf_vel_sync).detach() * micro / share
        parts[3] = len(asked)
        if world > 1:
            dist.all_reduce(parts)
        *losses_, stop = parts.tolist()
        rf, vel, sync = (x / world for x in losses_)
        loss = rf + vel + sync
        if not abs(loss) < float("inf"):
            raise ValueError(f"step {step}: the loss is {loss}; lower --learning_rate and --init_from=resume, which "
                             f"goes on from {path}")
        nn.utils.clip_grad_norm_(model.parameters(), flags["grad_clip"])
        optimizer.step()
        optimizer.zero_grad()
        if average:
            average.update_parameters(model)
        if rank == 0:
            seconds = time.perf_counter() - began
            rate, lr = flags["batch_size"] / seconds, optimizer.param_groups[0]["lr"]
            print(step, loss, rf, vel, sync, lr, rate, waited / seconds, sep=",", file=log, flush=True)
            mfu = f", MFU {work * rate / peak / world:.0%}" if peak else f", {work * rate / 1e9:.0f} GFLOP/s"
            bar.set_postfix_str(f"loss {loss:.3f}, rate {lr:.1e}, {rate:.0f} samples/s{mfu}")
            if stop or (step + 1) % flags["save_every"] == 0 or step + 1 == flags["steps"]:
                state = dict(kind=type(model).__name__, config=asdict(model.cfg), model=model.state_dict(),
                             optimizer=optimizer.state_dict(), step=step + 1)
                save(path, state | ({"average": average.state_dict()} if average else {}), keep="previous.pt")
        if stop:
            return print(f"stopped by SIGTERM after step {step + 1}; go on with --init_from=resume") if rank == 0 else None
    return path


if __name__ == "__main__":
    run(main)
