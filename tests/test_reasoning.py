"""Questions whose answers can be checked: generators against Python, the expression parser against `ast`, splits."""

import ast
import itertools
import operator
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from rlhfjax.environments.text import reasoning

TASKS = {
    "sum": reasoning.arithmetic(digits=(1, 3)),
    "sum with steps": reasoning.arithmetic(digits=(2, 4), terms=3, steps=True),
    "product with steps": reasoning.arithmetic("*", digits=(1, 3), steps=True),
    "countdown": reasoning.countdown(),
    "sorting": reasoning.sorting(),
    "descending": reasoning.sorting(numbers=(2, 6), descending=True),
    "backward": reasoning.spelling(),
    "count with steps": reasoning.spelling("count", steps=True),
}
SIGNS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def some(task: reasoning.ReasoningTask, count: int = 60) -> list[reasoning.Question]:
    return reasoning.distinct_questions(task, "train", count, seed=3)


# ---- questions and splits


@pytest.mark.parametrize("name", TASKS)
def test_a_question_is_a_function_of_seed_and_number(name):
    task = TASKS[name]
    asked = [reasoning.question(task, "train", seed=5, index=i) for i in range(20)]
    again = [reasoning.question(task, "train", seed=5, index=i) for i in reversed(range(20))][::-1]
    other = [reasoning.question(task, "train", seed=6, index=i) for i in range(20)]
    assert asked == again and asked != other
    assert len({q.prompt for q in asked}) > 10


def test_the_numbers_behind_a_question_are_those_of_philox():
    """Raw words alone, so that no version of NumPy draws others."""
    bits = np.random.Philox(key=np.array([2, 9], np.uint64)).random_raw(4)
    draw = reasoning.draws(2, 9)
    assert [draw(1000) for _ in range(4)] == [int(word) % 1000 for word in bits]


@pytest.mark.parametrize("name", ["sum", "countdown", "sorting", "backward"])
def test_splits_share_no_question_whatever_the_seed(name):
    keys = {
        split: {
            q.key for seed in (0, 1) for q in reasoning.distinct_questions(TASKS[name], split, 80, seed=seed)
        }
        for split in reasoning.SPLITS
    }
    assert all(len(found) >= 80 for found in keys.values())
    for one, other in itertools.combinations(keys.values(), 2):
        assert not one & other


def test_what_is_asked_twice_in_other_words_lies_in_one_split():
    assert {q.key for q in some(TASKS["sum"], 200)} == {
        "+".join(sorted(q.prompt.split("+"), key=int)) for q in some(TASKS["sum"], 200)
    }
    assert all(q.key.split() == sorted(q.prompt.split(), key=int) for q in some(TASKS["sorting"]))
    share = Counter(reasoning.split_of(f"{i}+{j}") for i in range(100) for j in range(i, 100))
    assert 0.09 < share["test"] / 5050 < 0.11 and 0.09 < share["validation"] / 5050 < 0.11


def test_rows_hold_what_fine_tuning_and_the_verifier_need():
    questions = some(TASKS["sum with steps"], 3)
    rows = reasoning.rows_of(questions, "train")
    assert [row["completion"] for row in rows] == [q.worked for q in questions]
    assert rows[0].keys() == {"prompt", "completion", "answer", "split"}


# ---- the generators


@pytest.mark.parametrize("name", ["sum", "sum with steps", "product with steps"])
def test_arithmetic_is_pythons(name):
    for q in some(TASKS[name]):
        value = str(eval(q.prompt))
        assert q.answer == value and reasoning.final_answer(q.worked) == value
        *steps, last = q.worked.split(";")
        assert last == (f"={value}" if "steps" in name else value)
        for step in steps:
            left, right = step.split("=")
            assert str(eval(left)) == right
        if (
            "sum with" in name
        ):  # the columns' last digits are the answer's, in front of them what is left of the last
            columns = [step.split("=")[1] for step in steps]
            assert columns[-1] + "".join(x[-1] for x in reversed(columns[:-1])) == value
        digits = [len(x) for x in q.prompt.replace("*", "+").split("+")]
        assert min(digits) >= (2 if name == "sum with steps" else 1) and max(digits) <= 4


def test_steps_are_those_of_written_arithmetic():
    assert reasoning.column_steps([47, 85]) == "7+5=12;4+8+1=13;"
    assert reasoning.column_steps([5, 912]) == "5+2=7;1=1;9=9;"
    assert reasoning.product_steps(7, 58) == "7*8=56;7*5=35;56+350=406;"


def test_every_length_of_number_is_as_likely():
    lengths = Counter(len(x) for q in some(TASKS["sum"], 400) for x in q.prompt.split("+"))
    assert all(0.2 < lengths[n] / lengths.total() < 0.45 for n in (1, 2, 3))


