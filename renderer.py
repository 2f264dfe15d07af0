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
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present
from torch.nn.utils import (convert_conv2d_weight_memory_format,
                            convert_conv3d_weight_memory_format, fuse_conv_bn_eval,
                            remove_spectral_norm, spectral_norm)

from moda import EXP, MOUTH, ROT, SCALE, TRANS, M, read_checkpoint

SIZE = 512                       # pixels of a rendered frame, height and width
GET = "get it with: hf download KwaiVGI/LivePortrait --local-dir pretrained_weights"
# a portrait, split: appearance (B, 32, 16, 64, 64), canonical keypoints (B, 63), motion (B, 70)
Source = namedtuple("Source", "f_s x_c motion")


# --------------------------------------------------------------------------------------- keypoints
def rotation(pitch, yaw, roll):
    """Degrees (...) each -> (..., 3, 3), the transpose of Rz Ry Rx: keypoints are rows, x_c R."""
    angles = torch.deg2rad(torch.stack([pitch, yaw, roll]))
    cp, cy, cr = angles.cos()
    sp, sy, sr = angles.sin()
    R = [cy * cr, cy * sr, -sy,
         sp * sy * cr - cp * sr, sp * sy * sr + cp * cr, sp * cy,
         cp * sy * cr + sp * sr, cp * sy * sr - sp * cr, cp * cy]
    return torch.stack(R, -1).unflatten(-1, (3, 3))


def keypoints(x_c, motion):
    """Eq. 3: x = s (x_c R + delta) + t, with t_z = 0 as in LivePortrait.

    x_c (B, 21, 3) or (B, 63), motion (B, 70) -> (B, 21, 3)."""
    R = rotation(*motion[:, ROT].T)
    delta = motion[:, EXP].unflatten(-1, (21, 3))
    t = motion[:, TRANS] * motion.new_tensor([1, 1, 0])
    x = x_c.reshape(-1, 21, 3) @ R + delta
    return motion[:, SCALE, None] * x + t[:, None]


def relative(motion, portrait, neutral):
    """Driving motion (T, 70), from its `neutral` (70,), put on the `portrait`'s own (70,)."""
    driving = rotation(*motion[:, ROT].T)
    R = driving @ rotation(*neutral[ROT]).mT @ rotation(*portrait[ROT])
    moved = portrait + motion - neutral
    moved[:, SCALE] = portrait[SCALE] * motion[:, SCALE] / neutral[SCALE]
    moved[:, ROT] = angles(R)
    return moved


def angles(R):
    """The inverse of `rotation`: (T, 3, 3) -> pitch, yaw, roll in degrees, (T, 3)."""
    x, y, z = R.movedim(0, -1)                                         # rows (3, T)
    pitch = y[2].atan2(z[2])
    yaw = -x[2].clamp(-1, 1).asin()
    roll = x[1].atan2(x[0])
    return torch.stack([pitch, yaw, roll], 1).rad2deg()


def checked(motion):
    """motion as float32 (T, 70); ValueError if it is anything else."""
    motion = torch.as_tensor(motion)
    valid = motion.shape[1:] == (M,) and len(motion)
    if not valid or not motion.isfinite().all():
        raise ValueError(f"motion of shape {tuple(motion.shape)}: "
                         f"should be finite numbers of shape (frames, {M})")
    return motion.detach().float()


# ------------------------------------------------------------------------- LivePortrait's templates
# A motion template (.pkl) is a pickle of dicts and numpy arrays. A pickle can run any code, so here
# it may name nothing but what an array is made of, and gets numpy's own types of numbers: of a new
# dtype it could say that any bytes are pointers, which numpy would follow.
FLOATS = {"f4": np.dtype("f4"), "f8": np.dtype("f8")}
ARRAY_PARTS = {
    "_reconstruct": lambda *unused: np.empty(0),
    "ndarray": None,
    "dtype": lambda name, *unused: FLOATS[name]}


