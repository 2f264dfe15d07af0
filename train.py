"""Train MoDA, or its lip-sync expert ALSE, from scratch.

    python train.py                                      the toy talker on a CPU: data, training, a talking video
    python train.py --model=alse                         the lip-sync expert, for --alse and for sample.py --eval
    python train.py --alse=out/alse/ckpt.pt              MoDA under the expert's supervision (Eq. 6, 7)
    torchrun --standalone --nproc_per_node=8 train.py --preset=moda --data_dir=data/hdtf

All chance in step k, windows, times, noise and dropped conditions, is drawn for the whole batch from (seed, k): a
resumed run equals an uninterrupted one, and any number of processes sees the same batch.
"""
import contextlib
import os
import time
from dataclasses import asdict, fields
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

import sample
from data import Clips, ToyTalker, UsageError, parse_flags, run
from moda import ALSE, PRESETS, Config, MoDA, draw, load_strictly, losses, read_tensors, save

KNOBS = dict(
    model="moda",            # moda or alse
    preset="toy",            # toy or moda
    data_dir="",             # a prepared data set; the toy talker without one
    clips=300,               # how many clips the toy talker makes, 8 s each
    out_dir="",              # checkpoints, log.csv, samples; out/<preset> without one
    init_from="scratch",     # scratch, resume, or a checkpoint to start from
    alse="",                 # checkpoint of a lip-sync expert that supervises MoDA
    tau=0.4,                 # Eq. 7: its loss counts only below this
    steps=1200,
    batch_size=8,            # windows per step, over all processes
    micro_batch=0,           # windows per pass of one process; 0 = all at once, else gradients accumulate
    learning_rate=2e-3,
    warmup=50,               # steps
    cooldown=0.5,            # last share of the steps, over which the rate falls to zero
    grad_clip=1.0,
    save_every=250,
    eval_clips=16,           # unseen toy clips for the table and the film at the end; 0 = neither
    seed=1,
    device="",               # cuda if there is one
    workers=0,               # processes that read windows
)
TRAINING = {                 # what a preset changes; Sec. 4.1.2: Adam, 1e-4, batch 512
    "toy": {},
    "moda": dict(steps=500_000, batch_size=512, learning_rate=1e-4, warmup=1000, cooldown=0.0, workers=4),
}


def settings(argv):
    """Knobs of the run and Config of the network: the preset's, overridden by flags."""
    preset = parse_flags(__doc__, KNOBS | asdict(Config()), argv)["preset"]
    if preset not in PRESETS:
        raise UsageError(f"--preset={preset}: known are {', '.join(PRESETS)}")
    defaults = KNOBS | TRAINING[preset] | asdict(Config(**PRESETS[preset]))
    flags = parse_flags(__doc__, defaults, argv)
    cfg = Config(**{field.name: flags.pop(field.name) for field in fields(Config)})
    flags["out_dir"] = Path(flags["out_dir"] or f"out/{preset if flags['model'] == 'moda' else flags['model']}")
    return flags, cfg


def chance(seed, step, use):
    """The random numbers of one step and use: 0 windows, 1 noise."""
    return torch.Generator().manual_seed((2 * seed + use) * 10**9 + step)


def batches(n_windows, knobs, first_step, rank, world):
    """Indices of this process's windows, one micro-batch at a time."""
    share = knobs["batch_size"] // world
    for step in range(first_step, knobs["steps"]):
        index = torch.randint(n_windows, (knobs["batch_size"],), generator=chance(knobs["seed"], step, 0))
        for part in index[rank * share:(rank + 1) * share].split(knobs["micro_batch"] or share):
            yield part.tolist()


def learning_rate(step, knobs):
    """Linear warm-up, constant, linear cool-down."""
    left = (knobs["steps"] - step) / max(1, knobs["cooldown"] * knobs["steps"])
    return knobs["learning_rate"] * min(1, (step + 1) / knobs["warmup"], left)


