"""The `eval` stage; import it as `ldm_deploy.eval`."""

if __name__ != "ldm_deploy.eval":
    raise ImportError(f"import this package as ldm_deploy.eval, not as {__name__!r}")