class TemplateReader(pickle.Unpickler):
    def find_class(self, module, name):
        if name not in ARRAY_PARTS:
            raise ValueError(f"it holds {module}.{name}, which is no array")
        return ARRAY_PARTS[name]


def read_template(path):
    """A motion template of LivePortrait -> (T, 70), brought to 25 fps."""
    with open(path, "rb") as file:
        template = TemplateReader(file).load()
    frames = template["motion"]

    def channels(name):
        return np.stack([np.ravel(frame[name]) for frame in frames])
    R = torch.tensor(channels("R" if "R" in frames[0] else "R_d"))
    degrees = angles(R.view(-1, 3, 3))
    motion = np.hstack([channels("exp"), channels("scale"), channels("t"), degrees])
    times = np.arange(0, len(motion), max(1, template["output_fps"]) / 25)
    motion = [np.interp(times, range(len(motion)), channel) for channel in motion.T]
    return checked(np.stack(motion, 1))


def read_motion(path):
    """(T, 70) of a motion template or a .npy file; ValueError if it holds none."""
    try:
        if path.endswith(".pkl"):
            return read_template(path)
        return checked(np.load(path, allow_pickle=False))
    except Exception as error:
        raise ValueError(f"{path}: no motion could be read ({error}); should be what --save_motion "
                         "wrote") from None


def write_template(motion, path):
    """(T, 70) at 25 fps -> a motion template, for LivePortrait's inference.py -d."""
    frames = []
    for m, R in zip(motion.numpy(), rotation(*motion[:, ROT].T).numpy()):
        frames.append(dict(
            exp=m[EXP].reshape(1, 21, 3),
            scale=m[None, SCALE],
            t=m[None, TRANS],
            R=R[None]))
    # roughly how open eyes and mouth are, height over width: a lid goes down by 0.013 to shut
    eyes = 25 * (0.013 - motion[:, None, [34, 46]]).clip(0)
    lips = 5 * (motion[:, None, [MOUTH]] - motion[:, None, [52]]).clip(0)
    template = dict(
        n_frames=len(motion),
        output_fps=25,
        motion=frames,
        c_eyes_lst=[*eyes.numpy()],
        c_lip_lst=[*lips.numpy()])
    with open(path, "wb") as file:
        pickle.dump(template, file)


# --------------------------------------------------------------------------------- building blocks
# All networks are written as they were trained, and their parameters have the names that they have
# in the public files.

class Chain(nn.Sequential):
    """Named layers, one after the other."""

    def __init__(self, **layers):
        super().__init__(OrderedDict(layers))


class Residual(Chain):
    def forward(self, x):
        return x + super().forward(x)


def conv3x3(n_in, n):
    return nn.Conv2d(n_in, n, 3, padding=1)


def conv3x3x3(n_in, n):
    return nn.Conv3d(n_in, n, 3, padding=1)


def block2d(n_in, n, **after):
    return Chain(
        conv=conv3x3(n_in, n),
        norm=nn.BatchNorm2d(n),
        relu=nn.ReLU(),
        **after)


def block3d(n_in, n, **before):
    return Chain(
        **before,
        conv=conv3x3x3(n_in, n),
        norm=nn.BatchNorm3d(n),
        relu=nn.ReLU())


