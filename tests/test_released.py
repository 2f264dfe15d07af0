"""The released checkpoint loads whole and computes what its authors' code computes."""
from concurrent.futures import ThreadPoolExecutor
from zlib import crc32

import numpy as np
import pytest
import torch

import build
import moda
from conftest import golden, plain_network
from moda import (ROT, TRANS, Config, MoDA, euler, from_released, generate, load_statistics,
                  released_name)

SMALL = build.tensors(build.manifest("moda")["small"])
SMALL_CONFIG = dict(width=64, heads=4, n_four=1, n_two=2, n_one=2, audio_dim=16, rope_streams=2)
PREFIX = "talking_head_dit."
PARTS = "exp", "scale", "t", "pitch", "yaw", "roll"


@pytest.fixture(scope="module")
def g():
    return {key: torch.from_numpy(np.array(value)) for key, value in golden("moda").items()}


@pytest.fixture(scope="module", autouse=True)
def full():
    """A function: -> the file of the full size, which is made beside the first tests."""
    with ThreadPoolExecutor() as pool:
        yield pool.submit(build.tensors, build.manifest("moda")["full"]).result


@pytest.fixture
def small(monkeypatch):
    """The released file is one of a small network."""
    monkeypatch.setattr(moda, "RELEASED_CONFIG", moda.RELEASED_CONFIG | SMALL_CONFIG)


@pytest.fixture
def model(small, tmp_path, g):
    extra = {"scheduler.sigmas": torch.arange(1, 1001) / 1000,
             "null_audio_feat": g["null_audio"].view(1, 1, 1, 1, -1)}
    statistics = {"mean": g["motion_mean"][None], "std": g["motion_std"][None]}
    torch.save(SMALL | extra, tmp_path / "net-200.pth")
    torch.save(statistics, tmp_path / "mean.pt")
    model = MoDA.from_pretrained(tmp_path / "net-200.pth")
    load_statistics(model, tmp_path / "mean.pt")
    return model


def agrees(ours, reference, tolerance=2e-5):
    assert ours.shape == reference.shape
    assert (ours - reference).abs().max() <= tolerance * reference.std()


def velocity(model, g):
    return model(g["fwd_noisy"], g["fwd_t"] / 1000, g["fwd_audio"], g["fwd_emotion"], g["fwd_kp"],
                 g["fwd_prev"][:, 0])


@torch.inference_mode()
def test_the_velocity_and_every_intermediate_match(model, g):
    seen = {}

    def note(name):
        def hook(module, args, output):
            seen[name] = output
        model.get_submodule(name).register_forward_hook(hook)
    embedders = "motion", "audio", "identity", "emotion", "time"
    for name in *[f"{kind}_embedder" for kind in embedders], "four.0", "two.1", "one.1":
        note(name)
    agrees(velocity(model, g), g["fwd_velocity"])
    for kind in embedders:
        agrees(seen[f"{kind}_embedder"], g[f"fwd_h_{kind}_embed"])
    # the order of sums, which is the processor's, counts most within: 2.6e-5 was seen
    agrees(torch.stack(seen["four.0"], 1), g["fwd_h_after_four"], tolerance=1e-4)
    agrees(torch.cat(seen["two.1"], 1), g["fwd_h_after_two"], tolerance=1e-4)
    agrees(seen["one.1"], g["fwd_h_after_single"], tolerance=1e-4)


@torch.inference_mode()
def test_small_queries_and_keys_show_the_epsilon_of_their_norm(model, g):
    for name, p in model.named_parameters():
        if "qkv" in name:
            p.mul_(0.003)
    agrees(velocity(model, g), g["fwd_velocity_small_qkv"])


def grid(g, K):
    """The released scheduler's times: linspace(1, 0.001, K), both ends included."""
    return (g[f"sched{K}_t"] / 1000).tolist()


@pytest.mark.parametrize("K", [1, 2, 4, 10, 20, 40])
def test_the_released_time_grid_is_a_list_of_times(g, K):
    assert np.allclose(grid(g, K), np.linspace(1, 0.001, K), atol=1e-6)
    times = grid(g, K)
    steps = euler(lambda z, t: -(torch.tensor(times) == t).float(), torch.zeros(K), times)
    assert np.allclose(steps, -g[f"sched{K}_dt"], atol=2e-6)


@pytest.fixture
def released_times(g, monkeypatch):
    """The sampler takes the released scheduler's ten steps in place of equal ones."""
    monkeypatch.setattr(moda, "euler_times", lambda steps, _: torch.tensor(grid(g, steps or 10)))


def window(g, **changes):
    options = dict(identity=g["win_kp"],
                   prev=g["win_prev"],
                   emotion=int(g["win_emotion"]),
                   chunk=80,
                   overlap=16,
                   steps=10,
                   guidance={"audio+emotion": 0.2})
    return options | changes


@pytest.mark.usefixtures("released_times")
@pytest.mark.parametrize("fast", [True, False])
def test_a_guided_window_matches(model, g, fast, monkeypatch):
    if not fast:
        monkeypatch.setattr(moda, "fast_network", plain_network)
    guided = generate(model, g["win_audio"], noise=g["win_noise"], **window(g))
    plain = generate(model, g["win_audio"], noise=g["win_noise"], **window(g, guidance={}))
    agrees(guided, g["win_cfg12"][0])
    agrees(plain, g["win_cfg10"][0])


