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
    --out_dir=               checkpoints, log.csv, samples; out/<preset>, or out/alse, without one
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
    --grad_clip=1.0          largest norm of the gradients; 0 = any
    --ema=0.0                decay of a moving average of the weights, which sample.py prefers; 0 = none
    --bf16=False             bfloat16 where autocast knows it to be safe
    --compile=False          torch.compile the model
    --checkpointing=False    recompute activations in the backward pass: slower, but ten times as many windows fit
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
from functools import partial
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import sample
from data import Clips, ToyTalker, UsageError, explained, parse_flags, require, run
from moda import ALSE, PRESETS, Config, JointBlock, MoDA, SingleBlock, draw, load_statistics, losses, read_tensors, save

RANK, LOCAL_RANK, WORLD = (int(os.environ.get(*pair)) for pair in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
# what a preset changes; Sec. 4.1.2: Adam, 1e-4, batch 512
TRAINING = {"toy": {}, "moda": dict(
    steps=500000, batch_size=512, learning_rate=1e-4, warmup=1000, cooldown=0., bf16=True, workers=4, save_every=2500)}

def settings(argv):
    """Flags of the run and Config of the network: the preset's, overridden by flags; UsageError if they are wrong."""
    flags = parse_flags(__doc__, argv, vars(Config()))
    for name, known in ("preset", PRESETS), ("model", ("moda", "alse")), ("fusion", ("c2f", "four", "cross")):
        require(flags[name] in known, f"--{name}={flags[name]}: known are {', '.join(known)}", UsageError)
    flags = parse_flags(__doc__, argv, TRAINING[flags["preset"]] | vars(Config(**PRESETS[flags["preset"]])))
    for name, x in flags.items():
        low = int(name in ("steps", "batch_size", "passes", "clips", "save_every", "width", "heads"))
        require(type(x) not in (int, float) or x >= low, f"--{name}={x}: should be {low} or more", UsageError)
    parts = WORLD * flags["passes"] * (2 if flags["model"] == "alse" else 1)       # its foreign pairs take two windows
    require(flags["batch_size"] % parts == 0, f"--batch_size: no multiple of {parts}, processes x --passes", UsageError)
    flags["out_dir"] = Path(flags["out_dir"] or f"out/{flags['preset' if flags['model'] == 'moda' else 'model']}")
    return flags, Config(**{name: flags.pop(name) for name in vars(Config())})

def resume(path, parts):
    """Continue as if never stopped from the last complete checkpoint -> its step."""
    path = next((p for p in (path, path.with_name("previous.pt")) if p.exists()), path)       # killed while renaming
    state, model = read_tensors(path, "nothing to resume"), parts["model"]
    with explained(path, "was trained with other settings", "use another --out_dir"):
        require((state["kind"], state["config"]) == (type(model).__name__, vars(model.cfg)), state["config"])
        for name, part in parts.items():
            part.load_state_dict(state[name])
        return state["step"]

def own_windows(step, data, cfg, flags):
    """What this process learns from in a step: windows, and the times, noise and dropped conditions they meet; and how
    many of the windows were corrupt, so that others stand in for them."""
    generator = torch.Generator().manual_seed(flags["seed"] * 10**9 + step)
    index = torch.randint(len(data), (flags["batch_size"],), generator=generator)
    chance = {name: x.chunk(WORLD)[RANK] for name, x in draw(cfg, len(index), data.frames, generator).items()}
    windows = [data[i] for i in index.chunk(WORLD)[RANK].tolist()]
    fine = [w for w in windows if all(w[name].isfinite().all() for name in ("motion", "prev", "audio"))] or windows
    batch = torch.utils.data.default_collate((fine * len(windows))[:len(windows)])
    return batch | chance, len(windows) - len(fine)

def objective(model, net, expert, tau, motion, prev, **batch):
    """L_RF, L_vel, L_ALSE of a batch (3,); for ALSE its own loss and two zeros. net: model or DDP around it."""
    if isinstance(model, ALSE):
        late = int(3 + 27 * batch["t"][0])                                 # frames
        return ALSE.pretraining_loss(net, batch["audio"], motion, batch["mask"], late) * motion.new_tensor([1, 0, 0])
    sync = expert and (lambda audio, z, mask: expert(audio, model.denormalise(z), mask))     # it has its own statistics
    return torch.stack(losses(net, model.normalise(motion), prev=model.normalise(prev), **batch, expert=sync, tau=tau))

def gradients(flags, model, net, expert, batch):
    """Accumulate them over the passes and clip them -> the means of L_RF, L_vel, L_ALSE, and their norm (4,)."""
    device, passes, means = model.mean.device, flags["passes"], 0
    for k in range(passes):
        part = {name: x.chunk(passes)[k].to(device, non_blocking=True) for name, x in batch.items()}
        net.require_backward_grad_sync = k + 1 == passes                   # DDP's no_sync() in a line
        with torch.autocast(device.type, torch.bfloat16, enabled=flags["bf16"]):
            loss = objective(model, net, expert, flags["tau"], **part) / passes
        loss.sum().backward()
        means += loss.detach()
    return torch.stack([*means, torch.nn.utils.clip_grad_norm_(model.parameters(), flags["grad_clip"] or torch.inf)])

def ideal_seconds(flags, model, batch):
    """What a step would take if all of it were as fast as a large matrix product is on this device: MFU's measure."""
    n, device, windows = 4096 if model.mean.is_cuda else 1024, model.mean.device, len(batch["motion"])
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16 if flags["bf16"] and model.mean.is_cuda else None)
    product = Timer("a @ a", globals=dict(a=a), num_threads=torch.get_num_threads()).blocked_autorange().median
    with torch.no_grad(), FlopCounterMode(display=False) as forward:
        objective(model, model, None, 0, **{name: x[:1].to(device) for name, x in batch.items()})
    # the backward pass takes twice the work of the forward pass
    return 3 * windows * forward.get_total_flops() * product / (2 * n ** 3)

