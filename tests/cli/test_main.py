"""Whole commands, as a user types them."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from surgery.cli.main import main
from surgery.planning.plan import Plan
from tests.support import tiny
from tests.support.command import Run

SIZES = ("--vocab-size", 512, "--intermediate-size", 64)


@pytest.fixture(scope="module")
def pruned(llama: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output of ``prune``; tests must not change it."""
    from click.testing import CliRunner

    out = tmp_path_factory.mktemp("pruned") / "out"
    arguments = ["prune", llama, "--data", text, "--seq-len", 64, *SIZES, "-o", out]
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return out


def test_calibrate_plan_apply_verify_score(
    tmp_path: Path, llama: Path, text: Path, run: Run
) -> None:
    stats, plan, out = (tmp_path / name for name in ("stats.safetensors", "plan.json", "out"))
    steps = (
        ("inspect", llama),
        ("calibrate", llama, "--data", text, "--seq-len", 64, "--samples", 8, "-o", stats),
        ("plan", llama, "--stats", stats, *SIZES, "--to", out, "-o", plan),
        ("apply", plan),
        ("verify", out, "--plan", plan, "--forward"),
        ("score", llama, "--data", text, "--samples", 3, "--window-bytes", 300),
        ("score", out, "--data", text, "--samples", 3, "--window-bytes", 300, "--json"),
    )
    for step in steps:
        result = run(*step)
        assert result.exit_code == 0, (step, result.output, result.exception)
    facts = json.loads(result.stdout)
    keys = {"model", "bits_per_byte", "margin", "bytes", "tokens", "windows", "lossy_windows"}
    assert set(facts) == keys | {"change", "seconds", "peak_rss_bytes"}
    assert facts["bytes"] == 900
    assert facts["windows"] == 3
    assert Plan.load(plan).output == str(out)


def test_prune_leaves_statistics_and_plan_beside_the_output(pruned: Path, run: Run) -> None:
    assert pruned.with_name("out.stats.safetensors").exists()
    plan = Plan.load(pruned.with_name("out.plan.json"))
    (note,) = plan.provenance.notes  # statistics were taken for this very V'
    assert "it takes some" in note
    again = run("apply", pruned.with_name("out.plan.json"), "-o", pruned.with_name("again"))
    assert again.exit_code == 0
    for file in pruned.iterdir():
        assert (pruned.with_name("again") / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    ("key", "widths"),
    [
        ("gpt2", {"n_inner": 64}),
        ("deepseek_v3", {"moe_intermediate_size": 32, "intermediate_size": 64}),
        ("gpt_oss", {"intermediate_size": 32}),
        ("gemma3", {"intermediate_size": 64}),
    ],
)
def test_any_kind_of_decoder_is_pruned(
    tmp_path: Path, text: Path, run: Run, key: str, widths: dict[str, int]
) -> None:
    """Of another layout, of experts, of packed experts, inside an image model."""
    model, out = tiny.save(tmp_path / "model", key), tmp_path / "out"
    given = [part for name, size in widths.items() for part in ("--width", f"{name}={size}")]
    calibration = ("--data", text, "--seq-len", 64, "--samples", 16)
    steps = (
        ("prune", model, *calibration, "--vocab-size", 512, *given, "-o", out),
        ("verify", out, "--forward"),
        ("score", out, "--data", text, "--samples", 2, "--window-bytes", 300),
    )
    for step in steps:
        result = run(*step)
        assert result.exit_code == 0, (step, result.output, result.exception)
    facts = json.loads(run("inspect", out, "--json").stdout)
    assert facts["vocab_size"] == 512
    assert facts["widths"] == widths
    assert Plan.load(tmp_path / "out.plan.json").after.parameters == facts["parameters"]


def test_experts_that_saw_too_few_tokens_are_not_ranked_unless_asked(
    tmp_path: Path, text: Path, run: Run
) -> None:
    model, stats, plan = tiny.save(tmp_path / "model", "mixtral"), tmp_path / "s", tmp_path / "p"
    calibration = ("--data", text, "--seq-len", 16, "--samples", 1)
    assert run("calibrate", model, *calibration, "-o", stats).exit_code == 0
    refused = run("plan", model, "--stats", stats, *SIZES, "-o", plan)
    assert refused.exit_code == 2
    assert "experts saw too few tokens" in refused.stderr
    assert "--min-expert-tokens" in refused.stderr
    assert not plan.exists()
    again = run("plan", model, "--stats", stats, *SIZES, "--min-expert-tokens", 0, "-o", plan)
    assert again.exit_code == 0, again.output


def test_without_a_key_for_its_width_only_the_vocabulary_is_cut(
    tmp_path: Path, text: Path, run: Run
) -> None:
    model, plan, out = tiny.save(tmp_path / "model", "bloom"), tmp_path / "plan", tmp_path / "out"
    for command in ("calibrate", "plan"):
        options = ("--data", text) if command == "calibrate" else SIZES
        refused = run(command, model, *options, "-o", tmp_path / "refused")
        assert refused.exit_code == 2
        assert "--vocab-size" in refused.stderr
        assert not (tmp_path / "refused").exists()
    assert run("plan", model, "--vocab-size", 512, "-o", plan).exit_code == 0
    assert run("apply", plan, "-o", out).exit_code == 0
    assert run("verify", out, "--forward").exit_code == 0


