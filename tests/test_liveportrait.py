"""LivePortrait's networks give the reference's numbers; a wrong file, picture, crop or motion gets
one clear line.

The weights are stand-ins with the public files' names and shapes (fill.py, seed 1), and
liveportrait_golden.npz holds what the reference makes of them. Its R_eye and R_lip are not part of
the renderer."""
import ctypes
import math
import os
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import build
import renderer
import sample
from conftest import golden
from renderer import (AppearanceExtractor, LivePortrait, MotionExtractor, Sketch, Source,
                      SpadeGenerator, StitchingNetwork, WarpingNetwork, crop_box,
                      keypoints, load, paste_back, read_image)

G = golden("liveportrait")
T = {name: torch.from_numpy(G[name]) for name in G if G[name].dtype == np.float32}
# largest error over the array's std; what rounding is amplified by grows along the networks
TOLERANCE = dict(w_mask_sub=1e-3, w_occ=3e-4, w_out_sub=1e-3, g_img_sub=2e-3)
APPEARANCE = "base_models/appearance_feature_extractor.pth"
STITCHING = "retargeting_models/stitching_retargeting_module.pth"
NETWORKS = {
    APPEARANCE: AppearanceExtractor,
    "base_models/motion_extractor.pth": MotionExtractor,
    "base_models/warping_module.pth": WarpingNetwork,
    "base_models/spade_generator.pth": SpadeGenerator,
    STITCHING: StitchingNetwork}


EVERY = slice(None)


def agrees(name, ours, rows=EVERY):
    """Ours are the reference's, or the same rows of its batch."""
    error = np.abs(np.asarray(ours) - G[name][rows]).max() / G[name].std()
    assert error <= TOLERANCE.get(name, 1e-4), f"{name}: off by {error:.1e} of its std"


def agrees_in_mean_and_std(name, ours, axes, rows=EVERY):
    mean = ours.numpy().mean(axes, dtype=float)
    std = ours.numpy().std(axes, dtype=float)
    assert np.allclose(np.stack([mean, std], -1), G[name][rows], rtol=1e-3, atol=1e-4), name


def enlarged(x, *dims):
    """Every value four times along these dimensions."""
    for dim in dims:
        x = x.repeat_interleave(4, dim)
    return x


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    return build.liveportrait(tmp_path_factory.mktemp("pretrained_weights"))


@pytest.fixture(scope="session")
def plain(weights):
    """A function: one of the five classes -> the network as it was trained, nothing folded."""
    paths = {network: weights / "liveportrait" / file for file, network in NETWORKS.items()}
    return lambda network: load(network, paths[network])


@pytest.fixture(scope="module", autouse=True)
def no_random_weights():
    """Weights are loaded: to draw others before takes a second for each LivePortrait."""
    with patch("torch.nn.init.kaiming_uniform_"), patch("torch.nn.init.uniform_"):
        yield


@pytest.fixture(scope="session")
def face(weights):
    return LivePortrait(weights)


@pytest.fixture(scope="session")
def source(face):
    both = [face.source(image) for image in G["img_u8"]]
    return Source(*[torch.cat(parts) for parts in zip(*both)])


@pytest.fixture
def portrait(source):
    """The first of the two."""
    return Source(*(t[:1] for t in source))


@pytest.fixture
def outputs(face):
    """What some of the modules put out, by name."""
    modules = dict(
        dense_motion=face.W.dense_motion_network,
        mask=face.W.dense_motion_network.mask,
        warped=face.W,
        image=face.G,
        stitching=face.S.mlp)
    seen = {}

    def listen(name, module):
        def hook(module, inputs, output):
            seen[name] = output
        return module.register_forward_hook(hook)
    handles = [listen(name, module) for name, module in modules.items()]
    yield seen
    for handle in handles:
        handle.remove()


# -------------------------------------------------------------------------- the reference's numbers
@pytest.mark.parametrize("file", [APPEARANCE, STITCHING])     # the small ones
def test_the_stand_in_weights_are_those_of_the_reference(weights, file):
    (total, squares), = G["fill_check"][G["fill_files"] == file]
    values = torch.load(weights / "liveportrait" / file, weights_only=True).values()
    tensors = []
    for value in values:
        tensors += value.values() if isinstance(value, dict) else [value]
    sums = [t.double().sum().item() for t in tensors]
    sums_of_squares = [t.double().square().sum().item() for t in tensors]
    assert np.isclose(sum(sums), total, rtol=1e-9)
    assert np.isclose(sum(sums_of_squares), squares, rtol=1e-9)


