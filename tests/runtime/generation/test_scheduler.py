"""The generation loop over an engine without a model."""

from __future__ import annotations

import contextlib
import gc
import itertools
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from fake_engine import END, VOCABULARY, FakeEngine, FakeTokenizer, ids_of
from gemma3n_onnx.runtime.engine.prefix_cache import PrefixCache
from gemma3n_onnx.runtime.errors import AnswerSchemaError, ContextLengthError, DeadlineError, ProviderError
from gemma3n_onnx.runtime.generation.options import GenerationOptions
from gemma3n_onnx.runtime.generation.scheduler import (
    FailureEvent,
    FinishEvent,
    PromptEvent,
    Request,
    Scheduler,
    TokenEvent,
)
from gemma3n_onnx.runtime.generation.stream import GenerationStream
from gemma3n_onnx.runtime.tokens import PromptTokens, SoftTokenSpan

A, Z = ids_of("az")


def alphabet(tokens):
    """The letter after the last one; after z the end."""
    return END if tokens[-1] == Z else tokens[-1] + 1


def uniform(_):
    return np.zeros(VOCABULARY, dtype=np.float32)


class Told:
    """A request and its events."""

    def __init__(self, prompt: str, *, spans=(), on_event=None, deadline=float("inf"), sample=0, **options):
        self.events = []
        self._then = on_event
        options = GenerationOptions(**({"max_new_tokens": 4} | options))
        prompt = PromptTokens(ids_of(prompt), spans)
        self.request = Request(prompt, options, self._take, sample=sample, deadline=deadline)

    def _take(self, event):
        self.events.append(event)
        if self._then is not None:
            self._then(event)

    @property
    def text(self):
        return "".join(event.text for event in self.events if isinstance(event, TokenEvent))

    @property
    def last(self):
        return self.events[-1]


def schedule(engine, rows=2, capacity=64, **options):
    return Scheduler(engine, FakeTokenizer(), rows, capacity, **options)


def run(scheduler, *told):
    for each in told:
        scheduler.submit(each.request)
    while scheduler.advance():
        pass
    assert (scheduler.running, scheduler.waiting) == (0, 0)


@pytest.mark.parametrize(
    ("letters", "stop", "refused", "text"),
    [("wx", (), True, "yz"), ("ab", (), False, "cdef"), ("ab", ("e",), False, "cd")],
    ids=["whole", "cut by its length", "cut by a stop string"],
)
def test_an_answer_that_ended_by_itself_is_checked(letters, stop, refused, text):
    seen = []

    def check(text):
        seen.append(text)
        raise AnswerSchemaError("No.")

    prompts = [PromptTokens(ids_of(letters))]
    options = GenerationOptions(max_new_tokens=4, stop=stop)
    stream = GenerationStream(schedule(FakeEngine(alphabet)), prompts, options, check=check)
    with pytest.raises(AnswerSchemaError) if refused else contextlib.nullcontext():
        list(stream)
    assert seen == ([text] if refused else [])
    assert stream.result.text == text


def test_a_sequence_ends_at_its_length_or_at_an_end_token():
    short, whole = Told("abc", max_new_tokens=2), Told("w", max_new_tokens=9)
    run(schedule(FakeEngine(alphabet)), short, whole)
    assert (short.text, whole.text) == ("de", "xyz")
    assert short.last == FinishEvent("length", prompt_tokens=3, cached_tokens=0, new_tokens=2)
    assert whole.last == FinishEvent("stop", prompt_tokens=1, cached_tokens=0, new_tokens=4)


def test_requests_join_when_a_row_is_free_in_the_order_they_came():
    engine = FakeEngine(alphabet)
    told = [Told(letter, max_new_tokens=count) for letter, count in (("a", 2), ("h", 5), ("o", 3), ("t", 2))]
    run(schedule(engine), *told)
    assert [each.text for each in told] == ["bc", "ijklm", "pqr", "uv"]
    kinds = [entry for entry in engine.log if entry[0] == "prefill"]
    assert kinds == [("prefill", ids_of(letter)) for letter in "ahot"]
    assert engine.log.index(("prefill", ids_of("o"))) == 3, "the third prompt waits for the first row to be free"


def test_without_interleaving_every_prompt_precedes_every_step():
    engine = FakeEngine(alphabet, chunk=2)
    run(schedule(engine), Told("abcdef"), Told("ghijkl"))
    kinds = [entry[0] for entry in engine.log]
    assert kinds == ["prefill"] * 6 + ["greedy"] * 3


