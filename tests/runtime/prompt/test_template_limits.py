"""A chat template, which may be a stranger's, ends soon and stays small, whatever it does."""

from __future__ import annotations

import time
import tracemalloc
from typing import Any

import pytest

from gemma3n_onnx.runtime.errors import ChatTemplateError, PromptError
from gemma3n_onnx.runtime.prompt import template_sandbox
from gemma3n_onnx.runtime.prompt.chat_template import ChatTemplate

USER: dict[str, Any] = {"role": "user", "content": "x"}
MOST_BYTES = 400 << 20
MOST_SECONDS = 5.0
TEN = "[0,1,2,3,4,5,6,7,8,9]"
DOUBLED = "{% set ns = namespace(s='xy') %}{% for _ in range(60) %}{% set ns.s = EXPRESSION %}{% endfor %}{{ ns.s }}"

ENDLESS = {
    "range": "{% for i in range(10**9) %}{% endfor %}",
    "nested": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "filtered": "{% for a in range(999) %}{% for b in range(9999) if b is odd and b is even %}{% endfor %}{% endfor %}",
    "printed": "{% for a in range(99999) %}" + "x" * 9999 + "{% endfor %}",
    "recursive": "{% for a in TEN recursive %}{% if loop.depth < 9 %}{{ loop(TEN) }}{% endif %}{% endfor %}",
    "recursive_range": "{% for a in [1] recursive %}{{ loop(range(99999)) if loop.depth < 9 }}{% endfor %}",
    "macro": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "macro_forever": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "map": "{% for a in range(99999) %}{{ range(99999) | map('string') | list | length }}{% endfor %}",
    "compared": "{% set s = 'x' * 9000000 %}{% for i in range(99999) %}{{ s + 'y' == s + 'z' }}{% endfor %}",
    "contained": "{% set s = 'x' * 9000000 %}{% for i in range(99999) %}{{ ('x' * 99 + 'y') in s }}{% endfor %}",
}
HUGE = {
    "product": "{{ 'x' * 10**10 }}",
    "product_of_a_list": "{{ ([1] * 10**10) | length }}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "squares": "{% set ns = namespace(n=9) %}{% for _ in range(60) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
    "sum": DOUBLED.replace("EXPRESSION", "ns.s + ns.s"),
    "concatenation": DOUBLED.replace("EXPRESSION", "ns.s ~ ns.s"),
    "join": DOUBLED.replace("EXPRESSION", "[ns.s, ns.s] | join"),
    "join_method": DOUBLED.replace("EXPRESSION", "'x'.join([ns.s, ns.s])"),
    "join_separator": "{{ range(99999) | join('x' * 99999) }}",
    "replace": DOUBLED.replace("EXPRESSION", "ns.s | replace('x', 'xx')"),
    "replace_method": DOUBLED.replace("EXPRESSION", "ns.s.replace('y', 'yy')"),
    "replace_nothing": "{% set s = 'x' * 99999 %}{{ s.replace('', s) }}",
    "printf": "{{ '%1000000000d' % 1 }}",
    "printf_star": "{{ '%*d' % (1000000000, 1) }}",
    "printf_again": DOUBLED.replace("EXPRESSION", "'%s%s' % (ns.s, ns.s)"),
    "format": "{{ '{:1000000000}'.format(1) }}",
    "format_nested": "{{ '{:{}}'.format(1, 1000000000) }}",
    "format_again": DOUBLED.replace("EXPRESSION", "'{0}{0}'.format(ns.s)"),
    "format_filter": "{{ '%1000000000d' | format(1) }}",
    "format_map": "{{ '{a:1000000000}'.format_map({'a': 1}) }}",
    "center": "{{ 'x' | center(1000000000) }}",
    "center_method": "{{ 'x'.center(1000000000) }}",
    "ljust": "{{ 'x'.ljust(1000000000) }}",
    "zfill": "{{ 'x'.zfill(1000000000) }}",
    "expandtabs": "{{ '\t'.expandtabs(1000000000) }}",
    "to_bytes": "{{ (1).to_bytes(1000000000) }}",
    "indent": "{{ ('x\n' * 99999) | indent(60000) }}",
    "tojson_indent": "{{ messages | tojson(indent=1000000000) }}",
    "tojson_indents": "{{ (range(99999) | list) | tojson(indent=60000) }}",
    "round": "{{ 1.5 | round(1000000000, 'floor') }}",
    "batch": "{{ [1] | batch(1000000000, 'x') | list | length }}",
    "slice": "{{ [1] | slice(1000000000) | list | length }}",
    "lipsum": "{{ lipsum(n=1000000) }}",
    "lists": DOUBLED.replace("EXPRESSION", "[ns.s, ns.s]"),
    "list_sum": "{{ [[1] * 9999] * 9999 | sum(start=[]) | length }}",
    "constant_product": "{% if false %}{{ 'x' * 10**10 }}{% endif %}{{ 9 ** (9 ** 9) }}",
    "strftime": "{{ strftime_now('%Y' * 99999) }}",
}


@pytest.mark.parametrize("source", [*ENDLESS.values(), *HUGE.values()], ids=[*ENDLESS, *HUGE])
def test_a_template_ends_soon_and_stays_small(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_sandbox, "MAX_SECONDS", 0.3)
    started = time.thread_time()
    tracemalloc.start()
    try:
        with pytest.raises(PromptError, match="rejects these messages"):
            ChatTemplate(source.replace("TEN", TEN)).render([USER])
        assert tracemalloc.get_traced_memory()[1] < MOST_BYTES
    finally:
        tracemalloc.stop()
    assert time.thread_time() - started < MOST_SECONDS


def test_each_rendering_has_its_own_budget() -> None:
    template = ChatTemplate("{% for a in range(99999) %}{% endfor %}done")
    assert {template.render([USER]) for _ in range(12)} == {"done"}


def test_a_long_conversation_is_rendered() -> None:
    source = """{{ bos_token }}{% for m in messages %}{{ '<' + m['role'] + '>' }}{% if m.content is string %}
    {{ m['content'] | trim }}{% else %}{% for p in m['content'] %}{{ p['text'] | trim }}{% endfor %}{% endif %}
    {%- endfor %}{{ messages | length }}"""
    messages = [{"role": "user", "content": "word " * 200}, {"role": "assistant", "content": "x"}] * 2000
    assert ChatTemplate(source).render(messages).endswith("4000")


@pytest.mark.parametrize(
    "source", ["{% if a %}" * 200 + "{% endif %}" * 200, "{{ " + "(" * 9999, "{{ 1 }}" * (1 << 18)]
)
def test_a_template_that_cannot_be_compiled_is_one_sentence(source: str) -> None:
    with pytest.raises(ChatTemplateError, match=r"^The chat template [^\n]*\.$"):
        ChatTemplate(source)
