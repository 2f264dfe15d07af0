"""The released checkpoint loads whole and computes what its authors' code computes."""

import numpy as np
import pytest
import torch
from zlib import crc32

import build
from conftest import golden
from moda import Config, MoDA, euler, from_released, load_statistics, released_parameters, sample

SMALL = build.tensors(build.manifest("moda")["small"])


@pytest.fixture(scope="module")
def g():
    return {key: torch.from_numpy(np.array(value)) for key, value in golden("moda").items()}


@pytest.fixture
def model(tmp_path, g):
    torch.save(SMALL | {"scheduler.sigmas": torch.arange(1, 1001) / 1000, "null_audio_feat": g["null_audio"].view(1, 1, 1, 1, -1)},
               tmp_path / "net-200.pth")
    torch.save({"mean": g["motion_mean"][None], "std": g["motion_std"][None]}, tmp_path / "mean.pt")
    model = MoDA.from_pretrained(tmp_path / "net-200.pth")
    load_statistics(model, tmp_path / "mean.pt")
    return model


def agrees(ours, reference, tolerance=2e-5):
    assert ours.shape == reference.shape
    assert (ours - reference).abs().max() <= tolerance * reference.std()


def velocity(model, g):
    return model(g["fwd_noisy"], g["fwd_t"] / 1000, g["fwd_audio"], g["fwd_emotion"], g["fwd_kp"], g["fwd_prev"][:, 0])


@torch.inference_mode()
def test_the_velocity_and_every_intermediate_match(model, g):
    seen = {}
    for name in ("motion_in", "audio_in", "identity_in", "emotion_in", "time_in", "four.0", "two.1", "one.1"):
        model.get_submodule(name).register_forward_hook(lambda module, args, out, name=name: seen.update({name: out}))
    agrees(velocity(model, g), g["fwd_velocity"])
    agrees(seen["motion_in"], g["fwd_h_motion_embed"])
    agrees(seen["audio_in"], g["fwd_h_audio_embed"])
    agrees(seen["identity_in"], g["fwd_h_identity_embed"])
    agrees(seen["emotion_in"], g["fwd_h_emotion_embed"])
    agrees(seen["time_in"], g["fwd_h_time_embed"])
    agrees(torch.stack([x.expand(-1, 24, -1) for x in seen["four.0"]], 1), g["fwd_h_after_four"])
    agrees(torch.cat(seen["two.1"], 1), g["fwd_h_after_two"])
    agrees(seen["one.1"], g["fwd_h_after_single"][:, :24])                   # only motion is carried out of the last block
    assert model.two[0].qk_gain.shape == (2, 2, 16)


@torch.inference_mode()
def test_small_queries_and_keys_show_the_epsilon_of_their_norm(model, g):
    for part in (*(block.qkv for block in (*model.four, *model.two)), *(block.qkv_mlp for block in model.one)):
        for p in part.parameters():
            p.mul_(0.003)
    agrees(velocity(model, g), g["fwd_velocity_small_qkv"])


def grid(g, K):
    """The released scheduler's times: linspace(1, 0.001, K), both ends included."""
    return (g[f"sched{K}_t"] / 1000).tolist()


@pytest.mark.parametrize("K", [1, 2, 4, 10, 20, 40])
def test_the_released_time_grid_is_a_list_of_times(g, K):
    assert np.allclose(grid(g, K), np.linspace(1, 0.001, K), atol=1e-6)
    steps = euler(lambda z, k: -g[f"sched{K}_dt"].new_tensor([float(i == k) for i in range(K)]), torch.zeros(K), grid(g, K))
    assert np.allclose(steps, -g[f"sched{K}_dt"], atol=2e-6)


def window(g, steps=None, **kwargs):
    options = dict(identity=g["win_kp"], prev=g["win_prev"], emotion=int(g["win_emotion"]), chunk=80, overlap=16,
                   steps=grid(g, 10) if steps is None else steps, guidance={"audio+emotion": 0.2})
    return options | kwargs


def test_a_guided_window_matches(model, g):
    agrees(sample(model, g["win_audio"], noise=g["win_noise"], **window(g)), g["win_cfg12"][0])
    agrees(sample(model, g["win_audio"], noise=g["win_noise"], **window(g, guidance={})), g["win_cfg10"][0])