@pytest.mark.parametrize("host_memory", [True, False])
def test_the_others_step_between_the_chunks_of_a_prompt(host_memory):
    engine = FakeEngine(alphabet, chunk=2, host_memory=host_memory)
    scheduler = schedule(engine, interleave=True)
    first, second = Told("a", max_new_tokens=8), Told("abcdef")
    run(scheduler, first, second)
    assert (first.text, second.text) == ("bcdefghi", "ghij")
    chunks = [i for i, entry in enumerate(engine.log) if entry[0] == "prefill"][1:]
    between = [engine.log[i + 1 : j] for i, j in itertools.pairwise(chunks)]
    assert between == [[("greedy", [0])]] * 2


@pytest.mark.parametrize("host_memory", [True, False])
def test_a_prompt_below_running_rows_is_not_disturbed_by_their_steps(host_memory):
    engine = FakeEngine(alphabet, chunk=1, host_memory=host_memory)
    scheduler = schedule(engine, interleave=True)
    gone, long, joins = Told("a", max_new_tokens=2), Told("b", max_new_tokens=20), Told("defg")
    run(scheduler, gone, long, joins)
    assert (gone.text, long.text, joins.text) == ("bc", "cdefghijklmnopqrstuv", "hijk")


def test_each_row_has_options_of_its_own():
    engine = FakeEngine(uniform)
    told = [
        Told("a", logit_bias={Z: 50}, temperature=1.0),
        Told("b", logit_bias={A: 50}, max_new_tokens=2),
        Told("c", stop="zz", logit_bias={Z: 50}, max_new_tokens=9, logprobs=1),
    ]
    run(schedule(engine, rows=3), *told)
    assert [each.text for each in told] == ["zzzz", "aa", ""]
    assert told[2].last.reason == "stop" and told[2].last.new_tokens == 2
    assert told[0].events[0].logprob is None
    assert told[2].events[0].logprob.logprob == pytest.approx(-np.log(VOCABULARY))


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ([{}, {}], "greedy"),
        ([{}, {"temperature": 1.0, "top_k": 3}], "step"),
        ([{"temperature": 1.0, "top_k": 3}, {"temperature": 1.0, "top_k": 5}], "5 candidates"),
        ([{"temperature": 1.0, "top_k": 3}, {"temperature": 1.0}], "step"),
        ([{"logprobs": 0}, {}], "step"),
    ],
)
def test_a_step_gives_no_more_than_the_samplers_need(options, kind):
    engine = FakeEngine(alphabet, candidates=True)
    told = [Told("abc", max_new_tokens=2, **each) for each in options]
    run(schedule(engine), *told)
    assert [entry[0] for entry in engine.log if entry[0] != "prefill"] == [kind]
    assert [each.text for each in told] == ["de", "de"]


def test_seeds_repeat_and_samples_differ():
    def draws(sample, seed=3):
        told = Told("a", temperature=1.0, seed=seed, sample=sample, max_new_tokens=12, logit_bias={END: -100})
        run(schedule(FakeEngine(uniform), rows=1), told)
        return told.text

    assert draws(0) == draws(0) != draws(1)


def test_a_stop_string_may_lie_across_tokens():
    told = Told("a", stop=("efg", "xx"), max_new_tokens=20)
    run(schedule(FakeEngine(alphabet)), told)
    assert told.text == "bcd"
    assert told.last == FinishEvent("stop", prompt_tokens=1, cached_tokens=0, new_tokens=6, stop_string="efg")


def test_a_stop_token_ends_the_answer_and_is_not_in_it():
    told = Told("a", stop_token_ids=ids_of("e"), max_new_tokens=20)
    run(schedule(FakeEngine(alphabet)), told)
    assert told.text == "bcd"
    assert told.last == FinishEvent("stop", prompt_tokens=1, cached_tokens=0, new_tokens=4)
    assert told.events[-2].token_id == ids_of("e")[0]


