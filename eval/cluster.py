"""A function over many arguments on a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import TypeVar

from ldm_deploy.errors import ConfigError

Argument = TypeVar("Argument")
Result = TypeVar("Result")


def spread(
    function: Callable[[Argument], Result],
    arguments: Iterable[Argument],
    address: str,
    *,
    workers: int,
    threads: int = 1,
) -> Iterator[tuple[Argument, Result]]:
    """Every argument with its result, in the order they are finished.

    `address`: as `ray.init` takes it; "local" starts a cluster of `workers` here. A call takes `threads` processors.
    Arguments are drawn as processors become free, so that what they name may be made then. Every node must have this
    package, and find files under the same paths. What the function raises is raised here; `ConfigError` without Ray, or
    without such a cluster.
    """
    try:
        import ray
    except ImportError:
        raise ConfigError("--ray needs the package ray: pip install 'ldm-deploy[ray]', or leave --ray out") from None
    try:
        ray.init(
            address, num_cpus=workers * threads if address == "local" else None, logging_level="error",
            log_to_driver=False,
        )  # fmt: skip
    except (ConnectionError, ValueError, RuntimeError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"no Ray cluster at {address!r} ({first}); give its address, auto or local") from None
    try:
        call = ray.remote(num_cpus=threads)(function)
        todo = iter(arguments)
        at_once = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)) // threads)
        waiting = {call.remote(argument): argument for argument in islice(todo, at_once)}
        while waiting:
            done, _ = ray.wait(list(waiting), num_returns=1)
            for handle in done:
                try:
                    found = ray.get(handle)
                except ray.exceptions.RayTaskError as error:
                    raise error.cause from None
                yield waiting.pop(handle), found
                waiting |= {call.remote(argument): argument for argument in islice(todo, 1)}
    finally:
        ray.shutdown()
