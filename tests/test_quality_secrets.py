"""Secret-looking and personal text: what is found, what is not, and that looking for it is quick on any text."""

from __future__ import annotations

import json
import random
import string
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import selfinstruct
from selfinstruct.dataset import card, store
from selfinstruct.dataset.shards import write_shards
from selfinstruct.languages import LANGUAGES
from selfinstruct.quality import check_digits
from selfinstruct.quality.gate import Gate
from selfinstruct.quality.secrets import find, kinds, mask
from selfinstruct.records import Draft, Verdict
from selfinstruct.run.folder import run_folder
from selfinstruct.run.journal import FILE_NAME, Journal
from selfinstruct.run.writer import connect, get_meta, set_meta

ALNUM = string.ascii_letters + string.digits
HEX = "0456789bdef"  # without a, c and 1 to 3: what counts is an example


def made(length: int, alphabet: str = ALNUM) -> str:
    """A random text; keys are put together here so that no scanner takes this file for a leak."""
    return "".join(random.Random(length * 7 + len(alphabet)).choices(alphabet, k=length))


PEM = "-----BEGIN RSA {0}-----\n{1}\n{1}\nabc=\n-----END RSA {0}-----".format("PRIVATE KEY", made(64))
FOUND = [
    ("api_key", "sk-" + made(48)),
    ("api_key", "sk-proj-" + made(60)),
    ("api_key", "sk-ant-api03-" + made(80, ALNUM + "-_")),
    ("api_key", "AKIA" + made(16, "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567")),
    ("api_key", "ghp_" + made(36)),
    ("api_key", "github_pat_" + made(22) + "_" + made(59)),
    ("api_key", "glpat-" + made(20)),
    ("api_key", "xoxb-" + made(12, string.digits) + "-" + made(24)),
    ("api_key", "AIza" + made(35)),
    ("api_key", "hf_" + made(34)),
    ("api_key", "sk_live_" + made(24)),
    ("api_key", "npm_" + made(36)),
    ("api_key", "dapi" + made(32, HEX)),
    ("api_key", "shpat_" + made(32, HEX)),
    ("api_key", "ATATT3x" + made(180, ALNUM + "-_") + "=1A2B3C4D"),
    ("api_key", "r8_" + made(37)),
    ("api_key", "pplx-" + made(48)),
    ("api_key", "lin_api_" + made(40)),
    ("api_key", "secret_" + made(43)),
    ("api_key", "ntn_" + made(11, "7890") + made(35)),
    ("api_key", "sq0atp-" + made(22, ALNUM + "-_")),
    ("api_key", "SK" + made(32, HEX)),
    ("api_key", "key-" + made(32, HEX)),
    ("api_key", "dop_v1_" + made(64, HEX)),
    ("api_key", "doo_v1_" + made(64, HEX)),
    ("api_key", f"{made(10, '456789')}:AA{made(33)}"),
    ("api_key", f"https://api.telegram.org/bot{made(10, '456789')}:AA{made(33)}/getMe"),
    ("api_key", f"M{made(25)}.{made(6)}.{made(38)}"),
    ("api_key", f"https://discord.com/api/webhooks/{made(19, '456789')}/{made(68)}"),
    ("api_key", f"https://ptb.discordapp.com/api/v10/webhooks/{made(18, '456789')}/{made(68)}"),
    ("api_key", f"eyJ{made(30)}.eyJ{made(40)}.{made(43)}"),
    ("api_key", f"Authorization: Bearer <{made(40)}>".replace("<", "").replace(">", "")),
    ("api_key", f'"api_key": "{made(32)}"'),
    ("api_key", f"AWS_SECRET_ACCESS_KEY={made(40, ALNUM + '/+')}"),
    ("api_key", "const token = '550e8400-e29b-41d4-a716-446655440000';"),
    ("private_key", PEM),
    ("private_key", PEM.replace("\n", "\\n")),
    (
        "private_key",
        PEM.replace("RSA PRIVATE KEY", "PGP PRIVATE KEY BLOCK").replace("-----\n", "-----\nVersion: 1\n\n", 1),
    ),
    ("password", "postgres://app:k3yb0ardCat@db.internal:5432/main"),
    ("password", "Password: X78s0j^xgP"),
    ("password", "the password is SuperSecret123!"),
    ("password", "A senha é Trem7Bala9x."),
    ("password", "db_password = 'S3nh4-Forte'"),
    ("password", "DB_PASS='Vento7Sul'"),
    ("password", "pass: Vento7Sul"),
    ("password", '"dbpass": "Vento7Sul"'),
    ("password", "La contraseña es Vento7Sul."),
    ("password", "Contraseña: Vento7Sul"),
    ("password", "Authorization: Basic YW5hOlZlbnRvN1N1bA=="),
    ("password", 'headers = {"Authorization": "Basic YW5hOlZlbnRvN1N1bA=="}'),
    ("email", "Write to ana.silva+news@mail.gov.pt, please."),
    ("email", "<joão_souza@empresa.com.br>"),
    ("phone", "+351 916 284 113"),
    ("phone", "+55 11 98231-4407"),
    ("phone", "+44 (0)20 7183 8750"),
    ("phone", "+1-212-684-4700"),
    ("phone", "(732)830-9763"),
    ("phone", "502-294-8258"),
    ("phone", "(11) 98231-4407"),
    ("phone", "021 3456-2187"),
    ("phone", "(21)998762143"),
    ("phone", "(21) 998762143"),
    ("phone", "(21) 9 9876-2143"),
    ("phone", "00351 912 345 987"),
    ("phone", "0055 (21) 99876-2143"),
    ("phone", "tel: 00351912345987"),
    ("phone", "tlm 912 345 987"),
    ("phone", "teléfono: 912 345 987"),
    ("phone", "07911 284 113"),
    ("phone", "Telemóvel: 916 284 113"),
    ("phone", "my phone number is 2128675309"),
    ("credit_card", "4539 5787 6362 1486"),
    ("credit_card", "5425233430109903"),
    ("credit_card", "3714 496353 98399"),
    ("iban", "PT50 0035 0683 0000 0007 8431 1"),
    ("iban", "IBAN DE75512108001245126199 BIC"),
    ("ssn", "SSN 536-22-8745"),
    ("ssn", "SSN: 536 22 8745"),
    ("cpf", "529.982.247-25"),
    ("cpf", "CPF: 52998224725"),
    ("cnpj", "33.000.167/0001-01"),
    ("cpf", "cpf 52998224725"),
    ("cnpj", "CNPJ 33000167000101"),
    ("cnpj", "Cnpj: 12ABC34501DE35"),
    ("cnpj", "CNPJ 12.ABC.345/01DE-35"),
    ("nif", "NIF 501 964 843"),
    ("nif", "nif 501964843"),
    ("ip_address", "from 128.178.163.54 at noon"),
]

