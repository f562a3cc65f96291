"""What rewards by models have in common: the identity of a model, its imports, batches, no rows."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.errors import RewardError
from stages.rewards.models.embedding import embedding, embedding_identity
from stages.rewards.models.entailment import entailment, entailment_identity
from stages.rewards.models.frozen_models import batches_by_length
from stages.rewards.models.model_identity import model_identity
from stages.rewards.models.perplexity import perplexity, perplexity_identity
from stages.rewards.models.preference_model import preference_score, preference_score_identity
from tests.tiny_models import answer_rows


def test_a_model_is_the_same_wherever_it_lies(nli: str, tmp_path: Path) -> None:
    shutil.copytree(nli, tmp_path / "elsewhere")
    assert model_identity(str(tmp_path / "elsewhere")) == model_identity(nli)


@pytest.mark.parametrize("name", ["manifest.json", "optimizer/state.safetensors", ".gitattributes", "README.md"])
def test_what_no_inference_reads_does_not_change_the_identity(nli: str, tmp_path: Path, name: str) -> None:
    place = tmp_path / "copy"
    shutil.copytree(nli, place)
    (place / name).parent.mkdir(exist_ok=True)
    (place / name).write_text("x", encoding="utf-8")
    assert model_identity(str(place)) == model_identity(nli)


def test_another_byte_and_another_file_name_are_another_model(nli: str, tmp_path: Path) -> None:
    for name in ("changed", "renamed"):
        shutil.copytree(nli, tmp_path / name)
    config = tmp_path / "changed" / "config.json"
    config.write_bytes(config.read_bytes() + b"\n")
    (tmp_path / "renamed" / "config.json").rename(tmp_path / "renamed" / "configs.json")
    digests = [model_identity(str(p))["model_sha256"] for p in (Path(nli), tmp_path / "changed", tmp_path / "renamed")]
    assert len(set(digests)) == 3


def test_a_hub_model_is_its_name_and_its_commit() -> None:
    assert model_identity("org/model", "abc123") == {"model": "org/model", "revision": "abc123"}


@pytest.mark.parametrize(("model", "said"), [("org/model", "revision"), ("./not-there", "does not exist")])
def test_a_model_that_cannot_be_pinned_is_refused(model: str, said: str) -> None:
    with pytest.raises(RewardError, match=said):
        model_identity(model)


def test_identities_hold_the_digest_instead_of_the_path_and_every_other_argument(nli: str) -> None:
    digest = model_identity(nli)
    assert preference_score_identity(model=nli, squash=True) == {
        **digest,
        "squash": True,
        "batch_size": 8,
        "device": "cpu",
        "num_threads": 2,
    }
    for identity in (embedding_identity(model=nli), perplexity_identity(model=nli), entailment_identity(model=nli)):
        assert nli not in json.dumps(identity)
        assert identity["model_sha256"] == digest["model_sha256"]


def test_importing_the_modules_imports_no_torch() -> None:
    names = ["embedding", "perplexity", "entailment", "preference_model", "model_identity"]
    code = "import sys\n" + "".join(f"import stages.rewards.models.{name}\n" for name in names)
    code += "import stages.rewards.answers.ratings\n"
    code += "import stages.reward_model.reward_model\nprint([m for m in ('torch', 'transformers') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_batches_take_the_longest_first_and_keep_the_order_of_equal_ones() -> None:
    assert batches_by_length([3, 9, 3, 5, 3], 2) == [[1, 3], [0, 2], [4]]


def test_no_rows_give_no_rewards(encoder: str, uniform: str, nli: str, reward_model: str) -> None:
    none = answer_rows({}).clear()
    for found in (
        embedding(none, encoder),
        perplexity(none, uniform),
        entailment(none, nli),
        preference_score(none, reward_model),
    ):
        assert found.shape == (0, 3)
