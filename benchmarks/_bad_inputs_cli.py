"""Odd inputs for the two commands of the terminal, each with what it must come to: a list for programs that replay it.

A case is a small function that makes its files in a scratch folder and gives the command line, without `--out`, which
who replays adds. It ends in one of two ways: refused (exit code 2, one line on standard error that holds the expected
texts, nothing left where `--out` points), or right (exit code 0, and the case's own check of the results is true).
The models are the one that comes along, whole or damaged.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

SHIPPED = Path(str(files("subspace_lab"))) / "assets" / "tiny_decoder"
QUICK = ["--steps", "1", "--samples", "20", "--max-new-tokens", "1", "--held-out", "0", "--layers", "0"]
SEARCH = ["--layers", "1", "--steps", "1", "--pairs", "20", "--dev-pairs", "20", "--test-pairs", "20", "--no-twin",
          "--method", "PCA", "--rank", "2", "--positions", "last"]  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One odd input.

    Attributes:
        name: of the case.
        kind: a number or letter for the kind of input it is.
        make: writes what it needs into a folder, and gives the arguments of the command.
        refused: texts that the one line of the refusal holds, in any case of letters; None where the input is fine.
        right: told the folder of the results, whether they are right; for inputs that are fine.
    """

    name: str
    kind: int
    make: Callable[[Path], list[str]]
    refused: tuple[str, ...] | None = None
    right: Callable[[Path], bool] | None = None


# --- data files ---------------------------------------------------------------------------------------------


def _file(name: str, content: bytes | str, *options: str) -> Callable[[Path], list[str]]:
    def make(folder: Path) -> list[str]:
        path = folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return ["finetune", "--data", str(path), *QUICK, *options]

    return make


def _answers(*expected: str, of: str = "answer") -> Callable[[Path], bool]:
    def right(out: Path) -> bool:
        samples = json.loads((out / "results.json").read_text(encoding="utf-8"))["samples"]
        return [one[of] for one in samples] == list(expected)

    return right


def _classes(*expected: str) -> Callable[[Path], bool]:
    def right(out: Path) -> bool:
        found = json.loads((out / "results.json").read_text(encoding="utf-8"))["classes"]
        return list(found.values()) == list(expected)

    return right


def _parquet(columns: Callable[[], dict[str, Any]]) -> Callable[[Path], list[str]]:
    def make(folder: Path) -> list[str]:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table(columns()), folder / "rows.parquet")
        return ["finetune", "--data", str(folder / "rows.parquet"), *QUICK]

    return make


def _lines(*rows: Any) -> str:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


def _pair(answer: str) -> str:
    """A line of JSON with this answer, which is written as it stands."""
    return f'{{"prompt": "the price is", "answer": {answer}}}'


def _labels(*labels: str) -> str:
    """Lines of JSON with these labels, which are written as they stand."""
    return _lines(*(f'{{"text": "dollars {i}", "label": {label}}}' for i, label in enumerate(labels)))


def _table(header: str, *rows: str, end: str = "\n") -> str:
    return "".join(one + end for one in (header, *rows))


def _talk(*messages: Any) -> str:
    return _lines({"messages": list(messages)})


CSV = "prompt,answer"