@pytest.mark.usefixtures("released_times")
def test_long_and_short_voices_match(model, g):
    noise, smooth = g["long_noise"], window(g, smooth=True)
    agrees(generate(model, g["long_audio"], noise=noise, **smooth), g["long_out"])
    agrees(generate(model, g["short_audio"], noise=noise[:1], **smooth), g["short_out"])
    first = generate(model, g["long_audio"][:80], noise=noise, **window(g))
    agrees(first, g["long_raw_first"][0])


def motion(g, name):
    return torch.cat([g[f"{name}_{part}"].flatten(1) for part in PARTS], 1)


def test_a_portrait_becomes_the_first_frame_and_motion_returns_to_its_size(model, g):
    portrait = motion(g, "src")
    portrait[:, TRANS.stop - 1] = 0                            # t_z
    size = model.size(portrait)
    scale_and_translation = size[:, 63:ROT.start]
    assert torch.allclose(scale_and_translation, g["src_rescale"].expand(-1, 4), rtol=1e-6)
    agrees(model.normalise(portrait / size), g["src_prev_motion"][0])
    back = model.denormalise(g["long_out"][:5]) * size
    assert torch.allclose(back, motion(g, "seq"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name, config", [("full", moda.RELEASED_CONFIG), ("small", SMALL_CONFIG)])
def test_our_parameters_and_the_released_file_agree_key_for_key(name, config):
    with torch.device("meta"):
        model = MoDA(Config(**config))
    ours = {released_name(key): [*p.shape] for key, p in model.named_parameters()}
    assert len(ours) == len([*model.parameters()])
    assert ours.pop("null_audio_feat") == [model.cfg.audio_dim]        # few of their files hold it
    released = build.manifest("moda")[name]
    theirs = {key.removeprefix(PREFIX): about["shape"] for key, about in released.items()}
    assert ours == theirs
    assert len(theirs) == 408 or name == "small"


@pytest.mark.parametrize("key", [
    "blocks4.0.attn1.qkv_au2.weight", "blocks.1.qkv_xs.bias",
    "final_layer.adaLN_modulation.1.weight", "audio_embedder.proj1.weight",
    "blocks.1.attn1.xs_q_norm.weight"])
def test_a_changed_file_is_refused_with_the_name_of_the_tensor(small, tmp_path, key):
    path, tensor = tmp_path / "net-200.pth", SMALL[PREFIX + key]
    rest = {k: v for k, v in SMALL.items() if k != PREFIX + key}
    broken = {
        "missing": rest,
        "misspelt": rest | {f"{PREFIX}{key}x": tensor},
        "shorter": rest | {PREFIX + key: tensor[1:]},
        "narrower": rest | {PREFIX + key: tensor[..., 1:]},
        "NaN": rest | {PREFIX + key: tensor * torch.nan}}
    for tensors in broken.values():
        torch.save(tensors, path)
        with pytest.raises(ValueError, match=f"net-200.pth: .*{key} is (absent|of shape)") as error:
            MoDA.from_pretrained(path)
        assert "\n" not in str(error.value)


def test_a_tensor_too_many_is_refused_by_name(small, tmp_path):
    torch.save(SMALL | {f"{PREFIX}extra.weight": torch.zeros(1)}, tmp_path / "net-200.pth")
    with pytest.raises(ValueError, match="extra.weight is of shape .*, should be absent"):
        MoDA.from_pretrained(tmp_path / "net-200.pth")


def test_a_missing_null_vector_is_drawn_from_a_fixed_seed_and_reported(small, tmp_path, capsys):
    torch.save(SMALL, tmp_path / "net-200.pth")
    a, b = [MoDA.from_pretrained(tmp_path / "net-200.pth") for _ in range(2)]
    assert torch.equal(a.null_audio, b.null_audio)
    assert a.null_audio.shape == (16,)
    assert "null_audio_feat" in capsys.readouterr().out


@torch.inference_mode()
def test_full_size_fits_and_its_velocities_agree(g, full, monkeypatch):
    # seconds, for nothing: all weights are loaded
    monkeypatch.setattr(moda, "init_weights", lambda model: None)
    monkeypatch.setattr(torch.nn.Linear, "reset_parameters", lambda layer: None)
    model = from_released(full(), "net-200.pth", focus=4.0)
    assert model.weight.unique().tolist() == [1, 4]            # to be trained on

    def normal(name, *shape):
        rng = np.random.default_rng([1, crc32(f"full.{name}".encode())])
        return torch.from_numpy(rng.standard_normal(shape)).float()
    v = model(normal("noisy", 1, 32, 70), torch.tensor([0.556]), normal("audio", 1, 32, 12, 768),
              torch.tensor([6]), 0.3 * normal("kp", 1, 63), normal("prev", 1, 1, 70)[:, 0])
    agrees(v.flatten()[g["full_index"]], g["full_velocity"])
