"""One loaded model refuses whatever media are bad, each with one sentence, and goes on answering as before."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from bad_media import (
    CASES,
    PDF,
    POLICY,
    Case,
    assert_one_sentence,
    clip,
    declared_png,
    file,
    garbled,
    half,
    jpeg,
    jpeg_header,
    png,
    wav_header,
)
from gemma3n_onnx.runtime import OnnxGemma3n, PromptError
from gemma3n_onnx.runtime.engine.ort import Session
from gemma3n_onnx.runtime.errors import ArtifactError, ContextLengthError, Gemma3nError, MediaError
from heic import heic
from media import RATE_HZ, encoded, photo, sound, tone, video, write_wav
from support import record, run_command

GOOD_IMAGE = {"type": "image", "image": photo()}
GOOD_CLIP = {"type": "audio", "audio": (tone(0.5), RATE_HZ)}


def user(*content: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*content, {"type": "text", "text": "What is it?"}]}]


@dataclass(frozen=True)
class Asking:
    """A reader of media that is a whole model: bad parts come between good ones."""

    model: OnnxGemma3n

    def image(self, source: Any) -> Any:
        return self._ask({"type": "image", "image": source})

    def audio(self, source: Any, rate: Any = None) -> Any:
        return self._ask({"type": "audio", "audio": source, "rate": rate})

    def video(self, source: Any) -> Any:
        return self._ask({"type": "video", "video": source})

    def _ask(self, bad: dict[str, Any]) -> Any:
        return self.model.generate(user(GOOD_CLIP, bad, GOOD_IMAGE), max_new_tokens=4, image_size=256)


@dataclass
class Service:
    """One model for all bad requests, and what it answers to good ones."""

    model: OnnxGemma3n
    answers: dict[str, tuple[int, ...]] = field(default_factory=dict)

    GOOD = {"text": user(), "clip": user(GOOD_CLIP), "image": user(GOOD_IMAGE), "both": user(GOOD_IMAGE, GOOD_CLIP)}  # noqa: RUF012

    def assert_answers_as_before(self, *names: str) -> None:
        for name in names or self.GOOD:
            tokens = self.model.generate(self.GOOD[name], max_new_tokens=4, image_size=256).token_ids
            assert tokens == self.answers.setdefault(name, tokens), name


@pytest.fixture(scope="module")
def service(small_full_artifact: Path) -> Service:
    service = Service(OnnxGemma3n.from_pretrained(small_full_artifact, fetch=POLICY))
    service.assert_answers_as_before()
    return service


@pytest.fixture
def no_graph_runs(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        pytest.fail("a graph was run")

    monkeypatch.setattr(Session, "run", fail)
    monkeypatch.setattr(service.model.engine, "prefill", fail)


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_a_bad_part_is_one_sentence_and_the_next_request_is_answered(
    case: Case, service: Service, tmp_path: Path
) -> None:
    with pytest.raises(Gemma3nError) as raised:
        case.read(Asking(service.model), tmp_path)
    assert raised.type is case.kind
    assert_one_sentence(str(raised.value), case)
    service.assert_answers_as_before("text", "clip")


def test_all_good_requests_are_answered_as_before(service: Service, tmp_path: Path) -> None:
    for case in CASES[:: len(CASES) // 6]:
        with pytest.raises(Gemma3nError):
            case.read(Asking(service.model), tmp_path)
        service.assert_answers_as_before()


@pytest.mark.usefixtures("no_graph_runs")
def test_bad_media_are_told_before_any_graph_runs(service: Service, tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="damaged"):
        service.model.generate([user(GOOD_IMAGE), user({"type": "image", "image": half(png())})], image_size=256)
    with pytest.raises(MediaError, match="too many pixels"):
        service.model.stream(user({"type": "image", "image": declared_png(50_000, 50_000)}))
    with pytest.raises(MediaError, match="empty"):
        service.model.chat().send([{"type": "image", "image": file(tmp_path, "a.png", b"")}])


@pytest.mark.usefixtures("no_graph_runs")
def test_more_media_than_fit_are_told_before_any_graph_runs(service: Service, tmp_path: Path) -> None:
    context = service.model.manifest.max_context
    too_many = user(*[GOOD_IMAGE] * (context // 256))
    film = {"type": "video", "video": str(video(tmp_path / "film.mp4", 10))}
    for messages in (too_many, user(film, film)):
        with pytest.raises(ContextLengthError, match=f"more than the context of {context:,}; shorten"):
            service.model.generate(messages, max_new_tokens=4, image_size=256)
    with pytest.raises(ContextLengthError):
        service.model.generate([user(), too_many], max_new_tokens=4, image_size=256)
    with pytest.raises(ContextLengthError):
        service.model.chat().send(too_many[0]["content"], max_new_tokens=4, image_size=256)


@pytest.mark.parametrize(
    ("part", "says"),
    [
        ({"type": "image"}, "no image or url"),
        ({"type": "image_url", "image_url": {}}, "no image_url"),
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,", "detail": "huge"}}, "'huge'"),
        ({"type": "input_audio", "input_audio": {"format": "wav"}}, "no input_audio"),
        ({"type": "picture", "picture": "a.png"}, "'picture'"),
        ({"type": "text", "text": "an <image_soft_token> of my own"}, "<image_soft_token>"),
    ],
)
def test_a_bad_form_of_a_part_is_a_prompt_error(service: Service, part: dict[str, Any], says: str) -> None:
    with pytest.raises(PromptError) as raised:
        service.model.generate(user(part))
    assert says in str(raised.value) and str(raised.value).endswith(".")
    service.assert_answers_as_before("text")


FILES: list[tuple[str, str, Callable[[], bytes], str]] = [
    ("image", "cut.png", lambda: half(png()), "damaged or incomplete"),
    ("image", "cut.gif", lambda: encoded(photo(), "GIF")[:9_000], "damaged"),
    ("image", "cut.webp", lambda: encoded(photo(), "WEBP")[:9_000], "image"),
    ("image", "cut.avif", lambda: encoded(photo(), "AVIF")[:9_000], "image"),
    ("image", "cut.heic", lambda: heic(photo().resize((64, 48)))[:-50], "damaged or incomplete"),
    ("image", "header.jpg", jpeg_header, "damaged or incomplete"),
    ("image", "garbled.png", lambda: garbled(png(), 0.3), "damaged"),
    ("image", "empty.jpg", lambda: b"", "empty"),
    ("image", "words.jpg", lambda: b"not an image", "not an image"),
    ("image", "large.png", lambda: declared_png(20_000, 20_000), "too many pixels"),
    ("image", "paper.pdf", lambda: PDF, "This is a PDF"),
    ("image", "sound.wav", lambda: clip("WAV"), "not an image"),
    ("audio", "empty.wav", lambda: b"", "empty"),
    ("audio", "header.wav", lambda: wav_header(RATE_HZ), "no samples"),
    ("audio", "codec.wav", lambda: wav_header(RATE_HZ, bytes(900), 0x9999), "codec"),
    ("audio", "silent.wav", lambda: sound(0 * tone(1), RATE_HZ, "WAV"), "silent"),
    ("audio", "long.wav", lambda: sound(tone(31), RATE_HZ, "WAV"), "31.00 s"),
    ("audio", "short.wav", lambda: sound(tone(0.01), RATE_HZ, "WAV"), "0.010 s"),
    ("audio", "cut.flac", lambda: clip("FLAC")[:20_000], "damaged"),
    ("audio", "cut.mp3", lambda: half(clip("MP3")), "cut off"),
    ("audio", "garbled.ogg", lambda: garbled(clip("OGG"), 0.01), "give another file"),
    ("audio", "picture.wav", jpeg, "neither WAV"),
    ("audio", "paper.pdf", lambda: PDF, "This is a PDF"),
    ("video", "words.mp4", lambda: b"words " * 99, "not a video"),
    ("video", "sound.mp4", lambda: clip("WAV"), "only audio"),
]


@pytest.mark.usefixtures("no_graph_runs")
@pytest.mark.parametrize(("kind", "name", "content", "says"), FILES, ids=[f"{kind} {name}" for kind, name, *_ in FILES])
def test_a_bad_file_is_named(
    kind: str, name: str, content: Callable[[], bytes], says: str, service: Service, tmp_path: Path
) -> None:
    """By its path, or, where only its content is given, by its number among those of its kind."""
    good = {"image": [GOOD_IMAGE], "audio": [GOOD_CLIP], "video": []}[kind]
    data = content()
    for source, named in ((file(tmp_path, name, data), name), (data, f"{kind} {1 + len(good)}")):
        with pytest.raises(MediaError) as raised:
            service.model.generate(user(*good, {"type": kind, kind: source}), image_size=256)
        message = str(raised.value)
        assert message.partition(": ")[0].endswith(named) and says in message
        assert message.count(named) == 1 and "\n" not in message and message.endswith(".") and len(message) < 400


# --- the command line --------------------------------------------------------------------------------------

BAD_FILES: dict[str, tuple[str, Callable[[Path], Path], str]] = {
    "truncated PNG": ("--image", lambda f: file(f, "a.png", half(png())), "a.png: The image is damaged or incomplete"),
    "PDF": ("--image", lambda f: file(f, "a.pdf", PDF), "a.pdf: This is a PDF"),
    "text as image": ("--image", lambda f: file(f, "a.png", b"words"), "not an image"),
    "missing image": ("--image", lambda f: f / "no.png", "no.png"),
    "bomb": ("--image", lambda f: file(f, "a.png", declared_png(50_000, 50_000)), "too many pixels"),
    "silence": ("--audio", lambda f: write_wav(f / "a.wav", 0 * tone(1)), "silent"),
    "31 s": ("--audio", lambda f: write_wav(f / "a.wav", tone(31)), "--long-audio split"),
    "image as audio": ("--audio", lambda f: file(f, "a.wav", jpeg()), "neither WAV"),
    "sound as video": ("--video", lambda f: file(f, "a.mp4", sound(tone(1), RATE_HZ, "WAV")), "only audio"),
}


def test_of_several_files_the_bad_one_is_named(
    small_full_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A message about a host names the image by its number, all others the file or the URL."""
    good, long = tmp_path / "good.jpg", tmp_path / ("x" * 90)
    good.write_bytes(jpeg())
    for bad, says in (("http://127.0.0.1:9/a.png", "image 2: '127.0.0.1' resolves to"), (long, f"'{long}'")):
        sources = ("--image", str(good), "--image", str(bad))
        outcome = run_command(monkeypatch, ["gemma3n", "run", str(small_full_artifact), "What is it?", *sources])
        assert outcome.code == 1 and says in outcome.err, outcome.err


