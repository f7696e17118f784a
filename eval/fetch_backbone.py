"""Fetch the LPIPS backbone (SqueezeNet 1.1, 5 MB) into torch hub's folder: one try, never required.

`python -m ldm_deploy.eval.fetch_backbone`, called by `make setup`. It always exits 0: without the backbone
reports say that LPIPS was not measured. torch hub checks the download against the hash in the file's name.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

TIMEOUT_S = 5.0  # for connecting and for each read


def fetch() -> str:
    """Try once. Returns one line that says what came of it."""
    import torch
    from torchvision.models import SqueezeNet1_1_Weights

    url = SqueezeNet1_1_Weights.IMAGENET1K_V1.url
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    name = os.path.basename(url)
    if (folder / name).is_file():
        return f"LPIPS backbone: {name} is there"
    try:
        socket.setdefaulttimeout(TIMEOUT_S)
        torch.hub.load_state_dict_from_url(url, progress=False, check_hash=True, weights_only=True)
    except (OSError, RuntimeError, ValueError) as error:
        (folder / name).unlink(missing_ok=True)
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return f"LPIPS backbone: not fetched ({reason}), so LPIPS will not be measured; try again: make setup"
    return f"LPIPS backbone: {name} fetched to {folder}"


if __name__ == "__main__":
    print(fetch())
