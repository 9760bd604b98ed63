"""What is trained is what is exported: the same logits as the exported modules', for every slice."""

import itertools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.func import functional_call

from gemma3n_onnx.export.slicing import load_slices, resolve
from gemma3n_onnx.export.text_weights import tensor_shapes
from gemma3n_onnx.graphs.config import FULL, TextConfig
from gemma3n_onnx.graphs.decoder import Attention, Decoder
from gemma3n_onnx.graphs.embedding import Embedding, HardRows
from gemma3n_onnx.runtime.prompt.tokenizer import Tokenizer
from gemma3n_onnx.training.checkpoint import demo_config, write_companions
from gemma3n_onnx.training.conversations import QUESTIONS, TALK, Conversation, random_row
from gemma3n_onnx.training.decoder import HEAD, PER_LAYER, TOKENS, SlicedModel, _Lesson, initial_weights
from gemma3n_onnx.training.gradient_worker import GradientWorker
from gemma3n_onnx.training.optimizer import ADAM_LR, MUON_LR, Optimizer
from gemma3n_onnx.training.pictures import COLOURS, MAX_THINGS, SHAPES, Thing, random_picture
from gemma3n_onnx.training.prompts import ASKED, NOTHING, SOFT_TOKENS, ConversationEncoder, LabelledSoftTokens
from gemma3n_onnx.training.questions import Exchange, plural
from gemma3n_onnx.training.sounds import Sound, random_sound
from gemma3n_onnx.training.text import PHASES, Course, Media, random_batch

SLICES = load_slices(Path(__file__).parents[2] / "demo" / "slices.csv").specs
KINDS_OF_THINGS = [Thing(s, c, 0.5, 0.5, 0.2, 0.0, (0, 0, 0)) for s, c in itertools.product(SHAPES, COLOURS)]
TOLERANCE = 1e-5  # of the logits' range; fp32, the same sums in another order


@pytest.fixture(scope="module")
def config():
    return TextConfig.from_hf(demo_config())


@pytest.fixture(scope="module")
def weights(config):
    rng = torch.Generator().manual_seed(0)
    initial = initial_weights(tensor_shapes(config), config, rng)
    # Initial norms and gates are constants; here every value counts.
    return {name: (w.detach() * (1 + 0.2 * torch.randn(w.shape, generator=rng))) for name, w in initial.items()}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_companions(folder, demo_config())
    return ConversationEncoder(folder)


@pytest.fixture(scope="module")
def rows(encoder):
    """Two rows of three conversations with a picture and a sound, in the order that a batch has them."""
    rng = np.random.default_rng(0)
    made = [random_row(rng, random_picture(rng), random_sound(rng), 3) for _ in range(2)]
    nothing = LabelledSoftTokens.plain(torch.zeros(sum(SOFT_TOKENS.values()), 1))
    return sorted(made, key=lambda row: encoder.batch([row], [nothing]).ids.shape[1])


@pytest.fixture(scope="module")
def features(config, rows):
    """Of each row's media."""
    draw = torch.Generator().manual_seed(1)
    counts = [sum(SOFT_TOKENS[kind] for kind in row[0].media_kinds) for row in rows]
    return [torch.randn(count, config.hidden_size, generator=draw) for count in counts]


@pytest.fixture(scope="module")
def hard_rows(config):
    return torch.randn(256, config.hidden_size, generator=torch.Generator().manual_seed(2))


