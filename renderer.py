"""From motion to video: keypoints, LivePortrait's five networks, and a drawn face without weights.

LivePortrait is arXiv 2407.03168; Eq. 3 is that of MoDA. From top to bottom: keypoints, templates,
its networks (F, M, W, G, S), faster inference, LivePortrait, pictures, the drawn face.
Letters: B images, T frames; x_c (21, 3) canonical keypoints, x right, y down, z inward, the image
spans -1..1. An image is (B, 3, H, W) in 0..1, a volume (B, C, 16, H, W). Motion is in LivePortrait
units: 63 expression offsets, scale, translation, then pitch, yaw and roll in degrees.
"""
import ctypes
import pickle
from collections import OrderedDict, namedtuple
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present
from torch.nn.utils import fuse_conv_bn_eval, remove_spectral_norm, spectral_norm

# where in the 70 numbers: slices, but for MOUTH, an index; M is 70
from moda import EXP, MOUTH, ROT, SCALE, TRANS, M, explained, load_strictly, read_checkpoint

SIZE = 512                       # pixels of a rendered frame, height and width
GET = ("get it with: hf download KwaiVGI/LivePortrait --local-dir pretrained_weights "
       '--include "liveportrait/*"')
# a portrait, split: appearance (B, 32, 16, 64, 64), canonical keypoints (B, 63), motion (B, 70)
Source = namedtuple("Source", "f_s x_c motion")


# --------------------------------------------------------------------------------------- keypoints
def rotation(degrees):
    """Pitch, yaw, roll (..., 3) -> R (..., 3, 3), the transpose of Rz Ry Rx: keypoints are rows,
    x_c R. Each of the three turns is Rodrigues' formula."""
    angle = degrees.deg2rad()[..., None, None]
    axes = torch.eye(3, device=degrees.device)
    # (3, 3, 3): row j of K[i] is axis i x axis j, so that v @ K[i] is axis i x v
    K = torch.linalg.cross(axes[:, None], axes[None])
    # I + sin K + (1 - cos) K K, (..., 3, 3, 3) for the three axes; I is `axes` once more
    pitch, yaw, roll = (axes + angle.sin() * K + (1 - angle.cos()) * K @ K).unbind(-3)
    return pitch @ yaw @ roll


def keypoints(x_c, motion):
    """Eq. 3: x = s (x_c R + delta) + t, with t_z = 0 as in LivePortrait.

    x_c (B, 21, 3) or (B, 63), motion (B, 70) -> (B, 21, 3)."""
    R = rotation(motion[:, ROT])
    delta = motion[:, EXP].reshape(-1, 21, 3)
    t = motion[:, TRANS] * motion.new_tensor([1, 1, 0])
    x = x_c.reshape(-1, 21, 3) @ R + delta
    return motion[:, SCALE, None] * x + t[:, None]


def relative(motion, portrait, neutral):
    """What motion (T, 70) adds to its `neutral` (70,), added to the portrait's own (70,)."""
    # as LivePortrait: the turn away from neutral, then the portrait's own
    R = rotation(motion[:, ROT]) @ rotation(neutral[ROT]).mT @ rotation(portrait[ROT])
    moved = portrait + motion - neutral
    moved[:, SCALE] = portrait[SCALE] * motion[:, SCALE] / neutral[SCALE]
    moved[:, ROT] = angles(R)
    return moved


def angles(R):
    """The inverse of `rotation`: (T, 3, 3) -> pitch, yaw, roll in degrees, (T, 3)."""
    # x, y, z are the rows of R, (3, T) each. With a, b, c for pitch, yaw, roll, the row x is
    # cos b cos c, cos b sin c, -sin b, and the last column -sin b, sin a cos b, cos a cos b.
    x, y, z = R.movedim(0, -1)
    pitch = y[2].atan2(z[2])
    yaw = -x[2].clamp(-1, 1).asin()
    roll = x[1].atan2(x[0])
    return torch.stack([pitch, yaw, roll], 1).rad2deg()


def checked(motion):
    """motion as float32 (T, 70); ValueError if it is anything else."""
    motion = torch.as_tensor(motion).float().contiguous()
    if motion.shape[1:] != (M,) or not len(motion) or not motion.isfinite().all():
        raise ValueError(f"motion of shape {tuple(motion.shape)}: "
                         f"should be finite numbers of shape (frames, {M})")
    return motion


# ------------------------------------------------------------------------- LivePortrait's templates
# A motion template (.pkl) is a pickle of dicts and numpy arrays. A pickle can run any code, so only
# the three names that an array needs are allowed. "_reconstruct" makes an empty array, which the
# pickle then fills; "ndarray" is only handed to it. "dtype" accepts the names of numpy's floats
# only, as finfo raises for others: an object dtype would make numpy follow bytes as pointers.
ARRAY_PARTS = {
    "_reconstruct": lambda *unused: np.empty(0),
    "ndarray": None,
    "dtype": lambda name, *unused: np.finfo(name).dtype}


class TemplateReader(pickle.Unpickler):
    def find_class(self, module, name):
        if name not in ARRAY_PARTS:
            raise ValueError(f"it holds {module}.{name}, which is no array")
        return ARRAY_PARTS[name]


def read_template(path):
    """A motion template of LivePortrait -> (T, 70), brought to 25 fps."""
    with open(path, "rb") as file:
        template = TemplateReader(file).load()
    motion = []
    for frame in template["motion"]:
        R = torch.tensor(frame.get("R", frame.get("R_d")))             # some call it R_d
        parts = frame["exp"], frame["scale"], frame["t"], angles(R.view(1, 3, 3))
        motion.append(np.concatenate(parts, axis=None))
    times = np.arange(0, len(motion), max(1, template["output_fps"]) / 25)         # 0 would not end
    # each of the 70 columns, linearly between its frames
    at_times = partial(np.interp, times, range(len(motion)))
    return checked(np.apply_along_axis(at_times, 0, motion))


def read_motion(path, frames):
    """(T, 70) of a motion template, (frames, 70) of a .npy file; ValueError if it holds no such."""
    with explained(f"{path}: no motion could be read; write it by --save_motion"):
        if path.endswith(".pkl"):
            return read_template(path)
        # unlike a template, which may be shorter, a .npy file replaces all of the model's motion
        motion = checked(np.load(path, allow_pickle=False))
        if len(motion) != frames:
            raise ValueError(f"its {len(motion)} frames are not the {frames} of the voice")
        return motion


