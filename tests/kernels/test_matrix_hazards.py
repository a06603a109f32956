"""The search for races of matrix products, on PTX written by hand: what is a race, and what only looks like one."""

import pytest

from hueshift.kernels.matrix_hazards import overwritten_operands, parse_ptx, unguarded_copies

FROM_REGISTERS = "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%r1,%r2}, {%r5,%r6}, %rd1, %p1, 1, 1, 0;"
FROM_SHARED = "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%r1,%r2}, %rd1, %rd2, %p1, 1, 1, 0, 0;"
COMMIT = "wgmma.commit_group.sync.aligned;"
LOAD = "ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%r5, %r6}, [%r9];"
COPY = "@%p2 cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier [%r7], [%rd3, {%r8, %r9}], [%r10];"


def wait(left: int) -> str:
    return f"wgmma.wait_group.sync.aligned {left};"


def loop(*body: str) -> str:
    return "\n".join((".visible .entry k()", "{", "$L__BB0_2:", *body, "@%p3 bra $L__BB0_2;", wait(0), "ret;", "}"))


def test_an_operand_that_the_next_pass_loads_too_early_is_found() -> None:
    assert overwritten_operands(loop(LOAD, FROM_REGISTERS, COMMIT, wait(1))) == [LOAD.rstrip(";")]


@pytest.mark.parametrize("count", [2, 4])
def test_a_wait_that_leaves_products_in_flight_covers_the_older_ones_only(count: int) -> None:
    # Each product has registers of its own; the wait before the load covers all but the last.
    products = [FROM_REGISTERS.replace("%r5,%r6", f"%r{10 * n},%r{10 * n + 1}") for n in range(1, count + 1)]
    issued = [line for product in products for line in (product, COMMIT)]
    loads = [f"ld.shared.v2.b32 {{%r{10 * n}, %r{10 * n + 1}}}, [%r9];" for n in range(1, count + 1)]
    assert overwritten_operands(loop(*issued, wait(1), *loads)) == [loads[-1].rstrip(";")]
    assert overwritten_operands(loop(*issued, wait(0), *loads)) == []


def test_a_product_whose_operands_are_in_shared_memory_has_no_registers_to_lose() -> None:
    assert overwritten_operands(loop(LOAD, FROM_SHARED, COMMIT, wait(1))) == []


def test_reading_a_register_is_no_harm_and_a_guarded_write_is() -> None:
    reads = ("st.shared.b32 [%r9], %r5;", "mbarrier.init.shared::cta.b64 [%r5], 1;", "add.s32 %r8, %r5, %r6;")
    assert overwritten_operands(loop(FROM_REGISTERS, COMMIT, *reads, wait(0))) == []
    write = "@%p4 mov.b32 %r6, 0;"
    assert overwritten_operands(loop(FROM_REGISTERS, COMMIT, write, wait(0))) == ["mov.b32 %r6, 0"]


def test_memory_refilled_after_a_wait_without_a_barrier_is_found() -> None:
    assert unguarded_copies(loop(FROM_SHARED, COMMIT, wait(1), COPY)) == [COPY.rstrip(";").removeprefix("@%p2 ")]
    assert unguarded_copies(loop(FROM_SHARED, COMMIT, wait(1), "bar.sync 0;", COPY)) == []
    # Around the loop: the barrier stands before the wait and not behind it.
    assert len(unguarded_copies(loop("bar.sync 0;", FROM_SHARED, COMMIT, wait(1), "add.s32 %r8, %r8, 1;", COPY))) == 1


def test_branches_are_followed_both_ways_and_labels_of_loops_found() -> None:
    code = parse_ptx(loop(LOAD, FROM_SHARED))
    assert [instruction.next for instruction in code] == [(1,), (2,), (0, 3), (4,), ()]
    assert code[0].writes == {"%r5", "%r6"}
