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
