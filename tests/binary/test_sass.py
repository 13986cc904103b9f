"""The reader of machine code on short listings, in the spellings of several architectures."""

import pytest

from bench.gpu.machine_code import COPY, KERNELS, instructions_for_packet
from bench.gpu.sass import functions, loads_in_flight


def read(*lines):
    """A kernel of these instructions, 16 bytes each, as cuobjdump prints it."""
    hexadecimal = "                            /* 0x00000a00ff017b82 */"
    code = [f"        /*{16 * n:04x}*/  {line} ; {hexadecimal}\n{hexadecimal}" for n, line in enumerate(lines)]
    text = "\n".join(["\tcode for sm_90", "\t\tFunction : _Z6kernelv", '\t.headerflags\t@"EF_CUDA_SM90"', *code])
    return functions(text)["_Z6kernelv"]


def names(instructions):
    return [instruction.name for instruction in instructions]


def test_instructions_have_address_predicate_opcode_and_operands():
    kernel = read(
        "LDG.E.128.CONSTANT R4, desc[UR6][R8.64+0x10]",
        "@!UP1 UIADD3 UR4, UR4, 0x1, URZ",
        "@P0 LDS.U16 R5, [R4+0x2]",
        "@P0 BRA P1, 0x10",
        "EXIT",
    )
    load, add, shared, branch, _ = kernel.instructions
    assert (load.address, load.predicate, load.bits) == (0, "", 128)
    assert load.has("E", "CONSTANT")
    assert (add.address, add.predicate, add.name, add.bits) == (0x10, "@!UP1", "UIADD3", 32)
    assert (shared.name, shared.bits, shared.target) == ("LDS", 16, None)
    assert (branch.target, branch.conditional) == (0x10, True)


def test_a_text_has_all_its_functions():
    text = "".join(f"\t\tFunction : {name}\n        /*0000*/  EXIT ;  /* 0x0 */\n" for name in ("_Z1av", "_Z1bv"))
    assert {name: len(function.instructions) for name, function in functions(text).items()} == {"_Z1av": 1, "_Z1bv": 1}


@pytest.mark.parametrize("branch", ["@P0 BRA 0x10", "BRA.U UP0, 0x10", "@!P0 BRA P1, 0x10"])
def test_a_branch_back_makes_a_loop(branch):
    kernel = read("MOV R1, R2", "FADD R3, R3, R4", branch, "EXIT")
    (loop,) = kernel.loops
    assert names(loop.instructions()) == ["FADD", "BRA"]


def test_inner_loops_are_distinguished_from_outer_ones():
    kernel = read("DADD R2, R2, R4", "FADD R6, R6, R7", "@P0 BRA 0x10", "DMUL R2, R2, R4", "@P1 BRA 0x0", "EXIT")
    outer, inner = kernel.loops
    assert names(inner.instructions()) == ["FADD", "BRA"]
    assert names(outer.instructions()) == ["DADD", "FADD", "BRA", "DMUL", "BRA"]
    assert kernel.innermost == [inner]


@pytest.mark.parametrize(
    ("rare", "skip"),
    [
        (["DADD R2, R2, R4"], "@P1 BRA 0x30"),
        (["@P1 DADD R2, R2, R4"], "NOP"),
        (["DADD R2, R2, R4"], "BRA.U !UP1, 0x30"),
    ],
    ids=["branch", "predicate", "uniform branch"],
)
def test_instructions_that_a_branch_may_skip_do_not_always_run(rare, skip):
    (loop,) = read("FADD R6, R6, R7", skip, *rare, "IADD3 R1, R1, 0x1, RZ", "@P0 BRA 0x0", "EXIT").loops
    assert "DADD" in names(loop.instructions())
    assert "DADD" not in names(loop.always())
    assert {"FADD", "IADD3"} <= set(names(loop.always()))


def test_rarely_run_code_may_be_placed_after_the_exit():
    (loop,) = read("FADD R6, R6, R7", "@P1 BRA 0x40", "@P0 BRA 0x0", "EXIT", "DADD R2, R2, R4", "BRA 0x20").loops
    assert "DADD" in names(loop.instructions())
    assert names(loop.always()) == ["FADD"]