@pytest.mark.parametrize("options", [{}, {"logprobs": 2}, {"temperature": 1.0, "top_k": 1}, {"max_new_tokens": 1}])
def test_log_probabilities_of_a_prompt_come_first(options):
    told, plain = Told("abx", **options), Told("abx", **options)
    told.request.prompt_logprobs = 2
    run(schedule(FakeEngine(alphabet)), told, plain)
    (scored, *rest) = told.events
    assert isinstance(scored, PromptEvent) and [each.token_id for each in scored.logprobs] == ids_of("bx")
    likely, unlikely = scored.logprobs
    assert likely.top[0][:2] == (likely.token_id, pytest.approx(likely.logprob)) and len(likely.top) == 2
    assert unlikely.top[0][0] == ids_of("c")[0] and unlikely.logprob == pytest.approx(likely.logprob - 20)
    assert [event.token_id for event in rest[:-1]] == [event.token_id for event in plain.events[:-1]]
    assert rest[-1].new_tokens == plain.last.new_tokens and told.text == plain.text
    if "logprobs" in options:
        assert rest[0].logprob.logprob == pytest.approx(plain.events[0].logprob.logprob)


def test_one_greedy_token_after_a_scored_prompt_needs_no_prefill():
    engine, told = FakeEngine(alphabet), Told("abc", max_new_tokens=1, logprobs=1)
    told.request.prompt_logprobs = 0
    run(schedule(engine), told)
    assert {kind for kind, _ in engine.log} == {"score"} and told.text == "d"
    assert [top[:2] for top in told.events[1].logprob.top] == [(ids_of("d")[0], told.events[1].logprob.logprob)]
    assert told.last == FinishEvent("length", prompt_tokens=3, cached_tokens=0, new_tokens=1)


@pytest.mark.parametrize("prompt", ["a", "abcdefghij"])
def test_a_request_that_only_scores_its_prompt(prompt):
    engine, told = FakeEngine(uniform), Told(prompt)
    told.request.prompt_logprobs, told.request.generates = 0, False
    scheduler = schedule(engine)
    run(scheduler, told)
    scored, end = told.events
    assert [each.logprob for each in scored.logprobs] == pytest.approx([-np.log(VOCABULARY)] * (len(prompt) - 1))
    assert end == FinishEvent("length", prompt_tokens=len(prompt), cached_tokens=0, new_tokens=0)
    assert scheduler.counts.prompt_tokens == len(prompt)


def test_other_rows_continue_while_a_prompt_is_scored():
    engine = FakeEngine(alphabet)
    scheduler = schedule(engine, interleave=True)
    running, scored = Told("a", max_new_tokens=20), Told("abcdefghijkl")
    scored.request.prompt_logprobs, scored.request.generates = 0, False
    run(scheduler, running, scored)
    kinds = [kind for kind, _ in engine.log]
    first, last = kinds.index("score"), len(kinds) - 1 - kinds[::-1].index("score")
    assert "greedy" in kinds[first:last] and len(running.text) == 20


def test_a_prompt_that_cannot_be_scored_fails_alone():
    engine = FakeEngine(alphabet)
    engine.score = lambda *_, **__: (_ for _ in ()).throw(ProviderError("no"))
    scored, other = Told("abc"), Told("abc")
    scored.request.prompt_logprobs = 0
    run(schedule(engine), scored, other)
    assert isinstance(scored.last, FailureEvent) and other.text == "defg"


def test_cancelling_a_prompt_while_it_is_scored():
    engine = FakeEngine(alphabet)
    scheduler, told = schedule(engine), Told("abcdefghijkl")
    told.request.prompt_logprobs = 0
    score = engine.score

    def cancelled(prompt, first, *, and_next, after_chunk):
        told.request.cancel()
        return score(prompt, first, and_next=and_next, after_chunk=after_chunk)

    engine.score = cancelled
    run(scheduler, told)
    assert told.events == [] and len(engine.log) == 1 and scheduler.counts.cancelled == 1


def test_text_held_for_a_stop_string_comes_at_the_end():
    told = Told("a", stop="dex", max_new_tokens=4)
    run(schedule(FakeEngine(alphabet)), told)
    assert told.text == "bcde"


def test_cancelling_a_waiting_and_a_running_request():
    engine = FakeEngine(alphabet)
    scheduler = schedule(engine, rows=1)
    running, waiting, after = Told("a", max_new_tokens=20), Told("b"), Told("c")
    running._then = lambda event: len(running.events) == 3 and running.request.cancel()
    waiting.request.cancel()
    run(scheduler, running, waiting, after)
    assert running.text == "bcd" and isinstance(running.last, TokenEvent)
    assert waiting.events == [] and after.text == "defg"
    assert scheduler.counts.cancelled == 2