def write_template(motion, path):
    """(T, 70) at 25 fps -> a motion template, for LivePortrait's inference.py -d."""
    frames = []
    for m, R in zip(motion.numpy(), rotation(motion[:, ROT]).numpy()):
        frames.append(dict(
            exp=m[EXP].reshape(1, 21, 3),
            scale=m[None, SCALE],
            t=m[None, TRANS],
            R=R[None]))
    # How open the eyes are, height over width, roughly 25 (0.013 - y). 34 and 46 are y of points 11
    # and 15, the upper lids; at 0.013 they are shut.
    eyes = 25 * (0.013 - motion[:, None, [34, 46]]).clip(0)
    # how open the mouth is, also height over width, roughly: 5 times the difference of the lower
    # lip, point 19, and the upper lip (52 is y of point 17)
    lips = 5 * motion[:, None, [52, MOUTH]].diff().clip(0)
    template = dict(
        n_frames=len(motion),
        output_fps=25,
        motion=frames,
        c_eyes_lst=[*eyes.numpy()],
        c_lip_lst=[*lips.numpy()])
    Path(path).write_bytes(pickle.dumps(template))


# --------------------------------------------------------------------------------- building blocks
# All networks are plain here, as they were trained (fold_for_inference changes them later), and
# their parameters have the names that they have in the public files.

class Chain(nn.Sequential):
    """Named layers, one after the other."""

    def __init__(self, **layers):
        super().__init__(OrderedDict(layers))


class Residual(Chain):
    def forward(self, x):
        return x + super().forward(x)


conv3x3 = partial(nn.Conv2d, kernel_size=3, padding=1)
conv3x3x3 = partial(nn.Conv3d, kernel_size=3, padding=1)
layer_norm = partial(nn.LayerNorm, eps=1e-6)


def block(conv, norm, n_in, n, relu=nn.ReLU, **before):
    """Convolution, norm and ReLU, in that order, behind what named layers `before` there are."""
    return Chain(
        **before,
        conv=conv(n_in, n),
        norm=norm(n),
        relu=relu())


block2d = partial(block, conv3x3, nn.BatchNorm2d)
block3d = partial(block, conv3x3x3, nn.BatchNorm3d)


# ------------------------------------------------------------------------------- F: the appearance
class AppearanceExtractor(Chain):
    """F: image (B, 3, 256, 256) -> feature volume f_s (B, 32, 16, 64, 64)."""

    def __init__(self):
        residuals = {f"3dr{i}": residual3d(32) for i in range(6)}
        super().__init__(
            first=block2d(3, 64),                                      # (B, 64, 256, 256)
            down_blocks=nn.Sequential(
                block2d(64, 128),
                # The public blocks end in a pool. `block` takes more layers only in front, as
                # DenseMotion's decoder needs them: each pool stands in front of what comes next.
                block2d(128, 256, pool=nn.AvgPool2d(2))),
            pool=nn.AvgPool2d(2),                                      # (B, 256, 64, 64)
            second=nn.Conv2d(256, 512, 1),
            volume=nn.Unflatten(1, (32, 16)),                          # channel 16 c + depth
            resblocks_3d=Chain(**residuals))


def residual3d(n):
    return Residual(
        norm1=nn.BatchNorm3d(n),
        relu1=nn.ReLU(),
        conv1=conv3x3x3(n, n),
        norm2=nn.BatchNorm3d(n),
        relu2=nn.ReLU(),
        conv2=conv3x3x3(n, n))


# ----------------------------------------------------------------------------------- M: the motion
HEADS = dict(kp=63, exp=63, scale=1, t=3, pitch=66, yaw=66, roll=66)


class MotionExtractor(nn.Module):
    """M, a ConvNeXt V2 (arXiv 2301.00808) with seven heads, channels last.

    image (B, 3, 256, 256) -> {head: (B, size)}, see `to_motion`."""

    def __init__(self):
        super().__init__()
        stem = ChannelsLastConv2d(3, 96, 4, stride=4)
        self.downsample_layers = nn.ModuleList([nn.Sequential(stem, layer_norm(96))])
        for n in 96, 192, 384:
            halve = ChannelsLastConv2d(n, 2 * n, 2, stride=2)
            self.downsample_layers.append(nn.Sequential(layer_norm(n), halve))
        self.stages = nn.ModuleList()
        for n, depth in (96, 3), (192, 3), (384, 9), (768, 3):
            blocks = [convnext_block(n) for _ in range(depth)]
            self.stages.append(nn.Sequential(*blocks))
        self.norm = layer_norm(768)
        for head, size in HEADS.items():
            self.add_module(f"fc_{head}", nn.Linear(768, size))

    def forward(self, image):
        x = image.movedim(1, -1)
        for downsample, stage in zip(self.downsample_layers, self.stages):
            x = stage(downsample(x))                                   # (B, 8, 8, 768) at last
        x = self.norm(x.mean((1, 2)))
        return {head: self.get_submodule(f"fc_{head}")(x) for head in HEADS}


class ChannelsLastConv2d(nn.Conv2d):
    """Channels last: (B, H, W, n)."""

    def forward(self, x):
        return super().forward(x.movedim(-1, 1)).movedim(1, -1)


def convnext_block(n):
    """(B, H, W, n) -> the same."""
    return Residual(
        dwconv=ChannelsLastConv2d(n, n, 7, padding=3, groups=n),
        norm=layer_norm(n),
        pwconv1=nn.Linear(n, 4 * n),
        gelu=nn.GELU(),
        grn=GlobalResponseNorm(4 * n),
        pwconv2=nn.Linear(4 * n, n))


class GlobalResponseNorm(nn.Module):
    """Channels compete by their size over the image: (B, H, W, n) -> the same."""

    def __init__(self, n):
        super().__init__()
        zeros = torch.zeros(1, 1, 1, n)
        self.gamma = nn.Parameter(zeros)
        self.beta = nn.Parameter(zeros.clone())

    def forward(self, x):
        size = x.norm(dim=(1, 2), keepdim=True)                        # (B, 1, 1, n)
        ratio = size / (size.mean(-1, keepdim=True) + 1e-6)
        return x + self.gamma * (x * ratio) + self.beta


