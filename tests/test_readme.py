"""The README's Python example runs as it stands, but for fewer generations and a model trained for seconds."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from programs import run

ROOT = Path(__file__).parents[1]
SHORT = '["budget.generations=2", "model.steps=40", "method.population=8", "evaluation.problems=64"]'


@pytest.mark.vllm
@pytest.mark.ray
def test_the_python_example_runs(tmp_path: Path) -> None:
    example = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[0]
    assert '["budget.generations=10"]' in example
    script = tmp_path / "example.py"
    script.write_text(example.replace('["budget.generations=10"]', SHORT).replace("configs/", f"{ROOT}/configs/"))
    run([sys.executable, script], tmp_path)
    assert (tmp_path / "runs/example/adapter/adapter_model.safetensors").is_file()
