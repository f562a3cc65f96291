"""Checkpoints of strangers: no code and no pickle of theirs is loaded, and what is loaded is what is hashed."""

import ast
import io
import json
import resource
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from grpo.policy import load_policy, save_policy
from grpo.weight_files import MOST_BYTES, WEIGHTS_INDEX, weight_files
from pipeline.artifact import Artifact
from pipeline.errors import ConfigError, EngineError, GrpoError, PolicyError, RewardError
from pipeline.run_dir import RunDir
from pipeline.stage import StageCall, run_stage
from stages import policy as policy_stage
from stages.checkpoints import check_policy, checkpoint_identity, load_tokenizer, stop_token_ids
from stages.config import RunConfig
from stages.engines.base import EngineSettings
from stages.engines.vllm_engine import VllmEngine
from stages.generate import GenerateConfig, check_room
from stages.preflight import preflight
from stages.probe import check_template
from stages.rewards.models.classifier import load_classifier
from stages.rewards.models.model_identity import model_identity
from stages.score import ScoreConfig

ROOT = Path(__file__).parents[1]
EVIL = "from pathlib import Path\nPath({marker!r}).write_text('x')\n"
CODE, PICKLES = "trust_remote_code=False", "use_safetensors=True"
WANTED = {
    "AutoTokenizer": {CODE},
    "AutoConfig": {CODE},
    "SentenceTransformer": {CODE, "model_kwargs={'use_safetensors': True}"},
}
"""Named arguments that a load must have; every other class loads weights."""


@pytest.fixture
def policy(tiny_policy: Path, tmp_path: Path) -> Path:
    """Return a copy of the tiny policy, to be changed."""
    return shutil.copytree(tiny_policy, tmp_path / "policy")


def change(file: Path, **values: Any) -> None:
    """Set keys of a JSON file."""
    found = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**found, **values}))


def make_policy(source: Path) -> Artifact:
    """Return the policy artifact of a checkpoint."""
    config = policy_stage.PolicyConfig(model="local files")
    return run_stage(StageCall(policy_stage.STAGE, config, {}, {"policy": source.parent / "artifact"}), source).main


def loads(tree: ast.AST) -> list[tuple[str, int, set[str]]]:
    """Return the class, line and named arguments of each call that loads a checkpoint."""
    return [
        (ast.unparse(node.func).split(".")[0], node.lineno, {ast.unparse(given) for given in node.keywords})
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and (ast.unparse(node.func).endswith(".from_pretrained") or ast.unparse(node.func) == "SentenceTransformer")
    ]


def test_every_load_in_the_tree_refuses_code_and_pickles() -> None:
    folders = ("flows", "stages", "grpo", "pipeline", "benchmarks")
    found = [
        (path.relative_to(ROOT).as_posix(), line, WANTED.get(name, {CODE, PICKLES}) - given)
        for folder in folders
        for path in (ROOT / folder).rglob("*.py")
        for name, line, given in loads(ast.parse(path.read_text()))
    ]
    assert len(found) > 8
    assert [place for place in found if place[2]] == []


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_of_a_checkpoint_is_not_run(
    policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    marker = tmp_path / "was_run"
    (policy / "evil.py").write_text(EVIL.format(marker=str(marker)))
    names = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoTokenizer": ["evil.T", None]}
    change(policy / file, auto_map=names, tokenizer_class="T", model_type="evil")
    if file == "tokenizer_config.json":
        (policy / "tokenizer.json").unlink()
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    with pytest.raises(ValueError, match=r"cannot be loaded|no usable configuration"):
        load_tokenizer(policy) if file == "tokenizer_config.json" else load_policy(policy)
    assert not marker.exists()


def test_a_decoy_beside_pickled_weights_is_not_taken_for_weights(policy: Path) -> None:
    tensors = load_file(policy / "model.safetensors")
    torch.save(tensors, policy / "pytorch_model.bin")
    (policy / "model.safetensors").rename(policy / "decoy.safetensors")
    for look in (check_policy, checkpoint_identity, make_policy):
        with pytest.raises(ValueError, match=r"has no model\.safetensors and no .*pickled ones are not read"):
            look(policy)  # type: ignore[arg-type]


def test_the_identity_is_that_of_the_files_that_are_loaded(policy: Path) -> None:
    before = checkpoint_identity(policy)
    (policy / "decoy.safetensors").write_bytes(b"x")
    (policy / "pytorch_model.bin").write_bytes(b"not a pickle")
    assert checkpoint_identity(policy) == before
    load_policy(policy)
    save_file({**load_file(policy / "model.safetensors"), "more": torch.zeros(1)}, policy / "model.safetensors")
    assert checkpoint_identity(policy) != before


def test_of_several_files_the_index_and_those_that_it_names_are_hashed(policy: Path) -> None:
    tensors = load_file(policy / "model.safetensors")
    save_file(tensors, policy / "part.safetensors", metadata={"format": "pt"})
    (policy / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "part.safetensors")}
    (policy / WEIGHTS_INDEX).write_text(json.dumps(index))
    before = checkpoint_identity(policy)
    load_policy(policy)
    (policy / "decoy.safetensors").write_bytes(b"x")
    assert checkpoint_identity(policy) == before
    save_file({**tensors, "more": torch.zeros(1)}, policy / "part.safetensors", metadata={"format": "pt"})
    assert checkpoint_identity(policy) != before