def to_motion(heads):
    """What M puts out -> motion (B, 70); an angle is the expected value over 66 bins, 3 degrees
    apart."""
    bins = torch.linspace(-97.5, 97.5, 66, device=heads["t"].device)
    turns = torch.stack([heads["pitch"], heads["yaw"], heads["roll"]], 1).softmax(-1) @ bins
    return torch.cat([heads["exp"], heads["scale"], heads["t"], turns], 1)


# ---------------------------------------------------------------------------------- W: the warping
class WarpingNetwork(nn.Module):
    """W: f_s (B, 32, 16, 64, 64), keypoints (B, 21, 3) -> warped feature (B, 256, 64, 64)."""

    def __init__(self):
        super().__init__()
        self.dense_motion_network = DenseMotion()
        self.third = block2d(512, 256, nn.LeakyReLU)
        self.fourth = nn.Conv2d(256, 256, 1)

    def forward(self, f, x_s, x_d):
        deformation, occlusion = self.dense_motion_network(f, x_s, x_d)
        x = F.grid_sample(f, deformation, align_corners=False)         # (B, 32, 16, 64, 64)
        x = self.third(x.flatten(1, 2).to(occlusion))
        return self.fourth(x) * occlusion


class DenseMotion(nn.Module):
    """Where every voxel comes from (B, 16, 64, 64, 3), and how much of it shows (B, 1, 64, 64)."""

    def __init__(self):
        super().__init__()
        self.compress = nn.Conv3d(32, 4, 1)
        self.norm = nn.BatchNorm3d(4)
        # 22 = 21 points and the background; 110 = 22 x (1 + 4); 142 = 32 of the last block up, and
        # the 110 that went in, by a skip connection; 2272 = 142 x 16
        sizes = pairwise([110, 64, 128, 256, 512, 1024])
        down = DownBlocks(block3d(n_in, n) for n_in, n in sizes)
        # an up block of n outputs gets 2 n from the block before and 2 n by a skip connection, 4 n;
        # only the first, n = 512, has no skip connection and gets 2 n
        sizes = (512, 256, 128, 64, 32)
        up = UpBlocks(block3d(min(4 * n, 1024), n) for n in sizes)
        self.hourglass = Chain(
            encoder=Chain(down_blocks=down),
            decoder=block3d(142, 142, up_blocks=up))                   # up, then conv, norm, relu
        self.mask = nn.Conv3d(142, 22, 7, padding=3)
        self.occlusion = nn.Conv2d(2272, 1, 7, padding=3)

    def forward(self, f, x_s, x_d):
        """f (B, 32, 16, 64, 64), keypoints x_s of the source and x_d, driving, (B, 21, 3)."""
        # a first point of 0 stands for the background, which does not move
        points = F.pad(torch.stack([x_s, x_d]), (0, 0, 1, 0))          # (2, B, 22, 3)
        shift = points[0] - points[1]                                  # (B, 22, 3)
        still = torch.eye(3, 4, device=f.device)[None]
        grid = F.affine_grid(still, f[:1].shape, align_corners=True)   # (1, 16, 64, 64, 3)
        distance = torch.cdist(points, grid.flatten(1, 3))             # (2, B, 22, 16 * 64 * 64)
        heat = torch.exp(-50 * distance ** 2).diff(dim=0)              # at x_d, less those at x_s
        heat = heat.view(-1, 22, 1, 16, 64, 64)
        # convolutions compute in the type of the weights, sampling and softmax in float32
        c = F.relu(self.norm(self.compress(f.to(self.mask.weight))))
        # the grid is made with align_corners and read without: so the weights were trained
        moved = grid[:, None] + shift[:, :, None, None, None]          # (B, 22, 16, 64, 64, 3)
        # all 22 volumes in one call, one behind the other
        moved = F.grid_sample(c.float(), moved.flatten(1, 2), align_corners=False)
        moved = moved.unflatten(2, (22, 16)).transpose(1, 2)           # (B, 22, 4, 16, 64, 64)
        x = torch.cat([heat, moved], 2)                                # with heat: 22 x 5 = 110
        x = self.hourglass(x.flatten(1, 2).to(c))                      # (B, 142, 16, 64, 64)
        m = self.mask(x).float().softmax(1)                            # (B, 22, 16, 64, 64)
        # the sum over n of m_n (grid + shift_n), where the m_n add up to 1
        deformation = grid + torch.einsum("bndhw, bnc -> bdhwc", m, shift)
        return deformation, self.occlusion(x.flatten(1, 2)).sigmoid()


class DownBlocks(nn.ModuleList):
    """x (B, 110, 16, 64, 64) -> x and what every block puts out, the last (B, 1024, 16, 2, 2)."""

    def forward(self, x):
        outputs = [x]
        for block in self:
            # height and width only; avg_pool3d lacks bfloat16
            x = F.avg_pool2d(block(x).flatten(1, 2), 2)
            x = x.unflatten(1, (-1, 16))
            outputs.append(x)
        return outputs


class UpBlocks(nn.ModuleList):
    """The outputs of DownBlocks -> (B, 142, 16, 64, 64)."""

    def forward(self, outputs):
        x = outputs.pop()
        for block in self:
            x = F.interpolate(x, scale_factor=(1, 2, 2))
            x = torch.cat([block(x), outputs.pop()], 1)
        return x


# -------------------------------------------------------------------------------- G: the generator
class SpadeGenerator(Chain):
    """G: warped feature h (B, 256, 64, 64) -> image (B, 3, 512, 512)."""

    def __init__(self):
        middle = {f"G_middle_{i}": SpadeBlock(512, 512) for i in range(6)}
        super().__init__(
            fc=conv3x3(256, 512),                                      # (B, 512, 64, 64)
            **middle,
            up_0=SpadeBlock(512, 256, up=2),                           # (B, 256, 128, 128)
            up_1=SpadeBlock(256, 64, up=4),                            # (B, 64, 256, 256)
            conv_img=nn.Sequential(conv3x3(64, 12), nn.PixelShuffle(2)))

    def forward(self, h):
        fc, *blocks, conv_img = self
        x = fc(h)
        for block in blocks:
            x = block(x, h)
        return conv_img(F.leaky_relu(x, 0.2)).sigmoid()