def test_sorting_and_spelling_are_pythons():
    for q in some(TASKS["sorting"]):
        assert list(map(int, q.answer.split())) == sorted(map(int, q.prompt.split()))
        assert 3 <= len(q.prompt.split()) <= 5
    for q in some(TASKS["descending"]):
        assert list(map(int, q.answer.split())) == sorted(map(int, q.prompt.split()), reverse=True)
    for q in some(TASKS["backward"]):
        assert q.answer == "".join(reversed(q.prompt)) and 4 <= len(q.prompt) <= 6
    for q in some(TASKS["count with steps"]):
        letter, word = q.prompt.split(":")
        seen: Counter[str] = Counter()
        along = []
        for x in word:
            seen[x] += 1
            along.append(f"{x}{seen[letter]}")
        assert q.worked == f"{' '.join(along)}={seen[letter]}" and q.answer == str(seen[letter])


def test_countdowns_own_answer_is_right_and_uses_every_number():
    for q in some(TASKS["countdown"], 150):
        given, target = q.prompt.split("=")
        assert oracle(q.answer) == (Fraction(int(target)), Counter(map(int, given.split())))
        assert 1 <= int(target) <= 99


# ---- verifiers


@pytest.mark.parametrize("name", TASKS)
def test_worked_answers_are_right_and_others_are_not(name):
    questions = some(TASKS[name], 30)
    prompts = [q.prompt for q in questions]
    references = [q.worked for q in questions]
    assert TASKS[name].verify(prompts, references, reference=references) == [1.0] * 30
    assert TASKS[name].verify(prompts, [q.answer for q in questions], reference=references) == [1.0] * 30
    wrong = [q.answer + "1" for q in questions]
    assert TASKS[name].verify(prompts, wrong, reference=references) == [0.0] * 30
    assert TASKS[name].verify(prompts, [""] * 30, reference=references) == [0.0] * 30


def test_the_answer_is_what_stands_last():
    judged = reasoning.verify_answer(
        ["1+1"] * 6, ["2", " 2 ", "1+1=2", "=2=3", "2=", "02"], reference=["1+1=2;=2"] * 6
    )
    assert judged == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]


def test_countdown_counts_any_expression_of_the_numbers():
    right = ["3+5+8", "8+(5+3)", "( 8 + 5 )+3", "8*5/(5/5)"]
    verify = reasoning.verify_countdown()
    assert verify(["3 5 8=16"] * 3, right[:3]) == [1.0] * 3
    wrong = ["3+5", "16", "8+8", "3+5+8+3-3", "3+5+8=16", "8*5/(5/5)", "3+5-8"]
    assert verify(["3 5 8=16"] * 7, wrong) == [0.0] * 7
    some_of_them = reasoning.verify_countdown(use_all=False)
    assert some_of_them(["3 5 8=40"] * 3, ["5*8", "5*8*3/3", "8*5"]) == [1.0, 0.0, 1.0]
    assert verify(["3 5 8=40"], ["5*8"]) == [0.0]
    assert verify(["2 3 4=1"], ["4/(2*3)"]) == [0.0]
    assert verify(["1 3 4 6=24"], ["6/(1-3/4)"]) == [1.0]  # by a fraction
    with pytest.raises(ValueError, match="'3 5 8' is no countdown"):
        verify(["3 5 8"], ["3+5+8"])


def oracle(text: str):
    """(value, numbers) as Python's own parser reads it, of + - * / on whole numbers; None: it is no such thing."""

    def value(node):
        if isinstance(node, ast.Constant) and type(node.value) is int:
            return Fraction(node.value), Counter([node.value])
        if isinstance(node, ast.BinOp) and type(node.op) in SIGNS:
            (left, some), (right, others) = value(node.left), value(node.right)
            return SIGNS[type(node.op)](left, right), some + others
        raise ValueError

    try:
        return value(ast.parse(text.strip(), mode="eval").body)
    except (ValueError, SyntaxError, ZeroDivisionError):
        return None


def test_the_parser_reads_what_python_reads():
    generator = np.random.default_rng(0)
    alphabet = np.array(list("0123456789" + "+-*/" * 4 + "()" * 4 + "  "))
    texts = ["".join(generator.choice(alphabet, generator.integers(1, 9))) for _ in range(6000)]
    # Random strings hardly ever are expressions: those of real ones, a character changed, often are.
    for q in some(reasoning.countdown(numbers=(3, 5)), 400):
        place, new = generator.integers(len(q.answer)), generator.choice(alphabet)
        texts += [
            q.answer,
            q.answer[:place] + new + q.answer[place + 1 :],
            f"{q.answer[:place]}(0*1){q.answer[place:]}",
        ]
    read = 0
    for text in texts:
        expected = oracle(text)
        found = reasoning.evaluate_expression(text)
        if expected is None:
            assert found is None, text
            continue
        read += 1
        assert found is not None and (found.value, Counter(found.numbers)) == expected, text
    assert 900 < read < len(texts) - 900


