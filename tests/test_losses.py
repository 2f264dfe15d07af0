"""Equations 4 to 7 mean what they say."""
from dataclasses import asdict

import torch
import torch.nn.functional as F

import train
from data import save
from moda import ALSE, LIPS, NO_EMOTION, Config, M, MotionModel, draw, losses, sync_loss


class Fixed(torch.nn.Module):
    """A model that answers a given velocity."""

    def __init__(self, v):
        super().__init__()
        self.v = v

    def forward(self, *args):
        self.args = args
        return self.v


def batch(B=3, N=12):
    return dict(z0=torch.randn(B, N, M),
                audio=torch.randn(B, N, 1, 8),
                emotion=torch.arange(B),
                identity=torch.randn(B, 63),
                prev=torch.randn(B, M),
                t=torch.rand(B),
                eps=torch.randn(B, N, M),
                drop_audio=torch.zeros(B, dtype=torch.bool),
                drop_emotion=torch.zeros(B, dtype=torch.bool))


def small_expert():
    return ALSE(Config(width=16, heads=1, audio_layers=1, audio_dim=8))


def test_rectified_flow_and_velocity_loss_are_equations_4_and_5():
    b = batch()
    error = torch.randn(3, 12, M)
    model = Fixed(b["eps"] - b["z0"] + error)
    rf, vel, sync, lips = losses(model, **b)
    first = error[:, 1:] - error[:, :-1]
    second = error[:, 2:] - 2 * error[:, 1:-1] + error[:, :-2]
    assert torch.allclose(rf, error.square().mean())
    assert torch.allclose(vel, first.square().mean() + second.square().mean())
    assert sync == 0
    assert torch.allclose(lips, error[..., LIPS].square().mean())
    z_t, t = model.args[:2]
    assert torch.allclose(z_t[1], (1 - t[1]) * b["z0"][1] + t[1] * b["eps"][1])    # Sec. 3.1


def test_a_dropped_emotion_is_none_and_dropout_has_the_papers_rates():
    b = batch()
    b["drop_emotion"][1] = True
    model = Fixed(b["eps"])
    losses(model, **b)
    assert model.args[3].tolist() == [0, NO_EMOTION, 2]
    drawn = draw(Config(), 20_000, 1, torch.Generator().manual_seed(0))
    assert abs(drawn["drop_audio"].float().mean() - 0.5) < 0.02
    assert abs(drawn["drop_emotion"].float().mean() - 0.1) < 0.01


def test_the_expert_is_gated_clip_by_clip():
    """Eq. 7: only clips whose sync loss is below tau count, and none whose voice was dropped."""
    b, expert = batch(), small_expert()
    each = sync_loss(*expert(b["audio"], b["z0"]))
    between = each.sort().values[:2].mean().item()             # the best and the second clip
    model = Fixed(b["eps"] - b["z0"])                          # its z_t - t m is z0 exactly
    assert torch.allclose(losses(model, **b, expert=expert, tau=between)[2], each.min() / 3)
    assert torch.allclose(losses(model, **b, expert=expert, tau=99)[2], each.mean())
    b["drop_audio"][each.argmin()] = True
    assert losses(model, **b, expert=expert, tau=between)[2] == 0


def test_lips_and_head_weigh_more_where_the_config_says_so():
    """An error in the lips counts `focus` times as much as the same one elsewhere."""
    weight = MotionModel(Config(focus=4.0)).weight
    b = batch()
    error = torch.zeros_like(b["eps"])
    costs = []
    for channel in (LIPS[0], 69, 0):
        off = error.index_fill(-1, torch.tensor([channel]), 1.0)
        net = Fixed(b["eps"] - b["z0"] + off)
        costs.append(losses(net, **b, weight=weight)[0])
    lips, head, other = costs
    assert torch.allclose(lips, 4 * other)
    assert torch.allclose(head, 4 * other)


def test_the_expert_judges_motion_in_livePortrait_units_by_its_own_statistics(tmp_path):
    """It learned from other data than the model."""
    model, expert = MotionModel(Config()), small_expert()
    model.mean.fill_(1.0)
    model.std.fill_(2.0)
    expert.mean.fill_(-3.0)
    expert.std.fill_(5.0)
    z, audio = torch.randn(3, 12, M), torch.randn(3, 12, 1, 8)
    motion = expert.denormalise(z)
    seen_by_lips = expert.motion(z[..., LIPS]).relu()
    assert torch.allclose(expert(audio, motion)[1], F.normalize(seen_by_lips, dim=-1), atol=1e-3)

    state = dict(kind="ALSE", config=asdict(expert.cfg), model=expert.state_dict())
    save(tmp_path / "alse.pt", state)
    judge = train.load_expert(tmp_path / "alse.pt", model)
    b = batch()
    z0 = b.pop("z0")
    motion = model.denormalise(z0)
    windows = dict(b, motion=motion, prev=model.denormalise(b["prev"]))
    each = sync_loss(*expert(b["audio"], motion))
    net = Fixed(b["eps"] - z0)
    loss = train.loss_terms(net, model, windows, judge, tau=99, teacher=None)[2]
    assert torch.allclose(loss, each.mean(), atol=1e-4)
    assert torch.allclose(net.args[5], b["prev"], atol=1e-5)


def test_in_bfloat16_no_certainty_costs_infinitely_much():
    a = F.normalize(torch.rand(1, 4, 8), dim=-1).bfloat16()
    for in_sync in True, False:
        assert sync_loss(a, a, in_sync).isfinite().all()


def test_the_expert_learns_sync_and_tells_shifts_apart():
    expert = ALSE(Config(width=32, heads=1, audio_layers=1, audio_dim=len(LIPS)))
    optimizer = torch.optim.Adam(expert.parameters(), 3e-3)

    def talk():
        """A voice that says where the lips are."""
        motion = torch.randn(8, 40, M)
        return motion[..., None, LIPS], motion
    for step in range(80):
        expert.pretraining_loss(*talk(), shift=5 + step % 10).backward()
        optimizer.step()
        optimizer.zero_grad()
    a, m = expert(*talk())
    assert (a * m).sum(-1).mean() > 0.8
    assert (a.roll(4, 1) * m).sum(-1).mean() < 0.4
