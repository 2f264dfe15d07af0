"""The network is the paper's: its size, its streams, its rotations; and all of its inputs count."""
import pytest
import torch

import build
from moda import Config, JointBlock, MoDA, rope_table, rotate


def n_parameters(**changes):
    with torch.device("meta"):
        model = MoDA(Config(**changes))
    return sum(p.numel() for p in model.parameters()) - model.null_audio.numel()


def test_the_paper_counts_370M_and_904M_parameters():
    assert n_parameters() == 372_983_878
    assert n_parameters(n_four=21, n_two=0, n_one=0) == 904_421_446    # Table 3, w/o C2F


@pytest.mark.parametrize("wrong", [dict(width=30), dict(width=36, heads=4)])
def test_a_width_that_cannot_be_is_refused(wrong):
    with pytest.raises(ValueError, match="should be an even multiple of heads"):
        MoDA(Config(**wrong))


def test_a_joint_block_whose_paths_are_alike_is_one_path_for_all_tokens():
    """Two streams with the same weights are one stream whose second half counts from 0 again."""
    cfg = Config(width=32, heads=2)
    one, two = JointBlock(cfg, 1, 1), JointBlock(cfg, 2, 2)
    for p in one.parameters():
        p.data += 0.1 * torch.randn_like(p)
    for path in two.paths:
        path.load_state_dict(one.paths[0].state_dict())
    x, c, rope = torch.randn(3, 24, 32), torch.randn(3, 1, 32), rope_table(12, 16)
    a, b = two([x[:, :12], x[:, 12:]], c, rope)
    together, = one([x], c, rope)
    assert not torch.allclose(together, x, atol=0.1)
    assert torch.allclose(torch.cat([a, b], 1), together, atol=1e-5)


def test_rotated_scores_depend_on_the_distance_of_frames_only():
    rope = rope_table(30, 16)
    q = torch.randn(16).expand(1, 1, 30, 16)
    k = torch.randn(16).expand(1, 1, 30, 16)
    scores = (rotate(q, rope) @ rotate(k, rope).mT)[0, 0]
    assert torch.allclose(scores[1:, 1:], scores[:-1, :-1], atol=1e-4)
    assert torch.allclose(scores.diag(), q[0, 0, 0] @ k[0, 0, 0], atol=1e-4)
    assert scores[0].std() > 0.1


def test_every_modality_counts_its_frames_from_zero():
    x, rope = torch.randn(1, 2, 40, 16), rope_table(20, 16)
    each = [rotate(part, rope) for part in x.split(20, 2)]
    assert torch.equal(rotate(x, rope), torch.cat(each, 2))


def inputs(B=2, N=20):
    return dict(z=torch.randn(B, N, 70),
                t=torch.rand(B),
                audio=torch.randn(B, N, 1, 160),
                emotion=torch.arange(B) % 9,
                identity=torch.randn(B, 63),
                prev=torch.randn(B, 70))


@pytest.mark.parametrize("rope_streams", [2, 4])
def test_the_four_stream_stage_rotates_as_many_streams_as_said(rope_streams):
    """Emotion and identity are the same in all frames; only rotation can tell them apart."""
    model, seen = build.model(rope_streams=rope_streams), []
    model.four[0].register_forward_hook(lambda block, args, streams: seen.extend(streams))
    model(**inputs())
    moving = [not torch.allclose(x, x[:, :1].expand_as(x), atol=1e-5) for x in seen]
    assert moving == [True, True, rope_streams == 4, rope_streams == 4]


def test_every_input_counts(tiny):
    x = inputs()
    v = tiny(**x)
    for name in x:
        changed = dict(x, **{name: x[name].flip(0)})
        assert not torch.allclose(tiny(**changed), v, atol=1e-4), name


def test_identity_is_standardised_by_the_faces_it_learned_from():
    """Faces differ by little of what a face measures: their differences count, not the face."""
    model, seen = build.model(), []
    model.identity_embedder.register_forward_pre_hook(lambda layer, args: seen.extend(args))
    faces = torch.randn(63) + 0.05 * torch.randn(200, 63)
    model.x_c_mean[:] = faces.mean(0)
    model.x_c_std[:] = faces.std(0)
    expected = (faces - faces.mean(0)) / faces.std(0)
    model(**inputs(B=200, N=1) | dict(identity=faces))
    assert torch.allclose(seen[0], expected, atol=1e-4)


def test_a_dropped_voice_is_the_null_vector_in_every_frame(tiny):
    x, dropped = inputs(), torch.tensor([True, False])
    null = tiny.null_audio.expand(1, 20, 1, 160)
    silenced = torch.cat([null, x["audio"][1:]])
    assert torch.equal(tiny(**x, drop_audio=dropped), tiny(**dict(x, audio=silenced)))


def test_attention_starts_on_the_diagonal():
    """At initialisation a motion frame attends most to its own moment in every stream."""
    model = MoDA(Config(**build.SMALL | dict(width=128)))
    rope, paths = rope_table(40, 64), model.four[0].paths

    def heads(path):
        return path.heads(path.qkv(torch.randn(64, 40, 128)), rope)
    q, _, _ = heads(paths[0])
    for path in paths:
        _, k, _ = heads(path)
        score = (q @ k.mT).mean((0, 1))
        assert (score.argmax(1) == torch.arange(40)).float().mean() > 0.9