def test_prune_makes_the_directories_above_its_output(
    tmp_path: Path, llama: Path, text: Path, run: Run
) -> None:
    out = tmp_path / "new" / "deep" / "out"
    result = run("prune", llama, "--data", text, "--seq-len", 64, *SIZES, "-o", out)
    assert result.exit_code == 0, result.output
    assert (out / "config.json").exists()


def test_ratio_chooses_both_sizes(tmp_path: Path, run: Run) -> None:
    model = tiny.save(
        tmp_path / "model", hidden_size=64, intermediate_size=512, vocab_size=1536, tied=True
    )
    result = run("plan", model, "--ratio", 0.3, "-o", tmp_path / "plan.json")
    assert result.exit_code == 0, result.output
    plan = Plan.load(tmp_path / "plan.json")
    assert abs(1 - plan.after.parameters / plan.before.parameters - 0.3) <= 0.005
    assert plan.after.vocab_size % 128 == plan.after.widths["intermediate_size"] % 128 == 0
    assert not plan.complete
    assert "sizes only" in result.output


def damaged(pruned: Path, tmp_path: Path) -> Path:
    """Return a copy to damage, beside its plan."""
    shutil.copy(pruned.with_name("out.plan.json"), tmp_path)
    return Path(shutil.copytree(pruned, tmp_path / "out"))


def test_verify_finds_one_flipped_bit(tmp_path: Path, pruned: Path, run: Run) -> None:
    out = damaged(pruned, tmp_path)
    shard = max(out.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    result = run("verify", out)
    assert result.exit_code == 1
    assert f"{shard.name}: tensor" in result.output
    assert "differs from the source's kept values" in result.output


@pytest.mark.parametrize("id_", [512, 639, 100_000])
def test_verify_finds_a_stale_id(tmp_path: Path, pruned: Path, run: Run, id_: int) -> None:
    out = damaged(pruned, tmp_path)
    path = out / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": [2, id_]}))
    result = run("verify", out)
    assert result.exit_code == 1
    assert "generation_config.json: eos_token_id[1]: expected " in result.output
    assert f"found {id_}" in result.output


def test_verify_finds_a_tokenizer_that_was_not_cut(
    tmp_path: Path, pruned: Path, llama: Path, run: Run
) -> None:
    out = damaged(pruned, tmp_path)
    shutil.copy(llama / "tokenizer.json", out)
    result = run("verify", out)
    assert result.exit_code == 1
    assert "tokenizer.json" in result.output


def test_verify_without_its_source_says_what_it_skipped(
    tmp_path: Path, llama: Path, run: Run
) -> None:
    source = Path(shutil.copytree(llama, tmp_path / "source"))
    plan, out = tmp_path / "plan.json", tmp_path / "out"
    whole = ("--vocab-size", tiny.VOCAB_SIZE, "--intermediate-size", tiny.INTERMEDIATE_SIZE)
    assert run("plan", source, *whole, "--to", out, "-o", plan).exit_code == 0
    assert run("apply", plan).exit_code == 0
    shutil.rmtree(source)
    result = run("verify", out)
    assert result.exit_code == 0
    assert "skipped  kept rows and channels are bit-identical: made from" in result.output
    assert run("verify", out, "--forward").exit_code == 2


@pytest.mark.parametrize("command", ["--help", "inspect", "plan"])
def test_commands_that_read_headers_import_no_torch(
    tmp_path: Path, llama: Path, command: str
) -> None:
    arguments = {
        "--help": ["--help"],
        "inspect": ["inspect", str(llama)],
        "plan": ["plan", str(llama), *map(str, SIZES), "-o", str(tmp_path / "plan.json")],
    }[command]
    script = (
        "import sys; from surgery.cli.main import main\n"
        f"main({arguments!r}, standalone_mode=False)\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", main.commands)
def test_every_command_has_help(name: str, run: Run) -> None:
    command = main.commands[name]
    assert command.help
    for parameter in command.params:
        is_option = parameter.param_type_name == "option"
        assert (
            not is_option
            or getattr(parameter, "help", None)
            or parameter.name
            in (
                "output",
                "plan_path",
            )
        )
    assert run(name, "--help").exit_code == 0


def test_the_model_card_names_sizes_method_and_plan(pruned: Path) -> None:
    card = (pruned / "README.md").read_text()
    plan = Plan.load(pruned.with_name("out.plan.json"))
    for word in ("`model`", "512", "64", "common-act2", plan.digest[:16], "2509.06836"):
        assert word in card
    assert str(pruned.parent) not in card


def test_a_tokenizer_changed_after_planning_is_refused(
    tmp_path: Path, llama: Path, run: Run
) -> None:
    source, plan = Path(shutil.copytree(llama, tmp_path / "source")), tmp_path / "plan.json"
    whole = ("--vocab-size", 512, "--intermediate-size", tiny.INTERMEDIATE_SIZE)
    assert run("plan", source, *whole, "-o", plan).exit_code == 0
    path = source / "tokenizer.json"
    path.write_text(path.read_text().replace('"dropout": null', '"dropout": 0.1'))
    result = run("apply", plan, "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert "is not the checkpoint that the plan was made for" in result.output
