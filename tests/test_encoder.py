"""Any public base-size wav2vec 2.0 or HuBERT file gives the features that the released model listens to."""
import json
import struct

import numpy as np
import pytest
import torch

import build
from conftest import golden
from data import AudioEncoder

SMALL = build.tensors(build.manifest("wav2vec2")["small"])
CONV = "encoder.pos_conv_embed.conv."


def write_safetensors(path, tensors):
    """The format from its description: length of the header, header, numbers."""
    names, header, at = {torch.float32: "F32", torch.float16: "F16"}, {"__metadata__": {"format": "pt"}}, 0
    for key, t in tensors.items():
        n = t.numel() * t.element_size()
        header[key] = {"dtype": names[t.dtype], "shape": list(t.shape), "data_offsets": [at, at + n]}
        at += n
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(t.numpy().tobytes() for t in tensors.values()))


def write(folder, tensors, name="pytorch_model.bin", **config):
    folder.mkdir(exist_ok=True)
    (write_safetensors if name.endswith("safetensors") else lambda path, t: torch.save(t, path))(folder / name, tensors)
    (folder / "config.json").write_text(json.dumps({"num_attention_heads": 4}))
    if config:
        (folder / "preprocessor_config.json").write_text(json.dumps(config))
    return folder


def error(made, reference):
    return np.abs(np.asarray(made) - reference).max() / reference.std()


def test_small_features_match_the_reference(tmp_path):
    g, encoder = golden("wav2vec2"), AudioEncoder.from_pretrained(write(tmp_path, SMALL))
    made = encoder(g["wave"])
    assert made.shape == (42, 3, 48) and error(made, g["stack"]) < 1e-4
    raw = AudioEncoder.from_pretrained(write(tmp_path, SMALL, do_normalize=False))
    assert error(raw(g["wave"]), g["stack_unnormalised"]) < 1e-4


def test_base_size_matches_the_reference(tmp_path):
    g = golden("wav2vec2")
    torch.save(build.tensors(build.manifest("wav2vec2")["base"]), tmp_path / "pytorch_model.bin")
    encoder = AudioEncoder.from_pretrained(tmp_path / "pytorch_model.bin")
    made = encoder(g["base_wave"])
    assert made.shape == (25, 12, 768)
    assert np.abs(made.flatten()[g["base_index"]].numpy() - g["base_stack"]).max() < 1e-4 * g["base_std"]


def new_spelling(tensors):
    names = {CONV + "weight_g": CONV + "parametrizations.weight.original0", CONV + "weight_v": CONV + "parametrizations.weight.original1"}
    return {names.get(key, key): value for key, value in tensors.items()}


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize("prefix, spelling", [("", dict), ("wav2vec2.", dict), ("hubert.", new_spelling)])
def test_every_spelling_of_a_public_file_is_the_same_encoder(tmp_path, name, prefix, spelling):
    extra = {"lm_head.weight": torch.zeros(3, 3), "quantizer.codevectors": torch.zeros(2)}
    tensors = {prefix + key: value for key, value in spelling(SMALL).items()} | extra
    g = golden("wav2vec2")
    assert error(AudioEncoder.from_pretrained(write(tmp_path, tensors, name))(g["wave"]), g["stack"]) < 1e-4
    half = {key: value.half() for key, value in tensors.items()}
    assert error(AudioEncoder.from_pretrained(write(tmp_path, half, name))(g["wave"]), g["stack"]) < 0.05


def test_any_length_of_sound_has_its_frames(tmp_path):
    encoder = AudioEncoder.from_pretrained(write(tmp_path, SMALL))
    wav = golden("wav2vec2")["wave"]
    assert len(encoder(wav[:1])) == len(encoder(wav[:640])) == len(encoder(wav[:1279])) == 1
    assert torch.equal(encoder(wav, 50)[41:], encoder(wav)[41:].expand(9, -1, -1)) and len(encoder(wav, 7)) == 7
    long = np.tile(wav, 40)                                                  # 68 s: the first minute is encoded by itself
    made = encoder(long)
    assert len(made) == len(long) // 640 and torch.equal(made[:1500], encoder(long[:960_000]))
    assert torch.equal(torch.cat(list(encoder.blocks(np.split(long, [1, 5000, 700_000])))), encoder(long, -(-len(long) // 640)))


def without(key):
    return {k: v for k, v in SMALL.items() if k != key}


@pytest.mark.parametrize("tensors, reason", [
    (without("encoder.layers.1.attention.k_proj.bias"), "encoder.layers.1.attention.k_proj.bias is missing"),
    (without("encoder.layer_norm.weight"), "encoder.layer_norm.weight is missing"),
    (without(CONV + "weight_g"), "not wav2vec 2.0 or HuBERT"),
    (SMALL | {"feature_extractor.conv_layers.3.conv.bias": torch.zeros(32)}, "conv_layers.3.conv.bias does not belong"),
    (SMALL | {"feature_projection.projection.weight": torch.zeros(1024, 32)}, "a large model.*; get facebook/wav2vec2-base"),
    (SMALL | {"encoder.layers.0.attention.out_proj.bias": torch.zeros(9)}, "is .9,., expected .48,."),
    ({"a": torch.zeros(1)}, "not wav2vec 2.0 or HuBERT"), ({}, "not wav2vec 2.0 or HuBERT")])
def test_other_networks_are_refused_by_name(tmp_path, tensors, reason):
    for name in ("pytorch_model.bin", "model.safetensors"):
        with pytest.raises(ValueError, match=reason) as caught:
            AudioEncoder.from_pretrained(write(tmp_path / name, tensors, name))
        assert "\n" not in str(caught.value) and name in str(caught.value)


@pytest.mark.parametrize("cut", [0, 7, 100, -5])
def test_a_truncated_file_is_refused(tmp_path, cut):
    for name in ("pytorch_model.bin", "model.safetensors"):
        path = write(tmp_path / name, SMALL, name) / name
        path.write_bytes(path.read_bytes()[:cut])
        with pytest.raises(ValueError, match=name):
            AudioEncoder.from_pretrained(path)
    with pytest.raises(ValueError, match="No such file"):
        AudioEncoder.from_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
def test_a_broken_config_is_named(tmp_path, name):
    for text in ("", "{", "[1]"):
        (write(tmp_path, SMALL) / name).write_text(text)
        with pytest.raises(ValueError, match=f"{name}: not readable as JSON"):
            AudioEncoder.from_pretrained(tmp_path)