def exported(weights, chosen, hard_rows, soft_ids, ids, features):
    """Logits [S, V] of the modules that an export traces, for one conversation; they read features by kind."""
    config = chosen.config
    cut = {}
    for name in tensor_shapes(config):
        source = chosen.source_of(name)
        tensor = weights[source.source]
        for axis, ranges in enumerate((source.rows, source.columns)):
            if ranges is not None:
                tensor = tensor.index_select(axis, torch.cat([torch.arange(*r) for r in ranges]))
        cut[name] = tensor
    embedding = Embedding(
        config, torch.float32, HardRows(config.vocab_size - len(hard_rows), len(hard_rows)), tuple(soft_ids.tolist())
    )
    tables = {
        TOKENS: torch.cat([cut[TOKENS], hard_rows / math.sqrt(config.hidden_size)]),
        PER_LAYER: cut.pop(PER_LAYER) * math.sqrt(config.hidden_size_per_layer_input),
    }
    kinds = torch.tensor([i for i in ids if i in soft_ids])
    of_kinds = [features[kinds == soft] for soft in soft_ids]
    embeds, table_rows = functional_call(embedding, tables, (torch.tensor([ids]), of_kinds))
    decoder = Decoder(config, "all")
    cut[HEAD] = cut.pop(TOKENS)
    positions = torch.arange(len(ids))[None]
    past = [torch.zeros(1, config.num_kv_heads, 0, config.head_dim)] * (2 * config.num_kv_layers)
    return functional_call(decoder, cut, (embeds, table_rows, torch.ones_like(positions), positions, past))[0][0]


@pytest.mark.parametrize("spec", SLICES, ids=lambda spec: spec.name)
def test_a_slice_in_training_is_the_slice_that_is_exported(config, weights, encoder, rows, features, hard_rows, spec):
    """Conversations that share a row have the logits of conversations alone."""
    chosen, soft_ids = resolve(spec, config), encoder.soft_ids
    with torch.no_grad():
        packed = encoder.batch(rows, list(map(LabelledSoftTokens.plain, features)))
        found = SlicedModel(chosen).logits(weights, hard_rows, soft_ids, packed)
        expected = []
        for row, of_row in zip(rows, features):
            shared = encoder._beginning([encoder.encode(conversation).ids for conversation in row])
            for number, conversation in enumerate(row):
                ids, targets, *_ = encoder.encode(conversation)
                logits = exported(weights, chosen, hard_rows, soft_ids, ids, of_row)
                own = torch.arange(len(ids)) >= (shared if number else 0)
                expected.append(logits[(torch.tensor(targets) >= 0) & own])
    expected = torch.cat(expected)
    error = ((found - expected).abs().max() / (expected.max() - expected.min())).item()
    print(f"{spec.name}: {error:.1e} of the range, {len(found)} targets, rows of {packed.ids.shape[1]} tokens")
    assert packed.ids.shape[1] > 2 * config.sliding_window
    assert error < TOLERANCE


def test_every_weight_of_the_whole_model_is_trained(config, weights, encoder, rows, features, hard_rows):
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in weights.items()}
    batch = encoder.batch(rows, list(map(LabelledSoftTokens.plain, features)))
    entropy, _ = SlicedModel(resolve(SLICES[0], config)).losses(leaves, hard_rows, encoder.soft_ids, batch)
    entropy.backward()
    assert [name for name, leaf in leaves.items() if leaf.grad is None or not leaf.grad.abs().sum() > 0] == []


def test_only_answers_are_learned(tmp_path, encoder):
    write_companions(tmp_path, demo_config())
    tokenizer = Tokenizer.from_folder(tmp_path)
    rng = np.random.default_rng(5)
    for _ in range(10):
        row = random_row(rng, random_picture(rng), random_sound(rng), 3)
        for conversation in row:
            ids, targets, *_ = encoder.encode(conversation)
            learned = [target for target in targets if target >= 0]
            assert all(target in (-1, following) for target, following in zip(targets, ids[1:]))
            expected = "".join(f"{turn.answer}<end_of_turn>" for turn in conversation.turns)
            assert tokenizer.decode(learned, skip_special=False) == expected