def test_cancelling_a_prompt_between_its_chunks():
    engine = FakeEngine(alphabet, chunk=1)
    scheduler = schedule(engine, interleave=True)
    second = Told("hijklmnop")
    first = Told("a", max_new_tokens=5, on_event=lambda _: len(first.events) == 3 and second.request.cancel())
    run(scheduler, first, second)
    assert second.events == [] and first.text == "bcdef"
    assert len([entry for entry in engine.log if entry[0] == "prefill"]) < 1 + 9


def test_a_deadline_ends_a_request_with_an_error():
    now = time.monotonic()
    late, fine = Told("a", deadline=now - 1), Told("b", deadline=now + 60)
    expires = Told("c", max_new_tokens=50)
    expires._then = lambda event: len(expires.events) == 2 and setattr(expires.request, "deadline", now - 1)
    run(schedule(FakeEngine(alphabet), rows=3), late, fine, expires)
    assert isinstance(late.last, FailureEvent) and isinstance(late.last.error, DeadlineError)
    assert (fine.text, fine.last.reason) == ("cdef", "length")
    assert expires.text == "de" and isinstance(expires.last.error, DeadlineError)


class Refusing:
    """A logits processor that fails at the second token."""

    def __init__(self):
        self.accepted = 0

    def process(self, logits):
        if self.accepted == 1:
            raise ValueError("no such state")
        return logits

    def accept(self, token):
        self.accepted += 1


def test_one_row_may_fail_without_the_others():
    fails, fine = Told("a", logits_processor=Refusing), Told("h")
    run(schedule(FakeEngine(alphabet)), fails, fine)
    assert fails.text == "b" and str(fails.last.error) == "no such state"
    assert fine.text == "ijkl"


def test_a_processor_that_cannot_be_made_fails_its_request_alone():
    def broken():
        raise ValueError("no grammar")

    fails, fine = Told("a", logits_processor=broken), Told("h")
    run(schedule(FakeEngine(alphabet), rows=1), fails, fine)
    assert str(fails.last.error) == "no grammar" and fine.text == "ijkl"


def test_a_step_that_fails_fails_its_rows_and_the_next_requests_run():
    def script(tokens):
        if tokens[-1] == ids_of("d")[0]:
            raise ProviderError("out of memory")
        return alphabet(tokens)

    scheduler = schedule(FakeEngine(script))
    rows, after = [Told("b", max_new_tokens=9), Told("h", max_new_tokens=9)], Told("p")
    run(scheduler, *rows, after)
    assert [str(each.last.error) for each in rows] == ["out of memory"] * 2
    assert after.text == "qrst"


def test_a_prompt_that_fails_leaves_its_row_free():
    def script(tokens):
        if tokens[0] == A:
            raise ProviderError("no kernel")
        return alphabet(tokens)

    fails, fine = Told("abc"), Told("h")
    run(schedule(FakeEngine(script), rows=1), fails, fine)
    assert str(fails.last.error) == "no kernel" and fine.text == "ijkl"


def test_abort_fails_what_runs_and_what_waits():
    scheduler = schedule(FakeEngine(alphabet), rows=1)
    told = [Told("a", max_new_tokens=9), Told("b")]
    for each in told:
        scheduler.submit(each.request)
    scheduler.advance()
    scheduler.abort(ProviderError("gone"))
    assert [str(each.last.error) for each in told] == ["gone", "gone"]
    assert not scheduler.advance()


def test_what_does_not_fit_into_a_row_is_refused():
    with pytest.raises(ContextLengthError, match="more than the context of 8"):
        schedule(FakeEngine(alphabet), capacity=8).submit(Told("abcde").request)


@pytest.mark.parametrize("interleave", [True, False])
def test_a_prefix_of_an_earlier_prompt_is_not_run_again(interleave):
    engine = FakeEngine(alphabet, chunk=4)
    cache = PrefixCache(2)
    options = {"rows": 2, "interleave": True} if interleave else {"rows": 1}
    beginning = "abcdefgh"
    for end, cached in (("xy", 0), ("xy", 8), ("mn", 8)):
        scheduler = schedule(engine, prefix_cache=cache, **options)
        engine.log.clear()
        told = Told(beginning + end, max_new_tokens=2)
        run(scheduler, told)
        assert told.last.cached_tokens == cached
        prefilled = [token for entry in engine.log if entry[0] == "prefill" for token in entry[1]]
        assert prefilled == ids_of((beginning + end)[cached:])
        assert scheduler.counts.cached_tokens == cached