class Objective(nn.Module):
    """The losses as one module, so that DistributedDataParallel sees one forward pass."""

    def __init__(self, model, expert, tau):
        super().__init__()
        self.model, self.expert, self.tau = model, expert, tau

    def forward(self, batch, drawn):
        z0 = self.model.normalise(batch["motion"])
        if isinstance(self.model, ALSE):
            shift = int(3 + 27 * drawn["t"][0])                            # frames
            return self.model.pretraining_loss(batch["audio"], z0, batch["mask"], shift), z0.new_zeros(()), z0.new_zeros(())
        prev = self.model.normalise(batch["prev"])
        return losses(self.model, z0, batch["audio"], batch["emotion"], batch["identity"], prev, batch["mask"],
                      **drawn, expert=self.expert, tau=self.tau)


def main(argv):
    knobs, cfg = settings(argv)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device(knobs["device"] or ("cuda" if torch.cuda.is_available() else "cpu"))
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    torch.manual_seed(knobs["seed"])
    torch.set_flush_denormal(True)                                         # Adam's tiny moments are slow on a CPU

    data = Clips.open(knobs["data_dir"], "train") if knobs["data_dir"] else ToyTalker("train", knobs["clips"])
    cfg.audio_layers, cfg.audio_dim = data.audio_shape
    model = {"moda": MoDA, "alse": ALSE}[knobs["model"]](cfg).to(device)
    model.mean[:], model.std[:] = (torch.as_tensor(x, device=device) for x in data.statistics())
    expert = ALSE.from_pretrained(knobs["alse"]).to(device).requires_grad_(False) if knobs["alse"] else None
    net = Objective(model, expert, knobs["tau"])
    net = DistributedDataParallel(net) if world > 1 else net
    optimizer = torch.optim.Adam(model.parameters(), knobs["learning_rate"], betas=(0.9, 0.99), fused=True)

    out, first_step = knobs["out_dir"], 0
    out.mkdir(parents=True, exist_ok=True)
    path = out / "ckpt.pt"
    if knobs["init_from"] == "resume":
        state = read_tensors(path)
        load_strictly(model, state["model"], path)
        optimizer.load_state_dict(state["optimizer"])
        first_step = state["step"]

    loader = iter(DataLoader(data, batch_sampler=batches(len(data), knobs, first_step, rank, world),
                             num_workers=knobs["workers"], pin_memory=device.type == "cuda"))
    share = knobs["batch_size"] // world
    micro = knobs["micro_batch"] or share
    log = open(out / "log.csv", "a" if first_step else "w") if rank == 0 else None
    if rank == 0 and not first_step:
        print("step,loss,rf,vel,sync,learning_rate,samples_per_second", file=log)
    bar = tqdm(range(first_step, knobs["steps"]), "training", disable=rank > 0)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, knobs)
        drawn, began = draw(cfg, knobs["batch_size"], data.frames, chance(knobs["seed"], step, 1)), time.perf_counter()
        parts = torch.zeros(3, device=device)
        for first in range(rank * share, (rank + 1) * share, micro):
            batch = {key: value.to(device, non_blocking=True) for key, value in next(loader).items()}
            some = {key: value[first:first + micro].to(device) for key, value in drawn.items()}
            last = first + micro >= (rank + 1) * share
            with contextlib.nullcontext() if last or world == 1 else net.no_sync():
                rf_vel_sync = net(batch, some)
                (sum(rf_vel_sync) * micro / share).backward()
            parts += torch.stack(rf_vel_sync).detach() * micro / share
        nn.utils.clip_grad_norm_(model.parameters(), knobs["grad_clip"])
        optimizer.step()
        optimizer.zero_grad()
        if world > 1:
            dist.all_reduce(parts)
        rf, vel, sync = (parts / world).tolist()
        if rank == 0:
            rate = knobs["batch_size"] / (time.perf_counter() - began)
            lr = optimizer.param_groups[0]["lr"]
            print(step, rf + vel + sync, rf, vel, sync, lr, rate, sep=",", file=log, flush=True)
            bar.set_postfix_str(f"loss {rf + vel + sync:.3f}, rate {lr:.1e}, {rate:.0f} samples/s")
            if (step + 1) % knobs["save_every"] == 0 or step + 1 == knobs["steps"]:
                save(path, dict(kind=type(model).__name__, config=asdict(cfg), model=model.state_dict(),
                                optimizer=optimizer.state_dict(), step=step + 1))
    if rank == 0 and knobs["eval_clips"] and not knobs["data_dir"] and knobs["model"] == "moda":
        sample.after_training(path, out, knobs["eval_clips"])


if __name__ == "__main__":
    run(main)
