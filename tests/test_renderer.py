"""Keypoints follow Eq. 3 to the digit, and the drawn face shows what the numbers say."""
import numpy as np
import torch

from conftest import golden
from data import expression
from renderer import Sketch, keypoints, rotation


def agrees(ours, reference, tolerance=1e-5):
    return np.abs(np.asarray(ours) - reference).max() <= tolerance * reference.std()


def test_rotation_and_keypoints_match_the_reference():
    g = golden("liveportrait")
    assert agrees(rotation(*torch.from_numpy(g["rot_deg"]).T), g["rot_mat"])
    motion = torch.from_numpy(np.concatenate(
        [g["tk_exp"].reshape(3, 63), g["tk_scale"], g["tk_t"], g["tk_pitch"], g["tk_yaw"], g["tk_roll"]], 1))
    assert agrees(keypoints(torch.from_numpy(g["tk_kp"]), motion), g["tk_out"])


def draw(**controls):
    face = Sketch()
    source = face.source()
    source.motion[0, :63] += torch.from_numpy(np.asarray(expression(**controls) if controls else np.zeros(63))).float()
    return next(face.frames(source, source.motion)).astype(int)


def test_the_sketch_opens_its_mouth_and_shuts_its_eyes():
    rest = draw()
    assert rest.shape == (512, 512, 3)
    inside = lambda image: (image[330:430, 200:312].sum(-1) < 220).sum()      # the dark of the open mouth
    assert inside(draw(aaa=60)) > inside(draw(aaa=20)) > inside(rest)
    white = lambda image: (image[180:300].min(-1) > 240).sum()                # the white of the eyes
    assert white(draw(blink=-20)) < 100 < 500 < white(rest)


def test_the_sketch_turns_with_the_head():
    face = Sketch()
    source = face.source()
    turned = source.motion.clone()
    turned[0, 68] = 20
    nose = lambda motion: keypoints(source.x_c.view(1, 21, 3), motion)[0, 9, 0]
    assert nose(turned) < nose(source.motion) - 0.05
    assert np.abs(next(face.frames(source, turned)).astype(int) - draw()).max() > 100
