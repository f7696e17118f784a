"""Images of many engines on a Ray cluster: what a layer costs in quality can be found anywhere, what it wins in time
only at home."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from ldm_deploy.quantize import cpu
from ldm_deploy.quantize.drawing import Drawing, Studio
from ldm_deploy.quantize.kit import Spec


@dataclass(frozen=True)
class Far:
    """Draws on the Ray cluster at `address`, whose nodes see bundle and engines under the same paths."""

    address: str
    studio: Studio

    def images(self, component: str, specs: Iterable[tuple[str, Spec]]) -> Iterator[tuple[str, np.ndarray | None]]:
        """(name, uint8 images) of every (name, spec), as they are finished.

        None: the node that was to draw multiplies 8 bits in another way than this machine, so that what it draws is not
        what is drawn here.
        """
        from ldm_deploy.eval.cluster import spread
        from ldm_deploy.eval.machine import usable_threads

        threads = self.studio.threads
        jobs = (_Job(name, component, spec, self.studio, cpu.has_vnni()) for name, spec in specs)
        workers = max(1, usable_threads() // threads)
        for job, found in spread(_draw, jobs, self.address, workers=workers, threads=threads):
            yield job.name, found


@dataclass(frozen=True)
class _Job:
    name: str
    component: str
    spec: Spec
    studio: Studio
    vnni: bool | None


def _draw(job: _Job) -> np.ndarray | None:
    from ldm_deploy.eval.worker import open_file

    if cpu.has_vnni() is not job.vnni:
        return None
    return _opened(job.studio).images(job.component, open_file(job.spec, job.studio.threads))


@functools.lru_cache(maxsize=1)  # a process draws for many layers
def _opened(studio: Studio) -> Drawing:
    return studio.open()
