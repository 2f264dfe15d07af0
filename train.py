"""Train MoDA, or its lip-sync expert ALSE, from scratch.

    python train.py                              the toy talker: data, training, a table, a video
    python train.py --model=alse                 the expert, for --alse, here and in sample.py
    python train.py --alse=out/alse/ckpt.pt      MoDA under its supervision (Eq. 6, 7)
    torchrun --standalone --nproc_per_node=8 train.py --preset=moda --data_dir=data/hdtf

All chance in step k (windows, times, noise, dropped conditions) is drawn for the whole batch
from (seed, k): a resumed run equals an uninterrupted one, and any number of processes sees the same
batch, but for ALSE's mismatched pairs. Ctrl-C, SIGTERM and SIGHUP end a run with a checkpoint,
from which --init_from=auto goes on.
Flags, with every field of moda.Config among them:
"""
import signal

if __name__ == "__main__":                         # Ctrl-C ends the imports without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import copy
import math
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter

import soundfile
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import sample
from data import (RANK, RATE, WORLD, Clips, ToyTalker, UsageError, check_effects, find_device,
                  interrupt, on_signals, parse_flags, read_ahead, report, run, save)
from moda import (ALSE, EMOTIONS, PRESETS, STRAIGHT, Config, JointBlock, MoDA, ResidualConv,
                  SingleBlock, explained, load_statistics, losses, read_checkpoint, reflow)

VAL_BATCHES = 8


@dataclass
class Settings:
    model: str = "moda"          # moda or alse
    preset: str = "toy"          # toy or moda
    data_dir: str = ""           # a data set prepared by data.py; else the toy talker
    clips: int = 400             # how many clips the toy talker makes, 8 s each
    out_dir: str = ""            # for checkpoints, log.csv; else out/<preset>[-straight], out/alse
    init_from: str = "scratch"   # resume; auto: resume or scratch; or a checkpoint to start from
    stats: str = ""              # file of mean and std, for a new run; net-200.pth needs mean.pt
    reflow: str = ""             # checkpoint of a teacher whose paths a straight student learns
    alse: str = ""               # checkpoint of a lip-sync expert that supervises MoDA
    tau: float = 0.4             # Eq. 7: its loss counts only below this
    steps: int = 2600            # of training
    batch_size: int = 4          # windows per step, over all processes
    learning_rate: float = 2.5e-3  # of Adam
    warmup: int = 50             # steps
    cooldown: float = 0.5        # last share of the steps, over which the rate falls to zero
    grad_clip: float = 1.0       # largest norm of the gradients; 0 = any
    ema: float = 0.99            # decay of a moving average of the weights, for sampling; 0 = none
    bf16: bool = False           # bfloat16 where autocast knows it to be safe
    compile: bool = False        # torch.compile the model's blocks
    checkpointing: bool = False  # of activations: slower, but ten times as many windows fit
    save_every: int = 250        # steps; of ckpt.pt, from which a run goes on
    keep_every: int = 0          # steps; such checkpoints are kept, ckpt-STEP.pt; 0 = none
    eval_every: int = 250        # steps; losses of val clips, the best kept as best.pt; 0 = never
    eval_clips: int = 12         # val clips of the toy, for a table (of 12 at most); 0: none
    sample_every: int = 0        # steps; videos samples/STEP.mp4 by the model so far; 0 = none
    sample: str = ""             # flags of sample.py for them
    seed: int = 1                # of the weights and all that is drawn
    device: str = ""             # cuda if there is one
    workers: int = 1             # threads that read windows


# Sec. 4.1.2: Adam, 1e-4, batch 512, 500 epochs; the other numbers are ours
PAPER = dict(steps=500000, batch_size=512, learning_rate=1e-4, warmup=1000, cooldown=0.0, ema=0.0,
             bf16=True, workers=4, save_every=2500, keep_every=50000, eval_every=2500)
# a student has its teacher's weights: a toy's needs fewer steps; --preset=moda keeps PAPER's
REFLOW = dict(steps=540, batch_size=8, learning_rate=5e-4)
# flags that have an effect only with, or only without, another one
EFFECTS = {
    "with --alse": "tau",
    "with --init_from=scratch|auto|resume": "reflow",
    "without --init_from=resume": "stats",
    "with --model=moda": "alse reflow sample sample_every heads n_four n_two n_one rope_streams "
                         "p_drop_audio p_drop_emotion focus cfg_audio cfg_emotion cfg_both chunk "
                         "smooth straight",
    "without --data_dir": "clips eval_clips",
    "without --reflow": " ".join(STRAIGHT)}