def test_long_and_short_voices_match(model, g):
    made = sample(model, g["long_audio"], noise=g["long_noise"], **window(g, smooth=True))
    agrees(made, g["long_out"])
    agrees(sample(model, g["short_audio"], noise=g["long_noise"][:1], **window(g, smooth=True)), g["short_out"])
    agrees(sample(model, g["long_audio"][:80], noise=g["long_noise"], **window(g)), g["long_raw_first"][0])


def motion(g, name):
    parts = [g[f"{name}_{part}"].flatten(1) for part in ("exp", "scale", "t", "pitch", "yaw", "roll")]
    return torch.cat(parts, 1)


def test_a_portrait_becomes_the_first_frame_and_motion_returns_to_its_size(model, g):
    portrait = motion(g, "src") * (torch.arange(70) != 66)                   # t_z = 0
    size = model.size(portrait)
    assert torch.allclose(size[..., 63:67], g["src_rescale"].expand(-1, 4), rtol=1e-6)
    agrees(model.normalise(portrait, size), g["src_prev_motion"][0])
    back, reference = model.denormalise(g["long_out"][:5], size), motion(g, "seq")
    assert torch.allclose(back, reference, rtol=1e-5, atol=1e-5)


def test_the_renaming_table_and_the_released_file_agree_key_for_key():
    for name, cfg in {"full": Config(rope_streams=2), "small": Config(64, 4, 1, 2, 2, audio_dim=16, rope_streams=2)}.items():
        with torch.device("meta"):
            model = MoDA(cfg)
        places = {key: list(place.shape) for key, place in released_parameters(model).items()}
        assert places.pop("null_audio_feat") == [cfg.audio_dim]              # only some of their files hold it
        manifest = {key.removeprefix("talking_head_dit."): entry for key, entry in build.manifest("moda")[name].items()}
        assert places == {key: entry["shape"] for key, entry in manifest.items()} and (len(places) == 408 or name == "small")
        ours = sum(p.numel() for p in model.parameters())
        assert sum(np.prod(shape) for shape in places.values()) + cfg.audio_dim == ours        # every number of ours is loaded


@pytest.mark.parametrize("key", ["blocks4.0.attn1.qkv_au2.weight", "blocks.1.qkv_xs.bias", "final_layer.adaLN_modulation.1.weight",
                                 "audio_embedder.proj1.weight", "blocks.1.attn1.xs_q_norm.weight"])
def test_a_changed_file_is_refused_with_the_name_of_the_tensor(tmp_path, key):
    full, path = "talking_head_dit." + key, tmp_path / "net-200.pth"
    missing = {k: v for k, v in SMALL.items() if k != full}
    for broken in (missing, missing | {full + "x": SMALL[full]}, SMALL | {full: SMALL[full][1:]}, SMALL | {full: SMALL[full][..., 1:]}):
        torch.save(broken, path)
        with pytest.raises(ValueError, match="net-200.pth: .*(absent|shape)") as caught:
            MoDA.from_pretrained(path)
        assert key in str(caught.value)
    torch.save(SMALL | {"talking_head_dit.extra.weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="extra.weight is shape .*, should be absent"):
        MoDA.from_pretrained(path)


def test_a_missing_null_vector_is_drawn_once_and_said(tmp_path, capsys):
    torch.save(SMALL, tmp_path / "net-200.pth")
    a, b = (MoDA.from_pretrained(tmp_path / "net-200.pth") for _ in range(2))
    assert torch.equal(a.null_audio, b.null_audio) and a.null_audio.shape == (16,)
    assert "null_audio_feat" in capsys.readouterr().out


def test_full_size_fits_and_its_velocities_agree(g):
    model = from_released(build.tensors(build.manifest("moda")["full"]), "net-200.pth")
    rand = lambda name, *shape: torch.from_numpy(
        np.random.default_rng([1, crc32(f"full.{name}".encode())]).standard_normal(shape) * (0.3 if name == "kp" else 1)).float()
    with torch.inference_mode():
        v = model(rand("noisy", 1, 32, 70), torch.tensor([0.556]), rand("audio", 1, 32, 12, 768), torch.tensor([6]),
                  rand("kp", 1, 63), rand("prev", 1, 1, 70)[:, 0])
    agrees(v.flatten()[g["full_index"]], g["full_velocity"])