class SpadeBlock(nn.Module):
    """x + two convolutions, each after a Spade and a leaky ReLU: (B, n_in, H, W) -> the same. Where
    n_out is another number, x is first made twice as large, and conv_s, a convolution in the
    shortcut, brings it to n_out channels: (B, n_out, 2 H, 2 W).

    up: how many times larger than h the result is."""

    def __init__(self, n_in, n_out, up=1):
        super().__init__()
        n = min(n_in, n_out)
        self.norm_0 = Spade(n_in, up)
        self.conv_0 = spectral_norm(conv3x3(n_in, n))
        self.norm_1 = Spade(n, up)
        self.conv_1 = spectral_norm(conv3x3(n, n_out))
        if n_in != n_out:
            self.norm_s = Spade(n_in, up)
            self.conv_s = spectral_norm(nn.Conv2d(n_in, n_out, 1, bias=False))

    def forward(self, x, h):
        shortcut = x
        if hasattr(self, "conv_s"):
            x = F.interpolate(x, scale_factor=2.0)
            shortcut = self.conv_s(self.norm_s(x, h))
        x = self.conv_0(F.leaky_relu_(self.norm_0(x, h), 0.2))
        x = self.conv_1(F.leaky_relu_(self.norm_1(x, h), 0.2))
        return x.add_(shortcut)


class Spade(nn.Module):
    """SPADE (arXiv 1903.07291): norm(x) (1 + gamma) + beta, both from the warped feature h.

    x (B, n, H, W), h (B, 256, H / up, W / up) -> (B, n, H, W)."""

    def __init__(self, n, up):
        super().__init__()
        layers = {"up": nn.Upsample(scale_factor=up), "0": conv3x3(256, 128)}
        self.mlp_shared = Chain(**layers)
        self.mlp_gamma = conv3x3(128, n)
        self.mlp_beta = conv3x3(128, n)

    def forward(self, x, h):
        a = F.relu_(self.mlp_shared(h))                                # (B, 128, H, W)
        scale = self.mlp_gamma(a).add_(1)                              # in place to save memory
        return self.mlp_beta(a).addcmul_(F.instance_norm(x), scale)


# -------------------------------------------------------------------------------- S: the stitching
class StitchingNetwork(nn.Module):
    """S: x_d corrected so that the crop meets the picture without a seam; all (B, 21, 3)."""

    def __init__(self):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(126, 128), nn.ReLU(),
            nn.Linear(128, 128), nn.ReLU(),
            nn.Linear(128, 64), nn.ReLU(),
            nn.Linear(64, 65))

    def forward(self, x_s, x_d):
        x = torch.cat([x_s, x_d], 1).flatten(1)
        offsets, shift = self.mlp(x).split([63, 2], 1)
        shift = F.pad(shift, (0, 1))                                   # of all points, in x and y
        return x_d + offsets.view_as(x_d) + shift[:, None]


# -------------------------------------------------------------------------------- faster inference
# The same numbers, up to rounding, with less work: layers are replaced, forward stays as it is.
# tests/test_liveportrait.py compares both. To train a network, take it plain, from `load`.

def fold_for_inference(net, device):
    """Fold into the convolutions beside them: spectral norm, the BatchNorm of block2d and block3d,
    and Spade's upsampling of h. Then move to the device."""
    for module in [*net.modules()]:
        if hasattr(module, "weight_orig"):
            remove_spectral_norm(module)
        if hasattr(module, "conv"):                # of block2d and block3d
            module.conv = fuse_conv_bn_eval(module.conv, module.norm)
            module.norm = nn.Identity()
        if hasattr(module, "mlp_shared"):          # of Spade
            module.mlp_shared = transposed(*module.mlp_shared)
    return net.to(device).requires_grad_(False)


def transposed(upsample, conv):
    """Nearest upsampling of height and width, and the convolution after it, as one transposed
    convolution, which needs less than half of the products."""
    up = int(upsample.scale_factor)
    if up == 1:
        return conv
    # A convolution, seen from its input: each pixel adds its value, times the flipped kernel k
    # (3 x 3), to the outputs around it. Upsampled, the pixel becomes up x up equal ones, each with
    # its copy of k, shifted by 0 .. up - 1 pixels down and right. All copies add up to one large
    # kernel, up + 2 high and wide. For up = 2, in rows:
    #     ones   1 0 0    the large kernel's first row is k's first,
    #            1 1 0    its second one k's first and second,
    #            0 1 1    and so on; `ones.T` does the same with columns.
    #            0 0 1
    # With padding=1 the output has (H - 1) up - 2 + (up + 2) = H up rows.
    ones = torch.ones(up + 2, 3).tril().triu(1 - up)
    weight = ones @ conv.weight.flip(2, 3).transpose(0, 1) @ ones.T
    folded = nn.ConvTranspose2d(256, 128, up + 2, up, padding=1)
    folded.weight = nn.Parameter(weight)
    folded.bias = conv.bias
    return folded


def keep_memory():
    """Let glibc keep freed memory (M_MMAP_MAX, M_TRIM_THRESHOLD): to return it and fetch it again
    is 5 % of the time in which a CPU renders a frame, and 33 % of that of the motion extractor M.
    Other systems have no mallopt."""
    if hasattr(ctypes.pythonapi, "mallopt"):       # pythonapi has what the process has, and so libc
        ctypes.pythonapi.mallopt(-4, 0)
        ctypes.pythonapi.mallopt(-1, 2**31 - 1)


# ------------------------------------------------------------------------------------ LivePortrait
def load(network, path):
    """One of the five classes and its public file -> the network, plain, in evaluation mode.

    ValueError names the file and its first tensor that is absent, too many, of another shape or not
    finite."""
    state = read_checkpoint(path, GET)
    # the file of S holds three networks; S is the one that is called retarget_shoulder
    state = state.get("retarget_shoulder", state)
    consume_prefix_in_state_dict_if_present(state, "module.")
    consume_prefix_in_state_dict_if_present(state, "detector.")
    net = network()
    with explained(f"{path}: not LivePortrait's; {GET}"):
        # load_strictly copies into the network's own tensors, which state_dict holds
        load_strictly(net.state_dict(), state)
    return net.eval()