def train(flags, data, parts, first_step, log):
    """The loop over steps."""
    model, optimizer, signals = parts["model"], parts["optimizer"], []
    steps, path, device = flags["steps"], flags["out_dir"] / "ckpt.pt", model.mean.device
    signal.signal(signal.SIGTERM, lambda *_: signals.append(1))
    expert = ALSE.from_pretrained(flags["alse"]).to(device).requires_grad_(False) if flags["alse"] else None
    fetch = partial(own_windows, data=data, cfg=model.cfg, flags=flags)
    ideal, skipped = ideal_seconds(flags, model, fetch(0)[0]), 0
    for block in model.modules():
        if flags["checkpointing"] and isinstance(block, (JointBlock, SingleBlock)):
            block.forward = partial(torch.utils.checkpoint.checkpoint, block.forward, use_reentrant=False)
    model.compile(disable=not flags["compile"])                            # in place: names in checkpoints stay
    # the last block of an all four-stream network has parts that nobody hears
    net = DistributedDataParallel(model, find_unused_parameters=model.cfg.fusion == "four") if WORLD > 1 else model
    # workers share the data, so they are forked; SIGTERM is for this process alone
    loader = iter(torch.utils.data.DataLoader(range(first_step, steps), None, collate_fn=fetch,
        num_workers=flags["workers"], multiprocessing_context="fork" if flags["workers"] else None,
        worker_init_fn=lambda _: signal.signal(signal.SIGTERM, signal.SIG_IGN), pin_memory=model.mean.is_cuda))
    for step in (bar := tqdm(range(first_step, steps), "training", disable=RANK > 0)):
        began, (batch, corrupt) = time.perf_counter(), next(loader)
        waiting = time.perf_counter() - began
        up, down = (step + 1) / max(1, flags["warmup"]), (steps - step) / max(1, flags["cooldown"] * steps)
        rate = optimizer.param_groups[0]["lr"] = flags["learning_rate"] * min(1, up, down)
        means = torch.tensor([*gradients(flags, model, net, expert, batch), corrupt, len(signals)], device=device)
        if WORLD > 1:
            torch.distributed.all_reduce(means)
        rf, vel, sync, norm, corrupt, stop = (means / WORLD).tolist()
        loss, skipped = rf + vel + sync, skipped + corrupt * WORLD
        require(means.isfinite().all() and skipped <= 0.01 * steps * flags["batch_size"],
                f"step {step}: loss {loss}, gradients {norm}, {skipped:.0f} corrupt windows; {path}, if there, is good")
        optimizer.step()
        optimizer.zero_grad()
        if flags["ema"]:
            torch._foreach_lerp_([*parts["ema"].parameters()], [p.data for p in model.parameters()], 1 - flags["ema"])
        seconds = time.perf_counter() - began
        print(step, loss, rf, vel, sync, norm, rate, seconds, waiting, sep=",", file=log, flush=True)
        bar.set_postfix_str(f"loss {loss:.3f}, rate {rate:.1e}, {flags['batch_size'] / seconds:.0f} windows/s, "
                            f"{waiting / seconds:.0%} waiting, MFU {ideal / seconds:.0%}, {skipped:.0f} corrupt")
        if RANK == 0 and (stop or (step + 1) % flags["save_every"] == 0 or step + 1 == steps):
            about = dict(kind=type(model).__name__, config=vars(model.cfg), step=step + 1)
            save(path, about | {name: part.state_dict() for name, part in parts.items()}, keep="previous.pt")
        require(not stop, 0, SystemExit)                                   # ends with code 0
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