def _csv_cases() -> Iterator[Case]:
    refused: list[tuple[str, bytes | str, tuple[str, ...]]] = [
        ("a comma more in all rows", _table(CSV, "a, b,c", "d, e,f"), ("line 2", "3 cells", "header 2", "quotes")),
        ("a comma more in one row", _table(CSV, "a,b", "d, e,f"), ("line 3", "3 cells")),
        ("a comma more at the end of all rows", _table(CSV, "a,b,", "c,d,"), ("line 2", "3 cells")),
        ("a cell too few", _table(CSV, "a,b", "c"), ("line 3", "1 cells")),
        ("a column of numbers that the header lacks", _table(CSV, "0,a,b", "1,c,d"), ("line 2", "3 cells")),
        ("a column named twice", _table("prompt,answer,answer", "a,b,c"), ("line 1", "'answer' twice")),
        ("a column of no use named twice", _table("prompt,answer,x,x", "a,b,c,d"), ("line 1", "'x' twice")),
        ("semicolons", _table("prompt;answer", "a;b"), ("semicolons", "commas")),
        ("tabs", _table("prompt\tanswer", "a\tb"), ("tabs", "commas")),
        ("no header", _table("say,hi", "a,b"), ("columns", "'say'")),
        ("a header with spaces", _table("prompt, answer", "a,b"), ("' answer'",)),
        ("a header in capitals", _table("Prompt,Answer", "a,b"), ("'Prompt'",)),
        ("a header alone", _table(CSV), ("no examples",)),
        ("blank lines alone", "\n\n\n", ("no examples",)),
        ("a quote that is not closed", _table(CSV, 'a,"b', "c,d"), ("line 2", "never closed")),
        ("text behind a quote", _table(CSV, '"a" b,c'), ("line 2", "CSV")),
        ("an empty cell", _table(CSV, "a,b", "c,"), ("line 3", "''", "'answer'")),
        ("a cell of spaces", _table(CSV, "a,b", "  ,d"), ("line 3", "'prompt'")),
        ("Latin-1", _table(CSV, "café,ja").encode("latin-1"), ("rows.csv", "line 2", "0xe9", "iconv")),
        ("Latin-1 further down", _table(CSV, "a,b", "a,b", "né,ja").encode("latin-1"), ("line 4", "ISO-8859-1")),
        ("UTF-16", _table(CSV, "a,b").encode("utf-16"), ("UTF-16", "iconv")),
        ("a spreadsheet", b"PK\x03\x04\x14\x00\x00\x00\x08\xff\xfe", ("spreadsheet",)),
        ("a compressed file", b"\x1f\x8b\x08\x00\xff\xfe", ("compressed",)),
        ("nothing", "", ("is empty",)),
        ("0/1 beside yes", _table("text,label", "a,0", "b,1", "c,yes"), ("line 4", "'yes'", "'0'")),
        ("1 beside 1.0", _table("text,label", "a,0", "b,1", "c,1.0"), ("line 4", "'1.0'")),
        ("1 beside 01", _table("text,label", "a,0", "b,1", "c,01"), ("line 4", "'01'", "'1'")),
        ("labels that differ by a space", _table("text,label", "a,no", "b,yes", "c,yes "), ("line 4", "'yes '")),
        ("one class", _table("text,label", "a,x", "b,x"), ("two classes",)),
        ("an empty label", _table("text,label", "a,x", "b,"), ("line 3", "'label'")),
        ("both kinds of columns", _table("prompt,answer,text,label", "a,b,c,d"), ("more than one",)),
        ("messages in a cell", _table("messages", '"[{}]"'), ("line 2", "no conversation")),
    ]
    for name, content, parts in refused:
        yield Case(f"CSV: {name}", 1, _file("rows.csv", content), parts)
    right: list[tuple[str, str, Callable[[Path], bool]]] = [
        ("a mark of the byte order", "\ufeff" + _table(CSV, "a,b"), _answers("b")),
        ("ends of lines as Windows has them", _table(CSV, "a,b", "c,d", end="\r\n"), _answers("b", "d")),
        ("ends of lines as old Macs have them", _table(CSV, "a,b", "c,d", end="\r"), _answers("b", "d")),
        ("blank lines", _table(CSV, "", "a,b", "", "c,d", ""), _answers("b", "d")),
        ("quoted commas", _table(CSV, 'a,"b, c"'), _answers("b, c")),
        ("quoted ends of lines", _table(CSV, 'a,"b\nc"', "d,e"), _answers("b\nc", "e")),
        ("doubled quotes", _table(CSV, 'a,"say ""b"""'), _answers('say "b"')),
        ("a quote within a text", _table(CSV, 'a,5" b'), _answers('5" b')),
        ("a long cell", _table(CSV, f"a,{'b ' * 70000}b"), lambda out: (out / "results.json").is_file()),
        ("numbers", _table(CSV, "a,007", "b,1e5", "c,4", "d,2.50"), _answers("007", "1e5", "4", "2.50")),
        ("words for nothing", _table(CSV, "a,None", "b,nan", "c,NA"), _answers("None", "nan", "NA")),
        (
            "dates",
            _table(CSV, "a,2024-05-01", "b,2024-05-01T10:00Z"),
            _answers("2024-05-01", "2024-05-01T10:00Z"),
        ),
        ("a separator of lines that is none", _table(CSV, "a,b\u2028c", "d,e"), _answers("b\u2028c", "e")),
        ("spaces around texts", _table(CSV, "a, b "), _answers(" b ")),
        ("columns of no use", _table("id,prompt,answer", "1,a,b"), _answers("b")),
        ("labels of numbers", _table("text,label", "a,10", "b,2"), _classes("2", "10")),
    ]
    for name, content, check in right:
        yield Case(f"CSV: {name}", 1, _file("rows.csv", content), right=check)


