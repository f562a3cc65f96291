"""Every exception that a user can see.

GrpoError
  UsageError            wrong option, argument or combination of them
  ConfigError           the configuration does not say one clear thing
  SourceError           prompts cannot be read from where the config points
  StoreError            an object store cannot be read or written
    StoreUnreachable    by what may pass: the network, a busy store
  ArtifactError         an artifact is not what its manifest says
    ArtifactMissing     no finished artifact at this place
    ArtifactDamaged     a file differs from the manifest, or cannot be read
    ArtifactTooLarge    rows that would fill the memory
    RecipeMismatch      the place is taken by an artifact made by another recipe
  SchemaError           columns differ from the documented schema
  RewardError           a reward function cannot be imported, or fails too often
  CheckFailed           a check of severity block holds an iteration
  PolicyError           a checkpoint cannot be used as a policy
  EngineError           the inference engine cannot start, or fails
    EngineDied          its process has ended in mid-work
  ServerError           Prefect's server cannot start, or died
  UntrustedFunction     only a recorded config names a function from outside of the library, or an address
  OutOfSpace            the device is full

Messages have three parts: what was found, what was expected, what to do. Each class also inherits the nearest
standard one, and holds nothing but its message, so that it survives its way between processes.
"""


class GrpoError(Exception):
    """Base of every error that is shown to the user as one message, with exit code 2."""


class UsageError(GrpoError, ValueError):
    """A wrong option, argument, or combination of them."""


class ConfigError(GrpoError, ValueError):
    """The configuration does not say one clear thing."""


class SourceError(GrpoError, ValueError):
    """Prompts cannot be read from where the configuration points."""


class StoreError(GrpoError, OSError):
    """An object store cannot be read or written."""


class StoreUnreachable(StoreError):
    """An object store cannot be read or written for now: the network, a busy store."""


class ArtifactError(GrpoError, ValueError):
    """An artifact is not what its manifest says."""


class ArtifactMissing(ArtifactError):
    """There is no finished artifact at this place."""


class ArtifactDamaged(ArtifactError):
    """A file of an artifact differs from what the manifest says, or cannot be read."""


class ArtifactTooLarge(ArtifactError):
    """The rows of an artifact would fill the memory, although its files are small."""


class RecipeMismatch(ArtifactError):
    """The place is taken by an artifact that another recipe made."""


class SchemaError(GrpoError, ValueError):
    """Columns differ from the documented schema."""


class RewardError(GrpoError, ValueError):
    """A reward function cannot be imported, or fails for too many completions."""


class CheckFailed(GrpoError, ValueError):
    """A check of severity block holds an iteration: nothing is trained on its rows."""


class PolicyError(GrpoError, ValueError):
    """A checkpoint cannot be used as a policy."""


class EngineError(GrpoError, RuntimeError):
    """The inference engine cannot start, or fails."""


class EngineDied(EngineError):
    """The process of the inference engine has ended in mid-work."""


class ServerError(GrpoError, RuntimeError):
    """Prefect's server cannot start, or died."""


class UntrustedFunction(GrpoError, ValueError):
    """Only a config that a run has recorded names a function from outside of the library, or an address."""


class OutOfSpace(GrpoError, OSError):
    """The device that holds the run is full."""


MAY_PASS = (EngineDied, StoreUnreachable)
"""What the same work may not meet again."""
