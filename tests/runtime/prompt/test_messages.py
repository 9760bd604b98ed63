"""What messages may look like, and what becomes of the media in them."""

import re
from typing import Any

import numpy as np
import pytest

from gemma3n_onnx.runtime.artifact import GraphInfo, LogMelInfo, SoftTokens, TensorInfo, VisionInfo
from gemma3n_onnx.runtime.errors import ArtifactError, MediaError, OptionError, PromptError
from gemma3n_onnx.runtime.media.fetch import FetchPolicy
from gemma3n_onnx.runtime.media.reader import Item, MediaOptions, MediaReader
from gemma3n_onnx.runtime.prompt.messages import MessageReader, items_of
from gemma3n_onnx.runtime.prompt.soft_tokens import Placeholders

IMAGE = np.zeros((8, 8, 3), dtype=np.uint8)
CLIP = np.sin(np.arange(8000) / 9).astype(np.float32)
TEXT = {"type": "text", "text": "hello"}
USER: dict[str, Any] = {"role": "user", "content": "x"}


def graph(*inputs: str) -> GraphInfo:
    return GraphInfo("graph.onnx", tuple(TensorInfo(name, "fp32", ()) for name in inputs), ())


class Encoders:
    """The part of a manifest that media are read by."""

    modalities = ("text", "vision", "audio")
    vision = VisionInfo(graph("pixels"), SoftTokens("<i>", 7, 2, "(", ")"), (4, 6, 8), 6, 1 / 255, "fp32")

    class Audio:
        graph = graph("features", "mask")
        soft_tokens = SoftTokens("<a>", 8, 3, "[", "]")
        log_mel = LogMelInfo(16_000, 512, 160, 1024, 128, 125.0, 7600.0, 0.97, 1e-5, 16_000, 128)

    audio = Audio
    encoders = {"vision": vision, "audio": audio}  # noqa: RUF012


class TextOnly:
    modalities = ("text",)
    vision = audio = None


@pytest.fixture
def reader() -> MessageReader:
    return MessageReader(MediaReader(Encoders, FetchPolicy()), ["<i>", "<a>"])  # type: ignore[arg-type]


def read_parts(reader: MessageReader, *parts: dict[str, Any], **options: Any) -> list[Item]:
    return items_of(reader.read([{"role": "user", "content": list(parts)}], MediaOptions(**options)))


def size_of(item: Item) -> int:
    return item.inputs()["pixels"].shape[-1]


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "at least one user message"),
        ("hi", "must be a list"),
        (USER, "must be a list"),
        (["hi"], "Message 0 must be a mapping"),
        ([{"role": "robot", "content": "x"}], "role 'robot'"),
        ([{"role": "user", "content": 0}], "content of message 0"),
        ([{"role": "tool", "content": "x"}], "role 'tool'"),
        ([{"content": "x"}], "role None"),
        ([{"role": ["user"], "content": "x"}], "role"),
        ([{"role": "system", "content": "x"}], "at least one user message"),
        ([{"role": "user", "content": ["x"]}], "mapping with a type"),
        ([{"role": "user", "content": [{"type": "text", "text": 3}]}], "a string as its text"),
        ([{"role": "user", "content": [{"type": "smell", "smell": "x"}]}], "type 'smell'"),
        ([{"role": "user", "content": [{"type": "image"}]}], "no image or url"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "no image_url"),
        ([{"role": "user", "content": [{"type": "input_audio", "input_audio": {"format": "wav"}}]}], "no input_audio"),
        ([{"role": "user", "content": "<i>"}], "placeholder for media"),
        ([{"role": "user", "content": [{"type": "text", "text": "a <a>"}]}], "placeholder for media"),
        ([{"role": "assistant", "content": [{"type": "image", "image": IMAGE}]}, USER], "only user messages may have"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": IMAGE, "detail": "fine"}}]}],
            "detail 'fine'",
        ),
    ],
)
def test_malformed_messages_are_refused(reader: MessageReader, messages: Any, reason: str) -> None:
    with pytest.raises(PromptError, match=reason):
        reader.read(messages, MediaOptions())


PDF = "data:application/pdf;base64,JVBERi0xLjc="


