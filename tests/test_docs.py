"""docs/rewards.md works as it stands, but for fewer generations of a model trained for seconds."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from programs import run

from es_engine.config import ChatTaskConfig, load_config
from rewards.chat import read_rows

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/rewards.md").read_text()
SHORT = "--set budget.generations=2 --set model.steps=40 --set method.population=8 --set evaluation.problems=64"


def blocks(language: str) -> list[tuple[str, str]]:
    """The page's blocks of a language as (name, text)."""
    return re.findall(rf"```{language} ?(\S*)\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files of the page."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "configs").symlink_to(ROOT / "configs")
    for language in ("python", "json", "yaml"):
        for name, text in blocks(language):
            (folder / name).write_text(text)
    return folder


def es_engine(command: str, folder: Path) -> str:
    """What a command line of the page prints."""
    program, *arguments = command.split()
    assert program == "es-engine"
    return run([Path(sys.executable).with_name(program), *arguments], folder)


def test_the_command_that_shows_games(folder: Path) -> None:
    (command,) = (line for _, text in blocks("sh") for line in text.splitlines() if line.startswith("es-engine tasks"))
    printed = es_engine(command, folder)
    assert r"right: '145\n1 right.\n123\n3 right.'" in printed
    assert r"wrong: '407\n0 right.\n407\n0 right.\n407\n0 right.\n407\n0 right.'" in printed
    assert printed.count("reward 1.000, accuracy 1.000; digits 0.500, open 0.500") == 5


def test_commands_that_score(folder: Path) -> None:
    commands = [line for _, text in blocks("sh") for line in text.splitlines() if line.startswith("es-engine score")]
    assert len(commands) == 3
    for command in commands:
        es_engine(command, folder)
    scored, parts, ranked = (
        [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        for name in ("scored", "parts", "ranked")
    )
    assert [row["accuracy"] for row in scored] == [1.0, 0.0]
    assert scored[0]["components"] == pytest.approx({"used": 1.0, "length": -0.175})
    assert list(parts[0]["components"]) == ["form", "right", "brief"]
    assert parts[1]["components"]["right"] == 0
    assert [row["score"] for row in ranked] == [0.0, -1.0]


def test_the_config_with_a_reward_model(folder: Path) -> None:
    task = load_config(folder / "chat.yaml").task
    assert isinstance(task, ChatTaskConfig)
    assert [row["answer"] for row in read_rows(task.data, "task.data", task.template)] == [None, None, "A plum."]


@pytest.mark.vllm
@pytest.mark.ray
def test_the_command_that_trains(folder: Path) -> None:
    (command,) = (line for _, text in blocks("sh") for line in text.splitlines() if line.startswith("es-engine train"))
    es_engine(f"{command} {SHORT}", folder)
    lines = [json.loads(line) for line in (folder / "runs/brief/ledger.jsonl").read_text().splitlines()]
    assert set(lines[-1]["components"]) == {"used", "length"}