def read_settings(argv):
    """-> Settings of the run, Config of the network (both a preset's, changed by flags), and
    {field: value} of what flags changed in the Config."""
    # these two choose the others' defaults
    preset = "moda" if "--preset=moda" in argv else "toy"
    start = REFLOW if "--reflow=" in " ".join(argv) else {}
    if preset == "moda":
        start = PAPER
    settings, cfg = Settings(**start), Config(**PRESETS[preset])
    given = parse_flags(argv, __doc__, settings, cfg)
    if settings.preset != preset:
        raise UsageError(f"--preset={settings.preset}: known are toy, moda")
    if settings.model not in ("moda", "alse"):
        raise UsageError(f"--model={settings.model}: known are moda, alse")
    check_effects(given, settings, EFFECTS)
    positive = "steps batch_size clips save_every workers width heads".split()
    shares = "cooldown ema p_drop_audio p_drop_emotion".split()
    for name, value in (vars(settings) | vars(cfg)).items():
        # a chunk has to be longer than the overlap of sample.py
        lowest = 17 if name == "chunk" else int(name in positive)
        highest = 1 if name in shares else math.inf
        if type(value) is not str and not lowest <= value <= highest:
            raise UsageError(f"--{name}={value}: should be at least {lowest}, at most {highest}")
    parts = WORLD
    if settings.model == "alse":
        parts *= 2                                 # foreign pairs take two windows
    if settings.batch_size % parts:
        raise UsageError(f"--batch_size={settings.batch_size}: should be a multiple of {parts}: "
                         "of the processes, x 2 for the expert")
    return settings, cfg, {name: value for name, value in given.items() if hasattr(cfg, name)}


def open_data(settings):
    """The train and val clips of the data set or the toy talker; None if there are no val clips."""
    if not settings.data_dir:
        # one val clip at least, for val_loss
        return ToyTalker("train", settings.clips), ToyTalker("val", settings.eval_clips or 1)
    data = Clips(settings.data_dir)
    try:
        return data, Clips(settings.data_dir, "val")
    except ValueError as error:
        print(f"no validation: {error}")
        return data, None


def find_run(out, settings):
    """The last checkpoint of a run, or None to begin; ValueError if that would harm a run."""
    held = {"ckpt.pt", "best.pt", "log.csv"} & set(os.listdir(out))
    if settings.init_from == "resume" or settings.init_from == "auto" and "ckpt.pt" in held:
        return read_checkpoint(out / "ckpt.pt", "nothing to resume")
    # with "auto" it is a run that was killed before its first checkpoint
    if held and settings.init_from != "auto":
        raise ValueError(f"{out}: holds a run; --init_from=auto goes on from its ckpt.pt; to begin "
                         "again, delete the folder or name another --out_dir")


def resume(state, parts, settings):
    """Load a checkpoint, if any, into the parts of a run -> its step, its lowest val_loss."""
    if not state:
        return 0, math.inf
    with explained("ckpt.pt: was trained with other settings; use another --out_dir"):
        before = state["settings"] | state["config"]
        now = vars(settings) | vars(parts["model"].cfg)
        if now["reflow"] != before["reflow"]:      # it may be the teacher's
            raise ValueError("--reflow differs")
        if RANK == 0:
            print(f"flags that are new: {dict(now.items() - before.items())}")
        for name, part in parts.items():
            part.load_state_dict(state[name])
        return state["step"], state["best"]


def open_log(out, first_step, kind):
    """log.csv, which keeps the rows of the steps before first_step. main calls this when the first
    gradients are finite: a new run that fails at once leaves no file, which would bar the next."""
    if RANK > 0:
        return open(os.devnull, "w")
    log = open(out / "log.csv", "a+")
    log.seek(0)
    rows = log.readlines()[:first_step + 1] if first_step else []
    log.truncate(len("".join(rows)))
    terms = "rf,vel,sync" if kind is MoDA else "alse"                  # of the loss
    if not rows:
        print(f"step,loss,{terms},lips,grad_norm,learning_rate,seconds,waiting,val_loss,"
              "val_lips", file=log)
    return log


def loss_terms(net, model, batch, expert, tau, teacher):
    """The terms of the loss, L_RF, L_vel and L_ALSE of a MoDA (Eq. 6), or an ALSE's own; and last a
    number that is only logged, the lips' own error.

    net: the model, or what wraps it; batch: motion, prev, audio, identity and emotion of windows,
    in LivePortrait units, and what moda.draw gives; expert: from load_expert, or None; teacher: a
    MoDA whose paths are to be made straight, or None."""
    if isinstance(model, ALSE):
        late = int(3 + 27 * batch["t"][0])         # 3 to 29 frames; t is the step's random number
        # net in place of self, for DDP has to see the forward pass
        loss = ALSE.pretraining_loss(net, batch["audio"], batch["motion"], late)
        return loss, loss.detach()                 # logged as lips too, for it sees only them
    batch = dict(batch)
    batch["z0"] = model.normalise(batch.pop("motion"))
    batch["prev"] = model.normalise(batch["prev"])
    if teacher:
        batch = reflow(teacher, model, batch)
    return losses(net, **batch, weight=model.weight, expert=expert, tau=tau)