class LivePortrait:
    """The five networks with the public weights. weights_dir, or its folder liveportrait, holds
    base_models. W and G compute in `dtype`, else in float32; `compiled`: through torch.compile.
    ValueError says which file does not fit."""

    def __init__(self, weights_dir, device="cpu", dtype=None, compiled=False):
        self.device = torch.device(device)
        if compiled:
            self.render = torch.compile(self.render, dynamic=False)
        self.batch = 8 if self.device.type == "cuda" else 1            # a CPU gains little
        keep_memory()
        root = Path(weights_dir)
        if (root / "liveportrait").is_dir():
            root /= "liveportrait"

        def folded(network, file):
            return fold_for_inference(load(network, root / file), self.device)
        self.F = folded(AppearanceExtractor, "base_models/appearance_feature_extractor.pth")
        self.M = folded(MotionExtractor, "base_models/motion_extractor.pth")
        self.W = folded(WarpingNetwork, "base_models/warping_module.pth").to(dtype=dtype)
        self.G = folded(SpadeGenerator, "base_models/spade_generator.pth").to(dtype=dtype)
        self.S = folded(StitchingNetwork, "retargeting_models/stitching_retargeting_module.pth")

    def source(self, image):
        """A portrait, uint8 crop (H, W, 3) -> its Source, with f_s on the device."""
        x = torch.tensor(image, device=self.device).movedim(2, 0)[None]
        x = F.adaptive_avg_pool2d(x / 255, 256)                        # of 512: means of 2 x 2
        heads = self.M(x)
        return Source(self.F(x), heads["kp"].cpu(), to_motion(heads).cpu())

    def render(self, f_s, x_s, x_d):
        """f_s (B, 32, 16, 64, 64), keypoints (B, 21, 3) -> uint8 (B, 512, 512, 3)."""
        image = self.G(self.W(f_s, x_s, self.S(x_s, x_d)))
        # bytes are truncated, as in LivePortrait
        return (image.float() * 255).byte().movedim(1, -1).contiguous()

    def frames(self, source, motion):
        """(T, 70) in LivePortrait units -> iterator of uint8 (512, 512, 3); `batch` of them are
        rendered at once, one batch ahead."""
        x_s = keypoints(source.x_c, source.motion).to(self.device)
        x_d = keypoints(source.x_c, checked(motion)).to(self.device)
        ready = []
        for part in x_d.split(self.batch):
            # repeated to a whole batch, for torch.compile wants one size
            full = part.repeat(self.batch, 1, 1)[:self.batch]
            # one for each frame: a small copy beside the rest of the work
            f_s = source.f_s.repeat_interleave(self.batch, 0)
            frames = self.render(f_s, x_s.expand_as(full), full)
            yield from ready                       # while a GPU renders the next ones
            ready = frames[:len(part)].cpu().numpy()
        yield from ready


# ---------------------------------------------------------------------------------------- pictures
Image.MAX_IMAGE_PIXELS = 125_000_000               # Pillow refuses pictures of over twice as many


def read_image(path, crop=""):
    """Any picture that Pillow reads, upright and on white -> RGB. With a crop, which is in pixels
    of the file, it keeps its size; without one, sides over 2048 are reduced to that.

    ValueError: it is no picture, has more than 250 megapixels, or floats of grey."""
    with explained(f"{path}: no picture could be read; take another"):
        image = Image.open(path)
        if not crop:
            image.thumbnail((2048, 2048))
        image = ImageOps.exif_transpose(image)
        if image.mode == "F":
            raise ValueError("it has floats of grey, of which nobody says what is white")
        if image.mode[0] == "I":                                       # 16 bits of grey
            image = image.convert("F").point(lambda v: v / 257).convert("L")
        image = image.convert("RGBA")
    opaque = Image.new("RGB", image.size, "white")
    opaque.paste(image, mask=image)
    return opaque


def crop_box(image, crop=""):
    """The square to animate, "x,y,size" in pixels or the largest in the centre -> x, y, size."""
    width, height = image.size
    size = min(width, height)
    crop = crop or f"{(width - size) // 2},{(height - size) // 2},{size}"
    try:
        x, y, size = map(int, crop.split(","))
        inside = 0 <= x <= width - size and 0 <= y <= height - size
    except ValueError:
        inside = False
    if not inside or size < 16:
        raise ValueError(f"crop {crop}: should be x,y,size, 16 or more, inside {width} x {height}")
    return x, y, size


