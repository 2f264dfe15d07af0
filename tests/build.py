"""Stand-ins for the public weight files: the right keys and shapes, and numbers of our own (fill.py)."""
import json
from pathlib import Path

import numpy as np
import torch

from fill import fill

HERE = Path(__file__).parent


def tensors(filled):
    return {k: tensors(v) if isinstance(v, dict) else torch.from_numpy(np.array(v)) for k, v in filled.items()}


def manifest(name):
    return json.loads((HERE / f"{name}_manifest.json").read_text())


def liveportrait(folder, seed=1):
    """The five LivePortrait files in the public layout below `folder`."""
    for file, keys in manifest("liveportrait")["files"].items():
        path = Path(folder) / "liveportrait" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(tensors(fill(keys, seed)), path)
    return folder


def encoder(folder, size="base", seed=1):
    """A wav2vec 2.0 of the base size, or a small one with four heads -> its folder."""
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    torch.save(tensors(fill(manifest("wav2vec2")[size], seed)), path / "pytorch_model.bin")
    (path / "config.json").write_text(json.dumps({"num_attention_heads": 12 if size == "base" else 4}))
    return path
