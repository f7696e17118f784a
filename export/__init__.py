"""The `export` stage; import it as `ldm_deploy.export`."""

if __name__ != "ldm_deploy.export":
    raise ImportError(f"import this package as ldm_deploy.export, not as {__name__!r}")
