"""What the tests share: chance, threads, a small network, and one training that runs beside the first of them."""
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def same_chance():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def one_thread():
    """One thread for the tests of a file that asks for it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session", autouse=True)
def training(request, tmp_path_factory):
    """The toy's training for the tests that need its result: on one core, from the first test on -> folder, process."""
    if not any("trained" in item.fixturenames for item in request.session.items):
        yield
        return
    out = tmp_path_factory.mktemp("toy")
    flags = "--clips=48 --batch_size=4 --p_drop_audio=0.1 --steps=180 --eval_clips=4".split()
    with open(out / "printed", "w") as printed, open(out / "told", "w") as told:
        run = subprocess.Popen([sys.executable, HERE.parent / "train.py", *flags, f"--out_dir={out}"], stdout=printed,
                               stderr=told, env=os.environ | {"OMP_NUM_THREADS": "1"})
    yield out, run
    run.kill()
    run.wait()


@pytest.fixture(scope="session")
def tiny():
    """A small MoDA whose every weight does something (fresh ones start with closed gates)."""
    from moda import Config, MoDA
    torch.manual_seed(0)
    model = MoDA(Config(width=32, heads=2, n_four=1, n_two=1, n_one=2, audio_layers=1, audio_dim=160)).eval()
    for p in model.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return model


def golden(name):
    return np.load(HERE / f"{name}_golden.npz", allow_pickle=False)
