"""The four costs of a step: their arithmetic, how many parameters multiply, and budgets that they spend."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from in_process import PARAMETERS, FunctionRunner
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, Qwen2Config

from es_engine import session
from es_engine.config import BudgetConfig, parse_config
from es_engine.config.yaml_text import parse as parse_yaml
from es_engine.costs import Costs, Measure, costs_of
from es_engine.ledger import Ledger, first_difference, running_costs
from es_engine.run import Run
from es_engine.spaces.lora import LoraSpace
from es_engine.trainer import resume, train
from workers.actor import WorkerSetup
from workers.engine import Vector
from workers.models import linear_matrices, multiplying_parameters
from workers.tiny_model import build_tiny_model

MEASURES = get_args(Measure)
LIMITS = dict(zip(("tokens", "processed_tokens", "flops", "worker_seconds"), MEASURES, strict=True))
CHUNKS, MEMBERS = 2, 4

# --- arithmetic

counts = st.integers(0, 2**70)
quarters = st.integers(0, 2**40).map(lambda number: number / 4)  # sums of these are exact
any_costs = st.builds(Costs, counts, counts, counts, quarters)


@given(any_costs, any_costs, any_costs)
def test_costs_add_and_subtract_measure_by_measure(one: Costs, two: Costs, three: Costs) -> None:
    for measure in MEASURES:
        mine, theirs = getattr(one, measure), getattr(two, measure)
        assert getattr(one + two, measure) == mine + theirs
        assert getattr(one - two, measure) == mine - theirs
    assert (one + two) - two == one
    assert one + two == two + one
    assert sum([one, two, three], Costs()) == one + (two + three)


@given(any_costs, st.floats(0, 1e12))
def test_costs_come_back_from_json_exactly(costs: Costs, seconds: float) -> None:
    costs += Costs(worker_seconds=seconds)
    written = json.dumps(costs.to_json())
    assert Costs.from_json(json.loads(written)) == costs
    assert tuple(json.loads(written)) == MEASURES


def test_a_pass_costs_2p_a_token_forward_and_4p_backward() -> None:
    assert costs_of(7, 10) == Costs(processed=10, flops=2 * 7 * 10)
    assert costs_of(7, 10, generated=4, seconds=0.5) == Costs(4, 10, 2 * 7 * 10, 0.5)
    assert costs_of(7, 10, backward_tokens=6) == Costs(processed=10, flops=2 * 7 * 10 + 4 * 7 * 6)
    with pytest.raises(AssertionError):
        costs_of(7, 3, generated=4)


# --- the parameters that multiply


def tiny(folder: Path) -> int:
    sizes = {"hidden": 64, "layers": 2, "heads": 2, "steps": 1, "batch": 2, "lr": 1e-3, "seed": 0}
    build_tiny_model(folder, **sizes, examples=lambda _: ("a=", "b"), alphabet="ab=")  # type: ignore[arg-type]
    config = json.loads((folder / "config.json").read_text())
    return 2 * (4 * 64 * 64 + 3 * 64 * config["intermediate_size"]) + config["vocab_size"] * 64


def tied_with_biases(folder: Path) -> int:
    sizes = {"vocab_size": 96, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3}
    config = Qwen2Config(**sizes, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return 3 * (2 * 48 * 48 + 2 * 48 * 24 + 3 * 48 * 80) + 96 * 48


@pytest.mark.parametrize("build", [tiny, tied_with_biases])
def test_parameters_that_multiply_are_those_that_torch_counts_at_work(
    build: Callable[[Path], int], tmp_path: Path
) -> None:
    """torch's counter of matrix products agrees: 2P for a token forward, 4P backward, an adapter's among them."""
    (tmp_path / "model").mkdir()
    expected = build(tmp_path / "model")
    assert multiplying_parameters(tmp_path / "model") == expected
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ids = torch.ones((1, 10), dtype=torch.long)
    assert products(lambda: model(ids)) == costs_of(expected, 10).flops
    assert products(lambda: model(ids).logits.sum().backward()) == costs_of(expected, 10, backward_tokens=10).flops
    space = LoraSpace(linear_matrices(tmp_path / "model", ["q_proj", "down_proj"]), rank=4, alpha=8.0)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    assert products(lambda: adapted(ids)) == costs_of(expected + space.adapter_parameters, 10).flops


def test_an_untied_output_embedding_counts_and_the_input_embedding_does_not(random_llama: Path) -> None:
    assert multiplying_parameters(random_llama) == 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96) + 64 * 64


def products(work: Callable[[], Any]) -> int:
    """Floating-point operations of all matrix products but those of attention."""
    with FlopCounterMode(display=False) as counter:
        work()
    return sum(count for kind, count in counter.get_flop_counts()["Global"].items() if "mm" in str(kind))


# --- budgets


@pytest.mark.parametrize(
    ("limits", "spent"),
    [
        ({"generations": 8}, 2 / 8),
        ({"tokens": 200}, 100 / 200),
        ({"processed_tokens": 500}, 400 / 500),
        ({"flops": 1e6}, 0.25),
        ({"worker_seconds": 30}, 0.1),
        ({"generations": 8, "tokens": 200, "worker_seconds": 30.0}, 0.5),
        ({"generations": 8, "flops": 1.0}, 1.0),
    ],
)
def test_progress_is_that_of_the_nearest_limit(limits: dict[str, Any], spent: float) -> None:
    assert BudgetConfig(**limits).progress(2, Costs(100, 400, 250_000, 3.0)) == spent


def test_the_page_on_budgets_has_every_limit_and_measure() -> None:
    page = (Path(__file__).parents[1] / "docs/budgets.md").read_text()
    (block,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    budget = parse_yaml(block, "docs/budgets.md")["budget"]
    assert BudgetConfig(**budget).model_dump().keys() == budget.keys()
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \|", page, re.MULTILINE)
    assert {limit: measure for measure, limit in rows} == LIMITS


class InProcessPool(FunctionRunner):
    """A pool that a run takes for Ray's. Its workers cost 0.5 s a chunk and 0.25 s a sum of noise."""

    restarts = speculative = 0

    def __init__(self, setup: WorkerSetup, _notify: object) -> None:
        super().__init__(first_coordinates, setup.space.dim, seed=setup.config.seed)

    def count_anew(self) -> None:
        """There is nothing to count."""

    def close(self) -> None:
        """There is nothing to end."""