EXAMPLES = [
    ("api_key", "AKIA" + "IOSFODNN7EXAMPLE"),
    ("api_key", "aws_secret_access_key = wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"),
    ("api_key", "sk-1234567890abcdef1234567890abcdef"),
    ("api_key", "ghp_" + "x" * 36),
    ("api_key", "secret_key='abc123def456ghi789'"),
    ("password", "postgres://user:password@localhost/db"),
    ("password", 'password = "password123"'),
    ("password", "Authorization: Basic dXNlcjpwYXNzd29yZA=="),
    ("password", "Authorization: Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ=="),
    ("email", "john@example.com"),
    ("email", "nome.apelido@exemplo.com.br"),
    ("phone", "555-0123"),
    ("phone", "(555) 123-4567"),
    ("phone", "123-456-7890"),
    ("phone", "+1 212-555-0199"),
    ("phone", "07700 900123"),
    ("phone", "+44 20 7946 0018"),
    ("phone", "(11) 98765-4321"),
    ("phone", "Telemóvel: 912345678"),
    ("credit_card", "4111 1111 1111 1111"),
    ("credit_card", "378282246310005"),
    ("credit_card", "1234-5678-9012-3456"),
    ("iban", "GB29 NWBK 6016 1331 9268 19"),
    ("iban", "PT50 0002 0123 1234 5678 9015 5"),
    ("ssn", "123-45-6789"),
    ("ssn", "987-65-4321"),
    ("cpf", "123.456.789-09"),
    ("cpf", "CPF 111.111.111-11"),
    ("cnpj", "11.222.333/0001-81"),
    ("nif", "NIF: 123456789"),
]

