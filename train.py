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
    --init_from=scratch      scratch, resume, or a checkpoint to start from, with its Config; net-200.pth too
    --stats=                 file with the motion's mean and std, as net-200.pth needs; those of the data without one
    --alse=                  checkpoint of a lip-sync expert that supervises MoDA
    --tau=0.4                Eq. 7: its loss counts only below this
    --steps=1100
    --batch_size=8           windows per step, over all processes
    --passes=1               into how many passes each process divides its windows, to save memory
    --learning_rate=2e-3
    --warmup=50              steps
    --cooldown=0.5           last share of the steps, over which the rate falls to zero
    --grad_clip=1.0
    --ema=0.0                decay of a moving average of the weights, which sample.py prefers; 0 = none
    --bf16=False             bfloat16 where autocast knows it to be safe
    --compile=False          torch.compile the model
    --checkpointing=False    recompute activations in the backward pass: slower, but the full model fits a 24 GB card
    --save_every=250         steps; the last two checkpoints are kept, ckpt.pt and previous.pt
    --eval_clips=12          unseen toy clips for the table and the film at the end; 0 = neither
    --seed=1
    --device=                cuda if there is one
    --workers=0              processes that read windows

All chance in step k, windows, times, noise and dropped conditions, is drawn for the whole batch from (seed, k): a
resumed run equals an uninterrupted one, and any number of processes sees the same batch. SIGTERM ends the run with a
checkpoint.
"""
import copy
import os
import signal
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import sample
from data import Clips, ToyTalker, UsageError, parse_flags, run
from moda import ALSE, PRESETS, Config, JointBlock, MoDA, SingleBlock, draw, load_statistics, losses, read_tensors, save

RANK, LOCAL_RANK, WORLD = (int(os.environ.get(*pair)) for pair in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
# what a preset changes; Sec. 4.1.2: Adam, 1e-4, batch 512
TRAINING = {"toy": {}, "moda": dict(
    steps=500000, batch_size=512, learning_rate=1e-4, warmup=1000, cooldown=0., bf16=True, workers=4, save_every=2500)}
AT_LEAST_ONE = {"steps", "batch_size", "passes", "clips", "save_every", "width", "heads"}

def settings(argv):
    """Flags of the run and Config of the network: the preset's, overridden by flags; UsageError if they are wrong."""
    flags = parse_flags(__doc__, argv, asdict(Config()))
    for name, known in ("preset", PRESETS), ("model", ("moda", "alse")), ("fusion", ("c2f", "four", "cross")):
        if flags[name] not in known:
            raise UsageError(f"--{name}={flags[name]}: known are {', '.join(known)}")
    flags = parse_flags(__doc__, argv, TRAINING[flags["preset"]] | asdict(Config(**PRESETS[flags["preset"]])))
    for name, value in flags.items():
        if type(value) in (int, float) and value < (name in AT_LEAST_ONE):
            raise UsageError(f"--{name}={value}: should be {int(name in AT_LEAST_ONE)} or more")
    if flags["batch_size"] % (WORLD * flags["passes"]):
        raise UsageError(f"--batch_size={flags['batch_size']} does not divide by {WORLD} x --passes={flags['passes']}")
    flags["out_dir"] = Path(flags["out_dir"] or f"out/{flags['preset' if flags['model'] == 'moda' else 'model']}")
    return flags, Config(**{name: flags.pop(name) for name in asdict(Config())})

def resume(path, parts):
    """Continue as if never stopped from the last complete checkpoint -> its step."""
    path = next((p for p in (path, path.with_name("previous.pt")) if p.exists()), path)       # killed while renaming
    state, model = read_tensors(path, "nothing to resume"), parts["model"]
    if (state.get("kind"), state.get("config")) != (type(model).__name__, asdict(model.cfg)):
        raise ValueError(f"{path}: was trained with other settings: {state.get('kind')} {state.get('config')}")
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return state["step"]

