"""The CUDA kernels under the emulator's schedules, and what it finds in kernels with a planted bug."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from . import sanitize

ROOT = Path(__file__).parents[1]
SCHEDULES = 6


def build(root: Path, check: str, program: Path, *options: str) -> Path:
    """check_<check>.cpp of tests/emulator as a program, from the files under `root`."""
    flags = ["-std=c++17", "-Wno-psabi", "-Wno-unknown-pragmas", "-pthread", *options]
    folder = root / "tests" / "emulator"
    source = folder / f"check_{check}.cpp"
    subprocess.run(["g++", *flags, f"-I{root}", f"-I{folder}", str(source), "-o", str(program)], check=True)
    return program


def run(program: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [str(program), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


def test_wrappers_do_what_they_say(tmp_path):
    """Of the hardware's instructions; `make gpu-check` asks a GPU the same."""
    process = run(build(ROOT, "wrappers", tmp_path / "check"))
    assert process.returncode == 0, process.stdout + process.stderr
    assert process.stdout.count("right: ") == 17
    assert "WRONG" not in process.stdout


@pytest.mark.slow
@pytest.mark.parametrize("check", sanitize.CHECKS)
def test_every_kernel_is_right_under_every_schedule(check, tmp_path):
    """All dtypes and forms, copies that land late and at once."""
    process = run(build(ROOT, check, tmp_path / "check", "-O2"), 0, SCHEDULES)
    assert process.returncode == 0, process.stdout + process.stderr
    assert process.stdout == f"0 wrong in {SCHEDULES} seeds\n"


def test_tsan_sees_races_of_threads(tmp_path):
    """Whichever of them begins, or goes on, before the others have; and nothing where they meet."""
    program = tmp_path / "check"
    built = sanitize.build("TSan", ["tests/emulator/check_races.cpp"], program)
    assert built.returncode == 0, built.stderr
    for right in ("barrier", "syncwarp", "ticket"):
        process = sanitize.run("TSan", program, right)
        assert process.returncode == 0, process.stderr
    for wrong in ("first_barrier", "second_barrier", "syncwarp", "fence"):
        process = sanitize.run("TSan", program, f"missing_{wrong}")
        assert "data race" in process.stderr, wrong


BARRIER = "    __syncthreads();  // this chunk is there for all, and nobody needs the one before\n"
WAIT = "    ptx::cp_async_wait<kMmaStages - 2>();\n"
REFILL = "    load(chunk + kMmaStages - 1);\n"
DESCRIPTION = "half_norm_and_scale{set.half_norm[position], "
DESCRIBED = "  out.half_norm_and_scale[side][r] = half_norm_and_scale;\n"
COLUMNS = "      ptx::ldmatrix_x4(r, columns + j"
TWO_BARRIERS = (
    "    if (threadIdx.x < 200) {\n      __syncthreads();\n    } else {\n      __syncthreads();\n    }\n"
)
FULL_WAIT = "      ptx::mbarrier_wait(&shared.full[stage], multiplied / kWgmmaStages);\n"
EMPTY_WAIT = (
    "  if (loaded >= kWgmmaStages) ptx::mbarrier_wait(&shared.empty[stage], loaded / kWgmmaStages - 1);\n"
)
ARRIVAL = "      if (lane_index() == 0) ptx::mbarrier_arrive(&shared.empty[stage]);\n"
BETWEEN_TILES = "    __syncthreads();  // the next description is there, and nobody needs this one\n"
PRODUCTS_WAIT = "    ptx::wgmma_wait<0>(products.fragment[0]);\n"
ROWS_AT = "before.rows_at + (next.new_rows ? a.chunks : 0)"
MERGED = "  shared.before[warp][lane] = sum;\n  __syncthreads();\n"
SORTED = "      }\n      __syncthreads();\n    }\n  }\n}\n\n// How many"
OTHERS = "    __syncthreads();\n#pragma unroll\n    for (int o = 0;"
NO_PULL = "    if (shared.pulls[step % 2] == 0) continue;\n"
OWN_INSIDE = "inside = first_row + r < p.own_count && first_other"
PRODUCT_WAIT = "    ptx::cp_async_wait<kStages - 2>();\n"
PRODUCT_REFILL = "    load(chunk + kStages - 1);\n"
RESULTS_BARRIER = "  __syncthreads();  // all are through with the stages\n"
WHOLE_PIECE = "whole = l < lines && first + kPieceElements <= elements;"
CLOSE_BARRIER = "  __syncthreads();  // all are through with the stages, and know of the tile's close pairs\n"
SUMS_BARRIER = "  partial[group][lane] = sum;\n  __syncthreads();\n"
OTHER_INSIDE = "marked = other < stripe.rows && "
CANDIDATES_BARRIER = "  __syncthreads();\n  const int count = shared.count;\n"
GROUP_INSIDE = "group < groups && !(least"
CANDIDATE_INSIDE = "if (candidate && slot < kMostCandidates)"
GIVEN_INSIDE = "if (t >= rows) return;"
GIVEN_ELEMENT = "if (k < depth) x[e][s]"
PAIR_INSIDE = "if (t >= pairs.count) return;"
ROW_THERE = "if (!is_row(others, j)) return"
MANY_BARRIER = "    shared.end[warp] = end;\n  }\n  __syncthreads();\n"
PART_SEEN = "  __syncthreads();\n  if (threadIdx.x == 0) {\n    for (int w = 1;"
CLEARED = "shared.active[s] = 0;\n    __syncthreads();\n"