@torch.inference_mode()
def test_appearance_and_motion_of_a_portrait(face, source):
    agrees("f_sub", source.f_s[:, ::3, ::3, ::5, ::5])
    agrees_in_mean_and_std("f_stats", source.f_s, (1, 2, 3, 4))
    heads = face.M(torch.from_numpy(G["img_u8"]).movedim(-1, 1) / 255)
    for head, values in heads.items():
        agrees(f"m_{head}", values)
    for i, angle in enumerate(("pitch", "yaw", "roll")):
        agrees(f"deg_{angle}", source.motion[:, 67 + i, None])
    agrees("x_s", keypoints(source.x_c.view(2, 21, 3), source.motion))
    assert torch.allclose(source.motion[:, :63], heads["exp"], atol=1e-4)
    assert torch.allclose(source.x_c, heads["kp"], atol=1e-4)


@torch.inference_mode()
def test_driving_keypoints_and_stitching(face, outputs):
    parts = [T["drv_exp"].flatten(1)]
    for name in ("scale", "t", "pitch", "yaw", "roll"):
        parts.append(T[f"drv_{name}"])
    agrees("x_d_raw", keypoints(T["m_kp"].view(2, 21, 3), torch.cat(parts, 1)))
    agrees("x_d", face.S(T["x_s"], T["x_d_raw"]))
    agrees("stitch_raw", outputs["stitching"])


@torch.inference_mode()
def test_warping_alone_by_the_plain_network(plain):
    """The frame below is made by the folded one."""
    W = plain(WarpingNetwork)
    seen = []
    W.dense_motion_network.register_forward_hook(lambda module, given, out: seen.extend(out))
    warped = W(enlarged(T["wu_f_small"], 2, 3, 4), T["wu_x_s"], T["wu_x_d"])
    agrees("wu_out_sub", warped[:, ::5, ::3, ::3])
    deformation, occlusion = seen
    agrees("wu_def_sub", deformation[:, ::3, ::5, ::5])
    agrees("wu_occ", occlusion)


@torch.inference_mode()
def test_dense_motion_of_a_batch_is_that_of_each(face, source, monkeypatch):
    """All but the slow hourglass, in whose place are zeros and its own input."""
    motion = face.W.dense_motion_network
    monkeypatch.setattr(motion.hourglass, "forward", lambda x: F.pad(x, (0,) * 7 + (32,)))
    monkeypatch.setattr(motion.mask, "forward", lambda x: x[:, :22])
    given = source.f_s, T["x_s"], T["x_d"]
    both = motion(*given)
    for k in range(2):
        alone = motion(*(x[k:k + 1] for x in given))
        for ours, batched in zip(alone, both):
            assert torch.allclose(ours[0], batched[k], atol=1e-5)
    assert not torch.allclose(both[0][0], both[0][1], atol=1e-2)


@torch.inference_mode()
def test_a_frame_from_end_to_end(face, source, outputs):
    """The second of two; one face takes two cores eight seconds."""
    second = slice(1, 2)
    frame = face.render(*(x[second] for x in (source.f_s, T["x_s"], T["x_d_raw"])))
    agrees("w_mask_sub", outputs["mask"].softmax(1)[:, :, ::5, ::9, ::9], second)
    deformation, occlusion = outputs["dense_motion"]
    agrees("w_def_sub", deformation[:, ::3, ::5, ::5], second)
    agrees("w_occ", occlusion, second)
    agrees("w_out_sub", outputs["warped"][:, ::5, ::3, ::3], second)
    agrees_in_mean_and_std("w_out_stats", outputs["warped"], (1, 2, 3), second)
    agrees("g_img_sub", outputs["image"][:, :, ::7, ::7], second)
    agrees_in_mean_and_std("g_stats", outputs["image"], (2, 3), second)
    assert frame.shape == (1, 512, 512, 3) and frame.dtype == torch.uint8
    assert np.abs(frame[:, ::7, ::7].numpy().astype(int) - G["g_u8_sub"][second]).max() <= 1


# ---------------------------------------------------------------------------- plain PyTorch modules
@pytest.mark.parametrize("file", NETWORKS)
def test_parameters_have_the_names_and_shapes_of_the_public_file(file):
    keys = build.manifest("liveportrait")["files"][file]
    keys = keys.get("retarget_shoulder", keys)
    public = {}
    for key, about in keys.items():
        key = key.removeprefix("detector.").removeprefix("module.")
        public[key] = tuple(about["shape"])
    with torch.device("meta"):
        state = NETWORKS[file]().state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == public


