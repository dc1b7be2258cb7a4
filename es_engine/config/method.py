"""The method axis: how a direction for theta is found."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from es_engine.config.base import ConfigModel, Fraction, NonNegativeFloat, PositiveFloat, PositiveInt, Text, problem
from es_engine.config.schedule import Schedule


class TeacherConfig(ConfigModel):
    """The model that is imitated."""

    model: Text | None = Field(
        default=None,
        description="As model.source, with the vocabulary of the run's base model; null: that base model.",
    )
    adapter: Text | None = Field(
        default=None, description="Folder of a PEFT adapter that the teacher wears; null: none."
    )

    @model_validator(mode="after")
    def _is_not_the_student(self) -> Self:
        if self.model is None and self.adapter is None:
            raise problem("model", None, "a model, or null beside an adapter")
        return self


class EsMethodConfig(ConfigModel):
    """Evolution Strategies (Salimans et al., arXiv 1703.03864)."""

    kind: Literal["es"] = Field(
        default="es", description="Evolution Strategies: the fitness of a perturbed population."
    )
    fitness: Literal["reward", "teacher", "references"] = Field(
        default="reward",
        description="What members are compared by: the task's reward, how close they are to a teacher, or how likely "
        "they find completions that are given.",
    )
    teacher: TeacherConfig | None = Field(default=None, description="With fitness teacher: the model that is imitated.")
    data: Text | None = Field(
        default=None,
        description="With fitness references: demonstrations, prompt and completion or messages: a file (JSON lines or "
        "a JSON list) or hub:owner/name@config:split; null: worked solutions of the task's training problems.",
    )
    population: Annotated[int, Field(ge=2)] = Field(default=32, description="Members evaluated in each generation.")
    mirrored: bool = Field(
        default=True, description="Members come in pairs, center + sigma*eps and center - sigma*eps."
    )
    min_pairs: PositiveInt | None = Field(
        default=None,
        description="Pairs (without mirrored: members) with which a generation goes on without the others, "
        "if they are not there pool.straggler_s later; null waits for all.",
    )
    sigma: PositiveFloat | Literal["auto"] = Field(
        default="auto", description="Scale of the perturbations; auto calibrates it before the first generation."
    )
    sigma_schedule: Schedule = Field(default=Schedule(), description="How sigma changes over the budget.")
    shaping: Literal["centered_rank", "zscore", "per_prompt"] = Field(
        default="centered_rank",
        description="Fitness from rewards: ranks, standardised means, or rewards centred on each prompt's mean.",
    )
    prompts: PositiveInt = Field(
        default=32, description="Prompts each member answers in a generation; with fitness references, demonstrations."
    )
    sharing: Literal["population", "pair", "member"] = Field(
        default="population",
        description="Who answers the same prompts: everyone, each mirrored pair, or each member its own.",
    )
    samples: PositiveInt = Field(default=1, description="Completions of each prompt by each member.")
    temperature: NonNegativeFloat = Field(default=0.0, description="Sampling temperature; 0 is greedy.")
    top_p: Fraction = Field(default=1.0, description="Nucleus sampling: the probability mass that is kept.")
    probe_pairs: PositiveInt = Field(
        default=4, description="Mirrored pairs that try each probe sigma when sigma is auto."
    )
    probe_sigmas: Annotated[tuple[PositiveFloat, ...], Field(strict=False, min_length=1)] = Field(
        default=(0.01, 0.03, 0.1, 0.3, 1.0), description="The sigmas tried when sigma is auto."
    )

    @property
    def pairs(self) -> int:
        """The pairs of a generation; without mirrored, its members."""
        return self.population // 2 if self.mirrored else self.population

    @property
    def idle(self) -> tuple[str, ...]:
        probes = () if self.sigma == "auto" else ("probe_pairs", "probe_sigmas")
        greedy = ("top_p",) if self.temperature == 0 else ()
        return (*probes, *greedy, *(("min_pairs",) if self.min_pairs == self.pairs else ()))

    @model_validator(mode="after")
    def _population_is_possible(self) -> Self:
        if self.mirrored and self.population % 2:
            raise problem("population", self.population, "an even number while mirrored is true")
        if self.sharing == "pair" and not self.mirrored:
            raise problem("sharing", self.sharing, "population or member while mirrored is false")
        if self.shaping == "per_prompt" and self.sharing != "population":
            raise problem("shaping", self.shaping, f"centered_rank or zscore while sharing is {self.sharing}")
        return self

    @model_validator(mode="after")
    def _pairs_are_there(self) -> Self:
        if self.min_pairs is not None and self.min_pairs > self.pairs:
            raise problem("min_pairs", self.min_pairs, f"null or at most {self.pairs}, the pairs of a generation")
        if self.min_pairs is not None and self.fitness == "teacher":
            raise problem("min_pairs", self.min_pairs, "null while fitness is teacher")
        return self

    @model_validator(mode="after")
    def _fitness_has_what_it_needs(self) -> Self:
        if self.fitness == "teacher" and self.teacher is None:
            raise problem("teacher", None, "a mapping of model and adapter while fitness is teacher")
        if self.fitness != "teacher" and self.teacher is not None:
            raise problem("teacher", self.teacher.model_dump(), f"null while fitness is {self.fitness}")
        if self.fitness != "references" and self.data is not None:
            raise problem("data", self.data, f"null while fitness is {self.fitness}")
        return self

    @model_validator(mode="after")
    def _completions_are_a_sample_of_what_is_compared(self) -> Self:
        if self.fitness == "teacher" and self.temperature != 1:
            raise problem("temperature", self.temperature, "1 while fitness is teacher")
        if self.fitness == "teacher" and self.top_p != 1:
            raise problem("top_p", self.top_p, "1 while fitness is teacher")
        if self.fitness == "references" and self.temperature != 0:
            raise problem("temperature", self.temperature, "0 while fitness is references, for nothing is sampled")
        return self

    @model_validator(mode="after")
    def _sampling_is_possible(self) -> Self:
        if self.samples > 1 and self.temperature == 0:
            raise problem("samples", self.samples, "1 while temperature is 0")
        return self

    @model_validator(mode="after")
    def _sigma_stays_positive(self) -> Self:
        if self.sigma_schedule.final == 0:
            raise problem("sigma_schedule.final", self.sigma_schedule.final, "a number above 0")
        if self.sigma_schedule.warmup > 0:
            raise problem("sigma_schedule.warmup", self.sigma_schedule.warmup, "0, for sigma cannot rise from 0")
        return self


Clip = Annotated[tuple[Annotated[float, Field(gt=0, lt=1)], PositiveFloat], Field(strict=False)]


class GradientMethodConfig(ConfigModel):
    """What every method that takes gradients has."""

    micro_batch_tokens: PositiveInt | Literal["auto"] = Field(
        default="auto",
        description="Tokens of the samples that a worker takes a gradient on at a time, prompts counted with each "
        "completion and padding included; auto is an eighth of an update's tokens, or the completions of a "
        "prompt where those have more, 512 at least and 4096 at most.",
    )
    max_norm: PositiveFloat | None = Field(
        default=1.0, description="Norm to which longer gradients are shortened; null leaves them as they are."
    )


class PolicyMethodConfig(GradientMethodConfig):
    """What every method has that goes over the center's own completions in updates."""

    prompts: PositiveInt = Field(default=32, description="Prompts in a step.")
    samples: PositiveInt = Field(description="Completions of each prompt.")
    temperature: PositiveFloat = Field(default=1.0, description="Sampling temperature.")
    chunk: PositiveInt = Field(default=8, description="Prompts whose completions are drawn in one engine call.")
    epochs: PositiveInt = Field(default=1, description="Passes over a step's completions.")
    minibatches: PositiveInt = Field(default=1, description="Updates of theta in a pass.")

    @model_validator(mode="after")
    def _minibatches_have_prompts(self) -> Self:
        if self.minibatches > self.prompts:
            raise problem("minibatches", self.minibatches, f"at most prompts ({self.prompts})")
        return self

    @property
    def updates(self) -> int:
        """Updates of theta in a step."""
        return self.epochs * self.minibatches