@pytest.mark.parametrize(
    "name", ["../elsewhere.safetensors", ".hidden.safetensors", "weights.bin", "gone.safetensors", 3]
)
def test_an_index_that_leads_elsewhere_is_refused(policy: Path, name: Any) -> None:
    shutil.copyfile(policy / "model.safetensors", policy.parent / "elsewhere.safetensors")
    shutil.copyfile(policy / "model.safetensors", policy / ".hidden.safetensors")
    (policy / "weights.bin").write_bytes(b"x")
    (policy / "model.safetensors").unlink()
    (policy / WEIGHTS_INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": name}}))
    for look in (check_policy, make_policy):
        with pytest.raises(ValueError, match=r"names the file .*expected \.safetensors files beside it"):
            look(policy)  # type: ignore[arg-type]
    with pytest.raises(RewardError, match="names the file"):
        model_identity(str(policy))


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("config.json", {"quantization_config": {"quant_method": "gptq"}}, "is quantized .*expected weights in floats"),
        ("config.json", {"transformers_weights": "decoy.safetensors"}, "names the file of its weights"),
        ("adapter_config.json", {"base_model_name_or_path": "x/y"}, "merge the adapter"),
        ("config.json", {"attn_implementation": "evil/kernel"}, "could be code from elsewhere"),
        ("config.json", {"_attn_implementation": "evil/kernel"}, "could be code from elsewhere"),
        ("config.json", {"attn_implementation": "flash_attention_2"}, "could be code from elsewhere"),
        ("config.json", {"text_config": {"attn_implementation": {"": "evil/kernel"}}}, "could be code from elsewhere"),
        ("config.json", {"experts_implementation": "evil/kernel"}, "could be code from elsewhere"),
        ("config.json", {"architectures": 7}, "model of unknown architecture"),
        ("config.json", {"architectures": None}, "model of unknown architecture"),
        (
            "generation_config.json",
            {"eos_token_id": [1, 999_999]},
            r"eos_token_id in .*generation_config\.json is 999999",
        ),
        ("config.json", {"eos_token_id": -1}, r"eos_token_id in .*config\.json is -1"),
        ("generation_config.json", {"eos_token_id": "x"}, "eos_token_id in .* is 'x'"),
    ],
)
def test_a_checkpoint_that_cannot_be_a_policy_is_refused_beforehand(
    policy: Path, file: str, values: dict[str, Any], message: str
) -> None:
    change(policy / file, **values)
    with pytest.raises(PolicyError, match=message):
        check_policy(str(policy))


