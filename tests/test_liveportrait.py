"""LivePortrait's networks give the reference's numbers; a wrong file, picture, crop or motion gets one clear line.

The weights are stand-ins with the public files' names and shapes (fill.py, seed 1), and liveportrait_golden.npz holds
what the reference makes of them. Its R_eye and R_lip are not part of the renderer.
"""
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import build
import renderer
from conftest import golden
from renderer import LivePortrait, Sketch, Source, crop_box, keypoints, paste_back, read_image, stitching

G = golden("liveportrait")
T = {name: torch.from_numpy(G[name]) for name in G if G[name].dtype == np.float32}
# largest error over the array's std; what rounding is amplified by grows along the networks
TOLERANCE = dict(gu_img_sub=3e-5, w_mask_sub=1e-3, w_occ=3e-4, w_out_sub=1e-3, g_img_sub=2e-3)
BASE, MLPS = "base_models/", "retargeting_models/stitching_retargeting_module.pth"
APPEARANCE = BASE + "appearance_feature_extractor.pth"
FILES = [APPEARANCE, BASE + "motion_extractor.pth", BASE + "warping_module.pth", BASE + "spade_generator.pth", MLPS]


def agrees(name, ours):
    error = np.abs(np.asarray(ours) - G[name]).max() / G[name].std()
    assert error <= TOLERANCE.get(name, 1e-4), f"{name}: off by {error:.1e} of its std"


def agrees_in_mean_and_std(name, ours, axes):
    ours = np.stack([ours.numpy().mean(axes, dtype=float), ours.numpy().std(axes, dtype=float)], -1)
    assert np.allclose(ours, G[name], rtol=1e-3, atol=1e-4), name


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    return build.liveportrait(tmp_path_factory.mktemp("pretrained_weights"))


@pytest.fixture(scope="session")
def face(weights):
    return LivePortrait(weights)


@pytest.fixture(scope="session")
def source(face):
    return face.source(G["img_u8"])


@pytest.fixture
def portrait(source):
    """The first of the two."""
    return Source(*(t[:1] for t in source))


@pytest.fixture
def seen(face, monkeypatch):
    """What the layers of W and S put out, by name."""
    outputs = {}

    def listen(net, method):
        layer = getattr(net, method)

        def run(x, name, *args, **options):
            outputs[name] = layer(x, name, *args, **options)
            return outputs[name]
        monkeypatch.setattr(net, method, run)
    listen(face.W, "conv")
    listen(face.S, "linear")
    return outputs


def spy(monkeypatch, name):
    """Everything that the renderer's function of this name returns from now on."""
    results, function = [], getattr(renderer, name)

    def call(*args):
        results.append(function(*args))
        return results[-1]
    monkeypatch.setattr(renderer, name, call)
    return results


# ---------------------------------------------------------------------------------------------- the reference's numbers

def test_the_stand_in_weights_are_those_of_the_reference(weights):
    for file, (total, squares) in zip(G["fill_files"], G["fill_check"]):
        values = torch.load(weights / "liveportrait" / str(file), weights_only=True)
        tensors = [t for v in values.values() for t in (v.values() if isinstance(v, dict) else [v])]
        assert np.isclose(sum(t.double().sum().item() for t in tensors), total, rtol=1e-9)
        assert np.isclose(sum(t.double().square().sum().item() for t in tensors), squares, rtol=1e-9)


@torch.inference_mode()
def test_appearance_and_motion_of_a_portrait(face, source):
    agrees("f_sub", source.f_s[:, ::3, ::3, ::5, ::5])
    agrees_in_mean_and_std("f_stats", source.f_s, (1, 2, 3, 4))
    heads = renderer.motion_heads(face.M, torch.from_numpy(G["img_u8"]).movedim(-1, 1) / 255)
    for head, values in heads.items():
        agrees(f"m_{head}", values)
    for i, angle in enumerate(("pitch", "yaw", "roll")):
        agrees(f"deg_{angle}", source.motion[:, 67 + i, None])
    agrees("x_s", keypoints(source.x_c.view(2, 21, 3), source.motion))
    assert torch.equal(source.motion[:, :63], heads["exp"]) and torch.equal(source.x_c, heads["kp"])


@torch.inference_mode()
def test_driving_keypoints_and_stitching(face, seen):
    motion = torch.cat([T["drv_exp"].flatten(1)] + [T[f"drv_{k}"] for k in ("scale", "t", "pitch", "yaw", "roll")], 1)
    agrees("x_d_raw", keypoints(T["m_kp"].view(2, 21, 3), motion))
    agrees("x_d", stitching(face.S, T["x_s"], T["x_d_raw"]))
    agrees("stitch_raw", seen["mlp.6"])


@torch.inference_mode()
def test_warping_alone(face, monkeypatch):
    grid = spy(monkeypatch, "dense_motion")
    f = T["wu_f_small"].repeat_interleave(4, 2).repeat_interleave(4, 3).repeat_interleave(4, 4)
    agrees("wu_out_sub", renderer.warp(face.W, f, T["wu_x_s"], T["wu_x_d"])[:, ::5, ::3, ::3])
    agrees("wu_def_sub", grid[0][0][:, ::3, ::5, ::5])
    agrees("wu_occ", grid[0][1])


