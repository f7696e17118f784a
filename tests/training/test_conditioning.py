"""Captions, classes or no condition; a text encoder from elsewhere; images that grow; dropout."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image

from ldm_deploy.config import PRESETS, AutoencoderConfig, Config, TextEncoderConfig
from ldm_deploy.errors import ArtifactError, ConfigError, DataError, PromptError
from ldm_deploy.models.autoencoder import Autoencoder
from ldm_deploy.models.clip import load_clip, load_clip_tokenizer, read_clip_config
from ldm_deploy.models.layers import Dropout
from ldm_deploy.models.reference import load_reference
from ldm_deploy.models.torch_engine import torch_pipeline
from ldm_deploy.models.unet import UNet
from ldm_deploy.training.conditioning import choose_prompts
from ldm_deploy.training.train import train


def tiny(**changes) -> Config:
    return dataclasses.replace(PRESETS["tiny"], autocast_bf16=False, **changes)


def test_resolution_grows_in_both_stages(tmp_path, monkeypatch):
    sizes: list[tuple[str, int]] = []
    for kind, name in ((Autoencoder, "autoencoder"), (UNet, "unet")):
        forward = kind.forward

        def seen(self, x, *others, forward=forward, name=name):
            if self.training:
                sizes.append((name, x.shape[-1]))
            return forward(self, x, *others)

        monkeypatch.setattr(kind, "forward", seen)
    grow = {"resolutions": (16,), "grow_at": (2,)}
    config = tiny(
        autoencoder_training=dataclasses.replace(PRESETS["tiny"].autoencoder_training, **grow),
        diffusion_training=dataclasses.replace(PRESETS["tiny"].diffusion_training, **grow),
    )
    train(config, "photos", tmp_path / "model", threads=1)
    latent = [side // config.autoencoder.downsampling for side in (16, 16, 32, 32)]
    assert sizes == [("autoencoder", side) for side in (16, 16, 32, 32)] + [("unet", side) for side in latent]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve flat images with captions and two classes."""
    path = tmp_path_factory.mktemp("data") / "d"
    path.mkdir()
    lines = ["file_name,text,label"]
    for index in range(12):
        kind = ("red", "blue")[index % 2]
        colour = {"red": (250, 10, 10), "blue": (10, 10, 250)}[kind]
        Image.fromarray(np.full((32, 32, 3), colour, np.uint8)).save(path / f"{index}.png")
        lines.append(f"{index}.png,a {kind} square,{kind}")
    (path / "metadata.csv").write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def labelled(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("labelled") / "model"
    stage = dataclasses.replace(PRESETS["tiny"].diffusion_training, preview_every=4)
    train(tiny(conditioning="labels", diffusion_training=stage), folder, out, threads=1)
    return out


def test_a_labelled_model_has_a_token_per_class_and_refuses_other_classes(labelled):
    reference = load_reference(labelled)
    assert reference.model["context_length"] == 2
    assert reference.model["conditioning"] == "labels"
    assert reference.model["prompts"]["report"] == ["blue", "red"]
    contexts = reference.text_encoder(torch.tensor([[0, 0], [1, 0], [2, 0]]))
    assert contexts.shape == (3, 2, reference.model["text_encoder"]["width"])
    assert len({tuple(row.flatten().tolist()) for row in contexts}) == 3
    pipeline = torch_pipeline(reference)
    assert pipeline(["red", "blue"], seed=0, steps=2).shape == (2, 32, 32, 3)
    with pytest.raises(PromptError, match="prompt 'green' is none of the classes the model was trained on"):
        pipeline("green", seed=0, steps=1)
    assert "a class-conditional latent diffusion model" in (labelled / "README.md").read_text()
    assert list((labelled.with_name("model.training") / "previews").glob("diffusion-*.png"))


def test_going_on_from_a_labelled_model_needs_its_classes(labelled, tmp_path):
    with pytest.raises(ConfigError, match=r"conditioning is 'captions' and .* was trained with 'labels'; set cond"):
        train(tiny(), "photos", tmp_path / "model", threads=1, init_from=labelled)
    with pytest.raises(DataError, match="the data has a class that the model to go on from does not know"):
        train(tiny(conditioning="labels"), "photos", tmp_path / "model", threads=1, init_from=labelled)


def test_an_unconditional_model_needs_no_captions_and_no_guidance(folder, tmp_path):
    data = tmp_path / "d"
    data.mkdir()
    for image in folder.glob("*.png"):
        (data / image.name).write_bytes(image.read_bytes())
    (data / "metadata.csv").write_text("\n".join(["file_name", *(f"{n}.png" for n in range(12))]) + "\n")
    with pytest.raises(DataError, match="no file_name or no text"):
        train(tiny(), data, tmp_path / "model", threads=1)
    train(tiny(conditioning="none"), data, tmp_path / "model", threads=1)
    reference = load_reference(tmp_path / "model")
    assert reference.model["sampling"]["guidance_scale"] == 1
    assert reference.model["prompts"] == {"report": [""], "calibration": [""]}
    assert torch_pipeline(reference)("", seed=0, steps=2).shape == (1, 32, 32, 3)


def test_prompts_are_the_preferred_ones_if_the_data_has_them():
    texts = [f"{index:02d}" for index in range(60)] * 2
    assert choose_prompts(texts, ["07", "03"])["report"] == ["07", "03"]
    own = choose_prompts(texts, ["07", "unicorn"])
    assert own["report"] == sorted(own["report"])
    assert (len(own["report"]), len(own["calibration"])) == (24, 32)
    assert set(own["report"]).isdisjoint(own["calibration"])


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A CLIPTextModel with random weights and a tokenizer, as transformers saves them; the model itself."""
    transformers = pytest.importorskip("transformers")
    directory = tmp_path_factory.mktemp("clip") / "text_encoder"
    torch.manual_seed(0)
    config = transformers.CLIPTextConfig(
        vocab_size=600, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=12, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = transformers.CLIPTextModel(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(directory)
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters), "re", "red</w>"]
    (directory.parent / "tokenizer").mkdir()
    vocabulary = {word: index for index, word in enumerate(words)}
    (directory.parent / "tokenizer" / "vocab.json").write_text(json.dumps(vocabulary))
    (directory.parent / "tokenizer" / "merges.txt").write_text("#version: 0.2\nr e\nre d</w>\n")
    return directory, model


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_clip_text_encoder_equals_transformers(clip, activation, tmp_path):
    _, theirs = clip
    theirs.config.hidden_act = activation
    theirs.save_pretrained(tmp_path)
    theirs = type(theirs).from_pretrained(tmp_path, local_files_only=True).eval()
    ids = torch.randint(0, 600, (3, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(load_clip(tmp_path)(ids), theirs(ids).last_hidden_state, rtol=1e-5, atol=1e-5)


def test_clip_tokenizer_equals_transformers_and_pads_to_the_context(clip):
    transformers = pytest.importorskip("transformers")
    directory, _ = clip
    theirs = transformers.CLIPTokenizer.from_pretrained(directory.parent / "tokenizer", local_files_only=True)
    ours = load_clip_tokenizer(directory, 12)
    for text in ("red", "a red square", ""):
        expected = theirs(text, padding="max_length", max_length=12)["input_ids"]
        assert ours.encode(text).ids == expected


def test_a_model_is_trained_on_a_clip_text_encoder_that_stays_as_it_is(clip, folder, tmp_path):
    directory, theirs = clip
    config = tiny(text_encoder=TextEncoderConfig(pretrained=str(directory)))
    train(config, folder, tmp_path / "model", threads=1)
    reference = load_reference(tmp_path / "model")
    assert (reference.model["text_encoder"]["kind"], reference.model["context_length"]) == ("clip", 12)
    ids = torch.tensor([[0, 5, 1, 1]])
    with torch.no_grad():
        expected = theirs(ids).last_hidden_state
        torch.testing.assert_close(reference.text_encoder(ids), expected, rtol=1e-2, atol=2e-2)  # stored as fp16
    assert torch_pipeline(reference)("red", seed=0, steps=2).shape == (1, 32, 32, 3)
    further = dataclasses.replace(config, lora_rank=2)
    train(further, folder, tmp_path / "further", threads=1, init_from=tmp_path / "model")
    again = load_reference(tmp_path / "further").text_encoder.state_dict()
    assert all(torch.equal(value, again[name]) for name, value in reference.text_encoder.state_dict().items())


def test_what_is_no_clip_text_encoder_is_refused(clip, tmp_path):
    directory, _ = clip
    with pytest.raises(
        ArtifactError, match=r"config\.json cannot be read .*; give a directory written by transformers"
    ):
        read_clip_config(tmp_path)
    with pytest.raises(ArtifactError, match=r"there is no tokenizer\.json, nor vocab\.json and merges\.txt"):
        load_clip_tokenizer(tmp_path / "text_encoder", 12)
    config = json.loads((directory / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "t5"}))
    with pytest.raises(ArtifactError, match="model_type is 't5'; give a CLIP text model"):
        load_clip(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_act": "relu"}))
    with pytest.raises(ArtifactError, match=r"hidden_act is 'relu' .*this version reads quick_gelu or gelu"):
        load_clip(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    (tmp_path / "model.safetensors").write_bytes((directory / "model.safetensors").read_bytes())
    with pytest.raises(ArtifactError, match=r"'encoder\.layers\.2\..*' is not there; config\.json asks for"):
        load_clip(tmp_path)
    with pytest.raises(ConfigError, match="conditioning is 'labels'; a pretrained text encoder reads captions"):
        tiny(conditioning="labels", text_encoder=TextEncoderConfig(pretrained="x"))


def test_dropout_does_not_depend_on_how_the_batch_is_cut():
    x = torch.ones(6, 4, 8, 8)
    dropout = Dropout()
    assert dropout(x) is x
    dropout.rate = 0.25
    torch.manual_seed(3)
    whole = dropout(x)
    assert whole.unique().tolist() == pytest.approx([0, 4 / 3])
    assert (whole == 0).float().mean().item() == pytest.approx(0.25, abs=0.03)
    parts = []
    for rows in (slice(0, 2), slice(2, 6)):
        torch.manual_seed(3)
        dropout.part = rows, 6
        parts.append(dropout(x[rows]))
    assert torch.equal(torch.cat(parts), whole)
    dropout.eval()
    assert dropout(x) is x


def test_training_with_dropout_is_the_same_in_parts_and_after_a_stop(tmp_path):
    model = dataclasses.replace(PRESETS["tiny"].autoencoder, dropout=0.2)
    stage = dataclasses.replace(PRESETS["tiny"].autoencoder_training, checkpoint_every=2)
    config = tiny(autoencoder=model, autoencoder_training=stage)

    def weights(run: str, config: Config, **options):
        train(config, "photos", tmp_path / run, threads=1, **options)
        return load_reference(tmp_path / run).autoencoder.state_dict()

    whole = weights("whole", config)
    parts = weights(
        "parts", dataclasses.replace(config, autoencoder_training=dataclasses.replace(stage, accumulation=2))
    )
    plain = weights("plain", tiny(autoencoder_training=stage))
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-2, atol=2e-4)  # fp16 rounds what differs by 1e-6
    assert any(not torch.allclose(plain[name], value, atol=1e-4) for name, value in whole.items())


def test_a_share_that_is_no_share_is_refused():
    with pytest.raises(ConfigError, match=r"autoencoder\.dropout is 1\.0; allowed: 0 to below 1"):
        tiny(autoencoder=AutoencoderConfig(8, (1, 2), 1, 4, 0, "compact", dropout=1.0))