NOTHING = [
    "",
    "The 52,002 rows took 1,234,567.89 s; 3.14159265358979, 2^64 = 18446744073709551616.",
    "Call 1-800-273-8255 or +1 (866) 123-9876, 112 or 911.",
    "Ligue 0800 729 0722; telefone: 0800 729 0722, telefone: 800 206 206, phone: 1-800-273-8255, tel 0808 800 5000",
    "+351 800 206 206, 00351 800 206 206, +55 800 729 0722, +44 800 316 2987, +44 (0)808 164 6000, +34 900 265 438",
    "0036000291452, 0045 1233 9876 5432, 00 45 12 33 98 76 54 19, 00351/912/345, tel 00351 800 206 206",
    "100-20-3000 units, f(12) 1990 2000, (12) 1990-2000, 00100000 01110011, 0012345678901",
    f"pwd: /{'home'}/ana1/work, pwd=/usr/local/lib64, PWD=~/work2/a, pwd: C:\\Users\\ana1",
    "the pass is A4B7C9, compass: N45E20, class: pass",
    "ftp://anonymous:guest@ftp.gov.pt, Authorization: Basic <base64 of 1:2>, Authorization: Basic authentication",
    "dapi, key-value, secret_santa_list_2024, SKU 4711, M.A. of 2020, www.discord.com/api/v10/webhooks/4711",
    "logo@2x.png, git@github.com:a/b, @ana, ana@mail, numpy@1.26.4, (at) the_end@",
    "4539578763621487 1234567812345670 3000400050006001",
    "192.168.1.1, 10.0.0.1, 127.0.0.1, 8.8.8.8, 203.0.113.7, 256.300.1.1, section 3.2.1.4, Chrome 86.0.4240.111",
    "sk-your-api-key-goes-in-this-place-1, sk-XXXXXXXXXXXXXXXXXXXXXXXX, class='sk-chase-dot-before-animation1'",
    "https://user:<password>@host, redis://${USER}:${PASSWORD}@host, password: <your-password-1>, pwd=******9a",
    "password = input('Password: '); token = tokenizer.next_token2(); api_key = os.environ['API_KEY_2']",
    "max_tokens = max_tokens_per_1_minute; the password is incorrect; token: Optional[str]; bearer of news",
    "-----BEGIN RSA PRIVATE KEY-----\n...\n-----END RSA PRIVATE KEY-----",
    "2021-02-25, 1939-1945, 12/06/1990, 10:30-11:45, ISBN 978-3-16-148410-0, 9780306406157, pages 100-200",
    "Binary 0110 1001 1010, matrix 200 300 4000, May 11 1990-1995, 912 345 678 habitantes, id 2128675309",
    "https://www.nytimes.com/2020/06/24/us/27121023.html and /photo-1511918984145-48de785d4c4d",
]

SURROUNDINGS = ("{}", "Olá!\n({})", "Here it is: {}\nThat is all, 12 words.")


@pytest.mark.parametrize(("kind", "text"), FOUND, ids=[f"{kind} {n}" for n, (kind, _) in enumerate(FOUND)])
def test_what_looks_secret_or_personal_is_found_in_any_surroundings(kind: str, text: str) -> None:
    for around in SURROUNDINGS:
        whole = around.format(text)
        assert kinds(whole) == (kind,), find(whole)
        hidden, seen = mask(whole)
        assert (seen, f"[{kind.upper()}]" in hidden, find(hidden)) == ({kind}, True, [])


@pytest.mark.parametrize(("kind", "text"), EXAMPLES, ids=[f"{kind} {n}" for n, (kind, _) in enumerate(EXAMPLES)])
def test_what_looks_so_and_is_nobodys_is_told_apart_and_masked_alike(kind: str, text: str) -> None:
    for around in SURROUNDINGS:
        whole = around.format(text)
        assert kinds(whole) == (f"example_{kind}",), find(whole)
        hidden, seen = mask(whole)
        assert (seen, f"[{kind.upper()}]" in hidden, find(hidden)) == ({kind}, True, [])


@pytest.mark.parametrize("text", NOTHING, ids=range(len(NOTHING)))
def test_other_numbers_templates_and_program_code_are_left_alone(text: str) -> None:
    assert [(text[span.start : span.end], span.kind) for span in find(text)] == []
    assert mask(text) == (text, set())


def test_a_mask_covers_the_secret_and_nothing_else() -> None:
    text = "Mail a.b@mail.pt or call (732)830-9763; https://ana:x9Kq2w@mail.pt/1 is hers."
    assert mask(text) == (
        "Mail [EMAIL] or call [PHONE]; https://ana:[PASSWORD]@mail.pt/1 is hers.",
        {"email", "phone", "password"},
    )


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        (check_digits.luhn("4539578763621486"), check_digits.luhn("4539578763621468")),
        (check_digits.iban("GB82WEST12345698765432"), check_digits.iban("GB82WEST12345698765423")),
        (check_digits.cpf("52998224725"), check_digits.cpf("52998224752")),
        (check_digits.cnpj("11222333000181"), check_digits.cnpj("11222333000118")),
        (check_digits.cnpj("12ABC34501DE35"), check_digits.cnpj("12ABC34501DE53")),
        (check_digits.nif("123456789"), check_digits.nif("123456798")),
    ],
)
def test_check_digits_tell_two_swapped_digits(right: bool, wrong: bool) -> None:
    assert (right, wrong) == (True, False)


