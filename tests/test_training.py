"""Training survives whatever happens to it: a killed run goes on to the bit, any number of processes follows the same
curve, and what stops it leaves a checkpoint that loads."""
import copy
import csv
import math
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import moda
import train
from data import UsageError
from moda import MoDA, read_tensors

ROOT = Path(__file__).parent.parent
TINY = ["--width=32", "--heads=1", "--clips=4", "--eval_clips=0", "--device=cpu", "--warmup=5"]


pytestmark = pytest.mark.usefixtures("one_thread")          # as in the processes started here: sums have one order


def start(out, *flags, ranks=1):
    """A training in processes of its own, as torchrun starts them; each leads its group of data workers."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    env = os.environ | {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks),
                        "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "train.py", *TINY, f"--out_dir={out}", *flags]
    return [subprocess.Popen(command, cwd=ROOT, env=env | {"RANK": str(rank)}, text=True, stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT, process_group=0) for rank in range(ranks)]


def finish(run):
    for process in run:
        printed = process.communicate(timeout=100)[0]
        assert process.returncode == 0, printed


def send(run, number):
    for process in run:
        os.killpg(process.pid, number)


def train_here(out, *flags):
    train.main([*TINY, f"--out_dir={out}", *flags])
    return curve(out)


def curve(out):
    """The loss columns of the log, step by step."""
    with open(out / "log.csv") as file:
        return [[row[name] for name in ("step", "loss", "rf", "vel", "grad_norm")] for row in csv.DictReader(file)]


def wait_for(out, step, run):
    """Until the log shows that `step` is done."""
    while not (out / "log.csv").exists() or f"\n{step}," not in (out / "log.csv").read_text():
        assert run[0].poll() is None, run[0].communicate()[0]
        time.sleep(0.01)


def assert_same(a, b):
    """Two files of nested tensors and numbers hold the same bits."""
    flat_a, flat_b = (torch.utils._pytree.tree_flatten(read_tensors(path)) for path in (a, b))
    assert flat_a[1] == flat_b[1]
    for x, y in zip(flat_a[0], flat_b[0]):
        assert torch.equal(x, y) if torch.is_tensor(x) else x == y


FLAGS = ["--steps=20", "--batch_size=4", "--save_every=3"]
SPLIT = ["--passes=2", "--workers=1"]


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
    send([process for process in run if process.poll() is None], signal.SIGKILL)       # nobody asked for them


@pytest.fixture(scope="module")
def two_processes(two_started):
    finish(two_started[1])
    return two_started[0]


def test_a_killed_run_goes_on_to_the_bit(one_process, tmp_path):
    run = start(tmp_path, *FLAGS)
    wait_for(tmp_path, random.randrange(3, 16), run)
    send(run, signal.SIGKILL)
    assert train_here(tmp_path, *FLAGS, "--init_from=resume") == curve(one_process)
    assert_same(tmp_path / "ckpt.pt", one_process / "ckpt.pt")


def test_two_killed_processes_go_on_to_the_bit(two_processes, tmp_path):
    run = start(tmp_path, *FLAGS, *SPLIT, ranks=2)
    wait_for(tmp_path, random.randrange(3, 16), run)
    send(run, signal.SIGKILL)
    finish(start(tmp_path, *FLAGS, *SPLIT, "--init_from=resume", ranks=2))
    assert curve(tmp_path) == curve(two_processes)
    assert_same(tmp_path / "ckpt.pt", two_processes / "ckpt.pt")


def test_two_processes_and_micro_batches_follow_one_process(one_process, two_processes):
    one, two = (torch.tensor([[float(x) for x in row[:4]] for row in curve(out)])
                for out in (one_process, two_processes))
    assert one.shape == (20, 4) and (one - two).abs().max() < 1e-5
    assert one[-1, 1] < one[0, 1] - 0.1


def test_sigterm_to_any_process_ends_all_with_a_checkpoint(tmp_path):
    flags = ["--steps=100000", "--batch_size=2", "--workers=1", "--eval_clips=4"]
    run = start(tmp_path, *flags, ranks=2)
    wait_for(tmp_path, 2, run)
    run[1].send_signal(signal.SIGTERM)
    finish(run)
    step = read_tensors(tmp_path / "ckpt.pt")["step"]
    assert step == len(curve(tmp_path)) > 2 and not (tmp_path / "sample.mp4").exists()
    assert train_here(tmp_path, f"--steps={step + 1}", "--batch_size=2", "--init_from=resume")[-1][0] == str(step)


def test_a_loss_that_is_no_number_stops_before_it_harms(tmp_path, monkeypatch):
    def draw(cfg, B, N, generator):
        drawn = moda.draw(cfg, B, N, generator)
        return drawn | {"eps": drawn["eps"] * (math.nan if generator.initial_seed() % 10**9 == 5 else 1)}
    monkeypatch.setattr(train, "draw", draw)
    with pytest.raises(ValueError, match="step 5: loss nan.*ckpt.pt, if there, is good$"):
        train_here(tmp_path, "--steps=9", "--batch_size=2", "--save_every=2")
    assert len(curve(tmp_path)) == 5 and read_tensors(tmp_path / "ckpt.pt")["step"] == 4
    assert all(p.isfinite().all() for p in MoDA.from_pretrained(tmp_path / "ckpt.pt").parameters())


def test_the_last_two_checkpoints_are_kept_and_either_can_be_resumed(tmp_path):
    flags = ["--steps=6", "--batch_size=2", "--save_every=2"]
    whole = train_here(tmp_path, *flags)
    last = tmp_path / "last.pt"
    (tmp_path / "ckpt.pt").rename(last)                                        # as if killed between two renames
    assert read_tensors(tmp_path / "previous.pt")["step"] == 4
    assert train_here(tmp_path, *flags, "--init_from=resume") == whole
    assert_same(tmp_path / "ckpt.pt", last)


def test_recomputed_activations_change_no_bit(tmp_path, monkeypatch):
    flags, blocks, run = ["--steps=3", "--batch_size=2"], [], torch.utils.checkpoint.checkpoint
    plain = train_here(tmp_path / "a", *flags)
    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", lambda *args, **options: blocks.append(1) or run(*args, **options))
    assert plain == train_here(tmp_path / "b", *flags, "--checkpointing") and len(blocks) == 9      # 3 steps, 3 blocks
    assert_same(tmp_path / "a/ckpt.pt", tmp_path / "b/ckpt.pt")


def test_the_moving_average_follows_the_weights_and_is_what_is_loaded(tmp_path, monkeypatch):
    saved, save, lerp = [], train.save, torch._foreach_lerp_

    def average(averages, weights, share):
        lerp(averages, weights, share)
        assert not any(x.requires_grad for x in averages)          # or their history grows with every step
    monkeypatch.setattr(torch, "_foreach_lerp_", average)
    monkeypatch.setattr(train, "save", lambda path, state, keep: saved.append(copy.deepcopy(state)) or save(path, state))
    train_here(tmp_path, "--steps=3", "--batch_size=2", "--save_every=1", "--ema=0.75")
    first, second, third = (state["ema"] for state in saved)
    for before, after, state in (first, second, saved[1]), (second, third, saved[2]):
        assert all(torch.allclose(after[name], before[name].lerp(x, 0.25)) for name, x in state["model"].items())
    loaded = MoDA.from_pretrained(tmp_path / "ckpt.pt").state_dict()
    assert all(torch.equal(loaded[name], x) for name, x in third.items())
    assert not torch.equal(third["head.weight"], saved[2]["model"]["head.weight"])


def test_workers_share_the_data_however_python_starts_processes(tmp_path, request):
    usual = torch.multiprocessing.get_start_method()
    request.addfinalizer(lambda: torch.multiprocessing.set_start_method(usual, force=True))
    torch.multiprocessing.set_start_method("spawn", force=True)
    train_here(tmp_path, "--steps=2", "--batch_size=2", "--workers=1")


def test_a_checkpoint_is_a_start_for_another_run(tmp_path):
    for model in ("moda", "alse"):
        flags = [f"--model={model}", "--batch_size=2", "--warmup=0", "--bf16", "--cooldown=0"]
        train_here(tmp_path / "first", *flags, "--steps=2")
        train_here(tmp_path / "second", *flags, "--steps=1", f"--init_from={tmp_path}/first/ckpt.pt", "--width=64")
        assert read_tensors(tmp_path / "second/ckpt.pt")["config"]["width"] == 32


@pytest.mark.parametrize("flag", ["--steps=0", "--batch_size=-2", "--save_every=0", "--clips=0", "--warmup=-1",
                                  "--heads=0", "--passes=3", "--model=gan", "--preset=huge", "--fusion=x"])
def test_a_flag_that_makes_no_sense_is_named(tmp_path, flag):
    with pytest.raises(UsageError, match=flag.split("=")[0]):
        train_here(tmp_path, flag)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_resumed_is_refused_in_one_line(tmp_path):
    resume = ["--steps=2", "--batch_size=2", "--init_from=resume"]
    with pytest.raises(ValueError, match="ckpt.pt: not a readable checkpoint .*nothing to resume"):
        train_here(tmp_path, *resume)
    train_here(tmp_path, "--steps=1", "--batch_size=2")
    for other in ("--width=64", "--model=alse", "--p_drop_audio=0.1"):
        with pytest.raises(ValueError, match="ckpt.pt: was trained with other settings") as error:
            train_here(tmp_path, *resume, other)
        assert "\n" not in str(error.value)
    with pytest.raises(OSError, match="ckpt.pt"):
        train_here(tmp_path / "ckpt.pt", "--steps=1")                          # no place for a folder