# A file of csrc/cuda, a piece of it, what is put in its place, and what the emulator has to say then.
PLANTED = {
    "missing_barrier": ("mine_mma.cuh", BARRIER, "", "wrong: "),
    "missing_wait": ("mine_mma.cuh", WAIT, "", "wrong: "),
    "early_refill": ("mine_mma.cuh", BARRIER + REFILL, REFILL + BARRIER, "wrong: "),
    "different_barriers": ("mine_mma.cuh", BARRIER, TWO_BARRIERS, "divergent __syncthreads"),
    "barrier_of_some": (
        "mine_mma.cuh",
        BARRIER,
        "    if (threadIdx.x < 200) __syncthreads();\n",
        "deadlock: ",
    ),
    "warp_operation_of_some": (
        "mine_mma.cuh",
        COLUMNS,
        COLUMNS.replace("ptx::", "if (lane < 16) ptx::"),
        "divergent warp",
    ),
    "read_beyond_global_memory": (
        "search_tile.cuh",
        DESCRIPTION,
        DESCRIPTION.replace("position]", "position + kTileRows]"),
        "heap-buffer-overflow",
    ),
    "write_beyond_shared_memory": (
        "search_tile.cuh",
        DESCRIBED,
        DESCRIBED.replace("[side][r]", "[side][r + 8 * kTileRows]"),
        "use-after-poison",
    ),
    "missing_wait_for_bulk_copy": ("mine_wgmma.cuh", FULL_WAIT, "", "mbarrier: more threads arrive"),
    "missing_wait_for_products": ("mine_wgmma.cuh", PRODUCTS_WAIT, "", "wrong: "),
    "refill_of_a_stage_in_use": ("mine_wgmma.cuh", EMPTY_WAIT, "", "deadlock: "),
    "missing_barrier_between_tiles": ("mine_wgmma.cuh", BETWEEN_TILES, "", "wrong: "),
    "missing_arrival": ("mine_wgmma.cuh", ARRIVAL, "", "deadlock: "),
    "products_of_some_warps": (
        "mine_wgmma.cuh",
        PRODUCTS_WAIT,
        "    if (threadIdx.x < 192) ptx::wgmma_wait<0>(products.fragment[0]);\n",
        "divergent warp",
    ),
    "rows_kept_that_do_not_fit": ("mine_wgmma.cuh", " || a.chunks > kWgmmaStages", "", "wrong: "),
    "early_refill_of_rows_that_stay": (
        "mine_wgmma.cuh",
        ROWS_AT,
        ROWS_AT.replace("a.chunks", "kWgmmaStages"),
        "wrong: ",
    ),
    "missing_barrier_of_a_merge": (
        "sort_by_rank.cuh",
        MERGED,
        MERGED.replace("  __syncthreads();\n", ""),
        "heap-buffer-overflow",  # by places made of what others had not written yet
    ),
    "missing_barrier_of_a_sort": (
        "block.cuh",
        SORTED,
        SORTED.replace("      __syncthreads();\n", ""),
        "wrong: ",
    ),
    "missing_barrier_before_a_sum": (
        "pull.cuh",
        OTHERS,
        OTHERS.replace("    __syncthreads();\n", ""),
        "wrong: ",
    ),
    "missing_barrier_after_clearing": (
        "batch_all.cu",
        CLEARED,
        CLEARED.replace("    __syncthreads();\n", ""),
        "wrong: ",
    ),
    "some_threads_skip": (
        "pull.cuh",
        NO_PULL,
        NO_PULL.replace("if (", "if (threadIdx.x % 2 || "),
        "divergent __syncthreads",
    ),
    # Threads that see different numbers of close pairs go different ways.
    "missing_barrier_before_measuring": ("pair_products.cuh", CLOSE_BARRIER, "", "divergent __syncthreads"),
    "missing_barrier_in_sums": (
        "pull_products.cuh",
        SUMS_BARRIER,
        SUMS_BARRIER.replace("  __syncthreads();\n", ""),
        "wrong: ",
    ),
    "marks_beyond_the_stripe": (
        "pull_singles.cuh",
        OTHER_INSIDE,
        "marked = ",
        "heap-buffer-overflow",
    ),
    "missing_barrier_after_candidates": (
        "nearest_neighbors.cu",
        CANDIDATES_BARRIER,
        CANDIDATES_BARRIER.replace("  __syncthreads();\n", ""),
        "divergent __syncthreads",
    ),
    "given_rows_beyond_the_end": ("given_rows.cuh", GIVEN_INSIDE, "", "heap-buffer-overflow"),
    "elements_of_given_rows_beyond_the_end": (
        "given_rows.cuh",
        GIVEN_ELEMENT,
        GIVEN_ELEMENT.replace("if (k < depth) ", ""),
        "heap-buffer-overflow",
    ),
    "pairs_beyond_the_end": ("pair_distances.cuh", PAIR_INSIDE, "", "heap-buffer-overflow"),
    "pairs_with_a_row_that_is_not_there": (
        "pair_distances.cuh",
        ROW_THERE,
        ROW_THERE.replace("!is_row", "false && !is_row"),
        "heap-buffer-overflow",
    ),
    "rows_shared_before_they_are_there": (
        "row_gradient.cuh",
        MANY_BARRIER,
        MANY_BARRIER.replace("  __syncthreads();\n", ""),
        "deadlock: ",
    ),
    "losses_summed_before_they_are_there": (
        "loss_sum.cuh",
        PART_SEEN,
        PART_SEEN.removeprefix("  __syncthreads();\n"),
        "wrong: ",
    ),
    "groups_beyond_the_end": ("nearest_neighbors.cu", GROUP_INSIDE, "!(least", "heap-buffer-overflow"),
    "candidates_beyond_shared_memory": (
        "nearest_neighbors.cu",
        CANDIDATE_INSIDE,
        "if (candidate)",
        "use-after-poison",
    ),
    "missing_wait_for_a_product": ("tile_product.cuh", PRODUCT_WAIT, "", "wrong: "),
    "early_refill_of_a_product": (
        "tile_product.cuh",
        BARRIER + PRODUCT_REFILL,
        PRODUCT_REFILL + BARRIER,
        "wrong: ",
    ),
    "results_over_operands": ("gram.cuh", RESULTS_BARRIER, "", "wrong: "),
    "pieces_beyond_the_end": (
        "lines.cuh",
        WHOLE_PIECE,
        WHOLE_PIECE.replace(" && first + kPieceElements <= elements", ""),
        "heap-buffer-overflow",
    ),
    "strengths_beyond_the_stripe": (
        "pull.cuh",
        OWN_INSIDE,
        OWN_INSIDE.replace("first_row + r < p.own_count && ", ""),
        "heap-buffer-overflow",
    ),
}