@torch.inference_mode()
def test_generator_alone(face):
    image = renderer.generate(face.G, T["gu_small"].repeat_interleave(4, 2).repeat_interleave(4, 3))
    agrees("gu_img_sub", image[:, :, ::7, ::7])
    agrees_in_mean_and_std("gu_stats", image, (2, 3))


@torch.inference_mode()
def test_end_to_end_in_one_batch(face, source, seen, monkeypatch):
    grid, image = spy(monkeypatch, "dense_motion"), spy(monkeypatch, "generate")
    frames = face.render(source.f_s, T["x_s"], T["x_d"], stitch=False)
    agrees("w_mask_sub", seen["dense_motion_network.mask"].softmax(1)[:, :, ::5, ::9, ::9])
    agrees("w_def_sub", grid[0][0][:, ::3, ::5, ::5])
    agrees("w_occ", grid[0][1])
    warped = seen["fourth"] * grid[0][1]
    agrees("w_out_sub", warped[:, ::5, ::3, ::3])
    agrees_in_mean_and_std("w_out_stats", warped, (1, 2, 3))
    agrees("g_img_sub", image[0][:, :, ::7, ::7])
    agrees_in_mean_and_std("g_stats", image[0], (2, 3))
    assert frames.shape == (2, 512, 512, 3) and frames.dtype == torch.uint8
    assert np.abs(frames[:, ::7, ::7].numpy().astype(int) - G["g_u8_sub"]).max() <= 1


# ------------------------------------------------------------------------------------------- portraits and their frames

def test_a_batch_of_portraits_of_any_size_equals_each_alone(face, source):
    alone = face.source(G["img_u8"][1])
    for ours, batched in zip(alone, source):
        assert torch.allclose(ours, batched[1:], atol=1e-4)
    large = face.source(G["img_u8"].repeat(2, 1).repeat(2, 2)[0])    # 512 pixels: means of 2 x 2
    assert torch.allclose(large.f_s, source.f_s[:1], atol=1e-4)


def test_frames_do_not_depend_on_the_batch(face, portrait, monkeypatch):
    monkeypatch.setattr(renderer, "warp", lambda net, f, x_s, x_d: f[:, :3, 0] + 20 * x_d[:, :3, :1, None])    # slow
    monkeypatch.setattr(renderer, "generate", lambda net, h: F.interpolate(h.sigmoid(), 512))
    motion = portrait.motion + 0.05 * torch.randn(3, 70)
    frames = list(face.frames(portrait, motion.numpy(), batch=2))
    assert len(frames) == 3 and frames[0].shape == (512, 512, 3) and frames[0].dtype == np.uint8
    last = next(face.frames(portrait, motion[2:].double(), batch=1))
    assert np.abs(last.astype(int) - frames[2]).max() <= 1 < np.abs(last.astype(int) - frames[0]).max()


def test_frames_are_made_when_asked_for(face, portrait, monkeypatch):
    made = []
    monkeypatch.setattr(face, "render", lambda f_s, x_s, x_d, stitch: made.append(len(x_d)) or torch.zeros(len(x_d), 1))
    clip = face.frames(portrait, torch.zeros(100000, 70), batch=4)
    next(clip), next(clip)
    assert made == [4]


def test_stitching_can_be_switched_off(face, portrait, monkeypatch):
    monkeypatch.setattr(renderer, "generate", lambda net, x_d: x_d[:, None].repeat(1, 3, 1, 1) / 8 + 0.5)
    monkeypatch.setattr(renderer, "warp", lambda net, f_s, x_s, x_d: x_d)
    plain, stitched = (next(face.frames(portrait, portrait.motion, stitch=stitch)) for stitch in (False, True))
    assert not np.array_equal(plain, stitched)


# ------------------------------------------------------------------------------------------------------------- pictures

def test_pictures_of_every_kind_come_out_upright_and_in_colour(tmp_path):
    def read(image, name="picture.png", **options):
        image.save(tmp_path / name, **options)
        return np.asarray(read_image(tmp_path / name)).astype(int)

    ramp = np.arange(20 * 30, dtype=np.uint8).reshape(20, 30)
    grey = read(Image.fromarray(ramp))
    assert grey.shape == (20, 30, 3) and (grey == ramp[..., None]).all()
    assert (read(Image.fromarray(ramp).convert("P")) == grey).all()
    assert np.abs(read(Image.fromarray(ramp).convert("CMYK"), "a.tif") - grey).max() <= 1
    clear = np.dstack([ramp] * 3 + [np.where(np.arange(30) < 15, 255, 0) + 0 * ramp]).astype(np.uint8)
    seen = read(Image.fromarray(clear))
    assert (seen[:, :15] == grey[:, :15]).all() and (seen[:, 15:] == 255).all()
    assert (read(Image.new("1", (1, 1)))).shape == (1, 1, 3)
    exif = Image.Exif()
    exif[0x0112] = 6                                                       # the camera was held upright
    assert (read(Image.fromarray(ramp), exif=exif) == np.rot90(grey, -1)).all()


