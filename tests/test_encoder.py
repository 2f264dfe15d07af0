"""Any public base-size wav2vec 2.0 or HuBERT gives the features that the released model takes."""
import numpy as np
import pytest
import torch

import build
from conftest import golden
from data import AudioEncoder

SMALL = build.tensors(build.manifest("wav2vec2")["small"])
CONV = "encoder.pos_conv_embed.conv."
FILE = "pytorch_model.bin"


def write(folder, tensors):
    """The folder of a public encoder."""
    folder.mkdir(exist_ok=True)
    torch.save(tensors, folder / FILE)
    return folder


load = build.SmallEncoder.from_pretrained


def features(encoder, *pieces):
    return torch.cat(list(encoder.blocks(pieces)))


def error(encoder, wav, reference):
    """Of a sound that is normalised already."""
    with torch.inference_mode():
        whole = encoder(torch.tensor(wav)).numpy()
    assert whole.shape == reference.shape
    return np.abs(whole - reference).max() / reference.std()


def test_small_features_match_the_reference(tmp_path):
    g = golden("wav2vec2")
    encoder = load(write(tmp_path, SMALL))
    assert error(encoder, g["normalised"], g["stack"]) < 1e-4
    assert error(encoder, g["wave"][:26880], g["stack_unnormalised"]) < 1e-4


def test_base_size_matches_the_reference(tmp_path):
    g = golden("wav2vec2")
    torch.save(build.tensors(build.manifest("wav2vec2")["base"]), tmp_path / FILE)
    whole = features(AudioEncoder.from_pretrained(tmp_path / FILE), g["base_wave"])[:25]
    assert whole.shape == (25, 12, 768)
    some = whole.flatten()[g["base_index"]].numpy()
    assert np.abs(some - g["base_stack"]).max() < 1e-4 * g["base_std"]


def since_torch_2_1(tensors):
    """Weight norm in its new spelling."""
    names = {CONV + "weight_g": CONV + "parametrizations.weight.original0",
             CONV + "weight_v": CONV + "parametrizations.weight.original1"}
    return {names.get(key, key): x for key, x in tensors.items()}


@pytest.mark.parametrize("prefix, spelling", [
    ("", dict), ("wav2vec2.", dict), ("hubert.", since_torch_2_1)])
def test_every_spelling_of_a_public_file_is_the_same_encoder(tmp_path, prefix, spelling):
    g = golden("wav2vec2")
    tensors = {prefix + key: x for key, x in spelling(SMALL).items()}
    tensors |= {"lm_head.weight": torch.zeros(3, 3), "quantizer.codevectors": torch.zeros(2)}
    assert error(load(write(tmp_path, tensors)), g["normalised"], g["stack"]) < 1e-4
    half = {key: x.half() for key, x in tensors.items()}
    assert error(load(write(tmp_path, half)), g["normalised"], g["stack"]) < 0.05


def test_any_length_of_sound_has_its_frames(tmp_path):
    encoder, wav = load(write(tmp_path, SMALL)), golden("wav2vec2")["wave"]
    for n, frames in (1, 1), (640, 1), (641, 2), (1280, 2):
        assert len(features(encoder, wav[:n])) == frames
    padded = np.append(wav[:1270] - wav[:1270].mean(), np.zeros(10, np.float32))
    assert torch.allclose(features(encoder, wav[:1270]), features(encoder, padded), atol=0.02)


def test_a_long_sound_is_encoded_by_the_minute_however_it_is_cut(tmp_path):
    encoder = load(write(tmp_path, SMALL))
    wav = np.tile(golden("wav2vec2")["wave"], 40)              # 68 s
    whole = features(encoder, wav)
    assert len(whole) == -(-len(wav) // 640)
    assert torch.equal(whole[:1500], features(encoder, wav[:960_000]))
    pieces = np.split(wav, [1, 5000, 700_000])
    assert torch.equal(features(encoder, *pieces), whole)


def without(key):
    return {k: x for k, x in SMALL.items() if k != key}


OTHERS = {
    "no bias of a key projection": (
        without("encoder.layers.1.attention.k_proj.bias"), "layers.1.attention.k_proj.bias"),
    "no norm": (
        without("encoder.layer_norm.weight"), "norm.weight is absent"),
    "half of the weight norm": (
        without(CONV + "weight_g"), "position.*weight.original0 is absent"),
    "a bias too many": (
        SMALL | {"feature_extractor.conv_layers.3.conv.bias": torch.zeros(32)},
        "convs.3.bias is of shape .32., should be absent"),
    "a large model": (
        SMALL | {"feature_projection.projection.weight": torch.zeros(1024, 32)},
        "projection.0?.?1.weight is of shape .1024, 32."),
    "another shape": (
        SMALL | {"encoder.layers.0.attention.out_proj.bias": torch.zeros(9)},
        "is of shape .9., should be of shape .48."),
    "NaN": (
        SMALL | {"encoder.layer_norm.bias": torch.full((48,), torch.nan)}, "norm.bias .*finite"),
    "another network": ({"a": torch.zeros(1)}, "is absent"),
    "nothing": ({}, "is absent")}


@pytest.mark.parametrize("tensors, reason", OTHERS.values(), ids=OTHERS)
def test_other_networks_are_refused_in_one_line(tmp_path, tensors, reason):
    known = f"{FILE}: not a base-size wav2vec 2.0 or HuBERT.*; get facebook/wav2vec2.*{reason}"
    with pytest.raises(ValueError, match=known) as caught:
        load(write(tmp_path, tensors))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [0, 7, 100, -5])
def test_a_truncated_file_is_refused(tmp_path, size):
    path = write(tmp_path, SMALL) / FILE
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=FILE):
        load(tmp_path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="FileNotFoundError"):
        load(tmp_path / "nowhere")
