"""Keypoints follow Eq. 3 to the digit, and the drawn face shows what the numbers say."""
import pickle

import numpy as np
import pytest
import torch

from conftest import golden
from data import CONTROLS, MANNERS, expression
from renderer import (FACE, Sketch, angles, keypoints, read_template, rotation,
                      write_template)


def agrees(ours, reference, tolerance=1e-5):
    return np.abs(np.asarray(ours) - reference).max() <= tolerance * reference.std()


def test_rotation_and_keypoints_match_the_reference():
    g = golden("liveportrait")
    assert agrees(rotation(torch.from_numpy(g["rot_deg"])), g["rot_mat"])
    motion = torch.from_numpy(np.concatenate(
        [g["tk_exp"].reshape(3, 63), g["tk_scale"], g["tk_t"], g["tk_pitch"], g["tk_yaw"],
         g["tk_roll"]], 1))
    assert agrees(keypoints(torch.from_numpy(g["tk_kp"]), motion), g["tk_out"])


def draw(**controls):
    return draw_offsets(expression(**controls) if controls else np.zeros(63))


def draw_offsets(delta):
    face = Sketch()
    source = face.source()
    source.motion[0, :63] += torch.from_numpy(np.asarray(delta)).float()
    return next(face.frames(source, source.motion)).astype(int)


def white(image):
    """Pixels of the white of the eyes."""
    return (image[180:300].min(-1) > 240).sum()


def inside(image):
    """Where the dark of the open mouth is, in the lower face."""
    return image[330:430, 200:312].sum(-1) < 220


def test_the_sketch_opens_its_mouth_and_shuts_its_eyes():
    rest = draw()
    assert rest.shape == (512, 512, 3)
    assert inside(draw(aaa=60)).sum() > inside(draw(aaa=20)).sum() > inside(rest).sum()
    assert white(draw(blink=-20)) < 100 < 500 < white(rest)


@pytest.mark.parametrize("aaa", [20, 40, 60, 100])
def test_a_rounded_mouth_has_lips_all_around(aaa):
    image = draw(aaa=aaa, woo=60)
    rows, columns = np.nonzero(inside(image))
    middle = (rows.min() + rows.max()) // 2
    left, right = columns[rows == middle][[0, -1]]
    for beside in left - 3, right + 3:             # three pixels further out
        red, green, blue = image[330 + middle, 200 + beside]
        assert red > 180 and green < 140, "skin, of which green is above 160"


@pytest.mark.parametrize("mouth", [
    dict(), dict(smile=0.7), dict(smile=-0.6), dict(smile=-0.6, woo=15), dict(sneer=10, woo=15)])
def test_teeth_are_one_row_and_no_fangs(mouth):
    teeth = draw(aaa=80, **mouth)[330:430, 200:312].min(-1) > 225
    # above, the lip's bow parts them
    for row in teeth[teeth[:, 56].argmax():]:
        columns = np.nonzero(row)[0]
        assert not len(columns) or np.ptp(columns) < 1.1 * len(columns)
    assert teeth.any()


def test_a_recorded_wink_shuts_one_eye():
    """(11, y) and (15, y) of LivePortrait's own template, in the midst of a wink."""
    wink = np.zeros(63)
    wink[34], wink[46] = 0.0099, -0.0035
    picture = draw_offsets(wink)
    assert white(picture[:, :256]) < 20
    assert white(picture[:, 256:]) > 200


def test_every_emotion_is_seen_around_the_eyes_and_at_the_mouth():
    """Any two of the eight, saying the same vowel, differ in three of a hundred pixels there."""
    pictures = []
    for manner in MANNERS:
        controls = {name: manner[name] for name in CONTROLS}
        controls["aaa"] += 28
        pictures.append(draw(**controls))
    for part in (np.s_[170:300, 140:372], np.s_[310:420, 180:332]):
        for k, picture in enumerate(pictures):
            for other in pictures[:k]:
                changed = np.abs(picture[part] - other[part]).sum(-1) > 60
                assert changed.mean() > 0.03


def test_the_sketch_turns_with_the_head():
    face = Sketch()
    source = face.source()
    turned = source.motion.clone()
    turned[0, 68] = 20
    nose = lambda motion: keypoints(source.x_c.view(1, 21, 3), motion)[0, 9, 0]
    assert nose(turned) < nose(source.motion) - 0.05
    assert np.abs(next(face.frames(source, turned)).astype(int) - draw()).max() > 100


# --------------------------------------------------------------------- LivePortrait's templates
def some_motion(frames):
    motion = torch.randn(frames, 70) * 0.02
    motion[:, 63] += 1.2
    motion[:, 67:] *= 1000                         # degrees
    return motion


def test_angles_are_the_inverse_of_rotation():
    degrees = torch.tensor([[10.0, -70, 30], [-80, 85, -170], [0, 0, 0]])
    assert torch.allclose(angles(rotation(degrees)), degrees, atol=1e-3)


def test_motion_survives_a_template(tmp_path):
    motion = some_motion(5)
    write_template(motion, tmp_path / "m.pkl")
    assert torch.allclose(read_template(tmp_path / "m.pkl"), motion, atol=1e-4)


def test_a_template_holds_what_live_portrait_takes(tmp_path):
    motion = some_motion(2)
    motion[:, [34, 46, 52, 58]] = torch.tensor([[0, 0, 0, 0], [0.02, 0, 0, 0.08]])  # wink and open
    write_template(motion, tmp_path / "m.pkl")
    template = pickle.loads((tmp_path / "m.pkl").read_bytes())
    assert (template["n_frames"], template["output_fps"]) == (2, 25)
    frame = template["motion"][1]
    shapes = {name: x.shape for name, x in frame.items()}
    assert shapes == dict(exp=(1, 21, 3), scale=(1, 1), t=(1, 3), R=(1, 3, 3))
    assert {x.dtype for x in frame.values()} == {np.dtype("f4")}
    x_c = np.float32(FACE)
    x = frame["scale"] * (x_c @ frame["R"] + frame["exp"]) + frame["t"] * [1, 1, 0]
    assert np.allclose(x, keypoints(torch.tensor(x_c)[None], motion[1:]), atol=1e-5)
    (eyes, wink), (shut, opened) = template["c_eyes_lst"], template["c_lip_lst"]
    assert eyes.shape == (1, 2) and shut.shape == (1, 1)
    assert wink[0, 0] == 0 < 0.3 < eyes[0, 0] == eyes[0, 1] == wink[0, 1]
    assert shut == 0 < 0.3 < opened


def test_a_template_of_another_rate_keeps_its_length_in_seconds(tmp_path):
    """Older templates say R_d; theirs may be stored column by column, and in any precision."""
    motion = some_motion(8)
    frames = []
    for m, R in zip(motion.numpy(), rotation(motion[:, 67:])):
        R = np.asfortranarray(R[None].double())
        frames.append(dict(exp=m[None, :63].reshape(1, 21, 3), scale=m[None, 63:64],
                           t=m[None, 64:67], R_d=R, kp=np.zeros((1, 63))))
    template = dict(motion=frames, n_frames=8, output_fps=20)
    (tmp_path / "m.pkl").write_bytes(pickle.dumps(template, protocol=4))
    played = read_template(tmp_path / "m.pkl")
    assert len(played) == 10
    assert torch.allclose(played[::5], motion[::4], atol=1e-4)
    assert torch.allclose(played[1], motion[0].lerp(motion[1], 0.8), atol=1e-4)