def paste_back(frames, image, box):
    """Frames blended into the whole picture, which is shrunk to 1280 pixels and to even sides, as
    videos need."""
    zoom = min(1, 1280 / max(image.size))
    x, y, size = [int(v * zoom) for v in box]
    picture = image.resize([int(v * zoom) // 2 * 2 for v in image.size])
    alpha = np.full((SIZE - 32, SIZE - 32), 255, np.uint8)
    alpha = np.pad(alpha, 16, "linear_ramp")                           # the edge fades
    for frame in frames:
        whole = picture.copy()
        square = Image.fromarray(np.dstack([frame, alpha])).resize((size, size))
        whole.paste(square, (x, y), square)
        yield np.asarray(whole)


# ---------------------------------------------------------------------------------- the drawn face
# LivePortrait's 21 points on a face: how far right, down and in, in percent of half the picture;
# and which point is the mirror image
POINTS = np.loadtxt("""
      0   -40     0    0    # 0 forehead
    -14   -16    -8    2    # 1 brow
     14   -16    -8    1    # 2 brow
    -20     8    -5    7    # 3 cheek
    -29    -6    10   10    # 4 ear
      0    75    20    5    # 5 chest
      0    15   -16    6    # 6 between nose and mouth
     20     8    -5    3    # 7 cheek
      0    -8   -13    8    # 8 bridge of the nose
      0     4   -20    9    # 9 tip of the nose
     29    -6    10    4    # 10 ear
    -12.5  -7.5  -9   15    # 11 upper lid
      0    40    -8   12    # 12 chin
    -12.5  -3.5  -9   16    # 13 eye
    -10.5  20.5 -11   20    # 14 corner of the mouth
     12.5  -7.5  -9   11    # 15 upper lid
     12.5  -3.5  -9   13    # 16 eye
      0    18.5 -15   17    # 17 upper lip
      0    -9   -10   18    # 18 between the eyes
      0    22.5 -14   19    # 19 lower lip
     10.5  20.5 -11   14    # 20 corner of the mouth
    """.splitlines())
FACE = POINTS[:, :3] / 100
MIRROR = np.array([[1, 1, 1], [-1, 1, 1]])         # of right, down, in: mirrored, right is left

# What the drawing makes of the 63 offsets; nothing else depends on it. PLACES, below, has rows of a
# name and terms; a term is a name and up to three numbers, for right, down and in. There are two
# kinds of rows. A signal, in capitals, is a number from 0 to 1:
#     UP      D14,0,-38,70 D20,0,-9,70    D14, the offset of point 14 (right, down, in; LivePortrait
#                                         units), times 0, -38, 70, and that of point 20 times 0,
#                                         -9, 70; the six products are added up and cut to 0 .. 1
#     ALONE   DOWN,0,1 DOWN_TOO,0,-1      of other signals, 1 DOWN - 1 DOWN_TOO, cut likewise. The
#                                         factor stands second, because mirroring for the right
#                                         half flips the sign of the first
# A place is where something is drawn, in percent of half the picture:
#     corner  14 UP,-3.4,-5.3 SULK,.6,6   point 14, shifted by UP times 3.4 to the left and 5.3 up,
#                                         and by SULK times .6 to the right and 6 down
#     line    forehead RAISE,0,1.9        another place, shifted by RAISE times 1.9 down
# So what has its name in capitals is multiplied by the three numbers, a place or a point is shifted
# by them (`weighted`); a row is the sum of its terms (`find_places`).
# All is said of the picture's left half; the right half is mirrored, with its own points.


def weighted(term, known):
    """"name,right,down,in" -> a place shifted so far, or a signal or offset times these numbers:
    (2, 3), of the left half and mirrored."""
    name, *way = f"{term},0,0,0".split(",")[:4]                        # numbers left out are 0
    way = MIRROR * np.array(way, float)
    return known[name] * way if name.isupper() else known[name] + way


def find_places(x):
    """x (2, 21, 3), which is changed: keypoints in percent, and their offsets in LivePortrait units
    -> all that PLACES names: places (2, 3) in percent, signals (2, 1)."""
    # LivePortrait's offsets of 2 and 20 are no mirror images of those of 1 and 14: where 1 goes
    # down 2 goes up, and 20 moves half as far. Here they are made to be.
    x[1, [2, 20], 1] *= -1, 2
    known = {}
    for k, twin in enumerate(POINTS[:, 3].astype(int)):
        # place and offset, of the point and its mirror image: (2, 3) each
        known[f"{k}"], known[f"D{k}"] = x[:, [k, twin]]
    for row in PLACES.splitlines():
        name, *terms = row.split()
        total = sum(weighted(term, known) for term in terms)
        if name.isupper():
            total = total.sum(1, keepdims=True).clip(0, 1)
        known[name] = total
    return known


# What the signals mean, of this half of the face:
#     RAISE, MILD       the brow goes up. Oddly, in LivePortrait that moves point 1 down and 2 up
#                       (find_places turns the sign). Raising either brow moves both points; their
#                       weights were tried out. MILD rises faster and is 1 when RAISE is .45: the
#                       row `line`, the forehead's, has a thickness of 1.9 RAISE - .8 MILD, until
#                       then 0
#     KNIT, SCOWL       the brows come together, and down as well
#     INWARD, OUTWARD   gaze: in LivePortrait the upper lid's point moves sideways with it
#     DROOP, WIDE       the upper lid falls, rises; SAG, TENSE: so does the lower lid
#     UP                the corner of the mouth goes up, in a smile. A mouth that widens (eee of
#                       MOVES in data.py) lifts both corners too, which should not count. But eee
#                       alone moves point 20 nearer, so that its third offset is negative: times 70
#                       it cancels the rest. Point 20 is D20 in this half and D14 in the other
#     DOWN, DOWN_TOO    this half's corner goes down, the other half's does. Here eee, which lifts
#                       them, should not hide it: so third offsets count -80 times
#     SULK              both do, by the lesser one: min(a, b) = a - max(a - b, 0), where ALONE is
#                       the max. A rounded mouth (woo) lowers point 14 alone
#     SPREAD, POUT      lips drawn back, pushed forward: the upper lip's depth, against that of the
#                       corners, which eee moves as well
#     OPEN, PRESS       the lower lip goes down, up
#     ROUND             pushed forward and open, by the lesser one, as SULK is; CLOSED is what POUT
#                       has more. Then lips are all around the mouth, in place of corners
#     SNEER             the upper lip goes up, less what it does when the mouth opens
PLACES = """\
    RAISE     D1,0,45 D2,0,18
    MILD      D1,0,100 D2,0,40
    KNIT      D1,70 D2,-30
    SCOWL     D1,50,-50 D2,-22,-22
    INWARD    D11,40 D15,30
    OUTWARD   D11,-40 D15,-30
    DROOP     D11,0,100
    WIDE      D11,0,-170
    SAG       D13,0,170
    TENSE     D13,0,-150
    UP        D14,0,-38,70 D20,0,-9,70
    DOWN      D14,0,80,-80 D20,0,0,-80
    DOWN_TOO  D20,0,80,-80 D14,0,0,-80
    ALONE     DOWN,0,1 DOWN_TOO,0,-1
    SULK      DOWN,0,1 ALONE,0,-1
    SPREAD    D17,0,0,150 D14,0,0,-50 D20,0,0,-50
    POUT      D17,0,0,-125 D14,0,0,42 D20,0,0,42
    OPEN      D19,0,12
    CLOSED    POUT,0,1 OPEN,0,-1
    ROUND     POUT,0,1 CLOSED,0,-1
    PRESS     D19,0,-50
    SNEER     D17,0,-125 D19,0,-12
    brow_in   1,9,.5       RAISE,0,-7 KNIT,3,-3 SCOWL,.3,8.1
    brow_mid  1,0,-2.5     RAISE,0,-8.5 KNIT,1,2
    brow_out  1,-10,2      RAISE,0,-6 KNIT,0,7.5 SCOWL,0,-11
    lid_out   13,-8.5,.8   KNIT,0,1.2 SCOWL,0,-1.7
    lid_in    13,7.5,2
    lid_a     13,-5,-5.4   DROOP,0,9.7 WIDE,0,-2.4 RAISE,0,-1.5 UP,0,1.2 KNIT,0,3 SCOWL,0,-4.5
    lid_b     13,3.5,-5.4  DROOP,0,9.3 WIDE,0,-2.4 RAISE,0,-1.5 UP,0,1.2 KNIT,0,-2 SCOWL,0,5.3
    crease_a  13,-5,-8.2   DROOP,0,3 WIDE,0,-2.7 RAISE,0,-1.6 KNIT,0,2 SCOWL,0,-1.4
    crease_b  13,4,-7.8    DROOP,0,3 WIDE,0,-2.7 RAISE,0,-1.6 KNIT,0,-2 SCOWL,0,4.2
    low_a     13,-5,4.3    SAG,0,1.4 TENSE,0,-2.3 UP,0,-2.4 SNEER,0,-2 SCOWL,0,-.7
    low_b     13,3.5,4.3   SAG,0,1.4 TENSE,0,-2.3 UP,0,-2.4 SNEER,0,-2 SCOWL,0,-.7
    iris      13,-.3,-.6   INWARD,3 OUTWARD,-3 DROOP,0,2
    wing      9,-5,4.5     SNEER,-1,-2 UP,-.7,-.5
    fold      14,-3,-6     UP,-2.9,-2.9 SNEER,-.8,-2
    fold_in   fold         UP,1.9,.7 SNEER,2.4,1.2
    forehead  0,0,9        RAISE,0,-1.6
    line      forehead     RAISE,0,1.9 MILD,0,-.8
    glabella  1,11.6,1     SCOWL,-2.6
    wrinkle   9,-4,-6      SNEER,.4,2.8
    corner    14           UP,-3.4,-5.3 SULK,.6,6 SPREAD,-3.4 POUT,6 OPEN,1.6,2.4
    top       17           SNEER,0,-2.8 PRESS,0,1 POUT,0,-1.2
    side      corner,-.6   POUT,-1.6 ROUND,-1.2
    side_up   side         ROUND,0.5,-3
    side_low  side         ROUND,0,3
    inner_up  corner       ROUND,-1.2,-2
    inner_low corner       ROUND,-1.2,3.6
    wide_up   inner_up     ROUND,-1.2
    wide_low  inner_low    ROUND,-1.2
    top_a     17,-5.5      SNEER,0,-2.8 PRESS,0,1 UP,-1.4,-1.4 SULK,0,1.8 SPREAD,-1.6 POUT,3,-.6
    bottom    19           OPEN,0,9.6 PRESS,0,-2 POUT,0,.6
    bottom_a  bottom,-6    UP,-1.4,-1 SULK,0,1.2 SPREAD,-1.6 POUT,2.4
    tongue    bottom,-4    POUT,1
    teeth     17,-6.5,2    OPEN,0,3.2 UP,-1.4,-1 SPREAD,-1.6 POUT,4,-4
    bite      17,0,2.4     OPEN,0,3.2 POUT,0,-4
    molar     corner,2     POUT,-.3,-3.5 ROUND,-1,-1.5 SULK,-.6,-4.5
    chin      12           OPEN,0,6
    cheek     3,-1,1       UP,0,-3.6
    apple_a   cheek,-6,-5  UP,-2.4,-1.2
    apple_b   cheek,5,-4   UP,2.4,-1.2"""

# Parts from back to front, and the mirror image of each: name; colour (digits 7 and 8: how dense);
# number of copies (ever smaller: a soft edge); places that a closed curve passes near (the same one
# twice is a sharp corner)
PARTS = """\
    ear         #e3a88a    1 4,-5,-9 4,2,-6 4,5,16 4,-1,17
    ear_inside  #c98a70    1 4,-2.5,-5 4,2 4,3,12 4,-.5,10
    neck_shade  #c98a70    1 chin,0,-8 chin,0,-8 chin,-13,-8 chin,-11,1 chin,-5,6 chin,0,6 \
                              chin,0,6
    face        #f3c9ae    1 0,0,-1 0,0,-1 0,-14,-1 4,2,-28 4,1,-12 4,0,8 3,-4,18 3,1,26 \
                              chin,-8,1 chin,-3,2.5 chin,0,2.5 chin,0,2.5
    eye         #fcfaf6    1 lid_out lid_out lid_a lid_b lid_in lid_in low_b low_a
    iris_edge   #24505e    1 iris,-4.8,-4.8 iris,4.8,-4.8 iris,4.8,4.8 iris,-4.8,4.8
    iris        #4a8ea0    1 iris,-4,-4 iris,4,-4 iris,4,4 iris,-4,4
    iris_light  #8cc8d060  4 iris,-3,1 iris,3,1 iris,2.5,4 iris,-2.5,4
    pupil       #14141a    1 iris,-2.2,-2.2 iris,2.2,-2.2 iris,2.2,2.2 iris,-2.2,2.2
    glint       #ffffff    1 iris,.2,-3 iris,2.4,-3 iris,2.4,-.8 iris,.2,-.8
    lid_shadow  #40182030  1 lid_out lid_out lid_a lid_b lid_in lid_in lid_b,0,2 lid_a,0,2
    lid         #f3c9ae    1 lid_out,-1 lid_out lid_a lid_b lid_in lid_in,1 13,8,-15 13,-9,-15
    lid_below   #f3c9ae    1 lid_out,-1 lid_out low_a low_b lid_in lid_in,1 13,8,11 13,-9,11
    socket      #b8604018  6 crease_a,-3,-3 crease_b,4,-3 lid_b,3 lid_a,-3
    blush       #e8503c0d  9 apple_a apple_b cheek,6,4 cheek,0,8 cheek,-5,5
    bag         #b8604030  1 low_a,-1,2 low_b,2,2 low_b,1,3 low_a,0,3.2
    crease      #a0604490  1 lid_out,-1,-2 lid_out,-1,-2 crease_a crease_b lid_in,-1,-3 \
                              lid_in,-1,-3 crease_b,0,.8 crease_a,0,.8
    lash        #3a2420    1 lid_out,-1.2,-.8 lid_out,-1.2,-.8 lid_a,-.5,-1.5 lid_b,0,-1.1 lid_in \
                              lid_in lid_b,0,.4 lid_a,0,.8 lid_out,0,.6
    fold        #b8604030  2 wing,-1.5,-2 wing,-1.5,-2 fold corner,-3 corner,-3 fold_in
    mouth       #4c141c    1 top,0,1 top,0,1 top_a,0,1 wide_up wide_low bottom_a,0,-1 \
                              bottom,0,-1 bottom,0,-1
    tongue      #b8505a    1 bottom,0,-3 bottom,0,-3 tongue,0,-3 tongue,-1,1 bottom,0,1 \
                              bottom,0,1
    teeth       #f8f4ee    1 top top top_a molar teeth bite,-2 bite bite
    upper_lip   #c9605e    1 top,0,-2 top,0,-2 top,-2,-2.7 top_a,0,-1.5 side_up side side \
                              inner_up top_a,0,1.7 top,-2,2 top,0,2 top,0,2
    lower_lip   #d4706c    1 bottom,0,-2.3 bottom,0,-2.3 bottom,-2,-2.3 bottom_a,.5,-2.3 \
                              inner_low inner_up side side side_low bottom_a,-.3,2.6 \
                              bottom,-2.5,3.3 bottom,0,3.3 \
                              bottom,0,3.3
    lip_light   #ffffff14  4 bottom,-4,-.4 bottom,4,-.4 bottom,4,1.2 bottom,-4,1.2
    lip_under   #b860400c  5 bottom,-5,4.6 bottom,5,4.6 bottom,2,7 bottom,-2,7
    line        #a0604438  1 forehead forehead forehead,-3 forehead,-9,-1.5 forehead,-9,-1.5 \
                              line,-3 line line
    line_2      #a0604438  1 forehead,0,-4 forehead,0,-4 forehead,-3,-4 forehead,-9,-5.5 \
                              forehead,-9,-5.5 line,-3,-4 line,0,-4 line,0,-4
    glabella    #a0604430  2 1,11.5,-2.5 1,12,1 1,12.4,4.5 glabella
    wrinkle     #a0604428  2 9,-1,-8 9,-4,-6.5 9,-5.5,-3 wrinkle
    brow        #3e2b26    1 brow_in,-.4,2.4 brow_in,.8,-1 brow_mid,0,-2 brow_out brow_out \
                              brow_mid,0,1.6
    nose_side   #b8604014  5 9,-2.5,-12 9,-2,-2 wing,.5,-1 wing,1 9,-5,-10
    nose_light  #fff0e018  5 9,-1.2,-8 9,1.2,-8 9,2.2,1 9,1,2.6 9,-1,2.6 9,-2.2,1
    nose_under  #dfa98e    1 9,0,4 9,0,4 9,-2,4 9,-3.5,3 wing,0,-2.5 wing,-.8 wing,1,1.4 9,-2,6 \
                              9,0,6 9,0,6
    nostril     #7c3c30    1 9,-3.4,4 9,-1.6,4.2 9,-1.8,5 9,-3.4,5
    hair_shade  #dba98c    1 0,0,2 0,0,2 0,-8,4 0,-19,2 4,6,-26 4,3,-14 4,0,6 4,2,6 4,6,-12 \
                              4,9,-24 0,-17,4 0,-7,7 0,0,5.5 0,0,5.5
    hair        #3e2b26    1 0,0,-17.5 0,0,-17.5 0,-14,-17.5 0,-25,-12 0,-32,-1 4,-6.5,-16 4,-6,-4 \
                              4,-4.5,4 4,-1,9 4,1.5,9 4,2.5 4,3.5,-14 4,8,-26 0,-17,1 0,-7,4 \
                              0,0,2 0,0,2
    strand      #6a4e4050  3 0,-2,-14 0,-2,-14 0,-16,-13 0,-27,-4 4,-3,-10 4,-3,-10 0,-26,-2 \
                              0,-14,-10
    strand_2    #6a4e4050  3 0,0,-10 0,0,-10 0,-14,-8 0,-24,0 4,0,-10 4,0,-10 0,-22,2 0,-12,-5
    hair_light  #8a685410  9 0,-17,-9 0,-10,-14 0,10,-14 0,17,-9 0,9,-8 0,-9,-8"""

# behind them, at twice the size: a wall with some light on it, shoulders, collar, neck
SCENE = Image.new("RGB", (2 * SIZE, 2 * SIZE), "#b4ced2")
for ellipse in """\
    80   20   944  884   #ffffff30
    130  70   894  834   #ffffff30
    160  790  864  1400  #3a5c80
    388  640  636  922   #2c4868
    402  600  622  908   #e2ae92""".splitlines():
    *box, colour = ellipse.split()
    ImageDraw.Draw(SCENE, "RGBA").ellipse([*map(int, box)], colour)


def outline(corners):
    """(2, n, 3) -> points of closed curves, (2, 4 n, 3): a quadratic B-spline, by Chaikin's method,
    which cuts off all corners, here twice. To cut, neighbours A, B are
        doubled              A, A, B, B
        averaged             A, (A + B) / 2, B
        averaged once more   3/4 A + 1/4 B, 1/4 A + 3/4 B"""
    for _ in range(2):
        corners = corners.repeat(2, 1)
        for _ in range(2):
            corners = (corners + np.roll(corners, 1, 1)) / 2
    return corners


class Sketch:
    """A face drawn for keypoints laid out like FACE, without weights; `source` and `frames` stand
    in for LivePortrait's."""

    def source(self):
        """The face at rest, its motion zero but for scale and t_y."""
        motion = F.pad(torch.tensor([[1.3, 0, 0.1]]), (63, 4))
        return Source(None, torch.tensor(FACE).float().view(1, 63), motion)

    def frames(self, source, motion):
        """(T, 70) in LivePortrait units -> iterator of uint8 (512, 512, 3)."""
        for m in checked(motion):
            x = np.stack([100 * source.x_c[0], m[EXP]])
            # unlike in Eq. 3, the offsets move places of the face before it is turned
            known = find_places(x.reshape(2, 21, 3))
            R = (m[SCALE] * rotation(m[ROT]) / 100).numpy()
            t = m[TRANS].numpy()
            image = SCENE.copy()
            draw = ImageDraw.Draw(image, "RGBA")                       # it blends
            for row in PARTS.splitlines():
                name, colour, copies, *corners = row.split()
                corners = [weighted(corner, known) for corner in corners]
                x = outline(np.stack(corners, 1)) @ R + t
                for _ in range(int(copies)):
                    for side in SIZE * (x + 1):                        # at twice the size
                        draw.polygon([*side[:, :2].flat], colour)
                    x = 0.8 * x + 0.2 * x.mean(1, keepdims=True)       # copies make a soft edge
            yield np.asarray(image.reduce(2))
