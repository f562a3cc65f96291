"""reasoning-gym's verifiers, called: here where nothing in them runs what it is given, else in the sandbox.

Several of them `eval` the answer, or hand it to sympy's `parse_expr`, which does; two do it with the row. Imports
nothing but the standard library, so that the sandbox's server can import it without the project's packages.
"""

import json
import sys
import warnings
from contextlib import suppress
from functools import lru_cache
from typing import Any

READ_VERSION = "0.1.25"
"""Of the package whose source was read for `READ_TASKS`: of another one every task is scored in the sandbox."""
_READ = """
ab acre advanced_geometry aiw arc_1d arc_agi base_conversion basic_arithmetic bf binary_alternation boxnet
caesar_cipher calendar_arithmetic chain_sum circuit_logic codeio coin_flip color_cube_rotation complex_arithmetic
count_bits count_primes course_schedule cryptarithm decimal_arithmetic decimal_chain_sum dice emoji_mystery
family_relationships figlet_font fraction_simplification futoshiki game_of_life game_of_life_halting gcd graph_color
group_anagrams gsm_symbolic isomorphic_strings jugs kakurasu knight_swap knights_knaves largest_island lcm
leg_counting letter_counting letter_jumble list_functions mahjong_puzzle manipulate_matrix maze mini_sudoku
modulo_grid needle_haystack number_filtering number_format number_sequence palindrome_generation
palindrome_partitioning path_star polynomial_equations pool_matrix power_function prime_factorization products
propositional_logic quantum_lock ransom_note rearc rectangle_count rotate_matrix rotten_oranges rubiks_cube
rush_hour self_reference sentence_reordering shortest_path simple_equations simple_geometry sokoban spell_backward
string_manipulation string_splitting string_synthesis sudoku survo syllogism time_intervals tower_of_hanoi tsumego
word_ladder word_sequence_reversal word_sorting zebra_puzzles
"""
READ_TASKS = frozenset(_READ.split())
"""Tasks whose verifiers evaluate neither the answer nor the row: read one by one, and run under an audit hook."""


def import_reasoning_gym() -> Any:
    """Return the package. One of its dependencies has sloppy comparisons that Python warns of at the first import."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        import reasoning_gym
    return reasoning_gym


def score(task: str, options: str, answer: str, entry: dict[str, Any]) -> float:
    """Return the task's own score; ``options`` are JSON."""
    return float(_scorer(task, options)(answer=answer, entry=entry))


@lru_cache(maxsize=64)
def _scorer(task: str, options: str) -> Any:
    dataset_class, config_class = import_reasoning_gym().factory.DATASETS[task]
    return dataset_class(config_class(**json.loads(options))).score_answer


def prepare() -> None:
    """Import the package, and what sympy's parser fetches when it is first used, once for all runs of a sandbox."""
    import_reasoning_gym()
    with suppress(Exception):  # another version may have other tasks
        score("simple_integration", "{}", "2*x", {"metadata": {"variable": "x", "integrand": "2"}})


def run() -> None:
    """Score the row on standard input, inside of the sandbox; the score, or the error, goes to standard output."""
    request = json.load(sys.stdin)
    try:
        answer: dict[str, Any] = {"score": score(**request)}
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(answer))