def test_what_a_policy_may_write_does_no_harm():
    refused = [
        "",
        "()",
        "-1+2",
        "2**9",
        "7//2",
        "1/0",
        "1/(2-2)",
        "0x1",
        "1_0",
        "07",
        "1.0",
        "a",
        "__import__",
        "1+",
        "(1",
    ]
    refused += [
        "1)",
        "3(4)",
        "1 2",
        "٣+1",
        "1\n+1",
        "(" * 10_000,
        "9**9**9**9",
        "1+" * 5000 + "1",
        "(" * 33 + "1" + ")" * 33,
    ]
    for text in refused:
        assert reasoning.evaluate_expression(text) is None, text[:20]
    found = reasoning.evaluate_expression("(" * 32 + "1" + ")" * 32)
    assert found == reasoning.Value(Fraction(1), (1,))


# ---- bad input


def test_bad_settings_are_named():
    for make, message in (
        (lambda: reasoning.arithmetic(digits=(3, 2)), r"digits=\(3, 2\) must be \(low, high\) with 1 <="),
        (lambda: reasoning.arithmetic("-"), 'operation must be "\\+" or "\\*"'),  # pyright: ignore[reportArgumentType]
        (
            lambda: reasoning.arithmetic("*", terms=3),
            "terms=3 must be at least 2 of a sum, and 2 of a product",
        ),
        (lambda: reasoning.countdown(operations="+^"), "operations='\\+\\^' must be some of"),
        (lambda: reasoning.countdown(numbers=(1, 3)), r"numbers=\(1, 3\) must be"),
        (lambda: reasoning.sorting(largest=0), "largest=0 must be at least 1"),
        (lambda: reasoning.spelling(steps=True), "steps are for counting"),
        (lambda: reasoning.draws(-1, 0), "seed and index must not be negative"),
        (lambda: reasoning.question(TASKS["sum"], "dev", seed=0, index=0), "split must be one of"),  # pyright: ignore[reportArgumentType]
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_a_task_that_has_too_few_questions_says_how_many():
    few = reasoning.arithmetic(digits=(1, 1))  # 55 different sums
    with pytest.raises(
        ValueError, match=r"arithmetic has about \d+ different questions of the train split, and 99"
    ):
        reasoning.distinct_questions(few, "train", 99, seed=0)
    none = reasoning.ReasoningTask(
        "one", lambda draw: reasoning.Question("a", "a", "a", "a"), few.verify, True
    )
    held = "test" if reasoning.split_of("a") == "train" else "train"
    with pytest.raises(ValueError, match=f"one: none of 2000 questions is of the {held} split"):
        reasoning.question(none, held, seed=0, index=0)
    with pytest.raises(ValueError, match="no target up to 99 is reached"):
        reasoning.countdown(numbers=(2, 2), largest=1, operations="-").draw(reasoning.draws(0, 0))


# ---- reasoning-gym


def test_the_adapter_gives_reasoning_gyms_questions_and_scores():
    gym = pytest.importorskip("reasoning_gym")
    task = reasoning.gym_task("chain_sum", max_terms=3)
    questions = some(task, 8)
    entries = gym.create_dataset("chain_sum", size=2**31, seed=0, max_terms=3)
    first = reasoning.draws(3, 0)
    drawn = [entries[first(2**31)]["question"] for _ in range(9)]
    assert questions[0].prompt in drawn
    prompts = [q.prompt for q in questions]
    assert task.verify(prompts, [q.answer for q in questions]) == [1.0] * 8
    assert max(x or 0.0 for x in task.verify(prompts, ["none"] * 8)) < 0.5
    with pytest.raises(ValueError, match="has not been drawn from this task, chain_sum"):
        task.verify(["2+2"], ["4"])
    with pytest.raises(ValueError, match="reasoning-gym has no task 'chain_summ'"):
        reasoning.gym_task("chain_summ")
    with pytest.raises(ValueError, match="reasoning-gym refuses the settings {'colour': 1} of chain_sum"):
        reasoning.gym_task("chain_sum", colour=1)


def test_without_reasoning_gym_its_tasks_say_what_to_install(monkeypatch):
    monkeypatch.setattr("rlhfjax.environments.text.reasoning.gym.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "rlhfjax\[tasks\]"'):
        reasoning.gym_task("chain_sum")
