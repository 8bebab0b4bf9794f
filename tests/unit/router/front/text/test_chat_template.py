from __future__ import annotations

from collections.abc import Callable, Collection
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from common.errors import CheckpointError, InvalidRequestError
from services.router.front.text.chat_template import ChatTemplate
from tests.support.checkpoints.tiny_tokenizers import byte_level_tokenizer, write_tokenizer_directory

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
    template = ChatTemplate("{{ strftime_now('%d %b %Y') }}", {})
    assert template.render(MESSAGES, {}, datetime(2026, 3, 1)) == "01 Mar 2026"


PARTS = [{"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]}]


def test_text_parts_become_lines_where_the_template_knows_strings_only() -> None:
    assert ChatTemplate(TEMPLATES["mistral"], SPECIAL_TOKENS).render(PARTS, {}) == "<s>[INST] one\ntwo [/INST]"


def test_text_parts_go_to_a_template_that_takes_them() -> None:
    source = "{% for part in messages[0].content %}[{{ part.text }}]{% endfor %}"
    assert ChatTemplate(source, {}).render(PARTS, {}) == "[one][two]"


# What published templates do with content, each in a few lines of its own making. After a role: what it takes.
STYLES = {
    # strings alone: a list would be added to a string, or written out
    "chatml": "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '\\n' }}{% endfor %}",
    "chatml, printed": "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}",
    "chatml, trimmed": "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}\n{% endfor %}",
    "chatml, joined": "{% for m in messages %}{{ '<' ~ m.role ~ '>' ~ m.content ~ '\\n' }}{% endfor %}",
    "json": "{% for m in messages %}{{ m.role }}: {{ m.content | tojson }}\n{% endfor %}",
    "json of messages": "{{ messages | tojson }}",
    "printed messages": "{% for m in messages %}{{ m }}{% endfor %}",
    # parts from users only; others are printed
    "vision": (
        "{% for m in messages %}<{{ m.role }}>{% if m.role == 'user' and m.content is not string %}"
        "{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}"
        "{% else %}{{ m.content }}{% endif %}\n{% endfor %}"
    ),
    # parts from all but the first system message, which is added to a string
    "first system": (
        "{% if messages[0].role == 'system' %}{{ '<sys>' + messages[0].content + '\\n' }}{% endif %}"
        "{% for m in messages %}{% if not (loop.first and m.role == 'system') %}<{{ m.role }}>"
        "{% if m.content is string %}{{ m.content }}{% else %}"
        "{% for part in m['content'] %}{{ part['text'] }}{% endfor %}{% endif %}\n{% endif %}{% endfor %}"
    ),
    # the first part of the system message only
    "first part": (
        "{% set system = messages[0].content if messages[0].content is string else messages[0].content[0].text %}"
        "<sys>{{ system }}\n{% for m in messages[1:] %}<{{ m.role }}>"
        "{% if m.content is string %}{{ m.content }}{% elif m.content is iterable %}"
        "{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}\n{% endfor %}"
    ),
    # lists become nothing
    "strings or nothing": (
        "{% for m in messages %}<{{ m.role }}>"
        "{% set c = m.content if m.content is string else '' %}{{ c }}\n{% endfor %}"
    ),
    "strings or an error": (
        "{% for m in messages %}<{{ m.role }}>"
        "{% if m.content is not string %}{{ raise_exception('no lists') }}{% endif %}"
        "{{ m.content }}\n{% endfor %}"
    ),
    # strings become nothing
    "parts alone": (
        "{% for m in messages %}<{{ m.role }}>{% for part in m.content %}{% if part['type'] == 'text' %}"
        "{{ part['text'] }}{% endif %}{% endfor %}\n{% endfor %}"
    ),
    "parts alone, by filters": (
        "{% for m in messages %}<{{ m.role }}>"
        "{{ m.content | selectattr('type', 'equalto', 'text') | map(attribute='text') | join('') }}\n{% endfor %}"
    ),
}
ROLES = ["system", "user", "assistant", "tool"]
WORDS = {"system": "Be brief.", "user": "How warm?", "assistant": "Let me see.", "tool": "21 degrees"}


def chat_of(form: Callable[[str], Any], roles: Collection[str]) -> list[dict[str, Any]]:
    """All roles speak, those of `roles` with content in this form."""
    return [{"role": role, "content": form(WORDS[role]) if role in roles else WORDS[role]} for role in ROLES]


@pytest.mark.parametrize(
    "roles", [ROLES, *([role] for role in ROLES), ["system", "tool"], ["user", "assistant"]], ids=str
)
@pytest.mark.parametrize("style", STYLES)
def test_one_text_part_says_what_the_string_says_in_every_role(style: str, roles: list[str]) -> None:
    template = ChatTemplate(STYLES[style], {})
    rendered = template.render(chat_of(lambda text: [{"type": "text", "text": text}], roles), {})
    assert rendered == template.render(chat_of(str, ROLES), {})
    for text in WORDS.values():
        assert text in rendered
    assert ("'type'" in rendered, '"type"' in rendered) == (False, False)


@pytest.mark.parametrize("roles", [ROLES, *([role] for role in ROLES)], ids=str)
@pytest.mark.parametrize("style", STYLES)
def test_no_part_of_several_is_lost_or_written_out_as_a_list(style: str, roles: list[str]) -> None:
    def in_parts(text: str) -> list[Any]:
        return [{"type": "text", "text": text}, "between", {"type": "text", "text": "last"}]

    rendered = ChatTemplate(STYLES[style], {}).render(chat_of(in_parts, roles), {})
    assert rendered.count("between") == rendered.count("last") == len(roles)
    for text in WORDS.values():
        assert text in rendered
    assert ("'type'" in rendered, '"type"' in rendered) == (False, False)


@pytest.mark.parametrize("roles", [ROLES, *([role] for role in ROLES)], ids=str)
@pytest.mark.parametrize("style", STYLES)
def test_an_empty_list_says_nothing_as_an_empty_string_does(style: str, roles: list[str]) -> None:
    template = ChatTemplate(STYLES[style], {})
    assert template.render(chat_of(lambda text: [], roles), {}) == template.render(chat_of(lambda text: "", roles), {})


@pytest.mark.parametrize(
    ("style", "taking"),
    [("vision", ["user"]), ("first system", ["user", "assistant", "tool"]), ("parts alone", ROLES)],
)
def test_parts_that_a_role_takes_are_rendered_as_transformers_renders_them(
    style: str, taking: list[str], tmp_path: Path
) -> None:
    write_tokenizer_directory(tmp_path, byte_level_tokenizer(), chat_template=STYLES[style])
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    parts = chat_of(lambda text: [{"type": "text", "text": text}, {"type": "text", "text": " and more"}], taking)
    expected = theirs.apply_chat_template(parts, add_generation_prompt=True, tokenize=False)
    assert ChatTemplate(STYLES[style], SPECIAL_TOKENS).render(parts, {}) == expected
    assert "How warm? and more" in expected


def test_a_role_that_refuses_lists_leaves_the_others_theirs() -> None:
    parts = chat_of(lambda text: [{"type": "text", "text": text}, {"type": "text", "text": "!"}], ROLES)
    template = ChatTemplate(STYLES["first system"], {})
    others = "<user>How warm?!<assistant>Let me see.!<tool>21 degrees!"
    assert template.render(parts, {}) == f"<sys>Be brief.\n!\n{others}"
    assert template.render(parts[1:] + parts[:1], {}) == f"{others}<system>Be brief.!"


def test_an_error_that_is_no_lists_fault_stays_the_templates_own() -> None:
    source = "{% if messages[0].role != 'user' %}{{ raise_exception('must begin with a user') }}{% endif %}"
    with pytest.raises(InvalidRequestError, match="must begin with a user"):
        ChatTemplate(source, {}).render(chat_of(lambda text: [{"type": "text", "text": text}], ROLES), {})


@pytest.mark.parametrize(
    ("source", "role"),
    [
        ("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}", "system"),
        (
            "{% for m in messages %}{% if m.role == 'developer' %}<dev>{% endif %}"
            "<{{ m.role }}>{{ m.content }}{% endfor %}",
            "developer",
        ),
    ],
)
@pytest.mark.parametrize("content", ["Be brief.", [{"type": "text", "text": "Be brief."}]], ids=["string", "parts"])
def test_a_developer_is_the_system_where_a_template_does_not_know_the_role(
    source: str, role: str, content: Any
) -> None:
    rendered = ChatTemplate(source, {}).render([{"role": "developer", "content": content}], {})
    assert rendered.endswith(f"<{role}>Be brief.")


def test_a_template_cannot_reach_what_is_noted_of_its_parts() -> None:
    for name in ("_watch", "_number", "_note"):
        source = "{% set parts = messages[0].content %}{{ parts[0].NAME }}{{ parts[0].text }}{{ parts[1].text }}"
        source = source.replace("NAME", name)
        try:
            rendered = ChatTemplate(source, {}).render(PARTS, {})
        except InvalidRequestError:
            continue
        assert rendered == "onetwo"


def test_null_fields_of_a_message_do_not_reach_the_template() -> None:
    source = "{{ messages[0].name is defined }}"
    assert ChatTemplate(source, {}).render([{"role": "user", "content": "a", "name": None}], {}) == "False"


CALLED: list[dict[str, Any]] = [
    {"role": "user", "content": "rain?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "call00001", "type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}}
        ],
    },
    {"role": "tool", "tool_call_id": "call00001", "name": "weather", "content": "yes"},
]
TOOL_TEMPLATES = {
    "looks whether it is a string": (
        "{% for message in messages %}{{ message.role }}|{{ message.content if message.content is string else '' }}"
        "{% for call in message.tool_calls or [] %}<{{ call.function.name }} {{ call.function.arguments | tojson }}>"
        "{% endfor %}{{ message.tool_call_id }}\n{% endfor %}"
    ),
    "looks whether it is there": (
        "{% for message in messages %}{% if message['role'] == 'assistant' and not message['content'] %}"
        "{% for call in message['tool_calls'] %}<{{ call['function']['name'] }}>{% endfor %}{% else %}"
        "{{ message['content'] }}{% endif %}{% endfor %}"
    ),
}