def rate_of(settings, step):
    """The learning rate rises over the warm-up and falls to zero over the cool-down."""
    rise = (step + 1) / max(1, settings.warmup)
    fall = (settings.steps - step) / max(1, settings.cooldown * settings.steps)
    return settings.learning_rate * min(1, rise, fall)


def mean_over_processes(numbers):
    """A tensor of numbers -> a list of each one's mean over all processes."""
    if WORLD > 1:
        dist.all_reduce(numbers)
    return (numbers / WORLD).tolist()


@torch.no_grad()
def validate(model, data, settings, expert, teacher, autocast):
    """val_loss and the lips' own error, on the same windows, times, noise and dropped conditions
    each time (but with a teacher, reflow moves the noise by the model's own error). read_ahead
    gives batches of windows, with what moda.draw draws for the model's Config, on its device."""
    total = 0
    for batch in read_ahead(data, model, settings, range(VAL_BATCHES)):
        with autocast:
            terms = loss_terms(model, model, batch, expert, settings.tau, teacher)
        total += torch.stack(terms)
    *terms, lips = mean_over_processes(total / VAL_BATCHES)
    return sum(terms), lips


def is_due(step, every, settings):
    """What happens every so many steps, if any, also happens after the last."""
    return every and (step % every == 0 or step == settings.steps)


def make_video(out, settings, name, val):
    """A video by sample.py of what the last checkpoint makes of the first val clip's voice, or,
    without val clips, the first train clip's; flags in --sample come last, and so count; if it
    fails, the training goes on."""
    video = out / f"{name}.mp4"
    voice = out / "sample.wav"
    try:
        video.parent.mkdir(exist_ok=True)
        if settings.data_dir:
            voice = val.voices[0]
        else:
            soundfile.write(voice, val.wavs[0], RATE)
        flags = [f"--ckpt={out}/ckpt.pt", f"--output_path={video}", f"--audio_path={voice}",
                 f"--emotion={EMOTIONS[val.emotion[0]]}", f"--device={settings.device}"]
        sample.main([*flags, *settings.sample.split()])
    except Exception as error:
        report(f"{video}: could not be made: {error}")


def save_run(out, settings, parts, step, stop, best, improved, val):
    """The checkpoints that are due: settings, step, and the state of every part of the run; then a
    video, if one is due."""
    model = parts["model"]
    state = dict(kind=type(model).__name__, config=vars(model.cfg), settings=vars(settings),
                 step=step, best=best)
    state |= {name: part.state_dict() for name, part in parts.items()}
    if improved:
        save(out / "best.pt", state)
    if is_due(step, settings.keep_every, settings):
        save(out / f"ckpt-{step}.pt", state)
    sampling = is_due(step, settings.sample_every, settings)
    # ckpt.pt is written last: if a kill comes before, the resumed run writes the others again
    if stop or sampling or is_due(step, settings.save_every, settings):
        save(out / "ckpt.pt", state)
    if sampling:
        make_video(out, settings, f"samples/{step}", val)


def load_expert(path, model):
    """The frozen expert as a function of voice and of motion as `model` normalises it, for the
    expert has statistics of its own; None without a path."""
    if not path:
        return None
    expert = ALSE.from_pretrained(path).to(model.mean.device).requires_grad_(False)
    return lambda audio, z0: expert(audio, model.denormalise(z0))


def set_up(device):
    """Fast arithmetic, whose results are the same each time."""
    torch.set_flush_denormal(True)                 # Adam's tiny moments are slow on a CPU
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")                     # TF32
        # otherwise attention adds up its gradients in any order; cuBLAS asks for the variable
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False    # which takes time


def wrapped(model, settings):
    """The model as it is called in training; parameters keep their names in checkpoints."""
    for block in model.modules():
        if isinstance(block, (JointBlock, SingleBlock, ResidualConv)):
            if settings.compile:                   # equal blocks share one compilation
                block.forward = torch.compile(block.forward)
            if settings.checkpointing:
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    if WORLD > 1:
        return DistributedDataParallel(model)
    return model


