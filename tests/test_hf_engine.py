from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from inputs import random_center, random_prompts
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM

from es_engine import noise
from es_engine.spaces.lora import LoraSpace, Train
from rewards.base import Example
from workers.engine import CENTER, Completion, Member, Request, Sampling
from workers.hf_engine import HfEngine
from workers.models import linear_matrices
from workers.prompts import context_length, load_tokenizer, preparer

RUN_SEED = 7
SIGMA = 0.4
MEMBERS = (Member(0, 1), Member(0, -1), CENTER)
PAD, END = 0, 2
GREEDY = Sampling(max_tokens=24, stop=("\n",))


def build_space(model: Path, train: Train = "B", rank: int = 5, alpha: float = 16.0) -> LoraSpace:
    return LoraSpace(linear_matrices(model, "all-linear"), rank=rank, alpha=alpha, train=train)


def ordered(engine: HfEngine, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
    return sorted(engine.generate(requests, sampling), key=lambda each: (each.request, each.sample))


@pytest.fixture(scope="module")
def space(random_llama: Path) -> LoraSpace:
    return build_space(random_llama)


@pytest.fixture(scope="module")
def engine(random_llama: Path, space: LoraSpace) -> HfEngine:
    engine = HfEngine(random_llama, space, RUN_SEED, 1 << 28, "float32")
    engine.set_center(random_center(space))
    engine.write_slots(0, SIGMA, MEMBERS)
    return engine


# What slots hold


@pytest.mark.parametrize(
    ("model", "train", "rank", "alpha"), [("random_llama", "B", 5, 16.0), ("random_qwen", "AB", 8, 4.0)]
)
def test_logprobs_equal_those_of_the_saved_adapter(
    model: str, train: Train, rank: int, alpha: float, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder: Path = request.getfixturevalue(model)
    space = build_space(folder, train, rank, alpha)
    center = random_center(space)
    engine = HfEngine(folder, space, RUN_SEED, 0, "float32")
    engine.set_center(center)
    engine.write_slots(3, SIGMA, MEMBERS)
    prompts = random_prompts(1, 2, 30)
    found = engine.logprobs([Request(slot, prompt) for slot in (0, 1, 2, None) for prompt in prompts])
    for slot, member in enumerate((*MEMBERS, None)):
        reference: Any = AutoModelForCausalLM.from_pretrained(folder)
        if member is not None:
            eps = noise.draw(RUN_SEED, 3, member.pair, space.dim)
            space.save(center + np.float32(member.sign * SIGMA) * eps, tmp_path, str(folder))
            reference = peft.PeftModel.from_pretrained(reference, tmp_path)
        for prompt, values in zip(prompts, found[3 * slot : 3 * slot + 3], strict=True):
            with torch.inference_mode():
                scores = reference(torch.tensor([prompt])).logits[0].log_softmax(-1).numpy()
            expected = scores[np.arange(len(prompt) - 1), prompt[1:]]
            np.testing.assert_allclose(values, expected, atol=1e-5)


def test_members_and_the_base_model_differ(engine: HfEngine) -> None:
    (prompt,) = random_prompts(30)
    found = engine.logprobs([Request(slot, prompt) for slot in (0, 1, 2, None)])
    for place, one in enumerate(found):
        for other in found[:place]:
            assert np.abs(one - other).mean() > 0.5


def test_the_center_is_taken_by_value(random_llama: Path, space: LoraSpace) -> None:
    engine = HfEngine(random_llama, space, RUN_SEED, 0, "float32")
    theta = random_center(space)
    engine.set_center(theta)
    engine.write_slots(0, SIGMA, [CENTER])
    requests = [Request(0, random_prompts(9)[0])]
    before = engine.logprobs(requests)[0]
    theta *= 0
    np.testing.assert_array_equal(engine.logprobs(requests)[0], before)


def test_noise_sum_is_the_weighted_sum_with_or_without_a_cache(random_llama: Path, space: LoraSpace) -> None:
    pairs, weights = [4, 0, 2], [0.5, -1.25, 2.0]
    drawn = [noise.draw(RUN_SEED, 6, pair, space.dim).astype(np.float64) for pair in pairs]
    exact = sum(weight * eps for weight, eps in zip(weights, drawn, strict=True))
    cached, uncached = (HfEngine(random_llama, space, RUN_SEED, size, "float32") for size in (1 << 28, 0))
    for engine in (cached, uncached):
        engine.write_slots(6, SIGMA, [Member(pair, 1) for pair in range(5)])
        np.testing.assert_allclose(engine.noise_sum(6, pairs, weights), exact, atol=1e-6)
    np.testing.assert_array_equal(cached.noise_sum(6, pairs, weights), uncached.noise_sum(6, pairs, weights))


# Generation


@pytest.mark.parametrize("stop", [(), ("\n",), ("k", "\n")], ids=["no stop", "one stop", "two stops"])
@pytest.mark.parametrize("slot", [0, 1, 2, None])
def test_a_padded_batch_completes_like_one_prompt_after_another(
    engine: HfEngine, slot: int | None, stop: tuple[str, ...]
) -> None:
    sampling = Sampling(max_tokens=24, stop=stop)
    requests = [Request(slot, prompt) for prompt in random_prompts(1, 60, 3, 21, 40, 8, 13, 100)]
    together = ordered(engine, requests, sampling)
    assert {each.finish_reason for each in together} == {"stop", "length"}
    for number, request in enumerate(requests):
        (alone,) = engine.generate([request], sampling)
        mine = together[number]
        assert (mine.request, mine.token_ids, mine.text) == (number, alone.token_ids, alone.text)
        assert mine.finish_reason == alone.finish_reason


def test_slots_in_any_order_complete_alike(engine: HfEngine) -> None:
    prompts = random_prompts(5, 17, 30)
    requests = [Request(slot, prompt) for slot in (0, None, 2, 1) for prompt in prompts]
    order = np.random.default_rng(3).permutation(len(requests))
    straight = ordered(engine, requests, GREEDY)
    for place, completion in zip(order, ordered(engine, [requests[i] for i in order], GREEDY), strict=True):
        assert completion.token_ids == straight[place].token_ids


@contextmanager
def scripted(engine: HfEngine, rows: Sequence[str | Sequence[int]]) -> Iterator[None]:
    """Make greedy decoding say given tokens, for each prompt of a batch its own; to go on past them is an error."""
    tokens = [engine._tokenizer(row)["input_ids"] if isinstance(row, str) else row for row in rows]
    steps = iter(range(max(len(row) for row in tokens)))

    def say(module: Any, inputs: Any, logits: torch.Tensor) -> torch.Tensor:
        step = next(steps)
        forced = torch.zeros_like(logits)
        for number, row in enumerate(tokens):
            forced[number, -1, row[min(step, len(row) - 1)]] = 1.0
        return forced

    hook = engine._model.get_output_embeddings().register_forward_hook(say)
    try:
        yield
    finally:
        hook.remove()


@pytest.fixture(scope="module")
def engine_without_pad(random_llama: Path, space: LoraSpace, tmp_path_factory: pytest.TempPathFactory) -> HfEngine:
    """Many base models have no padding token; the end token then serves as one."""
    folder = tmp_path_factory.mktemp("unpadded") / "model"
    shutil.copytree(random_llama, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["pad_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(folder).pad_token is None
    return HfEngine(folder, space, RUN_SEED, 0, "float32")


SCRIPTS = {
    "length": ("12345678", "12345678", 8, "length"),
    "stop at once": ("\n2345678", "", 1, "stop"),
    "stop": ("123\n5678", "123", 4, "stop"),
    "stop of two characters": ("12=(5678", "12", 4, "stop"),
    "half a stop": ("12=45678", "12=45678", 8, "length"),
    "stop at the last token": ("1234567\n", "1234567", 8, "stop"),
    "end": ([5, 6, END, 7, 8, 9, 5, 6], "23", 3, "stop"),
    "end at the last token": ([5, 6, 7, 8, 9, 5, 6, END], "2345623", 8, "stop"),
    "padding said by the model": ([5, PAD, 6, PAD, 7, 8, 9, 5], "234562", 8, "length"),
    "padding said before a stop": ([5, PAD, 6, 23, 7, 8, 9, 5], "23", 4, "stop"),
}


@pytest.mark.parametrize("which", ["engine", "engine_without_pad"])
def test_tokens_and_text_end_where_a_completion_ends(which: str, request: pytest.FixtureRequest) -> None:
    """One batch, in which rows that are done are padded until the longest is."""
    engine: HfEngine = request.getfixturevalue(which)
    rows = [row for row, *_ in SCRIPTS.values()]
    requests = [Request(None, prompt) for prompt in random_prompts(*range(1, len(rows) + 1))]
    with scripted(engine, rows):
        found = list(engine.generate(requests, Sampling(max_tokens=8, stop=("\n", "=("))))
    shown = [(each.text, len(each.token_ids), each.finish_reason) for each in found]
    assert dict(zip(SCRIPTS, shown, strict=True)) == {name: (*expected,) for name, (_, *expected) in SCRIPTS.items()}


@pytest.mark.parametrize(
    ("said", "repeats", "kept", "reason"),
    [
        ("ab1212121234", 3, "ab121212", "repetition"),
        ("ab1212121234", 4, "ab12121212", "repetition"),
        ("ab1212121234", 5, "ab1212121234", "length"),
        ("aaa", 3, "aaa", "length"),  # the limit comes first, as in vLLM
        ("abc\n", 2, "abc", "stop"),
        ("1212\n", 3, "1212", "stop"),
        ("1212\n", 2, "1212", "repetition"),
    ],
)
def test_a_loop_ends_a_completion(engine: HfEngine, said: str, repeats: int, kept: str, reason: str) -> None:
    sampling = Sampling(max_tokens=len(said), stop=("\n",), max_repeats=repeats)
    with scripted(engine, [said]):
        (found,) = engine.generate([Request(None, random_prompts(6)[0])], sampling)
    assert (found.text, found.finish_reason) == (kept, reason)


def test_a_stop_string_may_not_begin_in_the_prompt(engine: HfEngine) -> None:
    (ends_in_equals,) = random_prompts(6)
    prompt = (*ends_in_equals, *engine._tokenizer("=")["input_ids"])
    with scripted(engine, ["(2=(4567"]):
        (found,) = engine.generate([Request(None, prompt)], Sampling(max_tokens=50, stop=("=(",)))
    assert (found.text, len(found.token_ids), found.finish_reason) == ("(2", 4, "stop")


def test_every_end_token_of_the_model_ends_and_nothing_else_of_its_settings_counts(
    random_llama: Path, space: LoraSpace, engine: HfEngine, tmp_path: Path
) -> None:
    requests = [Request(None, prompt) for prompt in random_prompts(4, 9, 17, 30, 50)]
    plain = ordered(engine, requests, Sampling(max_tokens=24))
    second_end = plain[0].token_ids[3]
    folder = tmp_path / "model"
    shutil.copytree(random_llama, folder)
    settings = {"do_sample": True, "temperature": 3.0, "top_k": 2, "repetition_penalty": 9.0, "max_length": 3}
    (folder / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": [END, second_end]}))
    other = HfEngine(folder, space, RUN_SEED, 0, "float32")
    for one, mine in zip(plain, ordered(other, requests, Sampling(max_tokens=24)), strict=True):
        ends = [place + 1 for place, token in enumerate(one.token_ids) if token in (END, second_end)]
        assert mine.token_ids == one.token_ids[: min(ends, default=None)]
        assert mine.finish_reason == ("stop" if ends else "length")


def test_samples_are_seeded_and_differ(engine: HfEngine) -> None:
    sampling = Sampling(max_tokens=16, samples=3, temperature=1.0)

    def sample(seed: int) -> list[Completion]:
        requests = [Request(slot, prompt, seed) for slot in (0, 2) for prompt in random_prompts(5, 30)]
        return ordered(engine, requests, sampling)

    found = sample(11)
    assert [(each.request, each.sample) for each in found] == [(r, s) for r in range(4) for s in range(3)]
    assert found == sample(11)
    assert len({each.token_ids for each in found}) >= 11
    assert sum(one == other for one, other in zip(found, sample(12), strict=True)) <= 1


def test_samples_belong_to_their_request(engine: HfEngine) -> None:
    """With top_p near 0 every sample is the greedy completion of its own prompt, by its own slot."""
    requests = [Request(slot, prompt) for slot in (0, 2) for prompt in random_prompts(5, 30)]
    greedy = ordered(engine, requests, Sampling(max_tokens=8))
    sampled = ordered(engine, requests, Sampling(max_tokens=8, samples=3, temperature=1.0, top_p=1e-6))
    assert [each.token_ids for each in sampled] == [each.token_ids for each in greedy for _ in range(3)]


def test_logprobs_of_completions_are_those_of_their_tokens(random_llama: Path, space: LoraSpace) -> None:
    """Whatever the temperature, and with padding on the left of all prompts but one. They are of the very passes in
    which the tokens were drawn: in float64, so that these round as a pass over the whole does."""
    engine = HfEngine(random_llama, space, RUN_SEED, 1 << 28, "float64")
    engine.set_center(random_center(space))
    engine.write_slots(0, SIGMA, MEMBERS)
    prompts = random_prompts(5, 30)
    requests = [Request(slot, prompt, 11) for slot in (0, 2, None) for prompt in prompts]
    lean = Sampling(max_tokens=12, samples=2, temperature=0.7, top_p=0.9, stop=("\n",), max_repeats=2)
    asked = ordered(engine, requests, replace(lean, logprobs=True))
    assert [replace(each, logprobs=None) for each in asked] == ordered(engine, requests, lean)
    for each in asked:
        request = requests[each.request]
        (whole,) = engine.logprobs([replace(request, prompt_ids=request.prompt_ids + each.token_ids)])
        np.testing.assert_allclose(each.logprobs, whole[len(request.prompt_ids) - 1 :], atol=1e-6)


def test_logprobs_of_completions_cost_no_pass_more(engine: HfEngine) -> None:
    """Costs count a token once that is read once."""
    passes = []
    hook = engine._model.get_base_model().register_forward_pre_hook(lambda *_: passes.append(1))
    requests = [Request(0, prompt, 11) for prompt in random_prompts(5, 30)]
    counts = []
    for logprobs in (False, True):
        passes.clear()
        ordered(engine, requests, Sampling(max_tokens=6, samples=2, temperature=1.0, logprobs=logprobs))
        counts.append(len(passes))
    hook.remove()
    assert counts[0] == counts[1] > 0


def test_half_precision_is_loaded_when_asked_for(random_llama: Path, space: LoraSpace, engine: HfEngine) -> None:
    half = HfEngine(random_llama, space, RUN_SEED, 0, "bfloat16")
    requests = [Request(None, prompt) for prompt in random_prompts(20)]
    error = np.abs(half.logprobs(requests)[0] - engine.logprobs(requests)[0])
    assert 1e-4 < error.mean() < 0.05


# Prompts


def example(**fields: Any) -> Example:
    return Example(id="train/5", answer="", info={}, **fields)


def test_a_text_prompt_is_tokenised_as_it_stands(random_llama: Path) -> None:
    problem = preparer(load_tokenizer(random_llama), 512, 16)(example(prompt="1+2="))
    assert (problem.prompt, problem.prompt_ids) == ("1+2=", (4, 13, 5, 19))
    assert problem.example.id == "train/5"


def test_a_chat_is_rendered_by_the_models_template_and_begun_once(random_llama: Path) -> None:
    tokenizer = load_tokenizer(random_llama)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    prepare = preparer(tokenizer, 512, 16)
    problem = prepare(example(messages=({"role": "m", "content": "1"}, {"role": "p", "content": "2"})))
    assert problem.prompt == "<s>m:1\np:2\na:"
    assert problem.prompt_ids == (1, 36, 20, 4, 23, 39, 20, 5, 23, 24, 20)
    assert prepare(example(prompt="1")).prompt_ids == (1, 4), "a text prompt gets its first token from the tokenizer"


def test_a_chat_without_a_template_is_refused(random_llama: Path) -> None:
    with pytest.raises(ValueError, match=r"^task\.template: this model has no chat template"):
        preparer(load_tokenizer(random_llama), 512, 16)(example(messages=({"role": "user", "content": "1"},)))


def test_a_prompt_longer_than_the_context_is_refused(random_llama: Path) -> None:
    context = context_length(random_llama)
    assert context == 512
    prepare = preparer(load_tokenizer(random_llama), context, 12)
    assert len(prepare(example(prompt="1" * 500)).prompt_ids) == 500
    with pytest.raises(ValueError, match=r"^task: the prompt of train/5 has 501 tokens, .*512 tokens$") as refused:
        prepare(example(prompt="1" * 501))
    assert "\n" not in str(refused.value)
