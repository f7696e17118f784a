"""Configurations: presets, TOML, and what is refused."""

from __future__ import annotations

import pytest

from ldm_deploy.config import PRESETS, load_config
from ldm_deploy.errors import ConfigError


def test_presets_and_derived_sizes():
    reference = load_config("reference")
    assert reference is PRESETS["reference"]
    assert reference.size_multiple == 16
    assert reference.autoencoder.downsampling == 4
    assert reference.to_dict()["format"] == 1


def test_toml_changes_what_it_names_and_nothing_else(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text(
        'preset = "tiny"\nphoto_fraction = 1\n[unet]\nchannels = [16, 48]\n[autoencoder_training]\nsteps = 7\n'
    )
    config = load_config(file)
    assert config.unet.channels == (16, 48)
    assert config.autoencoder_training.steps == 7
    assert config.photo_fraction == 1.0
    assert config.unet.num_heads == PRESETS["tiny"].unet.num_heads


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("resolutoin = 64", "unknown key 'resolutoin'; did you mean 'resolution'"),
        ("[unet]\nchanels = [1]", r"\[unet\]: unknown key 'chanels'; did you mean 'channels'"),
        ("resolution = '64'", "resolution is '64'; give an integer"),
        ("resolution = 40", "resolution is 40; it must be a multiple of 16"),
        ("unet = 3", r"unet is 3; give a table \[unet\]"),
        ("[unet]\nchannels = 64", "channels is 64; give a list of integers"),
        ("[unet]\nnum_heads = [1, 3, 1]", r"channels\[1\] is 80, no multiple of num_heads\[1\] 3; change one of them"),
        ("[unet]\nnum_heads = [1]", r"num_heads is \[1\]; give one number for each of the 3 levels"),
        (
            "[unet]\nnorm_groups = 48",
            r"unet: the levels have \[64, 80, 112\] channels, and norm_groups is 48; each width",
        ),
        ("[unet]\nlayout = 'sd2'", r"unet\.layout is 'sd2'; allowed: compact, sd1"),
        (
            "[autoencoder]\nch = 20\nnorm_groups = 8",
            r"autoencoder: the levels have \[20, 40, 60\] channels, and norm_groups",
        ),
        ("[autoencoder]\nch_mult = []", r"autoencoder: the levels have \[\] channels; give 1 or more"),
        ("[unet]\nattention_levels = [3]", "attention_levels names level 3"),
        ("[text_encoder]\nwidth = 100", r"text_encoder\.width is 100"),
        ("[autoencoder]\nkind = 'vae'", "autoencoder.kind is 'vae'; allowed: kl, vq"),
        ("[autoencoder_loss]\ndisc_norm = 'layer'", "disc_norm is 'layer'; allowed: group, batch, none"),
        (
            "[autoencoder_loss]\nperceptual_backbone = 'vgg19'",
            "perceptual_backbone is 'vgg19'; allowed: squeeze, alex, vgg",
        ),
        ("[autoencoder_loss]\ngan_weight = -1", r"autoencoder_loss\.gan_weight is -1\.0; give 0 or more"),
        ("[autoencoder_loss]\ndisc_layers = 0", r"autoencoder_loss\.disc_layers is 0; give 1 or more"),
        ("[objective]\ntimestep_sampling = 'log'", "timestep_sampling is 'log'; allowed: uniform, logit_normal"),
        ("[objective]\nmin_snr_gamma = -1", r"objective\.min_snr_gamma is -1\.0; give 0 \(off\) or more"),
        ("[diffusion_training]\naccumulation = 99", "accumulation is 99; a batch of 32 has no more parts than images"),
        ("caption_dropout = 1.5", "caption_dropout is 1.5; allowed: 0 to 1"),
        ("[diffusion_training]\nsteps = 0", r"diffusion_training\.steps is 0"),
        ("conditioning = 'label'", "conditioning is 'label'; allowed: captions, labels, none"),
        ("[diffusion_training]\nresolutions = [32]", "has 1 resolutions and 0 steps in grow_at; give each"),
        ("[diffusion_training]\nresolutions = [72]\ngrow_at = [9]", r"resolutions is \[72\]; give rising ones below"),
        ("[diffusion_training]\nresolutions = [36]\ngrow_at = [9]", "resolutions has 36; each must be a multiple of"),
        ("[autoencoder_training]\nresolutions = [32]\ngrow_at = [0]", r"grow_at is \[0\]; give rising steps between"),
        ("[diffusion_training]\nrestarts = [20, 10]", r"restarts is \[20, 10\]; give rising steps between 0 and"),
        ("[schedule]\nbeta_schedule = 'cosy'", "beta_schedule is 'cosy'; allowed: linear, scaled_linear"),
        ("[schedule]\nprediction_type = 'epsilon'", "needs prediction_type = 'v_prediction'"),
        ("preset = 'huge'", "preset is 'huge'; allowed: reference, quick, tiny"),
        ("a = [", "is no valid TOML"),
    ],
)
def test_bad_configurations_are_refused_in_one_line(tmp_path, text, message):
    file = tmp_path / "c.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(file)
    assert "\n" not in str(caught.value)


def test_missing_file_names_the_presets():
    with pytest.raises(ConfigError, match="no file and no preset; presets: reference, quick, tiny"):
        load_config("none.toml")