def test_the_crop_is_the_middle_unless_said_and_goes_back_without_an_edge():
    picture = Image.new("RGB", (1601, 1001), (0, 0, 200))
    assert crop_box(picture) == (300, 0, 1001) and crop_box(picture, "7,9,16") == (7, 9, 16)
    white = np.full((512, 512, 3), 255, np.uint8)
    whole, = paste_back([white], picture, crop_box(picture, "1001,401,600"))
    assert whole.shape == (800, 1280, 3)
    assert (whole[:, :800] == (0, 0, 200)).all() and (whole[400:700, 900:1200] == 255).all()
    edge = whole[550, 800:840, 0].astype(int)
    assert (np.diff(edge) >= 0).all() and np.diff(edge).max() < 40


# ----------------------------------------------------------------------------------------------------------- bad inputs

class Code:
    """A pickle that would make a folder."""
    def __reduce__(self):
        return os.mkdir, ("run_by_a_pickle",)


def change(path, edit):
    tensors = torch.load(path, weights_only=True)
    edit(tensors)
    path.unlink()
    torch.save(tensors, path)


def rewrite(path, data):
    path.unlink()
    path.write_bytes(data)


def shorten(path):
    rewrite(path, path.read_bytes()[:100000])


def smuggle(path):
    path.unlink()
    torch.save({"first.conv.weight": Code()}, path)


SPOILT = {
    "truncated": (shorten, "not a readable checkpoint"),
    "text": (lambda p: rewrite(p, b"<html>please log in</html>"), "not a readable checkpoint"),
    "code": (smuggle, "not a readable checkpoint"),
    "wrong shape": (lambda p: change(p, lambda t: t.update({"first.conv.weight": torch.zeros(32, 3, 3, 3)})),
                    "first.conv.weight is (32, 3, 3, 3), expected (64, 3, 3, 3)"),
    "tensor missing": (lambda p: change(p, lambda t: t.pop("resblocks_3d.3dr5.norm2.running_var")),
                       "resblocks_3d.3dr5.norm2.running_var is missing"),
    "tensor too many": (lambda p: change(p, lambda t: t.update(third=torch.zeros(1))), "third does not belong there"),
    "another network": (lambda p: rewrite(p, (p.parent.parent / MLPS).read_bytes()), "first.conv.weight is missing"),
}


@pytest.fixture
def copy(weights, tmp_path):
    """A folder of links to the weights, of which a test may spoil one."""
    for file in FILES:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).symlink_to(weights / "liveportrait" / file)
    return tmp_path


def one_line(words, call):
    with pytest.raises(ValueError) as told:
        call()
    assert "\n" not in str(told.value) and all(word in str(told.value) for word in words), str(told.value)


@pytest.mark.parametrize("file", FILES)
def test_a_missing_file_is_named(copy, file):
    (copy / file).unlink()
    one_line([file, "No such file", "hf download"], lambda: LivePortrait(copy))


@pytest.mark.parametrize("spoil, words", SPOILT.values(), ids=SPOILT)
def test_a_spoilt_file_is_named_with_its_key(copy, spoil, words):
    spoil(copy / APPEARANCE)
    one_line([APPEARANCE, words, "hf download"], lambda: LivePortrait(copy))
    assert not Path("run_by_a_pickle").exists()


def test_other_weights_are_refused(weights, copy):
    one_line(["nowhere", "No such file"], lambda: LivePortrait(copy / "nowhere"))
    (copy / "liveportrait_animals").mkdir()
    one_line(["liveportrait_animals", "animals"], lambda: LivePortrait(copy / "liveportrait_animals"))
    (copy / MLPS).unlink()
    (copy / MLPS).symlink_to(copy / APPEARANCE)
    one_line([MLPS, "mlp.0.weight is missing"], lambda: LivePortrait(copy))


def test_files_that_are_no_pictures_are_named(tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.jpg").write_text("a portrait of my aunt")
    Image.fromarray(np.random.randint(0, 255, (64, 64, 3), np.uint8)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:3000])
    for name in ("empty.png", "text.jpg", "cut.png", "missing.png", "."):
        one_line([str(tmp_path / name), "no picture"], lambda: read_image(tmp_path / name))


@pytest.mark.parametrize("crop", ["60,0,50", "0,40,50", "-5,0,50", "0,0,15", "0,0", "0,0,50,50", "a,b,c", "0,0,5e1"])
def test_a_crop_outside_the_picture_is_refused(crop):
    one_line([f"crop {crop}", "100 x 80"], lambda: crop_box(Image.new("RGB", (100, 80)), crop))


@pytest.mark.parametrize("shape, value", [((4, 70), np.nan), ((4, 70), np.inf), ((4, 69), 0), ((70,), 0), ((0, 70), 0),
                                          ((1, 4, 70), 0)])
def test_motion_that_is_none_is_refused(face, portrait, shape, value):
    motion = np.full(shape, value, np.float32)
    one_line(["motion", str(shape), "70"], lambda: next(face.frames(portrait, motion)))
    one_line(["motion", str(shape), "70"], lambda: next(Sketch().frames(Sketch().source(), motion)))