class GrpoMethodConfig(PolicyMethodConfig):
    """Group relative policy optimisation (Shao et al., arXiv 2402.03300) and its descendants."""

    kind: Literal["grpo"] = Field(
        default="grpo", description="GRPO: rewards of a prompt's completions, relative to each other."
    )
    samples: Annotated[int, Field(ge=2)] = Field(default=8, description="Completions of each prompt: its group.")
    top_p: Fraction = Field(default=1.0, description="Nucleus sampling: the probability mass that is kept.")
    loss: Literal["grpo", "dr_grpo", "dapo", "gspo"] = Field(
        default="dapo", description="How a step's tokens are averaged, and what a probability ratio is of."
    )
    scale_rewards: Literal["std", "none"] | None = Field(
        default=None,
        description="What a reward's distance from its group's mean is divided by; null: none for dr_grpo, else std.",
    )
    clip: Clip = Field(default=(0.2, 0.2), description="How far a probability ratio may fall below 1 and rise above 1.")
    beta: NonNegativeFloat = Field(default=0.0, description="Weight of the KL divergence from the base model.")
    importance_cap: PositiveFloat | None = Field(
        default=2.0,
        description="Most that a token counts for being likelier to the trainer than to the engine; null: all count 1.",
    )
    mask_truncated: bool = Field(default=False, description="Learn nothing from completions that max_tokens ended.")

    @model_validator(mode="after")
    def _the_engine_tells_what_it_sampled_with(self) -> Self:
        if self.importance_cap is not None and (self.temperature, self.top_p) != (1, 1):
            raise problem("importance_cap", self.importance_cap, "null unless temperature and top_p are 1")
        return self

    @property
    def reward_scale(self) -> Literal["std", "none"]:
        """`scale_rewards`, or what suits the loss."""
        return self.scale_rewards or ("none" if self.loss == "dr_grpo" else "std")

    @property
    def as_used(self) -> Self:
        return super().as_used.model_copy(update={"scale_rewards": self.reward_scale})