def main(argv):
    settings, cfg, changes = read_settings(argv)
    device = find_device(settings.device)
    kind = ALSE if settings.model == "alse" else MoDA
    default = settings.preset if kind is MoDA else "alse"
    teacher = None
    if settings.reflow:
        teacher = MoDA.from_pretrained(settings.reflow).to(device)
        changes |= STRAIGHT
        default += "-straight"
    out = Path(settings.out_dir or f"out/{default}")
    out.mkdir(parents=True, exist_ok=True)

    # with torchrun the first process looks for a run, and sends all others what it found
    found = [find_run(out, settings) if RANK == 0 else None]
    if WORLD > 1:
        dist.init_process_group()
        dist.broadcast_object_list(found, device=torch.device("cpu"))
    set_up(device)
    torch.manual_seed(settings.seed)

    # data, model and optimizer
    data, val = open_data(settings)
    # the Config is `cfg` from scratch, else that of the checkpoint it starts from, with `changes`
    start = settings.reflow or settings.init_from
    if found[0]:
        # for its Config; all else is loaded by `resume`
        model = kind.from_pretrained(out, found[0], **changes)
    elif start in ("scratch", "auto"):
        cfg.audio_layers, cfg.audio_dim = data.audio_shape
        vars(cfg).update(changes)                  # a wrong --audio_dim fails, and is not ignored
        model = kind(cfg)
        model.mean[:], model.std[:] = data.moments
        if kind is MoDA:
            model.x_c_mean[:], model.x_c_std[:] = data.x_c_moments
    else:
        model = kind.from_pretrained(start, **changes)
    if settings.stats or model.std.eq(1).all():    # as in net-200.pth, which has none
        load_statistics(model, settings.stats or "mean.pt")
    model.to(device).train()
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.99), fused=True)
    parts = dict(model=model, optimizer=optimizer)                     # of a checkpoint
    if settings.ema:
        parts["ema"] = copy.deepcopy(model).requires_grad_(False)
    sampled = parts.get("ema", model)              # the average, or without one the model itself
    # popped, for it takes a gigabyte or more
    first_step, best = resume(found.pop(), parts, settings)
    net = wrapped(model, settings)

    # the loop; a signal ends it after a step
    stop = False
    stops = []
    on_signals(lambda *_: stops.append(True))
    batches = read_ahead(data, model, settings, range(first_step, settings.steps))
    bar = tqdm(batches, "training", settings.steps, initial=first_step, disable=RANK > 0)
    expert = load_expert(settings.alse, model)
    # no cache: in torch 2.8 it hands weights that reflow had cast, without gradients, to `losses`
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=settings.bf16,
                              cache_enabled=False)
    log = None
    began = perf_counter()
    for step, batch in enumerate(bar, first_step):
        waiting = perf_counter() - began

        # forward and backward
        with autocast:
            terms = loss_terms(net, model, batch, expert, settings.tau, teacher)
        terms = torch.stack(terms)
        terms[:-1].sum().backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip or torch.inf)

        # step, if all is finite; stop: a signal has come to some process
        numbers = norm.new_tensor([*terms.detach(), norm, len(stops)])
        *terms, lips, norm, stop = mean_over_processes(numbers)
        loss = sum(terms)
        if not math.isfinite(loss + norm):
            raise ValueError(f"step {step}: loss {loss}, gradients {norm}; what was saved is good")
        log = log or open_log(out, first_step, kind)                   # now nothing should fail
        rate = optimizer.param_groups[0]["lr"] = rate_of(settings, step)
        optimizer.step()
        optimizer.zero_grad()
        if settings.ema:
            decay = min(settings.ema, (1 + step) / (10 + step))        # to forget the random start
            weights = [p.detach() for p in model.parameters()]
            torch._foreach_lerp_([*sampled.parameters()], weights, 1 - decay)
        seconds = perf_counter() - began
        step += 1

        # validate, log and save
        val_loss = val_lips = ""
        if val and is_due(step, settings.eval_every, settings):
            val_loss, val_lips = validate(sampled, val, settings, expert, teacher, autocast)
            best = min(best, val_loss)
            bar.set_description(f"val_loss {val_loss:.3f}, val_lips {val_lips:.3f}")
        # steps count from 0, a checkpoint's number is how many are done
        print(step - 1, loss, *terms, lips, norm, rate, seconds, waiting, val_loss, val_lips,
              sep=",", file=log, flush=True)
        bar.set_postfix_str(f"loss {loss:.3f}, rate {rate:.1e}, "
                            f"{settings.batch_size / seconds:.0f} windows/s, "
                            f"{waiting / seconds:.0%} waiting")
        if RANK == 0:
            save_run(out, settings, parts, step, stop, best, val_loss == best, val or data)
        if stop:
            break
        began = perf_counter()
    if WORLD > 1:
        # Without this a deadlock: DDP, as the group's last holder, would wait for gloo's threads
        # while it holds Python's lock, for which they wait.
        del net
        dist.destroy_process_group()
    if stop or stops or RANK > 0:                  # a signal may have come after the last step
        return
    on_signals(interrupt)
    print(f"{out}: finished, {settings.steps} steps")
    if kind is MoDA and settings.eval_clips and not settings.data_dir:
        options = sample.Settings(ckpt=f"{out}/ckpt.pt")
        sample.evaluate(options, sample.open_model(options, {}), val, data)
        make_video(out, settings, "sample", val)


if __name__ == "__main__":
    run(main)