@pytest.mark.parametrize("file", NETWORKS)
def test_files_load_without_the_prefixes_and_the_batch_counts_that_some_have(copy, file):
    def strip(state):
        for part in [state, *state.values()]:
            if isinstance(part, dict):
                for key in [*part]:
                    value = part.pop(key)
                    if not key.endswith("num_batches_tracked"):
                        part[key.removeprefix("detector.").removeprefix("module.")] = value
    whole = load(NETWORKS[file], copy / file)
    change(copy / file, strip)
    stripped = load(NETWORKS[file], copy / file)
    for ours, theirs in zip(stripped.parameters(), whole.parameters()):
        assert torch.equal(ours, theirs)


@torch.inference_mode()
def test_folded_networks_in_a_batch_equal_the_plain_ones_alone(face, plain):
    def equal(folded, network, x):
        ours, trained = folded(x), torch.cat([network(row) for row in x.split(1)])
        assert (ours - trained).abs().max() < 1e-4 * trained.std()
    equal(face.F, plain(AppearanceExtractor), torch.rand(2, 3, 64, 64))
    equal(face.G, plain(SpadeGenerator), torch.randn(2, 256, 8, 8))


def test_a_folded_network_holds_convolutions_alone(face):
    for network in (face.F, face.W, face.G):
        for name in network.state_dict():
            assert not name.endswith(("weight_orig", "conv.norm.weight"))
    names = [type(module).__name__ for module in face.W.modules()]
    assert names.count("BatchNorm2d") == 0
    assert names.count("BatchNorm3d") == 1                     # of `compress`, with four channels
    assert "Upsample" not in repr(face.G)
    layer = face.G.up_1.norm_0.mlp_shared
    assert isinstance(layer, torch.nn.ConvTranspose2d)
    assert layer.kernel_size == (6, 6) and layer.stride == (4, 4)


@pytest.mark.parametrize("network, head", [(MotionExtractor, "fc_exp"), (StitchingNetwork, "mlp")])
def test_a_plain_network_learns(plain, network, head):
    net = plain(network)
    layer = net.get_submodule(head)
    assert "in_features" in repr(layer) and layer in [*net.modules()]
    outputs = []
    handle = layer.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    inputs = [torch.rand(1, 3, 64, 64)] if head == "fc_exp" else [T["x_s"], T["x_d"]]
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-3)
    for _ in range(2):
        net(*inputs)
        loss = outputs[-1].square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    handle.remove()
    before, after = [output.square().mean() for output in outputs]
    assert after < before


def test_gradients_flow_through_a_plain_generator_in_place_or_not(plain):
    net = plain(SpadeGenerator)
    h = torch.randn(1, 256, 4, 4, requires_grad=True)
    net(h).square().mean().backward()
    assert h.grad.isfinite().all() and h.grad.abs().max() > 0
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name


def test_a_face_takes_no_gradients_unless_asked_for(face, source):
    for network in (face.F, face.M, face.W, face.G, face.S):
        assert not network.training
        assert not any(parameter.requires_grad for parameter in network.parameters())
    assert not source.f_s.requires_grad
    x_d = face.S.requires_grad_(True)(T["x_s"], T["x_d_raw"])
    face.S.requires_grad_(False)
    assert x_d.requires_grad


def test_kept_memory_is_for_glibc_alone(monkeypatch):
    assert ctypes.pythonapi.mallopt(-1, 2**31 - 1) == 1
    monkeypatch.setattr(ctypes, "pythonapi", object())
    renderer.keep_memory()