def first_coordinates(theta: Vector, _problem: object, _sample: int) -> float:
    return float(theta[:10].sum())


@pytest.fixture(autouse=True)
def _without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "Pool", InProcessPool)


def train_within(model: Path, folder: Path, **budget: Any) -> Run:
    config = {
        "name": "costly",
        "model": {"source": str(model)},
        "space": {"rank": 2, "targets": ["q_proj"]},
        "method": {"population": MEMBERS, "sigma": 0.1, "prompts": 2},
        "optimizer": {"lr": 1.0, "lr_schedule": {"kind": "linear", "final": 0.1}},
        "task": {"template": "plain", "high": 9, "max_tokens": 8},
        "engine": {"kind": "hf", "chunk": MEMBERS // CHUNKS},
        "budget": budget,
        "evaluation": {"every": 2, "problems": 4},
        "telemetry": {"console": False, "tensorboard": False},
    }
    return train(parse_config(config), folder)


def test_every_step_records_its_costs_and_a_run_their_sum(random_llama: Path, tmp_path: Path) -> None:
    run = train_within(random_llama, tmp_path / "run", generations=3)
    lines = run.ledger
    for line in lines:
        processed = line["tokens"] + line["prompt_tokens"]
        seconds = CHUNKS * (0.5 + 0.25)
        assert line["costs"] == Costs(line["tokens"], processed, 2 * PARAMETERS * processed, seconds).to_json()
    assert run.costs[0] == Costs()
    for measure in MEASURES:
        assert getattr(run.costs[-1], measure) == sum(line["costs"][measure] for line in lines) > 0
        points = run.curve("reward", over=measure)
        assert [x for x, _ in points] == [getattr(run.costs[step], measure) for step in (0, 2, 3)]
        assert [y for _, y in points] == [line["reward"] for line in run.evaluations]
    with pytest.raises(ValueError, match="no evaluation has a figure 'luck'"):
        run.curve("luck")


def test_an_evaluation_records_its_costs(random_llama: Path, tmp_path: Path) -> None:
    run = train_within(random_llama, tmp_path / "run", generations=1)
    for line in run.evaluations:
        processed = line["tokens"] + line["prompt_tokens"]
        assert line["costs"] == Costs(line["tokens"], processed, 2 * PARAMETERS * processed, 0.5).to_json()


@pytest.mark.parametrize(("limit", "measure"), LIMITS.items())
def test_a_run_ends_after_the_step_that_reaches_its_limit(
    limit: str, measure: str, random_llama: Path, tmp_path: Path
) -> None:
    spent = [
        getattr(costs, measure) for costs in train_within(random_llama, tmp_path / "measured", generations=4).costs
    ]
    enough = train_within(random_llama, tmp_path / "enough", **{limit: spent[3]})
    assert len(enough.ledger) == 3
    assert [line["lr"] for line in enough.ledger] == pytest.approx([1 - 0.9 * cost / spent[3] for cost in spent[:3]])
    assert len(train_within(random_llama, tmp_path / "more", **{limit: spent[3] + 1}).ledger) == 4
    assert len(train_within(random_llama, tmp_path / "both", generations=2, **{limit: spent[3]}).ledger) == 2


def cut(run: Run, folder: Path, steps: int, *, checkpoints: bool) -> Path:
    """A copy of a run as if it had been killed after so many steps."""
    shutil.copytree(run.path, folder)
    shutil.rmtree(folder / "adapter")
    if not checkpoints:
        shutil.rmtree(folder / "checkpoints")
    whole = run.folder.ledger_file.read_bytes().splitlines(keepends=True)
    (folder / "ledger.jsonl").write_bytes(b"".join(whole[: 1 + steps]))
    rows = run.folder.eval_file.read_bytes().splitlines(keepends=True)
    (folder / "eval.jsonl").write_bytes(b"".join(row for row in rows if json.loads(row)["step"] <= steps))
    return folder


@pytest.mark.parametrize("checkpoints", [True, False])
@pytest.mark.parametrize(("limit", "measure"), LIMITS.items())
def test_a_run_that_resumes_knows_what_it_has_spent(
    limit: str, measure: str, checkpoints: bool, random_llama: Path, tmp_path: Path
) -> None:
    measured = train_within(random_llama, tmp_path / "measured", generations=4)
    whole = train_within(random_llama, tmp_path / "whole", **{limit: getattr(measured.costs[4], measure)})
    resumed = resume(cut(whole, tmp_path / "cut", 3, checkpoints=checkpoints))
    assert len(resumed.ledger) == 4
    assert first_difference(resumed.folder.ledger_file, whole.folder.ledger_file) is None
    assert resumed.costs == whole.costs


def test_seconds_that_were_spent_before_a_kill_count(random_llama: Path, tmp_path: Path) -> None:
    """Seconds are read from the ledger, not measured anew: had they been more, the run would end sooner."""
    whole = train_within(random_llama, tmp_path / "whole", worker_seconds=4 * 1.5)
    assert len(whole.ledger) == 4
    folder = cut(whole, tmp_path / "slow", 2, checkpoints=True)
    lines = Ledger(folder / "ledger.jsonl").lines
    lines[-1]["costs"]["worker_seconds"] = 100.0
    (folder / "ledger.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    resumed = resume(folder)
    assert len(resumed.ledger) == 2
    assert resumed.adapter.is_dir()
    assert running_costs(resumed.ledger)[-1].worker_seconds == 1.5 + 100.0