def micro_batch(i, data, cfg, flags):
    """What this process learns from in its pass i: windows, and the times, noise and dropped conditions they meet."""
    step, k = divmod(i, flags["passes"])
    generator = torch.Generator().manual_seed(flags["seed"] * 10**9 + step)
    index = torch.randint(len(data), (flags["batch_size"],), generator=generator)
    whole = draw(cfg, flags["batch_size"], data.frames, generator) | dict(index=index)
    mine = {name: x.chunk(WORLD * flags["passes"])[RANK * flags["passes"] + k] for name, x in whole.items()}
    windows = [data[i] for i in mine.pop("index").tolist()]
    fine = [w for w in windows if all(w[name].isfinite().all() for name in ("motion", "prev", "audio"))] or windows
    mine["corrupt"] = torch.tensor(len(windows) - len(fine))               # others stand in for them
    return torch.utils.data.default_collate((fine * len(windows))[:len(windows)]) | mine

def objective(model, net, expert, tau, motion, prev, corrupt, **batch):
    """L_RF, L_vel, L_ALSE of a micro-batch (3,); for ALSE its own loss and two zeros. net: model or DDP around it."""
    z0 = model.normalise(motion)
    if isinstance(model, ALSE):
        shift = int(3 + 27 * batch["t"][0])                                # frames
        return ALSE.pretraining_loss(net, batch["audio"], z0, batch["mask"], shift) * z0.new_tensor([1, 0, 0])
    return torch.stack(losses(net, z0, prev=model.normalise(prev), **batch, expert=expert, tau=tau))

def peak(device, dtype):
    """FLOP/s of a large matrix product on this device: what a training step is measured against."""
    a = torch.randn(4096, 4096, device=device, dtype=dtype)
    return 2 * len(a) ** 3 / Timer("a @ a", globals=dict(a=a)).blocked_autorange().median

def train(flags, data, parts, first_step, log, device):
    """The loop over steps."""
    model, optimizer, path, signals = parts["model"], parts["optimizer"], flags["out_dir"] / "ckpt.pt", []
    signal.signal(signal.SIGTERM, lambda *_: signals.append(1))
    expert = ALSE.from_pretrained(flags["alse"]).to(device).requires_grad_(False) if flags["alse"] else None
    fetch = partial(micro_batch, data=data, cfg=model.cfg, flags=flags)
    place = lambda batch: {name: x.to(device, non_blocking=True) for name, x in batch.items()}
    with torch.no_grad(), FlopCounterMode(display=False) as forward:
        objective(model, model, None, 0, **place(fetch(0)))
    # the backward pass takes twice the work of the forward pass
    ideal = 3 * forward.get_total_flops() * flags["passes"] / peak(device, torch.bfloat16 if flags["bf16"] else None)
    model.compile(disable=not flags["compile"])                            # in place: names in checkpoints stay
    # the last block of an all four-stream network has parts that nobody hears
    net = DistributedDataParallel(model, find_unused_parameters=model.cfg.fusion == "four") if WORLD > 1 else model
    clock, skipped = {}, 0.0
    loader = sample.timed("data", torch.utils.data.DataLoader(
        range(first_step * flags["passes"], flags["steps"] * flags["passes"]), None, collate_fn=fetch,
        num_workers=flags["workers"], pin_memory=device.type == "cuda",    # SIGTERM is for this process alone
        worker_init_fn=lambda _: signal.signal(signal.SIGTERM, signal.SIG_IGN)), clock)

    for step in (bar := tqdm(range(first_step, flags["steps"]), "training", disable=RANK > 0)):
        began, clock["data"] = time.perf_counter(), 0.0
        left = (flags["steps"] - step) / max(1, flags["cooldown"] * flags["steps"])          # 1..0 in the cool-down
        rate = optimizer.param_groups[0]["lr"] = flags["learning_rate"] * min(
            1, (step + 1) / max(1, flags["warmup"]), left)
        total = torch.zeros(4, device=device)                              # three losses, corrupt windows
        for k in range(flags["passes"]):
            batch = place(next(loader))
            net.require_backward_grad_sync = k + 1 == flags["passes"]      # DDP's no_sync() in a line
            with torch.autocast(device.type, torch.bfloat16, enabled=flags["bf16"]):
                part = objective(model, net, expert, flags["tau"], **batch) / flags["passes"]
            part.sum().backward()
            total += torch.stack([*part.detach(), batch["corrupt"]])
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), flags["grad_clip"])
        means = torch.stack([*total, norm, norm.new_tensor(len(signals))])
        if WORLD > 1:
            torch.distributed.all_reduce(means)
        rf, vel, sync, corrupt, norm, stop = (means / WORLD).tolist()
        skipped += corrupt * WORLD
        if not means.isfinite().all() or skipped > 0.01 * flags["steps"] * flags["batch_size"]:
            raise ValueError(f"step {step}: loss {rf + vel + sync}, gradients {norm}, {skipped:.0f} corrupt windows "
                             f"skipped; {path}, if there, is still good")
        optimizer.step()
        optimizer.zero_grad()
        if flags["ema"]:
            torch._foreach_lerp_([*parts["ema"].parameters()], [*model.parameters()], 1 - flags["ema"])
        loss, seconds = rf + vel + sync, time.perf_counter() - began
        print(step, loss, rf, vel, sync, norm, rate, seconds, clock["data"], sep=",", file=log, flush=True)
        bar.set_postfix_str(f"loss {loss:.3f}, rate {rate:.1e}, {flags['batch_size'] / seconds:.0f} windows/s, "
                            f"{clock['data'] / seconds:.0%} waiting, MFU {ideal / seconds:.0%}")
        if RANK == 0 and (stop or (step + 1) % flags["save_every"] == 0 or step + 1 == flags["steps"]):
            about = dict(kind=type(model).__name__, config=asdict(model.cfg), step=step + 1)
            save(path, about | {name: part.state_dict() for name, part in parts.items()}, keep="previous.pt")
        if stop:
            raise SystemExit                                               # with code 0
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