def test_threads_that_diverge_reconverge_at_the_end_of_their_barrier():
    kernel = read(
        "BSSY B0, 0x50",
        "@P1 BRA 0x40",
        "DADD R2, R2, R4",
        "BSYNC B0",
        "BSYNC B0",
        "FADD R6, R6, R7",
        "@P0 BRA 0x0",
        "EXIT",
    )
    (loop,) = kernel.loops
    assert names(loop.always()) == ["BSSY", "FADD"]


def test_the_shortest_iteration_through_a_block_skips_every_other_branch():
    rare = ["@P2 BRA 0x40", "DADD R8, R8, R10", "DADD R8, R8, R10", "DADD R8, R8, R10"]
    (loop,) = read(*rare, "@P1 BRA 0x70", "LDS R2, [R1]", "BRA 0x80", "LDS.128 R4, [R1]", "@P0 BRA 0x0", "EXIT").loops
    wide = next(n for n in loop.blocks if loop.function.blocks[n][0].bits == 128)
    assert names(loop.shortest_iteration(wide)) == ["BRA", "BRA", "LDS", "BRA"]
    assert [i.bits for i in loop.shortest_iteration(wide) if i.name == "LDS"] == [128]


def test_the_loops_of_a_called_function_are_not_those_of_the_kernel():
    called = ["DMUL R2, R2, R2", "@P0 BRA 0x30", "RET.REL.NODEC R4 0x0"]
    (loop,) = read("CALL.REL.NOINC 0x30", "@P1 BRA 0x0", "EXIT", *called).loops
    assert names(loop.instructions()) == ["CALL", "BRA"]


def test_the_code_of_a_diverged_warp_is_left_out():
    kernel = read("FADD R6, R6, R7", "BRA.DIV UR4, 0x50", "SHFL.BFLY PT, R1, R2, 0x1, 0x1f", "@P0 BRA 0x0", "EXIT",
                  "WARPSYNC.COLLECTIVE R3, 0x60", "SHFL.BFLY PT, R1, R2, 0x1, 0x1f", "BRA 0x30")  # fmt: skip
    (loop,) = kernel.loops
    assert names(loop.always()) == ["FADD", "BRA", "SHFL"]


def test_loads_are_in_flight_until_one_is_used():
    loads = [f"LDG.E.128 R{r}, desc[UR4][R{40 + r}.64]" for r in (4, 8, 12)]
    together = read(*loads, "FFMA R1, R0, R6, R1", "FFMA R1, R0, R13, R1").instructions
    in_turn = read(*(line for n, load in enumerate(loads) for line in (load, f"FFMA R1, R0, R{4 * n + 7}, R1")))
    assert loads_in_flight(together) == 3
    assert loads_in_flight(in_turn.instructions) == 1
    overlapping = read(*loads[:2], "FFMA R1, R0, R4, R1", loads[2], "FFMA R1, R0, R12, R1").instructions
    assert loads_in_flight(overlapping) == 2
    around = read(loads[1], "FFMA R1, R0, R9, R1", loads[0]).instructions
    assert loads_in_flight(around) == 2
    narrow = read("LDG.E R4, [R2.64]", "LDG.E.64 R8, [R2.64]").instructions
    assert loads_in_flight(narrow) == 0


def test_instructions_are_counted_in_the_loop_that_takes_most_packets_at_a_time():
    copy, step = "LDGSTS.E.BYPASS.128.ZFILL [R4], [R2.64], P1", "IADD3 R4, R4, 0x10, RZ"
    at_a_time = read(copy, step, "@P0 BRA 0x0", copy, step, copy, step, "@P0 BRA 0x30", "EXIT")
    assert instructions_for_packet(at_a_time, COPY, 4) == 5 / 2
    two_branches = read("@P2 BRA 0x30", copy, "BRA 0x50", "LDGSTS.E [R4], [R2.64]", "NOP", "@P0 BRA 0x0", "EXIT")
    assert instructions_for_packet(two_branches, COPY, 4) == 4


def test_loops_of_a_kernel_are_identified_by_their_arithmetic():
    _, mean, centred = KERNELS["moments"]
    add, subtract = "FFMA R4, R0, R1, R4", "FADD R5, R6, -R7"
    kernel = read(*[add] * 4, "@P0 BRA 0x0", *[subtract, add, add] * 4, "@P0 BRA 0x50", "EXIT")
    assert instructions_for_packet(kernel, mean, 4) == 5
    assert instructions_for_packet(kernel, centred, 4) == 13
