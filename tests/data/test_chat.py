"""Chat templates that refuse, fail, or are several."""

from __future__ import annotations

import pytest

from slim.checkpoints.source import EMBEDDED
from slim.checkpoints.tokenizer import load_tokenizer
from slim.core.errors import SlimError
from slim.data.chat import render_chat, require_chat_template, turns
from slim.data.encoding import encode_pairs

ALTERNATING = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{% endif %}{{ m.content }}{% endfor %}"
)
USER = {"role": "user", "content": "Hi."}


@pytest.fixture
def tokenizer():
    return load_tokenizer(EMBEDDED["tiny"])


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (
            [{"role": "system", "content": "Be kind."}, USER],
            "of system, user: System role not supported.\nUse data without system messages",
        ),
        ([USER, USER], "of user, user: Conversation roles must alternate.*\nUse data whose user"),
    ],
)
def test_a_conversation_that_a_template_refuses(tokenizer, messages, message):
    tokenizer.chat_template = ALTERNATING
    with pytest.raises(SlimError, match=message):
        render_chat(tokenizer, messages)


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[9].content }}",
        "{{ messages[0].content + 3 }}",
        "{{ 1 // 0 }}",
        "{% for m in messages %}",
        "{{ messages.nothing() }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_a_template_that_fails_in_any_way_is_named(tokenizer, template):
    tokenizer.chat_template = template
    with pytest.raises(SlimError, match="chat template of the model's tokenizer"):
        render_chat(tokenizer, [USER])


def test_several_templates_without_a_default(tokenizer):
    plain = tokenizer.chat_template
    tokenizer.chat_template = {"tool_use": plain, "rag": plain}
    with pytest.raises(SlimError, match="tool_use, rag and none named default. Write the one"):
        list(encode_pairs(tokenizer, [("Why?", "So.")]))


def test_of_several_templates_the_default_counts(tokenizer):
    plain = tokenizer.chat_template
    expected = render_chat(tokenizer, turns("Why?", "So."))
    tokenizer.chat_template = {"tool_use": "{{ 1 // 0 }}", "default": plain}
    assert render_chat(tokenizer, turns("Why?", "So.")) == expected


def test_whose_tokenizer_lacks_a_template_is_said(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(SlimError, match="The teacher's tokenizer has no chat template. Do that."):
        require_chat_template(tokenizer, "Do that.", "The teacher's tokenizer")