def test_an_answer_knows_what_it_speaks_of(tmp_path, encoder):
    """Each colour or shape that comes next belongs to the things spoken of, each word to those that it means: `red`
    every red one, `star` every star, `red star` red stars."""
    write_companions(tmp_path, demo_config())
    tokenizer = Tokenizer.from_folder(tmp_path)
    rng = np.random.default_rng(6)
    checked, paired, single = 0, 0, ("describe", "colour", "shape")
    for _ in range(20):
        picture = random_picture(rng, count=3)
        conversations = random_row(rng, picture, None, 8, QUESTIONS)
        for conversation in conversations:
            tokens, before = encoder.encode(conversation), ""
            for token_id, target, named, spoken, _ in zip(*tokens):
                word, following = (tokenizer.decode([max(i, 0)]).strip().lower() for i in (token_id, target))
                pair = before in COLOURS and word in SHAPES
                meant = [
                    i
                    for i, thing in enumerate(picture.things)
                    if named_by(word, thing) and (not pair or thing.colour == before)
                ]
                is_name = any(named_by(word, thing) for thing in KINDS_OF_THINGS)
                paired, before = paired + pair, word
                assert named == (sum(1 << i for i in meant) or NOTHING if is_name else 0), word
                if target >= 0 and conversation.turns[-1].task in single and len(conversation.turns) == 1:
                    of_thing = [i for i, thing in enumerate(picture.things) if named_by(following, thing)]
                    if of_thing:
                        checked += 1
                        assert bin(spoken).count("1") == 1
                        assert spoken in [1 << i for i in of_thing]
    assert checked > 100
    assert paired > 100


def test_behind_media_the_question_before_them_is_looked_for(encoder):
    rng = np.random.default_rng(8)
    picture, sound = random_picture(rng), random_sound(rng)
    turns = (
        Exchange("sum", "1 plus 1?", "1 plus 1 is 2."),
        Exchange("describe", "What do you see?", "A ring.", media=(picture,), media_last=True),
        Exchange("pitch", "Is it high or low?", "It is low.", media=(sound,)),
        Exchange("hear", "What do you hear?", "A low tone.", media=(sound,), media_last=True),
    )
    tokens = encoder.encode(Conversation(None, turns))

    def marked(column, bit):
        ids = [token_id for token_id, value in zip(tokens.ids, column) if value == bit]
        return encoder._tokenizer.decode(ids, skip_special=False).strip()

    behind = "<end_of_{}>\n\n<end_of_turn>\n<start_of_turn>model"
    for bit, question, kind in (
        (ASKED, "What do you see?", "image"),
        (ASKED << 1, "What do you hear?", "audio"),
    ):
        assert marked(tokens.shows, bit) == f"{question}\n\n<start_of_{kind}>"
        assert marked(tokens.named, bit) == behind.format(kind)
    assert {bit for bit in tokens.shows if bit} == {ASKED, ASKED << 1}


@pytest.mark.parametrize("media", [("picture",), ("sound",), ("picture", "sound")])
def test_looking_back_at_the_question_is_taught_about_every_medium(config, weights, encoder, hard_rows, media):
    rng = np.random.default_rng(9)
    about = {"picture": random_picture(rng), "sound": random_sound(rng)}
    habits = replace(TALK, media_last=1.0)
    row = random_row(rng, *(about[kind] if kind in media else None for kind in about), 1, habits)
    count = sum(SOFT_TOKENS[kind] for kind in row[0].media_kinds)
    batch = encoder.batch([row], [LabelledSoftTokens.plain(torch.randn(count, config.hidden_size))])
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in weights.items()}
    _, lesson = SlicedModel(resolve(SLICES[0], config)).losses(leaves, hard_rows, encoder.soft_ids, batch)
    lesson.backward()
    first = config.layer_types.index(FULL)
    for part in ("q_proj", "k_proj"):
        assert leaves[f"layers.{first}.self_attn.{part}.weight"].grad.abs().sum() > 0


def test_at_the_end_of_a_part_all_that_is_left_is_looked_for(encoder):
    """Whether "and", a comma, a colon or a full stop comes depends on whether anything is left to name."""
    rng = np.random.default_rng(7)
    tokenizer = encoder._tokenizer
    seen = set()
    for picture in (random_picture(rng, count=n) for n in [*range(1, MAX_THINGS + 1)] * 7):
        for conversation in random_row(rng, picture, None, 6, QUESTIONS):
            turn, tokens = conversation.turns[-1], encoder.encode(conversation)
            if turn.task not in ("describe", "how many shapes") or len(conversation.turns) > 1:
                continue
            things = sum(turn.looks, ())
            left = [sum(1 << thing for thing in things[n:]) or NOTHING for n in range(1, len(things) + 1)]
            ends = [
                (tokenizer.decode([target]).strip(), spoken)
                for target, spoken in zip(tokens.targets, tokens.spoken)
                if target >= 0 and tokenizer.decode([target]).strip() in (",", "and", ":", ".")
            ]
            assert [spoken for _, spoken in ends] == ([*left, *[NOTHING] * 2])[: len(ends)]
            seen |= {mark for mark, _ in ends}
    assert seen == {",", "and", ":", "."}


