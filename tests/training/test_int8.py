"""The finish before INT8: the rounding is that of engines, and a training under it brings INT8 nearer to float."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from ldm_deploy.errors import ConfigError, TrainingError
from ldm_deploy.models.reference import load_reference, save_reference
from ldm_deploy.training import distill_int8 as module
from ldm_deploy.training.distill_int8 import distill_int8
from ldm_deploy.training.int8_config import PRESETS, load_int8_config
from ldm_deploy.training.simulated import Simulated, in_float, simulate

TINY = PRESETS["tiny"]


def run(teacher, out, config=TINY, **options):
    return distill_int8(teacher, "photos", out, config=config, threads=1, **options)


@pytest.fixture
def coarse(make_teacher):
    """A teacher whose weights have one value in each row far above the others, which leaves those few of the steps."""
    path = make_teacher()
    reference = load_reference(path)
    draw = torch.Generator().manual_seed(0)
    weights = {name: getattr(reference, name).state_dict() for name in ("autoencoder", "text_encoder", "unet")}
    for value in weights["unet"].values():
        if value.dim() > 1:
            value.copy_(torch.randn(value.shape, generator=draw) * 0.5 / value[0].numel() ** 0.5)
            value.flatten(1)[:, 0] *= 20
    save_reference(path, reference.model, weights)
    return path


def longer(**values):
    training = dataclasses.replace(
        TINY.training, steps=60, batch_size=8, warmup_steps=5, learning_rate=5e-5, ema_decay=0.9, weight_decay=0.0
    )
    return dataclasses.replace(TINY, training=training, **values)


def test_it_rounds_as_onnx_does():
    """Against onnx's own reference of QuantizeLinear and DequantizeLinear, per tensor and per channel."""
    from onnx.reference import ReferenceEvaluator

    layer = nn.Linear(5, 3)
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    made = Simulated(layer, -1.0, 1.5)
    weight = layer.weight.detach().numpy()
    constants = {
        "w": weight, "s": np.float32(2.5 / 255), "z": np.uint8(102), "ws": np.abs(weight).max(1) / np.float32(127),
        "wz": np.zeros(3, np.int8), "b": layer.bias.detach().numpy(),
    }  # fmt: skip
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "s", "z"], ["xd"]),
        helper.make_node("QuantizeLinear", ["w", "ws", "wz"], ["wq"], axis=0),
        helper.make_node("DequantizeLinear", ["wq", "ws", "wz"], ["wd"], axis=0),
        helper.make_node("Gemm", ["xd", "wd", "b"], ["y"], transB=1),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "xy"]
    initializers = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], initializers)
    session = ReferenceEvaluator(helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)]))
    (wanted,) = session.run(None, {"x": x.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(made(x).numpy(), wanted, atol=1e-6)
        assert (made(x) - layer(x)).abs().max() > 1e-3  # and rounding is seen


def test_gradients_pass_the_rounding_and_not_what_is_cut_off():
    made = Simulated(nn.Linear(2, 1, bias=False), 0.0, 1.0)
    nn.init.ones_(made.inner.weight)
    x = torch.tensor([[0.333, 7.0]], requires_grad=True)
    made(x).sum().backward()
    assert x.grad.tolist() == [[1.0, 0.0]]
    torch.testing.assert_close(made.inner.weight.grad, torch.tensor([[0.333, 1.0]]), atol=2e-3, rtol=0)


def test_what_reads_vectors_and_what_is_kept_stays_in_float():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.time, self.first, self.second = nn.Linear(2, 3), nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

        def forward(self, image, time):
            return self.second(self.first(image) + self.time(time)[:, :, None, None])

    net, inputs = Net(), (torch.randn(2, 3, 4, 4), torch.randn(2, 2))
    assert {name for name, part in simulate(net, inputs, ["conv", "linear"], ["second"]).named_modules()
            if isinstance(part, Simulated)} == {"first"}  # fmt: skip
    made = simulate(net, inputs, ["conv"], [])
    assert float(made.first.scale) * 255 == pytest.approx(float(inputs[0].max() - inputs[0].min()), rel=1e-5)
    assert not any(isinstance(part, Simulated) for part in net.modules())
    assert {name: value.shape for name, value in in_float(made.state_dict()).items()} == {
        name: value.shape for name, value in net.state_dict().items()
    }


def test_int8_is_nearer_to_the_float_teacher_afterwards_and_only_the_unet_changed(coarse, tmp_path):
    path = coarse
    record = run(path, tmp_path / "out", longer())
    figures = record["figures"]
    assert figures["student_int8_error"] < 0.9 * figures["teacher_int8_error"]
    teacher, student = load_reference(path), load_reference(tmp_path / "out")
    for part in ("text_encoder", "autoencoder"):
        ours, theirs = getattr(student, part).state_dict(), getattr(teacher, part).state_dict()
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert student.model.pop("name") == teacher.model.pop("name") + "-int8-aware"
    assert student.model == teacher.model
    card = (tmp_path / "out" / "README.md").read_text()
    assert "ldm-deploy distill teacher --recipe int8 --config custom --data photos --out out" in card
    assert "in INT8 |" in card


def test_a_training_that_does_not_help_writes_nothing(make_teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "prediction_error", lambda unet, *rest: 1.0)
    with pytest.raises(TrainingError, match=r"in INT8 is 1 after training and 1 before; nothing is written: change"):
        run(make_teacher(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_resumed_run_equals_the_uninterrupted_one(make_teacher, tmp_path, monkeypatch):
    from ldm_deploy.training import imitation

    path = make_teacher()
    errors = iter([1.0, 0.5, 0.1] * 2)
    monkeypatch.setattr(module, "prediction_error", lambda *rest: next(errors))
    run(path, tmp_path / "whole")
    calls, plain = [], imitation.feature_loss

    def stop(*arguments):
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return plain(*arguments)

    monkeypatch.setattr(imitation, "feature_loss", stop)
    with pytest.raises(KeyboardInterrupt):
        run(path, tmp_path / "cut")
    run(path, tmp_path / "cut", resume=True)
    assert len(calls) == 4 + 2  # from the checkpoint of the second step on
    whole, cut = (load_reference(tmp_path / name).unet.state_dict() for name in ("whole", "cut"))
    assert all(torch.equal(value, cut[name]) for name, value in whole.items())


def test_names_that_no_part_has_are_refused(make_teacher, tmp_path):
    with pytest.raises(TrainingError, match=r"keep has 'up\.99', which no part of the U-Net of .* is called"):
        run(make_teacher(), tmp_path / "out", dataclasses.replace(TINY, keep=("up.99",)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("layers = ['attention']", r"layers is \['attention'\]; allowed: one or more of conv, linear"),
        ("layers = []", r"layers is \[\]; allowed"),
        ("points = 0", "points is 0; give 1 or more"),
        ("output_weight = -1.0", "output_weight is -1.0; give 0 or more"),
        ("output_weight = 0.0\nfeature_weight = 0.0", "are all 0; there is nothing to learn"),
        ("caption_dropout = 2.0", "caption_dropout is 2.0; allowed: 0 to 1"),
        ("[training]\nresolutions = [32]\ngrow_at = [2]", "not for INT8"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(tmp_path, text, message):
    file = tmp_path / "own.toml"
    file.write_text(f"preset = 'cpu'\n{text}\n")
    with pytest.raises(ConfigError, match=message):
        load_int8_config(file)
