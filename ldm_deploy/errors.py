"""The errors a user can meet. Each message is one line: what, the value received, what is allowed, what to do."""

from __future__ import annotations


class LdmDeployError(Exception):
    """Base of every error raised on purpose. `exit_code` is what `ldm-deploy` returns for it."""

    exit_code = 1


class ConfigError(LdmDeployError):
    """A configuration or an argument that cannot be used."""

    exit_code = 2


class BudgetError(ConfigError):
    """A budget file that cannot be used."""


class PromptError(ConfigError):
    """A request to the pipeline (prompt, seed, size, steps) that cannot be served."""


class DataError(LdmDeployError):
    """Training or evaluation data that is missing, empty or damaged."""


class TrainingError(LdmDeployError):
    """Training that cannot go on."""


class ArtifactError(LdmDeployError):
    """A directory written by one of our stages that is damaged, or cannot be written."""


class BundleError(ArtifactError):
    """A bundle that must not be loaded."""


class EngineError(LdmDeployError):
    """An engine that cannot be opened, or that returned something unusable."""


class ExportError(LdmDeployError):
    """A model that cannot be turned into an engine."""


class ParityError(ExportError):
    """An engine that was built without complaint and computes something else."""


class QuantizationError(LdmDeployError):
    """A model that cannot be quantized, or a calibration set that does not fit."""


class EvaluationError(LdmDeployError):
    """An evaluation that cannot be carried out."""


class StageMissingError(LdmDeployError):
    """A stage that this version does not have yet."""