@pytest.mark.parametrize("setting", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_no_kernel_is_fetched_for_a_checkpoint(policy: Path, monkeypatch: pytest.MonkeyPatch, setting: str) -> None:
    asked: list[str] = []
    monkeypatch.setattr("transformers.modeling_utils.lazy_import_flash_attention", lambda name, **_: asked.append(name))
    change(policy / "config.json", **{setting: "evil/kernel"})
    with pytest.raises(ValueError, match="could be code from elsewhere"):
        load_policy(policy)
    with pytest.raises(ValueError, match="could be code from elsewhere"):
        load_classifier(str(policy), is_local=True, new_head_seed=0)
    with pytest.raises(RewardError, match="could be code from elsewhere"):
        model_identity(str(policy))
    assert asked == []


def test_an_implementation_of_transformers_may_be_named(policy: Path) -> None:
    change(policy / "config.json", attn_implementation="eager")
    assert load_policy(policy).config._attn_implementation == "eager"


@pytest.mark.parametrize("file", ["config.json", WEIGHTS_INDEX])
def test_a_description_without_end_is_not_read(policy: Path, file: str) -> None:
    (policy / "model.safetensors").unlink()
    with (policy / file).open("ab") as opened:
        opened.truncate(MOST_BYTES + 1)
    with pytest.raises(ValueError, match=r"more than [\d,]+ bytes"):
        weight_files(policy)


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "\ud83d"], ids=["cut", "deep", "bytes"])
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_a_broken_description_is_one_message(policy: Path, file: str, text: str) -> None:
    (policy / file).write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(PolicyError, match=f"{file} is not JSON"):
        check_policy(str(policy))


@pytest.mark.parametrize("values", [{"hidden_size": -1}, {"num_attention_heads": 0}, {"hidden_act": "none such"}])
def test_a_description_that_builds_no_model_is_one_message(policy: Path, values: dict[str, Any]) -> None:
    change(policy / "config.json", **values)
    with pytest.raises(ValueError, match="expected"):
        load_policy(policy)


def test_layers_that_no_weight_could_fill_are_not_built(policy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grpo.policy.AutoModelForCausalLM.from_pretrained", lambda *_, **__: pytest.fail("was built"))
    change(policy / "config.json", num_hidden_layers=1_000_000, layer_types=None)
    with pytest.raises(ValueError, match=r"says 1,000,000 layers, and there are \d+ weights"):
        load_policy(policy)


def test_a_weight_that_is_no_number_is_said(policy: Path) -> None:
    tensors = load_file(policy / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, policy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"weights that are not finite, in model\.norm\.weight"):
        load_policy(policy)


def test_of_a_generation_config_only_the_ids_stay(policy: Path, tmp_path: Path) -> None:
    (policy / "generation_config.json").write_text('{"temperature": 0.9, "top_p": 0.6, "eos_token_id": [1, 5]}')
    made = make_policy(policy)
    saved = json.loads((made.path / "generation_config.json").read_text())
    assert set(saved) - {"transformers_version"} == {"eos_token_id"}
    assert stop_token_ids(made.path) == [1, 5]
    save_policy(load_policy(made.path), tmp_path / "again")
    again = (tmp_path / "again" / "generation_config.json").read_bytes()
    assert again == (made.path / "generation_config.json").read_bytes()


def run_config(model: str, source: Path, **prompts: Any) -> RunConfig:
    rewards = [{"name": "exact", "function": "stages.rewards.answers.matching:exact_match"}]
    generate = GenerateConfig(engine="transformers", max_tokens=8, num_threads=1)
    return RunConfig.model_validate(
        {
            "policy": {"model": model},
            "prompts": {"source": str(source), **prompts},
            "generate": generate,
            "score": ScoreConfig.model_validate({"rewards": rewards}),
            "evaluate": {"every": 0, "held_out_share": 0.0},
            "update": {"num_threads": 1},
        }
    )


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Return a file of one question."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "1+1?", "answer": "2"}\n')
    return path


GEMMA = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "settings", "message"),
    [
        (
            GEMMA,
            {"system_prompt": "Be brief."},
            "System role not supported; expected a text; change prompts.system_prom",
        ),
        ("{{ messages.__class__.__mro__ }}", {}, "SecurityError"),
        ("{{ 'x' * 10**12 }}", {}, "MemoryError|GiB of memory"),
        (LOOPS, {}, "writes no conversation: it did not end within 1 s"),
        ("{{ 9 ** (9 ** 9) }}", {}, "writes no conversation: it did not end within 1 s"),
        ("{% if", {}, "is no template .TemplateSyntaxError"),
        ("{{ a }}", {"chat_template_kwargs": {"enable_thinkin": False}}, "sets enable_thinkin, which .* expected a;"),
        ("{{ a }}", {"chat_template_kwargs": {"messages": []}}, "sets messages, which"),
        (None, {"chat_template_kwargs": {"a": 1}}, "sets a, which .* expected none"),
    ],
)
def test_a_chat_template_is_tried_before_anything_starts(
    policy: Path,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    template: Any,
    settings: Any,
    message: str,
) -> None:
    monkeypatch.setattr("stages.probe.CPU_SECONDS", 1)
    (policy / "chat_template.jinja").unlink(missing_ok=True)
    if template is not None:
        (policy / "chat_template.jinja").write_text(template)
    with pytest.raises(GrpoError, match=message):
        preflight(run_config(str(policy), source, **settings), RunDir(tmp_path / "run"))


