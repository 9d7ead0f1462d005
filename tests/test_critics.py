"""Lists of digits and their checker, and critics that are programs: by hand, and properties of what they write."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import instantiate
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from alignkit import critique
from alignkit.config import conf_dir
from alignkit.critics import DRAFTS, Fixed, Oracle, PostEdit, Shuffled
from alignkit.data import read
from alignkit.errors import UserError
from alignkit.feedback import Question
from alignkit.loading import BUNDLED, read_tokenizer
from alignkit.rewards import lists, of_texts

SPLITS = {
    "train": "lists.train.jsonl.gz", "first": "lists.first.jsonl.gz", "second": "lists.second.jsonl.gz",
    "dev": "lists.dev.jsonl", "test": "lists.test.jsonl",
}  # fmt: skip
DEV = [columns for _, columns in read("bundled:lists.dev.jsonl")]
EDITS = [{**columns, "prompt": columns["src"], "id": i} for i, (_, columns) in enumerate(read("bundled:mlqe_pe.dev.jsonl"))]  # fmt: skip

digits = st.lists(st.integers(0, 9), min_size=1, max_size=12)
prompts = st.builds(lambda o, d: f"{o}: {' '.join(map(str, d))}", st.sampled_from([*lists.OPERATIONS]), digits)
answers = st.one_of(digits.map(lists.written), st.sampled_from(["", "none", "1, 2", "12 3", "### Feedback", "٣ 4"]))


def question(prompt: str, response: str, **columns: Any) -> Question:
    return Question([], {"prompt": prompt, "id": 0, **columns}, response)


def texts(critic: Any, questions: list[Question]) -> list[str]:
    return [a.text for a in critic.ask(questions, None)]


def one(critic: Any, prompt: str, response: str) -> critique.Critique:
    return critique.parse(texts(critic, [question(prompt, response)])[0])


# ---- the checker ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("sort up: 5 3 9 1 4", "1 3 4 5 9"),
        ("sort down: 5 3 9 1 5", "9 5 5 3 1"),
        ("reverse: 5 3 9 1 5", "5 1 9 3 5"),
        ("no repeats: 5 3 5 0 3 7", "5 3 0 7"),
        ("keep even: 5 2 0 3 8 8", "2 0 8 8"),
        ("keep even: 5 3 1", "none"),
        ("write 5 as item 3: 1 3 4 5", "1 3 5 5"),
        ("write 7 as item 1; drop item 4; drop item 2: 1 3 4 5", "7 4"),  # counted as they stand in the prompt
        ("write 9 as item 3; write 8 as item 4: 1 3", "1 3 9 8"),
        ("drop item 2; drop item 3: 1 3", "1"),
    ],
)
def test_the_answer(prompt: str, answer: str) -> None:
    assert lists.solve(prompt) == answer


@pytest.mark.parametrize(
    ("response", "score", "faults", "repairs"),
    [
        ("1 3 4 5 9", 10, [], []),
        (" 1  3 4 5 9\n", 10, [], []),
        ("1 3 5 5 9", 8, ["4 is missing", "5 is too much"], ["add 4", "drop 5"]),
        ("1 3 4 5", 9, ["9 is missing"], ["add 9"]),
        ("1 3 4 5 9 9 9", 8, ["9 is too much 2 times"], ["drop 9 2 times"]),
        ("1 4 3 5 9 0", 9, ["0 is too much"], ["drop 0"]),  # that 3 and 4 are exchanged comes next
        ("1 4 3 5 9", 8, ["3 is too late"], ["write 3 earlier"]),
        ("9 5 4 3 1", 6, ["1 is too late"], ["write 1 earlier"]),
        ("none", 5, [f"{d} is missing" for d in (1, 3, 4, 5, 9)], [f"add {d}" for d in (1, 3, 4, 5, 9)]),
        ("0 0 0 0 0 0 0 0 0 0 0", 1, ["0 is too much 11 times", *(f"{d} is missing" for d in (1, 3, 4, 5, 9))],
         ["drop 0 11 times", *(f"add {d}" for d in (1, 3, 4, 5, 9))]),
        *((text, 1, ["this is no list of digits"], ["write digits with spaces between them"])
          for text in ("", "1, 3, 4", "13 4 5 9", "the list", "1 3 4 5 ٩")),
    ],
)  # fmt: skip
def test_the_score_and_what_is_wrong(response: str, score: int, faults: list[str], repairs: list[str]) -> None:
    prompt = "sort up: 5 3 9 1 4"
    assert lists.score(prompt, response) == score
    assert lists.faults(prompt, response) == faults
    assert lists.repairs(prompt, response) == repairs


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ("sort up 5 3", "not of the form"),
        ("sort up: 5 x", "not of the form"),
        ("sort upp: 5 3", "Did you mean 'sort up'"),
    ],
)
def test_a_prompt_that_is_none(prompt: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        lists.solve(prompt)


@given(prompts)
def test_only_the_solution_scores_10(prompt: str) -> None:
    solution = lists.solve(prompt)
    assert lists.score(prompt, solution) == 10
    assert lists.score(prompt, lists.corrupted(solution, random.Random(prompt))) < 10


@given(prompts, answers.filter(lists.parse))
def test_all_edits_together_mend_it(prompt: str, answer: str) -> None:
    if edits := lists.edits(prompt, answer):
        assert lists.solve(f"{'; '.join(edits)}: {answer}") == lists.solve(prompt)


@given(prompts, answers)
def test_score_faults_and_repairs_agree(prompt: str, answer: str) -> None:
    faults, repairs, score = (f(prompt, answer) for f in (lists.faults, lists.repairs, lists.score))
    assert len(faults) == len(repairs)
    assert (score == 10) == (not faults)
    assert 1 <= score <= 10 - bool(faults)


def test_the_reward() -> None:
    rows = [
        {"prompt": "sort up: 5 3 9 1 4", "id": 0, "response": y}
        for y in ("1 3 4 5 9", "1 3 4 5", "9 5 4 3 1", "none", "x")
    ]
    assert lists.Lists()(of_texts(rows)).tolist() == pytest.approx([1, 4 / 5, 1 / 5, 0, 0])
    chat = {"prompt": [{"role": "system", "content": "x"}, {"role": "user", "content": "reverse: 1 2"}], "id": 0}
    assert lists.Lists()(of_texts([{**chat, "response": "2 1"}])).tolist() == [1]


# ---- bundled rows --------------------------------------------------------------------------------------------


def test_the_bundled_rows() -> None:
    rows = {split: [c for _, c in read(f"bundled:{file}")] for split, file in SPLITS.items()}
    every = [row["prompt"] for split in rows.values() for row in split]
    assert len(set(every)) == len(every) > 15_000
    for split in ("first", "second", "dev", "test"):
        assert {lists.score(row["prompt"], row["response"]) for row in rows[split]} == {10}
    faulty = sum(row["response"] != lists.solve(row["prompt"]) for row in rows["train"]) / len(rows["train"])
    assert 0.27 < faulty < 0.33
    assert {row["prompt"].partition(":")[0] for row in rows["test"]} == set(lists.OPERATIONS)
    assert sum(bool(re.match("write|drop", row["prompt"])) for row in rows["train"]) > 2_900
    drafts = sum(row["draft"] != row["response"] for row in rows["dev"]) / len(rows["dev"])
    assert 0.6 < drafts < 0.8


def test_the_script_makes_them_again(tmp_path: Path) -> None:
    script = conf_dir().parent / "scripts" / "prepare_lists.py"
    subprocess.run([sys.executable, script, tmp_path, tmp_path / "vocabulary"], check=True)
    for split, file in SPLITS.items():
        made = [c for _, c in read(str(tmp_path / file))]
        assert made == [c for _, c in read(f"bundled:{file}")], split
    made, kept = (json.loads((p / "tokenizer.json").read_text()) for p in (tmp_path / "vocabulary", BUNDLED / "lists"))
    assert made["model"] == kept["model"]


def test_a_critique_is_few_tokens() -> None:
    tokenizer = read_tokenizer(str(BUNDLED / "lists"))
    said = [critique.parse(t) for t in texts(Oracle(), [question(row["prompt"], row["draft"]) for row in DEV])]
    sizes = [
        len(
            tokenizer(critique.written(row["draft"], c.weaknesses, c.suggestions, c.score or 0, c.refinement)).input_ids
        )
        for row, c in zip(DEV, said, strict=True)
    ]
    assert max(sizes) < 120
    assert all(len(tokenizer(f" {d}").input_ids) == 2 for d in range(10))  # the digit and the end


# ---- the oracle ----------------------------------------------------------------------------------------------

SURE = Oracle(noise=0, corruption=0)


def test_what_the_oracle_writes() -> None:
    assert texts(SURE, [question("sort up: 5 3 9 1 4", "1 4 3 5 9")]) == [
        "Weaknesses: 3 is too late.\nSuggestions: write 3 earlier.\n"
        "Overall Score: [[8]]\n\n### Improved Response\n1 3 4 5 9"
    ]
    assert texts(SURE, [question("reverse: 1 2", "2 1")]) == [
        "Weaknesses: nothing.\nSuggestions: keep it.\nOverall Score: [[10]]\n\n### Improved Response\n2 1"
    ]
    few = one(Oracle(noise=0, corruption=0, most=1), "sort up: 5 3 9 1 4", "1 3 5 5 9")
    assert (few.weaknesses, few.suggestions, few.score) == ("4 is missing.", "add 4.", 8)


@given(prompts, answers)
def test_a_sure_oracle_is_right(prompt: str, answer: str) -> None:
    said = one(SURE, prompt, answer)
    assert said.missing(critique.FIELDS) is None
    assert said.refinement == lists.solve(prompt)
    assert said.score == lists.score(prompt, answer)


@given(prompts, answers, st.integers(0, 3))
def test_a_fallible_oracle_can_be_read(prompt: str, answer: str, seed: int) -> None:
    said = one(Oracle(noise=0.5, corruption=0.5, seed=seed), prompt, answer)
    assert said.missing(critique.FIELDS) is None
    assert lists.parse(said.refinement) is not None


def test_how_often_the_oracle_errs() -> None:
    questions = [question(row["prompt"], row["response"], seed=s) for s in range(1) for row in DEV]
    always = [critique.parse(t) for t in texts(Oracle(noise=1, corruption=1), questions)]
    assert all(lists.score(q.row["prompt"], c.refinement) < 10 for q, c in zip(questions, always, strict=True))
    scores = [
        critique.parse(t).score or 0 for s in range(10) for t in texts(Oracle(noise=1, corruption=0, seed=s), questions)
    ]
    # Figure 3: mean 5.33 and, by hand, 6,399 of 24,959 scores are a 7; 4,000 draws: standard errors 0.032 and 0.7 %
    assert sum(scores) / len(scores) == pytest.approx(5.33, abs=0.13)
    assert scores.count(7) / len(scores) == pytest.approx(6399 / 24959, abs=0.03)
    assert sum(DRAFTS) == 24_959
    some = [critique.parse(t) for t in texts(Oracle(noise=0, corruption=0.2), questions)]
    wrong = sum(c.refinement != q.response for q, c in zip(questions, some, strict=True)) / len(questions)
    assert wrong == pytest.approx(0.2, abs=0.08)  # 4 standard errors of 400 draws


# ---- controls ------------------------------------------------------------------------------------------------


@given(prompts, st.lists(st.sampled_from(["1 2 3", "4", "none", "7 7 7 7 7 7 7 7 7"]), min_size=2, max_size=2))
def test_fixed_tells_nothing(prompt: str, answers: list[str]) -> None:
    first, second = (one(Fixed(), prompt, answer) for answer in answers)
    assert first.missing(critique.FIELDS) is None
    assert (first.raw, first.refinement, second.refinement) == (second.raw, *answers)
    again = one(Fixed(), prompt, first.refinement)
    assert again.score == first.score  # so it passes the filter that asks for no loss


DONORS = "bundled:lists.dev.jsonl"


@pytest.mark.parametrize("seed", [0, 1])
def test_shuffled_keeps_score_and_rewrite_alone(seed: int) -> None:
    questions = [question(row["prompt"], row["draft"]) for row in DEV]
    own = [critique.parse(t) for t in texts(Oracle(), questions)]
    other = [critique.parse(t) for t in texts(Shuffled(critic=Oracle(), donors=DONORS, seed=seed), questions)]
    assert [c.score for c in own] == [c.score for c in other]
    assert [c.refinement for c in own] == [c.refinement for c in other]
    assert all((c.weaknesses, c.suggestions) != (d.weaknesses, d.suggestions) for c, d in zip(own, other, strict=True))
    assert {d.weaknesses for d in other} <= {c.weaknesses for c in own}  # these rows are the donors
    assert len({d.weaknesses for d in other}) > 80


def test_shuffled_leaves_what_nothing_tells_apart(tmp_path: Path) -> None:
    file = tmp_path / "donors.jsonl"
    file.write_text(json.dumps({"prompt": "reverse: 1 2", "draft": "2 1"}) + "\n")
    critic = Shuffled(critic=SURE, donors=str(file))
    assert one(critic, "reverse: 3 4", "4 3") == one(SURE, "reverse: 3 4", "4 3")
    assert one(critic, "reverse: 3 4", "3 4").weaknesses == "nothing."


def test_donors_without_the_columns(tmp_path: Path) -> None:
    file = tmp_path / "donors.jsonl"
    file.write_text(json.dumps({"prompt": "reverse: 1 2", "drft": "2 1"}) + "\n")
    with pytest.raises(UserError, match=r"line 1: no text in column 'draft'.*Did you mean 'drft'"):
        one(Shuffled(critic=SURE, donors=str(file)), "reverse: 3 4", "4 3")


@pytest.mark.parametrize("name", sorted(p.stem for p in (conf_dir() / "critic").glob("*.yaml")))
def test_the_order_of_questions_is_nothing(name: str) -> None:
    cfg = OmegaConf.load(conf_dir() / "critic" / f"{name}.yaml")
    if not str(cfg._target_).startswith("alignkit.critics."):
        return
    rows = EDITS if name == "post_edit" else [{**row, "id": i} for i, row in enumerate(DEV)]
    questions = [Question([], row, row["mt" if name == "post_edit" else "draft"]) for row in rows[:60]]
    whole = texts(instantiate(cfg), questions)
    order = random.Random(0).sample(range(len(questions)), len(questions))
    shuffled = texts(instantiate(cfg), [questions[i] for i in order])
    assert [whole[i] for i in order] == shuffled
    assert [texts(instantiate(cfg), [q])[0] for q in questions[:5]] == whole[:5]
    assert len(set(whole)) > 40


# ---- the post-edit -------------------------------------------------------------------------------------------


def test_what_the_post_edit_says() -> None:
    row = {"mt": "das rote Haus ist sehr", "pe": "das blaue Haus ist klein heute", "hter": 0.41, "id": 0, "prompt": "x"}
    ask = lambda response, **more: texts(PostEdit(), [Question([], {**row, **more}, response)])[0]  # noqa: E731
    assert ask(row["mt"]) == (
        'Weaknesses: "rote" is wrong; "sehr" is wrong.\n'
        'Suggestions: write "blaue" for "rote"; write "klein heute" for "sehr".\n'
        "Overall Score: [[5]]\n\n### Improved Response\ndas blaue Haus ist klein heute"  # 10 - ceil(4.1)
    )
    assert critique.parse(ask(row["pe"])).score == 10
    assert "nothing" in critique.parse(ask(row["pe"])).weaknesses
    # neither: one of six words is missing, 10 - ceil(10/6)
    missing = critique.parse(ask("das Haus ist klein heute"))
    assert (missing.weaknesses, missing.suggestions) == ('words are missing after "das".', 'add "blaue" after "das".')
    assert missing.score == 8
    surplus = critique.parse(ask("ja das blaue Haus ist klein heute"))
    assert (surplus.weaknesses, surplus.suggestions) == ('"ja" is too much.', 'drop "ja".')
    assert critique.parse(ask("blaue Haus ist klein heute")).suggestions == 'add "das" at the beginning.'
    assert [critique.parse(ask(row["mt"], hter=h)).score for h in (0, 0.05, 0.1, 0.3, "0.95", 1.4)] == [
        9,
        9,
        9,
        7,
        1,
        1,
    ]


def test_word_edits_by_hand() -> None:
    cases = {("", ""): 0, ("a b c", "a c"): 1, ("a b", "b a"): 2, ("", "a b"): 2, ("a x c", "a b c d"): 2}
    assert {pair: lists.edit_distance(pair[0].split(), pair[1].split()) for pair in cases} == cases


def test_post_edits_of_real_rows() -> None:
    said = [critique.parse(t) for t in texts(PostEdit(), [Question([], row, row["mt"]) for row in EDITS])]
    assert {c.missing(critique.FIELDS) for c in said} == {None}
    assert [c.refinement for c in said] == [row["pe"].strip() for row in EDITS]
    again = [critique.parse(t) for t in texts(PostEdit(), [Question([], row, row["pe"]) for row in EDITS])]
    assert {c.score for c in again} == {10}
    for row, c in zip(EDITS, said, strict=True):
        assert (c.score == 10) == (row["mt"].split() == row["pe"].split())
        assert all(f'"{word}"' not in c.weaknesses for word in set(row["pe"].split()) - set(row["mt"].split()))


@pytest.mark.parametrize(("row", "says"), [({"mt": "a", "hter": 0.1}, "no column 'pe'"), ({"mt": "a", "pe": "b"}, "no column 'hter'"), ({"mt": "a", "pe": "b", "hter": "x"}, "must be a number, is 'x'")])  # fmt: skip
def test_a_row_without_a_post_edit(row: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=f"row 3: .*{says}"):
        PostEdit().ask([Question([], {**row, "id": 3, "prompt": "x"}, "a")], None)


# ---- settings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Oracle(noise=1.1), "noise must be at most 1"),
        (lambda: Oracle(corruption=-0.1), "corruption must be at least 0"),
        (lambda: Oracle(most=0), "most must be at least 1"),
        (lambda: PostEdit(most=0), "most must be at least 1"),
        (lambda: Fixed(score=11), "score must be at most 10"),
        (lambda: Fixed(score=0), "score must be at least 1"),
    ],
)
def test_settings_out_of_range(make: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()


# ---- nearness ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [
        ("kitten", "sitting", 3),
        ("", "abc", 3),
        ("abc", "", 3),
        ("abc", "abc", 0),
        ("12345", "2345", 1),
        ("12345", "54321", 4),
    ],
)
def test_the_edit_distance(a: str, b: str, distance: int) -> None:
    assert lists.edit_distance(a, b) == lists.edit_distance(b, a) == distance


@given(prompts, answers)
def test_nearness_is_1_for_the_right_list_alone(prompt: str, answer: str) -> None:
    rows = [{"prompt": prompt, "id": 0, "response": y} for y in (answer, lists.solve(prompt))]
    near, right = lists.Lists()(of_texts(rows)).tolist()
    assert right == 1.0 and 0 <= near <= 1
    assert (near == 1) == (lists.parse(answer) == lists.parse(lists.solve(prompt)))