# What runs a file of csrc/cuda, where it is not the losses over all pairs in float32.
CHECKS = {
    "mine_wgmma.cuh": ("batch_hard", "float32 wgmma"),
    "mine_mma.cuh": ("batch_hard", "float32 mma"),
    "search_tile.cuh": ("batch_hard", "float32 mma"),
    "sort_by_rank.cuh": ("batch_hard", "sort"),
    "given_rows.cuh": ("given_rows", "float32"),
    "pair_distances.cuh": ("pair_distances", "float32"),
    "row_gradient.cuh": ("pair_distances", "float32 pairs"),
    "loss_sum.cuh": ("given_rows", "float32 triplets, few"),
    "gram.cuh": ("gram", "float32 gram"),
    "lines.cuh": ("gram", "float32 gram"),
    "tile_product.cuh": ("gram", "float32 gram"),
    "pull.cuh": ("all_pairs", "float64 pairs"),
    "nearest_neighbors.cu": ("all_pairs", "float32 neighbors"),
}


FOUND_BY_ASAN = ("heap-buffer-overflow", "use-after-poison")


@pytest.mark.slow
@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_found(bug, tmp_path):
    """Nothing is to be said for it if the program says all is right."""
    file, before, after, expected = PLANTED[bug]
    for part in ("csrc", "tests/emulator"):
        shutil.copytree(ROOT / part, tmp_path / part)
    source = tmp_path / "csrc" / "cuda" / file
    text = source.read_text()
    assert text.count(before) == 1
    source.write_text(text.replace(before, after))
    # Hardly optimised: building takes longer than running, most of all with a sanitizer.
    options = ["-fsanitize=address"] if expected in FOUND_BY_ASAN else ["-Og"]
    check, what = CHECKS.get(file, ("all_pairs", "float32 pairs"))
    # With half as many products a tile, warps get ahead of each other by a whole one within a few schedules.
    # And rows of two chunks, in three places, come to stand where the last ones were.
    if bug in ("missing_barrier_between_tiles", "early_refill_of_rows_that_stay"):
        what = "bfloat16 wgmma"
    process = run(build(tmp_path, check, tmp_path / "check", *options), 0, SCHEDULES, what)
    assert process.returncode != 0
    assert expected in process.stdout + process.stderr
