"""Training survives whatever happens to it: a killed run goes on to the bit, any number of
processes follow the same curve, damaged clips are passed over, and what ends a run leaves a
checkpoint."""
import ast
import copy
import csv
import functools
import json
import math
import os
import random
import re
import signal
import socket
import tempfile
import time

import imageio_ffmpeg
import numpy as np
import pytest
import torch

import build
import data
import moda
import train
from data import Clips, ToyTalker, UsageError, save
from forks import Script
from moda import ALSE, EMOTIONS, Config, MoDA, read_checkpoint

TINY = "--width=32 --eval_every=0 --device=cpu --warmup=5".split()
FLAGS = "--steps=20 --batch_size=4 --save_every=3 --eval_every=4 --init_from=auto".split()
SPLIT = ["--workers=2"]
toy = functools.cache(ToyTalker)
pytestmark = pytest.mark.usefixtures("one_thread")     # as in the processes: sums have one order


def arguments(out, flags):
    """A tiny training's, of the toy unless the flags name a data set."""
    own_data = "--data_dir" in " ".join(flags)
    toy_clips = [] if own_data else ["--clips=4", "--eval_clips=0"]
    return [*TINY, *toy_clips, f"--out_dir={out}", *flags]


def start(out, *flags, ranks=1):
    """Processes of a training, as torchrun starts them; each leads its own group and prints
    into a file."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    env = dict(MASTER_ADDR="localhost", MASTER_PORT=str(port), WORLD_SIZE=str(ranks))
    run = []
    for rank in range(ranks):
        file = tempfile.TemporaryFile("w+")
        process = Script("train.py", *arguments(out, flags), env=env | dict(RANK=str(rank)),
                         stdout=file.fileno(), stderr=file.fileno())
        process.file = file
        run.append(process)
    return run


def printed(process):
    process.file.seek(0)
    return process.file.read()


def finish(run):
    for process in run:
        assert process.wait(timeout=200) == 0, printed(process)


def send(run, number):
    for process in run:
        os.killpg(process.pid, number)


def train_here(out, *flags):
    train.main(arguments(out, flags))
    return curve(out)


def read_log(out):
    with open(out / "log.csv") as file:
        return list(csv.DictReader(file))


def curve(out):
    """The losses in the log, step by step."""
    names = "step", "loss", "rf", "vel", "grad_norm", "val_loss", "val_lips"
    return [[row[name] for name in names if name in row] for row in read_log(out)]


def wait_for(out, step, run):
    """Until the log shows that `step` is done."""
    log = out / "log.csv"
    while not log.exists() or f"\n{step}," not in log.read_text():
        assert run[0].poll() is None, printed(run[0])
        time.sleep(0.01)


def assert_same(a, b):
    """Two checkpoints hold the same bits, but for --out_dir and the like."""
    states = [read_checkpoint(path) | dict(settings=None) for path in (a, b)]
    leaves_a, leaves_b = map(torch.utils._pytree.tree_flatten, states)
    assert leaves_a[1] == leaves_b[1]
    for x, y in zip(leaves_a[0], leaves_b[0]):
        assert torch.equal(x, y) if torch.is_tensor(x) else x == y


@pytest.fixture(autouse=True)
def one_toy(monkeypatch):
    """All trainings in this process share one toy talker."""
    monkeypatch.setattr(train, "ToyTalker", toy)


# ------------------------------------------------------------------------- killed, stopped, resumed
@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    out = tmp_path_factory.mktemp("one")
    train_here(out, *FLAGS)
    return out


@pytest.fixture(scope="module", autouse=True)
def two_started(tmp_path_factory):
    """They run beside the first tests."""
    out = tmp_path_factory.mktemp("two")
    run = start(out, *FLAGS, *SPLIT, ranks=2)
    yield out, run
    send([process for process in run if process.poll() is None], signal.SIGKILL)   # if unused


@pytest.fixture(scope="module")
def two_processes(two_started):
    out, run = two_started
    finish(run)
    return out


def test_a_killed_run_goes_on_to_the_bit(one_process, tmp_path):
    run = start(tmp_path, *FLAGS)
    wait_for(tmp_path, random.randrange(3, 16), run)
    send(run, signal.SIGKILL)
    assert train_here(tmp_path, *FLAGS) == curve(one_process)
    for name in "ckpt.pt", "best.pt":
        assert_same(tmp_path / name, one_process / name)


def test_two_killed_processes_go_on_to_the_bit(two_processes, tmp_path):
    run = start(tmp_path, *FLAGS, *SPLIT, ranks=2)
    wait_for(tmp_path, random.randrange(3, 16), run)
    send(run, signal.SIGKILL)
    finish(start(tmp_path, *FLAGS, *SPLIT, ranks=2))
    assert curve(tmp_path) == curve(two_processes)
    assert_same(tmp_path / "ckpt.pt", two_processes / "ckpt.pt")


def test_two_processes_follow_one_process(one_process, two_processes):
    def numbers(out, names):
        return np.array([[row[name] or 0 for name in names] for row in read_log(out)], float)
    one, two = [numbers(out, ("loss", "rf", "vel")) for out in (one_process, two_processes)]
    assert one.shape == (20, 3)
    assert np.abs(one - two).max() < 1e-5
    assert one[-1, 0] < one[0, 0] - 0.1
    one, two = [numbers(out, ("val_loss", "val_lips")) for out in (one_process, two_processes)]
    assert np.abs(one / two.clip(1e-9) - 1)[3::4].max() < 1e-4


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_any_process_ends_all_with_a_checkpoint(tmp_path, number):
    """SIGTERM, as a queue sends it, Ctrl-C, or SIGHUP, of a terminal that closes."""
    if signal.getsignal(number) == signal.SIG_IGN:
        pytest.skip("ignored here, as under nohup")
    flags = "--batch_size=2 --workers=1 --eval_clips=4".split()
    run = start(tmp_path, "--steps=100000", *flags, ranks=2)
    wait_for(tmp_path, 2, run)
    send(run[1:], number)
    finish(run)
    step = read_checkpoint(tmp_path / "ckpt.pt")["step"]
    assert step == len(curve(tmp_path)) > 2
    assert not (tmp_path / "sample.mp4").exists()
    flags = ["--batch_size=2", "--init_from=resume", f"--steps={step + 1}"]
    assert train_here(tmp_path, *flags)[-1][0] == str(step)


@pytest.mark.parametrize("model", ["moda", "alse"])
def test_an_earlier_checkpoint_leads_to_the_same_end(tmp_path, model):
    flags = f"--model={model} --steps=6 --batch_size=2 --save_every=2 --keep_every=4".split()
    whole = train_here(tmp_path, *flags)
    assert len(whole) == 6
    last = tmp_path / "last.pt"
    (tmp_path / "ckpt.pt").rename(last)
    (tmp_path / "ckpt-4.pt").rename(tmp_path / "ckpt.pt")
    assert train_here(tmp_path, *flags, "--init_from=resume") == whole
    assert_same(tmp_path / "ckpt.pt", last)


def test_a_signal_in_the_last_validation_ends_the_run(tmp_path, monkeypatch, capsys):
    def validate(*args):
        signal.raise_signal(signal.SIGTERM)
        return 1.0, 1.0
    monkeypatch.setattr(train, "validate", validate)
    before = signal.getsignal(signal.SIGTERM)
    train_here(tmp_path, "--steps=2", "--batch_size=2", "--eval_every=2")
    signal.signal(signal.SIGTERM, before)
    assert "finished" not in capsys.readouterr().out
    assert read_checkpoint(tmp_path / "ckpt.pt")["step"] == 2


def test_a_folder_that_holds_a_run_is_not_overwritten_by_mistake(tmp_path, capsys):
    flags = "--steps=2", "--batch_size=2"
    first = train_here(tmp_path, *flags)
    with pytest.raises(ValueError, match="holds a run; --init_from=auto .* delete the folder"):
        train_here(tmp_path, *flags)
    assert train_here(tmp_path, *flags, "--init_from=auto") == first
    assert f"{tmp_path}: finished, 2 steps\n" in capsys.readouterr().out
    train_here(tmp_path, "--steps=3", "--batch_size=2", "--init_from=auto", "--seed=2")
    printed = capsys.readouterr().out
    changed, = re.findall("^flags that are new: (.*)$", printed, re.M)
    assert ast.literal_eval(changed) == dict(steps=3, seed=2, init_from="auto")


@pytest.mark.parametrize("name", ["log.csv", "ckpt.pt", "best.pt"])
def test_a_file_that_looks_like_a_runs_is_not_lost(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match="holds a run"):
        train_here(tmp_path, "--steps=1", "--batch_size=2")
    assert (tmp_path / name).read_text() == "mine"


def test_a_run_that_fails_at_once_leaves_no_file(tmp_path, monkeypatch):
    """Which the next one would take for a run."""
    nan = torch.full((2,), math.nan)
    monkeypatch.setattr(data, "draw", lambda *args: moda.draw(*args) | dict(t=nan))
    with pytest.raises(ValueError, match="step 0: "):
        train_here(tmp_path, "--steps=2", "--batch_size=2")
    assert not list(tmp_path.iterdir())


def test_milestones_are_kept(tmp_path):
    train_here(tmp_path, *"--steps=5 --batch_size=2 --save_every=1 --keep_every=2".split())
    kept = {path.name: read_checkpoint(path)["step"] for path in tmp_path.glob("*.pt")}
    assert kept == {"ckpt.pt": 5, "ckpt-2.pt": 2, "ckpt-4.pt": 4, "ckpt-5.pt": 5}


def test_videos_in_mid_training_change_no_number_and_one_that_fails_ends_nothing(
        tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "ToyTalker", lambda split, clips: toy(split, 1))
    grey = np.full((64, 64, 3), 128, np.uint8)                         # which is soon drawn
    monkeypatch.setattr(train.sample.Sketch, "frames", lambda *given: [grey] * len(given[2]))
    flags = "--steps=3", "--batch_size=2", "--sample=--steps=1"
    plain = train_here(tmp_path / "plain", *flags)
    assert train_here(tmp_path / "every", *flags, "--sample_every=2") == plain
    assert_same(tmp_path / "every/ckpt.pt", tmp_path / "plain/ckpt.pt")
    for step in 2, 3:
        video = tmp_path / f"every/samples/{step}.mp4"
        assert imageio_ffmpeg.count_frames_and_secs(video)[0] == 200
        assert np.abs(data.load_audio(video)).max() > 0.01
    train_here(tmp_path / "failing", *flags[:2], "--sample_every=2", "--sample=--audio_path=no.wav")
    assert "samples/2.mp4: could not be made: no.wav: no sound" in capsys.readouterr().err


def test_a_data_sets_videos_speak_with_its_own_first_voice(tmp_path, monkeypatch):
    folder = build.data_set(tmp_path / "set", lengths=(200, 90))
    manifest = json.loads((folder / "manifest.json").read_text())
    voices = [f"{tmp_path}/{name}.wav" for name in ("first", "second")]
    for row, voice in zip(manifest["clips"], voices):
        row |= dict(split="val", voice=voice, emotion=EMOTIONS.index("fear"))
    manifest["clips"].append(manifest["clips"][1] | dict(split="train"))
    build.write_manifest(folder, **manifest)
    given = []
    monkeypatch.setattr(train.sample, "main", given.append)
    flags = "--steps=1", "--batch_size=1", "--sample_every=1", "--sample=--steps=1 --bf16"
    train_here(tmp_path / "out", f"--data_dir={folder}", *flags)
    assert given[0][2:4] == [f"--audio_path={voices[0]}", "--emotion=fear"]
    assert given[0][-2:] == ["--steps=1", "--bf16"]


# --------------------------------------------------------------------------------------- validation
def test_val_loss_is_logged_and_the_best_is_kept(one_process):
    scores = {int(row["step"]) + 1: row["val_loss"] for row in read_log(one_process)}
    assert [step for step, score in scores.items() if score] == [4, 8, 12, 16, 20]
    best = min([4, 8, 12, 16, 20], key=lambda step: float(scores[step]))
    state = read_checkpoint(one_process / "best.pt")
    assert (state["step"], state["best"]) == (best, float(scores[best]))
    lips = [float(row["val_lips"]) for row in read_log(one_process) if row["val_lips"]]
    assert 0 < lips[-1] < lips[0]


@pytest.mark.parametrize("model", ["moda", "alse"])
def test_validation_repeats_itself_and_changes_no_training(tmp_path, model):
    """On clips of a data set; with a rate of 0 every evaluation gives the same number."""
    folder = build.data_set(tmp_path / "set", lengths=(200, 90))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["clips"][1]["split"] = "val"
    build.write_manifest(folder, **manifest)
    flags = f"--data_dir={folder} --model={model} --batch_size=2 --steps=3".split()
    still = flags + ["--learning_rate=0", "--eval_every=1", "--ema=0.9"]
    train_here(tmp_path / "still", *still)
    assert len({row["val_loss"] for row in read_log(tmp_path / "still")}) == 1
    train_here(tmp_path / "with", *flags, "--eval_every=1")
    train_here(tmp_path / "without", *flags)
    losses = [[row["loss"] for row in read_log(tmp_path / name)] for name in ("with", "without")]
    assert losses[0] == losses[1]


def test_an_average_of_a_short_training_does_not_keep_its_beginning(tmp_path):
    """With a decay of 0.999 throughout it would still be what it was 30 steps ago."""
    flags = "--batch_size=2 --cooldown=0 --eval_every=30 --steps=30".split()
    runs = dict(first=["--learning_rate=0", "--steps=1"], last=["--ema=0"], average=["--ema=0.999"])
    val_loss = {}
    for name, others in runs.items():
        train_here(tmp_path / name, *flags, *others)
        val_loss[name] = read_checkpoint(tmp_path / name / "best.pt")["best"]
    learned = val_loss["first"] - val_loss["last"]
    assert val_loss["first"] - val_loss["average"] > 0.7 * learned > 0


def test_what_cannot_be_resumed_is_refused_in_one_line(tmp_path):
    resume = "--steps=2 --batch_size=2 --init_from=resume".split()
    with pytest.raises(ValueError, match="ckpt.pt: not a readable checkpoint .*nothing to resume"):
        train_here(tmp_path, *resume)
    train_here(tmp_path, "--steps=1", "--batch_size=2", "--ema=0")
    for other in "--width=64", "--model=alse", "--ema=0.9":
        with pytest.raises(ValueError, match="(not a .* this version|other settings)") as error:
            train_here(tmp_path, *resume, other)
        assert "\n" not in str(error.value)
    with pytest.raises(OSError, match="ckpt.pt"):              # no place for a folder
        train_here(tmp_path / "ckpt.pt", "--steps=1")


# -------------------------------------------------------------------- losses and clips that are bad
def test_a_loss_that_is_no_number_stops_before_it_harms(tmp_path, monkeypatch):
    def draw(cfg, B, N, generator):
        drawn = moda.draw(cfg, B, N, generator)
        if generator.initial_seed() % 10**9 == 5:              # of step 5
            drawn["eps"] *= math.nan
        return drawn
    monkeypatch.setattr(data, "draw", draw)
    with pytest.raises(ValueError, match="step 5: .* nan; what was saved is good"):
        train_here(tmp_path, "--steps=9", "--batch_size=2", "--save_every=2")
    assert len(curve(tmp_path)) == 5
    assert read_checkpoint(tmp_path / "ckpt.pt")["step"] == 4
    model = MoDA.from_pretrained(tmp_path / "ckpt.pt")
    assert all(p.isfinite().all() for p in model.parameters())


def test_another_window_stands_in_for_one_of_a_damaged_clip(tmp_path):
    folder = build.data_set(tmp_path / "set", lengths=(200, 181))
    (folder / "clips/1/audio.npy").write_bytes(b"")
    settings, cfg, _ = train.read_settings(["--batch_size=16"])
    batch, reports = data.draw_batch(0, Clips(folder), cfg, settings)
    good = torch.from_numpy(np.load(folder / "clips/0/motion.npy"))
    assert batch["motion"].shape == (16, 80, 70)
    assert torch.isin(batch["motion"], good).all()
    assert 0 < len(reports)
    assert all("clips/1: cannot be used" in report for report in reports)


def hits(seed, window, steps, batch_size, n_windows):
    """How often a training draws a window."""
    times = 0
    for step in range(steps):
        generator = torch.Generator().manual_seed(seed * 10**9 + step)
        drawn = torch.randint(n_windows, (batch_size, 10), generator=generator)
        times += (drawn[:, 0] == window).sum().item()
    return times


@pytest.mark.parametrize("model", ["moda", "alse"])
def test_a_damaged_window_is_reported_once_and_passed_over(tmp_path, capsys, model):
    folder = build.data_set(tmp_path / "set", lengths=(281, 81))       # 201 windows and one
    np.save(folder / "clips/1/motion.npy", np.full((81, 70), np.nan, np.float32))
    once = [seed for seed in range(1, 20) if hits(seed, 201, 25, 4, 202) == 1]
    rows = train_here(tmp_path / "out", f"--data_dir={folder}", f"--model={model}",
                      f"--seed={once[0]}", "--steps=25", "--batch_size=4")
    reports = [line for line in capsys.readouterr().err.splitlines() if "clips/1" in line]
    assert len(rows) == 25
    assert len(reports) == 1                                   # 1 % of 100
    assert reports[0].startswith("passed over: ")
    assert "cannot be used" in reports[0]


def test_a_damaged_window_of_validation_does_not_end_a_short_training(tmp_path):
    folder = build.data_set(tmp_path / "set", (100, 281, 100, 81), splits=("train", "val"))
    np.save(folder / "clips/3/motion.npy", np.full((81, 70), np.nan, np.float32))
    once = [seed for seed in range(1, 20) if hits(seed, 201, train.VAL_BATCHES, 4, 202) == 1]
    rows = train_here(tmp_path / "out", f"--data_dir={folder}", f"--seed={once[0]}", "--steps=25",
                      "--batch_size=4", "--eval_every=25")
    assert float(rows[-1][5]) > 0                              # val_loss


def one_damaged(folder):
    """A data set of two clips, the second of which cannot be read."""
    build.data_set(folder, lengths=(181, 131))                 # 101 and 51 windows
    (folder / "clips/1/identity.npy").unlink()
    return folder


def all_damaged(folder):
    (one_damaged(folder) / "clips/0/motion.npy").write_bytes(b"")
    return folder


DAMAGED = {
    one_damaged: "over 1 % of the windows cannot be read.*clips/1",
    all_damaged: "clips/[01]: cannot be used"}


@pytest.mark.parametrize("model", ["moda", "alse"])
@pytest.mark.parametrize("damaged, words", DAMAGED.items(), ids=["one", "all"])
def test_more_than_1_percent_damaged_windows_end_a_training_in_one_line(
        tmp_path, damaged, words, model):
    flags = f"--model={model} --steps=100 --batch_size=2".split()
    with pytest.raises(ValueError, match=words) as error:
        train_here(tmp_path / "out", f"--data_dir={damaged(tmp_path / 'set')}", *flags)
    assert "\n" not in str(error.value)
    log = tmp_path / "out/log.csv"
    assert not log.exists() or len(log.read_text().splitlines()) < 20


def test_a_thread_that_can_read_no_clip_ends_the_command_in_one_line(tmp_path):
    data_dir = f"--data_dir={all_damaged(tmp_path / 'set')}"
    process, = run = start(tmp_path / "out", data_dir, "--model=alse", "--workers=1")
    try:
        assert process.wait(timeout=100) == 1
    finally:
        if process.poll() is None:                             # it hangs
            send(run, signal.SIGKILL)
    assert printed(process).count("error: ") == 1
    assert re.search(DAMAGED[all_damaged], printed(process))
    assert "Traceback" not in printed(process)


# ------------------------------------------------------------------------------------------ options
def test_recomputed_activations_change_no_bit(tmp_path, monkeypatch):
    flags, blocks = ["--steps=3", "--batch_size=2"], []

    def checkpoint(*args, **options):
        blocks.append(1)
        return torch.utils.checkpoint.checkpoint(*args, **options)
    plain = train_here(tmp_path / "a", *flags)
    monkeypatch.setattr(train, "checkpoint", checkpoint)
    assert train_here(tmp_path / "b", *flags, "--checkpointing") == plain
    assert len(blocks) >= 3 * 3                                # steps x blocks
    assert_same(tmp_path / "a/ckpt.pt", tmp_path / "b/ckpt.pt")


def test_equal_blocks_share_a_compilation(monkeypatch):
    """A network of twelve blocks takes no more than one of six, and --compile changes no loss."""
    made = []

    def backend(graph, inputs):
        made.append(graph)
        return graph.forward
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    counts = []
    torch._dynamo.reset()
    for n in 2, 4:
        model = build.model(n_four=n, n_two=n, n_one=n)
        batch = dict(moda.draw(model.cfg, 2, 10, torch.Generator().manual_seed(0)),
                     motion=torch.randn(2, 10, moda.M), audio=torch.randn(2, 10, 1, 160),
                     emotion=torch.tensor([1, 2]), identity=torch.randn(2, 63),
                     prev=torch.randn(2, moda.M))
        plain = train.loss_terms(model, model, batch, None, 0.4, None)
        net = train.wrapped(model, train.Settings(compile=True))
        compiled = train.loss_terms(net, model, batch, None, 0.4, None)
        assert torch.allclose(torch.stack(compiled), torch.stack(plain), rtol=1e-5)
        counts.append(len(made))
    torch._dynamo.reset()
    assert counts[0] == counts[1] > 0


def test_the_moving_average_follows_the_weights_and_is_what_is_loaded(tmp_path, monkeypatch):
    saved = []

    def save_run(out, settings, parts, *others):
        # or their history would grow with every step
        assert not any(p.requires_grad for p in parts["ema"].parameters())
        state = {name: parts[name].state_dict() for name in ("model", "ema")}
        saved.append(copy.deepcopy(state))
        usual(out, settings, parts, *others)
    usual = train.save_run
    monkeypatch.setattr(train, "save_run", save_run)
    train_here(tmp_path, "--steps=3", "--batch_size=2", "--ema=0.2")
    # at first the average is of few weights, so that it forgets the random start
    for step, (before, after) in enumerate(zip(saved, saved[1:]), 1):
        decay = min(0.2, (1 + step) / (10 + step))
        for name, weight in after["model"].items():
            expected = before["ema"][name].lerp(weight, 1 - decay)
            assert torch.allclose(after["ema"][name], expected, atol=1e-6)
    last = saved[-1]
    assert any(not torch.equal(last["ema"][name], last["model"][name]) for name in last["ema"])
    loaded = MoDA.from_pretrained(tmp_path / "ckpt.pt").state_dict()
    assert all(torch.equal(loaded[name], x) for name, x in last["ema"].items())


def test_the_expert_takes_a_moving_average_too(tmp_path):
    flags = "--model=alse --steps=3 --batch_size=4 --ema=0.5".split()
    assert len(train_here(tmp_path, *flags)) == 3
    state = read_checkpoint(tmp_path / "ckpt.pt")
    loaded = ALSE.from_pretrained(tmp_path / "ckpt.pt").state_dict()
    assert all(torch.equal(loaded[name], x) for name, x in state["ema"].items())
    assert any(not torch.equal(x, state["model"][name]) for name, x in state["ema"].items())


def test_threads_read_ahead_and_keep_the_order(monkeypatch):
    read, draw_batch = [], data.draw_batch

    def slow_at_first(step, *given):
        time.sleep(0.1 / (1 + step))
        read.append(step)
        return draw_batch(step, *given)
    monkeypatch.setattr(data, "draw_batch", slow_at_first)
    model = MoDA(Config(**build.SMALL))
    settings = train.Settings(workers=3)
    batches = data.read_ahead(toy("train", 4), model, settings, range(9))
    expected = [draw_batch(step, toy("train", 4), model.cfg, settings)[0] for step in range(9)]
    first = next(batches)
    time.sleep(0.3)
    assert sorted(read) == [0, 1, 2, 3]                        # one that is used, three behind it
    for batch, truth in zip([first, *batches], expected, strict=True):
        assert all(torch.equal(batch[name], x) for name, x in truth.items())


@pytest.mark.filterwarnings("ignore:Mismatch dtype")               # rms_norm under autocast on CPUs
@pytest.mark.parametrize("model, changes", [("moda", ["--focus=2"]), ("alse", [])])
def test_a_checkpoint_is_a_start_for_another_run(tmp_path, model, changes):
    flags = f"--model={model} --batch_size=2 --warmup=0 --bf16 --cooldown=0".split()
    train_here(tmp_path / "first", *flags, "--steps=2")
    first = tmp_path / "first/ckpt.pt"
    state = read_checkpoint(first)
    state["config"] |= dict(rope_streams=2, chunk=80)          # as those of the released model
    save(first, state)
    second = tmp_path / "second"
    begin = *flags, f"--init_from={first}"
    with pytest.raises(ValueError, match="is of shape"):   # what it has is not changed in silence
        train_here(second, *begin, "--width=64")
    train_here(second, *begin, "--steps=1", "--save_every=1", *changes)
    begun = read_checkpoint(second / "ckpt.pt")["config"]
    assert [begun[name] for name in ("rope_streams", "chunk")] == [2, 80]
    assert begun["focus"] == (2 if changes else 4)             # 4 is the toy's
    train_here(second, *flags, "--init_from=auto", "--steps=2")
    resumed = read_checkpoint(second / "ckpt.pt")
    assert resumed["step"] == 2 and resumed["config"] == begun


def test_statistics_of_motion_from_a_file_leave_those_of_faces(tmp_path):
    torch.save(dict(mean=torch.zeros(70), std=torch.full((70,), 2.0)), tmp_path / "mean.pt")
    train_here(tmp_path, "--steps=1", "--batch_size=2", f"--stats={tmp_path}/mean.pt")
    model = MoDA.from_pretrained(tmp_path / "ckpt.pt")
    assert (model.std == 2).all()
    assert (model.x_c_std < 0.1).all()                         # faces differ by less


@pytest.mark.filterwarnings("ignore:Mismatch dtype")               # rms_norm under autocast on CPUs
@pytest.mark.parametrize("precision", [[], ["--bf16"]])
def test_a_straight_student_of_a_teacher_is_trained_and_resumed_like_any_model(
        tmp_path, precision):
    teacher = build.model()
    teacher.mean[:], teacher.std[:] = 1.5 * toy("train", 4).moments    # its own, not the data's
    state = dict(kind="MoDA", config=vars(teacher.cfg), model=teacher.state_dict())
    torch.save(state, tmp_path / "teacher.pt")
    flags = f"--reflow={tmp_path}/teacher.pt --steps=4 --batch_size=2 --keep_every=2".split()
    flags += "--heads=2", "--n_one=2", *precision              # sizes as the teacher's
    whole = train_here(tmp_path, *flags)
    last = tmp_path / "last.pt"
    (tmp_path / "ckpt.pt").rename(last)
    (tmp_path / "ckpt-2.pt").rename(tmp_path / "ckpt.pt")
    assert train_here(tmp_path, *flags, "--init_from=resume") == whole
    assert_same(tmp_path / "ckpt.pt", last)
    student = MoDA.from_pretrained(last)
    assert student.cfg.straight and student.cfg.p_drop_audio == student.cfg.p_drop_emotion == 0
    assert torch.equal(student.std, teacher.std)
    before = dict(teacher.named_parameters())
    same = [name for name, p in student.named_parameters() if torch.equal(p, before[name])]
    assert same == ["null_audio"]                              # no audio is dropped


@pytest.mark.parametrize("flags", [["--audio_dim=5"], ["--audio_layers=2", "--model=alse"]])
def test_features_of_another_shape_than_the_datas_are_refused(tmp_path, flags):
    with pytest.raises(ValueError, match=r"takes \(., \d+\) features per frame, not \(1, 160\)"):
        train_here(tmp_path, *flags)
    assert not (tmp_path / "ckpt.pt").exists()


def test_the_rate_rises_stays_and_falls_to_zero():
    settings = train.Settings(steps=100, warmup=10, cooldown=0.5, learning_rate=1.0)
    rates = [train.rate_of(settings, step) for step in range(100)]
    assert rates[0] == 0.1
    assert rates[9:51] == 42 * [1.0]
    assert rates[-1] == 0.02
    assert rates[50:] == sorted(rates[50:], reverse=True)


# --------------------------------------------------------------- flags, checkpoints of old versions
@pytest.mark.parametrize("flag", [
    "--steps=0", "--batch_size=-2", "--save_every=0", "--clips=0", "--warmup=-1", "--heads=0",
    "--model=gan", "--preset=huge", "--fusion=four"])
def test_a_flag_that_makes_no_sense_is_named(tmp_path, flag):
    with pytest.raises(UsageError, match=flag.split("=")[0]):
        train_here(tmp_path, flag)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def old_checkpoint(tmp_path):
    """As an earlier version saved it: with Config.fusion, and other names."""
    path = tmp_path / "ckpt.pt"
    config = vars(moda.Config(**build.SMALL)) | dict(fusion="c2f")
    weights = {"motion_in.0.weight": torch.zeros(32, 140), "mean": torch.zeros(70),
               "std": torch.ones(70), "four.0.qk_gain": torch.ones(4, 2, 16)}
    save(path, dict(kind="MoDA", config=config, step=9, model=weights, optimizer={}))
    return path


def test_an_old_checkpoint_is_refused_in_one_line_that_says_to_train_again(old_checkpoint):
    known = "ckpt.pt: not a MoDA that this version knows; get or retrain it .*fusion"
    with pytest.raises(ValueError, match=known) as error:
        MoDA.from_pretrained(old_checkpoint)
    assert "\n" not in str(error.value)


def test_old_weights_in_new_settings_are_refused_by_name(old_checkpoint):
    state = read_checkpoint(old_checkpoint)
    del state["config"]["fusion"]
    save(old_checkpoint, state)
    with pytest.raises(ValueError, match="retrain it .(null_audio is absent|.* is of shape)"):
        MoDA.from_pretrained(old_checkpoint)


def test_an_old_run_is_not_resumed(old_checkpoint):
    flags = "--steps=9 --batch_size=2 --heads=2 --n_one=2 --init_from=resume".split()
    with pytest.raises(ValueError, match="not a MoDA that this version knows") as error:
        train_here(old_checkpoint.parent, *flags)
    assert "\n" not in str(error.value)
