"""Demonstrations and preferences, as people have them in files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from rewards.demonstrations import read_demonstrations, read_preferences

ASKED = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "3+4"}]
SEVEN, EIGHT = {"role": "assistant", "content": "7"}, {"role": "assistant", "content": "8"}


def rows(tmp_path: Path, *records: Any) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_a_demonstration_is_a_prompt_and_a_completion_or_a_chat(tmp_path: Path) -> None:
    records = [
        {"prompt": "3+4=", "completion": "7", "id": 5},
        {"prompt": ASKED, "completion": [SEVEN]},
        {"messages": [*ASKED, SEVEN]},
        {"prompt": ASKED, "completion": "7", "messages": "of something else"},
    ]
    found = read_demonstrations(rows(tmp_path, *records), "method.data")
    assert [each.completion for each in found] == [each.example.answer for each in found] == ["7"] * 4
    assert [each.example.prompt for each in found] == ["3+4=", None, None, None]
    assert [each.example.messages for each in found] == [None, *[tuple(ASKED)] * 3]
    assert [each.example.info for each in found] == records
    assert found[0].example.id == "5"
    assert found[1].example.id == found[2].example.id == found[3].example.id


def test_a_preference_has_a_prompt_of_its_own_or_two_chats_that_begin_alike(tmp_path: Path) -> None:
    records = [
        {"prompt": "3+4=", "chosen": "7", "rejected": "8"},
        {"prompt": ASKED, "chosen": [SEVEN], "rejected": [EIGHT]},
        {"chosen": [*ASKED, SEVEN], "rejected": [*ASKED, EIGHT]},
    ]
    found = read_preferences(rows(tmp_path, *records), "method.data")
    assert [(each.chosen, each.rejected) for each in found] == [("7", "8")] * 3
    assert [each.example.prompt for each in found] == ["3+4=", None, None]
    assert [each.example.messages for each in found] == [None, tuple(ASKED), tuple(ASKED)]


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        ("3+4=7", "is not an object with `prompt` and `completion`, or `messages`"),
        ({"prompt": "3+4="}, "has no `completion`"),
        ({"completion": "7"}, "has no `prompt`"),
        ({"prompt": "3+4=", "completion": 7}, "`completion` is 7; accepted is text or a list of role and content"),
        ({"prompt": "3+4=", "completion": [*ASKED, SEVEN]}, "accepted is text or one message, the assistant's"),
        ({"prompt": [*ASKED, SEVEN], "completion": "7"}, "`prompt` has no message of the user before"),
        ({"prompt": [], "completion": "7"}, "`prompt` is []; accepted is text or a list of role and content"),
        ({"messages": ASKED}, "the last message of `messages` is the user's, not the assistant's"),
        ({"messages": [SEVEN]}, "`messages` has no message of the user before"),
        ({"messages": [{"role": "narrator", "content": "7"}]}, "accepted is text or a list of role and content"),
    ],
)
def test_what_is_no_demonstration_is_refused_in_one_sentence(tmp_path: Path, record: Any, complaint: str) -> None:
    path = rows(tmp_path, {"prompt": "", "completion": ""}, record)
    with pytest.raises(ValueError, match=f"^method.data: {re.escape(path)}, line 2.*{re.escape(complaint)}"):
        read_demonstrations(path, "method.data")


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        ({"prompt": "3+4=", "chosen": "7"}, "has no `rejected`"),
        ({"prompt": "3+4=", "rejected": "8"}, "has no `chosen`"),
        ({"chosen": [*ASKED, SEVEN]}, "has no `rejected`"),
        ({"chosen": "7", "rejected": "8"}, "`chosen` is '7'; accepted is text or a list of role and content"),
        ({"chosen": [*ASKED, SEVEN], "rejected": [ASKED[1], EIGHT]}, "differ before their last message"),
        ([], "is not an object with `prompt`, `chosen` and `rejected`"),
    ],
)
def test_what_is_no_preference_is_refused_in_one_sentence(tmp_path: Path, record: Any, complaint: str) -> None:
    path = rows(tmp_path, {"prompt": "", "chosen": "", "rejected": ""}, record)
    with pytest.raises(ValueError, match=f"^method.data: {re.escape(path)}, line 2.*{re.escape(complaint)}"):
        read_preferences(path, "method.data")