def main(argv):
    flags, cfg = settings(argv)
    flags["out_dir"].mkdir(parents=True, exist_ok=True)
    device = flags["device"]
    if WORLD > 1:
        torch.distributed.init_process_group()
    if WORLD > 1 and device.type == "cuda":
        torch.cuda.set_device(LOCAL_RANK)
    torch.manual_seed(flags["seed"])
    torch.set_flush_denormal(True)                                         # Adam's tiny moments are slow on a CPU
    data = Clips.open(flags["data_dir"], "train") if flags["data_dir"] else ToyTalker("train", flags["clips"])
    cfg.audio_layers, cfg.audio_dim = data.audio_shape
    kind, source = ALSE if flags["model"] == "alse" else MoDA, flags["init_from"]
    model = (kind(cfg) if source in ("scratch", "resume") else kind.from_pretrained(source)).to(device).train()
    if flags["stats"]:
        load_statistics(model, flags["stats"])
    elif model.std.eq(1).all():                                            # it has none yet
        model.mean[:], model.std[:] = torch.as_tensor(data.moments)
    for block in model.modules():
        if flags["checkpointing"] and isinstance(block, (JointBlock, SingleBlock)):
            block.forward = partial(torch.utils.checkpoint.checkpoint, block.forward, use_reentrant=False)
    # what a checkpoint holds, by name
    parts = dict(model=model, optimizer=torch.optim.Adam(model.parameters(), betas=(0.9, 0.99), fused=True))
    if flags["ema"]:
        parts["ema"] = copy.deepcopy(model).requires_grad_(False)
    first_step = resume(flags["out_dir"] / "ckpt.pt", parts) if source == "resume" else 0
    path = flags["out_dir"] / "log.csv"
    rows = path.read_text().splitlines()[1:first_step + 1] if path.exists() else []
    with open(path if RANK == 0 else os.devnull, "w") as log:
        print("step,loss,rf,vel,sync,grad_norm,learning_rate,seconds,waiting", *rows, sep="\n", file=log, flush=True)
        train(flags, data, parts, first_step, log, device)
    if WORLD > 1:
        torch.distributed.destroy_process_group()
    if RANK == 0 and flags["eval_clips"] and not flags["data_dir"] and flags["model"] == "moda":
        sample.after_training(flags["out_dir"] / "ckpt.pt", flags["out_dir"], flags["eval_clips"])

if __name__ == "__main__":
    run(main)