def test_entries_of_the_prefix_cache_are_not_overwritten_by_the_next_prompt():
    engine, cache = FakeEngine(alphabet, chunk=4), PrefixCache(2)
    scheduler = schedule(engine, rows=1, prefix_cache=cache)
    for prompt in ("abcdefgh", "mnopqrst"):
        run(scheduler, Told(prompt, max_new_tokens=1))
    again = Told("abcdefghk", max_new_tokens=2)
    run(schedule(engine, rows=1, prefix_cache=cache), again)
    assert again.last.cached_tokens == 8 and again.text == "lm"


def test_a_row_keeps_a_conversation():
    engine = FakeEngine(alphabet)
    scheduler = schedule(engine, rows=1)
    run(scheduler, first := Told("abc"))
    engine.log.clear()
    run(scheduler, second := Told("abc" + first.text + "mn"))
    assert engine.log[0] == ("prefill", ids_of("gmn")), "the last token of an answer is not run before the next turn"
    assert second.last.cached_tokens == 6 and second.text == "opqr"
    engine.log.clear()
    run(scheduler, third := Told("abq"))
    assert third.last.cached_tokens == 2 and third.text == "rstu"


def test_a_cancelled_turn_leaves_a_usable_prefix():
    engine = FakeEngine(alphabet)
    scheduler = schedule(engine, rows=1)
    turn = Told("abc", max_new_tokens=9)
    turn._then = lambda _: len(turn.events) == 3 and turn.request.cancel()
    run(scheduler, turn)
    run(scheduler, again := Told("abcdefz", max_new_tokens=1))
    assert again.last.cached_tokens == 5


def test_after_a_burst_a_lone_request_takes_the_first_row():
    """A step computes all rows up to the last running one."""
    engine = FakeEngine(alphabet)
    scheduler = schedule(engine, rows=4, interleave=True)
    run(scheduler, *(Told("ab" + letter, max_new_tokens=3 + i) for i, letter in enumerate("cdef")))
    engine.log.clear()
    for _ in range(2):
        run(scheduler, Told("abk"))
    assert {tuple(rows) for kind, rows in engine.log if kind == "greedy"} == {(0,)}


def test_a_long_prefix_is_worth_a_higher_row():
    engine = FakeEngine(alphabet, host_memory=False)
    scheduler = schedule(engine, rows=3, capacity=128, interleave=True)
    conversation = "ab" * 20
    run(scheduler, Told("h", max_new_tokens=2), Told(conversation, max_new_tokens=3))
    run(scheduler, again := Told(conversation + "mn"), other := Told("ab"))
    assert again.last.cached_tokens == 40 and again.text == "opqr"
    assert other.last.cached_tokens == 0 and other.text == "cdef"


def test_a_row_that_a_step_computes_while_idle_keeps_nothing():
    engine = FakeEngine(alphabet)
    scheduler = schedule(engine)
    short, long = Told("abcdef", max_new_tokens=1), Told("h", max_new_tokens=6)
    run(scheduler, Told("mnop", max_new_tokens=2), short, long)
    run(scheduler, again := Told("mnopq"))
    assert again.last.cached_tokens == 0 and again.text == "rstu"


def test_the_others_go_on_while_an_encoder_runs():
    first = Told("a", max_new_tokens=12)
    encoder_started, tokens_meanwhile = threading.Event(), []

    def features():
        encoder_started.set()
        had = len(first.events)
        for _ in range(500):
            if len(first.events) >= had + 3:
                break
            time.sleep(0.01)
        tokens_meanwhile.append(len(first.events) - had)
        return np.zeros((1, 4), np.float32)

    engine = FakeEngine(alphabet)
    with ThreadPoolExecutor(1) as executor:
        scheduler = schedule(engine, interleave=True, executor=executor)
        second = Told("hij", spans=(SoftTokenSpan(0, 1, "an image", features),))
        run(scheduler, first, second)
    assert encoder_started.is_set() and tokens_meanwhile[0] >= 3
    assert second.text == "klmn" and second.request.timings.encoder_seconds > 0