# ------------------------------------------------------------------------------- F: the appearance
class AppearanceExtractor(Chain):
    """F: image (B, 3, 256, 256) -> feature volume f_s (B, 32, 16, 64, 64)."""

    def __init__(self):
        residuals = {f"3dr{i}": residual3d(32) for i in range(6)}
        super().__init__(
            first=block2d(3, 64),                                      # (B, 64, 256, 256)
            down_blocks=nn.Sequential(
                block2d(64, 128, pool=nn.AvgPool2d(2)),
                block2d(128, 256, pool=nn.AvgPool2d(2))),              # (B, 256, 64, 64)
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
        for n in (96, 192, 384):
            halve = ChannelsLastConv2d(n, 2 * n, 2, stride=2)
            self.downsample_layers.append(nn.Sequential(layer_norm(n), halve))
        self.stages = nn.ModuleList()
        for n, depth in ((96, 3), (192, 3), (384, 9), (768, 3)):
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


def layer_norm(n):
    return nn.LayerNorm(n, eps=1e-6)


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
    """What M puts out -> motion (B, 70); an angle is a mean over 66 bins, 3 degrees apart."""
    bins = torch.linspace(-97.5, 97.5, 66, device=heads["t"].device)
    angles = [heads[name].softmax(-1) @ bins for name in ("pitch", "yaw", "roll")]
    parts = [heads["exp"], heads["scale"], heads["t"], torch.stack(angles, 1)]
    return torch.cat(parts, 1)


# ---------------------------------------------------------------------------------- W: the warping
class WarpingNetwork(nn.Module):
    """W: f_s (B, 32, 16, 64, 64), keypoints (B, 21, 3) -> warped feature (B, 256, 64, 64)."""

    def __init__(self):
        super().__init__()
        self.dense_motion_network = DenseMotion()
        self.third = Chain(conv=conv3x3(512, 256), norm=nn.BatchNorm2d(256))
        self.fourth = nn.Conv2d(256, 256, 1)

    def forward(self, f, x_s, x_d):
        deformation, occlusion = self.dense_motion_network(f, x_s, x_d)
        x = F.grid_sample(f, deformation, align_corners=False)         # (B, 32, 16, 64, 64)
        x = self.third(x.flatten(1, 2).to(occlusion))
        x = F.leaky_relu(x, 0.01)
        return self.fourth(x) * occlusion


def gaussians(grid, points):
    """exp(-|grid - x|^2 / 0.02) around each of the points (B, 22, 3): (B, 22, 16, 64, 64)."""
    distance = torch.cdist(points, grid.flatten(1, 3))
    return torch.exp(-50 * distance ** 2).unflatten(2, (16, 64, 64))


class DenseMotion(nn.Module):
    """Where every voxel comes from (B, 16, 64, 64, 3), and how much of it shows (B, 1, 64, 64)."""

    def __init__(self):
        super().__init__()
        self.compress = nn.Conv3d(32, 4, 1)
        self.norm = nn.BatchNorm3d(4)
        down = DownBlocks()
        for n_in, n in pairwise([110, 64, 128, 256, 512, 1024]):
            down.append(block3d(n_in, n))
        up = UpBlocks()
        for n in (512, 256, 128, 64, 32):
            n_in = min(4 * n, 1024)                                    # 2 n from below, 2 n skipped
            up.append(block3d(n_in, n, up=nn.Upsample(scale_factor=(1, 2, 2))))
        self.hourglass = Chain(
            encoder=Chain(down_blocks=down),
            decoder=block3d(142, 142, up_blocks=up))
        self.mask = nn.Conv3d(142, 22, 7, padding=3)
        self.occlusion = nn.Conv2d(2272, 1, 7, padding=3)

    def forward(self, f, x_s, x_d):
        """f (B, 32, 16, 64, 64), keypoints x_s of the source and x_d, driving, (B, 21, 3)."""
        x_s, x_d = F.pad(torch.stack([x_s, x_d]), (0, 0, 1, 0))        # (B, 22, 3); 0: background
        shift = x_s - x_d
        still = torch.eye(3, 4, device=f.device)[None]
        grid = F.affine_grid(still, f[:1].shape, align_corners=True)   # (1, 16, 64, 64, 3)
        heat = gaussians(grid, x_d) - gaussians(grid, x_s)             # (B, 22, 16, 64, 64)
        c = F.relu(self.norm(self.compress(f.to(self.mask.weight))))
        # the grid is made with align_corners and read without: so the weights were trained
        moved = grid[:, None] + shift[:, :, None, None, None]          # (B, 22, 16, 64, 64, 3)
        moved = F.grid_sample(c.float(), moved.flatten(1, 2), align_corners=False)
        moved = moved.unflatten(2, (22, 16)).transpose(1, 2)           # (B, 22, 4, 16, 64, 64);
        x = torch.cat([heat[:, :, None], moved], 2)                    # 22 x 5 = 110 channels
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
            x = F.avg_pool2d(block(x).flatten(1, 2), 2)                # avg_pool3d lacks bfloat16
            x = x.unflatten(1, (-1, 16))
            outputs.append(x)
        return outputs


class UpBlocks(nn.ModuleList):
    """The outputs of DownBlocks -> (B, 142, 16, 64, 64)."""

    def forward(self, outputs):
        x = outputs.pop()
        for block in self:
            x = torch.cat([block(x), outputs.pop()], 1)
        return x


# -------------------------------------------------------------------------------- G: the generator
class SpadeGenerator(nn.Module):
    """G: warped feature h (B, 256, 64, 64) -> image (B, 3, 512, 512)."""

    def __init__(self):
        super().__init__()
        self.fc = conv3x3(256, 512)
        for i in range(6):
            self.add_module(f"G_middle_{i}", SpadeBlock(512, 512))
        self.up_0 = SpadeBlock(512, 256, up=2)
        self.up_1 = SpadeBlock(256, 64, up=4)
        self.conv_img = nn.Sequential(conv3x3(64, 12), nn.PixelShuffle(2))

    def forward(self, h):
        x = self.fc(h)                                                 # (B, 512, 64, 64)
        for i in range(6):
            x = self.get_submodule(f"G_middle_{i}")(x, h)
        x = self.up_0(F.interpolate(x, scale_factor=2.0), h)           # (B, 256, 128, 128)
        x = self.up_1(F.interpolate(x, scale_factor=2.0), h)           # (B, 64, 256, 256)
        return self.conv_img(F.leaky_relu(x, 0.2)).sigmoid()


class SpadeBlock(nn.Module):
    """x + two convolutions, each after a Spade and a leaky ReLU: (B, n_in, H, W) -> (B, n_out, H,
    W). A third, conv_s, fits x to n_out."""

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
        dx = self.conv_0(F.leaky_relu_(self.norm_0(x, h), 0.2))
        dx = self.conv_1(F.leaky_relu_(self.norm_1(dx, h), 0.2))
        if hasattr(self, "conv_s"):
            x = self.conv_s(self.norm_s(x, h))
        return dx.add_(x)


class Spade(nn.Module):
    """SPADE (arXiv 1903.07291): norm(x) (1 + gamma) + beta, both from the warped feature h.

    x (B, n, H, W), h (B, 256, H / up, W / up) -> (B, n, H, W)."""

    def __init__(self, n, up):
        super().__init__()
        layers = {"up": nn.Upsample(scale_factor=(up, up)), "0": conv3x3(256, 128)}
        self.mlp_shared = Chain(**layers)
        self.mlp_gamma = conv3x3(128, n)
        self.mlp_beta = conv3x3(128, n)

    def forward(self, x, h):
        a = F.relu_(self.mlp_shared(h))                                # (B, 128, H, W)
        gamma = self.mlp_gamma(a)
        beta = self.mlp_beta(a)
        return beta.addcmul_(F.instance_norm(x), gamma.add_(1))        # in place to save memory


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
        x = torch.cat([x_s, x_d], 1)
        offsets, shift = self.mlp(x.flatten(1)).split([63, 2], 1)
        shift = F.pad(shift, (0, 1))                                   # of all points, in x and y
        return x_d + offsets.view_as(x_d) + shift[:, None]


# -------------------------------------------------------------------------------- faster inference
# The same numbers up to rounding, to which tests/test_liveportrait.py holds it, with less work:
# layers are replaced, forward stays as it is. To train a network, take it plain, from `load`.

@torch.no_grad()
def fold_for_inference(net):
    """Make spectral norm, BatchNorm and upsampling part of the convolutions beside them."""
    for module in [*net.eval().modules()]:
        if hasattr(module, "weight_orig"):
            remove_spectral_norm(module)
        if hasattr(module, "conv"):                # of block2d and block3d
            module.conv = fuse_conv_bn_eval(module.conv, module.norm)
            module.norm = nn.Identity()
        if hasattr(module, "up"):                  # the layer after it is a convolution
            transpose_upsampling(module[1], int(module.up.scale_factor[-1]))
            module.up = nn.Identity()
    if next(net.parameters()).is_cuda:                                 # what tensor cores work on
        convert_conv2d_weight_memory_format(net, torch.channels_last)
        convert_conv3d_weight_memory_format(net, torch.channels_last_3d)
    return net.requires_grad_(False)


def transpose_upsampling(conv, up):
    """Make `conv` equal to nearest upsampling of height and width, followed by `conv`, as one
    transposed convolution, which needs less than half of the products."""
    axes = tuple(range(2, conv.weight.ndim))
    weight = conv.weight.flip(axes).transpose(0, 1)
    # one pixel becomes up x up equal ones, each with a kernel: their sum, a box over the kernel
    weight = F.pad(weight, [up - 1] * 4)
    weight = F.avg_pool3d(weight, (1, up, up), stride=1) * up ** 2
    conv.weight = nn.Parameter(weight)
    conv.kernel_size = weight.shape[2:]
    conv.stride = (1, up, up)[-len(axes):]
    conv.__class__ = nn.ConvTranspose2d if len(axes) == 2 else nn.ConvTranspose3d


def keep_memory():
    """glibc keeps large blocks (M_MMAP_MAX, M_TRIM_THRESHOLD): to give them back each time, and pay
    for their pages anew, costs a sixth of the time on a CPU. Other systems have no mallopt."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, TypeError):
        return
    mallopt(-4, 0)
    mallopt(-1, 2**31 - 1)


# ------------------------------------------------------------------------------------ LivePortrait
def load(network, path):
    """One of the five classes and its public file -> the network, plain, in evaluation mode.

    ValueError names the file and its first key that is missing, too many or of another shape."""
    state = read_checkpoint(path, GET)
    state = state.get("retarget_shoulder", state)                      # S's, beside eyes' and lips'
    consume_prefix_in_state_dict_if_present(state, "module.")
    consume_prefix_in_state_dict_if_present(state, "detector.")
    with torch.device("meta"):
        net = network()
    try:
        net.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        wrong = str(error).splitlines()[1].strip()
        raise ValueError(f"{path}: {wrong:.200}; {GET}") from None
    return net.float().eval()


class LivePortrait:
    """The five networks with the public weights, from the folder that holds base_models, or the one
    above; W and G compute in `dtype`, else in float32. ValueError says which file does not fit."""

    def __init__(self, weights_dir, device="cpu", dtype=None):
        self.device = torch.device(device)
        if self.device.type == "cpu":
            keep_memory()
        root = Path(weights_dir)
        if (root / "liveportrait").is_dir():
            root /= "liveportrait"
        if "animals" in root.name:
            raise ValueError(f"{root}: these networks know animals only; {GET}")

        def folded(network, file):
            return fold_for_inference(load(network, root / file).to(self.device))
        self.F = folded(AppearanceExtractor, "base_models/appearance_feature_extractor.pth")
        self.M = folded(MotionExtractor, "base_models/motion_extractor.pth")
        self.W = folded(WarpingNetwork, "base_models/warping_module.pth").to(dtype=dtype)
        self.G = folded(SpadeGenerator, "base_models/spade_generator.pth").to(dtype=dtype)
        self.S = folded(StitchingNetwork, "retargeting_models/stitching_retargeting_module.pth")

    def source(self, image):
        """uint8 portrait crop (H, W, 3), or a batch (B, H, W, 3) -> Source."""
        x = torch.tensor(image, device=self.device).movedim(-1, -3)
        x = F.adaptive_avg_pool2d(x.float(), 256)                      # of 512: means of 2 x 2,
        x = (x + 0.5).floor().reshape(-1, 3, 256, 256) / 255           # as uint8
        heads = self.M(x)
        return Source(self.F(x), heads["kp"].cpu(), to_motion(heads).cpu())

    def render(self, f_s, x_s, x_d, stitch=True):
        """f_s (B, 32, 16, 64, 64), keypoints (B, 21, 3) -> uint8 (B, 512, 512, 3)."""
        if stitch:
            x_d = self.S(x_s, x_d)
        image = self.G(self.W(f_s, x_s, x_d))
        return (image.float() * 255).byte().movedim(1, -1)             # truncated, as LivePortrait

    def frames(self, source, motion, stitch=True, batch=None):
        """(T, 70) in LivePortrait units -> iterator of uint8 (512, 512, 3), `batch` at a time."""
        if not batch:
            batch = 8 if self.device.type == "cuda" else 1             # a CPU gains little
        x_s = keypoints(source.x_c, source.motion).to(self.device)
        x_d = keypoints(source.x_c, checked(motion)).to(self.device)
        for part in x_d.split(batch):
            f_s = source.f_s.expand(len(part), -1, -1, -1, -1)
            frames = self.render(f_s, x_s.expand_as(part), part, stitch)
            yield from frames.cpu().numpy()


# ---------------------------------------------------------------------------------------- pictures
def read_image(path):
    """Any picture that Pillow reads, upright and on white -> RGB. ValueError if it is none."""
    try:
        image = ImageOps.exif_transpose(Image.open(path)).convert("RGBA")
    except Exception as error:
        raise ValueError(f"{path}: no picture could be read ({error}); take another") from None
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def crop_box(image, crop=""):
    """The square to animate, "x,y,size" in pixels or the largest in the centre -> x, y, size."""
    width, height = image.size
    size = min(width, height)
    crop = crop or f"{(width - size) // 2},{(height - size) // 2},{size}"
    problem = f"crop {crop}: should be x,y,size, 16 pixels or more, inside {width} x {height}"
    try:
        x, y, size = map(int, crop.split(","))
    except ValueError:
        raise ValueError(problem) from None
    inside = 0 <= x <= width - size and 0 <= y <= height - size
    if size < 16 or not inside:
        raise ValueError(problem)
    return x, y, size


def paste_back(frames, image, box, longest=1280):
    """Frames blended into the whole picture, which is shrunk to `longest` and to even sides."""
    zoom = min(1, longest / max(image.size))
    x, y, size = [int(v * zoom) for v in box]
    picture = image.resize([int(v * zoom) // 2 * 2 for v in image.size])
    beyond = np.abs(np.arange(SIZE) - SIZE / 2).clip(240) - 240        # outside the square 16..496
    distance = np.hypot(beyond, beyond[:, None])
    mask = resized(255 * (1 - distance / 16).clip(0), size)            # a feathered edge
    for frame in frames:
        whole = picture.copy()
        whole.paste(resized(frame, size), (x, y), mask)
        yield np.asarray(whole)


def resized(array, size):
    return Image.fromarray(array.astype(np.uint8)).resize((size, size), Image.BILINEAR)


# ---------------------------------------------------------------------------------- the drawn face
# LivePortrait's 21 points on a face, in percent, and which point is the mirror image
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
TWIN = [*POINTS[:, 3].astype(int), 23, 22, 21]     # after the points: right, down, left

# A drawing exaggerates: channel, channel that it is added to, gain in place of 1 or 0. A channel is
# 3 point + axis. Depth becomes width, since rounded lips are narrow and spread ones wide
GAIN = torch.eye(M)
for channel, into, gain in np.loadtxt("""
     4   4  -3      # brows up and down; their points move in opposite senses
     7   7   3
    34  34   3      # upper lids up and down
    46  46   3
    43  43   1.5    # corners of the mouth up and down
    61  61   3
    53  42  -3      # upper lip in and out: corners of the mouth sideways
    53  60   3
    62  42   1      # a corner of the mouth in and out: the same
    62  60  -1
    """.splitlines()):
    GAIN[int(channel), int(into)] = gain

# Parts from back to front: name, colour, corners "point,% right,% down" of a closed curve. A mirror
# image is drawn too, so half will do of what crosses the middle
PARTS = """
    ear        #e2ae92  4,-10,-10 4,6,0 4,0,24
    face       #f2c8ac  4,-3,-10 0,-24,0 0,24,0 19,11,24 19,-11,24 3,-3,26 4,-2,16
    eye        #fcfaf6  13,-9,-2 13,-4.5,-7 13,4.5,-7 13,9,-2 13,4.5,3 13,-4.5,3
    iris       #407688  13,-4,-6 13,4,-6 13,4,2 13,-4,2
    pupil      #1a181e  13,-2,-4 13,2,-4 13,2,0 13,-2,0
    lid        #f2c8ac  11,-12,5 11,-11,-13 11,11,-13 11,12,5 11,5,-1 11,-5,-1
    lash       #70463c  11,-11,4.4 11,-5,-2.2 11,5,-2.2 11,11,4.4 11,5,-0.2 11,-5,-0.2
    mouth      #581c24  14,-1,0 17,0,0 20,1,0 19,8,0 19,-8,0
    teeth      #faf6f0  17,-7,-1 17,7,-1 17,6,3 17,-6,3
    upper_lip  #cc6866  14,-3,0 17,-5,-3 17,0,-1.4 17,5,-3 20,3,0 17,5,1.8 17,-5,1.8
    brow       #3e2b26  1,-11,3 1,-4,-3 1,9,-1 1,9,3 1,-4,0
    hair       #3e2b26  4,-3,6 4,-9,-20 0,-22,-14 0,20,-13 0,20,6 0,-16,12 4,0,-10
    lower_lip  #cc6866  14,-2,0 19,-6,-2.2 19,6,-2.2 20,2,0 19,6,3 19,-6,3
    nose       #e2ae92  9,-2,-8 9,2,-8 9,3,5 9,-6,4
    """

# behind them, at twice the size: a wall, shoulders, neck
SCENE = ImageOps.colorize(Image.linear_gradient("L"), "#e4ecec", "#b2ccd0")
SCENE = SCENE.resize((2 * SIZE, 2 * SIZE))
ImageDraw.Draw(SCENE).ellipse((160, 790, 864, 1400), "#3a5c80")
ImageDraw.Draw(SCENE).ellipse((417, 600, 607, 905), "#e2ae92")


def outline(corners):
    """n corners -> a closed spline of 8 n points, as weights of 21 points and 3 axes: (8 n, 24)."""
    point, right, down = np.loadtxt(corners, delimiter=",").T
    weights = np.eye(24)[point.astype(int)]
    weights[:, 21] = right / 100
    weights[:, 22] = down / 100
    weights = weights.repeat(8, 0)
    return sum((8 - abs(k)) / 64 * np.roll(weights, k, 0) for k in range(-7, 8))


class Sketch:
    """A face drawn for keypoints laid out like FACE. Same methods as LivePortrait, no weights."""

    def __init__(self):
        self.parts = []
        for part in PARTS.strip().splitlines():
            name, colour, *corners = part.split()
            self.parts.append((colour, outline(corners)))

    def source(self, image=None, x_c=FACE):
        """The face at rest, its motion zero but for scale, t_x, t_y; `image` is not looked at."""
        motion = F.pad(torch.tensor([[1.3, 0, 0.1]]), (63, 4))
        return Source(None, torch.as_tensor(x_c).float().reshape(1, 63), motion)

    def frames(self, source, motion, **unused):
        """(T, 70) in LivePortrait units -> iterator of uint8 (512, 512, 3)."""
        motion = checked(motion) @ GAIN
        axes = motion[:, SCALE, None] * rotation(*motion[:, ROT].T)[:, :2]
        points = torch.cat([keypoints(source.x_c, motion), axes, -axes[:, :1]], 1)
        for frame in points[..., :2].numpy():                          # (24, 2)
            image = SCENE.copy()
            draw = ImageDraw.Draw(image)
            for colour, curve in self.parts:
                for side in (frame, frame[TWIN]):
                    corners = (curve @ side + 1) * SIZE                # drawn at twice the size
                    draw.polygon(list(corners.ravel()), colour)
            yield np.asarray(image.reduce(2))