@pytest.mark.parametrize(
    ("part", "named"),
    [
        ({"type": "file", "file": {"filename": "a.pdf", "file_data": PDF}}, "'file' ('a.pdf')"),
        ({"type": "input_file", "filename": "a.pdf", "file_data": PDF}, "'input_file' ('a.pdf')"),
        ({"type": "file", "file": {"file_id": "file-1"}}, "'file'"),
        ({"type": "input_file", "file_url": "https://example.com/a.pdf"}, "'input_file'"),
    ],
)
def test_a_document_is_refused_by_name(reader: MessageReader, part: dict[str, Any], named: str) -> None:
    with pytest.raises(PromptError, match=re.escape(f"part of type {named}, but the model does not take a PDF")):
        read_parts(reader, part)


def test_media_are_numbered_by_kind_across_messages(reader: MessageReader) -> None:
    image, clip = {"type": "image", "image": IMAGE}, {"type": "audio", "audio": (CLIP, 16_000)}
    bad = {"type": "image_url", "image_url": {"url": b"words"}}
    turns = [{"role": "user", "content": [image, clip]}, {"role": "user", "content": [clip, bad]}]
    with pytest.raises(MediaError, match=r"^image 2: This is not an image"):
        reader.read(turns, MediaOptions())
    with pytest.raises(MediaError, match=r"^image 1: "):
        reader.read([*reader.read(turns[:1], MediaOptions()), turns[1]], MediaOptions())


@pytest.mark.parametrize(
    "message", [{"role": "user"}, {"role": "user", "content": None}, {"role": "user", "content": []}]
)
def test_absent_content_is_empty(reader: MessageReader, message: dict[str, Any]) -> None:
    assert reader.read([USER, message], MediaOptions())[1] == {"role": "user", "content": ""}


def test_parts_of_the_responses_api_are_read(reader: MessageReader) -> None:
    parts = [{"type": "input_text", "text": "a"}, {"type": "input_image", "image_url": IMAGE, "detail": "low"}]
    (read,) = reader.read([{"role": "user", "content": parts}], MediaOptions())
    assert read["content"][0] == {"type": "text", "text": "a"} and size_of(read["content"][1]["image"]) == 4


def test_tools_reach_a_template_that_reads_them() -> None:
    reader = MessageReader(MediaReader(Encoders, FetchPolicy()), [], tools=True)  # type: ignore[arg-type]
    messages = [USER, {"role": "assistant", "tool_calls": [1]}, {"role": "tool", "tool_call_id": "c", "content": "x"}]
    assert reader.read(messages, MediaOptions())[1:] == [{**messages[1], "content": ""}, messages[2]]


def test_text_is_hidden_before_it_is_checked(reader: MessageReader) -> None:
    (read,) = reader.read([{"role": "user", "content": "a <i>"}], MediaOptions(), lambda text: text.replace("<i>", "?"))
    assert read["content"] == "a ?"


def test_a_huge_value_is_not_repeated_in_a_message(reader: MessageReader) -> None:
    with pytest.raises(PromptError) as caught:
        reader.read([{"role": "user", "content": {"x": "y" * 10_000}}], MediaOptions())
    assert len(str(caught.value)) < 200


def test_roles_are_those_of_the_templates(reader: MessageReader) -> None:
    roles = ["developer", "user", "model", "user"]
    read = reader.read([{"role": role, "content": "x"} for role in roles], MediaOptions())
    assert [message["role"] for message in read] == ["system", "user", "assistant", "user"]


def test_the_parts_of_a_system_message_become_one(reader: MessageReader) -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    read = reader.read([{"role": "system", "content": parts}, USER], MediaOptions())
    assert read[0]["content"] == [{"type": "text", "text": "one two"}]


@pytest.mark.parametrize(
    ("part", "modality"),
    [
        ({"type": "image", "image": IMAGE}, "vision"),
        ({"type": "image", "url": IMAGE}, "vision"),
        ({"type": "image_url", "image_url": {"url": IMAGE}}, "vision"),
        ({"type": "image_url", "image_url": IMAGE}, "vision"),
        ({"type": "audio", "audio": (CLIP, 16_000)}, "audio"),
        ({"type": "audio", "audio": CLIP, "rate": 16_000}, "audio"),
        ({"type": "input_audio", "input_audio": {"data": (CLIP, 16_000), "format": "wav"}}, "audio"),
        ({"type": "audio_url", "audio_url": {"url": (CLIP, 16_000)}}, "audio"),
    ],
)
def test_every_spelling_of_a_part_is_read(reader: MessageReader, part: dict[str, Any], modality: str) -> None:
    assert [item.modality for item in read_parts(reader, TEXT, part, TEXT)] == [modality]


