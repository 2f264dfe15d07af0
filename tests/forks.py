"""Scripts in processes of their own, seconds sooner than `python sample.py` has them.

To import torch, and with it what an optimizer takes, costs a process three to five seconds. Here a
server of multiprocessing has imported what is not ours, and forks. All that is ours, a process
imports by itself."""
import multiprocessing
import os
import resource
import runpy
import signal
import subprocess
import sys
from multiprocessing import forkserver
from multiprocessing.reduction import DupFd
from pathlib import Path

ROOT = Path(__file__).parent.parent
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([
    "pytest", "torch", "torch._dynamo", "torch.distributed", "numpy", "PIL.Image",
    "imageio.v2", "imageio_ffmpeg", "soundfile", "tqdm"])
begin = forkserver.ensure_running


class File:
    """An open file that a process is given."""

    def __init__(self, number):
        self.number = number

    def __getstate__(self):
        return DupFd(self.number)

    def __setstate__(self, duplicate):
        self.number = duplicate.detach()


def run(command, files, ready, cwd, env, largest):
    """In the new process: what Python makes of a command line."""
    os.setpgid(0, 0)
    os.close(ready.number)
    for number, file in enumerate(files):
        os.dup2(file.number, number)
        os.close(file.number)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.stdin = open(0, closefd=False)
    sys.stdout = open(1, "w", encoding=env.get("PYTHONIOENCODING"), closefd=False)
    sys.stderr = open(2, "w", 1, closefd=False, errors="backslashreplace")
    sys.modules["torch"].set_num_threads(1)
    sys.argv = command
    ours = {str(path) for path in (ROOT, ROOT / "tests", ROOT / "tests/tools")}
    sys.path[:] = [str(Path(command[0]).parent), *[path for path in sys.path if path not in ours]]
    runpy.run_path(command[0], run_name="__main__")


class Script:
    """Some of subprocess.Popen: a script that runs in a process group of its own, with one thread.
    Its stdin, stdout and stderr are file descriptors; its files may hold so many bytes."""

    def __init__(self, script, *flags, cwd=ROOT, env=None, stdin=None, stdout=None, stderr=None,
                 largest=resource.RLIM_INFINITY):
        command = [str(ROOT / script), *map(os.fsdecode, flags)]
        env = {**os.environ, **env} if env else dict(os.environ)
        begun, ready = os.pipe()
        with open(os.devnull, "r+b") as null:
            files = [File(null.fileno() if f is None else f) for f in (stdin, stdout, stderr)]
            args = command, files, File(ready), str(cwd), env, largest
            self.process = CONTEXT.Process(target=run, args=args)
            self.process.start()
        self.pid = self.process.pid
        os.close(ready)
        os.read(begun, 1)                          # its end: the process leads its group
        os.close(begun)

    def poll(self):
        return self.process.exitcode

    returncode = property(poll)

    def wait(self, timeout=None):
        self.process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("a script", timeout)
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)


def kill_all():
    """Processes that a test which failed has left."""
    for process in multiprocessing.active_children():
        os.killpg(process.pid, signal.SIGKILL)
