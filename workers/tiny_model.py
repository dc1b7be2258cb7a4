"""A Llama of about a million parameters with a character tokenizer, trained on the spot: the fast test bed.

Shapes: N sequences of a batch, T tokens of the longest of them, V = vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from workers.models import cached_folder

logger = logging.getLogger(__name__)

Examples = Callable[[int], tuple[str, str]]

# Part of the cache key: raise it whenever the training itself changes.
RECIPE = 1

CONTEXT = 256
IGNORED = -100  # the label that cross_entropy leaves out
PAD, BOS, EOS, UNKNOWN = "<pad>", "<bos>", "<eos>", "<unk>"
SAMPLED = 256  # examples that stand for all of the training in the cache key
WARM_UP = 0.05  # share of the steps


def resolve_tiny(
    *,
    examples: Examples,
    alphabet: str,
    steps: int = 1000,
    batch: int = 64,
    lr: float = 3e-3,
    seed: int = 0,
    hidden: int = 128,
    layers: int = 4,
    heads: int = 4,
) -> Path:
    """The folder of the tiny model of these arguments, trained where the cache has none; see `build_tiny_model`.

    The cache's key holds every argument; for `examples`, which is code, it holds what some calls return, evenly spread
    over the training.
    """
    sizes = {"steps": steps, "batch": batch, "lr": lr, "seed": seed, "hidden": hidden, "layers": layers, "heads": heads}
    sample = [examples(number * steps * batch // SAMPLED) for number in range(SAMPLED)]
    key = hashlib.sha256(json.dumps([RECIPE, sizes, alphabet, sample]).encode()).hexdigest()[:16]
    return cached_folder(
        f"tiny-{key}",
        lambda folder: build_tiny_model(
            folder,
            steps=steps,
            hidden=hidden,
            layers=layers,
            heads=heads,
            batch=batch,
            lr=lr,
            seed=seed,
            examples=examples,
            alphabet=alphabet,
        ),
    )


def build_tiny_model(
    folder: Path,
    *,
    steps: int,
    hidden: int = 128,
    layers: int = 4,
    heads: int = 4,
    batch: int,
    lr: float,
    seed: int,
    examples: Examples,
    alphabet: str,
) -> None:
    """Train a Llama on (prompt, completion) pairs and save it, with its tokenizer, as transformers and vLLM load it.

    Step i sees examples i*batch to (i+1)*batch - 1. AdamW with a short warm-up and cosine decay from `lr`; the loss is
    on the completion and the end token. `alphabet` lists the characters the model knows. It trains on one thread: at
    this size a second gains little and loses much on a busy machine, and the order of sums depends on their number; the
    same arguments give the same weights on the same kind of CPU. Raises ValueError for a character outside `alphabet`,
    an example longer than the context, and a head size that vLLM's CPU attention lacks.
    """
    if hidden % heads or (hidden // heads) % 32:
        raise ValueError(f"hidden: hidden/heads must be a multiple of 32, and {hidden}/{heads} is not")
    tokenizer = character_tokenizer(alphabet)
    with _reproducibly(seed):
        model = _fresh_model(tokenizer, hidden, layers, heads)
        _train(model, tokenizer, examples, steps, batch, lr)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def character_tokenizer(alphabet: str) -> PreTrainedTokenizerFast:
    """A token for every character of `alphabet`, plus pad, begin (put before every text), end and unknown."""
    vocabulary = {token: index for index, token in enumerate([PAD, BOS, EOS, UNKNOWN, *sorted(set(alphabet))])}
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    characters.decoder = decoders.Fuse()
    characters.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, vocabulary[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=characters,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def _fresh_model(tokenizer: PreTrainedTokenizerFast, hidden: int, layers: int, heads: int) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            intermediate_size=4 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=CONTEXT,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def _train(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, examples: Examples, steps: int, batch: int, lr: float
) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _warm_up_then_cosine(step, steps))
    model.train()
    for step in range(steps):
        pairs = [examples(index) for index in range(step * batch, (step + 1) * batch)]
        loss = _loss(model, *tokens_and_labels(tokenizer, pairs))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            logger.info("tiny model: step %d of %d, loss %.3f", step + 1, steps, loss.item())
    model.eval()


def _warm_up_then_cosine(step: int, steps: int) -> float:
    return min((step + 1) / (WARM_UP * steps), 0.5 + 0.5 * math.cos(math.pi * step / steps))


def _loss(model: LlamaForCausalLM, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    # Padding stands on the right, where causal attention never looks: no mask is needed.
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits  # (N, T - 1, V)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)


def tokens_and_labels(
    tokenizer: PreTrainedTokenizerFast, pairs: Sequence[tuple[str, str]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both (N, T): prompt, completion and end token, padded on the right; then the same, prompt and padding ignored."""
    prompts = tokenizer([prompt for prompt, _ in pairs]).input_ids
    completions = tokenizer([completion for _, completion in pairs], add_special_tokens=False).input_ids
    length = max(len(prompt) + len(completion) + 1 for prompt, completion in zip(prompts, completions, strict=True))
    if length > CONTEXT:
        raise ValueError(f"examples: one has {length} tokens; the tiny model's context holds {CONTEXT}")
    tokens = torch.full((len(pairs), length), tokenizer.pad_token_id)
    labels = torch.full((len(pairs), length), IGNORED)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        answer = torch.tensor([*completion, tokenizer.eos_token_id])
        tokens[row, : len(prompt)] = torch.tensor(prompt)
        tokens[row, len(prompt) : len(prompt) + len(answer)] = answer
        labels[row, len(prompt) : len(prompt) + len(answer)] = answer
    if (tokens == tokenizer.unk_token_id).any():
        unknown = "".join(sorted(set("".join(map("".join, pairs))) - set(tokenizer.get_vocab())))
        raise ValueError(f"alphabet: the examples hold characters it lacks: {unknown!r}")
    return tokens, labels


@contextmanager
def _reproducibly(seed: int) -> Iterator[None]:
    """Inside, torch has one thread and its generator starts from `seed`; afterwards both are as they were."""
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
