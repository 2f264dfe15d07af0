"""Stand-ins for the public weight files: the right keys and shapes, and numbers of our own (fill.py)."""
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from fill import fill

HERE = Path(__file__).parent


def tensors(keys, seed=1):
    """The filled tensors of a manifest, layer by layer on all cores."""
    layers = {}
    for key, about in keys.items():
        layers.setdefault(key.rpartition(".")[0], {})[key] = about
    filled = {}
    with ThreadPoolExecutor() as pool:
        for part in pool.map(lambda layer: fill(layer, seed), layers.values()):
            filled |= part
    to_tensors = lambda x: {k: to_tensors(v) if isinstance(v, dict) else torch.from_numpy(np.asarray(v)) for k, v in x.items()}
    return to_tensors({key: filled[key] for key in keys})


def manifest(name):
    return json.loads((HERE / f"{name}_manifest.json").read_text())


def liveportrait(folder, seed=1):
    """The five LivePortrait files in the public layout below `folder`."""
    for file, keys in manifest("liveportrait")["files"].items():
        path = Path(folder) / "liveportrait" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(tensors(keys, seed), path)
    return folder


def encoder(folder, size="base", seed=1):
    """A wav2vec 2.0 of the base size, or a small one with four heads -> its folder."""
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    torch.save(tensors(manifest("wav2vec2")[size], seed), path / "pytorch_model.bin")
    (path / "config.json").write_text(json.dumps({"num_attention_heads": 12 if size == "base" else 4}))
    return path
