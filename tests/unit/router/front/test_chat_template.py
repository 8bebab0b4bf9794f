from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from common.errors import CheckpointError, InvalidRequestError
from services.router.front.chat_template import ChatTemplate
from tests.support.tiny_tokenizers import byte_level_tokenizer, write_tokenizer_directory

SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "Sys <&>"},
    {"role": "user", "content": "Hi 你好"},
    {"role": "assistant", "content": "Ho"},
    {"role": "user", "content": "  again\n"},
]
TEMPLATES = {
    "mistral": (
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
        "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
        "{{ message['content'] + eos_token}}{% endif %}{% endfor %}"
    ),
    "qwen": (
        "{%- if tools %}tools{%- endif %}\n{%- set ns = namespace(last=messages|length - 1) %}\n"
        "{%- for message in messages[::-1] %}\n    {%- set index = (messages|length - 1) - loop.index0 %}\n"
        "    {%- if message.role == 'user' %}\n        {%- set ns.last = index %}\n        {%- break %}\n"
        "    {%- endif %}\n"
        "{%- endfor %}\n{%- for message in messages %}\n    {%- if message.content is string %}\n"
        "        {%- set content = message.content %}\n    {%- else %}\n        {%- set content = '' %}\n"
        "    {%- endif %}\n"
        "{{- '<|im_start|>' + message.role + '\\n' + content.strip('\\n').split('</think>')[-1] + '<|im_end|>\\n' }}\n"
        "{%- endfor %}\n{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n"
        "    {%- if enable_thinking is defined and enable_thinking is false %}\n"
        "        {{- '<think>\\n\\n</think>\\n\\n' }}\n    {%- endif %}\n{%- endif %}"
    ),
    "blocks": (
        "  {% for message in messages %}\n    {% if loop.first %}\n    first\n    {% continue %}\n    {% endif %}\n"
        "{% generation %}{{ message | tojson }}{% endgeneration %}\n  {% endfor %}\n{{ [1, 2] | tojson(indent=2) }}\n"
        "{{ dict(a=1) }} {{ messages[0].missing is defined }} {{ tools is none }}\n"
    ),
}


@pytest.mark.parametrize("name", sorted(TEMPLATES))
@pytest.mark.parametrize("arguments", [{}, {"enable_thinking": False}])
def test_templates_render_as_in_transformers(tmp_path: Path, name: str, arguments: dict[str, Any]) -> None:
    write_tokenizer_directory(tmp_path, byte_level_tokenizer(), chat_template=TEMPLATES[name])
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    expected = theirs.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False, **arguments)
    assert ChatTemplate(TEMPLATES[name], SPECIAL_TOKENS).render(MESSAGES, arguments) == expected


def test_what_the_template_says_against_messages_reaches_the_client() -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", {})
    with pytest.raises(InvalidRequestError, match="roles must alternate") as caught:
        template.render(MESSAGES, {})
    assert caught.value.parameter == "messages"


@pytest.mark.parametrize("source", ["{{ messages[9].content.strip() }}", "{{ messages + 1 }}", "{{ 1 // 0 }}"])
def test_any_error_in_a_template_is_the_requests(source: str) -> None:
    with pytest.raises(InvalidRequestError):
        ChatTemplate(source, {}).render(MESSAGES, {})


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ namespace(__class__=1) }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__ }}",
    ],
)
def test_templates_are_kept_in_the_sandbox(source: str) -> None:
    with pytest.raises(InvalidRequestError):
        ChatTemplate(source, {}).render(MESSAGES, {})


def test_template_that_does_not_compile_is_named_at_start() -> None:
    with pytest.raises(CheckpointError, match="chat template"):
        ChatTemplate("{% for %}", {})


def test_now_is_the_clock_that_was_given() -> None:
    template = ChatTemplate("{{ strftime_now('%d %b %Y') }}", {}, now=lambda: datetime(2026, 3, 1))
    assert template.render(MESSAGES, {}) == "01 Mar 2026"


PARTS = [{"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]}]


def test_text_parts_become_lines_where_the_template_knows_strings_only() -> None:
    assert ChatTemplate(TEMPLATES["mistral"], SPECIAL_TOKENS).render(PARTS, {}) == "<s>[INST] one\ntwo [/INST]"


def test_text_parts_go_to_a_template_that_takes_them() -> None:
    source = "{% for part in messages[0].content %}[{{ part.text }}]{% endfor %}"
    assert ChatTemplate(source, {}).render(PARTS, {}) == "[one][two]"


def test_null_fields_of_a_message_do_not_reach_the_template() -> None:
    source = "{{ messages[0].name is defined }}"
    assert ChatTemplate(source, {}).render([{"role": "user", "content": "a", "name": None}], {}) == "False"
