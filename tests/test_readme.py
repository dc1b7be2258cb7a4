"""The README's Python example runs as it stands, but for fewer generations and a model trained for seconds; its configs
and the overrides of its commands are accepted."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest
from programs import run

from es_engine.config import load_config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SHORT = '["budget.generations=2", "model.steps=40", "method.population=8", "evaluation.problems=64"]'
TRAINING = re.findall(r"^es-engine train (.+)$", README.replace("\\\n", ""), re.MULTILINE)


@pytest.mark.parametrize("command", TRAINING)
def test_every_training_has_a_config_that_is_accepted(command: str, tmp_path: Path) -> None:
    ((name, text),) = re.findall(r"```yaml (\S+)\n(.*?)```", README, re.DOTALL)
    (tmp_path / name).write_text(text)
    config, *options = shlex.split(command, comments=True)
    assert set(options[::2]) <= {"--set"}
    load_config(tmp_path / name if config == name else ROOT / config, options[1::2])


@pytest.mark.vllm
@pytest.mark.ray
def test_the_python_example_runs(tmp_path: Path) -> None:
    example = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[0]
    assert '["budget.generations=10"]' in example
    script = tmp_path / "example.py"
    script.write_text(example.replace('["budget.generations=10"]', SHORT).replace("configs/", f"{ROOT}/configs/"))
    run([sys.executable, script], tmp_path)
    assert (tmp_path / "runs/example/adapter/adapter_model.safetensors").is_file()