_PIECES = st.sampled_from(
    [text for _, text in FOUND]
    + list("@.:/+-_=()[] \n\"'1290aZé\x00")
    + "password= token: bearer CPF +351 a@b.c ://".split()
)


@settings(max_examples=300)
@given(st.lists(st.one_of(_PIECES, st.text(max_size=8)), max_size=14).map("".join))
def test_whatever_the_text_spans_do_not_overlap_and_a_mask_leaves_none(text: str) -> None:
    spans = find(text)
    edges = [edge for span in spans for edge in span[:2]]
    assert edges == sorted(edges)
    assert all(0 <= span.start < span.end <= len(text) for span in spans)
    hidden, seen = mask(text)
    assert find(hidden) == []
    assert {kind.removeprefix("example_") for kind in kinds(text)} <= seen
    assert (hidden == text) == (not spans)


HOSTILE = [
    "a", "1", "@", "a.", "a@a.", "1 ", "1 ( ", "4111 ", "://a:b", "-----BEGIN PRIVATE KEY-----\n" + "A" * 30,
    "eyJaaaaaaaa.", "password=", "token_", "secret_a_b_c=", "bearer a", "phone number is ", "PT50 0002 0123 ",
    "x@y.com ", "A: b\n", "\ud800", "dapi", "secret_", "SK", "key-", "discord.com/api/webhooks/45678901234567890/",
    "ATATT3x" + "a" * 90, "45678901:A", "M" + "a" * 25 + ".aaaaaa.", ".aaaaaa.", "authorization: basic ",
    "pass", "pass\"=", "contraseña", "00 4 ", "00", "00351 9 ", "(21) 9 ", "cnpj: ", "CNPJ 1", "nif 5", "tlm 91 ", "://anonymous:",
]  # fmt: skip


def timed(atom: str, length: int) -> float:
    text = "@ password basic CNPJ ://@ 1234567 " + atom * (length // len(atom)) + "!"
    started = time.process_time()
    find(text)
    return time.process_time() - started


@pytest.mark.parametrize("atom", HOSTILE)
def test_hostile_text_is_looked_through_in_linear_time(atom: str) -> None:
    assert timed(atom, 200_000) < 1


@pytest.mark.slow
@pytest.mark.parametrize("atom", HOSTILE)
def test_a_megabyte_of_hostile_text_takes_less_than_three_seconds(atom: str) -> None:
    assert timed(atom, 1_000_000) < 3


@pytest.mark.slow
def test_few_rows_of_the_52k_are_flagged_and_quickly(alpaca_rows: list[dict[str, str]]) -> None:
    started = time.process_time()
    found = [kinds(*row.values()) for row in alpaca_rows]
    spent = (time.process_time() - started) / len(alpaca_rows)
    counts = Counter(kind for some in found for kind in some)
    print(f"\n{sum(map(bool, found))} rows: {dict(counts)}; {spent * 1e6:.1f} us a row")
    assert sum(map(bool, found)) == 76
    assert counts == {
        "email": 19, "phone": 7, "password": 6, "ip_address": 3,
        "example_email": 23, "example_phone": 23, "example_credit_card": 6, "example_password": 3,
    }  # fmt: skip
    assert spent < 60e-6


def draft(output: str, instruction: str = "Write a haiku about rain.") -> Draft:
    return Draft(0, 0, instruction, "", output, ("no_input",))


def gate(secrets: str) -> Gate:
    return Gate([], language=LANGUAGES["en"], rules=("length",), threshold=0.7, tokenizer="rouge", secrets=secrets)


def test_the_gate_leaves_masks_or_drops_and_never_repeats_the_secret() -> None:
    given = draft("Ask ana@mail.pt or (732)830-9763.", "Write to rui@mail.pt about the rain.")
    assert gate("flag").judge(given) == (given, Verdict(True))
    masked = Draft(
        0, 0, "Write to [EMAIL] about the rain.", "", "Ask [EMAIL] or [PHONE].",
        ("no_input", "masked-email", "masked-phone"),
    )  # fmt: skip
    assert gate("mask").judge(given) == (masked, Verdict(True))
    assert gate("drop").judge(given) == (given, Verdict(False, "secret", "email phone"))
    for way in ("mask", "drop"):
        assert gate(way).judge(draft("Drip, drop.")) == (draft("Drip, drop."), Verdict(True))


def test_rows_that_a_mask_makes_equal_are_one_row() -> None:
    judged = gate("mask")
    assert judged.judge(draft("a", "Write to rui@mail.pt about rain."))[1].accepted
    assert judged.judge(draft("b", "Write to ana@mail.pt about rain."))[1].rule == "duplicate"


def test_a_dropped_draft_is_no_neighbour_of_later_ones() -> None:
    judged = gate("drop")
    assert judged.judge(draft("ana@mail.pt"))[1].rule == "secret"
    assert judged.judge(draft("Drip, drop."))[1].accepted


ROWS = [
    {"id": "1", "messages": [{"role": "user", "content": "Ask ana@mail.pt."}], "n": 1},
    {"id": "2", "messages": [{"role": "user", "content": "Ask nobody."}], "n": 2},
]


@pytest.mark.parametrize(
    ("way", "kept", "content"), [("mask", ["1", "2"], "Ask [EMAIL]."), ("drop", ["2"], "Ask nobody.")]
)
def test_any_file_is_scrubbed_also_in_nested_text(
    way: str, kept: list[str], content: str, run: Any, tmp_path: Path
) -> None:
    source, out = tmp_path / "rows.jsonl", tmp_path / "clean.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    ended = run("scrub", source, "-o", out, "--secrets", way)
    assert ended.returncode == 0, ended.stderr
    assert "1 of 2 rows" in ended.stdout
    assert "email 1" in ended.stdout
    assert "ana@" not in ended.stdout
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["id"] for row in rows] == kept
    assert rows[0]["messages"][0]["content"] == content
    told = json.loads(run("scrub", source, "--json").stdout)
    assert (told["flagged"], told["because"]) == (
        {"rows": 1, "kinds": {"email": 1}},
        [{"row": f"{source}:1", "kinds": ["email"]}],
    )


