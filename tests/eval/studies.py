"""sensitivity, timestep_error and search.json by hand: small, and with every kind of entry that there can be."""

from __future__ import annotations

from typing import Any

PROTOCOL: dict[str, Any] = {
    "sampler": "ddim", "steps": 50, "guidance_scale": 4.0, "prompts": ["red apple"], "seeds": [0, 1], "threads": 2,
}  # fmt: skip


def layer(name: str, psnr_db: float | None, won_ms: float | None, changed: bool | None, reason: str | None) -> Any:
    quality = None
    if psnr_db is not None:
        quality = {"mean": psnr_db, "worst": psnr_db - 4, "ci95": [psnr_db - 1, psnr_db + 1], "n": 2}
    time = None if won_ms is None else {"median": won_ms, "ci95": None}
    return {
        "name": name, "op": "Conv", "image_psnr_db": quality, "time_won_ms": time, "changed": changed, "reason": reason,
    }  # fmt: skip


def sensitivity() -> dict[str, Any]:
    layers = [
        layer("conv_in", 31.5, 0.1, False, None),
        layer("mid.attention", 48.25, -0.05, False, None),
        layer("mid.conv", 52.0, 0.4, True, None),
        layer("mid.norm", None, None, None, "no int8 kernel"),
        layer("conv_out", 100.0, None, True, "it is fused with the layer before"),
    ]
    study = {
        "component": "unet", "runtime": "onnxruntime", "device": "cpu", "precision": "int8", "versus": "fp32",
        "latency_ms": 9.8, "layers": layers,
    }  # fmt: skip
    return {"format": 1, "created": "2026-01-01T00:00:00+00:00", "protocol": PROTOCOL, "studies": [study]}


def timestep_error() -> dict[str, Any]:
    def step(timestep: int, prediction: float | None, latent: float, reason: str | None = None) -> Any:
        return {
            "timestep": timestep,
            "prediction_psnr_db": None if prediction is None else figures(prediction),
            "latent_psnr_db": figures(latent),
            "reason": reason,
        }

    def figures(mean: float) -> Any:
        return {"mean": mean, "worst": mean - 3, "ci95": [mean - 1, mean + 1], "n": 2}

    steps = [step(999, 35.0, 50.0), step(500, 45.5, 41.0), step(0, None, 33.0, "the last step predicts nothing")]
    series = {
        "component": "unet", "engine": "unet-int8-onnxruntime-cpu", "precision": "int8", "runtime": "onnxruntime",
        "device": "cpu", "versus": "fp32-torch-cpu", "steps": steps,
    }  # fmt: skip
    return {"format": 1, "created": "2026-01-01T00:00:00+00:00", "protocol": PROTOCOL, "series": [series]}


def search() -> dict[str, Any]:
    def one(layers: int, psnr_db: float, speedup: float, refused: str | None = None, **what: bool) -> Any:
        return {
            "layers": [f"conv{index}" for index in range(layers)], "psnr_db": psnr_db, "speedup": speedup,
            "ci95": [speedup - 0.05, speedup + 0.05], "refused": refused, "pareto": False, "best": False, **what,
        }  # fmt: skip

    measured = [
        one(4, 30.0, 1.6, pareto=True),
        one(2, 36.0, 1.4, pareto=True, best=True),
        one(1, 35.0, 1.1),
        one(3, 12.0, 1.5, "it differs from the reference"),
    ]
    about = {"component": "unet", "runtime": "onnxruntime", "device": "cpu", "precision": "int8", "psnr_db_min": 34.0}
    return {"format": 1, "created": "2026-01-01T00:00:00+00:00", "searches": [{**about, "measured": measured}]}
