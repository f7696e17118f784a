"""The `quantize` stage; import it as `ldm_deploy.quantize`."""

if __name__ != "ldm_deploy.quantize":
    raise ImportError(f"import this package as ldm_deploy.quantize, not as {__name__!r}")
