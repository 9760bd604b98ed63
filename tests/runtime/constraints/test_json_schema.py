"""Schemas as clients write them: whatever llguidance lets through matches, or is told apart after generation."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import StrEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal
from uuid import UUID

import jsonschema
import numpy as np
import pytest
from llguidance import LLMatcher
from pydantic import AnyUrl, BaseModel, ConfigDict, Field, HttpUrl, RootModel, SecretStr, StringConstraints

from gemma3n_onnx.runtime.artifact import sha256_of
from gemma3n_onnx.runtime.constraints.grammar import Constraint, Grammars
from gemma3n_onnx.runtime.constraints.json_schema import embed, prepare
from gemma3n_onnx.runtime.constraints.patterns import Pattern
from gemma3n_onnx.runtime.errors import AnswerSchemaError, OptionError
from gemma3n_onnx.runtime.serve.openai.tools import Tool, schema_of, select_tools

DEMO = Path(__file__).parents[3] / "demo"
# `equals`: the schema in the oracle's dialect, where it has no draft of its own.
CASES = [json.loads(line) for line in (Path(__file__).parent / "schemas.jsonl").read_text("utf-8").splitlines()]
ORACLES = {4: jsonschema.Draft4Validator, 7: jsonschema.Draft7Validator, 2020: jsonschema.Draft202012Validator}


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Color(StrEnum):
    RED = "red"
    BLUE = "blue"


class Cat(Strict):
    kind: Literal["cat"]
    lives: int = Field(ge=0, le=9)


class Dog(Strict):
    kind: Literal["dog", "wolf"]
    good: bool


class Sets(Strict):
    numbers: set[int] = Field(max_length=3)
    colors: frozenset[Color]


class Constrained(Strict):
    code: Annotated[str, StringConstraints(pattern=r"^[a-z]{2,4}-\d+$")]
    ratio: float = Field(gt=0, lt=1)
    fives: int = Field(multiple_of=5, ge=-20, le=20)
    price: Decimal = Field(max_digits=5, decimal_places=2)


class Times(Strict):
    at: datetime
    day: date
    hour: time
    span: timedelta


class Identities(Strict):
    id: UUID
    page: HttpUrl
    link: AnyUrl


class Maps(Strict):
    counts: dict[str, int] = Field(max_length=2)
    colors: dict[Color, bool]
    named: dict[Annotated[str, StringConstraints(pattern="^k")], bool] = Field(max_length=2)
    short: dict[Annotated[str, StringConstraints(min_length=1, max_length=3)], bool] = Field(max_length=2)
    ids: dict[UUID, bool] = Field(max_length=1)


class Unions(Strict):
    pet: Annotated[Cat | Dog, Field(discriminator="kind")]
    other: Cat | Dog
    maybe: Cat | None = None
    color: Color | None = None
    literal: Literal["x", 1, True, None]


class Tree(Strict):
    value: bool
    left: Tree | None = None
    right: Tree | None = None


class Tuples(Strict):
    pair: tuple[bool, int]
    some: tuple[bool, ...] = Field(max_length=2)
    anything: Any
    secret: SecretStr = Field(max_length=3)


class Expression(Strict):
    op: Literal["and"]
    args: list[Expression | Cat] = Field(max_length=2)


class Cats(RootModel[list[Cat]]):
    pass


MODELS: list[type[BaseModel]] = [
    Sets,
    Constrained,
    Times,
    Identities,
    Maps,
    Unions,
    Tree,
    Tuples,
    Expression,
    Cats,
]
CASES += [{"name": f"pydantic {model.__name__}", "schema": model.model_json_schema()} for model in MODELS]
OBJECTS = [case for case in CASES if case["schema"].get("type") != "array"]


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    text = json.loads((DEMO / "tokenizer.json").read_text("utf-8"))
    ids = {token["content"]: token["id"] for token in text["added_tokens"]} | text["model"]["vocab"]
    manifest = SimpleNamespace(
        eos_token_ids=[ids["<eos>"], ids["<end_of_turn>"]],
        vocab_size=max(ids.values()) + 1,
        files={"tokenizer.json": SimpleNamespace(sha256=sha256_of(DEMO / "tokenizer.json"))},
    )
    return Grammars(DEMO, manifest)  # type: ignore[arg-type]


class Driver:
    """Chooses random tokens, and with every step rather those that may end the answer."""

    def __init__(self, grammars: Grammars) -> None:
        self._tokenizer = grammars._tokenizer
        texts = [self._tokenizer.decode_str([token]) for token in range(self._tokenizer.vocab_size)]
        self._closing = np.array([2 * len({*text} & {*'"}]'}) + len({*text} & {*"@.:-"}) for text in texts])

    def answer(self, constraint: Constraint, seed: int, limit: int = 1200) -> str | None:
        """None if the answer does not end in `limit` tokens."""
        random, processor, ids = np.random.default_rng(seed), constraint.processor(), []
        for step in range(limit):
            logits = random.normal(size=len(self._closing)) + 0.01 * step * self._closing
            logits[self._tokenizer.eos_token] += 3
            token = int(np.argmax(processor.process(logits.astype(np.float32))))
            if token == self._tokenizer.eos_token:
                return self._tokenizer.decode_bytes(ids).decode()
            ids.append(token)
            processor.accept(token)
        return None

    def answers(self, constraint: Constraint, count: int) -> Iterator[str]:
        found = [self.answer(constraint, seed) for seed in range(count)]
        assert any(text is not None for text in found), "no answer ended"
        return (text for text in found if text is not None)


@pytest.fixture(scope="module")
def driver(grammars: Grammars) -> Driver:
    return Driver(grammars)


def passes(constraint: Constraint, text: str) -> bool:
    if constraint.check is None:
        return True
    try:
        constraint.check(text)
    except AnswerSchemaError:
        return False
    return True


def oracle(case: dict[str, Any]) -> jsonschema.Validator:
    schema = case.get("equals", case["schema"])
    return ORACLES[case.get("draft", 2020)](schema)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_answers_of_a_schema(case: dict[str, Any], grammars: Grammars, driver: Driver) -> None:
    constraint, judge = grammars.json_of(case["schema"]), oracle(case)
    for text in driver.answers(constraint, 6):
        assert passes(constraint, text) == judge.is_valid(json.loads(text)), text


def test_the_check_says_what_jsonschema_says(grammars: Grammars, driver: Driver) -> None:
    """Of every answer, to every schema."""
    answers = {driver.answer(grammars.json_of(case["schema"]), 0) for case in CASES} - {None}
    for case in CASES:
        prepared, judge = prepare(case["schema"]), oracle(case)
        for text in answers:
            assert (prepared.first_violation(text) is None) == judge.is_valid(json.loads(text)), (case["name"], text)


@pytest.mark.parametrize("case", OBJECTS, ids=lambda case: case["name"])
def test_arguments_of_a_forced_call(case: dict[str, Any], grammars: Grammars, driver: Driver) -> None:
    tools = [function("other", {"type": "object"}), function("it", case["schema"])]
    constraint, judge = grammars.json_of(schema_of(select_tools(tools, "required").tools[1:])), oracle(case)
    for text in driver.answers(constraint, 3):
        call = json.loads(text)
        assert call.keys() == {"name", "arguments"} and call["name"] == "it" and isinstance(call["arguments"], dict)
        assert passes(constraint, text) == judge.is_valid(call["arguments"]), text


def function(name: str, parameters: dict[str, Any]) -> Tool:
    return Tool.model_validate({"type": "function", "function": {"name": name, "parameters": parameters}})


CHECKED = {
    "zod4 email pattern": {"pattern"},
    "zod 4 email": {"pattern"},
    "zod 4 duration": {"pattern"},
    "zod 4 hostname": {"pattern"},
    "zod 4 union": {"oneOf"},
    "NJsonSchema, draft 4": {"oneOf"},
    "minProperties of a map": {"minProperties", "maxProperties"},
    "if, not listed": {"if"},
    "contains": {"contains"},
    "not of a few integers": {"not"},
    "oneOf that overlaps": {"oneOf"},
    "64 bit bounds": {"minimum", "maximum"},
    "uniqueItems of booleans": {"uniqueItems"},
    "uniqueItems of an enum": {"uniqueItems"},
    "look-ahead of passwords": {"pattern"},
    "pydantic Sets": {"uniqueItems"},
    "pydantic Unions": {"oneOf"},
}


def test_every_other_schema_is_enforced(grammars: Grammars) -> None:
    assert {case["name"] for case in CASES if grammars.json_of(case["schema"]).check} == CHECKED.keys()
    left = {case["name"]: prepare(case["schema"], counts_properties=False).unenforced for case in CASES}
    assert {name: left[name] for name in CHECKED} == CHECKED


OBJECT = {"type": "object", "additionalProperties": False}
TREE = {
    **OBJECT,
    "properties": {"v": {"type": "boolean"}, "kids": {"type": "array", "items": {"$ref": "#"}, "maxItems": 1}},
    "required": ["v", "kids"],
}
NESTED = '{"name":"f","arguments":{"v":true,"kids":[{"name":"f","arguments":{"v":true,"kids":[]}}]}}'
GOOD = '{"name":"f","arguments":{"v":true,"kids":[{"v":true,"kids":[]}]}}'


def accepts(grammars: Grammars, schema: Any, text: str) -> bool:
    grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides={"whitespace_flexible": False})
    matcher = LLMatcher(grammars._tokenizer, grammar, log_level=0)
    ids = grammars._tokenizer.tokenize_str(text)
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


def test_a_reference_to_the_root_stays_in_the_parameters(grammars: Grammars) -> None:
    """Put into a call as it is, "#" is the call: llguidance then wants calls in the arguments."""
    call = {**OBJECT, "properties": {"name": {"const": "f"}, "arguments": TREE}, "required": ["name", "arguments"]}
    assert accepts(grammars, call, NESTED) and not accepts(grammars, call, GOOD)
    prepared = prepare(schema_of([function("f", TREE)])).grammar
    assert accepts(grammars, prepared, GOOD) and not accepts(grammars, prepared, NESTED)


def test_each_embedded_schema_has_definitions_of_its_own(grammars: Grammars, driver: Driver) -> None:
    def of(kind: str) -> dict[str, Any]:
        return {"$defs": {"x": {"type": kind}}, **OBJECT, "properties": {"a": {"$ref": "#/$defs/x"}}, "required": ["a"]}

    schema = {
        **OBJECT,
        "properties": {n: embed(of(n), n) for n in ("null", "boolean")},
        "required": ["null", "boolean"],
    }
    for text in driver.answers(grammars.json_of(schema), 3):
        assert re.fullmatch(r'{"null":{"a":null},"boolean":{"a":(true|false)}}', text)


def test_tools_with_the_same_id_have_definitions_of_their_own(grammars: Grammars, driver: Driver) -> None:
    def tool(name: str, kind: str) -> Tool:
        part = {"$id": "https://example.com/a", "$defs": {"x": {"type": kind}}}
        return function(name, part | {"properties": {"a": {"$ref": "#/$defs/x"}}, **OBJECT, "required": ["a"]})

    schema = schema_of([tool("f", "null"), tool("g", "boolean")])
    for text in driver.answers(grammars.json_of(schema), 8):
        assert re.fullmatch(r'{"name":("f","arguments":{"a":null}|"g","arguments":{"a":(true|false)})}', text)


def test_a_name_with_escapes_cannot_repeat_a_property(grammars: Grammars) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": {"type": "string"}}
    text = '{"a":1,"\\u0061":"x"}'
    assert accepts(grammars, schema, text)
    processor = grammars.json_of(schema).processor()
    for token in grammars._tokenizer.tokenize_str(text):
        allowed = processor.process(np.zeros(grammars._tokenizer.vocab_size, np.float32))
        if allowed[token] == -np.inf:
            return
        processor.accept(token)
    pytest.fail(f"{text} was accepted")


def of(**keywords: Any) -> dict[str, Any]:
    return {**OBJECT, "properties": {"a": keywords}, "required": ["a"]}


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "null"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


def chain(count: int) -> dict[str, Any]:
    defs: dict[str, Any] = {f"d{i}": {"type": "array", "items": {"$ref": f"#/$defs/d{i + 1}"}} for i in range(count)}
    return {"$defs": defs | {f"d{count}": {"type": "null"}}, "$ref": "#/$defs/d0"}


CYCLIC: dict[str, Any] = {"type": "array"}
CYCLIC["items"] = CYCLIC


@pytest.mark.parametrize(
    ("schema", "told"),
    [
        (False, "No value matches this JSON schema"),
        (3, "# must be a schema: an object, true or false"),
        (
            {**OBJECT, "properties": {}, "required": ["z"]},
            "required has 'z', which additionalProperties forbids; add this name to properties",
        ),
        (of(**{"$ref": "#/$defs/x"}), "$ref at #/properties/a/$ref leads to '#/$defs/x', which is not in this schema"),
        (of(**{"$ref": "https://example.com/x.json"}), "put that schema into $defs"),
        (of(**{"$ref": "http://["}), "put that schema into $defs"),
        ({"$ref": "#"}, "$ref in the schema at # leads back to itself"),
        ({"anyOf": [{"$ref": "#"}, {"type": "null"}]}, "leads back to itself"),
        (
            {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
            "make the property with the $ref optional, or allow null",
        ),
        ({"type": "array", "items": {"$ref": "#"}, "minItems": 1}, "No value of the schema at # ever ends"),
        (of(type="STRING"), "#/properties/a/type has the unknown type 'STRING'; write one of null, boolean"),
        (of(pattern="(?<=a)b"), "the pattern at #/properties/a/pattern: look-behind is not supported"),
        (of(pattern="^(a)\\1$"), "backreferences are not supported"),
        (of(pattern="\\bfoo"), "\\b and \\B are not supported; name the characters before and after the word"),
        (of(pattern="^((?=a)b)*$"), "look-around in a repeated group is not supported"),
        (of(pattern="(a"), "unclosed group"),
        (of(pattern="a\\"), "it ends in the middle"),
        (of(pattern="^(a{1000}){1000}$"), "repetitions multiply to more than 10000"),
        (of(type="integer", minimum=3, maximum=1), "remove one of the keywords that contradict each other"),
        ({"allOf": [{"type": "string"}, {"type": "integer"}]}, "remove one of the keywords that contradict each other"),
        (
            {"patternProperties": {"^a": {"type": "null"}, "b$": False}},
            "write patterns that cannot match the same name",
        ),
        ({"patternProperties": {"^(?!a)": {}}}, "#/patternProperties has the name '^(?!a)' with look-around"),
        ({"anyOf": [{}], "unevaluatedProperties": False}, "write additionalProperties in each branch"),
        ({"contains": {}, "unevaluatedItems": False}, "unevaluatedItems stands beside"),
        (of(multipleOf=0), "#/properties/a/multipleOf must be above 0"),
        (of(minLength=-1), "#/properties/a/minLength must be a whole number from 0 on"),
        (of(enum="a"), "#/properties/a/enum must be a list"),
        (of(enum=[float("nan")]), "is not supported"),
        (nested(200), "nests deeper than 100 levels"),
        (CYCLIC, "nests deeper than 100 levels"),
        (chain(600), "refers to more than 500 schemas"),
        ({"enum": [*range(25_000)]}, "more than 10,000 values"),
        ({"type": "object", "required": [f"p{i}" for i in range(2001)]}, "more than 2,000 names"),
        ({"properties": {f"p{i}": {} for i in range(25_000)}}, "more than 2,000 names"),
        ({"patternProperties": {f"^p{i}$": {} for i in range(101)}}, "more than 100 patternProperties"),
        ({"type": "object", "properties": {f"p{i}": {"type": "null"} for i in range(1500)}}, "send a smaller one"),
    ],
)
def test_refused_with_what_to_write_instead(schema: Any, told: str, grammars: Grammars) -> None:
    with pytest.raises(OptionError, match=re.escape(told)) as caught:
        grammars.json_of(schema)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


def test_a_long_chain_of_definitions(grammars: Grammars, driver: Driver) -> None:
    assert grammars.json_of(chain(400)).check is None


@pytest.mark.parametrize(
    ("schema", "text", "told"),
    [
        (
            of(type="array", items={"type": "integer"}, uniqueItems=True),
            '{"a":[1,2,1]}',
            "uniqueItems of the JSON schema at /a",
        ),
        (of(type="array", contains={"const": 1}), '{"a":[2]}', "contains of the JSON schema at /a"),
        (of(type="string", pattern="^(?!x)"), '{"a":"xy"}', "pattern of the JSON schema at /a"),
        (of(type="string", **{"not": {"const": "x"}}), '{"a":"x"}', "not of the JSON schema at /a"),
        ({"minProperties": 2}, '{"a":1,"a":2}', "minProperties of the JSON schema;"),
        (of(minimum=2**63), '{"a":9223372036854775807}', "minimum of the JSON schema at /a"),
        (of(oneOf=[{"type": "integer"}, {"minimum": 0}]), '{"a":1}', "oneOf of the JSON schema at /a"),
        ({"oneOf": [{}, {}]}, '{"a":', "not complete JSON"),
        ({"oneOf": [{}, {}]}, "[" * 100_000, "nests too deeply"),
        ({"oneOf": [{}, {}]}, "1e99999999999999999999", "a number is out of range"),
    ],
)
def test_what_breaks_after_generation_is_named(schema: Any, text: str, told: str, grammars: Grammars) -> None:
    check = grammars.json_of(schema).check
    assert check is not None
    with pytest.raises(AnswerSchemaError, match=re.escape(told)):
        check(text)


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"multipleOf": 0.01, "not": {"const": 1}}, "0.07", "1.0"),
        ({"uniqueItems": True}, "[1,true,[],{}]", "[1,1.0]"),
        ({"uniqueItems": True}, '[{"a":1,"b":2},{"a":1}]', '[{"a":1,"b":2},{"b":2,"a":1}]'),
        ({"not": {"multipleOf": 0.5}}, "1e-400", "1e400"),
        ({"not": {"pattern": "^(a|a)*$"}}, json.dumps("a" * 5000 + "b"), json.dumps("a" * 5000)),
    ],
)
def test_the_check_counts_exactly_and_in_time(schema: Any, good: str, bad: str, grammars: Grammars) -> None:
    constraint = grammars.json_of(schema)
    assert passes(constraint, good) and not passes(constraint, bad)


PATTERNS = [
    r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$",
    r"^(?!\.)(?!.*\.\.)[a-z.]+$",
    r"^P(?:(\d+W)|(?!.*W)(?=\d|T\d)(\d+Y)?(T(?=\d)(\d+H)?)?)$",
    r"(?=a)ab|b(?!c)",
    r"^(?:a(?=b)|b)?b?$",
    r"a(?=b$)",
    r"x|^(?!a)b$",
    r"^(?=.*\d)(?=.*[a-z]).{2,4}$",
    r"[)(]\(a[^\]b]",
]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("whole", [False, True])
def test_look_ahead_matches_what_re_matches(pattern: str, whole: bool) -> None:
    random = np.random.default_rng(0)
    found = Pattern(pattern, whole=whole)
    expected = re.compile(pattern)
    for _ in range(200):
        text = "".join(random.choice([*"abc1.PTWYH-+()]x"], size=random.integers(5)))
        assert found.matches(text) == bool(expected.fullmatch(text) if whole else expected.search(text)), text


@pytest.mark.parametrize(
    "pattern", ["[a-c]{2,4}", "^(yes|no)$", "yes|no", r"\d{3}-\d{4}", "(?!yes)(yes|no|maybe)", "a/b", ""]
)
def test_a_regular_expression_matches_the_whole_answer(pattern: str, grammars: Grammars, driver: Driver) -> None:
    constraint = grammars.regex_of(pattern)
    for text in driver.answers(constraint, 6):
        assert passes(constraint, text) == bool(re.fullmatch(pattern, text, re.ASCII)), text


@pytest.mark.parametrize("choices", [["a", "ab"], ["x.y", "a\\b", '"q"', "new\nline", "é😀", "a-b c", "c|d", "/"]])
def test_a_choice_is_one_of_the_texts(choices: list[str], grammars: Grammars, driver: Driver) -> None:
    answers = {*driver.answers(grammars.choice_of(choices), 40)}
    assert answers <= {*choices} and len(answers) > 1


GBNF = r"""
root   ::= object
value  ::= object | array | string | number | ("true" | "false" | "null") ws
object ::=
  "{" ws (
            string ":" ws value
    ("," ws string ":" ws value)*
  )? "}" ws
