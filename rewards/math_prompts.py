"""How a maths problem is put to a model. A template is a function of the question, as text."""

from __future__ import annotations

SYSTEM = (
    "You solve mathematics problems. Work in short steps and check them. "
    "Close with the final answer, alone and in its simplest form, inside \\boxed{}."
)

# The solved problems that a few-shot prompt opens with: question, steps, answer.
WORKED: tuple[tuple[str, str, str], ...] = (
    (
        "A baker fills 6 trays with 8 rolls each and sells 35 rolls. How many rolls are left?",
        "The trays hold 6 * 8 = 48 rolls. After the sale 48 - 35 = 13 are left.",
        "13",
    ),
    (
        "A ticket costs $12, and children pay half. What do 2 adults and 3 children pay, in dollars?",
        "The adults pay 2 * 12 = 24 dollars. A child pays 12 / 2 = 6, so the children pay 3 * 6 = 18. "
        "Together that is 24 + 18 = 42.",
        "42",
    ),
    (
        "A tank of 90 litres is two thirds full. How many minutes does a tap of 5 litres a minute need to fill it?",
        "One third is missing, 90 / 3 = 30 litres. The tap needs 30 / 5 = 6 minutes.",
        "6",
    ),
    (
        "What is the sum of the solutions of x^2 - 7x + 10 = 0?",
        "The left side is (x - 2)(x - 5), so the solutions are 2 and 5. Their sum is 2 + 5 = 7.",
        "7",
    ),
)


def plain(question: str) -> str:
    """For a model without roles: the question and how to close."""
    return f"{question}\nReason step by step. Close with the final answer inside \\boxed{{}}.\n"


def few_shot(question: str, shots: int) -> str:
    """The first `shots` worked problems, each closed by `#### answer`, then the question up to where the steps go."""
    worked = [f"Problem: {asked}\nSolution: {steps}\n#### {answer}\n\n" for asked, steps, answer in WORKED[:shots]]
    return "".join(worked) + f"Problem: {question}\nSolution:"


def r1(question: str) -> str:
    """The model thinks first, and the prompt has already opened its <think>."""
    return (
        f"{question}\n\nThink inside <think> </think>, then give the final answer and nothing else inside "
        "<answer> </answer>, for example <answer> \\frac{3}{4} </answer>.\nLet me solve this step by step.\n<think>"
    )
