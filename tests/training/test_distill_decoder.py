"""A decoder distilled: what it is asked for, that it learns it, and that nothing else of the teacher changes."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from ldm_deploy.config import AutoencoderConfig
from ldm_deploy.errors import ArtifactError, ConfigError, DataError, TrainingError
from ldm_deploy.models.autoencoder import Autoencoder
from ldm_deploy.models.reference import WEIGHTS, load_reference, save_reference
from ldm_deploy.models.small_decoder import SmallDecoder
from ldm_deploy.models.torch_engine import torch_pipeline
from ldm_deploy.training import distill_decoder as module
from ldm_deploy.training.decoder_config import PRESETS, load_decoder_config
from ldm_deploy.training.distill_decoder import build_student, distill_decoder, imitation_loss, moments_loss
from ldm_deploy.training.losses import log_error
from ldm_deploy.training.train import train

TINY = PRESETS["tiny"]


def changed(steps=4, **values):
    training = dataclasses.replace(TINY.training, steps=steps)
    return dataclasses.replace(TINY, training=training, **values)


def distil(teacher, out, config=TINY, **options):
    return distill_decoder(teacher, "photos", out, config=config, threads=1, **options)


def test_the_loss_by_hand():
    wanted, image, decoded = (torch.full((2, 3, 4, 4), value) for value in (0.5, -0.5, 0.25))

    def loss(drawn, **values):
        return imitation_loss(drawn, wanted, image, dataclasses.replace(TINY, **values)).item()

    assert loss(wanted, image_weight=0.0) == 0
    assert loss(decoded, image_weight=0.0) == pytest.approx(0.25 + 0.0625)
    assert loss(decoded, image_weight=2.0) == pytest.approx(0.3125 + 2 * (0.75 + 0.5625))
    assert loss(decoded, teacher_weight=0.0) == pytest.approx(0.75 + 0.5625)
    both = math.log(0.0625 + 1e-5) + 2 * math.log(0.5625 + 1e-5)
    assert loss(decoded, image_weight=2.0, error="log-mse") == pytest.approx(both)


def test_a_decibel_is_as_much_of_an_easy_image_as_of_a_hard_one():
    image = torch.zeros(1, 3, 4, 4)
    losses = [log_error(image, image + 2 / 10 ** (decibels / 20)).item() for decibels in (20, 21, 30, 31)]
    for first, second in (losses[:2], losses[2:]):
        assert first - second == pytest.approx(math.log(10) / 10, rel=2e-2)


class Linear(nn.Module):
    """A decoder with an exact small equal: each latent pixel, through one matrix, becomes four of the image."""

    def __init__(self, matrix):
        super().__init__()
        self.matrix = nn.Parameter(matrix)

    def forward(self, latent):
        return nn.functional.pixel_shuffle(torch.einsum("oc,bchw->bohw", self.matrix, latent), 2)


@pytest.mark.parametrize("fault", [0.0, 0.1])
def test_the_student_that_is_the_linear_teacher_has_no_loss_and_a_wrong_one_has(
    make_teacher, tmp_path, monkeypatch, fault
):
    """The teacher and the student are put in place by hand; the loss is the one that training would follow."""
    matrix = 0.02 * torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    path = make_teacher(autoencoder=AutoencoderConfig(8, (1, 2), 1, 4, 0, "compact"))
    found = []

    def once(name, parts, loss, config, *rest, **options):
        found.append(loss(0, slice(0, config.batch_size))[0].item())
        return parts.state_dict()

    def build(teacher, described):
        teacher.decoder = Linear(matrix)
        student, parts = build_student(teacher, described)
        student.decoder = parts["decoder"] = Linear(matrix + fault)
        return student, parts

    monkeypatch.setattr(module, "run_stage", once)
    monkeypatch.setattr(module, "build_student", build)
    monkeypatch.setattr(module, "count_flops", lambda *rest: 0)
    monkeypatch.setattr(module, "write_student", lambda *rest: {})
    distil(path, tmp_path / "out", changed(widths=(8,), blocks=(0,), image_weight=0.0))
    assert (found[0] == 0) == (fault == 0)


def test_each_latent_is_that_of_its_image_mirrored_ones_and_photographs_too(make_teacher, tmp_path, monkeypatch):
    """What is encoded once, before the training, and what is drawn for a batch belong together."""
    path = make_teacher()
    teacher = load_reference(path).autoencoder
    encode = module.encode_images
    monkeypatch.setattr(module, "encode_images", lambda *given: (encode(*given)[0], torch.zeros(9999, 1, 1, 1)))
    pairs = []

    class Watched(module.Judged):
        def forward(self, latent, wanted):
            pairs.append((latent, wanted))
            return super().forward(latent, wanted)

    monkeypatch.setattr(module, "Judged", Watched)
    distil(path, tmp_path / "out", changed(steps=6, teacher_weight=0.0, latent_noise=0.0, photo_fraction=0.5))
    latents, wanted = (torch.cat(found) for found in zip(*pairs, strict=True))
    with torch.no_grad():
        mean = teacher.encode(wanted)[0]
    torch.testing.assert_close(latents, mean, atol=1e-4, rtol=0)
    assert (mean[1:] - mean[:-1]).abs().amax((1, 2, 3)).min() > 1e-2  # they differ


def test_a_small_encoder_is_asked_for_the_teachers_moments():
    described = {**dataclasses.asdict(AutoencoderConfig(8, (1, 2), 1, 4, 0, "compact"))}
    teacher = Autoencoder(**described)
    image = torch.rand(2, 3, 8, 8)
    mean, logvar = teacher.encode(image)
    std = torch.exp(0.5 * logvar)
    assert moments_loss(teacher, image, mean, std, 0.5).item() == 0
    assert moments_loss(teacher, image, mean + 1, std - 2, 0.5).item() == pytest.approx(0.25 + 1.0, rel=1e-5)


def test_only_the_decoder_is_new(make_teacher, tmp_path):
    path = make_teacher()
    record = distil(path, tmp_path / "out")
    teacher, student = load_reference(path), load_reference(tmp_path / "out")
    assert isinstance(student.autoencoder.decoder, SmallDecoder)
    for part in ("text_encoder", "unet"):
        ours, theirs = getattr(student, part).state_dict(), getattr(teacher, part).state_dict()
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    image = torch.rand(1, 3, 32, 32)
    assert torch.equal(student.autoencoder.encode(image)[0], teacher.autoencoder.encode(image)[0])
    assert student.tokenizer_text() == teacher.tokenizer_text()
    small = student.model["autoencoder"].pop("small_decoder")
    assert small == {"widths": [8, 8], "blocks": [1, 1], "scale": 0.7}
    assert student.model.pop("name") == teacher.model.pop("name") + "-small-decoder"
    assert student.model == teacher.model
    written = json.loads((tmp_path / "out" / "training.json").read_text())
    assert written == json.loads(json.dumps(record))
    assert record["figures"]["student"]["decoder_parameters"] < record["figures"]["teacher"]["decoder_parameters"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"Distilled from `tiny` (digest `{record['teacher']['digest']}`)" in card
    assert "ldm-deploy distill teacher --recipe decoder --config custom --data photos --out out" in card
    images = torch_pipeline(load_reference(tmp_path / "out"), 1)("one", seed=0, steps=2)
    assert images.shape == (1, 32, 32, 3)


def test_it_learns_what_the_teacher_draws(make_teacher, tmp_path):
    path = make_teacher()
    long = dataclasses.replace(TINY.training, steps=60, batch_size=8, warmup_steps=5, learning_rate=5e-3, ema_decay=0.9)
    distil(path, tmp_path / "out", dataclasses.replace(TINY, training=long, image_weight=0.0, latent_noise=0.0))
    lines = (tmp_path / "out.training" / "decoder.jsonl").read_text().splitlines()
    first, *_, last = [json.loads(line)["loss"] for line in lines]
    assert last < 0.85 * first


def test_a_decoder_of_the_same_latents_is_taken_as_it_is(make_teacher, tmp_path):
    path = make_teacher()
    distil(path, tmp_path / "small")
    other = load_reference(path)
    save_reference(tmp_path / "small", other.model, {name: getattr(other, name).state_dict() for name in WEIGHTS})
    with pytest.raises(TrainingError, match="has no small decoder to take"):
        distil(path, tmp_path / "out", init_from=tmp_path / "small")
    (tmp_path / "small").rename(tmp_path / "student")  # a student of the same autoencoder, with another U-Net
    distil(path, tmp_path / "small", resume=True)
    model = {**other.model, "name": "few-steps"}
    unet = {name: value + 1 for name, value in other.unet.state_dict().items()}
    weights = {name: getattr(other, name).state_dict() for name in ("autoencoder", "text_encoder")}
    save_reference(tmp_path / "student", model, {**weights, "unet": unet})
    record = distil(tmp_path / "student", tmp_path / "both", init_from=tmp_path / "small")
    both, small = load_reference(tmp_path / "both"), load_reference(tmp_path / "small")
    assert both.model["name"] == "few-steps-small-decoder"
    for name, value in both.autoencoder.state_dict().items():
        assert torch.equal(value, small.autoencoder.state_dict()[name])
    assert torch.equal(both.unet.conv_in.bias, (other.unet.conv_in.bias + 1).half().float())
    assert record["stages"] == {}
    card = (tmp_path / "both" / "README.md").read_text()
    assert f"The part is that of `tiny-small-decoder` (digest `{record['init_from']['digest']}`)." in card
    assert "--init-from small" in card
    weights["autoencoder"] = {name: value + 0.5 for name, value in weights["autoencoder"].items()}
    save_reference(tmp_path / "student", model, {**weights, "unet": unet})
    with pytest.raises(TrainingError, match="their encoders differ; distil a decoder from this one"):
        distil(tmp_path / "student", tmp_path / "out", init_from=tmp_path / "small")


def test_a_small_encoder_is_distilled_where_asked(make_teacher, tmp_path):
    path = make_teacher()
    distil(path, tmp_path / "out", changed(encoder=True))
    student = load_reference(tmp_path / "out")
    assert student.model["autoencoder"]["small_encoder"] == {"widths": [8, 8], "blocks": [1, 1]}
    mean, logvar = student.autoencoder.encode(torch.zeros(1, 3, 32, 16))
    assert mean.shape == logvar.shape == (1, 4, 8, 4)


def test_with_a_codebook_the_student_decodes_codes(make_teacher, tmp_path):
    path = make_teacher(autoencoder=AutoencoderConfig(8, (1, 1, 2), 1, 4, 0, "compact", kind="vq", codebook_size=16))
    distil(path, tmp_path / "out")
    teacher, student = load_reference(path).autoencoder, load_reference(tmp_path / "out").autoencoder
    assert torch.equal(student.quantizer.codebook, teacher.quantizer.codebook)
    latent = torch.randn(1, 4, 3, 3)
    assert torch.equal(student.decode(latent), student.decode(student.quantizer(latent)))


@pytest.mark.parametrize("adversarial", [False, True])
def test_a_resumed_run_equals_the_uninterrupted_one(make_teacher, tmp_path, monkeypatch, adversarial):
    path = make_teacher()
    config = changed(6, gan_weight=0.5 * adversarial, disc_layers=1, disc_channels=8)
    distil(path, tmp_path / "whole", config)
    distance = module.imitation_loss
    calls = []

    def stop(*arguments):
        calls.append(arguments)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return distance(*arguments)

    monkeypatch.setattr(module, "imitation_loss", stop)
    with pytest.raises(KeyboardInterrupt):
        distil(path, tmp_path / "cut", config)
    assert not (tmp_path / "cut").exists()
    distil(path, tmp_path / "cut", config, resume=True)
    whole, cut = (load_reference(tmp_path / name).autoencoder.state_dict() for name in ("whole", "cut"))
    assert all(torch.equal(value, cut[name]) for name, value in whole.items())


def test_a_loss_that_diverges_stops_with_the_last_good_state_and_a_knob(make_teacher, tmp_path, monkeypatch):
    path = make_teacher()
    calls = []

    def poisoned(decoded, *rest):
        calls.append(1)
        return imitation_loss(decoded, *rest) * (float("nan") if len(calls) == 4 else 1)

    monkeypatch.setattr(module, "imitation_loss", poisoned)
    with pytest.raises(TrainingError, match=r"the last good state is .*decoder\.safetensors\. Lower learning_rate"):
        distil(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_figures_of_held_out_images_are_those_of_what_was_written(make_teacher, tmp_path):
    """Of a data set in which every second image is held out by its name."""
    from PIL import Image

    from ldm_deploy.training.data import is_held_out

    folder = tmp_path / "data"
    folder.mkdir()
    kept = [name for name in map("{}.png".format, range(200)) if not is_held_out(name)][:4]
    out = [name for name in map("{}.png".format, range(200)) if is_held_out(name)][:2]
    rng = np.random.default_rng(0)
    for name in (*kept, *out):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / name)
    (folder / "metadata.csv").write_text("file_name,text\n" + "".join(f"{name},one\n" for name in (*kept, *out)))
    seen = []

    def measure(originals, rebuilt):
        seen.append((originals, rebuilt))
        return {"held_out_psnr_db": float(len(originals))}

    def perceptual(backbone):
        return lambda one, other: (one - other).abs().mean((1, 2, 3))

    config = changed(perceptual_weight=0.5)
    record = distill_decoder(
        make_teacher(), folder, tmp_path / "out", config=config, threads=1, measure=measure, perceptual=perceptual
    )
    (originals, _), (_, rebuilt) = seen[-2:]
    figures = record["figures"]
    assert figures["held_out"] == len(originals) == 2
    assert figures["student"]["held_out_psnr_db"] == 2
    student = load_reference(tmp_path / "out").autoencoder
    image = torch.from_numpy(originals.astype(np.float32)).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        own = student.decode(student.encode(image)[0])
    shown = torch.from_numpy(rebuilt.astype(np.float32)).permute(0, 3, 1, 2) / 127.5 - 1
    assert (own - shown).abs().max() < 1 / 127
    assert figures["student"]["held_out_perceptual"] == pytest.approx((image - shown).abs().mean().item(), rel=1e-3)
    assert (
        "| reconstruction, PSNR | 2 dB | 2 dB | mean over 2 held-out images, peak 255 |"
        in (tmp_path / "out" / "README.md").read_text()
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"widths": (8,), "blocks": (1,)}, r"enlarges 2 times, .* 4 times smaller than images; give 2 levels"),
        ({"perceptual_weight": 0.1}, r"there is no perceptual distance; .*set perceptual_weight = 0"),
    ],
)
def test_what_does_not_fit_is_refused(make_teacher, tmp_path, values, message):
    with pytest.raises((ConfigError, TrainingError), match=message):
        distil(make_teacher(), tmp_path / "out", changed(**values))


def test_a_student_is_no_teacher_and_is_not_trained_on(make_teacher, tmp_path):
    from ldm_deploy.config import PRESETS as MODELS

    path = make_teacher()
    distil(path, tmp_path / "student")
    with pytest.raises(TrainingError, match="has a small decoder already; give the reference it was distilled from"):
        distil(tmp_path / "student", tmp_path / "out")
    with pytest.raises(TrainingError, match="student exists; remove it"):
        distil(path, tmp_path / "student")
    with pytest.raises(TrainingError, match="distilled encoder or decoder, which is not trained further"):
        train(MODELS["tiny"], "photos", tmp_path / "out", init_from=tmp_path / "student")


def test_bad_paths_and_too_little_data_are_named(make_teacher, tmp_path):
    path = make_teacher()
    with pytest.raises(ArtifactError, match="is no model"):
        distil(tmp_path / "absent", tmp_path / "out")
    many = dataclasses.replace(TINY, training=dataclasses.replace(TINY.training, batch_size=513))
    with pytest.raises(DataError, match=r"has 512 images to train on, fewer than one batch \(513\)"):
        distil(path, tmp_path / "out", many)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("widths = [8]", r"widths is \[8\] and blocks \[2, 3\]; give both for each level"),
        ("latent_noise = -1.0", "latent_noise is -1.0; give 0 or more"),
        ("error = 'l2'", "error is 'l2'; allowed: l1[+]mse, log-mse"),
        ("teacher_weight = 0.0\nimage_weight = 0.0", "teacher_weight and image_weight are 0, so that there is nothing"),
        ("photo_fraction = 2.0", "photo_fraction is 2.0; allowed: 0 to 1"),
        ("perceptual_backbone = 'inception'", "perceptual_backbone is 'inception'; allowed: squeeze, alex, vgg"),
        ("latent_nois = 1.0", "unknown key 'latent_nois'; did you mean 'latent_noise'"),
        ("[training]\nsteps = 0", "training.steps is 0; give 1 or more"),
        ("[training]\nresolutions = [32]\ngrow_at = [2]", "not for a decoder"),
        ("disc_layers = 0", "disc_layers is 0; give 1 or more"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(tmp_path, text, message):
    file = tmp_path / "own.toml"
    file.write_text(f"preset = 'gpu'\n{text}\n")
    with pytest.raises(ConfigError, match=message):
        load_decoder_config(file)
