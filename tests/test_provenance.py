"""What a run records about where it was made."""

from pipeline import provenance
from pipeline.files import sha256_text


def test_uncommitted_changes_are_recorded_as_a_hash_and_in_full_only_on_request() -> None:
    diff = provenance.git_state()["diff"]
    facts = provenance.recorded_environment(with_diff=False)
    assert "git_diff" not in facts
    assert facts["git_diff_sha256"] == (sha256_text(diff) if diff else None)
    assert provenance.recorded_environment(with_diff=True) == {**facts, "git_diff": diff}