@pytest.mark.parametrize("template", ["{{ ('x' * 700000000) | upper | length }}", "{{ 'x' * 20000000 }}"])
def test_a_template_is_not_calculated_outside_of_its_limits(template: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(PolicyError, match=r"GiB of memory|writes 20,000,000 characters"):
        check_template(template, {}, {}, [{"role": "user", "content": "hi"}])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 18  # KiB: 256 MiB


def test_variables_that_the_template_reads_are_taken(policy: Path, source: Path, tmp_path: Path) -> None:
    (policy / "chat_template.jinja").write_text(
        "{% generation %}{{ messages[0].content }}{% endgeneration %}{% if enable_thinking %}!{% endif %}"
    )
    config = run_config(str(policy), source, chat_template_kwargs={"enable_thinking": False})
    preflight(config, RunDir(tmp_path / "run"))


def test_of_several_named_templates_the_default_one_is_used(policy: Path, source: Path, tmp_path: Path) -> None:
    (policy / "chat_template.jinja").unlink(missing_ok=True)
    templates = {"default": "{{ messages[0].content }}{{ mood }}", "rag": "{{ documents }}"}
    named = [{"name": name, "template": template} for name, template in templates.items()]
    change(policy / "tokenizer_config.json", chat_template=named)
    preflight(run_config(str(policy), source, chat_template_kwargs={"mood": "!"}), RunDir(tmp_path / "run"))


@pytest.mark.parametrize("written", ["./policy", "{}/policy", "~/policy"])
def test_a_run_goes_on_when_its_model_is_gone_however_it_was_named(
    policy: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: str
) -> None:
    from flows.session import Session

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    session = Session(run_config(written.format(tmp_path), source), RunDir(tmp_path / "run"))
    made = session.initial_policy()
    shutil.rmtree(policy)
    preflight(session.config, session.run)
    assert session.initial_policy().digest == made.digest


def test_a_run_whose_initial_policy_was_pruned_says_so(policy: Path, source: Path, tmp_path: Path) -> None:
    from flows.session import Session
    from pipeline.artifact import PRUNED_NOTE

    session = Session(run_config(str(policy), source), RunDir(tmp_path / "run"))
    made = session.initial_policy()
    note = {"files": {"model.safetensors": made.manifest.files["model.safetensors"]["sha256"]}}
    (made.path / PRUNED_NOTE).write_text(json.dumps(note))
    (made.path / "model.safetensors").unlink()
    with pytest.raises(GrpoError, match=r"was dropped by `grpo prune` or \[retention\], and is needed now"):
        preflight(session.config, session.run)


def test_the_context_may_be_set_and_bounds_the_prompts() -> None:
    assert check_room(GenerateConfig(max_tokens=100), 40_960) == 40_860
    assert check_room(GenerateConfig(max_tokens=100, max_model_len=512), 40_960) == 412
    with pytest.raises(ConfigError, match=r"max_model_len is 512, but the model's context is 128 tokens"):
        check_room(GenerateConfig(max_tokens=100, max_model_len=512), 128)


def test_a_cache_that_holds_no_sequence_names_the_settings(policy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**options: Any) -> None:
        raise ValueError("8.75 GiB KV cache is needed, which is larger than the available KV cache memory (1.0 GiB)")

    platforms = SimpleNamespace(current_platform=SimpleNamespace(is_cpu=lambda: True))
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=refuse, platforms=platforms))
    monkeypatch.setitem(sys.modules, "vllm.platforms", platforms)
    engine = VllmEngine(EngineSettings("vllm", "float32", max_model_len=40_960, max_num_seqs=8, num_threads=1))
    with pytest.raises(
        EngineError, match=r"no sequence of 40960 tokens .*generate\.max_model_len.*resources\.kv_cache_g"
    ):
        engine.load(policy)
