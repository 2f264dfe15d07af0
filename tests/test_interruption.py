"""Ctrl-C, a full disk, a locked file and a reader that leaves are one line; no file is lost or half
written under a final name."""
import fcntl
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

import data
from bad import FLAGS, ROOT, SCRIPTS, contents, folder, good, preparable, reported, run, start

pytestmark = pytest.mark.usefixtures("one_thread")


def hum(seconds):
    soundfile.write("voice.wav", np.full(seconds * 16_000, 0.1), 16_000)


# ------------------------------------------------------------------------------------------ Ctrl-C
@pytest.fixture
def ctrl_c():
    """ctrl_c(seconds): KeyboardInterrupt so long after."""
    usual = signal.signal(signal.SIGALRM, signal.default_int_handler)
    yield lambda seconds: signal.setitimer(signal.ITIMER_REAL, seconds)
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, usual)


@pytest.mark.parametrize("moment", range(6))
@pytest.mark.parametrize("command", ["sample", "train --steps=100000 --save_every=100000"])
def test_ctrl_c_at_any_moment_is_one_line_and_no_file(run, ctrl_c, command, moment):
    hum(25)
    before = contents()
    ctrl_c((moment + random.random()) / 12)
    assert run(command) == (1, ["error: interrupted"])
    assert contents() == before


def test_a_run_that_nobody_disturbs_kills_no_ffmpeg(run, monkeypatch):
    """It would be in a destructor, of a generator that was left unfinished, where Python drops a
    Ctrl-C."""
    killed = []
    monkeypatch.setattr(data.Popen, "kill", lambda child: killed.append(child.args))
    assert run("sample") == (0, [])
    assert not killed


def first_frames(process, sign=r"[| ][1-9]\d*/5000"):
    """What a run prints until its bar counts frames."""
    seen = ""
    while not re.search(sign, seen):
        character = process.stderr.read(1)
        assert character, seen                     # it ended before
        seen += character
    return seen


def test_ctrl_c_in_a_terminal_reaches_ffmpeg_too(folder):
    hum(200)
    before = contents()
    process = start(folder, "sample.py", *FLAGS["sample"].split())
    seen = first_frames(process)
    time.sleep(random.random() / 10)
    os.killpg(process.pid, signal.SIGINT)
    rest = process.stderr.read()
    assert process.wait() == 1 and reported(seen + rest) == ["error: interrupted"]
    assert contents() == before


def test_ctrl_c_while_the_scripts_are_imported_is_no_traceback():
    for script in ("sample.py", "train.py"):
        command = [sys.executable, "-X", "importtime", ROOT / script, "--help"]
        process = subprocess.Popen(command, text=True, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.PIPE)
        while "torch." not in process.stderr.readline():       # what is imported, line by line
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert "Traceback" not in process.communicate()[1]
        assert process.returncode


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_every_way_to_be_stopped_cleans_up(folder, number):
    """Signals to the script alone, as from `kill` or a closed window: its ffmpegs end as well."""
    if signal.getsignal(number) == signal.SIG_IGN:
        pytest.skip("ignored here, as under nohup")
    hum(200)
    before = contents()
    process = start(folder, "sample.py", *FLAGS["sample"].split())
    seen = first_frames(process)
    began = time.perf_counter()
    process.send_signal(number)
    time.sleep(0.01)
    process.send_signal(number)                # nor do impatient ones
    rest = process.stderr.read()               # ends when no ffmpeg holds it any more
    assert process.wait() == 1 and reported(seen + rest) == ["error: interrupted"]
    assert time.perf_counter() - began < 4     # 2 where no training runs beside
    assert contents() == before


def waits_to_write(process):
    """Whether a process waits half a second without a break for a pipe that is full."""
    waiting = 0
    for _ in range(200):
        time.sleep(0.05)
        full = "pipe_write" in Path(f"/proc/{process.pid}/wchan").read_text()
        waiting = waiting + 1 if full else 0
        if waiting == 10:
            return True
    return False


@pytest.mark.skipif(not Path("/proc/self/wchan").exists(), reason="shows what a process waits for")
def test_a_stream_whose_reader_has_paused_can_be_stopped(folder):
    hum(200)
    paused, stdout = os.pipe()
    fcntl.fcntl(stdout, fcntl.F_SETPIPE_SZ, 4096)
    flags = *FLAGS["sample"].split(), "--output_path=-"
    process = start(folder, "sample.py", *flags, stdout=stdout)
    os.close(stdout)
    first_frames(process)
    if not waits_to_write(process):
        os.close(paused)
        pytest.skip("this system does not tell")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 1
    assert reported(process.stderr.read())[-1] == "error: interrupted"
    os.close(paused)


