"""How large a quantized component may be, so that the variant it becomes part of keeps the budget's `size_max`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ldm_deploy.eval.budget import MULTIPLE

if TYPE_CHECKING:
    from ldm_deploy.eval.budget import Limits


def size_limit(limits: Limits, sizes: Mapping[str, int], baseline_bytes: int, to_come: Sequence[str]) -> float:
    """Bytes that the first of `to_come`, the components still to be quantized, may have; infinite without `size_max`.

    `sizes`: every engine of the variant as things stand. What the limit leaves beside those that stay as they are is
    shared among those to come in proportion; the last one gets all that the others saved. `baseline_bytes`: of all
    engines in fp32, about the baseline's size, of which "0.6x" is a multiple.
    """
    given = limits.limits.get("size_max")
    if given is None:
        return math.inf
    multiple = MULTIPLE.fullmatch(given) if isinstance(given, str) else None
    total = float(given) if multiple is None else float(multiple[1]) * baseline_bytes
    left = total - sum(size for name, size in sizes.items() if name not in to_come)
    return left * sizes[to_come[0]] / sum(sizes[name] for name in to_come)