def named_by(word, thing):
    return word in (thing.colour, thing.shape, plural(thing.shape))


def test_beeps_are_counted_along(encoder):
    sound = Sound("high", 3, 0)
    counts = torch.zeros(SOFT_TOKENS["audio"], dtype=torch.int64)
    counts[[4, 9, 13]] = torch.arange(1, 4)
    soft = replace(
        LabelledSoftTokens.plain(torch.randn(len(counts), 8)), counts=counts, kept=torch.arange(len(counts)) < 20
    )
    batch = encoder.batch([random_row(np.random.default_rng(0), None, sound, 2)], [soft])
    at_soft = torch.isin(batch.ids, encoder.soft_ids)
    assert at_soft.sum() == 20
    words = [encoder.word_id(word) for word in ("one", "two", "three")]
    expected = [-1] * 4 + [words[0]] + [-1] * 4 + [words[1]] + [-1] * 3 + [words[2]] + [-1] * 6
    assert batch.targets[at_soft].tolist() == expected


def test_full_attention_reaches_over_tokens_that_were_left_out(encoder, rows, features):
    kept = [torch.arange(len(of_row)) % 9 == 0 for of_row in features]
    soft = [replace(LabelledSoftTokens.plain(f), kept=k) for f, k in zip(features, kept)]
    batch = encoder.batch(rows, soft)
    assert batch.positions.max() > batch.ids.shape[1]
    assert len(batch.features) == sum(int(k.sum()) for k in kept)
    last = (batch.branches >= 0).sum(1, keepdim=True) - 1
    beginning = batch.branches == 0
    assert batch.visible(last, None)[:, 0, 0][beginning].all()
    near = batch.visible(last, 128)[:, 0, 0] & beginning
    assert near.any() and not (near == beginning).all()


def test_a_lesson_is_learned_by_looking_at_the_things_meant(config, encoder):
    rng = np.random.default_rng(7)
    picture = random_picture(rng, count=2)
    shows = torch.randint(0, 3, (SOFT_TOKENS["image"],), generator=torch.Generator().manual_seed(0))
    soft = replace(LabelledSoftTokens.plain(torch.randn(len(shows), config.hidden_size)), shows=shows)
    batch = encoder.batch([random_row(rng, picture, None, 4)], [soft])
    attention = Attention(config, 1, windowed_cache=False)
    spoken = batch.spoken[0]
    taught = ((spoken > 0) & (spoken & (spoken - 1) == 0)).nonzero()[:, 0]  # of one thing
    lesson = _Lesson.of(batch, batch.spoken, taught[None])
    query = torch.zeros(1, len(taught), attention.heads, attention.head_dim)
    key = torch.zeros(1, batch.ids.shape[1], attention.kv_heads, attention.head_dim)
    for thing in (1, 2, NOTHING):
        axis = thing.bit_length()
        key[batch.shows == thing, :, axis] = 5.0
        query[:, (batch.spoken[0, taught] & thing) > 0, :, axis] = 5.0
    right = lesson.loss(attention, query.flatten(2), key.flatten(2))
    wrong = lesson.loss(attention, -query.flatten(2), key.flatten(2))
    assert abs(right.item()) < 2e-3
    assert wrong.item() > 6


def squares(weights):
    """Losses whose gradients are the weights, times the step's number."""

    def losses(*step):
        yield sum(step) * weights["a"].square().sum() / 2
        yield sum(step) * weights["b"].square().sum() / 2

    return losses


def fails(weights):
    def losses(*step):
        raise ValueError("no losses")

    return losses