def test_one_ctrl_c_ends_a_run_whose_stdin_is_open_and_silent(folder):
    before = contents()
    flags = [*FLAGS["sample"].split(), "--audio_path=-"]
    process = start(folder, "sample.py", *flags)
    first_frames(process, "frames")            # its bar, before the first sound
    time.sleep(0.5)
    began = time.perf_counter()
    process.send_signal(signal.SIGINT)
    lines = reported(process.stderr.read())
    assert process.wait() == 1 and lines == ["error: interrupted"]
    assert time.perf_counter() - began < 4     # 2 where no training runs beside
    assert contents() == before


def test_a_stream_ends_in_the_middle_of_a_chunk_that_takes_long(folder):
    hum(200)
    before = contents()
    flags = *FLAGS["sample"].split(), "--stream", "--steps=20000"
    # not by `start`, whose processes wait for no thread at their end
    process = subprocess.Popen([sys.executable, ROOT / "sample.py", *flags], cwd=folder, text=True,
                               stderr=subprocess.PIPE)
    first_frames(process, "frames")            # its bar, before the first sound
    time.sleep(1.5)                            # a chunk takes 0.8 s to come
    began = time.perf_counter()
    process.send_signal(signal.SIGTERM)
    lines = reported(process.stderr.read())
    assert process.wait() == 1 and lines == ["error: interrupted"]
    assert time.perf_counter() - began < 4     # 2 where no training runs beside
    assert contents() == before


def test_a_stream_needs_no_folder_to_write_to(good):
    flags = [*FLAGS["sample"].split(), "--output_path=-", f"--audio_path={good}/voice.wav",
             f"--ckpt={good}/ckpt.pt"]
    process = start("/proc", "sample.py", *flags)
    assert process.wait() == 0, process.stderr.read()


def test_ctrl_c_in_a_second_preparation_leaves_the_data_set(run, preparable, monkeypatch):
    assert run("prepare") == (0, [])
    Path("videos/second.mp4").write_text("another video")
    manifest = Path("new/manifest.json").read_bytes()
    before = contents()

    def interrupted(*args):
        raise KeyboardInterrupt
    monkeypatch.setattr(data, "extract", interrupted)
    assert run("prepare") == (1, ["error: interrupted"])
    assert contents() == before
    assert Path("new/manifest.json").read_bytes() == manifest
    assert run("train --data_dir=new") == (0, [])


# ---------------------------------------------------------------------- disk, permissions, readers
@pytest.mark.parametrize("command, size, words", [
    ("sample", 5000, "video.mp4: could not be written"),
    ("train", 50_000, "ckpt.pt: could not be saved")])
def test_a_full_disk_harms_no_file(folder, command, size, words):
    """Files end after so many bytes, in the command and in its ffmpeg."""
    before = contents()
    script = f"{SCRIPTS[command].__name__}.py"
    process = start(folder, script, *FLAGS[command].split(), largest=size)
    lines = reported(process.stderr.read())
    assert process.wait() == 1 and len(lines) == 1, lines
    assert lines[0].startswith("error: ") and words in lines[0]
    assert contents() == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read and write everything")
@pytest.mark.parametrize("locked, command, words, code", [
    ("voice.wav", "sample", "voice.wav", 1),
    ("ckpt.pt", "sample", "ckpt.pt", 1),
    ("me.png", "portrait", "me.png", 1),
    ("set/manifest.json", "train", "set/manifest.json", 1),
    ("set/clips/1/motion.npy", "train", "set/clips/1", 1),
    ("old", "train --out_dir=old --init_from=auto", "Permission denied: 'old/", 1),
    (".", "sample", "video.mp4: could not be written", 1)])
def test_what_may_not_be_read_or_written_is_named(run, locked, command, words, code):
    before = contents()
    Path(locked).chmod(0o500 if Path(locked).is_dir() else 0)
    ended, lines = run(command)
    Path(locked).chmod(0o700)
    errors = [line for line in lines if not line.startswith("passed over: ")]
    assert ended == code and len(errors) == 1, lines
    assert errors[0].startswith("error: ") and words in errors[0]
    assert contents() == before


def test_a_reader_that_leaves_is_one_line(good):
    read, write = os.pipe()
    os.close(read)
    process = start(good, "tests/tools/check.py", "--data_dir=set", "--report=", stdout=write)
    os.close(write)
    lines = reported(process.stderr.read())
    assert process.wait() == 1 and lines == ["error: [Errno 32] Broken pipe"]
