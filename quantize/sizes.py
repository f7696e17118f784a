"""How large a quantized component may be, so that the variant it becomes part of keeps the budget's `size_max`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ldm_deploy.eval.budget import MULTIPLE

if TYPE_CHECKING:
    from ldm_deploy.eval.budget import Limits


def size_limits(limits: Limits, fp32_bytes: Mapping[str, int], quantized: Sequence[str]) -> dict[str, float]:
    """Component -> bytes, for those in `quantized`; none without a `size_max`.

    `fp32_bytes`: the size of every fp32 engine of the variant. What the limit leaves beside the engines that stay as
    they are is shared in proportion to the size in fp32. Which is about the baseline's, of which "0.6x" is a multiple.
    """
    given = limits.limits.get("size_max")
    if given is None:
        return {}
    multiple = MULTIPLE.fullmatch(given) if isinstance(given, str) else None
    total = float(given) if multiple is None else float(multiple[1]) * sum(fp32_bytes.values())
    left = total - sum(size for name, size in fp32_bytes.items() if name not in quantized)
    shrinking = sum(fp32_bytes[name] for name in quantized)
    return {name: left * fp32_bytes[name] / shrinking for name in quantized}
