"""policy: a hub name, a checkpoint directory or a starter -> the artifact that a run begins with.

transformers and vLLM load the artifact as it is: weights in float32, configuration, tokenizer.
"""

import shutil
from pathlib import Path

from pydantic import Field

from pipeline.config import Place, StrictModel
from pipeline.errors import PolicyError
from pipeline.functions import ON_THE_HUB, check_permitted
from pipeline.stage import Stage, StageTask
from stages.checkpoints import OPTIMIZER_FILE, STATE_FILE, check_stop_tokens, copy_tokenizer


class PolicyConfig(StrictModel):
    """Which weights the run begins with."""

    model: Place = Field(min_length=1)
    """A Hugging Face model name, the path or URL of a checkpoint, or ``starter``: the one that [starter] describes."""
    revision: str | None = None
    """Commit of a hub model; the weights behind a name can change."""
    keep_optimizer: bool = True
    """When model is the policy of a run, go on with its optimizer's moments and step count."""


def compute(task: StageTask[PolicyConfig, Path | None]) -> None:
    """Normalize a checkpoint. ``task.resources`` is the local path, or None for the hub model of the config."""
    from transformers import AutoTokenizer

    from grpo.policy import load_policy, save_policy

    source, revision = task.resources or task.config.model, task.config.revision
    target = task.writer.directory
    state = task.inputs["optimizer"].path / STATE_FILE if "optimizer" in task.inputs else Path(source) / OPTIMIZER_FILE
    if "policy" in task.inputs and task.config.keep_optimizer and state.is_file():
        (target / OPTIMIZER_FILE).parent.mkdir(exist_ok=True)
        shutil.copyfile(state, target / OPTIMIZER_FILE)
    if not Path(source).is_dir():
        check_permitted(str(source), ON_THE_HUB)
    try:
        save_policy(load_policy(str(source), revision=revision), target)
        if Path(source).is_dir():
            copy_tokenizer(Path(source), target)
        else:
            tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
            tokenizer.save_pretrained(target)
        check_stop_tokens(target)
    except PolicyError:
        raise
    except (ValueError, OSError) as error:
        raise PolicyError(str(error)) from error


STAGE = Stage("policy", version=2, config=PolicyConfig, compute=compute)