def _json_cases() -> Iterator[Case]:
    user, reply = {"role": "user", "content": "dollars"}, {"role": "assistant", "content": "dollars"}
    refused: list[tuple[str, str, bytes | str, tuple[str, ...]]] = [
        ("NaN", ".jsonl", _lines(_pair('"x"'), _pair("NaN")), ("line 2", "NaN")),
        ("infinity", ".jsonl", _lines(_pair("-Infinity")), ("line 1", "-Infinity")),
        ("NaN in a list", ".json", f"[{_pair('NaN')}]", ("line 1", "NaN")),
        ("a key twice", ".jsonl", '{"prompt": "a", "answer": "b", "answer": "c"}\n', ("line 1", "'answer' twice")),
        ("half a character", ".jsonl", _lines(_pair('"\\ud83d"')), ("line 1", "half of a character")),
        ("a broken line", ".jsonl", _lines(_pair('"x"'), '{"prompt": "a", "ans'), ("line 2", "not JSON")),
        ("a list in a line", ".jsonl", _lines(_pair('"x"'), "[1]"), ("line 2", "object")),
        ("null in a line", ".jsonl", _lines("null"), ("line 1", "object")),
        ("two objects in a line", ".jsonl", _pair("1") + _pair("2"), ("line 1", "Extra data")),
        ("nesting without end", ".jsonl", "[" * 100_000, ("rows.jsonl", "deep")),
        ("nesting without end in a list", ".json", "[" * 100_000, ("rows.json", "deep")),
        ("a list that is not closed", ".json", f"[{_pair('1')}", ("not JSON",)),
        ("no comma between", ".json", f"[{_pair('1')} {_pair('2')}]", ("not JSON",)),
        ("a comma at the end", ".json", f"[{_pair('1')},]", ("not JSON",)),
        ("something behind the list", ".json", f"[{_pair('1')}] 2", ("not JSON",)),
        ("rows under a key", ".json", f'{{"data": [{_pair("1")}]}}', ("'data'", "list of objects")),
        ("columns as lists", ".json", '{"prompt": ["a"], "answer": ["b"]}', ("list of objects",)),
        ("a number alone", ".json", "7", ("object",)),
        ("an empty list", ".json", "[]", ("no examples",)),
        ("a null answer", ".jsonl", _lines(_pair('"x"'), _pair("null")), ("line 2", "None", "'answer'")),
        ("a truth value as answer", ".jsonl", _lines(_pair("true")), ("line 1", "True", "'answer'")),
        ("a list as answer", ".jsonl", _lines(_pair('["x"]')), ("line 1", "'answer'")),
        ("an object as prompt", ".jsonl", '{"prompt": {"a": 1}, "answer": "b"}\n', ("line 1", "'prompt'")),
        ("Latin-1", ".jsonl", _lines(_pair('"é"')).encode("latin-1"), ("line 1", "iconv")),
        ("0/1 beside yes", ".jsonl", _labels("0", "1", '"yes"'), ("line 3", "'yes'", "'0'")),
        ("0/1 beside true", ".jsonl", _labels("0", "1", "true"), ("line 3", "'True'")),
        ("half a label", ".jsonl", _labels("0.5", "1"), ("line 1", "0.5", "whole number")),
        ("a label beyond all numbers", ".jsonl", _labels("1e999", "1"), ("line 1", "'label'")),
        ("a null label", ".jsonl", _labels("0", "null"), ("line 2", "'label'")),
        ("messages without role", ".jsonl", _talk({"content": "hi"}), ("line 1", "role")),
        ("a role that is no text", ".jsonl", _talk({"role": 1, "content": "hi"}), ("line 1", "role")),
        ("a message without content", ".jsonl", _talk({"role": "user"}), ("line 1", "content")),
        ("a message with a truth value", ".jsonl", _talk({"role": "user", "content": True}), ("line 1", "content")),
        ("messages as text", ".jsonl", _lines({"messages": "hi"}), ("line 1", "conversation")),
        ("no messages", ".jsonl", _lines({"messages": []}), ("line 1", "conversation")),
        ("a tokenizer without template", ".jsonl", _talk(user, reply), ("template",)),
        ("a number beyond all", ".jsonl", _talk({**user, "n": "1"}, reply).replace('"1"', "1e999"),
         ("line 1", "too large")),
    ]  # fmt: skip
    for name, kind, content, parts in refused:
        yield Case(f"JSON: {name}", 1, _file(f"rows{kind}", content), parts)
    right: list[tuple[str, str, str, Callable[[Path], bool]]] = [
        ("4 beside 2.5", ".jsonl", _lines(_pair("4"), _pair("2.5")), _answers("4", "2.5")),
        ("4 beside 2.5 in a list", ".json", f"[{_pair('4')},\n{_pair('2.5')}]", _answers("4", "2.5")),
        ("twenty digits", ".jsonl", _lines(_pair("12345678901234567890")), _answers("12345678901234567890")),
        ("a thousand digits", ".jsonl", _lines(_pair("7" * 5000)), lambda out: (out / "results.json").is_file()),
        ("digits behind the point", ".jsonl", _lines(_pair("2.50"), _pair("1e3")), _answers("2.50", "1e3")),
        ("minus zero", ".jsonl", _lines(_pair("-0"), _pair("-0.0")), _answers("-0", "-0.0")),
        ("a number beside text", ".jsonl", _lines(_pair("4"), _pair('"four"')), _answers("4", "four")),
        ("dates", ".jsonl", _lines(_pair('"2024-05-01"')), _answers("2024-05-01")),
        ("a mark of the byte order", ".jsonl", "\ufeff" + _lines(_pair('"b"')), _answers("b")),
        ("blank lines", ".jsonl", f"\n{_pair('1')}\n\n{_pair('2')}\n\n", _answers("1", "2")),
        ("ends of lines as Windows has them", ".jsonl", f"{_pair('1')}\r\n{_pair('2')}\r\n", _answers("1", "2")),
        ("a separator of lines that is none", ".jsonl", _lines(_pair('"b\u2028c"')), _answers("b\u2028c")),
        ("a list in a .jsonl file", ".jsonl", f"[{_pair('1')},\n{_pair('2')}]", _answers("1", "2")),
        ("lines in a .json file", ".json", _lines(_pair("1"), _pair("2")), _answers("1", "2")),
        ("one object over several lines", ".json", '{\n"prompt": "a",\n"answer": "b"\n}', _answers("b")),
        ("keys that differ", ".jsonl", _lines({"prompt": "a", "answer": "b", "x": 1}, {"prompt": "c", "answer": "d"}),
         _answers("b", "d")),
        ("1 and 1.0 as labels", ".jsonl", _labels("0", "1", "1.0"), _classes("0", "1")),
        ("numbers as labels", ".jsonl", _labels("10", "2"), _classes("2", "10")),
        ("0 beside its text", ".jsonl", _labels("0", '"0"', "1"), _classes("0", "1")),
        ("truth values as labels", ".jsonl", _labels("true", "false"), _classes("False", "True")),
    ]  # fmt: skip
    for name, kind, content, check in right:
        yield Case(f"JSON: {name}", 1, _file(f"rows{kind}", content), right=check)