@pytest.mark.parametrize("name", BAD_FILES)
def test_the_command_line_says_one_sentence(
    name: str, small_full_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    option, make, says = BAD_FILES[name]
    command = ["gemma3n", "run", str(small_full_artifact), "What is it?", option, str(make(tmp_path))]
    outcome = run_command(monkeypatch, command)
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err.startswith("Error: ") and outcome.err.count("\n") == 1 and "Traceback" not in outcome.err
    assert says in outcome.err


def test_the_command_line_answers_about_good_media(
    small_full_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, service: Service
) -> None:
    files = ["--image", str(file(tmp_path, "a.png", encoded(photo(), "PNG")))]
    options = ["--image-size", "256", "--max-new-tokens", "4"]
    outcome = run_command(monkeypatch, ["gemma3n", "run", str(small_full_artifact), "What is it?", *files, *options])
    assert outcome.code == 0, outcome.err
    assert outcome.out == service.model.generate(user(GOOD_IMAGE), max_new_tokens=4, image_size=256).text + "\n"


# --- encoders whose files are bad --------------------------------------------------------------------------


@pytest.fixture
def artifact(small_full_artifact: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(small_full_artifact, tmp_path / "artifact"))


def truncate(folder: Path, name: str) -> None:
    os.truncate(folder / name, (folder / name).stat().st_size // 2)


def make_garbage(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"garbage" * 99)


def remove(folder: Path, name: str) -> None:
    (folder / name).unlink()


ENCODER_FILES = [f"{modality}_encoder.onnx{suffix}" for modality in ("vision", "audio") for suffix in ("", ".data")]


@pytest.mark.parametrize("name", ENCODER_FILES)
@pytest.mark.parametrize("damage", [truncate, make_garbage, remove])
def test_a_damaged_encoder_file_is_told_at_load(artifact: Path, name: str, damage: Callable[[Path, str], None]) -> None:
    damage(artifact, name)
    with pytest.raises(ArtifactError, match=name) as raised:
        OnnxGemma3n.from_pretrained(artifact)
    assert "\n" not in str(raised.value) and str(raised.value).endswith(".")


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("vision_encoder.onnx", make_garbage),
        ("vision_encoder.onnx", truncate),
        ("vision_encoder.onnx.data", truncate),
        ("audio_encoder.onnx", make_garbage),
        ("audio_encoder.onnx.data", truncate),
    ],
)
def test_damage_that_the_sizes_do_not_show_is_told_by_the_first_request_that_needs_the_encoder(
    artifact: Path, name: str, damage: Callable[[Path, str], None], service: Service, capfd: pytest.CaptureFixture[str]
) -> None:
    damage(artifact, name)
    record(artifact, name)
    model = Service(OnnxGemma3n.from_pretrained(artifact), service.answers)
    bad, good = ("image", "clip") if name.startswith("vision") else ("clip", "image")
    for _ in range(2):
        with pytest.raises(ArtifactError, match=name.removesuffix(".data")) as raised:
            model.assert_answers_as_before(bad)
        assert "\n" not in str(raised.value) and str(raised.value).endswith(".")
        model.assert_answers_as_before("text", good)
    assert capfd.readouterr().err == "", "ONNX Runtime's own report stays silent"