@pytest.mark.parametrize("name", sorted(TOOL_TEMPLATES))
def test_a_history_with_tool_calls_renders_as_in_transformers(tmp_path: Path, name: str) -> None:
    directory = write_tokenizer_directory(tmp_path, byte_level_tokenizer(), chat_template=TOOL_TEMPLATES[name])
    expected = AutoTokenizer.from_pretrained(directory).apply_chat_template(
        CALLED, tokenize=False, add_generation_prompt=True
    )
    rendered = ChatTemplate(TOOL_TEMPLATES[name], SPECIAL_TOKENS).render(CALLED, {})
    assert rendered == expected


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}",
        "{% for m in messages %}{{ m.content + ';' }}{% endfor %}",
    ],
)
def test_the_word_none_is_never_printed_for_content_that_is_null(template: str) -> None:
    rendered = ChatTemplate(template, SPECIAL_TOKENS).render(CALLED, {})
    assert "None" not in rendered
    assert rendered.endswith("yes;")


ASKS_FOR_NULL = (
    "{% for m in messages %}<{{ m['role'] }}>{% if m['role'] == 'assistant' and m['content'] is none %}"
    "{% for call in m['tool_calls'] %}{{ call['type'] + ' ' + call['function']['name'] + ' ' + "
    "call['function']['arguments'] }}{% endfor %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
)
CALLS_ALONE: dict[str, dict[str, Any]] = {
    "null": {"content": None},
    "absent": {},
    "empty": {"content": ""},
    "empty list": {"content": []},
}