class SinglePrecision(TorchDispatchMode):
    """Fails where anything but a conversion works on float64, of which Apple's GPU has none."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **kwargs or {})
        converts = str(op).split(".")[1] in ("_to_copy", "to", "lift_fresh", "detach", "detach_")
        dtypes = [x.dtype for x in tree_leaves((args, out)) if torch.is_tensor(x)]
        assert converts or torch.float64 not in dtypes, op
        return out


@torch.inference_mode()
def test_sampling_and_rendering_need_no_float64(face, portrait, tiny, monkeypatch):
    monkeypatch.setattr(face, "W", lambda f_s, x_s, x_d: x_d)
    monkeypatch.setattr(face, "G", lambda x_d: x_d[:, None].repeat(1, 3, 1, 1) / 8 + 0.5)
    settings = sample.Settings(steps=1, chunk=20, motion="absolute")
    with SinglePrecision():
        for motion in sample.motion_of(settings, tiny, portrait, [torch.randn(30, 1, 160)], []):
            next(face.frames(portrait, motion))


# ------------------------------------------------------------------------- portraits, their frames
def test_a_portrait_may_have_any_size(face):
    image = G["img_u8"][0].clip(9, 246).repeat(2, 0).repeat(2, 1)      # 512 pixels: means of 2 x 2
    fine = image + np.tile([[9, -9], [-9, 9]], (256, 256))[..., None]
    even, uneven = [face.source(picture.astype(np.uint8)) for picture in (image, fine)]
    assert torch.allclose(uneven.f_s, even.f_s, atol=1e-4)


def test_frames_do_not_depend_on_the_batch(face, portrait, monkeypatch):
    def fast_warp(f, x_s, x_d):
        return f[:, :3, 0] + 20 * x_d[:, :3, :1, None]

    def fast_generator(h):
        return F.interpolate(h.sigmoid(), 512)
    monkeypatch.setattr(face, "W", fast_warp)
    monkeypatch.setattr(face, "G", fast_generator)
    monkeypatch.setattr(face, "batch", 2)
    motion = portrait.motion + 0.05 * torch.randn(3, 70)
    frames = list(face.frames(portrait, motion.numpy()))
    assert len(frames) == 3
    assert frames[0].shape == (512, 512, 3) and frames[0].dtype == np.uint8
    monkeypatch.setattr(face, "batch", 1)
    last = next(face.frames(portrait, motion[2:].double())).astype(int)
    assert np.abs(last - frames[2]).max() <= 1 < np.abs(last - frames[0]).max()


def test_batches_have_one_size_for_the_compiler(face, portrait, monkeypatch):
    sizes = set()

    def render(f_s, x_s, x_d):
        sizes.update({len(f_s), len(x_s), len(x_d)})
        return x_d[:, 0]
    monkeypatch.setattr(face, "render", render)
    monkeypatch.setattr(face, "batch", 4)
    motion = torch.randn(10, 70)
    frames = np.stack([*face.frames(portrait, motion)])
    assert sizes == {4}
    assert np.allclose(frames, keypoints(portrait.x_c, motion)[:, 0], atol=1e-5)


def test_frames_are_rendered_when_asked_for(face, portrait, monkeypatch):
    rendered = []

    def render(f_s, x_s, x_d):
        rendered.append(len(x_d))
        return torch.zeros(len(x_d), 1)
    monkeypatch.setattr(face, "render", render)
    monkeypatch.setattr(face, "batch", 4)
    frames = face.frames(portrait, torch.zeros(100000, 70))
    next(frames)
    next(frames)
    assert rendered == [4, 4]                      # a batch ahead


def test_driving_keypoints_are_stitched(face, portrait, monkeypatch):
    monkeypatch.setattr(face, "W", lambda f_s, x_s, x_d: x_d)
    monkeypatch.setattr(face, "G", lambda x_d: x_d[:, None].repeat(1, 3, 1, 1) / 8 + 0.5)
    stitched = next(face.frames(portrait, portrait.motion))
    monkeypatch.setattr(face, "S", lambda x_s, x_d: x_d)
    assert not np.array_equal(next(face.frames(portrait, portrait.motion)), stitched)


# ---------------------------------------------------------------------------------------- pictures
RAMP = np.arange(20 * 30, dtype=np.uint8).reshape(20, 30)
GREY = np.repeat(RAMP[..., None].astype(int), 3, 2)


def saved_and_read(image, path, **options):
    image.save(path, **options)
    return np.asarray(read_image(path)).astype(int)


@pytest.mark.parametrize("mode, file, most", [
    ("L", "a.png", 0), ("P", "a.png", 0), ("RGB", "a.png", 0), ("CMYK", "a.tif", 1)])
def test_pictures_of_every_kind_come_out_in_colour(tmp_path, mode, file, most):
    image = saved_and_read(Image.fromarray(RAMP).convert(mode), tmp_path / file)
    assert np.abs(image - GREY).max() <= most


@pytest.mark.parametrize("dtype, file", [
    ("<u2", "a.png"), ("<u2", "a.tif"), (">u2", "a.tif"), ("<u2", "a.pgm"), ("<i4", "a.tif")])
def test_white_is_65535_in_grey_of_16_bits(tmp_path, dtype, file):
    image = saved_and_read(Image.fromarray((257 * RAMP.astype(int)).astype(dtype)), tmp_path / file)
    assert (image == GREY).all()


def test_floats_of_grey_are_refused(tmp_path):
    Image.fromarray(RAMP.astype(np.float32)).save(tmp_path / "a.tif")
    refused(["a.tif", "floats"], read_image, tmp_path / "a.tif")


def test_a_palette_with_transparent_colours_lies_on_white(tmp_path):
    picture = Image.fromarray(RAMP).convert("P")
    image = saved_and_read(picture, tmp_path / "a.png", transparency=bytes([0] * 100 + [255] * 156))
    assert (image[RAMP < 100] == 255).all()
    assert (image[RAMP >= 100] == GREY[RAMP >= 100]).all()


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_picture_as_large_as_any_camera_takes(tmp_path):
    """200 megapixels, upside down, of which a part is bright: reduced while they are read."""
    picture = Image.new("L", (16400, 12200), 40)
    picture.paste(200, (16000, 0, 16400, 12200))
    exif = Image.Exif()
    exif[0x0112] = 3
    picture.save(tmp_path / "a.jpg", exif=exif)
    image = read_image(tmp_path / "a.jpg")
    assert image.size == (2048, 1524)
    assert image.getpixel((40, 9)) == (200, 200, 200) and image.getpixel((60, 9)) == (40, 40, 40)


def test_the_pixels_of_a_crop_are_those_of_the_file(tmp_path):
    Image.new("L", (3000, 10)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", "2900,0,10").size == (3000, 10)
    assert read_image(tmp_path / "a.png").size[0] == 2048


def test_the_smallest_picture_is_one(tmp_path):
    assert saved_and_read(Image.new("1", (1, 1)), tmp_path / "a.png").shape == (1, 1, 3)


def test_what_is_transparent_comes_out_white(tmp_path):
    alpha = np.zeros_like(RAMP)
    alpha[:, :15] = 255
    image = Image.fromarray(np.dstack([RAMP, RAMP, RAMP, alpha]))
    image = saved_and_read(image, tmp_path / "a.png")
    assert (image[:, :15] == GREY[:, :15]).all()
    assert (image[:, 15:] == 255).all()


def test_a_picture_of_a_turned_camera_comes_out_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    image = saved_and_read(Image.fromarray(RAMP), tmp_path / "a.png", exif=exif)
    assert (image == np.rot90(GREY, -1)).all()


def test_the_crop_is_the_middle_unless_named_and_goes_back_without_an_edge():
    picture = Image.new("RGB", (1601, 1001), (0, 0, 200))
    assert crop_box(picture) == (300, 0, 1001)
    assert crop_box(picture, "7,9,16") == (7, 9, 16)
    white = np.full((512, 512, 3), 255, np.uint8)
    whole, = paste_back([white], picture, crop_box(picture, "1001,401,600"))
    assert whole.shape == (800, 1280, 3)
    assert (whole[:, :800] == (0, 0, 200)).all()
    assert (whole[400:700, 900:1200] == 255).all()
    steps = np.diff(whole[550, 800:840, 0].astype(int))
    assert (steps >= 0).all() and steps.max() < 40


# -------------------------------------------------------------------------------------- bad inputs
class Code:
    """A pickle that would make a folder."""

    def __reduce__(self):
        return os.mkdir, ("run_by_a_pickle",)


def rewrite(path, data):
    """Put a file in place of a link, so that the other tests keep theirs."""
    path.unlink()
    path.write_bytes(data)


def change(path, edit):
    state = torch.load(path, weights_only=True)
    edit(state)
    path.unlink()
    torch.save(state, path)


def truncated(path):
    rewrite(path, path.read_bytes()[:100000])
    return "not a readable checkpoint"


def a_web_page(path):
    rewrite(path, b"<html>please log in</html>")
    return "not a readable checkpoint"


def code(path):
    path.unlink()
    torch.save({"first.conv.weight": Code()}, path)
    return "not a readable checkpoint"


def a_wrong_shape(path):
    change(path, lambda state: state.update({"first.conv.weight": torch.zeros(32, 3, 3, 3)}))
    return "first.conv.weight", "[32, 3, 3, 3]", "[64, 3, 3, 3]"


def a_number_for_a_tensor(path):
    change(path, lambda state: state.update({"first.conv.weight": 3.0}))
    return "first.conv.weight"


def a_tensor_missing(path):
    change(path, lambda state: state.pop("resblocks_3d.3dr5.norm2.running_var"))
    return "resblocks_3d.3dr5.norm2.running_var is absent"


def a_number_too_many(path):
    change(path, lambda state: state.update(epoch=3))
    return "epoch is 3, should be absent"


def a_tensor_too_many(path):
    change(path, lambda state: state.update(third=torch.zeros(1)))
    return "third is of shape [], should be absent"


def not_a_number(path):
    change(path, lambda state: state["first.conv.weight"].fill_(math.nan))
    return "first.conv.weight is of shape [64, 3, 3, 3]", "and finite"


def another_network(path):
    rewrite(path, (path.parent.parent / STITCHING).read_bytes())
    return "first.conv.weight is absent"


SPOIL = [truncated, a_web_page, code, a_wrong_shape, a_number_for_a_tensor, a_tensor_missing,
         a_tensor_too_many, a_number_too_many, not_a_number, another_network]


@pytest.fixture
def copy(weights, tmp_path):
    """A folder of links to the weights, of which a test may spoil one."""
    for file in NETWORKS:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).symlink_to(weights / "liveportrait" / file)
    return tmp_path


def refused(words, call, *args):
    """One line with all of the words."""
    with pytest.raises(ValueError) as raised:
        call(*args)
    message = str(raised.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize("file", NETWORKS)
def test_a_missing_file_is_named(copy, file, monkeypatch):
    def load_what_is_missing(network, path):
        return torch.nn.Identity() if path.exists() else load(network, path)
    monkeypatch.setattr(renderer, "load", load_what_is_missing)
    (copy / file).unlink()
    refused([file, "FileNotFoundError", "hf download"], LivePortrait, copy)


@pytest.mark.parametrize("spoil", SPOIL)
def test_a_spoilt_file_is_named_with_its_key(copy, spoil):
    words = spoil(copy / APPEARANCE)
    words = [words] if isinstance(words, str) else words
    refused([APPEARANCE, "hf download", *words], LivePortrait, copy)
    assert not Path("run_by_a_pickle").exists()


def test_other_weights_are_refused(copy):
    refused(["nowhere", "FileNotFoundError"], LivePortrait, copy / "nowhere")
    rewrite(copy / STITCHING, (copy / APPEARANCE).read_bytes())
    refused([STITCHING, "mlp.0.weight is absent"], load, StitchingNetwork, copy / STITCHING)


@pytest.mark.parametrize("name", ["empty.png", "text.jpg", "cut.png", "cut.jpg", "missing.png",
                                  "."])
def test_files_that_are_no_pictures_are_named(tmp_path, name):
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.jpg").write_text("a portrait of my aunt")
    noise = Image.fromarray(np.random.randint(0, 255, (64, 64, 3), np.uint8))
    for kind in ("png", "jpg"):
        noise.save(tmp_path / f"whole.{kind}")
        whole = (tmp_path / f"whole.{kind}").read_bytes()
        (tmp_path / f"cut.{kind}").write_bytes(whole[:3000])
    refused([str(tmp_path / name), "no picture"], read_image, tmp_path / name)


@pytest.mark.parametrize("crop", ["60,0,50", "0,40,50", "-5,0,50", "0,0,15", "0,0", "0,0,50,50",
                                  "a,b,c", "0,0,5e1"])
def test_a_crop_outside_the_picture_is_refused(crop):
    refused([f"crop {crop}", "100 x 80"], crop_box, Image.new("RGB", (100, 80)), crop)


def test_a_picture_too_small_to_crop_is_refused():
    refused(["crop 2,0,15", "20 x 15"], crop_box, Image.new("RGB", (20, 15)))


@pytest.mark.parametrize("shape, value", [
    ((4, 70), np.nan), ((4, 70), np.inf), ((4, 69), 0), ((70,), 0), ((0, 70), 0), ((1, 4, 70), 0)])
def test_motion_that_is_none_is_refused(face, portrait, shape, value):
    motion = np.full(shape, value, np.float32)
    sketch = Sketch()
    refused(["motion", str(shape), "70"], next, face.frames(portrait, motion))
    refused(["motion", str(shape), "70"], next, sketch.frames(sketch.source(), motion))