def main(argv):
    flags, cfg = settings(argv)
    flags["out_dir"].mkdir(parents=True, exist_ok=True)
    if WORLD > 1:
        torch.distributed.init_process_group()
    # of --device=cuda:1 that one; -1 sets none
    torch.cuda.set_device((flags["device"].index or LOCAL_RANK) if flags["device"].type == "cuda" else -1)
    torch.manual_seed(flags["seed"])
    torch.set_flush_denormal(True)                                         # Adam's tiny moments are slow on a CPU
    data = Clips.open(flags["data_dir"], "train") if flags["data_dir"] else ToyTalker("train", flags["clips"])
    cfg.audio_layers, cfg.audio_dim = data.audio_shape
    kind, source = ALSE if flags["model"] == "alse" else MoDA, flags["init_from"]
    model = (kind(cfg) if source in ("scratch", "resume") else kind.from_pretrained(source)).to(flags["device"]).train()
    if flags["stats"]:
        load_statistics(model, flags["stats"])
    elif model.std.eq(1).all():                                            # it has none yet
        model.mean[:], model.std[:] = torch.as_tensor(data.moments)
    # what a checkpoint holds, by name
    parts = dict(model=model, optimizer=torch.optim.Adam(model.parameters(), betas=(0.9, 0.99), fused=True))
    parts |= {"ema": copy.deepcopy(model).requires_grad_(False)} if flags["ema"] else {}
    first_step = resume(flags["out_dir"] / "ckpt.pt", parts) if source == "resume" else 0
    path = flags["out_dir"] / "log.csv"
    rows = path.read_text().splitlines()[1:first_step + 1] if path.exists() else []
    with open(path if RANK == 0 else os.devnull, "w") as log:
        print("step,loss,rf,vel,sync,grad_norm,learning_rate,seconds,waiting", *rows, sep="\n", file=log, flush=True)
        train(flags, data, parts, first_step, log)
    if WORLD > 1:
        torch.distributed.destroy_process_group()
    if RANK == 0 and flags["eval_clips"] and not flags["data_dir"] and flags["model"] == "moda":
        sample.after_training(flags["out_dir"] / "ckpt.pt", flags["out_dir"], flags["eval_clips"])

if __name__ == "__main__":
    run(main)