def test_reading_again_what_was_read_changes_nothing(reader: MessageReader) -> None:
    content = [TEXT, {"type": "image", "image": IMAGE}, {"type": "audio", "audio": (CLIP, 16_000)}]
    once = reader.read([{"role": "user", "content": content}], MediaOptions())
    assert reader.read(once, MediaOptions(image_size=8)) == once


def test_an_image_has_the_size_of_the_call_or_its_detail_or_the_artifact(reader: MessageReader) -> None:
    def sized(detail: str | None = None, **options: Any) -> int:
        part = {"type": "image_url", "image_url": {"url": IMAGE, "detail": detail}}
        return size_of(read_parts(reader, part, **options)[0])

    assert sized() == sized("auto") == 6
    assert (sized("low"), sized("high")) == (4, 8)
    assert sized("low", image_size=6) == 6
    with pytest.raises(OptionError, match="takes 4, 6, 8"):
        sized(image_size=5)


def test_equal_media_have_equal_keys_and_others_do_not(reader: MessageReader) -> None:
    first, again, other = (
        read_parts(reader, {"type": "image", "image": image})[0] for image in (IMAGE, IMAGE.copy(), IMAGE + 9)
    )
    smaller = read_parts(reader, {"type": "image", "image": IMAGE}, image_size=4)[0]
    assert first.key == again.key
    assert len({first.key, other.key, smaller.key}) == 3


def test_long_audio_is_refused_or_split(reader: MessageReader) -> None:
    part = {"type": "audio", "audio": (np.tile(CLIP, 5), 16_000)}
    with pytest.raises(MediaError, match="split"):
        read_parts(reader, part)
    assert len(read_parts(reader, part, long_audio="split")) >= 3


@pytest.mark.parametrize(
    "options",
    [
        {"image_size": 0},
        {"image_size": "256"},
        {"image_size": True},
        {"long_audio": "cut"},
        {"video_fps": 0},
        {"video_fps": float("nan")},
        {"video_fps": "1"},
        {"max_frames": 0},
        {"max_frames": 2.5},
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        MediaOptions(**options)


@pytest.mark.parametrize("part", [{"type": "image", "image": IMAGE}, {"type": "audio", "audio": (CLIP, 16_000)}])
def test_what_the_artifact_lacks_is_said(part: dict[str, Any]) -> None:
    reader = MessageReader(MediaReader(TextOnly, FetchPolicy()), [])  # type: ignore[arg-type]
    with pytest.raises(MediaError, match=r"no (vision|audio) encoder .*--modalities text,"):
        read_parts(reader, part)


def items(*modalities: str) -> list[Item]:
    return [Item(modality, bytes([i]), dict) for i, modality in enumerate(modalities)]


def test_placeholders_are_written_out_and_found_again() -> None:
    placeholders = Placeholders(Encoders)  # type: ignore[arg-type]
    media = items("vision", "audio", "vision")
    assert placeholders.expand("x<i>y<a><i>", media) == "x(<i><i>)y[<a><a><a>](<i><i>)"
    ids = [1, 7, 7, 2, 7, 8, 8, 8, 3, 7, 7]  # the 7 between 2 and 8 is one that a model made
    spans = placeholders.find(ids, media, lambda modality, inputs: np.zeros(0))
    assert [(span.start, span.count, span.key) for span in spans] == [(1, 2, b"\0"), (5, 3, b"\1"), (9, 2, b"\2")]


@pytest.mark.parametrize("rendered", ["<i>", "<i><i>", "", "<i><a><i>"])
def test_placeholders_that_are_not_those_of_the_media_are_refused(rendered: str) -> None:
    with pytest.raises(PromptError, match="placeholders of"):
        Placeholders(Encoders).expand(rendered, items("vision", "audio"))  # type: ignore[arg-type]


def test_a_tokenizer_that_cuts_soft_tokens_up_is_an_error() -> None:
    with pytest.raises(ArtifactError, match="as one token"):
        Placeholders(Encoders).find([1, 2, 3], items("vision"), lambda *_: np.zeros(0))  # type: ignore[arg-type]
