import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from gemma3n_onnx.runtime.errors import ArtifactError, PromptError
from gemma3n_onnx.runtime.generation.detokenizer import IncrementalDetokenizer
from gemma3n_onnx.runtime.generation.stop_strings import StopMatcher
from gemma3n_onnx.runtime.prompt.chat_template import ChatTemplate
from gemma3n_onnx.runtime.prompt.tokenizer import Tokenizer, encode_plain

TEMPLATE = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set prefix = messages[0]['content'] + '\n\n' -%}
    {%- else -%}
        {%- set prefix = messages[0]['content'][0]['text'] + '\n\n' -%}
    {%- endif -%}
    {%- set turns = messages[1:] -%}
{%- else -%}
    {%- set prefix = '' -%}
    {%- set turns = messages -%}
{%- endif -%}
{%- for message in turns -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Roles must alternate.") }}
    {%- endif -%}
    {{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' }}
    {{- prefix if loop.first -}}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- else -%}
        {%- for part in message['content'] -%}{{ part['text'] | trim }}{%- endfor -%}
    {%- endif -%}
    {{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}
"""
FEATURES = """{% for m in messages %}
    {% if loop.first %}{% continue %}{% endif %}
    {% generation %}
    {{ {'é': '<b>', 'n': [1]} | tojson }}{{ m['content'] }}
    {% endgeneration %}
{% endfor %}
{{ tools is none }}{{ documents is none }}{{ bos_token }}{{ strftime_now('%Y') }}
"""


@pytest.fixture(scope="module")
def tokenizer(small_tokenizer: tokenizers.Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("artifact")
    small_tokenizer.save(str(folder / "tokenizer.json"))
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="module")
def template() -> ChatTemplate:
    return ChatTemplate(TEMPLATE)


def test_a_folder_without_a_usable_tokenizer_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="missing"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ArtifactError, match="not a tokenizer"):
        Tokenizer.from_folder(tmp_path)


def test_bos_comes_once(tokenizer: Tokenizer) -> None:
    plain = tokenizer.encode("hello", add_bos=False)
    assert tokenizer.encode("hello", add_bos=True) == [2, *plain]
    assert tokenizer.encode("<bos>hello", add_bos=True) == [2, *plain]
    assert tokenizer.encode("", add_bos=True) == [2]
    assert tokenizer.token_id("<end_of_turn>") == 5
    with pytest.raises(ArtifactError, match="<nope>"):
        tokenizer.token_id("<nope>")


def pieces_of(tokenizer: Tokenizer, ids: list[int], skip_special: bool = True) -> list[str]:
    stream = IncrementalDetokenizer(tokenizer, skip_special)
    return [*(stream.push(token_id) for token_id in ids), stream.flush()]


@pytest.mark.parametrize("text", ["hello 👩‍👩‍👧 to", "日本語 the 文字", "𒀀𒀁", "  two  spaces ", "naïve ünï"])
def test_pieces_are_whole_characters(tokenizer: Tokenizer, text: str) -> None:
    pieces = pieces_of(tokenizer, tokenizer.encode(text, add_bos=True))
    assert "".join(pieces) == text
    assert not any("�" in piece for piece in pieces)


@pytest.mark.parametrize("skip_special", [True, False])
def test_pieces_together_are_the_whole_decode_of_any_ids(tokenizer: Tokenizer, skip_special: bool) -> None:
    rng = random.Random(0)
    common = [*tokenizer.encode("the 😀 ünï � é", add_bos=False), 5]
    for _ in range(400):
        ids = [rng.choice([rng.randrange(tokenizer.vocab_size), rng.choice(common)]) for _ in range(30)]
        whole = tokenizer.decode(ids, skip_special)
        assert "".join(pieces_of(tokenizer, ids, skip_special)) == whole


def test_text_ends_before_the_first_stop_however_it_is_cut() -> None:
    rng = random.Random(1)
    for _ in range(2000):
        text = "".join(rng.choices("ab", k=12))
        stops = tuple("".join(rng.choices("ab", k=rng.randint(1, 4))) for _ in range(rng.randint(0, 3)))
        ends = [end for end in range(len(text) + 1) if text[:end].endswith(stops)] if stops else []
        longest = max((len(stop) for stop in stops if ends and text[: ends[0]].endswith(stop)), default=0)
        expected = text[: ends[0] - longest] if ends else text
        matcher, seen, rest = StopMatcher(stops), "", text
        while rest:
            cut = rng.randint(1, 4)
            seen, rest = seen + matcher.push(rest[:cut]), rest[cut:]
            assert expected.startswith(seen)
        assert seen + matcher.flush() == expected
        assert (matcher.matched is not None) == bool(ends)


def test_only_a_possible_stop_is_held_back() -> None:
    matcher = StopMatcher(("STOP",))
    assert matcher.push("go ST") == "go "
    assert matcher.push("AY S") == "STAY "
    assert matcher.flush() == "S"


@pytest.mark.parametrize("generate", [True, False])
@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": " hi "}],
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}],
        [
            {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
            {"role": "user", "content": [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": "<b>'yes'</b>"},
            {"role": "user", "content": "more"},
        ],
    ],
)
@pytest.mark.parametrize("source", [TEMPLATE, FEATURES])
def test_rendering_is_that_of_transformers(
    small_tokenizer: tokenizers.Tokenizer, source: str, messages: list[dict[str, Any]], generate: bool
) -> None:
    reference = PreTrainedTokenizerFast(tokenizer_object=small_tokenizer, bos_token="<bos>", chat_template=source)
    expected = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
    assert ChatTemplate(source).render(messages, generate) == expected


USER: dict[str, Any] = {"role": "user", "content": "x"}


def test_what_the_template_refuses_is_one_sentence(template: ChatTemplate) -> None:
    with pytest.raises(PromptError, match=r"rejects these messages: Roles must alternate\.$"):
        template.render([USER, USER])
    with pytest.raises(PromptError, match="rejects these messages"):
        ChatTemplate("{{ 1 + messages }}").render([USER])
    with pytest.raises(PromptError, match="rejects these messages"):
        ChatTemplate("{{ messages.append(1) }}").render([USER])
    with pytest.raises(ArtifactError, match="not valid Jinja"):
        ChatTemplate("{% if %}")


def test_each_kind_of_plain_prompt_becomes_ids(tokenizer: Tokenizer) -> None:
    hello = tokenizer.encode("hello", add_bos=False)
    assert encode_plain("hello", tokenizer, 600) == [2, *hello]
    assert encode_plain(np.array([0, 599]).tolist(), tokenizer, 600) == [0, 599]
    assert encode_plain(np.array([7, 8]), tokenizer, 600) == [7, 8]


@pytest.mark.parametrize(
    "prompt", ["", [], np.array([], dtype=int), b"x", None, 3, [600], [-1], [1, True], [1, "x"], [True], "\ud800", USER]
)
def test_a_prompt_that_cannot_be_encoded_is_refused(tokenizer: Tokenizer, prompt: Any) -> None:
    with pytest.raises(PromptError):
        encode_plain(prompt, tokenizer, 600)
