"""The rules on one draft: what each turns down, and what it must let pass."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest

from selfinstruct.languages import LANGUAGES
from selfinstruct.quality.filters import RULES, first_failure, repair
from selfinstruct.records import Draft

CORPUS = Path(__file__).parents[2] / "shared" / "data" / "alpaca_52k.jsonl.gz"
EN, PT = LANGUAGES["en"], LANGUAGES["pt"]
LONG = " ".join(["word"] * 150)


def draft(instruction: str = "Name the capital of France.", input: str = "", output: str = "Paris it is.") -> Draft:
    return Draft(3, 1, instruction, input, output)


INSTRUCTIONS = [
    ("en", "length", "Write one poem", "Write one short poem"),
    ("en", "length", LONG + " more", LONG),
    ("en", "forbidden_word", "Describe the Image below in words.", "Describe the imagery of the poem."),
    ("en", "forbidden_word", "Which files does it need?", "Write the profile of a baker."),
    ("en", "forbidden_word", "Explain how to go to the moon.", "Explain how ergo today differs."),
    ("en", "forbidden_word", "Listen: what music is it?", "Explain what a musical is about."),
    ("en", "forbidden_word", "What does the map show?", "Write about maple trees in autumn."),
    ("en", "forbidden_start", "Write a program that adds two numbers.", "How does one write a program that adds?"),
    ("en", "punctuation_start", '"Hello there" is what kind of phrase?', "Is “hello there” a kind of phrase?"),
    ("en", "foreign_start", "É preciso responder com cuidado.", "Explain the French word élan."),
    ("pt", "foreign_start", "🙂 escreva uma frase curta", "É verdade que a água ferve a cem graus?"),
    ("pt", "foreign_start", "→ escreva uma frase curta", "¿Como se traduz “hola” para o português?"),
    ("pt", "forbidden_word", "Analise o gráfico de vendas abaixo.", "Analise a caligrafia do poema antigo."),
    ("pt", "forbidden_word", "Analise o GRAFICO de vendas abaixo.", "Escreva sobre o mapeamento genético."),
    ("pt", "forbidden_word", "Resuma o ficheiro em anexo.", "Explique como trabalha um fichário escolar."),
    ("pt", "forbidden_word", "Resuma os Ficheiros em anexo.", "Escreva a ficha de um livro."),
    ("pt", "forbidden_word", "Descreva as imagens da exposição.", "Descreva o imaginário do sertão."),
    ("pt", "forbidden_word", "Ouça a música e resuma.", "Conte a vida de um músico de rua."),
    ("pt", "forbidden_word", "Desenhe um mapa da cidade.", "Explique o que é um arquivista faz."),
    ("pt", "forbidden_word", "Vá para a cozinha e descreva.", "Explique como a criança vai para a escola."),
    ("pt", "forbidden_start", "Escreva um programa que soma números.", "Explique como se escreve um programa."),
]


@pytest.mark.parametrize(("code", "rule", "bad", "good"), INSTRUCTIONS)
def test_a_rule_on_instructions_turns_down_the_bad_and_not_the_good(code: str, rule: str, bad: str, good: str) -> None:
    assert RULES[rule](draft(bad), LANGUAGES[code])
    assert RULES[rule](draft(good), LANGUAGES[code]) == ""


@pytest.mark.parametrize(
    "output",
    ["", "<nooutput>", "No output", "N/A", "none.", "[No Input]", "NULL", "Sem saída", "Nada.", "Nenhuma", "无输出"],
)
def test_an_answer_that_is_none_is_turned_down(output: str) -> None:
    assert RULES["no_output"](draft(output=output), EN)


@pytest.mark.parametrize(
    "output",
    [
        "0",
        "No",
        "None of them is.",
        "Nothing compares to you",
        "No output was logged that day",
        "Nenhuma delas.",
        "Não",
    ],
)
def test_a_short_answer_that_answers_passes(output: str) -> None:
    assert RULES["no_output"](draft(output=output), EN) == ""


def test_an_answer_that_repeats_its_question_is_turned_down() -> None:
    assert RULES["echo"](draft("Say it again now", "", "Say it again now"), EN) == "the output is the instruction"
    assert RULES["echo"](draft("Mend this sentence now", "It is fine.", "It is fine."), EN) == "the output is the input"
    assert RULES["echo"](draft("Mend this sentence now", "It are fine.", "It is fine."), EN) == ""


@pytest.mark.parametrize(
    "text",
    [
        "Fine.\n##\n6. Instruction: Next",
        "6. Input:\nx",
        "Yes. 7. Output: no",
        "a\n###\nb",
        "a\n  ##  \nb",
        "**7. Instrução:** a",
        "7) **Saída:** b",
    ],
)
@pytest.mark.parametrize("field", ["instruction", "input", "output"])
def test_a_field_that_holds_the_next_task_is_turned_down(field: str, text: str) -> None:
    assert RULES["leak"](draft(**{field: text}), EN).startswith(field)


@pytest.mark.parametrize(
    "text",
    [
        "### Results\nfine",
        "# not a separator",
        "Input: 3\nOutput: 5",
        "Step 1. Inputs are read",
        "v1.2. Output: x",
        "a ## b",
        "#",
        "1. Instructions matter",
    ],
)
def test_headings_and_plain_labels_are_no_leak(text: str) -> None:
    assert RULES["leak"](draft(output=text), EN) == ""


@pytest.mark.parametrize(
    "output",
    [
        "The total cost of the order is $",
        "He said that he would come and",
        "There are three kinds of them: red, blue,",
        "The function is called with (",
        "```python\nprint(1)\n",
        "Say it:\n```\nx\n```\nand\n```\ny",
    ],
)
def test_an_answer_that_was_cut_is_turned_down(output: str) -> None:
    assert RULES["unfinished"](draft(output=output), EN)


@pytest.mark.parametrize(
    "output",
    [
        "20",
        "and",
        "The answer that he gave was no",
        "Words:\n- the\n- of\n- and",
        "Best regards and see you soon,\nAnn",
        "```python\nprint(1)\n```",
        "Dear all,\nthank you very much for this.\nSincerely,",
        "It costs about five US$",
        "The answer to the sum is 20",
        "O resultado da conta é 20",
        "A reunião é no dia 20",
    ],
)
def test_a_finished_answer_passes(output: str) -> None:
    assert RULES["unfinished"](draft(output=output), EN) == ""


def test_portuguese_answers_that_end_in_an_article_are_unfinished() -> None:
    assert RULES["unfinished"](draft(output="O rio nasce na serra e corre para a"), PT)
    assert RULES["unfinished"](draft(output="O rio nasce na serra e corre para lá"), PT) == ""


@pytest.mark.parametrize(
    "marker",
    [
        "<noinput>",
        "No Input",
        "noinput.",
        "[No input required]",
        "N/A",
        "None",
        "<sem entrada>",
        "Não há entrada.",
        "Não aplicável",
        "(vazio)",
        "Sem input.",
        "无输入",
    ],
)
def test_a_marker_for_no_input_becomes_no_input(marker: str) -> None:
    mended = repair(draft(input=marker))
    assert (mended.input, mended.repairs) == ("", ("no_input",))
    assert (mended.request_no, mended.item_no, mended.output) == (3, 1, "Paris it is.")


@pytest.mark.parametrize("text", ["", "None of these", "0", "No", "no input was given to the function"])
def test_an_input_that_says_something_stays(text: str) -> None:
    given = draft(input=text)
    assert repair(given) is given


def test_control_characters_go_and_line_breaks_stay() -> None:
    mended = repair(draft("Na\x00me the\x1b capital", "a\tb\nc", "\ufeffPa\x7fris\x08"))
    assert (mended.instruction, mended.input, mended.output) == ("Name the capital", "a\tb\nc", "Paris")
    assert mended.repairs == ("control_characters",)
    both = repair(draft(input="<no\x00input>"))
    assert (both.input, both.repairs) == ("", ("control_characters", "no_input"))


def test_an_instruction_of_control_characters_alone_is_turned_down_and_not_an_error() -> None:
    for text in ("\x00", "\ufeff\x01"):
        assert first_failure(repair(draft(text)), EN, tuple(RULES))[0] == "length"
    for name, rule in RULES.items():
        assert isinstance(rule(draft("", "", ""), EN), str), name


def test_rules_are_asked_in_the_order_that_is_given() -> None:
    bad = draft("Map it", "", "")
    assert first_failure(bad, EN, ("length", "no_output"))[0] == "length"
    assert first_failure(bad, EN, ("no_output", "length")) == ("no_output", "empty")
    assert first_failure(bad, EN, ()) == ("", "")


@pytest.mark.slow
@pytest.mark.skipif(not CORPUS.exists(), reason="the released 52K is not beside this checkout")
def test_the_rules_find_in_the_52k_what_was_counted_by_hand_and_nothing_else() -> None:
    with gzip.open(CORPUS, "rt", encoding="utf-8") as stream:
        rows = [json.loads(line) for line in stream]
    failures: Counter[str] = Counter()
    repairs: Counter[str] = Counter()
    for row in rows:
        mended = repair(draft(**row))
        repairs.update(mended.repairs)
        failures[first_failure(mended, EN, tuple(RULES))[0]] += 1
    assert failures == {"": 52_002 - 200, "leak": 38, "no_output": 90, "unfinished": 19, "echo": 53}
    assert repairs == {"no_input": 666, "control_characters": 2}