def _other_files() -> Iterator[Case]:
    def dates() -> dict[str, Any]:
        import datetime

        return {"prompt": ["a"], "answer": [datetime.date(2024, 5, 1)]}

    yield Case("Parquet: whole numbers", 1, _parquet(lambda: {"prompt": ["a", "b"], "answer": [4, 2**60 + 1]}),
               right=_answers("4", str(2**60 + 1)))  # fmt: skip
    yield Case(
        "Parquet: fractions",
        1,
        _parquet(lambda: {"prompt": ["a", "b"], "answer": [4.0, 2.5]}),
        ("double", "'answer'"),
    )
    yield Case("Parquet: dates", 1, _parquet(dates), ("date32", "'answer'"))
    yield Case("Parquet: bytes", 1, _parquet(lambda: {"prompt": [b"a"], "answer": ["b"]}), ("binary", "'prompt'"))
    yield Case("Parquet: a missing answer", 1, _parquet(lambda: {"prompt": ["a", "b"], "answer": ["c", None]}),
               ("example 1", "None"))  # fmt: skip
    yield Case("Parquet: labels with a gap", 1, _parquet(lambda: {"text": ["a", "b", "c"], "label": [0.0, 1.0, None]}),
               ("example 2", "'label'"))  # fmt: skip
    yield Case("Parquet: no table", 1, _file("rows.parquet", b"PAR1 and no more"), ("cannot be read",))
    yield Case("a file of another kind", 1, _file("rows.txt", "hi"), (".jsonl", ".parquet"))
    yield Case("a file without a kind", 1, _file("rows", "hi"), (".jsonl",))
    yield Case("a kind in capitals", 1, _file("rows.CSV", _table(CSV, "a,b")), right=_answers("b"))
    yield Case("no file", 1, lambda folder: ["finetune", "--data", str(folder / "none.csv"), *QUICK], ("no file",))
    yield Case("a folder for a file", 1, lambda folder: ["finetune", "--data", str(folder), *QUICK], ("no file",))
    yield Case(
        "a name too long", 19, lambda folder: ["finetune", "--data", str(folder / ("x" * 300)), *QUICK], ("xxx",)
    )
    yield Case("the same row throughout", 1, _file("rows.jsonl", _lines(*[_pair("1")] * 8), "--held-out", "2"),
               ("8 examples are the same",))  # fmt: skip

    def apart(out: Path) -> bool:
        rows = json.loads((out / "results.json").read_text())["rows"]
        return rows["held_out"] == 4 and rows.get("repeated") == 8

    rows = [_pair(str(i // 2)) for i in range(16)]
    yield Case("every row twice", 1, _file("rows.jsonl", _lines(*rows), "--held-out", "4"), right=apart)


# --- models -------------------------------------------------------------------------------------------------


def _model(damage: Callable[[Path], Any], *options: str, command: str = "search") -> Callable[[Path], list[str]]:
    """A copy of the model that comes along, damaged."""

    def make(folder: Path) -> list[str]:
        model = folder / "model"
        shutil.copytree(SHIPPED, model)
        damage(model)
        if command == "search":
            return ["search", "--model", str(model), *SEARCH, *options]
        content = _labels("0", "1") if command == "classify" else _lines(_pair('"dollars"'), _pair('"from"'))
        return [*_file("rows.jsonl", content)(folder), "--model", str(model), *options]

    return make


def _config(**changed: Any) -> Callable[[Path], None]:
    def damage(model: Path) -> None:
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, **changed}))

    return damage