@pytest.mark.parametrize("silence", CALLS_ALONE)
def test_calls_are_shown_by_a_template_that_asks_for_null_and_wants_arguments_as_text(silence: str) -> None:
    spoken = {name: value for name, value in CALLED[1].items() if name != "content"} | CALLS_ALONE[silence]
    rendered = ChatTemplate(ASKS_FOR_NULL, {}).render([CALLED[0], spoken, CALLED[2]], {})
    assert rendered == '<user>rain?<assistant>function weather {"city": "Köln"}<tool>yes'


def test_arguments_are_text_for_a_template_that_adds_them_to_text() -> None:
    source = (
        "{% for m in messages %}{{ m.content }}{% for call in m.tool_calls or [] %}"
        "{{ '<' + call.function.name + call.function.arguments + '>' }}{% endfor %}{% endfor %}"
    )
    spoken = {**CALLED[1], "content": "Let me see."}
    expected = '<weather{"city": "Köln"}>'
    assert ChatTemplate(source, {}).render(CALLED, {}) == f"rain?{expected}yes"
    assert ChatTemplate(source, {}).render([CALLED[0], spoken], {}) == f"rain?Let me see.{expected}"


@pytest.mark.parametrize("silence", CALLS_ALONE)
@pytest.mark.parametrize("name", sorted(TOOL_TEMPLATES))
def test_calls_that_are_shown_are_told_as_transformers_tells_them(name: str, silence: str) -> None:
    spoken = {name: value for name, value in CALLED[1].items() if name != "content"} | CALLS_ALONE[silence]
    rendered = ChatTemplate(TOOL_TEMPLATES[name], {}).render([CALLED[0], spoken, CALLED[2]], {})
    assert rendered == ChatTemplate(TOOL_TEMPLATES[name], {}).render(CALLED, {})


def test_of_several_errors_the_one_that_the_template_raises_is_told() -> None:
    source = "{% for m in messages %}{{ m.content + '' }}{% endfor %}{{ raise_exception('no tools') }}"
    with pytest.raises(InvalidRequestError, match="no tools"):
        ChatTemplate(source, {}).render(CALLED, {})


def test_a_template_cannot_reach_what_is_noted_of_its_calls() -> None:
    source = "{{ messages[1].tool_calls[0].function.name }}{{ messages[1].tool_calls[0].function._is_shown is true }}"
    assert ChatTemplate(source, {}).render(CALLED, {}) == "weatherFalse"


@pytest.mark.parametrize("shown", ["tool_calls", "tool_calls[0]", "tool_calls[0].function"])
def test_calls_that_are_written_out_whole_are_shown_with_arguments_as_objects(shown: str) -> None:
    source = "{{ messages[1].SHOWN | tojson }}{{ messages[1].content is none }}".replace("SHOWN", shown)
    rendered = ChatTemplate(source, {}).render(CALLED, {})
    assert '"arguments": {"city": "Köln"}' in rendered
    assert rendered.endswith("False"), "the first form is the one that transformers gives"