array  ::= "[" ws ( value ("," ws value)* )? "]" ws
string ::=
  "\"" (
    [^"\\\x7F\x00-\x1F] |
    "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4}) # escapes
  )* "\"" ws
number ::= ("-"? ([0-9] | [1-9] [0-9]{0,15})) ("." [0-9]+)? ([eE] [-+]? [0-9] [1-9]{0,15})? ws
ws ::= | " " | "\n" [ \t]{0,20}
"""


@pytest.mark.parametrize(
    ("grammar", "expected"),
    [
        ('start: "a" | "b"', "a|b"),
        ('?start: x\nx: "1".."3"', "[1-3]"),
        ('start: %json {"type": "boolean"}', "true|false"),
        ('root ::= "yes" | "no"', "yes|no"),
        ('root::="\\u00e9" [à-ü]', "é[à-ü]"),
        (GBNF, r"(?s)\{.*\}\s*"),
    ],
)
def test_answers_of_a_grammar(grammar: str, expected: str, grammars: Grammars, driver: Driver) -> None:
    for text in driver.answers(grammars.lark_of(grammar), 4):
        assert re.fullmatch(expected, text), text


@pytest.mark.parametrize(
    ("kind", "argument", "told"),
    [
        ("regex_of", "(a", "This regular expression is not supported: unclosed group"),
        ("regex_of", "a^b", "This regular expression is not supported: "),
        ("regex_of", "(a{1000}){1000}", "repetitions multiply to more than 10000"),
        ("choice_of", [], "between 1 and 10000 texts"),
        ("choice_of", [""], "between 1 and 10000 texts"),
        ("lark_of", "", "This grammar is not supported: Empty grammar"),
        ("lark_of", "start: x", 'unknown name: "x"'),
        ("lark_of", 'start: "a" start', "This grammar is not supported"),
        ("lark_of", 'start: start "a"', "This grammar is not supported"),
        ("lark_of", "start: NO\nNO: /a/ & /b/", "This grammar is not supported"),
        ("lark_of", "start: " + "(" * 200 + '"a"' + ")" * 200, "too deeply nested"),
        ("lark_of", "root ::= foo", "This GBNF grammar is not supported: Rule 'foo' not found"),
        ("lark_of", "root ::= " + "(" * 5000 + '"a"' + ")" * 5000, "This GBNF grammar is not supported"),
        (
            "lark_of",
            "start: r0\n" + "\n".join(f"r{i}: r{i + 1}" for i in range(3000)),
            "500 rules and 32768 characters",
        ),
    ],
)
def test_other_grammars_are_refused(kind: str, argument: Any, told: str, grammars: Grammars) -> None:
    with pytest.raises(OptionError, match=re.escape(told)) as caught:
        getattr(grammars, kind)(argument)
    assert "\n" not in str(caught.value)


def test_a_grammar_that_grows_too_complex_fails_its_answer(grammars: Grammars, driver: Driver) -> None:
    constraint = grammars.lark_of("start: H T\nH: /[xy]{90}z/\nT: /(?:a?){900}a{900}/")
    with pytest.raises(OptionError, match="became too complex during the answer"):
        driver.answer(constraint, 0)