class OpdMethodConfig(PolicyMethodConfig):
    """On-policy distillation (Agarwal et al., arXiv 2306.13649; Lu and Thinking Machines Lab, 2025)."""

    kind: Literal["opd"] = Field(
        default="opd", description="On-policy distillation: a teacher's opinion of the student's own completions."
    )
    teacher: TeacherConfig = Field(description="The model that is imitated.")
    form: Literal["sampled", "exact"] = Field(
        default="sampled",
        description="The reverse KL of each token: estimated from the token alone, or summed over the vocabulary.",
    )
    samples: PositiveInt = Field(default=4, description="Completions of each prompt.")
    temperature: PositiveFloat = Field(
        default=1.0, description="Sampling temperature, at which student and teacher are compared too."
    )
    importance_cap: PositiveFloat | None = Field(
        default=2.0,
        description="Most that a token of the sampled form counts for being likelier to the trainer than to the "
        "engine; null: all count 1.",
    )

    @model_validator(mode="after")
    def _the_engine_tells_what_it_sampled_with(self) -> Self:
        if self.weighted and self.temperature != 1:
            raise problem("importance_cap", self.importance_cap, "null unless temperature is 1")
        return self

    @property
    def weighted(self) -> bool:
        """Whether the engine's log-probabilities weigh tokens."""
        return self.form == "sampled" and self.importance_cap is not None

    @property
    def idle(self) -> tuple[str, ...]:
        return ("importance_cap",) if self.form == "exact" else ()


class SftMethodConfig(GradientMethodConfig):
    """Supervised fine-tuning: the cross-entropy of given completions."""

    kind: Literal["sft"] = Field(default="sft", description="Supervised fine-tuning: completions that are given.")
    data: Text | None = Field(
        default=None,
        description="Demonstrations, prompt and completion or messages: a file (JSON lines or a JSON list) or "
        "hub:owner/name@config:split; null: worked solutions of the task's training problems.",
    )
    batch: PositiveInt = Field(default=32, description="Demonstrations in a step.")


class DpoMethodConfig(GradientMethodConfig):
    """Direct preference optimisation (Rafailov et al., arXiv 2305.18290)."""

    kind: Literal["dpo"] = Field(default="dpo", description="DPO: the better of two completions, beside the worse.")
    data: Text | None = Field(
        default=None,
        description="Pairs, prompt, chosen and rejected: a file (JSON lines or a JSON list) or "
        "hub:owner/name@config:split; null: the best and the worst of the model's own completions of a prompt.",
    )
    batch: PositiveInt = Field(
        default=32, description="Pairs in a step; without data, prompts, each of which gives one pair or none."
    )
    beta: PositiveFloat = Field(default=0.1, description="Weight of the log-ratio to the base model: its reward.")
    samples: Annotated[int, Field(ge=2)] = Field(
        default=8, description="Without data: completions of each prompt, of which two become a pair."
    )
    temperature: PositiveFloat = Field(default=1.0, description="Without data: sampling temperature.")
    top_p: Fraction = Field(default=1.0, description="Without data: the probability mass that is kept in sampling.")
    chunk: PositiveInt = Field(
        default=8, description="Without data: prompts whose completions are drawn in one engine call."
    )

    @property
    def idle(self) -> tuple[str, ...]:
        return () if self.data is None else ("samples", "temperature", "top_p", "chunk")


MethodConfig = Annotated[
    EsMethodConfig | GrpoMethodConfig | OpdMethodConfig | SftMethodConfig | DpoMethodConfig,
    Field(discriminator="kind"),
]


def teacher_of(method: MethodConfig) -> TeacherConfig | None:
    """The teacher that a method learns from, if any."""
    return method.teacher if isinstance(method, EsMethodConfig | OpdMethodConfig) else None


def uses_torch(method: MethodConfig) -> bool:
    """Whether workers also hold a model in torch for it, which on a GPU takes turns with the engine."""
    return not isinstance(method, EsMethodConfig) or method.teacher is not None