def test_a_text_that_comes_after_an_image_does_not_wait_for_its_encoder():
    text_ended, overtaken = threading.Event(), []

    def features():
        overtaken.append(text_ended.wait(2))
        return np.zeros((1, 4), np.float32)

    def ended(_):
        if text.text == "bcde":
            text_ended.set()

    text = Told("a", on_event=ended)
    with ThreadPoolExecutor(1) as executor:
        scheduler = schedule(FakeEngine(alphabet), interleave=True, executor=executor)
        picture = Told("hij", spans=(SoftTokenSpan(0, 1, "an image", features),))
        run(scheduler, picture, text)
    assert overtaken == [True] and picture.text == "klmn"


def test_an_image_is_encoded_once_for_requests_that_share_it():
    encoded = []

    def features():
        encoded.append(1)
        return np.zeros((1, 4), np.float32)

    with ThreadPoolExecutor(1) as executor:
        options = {"prefix_cache": PrefixCache(2), "interleave": True, "executor": executor}
        scheduler = schedule(FakeEngine(alphabet), capacity=256, **options)
        prompt = "hij" + "k" * 100
        run(scheduler, *(Told(prompt, spans=(SoftTokenSpan(0, 1, "an image", features),)) for _ in range(2)))
    assert len(encoded) == 1


def test_the_images_of_cancelled_requests_are_not_encoded():
    encoded = []

    def image(name, seconds=0.0):
        def features():
            encoded.append(name)
            time.sleep(seconds)
            return np.zeros((1, 4), np.float32)

        return (SoftTokenSpan(0, 1, name, features),)

    engine = FakeEngine(alphabet)
    with ThreadPoolExecutor(1) as executor:
        executor.submit(time.sleep, 0.2)
        scheduler = schedule(engine, interleave=True, executor=executor)
        gone = Told("hij", spans=image("gone"))
        first = Told("a", max_new_tokens=12, on_event=lambda _: len(first.events) == 3 and gone.request.cancel())
        run(scheduler, first, gone, stays := Told("hij", spans=image("stays")))
    assert encoded == ["stays"] and gone.events == [] and stays.text == "klmn"


def test_a_callback_that_fails_cancels_its_request_alone():
    def closed(_):
        raise RuntimeError("the event loop is closed")

    scheduler = schedule(FakeEngine(alphabet))
    gone, fine = Told("a", on_event=closed), Told("h")
    run(scheduler, gone, fine)
    assert len(gone.events) == 1 and fine.text == "ijkl"


def test_no_event_follows_a_cancellation():
    first = Told("a", max_new_tokens=9)
    second = Told("h", max_new_tokens=9)
    first._then = lambda _: len(first.events) == 3 and (first.request.cancel(), second.request.cancel())
    run(schedule(FakeEngine(alphabet)), first, second)
    assert (first.text, second.text) == ("bcd", "ij")


def test_a_finished_stream_frees_its_cache_at_once():
    engine = FakeEngine(alphabet)
    gc.disable()
    try:
        scheduler = schedule(engine, rows=1)
        stream = GenerationStream(scheduler, [PromptTokens(ids_of("abc"))], GenerationOptions(max_new_tokens=3))
        cache = weakref.ref(scheduler._cache)
        assert "".join(stream) == "def"
        del scheduler, stream
        engine._cache = None
        assert cache() is None
    finally:
        gc.enable()


def test_an_encoder_that_fails_fails_its_request():
    def features():
        raise ProviderError("the encoder failed")

    with ThreadPoolExecutor(1) as executor:
        scheduler = schedule(FakeEngine(alphabet), interleave=True, executor=executor)
        fine, fails = Told("a"), Told("hij", spans=(SoftTokenSpan(0, 1, "an image", features),))
        run(scheduler, fine, fails)
    assert str(fails.last.error) == "the encoder failed" and fine.text == "bcde"


def test_timings_add_up():
    engine = FakeEngine(alphabet)
    scheduler = schedule(engine)
    told = [Told("abc", max_new_tokens=3), Told("ab", max_new_tokens=5)]
    run(scheduler, *told)
    timings = [each.request.timings for each in told]
    assert [row.prefill_tokens for row in timings] == [3, 2]
    assert [row.decode_tokens for row in timings] == [2, 4]
    assert 0 < timings[0].decode_seconds < timings[1].decode_seconds
    assert scheduler.counts.prompt_tokens == 5 and scheduler.counts.new_tokens == 8