@pytest.fixture
def out(run: Any, tmp_path: Path) -> Path:
    """A dataset of one version."""
    assert run("generate", tmp_path / "out", "--teacher", "scripted", "--num", 20).returncode == 0
    return tmp_path / "out"


def test_a_run_from_before_the_setting_goes_on_as_flag_and_as_nothing_else(run: Any, out: Path) -> None:
    connection = connect(run_folder(out) / FILE_NAME, "rw")
    for name in ("identity", "settings"):
        said = json.loads(get_meta(connection, name) or "")
        assert said.pop("secrets") == "flag"
        set_meta(connection, **{name: json.dumps(said)})
    connection.close()
    ended = run("generate", out, "--teacher", "scripted", "--num", 30, "--secrets", "mask")
    assert ended.returncode == 2
    assert "secrets: 'flag' -> 'mask'" in ended.stderr
    assert run("generate", out, "--teacher", "scripted", "--num", 30).returncode == 0
    assert run("resume", out, "--num", 40).returncode == 0
    assert store.find(out, "latest").rows == 40


def test_a_version_from_before_the_column_is_read_verified_healed_and_extended(run: Any, out: Path) -> None:
    now = store.find(out, "v1")
    journal = Journal.read_only(run_folder(out))
    work = store.new_work_folder(out)
    shards = write_shards(work, journal.rows(20), 0.02, profiled=False, flagged=False)
    journal.close()
    for path in (*now.folder.iterdir(), now.folder):
        path.rmdir() if path.is_dir() else path.unlink()
    about = {name: value for name, value in now.about.items() if name != "flagged"}
    old = store.commit(out, work, 1, shards, about)
    (out / card.FILE_NAME).write_text(card.render("out", [old]))

    assert run("verify", out).returncode == 0
    assert run("status", out).returncode == 0
    assert "flags" not in selfinstruct.load(out).column_names
    assert run("resume", out, "--num", 30).returncode == 0
    path = old.folder / shards[0].name
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    assert run("publish", out).returncode == 0
    assert path.read_bytes() == whole
    assert run("verify", out).returncode == 0
    assert [version.about["parent"] for version in store.versions(out)] == [None, "v1"]
    from datasets import load_dataset

    assert "flags" not in load_dataset(str(out), "v1", split="train").column_names
    rows = load_dataset(str(out), "v2", split="train")
    assert rows.column_names[-1] == "flags"
    assert rows[0]["flags"] == []
