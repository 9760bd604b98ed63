"""Conversations of any shape."""

from typing import Any

import pytest

from gemma3n_onnx.runtime.errors import PromptError
from gemma3n_onnx.runtime.prompt.chat_template import ChatTemplate
from gemma3n_onnx.runtime.prompt.conversation import holds_every_text, merge_turns
from gemma3n_onnx.runtime.prompt.encoder import TemplateOptions, _render

IMAGE = {"type": "image", "image": object()}


def turn(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def text(content: str) -> dict[str, Any]:
    return {"type": "text", "text": content}


@pytest.mark.parametrize(
    ("given", "merged"),
    [
        ([turn("user", "a")], [turn("user", "a")]),
        ([turn("system", "a"), turn("system", "b"), turn("user", "c")], [turn("system", "a\n\nb"), turn("user", "c")]),
        ([turn("user", "a"), turn("user", "b")], [turn("user", "a\n\nb")]),
        ([turn("assistant", "a"), turn("user", "b")], [turn("user", ""), turn("assistant", "a"), turn("user", "b")]),
        (
            [turn("user", "a"), turn("assistant", "b"), turn("system", "c"), turn("user", "d")],
            [turn("user", "a"), turn("assistant", "b"), turn("user", "c\n\nd")],
        ),
        ([turn("user", [IMAGE]), turn("user", "b")], [turn("user", [IMAGE, text("b")])]),
        ([turn("user", "a"), turn("user", [text("b"), IMAGE])], [turn("user", [text("a\n\nb"), IMAGE])]),
        ([turn("user", ""), turn("user", "b")], [turn("user", "b")]),
    ],
)
def test_turns_alternate_and_no_text_is_lost(given: list[dict[str, Any]], merged: list[dict[str, Any]]) -> None:
    assert merge_turns(given) == merged
    assert merge_turns(merged) == merged


STRICT = """
{%- for m in messages -%}
  {%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) -%}{{ raise_exception('alternate') }}{%- endif -%}
  <{{ m['role'] }}>{{ m['content'] | trim }}</>
{%- endfor -%}
{%- if add_generation_prompt -%}<assistant>{%- endif -%}"""
ANY = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>{% endfor %}"
DROPS = (
    "{% for m in messages if m['role'] != 'system' or loop.first %}<{{ m['role'] }}>{{ m['content'] }}</>{% endfor %}"
)
TWO = [turn("user", "a"), turn("user", "b")]
LATE = [turn("user", "first"), turn("assistant", "x"), turn("system", "late"), turn("user", "last")]


def test_a_template_that_takes_a_conversation_is_given_it_as_it_is() -> None:
    assert _render(ChatTemplate(ANY), TWO, TemplateOptions()) == "<user>a</><user>b</>"


def test_a_conversation_that_a_template_rejects_is_merged() -> None:
    assert _render(ChatTemplate(STRICT), TWO, TemplateOptions()) == "<user>a\n\nb</><assistant>"


def test_a_conversation_of_which_a_template_drops_text_is_merged() -> None:
    rendered = _render(ChatTemplate(DROPS), LATE, TemplateOptions())
    assert rendered == "<user>first</><assistant>x</><user>late\n\nlast</>"
    assert holds_every_text(rendered, LATE)


def test_what_merging_does_not_mend_is_still_rejected() -> None:
    with pytest.raises(PromptError, match="always"):
        _render(ChatTemplate("{{ raise_exception('always') }}"), TWO, TemplateOptions())


@pytest.mark.parametrize("said", ["three", "three ", "a a", "<", "<user>", "/", "a", "</"])
def test_the_last_message_is_continued(said: str) -> None:
    options = TemplateOptions(continue_final_message=True)
    rendered = _render(ChatTemplate(STRICT), [turn("user", "a"), turn("assistant", said)], options)
    assert rendered == f"<user>a</><assistant>{said.strip()}"


def test_parts_and_turns_of_the_last_message_are_continued() -> None:
    options = TemplateOptions(continue_final_message=True)
    one = "<{{ m['role'] }}>{% for p in m['content'] %}{{ p['text'] | trim }}{% endfor %}</>"
    template = ChatTemplate(f"{{% for m in messages %}}{one}{{% endfor %}}")
    parts = [turn("user", [text("a")]), turn("assistant", [text("Hello"), text(" ")])]
    assert _render(template, parts, options) == "<user>a</><assistant>Hello"
    twice = [turn("user", "a"), turn("assistant", "b"), turn("assistant", "")]
    assert _render(ChatTemplate(ANY), twice, options) == "<user>a</><assistant>b"


def test_an_empty_last_message_opens_the_turn() -> None:
    options = TemplateOptions(continue_final_message=True)
    messages = [turn("user", "a"), turn("assistant", "")]
    assert _render(ChatTemplate(STRICT), messages, options) == "<user>a</><assistant>"
    with pytest.raises(PromptError, match="assistant message last"):
        _render(ChatTemplate(STRICT), [turn("user", "a")], options)


def test_variables_reach_the_template_and_cannot_replace_the_messages() -> None:
    template = ChatTemplate("{{ mood }}{{ messages[0]['content'] }}")
    options = TemplateOptions(variables={"mood": "calm ", "messages": []})
    assert _render(template, [turn("user", "a")], options) == "calm a"


def test_a_template_that_reads_tools_is_given_them() -> None:
    template = ChatTemplate("{% if tools %}{{ tools[0]['name'] }}{% endif %}")
    assert template.reads_tools and not ChatTemplate(STRICT).reads_tools
    assert template.render([turn("user", "a")], tools=[{"name": "add"}]) == "add"
