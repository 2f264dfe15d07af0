"""What the tests share: a fixed seed, one thread, a small network, and one training of the toy,
which runs beside the first of them."""
import os
import subprocess
import sys
from pathlib import Path

# Tests compare bits, which are others on a GPU: they see none, but for those of test_gpu.py, alone.
named = [arg.split("::")[0] for arg in sys.argv[1:] if ".py" in arg and not arg.startswith("-")]
if [Path(arg).name for arg in named] != ["test_gpu.py"]:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import numpy as np
import pytest
import torch

import forks

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def one_thread():
    """One thread for the tests of a file that asks for it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny():
    """A small MoDA whose every weight counts."""
    import build
    torch.manual_seed(0)
    return build.model()


@pytest.fixture(scope="session", autouse=True)
def training(request, tmp_path_factory):
    """A short `python train.py`, begun with the first test, if any asks for `trained`:
    folder, process."""
    if not any("trained" in item.fixturenames for item in request.session.items):
        yield
        return
    forks.begin()                                  # many tests will want it
    out = tmp_path_factory.mktemp("toy")
    flags = "--clips=48 --batch_size=4 --p_drop_audio=0.1 --steps=140 --eval_clips=4".split()
    command = [sys.executable, ROOT / "train.py", *flags, f"--out_dir={out}"]
    one_core = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(out / "stdout", "w") as stdout, open(out / "stderr", "w") as stderr:
        process = subprocess.Popen(command, stdout=stdout, stderr=stderr, env=one_core)
    yield out, process
    process.kill()
    process.wait()


@pytest.fixture(scope="session", autouse=True)
def no_process_stays():
    yield
    forks.kill_all()


@pytest.fixture(scope="session")
def trained(training):
    """The same, when it has ended: its folder, with all that it printed in the file `stdout`."""
    out, process = training
    assert process.wait(timeout=400) == 0, (out / "stderr").read_text()
    return out


@pytest.fixture
def soon_drawn(monkeypatch):
    """Grey frames, for tests that do not look at them."""
    from renderer import Sketch
    grey = np.full((64, 64, 3), 128, np.uint8)
    monkeypatch.setattr(Sketch, "frames", lambda *given: [grey] * len(given[2]))


def golden(name):
    """Numbers of an independent implementation."""
    return np.load(HERE / f"{name}_golden.npz", allow_pickle=False)


def plain_network(model, *others):
    """In place of moda.fast_network: the model as it stands."""
    return model
