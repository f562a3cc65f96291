"""The audit against chance: of many random corruptions of a run each is found and named by its artifact.

`test_verify` and `test_verify_forgeries` corrupt by plan; here nobody has chosen what is hit.
"""

import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.manifest import MANIFEST
from pipeline.run_dir import RunDir
from stages.inspect.verify.ledger import Ledger
from stages.inspect.verify.verify import verify_run
from tests.corruptions import KINDS, Scratch, Trial, edit_note, recompute
from tests.finished import finished_run
from tests.small_run import make_small_run


def scratch_of(original: Path, folder: Path, seed: int) -> Scratch:
    """Return a copy of a run that may be corrupted."""
    shutil.copytree(original, folder / "run")
    return Scratch(folder / "run", original, random.Random(seed))


def is_named(findings: Ledger, trial: Trial, root: Path) -> bool:
    """Return whether a problem names the artifact, or the file that belongs to none."""
    around = [trial.place, *trial.place.parents]
    artifact = next((place for place in around if (place / MANIFEST).exists()), trial.place)
    name = artifact.relative_to(root).as_posix()
    return any(name in (p.where.path, *re.split(r"[ ,()]+", p.found)) for p in findings.problems)


def missed(scratch: Scratch, make: Callable[[Scratch], Trial], count: int) -> tuple[list[str], int]:
    """Corrupt and put back so often; return what should have been found and named, and the number of what was."""
    wrong, num_named = [], 0
    for _ in range(count):
        trial = make(scratch)
        if not scratch.is_harmless():
            findings = verify_run(RunDir(scratch.root))
            named = is_named(findings, trial, scratch.root)
            num_named += named
            if trial.is_findable and not named:
                wrong.append(f"{trial.place.relative_to(scratch.root)}: {trial.what}: {findings.problems}")
        scratch.restore()
    return wrong, num_named


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, tiny_policy: Path) -> Path:
    """Return a finished run of two evaluated iterations, not to be changed."""
    root = finished_run(tmp_path_factory.mktemp("corruption"), tiny_policy).root
    assert verify_run(RunDir(root)).is_fine
    return root


@pytest.mark.slow
@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
def test_every_random_corruption_is_found_and_named_by_its_artifact(
    original: Path, tmp_path: Path, make: Callable[[Scratch], Trial]
) -> None:
    scratch = scratch_of(original, tmp_path, seed=KINDS.index(make))
    wrong, num_named = missed(scratch, make, count=40)
    assert wrong == []
    assert num_named >= 25  # the others were harmless, or of columns that no other file repeats
    assert verify_run(RunDir(scratch.root)).is_fine


def test_notes_that_no_hash_covers_are_not_found(original: Path, tmp_path: Path) -> None:
    scratch = scratch_of(original, tmp_path, seed=0)
    for _ in range(4):
        edit_note(scratch)
        assert verify_run(RunDir(scratch.root)).is_fine


def test_a_forgery_recomputed_by_the_programs_own_code_is_not_found(tmp_path: Path, tiny_policy: Path) -> None:
    """Without evaluations, which the forger leaves as they are."""
    original = make_small_run(tmp_path, tiny_policy, iterations=2)
    scratch = scratch_of(original, tmp_path, seed=0)
    trial = recompute(scratch)
    assert not scratch.is_harmless()
    assert verify_run(RunDir(scratch.root)).problems == [], trial.what