def _written(name: str, content: bytes | str) -> Callable[[Path], None]:
    return lambda model: (model / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def _halved(name: str) -> Callable[[Path], None]:
    def damage(model: Path) -> None:
        content = (model / name).read_bytes()
        (model / name).write_bytes(content[: len(content) // 2])

    return damage


def _without(part: str) -> Callable[[Path], None]:
    """The weights without those whose names hold a text."""

    def damage(model: Path) -> None:
        from safetensors.torch import load_file, save_file

        weights = load_file(model / "model.safetensors")
        kept = {name: tensor for name, tensor in weights.items() if part not in name}
        assert len(kept) < len(weights)
        save_file(kept, model / "model.safetensors", {"format": "pt"})

    return damage


def _removed(name: str) -> Callable[[Path], None]:
    return lambda model: (model / name).unlink()


def _own_code(model: Path) -> None:
    """A model whose code would leave a mark if it were run."""
    _config(model_type="mine", auto_map={"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.Model"})(model)
    (model / "mine.py").write_text(f"open({str(model / 'ran')!r}, 'w')\nraise SystemExit('it ran')\n")


def _model_cases() -> Iterator[Case]:
    loaded = "could not be loaded"
    lacks: list[tuple[str, Callable[[Path], None], tuple[str, ...]]] = [
        ("a layer is missing", _without("layers.2."), ("no weights of", "layers.2")),
        ("part of a layer is missing", _without("layers.1.mlp.up_proj"), ("no weights of", "layers.1")),
        ("the embedding is missing", _without("embed_tokens"), ("no weights of",)),
        ("the last norm is missing", _without("model.norm"), ("no weights of", "norm")),
        (
            "more layers in the configuration",
            _config(num_hidden_layers=6),
            ("no weights of", "layers.4", "layers.5"),
        ),
        ("fewer layers in the configuration", _config(num_hidden_layers=3), ("layers.3", "fewer layers")),
        ("another vocabulary", _config(vocab_size=400), ("400", "do not fit")),
        ("another width within", _config(intermediate_size=32), ("32", "do not fit")),
        (
            "another architecture",
            _config(model_type="gpt2", architectures=["GPT2LMHeadModel"]),
            ("no weights of",),
        ),
    ]
    for name, damage, parts in lacks:
        for command in ("search", "answer", "classify"):
            yield Case(f"model, {command}: {name}", 2, _model(damage, command=command), parts)
    broken: list[tuple[str, Callable[[Path], Any], tuple[str, ...]]] = [
        ("weights half written", _halved("model.safetensors"), (loaded,)),
        ("weights without content", _written("model.safetensors", ""), (loaded,)),
        ("weights that are none", _written("model.safetensors", "x" * 100), (loaded,)),
        ("weights with a header too long", _written("model.safetensors", b"\xff" * 16), (loaded,)),
        ("no weights", _removed("model.safetensors"), (loaded,)),
        ("a configuration that is a list", _written("config.json", "[]"), (loaded,)),
        ("a configuration that is null", _written("config.json", "null"), (loaded,)),
        ("a configuration that is a number", _written("config.json", "7"), (loaded,)),
        ("a configuration that is empty", _written("config.json", ""), (loaded,)),
        ("a configuration half written", _halved("config.json"), (loaded,)),
        ("a configuration in UTF-16", _written("config.json", b"\xff\xfe{\x00}\x00"), (loaded,)),
        ("no configuration", _removed("config.json"), ("config.json",)),
        ("no heads", _config(num_attention_heads=0), (loaded,)),
        ("negative heads", _config(num_attention_heads=-1), (loaded,)),
        ("heads as text", _config(num_attention_heads="four"), (loaded,)),
        ("no layers", _config(num_hidden_layers=0), ("no stack of transformer blocks",)),
        ("no width", _config(hidden_size=0), ("--model",)),
        ("a width that heads do not share", _config(hidden_size=63), ("--model",)),
        ("a padding token outside the vocabulary", _config(pad_token_id=10**6), (loaded,)),
        ("an activation that is unknown", _config(hidden_act="nothing"), (loaded,)),
        ("a model type that is unknown", _config(model_type="nothing"), (loaded, "nothing")),
        ("a model type that is a list", _config(model_type=[]), (loaded,)),
        ("a dtype that is unknown", _config(dtype="float7"), ("--model",)),
        ("a model that does not generate", _config(model_type="vit", architectures=["ViTModel"]), (loaded,)),
        ("no tokenizer", lambda model: [one.unlink() for one in model.glob("*token*")], (loaded,)),
        ("a tokenizer half written", _halved("tokenizer.json"), (loaded,)),
        ("a tokenizer that is a list", _written("tokenizer.json", "[]"), (loaded,)),
        ("settings of a tokenizer that are a list", _written("tokenizer_config.json", "[]"), (loaded,)),
    ]
    for name, damage, parts in broken:
        yield Case(f"model: {name}", 19, _model(damage), parts)
        if name in ("weights half written", "a configuration that is null", "no heads"):
            yield Case(f"model, classify: {name}", 19, _model(damage, command="classify"), parts)
    yield Case("model: code of its own", 14, _model(_own_code), ("--trust-remote-code",))
    yield Case(
        "model, classify: code of its own", 14, _model(_own_code, command="classify"), ("--trust-remote-code",)
    )


def _named(name: str) -> Callable[[Path], list[str]]:
    return lambda _: ["search", "--model", name, *SEARCH]


def _gguf(content: bytes) -> Callable[[Path], list[str]]:
    def make(folder: Path) -> list[str]:
        (folder / "model.gguf").write_bytes(content)
        return ["search", "--model", str(folder / "model.gguf"), *SEARCH]

    return make


def _name_cases() -> Iterator[Case]:
    for what, name in (("empty", ""), ("of spaces", "  "), ("too long", "x" * 5000), ("with two slashes", "a/b/c"),
                       ("that acts on the terminal", "a\x1b[31mb"), ("of no folder", "./none"),
                       ("of the parent", "..")):  # fmt: skip
        yield Case(f"a model's name, {what}", 19, _named(name), ("--model",))
    yield Case("GGUF: nothing", 2, _gguf(b""), ("--model",))
    yield Case("GGUF: no such format", 2, _gguf(b"no such thing" * 9), ("--model",))
    yield Case("GGUF: a header alone", 2, _gguf(b"GGUF\x03\x00\x00\x00" + bytes(16)), ("--model",))
    yield Case("GGUF: half a header", 2, _gguf(b"GGUF\x03"), ("--model",))
    yield Case(
        "GGUF: no such file",
        2,
        lambda folder: ["search", "--model", str(folder / "none.gguf"), *SEARCH],
        ("--model",),
    )
    yield Case("a file for a model", 19, _named(str(SHIPPED / "config.json")), ("is a file",))


# --- options ------------------------------------------------------------------------------------------------


def _searched(*options: str) -> Callable[[Path], list[str]]:
    return lambda _: ["search", *SEARCH, *options]


def _tuned(*options: str) -> Callable[[Path], list[str]]:
    return lambda folder: [*_file("rows.jsonl", _lines(_pair('"dollars"'), _pair('"from"')))(folder), *options]


def _option_cases() -> Iterator[Case]:
    digits = "1" * 26
    both: list[tuple[str, tuple[str, ...], tuple[str, ...]]] = [
        ("device meta", ("--device", "meta"), ("meta",)),
        ("device of no kind", ("--device", "abacus"), ("abacus",)),
        ("device that is not there", ("--device", "cuda:77"), ("cuda:77",)),
        ("device of another vendor", ("--device", "hpu"), ("hpu",)),
        ("device private", ("--device", "privateuseone"), ("privateuseone",)),
        ("device with a number too high", ("--device", "cpu:99999999999"), ("cpu:9999",)),
        ("26 digits as position", ("--positions", digits), (digits,)),
        ("26 digits from the end", ("--positions", f"-{digits}"), (digits,)),
        ("26 digits in a slice", ("--positions", f"{digits}:"), (digits,)),
        ("26 digits of a prefix", ("--positions", f"f{digits}[{digits}]"), ()),
        ("positions that are none", ("--positions", ",+,"), ("not understood",)),
        ("26 digits as layer", ("--layers", digits), (digits,)),
        ("a negative layer", ("--layers", "-1"), ("-1",)),
        ("layers that go backwards", ("--layers", "3-1"), ("3-1",)),
        ("26 digits of rank", ("--rank", digits), (digits,)),
        ("26 digits of seed", ("--seed", digits), (digits,)),
        ("a component that acts on the terminal", ("--component", "a\x1b]0;b\x07"), ("component", "block_output")),
        ("a component of a private kind", ("--component", "__class__.output"), ("__class__",)),
        ("steps beyond all", ("--steps", "-5"), ("-5",)),
        ("a rate that is none", ("--learning-rate", "nan"), ("nan",)),
        ("a rate without end", ("--learning-rate", "inf"), ("inf",)),
        ("memory of a negative size", ("--memory", "-1GiB"), ("-1GiB",)),
        ("memory of no unit", ("--memory", "8XB"), ("8XB",)),
        ("dtype of whole numbers", ("--dtype", "int64"), ("int64",)),
        ("dtype of no kind", ("--dtype", "float7"), ("float7",)),
    ]
    for name, options, parts in both:
        kind = 14 if "acts on the terminal" in name else 19
        yield Case(f"search: {name}", kind, _searched(*options), parts)
        yield Case(f"finetune: {name}", kind, _tuned(*options), parts)
    search: list[tuple[str, tuple[str, ...], tuple[str, ...]]] = [
        ("26 digits of pairs", ("--pairs", digits), (digits, "1,000,000")),
        ("no pairs", ("--test-pairs", "0"), ("0",)),
        ("a task of no name", ("--task", ""), ("price_tagging",)),
        ("a task that acts on the terminal", ("--task", "\x1b[2J"), ("price_tagging",)),
        ("a variable of no name", ("--variable", ""), ("above_lower",)),
        ("a method of the wrong class", ("--method", "Method"), ("RandomSubspace",)),
    ]
    for name, options, parts in search:
        kind = 14 if "acts on the terminal" in name else 19
        yield Case(f"search: {name}", kind, _searched(*options), parts)
    tuned: list[tuple[str, tuple[str, ...], tuple[str, ...]]] = [
        ("10 million positions, each with an edit", ("--positions", "f10000000+l1"), ()),
        ("a share held out that is all", ("--held-out", "1.0"), ("--held-out",)),
        ("a negative number held out", ("--held-out", "-1"), ("--held-out",)),
        ("26 digits held out", ("--held-out", digits), (digits,)),
        ("no samples and fewer", ("--samples", "-1"), ("--samples",)),
        ("batches of nothing", ("--batch-size", "0"), ("batch_size=0",)),
        ("a method of no name", ("--method", ""), ("LoReFT",)),
        ("a rank of nothing", ("--rank", "0"), ("rank=0",)),
    ]
    for name, options, parts in tuned:
        if "10 million" in name:
            yield Case(
                f"finetune: {name}", 14, _tuned(*options), right=lambda out: (out / "results.json").is_file()
            )
        else:
            yield Case(f"finetune: {name}", 19, _tuned(*options), parts)


def cases() -> list[Case]:
    """All of them, with names that differ."""
    made = (_csv_cases, _json_cases, _other_files, _model_cases, _name_cases, _option_cases)
    found = [case for each in made for case in each()]
    names: Sequence[str] = [case.name for case in found]
    assert len(set(names)) == len(names)
    return found