def test_another_process_adds_its_gradients():
    weights = {"a": torch.randn(3, 4, requires_grad=True), "b": torch.randn(5, requires_grad=True)}
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    with GradientWorker(weights, squares) as worker:
        for step in (1, 2):
            weights["a"].grad, weights["b"].grad = torch.ones(3, 4), None
            worker.begin(0, step)
            assert worker.finish() == pytest.approx(
                step * sum(weight.square().sum() / 2 for weight in before.values()).item(), rel=1e-5
            )
            torch.testing.assert_close(weights["a"].grad, 1 + step * before["a"])
            torch.testing.assert_close(weights["b"].grad, step * before["b"])
            # What is learned here is what the next gradients are of.
            with torch.no_grad():
                for name, weight in weights.items():
                    before[name] = weight.mul_(0.5).clone()


def test_a_process_that_fails_ends_the_training():
    with GradientWorker({"a": torch.ones(2, requires_grad=True)}, fails) as worker:
        worker.begin(0)
        with pytest.raises(EOFError):
            worker.finish()


@pytest.mark.parametrize("step", [0, PHASES[1].glimpsing], ids=["glimpse", "whole"])
def test_the_processes_share_a_step(config, weights, hard_rows, tmp_path, monkeypatch, step):
    """Half of the rows each, of other conversations, and half of a mean as a loss."""
    write_companions(tmp_path, demo_config())
    media, batches, losses = some_media(config), [], []

    def batch(rng, kind, size, *others, **options):
        batches.append((kind, size, random_batch(rng, kind, size, *others, **options)))
        return batches[-1][2]

    monkeypatch.setattr("gemma3n_onnx.training.text.random_batch", batch)
    with torch.no_grad():
        for process in range(2):
            course = Course(config, SLICES, media, hard_rows, tmp_path, (0, 1, process), weights)
            losses.append([loss.item() for loss in course(1, step)])
    kinds = len(PHASES[1].batches)
    theirs, ours = batches[:kinds], batches[kinds:]
    expected = PHASES[1].batches if step else PHASES[1].glimpses
    assert {kind: size for kind, size, _ in ours} == {
        kind: (rows // 2, each) for kind, (rows, each) in expected.items()
    }
    for (kind, size, first), (_, _, second) in zip(theirs, ours, strict=True):
        assert len(first.ids) == len(second.ids) == size[0], kind
        assert first.ids.shape != second.ids.shape or (first.ids != second.ids).any()
    uniform = math.log(config.vocab_size)
    assert all(0.3 * uniform < 2 * loss < 3 * uniform for of_process in losses for loss in of_process)


def some_media(config):
    rng = np.random.default_rng(0)
    pictures, sounds = [random_picture(rng) for _ in range(4)], [Sound("high", beeps, 0) for beeps in range(1, 5)]
    image, audio = SOFT_TOKENS["image"], SOFT_TOKENS["audio"]
    return Media(
        pictures,
        torch.randn(len(pictures), image, config.hidden_size).half(),
        torch.randint(0, 2, (len(pictures), image)),
        sounds,
        torch.randn(len(sounds), audio, config.hidden_size).half(),
        torch.randint(0, 2, (len(sounds), audio)),
        torch.zeros(len(sounds), audio, dtype=torch.int64),
    )


def test_the_optimizer_finds_a_minimum():
    torch.manual_seed(0)
    target, offset = torch.randn(12, 8), 0.3 * torch.randn(8)
    matrix, vector = torch.zeros(12, 8, requires_grad=True), torch.zeros(8, requires_grad=True)
    steps = 400
    optimizer = Optimizer([matrix], [vector], steps)
    losses = [
        optimizer.step([(matrix - target).square().mean(), (vector - offset).square().mean()]) for _ in range(steps)
    ]
    assert losses[-1] < 0.02 * losses[0]
    assert (matrix - target).abs().max() < 4 * MUON_LR


def test_weights_without_a_gradient_decay_by_their_share_of_the_rate():
    matrix, vector = torch.ones(4, 4, requires_grad=True), torch.ones(4, requires_grad=True)
    optimizer = Optimizer([matrix], [vector], 100, weight_decay=0.5)
    optimizer.step([0 * matrix.sum() + 0 * vector.sum()])
    warm_up = 1 / 30
    assert matrix.detach().numpy() == pytest.approx(1 - warm_up * MUON_LR * 0.5, rel=1e-6)
    assert vector.detach().numpy() == pytest.approx(1 - warm_up * ADAM_LR * 0.5, rel=1e-6)
